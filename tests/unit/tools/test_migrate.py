"""A recipe in NeMo-RL's form becomes ours, and nothing of it is lost without a word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_like.config.command_line import parse
from nemo_like.config.draft import find
from nemo_like.config.grpo import GRPOTree
from nemo_like.config.layers import as_yaml
from nemo_like.config.sft import SFTTree
from nemo_like.errors import ConfigError
from tools.migrate import LEFT_OUT, Migration, account, migrate

BASE = """
grpo:
  num_prompts_per_step: 32
  num_generations_per_prompt: 16
  normalize_rewards: true
  val_start_at: -1
  adv_estimator: {name: grpo, normalize_rewards: "${grpo.normalize_rewards}"}
  reward_shaping: {enabled: false, max_response_length: "${policy.max_total_sequence_length}"}
checkpointing: {enabled: true, checkpoint_dir: results/theirs, metric_name: "train:loss"}
policy:
  model_name: some/model
  tokenizer: {name: "${policy.model_name}", chat_template_kwargs: null}
  train_global_batch_size: 512
  train_micro_batch_size: 4
  logprob_batch_size: ${policy.train_micro_batch_size}
  generation_batch_size: 32
  max_total_sequence_length: 512
  dtensor_cfg:
    _v2: true
    enabled: true
    tensor_parallel_size: 1
    lora_cfg: {enabled: false, dim: 8, target_modules: []}
  megatron_cfg:
    enabled: false
    apply_rope_fusion: true
    tensor_model_parallel_size: 1
    optimizer:
      optimizer: adam
      lr: 5.0e-6
      weight_decay: 0.01
      adam_beta2: 0.99
      use_precision_aware_optimizer: true
    scheduler: {start_weight_decay: "${policy.megatron_cfg.optimizer.weight_decay}"}
  make_sequence_length_divisible_by: ${policy.dtensor_cfg.tensor_parallel_size}
  optimizer: {name: torch.optim.AdamW, kwargs: {lr: 5.0e-6, betas: [0.9, 0.999], eps: 1e-8}}
  scheduler:
    - {name: torch.optim.lr_scheduler.LinearLR, kwargs: {start_factor: 0.1, total_iters: 50}}
    - {name: torch.optim.lr_scheduler.ConstantLR, kwargs: {factor: 1.0, total_iters: 1000000}}
    - milestones: [50]
  generation:
    backend: vllm
    max_new_tokens: ${policy.max_total_sequence_length}
    top_k: null
    vllm_cfg: {async_engine: false, tensor_parallel_size: 1}
    vllm_kwargs: {}
data:
  train: {dataset_name: OpenMathInstruct-2, split_validation_size: 0.05, seed: "${grpo.seed}"}
  validation: null
  default: {prompt_file: null, processor: math_hf_data_processor}
