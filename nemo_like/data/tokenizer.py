"""The tokenizer of a run: found, loaded, and given its chat template."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nemo_like.assets import bundled, fetch
from nemo_like.config.policy import TokenizerConfig
from nemo_like.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FILES = [
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "config.json",
    "vocab*",
    "merges.txt",
]
_VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt")


def load_tokenizer(config: TokenizerConfig, model_name: str) -> PreTrainedTokenizerFast:
    """The tokenizer that the config names, with the chat template that it names.

    Looked for as a local path, bundled here, in the Hugging Face cache, and on the hub, in this
    order. Without a template (`chat_template=None`) conversations are plainly concatenated.

    Raises:
        ConfigError: if there is none, or no template, naming the cure.
    """
    name = config.name or model_name
    folder = _find(name)
    tokenizer = _load(folder, name)
    tokenizer.chat_template = _template(config.chat_template, tokenizer, name)
    return tokenizer


def _find(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    if (folder := bundled(name)) and (folder / "tokenizer.json").is_file():
        return folder
    return fetch(name, _FILES, key="policy.tokenizer.name")


def _load(folder: Path, name: str) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    # Without any of these, transformers makes an empty tokenizer and says nothing.
    if not any((folder / file).is_file() for file in _VOCABULARIES):
        raise ConfigError(
            f"policy.tokenizer.name: {name} has no tokenizer in {folder}, expected one of "
            f"{', '.join(_VOCABULARIES)}"
        )
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
        else:  # converts other formats, at the price of seconds of imports
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except Exception as exc:  # damaged files fail in the tokenizers library with bare Exceptions
        raise ConfigError(
            f"policy.tokenizer.name: {name} has no tokenizer that can be loaded from {folder}: "
            f"{str(exc).splitlines()[0] if str(exc) else type(exc).__name__}"
        ) from exc
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(
            f"policy.tokenizer.name: {name} has no tokenizer.json, nor one that can be made from "
            "its files; character positions, which loss masks are made from, need it"
        )
    return tokenizer


def _template(setting: str | None, tokenizer: PreTrainedTokenizerFast, name: str) -> str | None:
    if setting is None:
        return None
    if setting == "default":
        own = tokenizer.chat_template
        own = own.get("default") if isinstance(own, dict) else own
        if own is None:
            raise ConfigError(
                f"tokenizer {name} has no chat template: set policy.tokenizer.chat_template to a "
                ".jinja file, to a template, or to null (plain concatenation)"
            )
        return str(own)
    if setting.endswith(".jinja"):
        try:
            setting = Path(setting).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(f"policy.tokenizer.chat_template={setting}: {exc}") from exc
    elif "{%" not in setting and "{{" not in setting:
        raise ConfigError(
            f"policy.tokenizer.chat_template={setting!r}: expected `default`, null, a .jinja file, "
            "or a template"
        )
    return setting
