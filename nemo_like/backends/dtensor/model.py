"""A Hugging Face causal LM as a map from rows to log-probabilities.

How its weights get in and out is here too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from nemo_like.checkpoint.files import read_json
from nemo_like.errors import CheckpointError, ConfigError
from nemo_like.ops.logprobs import linear_logprobs
from nemo_like.optim.norm import local

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


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


def load_hf_config(folder: Path, overrides: Mapping[str, Any]) -> Any:
    """The model's configuration with some fields replaced; code that comes with it is not executed.

    Raises:
        ConfigError: another family, or an override of a field that the configuration does not have.
    """
    import transformers

    raw = read_json(folder / "config.json")
    if raw.get("model_type") not in FAMILIES:
        raise ConfigError(
            f"policy.model_name: model type {raw.get('model_type')!r} is not supported by "
            f"the DTensor backend; supported: {', '.join(sorted(FAMILIES))}"
        )
    config_class = getattr(transformers, FAMILIES[raw["model_type"]]).config_class
    known = config_class.from_dict(raw).to_dict()
    if unknown := sorted(overrides.keys() - known.keys()):
        raise ConfigError(
            f"policy.hf_config_overrides.{unknown[0]}: no such field in {folder / 'config.json'}; "
            f"fields: {', '.join(sorted(known))}"
        )
    if "num_hidden_layers" in overrides:
        raw.pop("layer_types", None)  # one entry per layer, which the class works out again
    return config_class.from_dict(raw | dict(overrides))


def new_hf_model(hf_config: Any, *, device: str) -> Any:
    """A model of one of the supported families in fp32; on `meta` it has no memory yet."""
    import transformers

    family = getattr(transformers, FAMILIES[hf_config.model_type])
    hf_config._attn_implementation = "sdpa"
    with torch.device(device):
        model = family(hf_config).float()
    model.tie_weights()
    return model


def random_weights(hf_config: Any, seed: int) -> Iterator[tuple[str, Tensor]]:
    """A newborn model's weights, from configuration and seed alone, whatever the layout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = new_hf_model(hf_config, device="cpu")
    yield from named_parameters(model)


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
def load_weights(model: CausalLM, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copy this rank's block of each whole tensor into the model.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or of another shape.
    """
    missing = dict(named_parameters(model))
    tied = model.hf.config.tie_word_embeddings
    for name, whole in weights:
        if name == "lm_head.weight" and tied:
            continue
        parameter = missing.pop(name, None)
        if parameter is None:
            raise CheckpointError(
                f"the weights hold {name!r}, which the model does not have (or twice)"
            )
        if whole.shape != parameter.shape:
            raise CheckpointError(
                f"{name!r} has shape {tuple(whole.shape)}; "
                f"the model expects {tuple(parameter.shape)}"
            )
        local(parameter).copy_(_block_of(whole, parameter))
    if missing:
        raise CheckpointError(f"the weights lack {', '.join(sorted(missing))}")


def _block_of(whole: Tensor, parameter: Tensor) -> Tensor:
    """The part of a whole tensor that belongs where this rank's block of `parameter` is."""
    if not isinstance(parameter, DTensor):
        return whole
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]


def whole_weights(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors by name; a collective, one tensor at a time."""
    for name, parameter in weights:
        value = parameter.detach()
        yield name, value.full_tensor() if isinstance(value, DTensor) else value
