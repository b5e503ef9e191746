"""Degradations of the sound of a clip, and the sound of clips whose pictures are degraded.

Sound that is early or late is labelled with the opinions of people on THQA-NTIRE: `sync_quality`. A model that does not
hear cannot learn from such copies, so they are made on request only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

from lmm_qa.video.sound import Waveform

LEAST_OFFSET, GREATEST_OFFSET = 0.04, 1.5
"""Seconds by which the sound is early or late at strength 0 (almost) and 1."""

MAX_DRIFT = 0.01
"""By how much slower the sound is played at strength 1."""

UNDAMAGED = 3.6
"""MOS of 5 that is assumed for the clips of THQA-NTIRE whose opinions `sync_quality` uses, without their offset."""

OPINIONS = {-1.5: 1.25, -1.0: 1.41, -0.5: 1.853, -0.045: UNDAMAGED, 0.125: UNDAMAGED, 0.5: 2.689, 1.0: 1.314, 1.5: 0.95}
"""MOS of 5 of sound that is late by so many seconds, see `sync_quality`."""

_CURVE = PchipInterpolator(list(OPINIONS), list(OPINIONS.values()))


@dataclass(frozen=True)
class _Source:
    """The sound to degrade."""

    waveform: Waveform
    """Starts with the pictures, and may go on after them."""
    seconds: float
    """Length of the pictures."""
    other: Waveform | None
    """The sound of another clip."""

    def samples(self, seconds: float) -> int:
        return round(seconds * self.waveform.rate)

    def shifted(self, late: float) -> NDArray[np.float32]:
        """The sound `late` seconds later (earlier if negative), silent where there is none."""
        values, by = self.waveform.values, self.samples(abs(late))
        padding = np.zeros((len(values), by), np.float32)
        return np.concatenate([padding, values] if late > 0 else [values[:, by:], padding], axis=1)


@dataclass(frozen=True)
class DegradedSound:
    """Degraded sound."""

    waveform: Waveform
    """Exactly as long as the pictures."""
    quality: float
    """0 to 1, of a perfect clip with this sound."""


def audio_lead(source: _Source, strength: float, rng: np.random.Generator) -> tuple[NDArray[np.float32], float]:
    """The sound is early, by 0.04 to 1.5 s."""
    offset = _offset(strength)
    return source.shifted(-offset), sync_quality(-offset)


def audio_lag(source: _Source, strength: float, rng: np.random.Generator) -> tuple[NDArray[np.float32], float]:
    """The sound is late, by 0.04 to 1.5 s."""
    offset = _offset(strength)
    return source.shifted(offset), sync_quality(offset)


def wrong_audio(source: _Source, strength: float, rng: np.random.Generator) -> tuple[NDArray[np.float32], float]:
    """The sound of another clip in a part of the clip, up to all of it; as bad there as an offset of 1.5 s."""
    assert source.other is not None
    values, length = source.waveform.values.copy(), source.samples(source.seconds)
    part = round(strength * length)
    start = round(rng.random() * (length - part))
    other = source.other.values
    other = other if len(other) == len(values) else np.repeat(other.mean(0, keepdims=True), len(values), axis=0)
    replaced = values[:, start : start + part]
    replaced[:] = np.take(other, np.arange(replaced.shape[1]) % max(1, other.shape[1]), axis=1)
    return values, 1 - strength * (1 - sync_quality(-GREATEST_OFFSET))


def drift(source: _Source, strength: float, rng: np.random.Generator) -> tuple[NDArray[np.float32], float]:
    """The sound is up to 1% slower than the pictures, and so is later and later."""
    values = source.waveform.values
    slower = 1 + MAX_DRIFT * strength
    at = np.arange(values.shape[1]) / slower
    stretched = np.stack([np.interp(at, np.arange(values.shape[1]), channel) for channel in values])
    late = np.linspace(0, source.seconds * (1 - 1 / slower), 101)
    return stretched.astype(np.float32), float(np.mean([sync_quality(float(each)) for each in late]))


SOUND: dict[str, Callable[[_Source, float, np.random.Generator], tuple[NDArray[np.float32], float]]] = {
    function.__name__: function for function in (audio_lead, audio_lag, wrong_audio, drift)
}
"""Causes in the sound."""


def degrade_sound(
    waveform: Waveform, cause: str, strength: float, seed: int, *, seconds: float, other: Waveform | None = None
) -> DegradedSound:
    """Apply one degradation to the sound of a clip.

    Args:
        waveform: the sound from the first picture on; what follows the last picture is used by `audio_lead`.
        cause: a key of `SOUND`.
        strength: 0 (unnoticed) to 1 (unusable).
        seed: of the random choices.
        seconds: length of the pictures.
        other: the sound of another clip, at the same rate; needed by `wrong_audio`.
    """
    values, quality = SOUND[cause](_Source(waveform, seconds, other), strength, np.random.default_rng(seed))
    return DegradedSound(fit(Waveform(values, waveform.rate), seconds), quality)


def sound_offset(cause: str, strength: float) -> float | None:
    """Seconds by which a cause makes the sound late (negative: early); None if the sound fits nowhere."""
    signs = {"audio_lead": -1, "audio_lag": 1}
    return signs[cause] * _offset(strength) if cause in signs else None


def sync_quality(offset: float) -> float:
    """Quality (0 to 1) of a clip whose sound is late by `offset` seconds; early if negative.

    A monotone curve through `OPINIONS`, divided by `UNDAMAGED`. Those at 0.5 and 1 s are the mean MOS of 45 clips each
    in the training and validation labels of THQA-NTIRE (`audio_lead`: the sound is early; `video_lead`: it is late).
    Less than 45 ms early or 125 ms late is not noticed (ITU-R BT.1359-1). Those at 1.5 s are extrapolated.
    """
    return float(_CURVE(min(max(offset, -GREATEST_OFFSET), GREATEST_OFFSET))) / UNDAMAGED


def follow_pictures(waveform: Waveform, degradations: Collection[tuple[str, tuple[float, float]]]) -> Waveform:
    """The sound of a player whose pictures were held: silent meanwhile, and late after `buffering`.

    Args:
        waveform: of the source.
        degradations: the causes of a copy, and from when to when they apply. `buffering` and `stall` hold a picture.
    """
    values = waveform.values.copy()
    for cause, (start, end) in degradations:
        first, stop = (round(second * waveform.rate) for second in (start, end))
        if cause == "buffering":
            values = np.concatenate([np.zeros((len(values), stop - first), np.float32), values], axis=1)
        elif cause == "stall":
            values[:, first:stop] = 0
    return Waveform(values, waveform.rate)


def fit(waveform: Waveform, seconds: float) -> Waveform:
    """The sound cut, or continued with silence, to a length."""
    values, length = waveform.values, round(seconds * waveform.rate)
    values = np.pad(values[:, :length], ((0, 0), (0, max(0, length - values.shape[1]))))
    return Waveform(values, waveform.rate)


def _offset(strength: float) -> float:
    """Seconds; grows by the same factor with each step of the strength."""
    return LEAST_OFFSET * math.pow(GREATEST_OFFSET / LEAST_OFFSET, strength)
