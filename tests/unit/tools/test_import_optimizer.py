"""Optimizer state of another program's mixture of experts, as a checkpoint that ours start from."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
import transformers

from nemo_like.backends.hf_models import hub_shapes
from nemo_like.checkpoint import layout
from nemo_like.checkpoint.files import read_json
from nemo_like.checkpoint.store import load_state
from nemo_like.ops.experts import apart

TOOL = Path(__file__).parents[3] / "tools/import_optimizer.py"


@pytest.mark.parametrize("hub_names", [False, True], ids=["as transformers", "as the hub"])
def test_experts_get_the_state_they_had_under_their_names_on_the_hub(tmp_path, capsys, hub_names):
    config = transformers.Qwen3MoeConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, head_dim=4,
        num_key_value_heads=1, num_experts=3, num_experts_per_tok=1, moe_intermediate_size=6,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    named = dict(model.named_parameters())
    if hub_names:
        named = {n: p.detach().clone().requires_grad_() for n, p in apart(named.items())}
    optimizer = torch.optim.AdamW(named.items(), lr=1e-3)
    for parameter in named.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "adamw.pt")

    main = runpy.run_path(str(TOOL))["main"]
    paths = [str(tmp_path / name) for name in ("model", "adamw.pt", "out")]
    argv = ["--weights", paths[0], "--state", paths[1], "--out", paths[2]]
    assert main(argv) == 0, capsys.readouterr().err

    expected = {
        hub_name: moment
        for name, parameter in named.items()
        for hub_name, moment in apart([(name, optimizer.state[parameter]["exp_avg"])])
    }
    made, shapes = tmp_path / "out" / "step_0", hub_shapes(config)
    assert expected.keys() == shapes.keys() == read_json(made / layout.ROUTING).keys()
    template = {
        "state": {
            n: {key: torch.zeros(s) for key in ("exp_avg", "exp_avg_sq")} for n, s in shapes.items()
        },
        "steps": dict.fromkeys(shapes, 0),
    }
    loaded = load_state(made / layout.OPTIMIZER, template)
    assert all(torch.equal(loaded["state"][n]["exp_avg"], expected[n]) for n in shapes)
    assert set(loaded["steps"].values()) == {1}


def test_names_that_do_not_go_with_the_states_are_refused_in_a_line(tmp_path, capsys):
    main = runpy.run_path(str(TOOL))["main"]
    word = str(tmp_path / "x")
    assert main(["--weights", word, "--state", word, "--names", word, word, "--out", word]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "ConfigError: --names takes one file per --state: found 2 for 1"
    ]
