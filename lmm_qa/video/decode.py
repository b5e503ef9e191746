"""Decode a clip: the sampled frames that a model sees, and measurements of every frame.

Every frame is decoded, strictly, even if few are sampled: a damaged stream otherwise goes unnoticed, and talking-head
clips have so few keyframes that seeking is not faster (docs/decoding.md has the measurements). Only clips of more than
`MAX_FULL_DECODE_PIXELS` are seeked in, with decord.

Pictures are those that a viewer sees, see `lmm_qa.video.display`; edit lists are applied; interlaced frames are
deinterlaced by ffmpeg's bwdif filter.

Knows nothing of models, prompts or scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from lmm_qa.config import Sampling, View
from lmm_qa.errors import UsageError, describe_exception
from lmm_qa.video.container import open_video, truncated_error
from lmm_qa.video.display import UNCROPPED, Display, Orientation, Picture
from lmm_qa.video.playback import Playback, playback
from lmm_qa.video.probe import ClipInfo, ContainerScan, scan_container
from lmm_qa.video.sampling import frames_in_span, sample_indices, window_spans
from lmm_qa.video.sound import NO_SOUND, Sound, read_sound
from lmm_qa.video.temporal import FrameDynamics, FrameDynamicsRecorder, Span
from lmm_qa.video.views import ViewRenderer, view_size
from lmm_qa.video.webp import read_webp_frames

if TYPE_CHECKING:
    from av.filter import Graph
    from av.video.frame import VideoFrame

    from lmm_qa.video.measurement.lip_sync import LipSync

Result = TypeVar("Result")


class Note(StrEnum):
    """What a user should know about the frames of a clip; shows only while they are decoded."""

    INTERLACED = "Interlaced video, deinterlaced with bwdif."
    RESIZED = "The size of the pictures changes during the clip; all are shown in the largest one."


Decode = Callable[[ContainerScan, set[Note]], Iterable["VideoFrame"]]
"""Yields every frame of a clip, and adds to the notes."""

Choice = Callable[[Sequence[float]], Sequence[int]]
"""Maps the moments of a clip's `Playback`, in seconds, to the indices of those whose frames are used."""

MAX_FULL_DECODE_PIXELS = 4_000_000_000
"""frames x height x width up to which every frame is decoded: 8 to 10 s on one core, 3 minutes of 1280x720."""

MAX_WINDOW_BYTES = 512 * 1024 * 1024
"""Memory for the pictures of one clip's windows: 74 windows of 12 frames of 448x448 pixels."""

ONE_FRAME_PER_PACKET = frozenset({"h264", "hevc", "vp9", "av1", "gif", "mjpeg", "png", "prores", "ffv1"})
"""Codecs in which a packet without a frame is a loss. Others (MPEG-4, VP8) have packets that show nothing."""

DECORD_CODECS = frozenset({"h264", "mpeg4", "vp8", "vp9"})
"""Codecs for which decord 0.6.0 returns ffmpeg's pixels after a seek, given 8 bits, even sides and no rotation.
Not HEVC: seeking into an open group of pictures returns an earlier frame. AV1 and GIF it cannot open."""


class ClipMeasurement(Protocol):
    """Measures one clip while it is decoded, for `read_frames(..., measure=...)`.

    Decode workers receive the class, so it must be importable there.
    """

    sampling: ClassVar[Sampling]
    """Selects the frames whose pictures are needed, independent of those that a rater sees."""

    def __init__(self, orientation: Orientation, sound: Sound | None) -> None:
        """
        Args:
            orientation: how stored frames are turned for display.
            sound: of the clip; None if the clip can have none.
        """

    def add_frame(self, luma: npt.NDArray[np.uint8], second: float) -> None:
        """Receive the next frame.

        Args:
            luma: luma plane, (height, width) uint8, not turned; valid during this call only.
            second: when the frame appears, after the first one.
        """

    def add_picture(self, index: int, picture: Picture) -> None:
        """Receive the picture of a frame that `sampling` selected, turned, with the pixels as they are stored; once per
        frame, in order."""

    def features(self, indices: Sequence[int], dynamics: FrameDynamics) -> dict[str, float]:
        """Return the measured values by name. Called once, after the last frame.

        Args:
            indices: the frames that `sampling` selected; repeated where the clip has too few or holds one.
            dynamics: of all frames of the clip.
        """

    def lip_sync(self) -> LipSync | None:
        """Return the offset between lips and sound; None if it cannot be measured. Called once, after `features`, whose
        values are kept if this fails."""


