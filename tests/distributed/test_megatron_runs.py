"""A run on the Megatron backend: continued to the bit, in bf16, in rows of any kind."""

import math
from pathlib import Path

import pytest
import torch
import yaml
from test_layouts import (  # noqa: F401
    STEPS,
    Started,
    alone,
    assert_same_training,
    models,
    over_ranks,
)
from test_layouts import train_on_this_rank as train

TP, PP, CP = (f"{kind}_parallel_size" for kind in ("tensor_model", "pipeline_model", "context"))
SP = {"sequence_parallel": True}


def run(pool, folder, megatron, options, *, world=2):
    found = pool(world).run(train, str(folder), {"megatron_cfg": megatron}, options, timeout_s=200)
    return over_ranks(found)


def interrupted_and_straight(folder, megatron, options, saved):
    """What is found after every step of an uninterrupted run, and of one begun anew for each."""
    import torch.distributed as dist

    def step_of(this, step):
        metrics = this.train_step(step).metrics
        weights = {name: w.clone().numpy() for name, w in this.backend.export_weights()}
        return (metrics["loss"].value, metrics["grad_norm"].value, metrics["lr"].value), weights

    block = {"megatron_cfg": megatron}
    this = Started(folder, block, options)
    straight = [step_of(this, step) for step in range(4)]
    this.backend.close()
    again = []
    for step in range(4):
        this = Started(folder, block, options)
        if step:
            this.backend.load(Path(saved) / str(step))
        again.append(step_of(this, step))
        after = Path(saved) / str(step + 1)
        after.mkdir(parents=True, exist_ok=True)
        this.backend.save(after)
        dist.barrier()
        this.backend.close()
    return straight, again


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("optimizer", "megatron"),
    [("adam", {}), ("muon", {TP: 2}), ("dist_muon", {})],
    ids=["AdamW, shared out over 2", "Muon, TP 2", "Muon, shared out over 2"],
)
def test_a_run_interrupted_after_every_step_equals_the_uninterrupted_one(
    models,  # noqa: F811
    pool,
    tmp_path,
    optimizer,
    megatron,
    precision,
):
    options = {
        "precision": precision,
        "optimizer": {"optimizer": optimizer, "muon_ns_dtype": None},
    }
    scheduler = {"scheduler": {"lr_decay_style": "cosine", "lr_warmup_iters": 2}}
    args = (str(models / "qwen3"), megatron | scheduler, options, str(tmp_path))
    for straight, again in pool(2).run(interrupted_and_straight, *args, timeout_s=200):
        assert len({numbers for numbers, _ in straight}) == 4
        for (numbers, weights), (same_numbers, same_weights) in zip(straight, again, strict=True):
            assert numbers == same_numbers
            assert all((same_weights[name] == w).all() for name, w in weights.items())


def masters_and_parameters(folder, megatron, options):
    """Train in bf16, and after every step see whether the model has the masters, rounded.

    Gives the losses, whether a norm of the model is still all ones after the first step and at the
    end, and the largest distance of its master from one after the first step.
    """
    from nemo_like.backends.megatron.weights import canonical, local_blocks

    this = Started(folder, {"megatron_cfg": megatron}, options | {"precision": "bfloat16"})
    backend = this.backend
    assert all(weight.dtype == torch.float32 for weight in backend.masters.weights().values())
    own = dict(backend.model.module.global_parameters())
    tp_rank = backend.parallel.rank("tp")
    boxes = canonical(
        backend.table, local_blocks(backend.table, own, tp_rank=tp_rank, expert_tp_rank=0)
    )
    norm = own["decoder.layers.0.pre_mlp_layernorm.weight"]
    assert {parameter.dtype for parameter in own.values()} == {torch.bfloat16}
    losses, moved, ones = [], [], []
    for step in range(STEPS):
        losses.append(this.train_step(step).metrics["loss"].value)
        whole = dict(backend.export_weights())
        rounded = {name: weight.bfloat16() for name, weight in whole.items()}
        for name, boxed in boxes.items():
            for offset, rows in boxed.boxes.items():
                place = tuple(slice(o, o + n) for o, n in zip(offset, rows.shape, strict=True))
                assert torch.equal(rows, rounded[name][place]), f"{name} after step {step}"
        master = whole["model.layers.0.post_attention_layernorm.weight"]
        moved.append(float((master - 1).abs().max()))
        ones.append(bool((norm == 1).all()))
    backend.close()
    return {
        "is_leader": this.is_leader,
        "losses": losses,
        "moved": moved[0],
        "ones": (ones[0], ones[-1]),
    }


