"""Files, groups and overrides become one tree, and the tree becomes a file again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_like.config.command_line import parse
from nemo_like.config.draft import differing
from nemo_like.config.sft import SFTTree

ROOT = Path(__file__).parents[3]


def test_the_embedded_default_is_a_newborn_model_on_bundled_problems(sft):
    tree = sft().tree
    assert (tree.policy.model_name, tree.policy.init) == ("tiny-qwen3", "random")
    assert tree.data.train.dataset_name == "arithmetic"
    assert tree.sft.val_num_answers > 0


@pytest.mark.parametrize(
    "config", sorted(p.relative_to(ROOT) for p in (ROOT / "configs").glob("sft*.yaml")), ids=str
)
def test_every_config_is_valid(sft, config):
    assert sft("--config", str(config)).config_path == ROOT / config


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_a_value_is_set_whether_or_not_the_key_is_there_and_the_last_one_wins(sft, prefix):
    tree = sft(f"{prefix}sft.seed=1", f"{prefix}sft.max_num_epochs=3", "sft.seed=2").tree
    assert (tree.sft.seed, tree.sft.max_num_epochs) == (2, 3)


@pytest.mark.parametrize("name", ["sft.yaml", "configs/sft.yaml", "examples/configs/sft.yaml"])
@pytest.mark.parametrize("folder", [ROOT, Path("/")])
def test_a_config_is_found_from_anywhere(sft, monkeypatch, name, folder):
    monkeypatch.chdir(folder)
    assert sft("--config", name).config_path == ROOT / "configs/sft.yaml"


def test_a_file_anywhere_inherits_from_the_repository_and_from_its_neighbours(sft, tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [sft, _self_]\nsft: {seed: 5, val_period: 7}\n")
    (tmp_path / "nested.yaml").write_text("defaults: [/mine, _self_]\nsft: {seed: 6}\n")
    tree = sft("--config", str(tmp_path / "nested.yaml"), "sft.val_batches=3").tree
    assert (tree.sft.seed, tree.sft.val_period, tree.sft.val_batches) == (6, 7, 3)
    assert tree.policy.optimizer.weight_decay == 0.1


def test_a_list_of_sources_takes_the_place_of_the_one_that_is_inherited_and_the_reverse(sft, write):
    several = "[{dataset_name: arithmetic}, {dataset_name: products, weight: 2.0}]"
    config = write(f"defaults: [sft, _self_]\ndata: {{train: {several}}}\n")
    tree = sft("--config", config, "sft.seed=1").tree
    assert [source.dataset_name for source in tree.data.train] == ["arithmetic", "products"]
    tiny = sft("--config", config, "recipes/tiny=sft").tree
    assert tiny.data.train.num_rows == 2000


def test_a_group_is_chosen_on_the_command_line_and_later_overrides_win(sft):
    tree = sft("policy.optimizer.muon_momentum=0.8", "policy/optimizer=muon").tree
    assert tree.policy.optimizer.is_muon
    assert tree.policy.optimizer.muon_momentum == 0.8
    assert tree.policy.optimizer.lr == sft().tree.policy.optimizer.lr


def test_a_group_in_a_defaults_list_is_replaced_by_the_one_on_the_command_line(sft, write):
    config = write("defaults: [sft, policy/optimizer: muon, _self_]\n")
    assert sft("--config", config).tree.policy.optimizer.is_muon
    assert not sft("--config", config, "policy/optimizer=adam").tree.policy.optimizer.is_muon


def test_interpolations_see_written_and_default_keys(sft, write):
    config = write(
        "defaults: [sft, _self_]\n"
        "sft:\n"
        "  seed: ${mul:2,${sft.val_period}}\n"
        "  val_batches: ${add:1,${policy.train_micro_batch_size}}\n"
        "  max_num_steps: ${max:3,${.max_num_epochs}}\n"
        "policy:\n  optimizer:\n    lr: ${div:1,${policy.max_total_sequence_length}}\n"
        "logger: {log_dir: '${oc.env:HOME}/logs'}\n"
    )
    tree = sft("--config", config, "policy.max_total_sequence_length=512").tree
    assert (tree.sft.seed, tree.sft.val_batches, tree.sft.max_num_steps) == (20, 2, 3)
    assert tree.policy.optimizer.lr == 1 / 512
    assert tree.logger.log_dir == os.environ["HOME"] + "/logs"


def test_a_deleted_key_has_its_default_again_even_if_it_was_null_or_never_written(sft, write):
    config = write("defaults: [sft, _self_]\ncheckpointing: {model_save_format: null}\n")
    assert sft("--config", config).tree.checkpointing.model_save_format is None
    deleted = sft("--config", config, "~checkpointing.model_save_format", "~sft.seed").tree
    assert deleted.checkpointing.model_save_format == "safetensors"
    again = sft("--config", config, "~checkpointing.model_save_format=null").tree
    assert again == deleted
    section = sft("--config", config, "~policy.optimizer").tree
    assert section.policy.optimizer == SFTTree().policy.optimizer


def test_a_key_is_deleted_by_value_only_if_it_has_that_value(sft):
    assert sft("sft.seed=5", "~sft.seed=5").tree.sft.seed == SFTTree().sft.seed


def test_several_sources_are_a_list(sft):
    tree = sft("data.train=[{dataset_name: arithmetic, weight: 2}, {dataset_name: x}]").tree
    assert [source.weight for source in tree.data.train] == [2.0, 1.0]
    assert list(tree.data.sources())[:2] == ["data.train.0", "data.train.1"]


def test_a_sweep_is_the_product_of_its_choices_each_with_its_own_checkpoints(sft):
    found = sft(
        "--multirun", "policy/optimizer=adam,muon", "sft.seed=range(0,3)", "sft.val_batches=1"
    )
    points = [(tree.policy.optimizer.optimizer, tree.sft.seed) for tree in found.sweep]
    assert points == [(name, seed) for name in ("adam", "muon") for seed in range(3)]
    assert len({tree.checkpointing.checkpoint_dir for tree in found.sweep}) == 6
    assert found.tree == found.sweep[0]


def test_a_folder_that_a_file_gives_is_divided_among_the_runs_of_a_sweep(sft, write):
    config = write("checkpointing: {checkpoint_dir: results/mine}")
    found = sft("--config", config, "--multirun", "sft.seed=1,2").sweep
    folders = [tree.checkpointing.checkpoint_dir for tree in found]
    assert folders == ["results/mine/0_seed=1", "results/mine/1_seed=2"]


def test_a_folder_is_named_after_the_run_also_where_a_file_asks_for_that(sft, write):
    written = sft("--config", write("checkpointing: {checkpoint_dir: auto}")).tree
    left_out = sft("--config", write("logger: {log_dir: logs}")).tree
    assert written == left_out
    assert sft("checkpointing.checkpoint_dir=auto").tree == sft().tree


@pytest.mark.parametrize(
    ("argv", "mode"),
    [
        ((), "run"),
        (("--dry-run",), "dry_run"),
        (("--print-config",), "print_config"),
        (("--help",), "help"),
    ],
)
def test_options_may_stand_anywhere_among_the_overrides(sft, argv, mode):
    assert sft("sft.seed=1", *argv, "sft.val_batches=2").mode == mode


@pytest.mark.parametrize("config", ["sft_tiny", "sft_openmathinstruct2_megatron"])
def test_the_printed_config_composes_to_the_same_tree(sft, write, config):
    strings = ["policy.tokenizer.chat_template='{% for m in messages %}\\${m} #{% endfor %}'"]
    strings += ["logger.wandb.name='1e-5'", "logger.log_dir='~/x: y'", "policy.model_name='null'"]
    argv = ["--config", config + ".yaml", *strings, "policy.tuned_for=null"]
    argv += ["policy.hf_config_overrides={a: {b: [1, 2.5, null, x]}}", "policy.optimizer.lr=1e-8"]
    printed = sft(*argv, "--print-config")
    again = sft("--config", write(printed.output))
    assert again.tree == printed.tree
    assert "${m}" in again.tree.policy.tokenizer.chat_template


def test_help_lists_every_key_and_can_be_narrowed(sft):
    text = sft("--help").output
    assert "policy.megatron_cfg.optimizer.muon_momentum = null" in text
    assert "--print-config" in text
    narrowed = sft("--help", "sft.max").output
    assert "sft.max_num_steps = 60    (int > 0)" in narrowed
    assert "policy." not in narrowed


def test_the_configuration_page_is_current():
    tool = [sys.executable, str(ROOT / "tools/config_docs.py"), "--check"]
    assert subprocess.run(tool, cwd=ROOT, check=False).returncode == 0


def test_composing_imports_no_torch_ray_vllm_or_transformers():
    code = (
        "import sys; from pathlib import Path\n"
        "from nemo_like.config.command_line import parse\n"
        "from nemo_like.config.sft import SFTTree\n"
        "parse(['sft.seed=1'], tree=SFTTree, default_config=Path('configs/sft_tiny.yaml'))\n"
        "heavy = {'torch', 'ray', 'vllm', 'transformers', 'megatron', 'numpy', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_tree_is_frozen(sft):
    with pytest.raises(ValueError, match="frozen"):
        sft().tree.sft.seed = 3


def test_parse_takes_any_tree(sft):
    found = parse((), tree=SFTTree, default_config=Path("configs/sft.yaml"))
    assert type(found.tree) is SFTTree


def test_a_few_steps_of_the_embedded_default_need_no_other_override(sft):
    for steps in (1, 2, 5):
        assert sft(f"sft.max_num_steps={steps}").tree.sft.max_num_steps == steps


def test_ranks_need_not_share_a_batch_equally(sft):
    tree = sft("cluster.gpus_per_node=6", "policy.train_micro_batch_size=5").tree
    assert tree.policy.train_global_batch_size % tree.cluster.world_size


@pytest.mark.parametrize("model", [None, "results/sft-1a2b3c4d/step_60/hf"])
def test_another_model_brings_its_own_tokenizer_and_checkpoint_folder(sft, model):
    base = sft("--config", "configs/sft.yaml").tree
    overrides = () if model is None else (f"policy.model_name={model}",)
    tree = sft("--config", "configs/sft.yaml", *overrides).tree
    assert tree.policy.model_name == (model or "Qwen/Qwen2.5-1.5B")
    assert tree.policy.tokenizer.name is None
    same_folder = tree.checkpointing.checkpoint_dir == base.checkpointing.checkpoint_dir
    assert same_folder == (model is None)


def test_a_run_from_another_start_has_its_own_checkpoint_folder_and_how_it_converts_changes_none(
    sft,
):
    start = "checkpointing.start_from=results/a/step_2"
    convert = "checkpointing.optimizer_state=convert"
    overrides = ((), (convert,), (start,), (start, convert), (start + "0",))
    plain, converts, started, both, other = (
        sft(*texts).tree.checkpointing.checkpoint_dir for texts in overrides
    )
    assert plain == converts and started == both
    assert len({plain, started, other}) == 3


def test_the_openmathinstruct_configs_keep_their_model_and_its_tokenizer(sft):
    for name in ("sft_openmathinstruct2", "sft_openmathinstruct2_megatron"):
        policy = sft("--config", f"configs/{name}.yaml").tree.policy
        names = (policy.model_name, policy.tokenizer.name)
        assert names == ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct")


def test_trees_differ_in_keys_or_in_whole_sections_that_one_lacks():
    one = {"a": {"x": 1, "y": [1, 2], "z": {"k": 0}}, "b": {"c": 1}}
    other = {"a": {"x": 2, "y": [1, 2], "z": None}, "d": 0}
    assert differing(one, other) == {
        "a.x": ("1", "2"),
        "a.z": ('{"k": 0}', "null"),
        "b": ('{"c": 1}', "(absent)"),
        "d": ("(absent)", "0"),
    }
    assert differing(one, one, one) == differing(one) == differing() == {}