@dataclass(frozen=True)
class Frames:
    """The sampled frames of one clip."""

    views: tuple[npt.NDArray[np.uint8], ...]
    """One array for each View, in order: (frames, height, width, 3) uint8 RGB, C-contiguous."""
    indices: tuple[int, ...]
    """Number of each frame in the clip, from 0; repeated where a clip has too few, or holds a frame."""
    seconds: tuple[float, ...]
    """When each is on screen, in seconds after the clip's first frame; later than it appears if it is held."""
    info: ClipInfo
    decoder: str
    """"pyav", "decord", or "memory" for frames that were not decoded."""
    dynamics: FrameDynamics | None = None
    """Measured on every frame; None if decord seeked to the sampled ones."""
    features: dict[str, float] | None = None
    """Result of the `measure` argument; None if there was none, if it failed, and if there are no `dynamics`."""
    measurement_error: str | None = None
    """Why `measure` failed, for `features` or for `lip_sync` alone, with the line of code; None if it did not."""
    sound: Sound | None = None
    """None for frames in memory."""
    lip_sync: LipSync | None = None
    """Result of the `measure` argument; None as `features`, and if no mouth and sound can be compared."""


@dataclass(frozen=True)
class Windows:
    """The sampled frames of windows of time over one clip. Windows may overlap; each frame is stored once."""

    frames: Frames
    """Every frame of the windows and of the clip as a whole, in order."""
    spans: tuple[Span, ...]
    """Start and end of each window, in seconds."""
    positions: tuple[tuple[int, ...], ...]
    """For each window, the positions of its frames in `frames`."""
    whole_positions: tuple[int, ...]
    """Positions of the frames that `read_frames` samples from the whole clip."""
    step: float
    """Seconds between the starts of windows; more than requested if they would exceed `MAX_WINDOW_BYTES`."""

    def __len__(self) -> int:
        return len(self.spans)

    def __iter__(self) -> Iterator[Frames]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Frames:
        """Return a copy of one window's frames; indices, seconds and info refer to the clip; nothing is measured."""
        return replace(
            self._select(self.positions[number]), dynamics=None, features=None, measurement_error=None, lip_sync=None
        )

    @property
    def whole(self) -> Frames:
        """The same as `read_frames` returns for the clip."""
        return self._select(self.whole_positions)

    def _select(self, positions: Sequence[int]) -> Frames:
        return replace(
            self.frames,
            views=tuple(view[list(positions)] for view in self.frames.views),
            indices=tuple(self.frames.indices[position] for position in positions),
            seconds=tuple(self.frames.seconds[position] for position in positions),
        )


def read_frames(
    path: str | Path,
    sampling: Sampling,
    views: Sequence[View],
    factor: int,
    measure: type[ClipMeasurement] | None = None,
) -> Frames:
    """Read the sampled frames of a clip. Other frames are not kept in memory.

    Args:
        path: the clip.
        sampling: which frames.
        views: which pixels of them; at least one.
        factor: patch size x merge size of the vision tower, pixels.
        measure: makes the clip's `features`. If it fails, the frames are returned with a `measurement_error`.

    Raises:
        ClipNotFound: the file does not exist.
        ClipUnreadable: it is not a regular file, contains no video that can be decoded, or its pictures are too large.
        ClipTruncated: the stream is damaged; the message says how many of how many frames could be read.
    """
    scan = scan_container(Path(path))

    def choose(seconds: Sequence[float]) -> list[int]:
        return sample_indices(seconds, sampling)

    sound = _sound(scan)
    if _prefers_decord(scan) and (frames := _seek_with_decord(scan, choose, views, factor)):
        return replace(frames, sound=sound)
    return collect_frames(scan, iterate_frames, choose, views, factor, measure, sound=sound)[1]


def read_windows(
    path: str | Path,
    sampling: Sampling,
    views: Sequence[View],
    factor: int,
    window: float,
    step: float,
    measure: type[ClipMeasurement] | None = None,
) -> Windows:
    """Read the sampled frames of windows over a clip (see `window_spans`) and of the whole clip, each frame once.

    Every frame is decoded, however long the clip.

    Args:
        path: the clip.
        sampling: which frames of each window, as if it were a clip of its own.
        views: which pixels of them; at least one.
        factor: patch size x merge size of the vision tower, pixels.
        window: length of each window, seconds.
        step: seconds between the starts of windows; increased if the pictures would exceed `MAX_WINDOW_BYTES`.
        measure: as for `read_frames`.

    Raises:
        UsageError: the window or the step is not above 0.
        ClipError: as `read_frames`.
    """
    check_window(window, step)
    scan = scan_container(Path(path))
    sound = _sound(scan)

    def collect(choose: Choice) -> tuple[Sequence[float], Frames]:
        corrected, frames = collect_frames(scan, iterate_frames, choose, views, factor, measure, sound=sound)
        return playback(corrected.seconds, corrected.info.duration).seconds, frames

    return select_windows(scan.info, collect, sampling, views, factor, window, step)


