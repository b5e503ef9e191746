"""Training data of the embedded model: clips and photographs in, degraded copies with labels out.

`lmm_qa.degrade` makes the copies and their labels. This module decides what it makes them from: each clip as it is, and
segments of it with another size and other colours; photographs under a slow camera. Clips of the split `test` are used
as they are. Everything is resumable: files that exist are not made again.
"""

from __future__ import annotations

import csv
import itertools
import os
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from lmm_qa.config import Sampling, View
from lmm_qa.defects.vocabulary import BY_NAME
from lmm_qa.degrade.causes import DEGRADATIONS, FACIAL, REPRODUCIBLE_X264, Pixels, degrade, encode
from lmm_qa.degrade.dataset import NEAR_LOSSLESS, DegradationPlan, DegradedDataset, FailedSource, read_clip
from lmm_qa.files.tables import read_rows, write_rows
from lmm_qa.manifest import Clip
from lmm_qa.video.decode import read_frames
from lmm_qa.video.face import find_face

SCALE = (1.0, 5.0)
FACTOR = 28  # patch size x merge size of the vision tower, pixels
FPS = 25  # of segments made from photographs
LONGEST = 60.0  # seconds of a copy that are read
SEARCHED_SECONDS = 12.0  # segments are cut from the first seconds of a clip
SHORT_SIDES = (256, 320, 384, 448, 512, 576)
LUMA = np.array((0.299, 0.587, 0.114), np.float32)  # ITU-R BT.601
HEAD_DEFECTS = tuple(name for name, one in BY_NAME.items() if one.causes and set(one.causes) <= set(FACIAL))

MAX_ARCHIVE_BYTES = 60 << 20
TRAINING_SPLITS = ("train", "val")
ARCHIVED = ("labels.jsonl", "table.jsonl", "evidence.jsonl")
"""Of each of these splits."""

Kind = Literal["clip", "portrait", "picture"]
CAUSES: dict[Kind, tuple[str, ...]] = {
    "clip": tuple(DEGRADATIONS),
    "portrait": tuple(cause for cause in DEGRADATIONS if cause != "mouth_freeze"),  # the mouth does not move anyway
    "picture": tuple(cause for cause in DEGRADATIONS if cause not in FACIAL),
}
"""`portrait` and `picture` are photographs, of a head and of anything else."""
UNKNOWN: dict[Kind, tuple[str, ...]] = {"clip": (), "portrait": ("lips",), "picture": HEAD_DEFECTS}
"""Defects that copies of this kind say nothing about."""


@dataclass(frozen=True)
class Segment:
    """A video of which copies are made."""

    source: Path
    kind: Kind
    round: int
    """Of the degraded copies; in round 0, a clip is used as it is."""

    def path(self, folder: Path) -> Path:
        """Path of the video."""
        original = self.kind == "clip" and not self.round
        return self.source if original else folder / f"{self.kind}__{self.source.name}__{self.round}.mp4"


