"""Read the container of a clip from end to end.

A scan notices files that are cut off, contradict themselves or have packets marked as damaged, and gives the time of
each frame. Only the first frame is decoded; damage inside pictures shows in `lmm_qa.video.decode`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from lmm_qa.errors import ClipUnreadable
from lmm_qa.video.container import OpenVideo, is_webp, open_container, open_video, refuse_too_large, truncated_error
from lmm_qa.video.display import (
    MAX_PIXEL_ASPECT,
    UPRIGHT,
    Display,
    Orientation,
    is_hdr,
    read_orientation,
)
from lmm_qa.video.integrity import (
    find_structure_break,
    has_idr,
    has_length_prefixes,
    is_encrypted,
    is_fragmented,
    read_crop,
)
from lmm_qa.video.webp import read_webp_frames, read_webp_size

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet as AnyPacket
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

    Packet = AnyPacket[VideoStream]

ZERO_RUN = bytes(16)
"""Never part of length-prefixed H.264 or HEVC: both escape three zero bytes in a row (H.264 7.4.1, H.265 7.4.2).
Some encoders pad the end of a picture with zeros, though."""

JOIN_GAP = 1.0
"""Seconds. If the clock of an MPEG-TS file jumps forward by more, or back, another recording was appended there."""

JOIN_PACKETS = 2
"""Packets before a join that can be marked as damaged because of it: the parser is that far behind."""

CLOCK_JUMP = 10.0
"""Seconds. A larger step in a format whose clock may jump is no pause: ffmpeg's `dts_delta_threshold`."""

STILL = "A still picture, not a video: nothing that moves can be judged."


@dataclass(frozen=True)
class ClipInfo:
    """Properties of a clip, as displayed."""

    frames: int
    """Displayed frames. (`probe` counts packets: rarely a few too many.)"""
    declared_frames: int
    """Frames that the container declares, including those hidden by an edit list; 0 if it declares none."""
    fps: float
    """Average frames per second."""
    duration: float
    """Seconds from the start of the first frame to the end of the last."""
    width: int
    """Pixels, as displayed: turned, cropped, and with square pixels."""
    height: int
    """Pixels, as displayed."""
    codec: str
    pixel_format: str
    container: str
    has_audio: bool
    orientation: Orientation = UPRIGHT
    """How the stored picture is turned for display."""
    warnings: tuple[str, ...] = ()
    """What was read otherwise than a user may expect, a sentence each; reported in the row of the clip."""


@dataclass(frozen=True)
class ContainerScan:
    """A clip whose container has been read from end to end."""

    path: Path
    info: ClipInfo
    seconds: tuple[float, ...]
    """When each frame appears, from 0."""
    display: Display
    size: int = 0
    """Bytes of the stream."""
    start: float = 0.0
    """Presentation time of the first frame, in seconds on the clock of the file, which its sound shares."""
    pts: tuple[int | None, ...] = ()
    """Presentation time of each frame, in the stream's time base, in the order of `seconds`."""
    skipped: int = 0
    """Packets before the first keyframe: nothing can be shown of them."""
    doubtful: frozenset[int] = frozenset()
    """`pts` of leading pictures: they may refer to pictures before the start of the file, which no decoder can show."""
    joined: frozenset[int] = frozenset()
    """`pts` of packets that are marked as damaged only because another recording follows or precedes them."""
    strict: bool = True
    """Whether the decoder reports an error where it could conceal one. Not if an H.264 stream was cut at an open group
    of pictures: that it refers to pictures before its start is an error, but its pictures can be shown."""


def probe(path: str | Path) -> ClipInfo:
    """Read a clip's container from end to end and decode its first frame.

    Raises:
        ClipNotFound: the file does not exist.
        ClipUnreadable: it is not a regular file, contains no video that can be decoded, or its pictures are too large.
        ClipTruncated: the container is cut off or damaged. (Damage inside pictures shows only in `read_frames`.)
    """
    return scan_container(Path(path)).info


