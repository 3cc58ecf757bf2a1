"""One process, FSDP2, HSDP, tensor and sequence parallelism take the same steps."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

STEPS = 20
MODELS = {
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True, "vocab_size": 64},
    "qwen2": {"tie_word_embeddings": True, "vocab_size": 65},
    "llama": {"head_dim": 16, "tie_word_embeddings": False, "vocab_size": 64},
}
CLASSES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders with a config.json each."""
    root = tmp_path_factory.mktemp("models")
    for name, own in MODELS.items():
        (root / name).mkdir()
        config = {
            "model_type": name, "architectures": [CLASSES[name]], "hidden_size": 64,
            "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.08,
        }  # fmt: skip
        (root / name / "config.json").write_text(json.dumps(config | own))
    return root


def batch_of(step, vocab=64):
    from nemo_like.types import Example, TrainBatch

    g = torch.Generator().manual_seed(step)
    lengths = torch.randint(4, 24, (8,), generator=g).tolist()
    return TrainBatch.of(
        [
            Example(
                tuple(torch.randint(0, vocab, (n,), generator=g).tolist()),
                (False, False, *[True] * (n - 2)),
            )
            for n in lengths
        ]
    )


def recorded_rollouts(step):
    """The same sequences with what an engine and a judge would have said of them."""
    batch = batch_of(step)
    g = torch.Generator().manual_seed(1000 + step)
    spread = torch.randn(len(batch.lengths_B), generator=g).repeat_interleave(batch.lengths_B)
    noise = 0.3 * torch.randn(len(batch.token_ids_N), generator=g)
    return dataclasses.replace(
        batch,
        advantages_N=spread * batch.loss_mask_N,
        old_logprobs_N=(noise - 4.2) * batch.loss_mask_N,
        sampled_logprobs_N=(noise - 4.1) * batch.loss_mask_N,
        ref_logprobs_N=(noise - 4.0) * batch.loss_mask_N,
    )


class Started:
    """This rank's backend, and its shares of the batches.

    `block` is the block of its backend, under the name it has in a policy.
    """

    def __init__(self, folder, block, options):
        from nemo_like.backends.settings import BackendSettings
        from nemo_like.cluster.placement import place
        from nemo_like.config.policy import PolicyConfig
        from nemo_like.config.run import ClusterConfig
        from nemo_like.data.batching import Batching
        from nemo_like.run.build import parallel_sizes, policy_factory

        own = {name: {"enabled": True} | settings for name, settings in block.items()}
        policy = PolicyConfig(
            model_name=folder, init="random", max_total_sequence_length=64,
            train_micro_batch_size=2, precision=options.get("precision", "float32"),
            optimizer={"lr": 3e-4, "muon_ns_dtype": "float64"} | options.get("optimizer", {}),
            sequence_packing=options.get("packing", {}),
            dynamic_batching=options.get("dynamic", {}),
            logprob_chunk_size=options.get("chunk", 1024),
            **{"dtensor_cfg": {"enabled": False}} | own,
        )  # fmt: skip
        rank = int(os.environ.get("RANK", 0))
        cluster = ClusterConfig(
            gpus_per_node=0, cpu_workers_per_node=int(os.environ.get("WORLD_SIZE", 1))
        )
        placement = place(cluster, parallel_sizes(policy), gpus_found=0)
        self.is_leader = rank in placement.leaders()
        self._share = placement.num_data_parallel, placement.ranks[rank].data
        self._on_rollouts = options.get("on_rollouts", False)
        self._batching = Batching.for_training(policy)
        self.backend = policy_factory(policy, BackendSettings(seed=0))()
        self.facts = self.backend.begin(STEPS)

    def share_of(self, batch):
        from nemo_like.data.batching import shard

        number, own = self._share
        return shard(batch, number, self._batching)[own]

    def train_step(self, step):
        from nemo_like.config.loss import ClippedPGConfig
        from nemo_like.losses.clipped_pg import ClippedPG
        from nemo_like.losses.nll import NLL

        loss = ClippedPG(ClippedPGConfig()) if self._on_rollouts else NLL()
        batch = recorded_rollouts(step) if self._on_rollouts else batch_of(step)
        return self.backend.train_step(self.share_of(batch), loss)


def train_on_this_rank(folder, block, options):
    """Loss and gradient norm of every step, and the weights at the end."""
    this = Started(folder, block, options)
    backend = this.backend
    if "load" in options:
        backend.load(Path(options["load"]))
    losses, norms = [], []
    for step in range(backend.step, options.get("steps", STEPS)):
        stats = this.train_step(step)
        losses.append(stats.metrics["loss"].value)
        norms.append(stats.metrics["grad_norm"].value)
    if "save" in options:
        Path(options["save"]).mkdir(parents=True, exist_ok=True)
        backend.save(Path(options["save"]))
    weights = {name: w.clone().numpy() for name, w in backend.export_weights()}
    logprobs = backend.logprobs(this.share_of(batch_of(99)))
    backend.close()
    return {
        "losses": losses,
        "norms": norms,
        "weights": weights,
        "logprob_sum": float(logprobs.sum()),
        "is_leader": this.is_leader,
        "metrics": {name: metric.value for name, metric in stats.metrics.items()},
        "owners": {owner["name"]: owner["optimizer"] for owner in this.facts.owners},
    }