def read_index(folder: Path) -> list[dict[str, str]]:
    """The rows of a folder's `index.csv`."""
    with (folder / "index.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def training_portraits(folder: Path, clips: Sequence[Mapping[str, str]]) -> list[Path]:
    """The portraits whose repository has no clip in the splits `val` and `test`.

    Args:
        folder: contains pictures and `index.csv` (image, repository).
        clips: rows of the clips' index (repository, split).
    """

    def project(row: Mapping[str, str]) -> str:
        return row["repository"].partition("/")[2].partition("_")[0]

    held_out = {project(row) for row in clips if row["split"] != "train"}
    return [folder / image for image in dict.fromkeys(row["image"] for row in read_index(folder)
                                                      if project(row) not in held_out)]  # fmt: skip


def make_data(clips: Path, portraits: Path | None, pictures: Path | None, out: Path, settings: Mapping[str, Any],
              workers: int) -> None:  # fmt: skip
    """Write OUT/<split>/labels.jsonl (as `lmm-qa degrade` does), the copies, and OUT/<split>/table.jsonl for training.

    Args:
        clips: folder of videos with `index.csv` (clip, repository, split).
        portraits: folder of photographs of heads, see `training_portraits`.
        pictures: folder of large photographs of anything else.
        settings: the section `data` of model.yaml.
    """
    index = read_index(clips)
    images = sorted(pictures.iterdir()) if pictures else []
    sources: list[tuple[Path, Kind]] = [(clips / row["clip"], "clip") for row in index if row["split"] == "train"]
    sources += [(path, "portrait") for path in (training_portraits(portraits, index) if portraits else [])]
    sources += [(path, "picture") for path in images if path.suffix.lower() in Image.registered_extensions()]
    segments = [Segment(path, kind, number) for number in range(len(settings["strengths"])) for path, kind in sources]
    held_out = {
        split: [Segment(clips / row["clip"], "clip", number) for row in index if row["split"] == split]
        for split, number in (("val", settings["val_round"]), ("test", 0))
    }
    folder = out / "segments"
    folder.mkdir(parents=True, exist_ok=True)
    missing = [segment for segment in itertools.chain(segments, *held_out.values())
               if not segment.path(folder).exists()]  # fmt: skip
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        make = partial(make_segment, folder=folder, length=settings["length"], rate_factor=settings["rate_factor"])
        for error in pool.map(make, missing):
            if error:  # one bad source must not end hours of work
                print(error, flush=True)
    for number, ladders in enumerate(settings["strengths"]):
        for kind, causes in CAUSES.items():
            chosen = [one.path(folder) for one in segments if (one.kind, one.round) == (kind, number)]
            make_copies(chosen, out / "train", causes, ladders, settings, workers)
    write_table(out / "train", {segment.path(folder).name: segment for segment in segments})
    add_variants(out / "train", settings["variants"], workers)
    for split, originals in held_out.items():
        by_name = {segment.path(folder).name: segment for segment in originals}
        paths = [segment.path(folder) for segment in originals]
        make_copies(paths, out / split, CAUSES["clip"], settings[f"{split}_strengths"], settings, workers)
        write_table(out / split, by_name)


def make_copies(sources: Sequence[Path], out: Path, causes: Sequence[str], ladders: Sequence[Sequence[float]],
                settings: Mapping[str, Any], workers: int) -> None:  # fmt: skip
    """Add the degraded copies of some videos to OUT/labels.jsonl.

    Each video gets one of the ladders of strengths and, if `cause_groups` is above 1, every so-manieth cause: more
    videos are worth more than more copies of each. Its name decides which.
    """
    if settings["causes"]:
        causes = [cause for cause in causes if cause in settings["causes"]]
    groups = settings["cause_groups"]
    for ladder, group in itertools.product(range(len(ladders)), range(groups)):
        chosen = [path for path in sources if path.exists() and draw(path, "ladder", len(ladders)) == ladder
                  and draw(path, "causes", groups) == group]  # fmt: skip
        clips = [Clip(path, path.name, "argument") for path in chosen]
        if not clips or not causes[group::groups]:
            continue
        plan = DegradationPlan(causes=tuple(causes[group::groups]), strengths=tuple(ladders[ladder]),
                               pairs=settings["pairs"], scale=SCALE, length=settings["length"])  # fmt: skip
        dataset = DegradedDataset(out / "labels.jsonl", clips, plan)
        for number, outcome in enumerate(dataset.make(workers), 1):
            if isinstance(outcome, FailedSource):
                print(f"{outcome.source}: {outcome.error}", flush=True)
            elif number % 50 == 0 or number == len(dataset.pending):
                print(f"{out.name}, strengths {list(ladders[ladder])}, causes {group + 1} of {groups}: "
                      f"{number} of {len(dataset.pending)} copies", flush=True)  # fmt: skip


def draw(path: Path, what: str, count: int) -> int:
    """A number below `count` that depends on the name of a file alone."""
    return zlib.crc32(f"{what} {path.name}".encode()) % count


def write_table(folder: Path, segments: Mapping[str, Segment]) -> None:
    """Write FOLDER/table.jsonl: the labels for training. All segments of one source are one group.

    Args:
        segments: by the names of their files.
    """
    rows = []
    for row in read_rows(folder / "labels.jsonl") if (folder / "labels.jsonl").exists() else []:
        segment = segments[row["source"]]
        named = {defect.lstrip("?").partition(" ")[0] for defect in row["defects"]}
        unknown = [f"?{name}" for name in UNKNOWN[segment.kind] if name not in named]
        explanation = None if segment.kind == "picture" else row["explanation"]  # it may praise a face
        rows.append({"clip": row["clip"], "mos": row["mos"], "group": segment.source.name,
                     "defects": [*row["defects"], *unknown], "explanation": explanation})  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "table.jsonl", rows)


