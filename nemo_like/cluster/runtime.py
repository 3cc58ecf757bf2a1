"""The connection to Ray, and the only place that imports it in the driver."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from nemo_like.cluster import stacks
from nemo_like.cluster.failures import WorkerIdentity
from nemo_like.cluster.placement import NodeResources, count_local_gpus
from nemo_like.config.run import ClusterConfig
from nemo_like.errors import ConfigError, WorkerError

OBJECT_STORE_BYTES = 1 << 30
"""Of a cluster that we start: batches pass through, and the weights that engines hold stay.

What is too much for it, Ray writes to the disk.
"""
UNRATIONED_CPUS = 1024
"""Of a cluster that we start: how many workers share the cores is the user's choice, not Ray's."""
CONNECT_S = 300.0
"""How long Ray may take to start here, or to answer at an address; it takes about 4 s."""
SHUTDOWN_S = 60.0
"""How long Ray may take to end its processes; after that they end with the driver."""
HEAD_LOST_S = "15"
"""Of a cluster that we start: how long its processes look for its head before they end."""


def import_ray() -> ModuleType:
    """The ray module.

    Under `uv run`, Ray would build a second environment for its workers, without what was installed
    into this one, unless it is told not to: by an environment variable, which it reads when it is
    imported, or by the constant that this became, since a user's module may have imported it first.
    The other variable is about a warning: we say ourselves which GPUs a worker sees.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    constants: Any = import_module("ray._private.ray_constants")
    constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False
    return ray


class RayCluster:
    """A connection to Ray, made in the background: `start` returns at once, `ray` waits.

    Starting takes 4 seconds, mostly in other processes, while the driver can import and tokenise.
    It also happens in a thread because `ray.init` replaces the handler of SIGTERM when it is called
    in the main one.
    """

    def __init__(self, config: ClusterConfig):
        self._config = config
        self._folder: str | None = None
        self._ray: Future[ModuleType] | None = None
        self._closed = threading.Event()
        self._ended = threading.Event()
        self._workers: dict[str, Sequence[WorkerIdentity]] = {}

    def start(self) -> None:
        """Begins to connect, or to start a cluster on this machine; a second call does nothing."""
        if self._ray is None:
            self._ray = Future()
            threading.Thread(target=self._live, args=(self._ray,), daemon=True).start()
            atexit.register(self.close)

    @property
    def ray(self) -> ModuleType:
        """The connected ray module.

        Raises:
            ConfigError: nothing answers at `cluster.address`.
            WorkerError: Ray did not start on this machine, or not in time.
        """
        self.start()
        assert self._ray is not None
        try:
            return self._ray.result(CONNECT_S)
        except TimeoutError as exc:
            raise WorkerError(
                f"Ray did not start, or answer at cluster.address, within {CONNECT_S:g} s. Its "
                f"logs: {self._folder or self._config.address}. cluster.launcher=local runs "
                "without Ray, in one process"
            ) from exc

    def gpus_found(self) -> int:
        """The GPUs of this machine, or of the smallest GPU machine of the cluster at `address`."""
        if self._config.address is None:
            return count_local_gpus()
        return int(min((node.gpus for node in self.nodes() if node.gpus), default=0))

    def nodes(self) -> list[NodeResources]:
        """The machines that are alive."""
        return [
            NodeResources(
                address=node["NodeManagerAddress"],
                cpus=node["Resources"].get("CPU", 0),
                gpus=node["Resources"].get("GPU", 0),
            )
            for node in self.ray.nodes()
            if node["Alive"]
        ]

    def watch(self, group: str, workers: Sequence[WorkerIdentity]) -> None:
        """Takes note of who works in a group by now: of nobody, when it has ended."""
        self._workers[group] = workers

    def write_stacks(self, file: Path, given_up: Sequence[WorkerIdentity]) -> None:
        """Appends what the driver and all workers are doing; see `stacks.write`."""
        everybody = [worker for group in self._workers.values() for worker in group]
        stacks.write(file, self.ray, everybody, given_up)

    def close(self) -> None:
        """Disconnects, and ends the processes of a cluster that we started; safe to call twice."""
        if self._ray is None:
            return
        atexit.unregister(self.close)
        self._ray = None
        self._closed.set()
        self._ended.wait(SHUTDOWN_S)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _live(self, connected: Future[ModuleType]) -> None:
        try:
            ray = self._connect()
        except BaseException as exc:  # raised again where the result is asked for
            connected.set_exception(exc)
        else:
            connected.set_result(ray)
            # Ray's processes ask the kernel to end them with the *thread* that started them.
            self._closed.wait()
            ray.shutdown()
        finally:
            self._ended.set()

    def _connect(self) -> ModuleType:
        address = self._config.address
        if address is None:
            # Read by every process of the cluster: what a lost head leaves behind ends that soon.
            os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", HEAD_LOST_S)
        ray = import_ray()
        try:
            # What Ray says of itself (its token file, a worker's death) is said better elsewhere.
            with _sessions_of_their_own():
                ray.init(
                    address=address or "local",
                    log_to_driver=False,
                    logging_level=logging.CRITICAL,
                    **({} if address else self._local_settings()),
                )
        except ConnectionError as exc:
            raise ConfigError(
                f"no Ray cluster answers at cluster.address={address} ({exc}). Start one with "
                "`ray start --head`, or leave cluster.address unset to start one on this machine"
            ) from exc
        except Exception as exc:  # of a slow start it raises just that
            raise WorkerError(
                f"Ray did not start: {exc}. Its logs: {self._folder or address}. "
                "cluster.launcher=local runs without Ray, in one process"
            ) from exc
        return ray

    def _local_settings(self) -> dict[str, Any]:
        # Ray's sockets lie in here, and a socket's path has at most 107 characters: hence not
        # TMPDIR.
        self._folder = tempfile.mkdtemp(prefix="nl", dir="/tmp")
        config = self._config
        gpus = count_local_gpus() if config.gpus_per_node == "auto" else config.gpus_per_node
        return {
            "include_dashboard": False,
            "num_cpus": UNRATIONED_CPUS,
            "num_gpus": gpus,
            "object_store_memory": None if gpus else OBJECT_STORE_BYTES,
            "_temp_dir": self._folder,
            # Our workers start with an environment of their own, so idle ones could never be used.
            "_system_config": {
                "enable_worker_prestart": False,
                "prestart_worker_first_driver": False,
            },
        }


@contextmanager
def _sessions_of_their_own() -> Iterator[None]:
    """Inside, processes that Ray starts leave our process group.

    A terminal and a batch system signal the whole group, and Ray's head would be gone before the
    run has saved. Ray has no setting for it (2.60, `ray/_private/services.py`).
    """
    services: Any = import_module("ray._private.services")
    original = services.ConsolePopen
    services.ConsolePopen = partial(original, start_new_session=True)
    try:
        yield
    finally:
        services.ConsolePopen = original
