"""A self-contained HTML report of ratings: score distribution, a table of clips, and details of each clip.

The page loads nothing from a network; its only script is allowed by its hash and works from a local file. Content of
rows is shown as text, never as markup. Frames are decoded again from the clips and written clip by clip. If a
clip is not found, the page says so and shows the rest. What it shows of a clip is in `page/clip.html`, which the other
pages use too.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib import resources
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from lmm_qa.config import Sampling, View
from lmm_qa.defects.vocabulary import BY_NAME
from lmm_qa.errors import ClipError, ClipUnreadable, ResultsError, ScoresError, UsageError
from lmm_qa.evaluation import evaluate
from lmm_qa.evaluation.evaluate import Evaluation
from lmm_qa.evaluation.labels import Label, Score, find_videos, join, read_scores
from lmm_qa.evaluation.player import ClipAddresses, is_playable
from lmm_qa.files.tables import writing
from lmm_qa.manifest import content_id
from lmm_qa.ratings.io import read_ratings
from lmm_qa.ratings.rows import FoundDefect, RatingRow, Timeline
from lmm_qa.video.decode import Frames
from lmm_qa.video.decoder_pool import DecoderPool
from lmm_qa.video.display import Picture
from lmm_qa.video.measurement.lip_sync import CLEAR_MATCH
from lmm_qa.video.temporal import Span

THUMBNAILS = 6
"""Thumbnails of a filmstrip."""
SAMPLING = Sampling(strategy="fps", fps=8, frames=128)
"""Dense enough that there is a frame near any time."""
VIEW = View(max_pixels=144 * 128)
JPEG_QUALITY = 60
BINS = 20
LARGEST_ERRORS = 10
PRESENT = 0.5
"""Probability from which a defect counts as found, in rows without `found`."""
WHOLE_CLIP = 0.9
"""A defect that lasts at least this share of the clip is not used to choose the worst moment."""
NOT_HTML = re.compile("[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufdcf\ufdf0-\ufffd\U00010000-\U0010fffd]")
"""Characters that HTML does not allow (HTML Living Standard, 13.2.3.5)."""


@dataclass(frozen=True)
class RatedClip:
    """A clip with a score."""

    number: int
    """From 1, in the order of the ratings."""
    row: RatingRow
    score: float
    file: Path | None
    """The video; None if it was not found."""
    mos: float | None = None
    expected: float | None = None
    """The score mapped to MOS by the fitted curve; the score itself if none was fitted."""

    @property
    def prediction_error(self) -> float | None:
        """Expected minus true MOS; None without a label."""
        return None if self.mos is None or self.expected is None else self.expected - self.mos

    @cached_property
    def findings(self) -> tuple[FoundDefect, ...] | None:
        """The defects found, the most probable first; None if the rating has no defect profile."""
        if self.row.found is not None or self.row.defects is None:
            return self.row.found
        probable = [(p, name) for name, p in self.row.defects.items() if p is not None and p >= PRESENT]
        return tuple(FoundDefect(defect=name, probability=p) for p, name in sorted(probable, reverse=True))

    @property
    def found_names(self) -> list[str]:
        """The names of the defects found, without repeats."""
        return list(dict.fromkeys(finding.defect for finding in self.findings or ()))

    @property
    def _spans(self) -> list[Span]:
        return [span for finding in self.findings or () for span in finding.seconds or ()]

    @property
    def worst_moment(self) -> float | None:
        """The moment that lowers the score most, in seconds: by the timeline, else by the most probable defect that
        does not last the whole clip; None if there is neither."""
        timeline = self.row.timeline
        if timeline is not None and timeline.low:
            low = [
                (score, second)
                for second, score in zip(timeline.seconds, timeline.scores, strict=True)
                if any(start <= second <= end for start, end in timeline.low)
            ]
            return min(low)[1] if low else sum(timeline.low[0]) / 2
        middles = [(start + end) / 2 for start, end in self._spans if end - start < WHOLE_CLIP * self.duration]
        return middles[0] if middles else None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, or their ratio if they are unknown."""
        video = self.row.video
        return (video.width, video.height) if video and video.width and video.height else (16, 9)

    @property
    def lowest(self) -> tuple[float, float] | None:
        """Second and score of the lowest window; None without a timeline, or if it has one window."""
        timeline = self.row.timeline
        if timeline is None or len(timeline.scores) < 2:
            return None
        return min(zip(timeline.seconds, timeline.scores, strict=True), key=lambda window: window[1])

    @property
    def duration(self) -> float:
        """Length of the time axis, in seconds."""
        if self.row.video is not None and self.row.video.duration:
            return self.row.video.duration
        timeline = self.row.timeline.seconds if self.row.timeline else ()
        return max([*timeline, *(end for _, end in self._spans)], default=0.0)


