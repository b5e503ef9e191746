"""When a clip's picture stands, flickers, or switches its quality: from four numbers measured of every frame.

Knows nothing of files, models or scores; numpy only. `FrameDynamicsRecorder` measures while frames are decoded; `buffering`, `stalls`,
`switches`, `pace` and `flicker` say what the numbers mean. The constants were set on damaged copies of real and
generated clips, encoded again at constant rate factors 10 to 28; `scripts/when.py` shows what comes of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Floats = NDArray[np.float32]


Span = tuple[float, float]


"""Seconds, from and to."""


_SIDE, _BLOCKS = 48, 12


"""Samples a side, and blocks a side that they make."""


_PAIRS, _LEAST_ROWS = 9216, 8


"""Neighbours whose difference is measured, in whole rows."""


_BATCH = 32


"""Frames that are measured at once: one by one, the calls would cost more than what they do."""


STANDS, STANDS_BESIDE = 0.3, 0.06


"""Grey levels, and a share of what frames usually change by. A picture is the one before where no block changes by
more: encoders leave a standing picture under 0.1 once they have refined it, and a quiet face is over 0.5."""


REFRESH, REFRESH_BESIDE, REFRESH_APART = 1.0, 0.3, 0.1


"""A keyframe changes a standing picture a little: less than so many grey levels, or than this share of what frames
usually change by, and the picture stands for at least so many seconds before and after."""


LEAST_STILL = 0.25


"""Seconds. What stands for less is not noticed, and is common in what is encoded at a low rate."""


ALIKE, FEW = 3.0, 0.1


"""Pictures that all stand are a low frame rate: those that stand at least a third as long must be less than a tenth of
the rest."""


REPEATS, REPEATS_NEAR = 0.15, 0.3


"""Of a low frame rate, a picture is the one before also where it changes by less than this share of the largest change
within so many seconds: by what an encoder refines in the frames that follow a new picture."""


SWITCH = 0.09


"""Evidence (see `switches`) that 1 in 20 clips without a switch has as well."""


_HAIR = 1e-3


"""Seconds by which rounding may miss a limit."""


_NEAR = 0.2


"""Seconds before and after a moment in which detail is compared."""


_SPIKE, _PLAIN = 4.0, 0.3


"""When the quiet parts change by so many times the usual, a step of detail counts whole; when they do not, so much."""


DRIFT = 0.5


"""Steps beside a step by which, times this, it counts less: what is seen changes for longer than a frame."""


CUT = 12.0


"""Grey levels by which quiet parts change more than usual where another scene begins; a switch stays under 9."""


_OTHER_END = 0.3


"""Evidence for one end of a switch, as a share of that for the other, with which both are taken to be there."""


_LEAST_SWITCH = 0.4


"""Seconds."""


@dataclass(frozen=True)
class FrameDynamics:
    """What was measured of every frame of a clip: arrays (frames,) float32."""

    seconds: Floats
    """When each frame appears, after the first one."""
    duration: float
    """Seconds from the first frame's appearance to the last one's end."""
    peak: Floats
    """By how much the block changed that changed most since the frame before, in mean grey levels (of 255); 0 for the
    first. On a photograph whose mouth speaks, that is the mouth."""
    quiet: Floats
    """The same of the block that three in four change more than: the background, where the camera stands."""
    detail: Floats
    """Mean root of the difference between neighbours in a row, in grey levels: texture counts as well as edges."""
    light: Floats
    """Mean brightness, in grey levels."""


@dataclass(frozen=True)
class Pace:
    """How pictures follow each other, where the clip does not stand."""

    rate: float
    """Different pictures a second."""
    uneven: float
    """Standard deviation of the time for which each is shown, as a share of the mean: 0 for a steady clip."""


class FrameDynamicsRecorder:
    """Measures frames as they come, and keeps nothing of them but numbers and small samples of the last ones."""

    def __init__(self) -> None:
        self._shape = (0, 0)
        self._rows: list[NDArray[np.uint8]] = []
        self._before: NDArray[np.uint8] | None = None
        self._measured: list[Floats] = []

    def add(self, luma: NDArray[np.uint8]) -> None:
        """Measure the next frame: its brightness, (height, width)."""
        if luma.shape != self._shape:
            self._measure()
            self._shape = luma.shape
            self._down, self._across = (spread(side, _SIDE) for side in luma.shape)
        self._rows.append(luma[self._down])
        if len(self._rows) == _BATCH:
            self._measure()

    def dynamics(self, seconds: Sequence[float], duration: float) -> FrameDynamics:
        """What was measured, of frames that appear at these seconds and last so long together."""
        self._measure()
        return FrameDynamics(np.array(seconds, np.float32), duration, *np.concatenate(self._measured, axis=1))

    def _measure(self) -> None:
        """Measure the frames that wait."""
        if not self._rows:
            return
        rows = np.stack(self._rows)
        pictures = rows[..., self._across]
        before = np.concatenate([pictures[:1] if self._before is None else self._before, pictures[:-1]])
        change, step = apart(pictures, before).astype(np.float32), _SIDE // _BLOCKS
        # Slices instead of a product of matrices: as quick, and no threads that wait for more.
        across = sum((change[..., start::step] for start in range(1, step)), start=change[..., ::step])
        changes = (across.reshape(len(rows), _BLOCKS, step, _BLOCKS).sum(axis=2) / step**2).reshape(len(rows), -1)
        quarter = changes.shape[1] // 4
        lines = rows[:, :: max(1, _SIDE // max(_LEAST_ROWS, _PAIRS // rows.shape[2]))]
        roots = np.sqrt(apart(lines[..., 1:], lines[..., :-1]).astype(np.float32)).reshape(len(rows), -1)
        detail = roots.sum(axis=1) / max(1, roots.shape[1])
        quiet, light = np.partition(changes, quarter)[:, quarter], pictures.mean(axis=(1, 2), dtype=np.float32)
        self._measured.append(np.stack([changes.max(axis=1), quiet, detail, light]))
        self._before, self._rows = pictures[-1:], []


def spread(side: int, count: int) -> NDArray[np.intp]:
    """The middles of so many equal shares of a side."""
    return (2 * np.arange(count) + 1) * side // (2 * count)


def apart(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Absolute difference, in whole grey levels."""
    return np.maximum(one, other) - np.minimum(one, other)


