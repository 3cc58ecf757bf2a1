"""Every rollout engine is the same engine: the reference in this process, vLLM in a Ray worker."""

import os
import random
import signal
import sys
import threading
import time
from dataclasses import dataclass, replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from nemo_like.cluster.generator import RemoteGenerator
from nemo_like.cluster.group import GroupConfig, WorkerGroup
from nemo_like.cluster.placement import place_single
from nemo_like.cluster.runtime import RayCluster, import_ray
from nemo_like.config.run import ClusterConfig
from nemo_like.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from nemo_like.ops.experts import apart
from nemo_like.rollout.hf import HFEngine
from nemo_like.rollout.sampling import sampled_distribution
from nemo_like.rollout.vllm import VLLMEngine
from nemo_like.rollout.vllm_settings import ENVIRONMENT, OnCpu
from nemo_like.types import Prompt, SamplingParams
from nemo_like.weight_sync.object_store import StoreSender

SIZE = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 320,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "initializer_range": 0.1,  # wide, so that the distributions are far from uniform
}  # fmt: skip
FAMILIES = {
    "qwen3": Qwen3Config(**SIZE, head_dim=32, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZE, tie_word_embeddings=True),
    "llama": LlamaConfig(**SIZE, tie_word_embeddings=False),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZE, head_dim=32, tie_word_embeddings=False, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=64,
    ),
}  # fmt: skip
LONGEST = 256
STOPS = tuple(range(0, 320, 16))
GREEDY = SamplingParams(24, temperature=0, stop_token_ids=STOPS)
WARM = SamplingParams(24, seed=(7 << 40) + 3)
COOL = SamplingParams(24, temperature=0.7, top_k=40, top_p=0.9, stop_token_ids=STOPS, seed=7)
SAMPLINGS = {"greedy": GREEDY, "T=1": WARM, "T=0.7, top-k, top-p": COOL}
KINDS = ("hf", "vllm")


def words(token_ids):
    return " ".join(map(str, token_ids))


