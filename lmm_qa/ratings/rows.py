"""Ratings: the result in Python (`Rating`, `Failure`), and the row of a file of ratings (`RatingRow`).

`RatingRow` is the only definition of the columns. The files, the HTML report and the reference page are made from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Annotated, Any, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, model_validator

from lmm_qa.config import Bounded, Settings
from lmm_qa.defects.profile import AnswerSource, Profile
from lmm_qa.errors import ClipError
from lmm_qa.files.tables import Row
from lmm_qa.video.decode import Frames
from lmm_qa.video.measurement.lip_sync import RATE, LipSync
from lmm_qa.video.sound import Sound, SoundState
from lmm_qa.video.temporal import Span

WINDOW, STEP = 2.0, 0.5
"""Length of a timeline's windows and distance between their starts, in seconds."""

LOW = 0.1
"""A window lowers the score if it lies below the median window by more than this share of the scale."""


@dataclass(frozen=True)
class Details:
    """What to report for a clip besides its score."""

    defects: bool = False
    """The defect profile: a closed question for each defect, all on one prefill."""
    explanation: bool = False
    """Explanation in words; implies the profile."""
    timeline: bool = False
    """The score over time: each window of `WINDOW` seconds is rated as a clip."""
    answers_from: AnswerSource = "adapter"
    """Which model explains and answers questions about defects, if there is an adapter. The score uses the adapter."""

    @property
    def profile(self) -> bool:
        """Whether the profile is needed."""
        return self.defects or self.explanation

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that must have a value in a row with these details."""
        profile = ("defects", "found") if self.profile else ()
        return (*profile, *(["explanation"] if self.explanation else ()), *(["timeline"] if self.timeline else ()))


# --- the row ---------------------------------------------------------------------------------------------------------


def _rounded(digits: int) -> PlainSerializer:
    return PlainSerializer(lambda number: None if number is None else round(number, digits))


Seconds = Annotated[Bounded, _rounded(2)]
"""Seconds, in hundredths in a row."""
Rounded = Annotated[Bounded, _rounded(4)]
"""A number with four decimals in a row."""
Interval = tuple[Seconds, Seconds]


class RowPart(Settings):
    """Part of a row. Columns that are not declared are ignored, so that rows may have columns of other versions."""

    model_config = ConfigDict(extra="ignore", coerce_numbers_to_str=True, populate_by_name=True)


class CalibrationUse(RowPart):
    """The calibration that was applied to a score."""

    id: str | None = Field(None, description="hash of the calibration")
    fitted: bool | None = Field(None, description="whether it was fitted on this clip, so that the clip cannot test it")
    raw_rater_id: str | None = Field(None, description="`rater_id` of the rater without the calibration")


class SampledFrames(RowPart):
    """The frames that the model received."""

    indices: tuple[int, ...] | None = Field(None, description="frame numbers in the clip, from 0")
    seconds: tuple[Rounded, ...] | None = Field(None, description="presentation times, in seconds from the first frame")


class VideoInfo(RowPart):
    """Properties of the clip."""

    width: int | None = Field(None, description="as displayed, in pixels")
    height: int | None = Field(None, description="as displayed, in pixels")
    fps: Rounded | None = Field(None, description="frames per second")
    frames: int | None = Field(None, description="number of frames")
    duration: Rounded | None = Field(None, description="in seconds")
    decoder: str | None = Field(None, description="`pyav`, `decord`, or `memory` for frames in memory")


class AudioInfo(RowPart):
    """The sound of the clip."""

    state: str | None = Field(
        None,
        description="`present`, `none` (no sound), `silent` (below -55 LUFS) or `broken` (it could not be decoded)",
    )
    seconds: Seconds | None = Field(None, description="length of the sound, up to the end of the pictures")
    offset: Rounded | None = Field(
        None, description="when the sound begins in the file, in seconds after the first frame; negative: before it"
    )
    loudness: Seconds | None = Field(None, description="integrated loudness in LUFS (EBU R 128)")
    clipped: Rounded | None = Field(None, description="share of samples at full scale, 0 to 1")
    error: str | None = Field(None, description="why it could not be decoded")


class LipSyncInfo(RowPart):
    """What lips and sound say about each other. Null: there is no sound, or no face was found."""

    offset: Rounded | None = Field(
        None, description="seconds by which the sound is late; negative: early. Means little if `strength` is below 3"
    )
    strength: Rounded | None = Field(
        None,
        description="how much better lips and sound match at this offset than in wrong pairings of the clip, in "
        "standard deviations of those",
    )
    speech: Seconds | None = Field(None, description="seconds in which somebody is heard while a mouth is seen")
    rate: int | None = Field(None, description="values per second of `mouth` and `voice`")
    mouth: tuple[Rounded, ...] | None = Field(
        None, description="opening of the mouth relative to the face; with a timeline only"
    )
    voice: tuple[Rounded, ...] | None = Field(None, description="loudness, 0 to 1; with a timeline only")


class FoundDefect(RowPart):
    """A defect of the clip."""

    defect: str = Field(description="name of the defect")
    probability: float = Field(ge=0, le=1, description="probability of the defect, 0 to 1")
    place: str | None = Field(None, description="where in the picture the defect occurs")
    seconds: tuple[Interval, ...] | None = Field(
        None, description="start and end of each occurrence, in seconds; null: the whole clip, or unknown"
    )


class Timeline(RowPart):
    """The score over time."""

    window: Bounded | None = Field(None, description="length of the windows, in seconds")
    seconds: tuple[Seconds, ...] = Field(description="middle of each window, in seconds")
    scores: tuple[Rounded, ...] = Field(description="score of each window, on `scale`")
    low: tuple[Interval, ...] | None = Field(
        None, description=f"start and end of the parts whose windows lie {LOW:.0%} of the scale below the median"
    )

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if len(self.seconds) != len(self.scores) or not self.seconds:
            raise ValueError(
                f"expected one score per window, received {len(self.scores)} for {len(self.seconds)} windows"
            )
        return self


class RowError(RowPart):
    """Why a clip could not be rated."""

    kind: str | None = Field(None, alias="class", description="class of the error, see `lmm_qa.errors`")
    message: str | None = Field(None, description="what is wrong, and what to do")

    def __str__(self) -> str:
        return ": ".join(part for part in (self.kind, self.message) if part)


class RatingRow(RowPart):
    """One row of a file of ratings."""

    clip: str = Field(description="path of the clip as given, or relative to the folder or list given")
    content_id: str | None = Field(None, description="hash of the file's content")
    score: Bounded | None = Field(None, description="expected MOS, on `scale`; calibrated if `calibration` is set")
    raw_score: Bounded | None = Field(
        None, description="score before calibration, on `scale`; null without calibration"
    )
    interval: tuple[Bounded, Bounded] | None = Field(
        None, description="prediction interval of the MOS, low and high; null without calibration"
    )
    calibration: CalibrationUse | None = Field(None, description="the calibration that was applied")
    scale: tuple[Bounded, Bounded] | None = Field(None, description="MOS of the worst and of the best level")
    level: str | None = Field(None, description="most probable level word")
    probabilities: dict[str, Bounded | None] | None = Field(
        None, description="probability of each level word, worst level first; they sum to 1"
    )
    std: Bounded | None = Field(
        None, description="standard deviation of the level distribution, in units of `raw_score`"
    )
    level_mass: Bounded | None = Field(
        None, description="share of the vocabulary's probability on the level words; near 0: the prompt fails"
    )
    frames: SampledFrames | None = Field(None, description="the frames that the model received")
    video: VideoInfo | None = Field(None, description="properties of the clip")
    audio: AudioInfo | None = Field(None, description="the sound of the clip; null for frames in memory")
    lip_sync: LipSyncInfo | None = Field(
        None, description="offset between lips and sound; null if the clip was not measured, or has no sound or no face"
    )
    model: str | None = Field(None, description="name of the model")
    adapter: str | None = Field(None, description="directory of the adapter; null without one")
    prompt: str | None = Field(None, description="question and beginning of the answer")
    measured: str | None = Field(
        None, description="what was measured on all frames, as the prompt says it; null if the prompt does not"
    )
    rater_id: str | None = Field(None, description="hash of everything that determines the score")
    seconds: Rounded | None = Field(
        None, description="seconds that the model spent on the clip (its share of the batch)"
    )
    defects: dict[str, Bounded | None] | None = Field(
        None, description="probability of each defect, 0 to 1; null: not judged"
    )
    found: tuple[FoundDefect, ...] | None = Field(
        None, description="defects at or above their threshold, the most probable first"
    )
    defect_mass: Bounded | None = Field(
        None, description="share of the vocabulary's probability on yes and no, mean over the questions about defects"
    )
    profile_id: str | None = Field(
        None, description="hash of everything that determines `defects`, `found` and `explanation`"
    )
    explanation: str | None = Field(None, description="explanation of the rating, in words")
    explained_by: str | None = Field(None, description="`model`, or why its explanation was replaced by a template")
    timeline: Timeline | None = Field(None, description="the score over time")
    warnings: tuple[str, ...] | None = Field(
        None,
        description="what to know about how the clip was read: several streams, a still, HDR, interlacing, NaN in the "
        "sound, or features that could not be measured",
    )
    error: RowError | str | None = Field(None, description="why the clip could not be rated; null if it was rated")

    def to_row(self) -> Row:
        """The row as plain data, with all columns."""
        return self.model_dump(mode="json", by_alias=True)


def describe_columns(part: type[BaseModel] = RatingRow, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield name, type and meaning of each column; parts of a column follow it, as `video.width`."""
    for name, field in part.model_fields.items():
        column = f"{prefix}{field.alias or name}"
        yield column, _type_name(field.annotation), field.description or ""
        for nested in _models(field.annotation):
            separator = "[]." if get_args(field.annotation) and "tuple" in str(field.annotation) else "."
            yield from describe_columns(nested, column + separator)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _type_name(annotation: Any) -> str:
    """The JSON type, without null."""
    if isinstance(annotation, type):
        if issubclass(annotation, BaseModel):
            return "object"
        return {str: "string", float: "number", int: "integer", bool: "boolean"}[annotation]
    origin, arguments = getattr(annotation, "__origin__", None), get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return _type_name(arguments[0])
    if origin is dict:
        return f"object of {_type_name(arguments[1])}s"
    if origin is tuple:
        inner = _type_name(arguments[0])
        return f"list of {inner}s" if arguments[-1] is Ellipsis else f"[{inner}, {inner}]"
    return " or ".join(dict.fromkeys(_type_name(kind) for kind in arguments if kind is not type(None)))


