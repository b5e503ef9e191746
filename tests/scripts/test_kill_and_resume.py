"""python -m pytest tests/scripts/test_kill_and_resume.py

A short run of `scripts/kill_and_resume.py`, and what its checks detect.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from paths import SCRIPTS

from lmm_qa.tables import write_rows

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL"),
    pytest.mark.timeout(900),  # half a minute, and five times that on a busy machine
]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import kill_and_resume

    return kill_and_resume


@pytest.mark.slow
def test_a_killed_run_resumes_without_loss(script: Any, tmp_path: Path) -> None:
    first, *kills, last = script.kill_repeatedly(tmp_path, kills=1, clips=8, seed=0)
    assert first.startswith("undisturbed: 8 clips")
    assert kills and all("kill" in line or "complete" in line for line in kills)
    assert last.startswith("complete: 8 rows, as undisturbed")


def test_rows_may_differ_only_in_the_time_spent(script: Any) -> None:
    row = {"clip": "a", "score": 3.0, "error": None, "seconds": 1.0, "video": {"fps": 25.0, "frames": 100}}
    assert script.differences(row, row | {"seconds": 2.0, "score": 3.00001}) == []
    assert script.differences(row, row | {"score": 3.001}) == ["score"]
    assert script.differences(row, row | {"video": {"fps": 25.0, "frames": 99}}) == ["video"]
    assert script.differences(row, row | {"score": None}) == ["score"]
    assert script.differences(row, row | {"new": 1}) == ["new"]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_duplicate_rows_are_detected(script: Any, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"ratings{suffix}"
    rows = [{"clip": clip, "content_id": clip, "rater_id": "r", "score": 1.0} for clip in ("a", "b")]
    write_rows(path, rows)
    assert list(script.stored(path)) == ["a", "b"]
    write_rows(path, [*rows, rows[0]])
    with pytest.raises(AssertionError, match="two rows of a clip"):
        script.stored(path)


@pytest.mark.parametrize("alone", [True, False])
def test_a_process_that_outlives_the_command_is_detected(script: Any, tmp_path: Path, alone: bool) -> None:
    """A child in the same group dies with the group, not with its parent."""
    child = "import time; time.sleep(3)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    arguments = [sys.executable, "-c", parent], tmp_path / "none.jsonl", 0, 1.0, alone
    with pytest.raises(AssertionError, match="outlived the command") if alone else nullcontext():
        assert script.kill(*arguments, wait=0.5)


def test_a_command_that_fails_is_detected(script: Any, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="broken"):
        script.kill([sys.executable, "-c", "raise SystemExit('broken')"], tmp_path / "none.jsonl", 1, 5.0, False)
    assert not script.kill([sys.executable, "-c", ""], tmp_path / "none.jsonl", 1, 5.0, False)
