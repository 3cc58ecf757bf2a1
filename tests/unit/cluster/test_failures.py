import pickle
from dataclasses import replace

import pytest

from nemo_like.cluster.failures import (
    LOG_TAIL_LINES,
    Failure,
    WorkerIdentity,
    died,
    hang_error,
    to_error,
)
from nemo_like.errors import ConfigError, DataError, NonFiniteError, WorkerError


@pytest.fixture
def worker(tmp_path):
    return WorkerIdentity("policy", 1, 4, tmp_path / "policy_rank1.log", "10.0.0.7", 4242)


def failure_of(exception, worker, phase="train_step"):
    try:
        raise exception
    except Exception as caught:
        return Failure.of(caught, worker, phase)


class Unpicklable(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")


def test_a_foreign_exception_becomes_a_worker_error_that_names_all_there_is_to_know(worker):
    worker.log_file.write_text("loading\nshapes: 3 x 4\n")
    error = to_error([failure_of(ValueError("shapes differ"), worker)])
    assert type(error) is WorkerError
    for text in (
        "policy rank 1 of 4",
        "10.0.0.7",
        "4242",
        "train_step",
        "ValueError: shapes differ",
    ):
        assert text in str(error).splitlines()[0]
    assert "in failure_of" in str(error), "the worker's traceback"
    assert str(worker.log_file) in str(error) and "shapes: 3 x 4" in str(error)


@pytest.mark.parametrize("cls", [ConfigError, DataError, NonFiniteError])
def test_our_own_errors_arrive_as_themselves_with_the_rank_added(cls, worker):
    error = to_error([failure_of(cls("micro-batch 3 is bad"), worker)])
    assert type(error) is cls
    assert str(error).startswith("micro-batch 3 is bad")
    assert "policy rank 1 of 4" in str(error) and "train_step" in str(error)


def test_a_failure_travels_whatever_the_exception_was(worker):
    failure = failure_of(Unpicklable("this", "that"), worker)
    assert pickle.loads(pickle.dumps(failure)) == failure
    assert "Unpicklable: this and that" in str(to_error([failure]))


def test_a_dead_process_is_the_cause_and_its_peers_symptoms_come_after(worker):
    symptom = failure_of(
        RuntimeError("Connection closed by peer\nat tcp.cpp"), replace(worker, rank=0)
    )
    error = to_error([symptom, died(worker, "train_step")])
    lines = str(error).splitlines()
    assert lines[0].startswith("policy rank 1 of 4") and "died in train_step" in lines[0]
    assert "kill -9, out of memory" in lines[0]
    assert (
        lines[1].startswith("then: policy rank 0 of 4") and "Connection closed by peer" in lines[1]
    )


def test_an_error_of_ours_is_the_cause_before_one_of_torch(worker):
    symptom = failure_of(RuntimeError("Connection closed"), replace(worker, rank=0))
    assert type(to_error([symptom, failure_of(DataError("row 7"), worker)])) is DataError


def test_a_hang_names_the_silent_ranks_the_key_and_the_stacks(worker):
    limit = "cluster.worker_timeout_s=30"
    error = hang_error([worker, replace(worker, rank=3)], "save", limit, "logs/stacks.txt")
    assert isinstance(error, WorkerError)
    for text in ("rank 1 of 4", "rank 3 of 4", "save", limit, "logs/stacks.txt"):
        assert text in str(error)


def test_only_the_end_of_a_long_log_is_shown_and_a_missing_log_is_named(worker):
    assert f"Log: {worker.log_file} on node 10.0.0.7" in str(to_error([died(worker, "save")]))
    worker.log_file.write_text("".join(f"line {i}\n" for i in range(100)))
    text = str(to_error([died(worker, "save")]))
    assert "line 99" in text and f"line {99 - LOG_TAIL_LINES}\n" not in text
