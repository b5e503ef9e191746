"""From a video file to the sampled frames that a model looks at, or to an error that says why not.

Knows nothing of models, prompts or scores. Which frames, and which pixels of them: `sample_indices`, `view_size` and
`window_spans` (pure). One clip in this process: `probe`, `read_frames`, `read_windows`. Many clips in processes that
can be killed: `DecoderPool`.

**Every frame of a clip is decoded, strictly, although few are looked at.** A damaged stream otherwise goes unnoticed:
decord returns fewer frames than there are, or repeats old ones, without a word. The strict decode is PyAV's, one
thread, and it costs no more than to have decord seek to 8 frames, because talking-head clips have few keyframes to
seek to. `read_frames`, 8 frames a clip, on 99 real clips of 256x256 to 1280x720 that decord opens (1,000 s of video,
25,000 frames), processor seconds for all: PyAV, every frame 24.9; decord 25.1. `probe` takes 1.1.

Only when a whole decode would come near a time limit (more than `WHOLE_DECODE_PIXELS`) does decord come first: it
seeks to the sampled frames. Of such a clip the whole container is checked, but pictures only so far as decord
complains.

What is seen of damage: a file shorter than its own structure says (MP4, MOV, Matroska, WebM, AVI, GIF, MPEG-TS), broken
structure inside it, fewer packets than declared, packets marked corrupt, holes of zeros in H.264 and HEVC, whatever
makes a decoder complain or conceal, frames that never come out, tables of an MP4 that count unlike numbers of frames,
wrong checksums in Matroska. What is not seen: bytes inside one picture changed so that they still decode, wrongly: of
60 short clips with 1 to 16 wrong bits inside pictures, 3 in H.264, 10 in MPEG-4, 40 in HEVC, and 58 in VP9 and GIF,
which carry no redundancy. Nor whole units missing from a GIF, a MPEG-TS or the end of a fragmented MP4: they declare no
length. Nor wrong times or a wrong edit list in a header, which show fewer frames: they are believed.

Colours follow the stream's tags; an untagged stream is taken as BT.601, as ffmpeg and decord do. Rotation metadata is
applied, edit lists are kept, transparent pixels lie on white. Pixels that are not square stay as stored; HDR is not
tone-mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, cast

import numpy as np
import numpy.typing as npt

from lmm_qa.config import Sampling, View
from lmm_qa.errors import (
    UsageError,
)
from lmm_qa.video.temporal import FrameDynamics, FrameDynamicsRecorder, Span

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

from lmm_qa.video.probe import ClipInfo, _opened, _Scan, _scan, _truncated
from lmm_qa.video.sampling import _within, sample_indices, window_spans
from lmm_qa.video.views import Picture, _Rendered, view_size

WHOLE_DECODE_PIXELS = 4_000_000_000


"""frames x area up to which every frame is decoded: 8 to 10 s on one core, 3 minutes of 1280x720 at 25 a second."""


WINDOWS_BYTES = 512 * 1024 * 1024


"""Memory that the pictures of one clip's windows may take: 74 windows of 12 frames of 448 x 448 pixels."""


ONE_PICTURE_A_PACKET = frozenset({"h264", "hevc", "vp9", "av1", "gif", "mjpeg", "png", "prores", "ffv1"})


"""Codecs in which a packet that gives no picture is a loss. Others (MPEG-4, VP8) have packets that show nothing."""


LUMA_FIRST = frozenset({"yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p", "nv12", "gray"})


"""Pixel formats whose first plane is the brightness, one byte a pixel."""


DECORD_CODECS = frozenset({"h264", "mpeg4", "vp8", "vp9"})


"""Codecs of which decord 0.6.0 gives ffmpeg's pixels after a seek, where they have 8 bits, even sides and no rotation.
Not HEVC: on a seek into an open group of pictures it gives an earlier frame. Not AV1 and GIF: it opens neither."""


