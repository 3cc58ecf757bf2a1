"""Whether engine and policy give tokens the same probability, asked before a step is taken."""

from __future__ import annotations

import torch
import torch.distributed as dist

from nemo_like.errors import MismatchError
from nemo_like.types import Metrics

ERROR = "token_mult_prob_error"
"""The metric of a loss on rollouts that says it; losses on other data have none."""
CURE = (
    "Compute in the same precision (policy.precision, policy.generation.vllm_cfg.precision), draw "
    "from the whole distribution (top_p=1, top_k=null), raise the bound, or set "
    "policy.generation.mismatch.action=warn and loss_fn.use_importance_sampling_correction=true"
)


def refuse_mismatch(step: int, metrics: Metrics, limit: float, device: torch.device) -> None:
    """Nothing, if the mean of the error over the whole batch is in bounds; the same on every rank.

    Collective. Ranks that compute on the same tokens count alike, and leave the mean as it is.

    Raises:
        MismatchError: it is not.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    if own := metrics.get(ERROR):
        sums[0], sums[1] = own.value * own.weight, own.weight
    if dist.get_world_size() > 1:
        dist.all_reduce(sums)
    total, weight = sums.tolist()
    if weight and total / weight > limit:
        fact = disagreement(step, ERROR, total / weight, limit)
        raise MismatchError(f"{fact}. The weights were not changed. {CURE}")


def disagreement(step: int, metric: str, found: float, limit: float) -> str:
    """How far engine and policy are apart, and how far they may be, in words."""
    return (
        f"step {step}: engine and policy differ by a factor of {found:.4f} per token ({metric}), "
        f"expected at most {limit} (policy.generation.mismatch.max_token_mult_prob_error)"
    )
