"""python -m pytest tests/files/test_atomic.py"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from lmm_qa.files.atomic import replacing


def test_a_file_is_replaced_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text("old")
    with replacing(path) as beside:
        beside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_block_that_fails_changes_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as beside:
        beside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


HOLD = """
import sys
from pathlib import Path
from lmm_qa.files.atomic import replacing

with replacing(Path(sys.argv[1])) as beside:
    beside.write_text("half")
    print("held", flush=True)
    beside.write_text(sys.stdin.read())
"""


def hold(path: Path) -> subprocess.Popen[str]:
    """A process that replaces a file; its standard input gives the content."""
    arguments = [sys.executable, "-c", HOLD, str(path)]
    return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_the_temporary_file_of_a_killed_process_is_reused(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    with hold(path) as killed:
        assert killed.stdout and killed.stdout.readline() == "held\n"
        killed.kill()
    [left] = tmp_path.iterdir()
    with replacing(path) as beside:
        assert beside == left and (os.name == "nt" or beside.read_text() == "")
        beside.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no file locks of this kind")
def test_of_two_processes_each_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    with hold(path) as first, hold(path) as second:
        assert first.stdout and second.stdout
        ready, _, _ = select.select([first.stdout, second.stdout], [], [])
        holder, waiting = (first, second) if first.stdout in ready else (second, first)
        assert holder.communicate("of the holder")[0] == "held\n"
        assert path.read_text() == "of the holder"
        assert waiting.communicate("of the other")[0] == "held\n"
        assert path.read_text() == "of the other"
    assert list(tmp_path.iterdir()) == [path]
