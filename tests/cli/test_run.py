"""python -m pytest tests/cli/test_run.py"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from clips import write_clip
from commands import Command

FAST = ("--device", "cpu", "--sampling", "uniform:2", "--view", "whole:64", "--workers", "1")


@pytest.mark.parametrize(("family", "shares"), [("qwen3_5", False), ("internvl", True)])
def test_a_note_says_that_questions_cannot_share_a_cache(
    family: str, shares: bool, command: Command, family_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    write_clip(tmp_path / "a.mp4", frames=3, size=(64, 64))
    rate = ("rate", tmp_path / "a.mp4", "-m", family_dir(family), *FAST, "--prompt", "qrealign")
    for details in ((), ("--defects", "--explain")):
        done = command(*rate, *details)
        assert done.code == 0
        notes = [line for line in done.err.splitlines() if "reads the clip again" in line]
        assert len(notes) == (1 if details and not shares else 0)
        assert "causal_conv1d" not in done.err, "nothing of what the libraries have to say"
    (row,) = done.rows
    assert row["prompt"] == "How would you rate the quality of this video? The quality of the video is"
    assert row["explanation"].startswith("The quality of the video is ")
