"""Measured evidence in words, for the slot `{measured}` of a prompt.

A model sees a few small pictures of a clip. What was measured on every frame at native resolution
(`lmm_qa.video.measurement.features`, `lmm_qa.video.measurement.classifier`) is told to it in one line of fixed wording:

    quality 62, blur 3, noise 0, compression 5, banding 0, ..., bitrate_switch 0

The quality is from 0 to 99, the severity of each defect from 0 to 9. For the slot `{lip_sync}`, what was measured of
lips and sound (`lmm_qa.video.measurement.lip_sync`) is told in the same way:

    sound 0.4 s early, match 7

The match, from 0 to 9, is how far the best offset stands out from wrong pairings.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

from lmm_qa.video.measurement.classifier import QUALITY

UNKNOWN = "unknown"
"""What the slot contains for a clip that was not measured, such as one that is too long."""


def evidence_text(numbers: Mapping[str, float] | None, rng: random.Random | None = None) -> str:
    """The content of the slot `{measured}`.

    Args:
        numbers: quality and severities of the clip, 0 to 1 (`classifier.Measurement.numbers`); None if the clip was not
            measured.
        rng: for training: each value is rounded up or down at random, more often to the nearer number, so that a model
            learns what lies between two numbers. By default it is rounded to the nearest.
    """
    if numbers is None:
        return UNKNOWN
    offset = rng.random if rng else lambda: 0.5

    def scaled(value: float, highest: int) -> int:
        return math.floor(min(max(value, 0.0), 1.0) * highest + offset())

    parts = [
        f"{name} {scaled(value, 99):02}" if name == QUALITY else f"{name} {scaled(value, 9)}"
        for name, value in numbers.items()
    ]
    return ", ".join(parts)


def lip_sync_text(offset: float | None, strength: float | None) -> str:
    """The content of the slot `{lip_sync}`.

    Args:
        offset, strength: see `lip_sync.LipSync`; None if lips and sound could not be compared.
    """
    if offset is None or strength is None:
        return UNKNOWN
    tenths = abs(round(offset, 1))
    when = f"{tenths:.1f} s {'late' if offset > 0 else 'early'}" if tenths else "in time"
    return f"sound {when}, match {round(min(max(strength, 0.0), 9.0))}"
