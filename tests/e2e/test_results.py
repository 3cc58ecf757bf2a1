"""What a run leaves behind: a model for `transformers`, a report, and times that add up."""

import json
import re
import time
from pathlib import Path

import pytest
import torch

from nemo_like.config.command_line import parse
from nemo_like.config.sft import SFTTree
from nemo_like.plan.dry_run import dry_run_sft
from tests.e2e.commands import Place, sft, words

STEPS = 10
SETTINGS = (
    f"sft.max_num_steps={STEPS}", "sft.val_period=5", "sft.val_at_start=true",
    "sft.val_at_end=true", "sft.val_batches=1", "sft.val_num_answers=8",
    "sft.val_max_new_tokens=8", "checkpointing.save_period=5",
    "checkpointing.metric_name=val:val_loss", "policy.scheduler.lr_warmup_iters=2",
    "policy.optimizer.optimizer=muon", "logger.tensorboard_enabled=true",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that came to its end, and how long it took."""
    place = Place(tmp_path_factory.mktemp("finished"))
    began = time.time()
    assert sft(place.argv(*SETTINGS)) == 0
    return place, began, time.time()


def test_phases_of_every_step_add_up_to_its_wall_time(finished):
    place, _, _ = finished
    trained = [line for line in place.logged() if "train/loss" in line]
    assert [line["step"] for line in trained] == list(range(1, STEPS + 1))
    for line in trained:
        phases = sum(value for name, value in line.items() if name.startswith("timing/"))
        assert phases == pytest.approx(line["performance/wall_s"], rel=0.01)


def test_walls_of_all_steps_add_up_to_the_clock_between_them(finished):
    place, began, ended = finished
    trained = [line for line in place.logged() if "train/loss" in line]
    between = trained[-1]["time"] - trained[0]["time"]
    walls = sum(line["performance/wall_s"] for line in trained[1:])
    assert walls == pytest.approx(between, rel=0.01, abs=0.01)
    assert began < trained[0]["time"] < trained[-1]["time"] < ended


def test_metrics_tell_what_the_optimizers_did(finished):
    last = finished[0].logged()[-1]
    for name in ("loss", "grad_norm", "lr", "weight_decay", "skipped_steps"):
        assert f"train/{name}" in last
    for optimizer in ("muon", "adamw"):
        assert last[f"train/{optimizer}/update_rms"] > 0
    for name in ("val_loss", "accuracy", "answer_tokens", "truncated"):
        assert f"validation/{name}" in last
    assert last["performance/tokens_per_s"] > 0


def test_the_report_is_one_file_that_needs_no_network(finished):
    page = (finished[0].log / "report.html").read_text()
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert [link for link in links if not link.startswith(("data:", "#"))] == []
    assert "@import" not in page and "url(http" not in page
    for shown in ("<svg", "adamw", "muon", "max_num_steps: 10", "Answer:"):
        assert shown in page


def test_answers_and_curves_are_kept_beside_it(finished):
    log = finished[0].log
    samples = [json.loads(line) for line in (log / "samples.jsonl").read_text().splitlines()]
    assert {s["step"] for s in samples} == {5, 10} and len(samples) == 16
    assert list((log / "tensorboard").glob("events.out.tfevents.*"))
    assert "optimizer: muon" in (log / "config.yaml").read_text()


def test_the_best_and_the_latest_checkpoint_are_kept(tmp_path):
    place = Place(tmp_path)
    few = ("checkpointing.keep_top_k=1", "checkpointing.save_period=1", "sft.val_period=1")
    assert sft(place.argv(*SETTINGS, *few, "sft.val_num_answers=0")) == 0
    losses = {v["step"]: v["validation/val_loss"] for v in place.values() if v["step"]}
    assert set(place.steps()) == {STEPS, min(losses, key=losses.get)}


@pytest.fixture(scope="module")
def exported(finished):
    return finished[0].step(STEPS) / "hf"


def test_the_export_loads_in_transformers_with_equal_logits(finished, exported):
    """Against the weights of the checkpoint itself, read without `transformers`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nemo_like.backends.dtensor.backend import DTensorBackend
    from nemo_like.backends.settings import BackendSettings
    from nemo_like.config.policy import PolicyConfig

    tokenizer = AutoTokenizer.from_pretrained(exported)
    chat = [{"role": "user", "content": "2+3=?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()

    policy = PolicyConfig(
        model_name="tiny-qwen3", init="random", precision="float32", optimizer={"optimizer": "muon"}
    )
    ours = DTensorBackend(policy, BackendSettings(seed=0))
    try:
        ours.load(finished[0].step(STEPS))
        ours.model.eval()
        with torch.no_grad():
            assert torch.equal(ours.model.hf(ids).logits, theirs(ids).logits)
        weights = theirs.state_dict()
        assert all(torch.equal(w, weights[name]) for name, w in ours.export_weights())
    finally:
        ours.close()


def test_the_export_can_be_trained_on(exported, tmp_path, finished):
    place = Place(tmp_path)
    further = (
        *SETTINGS, "sft.max_num_steps=3", f"policy.model_name={exported}", "policy.tuned_for=null",
        "policy.init=pretrained", "sft.val_period=0",
    )  # fmt: skip
    assert sft(place.argv(*further)) == 0
    before, after = finished[0].values()[-1], place.values()[0]
    assert after["step"] == 0
    assert after["validation/val_loss"] == pytest.approx(before["validation/val_loss"], abs=1e-6)


def test_a_run_that_is_complete_says_so_and_changes_nothing(finished, capsys):
    place, _, _ = finished
    before = place.logged()
    assert sft(place.argv(*SETTINGS)) == 0
    assert "nothing is left to do" in words(capsys.readouterr().out)
    assert place.logged() == before and place.steps() == [5, 10]


def test_a_newborn_model_learns(finished):
    losses = finished[0].losses()
    assert losses[-1] < 0.75 * losses[0]


def test_a_checkpoint_is_as_large_as_the_dry_run_says(finished, capsys):
    place, _, _ = finished
    config = Path("configs/sft_tiny.yaml")
    assert dry_run_sft(parse(place.argv(*SETTINGS), tree=SFTTree, default_config=config).tree) == 0
    said = re.search(r"([\d.]+) GB each", " ".join(capsys.readouterr().out.split()))
    size = sum(file.stat().st_size for file in place.step(STEPS).rglob("*") if file.is_file())
    assert size / 1e9 == pytest.approx(float(said[1]), rel=0.1)
