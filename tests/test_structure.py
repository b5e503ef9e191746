"""python -m pytest tests/test_structure.py"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import PACKAGE

import lmm_qa

LAYERS = (
    ("errors",),
    ("config", "files"),
    ("manifest", "video"),
    ("model",),
    ("defects",),
    ("degrade",),
    ("ratings",),
    ("evaluation",),
    ("rater",),
    ("distributed", "metric", "training"),
    ("web",),
    ("cli",),
    ("__init__", "__main__"),
)
"""Packages and top-level modules, bottom to top. Each imports only from layers below its own."""

LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def member(file: Path) -> str:
    """The package or top-level module that a file belongs to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(file: Path) -> Iterator[str]:
    """Packages and top-level modules of lmm_qa that a file imports, wherever in its code."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: our own imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("lmm_qa."):
                yield name.split(".")[1]


def test_the_top_of_the_package_is_small() -> None:
    entries = [entry.name for entry in PACKAGE.iterdir() if entry.name != "__pycache__"]
    assert len(entries) <= 20, sorted(entries)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    own = member(file)
    assert own in LAYER, f"{own} has no layer: add it to LAYERS"
    upward = {name for name in imported(file) if name in LAYER and name != own and LAYER[name] >= LAYER[own]}
    assert not upward, f"{file} imports {upward} from its own layer or above"


def test_the_parser_sees_imports() -> None:
    assert {"defects", "errors", "video", "model"} <= set(imported(PACKAGE / "rater.py"))


def test_public_names_are_sorted_and_importable() -> None:
    assert lmm_qa.__all__ == sorted(lmm_qa.__all__) == dir(lmm_qa)
    for name in lmm_qa.__all__:
        thing = getattr(lmm_qa, name)
        assert getattr(importlib.import_module(thing.__module__), name) is thing
    with pytest.raises(AttributeError, match="module 'lmm_qa' has no attribute 'Reter'"):
        lmm_qa.Reter  # noqa: B018