def scan_container(path: Path) -> ContainerScan:
    """Read all packets of a clip, and decode until the first frame, which has the orientation and the pixel format.

    Raises: as `probe`.
    """
    if is_webp(path):
        return _scan_webp(path)
    with open_video(path) as video:
        container, stream = video.container, video.stream
        declared = _declared_frames(container, stream)
        packets = _read_packets(video)
        no_keyframe = packets.first_frame is None and packets.skipped == packets.count
        if no_keyframe or packets.open_start:
            with open_video(path, strict=not packets.open_start) as again:
                packets = _read_packets(again, from_keyframe=not no_keyframe)
        total = max(declared, packets.count, _frames_by_duration(container, stream))
        if counts := _contradicting_counts(path, container, stream):
            raise truncated_error(path, min(packets.count, *counts), max(counts))
        # MP4 counts exactly. AVI, for one, counts frames that are left out because they repeat the previous one.
        missing = "mp4" in container.format.name and packets.count < declared
        broken_at = find_structure_break(path, _holds_all_samples(path, container))
        if packets.intact is not None or packets.first_frame is None or missing or broken_at is not None:
            if "mp4" in container.format.name and is_encrypted(path):
                raise ClipUnreadable(f"{path} is encrypted (DRM): only clips without copy protection can be rated")
            read = min(packets.count_before(broken_at), packets.count if packets.intact is None else packets.intact)
            raise truncated_error(path, read if packets.first_frame else 0, total, estimated=total > declared)
        return _make_scan(path, video, packets, declared)


def _make_scan(path: Path, video: OpenVideo, packets: _Packets, declared: int) -> ContainerScan:
    container, stream, frame = video.container, video.stream, packets.first_frame
    assert frame is not None
    refuse_too_large(path, frame.width, frame.height)
    warnings = list(video.warnings)
    times, jumps = _continuous_times(packets.shown, video)
    seconds, duration = _frame_times(times, packets.shown, stream)
    first = min((time for time in times if time is not None), default=0)
    order = sorted(range(len(times)), key=lambda at: times[at] or 0) if None not in times else list(range(len(times)))
    orientation, exact = read_orientation(frame)
    aspect = float(stream.sample_aspect_ratio or 1) or 1.0
    number = [each.index for each in container.streams.video].index(stream.index)
    display = Display(frame.width, frame.height, read_crop(path, number, frame.width, frame.height), orientation)
    if not 1 / MAX_PIXEL_ASPECT <= aspect <= MAX_PIXEL_ASPECT:
        warnings.append(f"Pixels of {aspect:g}:1 are taken for square ones.")
    else:
        display = replace(display, pixel_aspect=aspect)
    if not exact:
        warnings.append(
            "The picture is to be turned by an angle that is no multiple of 90 degrees; the nearest is used."
        )
    if is_hdr(frame):
        warnings.append("HDR video, tone-mapped to the range of an ordinary screen.")
    if jumps:
        warnings.append(f"The clock of the file jumps; its {jumps + 1} parts are taken one after the other.")
    if len(seconds) == 1:
        warnings.append(STILL)
    height, width = display.size
    info = ClipInfo(
        frames=len(seconds),
        declared_frames=declared,
        fps=len(seconds) / duration,
        duration=duration,
        width=width,
        height=height,
        codec=stream.codec_context.codec.canonical_name,
        pixel_format=frame.format.name,
        container=container.format.name,
        has_audio=bool(container.streams.audio),
        orientation=orientation,
        warnings=tuple(warnings),
    )
    return ContainerScan(
        path,
        info,
        seconds,
        display,
        size=packets.size,
        start=float(first * stream.time_base) if stream.time_base else 0.0,
        pts=tuple(packets.shown[at].pts for at in order),
        skipped=packets.skipped,
        doubtful=frozenset(packets.doubtful),
        joined=frozenset(packets.joined),
        strict=not packets.open_start,
    )


def _scan_webp(path: Path) -> ContainerScan:
    width, height = read_webp_size(path)
    refuse_too_large(path, width, height)
    if find_structure_break(path) is not None:
        raise truncated_error(path, 0, 0)
    shown: list[float] = []
    try:
        shown.extend(seconds for _, seconds in read_webp_frames(path))
    except EOFError:
        raise truncated_error(path, len(shown), 0) from None
    if not shown:
        raise truncated_error(path, 0, 0)
    info = ClipInfo(
        frames=len(shown),
        declared_frames=len(shown),
        fps=len(shown) / sum(shown),
        duration=sum(shown),
        width=width,
        height=height,
        codec="webp",
        pixel_format="rgba",
        container="webp",
        has_audio=False,
        warnings=() if len(shown) > 1 else (STILL,),
    )
    seconds = tuple(accumulate(shown[:-1], initial=0.0))
    return ContainerScan(path, info, seconds, Display(width, height))


