"""The import table of docs/architecture.md, held by reading the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "nemo_like"

FOUNDATION = {"errors", "types", "config"}
VERBS = {"ops", "optim", "observability", "weight_sync", "interfaces"}
PARTS = {"losses", "data", "environments", "rollout", "checkpoint"}
DOOR = {"run", "plan"}
EVERYTHING = FOUNDATION | VERBS | PARTS | DOOR | {"algorithms", "backends", "cluster", "assets"}

MAY_IMPORT: dict[str, set[str]] = {
    "": set(),  # nemo_like/__init__.py
    "assets": {"errors"},
    "errors": set(),
    "types": {"errors"},
    "config": {"errors", "assets"},  # not `types`, which imports torch
    "interfaces": FOUNDATION,
    **dict.fromkeys(VERBS - {"interfaces"}, FOUNDATION | {"interfaces"}),
    **dict.fromkeys(PARTS, FOUNDATION | VERBS | {"assets"}),
    "algorithms": FOUNDATION | VERBS | PARTS,
    "backends": FOUNDATION | VERBS | PARTS | {"assets"},
    # Place knows its sizes (config) and how the metrics of many ranks become one (observability).
    "cluster": FOUNDATION | {"interfaces", "observability", "weight_sync", "data"},
    **dict.fromkeys(DOOR, EVERYTHING),
    "__main__": {"run"},
}
"""What each part of the package may import besides itself."""

BANNED: dict[str, set[str]] = {
    "config": {"torch", "ray", "vllm", "transformers", "megatron"},
    "algorithms": {"ray", "vllm", "megatron", "transformers", "torch.distributed"},
}
"""Further packages that a part must not import, under the homes of `HOMES`."""

HOMES: dict[str, tuple[str, ...]] = {
    "ray": ("cluster/",),
    "vllm": ("rollout/vllm",),
    "megatron": ("backends/megatron/",),
    "hydra": ("config/compose.py",),
    "omegaconf": ("config/compose.py", "config/layers.py"),
    "wandb": ("observability/sinks",),
    "mlflow": ("observability/sinks",),
    "tensorboard": ("observability/sinks",),
    "torch.utils.tensorboard": ("observability/sinks",),
    "matplotlib": ("observability/",),
    "datasets": ("data/",),
    "math_verify": ("environments/",),
}
"""The one place of each heavy dependency: paths start with one of these."""

VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "managers"}


@dataclass(frozen=True)
class Import:
    """`path` (relative to the package), at `line`, imports `target` (dotted)."""

    path: str
    line: int
    target: str

    @property
    def part(self) -> str:
        return part_of(self.path.removesuffix(".py").replace("/", "."))

    def __str__(self) -> str:
        return f"{PACKAGE}/{self.path}:{self.line} imports {self.target}"


def part_of(module: str) -> str:
    """The part of the package that a module, named from inside the package, is in."""
    return module.split(".")[0].removesuffix("__init__")


def within(target: str, package: str) -> bool:
    return target == package or target.startswith(package + ".")


def imports_of(path: str, source: str) -> Iterator[Import]:
    """Every import of a file: at the top, in functions, for types alone, and by `import_module`."""
    package = [PACKAGE, *Path(path).parent.parts]
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                targets = [name.name for name in names]
            case ast.ImportFrom(module=module, names=names, level=level):
                base = package[: len(package) - level + 1] if level else []
                prefix = ".".join([*base, *([module] if module else [])])
                targets = [f"{prefix}.{name.name}" for name in names]
            case ast.Call(
                func=ast.Attribute(attr="import_module")
                | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                targets = [name]
            case _:
                continue
        yield from (Import(path, node.lineno, target) for target in targets)


def sources() -> dict[str, str]:
    folder = ROOT / PACKAGE
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*.py"))}


def all_imports() -> list[Import]:
    return [i for path, source in sources().items() for i in imports_of(path, source)]


def internal_target(imported: Import) -> str | None:
    """The imported module as named from inside the package, or None if it is not ours."""
    if not within(imported.target, PACKAGE):
        return None
    return imported.target.removeprefix(PACKAGE).removeprefix(".")


def layer_violations(imports: list[Import]) -> list[str]:
    found = []
    for imported in imports:
        target = internal_target(imported)
        if target is None or part_of(target) == imported.part:
            continue
        if part_of(target) not in MAY_IMPORT[imported.part]:
            allowed = ", ".join(sorted(MAY_IMPORT[imported.part])) or "nothing of ours"
            found.append(f"{imported}; {imported.part} may import {allowed}")
    return found


def banned_violations(imports: list[Import]) -> list[str]:
    return [
        f"{imported}; {imported.part} must not"
        for imported in imports
        for package in BANNED.get(imported.part, ())
        if within(imported.target, package)
    ]


def home_violations(imports: list[Import]) -> list[str]:
    return [
        f"{imported}; the home of {package} is {' or '.join(homes)}"
        for imported in imports
        for package, homes in HOMES.items()
        if within(imported.target, package) and not imported.path.startswith(homes)
    ]


def circle(imports: list[Import], paths: set[str]) -> list[str]:
    """The modules of one import circle, or nothing."""
    module_of = {
        path: path.removesuffix(".py").replace("/", ".").removesuffix("__init__").removesuffix(".")
        for path in paths
    }
    modules = set(module_of.values())
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for imported in imports:
        target = internal_target(imported)
        while target and target not in modules:  # `from package.module import name`
            target = target.rpartition(".")[0]
        if target and target != module_of[imported.path]:
            graph[module_of[imported.path]].add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_every_part_imports_only_the_layers_below_it():
    assert "\n".join(layer_violations(all_imports())) == ""


def test_config_and_algorithms_stay_free_of_the_machinery():
    assert "\n".join(banned_violations(all_imports())) == ""


def test_every_heavy_dependency_has_one_home():
    assert "\n".join(home_violations(all_imports())) == ""


def test_no_imports_go_in_a_circle():
    assert " -> ".join(circle(all_imports(), set(sources()))) == ""


def test_every_part_of_the_package_has_a_row_in_the_table():
    parts = {Import(path, 0, "").part for path in sources()}
    assert parts - MAY_IMPORT.keys() == set()


def test_no_file_is_named_after_nothing_in_particular():
    names = {
        str(p.relative_to(ROOT))
        for folder in (PACKAGE, "tests", "tools", "examples")
        for p in (ROOT / folder).rglob("*.py")
        if VAGUE_NAMES & {p.stem, *p.relative_to(ROOT).parts}
    }
    assert names == set()


@pytest.mark.parametrize(
    ("path", "source", "judge"),
    [
        ("rollout/x.py", "from nemo_like.data import chat", layer_violations),
        ("rollout/x.py", "def f():\n    import nemo_like.data.chat", layer_violations),
        ("ops/x.py", "from nemo_like import losses", layer_violations),
        ("ops/x.py", "from ..losses.nll import NLL", layer_violations),
        ("losses/__init__.py", "from ..backends import base", layer_violations),
        ("errors.py", "from nemo_like.types import Metric", layer_violations),
        ("config/x.py", "from nemo_like.types import Metric", layer_violations),
        ("backends/dtensor/x.py", "import nemo_like.run.main", layer_violations),
        ("cluster/x.py", "from nemo_like.backends.base import shard", layer_violations),
        ("__init__.py", "from nemo_like.errors import ConfigError", layer_violations),
        ("config/x.py", "import torch.nn", banned_violations),
        ("algorithms/x.py", "import torch.distributed as dist", banned_violations),
        ("algorithms/x.py", "from torch import distributed", banned_violations),
        ("algorithms/x.py", "import importlib\nimportlib.import_module('ray')", banned_violations),
        ("backends/base.py", "if TYPE_CHECKING:\n    import ray", home_violations),
        ("rollout/hf.py", "from vllm import LLM", home_violations),
        ("config/base.py", "from hydra.core import config_store", home_violations),
        ("backends/dtensor/x.py", "from megatron.core import parallel_state", home_violations),
    ],
)
def test_a_forbidden_import_is_seen_in_whatever_form(path, source, judge):
    assert len(judge(list(imports_of(path, source)))) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("algorithms/x.py", "from nemo_like.interfaces import Policy\nimport torch"),
        ("optim/x.py", "from .newton_schulz import orthogonalize\nfrom nemo_like import errors"),
        ("config/compose.py", "from hydra import compose"),
        ("rollout/vllm_extension.py", "import vllm"),
        ("data/x.py", "import datasets\nimport nemo_like.errors"),
        ("run/main.py", "from nemo_like.cluster.policy import RemotePolicy"),
    ],
)
def test_an_allowed_import_is_let_through(path, source):
    imports = list(imports_of(path, source))
    assert imports
    for judge in (layer_violations, banned_violations, home_violations):
        assert judge(imports) == []


def test_a_circle_is_found_and_named():
    files = {
        "ops/a.py": "from nemo_like.ops.b import f",
        "ops/b.py": "from nemo_like.ops import c",
        "ops/c.py": "def g():\n    from .a import f",
        "ops/__init__.py": "",
    }
    imports = [i for path, source in files.items() for i in imports_of(path, source)]
    assert set(circle(imports, set(files))) == {"ops.a", "ops.b", "ops.c"}
    assert circle([i for i in imports if i.path != "ops/c.py"], set(files)) == []
