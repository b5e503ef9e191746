"""Measured features of a clip: some 500 numbers, from which trees estimate its defects (`.classifier`).

They are measured at native resolution: on six pairs of neighbouring frames, and on all frames. Most are
logarithms. Where possible, parts of a clip are compared with each other: clips differ in more than their defects.

| features | what they measure |
| --- | --- |
| `short_side`, `face_side`, `face_found` | size of the picture and of the face |
| `step*`, `equal_runs_*`, `sharpness_*`, `bends_*` | differences between neighbouring pixels, along x and y |
| `blocks_*`, `grid_*` | block edges of an encoder: at multiples of 8 pixels, at any distance |
| `contrast_N`, `texture_N`, `fine_share_N`, `flat`, `fine_flat` | contrast and fine detail within blocks (quantiles) |
| `comb*`, `single_steps_*` | unused grey levels, and isolated steps on smooth surfaces: banding |
| `cb_*`, `cr_*` | texture of the two chroma planes |
| `light_*`, `burnt*`, `closed`, `red_*`, `blue_*`, `green_*`, ... | brightness, clipping and balance of the colours |
| `change_*`, `skipped`, `nearly_skipped` | difference between the two frames of a pair |
| `behind*`, `head*` | optical flow behind and in the head that camera motion cannot explain |
| `mouth_*_later`, `mouth_*_soon`, `face_left_*`, `mouth_nearest_*`, ... | how well parts of the face match elsewhere |
| `stiff_*`, `upper_later_*` | motion of rigid parts of the face relative to each other |
| `flow_*` | optical flow in parts of the face |
| `drift_*`, `one_way_*` | trend of the face's colours over the clip |
| `{mouth,teeth,lower,face}_*_{small,native}`, ... | detail of parts of the face relative to each other |
| `buffering`, `stall*`, `pace`, `uneven`, `flicker`, `switch*` | results of `lmm_qa.video.temporal` |
| `stands*`, `peak*`, `jumps*`, `light_spread`, `detail_*`, `quiet*`, `*_alike` | statistics of the frame dynamics |
| others | see `lmm_qa.video.measurement.motion_features` |

The classifier refers to features by name: a new name or value needs a new classifier.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import median_filter, uniform_filter

from lmm_qa.config import Sampling
from lmm_qa.video.display import UPRIGHT, Orientation
from lmm_qa.video.face import Box, Face, follow_face
from lmm_qa.video.measurement.lip_sync import LipSync, LipSyncMeter
from lmm_qa.video.measurement.motion_features import MotionFeatureRecorder, second_differences
from lmm_qa.video.sound import Sound, SoundState
from lmm_qa.video.temporal import (
    STILL_CHANGE,
    FrameDynamics,
    absolute_difference,
    buffering,
    cadence,
    flicker,
    stalls,
    switch_evidence,
    switches,
)
from lmm_qa.video.views import pad_to_minimum

Picture = NDArray[np.uint8]
Floats = NDArray[np.floating[Any]]
Features = dict[str, float]

FRAME_PAIRS = 6
"""Pairs of neighbouring frames that are measured."""

MIN_SIDE = 32
"""Smaller pictures are padded to this side, in pixels."""

MAX_SHORT_SIDE = 1080
"""Pictures with a longer short side, in pixels, are reduced by an integer factor."""

_CENTRE_SIDE = 384
"""Side in pixels of the central crop in which texture and colours are measured."""

_LUMA_WEIGHTS = np.array((0.299, 0.587, 0.114), np.float32)

_EPSILON = 1e-6

_SPECTRUM_SIZE = 1024
"""Length of the Fourier transform that looks for periodic block edges."""

_BACKGROUND_SIDE, _BACKGROUND_BLOCK = 160, 8
"""Long side in pixels of the pictures, and side of the blocks, for the optical flow of the background."""

_FACE_WINDOW = (-0.3, 1.3)
"""Start and end of the window around the face, relative to its box."""

_FACE_WINDOW_SIDE = 160
"""Pixels: 100 for the box."""

_FACE_BLOCK = 10

_FACE_PARTS: dict[str, Box] = {
    "mouth": (0.34, 0.68, 0.66, 0.92),
    "left_eye": (0.14, 0.16, 0.46, 0.40),
    "right_eye": (0.54, 0.16, 0.86, 0.40),
    "nose": (0.36, 0.38, 0.64, 0.62),
    "brow": (0.30, -0.10, 0.70, 0.14),
    "left_cheek": (0.02, 0.48, 0.28, 0.78),
    "right_cheek": (0.72, 0.48, 0.98, 0.78),
}
"""Parts that are searched for in other pairs of frames, relative to the box of the face (brows to chin)."""

_EYES_AND_NOSE = ("left_eye", "right_eye", "nose")

_RIGID_PARTS = (*_EYES_AND_NOSE, "brow", "left_cheek", "right_cheek")

_SEARCH_RADIUS = 7
"""Pixels of the window around the face."""

_DETAIL_PARTS: dict[str, Box] = {
    "upper": (0.10, 0.05, 0.90, 0.50),
    "mouth": (0.28, 0.64, 0.72, 0.94),
    "teeth": (0.32, 0.70, 0.68, 0.88),
    "lower": (0.16, 0.56, 0.84, 1.06),
    "face": (0.05, -0.10, 0.95, 1.05),
    "nose": (0.30, 0.35, 0.70, 0.65),
    "left_cheek": (-0.02, 0.50, 0.22, 0.90),
    "right_cheek": (0.78, 0.50, 1.02, 0.90),
    "brow": (0.20, -0.20, 0.80, 0.10),
}
"""Parts whose detail is compared, relative to the box of the face."""

_DETAIL_WINDOW = (-0.25, 1.25)

_SMALL_BOX, _NATIVE_BOX = 96, (48, 224)
"""Pixels of the face's box when its detail is measured: at one size for all clips; range of native sizes."""


