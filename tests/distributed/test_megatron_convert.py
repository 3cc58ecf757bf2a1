"""A Hugging Face model is the same model in megatron-core, in every layout, and comes back."""

from __future__ import annotations

import zlib

import pytest
import torch

from nemo_like.checkpoint.store import StateWriter, load_state

BASE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": 61,
    "tie_word_embeddings": False,
}  # fmt: skip
MODELS = {
    "llama": ("LlamaConfig", {"head_dim": 8}),
    "llama, one head of keys": ("LlamaConfig", {"num_key_value_heads": 1}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}),
    "moe": ("Qwen3MoeConfig", {
        "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "norm_topk_prob": True, "mlp_only_layers": [1]}),
}  # fmt: skip
TP2 = {"tensor_model_parallel_size": 2}
SP = {**TP2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
CASES = {
    "llama, tp2": (2, "llama", TP2),
    "tp2 of one head of keys": (2, "llama, one head of keys", TP2),
    "qwen2, tied, biases, pp2": (2, "qwen2", PP2),
    "qwen3, tied, norms of heads": (1, "qwen3", {}),
    "moe, ep2": (2, "moe", EP2),
    "moe, tp2, etp2": (2, "moe", SP | {"expert_tensor_parallel_size": 2}),
    "moe, ep2, tp2, pp2": (4, "moe", SP | EP2 | PP2),
    "qwen3, tp2, pp2": (4, "qwen3", TP2 | PP2),
}  # fmt: skip


def hf_config_of(model):
    import transformers

    class_name, own = MODELS[model]
    return getattr(transformers, class_name)(**BASE | own)


def tokens():
    return torch.randint(0, 61, (3, 14), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(model)`: a folder with the model and a checkpoint of it, and what it answers."""
    made = {}

    def make(model):
        import transformers

        from nemo_like.backends.hf_models import random_weights
        from nemo_like.checkpoint.hf_export import write_hf

        if model not in made:
            config, folder = hf_config_of(model), tmp_path_factory.mktemp("model")
            weights = {}
            for name, weight in random_weights(config, 5):  # biases and norms must matter too
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                weights[name] = weight + 0.1 * torch.randn(weight.shape, generator=generator)
            write_hf(folder, weights.items(), config=config.to_dict(), tokenizer=None)
            with StateWriter(asynchronous=False) as writer:
                writer.save(folder, {"checkpoint": {"weights": weights}})
            hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            ids = tokens()
            with torch.no_grad():
                logprobs = hf.eval()(ids).logits[:, :-1].log_softmax(-1)
            made[model] = folder, weights, logprobs.gather(-1, ids[:, 1:, None])[..., 0]
        return made[model]

    return make


def stage_of(model, keys):
    from nemo_like.backends.megatron import model as models
    from nemo_like.backends.megatron import parallel as layouts
    from nemo_like.config.policy import PolicyConfig

    policy = PolicyConfig(
        precision="float32", dtensor_cfg={"enabled": False}, megatron_cfg={"enabled": True} | keys
    )
    cpu = torch.device("cpu")
    parallel = layouts.initialize(policy.megatron_cfg, cpu)
    return models.build_model(policy, hf_config_of(model), parallel, cpu), parallel, policy


def answers(model, parallel, policy):
    """Log-probabilities of each token after the first one. Shapes: [R, T - 1]."""
    from nemo_like.backends.megatron.schedule import run
    from nemo_like.ops.packing import rows_of
    from nemo_like.types import Example, TrainBatch

    ids = tokens().tolist()
    batch = TrainBatch.of([Example(tuple(row), (False, *[True] * (len(row) - 1))) for row in ids])
    rows = rows_of(batch, tuple((i,) for i in range(len(ids))), multiple=policy.sequence_divisor)
    model.eval()
    return run(model, parallel, [rows])[0].view(len(ids), -1)


def in_and_out(model, keys, folder, out):
    """The answers, whether each way out gives the file's tensors, and all parameters' names."""
    from safetensors.torch import load_file

    from nemo_like.backends.megatron.convert import WeightTable
    from nemo_like.backends.megatron.weights import (
        WholeWeights,
        canonical,
        load_weights,
        local_blocks,
    )
    from nemo_like.checkpoint.hf_import import read_hf_lazily

    ddp, parallel, policy = stage_of(model, keys)
    try:
        table = WeightTable(
            hf_config_of(model), tp_size=parallel.size("tp"), expert_tp_size=parallel.size("etp")
        )
        parameters = dict(ddp.module.global_parameters())
        blocks = local_blocks(
            table, parameters, tp_rank=parallel.rank("tp"), expert_tp_rank=parallel.rank("etp")
        )
        file = load_file(folder / "model.safetensors")

        def comes_back():
            whole = dict(WholeWeights(table, blocks))
            assert [*whole] == [*table.hf_shapes]
            return whole.keys() == file.keys() and all(whole[n].equal(file[n]) for n in whole)

        forget(parameters)
        load_weights(table, blocks, read_hf_lazily(folder, table.hf_shapes, tied=table.tied))
        from_file, logprobs = comes_back(), answers(ddp, parallel, policy)
        forget(parameters)
        load_state(folder / "checkpoint", {"weights": canonical(table, blocks)})
        from_checkpoint = comes_back()
        with StateWriter(asynchronous=False) as writer:
            writer.save(out, {"checkpoint": {"weights": canonical(table, blocks)}})
        return logprobs, (from_file, from_checkpoint)
    finally:
        parallel.destroy()


@torch.no_grad()
def forget(parameters):
    for parameter in parameters.values():
        parameter.fill_(float("nan"))


@pytest.mark.parametrize("case", CASES)
def test_weights_mean_the_same_and_return_to_the_bit(pool, saved, tmp_path, case):
    world, model, keys = CASES[case]
    folder, weights, expected = saved(model)
    for logprobs, same in pool(world).run(in_and_out, model, keys, folder, tmp_path, timeout_s=180):
        assert float((logprobs - expected).abs().max()) < 1e-5
        assert same == (True, True)
    template = {"weights": {name: torch.zeros_like(w) for name, w in weights.items()}}
    loaded = load_state(tmp_path / "checkpoint", template)["weights"]
    assert all(loaded[name].equal(weights[name]) for name in weights)


def shards_in_and_out(folder):
    """Whether weights return from rows that data-parallel ranks share out."""
    from safetensors.torch import load_file
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    from nemo_like.backends.megatron.convert import WeightTable
    from nemo_like.backends.megatron.weights import LocalBlock, WholeWeights, load_weights

    file = load_file(folder / "model.safetensors")
    file["model.norm.weight"].neg_()[:3] = -0.0
    table = WeightTable(hf_config_of("qwen3"), tp_size=2)
    mesh = init_device_mesh("cpu", (4,))
    masters = {
        name: distribute_tensor(torch.full(entry.shape, float("nan")), mesh, [Shard(0)])
        for name, entry in table.entries.items()
    }
    blocks = {}
    for name, master in masters.items():
        _, offset = compute_local_shape_and_global_offset(master.shape, mesh, master.placements)
        blocks[name] = LocalBlock(master.to_local(), offset)
    load_weights(table, blocks, file.items())
    whole = dict(WholeWeights(table, blocks))
    assert (
        masters["output_layer.weight"].full_tensor()[:61].equal(whole["model.embed_tokens.weight"])
    )
    return all(whole[n].view(torch.int32).equal(file[n].view(torch.int32)) for n in file)


def test_rows_that_data_parallel_ranks_share_out_return_to_the_bit(pool, saved):
    folder, _, _ = saved("qwen3")
    assert pool(4).run(shards_in_and_out, folder, timeout_s=180) == [True] * 4
