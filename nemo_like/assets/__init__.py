"""Model configurations, tokenizers and chat templates that come with the package."""

from __future__ import annotations

from pathlib import Path

_MODELS = Path(__file__).parent / "models"


def bundled(name: str) -> Path | None:
    """The folder of a bundled model (`tiny-qwen3`, or a Hugging Face name), or None.

    It holds a `config.json`, and a `tokenizer.json` where the tokenizer is bundled too.
    """
    folder = (_MODELS / name).resolve()
    inside = folder.is_relative_to(_MODELS.resolve())  # a name such as `../x` is not a bundled one
    return folder if inside and (folder / "config.json").is_file() else None
