"""Four machines, simulated on one: each has Ray processes, CPUs and GPUs of its own."""

import os
import sys
import threading
import time
from dataclasses import dataclass

import pytest

from nemo_like.cluster.group import GroupConfig, WorkerGroup
from nemo_like.cluster.placement import (
    ParallelAxis,
    ParallelSizes,
    check_fits,
    place,
    place_single,
    shared_seat,
)
from nemo_like.cluster.runtime import RayCluster, import_ray
from nemo_like.config.run import ClusterConfig
from nemo_like.errors import ConfigError, WorkerError

NUM_NODES, GPUS = 4, 2
SIZES = ParallelSizes(
    tensor=ParallelAxis(2, "policy.megatron_cfg.tensor_model_parallel_size"),
    context=ParallelAxis(1, ""),
    pipeline=ParallelAxis(2, "policy.megatron_cfg.pipeline_model_parallel_size"),
    replicate=ParallelAxis(1, ""),
)


class Rank:
    """Tells where it is."""

    def environment(self):
        names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES")
        return {name: os.environ.get(name) for name in names}

    def wait(self):
        time.sleep(100)


@dataclass(frozen=True)
class MakeRank:
    def __call__(self):
        return Rank()


@pytest.fixture(scope="module")
def machines():
    """Ray's own simulation of a cluster: the nodes, the first of them its head."""
    ray = import_ray()
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    size = {"num_cpus": 4, "num_gpus": GPUS, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=size | {"include_dashboard": False})
    for _ in range(NUM_NODES - 1):
        cluster.add_node(**size)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def config(machines):
    return ClusterConfig(address=machines.address, num_nodes=NUM_NODES, gpus_per_node=GPUS)


@pytest.fixture(scope="module")
def connected(config):
    cluster = RayCluster(config)
    cluster.start()
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def make_group(connected, tmp_path_factory):
    groups = []

    def make(name, placement, **options):
        logs = tmp_path_factory.mktemp("logs")
        config = GroupConfig(name, placement, MakeRank(), logs, 60.0, **options)
        groups.append(WorkerGroup(connected, config))
        groups[-1].start()
        return groups[-1]

    yield make
    for group in groups:
        group.close()


@pytest.fixture(scope="module")
def placement(config):
    return place(config, SIZES, gpus_found=0)


@pytest.fixture(scope="module")
def policy(make_group, placement):
    return make_group("policy", placement)


def test_tensor_peers_share_a_machine_and_pipeline_stages_do_not(policy, placement):
    seats = policy.seats()
    for one in placement.ranks:
        for other in placement.ranks:
            together = seats[one.rank].machine == seats[other.rank].machine
            assert together == (one.node == other.node)
            if (one.data, one.pipeline) == (other.data, other.pipeline):
                assert together, "tensor-parallel ranks stay on one machine"
            if one.pipeline != other.pipeline:
                assert not together, "the stages are on machines of their own"
    assert len({seat.machine for seat in seats}) == NUM_NODES
    assert len(set(seats)) == NUM_NODES * GPUS, "no two ranks have the same GPU"
    for place_of_rank, found in zip(placement.ranks, policy.call_all("environment"), strict=True):
        assert found["RANK"] == str(place_of_rank.rank)
        assert found["LOCAL_RANK"] == str(place_of_rank.local_rank)
        assert found["LOCAL_WORLD_SIZE"] == str(GPUS)


def test_engines_that_share_gpus_sit_on_the_machines_of_their_workers(policy, make_group):
    beside = place_single(uses_gpu=True, gpus=0)
    for number in (0, NUM_NODES - 1):
        seat = shared_seat(policy.seats(), number, GPUS)
        env = {"CUDA_VISIBLE_DEVICES": seat.gpus}
        engine = make_group(f"engine_{number}", beside, machine=seat.machine, env_vars=env)
        assert engine.seats()[0].machine == seat.machine
        assert engine.call_all("environment")[0]["CUDA_VISIBLE_DEVICES"] == seat.gpus


@pytest.mark.parametrize("change", [{"num_nodes": 2 * NUM_NODES}, {"gpus_per_node": 2 * GPUS}])
def test_a_world_that_the_machines_can_not_hold_is_refused(connected, config, change):
    wanted = place(config.model_copy(update=change), SIZES, gpus_found=0)
    with pytest.raises(ConfigError, match=r"of the 4 found .*2 GPUs, 4 CPUs"):
        check_fits(wanted, connected.nodes())


def test_a_machine_that_is_lost_ends_the_call_with_its_ranks(machines, policy, placement):
    """The last test of the file: the machine does not come back."""
    seats = policy.seats()
    lost = machines.worker_nodes.pop()
    machines.worker_nodes.add(lost)
    ranks = [r.rank for r in placement.ranks if seats[r.rank].machine == lost.node_id]
    assert len(ranks) == GPUS
    killer = threading.Timer(1.0, machines.remove_node, (lost,), {"allow_graceful": False})
    killer.start()
    began = time.monotonic()
    with pytest.raises(WorkerError, match=rf"policy rank ({ranks[0]}|{ranks[1]}) of 8"):
        policy.call_all("wait")
    assert time.monotonic() - began < 40, "before the deadline of the call"
    assert policy.is_lost
    killer.join()
