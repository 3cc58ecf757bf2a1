"""Muon's update rule: momentum, orthogonalised, scaled by shape; on one rank or on many."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from nemo_like.errors import ConfigError
from nemo_like.optim.block_step import BlockStep
from nemo_like.optim.diagnostics import Stopwatch, sizes, spectrum, transport, untimed
from nemo_like.optim.exchange import Exchange
from nemo_like.optim.layout import Layout
from nemo_like.optim.newton_schulz import polar
from nemo_like.optim.norm import local
from nemo_like.optim.rule import MuonRule
from nemo_like.optim.views import View

FILLING_ELEMENTS = 2**26
"""Elements that go through Newton-Schulz together on a GPU; a CPU takes matrices one by one."""


@dataclass(frozen=True)
class _Seen:
    """What is kept of a watched step, to be told when it is asked for."""

    lr: float
    active: Mapping[int, Tensor]
    stopwatch: Stopwatch
    spectra: dict[int, list[Tensor]] = field(default_factory=dict)
    """What `spectrum` says of the matrices computed here."""


class Muon:
    """The rule, applied to parameters that the same ranks hold.

    Parameters may be DTensors of any placements; a stack of matrices is taken apart, a packed one
    cut as its view says. Making a Muon is a collective when matrices travel, and so is each step.
    """

    def __init__(
        self,
        rule: MuonRule,
        named: Sequence[tuple[str, Tensor]],
        views: Sequence[View],
        layouts: Sequence[Layout],
    ) -> None:
        self.names, parameters = zip(*named, strict=True)
        self.rule, self.parameters, self._views = rule, parameters, views
        if len({(p.dtype, p.device) for p in parameters}) > 1:
            raise ConfigError("Muon's weights must be of one type, and on one device")
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._device = _compute_device(parameters[0])
        self._batch = 1 if self._device.type == "cpu" else FILLING_ELEMENTS
        self._wire = rule.wire(parameters[0].dtype)
        self.plan = rule.plan(layouts, views, parameters[0].dtype)
        self._pieces = list(self._pieces_here(layouts))
        self._num_parts = [
            sum(count for count, _, _ in views[matrix.parameter].shapes(matrix.shape))
            for matrix in self.plan.matrices
        ]
        self._part_of = dict(self._parts_here())
        self._chunks = list(self._chunks_at_home())
        self._travelling = [i for bucket in self.plan.buckets for i in bucket]
        self._group = _group_of(self.plan.ranks, parameters[0]) if self._travelling else None
        self._exchange = Exchange(
            self.plan, self._group, rank=self._rank, device=self._device, wire_dtype=self._wire
        )
        self._seen: _Seen | None = None

    @torch.no_grad()
    def step(
        self, momenta: Sequence[Tensor], *, lr: float, weight_decay: float, watch: bool = False
    ) -> None:
        """One update of every matrix that has a gradient on some rank.

        Momentum is an average, M <- mu M + (1 - mu) G; the accumulated form M <- mu M + G gives the
        same direction. Nesterov looks ahead to mu M + (1 - mu) G once more. Weight decay is
        decoupled and goes by the plain learning rate, not by the one that the scale makes of it.
        Gradients are only read. A matrix whose gradient is zero on all ranks stays as it is,
        momentum included, unless the rule says otherwise. `watch` prepares `observed`.

        Source: Jordan et al., https://kellerjordan.github.io/posts/muon/, and `torch.optim.Muon`.
        Changed: the gradient is not overwritten by Nesterov's look-ahead, the momentum not by
        Newton-Schulz; a zero gradient moves nothing.
        """
        now = BlockStep(
            rule=self.rule,
            device=self._device,
            dtype=self.parameters[0].dtype,
            lr=lr,
            weight_decay=weight_decay,
            weights=self._here(self.parameters),
            momenta=self._here(momenta),
            gradients=self._here([_gradient_of(p) for p in self.parameters]),
            num_parts=self._num_parts,
            part_of=self._part_of,
        )
        # Not the step itself: it would keep the gradients alive after they were freed.
        self._seen = _Seen(lr, now.active, Stopwatch(self._device)) if watch else None
        orthogonalize = partial(self._orthogonalized, now)
        at_home = [i for chunk in self._chunks for i in chunk if i in now.gradients]
        now.activate(at_home, now.signals(at_home))
        for chunk in self._chunks:
            if present := [i for i in chunk if i in now.gradients]:
                ahead = now.average(present)
                updates = orthogonalize(present, [ahead[i] for i in present])
                now.apply(dict(zip(present, updates, strict=True)))
        if self._travelling:
            signals = now.signals(self._travelling)
            dist.all_reduce(signals, dist.ReduceOp.MAX, group=self._group)
            now.activate(self._travelling, signals)
            timed = self._seen.stopwatch if self._seen else untimed
            for returned in self._exchange.updates(now.average, orthogonalize, timed):
                now.apply(returned)

    @torch.no_grad()
    def observed(self) -> Tensor:
        """This rank's share of what the last step did, if it was watched; the shares add up.

        There is a row per matrix of the plan. Its columns are the sum of squares of the update (for
        a learning rate of one), effective rank and orthogonality error (see `spectrum`; of a packed
        matrix the mean over its parts), the sum of squares of the weight, the share of the matrix
        that moved (0 or 1, unless it is packed), and its elements that moved. What did not move
        does not count in the others.

        Shapes: [matrices, 6], fp64.
        """
        seen = self._seen
        assert seen is not None, "watch a step first"
        table = torch.zeros(len(self.plan.matrices), 6, dtype=torch.float64, device=self._device)
        for number, rows in seen.spectra.items():
            total, active = torch.cat(rows).sum(0), seen.active[number].double()
            table[number, 0], table[number, 1:3] = total[0], total[1:] / active.sum().clamp_min(1)
            table[number, 4] = active.mean()
            table[number, 5] = active.mean() * self.plan.matrices[number].numel
        for number, weight in self._here(self.parameters).items():
            if number in seen.active:
                blocks = self.plan.matrices[number].blocks
                copies = next(len(b.holders) for b in blocks if self._rank in b.holders)
                moved = seen.active[number].double().mean()
                table[number, 3] = moved * weight.norm().double().square() / copies
        return table

    @torch.no_grad()
    def transported(self) -> tuple[list[float], Tensor]:
        """Megabytes that a rank sends for each bucket, and milliseconds of a watched step.

        The latter as `Stopwatch.table` has them, each of the rank that took longest. A collective
        when matrices travel.

        Shapes: [buckets, 3], fp64.
        """
        assert self._seen is not None, "watch a step first"
        table = self._seen.stopwatch.table(len(self.plan.buckets))
        if self._travelling:
            dist.all_reduce(table, dist.ReduceOp.MAX, group=self._group)
        return [elements * self._wire.itemsize / 1e6 for elements in self.plan.sent], table

    def _orthogonalized(
        self, now: BlockStep, numbers: Sequence[int], wholes: Sequence[Tensor]
    ) -> list[Tensor]:
        """The updates of whole matrices, for a learning rate of one; equal shapes go together."""
        views = [self._views[self.plan.matrices[number].parameter] for number in numbers]
        stacks = [
            view.split(whole.to(self._device, self._wire))
            for view, whole in zip(views, wholes, strict=True)
        ]
        active = [
            _split(now.active[number], [len(part) for part in parts])
            for number, parts in zip(numbers, stacks, strict=True)
        ]
        by_shape: dict[torch.Size, list[tuple[int, int]]] = defaultdict(list)
        for position, parts in enumerate(stacks):
            for k, part in enumerate(parts):
                by_shape[part.shape[-2:]].append((position, k))
        for shape, places in by_shape.items():
            gain = self.rule.scale(*shape)
            for chunk in _chunks(places, [stacks[i][k].numel() for i, k in places], self._batch):
                parts = [stacks[i][k] for i, k in chunk]
                X = _joined(parts)
                counts = [len(part) for part in parts]
                kept = _joined([active[i][k] for i, k in chunk])
                update = polar(
                    X,
                    rows=self.rule.polynomials,
                    dtype=self.rule.ns_dtype,
                    gain=gain,
                    keep=kept > 0,
                )
                if self._seen is not None:
                    rows = _split(spectrum(X, update, gain) * kept[:, None], counts)
                    for (i, _), row in zip(chunk, rows, strict=True):
                        self._seen.spectra.setdefault(numbers[i], []).append(row)
                for (i, k), part in zip(chunk, _split(update.to(self._wire), counts), strict=True):
                    stacks[i][k] = part
        return [
            view.merge(parts, whole.shape)
            for view, parts, whole in zip(views, stacks, wholes, strict=True)
        ]

    def _here(self, tensors: Sequence[Tensor | None]) -> dict[int, Tensor]:
        """This rank's block of each matrix it holds a part of, of tensors laid out alike."""
        own = [None if tensor is None else local(tensor) for tensor in tensors]
        return {
            number: stack[index]
            for number, parameter, index in self._pieces
            if (stack := own[parameter]) is not None
        }

    def _pieces_here(self, layouts: Sequence[Layout]) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """(matrix, parameter, where it is in this rank's part of a stack) of what is held here."""
        origins = [
            None if block is None else block.offset
            for block in (layout.held_by(self._rank) for layout in layouts)
        ]
        for number, matrix in enumerate(self.plan.matrices):
            if any(self._rank in block.holders for block in matrix.blocks):
                origin = origins[matrix.parameter]
                assert origin is not None
                index = tuple(i - o for i, o in zip(matrix.index, origin, strict=False))
                yield number, matrix.parameter, index

    def _parts_here(self) -> Iterator[tuple[int, tuple[int, Tensor]]]:
        """What part the rows (or columns) of this rank's blocks are of, where there are several."""
        for number, parameter, _ in self._pieces:
            matrix = self.plan.matrices[number]
            if self._num_parts[number] > 1:
                block = next(b for b in matrix.blocks if self._rank in b.holders)
                view = self._views[parameter]
                dim = 1 if view.transposed else 0
                whole = view.part_of(matrix.shape)
                held = whole.narrow(dim, block.offset[dim], block.shape[dim])
                yield number, (dim, held.to(self._device))

    def _chunks_at_home(self) -> Iterator[list[int]]:
        """The matrices that stay on this rank, equal shapes together."""
        by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number in self.plan.at_home:
            if self.plan.owners[number] == self._rank:
                by_shape[self.plan.matrices[number].shape].append(number)
        for numbers in by_shape.values():
            sizes = [self.plan.matrices[number].numel for number in numbers]
            yield from _chunks(numbers, sizes, self._batch)


