import pickle

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nemo_like.config.policy import TokenizerConfig
from nemo_like.data.chat import _MARK, ChatEncoder
from nemo_like.data.faults import RowError
from nemo_like.data.tokenizer import load_tokenizer
from nemo_like.errors import ConfigError

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "7+5=?"},
    {"role": "assistant", "content": "Answer: 12"},
    {"role": "user", "content": "8?"},
    {"role": "assistant", "content": "Answer: 8"},
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
THINKING = (  # shows an empty thought in the last turn only, as Qwen3 does
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if not thinking|default(true) %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
TRIMMING = (  # as Llama 3 does
    "{% for m in messages %}{{ '[' + m.role + ']\\n\\n' + m.content | trim + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]\\n\\n' }}{% endif %}"
)
WITHOUT_PROMPT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' A: ' + m.content }}"
    "{% else %}{{ ' Q: ' + m.content }}{% endif %}{% endfor %}"
)


def encoder_for(template, **options):
    tokenizer = load_tokenizer(TokenizerConfig(chat_template=template), "tiny-qwen3")
    return ChatEncoder(tokenizer, **options)


def learned(encoder, messages):
    """The text of all targets, and of everything."""
    example = encoder.encode(messages)
    ids = [
        i for i, is_target in zip(example.token_ids, example.loss_mask, strict=True) if is_target
    ]
    return encoder.tokenizer.decode(ids), encoder.tokenizer.decode(list(example.token_ids))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("default", "Answer: 12<|im_end|>Answer: 8<|im_end|>"),
        (CHATML, "Answer: 12<|im_end|>Answer: 8<|im_end|>"),
        (THINKING, "Answer: 12<|im_end|><think>\n\n</think>\n\nAnswer: 8<|im_end|>"),
        (TRIMMING, "Answer: 12<|im_end|>Answer: 8<|im_end|>"),
        (WITHOUT_PROMPT, " A: Answer: 12 A: Answer: 8<|im_end|>"),
        (None, "Answer: 12Answer: 8<|im_end|>"),
    ],
    ids=["bundled", "chatml", "thinking", "trimming", "without prompt", "concatenation"],
)
def test_assistant_turns_and_their_ends_are_learned_and_nothing_else(template, expected):
    assert learned(encoder_for(template), TALK)[0] == expected


@pytest.mark.parametrize("template", ["default", CHATML, THINKING, TRIMMING])
def test_the_tokens_are_those_of_the_template_up_to_the_end_of_the_last_turn(template):
    encoder = encoder_for(template)
    whole = encoder.tokenizer.apply_chat_template(TALK, tokenize=False)
    assert learned(encoder, TALK)[1] == whole.rstrip()


@pytest.mark.parametrize("template", ["default", CHATML, THINKING, TRIMMING, WITHOUT_PROMPT, None])
def test_only_unmask_final_learns_the_last_turn_alone(template):
    encoder = encoder_for(template, only_unmask_final=True)
    assert "12" not in learned(encoder, TALK)[0]
    assert "Answer: 8" in learned(encoder, TALK)[0]


@pytest.mark.parametrize("template", ["default", CHATML, THINKING, TRIMMING, WITHOUT_PROMPT, None])
def test_a_prompt_is_what_precedes_the_last_turn_in_training(template):
    encoder = encoder_for(template)
    prompt, example = encoder.prompt(TALK, 3), encoder.encode(TALK)
    num = len(prompt.token_ids)
    assert example.token_ids[:num] == prompt.token_ids
    assert all(example.loss_mask[num:])
    assert not example.loss_mask[num - 1]
    assert (prompt.index, prompt.answer) == (3, "Answer: 8")


def test_the_mark_of_the_template_and_the_located_turns_agree():
    assert encoder_for("default").encode(TALK) == encoder_for(CHATML).encode(TALK)


def test_words_that_look_like_markup_are_learned_as_words():
    tricky = "<|im_start|>assistant\nAnswer: 8<|im_end|>\n"
    talk = [{"role": "user", "content": tricky}, {"role": "assistant", "content": "Answer: 8"}]
    assert learned(encoder_for(CHATML), talk)[0] == "Answer: 8<|im_end|>"


def test_a_repeated_answer_is_found_in_each_of_its_places():
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}] * 3
    assert learned(encoder_for(CHATML), talk)[0] == "a<|im_end|>" * 3


def test_what_follows_the_last_turn_is_left_out():
    talk = [*TALK, {"role": "user", "content": "thanks"}]
    assert encoder_for(CHATML).encode(talk) == encoder_for(CHATML).encode(TALK)


def test_add_generation_prompt_trains_on_the_prompt_that_generation_gives():
    options = {"template_kwargs": {"thinking": False}, "add_generation_prompt": True}
    encoder = encoder_for(THINKING, **options)
    targets, text = learned(encoder, TALK)
    assert targets == "Answer: 12<|im_end|>Answer: 8<|im_end|>"
    assert text.startswith(encoder.prompt(TALK, 0).text)
    bare = encoder_for(CHATML.replace("'<|im_start|>assistant\\n'", "'<|im_start|>A\\n'"))
    prompted = encoder_for(bare.tokenizer.chat_template, add_generation_prompt=True)
    assert "<|im_start|>assistant\nAnswer: 8" in learned(bare, TALK)[1]
    assert "<|im_start|>A\nAnswer: 8" in learned(prompted, TALK)[1]


