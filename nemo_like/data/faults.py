"""What is wrong with rows, collected so that one report names all of it before training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from nemo_like.errors import DataError

_SHOWN_PER_RULE = 5
_SHOWN_CHARACTERS = 80
_USUAL_NAMES = {
    "input_key": ("prompt", "question", "problem", "instruction", "query"),
    "output_key": ("response", "answer", "solution", "completion", "generated_solution"),
}


def shorten(value: object) -> str:
    """What was found, fit for one line of a report."""
    text = repr(value[:_SHOWN_CHARACTERS] if isinstance(value, str) else value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


class RowError(DataError):
    """One row breaks one rule. Collected in a `FaultReport`, never the end of a run by itself.

    `length` is that of a row with too many tokens.
    """

    def __init__(self, rule: str, *, field: str = "", found: str = "", length: int = 0) -> None:
        super().__init__(rule, field, found)
        self.rule, self.field, self.found, self.length = rule, field, found, length

    def __reduce__(self) -> tuple[object, ...]:
        return _row_error, (self.rule, self.field, self.found, self.length)


def _row_error(rule: str, field: str, found: str, length: int) -> RowError:
    return RowError(rule, field=field, found=found, length=length)


@dataclass(frozen=True, slots=True)
class Fault:
    """A `RowError` with its place: line or row number from 1; 0 is the whole file."""

    file: str
    row: int
    error: RowError

    def __str__(self) -> str:
        place = f"{self.file}:{self.row}" if self.row else self.file
        parts = (place, self.error.field and f"field `{self.error.field}`", self.error.found)
        return ", ".join(p for p in parts if p)


def column_settings(row: Mapping[str, Any], keys: Mapping[str, str]) -> tuple[str, ...]:
    """The settings `input_key=question` under which a row would have its columns, where plausible.

    `keys` says which columns were looked for: of `input_key` and `output_key`, or of
    `messages_key`.
    """
    if "messages" in row and "messages" not in keys.values():
        return ("messages_key=messages",)
    kind = list if "messages_key" in keys else str
    others = [
        name
        for name, value in row.items()
        if isinstance(value, kind) and name.isidentifier() and name not in keys.values()
    ]
    missing = {key: name for key, name in keys.items() if name not in row}
    found: dict[str, str] = {}
    for key, name in missing.items():
        usual = [other for other in others if other in _USUAL_NAMES.get(key, ())]
        if near := get_close_matches(name, others, n=1) or usual[:1]:
            found[key] = near[0]
            others.remove(near[0])
    left = [key for key in missing if key not in found]
    if len(left) == len(others) == 1:
        found[left[0]] = others[0]
    return tuple(f"{key}={found[key]}" for key in missing if key in found)


@dataclass
class SourceTally:
    """How many rows a source has, how many of them are bad, and what other keys might find."""

    key: str
    num_rows: int = 0
    num_bad_rows: int = 0
    settings: Counter[tuple[str, ...]] = field(default_factory=Counter)

    @property
    def needed_share(self) -> float:
        """The smallest `data.max_bad_rows`, in steps of 0.0001, that allows for the bad rows."""
        return -(-self.num_bad_rows * 10_000 // max(self.num_rows, 1)) / 10_000

    def exceeds(self, max_share: float) -> bool:
        """Whether more rows are bad than this share of the source's own rows."""
        return self.num_bad_rows / max(self.num_rows, 1) > max_share

    def cure(self) -> list[str]:
        """The settings that would give columns to most of the rows; empty if there are none."""
        for settings, count in self.settings.most_common(1):
            if 2 * count > self.num_rows:
                return [f"{self.key}.{setting}" for setting in settings]
        return []

    def __str__(self) -> str:
        return f"{self.key}: {self.num_bad_rows} of {self.num_rows}"


@dataclass
class FaultReport:
    """Faults of all sources: how many there are of each rule, and the first or longest few.

    `length_limits` are the settings that say what is too long.
    """

    length_limits: Mapping[str, int] = field(default_factory=dict)
    sources: list[SourceTally] = field(default_factory=list)
    num_bad_files: int = 0
    longest: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    shown: dict[str, list[tuple[int, str]]] = field(default_factory=dict)

    def source(self, key: str) -> SourceTally:
        """The tally of a source that is about to be read; faults added from now on are its own."""
        self.sources.append(SourceTally(key))
        return self.sources[-1]

    def add(self, fault: Fault) -> None:
        """Count a fault of the latest source."""
        rule, length = fault.error.rule, fault.error.length
        self.counts[rule] += 1
        self.sources[-1].num_bad_rows += fault.row > 0
        self.num_bad_files += fault.row == 0
        self.longest = max(self.longest, length)
        lines = self.shown.setdefault(rule, [])
        lines.append((length, str(fault)))
        lines.sort(key=lambda line: -line[0])  # stable: rules without a length keep their order
        del lines[_SHOWN_PER_RULE:]

    def summary(self) -> str:
        """The counts, and under each the first rows."""
        lines = [self._headline()]
        for rule, count in self.counts.most_common():
            lines.append(f"  {rule} ({count})")
            lines += [f"    {text}" for _, text in self.shown[rule]]
            if count > len(self.shown[rule]):
                lines.append(f"    and {count - len(self.shown[rule])} more")
        return "\n".join(lines)

    def _headline(self) -> str:
        bad = [source for source in self.sources if source.num_bad_rows]
        num_bad = sum(source.num_bad_rows for source in bad)
        num_rows = sum(source.num_rows for source in self.sources)
        parts = [f"{num_bad} of {num_rows} rows"] if bad else []
        if bad and len(self.sources) > 1:
            parts[0] += f" ({', '.join(map(str, bad))})"
        if self.num_bad_files:
            parts.append(f"{self.num_bad_files} file{'s' * (self.num_bad_files > 1)}")
        return f"{' and '.join(parts)} can not be used:"

    def check(self, *, drop: bool, max_share: float) -> str | None:
        """None if all is well, the summary if bad rows may be dropped.

        Raises:
            DataError: if bad rows are refused, or too many to drop, or a whole file is bad.
        """
        if not self.counts:
            return None
        exceeding = [source for source in self.sources if source.exceeds(max_share)]
        if drop and not self.num_bad_files and not exceeding:
            return self.summary()
        cures = [*self._settings(), self._last_cure(exceeding, drop=drop, max_share=max_share)]
        raise DataError("\n".join([self.summary(), *cures]))

    def _settings(self) -> Iterable[str]:
        """The settings under which rows would be good as they are."""
        raised = [
            f"{k}={self.longest}" for k, at in self.length_limits.items() if at < self.longest
        ]
        if raised:
            yield f"To take the longest row, set {' '.join(raised)}"
        if columns := [setting for source in self.sources for setting in source.cure()]:
            yield f"To read the columns that are there, set {' '.join(columns)}"

    def _last_cure(self, exceeding: list[SourceTally], *, drop: bool, max_share: float) -> str:
        if self.num_bad_files:
            return "Correct the file or its path."
        for source in self.sources:
            if source.num_bad_rows and source.num_bad_rows == source.num_rows:
                return f"Correct the rows: without the bad ones nothing is left of {source.key}."
        needed = max((source.needed_share for source in exceeding), default=0.0)
        if drop:
            worst = max(exceeding, key=lambda source: source.needed_share)
            return (
                f"In {worst.key} that is a share of {needed:.4f}, more than "
                f"data.max_bad_rows={max_share:g} allows."
            )
        cure = "Correct the rows, or leave them out with data.bad_rows=drop"
        return cure + (f" data.max_bad_rows={needed:.4f}." if exceeding else ".")
