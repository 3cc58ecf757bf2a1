"""The manifest: which bytes a checkpoint consists of, and what wrote them.

Each file is listed with its size and its xxh3-128 checksum, and the manifest carries a checksum of
itself. This finds every accident: flipped bits, truncation, a lost or added file, a file of another
step. It is no signature: someone who may rewrite the folder may rewrite the manifest too. Against
that, loading executes nothing that it reads (`dcp_storage.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from nemo_like.checkpoint.files import read_json, refusing_os_errors, shown, to_json, write_json
from nemo_like.checkpoint.layout import MANIFEST
from nemo_like.errors import CheckpointError

FORMAT = 1
_PACKAGES = ("nemo-like", "torch", "numpy", "transformers", "safetensors", "megatron-core")


@dataclass(frozen=True)
class RunLayout:
    """What a bit-exact continuation needs to be the same, apart from the packages."""

    world_size: int
    threads_per_worker: int
    device: str


@dataclass(frozen=True)
class Manifest:
    """A verified manifest."""

    step: int
    layout: RunLayout
    packages: Mapping[str, str]

    def differences(self, layout: RunLayout) -> tuple[str, ...]:
        """Why a continuation here is equal to round-off only; none where it is exact to the bit."""
        found = {**vars(self.layout), **self.packages}
        here = {**vars(layout), **_package_versions()}
        return tuple(
            f"{name}: {found.get(name, 'absent')} when saved, {here.get(name, 'absent')} now"
            for name in here | found
            if found.get(name) != here.get(name)
        )


def write(folder: Path, *, step: int, layout: RunLayout) -> None:
    """Write the manifest of all files that are in `folder` now."""
    content = {
        "format": FORMAT,
        "step": step,
        "layout": vars(layout),
        "packages": _package_versions(),
        "files": _describe(folder, _files(folder)),
    }
    write_json(folder / MANIFEST, content | {"digest": _own_digest(content)})


def verify(folder: Path) -> Manifest:
    """The manifest of a checkpoint whose every file is as it was written.

    Raises:
        CheckpointError: names each damaged, missing or foreign file.
    """
    content = _read(folder)
    if folder.name != f"step_{content['step']}":
        raise CheckpointError(
            f"{folder} holds step {content['step']}, by its manifest: it was renamed or copied"
        )
    listed: dict[str, dict[str, Any]] = content["files"]
    with refusing_os_errors(f"cannot read checkpoint {folder}"):
        present = set(_files(folder))
        problems = [f"{name}: missing" for name in listed if name not in present]
        problems += [f"{name}: foreign (not in the manifest)" for name in present - set(listed)]
        whole = []
        for name in present & set(listed):
            found, expected = (folder / name).stat().st_size, listed[name]["bytes"]
            if found == expected:
                whole.append(name)
            else:
                problems.append(f"{name}: {found:,} bytes instead of {expected:,}")
        described = _describe(folder, whole)
    problems += [
        f"{name}: damaged (its checksum differs)"
        for name in whole
        if described[name] != listed[name]
    ]
    if problems:
        raise CheckpointError(f"checkpoint {folder} is damaged: {shown(problems)}")
    return Manifest(
        step=content["step"], layout=RunLayout(**content["layout"]), packages=content["packages"]
    )


def _read(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"checkpoint {folder} is incomplete: {MANIFEST} is missing")
    content = read_json(path)
    # To the byte: otherwise a lost line end, though harmless, would pass.
    as_written = isinstance(content, dict) and path.read_bytes() == to_json(content).encode()
    if not as_written or content.pop("digest", None) != _own_digest(content):
        raise CheckpointError(f"checkpoint {folder} is damaged: {MANIFEST} fails its own checksum")
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"checkpoint {folder} has format {content['format']}, expected {FORMAT}"
        )
    return content


def _own_digest(content: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _files(folder: Path) -> Iterator[str]:
    """Paths of all files but the manifest, relative to `folder`; links are refused."""
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        for name in (*names, *links):
            path = Path(parent) / name
            if path.is_symlink():
                raise CheckpointError(
                    f"checkpoint {folder} holds a link, {path}: copy what it points to"
                )
            if path != folder / MANIFEST:
                yield path.relative_to(folder).as_posix()


def _describe(folder: Path, names: Any) -> dict[str, dict[str, Any]]:
    # Reading dominates (xxh3 hashes some 30 GB/s); threads keep several reads in flight.
    names = sorted(names)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(
            zip(names, pool.map(lambda name: _describe_file(folder / name), names), strict=True)
        )


def _describe_file(path: Path) -> dict[str, Any]:
    with path.open("rb", buffering=0) as file:
        digest = hashlib.file_digest(file, xxhash.xxh3_128)
        return {"bytes": file.tell(), "xxh3_128": digest.hexdigest()}


def _package_versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
