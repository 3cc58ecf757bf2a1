"""Recipes are sparse, named after what they do, in the lists, and small enough to try anywhere."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_like.config import compose
from nemo_like.config.grpo import GRPOTree
from nemo_like.config.megatron import MegatronConfig
from nemo_like.config.schema import defaults, known_paths
from nemo_like.config.sft import SFTTree
from nemo_like.config.tree import RunTree
from tools.suites import RECIPES, SUITES, read_suite, tiny_overrides, tree_of

ROOT = Path(__file__).parents[3]
NAMES = sorted(file.stem for file in RECIPES.glob("*.yaml"))
OF_GUIDES = {"dapo-qwen2.5-7b", "dapo-qwen2.5-7b.v2"}
"""Recipes whose names are older than the rule: guides know them."""
each_recipe = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def name_of(tree: RunTree) -> str:
    """What a recipe with this configuration is called."""
    policy, cluster = tree.policy, tree.cluster
    parts = [
        ("dapo" if tree.grpo.is_dapo else "grpo") if isinstance(tree, GRPOTree) else "sft",
        policy.model_name.rpartition("/")[2].lower(),
        f"{cluster.num_nodes}n{cluster.gpus_per_node}g",
        strategy_of(policy.backend),
    ]
    optimizer = policy.active_optimizer.optimizer
    parts += [] if optimizer == "adam" else [optimizer.replace("_", "")]
    if isinstance(tree, GRPOTree) and tree.grpo.async_grpo.enabled:
        parts.append("async")
    elif isinstance(tree, GRPOTree) and not tree.policy.generation.colocated.enabled:
        parts.append("noncolocated")
    return "-".join(parts)


def strategy_of(backend: Any) -> str:
    """The backend, and over how many ranks it shares out what; sizes of 1 are left out."""
    if not isinstance(backend, MegatronConfig):
        tensor = backend.tensor_parallel_size
        return "fsdp2" + (f"tp{tensor}" if tensor > 1 else "")
    sizes = {
        "tp": backend.tensor_model_parallel_size,
        "pp": backend.pipeline_model_parallel_size,
        "cp": backend.context_parallel_size,
        "ep": backend.expert_model_parallel_size,
    }
    return "megatron" + "".join(f"{kind}{size}" for kind, size in sizes.items() if size > 1)


def repeated(text: str, tree: type[RunTree], tmp_path: Path) -> list[str]:
    """Keys of a recipe whose value is what it inherits, or the default, anyway."""
    written = yaml.safe_load(text)
    files = written.pop("defaults")
    files = [f"/recipes/llm/{f}" if f in NAMES else f for f in files]  # from another folder now
    without = tmp_path / "without.yaml"
    without.write_text(yaml.safe_dump({"defaults": files}))
    schema = compose.Schema(known_paths(tree), defaults(tree))
    inherited = compose.apply(compose.read_files(without, ()), (), schema).values
    return list(same(written, [inherited, schema.defaults], ()))


def same(own: dict[str, Any], layers: list[Any], path: tuple[str, ...]) -> Iterator[str]:
    """The keys that have the value of the first layer that has them."""
    for key, value in own.items():
        below = [layer[key] for layer in layers if isinstance(layer, dict) and key in layer]
        if isinstance(value, dict):
            yield from same(value, below, (*path, key))
        elif below and below[0] == value:
            yield ".".join((*path, key))


def tree_type(name: str) -> type[RunTree]:
    return SFTTree if name.startswith("sft-") else GRPOTree


@each_recipe
def test_a_recipe_is_valid_and_named_after_what_it_does(name):
    tree = tree_of(name)
    assert name in OF_GUIDES or name_of(tree) == name


@each_recipe
def test_a_recipe_says_its_purpose_in_a_line_and_repeats_nothing_that_it_inherits(name, tmp_path):
    text = (RECIPES / f"{name}.yaml").read_text()
    package, purpose, then, *_ = text.splitlines()
    assert (package, purpose[:2], then) == ("# @package _global_", "# ", "defaults:")
    assert repeated(text, tree_type(name), tmp_path) == []


def test_a_value_that_is_inherited_or_the_default_is_found(tmp_path):
    text = """
defaults: [dapo-qwen2.5-7b, _self_]
grpo: {num_prompts_per_step: 512, seed: 42, val_period: 7}
policy: {generation: {vllm_cfg: {tensor_parallel_size: 2, precision: bfloat16}}}
"""
    assert repeated(text, GRPOTree, tmp_path) == [
        "grpo.num_prompts_per_step",
        "grpo.seed",
        "policy.generation.vllm_cfg.tensor_parallel_size",
    ]


@pytest.mark.parametrize(("suite", "form"), [("nightly", "tiny"), ("release", "full")])
def test_every_recipe_is_in_the_lists_once_with_a_limit(suite, form):
    lines = read_suite(SUITES / f"{suite}.txt")
    assert sorted(line.recipe for line in lines) == NAMES
    assert {line.form for line in lines} == {form}
    assert all(line.limits for line in lines)
    for line in lines:
        tree_of(line.recipe, *line.overrides)


def test_no_two_recipes_share_a_checkpoint_folder():
    names = [name for name in NAMES if not name.endswith(".v2")]  # the same run under another name
    folders = {tree_of(name).checkpointing.checkpoint_dir for name in names}
    assert len(folders) == len(names)


@each_recipe
def test_the_tiny_form_is_the_same_algorithm_optimizer_and_backend_on_few_processes(name):
    full, tiny = tree_of(name), tree_of(name, *tiny_overrides(name))
    assert tiny.training_cluster.world_size in (2, 4)
    assert tiny.policy.backend_key == full.policy.backend_key
    assert tiny.policy.active_optimizer.optimizer == full.policy.active_optimizer.optimizer
    kinds, kept = strategy_of(full.policy.backend), strategy_of(tiny.policy.backend)
    assert set(re.findall("[a-z]+", kept)) <= set(re.findall("[a-z]+", kinds))
    if isinstance(full, GRPOTree):
        assert tiny.grpo.is_dapo == full.grpo.is_dapo
        assert tiny.grpo.async_grpo.enabled == full.grpo.async_grpo.enabled
        assert tiny.policy.generation.backend == full.policy.generation.backend == "vllm"


def test_lists_and_recipes_are_read_without_torch():
    code = f"""
import sys
from tools.suites import tiny_overrides, tree_of
tree_of({NAMES[0]!r}, *tiny_overrides({NAMES[0]!r}))
assert not {{"torch", "ray", "vllm", "transformers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
