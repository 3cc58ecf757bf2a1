"""What kind of model a configuration trains, which its policy, its engines and a plan all ask."""

from __future__ import annotations

from typing import Any

from nemo_like.config.policy import PolicyConfig


def hf_config_of(policy: PolicyConfig) -> Any:
    """The configuration of the policy's model, as `transformers` reads it; needs no weights.

    Raises:
        ConfigError: there is none, or the active backend does not train it.
    """
    from nemo_like.assets import model_folder
    from nemo_like.backends.hf_models import load_hf_config

    folder = model_folder(policy.model_name, with_weights=False)
    return load_hf_config(folder, policy.hf_config_overrides, backend_key=policy.backend_key)
