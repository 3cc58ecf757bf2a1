"""Checkpoints, logs, and the machines a run has."""

from __future__ import annotations

from typing import Literal

from nemo_like.config.base import Node, NonNegative, Positive, PositiveFloat


class CheckpointingConfig(Node):
    """When checkpoints are written, and which are kept."""

    enabled: bool = True
    """Write checkpoints, and continue from the latest one at start."""
    checkpoint_dir: str = "results/sft"
    """Folder of the `step_N` folders."""
    metric_name: str | None = "val:val_loss"
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
    """Address or folder; null is `mlflow/` in the run's log folder."""


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
    """`ray`: workers as actors. `local`: one process, no Ray (debugging, notebooks, a single GPU)."""
    address: str | None = None
    """Address of a running Ray cluster; null starts one on this machine."""
    num_nodes: Positive = 1
    """Machines."""
    gpus_per_node: NonNegative | Literal["auto"] = "auto"
    """GPUs of each machine; `auto` is what is found, 0 is CPU."""
    cpu_workers_per_node: Positive = 1
    """Workers of each machine where `gpus_per_node` is 0."""
    cpu_threads_per_worker: Positive = 1
    """Threads of each worker where `gpus_per_node` is 0."""
    worker_timeout_s: PositiveFloat = 1800.0
    """A call that takes longer than this counts as a hang and ends the run."""
