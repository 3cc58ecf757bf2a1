"""What a checkpoint costs beside plain `torch.distributed.checkpoint` and `torch.save`.

A model of 27.8 M parameters in fp32 with its optimizer's state, one process, a fresh folder each
time, flushed to disk. Ours includes what the others lack: checksums, the commit, verification.

    OMP_NUM_THREADS=1 python tools/benchmarks/checkpoint.py --optimizer muon --repeats 5
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from nemo_like.checkpoint import layout, manifest
from nemo_like.checkpoint.checkpoints import Checkpoints, RunIdentity
from nemo_like.checkpoint.manifest import RunLayout
from nemo_like.checkpoint.store import StateWriter, load_state
from nemo_like.config.run import CheckpointingConfig

WIDTH, DEPTH, INNER, VOCABULARY = 512, 8, 1408, 2048
IDENTITY = RunIdentity({}, {}, "", RunLayout(1, 1, "cpu"))


def states(optimizer: str) -> dict[str, Any]:
    """A Qwen2-like model's weights and the state of its optimizer, random."""
    shapes = {
        "model.embed_tokens.weight": (VOCABULARY, WIDTH),
        "lm_head.weight": (VOCABULARY, WIDTH),
    }
    for i in range(DEPTH):
        for name in "qkvo":
            shapes[f"model.layers.{i}.self_attn.{name}_proj.weight"] = (WIDTH, WIDTH)
        for name in ("gate", "up"):
            shapes[f"model.layers.{i}.mlp.{name}_proj.weight"] = (INNER, WIDTH)
        shapes[f"model.layers.{i}.mlp.down_proj.weight"] = (WIDTH, INNER)
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (WIDTH,)
    moments = {}
    for name, shape in shapes.items():
        hidden = "layers" in name and len(shape) == 2
        keys = ("momentum_buffer",) if optimizer == "muon" and hidden else ("exp_avg", "exp_avg_sq")
        moments[name] = {key: torch.randn(shape) for key in keys}
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    return {layout.MODEL: weights, layout.OPTIMIZER: {"state": moments}}


def _open(folder: Path) -> Checkpoints:
    return Checkpoints(CheckpointingConfig(checkpoint_dir=str(folder)), IDENTITY)


def _save_ours(folder: Path, tree: dict[str, Any]) -> None:
    with _open(folder) as checkpoints, StateWriter(asynchronous=False) as writer:
        writer.save(checkpoints.begin(1), tree)
        checkpoints.commit(1, metrics={}, data={})


def _load_ours(folder: Path, tree: dict[str, Any]) -> None:
    with _open(folder) as checkpoints:
        saved = checkpoints.latest_good()
    for name, template in tree.items():
        load_state(saved.folder / name, template)


def _save_dcp(folder: Path, tree: dict[str, Any]) -> None:
    dcp.save(tree, checkpoint_id=folder)


def _load_dcp(folder: Path, tree: dict[str, Any]) -> None:
    dcp.load(tree, checkpoint_id=folder)


def _save_torch(folder: Path, tree: dict[str, Any]) -> None:
    with (folder / "state.pt").open("wb") as file:
        torch.save(tree, file)
        os.fsync(file.fileno())


def _load_torch(folder: Path, tree: dict[str, Any]) -> None:
    torch.load(folder / "state.pt", weights_only=True)


CONTESTANTS = {
    "ours": (_save_ours, _load_ours),
    "DCP": (_save_dcp, _load_dcp),
    "torch.save": (_save_torch, _load_torch),
}


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """CPU and wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def measure(tree: dict[str, Any], parent: Path, writer: StateWriter) -> dict[str, Any]:
    """The times of one round, by what was done; contestants take turns."""
    times: dict[str, Any] = {}
    for name, (save, load) in CONTESTANTS.items():
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            times[f"{name}: save"] = timed(partial(save, Path(folder), tree))
            times[f"{name}: load"] = timed(partial(load, Path(folder), tree))
            if name == "ours":
                verify = partial(manifest.verify, Path(folder) / "step_1")
                times["ours: verification alone"] = timed(verify)
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        times["ours, asynchronous: stall"] = timed(partial(writer.save, Path(folder), tree))
        writer.wait()
    return times


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    tree = states(options.optimizer)
    with StateWriter(asynchronous=True) as writer:
        measure(tree, options.folder, writer)  # warm up
        rounds = [measure(tree, options.folder, writer) for _ in range(options.repeats)]
    num_bytes = sum(t.nbytes for part in tree.values() for t in leaves(part))
    print(f"{options.optimizer}, {num_bytes / 1e6:.0f} MB, median of {options.repeats} (min - max)")
    print(
        f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} CPUs, torch {torch.__version__}"
    )
    for name in rounds[0]:
        for unit, values in zip(
            ("CPU-s", "wall s"), zip(*(r[name] for r in rounds), strict=True), strict=True
        ):
            spread = f"({min(values):.3f} - {max(values):.3f})"
            print(f"{name:28} {unit:7} {statistics.median(values):6.3f}  {spread}")


def leaves(tree: Any) -> list[torch.Tensor]:
    """The tensors of a tree."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [leaf for inner in tree.values() for leaf in leaves(inner)]


if __name__ == "__main__":
    main()
