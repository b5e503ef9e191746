"""Features of the change from each frame of a clip to the next: the rhythm of an encoder, and the motion of the lips.

An encoder spends its bits unevenly: it refreshes the picture at intervals and copies what it can from the frame before.
So the share of unchanged pixels, and the detail, rise and fall periodically. Lips that stand still for a second are
found by comparing the motion of the mouth with that of the rest of the face in each frame.

| features | what they measure |
| --- | --- |
| `change_*` | mean change of a frame |
| `same_*`, `copied_*` | share of unchanged pixels, and of unchanged runs of 8 pixels |
| `fine_*` | fine detail of a frame |
| ..., `*_beat*`, `*_turns`, `*_skew`, `*_5` to `*_95` | of these four: deviation from the running median; quantiles |
| ..., `*_again_N`, `*_period` | of these four: autocorrelation at a lag of N frames, and its best lag |
| `lips_*`, `chin_to_lips` | motion of the mouth relative to the face: quantiles, and over windows of 0.3 to 0.9 s |

The rhythm of an encoder is one of frames, whatever their times: its lags are counted in frames. Motion is one of
seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import median_filter

from lmm_qa.video.display import UPRIGHT, Orientation
from lmm_qa.video.face import Box, boxes_at
from lmm_qa.video.temporal import absolute_difference, evenly_spaced

Grey = NDArray[np.uint8]
Floats = NDArray[np.floating[Any]]

MAX_FRAMES = 900
"""Maximum number of small pictures, from the start of the clip: 36 s at 25 per second, and at least 22 s. Lip motion is
measured on them only. None are stored after a change of the frame size."""

_MIN_INTERVAL = 0.025
"""Seconds between two small pictures. At 50 or 60 frames per second every other frame is left out: the change from one
picture to the next is then that at 25 or 30, on which the classifier was trained."""

_TIME_TOLERANCE = 1e-3
"""Seconds by which rounding may miss a limit."""

_SMALL_SIDE = 192
"""Approximate long side of a small picture, in pixels."""

_PIXELS, _MIN_ROWS = 9216, 8
"""Pixels of a frame that are compared with those of the frame before, in complete rows."""

_RUN = 8
"""Pixels: encoders copy at least this many at a time."""

_BATCH = 32
"""Frames that are measured in one step, for speed."""

_MEDIAN_FRAMES = 9
"""Width of the running median."""

_STILL, _MIN_MOVING = 0.02, 8
"""A frame whose mean change is below this many grey levels repeats the one before, and is ignored, unless no more than
this many frames would remain."""

_SERIES = {"change": 0.05, "same": 0.01, "copied": 0.01, "fine": 0.1}
"""Series that are measured in each frame, and what is added to each before its logarithm is taken."""

_LAGS = (1, 2, 3, 4, 5, 8)

_MOUTH: Box = (0.26, 0.62, 0.74, 0.98)

_CHIN: Box = (0.30, 1.00, 0.70, 1.20)

_REST: tuple[Box, ...] = (
    (0.08, 0.10, 0.92, 0.52),
    (-0.02, 0.50, 0.20, 0.95),
    (0.80, 0.50, 1.02, 0.95),
    (0.34, 0.38, 0.66, 0.60),
)
"""Eyes and brows, both cheeks, nose."""

_WINDOWS = {"8": 0.32, "14": 0.56, "22": 0.88}
"""Seconds; features are named after the frames at 25 per second."""


class MotionFeatureRecorder:
    """Receives every frame of a clip; stores a few numbers and a small picture of each.

    Args:
        orientation: how stored frames are turned for display.
    """

    def __init__(self, orientation: Orientation = UPRIGHT) -> None:
        self._orientation = orientation
        self._small: list[Grey] = []
        self._small_numbers: list[int] = []
        self._small_seconds: list[float] = []
        self._frames = 0
        self._pending: list[Grey] = []
        self._measured: list[Floats] = []
        self._shape = (0, 0)
        self._stores_pictures = True

    def add_frame(self, luma: Grey, second: float) -> None:
        """Receive the luma plane of the next frame, (height, width), as stored, and when it appears."""
        if luma.shape != self._shape:
            self._measure(last=True)
            self._stores_pictures = self._shape == (0, 0)
            self._shape = luma.shape
            self._rows = evenly_spaced(luma.shape[0], max(_MIN_ROWS, _PIXELS // luma.shape[1]))
        self._pending.append(luma[self._rows])
        if len(self._pending) > _BATCH:
            self._measure()
        due = not self._small or second - self._small_seconds[-1] >= _MIN_INTERVAL - _TIME_TOLERANCE
        if due and self._stores_pictures and len(self._small) < MAX_FRAMES:
            factor = max(1, round(max(luma.shape) / _SMALL_SIDE))
            small = np.asarray(Image.fromarray(np.ascontiguousarray(luma)).reduce(factor))
            self._small.append(self._orientation.apply(small))
            self._small_numbers.append(self._frames)
            self._small_seconds.append(second)
        self._frames += 1

    def coding_rhythm(self) -> dict[str, float]:
        """Features of change, unchanged pixels and detail from frame to frame."""
        self._measure(last=True)
        series = np.concatenate(self._measured, axis=1) if self._measured else np.zeros((len(_SERIES), 0))
        moving = series[0] > _STILL
        used = series[:, moving] if moving.sum() > _MIN_MOVING else series
        if used.shape[1] < 2:
            used = np.zeros((len(_SERIES), 2))
        features: dict[str, float] = {}
        for (name, floor), values in zip(_SERIES.items(), used, strict=True):
            features |= _rhythm(name, np.log(values + floor))
        steps = np.diff(np.log(used[-1] + _SERIES["fine"]))
        features["fine_rises"] = float(np.log(max(steps.max(), 0) + 0.005))
        features["fine_falls"] = float(np.log(max(-steps.min(), 0) + 0.005))
        return features

    def lip_motion(self, boxes: Floats, indices: Sequence[int]) -> dict[str, float]:
        """Features of the motion of the mouth relative to the rest of the face.

        Args:
            boxes: (n, 4): the face in some displayed frames, as fractions of their width and height. If pictures were
                padded before the face was located, the boxes are slightly off.
            indices: (n,): numbers of these frames.
        """
        mouth, chin, *rest = self._part_changes((_MOUTH, _CHIN, *_REST), boxes, indices)
        face = np.mean(rest, axis=0)
        if (moves := face > 0.15).sum() >= 10:
            mouth, chin, face = mouth[moves], chin[moves], face[moves]
        mouth, chin, face = (np.log(each + 0.2) for each in (mouth, chin, face))
        relative = mouth - face
        features = {f"lips_{share}": float(np.percentile(relative, share)) for share in (3, 10, 25, 50, 75, 90)}
        features["lips_range"] = features["lips_75"] - features["lips_10"]
        interval = float(np.median(np.diff(self._small_seconds))) if len(self._small) > 1 else 1.0
        for frames, seconds in _WINDOWS.items():
            length = min(max(1, round(seconds / interval)), len(relative))
            means = sliding_window_view(relative, length).mean(1)
            lowest = float(means.min())
            features[f"lips_least_{frames}"] = lowest
            features[f"lips_less_{frames}"] = features["lips_50"] - lowest
            features[f"lips_most_{frames}"] = float(means.max()) - lowest
            largest = sliding_window_view(mouth, length).max(1) - sliding_window_view(face, length).mean(1)
            features[f"lips_still_{frames}"] = float(largest.min())
        features["lips_spread"] = float(np.log(mouth.std() + 0.02))
        features["lips_with_face"] = _correlation(mouth, face)
        features["lips_with_chin"] = _correlation(mouth, chin)
        features["chin_to_lips"] = float(np.median(chin - mouth))
        return features

    def _measure(self, last: bool = False) -> None:
        """Compare the pending frames, each with the one before. The last one stays pending if more may follow."""
        if len(self._pending) > 1:
            rows = np.stack(self._pending)
            change = absolute_difference(rows[1:], rows[:-1])
            series = (
                _means(change),
                _shares(change == 0),
                _shares(_copied_runs(change)),
                _means(second_differences(rows[1:])),
            )
            self._measured.append(np.stack(series))
        self._pending = [] if last else self._pending[-1:]

    def _part_changes(self, parts: Sequence[Box], boxes: Floats, indices: Sequence[int]) -> Floats:
        """(parts, frames - 1): mean change of parts of the face since the frame before, in grey levels."""
        count = len(self._small)
        if count < 2:
            return np.zeros((len(parts), 1))
        height, width = self._small[0].shape
        interpolated = boxes_at(boxes, indices, self._small_numbers[1:])
        corner, sides = interpolated[:, None, :2], interpolated[:, None, 2:] - interpolated[:, None, :2]
        size = np.array([width, height])
        edges = (corner[:, :, None] + np.array(parts).reshape(1, -1, 2, 2) * sides[:, :, None]) * size
        starts = np.clip(np.floor(edges[:, :, 0]), 0, np.maximum(size - 2, 0)).astype(int)
        ends = np.maximum(np.clip(np.ceil(edges[:, :, 1]), 1, size).astype(int), starts + 1)
        low, high = starts.min((0, 1)), ends.max((0, 1))
        windows = [small[low[1] : high[1], low[0] : high[0]] for small in self._small]
        starts, ends = starts - low, ends - low
        changes = np.empty((len(parts), count - 1))
        change = absolute_difference(*(np.stack(each) for each in (windows[1:], windows[:-1])))
        for part in range(len(parts)):
            places = np.concatenate([starts[:, part], ends[:, part]], axis=1)
            new = np.flatnonzero((places[1:] != places[:-1]).any(1)) + 1
            # Frames in which the part has the same place are measured together.
            for begin, stop in pairwise([0, *new.tolist(), count - 1]):
                x, y, stop_x, stop_y = places[begin].tolist()
                pixels = np.ascontiguousarray(change[begin:stop, y:stop_y, x:stop_x])
                sums = pixels.reshape(stop - begin, -1).sum(1, dtype=np.uint32)
                changes[part, begin:stop] = sums / ((stop_y - y) * (stop_x - x))
        return changes


def _copied_runs(change: Grey) -> NDArray[np.bool_]:
    """(n, height, runs): whether no pixel of a run has changed by more than 1."""
    width = change.shape[2]
    if width < _RUN:
        return change <= 1
    runs = np.ascontiguousarray(change[..., : width // _RUN * _RUN]).view(np.uint64)
    return np.asarray(runs & np.uint64(0xFEFEFEFEFEFEFEFE) == 0)


def second_differences(pictures: Grey) -> NDArray[np.int16]:
    """(n, height, width - 2): absolute second differences along the rows of pictures; 0 if those are too short."""
    if pictures.shape[2] <= 2:
        return np.zeros((len(pictures), 1, 1), np.int16)
    values = pictures.astype(np.int16)
    bends = values[..., 1:-1] * np.int16(-2)
    bends += values[..., 2:]
    bends += values[..., :-2]
    return np.asarray(np.abs(bends, out=bends))


def _means(values: NDArray[Any]) -> NDArray[np.float32]:
    """(n,): mean of the integers of each frame."""
    sums = values.reshape(len(values), -1).sum(1, dtype=np.uint32)
    return np.asarray(sums.astype(np.float32) / np.float32(values[0].size))


def _shares(values: NDArray[np.bool_]) -> NDArray[np.float32]:
    """(n,): share of true values of each frame."""
    return np.array([np.count_nonzero(frame) for frame in values], np.float32) / np.float32(values[0].size)


def _rhythm(name: str, values: Floats) -> dict[str, float]:
    """Quantiles of a series of logarithms, and how it deviates from its running median."""
    deviation = values - median_filter(values, _MEDIAN_FRAMES, mode="nearest")
    steps, turns = np.diff(values), np.diff(values, 2) if len(values) > 2 else np.zeros(1)
    repeats = _autocorrelations(deviation, 17)
    features = {
        f"{name}_beat": float(np.log(deviation.std() + 0.003)),
        f"{name}_beat_usual": float(np.log(np.median(abs(deviation)) + 0.003)),
        f"{name}_turns": float(np.log((np.median(abs(turns)) + 0.003) / (np.median(abs(steps)) + 0.003))),
        **{f"{name}_again_{lag}": float(repeats[lag]) for lag in _LAGS},
        f"{name}_again": float(repeats[2:].max()),
        f"{name}_period": float(repeats[2:].argmax()),
        f"{name}_skew": float(np.clip(((deviation / (deviation.std() + 1e-6)) ** 3).mean(), -9, 9)),
    }
    shares = (5, 25, 50, 75, 95)
    return features | {
        f"{name}_{share}": float(value) for share, value in zip(shares, np.percentile(values, shares), strict=True)
    }


def _autocorrelations(values: Floats, count: int) -> Floats:
    """(count,): at the lags from 0, -1 to 1; 0 where the series is too short."""
    centred = values - values.mean()
    variance = centred.var()
    repeats = np.zeros(count)
    for lag in range(min(count, max(0, len(values) - 4))):
        repeats[lag] = (centred[lag:] * centred[: len(values) - lag]).mean() / (variance + 1e-9)
    return repeats


def _correlation(a: Floats, b: Floats) -> float:
    """Pearson's; 0 for a constant series."""
    return float(np.corrcoef(a, b)[0, 1]) if a.std() * b.std() > 1e-9 else 0.0
