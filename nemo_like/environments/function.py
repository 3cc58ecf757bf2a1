"""Rewards and replies by functions, in processes with limits of time and memory."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Literal

from nemo_like.config.environments import RewardWorkersConfig
from nemo_like.errors import ConfigError, DataError, WorkerError
from nemo_like.interfaces import Environment
from nemo_like.types import Rollout

_WORKER = "nemo_like.environments.reward_worker"
_START_S = 120.0
_END_S = 10.0
"""How long a process that was killed, or has closed its pipe, may take to be gone."""
_SHOWN = 200
"""Characters of a prompt and of an answer in a report."""

Role = Literal["reward", "reply"]
"""What a function is for."""
Say = Callable[[str], object]
"""Told what the user should know of, in a sentence."""


class FunctionEnvironment(Environment):
    """Rewards, and perhaps replies, from functions of prompt, answer and what is expected.

    They are called with one sample at a time, in other processes. One that takes longer than
    `limits.timeout_s`, or dies, is replaced. A reward fails if its function raises, hangs, takes
    its process along, or returns anything but one finite number; a reply, if its function does, or
    returns anything but a text or None.

    Args:
        reward: Import path `package.module:function`.
        limits: How many processes, and what a reward or a reply may cost.
        key: Where the configuration of `limits` stands, for messages.
        failure_reward: The reward where one fails, and the leave to go on without a reply where
            that fails; None ends the run instead.
        say: Told of what failed, once per call, where that does not end the run.
        options: Keyword arguments of the reward.
        reply: Import path of what replies; None is an environment of single answers.

    Raises:
        ConfigError: a function can not be imported, or not be called with three arguments.
    """

    def __init__(
        self,
        reward: str,
        limits: RewardWorkersConfig,
        *,
        key: str,
        failure_reward: float | None,
        say: Say,
        options: Mapping[str, object] | None = None,
        reply: str | None = None,
    ):
        self._paths: dict[Role, str] = {"reward": reward}
        if reply is not None:
            self._paths["reply"] = reply
        self._key, self._failure_reward, self._say = key, failure_reward, say
        self._processes = [
            _Process(self._paths, limits, options or {}) for _ in range(limits.num_workers)
        ]
        self._idle: SimpleQueue[_Process] = SimpleQueue()
        for process in self._processes:
            process.start()
        for process in self._processes:
            problem = process.wait_ready()
            if problem:
                self.close()
                roles = " and ".join(f"{path} can not be a {r}" for r, path in self._paths.items())
                raise ConfigError(
                    f"{key}: {roles}: {problem}; expected a function of "
                    f"prompt, answer and what is expected, whose import takes less than {key}."
                    f"memory_gb={limits.memory_gb:g} and {_START_S:g} s, in a module that is "
                    "installed or in the folder that the run is started from"
                )
            self._idle.put(process)

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """One reward per rollout, in order.

        Raises:
            DataError: a reward failed, and that ends the run.
            WorkerError: a process that had to be replaced does not start again.
        """
        if self._failure_reward is None:
            return self._ask("reward", rollouts, None, "")
        consequence = f"rewards failed, and are {self._failure_reward:g} instead"
        return self._ask("reward", rollouts, self._failure_reward, consequence)

    def reply(self, rollouts: Sequence[Rollout]) -> list[str | None]:
        """What each rollout goes on with, in order; None where it is complete.

        Raises:
            DataError: a reply failed, and that ends the run.
            WorkerError: as for `score`.
        """
        if "reply" not in self._paths:
            return super().reply(rollouts)
        return self._ask(
            "reply", rollouts, None, "replies failed, and those rollouts end without them"
        )

    def _ask(
        self, role: Role, rollouts: Sequence[Rollout], instead: Any, consequence: str
    ) -> list[Any]:
        """What the function of this role says to each, or `instead` where it fails."""
        values, failures = list[Any](), list[str]()
        with ThreadPoolExecutor(len(self._processes)) as threads:
            waiting = [threads.submit(self._ask_one, role, rollout) for rollout in rollouts]
            try:
                for rollout, answer in zip(rollouts, waiting, strict=True):
                    value, problem = answer.result()
                    if problem:
                        failures.append(self._report(role, rollout, problem))
                        value = instead
                    values.append(value)
            finally:
                threads.shutdown(cancel_futures=True)
        if failures:
            self._say(f"{len(failures)} of {len(rollouts)} {consequence}. The first: {failures[0]}")
        return values

    def close(self) -> None:
        """End the processes; safe to call twice."""
        for process in self._processes:
            process.close()

    def _ask_one(self, role: Role, rollout: Rollout) -> tuple[Any, str]:
        process = self._idle.get()
        try:
            return process.ask(role, [rollout.prompt.text, rollout.text, rollout.prompt.answer])
        finally:
            self._idle.put(process)

    def _report(self, role: Role, rollout: Rollout, problem: str) -> str:
        """What went wrong with which sample.

        Raises:
            DataError: with just that, if a failure ends the run.
        """
        report = (
            f"{self._paths[role]} {problem}, for the answer {rollout.text[:_SHOWN]!r} to the "
            f"prompt {rollout.prompt.text[:_SHOWN]!r}"
        )
        if self._failure_reward is None:
            raise DataError(
                f"{report}. Mend the function, change {self._key}.timeout_s or {self._key}."
                "memory_gb, or set env.on_failure=score to go on with env.failure_reward"
                + (" and without the reply" if role == "reply" else "")
            )
        return report


class _Process:
    """One process; `ask` starts it anew where it was lost."""

    def __init__(
        self,
        paths: Mapping[Role, str],
        limits: RewardWorkersConfig,
        options: Mapping[str, object],
    ):
        self._functions = " and ".join(paths.values())
        self._timeout_s = limits.timeout_s
        memory_bytes = int(limits.memory_gb * 2**30)
        self._command = [sys.executable, "-m", _WORKER, json.dumps(paths), str(limits.timeout_s)]
        self._command += [str(memory_bytes), json.dumps(dict(options))]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin to start it."""
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Ctrl-C is for the run to handle; and what the function starts can be ended with it.
            start_new_session=True,
        )

    def wait_ready(self) -> str:
        """What keeps it from starting, or nothing."""
        return self._reply(_START_S)[1]

    def ask(self, role: Role, sample: list[str]) -> tuple[Any, str]:
        """What that function makes of prompt, answer and what is expected; or what went wrong.

        Raises:
            WorkerError: it was lost, and does not start again.
        """
        if self._process is None or self._process.poll() is not None:
            self.close()
            self.start()
            problem = self.wait_ready()
            if problem:
                raise WorkerError(f"the process of {self._functions}, once lost: {problem}")
        assert self._process and self._process.stdin
        deadline = time.monotonic() + self._timeout_s
        with suppress(BrokenPipeError):  # then it is dead, and there is no reply
            request = json.dumps([role, *sample]).encode() + b"\n"
            _send(self._process.stdin.fileno(), request, deadline)
        return self._reply(self._timeout_s)

    def _reply(self, timeout_s: float) -> tuple[Any, str]:
        """What it says; if it does not in time, it is killed."""
        assert self._process and self._process.stdout
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        is_there = poll.poll(timeout_s * 1000)
        line = self._process.stdout.readline() if is_there else b""
        if line:
            value, problem = json.loads(line)
            return value, problem
        if is_there:
            problem = f"took its process along ({self._exit_status()})"
        else:
            problem = f"took more than {timeout_s:g} s"
        self.close()
        return None, problem

    def _exit_status(self) -> str:
        assert self._process
        try:
            return f"exit status {self._process.wait(_END_S)}"
        except subprocess.TimeoutExpired:
            return "it closed its pipe, and lives on"

    def close(self) -> None:
        """End it, and what it started."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for pipe in (process.stdin, process.stdout):
            # Not read to its end: what left the process group may hold the other end open.
            assert pipe
            pipe.close()
        with suppress(subprocess.TimeoutExpired):  # the kernel has it, and will end it
            process.wait(_END_S)


def _send(pipe: int, data: bytes, deadline: float) -> None:
    """Write to a pipe; what a process has not taken by the deadline it never gets."""
    os.set_blocking(pipe, False)
    poll = select.poll()
    poll.register(pipe, select.POLLOUT)
    while data and poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        data = data[os.write(pipe, data) :]
