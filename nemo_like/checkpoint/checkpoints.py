"""The checkpoints of one run: what the driver begins, commits, prunes, and continues from."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_like.checkpoint import layout, manifest, store
from nemo_like.checkpoint.files import (
    read_json,
    refusing_os_errors,
    remove_tree,
    shown,
    sync_folder,
    sync_tree,
    write_json,
    write_text,
)
from nemo_like.checkpoint.manifest import Manifest, RunLayout
from nemo_like.checkpoint.retention import survivors
from nemo_like.config.run import CheckpointingConfig
from nemo_like.errors import CheckpointError, ConfigError

ARCHITECTURE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "layer_types",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
)
"""What of a Hugging Face config changes shapes, or what weights compute."""

_CONVERT = (
    "checkpointing.optimizer_state=convert, which keeps what the new optimizers can use of the "
    "state of the old ones, and says what that is"
)


@dataclass(frozen=True)
class RunIdentity:
    """What a run is: a checkpoint of another model, or with other owners of parameters, is foreign.

    `model` is the Hugging Face config, of which only `ARCHITECTURE` is compared, as far as both
    sides have it: another version of transformers adds fields and leaves some out. `routing` names
    the optimizer of each parameter. `config_yaml` is kept beside the weights for people; it is not
    compared.
    """

    model: Mapping[str, Any]
    routing: Mapping[str, str]
    config_yaml: str
    layout: RunLayout


@dataclass(frozen=True)
class SavedCheckpoint:
    """A whole checkpoint of this run.

    `differences` says what makes a continuation equal to round-off only; it is empty where the
    continuation is exact to the bit. `routing` names the optimizer that each parameter had.
    """

    folder: Path
    step: int
    data: Any
    routing: Mapping[str, str]
    differences: tuple[str, ...]


class Checkpoints:
    """The folder of one run's checkpoints, which no other run may write while this object is open.

    `removed_leftovers` names what saves and deletions that were killed had left behind.
    """

    def __init__(self, config: CheckpointingConfig, identity: RunIdentity) -> None:
        self._root = Path(config.checkpoint_dir)
        self._config = config
        self._identity = identity
        with refusing_os_errors(f"cannot use checkpointing.checkpoint_dir={self._root}"):
            self._root.mkdir(parents=True, exist_ok=True)
            self._lock_fd = _lock(self._root)
            self.removed_leftovers = tuple(layout.find_leftovers(self._root))
            for folder in self.removed_leftovers:
                remove_tree(folder)

    def latest_good(self) -> SavedCheckpoint | None:
        """The newest checkpoint, verified to the last byte; None where there is none yet.

        While this run has none of its own, it is that of `start_from`.

        Raises:
            CheckpointError: the newest one is damaged (the message names the good one to use, and
                the command), or it was saved by a run with another model or routing.
        """
        steps = layout.find_steps(self._root)
        if not steps:
            return self._of_another_run()
        folder = layout.step_folder(self._root, steps[-1])
        try:
            verified = manifest.verify(folder)
        except CheckpointError as damage:
            raise CheckpointError(f"{damage}. {self._way_on(steps)}") from damage
        return self._read(folder, verified)

    def _of_another_run(self) -> SavedCheckpoint | None:
        if self._config.start_from is None:
            return None
        folder = Path(self._config.start_from)
        if not folder.is_dir():
            raise CheckpointError(f"checkpointing.start_from={folder} is no folder")
        if steps := layout.find_steps(folder):
            last = layout.step_folder(folder, steps[-1])
            raise CheckpointError(
                f"checkpointing.start_from={folder} is a folder of checkpoints: name one of them, "
                f"such as {last}"
            )
        return self._read(folder, manifest.verify(folder))

    def begin(self, step: int) -> Path:
        """An empty folder to write this step's checkpoint into.

        Raises:
            CheckpointError: this step has a checkpoint already, or the folder cannot be made.
        """
        folder = layout.draft_folder(self._root, step)
        if layout.step_folder(self._root, step).exists():
            raise CheckpointError(f"{layout.step_folder(self._root, step)} exists already")
        with refusing_os_errors(f"cannot begin checkpoint {folder}"):
            folder.mkdir()
        return folder

    def is_written(self, step: int) -> bool:
        """Whether the policy has written everything: with `is_async`, some time after its `save`.

        Raises:
            CheckpointError: other machines wrote to another place.
        """
        draft = layout.draft_folder(self._root, step)
        parts = (layout.MODEL, *([layout.OPTIMIZER] if self._config.save_optimizer else []))
        return all(store.is_written(draft / part) for part in parts)

    def commit(self, step: int, *, metrics: Mapping[str, float], data: Any) -> Path:
        """Make what was written since `begin` the checkpoint of this step, then delete old ones.

        `metrics` are named as in `checkpointing.metric_name`; `data` is the position in the data.

        Raises:
            CheckpointError: it could not be written; no half checkpoint is left behind.
            ConfigError: `checkpointing.metric_name` is none of the metrics that this run has.
        """
        draft = layout.draft_folder(self._root, step)
        final = layout.step_folder(self._root, step)
        try:
            with refusing_os_errors(f"cannot write checkpoint {final}"):
                if not self.is_written(step):
                    raise CheckpointError(
                        f"{draft} is not written yet: the policy has to save first"
                    )
                self._write_documents(draft, step, metrics=metrics, data=data)
                manifest.write(draft, step=step, layout=self._identity.layout)
                sync_tree(draft)
                draft.rename(final)
                sync_folder(self._root)
        except CheckpointError:
            self.abort(step)
            raise
        self._check_metric_name(metrics)  # not before: what was computed is safe now
        with refusing_os_errors(f"cannot delete old checkpoints in {self._root}"):
            self._prune()
        return final

    def abort(self, step: int) -> None:
        """Delete what was written since `begin`; nothing happens if there is nothing."""
        draft = layout.draft_folder(self._root, step)
        if draft.exists():
            with refusing_os_errors(f"cannot delete {draft}"):
                remove_tree(draft)

    def close(self) -> None:
        """Let other runs write here; safe to call twice."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write_documents(
        self, draft: Path, step: int, *, metrics: Mapping[str, float], data: Any
    ) -> None:
        state = {
            "step": step,
            "metrics": dict(metrics),
            "model": self._identity.model,
            "save_optimizer": self._config.save_optimizer,
        }
        write_text(draft / layout.CONFIG, self._identity.config_yaml)
        write_json(draft / layout.STATE, state)
        write_json(draft / layout.ROUTING, self._identity.routing)
        write_json(draft / layout.DATA, data)

    def _check_metric_name(self, metrics: Mapping[str, float]) -> None:
        """Refuse a name that is misspelt; a step without validation has no `val:` metric at all."""
        name = self._config.metric_name
        if name is None or name in metrics:
            return
        kind = name.split(":")[0] + ":"
        if same_kind := [other for other in metrics if other.startswith(kind)]:
            raise ConfigError(
                f"checkpointing.metric_name={name} is no metric of this run, "
                f"expected one of: {shown(same_kind)}"
            )

    def _prune(self) -> None:
        metric_of_step = {step: self._metric(step) for step in layout.find_steps(self._root)}
        kept = survivors(
            metric_of_step,
            keep_top_k=self._config.keep_top_k,
            higher_is_better=self._config.higher_is_better,
        )
        for step in metric_of_step.keys() - kept:
            doomed = layout.pruned_folder(self._root, step)
            layout.step_folder(self._root, step).rename(doomed)
            sync_folder(self._root)
            remove_tree(doomed)

    def _metric(self, step: int) -> float | None:
        name = self._config.metric_name
        if name is None:
            return None
        folder = layout.step_folder(self._root, step)
        try:
            metric: float | None = read_json(folder / layout.STATE)["metrics"].get(name)
        except CheckpointError:
            return None  # damaged: it ranks below every whole one
        return metric

    def _read(self, folder: Path, verified: Manifest) -> SavedCheckpoint:
        state = read_json(folder / layout.STATE)
        if not state["save_optimizer"]:
            raise CheckpointError(
                f"{folder} was saved with checkpointing.save_optimizer=false, so it cannot be "
                f"continued: start another run from its weights, with "
                f"policy.model_name={folder / layout.HF} and a new checkpointing.checkpoint_dir"
            )
        # Through JSON, like the saved one: a tuple must not differ from a list.
        model, routing = json.loads(json.dumps([self._identity.model, self._identity.routing]))
        compared = [key for key in ARCHITECTURE if key in model and key in state["model"]]
        saved = {key: state["model"][key] for key in compared}
        found = differences(saved, {key: model[key] for key in compared}, "model")
        owners = read_json(folder / layout.ROUTING)
        foreign = found or owners.keys() != routing.keys()
        if foreign or self._config.optimizer_state == "exact":
            found += differences(owners, routing, "routing")
        if found:
            is_own = folder.parent == self._root
            raise CheckpointError(
                f"{folder} belongs to another run: {shown(found)}. Restore its configuration "
                f"({folder / layout.CONFIG}), or "
                + ("set a new checkpointing.checkpoint_dir" if is_own else "start from another")
                + ("" if foreign else f", or set {_CONVERT}")
            )
        return SavedCheckpoint(
            folder=folder,
            step=verified.step,
            data=read_json(folder / layout.DATA),
            routing=owners,
            differences=verified.differences(self._identity.layout),
        )

    def _way_on(self, steps: list[int]) -> str:
        """What to do about a damaged newest checkpoint."""
        newest = layout.step_folder(self._root, steps[-1])
        aside = f"mv {newest} {self._root / f'damaged_{newest.name}'}"
        damaged = [newest]
        for step in reversed(steps[:-1]):
            folder = layout.step_folder(self._root, step)
            try:
                manifest.verify(folder)
            except CheckpointError:
                damaged.append(folder)
                continue
            aside = " && ".join(
                f"mv {each} {each.with_name(f'damaged_{each.name}')}" for each in damaged
            )
            return f"The last good one is {folder}; to continue from it: {aside}, then run again"
        return f"No older one is good; to start anew, set checkpointing.checkpoint_dir, or: {aside}"


def differences(saved: Any, mine: Any, path: str = "") -> list[str]:
    """Where two trees of plain values differ, by dotted path."""
    if isinstance(saved, Mapping) and isinstance(mine, Mapping):
        found = []
        for key in sorted(saved.keys() | mine.keys()):
            at = f"{path}.{key}" if path else key
            if key not in saved:
                found.append(f"{at}: not in the checkpoint, {mine[key]!r} now")
            elif key not in mine:
                found.append(f"{at}: {saved[key]!r} in the checkpoint, absent now")
            else:
                found += differences(saved[key], mine[key], at)
        return found
    return [] if saved == mine else [f"{path}: {saved!r} in the checkpoint, {mine!r} now"]


def _lock(root: Path) -> int:
    """The descriptor of a lock on this folder, which the kernel drops when its process ends.

    Raises:
        CheckpointError: another run holds it.
    """
    path = root / layout.LOCK
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 200, 0).decode(errors="replace").strip()
        os.close(fd)
        raise CheckpointError(
            f"another run writes into {root} ({holder}): wait for it, end it, or set another "
            "checkpointing.checkpoint_dir"
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return fd