@dataclass(frozen=True)
class Axis:
    """A linear axis; positions on it are per cent."""

    low: float
    high: float

    @classmethod
    def over(cls, values: Iterable[float]) -> Axis:
        """The shortest axis that contains all values."""
        values = list(values)
        low, high = min(values), max(values)
        return cls(low, high) if low < high else cls(low - 0.5, high + 0.5)

    def at(self, value: float) -> float:
        """The position of a value, clipped to 0 to 100."""
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
    """The content of the page, except for the frames."""

    name: str
    """File name of the ratings."""
    clips: tuple[RatedClip, ...]
    failures: tuple[tuple[str, str], ...]
    """Name of each clip that could not be rated, and the reason."""
    raters: tuple[RatingRow, ...]
    """One row of each rater."""
    labelled: bool = False
    """Whether any rated clip has a label."""
    evaluation: Evaluation | None = None
    """None without labels, or if the metrics are undefined."""
    undefined: str | None = None
    """Why the metrics are undefined."""

    @classmethod
    def of(cls, name: str, rows: Sequence[RatingRow], files: Mapping[str, Path]) -> Report:
        """A report without labels.

        Args:
            name: its title.
            rows: at least one.
            files: the video of each clip that was found, by its name.
        """
        scored = [(row, row.score) for row in rows if row.score is not None and not row.error]
        rated = [RatedClip(number, row, score, files.get(row.clip)) for number, (row, score) in enumerate(scored, 1)]
        failures = tuple((row.clip, _reason(row)) for row in rows if row.score is None or row.error)
        raters = tuple({row.rater_id: row for row in rows}.values())
        return cls(name, tuple(rated), failures, raters)

    @cached_property
    def axis(self) -> Axis:
        """The axis of the scores."""
        ends = [end for clip in self.clips for end in clip.row.scale or ()]
        return Axis.over([*ends, *self.scores])

    @property
    def mos_axis(self) -> Axis:
        """The axis of the MOS, between whole numbers."""
        mos = [clip.mos for clip in self.clips if clip.mos is not None]
        return Axis.over([np.floor(min(mos)), np.ceil(max(mos))])

    @property
    def bins(self) -> list[tuple[float, float, int]]:
        """The histogram of the scores: low, high, number of clips."""
        counts, edges = np.histogram(self.scores, BINS, (self.axis.low, self.axis.high))
        return [(low, high, int(n)) for low, high, n in zip(edges[:-1], edges[1:], counts, strict=True)]

    @property
    def scores(self) -> list[float]:
        return [clip.score for clip in self.clips]

    @property
    def quartiles(self) -> list[float]:
        """First quartile, median, third quartile of the scores."""
        return [float(score) for score in np.quantile(self.scores, (0.25, 0.5, 0.75))]

    @property
    def curve(self) -> list[tuple[float, float]]:
        """Points (score, MOS) of the fitted curve over the scores of labelled clips."""
        if self.evaluation is None:
            return []
        scores = [clip.score for clip in self.clips if clip.mos is not None]
        grid = np.linspace(min(scores), max(scores), 100)
        return [(float(score), float(mos)) for score, mos in zip(grid, self.evaluation.logistic(grid), strict=True)]

    @cached_property
    def defects(self) -> dict[str, int]:
        """Number of clips with each defect, the most frequent first; without defects that no clip has."""
        return dict(Counter(name for clip in self.clips for name in clip.found_names).most_common())

    def defect_indices(self, clip: RatedClip) -> list[int]:
        """Indices of the clip's defects in `defects`."""
        order = list(self.defects)
        return [order.index(name) for name in clip.found_names]

    @property
    def largest_errors(self) -> list[RatedClip]:
        """The clips with the largest prediction errors, in decreasing order."""
        errors = [
            (abs(clip.prediction_error), -clip.number, clip) for clip in self.clips if clip.prediction_error is not None
        ]
        return [clip for *_, clip in sorted(errors, reverse=True)[:LARGEST_ERRORS]]

    def has(self, column: str) -> bool:
        """Whether any clip has a value in this column."""
        return any(getattr(clip.row, column) is not None for clip in self.clips)


