"""SIGKILL anywhere in a save, and the same command continues from a whole checkpoint.

A child (forked, so that nothing is imported twice) saves step 2 and, keeping one, deletes step 1.
It is killed at its n-th call that changes the disk; of a write, half has happened by then.
"""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import signal

from nemo_like.checkpoint import layout, manifest
from nemo_like.checkpoint.store import load_state
from tests.unit.checkpoint.small_run import states_of, write_step

CALLS = ("write", "fsync", "rename", "mkdir", "unlink", "rmdir", "ftruncate", "pwrite")


def save_and_die(open_run, kill_at):
    """Exit code 0 if the save ended before the n-th call, else -SIGKILL."""
    if (child := os.fork()) == 0:
        calls = 0

        def deadly(genuine):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == kill_at:
                    if genuine is write:
                        genuine(args[0], bytes(args[1])[: len(args[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return genuine(*args, **kwargs)

            return call

        write = os.write
        for name in CALLS:
            setattr(os, name, deadly(getattr(os, name)))
        signal.alarm(30)
        with open_run() as checkpoints:
            write_step(checkpoints, 2)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def assert_whole(saved):
    for part, expected in states_of(saved.step).items():
        loaded = load_state(saved.folder / part, states_of(0)[part])
        if part == layout.MODEL:
            assert all(loaded[name].equal(tensor) for name, tensor in expected.items())
        else:
            assert loaded["last_step"] == saved.step
    assert saved.data == {"row": saved.step}


def test_a_save_killed_anywhere_leaves_a_whole_checkpoint_and_the_same_command_goes_on(
    open_run, tmp_path
):
    with open_run(checkpoint_dir=str(tmp_path / "before")) as checkpoints:
        write_step(checkpoints, 1)
    found_after_kill = []
    for kill_at in itertools.count(1, step=3):
        root = shutil.copytree(tmp_path / "before", tmp_path / f"run_{kill_at}")
        open_here = functools.partial(open_run, checkpoint_dir=str(root), keep_top_k=1)
        code = save_and_die(open_here, kill_at)
        for step in layout.find_steps(root):
            manifest.verify(layout.step_folder(root, step))  # half a deletion has no such name
        with open_here() as checkpoints:
            saved = checkpoints.latest_good()
            assert_whole(saved)
            assert layout.find_leftovers(root) == []
            if saved.step == 1:
                write_step(checkpoints, 2)
                assert_whole(checkpoints.latest_good())
        if code == 0:
            break
        assert code == -signal.SIGKILL
        found_after_kill.append(saved.step)
    assert found_after_kill == sorted(found_after_kill), "once renamed, the new one counts"
    assert found_after_kill.count(1) >= 20 and found_after_kill.count(2) >= 5
