"""Weights from a local Hugging Face folder, one by one; safetensors only, as pickles execute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_like.checkpoint.files import read_json, refusing_os_errors, shown
from nemo_like.checkpoint.hf_export import INDEX, TIED
from nemo_like.errors import CheckpointError

_DTYPES = {"F64", "F32", "BF16", "F16"}
_COMPUTED = (".rotary_emb.inv_freq",)
"""Suffixes of buffers that old exports contain and models compute themselves."""


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor in an open file; only what a slice asks for is read."""

    name: str
    file: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole."""
        return tuple(self.file.get_slice(self.name).get_shape())

    def __getitem__(self, box: tuple[slice, ...]) -> Tensor:
        part: Tensor = self.file.get_slice(self.name)[box]
        return part

    def whole(self) -> Tensor:
        """All of it."""
        tensor: Tensor = self.file.get_tensor(self.name)
        return tensor


def read_hf(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], *, tied: bool
) -> Iterator[tuple[str, Tensor]]:
    """The weights in `folder`, one after the other: the whole tensors of `read_hf_lazily`."""
    for name, tensor in read_hf_lazily(folder, shapes, tied=tied):
        yield name, tensor.whole()


def read_hf_lazily(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], *, tied: bool
) -> Iterator[tuple[str, FileTensor]]:
    """The weights in `folder`, one after the other, in the dtype of the file, on the CPU.

    A tensor can be read until the next one is taken.
    `shapes` are the tensors that the model has, by Hugging Face name. With `tied`, aliases
    (`lm_head.weight`) may be absent from `shapes` and from the folder; they are never yielded.

    Raises:
        CheckpointError: before the first tensor, names every one that is missing, not in the model,
            misshapen or quantised, and every file that is missing, damaged, or outside the folder.
    """
    aliases = TIED if tied else {}
    with ExitStack() as stack, refusing_os_errors(f"cannot read {folder}"):
        files = {path: _open(path, stack) for path in _weight_files(folder)}
        file_of = _names(folder, files)
        problems = [
            *_index_problems(folder, {name: path.name for name, path in file_of.items()}),
            *_tensor_problems(
                shapes, {name: files[path] for name, path in file_of.items()}, aliases
            ),
        ]
        if problems:
            raise CheckpointError(f"{folder} does not fit the model: {shown(problems)}")
        for alias, original in aliases.items():
            if alias in file_of and original in file_of:
                _check_alias(files[file_of[alias]], files[file_of[original]], alias, original)
        for path, file in files.items():
            for name in file.keys():  # noqa: SIM118 - it is no dict
                if name in shapes and name not in aliases and file_of[name] == path:
                    yield name, FileTensor(name, file)


def _weight_files(folder: Path) -> list[Path]:
    """The files that the index lists, or the only one."""
    if (folder / INDEX).is_file():
        listed = sorted(set(_weight_map(folder).values()))
    else:
        listed = ["model.safetensors"]
    if outside := [name for name in listed if Path(name).name != name]:
        raise CheckpointError(f"{folder / INDEX} points outside its folder: {shown(outside)}")
    if missing := [name for name in listed if not (folder / name).is_file()]:
        pickles = [path.name for path in folder.glob("*.bin")]
        hint = f" ({shown(pickles)} would execute code when loaded)" if pickles else ""
        raise CheckpointError(f"{folder} lacks {shown(missing)}; safetensors are expected{hint}")
    return [folder / name for name in listed]


def _weight_map(folder: Path) -> dict[str, str]:
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX} has no weight_map of names to files")
    return weight_map


def _open(path: Path, stack: ExitStack) -> Any:
    try:
        return stack.enter_context(safe_open(path, framework="pt", device="cpu"))
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _names(folder: Path, files: Mapping[Path, Any]) -> dict[str, Path]:
    """The file of each tensor."""
    file_of: dict[str, Path] = {}
    for path, file in files.items():
        for name in file.keys():  # noqa: SIM118 - it is no dict
            if file_of.setdefault(name, path) != path:
                raise CheckpointError(f"{folder} holds {name} twice")
    return file_of


def _index_problems(folder: Path, file_of: Mapping[str, str]) -> list[str]:
    """Where the index and the files disagree."""
    if not (folder / INDEX).is_file():
        return []
    return [
        f"{name}: not in {file}, where {INDEX} says it is"
        for name, file in _weight_map(folder).items()
        if file_of.get(name) != file
    ]


def _tensor_problems(
    shapes: Mapping[str, tuple[int, ...]], files: Mapping[str, Any], aliases: Mapping[str, str]
) -> list[str]:
    problems = [f"{n}: missing" for n in shapes if n not in files and n not in aliases]
    for name, file in files.items():
        if name.endswith(_COMPUTED) or (name in aliases and name not in shapes):
            continue
        found = file.get_slice(name)
        shape, dtype = tuple(found.get_shape()), found.get_dtype()
        if name not in shapes:
            problems.append(f"{name}: not in the model")
        elif shape != tuple(shapes[name]):
            problems.append(f"{name}: shape {shape}, the model has {tuple(shapes[name])}")
        elif dtype not in _DTYPES:
            problems.append(f"{name}: dtype {dtype}, expected one of {', '.join(sorted(_DTYPES))}")
    return problems


def _check_alias(file: Any, original_file: Any, alias: str, original: str) -> None:
    if not torch.equal(file.get_tensor(alias), original_file.get_tensor(original)):
        raise CheckpointError(
            f"the config says tie_word_embeddings, and {alias} differs from {original}: set it to "
            "false in config.json"
        )
