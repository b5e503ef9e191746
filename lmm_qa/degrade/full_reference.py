"""Degraded copies of a clip in memory, and what each is worth against its source: full-reference labels.

Quality runs from 0 to 1. Where it comes from:

- **VMAF** (libvmaf, as imageio-ffmpeg carries it; model v0.6.1) of the copy against its source: blur, motion blur,
  rescaling, all codecs. libvmaf's documentation (models.md) maps the votes "bad" to about 20 and "excellent" to 100;
  the best copies get 96 to 100. So quality is (VMAF - 20) / 76, within 0 to 1, and a MOS is linear in it.
- **VMAF of the damaged part** of the picture, for detail lost in the face: of the whole picture VMAF hardly sees it.
  The clip loses a stated share of what the part loses (`PART`).
- **VMAF or a stated curve, whichever is lower**: noise (VMAF gives 90 to a standard deviation of 15) and banding
  (VMAF does not see it; Netflix made CAMBI for it).
- **A stated curve** where VMAF cannot judge. It reads brightness, not colour; it forgives or even rewards a change of
  contrast; it compares pixel by pixel and frame by frame, so that a face that is whole but moved, or a picture that is
  whole but late, counts as lost detail. These are `DEPTH`, in proportion to the strength, and for the player's faults
  curves of the seconds, after what people said: see `_waiting`, `_standing`, `_slow`.
  A change of less than `FAINT` grey levels where it should be seen (a frozen mouth that was silent, a wobbling
  background without texture) costs less, in proportion.
- **Several causes**: one VMAF for all that VMAF judges on the whole picture; with everything else, the product (as Ou
  et al., IEEE Trans. CSVT 21(3), 2011, combine picture and frame rate).

The source itself is not assumed perfect: see `ceiling`.
"""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from lmm_qa.degrade.causes import COMPRESSION, DEGRADATIONS, Degraded, Pixels, damage, noise_deviation, slowed
from lmm_qa.errors import MissingExtra
from lmm_qa.video.face import Box, Face

BAD_VMAF, BEST_VMAF = 20.0, 96.0


WHOLE_PICTURE = ("blur", "motion_blur", "rescale", "noise", "banding", *COMPRESSION)


"""What one VMAF of the whole picture judges, with or without a curve."""


PART = {"defocus": 1.0, "mouth_smear": 0.8, "teeth_smear": 0.6}


"""What VMAF judges on the damaged part; and the share of the part's loss that the clip loses."""


DEPTH = {
    "mouth_freeze": 0.7,
    "face_warp": 0.85,
    "background_wobble": 0.5,
    "seam": 0.75,
    "identity_drift": 0.7,
    "flicker": 0.8,
    "overexposure": 0.7,
    "underexposure": 0.8,
    "colour_cast": 0.65,
    "banding": 0.75,
    "jitter": 0.65,
}


"""What a cause takes from the quality at strength 1."""


FAINT = 1.0


"""Mean change in grey levels, within its place and seconds, from which on a damage of strength 1 costs all it can."""


SMALLEST = 32


"""Pixels a side that libvmaf needs."""


@dataclass(frozen=True)
class Step:
    """One damage of a copy."""

    cause: str
    strength: float
    place: Box
    seconds: tuple[float, float]


@dataclass(frozen=True)
class Copy:
    """A damaged clip."""

    frames: Pixels
    steps: tuple[Step, ...]
    """In the order in which they were done."""
    vmaf: float | None
    """0 to 100: the lowest that was measured, of the whole picture or of a part; None where VMAF judges nothing."""
    quality: float
    """0 to 1, against the source."""


def make_copy(
    frames: Pixels,
    damages: Sequence[tuple[str, float]],
    seed: int = 0,
    *,
    fps: float = 25.0,
    face: Face | None = None,
    judged: Sequence[int] | None = None,
) -> Copy:
    """Damage a clip in one or several ways, and judge the outcome.

    Args:
        frames: (T, H, W, 3) uint8 RGB.
        damages: causes (keys of `DEGRADATIONS`) and strengths (0 to 1); done in the order of `DEGRADATIONS`.
        seed: the same seed gives the same copy.
        fps: frames a second.
        face: where the face is; by default it is looked for when a cause needs it.
        judged: the frames that VMAF compares; by default all.

    Raises:
        ValueError: as for `damage`; or a cause is given twice.
        MissingExtra: imageio-ffmpeg is needed, and not installed.
    """
    if len({cause for cause, _ in damages}) < len(damages):
        raise ValueError(f"each cause can befall a clip once, received {', '.join(cause for cause, _ in damages)}")
    looked_at = slice(None) if judged is None else list(judged)
    now, quality = frames, 1.0
    steps: list[Step] = []
    measured: list[float] = []
    ordered = sorted(damages, key=lambda one: list(DEGRADATIONS).index(one[0]) if one[0] in DEGRADATIONS else 0)
    for together, group in groupby(ordered, key=lambda one: one[0] in WHOLE_PICTURE):
        before, limits = now, [1.0]
        for cause, strength in group:
            done = damage(now, cause, strength, seed, fps=fps, face=face)
            steps.append(Step(cause, strength, done.place, done.seconds))
            if together:
                limits.append(_limit(cause, strength))
            elif cause in PART:
                measured.append(vmaf(_part(done.frames[looked_at], done.place), _part(now[looked_at], done.place)))
                quality *= 1 - PART[cause] * (1 - vmaf_quality(measured[-1]))
            else:
                seen = min(1.0, change(now, done, fps) / (FAINT * strength)) if strength else 0.0
                quality *= 1 - seen * (1 - _curve(cause, strength, done.seconds, fps))
            now = done.frames
        if together:
            measured.append(vmaf(now[looked_at], before[looked_at]))
            quality *= min(vmaf_quality(measured[-1]), *limits)
    return Copy(now, tuple(steps), min(measured, default=None), quality)


