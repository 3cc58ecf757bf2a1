"""The tree of a supervised fine-tuning run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from nemo_like.config.base import Conflict, Node, NonNegative, Positive
from nemo_like.config.data import DataConfig
from nemo_like.config.policy import PolicyConfig
from nemo_like.config.rules import (
    layout_conflicts,
    length_conflicts,
    missing_files,
    secret_conflicts,
    tuning_conflicts,
)
from nemo_like.config.run import CheckpointingConfig, ClusterConfig, LoggerConfig


class SFTConfig(Node):
    """How long to train, and when to validate."""

    max_num_epochs: Positive = 1
    """Passes over the data; training ends at the smaller of epochs and steps."""
    max_num_steps: Positive = 60
    """Optimizer steps."""
    val_period: NonNegative = 10
    """Steps between validations; 0 is never."""
    val_batches: NonNegative = 8
    """Batches of one validation; 0 is all."""
    val_global_batch_size: Positive = 32
    """Sequences of one validation batch."""
    val_micro_batch_size: Positive | None = None
    """Sequences of one forward pass per rank in validation; null is `policy.logprob_batch_size`."""
    val_at_start: bool = True
    """Validate before the first step."""
    val_at_end: bool = True
    """Validate after the last step."""
    val_num_answers: NonNegative = 0
    """Prompts of each validation source to answer greedily, except before step 1; 0 is none."""
    val_max_new_tokens: Positive = 128
    """Longest such answer."""
    seed: NonNegative = 42
    """Seed of weights, order and everything else."""
    only_unmask_final: bool = False
    """Learn the last assistant turn only, not all of them."""
    skip_non_finite_steps: NonNegative = 0
    """Steps with a NaN or infinite loss or gradient that may be skipped before the run stops."""


class SFTTree(Node):
    """Supervised fine-tuning."""

    real_config: ClassVar[str] = "configs/sft.yaml"

    sft: SFTConfig = SFTConfig()
    """How long to train, and when to validate."""
    policy: PolicyConfig = PolicyConfig()
    """The model in training."""
    data: DataConfig = DataConfig()
    """The data of a run."""
    checkpointing: CheckpointingConfig = CheckpointingConfig()
    """When checkpoints are written, and which are kept."""
    logger: LoggerConfig = LoggerConfig()
    """Where metrics go."""
    cluster: ClusterConfig = ClusterConfig()
    """The machines a run may use."""

    def conflicts(self) -> Iterator[Conflict]:
        """What is wrong between the blocks."""
        yield from tuning_conflicts(self.policy, self.real_config)
        yield from layout_conflicts(self.policy, self.cluster)
        yield from length_conflicts(self.policy, self.data)
        yield from missing_files(self.policy, self.data)
        yield from secret_conflicts(self.policy)
        yield from self._validation_conflicts()
        yield from self._schedule_conflicts()

    def _schedule_conflicts(self) -> Iterator[Conflict]:
        """A schedule as long as the run, with no room for its parts."""
        schedule = self.policy.active_scheduler
        both = schedule.lr_warmup_iters and schedule.lr_warmup_fraction is not None
        if schedule.lr_decay_iters is not None or both:  # judged without the run
            return
        for found in schedule.misfits(self.sft.max_num_steps):
            keys = (f"policy.{self.policy.key_of('scheduler', key)}" for key in found.keys[:-1])
            yield Conflict((*keys, "sft.max_num_steps"), found.message)

    def _validation_conflicts(self) -> Iterator[Conflict]:
        held_out, sft = self.data.held_out(), self.sft
        validates = bool(held_out) and (sft.val_period > 0 or sft.val_at_start or sft.val_at_end)
        budget, tokens = self.policy.token_budget("logprob_mb_tokens", "train_mb_tokens")
        rows = sft.val_micro_batch_size
        if rows is not None and tokens is not None and rows != self.policy.logprob_rows:
            yield Conflict(
                ("sft.val_micro_batch_size", f"policy.{budget}"),
                "validation batches are cut by this token budget: leave val_micro_batch_size out",
            )
        ranked_by = self.checkpointing.metric_name or ""
        if self.checkpointing.enabled and ranked_by.startswith("val:") and not validates:
            yield Conflict(
                ("checkpointing.metric_name", "data.validation", "sft.val_period"),
                "there is no validation to rank checkpoints by; name a train: metric, or null",
            )
        if sft.val_num_answers and not held_out:
            yield Conflict(
                ("sft.val_num_answers", "data.validation"), "there are no prompts to answer"
            )
