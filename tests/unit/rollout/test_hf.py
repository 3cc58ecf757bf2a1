from __future__ import annotations

import random
import time

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from nemo_like.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from nemo_like.rollout.hf import HFEngine
from nemo_like.types import Prompt, SamplingParams

SIZE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,  # wide, so that the distributions are far from uniform
}
CONFIGS: dict[str, PretrainedConfig] = {
    "qwen3": Qwen3Config(**SIZE, head_dim=32, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZE, tie_word_embeddings=False),
    "llama": LlamaConfig(**SIZE, tie_word_embeddings=False),
    "qwen3 with a sliding window": Qwen3Config(
        **SIZE, head_dim=32, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    # Rotary positions hide a shift that all tokens of a row share; learned ones do not.
    "gpt2": GPT2Config(
        n_embd=128, n_layer=2, n_head=4, vocab_size=320, n_positions=512, initializer_range=0.1
    ),
}
GREEDY = SamplingParams(max_new_tokens=24, temperature=0, stop_token_ids=tuple(range(0, 320, 16)))
SAMPLED = SamplingParams(
    max_new_tokens=24,
    temperature=0.8,
    top_p=0.95,
    top_k=40,
    stop_token_ids=tuple(range(0, 320, 16)),
    seed=7,
)


def newborn(config: PretrainedConfig, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def words(token_ids) -> str:
    return " ".join(map(str, token_ids))


def empty_engine(config: PretrainedConfig, **options) -> HFEngine:
    return HFEngine(config.to_dict(), words, **options)


def loaded_engine(config: PretrainedConfig, **options) -> HFEngine:
    engine = empty_engine(config, **options)
    engine.load_weights(newborn(config).state_dict().items(), version=1)
    return engine


def prompts(count: int, seed: int = 0) -> list[Prompt]:
    dice = random.Random(seed)
    ids = [[dice.randrange(320) for _ in range(dice.randrange(1, 20))] for _ in range(count)]
    return [Prompt(i, tuple(x), words(x), "") for i, x in enumerate(ids)]


@pytest.fixture(scope="module", params=list(CONFIGS))
def config(request) -> PretrainedConfig:
    return CONFIGS[request.param]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_rollout_is_the_same_alone_and_in_a_batch(config, sampling):
    engine = loaded_engine(config)
    together = engine.generate(prompts(24), sampling)
    assert {r.finish_reason for r in together} == {"stop", "length"}  # so rows did leave early
    for prompt, rollout in zip(prompts(24), together, strict=True):
        (alone,) = engine.generate([prompt], sampling)
        assert rollout.prompt == prompt
        assert alone.token_ids == rollout.token_ids
        assert alone.sampled_logprobs == pytest.approx(rollout.sampled_logprobs, abs=1e-5)


def test_greedy_logprobs_and_tokens_are_those_of_a_forward_pass_without_cache(config):
    model = newborn(config)
    for rollout in loaded_engine(config).generate(prompts(8), GREEDY):
        ids = torch.tensor([rollout.prompt.token_ids + rollout.token_ids])
        with torch.no_grad():
            logprobs = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        answers = logprobs[len(rollout.prompt.token_ids) - 1 : -1]
        assert answers.argmax(-1).tolist() == list(rollout.token_ids)
        chosen = answers.gather(-1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
        assert rollout.sampled_logprobs == pytest.approx(chosen.tolist(), abs=1e-5)


def test_sampled_logprobs_are_those_of_the_distribution_that_was_drawn_from():
    config = CONFIGS["qwen3"]
    model = newborn(config)
    sampling = SamplingParams(max_new_tokens=24, temperature=0.6, top_k=10)
    for rollout in loaded_engine(config).generate(prompts(8), sampling):
        ids = torch.tensor([rollout.prompt.token_ids + rollout.token_ids])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0] / 0.6
        answers = logits[len(rollout.prompt.token_ids) - 1 : -1]
        best = answers.topk(10)
        among_best = best.indices == torch.tensor(rollout.token_ids)[:, None]
        assert among_best.any(-1).all()
        chosen = best.values.log_softmax(-1)[among_best]
        assert rollout.sampled_logprobs == pytest.approx(chosen.tolist(), abs=1e-5)


def test_greedy_equals_the_generate_of_transformers():
    config = CONFIGS["qwen3"]
    model = newborn(config)
    for rollout in loaded_engine(config).generate(
        prompts(4), SamplingParams(max_new_tokens=16, temperature=0)
    ):
        ids = torch.tensor([rollout.prompt.token_ids])
        reference = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=16,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert reference[0, ids.shape[1] :].tolist() == list(rollout.token_ids)


def test_the_samples_of_a_group_differ_and_do_not_depend_on_the_other_groups():
    engine = loaded_engine(CONFIGS["qwen3"])
    a, b, c = prompts(3)
    group = engine.generate([b, b, b], SAMPLED)
    assert len({r.token_ids for r in group}) == 3
    mixed = engine.generate([a, b, c, b, a, b], SAMPLED)
    assert [mixed[i].token_ids for i in (1, 3, 5)] == [r.token_ids for r in group]


def test_a_prompt_goes_through_the_model_once_however_many_samples_it_has():
    engine = loaded_engine(CONFIGS["qwen3"])
    a, b, c = prompts(3)
    shapes = []
    engine._model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    engine.generate([a, b, c] * 5, SamplingParams(4, seed=1))
    longest = max(len(prompt.token_ids) for prompt in (a, b, c))
    assert shapes == [(3, longest), (15, 1), (15, 1), (15, 1)]


def test_another_seed_gives_other_rollouts_and_the_same_seed_the_same():
    engine = loaded_engine(CONFIGS["qwen3"])
    first = engine.generate(prompts(4), SamplingParams(16, seed=1))
    assert engine.generate(prompts(4), SamplingParams(16, seed=1)) == first
    other = engine.generate(prompts(4), SamplingParams(16, seed=2))
    assert all(x.token_ids != y.token_ids for x, y in zip(first, other, strict=True))


def test_the_global_random_stream_is_left_alone():
    weights = newborn(CONFIGS["qwen3"]).state_dict()
    before = torch.get_rng_state()
    engine = empty_engine(CONFIGS["qwen3"])
    engine.load_weights(weights.items(), version=1)
    engine.generate(prompts(2), SAMPLED)
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_larger_than_max_num_seqs_are_cut_without_a_trace():
    whole = loaded_engine(CONFIGS["qwen3"]).generate(prompts(11), SAMPLED)
    cut = loaded_engine(CONFIGS["qwen3"], max_num_seqs=4).generate(prompts(11), SAMPLED)
    assert [r.token_ids for r in cut] == [r.token_ids for r in whole]


def test_a_completion_holds_its_stop_token_and_its_text_is_decoded_from_all_ids():
    for rollout in loaded_engine(CONFIGS["qwen3"]).generate(prompts(24), GREEDY):
        stops = [t in GREEDY.stop_token_ids for t in rollout.token_ids]
        assert not any(stops[:-1])
        assert stops[-1] == (rollout.finish_reason == "stop")
        assert stops[-1] or len(rollout.token_ids) == 24
        assert rollout.text == words(rollout.token_ids)
        assert len(rollout.sampled_logprobs) == len(rollout.token_ids)


def test_no_prompts_give_no_rollouts():
    assert loaded_engine(CONFIGS["qwen3"]).generate([], GREEDY) == []


def test_a_completion_ends_where_the_models_positions_end():
    engine = loaded_engine(CONFIGS["qwen3"])
    long = Prompt(0, tuple(range(100)) * 5, "", "")
    (rollout,) = engine.generate([long], SamplingParams(max_new_tokens=64, temperature=0))
    assert (len(rollout.token_ids), rollout.finish_reason) == (12, "length")


@pytest.mark.parametrize("token_ids", [(), (1,) * 512, (320,), (-1, 5)])
def test_prompts_the_model_can_not_take_are_refused_by_index(token_ids):
    engine = loaded_engine(CONFIGS["qwen3"])
    with pytest.raises(DataError, match="prompt 31 has"):
        engine.generate([*prompts(2), Prompt(31, token_ids, "", "")], GREEDY)


def test_senseless_sampling_parameters_are_refused():
    with pytest.raises(ConfigError, match="top_p is 1.5"):
        loaded_engine(CONFIGS["qwen3"]).generate(prompts(1), SamplingParams(4, top_p=1.5))


def test_rollouts_carry_the_version_of_their_weights():
    class FrozenPolicy:
        weights_version = 0

        def export_weights(self):
            return iter(newborn(CONFIGS["qwen3"], seed=3).state_dict().items())

    engine = loaded_engine(CONFIGS["qwen3"])
    (before,) = engine.generate(prompts(1), GREEDY)
    policy = FrozenPolicy()
    engine.sync(policy)
    engine.sync(policy)  # not sent again
    (after,) = engine.generate(prompts(1), GREEDY)
    assert (before.weights_version, after.weights_version) == (1, 2)
    assert before.sampled_logprobs != after.sampled_logprobs
    policy.weights_version += 1
    engine.sync(policy)
    assert engine.generate(prompts(1), GREEDY)[0].weights_version == 3


def test_an_engine_without_weights_refuses_to_generate():
    with pytest.raises(CheckpointError, match="no complete weights"):
        empty_engine(CONFIGS["qwen3"]).generate(prompts(1), GREEDY)


def test_an_engine_that_was_closed_refuses_to_generate():
    engine = loaded_engine(CONFIGS["qwen3"])
    engine.close()
    engine.close()
    with pytest.raises(CheckpointError, match="no complete weights"):
        engine.generate(prompts(1), GREEDY)


def test_a_tied_head_may_be_named_or_left_out_but_not_differ():
    config = CONFIGS["qwen3"]
    weights = dict(newborn(config).state_dict())
    engine = empty_engine(config)
    for absent in ("lm_head.weight", "model.embed_tokens.weight"):
        engine.load_weights([(k, v) for k, v in weights.items() if k != absent], version=1)
        (rollout,) = engine.generate(prompts(1), GREEDY)
        assert rollout == loaded_engine(config).generate(prompts(1), GREEDY)[0]
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight differs from the weight it is tied"
    ):
        engine.load_weights(weights.items(), version=2)


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"]
)
def test_a_missing_weight_is_refused_by_name(name):
    config = CONFIGS["llama"]
    weights = newborn(config).state_dict()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        empty_engine(config).load_weights(
            [(k, v) for k, v in weights.items() if k != name], version=1
        )