@dataclass(frozen=True)
class _Shown:
    """A packet that is shown; times in the stream's time base."""

    pts: int | None
    dts: int | None
    duration: int | None


@dataclass
class _Packets:
    """The packets of a video stream."""

    first_frame: VideoFrame | None = None
    """The first frame that the decoder returns."""
    positions: list[int | None] = field(default_factory=list)
    """Byte offset of each packet, including those hidden by an edit list; None if unknown."""
    intact: int | None = None
    """Packets before the first damaged one; None if none is damaged."""
    shown: list[_Shown] = field(default_factory=list)
    """The packets that are shown, in decoding order."""
    size: int = 0
    """Bytes of all packets."""
    skipped: int = 0
    """Packets before the first keyframe."""
    open_start: bool = False
    """The first picture is H.264 to start from, but pictures after it may refer to some before it."""
    doubtful: set[int] = field(default_factory=set)
    joined: set[int] = field(default_factory=set)
    """See `ContainerScan`."""

    @property
    def count(self) -> int:
        return len(self.positions)

    def count_before(self, offset: int | None) -> int:
        """How many packets start before a byte offset; all if that is None."""
        return sum(offset is None or start is None or start < offset for start in self.positions)


def _read_packets(video: OpenVideo, from_keyframe: bool = True) -> _Packets:
    """Read every packet of the video stream; decode only until the first frame.

    Args:
        from_keyframe: leave out the packets before the first keyframe.
    """
    import av

    stream, packets = video.stream, _Packets()
    codec = stream.codec_context.codec.canonical_name
    zeros_escaped = codec in ("h264", "hevc") and has_length_prefixes(stream)
    step = float(1 / (stream.average_rate or stream.guessed_rate or 25))
    keyframe: int | None = None
    waiting = from_keyframe
    marked: list[tuple[int, int | None]] = []  # number and time of packets that the demuxer marks as damaged
    previous: Packet | None = None
    try:
        for packet in video.container.demux(stream):
            if packet.size and waiting and not packet.is_keyframe:
                packets.positions.append(packet.pos)
                packets.skipped += 1
                continue
            if packet.size and previous is None:
                waiting, keyframe = False, packet.pts
                packets.open_start = codec == "h264" and packet.is_keyframe and not has_idr(stream, bytes(packet))
            doubtful = keyframe is not None and (packet.pts is None or packet.pts < keyframe)
            if packets.first_frame is None and packets.intact is None:
                try:
                    packets.first_frame = next(iter(video.decode(packet)), None)
                except av.FFmpegError:
                    if not doubtful:
                        raise
            if not packet.size:
                continue
            if packets.intact is None and zeros_escaped and ZERO_RUN in bytes(packet).rstrip(b"\0"):
                packets.intact = packets.count
            if packet.is_corrupt:
                marked.append((packets.count, packet.pts))
            if previous is not None and _is_join(previous, packet, step):
                # At a join, the packets beside it are marked because the counters of the two parts do not match.
                joined = [each for each in marked if each[0] >= packets.count - JOIN_PACKETS]
                packets.joined |= {time for _, time in joined if time is not None}
                marked = marked[: len(marked) - len(joined)]
            previous = packet
            packets.positions.append(packet.pos)
            packets.size += packet.size
            if not packet.is_discard and not is_hidden(codec, packet):
                packets.shown.append(_Shown(packet.pts, packet.dts, packet.duration))
                if doubtful and packet.pts is not None:
                    packets.doubtful.add(packet.pts)
    except MemoryError:  # an FFmpegError too, but not the fault of the file
        raise
    except av.FFmpegError:
        packets.intact = packets.count
    if marked and (packets.intact is None or marked[0][0] < packets.intact):
        packets.intact = marked[0][0]
    if keyframe is not None:  # leading pictures whose time would be negative
        packets.shown = [each for each in packets.shown if each.pts is not None]
    return packets


def _is_join(previous: Packet, packet: Packet, step: float) -> bool:
    """Whether a packet begins another recording: a keyframe that follows at once, or whose clock is another one."""
    if not packet.is_keyframe or previous.dts is None or packet.dts is None:
        return False
    gap = float((packet.dts - previous.dts) * packet.time_base)
    return gap <= 1.5 * step or gap > JOIN_GAP


