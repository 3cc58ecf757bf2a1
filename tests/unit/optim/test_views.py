from __future__ import annotations

import math
import re
from itertools import chain
from pathlib import Path

import pytest
import torch
from muon_by_hand import polar_by_hand
from torch import Tensor, nn

from nemo_like.config.optimizer import OptimizerConfig
from nemo_like.errors import ConfigError
from nemo_like.optim.build import build_optimizer
from nemo_like.optim.views import (
    INTERLEAVED_GATE_UP,
    STORED_IN_OUT,
    WHOLE,
    AttentionShape,
    View,
    attention_shape,
    view_of,
)

FP64 = torch.float64
COLUMNS, HEADS, KV_HEADS, HEAD_DIM, INNER, EXPERTS = 10, 4, 2, 3, 6, 3
PER_GROUP = HEADS // KV_HEADS


def shape_of(family: str = "", **more) -> AttentionShape:
    return AttentionShape(HEADS, KV_HEADS, HEAD_DIM, family=family, **more)


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=FP64, generator=torch.Generator().manual_seed(seed))


def qkv() -> list[Tensor]:
    rows = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)
    return [matrix(r, COLUMNS, seed=i) for i, r in enumerate(rows)]


def gate_up(*lead: int) -> list[Tensor]:
    return [matrix(*lead, INNER, COLUMNS, seed=i) for i in range(2)]


def stacked(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, dim=-2)


def by_group(parts: list[Tensor]) -> Tensor:
    """Megatron's order: the queries of a group, its key, its value; then the next group."""
    q, k, v = parts
    rows = [
        (q[g * PER_GROUP * HEAD_DIM : (g + 1) * PER_GROUP * HEAD_DIM], k[own], v[own])
        for g in range(KV_HEADS)
        for own in [slice(g * HEAD_DIM, (g + 1) * HEAD_DIM)]
    ]
    return torch.cat(list(chain.from_iterable(rows)))


def by_rank(parts: list[Tensor]) -> Tensor:
    """Gate and up of the first half of the neurons, then those of the second half."""
    gate, up = parts
    half = INNER // 2
    return torch.cat([gate[:half], up[:half], gate[half:], up[half:]])


def by_neuron(parts: list[Tensor]) -> Tensor:
    """A row of gate, a row of up, and so on."""
    return torch.stack(parts, dim=-2).flatten(-3, -2)


def transposed(pack):
    return lambda parts: pack(parts).mT.contiguous()


def update(matrix_or_stack: Tensor) -> Tensor:
    """What Muon makes of every matrix of [..., rows, columns], with a scale that sees the sides."""
    if matrix_or_stack.ndim > 2:
        return torch.stack([update(m) for m in matrix_or_stack])
    rows, columns = matrix_or_stack.shape
    return polar_by_hand(matrix_or_stack) * math.sqrt(rows / columns)


def update_through(view: View, packed: Tensor) -> Tensor:
    return view.merge([update(part) for part in view.split(packed)], packed.shape)


def update_heads(parts: list[Tensor]) -> list[Tensor]:
    return [torch.cat([update(head) for head in part.split(HEAD_DIM)]) for part in parts]


PACKED_QKV = {
    "Phi-3": ("self_attn.qkv_proj.weight", "phi3", stacked),
    "GPT-2": ("attn.c_attn.weight", "gpt2", transposed(stacked)),
    "GPT-NeoX": ("attention.query_key_value.weight", "gpt_neox", by_group),
    "Megatron": ("self_attention.linear_qkv.weight", "", by_group),
    "Megatron's Phi-3": ("self_attention.linear_qkv.weight", "phi3", by_group),
}
GATE_UP = {
    "Phi-3": ("mlp.gate_up_proj.weight", "phi3", stacked, ()),
    "Granite's shared expert": ("shared_mlp.input_linear.weight", "granitemoehybrid", stacked, ()),
    "stacked experts": ("mlp.experts.gate_up_proj", "qwen3_moe", stacked, (EXPERTS,)),
    "Llama 4": ("mlp.experts.gate_up_proj", "llama4_text", transposed(stacked), (EXPERTS,)),
    "gpt-oss": ("mlp.experts.gate_up_proj", "gpt_oss", transposed(by_neuron), (EXPERTS,)),
    "Megatron": ("mlp.linear_fc1.weight", "", by_rank, ()),
    "Megatron's experts": ("mlp.experts.linear_fc1.weight2", "", by_rank, ()),
}


