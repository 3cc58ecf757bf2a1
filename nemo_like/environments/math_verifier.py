"""A process that compares mathematical answers, one JSON line at a time.

Run as `python -m nemo_like.environments.math_verifier TIMEOUT_S MEMORY_BYTES`. Each line on stdin
is `[expected, answer]`; each line on stdout is `true` or `false`. The parsers are given whatever a
model wrote: in a process of its own that costs at most its time and memory. No code is executed:
only digits and operators reach the evaluator of plain expressions; LaTeX goes through a grammar.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys

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


def is_equal(expected: str, answer: str, timeout_s: int) -> bool:
    """Whether both are the same mathematical object; False if either can not be read."""
    from math_verify import parse, verify

    gold = parse(expected_answer(expected), parsing_timeout=timeout_s)
    given = parse(final_answer(answer[-_LONGEST:]), parsing_timeout=timeout_s)
    return bool(gold and given and verify(gold, given, timeout_seconds=timeout_s))


def main(timeout_s: int, memory_bytes: int) -> None:
    """Answer lines until stdin ends."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, sys.stdout.fileno())  # what a library prints is no answer
    os.dup2(silence, sys.stderr.fileno())
    for line in sys.stdin:
        try:
            expected, answer = json.loads(line)
            equal = is_equal(expected, answer, timeout_s)
        except Exception:  # whatever the parsers make of it, it is not the right answer
            equal = False
        answers.write(json.dumps(equal) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
