"""Labelled sets of degraded clips: clean clips in, degraded copies as files and a table of their labels out.

The table can be used as it is with `lmm-qa rate`, `evaluate`, `calibrate` and `train`: it has the columns `clip`, `mos`
and `group`, and for training `defects` and `explanation`. Copies have the sound of their source, if it has one. Copies
that exist are not made again.
"""

from __future__ import annotations

import itertools
import random
import re
import signal
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path, PurePosixPath

import numpy as np

from lmm_qa.defects.explanation import Finding, is_good, lip_sync_sentence, opening, template_text
from lmm_qa.defects.vocabulary import BY_NAME, TIMED_DEFECTS, reference_defects
from lmm_qa.degrade.causes import (
    COMPRESSION,
    DEGRADATIONS,
    FACIAL,
    FULL_FRAME,
    PICTURE,
    REPRODUCIBLE_X264,
    TEMPORAL,
    Pixels,
    encode,
)
from lmm_qa.degrade.detail import edge_sharpness
from lmm_qa.degrade.full_reference import DegradedCopy, make_copy, mos, quality_ceiling
from lmm_qa.degrade.sound import GREATEST_OFFSET, SOUND, degrade_sound, fit, follow_pictures, sound_offset
from lmm_qa.errors import ClipError, ClipTruncated, ClipUnreadable, LmmQaError, MissingExtra, ResultsError, UsageError
from lmm_qa.files.tables import Row, journal, output_form, read_rows, to_json, write_rows
from lmm_qa.manifest import Clip, content_id
from lmm_qa.model.prompt import DEFAULT_PROMPT, load_prompt
from lmm_qa.video.decode import iterate_frames
from lmm_qa.video.face import Face, find_face
from lmm_qa.video.playback import playback
from lmm_qa.video.probe import scan_container
from lmm_qa.video.sound import SoundState, Waveform, read_sound, read_waveform
from lmm_qa.video.views import on_screen

MIN_SIDE = 64
"""Pixels; sources must not be smaller."""

NEAR_LOSSLESS = {"crf": "10", **REPRODUCIBLE_X264}
"""Options of x264 for the files of copies."""

REQUIRED_COLUMNS = ("clip", "mos", "group", "source", "causes", "strengths", "seed", "scale", "seconds", "quality")
"""A table without one of these columns was not made here."""

IMPERCEPTIBLE = 0.95
"""A degradation that leaves more quality than this may go unnoticed: whether the copy has the defect is unknown."""

CAUSES = (*DEGRADATIONS, *SOUND)
"""All causes, in the order in which they are applied."""

Degradations = tuple[tuple[str, float], ...]
"""Causes and their strengths."""


