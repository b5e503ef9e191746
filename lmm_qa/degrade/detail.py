"""How sharp a clip is by itself, without a reference: the slope of its sharpest edges.

A share of the picture in flat areas, darkness or a blurred background must not make a clip soft, so only the strongest
edges are measured, each relative to its own contrast, and the sharpest of them decide.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import maximum_filter, minimum_filter

STEP_SHARPNESS = 0.5
"""`edge_sharpness` of a step from one pixel to the next."""

REFERENCE_SIDE = 720
"""Pixels; pictures with a longer short side are reduced to it first. It is assumed that more is hardly seen."""

_FRAMES = 6

_WINDOW = 7
"""Pixels, of the contrast of an edge."""

_STRONGEST = 0.85
"""Edges whose windows have less contrast than this quantile of all windows are ignored."""

_MIN_CONTRAST = 24.0
"""Grey levels."""

_SHARPEST = 90
"""Percentile of the edges of a picture."""

_MIN_EDGES = 20
"""Edge pixels; the percentile of fewer says nothing."""

_LUMA = np.array((0.299, 0.587, 0.114), np.float32)
"""ITU-R BT.601."""

Luma = NDArray[np.float32]


def edge_sharpness(frames: NDArray[np.uint8]) -> float:
    """Slope of the sharpest edges of a clip, per pixel and relative to their contrast: the median over six frames.

    0.5 is a step; an edge between two pixels that is blurred by a Gaussian with a standard deviation of s pixels has
    (F(1.5 / s) - F(-0.5 / s)) / 2, with F the cumulative normal distribution, as long as it is narrower than the
    window: 0.33 for 0.9 pixels, 0.28 for 1.2. Diagonal edges and lines can have more than 0.5. Uniform bars around the
    picture are ignored; subtitles and logos are not. Noise of a standard deviation of 5 grey levels on a soft picture
    adds up to about 0.04.

    Args:
        frames: (T, H, W, 3) uint8 RGB.

    Returns:
        0 to about 0.7; `STEP_SHARPNESS` if there are too few edges to judge.
    """
    chosen = np.unique(np.linspace(0, len(frames) - 1, _FRAMES + 2).round().astype(int)[1:-1])
    slopes = [_edge_slopes(_luma(frames[index])) for index in chosen]
    measured = [float(np.percentile(each, _SHARPEST)) for each in slopes if len(each) >= _MIN_EDGES]
    return float(np.median(measured)) if measured else STEP_SHARPNESS


def _luma(picture: NDArray[np.uint8]) -> Luma:
    height, width = picture.shape[:2]
    scale = REFERENCE_SIDE / min(height, width)
    if scale < 1:
        size = (round(width * scale), round(height * scale))
        picture = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
    luma: Luma = picture @ _LUMA
    return luma


def _edge_slopes(luma: Luma) -> Luma:
    """Gradient relative to the contrast, (n,), at the steepest pixel of each strong edge."""
    slope = np.hypot(*np.gradient(luma))
    contrast = maximum_filter(luma, _WINDOW) - minimum_filter(luma, _WINDOW)
    rows = _without_bars(luma.std(axis=1))
    columns = _without_bars(luma[rows].std(axis=0))
    steepest = slope >= maximum_filter(slope, 5)
    slope, contrast, steepest = (each[rows, columns] for each in (slope, contrast, steepest))
    chosen = steepest & (contrast >= max(float(np.quantile(contrast, _STRONGEST)), _MIN_CONTRAST))
    slopes: Luma = slope[chosen] / contrast[chosen]
    return slopes


def _without_bars(variation: Luma) -> slice:
    """The rows (or columns) from the first to the last that are not uniform, and not next to a bar.

    Args:
        variation: (n,) standard deviation of each, in grey levels.
    """
    varied = np.flatnonzero(variation >= 3)
    if len(varied) < 4 * _WINDOW:
        return slice(None)
    first, last, margin = int(varied[0]), int(varied[-1]), _WINDOW // 2 + 1
    return slice(first + margin if first else 0, last + 1 - (margin if last + 1 < len(variation) else 0))
