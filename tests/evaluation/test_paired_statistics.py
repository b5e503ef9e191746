"""python -m pytest tests/evaluation/test_paired_statistics.py"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lmm_qa.errors import ScoresError
from lmm_qa.evaluation.paired_statistics import (
    GroupSums,
    detectable_difference,
    holm,
    mean_interval,
    outcomes,
    sign_test_p,
    wilcoxon_p,
)


def pairs_as_groups(values: np.ndarray) -> GroupSums:
    return GroupSums.of(values, range(len(values)))


def test_the_interval_of_normal_values_is_that_of_the_t_test() -> None:
    values = np.random.default_rng(0).normal(0.3, 1, 30)
    found = mean_interval(pairs_as_groups(values))
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.03)


def test_the_interval_is_about_groups() -> None:
    values = np.random.default_rng(0).normal(0, 1, 12)
    once = mean_interval(pairs_as_groups(values))
    repeated = mean_interval(GroupSums.of(np.repeat(values, 20), np.repeat(np.arange(12), 20).tolist()))
    assert (once.low, once.high) == pytest.approx((repeated.low, repeated.high))  # 240 pairs tell no more than 12


def test_large_groups_count_more_in_the_mean() -> None:
    sums = GroupSums.of(np.array([1.0, 1.0, 1.0, 5.0]), ["a", "a", "a", "b"])
    assert mean_interval(sums).value == 2
    assert sums.means.tolist() == [1, 5]


def test_the_same_seed_gives_the_same_interval() -> None:
    sums = pairs_as_groups(np.arange(20.0))
    assert mean_interval(sums, seed=1) == mean_interval(sums, seed=1) != mean_interval(sums, seed=2)


def test_equal_sets_differ_by_zero() -> None:
    sums = pairs_as_groups(np.zeros(20))
    interval = mean_interval(sums)
    assert (interval.value, interval.low, interval.high) == (0, 0, 0)
    assert detectable_difference(sums) == 0
    assert wilcoxon_p(sums.means) == sign_test_p(0, 0) == 1


def test_one_group_has_no_interval() -> None:
    with pytest.raises(ScoresError, match="3 values of 1 groups have no interval: at least 2 groups are needed"):
        GroupSums.of(np.zeros(3), ["a", "a", "a"])


@pytest.mark.parametrize("pairs", [10, 30])
def test_the_interval_misses_a_true_zero_in_5_percent(pairs: int) -> None:
    """Random halves of a skewed set, as scores near the end of their scale are."""
    scores = 5 - np.random.default_rng(0).gamma(2, 0.4, 2 * pairs)
    rng = np.random.default_rng(2)
    missed = 0
    for draw in range(1000):
        first, second = rng.permutation(scores).reshape(2, pairs)
        interval = mean_interval(pairs_as_groups(first - second), resamples=500, seed=draw)
        missed += interval.low > 0 or interval.high < 0
    assert 30 <= missed <= 70


def test_the_detectable_difference_is_found_in_80_percent() -> None:
    count = 40
    true = (stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) / np.sqrt(count)  # of differences of unit variance
    samples = np.random.default_rng(0).normal(true, 1, (4000, count))
    assert np.mean([detectable_difference(pairs_as_groups(sample)) for sample in samples[:500]]) == pytest.approx(
        true, rel=0.02
    )
    assert np.mean(stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.03)
    found = [wilcoxon_p(sample) < 0.05 for sample in samples[:400]]
    assert np.mean(found) == pytest.approx(0.8, abs=0.05)


def test_outcomes_and_superiority() -> None:
    found = outcomes(np.array([0.3, 0.1, -0.1, 0.0, -0.2]), tie=0.1)
    assert found == (1, 3, 1)
    assert found.superiority == 0.5
    assert outcomes(np.array([1.0, 1.0, 0.0, -1.0]), tie=0).superiority == 0.625


def test_the_sign_test_is_mcnemars_exact_test() -> None:
    assert sign_test_p(12, 3) == pytest.approx(2 * stats.binom.cdf(3, 15, 0.5))
    assert sign_test_p(3, 12) == sign_test_p(12, 3)
    assert sign_test_p(4, 4) == 1


def test_holm() -> None:
    """Sorted p values times 4, 3, 2, 1, and never falling."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []
