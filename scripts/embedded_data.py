"""Prepare the training data of the embedded model: clean clips in, damaged copies with labels out.

    python scripts/embedded_data.py --clips CLIPS --out data/embedded

CLIPS holds video files and an `index.csv` with columns `clip` and `split` (train / val / test). From each clip a few
segments are cut (random window, random size). Each segment is damaged in known ways; what is stored of a damaged copy
is what the rater will look at, its views, so that training reads pixels and decodes nothing.

Labels run from 0 to 1 (mapped to the declared scale in training):
  - pictures: VMAF of the damaged copy against its source on the sampled frames (libvmaf inside imageio-ffmpeg);
  - time (stall, drop): VMAF compares frames pairwise and cannot judge a picture that is fine but late, so a stated
    curve of the strength stands in, see `temporal_quality`;
  - noise: VMAF hardly minds it (96 at a standard deviation of 7, 85 at 20); the lower of VMAF and a stated curve;
  - several causes: the product;
  - the source itself is not assumed perfect: its `ceiling` falls with its size and its bits a pixel.

Restartable: a segment that is already there is left alone.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import subprocess
import tempfile
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lmm_qa.degrade import TEMPORAL, Pixels, damage, stalled_frames

FRAMES = 48  # frames of a segment
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


@dataclass(frozen=True)
class Job:
    clip: Path
    split: str
    segment: int
    out: Path

    @property
    def name(self) -> str:
        return f"{self.clip.stem}--{self.segment}"


def temporal_quality(cause: str, strength: float) -> float:
    """Quality in [0, 1] of a clip that is perfect but for its timing: a curve of ours, no measurement.

    A stall costs by the share of the clip that stands still; a low frame rate by the frames held.
    """
    if cause == "stall":
        return math.exp(-1.6 * stalled_frames(FRAMES, strength) / FRAMES)
    return math.exp(-0.12 * (round(2 * 6**strength) - 1))


def noise_quality(strength: float) -> float:
    """Quality in [0, 1] of a picture with white noise: a curve of ours over the standard deviation."""
    return math.exp(-3 * 16**strength / 30)


def ceiling(height: int, width: int, bits_per_pixel: float) -> float:
    """Quality in [0, 1] that a clean source can have: less for small pictures and for hard compression."""
    small = min(max((480 - min(height, width)) / 256, 0), 1)
    starved = min(max(math.log2(0.06 / max(bits_per_pixel, 1e-4)) / 3, 0), 1)
    return 1 - 0.2 * small - 0.15 * starved


def vmaf(distorted: Pixels, reference: Pixels) -> float:
    """Mean VMAF (0 to 100) of two (T, H, W, 3) clips, by libvmaf."""
    import imageio_ffmpeg

    height, width = (side - side % 2 for side in reference.shape[1:3])
    with tempfile.TemporaryDirectory() as folder:
        for name, frames in (("d", distorted), ("r", reference)):
            Path(folder, name).write_bytes(np.ascontiguousarray(frames[:, :height, :width]).tobytes())
        raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-i"]
        graph = "[0]format=yuv420p[d];[1]format=yuv420p[r];[d][r]libvmaf=n_threads=1:log_fmt=json:log_path=v.json"
        subprocess.run(
            [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *raw, "d", *raw, "r", "-lavfi", graph, "-f", "null", "-"],
            check=True, cwd=folder, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return float(json.loads(Path(folder, "v.json").read_text())["pooled_metrics"]["vmaf"]["mean"])


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
    looked_at = sampled()
    rows: list[dict[str, object]] = []
    for number, causes in enumerate(RECIPE):
        strengths = [float(rng.uniform(0, 1)) for _ in causes]
        if len(causes) == 1:  # spread the strengths of one cause over the range
            same = [index for index, other in enumerate(RECIPE) if other == causes]
            strengths = [(same.index(number) + float(rng.uniform(0, 1))) / len(same)]
        seed = int(rng.integers(2**31))
        whole_clip = any(cause in (*TEMPORAL, "h264", "h265", "vp9") for cause in causes)
        copy = source if whole_clip else source[looked_at]
        quality = 1.0
        timed: list[tuple[str, float]] = []
        for cause, strength in zip(causes, strengths, strict=True):
            if cause in TEMPORAL:
                timed.append((cause, strength))
            else:
                copy = damage(copy, cause, strength, seed)
        picture = copy[looked_at] if whole_clip else copy
        measured = vmaf(picture, source[looked_at]) if len(causes) > len(timed) else None
        if measured is not None:
            quality = min(max((measured - 5) / 91, 0), 1)
            if "noise" in causes:
                quality = min(quality, noise_quality(strengths[causes.index("noise")]))
        for cause, strength in timed:
            copy = damage(copy, cause, strength, seed)
            quality *= temporal_quality(cause, strength)
        whole, crop = views(copy[looked_at] if whole_clip else copy)
        name = f"{job.name}--{number:02d}"
        np.save(job.out / f"{name}.whole.npy", whole)
        np.save(job.out / f"{name}.crop.npy", crop)
        rows.append(
            {
                "name": name, "source": job.clip.name, "split": job.split, "segment": job.name, "causes": causes,
                "strengths": strengths, "vmaf": measured, "ceiling": limit, "quality": quality * limit,
                "timed": bool(timed),
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
