"""Rollout engines that die under real Ray: light processes that draw what they are told to."""

import os
import signal
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from nemo_like.cluster.generator import RemoteGenerator, shares
from nemo_like.cluster.group import GroupConfig, WorkerGroup
from nemo_like.cluster.placement import Placement, RankPlace, place_single, shared_seat
from nemo_like.cluster.policy import RemotePolicy
from nemo_like.cluster.runtime import RayCluster, import_ray
from nemo_like.config.run import ClusterConfig
from nemo_like.data.batching import Batching
from nemo_like.errors import CheckpointError, DataError, WorkerError
from nemo_like.types import Prompt, Rollout, SamplingParams
from nemo_like.weight_sync.broadcast import Broadcast
from nemo_like.weight_sync.digest import tensor_digest, weights_digest
from nemo_like.weight_sync.ipc import Ipc

TRANSPORTS = {"object_store": None, "ipc": Ipc(), "broadcast": Broadcast(deadline_s=8.0)}
PROMPTS = [Prompt(index, (1,) * (index + 1), "", "") for index in (7, 7, 7, 3, 3, 9, 2, 2)]
SAMPLING = SamplingParams(4, seed=5)


class DiceEngine:
    """Tokens that depend on the weights, the seed, the prompt and the sample; or a way to fail.

    A file in its folder of faults is a fault of whichever engine removes it first.
    """

    def __init__(self, faults):
        self.faults = faults

    def load_weights(self, tensors, *, version):
        self.version, self.weights, digests = version, {}, {}
        for name, tensor in tensors:
            self.weights[name] = float(tensor.sum())
            digests[name] = tensor_digest(tensor)
            self._fail_in("load")
        if self.weights.get("w1") == -1:
            raise CheckpointError("w1 is not a weight of this model")
        return "another" if self._takes("digest") else weights_digest(digests)

    def sleep(self):
        self._fail_in("sleep")
        self.weights = "none"

    def seen(self):
        return ray.get_runtime_context().get_node_id(), os.environ["CUDA_VISIBLE_DEVICES"]

    def prefix(self):
        return sys.prefix

    def generate(self, prompts, sampling, samples):
        self._fail_in("generate")
        time.sleep(0.1)  # long enough for all engines to be at work
        version = 99 if self._takes("version") else self.version
        rollouts = []
        for prompt, sample in zip(prompts, samples, strict=True):
            if prompt.index == 666:
                raise DataError("prompt 666 is too long")
            dice = np.random.default_rng([sampling.seed, prompt.index, sample])
            ids = tuple(dice.integers(0, 100, sampling.max_new_tokens).tolist())
            text = f"{self.weights}"
            rollouts.append(Rollout(prompt, ids, (0.0,) * len(ids), text, "length", version))
        return rollouts

    def pid(self):
        return os.getpid()

    def close(self):
        pass

    def _takes(self, fault):
        try:
            (self.faults / fault).unlink()
        except FileNotFoundError:
            return False
        return True

    def _fail_in(self, phase):
        if self._takes(f"kill in {phase}"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self._takes(f"stop in {phase}"):
            os.kill(os.getpid(), signal.SIGSTOP)
        if (self.faults / f"always kill in {phase}").exists():
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class MakeDice:
    faults: Path

    def __call__(self):
        return DiceEngine(self.faults)


class Weigher:
    """The part of a policy's rank that sends weights: three tensors, a bucket each.

    Its weights are the number that is the name of the folder that it loads.
    """

    WRONG, BREAKS = -1, -2

    def load(self, folder):
        self.value = int(folder.name)

    def export_weights(self):
        yield "w0", torch.full((1 << 20,), float(self.value))
        yield "w1", torch.full((1,), float(self.value))
        if self.value == self.BREAKS:
            raise ConnectionError("nothing comes any more")
        yield "w2", torch.full((1 << 20,), float(self.value))

    def close(self):
        pass


class WeightsHere(Weigher):
    """The same in the driver, as an evaluation sends them."""

    weights_version = 0
    value = 8


@pytest.fixture(scope="module")
def cluster():
    import_ray().cloudpickle.register_pickle_by_value(sys.modules[__name__])
    # Ray believes in the GPUs, and shares them out; no test here uses one.
    cluster = RayCluster(ClusterConfig(gpus_per_node=2))
    cluster.start()
    yield cluster
    cluster.close()


class World:
    """Two engines, their folder of faults, what was said of them, and a policy of two ranks."""

    def __init__(self, cluster, folder, timeout_s=60.0):
        self.cluster, self.folder, self.timeout_s = cluster, folder, timeout_s
        self.said, self.said_at = [], []
        self.faults = folder / "faults"
        self.faults.mkdir()
        self.engines = {}
        self.generator = None

    @cached_property
    def policy(self):
        ranks = tuple(RankPlace(rank, 0, rank, data=rank) for rank in range(2))
        place = Placement(ranks, num_nodes=1, uses_gpu=False)
        weighers = self.group("policy", place, Weigher, bucket_bytes=1 << 20)
        return RemotePolicy(weighers, place, train=Batching(), logprob=Batching())

    def group(self, name, place, factory, **options):
        config = GroupConfig(name, place, factory, self.folder, self.timeout_s, **options)
        group = WorkerGroup(self.cluster, config)
        group.start()
        return group

    def engine(self, number):
        """The one that is there, unless it is lost."""
        there = self.engines.get(number)
        if there is None or there.is_lost:
            place = place_single(uses_gpu=False)
            there = self.group(f"engine_{number}", place, MakeDice(self.faults))
            self.engines[number] = there
        return there

    def connect(self, transport, **options):
        self.generator = RemoteGenerator(
            self.engine, num_engines=2, say=self.say, transport=transport, **options
        )
        self.policy.share_gpus(self.generator.sleep)

    def say(self, text):
        self.said.append(text)
        self.said_at.append(time.monotonic())

    def sync(self, value):
        """The policy takes these weights, and sends them, also if it has them already."""
        self.policy.load(Path(str(value)))
        self.generator.sync(self.policy)

    def fault(self, name):
        (self.faults / name).touch()

    def pids(self):
        return [engine.call_all("pid")[0] for engine in self.generator._engines]

    def generate(self):
        return self.generator.generate(PROMPTS, SAMPLING)

    def close(self):
        if self.generator is not None:
            self.generator.close()
            self.generator.close()
        self.policy.close()


@pytest.fixture(scope="module")
def the_world(cluster, tmp_path_factory):
    world = World(cluster, tmp_path_factory.mktemp("world"))
    yield world
    world.close()


@pytest.fixture(scope="module")
def expected(the_world):
    """What two undisturbed engines draw with the weights 8, which came through the store."""
    the_world.connect(None)
    the_world.sync(8)
    return drawn(the_world.generate())


@pytest.fixture(scope="module", params=TRANSPORTS)
def world(request, the_world, expected):
    """The same engines, with weights that come by each transport in turn."""
    the_world.connect(TRANSPORTS[request.param])
    return the_world


@pytest.fixture(autouse=True)
def no_faults_are_left(the_world):
    yield
    for fault in the_world.faults.iterdir():
        fault.unlink()
    the_world.said.clear()
    the_world.said_at.clear()


def drawn(rollouts):
    return [(r.token_ids, r.text) for r in rollouts]


def test_work_is_shared_evenly_in_consecutive_parts_and_some_may_be_empty():
    assert shares([1] * 8, 2) == [range(0, 4), range(4, 8)]
    assert shares([3, 1, 1, 1], 2) == [range(0, 1), range(1, 4)]
    assert shares([1, 1], 3) == [range(0, 1), range(1, 1), range(1, 2)]
    assert shares([], 2) == [range(0, 0), range(0, 0)]
    for parts in range(1, 9):
        ranges = shares(list(range(1, 30)), parts)
        assert [place for part in ranges for place in part] == list(range(29))
        assert max(sum(i + 1 for i in part) for part in ranges) <= 435 / parts + 29


def test_rollouts_come_in_the_order_of_the_prompts_with_the_random_stream_of_their_sample(
    world, expected
):
    world.sync(8)
    rollouts = world.generate()
    assert [r.prompt for r in rollouts] == PROMPTS
    assert drawn(rollouts) == expected
    assert len({r.token_ids for r in rollouts}) == len(PROMPTS)
    only_7 = world.generator.generate(PROMPTS[:3], SAMPLING)
    assert drawn(only_7) == expected[:3], "whatever else is drawn, by whichever engine"
    assert len(set(world.pids())) == 2
    assert world.generator.generate([], SAMPLING) == []


@pytest.mark.parametrize(
    ("world", "phase"),
    [
        ("object_store", "generate"),
        ("object_store", "load"),
        ("ipc", "load"),
        ("broadcast", "load"),
        ("broadcast", "generate"),
    ],
    indirect=["world"],
)
def test_an_engine_that_is_killed_is_replaced_and_the_result_is_that_without_the_fault(
    world, expected, phase
):
    before = world.pids()
    started = time.monotonic()
    world.fault(f"kill in {phase}")
    world.sync(8)
    assert drawn(world.generate()) == expected
    assert world.said_at[0] - started < 10, "noticed; 1.3 s where it was written"
    assert world.said_at[1] - started < 60, "replaced; 4 s: a process that imports torch"
    assert len(set(before) & set(world.pids())) == 1
    assert len(world.said) == 2
    phase_name = {"load": "load_weights"}.get(phase, phase)
    assert f"died in {phase_name}" in world.said[0] and "takes its place" in world.said[0]
    assert "caught up" in world.said[1]


@pytest.mark.parametrize("world", ["object_store"], indirect=True)
def test_an_engine_that_was_killed_between_two_calls_is_replaced_at_the_next(world, expected):
    world.sync(8)
    os.kill(world.pids()[1], signal.SIGKILL)
    assert drawn(world.generate()) == expected
    assert len(world.said) == 2


@pytest.mark.parametrize("world", ["object_store"], indirect=True)
def test_an_engine_that_is_lost_twice_in_a_call_is_an_error_and_both_can_be_asked_again(
    world, expected
):
    world.sync(8)
    world.fault("always kill in generate")
    with pytest.raises(WorkerError, match=r"engine_\d rank 0 of 1 .* died in generate"):
        world.generate()
    (world.faults / "always kill in generate").unlink()
    assert drawn(world.generate()) == expected


@pytest.mark.slow
def test_an_engine_that_does_not_answer_in_time_is_replaced(cluster, tmp_path, expected):
    world = World(cluster, tmp_path, timeout_s=5.0)
    world.connect(None)
    try:
        world.generator.sync(WeightsHere())
        world.fault("stop in generate")
        assert drawn(world.generate()) == expected
        assert "no answer to generate within cluster.worker_timeout_s=5" in world.said[0]
    finally:
        world.generator.close()


@pytest.mark.parametrize("world", ["ipc"], indirect=True)
def test_an_engine_that_misses_weights_which_nobody_has_any_more_is_an_error(world, expected):
    """The object store would have kept them, as the deaths in `generate` above show."""
    world.sync(8)
    world.policy.load(Path("5"))
    world.fault("kill in generate")
    with pytest.raises(CheckpointError, match="refit_transport=object_store they are kept"):
        world.generate()
    world.sync(8)
    assert drawn(world.generate()) == expected


def test_weights_of_the_driver_go_through_the_store_whatever_the_transport(world, expected):
    world.generator.sync(WeightsHere())
    assert drawn(world.generate()) == expected
    world.sync(8)
    assert drawn(world.generate()) == expected


@pytest.mark.parametrize("world", ["object_store"], indirect=True)
def test_what_an_engine_refuses_is_refused_and_no_death(world):
    world.sync(8)
    pids = world.pids()
    with pytest.raises(DataError, match="prompt 666 is too long.*engine_1"):
        world.generator.generate([*PROMPTS, Prompt(666, (1,), "", "")], SAMPLING)
    assert world.pids() == pids
    assert world.said == [] and len(world.generate()) == len(PROMPTS)


@pytest.mark.parametrize(
    ("value", "fault", "error", "message"),
    [
        (Weigher.WRONG, None, CheckpointError, "w1 is not a weight of this model"),
        (Weigher.BREAKS, None, WorkerError, "ConnectionError: nothing comes any more"),
        (3, "digest", CheckpointError, "version .* for different ones: .*another"),
    ],
)
def test_after_a_sync_that_failed_nothing_is_drawn_until_one_succeeds(
    world, expected, value, fault, error, message
):
    world.sync(8)
    if fault:
        world.fault(fault)
    with pytest.raises(error, match=message):
        world.sync(value)
    with pytest.raises(CheckpointError, match="a sync has to succeed first"):
        world.generate()
    world.sync(8)
    assert drawn(world.generate()) == expected
    assert world.said == []


def test_weights_that_have_not_changed_are_not_sent_again(world, expected):
    world.sync(8)
    first = world.generate()
    world.fault("always kill in load")
    world.generator.sync(world.policy)
    assert world.generate() == first, "versions too"


@pytest.mark.parametrize("world", ["object_store"], indirect=True)
def test_rollouts_of_other_weights_than_those_of_the_last_sync_are_refused(world):
    world.sync(8)
    world.fault("version")
    with pytest.raises(CheckpointError, match="version 99 of the weights"):
        world.generate()


def test_a_sync_stamps_the_rollouts_with_its_number(world):
    world.sync(3)
    first = world.generate()
    world.sync(4)
    second = world.generate()
    versions = [{r.weights_version for r in rollouts} for rollouts in (first, second)]
    (one,), (other,) = versions
    assert other == one + 1
    assert "'w1': 4.0" in second[0].text


def test_engines_sleep_before_the_policy_works_and_wake_with_weights_that_did_not_change(
    world, expected
):
    world.connect(world.generator._transport, shares_gpus=True)
    world.sync(8)
    assert drawn(world.generate()) == expected
    world.policy.load(Path("8"))
    with pytest.raises(CheckpointError, match="a sync has to succeed first"):
        world.generate()
    for engine in world.generator._engines:
        assert engine.call_all("generate", PROMPTS[:1], SAMPLING, [0])[0][0].text == "none"
    world.generator.sync(world.policy)
    assert drawn(world.generate()) == expected
    world.generator.sleep()  # as before logprobs, which change nothing
    world.generator.sync(world.policy)
    assert drawn(world.generate()) == expected


def test_an_engine_that_dies_on_the_way_to_sleep_is_replaced(world, expected):
    world.connect(world.generator._transport, shares_gpus=True)
    world.sync(8)
    world.fault("kill in sleep")
    world.policy.load(Path("8"))
    assert "engine" in world.said[-2] and "caught up" in world.said[-1]
    world.generator.sync(world.policy)
    assert drawn(world.generate()) == expected


def test_workers_live_in_this_environment_though_ray_was_imported_before_us(the_world):
    """As this file does: under `uv run`, Ray would otherwise make them another."""
    group = the_world.group("environment", place_single(uses_gpu=False), MakeDice(the_world.faults))
    assert group.call_all("prefix") == [sys.prefix]
    group.close()


def test_engines_sit_on_the_gpus_of_the_workers_that_they_share_them_with(the_world):
    ranks = tuple(RankPlace(rank, 0, rank) for rank in range(2))
    on_gpus = Placement(ranks, num_nodes=1, uses_gpu=True)
    trainer = the_world.group("trainer", on_gpus, MakeDice(the_world.faults))
    seats = trainer.seats()
    beside = place_single(uses_gpu=True, gpus=0)
    for number in range(2):
        seat = shared_seat(seats, number, 1)
        engine = the_world.group(
            f"beside_{number}",
            beside,
            MakeDice(the_world.faults),
            env_vars={"CUDA_VISIBLE_DEVICES": seat.gpus},
            machine=seat.machine,
        )
        assert engine.call_all("seen") == [trainer.call_all("seen")[number]]
        engine.close()
    assert {seat.gpus for seat in seats} == {"0", "1"}
    trainer.close()
