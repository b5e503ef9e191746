"""Does the embedded model find the defects, and name them? Calibrate its answers on held-out clips, or judge them.

    lmm-qa degrade VAL_CLIPS -o val/labels.jsonl --strengths 0.35,0.75 --pairs 4 --length 3
    python scripts/embedded_defects.py fit --labels val/labels.jsonl --votes evidence/votes.jsonl -o defects.json

    lmm-qa degrade TEST_CLIPS -o test/labels.jsonl --strengths 0.35,0.75 --pairs 4 --length 3
    python scripts/embedded_defects.py judge --labels test/labels.jsonl -o report.json

`fit`: a logistic function a defect (Platt, 1999) of what was measured, by maximum likelihood, on all copies of which
`embedded_evidence.py grow` has the votes of trees that have not seen their source: ten clips are too few to say what a
clip without a defect may look like. Where the model's answers on the held-out clips help beside that (on clips that are
left out in turn) they get a weight, fitted on those clips; where they do not, they get none, and are not asked for in
use. The threshold is that of the best F1, but at least `SURE`. Defects of an average precision below 0.3 are left out,
and so not judged.

`judge`: average precision of each defect that some copy has, also of those that the rater does not judge in use (from
answers and measurements as they are), and of the measurements alone; precision and recall of what the explanations
name; how often times of stalls, bufferings and bit-rate switches are right within half a second at both ends; how many
explanations were the model's own; SRCC of the score with the labels, over all and within each cause (clean copies count
as strength 0). Of clips that nothing was fitted on: the package's trees have seen those of the split val.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, logit
from scipy.stats import pearsonr, spearmanr

from lmm_qa.defects.calibration import UNCALIBRATED, DefectCalibration, Logistic
from lmm_qa.defects.explanation import mentions
from lmm_qa.defects.vocabulary import reference_defects
from lmm_qa.ratings_io import read_rows

Floats = NDArray[np.float64]
VISIBLE_LOSS = 0.05  # a damage that costs less of the quality is neither asserted nor absent
WITHIN = 0.5  # seconds
JUDGED = 0.3  # average precision below which a defect is not judged
SURE = 0.25  # probability from which on a defect may be said to be there: see `trade_off`
HELPS = 0.02  # by which answers must lower the loss on clips left out, in shares of that of knowing how many have it


def average_precision(scores: Floats, there: NDArray[np.bool_]) -> float:
    """Mean of the precisions at each copy that has the defect, the likeliest first."""
    ordered = there[np.argsort(-scores, kind="stable")]
    precision = np.cumsum(ordered) / np.arange(1, len(ordered) + 1)
    return float(precision[ordered].mean())


@dataclass(frozen=True)
class Copies:
    """What is known of some copies, one entry each."""

    group: NDArray[np.str_]
    """The source."""
    measured: Floats
    """Log-odds by trees that have not seen the source."""
    odds: Floats
    """Log-odds of the model's answer."""
    there: NDArray[np.bool_]


def fitted(copies: Copies) -> Logistic:
    """Weight of what was measured, and intercept, by maximum likelihood."""

    def loss(values: Floats) -> float:
        return loss_of(values[0] * copies.measured + values[1], copies.there) + 1e-3 * float(values[0] ** 2)

    found = minimize(loss, np.array([0.5, 0.0]), bounds=[(0, 6), (-12, 12)], method="L-BFGS-B")
    weight, intercept = (round(float(value), 4) for value in found.x)
    return Logistic(slope=0.0, measured=weight, intercept=intercept)


def shifted(how: Logistic, copies: Copies, answers: bool) -> Logistic:
    """The same, moved to fit some copies, and with a weight for the answers if these are to count."""
    known = log_odds(how, copies)

    def loss(values: Floats) -> float:
        return loss_of(known + values[0] * copies.odds + values[1], copies.there) + 1e-3 * float(values[0] ** 2)

    start = np.array([0.5 if answers else 0.0, 0.0])
    found = minimize(loss, start, bounds=[(0, 5.0 if answers else 0.0), (-12, 12)], method="L-BFGS-B")
    slope, shift = (float(value) for value in found.x)
    return how.model_copy(update={"slope": round(slope, 4), "intercept": round(how.intercept + shift, 4)})


def left_out(how: Logistic, copies: Copies, answers: bool) -> float:
    """Loss on the copies of each source, by what was `shifted` on those of the others."""
    z = np.zeros(len(copies.there))
    for group in set(copies.group):
        out = copies.group == group
        others = Copies(**{name: values[~out] for name, values in vars(copies).items()})
        z[out] = log_odds(shifted(how, others, answers), copies)[out]
    return loss_of(z, copies.there)


