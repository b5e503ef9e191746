"""What passes from frame to frame of a clip, for `lmm_qa.defects.features`: the rhythm of an encoder, and lips beside their face.

An encoder spends its bits unevenly, on every so many frames more, and copies what it can from the frame before: the
share of pixels that stay the same, and the detail, then beat. Lips that stand still for a second do so between any two
pictures that are looked at, so each frame is compared with the one before, the mouth beside the rest of the face.

`MotionFeatureRecorder` is given every frame while it is decoded, and keeps of it numbers and, of the first `WATCHED`, a small
picture. Time is counted in frames, so that a spell is shorter where there are more of them a second. Knows nothing of
files, models or weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image

from lmm_qa.video.face import Box
from lmm_qa.video.temporal import apart, spread

Grey = NDArray[np.uint8]


Floats = NDArray[np.floating[Any]]


WATCHED = 900


"""Frames of which a small picture is kept: the first ones, up to one of another size."""


_SMALL = 192


"""Pixels about which a small picture's long side has."""


_PIXELS, _LEAST_LINES = 9216, 8


"""Pixels of a frame that are compared with those of the frame before, in whole lines."""


_RUN = 8


"""Pixels that an encoder copies at least."""


_BATCH = 32


"""Frames that are measured at once."""


_STEADY = 9


"""Frames of which the median is what a frame's beat is measured from."""


_STILL, _FEW = 0.02, 8


"""Grey levels: a frame whose lines change by less is the one before, shown again. Where no more than so many are left,
all of them count."""


_BEATS = ("change", "same", "copied", "fine")


"""What beats, of every frame: mean change of its lines, shares of pixels that stay and of runs that are copied, and
mean bend along the lines."""


_FLOORS = (0.05, 0.01, 0.01, 0.1)


_LAGS = (1, 2, 3, 4, 5, 8)


_MOUTH: Box = (0.26, 0.62, 0.74, 0.98)


_CHIN: Box = (0.30, 1.00, 0.70, 1.20)


_REST: tuple[Box, ...] = (
    (0.08, 0.10, 0.92, 0.52),
    (-0.02, 0.50, 0.20, 0.95),
    (0.80, 0.50, 1.02, 0.95),
    (0.34, 0.38, 0.66, 0.60),
)


"""Eyes and brows, cheeks, nose."""


_SPELLS = (8, 14, 22)


"""Frames, about a third, a half and nearly one second, for which lips may stand."""


