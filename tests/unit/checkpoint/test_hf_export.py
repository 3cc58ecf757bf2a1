"""An export loads in transformers with equal logits; a wrong folder is refused by name."""

from __future__ import annotations

import json
import os
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from nemo_like.checkpoint.hf_export import INDEX, write_hf
from nemo_like.checkpoint.hf_import import read_hf, read_hf_lazily
from nemo_like.errors import CheckpointError


def tiny_model(*, tied, dtype=torch.float32):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    for parameter in model.parameters():  # model.to() would round the rotary frequencies too
        parameter.data = parameter.data.to(dtype)
    return model


def export(model, folder, **options):
    write_hf(
        folder, model.state_dict().items(), config=model.config.to_dict(), tokenizer=None, **options
    )
    return folder


def test_a_box_of_a_tensor_is_read_without_the_rest(tmp_path):
    tensors = {"matrix": torch.arange(12.0).reshape(4, 3), "vector": torch.arange(5).bfloat16()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    boxes = {
        "matrix": [(slice(1, 3), slice(0, 2)), (slice(4, 4), slice(0, 3))],
        "vector": [(slice(2, 5),), (slice(5, 5),)],
    }
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    for name, stored in read_hf_lazily(tmp_path, shapes, tied=False):
        assert stored.shape == shapes[name]
        assert all(torch.equal(stored[box], tensors[name][box]) for box in boxes[name])


def shapes_of(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 4000])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_an_export_with_equal_logits(tmp_path, tied, max_shard_bytes, dtype):
    model = tiny_model(tied=tied, dtype=dtype)
    folder = export(model, tmp_path / "hf", max_shard_bytes=max_shard_bytes)
    assert (folder / INDEX).exists() == (max_shard_bytes == 4000)
    assert not list(folder.glob("*.tmp"))
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert loaded.dtype == dtype
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 4000])
@pytest.mark.parametrize("tied", [False, True])
def test_an_export_is_read_back_tensor_by_tensor(tmp_path, tied, max_shard_bytes):
    model = tiny_model(tied=tied)
    folder = export(model, tmp_path / "hf", max_shard_bytes=max_shard_bytes)
    read = dict(read_hf(folder, shapes_of(model), tied=tied))
    assert read.keys() == shapes_of(model).keys()
    assert all(tensor.equal(model.get_parameter(name)) for name, tensor in read.items())


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_weights_have_the_mode_that_the_umask_gives(tmp_path, umask):
    before = os.umask(umask)
    try:
        folder = export(tiny_model(tied=False), tmp_path / "hf", max_shard_bytes=4000)
    finally:
        os.umask(before)
    shards = list(folder.glob("*.safetensors"))
    assert len(shards) > 1
    assert {file.stat().st_mode & 0o777 for file in shards} == {0o666 & ~umask}


def test_only_one_shard_is_held_at_a_time(tmp_path):
    alive = []

    def weights():
        for i in range(20):
            tensor = torch.full((1000,), float(i))
            alive.append(weakref.ref(tensor))
            yield f"w{i}", tensor
            del tensor
            assert sum(ref() is not None for ref in alive) <= 4

    write_hf(tmp_path, weights(), config={}, tokenizer=None, max_shard_bytes=12_000)
    assert len(list(tmp_path.glob("*.safetensors"))) == 7


def test_tied_weights_that_differ_are_refused_at_export(tmp_path):
    weights = [("model.embed_tokens.weight", torch.ones(2)), ("lm_head.weight", torch.zeros(2))]
    with pytest.raises(CheckpointError, match="lm_head.weight differs from model.embed_tokens"):
        write_hf(tmp_path, weights, config={"tie_word_embeddings": True}, tokenizer=None)


def test_a_name_that_comes_twice_is_refused_at_export(tmp_path):
    with pytest.raises(CheckpointError, match="w is exported twice"):
        write_hf(tmp_path, [("w", torch.ones(1))] * 2, config={}, tokenizer=None)