def load(ratings: Path, labels: Sequence[Label] = (), clips: Sequence[str] = ()) -> Report:
    """Read the content of the page.

    Args:
        ratings: .jsonl, .csv or .parquet, as `lmm-qa rate` writes them.
        labels: MOS of the clips.
        clips: the videos: files, folders, globs and lists, as for rating. By default they are looked up by the path in
            the ratings, below the working directory and the folder of the ratings; a row must then have the
            `content_id` of its video, so that ratings from somebody else cannot show other files of that name.

    Raises:
        UsageError: a row is not a rating; `clips` match nothing.
        ResultsError: the ratings cannot be read, or are empty.
        ManifestError, ScoresError: no label belongs to a rated clip; a clip is rated twice and has a label.
    """
    rows = [RatingRow.parse(row, f"{ratings}, row {number}") for number, row in enumerate(read_ratings(ratings), 1)]
    if not rows:
        raise ResultsError(f"{ratings} contains no ratings")
    files = find_videos([row.clip for row in rows], clips, ratings.parent)
    files = files if clips else {row.clip: files[row.clip] for row in rows if row.clip in files and row.content_id}
    report = Report.of(ratings.name, rows, files)
    return _with_labels(report, read_scores(ratings), labels) if labels else report


def _reason(row: RatingRow) -> str:
    return str(row.error or "the row contains no score and no error")


def _with_labels(report: Report, scores: Sequence[Score], labels: Sequence[Label]) -> Report:
    mos = {pair.score.clip: pair.label.mos for pair in join(labels, scores).pairs}
    evaluation, undefined = None, None
    try:
        evaluation = evaluate.evaluate(scores, labels)
    except ScoresError as error:
        undefined = str(error)
    expected = np.array(report.scores) if evaluation is None else evaluation.logistic(np.array(report.scores))
    clips = tuple(
        replace(clip, mos=mos.get(clip.row.clip), expected=value)
        for clip, value in zip(report.clips, expected.tolist(), strict=True)
    )
    return replace(report, clips=clips, labelled=bool(mos), evaluation=evaluation, undefined=undefined)


# --- frames ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlaceBox:
    """A place in a frame; per cent of its width and height."""

    name: str
    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class Thumbnail:
    """A frame of a filmstrip."""

    seconds: float
    width: int
    height: int
    jpeg: str
    """Base64."""
    worst: bool = False
    """Whether it shows the worst moment."""
    boxes: tuple[PlaceBox, ...] = ()
    """Where the defects are, if that is known."""


@dataclass(frozen=True)
class Filmstrip:
    """The frames of a clip."""

    thumbnails: tuple[Thumbnail, ...] = ()
    """In the order of time."""
    missing: str | None = None
    """Why there are none."""
    playable: bool = False
    """Whether browsers play the clip itself."""
    duration: float = 0.0
    """Of the clip, in seconds; 0 if it is not known."""
    title: str = ""
    """What the frames are; empty: frames of the clip."""


