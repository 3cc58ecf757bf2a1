"""Takes secrets out of everything that is printed or saved.

Three ways to know one: the name of its key (`HF_TOKEN`, `api_key`), its value being that of an
environment variable with such a name, and its shape (`hf_...`, `sk-...`, `user:password@host`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

REDACTED = "<redacted>"

_SECRET_NAME = re.compile(
    r"(?i)(^|.*[^a-z0-9])((api|access|secret|private|auth)[-_]?key|access_key_id|token"
    r"|password|passwd|secret|credentials?)$"
)
"""Whole words at the end of a name: `max_tokens`, `tokenizer` and `monkey` are no secrets."""
_SPECIAL_TOKEN = re.compile(
    r"(?i)(^|.*[^a-z0-9])(bos|eos|pad|unk|sep|cls|mask|stop|image|per|each)_?token$"
)
_CAMEL_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_NO_SECRET = re.compile(r"(?i)true|false|null|none|<redacted>|[-+.,\d]+(e[-+]?\d+)?")
"""Values that running text may show even so: `loss of the last token: 2.31`."""

_SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|\bsk-[A-Za-z0-9_-]{16,}"  # OpenAI, Anthropic and others
    r"|\bwandb_v\d+_[A-Za-z0-9_]{16,}"  # W&B since 2025; its older keys are known by their names
    r"|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}"  # GitHub, GitLab
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bAIza[\w-]{30,}"  # AWS, Google
    r"|\bnvapi-[\w-]{20,}|\bxox[abprs]-[\w-]{10,}"  # NVIDIA, Slack
    r"|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*"  # JSON web tokens
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    re.DOTALL,
)
_URL_LOGIN = re.compile(r"(\b[a-zA-Z][a-zA-Z0-9+.-]{0,20}://)[^\s/'\"]+@")
_BEARER = re.compile(
    r"(?i)(\bauthorization\W{1,4}(?:bearer|basic)\s+|\bbearer\s+(?=\S{20}))[A-Za-z0-9._~+/=-]+"
)
_NAME = re.compile(r"(?<![\w.-])([\w.-]+)[\"']?\s*[=:]\s*")
_VALUE = re.compile(r"\"[^\"\n]*\"|'[^'\n]*'|[^\s\"',&}\]]+")
_MIN_ENVIRONMENT_VALUE = 6
"""Shorter values of environment variables (`1`, `none`) would be found in every text."""


def is_secret_name(name: str) -> bool:
    """Whether what is stored under this name must not be shown."""
    name = _CAMEL_HUMP.sub("_", name)
    return bool(_SECRET_NAME.match(name)) and not _SPECIAL_TOKEN.match(name)


def redact(text: str) -> str:
    """The text with every secret in it replaced."""
    for value in _environment_secrets():
        text = text.replace(value, REDACTED)
    text = _SHAPES.sub(REDACTED, text)
    text = _URL_LOGIN.sub(rf"\g<1>{REDACTED}@", text)
    text = _BEARER.sub(rf"\g<1>{REDACTED}", text)
    return _redact_assignments(text)


def redact_tree(tree: Any) -> Any:
    """A copy of nested dicts and lists with the secrets in it replaced."""
    if isinstance(tree, Mapping):
        return {key: _redact_field(str(key), value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [redact_tree(item) for item in tree]
    return redact(tree) if isinstance(tree, str) else tree


def _redact_field(name: str, value: Any) -> Any:
    is_set = value not in (None, "") and not isinstance(value, bool)
    return REDACTED if is_set and is_secret_name(name) else redact_tree(value)


def _redact_assignments(text: str) -> str:
    parts, end = [], 0
    for name in _NAME.finditer(text):
        if name.start() < end or not is_secret_name(name[1]):
            continue
        value = _VALUE.match(text, name.end())
        if value and not _may_be_shown(name[1], value[0]):
            parts += [text[end : value.start()], REDACTED]
            end = value.end()
    return "".join([*parts, text[end:]])


def _may_be_shown(name: str, value: str) -> bool:
    return name.lower().endswith("token") and bool(_NO_SECRET.fullmatch(value))


def _environment_secrets() -> list[str]:
    values = {
        value
        for name, value in os.environ.items()
        if is_secret_name(name) and len(value) >= _MIN_ENVIRONMENT_VALUE
    }
    return sorted(values, key=len, reverse=True)  # a secret may contain another
