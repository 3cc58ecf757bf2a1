"""The tree of a GRPO or DAPO run: which algorithm it is, is a matter of its settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from nemo_like.config.base import (
    Conflict,
    Fraction,
    Node,
    NonNegativeFloat,
    Positive,
)
from nemo_like.config.environments import END_OF_CALL, EnvConfig
from nemo_like.config.generation import RolloutPolicyConfig
from nemo_like.config.loss import ClippedPGConfig
from nemo_like.config.run import ClusterConfig, StepsConfig
from nemo_like.config.tree import RunTree


class RewardScalingConfig(Node):
    """A linear map of rewards, before anything else is done with them."""

    enabled: bool = False
    """Scale."""
    source_min: float = 0.0
    """Rewards are clamped to this from below."""
    source_max: float = 1.0
    """And to this from above."""
    target_min: float = 0.0
    """What `source_min` becomes."""
    target_max: float = 1.0
    """What `source_max` becomes."""

    def conflicts(self) -> Iterator[Conflict]:
        """Ranges without an inside."""
        for low, high in (("source_min", "source_max"), ("target_min", "target_max")):
            if getattr(self, low) >= getattr(self, high):
                yield Conflict((low, high), "the first must be below the second")


class RewardShapingConfig(Node):
    """DAPO's overlong shaping: long responses cost, up to `overlong_buffer_penalty`."""

    enabled: bool = False
    """Shape."""
    overlong_buffer_length: Positive = 128
    """Tokens before `max_response_length` over which the penalty grows from 0."""
    overlong_buffer_penalty: NonNegativeFloat = 1.0
    """Largest penalty."""
    max_response_length: Positive | None = None
    """Tokens from which on the penalty is full; null is `policy.generation.max_new_tokens`."""
    stop_properly_penalty_coef: Fraction | None = None
    """Instead of all that: what part a truncated response keeps of a reward above 0."""


class AdvEstimatorConfig(Node):
    """From rewards to advantages."""

    name: Literal["grpo", "reinforce_plus_plus"] = "grpo"
    """`grpo`: relative to the group. `reinforce_plus_plus`: standardised over the batch."""
    minus_baseline: bool = True
    """Under `reinforce_plus_plus`: subtract the mean of the group first."""


class AsyncGRPOConfig(Node):
    """Rollouts of later steps are drawn while a step trains."""

    enabled: bool = False
    """Run ahead."""
    max_trajectory_age_steps: Positive = 1
    """Most steps the policy is ahead of the weights that drew; engines take weights as often."""