# --- the result in Python --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rating:
    """The rating of one clip. `RatingRow` describes the columns of `to_row`."""

    clip: str
    content_id: str
    score: float
    """Expected MOS, on `scale`; calibrated if `calibration` is set."""
    raw_score: float | None
    """The score before calibration, on `scale`; None without calibration."""
    interval: tuple[float, float] | None
    """Prediction interval of the MOS, low and high, see `lmm_qa.model.calibration`; None without calibration."""
    calibration: CalibrationUse | None
    scale: tuple[float, float]
    level: str
    """The most probable level word."""
    probabilities: dict[str, float]
    """P(level word), worst first; sums to 1."""
    std: float
    """Standard deviation of the level distribution, in MOS units; of the raw score, as are level and probabilities."""
    level_mass: float
    """Share of the vocabulary's probability on the level words; near 0, the prompt was not understood."""
    frames: Frames
    """The sampled frames without their pixels (`views` is empty), so that many ratings fit into memory."""
    model: str
    adapter: str | None
    prompt: str
    rater_id: str
    seconds: float
    """Seconds that the model spent on this clip (its share of the batch)."""
    profile: Profile | None = None
    """The defect profile; None unless requested, see `Details`."""
    profile_id: str | None = None
    """What determines the profile, see `lmm_qa.defects.diagnosis.profile_id`; None without a profile."""
    explanation: str | None = None
    """Explanation in words; None unless requested."""
    explained_by: str | None = None
    """`model`, or why its explanation was replaced by a template (see `lmm_qa.defects.explanation`)."""
    timeline: Timeline | None = None
    """The score over time; None unless requested."""
    measured: str | None = None
    """What was measured on all frames, in the words of the prompt; None if the prompt does not contain it."""

    def to_row(self) -> Row:
        """The rating as plain data, see `RatingRow`."""
        info, profile = self.frames.info, self.profile
        found = [FoundDefect.model_validate(one.to_row()) for one in profile.found] if profile else None
        sound = self.frames.sound
        found_later = (sound and sound.warning, self.frames.measurement_error)
        warnings = (*info.warnings, *(text for text in found_later if text))
        # Not validated here: a value that JSON cannot represent is refused when the row is written.
        return RatingRow.model_construct(
            **{name: getattr(self, name) for name in RatingRow.model_fields if hasattr(self, name)}
            | {
                "frames": SampledFrames.model_construct(indices=self.frames.indices, seconds=self.frames.seconds),
                "video": VideoInfo.model_construct(
                    width=info.width,
                    height=info.height,
                    fps=info.fps,
                    frames=info.frames,
                    duration=info.duration,
                    decoder=self.frames.decoder,
                ),
                "audio": _audio(sound),
                "lip_sync": _lip_sync(self.frames.lip_sync, curves=self.timeline is not None),
                "defects": profile.defects if profile else None,
                "found": None if found is None else tuple(found),
                "defect_mass": profile.mass if profile else None,
                "warnings": warnings or None,
            }
        ).to_row()


