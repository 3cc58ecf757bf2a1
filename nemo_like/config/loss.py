"""The policy-gradient loss of GRPO and DAPO: `loss_fn`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from nemo_like.config.base import (
    Conflict,
    Fraction,
    Node,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
)

AboveOne = Annotated[float, Field(gt=1)]


class ClippedPGConfig(Node):
    """How advantages become a loss."""

    reference_policy_kl_penalty: NonNegativeFloat = 0.01
    """Coefficient of the KL divergence to the start weights; 0 needs no reference model."""
    reference_policy_kl_type: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL divergence."""
    kl_input_clamp_value: PositiveFloat | None = 20.0
    """Bound of |log ratio| in the KL estimate; null is none."""
    kl_output_clamp_value: PositiveFloat | None = 10.0
    """Bound of a token's KL estimate; null is none."""
    use_on_policy_kl_approximation: bool = False
    """Weigh the KL estimate of a token by policy / rollout engine."""
    use_kl_in_reward: bool = False
    """Take the KL divergence off the advantages, instead of adding it to the loss."""
    ratio_clip_min: Fraction = 0.2
    """The ratio of probabilities counts down to 1 minus this."""
    ratio_clip_max: NonNegativeFloat = 0.2
    """The ratio of probabilities counts up to 1 plus this."""
    ratio_clip_c: AboveOne | None = None
    """Dual clip: with a negative advantage the ratio counts at most this much; null is no bound."""
    force_on_policy_ratio: bool = False
    """Take the ratio as 1 (with its gradient), as in one update per step."""
    disable_ppo_ratio: bool = False
    """Plain policy gradient: the log-probability in place of the ratio, and no clip."""
    use_cispo: bool = False
    """CISPO: the clipped ratio is a constant weight of the log-probability."""
    sequence_level_importance_ratios: bool = False
    """GSPO: one ratio, and one importance weight, per sequence."""
    token_level_loss: bool = True
    """Mean over all tokens; false is the mean over sequences of each one's mean."""
    loss_divisor_tokens: Positive | None = None
    """Dr. GRPO: divide by the sequences times this instead of by the tokens; null does not."""
    use_importance_sampling_correction: bool = False
    """Weigh each token by policy / rollout engine, for what the two compute differently."""
    truncated_importance_sampling_type: Literal["tis", "icepop", "seq-mask-tis"] | None = None
    """Weights out of bounds: `tis` moves them in, `icepop` makes them 0, `seq-mask-tis` the
    sequence."""
    truncated_importance_sampling_ratio: PositiveFloat | None = None
    """Largest importance weight within bounds."""
    truncated_importance_sampling_ratio_min: NonNegativeFloat | None = None
    """Smallest importance weight within bounds; null is 0."""

    @property
    def needs_reference(self) -> bool:
        """Whether batches must carry the log-probabilities of the start weights."""
        return self.reference_policy_kl_penalty > 0

    @property
    def has_kl_in_loss(self) -> bool:
        """Whether the loss itself has a KL term."""
        return self.needs_reference and not self.use_kl_in_reward

    def conflicts(self) -> Iterator[Conflict]:
        """Options that exclude each other, or need one another."""
        yield from self._ratio_conflicts()
        yield from self._importance_conflicts()
        if self.loss_divisor_tokens is not None and not self.token_level_loss:
            yield Conflict(
                ("loss_divisor_tokens", "token_level_loss"),
                "a sequence's sum is divided either by a constant or by its own length",
            )
        if self.use_kl_in_reward and not self.needs_reference:
            yield Conflict(
                ("use_kl_in_reward", "reference_policy_kl_penalty"),
                "a penalty of 0 leaves nothing to take off the reward",
            )
        if self.use_kl_in_reward and self.use_on_policy_kl_approximation:
            yield Conflict(
                ("use_kl_in_reward", "use_on_policy_kl_approximation"),
                "the approximation is a weight in the loss, and there is no KL in the loss",
            )

    def _ratio_conflicts(self) -> Iterator[Conflict]:
        if self.sequence_level_importance_ratios and self.token_level_loss:
            yield Conflict(
                ("sequence_level_importance_ratios", "token_level_loss"),
                "one ratio per sequence (GSPO) goes with the mean per sequence: "
                "set token_level_loss=false",
            )
        if self.use_cispo:
            for key, excluded in (
                ("ratio_clip_c", self.ratio_clip_c is not None),
                ("disable_ppo_ratio", self.disable_ppo_ratio),
                ("sequence_level_importance_ratios", self.sequence_level_importance_ratios),
            ):
                if excluded:
                    yield Conflict(("use_cispo", key), "CISPO clips a ratio per token, once")
            if not self.token_level_loss:
                yield Conflict(("use_cispo", "token_level_loss"), "CISPO is a mean over tokens")
        if self.disable_ppo_ratio and self.ratio_clip_c is not None:
            yield Conflict(("disable_ppo_ratio", "ratio_clip_c"), "there is no ratio to clip")
        if self.disable_ppo_ratio and self.force_on_policy_ratio:
            yield Conflict(
                ("disable_ppo_ratio", "force_on_policy_ratio"), "there is no ratio to make 1"
            )

    def _importance_conflicts(self) -> Iterator[Conflict]:
        kind, low, high = (
            "truncated_importance_sampling_type",
            "truncated_importance_sampling_ratio_min",
            "truncated_importance_sampling_ratio",
        )
        is_bounded = self.truncated_importance_sampling_type is not None
        largest = self.truncated_importance_sampling_ratio
        smallest = self.truncated_importance_sampling_ratio_min
        if is_bounded and not self.use_importance_sampling_correction:
            yield Conflict(
                (kind, "use_importance_sampling_correction"),
                "there are importance weights only with use_importance_sampling_correction=true",
            )
        if is_bounded and largest is None:
            yield Conflict((kind, high), "the largest weight is missing")
        for key, value in ((high, largest), (low, smallest)):
            if value is not None and not is_bounded:
                yield Conflict((key, kind), "a bound without a rule for what is beyond it")
        if largest is not None and smallest is not None and smallest >= largest:
            yield Conflict((low, high), "the smallest weight must be below the largest")
