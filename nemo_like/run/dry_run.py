"""What a run would do, without starting anything.

The model, who owns its parameters, the layout and the memory of a rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from nemo_like.cluster.placement import Placement, count_local_gpus, place
from nemo_like.config.command_line import parse
from nemo_like.config.grpo import GRPOTree
from nemo_like.config.megatron import MegatronConfig
from nemo_like.config.policy import DTensorConfig, PolicyConfig
from nemo_like.config.sft import SFTTree
from nemo_like.config.tree import RunTree
from nemo_like.errors import NemoLikeError
from nemo_like.observability.console import RunConsole
from nemo_like.observability.records import Table, outlook_tables, ownership_table
from nemo_like.optim.routing import STATE_BYTES, Owner, Routing, embedding_names
from nemo_like.optim.views import attention_shape
from nemo_like.run.build import parallel_sizes
from nemo_like.run.model_config import hf_config_of


def dry_run_sft(tree: SFTTree) -> int:
    """Print what `run_sft` would do with this configuration; the exit code."""
    return _dry_run(tree, dict)


def dry_run_grpo(tree: GRPOTree) -> int:
    """Print what `run_grpo` would do with this configuration; the exit code."""
    return _dry_run(tree, lambda: _rollout_facts(tree))


def _dry_run(tree: RunTree, own_facts: Callable[[], dict[str, str]]) -> int:
    console = RunConsole()
    try:
        placement = place(
            tree.training_cluster, parallel_sizes(tree.policy), gpus_found=count_local_gpus()
        )
        console.table(_run_table(tree, placement, own_facts()))
        for table in _tables_of_backend(tree.policy, placement):
            console.table(table)
    except NemoLikeError as error:
        console.error(error, last_checkpoint=None, next_command=None)
        return error.exit_code
    console.say("dry run: nothing was started")
    return 0


def _tables_of_backend(policy: PolicyConfig, placement: Placement) -> Iterator[Table]:
    """Owners, what to expect of Muon, and memory, as the active backend would have them."""
    match policy.backend:
        case DTensorConfig() as config:
            routing = planned_routing(policy)
            yield ownership_table([vars_of(row) for row in routing.rows])
            yield from outlook_tables(planned_outlook(policy, routing, placement))
            yield _memory_table(_memory_of_dtensor(routing.rows, config, placement))
        case MegatronConfig():
            yield from _tables_of_megatron(policy, placement)


def _tables_of_megatron(policy: PolicyConfig, placement: Placement) -> Iterator[Table]:
    from nemo_like.backends.megatron.forecast import Forecast, memory_facts
    from nemo_like.optim.outlook import outlook

    forecast = Forecast(policy, hf_config_of(policy), placement.world_size)
    yield ownership_table(forecast.owners)
    yield from outlook_tables(outlook(policy.active_optimizer, forecast.routing, forecast.plans))
    yield _memory_table(memory_facts(forecast.memory()))


def vars_of(row: Owner) -> dict[str, object]:
    """A row as a policy would report it."""
    return {"name": row.name, "shape": row.shape, "optimizer": row.optimizer, "reason": row.reason}


def planned_routing(policy: PolicyConfig) -> Routing:
    """The routing that training would use, of a model without memory; needs no weights."""
    from nemo_like.backends.dtensor.model import named_parameters
    from nemo_like.backends.hf_models import new_hf_model
    from nemo_like.optim.build import build_optimizer

    hf_config = hf_config_of(policy)
    model = new_hf_model(hf_config, device="meta")
    _, routing = build_optimizer(
        named_parameters(model),
        policy.active_optimizer,
        embeddings=embedding_names(model),
        attention=attention_shape(hf_config),
    )
    return routing


def planned_outlook(policy: PolicyConfig, routing: Routing, placement: Placement) -> dict[str, str]:
    """What to expect of Muon on these ranks, where training would lay its matrices."""
    import torch
    from torch.distributed.tensor import Replicate, Shard

    from nemo_like.backends.dtensor.parallelize import COLUMN_WISE, ROW_WISE
    from nemo_like.optim.build import muon_rule
    from nemo_like.optim.layout import layout_on
    from nemo_like.optim.outlook import outlook

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
    rule = muon_rule(policy.active_optimizer)
    plan = rule.plan(layouts, [row.view for row in rows], torch.float32)
    return outlook(policy.active_optimizer, routing, [plan])


def _rollout_facts(tree: GRPOTree) -> dict[str, str]:
    """What a run that draws its own data has besides."""
    grpo, policy = tree.grpo, tree.policy
    engines = f"{policy.generation.backend}, responses of at most {policy.max_new_tokens} tokens"
    if grpo.max_rollout_turns > 1:
        engines += f", {grpo.max_rollout_turns} of them in a rollout"
    facts = {
        "algorithm": "DAPO" if grpo.is_dapo else "GRPO",
        "rollouts of a step": f"{grpo.num_prompts_per_step} prompts x "
        f"{grpo.num_generations_per_prompt} samples, for {tree.updates_per_step} update(s)",
        "engines": engines,
        "reference model": "the start weights" if tree.loss_fn.needs_reference else "none",
    }
    if policy.sft_config is not None:
        file = Path(policy.sft_config)
        before = parse(["--config", str(file)], tree=SFTTree, default_config=file).tree
        folder = before.checkpointing.checkpoint_dir
        facts["start weights"] = f"the last of {folder}, made first if there are none"
    return facts


def _run_table(tree: RunTree, placement: Placement, own: dict[str, str]) -> Table:
    policy = tree.policy
    backend = policy.backend_key.removesuffix("_cfg")
    sizes = parallel_sizes(policy)
    device = "GPU" if placement.uses_gpu else "CPU"
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
        "checkpoints": tree.checkpointing.checkpoint_dir if tree.checkpointing.enabled else "none",
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
