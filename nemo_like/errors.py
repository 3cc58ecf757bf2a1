"""Every error that a run can end with, and the exit code it ends with.

A message says what was found, what was expected, and which key to change. All of these survive
pickling, because workers raise them in other processes.
"""

from __future__ import annotations

EXIT_INTERRUPTED = 75
"""`EX_TEMPFAIL`, start it again: a signal or a time limit ended the run, after saving."""


class NemoLikeError(Exception):
    """The root of the tree; `exit_code` is what the process returns if nothing else handles it."""

    exit_code = 1


class ConfigError(NemoLikeError, ValueError):
    """The configuration is wrong: found before anything starts."""

    exit_code = 2


class DataError(NemoLikeError, ValueError):
    """The data are wrong: found before the first step."""

    exit_code = 3


class CheckpointError(NemoLikeError):
    """A checkpoint is damaged, incomplete, or belongs to another run."""

    exit_code = 4


class NoSignalError(NemoLikeError):
    """There is nothing to learn from: the batch holds no token with a gradient."""

    exit_code = 5


class WorkerError(NemoLikeError, RuntimeError):
    """A worker process failed or died; the message names actor, rank, node and last phase."""

    exit_code = 6


class NonFiniteError(NemoLikeError):
    """A loss or gradient is NaN or infinite; the weights were not touched."""

    exit_code = 7


class MismatchError(NemoLikeError):
    """The rollout engine gives tokens other probabilities than the policy in training.

    Found before a step on these tokens is taken; a probe of rollouts drawn ahead may find it after.
    """

    exit_code = 8
