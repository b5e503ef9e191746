"""python -m pytest tests/evaluation/test_row_filter.py"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmm_qa.errors import ResultsError, UsageError
from lmm_qa.evaluation.row_filter import Clause, copy_clips, filter_rows
from lmm_qa.files.tables import Row
from lmm_qa.manifest import content_id


def rated(clip: str, score: float, found: tuple[str, ...] | None = (), **more: Any) -> Row:
    """A rating with a probability of 0.9 for the defects found, and 0.1 for others."""
    defects = {name: 0.9 if name in (found or ()) else 0.1 for name in ("blur", "stall", "noise")}
    return {
        "clip": clip,
        "score": score,
        "level": "good" if score > 3 else "poor",
        "video": {"width": 512},
        "calibration": {"fitted": score > 4},
        "defects": None if found is None else defects,
        "found": None if found is None else [{"defect": name, "probability": 0.9} for name in found],
        "error": None,
        **more,
    }


FAILED = {"clip": "broken.mp4", "score": None, "error": {"class": "ClipTruncated", "message": "3 of 9 frames"}}
ROWS = [
    rated("a.mp4", 4.5),
    rated("b.mp4", 3.5, ("blur",)),
    rated("c.mp4", 2.5, ("stall", "blur")),
    rated("d.mp4", 4.0, None),
    FAILED,
]


def kept(condition: str) -> str:
    return "".join(row["clip"][0] for row in filter_rows(ROWS, condition).kept)


@pytest.mark.parametrize(
    ("condition", "clips"),
    [
        ("score >= 3.5", "abd"),
        ("3 < score < 4.2", "bd"),
        ("not stall", "ab"),  # d was not judged
        ("stall", "c"),
        ("blur < 0.3", "a"),
        ("not blur < 0.3", "bc"),  # unknown stays unknown
        ("score >= 3.5 and not stall and blur < 0.3", "a"),
        ("stall or score > 3.9", "acd"),
        ("level == 'good' and video.width >= 512", "abd"),
        ("level in ('poor', 'bad')", "c"),
        ("level not in ['poor']", "abd"),
        ("'b' in clip", "b"),
        ("calibration.fitted", "a"),
        ("not (blur or stall)", "a"),
        ("score > -1", "abcd"),
        ("interval == 3", ""),  # null
    ],
)
def test_conditions(condition: str, clips: str) -> None:
    assert kept(condition) == clips


def test_each_clause_is_counted() -> None:
    result = filter_rows(ROWS, "score >= 3.5 and not stall and blur<0.3")
    assert result.clauses == (Clause("score >= 3.5", 1, 0), Clause("not stall", 1, 1), Clause("blur < 0.3", 2, 1))
    assert result.failed == 1
    assert [clause.text for clause in filter_rows(ROWS, "blur or stall").clauses] == ["blur or stall"]


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("scor >= 3", "no column or defect is named scor; did you mean score"),
        ("video.widht > 3", "did you mean video.width"),
        ("xyzzy", "defects are blur, noise"),
        ("score = 3", "not a condition"),
        ("score >= 3 &&", "not a condition"),
        ("", "not a condition"),
        ("score", "score alone is not a condition"),
        ("score >= '3'", r"compares 4.5 with '3' in the row of 'a.mp4'"),
        ("level > 3", "compares 'good' with 3"),
        ("score in 3", "not iterable"),
        ("score + 1 > 3", r"score \+ 1 is not supported"),
        ("abs(score) > 3", r"abs\(score\) is not supported"),
        ("__import__('os').system('true')", "is not supported"),
        ("(lambda: 1)() > 0", "is not supported"),
        ("score.__class__ == 3", "no column or defect is named score.__class__"),
        ("score is None", "is not supported"),
        ("(" * 500 + "score > 1" + ")" * 500, "not a condition"),
    ],
)
def test_what_is_not_a_condition(condition: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        filter_rows(ROWS, condition)


def test_defects_need_profiles() -> None:
    with pytest.raises(UsageError, match="rate the clips with --defects"):
        filter_rows([rated("a.mp4", 3, None)], "not blur")


@given(
    st.lists(st.tuples(*[st.one_of(st.none(), st.integers(0, 3))] * 3), min_size=1, max_size=8),
    st.recursive(
        st.builds(
            "{} {} {}".format, st.sampled_from("xyz"), st.sampled_from(["<", ">=", "==", "!="]), st.integers(0, 3)
        ),
        lambda inner: st.one_of(
            st.builds("({} and {})".format, inner, inner),
            st.builds("({} or {})".format, inner, inner),
            st.builds("not {}".format, inner),
        ),
        max_leaves=6,
    ),
)
def test_logic_with_nulls_is_that_of_pandas(values: list[tuple[int | None, ...]], condition: str) -> None:
    rows = [{"clip": str(n), "score": 1.0, **dict(zip("xyz", row, strict=True))} for n, row in enumerate(values)]
    table = pandas.DataFrame({name: pandas.array([row[name] for row in rows], dtype="Int64") for name in "xyz"})
    by_pandas = eval(_with_operators(condition), {}, {name: table[name] for name in "xyz"})
    expected = [row["clip"] for row, true in zip(rows, by_pandas.fillna(False), strict=True) if true]
    assert [row["clip"] for row in filter_rows(rows, condition).kept] == expected


def _with_operators(condition: str) -> str:
    """`(x < 1 and not y > 2)` as `((x < 1) & ~(y > 2))`."""
    import ast

    def written(node: ast.expr) -> str:
        match node:
            case ast.BoolOp(op, values):
                return f"({(' | ' if isinstance(op, ast.Or) else ' & ').join(map(written, values))})"
            case ast.UnaryOp(_, operand):
                return f"(~{written(operand)})"
        return f"({ast.unparse(node)})"

    return written(ast.parse(condition, mode="eval").body)


# --- copying ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Files by the name of their clip."""
    made = {}
    for name in ("a.mp4", "person/a.mp4", "../up.mp4", "/abs/b.mp4"):
        path = tmp_path / "clips" / name.strip("./").replace("/", "_")
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
        made[name] = path
    return made


