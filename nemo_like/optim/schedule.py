"""Learning rate and weight decay as pure functions of the step."""

from __future__ import annotations

import math

from torch.optim import Optimizer

from nemo_like.config.optimizer import OptimizerConfig, SchedulerConfig
from nemo_like.errors import ConfigError


class Schedule:
    """What the learning rate and the weight decay are after so many finished steps.

    The first step of a run is taken with `lr(0)`. Nothing is remembered, so nothing is saved: a
    resumed run asks for the step it is at.

    Units: steps are optimizer steps.

    Source: Megatron-LM's `OptimizerParamScheduler`, whose values these are. Changed: settings that
    it would turn into a jump or a division by zero are refused.

    Raises:
        ConfigError: the run is too short for the schedule.
    """

    def __init__(
        self, optimizer: OptimizerConfig, scheduler: SchedulerConfig, total_steps: int
    ) -> None:
        self.peak, self.floor = optimizer.lr, optimizer.min_lr
        self.total_steps = total_steps
        self.decay_steps = scheduler.lr_decay_iters or total_steps
        self.config = scheduler
        self.start_decay = _either(scheduler.start_weight_decay, optimizer.weight_decay)
        self.end_decay = _either(scheduler.end_weight_decay, optimizer.weight_decay)
        self.warmup_steps = scheduler.warmup_steps(total_steps)
        # The configuration was checked with the steps it names; the data may have fewer.
        for found in scheduler.misfits(total_steps):
            keys = " and ".join(f"policy.scheduler.{key}" for key in found.keys)
            raise ConfigError(f"{keys}: {found.message}; the run has {total_steps} steps")

    def lr(self, step: int) -> float:
        """The learning rate after `step` finished steps."""
        config, delta = self.config, self.peak - self.floor
        warmup = self.warmup_steps
        if warmup > 0 and step <= warmup:
            start = config.lr_warmup_init
            return start + (self.peak - start) * step / warmup
        if config.lr_decay_style == "constant":
            return self.peak
        if step > self.decay_steps:
            return self.floor
        if config.lr_decay_style == "inverse-square-root":
            return max(self.floor, self.peak * math.sqrt(max(warmup, 1) / max(step, 1)))
        if config.lr_decay_style == "WSD":
            return self.floor + delta * self._wsd(step)
        ratio = (step - warmup) / (self.decay_steps - warmup)
        return self.floor + delta * (
            _cosine(ratio) if config.lr_decay_style == "cosine" else 1 - ratio
        )

    def weight_decay(self, step: int) -> float:
        """The weight decay after `step` finished steps."""
        if step > self.total_steps or self.config.weight_decay_incr_style == "constant":
            return self.end_decay
        ratio = step / self.total_steps
        if self.config.weight_decay_incr_style == "cosine":
            ratio = 1 - _cosine(ratio)
        return self.start_decay + ratio * (self.end_decay - self.start_decay)

    def apply(self, optimizer: Optimizer, step: int) -> None:
        """Give every parameter group the values for the step that follows `step` finished ones."""
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = self.lr(step), self.weight_decay(step)

    def _wsd(self, step: int) -> float:
        length = self.config.lr_wsd_decay_iters
        assert length is not None
        ratio = max(0.0, (step - (self.decay_steps - length)) / length)
        match self.config.lr_wsd_decay_style:
            case "linear":
                return 1.0 - ratio
            case "cosine":
                return _cosine(ratio)
            case "exponential":
                return 2.0 * math.pow(0.5, ratio) - 1.0
            case "minus_sqrt":
                return 1.0 - math.sqrt(ratio)


def _cosine(ratio: float) -> float:
    """From one at 0 to zero at 1, along half a cosine."""
    return 0.5 * (math.cos(math.pi * ratio) + 1.0)


def _either(value: float | None, default: float) -> float:
    return default if value is None else value
