"""Trees of (sharded) tensors and plain values on disk: `torch.distributed.checkpoint`, strict.

One tree is one folder: tensors in DCP's files under "/"-joined names, the rest in `values.json`.
DCP reshards; what it leaves open is closed here: it ignores tensors that nobody asked for, casts
dtypes silently, and loads what is no tensor by unpickling it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from nemo_like.checkpoint.boxes import BoxedTensor, LoadPlanner, SavePlanner
from nemo_like.checkpoint.dcp_storage import (
    METADATA,
    Reader,
    Writer,
    read_metadata,
    translating_dcp_errors,
)
from nemo_like.checkpoint.files import (
    read_json,
    refusing_os_errors,
    shown,
    sync_folder,
    write_json,
)
from nemo_like.errors import CheckpointError

State = Mapping[str, Any]
"""A tree of dicts with string keys; leaves are tensors of any kind, or what JSON can hold."""

StoredTensor = torch.Tensor | BoxedTensor
"""A plain tensor, a DTensor, or boxes: all are the same on disk."""

VALUES = "values.json"

# DCP warns at every save and load of a single process; here that is an ordinary way to run.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninit")


@dataclass(frozen=True)
class _Flat:
    """A tree taken apart: what DCP stores and what JSON stores, by "/"-joined name."""

    tensors: dict[str, StoredTensor]
    values: dict[str, Any]


class StateWriter:
    """Writes states, one save at a time; with `asynchronous`, from a copy and in the background.

    Collective: every rank makes one, and makes the same calls. It has a process group of its own
    (gloo), so a save in the background never mixes with the collectives of training.
    """

    def __init__(self, *, asynchronous: bool) -> None:
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._pending: Future[None] | None = None
        pinned = torch.cuda.is_available()
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=pinned,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=pinned,
            )
        )

    def save(self, folder: Path, states: Mapping[str, State]) -> None:
        """Write each state into the sub-folder of its name; returns when it is written, or copied.

        Raises:
            CheckpointError: this save failed, or the one in the background before it.
        """
        self.wait()
        flat = {name: _take_apart(state) for name, state in states.items()}
        if self._thread is None:
            _write_all(folder, flat, self._group)
        else:
            staged = {name: self._copy(part) for name, part in flat.items()}
            self._pending = self._thread.submit(_write_all, folder, staged, self._group)

    def done(self) -> bool:
        """Whether this rank is writing nothing."""
        return self._pending is None or self._pending.done()

    def wait(self) -> None:
        """Return when everything is written.

        Raises:
            CheckpointError: the save in the background failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait, and release the thread and the copies; safe to call twice."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
            self._stager.close()

    def __enter__(self) -> StateWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _copy(self, part: _Flat) -> _Flat:
        live = {n: t.boxes if isinstance(t, BoxedTensor) else t for n, t in part.tensors.items()}
        staged = self._stager.stage(live)
        assert isinstance(staged, dict), "staging is synchronous"
        tensors = {
            n: replace(t, boxes=staged[n]) if isinstance(t, BoxedTensor) else staged[n]
            for n, t in part.tensors.items()
        }
        return _Flat(tensors, part.values)


def load_state(folder: Path, template: State) -> dict[str, Any]:
    """The state in `folder`, in the template's shape and tensors, which are filled in place.

    Collective. The layout may differ from the one that saved: each rank reads what it needs.

    Raises:
        CheckpointError: names every tensor or value that is missing, unexpected, or of another
            shape or dtype; nothing is touched then.
    """
    wanted = _take_apart(template)
    metadata, saved_values = read_metadata(folder), read_json(folder / VALUES)
    if not isinstance(saved_values, dict):
        raise CheckpointError(f"{folder / VALUES} is damaged: an object was expected")
    saved = metadata.state_dict_metadata
    problems = [
        *(_tensor_problem(name, saved.get(name), t) for name, t in wanted.tensors.items()),
        *(f"{name}: not in the checkpoint" for name in wanted.values if name not in saved_values),
    ]
    # One rank's problem is everyone's, since reading is collective; and with pipeline stages only
    # all ranks together know every name.
    gathered = _gather(([p for p in problems if p], {*wanted.tensors, *wanted.values}), None)
    every_name = set().union(*(names for _, names in gathered))
    found = {problem for part, _ in gathered for problem in part}
    found |= {f"{n}: not in this run" for n in (saved.keys() | saved_values.keys()) - every_name}
    if found:
        raise CheckpointError(f"{folder} does not fit this run: {shown(found)}")
    doing = f"cannot read {folder}"
    with refusing_os_errors(doing), translating_dcp_errors(doing):
        dcp_load(
            wanted.tensors,
            storage_reader=Reader(folder, metadata),
            planner=LoadPlanner(),
        )
    return _put_together(template, _Flat(wanted.tensors, saved_values))