def test_all_wrong_weights_are_named_at_once_and_spoil_the_engine():
    config = CONFIGS["llama"]
    engine = loaded_engine(config)
    weights = [(k, v) for k, v in newborn(config).state_dict().items() if "norm" not in k]
    weights += [("model.extra", torch.zeros(1)), weights[0]]
    weights[3] = (weights[3][0], weights[3][1].T[:-1])
    with pytest.raises(CheckpointError) as refusal:
        engine.load_weights(weights, version=2)
    message = str(refusal.value)
    assert "model.extra is not a weight of this model" in message
    assert "model.embed_tokens.weight came twice" in message
    assert f"{weights[3][0]} has shape" in message
    assert "model.norm.weight is missing" in message
    with pytest.raises(CheckpointError, match="no complete weights"):
        engine.generate(prompts(1), GREEDY)


def test_an_update_that_breaks_off_spoils_the_engine_until_a_whole_one_arrives():
    engine = loaded_engine(CONFIGS["llama"])
    weights = newborn(CONFIGS["llama"], seed=1).state_dict()

    def broken():
        yield next(iter(weights.items()))
        raise ConnectionError("the sender died")

    with pytest.raises(ConnectionError):
        engine.load_weights(broken(), version=2)
    with pytest.raises(CheckpointError, match="no complete weights"):
        engine.generate(prompts(1), GREEDY)
    engine.load_weights(weights.items(), version=2)
    assert engine.generate(prompts(1), GREEDY)[0].weights_version == 2


