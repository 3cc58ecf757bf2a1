"""A process that computes rewards and replies, one JSON line at a time.

Run as `python -m nemo_like.environments.reward_worker FUNCTIONS TIMEOUT_S MEMORY_BYTES OPTIONS`.
Functions are a JSON object, from `reward` and perhaps `reply` to an import path
`module:function`; options are keyword arguments of the reward, as another. The first line on stdout
says whether the functions can be called. From then on each line on stdin is `[reward or reply,
prompt, answer, expected]`, and each line on stdout what that function made of it. Every line on
stdout is a pair: `[value, ""]`, or `[null, what went wrong]`.

The functions are given whatever a model wrote: here that costs at most the time and memory of one
process.
"""

from __future__ import annotations

import faulthandler
import importlib
import inspect
import json
import math
import os
import resource
import sys
import traceback
from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import Any

_LONGEST_MESSAGE = 500


Function = Callable[[str, str, str], Any]
"""Of prompt, answer, and what is expected."""


def load(path: str, options: dict[str, Any]) -> Function:
    """The function at `module:function`, which takes prompt, answer, and what is expected.

    Raises:
        Exception: whatever its import raises, or it takes something else.
    """
    module, _, name = path.partition(":")
    function = partial(getattr(importlib.import_module(module), name), **options)
    inspect.signature(function).bind("prompt", "answer", "expected")
    return function


def asked(role: str, function: Function, sample: list[str]) -> tuple[float | str | None, str]:
    """The value, or what went wrong."""
    try:
        value = function(*sample)
    except Exception as error:
        return None, f"raised {_told(error)}"
    if role == "reply":
        if value is None or isinstance(value, str):
            return value, ""
        return None, f"returned {value!r:.200}, expected a text or None"
    if isinstance(value, Real) and math.isfinite(value):
        return float(value), ""
    return None, f"returned {value!r:.200}, expected one finite number"


def _told(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    message = f"{type(error).__name__}: {error}"[:_LONGEST_MESSAGE]
    return f"{message} ({os.path.basename(frame.filename)}:{frame.lineno})"


def main(
    paths: dict[str, str], timeout_s: float, memory_bytes: int, options: dict[str, Any]
) -> None:
    """Answer lines until stdin ends."""
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    silence = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):  # what a function prints is no reply, what it reads no request
        os.dup2(silence, standard)

    def say(value: float | str | None, problem: str) -> None:
        replies.write(json.dumps([value, problem]) + "\n")
        replies.flush()

    try:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        functions = {
            role: load(path, options if role == "reward" else {}) for role, path in paths.items()
        }
    except Exception as error:
        say(None, _told(error))
        return
    say(None, "")
    for line in requests:
        # Who asked kills what takes too long; this is for when it is no longer there to do so.
        faulthandler.dump_traceback_later(2 * timeout_s, exit=True)
        role, *sample = json.loads(line)
        say(*asked(role, functions[role], sample))
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]))
