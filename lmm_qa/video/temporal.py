"""Frame dynamics: four numbers per frame, and what they say about stalls, frame rate, flicker and quality switches.

`FrameDynamicsRecorder` measures frames while they are decoded; the other functions interpret its `FrameDynamics`, in
which a frame that is held by its time counts like one that is repeated (`lmm_qa.video.playback`). Their
constants were fitted on degraded copies of real and generated clips, encoded again at constant rate factors of 10 to
28; `scripts/evaluate_temporal.py` evaluates them.

Knows nothing of files, models or scores. numpy only: importing scipy.ndimage would cost each decode worker 0.2 s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from lmm_qa.video.playback import playback

Floats = NDArray[np.float32]

Span = tuple[float, float]
"""Start and end in seconds."""

_TIME_TOLERANCE = 1e-3
"""Seconds by which rounding may miss a limit."""

# Measuring frames

_SAMPLES, _BLOCKS = 48, 12
"""Sampled pixels per side of a frame, and blocks per side that they form."""

_DETAIL_PAIRS, _MIN_DETAIL_ROWS = 9216, 8
"""Neighbouring pixels that are compared for `detail`, in whole rows."""

_BATCH = 32
"""Frames that are measured together: one by one, the numpy calls would cost more than the arithmetic."""

# Stalls and frame rate

STILL_CHANGE, STILL_RELATIVE = 0.3, 0.06
"""Grey levels, and share of the median change. A frame repeats the previous one if no block changes by more: encoders
leave a repeated picture below 0.1 once they have refined it, and a quiet face is above 0.5."""

_REFRESH_CHANGE, _REFRESH_RELATIVE, _REFRESH_INTERVAL = 1.0, 0.3, 0.1
"""A keyframe changes a still picture slightly: by less than these grey levels, or this share of the median change, with
the picture still for at least these seconds before and after."""

_MIN_STALL = 0.25
"""Seconds. Shorter ones are not noticed, and are common at low bit rates."""

_SIMILAR_LENGTH, _MAX_SIMILAR_SHARE = 3.0, 0.1
"""If most pictures are shown for long, the frame rate is low. So a picture counts as a stall only if the pictures shown
for at least a third as long are fewer than a tenth of the others."""

_REPEAT_SHARE, _REPEAT_RADIUS = 0.15, 0.3
"""At a low frame rate, a frame also repeats the previous one if it changes by less than this share of the largest
change within these seconds: encoders refine a new picture in the frames after it."""

# Quality switches

MIN_SWITCH_EVIDENCE = 0.09
"""Reached by 1 in 20 clips without a switch (see `switches`)."""

_COMPARED_SECONDS = 0.2
"""Length of the intervals before and after a frame whose detail is compared."""

_FULL_WEIGHT_CHANGE, _MIN_WEIGHT = 4.0, 0.3
"""A step of detail has weight 1 if the background changes by this multiple of its usual change, else less, down to the
minimum."""

_DRIFT_WEIGHT = 0.5
"""The steps beside a step, times this, are subtracted from it: a change of content takes longer than a frame."""

_CUT_CHANGE = 12.0
"""Grey levels by which the background changes more than usual at a scene cut; at a switch it stays below 9."""

_OTHER_END_SHARE = 0.3
"""Evidence for one end of a switch, as a share of that for the other, from which both ends are reported."""

_MIN_SWITCH = 0.4
"""Seconds."""


@dataclass(frozen=True)
class FrameDynamics:
    """Measurements of every frame of a clip: arrays (frames,) float32. A held frame is there several times."""

    seconds: Floats
    """When each frame is shown, after the first one."""
    duration: float
    """Seconds from the start of the first frame to the end of the last."""
    peak_change: Floats
    """Mean absolute change since the previous frame in the block that changed most, in grey levels (0 to 255); 0 for
    the first frame. In a photograph with a speaking mouth, that is the mouth."""
    background_change: Floats
    """The same at the lower quartile of the blocks: the background, if the camera is fixed."""
    detail: Floats
    """Mean square root of the difference between horizontal neighbours, in grey levels: counts texture and edges."""
    brightness: Floats
    """Mean luma, in grey levels."""


@dataclass(frozen=True)
class Cadence:
    """How pictures follow each other while the clip is not stalled."""

    rate: float
    """Different pictures per second; 0 for a clip that is always stalled."""
    unevenness: float
    """Standard deviation of the time for which each is shown, relative to the mean: 0 for a steady clip."""


class FrameDynamicsRecorder:
    """Measures frames as they come; stores numbers, and samples of only the most recent frames."""

    def __init__(self) -> None:
        self._shape = (0, 0)
        self._rows: list[NDArray[np.uint8]] = []
        self._previous: NDArray[np.uint8] | None = None
        self._measured: list[Floats] = []

    def add(self, luma: NDArray[np.uint8]) -> None:
        """Measure the next frame: luma (height, width) uint8."""
        if luma.shape != self._shape:
            self._measure_batch()
            self._shape = luma.shape
            self._row_numbers, self._column_numbers = (evenly_spaced(side, _SAMPLES) for side in luma.shape)
        self._rows.append(luma[self._row_numbers])
        if len(self._rows) == _BATCH:
            self._measure_batch()

    def dynamics(self, seconds: Sequence[float], duration: float) -> FrameDynamics:
        """Return the measurements.

        Args:
            seconds: when each frame appears, from 0.
            duration: of the clip, seconds.
        """
        self._measure_batch()
        shown = playback(seconds, duration)
        peak, background, detail, brightness = np.concatenate(self._measured, axis=1)[:, shown.frames]
        repeated = np.diff(shown.frames, prepend=-1) == 0
        peak[repeated] = background[repeated] = 0
        return FrameDynamics(np.array(shown.seconds, np.float32), duration, peak, background, detail, brightness)

    def _measure_batch(self) -> None:
        if not self._rows:
            return
        rows = np.stack(self._rows)
        samples = rows[..., self._column_numbers]
        previous = np.concatenate([samples[:1] if self._previous is None else self._previous, samples[:-1]])
        change, step = absolute_difference(samples, previous).astype(np.float32), _SAMPLES // _BLOCKS
        # Adding slices is as fast as a matrix product, and starts no threads.
        across = sum((change[..., start::step] for start in range(1, step)), start=change[..., ::step])
        changes = (across.reshape(len(rows), _BLOCKS, step, _BLOCKS).sum(axis=2) / step**2).reshape(len(rows), -1)
        quarter = changes.shape[1] // 4
        background = np.partition(changes, quarter)[:, quarter]
        lines = rows[:, :: max(1, _SAMPLES // max(_MIN_DETAIL_ROWS, _DETAIL_PAIRS // rows.shape[2]))]
        steps = absolute_difference(lines[..., 1:], lines[..., :-1]).astype(np.float32)
        roots = np.sqrt(steps).reshape(len(rows), -1)
        detail = roots.sum(axis=1) / max(1, roots.shape[1])
        brightness = samples.mean(axis=(1, 2), dtype=np.float32)
        self._measured.append(np.stack([changes.max(axis=1), background, detail, brightness]))
        self._previous, self._rows = samples[-1:], []


def evenly_spaced(length: int, count: int) -> NDArray[np.intp]:
    """Indices of the centres of `count` equal parts of an axis."""
    return (2 * np.arange(count) + 1) * length // (2 * count)


def absolute_difference(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """|a - b| without leaving uint8."""
    return np.maximum(a, b) - np.minimum(a, b)


# Stalls and frame rate


def buffering(dynamics: FrameDynamics) -> Span | None:
    """When the first picture stands still before the clip plays; None if it plays at once."""
    initial = [span for span in _still_spans(dynamics) if span[0] == 0 and span[1] < dynamics.duration]
    return initial[0] if initial else None


def stalls(dynamics: FrameDynamics) -> list[Span]:
    """When the clip stands still later on; the whole clip if nothing ever moves."""
    return [span for span in _still_spans(dynamics) if span[0] > 0 or span[1] >= dynamics.duration]


def cadence(dynamics: FrameDynamics) -> Cadence:
    """Rate and regularity of the pictures outside stalls."""
    radius = max(2, round(_REPEAT_RADIUS * len(dynamics.peak_change) / dynamics.duration))
    largest = _around(dynamics.peak_change, radius).max(axis=1)
    still = _still_spans(dynamics)
    pictures = _picture_spans(dynamics, np.maximum(STILL_CHANGE, _REPEAT_SHARE * largest))
    shown = np.array([end - start for start, end in pictures if not any(span[0] <= start < span[1] for span in still)])
    if not shown.size:
        return Cadence(0.0, 0.0)
    return Cadence(float(1 / shown.mean()), float(shown.std() / shown.mean()))


def _still_spans(dynamics: FrameDynamics) -> list[Span]:
    """When a picture stands still although others do not."""
    moving = dynamics.peak_change[1:][dynamics.peak_change[1:] >= STILL_CHANGE]
    usual = float(np.median(moving)) if moving.size else 0.0
    pictures: list[Span] = []
    for start, end in _picture_spans(dynamics, np.float32(max(STILL_CHANGE, STILL_RELATIVE * usual))):
        change = dynamics.peak_change[np.searchsorted(dynamics.seconds, start)]
        refreshed = change < max(_REFRESH_CHANGE, _REFRESH_RELATIVE * usual)
        if refreshed and pictures and min(start - pictures[-1][0], end - start) >= _REFRESH_INTERVAL - _TIME_TOLERANCE:
            pictures[-1] = (pictures[-1][0], end)
        else:
            pictures.append((start, end))
    shown = np.array([end - start for start, end in pictures])
    similar = len(shown) - np.searchsorted(np.sort(shown * _SIMILAR_LENGTH), shown)  # how many are as long; itself too
    long_enough = shown >= _MIN_STALL - _TIME_TOLERANCE
    still = long_enough & ((similar == 1) | (similar - 1 < _MAX_SIMILAR_SHARE * (len(shown) - similar)))
    return [pictures[number] for number in np.flatnonzero(still)]


def _picture_spans(dynamics: FrameDynamics, limit: Floats | np.float32) -> list[Span]:
    """When each different picture is shown: a frame is one if it changes by `limit`, (frames,) or one for all."""
    new = dynamics.peak_change >= limit
    new[0] = True
    return list(pairwise([*dynamics.seconds[new].tolist(), dynamics.duration]))


# Flicker


def flicker(dynamics: FrameDynamics) -> float:
    """Relative deviation of a frame's brightness from the mean of its neighbours; the median over the moving frames.

    It is near 0 in a clip that does not flicker, whatever moves and however the light changes slowly.
    """
    light = np.log(dynamics.brightness + 1)
    deviation = np.abs(light[1:-1] - (light[:-2] + light[2:]) / 2)
    moving = dynamics.peak_change[1:-1] >= STILL_CHANGE
    return float(np.median(deviation[moving])) if moving.any() else 0.0


# Quality switches


def switches(
    dynamics: FrameDynamics,
    min_evidence: float = MIN_SWITCH_EVIDENCE,
    evidence: NDArray[np.float64] | None = None,
) -> list[Span]:
    """When the clip has clearly less detail than before and after: a switch of the bit rate.

    Args:
        dynamics: of the clip.
        min_evidence: see `switch_evidence`; 0 for the most likely span in a clip that is known to have a switch.
        evidence: `switch_evidence` of the clip, if it is known.

    Returns:
        none or one: the span of poorer quality that stands out most; from the start or to the end of the clip if only
        its other end shows.
    """
    evidence = switch_evidence(dynamics) if evidence is None else evidence.copy()
    near_start, near_end = dynamics.seconds < _MIN_SWITCH, dynamics.seconds > dynamics.duration - _MIN_SWITCH
    evidence[near_start] = evidence[near_start].clip(max=0)
    evidence[near_end] = evidence[near_end].clip(min=0)
    down, up = int(evidence.argmin()), int(evidence.argmax())
    strongest = max(-evidence[down], evidence[up])
    if strongest < max(min_evidence, 1e-6):
        return []
    first, last, both = _best_pair(evidence, dynamics.seconds)
    if both >= _OTHER_END_SHARE * strongest:
        return [(float(dynamics.seconds[first]), float(dynamics.seconds[last]))]
    if evidence[up] == strongest:
        return [(0.0, float(dynamics.seconds[up]))]
    return [(float(dynamics.seconds[down]), dynamics.duration)]


def switch_evidence(dynamics: FrameDynamics) -> NDArray[np.float64]:
    """(frames,): evidence that detail steps up with a frame; negative for a step down.

    Detail changes slowly with content; at a switch it steps from one frame to the next, and in the same frame the
    background changes too. The evidence is the step of log detail, less its drift nearby, times a weight for the change
    of the background; 0 near a scene cut.
    """
    count = len(dynamics.seconds)
    near = max(3, round(_COMPARED_SECONDS * count / dynamics.duration))
    if count < 4:
        return np.zeros(count)
    median = _trailing_medians(np.log(dynamics.detail + 0.05), near)
    step = np.zeros(count)
    step[2:-1] = (median[near:] - median[:-near])[2:-1]
    beside = np.pad(np.abs(step), near)
    drift = np.maximum(beside[: -2 * near], beside[2 * near :])
    step = np.sign(step) * np.maximum(0, np.abs(step) - _DRIFT_WEIGHT * drift)
    background = dynamics.background_change
    level = _trailing_medians(np.concatenate([background[1:2], background[1:]]), near)
    usual = np.maximum(level[:-near], level[near:])
    spike = np.minimum(background / (usual + 0.05) / _FULL_WEIGHT_CHANGE, 1)
    # Medians place a step to within a frame; the background change places it exactly.
    neighbours = _around(step, 1)[:, [1, 0, 2]]
    step = np.take_along_axis(neighbours, np.abs(neighbours).argmax(1)[:, None], 1)[:, 0]
    step[_around(background - usual >= _CUT_CHANGE, near).any(axis=1)] = 0
    return np.asarray(step * (_MIN_WEIGHT + (1 - _MIN_WEIGHT) * spike), dtype=np.float64)


def _best_pair(evidence: NDArray[np.float64], seconds: Floats) -> tuple[int, int, float]:
    """The step down and the later step up whose smaller size is the largest possible; and that size."""
    best, lowest, earlier = (0, 0, 0.0), 0, 0
    for last in range(len(evidence)):
        while seconds[last] - seconds[earlier] >= _MIN_SWITCH:
            if evidence[earlier] < evidence[lowest]:
                lowest = earlier
            earlier += 1
        both = float(min(-evidence[lowest], evidence[last]))
        if both > best[2]:
            best = lowest, last, both
    return best


def _around(values: NDArray[Any], radius: int) -> NDArray[Any]:
    """(n, 2 * radius + 1): the values around each, 0 outside."""
    return sliding_window_view(np.pad(values, radius), 2 * radius + 1)


def _trailing_medians(values: Floats, width: int) -> Floats:
    """(frames + width,): the median of up to `width` values before each place.

    scipy.ndimage.median_filter differs: at the ends, and for an even width.
    """
    padded = np.pad(values, width, constant_values=np.nan)
    windows = sliding_window_view(padded, width)[1:-1]
    return np.concatenate([values[:1], np.nanmedian(windows, axis=1)])
