"""A Hugging Face causal LM as a map from rows to log-probabilities.

How its weights get in and out is here too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from nemo_like.backends.hf_models import Sliceable
from nemo_like.ops.logprobs import linear_logprobs
from nemo_like.optim.norm import local


class CausalLM(nn.Module):
    """Log-probabilities of targets under a Hugging Face model, the head's product in chunks.

    Logits are divided by `temperature`.
    The head's weight is used inside this module's `forward`, where FSDP2 has gathered it.
    """

    hf: Any  # torch's types know no attributes of transformers' modules

    def __init__(
        self, hf: Any, *, chunk_size: int, sequence_parallel: bool, temperature: float = 1.0
    ) -> None:
        super().__init__()
        self.hf = hf
        self.chunk_size = chunk_size
        self.sequence_parallel = sequence_parallel
        self.temperature = temperature

    def forward(
        self, input_ids_RT: Tensor, position_ids_RT: Tensor, predictor_M: Tensor, target_M: Tensor
    ) -> Tensor:
        """Log p(target | tokens up to and including its predictor), fp32 nats. Shapes: [M]."""
        hidden = self.hf.model(
            input_ids=input_ids_RT, position_ids=position_ids_RT, use_cache=False
        ).last_hidden_state
        weight = self.hf.lm_head.weight
        group, vocab_start = None, 0
        if isinstance(weight, DTensor):
            mesh = weight.device_mesh
            group = mesh.get_group()
            _, (vocab_start, _) = compute_local_shape_and_global_offset(
                weight.shape, mesh, weight.placements
            )
            weight = weight.to_local()
            between = Shard(1) if self.sequence_parallel else Replicate()
            hidden = DTensor.from_local(hidden, mesh, [between]).redistribute(
                placements=[Replicate()]
            )
            # Each rank's slice of the vocabulary gives a part of the hidden states' gradient.
            hidden = hidden.to_local(grad_placements=[Partial()])
        if self.temperature != 1:
            hidden = hidden / self.temperature  # as good as logits divided, and smaller
        return linear_logprobs(
            hidden.reshape(-1, hidden.shape[-1])[predictor_M],
            weight,
            target_M,
            chunk_size=self.chunk_size,
            group=group,
            vocab_start=vocab_start,
        )


def named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters by their Hugging Face name, tied ones once."""
    return [(name.removeprefix("hf."), p) for name, p in model.named_parameters()]


def materialize(model: CausalLM, device: torch.device) -> None:
    """Give a model from the `meta` device memory, and its buffers their values, in place."""
    model.to_empty(device=device)
    # `to_empty` makes a new parameter for each of its names.
    if model.hf.config.tie_word_embeddings:
        model.hf.lm_head.weight = model.hf.model.embed_tokens.weight
    rotary = model.hf.model.rotary_emb
    model.hf.model.rotary_emb = type(rotary)(config=model.hf.config).to(device)


@torch.no_grad()
def load_weights(model: CausalLM, weights: Iterable[tuple[str, Sliceable]]) -> None:
    """Copy this rank's block of each whole tensor of the model into it."""
    parameters = dict(named_parameters(model))
    for name, whole in weights:
        parameter = parameters.pop(name)
        local(parameter).copy_(whole[_box_of(parameter)])
    assert not parameters, f"the weights lack {', '.join(parameters)}"


def _box_of(parameter: Tensor) -> tuple[slice, ...]:
    """The part of a whole tensor that belongs where this rank's block of `parameter` is."""
    if not isinstance(parameter, DTensor):
        return tuple(slice(0, n) for n in parameter.shape)
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))


def whole_weights(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors by name; a collective, one tensor at a time."""
    for name, parameter in weights:
        value = parameter.detach()
        yield name, value.full_tensor() if isinstance(value, DTensor) else value
