"""The random number generators of one rank, as JSON."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_like.checkpoint.files import read_json, refusing_os_errors, sync_folder, write_json
from nemo_like.checkpoint.layout import RNG
from nemo_like.errors import CheckpointError


def seed(seed: int, *, stream: int) -> None:
    """Start the global generators anew: another stream of random numbers for each pair.

    Source: the mixing is numpy's `SeedSequence`, which keeps streams of neighbouring seeds apart.
    """
    python, numpy, of_torch = np.random.SeedSequence([seed, stream]).generate_state(3).tolist()
    random.seed(python)
    np.random.seed(numpy)
    torch.manual_seed(of_torch)  # of every GPU too


def capture() -> dict[str, Any]:
    """The state of the global generators: Python, numpy, torch, and the GPU if one is used."""
    _, key, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [np.asarray(key).tolist(), position, has_gauss, gauss],
        "torch": _to_hex(torch.get_rng_state()),
        "cuda": _to_hex(torch.cuda.get_rng_state()) if _uses_gpu() else None,
    }


def restore(state: dict[str, Any]) -> None:
    """Take what `capture` returned (or its JSON) as the state of the generators.

    Raises:
        CheckpointError: it was captured with a GPU and this rank has none, or the other way round.
    """
    if (state["cuda"] is not None) != _uses_gpu():
        raise CheckpointError(
            f"the RNG state was saved {'without' if state['cuda'] is None else 'with'} a GPU, "
            "unlike this worker: continue with the cluster.gpus_per_node of the checkpoint"
        )
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    key, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(_from_hex(state["torch"]))
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(_from_hex(state["cuda"]))


def save(folder: Path, *, rank: int, world_size: int) -> None:
    """Write this rank's generators into a checkpoint folder."""
    with refusing_os_errors(f"cannot write {folder / RNG}"):
        (folder / RNG).mkdir(parents=True, exist_ok=True)
        write_json(_file(folder, rank), {"world_size": world_size, **capture()})
        sync_folder(folder / RNG)


def load(folder: Path, *, rank: int, world_size: int) -> bool:
    """Whether this rank's generators were restored: only for the world size that saved them.

    On another world size no state would be the right one: ranks keep the state of their seed, and
    the run is no exact continuation (`Manifest.differences` says so too).
    """
    saved_world_size = read_json(_file(folder, 0))["world_size"]
    if saved_world_size != world_size:
        return False
    restore(read_json(_file(folder, rank)))
    return True


def _uses_gpu() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _file(folder: Path, rank: int) -> Path:
    return folder / RNG / f"rank_{rank}.json"


def _to_hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_hex(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
