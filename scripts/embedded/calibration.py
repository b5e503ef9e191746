"""Calibrate the defect profile: from log-odds of the classifier and the model to probabilities (Platt, 1999).

A logistic regression per defect, on the predictions of forests that were trained on other sources. Where the model's
answers to the closed questions improve the prediction for sources left out, they get a weight; elsewhere the question
is not used when clips are rated. The threshold is the one with the best F1, but at least `MIN_THRESHOLD`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, log_loss, precision_recall_curve
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict

from lmm_qa import Rater, Rating
from lmm_qa.defects.calibration import UNCALIBRATED, DefectCalibration, PlattScaling
from lmm_qa.defects.vocabulary import reference_defects
from lmm_qa.files.tables import read_rows, write_rows
from lmm_qa.ratings.rows import Details

Floats = NDArray[np.float64]
MIN_PRECISION = 0.3  # average precision below which a defect is not judged
MIN_THRESHOLD = 0.25  # degraded copies have far more defects than clips that people rate
IMPROVEMENT = 0.02  # of the log loss that answers must bring, relative to that of the base rate


def answer_questions(model: Path, folder: Path, out: Path) -> None:
    """Write the model's answers to all closed questions about the copies in a folder: their log-odds, as JSONL."""
    rater = Rater.from_pretrained(str(model))
    rater.defect_calibration = UNCALIBRATED  # asks all questions
    clips = [row["clip"] for row in read_rows(folder / "table.jsonl")]
    rows = []
    for clip, result in zip(clips, rater.rate_all([folder / clip for clip in clips], details=Details(defects=True)),
                            strict=True):  # fmt: skip
        if not isinstance(result, Rating) or result.profile is None:
            raise SystemExit(f"{clip} cannot be rated: {result}")
        rows.append({"clip": clip, "log_odds": result.profile.log_odds})
        if len(rows) % 100 == 0:
            print(f"answers: {len(rows)} of {len(clips)} copies", flush=True)
    write_rows(out, rows)


def fit_calibration(predictions: Path, answers: Path, out: Path) -> None:
    """Write defects.json.

    Args:
        predictions: of `train_classifier`.
        answers: of `answer_questions`, about some of these copies that the model was not trained on.
    """
    rows, answered = read_rows(predictions), {row["clip"]: row["log_odds"] for row in read_rows(answers)}
    judged = {}
    for name in reference_defects(()):
        labelled = [row for row in rows if name in row["defects"]]
        measured = np.array([row["defects"][name]["log_odds"] for row in labelled])
        present = np.array([row["defects"][name]["present"] for row in labelled], bool)
        if not labelled or present.all() or not present.any():
            continue
        has_answer = np.array([row["clip"] in answered for row in labelled])
        odds = np.array([answered[row["clip"]][name] for row, known in zip(labelled, has_answer, strict=True) if known])
        groups = [row["group"] for row, known in zip(labelled, has_answer, strict=True) if known]
        found = fit_defect(measured, present, has_answer, odds, groups)
        print(f"{name:<16}{present.sum():>6} of {len(labelled):<6} {found}", flush=True)
        if (found.average_precision or 0) >= MIN_PRECISION:
            judged[name] = found
    data = f"{len(rows)} degraded copies, answers on {len(answered)} of them: scripts/embedded"
    out.write_text(DefectCalibration(defects=judged, data=data).model_dump_json(indent=2) + "\n")


def fit_defect(measured: Floats, present: NDArray[np.bool_], has_answer: NDArray[np.bool_], odds: Floats,
               groups: Sequence[str]) -> PlattScaling:  # fmt: skip
    """Fit one defect.

    Args:
        measured: (n,) log-odds of the classifier.
        present: (n,) labels.
        has_answer: (n,) whether there is an answer.
        odds: (answers,) log-odds of the answers.
        groups: (answers,) their sources.
    """
    X, y = measured[:, None], present
    both = np.stack([measured[has_answer], odds], 1)
    if answers_help(both, present[has_answer], groups):
        X, y = both, present[has_answer]
    model = LogisticRegression().fit(X, y)
    weight, slope = np.append(model.coef_[0], 0.0)[:2].clip(min=0).round(4).tolist()
    probability = model.predict_proba(X)[:, 1]
    precision, recall, thresholds = precision_recall_curve(y, probability)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
    return PlattScaling(
        slope=slope,
        measured=weight,
        intercept=round(float(model.intercept_[0]), 4),
        threshold=round(float(np.clip(thresholds[f1[:-1].argmax()], MIN_THRESHOLD, 0.98)), 4),
        average_precision=round(float(average_precision_score(y, probability)), 4),
    )


def answers_help(both: Floats, present: NDArray[np.bool_], groups: Sequence[str]) -> bool:
    """Whether answers improve the prediction for sources that the regression was not fitted on.

    Args:
        both: (n, 2) log-odds of the classifier and of the answers.
    """
    folds = LeaveOneGroupOut()
    sources = np.array(groups)
    if any(len(set(present[sources != group])) < 2 for group in set(groups)) or len(set(groups)) < 2:
        return False
    losses = [
        log_loss(present, cross_val_predict(LogisticRegression(), X, present, groups=sources, cv=folds,
                                            method="predict_proba"))
        for X in (both[:, :1], both)
    ]  # fmt: skip
    base_rate = log_loss(present, np.full(len(present), present.mean()))
    slope = LogisticRegression().fit(both, present).coef_[0].min()
    return bool(slope > 0 and losses[0] - losses[1] > IMPROVEMENT * base_rate)
