"""Where the wall time of a step goes, and how fast training is."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

PAUSES = ("validation", "checkpoint")
"""Phases in which nothing is trained: wall time that does not count against tokens/s."""
_ETA_WINDOW = 50

_PEAK_TFLOPS: tuple[tuple[str, float, float | None], ...] = (
    # part of the device's name, bf16/fp16 tensor cores, fp32 without TF32; the first match counts
    ("GB200", 2500.0, None),
    ("B200", 2250.0, None),
    ("H200 NVL", 835.5, 60.0),
    ("GH200", 989.4, 66.9),
    ("H200", 989.4, 66.9),
    ("H100 NVL", 835.5, 60.0),
    ("H100 PCIe", 756.0, 51.2),
    ("H100", 989.4, 66.9),
    ("H800", 989.4, 66.9),
    ("H20", 148.0, 44.0),
    ("A100", 312.0, 19.5),
    ("A800", 312.0, 19.5),
    ("L40S", 362.0, 91.6),
    ("L4", 121.0, 30.3),
    ("A10", 125.0, 31.2),
)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """The device's dense peak in FLOP/s for this type (`bfloat16`, ...); None where not known.

    Source: NVIDIA's data sheets of these products; where a sheet gives the number "with sparsity"
    only, half of it. Never known for a CPU, whose peak depends on clock and vector width.
    """
    for part, half_tflops, single_tflops in _PEAK_TFLOPS:
        if _is_product(part, device_name):
            tflops = single_tflops if dtype == "float32" else half_tflops
            return tflops * 1e12 if tflops else None
    return None


def _is_product(part: str, device_name: str) -> bool:
    # "NVIDIA L4" is not "NVIDIA L40", but "NVIDIA A100-SXM4-80GB" is an A100.
    words = device_name.replace("-", " ").split()
    wanted = part.split()
    return any(words[i : i + len(wanted)] == wanted for i in range(len(words)))


def flops_per_token(
    num_parameters: float, *, num_layers: int, attention_width: int, sequence_length: float
) -> float:
    """Model FLOPs to train on one token, forward and backward, nothing recomputed.

    `num_parameters` are those that a token is multiplied with: without the input embedding, with
    the output layer, and of a mixture of experts the active ones. `attention_width` is heads x head
    size. A token attends to half the sequence on average, because attention is causal.

    Source: Chowdhery et al. 2022 (PaLM), appendix B: 6 N + 12 L H Q T; the attention term is halved
    here for the causal mask.
    """
    return 6.0 * num_parameters + 6.0 * num_layers * attention_width * sequence_length


class StepClock:
    """Books every second since its start, or since the last `finish`, under the name of one phase.

    What no phase claims is `other`, so the phases of a step add up to its wall time by
    construction. Phases may nest: the inner one's time is not the outer one's.

    Example:
        with clock.phase("train"):
            stats = policy.train_step(batch, loss)
        values = clock.finish(step, num_tokens=4096, nested={"train": stats.phases})
    """

    def __init__(
        self,
        *,
        total_steps: int,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """A clock that runs from now; `peak_flops` is that of all devices together."""
        self._total_steps = total_steps
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._now = now
        self._started = self._mark = now()
        self._seconds: dict[str, float] = {}
        self._beside: dict[str, float] = {}
        self._open: list[str] = []
        self._walls: deque[float] = deque(maxlen=_ETA_WINDOW)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time spent inside is booked under this name, except what inner phases claim."""
        self._book()
        self._open.append(name)
        try:
            yield
        finally:
            self._book()
            self._open.pop()

    def beside(self, name: str, seconds: float) -> None:
        """Seconds of work that went on meanwhile, which are no part of the step's wall time."""
        self._beside[name] = self._beside.get(name, 0.0) + seconds

    def finish(
        self,
        step: int,
        *,
        num_tokens: float,
        nested: Mapping[str, Mapping[str, float]] | None = None,
    ) -> dict[str, float]:
        """End the step: its seconds by phase (`timing/...`), and its speed (`performance/...`).

        Work that went on beside it is `performance/<name>_hidden_s`.

        `nested` refines phases of this clock by seconds that workers measured inside them; they
        appear as `timing/train/forward`, and `timing/train` keeps the rest. Seconds that do not fit
        into the phase, as when clocks of two machines differ, are scaled down to it: the sum is the
        wall time, always.
        """
        assert not self._open, f"finish() inside phase {self._open[-1]!r}"
        self._book()
        seconds, self._seconds = self._seconds, {}
        beside, self._beside = self._beside, {}
        wall_s = self._mark - self._started
        self._started = self._mark
        self._walls.append(wall_s)

        step_s = wall_s - sum(seconds.get(name, 0.0) for name in PAUSES)
        for outer, inner in (nested or {}).items():
            seconds |= _refine(outer, inner, seconds)
        values = {f"timing/{name}": value for name, value in seconds.items()}
        values |= {f"performance/{name}_hidden_s": value for name, value in beside.items()}
        return values | {"performance/wall_s": wall_s} | self._speed(step, step_s, num_tokens)

    def _speed(self, step: int, step_s: float, num_tokens: float) -> dict[str, float]:
        tokens_per_s = num_tokens / step_s if step_s > 0 else 0.0
        mean_wall_s = sum(self._walls) / len(self._walls)
        values = {
            "performance/step_s": step_s,
            "performance/tokens_per_s": tokens_per_s,
            "performance/eta_s": max(self._total_steps - step, 0) * mean_wall_s,
        }
        if self._flops_per_token and self._peak_flops:
            values["performance/mfu"] = tokens_per_s * self._flops_per_token / self._peak_flops
        return values

    def _book(self) -> None:
        now = self._now()
        name = self._open[-1] if self._open else "other"
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._mark
        self._mark = now


def _refine(
    outer: str, inner: Mapping[str, float], seconds: Mapping[str, float]
) -> dict[str, float]:
    if outer not in seconds:
        raise ValueError(f"phase {outer!r} was not timed in this step; it has {sorted(seconds)}")
    measured = sum(inner.values())
    scale = min(1.0, seconds[outer] / measured) if measured > 0 else 0.0
    parts = {f"{outer}/{name}": value * scale for name, value in inner.items()}
    return {outer: seconds[outer] - sum(parts.values()), **parts}
