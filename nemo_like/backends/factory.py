"""What a worker makes its backend from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_like.backends.settings import BackendSettings
from nemo_like.config.megatron import MegatronConfig
from nemo_like.config.policy import DTensorConfig, PolicyConfig

if TYPE_CHECKING:
    from nemo_like.backends.base import RankBackend


@dataclass(frozen=True)
class BackendFactory:
    """Picklable, and imports nothing heavy before it is called, in the worker."""

    policy: PolicyConfig
    settings: BackendSettings

    def __call__(self) -> RankBackend:
        """This rank's backend; joins the process group that the environment describes."""
        match self.policy.backend:
            case DTensorConfig():
                from nemo_like.backends.dtensor.backend import DTensorBackend

                return DTensorBackend(self.policy, self.settings)
            case MegatronConfig():
                from nemo_like.backends.megatron.backend import MegatronBackend

                return MegatronBackend(self.policy, self.settings)
