"""Degraded copies of clips as files, with the table of their labels: clean clips in, a labelled set out.

Each copy is made in memory (see `reference`), encoded with as good as no loss, and gets a row in the manifest, which
`lmm-qa rate`, `evaluate`, `calibrate` and `train` take as it is: `clip`, `mos`, `group`, and for training `defects` and
`explanation`. Copies have no sound: nothing here listens. What is there already is not made again.
"""

from __future__ import annotations

import itertools
import random
import re
import signal
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path, PurePosixPath

import numpy as np

from lmm_qa.defects.explanation import Finding, is_good, opening, template_text
from lmm_qa.defects.vocabulary import BY_NAME, TIMED_DEFECTS, reference_defects
from lmm_qa.degrade.causes import COMPRESSION, DEGRADATIONS, FACIAL, PICTURE, REPEATABLE_X264, TEMPORAL, Pixels, encode
from lmm_qa.degrade.full_reference import ceiling, make_copy, mos
from lmm_qa.errors import ClipError, ClipTruncated, ClipUnreadable, LmmQaError, MissingExtra, ResultsError, UsageError
from lmm_qa.manifest import Clip, content_id
from lmm_qa.model.prompt import DEFAULT_PROMPT, load_prompt
from lmm_qa.ratings_io import journal, output_form, read_rows, to_json, write_rows
from lmm_qa.tables import Row
from lmm_qa.video.face import Face, find_face
from lmm_qa.video.probe import probe

SMALLEST = 64


"""Pixels: the least short side of a source."""


LOSSLESS = {"crf": "10", **REPEATABLE_X264}


"""What x264 is told for as good as no loss."""


COLUMNS = ("clip", "mos", "group", "source", "causes", "strengths", "seed", "scale", "seconds", "quality")


"""What every row of a manifest must have, for the file to be taken for one of ours."""


UNSEEN = 0.95


"""Quality from which on nobody need notice a damage: the copy is said neither to have its defect nor not to."""


@dataclass(frozen=True)
class Recipe:
    """Which copies are made of each source: a clean one, each cause at each strength, and pairs."""

    causes: tuple[str, ...] = tuple(DEGRADATIONS)
    strengths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    pairs: int = 0
    """Pairs of causes of different kinds (face, picture, encoder, player), drawn by lot."""
    seed: int = 0
    scale: tuple[float, float] = (1.0, 5.0)
    """MOS of the worst and of the best quality."""
    length: float = 5.0
    """Seconds that are used of each source, from its beginning."""

    def __post_init__(self) -> None:
        """
        Raises:
            UsageError: a cause is unknown, a number is out of its range, or there are not enough pairs to draw.
        """
        if unknown := [cause for cause in self.causes if cause not in DEGRADATIONS]:
            raise UsageError(f"unknown cause {unknown[0]!r}: use {', '.join(DEGRADATIONS)}")
        if not self.causes or not self.strengths:
            raise UsageError("no copies were asked for: give at least one cause and one strength")
        for what, values in (("cause", self.causes), ("strength", self.strengths)):
            if twice := [value for value, times in Counter(values).items() if times > 1]:
                raise UsageError(f"{what} {twice[0]} is given twice")
        if outside := [strength for strength in self.strengths if not 0 < strength <= 1]:
            raise UsageError(
                f"a strength is above 0 and at most 1, received {outside[0]:g}; a clean copy is always made"
            )
        low, high = self.scale
        if not low < high:
            raise UsageError(f"the scale goes from the worst to the best MOS, received {low:g} {high:g}")
        if not self.length > 0:
            raise UsageError(f"the length of copies is above 0 seconds, received {self.length:g}")
        possible = len(self._couples()) * len(self.strengths) ** 2
        if not 0 <= self.pairs <= possible:
            raise UsageError(f"of these causes and strengths 0 to {possible} pairs can be made, received {self.pairs}")

    def damages(self, source_id: str) -> list[tuple[tuple[str, float], ...]]:
        """Causes and strengths of each copy of a source, the clean one first; its content decides on the pairs."""
        singles = [((cause, strength),) for cause in self.causes for strength in self.strengths]
        couples = [
            ((first, one), (second, other))
            for first, second in self._couples()
            for one, other in itertools.product(self.strengths, repeat=2)
        ]
        lot = np.random.default_rng(_hash(self.seed, source_id)).permutation(len(couples))[: self.pairs]
        return [(), *singles, *(couples[number] for number in lot)]

    def _couples(self) -> list[tuple[str, str]]:
        kind = {cause: kind for kind in (FACIAL, PICTURE, COMPRESSION, TEMPORAL) for cause in kind}
        ordered = [cause for cause in DEGRADATIONS if cause in self.causes]
        return [couple for couple in itertools.combinations(ordered, 2) if kind[couple[0]] != kind[couple[1]]]


