"""Routers whose tokens are spread evenly over experts, for a forecast: no numbers decide it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


@contextmanager
def even_routes() -> Iterator[None]:
    """Inside, every expert gets as many tokens as the next; routing weights stay the router's."""
    chosen_by_score = TopKRouter.routing

    def routing(router: TopKRouter, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        weights, by_score = chosen_by_score(router, *args, **kwargs)
        tokens, experts = by_score.shape
        places = torch.arange(tokens * router.topk).view(tokens, router.topk) % experts
        return weights, torch.zeros(tokens, experts, dtype=torch.bool).scatter(1, places, True)

    with patch.object(TopKRouter, "routing", routing):
        yield
