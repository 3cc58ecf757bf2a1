"""Where a model's weights come from, what of them is refused, and how they leave again."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_like.data.batching import Batching, shard
from nemo_like.errors import CheckpointError, ConfigError
from nemo_like.losses.nll import NLL

FAMILIES = pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])


def loss_of_transformers(folder, batch, temperature=1.0):
    """The mean over targets, one unpadded sequence at a time, by the model's own class."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, start = 0.0, 0
    for length in batch.lengths_B.tolist():
        ids = batch.token_ids_N[start : start + length]
        mask = batch.loss_mask_N[start : start + length]
        with torch.no_grad():
            logits = model(ids[None]).logits[0] / temperature
        picked = logits[:-1].log_softmax(-1)[torch.arange(length - 1), ids[1:]]
        total -= float(picked[mask[1:]].double().sum())
        start += length
    return total / batch.num_loss_tokens


@FAMILIES
def test_pretrained_loss_is_that_of_transformers(make_backend, models, batch_of, family):
    backend, batch = make_backend(family, init="pretrained"), batch_of(3)
    part = shard(batch, 1, Batching("plain", 4))[0]
    expected = loss_of_transformers(models / family, batch)
    assert -float(backend.logprobs(part).double().sum()) / batch.num_loss_tokens == pytest.approx(
        expected, abs=1e-5
    )
    assert backend.train_step(part, NLL()).metrics["loss"].value == pytest.approx(
        expected, abs=1e-5
    )


@FAMILIES
def test_log_probabilities_are_of_logits_divided_by_the_temperature(
    make_backend, models, batch_of, family
):
    backend, batch = make_backend(family, init="pretrained", temperature=0.7), batch_of(3)
    part = shard(batch, 1, Batching("plain", 4))[0]
    found = -float(backend.logprobs(part).double().sum()) / batch.num_loss_tokens
    assert found == pytest.approx(loss_of_transformers(models / family, batch, 0.7), abs=1e-5)


@FAMILIES
def test_weights_leave_as_they_came_to_the_bit(make_backend, models, family):
    file = load_file(models / family / "model.safetensors")
    exported = dict(make_backend(family, init="pretrained").export_weights())
    file.pop("lm_head.weight", None) if "lm_head.weight" not in exported else None
    assert exported.keys() == file.keys()
    assert all(torch.equal(exported[name], file[name]) for name in file)


def test_weights_in_bfloat16_are_held_in_fp32_without_loss(make_backend, models, tmp_path):
    folder = copied(models / "llama", tmp_path)
    change(folder, lambda tensors: {n: t.bfloat16() for n, t in tensors.items()})
    backend = make_backend(model_name=str(folder), init="pretrained", precision="bfloat16")
    file = load_file(folder / "model.safetensors")
    for name, tensor in backend.export_weights():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, file[name].float())


def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "model")


def change(folder, how):
    file = folder / "model.safetensors"
    save_file(how(load_file(file)), file, metadata={"format": "pt"})


def change_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


