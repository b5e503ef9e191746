"""Does the embedded model find the defects, and name them? Calibrate its answers on held-out clips, or judge them.

    lmm-qa degrade VAL_CLIPS -o val/labels.jsonl --strengths 0.35,0.75 --pairs 4 --length 3
    python scripts/embedded_defects.py fit --labels val/labels.jsonl -o defects.json

    lmm-qa degrade TEST_CLIPS -o test/labels.jsonl --strengths 0.35,0.75 --pairs 4 --length 3
    python scripts/embedded_defects.py judge --labels test/labels.jsonl -o report.json

`fit`: a logistic function a defect (Platt, 1999) of the model's answer and of what was measured, by maximum likelihood,
and the threshold of the best F1, but at least `SURE`. Answers that do not help beside what was measured get no weight,
and are not asked for in use; defects of an average precision below 0.3 are left out, and so not judged.

`judge`: average precision of each defect that some copy has, also of those that the rater does not judge in use (from
answers and measurements as they are), and of the measurements alone; precision and recall of what the explanations
name; how often times of stalls, bufferings and bit-rate switches are right within half a second at both ends; how many
explanations were the model's own; SRCC of the score with the labels, over all and within each cause (clean copies count
as strength 0).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.stats import pearsonr, spearmanr

from lmm_qa.defects import UNCALIBRATED, DefectCalibration, Logistic, truth
from lmm_qa.explain import mentions
from lmm_qa.results import read_rows

Floats = NDArray[np.float64]
VISIBLE_LOSS = 0.05  # a damage that costs less of the quality is neither asserted nor denied
WITHIN = 0.5  # seconds
JUDGED = 0.3  # average precision below which a defect is not judged
SURE = 0.25  # probability from which on a defect may be said to be there: see `trade_off`
HELPS = 0.02  # share of the loss by which the model's answers must lower it


def average_precision(scores: Floats, there: NDArray[np.bool_]) -> float:
    """Mean of the precisions at each copy that has the defect, the likeliest first."""
    ordered = there[np.argsort(-scores, kind="stable")]
    precision = np.cumsum(ordered) / np.arange(1, len(ordered) + 1)
    return float(precision[ordered].mean())


def fit_one(odds: Floats, measured: Floats, there: NDArray[np.bool_]) -> Logistic:
    """Maximum likelihood of slope, weight of what was measured, and intercept (the first two held small alike, so that
    either may err where they agree); then the threshold of the best F1."""

    def fitted(most: float) -> tuple[float, NDArray[np.float64]]:
        def loss(values: Floats) -> float:
            z = values[0] * odds + values[1] * measured + values[2]
            return float(np.mean(np.logaddexp(0, np.where(there, -z, z)))) + 1e-3 * float(np.square(values[:2]).sum())

        start = np.array([min(1.0, most), 0.5, 0.0])
        found = minimize(loss, start, bounds=[(0, most), (0, 6 if measured.any() else 0), (-12, 12)], method="L-BFGS-B")
        return float(found.fun), found.x

    (without, least), (with_answers, best) = fitted(0.0), fitted(5.0)
    slope, weight, intercept = (float(value) for value in (best if with_answers < (1 - HELPS) * without else least))
    p = 1 / (1 + np.exp(-(slope * odds + weight * measured + intercept)))
    limits = np.unique(np.clip(p, 0.02, 0.98))
    f1 = np.array([2 * (there & (p >= limit)).sum() / max(there.sum() + (p >= limit).sum(), 1) for limit in limits])
    return Logistic(
        slope=round(slope, 4),
        measured=round(weight, 4),
        intercept=round(intercept, 4),
        threshold=round(float(limits[f1 == f1.max()].max()), 4),
        average_precision=round(average_precision(p, there), 4),
    )


def trade_off(judged: dict[str, Logistic], samples: Mapping[str, Sequence[tuple[float, float, bool]]]) -> str:
    """Precision and recall of what is said to be there, over all defects, with this and that for `SURE`."""
    calibration, lines = DefectCalibration(defects=judged), []
    for sure in (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5):
        said = right = due = 0
        for name, kept in samples.items():
            due += sum(there for _, _, there in kept)
            if how := judged.get(name):
                p = np.array([calibration.probability(name, odds, measured) for odds, measured, _ in kept])
                found = p >= max(how.threshold, sure)
                said, right = said + int(found.sum()), right + int(found[[there for _, _, there in kept]].sum())
        lines.append(f"least threshold {sure}: precision {right / max(said, 1):.3f}, recall {right / max(due, 1):.3f}")
    return "\n".join(lines)


def known(row: dict[str, Any]) -> dict[str, bool | None]:
    """Which defects a copy has; a single damage that costs next to nothing is neither asserted nor denied."""
    found = truth(zip(row["causes"], row["strengths"], strict=True))
    if len(row["causes"]) == 1 and row["quality"] > (1 - VISIBLE_LOSS) * row["ceiling"]:
        found = {name: None if there else there for name, there in found.items()}
    return found


def rated(labels: Path, rater: Any, explanation: bool) -> Iterator[tuple[dict[str, Any], Any]]:
    """Rows of a labelled set of `lmm-qa degrade`, and the rating of each."""
    from lmm_qa import Rating
    from lmm_qa.rater import Details

    rows = read_rows(labels)
    details = Details(defects=True, explanation=explanation)
    results = rater.rate_all([labels.parent / row["clip"] for row in rows], details=details)
    for number, (row, result) in enumerate(zip(rows, results, strict=True)):
        if not isinstance(result, Rating):
            raise SystemExit(f"{row['clip']}: {result.error}")
        yield row, result
        if number % 100 == 0:
            print(f"{number}/{len(rows)} files", flush=True)


def fit(args: argparse.Namespace) -> None:
    from lmm_qa import Rater

    rater = Rater.from_pretrained(args.model)
    rater.defect_calibration = UNCALIBRATED  # which is asked about all of them
    samples: dict[str, list[tuple[float, float, bool]]] = {name: [] for name in truth([])}
    copies = [*rated(args.labels, rater, explanation=False)]
    for row, result in copies:
        for name, there in known(row).items():
            if there is not None:
                samples[name].append((result.profile.log_odds[name], result.profile.measured.get(name, 0.0), there))
    judged = {}
    for name, kept in samples.items():
        if len({there for _, _, there in kept}) < 2:
            print(f"{name:<16} not fitted: all of {len(kept)} copies have it, or none has", flush=True)
            continue
        odds, measured, there = (np.array(column) for column in zip(*kept, strict=True))
        fitted = fit_one(odds, measured, there.astype(bool))
        print(f"{name:<16}{there.sum():>5} of {len(there):<6} {fitted}", flush=True)
        if (fitted.average_precision or 0) >= JUDGED:
            judged[name] = fitted
    print(trade_off(judged, samples))
    # These copies are damaged far more often than clips are.
    judged = {name: how.model_copy(update={"threshold": max(SURE, how.threshold)}) for name, how in judged.items()}
    calibration = DefectCalibration(
        defects=judged, data=f"{len(copies)} held-out copies of clips of the split val: scripts/embedded_defects.py"
    )
    args.output.write_text(calibration.model_dump_json(indent=2) + "\n")


def in_time(row: dict[str, Any], found: Sequence[Any], cause: str, defect: str) -> bool:
    """Whether both ends of a damage are known within half a second."""
    first, last = row["seconds"][row["causes"].index(cause)]
    spans = [span for one in found if one.defect == defect for span in one.seconds]
    return any(abs(a - first) <= WITHIN and abs(b - last) <= WITHIN for a, b in spans)


def each_precision(
    truths: Sequence[dict[str, bool | None]], read: Sequence[Mapping[str, float | None]]
) -> dict[str, float]:
    """Average precision of each defect that some copy has and that was judged."""
    found = {}
    for name in truths[0]:
        asked = [number for number, each in enumerate(truths) if each[name] is not None]
        there = np.array([truths[number][name] for number in asked], bool)
        p = [read[number][name] for number in asked]
        if there.any() and None not in p:
            found[name] = round(average_precision(np.array(p, float), there), 3)
    return found


def judge(args: argparse.Namespace) -> None:
    from lmm_qa import Rater

    rater = Rater.from_pretrained(args.model)
    rows, results = zip(*rated(args.labels, rater, explanation=True), strict=True)
    truths = [known(row) for row in rows]
    report: dict[str, Any] = {"model": args.model or "embedded", "rater_id": rater.rater_id, "clips": len(rows)}
    precisions = each_precision(truths, [result.profile.defects for result in results])
    report["average_precision"] = precisions
    report["mean_average_precision"] = round(float(np.mean(list(precisions.values()))), 3)
    alone = each_precision(truths, [result.profile.measured for result in results])
    report["average_precision_of_measurements"] = alone
    if left_out := set(truths[0]) - set(rater.defect_calibration.defects):  # in use; here it is asked about these too
        rater.defect_calibration = UNCALIBRATED
        answers = [result.profile.defects for _, result in rated(args.labels, rater, explanation=False)]
        others = {name: p for name, p in each_precision(truths, answers).items() if name in left_out}
        report["average_precision_not_judged"] = others
        report["mean_average_precision_of_all"] = round(float(np.mean([*precisions.values(), *others.values()])), 3)
    named = [(each, mentions(result.explanation)) for each, result in zip(truths, results, strict=True)]
    right = sum(each.get(name) is True for each, said in named for name in said)
    wrong = sum(each.get(name) is False for each, said in named for name in said)
    missed = sum(there is True and name not in said for each, said in named for name, there in each.items())
    report["mentions"] = {"precision": round(right / (right + wrong), 3), "recall": round(right / (right + missed), 3)}
    report["words_of_the_model"] = round(float(np.mean([result.explained_by == "model" for result in results])), 3)
    times = {}
    for cause, defect in (("stall", "stall"), ("buffering", "buffering"), ("bitrate_switch", "bitrate_switch")):
        hits = [
            in_time(row, result.profile.found, cause, defect)
            for row, result, each in zip(rows, results, truths, strict=True)
            if cause in row["causes"] and each[defect]
        ]
        times[cause] = f"{np.mean(hits):.0%} of {len(hits)}"
    report["times_within_half_a_second"] = times
    score = np.array([result.score for result in results])
    mos = np.array([row["mos"] for row in rows])
    report["srcc"] = round(float(spearmanr(score, mos)[0]), 4)
    report["plcc"] = round(float(pearsonr(score, mos)[0]), 4)
    single = {cause: [n for n, row in enumerate(rows) if row["causes"] in ([], [cause])]
              for cause in sorted({row["causes"][0] for row in rows if len(row["causes"]) == 1})}  # fmt: skip
    report["srcc_within"] = {cause: round(float(spearmanr(score[n], mos[n])[0]), 3) for cause, n in single.items()}
    report["rows"] = [
        {"clip": row["clip"], "mos": row["mos"], "score": result.score, "explanation": result.explanation,
         "explained_by": result.explained_by, "true": [name for name, there in each.items() if there]}
        for row, result, each in zip(rows, results, truths, strict=True)
    ]  # fmt: skip
    args.output.write_text(json.dumps(report, indent=1))
    print(json.dumps({key: value for key, value in report.items() if key != "rows"}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(required=True)
    for name, job in (("fit", fit), ("judge", judge)):
        sub = jobs.add_parser(name)
        sub.set_defaults(job=job)
        sub.add_argument("--labels", type=Path, required=True)
        sub.add_argument("--model", default=None, help="rater; by default the embedded one")
        sub.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    args.job(args)


if __name__ == "__main__":
    main()