def observations(muons: Sequence[Muon], lr: float, device: torch.device) -> dict[str, Tensor]:
    """What a watched step did, as metrics: over all matrices, and by kind of matrix (`q_proj`).

    Where matrices travel, what that took is added: of those that this rank has a part of. A
    collective, also for ranks that hold no matrix.
    """
    kinds: dict[str, Tensor] = {}
    for muon in muons:
        for matrix, row in zip(muon.plan.matrices, muon.observed(), strict=True):
            kind = kind_of(muon.names[matrix.parameter])
            kinds[kind] = kinds[kind] + row if kind in kinds else row
    kinds = _added_up(kinds, device)
    if not kinds:
        return {}
    found = _sizes_of("muon", lr, torch.stack(list(kinds.values())).sum(0))
    for kind, row in kinds.items():
        prefix = f"muon/{kind}"
        found |= _sizes_of(prefix, lr, row)
        share = row[4].clamp_min(1e-9)  # of idle experts there is nothing to tell
        found[f"{prefix}/effective_rank"] = row[1] / share
        found[f"{prefix}/orthogonality_error"] = row[2] / share
    if not muons:
        return found
    megabytes, milliseconds = zip(*[muon.transported() for muon in muons], strict=True)
    imbalance = max(muon.plan.imbalance for muon in muons)
    return found | transport(sum(megabytes, []), torch.cat(milliseconds), imbalance)


