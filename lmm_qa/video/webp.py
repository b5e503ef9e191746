"""Read animated WebP with Pillow: PyAV's build of ffmpeg does not decode it."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError

from lmm_qa.errors import ClipUnreadable

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

MIN_MILLISECONDS = 10
"""Shown at least this long, as in browsers; a picture that is not animated has no duration."""


def read_webp_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels; nothing is decoded.

    Raises:
        ClipUnreadable: it is not a WebP file.
    """
    try:
        with Image.open(path, formats=["WEBP"]) as picture:
            return picture.size
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ClipUnreadable(f"no decoder finds a picture in {path}: {error}") from None


def read_webp_frames(path: Path) -> Iterator[tuple[VideoFrame, float]]:
    """Each frame of a WebP file, RGBA, and the seconds for which it is shown.

    Raises:
        EOFError: the file ends too early, or is damaged.
    """
    from av.video.frame import VideoFrame

    milliseconds = 0
    try:
        with Image.open(path, formats=["WEBP"]) as animation:
            for picture in ImageSequence.Iterator(animation):
                frame = VideoFrame.from_ndarray(np.asarray(picture.convert("RGBA")), format="rgba")
                frame.pts, frame.time_base = milliseconds, Fraction(1, 1000)
                shown = max(MIN_MILLISECONDS, picture.info.get("duration", 0))
                milliseconds += shown
                yield frame, shown / 1000
    except (OSError, SyntaxError, ValueError) as error:
        raise EOFError(str(error)) from None
