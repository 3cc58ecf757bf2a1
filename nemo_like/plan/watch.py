"""What a rank holds, sends and computes, seen operation by operation; of real tensors or fake ones.

One observer for the forecast and for the tests that hold it against real ranks.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from nemo_like.plan.numberless import PLAIN

aten, c10d = torch.ops.aten, torch.ops.c10d
functional = torch.ops._c10d_functional

ACTIVATIONS, TEMPORARY, LOGITS = "activations", "temporary", "logits"
GATHERED, GRADIENTS = "gathered weights", "gradients"
LAYERS, LOSS, OPTIMIZER = "layers", "loss", "optimizer"
"""Parts of a step: with logits, without, and after the gradients are whole."""


@dataclass(frozen=True)
class Message:
    """A kind of collective: in which part of a step, of what sort, in which group of how many."""

    part: str
    sort: str
    group: str
    ranks: tuple[int, ...]


@dataclass
class Usage:
    """What was seen of a part of a step: the fullest moment, bytes by kind, and its work."""

    peak: Counter[str] = field(default_factory=Counter)
    flops: float = 0.0

    @property
    def total(self) -> int:
        """Bytes at the fullest moment."""
        return sum(self.peak.values())


class Watch(TorchDispatchMode):
    """Sees storages come and go, collectives with the bytes that this rank sends, and FLOPs.

    Bytes are those of tensors, without what an allocator rounds up or keeps. New memory counts as
    activations, in a backward pass as temporary, until `name` says what it is. Logits are known by
    their last dimension. With `is_fsdp` what is gathered and reduced are weights and gradients.
    Fake tensors are a rank's own where they are of the mode `numberless`; DTensor has some too,
    when it works out shapes.
    """

    def __init__(
        self,
        *,
        numberless: FakeTensorMode | None = None,
        vocab_sizes: Set[int] = frozenset(),
        is_fsdp: bool = False,
    ) -> None:
        super().__init__()
        self._numberless, self._vocab_sizes, self._is_fsdp = numberless, vocab_sizes, is_fsdp
        self.part = LAYERS
        self.held: Counter[str] = Counter()
        self.usage: defaultdict[str, Usage] = defaultdict(Usage)
        self.sent: Counter[Message] = Counter()
        self.after_forward: Counter[str] = Counter()
        self._kinds: dict[int, tuple[str, int]] = {}

    def __enter__(self) -> Watch:
        resize, watch = torch.UntypedStorage.resize_, self

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if id(storage) in watch._kinds:  # FSDP2 frees and allocates gathered weights so
                watch._book(storage, GATHERED)
            return result

        self._resizing = patch.object(torch.UntypedStorage, "resize_", resized)
        self._resizing.start()
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._resizing.stop()

    def name(self, kind: str, tensors: Iterable[Tensor | None]) -> None:
        """From now on the memory of these tensors is of this kind."""
        for tensor in tensors:
            if tensor is not None:
                local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                self._book(local.untyped_storage(), kind)

    def forward_ended(self) -> None:
        """Note what is held now, if it is more than after any forward pass so far."""
        if self.held.total() > self.after_forward.total():
            self.after_forward = +self.held

    def optimizer_begins(self) -> None:
        """What follows is booked under the optimizer."""
        self.part = OPTIMIZER
        self._look(OPTIMIZER)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(kind not in PLAIN for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not all(self._is_own(x) for x in tree_leaves((args, kwargs, result))):
            return result
        if func.namespace in ("c10d", "_c10d_functional"):
            self._exchanged(func, args, result)
        elif (packet := func._overloadpacket) in FLOPS:
            self.usage[self.part].flops += FLOPS[packet](*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and type(tensor) in PLAIN:
                self._see(tensor)
        return result

    def _is_own(self, value: Any) -> bool:
        if isinstance(value, FakeTensor):
            return value.fake_mode is self._numberless
        return not isinstance(value, Tensor) or not value.is_meta

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._kinds or not storage.nbytes():
            return
        in_backward = torch._C._current_graph_task_id() != -1
        kind = TEMPORARY if in_backward or self.part == OPTIMIZER else ACTIVATIONS
        is_table = tensor.dim() == 2 and tensor.is_floating_point()
        if is_table and tensor.shape[1] in self._vocab_sizes:
            kind = LOGITS
        self._book(storage, kind)

    def _book(self, storage: torch.UntypedStorage, kind: str) -> None:
        key = id(storage)
        if key in self._kinds:
            old, size = self._kinds[key]
            self.held[old] -= size
        else:
            weakref.finalize(storage, self._freed, key)
        self._kinds[key] = kind, storage.nbytes()
        self.held[kind] += storage.nbytes()
        part = LOSS if self.held[LOGITS] and self.part == LAYERS else self.part
        self._look(part)

    def _look(self, part: str) -> None:
        usage = self.usage[part]
        if self.held.total() > usage.total:
            usage.peak = +self.held

    def _freed(self, key: int) -> None:
        kind, size = self._kinds.pop(key)
        self.held[kind] -= size

    def _exchanged(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        if func not in SENT:
            return
        sort, group, amount = SENT[func](args, result)
        if self._is_fsdp and func is c10d._allgather_base_.default:
            self.name(GATHERED, [args[0]])
        if self._is_fsdp and func is c10d._reduce_scatter_base_.default:
            self.name(GRADIENTS, [args[0]])
        ranks = tuple(dist.get_process_group_ranks(group))
        if len(ranks) > 1:
            self.sent[Message(self.part, sort, group.group_desc, ranks)] += amount


def _boxed(args: tuple[Any, ...], place: int) -> dist.ProcessGroup:
    return dist.ProcessGroup.unbox(args[place])


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.itemsize for t in tree_leaves(tensors) if isinstance(t, Tensor))


def _all_reduce(tensors: Any, group: dist.ProcessGroup) -> tuple[str, dist.ProcessGroup, float]:
    # Everyone sends (n - 1)/n of it twice, to reduce and to spread, whatever the algorithm.
    return "all-reduce", group, 2 * _bytes(tensors) * (1 - 1 / group.size())


def _gather(shard: Any, group: dist.ProcessGroup) -> tuple[str, dist.ProcessGroup, float]:
    return "all-gather", group, _bytes(shard) * (group.size() - 1)


def _scatter(whole: Any, group: dist.ProcessGroup) -> tuple[str, dist.ProcessGroup, float]:
    return "reduce-scatter", group, _bytes(whole) * (1 - 1 / group.size())


def _all_to_all(
    source: Tensor, group: dist.ProcessGroup, sizes: Any
) -> tuple[str, dist.ProcessGroup, float]:
    own = sizes[group.rank()] if sizes else len(source) // group.size()
    row = source[0].numel() * source.itemsize if len(source) else 0
    return "all-to-all", group, (len(source) - own) * row


def _send(tensors: Any, group: dist.ProcessGroup) -> tuple[str, dist.ProcessGroup, float]:
    return "send", group, _bytes(tensors)


def _broadcast(
    tensors: Any, group: dist.ProcessGroup, source: int
) -> tuple[str, dist.ProcessGroup, float]:
    # Python objects travel as bytes, and say nothing of the size of a run.
    numbers = [t for t in tensors if t.is_floating_point() and source == group.rank()]
    return "broadcast", group, _bytes(numbers)


SENT: dict[Any, Any] = {
    c10d.allreduce_.default: lambda a, _: _all_reduce(a[0], _boxed(a, 1)),
    c10d.allreduce_coalesced_.default: lambda a, _: _all_reduce(a[0], _boxed(a, 1)),
    c10d.allgather_.default: lambda a, _: _gather(a[1], _boxed(a, 2)),
    c10d._allgather_base_.default: lambda a, _: _gather(a[1], _boxed(a, 2)),
    c10d._reduce_scatter_base_.default: lambda a, _: _scatter(a[1], _boxed(a, 2)),
    c10d.alltoall_base_.default: lambda a, _: _all_to_all(a[1], _boxed(a, 2), a[4]),
    c10d.send.default: lambda a, _: _send(a[0], _boxed(a, 1)),
    c10d.broadcast_.default: lambda a, _: _broadcast(a[0], _boxed(a, 1), a[2]),
    functional.all_reduce.default: lambda a, _: _all_reduce(a[0], _resolve_process_group(a[2])),
    functional.all_gather_into_tensor.default: lambda a, _: _gather(
        a[0], _resolve_process_group(a[2])
    ),
    functional.reduce_scatter_tensor.default: lambda a, _: _scatter(
        a[0], _resolve_process_group(a[3])
    ),
    functional.all_to_all_single.default: lambda a, _: _all_to_all(
        a[0], _resolve_process_group(a[3]), a[2]
    ),
}
"""(arguments, result) -> sort of message, group, and the bytes that a rank sends to others.

They are the least that any algorithm sends; of a broadcast and a send it is what is given away.
"""


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Scores and weighted values; heads of keys may be fewer."""
    pairs = query.shape.numel() // query.shape[-1] * key.shape[-2]
    return int(2 * pairs * (query.shape[-1] + value.shape[-1]))


def _attention_backward(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
    """The scores once more, and the gradients of values, weights, queries and keys."""
    pairs = query.shape.numel() // query.shape[-1] * key.shape[-2]
    return int(2 * pairs * (3 * query.shape[-1] + 2 * value.shape[-1]))


FLOPS = flop_registry | {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Floating-point operations by operator, with torch's formulas; a causal mask saves none."""
