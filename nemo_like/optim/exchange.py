"""Blocks of matrices to their owners, and updates back: two all-to-alls per bucket."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_like.optim.diagnostics import Timed, untimed
from nemo_like.optim.plan import Plan, Route

Compute = Callable[[list[int], list[Tensor]], list[Tensor]]
"""(numbers of matrices, the whole matrices) -> a whole matrix for each."""


class Exchange:
    """The transport of one plan, as one rank sees it.

    `group` has the ranks of the plan, in their order; it is not used when nothing travels.
    `wire_dtype` is the type in which blocks travel both ways, `device` where they are put together.

    Raises:
        RuntimeError: the ranks have made different plans.
    """

    def __init__(
        self,
        plan: Plan,
        group: dist.ProcessGroup | None,
        *,
        rank: int,
        device: torch.device,
        wire_dtype: torch.dtype,
    ) -> None:
        self._plan, self._group, self._device, self._dtype = plan, group, device, wire_dtype
        self._buckets = [
            _Bucket(
                number,
                tuple(i for i in bucket if plan.owners[i] == rank),
                _Leg.of(plan.gathering(bucket), plan.ranks, rank),
                _Leg.of(plan.returning(bucket), plan.ranks, rank),
            )
            for number, bucket in enumerate(plan.buckets)
        ]
        if self._buckets:
            _refuse_different_plans(plan, group)

    def updates(
        self,
        inputs: Callable[[Sequence[int]], Mapping[int, Tensor]],
        compute: Compute,
        timed: Timed = untimed,
    ) -> Iterator[dict[int, Tensor]]:
        """For each bucket this rank's blocks of what `compute` makes of the whole matrices.

        `inputs` is asked once for this rank's block of each matrix that it holds a part of. While a
        bucket is computed the next one is on its way here, and the one before on its way back.
        `timed` is told what is waited for and what is computed. A collective: every rank takes all
        that is yielded.
        """
        coming: _Transfer | None = None
        returning: _Transfer | None = None
        for bucket, following in zip(self._buckets, [*self._buckets[1:], None], strict=True):
            coming = coming or self._send_to_owners(bucket, inputs, timed)
            blocks = coming.wait()
            coming = self._send_to_owners(following, inputs, timed) if following else None
            outgoing = self._send_back(bucket, compute, blocks, timed)
            if returning:
                yield returning.by_matrix()
            returning = outgoing
        if returning:
            yield returning.by_matrix()

    def _send_to_owners(
        self,
        bucket: _Bucket,
        inputs: Callable[[Sequence[int]], Mapping[int, Tensor]],
        timed: Timed,
    ) -> _Transfer:
        # Of copies one is sent, but all of them go on.
        own = inputs([route.matrix for route in bucket.back.incoming])
        blocks = [own[route.matrix] for route in bucket.there.outgoing]
        return self._start(bucket.there, blocks, timed(bucket.number, "there"))

    def _send_back(
        self, bucket: _Bucket, compute: Compute, blocks: list[Tensor], timed: Timed
    ) -> _Transfer:
        with timed(bucket.number, "compute"):
            whole = self._assembled(bucket.there.incoming, blocks)
            results = compute(list(bucket.owned), [whole[i] for i in bucket.owned])
        done = dict(zip(bucket.owned, results, strict=True))
        regions = [_region(done[route.matrix], route) for route in bucket.back.outgoing]
        return self._start(bucket.back, regions, timed(bucket.number, "back"))

    def _assembled(self, routes: Sequence[Route], blocks: list[Tensor]) -> dict[int, Tensor]:
        """Whole matrices from all of their blocks."""
        whole: dict[int, Tensor] = {}
        for route, block in zip(routes, blocks, strict=True):
            shape = self._plan.matrices[route.matrix].shape
            if block.shape == shape:
                whole[route.matrix] = block
            elif route.matrix not in whole:
                whole[route.matrix] = block.new_empty(shape)
        parts = [(r, b) for r, b in zip(routes, blocks, strict=True) if whole[r.matrix] is not b]
        if parts:
            torch._foreach_copy_(
                [_region(whole[route.matrix], route) for route, _ in parts],
                [block for _, block in parts],
            )
        return whole

    def _start(
        self, leg: _Leg, blocks: list[Tensor], timed: AbstractContextManager[None]
    ) -> _Transfer:
        """Pack the outgoing blocks of a leg and send them off; waiting will be `timed`."""
        sent = torch.empty(sum(leg.sent), dtype=self._dtype, device=self._device)
        received = torch.empty(sum(leg.received), dtype=self._dtype, device=self._device)
        if blocks:
            torch._foreach_copy_(_boxes(sent, leg.outgoing), blocks)
        work = dist.all_to_all_single(
            received, sent, list(leg.received), list(leg.sent), group=self._group, async_op=True
        )
        return _Transfer(work, sent, received, leg, timed)


@dataclass(frozen=True)
class _Leg:
    """One all-to-all: what this rank sends and gets, in the order of the other ranks."""

    outgoing: list[Route]
    incoming: list[Route]
    sent: list[int]
    received: list[int]

    @classmethod
    def of(cls, routes: Sequence[Route], ranks: Sequence[int], rank: int) -> _Leg:
        by_target: dict[int, list[Route]] = {other: [] for other in ranks}
        by_source: dict[int, list[Route]] = {other: [] for other in ranks}
        for route in routes:
            if route.source == rank:
                by_target[route.target].append(route)
            if route.target == rank:
                by_source[route.source].append(route)
        return cls(
            outgoing=[route for part in by_target.values() for route in part],
            incoming=[route for part in by_source.values() for route in part],
            sent=[sum(route.block.numel for route in part) for part in by_target.values()],
            received=[sum(route.block.numel for route in part) for part in by_source.values()],
        )


@dataclass(frozen=True)
class _Bucket:
    """One rank's part in one bucket: the matrices it owns, and both of their ways."""

    number: int
    owned: tuple[int, ...]
    there: _Leg
    back: _Leg


@dataclass(frozen=True)
class _Transfer:
    """An all-to-all under way; it keeps what is being sent."""

    work: dist.Work
    sent: Tensor
    received: Tensor
    leg: _Leg
    timed: AbstractContextManager[None]

    def wait(self) -> list[Tensor]:
        """The incoming blocks, in the order of the leg."""
        with self.timed:
            self.work.wait()
        return _boxes(self.received, self.leg.incoming)

    def by_matrix(self) -> dict[int, Tensor]:
        """The incoming blocks by the number of their matrix."""
        return {r.matrix: b for r, b in zip(self.leg.incoming, self.wait(), strict=True)}


def _boxes(buffer: Tensor, routes: Sequence[Route]) -> list[Tensor]:
    """The blocks that lie one after the other in a buffer."""
    parts = buffer.split([route.block.numel for route in routes])
    return [part.view(r.block.shape) for part, r in zip(parts, routes, strict=False)]


def _region(whole: Tensor, route: Route) -> Tensor:
    """The part of a matrix that a block covers."""
    (row, column), (rows, columns) = route.block.offset, route.block.shape
    return whole[row : row + rows, column : column + columns]


def _refuse_different_plans(plan: Plan, group: dist.ProcessGroup | None) -> None:
    digests: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(digests, plan.digest(), group=group)
    if len(set(digests)) > 1:
        raise RuntimeError(
            f"ranks {list(plan.ranks)} would exchange different matrices (plans {digests}); each "
            "must build the optimizer of the same parameters in the same order"
        )
