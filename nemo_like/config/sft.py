"""The tree of a supervised fine-tuning run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from nemo_like.config.base import Conflict, NonNegative, Positive
from nemo_like.config.data import ONE_TURN, ConversationDataConfig
from nemo_like.config.run import StepsConfig
from nemo_like.config.tree import RunTree


class SFTConfig(StepsConfig):
    """How long to train, and when to validate."""

    val_batches: NonNegative = 8
    """Batches of one validation; 0 is all."""
    val_global_batch_size: Positive = 32
    """Sequences of one validation batch."""
    val_micro_batch_size: Positive | None = None
    """Sequences of one forward pass per rank in validation; null is `policy.logprob_batch_size`."""
    val_num_answers: NonNegative = 0
    """Prompts of each validation source to answer greedily, except before step 1; 0 is none."""
    val_max_new_tokens: Positive = 128
    """Longest such answer."""
    only_unmask_final: bool = False
    """Learn the last assistant turn only, not all of them."""


class SFTTree(RunTree):
    """Supervised fine-tuning."""

    algorithm: ClassVar[str] = "sft"
    real_config: ClassVar[str] = "configs/sft.yaml"
    identity: ClassVar[dict[str, Any]] = {"sft": {"seed", "only_unmask_final"}}

    data: ConversationDataConfig = ConversationDataConfig()
    """The data of a run."""
    sft: SFTConfig = SFTConfig()
    """How long to train, and when to validate."""

    def conflicts(self) -> Iterator[Conflict]:
        """What is wrong between the blocks."""
        yield from super().conflicts()
        held_out, sft = self.data.held_out(), self.sft
        budget, tokens = self.policy.token_budget("logprob_mb_tokens", "train_mb_tokens")
        rows = sft.val_micro_batch_size
        if rows is not None and tokens is not None and rows != self.policy.logprob_rows:
            yield Conflict(
                ("sft.val_micro_batch_size", f"policy.{budget}"),
                "validation batches are cut by this token budget: leave val_micro_batch_size out",
            )
        if sft.val_num_answers and not held_out:
            yield Conflict(
                ("sft.val_num_answers", "data.validation"), "there are no prompts to answer"
            )
        for path, source in self.data.sources().items():
            if self.data.judge(source) not in ONE_TURN:
                yield Conflict(
                    (f"{path}.env_name",), f"answers are judged by {' or '.join(ONE_TURN)} here"
                )
