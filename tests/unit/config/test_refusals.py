"""Everything that is wrong is refused, by name, with the place it comes from, all at once."""

from __future__ import annotations

import re

import pytest

BASE = "defaults: [sft, _self_]\n"
MEGATRON = ("policy.megatron_cfg.enabled=true", "policy.dtensor_cfg.enabled=false")
MG = "policy.megatron_cfg"

TYPOS = {
    "sft.max_num_step": "sft.max_num_steps",
    "policy.train_global_batchsize": "policy.train_global_batch_size",
    "policy.tokenizer.chat_templates": "policy.tokenizer.chat_template",
    "policy.optimizer.muon_momentm": "policy.optimizer.muon_momentum",
    "policy.scheduler.lr_warmup_steps": "policy.scheduler.lr_warmup_iters",
    "policy.dtensor_cfg.tensor_parallel": "policy.dtensor_cfg.tensor_parallel_size",
    f"{MG}.optimizer.muon_momentm": f"{MG}.optimizer.muon_momentum",
    f"{MG}.pipeline_parallel_size": f"{MG}.pipeline_model_parallel_size",
    "data.train.output_keys": "data.train.output_key",
    "checkpointing.keep_top": "checkpointing.keep_top_k",
    "logger.wandb_enable": "logger.wandb_enabled",
    "cluster.gpu_per_node": "cluster.gpus_per_node",
}


def nested(path: str) -> str:
    *sections, name = path.split(".")
    lines = [f"{'  ' * depth}{section}:" for depth, section in enumerate(sections)]
    return BASE + "\n".join([*lines, f"{'  ' * len(sections)}{name}: 1\n"])


@pytest.mark.parametrize("prefix", ["", "+", "++", "file"])
@pytest.mark.parametrize(("typo", "meant"), TYPOS.items())
def test_an_unknown_key_is_refused_with_its_place_and_the_nearest_spelling(
    refused, write, prefix, typo, meant
):
    if prefix == "file":
        report = refused("--config", write(nested(typo)))
        assert re.search(rf"{re.escape(typo)} = 1 +\[.*written.yaml:\d+\]", report)
    else:
        report = refused(f"{prefix}{typo}=1")
        assert f"[command line: {prefix}{typo}=1]" in report
    assert f"did you mean {meant}" in report
    assert report.startswith("1 problem ")


WRONG_VALUES = {
    "sft.max_num_steps=abc": "int > 0",
    "sft.max_num_steps=-3": "int > 0",
    "sft.max_num_steps=1.5": "int > 0",
    "sft.max_num_steps=null": "int > 0",
    "sft.val_at_start=yes": "true | false",
    "sft.seed=true": "int >= 0",
    "sft=[1]": "section",
    "policy.precision=bf16": "did you mean bfloat16",
    "policy.precision=float16": "loss scaling",
    "policy.optimizer=adam": "section",
    "policy.optimizer.optimizer=mion": "did you mean muon",
    "policy.optimizer.lr=-1e-3": "float >= 0",
    "policy.optimizer.lr=nan": "float >= 0",
    "policy.optimizer.lr=inf": "float >= 0",
    "policy.optimizer.muon_momentum=abc": "float >= 0 <= 1",
    "policy.optimizer.adam_beta2=1.0": "less than 1",
    "policy.optimizer.muon_exclude=['(']": "no regular expression",
    "policy.max_total_sequence_length=0": "int > 0",
    "policy.dtensor_cfg.env_vars.A=[1]": "expected str",
    "policy.dtensor_cfg.env_vars.A=true": "in quotes: '\"true\"'",
    "policy.dtensor_cfg.env_vars=3": "expected mapping of str",
    "policy.scheduler.lr_warmup_fraction=1.5": "float >= 0 <= 1",
    "data.train.dataset_name=squad": "write its rows as messages",
    "data.validation.split_validation_size=0.1": "are for validation",
    "data.validation.weight=2": "in proportion to their rows",
    "policy.dtensor_cfg.env_vars.HF_TOKEN=abc": "looks like a secret",
    "data.train=3": "section",
    "data.train.env_name=arithmetics": "did you mean arithmetic",
    "data.train=[]": "the list is empty",
    "data.train.split_validation_size=1.5": "float >= 0 <= 1",
    "data.train.data_path=/no/such/file.jsonl": "no such file\n",
    "data.train.data_path=rows.csv": "expected a .jsonl or .parquet file",
    "data.default.prompt_file=nowhere.txt": "no such file",
    "policy.tokenizer.chat_template=nowhere.jinja": "no such file",
    "checkpointing.checkpoint_must_save_by=3h": "DD:HH:MM:SS",
    "checkpointing.metric_name=val_loss": "val:<name>",
    "checkpointing.optimizer_state=adapt": "exact | convert",
    "checkpointing.model_save_format=torch_save": "run code when loaded",
    "logger.wandb.name=5": "in quotes",
    "cluster.gpus_per_node=all": "int >= 0 | auto",
    "cluster.launcher=slurm": "ray | local",
    "sft.max_num_steps=${oc.env:NO_SUCH_VARIABLE}": "NO_SUCH_VARIABLE",
    "sft.max_num_steps=${sft.no_such_key}": "no_such_key",
    "policy.model_name=Qwen/Qwen3-0.6B": "--config configs/sft.yaml",
}


