"""Prepare the training data of the embedded model: clean clips in, damaged copies with labels out.

    python scripts/embedded_data.py --clips CLIPS --out data/embedded

CLIPS holds video files and an `index.csv` with columns `clip` and `split` (train / val / test). From each clip a few
segments are cut (random window, random size). Each segment is damaged in known ways; what is stored of a damaged copy
is what the rater will look at, its views, so that training reads pixels and decodes nothing.

Labels run from 0 to 1 (mapped to the declared scale in training) and come from `lmm_qa.reference`: VMAF on the frames
that are looked at, stated curves where VMAF cannot judge, times the ceiling of the source itself.

Restartable: a segment that is already there is left alone.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lmm_qa.degrade import TEMPORAL, Pixels
from lmm_qa.face import find_face
from lmm_qa.reference import ceiling, make_copy

FRAMES = 48  # frames of a segment
FPS = 25.0
PAIRS = 6  # moments looked at, two frames each
CROP, WHOLE_PIXELS, FACTOR = 224, 168 * 168, 28

RECIPE: tuple[tuple[str, ...], ...] = (
    (),
    ("blur",), ("blur",), ("blur",),
    ("rescale",), ("rescale",),
    ("noise",), ("noise",), ("noise",),
    ("h264",), ("h264",), ("h264",),
    ("h265",), ("vp9",),
    ("jpeg",), ("jpeg",),
    ("stall",), ("stall",), ("stall",),
    ("drop",),
    ("blur", "noise"),
    ("rescale", "h264"),
    ("h264", "stall"),
)  # fmt: skip

EACH_FRAME = {"blur", "rescale", "noise", "jpeg"}
"""Causes for which the frames that are not looked at need not be made."""


@dataclass(frozen=True)
class Job:
    clip: Path
    split: str
    segment: int
    out: Path

    @property
    def name(self) -> str:
        return f"{self.clip.stem}--{self.segment}"


def read_segment(job: Job, rng: np.random.Generator) -> tuple[Pixels, float]:
    """A random window of the clip in time, space and size: (48, H, W, 3) frames and the source's ceiling."""
    import av

    with av.open(str(job.clip)) as container:
        total = sum(1 for _ in container.decode(video=0))
        stream = container.streams.video[0]
        bits = 8 * job.clip.stat().st_size / max(total * stream.width * stream.height, 1)
        limit = ceiling(stream.height, stream.width, bits)
        start = int(rng.integers(0, max(total - FRAMES, 0) + 1))
        container.seek(0)
        frames: list[Pixels] = []
        for number, frame in enumerate(container.decode(video=0)):
            if start <= number < start + FRAMES:
                frames.append(frame.to_ndarray(format="rgb24"))
    while len(frames) < FRAMES:  # shorter clips swing back and forth: time goes on without a cut
        frames += frames[-2:0:-1] or frames
    frames = frames[:FRAMES]
    height, width = frames[0].shape[:2]
    shrink = min(1.0, float(rng.uniform(256, 800)) / min(height, width)) if job.segment else 1.0
    size = (round(width * shrink), round(height * shrink))
    if shrink < 1:
        bicubic = Image.Resampling.BICUBIC
        frames = [np.asarray(Image.fromarray(frame).resize(size, bicubic)) for frame in frames]
        limit = (1 + limit) / 2  # shrinking hides what the source's own encoder did
    width, height = size
    window = int(rng.integers(400, 640))
    left = int(np.clip(rng.normal(0.5, 0.1) * width - window / 2, 0, max(width - window, 0)))
    top = int(np.clip(rng.normal(0.42, 0.1) * height - window / 2, 0, max(height - window, 0)))
    return np.stack(frames)[:, top : top + window, left : left + window].copy(), limit


