"""One optimizer step on one rank: what never reaches the weights, and what never changes a loss."""

from dataclasses import dataclass

import pytest
import torch

from nemo_like.config.policy import PolicyConfig
from nemo_like.data.batching import Batching, shard
from nemo_like.errors import MismatchError, NonFiniteError, NoSignalError
from nemo_like.losses.nll import NLL
from nemo_like.types import Metric


@dataclass
class BadLoss:
    """NLL, but one micro-batch's share of the loss becomes something else."""

    at: int
    factor: float
    calls: int = 0

    def __call__(self, logprobs_N, batch):
        share, metrics = NLL()(logprobs_N, batch)
        self.calls += 1
        return (share * self.factor if self.calls == self.at + 1 else share), metrics


@dataclass
class BadGradient:
    """NLL whose value is fine and whose gradient is not."""

    value: float

    def __call__(self, logprobs_N, batch):
        share, metrics = NLL()(logprobs_N, batch)
        share.register_hook(lambda g: g * self.value)
        return share * 1.0, metrics


def one_shard(batch, *, size=2):
    return shard(batch, 1, Batching("plain", size))[0]


def everything(backend):
    """A copy of all that a step may change."""
    weights = {name: w.clone() for name, w in backend.export_weights()}
    tree = backend.optimizer.state_tree()
    state = {
        f"{name}/{key}": tensor.clone()
        for name, tensors in tree["state"].items()
        for key, tensor in tensors.items()
    }
    return weights | state, tree["steps"], backend.step


def assert_untouched(backend, before, *, steps_later=0):
    tensors, counts, step = everything(backend)
    assert all(torch.equal(tensors[name], before[0][name]) for name in before[0])
    assert counts == before[1] and step == before[2] + steps_later


OPTIMIZERS = pytest.mark.parametrize("optimizer", ["adam", "muon", "sgd"])
FAULTS = {
    "NaN loss": lambda: BadLoss(2, float("nan")),
    "infinite loss": lambda: BadLoss(2, float("inf")),
    "negative infinite loss": lambda: BadLoss(2, float("-inf")),
    "NaN gradient": lambda: BadGradient(float("nan")),
    "infinite gradient": lambda: BadGradient(float("inf")),
}


@OPTIMIZERS
@pytest.mark.parametrize("fault", FAULTS)
def test_a_value_that_is_not_finite_never_reaches_weights_or_optimizer(
    make_backend, batch_of, optimizer, fault
):
    backend = make_backend(optimizer={"optimizer": optimizer, "lr": 1e-2})
    backend.train_step(one_shard(batch_of(0)), NLL())
    before = everything(backend)
    with pytest.raises(NonFiniteError) as caught:
        backend.train_step(one_shard(batch_of(1)), FAULTS[fault]())
    assert_untouched(backend, before)
    assert str(caught.value).startswith("step 2: ")
    assert "skip_non_finite_steps" in str(caught.value)


@pytest.mark.parametrize("micro_batch", [0, 2, 3])
def test_the_error_names_rank_and_micro_batch(make_backend, batch_of, micro_batch):
    backend = make_backend()
    with pytest.raises(NonFiniteError, match=f"rank 0, micro-batch {micro_batch}: loss nan"):
        backend.train_step(one_shard(batch_of(0)), BadLoss(micro_batch, float("nan")))


def test_an_infinite_gradient_of_finite_losses_names_rank_and_parameters(make_backend, batch_of):
    backend = make_backend()
    with pytest.raises(NonFiniteError, match=r"rank 0: gradient of model\.embed_tokens\.weight"):
        backend.train_step(one_shard(batch_of(0)), BadGradient(float("nan")))


def test_after_the_error_nothing_is_left_of_the_bad_gradient(make_backend, batch_of):
    backend, untouched = make_backend(), make_backend()
    with pytest.raises(NonFiniteError):
        backend.train_step(one_shard(batch_of(0)), BadLoss(0, float("nan")))
    for each in (backend, untouched):
        each.train_step(one_shard(batch_of(1)), NLL())
    assert_untouched(backend, everything(untouched))


