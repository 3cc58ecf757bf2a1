"""A tensor of a checkpoint whose parts lie anywhere in this rank's memory.

Where a DTensor is one block of a tensor on each rank, this is any number of boxes: what a backend
with packed matrices holds of a tensor that has no matrix of its own there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.utils import find_tensor_shard

from nemo_like.checkpoint.files import shown
from nemo_like.errors import CheckpointError


@dataclass(frozen=True, slots=True, eq=False)
class BoxedTensor:
    """This rank's boxes of a tensor of this shape, by their offset; writing to one writes there.

    The boxes of all ranks cover the tensor. Ranks may hold copies of a box, but no two boxes
    overlap otherwise.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: Mapping[tuple[int, ...], Tensor]

    def size(self) -> torch.Size:
        """The shape of the whole tensor, by the name that torch has for it."""
        return torch.Size(self.shape)

    # What `torch.distributed.checkpoint` asks of objects that it can save and load in place.

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties(dtype=self.dtype),
                    size=self.size(),
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size(offset), box.size())
            for offset, box in self.boxes.items()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None, "boxes are found by their offset"
        return self.boxes[tuple(index.offset)]


class SavePlanner(DefaultSavePlanner):
    """Saves flat states in which tensors may be boxes."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_global_plan(self, all_plans: list[SavePlan]) -> Any:
        """DCP's plan, refused where the ranks together hold a part of a tensor only."""
        _refuse_gaps(all_plans)
        return super().create_global_plan(all_plans)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The block to write; DCP's own finds blocks of what is a torch.Tensor only."""
        return find_tensor_shard(self.state_dict[index.fqn], index)


class LoadPlanner(DefaultLoadPlanner):
    """Loads into flat states in which tensors may be boxes, of which DCP's own makes None."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Keep the state as it is: DCP's own looks for tensors of no memory in it."""
        self.state_dict, self.metadata = state_dict, metadata
        self.is_coordinator = is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The block to fill."""
        return find_tensor_shard(self.state_dict[index.fqn], index)


def _refuse_gaps(plans: list[SavePlan]) -> None:
    """Refuse tensors that the ranks hold a part of: DCP does, but not where there is one rank."""
    items = [item for plan in plans for item in plan.items]
    written = {item.index: item.tensor_data for item in items if item.tensor_data is not None}
    sizes = {index.fqn: math.prod(data.size) for index, data in written.items()}
    held = dict.fromkeys(sizes, 0)
    for index, data in written.items():
        held[index.fqn] += math.prod(data.chunk.sizes)
    if gaps := [
        f"{n}: {held[n]} of {size} elements" for n, size in sizes.items() if held[n] < size
    ]:
        raise CheckpointError(f"the ranks do not hold all of {shown(gaps)}")
