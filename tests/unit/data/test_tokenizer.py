import json
import runpy
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_like.assets import bundled
from nemo_like.config.policy import TokenizerConfig
from nemo_like.data.tokenizer import load_tokenizer
from nemo_like.errors import ConfigError

TINY = bundled("tiny-qwen3")
TOOL = runpy.run_path(str(Path(__file__).parents[3] / "tools" / "make_tokenizer.py"))


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(TINY, tmp_path / "model")


def test_the_bundled_tokenizer_is_what_the_tool_writes():
    written = json.loads(TOOL["build_tokenizer"]().to_str())
    assert written == json.loads((TINY / "tokenizer.json").read_text())


def test_each_chosen_string_is_one_token_and_digits_stay_apart(tokenizer):
    for string in TOOL["STRINGS"]:
        assert len(tokenizer.encode(string)) == 1, string
    assert len(tokenizer.encode("12+345=?")) == 8


def test_an_arithmetic_problem_takes_about_forty_tokens(tokenizer):
    talk = [
        {"role": "user", "content": "7+5-3+8=?"},
        {"role": "assistant", "content": "7+5=12\n12-3=9\n9+8=17\nAnswer: 17"},
    ]
    text = tokenizer.apply_chat_template(talk, tokenize=False)
    assert len(tokenizer.encode(text)) <= 41


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_encoding(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_bundled_configuration_fits_the_bundled_tokenizer(tokenizer):
    config = json.loads((TINY / "config.json").read_text())
    assert config["vocab_size"] == len(tokenizer) and config["vocab_size"] % 8 == 0
    assert config["eos_token_id"] == tokenizer.eos_token_id
    assert config["pad_token_id"] == tokenizer.pad_token_id
    assert config["max_position_embeddings"] == tokenizer.model_max_length


@pytest.mark.parametrize("name", ["..", "../..", "/etc", "tiny-qwen3/..", "nothing", ""])
def test_only_names_of_bundled_models_are_bundled(name):
    assert bundled(name) is None


def test_the_tokenizer_has_a_name_of_its_own_or_that_of_the_model(folder):
    assert len(load_tokenizer(TokenizerConfig(name=str(folder)), "nothing")) == 320
    assert len(load_tokenizer(TokenizerConfig(), str(folder))) == 320


def test_a_template_comes_from_the_tokenizer_a_file_the_config_or_nowhere(tmp_path):
    def template(setting):
        return load_tokenizer(TokenizerConfig(chat_template=setting), "tiny-qwen3").chat_template

    (tmp_path / "own.jinja").write_text("{{ messages }} é", encoding="utf-8")
    assert "im_start" in template("default")
    assert template(None) is None
    assert template(str(tmp_path / "own.jinja")) == "{{ messages }} é"
    assert template("{% for m in messages %}{% endfor %}").startswith("{% for")


@pytest.mark.parametrize("setting", ["defualt", "nowhere.jinja"])
def test_what_is_no_template_is_refused(setting):
    with pytest.raises(ConfigError, match="chat_template"):
        load_tokenizer(TokenizerConfig(chat_template=setting), "tiny-qwen3")


def test_a_tokenizer_without_a_template_names_the_ways_to_give_one(folder):
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(
        ConfigError, match=r"no chat template: set policy\.tokenizer\.chat_template"
    ):
        load_tokenizer(TokenizerConfig(), str(folder))
    assert load_tokenizer(TokenizerConfig(chat_template=None), str(folder)).chat_template is None


def test_a_folder_without_a_vocabulary_is_refused(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="has no tokenizer in"):
        load_tokenizer(TokenizerConfig(), str(folder))


def test_a_damaged_tokenizer_is_refused_by_name(folder):
    (folder / "tokenizer.json").write_text('{"model"')
    with pytest.raises(ConfigError, match="can be loaded from"):
        load_tokenizer(TokenizerConfig(), str(folder))


def test_older_vocabulary_files_are_converted(folder):
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    tokenizer = load_tokenizer(TokenizerConfig(chat_template=None), str(folder))
    assert tokenizer.is_fast and tokenizer.decode(tokenizer.encode("7+5=12")) == "7+5=12"


def test_offline_an_unknown_name_is_a_config_error_with_the_cure(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"hf download some-org/some-model"):
        load_tokenizer(TokenizerConfig(), "some-org/some-model")


def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub():
    with pytest.raises(ConfigError, match="no such folder"):
        load_tokenizer(TokenizerConfig(), "./nowhere/at/all")
