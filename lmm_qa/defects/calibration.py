"""Calibrated probabilities of defects: how much a rater's answers and the measured features count for each defect.

A rater can have a calibration of its own, in defects.json beside its rater.json. Raters without one use `UNCALIBRATED`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from lmm_qa.config import MAX_NUMBER, Bounded, Settings
from lmm_qa.defects.vocabulary import VISIBLE, check_names
from lmm_qa.errors import ConfigError


class PlattScaling(Settings):
    """P(defect) = sigmoid(slope * answer + measured * features + intercept); Platt (1999), with two inputs."""

    slope: float = Field(1.0, ge=0, le=MAX_NUMBER)
    """Weight of the log-odds of yes against no in the model's answer; 0: the question is not asked."""
    measured: float = Field(0.0, ge=0, le=MAX_NUMBER)
    """Weight of the log-odds from measured features (`lmm_qa.video.measurement.classifier`); 0 without features."""
    intercept: Bounded = 0.0
    threshold: float = Field(0.5, gt=0, lt=1)
    """The defect is reported as found from this probability on."""
    average_precision: float | None = Field(None, ge=0, le=1)
    """For people: on clips from sources that were not used for the fit (or were left out in cross-validation)."""


class DefectCalibration(Settings):
    """Contents of defects.json. A defect that is not listed is not judged."""

    defects: dict[str, PlattScaling]
    data: str = ""
    """For people: what it was fitted on."""

    @model_validator(mode="after")
    def _check_defects(self) -> Self:
        check_names(self.defects)
        return self

    def asks(self, name: str) -> bool:
        """Whether the probability of a defect depends on the model's answer, so that the question must be asked."""
        return name in self.defects and self.defects[name].slope > 0

    def probability(self, name: str, log_odds: float, measured: float = 0.0) -> float | None:
        """Calibrated probability of a defect; None if it is not judged.

        Args:
            name: of the defect.
            log_odds: of yes against no in the model's answer.
            measured: log-odds from the measured features.
        """
        if (scaling := self.defects.get(name)) is None:
            return None
        z = scaling.slope * log_odds + scaling.measured * measured + scaling.intercept
        return 1 / (1 + math.exp(-min(max(z, -60.0), 60.0)))


UNCALIBRATED = DefectCalibration(defects={name: PlattScaling(measured=1.0) for name in VISIBLE})
"""For raters without a calibration: every visible defect; answers and measured features have the same weight."""


def read_calibration(file: Path | None) -> DefectCalibration:
    """Read a rater's defects.json; without a file, `UNCALIBRATED`.

    Raises:
        ConfigError: the file is invalid.
    """
    if file is None:
        return UNCALIBRATED
    try:
        return DefectCalibration.read(file)
    except ConfigError as error:
        raise ConfigError(f"{error}\nfit it again, or remove it to use uncalibrated answers") from None