def newborn(family, seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(FAMILIES[family], dtype=torch.float32).eval()


def weights_of(family, seed=0):
    """As a policy exports them: each expert apart, without the tied head."""
    weights = dict(apart(newborn(family, seed).state_dict().items()))
    if FAMILIES[family].tie_word_embeddings:
        del weights["lm_head.weight"]
    return weights


def prompts(count=24):
    """Short ones, but for the first: that is longer than a block of vLLM's prefix cache."""
    dice = random.Random(0)
    lengths = [150, *(dice.randrange(1, 20) for _ in range(count - 1))]
    ids = [tuple(dice.randrange(320) for _ in range(length)) for length in lengths]
    return [Prompt(i, x, words(x), "") for i, x in enumerate(ids)]


@dataclass(frozen=True)
class MakeEngine:
    """One engine at a time of a class, in whatever process this is called in."""

    cls: type

    def __call__(self):
        return Engines(self.cls)


class Engines:
    def __init__(self, cls):
        self.cls = cls
        self.engine = None
        self.new("qwen3")

    def new(self, family, **options):
        if self.engine is not None:
            self.engine.close()
            self.engine.close()
        config = family if isinstance(family, dict) else FAMILIES[family].to_dict()
        self.engine = self.cls(config, words, **{"max_model_len": LONGEST} | options)

    def load_weights(self, weights, version):
        return self.engine.load_weights(weights, version=version)

    def generate(self, prompts, sampling, samples=None):
        return self.engine.generate(prompts, sampling, samples)

    def load_broken_weights(self, weights):
        def broken():
            yield from weights[:3]
            raise CheckpointError(f"{weights[3][0]} was damaged on its way")

        self.load_weights(broken(), version=9)

    def sleep(self):
        self.engine.sleep()

    def pid(self):
        return os.getpid()

    def num_blocks(self):
        return self.engine._llm.llm_engine.vllm_config.cache_config.num_gpu_blocks

    def close(self):
        if self.engine is not None:
            self.engine.close()


class RemoteEngines:
    """The same behind a group of one worker."""

    def __init__(self, group):
        self.group = group

    def new(self, family, **options):
        self.group.call_all("new", family, **options)

    def load_weights(self, weights, version):
        parcel = self.group.put(StoreSender().send(list(weights)))
        return self.group.feed("load_weights", [[parcel]], version=version)[0]

    def load_broken_weights(self, weights):
        good, bad = StoreSender().send(weights[:3]), StoreSender().send(weights[3:4])
        bad = replace(bad, labels=(replace(bad.labels[0], digest="another"),))
        parcels = [[self.group.put(parcel)] for parcel in (good, bad)]
        self.group.feed("load_weights", parcels, version=9)

    def generate(self, prompts, sampling, samples=None):
        return self.group.call_each("generate", [(prompts, sampling, samples)])[0]


class World:
    def __init__(self, folder):
        import_ray().cloudpickle.register_pickle_by_value(sys.modules[__name__])
        self.folder = folder
        self.cluster = RayCluster(ClusterConfig(gpus_per_node=0))
        self.cluster.start()
        self.vllm = self.start_vllm(0)

    def start_vllm(self, number):
        place = place_single(uses_gpu=False)
        config = GroupConfig(
            f"engine_{number}", place, MakeEngine(VLLMEngine), self.folder, 300.0, ENVIRONMENT
        )
        group = WorkerGroup(self.cluster, config)
        group.start()
        return group


@pytest.fixture(scope="module")
def world(vllm_installed, tmp_path_factory):
    world = World(tmp_path_factory.mktemp("world"))
    yield world
    world.vllm.close()
    world.cluster.close()


@pytest.fixture(scope="module")
def engines(world):
    return {"vllm": RemoteEngines(world.vllm), "hf": Engines(HFEngine)}


@pytest.fixture(params=KINDS)
def engine(request, engines):
    """A qwen3 that may hold anything."""
    return engines[request.param]


@pytest.fixture
def loaded(engine):
    """A qwen3 with the newborn weights."""
    engine.load_weights(weights_of("qwen3").items(), version=1)
    return engine


def gaps(model, rollouts, sampling):
    """|log-probability that the engine reports - that of a forward pass without cache|."""
    found = []
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt.token_ids + rollout.token_ids])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0]
        answers = sampled_distribution(logits[len(rollout.prompt.token_ids) - 1 : -1], sampling)
        chosen = answers.gather(-1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
        found.append((chosen - torch.tensor(rollout.sampled_logprobs)).abs())
    return torch.cat(found)


def check_gap(model, rollouts, sampling):
    gap = gaps(model, rollouts, sampling)
    assert gap.mean() <= 1e-5 and gap.max() <= 1e-4, (float(gap.mean()), float(gap.max()))


def tokens(rollouts):
    return [r.token_ids for r in rollouts]


def check_all_samplings(engine, family, seed, version):
    model = newborn(family, seed)
    for sampling in SAMPLINGS.values():
        rollouts = engine.generate(prompts(), sampling)
        check_gap(model, rollouts, sampling)
        assert {r.weights_version for r in rollouts} == {version}


def test_log_probabilities_are_those_of_the_distribution_drawn_from_after_updates_too(engine):
    for seed in (0, 1):
        engine.load_weights(weights_of("qwen3", seed).items(), version=seed + 1)
        check_all_samplings(engine, "qwen3", seed, seed + 1)


def test_engines_answer_greedily_with_the_same_tokens_and_end_for_the_same_reason(engines):
    reference = None
    for kind in KINDS:
        engines[kind].load_weights(weights_of("qwen3").items(), version=1)
        rollouts = engines[kind].generate(prompts(64), GREEDY)
        found = [(r.prompt, r.token_ids, r.text, r.finish_reason) for r in rollouts]
        assert found == (reference or found)
        reference = found
    assert {reason for *_, reason in reference} == {"stop", "length"}


def test_engines_tell_the_same_digest_of_the_same_weights_and_another_of_others(engines):
    digests = {
        (kind, seed): engines[kind].load_weights(weights_of("qwen3", seed).items(), version=1)
        for kind in KINDS
        for seed in (0, 1)
    }
    assert digests["hf", 0] == digests["vllm", 0] != digests["hf", 1] == digests["vllm", 1]


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_a_rollout_is_the_same_alone_in_another_order_and_in_parts(loaded, sampling):
    group = [p for p in prompts(8) for _ in range(3)]
    whole = loaded.generate(group, sampling)
    alone = [loaded.generate([group[i]], sampling, [i % 3])[0] for i in (0, 5, 23)]
    assert tokens(alone) == [whole[i].token_ids for i in (0, 5, 23)]
    for one, other in zip(alone, (whole[i] for i in (0, 5, 23)), strict=True):
        assert one.sampled_logprobs == pytest.approx(other.sampled_logprobs, abs=1e-5)
    order = random.Random(1).sample(range(24), 24)
    shuffled = loaded.generate([group[i] for i in order], sampling, [i % 3 for i in order])
    assert tokens(shuffled) == [whole[i].token_ids for i in order]


def test_samples_of_a_prompt_differ_and_so_do_seeds_and_the_same_seed_gives_the_same(loaded):
    group = prompts(1) * 8
    first = tokens(loaded.generate(group, WARM))
    assert len(set(first)) == 8
    assert tokens(loaded.generate(group, WARM)) == first
    other = tokens(loaded.generate(group, SamplingParams(24, seed=(7 << 40) + 4)))
    assert not set(first) & set(other)


def test_tokens_come_as_often_as_their_probability_says(loaded):
    """One token of each of 2,000 samples, each with a random stream of its own."""
    prompt = prompts()[1]
    sampling = SamplingParams(1, top_k=6, seed=11)
    rollouts = loaded.generate([prompt] * 2000, sampling)
    with torch.no_grad():
        logits = newborn("qwen3")(input_ids=torch.tensor([prompt.token_ids])).logits[0, -1:]
    probs = sampled_distribution(logits, sampling).exp()[0].double()
    counts = torch.bincount(torch.tensor([r.token_ids[0] for r in rollouts]), minlength=320)
    expected, drawn = 2000 * probs[probs > 0], counts[probs > 0]
    assert drawn.sum() == 2000 and len(drawn) == 6
    assert ((drawn - expected) ** 2 / expected).sum() < 20.5  # chi-square, 5 degrees: 0.1 %


def test_a_completion_ends_with_its_stop_token_or_at_its_limit(loaded):
    for rollout in loaded.generate(prompts(), COOL):
        stops = [token in STOPS for token in rollout.token_ids]
        assert not any(stops[:-1]) and stops[-1] == (rollout.finish_reason == "stop")
        assert stops[-1] or len(rollout.token_ids) == 24
        assert len(rollout.sampled_logprobs) == len(rollout.token_ids)
        assert rollout.text == words(rollout.token_ids)


def test_a_completion_ends_with_the_token_that_completes_a_stop_string(loaded):
    free = SamplingParams(64, seed=3)
    strings = ("177", "1 25")
    stopped = SamplingParams(64, seed=3, stop_strings=strings)
    pairs = list(
        zip(loaded.generate(prompts(), free), loaded.generate(prompts(), stopped), strict=True)
    )
    for whole, part in pairs:
        texts = [words(whole.token_ids[: n + 1]) for n in range(64)]
        ends = [n for n, text in enumerate(texts, 1) if any(s in text for s in strings)]
        length = min(ends, default=64)
        assert part.token_ids == whole.token_ids[:length]
        assert part.sampled_logprobs == pytest.approx(whole.sampled_logprobs[:length], abs=1e-5)
        assert part.finish_reason == ("stop" if ends else "length")
        assert part.text == words(part.token_ids)
    assert len({part.finish_reason for _, part in pairs}) == 2
    assert loaded.generate(prompts(2), GREEDY), "what was broken off is not in the way"


def test_a_completion_ends_where_the_longest_sequence_ends(loaded):
    long = Prompt(0, tuple(range(100)) * 2, "", "")
    (rollout,) = loaded.generate([long], SamplingParams(64, temperature=0))
    assert (len(rollout.token_ids), rollout.finish_reason) == (LONGEST - 200, "length")


def test_no_prompts_give_no_rollouts(loaded):
    assert loaded.generate([], GREEDY) == []


@pytest.mark.parametrize("token_ids", [(), (1,) * LONGEST, (320,), (-1, 5)])
def test_prompts_the_engine_can_not_take_are_refused_and_leave_it_usable(loaded, token_ids):
    with pytest.raises(DataError, match="prompt 31 has"):
        loaded.generate([*prompts(2), Prompt(31, token_ids, "", "")], GREEDY)
    assert len(loaded.generate(prompts(2), GREEDY)) == 2


def test_senseless_sampling_parameters_are_refused(loaded):
    with pytest.raises(ConfigError, match=r"top_p is 1\.5.*stop_strings"):
        loaded.generate(prompts(1), SamplingParams(4, top_p=1.5, stop_strings=("",)))


def test_a_tied_head_may_be_named_or_left_out_but_not_differ(engine):
    whole = newborn("qwen3", seed=2).state_dict()
    for absent in ("lm_head.weight", "model.embed_tokens.weight", None):
        engine.load_weights([(k, v) for k, v in whole.items() if k != absent], version=2)
        check_gap(newborn("qwen3", seed=2), engine.generate(prompts(), GREEDY), GREEDY)
    whole["lm_head.weight"] = whole["lm_head.weight"] + 1
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from the weight it is"):
        engine.load_weights(whole.items(), version=3)


def spoilt(fault):
    weights = list(weights_of("qwen3", seed=1).items())
    match fault:
        case "missing":
            return weights[:-1]
        case "unknown":
            return [*weights, ("model.extra", torch.zeros(1))]
        case "twice":
            return [*weights, weights[3]]
        case "shape":
            return [(k, v[:-1] if k == weights[2][0] else v) for k, v in weights]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", r"model\.norm\.weight is missing"),
        ("unknown", r"model\.extra is not a weight of this model"),
        ("twice", "came twice"),
        ("shape", r"has shape \(.*\), expected \("),
    ],
)
def test_wrong_weights_are_refused_and_nothing_is_drawn_until_a_whole_set_arrives(
    loaded, fault, message
):
    with pytest.raises(CheckpointError, match=message):
        loaded.load_weights(spoilt(fault), version=2)
    with pytest.raises(CheckpointError, match="no complete weights"):
        loaded.generate(prompts(1), GREEDY)
    loaded.load_weights(weights_of("qwen3", seed=1).items(), version=3)
    check_gap(newborn("qwen3", seed=1), loaded.generate(prompts(), COOL), COOL)


