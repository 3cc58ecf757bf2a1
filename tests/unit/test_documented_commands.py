"""What the documents tell a reader to type is a command: files, options and overrides are right."""

from __future__ import annotations

import ast
import importlib.util
import runpy
import sys
import tomllib

import pytest

from tests.documents import ROOT, blocks

COMMANDS = list({(c.program, c.arguments): c for *_, some in blocks() for c in some}.values())
EXAMPLES = [c for c in COMMANDS if c.program.startswith("examples/")]
TOOLS = [c for c in COMMANDS if c.program.startswith("tools/")]
OTHERS = [c for c in COMMANDS if c not in (*EXAMPLES, *TOOLS)]
GROUPS = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture
def at_the_reader(tmp_path, monkeypatch):
    """A folder with the files that the documents speak of as the reader's own."""
    (tmp_path / "mine.yaml").write_text("policy: {tokenizer: {name: tiny-qwen3}}\n")
    (tmp_path / "my").mkdir()
    for name in ("train.jsonl", "test.jsonl", "my/train.jsonl", "train.parquet", "test.parquet"):
        (tmp_path / name).touch()
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


@pytest.mark.parametrize("command", EXAMPLES, ids=str)
def test_the_configuration_of_a_run_composes_and_validates(
    command, at_the_reader, monkeypatch, capsys
):
    argv = [command.program, *command.arguments, "--print-config"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / command.program), run_name="__main__")
    assert ended.value.code == command.exit_code, capsys.readouterr().err


@pytest.mark.parametrize("command", TOOLS, ids=str)
def test_a_tool_has_the_options_that_are_typed(command):
    tool = ast.parse((ROOT / command.program).read_text())
    texts = {n.value for n in ast.walk(tool) if isinstance(n, ast.Constant)} | {"--help"}
    assert {word for word in command.arguments if word.startswith("-")} <= texts
    if "add_parser" in ast.unparse(tool):
        assert command.arguments[0] in texts


@pytest.mark.parametrize(
    "command", [c for c in TOOLS if c.program == "tools/config_cli.py"], ids=str
)
def test_what_is_asked_of_configurations_has_an_answer(command, at_the_reader, capsys):
    if command.arguments[0] == "import":
        pytest.skip("the recipe is the reader's")
    main = runpy.run_path(str(ROOT / command.program))["main"]
    assert main(command.arguments) in (0, 1), capsys.readouterr().err


@pytest.mark.parametrize("command", OTHERS, ids=str)
def test_what_is_not_ours_is_there(command):
    match command.program, command.arguments:
        case "pytest", arguments:
            paths = [word for word in arguments if "/" in word]
            assert [path for path in paths if not (ROOT / path).exists()] == []
        case "python", ("-m", module, *_):
            assert importlib.util.find_spec(module)
        case program, _:
            assert program in ("mkdocs", "pre-commit", "wandb")


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_what_uv_is_asked_to_add_is_in_pyproject(command):
    options = dict(zip(command.uv_options, command.uv_options[1:], strict=False))
    assert options.get("--extra", "vllm") in GROUPS["project"]["optional-dependencies"]
    assert options.get("--only-group", "docs") in GROUPS["dependency-groups"]


def test_commands_are_found_on_the_pages():
    assert len(EXAMPLES) > 30 and len(TOOLS) > 15
