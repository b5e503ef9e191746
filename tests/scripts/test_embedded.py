"""python -m pytest tests/scripts/test_embedded.py

The scripts that make the embedded model: single steps, then the whole experiment at tiny size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from paths import SCRIPTS


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


# --- calibration of the defect profile -------------------------------------------------------------------------------


def synthetic_copies(sources: int, answers_help: bool) -> tuple[Any, Any, Any, list[str]]:
    """Log-odds of a classifier that is often right, labels and log-odds of answers of fifty copies of each source; and
    the sources."""
    rng = np.random.default_rng(4)
    present = rng.random(50 * sources) < 0.3
    measured = 2.0 * present - 1.5 + rng.normal(0, 1.2, len(present))
    odds = (1.5 * present if answers_help else 0.0) + rng.normal(0, 1, len(present))
    return measured, present, odds, [f"clip {number}" for number in range(sources) for _ in range(50)]


def test_without_helpful_answers_the_calibration_is_logistic_regression_on_all_copies() -> None:
    from embedded.calibration import fit_defect
    from sklearn.linear_model import LogisticRegression

    measured, present, _, _ = synthetic_copies(8, answers_help=False)
    found = fit_defect(measured, present, np.zeros(len(present), bool), np.array([]), [])
    expected = LogisticRegression(tol=1e-8).fit(measured[:, None], present)
    assert found.slope == 0
    assert (found.measured, found.intercept) == pytest.approx((expected.coef_[0, 0], expected.intercept_[0]), abs=2e-3)


@pytest.mark.parametrize("offset", [0.0, 2.0])
@pytest.mark.parametrize("answers_help", [True, False])
def test_answers_count_where_they_help_on_sources_left_out(answers_help: bool, offset: float) -> None:
    """A classifier that is off for the copies with answers does not make the answers count."""
    from embedded.calibration import fit_defect
    from sklearn.metrics import average_precision_score, f1_score

    measured, present, odds, groups = synthetic_copies(12, answers_help)
    asked = np.arange(len(present)) < 300
    measured = measured + offset * asked
    found = fit_defect(measured, present, asked, odds[asked], groups[:300])
    assert (found.slope > 0) == answers_help
    used = asked if answers_help else np.ones(len(present), bool)
    answers = odds[used] if answers_help else 0.0
    p = 1 / (1 + np.exp(-(found.slope * answers + found.measured * measured[used] + found.intercept)))
    assert found.average_precision == pytest.approx(average_precision_score(present[used], p), abs=1e-3)
    best = max(f1_score(present[used], p >= limit) for limit in np.linspace(0.25, 0.95, 71))
    assert f1_score(present[used], p >= found.threshold - 1e-4) >= best - 1e-9