def add_variants(folder: Path, share: float, workers: int) -> None:
    """Add variants of some copies to FOLDER/table.jsonl: files that show the same, for the loss `consistency`.

    Args:
        folder: of the copies.
        share: of the copies that get a variant.
    """
    rows = read_rows(folder / "table.jsonl")
    chosen = [row for row in rows if draw(Path(row["clip"]), "variant", 1000) < 1000 * share]
    variants = [{**row, "clip": variant_name(row["clip"]), "same_as": row["clip"], "explanation": None}
                for row in chosen]  # fmt: skip
    make_variants(folder, variants, workers)
    originals = {row["clip"] for row in chosen}
    write_rows(folder / "table.jsonl", [
        {**row, "same_as": row["clip"] if row["clip"] in originals else None} for row in rows] + variants)  # fmt: skip


def make_variants(folder: Path, rows: Sequence[Mapping[str, Any]], workers: int) -> None:
    """Make those of these variants that do not exist; rows of table.jsonl."""
    missing = [row["same_as"] for row in rows if not (folder / row["clip"]).exists()]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for number, _ in enumerate(pool.map(partial(make_variant, folder), missing, chunksize=4), 1):
            if number % 50 == 0 or number == len(missing):
                print(f"{folder.name}: {number} of {len(missing)} variants", flush=True)


def variant_name(clip: str) -> str:
    """The file name of the variant of a copy; it says what the variant is."""
    return f"{Path(clip).stem}__{variant_kind(clip)}.mp4"


def variant_kind(clip: str) -> str:
    """Which of the `VARIANTS` a copy gets."""
    return tuple(VARIANTS)[draw(Path(clip), "kind", len(VARIANTS))]


def make_variant(folder: Path, clip: str) -> None:
    """Write the variant of a copy: mirrored, without 5% at both ends, or encoded again without visible loss."""
    name = variant_name(clip)
    partial_file = folder / f".{name}"
    VARIANTS[variant_kind(clip)](folder / clip, partial_file)
    partial_file.replace(folder / name)


def mirror(clip: Path, out: Path) -> None:
    """Exchange left and right."""
    frames, fps, _ = read_clip(clip, LONGEST)
    write_clip(frames[:, :, ::-1], fps, NEAR_LOSSLESS, out)


def trim(clip: Path, out: Path) -> None:
    """Cut 5% at both ends."""
    frames, fps, _ = read_clip(clip, LONGEST)
    cut = len(frames) // 20
    write_clip(frames[cut : len(frames) - cut], fps, NEAR_LOSSLESS, out)


def reencode(clip: Path, out: Path) -> None:
    """Encode again without visible loss."""
    frames, fps, _ = read_clip(clip, LONGEST)
    write_clip(frames, fps, {**REPRODUCIBLE_X264, "crf": "15"}, out)


def write_clip(frames: Pixels, fps: float, options: Mapping[str, str], out: Path) -> None:
    """Encode with x264."""
    encode(np.ascontiguousarray(frames), "libx264", dict(options), Fraction(fps).limit_denominator(1001), str(out))


