"""Durable files: what we write into a checkpoint goes through here, and is on disk on return.

DCP's shards come through `durable_stream` too. Only safetensors and tokenizers write by themselves;
`sync_tree` flushes those before a checkpoint is renamed.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from nemo_like.errors import CheckpointError

_CURES = {
    errno.ENOSPC: "free space, lower checkpointing.keep_top_k, or set checkpointing.checkpoint_dir",
    errno.EDQUOT: "free space, lower checkpointing.keep_top_k, or set checkpointing.checkpoint_dir",
    errno.EACCES: "set checkpointing.checkpoint_dir to a folder that this user may write",
    errno.EPERM: "set checkpointing.checkpoint_dir to a folder that this user may write",
    errno.EROFS: "set checkpointing.checkpoint_dir to a folder that can be written",
    errno.EIO: "the disk fails: set checkpointing.checkpoint_dir to another one",
}


@contextmanager
def refusing_os_errors(doing: str) -> Iterator[None]:
    """An OSError inside becomes a CheckpointError that says what was being done, and the cure."""
    try:
        yield
    except OSError as error:
        cure = _CURES.get(error.errno or 0, "look at checkpointing.checkpoint_dir")
        raise CheckpointError(f"{doing}: {error} ({cure})") from error


class _DurableFile(io.RawIOBase):
    """A new file that is flushed to disk when it is closed."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self._position = 0

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def tell(self) -> int:
        return self._position

    def write(self, data: Any) -> int:
        written = os.write(self._fd, data)
        self._position += written
        return written

    def close(self) -> None:
        if self.closed:
            return
        try:
            os.fsync(self._fd)
        finally:
            os.close(self._fd)
            super().close()


@contextmanager
def durable_stream(path: Path) -> Iterator[IO[bytes]]:
    """A binary stream to a new file, which is on disk when the block ends."""
    with io.BufferedWriter(_DurableFile(path), buffer_size=1 << 20) as stream:
        yield stream


def shown(problems: Iterable[str]) -> str:
    """The first ten of many problems in one line, and how many more there are."""
    ordered = sorted(problems)
    more = f"; and {len(ordered) - 10} more" if len(ordered) > 10 else ""
    return "; ".join(ordered[:10]) + more


def write_text(path: Path, text: str) -> None:
    """Write a small UTF-8 file."""
    with durable_stream(path) as stream:
        stream.write(text.encode())


def to_json(value: Any) -> str:
    """A value as we write it; floats survive to the bit."""
    return json.dumps(value, indent=1) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON."""
    write_text(path, to_json(value))


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        CheckpointError: the file is missing or is not JSON.
    """
    with refusing_os_errors(f"cannot read {path}"):
        raw = path.read_bytes()
    try:
        return json.loads(raw)
    except ValueError as error:  # also what bytes that are not UTF-8 raise
        raise CheckpointError(f"{path} is not JSON ({error}): the file is damaged") from error


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder: without this a crash can lose a file whose bytes are on disk."""
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def sync_tree(folder: Path) -> None:
    """Flush every file and every folder below, and this folder itself."""
    for parent, _, names in os.walk(folder):
        for name in names:
            _sync(Path(parent) / name, os.O_RDONLY)
        sync_folder(Path(parent))


def _sync(path: Path, flags: int) -> None:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_tree(folder: Path) -> None:
    """Delete a folder with all that is in it."""
    shutil.rmtree(folder)
