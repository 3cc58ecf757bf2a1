"""What Newton-Schulz was given and what it made of it, measured from time to time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import perf_counter
from typing import Literal, get_args

import torch
from torch import Tensor

from nemo_like.optim.newton_schulz import gram

FEW_BUCKETS = 8
"""So many have metrics of their own."""

Phase = Literal["there", "compute", "back"]
PHASES: tuple[Phase, ...] = get_args(Phase)
Mark = float | torch.cuda.Event
Timed = Callable[[int, Phase], AbstractContextManager[None]]
"""(number of a bucket, what happens to it) -> a context in which that happens, once."""


def spectrum(X: Tensor, update: Tensor, gain: float) -> Tensor:
    """Three numbers for each matrix X and its update, `gain` times an orthogonal matrix.

    1. The sum of squares of the update.
    2. The effective rank of X as a share of the full rank: with singular values s it is
       (sum s^2)^2 / (n sum s^4), one for an orthogonal matrix and 1/n for one of rank one.
    3. The root mean square distance of the squared singular values of update / gain from one.

    It takes two Gram matrices, in the type of the update.

    Shapes: X, update [n, r, c] -> [n, 3], fp64.

    Source: 2. is the participation ratio of the spectrum of X X^T.
    """
    short = min(X.shape[-2:])
    normal = X / X.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(X.dtype).tiny)
    before, after = _grams(normal.to(update.dtype)), _grams(update / gain)
    trace = before.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64)
    rank = trace.square() / _squares(before).clamp_min(1e-300) / short
    after.diagonal(dim1=-2, dim2=-1).sub_(1)
    error = (_squares(after) / short).sqrt()
    return torch.stack([_squares(update), rank, error], dim=-1)


def _grams(X: Tensor) -> Tensor:
    # As in `polar`: on a CPU one by one, which takes two thirds of the time of a batch.
    return torch.stack([gram(one) for one in X]) if X.device.type == "cpu" else gram(X)


def _squares(X: Tensor) -> Tensor:
    """The sum of squares of each matrix, in fp64 without a copy of it in fp64."""
    return torch.linalg.vector_norm(X, dim=(-2, -1), dtype=torch.float64).square()


def sizes(
    prefix: str, lr: float, *, update: Tensor, weights: Tensor, count: int | Tensor
) -> dict[str, Tensor]:
    """Root mean square of an update, and its size relative to the weights, from sums of squares."""
    return {
        f"{prefix}/update_rms": lr * (update / count).sqrt(),
        f"{prefix}/update_to_weight": lr * (update / weights.clamp_min(1e-300)).sqrt(),
    }


def transport(
    megabytes: Sequence[float], milliseconds: Tensor, imbalance: float
) -> dict[str, Tensor]:
    """What it took to bring matrices to their owners, computing there, and back, as metrics.

    Nothing where there are no buckets; of single buckets only where they are several, and few.

    Shapes: megabytes [buckets]; milliseconds [buckets, 3], columns in the order of `Phase`.
    """
    if not megabytes:
        return {}
    sent = milliseconds.new_tensor(megabytes)
    there, compute, back = milliseconds.unbind(1)
    found = {
        "muon/owner_imbalance": milliseconds.new_tensor(imbalance),
        "muon/exchange_mb": sent.sum(),
        "muon/exchange_wait_ms": (there + back).sum(),
        "muon/newton_schulz_ms": compute.sum(),
        "muon/slowest_bucket_ms": milliseconds.sum(1).max(),
    }
    if 1 < len(megabytes) <= FEW_BUCKETS:
        for i, row in enumerate(milliseconds):
            found |= {f"muon/bucket{i}/mb": sent[i], f"muon/bucket{i}/ms": row.sum()}
    return found


def untimed(bucket: int, phase: Phase) -> AbstractContextManager[None]:
    """Nothing is measured."""
    return nullcontext()


class Stopwatch:
    """Milliseconds of each phase of each bucket: of the transfers, those that were waited for.

    On a GPU it measures the stream, not the program, and waits for nothing before `table`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[int, Phase, Mark, Mark]] = []

    @contextmanager
    def __call__(self, bucket: int, phase: Phase) -> Iterator[None]:
        """Time spent inside is booked."""
        start = self._now()
        yield
        self._spans.append((bucket, phase, start, self._now()))

    def table(self, buckets: int) -> Tensor:
        """What was measured. Shapes: [buckets, 3], fp64, columns in the order of `Phase`."""
        table = torch.zeros(buckets, 3, dtype=torch.float64)
        for bucket, phase, start, end in self._spans:
            table[bucket, PHASES.index(phase)] = _milliseconds(start, end)
        return table.to(self._device)

    def _now(self) -> Mark:
        if self._device.type != "cuda":
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def _milliseconds(start: Mark, end: Mark) -> float:
    if isinstance(start, float) or isinstance(end, float):
        return 1e3 * (end - start)  # type: ignore[operator]
    end.synchronize()
    return float(start.elapsed_time(end))
