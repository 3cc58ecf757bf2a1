"""What a worker makes its DTensor backend from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_like.config.policy import PolicyConfig

if TYPE_CHECKING:
    from nemo_like.backends.dtensor.backend import DTensorBackend


@dataclass(frozen=True)
class DTensorFactory:
    """Picklable, and imports nothing heavy before it is called, in the worker.

    `seed` gives a newborn model's weights; `skip_budget` is how many steps with a non-finite loss
    or gradient may be left out.
    """

    policy: PolicyConfig
    seed: int
    skip_budget: int = 0
    asynchronous_save: bool = False

    def __call__(self) -> DTensorBackend:
        """This rank's backend; joins the process group that the environment describes."""
        from nemo_like.backends.dtensor.backend import DTensorBackend

        return DTensorBackend(
            self.policy,
            seed=self.seed,
            skip_budget=self.skip_budget,
            asynchronous_save=self.asynchronous_save,
        )