logger: {tensorboard: {}}
env: {math: {num_workers: 8}}
cluster: {gpus_per_node: 1, num_nodes: 1}
"""

Import = Callable[..., Migration]


@pytest.fixture
def theirs(tmp_path: Path) -> Import:
    """What a recipe means that inherits from `BASE`."""
    (tmp_path / "base.yaml").write_text(BASE)

    def read(text: str = "", defaults: str = "../base.yaml") -> Migration:
        recipe = tmp_path / "recipes" / "recipe.yaml"
        recipe.parent.mkdir(exist_ok=True)
        recipe.write_text(f"defaults: {defaults}\n{text}")
        return migrate(recipe)

    return read


def fate(done: Migration, path: str) -> str:
    (found,) = [f.kind for f in done.fates if f.path == path]
    return found


def lost(done: Migration) -> str:
    return "\n".join(account(f for f in done.fates if f.kind in ("absent", "unknown")))


def test_a_recipe_of_theirs_runs_here_and_loses_nothing(theirs, tmp_path, monkeypatch):
    done = theirs("grpo: {num_prompts_per_step: 64}\ncluster: {gpus_per_node: 8}\n")
    assert (done.tree, done.conflicts, lost(done)) == (GRPOTree, (), "")
    ours = tmp_path / "ours.yaml"
    ours.write_text(as_yaml(done.values))
    argv = ["--config", str(ours)]
    tree = parse(argv, tree=GRPOTree, default_config=Path("unused")).tree
    assert (tree.grpo.num_prompts_per_step, tree.cluster.gpus_per_node) == (64, 8)
    assert tree.policy.scheduler.lr_warmup_iters == 50
    assert tree.policy.optimizer.adam_beta2 == 0.999
    assert tree.policy.megatron_cfg.optimizer.adam_beta2 == 0.99
    assert tree.data.train.dataset_name == "nvidia/OpenMathInstruct-2"
    assert tree.policy.logprob_batch_size == 4


def test_every_key_has_one_fate(theirs):
    done = theirs()
    kinds = {
        "policy.model_name": "kept",
        "grpo.val_start_at": "off",
        "policy.dtensor_cfg.lora_cfg.dim": "off",
        "policy.generation_batch_size": "ignored",
        "policy.megatron_cfg.apply_rope_fusion": "ignored",
        "policy.megatron_cfg.optimizer.use_precision_aware_optimizer": "ignored",
        "policy.make_sequence_length_divisible_by": "ignored",
        "logger.tensorboard": "kept",
        "data.validation": "kept",
        "policy.optimizer.kwargs.betas": "said differently",
        "grpo.adv_estimator.normalize_rewards": "said differently",
    }
    assert {path: fate(done, path) for path in kinds} == kinds
    paths = [f.path for f in done.fates]
    assert len(paths) == len(set(paths))
    assert all(bool(f.reason) == (f.kind in (*LEFT_OUT, "off")) for f in done.fates)


def test_what_is_on_there_and_absent_here_is_named_with_every_key_of_it(theirs):
    done = theirs("policy: {dtensor_cfg: {lora_cfg: {enabled: true, dim: 128}}}")
    assert lost(done) == (
        "policy.dtensor_cfg.lora_cfg (enabled=true, dim=128, target_modules=[]): "
        "absent on purpose: LoRA is not built: all weights are trained"
    )
    (line,) = [f.origin.text for f in done.fates if f.path.endswith("lora_cfg.dim")]
    assert line.endswith("recipe.yaml:2")


def test_a_misspelt_key_and_a_wrong_value_are_left_out_and_named(theirs):
    done = theirs("grpo: {num_prompts: 8, seed: abc}\npolicy: {megatron_cfg: {muon: 1}}")
    assert "grpo.num_prompts = 8: there is no such key; did you mean" in lost(done)
    assert "grpo.seed = abc: expected" in lost(done)
    assert fate(done, "policy.megatron_cfg.muon") == "unknown"
    assert done.conflicts == () and done.needs_decision


def test_the_arguments_of_an_optimizer_that_is_not_here_go_with_it(theirs):
    done = theirs("policy: {optimizer: {name: my.Optimizer}}")
    assert fate(done, "policy.optimizer.kwargs.lr") == "absent"
    assert "my.Optimizer" in lost(done)


@pytest.mark.parametrize(
    "argument", ["lr: fast", "lr: [1]", "weight_decay: x", "betas: [0.9, 2.0]", "betas: 0.9"]
)
def test_a_wrong_argument_of_an_optimizer_is_lost_under_its_own_name(theirs, argument):
    done = theirs(f"policy: {{optimizer: {{kwargs: {{{argument}}}}}, scheduler: null}}")
    name, _, value = argument.partition(": ")
    path = f"policy.optimizer.kwargs.{name}"
    assert fate(done, path) in ("unknown", "absent")
    assert f"{path} = {value}: " in lost(done)


def test_what_is_taken_out_of_a_list_is_named_beside_the_rest_of_it(theirs):
    sources = "[{data_path: a.jsonl, spilt: x}, {data_path: b.jsonl, num_rows: y}]"
    done = theirs(f"data: {{_override_: true, train: {sources}}}")
    assert "data.train.0.spilt in data.train = [" in lost(done)
    assert "data.train.1.num_rows = y: expected" in lost(done)


def test_rows_that_are_too_long_end_no_run_that_they_did_not_end_there(theirs):
    assert theirs().values["data"]["bad_rows"] == "drop"
    done = theirs("data: {bad_rows: refuse}")  # a file that was imported before
    assert "bad_rows" not in done.values["data"] and done.added == ()


def test_megatrons_muon_makes_the_steps_that_it_made_there(theirs):
    muon = "{optimizer: dist_muon, use_distributed_optimizer: false, muon_extra_scale_factor: 0.2}"
    megatron = f"megatron_cfg: {{enabled: true, optimizer: {muon}}}"
    done = theirs(f"policy: {{dtensor_cfg: {{enabled: false}}, {megatron}}}")
    written = done.values["policy"]["megatron_cfg"]["optimizer"]
    assert written["muon_extra_scale_factor"] == 0.2
    assert (written["muon_tp_mode"], written["muon_split_gate_up"]) == ("blockwise", False)
    assert (written["muon_clip"], written["muon_zero_grad"]) == ("all", "always")
    assert any("muon_tp_mode=blockwise" in line for line in done.added)
    assert not done.conflicts
    assert "muon_tp_mode" not in as_yaml(theirs().values)


def test_conversations_of_a_local_file_are_read_by_their_column(tmp_path):
    file = tmp_path / "chats.yaml"
    source = "dataset_name: openai_format, data_path: a.jsonl, chat_key: turns, system_key: null"
    file.write_text(f"sft: {{seed: 1}}\ndata: {{train: {{{source}, tool_key: tools}}}}\n")
    done = migrate(file)
    assert done.values["data"]["train"] == {"data_path": "a.jsonl", "messages_key": "turns"}
    assert fate(done, "data.train.system_key") == "off"
    assert "data.train.tool_key = tools: absent on purpose" in lost(done)


@pytest.mark.parametrize(("name", "decide"), [("some_chats", True), ("some/chats", False)])
def test_a_short_name_of_a_data_set_that_is_in_no_table_needs_a_decision(theirs, name, decide):
    done = theirs(f"data: {{train: {{dataset_name: {name}}}}}")
    assert done.needs_decision == decide
    assert [problem.keys for problem in done.conflicts] == [("data.train.dataset_name",)] * decide


def test_a_data_set_that_is_absent_for_a_reason_is_told_once(theirs):
    done = theirs("data: {train: {_override_: true, dataset_name: squad}}")
    assert "write its rows as messages" in lost(done)
    assert (done.conflicts, done.needs_decision) == ((), True)


def test_validation_in_batches_of_its_own_is_left_to_a_token_budget(tmp_path):
    file = tmp_path / "sft.yaml"
    packing = "{enabled: %s, train_mb_tokens: 2048}"
    text = f"sft: {{val_micro_batch_size: 1}}\npolicy: {{sequence_packing: {packing}}}"
    kept = {}
    for enabled in ("true", "false"):
        file.write_text(text % enabled)
        done = migrate(file)
        kept[enabled] = "val_micro_batch_size" in done.values.get("sft", {})
        assert not done.conflicts
    assert kept == {"true": False, "false": True}


def test_sequences_of_an_engine_come_along(theirs):
    done = theirs("policy: {generation: {vllm_kwargs: {max_num_seqs: 512}}}")
    assert done.values["policy"]["generation"]["max_num_seqs"] == 512
    assert lost(done) == ""


def test_interpolations_stay_where_they_mean_the_same_here(theirs):
    values = theirs().values
    kept = "${policy.max_total_sequence_length}"
    assert find(values, ("policy", "generation", "max_new_tokens"))[1] == kept
    assert find(values, ("data", "train", "seed"))[1] == "${grpo.seed}"
    assert "${policy.max_total_sequence_length}" in as_yaml(values)


def test_a_reference_to_a_key_that_is_gone_becomes_its_value(theirs):
    text = "policy: {hf_config_overrides: {a: '${policy.generation_batch_size}'}}"
    assert theirs(text).values["policy"]["hf_config_overrides"] == {"a": 32}


def test_what_follows_another_key_anyway_is_not_said_twice(theirs):
    megatron = theirs().values["policy"]["megatron_cfg"]
    assert megatron == {"optimizer": {"adam_beta2": 0.99}}


def test_a_section_that_overrides_drops_what_is_inherited(theirs):
    done = theirs("policy: {generation: {_override_: true, temperature: 0.5}}")
    assert done.values["policy"]["generation"] == {"temperature": 0.5}


def test_the_newer_name_of_the_fsdp_block_is_understood(theirs):
    done = theirs("policy: {automodel_cfg: {tensor_parallel_size: 2, lora_cfg: {enabled: true}}}")
    assert done.values["policy"]["dtensor_cfg"] == {"tensor_parallel_size": 2}
    assert fate(done, "policy.automodel_cfg.tensor_parallel_size") == "said differently"
    assert fate(done, "policy.automodel_cfg.lora_cfg.enabled") == "absent"


def test_tables_reach_into_lists_of_sources(theirs):
    sources = "[{data_path: a.jsonl, processor: p}, {data_path: b.jsonl, repeat: 4}]"
    done = theirs(f"data: {{_override_: true, train: {sources}}}")
    assert done.values["data"]["train"] == [{"data_path": "a.jsonl"}, {"data_path": "b.jsonl"}]


def test_what_can_not_run_as_it_is_is_said_and_still_written(theirs):
    done = theirs("policy: {megatron_cfg: {enabled: true}}")
    assert any("policy.dtensor_cfg.enabled" in problem.keys for problem in done.conflicts)
    assert done.values["policy"]["megatron_cfg"]["enabled"] is True


def test_an_sft_recipe_without_parents_is_an_sft_tree(tmp_path):
    file = tmp_path / "alone.yaml"
    file.write_text("sft: {max_num_steps: 5, val_period: -1}\npolicy: {optimizer: null}\n")
    done = migrate(file)
    assert (done.tree, done.values["sft"]) == (SFTTree, {"max_num_steps": 5, "val_period": 0})


@pytest.mark.parametrize(
    ("text", "defaults", "says"),
    [
        ("", "gone.yaml", "gone.yaml; copy it to there too"),
        ("", "recipe.yaml", "inherit each other"),
        ("dpo: {beta: 0.1}", "[]", "no recipe of SFT, GRPO or DAPO"),
        ("a: [", "[]", "can not be read"),
    ],
)
def test_a_file_that_is_none_is_refused_with_the_reason(theirs, text, defaults, says):
    with pytest.raises(ConfigError, match=says):
        theirs(text, defaults)
