"""One rank of a large run in one small process: no numbers, and no other ranks.

The code that trains runs here as it is. Floating-point tensors have a shape, a type and a size, but
no memory and no values (torch's fake tensors); integers and booleans are real, because lengths,
positions and routes decide shapes. Collectives return at once.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

aten, c10d = torch.ops.aten, torch.ops.c10d
PLAIN = (Tensor, nn.Parameter, FakeTensor)
"""Types without a dispatch of their own: the others (DTensor) come back with these inside."""


class Numberless(TorchDispatchMode):
    """Inside, every new floating-point tensor is a fake one on the CPU.

    Where a program looks at a value, it is 1. `stage_shape` is what a pipeline stage is told by its
    neighbours about the tensors that they send.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stage_shape: tuple[int, ...] = ()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(kind not in PLAIN for kind in types):
            return NotImplemented
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func.namespace == "c10d" and not any(isinstance(t, FakeTensor) for t in tensors):
            return self._exchanged(func, args, kwargs)
        if any(isinstance(t, FakeTensor) for t in tensors):
            return self._computed(func, args, kwargs)
        if "meta" in (str(kwargs.get("device")), *(t.device.type for t in tensors)):
            # The model is made on `meta` anyway, and gets "memory" when it is laid out.
            is_left = str(kwargs.get("device", "meta")) == "meta"
            return func(*args, **kwargs) if is_left else self._faked(func, args, kwargs)
        if not tensors:
            made = self._faked(func, args, kwargs)
            if isinstance(made, Tensor) and made.is_floating_point() and made.numel():
                return made
        return tree_map_only(Tensor, self._without_numbers, func(*args, **kwargs))

    def _faked(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        with self.fake:
            return func(*args, **kwargs)

    def _computed(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """An operation on fake tensors; where its shape depends on values, they are the real ones.

        A value that is asked for is 1.
        """
        if func is aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        if func is aten.masked_select.default and not isinstance(args[1], FakeTensor):
            return args[0].new_empty(int(args[1].expand(args[0].shape).sum()))
        if func is c10d.allreduce_coalesced_.default:  # which fakes do not know
            first = (args[0][:1], *args[1:3], None, False)
            return self._faked(c10d.allreduce_.default, first, {})[1]
        if func is aten.index.Tensor:
            args = (args[0], [_as_positions(x) for x in args[1]])
        return self._faked(func, args, kwargs)

    def _exchanged(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """A collective on real integers, as if all ranks had sent the same as this one."""
        result = func(*args, **kwargs)
        if func is c10d.recv_.default and self.stage_shape:
            args[0][0].copy_(torch.tensor(self.stage_shape))
        elif func is c10d.allgather_.default:
            for output in args[0][0]:
                output.copy_(args[1][0])
        elif func is c10d._allgather_base_.default:
            args[0].view(-1, args[1].numel()).copy_(args[1].reshape(1, -1))
        elif func is c10d.alltoall_base_.default and args[0].shape == args[1].shape:
            args[0].copy_(args[1])
        return result

    def _without_numbers(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor) or not tensor.is_floating_point() or not tensor.numel():
            return tensor
        return self.fake.from_tensor(tensor)


def _as_positions(index: Tensor | None) -> Tensor | None:
    if index is None or index.dtype is not torch.bool or isinstance(index, FakeTensor):
        return index
    (positions,) = index.nonzero(as_tuple=True)
    return positions


@contextmanager
def rank_of(world_size: int, rank: int) -> Iterator[Numberless]:
    """Inside, this process is one rank of a run on CPUs of so many ranks, and has no numbers."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "this process is a rank of another run"
    new_group, hook = dist.new_group, sys.excepthook

    def any_group(*args: Any, backend: Any = None, **kwargs: Any) -> Any:
        return new_group(*args, **kwargs)  # also where gloo is asked for by name

    with ExitStack() as undo:
        undo.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of packages that miss their GPU
        undo.callback(setattr, sys, "excepthook", hook)
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        undo.callback(_leave)
        undo.enter_context(patch.object(dist, "new_group", any_group))
        # What another rank would tell, this one says itself.
        undo.enter_context(patch.object(dist, "broadcast_object_list", lambda *_, **__: None))
        undo.enter_context(patch.object(torch.cuda, "is_available", lambda: False))
        # Everything is where it belongs, and fake parameters can not be swapped.
        undo.enter_context(patch.object(nn.Module, "to", lambda module, *_, **__: module))
        undo.enter_context(patch.object(ShardingPropagator, "_fake_mode_lock", _Aside()))
        mode = Numberless()
        undo.enter_context(mode)
        yield mode


class _Aside:
    """Inside, no mode is active: DTensor finds out shapes, which is no work of the rank."""

    def __init__(self) -> None:
        self._within: list[Any] = []

    def __enter__(self) -> None:
        self._within.append(_disable_current_modes())
        self._within[-1].__enter__()

    def __exit__(self, *exc: Any) -> None:
        self._within.pop().__exit__(*exc)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
