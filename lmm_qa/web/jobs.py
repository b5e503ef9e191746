"""What visitors of the page ask for: rate clips, compare two lots of them, report a set. Knows nothing of gradio.

Each job is an iterator of steps. One job runs at a time, and is stopped by closing its iterator. All jobs decode with
the same processes; those that read for a job that was stopped are replaced.
"""

from __future__ import annotations

import shlex
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

from lmm_qa.defects.profile import AnswerSource
from lmm_qa.errors import ClipError, ClipTimeout, LmmQaError, UsageError, plural
from lmm_qa.evaluation import comparison_page, html_report
from lmm_qa.evaluation.compare import (
    PAIR_HEADER,
    TIE,
    Comparison,
    ScorePair,
    compare,
    footnotes,
    found_defects,
    scope_notes,
    sections,
)
from lmm_qa.evaluation.html_report import SAMPLING, Axis, Filmstrip, RatedClip, Report, render
from lmm_qa.evaluation.labels import find_videos, match
from lmm_qa.evaluation.pairing import RatingSet
from lmm_qa.evaluation.player import EMBED_LIMIT
from lmm_qa.files.tables import Row, write_rows
from lmm_qa.manifest import Clip, expand
from lmm_qa.rater import Rater
from lmm_qa.ratings.io import read_ratings
from lmm_qa.ratings.rows import Details, Failure, Rating, RatingRow
from lmm_qa.video.decoder_pool import DecoderPool
from lmm_qa.web.looked_at import WIDE, looked_at, report_strip
from lmm_qa.web.shelf import RaterSettings, Shelf, without_folders
from lmm_qa.web.workspace import Result, Workspace

Outcomes = Generator[Rating | Failure, None, None]

RATINGS = (".jsonl", ".csv", ".parquet")
PAIRS = 12
"""Pairs that the page shows, those that differ most."""
PAIR_BY = ("name", "stem", "thqa")
"""How the page can pair clips, see `lmm_qa.evaluation.pairing.pair_sets`; the others need columns or files."""


class Given(NamedTuple):
    """A file that a visitor uploaded, or chose among those that the operator offers."""

    path: Path
    name: str
    """As the visitor knows it."""
    uploaded: bool = True


@dataclass(frozen=True)
class Request:
    """How to rate."""

    rater: str
    """Name on the shelf."""
    settings: RaterSettings = field(default_factory=RaterSettings)
    timeline: bool = True
    answers_from: AnswerSource = "adapter"

    @property
    def details(self) -> Details:
        """With a profile and an explanation."""
        return Details(True, True, self.timeline, self.answers_from)

    def command(self, names: Sequence[str], shelf: Shelf) -> str:
        """The command line that does the same."""
        arguments = ["lmm-qa", "rate", *names, "--explain"]
        arguments += ["--timeline"] if self.timeline else []
        arguments += ["--model", self.rater] if self.rater != "embedded" else []
        arguments += ["--answers-from", "base"] if self.answers_from == "base" else []
        return shlex.join([*arguments, *self.settings.arguments(), "-o", "ratings.jsonl"])


class Step(NamedTuple):
    """The state of a job."""

    text: str
    done: int = 0
    total: int = 0
    html: str | None = None
    """The result, if there is one to show."""


@dataclass(frozen=True)
class RatedFile:
    """A clip of a request."""

    name: str
    file: Path
    address: str
    row: RatingRow
    filmstrips: tuple[Filmstrip, ...] = ()
    """What the model looked at."""
    strip: Filmstrip = field(default_factory=Filmstrip)
    """Frames for a report."""

    @property
    def error(self) -> str | None:
        """Why it was not rated."""
        return str(self.row.error) if self.row.error else None

    @property
    def clip(self) -> RatedClip | None:
        """None if it was not rated."""
        return None if self.row.score is None or self.row.error else RatedClip(1, self.row, self.row.score, self.file)

    @property
    def video(self) -> str | None:
        """The address, if browsers play it."""
        return self.address if self.strip.playable else None


@dataclass
class Work:
    """A request that is worked on."""

    visitor: str
    request: Request
    result: Result
    total: int = 0
    """Number of clips to rate."""
    rated: list[RatedFile] = field(default_factory=list)
    """By now. Empty once the request has ended in a result of its own."""
    cancelled: bool = False
    ended: threading.Event = field(default_factory=threading.Event)


class _Cancelled(Exception):
    """Ends a request."""


@dataclass(frozen=True)
class ShownPair:
    """Two clips side by side."""

    number: int
    labels: tuple[str, str]
    pair: ScorePair
    sides: tuple[RatedFile, RatedFile]