# Pictures that stand


def buffering(dynamics: FrameDynamics) -> Span | None:
    """The seconds for which the first picture stands before the clip plays; None where it plays at once."""
    first = [span for span in _stills(dynamics) if span[0] == 0 and span[1] < dynamics.duration]
    return first[0] if first else None


def stalls(dynamics: FrameDynamics) -> list[Span]:
    """The seconds for which a later picture stands; all of a clip in which nothing ever moves."""
    return [span for span in _stills(dynamics) if span[0] > 0 or span[1] >= dynamics.duration]


def pace(dynamics: FrameDynamics) -> Pace:
    """How pictures follow each other, where the clip does not stand. A clip that always stands has a rate of 0."""
    near = max(2, round(REPEATS_NEAR * len(dynamics.peak) / dynamics.duration))
    largest = sliding_window_view(np.pad(dynamics.peak, near), 2 * near + 1).max(axis=1)
    stills = _stills(dynamics)
    pictures = _shown(dynamics, np.maximum(STANDS, REPEATS * largest))
    shown = np.array(
        [to - start for start, to in pictures if not any(still[0] <= start < still[1] for still in stills)]
    )
    if not shown.size:
        return Pace(0.0, 0.0)
    return Pace(float(1 / shown.mean()), float(shown.std() / shown.mean()))


def _stills(dynamics: FrameDynamics) -> list[Span]:
    """Pictures that stand although others do not."""
    moving = dynamics.peak[1:][dynamics.peak[1:] >= STANDS]
    usual = float(np.median(moving)) if moving.size else 0.0
    pictures: list[Span] = []
    for start, to in _shown(dynamics, np.float32(max(STANDS, STANDS_BESIDE * usual))):
        refreshed = dynamics.peak[np.searchsorted(dynamics.seconds, start)] < max(REFRESH, REFRESH_BESIDE * usual)
        if refreshed and pictures and min(start - pictures[-1][0], to - start) >= REFRESH_APART - _HAIR:
            pictures[-1] = (pictures[-1][0], to)
        else:
            pictures.append((start, to))
    shown = np.array([to - start for start, to in pictures])
    alike = (shown * ALIKE >= shown[:, None]).sum(axis=1)
    still = (shown >= LEAST_STILL - _HAIR) & ((alike == 1) | (alike - 1 < FEW * (len(shown) - alike)))
    return [pictures[number] for number in np.flatnonzero(still)]


def _shown(dynamics: FrameDynamics, limit: Floats | np.float32) -> list[Span]:
    """When each different picture is shown: those that change by no less than a limit, (frames,) or one for all."""
    new = dynamics.peak >= limit
    new[0] = True
    return list(pairwise([*dynamics.seconds[new].tolist(), dynamics.duration]))


