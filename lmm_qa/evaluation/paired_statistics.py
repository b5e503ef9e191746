"""Statistics of paired differences, on arrays.

Pairs of one group (one person, one source) are not independent. Intervals and tests are therefore about groups: the
bootstrap resamples groups, and the tests are computed on the mean difference of each group.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from lmm_qa.errors import ScoresError
from lmm_qa.evaluation.metrics import CHUNK, Interval
from lmm_qa.model.calibration import Floats

CONFIDENCE = 0.95
POWER = 0.8
RESAMPLES = 10_000
MIN_GROUPS = 2
"""One group has no interval."""


class Outcomes(NamedTuple):
    """Number of pairs by the sign of their difference."""

    wins: int
    """Differences above the tie limit."""
    ties: int
    """Differences of at most the tie limit, in either direction."""
    losses: int

    @property
    def superiority(self) -> float:
        """Probability of superiority: share of wins, a tie counting half (Vargha and Delaney, 2000)."""
        return (self.wins + self.ties / 2) / sum(self)


class GroupSums(NamedTuple):
    """Values summed by group."""

    sums: Floats
    """(G,)"""
    sizes: Floats
    """(G,) number of values."""

    @classmethod
    def of(cls, values: Floats, groups: Sequence[Hashable]) -> GroupSums:
        """
        Args:
            values: (n,).
            groups: the group of each value.

        Raises:
            ScoresError: there are fewer than `MIN_GROUPS` groups.
        """
        index = {group: number for number, group in enumerate(dict.fromkeys(groups))}
        if len(index) < MIN_GROUPS:
            raise ScoresError(
                f"{len(values)} values of {len(index)} groups have no interval: at least {MIN_GROUPS} groups are needed"
            )
        codes = np.array([index[group] for group in groups], dtype=np.intp)
        return cls(np.bincount(codes, values).astype(np.float64), np.bincount(codes).astype(np.float64))

    @property
    def means(self) -> Floats:
        """(G,) the mean of each group."""
        return self.sums / self.sizes


def mean_interval(groups: GroupSums, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The mean of all values, and its 95% interval by a bootstrap over groups.

    Percentiles of the resampled means are too narrow for few groups. They are expanded as by Hesterberg (What Teachers
    Should Know About the Bootstrap, The American Statistician 69, 2015, section 5.3): the quantile of Student's t
    replaces that of the normal distribution, and n - 1 the n of the variance.
    """
    count = len(groups.sums)
    quantile = sqrt(count / (count - 1)) * stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
    found = stats.bootstrap(
        groups,
        _mean,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, CHUNK // count),
        confidence_level=1 - 2 * stats.norm.sf(quantile),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(_mean(*groups)), float(found.low), float(found.high))


def _mean(sums: Floats, sizes: Floats, axis: int = -1) -> Any:
    return np.sum(sums, axis=axis) / np.sum(sizes, axis=axis)


def detectable_difference(groups: GroupSums) -> float:
    """The smallest true mean difference that a two-sided test at 5% would find with a probability of 80%.

    Normal theory: (z(0.975) + z(0.8)) times the standard error of the mean over groups.
    """
    count = len(groups.sums)
    residuals = groups.sums - _mean(*groups) * groups.sizes
    error = sqrt(count / (count - 1) * float(residuals @ residuals)) / float(groups.sizes.sum())
    return float(stats.norm.ppf((1 + CONFIDENCE) / 2) + stats.norm.ppf(POWER)) * error


def outcomes(differences: Floats, tie: float) -> Outcomes:
    """Count wins, ties and losses of (n,) differences."""
    wins, losses = int(np.sum(differences > tie)), int(np.sum(differences < -tie))
    return Outcomes(wins, len(differences) - wins - losses, losses)


def wilcoxon_p(differences: Floats) -> float:
    """Two-sided p value of Wilcoxon's signed-rank test; 1 if all differences are 0."""
    return float(stats.wilcoxon(differences).pvalue) if np.any(differences) else 1.0


def sign_test_p(more: int, fewer: int) -> float:
    """Two-sided p value of the exact sign test, which for pairs of yes and no is McNemar's exact test."""
    return float(stats.binomtest(more, more + fewer).pvalue) if more + fewer else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm, 1979), in the same order."""
    corrected = [1.0] * len(p_values)
    largest = 0.0
    for rank, at in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[at]))
        corrected[at] = largest
    return corrected
