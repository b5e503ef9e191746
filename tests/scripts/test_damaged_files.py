"""python -m pytest tests/scripts/test_damaged_files.py

A part of what `python scripts/damaged_files.py` does in whole.
"""

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

from lmm_qa.config import Sampling, View
from lmm_qa.errors import ClipError
from lmm_qa.ratings_io import read_rows, write_rows
from lmm_qa.video.decode import read_frames

SCRIPTS = Path(__file__).parents[2] / "scripts"

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes and devices in folders"),
    pytest.mark.timeout(900),  # half a minute, and ten times that on a busy machine
]


@pytest.fixture(scope="module")
def survived(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder of the script, run on every 14th file."""
    work = tmp_path_factory.mktemp("damaged")
    command = [
        sys.executable,
        SCRIPTS / "damaged_files.py",
        "--work",
        work,
        "--every",
        "14",
        "-o",
        work / "report.json",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return work


def test_damage_costs_the_damaged_clip_and_nothing_else(survived: Path) -> None:
    report = json.loads((survived / "report.json").read_text())
    assert report["complaints"] == []
    assert report["files"] >= 30
    assert report["table"]["good"] == {"rated": 4}
    assert report["table"]["cut"].keys() <= {"ClipTruncated", "ClipUnreadable"}
    assert report["peak"] > report["peak_alone"] / 2 > 0


def test_the_check_sees_what_is_wrong(survived: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import damaged_files
    from watched_run import Run

    whole = read_rows(survived / "together.jsonl")
    good = [survived / "files" / row["clip"] for row in whole if row["clip"].startswith("good/")]
    sources = {path.name: path.read_bytes() for path in (survived / "sources").iterdir()}
    chosen = list(damaged_files.cases({name: sources[name] for name in damaged_files.CONTAINERS}, seed=0))[::14]

    def complaints(rows: list[dict[str, object]], code: int | None = 3, said: str = "", memory: int = 1) -> list[str]:
        write_rows(survived / "together.jsonl", rows)  # type: ignore[arg-type]
        run = Run(code, said, 1.0, [(0.0, 1)])
        return list(damaged_files.check(chosen, survived / "files", good, run, run, survived, memory).complaints)

    cut, *_ = (row for row in whole if row["clip"].startswith("cut/"))
    best, *_ = (row for row in whole if row["clip"].startswith("good/"))
    others = [row for row in whole if row not in (cut, best)]
    assert complaints(whole) == []
    assert "exit code None" in complaints(whole, code=None)[0]
    assert complaints(whole, said="Traceback (most recent call last)")
    assert "memory" in complaints(whole, memory=0)[0]
    assert "0 rows, expected" in complaints([best, *others])[0]
    assert "2 rows, expected" in complaints([*whole, cut | {"rater_id": "another"}])[0]
    assert "rated, expected" in complaints([best, *others, cut | {"error": None, "video": {"frames": 36}}])[0]
    assert "not the one that it has alone" in complaints([cut, *others])[0]
    assert "not the one that it has alone" in complaints([cut, *others, best | {"score": best["score"] + 0.01}])[0]
    assert "a row for nothing" in complaints([*whole, cut | {"clip": "cut/ghost.mp4"}])[0]


@pytest.fixture(scope="module")
def original(clips_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Path]:
    """The bytes of a clip, and where to write changed ones."""
    return (clips_dir / "h264.mp4").read_bytes(), tmp_path_factory.mktemp("changed") / "changed.mp4"


@settings(max_examples=200)
@given(st.randoms(use_true_random=False), st.integers(1, 40), st.sampled_from(["flip", "zero", "move", "cut"]))
def test_h264_is_read_whole_or_refused(original: tuple[bytes, Path], rng: Random, times: int, how: str) -> None:
    """However its media data is changed, a clip gives all its 60 frames or an error; never fewer, nor another error."""
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
