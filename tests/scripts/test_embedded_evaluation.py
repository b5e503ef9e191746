"""python -m pytest tests/scripts/test_embedded_evaluation.py

The report on raters: each measure against scipy, scikit-learn or numbers computed by hand; then real raters.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import SAMPLES, SCRIPTS
from scipy.stats import kendalltau, spearmanr

from lmm_qa.errors import ResultsError, ScoresError
from lmm_qa.files.tables import read_rows, write_rows

LEVELS = ("bad", "poor", "fair", "good", "excellent")


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


def copy(source: str, causes: Sequence[str] = (), strengths: Sequence[float] = (), **columns: Any) -> dict[str, Any]:
    """A row of a manifest. By default the MOS falls by 4 times the strength."""
    name = "--".join([source, *(f"{cause}-{strength}" for cause, strength in zip(causes, strengths, strict=True))])
    mos = 5 - 4 * max(strengths, default=0)
    return {"clip": f"{name}.mp4", "mos": mos, "group": source, "source": source, "causes": list(causes),
            "strengths": list(strengths), "scale": [1.0, 5.0], "seconds": [[0.0, 3.0] for _ in causes],
            **columns}  # fmt: skip


def rating(score: float = 3.0, level: str = "fair", **columns: Any) -> dict[str, Any]:
    """A row of a file of ratings."""
    return {"score": score, "level": level, "probabilities": dict.fromkeys(LEVELS, 0.2), "scale": [1.0, 5.0],
            "defects": {}, "found": [], **columns}  # fmt: skip


def known(rows: Sequence[dict[str, Any]], truths: Sequence[dict[str, bool]] | None = None) -> Any:
    from embedded.evaluate import Copies

    return Copies(rows, truths or [{} for _ in rows])


def values(measures: Iterable[Any]) -> dict[str, float]:
    return {one.name: one.value for one in measures}


def ladder_rows(sources: int, causes: Sequence[str], seed: int = 0) -> tuple[list[dict[str, Any]], Any]:
    """A clean copy and five strengths of each cause for each source, and noisy scores."""
    rng = np.random.default_rng(seed)
    rows = [row for number in range(sources) for row in (
        copy(f"source {number}"),
        *(copy(f"source {number}", [cause], [strength]) for cause in causes for strength in (0.1, 0.3, 0.5, 0.7, 0.9)),
    )]  # fmt: skip
    mos = np.array([row["mos"] for row in rows])
    return rows, mos + rng.normal(0, 0.8, len(rows))


# --- resampling ------------------------------------------------------------------------------------------------------


def test_a_resample_contains_all_items_of_the_drawn_sources() -> None:
    from embedded.evaluate import RESAMPLES, source_weights

    weights = source_weights(["a", "b", "a", "c", "a"])
    assert weights.shape == (RESAMPLES, 5)
    assert np.array_equal(weights[:, 0], weights[:, 2]) and np.array_equal(weights[:, 0], weights[:, 4])
    assert (weights[:, [0, 1, 3]].sum(axis=1) == 3).all()


def test_the_interval_of_a_mean_agrees_with_theory() -> None:
    from embedded.evaluate import mean

    numbers = np.random.default_rng(0).normal(2, 1, 200)
    (found,) = mean("", "", numbers.tolist(), [str(number) for number in range(200)])
    assert found.value == pytest.approx(numbers.mean())
    assert found.interval() == pytest.approx(numbers.mean() + np.array([-1.96, 1.96]) / np.sqrt(200), abs=0.03)


def test_one_source_has_no_interval() -> None:
    from embedded.evaluate import mean

    (found,) = mean("", "", [1.0, 0.0], ["a", "a"])
    assert (found.value, found.interval()) == (0.5, None)
    assert not [*mean("", "", [], [])]


def test_differences_are_paired() -> None:
    from embedded.evaluate import agreement, compare

    rows, scores = ladder_rows(12, ["blur", "seam"])
    copies = known(rows)
    better = 0.7 * scores + 0.3 * copies.mos
    found = compare({"old": [*agreement(copies, scores)], "same": [*agreement(copies, scores)],
                     "new": [*agreement(copies, better)]})  # fmt: skip
    srcc = next(one for one in found if one["measure"] == "SRCC, all causes")
    same, new = srcc["differences"]["same"], srcc["differences"]["new"]
    assert (same["value"], same["low"], same["high"]) == (0, 0, 0)
    assert new["value"] == pytest.approx(srcc["values"]["new"]["value"] - srcc["values"]["old"]["value"], abs=1e-4)
    assert new["low"] > 0
    widths = {rater: each["high"] - each["low"] for rater, each in srcc["values"].items()}
    assert new["high"] - new["low"] < widths["old"]
    assert "target" not in new and srcc["values"]["new"]["target"] == 0.7


# --- scores ----------------------------------------------------------------------------------------------------------


def test_correlations_are_over_copies_that_have_only_causes_of_the_set() -> None:
    from embedded.evaluate import agreement

    rows, scores = ladder_rows(4, ["blur", "jpeg", "seam"])
    rows += [copy("source 0", ["seam", "jpeg"], [0.3, 0.3]), copy("source 0", ["blur", "h264"], [0.3, 0.9])]
    scores = np.append(scores, [1.0, 5.0])
    found, mos = values(agreement(known(rows), scores)), np.array([row["mos"] for row in rows])
    sets: dict[str, Callable[[set[str]], bool]] = {
        "all causes": lambda causes: True,
        "seven main causes": lambda causes: not causes & {"jpeg", "seam"},
        "head": lambda causes: not causes & {"jpeg", "blur", "h264"},
    }
    for name, belongs in sets.items():
        chosen = [number for number, row in enumerate(rows) if belongs(set(row["causes"]))]
        assert found[f"SRCC, {name}"] == pytest.approx(spearmanr(scores[chosen], mos[chosen]).statistic)
        assert found[f"main score, {name}"] == pytest.approx((found[f"SRCC, {name}"] + found[f"PLCC, {name}"]) / 2)
        within = [[number for number in chosen if rows[number]["source"] == f"source {source}"] for source in range(4)]
        expected = np.mean([spearmanr(scores[numbers], mos[numbers]).statistic for numbers in within])
        assert found[f"mean SRCC within a source, {name}"] == pytest.approx(expected)


def test_within_a_cause_clean_copies_of_other_sources_do_not_count() -> None:
    from embedded.evaluate import agreement_within_causes

    rows, scores = ladder_rows(3, ["seam"])
    rows, scores = [*rows, copy("other")], np.append(scores, 1.0)
    found = {one.name: one for one in agreement_within_causes(known(rows), scores, {"seam"})}
    assert found.keys() == {"seam"} and found["seam"].n == 18 and found["seam"].target == 0.5
    expected = spearmanr(scores[:-1], [row["mos"] for row in rows[:-1]]).statistic
    assert found["seam"].value == pytest.approx(expected)


def test_ladders_are_ordered_by_strength_from_the_clean_copy() -> None:
    from embedded.evaluate import ladders

    rows = [copy("a"), *(copy("a", ["blur"], [strength]) for strength in (0.9, 0.1, 0.5)),
            copy("b"), *(copy("b", ["blur"], [strength]) for strength in (0.1, 0.5, 0.9)),
            copy("a", ["seam"], [0.1]), copy("a", ["seam"], [0.9]),
            copy("b", ["seam"], [0.1]), copy("a", ["blur", "jpeg"], [0.9, 0.9])]  # fmt: skip
    scores = np.array([5, 1, 4, 3, 4.0, 4, 5, 2, 5, 5, 1, 1])
    found = {one.name: one for one in ladders(known(rows), scores)}
    on_b = kendalltau([0, 0.1, 0.5, 0.9], [-4, -4, -5, -2]).statistic
    assert found["blur"].value == pytest.approx((1 + on_b) / 2) and found["blur"].n == 2
    assert found["seam"].value == 0 and found["seam"].n == 1  # constant; and b has one strength alone
    assert found["causes of group picture"].value == found["blur"].value
    assert found["causes of group head"].value == found["seam"].value
    assert (found["blur"].target, found["seam"].target) == (0.9, 0.7)


def test_sameness_is_measured_on_a_scale_of_five_levels() -> None:
    from embedded.evaluate import sameness

    clean = ["a.mp4", "b.mp4", "c.mp4"]
    ratings = {clip: rating(60, scale=[0, 100]) for clip in clean}
    moved = zip(clean, (62, 57, 50), strict=True)
    ratings |= {f"variants/mirrored/{clip}": rating(score, scale=[0, 100]) for clip, score in moved}
    phase = {"a.mp4": rating(60, scale=[0, 100]), "b.mp4": {"score": None}}
    found = values(sameness(ratings, phase, clean, ["mirrored", "trimmed"]))
    assert found == pytest.approx({
        "mirrored: share within 0.15": 2 / 3, "mirrored: median change": 0.12, "mirrored: largest change": 0.4,
        "phase: share within 0.15": 1, "phase: median change": 0, "phase: largest change": 0,
    })  # fmt: skip


def test_spread_of_real_clips() -> None:
    from embedded.evaluate import real_spread

    scores = [1.0, 2.0, 2.5, 4.0, 4.5]
    ratings = {str(number): rating(score) for number, score in enumerate(scores)} | {"failed": {"score": None}}
    found = values(real_spread(ratings, [*ratings]))
    assert found == pytest.approx({"minimum": 1, "first quartile": 2, "median": 2.5, "third quartile": 4,
                                   "maximum": 4.5, "standard deviation": np.std(scores)})  # fmt: skip


# --- defects ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_is_that_of_scikit_learn(seed: int) -> None:
    from embedded.evaluate import average_precision
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(seed)
    present, scores = rng.random(40) < 0.3, rng.integers(0, 12, 40) / 12
    weights = rng.integers(0, 4, (20, 40))
    expected = [average_precision_score(present, scores, sample_weight=row) for row in weights]
    assert average_precision(present, scores, weights) == pytest.approx(expected)
    assert np.isnan(average_precision(present, scores, weights * ~present)).all()


def test_profile_of_a_cause_of_the_head_ignores_other_causes_of_its_defect() -> None:
    from embedded.evaluate import profile_precision
    from sklearn.metrics import average_precision_score

    rows = [copy("a"), copy("b"), copy("a", ["mouth_smear"], [0.9]), copy("b", ["teeth_smear"], [0.9]),
            copy("b", ["teeth_smear"], [0.1]), copy("a", ["blur"], [0.9])]  # fmt: skip
    truths = [{"mouth": False, "blur": False}, {"mouth": False, "blur": False}, {"mouth": True}, {"mouth": True},
              {"blur": False}, {"mouth": False, "blur": True}]  # fmt: skip
    mouth, blur = (0.1, 0.6, 0.9, 0.2, 1.0, 0.3), (0.1, 0.2, 0.3, 0.1, 0.2, 0.9)
    rated = [rating(defects={"mouth": m, "blur": b, "noise": None}) for m, b in zip(mouth, blur, strict=True)]
    found = values(profile_precision(known(rows, truths), rated))
    assert found["mouth"] == pytest.approx(average_precision_score([0, 0, 1, 1, 0], [0.1, 0.6, 0.9, 0.2, 0.3]))
    assert found["blur"] == 1
    assert found["mean over the defects"] == pytest.approx((found["mouth"] + 1) / 2)
    assert found["mouth_smear"] == 1
    assert found["teeth_smear"] == pytest.approx(average_precision_score([0, 0, 1, 0], [0.1, 0.6, 0.2, 0.3]))


def test_level_and_profile_contradict_each_other_if_a_sure_and_strong_defect_leaves_it_good() -> None:
    from embedded.evaluate import no_contradiction

    cases = [
        (copy("a", ["seam"], [0.7]), "good", {"seam": 0.95}),  # contradiction
        (copy("a", ["blur"], [0.6]), "fair", {"blur": 0.95}),
        (copy("b", ["seam", "jpeg"], [0.9, 0.1]), "bad", {"seam": 0.91}),
        (copy("b", ["noise"], [0.7], mos=3.6), "poor", {"noise": 0.99}),
        (copy("a", ["seam"], [0.5]), "good", {"seam": 0.95}),  # not strong
        (copy("a", ["seam"], [0.9]), "good", {"seam": 0.9}),  # not sure
        (copy("a", ["seam"], [0.9]), "good", {"blur": 0.95}),  # another defect
        (copy("a"), "excellent", {"seam": 0.95}),
    ]
    rows, rated = [row for row, _, _ in cases], [rating(level=level, defects=found) for _, level, found in cases]
    found = {one.name: one for one in no_contradiction(known(rows), rated)}
    assert {name: (one.n, one.value) for name, one in found.items()} == {
        "all": (4, 0.75), "labels of the same copies": (4, 0.75), "causes of group head": (2, 0.5),
        "causes of group picture": (2, 1.0),
    }  # fmt: skip


def test_both_ends_of_a_stall_must_be_found() -> None:
    from embedded.evaluate import times

    row = copy("a", ["stall"], [0.5], seconds=[[1.0, 2.0]])
    spans = [[[1.4, 2.4]], [[1.0, 2.6]], [[0.0, 0.1], [1.0, 2.0]], None, []]
    rated = [rating(found=[{"defect": "stall", "seconds": each}]) for each in spans]
    rated += [rating(found=[{"defect": "buffering", "seconds": [[1.0, 2.0]]}])]
    assert values(times(known([row] * 6), rated)) == pytest.approx({"stall": 2 / 6})


def test_precision_and_recall_of_explanations() -> None:
    from embedded.evaluate import explanations

    truths = [{"blur": True, "noise": True}, {"blur": False, "noise": False}, {"noise": False}]
    texts = ["poor: blur spoils the picture", "fair: noise", "fair: blur"]  # the last is neither right nor wrong
    rated = [rating(explanation=f"The quality of this video is {text}.", explained_by="model") for text in texts]
    rated[2]["explained_by"] = "empty"
    copies = known([copy(source) for source in "abc"], truths)
    assert values(explanations(copies, rated)) == pytest.approx(
        {"precision": 0.5, "recall": 0.5, "written by the model": 2 / 3}
    )
    assert not [*explanations(copies, [rating()] * 3)]


# --- the table -------------------------------------------------------------------------------------------------------


def test_the_table_says_which_targets_are_met() -> None:
    from embedded.evaluate import Measure, compare, markdown

    resampled = np.linspace(0.5, 1, 1000)
    measures = {
        "old": [Measure("Agreement", "SRCC", 9, 0.75, resampled, 0.8), Measure("Times", "stall", 2, 1.0)],
        "new": [Measure("Agreement", "SRCC", 9, 0.85, resampled + 0.1, 0.8)],
    }
    raters = {name: {"model": name, "rater_id": "0", "failed": {}} for name in measures}
    lines = markdown({"copies": 9, "sources": 3, "raters": raters, "measures": compare(measures)}).splitlines()
    assert lines[-4:] == [
        "| **Agreement** | | | | | |",
        "| SRCC | 9 | 0.80 | 0.75 [0.51, 0.99] **not met** | 0.85 [0.61, 1.09] met | +0.10 [+0.10, +0.10] |",
        "| **Times** | | | | | |",
        "| stall | 2 |  | 1.00 | - | - |",
    ]


# --- real raters -----------------------------------------------------------------------------------------------------


def sample_copies(folder: Path) -> Path:
    """A manifest of five samples."""
    folder.mkdir()
    rows = []
    for name, causes in {"clean": [], "blur_mild": ["blur"], "blur_strong": ["blur"], "noise_mild": ["noise"],
                         "noise_strong": ["noise"]}.items():  # fmt: skip
        strengths = [0.8 if "strong" in name else 0.3 for _ in causes]
        row = copy("astronaut", causes, strengths, seed=0, quality=1.0, defects=causes)
        shutil.copyfile(SAMPLES / f"astronaut_{name}.mp4", folder / row["clip"])
        rows.append(row)
    write_rows(folder / "labels.jsonl", rows)
    return folder / "labels.jsonl"


@pytest.mark.slow
def test_nothing_is_rated_twice_and_files_of_ratings_stand_for_their_rater(tmp_path: Path) -> None:
    from embedded.evaluate import VARIANTS, evaluate

    labels, work = sample_copies(tmp_path / "test"), tmp_path / "work"
    (tmp_path / "real").mkdir()
    shutil.copyfile(SAMPLES / "avatar_clean.mp4", tmp_path / "real" / "avatar.mp4")
    (tmp_path / "real" / "broken.mp4").write_bytes(b"no video")
    report = evaluate({"old": None}, labels, work, real=tmp_path / "real")
    json.dumps(report, allow_nan=False)
    assert report["copies"] == 5 and report["raters"]["old"]["failed"].keys() == {"real/broken.mp4"}
    rows = read_rows(work / "old.jsonl")
    assert len(rows) == 5 + len(VARIANTS) + 2 and all(row["defects"] for row in rows if not row["error"])
    found = {one["measure"]: one["values"]["old"]["value"] for one in report["measures"]}
    assert found["blur"] == 1 and found["remuxed: largest change"] < 0.001 < found["phase: largest change"]
    (real,) = (one for one in report["real_clips"] if one["clip"] == "avatar.mp4")
    assert real["old"]["score"] == pytest.approx(found["maximum"], abs=1e-4)

    (work / "old.jsonl").write_text("".join((work / "old.jsonl").read_text().splitlines(keepends=True)[:-3]))
    files = {path: path.stat().st_mtime_ns for path in work.rglob("*.m*")}
    again = evaluate({"old": None}, labels, work, real=tmp_path / "real")
    assert again == report and files == {path: path.stat().st_mtime_ns for path in work.rglob("*.m*")}

    both = evaluate({"old": work / "old.jsonl", "new": None}, labels, work, real=tmp_path / "real")
    assert {one["values"].keys() == {"old", "new"} for one in both["measures"]} == {True}
    differences = [one["differences"]["new"]["value"] for one in both["measures"]]
    assert differences == pytest.approx([0] * len(differences), abs=1e-4)
    with pytest.raises(ScoresError, match="lacks 4 of the copies"):
        evaluate({"old": work / "old.phase.jsonl"}, labels, work)
    with pytest.raises(ResultsError, match="another rater"):
        (work / "new.jsonl").write_text((work / "old.phase.jsonl").read_text())
        evaluate({"new": None}, labels, work)
