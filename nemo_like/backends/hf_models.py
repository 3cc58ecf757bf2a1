"""The models of both backends, as transformers describe them: configuration, newborn weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from nemo_like.assets import model_folder
from nemo_like.checkpoint.files import read_json
from nemo_like.checkpoint.hf_import import read_hf_lazily
from nemo_like.config.policy import PolicyConfig
from nemo_like.errors import ConfigError
from nemo_like.ops.experts import apart

CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
"""The class of each family, by the `model_type` of config.json."""

FAMILIES = {
    "dtensor_cfg": ("llama", "qwen2", "qwen3"),
    "megatron_cfg": ("llama", "qwen2", "qwen3", "qwen3_moe"),
}
"""The families that each backend trains, by its block under `policy`."""


class Sliceable(Protocol):
    """A whole tensor, or one that is read where it is sliced."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole."""
        ...

    def __getitem__(self, box: tuple[slice, ...], /) -> Tensor:
        """One slice for each dimension, without steps."""
        ...


def load_hf_config(folder: Path, overrides: Mapping[str, Any], *, backend_key: str) -> Any:
    """The model's configuration with some fields replaced; code that comes with it is not executed.

    Raises:
        ConfigError: another family, or an override of a field that the configuration does not have.
    """
    import transformers

    raw = read_json(folder / "config.json")
    supported = FAMILIES[backend_key]
    if raw.get("model_type") not in supported:
        raise ConfigError(
            f"policy.model_name: model type {raw.get('model_type')!r} is not supported with "
            f"policy.{backend_key}.enabled=true; supported: {', '.join(supported)}"
        )
    config_class = getattr(transformers, CLASSES[raw["model_type"]]).config_class
    known = config_class.from_dict(raw).to_dict()
    if unknown := sorted(overrides.keys() - known.keys()):
        raise ConfigError(
            f"policy.hf_config_overrides.{unknown[0]}: no such field in {folder / 'config.json'}; "
            f"fields: {', '.join(sorted(known))}"
        )
    if "num_hidden_layers" in overrides:
        raw.pop("layer_types", None)  # one entry per layer, which the class works out again
    return config_class.from_dict(raw | dict(overrides))


def config_content(hf_config: Any) -> dict[str, Any]:
    """The content of the model's config.json, without what it says of where it came from."""
    origin = ("transformers_version", "_name_or_path")
    return {key: value for key, value in hf_config.to_dict().items() if key not in origin}


def new_hf_model(hf_config: Any, *, device: str) -> Any:
    """A model of one of the supported families in fp32; on `meta` it has no memory yet."""
    import transformers

    family = getattr(transformers, CLASSES[hf_config.model_type])
    hf_config._attn_implementation = "sdpa"
    with torch.device(device):
        model = family(hf_config).float()
    model.tie_weights()
    return model


def hub_shapes(hf_config: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every weight under its name on the hub, tied ones once; none has memory."""
    named = new_hf_model(hf_config, device="meta").named_parameters()
    return {name: tuple(weight.shape) for name, weight in apart(named)}


def random_weights(hf_config: Any, seed: int) -> Iterator[tuple[str, Tensor]]:
    """A newborn model's weights, from configuration and seed alone, whatever backend and layout.

    Names are those of checkpoints on the hub; tied weights come once.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = new_hf_model(hf_config, device="cpu")
    yield from apart((name, weight.detach()) for name, weight in model.named_parameters())


@dataclass(frozen=True)
class FirstModel:
    """What a policy begins with: its configuration, and weights, newborn or from its folder."""

    hf_config: Any
    folder: Path
    newborn_seed: int | None

    @classmethod
    def of(cls, policy: PolicyConfig, *, seed: int) -> FirstModel:
        """The model that the configuration names; `seed` is of newborn weights."""
        is_newborn = policy.init == "random"
        folder = model_folder(policy.model_name, with_weights=not is_newborn)
        hf_config = load_hf_config(
            folder, policy.hf_config_overrides, backend_key=policy.backend_key
        )
        return cls(hf_config, folder, seed if is_newborn else None)

    def weights(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Sliceable]]:
        """One tensor after the other, by Hugging Face name; the model has these shapes."""
        if self.newborn_seed is not None:
            return random_weights(self.hf_config, self.newborn_seed)
        return read_hf_lazily(self.folder, shapes, tied=self.hf_config.tie_word_embeddings)
