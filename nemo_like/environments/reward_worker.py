"""A process that computes rewards, one JSON line at a time.

Run as `python -m nemo_like.environments.reward_worker MODULE:FUNCTION TIMEOUT_S MEMORY_BYTES
OPTIONS`, where options are keyword arguments of the function, as a JSON object. The first line on
stdout says whether the function can be called. From then on each line on stdin is `[prompt, answer,
expected]`, and each line on stdout the reward. Every line on stdout is a pair: `[reward, ""]`,
or `[null, what went wrong]`.

The function is given whatever a model wrote: here that costs at most the time and memory of one
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


def load(path: str, options: dict[str, Any]) -> Callable[[str, str, str], Any]:
    """The function at `module:function`, which takes prompt, answer, and what is expected.

    Raises:
        Exception: whatever its import raises, or it takes something else.
    """
    module, _, name = path.partition(":")
    function = partial(getattr(importlib.import_module(module), name), **options)
    inspect.signature(function).bind("prompt", "answer", "expected")
    return function


def judged(function: Callable[[str, str, str], Any], sample: list[str]) -> tuple[float | None, str]:
    """The reward, or what went wrong."""
    try:
        reward = function(*sample)
        if isinstance(reward, Real) and math.isfinite(reward):
            return float(reward), ""
        return None, f"returned {reward!r:.200}, expected one finite number"
    except Exception as error:
        return None, f"raised {_told(error)}"


def _told(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    message = f"{type(error).__name__}: {error}"[:_LONGEST_MESSAGE]
    return f"{message} ({os.path.basename(frame.filename)}:{frame.lineno})"


def main(path: str, timeout_s: float, memory_bytes: int, options: dict[str, Any]) -> None:
    """Answer lines until stdin ends."""
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    silence = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):  # what a function prints is no reply, what it reads no request
        os.dup2(silence, standard)

    def reply(reward: float | None, problem: str) -> None:
        replies.write(json.dumps([reward, problem]) + "\n")
        replies.flush()

    try:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        function = load(path, options)
    except Exception as error:
        reply(None, _told(error))
        return
    reply(0.0, "")
    for line in requests:
        # Who asked kills what takes too long; this is for when it is no longer there to do so.
        faulthandler.dump_traceback_later(2 * timeout_s, exit=True)
        reply(*judged(function, json.loads(line)))
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]))
