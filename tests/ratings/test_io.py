"""python -m pytest tests/ratings/test_io.py"""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import TESTS
from rich.console import Console

from lmm_qa.cli.console import render_table
from lmm_qa.errors import ResultsError, UsageError
from lmm_qa.files.tables import Row, journal, write_rows
from lmm_qa.ratings.io import RatingsWriter, print_row, read_ratings

FORMS = pytest.mark.parametrize("form", [".jsonl", ".csv", ".parquet"])
LEVELS = ("bad", "poor", "fair", "good", "excellent")


def rating(clip: str, content: str | None = None, score: float = 3.25, rater: str = "tiny-1") -> Row:
    return {
        "clip": clip,
        "content_id": f"sha256:{content or clip}",
        "score": score,
        "scale": [0.0, 5.0],
        "level": "good",
        "probabilities": dict(zip(LEVELS, (0.0, 0.1, 0.2, 0.3, 0.4), strict=True)),
        "std": 0.1 + 0.2,
        "level_mass": 0.97,
        "frames": {"indices": [6, 18, 31], "seconds": [0.24, 0.72, 1.24]},
        "video": {"width": 384, "height": 256, "fps": 25.0, "frames": 100, "duration": 4.0, "decoder": "decord"},
        "model": "embedded",
        "adapter": None,
        "prompt": "quality",
        "rater_id": rater,
        "seconds": 0.51,
        "error": None,
    }


def failure(clip: str, content: str | None = None, message: str = "read 3 of 9 frames") -> Row:
    row = dict.fromkeys(rating(clip)) | {"clip": clip, "rater_id": "tiny-1"}
    if content:
        row["content_id"] = f"sha256:{content}"
    return row | {"error": {"class": "ClipTruncated", "message": message}}


def content(row: Row) -> str:
    return str(row["content_id"])


def run(path: Path, rows: list[Row], overwrite: bool = False) -> tuple[RatingsWriter, list[str]]:
    """What the command does: ask for each clip whether it is done, then rate the others. Returns what it rated."""
    with RatingsWriter(path, [row["clip"] for row in rows], "tiny-1", overwrite) as sink:
        waiting = [row for row in rows if row["content_id"] is None or sink.resume(row["clip"], content(row)) is None]
        for row in waiting:
            sink.write(row)
    return sink, [row["clip"] for row in waiting]


def refusal(path: Path, clips: tuple[str, ...] = ("a.mp4",)) -> str:
    before = path.read_bytes()
    with pytest.raises(ResultsError) as caught, RatingsWriter(path, clips, "tiny-1") as sink:
        sink.write(rating("a.mp4"))
    assert path.read_bytes() == before
    return str(caught.value)


# --- a run -----------------------------------------------------------------------------------------------------------


@FORMS
def test_the_output_has_one_row_per_clip_in_input_order(tmp_path: Path, form: str) -> None:
    path = tmp_path / "deep" / f"r{form}"
    rows = [rating("b.mp4"), failure("gone.mp4"), rating("a.mp4")]
    with RatingsWriter(path, ["b.mp4", "gone.mp4", "a.mp4"], "tiny-1") as sink:
        for row in reversed(rows):
            sink.write(row)
    assert read_ratings(path) == rows == sink.rows
    assert os.listdir(path.parent) == [path.name]