class ClipMeasurement(Protocol):
    """Measures one clip while it is decoded, for `read_frames(..., measure=...)`; see `lmm_qa.defects.features`.

    A decode worker makes one for each clip, so the class must be importable there.
    """

    sampling: ClassVar[Sampling]
    """The frames whose pictures are needed, independent of those that a rater looks at."""

    def __init__(self, rotation: int) -> None:
        """`rotation`: degrees clockwise by which stored frames are turned for display: 0, 90, 180 or 270."""

    def add_frame(self, luma: npt.NDArray[np.uint8]) -> None:
        """Receive the luma plane of the next frame, (height, width) uint8, not rotated; only valid during the call."""

    def add_picture(self, index: int, picture: Picture) -> None:
        """Receive the displayed picture of a frame that `sampling` chose, once, in order of `index`."""

    def features(self, indices: Sequence[int], dynamics: FrameDynamics) -> dict[str, float]:
        """Return what was measured, by name; called once, after the last frame.

        Args:
            indices: the frames that `sampling` chose; repeated where the clip has too few.
            dynamics: of all frames of the clip.
        """


@dataclass(frozen=True)
class Frames:
    """The sampled frames of one clip."""

    views: tuple[npt.NDArray[np.uint8], ...]
    """One array for each View, in order: (frames, height, width, 3) uint8 RGB, C-contiguous."""
    indices: tuple[int, ...]
    """Number of each frame in the clip, from 0; repeated where a clip has too few."""
    seconds: tuple[float, ...]
    """When each frame appears, in seconds after the clip's first frame."""
    info: ClipInfo
    decoder: str
    """"pyav" or "decord"."""
    dynamics: FrameDynamics | None = None
    """What was measured of every frame of the clip; None where decord sought the sampled ones."""
    features: dict[str, float] | None = None
    """What was measured of its pictures at native resolution, and of how its frames follow each other; None unless it
    was asked for, and where there is no dynamics."""


@dataclass(frozen=True)
class Windows:
    """The sampled frames of windows of time, which may overlap, over one clip; each picture is there once."""

    frames: Frames
    """Every picture of some window or of the whole, in order; `frames.info` and `frames.dynamics` are the clip's."""
    spans: tuple[Span, ...]
    """Seconds from and to of each window."""
    rows: tuple[tuple[int, ...], ...]
    """For each window, which pictures of `frames` it holds, as positions there."""
    whole_rows: tuple[int, ...]
    """Those that `read_frames` reads: sampled from the clip as a whole."""
    step: float
    """Seconds from one window to the next; more than was asked for where `WINDOWS_BYTES` would not have sufficed."""

    def __len__(self) -> int:
        return len(self.spans)

    def __iter__(self) -> Iterator[Frames]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Frames:
        """A window's frames, copied; their indices, seconds and info are those of the clip, and nothing is measured."""
        return replace(self._gather(self.rows[number]), dynamics=None, features=None)

    @property
    def whole(self) -> Frames:
        """What `read_frames` reads of the clip."""
        return self._gather(self.whole_rows)

    def _gather(self, rows: Sequence[int]) -> Frames:
        return replace(
            self.frames,
            views=tuple(view[list(rows)] for view in self.frames.views),
            indices=tuple(self.frames.indices[row] for row in rows),
            seconds=tuple(self.frames.seconds[row] for row in rows),
        )


def read_frames(
    path: str | Path, sampling: Sampling, views: Sequence[View], factor: int, measure: type[ClipMeasurement] | None = None
) -> Frames:
    """Read the sampled frames of a clip, holding no other in memory, save twelve and small pictures that are measured.

    Args:
        path: the clip.
        sampling: which frames.
        views: which pixels of them; at least one.
        factor: patch size x merge size of the vision tower, pixels.
        measure: measures the clip's `features`; None: they are not wanted.

    Raises:
        ClipNotFound: nothing is there.
        ClipUnreadable: it is no regular file, holds no video that can be decoded, or its pictures are too large.
        ClipTruncated: the stream breaks; the message says how many of how many frames could be read.
    """
    scan = _scan(Path(path))

    def choose(seconds: Sequence[float]) -> list[int]:
        return sample_indices(seconds, sampling)

    empty = partial(_Rendered, views, factor)
    if _decord_first(scan.info) and (sought := _seek(scan, choose(scan.seconds), empty)):
        return _gathered(scan, choose(scan.seconds), sought, "decord")
    whole = _decode_whole(scan, choose, empty, measure)
    return _gathered(whole.scan, choose(whole.scan.seconds), whole.kept, "pyav", whole.dynamics, whole.features)


