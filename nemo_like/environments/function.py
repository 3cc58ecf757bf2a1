"""Rewards by a function, in processes with limits of time and memory."""

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

from nemo_like.config.environments import RewardWorkersConfig
from nemo_like.errors import ConfigError, DataError, WorkerError
from nemo_like.types import Rollout

_WORKER = "nemo_like.environments.reward_worker"
_START_S = 120.0
_END_S = 10.0
"""How long a process that was killed, or has closed its pipe, may take to be gone."""
_SHOWN = 200
"""Characters of a prompt and of an answer in a report."""

Say = Callable[[str], object]
"""Told what the user should know of, in a sentence."""


class FunctionEnvironment:
    """Rewards from a function of prompt, answer and what is expected, one sample at a time.

    The function runs in other processes. One that takes longer than `limits.timeout_s`, or dies, is
    replaced. A reward fails if the function raises, hangs, takes its process along, or returns
    anything but one finite number.

    Args:
        reward: Import path `package.module:function`.
        limits: How many processes, and what a reward may cost.
        key: Where the configuration of `limits` stands, for messages.
        failure_reward: The reward where one fails; None ends the run instead.
        say: Told of rewards that failed, once per call of `score`, where that does not end the run.
        options: Keyword arguments of the function.

    Raises:
        ConfigError: the function can not be imported, or not be called with three arguments.
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
    ):
        self._reward, self._key = reward, key
        self._failure_reward, self._say = failure_reward, say
        self._processes = [
            _Process(reward, limits, options or {}) for _ in range(limits.num_workers)
        ]
        self._idle: SimpleQueue[_Process] = SimpleQueue()
        for process in self._processes:
            process.start()
        for process in self._processes:
            problem = process.wait_ready()
            if problem:
                self.close()
                raise ConfigError(
                    f"{key}: {reward} can not be a reward: {problem}; expected a function of "
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
        rewards, failures = list[float](), list[str]()
        with ThreadPoolExecutor(len(self._processes)) as threads:
            waiting = [threads.submit(self._judge, rollout) for rollout in rollouts]
            try:
                for rollout, judgement in zip(rollouts, waiting, strict=True):
                    reward, problem = judgement.result()
                    if reward is None:
                        failures.append(self._report(rollout, problem))
                        reward = self._instead(failures[-1])
                    rewards.append(reward)
            finally:
                threads.shutdown(cancel_futures=True)
        if failures:
            self._say(
                f"{len(failures)} of {len(rollouts)} rewards failed, and are "
                f"{self._failure_reward:g} instead. The first: {failures[0]}"
            )
        return rewards

    def close(self) -> None:
        """End the processes; safe to call twice."""
        for process in self._processes:
            process.close()

    def _judge(self, rollout: Rollout) -> tuple[float | None, str]:
        process = self._idle.get()
        try:
            return process.ask([rollout.prompt.text, rollout.text, rollout.prompt.answer])
        finally:
            self._idle.put(process)

    def _report(self, rollout: Rollout, problem: str) -> str:
        return (
            f"{self._reward} {problem}, for the answer {rollout.text[:_SHOWN]!r} to the prompt "
            f"{rollout.prompt.text[:_SHOWN]!r}"
        )

    def _instead(self, report: str) -> float:
        if self._failure_reward is None:
            raise DataError(
                f"{report}. Mend the function, change {self._key}.timeout_s or {self._key}."
                "memory_gb, or set env.on_failure=score to go on with env.failure_reward"
            )
        return self._failure_reward


class _Process:
    """One process; `ask` starts it anew where it was lost."""

    def __init__(self, reward: str, limits: RewardWorkersConfig, options: Mapping[str, object]):
        self._reward = reward
        self._timeout_s = limits.timeout_s
        memory_bytes = int(limits.memory_gb * 2**30)
        self._command = [sys.executable, "-m", _WORKER, reward, str(limits.timeout_s)]
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

    def ask(self, sample: list[str]) -> tuple[float | None, str]:
        """The reward of prompt, answer and what is expected; or None, and what went wrong.

        Raises:
            WorkerError: it was lost, and does not start again.
        """
        if self._process is None or self._process.poll() is not None:
            self.close()
            self.start()
            problem = self.wait_ready()
            if problem:
                raise WorkerError(f"the process of the reward {self._reward}, once lost: {problem}")
        assert self._process and self._process.stdin
        deadline = time.monotonic() + self._timeout_s
        with suppress(BrokenPipeError):  # then it is dead, and there is no reply
            _send(self._process.stdin.fileno(), json.dumps(sample).encode() + b"\n", deadline)
        return self._reply(self._timeout_s)

    def _reply(self, timeout_s: float) -> tuple[float | None, str]:
        """What it says; if it does not in time, it is killed."""
        assert self._process and self._process.stdout
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        is_there = poll.poll(timeout_s * 1000)
        line = self._process.stdout.readline() if is_there else b""
        if line:
            reward, problem = json.loads(line)
            return reward, problem
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