def filmstrips(
    clips: Sequence[RatedClip], workers: int = 2, timeout: float = 60.0, decoders: DecoderPool | None = None
) -> Generator[Filmstrip, None, None]:
    """Decode the frames of each clip, in order; only a few clips are in memory at a time.

    Args:
        clips: of a report.
        workers: decoding processes.
        timeout: limit for one clip, in seconds.
        decoders: an open pool, which stays open, instead of a new one with `workers` and `timeout`.
    """
    with nullcontext(decoders) if decoders else DecoderPool(workers, timeout) as pool:
        decoded = pool.imap((clip.file for clip in clips if clip.file), SAMPLING, (VIEW,), factor=2)
        for clip in clips:
            if clip.file is None:
                yield Filmstrip(missing="no clip of this name was found")
                continue
            try:
                yield _filmstrip(clip, clip.file, next(decoded))
            except ClipError as error:
                yield Filmstrip(missing=str(error))


def _filmstrip(clip: RatedClip, file: Path, frames: Frames | ClipError) -> Filmstrip:
    if isinstance(frames, ClipError):
        raise frames
    if clip.row.content_id not in (None, content_id(file)):
        raise ClipUnreadable(f"{file} is not the clip that was rated: its content differs")
    times = np.array(frames.seconds)
    chosen = sorted({int((share + 0.5) * len(times) / THUMBNAILS) for share in range(THUMBNAILS)})
    worst = None
    if clip.worst_moment is not None:  # replaces the nearest of the evenly spaced frames
        worst = int(np.abs(times - clip.worst_moment).argmin())
        chosen[int(np.abs(times[chosen] - times[worst]).argmin())] = worst
    shots = (thumbnail(frames.views[0][index], frames.seconds[index], index == worst) for index in chosen)
    return Filmstrip(tuple(shots), playable=is_playable(file, frames.info), duration=frames.info.duration)


def thumbnail(picture: Picture, seconds: float, worst: bool = False) -> Thumbnail:
    """Encode a frame, (height, width, 3) uint8 RGB."""
    jpeg = io.BytesIO()
    Image.fromarray(picture).save(jpeg, "JPEG", quality=JPEG_QUALITY, optimize=True)
    height, width = picture.shape[:2]
    return Thumbnail(seconds, width, height, base64.b64encode(jpeg.getvalue()).decode("ascii"), worst)


# --- the page --------------------------------------------------------------------------------------------------------


@dataclass
class PageSize:
    """The size of the page, counted while it is written."""

    page: int = 0
    """Bytes."""
    frames: int = 0
    """Bytes of the frames, in base64."""
    clips: int = 0
    """Number of clips with frames."""
    embedded: int = 0
    """Number of clips that the page contains."""
    videos: int = 0
    """Bytes of these clips, in base64."""
    linked: int = 0
    """Number of clips that it plays from files in its folder."""

    def address(self, addresses: ClipAddresses, file: Path) -> str | None:
        """The address of a clip, counted."""
        found = addresses.address(file)
        embedded = found is not None and found.startswith("data:")
        self.embedded += embedded
        self.videos += len(found or "") if embedded else 0
        self.linked += found is not None and not embedded
        return found


