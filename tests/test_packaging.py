"""python -m pytest tests/test_packaging.py"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from paths import EMBEDDED, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

PLACES = {"lmm_qa": "lmm_qa", "prompts": "lmm_qa/prompt_files", "configs": "lmm_qa/config_files"}
"""Folder of the repository: its place in an installation."""

LIST_DATA = """
import json
from importlib.resources import files

def below(place, inside=""):
    for entry in place.iterdir():
        name = inside + entry.name
        yield from below(entry, name + "/") if entry.is_dir() else [name]

for package in ("lmm_qa", "lmm_qa.prompt_files", "lmm_qa.config_files"):
    print(json.dumps([package, str(files(package)), sorted(below(files(package)))]))
"""


def shipped() -> set[str]:
    """What an installation holds: every file of the three folders, whatever its suffix."""
    return {
        f"{place}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, place in PLACES.items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and not file.name.startswith(".")
    }


def python(*arguments: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run this interpreter in `cwd`, with `path` as the only addition to its own packages."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources so that no earlier build can lend it a file."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in PLACES:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    built = python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source), cwd=out)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    done = python("-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel), cwd=target)
    assert done.returncode == 0, done.stderr
    return target


def test_the_wheel_holds_the_code_and_its_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    assert {name for name in held if ".dist-info/" not in name} == shipped()
    assert any(name.endswith("/licenses/LICENSE") for name in held)


def test_the_wheel_is_small_enough_to_be_sent_around(wheel: Path) -> None:
    assert wheel.stat().st_size < 60e6


def test_an_installed_wheel_finds_its_data_from_anywhere(installed: Path, tmp_path: Path) -> None:
    listed = python("-c", LIST_DATA, cwd=tmp_path, path=installed)
    assert listed.returncode == 0, listed.stderr
    found = set()
    for package, place, files in map(json.loads, listed.stdout.splitlines()):
        assert Path(place).is_relative_to(installed)
        found |= {f"{package.replace('.', '/')}/{file}" for file in files}
    assert shipped() <= found
    assert "lmm_qa/samples/astronaut_clean.mp4" in found


@pytest.mark.skipif(importlib.util.find_spec("lmm_qa.prompt_files") is None, reason="lmm_qa is not installed here")
def test_an_editable_install_finds_the_files_of_the_repository(tmp_path: Path) -> None:
    listed = python("-c", LIST_DATA, cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    places = {package: Path(place) for package, place, _ in map(json.loads, listed.stdout.splitlines())}
    if places["lmm_qa"] != ROOT / "lmm_qa":
        pytest.skip(f"what is installed is not this checkout but {places['lmm_qa']}")
    assert places["lmm_qa.prompt_files"] == ROOT / "prompts"
    assert places["lmm_qa.config_files"] == ROOT / "configs"


@pytest.mark.slow
@pytest.mark.skipif(not any(EMBEDDED.rglob("*.safetensors")), reason=f"no embedded model at {EMBEDDED}")
def test_an_installed_wheel_rates_a_clip_from_anywhere(installed: Path, tmp_path: Path) -> None:
    clip = installed / "lmm_qa" / "samples" / "astronaut_clean.mp4"
    rated = python("-m", "lmm_qa", "rate", str(clip), cwd=tmp_path, path=installed)
    assert rated.returncode == 0, rated.stderr
    (row,) = map(json.loads, rated.stdout.splitlines())
    low, high = row["scale"]
    assert row["clip"] == clip.as_posix()
    assert row["error"] is None
    assert low <= row["score"] <= high
    assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    assert os.listdir(tmp_path) == []


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    entries = [line for line in lines if line.strip() and not line.startswith("#")]
    wrong = [line for line in entries if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line)]
    assert not wrong, f"not of the form name==version: {wrong}"
    return {canonicalize_name(line.split("==")[0]): Version(line.split("==")[1]) for line in entries}


def requirements() -> list[Requirement]:
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    return [Requirement(line) for line in (*PROJECT["dependencies"], *extras)]


def test_each_pin_is_one_version_named_once() -> None:
    entries = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line]
    assert len(pins()) == len(entries) > 50


def test_the_ranges_of_the_project_admit_the_pins() -> None:
    pinned = pins()
    for requirement in requirements():
        if requirement.name != PROJECT["name"]:
            assert requirement.specifier, f"{requirement.name} has no range"
            assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, str(requirement)


def test_libraries_whose_interfaces_change_have_an_upper_bound() -> None:
    """`lmm_qa.model.compat` is written for these versions."""
    for name in ("transformers", "peft", "accelerate", "bitsandbytes"):
        (requirement,) = (each for each in requirements() if each.name == name)
        following = pins()[name].major + 1
        assert Version(f"{following}.0") not in requirement.specifier, str(requirement)


def test_the_newest_versions_are_tested_without_pins() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "newest.yml").read_text(encoding="utf-8"))
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert not any("constraints" in command for command in commands)
    fast = re.search(r"^test-fast:.*\n\t\$\(BIN\)/(.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert fast is not None and commands[-1] == fast[1]


def test_this_python_is_one_that_the_project_supports() -> None:
    supported = SpecifierSet(PROJECT["requires-python"])
    assert Version(".".join(map(str, sys.version_info[:3]))) in supported
    assert Version("3.11") in supported
