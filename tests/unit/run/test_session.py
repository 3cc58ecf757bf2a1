"""What surrounds a run: where its log is, what it continues from, what it says at its end."""

import json
import shlex
from pathlib import Path

import pytest

from nemo_like.checkpoint.layout import find_steps
from nemo_like.config.command_line import parse
from nemo_like.config.grpo import GRPOTree
from nemo_like.config.sft import SFTTree
from nemo_like.errors import (
    EXIT_INTERRUPTED,
    CheckpointError,
    DataError,
    NonFiniteError,
    NoSignalError,
    WorkerError,
)
from nemo_like.observability.run_folder import read_lines
from nemo_like.run.session import Session
from nemo_like.types import Example, Metric, PolicyFacts, StepStats, TrainBatch
from tests.fakes import SavingPolicy

BATCH = TrainBatch.of([Example((1, 2), (False, True))])
MODEL = {"num_attention_heads": 2, "hidden_size": 8, "num_hidden_layers": 1}


class Rows:
    """A position in data."""

    def __init__(self, name="train"):
        self.name = name
        self.taken = 0

    def state(self):
        return {"name": self.name, "taken": self.taken}

    def load_state(self, state):
        if state["name"] != self.name:
            raise CheckpointError("other data; set a new checkpointing.checkpoint_dir")
        self.taken = state["taken"]


class Bench:
    """Runs like those of one user: one checkpoint folder, one log folder."""

    def __init__(self, root, monkeypatch):
        self.root = root
        monkeypatch.setattr("sys.argv", ["examples/run_sft.py", "sft.max_num_steps=4"])

    def tree(self, **blocks):
        checkpointing = {
            "checkpoint_dir": str(self.root / "checkpoints"),
            "save_period": 2,
            "keep_top_k": None,
        } | blocks.pop("checkpointing", {})
        return SFTTree(
            checkpointing=checkpointing, logger={"log_dir": str(self.root / "logs")}, **blocks
        )

    def run(
        self,
        *,
        steps=4,
        until=None,
        error=None,
        model=MODEL,
        owner="adamw",
        starved_at=None,
        is_prelude=False,
        rows=None,
        learner=None,
        **blocks,
    ):
        """A whole run of `steps`, which a signal ends after `until`, or an error."""
        self.policy, self.rows, self.done = learner or SavingPolicy(), rows or Rows(), []
        facts = PolicyFacts(
            model, [{"name": "w", "shape": [2], "optimizer": owner, "reason": "r"}], 2, "cpu", 1, 1
        )

        def body(session, stack):
            journal = session.open_journal(
                self.policy,
                facts,
                stack,
                tokenizer=None,
                data=self.rows,
                total_steps=steps,
                tokens_per_sequence=2.0,
            )
            for step in journal.steps():
                with journal.phase("train"):
                    self.rows.taken += 1
                if step == starved_at:
                    journal.stop("grpo.on_starvation=stop")
                    continue
                journal.record(step, BATCH, StepStats({"loss": Metric(1.0 / step)}))
                self.done.append(step)
                if step == until and error is not None:
                    raise error
                if step == until:
                    journal._stop._signal = "SIGTERM"
            return session.finish(journal, steps)

        session = Session(self.tree(**blocks), is_prelude=is_prelude)
        code = session.run(body)
        self.log = session.folder
        return code

    def logged(self):
        return [line["step"] for line in read_lines(self.log.metrics)]

    def damage(self, step):
        file = self.root / "checkpoints" / f"step_{step}" / "state.json"
        file.write_text(file.read_text().replace("1", "2", 1))


@pytest.fixture
def bench(tmp_path, monkeypatch):
    return Bench(tmp_path, monkeypatch)


def words(capsys):
    """What was said, without the line breaks of the terminal."""
    return " ".join(capsys.readouterr().out.split())


def test_a_run_ends_with_where_everything_is_and_what_to_type_next(bench, capsys):
    assert bench.run() == 0
    said = words(capsys)
    for place in ("checkpoints/step_4", "logs/exp_001", "logs/exp_001/report.html"):
        assert str(bench.root / place) in said
    assert "Next: uv run examples/run_sft.py sft.max_num_steps=4" in said


def next_command(capsys):
    return shlex.split(words(capsys).split("Next: ")[1])


def test_the_next_command_is_muon(bench, capsys):
    bench.run()
    assert next_command(capsys)[3:] == ["sft.max_num_steps=4", "policy.optimizer.optimizer=muon"]


def test_the_next_command_moves_a_named_folder_out_of_the_way(bench, capsys, monkeypatch):
    named = f"checkpointing.checkpoint_dir={bench.root}/checkpoints"
    monkeypatch.setattr("sys.argv", ["examples/run_sft.py", named])
    bench.run()
    assert next_command(capsys)[3:] == [named, "policy.optimizer.optimizer=muon", f"{named}_muon"]


