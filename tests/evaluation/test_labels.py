"""python -m pytest tests/evaluation/test_labels.py"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmm_qa.errors import ManifestError, ResultsError, ScoresError
from lmm_qa.evaluation.labels import (
    Label,
    Score,
    ambiguous,
    group_folds,
    join,
    match,
    read_labels,
    read_names,
    read_scores,
)
from lmm_qa.files.tables import Row, write_rows

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode())
        return path

    return write


def rated(clip: str, score: float, **more: object) -> Row:
    return {"clip": clip, "content_id": f"sha256:{clip}", "rater_id": "r", "score": score, "error": None, **more}


def failed(clip: str) -> Row:
    error = {"class": "ClipTruncated", "message": "3 of 9 frames"}
    return {"clip": clip, "content_id": None, "rater_id": "r", "score": None, "error": error}


# --- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("thqa.csv", "Video,Score\r\na.mp4,1.5\r\nb.mp4,3"),
        ("bom.csv", "\ufeffclip,MOS,score\na.mp4,1.5,9\n\nb.mp4,3,9\n"),
        ("tabs.tsv", "other\tname\tmos\nx\ta.mp4\t1.5\nx\tb.mp4\t3\n"),
        ("rows.jsonl", '{"clip": "a.mp4", "mos": 1.5}\n\n{"clip": "b.mp4", "mos": 3}\n'),
    ],
)
def test_labels_in_all_formats(write: Write, name: str, text: str) -> None:
    assert read_labels(write(name, text)) == (Label("a.mp4", 1.5, "a.mp4"), Label("b.mp4", 3.0, "b.mp4"))


def test_labels_in_parquet_with_named_columns(tmp_path: Path) -> None:
    path = tmp_path / "konvid.parquet"
    write_rows(path, [{"flickr_id": "12.mp4", "MOS": 2.5, "quality": 4.5, "group": 7}])
    assert read_labels(path, "flickr_id", "quality") == (Label("12.mp4", 4.5, "7"),)


def test_groups_come_from_the_table_or_the_clip_name(write: Write) -> None:
    text = "clip,mos,group\na.mp4,1,anna\n8_voice_en_34939394_wavlip.mp4,2,\n"
    assert [label.group for label in read_labels(write("l.csv", text))] == ["anna", ("v1", 8)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.csv", "clip,mos\na.mp4,high\n", "l.csv:2: expected a finite number, received 'high'"),
        ("l.csv", "clip,mos\na.mp4,nan\n", "l.csv:2: expected a finite number, received 'nan'"),
        ("l.csv", "clip,mos\na.mp4,1\na.mp4,2\n", "l.csv:3: 'a.mp4' already has a label, 1: keep one of the two"),
        ("l.csv", "clip,mos\na.mp4\n", "l.csv:2: expected 2 cells, received 1"),
        ("l.csv", "clip,mos\n,1\n", "l.csv:2: expected the name of a clip, received ''"),
        ("l.csv", "clip,quality\na,1\n", "l.csv: no column is named mos or score; the columns are: clip, quality"),
        ("l.csv", "id,mos\na,1\n", "l.csv: no column is named clip, video, "),
        ("l.csv", "clip,mos\n", "l.csv contains no labels"),
        ("l.csv", "", "l.csv is empty: expected a header with the names of the columns"),
        ("l.csv", 'clip,mos\n"a\x00,1', "l.csv:"),
        ("l.jsonl", '{"clip": "a", "mos": 1}\n[1]\n', r"l.jsonl:2: expected a JSON object, received '\[1\]'"),
        ("l.jsonl", "{\n", r"l.jsonl:1: expected a JSON object, received '{' \(Expecting property name"),
        ("l.jsonl", '{"clip": 7, "mos": 1}\n', "l.jsonl:1: expected the name of a clip, received 7"),
        ("l.parquet", "no", "l.parquet is not a Parquet file"),
        ("l.txt", "a,1\n", "l.txt: a table is one of .csv, .tsv, .jsonl, .parquet"),
    ],
)
def test_invalid_labels_are_refused_with_file_and_line(write: Write, name: str, text: str, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        read_labels(write(name, text))


def test_missing_files_and_other_encodings_are_refused(tmp_path: Path) -> None:
    for read in (read_labels, read_names):
        with pytest.raises(ManifestError, match=r"cannot read .*l.csv: No such file"):
            read(tmp_path / "l.csv")
    (tmp_path / "latin.csv").write_bytes("clip,mos\né,1\n".encode("latin-1"))
    with pytest.raises(ManifestError, match=r"cannot read .*latin.csv: it is not UTF-8 text"):
        read_labels(tmp_path / "latin.csv")
    with pytest.raises(ResultsError, match=r"cannot read .*r.jsonl"):
        read_scores(tmp_path / "r.jsonl")


# --- lists and scores ------------------------------------------------------------------------------------------------


def test_clip_lists(write: Write) -> None:
    assert read_names(write("a.csv", "Video\r\nb.mp4\r\na.mp4\r\n")) == ("b.mp4", "a.mp4")
    assert read_names(write("a.txt", "b.mp4\n\n a.mp4 \n")) == ("b.mp4", "a.mp4")
    with pytest.raises(ManifestError, match=r"a.txt:3: 'b.mp4' is listed already"):
        read_names(write("a.txt", "b.mp4\na.mp4\nb.mp4\n"))
    with pytest.raises(ManifestError, match=r"a.txt lists no clips"):
        read_names(write("a.txt", "\n"))


@pytest.mark.parametrize("form", [".jsonl", ".csv", ".parquet"])
def test_ratings_written_by_this_package(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"r{form}"
    calibration = {"id": "1234567890123456", "fitted": True, "raw_rater_id": "123e4567"}
    more = {"scale": [0, 5], "std": 0.5, "raw_score": 3.0, "interval": [1.5, 3.5], "calibration": calibration}
    write_rows(path, [rated("a.mp4", 2.5, **more), failed("b.mp4")])
    one, other = read_scores(path)
    assert one == Score(
        clip="a.mp4",
        value=2.5,
        raw=3.0,
        std=0.5,
        interval=(1.5, 3.5),
        scale=(0.0, 5.0),
        content_id="sha256:a.mp4",
        rater_id="123e4567",
        calibrated=True,
        fitted=True,
    )
    assert other == Score("b.mp4", None, "ClipTruncated: 3 of 9 frames")


def test_ratings_in_other_layouts(write: Write) -> None:
    assert read_scores(write("r.txt", "x,1.mp4,2.5\n\nb.mp4,3\n")) == (Score("x,1.mp4", 2.5), Score("b.mp4", 3.0))
    assert read_scores(write("r.csv", "video,score\nb.mp4,3\n")) == (Score("b.mp4", 3.0),)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("r.txt", "a.mp4\n", "r.txt:1: expected name,score, received 'a.mp4'"),
        ("r.txt", "a.mp4,\n", "r.txt:1: expected a finite number, received ''"),
        ("r.txt", "a.mp4,nan\n", "r.txt:1: expected a finite number, received 'nan'"),
        ("r.txt", "a.mp4,1\na.mp4,2\n", r"rates 1 clips more than once \('a.mp4'\): keep one rater's rows"),
        ("r.txt", "", "contains no ratings"),
        ("r.csv", "video,mos\nb.mp4,3\n", "r.csv, row 1: no column is named score; the columns are: video, mos"),
        ("r.csv", "video,score\nb.mp4,\n", "r.csv, row 1: expected a finite number, received None"),
        ("r.xlsx", "", "ratings are .jsonl, .csv, .parquet, or .txt with one line name,score per clip"),
    ],
)
def test_invalid_ratings_are_refused(write: Write, name: str, text: str, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        read_scores(write(name, text))


def test_two_raters_in_one_file_are_refused(write: Write) -> None:
    rows = [rated("a.mp4", 1.0), rated("a.mp4", 2.0) | {"rater_id": "other"}]
    with pytest.raises(ManifestError, match="rates 1 clips more than once"):
        read_scores(write("r.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))


@pytest.mark.parametrize("other", [{}, {"calibration": None}, {"calibration": {"id": "d", "fitted": False}}])
def test_scores_of_two_calibrations_are_refused(tmp_path: Path, other: dict[str, object]) -> None:
    path, calibration = tmp_path / "r.jsonl", {"calibration": {"id": "c", "fitted": False}}
    write_rows(path, [rated("a.mp4", 1.0, **calibration), failed("b.mp4"), rated("c.mp4", 2.0, **calibration)])
    assert len(read_scores(path)) == 3
    write_rows(path, [rated("a.mp4", 1.0, **calibration), rated("c.mp4", 2.0, **other)])
    with pytest.raises(ManifestError, match=r"r\.jsonl mixes calibrated and raw scores, or scores of several"):
        read_scores(path)


# --- joining ---------------------------------------------------------------------------------------------------------


def test_names_match_whole_then_by_file_name_then_without_suffix() -> None:
    assert match(["a/x.mp4", "b/x.mp4"], ["b/x.mp4", "a/x.mp4"]) == {"a/x.mp4": "a/x.mp4", "b/x.mp4": "b/x.mp4"}
    assert match(["x.mp4"], ["clips/x.mp4"]) == {"x.mp4": "clips/x.mp4"}
    assert match(["x"], ["clips/x.mp4"]) == {"x": "clips/x.mp4"}
    assert match(["x_0.5"], ["x_0.mp4"]) == {}


def test_ambiguous_names_do_not_match() -> None:
    assert match(["x.mp4"], ["a/x.mp4", "b/x.mp4"]) == {}
    assert match(["a/x.mp4", "b/x.mp4"], ["x.mp4"]) == {}
    assert match(["a/x.mp4", "b/x.mp4"], ["a/x.mp4", "x.mp4"]) == {"a/x.mp4": "a/x.mp4"}


@pytest.mark.parametrize(
    ("wanted", "given", "fits"),
    [
        ("id01/0.mp4", "/data/a/id01/0.mp4", True),
        ("id01/video/0.mp4", "id02/video/0.mp4", False),
        ("/d/id01/c/0.mp4", "/e/id02/c/0.mp4", False),
        ("id01/0.mp4", "id02/0.mp4", False),
        ("a/id01/0.mp4", "id02/0.mp4", False),
        (r"C:\\data\\id01\\0.mp4", "id01/0.mp4", True),
        (r"id02\\0.mp4", "id01/0.mp4", False),
        ("./clips/0.mp4", "clips/0.mp4", True),
        (unicodedata.normalize("NFC", "vidéo/é.mp4"), unicodedata.normalize("NFD", "vidéo/é.mp4"), True),
        ("ID01/A.MP4", "id01/a.mp4", True),
        ("id01/0", "clips/id01/0.webm", True),
        ("id01/0", "id02/0.webm", False),
        ("0.mp4", "0.mov", False),
    ],
)
def test_names_match_by_the_end_of_their_paths(wanted: str, given: str, fits: bool) -> None:
    assert match([wanted], [given]) == ({wanted: given} if fits else {})
    assert match([given], [wanted]) == ({given: wanted} if fits else {})


def test_the_longest_common_end_counts() -> None:
    wanted = ["x/id01/0.mp4", "y/id01/0.mp4", "A.mp4"]
    given = ["/1/y/id01/0.mp4", "/1/x/id01/0.mp4", "a.mp4", "A.mp4"]
    assert match(wanted, given) == {wanted[0]: given[1], wanted[1]: given[0], "A.mp4": "A.mp4"}


def test_labels_of_another_person_are_not_joined() -> None:
    labels = [Label(f"id01/{number}.mp4", float(number), number) for number in range(8)]
    scores = [Score(f"id02/{number}.mp4", 3.0) for number in range(8)]
    with pytest.raises(ScoresError, match="none of the 8 labelled clips"):
        join(labels, scores)


def test_labels_that_fit_several_clips_are_refused_with_these() -> None:
    scores = [Score("a/0.mp4", 1.0), Score("b/0.mp4", 2.0), Score("1.mp4", 3.0)]
    with pytest.raises(ScoresError, match=r"1 labels cannot be told apart .*'0.mp4', for one, fits a/0.mp4, b/0.mp4"):
        join([Label("0.mp4", 1.0, 0), Label("1.mp4", 1.0, 1)], scores)


@pytest.mark.parametrize(
    ("wanted", "given", "candidates"),
    [
        (["x.mp4"], ["a/x.mp4", "b/x.mp4"], {"x.mp4": ["a/x.mp4", "b/x.mp4"]}),
        (["a/x.mp4", "b/x.mp4"], ["x.mp4"], {"a/x.mp4": ["x.mp4"], "b/x.mp4": ["x.mp4"]}),
        (["A.mp4"], ["x/a.mp4", "y/a.mp4"], {"A.mp4": ["x/a.mp4", "y/a.mp4"]}),
        (["a"], ["a.mp4", "a.mov"], {"a": ["a.mp4", "a.mov"]}),
        (["a/x.mp4"], ["b/x.mp4"], {}),
        (["a/x.mp4", "x.mp4"], ["a/x.mp4"], {}),
    ],
)
def test_ambiguous_names_are_told_with_their_candidates(
    wanted: list[str], given: list[str], candidates: dict[str, list[str]]
) -> None:
    assert ambiguous(wanted, given) == candidates
    assert not set(match(wanted, given)) & set(candidates)


def test_many_names_match_in_a_second() -> None:
    names = [f"person{number % 500}/clip{number // 500}.mp4" for number in range(20_000)]
    found = match(names, [f"/data/set/{name}" for name in reversed(names)])
    assert found == {name: f"/data/set/{name}" for name in names}
    others = [f"other{number}/clip.mp4" for number in range(20_000)]
    assert ambiguous([f"person{number}/clip.mp4" for number in range(20_000)], others) == {}


def test_a_join_reports_what_has_no_match() -> None:
    labels = [Label(clip, mos, clip) for clip, mos in (("b", 1.0), ("a", 2.0), ("gone", 3.0), ("broken", 4.0))]
    scores = [Score("dir/a", 2.5), Score("broken", None, "ClipTruncated: x"), Score("new", 5.0), Score("b", 1.5)]
    found = join(labels, scores)
    assert [(pair.label.clip, pair.score.clip) for pair in found.pairs] == [("b", "b"), ("a", "dir/a")]
    assert (found.mos.tolist(), found.scores.tolist()) == ([1.0, 2.0], [1.5, 2.5])
    assert found.failed == (scores[1],)
    assert (found.missing, found.extra) == (("gone",), ("new",))


def test_a_join_without_any_match_is_refused() -> None:
    with pytest.raises(ScoresError, match=r"none of the 1 labelled clips \(a\) is among the 1 rated ones \(b\)"):
        join([Label("a", 1.0, "a")], [Score("b", 1.0)])


@given(st.lists(st.integers(0, 8), min_size=1, max_size=60), st.integers(1, 5), st.integers(0, 3))
def test_folds_do_not_split_groups(groups: list[int], folds: int, seed: int) -> None:
    if len(set(groups)) < folds:
        with pytest.raises(ScoresError, match=f"{len(set(groups))} groups of clips cannot fill {folds} folds"):
            group_folds(groups, folds, seed)
        return
    fold = group_folds(groups, folds, seed)
    assert set(fold.tolist()) == set(range(folds))
    assert len({(group, place) for group, place in zip(groups, fold.tolist(), strict=True)}) == len(set(groups))
    assert (fold == group_folds(groups, folds, seed)).all()
    sizes = np.bincount(fold, minlength=folds)
    assert sizes.max() - sizes.min() <= max(groups.count(group) for group in groups)
