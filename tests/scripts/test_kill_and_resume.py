"""python -m pytest tests/scripts/test_kill_and_resume.py

A short run of `scripts/kill_and_resume.py`, and what its checks detect.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from paths import SCRIPTS

from lmm_qa.files.tables import write_rows

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL"),
    pytest.mark.timeout(900),  # half a minute, and five times that on a busy machine
]


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        import kill_and_resume

        yield kill_and_resume


@pytest.fixture(scope="module")
def experiment(script: Any, family_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Six clips, and the rows of an undisturbed run of a small model on small pictures."""
    options = ("-m", family_dir("qwen2_vl"), "--sampling", "uniform:2", "--view", "whole:56")
    return script.Experiment(tmp_path_factory.mktemp("experiment"), clips=6, seed=0, options=options)


@pytest.mark.slow
@pytest.mark.parametrize(("signal", "suffix"), [("SIGKILL", ".parquet"), ("SIGTERM", ".csv"), ("SIGPIPE", ".jsonl")])
def test_a_killed_run_resumes_without_loss(experiment: Any, signal: str, suffix: str) -> None:
    """`Experiment.run` checks rows and leftovers of each kill, and the file at the end."""
    kills = list(experiment.run(signal, suffix, ["decoding", "writing"]))
    assert [kill.problem for kill in kills] == [None, None]
    # A run whose output nobody reads any more may complete before it writes to it again.
    assert [kill.rows for kill in kills] in ([[0, 6], [6, 6]] if signal == "SIGPIPE" else [[0, 6]])


def test_the_table_counts_kills_without_a_problem(script: Any) -> None:
    kills = [
        script.Kill("SIGTERM", ".csv", "start", False, -15, 0.25, 0),
        script.Kill("SIGTERM", ".csv", "writing", True, 143, 1.5, 8, "files left"),
        script.Kill("SIGTERM", ".jsonl", "writing", True, 143, 0.5, 8),
    ]
    header, _, row = script.kill_table([asdict(kill) for kill in kills]).splitlines()
    assert header == "| signal | .csv | .jsonl | exit codes | until all processes had ended, at most |"
    assert row == "| SIGTERM | 1 of 2 | 1 of 1 | -15, 143 | 1.5 s |"


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


@pytest.mark.parametrize("group", [True, False])
def test_a_process_that_outlives_the_command_is_detected(script: Any, group: bool) -> None:
    """A child in the same group dies with the group, not with its parent."""
    child = "import time; time.sleep(3)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    arguments = [sys.executable, "-c", parent], "SIGKILL", group, lambda process: process.children()
    with nullcontext() if group else pytest.raises(AssertionError, match="outlived the command"):
        code, seconds = script.kill(*arguments, wait=0.5)
        assert code == -9 and seconds < 0.5


def test_a_command_that_ends_before_it_is_killed_is_detected(script: Any) -> None:
    with pytest.raises(AssertionError, match="broken"):
        script.kill([sys.executable, "-c", "raise SystemExit('broken')"], "SIGTERM", False, lambda _: False)
    assert script.kill([sys.executable, "-c", ""], "SIGTERM", False, lambda _: False) is None


def test_files_that_are_left_are_detected(script: Any, tmp_path: Path) -> None:
    output = tmp_path / "ratings.csv"
    output.touch()
    script.check_end("SIGTERM", "rating", 143, output)
    script.temporary(output).touch()
    script.check_end("SIGKILL", "rating", -9, output)
    with pytest.raises(AssertionError, match="files left"):
        script.check_end("SIGTERM", "rating", 143, output)