def test_after_muon_the_next_command_is_about_a_real_model(bench, capsys):
    bench.run(policy={"optimizer": {"optimizer": "muon"}})
    assert next_command(capsys)[2:] == [
        "examples/run_sft.py", "--config", "configs/sft.yaml", "--dry-run",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "following"),
    [
        ("configs/grpo_math.yaml", ["configs/dapo_math.yaml", "policy.optimizer.optimizer=muon"]),
        ("configs/dapo_math.yaml", ["configs/grpo_math_1B.yaml", "--dry-run"]),
    ],
)
def test_after_muon_grpo_leads_to_dapo_and_that_to_a_real_model(
    bench, capsys, monkeypatch, config, following
):
    tree = parse(["--config", config], tree=GRPOTree, default_config=Path(config)).tree
    own = bench.tree()
    muon = tree.policy.optimizer.model_copy(update={"optimizer": "muon"})
    tree = tree.model_copy(
        update={
            "policy": tree.policy.model_copy(update={"optimizer": muon}),
            "checkpointing": own.checkpointing,
            "logger": own.logger,
        }
    )
    monkeypatch.setattr(bench, "tree", lambda: tree)
    monkeypatch.setattr("sys.argv", ["examples/run_grpo.py"])
    bench.run()
    assert next_command(capsys)[2:] == ["examples/run_grpo.py", "--config", *following]


def test_a_run_that_was_stopped_says_so_and_the_same_command_continues_it(bench, capsys):
    assert bench.run(until=3) == EXIT_INTERRUPTED
    said = words(capsys)
    assert "stopped by SIGTERM" in said and "at step 3 of 4" in said
    assert said.endswith("Next: uv run examples/run_sft.py sft.max_num_steps=4")
    first_log = bench.log
    assert bench.run() == 0
    assert bench.done == [4] and bench.rows.taken == 4
    assert bench.policy.loaded == bench.root / "checkpoints" / "step_3"
    assert bench.log == first_log and bench.logged() == [1, 2, 3, 4]
    assert f"continuing from {bench.policy.loaded}" in words(capsys)


def test_a_run_with_nothing_left_to_learn_from_ends_in_order_and_is_not_started_again(
    bench, capsys
):
    assert bench.run(starved_at=4) == NoSignalError.exit_code == 5
    said = words(capsys)
    assert "stopped by grpo.on_starvation=stop at step 3 of 4" in said
    assert f"checkpoint {bench.root}/checkpoints/step_3" in said and "report.html" in said
    assert "Next:" not in said, "the same command would come to the same end"
    assert bench.run() == 0
    assert bench.done == [4] and bench.rows.taken == 4


def test_a_prelude_leaves_it_to_the_run_it_leads_to_to_say_what_is_next(bench, capsys):
    assert bench.run(is_prelude=True) == 0
    said = words(capsys)
    assert "checkpoints/step_4" in said and "Next:" not in said
    assert bench.run(steps=6, until=5, is_prelude=True) == EXIT_INTERRUPTED
    assert words(capsys).endswith("Next: uv run examples/run_sft.py sft.max_num_steps=4")


def test_steps_after_the_checkpoint_are_logged_once_when_they_are_done_again(bench):
    assert bench.run(until=3, error=NonFiniteError("loss nan")) == 7
    assert bench.logged() == [1, 2]  # the third did not end
    with (bench.log.metrics).open("a") as file:
        file.write(json.dumps({"step": 3, "train/loss": 9.0}) + "\n")
    assert bench.run() == 0
    assert bench.done == [3, 4] and bench.logged() == [1, 2, 3, 4]


def test_a_run_whose_logs_were_deleted_continues_in_a_new_folder(bench):
    bench.run(until=2)
    for file in bench.log.path.iterdir():
        file.unlink()
    bench.log.path.rmdir()
    assert bench.run() == 0
    assert bench.done == [3, 4] and bench.logged() == [3, 4]


def test_the_log_is_found_from_another_working_folder(bench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = SFTTree(
        checkpointing={"checkpoint_dir": str(bench.root / "checkpoints"), "save_period": 2},
        logger={"log_dir": "logs"},
    )
    monkeypatch.setattr(bench, "tree", lambda: relative)
    bench.run(until=2)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    bench.run()
    assert bench.logged() == [1, 2, 3, 4]


def test_a_complete_run_says_that_nothing_is_left_to_do(bench, capsys):
    bench.run()
    capsys.readouterr()
    assert bench.run() == 0
    said = words(capsys)
    assert bench.done == [] and bench.logged() == [1, 2, 3, 4]
    assert "nothing is left to do" in said and "checkpointing.checkpoint_dir" in said
    assert str(bench.root / "checkpoints" / "step_4") in said


def test_a_complete_run_trains_on_when_it_is_given_more_steps(bench):
    bench.run()
    assert bench.run(steps=6) == 0
    assert bench.done == [5, 6]


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"model": MODEL | {"hidden_size": 16}}, "model.hidden_size: 8 in the checkpoint, 16 now"),
        ({"owner": "muon"}, "routing.w: 'adamw' in the checkpoint, 'muon' now"),
        ({"rows": Rows("other")}, "other data"),
    ],
    ids=["model", "routing", "data"],
)
def test_another_run_in_the_same_folder_is_refused_and_the_first_keeps_its_log(
    bench, capsys, other, difference
):
    bench.run(until=3)
    log = bench.log.metrics.read_text()
    assert bench.run(**other) == 4
    said = words(capsys)
    assert difference in said and "checkpointing.checkpoint_dir" in said
    assert bench.done == [] and bench.log.metrics.read_text() == log


