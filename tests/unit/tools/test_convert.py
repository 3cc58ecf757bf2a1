"""A checkpoint becomes a folder that transformers loads, whole or not at all."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import pytest
import torch
import transformers

from nemo_like.backends.hf_models import config_content, random_weights
from nemo_like.checkpoint import layout
from nemo_like.checkpoint.checkpoints import Checkpoints, RunIdentity
from nemo_like.checkpoint.hf_export import INDEX, write_hf
from nemo_like.checkpoint.manifest import RunLayout
from nemo_like.checkpoint.store import StateWriter
from nemo_like.config.run import CheckpointingConfig
from nemo_like.errors import CheckpointError

TOOL = runpy.run_path(str(Path(__file__).parents[3] / "tools/convert.py"))
SMALL = {
    "vocab_size": 512, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 12,
}  # fmt: skip
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 1, "moe_intermediate_size": 6}
CONFIG = "policy: {model_name: tiny-qwen3, precision: bfloat16, tokenizer: {name: null}}\n"


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def saved(root: Path, config: transformers.PretrainedConfig, config_yaml: str = CONFIG) -> Path:
    """A checkpoint of step 1 without an export, as any layout of either backend writes it."""
    identity = RunIdentity(config_content(config), {}, config_yaml, RunLayout(1, 1, "cpu"))
    model = {"weights": dict(random_weights(config, 3)), "progress": {"step": 1}}
    kept = CheckpointingConfig(checkpoint_dir=str(root), metric_name=None)
    with Checkpoints(kept, identity) as checkpoints, StateWriter(asynchronous=False) as writer:
        writer.save(checkpoints.begin(1), {layout.MODEL: model, layout.OPTIMIZER: {"a": 1}})
        return checkpoints.commit(1, metrics={}, data=None)


@pytest.mark.parametrize(
    ("config", "is_tied"),
    [
        (transformers.Qwen3Config(**SMALL, tie_word_embeddings=True), True),
        (transformers.Qwen3MoeConfig(**SMALL, **EXPERTS, tie_word_embeddings=False), False),
    ],
    ids=["tied", "experts"],
)
def test_transformers_load_what_was_trained_in_the_dtype_of_the_run(tmp_path, config, is_tied):
    saved(tmp_path / "run", config)
    out = tmp_path / "out"
    assert TOOL["main"]([str(tmp_path / "run"), str(out), "--max-file-gb", "0.000004"]) == 0
    model, told = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(told.values()) and model.dtype == torch.bfloat16
    assert model.config.tie_word_embeddings == is_tied and (out / INDEX).is_file()
    torch.manual_seed(3)
    expected = type(model)(config).bfloat16().state_dict()
    assert all(torch.equal(w, expected[name]) for name, w in model.state_dict().items())
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_a_damaged_checkpoint_is_not_converted(tmp_path, capsys):
    step = saved(tmp_path / "run", transformers.Qwen3Config(**SMALL))
    (step / "routing.json").write_text("[]")
    assert TOOL["main"]([str(step), str(tmp_path / "out")]) == 4
    assert "routing.json" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_tensor_that_comes_back_other_than_it_was_written_is_named(tmp_path):
    written = TOOL["Written"]()
    for value in (1.0, 2.0):  # the second time unnoticed
        weights = [("a", torch.full((2,), value)), ("b", torch.ones(1))]
        noted = written.noted(weights) if value == 1.0 else weights
        write_hf(tmp_path, noted, config={}, tokenizer=None)
        if value == 1.0:
            assert written.compare(tmp_path, tied=False) == 2
    with pytest.raises(CheckpointError, match="a came back from"):
        written.compare(tmp_path, tied=False)


@pytest.mark.parametrize(
    ("more", "config_yaml", "message"),
    [
        ([], "# imported\n", "does not say which tokenizer it was trained with: --tokenizer"),
        (["--tokenizer", "/nowhere/at/all"], CONFIG, "/nowhere/at/all"),
        (["--max-file-gb", "0"], CONFIG, "--max-file-gb 0: expected a number above 0"),
        (["--dtype", "int8"], CONFIG, "argument --dtype: invalid choice: 'int8'"),
    ],
)
def test_what_is_missing_or_wrong_is_said_in_a_line(tmp_path, capsys, more, config_yaml, message):
    step = saved(tmp_path / "run", transformers.Qwen3Config(**SMALL), config_yaml)
    argv = [str(step), str(tmp_path / "out"), *more]
    try:
        code = TOOL["main"](argv)
    except SystemExit as end:
        code = end.code
    errors = capsys.readouterr().err
    assert (code, errors.count("\n")) == (2, 1) and message in errors
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_is_left_as_it_is(tmp_path, capsys):
    step = saved(tmp_path / "run", transformers.Qwen3Config(**SMALL))
    (tmp_path / "out").mkdir()
    assert TOOL["main"]([str(step), str(tmp_path / "out")]) == 2
    assert "out exists already" in capsys.readouterr().err
