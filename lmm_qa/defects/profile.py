"""The defect profile of a clip: what the model answered to the closed questions, and what was measured.

A model sees a few small pictures of a clip; the decoder passes all of them, at native resolution. So what is measured
there (`lmm_qa.defects.features`, weighed by `lmm_qa.defects.classifier`) goes into the probability of each defect beside the model's answer;
and when a picture stands or is poorer than the rest comes from `lmm_qa.video.temporal`. Knows nothing of models or files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lmm_qa.defects.calibration import DefectCalibration
from lmm_qa.defects.explanation import Finding
from lmm_qa.defects.vocabulary import DEFECTS
from lmm_qa.video.temporal import FrameDynamics, Span, buffering, stalls, switches


@dataclass(frozen=True)
class Profile:
    """What is wrong with a clip."""

    defects: dict[str, float | None]
    """P(yes) of each defect, in the order of `lmm_qa.defects.vocabulary.DEFECTS`; None: not judged."""
    found: tuple[Finding, ...]
    """Those that are said to be there, the likeliest first."""
    log_odds: dict[str, float]
    """Of yes against no, as the model answered."""
    measured: dict[str, float]
    """Log-odds by what was measured (`lmm_qa.defects.classifier`); empty where nothing was."""
    mass: float | None
    """Share of the vocabulary's probability on yes and no, mean over the questions. Near 0, the model cannot answer.
    None where it was asked nothing."""

    @property
    def absent(self) -> list[str]:
        """Names of the defects that were judged, and are not there."""
        found = {one.defect for one in self.found}
        return [name for name, probability in self.defects.items() if probability is not None and name not in found]


def read_profile(
    answers: Mapping[str, tuple[float, float]],
    calibration: DefectCalibration,
    dynamics: FrameDynamics | None,
    measured: Mapping[str, float],
) -> Profile:
    """Read the answers on one clip.

    Args:
        answers: for each question, the log-odds of yes against no, and the share of the vocabulary that both hold.
        calibration: how they become probabilities; what it gives a slope, and was not asked, is not judged.
        dynamics: of the clip; None where not every frame was decoded. Says when.
        measured: log-odds of each defect by what was measured (`lmm_qa.defects.classifier`); empty where nothing was.
    """
    spans = _moments(dynamics) if dynamics else {}
    always = (0.0, dynamics.duration) if dynamics else None
    defects = {
        defect.name: calibration.probability(
            defect.name, answers.get(defect.name, (0.0, 0.0))[0], measured.get(defect.name, 0.0)
        )
        if defect.name in answers or (measured and not calibration.asks(defect.name))
        else None
        for defect in DEFECTS
    }
    found = [
        Finding(name, probability, tuple(span for span in spans.get(name, ()) if span != always))
        for name, probability in defects.items()
        if probability is not None and probability >= calibration.defects[name].threshold
    ]
    return Profile(
        defects,
        tuple(sorted(found, key=lambda one: -one.probability)),
        {name: odds for name, (odds, _) in answers.items()},
        dict(measured),
        sum(mass for _, mass in answers.values()) / len(answers) if answers else None,
    )


def _moments(dynamics: FrameDynamics) -> dict[str, list[Span]]:
    """When each defect shows that has a time, in a clip that has it."""
    first = buffering(dynamics)
    return {"stall": stalls(dynamics), "buffering": [first] if first else [], "bitrate_switch": switches(dynamics, 0)}
