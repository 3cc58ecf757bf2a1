"""What a worker is told besides its policy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BackendSettings:
    """Picklable, and imports nothing heavy.

    `seed` gives a newborn model's weights, and everything that is drawn during training.
    `skip_budget` is how many steps with a non-finite loss or gradient are left out before one ends
    the run. With `asynchronous_save` a save returns when the state is copied. With
    `convert_optimizer` a checkpoint whose parameters had other optimizers can be loaded. With
    `keep_reference` the weights of the start are kept too, for log-probabilities under them.
    Log-probabilities are of logits divided by `temperature`, as engines draw tokens. A collective
    fails after `collective_timeout_s`: later than the driver, who can say which ranks are missing.
    A step on tokens whose `token_mult_prob_error` is above `mismatch_limit` in the mean is refused.
    Without `loads_weights` they are left as they are allocated: for who wants to know what a step
    needs.
    """

    seed: int
    skip_budget: int = 0
    asynchronous_save: bool = False
    convert_optimizer: bool = False
    keep_reference: bool = False
    temperature: float = 1.0
    collective_timeout_s: float = 1860.0
    mismatch_limit: float | None = None
    loads_weights: bool = True