class MotionFeatureRecorder:
    """Every frame of a clip, as it passes.

    Args:
        turns: quarter turns to the left by which frames, as stored, become what is displayed.
    """

    def __init__(self, turns: int = 0) -> None:
        self._turns = turns
        self._small: list[Grey] = []
        self._waiting: list[Grey] = []
        self._measured: list[Floats] = []
        self._shape = (0, 0)
        self._watching = True

    def add(self, luma: Grey) -> None:
        """Take in the next frame: its brightness, (height, width), as stored."""
        if luma.shape != self._shape:
            self._measure(last=True)
            self._watching = self._shape == (0, 0)
            self._shape = luma.shape
            self._lines = spread(luma.shape[0], max(_LEAST_LINES, _PIXELS // luma.shape[1]))
        self._waiting.append(luma[self._lines])
        if len(self._waiting) > _BATCH:
            self._measure()
        if self._watching and len(self._small) < WATCHED:
            times = max(1, round(max(luma.shape) / _SMALL))
            small = np.asarray(Image.fromarray(np.ascontiguousarray(luma)).reduce(times))
            self._small.append(np.rot90(small, self._turns))

    def rhythm(self) -> dict[str, float]:
        """How what changes, what stays and the detail of the lines beat from frame to frame."""
        self._measure(last=True)
        beats = np.concatenate(self._measured, axis=1) if self._measured else np.zeros((len(_BEATS), 0))
        moving = beats[0] > _STILL
        passing = beats[:, moving if moving.sum() > _FEW else slice(None)]
        if passing.shape[1] < 2:
            passing = np.zeros((len(_BEATS), 2))
        features: dict[str, float] = {}
        for name, values, floor in zip(_BEATS, passing, _FLOORS, strict=True):
            _beat(name, np.log(values + floor), features)
        steps = np.diff(np.log(passing[-1] + _FLOORS[-1]))
        features["fine_rises"], features["fine_falls"] = (
            float(np.log(max(end, 0) + 0.005)) for end in (steps.max(), -steps.min())
        )
        return features

    def lips(self, boxes: Floats, at: Sequence[int]) -> dict[str, float]:
        """How much the mouth moves beside the rest of the face, by the quantile and by the spell.

        Args:
            boxes: (pictures, 4): the face in those that are looked at, in fractions of the displayed picture; where
                that was extended to be measured, they are those of what it was extended to, and lie somewhat off.
            at: numbers of their frames.
        """
        mouth, chin, *rest = self._changes((_MOUTH, _CHIN, *_REST), boxes, at)
        face = np.mean(rest, axis=0)
        if (moves := face > 0.15).sum() >= 10:
            mouth, chin, face = mouth[moves], chin[moves], face[moves]
        mouth, chin, face = (np.log(each + 0.2) for each in (mouth, chin, face))
        beside = mouth - face
        features = {f"lips_{share}": float(np.percentile(beside, share)) for share in (3, 10, 25, 50, 75, 90)}
        features["lips_range"] = features["lips_75"] - features["lips_10"]
        for spell in _SPELLS:
            long = min(spell, len(beside))
            means = sliding_window_view(beside, long).mean(1)
            features[f"lips_least_{spell}"] = least = float(means.min())
            features[f"lips_less_{spell}"] = features["lips_50"] - least
            features[f"lips_most_{spell}"] = float(means.max()) - least
            largest = sliding_window_view(mouth, long).max(1) - sliding_window_view(face, long).mean(1)
            features[f"lips_still_{spell}"] = float(largest.min())
        features["lips_spread"] = float(np.log(mouth.std() + 0.02))
        features["lips_with_face"], features["lips_with_chin"] = _correlation(mouth, face), _correlation(mouth, chin)
        features["chin_to_lips"] = float(np.median(chin - mouth))
        return features

    def _measure(self, last: bool = False) -> None:
        """Compare the frames that wait, each with the one before; the last one stays, for those to come."""
        if len(self._waiting) > 1:
            lines = np.stack(self._waiting)
            change = apart(lines[1:], lines[:-1])
            count, rows, width = change.shape
            whole = max(width // _RUN * _RUN, 1)
            run = _RUN if width >= _RUN else 1
            runs = change[..., :whole].reshape(count, rows, whole // run, run).max(-1)
            bends = np.abs(np.diff(lines[1:].astype(np.int16), 2))
            self._measured.append(np.stack([
                change.mean((1, 2), dtype=np.float32), (change == 0).mean((1, 2), dtype=np.float32),
                (runs <= 1).mean((1, 2), dtype=np.float32),
                bends.mean((1, 2), dtype=np.float32) if width > 2 else np.zeros(count, np.float32),
            ]))  # fmt: skip
        self._waiting = [] if last else self._waiting[-1:]

    def _changes(self, parts: Sequence[Box], boxes: Floats, at: Sequence[int]) -> Floats:
        """(parts, frames): mean change of parts of the face since the frame before, in grey levels."""
        count = len(self._small)
        if count < 2:
            return np.zeros((len(parts), 1))
        height, width = self._small[0].shape
        numbers, first = np.unique(at, return_index=True)
        frames = np.arange(1, count)
        followed = np.stack([np.interp(frames, numbers, edge) for edge in boxes[first].T], axis=1)
        corner, sides = followed[:, None, :2], followed[:, None, 2:] - followed[:, None, :2]
        size = np.array([width, height])
        inside = np.array(parts).reshape(1, -1, 2, 2)
        edges = (corner[:, :, None] + inside * sides[:, :, None]) * size
        starts = np.clip(np.floor(edges[:, :, 0]), 0, np.maximum(size - 2, 0)).astype(int)
        ends = np.maximum(np.clip(np.ceil(edges[:, :, 1]), 1, size).astype(int), starts + 1)
        low, high = starts.min((0, 1)), ends.max((0, 1))
        window = [small[low[1] : high[1], low[0] : high[0]] for small in self._small]
        starts, ends = starts - low, ends - low
        measured = np.empty((len(parts), count - 1))
        for number, (before, after) in enumerate(pairwise(window)):
            change = apart(after, before)
            for part, ((x, y), (stop_x, stop_y)) in enumerate(zip(starts[number], ends[number], strict=True)):
                measured[part, number] = change[y:stop_y, x:stop_x].mean()
        return measured


def running_median(values: Floats, width: int) -> Floats:
    """(n,): the median of so many values about each; their ends are repeated. `width`: odd."""
    padded = np.pad(values, width // 2, mode="edge")
    return np.asarray(np.median(sliding_window_view(padded, width), axis=1))


def _beat(name: str, values: Floats, features: dict[str, float]) -> None:
    """Quantiles of what a logarithm has been in each frame, and how it leaves its running median."""
    beat = values - running_median(values, _STEADY)
    features[f"{name}_beat"], features[f"{name}_beat_usual"] = (
        float(np.log(each + 0.003)) for each in (beat.std(), np.median(abs(beat)))
    )
    steps, turns = np.diff(values), np.diff(values, 2) if len(values) > 2 else np.zeros(1)
    features[f"{name}_turns"] = float(np.log((np.median(abs(turns)) + 0.003) / (np.median(abs(steps)) + 0.003)))
    again = np.array([_again(beat, lag) for lag in range(17)])
    for lag in _LAGS:
        features[f"{name}_again_{lag}"] = float(again[lag])
    features[f"{name}_again"], features[f"{name}_period"] = float(again[2:].max()), float(again[2:].argmax())
    features[f"{name}_skew"] = float(np.clip(((beat / (beat.std() + 1e-6)) ** 3).mean(), -9, 9))
    for share, value in zip((5, 25, 50, 75, 95), np.percentile(values, (5, 25, 50, 75, 95)), strict=True):
        features[f"{name}_{share}"] = float(value)


def _again(values: Floats, lag: int) -> float:
    """How far values are those of so many frames before, -1 to 1."""
    if len(values) <= lag + 4:
        return 0.0
    centred = values - values.mean()
    return float((centred[lag:] * centred[: len(values) - lag]).mean() / (centred.var() + 1e-9))


def _correlation(one: Floats, other: Floats) -> float:
    spread = float(one.std() * other.std())
    return float(((one - one.mean()) * (other - other.mean())).mean() / spread) if spread > 1e-9 else 0.0
