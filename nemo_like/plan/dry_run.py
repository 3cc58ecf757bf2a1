"""What a run would do, without starting anything.

The model, who owns its parameters, the layout and the memory of a rank.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_like.cluster.placement import Placement, count_local_gpus, place
from nemo_like.config.command_line import PLAIN, Asked, parse
from nemo_like.config.grpo import GRPOTree
from nemo_like.config.megatron import MegatronConfig
from nemo_like.config.policy import DTensorConfig, PolicyConfig
from nemo_like.config.sft import SFTTree
from nemo_like.config.tree import RunTree
from nemo_like.errors import NemoLikeError
from nemo_like.observability.console import RunConsole
from nemo_like.observability.records import Table, outlook_tables, ownership_table
from nemo_like.optim.outlook import outlook
from nemo_like.optim.plan import Plan
from nemo_like.optim.routing import STATE_BYTES, Owner, Routing, embedding_names
from nemo_like.optim.views import attention_shape
from nemo_like.plan.devices import device_named
from nemo_like.plan.outline import Outline, outline
from nemo_like.plan.tables import plan_data, plan_tables
from nemo_like.run.build import parallel_sizes
from nemo_like.run.environments import build_environment
from nemo_like.run.model_config import hf_config_of


def dry_run_sft(tree: SFTTree, asked: Asked = PLAIN) -> int:
    """Print what `run_sft` would do with this configuration; the exit code."""
    return _dry_run(tree, dict, asked)


def dry_run_grpo(tree: GRPOTree, asked: Asked = PLAIN) -> int:
    """Print what `run_grpo` would do with this configuration; the exit code."""
    return _dry_run(tree, lambda: _rollout_facts(tree), asked)


def _dry_run(tree: RunTree, own_facts: Callable[[], dict[str, str]], asked: Asked) -> int:
    console = RunConsole()
    try:
        device = None if asked.device is None else device_named(asked.device)
        placement = place(
            tree.training_cluster, parallel_sizes(tree.policy), gpus_found=count_local_gpus()
        )
        parameters = _parameters(tree.policy, placement)
        tables = [_run_table(tree, placement, own_facts(), parameters), *parameters.tables]
        found = None
        if device is not None:
            counts = parameters.plans, parameters.num_parameters
            found = outline(tree, placement, device, *counts)
            tables += plan_tables(found)
        if asked.as_json:
            sys.stdout.write(json.dumps(_as_data(tables, found), indent=1) + "\n")
            return 0
        for table in tables:
            console.table(table)
    except NemoLikeError as error:
        console.error(error, last_checkpoint=None, next_command=None)
        return error.exit_code
    if device is None:
        console.say("--device h100-80gb tells activations, traffic and time too, and what fits")
    console.say("dry run: nothing was started")
    return 0


def _as_data(tables: Iterable[Table], found: Outline | None) -> dict[str, Any]:
    """What was found, with texts as they are shown and the forecast in numbers."""
    shown = {
        table.title: [
            dict(zip(table.columns, row, strict=True)) if all(table.columns) else list(row)
            for row in table.rows
        ]
        for table in tables
    }
    return {"tables": shown, "forecast": None if found is None else plan_data(found)}


@dataclass(frozen=True)
class _Parameters:
    """Those of a model, laid over the ranks: their number, Muon's plans, and what to show."""

    num_parameters: int
    optimizer_bytes: int
    plans: list[Plan]
    tables: list[Table]

    def checkpoint_bytes(self, tree: RunTree) -> int:
        """Bytes of one checkpoint: fp32 weights, optimizer state, and the copy for transformers."""
        saving = tree.checkpointing
        each = torch.float32.itemsize
        if saving.model_save_format is not None:
            each += getattr(torch, tree.policy.precision).itemsize
        return each * self.num_parameters + (self.optimizer_bytes if saving.save_optimizer else 0)


def _parameters(policy: PolicyConfig, placement: Placement) -> _Parameters:
    """Owners, what to expect of Muon, and memory, as the active backend would have them."""
    match policy.backend:
        case DTensorConfig() as config:
            routing = planned_routing(policy)
            plans = planned_exchange(policy, routing, placement)
            owners = routing.to_json()
            number = sum(row.numel for row in routing.rows)
            memory = _memory_of_dtensor(routing.rows, config, placement)
        case MegatronConfig():
            from nemo_like.backends.megatron.forecast import Forecast

            forecast = Forecast(policy, hf_config_of(policy), placement.world_size)
            routing, plans, owners = forecast.routing, forecast.plans, forecast.owners
            number = sum(math.prod(shape) for shape in forecast.table.hf_shapes.values())
            memory = forecast.memory()
    state = sum(STATE_BYTES[row["optimizer"]] * math.prod(row["shape"]) for row in owners)
    return _Parameters(
        number,
        state,
        plans,
        [
            ownership_table(owners),
            *outlook_tables(outlook(policy.active_optimizer, routing, plans)),
            _memory_table(memory),
        ],
    )


def planned_routing(policy: PolicyConfig) -> Routing:
    """The routing that training would use, of a model without memory; needs no weights."""
    from nemo_like.backends.dtensor.model import named_parameters
    from nemo_like.backends.hf_models import new_hf_model
    from nemo_like.optim.build import plan_routing

    hf_config = hf_config_of(policy)
    model = new_hf_model(hf_config, device="meta")
    return plan_routing(
        named_parameters(model),
        policy.active_optimizer,
        embeddings=embedding_names(model),
        attention=attention_shape(hf_config),
    )


