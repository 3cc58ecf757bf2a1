from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest

from nemo_like.config import compose
from nemo_like.config.command_line import Invocation, parse
from nemo_like.config.grpo import GRPOTree
from nemo_like.config.sft import SFTTree
from nemo_like.errors import ConfigError

ROOT = Path(__file__).parents[3]
READ_FILES = compose.read_files
Parse = Callable[..., Invocation[SFTTree]]
ParseGRPO = Callable[..., Invocation[GRPOTree]]


@cache
def _read_from(_: Path, path: Path, groups: tuple[str, ...]) -> compose.Files:
    return READ_FILES(path, groups)


@pytest.fixture(autouse=True)
def _read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra, which takes most of a command line's time, reads each file of ours once per folder."""

    def read(path: Path, groups: Sequence[str]) -> compose.Files:
        if path.is_relative_to(compose.CONFIGS):
            return _read_from(Path.cwd(), path, tuple(groups))
        return READ_FILES(path, groups)

    monkeypatch.setattr(compose, "read_files", read)


@pytest.fixture
def sft(monkeypatch: pytest.MonkeyPatch) -> Parse:
    """What a command line of examples/run_sft.py means, typed in the repository's root."""
    monkeypatch.chdir(ROOT)
    return lambda *argv: parse(argv, tree=SFTTree, default_config=Path("configs/sft_tiny.yaml"))


@pytest.fixture
def grpo(monkeypatch: pytest.MonkeyPatch) -> ParseGRPO:
    """What a command line of examples/run_grpo.py means, typed in the repository's root."""
    monkeypatch.chdir(ROOT)
    return lambda *argv: parse(argv, tree=GRPOTree, default_config=Path("configs/grpo_math.yaml"))


@pytest.fixture
def refused(sft: Parse) -> Callable[..., str]:
    """The report with which a command line is refused."""
    return lambda *argv: _report(sft, argv)


@pytest.fixture
def grpo_refused(grpo: ParseGRPO) -> Callable[..., str]:
    """The same of examples/run_grpo.py."""
    return lambda *argv: _report(grpo, argv)


def _report(parse_them: Callable[..., object], argv: tuple[str, ...]) -> str:
    with pytest.raises(ConfigError) as error:
        parse_them(*argv)
    return str(error.value)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    """A config file with this text."""

    def config(text: str) -> str:
        path = tmp_path / "written.yaml"
        path.write_text(text)
        return str(path)

    return config