def over_ranks(results):
    """What the data-parallel leaders found, together."""
    leaders = [r for r in results if r["is_leader"]]
    assert all(r["norms"] == results[0]["norms"] for r in results), "ranks disagree on the norm"
    return {
        "losses": [sum(parts) for parts in zip(*(r["losses"] for r in leaders), strict=True)],
        "norms": results[0]["norms"],
        "weights": results[0]["weights"],
        "logprob_sum": sum(r["logprob_sum"] for r in leaders),
        "metrics": results[0]["metrics"],
        "owners": results[0]["owners"],
    }


@pytest.fixture(scope="module")
def alone(models, pool):
    """What one process finds, remembered."""
    found = {}

    def of(name, **options):
        key = json.dumps([name, options], sort_keys=True)
        if key not in found:
            found[key] = over_ranks(
                pool(1).run(
                    train_on_this_rank,
                    str(models / name),
                    {"dtensor_cfg": {}},
                    options,
                    timeout_s=120,
                )
            )
        return found[key]

    return of


def assert_same_training(found, expected, *, tolerance=1e-5):
    for key in ("losses", "norms"):
        apart = max(abs(a - b) for a, b in zip(found[key], expected[key], strict=True))
        assert apart < tolerance, f"{key} differ by {apart}"
    assert found["logprob_sum"] == pytest.approx(expected["logprob_sum"], abs=1e-2)
    for name, weight in expected["weights"].items():
        assert abs(found["weights"][name] - weight).max() < 100 * tolerance, name


TP = {"tensor_parallel_size": 2}
LAYOUTS = [
    (2, {}, "FSDP2 over 2"),
    (2, TP, "TP 2"),
    (2, TP | {"sequence_parallel": True}, "TP 2 with sequence parallelism"),
    (4, {}, "FSDP2 over 4"),
    (4, TP, "FSDP2 x TP"),
    (4, TP | {"sequence_parallel": True, "activation_checkpointing": True}, "FSDP2 x TP, SP, AC"),
    (4, {"dp_replicate_size": 2}, "HSDP"),
]


@pytest.mark.parametrize(("world", "dtensor", "label"), LAYOUTS, ids=[x[2] for x in LAYOUTS])
def test_layout_takes_the_steps_of_one_process(models, pool, alone, world, dtensor, label):
    check_layout(models, pool, alone, "qwen3", world, dtensor)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "qwen3"])
@pytest.mark.parametrize(
    ("world", "dtensor", "label"),
    [x if "SP, AC" in x[2] else pytest.param(*x, marks=pytest.mark.slow) for x in LAYOUTS],
    ids=[x[2] for x in LAYOUTS],
)
def test_other_families_take_them_too(models, pool, alone, name, world, dtensor, label):
    check_layout(models, pool, alone, name, world, dtensor)


def check_layout(models, pool, alone, name, world, dtensor):
    backend = {"dtensor_cfg": dtensor}
    results = pool(world).run(train_on_this_rank, str(models / name), backend, {}, timeout_s=120)
    assert_same_training(over_ranks(results), alone(name))


@pytest.mark.parametrize(("world", "dtensor", "label"), LAYOUTS, ids=[x[2] for x in LAYOUTS])
def test_muon_takes_the_steps_of_one_process(models, pool, alone, world, dtensor, label):
    split_heads = label in ("FSDP2 over 4", "FSDP2 x TP")
    # A small bucket, so that several are on their way at once.
    muon = {"optimizer": "muon", "muon_split_heads": split_heads, "muon_bucket_mb": 0.02}
    options = {"optimizer": muon}
    results = pool(world).run(
        train_on_this_rank, str(models / "qwen3"), {"dtensor_cfg": dtensor}, options, timeout_s=120
    )
    assert_same_training(over_ranks(results), alone("qwen3", **options))


@pytest.mark.parametrize(
    "options",
    [
        {"packing": {"enabled": True, "train_mb_tokens": 64}},
        {"dynamic": {"enabled": True, "train_mb_tokens": 64, "sequence_length_round": 8}},
        {"chunk": 5},
    ],
    ids=["packed", "dynamic", "small chunks"],
)
@pytest.mark.parametrize(
    ("world", "dtensor"),
    [(1, {}), (2, TP | {"sequence_parallel": True}), (2, {})],
    ids=["1 process", "TP 2 with SP", "FSDP2 over 2"],
)
def test_batching_and_chunks_do_not_change_training(models, pool, alone, world, dtensor, options):
    results = pool(world).run(
        train_on_this_rank, str(models / "qwen3"), {"dtensor_cfg": dtensor}, options, timeout_s=120
    )
    assert_same_training(over_ranks(results), alone("qwen3"))


def test_tensor_parallel_size_that_does_not_divide_the_heads_is_refused(models, pool):
    backend = {"dtensor_cfg": {"tensor_parallel_size": 4}}
    with pytest.raises(AssertionError, match="num_key_value_heads=2"):
        pool(4).run(train_on_this_rank, str(models / "qwen3"), backend, {}, timeout_s=60)
