"""What shows of defects in the pictures of a clip: some 500 numbers, for `lmm_qa.defects.classifier` to defect_log_odds.

The model looks at a dozen small pictures; the decoder passes every one, at native resolution. Here six moments of two
close pictures each are measured where they lie ready: the texture and the block edges of the encoder, the levels that a
histogram uses, light and colours; how the two pictures of a moment differ; and, about the face, the detail of its parts
beside each other, how well a part is found again at another moment (what stands still is found to the grey level), by
how much the parts move against each other, and where the colours of the face go; behind it, flow that no camera makes.
What `lmm_qa.video.temporal` and `lmm_qa.defects.motion_features` know of all frames is added. A clip is compared with itself wherever that can
be done, since clips differ by more than defects do.

Knows nothing of files, models or weights. Most numbers are logarithms; a name says what each is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lmm_qa.config import Sampling
from lmm_qa.defects.motion_features import MotionFeatureRecorder, running_median
from lmm_qa.video.face import Box, follow_face
from lmm_qa.video.temporal import STANDS, FrameDynamics, apart, buffering, flicker, pace, stalls, switches, switching
from lmm_qa.video.views import pad_to_minimum

Picture = NDArray[np.uint8]


Floats = NDArray[np.floating[Any]]


Features = dict[str, float]


MOMENTS = 6


"""Two pictures each: `Sampling(strategy="pairs", frames=12)`."""


MIDDLE = 384


"""Side in pixels of the part about the middle in which texture and colours are measured, at native resolution."""


MOST = 1080


"""Pixels: a picture of a longer short side is reduced by a whole number before it is measured."""


MIN_SIDE = 32


"""Pixels a side to which a tiny picture is extended before it is measured."""


_WAVES = 1024


"""Frequencies, and their mirror images, in which a grid is looked for."""


_SMALL, _BLOCK = 160, 8


"""Long side of the pictures in which what is behind the head is followed, and of the blocks there."""


_AROUND = (-0.3, 1.3)


"""The window about the face, in sides of its box."""


_FACE_SIDE = 160


"""Pixels of that window: 100 for the box."""


_FACE_BLOCK = 10


_PARTS: dict[str, Box] = {
    "mouth": (0.34, 0.68, 0.66, 0.92),
    "left_eye": (0.14, 0.16, 0.46, 0.40),
    "right_eye": (0.54, 0.16, 0.86, 0.40),
    "nose": (0.36, 0.38, 0.64, 0.62),
    "brow": (0.30, -0.10, 0.70, 0.14),
    "left_cheek": (0.02, 0.48, 0.28, 0.78),
    "right_cheek": (0.72, 0.48, 0.98, 0.78),
}


"""What is looked for again at other moments, in fractions of the box of the face (brows to chin)."""


_REACH = 7


"""Pixels of the window by which a part may have moved in the box."""


_UPPER = ("left_eye", "right_eye", "nose")


_STIFF = (*_UPPER, "brow", "left_cheek", "right_cheek")


"""What a skull holds in place."""


_DETAIL: dict[str, Box] = {
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


"""Where detail is compared, in fractions of the box."""


_DETAIL_AROUND = (-0.25, 1.25)


_DETAIL_SIDES = (96, (48, 224))


"""Pixels of the box when it is: once for all; and native, within these."""


_GREY = np.array((0.299, 0.587, 0.114), np.float32)


_TINY = 1e-6


class FeatureExtractor:
    """Measures the defect features of a clip while it is decoded: a `lmm_qa.video.decode.ClipMeasurement`."""

    sampling = Sampling(strategy="pairs", frames=2 * MOMENTS)

    def __init__(self, rotation: int) -> None:
        self._pictures: dict[int, Picture] = {}
        self._motion = MotionFeatureRecorder(-rotation // 90)

    def add_frame(self, luma: Picture) -> None:
        self._motion.add(luma)

    def add_picture(self, index: int, picture: Picture) -> None:
        self._pictures[index] = pad_to_minimum(reduced(picture), MIN_SIDE)

    def features(self, indices: Sequence[int], dynamics: FrameDynamics) -> Features:
        return measure([self._pictures[index] for index in indices], indices, dynamics, self._motion)


def measure(
    pictures: Sequence[Picture], at: Sequence[int], dynamics: FrameDynamics, motion: MotionFeatureRecorder
) -> Features:
    """Measure a clip.

    Args:
        pictures: twelve, in pairs: (height, width, 3) uint8 RGB, all of one size, of at least 32 pixels a side, and
            `reduced` where they are large.
        at: numbers of their frames.
        dynamics, motion: of all frames of the clip.

    Returns:
        numbers by name, the same names in the same order for every clip; all finite.
    """
    height, width = pictures[0].shape[:2]
    face = follow_face(pictures)
    features = {"short_side": _log(min(height, width)), "face_found": float(face.found)}
    features["face_side"] = _log(float(np.median(face.boxes[:, 2] - face.boxes[:, 0])) * width)
    middles = np.stack([_middle(picture) for picture in pictures])
    greys = np.stack([_grey(middle) for middle in middles])
    _texture(greys[::4], features)
    _banding(middles[2::4], greys[2::4], features)
    _chroma(middles[::4], features)
    _light(middles[::4], greys[::4], features)
    _change(greys[::2], greys[1::2], features)
    _behind(pictures, face.boxes, features)
    windows = np.stack(
        [window(picture, box, _AROUND, _FACE_SIDE) for picture, box in zip(pictures, face.boxes, strict=True)]
    )
    faces = windows.astype(np.float32) @ _GREY
    _found_again(faces, features)
    _flow_of_face(faces, features)
    _drift(windows[::2], features)
    _detail(pictures[::4], face.boxes[::4], features)
    _in_time(dynamics, features)
    for name, value in (motion.rhythm() | motion.lips(face.boxes, at)).items():
        if name in features:
            raise ValueError(f"two features are called {name}")
        features[name] = value
    return {name: float(np.nan_to_num(value, nan=0.0, posinf=0.0, neginf=0.0)) for name, value in features.items()}


def window(picture: Picture, box: Floats, around: tuple[float, float], side: int) -> Picture:
    """A square about the box of a face, resized to (side, side, 3); what reaches out of the picture repeats its edge.

    Args:
        picture: (height, width, 3).
        box: left, top, right, bottom, in fractions of the picture.
        around: from and to, in sides of the box from its left and its top.
        side: pixels.
    """
    height, width = picture.shape[:2]
    left, top, right, _ = box * (width, height, width, height)
    scale = max(float(right - left), 1.0)
    x, y, whole = left + around[0] * scale, top + around[0] * scale, (around[1] - around[0]) * scale
    first_x, first_y = (math.floor(edge) for edge in (x, y))
    last_x, last_y = (math.ceil(edge + whole) for edge in (x, y))
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
    ends = min(x - first_x + whole, image.width), min(y - first_y + whole, image.height)
    place = (min(x - first_x, ends[0] - 1), min(y - first_y, ends[1] - 1), *ends)
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, place, reducing_gap=2.0))


def reduced(picture: Picture) -> Picture:
    """A picture of which the short side is at most `MOST`: a large one by a whole number smaller."""
    times = -(-min(picture.shape[:2]) // MOST)
    return picture if times == 1 else np.asarray(Image.fromarray(np.ascontiguousarray(picture)).reduce(times))


def _middle(picture: Picture) -> Picture:
    """Cut at multiples of 16, so that the blocks of an encoder keep their places."""
    rows, columns = (max(0, (side - MIDDLE) // 2) // 16 * 16 for side in picture.shape[:2])
    return picture[rows : rows + MIDDLE, columns : columns + MIDDLE]


def _grey(picture: Picture) -> Picture:
    return np.asarray(Image.fromarray(np.ascontiguousarray(picture)).convert("L"))


# --- numbers ---------------------------------------------------------------------------------------------------------


def _log(value: float | np.floating | Floats, floor: float = _TINY) -> float:
    return float(np.log(float(value) + floor))


def _histogram(values: Picture) -> Floats:
    return np.asarray(np.bincount(values.ravel(), minlength=256) / max(values.size, 1))


def _shares(histogram: Floats, edges: Sequence[int]) -> Floats:
    return np.diff(np.concatenate([[0], np.cumsum(histogram)])[list(edges)])


def _quantiles(histogram: Floats, shares: Sequence[float]) -> Floats:
    """Grey levels below which these shares lie, fractions of a level included."""
    upto = np.cumsum(histogram)
    level = np.minimum(np.searchsorted(upto, shares), len(histogram) - 1)
    within = (np.asarray(shares) - (upto[level] - histogram[level])) / np.maximum(histogram[level], 1e-9)
    return np.asarray(level + np.clip(within, 0, 1) - 0.5)


def _blocks(pictures: Floats, side: int) -> Floats:
    """(n, H, W) -> (n, H / side, side, W / side, side), cut to whole blocks."""
    count, height, width = pictures.shape
    rows, columns = height // side, width // side
    return pictures[:, : rows * side, : columns * side].reshape(count, rows, side, columns, side)


def _deviations(pictures: Floats) -> tuple[Floats, Floats]:
    """Mean and root of the variance of each block of 8 x 8, (n, rows, columns)."""
    blocks = _blocks(pictures, 8)
    mean = blocks.mean((2, 4))
    square = np.einsum("nabcd,nabcd->nac", blocks, blocks) / 64
    return mean, np.sqrt(np.maximum(square - mean**2, 0))


def _ends(features: Features, name: str, values: Floats, floor: float) -> None:
    """The least two, the middle and the most of what each moment gave, as logarithms."""
    low = np.sort(values)[:2].mean()
    for end, value in (("least", low), ("", np.median(values)), ("most", values.max())):
        features[f"{name}_{end}".rstrip("_")] = _log(value, floor)


# --- what the camera, the encoder and the player do ------------------------------------------------------------------


def _texture(greys: Picture, features: Features) -> None:
    """How neighbours differ, across and down: steps of one, two and four pixels, block edges, flat parts."""
    levels = np.arange(256)
    for way, pictures in (("x", greys), ("y", np.ascontiguousarray(greys.transpose(0, 2, 1)))):
        one, four = apart(pictures[..., 1:], pictures[..., :-1]), apart(pictures[..., 4:], pictures[..., :-4])
        ones, fours = _histogram(one), _histogram(four)
        means = [
            float(each @ levels) for each in (ones, _histogram(apart(pictures[..., 2:], pictures[..., :-2])), fours)
        ]
        features[f"step_{way}"] = _log(means[0], 0.05)
        features[f"step_2_{way}"] = _log(means[1], 0.05) - _log(means[0], 0.05)
        features[f"step_4_{way}"] = _log(means[2], 0.05) - _log(means[1], 0.05)
        shares = _shares(ones, (0, 1, 2, 4, 8, 16, 32, 256))
        for least, share in zip((0, 1, 2, 4, 8, 16, 32), shares, strict=True):
            features[f"steps_from_{least}_{way}"] = _log(share, 1e-4)
        equal = one == 0
        features[f"equal_runs_{way}"] = _log((equal[..., 1:] & equal[..., :-1]).mean(), 1e-3) - _log(shares[0], 1e-3)
        strong = max(12, int(_quantiles(fours, [0.97])[0]))
        at = np.nonzero(four >= strong)
        at = tuple(axis[:: len(axis) // 4000 + 1] for axis in at)
        if at[0].size:  # how much of a strong edge lies in one step
            largest = np.max([one[at[0], at[1], at[2] + offset] for offset in range(4)], axis=0)
            features[f"sharpness_{way}"] = _log(largest.mean() / four[at].mean(), 0.01)
        else:
            features[f"sharpness_{way}"] = -0.5
        features[f"bends_{way}"] = _log(float(_histogram(apart(one[..., 1:], one[..., :-1])) @ levels), 0.05) - _log(
            means[0], 0.05
        )
        columns = np.log(one.mean((0, 1)) + 0.05)
        eights = columns[: len(columns) // 8 * 8].reshape(-1, 8)
        phase = np.median(eights - eights.mean(1, keepdims=True), axis=0)
        phase -= np.median(phase)
        features[f"blocks_8_{way}"], features[f"blocks_4_{way}"] = phase[7], phase[3]
        features[f"blocks_any_{way}"], features[f"blocks_spread_{way}"] = phase.max(), phase.std()
        _grid("step", way, one, features)
        _grid("bend", way, np.abs(np.diff(pictures.astype(np.int16), 2)), features)
    values = greys.astype(np.float32)
    around = (values[:, :-2, 1:-1] + values[:, 2:, 1:-1] + values[:, 1:-1, :-2] + values[:, 1:-1, 2:]) / 4
    coarse, fine = (_deviations(each)[1].ravel() for each in (values, values[:, 1:-1, 1:-1] - around))
    shares_of = (5, 25, 50, 75, 95)
    for share, low, high in zip(
        shares_of, np.percentile(coarse, shares_of), np.percentile(fine, shares_of), strict=True
    ):
        features[f"contrast_{share}"], features[f"texture_{share}"] = _log(low, 0.1), _log(high, 0.05)
    features["flat"], features["fine_flat"] = _log((coarse < 0.6).mean(), 1e-3), _log((fine < 0.3).mean(), 1e-3)
    for share in (5, 50, 95):
        features[f"fine_share_{share}"] = features[f"texture_{share}"] - features[f"contrast_{share}"]


def _grid(kind: str, way: str, values: NDArray[Any], features: Features) -> None:
    """Whether steps or bends along a row lie at equal distances: blocks of an encoder, enlarged ones as well."""
    columns = np.log(np.minimum(values, 12).mean((0, 1), dtype=np.float32) + 0.05)
    rest = columns - running_median(columns, 15)
    wave = np.abs(np.fft.rfft(rest * np.hanning(len(columns)), _WAVES))
    heard = wave[_WAVES // 64 : _WAVES // 3]
    usual = np.median(heard) + 1e-9
    features[f"grid_{kind}_{way}"] = _log(heard.max() / usual, 0.1)
    for period in (4, 8, 16):
        place = _WAVES // period
        features[f"grid_{kind}_{period}_{way}"] = _log(wave[place - 1 : place + 2].max() / usual, 0.1)


def _banding(colours: Picture, greys: Picture, features: Features) -> None:
    """Levels that a histogram leaves out, and single steps in what is otherwise flat."""
    combs, periods = [], []
    for channel in range(3):
        histogram = _histogram(colours[..., channel])[4:252]
        near = np.convolve(histogram, np.ones(9) / 9, "same")
        combs.append(float(np.abs(histogram - near).sum() / (near.sum() + 1e-9)))
        wave = (histogram - np.convolve(histogram, np.ones(31) / 31, "same")) / np.sqrt(near + 1e-4)
        spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave))))[9:110]
        periods.append(float(spectrum.max() / (np.median(spectrum) + 1e-9)))
    grey = _histogram(greys)[4:252]
    near = np.convolve(grey, np.ones(9) / 9, "same")
    features["comb"], features["comb_least"] = _log(np.mean(combs), 0.01), _log(np.min(combs), 0.01)
    features["comb_grey"] = _log(np.abs(grey - near).sum() / (near.sum() + 1e-9), 0.01)
    features["comb_period"], features["comb_period_least"] = _log(np.mean(periods), 0.1), _log(np.min(periods), 0.1)
    steps = apart(colours[:, ::3, 1:], colours[:, ::3, :-1]).max(-1).astype(np.int16)
    nines = steps[..., : steps.shape[-1] // 9 * 9].reshape(*steps.shape[:2], -1, 9)
    largest = nines.max(-1)
    total = nines.sum(-1)
    rest = total - largest
    for name, most, least, share in (("small", 40, 3, 0.0), ("some", 40, 6, 0.5), ("large", 90, 10, 0.6)):
        smooth = total <= most
        single = smooth & (largest >= least) & (rest <= np.maximum(2, share * largest))
        features[f"single_steps_{name}"] = _log(single.sum() / (smooth.sum() + 1), 1e-3)


def _chroma(colours: Picture, features: Features) -> None:
    """The texture of the two colour planes, which encoders care for least, beside that of the brightness."""
    planes = [Image.fromarray(picture).convert("YCbCr") for picture in colours]
    halves = np.stack([np.asarray(plane.reduce(2)) for plane in planes])
    grey = _deviations(halves[..., 0].astype(np.float32))[1].ravel()
    textured = grey >= np.percentile(grey, 70)
    for name, channel in (("cb", 1), ("cr", 2)):
        plane = np.ascontiguousarray(halves[..., channel])
        for reach in (1, 2, 4):
            steps = apart(plane[..., reach:], plane[..., :-reach])
            features[f"{name}_step_{reach}"] = _log(steps.mean(dtype=np.float32), 0.02)
            features[f"{name}_equal_{reach}"] = _log((steps == 0).mean(), 0.01)
        spread = _deviations(plane.astype(np.float32))[1].ravel()
        for share, value in zip((10, 50, 90), np.percentile(spread, (10, 50, 90)), strict=True):
            features[f"{name}_contrast_{share}"] = _log(value, 0.05)
        features[f"{name}_to_grey"] = _log(np.median(spread), 0.05) - _log(np.median(grey), 0.1)
        features[f"{name}_to_grey_textured"] = _log(spread[textured].mean(), 0.05) - _log(grey[textured].mean(), 0.1)


def _light(colours: Picture, greys: Picture, features: Features) -> None:
    """Where the brightness lies, what is burnt out or closed, and how the channels stand to each other."""
    histogram, levels = _histogram(greys), np.arange(256)
    for share, level in zip(
        (0.5, 5, 25, 50, 75, 95, 99.5), _quantiles(histogram, (0.005, 0.05, 0.25, 0.5, 0.75, 0.95, 0.995)), strict=True
    ):
        features[f"light_{share:g}"] = level / 64
    mean = histogram @ levels
    features["burnt"], features["closed"] = _log(histogram[248:].sum(), 1e-3), _log(histogram[:9].sum(), 1e-3)
    features["contrast"] = _log(np.sqrt(np.maximum(histogram @ levels**2 - mean**2, 0)), 1)
    pixels = colours[:, ::4, ::4].reshape(-1, 3).astype(np.float32)
    low, median, high, top = np.percentile(pixels, (1, 50, 95, 99.7), axis=0)
    sums = pixels.sum(1)
    white = pixels[sums >= np.percentile(sums, 97)].mean(0)
    for name, colour in (("median", median), ("high", high), ("top", top), ("mean", pixels.mean(0)), ("white", white)):
        red, green, blue = np.log(np.asarray(colour) + 2)
        features[f"red_{name}"], features[f"blue_{name}"] = red - green, blue - green
        features[f"red_off_{name}"], features[f"blue_off_{name}"] = abs(red - green), abs(blue - green)
        features[f"red_to_blue_{name}"], features[f"green_off_{name}"] = abs(red - blue), abs(red + blue - 2 * green)
    chroma, most = pixels.max(1) - pixels.min(1), pixels.max(1)
    features["neutral"] = _log((chroma < 0.08 * (most + 20)).mean(), 0.01)
    features["saturation"] = _log((chroma / (most + 10)).mean(), 0.01)
    for name, value in zip(("red", "green", "blue"), top / 64, strict=True):
        features[f"most_{name}"] = value
    features["least_to_most"] = (top.min() - top.max()) / 64
    burnt = [float((pixels[:, channel] >= 253).mean()) for channel in range(3)]
    features["burnt_most"], features["burnt_least"] = _log(max(burnt), 1e-3), _log(min(burnt), 1e-3)
    dark = pixels[sums <= np.percentile(sums, 5)].mean(0)
    features["dark_colour"], features["dark_level"] = _log(dark.max() - dark.min(), 1), _log(low.max(), 1)


def _change(first: Picture, second: Picture, features: Features) -> None:
    """How the two pictures of a moment differ: grain, what an encoder skips, light."""
    shares = _shares(_histogram(apart(first, second)), (0, 1, 2, 4, 8, 16, 256))
    for least, share in zip((0, 1, 2, 4, 8, 16), shares, strict=True):
        features[f"change_from_{least}"] = _log(share, 1e-4)
    mean, spread = _deviations(second.astype(np.float32) - first)
    square = mean**2 + spread**2
    features["skipped"], features["nearly_skipped"] = (
        _log((square == 0).mean(), 1e-3),
        _log((square < 0.2).mean(), 1e-3),
    )
    for share, value in zip((5, 25, 50, 90), np.percentile(spread, (5, 25, 50, 90)), strict=True):
        features[f"change_of_blocks_{share}"] = _log(value, 0.05)
    whole = np.abs(mean.mean((1, 2)))
    features["change_of_light"], features["change_of_light_most"] = (
        _log(np.median(whole), 0.05),
        _log(whole.max(), 0.05),
    )
    features["change_least"] = _log(np.sort(np.sqrt(square.mean((1, 2))))[:2].mean(), 0.02)
    features["change_spread"] = features["change_of_blocks_25"] - features["change_of_blocks_90"]


# --- movement --------------------------------------------------------------------------------------------------------


def _flow(first: Floats, second: Floats, side: int) -> tuple[Floats, Floats, Floats]:
    """Movement of each block, right and down in pixels, and how much there is to follow (Lucas and Kanade, 1981)."""
    middle = (first + second) / 2
    across, down = np.zeros_like(middle), np.zeros_like(middle)
    across[..., 1:-1] = (middle[..., 2:] - middle[..., :-2]) / 2
    down[:, 1:-1] = (middle[:, 2:] - middle[:, :-2]) / 2
    change = second - first

    def summed(product: Floats) -> Floats:
        return np.asarray(_blocks(product, side).sum((2, 4)))

    xx, yy, xy = summed(across * across), summed(down * down), summed(across * down)
    xt, yt = summed(across * change), summed(down * change)
    held = 2.0 * side**2
    size = (xx + held) * (yy + held) - xy**2
    return -((yy + held) * xt - xy * yt) / size, -((xx + held) * yt - xy * xt) / size, (xx + yy) / side**2


def _affine(right: Floats, down: Floats, weight: Floats, x: Floats, y: Floats) -> tuple[float, float]:
    """Weighted root mean square of the flow, and of what no shift, turn, zoom or shear of the whole explains."""
    total = float(weight.sum())
    if total < _TINY:
        return 0.0, 0.0
    system = np.stack([np.ones_like(x), x, y], axis=-1).reshape(-1, 3)
    each = weight.ravel()
    normal = (system * each[:, None]).T @ system + 1e-6 * np.eye(3)
    raw = left = 0.0
    for part in (right.ravel(), down.ravel()):
        rest = part - system @ np.linalg.solve(normal, system.T @ (each * part))
        raw, left = raw + float(each @ part**2), left + float(each @ rest**2)
    return float(np.sqrt(raw / total)), float(np.sqrt(left / total))


def _centres(count: int, side: int, whole: int) -> Floats:
    return (np.arange(count) + 0.5) * side / whole


def _behind(pictures: Sequence[Picture], boxes: Floats, features: Features) -> None:
    """Flow beside the head and the body, and in the head: a wall that stands does not bend."""
    height, width = pictures[0].shape[:2]
    shrink = _SMALL / max(height, width)
    size = max(2 * _BLOCK, round(width * shrink)), max(2 * _BLOCK, round(height * shrink))
    shrunk = [
        Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0) for picture in pictures
    ]
    small = np.stack([np.asarray(image.convert("L"), np.float32) for image in shrunk])
    right, down, texture = _flow(small[::2], small[1::2], _BLOCK)
    x, y = np.meshgrid(_centres(right.shape[2], _BLOCK, size[0]), _centres(right.shape[1], _BLOCK, size[1]))
    weight = texture / (texture + 8)
    measured: dict[str, list[float]] = {name: [] for name in ("behind_raw", "behind", "head_raw", "head")}
    fields, covered = [], []
    for moment, box in enumerate(boxes[::2]):
        across, along = (x - box[0]) / (box[2] - box[0]), (y - box[1]) / (box[3] - box[1])
        head = np.hypot((across - 0.5) * 2 / 1.55, (along - 0.375) * 2 / 1.95)
        body = np.where(along > 0.9, abs(across - 0.5) * 2 / (1.5 + 1.6 * np.clip(along - 0.9, 0, 1.5)), 9)
        behind = np.minimum(head, body) > 1.05
        for name, part in (("behind", behind), ("head", ~behind & (along < 1))):
            raw, left = _affine(right[moment], down[moment], np.where(part, weight[moment], 0), x - 0.5, y - 0.5)
            measured[f"{name}_raw"].append(raw)
            measured[name].append(left)
        covered.append(float(np.where(behind, weight[moment], 0).mean()))
        fields.append(np.stack([right[moment] * behind, down[moment] * behind]).ravel())
    for name, values in measured.items():
        _ends(features, name, np.array(values), 0.01)
    features["behind_texture"] = _log(np.mean(covered), 0.01)
    features["behind_to_head"], features["behind_bends"] = (
        features["behind"] - features["head"],
        features["behind"] - features["behind_raw"],
    )
    field = np.array(fields) / (np.linalg.norm(fields, axis=1, keepdims=True) + _TINY)
    alike = (field @ field.T)[np.triu_indices(MOMENTS, 1)]
    features["behind_alike"], features["behind_alike_least"] = alike.mean(), alike.min()


def _found_again(faces: Floats, features: Features) -> None:
    """Parts of the face looked for at the other moments: what is left of them there, and where they are."""
    between = [(2 * one, 2 * other) for one, other in combinations(range(MOMENTS), 2)]
    pairs = between + [(2 * moment, 2 * moment + 1) for moment in range(MOMENTS)]
    left, relative, place = {}, {}, {}
    for name, part in _PARTS.items():
        left[name], relative[name], place[name] = _search(faces, pairs, part)
    ways = {"later": slice(0, len(between)), "soon": slice(len(between), None)}
    stiff = np.mean([left[name] for name in (*_UPPER, "brow")], axis=0)
    stiff_relative = np.mean([relative[name] for name in _UPPER], axis=0)
    for kind, mouth, rest in (("left", left["mouth"], stiff), ("relative", relative["mouth"], stiff_relative)):
        for way, which in ways.items():
            for what, values in (("mouth", np.sort(mouth[which])), ("mouth_to_face", np.sort((mouth - rest)[which]))):
                name = f"{what}_{kind}_{way}"
                features[f"{name}_first"], features[f"{name}_least"] = float(values[0]), float(values[:3].mean())
                features[name], features[f"{name}_most"] = float(np.median(values)), float(values[-3:].mean())
    later, soon = ways["later"], ways["soon"]
    features["mouth_gap"] = features["mouth_left_later"] - features["mouth_left_later_first"]
    features["face_left_later"], features["face_left_soon"] = np.median(stiff[later]), np.median(stiff[soon])
    features["face_left_least"] = stiff[later].min()
    features["mouth_moves"] = _log(np.median(np.hypot(*place["mouth"][later].T)), 0.2)
    table = np.full((MOMENTS, MOMENTS), np.inf)
    for (one, other), value in zip(between, left["mouth"][later], strict=True):
        table[one // 2, other // 2] = table[other // 2, one // 2] = value
    nearest = np.sort(table.min(1))
    for rank in (0, 2, 4):
        features[f"mouth_nearest_{rank}"] = float(nearest[rank])
    features["mouth_alike"] = (left["mouth"][later] < np.median(left["mouth"][soon]) - 0.3).mean()
    features["mouth_alike_to_face"] = (left["mouth"][later] < stiff[later] - 1).mean()
    next_ones = [
        value for (one, other), value in zip(between, (left["mouth"] - stiff)[later], strict=True) if other - one == 2
    ]
    for rank, value in enumerate(np.sort(next_ones)[:3]):
        features[f"mouth_next_{rank}"] = value
    apart = np.array([(other - one) / 2 for one, other in between])
    features["face_changes"] = np.polyfit(apart, np.mean([left[name] for name in _STIFF], axis=0)[later], 1)[0]
    for group, names, which in (
        ("stiff_soon", _STIFF, soon),
        ("stiff_later", _STIFF, later),
        ("upper_later", _UPPER, later),
    ):
        _shape(group, names, {name: place[name][which] for name in names}, features)


def _search(faces: Floats, pairs: Sequence[tuple[int, int]], part: Box) -> tuple[Floats, Floats, Floats]:
    """Look for a part of one picture in another, for each pair.

    Returns:
        logarithm of the mean square that is left at the best place, brightness put aside; the same, beside the part's
        own variance; and the best place, (pairs, 2), right and down in pixels, to a fraction.
    """
    scale = _FACE_SIDE / (_AROUND[1] - _AROUND[0])
    x, y, stop_x, stop_y = (round((edge - _AROUND[0]) * scale) for edge in part)
    ones, others = zip(*pairs, strict=True)
    wanted = faces[list(ones), y:stop_y, x:stop_x]
    wanted = wanted - wanted.mean((1, 2), keepdims=True)
    field = faces[list(others), y - _REACH : stop_y + _REACH, x - _REACH : stop_x + _REACH]
    count, height, width = wanted.shape
    shape = field.shape[1:]
    matches = np.fft.irfft2(np.fft.rfft2(wanted, shape).conj() * np.fft.rfft2(field, shape), shape)
    span = 2 * _REACH + 1
    area = height * width
    summed = (
        np.pad(np.stack([field, field**2]).astype(np.float64), ((0, 0), (0, 0), (1, 0), (1, 0))).cumsum(2).cumsum(3)
    )
    total, squares = (summed[..., height:, width:] - summed[..., :-height, width:] - summed[..., height:, :-width]
                      + summed[..., :-height, :-width])  # fmt: skip
    own = (wanted**2).mean((1, 2))
    error = own[:, None, None] + squares / area - (total / area) ** 2 - 2 * matches[:, :span, :span] / area
    best = error.reshape(count, -1).argmin(1)
    row, column = np.divmod(best, span)
    each = np.arange(count)
    least = error[each, row, column]

    def between(before: Floats, after: Floats) -> tuple[Floats, Floats]:
        """By how much the least lies beside the best place, and lower, on a parabola through three."""
        bend = np.maximum(before + after - 2 * least, 1e-3)
        return (before - after) / (2 * bend), (before - after) ** 2 / (8 * bend)

    inner_row, inner_column = np.clip(row, 1, span - 2), np.clip(column, 1, span - 2)
    off_y, lower_y = between(error[each, inner_row - 1, column], error[each, inner_row + 1, column])
    off_x, lower_x = between(error[each, row, inner_column - 1], error[each, row, inner_column + 1])
    left = np.maximum(least - lower_x - lower_y, 0.02)
    place = np.stack([column - _REACH + np.clip(off_x, -1, 1), row - _REACH + np.clip(off_y, -1, 1)], axis=1)
    return np.log(left + 0.3), np.log(left + 0.3) - np.log(own + 4), place


def _shape(group: str, names: Sequence[str], moves: dict[str, Floats], features: Features) -> None:
    """By how much parts move against each other, after the shift, turn and zoom of all are taken away."""
    boxes = np.array([_PARTS[name] for name in names])
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    centres = centres - centres.mean(0)
    shift = np.stack([moves[name] for name in names], axis=1)
    shift = shift - shift.mean(1, keepdims=True)
    size = (centres**2).sum()
    zoom = (shift * centres).sum((1, 2)) / size
    turn = (shift[..., 1] * centres[:, 0] - shift[..., 0] * centres[:, 1]).sum(1) / size
    sideways = np.stack([-centres[:, 1], centres[:, 0]], axis=1)
    rest = shift - zoom[:, None, None] * centres - turn[:, None, None] * sideways
    _ends(features, f"{group}_bends", np.sqrt((rest**2).sum((1, 2)) / len(names)), 0.05)
    features[f"{group}_zooms"] = _log(np.median(abs(zoom)), 0.02)
    features[f"{group}_turns"] = _log(np.median(abs(turn)), 0.02)
    features[f"{group}_moves"] = _log(np.median(np.hypot(*moves["nose"].T)), 0.05)


def _flow_of_face(faces: Floats, features: Features) -> None:
    """Flow within the moments in parts of the face and around it."""
    right, down, texture = _flow(faces[::2], faces[1::2], _FACE_BLOCK)
    side = _AROUND[0] + _centres(right.shape[1], _FACE_BLOCK, _FACE_SIDE) * (_AROUND[1] - _AROUND[0])
    x, y = np.meshgrid(side, side)
    places = {
        "upper": (np.hypot((x - 0.5) / 0.5, (y - 0.35) / 0.5) < 1) & (y < 0.62),
        "lower": np.hypot((x - 0.5) / 0.4, (y - 0.8) / 0.3) < 1,
        "whole": np.hypot((x - 0.5) / 0.5, (y - 0.45) / 0.62) < 1,
        "beside": np.hypot((x - 0.5) / 0.62, (y - 0.4) / 0.8) >= 1,
    }
    weight = texture / (texture + 8)
    for name, place in places.items():
        found = np.array([
            _affine(right[moment], down[moment], np.where(place, weight[moment], 0), x - 0.5, y - 0.5)
            for moment in range(MOMENTS)
        ])  # fmt: skip
        _ends(features, f"flow_{name}_raw", found[:, 0], 0.01)
        _ends(features, f"flow_{name}", found[:, 1], 0.01)
    features["flow_bends"] = features["flow_upper"] - features["flow_upper_raw"]
    features["flow_lower_to_upper"] = features["flow_lower"] - features["flow_upper"]


# --- the face --------------------------------------------------------------------------------------------------------


def _drift(windows: Picture, features: Features) -> None:
    """Whether the colours of the face go one way from the first moment to the last, and those around do not."""
    pixels = windows[:, ::4, ::4].astype(np.float32)
    side = _AROUND[0] + _centres(pixels.shape[1], 4, _FACE_SIDE) * (_AROUND[1] - _AROUND[0])
    x, y = np.meshgrid(side, side)
    inside = np.hypot((x - 0.5) / 0.36, (y - 0.45) / 0.5) < 1
    outside = np.hypot((x - 0.5) / 0.75, (y - 0.4) / 0.95) >= 1
    upper, face, beside = (pixels[:, place].mean(1) for place in (inside & (y < 0.6), inside, outside))
    time = np.arange(MOMENTS) - (MOMENTS - 1) / 2

    def trend(colours: Floats) -> Floats:
        return np.asarray((MOMENTS - 1) * (time @ colours) / (time @ time))

    for name, colours in (("upper", upper), ("face", face), ("face_to_beside", upper - beside)):
        change = trend(colours)
        hue = change - change.mean()
        rest = np.sqrt(((colours - colours.mean(0) - time[:, None] * change / (MOMENTS - 1)) ** 2).mean())
        features[f"drift_{name}"], features[f"drift_hue_{name}"] = (
            _log(np.linalg.norm(change), 0.3),
            _log(np.linalg.norm(hue), 0.3),
        )
        for kind in ("drift", "drift_hue"):
            features[f"{kind}_steady_{name}"] = features[f"{kind}_{name}"] - _log(rest, 0.3)
        steps = np.diff(colours - colours.mean(1, keepdims=True), axis=0)
        features[f"one_way_{name}"] = np.linalg.norm(steps.sum(0)) / (np.linalg.norm(steps, axis=1).sum() + 0.3)
    features["drift_beside"] = _log(np.linalg.norm(trend(beside)), 0.3)


def _detail(pictures: Sequence[Picture], boxes: Floats, features: Features) -> None:
    """Detail of parts of the face beside each other: at one size for all clips, and about the native one."""
    wide = float(np.median(boxes[:, 2] - boxes[:, 0])) * pictures[0].shape[1]
    once, (least, most) = _DETAIL_SIDES
    start = -_DETAIL_AROUND[0]
    for size, box_side in (("small", once), ("native", int(np.clip(wide, least, most)))):
        side = int(box_side * (_DETAIL_AROUND[1] - _DETAIL_AROUND[0]))
        values = np.stack([
            _grey(window(picture, box, _DETAIL_AROUND, side)) for picture, box in zip(pictures, boxes, strict=True)
        ]).astype(np.float32)  # fmt: skip
        inner = values[:, 1:-1, 1:-1]
        left, right, above, below = values[:, 1:-1, :-2], values[:, 1:-1, 2:], values[:, :-2, 1:-1], values[:, 2:, 1:-1]
        across, down = abs(right - left) / 2, abs(below - above) / 2
        fine = abs(4 * inner - left - right - above - below) / 4
        found: dict[str, Floats] = {}
        for name, part in _DETAIL.items():
            x, y, stop_x, stop_y = (int((edge + start) * box_side) for edge in part)
            found[name] = _mean_detail(*(each[:, y:stop_y, x:stop_x] for each in (across, down, fine)))
        beside = np.ones(fine.shape[1:], bool)
        beside[int(0.05 * box_side) : int(1.4 * box_side), int(0.1 * box_side) : int(1.4 * box_side)] = False
        found["beside"] = _mean_detail(across[:, beside], down[:, beside], fine[:, beside])
        upper, cheeks = found["upper"], (found["left_cheek"] + found["right_cheek"] + found["brow"]) / 3
        for name in ("mouth", "teeth", "lower", "face"):
            ours, other = found[name], found["beside"] if name == "face" else upper
            for kind, value in zip(("across", "down", "fine", "fine_low", "fine_high"), ours - other, strict=True):
                features[f"{name}_{kind}_{size}"] = value
            features[f"{name}_across_to_down_{size}"], features[f"{name}_fineness_{size}"] = (
                ours[0] - ours[1],
                ours[2] - ours[0],
            )
            features[f"{name}_fineness_to_upper_{size}"] = ours[2] - ours[0] - (upper[2] - upper[0])
            features[f"{name}_fine_to_nose_{size}"], features[f"{name}_fine_spread_{size}"] = (
                ours[2] - found["nose"][2],
                ours[4] - ours[3],
            )
        features[f"lower_floor_{size}"], features[f"mouth_floor_{size}"] = (
            found["lower"][3] - cheeks[3],
            found["mouth"][3] - cheeks[3],
        )
        features[f"teeth_to_mouth_{size}"] = found["teeth"][2] - found["mouth"][2]
        features[f"teeth_to_lower_{size}"] = found["teeth"][0] - found["lower"][0]
        features[f"upper_{size}"], features[f"upper_fineness_{size}"] = upper[2], upper[2] - upper[0]
        features[f"cheeks_to_lower_{size}"], features[f"mouth_{size}"] = (
            cheeks[2] - found["lower"][2],
            found["mouth"][2],
        )


def _mean_detail(across: Floats, down: Floats, fine: Floats) -> Floats:
    """Logarithms of means across, down and both, and of two quantiles, (5,); the median of the pictures."""
    across, down, fine = (each.reshape(len(each), -1) for each in (across, down, fine))
    low, high = fine.shape[1] // 4, 9 * fine.shape[1] // 10
    ordered = np.partition(fine, (low, high), axis=1)
    columns = across.mean(1), down.mean(1), fine.mean(1), ordered[:, low], ordered[:, high]
    return np.asarray(np.log(np.median(np.stack(columns, axis=1), axis=0) + 0.05), dtype=np.float64)


# --- time ------------------------------------------------------------------------------------------------------------


def _in_time(dynamics: FrameDynamics, features: Features) -> None:
    """What `lmm_qa.video.temporal` says of all frames, as numbers; and the change from frame to frame that it says it by."""
    first = buffering(dynamics)
    held = [stop - start for start, stop in stalls(dynamics)]
    rhythm = pace(dynamics)
    features["buffering"] = _log(first[1] - first[0] if first else 0.0, 0.04)
    features["stall"], features["stalls"] = _log(max(held, default=0.0), 0.04), _log(sum(held), 0.04)
    features["pace"], features["uneven"] = _log(min(rhythm.rate, 40.0), 1), _log(rhythm.uneven, 0.02)
    features["flicker"] = _log(flicker(dynamics), 2e-4)
    evidence = switching(dynamics)
    features["switch_up"], features["switch_down"] = (
        _log(max(evidence.max(), 0.0), 0.005),
        _log(max(-evidence.min(), 0.0), 0.005),
    )
    features["switched"] = _log(sum(stop - start for start, stop in switches(dynamics)), 0.1)
    features["switched_share"] = sum(stop - start for start, stop in switches(dynamics, 0)) / dynamics.duration
    peak = dynamics.peak[1:] if len(dynamics.peak) > 1 else np.zeros(1, np.float32)
    moving = peak[peak >= STANDS] if (peak >= STANDS).any() else np.zeros(1, np.float32)
    features["stands"] = _log((peak < STANDS).mean(), 0.01)
    features["stands_beside"] = _log(
        (peak < max(STANDS * (moving.max() < STANDS), 0.15 * float(np.median(moving)))).mean(), 0.01
    )
    features["peak_spread"], features["peak"] = _log(np.log(moving + 0.1).std(), 0.05), _log(np.median(moving), 0.1)
    features["peak_most"] = _log(np.quantile(moving, 0.95), 0.1) - features["peak"]
    light = np.log(dynamics.light + 1)
    jumps = abs(np.diff(light)) if len(light) > 1 else np.zeros(1)
    features["jumps"], features["jumps_most"] = _log(np.median(jumps), 2e-4), _log(np.quantile(jumps, 0.9), 2e-4)
    features["light_spread"] = _log(light.std(), 1e-3)
    detail = np.log(dynamics.detail + 0.05)
    changes = abs(np.diff(detail)) if len(detail) > 1 else np.zeros(1)
    features["detail_spread"] = _log(detail.std(), 0.005)
    features["detail_range"] = _log(np.quantile(detail, 0.95) - np.quantile(detail, 0.05), 0.005)
    features["detail_jumps"], features["detail_jumps_most"] = (
        _log(np.median(changes), 1e-3),
        _log(np.quantile(changes, 0.9), 1e-3),
    )
    quiet = dynamics.quiet[1:] if len(dynamics.quiet) > 1 else np.zeros(1)
    features["quiet"], features["quiet_least"] = _log(np.median(quiet), 0.02), _log(np.quantile(quiet, 0.1), 0.02)
    features["quiet_most"] = _log(np.quantile(quiet, 0.95), 0.02) - features["quiet"]
    rhythm_of = np.log(peak + 0.05) - np.log(peak + 0.05).mean()
    again = [
        float((rhythm_of[lag:] * rhythm_of[:-lag]).mean() / (rhythm_of.var() + _TINY))
        if len(rhythm_of) > lag + 2
        else 0.0
        for lag in range(1, 7)
    ]
    features["next_alike"], features["later_alike"] = again[0], max(again[1:])
