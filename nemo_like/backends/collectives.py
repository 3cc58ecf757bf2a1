"""How long this rank waits for its peers."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist


def limit(seconds: float) -> None:
    """From now on a collective of any group of this process fails after so long.

    torch gives every group a limit of its own when it is made, those of a mesh too: 10 minutes on
    GPUs, after which it ends the process before anybody can ask what it waits for.
    """
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