@dataclass(frozen=True)
class Job:
    """One copy that is to be made."""

    name: str
    """File name of the copy."""
    source: Clip
    source_id: str
    damages: tuple[tuple[str, float], ...]
    seed: int
    recipe: Recipe


@dataclass(frozen=True)
class BadSource:
    """A clip of which no copies could be made."""

    source: str
    error: str
    copies: int
    """How many there would have been."""


class DegradedDataset:
    """A manifest and the files beside it.

        copies = DegradedDataset(Path("set/labels.jsonl"), clips, recipe)
        for outcome in copies.make(workers=4):
            ...

    Each row is in a journal beside the manifest before the next one comes, so that the same command goes on after a
    kill.
    """

    def __init__(self, manifest: Path, clips: Sequence[Clip], recipe: Recipe) -> None:
        """
        Raises:
            UsageError: the suffix of the manifest is none of ours, or the copies would lie beside their sources.
            ResultsError: the manifest cannot be read or written, or is no manifest of ours.
        """
        output_form(manifest)
        self.manifest, self.folder = manifest, manifest.parent
        if beside := [clip.name for clip in clips if clip.path.parent.resolve() == self.folder.resolve()]:
            raise UsageError(f"the copies would lie beside their source {beside[0]}: name a manifest in another folder")
        self.bad: list[BadSource] = []
        """Sources that could not be read when their names were looked up; `make` gives them first."""
        self._rows = self._read()
        stems = _stems([clip.name for clip in clips])
        self.jobs: list[Job] = []
        for clip, stem in zip(clips, stems, strict=True):
            self.jobs += self._plan(clip, stem, recipe)
        self.waiting = [job for job in self.jobs if not self._made(job)]
        """The copies that are not there yet."""

    def make(self, workers: int = 1) -> Iterator[Row | BadSource]:
        """Make what is missing, and write the manifest: earlier rows of other sources, then the rows of this run.

        Yields:
            the row of each copy, as it is made; a `BadSource` once for each source that fails.

        Raises:
            ResultsError: the manifest cannot be written, or a worker process died.
            MissingExtra: imageio-ffmpeg is not installed.
        """
        if find_spec("imageio_ffmpeg") is None:
            raise MissingExtra("imageio-ffmpeg", "degrade", "measuring VMAF")
        yield from self.bad
        growing = journal(self.manifest)
        if self.waiting:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ResultsError(f"cannot write {self.folder}: {error.strerror or error}") from None
            write_rows(growing, list(self._rows.values()))
            with growing.open("a", encoding="utf-8") as stream:
                for outcome in self._outcomes(workers):
                    if not isinstance(outcome, BadSource):
                        self._rows[outcome["clip"]] = outcome
                        stream.write(f"{to_json(outcome)}\n")
                        stream.flush()
                    yield outcome
        if self._rows:
            planned = dict.fromkeys(job.name for job in self.jobs)
            others = [row for name, row in self._rows.items() if name not in planned]
            write_rows(self.manifest, [*others, *(self._rows[name] for name in planned if name in self._rows)])
        growing.unlink(missing_ok=True)

    def _outcomes(self, workers: int) -> Iterator[Row | BadSource]:
        """A source's copies are made one after the other, and its failure ends them."""
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_ignore_interrupts)
        try:
            futures: dict[Future[Row], Job] = {pool.submit(_make, job, self.folder): job for job in self.waiting}
            of_source = Counter(job.source.name for job in self.waiting)
            failed: set[str] = set()
            for future in as_completed(futures):
                job = futures[future]
                if future.cancelled() or job.source.name in failed:
                    continue
                error = future.exception()
                if error is None:
                    yield future.result()
                elif isinstance(error, BrokenProcessPool):
                    raise ResultsError(
                        "a worker process died, out of memory perhaps: run the same command with fewer --workers or "
                        "less --length, and it goes on from here"
                    ) from error
                elif isinstance(error, LmmQaError) and not isinstance(error, ClipError):
                    raise error
                else:
                    failed.add(job.source.name)
                    for other, of in futures.items():
                        if of.source.name == job.source.name:
                            other.cancel()
                    yield BadSource(job.source.name, f"{type(error).__name__}: {error}", of_source[job.source.name])
        finally:
            pool.shutdown(cancel_futures=True)

    def _plan(self, clip: Clip, stem: str, recipe: Recipe) -> list[Job]:
        try:
            identity = content_id(clip.path)
        except ClipError as error:
            self.bad.append(BadSource(clip.name, f"{type(error).__name__}: {error}", len(recipe.damages(""))))
            return []
        seed = _hash(recipe.seed, identity)
        return [
            Job(f"{_called(stem, damages)}.mp4", clip, identity, damages, seed, recipe)
            for damages in recipe.damages(identity)
        ]

    def _made(self, job: Job) -> bool:
        row = self._rows.get(job.name)
        return row is not None and row | _identity(job) == row and (self.folder / job.name).is_file()

    def _read(self) -> dict[str, Row]:
        """What earlier runs left."""
        rows: dict[str, Row] = {}
        for path in (self.manifest, journal(self.manifest)):
            if not path.exists():
                continue
            for row in read_rows(path):
                if any(column not in row for column in COLUMNS):
                    raise ResultsError(f"{path} exists and is no manifest of damaged copies: name another file")
                rows[row["clip"]] = row if "defects" in row else row | _words(row)
        return rows


