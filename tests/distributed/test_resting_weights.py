"""What FSDP2 gathers for a computation never reaches a checkpoint or an export."""

import json
from pathlib import Path

import pytest
import torch

CONFIG = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 32, "head_dim": 16,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
    "vocab_size": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a config.json."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return str(folder)


def backend_of(model, dtensor, *, seed=0, precision="bfloat16"):
    from nemo_like.backends.factory import BackendFactory
    from nemo_like.backends.settings import BackendSettings
    from nemo_like.config.policy import PolicyConfig

    policy = PolicyConfig(
        model_name=model, init="random", precision=precision, max_total_sequence_length=64,
        optimizer={"optimizer": "muon", "lr": 1e-2}, dtensor_cfg=dtensor,
    )  # fmt: skip
    backend = BackendFactory(policy, BackendSettings(seed=seed))()
    backend.begin(10)
    return backend


def shard_of(step):
    """This rank's part of eight sequences, two to a micro-batch."""
    import torch.distributed as dist

    from nemo_like.data.batching import Batching, shard
    from nemo_like.types import Example, TrainBatch

    g = torch.Generator().manual_seed(step)
    examples = [
        Example(tuple(torch.randint(0, 64, (9,), generator=g).tolist()), (False, *[True] * 8))
        for _ in range(8)
    ]
    num = dist.get_world_size() if dist.is_initialized() else 1
    return shard(TrainBatch.of(examples), num, Batching("plain", 2))[
        dist.get_rank() if num > 1 else 0
    ]


def weights_after(backend):
    return {name: weight.clone() for name, weight in backend.export_weights()}


def ask_save_and_resume(model, folder):
    """The weights when log-probabilities were asked for before the save, and when they were not."""
    from nemo_like.losses.nll import NLL

    asked, straight = backend_of(model, {}), backend_of(model, {})
    for backend in (asked, straight):
        backend.train_step(shard_of(0), NLL())
    asked.logprobs(shard_of(7))
    exported = weights_after(asked)
    asked.save(Path(folder), with_optimizer=True)
    resumed = backend_of(model, {}, seed=1)
    resumed.load(Path(folder))
    for backend in (resumed, straight):
        backend.train_step(shard_of(1), NLL())
    result = exported, weights_after(resumed), weights_after(straight)
    for backend in (resumed, straight, asked):
        backend.close()
    return [{name: w.numpy() for name, w in weights.items()} for weights in result]


@pytest.mark.parametrize("world", [1, 2])
def test_a_resume_after_log_probabilities_takes_the_same_step(pool, model, tmp_path, world):
    results = pool(world).run(ask_save_and_resume, model, str(tmp_path), timeout_s=120)
    for exported, resumed, straight in results:
        assert {str(w.dtype) for w in exported.values()} == {"float32"}
        norm = torch.from_numpy(exported["model.norm.weight"])
        assert not torch.equal(norm, norm.bfloat16().float()), "the export is rounded to bfloat16"
        assert all((resumed[name] == straight[name]).all() for name in straight)


def export_between_forward_and_backward(model):
    from nemo_like.backends.base import parts_of

    backend = backend_of(model, {})
    backend._logprobs(parts_of(shard_of(0))[0])
    try:
        next(backend.export_weights())
    except AssertionError as error:
        return str(error)
    finally:
        backend.close()
    return "nothing was refused"


def test_gathered_weights_are_refused(pool, model):
    for said in pool(2).run(export_between_forward_and_backward, model, timeout_s=60):
        assert "FSDP2 still holds model.embed_tokens.weight" in said


def count_sums_over_copies(model):
    """All-reduces of a forward and backward pass of several micro-batches."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from nemo_like.backends.base import parts_of

    class Sums(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func.name() == "c10d::allreduce_"
            return func(*args, **(kwargs or {}))

    backend = backend_of(model, {"dp_replicate_size": 2}, precision="float32")
    parts = parts_of(shard_of(0))
    with Sums() as seen:
        backend._backward(parts, lambda _, logprobs: logprobs.sum())
    backend.close()
    return len(parts), seen.count


def test_copies_add_up_their_gradients_once_per_step(pool, model):
    for num_micro_batches, count in pool(2).run(count_sums_over_copies, model, timeout_s=60):
        assert num_micro_batches == 2
        assert count == 3  # one for each of two layers, one for the rest