def test_bf16_engine_takes_fp32_weights_and_reports_fp32_logprobs():
    engine = loaded_engine(CONFIGS["qwen3"], dtype=torch.bfloat16)
    reference = loaded_engine(CONFIGS["qwen3"])
    few = SamplingParams(max_new_tokens=1, temperature=0)
    for half, full in zip(
        engine.generate(prompts(8), few), reference.generate(prompts(8), few), strict=True
    ):
        assert half.sampled_logprobs == pytest.approx(full.sampled_logprobs, abs=0.1)
        assert half.sampled_logprobs != full.sampled_logprobs


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_logits_that_are_not_numbers_are_refused_with_the_prompt(sampling):
    engine = empty_engine(CONFIGS["llama"])
    weights = newborn(CONFIGS["llama"]).state_dict()
    weights["model.embed_tokens.weight"][17] = float("nan")
    engine.load_weights(weights.items(), version=1)
    with pytest.raises(NonFiniteError, match="prompt 5, token 0"):
        engine.generate([Prompt(4, (3,), "", ""), Prompt(5, (17,), "", "")], sampling)


def test_a_model_configuration_without_a_type_is_refused():
    with pytest.raises(ConfigError, match="model_type"):
        HFEngine({"hidden_size": 8}, words)


def test_256_short_greedy_answers_take_about_a_second_of_one_thread():
    engine = loaded_engine(CONFIGS["qwen3"])
    engine.generate(prompts(2), GREEDY)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start = time.process_time()
    engine.generate(prompts(256), SamplingParams(max_new_tokens=64, temperature=0))
    taken_s = time.process_time() - start
    torch.set_num_threads(threads)
    assert taken_s < 3  # 0.65 s where it was written