def planned_exchange(policy: PolicyConfig, routing: Routing, placement: Placement) -> list[Plan]:
    """Muon's work on these ranks, where training would lay its matrices; none without Muon."""
    from torch.distributed.tensor import Replicate, Shard

    from nemo_like.backends.dtensor.parallelize import COLUMN_WISE, ROW_WISE
    from nemo_like.optim.build import muon_rule
    from nemo_like.optim.layout import layout_on

    config = policy.dtensor_cfg
    mesh = torch.arange(placement.world_size)
    mesh = mesh.view(config.dp_replicate_size, -1, config.tensor_parallel_size)
    across = dict.fromkeys(COLUMN_WISE, Shard(0)) | dict.fromkeys(ROW_WISE, Shard(1))
    rows = [row for row in routing.rows if row.optimizer == "muon"]
    layouts = [
        layout_on(row.shape, mesh, [Replicate(), Shard(0), across.get(leaf, Replicate())])
        for row in rows
        for leaf in [row.name.removesuffix(".weight").rpartition(".")[2]]
    ]
    if not rows:
        return []
    rule = muon_rule(policy.active_optimizer)
    return [rule.plan(layouts, [row.view for row in rows], torch.float32)]


def _rollout_facts(tree: GRPOTree) -> dict[str, str]:
    """What a run that draws its own data has besides."""
    grpo, policy = tree.grpo, tree.policy
    engines = f"{policy.generation.backend}, responses of at most {policy.max_new_tokens} tokens"
    if grpo.max_rollout_turns > 1:
        engines += f", {grpo.max_rollout_turns} of them in a rollout"
    judges = sorted(tree.data.judges)
    if "custom" in judges:  # its function must be there
        custom = tree.env.custom.model_copy(update={"num_workers": 1})
        env = tree.env.model_copy(update={"custom": custom})
        build_environment("custom", env, say=RunConsole().say).close()
    facts = {
        "algorithm": "DAPO" if grpo.is_dapo else "GRPO",
        "rollouts of a step": f"{grpo.num_prompts_per_step} prompts x "
        f"{grpo.num_generations_per_prompt} samples, for {tree.updates_per_step} update(s)",
        "answers are judged by": ", ".join(judges),
        "engines": engines,
        "reference model": "the start weights" if tree.loss_fn.needs_reference else "none",
    }
    if policy.sft_config is not None:
        file = Path(policy.sft_config)
        before = parse(["--config", str(file)], tree=SFTTree, default_config=file).tree
        folder = before.checkpointing.checkpoint_dir
        facts["start weights"] = f"the last of {folder}, made first if there are none"
    return facts


def _run_table(
    tree: RunTree, placement: Placement, own: dict[str, str], parameters: _Parameters
) -> Table:
    policy = tree.policy
    backend = policy.backend_key.removesuffix("_cfg")
    sizes = parallel_sizes(policy)
    device = "GPU" if placement.uses_gpu else "CPU"
    folder = tree.checkpointing.checkpoint_dir
    size = f"{parameters.checkpoint_bytes(tree) / 1e9:,.3g} GB"
    per_rank = math.ceil(policy.train_global_batch_size / placement.num_data_parallel)
    facts = {
        "model": f"{policy.model_name} ({policy.init} weights)",
        **own,
        "optimizer": f"{policy.active_optimizer.optimizer}, lr {policy.active_optimizer.lr:g}",
        "steps": f"at most {tree.steps.max_num_steps}",
        "batch": f"{policy.train_global_batch_size} sequences",
        "longest sequence": f"{policy.max_total_sequence_length} tokens",
        "backend": backend,
        "ranks": f"{placement.world_size} on {device}, {placement.num_nodes} node(s)",
        "layout": f"data {placement.num_data_parallel} (copies {sizes.replicate.size}) x pipeline "
        f"{sizes.pipeline.size} x context {sizes.context.size} x tensor {sizes.tensor.size}",
        **_expert_facts(policy, placement),
        "sequences of a rank and batch": str(per_rank),
        "checkpoints": f"{folder}, {size} each" if tree.checkpointing.enabled else "none",
        "logs": tree.logger.log_dir,
    }
    return Table("What would be done", ("", ""), tuple(facts.items()))


def _expert_facts(policy: PolicyConfig, placement: Placement) -> dict[str, str]:
    """The grid of experts, where they have ranks of their own."""
    config = policy.megatron_cfg
    ep, etp = config.expert_model_parallel_size, config.expert_tensor_parallel_size
    pp = config.pipeline_model_parallel_size
    if not config.enabled or ep * etp == 1:
        return {}
    data = placement.world_size // (pp * ep * etp)
    return {"layout of experts": f"data {data} x pipeline {pp} x expert {ep} x tensor {etp}"}


def _memory_of_dtensor(
    rows: Iterable[Owner], config: DTensorConfig, placement: Placement
) -> Mapping[str, float]:
    """Bytes of one rank, of what FSDP2 and tensor parallelism divide."""
    tensor = config.tensor_parallel_size
    shards = placement.num_data_parallel // config.dp_replicate_size
    weights = state = 0.0
    for row in rows:
        share = row.numel / shards / (tensor if len(row.shape) > 1 else 1)
        weights += 4 * share
        state += STATE_BYTES[row.optimizer] * share
    return {
        "weights (fp32)": weights,
        "gradients (fp32)": weights,
        "optimizer state (fp32)": state,
        "together": 2 * weights + state,
    }


def _memory_table(kinds: Mapping[str, float]) -> Table:
    lines = tuple((kind, f"{size / 1e9:,.3f}") for kind, size in kinds.items())
    return Table("One rank's memory (no activations)", ("", "GB"), lines)
