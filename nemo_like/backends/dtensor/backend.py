"""One rank of the DTensor backend: a Hugging Face model under FSDP2 and tensor parallelism."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from nemo_like.backends.base import LossOf, Part, RankBackend
from nemo_like.backends.collectives import join_process_group
from nemo_like.backends.dtensor import model as models
from nemo_like.backends.dtensor.parallelize import build_mesh, shard_parameters, tensor_parallel
from nemo_like.backends.hf_models import FirstModel, config_content, new_hf_model
from nemo_like.backends.settings import BackendSettings
from nemo_like.checkpoint import rng
from nemo_like.config.policy import PolicyConfig
from nemo_like.errors import ConfigError
from nemo_like.ops.packing import rows_of
from nemo_like.optim.build import build_optimizer
from nemo_like.optim.layout import layout_of
from nemo_like.optim.routing import embedding_names
from nemo_like.optim.views import attention_shape


class DTensorBackend(RankBackend):
    """FSDP2 with fp32 master weights, HSDP, tensor and sequence parallelism, on GPUs or a CPU."""

    model: models.CausalLM

    def __init__(self, policy: PolicyConfig, settings: BackendSettings) -> None:
        config = policy.dtensor_cfg
        leaving = ExitStack()
        device = join_process_group(leaving)
        if config.cpu_offload and device.type == "cpu":
            raise ConfigError(
                "policy.dtensor_cfg.cpu_offload=true moves state from a GPU to the host, and this "
                "worker runs on a CPU; set it to false"
            )
        self.mesh = build_mesh(config, device.type)
        model = _build_model(policy, self.mesh, device, settings)
        optimizer, routing = build_optimizer(
            models.named_parameters(model),
            policy.active_optimizer,
            embeddings=embedding_names(model.hf),
            attention=attention_shape(model.hf.config),
            layout=partial(layout_of, over=self.mesh),
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
        # Tensor-parallel peers draw the same, as they compute on the same sequences.
        rng.seed(settings.seed, stream=dist.get_rank() // self.mesh["tp"].size())

    def _forward(self, parts: Sequence[Part]) -> list[Tensor]:
        results = [self._logprobs(part) for part in parts]
        # After a forward pass FSDP2 leaves its root gathered, in the type of the computation, for a
        # backward pass; there is none here.
        if isinstance(self.model, FSDPModule):
            self.model.reshard()
        return results

    def _backward(self, parts: Sequence[Part], loss_of: LossOf) -> None:
        for number, part in enumerate(parts):
            # The gradients of copies (HSDP) are added up once, not at every micro-batch. Within a
            # copy they are reduced at once: whole ones would take the memory that FSDP2 saves.
            if isinstance(self.model, FSDPModule):
                self.model.set_requires_all_reduce(number == len(parts) - 1)
            loss_of(number, self._logprobs(part)).backward()
        self._finish_gradients()

    def _logprobs(self, part: Part) -> Tensor:
        """Log-probabilities aligned with the part's tokens. Shapes: [N]."""
        rows = rows_of(part.batch, part.micro_batch, multiple=self.policy.sequence_divisor)
        rows = rows.to(self.device)
        logprobs_M = self.model(
            rows.input_ids_RT, rows.position_ids_RT, rows.predictor_M, rows.target_M
        )
        return rows.aligned(logprobs_M, len(part.batch.token_ids_N))

    def _finish_gradients(self) -> None:
        # FSDP2 has reduced its own. Without it, a weight that acts on every rank's heads (q_norm)
        # or part of the sequence (layer norms) still has one part of its gradient on each rank.
        for parameter in self.model.parameters():
            gradient = parameter.grad
            if not (isinstance(gradient, DTensor) and isinstance(parameter, DTensor)):
                continue
            if gradient.placements != parameter.placements:
                parameter.grad = gradient.redistribute(placements=parameter.placements)

    def _weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self._master_weights()}

    def _master_weights(self) -> list[tuple[str, Tensor]]:
        """The parameters as the optimizer sees them: in full precision, this rank's part."""
        named: list[tuple[str, Tensor]] = [*models.named_parameters(self.model)]
        is_sharded = isinstance(self.model, FSDPModule)
        gathered = [
            name
            for name, parameter in named
            if parameter.dtype.itemsize < 4 or (is_sharded and not isinstance(parameter, DTensor))
        ]
        assert not gathered, f"FSDP2 still holds {', '.join(gathered[:3])} for a computation"
        return named

    def _model_config(self) -> dict[str, Any]:
        return config_content(self.model.hf.config)

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole fp32 tensors by Hugging Face name; a collective."""
        return models.whole_weights(self._master_weights())


def _build_model(
    policy: PolicyConfig, mesh: DeviceMesh, device: torch.device, settings: BackendSettings
) -> models.CausalLM:
    config = policy.dtensor_cfg
    first = FirstModel.of(policy, seed=settings.seed)
    hf = new_hf_model(first.hf_config, device="meta")
    if config.activation_checkpointing:
        hf.gradient_checkpointing_enable({"use_reentrant": False})
    if config.tensor_parallel_size > 1:
        tensor_parallel(hf, mesh["tp"], sequence_parallel=config.sequence_parallel)
    model = models.CausalLM(
        hf,
        chunk_size=policy.logprob_chunk_size,
        sequence_parallel=config.sequence_parallel,
        temperature=settings.temperature,
    )
    shard_parameters(
        model, mesh, compute_dtype=getattr(torch, policy.precision), cpu_offload=config.cpu_offload
    )
    models.materialize(model, torch.device("cpu") if config.cpu_offload else device)
    if settings.loads_weights:
        shapes = {name: tuple(p.shape) for name, p in models.named_parameters(model)}
        models.load_weights(model, first.weights(shapes))
    return model
