"""Whether two mathematical answers are equal, by the math-verify package.

No code is executed: only digits and operators reach the evaluator of plain expressions; LaTeX goes
through a grammar. What a model wrote may still keep the parsers busy for ever, so this runs in
processes with limits (`function.py`).
"""

from __future__ import annotations

import re

from math_verify import parse, verify

_LONGEST = 10_000  # an answer stands at the end
_AFTER_HASHES = re.compile(r"####\s*(.+?)\s*$", re.MULTILINE)


def final_answer(text: str) -> str:
    r"""The text, or in a box what stands after its last `####`, as in GSM8K."""
    hashed = _AFTER_HASHES.findall(text)
    if hashed:
        return rf"$\boxed{{{hashed[-1].replace(',', '').replace('$', '')}}}$"
    return text


def expected_answer(text: str) -> str:
    r"""The same for what is expected; a bare expression is boxed."""
    text = final_answer(text)
    return text if r"\boxed" in text else rf"$\boxed{{{text.strip().strip('$')}}}$"


def reward(prompt: str, answer: str, expected: str, *, parser_s: int) -> float:
    """1 if both are the same mathematical object; 0 if not, or if one can not be read.

    Each parser, and the comparison, has `parser_s` seconds: that ends most long work without the
    loss of a process.
    """
    try:
        gold = parse(expected_answer(expected), parsing_timeout=parser_s)
        given = parse(final_answer(answer[-_LONGEST:]), parsing_timeout=parser_s)
        return float(bool(gold and given and verify(gold, given, timeout_seconds=parser_s)))
    except Exception:  # whatever the parsers make of it, it is not the right answer
        return 0.0
