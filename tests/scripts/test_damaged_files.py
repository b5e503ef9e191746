"""Every 14th file of `python scripts/damaged_files.py`. Run: python -m pytest tests/scripts/test_damaged_files.py"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import SCRIPTS

from lmm_qa.config import Sampling, View
from lmm_qa.errors import ClipError
from lmm_qa.tables import read_rows, write_rows
from lmm_qa.video.decode import read_frames

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes and devices in folders"),
    pytest.mark.timeout(900),  # half a minute, and ten times that on a busy machine
]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder of a run of the script."""
    work = tmp_path_factory.mktemp("damaged")
    arguments = ["--work", work, "--every", "14", "-o", work / "report.json"]
    command = [sys.executable, SCRIPTS / "damaged_files.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return work


def test_a_damaged_file_costs_only_itself(finished_run: Path) -> None:
    report = json.loads((finished_run / "report.json").read_text())
    assert report["failures"] == []
    assert report["files"] >= 30
    assert report["table"]["good"] == {"rated": 4}
    assert report["table"]["cut"].keys() <= {"ClipTruncated", "ClipUnreadable"}
    assert report["peak"] > report["peak_alone"] / 2 > 0


def test_each_check_can_fail(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import damaged_files
    from rating_runs import Run

    whole = read_rows(finished_run / "together.jsonl")
    good = [finished_run / "files" / row["clip"] for row in whole if row["clip"].startswith("good/")]
    sources = {path.name: path.read_bytes() for path in (finished_run / "sources").iterdir()}
    chosen = list(damaged_files.cases({name: sources[name] for name in damaged_files.CONTAINERS}, seed=0))[::14]

    def failures(rows: list[dict[str, object]], code: int | None = 3, stderr: str = "", memory: int = 1) -> list[str]:
        write_rows(finished_run / "together.jsonl", rows)
        run = Run(code, stderr, 1.0, [(0.0, 1)])
        return list(damaged_files.check(chosen, finished_run / "files", good, run, run, finished_run, memory).failures)

    cut, *_ = (row for row in whole if row["clip"].startswith("cut/"))
    best, *_ = (row for row in whole if row["clip"].startswith("good/"))
    others = [row for row in whole if row not in (cut, best)]
    assert failures(whole) == []
    assert "exit code None" in failures(whole, code=None)[0]
    assert failures(whole, stderr="Traceback (most recent call last)")
    assert "memory" in failures(whole, memory=0)[0]
    assert "0 rows, expected" in failures([best, *others])[0]
    assert "2 rows, expected" in failures([*whole, cut | {"rater_id": "another"}])[0]
    assert "rated, expected" in failures([best, *others, cut | {"error": None, "video": {"frames": 36}}])[0]
    assert "differs from that without the damaged files" in failures([cut, *others])[0]
    assert (
        "differs from that without the damaged files"
        in failures([cut, *others, best | {"score": best["score"] + 0.01}])[0]
    )
    assert "a row for no file" in failures([*whole, cut | {"clip": "cut/ghost.mp4"}])[0]


@pytest.fixture(scope="module")
def original(clips_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Path]:
    """The bytes of a clip, and a path for changed copies."""
    return (clips_dir / "h264.mp4").read_bytes(), tmp_path_factory.mktemp("changed") / "changed.mp4"


@settings(max_examples=200)
@given(st.randoms(use_true_random=False), st.integers(1, 40), st.sampled_from(["flip", "zero", "move", "cut"]))
def test_h264_is_read_completely_or_refused(original: tuple[bytes, Path], rng: Random, times: int, how: str) -> None:
    """However its media data is changed, a clip returns all its 60 frames or a ClipError."""
    raw, path = bytearray(original[0]), original[1]
    begin, end = raw.index(b"mdat") + 4, raw.index(b"moov") - 4
    for _ in range(times):
        place = rng.randrange(begin, end)
        length = rng.randrange(1, 64)
        if how == "flip":
            raw[place] ^= 1 << rng.randrange(8)
        elif how == "zero":
            raw[place : min(place + length, end)] = bytes(min(length, end - place))
        elif how == "move":
            raw[place:end] = raw[place + length : end] + raw[place : place + length]
        else:
            del raw[rng.randrange(begin, len(raw)) :]
            break
    path.write_bytes(raw)
    try:
        frames = read_frames(path, Sampling(frames=60), [View()], 28)
    except ClipError as error:
        assert str(path) in str(error)
    else:
        assert frames.indices == tuple(range(60))
