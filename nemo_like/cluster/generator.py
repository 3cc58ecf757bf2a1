"""Rollout engines in Ray workers: a `Generator` that starts in the background."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from nemo_like.cluster.group import CHUNK_BYTES, WorkerGroup
from nemo_like.cluster.policy import RemotePolicy
from nemo_like.cluster.wire import chunked, to_wire
from nemo_like.interfaces import Policy
from nemo_like.types import Prompt, Rollout, SamplingParams


class RemoteGenerator:
    """A `Generator` over engines, one per worker; each has all weights and a share of the prompts.

    An engine has `load_weights(tensors, version=...)`, where `tensors` iterates over whole named
    tensors, `generate(prompts, sampling)`, and `close()`.
    """

    def __init__(self, group: WorkerGroup, *, num_engines: int = 1):
        self._group = group
        self._num_engines = num_engines
        self._version = 0
        group.start()

    def sync(self, policy: Policy) -> None:
        """Streams the policy's weights of now into every engine, in bounded chunks."""
        self._group.wait_ready()
        self._version += 1
        chunks = (
            policy.export_chunks() if isinstance(policy, RemotePolicy) else self._packed(policy)
        )
        self._group.feed("load_weights", chunks, version=self._version)

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """One rollout per prompt, in the order of the prompts.

        Samples of one prompt go to the same engine, which tells their random streams apart.
        """
        places = {index: i for i, index in enumerate(dict.fromkeys(p.index for p in prompts))}
        rows_of_engine: list[list[int]] = [[] for _ in range(self._num_engines)]
        for row, prompt in enumerate(prompts):
            rows_of_engine[places[prompt.index] % self._num_engines].append(row)
        outputs = self._group.call_each(
            "generate", [([prompts[row] for row in rows], sampling) for rows in rows_of_engine]
        )
        rollout_of_row = {
            row: rollout
            for rows, rollouts in zip(rows_of_engine, outputs, strict=True)
            for row, rollout in zip(rows, rollouts, strict=True)
        }
        return [rollout_of_row[row] for row in range(len(prompts))]

    def close(self) -> None:
        """Ends the engines; safe to call twice."""
        self._group.close()

    def _packed(self, policy: Policy) -> Iterator[Any]:
        for tensors in chunked(policy.export_weights(), CHUNK_BYTES):
            yield self._group.put(to_wire(tensors))
