"""Degraded copies of a clip in memory, and their quality relative to the source: full-reference labels.

Quality is between 0 and 1. It comes from:

- **VMAF** (libvmaf in imageio-ffmpeg; model v0.6.1) of the copy against its source, for blur, motion blur, rescaling
  and all codecs. According to libvmaf's documentation (models.md), "bad" corresponds to about 20 and "excellent" to
  100; the best copies reach 96 to 100. So quality is (VMAF - 20) / 76, limited to 0 to 1, and a MOS is linear in it.
- **VMAF of the degraded region**, for lost detail in the face, to which VMAF of the whole picture is nearly blind. The
  clip loses a fixed share of what the region loses (`REGION_WEIGHT`).
- **The lower of VMAF and a fixed curve**, for noise (VMAF is 90 at a standard deviation of 15) and banding (to which
  VMAF is blind; Netflix made CAMBI for it).
- **A fixed curve** where VMAF cannot judge. It measures luma, not colour; it forgives or rewards changes of contrast;
  it compares pixel by pixel and frame by frame, so that a face that moved or a picture that is late counts as lost
  detail. Most curves are linear in the strength (`MAX_LOSS`); those of playback faults depend on seconds and follow
  human opinions: see `_buffering_quality`, `_stall_quality`, `_frame_rate_quality`. If the pixels hardly change (a
  frozen mouth that was silent, a wobbling background without texture), the loss is smaller in proportion
  (`FULL_LOSS_CHANGE`).
- **Several causes**: one VMAF for all causes that VMAF judges on the whole picture, multiplied by the qualities of all
  others (as Ou et al., IEEE Trans. CSVT 21(3), 2011, combine picture quality and frame rate).

The source itself may be imperfect: see `quality_ceiling`.
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

from lmm_qa.degrade.causes import (
    COMPRESSION,
    DEGRADATIONS,
    DegradedFrames,
    Pixels,
    degrade,
    frame_rate_divisor,
    noise_sigma,
)
from lmm_qa.errors import MissingExtra
from lmm_qa.video.face import Box, Face

BAD_VMAF, BEST_VMAF = 20.0, 96.0

VMAF_CAUSES = ("blur", "motion_blur", "rescale", "noise", "banding", *COMPRESSION)
"""Causes that one VMAF of the whole picture judges, for some of them together with a curve."""

REGION_WEIGHT = {"defocus": 1.0, "mouth_smear": 0.8, "teeth_smear": 0.6}
"""Causes that VMAF judges on the degraded region, and the share of the region's loss that the clip loses."""

