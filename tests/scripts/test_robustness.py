"""Every 40th file of `scripts/robustness.py`, and what its checks detect. Marked slow, but for the properties.

python -m pytest tests/scripts/test_robustness.py
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import SCRIPTS

from lmm_qa.config import Sampling, View
from lmm_qa.errors import ClipError
from lmm_qa.files.tables import Row, read_rows, write_rows
from lmm_qa.video.decode import read_frames

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes and devices in folders"),
    pytest.mark.timeout(900),  # a minute, and ten times that on a busy machine
]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder of a run of the script."""
    work = tmp_path_factory.mktemp("robustness") / "work"
    arguments = ["--work", work, "--every", "40", "-o", work / "report.json", "--docs", work / "page.md"]
    command = [sys.executable, SCRIPTS / "robustness.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return work


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import robustness

    return robustness


def test_sound_files_are_rated_and_damaged_ones_cost_only_themselves(finished_run: Path) -> None:
    report = json.loads((finished_run / "report.json").read_text())
    assert report["failures"] == []
    assert report["files"] >= 30
    assert {kind.partition("/")[0] for kind in report["table"]} == {"sound", "damaged", "hostile"}
    assert all(result["outcome"] == "rated" for result in report["results"] if result["group"] == "sound")
    assert report["table"]["damaged/cut"].keys() <= {"ClipTruncated", "ClipUnreadable"}
    assert report["peak"] > report["peak_alone"] / 2 > 0


def test_the_page_has_every_sound_and_hostile_file_and_no_path_of_this_machine(finished_run: Path) -> None:
    page = (finished_run / "page.md").read_text()
    results = json.loads((finished_run / "report.json").read_text())["results"]
    every_file = page[page.index("## Every sound file") :]
    listed = [
        line for line in every_file.splitlines() if line.startswith("| ") and not line.startswith(("| file", "| -"))
    ]
    assert len(listed) == sum(result["group"] != "damaged" for result in results)
    assert str(finished_run) not in page


def test_each_check_can_fail(finished_run: Path, script: Any) -> None:
    report = json.loads((finished_run / "report.json").read_text())
    folder = finished_run / "files"
    whole = read_rows(finished_run / "together.jsonl")
    good = [folder / row["clip"] for row in whole if row["clip"].startswith("good/")]
    cases = [
        script.Case(
            name=result["path"].partition("/")[2],
            make=Path.touch,
            outcomes=frozenset({result["outcome"]}),
            frames=1 if result["outcome"] == script.RATED else 36,
            group=result["group"],
        )
        for result in report["results"]
    ]
    shown = [script.Verdict(**result["ffmpeg"]) if result["ffmpeg"] else None for result in report["results"]]

    def failures(rows: list[Row], code: int | None = 3, stderr: str = "", memory: int = 1) -> str:
        write_rows(finished_run / "changed.jsonl", rows)
        run = script.Run(code, stderr, 1.0, [(0.0, 1)])
        ratings = (finished_run / "changed.jsonl", finished_run / "alone.jsonl")
        verdicts = [(verdict, verdict) for verdict in shown]
        return "\n".join(script.check(cases, verdicts, folder, good, run, run, *ratings, memory).failures)

    cut, *_ = (row for row in whole if row["clip"].startswith("damaged/cut/"))
    codec, *_ = (row for row in whole if row["clip"].startswith("sound/codec/"))
    best, *_ = (row for row in whole if row["clip"].startswith("good/"))
    others = [row for row in whole if row not in (cut, codec, best)]
    complete = codec["video"] | {"frames": 36}
    short = codec | {"video": codec["video"] | {"frames": codec["video"]["frames"] - 1}}
    moved = "differs from that without the other files"
    assert failures(whole) == ""
    assert "exit code None" in failures(whole, code=None)
    assert "Traceback" in failures(whole, stderr="Traceback (most recent call last)")
    assert "memory" in failures(whole, memory=0)
    assert "0 rows, expected" in failures([best, codec, *others])
    assert "2 rows, expected" in failures([*whole, cut | {"rater_id": "another"}])
    assert "rated, expected" in failures([best, codec, *others, cut | {"error": None, "video": complete}])
    assert "expected rated" in failures([best, cut, *others, codec | {"error": cut["error"]}])
    assert "fewer frames, expected rated" in failures([best, cut, *others, short])
    assert moved in failures([cut, codec, *others])
    assert moved in failures([cut, codec, *others, best | {"score": best["score"] + 0.01}])
    assert "a row for no file" in failures([*whole, cut | {"clip": "damaged/cut/ghost.mp4"}])


def test_a_connection_and_a_forgotten_file_are_noticed(script: Any, tmp_path: Path) -> None:
    (tmp_path / "together.tmp").mkdir()
    (tmp_path / "together.tmp" / "forgotten").touch()
    with script.watched_server() as (server, connections):
        host, port = server.split(":")
        with socket.create_connection((host, int(port))) as client:
            client.recv(1)
    found = list(script.traces(tmp_path, set(), connections))
    assert found[0].endswith("forgotten") and found[1].startswith("connection from 127.0.0.1")


@pytest.fixture(scope="module")
def original(clips_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Path]:
    """The bytes of a clip, and a path for changed copies."""
    return (clips_dir / "h264.mp4").read_bytes(), tmp_path_factory.mktemp("changed") / "changed.mp4"


@settings(max_examples=200)
@given(st.integers(0, 2**32), st.integers(1, 40), st.sampled_from(["flip", "zero", "move", "cut"]))
def test_h264_is_read_completely_or_refused(original: tuple[bytes, Path], seed: int, times: int, how: str) -> None:
    """However its media data is changed, a clip returns all its 60 frames or a ClipError."""
    raw, path, rng = bytearray(original[0]), original[1], Random(seed)
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