def test_weights_that_break_off_half_way_are_not_drawn_from_and_a_whole_set_cures_that(loaded):
    with pytest.raises(CheckpointError, match="was damaged on its way"):
        loaded.load_broken_weights(list(weights_of("qwen3", seed=1).items()))
    with pytest.raises(CheckpointError, match="no complete weights"):
        loaded.generate(prompts(1), GREEDY)
    loaded.load_weights(weights_of("qwen3", seed=1).items(), version=3)
    check_gap(newborn("qwen3", seed=1), loaded.generate(prompts(), COOL), COOL)


def test_logits_that_are_not_numbers_are_refused_with_the_prompt(engine):
    weights = weights_of("qwen3")
    weights["model.norm.weight"] = torch.full((128,), float("nan"))
    engine.load_weights(weights.items(), version=1)
    for sampling in SAMPLINGS.values():
        with pytest.raises(NonFiniteError, match="prompt 5, token 0"):
            engine.generate([Prompt(5, (17,), "", "")], sampling)
    engine.load_weights(weights_of("qwen3").items(), version=2)
    check_gap(newborn("qwen3"), engine.generate(prompts(), GREEDY), GREEDY)


def test_vllm_refuses_a_temperature_that_it_would_change(engines):
    engines["vllm"].load_weights(weights_of("qwen3").items(), version=1)
    with pytest.raises(ConfigError, match=r"temperature is 0\.005, which vLLM takes for 0\.01"):
        engines["vllm"].generate(prompts(1), SamplingParams(4, temperature=0.005))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model type 'gpt2' was never compared"),
        ({"model_type": "qwen2", "head_dim": 64}, "head_dim=64 of this qwen2 is not"),
        ({"head_dim": 8}, "head_dim=8: vLLM's attention on a CPU has 32,"),
    ],
)
def test_vllm_refuses_models_that_it_would_compute_wrongly(engines, changes, message):
    with pytest.raises(ConfigError, match=message):
        engines["vllm"].new(FAMILIES["qwen3"].to_dict() | changes)


