"""Evaluate a rater on degraded copies of clips that it was not trained on: scores, defects, explanations, robustness.

    lmm-qa degrade CLIPS -o test/labels.jsonl --strengths 0.35,0.75 --pairs 4 --length 3
    python scripts/embedded/evaluate.py test/labels.jsonl --model runs/embedded/model/adapter -o report.json

Scores: SRCC and PLCC with the labels; SRCC within each cause; in how many sources the clean copy scores above the mild
one, and the mild one above the strong one (chance: 1/2, 1/2, and 1/6 for both). Defects: average precision of the
profile and of the classifier alone; whether the times of stalls are right. Explanations: how much of what they name is
present, and how much of what is present they name. Robustness: how far the score moves when nothing visible changes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import average_precision_score

from lmm_qa import Rater, Rating
from lmm_qa.defects.explanation import mentioned_defects
from lmm_qa.degrade.causes import REPRODUCIBLE_X264, encode
from lmm_qa.degrade.dataset import read_clip
from lmm_qa.ratings.rows import Details
from lmm_qa.tables import read_rows
from lmm_qa.training.dataset import Data, load

TIMED_CAUSES = ("stall", "buffering", "bitrate_switch")  # each is also the name of its defect
TOLERANCE = 0.5  # seconds
NO_VISIBLE_LOSS = {**REPRODUCIBLE_X264, "crf": "15"}
LONGEST = 60.0  # seconds
NEGLIGIBLE = 0.15  # change of the score, on a scale from 1 to 5

Truth = Mapping[str, bool]
"""Whether a copy has each defect; defects that are neither present nor absent are left out."""


def evaluate(model: str | None, labels: Path) -> dict[str, Any]:
    """The report on a rater.

    Args:
        model: as for `lmm-qa rate --model`; None: the embedded model.
        labels: manifest of `lmm-qa degrade`.
    """
    rows = read_rows(labels)
    rater = Rater.from_pretrained(model)
    results = [*rate(rater, [labels.parent / row["clip"] for row in rows])]
    truths = read_truths(labels)
    truth = [truths[row["clip"]] for row in rows]
    score, mos = (np.array(each) for each in ([one.score for one in results], [row["mos"] for row in rows]))
    profiles = [one.profile for one in results if one.profile]
    found = average_precisions(truth, [profile.defects for profile in profiles])
    named = [mentioned_defects(one.explanation or "") for one in results]
    right = sum(names.get(name) is True for names, said in zip(truth, named, strict=True) for name in said)
    wrong = sum(names.get(name) is False for names, said in zip(truth, named, strict=True) for name in said)
    present = sum(sum(names.values()) for names in truth)
    return {
        "model": model or "embedded",
        "rater_id": rater.rater_id,
        "copies": len(rows),
        "srcc": correlation(spearmanr, score, mos),
        "plcc": correlation(pearsonr, score, mos),
        "srcc_within_cause": {
            cause: correlation(spearmanr, score[chosen], mos[chosen]) for cause, chosen in by_cause(rows)
        },
        "ordering": {cause: ordering([rows[number] for number in chosen], score[chosen])
                     for cause, chosen in by_cause(rows)},
        "average_precision": found,
        "mean_average_precision": mean([*found.values()]),
        "average_precision_of_classifier": average_precisions(truth, [profile.measured for profile in profiles]),
        "times_within_half_a_second": mean(
            [time_is_right(row, one) for row, one in zip(rows, results, strict=True)
             for cause in TIMED_CAUSES if row["causes"] == [cause]]
        ),
        "explanation_precision": right / max(right + wrong, 1),
        "explanation_recall": right / max(present, 1),
        "explained_by_model": mean([one.explained_by == "model" for one in results]),
        "robustness": robustness(rater, [labels.parent / row["clip"] for row in rows if not row["causes"]]),
    }  # fmt: skip


def rate(rater: Rater, clips: Sequence[Path]) -> Iterator[Rating]:
    """Ratings with defects and explanation; fails with the first clip that cannot be rated."""
    for number, result in enumerate(rater.rate_all(clips, details=Details(defects=True, explanation=True)), 1):
        if not isinstance(result, Rating):
            raise SystemExit(f"{result.clip}: {result.error}")
        yield result
        if number % 100 == 0:
            print(f"{number} of {len(clips)} copies rated", flush=True)


def read_truths(labels: Path) -> dict[str, Truth]:
    """The reference defects of each copy in a manifest, by its name."""
    rows = read_rows(labels)
    table = {"path": str(labels.absolute()), "videos": str(labels.parent.absolute()), "scale": rows[0]["scale"]}
    data = Data.parse({"train": [table], "validation_share": 0, "calibration_share": 0}, str(labels))
    return {
        example.name: {one.defect: True for one in example.found or ()} | dict.fromkeys(example.absent, False)
        for example in load(data, seed=0).train
    }


def average_precisions(truth: Sequence[Truth], predicted: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """Of each defect that is predicted for all copies, and that some copies have and others do not."""
    precisions = {}
    for name in sorted({name for names in truth for name in names}):
        chosen = [number for number, names in enumerate(truth) if name in names]
        labels, values = [truth[number][name] for number in chosen], [predicted[number].get(name) for number in chosen]
        if None not in values and len(set(labels)) == 2:
            precisions[name] = round(float(average_precision_score(labels, values)), 3)
    return precisions


def by_cause(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[int]]]:
    """Each cause, and the numbers of the copies that have it alone, or are clean."""
    for cause in sorted({row["causes"][0] for row in rows if len(row["causes"]) == 1}):
        yield cause, [number for number, row in enumerate(rows) if row["causes"] in ([], [cause])]


def ordering(rows: Sequence[Mapping[str, Any]], score: np.ndarray) -> dict[str, float]:
    """In what share of the sources the scores fall with the strength of a cause."""
    steps: list[tuple[bool, bool]] = []
    for source in {row["source"] for row in rows}:
        numbers = [number for number, row in enumerate(rows) if row["source"] == source]
        scores = [score[number] for number in sorted(numbers, key=lambda number: rows[number]["strengths"])]
        if len(scores) >= 3:
            steps.append((scores[0] > scores[1], scores[1] > scores[-1]))
    return {
        "clean_above_mild": mean([first for first, _ in steps]),
        "mild_above_strong": mean([second for _, second in steps]),
        "both": mean([first and second for first, second in steps]),
    }


def time_is_right(row: Mapping[str, Any], result: Rating) -> bool:
    """Whether both ends of the only degradation of a copy are found within half a second."""
    first, last = row["seconds"][0]
    found = result.profile.found if result.profile else ()
    spans = [span for one in found if one.defect == row["causes"][0] for span in one.seconds]
    return any(abs(a - first) <= TOLERANCE and abs(b - last) <= TOLERANCE for a, b in spans)


def robustness(rater: Rater, clips: Sequence[Path]) -> dict[str, dict[str, float]]:
    """How far the score moves when a clip is encoded again: unchanged, mirrored, and cut by 5% at both ends."""
    before = np.array([one.score for one in rate(rater, clips)])
    changes = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("reencoding", "mirroring", "trimming"):
            paths = []
            for number, clip in enumerate(clips):
                frames, fps, _ = read_clip(clip, LONGEST)
                cut = len(frames) // 20
                versions = {"mirroring": frames[:, :, ::-1].copy(), "trimming": frames[cut : len(frames) - cut]}
                paths.append(Path(folder, f"{name}_{number}.mp4"))
                rate_ = Fraction(fps).limit_denominator(1001)
                encode(versions.get(name, frames), "libx264", NO_VISIBLE_LOSS, rate_, str(paths[-1]))
            moved = np.abs(np.array([one.score for one in rate(rater, paths)]) - before)
            changes[name] = {"median": mean([np.median(moved)]), "largest": mean([moved.max()]),
                             f"share_within_{NEGLIGIBLE}": mean(moved <= NEGLIGIBLE)}  # fmt: skip
    return changes


def correlation(function: Any, first: np.ndarray, second: np.ndarray) -> float | None:
    """Rounded; None where one side is constant."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return round(float(function(first, second)[0]), 4)


def mean(values: Any) -> float:
    """Rounded; NaN of no values."""
    return round(float(np.mean(values)), 3) if len(values) else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", type=Path, help="manifest of lmm-qa degrade")
    parser.add_argument("--model", default=None, help="rater to evaluate; by default the embedded model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    report = evaluate(args.model, args.labels)
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
