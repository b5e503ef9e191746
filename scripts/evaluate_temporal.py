"""Evaluate the detection of stalls, initial buffering and bit-rate switches (`lmm_qa.video.temporal`).

    python scripts/evaluate_temporal.py CLIPS [--split test] [-o runs/temporal.json]

CLIPS contains video files and an `index.csv` with columns `clip` and `split`. The first seconds of each clip of the
split, at most `MAX_SIDE` pixels on the short side, are degraded by a temporal cause, alone or with noise, blur or
H.264, encoded as H.264 at one of `RATE_FACTORS`, and read like any clip. Strengths, seeds and factors are random, but
the same for the same clip. The clips themselves are read too, to count false alarms.

A detection is correct if both ends are within `TOLERANCE` seconds. For switches there are three shares: detected
("detected"), correct among these ("correct if detected"), and correct if the most likely span is requested.
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
from lmm_qa.degrade.causes import DEGRADATIONS, REPRODUCIBLE_X264, Pixels, degrade, encode
from lmm_qa.degrade.dataset import read_clip
from lmm_qa.video.decode import read_frames
from lmm_qa.video.temporal import FrameDynamics, Span, buffering, cadence, stalls, switches

SECONDS, MAX_SIDE, TOLERANCE = 5.0, 360, 0.5
MIN_STRENGTH, MAX_STRENGTH = 0.2, 0.9
RATE_FACTORS = (10, 18, 23, 28)
TEMPORAL = ("stall", "buffering", "bitrate_switch")
SPATIAL = ("noise", "blur", "h264")

Degradations = list[tuple[str, float]]
"""Causes and their strengths."""


def plan(rng: np.random.Generator) -> Iterator[Degradations]:
    """The degradations of each copy: temporal causes alone, twice, and with a spatial one; then false-alarm tests."""
    for cause in TEMPORAL:
        yield [(cause, rng.uniform(MIN_STRENGTH, MAX_STRENGTH))]
        yield [(cause, rng.uniform(MIN_STRENGTH, MAX_STRENGTH))]
        temporal = cause, rng.uniform(MIN_STRENGTH, MAX_STRENGTH)
        yield [temporal, (str(rng.choice(SPATIAL)), rng.uniform(MIN_STRENGTH, MAX_STRENGTH))]
    for cause in (*SPATIAL, "flicker", "drop", "jitter"):
        yield [(cause, rng.uniform(MIN_STRENGTH, MAX_STRENGTH))]
    yield []


def shrink(frames: Pixels) -> Pixels:
    """Shrink the short side to at most `MAX_SIDE`: degrading and encoding larger pictures is slow."""
    height, width = frames.shape[1:3]
    ratio = min(1.0, MAX_SIDE / min(height, width))
    size = round(width * ratio), round(height * ratio)
    return np.stack([np.asarray(Image.fromarray(frame).resize(size)) for frame in frames]) if ratio < 1 else frames


def apply(frames: Pixels, degradations: Degradations, seed: int, fps: float) -> tuple[Pixels, dict[str, Span]]:
    """Degrade frames; return them, and when each cause shows."""
    spans = {}
    for cause, strength in sorted(degradations, key=lambda pair: list(DEGRADATIONS).index(pair[0])):
        result = degrade(frames, cause, strength, seed, fps=fps)
        frames, spans[cause] = result.frames, result.seconds
    return frames, spans


def read_dynamics(path: Path) -> FrameDynamics:
    dynamics = read_frames(path, Sampling(frames=1), [View()], 28).dynamics
    if dynamics is None:
        raise SystemExit(f"{path} is too long: not every frame of it is decoded")
    return dynamics


def is_correct(detected: Span, true: Span) -> bool:
    return all(abs(a - b) <= TOLERANCE for a, b in zip(detected, true, strict=True))


def detect(dynamics: FrameDynamics) -> dict[str, list[Span]]:
    """The detected spans of each temporal cause."""
    initial = buffering(dynamics)
    return {
        "stall": stalls(dynamics),
        "buffering": [initial] if initial else [],
        "bitrate_switch": switches(dynamics),
    }


def share(values: list[bool]) -> dict[str, Any]:
    return {"of": len(values), "share": round(sum(values) / len(values), 3) if values else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    with (args.clips / "index.csv").open(encoding="utf-8") as file:
        names = [row["clip"] for row in csv.DictReader(file) if row["split"] == args.split]

    detections: dict[str, list[bool]] = defaultdict(list)
    false_alarms: dict[str, list[bool]] = defaultdict(list)
    rates: dict[str, list[float]] = defaultdict(list)
    misses, alarms_in_originals = [], []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy.mp4")
        for name in names:
            frames, fps, _ = read_clip(args.clips / name, SECONDS)
            frames = shrink(frames)
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            for degradations in plan(rng):
                factor, seed = int(rng.choice(RATE_FACTORS)), int(rng.integers(1 << 30))
                pixels, true_spans = apply(frames, degradations, seed, fps)
                x264 = {"crf": str(factor), **REPRODUCIBLE_X264}
                encode(pixels, "libx264", x264, Fraction(fps).limit_denominator(1001), str(copy))
                dynamics = read_dynamics(copy)
                spans = detect(dynamics)
                cause = next((cause for cause in TEMPORAL if cause in true_spans), None)
                if cause is None:
                    kind = degradations[0][0] if degradations else "none"
                    false_alarms["stall or buffering"].append(bool(spans["stall"] or spans["buffering"]))
                    false_alarms["bitrate_switch"].append(bool(spans["bitrate_switch"]))
                    rates[kind if kind in ("drop", "jitter") else "others"].append(cadence(dynamics).rate)
                    continue
                likely = switches(dynamics, min_evidence=0) if cause == "bitrate_switch" else spans[cause]
                correct = any(is_correct(span, true_spans[cause]) for span in likely)
                detections[cause].append(correct)
                if not correct:
                    misses.append([name, degradations, factor, true_spans[cause], likely])
                if cause == "bitrate_switch":
                    detections["bitrate_switch, detected"].append(bool(spans[cause]))
                    if spans[cause]:
                        detections["bitrate_switch, correct if detected"].append(correct)
            spans = detect(read_dynamics(args.clips / name))
            false_alarms["stall or buffering, original clip"].append(bool(spans["stall"] or spans["buffering"]))
            false_alarms["bitrate_switch, original clip"].append(bool(spans["bitrate_switch"]))
            if any(spans.values()):
                alarms_in_originals.append([name, spans])
            shares = share(detections["stall"])["share"], share(detections["bitrate_switch"])["share"]
            print(f"{name}: stalls {shares[0]}, switches {shares[1]} correct so far", flush=True)
    report = {
        "clips": len(names),
        "tolerance_seconds": TOLERANCE,
        "correct": {kind: share(values) for kind, values in detections.items()},
        "false_alarms": {kind: share(values) for kind, values in false_alarms.items()},
        "median_rate": {kind: round(median(values), 1) for kind, values in rates.items()},
        "misses": misses,
        "alarms_in_original_clips": alarms_in_originals,
    }
    text = json.dumps(report, indent=1)
    print(text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
