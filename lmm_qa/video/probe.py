"""Open video files strictly, and read a clip's container from end to end.

A scan notices files that are cut off, contradict themselves or have packets marked as damaged, and gives the time of
each frame. Only the first frame is decoded; damage inside pictures shows in `lmm_qa.video.decode`.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from lmm_qa.errors import ClipNotFound, ClipTruncated, ClipUnreadable
from lmm_qa.video.integrity import find_structure_break, has_length_prefixes

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

MAX_SIDE = 16_384
MAX_AREA = 100_000_000
"""Pixels. Larger pictures are refused before memory is allocated for them."""

ZERO_RUN = bytes(16)
"""Never part of length-prefixed H.264 or HEVC: both escape three zero bytes in a row (H.264 7.4.1, H.265 7.4.2).
Some encoders pad the end of a picture with zeros, though."""

INDIRECT_FORMATS = frozenset({"hls", "dash", "concat", "imf", "sdp", "rtsp", "tty"})
"""Text formats that ffmpeg would play by opening other files or addresses, or by rendering the text."""


@dataclass(frozen=True)
class ClipInfo:
    """Properties of a clip, as displayed."""

    frames: int
    """Displayed frames. (`probe` counts packets: a few too many in VP8, where some are not displayed.)"""
    declared_frames: int
    """Frames that the container declares, including those hidden by an edit list; 0 if it declares none."""
    fps: float
    """Average frames per second."""
    duration: float
    """Seconds from the start of the first frame to the end of the last."""
    width: int
    """Pixels, as displayed."""
    height: int
    """Pixels, as displayed."""
    rotation: int
    """Degrees clockwise by which the stored picture is turned for display: 0, 90, 180 or 270."""
    codec: str
    pixel_format: str
    container: str
    has_audio: bool
    warnings: tuple[str, ...] = ()
    """What was read otherwise than a user may expect, a sentence each; reported in the row of the clip."""


@dataclass(frozen=True)
class ContainerScan:
    """A clip whose container has been read from end to end."""

    path: Path
    info: ClipInfo
    seconds: tuple[float, ...]
    """When each frame appears, from 0."""


def probe(path: str | Path) -> ClipInfo:
    """Read a clip's container from end to end and decode its first frame.

    Raises:
        ClipNotFound: the file does not exist.
        ClipUnreadable: it is not a regular file, contains no video that can be decoded, or its pictures are too large.
        ClipTruncated: the container is cut off or damaged. (Damage inside pictures shows only in `read_frames`.)
    """
    return scan_container(Path(path)).info


def scan_container(path: Path) -> ContainerScan:
    """Read all packets of a clip, and decode until the first frame, which has the rotation and the pixel format.

    Raises: as `probe`.
    """
    with open_video(path) as (container, stream):
        declared = _declared_frames(container, stream)
        packets = _read_packets(container, stream)
        total = max(declared, packets.count, _frames_by_duration(container, stream))
        if counts := _contradicting_counts(path, container, stream):
            raise truncated_error(path, min(packets.count, *counts), max(counts))
        # MP4 counts exactly. AVI, for one, counts frames that are left out because they repeat the previous one.
        missing = "mp4" in container.format.name and packets.count < declared
        broken_at = find_structure_break(path)
        if packets.intact is not None or packets.first_frame is None or missing or broken_at is not None:
            read = min(packets.count_before(broken_at), packets.count if packets.intact is None else packets.intact)
            raise truncated_error(path, read if packets.first_frame else 0, total, estimated=total > declared)
        frame = packets.first_frame
        _refuse_too_large(path, frame.width, frame.height)
        seconds, duration = _frame_times(packets.shown, stream)
        rotation = round(-frame.rotation / 90) * 90 % 360
        width, height = (frame.width, frame.height) if rotation % 180 == 0 else (frame.height, frame.width)
        info = ClipInfo(
            frames=len(seconds),
            declared_frames=declared,
            fps=len(seconds) / duration,
            duration=duration,
            width=width,
            height=height,
            rotation=rotation,
            codec=stream.codec_context.codec.canonical_name,
            pixel_format=frame.format.name,
            container=container.format.name,
            has_audio=bool(container.streams.audio),
        )
    return ContainerScan(path, info, seconds)


@contextmanager
def open_video(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a clip for strict decoding on one thread, with ffmpeg's own messages off.

    Raises: as `probe`.
    """
    import av

    _refuse_non_file(path)
    av.logging.set_level(av.logging.PANIC)
    try:
        container = _open_container(path)
    except (av.FFmpegError, ValueError) as error:
        if find_structure_break(path) is not None:  # an MP4 cut off before its index, for one
            raise truncated_error(path, 0, 0) from None
        reason = getattr(error, "strerror", None) or error
        raise ClipUnreadable(f"no decoder finds a video in {path}: {reason}. Is it a complete video file?") from None
    with container:
        if container.format.name in INDIRECT_FORMATS:
            raise ClipUnreadable(f"{path} is a text file of type {container.format.name}, not a video")
        covers = av.stream.Disposition.attached_pic
        streams = [stream for stream in container.streams.video if not stream.disposition & covers]
        if not streams:
            kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
            raise ClipUnreadable(f"{path} contains no video stream, only: {kinds}")
        stream = streams[0]
        context = stream.codec_context
        if context is None:
            raise ClipUnreadable(f"no decoder is available for the codec of {path}: convert it to H.264")
        _refuse_too_large(path, context.width, context.height)
        # err_detect=explode: report an error where the decoder would otherwise conceal the damage.
        context.options = {"err_detect": "explode", "max_pixels": str(MAX_AREA)}
        context.thread_count = 1
        yield container, stream


