"""The tiny form lies over recipes that were imported, whatever they say of their own world."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_like.config.command_line import parse
from nemo_like.config.grpo import GRPOTree
from nemo_like.config.layers import as_yaml
from nemo_like.config.tree import RunTree
from nemo_like.plan.dry_run import dry_run_grpo, dry_run_sft
from tools.migrate import migrate

THEIRS = Path(__file__).with_name("theirs")
MEGATRON = "policy: {dtensor_cfg: {enabled: false}, megatron_cfg: {enabled: true}}"
DTENSOR = "policy: {dtensor_cfg: {enabled: true}, megatron_cfg: {enabled: false}}"


def tiny(algorithm: str, backend: str, folder: Path) -> RunTree:
    """The tiny form of a recipe of theirs."""
    recipe, ours = folder / "recipe.yaml", folder / "ours.yaml"
    recipe.write_text(f"defaults: {THEIRS / algorithm}.yaml\n{backend}\n")
    done = migrate(recipe)
    ours.write_text(as_yaml(done.values))
    argv = ["--config", str(ours), f"recipes/tiny={algorithm}"]
    return parse(argv, tree=done.tree, default_config=ours).tree


@pytest.mark.parametrize("backend", [DTENSOR, MEGATRON], ids=["dtensor", "megatron"])
@pytest.mark.parametrize("algorithm", ["sft", "grpo"])
def test_an_imported_recipe_has_a_tiny_form_that_touches_nothing_of_the_real_run(
    algorithm, backend, tmp_path
):
    tree = tiny(algorithm, backend, tmp_path)
    assert tree.policy.megatron_cfg.enabled == (backend == MEGATRON)
    assert (tree.policy.model_name, tree.training_cluster.world_size) == ("tiny-qwen3", 1)
    assert all(source.is_bundled for source in tree.data.sources().values())
    assert all(tree.data.judge(source) == "arithmetic" for source in tree.data.sources().values())
    assert tree.checkpointing.checkpoint_dir.startswith("results/ours-")
    log = tree.logger
    assert not (log.wandb_enabled or log.mlflow_enabled or log.tensorboard.log_dir)
    if isinstance(tree, GRPOTree):
        assert tree.grpo.is_dapo and tree.policy.generation.stop_token_ids is None


@pytest.mark.parametrize(
    ("algorithm", "backend", "dry_run"),
    [("sft", MEGATRON, dry_run_sft), ("grpo", DTENSOR, dry_run_grpo)],
    ids=["sft", "grpo"],
)
def test_the_tiny_form_of_an_imported_recipe_can_be_planned(algorithm, backend, dry_run, tmp_path):
    assert dry_run(tiny(algorithm, backend, tmp_path)) == 0
