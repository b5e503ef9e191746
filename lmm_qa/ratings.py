"""TODO-DOC ratings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lmm_qa.defects.profile import AnswerSource, Profile
from lmm_qa.errors import ClipError
from lmm_qa.video.decode import Frames

if TYPE_CHECKING:
    pass

from itertools import pairwise
from statistics import median

from lmm_qa.video.temporal import Span


@dataclass(frozen=True)
class Details:
    """What is asked of a clip besides its score."""

    defects: bool = False
    """The defect profile: a closed question for each defect, all on one prefill."""
    explanation: bool = False
    """Why, in words; brings the profile along."""
    timeline: bool = False
    """The score over time: windows of `lmm_qa.ratings.WINDOW` seconds, each a rating of its own."""
    answers_from: AnswerSource = "adapter"
    """Whose the words and the answers on defects are, where the rater has an adapter. The score is the adapter's."""

    @property
    def profile(self) -> bool:
        """Whether the profile is needed."""
        return self.defects or self.explanation

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of a row that are filled by this."""
        profile = ("defects", "found") if self.profile else ()
        return (*profile, *(["explanation"] if self.explanation else ()), *(["timeline"] if self.timeline else ()))


@dataclass(frozen=True)
class CalibrationUse:
    """Which calibration a score went through."""

    id: str
    """Short hash of all that the calibration is."""
    fitted: bool
    """Whether it was fitted on this very clip, which is then no test of the rater."""
    raw_rater_id: str
    """What made the raw score: the rater's identity without its calibration."""


@dataclass(frozen=True)
class Rating:
    """What the rater says of one clip."""

    clip: str
    content_id: str
    score: float
    """Expected MOS, on `scale`; calibrated where `calibration` says so."""
    raw_score: float | None
    """The score before calibration, on `scale`; None where nothing was calibrated."""
    interval: tuple[float, float] | None
    """Prediction interval of the MOS, low and high, see `lmm_qa.model.calibration`; None where nothing was calibrated."""
    calibration: CalibrationUse | None
    scale: tuple[float, float]
    level: str
    """The likeliest level word."""
    probabilities: dict[str, float]
    """P(level word), worst first; sums to 1."""
    std: float
    """Standard deviation of the level distribution, in MOS units; of the raw score, as are level and probabilities."""
    level_mass: float
    """Share of the vocabulary's probability on the level words; near 0, the prompt was not understood."""
    frames: Frames
    """What was looked at, without the pixels (`views` is empty), so that the ratings of many clips fit into memory."""
    model: str
    adapter: str | None
    prompt: str
    rater_id: str
    seconds: float
    """Seconds that the model spent on this clip (its share of the batch)."""
    profile: Profile | None = None
    """Which defects it has; None unless asked for, see `Details`."""
    profile_id: str | None = None
    """Hash of what made profile and explanation, see `lmm_qa.defects.diagnosis.profile_id`; None without a profile."""
    explanation: str | None = None
    """Why, in words; None unless asked for."""
    explained_by: str | None = None
    """`model`; or why its words may not be shown, and those of the grammar are (see `lmm_qa.defects.explanation`)."""
    timeline: Timeline | None = None
    """The score over time; None unless asked for."""

    def to_row(self) -> dict[str, Any]:
        """The rating as plain data, one column a key."""
        info = self.frames.info
        return {
            "clip": self.clip,
            "content_id": self.content_id,
            "score": self.score,
            "raw_score": self.raw_score,
            "interval": list(self.interval) if self.interval else None,
            "calibration": asdict(self.calibration) if self.calibration else None,
            "scale": list(self.scale),
            "level": self.level,
            "probabilities": self.probabilities,
            "std": self.std,
            "level_mass": self.level_mass,
            "frames": {"indices": list(self.frames.indices), "seconds": [round(s, 4) for s in self.frames.seconds]},
            "video": {
                "width": info.width,
                "height": info.height,
                "fps": round(info.fps, 4),
                "frames": info.frames,
                "duration": round(info.duration, 4),
                "decoder": self.frames.decoder,
            },
            "model": self.model,
            "adapter": self.adapter,
            "prompt": self.prompt,
            "rater_id": self.rater_id,
            "seconds": round(self.seconds, 4),
            "defects": self.profile.defects if self.profile else None,
            "found": [one.to_row() for one in self.profile.found] if self.profile else None,
            "defect_mass": self.profile.mass if self.profile else None,
            "profile_id": self.profile_id,
            "explanation": self.explanation,
            "explained_by": self.explained_by,
            "timeline": self.timeline.to_row() if self.timeline else None,
            "error": None,
        }


@dataclass(frozen=True)
class Failure:
    """A clip that could not be rated, and why."""

    clip: str
    content_id: str | None
    error: ClipError
    model: str
    rater_id: str

    def to_row(self) -> dict[str, Any]:
        """The failure as plain data: the columns of a rating are there, without values."""
        empty = dict.fromkeys(
            (
                *("score", "raw_score", "interval", "calibration", "scale", "level", "probabilities", "std"),
                *("level_mass", "frames", "video", "adapter", "prompt", "seconds"),
                *("defects", "found", "defect_mass", "profile_id", "explanation", "explained_by", "timeline"),
            )
        )
        return {
            "clip": self.clip,
            "content_id": self.content_id,
            **empty,
            "model": self.model,
            "rater_id": self.rater_id,
            "error": {"class": type(self.error).__name__, "message": str(self.error)},
        }


WINDOW, STEP = 2.0, 0.5


"""Seconds of a timeline's windows, and from one to the next."""


LOW = 0.1


"""Share of the scale by which a window lies below the clip's median, to be one that pulls the score down."""


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