def test_the_end_token_is_added_once_and_only_where_it_is_missing():
    without = CHATML.replace("<|im_end|>", "")
    assert learned(encoder_for(without), TALK)[0].endswith("Answer: 8<|im_end|>")
    assert learned(encoder_for(without, add_eos=False), TALK)[0].endswith("Answer: 8")
    assert learned(encoder_for(CHATML), TALK)[0].count("<|im_end|>") == 2


def test_the_beginning_token_is_added_once_and_only_where_it_is_missing(tokenizer):
    other = pickle.loads(pickle.dumps(tokenizer))
    other.bos_token = "<|endoftext|>"
    assert learned(ChatEncoder(other), TALK)[1].startswith("<|endoftext|><|im_start|>system")
    assert learned(ChatEncoder(other, add_bos=False), TALK)[1].startswith("<|im_start|>system")
    other.chat_template = "{{ bos_token }}" + CHATML
    assert learned(ChatEncoder(other), TALK)[1].count("<|endoftext|>") == 1
    assert ChatEncoder(other).prompt(TALK, 0).text.count("<|endoftext|>") == 1


def test_a_token_across_the_start_of_a_turn_is_split_as_generation_splits_it():
    talk = [{"role": "user", "content": "Answer"}, {"role": "assistant", "content": ": 12"}]
    encoder = encoder_for(None)  # "Answer: " would be one token
    assert learned(encoder, talk)[0] == ": 12<|im_end|>"
    num = len(encoder.prompt(talk, 0).token_ids)
    assert encoder.encode(talk).token_ids[:num] == encoder.prompt(talk, 0).token_ids


def test_a_token_that_can_not_be_split_refuses_the_row():
    raw = Tokenizer(models.WordLevel({"▁ab": 0, "▁a": 1, "▁b": 2, "<e>": 3}, unk_token="<e>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    raw.decoder = decoders.Metaspace(prepend_scheme="never")
    encoder = ChatEncoder(PreTrainedTokenizerFast(tokenizer_object=raw))
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(RowError, match="straddles"):
        encoder.encode(talk)


@pytest.mark.parametrize(
    ("template", "rule"),
    [
        ("{{ raise_exception('roles must alternate') }}", "chat template fails"),
        ("{{ messages[7].content }}", "chat template fails"),
        ("{{ messages | length }}", "turn not found"),
        ("{% if false %}{% generation %}{% endgeneration %}{% endif %}x", "marks nothing"),
    ],
)
def test_a_template_that_hides_turns_refuses_the_row(template, rule):
    with pytest.raises(RowError, match=rule):
        encoder_for(template).encode(TALK)


def test_a_tool_call_is_learned_and_its_result_is_not():
    template = CHATML.replace("m.content", "m.content + (m.tool_calls | default([]) | tojson)")
    call = {"id": "1", "function": {"name": "add", "arguments": "{}"}}
    talk = [
        {"role": "user", "content": "7+5?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "12", "tool_call_id": "1"},
        {"role": "assistant", "content": "So 12."},
    ]
    targets = learned(encoder_for(template), talk)[0]
    assert '"add"' in targets and "So 12." in targets
    assert targets.count("12") == 1


ANY_TEXT = encoder_for(CHATML)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=2, max_size=6)
)
def test_any_text_is_masked_exactly(texts):
    assume(_MARK not in "".join(texts))  # such a row is refused
    roles = ["user", "assistant"] * 3
    talk = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    answers = [m["content"] for m in talk if m["role"] == "assistant"]
    expected = "".join(answer + "<|im_end|>" for answer in answers)
    assert learned(ANY_TEXT, talk)[0] == expected


def test_an_encoder_travels_to_other_processes(encoder):
    assert pickle.loads(pickle.dumps(encoder)).encode(TALK) == encoder.encode(TALK)


@pytest.mark.parametrize("template", ["default", CHATML])
def test_a_reply_after_a_message_is_what_the_template_has_between_two_answers(template):
    encoder = encoder_for(template)
    question, end = {"role": "user", "content": "7+5?"}, encoder.tokenizer.eos_token_id
    answer, reply = {"role": "assistant", "content": "13"}, {"role": "user", "content": "No."}
    prompt = encoder.prompt([question, answer], 0)
    said = prompt.token_ids + tuple(encoder._ids("13<|im_end|>"))
    whole = encoder.prompt([question, answer, reply, answer], 0)
    assert said + tuple(encoder.reply_ids("No.", ended_by=end)) == whole.token_ids
    assert encoder.tokenizer.decode(encoder.reply_ids("12\n", ended_by=None)) == "12\n"


def test_a_template_without_a_place_for_replies_is_refused_by_key():
    hides = encoder_for("{% if true %}{{ messages[0]['content'] }}{% endif %}")
    for encoder in (hides, encoder_for("{% for m in messages %}{{ m.no.such }}{% endfor %}")):
        with pytest.raises(ConfigError, match="chat_template can not.*max_rollout_turns"):
            encoder.reply_ids("No.", ended_by=encoder.tokenizer.eos_token_id)
