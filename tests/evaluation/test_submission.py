"""python -m pytest tests/evaluation/test_submission.py"""

from __future__ import annotations

import json
import time
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmm_qa.cli.app import app
from lmm_qa.errors import ScoresError, UsageError
from lmm_qa.evaluation.labels import Score, read_names, read_scores
from lmm_qa.evaluation.submission import submission_text, write_submission

NAMES = ("b.mp4", "a.mp4", "c.mp4")
SCORES = (Score("clips/a.mp4", 2.5), Score("clips/b.mp4", 2.196240901947021), Score("clips/c.mp4", 3.0))


def content(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        (entry,) = archive.infolist()
        assert entry.filename == "output.txt"
        return archive.read(entry)


def test_the_published_baseline_is_written_byte_for_byte(shared_dir: Path, tmp_path: Path) -> None:
    published = shared_dir / "thqa" / "baseline_output.txt"
    scores = read_scores(published)
    names = read_names(shared_dir / "thqa" / "thqa_ntire_vallist.csv")
    write_submission(tmp_path / "s.zip", submission_text(scores[::-1], names))
    assert content(tmp_path / "s.zip") == published.read_bytes()


def test_scores_are_in_the_order_of_the_list(tmp_path: Path) -> None:
    write_submission(tmp_path / "s.zip", submission_text(SCORES, NAMES))
    assert content(tmp_path / "s.zip") == b"b.mp4,2.196240901947021\na.mp4,2.5\nc.mp4,3.0\n"


def test_the_zip_is_reproducible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_submission(tmp_path / "one.zip", submission_text(SCORES, NAMES))
    now = time.localtime(time.time() + 1e6)
    monkeypatch.setattr(time, "localtime", lambda *_: now)
    write_submission(tmp_path / "two.zip", submission_text(SCORES[::-1], NAMES))
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.zip", "two.zip"]


def test_unmatched_clips_are_refused_by_name() -> None:
    scores = (Score("a.mp4", 2.5), Score("b.mp4", None, "ClipTruncated: 3 of 9 frames"), Score("new.mp4", 1.0))
    with pytest.raises(ScoresError) as caught:
        submission_text(scores, NAMES)
    assert str(caught.value).splitlines() == [
        "no submission was written: each listed clip needs one score",
        "  1 are listed and not in the ratings:",
        "      c.mp4",
        "  1 could not be rated:",
        "      b.mp4 (ClipTruncated: 3 of 9 frames)",
        "  1 are rated and not listed:",
        "      new.mp4",
    ]


def test_long_lists_of_problems_are_shortened() -> None:
    names = [f"{number}.mp4" for number in range(14)]
    with pytest.raises(ScoresError, match=r"(?s)14 are listed and not in the ratings:.* 9\.mp4\n +and 4 more\n"):
        submission_text(SCORES, names)


def test_invalid_output_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a submission is a \.zip, received .*output\.txt"):
        write_submission(tmp_path / "output.txt", "")
    with pytest.raises(ScoresError, match=r"cannot write .*: No such file or directory"):
        write_submission(tmp_path / "gone" / "s.zip", "")


def test_the_command(tmp_path: Path) -> None:
    rows = [{"clip": score.clip, "score": score.value, "error": None} for score in SCORES]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "list.csv").write_bytes(b"Video\r\nb.mp4\r\na.mp4\r\nc.mp4\r\n")
    options = ["submit", f"{tmp_path}/r.jsonl", "--list", f"{tmp_path}/list.csv", "-o"]
    done = CliRunner().invoke(app, [*options, f"{tmp_path}/s.zip"])
    assert (done.exit_code, done.stdout) == (0, "")
    assert f"3 clips -> {tmp_path}/s.zip" in done.stderr
    assert content(tmp_path / "s.zip").startswith(b"b.mp4,2.19")
    (tmp_path / "list.csv").write_text("Video\nb.mp4\n")
    refused = CliRunner().invoke(app, [*options, f"{tmp_path}/t.zip"])
    assert isinstance(refused.exception, ScoresError)
    assert not (tmp_path / "t.zip").exists()