def truncated_error(path: Path, read: int, total: int, *, estimated: bool = False) -> ClipTruncated:
    """Make the error for a clip of which `read` of (about) `total` frames could be read."""
    of = f" of {'about ' if estimated else ''}{total}" if total > read else ""
    return ClipTruncated(f"stream breaks: {read}{of} frames could be read ({path}); make or copy the file again")


def _refuse_non_file(path: Path) -> None:
    """Refuse everything but readable files with content; a named pipe or a device would block or never end."""
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode):
            path.open("rb").close()
    except (FileNotFoundError, NotADirectoryError):
        raise ClipNotFound(f"no clip at {path}") from None
    except (OSError, ValueError) as error:
        raise ClipUnreadable(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise ClipUnreadable(f"{path} is {kind}, not a file: give the path of one clip")
    if not status.st_size:
        raise ClipUnreadable(f"{path} is empty (0 bytes): make or copy it again")


def _refuse_too_large(path: Path, width: int, height: int) -> None:
    if max(width, height) > MAX_SIDE or width * height > MAX_AREA:
        raise ClipUnreadable(
            f"the picture of {path} is {width}x{height}; at most {MAX_SIDE} pixels a side and "
            f"{MAX_AREA // 1_000_000} million in all are supported: scale it down first"
        )


def _open_container(path: Path, **options: str) -> InputContainer:
    """Open a file of any kind, with additional options for its demuxer."""
    import av

    # An absolute path is never taken for an address, and a text file cannot make ffmpeg fetch one.
    return av.open(str(path.absolute()), metadata_errors="replace", options={"protocol_whitelist": "file", **options})


@dataclass
class _Packets:
    """The packets of a video stream."""

    first_frame: VideoFrame | None = None
    """The first frame that the decoder returns."""
    positions: list[int | None] = field(default_factory=list)
    """Byte offset of each packet, including those hidden by an edit list; None if unknown."""
    intact: int | None = None
    """Packets before the first damaged one; None if none is damaged."""
    shown: list[tuple[int | None, int | None]] = field(default_factory=list)
    """(presentation time, duration) of the packets that are shown, in the stream's time base, in decoding order."""

    @property
    def count(self) -> int:
        return len(self.positions)

    def count_before(self, offset: int | None) -> int:
        """How many packets start before a byte offset; all if that is None."""
        return sum(offset is None or start is None or start < offset for start in self.positions)


def _read_packets(container: InputContainer, stream: VideoStream) -> _Packets:
    """Read every packet of the video stream; decode only until the first frame."""
    import av

    packets = _Packets()
    zeros_escaped = stream.codec_context.codec.canonical_name in ("h264", "hevc") and has_length_prefixes(stream)
    try:
        for packet in container.demux(stream):
            if packets.first_frame is None and packets.intact is None:
                packets.first_frame = next(iter(packet.decode()), None)
            if not packet.size:
                continue
            zeroed = zeros_escaped and ZERO_RUN in bytes(packet).rstrip(b"\0")
            if packets.intact is None and (packet.is_corrupt or zeroed):
                packets.intact = packets.count
            packets.positions.append(packet.pos)
            if not packet.is_discard:
                packets.shown.append((packet.pts, packet.duration))
    except av.FFmpegError:
        packets.intact = packets.count
    return packets


def _declared_frames(container: InputContainer, stream: VideoStream) -> int:
    """Frames that the container declares, 0 for none. An MP4's edit list can hide some of the frames that it counts."""
    return min(stream.frames, len(stream.index_entries)) if "mp4" in container.format.name else stream.frames


def _frames_by_duration(container: InputContainer, stream: VideoStream) -> int:
    """Estimate the frames of the declared duration, to estimate how much of a damaged clip is missing."""
    return round(float(stream.average_rate or 0) * (container.duration or 0) / 1_000_000)


def _frame_times(
    shown: Sequence[tuple[int | None, int | None]], stream: VideoStream
) -> tuple[tuple[float, ...], float]:
    """When each frame appears, in seconds after the first one; and the duration of all."""
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    times = [time for time, _ in shown if time is not None]
    if len(times) < len(shown) or stream.time_base is None:
        return tuple(index / rate for index in range(len(shown))), len(shown) / rate
    times.sort()
    seconds = tuple(float((time - times[0]) * stream.time_base) for time in times)
    intervals = [after - before for before, after in pairwise(seconds)]
    # Containers are seldom right about the last frame's duration; assume that of most frames.
    last = median(intervals) if intervals else float((shown[0][1] or 0) * stream.time_base)
    return seconds, seconds[-1] + (last or 1 / rate)


def _contradicting_counts(path: Path, container: InputContainer, stream: VideoStream) -> tuple[int, int] | None:
    """The numbers of frames in an MP4's tables of times and of offsets, if they differ.

    They must be equal (ISO/IEC 14496-12, 8.6.1.2 and 8.7.3); ffmpeg silently continues with the frames in both.
    """
    if "mp4" not in container.format.name or stream.frames in (0, len(stream.index_entries)):
        return None
    with _open_container(path, ignore_editlist="1") as unedited:
        counts = stream.frames, len(unedited.streams[stream.index].index_entries)
    return counts if counts[0] != counts[1] else None
