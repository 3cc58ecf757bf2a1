"""Whatever ends the driver, no process of its Ray stays behind."""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

DRIVER = """
import signal
import sys
from pathlib import Path
from nemo_like.cluster.group import GroupConfig, WorkerGroup
from nemo_like.cluster.placement import place_single
from nemo_like.cluster.runtime import RayCluster
from nemo_like.config.run import ClusterConfig

def make():
    class Sleeper:
        def doze(self):
            import time
            time.sleep(600)
    return Sleeper()

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
cluster = RayCluster(ClusterConfig(gpus_per_node=0))
group = WorkerGroup(
    cluster, GroupConfig("policy", place_single(uses_gpu=False), make, Path(sys.argv[1]), 600.0)
)
group.wait_ready()
sys.stdout.write("ready\\n")
sys.stdout.flush()
group.call_all("doze")
"""


def processes_with(marker):
    """The processes with this in their environment: pid -> command line."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (PermissionError, FileNotFoundError, ProcessLookupError):
            continue  # another user's, or already gone
        if marker.encode() in environment:
            found[int(folder.name)] = command.strip()[-200:]
    return found


def wait_until_none(marker, seconds):
    deadline = time.monotonic() + seconds
    while (left := processes_with(marker)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_no_process_stays_behind_when_the_driver_is(end, tmp_path):
    marker = f"NEMO_LIKE_TEST_RUN={uuid.uuid4().hex}"
    name, value = marker.split("=")
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path)],
        env={**os.environ, name: value},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert driver.stdout.readline() == "ready\n", driver.stderr.read()
        assert len(processes_with(marker)) > 3, "the driver, Ray's own, and the worker"
        # As a terminal does it: to every process of the group (Ray's must leave it to the driver).
        os.killpg(driver.pid, end) if end == signal.SIGINT else os.kill(driver.pid, end)
        driver.wait(20)
        assert driver.returncode != 0
        # Agents of Ray that were still starting look for their head for HEAD_LOST_S.
        assert wait_until_none(marker, 90) == {}
    finally:
        for pid in processes_with(marker):
            os.kill(pid, signal.SIGKILL)
        driver.communicate()
