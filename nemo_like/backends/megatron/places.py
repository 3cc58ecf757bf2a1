"""Which ranks have which part of which parameter: arithmetic on the layout, without processes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import Placement, Replicate, Shard

from nemo_like.backends.megatron.convert import EMBEDDING, Entry, WeightTable
from nemo_like.config.draft import show
from nemo_like.config.megatron import MegatronConfig
from nemo_like.config.report import divisors
from nemo_like.errors import ConfigError
from nemo_like.optim.layout import Layout, Shape, layout_on


@dataclass(frozen=True, eq=False)
class Grid:
    """All ranks, in order, as a grid for what every token passes, and as another one for experts.

    Shapes: ranks [pp, dp, cp, tp]; expert_ranks [pp, edp, ep, etp].
    """

    ranks: Tensor
    expert_ranks: Tensor

    @classmethod
    def of(cls, config: MegatronConfig, world: int) -> Grid:
        """The grids of a number of ranks.

        Raises:
            ConfigError: the parallel sizes do not divide it.
        """
        check_divisible(config, world)
        ranks, pp = torch.arange(world), config.pipeline_model_parallel_size
        cp, tp = config.context_parallel_size, config.tensor_model_parallel_size
        ep, etp = config.expert_model_parallel_size, config.expert_tensor_parallel_size
        return cls(ranks.view(pp, -1, cp, tp), ranks.view(pp, -1, ep, etp))


@dataclass(frozen=True, eq=False)
class Place:
    """Where a parameter is: in this pipeline stage, an expert's on the ranks of `ep_rank`.

    With `sharded`, those that have the same part of it in their models share out its rows.
    """

    grid: Grid
    table: WeightTable
    name: str
    stage: int
    ep_rank: int
    sharded: bool

    @property
    def entry(self) -> Entry:
        """What the parameter is made of."""
        return self.table.entries[self.name]

    @property
    def ranks(self) -> Tensor:
        """All who hold some of it. Shapes: [stages, tensor-parallel ranks, sharers]."""
        stages = [self.stage]
        if self.table.tied and self.entry.rows[0].hf_name == EMBEDDING:
            stages = sorted({0, len(self.grid.ranks) - 1})
        if self.entry.is_expert:
            ranks = self.grid.expert_ranks[stages][:, :, self.ep_rank]
        else:
            ranks = self.grid.ranks[stages].flatten(1, 2)
        return ranks.transpose(1, 2)

    def local_box(self, tp_rank: int) -> tuple[Shape, Shape]:
        """Offset and shape of a tensor-parallel rank's part, over all that share its rows."""
        return self.table.local_box(self.name, tp_rank)

    def layout(self) -> Layout:
        """Who holds which block of the whole parameter."""
        dim = self.entry.tp_dim
        cut = Replicate() if dim is None else Shard(dim)
        return layout_on(self.entry.shape, self.ranks, [Replicate(), cut, self._of_sharers])

    def layout_of_block(self, tp_rank: int) -> Layout:
        """The layout of a tensor-parallel rank's part alone, as a tensor of its own."""
        _, shape = self.local_box(tp_rank)
        alone = self.ranks[:, tp_rank]
        return layout_on(shape, alone, [Replicate(), self._of_sharers])

    def optimized(self, tp_rank: int, *, blockwise: bool) -> Layout:
        """The layout that the optimizer of a tensor-parallel rank works on."""
        if blockwise and self.entry.has_blocks:
            return self.layout_of_block(tp_rank)
        return self.layout()

    @property
    def _of_sharers(self) -> Placement:
        return Shard(0) if self.sharded else Replicate()


def layers_of_stages(config: MegatronConfig, num_layers: int) -> tuple[int, ...]:
    """The number of layers of each pipeline stage.

    Raises:
        ConfigError: they can not be shared so.
    """
    pp = config.pipeline_model_parallel_size
    first, last = (
        config.num_layers_in_first_pipeline_stage,
        config.num_layers_in_last_pipeline_stage,
    )
    given = [end for end in (first, last) if end is not None]
    left, stages = num_layers - sum(given), pp - len(given)
    if left < stages or (left % stages if stages else left):
        raise ConfigError(
            f"policy.megatron_cfg.pipeline_model_parallel_size: {num_layers} layers can not be "
            f"shared by {pp} stages with num_layers_in_first_pipeline_stage={show(first)} and "
            f"num_layers_in_last_pipeline_stage={show(last)}: the other stages have equal parts. "
            + _remedy(num_layers, pp)
        )
    counts = [left // stages if stages else 0] * pp
    if first is not None:
        counts[0] = first
    if last is not None:
        counts[-1] = last
    return tuple(counts)


def _remedy(num_layers: int, pp: int) -> str:
    """Numbers of stages with equal parts, and ends that leave equal parts to the asked number."""
    text = f"Without these two keys {divisors(num_layers)} stages are even"
    each = -(-num_layers // pp)
    ends = num_layers - each * (pp - 2)
    if pp > 2 and ends >= 2:
        text += (
            f"; {pp} are with {ends - ends // 2} layers in the first and {ends // 2} in the last"
        )
    return text


def check_divisible(config: MegatronConfig, world: int) -> None:
    """Refuse a number of ranks that the parallel sizes do not divide."""
    for names in (
        ("pipeline_model_parallel_size", "context_parallel_size", "tensor_model_parallel_size"),
        (
            "pipeline_model_parallel_size",
            "expert_model_parallel_size",
            "expert_tensor_parallel_size",
        ),
    ):
        product = 1
        for name in names:
            product *= getattr(config, name)
        if world % product:
            parts = " x ".join(f"policy.megatron_cfg.{n}={getattr(config, n)}" for n in names)
            raise ConfigError(
                f"{world} ranks can not be divided into {parts}; expected a multiple of {product}: "
                "change one of these, or cluster.num_nodes and cluster.gpus_per_node"
            )
