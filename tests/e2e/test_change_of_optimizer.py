"""A run that goes on under another optimizer, or from another program's, and says what it kept."""

import json
import runpy

import pytest
import torch

from nemo_like.checkpoint.dcp_storage import read_metadata
from nemo_like.checkpoint.store import load_state
from tests.e2e.commands import REPOSITORY, Place, contents, sft, words

MUON = "policy.optimizer.optimizer=muon"
CONVERT = "checkpointing.optimizer_state=convert"
NO_EXPORT = "checkpointing.model_save_format=null"
ONE_STEP = "checkpointing.checkpoint_must_save_by=00:00:00:00"


def steps(number):
    return f"sft.max_num_steps={number}"


def optimizer_state(folder):
    """Every tensor of a checkpoint's optimizer, by name."""
    metadata = read_metadata(folder / "optimizer").state_dict_metadata
    values = json.loads((folder / "optimizer" / "values.json").read_text())
    template = {"state": {}, "steps": {}}
    for path, stored in metadata.items():
        _, name, key = path.split("/")
        template["state"].setdefault(name, {})[key] = torch.zeros(stored.size)
    for path, value in values.items():
        template["steps"][path.removeprefix("steps/")] = value
    return load_state(folder / "optimizer", template)


@pytest.fixture(scope="module")
def adam(tmp_path_factory):
    """A run of two steps with AdamW."""
    place = Place(tmp_path_factory.mktemp("adam"))
    assert sft(place.argv(steps(2))) == 0
    return place


def test_muon_goes_on_from_a_run_of_adamw_and_says_what_it_keeps(adam, tmp_path, capsys):
    muon, refused = Place(tmp_path / "muon"), Place(tmp_path / "refused")
    before = contents(adam.step(2), "optimizer", "data.json", "manifest.json")
    start = f"checkpointing.start_from={adam.step(2)}"
    assert sft(refused.argv(MUON, steps(4), start, NO_EXPORT)) == 4
    assert "checkpointing.optimizer_state=convert" in words(capsys.readouterr().out)
    assert refused.steps() == []

    command = muon.argv(MUON, steps(4), start, NO_EXPORT, CONVERT)
    assert sft([*command, ONE_STEP]) == 75
    said = words(capsys.readouterr().out)
    assert f"continuing from {adam.step(2)}" in said
    assert "What is kept of the optimizer state" in said and "exp_avg as" in said
    assert sft(command) == 0
    said = words(capsys.readouterr().out)
    assert f"continuing from {muon.step(3)}" in said, "its own, now that it has one"
    assert "exp_avg as" in said, "what happened to it is not forgotten"

    assert muon.steps() == [3, 4]
    assert [line["step"] for line in muon.values()] == [3, 4]
    assert "exp_avg as momentum_buffer" in (muon.log / "report.html").read_text()
    (kept, changed) = json.loads((muon.step(4) / "data.json").read_text())["conversions"]
    assert kept[:2] == ["2", "adamw"] and changed[:2] == ["2", "adamw to muon"]
    assert contents(adam.step(2), "optimizer", "data.json", "manifest.json") == before


def test_a_run_changes_its_optimizer_in_its_own_folder_and_back(adam, tmp_path):
    place = Place(tmp_path)
    assert sft(place.argv(steps(2), NO_EXPORT)) == 0
    assert sft(place.argv(steps(3), NO_EXPORT, MUON)) == 4
    assert sft(place.argv(steps(3), NO_EXPORT, MUON, CONVERT)) == 0
    assert sft(place.argv(steps(4), NO_EXPORT, CONVERT)) == 0
    history = json.loads((place.step(4) / "data.json").read_text())["conversions"]
    assert [row[:2] for row in history] == [
        ["2", "adamw"], ["2", "adamw to muon"], ["3", "adamw"], ["3", "muon to adamw"]
    ]  # fmt: skip
    taken = optimizer_state(place.step(4))["steps"]
    assert {taken["model.norm.weight"], taken["model.layers.0.mlp.up_proj.weight"]} == {4, 1}


def test_a_folder_with_checkpoints_of_another_beginning_is_not_taken_for_the_one_asked_for(
    adam, capsys
):
    assert sft(adam.argv(steps(3), f"checkpointing.start_from={adam.step(2)}")) == 4
    said = words(capsys.readouterr().out)
    assert "is of a run that began anew, not with checkpointing.start_from=" in said


def test_a_run_starts_from_the_optimizer_of_another_program(adam, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(adam.step(2) / "hf", dtype=torch.float32)
    named = dict(model.named_parameters())
    hidden = [n for n, p in named.items() if p.ndim == 2 and "embed" not in n]
    rest = [n for n in named if n not in hidden]
    optimizers = {
        "muon": torch.optim.Muon([named[n] for n in hidden], lr=1e-3),
        "adamw": torch.optim.AdamW([named[n] for n in rest], lr=1e-3),
    }
    for p in named.values():
        p.grad = torch.randn_like(p)
    for name, optimizer in optimizers.items():
        optimizer.step()
        torch.save(optimizer.state_dict(), tmp_path / f"{name}.pt")
    (tmp_path / "muon.txt").write_text("\n".join(hidden))
    (tmp_path / "adamw.txt").write_text("\n".join(rest))
    model.save_pretrained(tmp_path / "weights")

    def in_place(*names):
        return [str(tmp_path / name) for name in names]

    tool = runpy.run_path(str(REPOSITORY / "tools/import_optimizer.py"))["main"]
    argv = [
        "--weights", *in_place("weights"), "--state", *in_place("muon.pt", "adamw.pt"),
        "--names", *in_place("muon.txt", "adamw.txt"), "--out",
    ]  # fmt: skip
    assert tool([*argv, *in_place("imported")]) == 0
    assert "weight_decay=0.1" in capsys.readouterr().out
    (tmp_path / "adamw.txt").write_text("\n".join(rest[:-1]))
    assert tool([*argv, *in_place("refused")]) == 4
    assert "adamw.pt: " in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()

    imported = tmp_path / "imported" / "step_0"
    state = optimizer_state(imported)["state"]
    theirs = optimizers["muon"].state[named[hidden[0]]]["momentum_buffer"]
    assert torch.equal(state[hidden[0]]["momentum_buffer"], theirs)
    ours = Place(tmp_path / "ours")
    start = f"checkpointing.start_from={imported}"
    assert sft(ours.argv(MUON, steps(1), start, "policy.optimizer.lr=0")) == 0
    after = AutoModelForCausalLM.from_pretrained(ours.step(1) / "hf", dtype=torch.float32)
    assert all(torch.equal(after.get_parameter(n), p) for n, p in named.items())
    taken = optimizer_state(ours.step(1))
    assert taken["steps"][rest[0]] == 2
    moved = taken["state"][hidden[0]]["momentum_buffer"] - 0.95 * theirs
    assert 0 < moved.norm() < 0.2 * theirs.norm(), "it went on from the momentum that was imported"
