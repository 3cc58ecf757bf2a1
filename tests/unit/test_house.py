"""Habits that hide faults stay out of the package."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "nemo_like"
UNPICKLERS = {"torch.load", "pickle.load", "pickle.loads", "eval", "exec"}


def probes_for_a_capability(node: ast.AST) -> bool:
    """`hasattr` asks an object what it is, where a type should say it."""
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "hasattr"


def swallows_an_error(node: ast.AST) -> bool:
    """A handler of everything, or one that does nothing about what it caught."""
    return isinstance(node, ast.ExceptHandler) and (
        node.type is None or all(isinstance(line, ast.Pass) for line in node.body)
    )


def executes_what_it_reads(node: ast.AST) -> bool:
    """A pickle or text that becomes code: checkpoints, data and models' answers are not trusted."""
    return isinstance(node, ast.Call) and ast.unparse(node.func) in UNPICKLERS


def warns_and_goes_on(node: ast.AST) -> bool:
    """A run continues correctly or stops; a warning is neither."""
    return isinstance(node, ast.Call) and ast.unparse(node.func) in {
        "warnings.warn",
        "logging.warning",
        "logger.warning",
    }


def found(habit: Callable[[ast.AST], bool], tree: ast.AST) -> Iterator[int]:
    return (node.lineno for node in ast.walk(tree) if habit(node))


HABITS = {
    probes_for_a_capability: "hasattr(model, 'lm_head')",
    swallows_an_error: "try:\n    f()\nexcept OSError:\n    pass",
    executes_what_it_reads: "torch.load(path)",
    warns_and_goes_on: "warnings.warn('slow')",
}
each_habit = pytest.mark.parametrize("habit", HABITS, ids=lambda habit: habit.__name__)


@each_habit
def test_nothing_in_the_package(habit):
    places = [
        f"{path.relative_to(PACKAGE.parent)}:{line}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line in found(habit, ast.parse(path.read_text()))
    ]
    assert places == []


@each_habit
def test_the_habit_would_be_seen(habit):
    assert list(found(habit, ast.parse(HABITS[habit])))


def test_every_loss_names_its_source():
    without = [
        f"{path.name}: {node.name}"
        for path in sorted((PACKAGE / "losses").glob("*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and "Source:" not in (ast.get_docstring(node) or "")
    ]
    assert without == []