def _audio(sound: Sound | None) -> AudioInfo | None:
    if sound is None:
        return None
    known = sound.state is not SoundState.NONE
    return AudioInfo.model_construct(
        state=sound.state.value,
        seconds=sound.seconds if known else None,
        offset=sound.offset if known else None,
        loudness=sound.loudness,
        clipped=sound.clipped if known else None,
        error=sound.error,
    )


def _lip_sync(lip_sync: LipSync | None, curves: bool) -> LipSyncInfo | None:
    if lip_sync is None:
        return None
    return LipSyncInfo.model_construct(
        offset=lip_sync.offset,
        strength=lip_sync.strength,
        speech=lip_sync.speech,
        rate=RATE if curves else None,
        mouth=lip_sync.mouth if curves else None,
        voice=lip_sync.voice if curves else None,
    )


@dataclass(frozen=True)
class Failure:
    """A clip that could not be rated, and why."""

    clip: str
    content_id: str | None
    error: ClipError
    model: str
    rater_id: str

    def to_row(self) -> Row:
        """The failure as plain data: all columns of a rating, see `RatingRow`."""
        return RatingRow(
            clip=self.clip,
            content_id=self.content_id,
            model=self.model,
            rater_id=self.rater_id,
            error=RowError(kind=type(self.error).__name__, message=str(self.error)),
        ).to_row()


def read_timeline(spans: Sequence[Span], scores: Sequence[float], scale: tuple[float, float]) -> Timeline:
    """Make the timeline from the scores of the windows.

    Args:
        spans: start and end of each window in seconds, in order.
        scores: score of each window.
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
    window = spans[0][1] - spans[0][0]
    return Timeline.model_construct(window=window, seconds=tuple(middles), scores=tuple(scores), low=tuple(low))