VARIANTS: dict[str, Callable[[Path, Path], None]] = {"mirrored": mirror, "trimmed": trim, "encoded": reencode}
"""How to write a clip that shows the same as another one."""


def make_segment(segment: Segment, folder: Path, length: float, rate_factor: float) -> str | None:
    """Write the video of one segment with this rate factor of x264; returns a message if that fails."""
    rng = np.random.default_rng(zlib.crc32(segment.path(folder).name.encode()))
    try:
        if segment.kind == "clip":
            frames, fps = cut_clip(segment.source, length, rng)
            frames = vary_colours(frames, rng)
        else:
            frames, fps = pan_photograph(segment, length, rng), float(FPS)
        path = segment.path(folder)
        partial_file = path.with_name(f".{path.name}")
        options = {**NEAR_LOSSLESS, "crf": f"{rate_factor:g}"}
        encode(frames, "libx264", options, Fraction(fps).limit_denominator(1001), str(partial_file))
        partial_file.replace(path)
    except Exception as error:
        return f"{segment.source.name}: {type(error).__name__}: {error}"
    return None


def cut_clip(path: Path, length: float, rng: np.random.Generator) -> tuple[Pixels, float]:
    """A segment of a clip from a random time, at a random size: (T, H, W, 3) uint8 RGB, and frames per second."""
    frames, fps, _ = read_clip(path, SEARCHED_SECONDS)
    count = min(len(frames), round(length * fps))
    start = int(rng.integers(0, len(frames) - count + 1))
    height, width = frames.shape[1:3]
    shrink = min(1.0, int(rng.choice(SHORT_SIDES)) / min(height, width))
    size = (round(width * shrink), round(height * shrink))
    lanczos = Image.Resampling.LANCZOS
    segment = [np.asarray(Image.fromarray(frame).resize(size, lanczos)) for frame in frames[start : start + count]]
    return np.stack(segment), fps


def vary_colours(frames: Pixels, rng: np.random.Generator) -> Pixels:
    """The same clip as another camera would record it, perhaps mirrored: brightness, contrast, white balance and
    saturation within an unobtrusive range, so that a model cannot recognise its sources by them."""
    gains = 1 + rng.normal(0, 0.08) + rng.normal(0, 0.03, 3)  # of each channel
    gamma, contrast, saturation = np.exp(rng.normal(0, 0.12)), 1 + rng.normal(0, 0.06), rng.uniform(0.7, 1.2)
    values = (np.arange(256) / 255) ** gamma
    table = np.clip(255 * (0.45 + contrast * (values - 0.45)), 0, 255)[:, None] * gains
    varied = np.empty_like(frames)
    for number, frame in enumerate(frames[:, :, ::-1] if rng.random() < 0.5 else frames):
        colours = table[frame, np.arange(3)].astype(np.float32)
        grey = (colours @ LUMA)[..., None]
        varied[number] = np.clip(np.rint(grey + saturation * (colours - grey)), 0, 255)
    return varied


def pan_photograph(segment: Segment, length: float, rng: np.random.Generator) -> Pixels:
    """A photograph under a camera that pans and zooms slowly: (T, S, S, 3) uint8 RGB."""
    picture = Image.open(segment.source).convert("RGB")
    side, shortest = 2 * int(rng.integers(128, 288)), min(picture.size)
    head = segment.kind == "portrait"
    if not head:  # a window of a large photograph, reduced somewhat, so that it is sharp
        shortest = min(shortest, int(side * rng.uniform(1.2, 3)))
    centre = rng.uniform(0.35, 0.65, 2) if head else rng.uniform(0, 1, 2)
    speed = rng.normal(0, 0.03, 2)
    zoom, growth = rng.uniform(0.7, 0.95), rng.normal(0, 0.03)
    frames = []
    for time in np.linspace(0, 1, round(length * FPS)):
        half = shortest * min(zoom + growth * time, 1.0) / 2
        x, y = np.clip((centre + speed * time) * picture.size, half, np.array(picture.size) - half)
        box = (x - half, y - half, x + half, y + half)
        frames.append(np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC, box)))
    return np.stack(frames)