class FarFromTheEngine(NLL):
    """NLL of tokens that the engine gave other probabilities, in every second micro-batch."""

    calls = 0

    def __call__(self, logprobs_N, batch):
        share, metrics = super().__call__(logprobs_N, batch)
        type(self).calls += 1
        error = Metric(1.0 + 0.4 * (self.calls % 2), "mean", weight=1.0)
        return share, metrics | {"token_mult_prob_error": error}


@OPTIMIZERS
def test_tokens_that_the_engine_gave_other_probabilities_never_reach_weights_or_optimizer(
    make_backend, batch_of, optimizer
):
    strict = make_backend(mismatch_limit=1.1, optimizer={"optimizer": optimizer, "lr": 0.01})
    strict.train_step(one_shard(batch_of(0)), NLL())
    before = everything(strict)
    with pytest.raises(MismatchError, match=r"step 2: .* 1\.2000 per token .* most 1\.1 .*top_p=1"):
        strict.train_step(one_shard(batch_of(1)), FarFromTheEngine())
    assert_untouched(strict, before)
    assert all(p.grad is None for p in strict.model.parameters())


def test_a_mean_error_within_the_limit_is_no_mismatch(make_backend, batch_of):
    backend = make_backend(mismatch_limit=1.25)
    backend.train_step(one_shard(batch_of(1)), FarFromTheEngine())
    assert backend.step == 1


def test_steps_within_the_budget_are_skipped_counted_and_change_nothing(make_backend, batch_of):
    backend = make_backend(skip_budget=2)
    before = everything(backend)
    for skipped in (1, 2):
        stats = backend.train_step(one_shard(batch_of(0)), BadLoss(0, float("nan")))
        assert stats.metrics["skipped_steps"].value == skipped and stats.skipped
        assert_untouched(backend, before, steps_later=skipped)
    with pytest.raises(NonFiniteError, match="2 steps were skipped before"):
        backend.train_step(one_shard(batch_of(0)), BadLoss(0, float("nan")))


def test_all_updates_of_a_step_have_its_learning_rate_however_many_there_are(
    make_backend, batch_of
):
    backend = make_backend(steps=4, scheduler={"lr_decay_style": "linear"})

    def rate(step):
        stats = backend.train_step(one_shard(batch_of(0)), NLL(), step=step)
        return stats.metrics["lr"].value

    rates = [rate(step) for step in (1, 1, 2, 3, 3, 3)]
    assert rates == pytest.approx([0.01, 0.01, 0.0075, 0.005, 0.005, 0.005])
    assert rate(None) == pytest.approx(0.0025)


def test_a_skipped_step_uses_up_its_place_in_the_schedule(make_backend, batch_of):
    policy = {"scheduler": {"lr_decay_style": "linear"}}
    backend = make_backend(skip_budget=1, steps=4, **policy)
    rates = []
    for factor in (1.0, float("nan"), 1.0, 1.0):
        stats = backend.train_step(one_shard(batch_of(0)), BadLoss(0, factor))
        rates.append(stats.metrics["lr"].value)
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == 4


def test_the_used_up_budget_survives_save_and_load(make_backend, batch_of, tmp_path):
    backend = make_backend(skip_budget=1)
    backend.train_step(one_shard(batch_of(0)), BadLoss(0, float("nan")))
    backend.save(tmp_path, with_optimizer=True)
    later = make_backend(skip_budget=1, seed=1)
    later.load(tmp_path)
    assert (later.step, later.skipped_steps) == (1, 1)
    with pytest.raises(NonFiniteError, match="1 steps were skipped before"):
        later.train_step(one_shard(batch_of(0)), BadLoss(0, float("nan")))


@OPTIMIZERS
def test_a_loaded_backend_goes_on_to_the_bit(make_backend, batch_of, tmp_path, optimizer):
    settings = {"optimizer": {"optimizer": optimizer, "lr": 1e-2}}
    straight = make_backend(**settings)
    for step in range(2):
        straight.train_step(one_shard(batch_of(step)), NLL())
    straight.save(tmp_path, with_optimizer=True)
    resumed = make_backend(seed=1, **settings)
    resumed.load(tmp_path)
    for backend in (straight, resumed):
        backend.train_step(one_shard(batch_of(2)), NLL())
    assert_untouched(resumed, everything(straight))


