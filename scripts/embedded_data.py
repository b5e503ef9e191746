"""Prepare the training data of the embedded model: clean clips in, damaged copies with labels out.

    python scripts/embedded_data.py --clips CLIPS --portraits PORTRAITS --pictures PICTURES --out data/embedded

CLIPS holds video files and an `index.csv` with columns `clip` and `split` (train / val / test). From each clip of train
and val a few segments are cut (random window in time, space and size). PORTRAITS (may be left out) holds pictures and
an `index.csv` with columns `image` and `repository`; each becomes a train segment under a slow camera, with a face that
does not move, unless its repository gave clips to val or test. PICTURES (may be left out) is a folder of photographs of
anything, large ones: windows of them go the same way, without damage to faces, so that there is more than heads to
learn blur, noise and compression from. Each segment is damaged in known ways, the first two of a clip and the first of
a portrait in all of them, the others in some; what is stored of a damaged copy is what the rater will look at, its
views, so that training reads pixels and decodes nothing.

Labels run from 0 to 1 (mapped to the declared scale in training) and come from `lmm_qa.degrade.full_reference`: VMAF on the frames
that are looked at, stated curves where VMAF cannot judge, times the ceiling of the source itself.

Restartable: a segment that is already there is left alone.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lmm_qa.degrade.causes import COMPRESSION, DEGRADATIONS, FACIAL, REPEATABLE_X264, Pixels, transcode
from lmm_qa.degrade.full_reference import ceiling, make_copy
from lmm_qa.video.face import AROUND, ASSUMED, Face, face_window, find_face

Floats = NDArray[np.float64]
Made = TypeVar("Made")

SHORT, LONG = 48, 250  # frames of a segment: about two seconds, up to ten
FPS = 25.0
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
COPIES, FEWER = 46, 16  # of one of the first two segments of a clip, the first of a portrait; and of any other
KINDS = ("whole", "face", "crop")  # of views, in the order of the prompt
PAIRS = 6  # moments looked at, two frames each
CROP, WHOLE_PIXELS, FACTOR = 168, 168 * 168, 28
FACE, FACE_SEEN = 168, 140  # the face is kept somewhat larger than it is looked at, so that training can shift it
HANDED_ON, HARDLY_LOSSY = 0.7, (8.0, 14.0)  # share of the copies that are rated as an encoder hands them on; its CRF
BLIND = 0.08  # share of the segments whose face is taken for not found

MAIN = ("blur", "rescale", "noise", "jpeg", "h264", "stall")
"""Causes that get two copies of a segment, as those of talking heads do."""

SLOW = ("h265", "vp9", "av1", "motion_blur")
"""Causes that long segments go without, as they take a second for each of theirs."""

EACH_FRAME = {"blur", "rescale", "noise", "jpeg", "banding", "overexposure", "underexposure", "colour_cast"}
"""Causes for which the frames that are not looked at need not be made."""


@dataclass(frozen=True)
class Job:
    source: Path
    split: str
    segment: int
    out: Path
    still: bool = False
    head: bool = True

    @property
    def name(self) -> str:
        return f"{self.source.stem if self.head else f'picture__{self.source.name}'}--{self.segment}"

    @property
    def fewer(self) -> bool:
        return not self.head or self.segment >= (1 if self.still else 2)


def recipe(rng: np.random.Generator, long: bool) -> list[list[tuple[str, float]]]:
    """The damages of each copy: none, every cause (main ones and those of heads mild and strong), some random pairs."""
    causes = [cause for cause in DEGRADATIONS if not (long and cause in SLOW)]
    copies: list[list[tuple[str, float]]] = [[]]
    for cause in causes:
        shares = 2 if cause in MAIN or cause in FACIAL else 1
        copies += [[(cause, (share + float(rng.uniform())) / shares)] for share in range(shares)]
    while len(copies) < COPIES:
        one, other = (str(cause) for cause in rng.choice(causes, 2, replace=False))
        if not {one, other} <= set(COMPRESSION):
            copies.append([(one, float(rng.uniform(0.2, 0.9))), (other, float(rng.uniform(0.2, 0.9)))])
    return copies


def some(rng: np.random.Generator, copies: list[list[tuple[str, float]]], head: bool) -> list[list[tuple[str, float]]]:
    """The undamaged copy and some of the others; where there is no head, none that is damaged there."""
    fit = [damages for damages in copies[1:] if head or not {cause for cause, _ in damages} & set(FACIAL)]
    return [copies[0]] + [fit[number] for number in rng.choice(len(fit), FEWER - 1, replace=False)]


def read_segment(job: Job, rng: np.random.Generator) -> tuple[Pixels, float]:
    """A random window of the clip in time, space and size, around the face: (frames, H, W, 3) and the ceiling."""
    import av

    with av.open(str(job.source)) as container:
        total = sum(1 for _ in container.decode(video=0))
        stream = container.streams.video[0]
        bits = 8 * job.source.stat().st_size / max(total * stream.width * stream.height, 1)
        limit = ceiling(stream.height, stream.width, bits)
        wanted = int(rng.integers(SHORT, min(total, LONG) + 1)) if job.segment % 2 and total > SHORT else SHORT
        start = int(rng.integers(0, max(total - wanted, 0) + 1))
        container.seek(0)
        frames: list[Pixels] = []
        for number, frame in enumerate(container.decode(video=0)):
            if start <= number < start + wanted:
                frames.append(frame.to_ndarray(format="rgb24"))
    while len(frames) < wanted:  # shorter clips swing back and forth: time goes on without a cut
        frames += frames[-2:0:-1] or frames
    frames = frames[:wanted]
    height, width = frames[0].shape[:2]
    shrink = min(1.0, float(rng.uniform(256, 800)) / min(height, width)) if job.segment else 1.0
    if len(frames) > SHORT:
        shrink = min(shrink, 400 / min(height, width))  # long segments are small, so that they are done in time
    face = find_face(np.stack(frames[:: max(len(frames) // 12, 1)]))
    window = int(rng.integers(400, 640))
    box = np.median(face.boxes, axis=0) * (width, height, width, height)
    shrink = min(shrink, window / (1.6 * float(box[2] - box[0])))  # a part of a face shows nothing of what ails it
    size = (round(width * shrink), round(height * shrink))
    if shrink < 1:
        bicubic = Image.Resampling.BICUBIC
        frames = [np.asarray(Image.fromarray(frame).resize(size, bicubic)) for frame in frames]
        limit = (1 + limit) / 2  # shrinking hides what the source's own encoder did
    middle = shrink * (box[:2] + box[2:]) / 2 + rng.normal(0, 0.08, 2) * window
    left, top = (int(np.clip(at - window / 2, 0, max(side - window, 0))) for at, side in zip(middle, size, strict=True))
    return np.stack(frames)[:, top : top + window, left : left + window].copy(), limit


def pan_portrait(job: Job, rng: np.random.Generator) -> tuple[Pixels, float]:
    """A picture under a camera that drifts and zooms slowly: (48, H, W, 3) frames and the ceiling of the picture."""
    picture = Image.open(job.source).convert("RGB")
    side = min(picture.size)
    out = int(rng.integers(320, 600))
    place, speed = rng.uniform(0.3, 0.7, 2) if job.head else rng.uniform(0, 1, 2), rng.normal(0, 0.03, 2)
    zoom, growth = float(rng.uniform(0.6 if job.segment else 0.75, 0.92)), float(rng.normal(0, 0.03))
    if not job.head:  # a window of a large photograph, shrunk somewhat, so that it is sharp
        side = min(side, int(out * float(rng.uniform(1.2, 3)) / zoom))
    return camera(picture, side, out, SHORT, (place, speed), (zoom, growth)), ceiling(side, side, 1.0)


def camera(picture: Image.Image, side: int, out: int, count: int, way: tuple[Floats, Floats],
           zooms: tuple[float, float]) -> Pixels:  # fmt: skip
    """(count, out, out, 3): a square of a picture under a camera that drifts and zooms.

    Args:
        picture: what is seen.
        side: pixels of the largest square.
        out: pixels a side of the frames.
        count: frames.
        way: the middle of the square at the begin, across and down, in fractions of the picture; and what it moves by
            until the end.
        zooms: the same of the square's side, in fractions of `side`, which it never exceeds.
    """
    frames = []
    for now in np.arange(count) / count:
        half = side * min(zooms[0] + zooms[1] * now, 1.0) / 2
        x, y = (
            float(np.clip((spot + pace * now) * length, half, length - half))
            for spot, pace, length in zip(*way, picture.size, strict=True)
        )
        frames.append(
            np.asarray(picture.resize((out, out), Image.Resampling.BICUBIC, (x - half, y - half, x + half, y + half)))
        )
    return np.stack(frames)


def sampled(frames: int) -> list[int]:
    """Frame numbers of the pairs: middles of equal shares, two frames apart (0.08 s at 25 frames a second)."""
    middles = [int((moment + 0.5) * frames / PAIRS) for moment in range(PAIRS)]
    return [number for middle in middles for number in (middle, min(middle + 2, frames - 1))]


def views(frames: Pixels, window: tuple[int, int, int]) -> dict[str, Pixels]:
    """The whole picture within the pixel budget, the face, and the crop at native resolution."""
    height, width = frames.shape[1:3]
    shrink = min(1.0, math.sqrt(WHOLE_PIXELS / (height * width)))
    rows, columns = (max(FACTOR, int(side * shrink) // FACTOR * FACTOR) for side in (height, width))
    bicubic = Image.Resampling.BICUBIC
    whole = np.stack([np.asarray(Image.fromarray(frame).resize((columns, rows), bicubic)) for frame in frames])
    tall, wide = (min(CROP, side // FACTOR * FACTOR) for side in (height, width))
    top, left = round((height - tall) * 0.42), round((width - wide) * 0.5)
    x, y, side = window
    faces = [Image.fromarray(frame).resize((FACE, FACE), bicubic, (x, y, x + side, y + side)) for frame in frames]
    crop = np.ascontiguousarray(frames[:, top : top + tall, left : left + wide])
    return {"whole": whole, "face": np.stack([np.asarray(face) for face in faces]), "crop": crop}


def handed_on(crop: Pixels, lot: random.Random) -> Pixels:
    """A native crop, mostly, as it is when an encoder has handed it on with hardly a loss, as it does with each clip
    that is rated. Copies are kept without, and pixels that are equal to the bit would tell too much."""
    if lot.random() >= HANDED_ON:
        return crop
    return transcode(crop, "libx264", {"crf": f"{lot.uniform(*HARDLY_LOSSY):.1f}", "g": "2", **REPEATABLE_X264}, FPS)


def rated_views(folder: Path, name: str, kinds: Sequence[str]) -> tuple[Pixels, ...]:
    """Views of a prepared copy as they are rated: of the face's surroundings the middle, the crop handed on."""
    views = {kind: np.load(folder / f"{name}.{kind}.npy") for kind in kinds}
    if "face" in views:
        edge = (FACE - FACE_SEEN) // 2
        views["face"] = np.ascontiguousarray(views["face"][:, edge:-edge, edge:-edge])
    if "crop" in views:
        views["crop"] = handed_on(views["crop"], random.Random(name))
    return tuple(views.values())


