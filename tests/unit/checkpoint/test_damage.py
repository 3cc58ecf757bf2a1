"""Every kind of damage to every kind of file is found, and the file named."""

from __future__ import annotations

import itertools
import os
import pickle
import re
import shutil

import pytest

from nemo_like.checkpoint import layout, manifest
from nemo_like.checkpoint.checkpoints import Checkpoints
from nemo_like.config.run import CheckpointingConfig
from nemo_like.errors import CheckpointError
from tests.unit.checkpoint.small_run import IDENTITY, write_step

KINDS = {
    "manifest": layout.MANIFEST,
    "config": layout.CONFIG,
    "state": layout.STATE,
    "routing": layout.ROUTING,
    "data": layout.DATA,
    "model tensors": "model/__0_0.distcp",
    "model metadata": "model/.metadata",
    "optimizer tensors": "optimizer/__0_0.distcp",
    "optimizer values": "optimizer/values.json",
    "rng": "rng/rank_0.json",
    "hf weights": "hf/model.safetensors",
    "hf config": "hf/config.json",
}


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def flip_bit(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x10
    path.write_bytes(raw)


DAMAGES = {
    "missing": lambda path, other, trap: path.unlink(),
    "truncated": lambda path, other, trap: os.truncate(path, path.stat().st_size - 1),
    "bit-flip": lambda path, other, trap: flip_bit(path),
    "zero-length": lambda path, other, trap: os.truncate(path, 0),
    "zeroed": lambda path, other, trap: path.write_bytes(bytes(path.stat().st_size)),
    "other step": lambda path, other, trap: shutil.copy(other, path),
    "other model": lambda path, other, trap: shutil.copy(other, path),
    "pickle payload": lambda path, other, trap: path.write_bytes(pickle.dumps(Payload(trap))),
    "a link": lambda path, other, trap: (path.unlink(), path.symlink_to(other)),
}


def write_run(root, width):
    config = CheckpointingConfig(checkpoint_dir=str(root), metric_name=None, keep_top_k=None)
    with Checkpoints(config, IDENTITY) as checkpoints:
        for step in (10, 20, 30):
            write_step(checkpoints, step, width=width)
    return root


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Three whole checkpoints, written once; tests damage copies."""
    return write_run(tmp_path_factory.mktemp("whole"), width=8)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("other"), width=16)


@pytest.fixture
def damaged_copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "ckpt")


def test_the_table_covers_every_kind_of_file(whole):
    found = {
        p.relative_to(whole / "step_30").as_posix()
        for p in (whole / "step_30").rglob("*")
        if p.is_file()
    }
    assert found - set(KINDS.values()) == {"model/values.json", "optimizer/.metadata"}


# These files are the same in every step of a run, or in the runs of these two models.
SAME = {("config", "other step"), ("routing", "other step"), ("model metadata", "other step")}
SAME |= {
    (kind, "other model") for kind in ("config", "state", "routing", "data", "rng", "hf config")
}
SAME |= {("optimizer values", "other model")}


@pytest.mark.parametrize(
    ("kind", "damage"), [pair for pair in itertools.product(KINDS, DAMAGES) if pair not in SAME]
)
def test_a_damaged_newest_checkpoint_stops_the_run_and_names_file_good_one_and_command(
    open_run, damaged_copy, other_model, tmp_path, kind, damage
):
    newest, name = damaged_copy / "step_30", KINDS[kind]
    other = (
        other_model / "step_30" if damage == "other model" else damaged_copy / "step_20"
    ) / name
    DAMAGES[damage](newest / name, other, tmp_path / "executed")
    with open_run() as checkpoints, pytest.raises(CheckpointError) as error:
        checkpoints.latest_good()
    message = str(error.value)
    foreign_manifest = "holds step 20" in message or "model/__0_0.distcp" in message
    assert name in message or (kind == "manifest" and foreign_manifest)
    assert str(newest) in message
    assert f"last good one is {damaged_copy / 'step_20'}" in message
    assert not (tmp_path / "executed").exists()

    command = re.search(r"to continue from it: (.*), then run again", message)[1]
    assert os.system(command) == 0
    with open_run() as checkpoints:
        assert checkpoints.latest_good().step == 20


def test_with_two_damaged_checkpoints_the_command_leads_to_the_good_one(open_run, damaged_copy):
    for step in (20, 30):
        flip_bit(damaged_copy / f"step_{step}" / "model/__0_0.distcp")
    with open_run() as checkpoints, pytest.raises(CheckpointError) as error:
        checkpoints.latest_good()
    assert (
        os.system(re.search(r"to continue from it: (.*), then run again", str(error.value))[1]) == 0
    )
    with open_run() as checkpoints:
        assert checkpoints.latest_good().step == 10


def test_without_a_good_checkpoint_the_message_says_how_to_start_anew(open_run, damaged_copy):
    for step in (10, 20, 30):
        flip_bit(damaged_copy / f"step_{step}" / "data.json")
    with open_run() as checkpoints, pytest.raises(CheckpointError, match="No older one is good"):
        checkpoints.latest_good()


def test_an_older_damaged_checkpoint_is_no_matter(open_run, damaged_copy):
    flip_bit(damaged_copy / "step_20" / "model/__0_0.distcp")
    with open_run() as checkpoints:
        assert checkpoints.latest_good().step == 30


def test_a_foreign_file_is_named(damaged_copy):
    (damaged_copy / "step_30/model/notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"model/notes.txt: foreign"):
        manifest.verify(damaged_copy / "step_30")


def test_a_renamed_checkpoint_is_refused(damaged_copy):
    (damaged_copy / "step_30").rename(damaged_copy / "step_40")
    with pytest.raises(CheckpointError, match="holds step 30"):
        manifest.verify(damaged_copy / "step_40")


def test_all_damages_are_named_at_once(damaged_copy):
    (damaged_copy / "step_30/data.json").unlink()
    flip_bit(damaged_copy / "step_30/rng/rank_0.json")
    with pytest.raises(CheckpointError, match=r"data.json: missing; rng/rank_0.json: damaged"):
        manifest.verify(damaged_copy / "step_30")


@pytest.mark.parametrize("position", range(0, 400, 7))
def test_no_flipped_bit_of_a_manifest_passes(damaged_copy, position):
    path = damaged_copy / "step_30/manifest.json"
    raw = bytearray(path.read_bytes())
    raw[position * len(raw) // 400] ^= 1
    path.write_bytes(raw)
    try:
        same = manifest.verify(damaged_copy / "step_30")
    except CheckpointError:
        return
    # White space is the only thing that may change: 0x20 ^ 1 is "!", so not even that.
    pytest.fail(f"accepted {same}")