Q = "model.layers.0.self_attn.q_proj.weight"
DAMAGES = {
    "missing": (lambda t: {n: v for n, v in t.items() if n != Q}, f"{Q}: missing"),
    "extra": (
        lambda t: t | {"model.extra.weight": t[Q].clone()},
        "model.extra.weight: not in the model",
    ),
    "misshapen": (lambda t: t | {Q: t[Q][:-1].contiguous()}, f"{Q}: shape (63, 32), the model has"),
    "of integers": (lambda t: t | {Q: t[Q].to(torch.int8)}, f"{Q}: dtype I8"),
    "untied": (
        lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1},
        "tie_word_embeddings, and lm_head.weight differs",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_that_do_not_fit_the_model_are_refused(make_backend, models, tmp_path, damage):
    how, message = DAMAGES[damage]
    folder = copied(models / "qwen3", tmp_path)
    change(folder, how)
    with pytest.raises(CheckpointError) as caught:
        make_backend(model_name=str(folder), init="pretrained")
    assert message in str(caught.value)


def test_a_truncated_file_is_refused(make_backend, models, tmp_path):
    folder = copied(models / "qwen3", tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="model.safetensors is damaged"):
        make_backend(model_name=str(folder), init="pretrained")


def test_a_folder_without_weights_is_refused(make_backend, models, tmp_path):
    folder = copied(models / "qwen3", tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises((CheckpointError, ConfigError), match="safetensors"):
        make_backend(model_name=str(folder), init="pretrained")


def test_a_pickle_in_the_place_of_weights_is_refused(make_backend, models, tmp_path):
    folder = copied(models / "qwen3", tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="would execute code"):
        make_backend(model_name=str(folder), init="pretrained")


def test_another_family_is_refused_with_those_that_are_supported(make_backend, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ConfigError, match=r"'gpt2' is not supported.*llama, qwen2, qwen3"):
        make_backend(model_name=str(tmp_path))


def test_a_family_that_nobody_knows_is_refused(make_backend, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen97"}))
    with pytest.raises(ConfigError, match="qwen97"):
        make_backend(model_name=str(tmp_path))


def test_code_that_comes_with_a_model_is_refused(make_backend, models, tmp_path):
    folder = copied(models / "qwen3", tmp_path)
    change_config(
        folder,
        model_type="mine",
        auto_map={"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.MineLM"},
    )
    (folder / "code.py").write_text("raise SystemExit('executed')")
    with pytest.raises(ConfigError, match="mine"):
        make_backend(model_name=str(folder), init="pretrained")


def test_an_override_of_an_unknown_field_is_refused(make_backend):
    with pytest.raises(ConfigError, match=r"policy\.hf_config_overrides\.hidden_sice.*hidden_size"):
        make_backend(hf_config_overrides={"hidden_sice": 64})


def test_an_override_makes_another_model(make_backend):
    backend = make_backend(hf_config_overrides={"num_hidden_layers": 3})
    assert backend.begin(1).model["num_hidden_layers"] == 3
    assert "model.layers.2.mlp.up_proj.weight" in dict(backend.export_weights())


def test_offloading_from_a_cpu_is_refused(make_backend):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match=r"policy\.dtensor_cfg\.cpu_offload=true"):
        make_backend(dtensor_cfg={"cpu_offload": True})


def test_newborn_weights_are_a_function_of_the_seed_alone(make_backend):
    torch.manual_seed(1)
    first = dict(make_backend(seed=5).export_weights())
    torch.manual_seed(2)
    torch.rand(3)
    again = dict(make_backend(seed=5, optimizer={"optimizer": "muon"}).export_weights())
    other = dict(make_backend(seed=6).export_weights())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first[Q], other[Q])


def test_facts_count_tied_weights_once_and_name_every_owner(make_backend):
    tied, untied = make_backend("qwen3").begin(3), make_backend("llama").begin(3)
    for facts, head in ((tied, False), (untied, True)):
        names = [owner["name"] for owner in facts.owners]
        assert len(set(names)) == len(names) and ("lm_head.weight" in names) == head
    exported = make_backend("qwen3").export_weights()
    assert tied.num_parameters == sum(w.numel() for _, w in exported)
    assert tied.num_multiplied_parameters == tied.num_parameters
    embedding = dict(make_backend("llama").export_weights())["model.embed_tokens.weight"]
    assert untied.num_multiplied_parameters == untied.num_parameters - embedding.numel()
    chosen = {"num_experts": 8, "num_experts_per_tok": 2}
    owners = [
        {"name": f"model.layers.0.mlp.experts.{i}.up_proj.weight", "shape": [3, 5]}
        for i in range(8)
    ]
    mixture = replace(
        tied, model=chosen, owners=[*owners, {"name": "lm_head.weight", "shape": [7]}]
    )
    assert mixture.num_multiplied_parameters == 2 * 15 + 7
    assert (tied.world_size, tied.threads, tied.model["model_type"]) == (1, 1, "qwen3")


def test_the_model_is_described_without_where_it_came_from(make_backend, models, tmp_path):
    """Else a moved folder or another version would make a checkpoint foreign."""
    moved = copied(models / "qwen3", tmp_path)
    described = [make_backend().begin(1), make_backend(model_name=str(moved)).begin(1)]
    assert described[0].model == described[1].model
    assert str(models) not in json.dumps(described[0].model, default=str)


def test_the_description_survives_json(make_backend):
    model = make_backend().begin(1).model
    assert json.loads(json.dumps(model)).keys() == model.keys()


def test_a_process_group_that_was_there_before_outlives_the_backend(make_backend):
    import torch.distributed as dist

    outer, inner = make_backend(), make_backend()
    inner.close()
    inner.close()
    assert dist.is_initialized()
    outer.close()
    assert not dist.is_initialized()
