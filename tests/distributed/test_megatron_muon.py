"""Muon on Megatron's packed and cut matrices, in fp64, against the rule written out by hand."""

import math
import re
import zlib

import numpy as np
import pytest
import torch
from muon_by_hand import megatron_layer_by_hand
from test_layouts import Started, models  # noqa: F401

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
LR, MOMENTUM, STEPS = 0.25, 0.9, 2
LAYER = {
    **{part: f"self_attn.{part}_proj.weight" for part in "qkvo"},
    **{part: f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")},
}


def gradient_of(name, shape, step):
    """The gradient of a whole tensor, the same in every process."""
    g = torch.Generator().manual_seed(zlib.crc32(name.encode()) + step)
    return torch.randn(shape, generator=g, dtype=torch.float64)


def boxes_of(stored):
    """Whatever a backend stores under a Hugging Face name: its shape, and live boxes by offset."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not isinstance(stored, DTensor):
        return tuple(stored.shape), getattr(stored, "boxes", None) or {(0,) * stored.ndim: stored}
    _, offset = compute_local_shape_and_global_offset(
        stored.shape, stored.device_mesh, stored.placements
    )
    return tuple(stored.shape), {tuple(offset): stored.to_local()}


def place_of(offset, box):
    return tuple(slice(o, o + n) for o, n in zip(offset, box.shape, strict=True))


def boxes_after_steps(folder, block, optimizer):
    """What this rank holds of each tensor after some steps from zero on the same gradients.

    The optimizer is the backend's own, over fp64 tensors in place of its weights.
    """
    from nemo_like.optim.combined import CombinedOptimizer
    from nemo_like.optim.layout import layout_of

    this = Started(folder, block, {"optimizer": optimizer | {"weight_decay": 0.0}})
    backend = this.backend
    weights = {
        name: torch.nn.Parameter(torch.zeros_like(weight, dtype=torch.float64))
        for name, weight in backend._weights().items()
    }
    layout = layout_of
    if "megatron_cfg" in block:
        masters = backend.masters.weights()
        layouts = {id(weights[name]): backend.masters.layout(m) for name, m in masters.items()}

        def layout(weight):
            return layouts[id(weight)]

    not_settings = ("params", "param_names", "copies")
    own = CombinedOptimizer(
        [
            {key: value for key, value in group.items() if key not in not_settings}
            | {"params": [(name, weights[name]) for name in group["param_names"]], "lr": LR}
            for group in backend.optimizer.param_groups
        ],
        layout,
    )
    gradients = {name: torch.zeros_like(weight.detach()) for name, weight in weights.items()}
    for step in range(STEPS):
        for name, stored in backend._stored(gradients).items():
            shape, boxes = boxes_of(stored)
            for offset, box in boxes.items():
                box.copy_(gradient_of(name, shape, step)[place_of(offset, box)])
        for name, weight in weights.items():
            weight.grad = gradients[name]
        own.step()
    stored = backend._stored({name: weight.detach() for name, weight in weights.items()})
    found = {}
    for name, tensor in stored.items():
        shape, boxes = boxes_of(tensor)
        found[name] = shape, {offset: box.numpy().copy() for offset, box in boxes.items()}
    backend.close()
    return found, this.facts.outlook


def updated(pool, folder, world, block, **optimizer):
    """The whole tensors after the steps, by name; and what the run was told of Muon."""
    settings = {
        "optimizer": "muon", "muon_momentum": MOMENTUM, "muon_coefficient_type": "simple",
        "muon_ns_dtype": "float64", "muon_bucket_mb": 0.02,
    }  # fmt: skip
    args = (str(folder), block, settings | optimizer)
    results = pool(world).run(boxes_after_steps, *args, timeout_s=200)
    whole: dict[str, np.ndarray] = {}
    for found, _ in results:
        for name, (shape, boxes) in found.items():
            tensor = whole.setdefault(name, np.full(shape, np.nan))
            for offset, box in boxes.items():
                tensor[place_of(offset, box)] = box
    return {name: torch.from_numpy(tensor) for name, tensor in whole.items()}, results[0][1]


def by_hand(found, **how):
    """The layers after the same steps of the rule written out; `found` gives shapes alone."""

    def scale(rows, columns):
        return 0.2 * math.sqrt(max(rows, columns))

    whole = {}
    for layer in (name.removesuffix(LAYER["q"]) for name in found if name.endswith(LAYER["q"])):
        weights = {part: torch.zeros_like(found[layer + own]) for part, own in LAYER.items()}
        momenta = {part: torch.zeros_like(weight) for part, weight in weights.items()}
        for step in range(STEPS):
            for part, own in LAYER.items():
                G = gradient_of(layer + own, weights[part].shape, step)
                momenta[part] = MOMENTUM * momenta[part] + (1 - MOMENTUM) * G
            for part, update in megatron_layer_by_hand(momenta, scale, **how).items():
                weights[part] -= LR * update
        whole |= {layer + own: weights[part] for part, own in LAYER.items()}
    return whole


def farthest(found, expected):
    assert expected
    return max(float((found[name] - tensor).abs().max()) for name, tensor in expected.items())


EXACT = {
    "1 process": (1, {}, "muon"),
    "TP 2": (2, {TP: 2}, "muon"),
    "TP 2, distributed": (2, {TP: 2, "optimizer": {"muon_tp_mode": "distributed"}}, "muon"),
    "PP 2": (2, {PP: 2}, "muon"),
    "DP 2, shared out": (2, {}, "dist_muon"),
    "TP 4 over 2 key heads": (4, {TP: 4}, "muon"),
}


@pytest.fixture(scope="module")
def separate(pool, models):  # noqa: F811
    """The tensors after the steps on the other backend, where each matrix is by itself."""
    return updated(pool, models / "qwen3", 2, {"dtensor_cfg": {"tensor_parallel_size": 2}})[0]


@pytest.mark.parametrize("label", EXACT)
def test_packed_matrices_move_as_separate_ones(pool, models, separate, label):  # noqa: F811
    world, megatron, optimizer = EXACT[label]
    block = {"megatron_cfg": megatron}
    found, _ = updated(pool, models / "qwen3", world, block, optimizer=optimizer)
    assert found.keys() == separate.keys()
    assert farthest(found, separate) < 1e-10
    assert farthest(found, by_hand(found)) < 1e-10


UNSPLIT = {
    "qkv": {"muon_split_qkv": False},
    "gate and up": {"muon_split_gate_up": False},
    "neither": {"muon_split_qkv": False, "muon_split_gate_up": False},
}


@pytest.mark.parametrize("what", UNSPLIT)
@pytest.mark.parametrize(
    ("world", "megatron"),
    [(1, {}), (2, {TP: 2}), (4, {TP: 4})],
    ids=["1 process", "TP 2", "TP 4 over 2 key heads"],
)
def test_a_packed_matrix_moves_as_one_where_that_is_asked_on_every_layout(
    pool,
    models,  # noqa: F811
    world,
    megatron,
    what,
):
    block, settings = {"megatron_cfg": megatron}, UNSPLIT[what]
    found, _ = updated(pool, models / "qwen3", world, block, **settings)
    how = {key.removeprefix("muon_"): value for key, value in settings.items()}
    assert farthest(found, by_hand(found, **how)) < 1e-10
    assert farthest(found, by_hand(found)) > 1e-2


BLOCKWISE = {"muon_tp_mode": "blockwise"}


BLOCKS = {
    "all split": (2, {"optimizer": "muon"}),
    "each block shared out over 2": (4, {"optimizer": "dist_muon"}),
    **{f"{what} whole": (2, settings) for what, settings in UNSPLIT.items()},
}


@pytest.mark.parametrize("label", BLOCKS)
def test_blockwise_makes_each_ranks_block_orthogonal_with_the_scale_of_the_whole(
    pool,
    models,  # noqa: F811
    label,
):
    world, settings = BLOCKS[label]
    block = {"megatron_cfg": {TP: 2}}
    found, told = updated(pool, models / "qwen3", world, block, **settings | BLOCKWISE)
    how = {key.removeprefix("muon_"): v for key, v in settings.items() if "split" in key}
    assert farthest(found, by_hand(found, num_blocks=2, **how)) < 1e-10
    assert farthest(found, by_hand(found, **how)) > 1e-2
    assert "depends on tensor_model_parallel_size" in told["muon_tp_mode=blockwise"]


def test_blockwise_is_exact_without_tensor_parallelism(pool, models, separate):  # noqa: F811
    found, _ = updated(pool, models / "qwen3", 1, {"megatron_cfg": {}}, **BLOCKWISE)
    assert farthest(found, separate) < 1e-10


def test_blocks_without_a_whole_key_head_are_refused_or_one_matrix(pool, models):  # noqa: F811
    block = {"megatron_cfg": {TP: 4, "optimizer": {"muon_tp_mode": "blockwise"}}}
    says = r"tensor_model_parallel_size: .*2 heads of keys .*muon_split_qkv=false"
    with pytest.raises(AssertionError, match=says):
        updated(pool, models / "qwen3", 4, block)
    found, _ = updated(pool, models / "qwen3", 4, block, muon_split_qkv=False)
    expected = by_hand(found, num_blocks=4)
    rest = {name: w for name, w in expected.items() if not re.search("[qkv]_proj", name)}
    assert farthest(found, rest) < 1e-10
