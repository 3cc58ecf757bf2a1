"""CPUs and GPUs of a Ray cluster, set aside for one group of workers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from nemo_like.cluster.placement import Placement, RankPlace
from nemo_like.errors import WorkerError

POLL_S = 0.5
"""How often the wait comes back to see whether the workers are still wanted."""
RESERVE_S = 60.0
"""How long to wait for CPUs and GPUs that the cluster has, but that something else uses."""


class Reservation:
    """A placement group of Ray: one bundle per machine.

    Args:
        machine: Ray's id of the only machine that will do; None is any.
    """

    def __init__(self, ray: Any, placement: Placement, *, machine: str | None):
        self._ray = ray
        self._placement = placement
        self._group = ray.util.placement_group(
            placement.bundles,
            strategy="STRICT_SPREAD" if placement.num_nodes > 1 else "STRICT_PACK",
            bundle_label_selector=(
                None if machine is None else [{"ray.io/node-id": machine}] * placement.num_nodes
            ),
        )

    def wait(self, name: str, check_wanted: Callable[[], object]) -> None:
        """Returns when everything is set aside; `check_wanted` may raise meanwhile.

        Raises:
            WorkerError: something else keeps it in use.
        """
        deadline = time.monotonic() + RESERVE_S
        while not (there := self._group.wait(POLL_S)) and time.monotonic() < deadline:
            check_wanted()
        if not there:
            raise WorkerError(
                f"the {name} workers waited {RESERVE_S:g} s for {self._placement.bundles}: "
                "the Ray cluster has that, but it is in use"
            )

    def options(self, place: RankPlace) -> dict[str, Any]:
        """What Ray must be told to start a rank in its part."""
        strategies = self._ray.util.scheduling_strategies
        resources = self._placement.worker_resources
        return {
            "num_cpus": resources["CPU"],
            "num_gpus": resources.get("GPU", 0),
            "scheduling_strategy": strategies.PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=place.node
            ),
        }

    def release(self) -> None:
        """Gives everything back."""
        self._ray.util.remove_placement_group(self._group)
