"""Log-probabilities of given tokens, without the logits of a whole batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def linear_logprobs(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    target_M: Tensor,
    *,
    chunk_size: int,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
) -> Tensor:
    """The log of softmax(hidden @ weight.T)[target] in fp32 nats, `chunk_size` tokens at a time.

    Shapes: [M].

    At most `chunk_size` x V logits exist at once, in the forward as in the backward pass, which
    computes them again (unless there is a single chunk, whose logits are kept).

    With `group`, every rank holds the rows `vocab_start ...` of the weight (any number of them,
    also none) and the same hidden states: the ranks exchange a maximum, a sum and the target's
    logit per token. The gradient of `hidden_MD` is then this rank's *part*; the sum over the group
    is the gradient.

    Source: the vocabulary-parallel cross entropy of Megatron-LM (arXiv:1909.08053, section 3), cut
    into chunks.
    """
    return _LinearLogprobs.apply(hidden_MD, weight_VD, target_M, chunk_size, group, vocab_start)


def _wide(x: Tensor) -> Tensor:
    """The tensor in fp32, or in fp64 if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _softmax_statistics(
    logits: Tensor, local_target: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """The target's logit and the log of the sum of exponentials, over the whole vocabulary.

    Shapes: [m] each.
    """
    inside = (local_target >= 0) & (local_target < logits.shape[1])
    if logits.shape[1]:
        top = logits.amax(1)
        picked = logits.gather(1, local_target.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
        picked = picked.masked_fill(~inside, 0.0)
    else:
        top = logits.new_full((len(logits),), float("-inf"))
        picked = logits.new_zeros(len(logits))
    if group is None:
        return picked, logits.logsumexp(1)
    dist.all_reduce(top, dist.ReduceOp.MAX, group)
    sums = torch.stack([(logits - top[:, None]).exp_().sum(1), picked])
    dist.all_reduce(sums, dist.ReduceOp.SUM, group)
    return sums[1], sums[0].log() + top


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        chunk_size: int,
        group: dist.ProcessGroup | None,
        vocab_start: int,
    ) -> Tensor:
        local_target = target - vocab_start
        picked, lse = [], []
        logits = None
        for h, t in zip(hidden.split(chunk_size), local_target.split(chunk_size), strict=True):
            logits = _wide(h @ weight.T)
            p, s = _softmax_statistics(logits, t, group)
            picked.append(p)
            lse.append(s)
        lse_M = torch.cat(lse) if lse else _wide(hidden.new_zeros(0))
        kept = logits if len(lse) == 1 else None
        ctx.save_for_backward(hidden, weight, local_target, lse_M, kept)
        ctx.chunk_size = chunk_size
        return torch.cat(picked) - lse_M if picked else lse_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, local_target, lse_M, kept = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Summing chunks in bf16 would lose what one large product keeps.
        grad_weight = _wide(torch.zeros_like(weight)) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), ctx.chunk_size):
            part = slice(start, start + ctx.chunk_size)
            h, t = hidden[part], local_target[part]
            logits = _wide(h @ weight.T) if kept is None else kept
            # d logprob / d logits = onehot(target) - softmax
            grad = logits.sub_(lse_M[part, None]).exp_().mul_(-grad_M[part, None])
            inside = ((t >= 0) & (t < weight.shape[0])).nonzero().squeeze(1)
            grad[inside, t[inside]] += grad_M[part][inside]
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[part])
            if grad_weight is not None:
                if grad_weight.dtype == grad.dtype:
                    grad_weight.addmm_(grad.T, h)
                else:
                    grad_weight += grad.T @ h
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None,
            None,
            None,
            None,
        )
