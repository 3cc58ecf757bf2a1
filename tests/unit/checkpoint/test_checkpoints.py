"""A run folder: begin, commit, prune, continue, and who may write."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import time

import pytest

from nemo_like.checkpoint import layout
from nemo_like.checkpoint.manifest import RunLayout
from nemo_like.checkpoint.store import StateWriter, load_state
from nemo_like.errors import CheckpointError, ConfigError
from tests.unit.checkpoint.small_run import IDENTITY, states_of, write_step


def test_a_run_without_checkpoints_starts_fresh(open_run):
    with open_run() as checkpoints:
        assert checkpoints.latest_good() is None


def test_the_newest_checkpoint_comes_back_with_its_data(open_run):
    with open_run() as checkpoints:
        write_step(checkpoints, 9)
        write_step(checkpoints, 10)
        saved = checkpoints.latest_good()
    assert (saved.step, saved.data) == (10, {"row": 10})
    assert saved.differences == ()
    model = load_state(saved.folder / layout.MODEL, states_of(0)[layout.MODEL])
    assert model["w"].equal(states_of(10)[layout.MODEL]["w"])


def test_a_checkpoint_is_not_visible_before_its_commit(open_run):
    with open_run() as checkpoints:
        folder = checkpoints.begin(5)
        with StateWriter(asynchronous=False) as writer:
            writer.save(folder, states_of(5))
        assert checkpoints.latest_good() is None


def test_a_commit_before_the_policy_has_written_is_refused(open_run, tmp_path):
    with open_run() as checkpoints:
        folder = checkpoints.begin(5)
        with StateWriter(asynchronous=False) as writer:
            writer.save(folder, {layout.MODEL: states_of(5)[layout.MODEL]})
        assert not checkpoints.is_written(5)
        with pytest.raises(CheckpointError, match="not written yet"):
            checkpoints.commit(5, metrics={}, data=None)
    assert os.listdir(tmp_path / "ckpt") == [layout.LOCK]


def test_a_step_that_has_a_checkpoint_is_not_written_again(open_run):
    with open_run() as checkpoints:
        write_step(checkpoints, 5)
        with pytest.raises(CheckpointError, match="step_5 exists already"):
            checkpoints.begin(5)


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        (
            {"model": {"hidden_size": 16, "layer_types": ["full", "full"]}},
            "model.hidden_size: 8 in the checkp.*16 now",
        ),
        (
            {"model": {"hidden_size": 8, "layer_types": ["full", "sliding"]}},
            "model.layer_types: .*'full'. in the checkpoint, .*'sliding'. now",
        ),
        (
            {"routing": {"w": "adamw", "embed": "adamw"}},
            "routing.w: 'muon' in the checkpoint, 'adamw' now",
        ),
        (
            {"routing": {**IDENTITY.routing, "b": "adamw"}},
            "routing.b: not in the checkpoint, 'adamw' now",
        ),
    ],
)
def test_another_model_or_routing_is_refused_naming_the_difference(open_run, identity, message):
    with open_run() as checkpoints:
        write_step(checkpoints, 1)
    other = dataclasses.replace(IDENTITY, **identity)
    with open_run(other) as checkpoints, pytest.raises(CheckpointError, match=message):
        checkpoints.latest_good()


OTHER_OWNER = dataclasses.replace(IDENTITY, routing={**IDENTITY.routing, "w": "adamw"})
CURE = "checkpointing.optimizer_state=convert"


def test_another_owner_is_refused_naming_the_option_and_let_through_with_it(open_run):
    with open_run() as checkpoints:
        write_step(checkpoints, 1)
    with open_run(OTHER_OWNER) as checkpoints, pytest.raises(CheckpointError, match=CURE):
        checkpoints.latest_good()
    with open_run(OTHER_OWNER, optimizer_state="convert") as checkpoints:
        assert checkpoints.latest_good().routing == IDENTITY.routing


@pytest.mark.parametrize(
    "identity",
    [
        {"model": {"hidden_size": 16}, "routing": OTHER_OWNER.routing},
        {"routing": {**IDENTITY.routing, "b": "adamw"}},
        {"routing": {"w": "muon"}},
    ],
    ids=["another model", "a parameter more", "a parameter less"],
)
@pytest.mark.parametrize("optimizer_state", ["exact", "convert"])
def test_no_option_lets_another_model_through_nor_is_one_offered(
    open_run, identity, optimizer_state
):
    with open_run() as checkpoints:
        write_step(checkpoints, 1)
    other = dataclasses.replace(IDENTITY, **identity)
    with (
        open_run(other, optimizer_state=optimizer_state) as checkpoints,
        pytest.raises(CheckpointError, match="belongs to another run") as refused,
    ):
        checkpoints.latest_good()
    assert CURE not in str(refused.value)


def test_a_run_starts_from_another_ones_checkpoint_until_it_has_its_own(open_run, tmp_path):
    with open_run() as other:
        start = write_step(other, 5)
        write_step(other, 6)
        elsewhere = {"checkpoint_dir": str(tmp_path / "mine"), "start_from": str(start)}
        with open_run(**elsewhere) as checkpoints:
            assert (checkpoints.latest_good().folder, checkpoints.latest_good().step) == (start, 5)
            own = write_step(checkpoints, 7)
            assert checkpoints.latest_good().folder == own


def test_a_start_that_is_damaged_or_of_another_model_is_refused(open_run, tmp_path):
    with open_run() as other:
        start = write_step(other, 5)
    elsewhere = {"checkpoint_dir": str(tmp_path / "mine"), "start_from": str(start)}
    other = dataclasses.replace(IDENTITY, model={"hidden_size": 16})
    message = r"hidden_size.* or start from another"
    with open_run(other, **elsewhere) as mine, pytest.raises(CheckpointError, match=message):
        mine.latest_good()
    (start / layout.STATE).write_text("{}")
    with open_run(**elsewhere) as checkpoints, pytest.raises(CheckpointError, match="is damaged"):
        checkpoints.latest_good()


@pytest.mark.parametrize(
    ("start", "message"),
    [("nowhere", "start_from=.*nowhere is no folder"), ("ckpt", "name one of them.*ckpt/step_1")],
)
def test_a_start_that_is_no_checkpoint_is_refused(open_run, tmp_path, start, message):
    with open_run() as other:
        write_step(other, 1)
    settings = {"checkpoint_dir": str(tmp_path / "mine"), "start_from": str(tmp_path / start)}
    with open_run(**settings) as checkpoints, pytest.raises(CheckpointError, match=message):
        checkpoints.latest_good()


@pytest.mark.parametrize(
    "model",
    [
        {**IDENTITY.model, "use_something_new": True, "attention_dropout": 0.1},
        {**IDENTITY.model, "rope_parameters": {"rope_theta": 1e4}},
        {"hidden_size": 8},
    ],
    ids=["fields that change no weight", "a field told in a new way", "a field left out"],
)
def test_what_another_version_of_transformers_says_about_a_model_is_no_difference(open_run, model):
    with open_run() as checkpoints:
        write_step(checkpoints, 1)
    with open_run(dataclasses.replace(IDENTITY, model=model)) as checkpoints:
        assert checkpoints.latest_good().step == 1


def test_another_layout_continues_and_says_that_it_is_not_exact(open_run):
    with open_run() as checkpoints:
        write_step(checkpoints, 1)
    elsewhere = RunLayout(world_size=2, threads_per_worker=1, device="cuda")
    with open_run(dataclasses.replace(IDENTITY, layout=elsewhere)) as checkpoints:
        assert checkpoints.latest_good().differences == (
            "world_size: 1 when saved, 2 now",
            "device: cpu when saved, cuda now",
        )


def test_a_checkpoint_without_optimizer_state_is_not_continued(open_run):
    with open_run(save_optimizer=False) as checkpoints:
        write_step(checkpoints, 1)
    with (
        open_run() as checkpoints,
        pytest.raises(CheckpointError, match="policy.model_name=.*step_1/hf"),
    ):
        checkpoints.latest_good()


def test_old_checkpoints_are_deleted_by_metric(open_run, tmp_path):
    with open_run(metric_name="val:loss", keep_top_k=2) as checkpoints:
        for step, loss in enumerate((0.5, 0.1, 0.4, 0.3, 0.9), start=1):
            write_step(checkpoints, step, val__loss=loss)
    assert layout.find_steps(tmp_path / "ckpt") == [2, 4, 5]


def test_a_misspelt_metric_name_is_reported_and_the_checkpoint_is_safe(open_run):
    with open_run(metric_name="val:los") as checkpoints:
        write_step(
            checkpoints, 1, train__loss=1.0
        )  # no validation at this step: nothing to complain of
        with pytest.raises(ConfigError, match="metric_name=val:los is no metric.*val:loss"):
            write_step(checkpoints, 2, val__loss=1.0)
        assert checkpoints.latest_good().step == 2


def test_leftovers_of_a_killed_save_are_removed_and_reported(open_run, tmp_path):
    for name in ("tmp_step_7", "tmp_pruned_step_2"):
        (tmp_path / "ckpt" / name / "model").mkdir(parents=True)
    (tmp_path / "ckpt" / "step_x").mkdir()
    with open_run() as checkpoints:
        assert [p.name for p in checkpoints.removed_leftovers] == [
            "tmp_pruned_step_2",
            "tmp_step_7",
        ]
    assert sorted(os.listdir(tmp_path / "ckpt")) == [layout.LOCK, "step_x"]


def test_a_second_writer_is_refused_and_told_who_holds_the_folder(open_run):
    with open_run(), pytest.raises(CheckpointError, match=f"process {os.getpid()} on "):
        open_run()
    with open_run():
        pass


def test_the_lock_of_a_killed_run_does_not_last(open_run):
    reader, writer = os.pipe()
    if (holder := os.fork()) == 0:
        held = open_run()
        os.write(writer, b"x")
        time.sleep(60)
        held.close()
        os._exit(0)
    os.read(reader, 1)
    with pytest.raises(CheckpointError, match=f"process {holder} on "):
        open_run()
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    with open_run() as checkpoints:
        write_step(checkpoints, 1)


@pytest.mark.parametrize(
    ("call", "code", "cure", "num_calls"),
    [
        ("write", errno.ENOSPC, "free space", 8),
        ("fsync", errno.EIO, "the disk fails", 20),
        ("rename", errno.EDQUOT, "free space", 1),
        ("mkdir", errno.EACCES, "may write", 4),
    ],
)
def test_a_disk_that_refuses_gives_one_error_with_a_cure_and_leaves_no_half_checkpoint(
    open_run, tmp_path, monkeypatch, call, code, cure, num_calls
):
    """The operating system refuses the n-th call, for every n until a save passes."""
    with open_run() as checkpoints:
        write_step(checkpoints, 1)
        number, failures = 0, 0
        while True:
            number += 1
            with monkeypatch.context() as patch:
                calls = iter(range(1, 10**6))
                genuine = getattr(os, call)

                def refuse(*args, calls=calls, genuine=genuine, number=number, **kwargs):
                    if next(calls) == number:
                        raise OSError(code, os.strerror(code))
                    return genuine(*args, **kwargs)

                patch.setattr(os, call, refuse)
                try:
                    write_step(checkpoints, 2)
                    break
                except CheckpointError as error:
                    assert cure in str(error) and "step_2" in str(error)
                    failures += 1
            checkpoints.abort(2)
            assert layout.find_leftovers(tmp_path / "ckpt") == []
            if 2 in layout.find_steps(
                tmp_path / "ckpt"
            ):  # only the last flush of the folder failed
                break
            assert checkpoints.latest_good().step == 1
        assert checkpoints.latest_good().step == 2
    assert failures >= num_calls


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_refused_at_start(open_run, tmp_path):
    (tmp_path / "ckpt").mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match="may write"):
        open_run()


def test_a_folder_that_is_a_file_is_refused_at_start(open_run, tmp_path):
    (tmp_path / "ckpt").write_text("")
    with pytest.raises(CheckpointError, match="checkpointing.checkpoint_dir"):
        open_run()


def test_everything_is_flushed_before_the_name_appears_and_the_name_after(
    open_run, tmp_path, monkeypatch
):
    """What a power cut needs, which no test can make: all files and folders, then their name."""
    log = []
    genuine = os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: log.append(os.readlink(f"/proc/self/fd/{fd}")))
    monkeypatch.setattr(os, "rename", lambda *names: (log.append("rename"), genuine(*names)))
    with open_run() as checkpoints:
        final = write_step(checkpoints, 1)
    renamed = len(log) - 1 - log[::-1].index("rename")
    draft = str(layout.draft_folder(tmp_path / "ckpt", 1))
    written = {draft + str(path).removeprefix(str(final)) for path in (final, *final.rglob("*"))}
    assert len(written) > 15 and written <= set(log[:renamed])
    assert log[renamed + 1 :] == [str(tmp_path / "ckpt")]