def is_hidden(codec: str, packet: Packet) -> bool:
    """Whether a VP8 or VP9 packet only stores a picture for reference (VP9 specification, 6.2; RFC 6386, 9.1)."""
    if codec not in ("vp8", "vp9"):
        return False
    data = bytes(packet)
    if codec == "vp8":
        return not data[0] >> 4 & 1
    if data[-1] & 0xE0 == 0xC0:  # a superframe, whose last frame is shown
        return False
    # frame_marker (2 bits), profile (2, and 1 reserved in profile 3), show_existing_frame, frame_type, show_frame
    at = 4 - (data[0] >> 4 & 3 == 3)
    return not data[0] >> (at - 1) & 1 and not data[0] >> (at - 3) & 1


def _declared_frames(container: InputContainer, stream: VideoStream) -> int:
    """Frames that the container declares, 0 for none. An MP4's edit list can hide some of the frames that it counts."""
    return min(stream.frames, len(stream.index_entries)) if "mp4" in container.format.name else stream.frames


def _holds_all_samples(path: Path, container: InputContainer) -> bool:
    """Whether the tables of an MP4 without fragments name only bytes in the file."""
    if "mp4" not in container.format.name or is_fragmented(path):
        return False
    ends = [entry.pos + entry.size for stream in container.streams for entry in stream.index_entries]
    return max(ends, default=path.stat().st_size + 1) <= path.stat().st_size


def _frames_by_duration(container: InputContainer, stream: VideoStream) -> int:
    """Estimate the frames of the declared duration, to estimate how much of a damaged clip is missing."""
    return round(float(stream.average_rate or 0) * (container.duration or 0) / 1_000_000)


def _continuous_times(shown: Sequence[_Shown], video: OpenVideo) -> tuple[list[int | None], int]:
    """The presentation times in decoding order, continuous where the clock jumps; and how often it jumps.

    Only in formats whose clock may jump, such as MPEG-TS: there, a step back or of more than `CLOCK_JUMP` is a jump.
    """
    from av.format import Flags

    stream = video.stream
    times: list[int | None] = [each.pts for each in shown]
    if not Flags(video.container.format.flags) & Flags.ts_discont or stream.time_base is None:
        return times, 0
    steps = [b.dts - a.dts for a, b in pairwise(shown) if a.dts is not None and b.dts is not None]
    usual = round(median(steps)) if steps else 0
    offset = jumps = 0
    for at, (before, after) in enumerate(pairwise(shown), 1):
        if before.dts is not None and after.dts is not None:
            step = after.dts - before.dts
            if step < 0 or step * stream.time_base > CLOCK_JUMP:
                offset += usual - step
                jumps += 1
        if after.pts is not None:
            times[at] = after.pts + offset
    return times, jumps


def _frame_times(
    times: Sequence[int | None], shown: Sequence[_Shown], stream: VideoStream
) -> tuple[tuple[float, ...], float]:
    """When each frame appears, in seconds after the first one; and the duration of all."""
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    known = sorted(time for time in times if time is not None)
    if len(known) < len(times) or stream.time_base is None or not known:
        return tuple(index / rate for index in range(len(times))), len(times) / rate
    seconds = tuple(float((time - known[0]) * stream.time_base) for time in known)
    intervals = [after - before for before, after in pairwise(seconds)]
    # Containers are seldom right about the last frame's duration; assume that of most frames.
    last = median(intervals) if intervals else float((shown[0].duration or 0) * stream.time_base)
    return seconds, seconds[-1] + (last or 1 / rate)


def _contradicting_counts(path: Path, container: InputContainer, stream: VideoStream) -> tuple[int, int] | None:
    """The numbers of frames in an MP4's tables of times and of offsets, if they differ.

    They must be equal (ISO/IEC 14496-12, 8.6.1.2 and 8.7.3); ffmpeg silently continues with the frames in both.
    """
    if "mp4" not in container.format.name or stream.frames in (0, len(stream.index_entries)) or is_fragmented(path):
        return None
    with open_container(path, ignore_editlist="1") as unedited:
        counts = stream.frames, len(unedited.streams[stream.index].index_entries)
    return counts if counts[0] != counts[1] else None
