"""What hangs on a step: metrics first, then the checkpoint, then the question whether to go on."""

import os
import signal
import threading

import pytest

from nemo_like.checkpoint.checkpoints import Checkpoints, RunIdentity
from nemo_like.checkpoint.files import read_json
from nemo_like.checkpoint.layout import find_leftovers, find_steps
from nemo_like.checkpoint.manifest import RunLayout, verify
from nemo_like.config.run import CheckpointingConfig
from nemo_like.errors import CheckpointError, NonFiniteError, WorkerError
from nemo_like.observability.timing import StepClock
from nemo_like.run.journal import SIGNALS, RunJournal, StopRequest, seconds
from nemo_like.types import Example, Metric, StepStats, TrainBatch
from tests.fakes import FakeSink, SavingPolicy

BATCH = TrainBatch.of([Example((1, 2, 3), (False, True, True))])
IDENTITY = RunIdentity({}, {"w": "adamw"}, "a: 1\n", RunLayout(1, 1, "cpu"))


class Clock:
    """A clock that stands still until it is told to move."""

    def __init__(self):
        self.time = 1000.0

    def __call__(self):
        return self.time


class Bench:
    """A journal with everything around it that is real but small."""

    def __init__(self, root, *, policy=None, steps=range(1, 5), now=None, **config):
        self.now = now or Clock()
        self.root = root
        self.policy = policy or SavingPolicy()
        self.sink = FakeSink(seen=lambda: sorted(p.name for p in root.glob("*step_*")))
        self.exports = []
        settings = {"checkpoint_dir": str(root), "keep_top_k": None, "save_period": 2} | config
        self.config = CheckpointingConfig(**settings)
        self.checkpoints = Checkpoints(self.config, IDENTITY)
        self.position = 0
        self.journal = RunJournal(
            policy=self.policy,
            position=lambda: {"data": self.position},
            export=lambda folder: self.exports.append(folder.name),
            checkpoints=self.checkpoints,
            config=self.config,
            sinks=[self.sink],
            clock=StepClock(total_steps=steps.stop - 1, now=self.now),
            stop=StopRequest(
                must_save_by=self.config.checkpoint_must_save_by, began=self.now.time, now=self.now
            ),
            steps=steps,
        )

    def train(self, *, validate_at=(), at=lambda step: None, step_s=1.0):
        """Does the steps the journal asks for, as an algorithm would; the steps done."""
        done = []
        for step in self.journal.steps():
            with self.journal.phase("train"):
                self.now.time += step_s
            self.position = step * 10
            self.journal.record(
                step, BATCH, StepStats({"loss": Metric(1.0 / step)}, {"optimizer": 0.25})
            )
            at(step)
            if step in validate_at:
                with self.journal.phase("validation"):
                    self.now.time += 0.5
                self.journal.record_validation(step, {"val_loss": Metric(10.0 - step)})
            done.append(step)
        return done

    def saved(self):
        return find_steps(self.root)

    def close(self):
        self.journal.close()
        self.checkpoints.close()


@pytest.fixture
def bench(tmp_path):
    benches = []

    def make(**settings):
        benches.append(Bench(tmp_path / "checkpoints", **settings))
        return benches[-1]

    yield make
    for one in benches:
        one.checkpoints.close()


def test_checkpoints_are_made_every_period_and_after_the_last_step(bench):
    run = bench(steps=range(1, 6))
    assert run.train() == [1, 2, 3, 4, 5]
    assert run.saved() == [2, 4, 5]
    assert run.exports == ["tmp_step_2", "tmp_step_4", "tmp_step_5"]
    assert run.journal.last_saved == run.root / "step_5"
    assert run.journal.last_step_done == 5


def test_metrics_of_a_step_are_written_before_its_checkpoint_exists(bench):
    run = bench()
    run.train()
    assert [(step, before) for step, _, before in run.sink.lines] == [
        (1, []), (2, []), (3, ["step_2"]), (4, ["step_2"]),
    ]  # fmt: skip


def test_checkpoint_holds_the_position_and_metrics_of_its_own_step(bench):
    run = bench(is_async=True, policy=SavingPolicy(polls=1))
    run.train(validate_at=[2])
    folder = run.root / "step_2"
    assert read_json(folder / "data.json") == {"data": 20}
    assert read_json(folder / "state.json")["metrics"] == {"train:loss": 0.5, "val:val_loss": 8.0}
    assert read_json(run.root / "step_4" / "state.json")["metrics"] == {"train:loss": 0.25}


