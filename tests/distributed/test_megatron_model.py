"""Every layout of the Megatron backend agrees with the Hugging Face model of the same weights."""

import pytest
import torch

TEMPERATURE = 0.9
SHARED = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "vocab_size": 61,
    "attn_implementation": "eager",
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
MODELS = {
    "llama": ("Llama", {"head_dim": 8, "rope_parameters": LLAMA3}),
    "llama, one key head": ("Llama", {"num_key_value_heads": 1}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "moe": ("Qwen3Moe", {
        "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "moe, weights as they are": ("Qwen3Moe", {
        "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "norm_topk_prob": False, "router_aux_loss_coef": 0.5}),
}  # fmt: skip

TP2 = {"tensor_model_parallel_size": 2}
SP = {**TP2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
ETP2 = {"expert_tensor_parallel_size": 2}
FULL = {"activation_checkpointing": True}
SELECTIVE = {**FULL, "recompute_granularity": "selective"}
ALLGATHER = {"moe_token_dispatcher_type": "allgather"}
AT_THE_END = {"distributed_data_parallel_config": {"overlap_grad_reduce": False}}
PACKED = {"packed": True}
LAYOUTS = {
    ("llama", 2): {
        "dp": ({}, {}),
        "dp, reduced at the end": (AT_THE_END, PACKED),
        "tp": (TP2, {}),
        "pp": (PP2, PACKED),
        "pp, uneven": (PP2 | {"num_layers_in_first_pipeline_stage": 1}, {}),
        "cp": (CP2, {}),
        "cp, packed": (CP2, PACKED),
        "bf16": (SP, {"precision": "bfloat16", "tolerance": 0.1}),
    },
    ("llama, one key head", 2): {"tp": (TP2, PACKED)},
    ("qwen2", 2): {
        "dp, recompute": (FULL, PACKED),
        "tp, recompute attention": (TP2 | SELECTIVE, {}),
        "sp, recompute": (SP | FULL, {}),
        "sp, recompute mlp": (SP | SELECTIVE | {"recompute_modules": ("mlp", "core_attn")}, {}),
    },
    ("qwen3", 2): {"tp": (TP2, PACKED), "sp": (SP, PACKED), "pp": (PP2, {}), "cp": (CP2, PACKED)},
    ("moe", 2): {
        "dp": ({}, PACKED),
        "ep": (EP2, PACKED),
        "ep, cp, allgather": (EP2 | CP2 | ALLGATHER, PACKED),
        "etp": (ETP2, {}),
        "etp, sp": (SP | ETP2, {}),
        "ep, sp": (SP | EP2, PACKED),
        "whole experts, sp": (SP, {}),
        "pp, recompute experts": (PP2 | SELECTIVE | {"recompute_modules": ("moe",)}, PACKED),
        "router in fp64": ({"moe_router_dtype": "fp64"}, {}),
        "routers frozen": ({"freeze_moe_router": True}, {}),
    },
    ("moe, weights as they are", 2): {"dp": ({}, {})},
    ("qwen3", 4): {"sp, pp": (SP | PP2, PACKED), "cp, dp": (CP2, PACKED)},
    ("moe", 4): {"ep, etp, sp": (SP | EP2 | ETP2, PACKED), "ep, pp": (EP2 | PP2, {})},
}  # fmt: skip


def config_of(model_name):
    import transformers

    class_name, own = MODELS[model_name]
    return getattr(transformers, f"{class_name}Config")(**SHARED | own)


def a_batch():
    from nemo_like.types import Example, TrainBatch

    generator = torch.Generator().manual_seed(3)
    return TrainBatch.of(
        [
            Example(
                tuple(torch.randint(0, 61, (n,), generator=generator).tolist()),
                (False, *[i % 3 > 0 for i in range(n - 1)]),
            )
            for n in (5, 17, 9, 3, 12, 20, 7, 11)
        ]
    )


def loss_of_some(logprobs, targets, num_loss_tokens):
    """A loss that tells tokens apart."""
    return -(logprobs * (1 + targets % 3)).sum() / num_loss_tokens


def by_hub_name(tensors):
    """transformers keeps all experts of a layer in one tensor, checkpoints on the hub do not."""
    named = {}
    for name, tensor in tensors.items():
        stem, _, part = name.rpartition(".")
        if part == "gate_up_proj":
            for i, both in enumerate(tensor):
                gate, up = both.chunk(2)
                named |= {f"{stem}.{i}.gate_proj.weight": gate, f"{stem}.{i}.up_proj.weight": up}
        elif part == "down_proj":
            named |= {f"{stem}.{i}.down_proj.weight": down for i, down in enumerate(tensor)}
        else:
            named[name] = tensor
    return named


def expected_of(model_name):
    """Weights, log-probabilities of every sequence's targets and gradients of transformers."""
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, f"{MODELS[model_name][0]}ForCausalLM")(config_of(model_name))
    for name, p in model.named_parameters():
        p.data.normal_(1.0 if "norm" in name else 0.0, 0.2)
    batch, logprobs = a_batch(), []
    for i in range(batch.num_sequences):
        one = batch.select([i])
        logits = model(one.token_ids_N[None], use_cache=False).logits[0] / TEMPERATURE
        targets = one.token_ids_N[one.loss_mask_N]
        positions = one.loss_mask_N.nonzero()[:, 0] - 1
        found = logits.log_softmax(-1)[positions].gather(1, targets[:, None])[:, 0]
        loss_of_some(found, targets, batch.num_loss_tokens).backward()
        logprobs.append(found.detach())
    named = dict(model.named_parameters())
    weights = by_hub_name({n: p.data for n, p in named.items()})
    return weights, logprobs, by_hub_name({n: p.grad for n, p in named.items()})


def micro_batches_of(replica, num_replicas, *, packed):
    """The sequences of a replica's rows; one replica's last micro-batch may be empty."""
    plan = [[[0, 3], [1]], [[2, 4]], [[5]], [[6, 7]], []]
    if not packed:
        plan = [[[s] for row in micro_batch for s in row] for micro_batch in plan]
    return (plan + [[]])[replica::num_replicas]


def part_of(table, name, parallel, whole):
    """The part of a parameter that this rank holds, from whole tensors by Hugging Face name."""
    dim = "etp" if table.entries[name].is_expert else "tp"
    offset, shape = table.local_box(name, parallel.rank(dim))
    part = torch.zeros(shape)
    for piece in table.pieces(name, offset, shape):
        box = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))
        part[piece.start : piece.start + piece.shape[0]] = whole[piece.hf_name][box]
    return part


def compare_on_this_rank(model_name, layouts, expected):
    """How far each layout is off, by what is compared; and names of trained parameters."""
    found = {}
    for case, (keys, options) in layouts.items():
        try:
            found[case] = compare(model_name, keys, options, *expected)
        except BaseException as error:
            error.add_note(f"in the layout {case!r} of {model_name}")
            raise
    return found


def with_model(model_name, keys, options, weights, use):
    """What `use(model, parallel, table, rows, micro_batches)` returns in a layout."""
    from nemo_like.backends.megatron.convert import WeightTable
    from nemo_like.backends.megatron.model import build_model
    from nemo_like.backends.megatron.parallel import initialize
    from nemo_like.config.policy import PolicyConfig
    from nemo_like.ops.packing import rows_of

    policy = PolicyConfig(
        precision=options.get("precision", "float32"), logprob_chunk_size=7,
        dtensor_cfg={"enabled": False}, megatron_cfg={"enabled": True} | keys,
    )  # fmt: skip
    parallel = initialize(policy.megatron_cfg, torch.device("cpu"))
    try:
        model = build_model(
            policy, config_of(model_name), parallel, torch.device("cpu"), temperature=TEMPERATURE
        )
        table = WeightTable(
            config_of(model_name), tp_size=parallel.size("tp"), expert_tp_size=parallel.size("etp")
        )
        for name, parameter in model.module.global_parameters():
            parameter.data.copy_(part_of(table, name, parallel, weights))
        micro_batches = micro_batches_of(
            parallel.rank("dp"), parallel.size("dp"), packed=options.get("packed", False)
        )
        rows = []
        for micro_batch in micro_batches:
            sequences = [s for row in micro_batch for s in row]
            place = {s: i for i, s in enumerate(sequences)}
            local = tuple(tuple(place[s] for s in row) for row in micro_batch)
            rows.append(
                rows_of(a_batch().select(sequences), local, multiple=policy.sequence_divisor)
            )
        return use(model, parallel, table, rows, micro_batches)
    finally:
        parallel.destroy()


def compare(model_name, keys, options, weights, logprobs, grads):
    from nemo_like.backends.megatron.schedule import run

    def use(model, parallel, table, rows, micro_batches):
        def loss_of(number, found):
            assert parallel.is_last_stage
            return loss_of_some(found, rows[number].target_M, a_batch().num_loss_tokens)

        model.train()
        run(model, parallel, rows, loss_of)  # what it leaves behind must not count
        trained = run(model, parallel, rows, loss_of)
        model.eval()
        gaps = {}
        for mode, results in (("train", trained), ("eval", run(model, parallel, rows))):
            for number, (result, micro_batch) in enumerate(
                zip(results, micro_batches, strict=True)
            ):
                wanted = [logprobs[s] for row in micro_batch for s in row] or [torch.zeros(0)]
                assert not result.requires_grad and result.dtype == torch.float32
                gap = (result - torch.cat(wanted)).abs()
                gaps[f"{mode} {number}"] = gap.max().item() if len(gap) else 0.0
        names = set()
        for name, parameter in model.module.global_parameters():
            if parameter.requires_grad:
                assert parameter.main_grad.dtype == torch.float32
                wanted = part_of(table, name, parallel, grads)
                scale = max(float(grads[r.hf_name].abs().max()) for r in table.entries[name].rows)
                gaps[name] = float((parameter.main_grad - wanted).abs().max()) / scale
                names.add(name)
        return gaps, names

    return with_model(model_name, keys, options, weights, use)


@pytest.fixture(scope="module")
def expected():
    found = {}
    return lambda name: found[name] if name in found else found.setdefault(name, expected_of(name))


@pytest.mark.parametrize(("model_name", "world"), LAYOUTS)
def test_a_layout_has_the_log_probabilities_and_gradients_of_transformers(
    pool, expected, model_name, world
):
    from nemo_like.backends.megatron.convert import WeightTable

    layouts = LAYOUTS[model_name, world]
    answers = pool(world).run(
        compare_on_this_rank, model_name, layouts, expected(model_name), timeout_s=180
    )
    entries = set(WeightTable(config_of(model_name)).entries)
    for case, (keys, options) in layouts.items():
        tolerance = options.get("tolerance", 2e-5)
        for answer in answers:
            far = {what: gap for what, gap in answer[case][0].items() if not gap < tolerance}
            assert far == {}, f"{case}: {far}"
        missing = entries.difference(*(answer[case][1] for answer in answers))
        tied = (
            config_of(model_name).tie_word_embeddings and "pipeline_model_parallel_size" not in keys
        )
        frozen = {n for n in entries if "router" in n} if "freeze_moe_router" in keys else set()
        assert missing == frozen | ({"output_layer.weight"} if tied else set()), case


def routers_on_this_rank(model_name, layouts, weights):
    """The gradients of the routers in each layout, without any other loss."""
    from nemo_like.backends.megatron.schedule import run

    def use(model, parallel, table, rows, micro_batches):
        model.train()
        run(model, parallel, rows, lambda number, logprobs: 0.0 * logprobs.sum())
        return {
            name: parameter.main_grad.clone().numpy()
            for name, parameter in model.module.global_parameters()
            if "router" in name
        }

    return [with_model(model_name, keys, options, weights, use) for keys, options in layouts]


def test_the_loss_that_evens_out_the_experts_is_the_same_in_every_layout(pool, expected):
    model_name = "moe, weights as they are"
    balance = {"moe_router_load_balancing_type": "aux_loss"}
    layouts = [
        ({**keys, **balance}, PACKED) for keys in (EP2, SP, CP2 | EP2, FULL, PP2)
    ] + [({}, PACKED)]  # fmt: skip
    answers = pool(2).run(
        routers_on_this_rank, model_name, layouts, expected(model_name)[0], timeout_s=180
    )
    first, *others, without = answers[0]
    assert all(abs(grad).max() > 1e-4 for grad in first.values())
    assert all(not grad.any() for grad in without.values())
    for layout in others:
        for name, grad in layout.items():
            assert abs(grad - first[name]).max() < 1e-4 * abs(first[name]).max(), name


def grids_on_this_rank(keys):
    """The ranks that megatron-core put into this rank's group for each dimension of the grids."""
    import torch.distributed as dist

    from nemo_like.backends.megatron.parallel import initialize
    from nemo_like.config.megatron import MegatronConfig

    parallel = initialize(MegatronConfig(**keys), torch.device("cpu"))
    try:
        found = {"stage": (parallel.rank("pp"), parallel.is_first_stage, parallel.is_last_stage)}
        grids = {
            ("pp", "dp", "cp", "tp"): parallel.grid.ranks,
            ("pp", "edp", "ep", "etp"): parallel.grid.expert_ranks,
        }
        for dims, grid in grids.items():
            here = tuple(parallel.rank(dim) for dim in dims)
            assert grid[here] == dist.get_rank()
            for i, dim in enumerate(dims):
                found[dim] = grid.movedim(i, 0)[:, *here[:i], *here[i + 1 :]].tolist()
                assert found[dim] == dist.get_process_group_ranks(parallel.group(dim))
                assert parallel.size(dim) == len(found[dim])
        return found
    finally:
        parallel.destroy()
        parallel.destroy()


def test_megatron_cores_groups_are_lines_of_the_grids(pool):
    def rows(answers, dim):
        return [answer[dim] for answer in answers]

    answers = pool(4).run(grids_on_this_rank, SP | PP2 | EP2, timeout_s=180)
    assert rows(answers, "stage") == [(0, True, False)] * 2 + [(1, False, True)] * 2
    assert rows(answers, "tp") == rows(answers, "ep") == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert rows(answers, "dp") == rows(answers, "edp") == [[0], [1], [2], [3]]
    answers = pool(4).run(grids_on_this_rank, CP2 | ETP2, timeout_s=180)
    assert rows(answers, "cp") == rows(answers, "etp") == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert rows(answers, "dp") == rows(answers, "edp") == [[0, 2], [1, 3], [0, 2], [1, 3]]


def cpu_on_this_rank():
    """What of torch and megatron-core differs inside and after the context; what it refuses."""
    from unittest.mock import patch

    from megatron import core
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import random

    from nemo_like.backends.megatron.cpu import mcore_on_cpu
    from nemo_like.errors import ConfigError

    def state():
        return (schedules.torch, random._get_cuda_rng_state, torch.Tensor.cuda)

    before = state()
    with mcore_on_cpu():
        assert all(now is not then for now, then in zip(state(), before, strict=True))
        assert torch.cuda.current_device is not schedules.torch.cuda.current_device
    assert all(now is then for now, then in zip(state(), before, strict=True))
    try:
        with patch.object(core, "__version__", "0.17.0"), mcore_on_cpu():
            return "not refused"
    except ConfigError as error:
        return str(error)


def test_without_a_gpu_one_version_is_helped_and_all_is_undone_afterwards(pool):
    for message in pool(2).run(cpu_on_this_rank):
        assert "megatron-core 0.17.0 is installed" in message and "only 0.16.1" in message