def read_windows(
    path: str | Path,
    sampling: Sampling,
    views: Sequence[View],
    factor: int,
    window: float,
    step: float,
    measure: type[ClipMeasurement] | None = None,
) -> Windows:
    """Read the sampled frames of windows over a clip (see `window_spans`) and of the clip as a whole, each frame once.

    Every frame is decoded, however long the clip.

    Args:
        path: the clip.
        sampling: which frames of each window; as if it were a clip of its own.
        views: which pixels of them; at least one.
        factor: patch size x merge size of the vision tower, pixels.
        window: length of each window, seconds.
        step: seconds from one to the next; widened where the pictures would take more than `WINDOWS_BYTES`.
        measure: measures the clip's `features`; None: they are not wanted.

    Raises:
        UsageError: the window or the step is not above 0.
        ClipError: as `read_frames`.
    """
    _refuse_no_length(window, step)
    scan = _scan(Path(path))
    step = _affordable_step(
        scan.info,
        sampling,
        [view_size(scan.info.height, scan.info.width, view, factor) for view in views],
        window,
        step,
    )
    spans = window_spans(scan.info.duration, window, step)

    def looks(seconds: Sequence[float]) -> list[list[int]]:
        """The frames of each window."""
        shown = [_within(seconds, span) for span in spans]
        return [
            [part[index] for index in sample_indices([seconds[at] - seconds[part[0]] for at in part], sampling)]
            for part in shown
        ]

    def choose(seconds: Sequence[float]) -> list[int]:
        whole = sample_indices(seconds, sampling)
        return sorted({*whole, *(index for look in looks(seconds) for index in look)})

    decoded = _decode_whole(scan, choose, partial(_Rendered, views, factor), measure)
    scan = decoded.scan
    chosen = choose(scan.seconds)
    row = {index: number for number, index in enumerate(chosen)}
    return Windows(
        frames=_gathered(scan, chosen, decoded.kept, "pyav", decoded.dynamics, decoded.features),
        spans=tuple(spans),
        rows=tuple(tuple(row[index] for index in look) for look in looks(scan.seconds)),
        whole_rows=tuple(row[index] for index in sample_indices(scan.seconds, sampling)),
        step=step,
    )


def _refuse_no_length(window: float, step: float) -> None:
    if not (window > 0 and step > 0):
        raise UsageError(f"a window and a step are above 0 seconds, received {window:g} and {step:g}")


def _affordable_step(
    info: ClipInfo, sampling: Sampling, sizes: Sequence[tuple[int, int]], window: float, step: float
) -> float:
    """The step, or that at which pictures of these (height, width), windows and whole, take no more than they may."""
    most = WINDOWS_BYTES // (sampling.frames * sum(3 * height * width for height, width in sizes)) - 1
    return max(step, (info.duration - window) / max(1, most - 1))


def _gathered(
    scan: _Scan,
    indices: Sequence[int],
    kept: _Rendered,
    decoder: str,
    dynamics: FrameDynamics | None = None,
    features: dict[str, float] | None = None,
) -> Frames:
    return Frames(
        views=kept.stacked(indices),
        indices=tuple(indices),
        seconds=tuple(scan.seconds[index] for index in indices),
        info=scan.info,
        decoder=decoder,
        dynamics=dynamics,
        features=features,
    )


@dataclass(frozen=True)
class _Decoded:
    """What a decode of every frame gives."""

    scan: _Scan
    """Corrected where packets that show nothing were taken for frames."""
    kept: _Rendered
    dynamics: FrameDynamics
    features: dict[str, float] | None


def _decode_whole(
    scan: _Scan,
    choose: Callable[[Sequence[float]], Sequence[int]],
    empty: Callable[[], _Rendered],
    measure: type[ClipMeasurement] | None,
) -> _Decoded:
    """Decode every frame in order and keep the chosen ones, rendered.

    Args:
        scan: of the clip.
        choose: from when each frame appears to the numbers of those to keep.
        empty: makes what keeps their views.
        measure: as for `read_frames`.
    """
    wanted = set(choose(scan.seconds))
    measured = sample_indices(scan.seconds, measure.sampling) if measure else []
    kept = empty()
    moments: list[float | None] = []
    interlaced = False
    recorder = FrameDynamicsRecorder()
    measurement = measure(scan.info.rotation) if measure else None
    for index, frame in enumerate(_every_frame(scan)):
        if index in wanted or index in measured:
            picture = _upright(frame, scan.info)
            if index in wanted:
                kept.add(index, picture)
            if measurement and index in measured:
                measurement.add_picture(index, picture)
        luma = _luma(frame)
        recorder.add(luma)
        if measurement:
            measurement.add_frame(luma)
        moments.append(frame.time)
        interlaced = interlaced or frame.interlaced_frame
    if len(moments) == len(scan.seconds):
        dynamics = recorder.dynamics(scan.seconds, scan.info.duration)
        return _Decoded(scan, kept, dynamics, measurement.features(measured, dynamics) if measurement else None)
    # Two fields of one interlaced frame can be two packets.
    lost = len(moments) < len(scan.seconds) and scan.info.codec in ONE_PICTURE_A_PACKET and not interlaced
    if lost or not moments:
        raise _truncated(scan.path, len(moments), len(scan.seconds))
    return _decode_whole(_corrected(scan, moments), choose, empty, measure)


