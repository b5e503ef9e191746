"""python -m pytest tests/evaluation/test_compare.py"""

from __future__ import annotations

import csv
import json
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rating_rows import rating_row, rating_set
from rich.console import Console

from lmm_qa.errors import ScoresError, UsageError
from lmm_qa.evaluation import compare as job
from lmm_qa.evaluation.compare import compare, to_markdown, write
from lmm_qa.evaluation.pairing import RatingSet

COUNT = 40


def generator(folder: Path, name: str, change: float = 0.0, spread: float = 0.3, stalls: int = 0) -> RatingSet:
    """Ratings of the same prompts; the scores of all generators share the difficulty of a prompt."""
    difficulty = np.random.default_rng(0).normal(3, 0.6, COUNT)
    scores = difficulty + change + np.random.default_rng(len(name)).normal(0, spread, COUNT)
    rows = [
        rating_row(f"p{number}.mp4", float(score), ["stall"] if number < stalls else [])
        for number, score in enumerate(scores)
    ]
    return rating_set(folder, name, rows)


def rendered(comparison: job.Comparison) -> str:
    text = StringIO()
    job.render(comparison, Console(file=text, highlight=False, markup=False))
    return text.getvalue()


def test_the_same_set_twice_has_no_difference(tmp_path: Path) -> None:
    old = generator(tmp_path, "old", stalls=3)
    found = compare(old, [old]).sets[0]
    assert (found.difference.value, found.difference.low, found.difference.high) == (0, 0, 0)
    assert (found.decision, found.outcomes, found.superiority) == ("no difference", (0, COUNT, 0), 0.5)
    assert found.verdict == (
        "no difference shown between old and old: +0.00 [+0.00, +0.00] on 40 pairs, which can show one of 0.00"
    )
    assert all((one.gained, one.lost, one.p) == (0, 0, 1) for one in found.defects)


@pytest.mark.parametrize(("change", "decision"), [(0.4, "better"), (-0.4, "worse"), (0.0, "no difference")])
def test_the_verdict_follows_the_interval(tmp_path: Path, change: float, decision: str) -> None:
    old, new = generator(tmp_path, "old"), generator(tmp_path, "newer", change)
    found = compare(old, [new]).sets[0]
    assert found.decision == decision
    assert found.difference.low <= change <= found.difference.high
    first = rendered(compare(old, [new])).splitlines()[0]
    assert first == f"{found.verdict}."
    value, low, high = found.difference.value, found.difference.low, found.difference.high
    beginning = {
        "better": f"newer is better than old by {value:.2f} [{low:.2f}, {high:.2f}] on 40 pairs",
        "worse": f"newer is worse than old by {-value:.2f} [{-high:.2f}, {-low:.2f}] on 40 pairs",
        "no difference": f"no difference shown between old and newer: {value:+.2f} [{low:+.2f}, {high:+.2f}] on 40",
    }
    assert first.startswith(beginning[decision])


def test_numbers_are_those_of_scipy(tmp_path: Path) -> None:
    from scipy import stats

    old, new = generator(tmp_path, "old"), generator(tmp_path, "newer", 0.1)
    found = compare(old, [new], tie=0.0).sets[0]
    before, after = np.array([old.score(at) for at in old.rated]), np.array([new.score(at) for at in new.rated])
    assert found.wilcoxon_p == stats.wilcoxon(after, before).pvalue
    assert found.sign_test_p == stats.binomtest(int((after > before).sum()), COUNT).pvalue
    assert found.superiority == np.mean(after > before)
    assert (found.old_mean, found.new_mean) == pytest.approx((before.mean(), after.mean()))


def test_defects_that_changed_are_in_the_sentence(tmp_path: Path) -> None:
    old, new = generator(tmp_path, "old", stalls=12), generator(tmp_path, "newer", 0.4, stalls=3)
    found = compare(old, [new]).sets[0]
    assert found.verdict.endswith("on 40 pairs; stall 12 -> 3")
    stall = found.defects[0]
    assert (stall.defect, stall.judged, stall.old, stall.new, stall.gained, stall.lost) == ("stall", 40, 12, 3, 0, 9)
    assert stall.p == 2 * 0.5**9  # of three defects, only this one can be tested
    assert {one.defect for one in found.defects} == {"blur", "noise", "stall"}  # movement was not judged


def test_profiles_of_different_kinds_are_not_compared(tmp_path: Path) -> None:
    old = rating_set(tmp_path, "old", [rating_row(f"{n}.mp4", 3 + n / 9, ["blur"]) for n in range(9)])
    new = rating_set(tmp_path, "new", [rating_row(f"{n}.mp4", 3, profile_id="p2") for n in range(9)])
    comparison = compare(old, [new])
    assert comparison.sets[0].defects == ()
    assert "Defects are not compared: the profiles were made in different ways (profile_id p1, p2)." in comparison.notes
    bare = rating_set(tmp_path, "bare", [rating_row(f"{n}.mp4") | {"defects": None, "found": None} for n in range(9)])
    assert "The ratings have no defect profiles: rate the clips with --defects to compare defects too." in (
        compare(bare, [bare]).notes
    )