@dataclass
class Jobs:
    """Does what visitors ask for; use as a context manager."""

    workspace: Workspace
    shelf: Shelf
    sets: dict[str, Path] = field(default_factory=dict)
    """Folders and ratings that the operator offers, by the name that visitors see."""
    workers: int = 2
    """Decoding processes."""
    timeout: float = 60.0
    """Seconds for decoding a clip."""
    time_limit: float = 600.0
    """Seconds for a request; clips that are not rated by then are reported as such."""

    def __enter__(self) -> Self:
        self._one_at_a_time = threading.Lock()
        self._works: deque[Work] = deque(maxlen=2)  # the last two
        self._ending = threading.Lock()
        self.decoders = DecoderPool(self.workers, self.timeout)
        self._shown_by = DecoderPool(
            1, self.timeout
        )  # of its own: what is shown of a clip does not wait for the next clips
        self.decoders.start()
        self._shown_by.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.decoders.close()
        self._shown_by.close()

    @contextmanager
    def _turn(self, request: Request, visitor: str) -> Iterator[Work]:
        """The work on a request, when it is its turn. Clips that it asked for and did not wait for are abandoned."""
        with self._one_at_a_time:
            work = Work(visitor, request, self.workspace.new_result())
            self._works.append(work)
            try:
                with suppress(_Cancelled):
                    yield work
                    work.rated = []
            finally:
                with self._ending:
                    self._interrupt()
                    work.ended.set()

    def _interrupt(self) -> None:
        self.decoders.interrupt()
        self._shown_by.interrupt()

    def cancel(self, visitor: str) -> Iterator[Step]:
        """Cancel the request of a visitor if it is worked on, or was when its iterator was closed.

        Yields:
            What was rated by then, if anything was; after the clip that is being rated.
        """
        work = next((one for one in reversed(self._works) if one.visitor == visitor), None)
        if work is None:
            return
        work.cancelled = True
        with self._ending:
            if not work.ended.is_set():
                self._interrupt()
        work.ended.wait(self.time_limit)
        rated, work.rated = work.rated, []
        if rated:
            note = f"Cancelled: {len(rated)} of {plural(work.total)} done"
            yield Step(note, html=self._clips_page(work, rated, note))

    def public(self, text: object) -> str:
        """A message without paths of this machine."""
        return without_folders(str(text).replace(f"{self.workspace.folder}/", "").replace(str(Path.home()), "~"))

    # --- rate ----------------------------------------------------------------------------------------------------

    def rate(self, given: Sequence[Given], request: Request, visitor: str = "") -> Iterator[Step]:
        """Rate clips; two are also compared.

        Args:
            given: clips.
            request: how.
            visitor: who may `cancel` it.

        Raises:
            LmmQaError: none can be rated; the message is for the operator, see `public`.
        """
        with self._turn(request, visitor) as work:
            rated = yield from self._rate(_clips_only(given), work)
            yield Step("Writing the report")
            yield Step(_summary(rated), html=self._clips_page(work, rated))

    def _clips_page(self, work: Work, rated: Sequence[RatedFile], note: str | None = None) -> str:
        """The result for clips; with a note, those of a request that was cancelled."""
        command = work.request.command([one.name for one in rated], self.shelf)
        downloads = self._write_report(rated, work.result)
        pair = None if note else _pair_of_two(rated)
        return render(
            "web_clips",
            note=note,
            items=rated,
            axis=_axis(rated),
            downloads=downloads,
            command=command,
            verdict=_verdict(pair.pair) if pair else None,
            pairs=list(self._show_pairs([pair])) if pair else [],
        )

    def _rate(self, given: Sequence[Given], work: Work, prefix: str = "clip") -> Generator[Step, None, list[RatedFile]]:
        """Rate clips into the result of a request."""
        request, result, total = work.request, work.result, len(given)
        work.total += total
        yield Step(f"Loading the rater {request.rater}")
        rater = self.shelf.rater(request.rater, request.settings)
        files = [result.add(one.path, f"{prefix}{number}", one.uploaded) for number, one in enumerate(given)]
        clips = [Clip(file, one.name, "upload") for file, one in zip(files, given, strict=True)]
        rated: list[RatedFile] = []
        end = time.monotonic() + self.time_limit
        yield Step(f"Rating {clips[0].name}", 0, total)
        outcomes = rater.rate_all(clips, details=request.details, batch_size=1, decoders=self.decoders)
        with closing(cast(Outcomes, outcomes)):
            for clip in clips:
                if time.monotonic() > end:
                    error = ClipTimeout(f"the request took longer than {self.time_limit:g} s: ask for fewer clips")
                    outcome: Rating | Failure = Failure(clip.name, None, error, request.rater, rater.rater_id)
                else:
                    outcome = next(outcomes)
                if work.cancelled:
                    raise _Cancelled
                rated.append(self._rated(outcome, clip, rater, result))
                work.rated.append(rated[-1])
                done = len(rated)
                yield Step(f"Rating {clips[done].name}" if done < total else "Rated", done, total)
        return rated

    def _rated(self, outcome: Rating | Failure, clip: Clip, rater: Rater, result: Result) -> RatedFile:
        row = self._public_row(outcome.to_row(), clip)
        address = result.address(clip.path.name)
        parsed = RatingRow.parse(row, clip.name)
        one = RatedFile(clip.name, clip.path, address, parsed)
        if one.clip is None:
            return one
        settings = rater.settings
        views = (*settings.views, WIDE)
        frames = next(self._shown_by.imap([clip.path], settings.sampling, views, rater.factor))
        if isinstance(frames, ClipError):
            return replace(one, filmstrips=(Filmstrip(missing=self._clip_message(frames, clip)),))
        strips = tuple(looked_at(one.clip, frames, settings.views))
        return replace(one, filmstrips=strips, strip=report_strip(one.clip, clip.path, frames))

    def _public_row(self, row: Row, clip: Clip) -> Row:
        """A row without paths of this machine."""
        error = row["error"]
        if error:
            row["error"] = error | {"message": self._clip_message(error["message"], clip)}
        for column in ("adapter", "model"):
            if row[column]:
                row[column] = self.public(row[column])
        if row["warnings"]:
            row["warnings"] = [self._clip_message(warning, clip) for warning in row["warnings"]]
        return row

    def _clip_message(self, text: object, clip: Clip) -> str:
        return self._named(text, {clip.name: clip.path})

    def _named(self, text: object, files: Mapping[str, Path]) -> str:
        """A message for visitors, in which files have the names that visitors gave them."""
        said = str(text)
        for name, file in files.items():
            said = said.replace(str(file), name)
        return self.public(said)

    def _write_report(self, rated: Sequence[RatedFile], result: Result) -> list[tuple[str, str]]:
        """Write rows, and a report unless clips share a name. Returns the name and address of each download."""
        write_rows(result.path("ratings.jsonl"), [one.row.to_row() for one in rated])
        rows = ("ratings.jsonl", result.address("ratings.jsonl"))
        if len({one.name for one in rated}) < len(rated):
            return [rows]
        report = Report.of("ratings.jsonl", [one.row for one in rated], {one.name: one.file for one in rated})
        strips = [one.strip for one in rated if one.clip]
        html_report.write(report, strips, result.path("report.html"), EMBED_LIMIT)
        return [rows, ("report.html", result.address("report.html"))]

    # --- compare -------------------------------------------------------------------------------------------------

    def compare(
        self, old: Sequence[Given], new: Sequence[Given], by: str, request: Request, visitor: str = ""
    ) -> Iterator[Step]:
        """Rate two lots of clips and compare them: one with one, or pairs as `lmm-qa compare` does.

        Args:
            old, new: clips.
            by: how they are paired, one of `PAIR_BY`; does not matter for one pair.
            request, visitor: as for `rate`.

        Raises:
            LmmQaError: they cannot be rated or compared; the message is for the operator, see `public`.
        """
        if not old or not new:
            raise UsageError("give clips on both sides: those to compare with, and the new ones")
        with self._turn(request, visitor) as work:
            result = work.result
            first = yield from self._rate(_clips_only(old), work, "old")
            second = yield from self._rate(_clips_only(new), work, "new")
            yield Step("Comparing")
            rated = [*first, *second]
            failures = [(one.name, one.error) for one in rated if one.error]
            content: dict[str, Any] = {"comparison": None, "verdict": None, "sections": (), "axis": None}
            downloads: list[tuple[str, str]] = []
            command = f"lmm-qa compare old/ new/ --pair {by}"
            if len(old) == len(new) == 1:
                command = request.command([one.name for one in rated], self.shelf)
                downloads += self._write_report(rated, result)[1:]
                pair = _pair_of_two(rated, ("old", "new"))
                pairs = [pair] if pair else []
                content["verdict"] = _verdict(pair.pair) if pair else "Nothing to compare"
                notes = [*scope_notes([_rating_set("clips", rated)])]
                notes += ["One pair says nothing about generators: give two or more to see an interval and tests."]
            else:
                sets = [_rating_set("old", first), _rating_set("new", second)]
                found = compare(sets[0], sets[1:], by=by)
                pairs = _differing_pairs(found, first, second)
                content |= {
                    "comparison": found,
                    "axis": comparison_page.difference_axis(found),
                    "sections": [each for each in sections(found) if each.header != PAIR_HEADER],
                }
                notes = footnotes(found)
                downloads.append(self._write_comparison(found, sets, first, second, result))
            write_rows(result.path("ratings.jsonl"), [one.row.to_row() for one in rated])
            downloads.append(("ratings.jsonl", result.address("ratings.jsonl")))
            shown = list(self._show_pairs(pairs))
            html = render(
                "web_comparison",
                **content,
                failures=failures,
                pairs=shown,
                score_axis=_axis(rated),
                notes=notes,
                downloads=downloads,
                command=command,
            )
            yield Step(_summary(rated), html=html)

    def _show_pairs(self, pairs: Sequence[ShownPair]) -> Iterator[tuple[ShownPair, Any, Any, Any]]:
        """Each pair with its frames, the addresses of its clips, and its timelines."""
        files = [side.file for pair in pairs for side in pair.sides]
        decoded = self._shown_by.imap(files, SAMPLING, (comparison_page.VIEW,), factor=2)
        for pair in pairs:
            old, new = pair.sides
            one, other = next(decoded), next(decoded)
            lines = [(side.row.timeline, kind) for side, kind in ((old, "old"), (new, "new")) if side.row.timeline]
            known = {side.name: side.file for side in pair.sides}
            if isinstance(one, ClipError) or isinstance(other, ClipError):
                error = one if isinstance(one, ClipError) else other
                yield pair, comparison_page.PairFrames(missing=self._named(error, known)), (None, None), lines
                continue
            frames = comparison_page.synchronised(one, other, (old.file, new.file))
            yield pair, frames, (old.address, new.address) if frames.playable else (None, None), lines

    def _write_comparison(
        self,
        found: Comparison,
        sets: Sequence[RatingSet],
        old: Sequence[RatedFile],
        new: Sequence[RatedFile],
        result: Result,
    ) -> tuple[str, str]:
        videos = [{one.name: one.file for one in side} for side in (old, new)]
        pairs = comparison_page.page_pairs(found, sets, videos)
        frames = comparison_page.pair_frames(pairs, decoders=self.decoders)
        comparison_page.write(found, pairs, frames, result.path("comparison.html"), EMBED_LIMIT)
        return "comparison.html", result.address("comparison.html")

    # --- a set ---------------------------------------------------------------------------------------------------

    def report(
        self, given: Sequence[Given], offered: str | None, request: Request, visitor: str = ""
    ) -> Iterator[Step]:
        """The report of a set: ratings, with or without their clips; or clips, which are rated first.

        Args:
            given: uploads.
            offered: name of a set of the operator, if there are no uploads.
            request, visitor: as for `rate`.

        Raises:
            LmmQaError: the ratings cannot be read, or the clips not rated; the message is for the operator.
        """
        with self._turn(request, visitor) as work:
            result = work.result
            if not given:
                given = self._offered(offered)
            tables = [one for one in given if one.path.suffix.lower() in RATINGS]
            clips = [one for one in given if one not in tables]
            if len(tables) > 1:
                raise UsageError(f"give one file of ratings, received {', '.join(one.name for one in tables)}")
            command = None
            if tables:
                rows, files = self._read(tables[0], clips, result)
            else:
                rated = yield from self._rate(_clips_only(clips), work)
                rows, files = [one.row for one in rated], {one.name: one.file for one in rated}
                command = request.command(["FOLDER"], self.shelf)
            page = Report.of(tables[0].name if tables else "ratings.jsonl", rows, files)
            strips = []
            with closing(html_report.filmstrips(page.clips, decoders=self.decoders)) as read:
                for strip in read:
                    strips.append(replace(strip, missing=strip.missing and self._named(strip.missing, files)))
                    yield Step("Reading the frames", len(strips), len(page.clips))
            html_report.write(page, strips, result.path("report.html"), EMBED_LIMIT)
            write_rows(result.path("ratings.jsonl"), [row.to_row() for row in rows])
            downloads = [(name, result.address(name)) for name in ("report.html", "ratings.jsonl")]
            report = result.address("report.html")
            html = render("web_set", report=report, downloads=downloads, command=command)
            yield Step(f"{plural(len(rows))} in the report", html=html)

    def _offered(self, name: str | None) -> list[Given]:
        """The files of a set of the operator."""
        if name is None or name not in self.sets:
            raise UsageError("give clips or a file of ratings" + (", or choose a set" if self.sets else ""))
        path = self.sets[name]
        if path.is_dir():
            return [Given(clip.path, clip.name, uploaded=False) for clip in expand([path])]
        rows = read_ratings(path)
        folders = [str(one) for one in self.sets.values() if one.is_dir()]
        found = find_videos([row["clip"] for row in rows], folders, path.parent)
        return [Given(path, path.name, uploaded=False), *(Given(file, clip, False) for clip, file in found.items())]

    def _read(self, table: Given, clips: Sequence[Given], result: Result) -> tuple[list[RatingRow], dict[str, Path]]:
        """Rows of a file of ratings, and the file of each clip that was given with it."""
        path = result.add(table.path, "table", table.uploaded)
        try:
            rows = [RatingRow.parse(row, f"{table.name}, row {at}") for at, row in enumerate(read_ratings(path), 1)]
        except LmmQaError as error:
            raise type(error)(str(error).replace(str(path), table.name)) from None
        if not rows:
            raise UsageError(f"{table.name} contains no ratings")
        added = {one.name: result.add(one.path, f"clip{at}", one.uploaded) for at, one in enumerate(clips)}
        wanted = list(dict.fromkeys(row.clip for row in rows))
        return rows, {name: added[found] for name, found in match(wanted, list(added)).items()}