def sampled() -> list[int]:
    """Frame numbers of the pairs: middles of equal shares, two frames apart (0.08 s at 25 frames a second)."""
    middles = [int((moment + 0.5) * FRAMES / PAIRS) for moment in range(PAIRS)]
    return [number for middle in middles for number in (middle, min(middle + 2, FRAMES - 1))]


def views(frames: Pixels) -> tuple[Pixels, Pixels]:
    """The whole picture within the pixel budget, and the crop at native resolution."""
    height, width = frames.shape[1:3]
    shrink = min(1.0, math.sqrt(WHOLE_PIXELS / (height * width)))
    rows, columns = (max(FACTOR, int(side * shrink) // FACTOR * FACTOR) for side in (height, width))
    bicubic = Image.Resampling.BICUBIC
    whole = np.stack([np.asarray(Image.fromarray(frame).resize((columns, rows), bicubic)) for frame in frames])
    tall, wide = (min(CROP, side // FACTOR * FACTOR) for side in (height, width))
    top, left = round((height - tall) * 0.42), round((width - wide) * 0.5)
    return whole, np.ascontiguousarray(frames[:, top : top + tall, left : left + wide])


def prepare(job: Job) -> list[dict[str, object]]:
    """All copies of one segment; returns their rows."""
    rows_file = job.out / f"{job.name}.json"
    if rows_file.exists():
        return list(json.loads(rows_file.read_text()))
    rng = np.random.default_rng(zlib.crc32(job.name.encode()))
    source, limit = read_segment(job, rng)
    looked_at, face = sampled(), find_face(source)
    rows: list[dict[str, object]] = []
    for number, causes in enumerate(RECIPE):
        strengths = [float(rng.uniform(0, 1)) for _ in causes]
        if len(causes) == 1:  # spread the strengths of one cause over the range
            same = [index for index, other in enumerate(RECIPE) if other == causes]
            strengths = [(same.index(number) + float(rng.uniform(0, 1))) / len(same)]
        seed = int(rng.integers(2**31))
        damages = list(zip(causes, strengths, strict=True))
        if set(causes) <= EACH_FRAME:
            copy = make_copy(source[looked_at], damages, seed, fps=FPS)
            pictures = copy.frames
        else:
            copy = make_copy(source, damages, seed, fps=FPS, face=face, judged=looked_at)
            pictures = copy.frames[looked_at]
        whole, crop = views(pictures)
        name = f"{job.name}--{number:02d}"
        np.save(job.out / f"{name}.whole.npy", whole)
        np.save(job.out / f"{name}.crop.npy", crop)
        rows.append(
            {
                "name": name, "source": job.clip.name, "split": job.split, "segment": job.name, "causes": causes,
                "strengths": strengths, "vmaf": copy.vmaf, "ceiling": limit, "quality": copy.quality * limit,
                "timed": bool(set(causes) & set(TEMPORAL)),
            }
        )  # fmt: skip
    partial = rows_file.with_suffix(".tmp")
    partial.write_text(json.dumps(rows))
    partial.replace(rows_file)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--segments", type=int, default=3, help="segments of each training clip (2 of the others)")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    with (args.clips / "index.csv").open(newline="") as file:
        index = [(args.clips / row["clip"], row["split"]) for row in csv.DictReader(file)]
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = [
        Job(clip, split, segment, args.out)
        for segment in range(args.segments)
        for clip, split in index
        if split == "train" or segment < 2
    ]
    # A fixed shuffle inside each round: a training that starts early sees all splits and sources.
    jobs.sort(key=lambda job: (job.segment, zlib.crc32(job.name.encode())))
    with ProcessPoolExecutor(args.workers) as pool:
        futures = {pool.submit(prepare, job): job for job in jobs}
        for done, future in enumerate(as_completed(futures), 1):
            job = futures[future]
            try:
                print(f"{done}/{len(jobs)} {job.name}: {len(future.result())} copies", flush=True)
            except Exception as error:  # one bad source must not end hours of work
                print(f"{done}/{len(jobs)} {job.name}: FAILED {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main()
