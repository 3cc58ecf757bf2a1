"""The default launcher: the same losses on any layout, and a dead worker ends the run soon."""

import os
import re
import shutil
import signal
import time
from contextlib import contextmanager

import psutil
import pytest

from nemo_like.cluster.runtime import import_ray
from nemo_like.errors import EXIT_INTERRUPTED
from tests.e2e.commands import Place, sft, start, wait_until, words

STEPS = 4
CPU = ("cluster.launcher=ray", "cluster.gpus_per_node=0")
SETTINGS = (
    f"sft.max_num_steps={STEPS}", "policy.scheduler.lr_warmup_iters=1", "policy.optimizer.lr=3e-4",
    "sft.val_period=2", "sft.val_at_end=true", "sft.val_batches=1", "checkpointing.save_period=2",
)  # fmt: skip
LONG = (
    "sft.max_num_steps=4000", "sft.max_num_epochs=1000", "checkpointing.save_period=3",
    "checkpointing.keep_top_k=2",
)  # fmt: skip
LAYOUTS = {
    "2 workers": ("cluster.cpu_workers_per_node=2",),
    "2 workers, tensor parallel": (
        "cluster.num_nodes=1", "cluster.cpu_workers_per_node=2",
        "policy.dtensor_cfg.tensor_parallel_size=2",
    ),
    "2 workers, Megatron": (
        "cluster.cpu_workers_per_node=2", "policy.dtensor_cfg.enabled=false",
        "policy.megatron_cfg.enabled=true", "policy.megatron_cfg.tensor_model_parallel_size=2",
    ),
    "2 machines": ("cluster.num_nodes=2", "cluster.cpu_workers_per_node=1"),
    "2 machines, a stage of Megatron's pipeline on each": (
        "cluster.num_nodes=2", "cluster.cpu_workers_per_node=1", "policy.dtensor_cfg.enabled=false",
        "policy.megatron_cfg.enabled=true", "policy.megatron_cfg.pipeline_model_parallel_size=2",
    ),
}  # fmt: skip
IN_CI = ("2 workers, Megatron",)  # of tensor parallel ones one is killed below


def offspring(pid):
    """Everything that a process has started, and is responsible for."""
    return psutil.Process(pid).children(recursive=True)


def end_of(process, *, timeout_s):
    """The exit code and what was said; all that it started is gone then."""
    output, _ = process.communicate(timeout=timeout_s)
    return process.returncode, words(output)


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("local"))
    assert sft(place.argv(*SETTINGS)) == 0
    return place


def started(place, *settings):
    return start(place.argv(*CPU, *settings))


@contextmanager
def machines(layout):
    """The settings that lead to as many machines as the layout has, which Ray plays here."""
    if "machines" not in layout:
        yield ()
        return
    import_ray()
    from ray.cluster_utils import Cluster

    size = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=size | {"include_dashboard": False})
    try:
        cluster.add_node(**size)
        yield (f"cluster.address={cluster.address}",)
    finally:
        cluster.shutdown()


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(label, marks=pytest.mark.slow if label not in IN_CI else ())
        for label in LAYOUTS
    ],
)
def test_every_layout_gives_the_losses_of_one_process(place, in_one_process, layout):
    with machines(layout) as address:
        code, said = end_of(started(place, *SETTINGS, *LAYOUTS[layout], *address), timeout_s=180)
    assert code == 0, said
    assert place.losses() == pytest.approx(in_one_process.losses(), abs=1e-5)
    for mine, other in zip(place.values(), in_one_process.values(), strict=True):
        assert mine["train/grad_norm"] == pytest.approx(other["train/grad_norm"], abs=1e-4)
        if mine["step"] % 2 == 0:
            assert mine["validation/val_loss"] == pytest.approx(
                other["validation/val_loss"], abs=1e-5
            )
    assert place.steps() == [2, 4]
    shutil.rmtree(place.step(4))
    assert sft(place.argv(*SETTINGS)) == 0  # continues what the workers began
    assert place.losses() == pytest.approx(in_one_process.losses(), abs=1e-5)


def test_a_signal_and_then_a_killed_worker(place):
    """SIGTERM saves and ends with 75; of the same command a worker dies: 6, soon, no remains."""
    process = started(place, *LONG, *LAYOUTS["2 workers, tensor parallel"])
    family = []
    try:
        wait_until(lambda: len(place.logged()) >= 2)
        family = offspring(process.pid)
        os.killpg(process.pid, signal.SIGTERM)  # as a batch system does it
        code, said = end_of(process, timeout_s=60)
    finally:
        process.kill()
    assert code == EXIT_INTERRUPTED, said
    saved = place.steps()[-1]
    assert f"stopped by SIGTERM at step {saved} of 4000" in said
    assert_gone(family)

    process = started(place, *LONG, *LAYOUTS["2 workers, tensor parallel"])
    try:
        wait_until(lambda: place.steps()[-1] > saved)
        family = offspring(process.pid)
        (victim,) = workers_of_rank(place, 1)
        os.kill(victim, signal.SIGKILL)
        killed_at = time.monotonic()
        code, said = end_of(process, timeout_s=60)
        took_s = time.monotonic() - killed_at
    finally:
        process.kill()
    assert code == 6, said
    assert took_s < 10
    assert f"policy rank 1 of 2 (node 127.0.0.1, pid {victim}) died in" in re.sub(
        r"node [\d.]+", "node 127.0.0.1", said
    )
    assert f"last good checkpoint {place.step(place.steps()[-1])}" in said
    assert "Next: uv run examples/run_sft.py" in said
    assert_gone(family)


def assert_gone(family):
    _, alive = psutil.wait_procs(family, timeout=10)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


def workers_of_rank(place, rank):
    """The processes that write the log of this rank."""
    log = str(place.log / "workers" / f"policy_rank{rank}.log")
    found = []
    for process in psutil.process_iter():
        try:
            targets = {os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in (1, 2)}
        except OSError:  # ended, or not ours to look at
            continue
        if targets == {log}:
            found.append(process.pid)
    return found
