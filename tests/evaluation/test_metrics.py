"""python -m pytest tests/evaluation/test_metrics.py"""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import curve_fit
from scipy.stats import kendalltau, pearsonr, spearmanr

from lmm_qa.errors import ScoresError
from lmm_qa.evaluation import metrics
from lmm_qa.evaluation.metrics import METRICS, SRCC_WITHIN, Interval, agreement, bootstrap, fit_logistic4
from lmm_qa.model.calibration import Floats, Logistic4


def noisy_scores(n: int = 200, noise: float = 0.5, seed: int = 0) -> tuple[Floats, Floats]:
    """Scores, and MOS in steps of a tenth, so that there are ties."""
    rng = np.random.default_rng(seed)
    mos = np.round(rng.uniform(0, 5, n), 1)
    return mos + rng.normal(0, noise, n), mos


numbers = st.integers(-6, 6).map(lambda number: number / 2)
samples = st.lists(st.tuples(numbers, numbers), min_size=5, max_size=40)


@given(samples)
def test_correlations_equal_those_of_scipy(pairs: list[tuple[float, float]]) -> None:
    x, y = np.array(pairs).T
    assume(np.ptp(x) > 0 and np.ptp(y) > 0)
    found = agreement(x, y)
    assert found["srcc"] == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
    assert found["krcc"] == pytest.approx(kendalltau(x, y).statistic, abs=1e-12)
    assert found["plcc"] == pytest.approx(pearsonr(x, y).statistic, abs=1e-12)


@settings(max_examples=50)
@given(samples)
def test_plcc_fit_and_rmse_fit_belong_to_the_fitted_curve(pairs: list[tuple[float, float]]) -> None:
    x, y = np.array(pairs).T
    assume(np.ptp(x) > 0 and np.ptp(y) > 0)
    found, fitted = agreement(x, y), fit_logistic4(x, y)(x)
    assert found["rmse_fit"] == pytest.approx(np.sqrt(np.mean((fitted - y) ** 2)), abs=1e-4)
    assert found["plcc_fit"] >= abs(found["plcc"]) - 2e-3
    assert found["main"] == (found["srcc"] + found["plcc_fit"]) / 2


@settings(max_examples=30)
@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-1e3, 1e3), seed=st.integers(0, 20))
def test_metrics_do_not_depend_on_the_unit_of_the_score(scale: float, shift: float, seed: int) -> None:
    x, y = noisy_scores(40, seed=seed)
    plain, changed = agreement(x, y), agreement(x * scale + shift, y)
    assert changed == pytest.approx(plain, abs=1e-4)


def test_fit_recovers_the_parameters_of_a_logistic() -> None:
    reference = Logistic4(b1=4.5, b2=0.5, b3=60.0, b4=8.0)
    x = np.linspace(20, 100, 200)
    found = fit_logistic4(x, reference(x))
    assert [found.b1, found.b2, found.b3, found.b4] == pytest.approx([4.5, 0.5, 60, 8], rel=1e-4)


def test_a_falling_logistic_has_negative_srcc_and_positive_plcc_fit() -> None:
    x = np.linspace(20, 100, 200)
    y = Logistic4(b1=0.5, b2=4.5, b3=60.0, b4=8.0)(x)
    found = agreement(x, y)
    assert (found["srcc"], found["plcc_fit"]) == pytest.approx((-1, 1), abs=1e-6)
    assert fit_logistic4(x, y).b1 < fit_logistic4(x, y).b2


@pytest.mark.parametrize("noise", [0.1, 0.5, 2.0])
def test_fit_is_no_worse_than_curve_fit_from_the_usual_start(noise: float) -> None:
    x, y = noisy_scores(300, noise)

    def f(x: Floats, b1: float, b2: float, b3: float, b4: float) -> Floats:
        return b2 + (b1 - b2) / (1 + np.exp(-(x - b3) / abs(b4)))

    usual, _ = curve_fit(f, x, y, [y.max(), y.min(), x.mean(), x.std()], maxfev=20000)
    assert agreement(x, y)["rmse_fit"] <= np.sqrt(np.mean((f(x, *usual) - y) ** 2)) + 1e-6


def test_resampled_metrics_equal_metrics_of_the_drawn_clips() -> None:
    x, y = noisy_scores(60)
    found = bootstrap(x, y, resamples=20, seed=3)
    (counts,) = metrics._resamples(60, 20, 3)
    for row, drawn in enumerate(counts):
        x_drawn, y_drawn = np.repeat(x, drawn), np.repeat(y, drawn)
        assert found.resampled["srcc"][row] == pytest.approx(spearmanr(x_drawn, y_drawn).statistic)
        assert found.resampled["krcc"][row] == pytest.approx(kendalltau(x_drawn, y_drawn).statistic)
        assert found.resampled["plcc"][row] == pytest.approx(pearsonr(x_drawn, y_drawn).statistic)
        # The grid replaces a fit for each resample.
        exact = agreement(x_drawn, y_drawn)
        assert found.resampled["plcc_fit"][row] == pytest.approx(exact["plcc_fit"], abs=1e-3)
        assert found.resampled["rmse_fit"][row] == pytest.approx(exact["rmse_fit"], rel=2e-2)


def test_intervals_contain_the_metric_and_shrink_with_more_clips() -> None:
    small, large = (bootstrap(*noisy_scores(n), resamples=300).intervals() for n in (50, 800))
    for name in METRICS:
        assert small[name].low < small[name].value < small[name].high
        assert small[name].high - small[name].low > 2 * (large[name].high - large[name].low)
    assert {name: interval.value for name, interval in small.items()} == agreement(*noisy_scores(50))


