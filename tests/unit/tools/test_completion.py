"""What is typed into a real shell, with a tab, arrives as the words that were meant."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import runpy
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

TOOL = runpy.run_path(str(Path(__file__).parents[3] / "tools/completion.py"))
ECHO = 'uv() { echo GOT "$@" END; }\n'
SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], ECHO),
    "zsh": (["zsh", "-f", "-i"], ECHO),
    "fish": (["fish", "--no-config", "-i"], "function uv; echo GOT $argv END; end\n"),
}
SFT, GRPO = "uv run examples/run_sft.py ", "uv run examples/run_grpo_math.py "
each_shell = pytest.mark.parametrize(
    "shell",
    [
        pytest.param(name, marks=[] if shutil.which(name) else pytest.mark.skip(f"no {name} here"))
        for name in SHELLS
    ],
)


def script_of(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert TOOL["main"]([shell]) == 0
    return capsys.readouterr().out


def typed(shell: str, script: str, lines: Iterable[str], folder: Path) -> list[str]:
    """What `uv` gets when these lines are typed at a terminal; `\\t` is the tab key."""
    argv, echo = SHELLS[shell]
    (folder / "script").write_text(f"{echo}{script}\n")
    keys = "\n".join([f"source {folder}/script", *lines, "exit\n"])
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "TERM": "xterm", "PS1": "$ "}
    terminal, end = pty.openpty()
    own_terminal = ["setsid", "--ctty", "--wait", *argv]
    with subprocess.Popen(
        own_terminal, stdin=end, stdout=end, stderr=end, cwd=folder, env=environment
    ):
        os.close(end)
        os.write(terminal, keys.encode())
        said = b""
        with contextlib.suppress(OSError):  # which is how a terminal says that nobody is there
            while part := os.read(terminal, 4096):
                said += part
    os.close(terminal)
    return re.findall(r"GOT (.*?) END", said.decode(errors="replace"))


@each_shell
def test_a_tab_completes_keys_level_by_level_and_their_values(shell, tmp_path, capsys):
    (tmp_path / "some_file").touch()
    meant = {
        f"{SFT}sft.max_num_s\t5": f"{SFT}sft.max_num_steps=5",
        f"{SFT}pol\topt\toptimizer=m\t": f"{SFT}policy.optimizer.optimizer=muon",
        f"{SFT}--dry\t ++cluster.lau\tloc\t": f"{SFT}--dry-run ++cluster.launcher=local",
        f"{SFT}policy/\tmu\t": f"{SFT}policy/optimizer=muon",
        f"{SFT}checkpointing.start_from=./so\t": f"{SFT}checkpointing.start_from=./some_file",
        f"{GRPO}grpo.num_prom\t4": f"{GRPO}grpo.num_prompts_per_step=4",
    }
    got = typed(shell, script_of(shell, capsys), meant, tmp_path)
    assert [f"uv {words}" for words in got] == list(meant.values())


@each_shell
def test_other_commands_are_completed_as_before(shell, tmp_path, capsys):
    ready = "autoload -Uz compinit && compinit -u\n"
    before = {
        "bash": "_old() { COMPREPLY=(python); }; complete -F _old uv\n",
        "zsh": f"{ready}_old() {{ compadd python; }}; compdef _old uv\n",
        "fish": "complete -c uv -a python\n",
    }
    script = before[shell] + script_of(shell, capsys)
    assert typed(shell, script, ["uv pyth\t"], tmp_path) == ["python"]


def test_several_candidates_are_listed_as_bash_cuts_words(tmp_path, capsys):
    (tmp_path / "script").write_text(script_of("bash", capsys))
    asked = """
        source ./script; line() { COMP_LINE=$1 COMP_POINT=${#1}; COMPREPLY=(); _nemo_like uv; }
        line 'uv run examples/run_sft.py policy.optimizer.optimizer='; echo "${COMPREPLY[*]}"
        line 'uv run examples/run_sft.py grpo.'; echo "${COMPREPLY[*]}"
        line 'uv run examples/run_sft.py sft.val_at'; echo "${COMPREPLY[*]}"
        line 'uv run examples/run_sft.py --config co'; echo "${COMPREPLY[*]}"
    """
    argv = ["bash", "--norc", "-c", asked]
    said = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == [
        "adam sgd muon dist_muon", "", "sft.val_at_start= sft.val_at_end=", "",
    ]  # fmt: skip


def test_every_key_that_can_be_listed_is_there_with_its_values():
    found = [line.split("\t") for line in TOOL["lines"]()]
    values = {(word, kind): listed.split() for word, listed, kind in found}
    assert values["cluster.gpus_per_node=", ""] == ["auto"]
    assert values["policy.dtensor_cfg.enabled=", ""] == ["true", "false"]
    assert "h100-80gb" in values["--device=", ""]
    assert values["recipes/tiny=", "sft"] == ["sft", "sft_moe"]
    assert values["policy.optimizer.optimizer=", ""][:3] == ["adam", "sgd", "muon"]
    assert ("grpo.num_prompts_per_step=", "grpo") in values and ("sft.seed=", "sft") in values
