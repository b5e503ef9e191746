"""python -m pytest tests/test_structure.py"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import lmm_qa

PACKAGE = Path(lmm_qa.__file__).parent

ROWS = (
    {"errors", "atomic"},
    {"levels", "metrics", "config"},
    {"prompting", "face", "trace"},
    {"passage"},
    {"signs"},
    {"video", "degrade", "defects"},
    {"thqa", "manifest", "results", "reference", "explain", "evidence"},
    {"rater_file", "scores", "copies", "profile"},
    {"dataset"},
    {"recipe"},
    {"adapters", "backbone", "losses", "calibrate"},
    {"card", "rater"},
    {"features"},
    {"samples"},
    {"train", "publish"},
    {"evaluate", "preview", "submission"},
    {"cluster", "report"},
    {"cli", "web"},
    {"__init__", "__main__"},
)
"""The modules, bottom to top, those that are still to be written included. One imports only from rows below its own."""

ROW = {module: number for number, row in enumerate(ROWS) for module in row}
MODULES = sorted(file.stem for file in PACKAGE.glob("*.py"))


def imported(module: str) -> set[str]:
    """Modules of lmm_qa that a module imports, wherever in its code."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}.py:{node.lineno}: imports of ours are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("lmm_qa.")}
    return found


def test_every_module_has_its_row() -> None:
    assert set(MODULES) <= ROW.keys(), f"give {set(MODULES) - ROW.keys()} a row"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    upward = {name for name in imported(module) if ROW[name] >= ROW[module]}
    assert not upward, f"{module} imports {upward} from its own row or above"


def test_the_parser_sees_imports() -> None:
    assert {"config", "errors", "video", "backbone"} <= imported("rater")
    assert {"rater", "results", "manifest"} <= imported("cli")


def test_what_is_public_is_sorted_and_there() -> None:
    assert lmm_qa.__all__ == sorted(lmm_qa.__all__) == dir(lmm_qa)
    for name in lmm_qa.__all__:
        assert getattr(lmm_qa, name).__module__.startswith("lmm_qa.")
    with pytest.raises(AttributeError, match="module 'lmm_qa' has no attribute 'Reter'"):
        lmm_qa.Reter  # noqa: B018


def test_each_public_name_is_that_of_its_module() -> None:
    for name in lmm_qa.__all__:
        thing = getattr(lmm_qa, name)
        assert getattr(importlib.import_module(thing.__module__), name) is thing
