"""Every layout of the Megatron backend has the log-probabilities and gradients of one process."""

import zlib

import pytest
import torch

BASE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "vocab_size": 61,
}  # fmt: skip
MODELS = {
    "llama": ("LlamaConfig", {"head_dim": 8, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16}}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}),
    "moe": ("Qwen3MoeConfig", {
        "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "norm_topk_prob": True, "mlp_only_layers": [1]}),
}  # fmt: skip


def full_tensor(name, shape):
    """A whole tensor that depends on its name alone, with norms near one and small matrices."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(shape, generator=generator) * 0.2
    return noise + 1 if "layernorm" in name else noise


def part_of(name, whole, parallel):
    """The part of a whole tensor that this rank holds."""
    dim = "etp" if "experts" in name else "tp"
    size, rank = parallel.size(dim), parallel.rank(dim)
    if "embedding" in name or "output_layer" in name:
        whole = torch.cat((whole, whole.new_zeros(-len(whole) % size, whole.shape[1])))
    if "linear_fc1" in name:  # gate and up
        return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
    if "linear_proj" in name or "linear_fc2" in name:
        return whole.chunk(size, 1)[rank]
    if "linear_qkv" in name or "embedding" in name or "output_layer" in name:
        return whole.chunk(size)[rank]
    return whole


def whole_name(name, tied):
    """Of a tied model's two copies the first one's name."""
    return name.replace("output_layer", "embedding.word_embeddings") if tied else name


def batch(vocab):
    from nemo_like.types import Example, TrainBatch

    generator = torch.Generator().manual_seed(3)
    lengths = [5, 17, 9, 3, 12, 20, 7, 11]
    return TrainBatch.of(
        [
            Example(
                tuple(torch.randint(0, vocab, (n,), generator=generator).tolist()),
                (False, *[i % 3 > 0 for i in range(n - 1)]),
            )
            for n in lengths
        ]
    )


def run_on_this_rank(model_name, keys, options, shapes, reference):
    """Log-probabilities of this rank's targets, and gradients (or how far those are off)."""
    import transformers

    from nemo_like.backends.megatron import model as models
    from nemo_like.backends.megatron import parallel as layouts
    from nemo_like.backends.megatron.schedule import run
    from nemo_like.config.policy import PolicyConfig
    from nemo_like.ops.packing import rows_of

    class_name, own = MODELS[model_name]
    hf_config = getattr(transformers, class_name)(**BASE | own | options.get("model", {}))
    policy = PolicyConfig(
        precision=options.get("precision", "float32"), logprob_chunk_size=options.get("chunk", 7),
        dtensor_cfg={"enabled": False}, megatron_cfg={"enabled": True} | keys,
    )  # fmt: skip
    parallel = layouts.initialize(policy.megatron_cfg, torch.device("cpu"))
    try:
        model = models.build_model(
            policy, hf_config, parallel, torch.device("cpu"), temperature=0.9
        )
        tied = hf_config.tie_word_embeddings
        named = {whole_name(name, tied): p for name, p in model.module.global_parameters()}
        for name, p in named.items():
            whole = full_tensor(name, shapes[name] if shapes else p.shape)
            p.data.copy_(part_of(name, whole, parallel))
        whole_batch = batch(hf_config.vocab_size)
        packed = options.get("packed", False)
        micro_batches = [((0, 3), (1,)), ((2, 4),), ((5,),), ((6, 7),)]
        if not packed:
            micro_batches = [tuple((s,) for row in mb for s in row) for mb in micro_batches]
        dp, dp_rank = parallel.size("dp"), parallel.rank("dp")
        rows = []
        for micro_batch in micro_batches[dp_rank::dp]:
            order = [s for row in micro_batch for s in row]
            numbers = iter(range(len(order)))
            local = tuple(tuple(next(numbers) for _ in row) for row in micro_batch)
            rows.append(rows_of(whole_batch.select(order), local, multiple=policy.sequence_divisor))

        def loss_of(number, logprobs):
            weights = 1 + rows[number].target_M % 3
            return -(logprobs * weights).sum() / whole_batch.num_loss_tokens

        model.train()
        logprobs = run(model, parallel, rows, loss_of)
        grads = {name: p.main_grad.float() for name, p in named.items() if p.requires_grad}
        model.eval()
        again = run(model, parallel, rows)
        forward_gap = max(float((a - b).abs().max()) for a, b in zip(logprobs, again, strict=True))
        if reference is None:
            return logprobs, {n: g.clone() for n, g in grads.items()}, forward_gap
        expected_logprobs, expected = reference
        gaps = {
            f"logprobs {i}": float((a - b).abs().max())
            for i, (a, b) in enumerate(zip(logprobs, expected_logprobs[dp_rank::dp], strict=True))
        }
        for name, grad in grads.items():
            want = part_of(name, expected[name], parallel)
            gaps[name] = float((grad - want).abs().max() / expected[name].abs().max())
        return gaps, sorted(grads), forward_gap
    finally:
        parallel.destroy()


_references = {}


def reference_of(pool, model_name, options):
    key = (model_name, repr(sorted(options.get("model", {}).items())))
    if key not in _references:
        plain = {"model": options.get("model", {})}
        ((logprobs, grads, gap),) = pool(1).run(
            run_on_this_rank, model_name, {}, plain, None, None, timeout_s=180
        )
        assert gap < 1e-6
        _references[key] = (logprobs, grads)
    return _references[key]


TP2 = {"tensor_model_parallel_size": 2}
SP = {**TP2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
FULL = {"activation_checkpointing": True}
SELECTIVE = {**FULL, "recompute_granularity": "selective", "recompute_modules": ("core_attn",)}
PACKED = {"packed": True}
CASES = {
    "packed": (1, "llama", {}, PACKED),
    "recompute": (1, "qwen2", FULL, PACKED),
    "recompute attention": (1, "qwen2", SELECTIVE, {}),
    "tp2": (2, "llama", TP2, {}),
    "tp2 tied, heads' norms": (2, "qwen3", TP2, PACKED),
    "tp2, fewer key heads": (2, "llama", TP2, {"model": {"num_key_value_heads": 1}}),
    "sp": (2, "qwen3", SP, PACKED),
    "sp, recompute": (2, "qwen2", SP | FULL, {}),
    "pp2": (2, "llama", PP2, PACKED),
    "pp2 tied": (2, "qwen3", PP2, {}),
    "pp2 uneven": (2, "llama", PP2 | {"num_layers_in_first_pipeline_stage": 1}, {}),
    "cp2": (2, "qwen3", CP2, {}),
    "cp2 packed": (2, "llama", CP2, PACKED),
    "dp2": (2, "qwen2", {}, PACKED),
    "dp2, reduced at the end": (
        2, "llama", {"distributed_data_parallel_config": {"overlap_grad_reduce": False}}, {}),
    "moe, dp2": (2, "moe", {}, {}),
    "ep2": (2, "moe", EP2, PACKED),
    "ep2, cp2, allgather": (
        2, "moe", EP2 | CP2 | {"moe_token_dispatcher_type": "allgather"}, PACKED),
    "etp2": (2, "moe", {"expert_tensor_parallel_size": 2}, {}),
    "etp2, tp2": (2, "moe", SP | {"expert_tensor_parallel_size": 2}, {}),
    "ep2, tp2": (2, "moe", SP | EP2, PACKED),
    "whole experts under tp2": (2, "moe", SP, {}),
    "ep2, etp2": (4, "moe", SP | EP2 | {"expert_tensor_parallel_size": 2}, PACKED),
    "ep2, pp2": (4, "moe", EP2 | PP2, {}),
    "tp2, pp2": (4, "qwen3", SP | PP2, PACKED),
    "cp2, dp2": (4, "llama", CP2, PACKED),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_layout_has_the_gradients_of_one_process(pool, case):
    world, model_name, keys, options = CASES[case]
    reference = reference_of(pool, model_name, options)
    shapes = {name: tuple(g.shape) for name, g in reference[1].items()}
    answers = pool(world).run(
        run_on_this_rank, model_name, keys, options, shapes, reference, timeout_s=180
    )
    for gaps, _, forward_gap in answers:
        assert {n: g for n, g in gaps.items() if not g < 1e-5} == {}
        assert forward_gap < 1e-6
    seen = {name for _, names, _ in answers for name in names}
    assert seen == set(shapes)
