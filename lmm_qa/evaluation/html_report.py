"""Ratings as one HTML file to look at: the distribution, a table, and of each clip its frames, defects and seconds.

The page holds all that it shows: it fetches nothing, and its one small script, which the page allows by its hash, works
from a file. Whatever a row says is text on it, never markup. Frames are read again from the clips, a few at a time, and
written as they come; of a clip that is not there any more the page says so, and shows the rest.

Knows what a row holds, none of it required but the clip's name; nothing of models.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Self

import jinja2
import numpy as np
from PIL import Image
from pydantic import ConfigDict, Field, model_validator

from lmm_qa.atomic import replacing
from lmm_qa.config import Sampling, Settings, View
from lmm_qa.defects.vocabulary import BY_NAME
from lmm_qa.errors import ClipError, ClipUnreadable, ResultsError, ScoresError, UsageError
from lmm_qa.evaluation import evaluate
from lmm_qa.evaluation.evaluate import Evaluation
from lmm_qa.evaluation.labels import Label, join, match, read_scores
from lmm_qa.manifest import content_id, expand
from lmm_qa.ratings_io import read_rows
from lmm_qa.video.decode import Frames
from lmm_qa.video.decoder_pool import DecoderPool
from lmm_qa.video.views import Picture

SHOTS = 6


"""Frames of a strip."""


VIEW = View(max_pixels=144 * 128)


SAMPLING = Sampling(strategy="fps", fps=8, frames=128)


"""What is read of a clip: so many small frames that one of them lies near any moment."""


JPEG_QUALITY = 60


BINS = 20


MISSES = 10


PRESENT = 0.5


"""P(yes) from which on a defect counts as found, in rows that do not say it themselves."""


ALL_ALONG = 0.9


"""Share of a clip from which on what lasts as long has no moment."""


NOT_HTML = re.compile("[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufdcf\ufdf0-\ufffd\U00010000-\U0010fffd]")


"""What may not stand in HTML, or not as itself (HTML Living Standard, 13.2.3.5)."""


Probability = Field(ge=0, le=1)


Seconds = tuple[float, float]


class _Part(Settings):
    """A part of a row; it may hold more than what is shown here."""

    model_config = ConfigDict(extra="ignore", coerce_numbers_to_str=True)


class Found(_Part):
    """A defect that is said to be there."""

    defect: str
    probability: float = Probability
    place: str | None = None
    seconds: tuple[Seconds, ...] | None = None


class Timeline(_Part):
    """The score over time."""

    window: float | None = None
    seconds: tuple[float, ...]
    scores: tuple[float, ...]
    low: tuple[Seconds, ...] | None = None

    @model_validator(mode="after")
    def _as_many(self) -> Self:
        if len(self.seconds) != len(self.scores) or not self.seconds:
            raise ValueError(f"{len(self.seconds)} seconds and {len(self.scores)} scores: as many are needed, and some")
        return self


class Video(_Part):
    """What the clip is."""

    width: int | None = None
    height: int | None = None
    fps: float | None = None
    duration: float | None = None


class Looked(_Part):
    """Which frames the model saw."""

    seconds: tuple[float, ...] | None = None


class Row(_Part):
    """What the page shows of a row of ratings; see `lmm_qa.rater.Rating.to_row`."""

    clip: str
    content_id: str | None = None
    score: float | None = None
    raw_score: float | None = None
    interval: tuple[float, float] | None = None
    scale: tuple[float, float] | None = None
    level: str | None = None
    probabilities: dict[str, float | None] | None = None
    std: float | None = None
    level_mass: float | None = None
    defect_mass: float | None = None
    frames: Looked | None = None
    video: Video | None = None
    model: str | None = None
    adapter: str | None = None
    prompt: str | None = None
    rater_id: str | None = None
    defects: dict[str, float | None] | None = None
    found: tuple[Found, ...] | None = None
    explanation: str | None = None
    explained_by: str | None = None
    timeline: Timeline | None = None
    error: dict[str, Any] | str | None = None

    @property
    def reason(self) -> str | None:
        """Why the clip has no score; None where it has one."""
        if isinstance(self.error, dict):
            return ": ".join(str(part) for part in (self.error.get("class"), self.error.get("message")) if part)
        return self.error or ("the row holds no score and no reason" if self.score is None else None)

    @property
    def present(self) -> tuple[Found, ...] | None:
        """What is said to be there, strongest first; None where nothing was asked."""
        if self.found is not None:
            return self.found
        if self.defects is None:
            return None
        strong = [(p, name) for name, p in self.defects.items() if p is not None and p >= PRESENT]
        return tuple(Found(defect=name, probability=p) for p, name in sorted(strong, reverse=True))

    @property
    def worst(self) -> float | None:
        """The moment that pulls the score down most, in seconds; None where none is known to."""
        line = self.timeline
        if line is not None and line.low:
            low = [
                (score, second)
                for second, score in zip(line.seconds, line.scores, strict=True)
                if any(start <= second <= end for start, end in line.low)
            ]
            return min(low)[1] if low else sum(line.low[0]) / 2
        spans = [span for found in self.present or () for span in found.seconds or ()]
        moments = [(start + end) / 2 for start, end in spans if end - start < ALL_ALONG * self.duration]
        return moments[0] if moments else None

    @property
    def duration(self) -> float:
        """Seconds that the time axis needs."""
        if self.video is not None and self.video.duration:
            return self.video.duration
        spans = [span for found in self.present or () for span in found.seconds or ()]
        return max([*(self.timeline.seconds if self.timeline else ()), *(end for _, end in spans)], default=0.0)


@dataclass(frozen=True)
class Entry:
    """A clip with a score."""

    number: int
    """From 1, in the order of the ratings."""
    row: Row
    score: float
    file: Path | None
    """Where the clip is thought to be."""
    mos: float | None = None
    """What people said."""
    expected: float | None = None
    """The MOS that the score stands for: by the fitted curve, or the score itself where none could be fitted."""

    @property
    def miss(self) -> float | None:
        """How much too high the clip was rated, in MOS units; None without a label."""
        return None if self.mos is None or self.expected is None else self.expected - self.mos


@dataclass(frozen=True)
class Axis:
    """A stretch of numbers on which the page places things, in per cent."""

    low: float
    high: float

    @classmethod
    def over(cls, values: Iterable[float]) -> Axis:
        """One that holds all values."""
        values = list(values)
        low, high = min(values), max(values)
        return cls(low, high) if low < high else cls(low - 0.5, high + 0.5)

    def at(self, value: float) -> float:
        """Where a value lies, 0 to 100; what is beyond an end, at that end."""
        return round(100 * min(max((value - self.low) / (self.high - self.low), 0.0), 1.0), 2)

    @property
    def ticks(self) -> list[float]:
        """At most seven round numbers."""
        span = self.high - self.low
        steps = (base * 10.0**power for power in range(-9, 300) for base in (1, 2, 5))
        step = next(step for step in steps if span / step <= 6)
        first, last = int(np.ceil(self.low / step - 1e-6)), int(np.floor(self.high / step + 1e-6))
        return [round(number * step, 9) for number in range(first, last + 1)]


@dataclass(frozen=True)
class Report:
    """What the page shows, but for the frames."""

    name: str
    """Of the ratings."""
    entries: tuple[Entry, ...]
    failed: tuple[Row, ...]
    labelled: bool = False
    evaluation: Evaluation | None = None
    """None without labels, and where they allow none."""
    refusal: str | None = None
    """Why they allow none."""

    @cached_property
    def axis(self) -> Axis:
        """Of the scores."""
        ends = [end for entry in self.entries for end in entry.row.scale or ()]
        return Axis.over([*ends, *(entry.score for entry in self.entries)])

    @property
    def mos_axis(self) -> Axis:
        """Of the labels, to whole numbers."""
        mos = [entry.mos for entry in self.entries if entry.mos is not None]
        return Axis.over([np.floor(min(mos)), np.ceil(max(mos))])

    @property
    def bins(self) -> list[tuple[float, float, int]]:
        """The histogram of the scores: from, to, clips."""
        counts, edges = np.histogram(self.scores, BINS, (self.axis.low, self.axis.high))
        return [(low, high, int(n)) for low, high, n in zip(edges[:-1], edges[1:], counts, strict=True)]

    @property
    def scores(self) -> list[float]:
        return [entry.score for entry in self.entries]

    @property
    def quartiles(self) -> list[float]:
        """The scores that a quarter, half, and three quarters of the clips do not exceed."""
        return [float(score) for score in np.quantile(self.scores, (0.25, 0.5, 0.75))]

    @property
    def curve(self) -> list[tuple[float, float]]:
        """Points of the fitted curve, over the scores of labelled clips: score, MOS."""
        if self.evaluation is None:
            return []
        scores = [entry.score for entry in self.entries if entry.mos is not None]
        line = np.linspace(min(scores), max(scores), 100)
        return [(float(score), float(mos)) for score, mos in zip(line, self.evaluation.logistic(line), strict=True)]

    @cached_property
    def defects(self) -> dict[str, int]:
        """How many clips have each defect, the most frequent first; without those that none has."""
        return dict(Counter(name for entry in self.entries for name in _names(entry.row)).most_common())

    def places(self, row: Row) -> list[int]:
        """Where the defects found in a clip stand among `defects`."""
        order = list(self.defects)
        return [order.index(name) for name in _names(row)]

    @property
    def raters(self) -> list[Row]:
        """A row of each rater."""
        rows = [*(entry.row for entry in self.entries), *self.failed]
        return list({row.rater_id: row for row in reversed(rows)}.values())[::-1]

    @property
    def misses(self) -> list[Entry]:
        """The clips that were missed most, the worst first."""
        missed = [(abs(entry.miss), -entry.number, entry) for entry in self.entries if entry.miss is not None]
        return [entry for *_, entry in sorted(missed, reverse=True)[:MISSES]]

    def has(self, column: str) -> bool:
        """Whether any clip has a value there."""
        return any(getattr(entry.row, column) is not None for entry in self.entries)


def _names(row: Row) -> list[str]:
    """The defects found, each once."""
    return list(dict.fromkeys(found.defect for found in row.present or ()))


def load(ratings: Path, labels: Sequence[Label] = (), clips: Sequence[str] = ()) -> Report:
    """Read what the page is to show.

    Args:
        ratings: .jsonl, .csv or .parquet, as `lmm-qa rate` writes them.
        labels: what people said of the clips.
        clips: where the clips are: files, folders, globs and lists, as for rating. By default they are looked for by
            the path that the ratings name, from here and from the folder of the ratings.

    Raises:
        UsageError: a row holds something else than ratings do; `clips` match nothing.
        ResultsError: the ratings cannot be read, or there are none.
        ManifestError, ScoresError: no label belongs to a rated clip; a clip is rated twice, so that no one score can
            be compared with its label.
    """
    rows = [Row.parse(row, f"{ratings}, row {number}") for number, row in enumerate(read_rows(ratings), 1)]
    if not rows:
        raise ResultsError(f"{ratings} holds no ratings: there is nothing to show")
    files = _find([row.clip for row in rows], clips, ratings.parent)
    scored = [(row, row.score) for row in rows if row.reason is None and row.score is not None]
    entries = [Entry(n, row, score, files.get(row.clip)) for n, (row, score) in enumerate(scored, 1)]
    failed = tuple(row for row in rows if row.reason is not None)
    if not labels:
        return Report(ratings.name, tuple(entries), failed)
    scores = read_scores(ratings)
    mos = {pair.score.clip: pair.label.mos for pair in join(labels, scores).pairs}
    evaluation, refusal = None, None
    try:
        evaluation = evaluate.evaluate(scores, labels)
    except ScoresError as error:
        refusal = str(error)
    judged = [_judged(entry, mos.get(entry.row.clip), evaluation) for entry in entries]
    return Report(ratings.name, tuple(judged), failed, bool(mos), evaluation, refusal)


def _judged(entry: Entry, mos: float | None, evaluation: Evaluation | None) -> Entry:
    """With its label, and what the score stands for."""
    expected = entry.score if evaluation is None else float(evaluation.logistic(np.array([entry.score]))[0])
    return replace(entry, mos=mos, expected=expected)


def _find(names: Sequence[str], clips: Sequence[str], beside: Path) -> dict[str, Path]:
    """Where the clips are that rows name, as far as they can be found."""
    if clips:
        given = {clip.name: clip.path for clip in expand(clips)}
        return {name: given[found] for name, found in match(list(dict.fromkeys(names)), list(given)).items()}
    places = {name: (Path(name), beside / name) for name in names}
    there = {name: [place for place in both if os.path.isfile(place)] for name, both in places.items()}
    return {name: found[0] for name, found in there.items() if found}


# --- frames ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shot:
    """A frame of a strip."""

    seconds: float
    width: int
    height: int
    jpeg: str
    """Base64."""
    worst: bool
    """Whether it shows the moment that pulls the score down most."""


@dataclass(frozen=True)
class Strip:
    """What a clip looks like."""

    shots: tuple[Shot, ...] = ()
    """In the order of time."""
    absence: str | None = None
    """Why there are none."""


def strips(entries: Sequence[Entry], workers: int = 2, timeout: float = 60.0) -> Iterator[Strip]:
    """Read the frames of each clip again, in order; a few clips are in memory at a time.

    Args:
        entries: of a report.
        workers: decoding processes.
        timeout: seconds that one clip may take.
    """
    with DecoderPool(workers, timeout) as pool:
        read = pool.imap((entry.file for entry in entries if entry.file), SAMPLING, (VIEW,), factor=2)
        for entry in entries:
            if entry.file is None:
                yield Strip(absence="no clip of this name was found")
                continue
            try:
                yield Strip(_shots(entry, entry.file, next(read)))
            except ClipError as error:
                yield Strip(absence=str(error))


def _shots(entry: Entry, file: Path, frames: Frames | ClipError) -> tuple[Shot, ...]:
    if isinstance(frames, ClipError):
        raise frames
    if entry.row.content_id not in (None, content_id(file)):
        raise ClipUnreadable(f"{file} is not the clip that was rated: its content is another")
    moments = np.array(frames.seconds)
    chosen = sorted({int((share + 0.5) * len(moments) / SHOTS) for share in range(SHOTS)})
    worst = None
    if entry.row.worst is not None:
        worst = int(np.abs(moments - entry.row.worst).argmin())
        chosen[int(np.abs(moments[chosen] - moments[worst]).argmin())] = worst
    return tuple(_shot(frames.views[0][index], frames.seconds[index], index == worst) for index in chosen)


def _shot(picture: Picture, seconds: float, worst: bool) -> Shot:
    jpeg = io.BytesIO()
    Image.fromarray(picture).save(jpeg, "JPEG", quality=JPEG_QUALITY, optimize=True)
    height, width = picture.shape[:2]
    return Shot(seconds, width, height, base64.b64encode(jpeg.getvalue()).decode("ascii"), worst)


# --- the page --------------------------------------------------------------------------------------------------------


@dataclass
class Size:
    """What has been written so far."""

    page: int = 0
    """Bytes."""
    shots: int = 0
    """Bytes of frames, as they stand in the page."""
    clips: int = 0
    """With frames."""


def check_output(path: Path) -> None:
    """Find out before the clips are read, not after.

    Raises:
        UsageError: the suffix is not .html: a page in the place of ratings would be a loss.
        ResultsError: a folder is there.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"a report is an HTML file: name it .html, received {str(path)!r}")
    if path.is_dir():
        raise ResultsError(f"cannot write {path}: it is a folder")