@pytest.mark.parametrize(("name", "family", "pack"), PACKED_QKV.values(), ids=PACKED_QKV)
def test_packed_q_k_and_v_are_updated_as_if_they_were_apart(name, family, pack):
    packed = pack(qkv())
    view = view_of([name], packed.shape, attention=shape_of(family))
    expected = pack([update(part) for part in qkv()])
    torch.testing.assert_close(update_through(view, packed), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("split_qkv", [True, False])
@pytest.mark.parametrize(("name", "family", "pack"), PACKED_QKV.values(), ids=PACKED_QKV)
def test_packed_heads_are_updated_as_if_they_were_apart(name, family, pack, split_qkv):
    packed, attention = pack(qkv()), shape_of(family)
    view = view_of([name], packed.shape, attention=attention, split_qkv=split_qkv, split_heads=True)
    expected = pack(update_heads(qkv()))
    torch.testing.assert_close(update_through(view, packed), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("position", range(3))
def test_heads_of_separate_matrices_are_updated_as_if_they_were_apart(position):
    whole = qkv()[position]
    name = f"self_attn.{'qkv'[position]}_proj.weight"
    view = view_of([name], whole.shape, attention=shape_of(), split_heads=True)
    (expected,) = update_heads([whole])
    torch.testing.assert_close(update_through(view, whole), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("name", "family", "pack", "lead"), GATE_UP.values(), ids=GATE_UP)
def test_packed_gate_and_up_are_updated_as_if_they_were_apart(name, family, pack, lead):
    packed = pack(gate_up(*lead))
    view = view_of([name], packed.shape, attention=shape_of(family, gate_up_groups=2))
    expected = pack([update(part) for part in gate_up(*lead)])
    torch.testing.assert_close(update_through(view, packed), expected, rtol=0, atol=1e-14)


def test_a_matrix_stored_in_out_is_scaled_as_the_matrix_it_is():
    whole = matrix(INNER, COLUMNS)
    view = view_of(["h.0.mlp.c_fc.weight"], whole.mT.shape, attention=shape_of("gpt2"))
    torch.testing.assert_close(update_through(view, whole.mT), update(whole).mT, rtol=0, atol=1e-14)


VIEWS = {
    "whole": (WHOLE, (6, 4)),
    "whole experts": (WHOLE, (3, 6, 4)),
    "stored in-out": (View(transposed=True), (3, 6, 4)),
    "heads": (View(heads=(3,)), (6, 4)),
    "stacked": (View(sizes=(4, 2, 2)), (8, 5)),
    "groups": (View(groups=2, sizes=(4, 2, 2)), (16, 5)),
    "heads of groups": (View(groups=2, sizes=(4, 2, 2), heads=(4, 2, 2)), (16, 5)),
    "interleaved": (View(groups=4, sizes=(1, 1), transposed=True), (3, 5, 8)),
    "experts and heads": (View(groups=2, sizes=(4, 2), heads=(4, 2)), (2, 3, 12, 5)),
}


@pytest.mark.parametrize(("view", "shape"), VIEWS.values(), ids=VIEWS)
def test_merge_undoes_split_to_the_bit(view, shape):
    whole = matrix(*shape)
    assert torch.equal(view.merge(view.split(whole), shape), whole)


@pytest.mark.parametrize(("view", "shape"), VIEWS.values(), ids=VIEWS)
def test_shapes_are_known_without_a_tensor(view, shape):
    assert view.shapes(shape) == [tuple(part.shape) for part in view.split(matrix(*shape))]


def test_nothing_is_cut_that_is_not_packed_or_not_asked_for():
    names = ["self_attn.o_proj.weight", "self_attn.q_proj.weight", "mlp.gate_proj.weight"]
    assert {view_of([name], (12, 12), attention=shape_of()) for name in names} == {WHOLE}
    assert view_of(["o_proj.weight"], (12, 12), attention=shape_of(), split_heads=True) == WHOLE
    off = {"split_qkv": False, "split_gate_up": False}
    assert view_of(["qkv_proj.weight"], (24, 12), **off) == WHOLE
    assert view_of(["gate_up_proj.weight"], (24, 12), **off) == WHOLE
    # JetMoE's experts of attention: no gate in there.
    assert view_of(["self_attention.experts.input_linear.weight"], (8, 12, 12)) == WHOLE


def test_a_mlp_without_gate_is_left_whole():
    shape = shape_of(gate_up_groups=0)
    assert view_of(["mlp.linear_fc1.weight"], (12, 12), attention=shape) == WHOLE


FOUND = {
    "rows of other heads": (
        ("self_attn.qkv_proj.weight", (25, 10), shape_of("phi3")),
        {},
        "qkv_proj.weight: found 25 rows, expected 24 .*muon_split_qkv=false",
    ),
    "a family of which nothing is known": (
        ("attn.qkv_proj.weight", (24, 10), shape_of("codegen")),
        {},
        "family 'codegen'.*muon_split_qkv=false",
    ),
    "q, k and v of an unknown model": (
        ("linear_qkv.weight", (24, 10), None),
        {},
        "without a known attention shape.*muon_split_qkv=false",
    ),
    "an odd number of rows": (
        ("mlp.gate_up_proj.weight", (7, 10), shape_of("phi3")),
        {},
        "found 7 rows.*muon_split_gate_up=false",
    ),
    "a perhaps gated MLP": (
        ("mlp.linear_fc1.weight", (8, 10), shape_of()),
        {},
        "gate_up_groups.*muon_split_gate_up=false",
    ),
    "rows of other packed heads": (
        ("self_attention.linear_qkv.weight", (25, 10), shape_of()),
        {"split_heads": True},
        "found 25 rows, .*muon_split_qkv=false and policy.optimizer.muon_split_heads=false",
    ),
    "heads of another size": (
        ("self_attn.k_proj.weight", (12, 10), shape_of()),
        {"split_heads": True},
        "found 12 rows, expected 2 heads of 3 rows.*muon_split_heads=false",
    ),
    "latent attention": (
        ("self_attn.kv_b_proj.weight", (12, 10), shape_of()),
        {"split_heads": True},
        "latent attention.*muon_split_heads=false",
    ),
}


@pytest.mark.parametrize(("arguments", "settings", "message"), FOUND.values(), ids=FOUND)
def test_what_does_not_fit_is_refused_and_the_key_is_named(arguments, settings, message):
    name, shape, attention = arguments
    with pytest.raises(ConfigError, match=message):
        view_of([name], shape, attention=attention, **settings)


# What transformers' models really store.

TINY = {
    "vocab_size": 17,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GQA = {"num_key_value_heads": 2}
MIXTURE = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1}
ATTENTION = {
    "phi3": ("qkv_proj.weight", "o_proj.weight", GQA),
    "gpt_neox": ("query_key_value.weight", "attention.dense.weight", {}),
    "bloom": ("query_key_value.weight", "self_attention.dense.weight", {"n_head": 4, "n_layer": 1}),
    "persimmon": ("query_key_value.weight", "self_attn.dense.weight", {"qk_layernorm": False}),
    "gpt2": ("c_attn.weight", "attn.c_proj.weight", {"n_head": 4, "n_layer": 1, "n_embd": 16}),
    "mpt": ("Wqkv.weight", "attn.out_proj.weight", {"n_heads": 4, "n_layers": 1, "d_model": 16}),
}
MLP = {
    "phi3": ("mlp.gate_up_proj.weight", "mlp.down_proj.weight", GQA),
    "glm4": ("mlp.gate_up_proj.weight", "mlp.down_proj.weight", GQA | {"head_dim": 4}),
    "qwen3_moe": ("experts.gate_up_proj", "experts.down_proj", GQA | {"moe_intermediate_size": 12}),
    "llama4_text": (
        "experts.gate_up_proj",
        "experts.down_proj",
        GQA | {"moe_layers": [0], "layer_types": ["full_attention"], "no_rope_layers": [1]},
    ),
    "gpt_oss": ("experts.gate_up_proj", "experts.down_proj", GQA | {"head_dim": 4}),
}


def tiny_model(family: str, **settings):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**TINY, **settings})
    torch.manual_seed(0)
    config._experts_implementation = "eager"
    return AutoModelForCausalLM.from_config(config, dtype=FP64, attn_implementation="eager").eval()


