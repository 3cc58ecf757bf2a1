"""Optimizer state moves between optimizers and layouts at the same time."""

from __future__ import annotations

import json
import os

import pytest
import torch

from nemo_like.checkpoint.layout import ROUTING

MODEL = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 60,
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "tie_word_embeddings": True, "initializer_range": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(MODEL))
    return str(folder)


def backend_of(model, optimizer, tensor, *, convert):
    from nemo_like.backends.dtensor.backend import DTensorBackend
    from nemo_like.backends.settings import BackendSettings
    from nemo_like.config.policy import PolicyConfig

    policy = PolicyConfig(
        model_name=model, init="random", precision="float32", max_total_sequence_length=64,
        optimizer={"optimizer": optimizer, "lr": 1e-3},
        dtensor_cfg={"tensor_parallel_size": tensor},
    )  # fmt: skip
    backend = DTensorBackend(policy, BackendSettings(seed=1, convert_optimizer=convert))
    backend.begin(10)
    return backend


def whole(backend):
    """Every tensor of weights and optimizer state, gathered, and the step counts."""
    from torch.distributed.tensor import DTensor

    from nemo_like.checkpoint.store import _take_apart

    flat = _take_apart(backend._state())
    tensors = {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).clone().numpy()
        for name, t in flat.tensors.items()
    }
    return {"tensors": tensors, "values": flat.values}


def train(backend, tensor, steps):
    from nemo_like.data.batching import Batching, shard
    from nemo_like.losses.nll import NLL
    from nemo_like.types import Example, TrainBatch

    num_data = int(os.environ["WORLD_SIZE"]) // tensor
    rank = int(os.environ["RANK"]) // tensor
    for step in steps:
        g = torch.Generator().manual_seed(step)
        rows = torch.randint(0, 60, (4, 12), generator=g).tolist()
        mask = (False, *[True] * 11)
        batch = TrainBatch.of([Example(tuple(row), mask) for row in rows])
        cut = Batching.for_training(backend.policy)
        backend.train_step(shard(batch, num_data, cut)[rank], NLL())


def train_and_save(model, folder, optimizer, tensor):
    backend = backend_of(model, optimizer, tensor, convert=False)
    train(backend, tensor, range(2))
    backend.save(folder)
    if os.environ["RANK"] == "0":  # the driver's part
        (folder / ROUTING).write_text(json.dumps(backend.routing.owners()))
    saved = whole(backend)
    backend.close()
    return saved


def load_and_train(model, folder, optimizer, tensor, convert):
    backend = backend_of(model, optimizer, tensor, convert=convert)
    backend.load(folder)
    loaded = whole(backend)
    train(backend, tensor, range(2, 4))
    trained = whole(backend)
    owners = backend.routing.owners()
    backend.close()
    return loaded, trained, owners


ON_4, ON_1 = (4, 2), (1, 1)
"""World size and tensor-parallel size: FSDP2 x TP, and one process."""
MOVES = {
    "AdamW on 2x2 to Muon on 1": ("adam", ON_4, "muon", ON_1),
    "AdamW on 1 to Muon on 2x2": ("adam", ON_1, "muon", ON_4),
    "Muon on 1 to AdamW on 2x2": ("muon", ON_1, "adam", ON_4),
}


@pytest.mark.parametrize("move", MOVES)
def test_state_changes_optimizer_and_layout_at_the_same_time(pool, model, tmp_path, move):
    before, saved_on, after, loaded_on = MOVES[move]
    saved = pool(saved_on[0]).run(train_and_save, model, tmp_path, before, saved_on[1])[0]

    def continued(layout):
        return pool(layout[0]).run(load_and_train, model, tmp_path, after, layout[1], True)

    _, straight, _ = continued(saved_on)[0]
    for loaded, trained, owners in continued(loaded_on):
        assert_kept(saved, loaded, owners, before)
        for name, tensor in straight["tensors"].items():
            assert abs(trained["tensors"][name] - tensor).max() < 1e-4, name
        assert trained["values"] == straight["values"]


def assert_kept(saved, loaded, owners, before):
    """What was loaded is what had to be kept, to the bit, and zero elsewhere."""
    for path, tensor in loaded["tensors"].items():
        if path.startswith("model"):
            assert (tensor == saved["tensors"][path]).all(), path
            continue
        _, _, name, key = path.split("/")
        if before == "muon" and f"optimizer/state/{name}/momentum_buffer" in saved["tensors"]:
            assert not tensor.any(), path
            assert loaded["values"][f"optimizer/steps/{name}"] == 0
            continue
        was = path.replace("momentum_buffer", "exp_avg")
        assert tensor.any() and (tensor == saved["tensors"][was]).all(), path
        if owners[name] == "adamw":
            assert loaded["values"][f"optimizer/steps/{name}"] == 2


def test_without_the_option_every_rank_refuses_another_optimizers_state(pool, model, tmp_path):
    pool(4).run(train_and_save, model, tmp_path, "adam", 2)
    with pytest.raises(AssertionError, match=r"CheckpointError: .*momentum_buffer: not in the ch"):
        pool(4).run(load_and_train, model, tmp_path, "muon", 2, False)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda owners: {**owners, "model.layers.0.mlp.up_proj.weight": "muon"}, "not in this run"),
        (lambda owners: dict(list(owners.items())[1:]), "is only in the checkpoint or only in"),
    ],
    ids=["another owner than the state has", "a parameter less"],
)
def test_the_option_hides_no_damage(pool, model, tmp_path, damage, message):
    pool(1).run(train_and_save, model, tmp_path, "adam", 1)
    file = tmp_path / ROUTING
    file.write_text(json.dumps(damage(json.loads(file.read_text()))))
    with pytest.raises(AssertionError, match=message):
        pool(1).run(load_and_train, model, tmp_path, "muon", 1, True)