def select_windows(
    info: ClipInfo,
    collect: Callable[[Choice], tuple[Sequence[float], Frames]],
    sampling: Sampling,
    views: Sequence[View],
    factor: int,
    window: float,
    step: float,
) -> Windows:
    """Sample windows over a clip and the clip as a whole; see `read_windows`.

    Args:
        info: of the clip.
        collect: returns the moments of the clip's `Playback`, and the frames that a function of these chooses.
        sampling, views, factor, window, step: as for `read_windows`.
    """
    sizes = [view_size(info.height, info.width, view, factor) for view in views]
    step = _affordable_step(info, sampling, sizes, window, step)
    spans = window_spans(info.duration, window, step)

    def window_indices(seconds: Sequence[float]) -> list[list[int]]:
        shown = [frames_in_span(seconds, span) for span in spans]
        return [
            [part[index] for index in sample_indices([seconds[at] - seconds[part[0]] for at in part], sampling)]
            for part in shown
        ]

    def choose(seconds: Sequence[float]) -> list[int]:
        return sorted(
            {*sample_indices(seconds, sampling), *(index for part in window_indices(seconds) for index in part)}
        )

    times, frames = collect(choose)
    position = {index: number for number, index in enumerate(choose(times))}
    return Windows(
        frames=frames,
        spans=tuple(spans),
        positions=tuple(tuple(position[index] for index in part) for part in window_indices(times)),
        whole_positions=tuple(position[index] for index in sample_indices(times, sampling)),
        step=step,
    )


def check_window(window: float, step: float) -> None:
    """Raise UsageError unless a window's length and step, in seconds, are above 0."""
    if not (window > 0 and step > 0):
        raise UsageError(f"window and step must be above 0 seconds, received {window:g} and {step:g}")


def _affordable_step(
    info: ClipInfo, sampling: Sampling, sizes: Sequence[tuple[int, int]], window: float, step: float
) -> float:
    """Increase the step until pictures of these (height, width) fit into `MAX_WINDOW_BYTES`."""
    bytes_per_window = sampling.frames * sum(3 * height * width for height, width in sizes)
    most = MAX_WINDOW_BYTES // bytes_per_window - 1  # one share is for the frames of the whole clip
    return max(step, (info.duration - window) / max(1, most - 1))


def collect_frames(
    scan: ContainerScan,
    decode: Decode,
    choose: Choice,
    views: Sequence[View],
    factor: int,
    measure: type[ClipMeasurement] | None,
    decoder: str = "pyav",
    sound: Sound | None = None,
) -> tuple[ContainerScan, Frames]:
    """Go through a clip from start to end, keep the chosen frames, measure all.

    Args:
        scan: of the clip.
        decode: yields every frame of the clip.
        choose: maps the moments of the clip's `Playback` to the indices of those to keep.
        views, factor, measure: as for `read_frames`.
        decoder: what returns the frames, for `Frames.decoder`.
        sound: of the clip.

    Returns:
        The scan, corrected if it counted packets without a frame; and the frames.
    """
    screen = playback(scan.seconds, scan.info.duration)
    moments = choose(screen.seconds)
    sampled = frozenset(screen.frames[moment] for moment in moments)
    measured = [screen.frames[moment] for moment in sample_indices(screen.seconds, measure.sampling)] if measure else []
    pictured = frozenset(measured)
    display = scan.display
    renderer = ViewRenderer(views, factor, display.pixel_shape)
    recorder = FrameDynamicsRecorder()
    measurement = _GuardedMeasurement(measure, display.orientation, sound) if measure else None
    times: list[float | None] = []
    shown: list[int | None] = []
    notes: set[Note] = set()
    for index, frame in enumerate(decode(scan, notes)):
        if (frame.width, frame.height) != (display.width, display.height):
            notes.add(Note.RESIZED)
            if frame.width * frame.height > display.width * display.height:
                larger = replace(display, width=frame.width, height=frame.height, crop=UNCROPPED)
                resized = _resize_scan(scan, larger)
                return collect_frames(resized, decode, choose, views, factor, measure, decoder, sound)
        if index in sampled or index in pictured:
            picture = display.picture(frame)
            if index in sampled:
                renderer.add(index, picture)
            if measurement and index in pictured:
                measurement.add_picture(index, picture)
        luma = display.luma(frame)
        recorder.add(luma)
        if measurement:
            measurement.add_frame(luma, scan.seconds[min(index, len(scan.seconds) - 1)])
        times.append(frame.time)
        shown.append(frame.pts)
    if len(times) == len(scan.seconds):
        scan = replace(scan, info=replace(scan.info, warnings=(*scan.info.warnings, *sorted(notes))))
        dynamics = recorder.dynamics(scan.seconds, scan.info.duration)
        frames = replace(stack_frames(scan, screen, moments, renderer, decoder), dynamics=dynamics, sound=sound)
        if not measurement:
            return scan, frames
        features, lip_sync = measurement.features(measured, dynamics), measurement.lip_sync()
        return scan, replace(frames, features=features, lip_sync=lip_sync, measurement_error=measurement.error)
    corrected = _without_doubtful(scan, shown)
    if corrected is None:
        # Two fields of one interlaced frame can be two packets.
        exact = scan.info.codec in ONE_FRAME_PER_PACKET and Note.INTERLACED not in notes
        if not times or (exact and len(times) < len(scan.seconds)):
            raise truncated_error(scan.path, len(times), len(scan.seconds))
        corrected = _correct_scan(scan, times)
    if sound is not None and corrected.start != scan.start:
        sound = _sound(corrected)
    return collect_frames(corrected, decode, choose, views, factor, measure, decoder, sound)


