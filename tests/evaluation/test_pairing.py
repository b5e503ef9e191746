"""python -m pytest tests/evaluation/test_pairing.py"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from rating_rows import rating_row, rating_set

from lmm_qa.errors import ResultsError, ScoresError, UsageError
from lmm_qa.evaluation.pairing import Pairing, RatingSet, check_same_rater, pair_sets
from lmm_qa.files.tables import write_rows


def sets(folder: Path, old: Sequence[str], new: Sequence[str]) -> tuple[RatingSet, RatingSet]:
    return (
        rating_set(folder, "old", [rating_row(clip) for clip in old]),
        rating_set(folder, "new", [rating_row(clip) for clip in new]),
    )


def names(old: RatingSet, new: RatingSet, pairing: Pairing) -> list[tuple[str, str]]:
    return [(old.ratings[one].clip, new.ratings[other].clip) for one, other in pairing.pairs]


def test_clips_are_paired_by_name(tmp_path: Path) -> None:
    old, new = sets(tmp_path, ["b.mp4", "a.mp4", "x/c.mp4", "gone.mp4"], ["a.mp4", "b.mp4", "x/c.mp4", "more.mp4"])
    pairing = pair_sets(old, new)
    assert names(old, new, pairing) == [("b.mp4", "b.mp4"), ("a.mp4", "a.mp4"), ("x/c.mp4", "x/c.mp4")]
    assert (pairing.failed, pairing.unpaired_old, pairing.unpaired_new) == ((), (3,), (3,))


def test_clips_are_paired_by_stem(tmp_path: Path) -> None:
    old, new = sets(tmp_path, ["one/a.mp4", "b.mp4", "x/c.mp4", "y/c.mp4"], ["two/a.webm", "b.mkv", "c.mp4"])
    pairing = pair_sets(old, new, "stem")
    assert names(old, new, pairing) == [("one/a.mp4", "two/a.webm"), ("b.mp4", "b.mkv")]
    assert (pairing.unpaired_old, pairing.unpaired_new) == ((2, 3), (2,))  # c is not unique


def test_thqa_names_are_paired_across_generators(tmp_path: Path) -> None:
    old, new = sets(
        tmp_path,
        ["14_dalle3_common_voice_en_35729059_audio2head.mp4", "8_voice_en_34939394_wavlip.mp4", "mine.mp4"],
        ["8_voice_en_34939394_sadtalker.mp4", "14_dalle3_common_voice_en_35729059_iplap.mp4", "mine.mp4"],
    )
    pairing = pair_sets(old, new, "thqa")
    assert pairing.pairs == ((0, 1), (1, 0))
    assert (pairing.unpaired_old, pairing.unpaired_new) == ((2,), (2,))


def test_clips_are_paired_by_a_column(tmp_path: Path) -> None:
    old = rating_set(tmp_path, "old", [rating_row("a.mp4", prompt_id=7), rating_row("b.mp4", prompt_id=8)])
    new = rating_set(tmp_path, "new", [rating_row("c.mp4", prompt_id=8), rating_row("d.mp4")])
    pairing = pair_sets(old, new, "column=prompt_id")
    assert names(old, new, pairing) == [("b.mp4", "c.mp4")]
    assert (pairing.unpaired_old, pairing.unpaired_new) == ((0,), (1,))


def test_clips_are_paired_by_a_table(tmp_path: Path) -> None:
    old, new = sets(tmp_path, ["a.mp4", "b.mp4"], ["x.mp4", "y.mp4"])
    table = tmp_path / "pairs.csv"
    table.write_text("old,new\nb.mp4,x.mp4\na.mp4,y.mp4\n")
    assert names(old, new, pair_sets(old, new, f"mapping={table}")) == [("a.mp4", "y.mp4"), ("b.mp4", "x.mp4")]
    table.write_text("old,new\nb.mp4,x.mp4\nb.mp4,y.mp4\n")
    with pytest.raises(UsageError, match=r"lists b\.mp4 more than once in the column old"):
        pair_sets(old, new, f"mapping={table}")
    table.write_text("old,new\nb.mp4,z.mp4\n")
    with pytest.raises(UsageError, match=r"lists 1 clips in the column new that .*new\.jsonl does not contain: z\.mp4"):
        pair_sets(old, new, f"mapping={table}")


def test_pairs_with_a_failed_clip_are_counted(tmp_path: Path) -> None:
    old = rating_set(tmp_path, "old", [rating_row("a.mp4"), rating_row("b.mp4"), rating_row("c.mp4", None)])
    new = rating_set(tmp_path, "new", [rating_row("a.mp4", None), rating_row("b.mp4"), rating_row("c.mp4")])
    pairing = pair_sets(old, new)
    assert (pairing.pairs, pairing.failed) == (((1, 1),), ((0, 0), (2, 2)))
    assert (old.failed, new.failed) == (("c.mp4",), ("a.mp4",))


def test_sets_without_a_pair_are_refused(tmp_path: Path) -> None:
    old, new = sets(tmp_path, ["p1_gen1.mp4"], ["p1_gen2.mp4"])
    with pytest.raises(ScoresError, match=r"no clip of old \(p1_gen1.mp4\) has a partner by name in new \(p1_gen2"):
        pair_sets(old, new)


@pytest.mark.parametrize("by", ["", "names", "column", "column=", "stem=3"])
def test_unknown_ways_of_pairing_are_refused(tmp_path: Path, by: str) -> None:
    old, new = sets(tmp_path, ["a.mp4"], ["a.mp4"])
    with pytest.raises(UsageError, match="--pair is name, stem, thqa, column=NAME or mapping=FILE, received"):
        pair_sets(old, new, by)


def test_clips_that_are_rated_twice_are_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "r.jsonl", [rating_row("a.mp4"), rating_row("a.mp4", rater_id="r2")])
    with pytest.raises(ResultsError, match=r"rates 1 clips more than once \(a.mp4\): keep the rows of one rater"):
        RatingSet.read(tmp_path / "r.jsonl", "r")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": "runs/thqa"}, r"they differ in model \('embedded' and 'runs/thqa'\)"),
        ({"prompt": "How good is it?"}, r"they differ in prompt \('Rate it.' and 'How good is it\?'\)"),
        ({"scale": [0.0, 5.0]}, r"they differ in scale \(\(1.0, 5.0\) and \(0.0, 5.0\)\)"),
        ({"calibration": {"id": "c1"}}, r"they differ in calibration \(none and 'c1'\)"),
        ({}, "the weights, dtype, sampling or views differ, which the ratings do not name"),
    ],
)
def test_ratings_of_different_raters_are_refused(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    old = rating_set(tmp_path, "old", [rating_row("a.mp4")])
    new = rating_set(tmp_path, "new", [rating_row("a.mp4", rater_id="r2", **change)])
    message = rf"old and new were not made by the same rater \(rater_id r1 and r2\): {reason}"
    with pytest.raises(ScoresError, match=message):
        check_same_rater([old, new])
    mixed = rating_set(tmp_path, "mixed", [rating_row("a.mp4"), rating_row("b.mp4", rater_id="r2", **change)])
    with pytest.raises(ScoresError, match="mixed contains ratings that were not made by the same rater"):
        check_same_rater([mixed])
    check_same_rater([old, old])