@dataclass(frozen=True)
class DegradationPlan:
    """Which copies are made of each source: a clean one, every cause at every strength, and pairs of causes."""

    causes: tuple[str, ...] = tuple(DEGRADATIONS)
    """Those of `SOUND` are applied to sources with sound only."""
    strengths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    pairs: int = 0
    """Number of random pairs of causes of different groups (face, picture, encoder, player)."""
    seed: int = 0
    scale: tuple[float, float] = (1.0, 5.0)
    """MOS of the worst and of the best quality."""
    length: float = 5.0
    """Seconds that are used of each source, from its start."""

    def __post_init__(self) -> None:
        """
        Raises:
            UsageError: a cause is unknown, a number is out of range, or there are fewer pairs than requested.
        """
        if unknown := [cause for cause in self.causes if cause not in CAUSES]:
            raise UsageError(f"unknown cause {unknown[0]!r}: use {', '.join(CAUSES)}")
        if not self.causes or not self.strengths:
            raise UsageError("no copies were requested: give at least one cause and one strength")
        for what, values in (("cause", self.causes), ("strength", self.strengths)):
            if repeated := [value for value, count in Counter(values).items() if count > 1]:
                raise UsageError(f"{what} {repeated[0]} is given twice")
        if outside := [strength for strength in self.strengths if not 0 < strength <= 1]:
            raise UsageError(
                f"strengths must be above 0 and at most 1, received {outside[0]:g}; a clean copy is always made"
            )
        low, high = self.scale
        if not low < high:
            raise UsageError(f"the scale goes from the worst to the best MOS, received {low:g} {high:g}")
        if not self.length > 0:
            raise UsageError(f"the length of copies must be above 0 seconds, received {self.length:g}")
        possible = len(self._cause_pairs()) * len(self.strengths) ** 2
        if not 0 <= self.pairs <= possible:
            raise UsageError(
                f"with these causes and strengths 0 to {possible} pairs can be made, received {self.pairs}"
            )

    def copies(self, source_id: str) -> list[Degradations]:
        """The degradations of each copy of a source, the clean copy first; the pairs depend on the source."""
        singles = [((cause, strength),) for cause in self.causes for strength in self.strengths]
        pairs = [
            ((first, one), (second, other))
            for first, second in self._cause_pairs()
            for one, other in itertools.product(self.strengths, repeat=2)
        ]
        drawn = np.random.default_rng(_hash(self.seed, source_id)).permutation(len(pairs))[: self.pairs]
        return [(), *singles, *(pairs[number] for number in drawn)]

    def _cause_pairs(self) -> list[tuple[str, str]]:
        group = {cause: group for group in (FACIAL, PICTURE, COMPRESSION, TEMPORAL, tuple(SOUND)) for cause in group}
        ordered = [cause for cause in CAUSES if cause in self.causes]
        return [pair for pair in itertools.combinations(ordered, 2) if group[pair[0]] != group[pair[1]]]


@dataclass(frozen=True)
class CopyTask:
    """One copy to be made."""

    name: str
    """File name of the copy."""
    source: Clip
    source_id: str
    degradations: Degradations
    seed: int
    plan: DegradationPlan
    other: Clip | None = None
    """Whose sound `wrong_audio` uses."""
    other_id: str | None = None

    def identity(self) -> Row:
        """The columns that identify a copy, wherever its source is stored."""
        ordered = sorted(self.degradations, key=lambda each: CAUSES.index(each[0]))
        other = {"other_id": self.other_id} if self.other_id else {}
        return {
            "source_id": self.source_id,
            "causes": [cause for cause, _ in ordered],
            "strengths": [strength for _, strength in ordered],
            "seed": self.seed,
            "scale": list(self.plan.scale),
            "length": self.plan.length,
            **other,
        }


@dataclass(frozen=True)
class FailedSource:
    """A source of which no copies could be made."""

    source: str
    error: str
    copies: int
    """How many copies were planned."""


