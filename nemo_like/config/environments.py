"""What judges answers, and what becomes of a reward that can not be had."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from nemo_like.config.base import Conflict, Node, Positive, PositiveFloat

END_OF_CALL = "</calc>"
"""What ends a call of the calculator in an answer."""


class RewardWorkersConfig(Node):
    """The processes that compute rewards, and their limits."""

    num_workers: Positive = 1
    """Processes."""
    timeout_s: PositiveFloat = 6.0
    """Seconds for one reward; a process that takes longer is killed."""
    memory_gb: PositiveFloat = 4.0
    """Memory of one process."""


class MathEnvConfig(RewardWorkersConfig):
    """`env_name: math`."""

    math_verify_impl: Literal["hf_math_verify", "dapo_math_verify"] = "hf_math_verify"
    """`hf_` compares as mathematics; `dapo_` what follows `Answer:`, letter by letter."""


class CustomEnvConfig(RewardWorkersConfig):
    """`env_name: custom`."""

    reward: str | None = None
    """Import path `package.module:function`: of prompt, answer and what is expected, a number."""
    reply: str | None = None
    """The same for a text that the model goes on with, or None: see `grpo.max_rollout_turns`."""

    def conflicts(self) -> Iterator[Conflict]:
        """A text that is no import path."""
        for name in ("reward", "reply"):
            path = getattr(self, name)
            if path is not None and not re.fullmatch(r"\w+(\.\w+)*:\w+", path):
                yield Conflict((name,), "the form is package.module:function")


class EnvConfig(Node):
    """What judges answers; which one judges which rows says `data.train.env_name`."""

    on_failure: Literal["stop", "score"] = "stop"
    """Where a custom reward or reply raises, hangs or is of a wrong type: end the run, or go on."""
    failure_reward: float = 0.0
    """The reward under `on_failure=score`; a rollout whose reply fails is judged as it stands."""
    math: MathEnvConfig = MathEnvConfig()
    """`env_name: math`."""
    custom: CustomEnvConfig = CustomEnvConfig()
    """`env_name: custom`."""
