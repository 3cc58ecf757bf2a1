"""What every run has: steps and validations, checkpoints, logs, and machines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from nemo_like.config.base import Conflict, Node, NonNegative, Positive, PositiveFloat


class StepsConfig(Node):
    """How long to train, when to validate, and from which seed."""

    max_num_epochs: Positive = 1
    """Passes over the data; training ends at the smaller of epochs and steps."""
    max_num_steps: Positive = 60
    """Steps of the algorithm."""
    val_period: NonNegative = 10
    """Steps between validations; 0 is never."""
    val_at_start: bool = True
    """Validate before the first step."""
    val_at_end: bool = True
    """Validate after the last step."""
    seed: NonNegative = 42
    """Seed of weights, order and everything else."""
    skip_non_finite_steps: NonNegative = 0
    """Steps with a NaN or infinite loss or gradient that may be skipped before the run stops."""

    @property
    def validates(self) -> bool:
        """Whether there is a step that is validated."""
        return self.val_period > 0 or self.val_at_start or self.val_at_end

    def validates_after(self, step: int, last_step: int) -> bool:
        """Whether there is a validation after this step of a run that ends with `last_step`."""
        is_due = self.val_period > 0 and step % self.val_period == 0
        return is_due or self.val_at_end and step == last_step


class CheckpointingConfig(Node):
    """When checkpoints are written, and which are kept."""

    enabled: bool = True
    """Write checkpoints, and continue from the latest one at start."""
    checkpoint_dir: str = "auto"
    """Folder of the `step_N` folders; `auto` names one in `results/` by policy, data and seed."""
    start_from: str | None = None
    """Checkpoint of another run (`step_N`) to go on from, while `checkpoint_dir` has none."""
    optimizer_state: Literal["exact", "convert"] = "exact"
    """`convert` goes on under other optimizers too: what fits is kept, the rest starts anew."""
    metric_name: str | None = None
    """What checkpoints are ranked by, `val:<name>` or `train:<name>`; null ranks by age."""
    higher_is_better: bool = False
    """The direction of `metric_name`."""
    keep_top_k: Positive | None = 3
    """Best checkpoints to keep (the latest is always kept); null keeps all."""
    save_period: Positive = 10
    """Steps between checkpoints; the last step is always saved."""
    checkpoint_must_save_by: str | None = None
    """Save and stop after this time since the start, `DD:HH:MM:SS`."""
    save_optimizer: bool = True
    """Write optimizer state; without it a run can not be continued exactly."""
    is_async: bool = False
    """Copy the state, train on, and write in the background."""
    model_save_format: Literal["safetensors"] | None = "safetensors"
    """Also write Hugging Face weights that `transformers` loads; null does not."""

    def conflicts(self) -> Iterator[Conflict]:
        """Texts that do not have the form they must have."""
        by = self.checkpoint_must_save_by
        if by is not None and not re.fullmatch(r"\d+:[0-2]\d:[0-5]\d:[0-5]\d", by):
            yield Conflict(
                ("checkpoint_must_save_by",), "the form is DD:HH:MM:SS, e.g. 00:03:45:00"
            )
        if self.metric_name is not None and not re.fullmatch(r"(val|train):.+", self.metric_name):
            yield Conflict(("metric_name",), "the form is val:<name> or train:<name>, or null")
        if self.start_from is not None and not self.enabled:
            yield Conflict(("start_from", "enabled"), "without checkpoints no run goes on from one")


class WandbConfig(Node):
    """Weights & Biases."""

    project: str = "nemo-like"
    """Project name."""
    name: str | None = None
    """Run name."""
    mode: Literal["online", "offline"] = "online"
    """`offline` writes a folder that `wandb sync` uploads later."""


class TensorboardConfig(Node):
    """TensorBoard."""

    log_dir: str | None = None
    """Folder of the event files; null is `tensorboard/` in the run's log folder."""


class MlflowConfig(Node):
    """MLflow (needs `--extra mlflow`)."""

    experiment_name: str = "nemo-like"
    """Experiment name."""
    run_name: str | None = None
    """Run name."""
    tracking_uri: str | None = None
    """Address of a server or database; null is a database in `mlflow/` of the run's log folder."""


class LoggerConfig(Node):
    """Where metrics go. `metrics.jsonl` and `report.html` are always written."""

    log_dir: str = "logs"
    """Each run makes `exp_NNN` in here."""
    tensorboard_enabled: bool = False
    """Write TensorBoard event files."""
    wandb_enabled: bool = False
    """Send to Weights & Biases."""
    mlflow_enabled: bool = False
    """Send to MLflow."""
    num_val_samples_to_print: NonNegative = 3
    """Answers shown at each validation that generates."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""
    tensorboard: TensorboardConfig = TensorboardConfig()
    """TensorBoard."""
    mlflow: MlflowConfig = MlflowConfig()
    """MLflow."""


class ClusterConfig(Node):
    """The machines a run may use."""

    launcher: Literal["ray", "local"] = "ray"
    """`ray`: workers as actors. `local`: one process, no Ray (debugging, notebooks, one GPU)."""
    address: str | None = None
    """Address of a running Ray cluster; null starts one on this machine."""
    num_nodes: Positive = 1
    """Machines."""
    gpus_per_node: NonNegative | Literal["auto"] = "auto"
    """GPUs of each machine; `auto` is what is found, 0 is CPU."""
    cpu_workers_per_node: Positive = 1
    """Workers of each machine where `gpus_per_node` is 0."""
    cpu_threads_per_worker: Positive = 1
    """CPU threads of each worker, with or without a GPU."""
    worker_timeout_s: PositiveFloat = 1800.0
    """A call that takes longer than this (a start: 1800 s at least) is a hang, and ends the run."""

    @property
    def collective_timeout_s(self) -> float:
        """A little more: the driver gives up first, as it can say who is missing, and where."""
        return self.worker_timeout_s + 60.0

    @property
    def world_size(self) -> int | None:
        """Workers in all; None where only placement can tell (`gpus_per_node=auto`)."""
        if self.launcher == "local":
            return 1
        if self.gpus_per_node == "auto":
            return None
        return self.num_nodes * (self.gpus_per_node or self.cpu_workers_per_node)

    @property
    def world_keys(self) -> tuple[str, ...]:
        """The fields that `world_size` is made of."""
        if self.launcher == "local":
            return ("launcher",)
        return ("num_nodes", "gpus_per_node" if self.gpus_per_node else "cpu_workers_per_node")

    def conflicts(self) -> Iterator[Conflict]:
        """Machines that the launcher does not use."""
        if self.launcher != "local":
            return
        for name in ("num_nodes", "gpus_per_node", "cpu_workers_per_node"):
            value = getattr(self, name)
            if isinstance(value, int) and value > 1:
                yield Conflict(("launcher", name), "`local` is one process on one device")
        if self.address is not None:
            yield Conflict(("launcher", "address"), "`local` does without Ray")