def prepare(job: Job) -> list[dict[str, object]]:
    """All copies of one segment; returns their rows."""
    rows_file = job.out / f"{job.name}.json"
    if rows_file.exists():
        return list(json.loads(rows_file.read_text()))
    rng = np.random.default_rng(zlib.crc32(job.name.encode()))
    source, limit = pan_portrait(job, rng) if job.still else read_segment(job, rng)
    looked_at, face = sampled(len(source)), find_face(source)
    height, width = source.shape[1:3]
    seen = Face(np.array([ASSUMED]), found=False) if rng.uniform() < BLIND else face
    window = face_window(seen, height, width, AROUND * FACE / FACE_SEEN * float(rng.uniform(0.9, 1.1)))
    rows: list[dict[str, object]] = []
    copies = recipe(rng, len(source) > SHORT)
    for number, damages in enumerate(some(rng, copies, job.head) if job.fewer else copies):
        seed = int(rng.integers(2**31))
        causes = [cause for cause, _ in damages]
        if set(causes) <= EACH_FRAME:
            copy = make_copy(source[looked_at], damages, seed, fps=FPS)
            pictures = copy.frames
        else:
            copy = make_copy(source, damages, seed, fps=FPS, face=face, judged=looked_at)
            pictures = copy.frames[looked_at]
        name = f"{job.name}--{number:02d}"
        for kind, view in views(pictures, window).items():
            np.save(job.out / f"{name}.{kind}.npy", view)
        rows.append(
            {
                "name": name, "source": job.source.name, "split": job.split, "segment": job.name,
                "still": job.still, "head": job.head, "duration": len(source) / FPS, "causes": causes,
                "strengths": [strength for _, strength in damages], "vmaf": copy.vmaf, "ceiling": limit,
                "quality": copy.quality * limit,
            }
        )  # fmt: skip
    partial = rows_file.with_suffix(".tmp")
    partial.write_text(json.dumps(rows))
    partial.replace(rows_file)
    return rows


