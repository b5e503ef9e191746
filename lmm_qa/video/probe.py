"""TODO-DOC video.probe."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from lmm_qa.errors import (
    ClipNotFound,
    ClipTruncated,
    ClipUnreadable,
)

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

from lmm_qa.video.integrity import _broken_at, _length_prefixed

MAX_SIDE = 16_384


MAX_AREA = 100_000_000


"""Pixels. A larger picture is refused before memory is taken for it."""


HOLE = bytes(16)


"""Cannot occur in length-prefixed H.264 or HEVC: both escape three zero bytes in a row (H.264 7.4.1, H.265 7.4.2).
Some encoders pad the end of a picture with zeros, though."""


INDIRECT_FORMATS = frozenset({"hls", "dash", "concat", "imf", "sdp", "rtsp", "tty"})


"""Texts that ffmpeg would play, by opening other files or addresses that they name, or by drawing the letters."""


@dataclass(frozen=True)
class ClipInfo:
    """What a container and its stream say of a clip, as displayed."""

    frames: int
    """Frames that are there and shown. (`probe` counts packets: a few too many in VP8, where some show nothing.)"""
    declared_frames: int
    """Frames that the container declares, those that an edit list hides included; 0 where it declares none."""
    fps: float
    """Average frame rate, frames a second."""
    duration: float
    """Seconds from the first frame's appearance to the last one's end."""
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


@dataclass(frozen=True)
class _Scan:
    """What is known of a clip once its container has been read from end to end."""

    path: Path
    info: ClipInfo
    seconds: tuple[float, ...]
    """When each frame appears, from 0."""


def probe(path: str | Path) -> ClipInfo:
    """Read a clip's container from end to end and decode its first frame.

    Raises:
        ClipNotFound: nothing is there.
        ClipUnreadable: it is no regular file, holds no video that can be decoded, or its pictures are too large.
        ClipTruncated: the container is cut off or has holes. (Damage inside pictures shows only in `read_frames`.)
    """
    return _scan(Path(path)).info


def _refuse_no_file(path: Path) -> None:
    """Refuse what is not a file with something in it; a named pipe or a device would block or never end."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise ClipNotFound(f"no clip at {path}") from None
    except (OSError, ValueError) as error:
        raise ClipUnreadable(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise ClipUnreadable(f"{path} is {kind}, not a file: give the path of one clip")
    if not status.st_size:
        raise ClipUnreadable(f"{path} is empty (0 bytes): make or copy it again")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a clip for strict decoding on one thread; ffmpeg's own complaints are not printed."""
    import av

    _refuse_no_file(path)
    av.logging.set_level(av.logging.PANIC)
    try:
        container = _container(path)
    except (av.FFmpegError, ValueError) as error:
        if _broken_at(path) is not None:  # an MP4 cut off before its index, for one
            raise _truncated(path, 0, 0) from None
        reason = getattr(error, "strerror", None) or error
        raise ClipUnreadable(f"no decoder finds a video in {path}: {reason}. Is it a complete video file?") from None
    with container:
        if container.format.name in INDIRECT_FORMATS:
            raise ClipUnreadable(f"{path} is a text of type {container.format.name}, not a video")
        covers = av.stream.Disposition.attached_pic
        streams = [stream for stream in container.streams.video if not stream.disposition & covers]
        if not streams:
            kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
            raise ClipUnreadable(f"{path} holds no video stream, only: {kinds}")
        stream = streams[0]
        context = stream.codec_context
        if context is None:
            raise ClipUnreadable(f"the video in {path} is of a codec that no decoder here knows: convert it to H.264")
        _refuse_too_large(path, context.width, context.height)
        # err_detect=explode: an error where the decoder would otherwise conceal the damage.
        context.options = {"err_detect": "explode", "max_pixels": str(MAX_AREA)}
        context.thread_count = 1
        yield container, stream


def _container(path: Path, **options: str) -> InputContainer:
    """Open a file of any kind, with further options of its demuxer."""
    import av

    # An absolute path is never taken for an address, and a text cannot make ffmpeg fetch one.
    return av.open(str(path.absolute()), metadata_errors="replace", options={"protocol_whitelist": "file", **options})


def _refuse_too_large(path: Path, width: int, height: int) -> None:
    if max(width, height) > MAX_SIDE or width * height > MAX_AREA:
        raise ClipUnreadable(
            f"the picture of {path} is {width}x{height}; at most {MAX_SIDE} pixels a side and "
            f"{MAX_AREA // 1_000_000} million in all are read: scale it down first"
        )


def _truncated(path: Path, read: int, total: int, *, estimated: bool = False) -> ClipTruncated:
    of = f" of {'about ' if estimated else ''}{total}" if total > read else ""
    return ClipTruncated(f"stream breaks: {read}{of} frames could be read ({path}); make or copy the file again")


@dataclass
class _Walk:
    """What one pass over a clip's packets shows."""

    first: VideoFrame | None = None
    """The first picture that comes out of the decoder."""
    positions: list[int | None] = field(default_factory=list)
    """Where in the file each video packet begins, those that an edit list hides included; None where not told."""
    intact: int | None = None
    """Video packets before the first one that is damaged; None where none is."""
    shown: list[tuple[int | None, int | None]] = field(default_factory=list)
    """(presentation time, duration) of the packets that are shown, in the stream's time base, in decoding order."""

    @property
    def packets(self) -> int:
        return len(self.positions)

    def packets_before(self, position: int | None) -> int:
        """How many video packets begin before a position in the file; all where that is None."""
        if position is None:
            return self.packets
        return sum(start is None or start < position for start in self.positions)


def _scan(path: Path) -> _Scan:
    """Read the container from end to end; decode until the first frame comes, which tells rotation and format."""
    with _opened(path) as (container, stream):
        declared = _declared_frames(container, stream)
        walk = _walk(container, stream)
        total = max(declared, walk.packets, _frames_by_duration(container, stream))
        if counts := _contradiction(path, container, stream):
            raise _truncated(path, min(walk.packets, *counts), max(counts))
        # MP4 counts exactly. AVI, for one, counts frames that are left out because they repeat the one before.
        missing = "mp4" in container.format.name and walk.packets < declared
        broken_at = _broken_at(path)
        if walk.intact is not None or walk.first is None or missing or broken_at is not None:
            read = min(walk.packets_before(broken_at), walk.packets if walk.intact is None else walk.intact)
            raise _truncated(path, read if walk.first else 0, total, estimated=total > declared)
        _refuse_too_large(path, walk.first.width, walk.first.height)
        seconds, duration = _timeline(walk.shown, stream)
        rotation = round(-walk.first.rotation / 90) * 90 % 360
        sides = walk.first.width, walk.first.height
        width, height = sides if rotation % 180 == 0 else sides[::-1]
        info = ClipInfo(
            frames=len(seconds),
            declared_frames=declared,
            fps=len(seconds) / duration,
            duration=duration,
            width=width,
            height=height,
            rotation=rotation,
            codec=stream.codec_context.codec.canonical_name,
            pixel_format=walk.first.format.name,
            container=container.format.name,
            has_audio=bool(container.streams.audio),
        )
    return _Scan(path, info, seconds)


def _walk(container: InputContainer, stream: VideoStream) -> _Walk:
    """Read every packet of the video stream; decode only until the first frame comes."""
    import av

    walk = _Walk()
    zeros_escaped = stream.codec_context.codec.canonical_name in ("h264", "hevc") and _length_prefixed(stream)
    try:
        for packet in container.demux(stream):
            if walk.first is None and walk.intact is None:
                walk.first = next(iter(packet.decode()), None)
            if not packet.size:
                continue
            if walk.intact is None and (packet.is_corrupt or (zeros_escaped and HOLE in bytes(packet).rstrip(b"\0"))):
                walk.intact = walk.packets
            walk.positions.append(packet.pos)
            if not packet.is_discard:
                walk.shown.append((packet.pts, packet.duration))
    except av.FFmpegError:
        walk.intact = walk.packets
    return walk


def _declared_frames(container: InputContainer, stream: VideoStream) -> int:
    """Frames that the container declares, 0 for none. An MP4's edit list can hide some of the frames that it counts."""
    return min(stream.frames, len(stream.index_entries)) if "mp4" in container.format.name else stream.frames


def _frames_by_duration(container: InputContainer, stream: VideoStream) -> int:
    """About how many frames the declared duration is worth, to tell how much of a broken clip is missing."""
    return round(float(stream.average_rate or 0) * (container.duration or 0) / 1_000_000)


def _timeline(shown: Sequence[tuple[int | None, int | None]], stream: VideoStream) -> tuple[tuple[float, ...], float]:
    """When each frame appears, seconds from the first one, and how long they last together."""
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    times = [time for time, _ in shown if time is not None]
    if len(times) < len(shown) or stream.time_base is None:
        return tuple(index / rate for index in range(len(shown))), len(shown) / rate
    times.sort()
    seconds = tuple(float((time - times[0]) * stream.time_base) for time in times)
    intervals = [after - before for before, after in pairwise(seconds)]
    # The last frame is taken to last as long as most do: containers are seldom right about that one.
    last = median(intervals) if intervals else float((shown[0][1] or 0) * stream.time_base)
    return seconds, seconds[-1] + (last or 1 / rate)


from typing import TYPE_CHECKING


def _contradiction(path: Path, container: InputContainer, stream: VideoStream) -> tuple[int, int] | None:
    """The two numbers of frames that an MP4's tables of times and of places give, where these differ.

    They must be one number (ISO/IEC 14496-12, 8.6.1.2 and 8.7.3); ffmpeg goes on with what both have.
    """
    if "mp4" not in container.format.name or stream.frames in (0, len(stream.index_entries)):
        return None
    with _container(path, ignore_editlist="1") as unedited:
        counts = stream.frames, len(unedited.streams[stream.index].index_entries)
    return counts if counts[0] != counts[1] else None
