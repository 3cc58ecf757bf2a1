"""A state saved on some ranks is the same state on others, to the bit."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from nemo_like.checkpoint import rng, store
from nemo_like.checkpoint.boxes import BoxedTensor
from nemo_like.checkpoint.dcp_storage import read_metadata
from nemo_like.checkpoint.store import StateWriter, load_state
from nemo_like.config.optimizer import OptimizerConfig
from nemo_like.errors import CheckpointError
from nemo_like.optim.build import build_optimizer


class Net(nn.Module):
    """Uneven shards and, over two ranks, an empty one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 7)
        self.head = nn.Linear(7, 1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.up(self.embed(tokens)))


class Run:
    """A model in training with Muon and AdamW."""

    def __init__(self, layout: str) -> None:
        torch.manual_seed(1)
        self.net = Net()
        if layout == "tp2":
            mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
            parallelize_module(self.net.up, mesh, ColwiseParallel())
        elif layout != "one":
            fully_shard(self.net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        config = OptimizerConfig(optimizer="muon", lr=0.01)
        self.optimizer, _ = build_optimizer(self.net.named_parameters(), config)

    def train(self, seed: int) -> None:
        """A step on gradients that do not depend on the layout."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.net.parameters():
            whole = torch.randn(parameter.shape, generator=generator)
            parameter.grad = like(whole, parameter)
        self.optimizer.step()

    def state(self) -> dict:
        weights = dict(self.net.named_parameters())
        return {"model": {"weights": weights, "step": 7}, "optimizer": self.optimizer.state_tree()}

    def load(self, folder: Path) -> None:
        template = self.state()
        loaded = {name: load_state(folder / name, template[name]) for name in template}
        assert loaded["model"]["step"] == 7
        self.optimizer.load_state_tree(loaded["optimizer"])

    def whole(self) -> dict[str, torch.Tensor]:
        """All tensors of the state, gathered."""
        flat = store._take_apart(self.state()).tensors
        return {
            name: (t.full_tensor() if isinstance(t, DTensor) else t).clone()
            for name, t in flat.items()
        }


def like(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements)


def save(folder: Path, layout: str, *, asynchronous: bool) -> dict[str, torch.Tensor]:
    run = Run(layout)
    run.train(1)
    run.train(2)
    saved = run.whole()
    with StateWriter(asynchronous=asynchronous) as writer:
        writer.save(folder, run.state())
        run.train(3)  # with collectives of its own, while the background writes
    return saved


def load(folder: Path, layout: str) -> dict[str, torch.Tensor]:
    run = Run(layout)
    run.load(folder)
    return run.whole()


WORLD = {"one": 1, "fsdp2": 2, "fsdp4": 4, "tp2": 2}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    ("saved_on", "loaded_on"),
    [("one", "fsdp2"), ("fsdp2", "one"), ("fsdp2", "fsdp2"), ("tp2", "fsdp2"), ("fsdp2", "tp2")],
)
def test_a_state_of_muon_and_adamw_moves_between_layouts_bit_for_bit(
    pool, tmp_path, saved_on, loaded_on, asynchronous
):
    def on(layout, function, *args):
        if layout == "one":  # no process group at all
            return [function(tmp_path, layout, *args)]
        return pool(WORLD[layout]).run(function, tmp_path, layout, *args)

    saved = on(saved_on, save_async if asynchronous else save_sync)
    for ranks_view in on(loaded_on, load):
        assert ranks_view.keys() == saved[0].keys()
        assert any("exp_avg" in name for name in ranks_view)
        assert any("momentum" in name for name in ranks_view)
        for name, tensor in ranks_view.items():
            assert tensor.equal(saved[0][name]), name


def save_sync(folder, layout):
    return save(folder, layout, asynchronous=False)


def save_async(folder, layout):
    return save(folder, layout, asynchronous=True)


def boxes_with_a_copy(memory: torch.Tensor) -> BoxedTensor:
    """Rows 0-2 on rank 0, 5-7 on rank 1, and 2-5 on both: packed matrices of two ranks."""
    own, shared = (0, 5)[dist.get_rank()], 2
    boxes = {(own, 0): memory[:2], (shared, 0): memory[2:]}
    return BoxedTensor((7, 3), memory.dtype, boxes)


def between_boxes_and_dtensors(folder: Path) -> tuple[bool, bool, int]:
    whole = torch.arange(21.0).reshape(7, 3)
    mesh = init_device_mesh("cpu", (2,))
    mine = torch.cat([whole[:2] if dist.get_rank() == 0 else whole[5:], whole[2:5]])
    sharded = distribute_tensor(whole, mesh, [Shard(0)])
    with StateWriter(asynchronous=False) as writer:
        writer.save(folder, {"dtensor": {"w": sharded}})
        writer.save(folder, {"boxes": {"w": boxes_with_a_copy(mine)}})
    into = torch.zeros_like(mine)
    load_state(folder / "dtensor", {"w": boxes_with_a_copy(into)})
    loaded = load_state(folder / "boxes", {"w": distribute_tensor(whole * 0, mesh, [Shard(0)])})
    chunks = read_metadata(folder / "boxes").state_dict_metadata["w"].chunks
    return into.equal(mine), loaded["w"].full_tensor().equal(whole), len(chunks)


def test_boxes_and_dtensors_are_the_same_on_disk_and_copies_are_written_once(pool, tmp_path):
    assert pool(2).run(between_boxes_and_dtensors, tmp_path) == [(True, True, 3)] * 2


def boxes_that_leave_rank_1_out(folder: Path) -> str:
    boxes = BoxedTensor((7, 3), torch.float32, {(0, 0): torch.zeros(2, 3)})
    try:
        with StateWriter(asynchronous=False) as writer:
            writer.save(folder, {"part": {"w": boxes}})
    except CheckpointError as error:
        return str(error)
    return "no error"


def test_boxes_that_leave_a_part_out_are_refused_on_every_rank(pool, tmp_path):
    for message in pool(2).run(boxes_that_leave_rank_1_out, tmp_path):
        assert "the ranks do not hold all of w: 6 of 21 elements" in message


def refused_disk_on_rank_1(folder: Path, asynchronous: bool) -> str:
    run = Run("fsdp")
    genuine = os.write

    def refuse(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if dist.get_rank() == 1:
        os.write = refuse
    try:
        with StateWriter(asynchronous=asynchronous) as writer:
            writer.save(folder, run.state())
    except CheckpointError as error:
        return str(error)
    finally:
        os.write = genuine
    return "no error"


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_full_disk_of_one_rank_is_an_error_on_every_rank_that_names_it(
    pool, tmp_path, asynchronous
):
    for message in pool(2).run(refused_disk_on_rank_1, tmp_path, asynchronous):
        assert "rank 1: OSError" in message and "free space" in message
    assert not store.is_written(tmp_path / "model")


def load_with_a_missing_name_on_rank_1(folder: Path) -> str:
    tree = {"a": torch.ones(2), "b": torch.ones(2)}
    with StateWriter(asynchronous=False) as writer:
        writer.save(folder, {"part": tree})
    template = dict(tree, c=torch.ones(1)) if dist.get_rank() == 1 else tree
    try:
        load_state(folder / "part", template)
    except CheckpointError as error:
        return str(error)
    return "no error"


def test_a_misfit_on_one_rank_is_refused_on_every_rank_before_any_hangs(pool, tmp_path):
    for message in pool(2).run(load_with_a_missing_name_on_rank_1, tmp_path):
        assert "c: not in the checkpoint" in message


def different_names_per_rank(folder: Path) -> bool:
    rank = dist.get_rank()
    tree = {f"stage{rank}": torch.full((3,), float(rank)), f"lr{rank}": 0.1 * rank}
    with StateWriter(asynchronous=False) as writer:
        writer.save(folder, {"part": tree})
    loaded = load_state(folder / "part", {**tree, f"stage{rank}": torch.zeros(3)})
    return loaded[f"stage{rank}"].tolist() == [rank] * 3 and loaded[f"lr{rank}"] == 0.1 * rank


def test_ranks_may_hold_different_names_as_pipeline_stages_do(pool, tmp_path):
    assert pool(2).run(different_names_per_rank, tmp_path) == [True, True]


def different_values_per_rank(folder: Path) -> str:
    try:
        with StateWriter(asynchronous=False) as writer:
            writer.save(folder, {"part": {"a": torch.ones(1), "step": dist.get_rank()}})
    except CheckpointError as error:
        return str(error)
    return "no error"


def test_ranks_that_differ_on_a_value_are_refused(pool, tmp_path):
    for message in pool(2).run(different_values_per_rank, tmp_path):
        assert "one value of step was expected, ranks hold 0 and 1" in message


def random_numbers_of_each_rank(folder: Path) -> bool:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    rng.save(folder, rank=rank, world_size=world_size)
    dist.barrier()
    expected = torch.rand(3)
    return rng.load(folder, rank=rank, world_size=world_size) and torch.rand(3).equal(expected)


def test_every_rank_gets_its_own_random_numbers_back(pool, tmp_path):
    assert pool(2).run(random_numbers_of_each_rank, tmp_path) == [True, True]