class FeatureExtractor:
    """Measures the features of a clip while it is decoded: a `lmm_qa.video.decode.ClipMeasurement`."""

    sampling: ClassVar[Sampling] = Sampling(strategy="pairs", frames=2 * FRAME_PAIRS)

    def __init__(self, orientation: Orientation = UPRIGHT, sound: Sound | None = None) -> None:
        self._pictures: dict[int, Picture] = {}
        self._motion = MotionFeatureRecorder(orientation)
        self._sound = sound
        self._lips = LipSyncMeter(orientation) if sound and sound.state is SoundState.PRESENT else None
        self._lips_error: Exception | None = None
        self._face: Face | None = None
        self._indices: Sequence[int] = ()

    def add_frame(self, luma: Picture, second: float) -> None:
        self._motion.add_frame(luma, second)
        if self._lips and self._lips_error is None:
            try:
                self._lips.add_frame(luma, second)
            except Exception as error:  # it costs lip sync alone, see `lip_sync`
                self._lips_error = error

    def add_picture(self, index: int, picture: Picture) -> None:
        self._pictures[index] = pad_to_minimum(limit_size(picture), MIN_SIDE)

    def features(self, indices: Sequence[int], dynamics: FrameDynamics) -> Features:
        pictures = [self._pictures[index] for index in indices]
        self._face, self._indices = follow_face(pictures), indices
        return measure(pictures, self._face, indices, dynamics, self._motion)

    def lip_sync(self) -> LipSync | None:
        if self._lips_error:
            raise self._lips_error
        if self._lips is None or self._sound is None or self._face is None or not self._face.found:
            return None
        return self._lips.measure(self._face.boxes, self._indices, self._sound.samples)


def measure(
    pictures: Sequence[Picture],
    face: Face,
    indices: Sequence[int],
    dynamics: FrameDynamics,
    motion: MotionFeatureRecorder,
) -> Features:
    """Measure a clip.

    Args:
        pictures: the two frames of each pair, in order: (height, width, 3) uint8 RGB, all of one size, at least
            `MIN_SIDE` and at most `MAX_SHORT_SIDE` (see `limit_size`).
        face: in these pictures.
        indices: their frame numbers.
        dynamics: of all frames.
        motion: has recorded all frames.

    Returns:
        Features by name; the same names in the same order for every clip; all finite.
    """
    height, width = pictures[0].shape[:2]
    crops = np.stack([_centre_crop(picture) for picture in pictures])
    greys = np.stack([_to_grey(crop) for crop in crops])
    windows = np.stack(
        [
            window(picture, box, _FACE_WINDOW, _FACE_WINDOW_SIDE)
            for picture, box in zip(pictures, face.boxes, strict=True)
        ]
    )
    faces = windows.astype(np.float32) @ _LUMA_WEIGHTS
    groups: tuple[Features, ...] = (
        {
            "short_side": _log(min(height, width)),
            "face_found": float(face.found),
            "face_side": _log(float(np.median(face.boxes[:, 2] - face.boxes[:, 0])) * width),
        },
        _texture(greys[::4]),
        _banding(crops[2::4], greys[2::4]),
        _chroma(crops[::4]),
        _light(crops[::4], greys[::4]),
        _change(greys[::2], greys[1::2]),
        _background_flow(pictures, face.boxes),
        _face_matches(faces),
        _face_flow(faces),
        _colour_drift(windows[::2]),
        _face_detail(pictures[::4], face.boxes[::4]),
        _dynamics(dynamics),
        motion.coding_rhythm(),
        motion.lip_motion(face.boxes, indices),
    )
    features = {name: value for group in groups for name, value in group.items()}
    if len(features) < sum(map(len, groups)):
        raise ValueError("two features have the same name")
    return {name: float(np.nan_to_num(value, nan=0.0, posinf=0.0, neginf=0.0)) for name, value in features.items()}


def window(picture: Picture, box: Floats, extent: tuple[float, float], side: int) -> Picture:
    """Cut a square around a face and resize it to (side, side, 3); beyond the picture, its edge pixels are repeated.

    Args:
        picture: (height, width, 3).
        box: left, top, right, bottom of the face, as fractions of the picture.
        extent: start and end of the square relative to the box, in both directions.
        side: pixels.
    """
    height, width = picture.shape[:2]
    left, top, right, _ = box * (width, height, width, height)
    scale = max(float(right - left), 1.0)
    x, y, size = left + extent[0] * scale, top + extent[0] * scale, (extent[1] - extent[0]) * scale
    first_x, first_y = (math.floor(edge) for edge in (x, y))
    last_x, last_y = (math.ceil(edge + size) for edge in (x, y))
    inside = picture[
        min(max(first_y, 0), height - 1) : max(min(last_y, height), 1),
        min(max(first_x, 0), width - 1) : max(min(last_x, width), 1),
    ]
    missing = (
        (max(0, -first_y), max(0, last_y - height)),
        (max(0, -first_x), max(0, last_x - width)),
        (0, 0),
    )
    if any(map(any, missing)):
        inside = np.pad(inside, missing, mode="edge")
    image = Image.fromarray(np.ascontiguousarray(inside))
    ends = min(x - first_x + size, image.width), min(y - first_y + size, image.height)
    place = (min(x - first_x, ends[0] - 1), min(y - first_y, ends[1] - 1), *ends)
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, place, reducing_gap=2.0))


