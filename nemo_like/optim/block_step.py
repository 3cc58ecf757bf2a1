"""The half of a Muon step that looks at single elements: each rank takes it on its own blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemo_like.optim.rule import MuonRule


@dataclass(slots=True)
class BlockStep:
    """One step on this rank's blocks of weights, momenta and gradients, by number of the matrix.

    A packed matrix has several parts, each of which moves or stays by itself, as it would as a
    matrix of its own. `num_parts[i]` counts those of matrix i; where there are more than one,
    `part_of[i]` says which of them each row ([r, 1], dimension 0) or column ([1, c], dimension 1)
    of the block belongs to, after the dimension. `device` computes, weights are of type `dtype`.
    """

    rule: MuonRule
    device: torch.device
    dtype: torch.dtype
    lr: float
    weight_decay: float
    weights: dict[int, Tensor]
    momenta: dict[int, Tensor]
    gradients: dict[int, Tensor]
    num_parts: Sequence[int]
    part_of: Mapping[int, tuple[int, Tensor]]
    active: dict[int, Tensor] = field(default_factory=dict)
    """1 for each part of a matrix that moves, 0 for one that stays; the device is not asked."""
    rates: dict[int, Tensor] = field(default_factory=dict)
    """What the gradient counts in the momentum; may be broadcast over the block."""
    decays: dict[int, Tensor] = field(default_factory=dict)
    """How much of the weight joins the update."""

    def signals(self, numbers: Sequence[int]) -> Tensor:
        """Which parts of these matrices have reason to move, as far as this rank knows.

        Shapes: [all parts of all matrices], fp32.
        """
        found = [self._signals_of(i) for i in numbers]
        return torch.cat(found) if found else torch.zeros(0, device=self.device)

    def activate(self, numbers: Sequence[int], signals: Tensor) -> None:
        """Take these signals for what all ranks agree on."""
        counts = [self.num_parts[i] for i in numbers]
        self.active.update(zip(numbers, signals.split(counts), strict=True))
        # Weights may be kept on another device than the one that computes.
        place = next((w.device for w in self.weights.values()), self.device)
        exact = signals.to(place, torch.float64)
        for factors, factor in (
            (self.rates, 1 - self.rule.momentum),
            (self.decays, self.weight_decay),
        ):
            parts = (factor * exact).to(self.dtype).split(counts)
            for i, part in zip(numbers, parts, strict=True):
                if i in self.part_of:
                    part = part[self.part_of[i][1].to(place)]
                factors[i] = part

    def average(self, numbers: Sequence[int]) -> dict[int, Tensor]:
        """Move the momentum of these matrices; what is to be orthogonalised."""
        if not numbers:
            return {}
        buffers = [self.momenta[i] for i in numbers]
        gradients = [
            self.gradients[i] if i in self.gradients else torch.zeros_like(self.momenta[i])
            for i in numbers
        ]
        torch._foreach_lerp_(buffers, gradients, [self.rates[i] for i in numbers])
        if self.rule.nesterov:
            buffers = list(torch._foreach_lerp(gradients, buffers, self.rule.momentum))
        return dict(zip(numbers, buffers, strict=True))

    def apply(self, updates: Mapping[int, Tensor]) -> None:
        """Take updates, and what decays, off the weights of these matrices.

        Both in one subtraction: 1 - lr * weight_decay, as a factor of its own, is 1 in fp32 for the
        learning rates of reinforcement learning.
        """
        if not updates:
            return
        weights = [self.weights[i] for i in updates]
        # Of weights that are kept on the CPU the updates come from the GPU.
        steps = [update.to(w.device) for update, w in zip(updates.values(), weights, strict=True)]
        if self.weight_decay:
            decays = [self.decays[i] for i in updates]
            steps = list(torch._foreach_addcmul(steps, weights, decays))
        torch._foreach_add_(weights, steps, alpha=-self.lr)

    def _signals_of(self, i: int) -> Tensor:
        count, gradient = self.num_parts[i], self.gradients.get(i)
        if gradient is None:
            return torch.zeros(count, device=self.device)
        if self.rule.zero_grad == "always":
            return torch.ones(count, device=self.device)
        if i not in self.part_of:
            if gradient.device.type == "cpu" and gradient[:1].any():  # most of the time
                return torch.ones(1, device=self.device)
            largest = gradient.abs().amax().reshape(1).to(self.device)
        else:
            dim, part_of = self.part_of[i]
            largest = gradient.abs().amax(1 - dim).to(self.device)
            parts = largest.new_zeros(count)
            largest = parts.scatter_reduce(0, part_of.flatten(), largest, "amax")
        return (largest != 0).float()  # NaN, too, is not zero
