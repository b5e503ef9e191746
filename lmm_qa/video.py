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

import math
import mmap
import os
import pickle
import queue
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import zlib
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import IO, TYPE_CHECKING, Any, Self, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from lmm_qa.config import Sampling, View
from lmm_qa.errors import (
    ClipError,
    ClipNotFound,
    ClipTimeout,
    ClipTruncated,
    ClipUnreadable,
    DecoderCrashed,
    LmmQaError,
    UsageError,
)
from lmm_qa.face import face_window, find_face
from lmm_qa.passage import Passage
from lmm_qa.signs import MOMENTS, Signs, measure, reduced
from lmm_qa.trace import Span, Trace, Tracer

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

Picture = npt.NDArray[np.uint8]
"""(height, width, 3) uint8 RGB."""

MAX_SIDE = 16_384
MAX_AREA = 100_000_000
"""Pixels. A larger picture is refused before memory is taken for it."""

WHOLE_DECODE_PIXELS = 4_000_000_000
"""frames x area up to which every frame is decoded: 8 to 10 s on one core, 3 minutes of 1280x720 at 25 a second."""

WINDOWS_BYTES = 512 * 1024 * 1024
"""Memory that the pictures of one clip's windows may take: 74 windows of 12 frames of 448 x 448 pixels."""

HOLE = bytes(16)
"""Cannot occur in length-prefixed H.264 or HEVC: both escape three zero bytes in a row (H.264 7.4.1, H.265 7.4.2).
Some encoders pad the end of a picture with zeros, though."""

INDIRECT_FORMATS = frozenset({"hls", "dash", "concat", "imf", "sdp", "rtsp", "tty"})
"""Texts that ffmpeg would play, by opening other files or addresses that they name, or by drawing the letters."""

ONE_PICTURE_A_PACKET = frozenset({"h264", "hevc", "vp9", "av1", "gif", "mjpeg", "png", "prores", "ffv1"})
"""Codecs in which a packet that gives no picture is a loss. Others (MPEG-4, VP8) have packets that show nothing."""

SEARCHED = 3
"""Pictures of a clip in which the face is looked for: two have to agree, and each costs 10 to 40 ms."""

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Environment of the worker processes: there is one for each core that is to decode, and threads that wait for a small
product of matrices keep the others from theirs (0.19 instead of 0.06 processor seconds a clip were seen)."""

_LEAST_MEASURED = 32
"""Pixels a side to which a tiny picture is extended before it is measured."""

LUMA_FIRST = frozenset({"yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p", "nv12", "gray"})
"""Pixel formats whose first plane is the brightness, one byte a pixel."""

MEASURED = Sampling(strategy="pairs", frames=2 * MOMENTS)
"""The pictures that `lmm_qa.signs` measures, whatever frames a rater looks at."""

DECORD_CODECS = frozenset({"h264", "mpeg4", "vp8", "vp9"})
"""Codecs of which decord 0.6.0 gives ffmpeg's pixels after a seek, where they have 8 bits, even sides and no rotation.
Not HEVC: on a seek into an open group of pictures it gives an earlier frame. Not AV1 and GIF: it opens neither."""


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
    trace: Trace | None = None
    """What was measured of every frame of the clip; None where decord sought the sampled ones."""
    signs: Signs | None = None
    """What was measured of its pictures at native resolution, and of how its frames follow each other; None unless it
    was asked for, and where there is no trace."""


@dataclass(frozen=True)
class Windows:
    """The sampled frames of windows of time, which may overlap, over one clip; each picture is there once."""

    frames: Frames
    """Every picture of some window or of the whole, in order; `frames.info` and `frames.trace` are the clip's."""
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
        return replace(self._gather(self.rows[number]), trace=None, signs=None)

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


# Which frames, which pixels: pure