def read_clip(path: Path, seconds: float) -> tuple[Pixels, float, float]:
    """The first seconds of a clip: (T, H, W, 3) uint8 RGB frames as displayed, their rate, and bits a pixel.

    Raises:
        ClipError: it cannot be read, or its pictures are smaller than `SMALLEST`.
    """
    import av

    info = probe(path)
    if min(info.width, info.height) < SMALLEST:
        raise ClipUnreadable(f"{path}: {info.width}x{info.height}: {SMALLEST} pixels a side are needed to damage it")
    wanted = max(1, round(seconds * info.fps))
    frames: list[Pixels] = []
    size = 0
    try:
        with av.open(str(path)) as container:
            for packet in container.demux(container.streams.video[0]):
                size += packet.size
                for frame in packet.decode():
                    if frame.is_corrupt:
                        raise ClipTruncated(f"{path}: frame {len(frames)} of {info.frames} is damaged")
                    frames.append(np.rot90(frame.to_ndarray(format="rgb24"), -info.rotation // 90))
                if len(frames) >= wanted:
                    break
    except av.FFmpegError as error:
        raise ClipTruncated(f"{path}: {len(frames)} of {info.frames} frames could be read: {error}") from None
    stacked = np.stack(frames[:wanted])
    return stacked, info.fps, 8 * size / (len(frames) * info.width * info.height)


def _make(job: Job, folder: Path) -> Row:
    """Make one copy, in a worker process."""
    frames, fps, limit, face = _source(job.source.path, job.recipe.length)
    copy = make_copy(frames, job.damages, job.seed, fps=fps, face=face)
    beside = folder / f".{job.name}"
    encode(copy.frames, "libx264", LOSSLESS, Fraction(fps).limit_denominator(1001), str(beside))
    beside.replace(folder / job.name)
    row = {
        "clip": job.name,
        "mos": round(mos(copy.quality * limit, job.recipe.scale), 4),
        "group": job.source.name,
        "source": job.source.name,
        **_identity(job),
        "places": [[round(edge, 4) for edge in step.place] for step in copy.steps],
        "seconds": [[round(moment, 3) for moment in step.seconds] for step in copy.steps],
        "vmaf": None if copy.vmaf is None else round(copy.vmaf, 3),
        "quality": round(copy.quality, 4),
        "ceiling": round(limit, 4),
        "face_found": face.found,
    }
    return row | _words(row)


def _words(row: Row) -> Row:
    """What a copy has of the defects, as `lmm_qa.training.dataset` reads it, and a sentence that says so."""
    strength = dict(zip(row["causes"], row["strengths"], strict=True))
    seconds = dict(zip(row["causes"], row["seconds"], strict=True))
    known = reference_defects(strength.items())
    if len(strength) == 1 and row["quality"] > UNSEEN:
        known = {name: None if there else there for name, there in known.items()}
    if "buffering" in strength:  # the clip's end is cut off: what befell it there may not be seen
        known |= {name: None for name in TIMED_DEFECTS if known[name] and name != "buffering"}
    found: list[tuple[float, Finding]] = []
    for name in (name for name, there in known.items() if there):
        causes = [cause for cause in BY_NAME[name].causes if cause in strength]
        spans = [(round(first, 1), round(last, 1)) for first, last in (seconds[cause] for cause in causes)]
        timed = tuple(span for span in spans if name in TIMED_DEFECTS and span[0] < span[1])
        found.append((max(strength[cause] for cause in causes), Finding(name, 1.0, timed)))
    found.sort(key=lambda one: -one[0])
    strengths, findings = [one for one, _ in found], [one for _, one in found]
    absent = [name for name, there in known.items() if there is False]
    prompt, (low, high) = load_prompt(DEFAULT_PROMPT), row["scale"]
    level = prompt.levels[round((row["mos"] - low) / (high - low) * (len(prompt.levels) - 1))]
    draw = random.Random(f"{row['seed']} {row['clip']}")
    said = template_text(findings, absent, draw, strengths, is_good(level, prompt.levels))
    times = {one.defect: " and".join(f" from {first} to {last} s" for first, last in one.seconds) for one in findings}
    unsure = [f"?{name}" for name, there in known.items() if there is None]
    return {
        "defects": [*(f"{name}{when}" for name, when in times.items()), *unsure],
        "explanation": opening(prompt, level) + said,
    }


def _identity(job: Job) -> Row:
    """What makes a copy this copy, wherever its source lies."""
    ordered = sorted(job.damages, key=lambda one: list(DEGRADATIONS).index(one[0]))
    return {
        "source_id": job.source_id,
        "causes": [cause for cause, _ in ordered],
        "strengths": [strength for _, strength in ordered],
        "seed": job.seed,
        "scale": list(job.recipe.scale),
        "length": job.recipe.length,
    }


@lru_cache(maxsize=1)
def _source(path: Path, seconds: float) -> tuple[Pixels, float, float, Face]:
    """Frames, rate, ceiling and face. Copies of one source follow each other: it is decoded once a worker."""
    frames, fps, bits = read_clip(path, seconds)
    return frames, fps, ceiling(frames.shape[1], frames.shape[2], bits), find_face(frames)


def _called(stem: str, damages: Sequence[tuple[str, float]]) -> str:
    return "--".join([stem, *(f"{cause}-{strength:g}" for cause, strength in damages)] if damages else [stem, "clean"])


def _stems(names: Sequence[str]) -> list[str]:
    """What the copies of each source are called: its name without folders, and a hash where two have the same."""
    short = [re.sub(r"[^\w.-]", "_", PurePosixPath(name).stem) for name in names]
    uses = Counter(short)
    return [
        stem if uses[stem] == 1 else f"{stem}-{zlib.crc32(name.encode()):08x}"
        for stem, name in zip(short, names, strict=True)
    ]


def _hash(seed: int, source_id: str) -> int:
    return zlib.crc32(f"{seed} {source_id}".encode())


def _ignore_interrupts() -> None:
    """Ctrl-C is for the process that waits for the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
