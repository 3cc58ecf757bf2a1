"""Workers under real Ray: one Ray for the module, objects that import no more than they need."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nemo_like.cluster.group import GroupConfig, WorkerGroup
from nemo_like.cluster.placement import ParallelAxis, ParallelSizes, place
from nemo_like.cluster.policy import RemotePolicy
from nemo_like.cluster.runtime import RayCluster, import_ray
from nemo_like.config.run import ClusterConfig
from nemo_like.data.batching import Batching
from nemo_like.errors import ConfigError, NonFiniteError, WorkerError
from nemo_like.types import Example, Metric, StepStats, TrainBatch

CONFIG = ClusterConfig(gpus_per_node=0, cpu_workers_per_node=2)
ONE = ParallelAxis(1, "")


class Echo:
    """An object whose calls do what a test needs."""

    def __init__(self):
        self.rank = int(os.environ["RANK"])
        sys.stdout.write(f"rank {self.rank} was made\n")

    def add(self, a, b=0):
        return self.rank, a + b

    def environment(self, *names):
        return {name: os.environ.get(name) for name in names}

    def environment_at_birth(self, name):
        with open("/proc/self/environ") as file:
            return dict(line.split("=", 1) for line in file.read().split("\0") if line).get(name)

    def heavy_modules(self):
        return sorted({"torch", "transformers"} & set(sys.modules))

    def pid(self):
        return os.getpid()

    def refuse(self):
        raise NonFiniteError(f"loss is nan on rank {self.rank}")

    def generate(self):
        bytearray(1 << 60)

    def fail_on(self, rank):
        if self.rank == rank:
            raise KeyError("lost")
        time.sleep(60)

    def kill_on(self, rank):
        if self.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    def hang(self):
        if self.rank == 0:
            wait = "import time\ndef a_child_waits(): time.sleep(60)\na_child_waits()"
            subprocess.Popen([sys.executable, "-c", wait])
        else:
            os.kill(os.getpid(), signal.SIGSTOP)
        self.sleep_for_ever()

    def sleep_for_ever(self):
        time.sleep(60)

    def close(self):
        sys.stdout.write("closed\n")


class SumBackend:
    """A `PolicyBackend` whose numbers tell where its shard came from."""

    def __init__(self):
        self.rank = int(os.environ["RANK"])
        self.saved = []

    def logprobs(self, shard, reference):
        assert not reference
        return shard.batch.token_ids_N.float() * 0.5

    def train_step(self, shard, loss, *, step):
        metrics = {
            "loss": Metric(loss * float(shard.batch.token_ids_N.sum()), "sum"),
            "rows": Metric(len(shard.batch), "mean"),
            "lr": Metric(0.25),
        }
        return StepStats(metrics, {"forward_backward": 0.0})

    def export_weights(self):
        for i in range(5):
            yield f"w{i}", torch.full((4,), float(i), dtype=torch.bfloat16)

    def save(self, folder, *, with_optimizer):
        assert folder.is_absolute(), "a worker has a working folder of its own"
        self.saved.append(with_optimizer)

    def save_finished(self):
        return len(self.saved) == 1 or self.rank > 0

    def close(self):
        pass


@dataclass(frozen=True)
class Make:
    cls: type

    def __call__(self):
        return self.cls()


@dataclass(frozen=True)
class MakeNothing:
    def __call__(self):
        raise ConfigError("policy.model_name is not a model")


@pytest.fixture(scope="module")
def cluster():
    import_ray().cloudpickle.register_pickle_by_value(sys.modules[__name__])
    cluster = RayCluster(CONFIG)
    cluster.start()
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def make_group(cluster, tmp_path_factory):
    groups = []
    two_ranks = place(CONFIG, ParallelSizes(ONE, ONE, ONE, ONE), gpus_found=0)

    def make(*, factory=None, timeout_s=60.0, name="policy", placement=two_ranks, **options):
        logs = tmp_path_factory.mktemp("logs")
        env = {"NEMO_LIKE_TEST": "from the configuration"}
        config = GroupConfig(
            name, placement, factory or Make(Echo), logs, timeout_s, env, **options
        )
        groups.append(WorkerGroup(cluster, config))
        groups[-1].start()
        return groups[-1], logs

    yield make
    for group in groups:
        group.close()


@pytest.fixture(scope="module")
def healthy(make_group):
    started = time.monotonic()
    group, logs = make_group(name="healthy")
    assert time.monotonic() - started < 0.5, "a start is waited for at the first call only"
    return group, logs


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def local_address():
    return import_ray().util.get_node_ip_address()


def wait_until_gone(pids, seconds):
    deadline = time.monotonic() + seconds
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(is_running, pids))


def test_calls_reach_every_rank_with_the_same_or_with_their_own_arguments(healthy):
    group, _ = healthy
    assert group.call_all("add", 2, b=3) == [(0, 5), (1, 5)]
    assert group.call_each("add", [(1,), (10, 5)]) == [(0, 1), (1, 15)]
    assert group.call_all("add", group.put(7)) == [(0, 7), (1, 7)]


def test_the_environment_is_set_before_the_process_starts_and_ranks_can_meet(healthy):
    group, _ = healthy
    assert group.call_all("environment_at_birth", "OMP_NUM_THREADS") == ["1", "1"]
    assert group.call_all("environment_at_birth", "CUDA_VISIBLE_DEVICES") == ["", ""]
    assert (
        group.call_all("environment_at_birth", "NEMO_LIKE_TEST") == ["from the configuration"] * 2
    )
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    first, second = group.call_all("environment", *names)
    port = first["MASTER_PORT"]
    assert [first[n] for n in names] == ["0", "0", "2", "2", "127.0.0.1", port]
    assert [second[n] for n in names] == ["1", "1", "2", "2", "127.0.0.1", port]
    assert group.call_all("heavy_modules") == [[], []], "a worker imports what its factory imports"


def test_what_workers_print_is_kept_in_files(healthy):
    group, logs = healthy
    group.wait_ready()
    assert "rank 1 was made" in (logs / "healthy_rank1.log").read_text()


def test_a_ctrl_c_of_the_terminal_does_not_end_workers(healthy):
    group, _ = healthy
    for pid in group.call_all("pid"):
        os.kill(pid, signal.SIGINT)
    assert group.call_all("add", 1) == [(0, 1), (1, 1)]


def test_our_errors_arrive_as_themselves_and_leave_the_group_usable_when_all_answered(healthy):
    group, _ = healthy
    with pytest.raises(
        NonFiniteError, match=r"loss is nan on rank .*healthy rank \d of 2.*in refuse"
    ):
        group.call_all("refuse")
    assert group.call_all("add", 1) == [(0, 1), (1, 1)]


def test_a_worker_without_memory_says_what_it_needed_and_what_takes_less(healthy):
    group, _ = healthy
    with pytest.raises(
        WorkerError, match=r"out of host memory in generate: .* of .* GiB.*lower policy\.generation"
    ):
        group.call_all("generate")


def test_an_exception_on_one_rank_ends_the_call_while_the_other_hangs(make_group):
    group, _ = make_group()
    pids = group.call_all("pid")
    started = time.monotonic()
    with pytest.raises(
        WorkerError, match=r"policy rank 1 of 2 .* failed in fail_on: KeyError: 'lost'"
    ):
        group.call_all("fail_on", 1)
    assert time.monotonic() - started < 5
    assert wait_until_gone(pids, 10)
    with pytest.raises(WorkerError, match="were ended before: policy rank 1"):
        group.call_all("pid")


def test_a_killed_worker_ends_the_call_within_ten_seconds_and_the_rest_of_the_group(make_group):
    group, logs = make_group()
    pids = group.call_all("pid")
    started = time.monotonic()
    with pytest.raises(WorkerError, match=r"policy rank 1 of 2 .* died in kill_on") as caught:
        group.call_all("kill_on", 1)
    assert time.monotonic() - started < 10
    assert f"pid {pids[1]}" in str(caught.value)
    assert "If it was memory (here free" in str(caught.value)
    assert str(logs / "policy_rank1.log") in str(caught.value)
    assert wait_until_gone(pids, 10)


def test_a_hang_ends_in_time_with_the_silent_ranks_and_their_stacks(make_group, healthy):
    healthy[0].wait_ready()
    group, logs = make_group(timeout_s=2.0)
    group.wait_ready()
    pids = group.call_all("pid")
    started = time.monotonic()
    with pytest.raises(
        WorkerError, match=r"no answer to hang within .*worker_timeout_s=2"
    ) as caught:
        group.call_all("hang")
    assert time.monotonic() - started < 7
    assert "rank 0 of 2" in str(caught.value) and "rank 1 of 2" in str(caught.value)
    assert "sleep_for_ever" in str(caught.value), "the stack of the rank that could still write it"
    sections = (logs / "stacks_policy_hang.txt").read_text().split("== ")
    assert str(logs / "stacks_policy_hang.txt") in str(caught.value)
    for who, what in {
        "driver": "in give_up",
        "policy rank 0 of 2": "in sleep_for_ever",
        f"started by policy rank 0 of 2 (node {local_address()}, pid {pids[0]})": "in <module>",
        "policy rank 1 of 2": "it is stopped",
        "healthy rank 1 of 2": "Thread 0x",
    }.items():
        assert any(who in section.split("\n")[0] and what in section for section in sections), who
    assert wait_until_gone(pids, 15), "a stopped process is ended too"


def test_an_error_of_a_factory_is_the_error_of_the_start(make_group):
    group, _ = make_group(factory=MakeNothing())
    with pytest.raises(ConfigError, match=r"policy\.model_name is not a model.*in start"):
        group.wait_ready()


@pytest.fixture(scope="module")
def policy(make_group):
    four = CONFIG.model_copy(update={"cpu_workers_per_node": 4})
    placement = place(four, ParallelSizes(ParallelAxis(2, ""), ONE, ONE, ONE), gpus_found=0)
    group, _ = make_group(factory=Make(SumBackend), placement=placement, bucket_bytes=16)
    plain = Batching("plain", micro_batch_size=2)
    return RemotePolicy(group, placement, train=plain, logprob=plain)


def a_batch():
    rows = [(1, 2, 3), (4,), (5, 6), (7, 8, 9, 10), (11, 12)]
    return TrainBatch.of([Example(ids, (False,) + (True,) * (len(ids) - 1)) for ids in rows])


def test_a_remote_policy_gives_back_the_tokens_in_the_order_of_the_batch(policy):
    logprobs_N = policy.logprobs(a_batch())
    assert torch.equal(logprobs_N, a_batch().token_ids_N * 0.5)


def test_metrics_of_a_step_count_each_data_parallel_rank_once(policy):
    stats = policy.train_step(a_batch(), 2.0)
    assert stats.metrics["loss"].value == 2.0 * a_batch().token_ids_N.sum()
    assert stats.metrics["rows"].value == 5 / 2
    assert stats.metrics["lr"].value == 0.25
    assert set(stats.phases) == {"forward_backward", "dispatch"} and stats.phases["dispatch"] > 0


def test_a_save_is_finished_when_it_is_on_every_rank(policy):
    policy.save(Path("step_1"), with_optimizer=False)
    assert policy.save_finished()
    policy.save(Path("step_2"))
    assert not policy.save_finished(), "rank 0 is not done"


def test_weights_are_exported_whole_in_order_and_in_bounded_chunks(policy):
    exported = list(policy.export_weights())
    assert [(name, float(t[0])) for name, t in exported] == [(f"w{i}", float(i)) for i in range(5)]
    assert all(t.dtype == torch.bfloat16 for _, t in exported)
    assert len(list(policy.send_weights())) == 3


def test_a_save_in_the_background_that_does_not_end_in_time_is_a_hang(policy, monkeypatch):
    policy.save(Path("step_3"))
    assert not policy.save_finished()
    late = SimpleNamespace(monotonic=lambda: time.monotonic() + 61)
    monkeypatch.setattr("nemo_like.cluster.policy.time", late)
    with pytest.raises(WorkerError, match=r"no answer to save within .* policy rank 0 of 4 \(node"):
        policy.save_finished()
