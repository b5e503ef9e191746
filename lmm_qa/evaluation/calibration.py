"""Fit a calibration (`lmm_qa.model.calibration`): raw score to MOS, with a prediction interval.

The mapping is fitted to one half of the clips and the interval to the other half (split conformal prediction, Lei et
al., 2018). Groups (persons, sources) are never split between the halves:

    MOS = m(score)          m linear, logistic4 or isotonic, of least squared error on the first half
    r_i = |MOS_i - m(score_i)| / max(std_i, floor)      on the second half
    interval = m(score) +- q max(std, floor)            q = the ceil((n + 1) coverage)-th smallest r_i

For clips from the same source as the calibration clips, an interval contains the MOS with a probability of about
`coverage`; the more groups, the closer. There is no guarantee for other generators or persons: `CoverageCheck` reports
the coverage measured on groups that were left out of the fit.

Ratings and labels are joined in `lmm_qa.evaluation.labels`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from lmm_qa.errors import ConfigError, ScoresError
from lmm_qa.evaluation.labels import Pair, group_folds
from lmm_qa.evaluation.metrics import checked, fit_logistic4
from lmm_qa.model.calibration import (
    Calibration,
    ConformalInterval,
    CoverageCheck,
    Floats,
    IsotonicMapping,
    LinearMapping,
    LogisticMapping,
    MappingKind,
    ScoreMapping,
    clip_hash,
    predict,
    short_hash,
)

COVERAGE = 0.9

FLOOR = 0.1
"""Std below this share of the median std are raised to it, so that no interval has a width of almost zero."""

CHECK_FOLDS = 5


def fit_linear(x: Floats, y: Floats) -> LinearMapping:
    """Least squares. Raises ConfigError if the MOS falls as the score rises."""
    slope, intercept = np.polynomial.Polynomial.fit(x, y, 1).convert().coef[::-1]
    return LinearMapping.parse({"slope": float(slope), "intercept": float(intercept)}, "the linear mapping fitted")


def fit_logistic(x: Floats, y: Floats) -> LogisticMapping:
    """Least squares. Raises ConfigError if the MOS falls as the score rises."""
    return LogisticMapping.parse(fit_logistic4(x, y).model_dump(), "the logistic mapping fitted")


def fit_isotonic(x: Floats, y: Floats) -> IsotonicMapping:
    """Least squares; keeps the corners of the fitted curve. Raises ConfigError if the MOS falls as the score rises."""
    scores, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    fitted = isotonic_regression(np.bincount(inverse, y) / counts, weights=counts).x
    steps = np.diff(fitted) != 0
    corner = np.append(True, steps) | np.append(steps, True)
    values = {"scores": scores[corner].tolist(), "mos": fitted[corner].tolist()}
    return IsotonicMapping.parse(values, "the isotonic mapping fitted")


MAPPING_FITS: dict[MappingKind, Callable[[Floats, Floats], ScoreMapping]]
MAPPING_FITS = {"linear": fit_linear, "logistic4": fit_logistic, "isotonic": fit_isotonic}


def fit_interval(errors: Floats, std: Floats | None, coverage: float) -> ConformalInterval:
    """The interval whose width is the conformal quantile of the errors.

    Args:
        errors: (n,) |MOS - m(score)| of clips that were not used to fit m, in MOS units.
        std: (n,) of the same clips, or None.
        coverage: nominal, between 0 and 1.

    Raises:
        ScoresError: n is too small for this coverage.
    """
    exact = Fraction(str(coverage))  # in floating point, 0.9 / (1 - 0.9) is above 9
    rank = math.ceil((len(errors) + 1) * exact)
    if rank > len(errors):
        needed = math.ceil(exact / (1 - exact))
        raise ScoresError(
            f"an interval of coverage {coverage:g} needs {needed} clips besides those of the mapping, received "
            f"{len(errors)}: label more clips or lower the coverage"
        )
    floor = None
    if std is not None:
        floor = FLOOR * float(np.median(std))
        if floor == 0:
            raise ScoresError("more than half of the ratings have a std of 0: no interval can be derived from it")
        errors = errors / np.maximum(std, floor)
    half_width = float(np.partition(errors, rank - 1)[rank - 1])
    return ConformalInterval(coverage=coverage, half_width=half_width, std_floor=floor)


def calibrate(
    pairs: Sequence[Pair],
    kind: MappingKind = "logistic4",
    *,
    coverage: float = COVERAGE,
    scale: tuple[float, float] | None = None,
    seed: int = 0,
) -> Calibration:
    """Fit a calibration to clips that have a score and a MOS.

    Args:
        pairs: the clips; of calibrated ratings, the raw scores are used.
        kind: the kind of mapping.
        coverage: nominal coverage of the intervals, between 0 and 1.
        scale: lowest and highest MOS; by default the scale that the ratings declare.
        seed: for the random assignment of groups to halves and folds.

    Raises:
        ScoresError: too few clips or groups, constant scores, a MOS outside the scale, ratings that declare another
            scale, calibrated ratings without their raw scores.
        ConfigError: the MOS falls as the score rises.
    """
    if not 0 < coverage < 1:
        raise ScoresError(f"coverage must lie between 0 and 1, received {coverage:g}")
    data = _Data.of(pairs)
    declared = _declared_scale(pairs)
    scale = declared if scale is None else scale
    _check_scale(scale, data.mos)
    if declared not in (None, scale):
        raise ScoresError(
            f"the scale of the MOS is given as {scale}, the ratings declare {declared}: set the scale of the MOS in "
            "rater.json and rate the clips again"
        )
    mapping, interval = _fit(data, kind, coverage, scale, seed)
    raters = {pair.score.rater_id for pair in pairs}
    clips = [clip_hash(pair.score.clip, pair.score.content_id) for pair in pairs]
    return Calibration(
        mapping=mapping,
        interval=interval,
        scale=scale,
        rater_id=raters.pop() if len(raters) == 1 else None,
        n=len(pairs),
        groups=len(np.unique(data.groups)),
        fingerprint=_fingerprint(clips, data.mos),
        clips=tuple(sorted(clips)),
        check=_check(data, kind, coverage, scale, seed),
    )


class _Data(NamedTuple):
    """Clips as arrays, (n,) each."""

    scores: Floats
    mos: Floats
    std: Floats | None
    groups: NDArray[np.intp]
    """Numbers of the groups."""

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> _Data:
        scores, mos = checked([_raw_score(pair) for pair in pairs], [pair.label.mos for pair in pairs])
        std = [pair.score.std for pair in pairs]
        if any(value is None for value in std) and any(value is not None for value in std):
            raise ScoresError("some ratings have a std and some have none: use the ratings of one rater")
        _, groups = np.unique([repr(pair.label.group) for pair in pairs], return_inverse=True)
        return cls(scores, mos, None if std[0] is None else np.array(std, dtype=np.float64), groups)

    def select(self, mask: NDArray[np.bool_]) -> _Data:
        return _Data(*(None if array is None else array[mask] for array in self))  # type: ignore[arg-type]  # std alone


def _raw_score(pair: Pair) -> float:
    score = pair.score
    raw = score.raw if score.calibrated else score.value
    if raw is None:
        raise ScoresError(f"the rating of {score.clip} is already calibrated and has no raw_score to calibrate")
    return raw


def _fit(
    data: _Data, kind: MappingKind, coverage: float, scale: tuple[float, float] | None, seed: int
) -> tuple[ScoreMapping, ConformalInterval]:
    """The mapping fitted to one half of the groups, the interval to its errors on the other half."""
    if len(np.unique(data.groups)) < 2:
        raise ScoresError("a calibration needs clips of at least two groups (persons, sources), these are all of one")
    second = group_folds(data.groups.tolist(), 2, seed) == 1
    mapping_half, interval_half = data.select(~second), data.select(second)
    mapping = MAPPING_FITS[kind](*checked(mapping_half.scores, mapping_half.mos))
    predicted = np.clip(mapping(interval_half.scores), *(scale or (None, None)))
    return mapping, fit_interval(np.abs(interval_half.mos - predicted), interval_half.std, coverage)


def _check(
    data: _Data, kind: MappingKind, coverage: float, scale: tuple[float, float] | None, seed: int
) -> CoverageCheck | None:
    """Cross-validation: fit without each fold of groups, and measure coverage and error on it. None if impossible."""
    groups = len(np.unique(data.groups))
    if groups < 3:
        return None
    folds = group_folds(data.groups.tolist(), min(CHECK_FOLDS, groups), seed)
    inside, width, error = (np.zeros(len(data.mos)) for _ in range(3))
    for fold in np.unique(folds):
        held_out = folds == fold
        try:
            mapping, interval = _fit(data.select(~held_out), kind, coverage, scale, seed)
        except (ScoresError, ConfigError):
            return None  # the remaining folds are too small
        test = data.select(held_out)
        mos, low, high = predict(mapping, interval, scale, test.scores, test.std)
        inside[held_out] = (low <= test.mos) & (test.mos <= high)
        width[held_out], error[held_out] = high - low, mos - test.mos
    return CoverageCheck(
        coverage=float(inside.mean()),
        width=float(width.mean()),
        rmse=float(np.sqrt(np.mean(error**2))),
        lowest=min(float(inside[folds == fold].mean()) for fold in np.unique(folds)),
        folds=len(np.unique(folds)),
    )


def _declared_scale(pairs: Sequence[Pair]) -> tuple[float, float] | None:
    scales = {pair.score.scale for pair in pairs}
    if len(scales) > 1:
        raise ScoresError(
            f"the ratings declare several scales, {sorted(map(str, scales))}: use ratings on the scale of the MOS"
        )
    return scales.pop()


def _check_scale(scale: tuple[float, float] | None, mos: Floats) -> None:
    if scale is None:
        return
    low, high = scale
    if not low < high:
        raise ScoresError(f"a scale is two numbers, low < high; received [{low:g}, {high:g}]")
    if mos.min() < low or mos.max() > high:
        raise ScoresError(
            f"the MOS run from {mos.min():g} to {mos.max():g}, outside the scale [{low:g}, {high:g}]: set the "
            "scale of the MOS in rater.json and rate again; for ratings that declare no scale, give --scale"
        )


def _fingerprint(clips: Sequence[str], mos: Floats) -> str:
    return short_hash(
        "\n".join(sorted(f"{clip} {value!r}" for clip, value in zip(clips, mos.tolist(), strict=True))), 32
    )