def _clips_only(given: Sequence[Given]) -> list[Given]:
    """Clips with different names.

    Raises:
        UsageError: there is none.
    """
    if not given:
        raise UsageError("give at least one clip")
    if tables := [one.name for one in given if one.path.suffix.lower() in RATINGS]:
        raise UsageError(f"give clips, received {tables[0]}: the tab A set shows ratings")
    names: dict[str, int] = {}
    clips = []
    for one in given:
        names[one.name] = names.get(one.name, 0) + 1
        times = names[one.name]
        clips.append(one if times == 1 else one._replace(name=f"{Path(one.name).stem} ({times}){one.path.suffix}"))
    return clips


def _rating_set(name: str, rated: Sequence[RatedFile]) -> RatingSet:
    ratings = tuple(one.row for one in rated)
    return RatingSet(name, Path(name), tuple(row.to_row() for row in ratings), ratings)


def _axis(rated: Sequence[RatedFile]) -> Axis:
    ends = [end for one in rated for end in one.row.scale or ()]
    return Axis.over(ends) if ends else Axis(1.0, 5.0)


def _summary(rated: Sequence[RatedFile]) -> str:
    failed = sum(one.error is not None for one in rated)
    return f"{plural(len(rated) - failed)} rated" + (f", {failed} could not be rated" if failed else "")