def test_the_tokenizer_is_saved_beside_the_weights(tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            (tmp_path / "hf/tokenizer.json").write_text(folder)

    write_hf(tmp_path / "hf", [("w", torch.ones(1))], config={}, tokenizer=Tokenizer())
    assert (tmp_path / "hf/tokenizer.json").read_text() == str(tmp_path / "hf")


def rewrite(folder, change):
    """Change the tensors of a single-file export."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def rewrite_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), "model.norm.weight: missing"),
        (lambda t: t.update(extra=torch.ones(1)), "extra: not in the model"),
        (
            lambda t: t.update({NORM: torch.ones(4)}),
            r"model.norm.weight: shape \(4,\), the model has \(16,\)",
        ),
        (
            lambda t: t.update({NORM: torch.ones(16, dtype=torch.int8)}),
            "model.norm.weight: dtype I8",
        ),
        (
            lambda t: t.update({NORM: torch.ones(16).to(torch.float8_e4m3fn)}),
            "model.norm.weight: dtype F8",
        ),
        (
            lambda t: (t.pop(NORM), t.update(extra=torch.ones(1))),
            "extra: not .*; model.norm.weight: missing",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name_before_the_first_one(
    tmp_path, change, message
):
    model = tiny_model(tied=False)
    rewrite(export(model, tmp_path / "hf"), change)
    with pytest.raises(CheckpointError, match=message):
        next(read_hf(tmp_path / "hf", shapes_of(model), tied=False))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_an_index_that_points_outside_its_folder_is_refused(tmp_path, name):
    model = tiny_model(tied=False)
    folder = export(model, tmp_path / "hf", max_shard_bytes=4000)
    shutil.copy(next(folder.glob("model-00001*")), tmp_path / "outside.safetensors")
    rewrite_index(folder, lambda weight_map: weight_map.update({NORM: name}))
    with pytest.raises(CheckpointError, match="points outside its folder: " + name):
        next(read_hf(folder, shapes_of(model), tied=False))


def test_an_index_that_disagrees_with_its_files_is_refused(tmp_path):
    model = tiny_model(tied=False)
    folder = export(model, tmp_path / "hf", max_shard_bytes=4000)
    first = next(folder.glob("model-00001*")).name
    rewrite_index(folder, lambda weight_map: weight_map.update({NORM: first}))
    with pytest.raises(CheckpointError, match=f"{NORM}: not in {first}"):
        next(read_hf(folder, shapes_of(model), tied=False))


@pytest.mark.parametrize("damage", ["missing", "truncated", "zero-length"])
def test_a_damaged_file_is_named(tmp_path, damage):
    model = tiny_model(tied=False)
    file = export(model, tmp_path / "hf") / "model.safetensors"
    raw = file.read_bytes()
    file.unlink() if damage == "missing" else file.write_bytes(
        raw[: len(raw) // 2 * (damage == "truncated")]
    )
    with pytest.raises(CheckpointError, match="model.safetensors"):
        next(read_hf(tmp_path / "hf", shapes_of(model), tied=False))


def test_a_folder_with_pickled_weights_only_is_refused_with_the_reason(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pytorch_model.bin would execute code"):
        next(read_hf(tmp_path, {}, tied=False))


@pytest.mark.parametrize("equal", [True, False])
def test_an_alias_in_the_file_of_a_tied_model_has_to_be_equal(tmp_path, equal):
    model = tiny_model(tied=True)
    folder = export(model, tmp_path / "hf")
    embed = model.get_parameter("model.embed_tokens.weight").detach()
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": embed + (not equal)}))
    if equal:
        assert dict(read_hf(folder, shapes_of(model), tied=True)).keys() == shapes_of(model).keys()
        return
    with pytest.raises(CheckpointError, match="lm_head.weight differs .* false in config.json"):
        next(read_hf(folder, shapes_of(model), tied=True))
