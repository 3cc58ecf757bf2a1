from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_like.config.command_line import Invocation, parse
from nemo_like.config.sft import SFTTree
from nemo_like.errors import ConfigError

ROOT = Path(__file__).parents[3]
Parse = Callable[..., Invocation[SFTTree]]


@pytest.fixture
def sft(monkeypatch: pytest.MonkeyPatch) -> Parse:
    """What a command line of examples/run_sft.py means, typed in the repository's root."""
    monkeypatch.chdir(ROOT)
    return lambda *argv: parse(argv, tree=SFTTree, default_config=Path("configs/sft_tiny.yaml"))


@pytest.fixture
def refused(sft: Parse) -> Callable[..., str]:
    """The report with which a command line is refused."""

    def report(*argv: str) -> str:
        with pytest.raises(ConfigError) as error:
            sft(*argv)
        return str(error.value)

    return report


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    """A config file with this text."""

    def config(text: str) -> str:
        path = tmp_path / "written.yaml"
        path.write_text(text)
        return str(path)

    return config
