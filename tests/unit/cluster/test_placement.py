import math

import pytest

from nemo_like.cluster.placement import (
    NodeResources,
    ParallelAxis,
    ParallelSizes,
    Seat,
    check_fits,
    count_local_gpus,
    gpus_per_node,
    num_engines,
    place,
    place_single,
    shared_seat,
    worker_env,
)
from nemo_like.config.policy import DTensorConfig
from nemo_like.config.run import ClusterConfig
from nemo_like.errors import ConfigError


def sizes(tp=1, cp=1, pp=1, replicate=1):
    return ParallelSizes(
        ParallelAxis(tp, "tp_key"),
        ParallelAxis(cp, "cp_key"),
        ParallelAxis(pp, "pp_key"),
        ParallelAxis(replicate, "replicate_key"),
    )


def cluster(nodes=1, gpus=0, workers=1, threads=1):
    return ClusterConfig(
        num_nodes=nodes,
        gpus_per_node=gpus,
        cpu_workers_per_node=workers,
        cpu_threads_per_worker=threads,
    )


LAYOUTS = [
    (nodes, per_node, tp, cp, pp)
    for nodes in (1, 2, 4)
    for per_node in (1, 2, 4, 8)
    for tp in (1, 2, 4, 8)
    for cp in (1, 2)
    for pp in (1, 2, 4)
    if per_node % tp == 0 and (nodes * per_node) % (tp * cp * pp) == 0
]


@pytest.mark.parametrize(("nodes", "per_node", "tp", "cp", "pp"), LAYOUTS)
def test_every_layout_fills_the_mesh_exactly_once_with_tensor_peers_on_one_node(
    nodes, per_node, tp, cp, pp
):
    placement = place(cluster(nodes, per_node), sizes(tp, cp, pp), gpus_found=0)
    ranks = placement.ranks
    dp = nodes * per_node // (tp * cp * pp)
    assert [r.rank for r in ranks] == list(range(nodes * per_node))
    assert [(r.node, r.local_rank) for r in ranks] == [
        (node, local) for node in range(nodes) for local in range(per_node)
    ]
    assert placement.num_data_parallel == dp
    coordinates = {(r.pipeline, r.data, r.context, r.tensor) for r in ranks}
    assert len(coordinates) == len(ranks) == math.prod((pp, dp, cp, tp))
    for first in range(0, len(ranks), tp):
        peers = ranks[first : first + tp]
        assert [r.tensor for r in peers] == list(range(tp))
        assert len({(r.node, r.pipeline, r.data, r.context) for r in peers}) == 1


def test_tensor_is_fastest_then_context_then_data_then_pipeline():
    ranks = place(cluster(2, 8), sizes(2, 2, 2), gpus_found=0).ranks
    assert [r.tensor for r in ranks[:4]] == [0, 1, 0, 1]
    assert [r.context for r in ranks[:4]] == [0, 0, 1, 1]
    assert [r.data for r in ranks[:8]] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [r.pipeline for r in ranks] == [0] * 8 + [1] * 8


def test_one_leader_answers_for_each_data_parallel_part():
    assert place(cluster(1, 8), sizes(tp=2), gpus_found=0).leaders() == [0, 2, 4, 6]
    assert place(cluster(2, 8), sizes(2, 2, 2), gpus_found=0).leaders() == [0, 4]


def test_auto_takes_the_gpus_found_and_none_means_cpu_workers():
    auto = ClusterConfig(gpus_per_node="auto", cpu_workers_per_node=2)
    on_gpus = place(auto, sizes(), gpus_found=4)
    assert (on_gpus.world_size, on_gpus.device) == (4, "cuda:0")
    assert on_gpus.bundles == [{"CPU": 4.0, "GPU": 4.0}]
    on_cpu = place(auto, sizes(), gpus_found=0)
    assert (on_cpu.world_size, on_cpu.device) == (2, "cpu")
    assert on_cpu.bundles == [{"CPU": 2.0}]


def test_no_gpus_asked_for_is_a_cpu_run_on_a_gpu_machine():
    placement = place(cluster(gpus=0, workers=3, threads=2), sizes(), gpus_found=8)
    assert (placement.device, placement.world_size) == ("cpu", 3)
    assert placement.bundles == [{"CPU": 6.0}]
    assert worker_env(placement, {})["CUDA_VISIBLE_DEVICES"] == ""


def test_each_node_gets_one_bundle_that_ray_can_not_split():
    assert place(cluster(4, 8), sizes(tp=8), gpus_found=0).bundles == [{"CPU": 8.0, "GPU": 8.0}] * 4


