"""What the optimizer sees of a stage: fp32 weights, who holds which part of them, the way back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_like.backends.megatron.convert import WeightTable
from nemo_like.backends.megatron.model import Stage
from nemo_like.backends.megatron.parallel import Parallel
from nemo_like.backends.megatron.places import Place
from nemo_like.backends.megatron.weights import LocalBlock
from nemo_like.optim.layout import Layout, Shape

GATHERED_ELEMENTS = 2**24
"""Elements of weights that a rank sends at once where they are gathered."""


@dataclass(frozen=True, eq=False)
class Master:
    """A parameter in full precision: this rank's part of it, or some rows of that part.

    `rows` are those of megatron-core's `parameter`, `offset` is where they are in the whole one.
    `sharers` have the same part in their models, and each its own rows of the master; None where
    each has all rows.
    """

    parameter: nn.Parameter
    weight: nn.Parameter
    rows: slice
    offset: Shape
    layout: Layout
    sharers: dist.ProcessGroup | None

    @property
    def most_elements(self) -> int:
        """Elements of the largest share of a master."""
        parts = self.sharers.size() if self.sharers else 1
        return -(-len(self.parameter) // parts) * self.parameter[0].numel()


class Masters:
    """The masters of a rank's stage, by the global names of their parameters.

    With `sharded`, the ranks that hold the same part of the model share out its rows, and with them
    masters and optimizer state. Otherwise each has all; fp32 masters then are the parameters
    themselves. With `blockwise` the block of a matrix that one tensor-parallel rank holds is laid
    out as if it were a whole one.
    """

    def __init__(
        self,
        stage: Stage,
        table: WeightTable,
        parallel: Parallel,
        *,
        sharded: bool,
        blockwise: bool = False,
    ) -> None:
        grid, here = parallel.grid, {"stage": parallel.rank("pp"), "ep_rank": parallel.rank("ep")}
        self._masters = {
            name: _master(
                parameter,
                Place(grid, table, name, sharded=sharded, **here),
                parallel,
                blockwise=blockwise,
            )
            for name, parameter in stage.global_parameters()
        }
        self._gathered = list(_buckets(self._masters.values()))
        self._layouts = {id(master.weight): master.layout for master in self._masters.values()}

    def weights(self) -> dict[str, nn.Parameter]:
        """The masters, live."""
        return {name: master.weight for name, master in self._masters.items()}

    def layout(self, weight: Tensor) -> Layout:
        """Who holds which block of the parameter that this master is a part of."""
        return self._layouts[id(weight)]

    def blocks(self, tensors: Mapping[str, Tensor]) -> dict[str, LocalBlock]:
        """Tensors laid out like the masters of these names, as blocks of whole parameters."""
        return {n: LocalBlock(t.detach(), self._masters[n].offset) for n, t in tensors.items()}

    def take_gradients(self) -> None:
        """Give each master its rows of the gradient of all ranks."""
        for master in self._masters.values():
            if master.weight.requires_grad:
                gradient: Tensor = getattr(master.parameter, "main_grad")  # noqa: B009 - megatron's
                master.weight.grad = gradient[master.rows].float()

    @torch.no_grad()
    def put_back(self) -> None:
        """Bring the masters into the model's parameters, in their type; a collective."""
        for master in self._masters.values():
            if master.sharers is None and master.parameter.data_ptr() != master.weight.data_ptr():
                master.parameter.copy_(master.weight)
        for group, bucket in self._gathered:
            _gather(bucket, group)


def _master(
    parameter: nn.Parameter, place: Place, parallel: Parallel, *, blockwise: bool
) -> Master:
    tp_rank = parallel.rank("etp" if place.entry.is_expert else "tp")
    layout, (offset, _) = place.layout(), place.local_box(tp_rank)
    block = layout.held_by(dist.get_rank())
    start = block.offset[0] - offset[0] if block else 0
    rows = slice(start, start + block.shape[0] if block else 0)
    sharers = _sharers(place)
    # One's own rows are kept apart, and so is what the model has in a smaller type.
    own = parameter.detach()[rows].to(torch.float32, copy=sharers is not None)
    return Master(
        parameter=parameter,
        weight=nn.Parameter(own, requires_grad=parameter.requires_grad),
        rows=rows,
        offset=block.offset if block else place.entry.shape,
        layout=place.optimized(tp_rank, blockwise=True) if blockwise else layout,
        sharers=sharers,
    )


def _sharers(place: Place) -> dist.ProcessGroup | None:
    from megatron.core import parallel_state as ps

    group = (
        ps.get_expert_data_parallel_group()
        if place.entry.is_expert
        else ps.get_data_parallel_group(with_context_parallel=True)
    )
    return group if place.sharded and group.size() > 1 else None


def _buckets(masters: Iterable[Master]) -> Iterator[tuple[dist.ProcessGroup, list[Master]]]:
    """Those whose rows are shared out, as many together as are sent at once."""
    open_buckets: dict[dist.ProcessGroup, list[Master]] = {}
    for master in masters:
        if (group := master.sharers) is None:
            continue
        bucket = open_buckets.setdefault(group, [])
        filled = sum(other.most_elements for other in bucket)
        if bucket and filled + master.most_elements > GATHERED_ELEMENTS:
            yield group, open_buckets.pop(group)
            bucket = open_buckets.setdefault(group, [])
        bucket.append(master)
    yield from open_buckets.items()


def _gather(masters: Sequence[Master], group: dist.ProcessGroup) -> None:
    """Bring all rows of these parameters to all who share them out."""
    first, sizes = masters[0].parameter, [master.most_elements for master in masters]
    mine = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
    for master, part in zip(masters, mine.split(sizes), strict=True):
        part[: master.weight.numel()].copy_(master.weight.flatten())
    every = mine.new_empty(group.size(), len(mine))
    dist.all_gather_into_tensor(every.view(-1), mine, group=group)
    for master, parts in zip(masters, every.split(sizes, dim=1), strict=True):
        rows = parts.reshape(-1, *master.parameter.shape[1:])
        master.parameter.copy_(rows[: len(master.parameter)])
