"""Micro-batches through the stages of a model, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nemo_like.backends.megatron.parallel import Parallel
from nemo_like.backends.megatron.rows import LocalRows, local_rows
from nemo_like.ops.packing import Rows

LossOf = Callable[[int, Tensor], Tensor]


def run(
    model: DistributedDataParallel,
    parallel: Parallel,
    micro_batches: Sequence[Rows],
    loss_of: LossOf | None = None,
) -> list[Tensor]:
    """The log-probabilities of every micro-batch's targets, on every rank of a replica.

    They are without gradient, in fp32 nats, aligned with `Rows.target_M`. With `loss_of` there is
    a backward pass: on the last stage it is given the number of a micro-batch and its
    log-probabilities with gradient, and returns the micro-batch's share of the global loss.
    Afterwards `main_grad` of every parameter is the gradient of all ranks' shares together; what
    it was before is forgotten.

    A collective of all ranks, with as many micro-batches on each. Shapes: [M] each.
    """
    results: list[Tensor] = []

    def forward_step(source: Iterator[LocalRows], stage: Any) -> tuple[Tensor, Any]:
        return stage(next(source)), end

    def end(logprobs_M: Tensor) -> tuple[Tensor, Tensor, None]:
        number = len(results)
        results.append(logprobs_M.detach())
        loss = logprobs_M.sum() if loss_of is None else loss_of(number, logprobs_M)
        # The schedule counts tokens, to divide by them; our losses are divided already.
        return loss, torch.zeros((), dtype=torch.int, device=loss.device), None

    if loss_of is not None:
        model.zero_grad_buffer()
        model.module.weigh_balancing_loss(len(micro_batches))
    with torch.no_grad() if loss_of is None else nullcontext():
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=(
                local_rows(
                    rows,
                    rank=parallel.rank("cp"),
                    num_ranks=parallel.size("cp"),
                    device=parallel.device,
                )
                for rows in micro_batches
            ),
            model=[model],
            num_microbatches=len(micro_batches),
            seq_length=1,  # rows have various lengths, and say so to the next stage
            micro_batch_size=1,
            forward_only=loss_of is None,
        )
    return _on_all_stages(results, [len(rows.target_M) for rows in micro_batches], parallel)


def _on_all_stages(results: list[Tensor], sizes: list[int], parallel: Parallel) -> list[Tensor]:
    """What the last stage has, on all."""
    if parallel.size("pp") == 1:
        return results
    whole = torch.cat(results) if results else torch.empty(sum(sizes), device=parallel.device)
    group = parallel.group("pp")
    dist.broadcast(whole, dist.get_global_rank(group, group.size() - 1), group)
    return list(whole.split(sizes))