def _pair_of_two(rated: Sequence[RatedFile], labels: tuple[str, str] = ("first", "second")) -> ShownPair | None:
    """The pair, if two clips were given and rated."""
    if len(rated) != 2 or any(one.clip is None for one in rated):
        return None
    old, new = rated
    had, has = found_defects(old.row), found_defects(new.row)
    changed = [name for name in has if name in had and had[name] != has[name]]
    assert old.row.score is not None and new.row.score is not None
    pair = ScorePair(
        old=old.name,
        new=new.name,
        group="",
        old_score=old.row.score,
        new_score=new.row.score,
        gained=tuple(name for name in changed if has[name]),
        lost=tuple(name for name in changed if had[name]),
    )
    return ShownPair(1, labels, pair, (old, new))


def _verdict(pair: ScorePair) -> str:
    scores = f"{pair.new_score:.2f} against {pair.old_score:.2f}"
    if abs(pair.difference) <= TIE:
        return f"A tie: {pair.new} and {pair.old} differ by no more than the rater's own noise, {TIE:g} ({scores})."
    word = "higher" if pair.difference > 0 else "lower"
    return f"{pair.new} scores {abs(pair.difference):.2f} {word} than {pair.old}: {scores}."


def _differing_pairs(found: Comparison, old: Sequence[RatedFile], new: Sequence[RatedFile]) -> list[ShownPair]:
    files = [{one.name: one for one in side} for side in (old, new)]
    each = found.sets[0]
    pairs = sorted(each.pairs, key=lambda pair: -abs(pair.difference))[:PAIRS]
    return [
        ShownPair(number, (each.old, each.new), pair, (files[0][pair.old], files[1][pair.new]))
        for number, pair in enumerate(pairs, 1)
    ]