def vmaf(distorted: Pixels, reference: Pixels) -> float:
    """Mean VMAF (0 to 100) of two (T, H, W, 3) clips, by libvmaf.

    Raises:
        ValueError: the pictures are smaller than `SMALLEST`.
        MissingExtra: imageio-ffmpeg is not installed.
    """
    if min(reference.shape[1:3]) < SMALLEST:
        raise ValueError(
            f"VMAF needs {SMALLEST} x {SMALLEST} pixels, received {reference.shape[2]} x {reference.shape[1]}"
        )
    try:
        import imageio_ffmpeg
    except ImportError:
        raise MissingExtra("imageio-ffmpeg", "degrade", "measuring VMAF") from None

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


def vmaf_quality(value: float) -> float:
    """Quality (0 to 1) that a VMAF stands for."""
    return min(max((value - BAD_VMAF) / (BEST_VMAF - BAD_VMAF), 0.0), 1.0)


def ceiling(height: int, width: int, bits_per_pixel: float) -> float:
    """Quality (0 to 1) that an undamaged source can have.

    Up to 0.2 less for a small picture (short side from 480 down to 224 pixels), up to 0.15 less for hard compression
    (from 0.06 bits a pixel down to an eighth of that); both are our choice.

    Args:
        height: pixels.
        width: pixels.
        bits_per_pixel: bits of the video file for each pixel of each frame.
    """
    small = min(max((480 - min(height, width)) / 256, 0.0), 1.0)
    starved = min(max(math.log2(0.06 / max(bits_per_pixel, 1e-4)) / 3, 0.0), 1.0)
    return 1 - 0.2 * small - 0.15 * starved


def mos(quality: float, scale: tuple[float, float]) -> float:
    """Quality (0 to 1) on a scale from the worst to the best MOS."""
    low, high = scale
    return low + (high - low) * quality


# --- stated curves ---------------------------------------------------------------------------------------------------


def _limit(cause: str, strength: float) -> float:
    """The best quality, whatever VMAF says."""
    if cause == "noise":
        return math.exp(-noise_deviation(strength) / 30)
    return 1 - DEPTH.get(cause, 0.0) * strength


def _curve(cause: str, strength: float, seconds: tuple[float, float], fps: float) -> float:
    """Quality (0 to 1) of a clip that is perfect but for one cause that VMAF cannot judge."""
    length = seconds[1] - seconds[0]
    curves = {"buffering": _waiting(length), "stall": _standing(length), "drop": _slow(fps / slowed(strength))}
    return curves[cause] if cause in curves else 1 - DEPTH[cause] * strength


def _waiting(seconds: float) -> float:
    """Nothing moves before the clip starts. People gave 2.77 of 5 for one second and 2.06 for two (mean MOS of 45 clips
    each in THQA-NTIRE's training and validation labels, `pause_start`); 3.6 is taken for none.
    """
    return math.exp(-0.27 * seconds)


def _standing(seconds: float) -> float:
    """The picture stands in the middle of the clip. People gave 1.91 of 5 for one second and 1.45 for two (as above,
    `pause_middle`)."""
    return math.pow(1 + seconds, -0.9)


def _slow(rate: float) -> float:
    """A lower frame rate: the inverted exponential of Ou et al. (2011), with 30 frames a second as the best and 5 for
    its falling rate, which depends on the content there and is our choice here.
    """
    return (1 - math.exp(-5 * min(rate / 30, 1.0))) / (1 - math.exp(-5))


# --- parts of a clip -------------------------------------------------------------------------------------------------


def _part(frames: Pixels, place: Box) -> Pixels:
    """The place, made larger about its middle where VMAF would have too few pixels."""
    spans = []
    for low, high, side in zip(place[1::-1], place[:1:-1], frames.shape[1:3], strict=True):
        width = min(max(math.ceil((high - low) * side), SMALLEST), side)
        start = min(max(round((low + high) / 2 * side - width / 2), 0), side - width)
        spans.append(slice(start, start + width))
    return frames[:, spans[0], spans[1]]


def change(before: Pixels, done: Degraded, fps: float) -> float:
    """Mean absolute difference, in grey levels, within a damage's place and seconds."""
    first, stop = (round(moment * fps) for moment in done.seconds)
    height, width = before.shape[1:3]
    left, top, right, bottom = (round(edge * side) for edge, side in zip(done.place, (width, height) * 2, strict=True))
    window = (slice(first, stop, max(1, (stop - first) // 8)), slice(top, bottom, 2), slice(left, right, 2))
    difference = before[window].astype(np.int16) - done.frames[window]
    return float(np.abs(difference).mean()) if difference.size else 0.0