def _sizes_of(prefix: str, lr: float, row: Tensor) -> dict[str, Tensor]:
    count = row[5].clamp_min(1)  # where all is still
    return sizes(prefix, lr, update=row[0], weights=row[3], count=count)


def _added_up(kinds: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The sums over all ranks, each of which may know other kinds."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return kinds
    own = {kind: row.tolist() for kind, row in kinds.items()}
    of_rank: list[dict[str, list[float]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(of_rank, own)
    names = dict.fromkeys(kind for found in of_rank for kind in found)
    zero = [0.0] * 6
    rows = {n: [found.get(n, zero) for found in of_rank] for n in names}
    return {
        name: torch.tensor(parts, dtype=torch.float64, device=device).sum(0)
        for name, parts in rows.items()
    }


def kind_of(name: str) -> str:
    """What matrices of different layers have in common: `experts.up_proj`, `q_proj`."""
    parts = [part for part in name.split(".") if part != "weight" and not part.isdigit()]
    return ".".join(parts[-2:] if "experts" in parts[-2:] else parts[-1:])


def _compute_device(parameter: Tensor) -> torch.device:
    """Where Newton-Schulz runs: the mesh's device, also for weights that are kept on the CPU."""
    if isinstance(parameter, DTensor) and parameter.device_mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return parameter.device


def _gradient_of(parameter: Tensor) -> Tensor | None:
    gradient = parameter.grad
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
        assert gradient.placements == parameter.placements, (
            f"a gradient is placed {gradient.placements}, its weight {parameter.placements}"
        )
    return gradient


def _group_of(ranks: Sequence[int], parameter: Tensor) -> dist.ProcessGroup | None:
    """The process group of exactly these ranks; None is that of all."""
    if len(ranks) == dist.get_world_size():
        return None
    if isinstance(parameter, DTensor) and parameter.device_mesh.ndim == 1:
        group = parameter.device_mesh.get_group()
        if dist.get_process_group_ranks(group) == list(ranks):
            return group
    return dist.new_group(list(ranks), use_local_synchronization=True)


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _split(tensor: Tensor, counts: list[int]) -> Sequence[Tensor]:
    return (tensor,) if len(counts) == 1 else tensor.split(counts)


T = TypeVar("T")


def _chunks(items: Sequence[T], sizes: Sequence[int], limit: int) -> Iterator[list[T]]:
    """Items in order, as many together as do not exceed the limit; one may do that alone."""
    chunk: list[T] = []
    elements = 0
    for item, size in zip(items, sizes, strict=True):
        if chunk and elements + size > limit:
            yield chunk
            chunk, elements = [], 0
        chunk.append(item)
        elements += size
    if chunk:
        yield chunk
