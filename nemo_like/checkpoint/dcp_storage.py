"""Reading and writing for `torch.distributed.checkpoint`: durable, and without executing a file.

DCP's metadata file is a pickle. Here it is unpickled by a reader that makes DCP's own records and
nothing else, and that checks where the records point.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import (
    FileSystem,
    FileSystemReader,
    FileSystemWriter,
)
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from nemo_like.checkpoint.files import durable_stream, refusing_os_errors
from nemo_like.errors import CheckpointError

METADATA = ".metadata"

_RECORDS = (
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
)
_ALLOWED = {
    *(("torch.distributed.checkpoint.metadata", name) for name in _RECORDS),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
}


class Writer(FileSystemWriter):
    """Writes shards and metadata through our durable streams."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, sync_files=False)  # our streams flush
        self.fs = _DurableFileSystem()

    def storage_meta(self) -> StorageMeta:
        """An empty record: DCP's own holds a path of this machine."""
        return StorageMeta()


class Reader(FileSystemReader):
    """Reads shards by metadata that were checked already."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checked metadata."""
        return self._metadata


def read_metadata(folder: Path) -> Metadata:
    """DCP's description of what a folder holds.

    Raises:
        CheckpointError: it is no such description; nothing in it was executed.
    """
    path = folder / METADATA
    with refusing_os_errors(f"cannot read {path}"), path.open("rb") as file:
        try:
            metadata = _Unpickler(file).load()
        except OSError:
            raise
        except Exception as error:  # damaged pickles raise nearly every type there is
            raise CheckpointError(f"{path} is no checkpoint metadata, refused: {error}") from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{path} holds a {type(metadata).__name__}, expected DCP's Metadata")
    for info in metadata.storage_data.values():
        if Path(info.relative_path).name != info.relative_path:
            raise CheckpointError(f"{path} points outside its folder: {info.relative_path!r}")
    return metadata


@contextmanager
def translating_dcp_errors(doing: str) -> Iterator[None]:
    """DCP's failure (no `Exception`, so nothing would catch it) as ours, naming the ranks."""
    try:
        yield
    except CheckpointException as failure:
        causes = {rank: error for rank, (error, _) in failure.failures.items()}
        text = "; ".join(f"rank {rank}: {type(e).__name__}: {e}" for rank, e in causes.items())
        first = next(iter(causes.values()))
        if isinstance(first, OSError):
            raise OSError(first.errno, text) from failure
        raise CheckpointError(f"{doing}: {text}") from failure


class _DurableFileSystem(FileSystem):
    """DCP's file system, with our streams for writing."""

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with durable_stream(Path(path)) if mode == "wb" else Path(path).open(mode) as stream:
            yield stream


class _Unpickler(pickle.Unpickler):
    """Makes the records of DCP's metadata, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")
