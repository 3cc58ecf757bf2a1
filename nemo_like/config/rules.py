"""Rules between the blocks of a tree, shared by all algorithms: layout, lengths, files, secrets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_like.assets import bundled
from nemo_like.config.base import Conflict
from nemo_like.config.data import DataConfig
from nemo_like.config.megatron import MegatronConfig
from nemo_like.config.policy import PolicyConfig
from nemo_like.config.report import divisors
from nemo_like.config.run import ClusterConfig

PARALLEL_SIZES = (
    "tensor_parallel_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
)

HEADS = ("num_attention_heads", "num_key_value_heads")


def layout_conflicts(policy: PolicyConfig, cluster: ClusterConfig) -> Iterator[Conflict]:
    """Parallel and batch sizes that the cluster named in the config does not allow."""
    world, backend = cluster.world_size, policy.backend
    if world is None:  # only placement can tell
        return
    prefix = f"policy.{policy.backend_key}"
    machines = tuple(f"cluster.{key}" for key in cluster.world_keys)
    sizes = tuple(f"{prefix}.{n}" for n in PARALLEL_SIZES if getattr(backend, n, 1) > 1)
    if world % backend.model_parallel_size:
        yield Conflict(
            (*sizes, *machines),
            f"one model takes {backend.model_parallel_size} ranks, "
            f"and {world} of the cluster are no multiple of that; a model may take "
            f"{divisors(world)}",
        )
        return
    replicas = world // backend.model_parallel_size
    if isinstance(backend, MegatronConfig):
        yield from _expert_conflicts(backend, world, machines)
    elif replicas % backend.dp_replicate_size:
        yield Conflict(
            (f"{prefix}.dp_replicate_size", *machines),
            f"does not divide the {replicas} data-parallel ranks",
        )
    yield from _batch_conflicts(policy, replicas, (*sizes, *machines))


def _expert_conflicts(
    backend: MegatronConfig, world: int, machines: tuple[str, ...]
) -> Iterator[Conflict]:
    experts = (
        backend.expert_tensor_parallel_size
        * backend.expert_model_parallel_size
        * backend.pipeline_model_parallel_size
    )
    if world % experts:
        names = ("expert_tensor_parallel_size", "expert_model_parallel_size")
        keys = (f"policy.megatron_cfg.{n}" for n in (*names, "pipeline_model_parallel_size"))
        yield Conflict(
            (*keys, *machines),
            f"one set of experts takes {experts} ranks, which does not divide the {world} of the "
            "cluster",
        )


def _batch_conflicts(
    policy: PolicyConfig, replicas: int, layout: tuple[str, ...]
) -> Iterator[Conflict]:
    total = policy.train_global_batch_size
    if total < replicas:
        yield Conflict(
            ("policy.train_global_batch_size", *layout),
            f"{total} sequences are too few for the {replicas} data-parallel ranks: each needs one",
        )


def tuning_conflicts(policy: PolicyConfig, real_config: str) -> Iterator[Conflict]:
    """Another model under numbers that were tuned for one."""
    if policy.tuned_for not in (None, policy.model_name):
        yield Conflict(
            ("policy.model_name",),
            f"the learning rate and sizes of this config are for the newborn {policy.tuned_for}; "
            f"for another model start from --config {real_config}",
        )


def length_conflicts(policy: PolicyConfig, data: DataConfig) -> Iterator[Conflict]:
    """Sequences longer than the policy, or than the model if it is local or bundled, can hold."""
    limit = policy.max_total_sequence_length
    if data.max_input_seq_length is not None and data.max_input_seq_length > limit:
        yield Conflict(
            ("data.max_input_seq_length", "policy.max_total_sequence_length"),
            "an example can not be longer than a sequence",
        )
    longest = _known_model(policy).get("max_position_embeddings")
    if isinstance(longest, int) and limit > longest:
        yield Conflict(
            ("policy.max_total_sequence_length", "policy.model_name"),
            f"this model has {longest} positions (max_position_embeddings)",
        )


def head_conflicts(policy: PolicyConfig) -> Iterator[Conflict]:
    """Attention heads of a local or bundled model that its tensor-parallel ranks can not share."""
    is_megatron = isinstance(policy.backend, MegatronConfig)
    name = "tensor_model_parallel_size" if is_megatron else "tensor_parallel_size"
    size, model = getattr(policy.backend, name), _known_model(policy)
    # Where there are fewer key-value heads than ranks, Megatron gives several ranks the same one.
    for kind in ("num_attention_heads",) if is_megatron else HEADS:
        heads = model.get(kind)
        if isinstance(heads, int) and heads % size:
            yield Conflict(
                (f"policy.{policy.backend_key}.{name}", "policy.model_name"),
                f"{size} ranks can not share this model's {heads} heads ({kind})",
            )


def _known_model(policy: PolicyConfig) -> dict[str, Any]:
    """The content of the model's config.json, if it is here; else nothing."""
    config = (bundled(policy.model_name) or Path(policy.model_name)) / "config.json"
    if not config.is_file():
        return {}
    model: dict[str, Any] = json.loads(config.read_text())
    return model | policy.hf_config_overrides


def missing_files(policy: PolicyConfig, data: DataConfig) -> Iterator[Conflict]:
    """Files that the config names and that are not there, or not of a kind that is read."""
    named: dict[str, str | None] = {
        f"data.default.{name}": getattr(data.default, name)
        for name in ("prompt_file", "system_prompt_file")
    }
    for path, source in data.sources().items():
        for name in ("data_path", "prompt_file", "system_prompt_file"):
            named[f"{path}.{name}"] = getattr(source, name)
    template = policy.tokenizer.chat_template
    if template is not None and template.endswith(".jinja"):
        named["policy.tokenizer.chat_template"] = template
    for key, file in named.items():
        if file is None or Path(file).is_dir():
            continue
        rows = (".jsonl", ".parquet") if Path(file).is_file() else (".jsonl", ".parquet", "")
        if key.endswith(".data_path") and Path(file).suffix not in rows:
            yield Conflict((key,), "expected a .jsonl or .parquet file, or a folder of them")
        elif not Path(file).exists():
            where = "" if Path(file).is_absolute() else f" (looked in {Path.cwd()})"
            yield Conflict((key,), f"no such file{where}", only_to_run=True)


def secret_conflicts(policy: PolicyConfig) -> Iterator[Conflict]:
    """Secrets in the environment blocks, which would be written into every saved config."""
    for block in ("dtensor_cfg", "megatron_cfg"):
        for name in getattr(policy, block).env_vars:
            if any(word in name.upper() for word in ("TOKEN", "SECRET", "PASSWORD", "API_KEY")):
                yield Conflict(
                    (f"policy.{block}.env_vars.{name}",),
                    "looks like a secret, and configs are saved beside checkpoints: "
                    "export it in the shell instead, on a cluster in the one that starts Ray",
                )
