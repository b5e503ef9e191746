"""Agreement of scores with mean opinion scores (MOS), on arrays.

    srcc       Spearman's rank correlation; tied values get their mean rank
    krcc       Kendall's rank correlation, tau-b
    plcc       Pearson's linear correlation
    plcc_fit   Pearson's correlation after the 4-parameter logistic f, fitted to the MOS by least squares
    rmse_fit   root of the mean squared error after f, in MOS units
    main       (srcc + plcc_fit) / 2, the main score of the NTIRE quality challenges

    f(x) = b2 + (b1 - b2) / (1 + exp(-(x - b3) / |b4|))

f is the mapping of VQEG's reports (Final report on the validation of objective models of video quality assessment,
phase II, 2003), in the form that the organisers of THQA-NTIRE use. It is affine in b1 and b2, so for given b3 and b4
the best fit has plcc_fit = |corr(sigmoid, MOS)|: only b3 and b4 need a search. A grid over the two gives the start of
the fit, and the values of all bootstrap resamples without a fit for each.

Intervals are percentiles of a bootstrap that resamples clips. Clips of one portrait resemble each other, so for a set
of few portraits the intervals are too narrow as a statement about other portraits; `units` resamples portraits instead.

Why not `scipy.stats.bootstrap`, on 1,714 clips and 1,000 resamples: it takes 19.5 s for plcc_fit, with one `curve_fit`
per resample, instead of 0.24 s; 0.23 s for srcc instead of 0.14 s; as long as this for plcc and krcc (all metrics here:
0.64 s). srcc_within, whose groups change size from resample to resample, needs weighted ranks anyway, and an interval
of scipy is NaN if one resample has no correlation. Why not `curve_fit`: without a Jacobian it misses the minimum in 44
of 320 small samples, by up to 0.01 MOS.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import least_squares
from scipy.special import expit
from scipy.stats import kendalltau

from lmm_qa.errors import ScoresError
from lmm_qa.model.calibration import Floats, Logistic4

Counts = NDArray[np.int64]
Indices = NDArray[np.intp]

METRICS = ("main", "srcc", "krcc", "plcc", "plcc_fit", "rmse_fit")
SRCC_WITHIN = "srcc_within"
"""Mean over groups of clips of the SRCC within each."""

MIN_CLIPS = 5
"""A fit of four parameters needs at least five clips."""
EQUAL = 1e-13
"""Values whose relative difference is below this are equal up to rounding."""
CHUNK = 1 << 22
"""Elements of the arrays in one step of the bootstrap (32 MiB each)."""
TINY = 1e-9
START_CLIPS = 5000
"""Clips that are enough to find where the search for the logistic starts."""
NEAR = 8.0
"""Standard errors. A curve whose correlation is further below that of the best is the best of no resample."""


@dataclass(frozen=True)
class Interval:
    """A metric and its bootstrap interval."""

    value: float
    low: float
    high: float


def agreement(scores: ArrayLike, mos: ArrayLike) -> dict[str, float]:
    """Each of `METRICS` of `scores` against `mos`, both (n,).

    Raises:
        ScoresError: fewer than `MIN_CLIPS` values, NaN or infinite values, or all values equal.
    """
    x, y = checked(scores, mos)
    return _single(_Computation.of(x, y, METRICS, ()))


def fit_logistic4(scores: ArrayLike, mos: ArrayLike) -> Logistic4:
    """The curve f of least squared error, by Levenberg-Marquardt from the best point of a grid over (b3, b4).

    Args:
        scores, mos: (n,).

    Raises:
        ScoresError: as for `agreement`.
    """
    x, y = checked(scores, mos)
    center, width = float(x.mean()), float(x.std())
    z = (x - center) / width
    some = np.arange(len(z)) if len(z) < 2 * START_CLIPS else np.argsort(z)[:: len(z) // START_CLIPS]
    start = _Grid.over(z[some]).best(z[some], y[some])
    fit = least_squares(_residuals, start, jac=_jacobian, args=(z, y), method="lm", x_scale="jac", max_nfev=2000)
    b1, b2, b3, b4 = _with_limits(float(fit.x[2]), float(fit.x[3]), z, y).tolist()
    return Logistic4(b1=b1, b2=b2, b3=center + width * b3, b4=width * max(abs(b4), TINY))


@dataclass(frozen=True)
class Bootstrap:
    """Metrics, and their values over resamples of the clips. Made by `bootstrap`."""

    values: Mapping[str, float]
    resampled: Mapping[str, Floats]
    """(resamples,) each; NaN where a resample leaves a metric undefined (all its scores or MOS are equal)."""
    draw: tuple[int, int, int]
    """Number of clips (or units), number of resamples, seed: equal for two bootstraps over the same resamples."""

    def intervals(self, confidence: float = 0.95) -> dict[str, Interval]:
        """Each metric with its percentile interval, which contains this share of the resamples."""
        tail = (1 - confidence) / 2
        intervals = {}
        for name, value in self.values.items():
            defined = self.resampled[name][np.isfinite(self.resampled[name])]
            low, high = np.quantile(defined, (tail, 1 - tail)) if len(defined) else (np.nan, np.nan)
            intervals[name] = Interval(value, float(low), float(high))
        return intervals

    def __sub__(self, other: Bootstrap) -> Bootstrap:
        """The paired bootstrap: the difference of both raters' metrics on each resample of the same clips.

        An interval that does not contain 0 is a difference that the choice of clips does not explain.

        Raises:
            ScoresError: the resamples are not the same.
        """
        if self.draw != other.draw:
            raise ScoresError(f"not the same resamples (clips, resamples, seed): {self.draw} and {other.draw}")
        names = [name for name in self.values if name in other.values]
        return Bootstrap(
            {name: self.values[name] - other.values[name] for name in names},
            {name: self.resampled[name] - other.resampled[name] for name in names},
            self.draw,
        )


def bootstrap(
    scores: ArrayLike,
    mos: ArrayLike,
    names: Sequence[str] = METRICS,
    *,
    groups: Sequence[Indices] = (),
    units: Sequence[Hashable] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Bootstrap:
    """Metrics over sets of n clips drawn with replacement from the n clips.

    Args:
        scores, mos: (n,).
        names: which of `METRICS`.
        groups: indices of the clips of each group. If given, `srcc_within` is one more metric: the mean over groups of
            the SRCC within each. Equal scores within a group count as 0, because they order nothing.
        units: what each clip belongs to, such as its source, (n,). If given, units are drawn instead of clips, each
            with all its clips. Not together with `groups`.
        resamples: number of sets.
        seed: the same seed draws the same sets for any two raters of the same clips.

    Raises:
        ScoresError: as for `agreement`; fewer than one resample; an unknown metric.
        ValueError: `units` and `groups` are given, or the number of units is not that of the clips.
    """
    x, y = checked(scores, mos)
    if units is not None and (groups or len(units) != len(x)):
        raise ValueError(f"expected {len(x)} units and no groups, received {len(units)} and {len(groups)}")
    if unknown := sorted(set(names) - set(METRICS)):
        raise ScoresError(f"no metric is called {', '.join(unknown)}; the metrics are: {', '.join(METRICS)}")
    if resamples < 1:
        raise ScoresError(f"at least one resample is needed, received {resamples}")
    compute = _Computation.of(x, y, names, groups)
    values = _single(compute)
    index = {unit: number for number, unit in enumerate(range(len(x)) if units is None else dict.fromkeys(units))}
    unit_of = [index[unit] for unit in (index if units is None else units)]
    chunks = [compute(counts[:, unit_of]) for counts in _resamples(len(index), resamples, seed, clips=len(x))]
    resampled = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in values}
    return Bootstrap(values, resampled, draw=(len(index), resamples, seed))


def checked(scores: ArrayLike, mos: ArrayLike) -> tuple[Floats, Floats]:
    """Both as (n,) float64.

    Raises:
        ScoresError: no correlation is defined for them, with the reason.
    """
    x, y = np.asarray(scores, dtype=np.float64), np.asarray(mos, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ScoresError(f"expected one score for each MOS, received arrays of shape {x.shape} and {y.shape}")
    if len(x) < MIN_CLIPS:
        raise ScoresError(f"{len(x)} clips have both a score and a MOS: at least {MIN_CLIPS} are needed")
    for name, values in (("score", x), ("MOS", y)):
        wrong = np.flatnonzero(~np.isfinite(values))
        if len(wrong):
            raise ScoresError(
                f"{len(wrong)} of {len(values)} {name} values are NaN or infinite, the first at index {wrong[0]}"
            )
        if np.ptp(values) <= EQUAL * np.abs(values).max():
            raise ScoresError(f"all {len(values)} {name} values are {values[0]:g}: no correlation is defined")
    return x, y


# --- the logistic ----------------------------------------------------------------------------------------------------


def _residuals(b: Floats, z: Floats, y: Floats) -> Floats:
    sigmoid = np.asarray(expit((z - b[2]) / max(abs(b[3]), TINY)), dtype=np.float64)
    return np.asarray(b[1] + (b[0] - b[1]) * sigmoid - y)


def _jacobian(b: Floats, z: Floats, _: Floats) -> Floats:
    width = max(abs(b[3]), TINY)
    t = (z - b[2]) / width
    s = np.asarray(expit(t))
    slope = (b[0] - b[1]) * s * (1 - s) / width
    return np.column_stack((s, 1 - s, -slope, -slope * t * np.sign(b[3])))


def _with_limits(b3: float, b4: float, z: Floats, y: Floats) -> Floats:
    """(b1, b2, b3, b4), with the b1 and b2 of least squared error for this b3 and b4."""
    s = np.asarray(expit((z - b3) / max(abs(b4), TINY)), dtype=np.float64)
    centered = s - s.mean()
    sum_of_squares = float(centered @ centered)
    slope = float(centered @ y) / sum_of_squares if sum_of_squares > 0 else 0.0
    low = float(y.mean() - slope * s.mean())
    return np.array([low + slope, low, b3, b4])


@dataclass(frozen=True)
class _Grid:
    """Sigmoids of standardised scores for a grid of b3 (centers) and b4 (widths), G points."""

    centers: Floats
    widths: Floats
    sigmoids: Floats
    """(n, G), each column of mean 0 and standard deviation 1."""

    @cached_property
    def squares(self) -> Floats:
        """(n, G) the squares of the sigmoids."""
        return self.sigmoids**2

    @classmethod
    def over(cls, z: Floats, extra: tuple[float, float] | None = None) -> _Grid:
        """Centers at the scores' quantiles and beyond both ends; widths from nearly a step to nearly a line.

        Args:
            z: (n,) scores of mean 0 and standard deviation 1.
            extra: one more center and width.
        """
        beyond = np.array([0.5, 1.0, 2.0, 4.0])
        inside = np.quantile(z, np.linspace(0, 1, 17))
        centers, widths = np.meshgrid(
            np.concatenate((z.min() - beyond, inside, z.max() + beyond)), np.geomspace(0.05, 16, 16)
        )
        c, w = centers.ravel(), widths.ravel()
        if extra is not None:
            c, w = np.append(c, extra[0]), np.append(w, extra[1])
        sigmoids = np.asarray(expit((z[:, None] - c) / w), dtype=np.float64)
        std = sigmoids.std(axis=0)
        usable = std > TINY * np.abs(sigmoids).max(axis=0)
        sigmoids = (sigmoids[:, usable] - sigmoids[:, usable].mean(axis=0)) / std[usable]
        return cls(c[usable], w[usable], sigmoids)

    def best(self, z: Floats, y: Floats) -> Floats:
        """(b1, b2, b3, b4) of the grid point of least squared error."""
        best = int(np.abs((y - y.mean()) @ self.sigmoids).argmax())
        return _with_limits(float(self.centers[best]), float(self.widths[best]), z, y)

    def near_best(self, y: Floats) -> _Grid:
        """Without the points that are the best of no resample: their correlation is too far below the largest one.

        The standard error of the difference of two correlations on the same n clips is below 1 / sqrt(n).
        """
        corr = np.abs((y - y.mean()) @ self.sigmoids) / (len(y) * y.std())
        near = corr >= corr.max() - NEAR / len(y) ** 0.5
        return _Grid(self.centers[near], self.widths[near], self.sigmoids[:, near])

    def plcc(self, y: Floats, counts: Counts) -> Floats:
        """The largest |corr(sigmoid, MOS)| of each resample: (B, n) counts -> (B,)."""
        n = counts.sum(axis=1, keepdims=True)
        weights = counts / n
        y = y - y.mean()
        mean_y, mean_s = weights @ y[:, None], weights @ self.sigmoids
        var_y = weights @ (y**2)[:, None] - mean_y**2
        var_s = weights @ self.squares - mean_s**2
        cov = (weights * y) @ self.sigmoids - mean_y * mean_s
        usable = (var_s > 1e-9) & (var_y > 1e-12)
        corr = np.divide(cov, np.sqrt(np.where(usable, var_s * var_y, 1)), out=np.zeros_like(cov), where=usable)
        best = np.abs(corr).max(axis=1)
        return np.asarray(np.where(usable.any(axis=1), np.minimum(best, 1), np.nan), dtype=np.float64)


# --- the bootstrap ---------------------------------------------------------------------------------------------------
# A resample is stored as the number of times that each clip was drawn. Every metric but tau is then a weighted one, and
# is computed for all resamples at once.


def _resamples(n: int, resamples: int, seed: int, clips: int = 1) -> Iterator[Counts]:
    """(B, n) arrays of counts, `resamples` rows in all; few enough at a time for arrays of B times `clips`, too."""
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK // max(n, clips))
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = rng.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)


@dataclass(frozen=True)
class _Computation:
    """Computes the requested metrics of all resamples at once."""

    x: Floats
    y: Floats
    names: Sequence[str]
    groups: Sequence[Indices]
    grid: _Grid | None
    """None if no requested metric needs the logistic."""
    curve_rmse: float = np.inf
    """Root of the mean squared error of the fitted curve on the clips themselves."""

    @classmethod
    def of(cls, x: Floats, y: Floats, names: Sequence[str], groups: Sequence[Indices]) -> _Computation:
        grid, rmse = None, np.inf
        if {"main", "plcc_fit", "rmse_fit"} & set(names):
            # With the fitted curve itself among the sigmoids, the metric of the clips themselves is exact.
            logistic, center, width = fit_logistic4(x, y), float(x.mean()), float(x.std())
            grid = _Grid.over((x - center) / width, ((logistic.b3 - center) / width, logistic.b4 / width)).near_best(y)
            rmse = float(np.sqrt(np.mean((logistic(x) - y) ** 2)))
        return cls(x, y, names, groups, grid, rmse)

    def __call__(self, counts: Counts) -> dict[str, Floats]:
        """(B, n) counts -> (B,) of each metric."""
        x, y = self.x, self.y
        found: dict[str, Floats] = {}
        if {"main", "srcc"} & set(self.names):
            found["srcc"] = _weighted_pearson(_ranks(x, counts), _ranks(y, counts), counts)
        if "krcc" in self.names:
            found["krcc"] = np.array([_tau(x, y, row) for row in counts])
        if "plcc" in self.names:
            found["plcc"] = _weighted_pearson(x, y, counts)
        if self.grid is not None:
            found["plcc_fit"] = self.grid.plcc(y, counts)
            # Residual variance of a least-squares fit = (1 - correlation^2) * variance.
            found["rmse_fit"] = _std(y, counts) * np.sqrt(1 - found["plcc_fit"] ** 2)
        if "main" in self.names:
            found["main"] = (found["srcc"] + found["plcc_fit"]) / 2
        within = {SRCC_WITHIN: _mean_within(x, y, counts, self.groups)} if self.groups else {}
        return {name: found[name] for name in self.names} | within


def _single(compute: _Computation) -> dict[str, float]:
    """The metrics of the clips themselves: each clip counts once."""
    found = {name: float(values[0]) for name, values in compute(np.ones((1, len(compute.x)), dtype=np.int64)).items()}
    # Where the fit is perfect, 1 - correlation^2 has no correct digit left.
    return {name: min(value, compute.curve_rmse) if name == "rmse_fit" else value for name, value in found.items()}


def _std(y: Floats, counts: Counts) -> Floats:
    """Standard deviation of each resample, (B,)."""
    total = counts.sum(axis=1)
    y = y - y.mean()
    return np.asarray(np.sqrt(np.maximum(counts @ y**2 / total - (counts @ y / total) ** 2, 0)), dtype=np.float64)


def _tau(x: Floats, y: Floats, counts: Counts) -> float:
    drawn = np.repeat(np.arange(len(x)), counts)
    if np.ptp(x[drawn]) == 0 or np.ptp(y[drawn]) == 0:
        return float("nan")
    return float(kendalltau(x[drawn], y[drawn], method="asymptotic").statistic)


def _ranks(values: Floats, counts: Counts) -> Floats:
    """`scipy.stats.rankdata` of each resample: the mean rank of each clip, (B, n)."""
    _, inverse = np.unique(values, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    starts = np.flatnonzero(np.diff(inverse[order], prepend=-1))
    tied = np.add.reduceat(counts[:, order], starts, axis=1)
    ranks = np.cumsum(tied, axis=1) - tied + (tied + 1) / 2
    return np.asarray(ranks[:, inverse], dtype=np.float64)


def _weighted_pearson(x: Floats, y: Floats, counts: Counts) -> Floats:
    """Pearson's correlation in each resample, (B,); x and y are (n,) or (B, n)."""
    weights = counts.astype(np.float64)
    total = np.maximum(weights.sum(axis=1, keepdims=True), 1)
    x, y = np.broadcast_to(x, weights.shape), np.broadcast_to(y, weights.shape)
    dx, dy = (values - _weighted_sum(weights, values)[:, None] / total for values in (x, y))
    cov, xx, yy = (_weighted_sum(weights, one, other) for one, other in ((dx, dy), (dx, dx), (dy, dy)))
    # The sums of squared deviations that rounding leaves when all values are equal.
    varies = (xx > _weighted_sum(weights, x, x) * EQUAL**2) & (yy > _weighted_sum(weights, y, y) * EQUAL**2)
    return np.where(varies, cov / np.sqrt(np.where(varies, xx * yy, 1)), np.nan)


def _weighted_sum(weights: Floats, *factors: Floats) -> Floats:
    """Sum over the clips of the weight times the factors, all (B, n), without arrays for the products."""
    operands = ",".join(["bn"] * (1 + len(factors)))
    return np.asarray(np.einsum(f"{operands}->b", weights, *factors), dtype=np.float64)


def _mean_within(x: Floats, y: Floats, counts: Counts, groups: Sequence[Indices]) -> Floats:
    """Mean over groups of the SRCC within each, for each resample, (B,)."""
    within = [
        _weighted_pearson(_ranks(x[group], counts[:, group]), _ranks(y[group], counts[:, group]), counts[:, group])
        for group in groups
    ]
    return np.asarray(np.mean(np.nan_to_num(within), axis=0), dtype=np.float64)