def sample_indices(seconds: Sequence[float], sampling: Sampling) -> list[int]:
    """Choose frames.

    Args:
        seconds: when each frame of the clip appears, from 0, not decreasing; at least one.
        sampling: see `lmm_qa.config.Sampling`.

    Returns:
        frame numbers in 0..len(seconds) - 1, not decreasing, save that `pairs` can overlap. Exactly `sampling.frames`
        of them, except for `fps`: one for each step of 1/fps seconds, and `sampling.frames` spread uniformly where the
        steps are more than that.
    """
    if sampling.strategy == "pairs":
        moments = _spread(len(seconds), sampling.frames // 2, sampling.phase)
        return [index for moment in moments for index in _pair(seconds, moment, sampling.gap)]
    if sampling.strategy == "fps":
        # The tolerance keeps a frame that rounding puts a hair's breadth after the step that asks for it.
        steps = int(seconds[-1] * sampling.fps + 1e-6) + 1
        if steps <= sampling.frames:
            return [_shown_at(seconds, (step + sampling.phase - 0.5) / sampling.fps) for step in range(steps)]
    return _spread(len(seconds), sampling.frames, sampling.phase)


def _spread(frames: int, shares: int, phase: float) -> list[int]:
    """One frame of each equal share of a clip."""
    return [int((share + phase) * frames / shares) for share in range(shares)]


def _shown_at(seconds: Sequence[float], moment: float) -> int:
    """The frame on screen at a moment: the last one that has appeared by then."""
    return max(0, bisect_right(seconds, moment + 1e-6) - 1)


def _pair(seconds: Sequence[float], first: int, gap: float) -> tuple[int, int]:
    """A frame and the one `gap` seconds, at least one frame, later; both earlier where the clip ends before that."""
    last = len(seconds) - 1
    if seconds[first] + gap > seconds[last] + 1e-6:
        return max(0, min(first, last - 1, _shown_at(seconds, seconds[last] - gap))), last
    second = _shown_at(seconds, seconds[first] + gap)
    return (first, second) if second > first else (min(first, max(0, last - 1)), min(first + 1, last))


def window_spans(duration: float, window: float, step: float) -> list[Span]:
    """Cover a clip with windows, the last of which ends with it; a clip that is no longer than a window has one.

    Args:
        duration: of the clip, seconds.
        window: length of each, seconds, above 0.
        step: seconds from the beginning of one to that of the next, above 0.
    """
    room = duration - window
    if room <= 1e-6:
        return [(0.0, duration)]
    starts = [number * step for number in range(math.ceil(room / step - 1e-6))]
    return [(start, start + window) for start in starts] + [(room, duration)]


def _within(seconds: Sequence[float], span: Span) -> range:
    """The frames that appear in a span; the one that is on screen where none does."""
    first, stop = (bisect_left(seconds, edge - 1e-6) for edge in span)
    return range(first, stop) if stop > first else range(first - 1, first)


def view_size(height: int, width: int, view: View, factor: int) -> tuple[int, int]:
    """Size of the frames of a view.

    `face` is a square. `whole` is rounded as Qwen's `smart_resize` does it: both sides to the nearest multiple of
    `factor`; where the area exceeds `view.max_pixels`, both shrunk by the same ratio and rounded down; never under one
    `factor` a side.

    Args:
        height: of the displayed picture, pixels, at least 1.
        width: the same.
        view: see `lmm_qa.config.View`.
        factor: patch size x merge size of the vision tower, pixels (28 for Qwen2-VL, 32 for Qwen3-VL).

    Returns:
        (height, width) in pixels, multiples of `factor`.
    """
    height, width = max(height, factor), max(width, factor)
    if view.kind == "crop":
        return _multiple(min(view.size, height), factor), _multiple(min(view.size, width), factor)
    if view.kind == "face":
        return (_multiple(view.size, factor),) * 2
    rounded = round(height / factor) * factor, round(width / factor) * factor
    if rounded[0] * rounded[1] <= view.max_pixels:
        return rounded
    ratio = (height * width / view.max_pixels) ** 0.5
    shrunk = _multiple(height / ratio, factor), _multiple(width / ratio, factor)
    # A very long picture: the side that could not go under `factor` takes its pixels from the other.
    return (
        min(shrunk[0], _multiple(view.max_pixels / shrunk[1], factor)),
        min(shrunk[1], _multiple(view.max_pixels / shrunk[0], factor)),
    )


def _multiple(side: float, factor: int) -> int:
    """The largest multiple of `factor` that is not over `side`, at least one."""
    return max(1, int(side // factor)) * factor


def _render(picture: Picture, view: View, factor: int, face: tuple[int, int, int]) -> Picture:
    """Make one frame of a view from the whole picture; `face` is left, top and side of the window around it."""
    height, width = picture.shape[:2]
    rows, columns = view_size(height, width, view, factor)
    if view.kind == "crop":
        top = _window_start(height, rows, view.center[1])
        left = _window_start(width, columns, view.center[0])
        return picture[top : top + rows, left : left + columns]
    x, y, side = face
    box = (x, y, x + side, y + side) if view.kind == "face" else (0, 0, width, height)
    if box == (0, 0, columns, rows) == (0, 0, width, height):
        return picture
    return np.asarray(Image.fromarray(picture).resize((columns, rows), Image.Resampling.BICUBIC, box))


def _padded(picture: Picture, factor: int) -> Picture:
    """Repeat the last row and column of a tiny picture until both sides are at least `factor`."""
    rows, columns = (max(0, factor - side) for side in picture.shape[:2])
    if not rows and not columns:
        return picture
    return np.pad(picture, ((0, rows), (0, columns), (0, 0)), mode="edge")


def _window_start(side: int, window: int, center: float) -> int:
    """Where a window begins that is centred at a fraction of a side and does not leave it."""
    return min(max(0, round(side * center - window / 2)), side - window)


# One clip, in this process


class _Rendered:
    """Views of the pictures that are kept, by frame number.

    Where a view is of the face, the first `SEARCHED` pictures wait until it has been looked for in them. The window
    that comes out holds for the whole clip: what moves in it is the head.
    """

    def __init__(self, views: Sequence[View], factor: int) -> None:
        self._views, self._factor = tuple(views), factor
        self._face: tuple[int, int, int] | None = None if any(view.kind == "face" for view in views) else (0, 0, 0)
        self._waiting: dict[int, Picture] = {}
        self._done: dict[int, list[Picture]] = {}

    def add(self, index: int, picture: Picture) -> None:
        """Make and keep the views of one picture."""
        self._waiting[index] = _padded(picture, self._factor)
        if self._face is not None or len(self._waiting) == SEARCHED:
            self._finish()

    def stacked(self, indices: Sequence[int]) -> tuple[npt.NDArray[np.uint8], ...]:
        """The views of these frames, each (frames, height, width, 3)."""
        if self._waiting:
            self._finish()
        return tuple(np.stack(pictures) for pictures in zip(*(self._done[index] for index in indices), strict=True))

    def _finish(self) -> None:
        if self._face is None:
            pictures = np.stack(list(self._waiting.values()))
            self._face = face_window(find_face(pictures), *pictures.shape[1:3])
        for index, picture in self._waiting.items():
            self._done[index] = [_render(picture, view, self._factor, self._face) for view in self._views]
        self._waiting = {}


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


def read_frames(
    path: str | Path, sampling: Sampling, views: Sequence[View], factor: int, measured: bool = False
) -> Frames:
    """Read the sampled frames of a clip, holding no other in memory, save twelve and small pictures that are measured.

    Args:
        path: the clip.
        sampling: which frames.
        views: which pixels of them; at least one.
        factor: patch size x merge size of the vision tower, pixels.
        measured: whether the clip's `signs` are wanted too.

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
    whole = _decode_whole(scan, choose, empty, measured)
    return _gathered(whole.scan, choose(whole.scan.seconds), whole.kept, "pyav", whole.trace, whole.signs)


def read_windows(
    path: str | Path,
    sampling: Sampling,
    views: Sequence[View],
    factor: int,
    window: float,
    step: float,
    measured: bool = False,
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
        measured: whether the clip's `signs` are wanted too.

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

    decoded = _decode_whole(scan, choose, partial(_Rendered, views, factor), measured)
    scan = decoded.scan
    chosen = choose(scan.seconds)
    row = {index: number for number, index in enumerate(chosen)}
    return Windows(
        frames=_gathered(scan, chosen, decoded.kept, "pyav", decoded.trace, decoded.signs),
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
    trace: Trace | None = None,
    signs: Signs | None = None,
) -> Frames:
    return Frames(
        views=kept.stacked(indices),
        indices=tuple(indices),
        seconds=tuple(scan.seconds[index] for index in indices),
        info=scan.info,
        decoder=decoder,
        trace=trace,
        signs=signs,
    )


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


def _length_prefixed(stream: VideoStream) -> bool:
    """Whether H.264 or HEVC units are preceded by their length (MP4, Matroska), not by start codes (MPEG-TS)."""
    return (stream.codec_context.extradata or b"")[:1] == b"\1"


def _declared_frames(container: InputContainer, stream: VideoStream) -> int:
    """Frames that the container declares, 0 for none. An MP4's edit list can hide some of the frames that it counts."""
    return min(stream.frames, len(stream.index_entries)) if "mp4" in container.format.name else stream.frames


def _contradiction(path: Path, container: InputContainer, stream: VideoStream) -> tuple[int, int] | None:
    """The two numbers of frames that an MP4's tables of times and of places give, where these differ.

    They must be one number (ISO/IEC 14496-12, 8.6.1.2 and 8.7.3); ffmpeg goes on with what both have.
    """
    if "mp4" not in container.format.name or stream.frames in (0, len(stream.index_entries)):
        return None
    with _container(path, ignore_editlist="1") as unedited:
        counts = stream.frames, len(unedited.streams[stream.index].index_entries)
    return counts if counts[0] != counts[1] else None


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


@dataclass(frozen=True)
class _Decoded:
    """What a decode of every frame gives."""

    scan: _Scan
    """Corrected where packets that show nothing were taken for frames."""
    kept: _Rendered
    trace: Trace
    signs: Signs | None


def _decode_whole(
    scan: _Scan,
    choose: Callable[[Sequence[float]], Sequence[int]],
    empty: Callable[[], _Rendered],
    measured: bool,
) -> _Decoded:
    """Decode every frame in order and keep the chosen ones, rendered.

    Args:
        scan: of the clip.
        choose: from when each frame appears to the numbers of those to keep.
        empty: makes what keeps their views.
        measured: whether the signs are wanted.
    """
    wanted = set(choose(scan.seconds))
    looked_at = sample_indices(scan.seconds, MEASURED) if measured else []
    pictures: dict[int, Picture] = dict.fromkeys(looked_at, np.empty((0, 0, 3), np.uint8))
    kept = empty()
    moments: list[float | None] = []
    interlaced = False
    tracer, passage = Tracer(), Passage(-scan.info.rotation // 90)
    for index, frame in enumerate(_every_frame(scan)):
        if index in wanted or index in pictures:
            picture = _upright(frame, scan.info)
            if index in wanted:
                kept.add(index, picture)
            if index in pictures:
                pictures[index] = _padded(reduced(picture), _LEAST_MEASURED)
        luma = _luma(frame)
        tracer.add(luma)
        if measured:
            passage.add(luma)
        moments.append(frame.time)
        interlaced = interlaced or frame.interlaced_frame
    if len(moments) == len(scan.seconds):
        trace = tracer.trace(scan.seconds, scan.info.duration)
        signs = measure([pictures[index] for index in looked_at], looked_at, trace, passage) if measured else None
        return _Decoded(scan, kept, trace, signs)
    # Two fields of one interlaced frame can be two packets.
    lost = len(moments) < len(scan.seconds) and scan.info.codec in ONE_PICTURE_A_PACKET and not interlaced
    if lost or not moments:
        raise _truncated(scan.path, len(moments), len(scan.seconds))
    return _decode_whole(_corrected(scan, moments), choose, empty, measured)


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


# Many clips, in processes that can be killed

Reader = Callable[..., Any]
"""What a worker calls with a request, whose first part is the clip's path: `read_frames`, `read_windows`."""

_START_LIMIT = 60.0
"""Seconds that a worker may take to start: imports from a cold or distant disk, on a busy machine."""


class DecoderPool:
    """Worker processes that read clips, and can be killed when a decoder hangs or crashes.

    A worker is a fresh interpreter that imports this module and nothing of the caller's: it is safe beside threads,
    torch and CUDA, and needs no `if __name__ == "__main__"`. Use as a context manager; leaving it kills the workers.
    """

    def __init__(self, workers: int = 2, timeout: float = 60.0, *, _reader: Reader = read_frames) -> None:
        """
        Args:
            workers: processes, at least 1.
            timeout: seconds that one clip may take.
        """
        if workers < 1 or timeout <= 0:
            raise UsageError(f"workers and timeout must be positive, received {workers} and {timeout}")
        self._timeout = timeout
        self._reader = _reader
        self._workers = [_Worker() for _ in range(workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="lmm-qa-decoder")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the workers; clips not yet read are given up. May be called again."""
        for worker in self._workers:
            worker.close()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.discard()

    def imap(
        self,
        paths: Iterable[str | Path],
        sampling: Sampling,
        views: Sequence[View],
        factor: int,
        measured: bool = False,
    ) -> Iterator[Frames | ClipError]:
        """Read clips, in order; at most two clips a worker are taken from `paths` ahead of the one handed out.

        A clip that cannot be read is handed out as its error (see `read_frames`); besides, ClipTimeout when it took
        longer than the limit, and DecoderCrashed when its worker died. The other clips go on.
        """
        requests = ((Path(path), sampling, tuple(views), factor, measured) for path in paths)
        return self._imap(self._reader, requests)

    def imap_windows(
        self,
        paths: Iterable[str | Path],
        sampling: Sampling,
        views: Sequence[View],
        factor: int,
        window: float,
        step: float,
        measured: bool = False,
    ) -> Iterator[Windows | ClipError]:
        """Read windows over clips (see `read_windows`), as `imap` reads frames.

        Raises:
            UsageError: the window or the step is not above 0.
        """
        _refuse_no_length(window, step)
        requests = ((Path(path), sampling, tuple(views), factor, window, step, measured) for path in paths)
        return self._imap(read_windows, requests)

    def _imap(self, reader: Reader, requests: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        ahead: deque[Future[Any]] = deque()
        try:
            for request in requests:
                ahead.append(self._threads.submit(self._read, reader, request))
                if len(ahead) >= 2 * len(self._workers):
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

    def _read(self, reader: Reader, request: tuple[Any, ...]) -> Any:
        worker = self._idle.get()
        try:
            return worker.read(reader, request, self._timeout)
        except ClipError as error:
            return error
        finally:
            self._idle.put(worker)


class _Worker:
    """One process that reads one clip at a time; started when first needed, and again after it died."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._complaints: IO[bytes] | None = None

    def read(self, reader: Reader, request: tuple[Any, ...], timeout: float) -> Any:
        """Have the process read a clip.

        Raises:
            ClipTimeout: it took longer than the limit.
            DecoderCrashed: the process died, or did not start.
            LmmQaError: what the reader raised.
        """
        path = request[0]
        process = self._running()
        try:
            kind, value = _exchange(process, (reader, request), timeout)
        except TimeoutError:
            self.discard()
            raise ClipTimeout(
                f"reading {path} took longer than {timeout:g} s: raise the time limit, or cut or shrink the clip"
            ) from None
        except EOFError:
            raise DecoderCrashed(f"the process that read {path} died: {self.discard()}") from None
        if not issubclass(kind, LmmQaError):
            return value
        error = kind.__new__(kind)
        Exception.__init__(error, value)
        raise error

    def close(self) -> None:
        """Kill the process, even while another thread waits for it, and start no other."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()

    def discard(self) -> str:
        """Kill the process, wait for its end and close what belonged to it; say how it ended."""
        with self._lock:
            process, complaints = self._process, self._complaints
            self._process = self._complaints = None
        if process is None or complaints is None:
            return "it was not running"
        process.kill()
        code = process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # what could not be written when the process died
                cast(IO[bytes], pipe).close()
        with complaints:
            complaints.seek(0)
            last = complaints.read().decode(errors="replace").strip().rpartition("\n")[2]
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{cause}, {last}" if last else cause

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self.discard()  # it died while idle, of something that is not the next clip's fault
        if self._process is not None:
            return self._process
        with self._lock:
            if self._closed:
                raise DecoderCrashed("the decoder pool was closed")
            self._complaints = tempfile.TemporaryFile()  # noqa: SIM115  `discard` closes it
            # The same search path as here, so that an import that works here works there.
            program = f"import sys; sys.path[:] = {sys.path!r}; from lmm_qa.video import _serve; _serve()"
            process = self._process = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                env=os.environ | ONE_THREAD,
            )
        try:
            _exchange(process, None, _START_LIMIT)
        except (TimeoutError, EOFError):
            raise DecoderCrashed(f"no decoding process could be started: {self.discard()}") from None
        return process


def _exchange(process: subprocess.Popen[bytes], request: object, timeout: float) -> Any:
    """Send a request to a worker process and wait for its answer.

    Raises:
        TimeoutError: there was none in `timeout` seconds; the process has been killed.
        EOFError: the process died.
    """
    late = threading.Event()

    def kill() -> None:
        late.set()
        process.kill()

    limit = threading.Timer(timeout, kill)
    limit.daemon = True
    limit.start()
    message = pickle.dumps(request)
    requests, answers = cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)
    try:
        requests.write(message)
        requests.flush()
        answer = pickle.load(answers)
    except (OSError, EOFError, pickle.UnpicklingError):
        answer = None
        if not late.is_set():
            raise EOFError from None
    finally:
        limit.cancel()
        limit.join()
    if late.is_set():
        raise TimeoutError
    return answer


def _serve() -> None:
    """Read clips for a `DecoderPool` in another process, until that one closes the pipe."""
    import av  # noqa: F401  here, so that the first clip's time limit does not pay for it

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then kills this process
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whatever a decoder prints must not be an answer
    with suppress(EOFError, BrokenPipeError):
        while True:
            request = pickle.load(sys.stdin.buffer)
            pickle.dump(request and _answer(*request), answers, protocol=pickle.HIGHEST_PROTOCOL)
            answers.flush()


def _answer(reader: Reader, request: tuple[Any, ...]) -> tuple[type, Any]:
    """Read a clip: the class of what was read and this, or the class and message of the error."""
    try:
        read = reader(*request)
        return type(read), read
    except LmmQaError as error:
        return type(error), str(error)
    except Exception as error:
        return ClipUnreadable, f"reading {request[0]} failed: {type(error).__name__}: {error}"