def named(model, ending: str) -> tuple[str, Tensor]:
    (found,) = [(n, p) for n, p in model.named_parameters() if n.endswith(ending)]
    return found


def logits(model) -> Tensor:
    tokens = torch.arange(1, 13).reshape(2, 6)
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize(("family", "by_head"), [(f, h) for f in ATTENTION for h in (False, True)])
def test_the_rows_taken_for_q_k_and_v_act_as_such_in_the_model(family, by_head):
    packed_name, output_name, settings = ATTENTION[family]
    model = tiny_model(family, **settings)
    name, weight = named(model, packed_name)
    attention = attention_shape(model.config)
    view = view_of([name], weight.shape, attention=attention, split_heads=by_head)
    expected, before = logits(model), weight.detach().clone()
    q, k, v = view.split(before.clone())
    factors = 2.0 ** torch.arange(1, k.shape[0] + 1, dtype=FP64)[:, None, None]
    rescaled = [q * factors.repeat_interleave(q.shape[0] // k.shape[0], dim=0), k / factors, v]
    weight.data.copy_(view.merge(rescaled, weight.shape))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-14)
    weight.data.copy_(view.merge([q, k, v * 0], weight.shape))
    without_values = logits(model)
    weight.data.copy_(before)
    named(model, output_name)[1].data.zero_()
    torch.testing.assert_close(without_values, logits(model), rtol=0, atol=1e-14)
    assert not torch.allclose(without_values, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("family", MLP)
def test_without_the_rows_taken_for_gate_the_mlp_is_silent(family):
    packed_name, output_name, settings = MLP[family]
    model = tiny_model(family, **{**MIXTURE, **settings})
    name, weight = named(model, packed_name)
    expected, before = logits(model), weight.detach().clone()
    view = view_of([name], weight.shape, attention=attention_shape(model.config))
    gate, up = view.split(before.clone())
    weight.data.copy_(view.merge([gate * 0, up], weight.shape))
    without_gate = logits(model)
    weight.data.copy_(before)
    named(model, output_name)[1].data.zero_()
    torch.testing.assert_close(without_gate, logits(model), rtol=0, atol=1e-14)
    assert not torch.allclose(without_gate, expected, rtol=0, atol=1e-8)


def test_every_model_of_transformers_with_unusual_experts_is_known():
    import transformers

    files = (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")
    text = {file.parent.name: file.read_text() for file in files}
    in_out = {
        family
        for family, code in text.items()
        if re.search(
            r"is_transposed=True|gate_up_proj = nn\.Parameter\([^,]*, self\.hidden_[a-z]*,", code
        )
    }
    interleaved = {family for family, code in text.items() if "is_concatenated=False" in code}
    assert in_out and in_out <= STORED_IN_OUT.keys()
    assert interleaved == INTERLEAVED_GATE_UP


# One optimizer over a fused model, one over the same model with its matrices apart.

APART = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def apart(name: str, whole: Tensor) -> dict[str, Tensor]:
    """Phi-3's tensor as Llama's: 4 heads of q, 2 of k and of v; as much gate as up."""
    packed = next((key for key in APART if key in name), None)
    if packed is None:
        return {name: whole}
    rows = whole.shape[0]
    sizes = [rows // 2, rows // 4, rows // 4] if packed == "qkv_proj" else [rows // 2] * 2
    names = [name.replace(packed, part) for part in APART[packed]]
    return dict(zip(names, whole.split(sizes), strict=True))


def exact_muon(parameters, attention: AttentionShape, **settings):
    settings |= {"muon_ns_dtype": "float64", "muon_scale_mode": "shape_scaling"}
    config = OptimizerConfig(optimizer="muon", lr=0.02, weight_decay=0.1, **settings)
    return build_optimizer(parameters.items(), config, attention=attention)[0]


@pytest.mark.parametrize("by_head", [False, True])
def test_phi3_takes_the_steps_of_the_llama_with_the_same_matrices(by_head):
    fused = tiny_model("phi3", **GQA)
    parts = tiny_model("llama", **GQA)
    ours, theirs = dict(fused.named_parameters()), dict(parts.named_parameters())
    for name, whole in ours.items():
        for part, value in apart(name, whole.detach()).items():
            theirs[part].data.copy_(value)
    torch.testing.assert_close(logits(fused), logits(parts), rtol=0, atol=1e-14)
    settings = {"muon_split_heads": by_head, "muon_use_nesterov": True}
    optimizers = [
        exact_muon(named, attention_shape(model.config), **settings)
        for model, named in ((fused, ours), (parts, theirs))
    ]
    tokens = torch.arange(1, 13).reshape(2, 6)
    for _ in range(3):
        fused.zero_grad()
        fused(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        for name, whole in ours.items():
            for part, gradient in apart(name, whole.grad).items():
                theirs[part].grad = gradient
        for optimizer in optimizers:
            optimizer.step()
    for name, whole in ours.items():
        for part, value in apart(name, whole.detach()).items():
            torch.testing.assert_close(value, theirs[part].detach(), rtol=0, atol=1e-14)


def pairs(order: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Megatron's (or gpt-oss's) tensors, and the same matrices one by one under Hugging Face's."""
    if order == "megatron":
        packed = {"linear_qkv.weight": by_group(qkv()), "linear_fc1.weight": by_rank(gate_up())}
        return packed, dict(zip("qkvgu", [*qkv(), *gate_up()], strict=True))
    stack = gate_up(EXPERTS)
    packed = {"experts.gate_up_proj": transposed(by_neuron)(stack)}
    return packed, {f"{i}{j}": stack[i][j] for i in range(2) for j in range(EXPERTS)}


@pytest.mark.parametrize("order", ["megatron", "gpt_oss"])
def test_a_reordered_or_stacked_tensor_takes_the_steps_of_its_matrices(order):
    def packed_again(values: list[Tensor]) -> list[Tensor]:
        if order == "megatron":
            return [by_group(values[:3]), by_rank(values[3:])]
        stack = [torch.stack(values[:EXPERTS]), torch.stack(values[EXPERTS:])]
        return [transposed(by_neuron)(stack)]

    ours, theirs = ({n: nn.Parameter(t) for n, t in side.items()} for side in pairs(order))
    attention = shape_of(order, gate_up_groups=2)
    optimizers = [exact_muon(ours, attention), exact_muon(theirs, attention)]
    for step in range(3):
        for i, parameter in enumerate(theirs.values()):
            parameter.grad = matrix(*parameter.shape, seed=100 * step + i)
        gradients = packed_again([p.grad for p in theirs.values()])
        for parameter, gradient in zip(ours.values(), gradients, strict=True):
            parameter.grad = gradient
        for optimizer in optimizers:
            optimizer.step()
    expected = packed_again([p.detach() for p in theirs.values()])
    for parameter, value in zip(ours.values(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=0, atol=1e-14)