MAX_LOSS = {
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
"""Loss of quality at strength 1."""

FULL_LOSS_CHANGE = 1.0
"""Mean change, in grey levels within place and seconds, at which a degradation of strength 1 has its full loss."""

MIN_VMAF_SIDE = 32
"""Pixels; libvmaf does not accept smaller pictures."""


@dataclass(frozen=True)
class AppliedDegradation:
    """One of the degradations of a copy."""

    cause: str
    strength: float
    place: Box
    seconds: tuple[float, float]


@dataclass(frozen=True)
class DegradedCopy:
    """A degraded clip."""

    frames: Pixels
    degradations: tuple[AppliedDegradation, ...]
    """In the order in which they were applied."""
    vmaf: float | None
    """0 to 100: the lowest measured, of the whole picture or a region; None if VMAF judges none of the causes."""
    quality: float
    """0 to 1, relative to the source."""


def make_copy(
    frames: Pixels,
    degradations: Sequence[tuple[str, float]],
    seed: int = 0,
    *,
    fps: float = 25.0,
    face: Face | None = None,
    vmaf_frames: Sequence[int] | None = None,
) -> DegradedCopy:
    """Apply one or several degradations to a clip and determine the quality of the result.

    Args:
        frames: (T, H, W, 3) uint8 RGB.
        degradations: causes (keys of `DEGRADATIONS`) and strengths (0 to 1); applied in the order of `DEGRADATIONS`.
        seed: the same seed gives the same copy.
        fps: frames per second.
        face: of the clip; by default it is detected if a cause needs it.
        vmaf_frames: numbers of the frames that VMAF compares; by default all.

    Raises:
        ValueError: see `degrade`; or a cause is given twice.
        MissingExtra: imageio-ffmpeg is needed but not installed.
    """
    if len({cause for cause, _ in degradations}) < len(degradations):
        raise ValueError(f"each cause can be applied once, received {', '.join(cause for cause, _ in degradations)}")
    compared = slice(None) if vmaf_frames is None else list(vmaf_frames)
    now, quality = frames, 1.0
    applied: list[AppliedDegradation] = []
    measured: list[float] = []
    ordered = sorted(degradations, key=lambda each: list(DEGRADATIONS).index(each[0]) if each[0] in DEGRADATIONS else 0)
    for by_vmaf, group in groupby(ordered, key=lambda each: each[0] in VMAF_CAUSES):
        before, limits = now, [1.0]
        for cause, strength in group:
            after = degrade(now, cause, strength, seed, fps=fps, face=face)
            applied.append(AppliedDegradation(cause, strength, after.place, after.seconds))
            if by_vmaf:
                limits.append(_quality_limit(cause, strength))
            elif cause in REGION_WEIGHT:
                regions = (_region(each[compared], after.place) for each in (after.frames, now))
                measured.append(vmaf(*regions))
                quality *= 1 - REGION_WEIGHT[cause] * (1 - vmaf_quality(measured[-1]))
            else:
                effect = min(1.0, mean_change(now, after, fps) / (FULL_LOSS_CHANGE * strength)) if strength else 0.0
                quality *= 1 - effect * (1 - _curve_quality(cause, strength, after.seconds, fps))
            now = after.frames
        if by_vmaf:
            measured.append(vmaf(now[compared], before[compared]))
            quality *= min(vmaf_quality(measured[-1]), *limits)
    return DegradedCopy(now, tuple(applied), min(measured, default=None), quality)


def vmaf(distorted: Pixels, reference: Pixels) -> float:
    """Mean VMAF (0 to 100) of a clip against its reference, both (T, H, W, 3), from libvmaf.

    Raises:
        ValueError: the pictures are smaller than `MIN_VMAF_SIDE`.
        MissingExtra: imageio-ffmpeg is not installed.
    """
    if min(reference.shape[1:3]) < MIN_VMAF_SIDE:
        raise ValueError(
            f"VMAF needs {MIN_VMAF_SIDE} x {MIN_VMAF_SIDE} pixels, received {reference.shape[2]} x {reference.shape[1]}"
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
    """Quality (0 to 1) that corresponds to a VMAF."""
    return min(max((value - BAD_VMAF) / (BEST_VMAF - BAD_VMAF), 0.0), 1.0)


def quality_ceiling(height: int, width: int, bits_per_pixel: float, sharpness: float) -> float:
    """Quality (0 to 1) of a source without degradations.

    It is reduced by up to 0.2 for a small picture (short side from 480 down to 224 pixels) and by up to 0.15 for strong
    compression (from 0.06 bits per pixel down to an eighth of that). The rest is multiplied by a factor from 1 down to
    0.55 for a soft picture (sharpness from 0.38 down to 0.24). All figures are assumptions.

    Those of the sharpness come from looking at stills of 287 clips: below 0.32, all looked soft or were in quick motion
    or out of focus; from 0.34 up, hardly any. Thirteen sharp clips (0.47 to 0.55) that are reduced to 0.4 of their size
    and enlarged again have 0.35 on average, and VMAF leaves them a quality of 0.85; the factor is 0.90 there. Of a
    Gaussian blur with the same effect on the sharpness, VMAF takes away twice as much.

    Args:
        height: pixels.
        width: pixels.
        bits_per_pixel: of the video file, per pixel and frame.
        sharpness: see `lmm_qa.degrade.detail.edge_sharpness`.
    """
    small = min(max((480 - min(height, width)) / 256, 0.0), 1.0)
    starved = min(max(math.log2(0.06 / max(bits_per_pixel, 1e-4)) / 3, 0.0), 1.0)
    soft = min(max((0.38 - sharpness) / 0.14, 0.0), 1.0)
    return (1 - 0.2 * small - 0.15 * starved) * (1 - 0.45 * soft)


def mos(quality: float, scale: tuple[float, float]) -> float:
    """Quality (0 to 1) as a MOS on a scale (worst, best)."""
    low, high = scale
    return low + (high - low) * quality


# --- Curves ----------------------------------------------------------------------------------------------------------


def _quality_limit(cause: str, strength: float) -> float:
    """Upper limit of the quality, whatever VMAF is."""
    if cause == "noise":
        return math.exp(-noise_sigma(strength) / 30)
    return 1 - MAX_LOSS.get(cause, 0.0) * strength


def _curve_quality(cause: str, strength: float, seconds: tuple[float, float], fps: float) -> float:
    """Quality (0 to 1) of a perfect clip after one degradation that VMAF cannot judge."""
    length = seconds[1] - seconds[0]
    curves = {
        "buffering": _buffering_quality(length),
        "stall": _stall_quality(length),
        "drop": _frame_rate_quality(fps / frame_rate_divisor(strength)),
    }
    return curves[cause] if cause in curves else 1 - MAX_LOSS[cause] * strength


def _buffering_quality(seconds: float) -> float:
    """Fitted to opinions: 2.77 of 5 for one second and 2.06 for two (mean MOS of 45 clips each in the training and
    validation labels of THQA-NTIRE, `pause_start`); 3.6 is assumed without buffering.
    """
    return math.exp(-0.27 * seconds)


def _stall_quality(seconds: float) -> float:
    """Fitted to opinions: 1.91 of 5 for one second and 1.45 for two (as above, `pause_middle`)."""
    return math.pow(1 + seconds, -0.9)


def _frame_rate_quality(rate: float) -> float:
    """The inverted exponential of Ou et al. (2011), with 30 frames per second as the best rate. Its parameter depends
    on the content there; 5 is assumed here.
    """
    return (1 - math.exp(-5 * min(rate / 30, 1.0))) / (1 - math.exp(-5))


# --- Regions ---------------------------------------------------------------------------------------------------------


def _region(frames: Pixels, place: Box) -> Pixels:
    """The region of the frames, enlarged around its centre if VMAF needs more pixels."""
    spans = []
    for low, high, side in zip(place[1::-1], place[:1:-1], frames.shape[1:3], strict=True):
        width = min(max(math.ceil((high - low) * side), MIN_VMAF_SIDE), side)
        start = min(max(round((low + high) / 2 * side - width / 2), 0), side - width)
        spans.append(slice(start, start + width))
    return frames[:, spans[0], spans[1]]


def mean_change(before: Pixels, after: DegradedFrames, fps: float) -> float:
    """Mean absolute difference, in grey levels, within the place and seconds of a degradation."""
    first, stop = (round(second * fps) for second in after.seconds)
    height, width = before.shape[1:3]
    left, top, right, bottom = (round(edge * side) for edge, side in zip(after.place, (width, height) * 2, strict=True))
    window = (slice(first, stop, max(1, (stop - first) // 8)), slice(top, bottom, 2), slice(left, right, 2))
    difference = before[window].astype(np.int16) - after.frames[window]
    return float(np.abs(difference).mean()) if difference.size else 0.0
