"""Weights as a folder that `transformers` loads: safetensors, their index, config, tokenizer."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nemo_like.checkpoint.files import refusing_os_errors, sync_tree, write_json
from nemo_like.errors import CheckpointError
from nemo_like.weight_sync.digest import tensor_digest

INDEX = "model.safetensors.index.json"
TIED = {"lm_head.weight": "model.embed_tokens.weight"}
"""Of a model with `tie_word_embeddings`: which tensor is another one's alias."""


class Tokenizer(Protocol):
    """What a tokenizer of transformers can do."""

    def save_pretrained(self, save_directory: str) -> Any:
        """Write the tokenizer's files."""
        ...


def write_hf(
    folder: Path,
    weights: Iterable[tuple[str, Tensor]],
    *,
    config: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write the weights and what `transformers` needs beside them, holding one shard at a time.

    `config` is the content of config.json; its `dtype` is set to that of the weights.

    Raises:
        CheckpointError: a name comes twice, tied weights differ, or the disk refuses.
    """
    with refusing_os_errors(f"cannot write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        shards = _Shards(folder, max_shard_bytes=max_shard_bytes)
        tied = TIED if config.get("tie_word_embeddings") else {}
        for name, tensor in _without_aliases(weights, tied):
            shards.add(name, tensor)
        dtypes = shards.finish()
        dtype = str(max(dtypes, key=dtypes.__getitem__)).removeprefix("torch.")
        write_json(folder / "config.json", {**config, "dtype": dtype})
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
        sync_tree(folder)


def _without_aliases(
    weights: Iterable[tuple[str, Tensor]], tied: Mapping[str, str]
) -> Iterable[tuple[str, Tensor]]:
    """The weights without those that are another one's alias, which have to be equal to it."""
    digests: dict[str, str] = {}
    for name, tensor in weights:
        if name in tied or name in tied.values():
            digests[name] = tensor_digest(tensor)
        if name not in tied:
            yield name, tensor
    for alias, original in tied.items():
        if original not in digests:
            raise CheckpointError(f"tie_word_embeddings is set, and {original} is not exported")
        if digests.get(alias, digests[original]) != digests[original]:
            raise CheckpointError(
                f"tie_word_embeddings is set, and {alias} differs from {original}"
            )


class _Shards:
    """Collects tensors, and writes a file whenever the next one would pass the limit."""

    def __init__(self, folder: Path, *, max_shard_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_shard_bytes
        self._open: dict[str, Tensor] = {}
        self._open_bytes = 0
        self._total_bytes = 0
        self._shard_of: dict[str, int] = {}
        self._num_shards = 0
        self._num_elements: dict[torch.dtype, int] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        if name in self._shard_of:
            raise CheckpointError(f"{name} is exported twice")
        tensor = tensor.detach().cpu().contiguous()
        if self._open and self._open_bytes + tensor.nbytes > self._max_bytes:
            self._write()
        self._open[name] = tensor
        self._open_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes
        self._shard_of[name] = self._num_shards
        count = self._num_elements.get(tensor.dtype, 0)
        self._num_elements[tensor.dtype] = count + tensor.numel()

    def finish(self) -> dict[torch.dtype, int]:
        """Write the rest and the index; returns how many elements each dtype has."""
        if not self._shard_of:
            raise CheckpointError(f"there are no weights to write into {self._folder}")
        self._write()
        names = [self._name(i) for i in range(self._num_shards)]
        for i, name in enumerate(names):
            self._draft(i).rename(self._folder / name)
        if self._num_shards > 1:
            weight_map = {name: names[i] for name, i in self._shard_of.items()}
            metadata = {"total_size": self._total_bytes}
            write_json(self._folder / INDEX, {"metadata": metadata, "weight_map": weight_map})
        return self._num_elements

    def _write(self) -> None:
        path = self._draft(self._num_shards)
        path.touch()  # with the mode that the user's umask gives; safetensors' own file has 0600
        mode = path.stat().st_mode
        try:
            save_file(self._open, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise CheckpointError(f"cannot write {path}: {error}") from error
        path.chmod(stat.S_IMODE(mode))
        self._open, self._open_bytes = {}, 0
        self._num_shards += 1

    def _draft(self, index: int) -> Path:
        return self._folder / f"shard_{index}.tmp"

    def _name(self, index: int) -> str:
        """The name that transformers looks for; it holds a number that is known only at the end."""
        if self._num_shards == 1:
            return "model.safetensors"
        return f"model-{index + 1:05d}-of-{self._num_shards:05d}.safetensors"
