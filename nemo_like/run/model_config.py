"""What kind of model a configuration trains, which its policy, its engines and a plan all ask."""

from __future__ import annotations

import json
from typing import Any

from nemo_like.assets import model_folder
from nemo_like.config.policy import PolicyConfig


def hf_config_of(policy: PolicyConfig) -> Any:
    """The configuration of the policy's model, as `transformers` reads it; needs no weights.

    Raises:
        ConfigError: there is none, or the active backend does not train it.
    """
    from nemo_like.backends.hf_models import load_hf_config

    folder = model_folder(policy.model_name, with_weights=False)
    return load_hf_config(folder, policy.hf_config_overrides, backend_key=policy.backend_key)


def read_model_config(policy: PolicyConfig) -> dict[str, Any]:
    """The content of the model's config.json with overrides; imports no transformers."""
    folder = model_folder(policy.model_name, with_weights=False)  # weights are the workers' affair
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config | policy.hf_config_overrides