class GRPOConfig(StepsConfig):
    """Prompts and samples, rewards and advantages, and how long to train."""

    max_num_steps: Positive = 1_000_000
    """Steps of the algorithm."""
    num_prompts_per_step: Positive = 32
    """Groups of a step."""
    num_generations_per_prompt: Positive = 16
    """Samples of a group."""
    max_rollout_turns: Positive = 1
    """Most answers of the model in one rollout; between them the environment replies."""
    normalize_rewards: bool = True
    """Divide by the group's standard deviation; false is Dr.GRPO, or RLOO with the next key."""
    use_leave_one_out_baseline: bool = True
    """Compare each sample with the others of its group, not with all."""
    advantage_clip_low: float | None = None
    """Smallest advantage; null is none."""
    advantage_clip_high: float | None = None
    """Largest advantage; null is none."""
    overlong_filtering: bool = False
    """Leave truncated responses out of the loss."""
    use_dynamic_sampling: bool = False
    """DAPO: draw groups until there are enough whose rewards are not all equal."""
    dynamic_sampling_max_gen_batches: Positive = 10
    """Batches to draw at most for one step."""
    batch_multiplier: Annotated[float, Field(ge=1)] = 1.0
    """Prompts of one such batch, as a multiple of `num_prompts_per_step`."""
    on_starvation: Literal["raise", "stop", "train_on_kept"] = "raise"
    """When they are too few even so: an error, an orderly end, or a smaller step."""
    max_val_samples: Positive = 256
    """Prompts of one validation, of all sources together."""
    val_batch_size: Positive = 256
    """Prompts that validation gives to the engines at the same time."""
    val_num_generations_per_prompt: Positive = 1
    """1 answers greedily; more also draws that many samples, for pass@k."""
    adv_estimator: AdvEstimatorConfig = AdvEstimatorConfig()
    """From rewards to advantages."""
    reward_scaling: RewardScalingConfig = RewardScalingConfig()
    """A linear map of rewards."""
    reward_shaping: RewardShapingConfig = RewardShapingConfig()
    """What long responses cost."""
    async_grpo: AsyncGRPOConfig = AsyncGRPOConfig()
    """Rollouts ahead of training."""

    @property
    def is_dapo(self) -> bool:
        """Whether the run takes DAPO's page: dynamic sampling, or overlong shaping."""
        return self.use_dynamic_sampling or self.reward_shaping.enabled

    @property
    def num_rollouts_per_step(self) -> int:
        """Sequences that a step trains on."""
        return self.num_prompts_per_step * self.num_generations_per_prompt

    def conflicts(self) -> Iterator[Conflict]:
        """Groups without a baseline, and settings that contradict each other."""
        yield from self._group_conflicts()
        if self.adv_estimator.name == "grpo" and not self.adv_estimator.minus_baseline:
            yield Conflict(
                ("adv_estimator.minus_baseline", "adv_estimator.name"),
                "GRPO is relative to its group's mean",
            )
        if self.batch_multiplier > 1 and not self.use_dynamic_sampling:
            yield Conflict(
                ("batch_multiplier", "use_dynamic_sampling"),
                "without dynamic sampling every prompt that is drawn is trained on",
            )
        low, high = self.advantage_clip_low, self.advantage_clip_high
        if low is not None and high is not None and low >= high:
            yield Conflict(
                ("advantage_clip_low", "advantage_clip_high"), "the first must be below the second"
            )
        if self.async_grpo.enabled and self.use_dynamic_sampling:
            yield Conflict(
                ("async_grpo.enabled", "use_dynamic_sampling"),
                "how many prompts a step takes is known only once its rewards are, and those of "
                "the next are chosen before",
            )

    def _group_conflicts(self) -> Iterator[Conflict]:
        size, key = self.num_generations_per_prompt, "num_generations_per_prompt"
        in_group = self.adv_estimator.name == "grpo"
        if size == 1 and (in_group or self.adv_estimator.minus_baseline):
            which = "name" if in_group else "minus_baseline"
            yield Conflict(
                (key, f"adv_estimator.{which}"), "a sample alone is its own mean: nothing is left"
            )
        elif size == 1 and self.use_dynamic_sampling:
            yield Conflict(
                (key, "use_dynamic_sampling"), "the rewards of a group of one are always equal"
            )
        elif size == 2 and in_group and self.normalize_rewards and self.use_leave_one_out_baseline:
            yield Conflict(
                (key, "use_leave_one_out_baseline", "normalize_rewards"),
                "one other sample has no standard deviation",
            )