LAYOUTS_OF_BF16 = {
    "1 process": (1, {}, "adam"),
    "TP 2, Muon": (2, {TP: 2}, "muon"),
    "DP 2, AdamW shared out": (2, {}, "adam"),
    "DP 2, Muon shared out": (2, {}, "dist_muon"),
}


@pytest.mark.parametrize("label", LAYOUTS_OF_BF16)
def test_in_bf16_the_model_has_fp32_masters_rounded_and_small_steps_add_up(
    models,  # noqa: F811
    pool,
    alone,  # noqa: F811
    label,
):
    world, megatron, optimizer = LAYOUTS_OF_BF16[label]
    options = {"optimizer": {"optimizer": optimizer}}
    results = pool(world).run(
        masters_and_parameters, str(models / "qwen3"), megatron, options, timeout_s=200
    )
    expected = alone("qwen3", optimizer={"optimizer": "adam" if optimizer == "adam" else "muon"})[
        "losses"
    ]
    leaders = [result["losses"] for result in results if result["is_leader"]]
    losses = [sum(parts) for parts in zip(*leaders, strict=True)]
    assert losses == pytest.approx(expected, abs=0.02)
    for result in results:
        # One is next to 1 - 2^-8 in bf16: a step of 3e-4 shows in the master alone, and many do.
        assert 1e-4 < result["moved"] < 1e-3
        assert result["ones"] == (True, False)


BATCHING = {
    "packed": {"packing": {"enabled": True, "train_mb_tokens": 64}},
    "dynamic": {"dynamic": {"enabled": True, "train_mb_tokens": 64, "sequence_length_round": 8}},
    "small chunks": {"chunk": 5},
}


@pytest.mark.parametrize(
    ("way", "megatron"),
    [
        ("packed", {TP: 2} | SP),
        ("packed", {CP: 2}),
        ("packed", {PP: 2}),
        ("packed", {}),
        ("dynamic", {CP: 2}),
        ("dynamic", {PP: 2}),
        ("small chunks", {TP: 2} | SP),
        ("small chunks", {CP: 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value) or "DP 2",
)
def test_batching_and_chunks_do_not_change_training(models, pool, alone, way, megatron):  # noqa: F811
    found = run(pool, models / "qwen3", megatron, BATCHING[way])
    assert_same_training(found, alone("qwen3"))


GUIDE = """
optimizer:
  optimizer: dist_muon
  lr: 1.0e-3
  min_lr: 1.0e-4
  weight_decay: 0.01
  bf16: true
  muon_momentum: 0.95
  muon_use_nesterov: true
  muon_scale_mode: spectral
  muon_fp32_matmul_prec: medium
  muon_num_ns_steps: 5
  muon_tp_mode: blockwise
  muon_extra_scale_factor: 0.2
  muon_split_qkv: true
scheduler:
  start_weight_decay: 0.01
  end_weight_decay: 0.1
  weight_decay_incr_style: linear
  lr_decay_style: cosine
  lr_decay_iters: 8
  lr_warmup_iters: 2
  lr_warmup_init: 1.0e-5
"""


def on_one_batch(folder, megatron, options):
    """Loss, learning rate and weight decay of ten steps on the same tokens; the warnings."""
    this = Started(folder, {"megatron_cfg": megatron}, options)
    metrics = [this.train_step(0).metrics for _ in range(10)]
    this.backend.close()
    found = [[m[name].value for name in ("loss", "lr", "weight_decay")] for m in metrics]
    return found, this.facts.outlook


def test_the_settings_of_megatrons_muon_train_as_they_are(models, pool):  # noqa: F811
    megatron = yaml.safe_load(GUIDE) | {TP: 2}
    options = {"precision": "bfloat16", "optimizer": {"muon_ns_dtype": None}}
    args = (str(models / "qwen3"), megatron, options)
    found, outlook = pool(2).run(on_one_batch, *args, timeout_s=200)[0]
    losses, rates, decays = zip(*found, strict=True)
    assert losses[-1] < losses[0] - 0.2
    assert "depends on tensor_model_parallel_size" in outlook["muon_tp_mode=blockwise"]
    cosine = [1e-4 + 9e-4 * (1 + math.cos(math.pi * t / 6)) / 2 for t in range(7)]
    assert rates == pytest.approx([1e-5, (1e-5 + 1e-3) / 2, *cosine, 1e-4])
    assert decays == pytest.approx([0.01 + 0.09 * step / STEPS for step in range(10)])
