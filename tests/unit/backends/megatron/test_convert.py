"""Every number of a model is in one place of megatron-core's parameters, whatever the cut."""

from __future__ import annotations

import pytest
import torch
import transformers

from nemo_like.backends.megatron.convert import WeightTable, padded_vocab_size
from nemo_like.errors import ConfigError

SHARED = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
MODELS = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "head_dim": 4}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 4, "tie_word_embeddings": True}),
    "qwen3-moe": ("Qwen3Moe", {"head_dim": 4, **EXPERTS}),
    "qwen3-moe-mixed": ("Qwen3Moe", {"num_hidden_layers": 3, "mlp_only_layers": [1], **EXPERTS}),
}
each_model = pytest.mark.parametrize("model", MODELS)
each_tp_size = pytest.mark.parametrize("tp_size", [1, 2, 4])  # 4 is more than heads of keys


def config_of(model, **changes):
    family, own = MODELS[model]
    return getattr(transformers, f"{family}Config")(**SHARED | own | changes)


def numbers_of(table):
    """Hugging Face tensors in which every element is a number of its own, from 1 on."""
    tensors, first = {}, 1
    for name, shape in table.hf_shapes.items():
        count = torch.Size(shape).numel()
        tensors[name] = torch.arange(first, first + count).reshape(shape)
        first += count
    return tensors


def block(table, hf, name, offset, shape):
    """A block of a parameter, filled by what its pieces say."""
    filled = torch.zeros(shape, dtype=torch.long)
    for piece in table.pieces(name, offset, shape):
        box = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))
        filled[piece.start : piece.start + piece.shape[0]] = hf[piece.hf_name][box]
    return filled


def local_parts(table, hf, name, parts):
    return [block(table, hf, name, *table.local_box(name, rank)) for rank in range(parts)]


def parts_of(entry, tp_size, expert_tp_size):
    if entry.tp_dim is None:
        return 1
    return expert_tp_size if entry.is_expert else tp_size


@each_model
def test_hugging_face_names_and_shapes_are_those_of_a_saved_checkpoint(model, tmp_path):
    from safetensors.torch import load_file

    config = config_of(model)
    getattr(transformers, f"{MODELS[model][0]}ForCausalLM")(config).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert WeightTable(config).hf_shapes == {name: tuple(t.shape) for name, t in saved.items()}


@pytest.mark.parametrize("model", ["llama", "llama-tied", "qwen2", "qwen3"])
def test_hugging_face_names_come_in_the_order_of_the_model(model):
    with torch.device("meta"):
        hf = getattr(transformers, f"{MODELS[model][0]}ForCausalLM")(config_of(model))
    assert [*WeightTable(config_of(model)).hf_shapes] == [name for name, _ in hf.named_parameters()]


@each_tp_size
@each_model
def test_the_parts_of_all_ranks_hold_every_number_exactly_once(model, tp_size):
    table = WeightTable(config_of(model), tp_size=tp_size, expert_tp_size=2)
    hf = numbers_of(table)
    found = [
        part.flatten()
        for name, entry in table.entries.items()
        if not (table.tied and name == "output_layer.weight")
        for part in local_parts(table, hf, name, parts_of(entry, tp_size, 2))
    ]
    numbers = torch.cat(found)
    numbers = numbers[numbers > 0].sort().values
    assert torch.equal(numbers, torch.arange(1, 1 + sum(t.numel() for t in hf.values())))