def test_plcc_interval_agrees_with_theory() -> None:
    """Fisher: the standard error of artanh(plcc) is 1 / sqrt(n - 3) for normal data."""
    rng = np.random.default_rng(5)
    x, noise = rng.normal(size=(2, 1000))
    found = bootstrap(x, x + noise, ["plcc"], resamples=2000).intervals()["plcc"]
    half = 1.96 / np.sqrt(997)
    expected = np.tanh(np.arctanh(found.value) + np.array([-half, half]))
    assert [found.low, found.high] == pytest.approx(expected, abs=0.006)


def test_intervals_depend_on_the_seed_and_not_on_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = noisy_scores(50)
    one = bootstrap(x, y, resamples=40, seed=1).intervals()
    assert one == bootstrap(x, y, resamples=40, seed=1).intervals()
    assert one != bootstrap(x, y, resamples=40, seed=2).intervals()
    monkeypatch.setattr(metrics, "CHUNK", 7 * 50)
    chunked = bootstrap(x, y, resamples=40, seed=1).intervals()
    for name in METRICS:
        assert astuple(chunked[name]) == pytest.approx(astuple(one[name]))


def test_paired_difference_uses_the_same_resamples() -> None:
    x, y = noisy_scores(noise=0.4)
    worse = x + np.random.default_rng(9).normal(0, 0.5, len(x))
    same = (bootstrap(x, y) - bootstrap(x, y)).intervals()
    assert all(interval == Interval(0, 0, 0) for interval in same.values())
    margin = (bootstrap(x, y) - bootstrap(worse, y)).intervals()["main"]
    apart = [bootstrap(scores, y).intervals()["main"] for scores in (x, worse)]
    assert 0 < margin.low < margin.value < margin.high
    assert margin.high - margin.low < sum(interval.high - interval.low for interval in apart)
    with pytest.raises(ScoresError, match="not the same resamples"):
        bootstrap(x, y, seed=1) - bootstrap(x, y, seed=2)


def test_units_are_drawn_with_all_their_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = noisy_scores(60)
    units = [f"source {number % 12}" for number in range(60)]
    found = bootstrap(x, y, units=units, resamples=20, seed=3)
    assert found.values == bootstrap(x, y, resamples=1).values
    (counts,) = metrics._resamples(12, 20, 3)
    for resample, row in enumerate(counts):
        drawn = [clip for unit, number in enumerate(row) for clip in range(unit, 60, 12) for _ in range(number)]
        assert found.resampled["srcc"][resample] == pytest.approx(spearmanr(x[drawn], y[drawn]).statistic, abs=1e-12)
    monkeypatch.setattr(metrics, "CHUNK", 60)
    chunked = bootstrap(x, y, units=units, resamples=20, seed=3)
    assert np.array_equal(chunked.resampled["srcc"], found.resampled["srcc"])


def test_clips_of_one_source_that_are_alike_widen_the_interval() -> None:
    x, y = (np.repeat(values, 10) for values in noisy_scores(30))
    by_clip = bootstrap(x, y, ["srcc"]).intervals()["srcc"]
    by_source = bootstrap(x, y, ["srcc"], units=[number // 10 for number in range(300)]).intervals()["srcc"]
    assert by_source.high - by_source.low > 2 * (by_clip.high - by_clip.low)


def test_srcc_within_is_the_mean_over_groups() -> None:
    x, y = noisy_scores(90, noise=0.3)
    groups = [np.arange(0, 30), np.arange(30, 60), np.arange(60, 90)]
    x[60:] = 2.0
    found = bootstrap(x, y, ["srcc"], groups=groups, resamples=200).intervals()
    expected = sum(spearmanr(x[group], y[group]).statistic for group in groups[:2]) / 3
    assert found[SRCC_WITHIN].value == pytest.approx(expected)
    assert found[SRCC_WITHIN].low < found[SRCC_WITHIN].value < found[SRCC_WITHIN].high


@pytest.mark.parametrize(
    ("scores", "mos", "message"),
    [
        ([1.0] * 6, [1, 2, 3, 4, 5, 6], "all 6 score values are 1: no correlation is defined"),
        ([0.1 + 0.2, 0.3] * 3, [1, 2, 3, 4, 5, 6], "all 6 score values are 0.3"),
        ([1, 2, 3, 4, 5, 6], [2.5] * 6, "all 6 MOS values are 2.5"),
        ([1, 2, 3, 4], [1, 2, 3, 4], "4 clips have both a score and a MOS: at least 5 are needed"),
        ([1, 2, float("nan"), 4, 5], [1, 2, 3, 4, 5], "1 of 5 score values are NaN or infinite, the first at index 2"),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, float("inf")], "1 of 5 MOS values are NaN"),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6], r"received arrays of shape \(5,\) and \(6,\)"),
    ],
)
def test_undefined_correlations_are_refused(scores: list[float], mos: list[float], message: str) -> None:
    for compute in (agreement, fit_logistic4, bootstrap):
        with pytest.raises(ScoresError, match=message):
            compute(scores, mos)


def test_invalid_options_are_refused() -> None:
    x, y = noisy_scores(20)
    with pytest.raises(ScoresError, match="at least one resample is needed, received 0"):
        bootstrap(x, y, resamples=0)
    with pytest.raises(ScoresError, match="no metric is called pearson; the metrics are: main, srcc"):
        bootstrap(x, y, ["pearson"])
    with pytest.raises(ValueError, match="received 3 and 0"):
        bootstrap(x, y, units=[1, 2, 3])
