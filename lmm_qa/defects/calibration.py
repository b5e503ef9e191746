"""TODO-DOC defects.calibration."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from lmm_qa.config import Settings
from lmm_qa.defects.vocabulary import VISIBLE
from lmm_qa.errors import ConfigError


class Logistic(Settings):
    """How the answer on one defect is read: P = sigmoid(slope * log-odds + measured * m + intercept)."""

    slope: float = Field(1.0, ge=0)
    """Of the log-odds of yes against no, as the model answered; 0: it is not asked."""
    measured: float = Field(0.0, ge=0)
    """Of m, the log-odds by what was measured of the clip (`lmm_qa.defects.classifier`); 0 where nothing was."""
    intercept: float = 0.0
    threshold: float = Field(0.5, gt=0, lt=1)
    """P from which on the defect is said to be there."""
    average_precision: float | None = Field(None, ge=0, le=1)
    """On what all this was fitted on: sources that nothing was trained on, or that were left out in turn."""


class DefectCalibration(Settings):
    """How the answers of one rater become probabilities (Platt, 1999); defects that are not listed are not judged."""

    defects: dict[str, Logistic]
    data: str = ""
    """For people: what it was fitted on."""

    @model_validator(mode="after")
    def _of_the_vocabulary(self) -> Self:
        if unknown := set(self.defects) - set(VISIBLE):
            raise ValueError(f"no such defects: {', '.join(sorted(unknown))}; known: {', '.join(VISIBLE)}")
        return self

    def asks(self, name: str) -> bool:
        """Whether the model's answer on a defect counts, so that it has to be asked."""
        return name in self.defects and self.defects[name].slope > 0

    def probability(self, name: str, log_odds: float, measured: float = 0.0) -> float | None:
        """Calibrated P(yes); None where this defect is not judged. Arguments: see `Logistic`."""
        if (how := self.defects.get(name)) is None:
            return None
        z = how.slope * log_odds + how.measured * measured + how.intercept
        return 1 / (1 + math.exp(-min(max(z, -60.0), 60.0)))


UNCALIBRATED = DefectCalibration(defects={name: Logistic(measured=1.0) for name in VISIBLE})


"""For models that nobody has calibrated: every visible defect, what the model says and what was measured alike."""


def read_calibration(file: Path | None) -> DefectCalibration:
    """The calibration of a rater, or that of raters without one.

    Raises:
        ConfigError: the file says something that it may not say.
    """
    if file is None:
        return UNCALIBRATED
    try:
        return DefectCalibration.read(file)
    except ConfigError as error:
        raise ConfigError(f"{error}\nfit it again, or remove it to read the answers as they are") from None
