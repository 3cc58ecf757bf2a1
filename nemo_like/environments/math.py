"""Judges mathematical answers with the math-verify package, in processes that may be killed."""

from __future__ import annotations

import json
import select
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from nemo_like.errors import WorkerError
from nemo_like.types import Rollout

_MEMORY_BYTES = 4 * 1024**3
_START_S = 120.0


class _Verifier:
    """One verifier process, started when first needed, and anew after it had to be killed."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None

    def is_equal(self, expected: str, answer: str) -> bool:
        """Whether the answers are equal; False if that can not be told in time and memory."""
        if self._process is None:
            self._start()
        reply = self._ask(expected, answer, self._timeout_s)
        if reply is None:
            self.close()
        return bool(reply)

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        # The parsers' own time limits end most long work without the loss of a process.
        soft_s = max(1, int(self._timeout_s) // 3)
        module = "nemo_like.environments.math_verifier"
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, str(soft_s), str(_MEMORY_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        if not self._ask("2", "2", _START_S):
            self.close()
            raise WorkerError(
                "the math verifier does not start: expected 2 = 2 from "
                f"`{sys.executable} -m {module} 2 {_MEMORY_BYTES}`; is math-verify installed?"
            )

    def _ask(self, expected: str, answer: str, timeout_s: float) -> bool | None:
        """The process's verdict, or None if it died or takes too long."""
        assert self._process and self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps([expected, answer]).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        line = self._process.stdout.readline() if ready else b""
        return bool(json.loads(line)) if line else None


class MathEnvironment:
    r"""Reward 1 where an answer equals the expected one as a mathematical object, else 0.

    What is expected may be a GSM8K solution that ends in `#### 72`, hold a `\boxed{}`, or be a bare
    expression. An answer that can not be read, or that takes more than `timeout_s` or 4 GiB to
    compare, scores 0.
    """

    def __init__(self, *, num_workers: int = 1, timeout_s: float = 6.0) -> None:
        self._verifiers = [_Verifier(timeout_s) for _ in range(num_workers)]

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """One reward per rollout."""
        num = len(self._verifiers)
        rewards = [0.0] * len(rollouts)

        def score_share(worker: int) -> None:
            for i in range(worker, len(rollouts), num):
                rollout = rollouts[i]
                equal = self._verifiers[worker].is_equal(rollout.prompt.answer, rollout.text)
                rewards[i] = float(equal)

        with ThreadPoolExecutor(num) as pool:
            list(pool.map(score_share, range(num)))
        return rewards

    def close(self) -> None:
        """End the processes; safe to call twice."""
        for verifier in self._verifiers:
            verifier.close()
