"""Are stalls, waits and bit-rate switches found when they are, and is nothing found where there is none?

    python scripts/when.py CLIPS [--split test] [-o runs/when.json]

CLIPS holds video files and an `index.csv` with columns `clip` and `split`. Of each clip of the split, its first
seconds, made smaller where its short side is longer than `SIDE`, are damaged in memory, alone and in pairs with noise,
blur or H.264, encoded again as H.264 at a constant rate factor of `FACTORS`, and read as clips are read. Strengths,
seeds and factors are drawn by lot, the same for the same clip. Besides, each clip as it is.

Found: both ends within `WITHIN` seconds. Of switches there are three shares: found by a look that asks for evidence
(`sure`), right ones among these, and right ones where the likeliest seconds are asked for.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from lmm_qa.config import Sampling, View
from lmm_qa.degrade.causes import DEGRADATIONS, REPEATABLE_X264, Pixels, damage, encode
from lmm_qa.degrade.dataset import read_clip
from lmm_qa.video.decode import read_frames
from lmm_qa.video.temporal import FrameDynamics, Span, buffering, cadence, stalls, switches

SECONDS, SIDE, WITHIN = 5.0, 360, 0.5
WEAK, STRONG = 0.2, 0.9
FACTORS = (10, 18, 23, 28)
TIMED = ("stall", "buffering", "bitrate_switch")
OTHERS = ("noise", "blur", "h264")
"""Causes that change how a picture looks, not when."""

Damages = list[tuple[str, float]]


def plan(rng: np.random.Generator) -> Iterator[Damages]:
    """The damages of each copy: timed causes alone, twice, and in a pair; what must not be taken for them."""
    for cause in TIMED:
        yield [(cause, rng.uniform(WEAK, STRONG))]
        yield [(cause, rng.uniform(WEAK, STRONG))]
        yield [(cause, rng.uniform(WEAK, STRONG)), (str(rng.choice(OTHERS)), rng.uniform(WEAK, STRONG))]
    for cause in (*OTHERS, "flicker", "drop", "jitter"):
        yield [(cause, rng.uniform(WEAK, STRONG))]
    yield []


def shrunk(frames: Pixels) -> Pixels:
    """The short side at most `SIDE`: damaging and encoding larger pictures takes long."""
    height, width = frames.shape[1:3]
    ratio = min(1.0, SIDE / min(height, width))
    size = round(width * ratio), round(height * ratio)
    return np.stack([np.asarray(Image.fromarray(frame).resize(size)) for frame in frames]) if ratio < 1 else frames


def copy(frames: Pixels, damages: Damages, seed: int, fps: float) -> tuple[Pixels, dict[str, Span]]:
    """Degraded frames, and when each cause shows."""
    seconds = {}
    for cause, strength in sorted(damages, key=lambda one: list(DEGRADATIONS).index(one[0])):
        done = damage(frames, cause, strength, seed, fps=fps)
        frames, seconds[cause] = done.frames, done.seconds
    return frames, seconds


def dynamics(path: Path) -> FrameDynamics:
    measured = read_frames(path, Sampling(frames=1), [View()], 28).dynamics
    if measured is None:
        raise SystemExit(f"{path} is too long: not every frame of it is decoded")
    return measured


def close(found: Span, true: Span) -> bool:
    return all(abs(one - other) <= WITHIN for one, other in zip(found, true, strict=True))


def looked_at(measured: FrameDynamics) -> dict[str, list[Span]]:
    """What is found of each timed cause."""
    first = buffering(measured)
    return {"stall": stalls(measured), "buffering": [first] if first else [], "bitrate_switch": switches(measured)}


def share(values: list[bool]) -> dict[str, Any]:
    return {"of": len(values), "share": round(sum(values) / len(values), 3) if values else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    with (options.clips / "index.csv").open(encoding="utf-8") as file:
        names = [row["clip"] for row in csv.DictReader(file) if row["split"] == options.split]

    found: dict[str, list[bool]] = defaultdict(list)
    alarms: dict[str, list[bool]] = defaultdict(list)
    rates: dict[str, list[float]] = defaultdict(list)
    misses, fires = [], []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "copy.mp4")
        for name in names:
            frames, fps, _ = read_clip(options.clips / name, SECONDS)
            frames = shrunk(frames)
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            for damages in plan(rng):
                factor, seed = int(rng.choice(FACTORS)), int(rng.integers(1 << 30))
                pixels, seconds = copy(frames, damages, seed, fps)
                x264 = {"crf": str(factor), **REPEATABLE_X264}
                encode(pixels, "libx264", x264, Fraction(fps).limit_denominator(1001), str(file))
                measured = dynamics(file)
                spans = looked_at(measured)
                timed = next((cause for cause in TIMED if cause in seconds), None)
                if timed:
                    likeliest = switches(measured, min_evidence=0) if timed == "bitrate_switch" else spans[timed]
                    right = any(close(one, seconds[timed]) for one in likeliest)
                    found[timed].append(right)
                    if not right:
                        misses.append([name, damages, factor, seconds[timed], likeliest])
                    if timed == "bitrate_switch":
                        found["bitrate_switch, sure"].append(bool(spans[timed]))
                        if spans[timed]:
                            found["bitrate_switch, right if sure"].append(right)
                else:
                    kind = damages[0][0] if damages else "none"
                    alarms["stands"].append(bool(spans["stall"] or spans["buffering"]))
                    alarms["switches"].append(bool(spans["bitrate_switch"]))
                    rates[kind if kind in ("drop", "jitter") else "others"].append(cadence(measured).rate)
            spans = looked_at(dynamics(options.clips / name))
            for what, causes in (("stands, as it is", TIMED[:2]), ("switches, as it is", TIMED[2:])):
                alarms[what].append(any(spans[cause] for cause in causes))
            if any(spans.values()):
                fires.append([name, spans])
            print(f"{name}: {share(found['stall'])['share']} {share(found['bitrate_switch'])['share']}", flush=True)
    report = {
        "clips": len(names),
        "within_seconds": WITHIN,
        "found": {kind: share(values) for kind, values in found.items()},
        "false_alarms": {kind: share(values) for kind, values in alarms.items()},
        "median_rate": {kind: round(median(values), 1) for kind, values in rates.items()},
        "misses": misses,
        "clips_as_they_are_that_fire": fires,
    }
    text = json.dumps(report, indent=1)
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
