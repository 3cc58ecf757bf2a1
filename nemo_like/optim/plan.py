"""Which rank orthogonalises which matrix, and in what order matrices travel.

Newton-Schulz needs whole matrices: on a block alone it would be another optimizer, one that depends
on the layout. So each matrix gets one owner, that computes for all. Everything here is a pure
function of layouts, the same on every rank, and needs no process.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from nemo_like.optim.layout import Block, Layout, Shape
from nemo_like.optim.views import WHOLE, View


@dataclass(frozen=True, slots=True)
class Matrix:
    """One whole matrix: a parameter, or one of a stack.

    `index` are the leading coordinates in the stack, empty for a plain matrix. The offsets and
    shapes of blocks are those of two dimensions. `flops` are of Newton-Schulz steps.
    """

    parameter: int
    index: tuple[int, ...]
    shape: Shape
    blocks: tuple[Block, ...]
    flops: int

    @property
    def numel(self) -> int:
        """Elements of the matrix."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Route:
    """A block of a matrix on its way from one rank to another (which may be the same)."""

    matrix: int
    block: Block
    source: int
    target: int


@dataclass(frozen=True)
class Plan:
    """Owners of matrices, and the buckets in which they travel.

    `owners[i]` is the rank that computes matrix i. A bucket lists matrices that travel together.
    Those `at_home` are in no bucket: their owners hold them whole, and nobody else needs them.
    """

    matrices: tuple[Matrix, ...]
    owners: tuple[int, ...]
    buckets: tuple[tuple[int, ...], ...]
    at_home: tuple[int, ...]
    ranks: tuple[int, ...]

    @cached_property
    def loads(self) -> dict[int, int]:
        """Newton-Schulz FLOPs of each rank."""
        loads = dict.fromkeys(self.ranks, 0)
        for matrix, owner in zip(self.matrices, self.owners, strict=True):
            loads[owner] += matrix.flops
        return loads

    @property
    def imbalance(self) -> float:
        """How many times the mean load the most loaded rank has."""
        total = sum(self.loads.values())
        return max(self.loads.values()) * len(self.ranks) / total if total else 1.0

    @cached_property
    def sent(self) -> tuple[float, ...]:
        """Elements that a rank sends to others for each bucket, both ways together, in the mean."""
        return tuple(self.traffic(bucket) / len(self.ranks) for bucket in self.buckets)

    def gathering(self, bucket: Sequence[int]) -> list[Route]:
        """The way of every block of a bucket to the owner of its matrix, each block once."""
        return [
            Route(i, block, self._sender(i, block), self.owners[i])
            for i in bucket
            for block in self.matrices[i].blocks
        ]

    def returning(self, bucket: Sequence[int]) -> list[Route]:
        """The way of every block of a bucket's updates from the owner to all who hold it."""
        return [
            Route(i, block, self.owners[i], holder)
            for i in bucket
            for block in self.matrices[i].blocks
            for holder in block.holders
        ]

    def traffic(self, bucket: Sequence[int]) -> int:
        """Elements that leave some rank for another, both ways together."""
        routes = self.gathering(bucket) + self.returning(bucket)
        return sum(route.block.numel for route in routes if route.source != route.target)

    def digest(self) -> str:
        """The same on two ranks if and only if they would exchange the same."""
        content = (self.matrices, self.owners, self.buckets, self.ranks)
        return hashlib.blake2b(repr(content).encode(), digest_size=16).hexdigest()

    def _sender(self, i: int, block: Block) -> int:
        # Of several copies the owner's own need not travel; else copies take turns.
        if self.owners[i] in block.holders:
            return self.owners[i]
        return block.holders[i % len(block.holders)]


def make_plan(
    layouts: Sequence[Layout],
    views: Sequence[View] | None = None,
    *,
    steps: int = 5,
    bucket_elements: float = math.inf,
) -> Plan:
    """Owners by longest processing time first, among the ranks that hold a part of a matrix.

    Buckets are cut where one rank's share of a bucket would exceed `bucket_elements`, so that every
    rank has work in (almost) every bucket; one matrix may be larger than that.

    Source: Graham, Bounds on Multiprocessing Timing Anomalies (1969): at most 4/3 of the optimum.
    """
    matrices = [
        matrix
        for position, layout in enumerate(layouts)
        for matrix in _matrices(position, layout, views[position] if views else WHOLE, steps)
    ]
    ranks = tuple(sorted({rank for layout in layouts for rank in layout.ranks}))
    load = dict.fromkeys(ranks, 0)
    owners = [0] * len(matrices)
    order = sorted(range(len(matrices)), key=lambda i: (-matrices[i].flops, i))
    for i in order:
        holders = {rank for block in matrices[i].blocks for rank in block.holders}
        owners[i] = min(holders, key=lambda rank: (load[rank], rank))
        load[owners[i]] += matrices[i].flops
    at_home = {i for i in order if all(b.holders == (owners[i],) for b in matrices[i].blocks)}
    travelling = [i for i in order if i not in at_home]
    return Plan(
        matrices=tuple(matrices),
        owners=tuple(owners),
        buckets=tuple(_buckets(travelling, matrices, owners, bucket_elements)),
        at_home=tuple(sorted(at_home)),
        ranks=ranks,
    )


def newton_schulz_flops(rows: int, columns: int, steps: int) -> int:
    """What `steps` steps cost: per step XX^T, its square, and their product with X."""
    short, long = sorted((rows, columns))
    return steps * 2 * short**2 * (2 * long + short)


def _matrices(position: int, layout: Layout, view: View, steps: int) -> list[Matrix]:
    """The matrices of one parameter; the leading dimensions of a stack are taken apart."""
    *stack, rows, columns = layout.shape
    flops = sum(n * newton_schulz_flops(r, c, steps) for n, r, c in view.shapes((rows, columns)))
    return [
        Matrix(position, index, (rows, columns), _blocks_at(index, layout.blocks), flops)
        for index in itertools.product(*map(range, stack))
    ]


def _blocks_at(index: tuple[int, ...], blocks: Sequence[Block]) -> tuple[Block, ...]:
    """The blocks that have a part in one matrix of a stack, as boxes of that matrix."""
    return tuple(
        Block(block.offset[-2:], block.shape[-2:], block.holders)
        for block in blocks
        if all(
            start <= i < start + length
            for i, start, length in zip(index, block.offset, block.shape, strict=False)
        )
    )


def _buckets(
    travelling: Sequence[int],
    matrices: Sequence[Matrix],
    owners: Sequence[int],
    bucket_elements: float,
) -> list[tuple[int, ...]]:
    """Each owner's matrices in order, dealt out over buckets up to the limit per owner."""
    buckets: list[list[int]] = []
    fill: dict[int, tuple[int, float]] = {}  # of each owner: its current bucket, elements in there
    for i in travelling:
        number, elements = fill.get(owners[i], (0, 0.0))
        if elements and elements + matrices[i].numel > bucket_elements:
            number, elements = number + 1, 0.0
        fill[owners[i]] = (number, elements + matrices[i].numel)
        if number == len(buckets):
            buckets.append([])
        buckets[number].append(i)
    return [tuple(bucket) for bucket in buckets]