@pytest.mark.parametrize(("override", "allowed"), WRONG_VALUES.items())
def test_a_wrong_value_is_refused_with_what_is_allowed(refused, override, allowed):
    report = refused(override)
    assert override.partition("=")[0] in report
    assert f"[command line: {override}]" in report
    assert allowed in report
    assert report.startswith("1 problem ")


CONFLICTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "both backends": (
        (f"{MG}.enabled=true",),
        ("policy.dtensor_cfg.enabled", f"{MG}.enabled"),
    ),
    "no backend": (
        ("policy.dtensor_cfg.enabled=false",),
        ("policy.dtensor_cfg.enabled", f"{MG}.enabled"),
    ),
    "muon and use_distributed_optimizer": (
        (
            *MEGATRON,
            "policy.optimizer.optimizer=muon",
            f"{MG}.optimizer.use_distributed_optimizer=true",
        ),
        ("policy.optimizer.optimizer", f"{MG}.optimizer.use_distributed_optimizer"),
    ),
    "modules without recomputation": (
        (
            *MEGATRON,
            f"{MG}.recompute_granularity=selective",
            f"{MG}.recompute_modules=[mlp]",
        ),
        (f"{MG}.recompute_modules", f"{MG}.activation_checkpointing"),
    ),
    "another type between stages": (
        (*MEGATRON, f"{MG}.pipeline_dtype=bfloat16"),
        (f"{MG}.pipeline_dtype", "policy.precision"),
    ),
    "a coefficient without its loss": (
        (*MEGATRON, f"{MG}.model_overrides={{moe_aux_loss_coeff: 0.1}}"),
        (f"{MG}.model_overrides", f"{MG}.moe_router_load_balancing_type"),
    ),
    "steps of a schedule": (
        ("policy.optimizer.muon_num_ns_steps=6",),
        ("policy.optimizer.muon_num_ns_steps", "policy.optimizer.muon_coefficient_type"),
    ),
    "steps of a schedule on one backend": (
        (*MEGATRON, f"{MG}.optimizer.muon_coefficient_type=deepseekv4"),
        (f"{MG}.optimizer.muon_coefficient_type", "policy.optimizer.muon_num_ns_steps"),
    ),
    "blockwise muon": (
        ("policy.optimizer.optimizer=muon", "policy.optimizer.muon_tp_mode=blockwise"),
        ("policy.optimizer.muon_tp_mode",),
    ),
    "world": (
        ("cluster.gpus_per_node=3", "policy.dtensor_cfg.tensor_parallel_size=2"),
        ("cluster.gpus_per_node", "cluster.num_nodes", "policy.dtensor_cfg.tensor_parallel_size"),
    ),
    "world of CPU workers": (
        (
            "cluster.gpus_per_node=0",
            "cluster.cpu_workers_per_node=3",
            "policy.dtensor_cfg.tensor_parallel_size=2",
        ),
        ("cluster.cpu_workers_per_node", "policy.dtensor_cfg.tensor_parallel_size"),
    ),
    "world on Megatron": (
        (
            *MEGATRON,
            "cluster.gpus_per_node=8",
            f"{MG}.tensor_model_parallel_size=4",
            f"{MG}.pipeline_model_parallel_size=2",
            f"{MG}.context_parallel_size=2",
        ),
        (
            f"{MG}.tensor_model_parallel_size",
            f"{MG}.pipeline_model_parallel_size",
            f"{MG}.context_parallel_size",
            "cluster.gpus_per_node",
        ),
    ),
    "experts": (
        (*MEGATRON, "cluster.gpus_per_node=4", f"{MG}.expert_model_parallel_size=8"),
        (f"{MG}.expert_model_parallel_size", "cluster.gpus_per_node"),
    ),
    "experts and tensor parallel": (
        (*MEGATRON, f"{MG}.expert_model_parallel_size=2", f"{MG}.tensor_model_parallel_size=2"),
        (f"{MG}.expert_model_parallel_size", f"{MG}.sequence_parallel"),
    ),
    "replicas": (
        ("cluster.gpus_per_node=4", "policy.dtensor_cfg.dp_replicate_size=3"),
        ("policy.dtensor_cfg.dp_replicate_size", "cluster.gpus_per_node"),
    ),
    "global batch": (
        ("cluster.gpus_per_node=64",),
        ("policy.train_global_batch_size", "cluster.gpus_per_node"),
    ),
    "local launcher": (
        ("cluster.launcher=local", "cluster.gpus_per_node=2"),
        ("cluster.launcher", "cluster.gpus_per_node"),
    ),
    "local launcher and tensor parallel": (
        ("cluster.launcher=local", "policy.dtensor_cfg.tensor_parallel_size=2"),
        ("cluster.launcher", "policy.dtensor_cfg.tensor_parallel_size"),
    ),
    "packing and dynamic batching": (
        ("policy.sequence_packing.enabled=true", "policy.dynamic_batching.enabled=true"),
        ("policy.sequence_packing.enabled", "policy.dynamic_batching.enabled"),
    ),
    "token budget": (
        ("policy.sequence_packing.enabled=true", "policy.sequence_packing.train_mb_tokens=8"),
        ("policy.sequence_packing.train_mb_tokens", "policy.max_total_sequence_length"),
    ),
    "token budget and rounded length": (
        (
            "policy.dynamic_batching.enabled=true",
            "policy.max_total_sequence_length=1000",
            "policy.dynamic_batching.train_mb_tokens=1000",
        ),
        ("policy.dynamic_batching.train_mb_tokens", "policy.max_total_sequence_length"),
    ),
    "token budget and validation rows": (
        (
            "policy.sequence_packing.enabled=true",
            "policy.sequence_packing.train_mb_tokens=8192",
            "sft.val_micro_batch_size=4",
        ),
        ("sft.val_micro_batch_size", "policy.sequence_packing.train_mb_tokens"),
    ),
    "more than the bundled model's positions": (
        ("policy.max_total_sequence_length=4096",),
        ("policy.max_total_sequence_length", "policy.model_name"),
    ),
    "context parallel on DTensor": (
        ("policy.dtensor_cfg.context_parallel_size=2",),
        ("policy.dtensor_cfg.context_parallel_size",),
    ),
    "sequence parallel alone": (
        ("policy.dtensor_cfg.sequence_parallel=true",),
        ("policy.dtensor_cfg.sequence_parallel", "policy.dtensor_cfg.tensor_parallel_size"),
    ),
    "divisor": (
        (
            *MEGATRON,
            f"{MG}.tensor_model_parallel_size=4",
            f"{MG}.context_parallel_size=2",
            f"{MG}.sequence_parallel=true",
            "policy.make_sequence_length_divisible_by=4",
        ),
        (
            "policy.make_sequence_length_divisible_by",
            f"{MG}.tensor_model_parallel_size",
            f"{MG}.context_parallel_size",
        ),
    ),
    "pipeline stages": (
        (*MEGATRON, f"{MG}.num_layers_in_first_pipeline_stage=3"),
        (f"{MG}.num_layers_in_first_pipeline_stage", f"{MG}.pipeline_model_parallel_size"),
    ),
    "WSD without its length": (
        ("policy.scheduler.lr_decay_style=WSD",),
        ("policy.scheduler.lr_decay_style", "policy.scheduler.lr_wsd_decay_iters"),
    ),
    "warm-up and decay": (
        ("policy.scheduler.lr_decay_iters=5", "policy.scheduler.lr_warmup_iters=9"),
        ("policy.scheduler.lr_warmup_iters", "policy.scheduler.lr_decay_iters"),
    ),
    "warm-up and run": (
        ("sft.max_num_steps=2", "policy.scheduler.lr_warmup_iters=9"),
        ("policy.scheduler.lr_warmup_iters", "sft.max_num_steps"),
    ),
    "a warm-up as long as a run that decays": (
        ("sft.max_num_steps=9", "policy.scheduler.lr_warmup_iters=9"),
        ("policy.scheduler.lr_warmup_iters", "sft.max_num_steps"),
    ),
    "a warm-up of the whole run": (
        ("policy.scheduler.lr_warmup_fraction=1",),
        ("policy.scheduler.lr_warmup_fraction", "sft.max_num_steps"),
    ),
    "last part and run": (
        (
            "policy.scheduler.lr_decay_style=WSD",
            "policy.scheduler.lr_wsd_decay_iters=400",
        ),
        (
            "policy.scheduler.lr_warmup_fraction",
            "policy.scheduler.lr_wsd_decay_iters",
            "sft.max_num_steps",
        ),
    ),
    "two warm-ups": (
        ("policy.scheduler={lr_warmup_iters: 3, lr_warmup_fraction: 0.1}",),
        ("policy.scheduler.lr_warmup_iters", "policy.scheduler.lr_warmup_fraction"),
    ),
    "decay upwards": (
        ("policy.scheduler.lr_decay_style=linear", "policy.optimizer.min_lr=1"),
        ("policy.optimizer.lr", "policy.optimizer.min_lr"),
    ),
    "warm-up downwards": (
        ("policy.scheduler.lr_warmup_iters=3", "policy.scheduler.lr_warmup_init=1"),
        ("policy.scheduler.lr_warmup_init", "policy.optimizer.lr"),
    ),
    "weight decay": (
        ("policy.scheduler.start_weight_decay=0.1", "policy.scheduler.end_weight_decay=0.2"),
        ("policy.scheduler.start_weight_decay", "policy.scheduler.weight_decay_incr_style"),
    ),
    "precision": (
        (*MEGATRON, f"{MG}.optimizer.bf16=true"),
        (f"{MG}.optimizer.bf16", "policy.precision"),
    ),
    "longest example": (
        ("data.max_input_seq_length=100000",),
        ("data.max_input_seq_length", "policy.max_total_sequence_length"),
    ),
    "nothing to rank by": (
        ("data.validation=null", "sft.val_num_answers=0"),
        ("checkpointing.metric_name", "data.validation"),
    ),
    "never validated": (
        ("sft.val_period=0", "sft.val_at_start=false", "sft.val_at_end=false"),
        ("checkpointing.metric_name", "sft.val_period"),
    ),
    "start without checkpoints": (
        ("checkpointing.start_from=a/step_1", "checkpointing.enabled=false"),
        ("checkpointing.start_from", "checkpointing.enabled"),
    ),
    "no prompts to answer": (
        ("data.validation=null", "checkpointing.metric_name=null"),
        ("sft.val_num_answers", "data.validation"),
    ),
    "no source": (
        ("data.train.dataset_name=null",),
        ("data.train.dataset_name", "data.train.data_path"),
    ),
}


