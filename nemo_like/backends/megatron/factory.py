"""What a worker makes its Megatron backend from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_like.backends.settings import BackendSettings
from nemo_like.config.policy import PolicyConfig

if TYPE_CHECKING:
    from nemo_like.backends.megatron.backend import MegatronBackend


@dataclass(frozen=True)
class MegatronFactory:
    """Picklable, and imports nothing heavy before it is called, in the worker."""

    policy: PolicyConfig
    settings: BackendSettings

    def __call__(self) -> MegatronBackend:
        """This rank's backend; joins the process group that the environment describes."""
        from nemo_like.backends.megatron.backend import MegatronBackend

        return MegatronBackend(self.policy, self.settings)
