"""The half of a Muon step that looks at single elements: each rank takes it on its own blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemo_like.optim.diagnostics import Stopwatch
from nemo_like.optim.rule import MuonRule


@dataclass(slots=True)
class BlockStep:
    """One step on this rank's blocks of weights, momenta and gradients, by number of the matrix.

    A packed matrix has several parts, each of which moves or stays by itself, as it would as a
    matrix of its own. `num_parts[i]` counts those of matrix i; where there are more than one,
    `part_of[i]` says which of them each row ([r, 1]) or column ([1, c]) of the block belongs to.
    """

    rule: MuonRule
    device: torch.device
    lr: float
    weight_decay: float
    weights: dict[int, Tensor]
    momenta: dict[int, Tensor]
    gradients: dict[int, Tensor]
    num_parts: Sequence[int]
    part_of: Mapping[int, Tensor]
    spectra: dict[int, list[Tensor]] | None
    """What `spectrum` says of the matrices computed here, if the step is watched."""
    stopwatch: Stopwatch | None
    active: dict[int, Tensor] = field(default_factory=dict)
    """1 for each part of a matrix that moves, 0 for one that stays; the device is not asked."""
    rates: dict[int, Tensor] = field(default_factory=dict)
    """What the gradient counts in the momentum; may be broadcast over the block."""
    decays: dict[int, Tensor] = field(default_factory=dict)
    """What weights are multiplied with before an update."""

    def signals(self, numbers: Sequence[int]) -> Tensor:
        """Which parts of these matrices have reason to move, as far as this rank knows.

        Shapes: [all parts of all matrices], fp32.
        """
        found = [self._signals_of(i) for i in numbers]
        return torch.cat(found) if found else torch.zeros(0, device=self.device)

    def activate(self, numbers: Sequence[int], signals: Tensor) -> None:
        """Take these signals for what all ranks agree on."""
        if not numbers:
            return
        like, counts = self.weights[numbers[0]], [self.num_parts[i] for i in numbers]
        self.active.update(zip(numbers, signals.split(counts), strict=True))
        exact = signals.to(like.device, torch.float64)
        for factors, values in (
            (self.rates, (1 - self.rule.momentum) * exact),
            (self.decays, 1 - self.lr * self.weight_decay * exact),
        ):
            parts = values.to(like.dtype).split(counts)
            factors.update(zip(numbers, parts, strict=True))
            for i in self.part_of.keys() & numbers:
                factors[i] = factors[i][self.part_of[i].to(like.device)]

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
        """Decay the weights of these matrices and take their updates off."""
        if not updates:
            return
        weights = [self.weights[i] for i in updates]
        if self.weight_decay:
            torch._foreach_mul_(weights, [self.decays[i] for i in updates])
        # Of weights that are kept on the CPU the updates come from the GPU.
        steps = [update.to(w.device) for update, w in zip(updates.values(), weights, strict=True)]
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
            part_of = self.part_of[i]
            dim = 1 if part_of.shape[1] == 1 else 0
            largest = gradient.abs().amax(dim).to(self.device)
            parts = largest.new_zeros(count)
            largest = parts.scatter_reduce(0, part_of.flatten(), largest, "amax")
        return (largest != 0).float()  # NaN, too, is not zero