class GRPOTree(RunTree):
    """GRPO and DAPO: reinforcement learning from groups of rollouts."""

    algorithm: ClassVar[str] = "grpo"
    real_config: ClassVar[str] = "configs/grpo_math_1B.yaml"
    identity: ClassVar[dict[str, Any]] = {
        "grpo": set(GRPOConfig.model_fields)
        - {name for name in GRPOConfig.model_fields if name.startswith(("max_num_", "val_"))}
        - {"max_val_samples", "skip_non_finite_steps"},
        "loss_fn": True,
        "env": {"on_failure": True, "math": {"math_verify_impl"}, "custom": {"reward", "reply"}},
    }

    policy: RolloutPolicyConfig = RolloutPolicyConfig()
    """The model in training, which also draws its own data."""
    grpo: GRPOConfig = GRPOConfig()
    """Prompts and samples, rewards and advantages, and how long to train."""
    loss_fn: ClippedPGConfig = ClippedPGConfig()
    """How advantages become a loss."""
    env: EnvConfig = EnvConfig()
    """What judges answers."""

    @property
    def next_config(self) -> str:
        """DAPO on the bundled problems after GRPO on them, then a real model."""
        is_tiny = self.policy.tuned_for is not None
        return "configs/dapo_math.yaml" if is_tiny and not self.grpo.is_dapo else self.real_config

    @property
    def training_cluster(self) -> ClusterConfig:
        """The machines of the policy: all, or what the engines leave."""
        return self.policy.generation.training_part(self.cluster)

    @property
    def max_response_tokens(self) -> int:
        """The most tokens that the model writes in one rollout, where there is room for them."""
        in_turns = self.grpo.max_rollout_turns * self.policy.max_new_tokens
        return min(in_turns, self.policy.max_model_len)

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps on the rollouts of one step."""
        return self.grpo.num_rollouts_per_step // self.policy.train_global_batch_size

    def conflicts(self) -> Iterator[Conflict]:
        """What is wrong between the blocks."""
        misplaced = list(self.policy.generation.placement_conflicts(self.cluster))
        yield from misplaced
        if not misplaced:  # else nobody knows what is left for the policy
            yield from super().conflicts()
        yield from self._update_conflicts()
        yield from self._async_conflicts()
        yield from self._length_conflicts()
        yield from self._environment_conflicts()

    def _update_conflicts(self) -> Iterator[Conflict]:
        grpo, batch = self.grpo, "policy.train_global_batch_size"
        if grpo.num_rollouts_per_step % self.policy.train_global_batch_size:
            yield Conflict(
                (batch, "grpo.num_prompts_per_step", "grpo.num_generations_per_prompt"),
                f"the {grpo.num_rollouts_per_step} rollouts of a step are no whole number of "
                "updates",
            )
        elif self.updates_per_step > 1 and self.loss_fn.force_on_policy_ratio:
            yield Conflict(
                ("loss_fn.force_on_policy_ratio", batch),
                f"from the second of {self.updates_per_step} updates on, the policy is another",
            )
        if self.loss_fn.use_kl_in_reward and grpo.adv_estimator.name == "grpo":
            yield Conflict(
                ("loss_fn.use_kl_in_reward", "grpo.adv_estimator.name"),
                "GRPO has the divergence in its loss; only reinforce_plus_plus in the reward",
            )

    def _async_conflicts(self) -> Iterator[Conflict]:
        if not self.grpo.async_grpo.enabled:
            return
        if not self.loss_fn.use_importance_sampling_correction:
            yield Conflict(
                ("grpo.async_grpo.enabled", "loss_fn.use_importance_sampling_correction"),
                "rollouts of older weights must be weighed: set it to true",
            )
        if self.policy.generation.colocated.enabled:
            yield Conflict(
                ("grpo.async_grpo.enabled", "policy.generation.colocated.enabled"),
                "engines that sleep while the policy trains can not run ahead: set it to false",
            )

    def _length_conflicts(self) -> Iterator[Conflict]:
        """Prompts that leave no room for a response; penalties that begin beyond the end."""
        shaping, longest = self.grpo.reward_shaping, self.max_response_tokens
        prompt = self.data.max_input_seq_length
        longest_sequence = self.policy.max_total_sequence_length
        if prompt is not None and self.policy.max_model_len < prompt <= longest_sequence:
            yield Conflict(
                ("data.max_input_seq_length", "policy.generation.vllm_cfg.max_model_len"),
                "a prompt can not be longer than what an engine holds",
            )
        if not shaping.enabled or shaping.stop_properly_penalty_coef is not None:
            return
        key = "grpo.reward_shaping.max_response_length"
        if shaping.max_response_length is None and self.policy.generation.max_new_tokens is None:
            yield Conflict(
                (key, "policy.generation.max_new_tokens"),
                "where a response ends depends on its prompt, and some would never cost: set one",
            )
        limit = shaping.max_response_length or longest
        if limit > longest:
            yield Conflict(
                (key, "policy.generation.max_new_tokens"),
                f"no response reaches the full penalty: they end at {longest} tokens",
            )
        elif shaping.overlong_buffer_length > limit:
            yield Conflict(
                ("grpo.reward_shaping.overlong_buffer_length", key),
                f"the buffer is longer than the {limit} tokens that it is the end of",
            )

    def _environment_conflicts(self) -> Iterator[Conflict]:
        """Functions that are not named; turns that nobody replies in, and replies without turns."""
        turns, has_turns = "grpo.max_rollout_turns", self.grpo.max_rollout_turns > 1
        custom, stops = self.env.custom, "policy.generation.stop_strings"
        replies = False
        for path, source in self.data.sources().items():
            judge, name = self.data.judge(source), f"{path}.env_name"
            replies |= judge == "calculator" or judge == "custom" and custom.reply is not None
            if judge == "custom" and custom.reward is None:
                yield Conflict(("env.custom.reward", name), "say which function gives rewards")
            if judge == "calculator" and not has_turns:
                yield Conflict(
                    (turns, name),
                    "who calls the calculator must be able to read the result: at least 2 turns",
                )
            if judge == "calculator" and END_OF_CALL not in self.policy.generation.stop_strings:
                yield Conflict(
                    (stops, name), f"an answer must end where a call does: add {END_OF_CALL!r}"
                )
        if custom.reply is not None and not has_turns:
            yield Conflict((turns, "env.custom.reply"), "no reply is read: at least 2 turns")
        if has_turns and not replies:
            yield Conflict((turns, "data.default.env_name"), "no environment of this run replies")
