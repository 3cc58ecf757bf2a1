"""A completion in the making, whatever engine draws its tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from nemo_like.errors import NonFiniteError
from nemo_like.rollout.sampling import Decode
from nemo_like.types import Prompt, Rollout


@dataclass(kw_only=True)
class Completion:
    """The tokens so far; `room` is how many there may be."""

    prompt: Prompt
    room: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] = "length"

    def add(self, token: int, logprob: float) -> None:
        """Write a token down with its log-probability.

        Raises:
            NonFiniteError: the model's logits are not numbers.
        """
        if not math.isfinite(logprob):
            raise NonFiniteError(
                f"NaN or infinite logits for prompt {self.prompt.index}, token "
                f"{len(self.token_ids)} of its completion: the weights are broken, or "
                "policy.precision overflows"
            )
        self.token_ids.append(token)
        self.logprobs.append(logprob)

    def rollout(self, decode: Decode, weights_version: int) -> Rollout:
        """The finished completion."""
        return Rollout(
            prompt=self.prompt,
            token_ids=tuple(self.token_ids),
            sampled_logprobs=tuple(self.logprobs),
            text=decode(self.token_ids),
            finish_reason=self.finish_reason,
            weights_version=weights_version,
        )