@pytest.mark.parametrize(("overrides", "keys"), CONFLICTS.values(), ids=CONFLICTS)
def test_values_that_do_not_go_together_are_refused_naming_every_key(refused, overrides, keys):
    report = refused(*overrides)
    assert report.startswith("1 problem ")
    for key in keys:
        assert f"  {key} = " in report


def test_a_model_with_fewer_positions_than_the_sequence_is_refused(refused, write, tmp_path):
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 128}')
    report = refused("--config", "configs/sft.yaml", f"policy.model_name={tmp_path}")
    assert "this model has 128 positions" in report


def test_heads_that_tensor_parallel_ranks_can_not_share_are_refused_before_anything_starts(
    refused, tmp_path
):
    (tmp_path / "config.json").write_text('{"num_attention_heads": 8, "num_key_value_heads": 2}')
    options = ("cluster.gpus_per_node=4", f"policy.model_name={tmp_path}")
    key = "policy.dtensor_cfg.tensor_parallel_size"
    report = refused("--config", "configs/sft.yaml", *options, f"{key}=4")
    assert "4 ranks can not share this model's 2 heads (num_key_value_heads)" in report
    assert f"  {key} = 4" in report


def test_everything_is_reported_at_once(refused, write):
    text = BASE + "policy:\n  precision: bf16\nsfft:\n  x: 1\n"
    report = refused(
        "--config",
        write(text),
        "sft.max_num_steps=-1",
        "data.train.wieght=2",
        "key=(",
        "--dry-rum",
        "policy.optimizer.muon_num_ns_steps=7",
    )
    assert report.startswith("7 problems ")
    for named in ("written.yaml:3", "written.yaml:4", "--dry-run", "key=(", "muon_num_ns_steps"):
        assert named in report
    assert "did you mean sft?" in report