class WithRival(SavingPolicy):
    """While it saves its last step, the same command is started once more."""

    def __init__(self, rival):
        super().__init__()
        self.rival = rival

    def save(self, folder, *, with_optimizer=True):
        super().save(folder, with_optimizer=with_optimizer)
        if folder.name == "tmp_step_4":
            self.code_of_rival = self.rival.run()


def test_a_second_run_in_a_folder_in_use_is_refused_and_the_first_keeps_its_log(
    bench, capsys, monkeypatch
):
    rival = Bench(bench.root, monkeypatch)
    first = WithRival(rival)
    bench.run(until=2)
    assert bench.run(learner=first) == 0
    assert first.code_of_rival == 4 and rival.done == []
    assert "another run writes into" in words(capsys)
    assert bench.logged() == [1, 2, 3, 4]


def test_a_damaged_newest_checkpoint_is_not_called_good(bench, capsys):
    bench.run()
    bench.damage(4)
    capsys.readouterr()
    assert bench.run() == 4
    said = words(capsys)
    assert "step_4 is damaged: state.json" in said
    assert f"last good checkpoint {bench.root}/checkpoints/step_2" in said
    assert f"mv {bench.root}/checkpoints/step_4 {bench.root}/checkpoints/damaged_step_4" in said
    assert "Next:" not in said, "the same command would be refused again"


def test_the_command_in_the_message_leads_on_from_the_good_one(bench, capsys):
    bench.run()
    bench.damage(4)
    bench.run()
    folder = bench.root / "checkpoints"
    (folder / "step_4").rename(folder / "damaged_step_4")
    assert bench.run() == 0
    assert bench.done == [3, 4] and find_steps(folder) == [2, 4]
    assert bench.logged() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("text", "why"), [("{", "no JSON"), ("[]", "no object"), ("{}", "no log folder")]
)
def test_a_damaged_position_is_reported_as_damage(bench, capsys, text, why):
    bench.run()
    (bench.root / "checkpoints" / "step_4" / "data.json").write_text(text)
    assert bench.run() == 4, why
    assert "step_4 is damaged: data.json" in words(capsys)


def test_a_dead_worker_ends_with_cause_last_good_checkpoint_and_the_same_command(bench, capsys):
    assert bench.run(until=3, error=WorkerError("policy rank 0 died in train_step")) == 6
    said = words(capsys)
    assert "policy rank 0 died in train_step" in said
    assert f"last good checkpoint {bench.root}/checkpoints/step_2" in said
    assert said.endswith("Next: uv run examples/run_sft.py sft.max_num_steps=4")


def test_an_error_before_any_checkpoint_says_that_there_is_none(bench, capsys):
    assert bench.run(until=1, error=WorkerError("rank 0 died")) == 6
    assert "last good checkpoint none was written" in words(capsys)


def test_wrong_data_say_nothing_of_checkpoints(bench, capsys):
    assert bench.run(until=1, error=DataError("empty")) == 3
    assert "checkpoint" not in words(capsys)


def test_a_bug_shows_its_trace_and_ends_like_any_error(bench, capsys):
    assert bench.run(until=1, error=ZeroDivisionError("by zero")) == 1
    printed = capsys.readouterr()
    assert "Traceback" in printed.err and "ZeroDivisionError: by zero" in printed.out
    assert "last good checkpoint" in printed.out


def test_without_checkpoints_every_run_has_a_log_folder_of_its_own(bench):
    off = {"checkpointing": {"enabled": False}}
    bench.run(**off)
    first = bench.log
    bench.run(**off)
    assert bench.log != first and bench.logged() == [1, 2, 3, 4]


def test_the_config_lies_beside_log_and_checkpoint(bench):
    bench.run()
    for file in (bench.log.config, bench.root / "checkpoints" / "step_4" / "config.yaml"):
        assert "save_period: 2" in file.read_text()


def test_exported_weights_have_the_type_of_the_computation(bench):
    from safetensors.torch import load_file

    bench.run(policy={"precision": "bfloat16"})
    weights = load_file(bench.root / "checkpoints" / "step_4" / "hf" / "model.safetensors")
    assert str(weights["w"].dtype) == "torch.bfloat16"


def test_no_export_is_written_when_none_is_asked_for(bench):
    bench.run(checkpointing={"model_save_format": None})
    assert not (bench.root / "checkpoints" / "step_4" / "hf").exists()
