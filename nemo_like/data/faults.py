"""What is wrong with rows, collected so that one report names all of it before training."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from nemo_like.errors import DataError

_SHOWN_PER_RULE = 5
_SHOWN_CHARACTERS = 80


def shorten(value: object) -> str:
    """What was found, fit for one line of a report."""
    text = repr(value[:_SHOWN_CHARACTERS] if isinstance(value, str) else value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


class RowError(DataError):
    """One row breaks one rule. Collected in a `FaultReport`, never the end of a run by itself."""

    def __init__(self, rule: str, *, field: str = "", found: str = "") -> None:
        super().__init__(rule, field, found)
        self.rule, self.field, self.found = rule, field, found

    def __reduce__(self) -> tuple[object, ...]:
        return _row_error, (self.rule, self.field, self.found)


def _row_error(rule: str, field: str, found: str) -> RowError:
    return RowError(rule, field=field, found=found)


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


@dataclass
class FaultReport:
    """Faults of all sources: how many there are of each rule, and the first few."""

    num_rows: int = 0
    num_bad_rows: int = 0
    has_bad_file: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    shown: dict[str, list[str]] = field(default_factory=dict)

    def add(self, fault: Fault) -> None:
        """Count a fault."""
        rule = fault.error.rule
        self.counts[rule] += 1
        self.num_bad_rows += fault.row > 0
        self.has_bad_file |= fault.row == 0
        lines = self.shown.setdefault(rule, [])
        if len(lines) < _SHOWN_PER_RULE:
            lines.append(str(fault))

    def summary(self) -> str:
        """The counts, and under each the first rows."""
        lines = [f"{self.num_bad_rows} of {self.num_rows} rows can not be used:"]
        for rule, count in self.counts.most_common():
            lines.append(f"  {rule} ({count})")
            lines += [f"    {text}" for text in self.shown[rule]]
            if count > len(self.shown[rule]):
                lines.append(f"    and {count - len(self.shown[rule])} more")
        return "\n".join(lines)

    def check(self, *, drop: bool, max_share: float) -> str | None:
        """None if all is well, the summary if bad rows may be dropped.

        Raises:
            DataError: if bad rows are refused, or too many to drop, or a whole file is bad.
        """
        if not self.counts:
            return None
        share = self.num_bad_rows / max(self.num_rows, 1)
        if drop and not self.has_bad_file and share <= max_share:
            return self.summary()
        if self.has_bad_file:
            cure = "Correct the file or its path."
        elif drop:
            cure = (
                f"That is a share of {share:.4f}, more than data.max_bad_rows={max_share:g} allows."
            )
        else:
            cure = "Correct the rows, or leave them out with data.bad_rows=drop"
            needed = math.ceil(share * 10_000) / 10_000
            cure += f" data.max_bad_rows={needed:.4f}." if share > max_share else "."
        raise DataError(f"{self.summary()}\n{cure}")