class DegradedDataset:
    """A table of labels and the copies next to it.

        dataset = DegradedDataset(Path("set/labels.jsonl"), clips, plan)
        for outcome in dataset.make(workers=4):
            ...

    Rows are added to a journal next to the table as copies are finished, so an interrupted run can be continued.
    """

    def __init__(self, table: Path, clips: Sequence[Clip], plan: DegradationPlan) -> None:
        """
        Raises:
            UsageError: the suffix of the table is not supported, or the copies would be written next to their sources.
            ResultsError: the table cannot be read, or was not made here.
        """
        output_form(table)
        self.table, self.folder = table, table.parent
        if beside := [clip.name for clip in clips if clip.path.parent.resolve() == self.folder.resolve()]:
            raise UsageError(
                f"the copies would be written next to their source {beside[0]}: name a table in another folder"
            )
        self.failed: list[FailedSource] = []
        """Sources that could not be read to identify them; `make` yields them first."""
        self.without_sound: list[str] = []
        """Sources without sound, of which no copies with causes in the sound are made."""
        self._rows = self._read()
        self.tasks: list[CopyTask] = []
        heard = _heard(clips, plan.length) if set(plan.causes) & SOUND.keys() else {}
        for clip, stem in zip(clips, _stems([clip.name for clip in clips]), strict=True):
            self.tasks += self._plan(clip, stem, plan, heard)
        self.pending = [task for task in self.tasks if not self._exists(task)]
        """The copies that do not exist yet."""

    def make(self, workers: int = 1) -> Iterator[Row | FailedSource]:
        """Make the pending copies and write the table: earlier rows of other sources, then those of this run.

        Yields:
            The row of each copy when it is finished; one `FailedSource` for each source that fails.

        Raises:
            ResultsError: the table cannot be written, or a worker process died.
            MissingExtra: imageio-ffmpeg is not installed.
        """
        if find_spec("imageio_ffmpeg") is None:
            raise MissingExtra("imageio-ffmpeg", "degrade", "measuring VMAF")
        yield from self.failed
        partial = journal(self.table)
        if self.pending:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ResultsError(f"cannot write {self.folder}: {error.strerror or error}") from None
            write_rows(partial, list(self._rows.values()))
            with partial.open("a", encoding="utf-8") as stream:
                for outcome in self._outcomes(workers):
                    if not isinstance(outcome, FailedSource):
                        self._rows[outcome["clip"]] = outcome
                        stream.write(f"{to_json(outcome)}\n")
                        stream.flush()
                    yield outcome
        if self._rows:
            planned = dict.fromkeys(task.name for task in self.tasks)
            others = [row for name, row in self._rows.items() if name not in planned]
            write_rows(self.table, [*others, *(self._rows[name] for name in planned if name in self._rows)])
        partial.unlink(missing_ok=True)

    def _outcomes(self, workers: int) -> Iterator[Row | FailedSource]:
        """After a failure, the other copies of the source are cancelled."""
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_ignore_interrupts)
        try:
            futures: dict[Future[Row], CopyTask] = {
                pool.submit(_make, task, self.folder): task for task in self.pending
            }
            counts = Counter(task.source.name for task in self.pending)
            failed: set[str] = set()
            for future in as_completed(futures):
                source = futures[future].source.name
                if future.cancelled() or source in failed:
                    continue
                error = future.exception()
                if error is None:
                    yield future.result()
                elif isinstance(error, BrokenProcessPool):
                    raise ResultsError(
                        "a worker process died, perhaps out of memory: run the same command with fewer --workers or a "
                        "shorter --length to continue"
                    ) from error
                elif isinstance(error, LmmQaError) and not isinstance(error, ClipError):
                    raise error
                else:
                    failed.add(source)
                    for other, task in futures.items():
                        if task.source.name == source:
                            other.cancel()
                    yield FailedSource(source, f"{type(error).__name__}: {error}", counts[source])
        finally:
            pool.shutdown(cancel_futures=True)

    def _plan(self, clip: Clip, stem: str, plan: DegradationPlan, heard: Mapping[str, Clip]) -> list[CopyTask]:
        """The copies of a source. `heard`: the clips with sound, by their content ids."""
        try:
            source_id = content_id(clip.path)
        except ClipError as error:
            self.failed.append(FailedSource(clip.name, f"{type(error).__name__}: {error}", len(plan.copies(""))))
            return []
        seed = _hash(plan.seed, source_id)
        mute, others = source_id not in heard, [each for each in heard if each != source_id]
        if mute and set(plan.causes) & SOUND.keys():
            self.without_sound.append(clip.name)
        tasks = []
        for degradations in plan.copies(source_id):
            if mute and any(cause in SOUND for cause, _ in degradations):
                continue
            task = CopyTask(f"{_copy_stem(stem, degradations)}.mp4", clip, source_id, degradations, seed, plan)
            if any(cause == "wrong_audio" for cause, _ in degradations):
                if not others:
                    raise UsageError(f"wrong_audio takes the sound of another clip, and only {clip.name} has sound")
                other = others[seed % len(others)]
                task = replace(task, other=heard[other], other_id=other)
            tasks.append(task)
        return tasks

    def _exists(self, task: CopyTask) -> bool:
        row = self._rows.get(task.name)
        return row is not None and row | task.identity() == row and (self.folder / task.name).is_file()

    def _read(self) -> dict[str, Row]:
        """The rows of earlier runs, by file name."""
        rows: dict[str, Row] = {}
        for path in (self.table, journal(self.table)):
            if not path.exists():
                continue
            for row in read_rows(path):
                if any(column not in row for column in REQUIRED_COLUMNS):
                    raise ResultsError(f"{path} exists and is not a table of degraded copies: name another file")
                rows[row["clip"]] = row if "defects" in row else row | training_columns(row)
        return rows