def stored_tensors(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every tensor in `folder`, by name, whatever layout saved them."""
    return _shapes_and_dtypes(read_metadata(folder))


def _shapes_and_dtypes(metadata: Metadata) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {
        name: (saved.size, saved.properties.dtype)
        for name, saved in sorted(metadata.state_dict_metadata.items())
        if isinstance(saved, TensorStorageMetadata)
    }


def read_tensors(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of `folder` by name, each whole, and one at a time; no collective.

    Raises:
        CheckpointError: one can not be read.
    """
    metadata = read_metadata(folder)
    stored = _shapes_and_dtypes(metadata)
    doing = f"cannot read {folder}"
    for name in names:
        shape, dtype = stored[name]
        tensor = torch.empty(shape, dtype=dtype)
        with refusing_os_errors(doing), translating_dcp_errors(doing):
            dcp_load(
                {name: tensor},
                storage_reader=Reader(folder, metadata),
                planner=LoadPlanner(),
                no_dist=True,
            )
        yield name, tensor


def is_written(folder: Path) -> bool:
    """Whether all ranks have written their part of this state: DCP adds its metadata last.

    Raises:
        CheckpointError: a part is missing here, as when `folder` is not shared by all machines.
    """
    if not (folder / METADATA).is_file():
        return False
    parts = {info.relative_path for info in read_metadata(folder).storage_data.values()}
    if missing := [part for part in parts if not (folder / part).is_file()]:
        raise CheckpointError(
            f"{folder} lacks {shown(missing)}, which other ranks wrote: "
            "set checkpointing.checkpoint_dir to a folder that every machine shares"
        )
    return True


def _take_apart(state: State, prefix: str = "") -> _Flat:
    flat = _Flat({}, {})
    for key, value in state.items():
        if not isinstance(key, str) or not key or "/" in key:
            raise CheckpointError(f"state key {prefix}{key!r}: expected a string without '/'")
        name = prefix + key
        if isinstance(value, torch.Tensor):
            flat.tensors[name] = value.detach()
        elif isinstance(value, BoxedTensor):
            flat.tensors[name] = value
        elif isinstance(value, Mapping) and value:
            inner = _take_apart(value, name + "/")
            flat.tensors.update(inner.tensors)
            flat.values.update(inner.values)
        elif _survives_json(list(value) if isinstance(value, tuple) else value):
            flat.values[name] = value
        else:
            raise CheckpointError(
                f"state value {name} is a {type(value).__name__} ({value!r:.80}): expected a "
                "tensor, or a plain value that comes back from JSON unchanged"
            )
    return flat


def _put_together(template: State, flat: _Flat, prefix: str = "") -> dict[str, Any]:
    """The inverse of `_take_apart`; JSON knows no tuples, so the template says where they are."""
    tree: dict[str, Any] = {}
    for key, value in template.items():
        name = prefix + key
        if name in flat.tensors:
            tree[key] = flat.tensors[name]
        elif isinstance(value, Mapping) and value:
            tree[key] = _put_together(value, flat, name + "/")
        else:
            saved = flat.values[name]
            tree[key] = tuple(saved) if isinstance(value, tuple) else saved
    return tree


def _survives_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, str) and _survives_json(v) for k, v in value.items())
    if isinstance(value, list):
        return all(_survives_json(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str)


def _write_all(folder: Path, states: Mapping[str, _Flat], group: dist.ProcessGroup | None) -> None:
    for name, state in states.items():
        _write(folder / name, state, group)


def _write(folder: Path, state: _Flat, group: dist.ProcessGroup | None) -> None:
    values = _merge(_gather(state.values, group), folder)
    doing = f"cannot write {folder}"
    with refusing_os_errors(doing), translating_dcp_errors(doing):
        dcp_save(
            state.tensors,
            storage_writer=Writer(folder),
            planner=_Planner(folder, values),
            process_group=group,
        )
        sync_folder(folder)


class _Planner(SavePlanner):
    """Writes the plain values on the coordinator while planning, where DCP shares its failure."""

    def __init__(self, folder: Path, values: dict[str, Any]) -> None:
        super().__init__()
        self._folder, self._values = folder, values

    def create_global_plan(self, all_plans: Any) -> Any:
        write_json(self._folder / VALUES, self._values)
        return super().create_global_plan(all_plans)


def _merge(values_of_ranks: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """The values of all ranks; ranks may hold different names, but not differ on one."""
    merged: dict[str, Any] = {}
    for values in values_of_ranks:
        for name, value in values.items():
            if json.dumps(merged.setdefault(name, value)) != json.dumps(value):
                raise CheckpointError(
                    f"{folder}: one value of {name} was expected, ranks hold {merged[name]!r} "
                    f"and {value!r}"
                )
    return merged


def _tensor_problem(name: str, saved: Any, tensor: StoredTensor) -> str | None:
    if saved is None:
        return f"{name}: not in the checkpoint"
    if not isinstance(saved, TensorStorageMetadata):
        return f"{name}: the checkpoint holds a pickled object, which is never loaded"
    if saved.size != tensor.size() or saved.properties.dtype != tensor.dtype:
        return (
            f"{name}: {tuple(saved.size)} {saved.properties.dtype} in the checkpoint, "
            f"{tuple(tensor.size())} {tensor.dtype} in this run"
        )
    return None


def _gather(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Every rank's value."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered
