"""Check the structure of a video file, apart from any decoder: ffmpeg skips broken parts of a container silently.

What these checks find and miss is listed in docs/decoding.md.
"""

from __future__ import annotations

import mmap
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from lmm_qa.errors import ClipUnreadable

if TYPE_CHECKING:
    from av.video.stream import VideoStream


def has_length_prefixes(stream: VideoStream) -> bool:
    """Whether H.264 or HEVC units start with their length (MP4, Matroska), not with start codes (MPEG-TS)."""
    return (stream.codec_context.extradata or b"")[:1] == b"\1"


def find_structure_break(path: Path) -> int | None:
    """Return the offset of the first broken byte of a container, or its length if it ends too early; None if intact.

    Checks MP4, MOV, Matroska, WebM, AVI, GIF and MPEG-TS; None for other formats.

    Raises:
        ClipUnreadable: the operating system cannot read the file.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _find_break(data)
    except OSError as error:
        raise ClipUnreadable(f"cannot read {path}: {error.strerror}") from None


def _find_break(data: mmap.mmap) -> int | None:
    if data[4:8] == b"ftyp":
        return _find_mp4_break(data)
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return _find_matroska_break(data)
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return _find_gif_break(data)
    if data[:4] == b"RIFF":
        declared = int.from_bytes(data[4:8], "little")
        return len(data) if declared != 0xFFFFFFFF and declared + 8 > len(data) else None
    if data[:1] == data[188:189] == data[376:377] == b"G" and len(data) % 188:
        return len(data)
    return None


def _find_mp4_break(data: mmap.mmap) -> int | None:
    """Walk the top-level boxes of an MP4 or MOV file (ISO/IEC 14496-12, 4.2)."""
    position, fragmented = 0, False
    while position + 8 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        kind = data[position + 4 : position + 8]
        fragmented = fragmented or kind == b"moof"
        if length == 1:
            length = int.from_bytes(data[position + 8 : position + 16], "big")
        if length < 8:
            # The last box may omit its length, and padding may follow it: without fragments the frames are counted.
            return position if fragmented and kind != b"mdat" else None
        position += length
    return len(data) if position > len(data) else None


def _find_gif_break(data: mmap.mmap) -> int | None:
    """Walk the blocks of a GIF up to its trailer (GIF89a specification, appendix A)."""

    def after_table(position: int, flags: int) -> int:
        return position + (3 << (flags % 8 + 1) if flags & 0x80 else 0)

    try:
        position = after_table(13, data[10])
        while data[position] != 0x3B:
            start = position
            if data[position] == 0x2C:  # a picture
                position = after_table(position + 10, data[position + 9]) + 1
            elif data[position] == 0x21:  # an extension
                position += 2
            else:
                return start
            while data[position]:
                position += data[position] + 1
            position += 1
    except IndexError:
        return len(data)
    return None


_SEGMENT, _CLUSTER = 0x18538067, 0x1F43B675
_MATROSKA_ELEMENTS = {
    0x1A45DFA3: "EBML",
    0x114D9B74: "SeekHead",
    0x1549A966: "Info",
    0x1654AE6B: "Tracks",
    0x1C53BB6B: "Cues",
    0x1941A469: "Attachments",
    0x1043A770: "Chapters",
    0x1254C367: "Tags",
    _CLUSTER: "Cluster",
    0xEC: "Void",
    0xBF: "CRC-32",
    0xE7: "Timestamp",
    0x5854: "SilentTracks",
    0xA7: "Position",
    0xAB: "PrevSize",
    0xA3: "SimpleBlock",
    0xA0: "BlockGroup",
    0xAF: "EncryptedBlock",
}
"""Elements that a file, a segment and a cluster may contain (RFC 9559, 5.1)."""


def _find_matroska_break(data: mmap.mmap) -> int | None:
    """Walk the elements of a Matroska file (RFC 8794) and check the CRC-32 of those that have one.

    At a broken element, ffmpeg continues with the next cluster and does not report what it skipped.
    """
    position, end = 0, len(data)
    while position < min(end, len(data)):
        name, length, body = _matroska_element(data, position)
        stop = None if length is None else body + length
        if name == _SEGMENT:
            position, end = body, stop or len(data)
            continue
        if name not in _MATROSKA_ELEMENTS or (name != _CLUSTER and (stop is None or stop > len(data))):
            return position
        if stop is not None and stop <= len(data) and data[body : body + 2] == b"\xbf\x84":
            declared = int.from_bytes(data[body + 2 : body + 6], "little")
            if name in (0x114D9B74, 0x1549A966, 0x1654AE6B, _CLUSTER) and zlib.crc32(data[body + 6 : stop]) != declared:
                return position
        position = body if name == _CLUSTER or stop is None else stop
    return None if end <= len(data) else len(data)


def _matroska_element(data: mmap.mmap, position: int) -> tuple[int, int | None, int]:
    """Read an element's identifier, the length of its body (None: unknown) and its body's offset (RFC 8794, 4 to 6)."""
    name_width = 9 - data[position].bit_length()
    name = int.from_bytes(data[position : position + name_width], "big")
    position += name_width
    width = 9 - data[position].bit_length() if position < len(data) else 9
    mask = (1 << 7 * width) - 1
    length = int.from_bytes(data[position : position + width], "big") & mask
    return name, None if length == mask else length, position + width
