"""python -m pytest tests/test_docs.py

`make docs` checks the links inside the site; here: what lies outside it, and that the generated pages are current.
"""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from paths import ROOT, SCRIPTS

OUTSIDE_THE_SITE = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")


@pytest.mark.parametrize("name", OUTSIDE_THE_SITE)
def test_relative_links_lead_to_files(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_generated_pages_are_current() -> None:
    command = [sys.executable, str(SCRIPTS / "generate_docs.py"), "--check"]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_the_reference_has_every_command() -> None:
    from typer.main import get_command

    from lmm_qa.cli.app import app

    documented = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    commands = get_command(app).commands  # type: ignore[attr-defined]  # a group
    assert [name for name in commands if f"## `lmm-qa {name}`" not in documented] == []
