"""megatron-core on a machine without CUDA, for tests and small runs over gloo.

megatron-core asks CUDA where tensors go, also where there is none. The modules that this backend
runs get, in place of their global `torch`, one in which calls that could only raise do what they
mean on a CPU; `torch` itself is left alone but for `Tensor.cuda`. Each replacement says who needs
it, as file:line of version 0.16.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_like.errors import ConfigError

WRITTEN_FOR = "0.16.1"


class _Overlay:
    """A module in which some names mean something else."""

    def __init__(self, module: ModuleType, **replaced: Any) -> None:
        self.__dict__.update(replaced)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Stream:
    """The one order of things on a CPU, as a stream and as an event."""

    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None:
        pass


def _zeros(*size: Any, device: Any = None, **kwargs: Any) -> Tensor:
    """`torch.zeros`, on the CPU where "cuda" is written out."""
    return torch.zeros(*size, device=None if device == "cuda" else device, **kwargs)


def _all_to_all_single(
    output: Tensor, input: Tensor, *, output_split_sizes: Any, input_split_sizes: Any, group: Any
) -> None:
    """The same with split sizes in tensors, which only CUDA's are turned into lists."""
    there, here = (
        sizes.tolist() if isinstance(sizes, Tensor) else sizes
        for sizes in (output_split_sizes, input_split_sizes)
    )
    dist.all_to_all_single(output, input, there, here, group)


def _all_gather(outputs: list[Tensor], input: Tensor, group: Any) -> None:
    """The same with parts of various sizes, which gloo refuses and NCCL does so itself."""
    outputs[group.rank()].copy_(input)
    for rank, output in enumerate(outputs):
        dist.broadcast(output, dist.get_global_rank(group, rank), group)


def _reduce_scatter(output: Tensor, inputs: list[Tensor], group: Any) -> None:
    """The same with parts of various sizes."""
    for rank, part in enumerate(inputs):
        total = part.clone()
        dist.all_reduce(total, group=group)
        if rank == group.rank():
            output.copy_(total)


def _set_rng_state(state: Tensor, device: int = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(state)


def _get_rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> Tensor:
    return torch.get_rng_state()


def _torch_without_cuda() -> _Overlay:
    stream = _Stream()
    cuda = _Overlay(
        torch.cuda,
        # tensor_parallel/layers.py:261, 552, 873, 899, 1197, mappings.py:91-181, 442; utils.py:631;
        # distributed/param_and_grad_buffer.py:806; moe/router.py:90;
        # pipeline_parallel/p2p_communication.py:190-202, 313, 321
        current_device=lambda: torch.device("cpu"),
        # p2p_communication.py:242, 398
        synchronize=lambda *device: None,
        # moe/token_dispatcher.py:445, 871-874
        Stream=lambda: stream,
        current_stream=lambda: stream,
        stream=lambda stream: nullcontext(),
        # tensor_parallel/random.py:235-238, 422
        manual_seed=torch.manual_seed,
        get_rng_state=torch.get_rng_state,
    )
    return _Overlay(
        torch,
        cuda=cuda,
        # pipeline_parallel/schedules.py:596, 2138
        zeros=_zeros,
        distributed=_Overlay(
            dist,
            # mappings.py:444
            all_to_all_single=_all_to_all_single,
            # mappings.py:150, 193: experts of several ranks, each of which got some tokens
            all_gather=_all_gather,
            reduce_scatter=_reduce_scatter,
        ),
    )


@contextmanager
def mcore_on_cpu() -> Iterator[None]:
    """Inside, megatron-core runs without CUDA; afterwards everything is as it was.

    Raises:
        ConfigError: another version of megatron-core than the one whose source was read for this.
    """
    assert not torch.cuda.is_available(), "there is a GPU: megatron-core needs no help"
    from megatron import core

    if core.__version__ != WRITTEN_FOR:
        raise ConfigError(
            f"policy.megatron_cfg.enabled: megatron-core {core.__version__} is installed, and "
            f"this machine has no GPU; without one only {WRITTEN_FOR} is known to work. Install "
            f"megatron-core=={WRITTEN_FOR}, or run on a GPU"
        )
    from megatron.core import utils
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.pipeline_parallel import p2p_communication, schedules
    from megatron.core.tensor_parallel import layers, mappings, random
    from megatron.core.transformer.moe import router, token_dispatcher

    replacement = _torch_without_cuda()
    with ExitStack() as stack:
        for module in (
            *(utils, param_and_grad_buffer, p2p_communication, schedules),
            *(layers, mappings, random, router, token_dispatcher),
        ):
            stack.enter_context(patch.object(module, "torch", replacement))
        # tensor_parallel/random.py:41, 75: the generator that recomputation rewinds.
        stack.enter_context(patch.object(random, "_get_cuda_rng_state", _get_rng_state))
        stack.enter_context(patch.object(random, "_set_cuda_rng_state", _set_rng_state))
        # moe/token_dispatcher.py:445 keeps the first stream that it made.
        dispatcher = token_dispatcher.MoEAlltoAllTokenDispatcher
        stack.enter_context(patch.object(dispatcher, "cuda_dtoh_stream", None))
        # models/common/language_module/language_module.py:244: tied weights over stages.
        stack.enter_context(patch.object(Tensor, "cuda", lambda tensor, *args, **kwargs: tensor))
        # jit.py:22: small fused functions would be compiled with a C++ compiler, for minutes.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
