"""From a raw row to a conversation: the rules that a row must keep.

A conversation is `[{"role": ..., "content": ...}, ...]` with the roles system, developer, user,
assistant and tool.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_like.config.data import DatasetConfig, DatasetDefaults
from nemo_like.data.faults import RowError, shorten
from nemo_like.errors import ConfigError

ROLES = ("system", "developer", "user", "assistant", "tool")
Message = dict[str, Any]


@dataclass(frozen=True)
class RowFormat:
    """How rows become conversations; `prompt` has one `{}`, for the first user turn."""

    input_key: str
    output_key: str
    messages_key: str | None = None
    prompt: str | None = None
    system: str | None = None

    @classmethod
    def of(cls, source: DatasetConfig, defaults: DatasetDefaults) -> RowFormat:
        """The format that a source's config describes.

        Raises:
            ConfigError: for a prompt file that can not be read, or has not exactly one `{}`.
        """
        prompt_file = source.prompt_file or defaults.prompt_file
        system_file = source.system_prompt_file or defaults.system_prompt_file
        prompt = _read(prompt_file, "prompt_file") if prompt_file else None
        if prompt is not None:
            _check_prompt(prompt, str(prompt_file))
        return cls(
            input_key=source.input_key,
            output_key=source.output_key,
            messages_key=source.messages_key,
            prompt=prompt,
            system=_read(system_file, "system_prompt_file").strip() if system_file else None,
        )

    def messages(self, row: Mapping[str, Any]) -> list[Message]:
        """The conversation of a row, which ends with an assistant turn or has one.

        Raises:
            RowError: if the row breaks a rule.
        """
        if self.messages_key is None:
            messages: list[Message] = [
                {"role": "user", "content": _text(row, self.input_key)},
                {"role": "assistant", "content": _text(row, self.output_key)},
            ]
            if not messages[1]["content"]:
                raise RowError("empty response", field=self.output_key)
        else:
            messages = check_messages(_column(row, self.messages_key), self.messages_key)
        return self._dressed(messages)

    def _dressed(self, messages: list[Message]) -> list[Message]:
        if self.prompt is not None:
            first = next((i for i, m in enumerate(messages) if m["role"] == "user"), None)
            if first is not None:
                content = self.prompt.format(messages[first]["content"])
                messages[first] = {**messages[first], "content": content}
        if self.system is not None and messages[0]["role"] not in ("system", "developer"):
            messages.insert(0, {"role": "system", "content": self.system})
        return messages


def check_messages(value: Any, field: str) -> list[Message]:
    """The conversation, without keys that are null.

    Raises:
        RowError: if it breaks a rule.
    """
    if not isinstance(value, list):
        raise RowError("messages are not a list", field=field, found=shorten(value))
    if not value:
        raise RowError("no messages", field=field)
    call_ids: set[str] = set()
    messages = [_message(item, f"{field}[{i}]", call_ids) for i, item in enumerate(value)]
    turns = [m for m in messages if m["role"] == "assistant"]
    if not turns:
        raise RowError("no assistant turn", field=field)
    if not any(m["content"] or "tool_calls" in m for m in turns):
        raise RowError("empty response", field=field)
    return messages


def _message(item: Any, place: str, call_ids: set[str]) -> Message:
    if not isinstance(item, Mapping):
        raise RowError("message is not an object", field=place, found=shorten(item))
    message = {key: value for key, value in item.items() if value is not None}
    role = message.get("role")
    if role not in ROLES:
        raise RowError("unknown role", field=f"{place}.role", found=shorten(role))
    if role == "assistant" and message.get("tool_calls"):
        for k, call in enumerate(_calls(message, place)):
            call_ids.add(_call_id(call, f"{place}.tool_calls[{k}]"))
        message.setdefault("content", "")
    if role == "tool" and message.get("tool_call_id") not in call_ids:
        found = shorten(message.get("tool_call_id"))
        raise RowError("tool answer to no call", field=f"{place}.tool_call_id", found=found)
    message["content"] = _text(message, "content", f"{place}.content")
    return message


def _calls(message: Message, place: str) -> list[Any]:
    calls = message["tool_calls"]
    if not isinstance(calls, list):
        raise RowError("tool calls are not a list", field=f"{place}.tool_calls")
    return calls


def _call_id(call: Any, place: str) -> str:
    found = call.get("id") if isinstance(call, Mapping) else None
    if not isinstance(found, str) or not found:
        raise RowError("tool call without id", field=place, found=shorten(call))
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError("tool call without function name", field=place, found=shorten(call))
    return found


def _column(row: Mapping[str, Any], key: str, place: str = "") -> Any:
    """The value of a column; where none has that name, `a.0.b` goes into objects and lists."""
    value: Any = row
    for part in [key] if key in row else key.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            found = f"has {', '.join(map(str, row)) or 'nothing'}"
            raise RowError("missing column", field=place or key, found=found)
    if value is None:
        raise RowError("null", field=place or key)
    return value


def _text(row: Mapping[str, Any], key: str, place: str = "") -> str:
    value = _column(row, key, place)
    if not isinstance(value, str):
        raise RowError("not text", field=place or key, found=shorten(value))
    try:
        value.encode()
    except UnicodeEncodeError as exc:
        found = ascii(value[exc.start : exc.end])
        raise RowError("half a surrogate pair", field=place or key, found=found) from exc
    return value


def _read(file: str, key: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"data.*.{key}={file} can not be read: {exc}") from exc


def _check_prompt(prompt: str, file: str) -> None:
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(prompt) if name is not None]
    except ValueError as exc:
        raise ConfigError(f"data.*.prompt_file={file}: {exc}; write a brace as {{{{}}}}") from exc
    if fields != [""]:
        raise ConfigError(
            f"data.*.prompt_file={file} has {len(fields)} places to fill in ({fields}), expected "
            "exactly one {}; other braces are doubled"
        )