@each_tp_size
@each_model
def test_smaller_blocks_of_data_parallel_ranks_put_together_are_the_whole(model, tp_size):
    table = WeightTable(config_of(model), tp_size=tp_size)
    hf = numbers_of(table)
    for name, entry in table.entries.items():
        whole = block(table, hf, name, (0,) * len(entry.shape), entry.shape)
        cuts = [0, 1, entry.shape[0] // 2, entry.shape[0], entry.shape[0]]  # the last one is empty
        rows = [
            block(table, hf, name, (a, *[0] * (whole.ndim - 1)), (b - a, *entry.shape[1:]))
            for a, b in zip(cuts, cuts[1:], strict=False)
        ]
        assert torch.equal(torch.cat(rows), whole), name


@each_tp_size
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_q_k_and_v_are_packed_by_head_of_keys_and_cut_by_rows_alone(tp_size, kind):
    table = WeightTable(config_of("qwen2"), tp_size=tp_size)
    hf = numbers_of(table)
    q, k, v = (hf[f"model.layers.1.self_attn.{part}_proj.{kind}"] for part in "qkv")
    groups = [torch.cat([q[8 * g : 8 * g + 8], k[2 * g : 2 * g + 2], v[2 * g : 2 * g + 2]])
              for g in range(2)]  # fmt: skip
    name = f"decoder.layers.1.self_attention.linear_qkv.{kind}"
    parts = local_parts(table, hf, name, tp_size)
    assert torch.equal(torch.cat(parts), torch.cat(groups))
    assert {len(part) for part in parts} == {24 // tp_size}


@each_tp_size
def test_each_rank_keeps_its_part_of_gate_and_its_part_of_up_together(tp_size):
    table = WeightTable(config_of("qwen3-moe-mixed"), tp_size=tp_size, expert_tp_size=3)
    hf = numbers_of(table)
    for own, theirs, parts in (
        ("decoder.layers.1.mlp", "model.layers.1.mlp", tp_size),
        ("decoder.layers.2.mlp.experts.local_experts.3", "model.layers.2.mlp.experts.3", 3),
    ):
        gate, up = (hf[f"{theirs}.{part}_proj.weight"].chunk(parts) for part in ("gate", "up"))
        for rank, part in enumerate(local_parts(table, hf, f"{own}.linear_fc1.weight", parts)):
            assert torch.equal(part, torch.cat([gate[rank], up[rank]]))


@each_tp_size
def test_matrices_that_give_back_to_the_stream_are_cut_by_columns(tp_size):
    table = WeightTable(config_of("qwen3"), tp_size=tp_size)
    hf = numbers_of(table)
    for own, theirs in (
        ("decoder.layers.0.self_attention.linear_proj", "model.layers.0.self_attn.o_proj"),
        ("decoder.layers.0.mlp.linear_fc2", "model.layers.0.mlp.down_proj"),
    ):
        parts = local_parts(table, hf, f"{own}.weight", tp_size)
        assert torch.equal(torch.cat(parts, dim=1), hf[f"{theirs}.weight"])
        assert all(len(table.pieces(f"{own}.weight", *table.local_box(f"{own}.weight", r))) == 1
                   for r in range(tp_size))  # fmt: skip


@each_tp_size
@pytest.mark.parametrize("model", ["llama", "llama-tied"])
def test_the_vocabulary_is_padded_with_zeros_at_the_end_alone(model, tp_size):
    table = WeightTable(config_of(model), tp_size=tp_size)
    hf = numbers_of(table)
    head = hf["model.embed_tokens.weight" if table.tied else "lm_head.weight"]
    for name, expected in (
        ("embedding.word_embeddings.weight", hf["model.embed_tokens.weight"]),
        ("output_layer.weight", head),
    ):
        whole = torch.cat(local_parts(table, hf, name, tp_size))
        assert (
            len(whole) == padded_vocab_size(61, tp_size=tp_size) == {1: 61, 2: 62, 4: 64}[tp_size]
        )
        assert torch.equal(whole[:61], expected) and not whole[61:].any()


def test_experts_and_layers_are_named_by_their_number_in_the_whole_model():
    entries = WeightTable(config_of("qwen3-moe-mixed")).entries
    assert entries["decoder.layers.0.mlp.router.weight"].shape == (4, 16)
    assert entries["decoder.layers.1.mlp.linear_fc1.weight"].shape == (48, 16)
    fc2 = entries["decoder.layers.2.mlp.experts.local_experts.3.linear_fc2.weight"]
    assert fc2.rows[0].hf_name == "model.layers.2.mlp.experts.3.down_proj.weight"
    assert "decoder.layers.1.mlp.router.weight" not in entries


@pytest.mark.parametrize(
    ("model", "changes", "sizes", "message"),
    [
        ("llama", {"intermediate_size": 25}, {"tp_size": 2},
         r"tensor_model_parallel_size=2: decoder.layers.0.mlp.linear_fc1.weight has 50 rows"),
        ("qwen3-moe", {}, {"expert_tp_size": 5}, "expert_tensor_parallel_size=5: .*experts.0"),
        ("llama", {"attention_bias": True}, {}, "attention_bias=true.*dtensor_cfg"),
        ("llama", {"mlp_bias": True}, {}, "mlp_bias=true"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_evenly_or_has_other_biases_is_refused(model, changes, sizes, message):
    with pytest.raises(ConfigError, match=message):
        WeightTable(config_of(model, **changes), **sizes)
