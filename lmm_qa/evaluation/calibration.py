"""From a rater's raw score to the MOS scale of one set of opinions, with a prediction interval.

The mapping is fitted to one half of the clips and the interval to the other half (split conformal prediction, Lei et
al., 2018), halves being made of whole groups (persons, sources):

    MOS = m(score)          m linear, logistic4 or isotonic, of least squared error on the first half
    r_i = |MOS_i - m(score_i)| / max(std_i, floor)      on the second half
    interval = m(score) +- q max(std, floor)            q = the ceil((n + 1) coverage)-th smallest r_i

For clips that come from where the calibration clips come from, intervals hold the MOS with a probability of about
`coverage`, the closer the more groups there were.
For other generators or other persons nothing is promised: how far that goes is what `CoverageCheck` measures, on groups that
had no part in the fit.

Knows numbers and names; how ratings and labels get together is `lmm_qa.evaluation.labels`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from scipy.optimize import isotonic_regression

from lmm_qa.atomic import replacing
from lmm_qa.config import Settings
from lmm_qa.errors import ConfigError, ScoresError
from lmm_qa.evaluation.labels import Pair, group_folds
from lmm_qa.evaluation.metrics import Floats, Logistic4, checked, fit_logistic4
from lmm_qa.model.rater_config import CALIBRATION_NAME

Kind = Literal["linear", "logistic4", "isotonic"]

COVERAGE = 0.9

FLOOR = 0.1
"""A std below this share of the median std counts as that much: a rater that is very sure would have no interval."""

CHECK_FOLDS = 5


class Linear(Settings):
    """MOS = slope score + intercept."""

    kind: Literal["linear"] = "linear"
    slope: float = Field(gt=0)
    intercept: float

    @classmethod
    def fit(cls, x: Floats, y: Floats) -> Self:
        """Least squares. Raises ConfigError where the MOS falls as the score rises."""
        slope, intercept = np.polynomial.Polynomial.fit(x, y, 1).convert().coef[::-1]
        return cls.parse({"slope": float(slope), "intercept": float(intercept)}, "the linear mapping fitted")

    def __call__(self, scores: Floats) -> Floats:
        return np.asarray(self.slope * scores + self.intercept, dtype=np.float64)


class Logistic(Settings):
    """MOS = b2 + (b1 - b2) / (1 + exp(-(score - b3) / b4)), see `lmm_qa.evaluation.metrics`."""

    kind: Literal["logistic4"] = "logistic4"
    b1: float
    b2: float
    b3: float
    b4: float = Field(gt=0)

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.b1 <= self.b2:
            raise ValueError(f"the curve must rise, b1 above b2; received b1 = {self.b1:g}, b2 = {self.b2:g}")
        return self

    @classmethod
    def fit(cls, x: Floats, y: Floats) -> Self:
        """Least squares. Raises ConfigError where the MOS falls as the score rises."""
        curve = fit_logistic4(x, y)
        values = {"b1": curve.b1, "b2": curve.b2, "b3": curve.b3, "b4": curve.b4}
        return cls.parse(values, "the logistic mapping fitted")

    def __call__(self, scores: Floats) -> Floats:
        return Logistic4(self.b1, self.b2, self.b3, self.b4)(scores)


class Isotonic(Settings):
    """The non-decreasing mapping of least squared error: through its corners in straight lines, flat outside them."""

    kind: Literal["isotonic"] = "isotonic"
    scores: tuple[float, ...] = Field(min_length=2)
    """Of the corners, rising."""
    mos: tuple[float, ...]
    """Of the corners, never falling; as many."""

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if len(self.mos) != len(self.scores) or any(np.diff(self.mos) < 0) or any(np.diff(self.scores) <= 0):
            raise ValueError("scores must rise, mos must not fall, and there must be as many of both")
        if self.mos[0] == self.mos[-1]:
            raise ValueError("the curve must rise somewhere")
        return self

    @classmethod
    def fit(cls, x: Floats, y: Floats) -> Self:
        """Least squares. Raises ConfigError where the MOS falls as the score rises."""
        scores, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
        fitted = isotonic_regression(np.bincount(inverse, y) / counts, weights=counts).x
        same_as_before = np.concatenate(([False], np.diff(fitted) == 0))
        corner = ~(same_as_before & np.concatenate((same_as_before[1:], [False])))
        values = {"scores": scores[corner].tolist(), "mos": fitted[corner].tolist()}
        return cls.parse(values, "the isotonic mapping fitted")

    def __call__(self, scores: Floats) -> Floats:
        return np.asarray(np.interp(scores, self.scores, self.mos), dtype=np.float64)


Mapping = Linear | Logistic | Isotonic

MAPPINGS: dict[Kind, type[Linear] | type[Logistic] | type[Isotonic]]
MAPPINGS = {"linear": Linear, "logistic4": Logistic, "isotonic": Isotonic}


class ConformalInterval(Settings):
    """How wide the prediction interval is."""

    coverage: float = Field(gt=0, lt=1)
    """Nominal: the least probability that an interval holds the MOS of a clip like those it was fitted on."""
    half_width: float = Field(ge=0)
    """q: in MOS units for each unit of std; without `std_floor`, in MOS units."""
    std_floor: float | None = Field(gt=0)
    """The least std that counts, in units of the raw score. None: the ratings had no std, all intervals are as wide."""

    @classmethod
    def fit(cls, errors: Floats, std: Floats | None, coverage: float) -> Self:
        """Take the conformal quantile.

        Args:
            errors: (n,) |MOS - m(score)| of clips that had no part in the fit of m.
            std: (n,) of the same clips, or None.
            coverage: nominal, between 0 and 1.

        Raises:
            ScoresError: n is too small for this coverage.
        """
        exact = Fraction(str(coverage))  # 0.9 / (1 - 0.9) is more than 9 in floating point
        rank = math.ceil((len(errors) + 1) * exact)
        if rank > len(errors):
            needed = math.ceil(exact / (1 - exact))
            raise ScoresError(
                f"an interval of coverage {coverage:g} needs {needed} clips besides those of the mapping, received "
                f"{len(errors)}: label more clips or ask for less coverage"
            )
        floor = None
        if std is not None:
            floor = FLOOR * float(np.median(std))
            if floor == 0:
                raise ScoresError("more than half of the ratings have a std of 0: no interval can be made from it")
            errors = errors / np.maximum(std, floor)
        half_width = float(np.partition(errors, rank - 1)[rank - 1])
        return cls(coverage=coverage, half_width=half_width, std_floor=floor)

    def widths(self, std: Floats | None) -> Floats:
        """Half the width of each interval, in MOS units; (n,), or () without a std.

        Raises:
            ScoresError: the interval depends on the std, and there is none.
        """
        if self.std_floor is None:
            return np.asarray(self.half_width)
        if std is None:
            raise ScoresError("this calibration makes intervals from the rating's std: give it")
        return np.asarray(self.half_width * np.maximum(std, self.std_floor), dtype=np.float64)


class CoverageCheck(Settings):
    """What intervals hold on clips whose group had no part in fitting them, each group left out in turn."""

    coverage: float = Field(ge=0, le=1)
    """Share of the MOS inside."""
    width: float = Field(ge=0)
    """Mean width of the intervals, in MOS units."""
    rmse: float = Field(ge=0)
    """Of the calibrated score, in MOS units."""
    lowest: float = Field(ge=0, le=1)
    """Coverage in the fold where it is lowest."""
    folds: int = Field(ge=2)


class Calibrated(NamedTuple):
    """A calibrated score and its prediction interval, in MOS units."""

    mos: float
    low: float
    high: float


class Calibration(Settings):
    """The content of calibration.json."""

    mapping: Annotated[Mapping, Field(discriminator="kind")]
    spread: ConformalInterval
    scale: tuple[float, float] | None
    """Lowest and highest MOS: scores and intervals are cut off there. None: no scale was declared."""
    rater_id: str | None
    """What the calibrated ratings were made by."""
    n: int = Field(ge=1)
    """Clips that it was fitted on."""
    groups: int = Field(ge=2)
    fingerprint: str
    """Hash of the clips and MOS that it was fitted on."""
    clips: tuple[str, ...]
    """Hash of each of the clips, sorted: no test set may hold one of them."""
    check: CoverageCheck | None
    """None where there are too few groups to leave some out."""

    @property
    def identity(self) -> str:
        """Short hash of all that it is, for rating rows."""
        return _hash(self.model_dump_json(), 16)

    def apply(self, score: float, std: float | None = None) -> Calibrated:
        """Calibrate one score.

        Args:
            score: raw score of the rater.
            std: standard deviation that the rater gave with it.

        Raises:
            ScoresError: the interval depends on the std, and there is none.
        """
        stds = None if std is None else np.array([std], dtype=np.float64)
        mos, low, high = _predict(self.mapping, self.spread, self.scale, np.array([score], dtype=np.float64), stds)
        return Calibrated(float(mos[0]), float(low[0]), float(high[0]))

    def was_fitted_on(self, clip: str, content_id: str | None = None) -> bool:
        """Whether it was fitted on this clip, by its content or else by its file name."""
        return not {_clip_hash(clip, None), _clip_hash(clip, content_id)}.isdisjoint(self.clips)

    def summary(self) -> str:
        """What it does and how well, in a few lines for people."""
        spread, unit = self.spread, "MOS" if self.spread.std_floor is None else "times the std"
        lines = [
            f"mapping     {self.mapping.kind}",
            f"interval    score +- {spread.half_width:.3f} {unit}, made to hold {spread.coverage:.0%} of the MOS",
        ]
        if self.check is None:
            return "\n".join([*lines, "check       not done: too few groups or clips to leave some out"])
        check = self.check
        return "\n".join(
            [
                *lines,
                f"check       on groups left out of the fit, {check.folds} folds:",
                f"            {check.coverage:.1%} of the MOS inside, {check.lowest:.1%} in the worst fold",
                f"            mean width {check.width:.3f} MOS, RMSE {check.rmse:.3f} MOS",
            ]
        )

    def write(self, folder: Path) -> Path:
        """Write calibration.json into a rater directory, whole or not at all.

        Raises:
            ConfigError: there is no such directory, or it cannot be written to.
        """
        if not folder.is_dir():
            raise ConfigError(f"{folder} is no directory: give the rater directory whose ratings these are")
        path = folder / CALIBRATION_NAME
        try:
            with replacing(path) as beside:
                beside.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror or error}") from None
        return path


def calibrate(
    pairs: Sequence[Pair],
    kind: Kind = "logistic4",
    *,
    coverage: float = COVERAGE,
    scale: tuple[float, float] | None = None,
    seed: int = 0,
) -> Calibration:
    """Fit a calibration to clips that have a score and a MOS.

    Args:
        pairs: the clips; raw scores are taken where ratings are calibrated already.
        kind: of the mapping.
        coverage: nominal coverage of the intervals, between 0 and 1.
        scale: lowest and highest MOS; by default, and if they declare one, that of all ratings.
        seed: deals groups to halves and folds.

    Raises:
        ScoresError: too few clips or groups, constant scores, a MOS outside the scale, ratings that declare another
            scale, calibrated ratings without their raw scores.
        ConfigError: the scores fall as the MOS rises.
    """
    if not 0 < coverage < 1:
        raise ScoresError(f"coverage lies between 0 and 1, received {coverage:g}")
    data = _Data.of(pairs)
    declared = _declared_scale(pairs)
    scale = declared if scale is None else scale
    _check_scale(scale, data.mos)
    if declared not in (None, scale):
        raise ScoresError(
            f"the MOS are said to be on {scale}, the ratings declare {declared}: set the scale of the MOS in "
            "rater.json and rate the clips again"
        )
    mapping, spread = _fit(data, kind, coverage, scale, seed)
    raters = {pair.score.rater_id for pair in pairs}
    clips = [_clip_hash(pair.score.clip, pair.score.content_id) for pair in pairs]
    return Calibration(
        mapping=mapping,
        spread=spread,
        scale=scale,
        rater_id=raters.pop() if len(raters) == 1 else None,
        n=len(pairs),
        groups=len(set(data.groups)),
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
        scores, mos = checked([_raw(pair) for pair in pairs], [pair.label.mos for pair in pairs])
        std = [pair.score.std for pair in pairs]
        if any(value is None for value in std) and any(value is not None for value in std):
            raise ScoresError("some ratings have a std and some have none: take the ratings of one rater")
        number = {group: place for place, group in enumerate(sorted({pair.label.group for pair in pairs}, key=repr))}
        return cls(
            scores,
            mos,
            None if std[0] is None else np.array(std, dtype=np.float64),
            np.array([number[pair.label.group] for pair in pairs], dtype=np.intp),
        )

    def part(self, chosen: NDArray[np.bool_]) -> _Data:
        """Some of the clips."""
        std = None if self.std is None else self.std[chosen]
        return _Data(self.scores[chosen], self.mos[chosen], std, self.groups[chosen])


def _raw(pair: Pair) -> float:
    score = pair.score
    raw = score.raw if score.calibrated else score.value
    if raw is None:
        raise ScoresError(f"the rating of {score.clip} is calibrated already and holds no raw_score to calibrate")
    return raw


def _fit(
    data: _Data, kind: Kind, coverage: float, scale: tuple[float, float] | None, seed: int
) -> tuple[Mapping, ConformalInterval]:
    """The mapping from one half of the groups, the interval from the errors of what is predicted for the other."""
    if len(set(data.groups.tolist())) < 2:
        raise ScoresError("a calibration needs clips of at least two groups (persons, sources), all these are of one")
    second = group_folds(data.groups.tolist(), 2, seed) == 1
    ours, theirs = data.part(~second), data.part(second)
    mapping = MAPPINGS[kind].fit(*checked(ours.scores, ours.mos))
    errors = np.abs(theirs.mos - np.clip(mapping(theirs.scores), *_ends(scale)))
    return mapping, ConformalInterval.fit(errors, theirs.std, coverage)


def _predict(
    mapping: Mapping, spread: ConformalInterval, scale: tuple[float, float] | None, scores: Floats, std: Floats | None
) -> tuple[Floats, Floats, Floats]:
    """Calibrated scores and both ends of their intervals, cut off at the ends of the scale; (n,) each."""
    bottom, top = _ends(scale)
    mos = np.clip(mapping(scores), bottom, top)
    width = spread.widths(std)
    return mos, np.clip(mos - width, bottom, top), np.clip(mos + width, bottom, top)


def _ends(scale: tuple[float, float] | None) -> tuple[float, float]:
    return (-np.inf, np.inf) if scale is None else scale


def _check(
    data: _Data, kind: Kind, coverage: float, scale: tuple[float, float] | None, seed: int
) -> CoverageCheck | None:
    """Fit without each fold of groups, and see how intervals and scores do on it."""
    groups = len(set(data.groups.tolist()))
    if groups < 3:
        return None
    folds = group_folds(data.groups.tolist(), min(CHECK_FOLDS, groups), seed)
    inside, width, error = (np.zeros(len(data.mos)) for _ in range(3))
    for fold in np.unique(folds):
        out = folds == fold
        try:
            mapping, spread = _fit(data.part(~out), kind, coverage, scale, seed)
        except (ScoresError, ConfigError):
            return None  # what is left is too little
        held = data.part(out)
        mos, low, high = _predict(mapping, spread, scale, held.scores, held.std)
        inside[out] = (low <= held.mos) & (held.mos <= high)
        width[out], error[out] = high - low, mos - held.mos
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
            f"the ratings declare several scales, {sorted(map(str, scales))}: say which one the MOS are on"
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
            "scale that people rated on in rater.json and rate again; for ratings that declare no scale, give --scale"
        )


def _clip_hash(clip: str, content_id: str | None) -> str:
    return _hash(content_id or PurePosixPath(clip).name, 12)


def _fingerprint(clips: Sequence[str], mos: Floats) -> str:
    return _hash("\n".join(sorted(f"{clip} {value!r}" for clip, value in zip(clips, mos.tolist(), strict=True))), 32)


def _hash(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:digits]
