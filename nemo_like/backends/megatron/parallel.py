"""Who is who: megatron-core's process groups, and the same ranks as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nemo_like.backends.megatron.cpu import mcore_on_cpu
from nemo_like.backends.megatron.places import Grid
from nemo_like.config.megatron import MegatronConfig


@dataclass(frozen=True)
class Parallel:
    """This rank's place in the layout.

    A parameter is laid over a grid without `pp`: its stage. The names of dimensions are those of
    both grids: pp, dp, cp, tp, edp, ep, etp.
    """

    grid: Grid
    device: torch.device
    _groups: Mapping[str, dist.ProcessGroup]
    _undo: ExitStack

    def size(self, dim: str) -> int:
        """How many ranks share this."""
        return self._groups[dim].size()

    def rank(self, dim: str) -> int:
        """This rank's coordinate along a dimension of either grid."""
        return self._groups[dim].rank()

    def group(self, dim: str) -> dist.ProcessGroup:
        """The ranks that differ from this one in this coordinate alone."""
        return self._groups[dim]

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank has the embedding."""
        return self.rank("pp") == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the head, and is asked for losses."""
        return self.rank("pp") == self.size("pp") - 1

    def destroy(self) -> None:
        """Take back what megatron-core keeps for the whole process. Safe to call twice."""
        self._undo.close()


def initialize(config: MegatronConfig, device: torch.device, *, seed: int = 0) -> Parallel:
    """Divide all ranks of the default process group as the configuration says; a collective.

    Raises:
        ConfigError: the number of ranks can not be divided so.
    """
    grid = Grid.of(config, dist.get_world_size())
    undo = ExitStack()
    if device.type == "cpu":
        undo.enter_context(mcore_on_cpu())
    from megatron.core import parallel_state as ps
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    ps.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        context_parallel_size=config.context_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_parallel_size,
        order="tp-cp-ep-dp-pp",
        create_gloo_process_groups=False,
    )
    # No layer here draws anything (dropout is refused), but recomputation asks for the generators.
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    undo.callback(ps.destroy_model_parallel)
    groups = {
        "pp": ps.get_pipeline_model_parallel_group(),
        "dp": ps.get_data_parallel_group(),
        "cp": ps.get_context_parallel_group(),
        "tp": ps.get_tensor_model_parallel_group(),
        "edp": ps.get_expert_data_parallel_group(),
        "ep": ps.get_expert_model_parallel_group(),
        "etp": ps.get_expert_tensor_parallel_group(),
    }
    return Parallel(grid, device, groups, undo)