def trained(backend, batch_of, batching, *, steps=3):
    """Losses and gradient norms of a few steps, and the weights after them."""
    found = []
    for step in range(steps):
        stats = backend.train_step(shard(batch_of(step), 1, batching)[0], NLL())
        found += [stats.metrics["loss"].value, stats.metrics["grad_norm"].value]
    return found, dict(backend.export_weights())


def in_fp64(backend):
    """The same backend computing in double precision, so that summation order is no matter."""
    backend.model.double()
    for state in backend.optimizer.state.values():
        for key, tensor in state.items():
            if key != "step":
                state[key] = tensor.double()
    return backend


def assert_same_training(found, expected, *, tolerance):
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    for name, weight in expected[1].items():
        assert torch.allclose(found[1][name], weight, rtol=0, atol=tolerance), name


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_together_are_one_batch(make_backend, batch_of, size):
    whole = trained(in_fp64(make_backend()), batch_of, Batching("plain", 8))
    parts = trained(in_fp64(make_backend()), batch_of, Batching("plain", size))
    assert_same_training(parts, whole, tolerance=1e-6)  # log-probabilities are summed in fp32


WAYS = {
    "packed": ({"sequence_packing": {"enabled": True, "train_mb_tokens": 64}}, {}),
    "packed, first fit": (
        {
            "sequence_packing": {
                "enabled": True, "train_mb_tokens": 64, "algorithm": "first_fit_decreasing",
            }
        },
        {},
    ),
    "dynamic": (
        {
            "dynamic_batching": {
                "enabled": True, "train_mb_tokens": 64, "sequence_length_round": 8,
            }
        },
        {},
    ),
    "chunks of 5": ({"logprob_chunk_size": 5}, {}),
    "padded to 16": ({"make_sequence_length_divisible_by": 16}, {}),
    "recomputed": ({"dtensor_cfg": {"activation_checkpointing": True}}, {}),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_how_sequences_are_laid_out_changes_nothing(make_backend, batch_of, family, way):
    settings = {"optimizer": {"lr": 1e-3}}
    plain = trained(make_backend(family, **settings), batch_of, Batching("plain", 2))
    settings |= WAYS[way][0]
    backend = make_backend(family, **settings)
    policy = PolicyConfig(init="random", max_total_sequence_length=64, **settings)
    found = trained(backend, batch_of, Batching.for_training(policy))
    assert_same_training(found, plain, tolerance=5e-6)


def test_log_probabilities_are_those_that_the_loss_sees(make_backend, batch_of):
    backend, batch = make_backend(), batch_of(0)
    part = one_shard(batch)
    logprobs_N = backend.logprobs(part)
    loss = backend.train_step(part, NLL()).metrics["loss"].value
    assert logprobs_N.dtype == torch.float32 and not logprobs_N.requires_grad
    assert logprobs_N[~part.batch.loss_mask_N].abs().max() == 0
    assert -logprobs_N.sum().item() / batch.num_loss_tokens == pytest.approx(loss, rel=1e-6)


def test_an_empty_micro_batch_takes_part_and_changes_nothing(make_backend, batch_of):
    from dataclasses import replace

    part = one_shard(batch_of(0))
    found = []
    for micro_batches in (part.micro_batches, (*part.micro_batches, ())):
        backend = make_backend()
        stats = backend.train_step(replace(part, micro_batches=micro_batches), NLL())
        found.append((stats.metrics["loss"].value, everything(backend)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(t, found[1][1][0][name]) for name, t in found[0][1][0].items())


def test_compute_in_bfloat16_keeps_weights_state_and_gradient_norm_in_fp32(make_backend, batch_of):
    low, full = make_backend(precision="bfloat16"), make_backend()
    losses = {id(low): [], id(full): []}
    for _ in range(4):
        for backend in (low, full):
            stats = backend.train_step(one_shard(batch_of(0)), NLL())
            losses[id(backend)].append(stats.metrics["loss"].value)
    assert losses[id(low)] != losses[id(full)], "bfloat16 was not used"
    assert losses[id(low)] == pytest.approx(losses[id(full)], rel=0.02)
    assert losses[id(low)][-1] < losses[id(low)][0]
    assert {t.dtype for t in everything(low)[0].values()} == {torch.float32}
    some = dict(low.export_weights())["model.norm.weight"]
    assert not torch.equal(some, some.bfloat16().float()), "the weights are rounded to bfloat16"


def test_a_schedule_is_needed_before_the_first_step(make_backend, batch_of):
    with pytest.raises(AssertionError, match="begin"):
        make_backend(begun=False).train_step(one_shard(batch_of(0)), NLL())


def test_phases_cover_the_step(make_backend, batch_of):
    from time import perf_counter

    backend, uncovered, part = make_backend(), [], one_shard(batch_of(0))
    for _ in range(5):
        began = perf_counter()
        phases = backend.train_step(part, NLL()).phases
        uncovered.append(1 - sum(phases.values()) / (perf_counter() - began))
        assert set(phases) == {"forward_backward", "optimizer", "metrics"}
    assert 0 <= min(uncovered) < 0.02  # the best of five: a busy machine stops us anywhere


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_log_probabilities_before_a_save_change_nothing_of_it(
    make_backend, batch_of, tmp_path, optimizer, precision
):
    settings = {"optimizer": {"optimizer": optimizer, "lr": 1e-2}, "precision": precision}
    saved, resumed, straight = (make_backend(seed=s, **settings) for s in (0, 1, 0))
    for backend in (saved, straight):
        backend.train_step(one_shard(batch_of(0)), NLL())
    saved.logprobs(one_shard(batch_of(5)))
    masters = dict(saved.export_weights())
    assert {w.dtype for w in masters.values()} == {torch.float32}
    assert not torch.equal(
        masters["model.norm.weight"], masters["model.norm.weight"].bfloat16().float()
    )
    assert_untouched(saved, everything(straight))
    saved.save(tmp_path, with_optimizer=True)
    resumed.load(tmp_path)
    for backend in (saved, resumed, straight):
        backend.train_step(one_shard(batch_of(1)), NLL())
    for backend in (saved, resumed):
        assert_untouched(backend, everything(straight))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="moves state from a GPU to the host")
@pytest.mark.parametrize("optimizer", ["adam", "muon", "sgd"])
def test_state_on_the_host_takes_the_steps_of_state_on_the_gpu(make_backend, batch_of, optimizer):
    settings = {"precision": "bfloat16", "optimizer": {"optimizer": optimizer, "lr": 1e-2}}
    found = []
    for offload in (True, False):
        backend = make_backend(dtensor_cfg={"cpu_offload": offload}, **settings)
        assert {w.device.type for w in backend._weights().values()} == {
            "cpu" if offload else "cuda"
        }
        losses, weights = trained(backend, batch_of, Batching("plain", 2))
        found.append((losses, {name: w.cpu() for name, w in weights.items()}))
    assert_same_training(*found, tolerance=1e-4)


def test_dropout_is_drawn_from_the_seed_and_goes_on_after_a_resume(
    make_backend, batch_of, tmp_path
):
    def made(rate=0.3, **settings):
        return make_backend(
            "llama", init="pretrained", hf_config_overrides={"attention_dropout": rate}, **settings
        )

    def step(backend, number):
        backend.train_step(one_shard(batch_of(number)), NLL())

    first = made()
    step(first, 0)
    first.save(tmp_path, with_optimizer=True)
    step(first, 1)
    end = everything(first)
    torch.manual_seed(123)
    again = made()
    step(again, 0)
    step(again, 1)
    assert_untouched(again, end)
    resumed = made(seed=3)
    resumed.load(tmp_path)
    step(resumed, 1)
    assert_untouched(resumed, end)
    for settings in ({"seed": 3}, {"rate": 0.0}):
        other = made(**settings)
        step(other, 0)
        step(other, 1)
        name = "model.norm.weight"
        assert not torch.equal(everything(other)[0][name], end[0][name])


def test_a_batch_without_a_target_is_refused_before_anything_is_computed(make_backend, batch_of):
    from dataclasses import replace

    backend, batch = make_backend(), batch_of(0)
    before = everything(backend)
    masked = replace(batch, loss_mask_N=torch.zeros_like(batch.loss_mask_N), num_loss_tokens=0)
    with pytest.raises(NoSignalError, match="step 1: none of the batch's 8 sequences"):
        backend.train_step(one_shard(masked), NLL())
    assert_untouched(backend, before)
