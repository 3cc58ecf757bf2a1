"""The process group of a backend's ranks, and how long they wait for each other."""

from __future__ import annotations

import os
from contextlib import ExitStack
from datetime import timedelta

import torch
import torch.distributed as dist


def limit(seconds: float) -> None:
    """From now on a collective of any group of this process fails after so long.

    torch gives every group a limit of its own when it is made, those of a mesh too: 10 minutes on
    GPUs, after which it ends the process before anybody can ask what it waits for.
    """
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def join_process_group(leaving: ExitStack) -> torch.device:
    """This rank's device, in a process group of all ranks that `leaving` ends if it began here.

    It is a group of one without an environment that describes more.
    """
    has_gpu = torch.cuda.is_available()
    device = torch.device("cpu")
    if has_gpu:
        # Ray shows each worker its own GPU alone; other launchers show all of a machine's.
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cuda:nccl,cpu:gloo" if has_gpu else "gloo"
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        leaving.callback(_leave)
    return device


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
