"""Lists of recipes to run, and the tiny form of a recipe: nothing here starts anything.

A line of a list is a recipe, its form, the minutes it may take, and then any number of limits
(`metric<number`, `metric>number`) on final metrics and of overrides (`key=value`):

    grpo-qwen3-8b-1n8g-fsdp2tp2-muon  tiny  10  train/loss<1  grpo.max_num_steps=3
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from nemo_like.assets import bundled
from nemo_like.config.command_line import parse
from nemo_like.config.grpo import GRPOTree
from nemo_like.config.sft import SFTTree
from nemo_like.config.tree import RunTree
from nemo_like.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "configs/recipes/llm"
SUITES = ROOT / "tests/test_suites"
LAYOUT = (
    ("tensor_parallel_size", "tensor_model_parallel_size"),
    ("pipeline_model_parallel_size",),
    ("context_parallel_size",),
)
"""The kinds of sharing that ranks of one model do, in the order in which a tiny form keeps them."""
TINY_RANKS = 4
"""Most ranks of a tiny form: each is a process that imports torch."""
Form = Literal["tiny", "full"]


@dataclass(frozen=True)
class Limit:
    """What a final metric must be below, or above."""

    metric: str
    sign: str
    bound: float

    def failure(self, metrics: dict[str, float]) -> str | None:
        """What is wrong with these metrics, if anything is; NaN is within no limit."""
        found = metrics.get(self.metric)
        if found is None:
            return f"{self.metric} was never logged, expected {self.sign} {self.bound:g}"
        is_within = found < self.bound if self.sign == "<" else found > self.bound
        return (
            None if is_within else f"{self.metric} {found:g}, expected {self.sign} {self.bound:g}"
        )


@dataclass(frozen=True)
class Line:
    """One run of a list."""

    recipe: str
    form: Form
    minutes: float
    limits: tuple[Limit, ...] = ()
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """How results and baselines call it."""
        return f"{self.recipe} {self.form}"


def read_suite(path: Path) -> list[Line]:
    """The lines of a list; `#` begins a comment.

    Raises:
        ConfigError: a line does not have the form that the module tells, or names no recipe.
    """
    lines = []
    for number, text in enumerate(path.read_text().splitlines(), start=1):
        if words := text.partition("#")[0].split():
            try:
                lines.append(_line(words))
            except ValueError as error:
                raise ConfigError(f"{path}, line {number}: {error}") from error
    return lines


def _line(words: list[str]) -> Line:
    if len(words) < 3:
        raise ValueError(f"found {' '.join(words)!r}, expected recipe, form and minutes")
    recipe, form, minutes, *more = words
    if not (RECIPES / f"{recipe}.yaml").is_file():
        raise ValueError(f"no recipe {recipe!r} in configs/recipes/llm")
    if form not in ("tiny", "full"):
        raise ValueError(f"found the form {form!r}, expected tiny or full")
    limits, overrides = [], []
    for word in more:
        if match := re.fullmatch(r"([\w/]+)([<>])([\d.e+-]+)", word):
            limits.append(Limit(match[1], match[2], float(match[3])))
        elif "=" in word:
            overrides.append(word)
        else:
            raise ValueError(f"found {word!r}, expected metric<number, metric>number or key=value")
    return Line(recipe, form, float(minutes), tuple(limits), tuple(overrides))


def script_of(recipe: str) -> str:
    """The example that runs a recipe."""
    return "examples/run_sft.py" if recipe.startswith("sft-") else "examples/run_grpo.py"


@cache
def tree_of(recipe: str, *overrides: str) -> RunTree:
    """The whole configuration of a recipe."""
    tree = SFTTree if recipe.startswith("sft-") else GRPOTree
    file = RECIPES / f"{recipe}.yaml"
    return parse(["--config", str(file), *overrides], tree=tree, default_config=file).tree


def tiny_overrides(recipe: str) -> list[str]:
    """What turns a recipe into its tiny form: its group of settings, and a layout of few ranks.

    Each kind of parallelism that the recipe has is over two ranks, as long as there are enough.
    """
    tree = tree_of(recipe)
    block, backend = f"policy.{tree.policy.backend_key}", tree.policy.backend
    ranks, found = 1, []
    for name in (n for names in LAYOUT for n in names if getattr(backend, n, 1) > 1):
        size = 2 if ranks * 2 <= TINY_RANKS else 1
        ranks *= size
        found.append(f"{block}.{name}={size}")
        if name in LAYOUT[0] and backend.sequence_parallel:
            found.append(f"{block}.sequence_parallel=true")
    has_experts = _has_experts(tree.policy.model_name)
    if has_experts and getattr(backend, "expert_model_parallel_size", 1) > 1:
        found.append(f"{block}.expert_model_parallel_size=2")
    form = tree.algorithm + ("_moe" if has_experts else "")
    return [f"recipes/tiny={form}", *found, f"cluster.cpu_workers_per_node={max(ranks, 2)}"]


def _has_experts(model_name: str) -> bool:
    folder = bundled(model_name)
    assert folder is not None, f"bundle the config.json of {model_name}"
    return "num_experts" in json.loads((folder / "config.json").read_text())


def command(line: Line, folder: Path, *, more: tuple[str, ...] = ()) -> list[str]:
    """The command that runs a line, as it can be typed, with all that it writes in one folder."""
    form = tiny_overrides(line.recipe) if line.form == "tiny" else []
    return [
        sys.executable,
        script_of(line.recipe),
        "--config",
        f"recipes/llm/{line.recipe}.yaml",
        *form,
        *line.overrides,
        f"checkpointing.checkpoint_dir={folder / 'checkpoints'}",
        f"logger.log_dir={folder / 'logs'}",
        *more,
    ]