@FORMS
def test_repeating_a_finished_run_does_nothing(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"r{form}"
    rows = [rating("a.mp4"), rating("b.mp4", score=0.5)]
    assert run(path, rows)[1] == ["a.mp4", "b.mp4"]
    before = path.stat()
    sink, rated = run(path, rows)
    assert (rated, sink.reused, sink.rows) == ([], 2, rows)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_which_rows_can_be_resumed(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    for rows, resumes in (([failure("a.mp4", "A")], False), ([rating("a.mp4", "A")], False), ([rating("b.mp4")], True)):
        with RatingsWriter(path, [row["clip"] for row in rows], "tiny-1") as sink:
            assert sink.resumes is resumes
            for row in rows:
                sink.write(row)


@FORMS
def test_failed_clips_are_rated_again(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"r{form}"
    run(path, [failure("a.mp4", "A"), rating("b.mp4"), failure("c.mp4", "C")])
    again = [rating("a.mp4", "A"), rating("b.mp4"), failure("c.mp4", "C", "still broken")]
    assert run(path, again)[1] == ["a.mp4", "c.mp4"]
    assert read_ratings(path) == again


@FORMS
def test_profiles_of_another_classifier_are_computed_again(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"r{form}"

    def reusable(needs: tuple[str, ...], profile_id: str | None) -> bool:
        with RatingsWriter(path, ["a.mp4"], "tiny-1", needs=needs, profile_id=profile_id) as sink:
            found = sink.resume("a.mp4", "sha256:a.mp4") is not None
            if not found:
                made = {"profile_id": profile_id, "explanation": "It is good."} if profile_id else {}
                sink.write(rating("a.mp4") | made)
        return found

    assert not reusable((), None), "nothing was rated yet"
    assert not reusable(("explanation",), "p1"), "the row has no explanation"
    assert reusable(("explanation",), "p1")
    assert not reusable(("explanation",), "p2"), "another classifier, prompt or source of answers"
    assert reusable((), None), "a score does not depend on the profile"
    assert read_ratings(path)[0]["profile_id"] == "p2"


@FORMS
def test_a_renamed_clip_is_not_rated_again(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"r{form}"
    run(path, [rating("a.mp4", "A", 1.5), rating("old.mp4", "B", 2.5)])
    sink, rated = run(path, [rating("clips/a.mp4", "A"), rating("copy.mp4", "A"), rating("old.mp4", "B")])
    assert (rated, sink.reused) == ([], 3)
    assert [(row["clip"], row["score"]) for row in read_ratings(path)] == [
        ("clips/a.mp4", 1.5),
        ("copy.mp4", 1.5),
        ("old.mp4", 2.5),
    ]


@FORMS
def test_a_clip_with_changed_content_is_rated_again(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"r{form}"
    run(path, [rating("a.mp4", "old", 1.0), rating("b.mp4")])
    assert run(path, [rating("a.mp4", "new", 4.0), rating("b.mp4")])[1] == ["a.mp4"]
    assert [row["score"] for row in read_ratings(path)] == [4.0, 3.25]


@FORMS
def test_rows_of_clips_outside_a_later_run_are_preserved(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"r{form}"
    run(path, [rating("a.mp4"), failure("lost.mp4"), rating("b.mp4")])
    run(path, [rating("c.mp4"), rating("b.mp4")])
    assert [row["clip"] for row in read_ratings(path)] == ["a.mp4", "lost.mp4", "c.mp4", "b.mp4"]


@FORMS
def test_overwrite_discards_earlier_rows(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"r{form}"
    run(path, [rating("a.mp4", score=1.0), rating("b.mp4")])
    journal(path).write_text("leftovers\n")
    assert run(path, [rating("a.mp4", score=2.0)], overwrite=True)[1] == ["a.mp4"]
    assert [(row["clip"], row["score"]) for row in read_ratings(path)] == [("a.mp4", 2.0)]


@FORMS
def test_overwrite_does_not_touch_the_file_before_the_first_row(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"r{form}"
    path.write_text("mine")
    with pytest.raises(KeyboardInterrupt), RatingsWriter(path, ["a.mp4"], "tiny-1", overwrite=True):
        raise KeyboardInterrupt
    assert path.read_text() == "mine"


def test_a_run_that_leaves_out_a_clip_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(ResultsError, match=r"1 clips of the run have no row, the first is b\.mp4"),
        RatingsWriter(tmp_path / "r.csv", ["a.mp4", "b.mp4"], "tiny-1") as sink,
    ):
        sink.write(rating("a.mp4"))
    assert read_ratings(journal(tmp_path / "r.csv")) == [rating("a.mp4")]


def test_rows_of_other_clips_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"'b\.mp4' is not among"),
        RatingsWriter(tmp_path / "r.csv", ["a.mp4"], "t") as sink,
    ):
        sink.write(rating("b.mp4"))


def test_a_link_to_the_output_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "r.csv").symlink_to("data/real.csv")
    run(tmp_path / "r.csv", [rating("a.mp4")])
    assert (tmp_path / "r.csv").is_symlink()
    assert read_ratings(tmp_path / "data" / "real.csv") == [rating("a.mp4")]


@pytest.mark.skipif(os.name != "posix", reason="permission bits are POSIX's")
def test_a_rewritten_file_keeps_its_permissions(tmp_path: Path) -> None:
    run(tmp_path / "r.csv", [rating("a.mp4")])
    (tmp_path / "r.csv").chmod(0o640)
    run(tmp_path / "r.csv", [rating("b.mp4")])
    assert (tmp_path / "r.csv").stat().st_mode & 0o777 == 0o640


# --- interruptions ---------------------------------------------------------------------------------------------------


@FORMS
def test_an_interrupted_run_is_resumed(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"r{form}"
    rows = [rating("a.mp4"), rating("b.mp4"), failure("c.mp4", "C"), rating("d.mp4")]
    with pytest.raises(KeyboardInterrupt), RatingsWriter(path, [row["clip"] for row in rows], "tiny-1") as sink:
        for row in rows[:3]:
            sink.write(row)
        raise KeyboardInterrupt
    assert run(path, rows)[1] == ["c.mp4", "d.mp4"]
    assert read_ratings(path) == rows
    assert os.listdir(tmp_path) == [path.name]


@FORMS
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no kill -9")
def test_sigkill_loses_no_written_row(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"r{form}"
    code = f"""
import sys, time
sys.path[:0] = [{str(TESTS)!r}, {str(TESTS / "ratings")!r}]
from test_io import Path, RatingsWriter, rating
with RatingsWriter(Path({str(path)!r}), [f"{{n}}.mp4" for n in range(9)], "tiny-1") as sink:
    for n in range(4):
        sink.write(rating(f"{{n}}.mp4"))
    print("written", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        process.kill()
    rows = [rating(f"{n}.mp4") for n in range(9)]
    assert run(path, rows)[1] == [f"{n}.mp4" for n in range(4, 9)]
    assert read_ratings(path) == rows


@FORMS
def test_a_truncated_last_row_is_dropped_and_written_again(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"r{form}"
    growing = path if form == ".jsonl" else journal(path)
    rows = [rating("a.mp4"), rating("é.mp4")]
    whole, cut = (json.dumps(row, ensure_ascii=False).encode() for row in rows)
    for length in (1, cut.index("é".encode()) + 1, len(cut) - 1):
        path.unlink(missing_ok=True)
        growing.write_bytes(whole + b"\n" + cut[:length])
        assert read_ratings(growing) == rows[:1]
        assert run(path, rows)[1] == ["é.mp4"]
        assert read_ratings(path) == rows


def test_a_complete_last_row_without_a_newline_is_read(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(rating("a.mp4")))
    assert run(path, [rating("a.mp4"), rating("b.mp4")])[1] == ["b.mp4"]
    assert read_ratings(path) == [rating("a.mp4"), rating("b.mp4")]


def test_the_later_of_two_rows_of_a_clip_is_used(tmp_path: Path) -> None:
    rows = [failure("a.mp4", "A"), rating("b.mp4"), rating("a.mp4", "A"), rating("a.mp4", "A", rater="other")]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_ratings(tmp_path / "r.jsonl") == [rows[2], rows[1], rows[3]]


def test_a_row_broken_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(rating("a.mp4")) + '\n{"clip": "b.m\n' + json.dumps(rating("c.mp4")) + "\n")
    with pytest.raises(ResultsError, match=r"r\.jsonl:2: expected a JSON object, received .*b\.m"):
        read_ratings(path)
    assert "r.jsonl:2: expected a JSON object" in refusal(path)


def test_reading_an_unfinished_table_is_an_error_that_names_its_journal(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), RatingsWriter(tmp_path / "r.csv", ["a.mp4"], "tiny-1") as sink:
        sink.write(rating("a.mp4"))
        raise KeyboardInterrupt
    with pytest.raises(
        ResultsError, match=r"No such file or directory; an unfinished run left .*r\.csv\.partial\.jsonl"
    ):
        read_ratings(tmp_path / "r.csv")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["r.txt", "r", "r.json", "r.jsonl.gz"])
def test_other_suffixes_are_refused(tmp_path: Path, name: str) -> None:
    for use in (lambda: RatingsWriter(tmp_path / name, [], "t"), lambda: read_ratings(tmp_path / name)):
        with pytest.raises(UsageError, match=r"use \.jsonl, \.csv or \.parquet"):
            use()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("r.csv", "clip,mos\na.mp4,3\n"),
        ("r.csv", "a,a.b\n1,2\n"),
        ("r.csv", "clip,mos\na.mp4\n"),
        ("r.csv", "\x80"),
        ("r.jsonl", '{"clip": "a.mp4"}\n'),
        ("r.jsonl", "[1, 2]\n"),
        ("r.jsonl", "a note of mine"),
        ("r.jsonl", '{\n"a": 1\n}'),
        ("r.parquet", "PAR1"),
    ],
)
def test_a_file_that_holds_no_ratings_is_never_changed(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode("latin-1"))
    message = refusal(path)
    assert str(path) in message
    assert "--overwrite" in message
    run(path, [rating("a.mp4")], overwrite=True)
    assert read_ratings(path) == [rating("a.mp4")]


@FORMS
def test_an_empty_file_can_be_written_to(tmp_path: Path, form: str) -> None:
    (tmp_path / f"r{form}").touch()
    run(tmp_path / f"r{form}", [rating("a.mp4")])
    assert read_ratings(tmp_path / f"r{form}") == [rating("a.mp4")]


@FORMS
def test_rows_of_another_rater_are_refused(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"r{form}"
    write_rows(path, [rating("a.mp4", rater="other-7")])
    assert "contains ratings of another rater or calibration (other-7; this one is tiny-1)" in refusal(path)


def test_an_output_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "device.csv").symlink_to(os.devnull)
    for place, reason in (
        ("folder.csv", r"folder\.csv: it is a folder"),
        ("device.csv", "it is not a regular file"),
        ("file/r.csv", r"r\.csv: (Not a directory|File exists)"),
    ):
        with pytest.raises(ResultsError, match=reason), RatingsWriter(tmp_path / place, [], "tiny-1"):
            pass


def test_a_row_that_is_not_json_is_refused(tmp_path: Path) -> None:
    with RatingsWriter(tmp_path / "r.jsonl", ["a.mp4"], "tiny-1") as sink:
        for value in (math.nan, math.inf, object()):
            with pytest.raises(ResultsError, match=r"row of 'a\.mp4' cannot be written as JSON"):
                sink.write(rating("a.mp4") | {"score": value})
        sink.write(rating("a.mp4"))
    assert read_ratings(tmp_path / "r.jsonl") == [rating("a.mp4")]


@FORMS
@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
def test_a_full_disk_leaves_earlier_rows_intact(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"r{form}"
    code = f"""
import resource, sys
sys.path[:0] = [{str(TESTS)!r}, {str(TESTS / "ratings")!r}]
from test_io import Path, RatingsWriter, rating
resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500))
with RatingsWriter(Path({str(path)!r}), [f"{{n}}.mp4" for n in range(9)], "tiny-1") as sink:
    for n in range(9):
        sink.write(rating(f"{{n}}.mp4"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "File too large" in done.stderr
    growing = path if form == ".jsonl" else journal(path)
    kept = read_ratings(growing)
    assert kept == [rating(f"{n}.mp4") for n in range(len(kept))]
    assert 0 < len(kept) < 9
    assert growing.read_bytes().endswith(b"\n")


@pytest.mark.skipif(os.name != "posix", reason="locks are POSIX's")
def test_two_runs_cannot_write_one_file(tmp_path: Path) -> None:
    second = RatingsWriter(tmp_path / "r.csv", ["a.mp4"], "tiny-1")
    with RatingsWriter(tmp_path / "r.csv", ["a.mp4"], "tiny-1") as first:
        first.write(rating("a.mp4", score=1.0))
        with pytest.raises(ResultsError, match="another run is writing it"), second:
            second.write(rating("a.mp4", score=2.0))
    assert [row["score"] for row in read_ratings(tmp_path / "r.csv")] == [1.0]


# --- tables ----------------------------------------------------------------------------------------------------------


def test_nested_values_become_adjacent_table_columns(tmp_path: Path) -> None:
    rows = [rating("a.mp4"), failure("b.mp4")]
    for form in (".csv", ".parquet"):
        write_rows(tmp_path / f"r{form}", rows)
    with (tmp_path / "r.csv").open(newline="") as file:
        header, good, bad = csv.reader(file)
    expected = ["clip", "content_id", "score", "scale", "level", *(f"probabilities.{level}" for level in LEVELS)]
    assert header[:10] == expected
    assert header[-2:] == ["error.class", "error.message"]
    assert pyarrow.parquet.read_schema(tmp_path / "r.parquet").names == header
    assert good[:5] == ["a.mp4", "sha256:a.mp4", "3.25", "[0.0, 5.0]", "good"]
    assert bad[:5] == ["b.mp4", "", "", "", ""]
    assert bad[-1] == "read 3 of 9 frames"


def test_types_in_parquet_are_native(tmp_path: Path) -> None:
    write_rows(tmp_path / "r.parquet", [failure("b.mp4"), rating("a.mp4")])
    schema = pyarrow.parquet.read_schema(tmp_path / "r.parquet")
    types = {name: str(schema.field(name).type) for name in schema.names}
    assert types["score"] == types["probabilities.bad"] == "double"
    assert types["frames.indices"].startswith("list<")
    assert types["adapter"] == types["level"] == "string"


def test_a_column_that_no_table_can_hold_is_an_error(tmp_path: Path) -> None:
    mixed = [rating("a.mp4") | {"prompt": 7}, rating("b.mp4")]
    with pytest.raises(ResultsError, match="column 'prompt' fits no Parquet type"):
        write_rows(tmp_path / "r.parquet", mixed)
    with pytest.raises(ResultsError, match="'prompt' is a dict in some rows"):
        write_rows(tmp_path / "r.csv", [rating("a.mp4") | {"prompt": {"name": "x"}}, rating("b.mp4")])
    assert os.listdir(tmp_path) == []


texts = st.one_of(
    st.text(),
    st.sampled_from(
        [
            "",
            "null",
            "true",
            "12",
            "1e5",
            "NaN",
            " 1",
            "=1",
            "'=1",
            "''=1",
            '"x"',
            "[1]",
            "{",
            "a,b",
            "a\r\nb",
            "\ufeff",
            "\0",
        ]
    ),
)
floats = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def any_rating(draw: st.DrawFn) -> Row:
    """A row with our columns and any values: those that may be None are None now and then."""
    row = rating(draw(texts)) | {
        "score": draw(st.none() | floats),
        "scale": draw(st.none() | st.lists(floats, min_size=2, max_size=2)),
        "level": draw(st.none() | texts),
        "probabilities": draw(st.none() | st.fixed_dictionaries(dict.fromkeys(LEVELS, floats))),
        "adapter": draw(st.none() | texts),
        "error": draw(st.none() | st.fixed_dictionaries({"class": texts, "message": texts})),
    }
    row["frames"] = draw(st.none() | st.fixed_dictionaries({"indices": st.lists(st.integers(0, 2**53))}))
    row["video"] = draw(st.none() | st.fixed_dictionaries({"width": st.integers(1, 9999), "fps": st.none() | floats}))
    return row


@FORMS
@given(rows=st.lists(any_rating(), min_size=1, max_size=4, unique_by=lambda row: row["clip"]), safe=st.booleans())
@settings(max_examples=150, deadline=None)
def test_rows_survive_a_round_trip(
    tmp_path_factory: pytest.TempPathFactory, form: str, rows: list[Row], safe: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / f"round-trip{form}"
    write_rows(path, copy.deepcopy(rows), safe)
    assert read_ratings(path) == rows


FORMULAS = ["=1+1", "+1+cmd", "-2+3+cmd", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "\uff1d1"]


def csv_cells(path: Path, column: str) -> list[str]:
    with path.open(newline="", encoding="utf-8") as file:
        return [row[column] for row in csv.DictReader(file)]


def test_safe_csv_has_no_cell_that_a_spreadsheet_would_run(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    names = [*FORMULAS, "-5", "'=1", "'plain", "plain", "a=1"]
    rows = [rating(name) | {"prompt": name, "score": -1.5} for name in names]
    write_rows(path, rows)
    assert csv_cells(path, "clip")[:2] == ["=1+1", "+1+cmd"], "off by default: names stay as they are"
    assert read_ratings(path) == rows
    write_rows(path, rows, safe_csv=True)
    texts = csv_cells(path, "clip") + csv_cells(path, "prompt")
    assert not [text for text in texts if text[0] in "=+-@\t\r\n\uff1d"]
    assert texts[:2] == ["'=1+1", "'+1+cmd"] and {"plain", "a=1", "'plain"} <= set(texts)
    assert csv_cells(path, "score")[0] == "-1.5", "a number is no formula"
    assert read_ratings(path) == rows


def test_a_safe_csv_is_resumed_and_an_unsafe_one_made_safe(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    rows = [rating("=1.mp4"), failure("=2.mp4")]
    run(path, rows)
    for _ in range(2):
        with RatingsWriter(path, ["=1.mp4", "=2.mp4"], "tiny-1", safe_csv=True) as sink:
            assert sink.resume("=1.mp4", rows[0]["content_id"]) == rows[0]
            sink.write(rows[1])
        assert csv_cells(path, "clip") == ["'=1.mp4", "'=2.mp4"]
        assert read_ratings(path) == rows


def test_text_that_utf8_cannot_encode(tmp_path: Path) -> None:
    row = failure("a.mp4", "A", "caf\udce9 is missing")
    for form, expected in ((".jsonl", "caf\udce9 is missing"), (".csv", "caf\udce9 is missing")):
        write_rows(tmp_path / f"r{form}", [row])
        assert read_ratings(tmp_path / f"r{form}")[0]["error"]["message"] == expected
    write_rows(tmp_path / "r.parquet", [row])
    assert read_ratings(tmp_path / "r.parquet")[0]["error"]["message"] == r"caf\udce9 is missing"


# --- the terminal ----------------------------------------------------------------------------------------------------


def printed(rows: list[Row], limit: int = 40, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    render_table(rows, Console(file=stream, width=160), limit)
    stream.seek(0)
    return stream.read()


def test_the_table_shows_ratings_and_failures() -> None:
    text = printed([rating("[bold]a.mp4"), failure("b.mp4", message="read 3 of 9 frames " + "x" * 99)])
    header, _, good, bad = text.splitlines()
    assert [cell.strip() for cell in header.split("┃")] == [
        "clip",
        "score (0-5)",
        "std",
        "level",
        "b p f g e",
        "size",
        "s",
    ]
    assert [cell.strip() for cell in good.split("│")] == [
        *("[bold]a.mp4", "3.25", "0.30", "good", "▁ ▂ ▂ ▃", "384x256", "0.5")
    ]
    assert "ClipTruncated: read 3 of 9 frames xxx" in bad
    assert "x" * 60 not in bad


def test_the_table_shows_intervals_where_there_are_any() -> None:
    text = printed([rating("a.mp4") | {"interval": [2.5, 4.125]}, failure("b.mp4")])
    header, _, *lines = text.splitlines()
    assert [cell.strip() for cell in header.split("┃")][:4] == ["clip", "score (0-5)", "interval", "level"]
    cells = [[cell.strip() for cell in line.split("│")][:3] for line in lines]
    assert cells == [["a.mp4", "3.25", "[2.50, 4.12]"], ["b.mp4", "-", ""]]


def test_the_table_is_cut_at_its_limit() -> None:
    text = printed([rating(f"{n}.mp4") for n in range(5)] + [failure("b.mp4")], limit=3)
    assert "2.mp4" in text
    assert "3.mp4" not in text
    assert "... and 3 more clips, 1 of which failed" in text


def test_the_table_without_rows_and_with_failures_only() -> None:
    assert "score" in printed([])
    assert "ClipTruncated" in printed([failure("b.mp4")])


def test_the_table_on_an_ascii_terminal() -> None:
    assert ". : : -" in printed([rating("a.mp4")], encoding="ascii")


def test_failures_are_red() -> None:
    buffer = io.StringIO()
    render_table([failure("b.mp4")], Console(file=buffer, force_terminal=True, color_system="standard", width=120))
    assert "\x1b[31mb.mp4" in buffer.getvalue()


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_streamed_rows_are_readable_in_any_encoding(encoding: str) -> None:
    buffer = io.BytesIO()
    rows: list[dict[str, Any]] = [rating("é→.mp4"), failure("a\nb.mp4", "A", "caf\udce9")]
    stream = io.TextIOWrapper(buffer, encoding=encoding)
    for row in rows:
        print_row(row, stream)
    assert [json.loads(line) for line in buffer.getvalue().decode(encoding).splitlines()] == rows


def test_importing_the_module_loads_no_heavy_libraries() -> None:
    code = "import json, sys, lmm_qa.ratings.io; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert "lmm_qa.ratings.io" in loaded
    assert not {"torch", "transformers", "pyarrow", "rich", "numpy"} & set(loaded)
