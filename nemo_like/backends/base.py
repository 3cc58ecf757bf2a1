"""What both backends share: one optimizer step on one rank, from rows to weights."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_like.backends import collectives
from nemo_like.backends.agreement import refuse_mismatch
from nemo_like.backends.settings import BackendSettings
from nemo_like.backends.stored import StoredState
from nemo_like.config.policy import PolicyConfig
from nemo_like.errors import MismatchError, NonFiniteError, NoSignalError
from nemo_like.interfaces import Loss
from nemo_like.observability.metrics import reduce
from nemo_like.optim.combined import CombinedOptimizer
from nemo_like.optim.norm import clip_gradients, local
from nemo_like.optim.outlook import outlook
from nemo_like.optim.routing import Routing
from nemo_like.optim.schedule import Schedule
from nemo_like.types import (
    Metric,
    Metrics,
    MicroBatch,
    PolicyFacts,
    Shard,
    StepStats,
    TrainBatch,
)

LossOf = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Part:
    """The sequences of one micro-batch, and how they share rows; `batch` is on the CPU."""

    batch: TrainBatch
    micro_batch: MicroBatch
    sequences: list[int]


class RankBackend(StoredState):
    """One rank of a model in training.

    A subclass says how sequences become log-probabilities and gradients (`_forward`, `_backward`),
    and how weights leave (`export_weights`); everything else about a step is here, once for all
    backends. `leaving` is what ends with it: the process groups that it made.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: CombinedOptimizer,
        routing: Routing,
        policy: PolicyConfig,
        settings: BackendSettings,
        device: torch.device,
        leaving: ExitStack,
    ) -> None:
        super().__init__(optimizer=optimizer, routing=routing, settings=settings)
        self.model = model
        self.policy = policy
        self._schedule: Schedule | None = None
        self.device = device
        self._leaving = leaving
        self._reference: dict[str, Tensor] | None = None
        if settings.keep_reference:
            self._keep_reference()
        collectives.limit(settings.collective_timeout_s)

    @abstractmethod
    def _forward(self, parts: Sequence[Part]) -> list[Tensor]:
        """Log-probabilities aligned with the tokens of each part, 0 where there is no target.

        Without gradient. Shapes: [N] each.
        """

    @abstractmethod
    def _backward(self, parts: Sequence[Part], loss_of: LossOf) -> None:
        """Give each parameter of the optimizer the gradient of the whole global loss.

        `loss_of` takes the number of a part and its log-probabilities with gradient, aligned with
        its tokens, and gives the part's share of the loss.
        """

    @abstractmethod
    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors by Hugging Face name; a collective."""

    def _owners(self) -> list[dict[str, Any]]:
        """See `PolicyFacts`."""
        return self.routing.to_json()

    @abstractmethod
    def _model_config(self) -> dict[str, Any]:
        """The content of the model's config.json."""

    @torch.no_grad()
    def logprobs(self, shard: Shard, reference: bool = False) -> Tensor:
        """Log-probabilities (nats, fp32) aligned with the shard's tokens; 0 without a target."""
        self.model.eval()
        result, parts = torch.zeros(len(shard.batch.token_ids_N)), parts_of(shard)
        with self._reference_in_place() if reference else nullcontext():
            for part, logprobs_N in zip(parts, self._forward(parts), strict=True):
                result[shard.batch.token_index(part.sequences)] = logprobs_N.float().cpu()
        return result

    @contextmanager
    def _reference_in_place(self) -> Iterator[None]:
        """Inside, the model has the weights that it began with; then its own again, to the bit."""
        assert self._reference is not None, "BackendSettings.keep_reference was not set"
        weights = {name: local(weight) for name, weight in self._weights().items()}
        own = {name: weight.to("cpu", copy=True) for name, weight in weights.items()}
        try:
            for name, weight in weights.items():
                weight.copy_(self._reference[name])
            self._weights_changed()
            yield
        finally:
            for name, weight in weights.items():
                weight.copy_(own[name])
            self._weights_changed()

    def _keep_reference(self) -> None:
        """Put this rank's part of the weights of now aside, in host memory."""
        weights = self._weights().items()
        self._reference = {name: local(weight).to("cpu", copy=True) for name, weight in weights}

    def train_step(self, shard: Shard, loss: Loss, *, step: int | None = None) -> StepStats:
        """Forward, backward, clip, optimizer and schedule: one whole update.

        `step` is the run's step that it belongs to, from 1, by which the schedules go; None is the
        one after the last.

        Raises:
            NoSignalError: the global batch has no token to learn from.
            NonFiniteError: a loss or gradient is not finite and the budget for skipping is used up;
                the weights and the optimizer's state are those of before the step.
            MismatchError: engine and policy disagree on the tokens; weights and state as above.
        """
        assert self._schedule is not None, "begin() comes first"
        step = self.step + 1 if step is None else step
        self._refuse_no_signal(step, shard.batch)
        phases: dict[str, float] = {}
        tick = step - 1
        with self._booked(phases, "forward_backward"):
            shares, metrics = self._gradients(shard, loss)
        with self._booked(phases, "optimizer"):
            grad_norm = clip_gradients(
                self.optimizer.param_groups, self.policy.active_max_grad_norm
            )
            values = torch.stack(shares).tolist() if shares else []
            finite = self._is_finite(values, grad_norm)
            self.optimizer.watch = finite and self._is_watched(step)
            if finite:
                self._refuse_mismatch(step, metrics)
                self._schedule.apply(self.optimizer, tick)
                self.optimizer.step()
                self._weights_changed()
            else:
                self._skip_or_raise(step, values, grad_norm)
            self.optimizer.zero_grad(set_to_none=True)
            self.step = step
        with self._booked(phases, "metrics"):
            metrics |= {
                "loss": Metric(math.fsum(values), "sum"),
                "grad_norm": Metric(grad_norm),
                "lr": Metric(self._schedule.lr(tick)),
                "weight_decay": Metric(self._schedule.weight_decay(tick)),
                "skipped_steps": Metric(self.skipped_steps),
                **{name: Metric(value) for name, value in self.optimizer.metrics().items()},
                **self._memory(),
            }
        return StepStats(metrics, phases, skipped=not finite)

    def _refuse_no_signal(self, step: int, batch: TrainBatch) -> None:
        if batch.num_loss_tokens == 0:
            raise NoSignalError(
                f"step {step}: none of the batch's {batch.num_sequences} sequences has a "
                "token that counts in the loss, expected at least one. Look at the loss masks of "
                "the data (an answer of each row must be left after templates and truncation to "
                "policy.max_total_sequence_length), or raise policy.train_global_batch_size"
            )

    def _refuse_mismatch(self, step: int, metrics: Metrics) -> None:
        limit = self.settings.mismatch_limit
        if limit is None:
            return
        try:
            refuse_mismatch(step, metrics, limit, self.device)
        except MismatchError:
            self.optimizer.zero_grad(set_to_none=True)
            raise

    def _memory(self) -> Metrics:
        """The most memory that tensors have taken so far; of a GPU alone."""
        if self.device.type != "cuda":
            return {}
        return {"max_memory_gb": Metric(torch.cuda.max_memory_allocated(self.device) / 1e9, "max")}

    @contextmanager
    def _booked(self, phases: dict[str, float], name: str) -> Iterator[None]:
        """Time spent inside is booked under this name, that of kernels started inside included."""
        start = perf_counter()
        try:
            yield
        except Exception as exception:
            exception.add_note(name)  # for whoever tells of it
            raise
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        phases[name] = phases.get(name, 0.0) + perf_counter() - start

    def _gradients(self, shard: Shard, loss: Loss) -> tuple[list[Tensor], Metrics]:
        """Make the gradients of all micro-batches together; the loss's shares and own metrics."""
        self.model.train()
        parts = parts_of(shard)
        shares: list[Tensor] = []
        collected: list[Metrics] = []

        def loss_of(number: int, logprobs_N: Tensor) -> Tensor:
            share, metrics = loss(logprobs_N, parts[number].batch.to(self.device))
            shares.append(share.detach())
            collected.append(metrics)
            return share

        self._backward(parts, loss_of)
        return shares, reduce(collected)

    def _is_finite(self, shares: list[float], grad_norm: float) -> bool:
        """Whether every rank may step: one answer for all ranks, since a step is a collective."""
        finite = math.isfinite(grad_norm) and all(map(math.isfinite, shares))
        if self._world_size > 1:
            flag = torch.tensor(float(finite), device=self.device)
            dist.all_reduce(flag, dist.ReduceOp.MIN)
            finite = bool(flag)
        return finite

    def _is_watched(self, step: int) -> bool:
        """Whether the optimizer's metrics are wanted of this step; Muon's have an interval."""
        optimizer = self.policy.active_optimizer
        return not optimizer.is_muon or step % optimizer.muon_log_every == 0

    def _skip_or_raise(self, step: int, shares: list[float], grad_norm: float) -> None:
        """Count the step as skipped, or say where the first bad value arose."""
        if self.skipped_steps < self.settings.skip_budget:
            self.skipped_steps += 1
            return
        found = self._culprits(shares)
        self.optimizer.zero_grad(set_to_none=True)
        if self._world_size > 1:
            gathered: list[list[str]] = [[] for _ in range(self._world_size)]
            dist.all_gather_object(gathered, found)
            found = [line for lines in gathered for line in lines]
        raise NonFiniteError(
            f"step {step}: {'; '.join(found[:4])} (gradient norm {grad_norm}). "
            f"The weights were not changed. {self.skipped_steps} steps were skipped before; to "
            "leave such steps out, raise skip_non_finite_steps in the block of the algorithm "
            f"(now {self.settings.skip_budget})"
        )

    def _culprits(self, shares: list[float]) -> list[str]:
        """Which of this rank's losses are not finite; if all are, which of its gradients."""
        found = [
            f"rank {self._rank}, micro-batch {i}: loss {share}"
            for i, share in enumerate(shares)
            if not math.isfinite(share)
        ]
        return found or [
            f"rank {self._rank}: gradient of {name}"
            for group in self.optimizer.param_groups
            for name, p in zip(group["param_names"], group["params"], strict=True)
            if p.grad is not None and not bool(local(p.grad).isfinite().all())
        ]

    def begin(self, total_steps: int) -> PolicyFacts:
        """Lay the schedules over this many steps; the model, its owners, where it runs."""
        self._schedule = Schedule(
            self.policy.active_optimizer, self.policy.active_scheduler, total_steps
        )
        owners = self._owners()
        return PolicyFacts(
            model=self._model_config(),
            owners=owners,
            num_parameters=sum(math.prod(row["shape"]) for row in owners),
            device=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            threads=torch.get_num_threads(),
            world_size=self._world_size,
            outlook=outlook(
                self.policy.active_optimizer,
                self.routing,
                [muon.plan for muon in self.optimizer.muons],
            ),
        )

    def close(self) -> None:
        """Finish what is being written and leave all process groups; safe to call twice."""
        super().close()
        self._leaving.close()


def parts_of(shard: Shard) -> list[Part]:
    """The micro-batches of a shard, each with the sequences that it needs."""
    found = []
    for micro_batch in shard.micro_batches:
        sequences = [sequence for row in micro_batch for sequence in row]
        found.append(Part(shard.batch.select(sequences), micro_batch, sequences))
    return found