def _corrected(scan: _Scan, moments: Sequence[float | None]) -> _Scan:
    """The scan of a clip whose decoder gives another number of frames than there are packets."""
    times = [time for time in moments if time is not None]
    regular = len(times) < len(moments) or sorted(times) != times
    step = scan.info.duration / len(moments)
    seconds = tuple(index * step if regular else times[index] - times[0] for index in range(len(moments)))
    return replace(
        scan, seconds=seconds, info=replace(scan.info, frames=len(seconds), fps=len(seconds) / scan.info.duration)
    )


def _every_frame(scan: _Scan) -> Iterator[VideoFrame]:
    """Decode a clip from its first frame to its last.

    Raises:
        ClipTruncated: the decoder complains, or a frame comes out marked as damaged.
    """
    import av

    read = 0
    with _opened(scan.path) as (container, stream):
        try:
            for packet in container.demux(stream):
                for frame in packet.decode():
                    if frame.is_corrupt:
                        raise _truncated(scan.path, read, len(scan.seconds))
                    yield frame
                    read += 1
        except av.FFmpegError:
            raise _truncated(scan.path, read, len(scan.seconds)) from None


def _luma(frame: VideoFrame) -> npt.NDArray[np.uint8]:
    """(height, width): the brightness of a decoded frame as stored, a view of its memory where it has 8 bits."""
    from av.video.plane import VideoPlane

    if frame.format.name not in LUMA_FIRST:
        frame = frame.reformat(format="gray")
    plane = VideoPlane(frame, 0)
    # A view that cannot be written to: of one that can, PyAV would make a copy first.
    stored = np.frombuffer(memoryview(cast(bytes, plane)), np.uint8).reshape(-1, abs(plane.line_size))
    return stored[: frame.height, : frame.width]


def _upright(frame: VideoFrame, info: ClipInfo) -> Picture:
    """The displayed picture of a decoded frame."""
    turned = info.rotation % 180 != 0
    width, height = (info.height, info.width) if turned else (info.width, info.height)
    if any(component.is_alpha for component in frame.format.components):
        layered = frame.to_ndarray(format="rgba", width=width, height=height).astype(np.uint16)
        alpha = layered[..., 3:]
        picture = ((layered[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    else:
        picture = frame.to_ndarray(format="rgb24", width=width, height=height).astype(np.uint8, copy=False)
    return np.rot90(picture, -info.rotation // 90)


def _decord_first(info: ClipInfo) -> bool:
    """Whether a clip is too long to be decoded whole and of a kind that decord reads rightly."""
    return (
        info.frames * info.width * info.height > WHOLE_DECODE_PIXELS
        and info.codec in DECORD_CODECS
        and info.pixel_format in ("yuv420p", "yuvj420p")
        and info.rotation == 0
        and info.width % 2 == info.height % 2 == 0
    )


def _seek(scan: _Scan, indices: Sequence[int], empty: Callable[[], _Rendered]) -> _Rendered | None:
    """Have decord seek to the sampled frames; None where it is not installed (ARM), fails, or counts otherwise."""
    try:
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        reader = decord.VideoReader(str(scan.path.absolute()), ctx=decord.cpu(0), num_threads=1)
        if len(reader) != len(scan.seconds):  # decord knows nothing of edit lists
            return None
        kept = empty()
        for index in sorted(set(indices)):
            kept.add(index, reader[index].asnumpy())
        return kept
    except Exception:  # decord's own classes are not there to be named where it is not installed
        return None