@pytest.mark.parametrize(
    ("config", "parallel", "named"),
    [
        (cluster(1, 4), sizes(tp=3), ["tp_key=3", "cluster.gpus_per_node=4", "multiple of 3"]),
        (cluster(workers=2), sizes(tp=4), ["tp_key=4", "cluster.cpu_workers_per_node=2"]),
        (cluster(2, 4), sizes(tp=2, cp=2, pp=4), ["tp_key=2 x cp_key=2 x pp_key=4", "8 worker"]),
        (cluster(2, 2), sizes(tp=4), ["tp_key=4", "cluster.gpus_per_node=2", "one machine"]),
        (cluster(1, 4), sizes(tp=2, replicate=4), ["replicate_key=4", "2 data-parallel", "tp_key"]),
    ],
)
def test_sizes_that_do_not_fit_the_world_are_refused_by_key(config, parallel, named):
    with pytest.raises(ConfigError) as caught:
        place(config, parallel, gpus_found=0)
    for text in named:
        assert text in str(caught.value)


def test_the_sizes_of_the_dtensor_backend_carry_its_keys():
    parallel = ParallelSizes.of_dtensor(DTensorConfig(tensor_parallel_size=2))
    with pytest.raises(ConfigError, match=r"policy\.dtensor_cfg\.tensor_parallel_size=2"):
        place(cluster(workers=1), parallel, gpus_found=0)


def test_machines_that_can_not_hold_the_placement_are_refused_with_what_was_found():
    placement = place(cluster(2, 8), sizes(), gpus_found=0)
    good = NodeResources("10.0.0.1", cpus=64, gpus=8)
    check_fits(placement, [good, good])
    for nodes in ([], [good], [good, NodeResources("10.0.0.2", 64, 4)]):
        with pytest.raises(ConfigError, match=r"cluster\.num_nodes=2.*cluster\.gpus_per_node=8"):
            check_fits(placement, nodes)
    with pytest.raises(ConfigError, match=r"10\.0\.0\.2: 4 GPUs"):
        check_fits(placement, [good, NodeResources("10.0.0.2", 64, 4)])


def test_workers_get_one_thread_and_more_only_if_waiting_threads_sleep():
    one = worker_env(place_single(uses_gpu=True), {})
    assert one["OMP_NUM_THREADS"] == "1"
    assert "OMP_WAIT_POLICY" not in one and "CUDA_VISIBLE_DEVICES" not in one
    two = worker_env(place_single(uses_gpu=False, threads=2), {})
    assert (two["OMP_NUM_THREADS"], two["OMP_WAIT_POLICY"]) == ("2", "PASSIVE")
    own = worker_env(place_single(uses_gpu=False), {"OMP_NUM_THREADS": "4", "NCCL_DEBUG": "INFO"})
    assert (own["OMP_WAIT_POLICY"], own["NCCL_DEBUG"]) == ("PASSIVE", "INFO")


def test_gpus_are_counted_by_device_file_or_by_what_is_visible(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert count_local_gpus(tmp_path) == 2
    for visible, count in (("", 0), ("-1", 0), ("1", 1), ("0,1,GPU-abc", 3)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert count_local_gpus(tmp_path) == count


@pytest.mark.parametrize(
    ("gpus", "per_engine", "per_node", "count"), [(8, 1, 8, 8), (8, 4, 8, 2), (2, 2, 2, 1)]
)
def test_gpus_are_shared_out_among_engines(gpus, per_engine, per_node, count):
    assert num_engines(gpus, per_engine, per_node=per_node) == count


@pytest.mark.parametrize(("gpus", "per_engine", "per_node"), [(8, 3, 8), (2, 4, 8), (0, 1, 8)])
def test_engines_that_do_not_come_out_even_are_refused(gpus, per_engine, per_node):
    with pytest.raises(ConfigError, match=f"tensor_parallel_size={per_engine}"):
        num_engines(gpus, per_engine, per_node=per_node)


def test_an_engine_shares_the_gpus_of_neighbours_on_one_machine():
    seats = [Seat(machine, gpu) for machine in "ab" for gpu in ("3", "1", "0", "2")]
    assert shared_seat(seats, 0, 1) == Seat("a", "3")
    assert shared_seat(seats, 3, 2) == Seat("b", "0,2")


def test_an_engine_asks_for_all_its_gpus_or_for_none_that_others_own():
    assert place_single(uses_gpu=True, gpus=2).bundles == [{"CPU": 1.0, "GPU": 2.0}]
    beside = place_single(uses_gpu=True, gpus=0)
    assert beside.bundles == [{"CPU": 1.0}]
    assert "CUDA_VISIBLE_DEVICES" not in worker_env(beside, {})


@pytest.mark.parametrize(("found", "used"), [(0, 0), (1, 1), (8, 1)])
def test_one_process_without_ray_uses_one_gpu_at_most(found, used):
    assert gpus_per_node(ClusterConfig(launcher="local"), found) == used
