"""`examples/run_eval.py` finds of saved weights what the run that saved them found."""

import shutil
import subprocess
import sys

import pytest

from tests.e2e.commands import EVAL_SCRIPT, REPOSITORY, Place, contents, evaluation, grpo, words

ASKED = (
    "data.validation.num_rows=24", "grpo.val_num_generations_per_prompt=3", "grpo.val_batch_size=7",
    "policy.generation.max_new_tokens=12",
)  # fmt: skip
LOCAL = ("cluster.launcher=local", "policy.generation.backend=hf")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("trained"))
    newborn = ("policy.sft_config=null", "policy.init=random", "policy.optimizer.lr=0.003")
    steps = ("grpo.max_num_steps=2", "grpo.val_at_end=true")
    length = "env.custom.reward=tests.e2e.test_evaluate:shortness"
    judges = [f"data.{part}.env_name=custom" for part in ("train", "validation")]
    assert grpo(place.grpo_argv(*newborn, *steps, *ASKED, *judges, length)) == 0
    return place, (judges[1], length)


def shortness(prompt, answer, expected):
    return 1.0 if len(answer.encode()) % 2 else 0.0


@pytest.mark.parametrize("part", ["", "hf"])
def test_it_finds_what_the_runs_own_validation_found(trained, place, capsys, part):
    run, judges = trained
    before = contents(run.step(2), "")
    logs = place.folders[1]
    model = f"policy.model_name={run.step(2) / part}"
    assert evaluation([*LOCAL, *ASKED, *judges, logs, model]) == 0
    (found,) = place.values()
    expected = run.values()[-1]
    names = {name for name in expected if name.startswith("validation/")}
    assert "validation/pass@3" in names and names == found.keys() - {"step"}
    assert {name: found[name] for name in names} == {name: expected[name] for name in names}
    assert 0 < found["validation/sampled_accuracy"] < 1
    said = words(capsys.readouterr().out)
    assert "pass@3" in said and "report.html" in said and "Next:" not in said
    assert (place.log / "report.html").exists()
    assert contents(run.step(2), "") == before


def test_a_checkpoint_without_an_export_is_refused_with_the_reason(trained, tmp_path, capsys):
    run, judges = trained
    bare = tmp_path / "step_2"
    shutil.copytree(run.step(2), bare, ignore=shutil.ignore_patterns("hf"))
    assert evaluation([*LOCAL, *judges, f"policy.model_name={bare}"]) == 2
    assert "model_save_format" in words(capsys.readouterr().out)


@pytest.mark.parametrize("other", ["policy.sft_config=configs/sft_tiny.yaml", "policy.init=random"])
def test_weights_that_are_not_the_models_are_refused(other, capsys):
    assert evaluation([*LOCAL, "policy.model_name=tiny-qwen3", other]) == 2
    assert "policy.model_name" in words(capsys.readouterr().out)


def command(*argv):
    done = subprocess.run(
        [sys.executable, EVAL_SCRIPT, *argv], cwd=REPOSITORY, capture_output=True, text=True
    )
    return done.returncode, words(done.stdout + done.stderr)


def test_without_a_model_it_says_which_key_is_missing():
    code, said = command()
    assert code == 2 and "policy.model_name" in said and "needs a value" in said


def test_its_dry_run_tells_what_would_be_asked_and_starts_nothing(trained, tmp_path):
    run, judges = trained
    logs = f"logger.log_dir={tmp_path / 'logs'}"
    code, said = command("--dry-run", logs, *ASKED, *judges, f"policy.model_name={run.step(2)}")
    assert code == 0 and str(run.step(2) / "hf") in said and "pass@3" in said
    assert not (tmp_path / "logs").exists()
