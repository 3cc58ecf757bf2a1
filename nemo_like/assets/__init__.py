"""Model configurations, tokenizers and chat templates that come with the package."""

from __future__ import annotations

from pathlib import Path

from nemo_like.errors import ConfigError

_MODELS = Path(__file__).parent / "models"


def bundled(name: str) -> Path | None:
    """The folder of a bundled model (`tiny-qwen3`, or a Hugging Face name), or None.

    It holds a `config.json`, and a `tokenizer.json` where the tokenizer is bundled too.
    """
    folder = (_MODELS / name).resolve()
    inside = folder.is_relative_to(_MODELS.resolve())  # a name such as `../x` is not a bundled one
    return folder if inside and (folder / "config.json").is_file() else None


def model_folder(name: str, *, with_weights: bool) -> Path:
    """The folder of a model's `config.json`, and of its weights if they are asked for.

    Looked for in this order: as a local path, bundled here, in the Hugging Face cache, on the hub.

    Raises:
        ConfigError: there is none; the message names the cure.
    """
    patterns = ["config.json"]
    if with_weights:
        patterns += ["*.safetensors", "model.safetensors.index.json"]
    elif folder := bundled(name):
        return folder
    if (Path(name) / "config.json").is_file():
        return Path(name)
    if bundled(name) and "/" not in name:
        raise ConfigError(
            f"policy.model_name={name} is a bundled configuration without weights: "
            "set policy.init=random"
        )
    return fetch(name, patterns, key="policy.model_name")


def fetch(name: str, patterns: list[str], *, key: str) -> Path:
    """The folder in the Hugging Face cache that holds these files of a model, fetched if need be.

    Raises:
        ConfigError: the name is no local folder and can not be had; `key` is where it was set.
    """
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"{key}={name}: no such folder (looked from {Path.cwd()})")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError) as exc:
        raise ConfigError(
            f"{key}={name} is not a local folder, not bundled, not in the Hugging Face cache, and "
            f"can not be had from the hub ({type(exc).__name__}). Correct {key}; or run "
            f"`hf download {name}` where there is a network, and set {key} to that folder "
            f"(gated models need `hf auth login`)"
        ) from exc