def _sound(scan: ContainerScan) -> Sound:
    """The sound of a clip; its file is not opened again if it has none."""
    return read_sound(scan.path, scan.start, scan.info.duration) if scan.info.has_audio else NO_SOUND


def _resize_scan(scan: ContainerScan, display: Display) -> ContainerScan:
    """Show all frames of a scan in another size."""
    height, width = display.size
    return replace(scan, display=display, info=replace(scan.info, width=width, height=height))


def _without_doubtful(scan: ContainerScan, shown: Sequence[int | None]) -> ContainerScan | None:
    """Leave the leading pictures that no decoder can show out of a scan; None if others are missing as well.

    Args:
        scan: of the clip.
        shown: presentation time of each frame that the decoder returned.
    """
    missing = Counter(scan.pts)
    missing.subtract(shown)
    if not shown or any(count < 0 or (count and time not in scan.doubtful) for time, count in missing.items()):
        return None
    places = [at for at, time in enumerate(scan.pts) if not missing[time]]
    start = scan.seconds[places[0]]
    seconds = tuple(scan.seconds[at] - start for at in places)
    duration = scan.info.duration - start
    info = replace(scan.info, frames=len(seconds), duration=duration, fps=len(seconds) / duration)
    pts = tuple(scan.pts[at] for at in places)
    return replace(scan, info=info, seconds=seconds, pts=pts, start=scan.start + start)


class _GuardedMeasurement:
    """Calls a `ClipMeasurement` until a call fails; stores that error, so that the clip itself does not fail."""

    def __init__(self, measure: type[ClipMeasurement], orientation: Orientation, sound: Sound | None) -> None:
        self.error: str | None = None
        self._measurement = self._call(lambda: measure(orientation, sound))

    def add_frame(self, luma: npt.NDArray[np.uint8], second: float) -> None:
        if measurement := self._measurement:
            self._call(lambda: measurement.add_frame(luma, second))

    def add_picture(self, index: int, picture: Picture) -> None:
        if measurement := self._measurement:
            self._call(lambda: measurement.add_picture(index, picture))

    def features(self, indices: Sequence[int], dynamics: FrameDynamics) -> dict[str, float] | None:
        measurement = self._measurement
        return self._call(lambda: measurement.features(indices, dynamics)) if measurement else None

    def lip_sync(self) -> LipSync | None:
        measurement = self._measurement
        return self._call(measurement.lip_sync) if measurement else None

    def _call(self, function: Callable[[], Result]) -> Result | None:
        try:
            return function()
        except Exception as error:
            self._measurement, self.error = None, describe_exception(error)
            return None


def stack_frames(
    scan: ContainerScan, screen: Playback, moments: Sequence[int], renderer: ViewRenderer, decoder: str
) -> Frames:
    """The rendered frames of these moments of a clip's playback; nothing is measured."""
    indices = tuple(screen.frames[moment] for moment in moments)
    return Frames(
        views=renderer.stack(indices),
        indices=indices,
        seconds=tuple(screen.seconds[moment] for moment in moments),
        info=scan.info,
        decoder=decoder,
    )


