"""One rank of the Megatron backend: a stage of megatron-core's model, trained by our optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_like.backends.base import LossOf, Part, RankBackend
from nemo_like.backends.collectives import join_process_group
from nemo_like.backends.hf_models import FirstModel, config_content
from nemo_like.backends.megatron.convert import WeightTable
from nemo_like.backends.megatron.masters import Masters
from nemo_like.backends.megatron.model import build_model
from nemo_like.backends.megatron.parallel import initialize
from nemo_like.backends.megatron.routing import all_names, of_rank, packed_attention, refuse_halves
from nemo_like.backends.megatron.schedule import run
from nemo_like.backends.megatron.weights import (
    WholeWeights,
    canonical,
    load_weights,
    local_blocks,
)
from nemo_like.backends.settings import BackendSettings
from nemo_like.checkpoint import rng
from nemo_like.config.policy import PolicyConfig
from nemo_like.interfaces import Loss
from nemo_like.ops.packing import Rows, rows_of
from nemo_like.optim.build import build_optimizer
from nemo_like.types import Metrics, Shard


class MegatronBackend(RankBackend):
    """Tensor, sequence, pipeline, context, expert and data parallelism, on GPUs or a CPU.

    megatron-core has the model, the schedule of micro-batches and the reduction of gradients. The
    optimizer works on fp32 masters, under the names of megatron-core's parameters; weights and
    state leave under Hugging Face names.
    """

    def __init__(self, policy: PolicyConfig, settings: BackendSettings) -> None:
        config, active = policy.megatron_cfg, policy.active_optimizer
        leaving = ExitStack()
        device = join_process_group(leaving)
        self.parallel = initialize(config, device, seed=settings.seed)
        leaving.callback(self.parallel.destroy)
        first = FirstModel.of(policy, seed=settings.seed)
        self.hf_config = first.hf_config
        self.table = WeightTable.of(config, self.hf_config)
        model = build_model(
            policy, self.hf_config, self.parallel, device, temperature=settings.temperature
        )
        if settings.loads_weights:
            blocks = local_blocks(
                self.table,
                dict(model.module.global_parameters()),
                tp_rank=self.parallel.rank("tp"),
                expert_tp_rank=self.parallel.rank("etp"),
            )
            load_weights(self.table, blocks, first.weights(self.table.hf_shapes))
        blockwise = active.is_muon and active.muon_tp_mode == "blockwise"
        self.masters = Masters(
            model.module,
            self.table,
            self.parallel,
            sharded=policy.shards_optimizer,
            blockwise=blockwise,
        )
        refuse_halves(self.table, (*active.muon_include, *active.muon_exclude))
        optimizer, routing = build_optimizer(
            all_names(self.table, self.masters.weights().items()),
            of_rank(active, self.table, self.masters.weights()),
            attention=packed_attention(self.hf_config, config, blockwise=blockwise),
            layout=self.masters.layout,
        )
        super().__init__(
            model=model,
            optimizer=optimizer,
            routing=routing,
            policy=policy,
            settings=settings,
            device=device,
            leaving=leaving,
        )
        rng.seed(settings.seed, stream=self.parallel.rank("dp"))

    def _forward(self, parts: Sequence[Part]) -> list[Tensor]:
        rows = [self._rows(part) for part in parts]
        results = run(self.model, self.parallel, rows)
        return [
            own.aligned(found, len(part.batch.token_ids_N))
            for found, own, part in zip(results, rows, parts, strict=True)
        ]

    def _backward(self, parts: Sequence[Part], loss_of: LossOf) -> None:
        rows = [self._rows(part) for part in parts]
        run(
            self.model,
            self.parallel,
            rows,
            lambda i, logprobs_M: loss_of(
                i, rows[i].aligned(logprobs_M, len(parts[i].batch.token_ids_N))
            ),
        )
        self.masters.take_gradients()
        self._return_memory(level=1)

    def _rows(self, part: Part) -> Rows:
        return rows_of(part.batch, part.micro_batch, multiple=self.policy.sequence_divisor)

    def _gradients(self, shard: Shard, loss: Loss) -> tuple[list[Tensor], Metrics]:
        # The last stage alone sees losses, and the first rank of a replica reports them.
        found = [super()._gradients(shard, loss)]
        if self.parallel.size("pp") > 1:
            group = self.parallel.group("pp")
            found = [([share.cpu() for share in found[0][0]], found[0][1])]
            dist.broadcast_object_list(found, group=group, group_src=group.size() - 1)
        return found[0]

    def _weights_changed(self) -> None:
        self.masters.put_back()
        self._return_memory(level=2)

    def _return_memory(self, *, level: int) -> None:
        """Give cached memory back to the GPU, if that is asked for here."""
        wanted = self.policy.megatron_cfg.empty_unused_memory_level >= level
        if wanted and self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _weights(self) -> dict[str, Tensor]:
        return {name: weight.detach() for name, weight in self.masters.weights().items()}

    def _stored(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Any]:
        return canonical(self.table, self.masters.blocks(tensors))

    def _stored_names(self, name: str) -> Sequence[str]:
        return self.table.hf_names(name)

    def _owners(self) -> list[dict[str, Any]]:
        own = {
            hf_name: {"optimizer": row.optimizer, "reason": row.reason}
            for row in self.routing.rows
            for hf_name in self._stored_names(row.name)
        }
        of_rank: list[dict[str, Any]] = [{}] * self._world_size
        dist.all_gather_object(of_rank, own)
        found = {name: owner for owners in of_rank for name, owner in owners.items()}
        shapes = self.table.hf_shapes
        return [{"name": n, "shape": list(shapes[n])} | found[n] for n in shapes if n in found]

    def _model_config(self) -> dict[str, Any]:
        return config_content(self.hf_config)

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole fp32 tensors by Hugging Face name; a collective."""
        return iter(self._whole_weights)

    @cached_property
    def _whole_weights(self) -> WholeWeights:
        return WholeWeights(self.table, self.masters.blocks(self._weights()))