def test_a_bad_value_hides_no_conflict_and_invents_none(refused):
    report = refused("cluster.gpus_per_node=x", "policy.dtensor_cfg.tensor_parallel_size=2")
    assert report.startswith("1 problem ")
    decay = ("policy.scheduler.lr_decay_style=linear", "policy.optimizer.min_lr=1e-4")
    assert refused("policy.optimizer.lr=x", *decay).startswith("1 problem ")
    report = refused("sft.seed=x", "cluster.gpus_per_node=64")
    assert report.startswith("2 problems ")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [1", "can not be read"),
        ("a: 1\na: 2\n", "duplicate key a (line 2)"),
        ("- 1\n", "holds a list"),
        ("defaults: [no_such_file]\n", "no_such_file"),
        ("defaults: sft.yaml\n", "defaults: [sft, _self_]"),
        ("defaults: sft\n", "defaults: [sft, _self_]"),
        ("defaults: ../../sft.yaml\n", "recipe of NeMo-RL: uv run tools/config_cli.py import "),
        ('defaults: ["../sft.yaml"]\n', "recipe of NeMo-RL: uv run tools/config_cli.py import "),
        ("hydra:\n  run: {dir: x}\n", "its own settings have no effect"),
        ("sft:\n  seed: ???\n", "needs a value"),
        ("sft:\n  seed: !!python/object:os.system 1\n", "can not be read"),
        ("sft: null\n", "this is a section"),
    ],
)
def test_a_file_that_can_not_be_read_is_refused_with_the_reason(refused, write, text, reason):
    report = refused("--config", write(text))
    assert reason in report
    assert "written" in report