@pytest.mark.parametrize(
    "family", [pytest.param("llama", marks=pytest.mark.slow), "qwen2", "qwen3_moe"]
)
def test_vllm_agrees_on_the_other_families_too(engines, family):
    engine = engines["vllm"]
    engine.new(family)
    with pytest.raises(CheckpointError, match="no complete weights"):
        engine.generate(prompts(1), GREEDY)
    for seed in (0, 1):
        engine.load_weights(weights_of(family, seed).items(), version=seed + 1)
        check_all_samplings(engine, family, seed, seed + 1)


def test_a_bf16_vllm_takes_fp32_weights_and_is_as_near_as_the_bf16_reference(engines):
    means = {}
    for kind, engine in {**engines, "hf": Engines(HFEngine)}.items():
        engine.new("qwen3", dtype=torch.bfloat16)
        engine.load_weights(weights_of("qwen3").items(), version=1)
        gap = gaps(newborn("qwen3"), engine.generate(prompts(), WARM), WARM)
        means[kind] = float(gap.mean())
    assert 1e-3 < means["vllm"] < 2 * means["hf"] < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_vllm_in_two_processes_takes_its_weights_there_and_draws_the_same(engines, family):
    engine = engines["vllm"]
    engine.new(family, where=OnCpu(num_parts=2))
    for seed in (0, 1):
        engine.load_weights(weights_of(family, seed).items(), version=seed + 1)
        check_all_samplings(engine, family, seed, seed + 1)


