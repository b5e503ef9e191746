"""The defect profile of a clip: what the model answered to the closed questions, and what was measured.

A model sees a few small pictures of a clip; the decoder passes all of them, at native resolution. So what is measured
there (`lmm_qa.signs`, weighed by `lmm_qa.evidence`) goes into the probability of each defect beside the model's answer;
and when a picture stands or is poorer than the rest comes from `lmm_qa.trace`. Knows nothing of models or files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from lmm_qa.defects import DEFECTS, DefectCalibration
from lmm_qa.explain import Finding
from lmm_qa.trace import Span, Trace, buffering, stalls, switches

WINDOW, STEP = 2.0, 0.5
"""Seconds of a timeline's windows, and from one to the next."""

LOW = 0.1
"""Share of the scale by which a window lies below the clip's median, to be one that pulls the score down."""


@dataclass(frozen=True)
class Profile:
    """What is wrong with a clip."""

    defects: dict[str, float | None]
    """P(yes) of each defect, in the order of `lmm_qa.defects.DEFECTS`; None: not judged."""
    found: tuple[Finding, ...]
    """Those that are said to be there, the likeliest first."""
    log_odds: dict[str, float]
    """Of yes against no, as the model answered."""
    measured: dict[str, float]
    """Log-odds by what was measured (`lmm_qa.evidence`); empty where nothing was."""
    mass: float | None
    """Share of the vocabulary's probability on yes and no, mean over the questions. Near 0, the model cannot answer.
    None where it was asked nothing."""

    @property
    def denied(self) -> list[str]:
        """Names of the defects that were judged, and are not there."""
        found = {one.defect for one in self.found}
        return [name for name, probability in self.defects.items() if probability is not None and name not in found]


def read_profile(
    answers: Mapping[str, tuple[float, float]],
    calibration: DefectCalibration,
    trace: Trace | None,
    measured: Mapping[str, float],
) -> Profile:
    """Read the answers on one clip.

    Args:
        answers: for each question, the log-odds of yes against no, and the share of the vocabulary that both hold.
        calibration: how they become probabilities; what it gives a slope, and was not asked, is not judged.
        trace: of the clip; None where not every frame was decoded. Says when.
        measured: log-odds of each defect by what was measured (`lmm_qa.evidence`); empty where nothing was.
    """
    spans = _moments(trace) if trace else {}
    always = (0.0, trace.duration) if trace else None
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


def _moments(trace: Trace) -> dict[str, list[Span]]:
    """When each defect shows that has a time, in a clip that has it."""
    first = buffering(trace)
    return {"stall": stalls(trace), "buffering": [first] if first else [], "bitrate_switch": switches(trace, 0)}


@dataclass(frozen=True)
class Timeline:
    """The score over time."""

    window: float
    """Seconds that each score is about."""
    seconds: tuple[float, ...]
    """The middle of each window."""
    scores: tuple[float, ...]
    """On the rater's scale."""
    low: tuple[Span, ...]
    """Seconds that pull the score down: where windows lie `LOW` of the scale below the median."""

    def to_row(self) -> dict[str, object]:
        """As plain data."""
        return {
            "window": self.window,
            "seconds": [round(moment, 2) for moment in self.seconds],
            "scores": [round(score, 4) for score in self.scores],
            "low": [[round(moment, 2) for moment in span] for span in self.low],
        }


def read_timeline(spans: Sequence[Span], scores: Sequence[float], scale: tuple[float, float]) -> Timeline:
    """Put the windows' scores together.

    Args:
        spans: seconds from and to of each window, in order.
        scores: of each.
        scale: MOS of the worst and of the best level.
    """
    middles = [(first + last) / 2 for first, last in spans]
    limit = median(scores) - LOW * (scale[1] - scale[0])
    edges = [spans[0][0], *((a + b) / 2 for a, b in pairwise(middles)), spans[-1][1]]
    low: list[Span] = []
    for number, score in enumerate(scores):
        if score < limit:
            if low and low[-1][1] == edges[number]:
                low[-1] = (low[-1][0], edges[number + 1])
            else:
                low.append((edges[number], edges[number + 1]))
    return Timeline(spans[0][1] - spans[0][0], tuple(middles), tuple(scores), tuple(low))
