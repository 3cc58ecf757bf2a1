"""States come back bit for bit, or are refused by name."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from nemo_like.checkpoint import store
from nemo_like.checkpoint.boxes import BoxedTensor
from nemo_like.checkpoint.dcp_storage import METADATA
from nemo_like.checkpoint.store import StateWriter, load_state
from nemo_like.errors import CheckpointError


def state(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "param": {
            "a.b": torch.randn(7, 5, generator=g),
            "bf16": torch.randn(3, generator=g).bfloat16(),
        },
        "state": {"a.b": {"exp_avg": torch.randn(7, 5, generator=g), "step": torch.tensor(5.0)}},
        "groups": {"adamw": {"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "foreach": None, "empty": {}}},
        "last_step": 17,
    }


def zeroed(tree):
    def zero(value):
        if isinstance(value, dict):
            return {key: zero(inner) for key, inner in value.items()}
        return torch.zeros_like(value) if isinstance(value, torch.Tensor) else value

    return zero(tree)


def assert_same_bits(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_bits(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    else:
        assert a == b


def save(folder, tree, *, asynchronous=False):
    with StateWriter(asynchronous=asynchronous) as writer:
        writer.save(folder, {"part": tree})
    return folder / "part"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_state_comes_back_bit_for_bit_with_its_plain_values_and_tuples(tmp_path, asynchronous):
    folder = save(tmp_path, state(), asynchronous=asynchronous)
    assert_same_bits(load_state(folder, zeroed(state())), state())


def boxed(memory, shape, cuts, columns=(0,)):
    """A tensor that lies in rows of a packed matrix, from the last rows to the first."""
    boxes, row = {}, len(memory)
    for first, last in zip(cuts, cuts[1:], strict=False):
        row -= last - first
        for a, b in zip(columns, [*columns[1:], shape[1]], strict=True):
            boxes[first, a] = memory[row : row + last - first, a:b]
    return BoxedTensor(shape, memory.dtype, boxes)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_boxes_are_saved_as_the_tensor_that_they_make_up_and_loaded_into_others(
    tmp_path, asynchronous
):
    whole, packed = torch.randn(7, 5), torch.zeros(9, 5)
    source = boxed(packed, (7, 5), [0, 2, 3, 7], columns=(0, 4))
    for (row, column), box in source.boxes.items():
        box.copy_(whole[row : row + box.shape[0], column : column + box.shape[1]])
    with StateWriter(asynchronous=asynchronous) as writer:
        for name in ("first", "second"):  # the second one reuses the buffers of the first
            writer.save(tmp_path / name, {"part": {"w": {"q": source}, "step": 3}})
            packed.add_(1.0)
    for i, name in enumerate(("first", "second")):
        plain = load_state(tmp_path / name / "part", {"w": {"q": torch.zeros(7, 5)}, "step": 0})
        assert torch.equal(plain["w"]["q"], whole + i)
        other = torch.zeros(8, 5)
        target = boxed(other, (7, 5), [0, 4, 7])
        loaded = load_state(tmp_path / name / "part", {"w": {"q": target}, "step": 0})
        assert loaded["w"]["q"] is target
        assert torch.equal(other, torch.cat([torch.zeros(1, 5), whole[4:] + i, whole[:4] + i]))


def test_boxes_are_filled_from_what_was_a_plain_tensor_and_some_may_be_elsewhere(tmp_path):
    folder = save(tmp_path, {"w": torch.arange(35.0).reshape(7, 5)})
    memory = torch.zeros(2, 5)
    load_state(folder, {"w": BoxedTensor((7, 5), memory.dtype, {(3, 2): memory[1:, 2:4]})})
    assert memory.tolist() == [[0.0] * 5, [0, 0, 17, 18, 0]]


def test_boxes_that_leave_a_part_of_their_tensor_out_are_refused_at_save(tmp_path):
    half = BoxedTensor((7, 5), torch.float32, {(0, 0): torch.zeros(7, 3)})
    with pytest.raises(CheckpointError, match="do not hold all of w: 21 of 35 elements"):
        save(tmp_path, {"w": half})


def test_boxes_that_overlap_are_refused_at_save(tmp_path):
    boxes = {(0, 0): torch.zeros(4, 5), (3, 0): torch.zeros(4, 5)}
    with pytest.raises(CheckpointError, match="cannot write .*overlap"):
        save(tmp_path, {"w": BoxedTensor((7, 5), torch.float32, boxes)})


def test_boxes_of_another_shape_or_type_are_refused(tmp_path):
    folder = save(tmp_path, {"w": torch.zeros(7, 5)})
    for wrong in (BoxedTensor((7, 6), torch.float32, {}), BoxedTensor((7, 5), torch.float64, {})):
        with pytest.raises(CheckpointError, match=r"w: \(7, 5\) torch.float32 in the checkpoint"):
            load_state(folder, {"w": wrong})


def test_loading_fills_the_tensors_of_the_template_in_place(tmp_path):
    folder, template = save(tmp_path, state()), zeroed(state())
    loaded = load_state(folder, template)
    assert loaded["param"]["a.b"].data_ptr() == template["param"]["a.b"].data_ptr()


def test_a_save_in_the_background_holds_the_state_of_the_call(tmp_path):
    tree = state()
    with StateWriter(asynchronous=True) as writer:
        for name in ("first", "second"):  # the second one reuses the buffers of the first
            writer.save(tmp_path / name, {"part": tree})
            tree["param"]["a.b"].add_(1.0)
    for i, name in enumerate(("first", "second")):
        loaded = load_state(tmp_path / name / "part", zeroed(state()))
        expected = state()["param"]["a.b"]
        for _ in range(i):
            expected.add_(1.0)
        assert torch.equal(loaded["param"]["a.b"], expected)


def test_a_failure_in_the_background_is_raised_by_the_next_call(tmp_path):
    (tmp_path / "file").write_text("")
    for call in (
        lambda w: w.wait(),
        lambda w: w.save(tmp_path / "x", {"p": state()}),
        lambda w: w.close(),
    ):
        writer = StateWriter(asynchronous=True)
        writer.save(tmp_path / "file", {"part": state()})
        with pytest.raises(CheckpointError, match="cannot write .*file/part"):
            call(writer)
        writer.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["param"].pop("bf16"), "param/bf16: not in this run"),
        (lambda t: t["param"].update(new=torch.zeros(1)), "param/new: not in the checkpoint"),
        (
            lambda t: t["param"].update(bf16=torch.zeros(3)),
            r"param/bf16: \(3,\) torch.bfloat16 in the .*float32",
        ),
        (
            lambda t: t["param"].update({"a.b": torch.zeros(5, 7)}),
            r"param/a.b: \(7, 5\) .*\(5, 7\)",
        ),
        (lambda t: t.pop("last_step"), "last_step: not in this run"),
        (lambda t: t.update(epoch=1), "epoch: not in the checkpoint"),
    ],
)
def test_a_state_of_another_shape_is_refused_by_name_and_nothing_is_touched(
    tmp_path, change, message
):
    folder, template = save(tmp_path, state()), zeroed(state())
    change(template)
    with pytest.raises(CheckpointError, match=message):
        load_state(folder, template)
    assert not template["state"]["a.b"]["exp_avg"].any()


@pytest.mark.parametrize("value", [{1: 2}, object(), [(1, 2)], {1, 2}, b"x", Path("x")])
def test_what_json_would_change_or_cannot_hold_is_refused_at_save(tmp_path, value):
    with pytest.raises(CheckpointError, match="state (value|key) .*(odd|1)"):
        save(tmp_path, {"odd": value})


def test_keys_that_would_collide_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="without '/'"):
        save(tmp_path, {"a/b": torch.zeros(1)})


class _Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_in_place_of_the_metadata_is_refused_and_not_executed(tmp_path):
    folder = save(tmp_path, state())
    (folder / METADATA).write_bytes(pickle.dumps(_Payload(tmp_path / "executed")))
    with pytest.raises(CheckpointError, match="refused: it asks for posix.mkdir"):
        load_state(folder, zeroed(state()))
    assert not (tmp_path / "executed").exists()


def test_a_pickle_in_place_of_a_tensor_is_refused_and_not_executed(tmp_path):
    folder = save(tmp_path, state())
    (shard,) = folder.glob("*.distcp")
    payload = pickle.dumps(_Payload(tmp_path / "executed"))
    shard.write_bytes(payload.ljust(shard.stat().st_size, b"\0"))
    with pytest.raises(CheckpointError, match="cannot read .*UnpicklingError"):
        load_state(folder, zeroed(state()))
    assert not (tmp_path / "executed").exists()


def test_metadata_that_points_outside_its_folder_are_refused(tmp_path):
    folder = save(tmp_path, state())
    raw = (folder / METADATA).read_bytes()
    assert raw.count(b"__0_0.distcp") == 1
    (folder / METADATA).write_bytes(raw.replace(b"__0_0.distcp", b"../_0.distcp"))
    with pytest.raises(CheckpointError, match="points outside"):
        load_state(folder, zeroed(state()))


def test_the_files_hold_no_path_of_this_machine(tmp_path):
    folder = save(tmp_path, state())
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in folder.iterdir())


def test_a_state_is_written_when_all_files_that_its_metadata_name_are_there(tmp_path):
    assert not store.is_written(tmp_path)
    folder = save(tmp_path, state())
    assert store.is_written(folder)
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match="lacks __0_0.distcp.*every machine shares"):
        store.is_written(folder)