def test_vllm_is_born_asleep_and_draws_the_same_whenever_weights_have_woken_it(engines):
    """On a CPU it keeps its memory; vLLM's own account of who sleeps is the same."""
    engine = engines["vllm"]
    engine.new("qwen3", where=OnCpu(sleeps=True))
    drawn = []
    for version in (1, 2):
        with pytest.raises(CheckpointError, match="no complete weights"):
            engine.generate(prompts(2), WARM)
        engine.load_weights(weights_of("qwen3").items(), version=version)
        drawn.append(tokens(engine.generate(prompts(), WARM)))
        for _ in range(2):
            engine.group.call_all("sleep")
    assert drawn[0] == drawn[1]


def test_a_kv_cache_that_is_too_small_for_all_makes_sequences_wait_and_no_difference(engines):
    engines["vllm"].new("qwen3", max_num_seqs=16)
    engines["vllm"].load_weights(weights_of("qwen3").items(), version=1)
    long = SamplingParams(200, seed=5)
    roomy = engines["vllm"].generate(prompts(16), long)
    of_a_block = 128 * 2 * 2 * 2 * 32 * 4  # tokens, K and V, layers, heads, width, fp32
    engines["vllm"].new("qwen3", max_num_seqs=16, where=OnCpu(6 * of_a_block))
    assert engines["vllm"].group.call_all("num_blocks") == [6]
    engines["vllm"].load_weights(weights_of("qwen3").items(), version=1)
    assert tokens(engines["vllm"].generate(prompts(16), long)) == tokens(roomy)


class Policy:
    """The part of a policy that a generator sees."""

    weights_version = 0

    def export_weights(self):
        yield from weights_of("qwen3").items()


@pytest.mark.slow
def test_vllm_killed_while_it_draws_is_replaced_and_the_step_is_that_without_the_fault(
    world, engines
):
    engines["vllm"].new("qwen3")
    said = []

    def say(text):
        said.append((time.monotonic(), text))

    def start(number):
        if world.vllm.is_lost:
            world.vllm = world.start_vllm(number)
        return world.vllm

    generator = RemoteGenerator(start, num_engines=1, say=say)
    try:
        generator.sync(Policy())
        expected = generator.generate(prompts(32), WARM)
        pid = world.vllm.call_all("pid")[0]
        long = SamplingParams(200, seed=1)
        undisturbed = generator.generate(prompts(32), long)
        threading.Timer(0.2, os.kill, (pid, signal.SIGKILL)).start()
        killed_at = time.monotonic() + 0.2
        assert generator.generate(prompts(32), long) == undisturbed
        assert [text.split(" (")[0] for _, text in said[:1]] == ["engine_0 rank 0 of 1"]
        assert said[0][0] - killed_at < 10 and said[1][0] - killed_at < 90
        assert generator.generate(prompts(32), WARM) == expected
    finally:
        generator.close()