def read_clip(path: Path, seconds: float) -> tuple[Pixels, float, float]:
    """Read the first seconds of a clip as a player shows them; damage after them is not detected.

    A clip with a variable frame rate is read at its usual one: a frame is repeated for as long as it is shown.

    Returns:
        Displayed frames with square pixels, (T, H, W, 3) uint8 RGB; frames per second; bits per pixel of the file.

    Raises:
        ClipError: the clip cannot be read, or its pictures are smaller than `MIN_SIDE`.
    """
    scan = scan_container(path)
    info = scan.info
    if min(info.width, info.height) < MIN_SIDE:
        raise ClipUnreadable(f"{path}: {info.width}x{info.height}: sources need at least {MIN_SIDE} pixels a side")
    moments = playback(scan.seconds, info.duration)
    fps = len(moments.frames) / info.duration
    places = moments.frames[: max(1, round(seconds * fps))]
    shown = frozenset(places)
    pictures: dict[int, Pixels] = {}
    for index, frame in enumerate(iterate_frames(scan, set())):
        if index in shown:
            pictures[index] = on_screen(scan.display.picture(frame), scan.display.pixel_shape)
        if index == places[-1]:
            break
    read = [pictures[index] for index in places if index in pictures]
    if not read:
        raise ClipTruncated(f"{path}: none of {info.frames} frames could be read")
    return np.stack(read), fps, 8 * scan.size / (info.frames * info.width * info.height)


def _make(task: CopyTask, folder: Path) -> Row:
    """Make one copy, in a worker process."""
    frames, fps, ceiling, face, source_sound = _read_source(task.source.path, task.plan.length)
    picture = [(cause, strength) for cause, strength in task.degradations if cause in DEGRADATIONS]
    copy = make_copy(frames, picture, task.seed, fps=fps, face=face)
    sound, sound_quality = _degraded_sound(task, source_sound, copy, len(frames) / fps)
    quality = copy.quality * sound_quality
    temporary = folder / f".{task.name}"
    encode(copy.frames, "libx264", NEAR_LOSSLESS, Fraction(fps).limit_denominator(1001), str(temporary), sound)
    temporary.replace(folder / task.name)
    where = [(each.place, each.seconds) for each in copy.degradations]
    where += [(FULL_FRAME, (0.0, len(frames) / fps))] * (len(task.degradations) - len(where))
    row = {
        "clip": task.name,
        "mos": round(mos(quality * ceiling, task.plan.scale), 4),
        "group": task.source.name,
        "source": task.source.name,
        **task.identity(),
        "places": [[round(edge, 4) for edge in place] for place, _ in where],
        "seconds": [[round(second, 3) for second in seconds] for _, seconds in where],
        "vmaf": None if copy.vmaf is None else round(copy.vmaf, 3),
        "quality": round(quality, 4),
        "ceiling": round(ceiling, 4),
        "face_found": face.found,
        "sound": sound is not None,
    }
    return row | training_columns(row)


def _degraded_sound(
    task: CopyTask, source: Waveform | None, copy: DegradedCopy, seconds: float
) -> tuple[Waveform | None, float]:
    """The sound of a copy, and the quality that it leaves to a perfect clip."""
    if source is None:
        return None, 1.0
    quality = 1.0
    sound = follow_pictures(source, [(each.cause, each.seconds) for each in copy.degradations])
    for cause in SOUND:
        for strength in (strength for name, strength in task.degradations if name == cause):
            other = _read_waveform(task.other.path, task.plan.length, source.rate) if task.other else None
            degraded = degrade_sound(sound, cause, strength, task.seed, seconds=seconds, other=other)
            sound, quality = degraded.waveform, quality * degraded.quality
    return fit(sound, seconds), quality


