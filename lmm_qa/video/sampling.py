"""TODO-DOC video.sampling."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmm_qa.config import Sampling
from lmm_qa.video.temporal import Span

if TYPE_CHECKING:
    pass


# Which frames, which pixels: pure


def sample_indices(seconds: Sequence[float], sampling: Sampling) -> list[int]:
    """Choose frames.

    Args:
        seconds: when each frame of the clip appears, from 0, not decreasing; at least one.
        sampling: see `lmm_qa.config.Sampling`.

    Returns:
        frame numbers in 0..len(seconds) - 1, not decreasing, save that `pairs` can overlap. Exactly `sampling.frames`
        of them, except for `fps`: one for each step of 1/fps seconds, and `sampling.frames` spread uniformly where the
        steps are more than that.
    """
    if sampling.strategy == "pairs":
        moments = _spread(len(seconds), sampling.frames // 2, sampling.phase)
        return [index for moment in moments for index in _pair(seconds, moment, sampling.gap)]
    if sampling.strategy == "fps":
        # The tolerance keeps a frame that rounding puts a hair's breadth after the step that asks for it.
        steps = int(seconds[-1] * sampling.fps + 1e-6) + 1
        if steps <= sampling.frames:
            return [_shown_at(seconds, (step + sampling.phase - 0.5) / sampling.fps) for step in range(steps)]
    return _spread(len(seconds), sampling.frames, sampling.phase)


def _spread(frames: int, shares: int, phase: float) -> list[int]:
    """One frame of each equal share of a clip."""
    return [int((share + phase) * frames / shares) for share in range(shares)]


def _shown_at(seconds: Sequence[float], moment: float) -> int:
    """The frame on screen at a moment: the last one that has appeared by then."""
    return max(0, bisect_right(seconds, moment + 1e-6) - 1)


def _pair(seconds: Sequence[float], first: int, gap: float) -> tuple[int, int]:
    """A frame and the one `gap` seconds, at least one frame, later; both earlier where the clip ends before that."""
    last = len(seconds) - 1
    if seconds[first] + gap > seconds[last] + 1e-6:
        return max(0, min(first, last - 1, _shown_at(seconds, seconds[last] - gap))), last
    second = _shown_at(seconds, seconds[first] + gap)
    return (first, second) if second > first else (min(first, max(0, last - 1)), min(first + 1, last))


def window_spans(duration: float, window: float, step: float) -> list[Span]:
    """Cover a clip with windows, the last of which ends with it; a clip that is no longer than a window has one.

    Args:
        duration: of the clip, seconds.
        window: length of each, seconds, above 0.
        step: seconds from the beginning of one to that of the next, above 0.
    """
    room = duration - window
    if room <= 1e-6:
        return [(0.0, duration)]
    starts = [number * step for number in range(math.ceil(room / step - 1e-6))]
    return [(start, start + window) for start in starts] + [(room, duration)]


def _within(seconds: Sequence[float], span: Span) -> range:
    """The frames that appear in a span; the one that is on screen where none does."""
    first, stop = (bisect_left(seconds, edge - 1e-6) for edge in span)
    return range(first, stop) if stop > first else range(first - 1, first)