def test_a_file_that_is_not_there_is_refused_with_the_nearest_one(refused):
    assert "did you mean configs/sft_tiny.yaml" in refused("--config", "configs/sft_tinny.yaml")


@pytest.mark.parametrize("override", ["sft.seed=1,2", "sft.seed=range(1,4)"])
def test_a_sweep_without_multirun_is_refused(refused, override):
    assert "--multirun" in refused(override)


def test_a_group_option_that_is_not_there_is_refused_with_those_that_are(refused):
    report = refused("policy/optimizer=mion")
    assert "adam" in report and "muon" in report


@pytest.mark.parametrize("override", ["~sft.max_num_step", "~sft.seed=7", "~nothing"])
def test_deleting_what_is_not_there_is_refused(refused, override):
    assert f"[command line: {override}]" in refused(override)


def test_a_plan_needs_no_data_but_files_of_a_kind_that_is_read(sft, refused):
    missing = "data.train.data_path=/on/the/cluster.jsonl"
    (note,) = sft(missing, "--dry-run").notes
    assert note == "data.train.data_path: no such file; a run needs it"
    assert sft(missing, "--print-config").tree.data.train.data_path == "/on/the/cluster.jsonl"
    assert "no such file" in refused(missing)
    assert "expected a .jsonl" in refused("data.train.data_path=rows.csv", "--dry-run")


def test_the_configuration_of_another_algorithm_is_named_with_its_command(refused, grpo_refused):
    command = "uv run examples/run_grpo.py --config configs/grpo_math_1B.yaml"
    report = refused("--config", "configs/grpo_math_1B.yaml")
    assert command in report and report.startswith("1 problem ")
    assert (
        "examples/run_sft.py" in grpo_refused("--config", "configs/sft.yaml").partition("Every")[0]
    )
    tiny = grpo_refused("--config", "configs/sft_tiny.yaml")
    assert "uv run examples/run_sft.py --config configs/sft_tiny.yaml" in tiny


def test_help_of_a_misspelt_key_suggests_another(refused):
    assert "did you mean policy.optimizer?" in refused("--help", "policy.optimzer")


def test_a_choice_that_a_group_does_not_have_is_named_with_those_that_it_has(refused):
    report = refused("policy/optimizer=adamw")
    assert (
        "policy/optimizer=adamw: there is no such file; there are adam, muon; did you mean"
        in report
    )
    assert "did you mean policy/optimizer=adam?" in report