def check_output(path: Path) -> None:
    """Check the output path before the clips are decoded.

    Raises:
        UsageError: the suffix is not .html (this protects ratings from being overwritten).
        ResultsError: the path is a folder.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"a report is an HTML file: name it .html, received {str(path)!r}")
    if path.is_dir():
        raise ResultsError(f"cannot write {path}: it is a folder")


def write(report: Report, filmstrips: Iterable[Filmstrip], path: Path, embed: int = 0) -> PageSize:
    """Write the page atomically, filmstrip by filmstrip. The same ratings and clips give the same page.

    Args:
        report: the content.
        filmstrips: one for each clip of the report, in order.
        path: the page; missing folders are created.
        embed: bytes of clips that the page may contain, see `lmm_qa.evaluation.player`.

    Raises:
        UsageError, ResultsError: the page cannot be written there.
    """
    size, addresses = PageSize(), ClipAddresses(path, embed)
    rows = _with_videos(zip(report.clips, filmstrips, strict=True), addresses, size)
    write_page(path, "report", size, report=report, rows=rows)
    return size


def write_page(path: Path, name: str, size: PageSize, **content: object) -> None:
    """Write a page atomically, piece by piece, and count its size.

    Args:
        path: the page; missing folders are created.
        name: of the template in `page/`; a script of that name adds to that of the player, and a style sheet of that
            name to that of the report.
        size: its `page` is counted.
        content: variables of the template; `style`, `script`, `script_hash` and `size` are added.

    Raises:
        UsageError, ResultsError: the page cannot be written there.
    """
    check_output(path)
    script = "".join(map(asset, ("player.js", "report.js") if name == "report" else ("player.js",)))
    pieces = (
        _environment()
        .get_template(f"{name}.html")
        .generate(
            **content,
            size=size,
            style="".join(map(asset, dict.fromkeys(("document.css", "report.css", f"{name}.css")))),
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
        )
    )
    with writing(path) as temporary, open(temporary, "wb") as file:
        for piece in pieces:
            size.page += file.write(NOT_HTML.sub("\ufffd", piece).encode())


def render(name: str, **content: object) -> str:
    """A part of a page, in HTML: the template `page/NAME.html` with these variables."""
    return NOT_HTML.sub("\ufffd", _environment().get_template(f"{name}.html").render(**content))


def asset(name: str) -> str:
    """A file in `page/`."""
    return (resources.files("lmm_qa.evaluation") / "page" / name).read_text(encoding="utf-8")


def _with_videos(
    clips: Iterable[tuple[RatedClip, Filmstrip]], addresses: ClipAddresses, size: PageSize
) -> Iterator[tuple[RatedClip, Filmstrip, str | None]]:
    """Add the address of each clip that can be played."""
    for clip, filmstrip in clips:
        size.frames += sum(len(thumbnail.jpeg) for thumbnail in filmstrip.thumbnails)
        size.clips += bool(filmstrip.thumbnails)
        video = size.address(addresses, clip.file) if clip.file and filmstrip.playable else None
        yield clip, filmstrip, video


@cache
def _environment() -> jinja2.Environment:
    """The templates in `page/`, with their filters."""
    page = jinja2.Environment(
        loader=jinja2.FunctionLoader(asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters |= {"term": _term, "definition": _definition, "bytes": format_bytes}
    page.filters |= {"percent": _percent, "signed": _signed, "span": _span}
    page.globals |= {"Axis": Axis, "titles": evaluate.TITLES, "unmatched": evaluate.unmatched}
    page.globals |= {"scores": _scores, "places": _places, "curve": _curve, "CLEAR_MATCH": CLEAR_MATCH}
    return page


def _scores(timeline: Timeline | None) -> list[tuple[float, float]]:
    """Second and score of each window."""
    return [] if timeline is None else list(zip(timeline.seconds, timeline.scores, strict=True))


def _curve(values: Sequence[float]) -> list[float]:
    """Heights in percent, from the top, of values that are scaled to the range of the curve."""
    low, high = min(values), max(values)
    return [round(100 - 100 * (value - low) / ((high - low) or 1), 1) for value in values]


def _places(filmstrips: Sequence[Filmstrip]) -> list[tuple[str, list[tuple[float, ...]]]]:
    """The boxes of each place over time: second, left, top, width, height."""
    found: dict[str, list[tuple[float, ...]]] = {}
    for frame in next((strip.thumbnails for strip in filmstrips if any(one.boxes for one in strip.thumbnails)), ()):
        for box in frame.boxes:
            found.setdefault(box.name, []).append((frame.seconds, box.left, box.top, box.width, box.height))
    return list(found.items())


def _term(defect: str) -> str:
    return BY_NAME[defect].term if defect in BY_NAME else defect.replace("_", " ")


def _definition(defect: str) -> str:
    return BY_NAME[defect].definition if defect in BY_NAME else ""


def _percent(probability: float) -> str:
    return "<1%" if 0 < probability < 0.005 else f"{probability:.0%}"


def _signed(number: float) -> str:
    return f"{round(number, 2) + 0.0:+.2f}"  # no -0.00


def _span(seconds: Span) -> str:
    return f"{seconds[0]:.1f} to {seconds[1]:.1f} s"


def format_bytes(number: int) -> str:
    """A number of bytes in kB or MB."""
    return f"{number / 1e6:.1f} MB" if number >= 1e6 else f"{number / 1e3:.0f} kB"