def write(report: Report, strips: Iterable[Strip], path: Path) -> Size:
    """Write the page, strip by strip; it is there whole or not at all. The same ratings and clips give the same page.

    Args:
        report: what it shows.
        strips: one for each entry of the report, in order.
        path: the page; missing folders are made.

    Raises:
        UsageError, ResultsError: it cannot be written there.
    """
    check_output(path)
    size = Size()
    script = _asset("report.js")
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    pieces = _template().generate(
        report=report,
        details=_counted(zip(report.entries, strips, strict=True), size),
        size=size,
        style=_asset("report.css"),
        script=script,
        allowed=allowed,
        titles=evaluate.TITLES,
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside, open(beside, "wb") as file:
            for piece in pieces:
                size.page += file.write(NOT_HTML.sub("\ufffd", piece).encode())
    except OSError as error:
        raise ResultsError(f"cannot write {path}: {error.strerror or error}") from None
    return size


def _counted(details: Iterable[tuple[Entry, Strip]], size: Size) -> Iterator[tuple[Entry, Strip]]:
    for entry, strip in details:
        size.shots += sum(len(shot.jpeg) for shot in strip.shots)
        size.clips += bool(strip.shots)
        yield entry, strip


def _asset(name: str) -> str:
    return (resources.files("lmm_qa.evaluation") / "page" / name).read_text(encoding="utf-8")


def _template() -> jinja2.Template:
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"term": _term, "definition": _definition, "bytes": readable}
    page.filters |= {"percent": _percent, "signed": _signed, "span": _span}
    page.globals |= {"Axis": Axis, "names": _names}
    return page.from_string(_asset("report.html"))


def _term(defect: str) -> str:
    return BY_NAME[defect].term if defect in BY_NAME else defect.replace("_", " ")


def _definition(defect: str) -> str:
    return BY_NAME[defect].definition if defect in BY_NAME else ""


def _percent(probability: float) -> str:
    return "<1%" if 0 < probability < 0.005 else f"{probability:.0%}"


def _signed(number: float) -> str:
    return f"{round(number, 2) + 0.0:+.2f}"  # no -0.00


def _span(seconds: Seconds) -> str:
    return f"{seconds[0]:.1f} to {seconds[1]:.1f} s"


def readable(number: int) -> str:
    """A number of bytes, for people."""
    return f"{number / 1e6:.1f} MB" if number >= 1e6 else f"{number / 1e3:.0f} kB"
