"""Choose which frames of a clip are used, by presentation time. Pure functions.

Their frames are the moments of `lmm_qa.video.playback`: a frame that is held is there several times.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

import numpy as np

from lmm_qa.config import Sampling
from lmm_qa.video.temporal import Span

_TOLERANCE = 1e-6
"""Seconds by which rounding may shift a time."""


def sample_indices(seconds: Sequence[float], sampling: Sampling) -> list[int]:
    """Choose frames.

    Args:
        seconds: when each frame of the clip appears, from 0, not decreasing; at least one.
        sampling: see `lmm_qa.config.Sampling`.

    Returns:
        Frame numbers in 0..len(seconds) - 1, not decreasing, except that `pairs` can overlap. Exactly `sampling.frames`
        of them, except for `fps`: one per step of 1/fps seconds, or `sampling.frames` at uniform distances if there
        are more steps than that.
    """
    if sampling.strategy == "linspace":
        return [round(place) for place in np.linspace(0, len(seconds) - 1, sampling.frames).tolist()]
    if sampling.strategy == "pairs":
        first_frames = _uniform_indices(seconds, sampling.frames // 2, sampling.phase)
        return [index for first in first_frames for index in _pair(seconds, first, sampling.gap)]
    if sampling.strategy == "fps":
        # The tolerance keeps a frame that rounding puts just after its step.
        steps = int(seconds[-1] * sampling.fps + _TOLERANCE) + 1
        if steps <= sampling.frames:
            return [_frame_at(seconds, (step + sampling.phase - 0.5) / sampling.fps) for step in range(steps)]
    return _uniform_indices(seconds, sampling.frames, sampling.phase)


def window_spans(duration: float, window: float, step: float) -> list[Span]:
    """Cover a clip with windows, the last of which ends with it; a clip no longer than a window has one.

    Args:
        duration: of the clip, seconds.
        window: length of each, seconds, above 0.
        step: seconds between the starts of windows, above 0.
    """
    last_start = duration - window
    if last_start <= _TOLERANCE:
        return [(0.0, duration)]
    starts = [number * step for number in range(math.ceil(last_start / step - _TOLERANCE))]
    return [(start, start + window) for start in starts] + [(last_start, duration)]


def frames_in_span(seconds: Sequence[float], span: Span) -> range:
    """The frames that appear in a span of time; if none does, the one that is on screen."""
    first, stop = (bisect_left(seconds, edge - _TOLERANCE) for edge in span)
    return range(first, stop) if stop > first else range(first - 1, first)


def _uniform_indices(seconds: Sequence[float], count: int, phase: float) -> list[int]:
    """Divide a clip into equal parts and take the frame that is on screen at a phase in 0..1 of each part."""
    places, frames = _places(seconds), len(seconds)
    return [max(0, bisect_right(places, (part + phase) * frames / count) - 1) for part in range(count)]


def _places(seconds: Sequence[float]) -> Sequence[float]:
    """Where each frame starts, if the whole clip has the length of its number of frames.

    Rounded times and jitter change nothing: if each frame starts within half a place of its number, that is its place.
    """
    frames = len(seconds)
    last = median([after - before for before, after in pairwise(seconds)]) if frames > 1 else 1.0
    scale = frames / (seconds[-1] + last) if seconds[-1] + last > 0 else 1.0
    places = [second * scale for second in seconds]
    even = all(abs(place - number) < 0.5 for number, place in enumerate(places))
    return range(frames) if even or not seconds[-1] else places


def _frame_at(seconds: Sequence[float], time: float) -> int:
    """The frame on screen at a time: the last one that has appeared by then."""
    return max(0, bisect_right(seconds, time + _TOLERANCE) - 1)


def _pair(seconds: Sequence[float], first: int, gap: float) -> tuple[int, int]:
    """A frame and the one `gap` seconds, at least one frame, later; both earlier if the clip ends before that."""
    last = len(seconds) - 1
    if seconds[first] + gap > seconds[last] + _TOLERANCE:
        return max(0, min(first, last - 1, _frame_at(seconds, seconds[last] - gap))), last
    second = _frame_at(seconds, seconds[first] + gap)
    return (first, second) if second > first else (min(first, max(0, last - 1)), min(first + 1, last))