def test_validation_is_written_with_its_step_and_not_again(bench):
    run = bench()
    run.train(validate_at=[2])
    assert [step for step, v, _ in run.sink.lines if "validation/val_loss" in v] == [2]


def test_validation_before_the_first_step_is_written_at_once(bench):
    run = bench()
    run.journal.record_validation(0, {"val_loss": Metric(6.0)})
    assert run.sink.lines == [(0, {"validation/val_loss": 6.0}, [])]


def test_training_goes_on_while_a_checkpoint_is_written(bench):
    run = bench(is_async=True, policy=SavingPolicy(polls=1), steps=range(1, 7))
    run.train()
    whole_at = {step: before for step, _, before in run.sink.lines}
    assert whole_at[3] == ["tmp_step_2"], "the save of step 2 was waited for"
    assert run.saved() == [2, 4, 6]


def test_the_next_save_waits_for_the_one_before(bench):
    run = bench(is_async=True, policy=SavingPolicy(polls=5), save_period=1)
    run.train()
    assert run.saved() == [1, 2, 3, 4]


def test_a_save_that_failed_in_the_background_ends_the_run_and_leaves_nothing(bench):
    run = bench(is_async=True, policy=SavingPolicy(fails=CheckpointError("disk full")))
    with pytest.raises(CheckpointError, match="disk full"):
        run.train()
    run.policy.fails = None  # a writer tells its failure once
    run.close()
    assert run.saved() == [] and find_leftovers(run.root) == []


def test_an_export_that_fails_leaves_nothing(bench):
    run = bench()

    def export(folder):
        raise CheckpointError("no room")

    run.journal._export = export
    with pytest.raises(CheckpointError, match="no room"):
        run.train()
    run.close()
    assert run.saved() == [] and find_leftovers(run.root) == []


def fail_at(step_of_failure, error):
    def at(step):
        if step == step_of_failure:
            raise error

    return at


def test_an_error_in_training_does_not_cost_the_checkpoint_being_written(bench):
    run = bench(is_async=True, policy=SavingPolicy(polls=3))
    with pytest.raises(NonFiniteError):
        run.train(at=fail_at(3, NonFiniteError("loss nan")))
    assert run.saved() == []
    run.close()
    assert run.saved() == [2]
    assert verify(run.journal.last_saved).step == 2


def test_a_dead_worker_drops_the_checkpoint_being_written_and_stays_the_error_to_tell(bench):
    run = bench(is_async=True, policy=SavingPolicy(polls=3))

    def at(step):
        if step == 3:
            run.policy.fails = WorkerError("ended before")
            raise WorkerError("rank 0 died")

    with pytest.raises(WorkerError, match="rank 0 died"):
        run.train(at=at)
    run.close()
    run.close()
    assert run.saved() == [] and find_leftovers(run.root) == []


def test_without_checkpoints_everything_else_happens(bench):
    run = bench()
    run.journal._checkpoints = None
    assert run.train() == [1, 2, 3, 4]
    assert len(run.sink.lines) == 4 and run.journal.last_saved is None


@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: n.name)
def test_a_signal_ends_the_run_after_its_step_and_a_checkpoint(bench, number):
    run = bench(save_period=100)

    def at(step):
        if step == 2:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    assert run.train(at=at) == [1, 2]
    assert run.saved() == [2]
    assert run.journal.stopped_by == number.name
    assert signal.getsignal(number) == before


def interrupt_twice(step):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)


def test_a_second_interrupt_does_not_wait_for_the_step(bench, monkeypatch):
    monkeypatch.setattr("nemo_like.run.journal.REPEAT_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        bench().train(at=interrupt_twice)


def test_an_interrupt_that_arrives_twice_at_once_is_one(bench):
    run = bench(save_period=100)
    assert run.train(at=interrupt_twice) == [1]
    assert run.saved() == [1]


def test_another_signal_after_the_first_does_not_cut_the_save_short(bench):
    """Schedulers warn with one signal and repeat with another."""
    run = bench(save_period=100)

    def at(step):
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)

    assert run.train(at=at) == [1]
    assert run.saved() == [1]


