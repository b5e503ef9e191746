"""TODO-DOC video.integrity."""

from __future__ import annotations

import mmap
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from av.video.stream import VideoStream


def _length_prefixed(stream: VideoStream) -> bool:
    """Whether H.264 or HEVC units are preceded by their length (MP4, Matroska), not by start codes (MPEG-TS)."""
    return (stream.codec_context.extradata or b"")[:1] == b"\1"


def _broken_at(path: Path) -> int | None:
    """The byte at which a file's own structure breaks, its length where it ends too early; None for a sound one.

    Sees MP4, MOV, Matroska, WebM, AVI, GIF and MPEG-TS; None for others.
    """
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[4:8] == b"ftyp":
            return _mp4_broken_at(data)
        if data[:4] == b"\x1a\x45\xdf\xa3":
            return _matroska_broken_at(data)
        if data[:6] in (b"GIF87a", b"GIF89a"):
            return _gif_broken_at(data)
        if data[:4] == b"RIFF":
            declared = int.from_bytes(data[4:8], "little")
            return size if declared != 0xFFFFFFFF and declared + 8 > size else None
        if data[:1] == data[188:189] == data[376:377] == b"G" and size % 188:
            return size
    return None


def _mp4_broken_at(data: mmap.mmap) -> int | None:
    """Follow the top-level boxes of an MP4 or MOV file (ISO/IEC 14496-12, 4.2)."""
    position, fragmented = 0, False
    while position + 8 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        kind = data[position + 4 : position + 8]
        fragmented = fragmented or kind == b"moof"
        if length == 1:
            length = int.from_bytes(data[position + 8 : position + 16], "big")
        if length < 8:
            # The last box may leave out its length. Padding may follow it: without fragments the frames are counted.
            return position if fragmented and kind != b"mdat" else None
        position += length
    return len(data) if position > len(data) else None


def _gif_broken_at(data: mmap.mmap) -> int | None:
    """Follow a GIF from block to block up to its trailer (GIF89a specification, appendix A)."""

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


"""Those of the file, of a segment and of a cluster (RFC 9559, 5.1)."""


def _matroska_broken_at(data: mmap.mmap) -> int | None:
    """Follow a Matroska file from element to element (RFC 8794), checking the CRC-32 of those that carry one.

    ffmpeg, on meeting a broken element, goes on at the next cluster and does not say what it left out.
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
    """An element's identifier, the length of its body (None: unknown), and where the body begins (RFC 8794, 4 to 6)."""
    name_width = 9 - data[position].bit_length()
    name = int.from_bytes(data[position : position + name_width], "big")
    position += name_width
    width = 9 - data[position].bit_length() if position < len(data) else 9
    mask = (1 << 7 * width) - 1
    length = int.from_bytes(data[position : position + width], "big") & mask
    return name, None if length == mask else length, position + width