def limit_size(picture: Picture) -> Picture:
    """A picture with a short side of at most `MAX_SHORT_SIDE`: larger ones are reduced by an integer factor."""
    factor = -(-min(picture.shape[:2]) // MAX_SHORT_SIDE)
    return picture if factor == 1 else np.asarray(Image.fromarray(np.ascontiguousarray(picture)).reduce(factor))


def _centre_crop(picture: Picture) -> Picture:
    """Starts at multiples of 16, so that the blocks of an encoder keep their positions."""
    top, left = (max(0, (side - _CENTRE_SIDE) // 2) // 16 * 16 for side in picture.shape[:2])
    return picture[top : top + _CENTRE_SIDE, left : left + _CENTRE_SIDE]


def _to_grey(picture: Picture) -> Picture:
    return np.asarray(Image.fromarray(np.ascontiguousarray(picture)).convert("L"))


# --- Helpers ---------------------------------------------------------------------------------------------------------


def _log(value: float | np.floating | Floats, floor: float = _EPSILON) -> float:
    return float(np.log(float(value) + floor))


def _histogram(values: Picture) -> Floats:
    """(256,): share of each value."""
    counts = Image.fromarray(np.ascontiguousarray(values.reshape(len(values), -1))).histogram()
    return np.asarray(np.array(counts) / max(values.size, 1))


def _mean(values: Picture) -> float:
    """Exact mean of at most 16 million values."""
    return float(values.sum(dtype=np.uint32)) / max(values.size, 1)


def _share(values: NDArray[np.bool_]) -> float:
    """Share of true values."""
    return np.count_nonzero(values) / values.size


def _bin_shares(histogram: Floats, edges: Sequence[int]) -> Floats:
    return np.diff(np.concatenate([[0], np.cumsum(histogram)])[list(edges)])


def _quantiles(histogram: Floats, shares: Sequence[float] | Floats) -> Floats:
    """Grey levels below which these shares lie, interpolated within a level."""
    cumulative = np.cumsum(histogram)
    level = np.minimum(np.searchsorted(cumulative, shares), len(histogram) - 1)
    within = (np.asarray(shares) - (cumulative[level] - histogram[level])) / np.maximum(histogram[level], 1e-9)
    return np.asarray(level + np.clip(within, 0, 1) - 0.5)


def _blocks_of_rows(pictures: Picture, length: int) -> Picture:
    """(n, H, W) -> (n, H, W / length, length), without incomplete blocks."""
    count, height, width = pictures.shape
    return pictures[..., : width // length * length].reshape(count, height, -1, length)


def _block_sums(pictures: Floats, side: int) -> Floats:
    """(n, H, W) -> (n, H / side, W / side): sums of the blocks of side x side pixels, without incomplete blocks."""
    count, height, width = pictures.shape
    rows, columns = height // side, width // side
    # First over the rows of a block: adding long rows is much faster than adding the few pixels of a block.
    strips = pictures[:, : rows * side, : columns * side].reshape(count, rows, side, columns * side).sum(2)
    return np.asarray(strips.reshape(count, rows, columns, side) @ np.ones(side, pictures.dtype))


def _block_statistics(pictures: Floats) -> tuple[Floats, Floats]:
    """Mean and standard deviation of each block of 8 x 8 pixels, (n, rows, columns)."""
    mean = _block_sums(pictures, 8) / 64
    square = _block_sums(pictures * pictures, 8) / 64
    return mean, np.sqrt(np.maximum(square - mean**2, 0))


def _column_sums(pictures: Picture) -> NDArray[np.int64]:
    """(W,): sum of each column of (n, H, W) pictures, exact. Adds 16-bit numbers as long as they suffice."""
    starts = range(0, pictures.shape[1], 256)
    sums = [pictures[:, start : start + 256].sum(1, dtype=np.uint16) for start in starts]
    return np.asarray(np.sum(sums, axis=(0, 1), dtype=np.int64))


def _range(name: str, values: Floats, floor: float) -> Features:
    """Logarithms of the mean of the two lowest values, the median and the maximum over pairs of frames."""
    low = np.sort(values)[:2].mean()
    return {
        f"{name}_least": _log(low, floor),
        name: _log(np.median(values), floor),
        f"{name}_most": _log(values.max(), floor),
    }


# --- Picture, encoder and camera -------------------------------------------------------------------------------------


def _texture(greys: Picture) -> Features:
    """Differences between neighbouring pixels, block edges and flat parts of (n, H, W) pictures."""
    features: Features = {}
    levels = np.arange(256)
    for axis, pictures in (("x", greys), ("y", np.ascontiguousarray(greys.transpose(0, 2, 1)))):
        steps, steps_2, steps_4 = (
            absolute_difference(pictures[..., distance:], pictures[..., :-distance]) for distance in (1, 2, 4)
        )
        histogram, histogram_4 = _histogram(steps), _histogram(steps_4)
        step, step_2, step_4 = (
            _log(mean, 0.05) for mean in (float(histogram @ levels), _mean(steps_2), float(histogram_4 @ levels))
        )
        features[f"step_{axis}"] = step
        features[f"step_2_{axis}"] = step_2 - step
        features[f"step_4_{axis}"] = step_4 - step_2
        shares = _bin_shares(histogram, (0, 1, 2, 4, 8, 16, 32, 256))
        for lowest, share in zip((0, 1, 2, 4, 8, 16, 32), shares, strict=True):
            features[f"steps_from_{lowest}_{axis}"] = _log(share, 1e-4)
        equal = steps == 0
        equal_runs = _share(equal[..., 1:] & equal[..., :-1])
        features[f"equal_runs_{axis}"] = _log(equal_runs, 1e-3) - _log(shares[0], 1e-3)
        features[f"sharpness_{axis}"] = _sharpness(steps, steps_4, int(_quantiles(histogram_4, [0.97])[0]))
        bends = absolute_difference(steps[..., 1:], steps[..., :-1])
        features[f"bends_{axis}"] = _log(_mean(bends), 0.05) - step
        columns = np.log(_column_sums(steps) / (steps.shape[0] * steps.shape[1]) + 0.05)
        eights = columns[: len(columns) // 8 * 8].reshape(-1, 8)
        phase = np.median(eights - eights.mean(1, keepdims=True), axis=0)
        phase -= np.median(phase)
        features[f"blocks_8_{axis}"] = phase[7]
        features[f"blocks_4_{axis}"] = phase[3]
        features[f"blocks_any_{axis}"] = phase.max()
        features[f"blocks_spread_{axis}"] = phase.std()
        features |= _grid("step", axis, steps)
        features |= _grid("bend", axis, second_differences(pictures))
    values = greys.astype(np.float32)
    neighbours = (values[:, :-2, 1:-1] + values[:, 2:, 1:-1] + values[:, 1:-1, :-2] + values[:, 1:-1, 2:]) / 4
    coarse, fine = (_block_statistics(each)[1].ravel() for each in (values, values[:, 1:-1, 1:-1] - neighbours))
    shares_of = (5, 25, 50, 75, 95)
    for share, low, high in zip(
        shares_of, np.percentile(coarse, shares_of), np.percentile(fine, shares_of), strict=True
    ):
        features[f"contrast_{share}"] = _log(low, 0.1)
        features[f"texture_{share}"] = _log(high, 0.05)
    features["flat"] = _log((coarse < 0.6).mean(), 1e-3)
    features["fine_flat"] = _log((fine < 0.3).mean(), 1e-3)
    for share in (5, 50, 95):
        features[f"fine_share_{share}"] = features[f"texture_{share}"] - features[f"contrast_{share}"]
    return features


def _sharpness(steps: Picture, steps_4: Picture, threshold: int) -> float:
    """How much of a strong edge over four pixels happens within one pixel; a sample of the edges."""
    found = np.flatnonzero(steps_4 >= max(12, threshold))
    edges = np.unravel_index(found[:: len(found) // 4000 + 1], steps_4.shape)
    if not found.size:
        return -0.5
    largest = np.max([steps[edges[0], edges[1], edges[2] + offset] for offset in range(4)], axis=0)
    return _log(largest.mean() / steps_4[edges].mean(), 0.01)


def _grid(kind: str, axis: str, values: NDArray[Any]) -> Features:
    """Whether steps or bends along rows repeat at a fixed distance: blocks of an encoder, also resized ones."""
    count = np.float32(values.shape[0] * values.shape[1])
    columns = np.log(_column_sums(np.minimum(values, 12).astype(np.uint8)).astype(np.float32) / count + 0.05)
    residual = columns - median_filter(columns, 15, mode="nearest")
    spectrum = np.abs(np.fft.rfft(residual * np.hanning(len(columns)), _SPECTRUM_SIZE))
    searched = spectrum[_SPECTRUM_SIZE // 64 : _SPECTRUM_SIZE // 3]
    usual = np.median(searched) + 1e-9
    features = {f"grid_{kind}_{axis}": _log(searched.max() / usual, 0.1)}
    for period in (4, 8, 16):
        place = _SPECTRUM_SIZE // period
        features[f"grid_{kind}_{period}_{axis}"] = _log(spectrum[place - 1 : place + 2].max() / usual, 0.1)
    return features


def _banding(colours: Picture, greys: Picture) -> Features:
    """Values that the histogram leaves out, and single steps on surfaces that are flat otherwise."""
    combs, periods = [], []
    for channel in range(3):
        histogram = _histogram(colours[..., channel])[4:252]
        smooth = np.convolve(histogram, np.ones(9) / 9, "same")
        combs.append(float(np.abs(histogram - smooth).sum() / (smooth.sum() + 1e-9)))
        residual = (histogram - np.convolve(histogram, np.ones(31) / 31, "same")) / np.sqrt(smooth + 1e-4)
        spectrum = np.abs(np.fft.rfft(residual * np.hanning(len(residual))))[9:110]
        periods.append(float(spectrum.max() / (np.median(spectrum) + 1e-9)))
    grey = _histogram(greys)[4:252]
    smooth = np.convolve(grey, np.ones(9) / 9, "same")
    features = {
        "comb": _log(np.mean(combs), 0.01),
        "comb_least": _log(np.min(combs), 0.01),
        "comb_grey": _log(np.abs(grey - smooth).sum() / (smooth.sum() + 1e-9), 0.01),
        "comb_period": _log(np.mean(periods), 0.1),
        "comb_period_least": _log(np.min(periods), 0.1),
    }
    red, green, blue = np.moveaxis(absolute_difference(colours[:, ::3, 1:], colours[:, ::3, :-1]), -1, 0)
    steps = np.maximum(np.maximum(red, green), blue)
    nines = np.ascontiguousarray(np.moveaxis(_blocks_of_rows(steps, 9), -1, 0))
    largest = nines.max(0).astype(np.int16)
    total = nines.sum(0, dtype=np.int16)
    rest = total - largest
    for name, limit, lowest, share in (("small", 40, 3, 0.0), ("some", 40, 6, 0.5), ("large", 90, 10, 0.6)):
        smooth_runs = total <= limit
        single = smooth_runs & (largest >= lowest) & (rest <= np.maximum(2, share * largest))
        features[f"single_steps_{name}"] = _log(single.sum() / (smooth_runs.sum() + 1), 1e-3)
    return features


def _chroma(colours: Picture) -> Features:
    """Texture of the two chroma planes, which encoders compress most, relative to that of the luma plane."""
    features: Features = {}
    planes = [Image.fromarray(picture).convert("YCbCr") for picture in colours]
    halves = np.stack([np.asarray(plane.reduce(2)) for plane in planes])
    luma = _block_statistics(halves[..., 0].astype(np.float32))[1].ravel()
    textured = luma >= np.percentile(luma, 70)
    for name, channel in (("cb", 1), ("cr", 2)):
        plane = np.ascontiguousarray(halves[..., channel])
        for distance in (1, 2, 4):
            steps = absolute_difference(plane[..., distance:], plane[..., :-distance])
            features[f"{name}_step_{distance}"] = _log(_mean(steps), 0.02)
            features[f"{name}_equal_{distance}"] = _log(_share(steps == 0), 0.01)
        chroma = _block_statistics(plane.astype(np.float32))[1].ravel()
        for share, value in zip((10, 50, 90), np.percentile(chroma, (10, 50, 90)), strict=True):
            features[f"{name}_contrast_{share}"] = _log(value, 0.05)
        features[f"{name}_to_grey"] = _log(np.median(chroma), 0.05) - _log(np.median(luma), 0.1)
        features[f"{name}_to_grey_textured"] = _log(chroma[textured].mean(), 0.05) - _log(luma[textured].mean(), 0.1)
    return features


def _light(colours: Picture, greys: Picture) -> Features:
    """Distribution of the brightness, clipped pixels, and balance of the colour channels."""
    features: Features = {}
    histogram, levels = _histogram(greys), np.arange(256)
    shares = (0.5, 5, 25, 50, 75, 95, 99.5)
    for share, level in zip(shares, _quantiles(histogram, np.array(shares) / 100), strict=True):
        features[f"light_{share:g}"] = level / 64
    mean = histogram @ levels
    features["burnt"] = _log(histogram[248:].sum(), 1e-3)
    features["closed"] = _log(histogram[:9].sum(), 1e-3)
    features["contrast"] = _log(np.sqrt(np.maximum(histogram @ levels**2 - mean**2, 0)), 1)
    pixels = colours[:, ::4, ::4].reshape(-1, 3).astype(np.float32)
    low, median, high, top = np.percentile(pixels, (1, 50, 95, 99.7), axis=0)
    sums = pixels.sum(1)
    white = pixels[sums >= np.percentile(sums, 97)].mean(0)
    for name, colour in (("median", median), ("high", high), ("top", top), ("mean", pixels.mean(0)), ("white", white)):
        red, green, blue = np.log(np.asarray(colour) + 2)
        features[f"red_{name}"] = red - green
        features[f"blue_{name}"] = blue - green
        features[f"red_off_{name}"] = abs(red - green)
        features[f"blue_off_{name}"] = abs(blue - green)
        features[f"red_to_blue_{name}"] = abs(red - blue)
        features[f"green_off_{name}"] = abs(red + blue - 2 * green)
    highest = pixels.max(1)
    chroma = highest - pixels.min(1)
    features["neutral"] = _log((chroma < 0.08 * (highest + 20)).mean(), 0.01)
    features["saturation"] = _log((chroma / (highest + 10)).mean(), 0.01)
    for name, value in zip(("red", "green", "blue"), top / 64, strict=True):
        features[f"most_{name}"] = value
    features["least_to_most"] = (top.min() - top.max()) / 64
    clipped = (pixels >= 253).mean(0)
    features["burnt_most"] = _log(clipped.max(), 1e-3)
    features["burnt_least"] = _log(clipped.min(), 1e-3)
    dark = pixels[sums <= np.percentile(sums, 5)].mean(0)
    features["dark_colour"] = _log(dark.max() - dark.min(), 1)
    features["dark_level"] = _log(low.max(), 1)
    return features


def _change(first: Picture, second: Picture) -> Features:
    """Difference between the two frames of each pair: noise, blocks that the encoder skipped, brightness."""
    shares = _bin_shares(_histogram(absolute_difference(first, second)), (0, 1, 2, 4, 8, 16, 256))
    lowest = (0, 1, 2, 4, 8, 16)
    features = {f"change_from_{least}": _log(share, 1e-4) for least, share in zip(lowest, shares, strict=True)}
    mean, deviation = _block_statistics(second.astype(np.float32) - first)
    square = mean**2 + deviation**2
    features["skipped"] = _log((square == 0).mean(), 1e-3)
    features["nearly_skipped"] = _log((square < 0.2).mean(), 1e-3)
    for share, value in zip((5, 25, 50, 90), np.percentile(deviation, (5, 25, 50, 90)), strict=True):
        features[f"change_of_blocks_{share}"] = _log(value, 0.05)
    brightness = np.abs(mean.mean((1, 2)))
    features["change_of_light"] = _log(np.median(brightness), 0.05)
    features["change_of_light_most"] = _log(brightness.max(), 0.05)
    features["change_least"] = _log(np.sort(np.sqrt(square.mean((1, 2))))[:2].mean(), 0.02)
    features["change_spread"] = features["change_of_blocks_25"] - features["change_of_blocks_90"]
    return features


# --- Motion ----------------------------------------------------------------------------------------------------------


def _optical_flow(first: Floats, second: Floats, side: int) -> tuple[Floats, Floats, Floats]:
    """Optical flow of blocks (Lucas and Kanade, 1981); `skimage.registration` has it by the pixel, 100 times slower.

    Returns:
        Motion of each block, right and down in pixels, and its texture; each (n, rows, columns).
    """
    middle = (first + second) / 2
    across, down = np.zeros_like(middle), np.zeros_like(middle)
    across[..., 1:-1] = (middle[..., 2:] - middle[..., :-2]) / 2
    down[:, 1:-1] = (middle[:, 2:] - middle[:, :-2]) / 2
    change = second - first

    xx, yy, xy, xt, yt = (
        _block_sums(product, side)
        for product in (across * across, down * down, across * down, across * change, down * change)
    )
    damping = 2.0 * side**2
    determinant = (xx + damping) * (yy + damping) - xy**2
    right = -((yy + damping) * xt - xy * yt) / determinant
    return right, -((xx + damping) * yt - xy * xt) / determinant, (xx + yy) / side**2


def _affine_residual(right: Floats, down: Floats, weight: Floats, x: Floats, y: Floats) -> tuple[float, float]:
    """Weighted root mean square of a flow field, before and after its best affine fit is subtracted."""
    total = float(weight.sum())
    if total < _EPSILON:
        return 0.0, 0.0
    system = np.stack([np.ones_like(x), x, y], axis=-1).reshape(-1, 3)
    weights = weight.ravel()
    normal = (system * weights[:, None]).T @ system + 1e-6 * np.eye(3)
    before = after = 0.0
    for flow in (right.ravel(), down.ravel()):
        residual = flow - system @ np.linalg.solve(normal, system.T @ (weights * flow))
        before, after = before + float(weights @ flow**2), after + float(weights @ residual**2)
    return float(np.sqrt(before / total)), float(np.sqrt(after / total))


def _centres(count: int, side: int, length: int) -> Floats:
    """Centres of `count` blocks of a side, relative to a length."""
    return (np.arange(count) + 0.5) * side / length


def _background_flow(pictures: Sequence[Picture], boxes: Floats) -> Features:
    """Optical flow of the background, and in the head, that no affine motion explains: a solid wall does not bend."""
    height, width = pictures[0].shape[:2]
    scale = _BACKGROUND_SIDE / max(height, width)
    size = max(2 * _BACKGROUND_BLOCK, round(width * scale)), max(2 * _BACKGROUND_BLOCK, round(height * scale))
    resized = [
        Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0) for picture in pictures
    ]
    small = np.stack([np.asarray(image.convert("L"), np.float32) for image in resized])
    right, down, texture = _optical_flow(small[::2], small[1::2], _BACKGROUND_BLOCK)
    x, y = np.meshgrid(
        _centres(right.shape[2], _BACKGROUND_BLOCK, size[0]), _centres(right.shape[1], _BACKGROUND_BLOCK, size[1])
    )
    weight = texture / (texture + 8)
    flows: dict[str, list[float]] = {name: [] for name in ("behind_raw", "behind", "head_raw", "head")}
    fields, textures = [], []
    for pair, box in enumerate(boxes[::2]):
        across, along = (x - box[0]) / (box[2] - box[0]), (y - box[1]) / (box[3] - box[1])
        head = np.hypot((across - 0.5) * 2 / 1.55, (along - 0.375) * 2 / 1.95)
        body = np.where(along > 0.9, abs(across - 0.5) * 2 / (1.5 + 1.6 * np.clip(along - 0.9, 0, 1.5)), 9)
        behind = np.minimum(head, body) > 1.05
        for name, part in (("behind", behind), ("head", ~behind & (along < 1))):
            used = np.where(part, weight[pair], 0)
            raw, residual = _affine_residual(right[pair], down[pair], used, x - 0.5, y - 0.5)
            flows[f"{name}_raw"].append(raw)
            flows[name].append(residual)
        textures.append(float(np.where(behind, weight[pair], 0).mean()))
        fields.append(np.stack([right[pair] * behind, down[pair] * behind]).ravel())
    features: Features = {}
    for name, values in flows.items():
        features |= _range(name, np.array(values), 0.01)
    features["behind_texture"] = _log(np.mean(textures), 0.01)
    features["behind_to_head"] = features["behind"] - features["head"]
    features["behind_bends"] = features["behind"] - features["behind_raw"]
    field = np.array(fields) / (np.linalg.norm(fields, axis=1, keepdims=True) + _EPSILON)
    similarity = (field @ field.T)[np.triu_indices(FRAME_PAIRS, 1)]
    features["behind_alike"] = similarity.mean()
    features["behind_alike_least"] = similarity.min()
    return features


def _face_matches(faces: Floats) -> Features:
    """How well parts of the face match in other pairs of frames (later) and within a pair (soon), and where."""
    between = [(2 * one, 2 * other) for one, other in combinations(range(FRAME_PAIRS), 2)]
    pairs = between + [(2 * pair, 2 * pair + 1) for pair in range(FRAME_PAIRS)]
    left, relative, place = {}, {}, {}
    for name, part in _FACE_PARTS.items():
        left[name], relative[name], place[name] = _match(faces, pairs, part)
    later, soon = slice(0, len(between)), slice(len(between), None)
    rigid = np.mean([left[name] for name in (*_EYES_AND_NOSE, "brow")], axis=0)
    rigid_relative = np.mean([relative[name] for name in _EYES_AND_NOSE], axis=0)
    features: Features = {}
    for kind, mouth, rest in (("left", left["mouth"], rigid), ("relative", relative["mouth"], rigid_relative)):
        for when, which in (("later", later), ("soon", soon)):
            for part_name, values in (("mouth", mouth), ("mouth_to_face", mouth - rest)):
                name, ordered = f"{part_name}_{kind}_{when}", np.sort(values[which])
                features[f"{name}_first"] = float(ordered[0])
                features[f"{name}_least"] = float(ordered[:3].mean())
                features[name] = float(np.median(ordered))
                features[f"{name}_most"] = float(ordered[-3:].mean())
    features["mouth_gap"] = features["mouth_left_later"] - features["mouth_left_later_first"]
    features["face_left_later"] = np.median(rigid[later])
    features["face_left_soon"] = np.median(rigid[soon])
    features["face_left_least"] = rigid[later].min()
    features["mouth_moves"] = _log(np.median(np.hypot(*place["mouth"][later].T)), 0.2)
    table = np.full((FRAME_PAIRS, FRAME_PAIRS), np.inf)
    for (one, other), value in zip(between, left["mouth"][later], strict=True):
        table[one // 2, other // 2] = table[other // 2, one // 2] = value
    nearest = np.sort(table.min(1))
    for rank in (0, 2, 4):
        features[f"mouth_nearest_{rank}"] = float(nearest[rank])
    features["mouth_alike"] = (left["mouth"][later] < np.median(left["mouth"][soon]) - 0.3).mean()
    features["mouth_alike_to_face"] = (left["mouth"][later] < rigid[later] - 1).mean()
    distance = np.array([(other - one) / 2 for one, other in between])
    for rank, value in enumerate(np.sort((left["mouth"] - rigid)[later][distance == 1])[:3]):
        features[f"mouth_next_{rank}"] = value
    features["face_changes"] = np.polyfit(distance, np.mean([left[name] for name in _RIGID_PARTS], axis=0)[later], 1)[0]
    for group, names, which in (
        ("stiff_soon", _RIGID_PARTS, soon),
        ("stiff_later", _RIGID_PARTS, later),
        ("upper_later", _EYES_AND_NOSE, later),
    ):
        features |= _deformation(group, {name: place[name][which] for name in names})
    return features


def _match(faces: Floats, pairs: Sequence[tuple[int, int]], part: Box) -> tuple[Floats, Floats, Floats]:
    """Search for a part of one picture in another, for each pair, by the smallest squared zero-mean difference.

    `skimage.feature.match_template` gives correlations, not differences, and is 40 times slower.

    Returns:
        Logarithm of the mean squared difference at the best place, (pairs,); the same relative to the variance of the
        part, (pairs,); and the displacement, (pairs, 2), right and down in pixels, with fractions.
    """
    scale = _FACE_WINDOW_SIDE / (_FACE_WINDOW[1] - _FACE_WINDOW[0])
    x, y, stop_x, stop_y = (round((edge - _FACE_WINDOW[0]) * scale) for edge in part)
    (ones, one), (others, other) = (np.unique(side, return_inverse=True) for side in zip(*pairs, strict=True))
    template = faces[ones, y:stop_y, x:stop_x]
    template = template - template.mean((1, 2), keepdims=True)
    radius, span = _SEARCH_RADIUS, 2 * _SEARCH_RADIUS + 1
    field = faces[others, y - radius : stop_y + radius, x - radius : stop_x + radius]
    count, (height, width) = len(pairs), template.shape[1:]
    shape = field.shape[1:]
    products = np.fft.irfft2(np.fft.rfft2(template, shape).conj()[one] * np.fft.rfft2(field, shape)[other], shape)
    moments = uniform_filter(np.stack([field, field**2]).astype(np.float64), (1, 1, height, width))
    mean, square = moments[:, other, height // 2 :, width // 2 :][..., :span, :span]
    variance = (template**2).mean((1, 2))[one]
    error = variance[:, None, None] + square - mean**2 - 2 * products[:, :span, :span] / (height * width)
    row, column = np.divmod(error.reshape(count, -1).argmin(1), span)
    each = np.arange(count)
    lowest = error[each, row, column]

    def parabola(before: Floats, after: Floats) -> tuple[Floats, Floats]:
        """Offset and depth of the vertex of a parabola through the lowest error and its two neighbours."""
        curvature = np.maximum(before + after - 2 * lowest, 1e-3)
        return (before - after) / (2 * curvature), (before - after) ** 2 / (8 * curvature)

    inner_row, inner_column = np.clip(row, 1, span - 2), np.clip(column, 1, span - 2)
    offset_y, depth_y = parabola(error[each, inner_row - 1, column], error[each, inner_row + 1, column])
    offset_x, depth_x = parabola(error[each, row, inner_column - 1], error[each, row, inner_column + 1])
    left = np.log(np.maximum(lowest - depth_x - depth_y, 0.02) + 0.3)
    place = np.stack([column - radius + np.clip(offset_x, -1, 1), row - radius + np.clip(offset_y, -1, 1)], axis=1)
    return left, left - np.log(variance + 4), place


def _deformation(group: str, displacements: dict[str, Floats]) -> Features:
    """Motion of parts of the face relative to each other, beyond a common shift, zoom and rotation."""
    boxes = np.array([_FACE_PARTS[name] for name in displacements])
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    centres = centres - centres.mean(0)
    shift = np.stack([*displacements.values()], axis=1)
    shift = shift - shift.mean(1, keepdims=True)
    size = (centres**2).sum()
    zoom = (shift * centres).sum((1, 2)) / size
    turn = (shift[..., 1] * centres[:, 0] - shift[..., 0] * centres[:, 1]).sum(1) / size
    perpendicular = np.stack([-centres[:, 1], centres[:, 0]], axis=1)
    residual = shift - zoom[:, None, None] * centres - turn[:, None, None] * perpendicular
    return {
        **_range(f"{group}_bends", np.sqrt((residual**2).sum((1, 2)) / len(displacements)), 0.05),
        f"{group}_zooms": _log(np.median(abs(zoom)), 0.02),
        f"{group}_turns": _log(np.median(abs(turn)), 0.02),
        f"{group}_moves": _log(np.median(np.hypot(*displacements["nose"].T)), 0.05),
    }


def _face_flow(faces: Floats) -> Features:
    """Optical flow within the pairs of frames, in parts of the face and beside it."""
    right, down, texture = _optical_flow(faces[::2], faces[1::2], _FACE_BLOCK)
    x, y = _window_grid(right.shape[1], _FACE_BLOCK)
    regions = {
        "upper": (np.hypot((x - 0.5) / 0.5, (y - 0.35) / 0.5) < 1) & (y < 0.62),
        "lower": np.hypot((x - 0.5) / 0.4, (y - 0.8) / 0.3) < 1,
        "whole": np.hypot((x - 0.5) / 0.5, (y - 0.45) / 0.62) < 1,
        "beside": np.hypot((x - 0.5) / 0.62, (y - 0.4) / 0.8) >= 1,
    }
    weight = texture / (texture + 8)
    features: Features = {}
    for name, region in regions.items():
        flows = np.array(
            [
                _affine_residual(right[pair], down[pair], np.where(region, weight[pair], 0), x - 0.5, y - 0.5)
                for pair in range(FRAME_PAIRS)
            ]
        )
        features |= _range(f"flow_{name}_raw", flows[:, 0], 0.01)
        features |= _range(f"flow_{name}", flows[:, 1], 0.01)
    features["flow_bends"] = features["flow_upper"] - features["flow_upper_raw"]
    features["flow_lower_to_upper"] = features["flow_lower"] - features["flow_upper"]
    return features


def _window_grid(count: int, side: int) -> tuple[Floats, Floats]:
    """x and y, (count, count) each, of the centres of blocks in the face window, relative to the box of the face."""
    start, stop = _FACE_WINDOW
    centres = start + _centres(count, side, _FACE_WINDOW_SIDE) * (stop - start)
    x, y = np.meshgrid(centres, centres)
    return x, y


# --- Face ------------------------------------------------------------------------------------------------------------


def _colour_drift(windows: Picture) -> Features:
    """Whether the colours of the face change steadily over the clip while those beside it do not."""
    pixels = windows[:, ::4, ::4].astype(np.float32)
    x, y = _window_grid(pixels.shape[1], 4)
    inside = np.hypot((x - 0.5) / 0.36, (y - 0.45) / 0.5) < 1
    outside = np.hypot((x - 0.5) / 0.75, (y - 0.4) / 0.95) >= 1
    upper, face, beside = (pixels[:, region].mean(1) for region in (inside & (y < 0.6), inside, outside))
    time = np.arange(FRAME_PAIRS) - (FRAME_PAIRS - 1) / 2

    def trend(colours: Floats) -> Floats:
        """(3,): change over the clip by linear regression."""
        return np.asarray((FRAME_PAIRS - 1) * (time @ colours) / (time @ time))

    features: Features = {}
    for name, colours in (("upper", upper), ("face", face), ("face_to_beside", upper - beside)):
        change = trend(colours)
        residual = np.sqrt(((colours - colours.mean(0) - time[:, None] * change / (FRAME_PAIRS - 1)) ** 2).mean())
        features[f"drift_{name}"] = _log(np.linalg.norm(change), 0.3)
        features[f"drift_hue_{name}"] = _log(np.linalg.norm(change - change.mean()), 0.3)
        for kind in ("drift", "drift_hue"):
            features[f"{kind}_steady_{name}"] = features[f"{kind}_{name}"] - _log(residual, 0.3)
        steps = np.diff(colours - colours.mean(1, keepdims=True), axis=0)
        features[f"one_way_{name}"] = np.linalg.norm(steps.sum(0)) / (np.linalg.norm(steps, axis=1).sum() + 0.3)
    features["drift_beside"] = _log(np.linalg.norm(trend(beside)), 0.3)
    return features


def _face_detail(pictures: Sequence[Picture], boxes: Floats) -> Features:
    """Detail of parts of the face relative to each other: at one size for all clips, and near the native size."""
    face_side = float(np.median(boxes[:, 2] - boxes[:, 0])) * pictures[0].shape[1]
    features: Features = {}
    for size, box_side in (("small", _SMALL_BOX), ("native", int(np.clip(face_side, *_NATIVE_BOX)))):
        side = int(box_side * (_DETAIL_WINDOW[1] - _DETAIL_WINDOW[0]))
        greys = [
            _to_grey(window(picture, box, _DETAIL_WINDOW, side)) for picture, box in zip(pictures, boxes, strict=True)
        ]
        detail = _detail_by_part(np.stack(greys).astype(np.float32), box_side)
        upper, nose, beside = detail["upper"], detail["nose"], detail["beside"]
        cheeks = (detail["left_cheek"] + detail["right_cheek"] + detail["brow"]) / 3
        mouth, teeth, lower = detail["mouth"], detail["teeth"], detail["lower"]
        for name in ("mouth", "teeth", "lower", "face"):
            part, reference = detail[name], beside if name == "face" else upper
            for kind, value in zip(("across", "down", "fine", "fine_low", "fine_high"), part - reference, strict=True):
                features[f"{name}_{kind}_{size}"] = value
            features[f"{name}_across_to_down_{size}"] = part[0] - part[1]
            features[f"{name}_fineness_{size}"] = part[2] - part[0]
            features[f"{name}_fineness_to_upper_{size}"] = part[2] - part[0] - (upper[2] - upper[0])
            features[f"{name}_fine_to_nose_{size}"] = part[2] - nose[2]
            features[f"{name}_fine_spread_{size}"] = part[4] - part[3]
        features[f"lower_floor_{size}"] = lower[3] - cheeks[3]
        features[f"mouth_floor_{size}"] = mouth[3] - cheeks[3]
        features[f"teeth_to_mouth_{size}"] = teeth[2] - mouth[2]
        features[f"teeth_to_lower_{size}"] = teeth[0] - lower[0]
        features[f"upper_{size}"] = upper[2]
        features[f"upper_fineness_{size}"] = upper[2] - upper[0]
        features[f"cheeks_to_lower_{size}"] = cheeks[2] - lower[2]
        features[f"mouth_{size}"] = mouth[2]
    return features


def _detail_by_part(greys: Floats, box_side: int) -> dict[str, Floats]:
    """Detail of each part, and beside the face, as `_mean_detail` summarises it, in (n, side, side) windows."""
    centre = greys[:, 1:-1, 1:-1]
    left, right, above, below = greys[:, 1:-1, :-2], greys[:, 1:-1, 2:], greys[:, :-2, 1:-1], greys[:, 2:, 1:-1]
    maps = (abs(right - left) / 2, abs(below - above) / 2, abs(4 * centre - left - right - above - below) / 4)
    detail: dict[str, Floats] = {}
    for name, part in _DETAIL_PARTS.items():
        x, y, stop_x, stop_y = (int((edge - _DETAIL_WINDOW[0]) * box_side) for edge in part)
        detail[name] = _mean_detail(*(each[:, y:stop_y, x:stop_x] for each in maps))
    beside = np.ones(centre.shape[1:], bool)
    beside[int(0.05 * box_side) : int(1.4 * box_side), int(0.1 * box_side) : int(1.4 * box_side)] = False
    detail["beside"] = _mean_detail(*(each[:, beside] for each in maps))
    return detail


def _mean_detail(across: Floats, down: Floats, fine: Floats) -> Floats:
    """(5,): logarithms of the means of the three maps and of two quantiles of the last; medians over the pictures."""
    across, down, fine = (each.reshape(len(each), -1) for each in (across, down, fine))
    low, high = fine.shape[1] // 4, 9 * fine.shape[1] // 10
    ordered = np.partition(fine, (low, high), axis=1)
    columns = across.mean(1), down.mean(1), fine.mean(1), ordered[:, low], ordered[:, high]
    return np.asarray(np.log(np.median(np.stack(columns, axis=1), axis=0) + 0.05), dtype=np.float64)


# --- Time ------------------------------------------------------------------------------------------------------------


def _dynamics(dynamics: FrameDynamics) -> Features:
    """Results of `lmm_qa.video.temporal`, and statistics of the frame dynamics that they come from."""
    first = buffering(dynamics)
    stalled = [stop - start for start, stop in stalls(dynamics)]
    rhythm = cadence(dynamics)
    evidence = switch_evidence(dynamics)
    peak = _after_first(dynamics.peak_change)
    moving = peak[peak >= STILL_CHANGE] if (peak >= STILL_CHANGE).any() else np.zeros(1, np.float32)
    nearly_still = max(STILL_CHANGE * (moving.max() < STILL_CHANGE), 0.15 * float(np.median(moving)))
    light, detail = np.log(dynamics.brightness + 1), np.log(dynamics.detail + 0.05)
    jumps, steps = (abs(np.diff(values)) if len(values) > 1 else np.zeros(1) for values in (light, detail))
    quiet = _after_first(dynamics.background_change)
    log_peak = np.log(peak + 0.05)
    centred = log_peak - log_peak.mean()
    repeats = [
        float((centred[lag:] * centred[:-lag]).mean() / (centred.var() + _EPSILON)) if len(centred) > lag + 2 else 0.0
        for lag in range(1, 7)
    ]
    return {
        "buffering": _log(first[1] - first[0] if first else 0.0, 0.04),
        "stall": _log(max(stalled, default=0.0), 0.04),
        "stalls": _log(sum(stalled), 0.04),
        "pace": _log(min(rhythm.rate, 40.0), 1),
        "uneven": _log(rhythm.unevenness, 0.02),
        "flicker": _log(flicker(dynamics), 2e-4),
        "switch_up": _log(max(evidence.max(), 0.0), 0.005),
        "switch_down": _log(max(-evidence.min(), 0.0), 0.005),
        "switched": _log(sum(stop - start for start, stop in switches(dynamics, evidence=evidence)), 0.1),
        "switched_share": sum(stop - start for start, stop in switches(dynamics, 0, evidence)) / dynamics.duration,
        "stands": _log((peak < STILL_CHANGE).mean(), 0.01),
        "stands_beside": _log((peak < nearly_still).mean(), 0.01),
        "peak_spread": _log(np.log(moving + 0.1).std(), 0.05),
        "peak": _log(np.median(moving), 0.1),
        "peak_most": _log(np.quantile(moving, 0.95), 0.1) - _log(np.median(moving), 0.1),
        "jumps": _log(np.median(jumps), 2e-4),
        "jumps_most": _log(np.quantile(jumps, 0.9), 2e-4),
        "light_spread": _log(light.std(), 1e-3),
        "detail_spread": _log(detail.std(), 0.005),
        "detail_range": _log(np.quantile(detail, 0.95) - np.quantile(detail, 0.05), 0.005),
        "detail_jumps": _log(np.median(steps), 1e-3),
        "detail_jumps_most": _log(np.quantile(steps, 0.9), 1e-3),
        "quiet": _log(np.median(quiet), 0.02),
        "quiet_least": _log(np.quantile(quiet, 0.1), 0.02),
        "quiet_most": _log(np.quantile(quiet, 0.95), 0.02) - _log(np.median(quiet), 0.02),
        "next_alike": repeats[0],
        "later_alike": max(repeats[1:]),
    }


def _after_first(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The changes since the previous frame; the first frame has none."""
    return values[1:] if len(values) > 1 else np.zeros(1, np.float32)