def test_the_time_limit_counts_from_the_start_and_ends_the_run_after_a_checkpoint(bench):
    now = Clock()
    run = bench(now=now, save_period=100, checkpoint_must_save_by="00:00:00:10")
    now.time += 7.5  # starting up counts
    assert run.train() == [1, 2, 3]
    assert run.saved() == [3]
    assert run.journal.stopped_by == "checkpointing.checkpoint_must_save_by"


@pytest.mark.parametrize(
    ("text", "expected"), [("00:00:00:01", 1), ("01:02:03:04", 93784), ("10:00:00:00", 864000)]
)
def test_time_limit_is_read_as_days_hours_minutes_seconds(text, expected):
    assert seconds(text) == expected


def test_phases_of_a_step_add_up_to_its_wall_time(bench):
    run = bench()
    run.train(validate_at=[2])
    for step, values, _ in run.sink.lines:
        phases = {k: v for k, v in values.items() if k.startswith("timing/")}
        assert sum(phases.values()) == pytest.approx(values["performance/wall_s"], rel=1e-12), step
    values = run.sink.lines[1][1]
    assert values["timing/train/optimizer"] == 0.25 and values["timing/train"] == 0.75
    assert values["timing/validation"] == 0.5 and values["performance/wall_s"] == 1.5


def test_saving_is_booked_as_checkpoint_and_not_as_training(bench):
    run = bench(save_period=1, now=Clock())
    write = run.policy.save

    def slow_save(folder, *, with_optimizer=True):
        run.now.time += 4.0
        write(folder, with_optimizer=with_optimizer)

    run.policy.save = slow_save
    run.train()
    assert [v.get("timing/checkpoint", 0.0) for _, v, _ in run.sink.lines] == [0, 4, 4, 4]
    assert all(v["performance/step_s"] == 1.0 for _, v, _ in run.sink.lines)


@pytest.mark.parametrize("period", [1, 2, 100])
def test_a_step_that_finds_nothing_to_do_ends_the_run_with_the_step_before_saved_once(
    bench, period
):
    run = bench(save_period=period)

    def starve(step):
        if step == 3:
            run.position = 99  # what it looked at
            run.journal.stop("nothing left")

    saves, save = [], run.policy.save

    def counted(folder, *, with_optimizer=True):
        saves.append(folder.name)
        save(folder, with_optimizer=with_optimizer)

    run.policy.save = counted
    for step in run.journal.steps():
        with run.journal.phase("train"):
            pass
        if step < 3:
            run.position = step * 10
            run.journal.record(step, BATCH, StepStats({"loss": Metric(1.0 / step)}))
            run.journal.record_validation(step, {"val_loss": Metric(10.0 - step)})
        starve(step)
    assert saves.count("tmp_step_2") == 1 and run.saved() == ([1, 2] if period == 1 else [2])
    assert run.journal.last_saved == run.root / "step_2" and run.journal.last_step_done == 2
    assert run.journal.stopped_by == "nothing left"
    assert [step for step, *_ in run.sink.lines] == [1, 2]
    assert read_json(run.root / "step_2" / "data.json") == {"data": 20}
    assert read_json(run.root / "step_2" / "state.json")["metrics"] == {
        "train:loss": 0.5, "val:val_loss": 8.0,
    }  # fmt: skip


def test_a_run_that_finds_nothing_to_do_at_once_saves_nothing(bench):
    run = bench()
    for _ in run.journal.steps():
        run.journal.stop("nothing left")
    assert run.saved() == [] and run.journal.last_step_done == 0


def test_a_run_that_continues_does_the_rest_only(bench):
    run = bench(steps=range(3, 5))
    assert run.journal.first_step == 3
    assert run.train() == [3, 4]


def test_a_run_that_is_complete_does_nothing(bench):
    run = bench(steps=range(5, 5))
    assert run.train() == [] and run.sink.lines == [] and run.journal.last_step_done == 4


def test_signals_are_left_alone_outside_the_main_thread(bench):
    run, result = bench(), []
    thread = threading.Thread(target=lambda: result.append(run.train()))
    thread.start()
    thread.join(timeout=30)
    assert result == [[1, 2, 3, 4]]