def loss_of(z: Floats, there: NDArray[np.bool_]) -> float:
    return float(np.mean(np.logaddexp(0, np.where(there, -z, z))))


def log_odds(how: Logistic, copies: Copies) -> Floats:
    return np.asarray(how.slope * copies.odds + how.measured * copies.measured + how.intercept)


def fit_one(voted: Copies, answered: Copies) -> Logistic:
    """The better of two functions, and its threshold.

    Answers count beside what was measured, never in its place; and what moving the function to these clips does alone
    is not put down to them.

    Args:
        voted: all copies that trees have judged; their `odds` mean nothing.
        answered: those of which there are answers.
    """
    how, judged = fitted(voted), voted
    if len(set(answered.there)) == 2:
        knowing_how_many = loss_of(np.full(len(answered.there), logit(answered.there.mean())), answered.there)
        without = min(loss_of(log_odds(how, answered), answered.there), left_out(how, answered, answers=False))
        if without - left_out(how, answered, answers=True) > HELPS * knowing_how_many:
            how, judged = shifted(how, answered, answers=True), answered
    p = expit(log_odds(how, judged))
    limits = np.unique(np.clip(p, 0.02, 0.98))
    said = [p >= limit for limit in limits]
    f1 = np.array([2 * (judged.there & one).sum() / max(judged.there.sum() + one.sum(), 1) for one in said])
    return how.model_copy(update={
        "threshold": round(float(limits[f1 == f1.max()].max()), 4),
        "average_precision": round(average_precision(p, judged.there), 4),
    })  # fmt: skip


def trade_off(judged: dict[str, Logistic], samples: Mapping[str, Copies]) -> str:
    """Precision and recall of what is said to be there, over all defects, with this and that for `SURE`."""
    lines = []
    for sure in (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5):
        said = right = due = 0
        for name, copies in samples.items():
            due += int(copies.there.sum())
            if how := judged.get(name):
                found = expit(log_odds(how, copies)) >= max(how.threshold, sure)
                said, right = said + int(found.sum()), right + int(found[copies.there].sum())
        lines.append(f"least threshold {sure}: precision {right / max(said, 1):.3f}, recall {right / max(due, 1):.3f}")
    return "\n".join(lines)


def known(row: dict[str, Any]) -> dict[str, bool | None]:
    """Which defects a copy has; a single damage that costs next to nothing is neither asserted nor absent."""
    found = reference_defects(zip(row["causes"], row["strengths"], strict=True))
    if len(row["causes"]) == 1 and row["quality"] > (1 - VISIBLE_LOSS) * row["ceiling"]:
        found = {name: None if there else there for name, there in found.items()}
    return found


def rated(labels: Path, rater: Any, explanation: bool) -> Iterator[tuple[dict[str, Any], Any]]:
    """Rows of a labelled set of `lmm-qa degrade`, and the rating of each."""
    from lmm_qa import Rating
    from lmm_qa.ratings import Details

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
    answers = {row["clip"]: result.profile.log_odds for row, result in rated(args.labels, rater, explanation=False)}
    votes = read_rows(args.votes)
    judged, samples = {}, {}
    for name in reference_defects([]):
        rows = [row for row in votes if row["known"][name] is not None]
        voted = Copies(
            group=np.array([row["group"] for row in rows]),
            measured=np.array([row["log_odds"][name] for row in rows]),
            odds=np.array([answers[row["clip"]][name] if row["clip"] in answers else 0.0 for row in rows]),
            there=np.array([row["known"][name] for row in rows], bool),
        )
        asked = np.array([row["clip"] in answers for row in rows])
        answered = Copies(**{field: values[asked] for field, values in vars(voted).items()})
        if len(set(voted.there)) < 2:
            print(f"{name:<16} not fitted: all of {len(rows)} copies have it, or none has", flush=True)
            continue
        how = fit_one(voted, answered)
        print(f"{name:<16}{voted.there.sum():>5} of {len(rows):<6} {how}", flush=True)
        samples[name] = answered
        if (how.average_precision or 0) >= JUDGED:
            judged[name] = how
    print(trade_off(judged, samples))
    # These copies are damaged far more often than clips are.
    judged = {name: how.model_copy(update={"threshold": max(SURE, how.threshold)}) for name, how in judged.items()}
    calibration = DefectCalibration(
        defects=judged,
        data=f"{len(votes)} damaged copies, answers on {len(answers)} held-out ones: scripts/embedded_defects.py",
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
        if job is fit:
            sub.add_argument("--votes", type=Path, required=True, help="what embedded_evidence.py grow wrote")
    args = parser.parse_args()
    args.job(args)


if __name__ == "__main__":
    main()
