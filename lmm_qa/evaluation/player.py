"""The player of the pages: which clips a browser can play, and how a page refers to them.

A page is one file. It contains clips as data, up to a limit; it refers to the others by their relative paths if they
lie beside it or below its folder. What a page cannot play is shown in still frames.
"""

from __future__ import annotations

import base64
import os
from pathlib import Path
from urllib.parse import quote

from lmm_qa.video.probe import ClipInfo

EMBED_LIMIT = 50_000_000
"""Bytes of the clips that a page contains, in all."""

MEDIA_TYPES = {".mp4": "video/mp4", ".m4v": "video/mp4", ".mov": "video/mp4", ".webm": "video/webm"}
"""Files that browsers play, and as what. They know .mov only by the name of its relative, .mp4."""

_EIGHT_BITS = frozenset({"yuv420p", "yuvj420p"})
_PIXEL_FORMATS = {
    "h264": _EIGHT_BITS,
    "vp8": _EIGHT_BITS,
    "vp9": _EIGHT_BITS | {"yuv420p10le"},
    "av1": _EIGHT_BITS | {"yuv420p10le"},
}
"""Codecs that Chromium and Firefox decode without help of the system, and their pixel formats."""


def is_playable(file: Path, info: ClipInfo) -> bool:
    """Whether the common browsers play a clip."""
    return file.suffix.lower() in MEDIA_TYPES and info.pixel_format in _PIXEL_FORMATS.get(info.codec, ())


class ClipAddresses:
    """Addresses of the clips of one page, for `src`."""

    def __init__(self, page: Path, limit: int = 0) -> None:
        """
        Args:
            page: where the page will be.
            limit: bytes of clips that it may contain.
        """
        self._folder = os.path.realpath(page.parent)
        self._left = limit

    def address(self, file: Path) -> str | None:
        """The clip as a data URL; else its path relative to the page; None if it is too large and lies elsewhere."""
        size = file.stat().st_size
        if size <= self._left:
            self._left -= size
            data = base64.b64encode(file.read_bytes()).decode("ascii")
            return f"data:{MEDIA_TYPES[file.suffix.lower()]};base64,{data}"
        real = Path(os.path.realpath(file))
        if not real.is_relative_to(self._folder):
            return None
        return quote(real.relative_to(self._folder).as_posix())