def index_of(folder: Path) -> list[dict[str, str]]:
    """The rows of a folder's `index.csv`."""
    with (folder / "index.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def portraits_of_training(folder: Path, clips: Sequence[Mapping[str, str]]) -> list[Path]:
    """The pictures of a folder whose repositories gave no clip to val or test. `clips`: the rows of their index."""

    def project(row: Mapping[str, str]) -> str:
        return row["repository"].partition("/")[2].partition("_")[0]

    held_out = {project(row) for row in clips if row["split"] != "train"}
    images = [row["image"] for row in index_of(folder) if project(row) not in held_out]
    return [folder / image for image in dict.fromkeys(images)]  # some are listed twice


def run_all(make: Callable[[Made], list[Any]], jobs: Sequence[Made], workers: int) -> None:
    """Make the copies of all jobs, which have names, in processes, and say how far it is."""
    with ProcessPoolExecutor(workers) as pool:
        futures = {pool.submit(make, job): job for job in jobs}
        for done, future in enumerate(as_completed(futures), 1):
            said = f"{done}/{len(jobs)} {futures[future].name}"
            try:
                print(f"{said}: {len(future.result())} copies", flush=True)
            except Exception as error:  # one bad source must not end hours of work
                print(f"{said}: FAILED {type(error).__name__}: {error}", flush=True)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of all copies in a folder, which lie there a file a job."""
    return [row for file in sorted(folder.glob("*.json")) for row in json.loads(file.read_text())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--portraits", type=Path)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--segments", type=int, default=4,
                        help="segments of each clip, every second one longer; half as many of a portrait")  # fmt: skip
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    index = index_of(args.clips)
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = [
        Job(args.clips / row["clip"], row["split"], segment, args.out)
        for segment in range(args.segments)
        for row in index
        if row["split"] == "train" or (row["split"] == "val" and segment < 2)
    ]
    if args.portraits:
        jobs += [
            Job(portrait, "train", segment, args.out, still=True)
            for portrait in portraits_of_training(args.portraits, index)
            for segment in range(max(1, args.segments // 2))
        ]
    if args.pictures:
        jobs += [
            Job(picture, "train", segment, args.out, still=True, head=False)
            for picture in sorted(args.pictures.iterdir())
            if picture.suffix.lower() in Image.registered_extensions()
            for segment in range(max(1, args.segments - 1))
        ]
    # A fixed shuffle inside each round: a training that starts early sees all splits and sources.
    jobs.sort(key=lambda job: (job.segment, zlib.crc32(job.name.encode())))
    run_all(prepare, jobs, args.workers)


if __name__ == "__main__":
    main()
