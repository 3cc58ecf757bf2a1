"""How a Hugging Face causal LM is laid over the ranks.

FSDP2 works over the data-parallel ranks, DTensor does tensor parallelism. One table says what
tensor parallelism does to each module of a decoder layer, by the last part of its name. A Linear
that the table does not know is an error, not a silently replicated matrix.

Source: tensor parallelism as in Megatron-LM (Shoeybi et al., https://arxiv.org/abs/1909.08053),
sequence parallelism as in Korthikanti et al. (https://arxiv.org/abs/2205.05198), sharding as in
FSDP (Zhao et al., https://arxiv.org/abs/2304.11277).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from nemo_like.config.policy import DTensorConfig
from nemo_like.errors import ConfigError

COLUMN_WISE = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW_WISE = ("o_proj", "down_proj")
HEAD_NORMS = ("q_norm", "k_norm")
BLOCK_NORMS = ("input_layernorm", "post_attention_layernorm")


def build_mesh(config: DTensorConfig, device_type: str) -> DeviceMesh:
    """The ranks as (dp_replicate, dp_shard, tp); tensor-parallel peers are neighbours.

    Raises:
        ConfigError: the number of ranks is no multiple of the parallel sizes.
    """
    world, tp, replicate = (
        dist.get_world_size(),
        config.tensor_parallel_size,
        config.dp_replicate_size,
    )
    if world % (tp * replicate):
        raise ConfigError(
            f"{world} ranks can not be divided into policy.dtensor_cfg.tensor_parallel_size={tp} x "
            f"policy.dtensor_cfg.dp_replicate_size={replicate}"
        )
    shape = (replicate, world // (tp * replicate), tp)
    return init_device_mesh(device_type, shape, mesh_dim_names=("dp_replicate", "dp_shard", "tp"))


def tensor_parallel(model: Any, mesh: DeviceMesh, *, sequence_parallel: bool) -> None:
    """Shard the model's matrices over the `tp` mesh, in place.

    Between blocks the hidden states are whole on every rank, or, with `sequence_parallel`, sharded
    along the sequence. Embedding and head are sharded along the vocabulary; the head is never
    called as a module.

    Raises:
        ConfigError: heads can not be divided, or a Linear is not in the table.
    """
    config, size = model.config, mesh.size()
    for heads in ("num_attention_heads", "num_key_value_heads"):
        if getattr(config, heads) % size:
            raise ConfigError(
                f"policy.dtensor_cfg.tensor_parallel_size={size} does not divide the model's "
                f"{heads}={getattr(config, heads)}"
            )
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    between = Shard(1) if sequence_parallel else Replicate()
    for index, layer in enumerate(model.model.layers):
        plan = {n: s for n, m in layer.named_modules() if n and (s := _style(n, m, between))}
        parallelize_module(layer, mesh, plan)
        if sequence_parallel and index == 0:
            # The embedding's output stays whole: transformers reads the sequence length off it.
            enter = PrepareModuleInput(
                input_layouts=(Replicate(),),
                desired_input_layouts=(Shard(1),),
                use_local_output=True,
            )
            parallelize_module(layer, mesh, enter)
    ends: dict[str, ParallelStyle] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(),
    }
    if sequence_parallel:
        ends["model.norm"] = SequenceParallel(use_local_output=True)
    parallelize_module(model, mesh, ends)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight


def _style(name: str, module: nn.Module, between: Shard | Replicate) -> ParallelStyle | None:
    """What tensor parallelism does to one module of a decoder layer; None leaves it alone."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf in COLUMN_WISE:
        return ColwiseParallel()
    if leaf in ROW_WISE:
        return RowwiseParallel(output_layouts=between)
    if leaf in HEAD_NORMS:
        # The same weight acts on every head, and heads (dimension 2) are spread over the ranks:
        # this is what sequence parallelism does along another dimension, the sum of the weight's
        # gradients included.
        return SequenceParallel(sequence_dim=2, use_local_output=True)
    if leaf in BLOCK_NORMS:
        return None if between == Replicate() else SequenceParallel(use_local_output=True)
    if leaf == "self_attn":
        # One gather (and, backward, one reduction) for q, k and v together.
        return PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": between},
            desired_input_kwarg_layouts={"hidden_states": Replicate()},
        )
    if leaf == "mlp":
        return PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(Replicate(),))
    if isinstance(module, nn.Linear):
        raise ConfigError(
            f"tensor parallelism does not know the matrix {name!r} of this model; use "
            "policy.dtensor_cfg.tensor_parallel_size=1"
        )
    return None


def shard_parameters(
    model: Any, mesh: DeviceMesh, *, compute_dtype: torch.dtype, cpu_offload: bool
) -> None:
    """Apply FSDP2 in place: one unit per decoder layer, the rest in the root; gradients are summed.

    Nothing is wrapped where nothing is to be done: one rank, fp32, no offload.
    """
    replicate, shard = mesh["dp_replicate"].size(), mesh["dp_shard"].size()
    if replicate * shard == 1 and compute_dtype == torch.float32 and not cpu_offload:
        return
    options: dict[str, Any] = {
        "mesh": mesh["dp_replicate", "dp_shard"] if replicate > 1 else mesh["dp_shard"],
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32),
    }
    if cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy()
    for layer in model.hf.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    for module in (*model.hf.model.layers, model):
        # The loss is divided by the global token count, so gradients are added up, not averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
