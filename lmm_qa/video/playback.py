"""A clip as a screen with a constant clock shows it: a frame that is held is shown several times.

Sampling and measuring go by these moments. So a file with variable frame rate is treated like its playback at a
constant rate. If the rate is constant, apart from jitter, the moments are the frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_REPEATS = 10_000
"""Repeats in a clip; 400 s at 25 per second. If frames are held for longer, their repeats are further apart."""

_SHORTEST_HOLD = 1.75
"""Intervals between frames, as multiples of the usual one, from which a frame counts as held and not as jitter."""


@dataclass(frozen=True)
class Playback:
    """The moments at which a screen shows a clip."""

    frames: tuple[int, ...]
    """Number of the frame that is shown, 0 for the first, not decreasing; every frame is shown."""
    seconds: tuple[float, ...]
    """Time of each moment after the first one."""


def playback(seconds: Sequence[float], duration: float) -> Playback:
    """Repeat the frames that are held for two usual intervals or more.

    The usual interval is the median: jitter, and a frame rate that changes a little, repeat nothing.

    Args:
        seconds: when each frame appears, from 0, not decreasing; at least one.
        duration: of the clip, seconds.
    """
    times = np.asarray(seconds, np.float64)
    intervals = np.diff(times, append=max(duration, times[-1]))
    positive = intervals[:-1][intervals[:-1] > 0]
    if not positive.size:
        return Playback(tuple(range(len(times))), tuple(seconds))
    usual = max(float(np.median(positive)), 1e-6)
    shown = np.maximum(1, (intervals / usual + (2 - _SHORTEST_HOLD)).astype(np.int64))
    if (repeats := int((shown - 1).sum())) > MAX_REPEATS:
        shown = 1 + ((shown - 1) * (MAX_REPEATS / repeats)).astype(np.int64)
    frames = np.repeat(np.arange(len(times)), shown)
    since_first = np.arange(len(frames)) - (np.cumsum(shown) - shown)[frames]
    return Playback(tuple(frames.tolist()), tuple((times[frames] + since_first * (intervals / shown)[frames]).tolist()))