def ratings_of(files: dict[str, Path]) -> list[Row]:
    return [{"clip": name, "content_id": content_id(path)} for name, path in files.items()]


def test_copies_stay_inside_the_folder_and_are_made_once(tmp_path: Path, files: dict[str, Path]) -> None:
    folder = tmp_path / "clean"
    first = copy_clips(ratings_of(files), files, folder)
    assert (first.copied, first.present, first.problems) == (4, 0, ())
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*.mp4")}
    assert names == {"a.mp4", "person/a.mp4", "up.mp4", "abs/b.mp4"}
    assert (folder / "person" / "a.mp4").read_text() == "person/a.mp4"
    again = copy_clips(ratings_of(files), files, folder)
    assert (again.copied, again.present) == (0, 4)


def test_another_file_is_never_overwritten(tmp_path: Path, files: dict[str, Path]) -> None:
    folder = tmp_path / "clean"
    (folder / "person").mkdir(parents=True)
    (folder / "person" / "a.mp4").write_text("mine")
    with pytest.raises(ResultsError, match=r"person/a.mp4 exists and is not the clip person/a.mp4"):
        copy_clips(ratings_of(files), files, folder)
    assert [path.name for path in folder.rglob("*.mp4")] == ["a.mp4"]
    assert (folder / "person" / "a.mp4").read_text() == "mine"


def test_two_clips_with_one_target_are_refused(tmp_path: Path, files: dict[str, Path]) -> None:
    both = {"up.mp4": files["a.mp4"], "../up.mp4": files["../up.mp4"]}
    with pytest.raises(ResultsError, match=r"is not the clip \.\./up.mp4"):
        copy_clips(ratings_of(both), both, tmp_path / "clean")


def test_missing_and_changed_clips_are_listed(tmp_path: Path, files: dict[str, Path]) -> None:
    rows = ratings_of(files)
    files["a.mp4"].write_text("changed")
    del files["../up.mp4"]
    files["/abs/b.mp4"].unlink()
    copies = copy_clips(rows, files, tmp_path / "clean")
    assert copies.copied == 1
    changed, missing, gone = copies.problems
    assert "a.mp4 has changed since it was rated" in changed
    assert "../up.mp4 was not found" in missing
    assert "does not exist" in gone


def test_a_nan_is_not_kept() -> None:
    assert filter_rows([rated("a.mp4", math.nan)], "score > 1").kept == ()
