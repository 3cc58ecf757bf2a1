"""What a run would lay where: owners, Muon's work and memory, from the table of weights alone."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from nemo_like.backends.megatron.architecture import refuse_unsupported
from nemo_like.backends.megatron.convert import WeightTable
from nemo_like.backends.megatron.places import Grid, Place, layers_of_stages
from nemo_like.backends.megatron.routing import all_names, packed_attention, refuse_halves
from nemo_like.config.policy import PolicyConfig
from nemo_like.optim.build import muon_rule, plan_routing
from nemo_like.optim.layout import Layout
from nemo_like.optim.plan import Plan
from nemo_like.optim.routing import STATE_BYTES, Routing
from nemo_like.optim.views import View


class Forecast:
    """The parameters of a run on so many ranks, each where the workers would have it.

    Nothing is started, and no weight has memory: the largest model takes seconds.

    Raises:
        ConfigError: the model, the layout or the optimizer's settings do not fit together.
    """

    def __init__(self, policy: PolicyConfig, hf_config: Any, world: int) -> None:
        refuse_unsupported(policy, hf_config)
        self._policy, self._config = policy, policy.megatron_cfg
        config, self._optimizer = self._config, policy.active_optimizer
        self.table = WeightTable.of(config, hf_config)
        self._grid = Grid.of(config, world)
        self._blockwise = self._optimizer.is_muon and self._optimizer.muon_tp_mode == "blockwise"
        self._attention = packed_attention(hf_config, config, blockwise=self._blockwise)
        counts = layers_of_stages(config, hf_config.num_hidden_layers)
        self._ends = tuple(accumulate(counts))
        experts = getattr(hf_config, "num_experts", None) or 1
        self._experts_of_rank = max(1, experts // config.expert_model_parallel_size)
        self._layouts: dict[tuple[Any, ...], Layout] = {}
        refuse_halves(self.table, (*self._optimizer.muon_include, *self._optimizer.muon_exclude))

    @cached_property
    def routing(self) -> Routing:
        """Who updates each parameter of the whole model, by megatron-core's names, and why."""
        masters = {name: self._master(name) for name in self._names()}
        by_id = {id(master): name for name, master in masters.items()}
        return plan_routing(
            list(all_names(self.table, masters.items())),
            self._optimizer,
            attention=self._attention,
            layout=lambda master: self.layout(by_id[id(master)]),
        )

    @cached_property
    def plans(self) -> list[Plan]:
        """Muon's work: a plan for each set of ranks that hold some of its matrices."""
        shared: dict[tuple[int, ...], tuple[list[Layout], list[View]]] = {}
        for row in self.routing.rows:
            for tp_rank in self._blocks(row.name) if row.optimizer == "muon" else ():
                layout = self.layout(row.name, tp_rank)
                layouts, views = shared.setdefault(layout.ranks, ([], []))
                layouts.append(layout)
                views.append(row.view)
        rule = muon_rule(self._optimizer)
        return [rule.plan(layouts, views, torch.float32) for layouts, views in shared.values()]

    @property
    def owners(self) -> list[dict[str, Any]]:
        """The rows of `routing`, named by what each parameter is made of too."""
        return [
            {
                "name": f"{row.name} = {_together(self.table.hf_names(row.name))}",
                "shape": self.table.entries[row.name].shape,
                "optimizer": row.optimizer,
                "reason": row.reason,
            }
            for row in self.routing.rows
        ]

    def memory(self) -> dict[str, float]:
        """Bytes of the fullest rank by what they are for, activations not counted."""
        own = {row.name: STATE_BYTES[row.optimizer] for row in self.routing.rows}
        dtype = getattr(torch, self._policy.precision)
        ddp = self._config.distributed_data_parallel_config
        gradient = torch.float32 if ddp.grad_reduce_in_fp32 else dtype
        # Bytes of each rank: weights, gradients, masters, optimizer state.
        held = torch.zeros(4, self._grid.ranks.numel(), dtype=torch.float64)
        for name in self._names():
            place = self._place(name)
            ranks, local = place.ranks.flatten(), math.prod(place.local_box(0)[1])
            held[0, ranks] += local * dtype.itemsize
            held[1, ranks] += local * gradient.itemsize if name in own else 0
            # Whole fp32 masters are the weights themselves.
            is_apart = dtype is not torch.float32 or (place.sharded and place.ranks.shape[-1] > 1)
            for block in self.layout(name, whole=True).blocks:
                holders = list(block.holders)
                held[2, holders] += block.numel * 4 * is_apart
                held[3, holders] += block.numel * own.get(name, 0)
        fullest = held[:, int(held.sum(0).argmax())].tolist()
        kinds = ("weights", "gradients", "fp32 masters", "optimizer state (fp32)")
        return dict(zip(kinds, fullest, strict=True)) | {"together": sum(fullest)}

    def _names(self) -> Iterator[str]:
        """All parameters once: a tied head is the embedding."""
        for name in self.table.entries:
            if not (self.table.tied and name == "output_layer.weight"):
                yield name

    def _master(self, name: str) -> Tensor:
        frozen = self._config.freeze_moe_router and name.endswith(".router.weight")
        shape = self.table.entries[name].shape
        return nn.Parameter(torch.empty(shape, device="meta"), requires_grad=not frozen)

    def _place(self, name: str) -> Place:
        layer = re.search(r"layers\.(\d+)\.", name)
        expert = re.search(r"local_experts\.(\d+)\.", name)
        is_first = name.startswith("embedding.")
        stage = 0 if is_first else len(self._ends) - 1
        if layer:
            stage = next(i for i, end in enumerate(self._ends) if int(layer[1]) < end)
        return Place(
            self._grid,
            self.table,
            name,
            stage=stage,
            ep_rank=int(expert[1]) // self._experts_of_rank if expert else 0,
            sharded=self._policy.shards_optimizer,
        )

    def _blocks(self, name: str) -> range:
        """The tensor-parallel ranks that have a matrix of their own, as Muon sees it."""
        is_cut = self._blockwise and self.table.entries[name].has_blocks
        return range(self._place(name).ranks.shape[1] if is_cut else 1)

    def layout(self, name: str, tp_rank: int = 0, *, whole: bool = False) -> Layout:
        """Who holds which block of a parameter, as the optimizer of a tensor-parallel rank sees it.

        With `whole` a block is never taken for a matrix of its own.
        """
        place, entry = self._place(name), self.table.entries[name]
        # The layers of a stage are alike, and so are the experts of a rank.
        at = (place.stage, place.ep_rank, name.startswith("embedding."))
        key = (entry.shape, entry.tp_dim, entry.is_expert, *at, tp_rank, whole)
        if key not in self._layouts:
            blockwise = self._blockwise and not whole
            self._layouts[key] = place.optimized(tp_rank, blockwise=blockwise)
        return self._layouts[key]


def _together(names: Sequence[str]) -> str:
    """Names that begin and end alike in one, as in `a.{q,k,v}_proj`."""
    if len(names) == 1:
        return names[0]
    start = os.path.commonprefix(names)
    end = os.path.commonprefix([name[len(start) :][::-1] for name in names])[::-1]
    middles = (name[len(start) : len(name) - len(end)] for name in names)
    return f"{start}{{{','.join(middles)}}}{end}"
