"""python -m pytest tests/defects/test_classifier.py"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lmm_qa
from lmm_qa.config import Sampling, View
from lmm_qa.defects.classifier import FILE, MIN_VOTE_SHARE, Forests, defect_log_odds
from lmm_qa.defects.features import FeatureExtractor
from lmm_qa.defects.vocabulary import DEFECTS
from lmm_qa.video.decode import read_frames

SAMPLES = Path(lmm_qa.__file__).parent / "samples"
sys.path.append(str(Path(__file__).parents[2] / "scripts"))


def test_trees_vote_as_scikit_learn_has_them_vote(tmp_path: Path) -> None:
    from embedded_evidence import as_arrays
    from sklearn.ensemble import ExtraTreesClassifier

    lot = np.random.default_rng(0)
    features = lot.normal(size=(300, 6)).astype(np.float32)
    wanted = {"blur": features[:, 0] * features[:, 1] > 0, "noise": features[:, 2] + features[:, 3] > 1}
    looked_at = np.array([0, 1, 2, 3, 5])
    kept = [
        (name, ExtraTreesClassifier(20, max_leaf_nodes=12, class_weight="balanced", random_state=1), looked_at)
        for name in wanted
    ]
    for name, forest, chosen in kept:
        forest.fit(features[:, chosen], wanted[name])
    names = [f"sign {number}" for number in range(6)]
    as_arrays(kept, names).save(tmp_path / "trees.safetensors", "a test")
    forests = Forests.read(tmp_path / "trees.safetensors")
    for row in features[:50]:
        odds = forests.defect_log_odds(dict(zip(names, map(float, row), strict=True)) | {"another": 1.0})
        for name, forest, chosen in kept:
            share = np.clip(forest.predict_proba(row[None, chosen])[0, 1], MIN_VOTE_SHARE, 1 - MIN_VOTE_SHARE)
            assert odds[name] == pytest.approx(np.log(share / (1 - share)), abs=1e-4)


def copies_of(groups: int, answers_help: bool) -> Any:
    """Log-odds of fifty copies of each source, from measurements that are right often, and from answers."""
    from embedded_defects import Copies

    lot = np.random.default_rng(4)
    there = lot.random(50 * groups) < 0.3
    measured = 2.0 * there - 1.5 + lot.normal(0, 1.2, len(there))
    odds = (1.5 * there if answers_help else 0.0) + lot.normal(0, 1, len(there))
    return Copies(np.repeat([f"clip {number}" for number in range(groups)], 50), measured, odds, there)


def test_the_calibration_is_logistic_regression() -> None:
    from embedded_defects import fitted
    from sklearn.linear_model import LogisticRegression

    copies = copies_of(8, answers_help=True)
    how = fitted(copies)
    theirs = LogisticRegression(C=1 / (2e-3 * len(copies.there)), tol=1e-8).fit(copies.measured[:, None], copies.there)
    assert (how.measured, how.intercept) == pytest.approx((theirs.coef_[0, 0], theirs.intercept_[0]), abs=2e-3)


@pytest.mark.parametrize("off", [0.0, 2.0])
@pytest.mark.parametrize("help_", [True, False])
def test_answers_count_where_they_help_on_sources_left_out(help_: bool, off: float) -> None:
    """And not where what was measured lies higher on the clips that have answers."""
    from embedded_defects import fit_one
    from sklearn.metrics import average_precision_score, f1_score

    copies = copies_of(12, help_)
    answered = replace(copies, **{name: values[:300] for name, values in vars(copies).items()})
    answered = replace(answered, measured=answered.measured + off)
    how = fit_one(copies, answered)
    assert (how.slope > 0) == help_
    judged = answered if help_ else copies
    p = 1 / (1 + np.exp(-(how.slope * judged.odds + how.measured * judged.measured + how.intercept)))
    assert how.average_precision == pytest.approx(average_precision_score(judged.there, p), abs=1e-3)
    best = max(f1_score(judged.there, p >= limit) for limit in np.linspace(0.05, 0.95, 91))
    assert f1_score(judged.there, p >= how.threshold - 1e-4) >= best - 1e-9


def test_the_trees_of_the_package_know_the_defects_that_are_made() -> None:
    forests = Forests.read(FILE)
    assert forests.defects == tuple(defect.name for defect in DEFECTS if defect.causes)
    with pytest.raises(KeyError):
        defect_log_odds({})


@pytest.mark.parametrize(
    ("clip", "defect"),
    [
        ("blur_strong", "blur"),
        ("compression_strong", "compression"),
        ("freeze_strong", "stall"),
        ("noise_strong", "noise"),
    ],
)
def test_what_is_measured_tells_damaged_samples_from_the_clean_one(clip: str, defect: str) -> None:
    def odds(name: str) -> float:
        features = read_frames(
            SAMPLES / f"astronaut_{name}.mp4", Sampling(), [View()], 28, measure=FeatureExtractor
        ).features
        assert features is not None
        return defect_log_odds(features)[defect]

    assert odds(clip) > odds("clean") + 1