def _correct_scan(scan: ContainerScan, times: Sequence[float | None]) -> ContainerScan:
    """Replace the frame times of a scan by those of the decoder, which returned another number of frames."""
    known = [time for time in times if time is not None]
    regular = len(known) < len(times) or sorted(known) != known
    step = scan.info.duration / len(times)
    seconds = tuple(index * step if regular else known[index] - known[0] for index in range(len(times)))
    info = replace(scan.info, frames=len(seconds), fps=len(seconds) / scan.info.duration)
    return replace(scan, seconds=seconds, info=info, start=scan.start if regular else known[0])


def iterate_frames(scan: ContainerScan, notes: set[Note]) -> Iterator[VideoFrame]:
    """Decode a clip from its first frame to its last; interlaced frames are deinterlaced.

    Args:
        scan: of the clip.
        notes: receives what a user should know about the frames.

    Raises:
        ClipTruncated: the decoder reports an error, or marks a frame as damaged.
    """
    return _deinterlaced(_decoded(scan), notes)


def _decoded(scan: ContainerScan) -> Iterator[VideoFrame]:
    import av

    read = 0
    if scan.info.container == "webp":
        for frame, _ in read_webp_frames(scan.path):
            yield frame
        return
    with open_video(scan.path, scan.strict) as video:
        try:
            for number, packet in enumerate(video.container.demux(video.stream)):
                if number < scan.skipped:
                    continue
                try:
                    frames = video.decode(packet)
                except av.FFmpegError:
                    if packet.pts not in scan.doubtful and (packet.pts is not None or None in scan.pts):
                        raise
                    continue
                for frame in frames:
                    if frame.is_corrupt and frame.pts in scan.doubtful:
                        continue
                    if frame.is_corrupt and frame.pts not in scan.joined:
                        raise truncated_error(scan.path, read, len(scan.seconds))
                    yield frame
                    read += 1
        except MemoryError:  # an FFmpegError too, but not the fault of the file
            raise
        except av.FFmpegError:
            raise truncated_error(scan.path, read, len(scan.seconds)) from None


def _deinterlaced(frames: Iterator[VideoFrame], notes: set[Note]) -> Iterator[VideoFrame]:
    """Replace interlaced frames by progressive ones; one frame per frame, at the same time."""
    import av.filter

    graph: av.filter.Graph | None = None
    shape: tuple[int, int, str] | None = None
    for frame in frames:
        changed = graph is not None and shape != (frame.width, frame.height, frame.format.name)
        if graph is not None and changed:
            yield from _filtered(graph, None)
            graph = None
        if graph is None and frame.interlaced_frame:
            notes.add(Note.INTERLACED)
            graph = av.filter.Graph()
            shape = frame.width, frame.height, frame.format.name
            source = graph.add_buffer(
                width=frame.width,
                height=frame.height,
                format=frame.format,
                time_base=frame.time_base or Fraction(1, 25),
            )
            filters = graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink")
            graph.link_nodes(source, *filters).configure()
        if graph is None:
            yield frame
        else:
            yield from _filtered(graph, frame)
    if graph is not None:
        yield from _filtered(graph, None)


def _filtered(graph: Graph, frame: VideoFrame | None) -> Iterator[VideoFrame]:
    """The frames that a filter graph returns for one more frame; None: the last ones."""
    import av

    graph.vpush(frame)
    with suppress(av.BlockingIOError, av.EOFError):
        while True:
            yield graph.vpull()


def _prefers_decord(scan: ContainerScan) -> bool:
    """Whether a clip is too long for decoding every frame, and of a kind that decord reads correctly."""
    info = scan.info
    return (
        info.frames * info.width * info.height > MAX_FULL_DECODE_PIXELS
        and info.codec in DECORD_CODECS
        and info.pixel_format in ("yuv420p", "yuvj420p")
        and scan.display == Display(info.width, info.height)
        and info.width % 2 == info.height % 2 == 0
        and not info.warnings
    )


def _seek_with_decord(scan: ContainerScan, choose: Choice, views: Sequence[View], factor: int) -> Frames | None:
    """Read frames with decord; None if it is not installed (ARM), fails, or counts another number of frames."""
    renderer = ViewRenderer(views, factor)
    screen = playback(scan.seconds, scan.info.duration)
    moments = choose(screen.seconds)
    try:
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        reader = decord.VideoReader(str(scan.path.absolute()), ctx=decord.cpu(0), num_threads=1)
        if len(reader) != len(scan.seconds):  # decord ignores edit lists
            return None
        for index in sorted({screen.frames[moment] for moment in moments}):
            renderer.add(index, reader[index].asnumpy())
    except Exception:  # decord's own error classes cannot be named where it is not installed
        return None
    return stack_frames(scan, screen, moments, renderer, "decord")
