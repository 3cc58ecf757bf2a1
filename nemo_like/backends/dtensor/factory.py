"""What a worker makes its DTensor backend from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_like.backends.settings import BackendSettings
from nemo_like.config.policy import PolicyConfig

if TYPE_CHECKING:
    from nemo_like.backends.dtensor.backend import DTensorBackend


@dataclass(frozen=True)
class DTensorFactory:
    """Picklable, and imports nothing heavy before it is called, in the worker."""

    policy: PolicyConfig
    settings: BackendSettings

    def __call__(self) -> DTensorBackend:
        """This rank's backend; joins the process group that the environment describes."""
        from nemo_like.backends.dtensor.backend import DTensorBackend

        return DTensorBackend(self.policy, self.settings)