# Brightness that jumps


def flicker(dynamics: FrameDynamics) -> float:
    """By what share of itself the brightness leaves, in the middle of its frames, the way from the one before to the
    one after: it is steady in a clip that does not flicker, whatever moves and however the light changes slowly.
    Frames in which the picture stands are not counted."""
    light = np.log(dynamics.light + 1)
    leaves = np.abs(light[1:-1] - (light[:-2] + light[2:]) / 2)
    moves = dynamics.peak[1:-1] >= STANDS
    return float(np.median(leaves[moves])) if moves.any() else 0.0


# Quality that switches


def switches(dynamics: FrameDynamics, least: float = SWITCH) -> list[Span]:
    """The seconds in which the clip has clearly less detail than before and after: a bit-rate switch.

    Detail changes with what is seen, but slowly; with a switch it steps from one frame to the next, and in the same
    frame the parts that were quiet change too. The evidence for a moment is the step of the logarithm of detail, less
    what it drifts by beside it, times a weight for the change of the quiet parts. About a cut to another scene there is
    none.

    Args:
        dynamics: of the clip.
        least: evidence that is needed; 0 for the likeliest seconds in a clip that is known to have a switch.

    Returns:
        none or one: the poorer seconds that stand out most; from the beginning, or until the end, where only the other
        end of them shows.
    """
    evidence = switching(dynamics)
    begins, ends = dynamics.seconds < _LEAST_SWITCH, dynamics.seconds > dynamics.duration - _LEAST_SWITCH
    evidence[begins] = evidence[begins].clip(max=0)
    evidence[ends] = evidence[ends].clip(min=0)
    down, up = int(evidence.argmin()), int(evidence.argmax())
    strongest = max(-evidence[down], evidence[up])
    if strongest < max(least, 1e-6):
        return []
    first, last, both = _best_pair(evidence, dynamics.seconds)
    if both >= _OTHER_END * strongest:
        return [(float(dynamics.seconds[first]), float(dynamics.seconds[last]))]
    if evidence[up] == strongest:
        return [(0.0, float(dynamics.seconds[up]))]
    return [(float(dynamics.seconds[down]), dynamics.duration)]


def _best_pair(evidence: NDArray[np.float64], seconds: Floats) -> tuple[int, int, float]:
    """The step down and the later step up of which the lesser is the largest, and how large that is."""
    best, lowest, earlier = (0, 0, 0.0), 0, 0
    for last in range(len(evidence)):
        while seconds[last] - seconds[earlier] >= _LEAST_SWITCH:
            if evidence[earlier] < evidence[lowest]:
                lowest = earlier
            earlier += 1
        both = float(min(-evidence[lowest], evidence[last]))
        if both > best[2]:
            best = lowest, last, both
    return best


def switching(dynamics: FrameDynamics) -> NDArray[np.float64]:
    """(frames,): evidence that detail steps up with a frame; below 0: down."""
    count = len(dynamics.seconds)
    near = max(3, round(_NEAR * count / dynamics.duration))
    if count < 4:
        return np.zeros(count)
    median = _medians(np.log(dynamics.detail + 0.05), near)
    step = np.zeros(count)
    step[2:-1] = (median[near:] - median[:-near])[2:-1]
    beside = np.pad(np.abs(step), near)
    step = np.sign(step) * np.maximum(0, np.abs(step) - DRIFT * np.maximum(beside[: -2 * near], beside[2 * near :]))
    level = _medians(np.concatenate([dynamics.quiet[1:2], dynamics.quiet[1:]]), near)
    usual = np.maximum(level[:-near], level[near:])
    spike = np.minimum(dynamics.quiet / (usual + 0.05) / _SPIKE, 1)
    # Medians are exact to a frame or so; what the quiet parts do, to the frame.
    close = np.pad(step, 1)
    close = np.stack([close[1:-1], close[:-2], close[2:]])
    step = np.take_along_axis(close, np.abs(close).argmax(0)[None], 0)[0]
    cut = sliding_window_view(np.pad(dynamics.quiet - usual >= CUT, near), 2 * near + 1).any(axis=1)
    step[cut] = 0
    return np.asarray(step * (_PLAIN + (1 - _PLAIN) * spike), dtype=np.float64)


def _medians(values: Floats, width: int) -> Floats:
    """(frames + width,): the median of the values from `width` before each place up to it, of those that there are."""
    padded = np.pad(values, width, constant_values=np.nan)
    windows = sliding_window_view(padded, width)[1:-1]
    return np.concatenate([values[:1], np.nanmedian(windows, axis=1)])
