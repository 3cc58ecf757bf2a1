"""Bin packing: sequences into rows of at most so many tokens.

All functions take lengths, none above the capacity, and return the indices of each row; each index
once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

Bins = list[list[int]]


class _Remaining:
    """Sequences not yet packed, asked for the longest or shortest in a range."""

    def __init__(self, lengths: Sequence[int]) -> None:
        # Of equally long ones the first is the longest.
        self._sorted = sorted((length, -index) for index, length in enumerate(lengths))

    def __bool__(self) -> bool:
        return bool(self._sorted)

    def pop_longest(self, above: int, up_to: int) -> tuple[int, int] | None:
        """Index and length of the longest sequence with `above < length <= up_to`, taken out."""
        place = bisect_right(self._sorted, (up_to, 0)) - 1
        if place < 0 or self._sorted[place][0] <= above:
            return None
        length, index = self._sorted.pop(place)
        return -index, length

    def pop_shortest_pair(self, above: int, up_to: int) -> list[int]:
        """The shortest sequence above `above`, and the longest that fits beside it; or nothing."""
        place = bisect_right(self._sorted, (above, 0))
        pair = [length for length, _ in self._sorted[place : place + 2]]
        if len(pair) < 2 or sum(pair) > up_to:
            return []
        taken = (self.pop_longest(above, most) for most in (pair[0], up_to - pair[0]))
        return [found[0] for found in taken if found]


def concatenative(lengths: Sequence[int], capacity: int) -> Bins:
    """Rows in the order of the sequences; a new one begins where the next does not fit."""
    bins: Bins = []
    gap = 0
    for index, length in enumerate(lengths):
        if not bins or length > gap:
            bins.append([])
            gap = capacity
        bins[-1].append(index)
        gap -= length
    return bins


def _fill(rows: Bins, lengths: Sequence[int], capacity: int, remaining: _Remaining) -> Bins:
    """First-fit decreasing of what remains, into the rows that exist and then new ones.

    To give each row in turn the longest sequences that fit it is the same as to give each sequence,
    longest first, to the first row that it fits in, and needs no search over rows.
    """
    existing = iter(rows)
    filled: Bins = []
    while (row := next(existing, None)) is not None or remaining:
        row = row or []
        gap = capacity - sum(lengths[i] for i in row)
        while found := remaining.pop_longest(0, gap):
            row.append(found[0])
            gap -= found[1]
        filled.append(row)
    return filled


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> Bins:
    """Rows by first-fit decreasing: longest first, each into the first row that it fits in.

    Source: D. S. Johnson, "Fast algorithms for bin packing", J. Comput. Syst. Sci. 8, 272-314
    (1974).
    """
    return _fill([], lengths, capacity, _Remaining(lengths))


def modified_first_fit_decreasing(lengths: Sequence[int], capacity: int) -> Bins:
    """Rows by MFFD, never more than 71/60 of the fewest possible (plus a constant).

    Sequences over half the capacity get a row each. From the fullest of these on, each takes the
    longest sequence of a third to a half that fits; from the roomiest back, those that got none
    take two of a sixth to a third. Then first-fit decreasing.

    Source: D. S. Johnson, M. R. Garey, "A 71/60 theorem for bin packing", J. Complexity 1, 65-106
    (1985).
    """
    remaining = _Remaining(lengths)
    rows: Bins = []
    while found := remaining.pop_longest(capacity // 2, capacity):
        rows.append([found[0]])
    for row in rows:
        gap = capacity - lengths[row[0]]
        if medium := remaining.pop_longest(capacity // 3, gap):
            row.append(medium[0])
    for row in reversed(rows):
        if len(row) == 1:
            row += remaining.pop_shortest_pair(capacity // 6, capacity - lengths[row[0]])
    return _fill(rows, lengths, capacity, remaining)


ALGORITHMS: dict[str, Callable[[Sequence[int], int], Bins]] = {
    "modified_first_fit_decreasing": modified_first_fit_decreasing,
    "first_fit_decreasing": first_fit_decreasing,
    "concatenative": concatenative,
}
"""By the names of `policy.sequence_packing.algorithm`."""
