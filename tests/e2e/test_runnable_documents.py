"""Blocks of the documents that are marked runnable do what they are there for, as they stand."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.documents import ROOT, blocks

BLOCKS = {f"{page}: {some[0].text}": some for page, runnable, some in blocks() if runnable}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("commands", BLOCKS.values(), ids=BLOCKS)
def test_every_command_ends_as_its_page_says(commands, tmp_path, vllm_installed):
    for name in ("examples", "configs", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    for command in commands:
        ended = subprocess.run(
            [sys.executable, command.program, *command.arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert ended.returncode == command.exit_code, f"{command}\n{ended.stdout}\n{ended.stderr}"
        if command.output:
            (tmp_path / command.output).write_text(ended.stdout)
