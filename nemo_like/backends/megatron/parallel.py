"""Who is who: megatron-core's process groups, and the same ranks as device meshes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from nemo_like.backends.megatron.cpu import mcore_on_cpu
from nemo_like.backends.megatron.places import Grid, check_divisible
from nemo_like.config.megatron import MegatronConfig

DENSE = ("pp", "dp", "cp", "tp")
EXPERT = ("pp", "edp", "ep", "etp")


@dataclass(frozen=True)
class Parallel:
    """This rank's place in the layout.

    All ranks, in order, are a grid (pp, dp, cp, tp) for what every token passes, and another one
    (pp, edp, ep, etp) for experts. A parameter is laid over the grid without `pp`: its stage.
    """

    mesh: DeviceMesh
    expert_mesh: DeviceMesh
    device: torch.device
    _undo: ExitStack

    def size(self, dim: str) -> int:
        """How many ranks share this; `dim` is a name of either grid."""
        return self._mesh_of(dim)[dim].size()

    def rank(self, dim: str) -> int:
        """This rank's coordinate along a dimension of either grid."""
        return self._mesh_of(dim).get_local_rank(dim)

    def group(self, dim: str) -> dist.ProcessGroup:
        """The ranks that differ from this one in this coordinate alone."""
        return self._mesh_of(dim).get_group(dim)

    @property
    def stage_mesh(self) -> DeviceMesh:
        """The ranks of this pipeline stage as (dp, cp, tp)."""
        return self.mesh[DENSE[1:]]

    @property
    def expert_stage_mesh(self) -> DeviceMesh:
        """The ranks of this pipeline stage as (edp, ep, etp)."""
        return self.expert_mesh[EXPERT[1:]]

    @property
    def grid(self) -> Grid:
        """Who is where, as plain numbers."""
        return Grid(self.mesh.mesh, self.expert_mesh.mesh)

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank has the embedding."""
        return self.rank("pp") == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the head, and is asked for losses."""
        return self.rank("pp") == self.size("pp") - 1

    def _mesh_of(self, dim: str) -> DeviceMesh:
        return self.mesh if dim in DENSE else self.expert_mesh

    def destroy(self) -> None:
        """Take back what megatron-core keeps for the whole process. Safe to call twice."""
        self._undo.close()


def initialize(config: MegatronConfig, device: torch.device, *, seed: int = 0) -> Parallel:
    """Divide all ranks of the default process group as the configuration says; a collective.

    Raises:
        ConfigError: the number of ranks can not be divided so.
    """
    world = dist.get_world_size()
    check_divisible(config, world)
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
    groups: dict[str, Callable[[], dist.ProcessGroup]] = {
        "pp": ps.get_pipeline_model_parallel_group,
        "dp": ps.get_data_parallel_group,
        "cp": ps.get_context_parallel_group,
        "tp": ps.get_tensor_model_parallel_group,
        "edp": ps.get_expert_data_parallel_group,
        "ep": ps.get_expert_model_parallel_group,
        "etp": ps.get_expert_tensor_parallel_group,
    }

    def mesh(dims: tuple[str, ...]) -> DeviceMesh:
        own = [groups[dim]() for dim in dims]
        ranks = torch.arange(world).view([group.size() for group in own])
        return DeviceMesh.from_group(own, device.type, ranks, mesh_dim_names=dims)

    undo.callback(ps.destroy_model_parallel)
    return Parallel(mesh(DENSE), mesh(EXPERT), device, undo)
