"""Apply a calibration: map a raw score to the MOS scale, with a prediction interval. The content of calibration.json.

    MOS      = m(score)                               m linear, logistic4 or isotonic
    interval = m(score) +- half_width * max(std, std_floor)

How it is fitted, and the guarantees of the interval, are described in `lmm_qa.evaluation.calibration`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import FailFast, Field, model_validator

from lmm_qa.config import MAX_NUMBER, Bounded, ScaleEnds, Settings
from lmm_qa.errors import ConfigError, ScoresError
from lmm_qa.files.atomic import replacing
from lmm_qa.model.rater_config import CALIBRATION_NAME

MappingKind = Literal["linear", "logistic4", "isotonic"]

Floats = NDArray[np.float64]

Positive = Annotated[float, Field(gt=0, le=MAX_NUMBER)]
"""Option type of a positive number, at most `MAX_NUMBER`."""
NotNegative = Annotated[float, Field(ge=0, le=MAX_NUMBER)]
"""Option type of a number from 0 to `MAX_NUMBER`."""
Count = Annotated[int, Field(ge=1, le=int(MAX_NUMBER))]
ShortText = Annotated[str, Field(max_length=200)]


class LinearMapping(Settings):
    """MOS = slope * score + intercept."""

    kind: Literal["linear"] = "linear"
    slope: Positive
    intercept: Bounded

    def __call__(self, scores: Floats) -> Floats:
        return np.asarray(self.slope * scores + self.intercept, dtype=np.float64)


class Logistic4(Settings):
    """The 4-parameter logistic: MOS = b2 + (b1 - b2) / (1 + exp(-(score - b3) / b4))."""

    b1: float
    """Limit for high scores, MOS."""
    b2: float
    """Limit for low scores, MOS. Above b1 if the MOS falls as the score rises."""
    b3: float
    """Score at the center."""
    b4: float = Field(gt=0)
    """Width, in units of the score."""

    def __call__(self, scores: Floats) -> Floats:
        from scipy.special import expit  # slow to import

        with np.errstate(over="ignore"):  # a step: the width may be next to 0
            sigmoid = np.asarray(expit((scores - self.b3) / self.b4), dtype=np.float64)
        return np.asarray(self.b2 + (self.b1 - self.b2) * sigmoid)


class LogisticMapping(Logistic4):
    """A rising 4-parameter logistic. Its parameters are at most `MAX_NUMBER`."""

    kind: Literal["logistic4"] = "logistic4"
    b1: Bounded
    b2: Bounded
    b3: Bounded
    b4: Positive

    @model_validator(mode="after")
    def _check_rising(self) -> LogisticMapping:
        if self.b1 <= self.b2:
            raise ValueError(f"the curve must rise, b1 above b2; received b1 = {self.b1:g}, b2 = {self.b2:g}")
        return self


class IsotonicMapping(Settings):
    """A non-decreasing piecewise linear mapping, constant outside its first and last corner."""

    kind: Literal["isotonic"] = "isotonic"
    scores: Annotated[tuple[Bounded, ...], FailFast()] = Field(min_length=2)
    """Scores at the corners, strictly increasing."""
    mos: Annotated[tuple[Bounded, ...], FailFast()]
    """MOS at the corners, non-decreasing; as many as `scores`."""

    @model_validator(mode="after")
    def _check_rising(self) -> IsotonicMapping:
        if len(self.mos) != len(self.scores) or any(np.diff(self.mos) < 0) or any(np.diff(self.scores) <= 0):
            raise ValueError("scores must rise, mos must not fall, and there must be as many of both")
        if self.mos[0] == self.mos[-1]:
            raise ValueError("the curve must rise somewhere")
        return self

    def __call__(self, scores: Floats) -> Floats:
        return np.asarray(np.interp(scores, self.scores, self.mos), dtype=np.float64)


ScoreMapping = LinearMapping | LogisticMapping | IsotonicMapping


class ConformalInterval(Settings):
    """The width of the prediction interval."""

    coverage: float = Field(gt=0, lt=1)
    """Nominal coverage: the probability that an interval contains the MOS of a clip like the calibration clips."""
    half_width: NotNegative
    """Half width in units of std (at least `std_floor`); without `std_floor`, in MOS units."""
    std_floor: Positive | None
    """Smaller std count as this much, in units of the raw score. None: the ratings had no std; constant width."""

    def widths(self, std: Floats | None) -> Floats:
        """Half the width of each interval, in MOS units; (n,), or () without a std.

        Raises:
            ScoresError: the interval depends on the std, and there is none.
        """
        if self.std_floor is None:
            return np.asarray(self.half_width)
        if std is None:
            raise ScoresError(
                "the intervals of this calibration depend on the std of the rating, which is missing: pass it"
            )
        return np.asarray(self.half_width * np.maximum(std, self.std_floor), dtype=np.float64)


class CoverageCheck(Settings):
    """Coverage and error measured by cross-validation: each fold of groups is left out of the fit in turn."""

    coverage: float = Field(ge=0, le=1)
    """Share of the MOS inside their intervals."""
    width: NotNegative
    """Mean width of the intervals, in MOS units."""
    rmse: NotNegative
    """Of the calibrated score, in MOS units."""
    lowest: float = Field(ge=0, le=1)
    """Coverage in the worst fold."""
    folds: int = Field(ge=2, le=1000)


class Calibrated(NamedTuple):
    """A calibrated score and its prediction interval, in MOS units."""

    mos: float
    low: float
    high: float


class Calibration(Settings):
    """The content of calibration.json."""

    mapping: Annotated[ScoreMapping, Field(discriminator="kind")]
    interval: ConformalInterval
    scale: ScaleEnds | None
    """Lowest and highest MOS; scores and intervals are clipped to it. None: no scale was declared."""
    rater_id: ShortText | None
    """Identity of the rater that produced the ratings it was fitted to."""
    n: Count
    """Number of clips it was fitted to."""
    groups: int = Field(ge=2, le=int(MAX_NUMBER))
    fingerprint: ShortText
    """Hash of the clips and MOS it was fitted to."""
    clips: Annotated[tuple[ShortText, ...], FailFast()]
    """Hash of each of those clips, sorted: none of them may be in a test set."""
    check: CoverageCheck | None
    """None if there were too few groups for cross-validation."""

    @model_validator(mode="before")
    @classmethod
    def _check_renamed(cls, values: object) -> object:
        if isinstance(values, dict) and "spread" in values:
            raise ValueError("the key spread was renamed to interval: rename it in the file, or calibrate again")
        return values

    @property
    def identity(self) -> str:
        """Short hash of the whole calibration, for rating rows."""
        return short_hash(self.model_dump_json(), 16)

    def apply(self, score: float, std: float | None = None) -> Calibrated:
        """Calibrate one score.

        Args:
            score: raw score of the rater.
            std: standard deviation that the rater gave with it.

        Raises:
            ScoresError: the interval depends on the std, and there is none.
        """
        stds = None if std is None else np.array([std], dtype=np.float64)
        mos, low, high = predict(self.mapping, self.interval, self.scale, np.array([score], dtype=np.float64), stds)
        return Calibrated(float(mos[0]), float(low[0]), float(high[0]))

    def was_fitted_on(self, clip: str, content_id: str | None = None) -> bool:
        """Whether it was fitted on this clip, by its content or else by its file name."""
        return not {clip_hash(clip, None), clip_hash(clip, content_id)}.isdisjoint(self.clips)

    def summary(self) -> str:
        """A few lines for people: the mapping, the interval, and the result of the cross-validation."""
        interval, unit = self.interval, "MOS" if self.interval.std_floor is None else "times the std"
        lines = [
            f"mapping     {self.mapping.kind}",
            f"interval    score +- {interval.half_width:.3f} {unit}, nominal coverage {interval.coverage:.0%}",
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
        """Write calibration.json into a rater directory, atomically.

        Raises:
            ConfigError: there is no such directory, or it cannot be written to.
        """
        if not folder.is_dir():
            raise ConfigError(f"{folder} is not a directory: give the directory of the rater that made these ratings")
        path = folder / CALIBRATION_NAME
        try:
            with replacing(path) as beside:
                beside.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror or error}") from None
        return path


def predict(
    mapping: ScoreMapping,
    interval: ConformalInterval,
    scale: tuple[float, float] | None,
    scores: Floats,
    std: Floats | None,
) -> tuple[Floats, Floats, Floats]:
    """Calibrated scores and both ends of their intervals, clipped to the scale; (n,) each."""
    bottom, top = (-np.inf, np.inf) if scale is None else scale
    mos = np.clip(mapping(scores), bottom, top)
    width = interval.widths(std)
    return mos, np.clip(mos - width, bottom, top), np.clip(mos + width, bottom, top)


def clip_hash(clip: str, content_id: str | None) -> str:
    """Hash by which a calibration recognises a clip: of its content id, or else of its file name."""
    return short_hash(content_id or PurePosixPath(clip).name, 12)


def short_hash(text: str, digits: int) -> str:
    """The first hexadecimal digits of SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:digits]