def training_columns(row: Row) -> Row:
    """The columns `defects` and `explanation` of a copy, in the format that `lmm_qa.training.dataset` reads."""
    strength = dict(zip(row["causes"], row["strengths"], strict=True))
    seconds = dict(zip(row["causes"], row["seconds"], strict=True))
    known = reference_defects(strength.items())
    if len(strength) == 1 and row["quality"] > IMPERCEPTIBLE:
        known = {name: None if present else present for name, present in known.items()}
    if "buffering" in strength:  # the end of the clip is cut off, and with it what was degraded there
        known |= {name: None for name in TIMED_DEFECTS if known[name] and name != "buffering"}
    strengths: list[float] = []
    found: list[Finding] = []
    shown = [name for name in known if known[name] and BY_NAME[name].visible]  # a model is asked about nothing else
    causes = {name: [each for each in BY_NAME[name].causes if each in strength] for name in shown}
    for name in sorted(causes, key=lambda name: -max(strength[cause] for cause in causes[name])):
        spans = [(round(start, 1), round(end, 1)) for start, end in (seconds[cause] for cause in causes[name])]
        timed = tuple(span for span in spans if name in TIMED_DEFECTS and span[0] < span[1])
        strengths.append(max(strength[cause] for cause in causes[name]))
        found.append(Finding(name, 1.0, timed))
    absent = [name for name, present in known.items() if present is False]
    prompt, (low, high) = load_prompt(DEFAULT_PROMPT), row["scale"]
    level = prompt.levels[round((row["mos"] - low) / (high - low) * (len(prompt.levels) - 1))]
    rng = random.Random(f"{row['seed']} {row['clip']}")
    text = template_text(found, absent, rng, strengths, is_good(level, prompt.levels))
    if known.get("lip_sync"):
        cause = next(cause for cause in BY_NAME["lip_sync"].causes if cause in strength)
        text = f"{text} {lip_sync_sentence(sound_offset(cause, strength[cause]))}"
    times = {each.defect: " and".join(f" from {start} to {end} s" for start, end in each.seconds) for each in found}
    unknown = [f"?{name}" for name, present in known.items() if present is None and BY_NAME[name].visible]
    return {
        "defects": [*(f"{name}{when}" for name, when in times.items()), *unknown],
        "explanation": opening(prompt, level) + text,
    }


@lru_cache(maxsize=1)
def _read_source(path: Path, seconds: float) -> tuple[Pixels, float, float, Face, Waveform | None]:
    """Frames, frame rate, quality ceiling, face, and sound.

    Copies of one source follow each other, so it is decoded once.
    """
    frames, fps, bits_per_pixel = read_clip(path, seconds)
    ceiling = quality_ceiling(frames.shape[1], frames.shape[2], bits_per_pixel, edge_sharpness(frames))
    return frames, fps, ceiling, find_face(frames), _read_waveform(path, seconds)


def _read_waveform(path: Path, seconds: float, rate: int | None = None) -> Waveform | None:
    """The sound of a source for copies of a length, and what `audio_lead` needs of it after that."""
    return read_waveform(path, scan_container(path).start, seconds + GREATEST_OFFSET, rate)[1]


def _heard(clips: Sequence[Clip], seconds: float) -> dict[str, Clip]:
    """Those that have sound in their first seconds, by their content ids."""
    found = {}
    for clip in clips:
        with suppress(ClipError):  # reported when its copies are made
            start = scan_container(clip.path).start
            if read_sound(clip.path, start, seconds).state is SoundState.PRESENT:
                found[content_id(clip.path)] = clip
    return found


def _copy_stem(stem: str, degradations: Degradations) -> str:
    parts = [f"{cause}-{strength:g}" for cause, strength in degradations]
    return "--".join([stem, *(parts or ["clean"])])


def _stems(names: Sequence[str]) -> list[str]:
    """Start of the file names of each source's copies: its name without folders, and a hash if that is ambiguous."""
    short = [re.sub(r"[^\w.-]", "_", PurePosixPath(name).stem) for name in names]
    uses = Counter(short)
    return [
        stem if uses[stem] == 1 else f"{stem}-{zlib.crc32(name.encode()):08x}"
        for stem, name in zip(short, names, strict=True)
    ]


def _hash(seed: int, source_id: str) -> int:
    return zlib.crc32(f"{seed} {source_id}".encode())


def _ignore_interrupts() -> None:
    """Ctrl-C is handled by the process that waits for the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
