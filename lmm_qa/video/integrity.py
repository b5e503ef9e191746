"""Read the structure of a video file, apart from any decoder: ffmpeg skips broken parts of a container silently.

What these checks find and miss is listed in docs/decoding.md.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from collections.abc import Callable, Iterator
from math import floor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lmm_qa.errors import ClipUnreadable
from lmm_qa.video.display import UNCROPPED, Crop

if TYPE_CHECKING:
    from av.video.stream import VideoStream

Result = TypeVar("Result")


def has_length_prefixes(stream: VideoStream) -> bool:
    """Whether H.264 or HEVC units start with their length (MP4, Matroska), not with start codes (MPEG-TS)."""
    return (stream.codec_context.extradata or b"")[:1] == b"\1"


def has_idr(stream: VideoStream, packet: bytes) -> bool:
    """Whether an H.264 packet has an IDR picture (ITU-T H.264, 7.4.1.2.4): none after it refers to one before it."""
    if not has_length_prefixes(stream):
        return any(unit[:1] and unit[0] & 31 == 5 for unit in packet.split(b"\0\0\1")[1:])
    width = (stream.codec_context.extradata or bytes(5))[4] % 4 + 1
    position = 0
    while position + width < len(packet):
        if packet[position + width] & 31 == 5:
            return True
        position += width + int.from_bytes(packet[position : position + width], "big")
    return False


def find_structure_break(path: Path, samples_are_inside: bool = False) -> int | None:
    """Return the offset of the first broken byte of a container, or its length if it ends too early; None if intact.

    Checks MP4, MOV, Matroska, WebM, AVI, GIF and MPEG-TS; None for other formats. Bytes after the end of a complete
    file are no damage.

    Args:
        path: the file.
        samples_are_inside: the tables of an MP4 without fragments name only bytes in the file, so that it does not
            matter if its media data claim to be longer.

    Raises:
        ClipUnreadable: the operating system cannot read the file.
    """
    return _inspect(path, lambda data: _find_break(data, samples_are_inside))


def is_fragmented(path: Path) -> bool:
    """Whether an MP4 or MOV file contains movie fragments (ISO/IEC 14496-12, 8.8).

    Raises:
        ClipUnreadable: the operating system cannot read the file.
    """
    return _inspect(path, lambda data: any(kind == b"moof" for _, _, kind in _mp4_boxes(data)))


def is_encrypted(path: Path) -> bool:
    """Whether an MP4 or MOV file declares protected video (ISO/IEC 14496-12, 8.12).

    Raises:
        ClipUnreadable: the operating system cannot read the file.
    """

    def read(data: mmap.mmap) -> bool:
        headers = [(at, at + length) for at, length, kind in _mp4_boxes(data) if kind == b"moov"]
        return any(data.find(name, *header) >= 0 for header in headers for name in (b"encv", b"drmi"))

    return _inspect(path, read)


def read_crop(path: Path, number: int, width: int, height: int) -> Crop:
    """What a container says to cut off the pictures of a video stream.

    Reads the clean aperture of MP4 and MOV (ISO/IEC 14496-12, 12.1.4) and the PixelCrop elements of Matroska (RFC 9559,
    5.1.4.1.28).

    Args:
        path: the file.
        number: of the stream among the video streams of the file.
        width: of the decoded picture, pixels.
        height: of the decoded picture, pixels.

    Returns:
        No crop if the file has none, or one that would leave nothing.

    Raises:
        ClipUnreadable: the operating system cannot read the file.
    """

    def read(data: mmap.mmap) -> Crop:
        if data[4:8] == b"ftyp" or data[4:8] == b"moov":
            return _mp4_crop(data, number, width, height)
        return _matroska_crop(data, number) if data[:4] == b"\x1a\x45\xdf\xa3" else UNCROPPED

    crop = _inspect(path, read)
    sides = (crop.left, crop.top, crop.right, crop.bottom)
    sound = min(sides) >= 0 and crop.left + crop.right < width and crop.top + crop.bottom < height
    return crop if sound else UNCROPPED


def _inspect(path: Path, read: Callable[[mmap.mmap], Result]) -> Result:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return read(data)
    except OSError as error:
        raise ClipUnreadable(f"cannot read {path}: {error.strerror}") from None


def _find_break(data: mmap.mmap, samples_are_inside: bool) -> int | None:
    if data[4:8] == b"ftyp":
        return _find_mp4_break(data, samples_are_inside)
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return _find_matroska_break(data)
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return _find_gif_break(data)
    if data[:4] == b"RIFF":
        declared = int.from_bytes(data[4:8], "little")
        return len(data) if declared != 0xFFFFFFFF and declared + 8 > len(data) else None
    if data[:1] == data[188:189] == data[376:377] == b"G" and len(data) % 188:
        return _find_ts_break(data)
    return None


def _find_ts_break(data: mmap.mmap) -> int | None:
    """Tell a packet that is cut off, or is missing in the middle, from other bytes after the end of an MPEG-TS file."""
    end = 0
    while data[end : end + 1] == b"G":
        end += 188
    if end > len(data):
        return len(data)
    rest = data[end:]
    resumes = any(rest[at : at + 377 : 188] == b"GGG" for at in range(len(rest) - 376))
    return end if resumes else None


def _mp4_boxes(data: mmap.mmap, position: int = 0, end: int | None = None) -> Iterator[tuple[int, int, bytes]]:
    """Start, length and type of each box (ISO/IEC 14496-12, 4.2) from a position; the last one may exceed the end."""
    end = len(data) if end is None else end
    while position + 8 <= end:
        length = int.from_bytes(data[position : position + 4], "big")
        if length == 1:
            length = int.from_bytes(data[position + 8 : position + 16], "big")
        yield position, length, data[position + 4 : position + 8]
        if length < 8:
            return
        position += length


def _find_mp4_break(data: mmap.mmap, samples_are_inside: bool) -> int | None:
    """Walk the top-level boxes of an MP4 or MOV file."""
    seen: list[bytes] = []
    for position, length, kind in _mp4_boxes(data):
        # Bytes after a complete file are no damage; fragments end with a table of their own, if they end at all.
        complete = seen[-1] == b"mfra" if b"moof" in seen else b"moov" in seen
        if length < 8:
            # The last box may omit its length, and padding may follow it.
            return position if b"moof" in seen and kind != b"mdat" and not complete else None
        if position + length > len(data):
            needed = {b"moov", b"moof"} if samples_are_inside and b"moof" not in seen else {b"moov", b"moof", b"mdat"}
            return None if complete and kind not in needed else len(data)
        seen.append(kind)
    return None


def _mp4_crop(data: mmap.mmap, number: int, width: int, height: int) -> Crop:
    def inside(start: int, length: int, *path: bytes, skip: int = 0) -> Iterator[tuple[int, int]]:
        """Start and length of the boxes at a path below a box, whose own fields take `skip` bytes after its header."""
        for at, size, kind in _mp4_boxes(data, start + 8 + skip, min(start + length, len(data))):
            if size >= 8 and kind == path[0]:
                if len(path) == 1:
                    yield at, size
                else:
                    yield from inside(at, size, *path[1:])

    tracks = [track for at, size, kind in _mp4_boxes(data) if kind == b"moov" for track in inside(at, size, b"trak")]
    videos = [
        track
        for track in tracks
        if any(data[at + 16 : at + 20] == b"vide" for at, _ in inside(*track, b"mdia", b"hdlr"))
    ]
    for table in inside(*videos[number], b"mdia", b"minf", b"stbl", b"stsd") if number < len(videos) else ():
        entries = [(at, size) for at, size, _ in _mp4_boxes(data, table[0] + 16, table[0] + table[1])]
        # The fields of a VisualSampleEntry take 78 bytes.
        for at, _ in inside(*entries[0], b"clap", skip=78) if entries else ():
            fields = struct.unpack_from(">8i", data, at + 8)
            if 0 in fields[1::2]:
                continue
            wide, high, right, down = (fields[field] / fields[field + 1] for field in range(0, 8, 2))
            left, top = (width - wide) / 2 + right, (height - high) / 2 + down
            left, top = floor(left), floor(top)
            return Crop(left, top, width - round(wide) - left, height - round(high) - top)
    return UNCROPPED


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
    position, end = 0, len(data)  # bytes after the end of a segment whose length is known are not read
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


def _matroska_crop(data: mmap.mmap, number: int) -> Crop:
    def inside(start: int, stop: int, *path: int) -> Iterator[tuple[int, int]]:
        """Start and end of the bodies of the elements at a path."""
        position = start
        while position < min(stop, len(data)):
            name, length, body = _matroska_element(data, position)
            after = stop if length is None else body + length
            if name == path[0]:
                if len(path) == 1:
                    yield body, min(after, len(data))
                else:
                    yield from inside(body, after, *path[1:])
            if name == _CLUSTER and _SEGMENT not in path:  # the tracks come before it
                return
            position = after

    videos = list(inside(0, len(data), _SEGMENT, 0x1654AE6B, 0xAE, 0xE0))
    if number >= len(videos):
        return UNCROPPED

    def side(name: int) -> int:
        return next((int.from_bytes(data[start:stop], "big") for start, stop in inside(*videos[number], name)), 0)

    return Crop(left=side(0x54CC), top=side(0x54BB), right=side(0x54DD), bottom=side(0x54AA))
