"""An optimizer step of one rank, taken without numbers, memory or other ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nemo_like.backends.factory import BackendFactory
from nemo_like.backends.settings import BackendSettings
from nemo_like.config.policy import DTensorConfig, PolicyConfig
from nemo_like.data.batching import Batching, plan
from nemo_like.interfaces import Loss
from nemo_like.losses.nll import NLL
from nemo_like.optim import muon
from nemo_like.plan.numberless import rank_of
from nemo_like.plan.watch import GRADIENTS, Message, Watch
from nemo_like.run.model_config import hf_config_of
from nemo_like.types import Example, MicroBatch, Shard, TrainBatch

WEIGHTS, MASTERS, STATE = "weights", "fp32 masters", "optimizer state"
ANY_SCHEDULE = 10**9
"""A run so long that every warm-up and decay has room: what a step takes does not depend on it."""
K = TypeVar("K")


@dataclass(frozen=True)
class Work:
    """The micro-batches of a rank's step: how many, and the rows of the heaviest."""

    num_micro_batches: int
    rows: tuple[int, ...]
    """How many of the longest sequences are in each row."""
    sequence: int
    """Tokens of each."""
    row_tokens: int
    """Tokens of a row, padding included."""

    @classmethod
    def of(cls, policy: PolicyConfig, num_data_parallel: int) -> Work:
        """What the batching makes of a batch of sequences that are all as long as can be."""
        length = policy.max_total_sequence_length
        lengths = [length] * policy.train_global_batch_size
        own = plan(lengths, num_data_parallel, Batching.for_training(policy))[0]
        heaviest = max(own, key=lambda micro_batch: sum(map(len, micro_batch)))
        rows = tuple(len(row) for row in heaviest)
        multiple = policy.sequence_divisor
        width = -(-max(rows, default=1) * length // multiple) * multiple
        return cls(len(own), rows, length, width)

    def share(self, number: int) -> Shard:
        """As many of the heaviest micro-batch."""
        example = Example((0,) * self.sequence, (False, *[True] * (self.sequence - 1)))
        per_micro_batch = sum(self.rows)
        micro_batches = []
        for start in range(0, number * per_micro_batch, per_micro_batch):
            rows: list[tuple[int, ...]] = []
            for count in self.rows:
                first = start + sum(map(len, rows))
                rows.append(tuple(range(first, first + count)))
            micro_batches.append(tuple(rows))
        batch = TrainBatch.of([example] * (number * per_micro_batch))
        return Shard(batch, tuple[MicroBatch, ...](micro_batches))


@dataclass(frozen=True)
class Rehearsed:
    """What a rank's step needs: bytes held and sent, and operations, each by what it is for.

    `peaks` are the fullest moments of each part of the step, `after_forward` is what is held when
    the fullest forward pass has ended.
    """

    peaks: Mapping[str, Mapping[str, float]]
    after_forward: Mapping[str, float]
    sent: Mapping[Message, float]
    flops: Mapping[str, float]

    @property
    def peak(self) -> Mapping[str, float]:
        """The fullest moment of the whole step, by kind."""
        return max(self.peaks.values(), key=lambda kinds: sum(kinds.values()))

    def towards(self, other: Rehearsed, factor: float) -> Rehearsed:
        """What is `factor` times as far from this one as `other`: all of it is linear."""
        parts = [part for part in self.peaks if part in other.peaks]
        return Rehearsed(
            {part: _towards(self.peaks[part], other.peaks[part], factor) for part in parts},
            _towards(self.after_forward, other.after_forward, factor),
            _towards(self.sent, other.sent, factor),
            _towards(self.flops, other.flops, factor),
        )


def _towards(one: Mapping[K, float], other: Mapping[K, float], factor: float) -> dict[K, float]:
    keys = {**one, **other}  # in one order in every process, as tables show them
    return {k: (a := one.get(k, 0)) + factor * (other.get(k, 0) - a) for k in keys}


def rehearse(
    policy: PolicyConfig, world_size: int, rank: int, work: Work, *, layers: int, stages_behind: int
) -> Rehearsed:
    """What a step of this rank needs, which has so many layers, with so many stages behind it.

    All layers of a model are alike, and so are micro-batches. So a few of them are run, and what
    one more takes is counted as often as there are more. `stages_behind` are why a stage holds the
    activations of several micro-batches at once.
    """
    few = _few_layers(policy, layers)
    runs = [_runs(policy, world_size, rank, work, layers=n) for n in few]
    factor = (layers - few[0]) / (few[1] - few[0]) if len(few) == 2 else 0
    one, *more = (a.towards(b, factor) for a, b in zip(runs[0], runs[-1], strict=True))
    if not more:
        return one
    (two,) = more
    whole = one.towards(two, work.num_micro_batches - 1)
    under_way = min(work.num_micro_batches, stages_behind + 1)
    held = one.towards(two, max(1, under_way - 1))
    return Rehearsed(held.peaks, held.after_forward, whole.sent, whole.flops)


def _few_layers(policy: PolicyConfig, layers: int) -> tuple[int, ...]:
    """How many layers to run a rank with: two numbers, or the real one."""
    hf_config = hf_config_of(policy)
    mixed = getattr(hf_config, "mlp_only_layers", None) or (
        getattr(hf_config, "decoder_sparse_step", 1) != 1
    )
    # FSDP2 gathers a layer ahead, and with two layers a backward pass has none to gather.
    first = 3 if isinstance(policy.backend, DTensorConfig) else 1
    return (layers,) if layers <= first + 1 or mixed else (first, first + 1)


def _runs(
    policy: PolicyConfig, world_size: int, rank: int, work: Work, *, layers: int
) -> list[Rehearsed]:
    """The same rank with one micro-batch, and with two if there are."""
    stages = 1
    overrides = {**policy.hf_config_overrides}
    small: dict[str, Any] = {"hf_config_overrides": overrides, "init": "random"}
    if not isinstance(policy.backend, DTensorConfig):
        stages = policy.backend.pipeline_model_parallel_size
        even = {f"num_layers_in_{end}_pipeline_stage": None for end in ("first", "last")}
        small["megatron_cfg"] = policy.megatron_cfg.model_copy(update=even)
    overrides["num_hidden_layers"] = stages * layers
    policy = policy.model_copy(update=small)
    counts = range(1, min(2, work.num_micro_batches) + 1)
    with rank_of(world_size, rank) as mode, ExitStack() as undo:
        backend = BackendFactory(policy, BackendSettings(seed=0, loads_weights=False))()
        undo.enter_context(closing(backend))
        undo.enter_context(routes(policy))
        # The plan knows what it costs; on a CPU it is many small operations.
        undo.enter_context(patch.object(muon, "polar", lambda X, **_: torch.empty_like(X)))
        mode.stage_shape = _stage_shape(policy, backend, work)
        backend.begin(ANY_SCHEDULE)
        return [
            observe(policy, backend, work.share(n), NLL(), numberless=mode.fake) for n in counts
        ]


def routes(policy: PolicyConfig) -> AbstractContextManager[None]:
    """Inside, all experts get as many tokens as each other, where there can be experts."""
    if isinstance(policy.backend, DTensorConfig):
        return nullcontext()
    from nemo_like.backends.megatron.even_routes import even_routes

    return even_routes()


def _stage_shape(policy: PolicyConfig, backend: Any, work: Work) -> tuple[int, ...]:
    """The hidden states between two stages of a pipeline."""
    if isinstance(policy.backend, DTensorConfig):
        return ()
    config = policy.backend
    parts = config.tensor_model_parallel_size if config.sequence_parallel else 1
    tokens = work.row_tokens // (parts * config.context_parallel_size)
    return tokens, len(work.rows), int(backend.model.module.config.hidden_size)


def observe(
    policy: PolicyConfig,
    backend: Any,
    share: Shard,
    loss: Loss,
    *,
    numberless: FakeTensorMode | None = None,
) -> Rehearsed:
    """Take one step of a backend that has begun, and tell what it took."""
    is_fsdp = isinstance(policy.backend, DTensorConfig)
    stage: Any = backend.model if is_fsdp else backend.model.module
    vocab = hf_config_of(policy).vocab_size
    tp = policy.backend.model_parallel_size if is_fsdp else backend.parallel.size("tp")
    watch = Watch(
        numberless=numberless, vocab_sizes={vocab // tp, -(-vocab // tp)}, is_fsdp=is_fsdp
    )
    parameters = [p for group in backend.optimizer.param_groups for p in group["params"]]

    def forward_ended(*_: Any) -> None:
        watch.name(GRADIENTS, [p.grad for p in parameters])
        watch.forward_ended()

    def optimizer_begins(*_: Any) -> None:
        watch.name(GRADIENTS, [p.grad for p in parameters])
        watch.optimizer_begins()

    hooks: Sequence[Any] = (
        stage.register_forward_hook(forward_ended),
        backend.optimizer.register_step_pre_hook(optimizer_begins),
    )
    try:
        with watch:
            watch.name(MASTERS, parameters)
            watch.name(WEIGHTS, [*stage.parameters(), *stage.buffers()])
            watch.name(GRADIENTS, [getattr(p, "main_grad", None) for p in stage.parameters()])
            states = backend.optimizer.state.values()
            watch.name(STATE, [tensor for state in states for tensor in state.values()])
            backend.train_step(share, loss)
    finally:
        for hook in hooks:
            hook.remove()
    return Rehearsed(
        {part: usage.peak for part, usage in watch.usage.items()},
        watch.after_forward,
        Counter(watch.sent),
        {part: usage.flops for part, usage in watch.usage.items()},
    )
