"""What the tree of every algorithm has: the shared blocks, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from nemo_like.config.base import Conflict, Node
from nemo_like.config.data import DataConfig
from nemo_like.config.policy import PolicyConfig
from nemo_like.config.rules import (
    head_conflicts,
    layout_conflicts,
    length_conflicts,
    missing_files,
    secret_conflicts,
    tuning_conflicts,
)
from nemo_like.config.run import CheckpointingConfig, ClusterConfig, LoggerConfig, StepsConfig


class RunTree(Node):
    """The configuration of a run."""

    algorithm: ClassVar[str]
    """The field with the algorithm's own block."""
    real_config: ClassVar[str]
    """The file to start from with a real model."""
    identity: ClassVar[dict[str, Any]]
    """Beside policy, data and start: the keys that make a run what it is, as pydantic includes."""

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

    @property
    def steps(self) -> StepsConfig:
        """How long to train, and when to validate."""
        block: StepsConfig = getattr(self, self.algorithm)
        return block

    @property
    def next_config(self) -> str:
        """The file to go on with when there is nothing left to try with this one."""
        return self.real_config

    @property
    def training_cluster(self) -> ClusterConfig:
        """The machines of the policy."""
        return self.cluster

    def conflicts(self) -> Iterator[Conflict]:
        """What is wrong between the blocks."""
        yield from tuning_conflicts(self.policy, self.real_config)
        yield from layout_conflicts(self.policy, self.training_cluster)
        yield from length_conflicts(self.policy, self.data)
        yield from head_conflicts(self.policy)
        yield from missing_files(self.policy, self.data)
        yield from secret_conflicts(self.policy)
        yield from self._ranking_conflicts()
        yield from self._schedule_conflicts()

    def _ranking_conflicts(self) -> Iterator[Conflict]:
        """Checkpoints that are ranked by what is never measured."""
        ranked_by = self.checkpointing.metric_name or ""
        if self.checkpointing.enabled and ranked_by == "val:val_loss" and self.algorithm != "sft":
            yield Conflict(
                ("checkpointing.metric_name",),
                "is measured by supervised runs alone, examples/run_sft.py; others have "
                "val:accuracy",
            )
        validates = bool(self.data.held_out()) and self.steps.validates
        if self.checkpointing.enabled and ranked_by.startswith("val:") and not validates:
            yield Conflict(
                ("checkpointing.metric_name", "data.validation", f"{self.algorithm}.val_period"),
                "there is no validation to rank checkpoints by; name a train: metric, or null",
            )

    def _schedule_conflicts(self) -> Iterator[Conflict]:
        """A schedule as long as the run, with no room for its parts."""
        schedule = self.policy.active_scheduler
        both = schedule.lr_warmup_iters and schedule.lr_warmup_fraction is not None
        if schedule.lr_decay_iters is not None or both:  # judged without the run
            return
        for found in schedule.misfits(self.steps.max_num_steps):
            keys = (f"policy.{self.policy.key_of('scheduler', key)}" for key in found.keys[:-1])
            yield Conflict((*keys, f"{self.algorithm}.max_num_steps"), found.message)