def restore_copies(data: Path, splits: Sequence[str], workers: int) -> None:
    """Make the copies and variants that the tables of some splits name and that do not exist: the same files again,
    without their labels being measured.

    Args:
        data: folder of `make_data`, with all segments.
    """
    for split in splits:
        by_source: dict[str, list[Mapping[str, Any]]] = {}
        for row in read_rows(data / split / "labels.jsonl"):
            if not (data / split / row["clip"]).exists():
                by_source.setdefault(row["source"], []).append(row)
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            restored = pool.map(partial(restore_copies_of, data / "segments", data / split), by_source.values())
            for number, _ in enumerate(restored, 1):
                if number % 20 == 0 or number == len(by_source):
                    print(f"{split}: copies of {number} of {len(by_source)} sources made again", flush=True)
        variants = [
            row for row in read_rows(data / split / "table.jsonl") if row.get("same_as") not in (None, row["clip"])
        ]
        make_variants(data / split, variants, workers)


def restore_copies_of(segments: Path, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Make copies of one source again; rows of labels.jsonl."""
    frames, fps, _ = read_clip(segments / rows[0]["source"], rows[0]["length"])
    face = find_face(frames)
    for row in rows:
        copy = frames
        for cause, strength in zip(row["causes"], row["strengths"], strict=True):
            copy = degrade(copy, cause, strength, row["seed"], fps=fps, face=face).frames
        partial_file = folder / f".{row['clip']}"
        write_clip(copy, fps, NEAR_LOSSLESS, partial_file)
        partial_file.replace(folder / row["clip"])


def write_archive(work: Path, file: Path) -> None:
    """Write what another machine needs to go on after the step `evidence`: segments, labels and predictions, but no
    copies, which it makes again.

    Raises:
        SystemExit: a source is no segment, or the archive has more than `MAX_ARCHIVE_BYTES`.
    """
    data, segments = work / "data", work / "data" / "segments"
    sources = {row["source"] for split in TRAINING_SPLITS for row in read_rows(data / split / "labels.jsonl")}
    if missing := sorted(source for source in sources if not (segments / source).exists()):
        raise SystemExit(
            f"{missing[0]} is no segment: an archive needs data.val_round above 0, and no copies in round 0"
        )
    files = [segments / source for source in sorted(sources)]
    files += [data / split / name for split in TRAINING_SPLITS for name in ARCHIVED]
    files += [work / name for name in ("classifier.safetensors", "predictions.jsonl", "steps.jsonl")]
    partial_file = file.with_name(f".{file.name}")
    with tarfile.open(partial_file, "w") as archive:
        for each in files:
            archive.add(each, each.relative_to(work))
    size = partial_file.stat().st_size
    print(f"{file}: {size / 2**20:.1f} MiB, {len(files)} files", flush=True)
    if size > MAX_ARCHIVE_BYTES:
        raise SystemExit(f"{partial_file} has more than {MAX_ARCHIVE_BYTES >> 20} MiB: raise data.rate_factor in the "
                         "configuration, or use fewer sources, and start with a new work folder")  # fmt: skip
    partial_file.replace(file)


class ViewCache:
    """The views of copies, as the model sees them, decoded once and stored as arrays."""

    def __init__(self, folder: Path, sampling: Sampling, views: Sequence[View]) -> None:
        self.folder, self.sampling, self.views = folder, sampling, views

    def read(self, clip: Path) -> list[Pixels]:
        """(T, H, W, 3) uint8 RGB of each view, memory-mapped."""
        files = [self.folder / f"{clip.stem}.{number}.npy" for number in range(len(self.views))]
        if not files[-1].exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            for file, view in zip(files, read_frames(clip, self.sampling, self.views, FACTOR).views, strict=True):
                partial_file = file.with_name(f".{os.getpid()}{file.name}")
                np.save(partial_file, view)
                partial_file.replace(file)
        return [np.load(file, mmap_mode="r") for file in files]
