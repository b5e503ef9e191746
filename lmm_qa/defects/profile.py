"""The defect profile of a clip: probabilities of all defects, from a model's answers and the measured features.

A model sees a few small pictures of a clip. The features (`lmm_qa.video.measurement.features`) are measured on all
frames at native resolution, and the classifier's log-odds enter each probability beside the model's answer. The times
of defects that come and go are found by `lmm_qa.video.temporal`. What it measures beyond doubt, such as a picture that
stands still for a second, is found whatever the model and the classifier say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lmm_qa.defects.calibration import DefectCalibration
from lmm_qa.defects.explanation import Finding
from lmm_qa.defects.vocabulary import DEFECTS
from lmm_qa.video.measurement.lip_sync import LipSync
from lmm_qa.video.temporal import FrameDynamics, Span, buffering, stalls, switches

AnswerSource = Literal["adapter", "base"]
"""Which model answers questions about defects: the one with the adapter, or the base model it was tuned from."""

CERTAIN = 0.99
"""Least probability of a defect that is measured beyond doubt."""

LONG_STILL = 1.0
"""Seconds for which a picture stands still beyond doubt: real pictures have noise, and people blink and breathe."""

LIP_SYNC, LIP_SYNC_THRESHOLD = "lip_sync", 0.8
"""The defect that is measured from lips and sound alone, and the probability from which it is found."""

BLACK, WHITE, FLAT = 20.0, 231.0, 0.1
"""Mean luma (black is 0 or 16, white 235 or 255) and detail, in grey levels, of pictures that are nothing else."""


@dataclass(frozen=True)
class Profile:
    """The defects of a clip."""

    defects: dict[str, float | None]
    """Probability of each defect, in the order of `lmm_qa.defects.vocabulary.DEFECTS`; None: not judged."""
    found: tuple[Finding, ...]
    """The defects at or above their threshold, the likeliest first."""
    log_odds: dict[str, float]
    """Log-odds of yes against no in the model's answers."""
    measured: dict[str, float]
    """Log-odds from the measured features; empty without features."""
    mass: float | None
    """Share of the vocabulary's probability on the words yes and no, mean over the questions; near 0, the model cannot
    answer. None if no question was asked."""

    @property
    def absent(self) -> list[str]:
        """Names of the defects that were judged and not found."""
        found = {finding.defect for finding in self.found}
        return [name for name, probability in self.defects.items() if probability is not None and name not in found]


def read_profile(
    answers: Mapping[str, tuple[float, float]],
    calibration: DefectCalibration,
    dynamics: FrameDynamics | None,
    measured: Mapping[str, float],
    lip_sync: LipSync | None = None,
) -> Profile:
    """Make the profile of a clip.

    Args:
        answers: for each question, the log-odds of yes against no and the share of the vocabulary on both words.
        calibration: turns log-odds into probabilities. A defect is not judged if its question should have been asked
            and was not, or if it depends on features and there are none.
        dynamics: frame dynamics of the clip, for the times of defects; None if not every frame was decoded.
        measured: log-odds of each defect from the measured features; empty without features.
        lip_sync: of the clip; None if lips and sound could not be compared.
    """
    defects = {defect.name: _probability(defect.name, answers, calibration, measured) for defect in DEFECTS}
    thresholds = {name: each.threshold for name, each in calibration.defects.items()}
    if lip_sync:
        defects[LIP_SYNC], thresholds[LIP_SYNC] = lip_sync.probability, LIP_SYNC_THRESHOLD
    spans = _spans(dynamics) if dynamics else {}
    for name in _beyond_doubt(dynamics, spans) if dynamics else ():
        if name in calibration.defects:
            defects[name] = max(defects[name] or 0.0, CERTAIN, thresholds[name])
    whole_clip = (0.0, dynamics.duration) if dynamics else None
    found = [
        Finding(name, probability, tuple(span for span in spans.get(name, ()) if span != whole_clip))
        for name, probability in defects.items()
        if probability is not None and probability >= thresholds[name]
    ]
    return Profile(
        defects,
        tuple(sorted(found, key=lambda finding: -finding.probability)),
        {name: log_odds for name, (log_odds, _) in answers.items()},
        dict(measured),
        sum(mass for _, mass in answers.values()) / len(answers) if answers else None,
    )


def _probability(
    name: str,
    answers: Mapping[str, tuple[float, float]],
    calibration: DefectCalibration,
    measured: Mapping[str, float],
) -> float | None:
    if name not in answers and (calibration.asks(name) or not measured):
        return None
    log_odds, _ = answers.get(name, (0.0, 0.0))
    return calibration.probability(name, log_odds, measured.get(name, 0.0))


def _spans(dynamics: FrameDynamics) -> dict[str, list[Span]]:
    """The times of each defect that has times, if the clip has it."""
    first = buffering(dynamics)
    return {"stall": stalls(dynamics), "buffering": [first] if first else [], "bitrate_switch": switches(dynamics, 0)}


def _beyond_doubt(dynamics: FrameDynamics, spans: Mapping[str, Sequence[Span]]) -> set[str]:
    """Defects whose measurement needs no opinion: a picture that stands still for long, and a black or white clip."""
    lengths = {name: [end - start for start, end in spans[name]] for name in ("stall", "buffering")}
    found = {name for name, each in lengths.items() if max(each, default=0.0) >= LONG_STILL}
    if 2 * sum(lengths["stall"]) > dynamics.duration:
        found.add("stall")
    light = dynamics.brightness
    if dynamics.detail.max() < FLAT and (light.max() <= BLACK or light.min() >= WHITE):
        found.add("exposure")
    return found