def test_groups_widen_the_interval(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    effect = np.repeat(rng.normal(0.2, 0.4, 8), 5)
    old = rating_set(tmp_path, "old", [rating_row(f"s{n // 5}_{n}.mp4", 3, speaker=n // 5) for n in range(COUNT)])
    new = rating_set(tmp_path, "new", [rating_row(f"s{n // 5}_{n}.mp4", 3 + effect[n]) for n in range(COUNT)])
    free, by_column, by_name = (compare(old, [new], group=group).sets[0] for group in (None, "speaker", "^(s.)_"))
    assert (free.groups, by_column.groups, by_name.groups) == (COUNT, 8, 8)
    assert by_column.difference == by_name.difference
    width = free.difference.high - free.difference.low
    assert by_column.difference.high - by_column.difference.low > 1.7 * width
    assert by_column.detectable > 1.7 * free.detectable
    assert by_column.wilcoxon_p > free.wilcoxon_p


def test_several_sets_are_corrected(tmp_path: Path) -> None:
    old = generator(tmp_path, "old")
    new = [generator(tmp_path, name, 0.1) for name in ("n1x", "n2xx", "n3xxx")]
    together = compare(old, new).sets
    alone = [compare(old, [each]).sets[0] for each in new]
    assert all(one.wilcoxon_p >= other.wilcoxon_p for one, other in zip(together, alone, strict=True))
    assert max(one.wilcoxon_p / other.wilcoxon_p for one, other in zip(together, alone, strict=True)) == (
        pytest.approx(3)
    )
    for one in together:
        assert one.decision == "no difference" or one.wilcoxon_p < 0.05


def test_clips_that_are_not_compared_are_listed(tmp_path: Path) -> None:
    rows = [rating_row(f"{number}.mp4", 3 + number / 9) for number in range(6)]
    old = rating_set(tmp_path, "old", [*rows, rating_row("only.mp4")])
    new = rating_set(tmp_path, "new", [*rows[:5], rating_row("5.mp4", None), rating_row("more.mp4")])
    comparison = compare(old, [new])
    out = comparison.sets[0].unpaired
    assert (out.failed, out.old, out.new) == ((("5.mp4", "5.mp4"),), ("only.mp4",), ("more.mp4",))
    assert comparison.failed
    text = rendered(comparison)
    for words in ("could not be rated", "no partner, in old", "no partner, in new", "only.mp4", "more.mp4"):
        assert words in text


def test_notes_say_what_the_scores_are_not(tmp_path: Path) -> None:
    old = generator(tmp_path, "old")
    text = rendered(compare(old, [old]))
    assert "The embedded rater judges damage to the signal" in text
    assert "not how natural a generated face is" in text
    assert "not calibrated to human opinions" in text
    calibrated = [rating_row(f"{n}.mp4", 3 + n / 9, model="mine", calibration={"id": "c"}) for n in range(9)]
    mine = rating_set(tmp_path, "mine", calibrated)
    assert compare(mine, [mine]).notes == ()


def test_too_few_pairs_are_refused(tmp_path: Path) -> None:
    old = rating_set(tmp_path, "old", [rating_row("a.mp4"), rating_row("b.mp4")])
    new = rating_set(tmp_path, "new", [rating_row("a.mp4")])
    with pytest.raises(ScoresError, match="old and new cannot be compared: 1 values of 1 groups have no interval"):
        compare(old, [new])


def test_the_largest_differences_come_first(tmp_path: Path) -> None:
    old, new = generator(tmp_path, "old"), generator(tmp_path, "newer")
    found = compare(old, [new]).sets[0]
    sizes = [abs(pair.difference) for pair in found.pairs]
    assert [abs(pair.difference) for pair in found.largest] == sorted(sizes, reverse=True)[:10]


# --- files -----------------------------------------------------------------------------------------------------------


def test_json_contains_everything(tmp_path: Path) -> None:
    comparison = compare(generator(tmp_path, "old"), [generator(tmp_path, "newer", 0.4)])
    write(comparison, tmp_path / "made" / "c.json")
    read = json.loads((tmp_path / "made" / "c.json").read_text())
    (found,) = read["sets"]
    assert (found["verdict"], found["decision"]) == (comparison.sets[0].verdict, "better")
    assert len(found["pairs"]) == COUNT
    assert found["difference"]["low"] == comparison.sets[0].difference.low
    assert (read["seed"], read["resamples"], read["confidence"]) == (0, 10_000, 0.95)


def test_csv_has_a_row_for_each_pair_and_unpaired_clip(tmp_path: Path) -> None:
    rows = [rating_row(f"{number}.mp4", 3 + number / 9) for number in range(6)]
    old = rating_set(tmp_path, "old", [*rows, rating_row("only.mp4")])
    new = rating_set(tmp_path, "new", [*rows[:4], rating_row("4.mp4", 5.0), rating_row("5.mp4", None)])
    write(compare(old, [new]), tmp_path / "c.csv")
    with (tmp_path / "c.csv").open() as file:
        found = [(row["old"], row["outcome"], row["difference"]) for row in csv.DictReader(file)]
    assert [outcome for _, outcome, _ in found] == ["tie"] * 4 + ["win", "failed", "unpaired"]
    assert float(found[4][2]) == pytest.approx(5 - (3 + 4 / 9))


def test_markdown_shows_hostile_names_as_text(tmp_path: Path) -> None:
    name = "a|b <img src=x> [link](http://x) `code` *bold*\n# title.mp4"
    rows = [rating_row(f"{number}.mp4", 3) for number in range(5)]
    old = rating_set(tmp_path, "old", [*rows, rating_row(name, 1)])
    new = rating_set(tmp_path, "new", [*rows, rating_row(name, 5)])
    text = to_markdown(compare(old, [new]))
    assert text.startswith("**no difference shown between old and new: ")
    row = next(line for line in text.splitlines() if "link" in line)
    assert row.startswith(
        r"| a\|b \<img src=x> \[link](http://x) \`code\` \*bold\* \# title.mp4 | 1.00 | 5.00 | +4.00 |"
    )


def test_unknown_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"written as .json, .csv, .md, received 'x.txt'"):
        job.check_output(Path("x.txt"))
