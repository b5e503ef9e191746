"""The sound of a clip: mono samples on the clock of its pictures, and its loudness.

Sound that is missing, silent or damaged never makes a clip fail: `Sound.state` says what is there.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from lmm_qa.errors import ClipUnreadable, describe_exception, plural
from lmm_qa.video.container import open_container

if TYPE_CHECKING:
    from collections.abc import Iterator

    from av.audio.frame import AudioFrame
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.filter import Graph

Samples = NDArray[np.float32]

SAMPLE_RATE = 16_000
"""Samples per second of `Sound.samples`."""

MAX_SECONDS = 600.0
"""Sound after this time is not read: 38 MB of samples."""

SILENT_LUFS = -55.0
"""Sound below this loudness is silent. Speech in clips is between -10 and -45 LUFS."""

FULL_SCALE = 0.999
"""Samples of at least this magnitude count as clipped; 1 is the largest that integers can hold."""

_MIN_LOUDNESS_SECONDS = 0.4
"""Length of a block in ITU-R BS.1770-4: shorter sound has no loudness."""

_FLOATING_POINT = frozenset({"flt", "fltp", "dbl", "dblp"})
"""Formats of samples that can be NaN or infinite."""

_MAX_GAP = 10.0
"""Seconds. If the next sound is later than this, or earlier than what was read, the clock has jumped."""


@dataclass(frozen=True)
class Waveform:
    """Sound at the rate of its file."""

    values: Samples
    """(channels, n), -1 to 1; value 0 is heard when the first frame appears."""
    rate: int
    """Samples per second."""


class SoundState(StrEnum):
    """What a clip's sound is."""

    NONE = "none"
    SILENT = "silent"
    BROKEN = "broken"
    PRESENT = "present"


@dataclass(frozen=True)
class Sound:
    """The sound of a clip."""

    state: SoundState
    samples: Samples = field(default_factory=lambda: np.zeros(0, np.float32))
    """(n,) mono at `SAMPLE_RATE`, -1 to 1. Sample 0 is heard when the first frame appears, the last one before the clip
    ends. Empty unless the state is `PRESENT`."""
    seconds: float = 0.0
    """Length of the sound that was read."""
    offset: float = 0.0
    """When the sound starts, in seconds after the first frame; negative if before."""
    loudness: float | None = None
    """Integrated loudness in LUFS (ITU-R BS.1770-4, EBU R 128); None for less than 0.4 s."""
    clipped: float = 0.0
    """Share of samples at full scale, 0 to 1; of all channels, at the rate of the file."""
    not_finite: int = 0
    """Number of samples that are NaN or infinite, and count as 0; of all channels, at the rate of the file."""
    error: str | None = None
    """Why it could not be decoded."""

    @property
    def warning(self) -> str | None:
        """What a user should know about the samples; None if there is nothing."""
        if not self.not_finite:
            return None
        return f"NaN or infinite values in the sound, counted as 0: {plural(self.not_finite, 'sample')}."


NO_SOUND = Sound(SoundState.NONE)


def read_sound(path: Path, start: float, duration: float) -> Sound:
    """Read the sound of a clip that has pictures.

    Args:
        path: the clip.
        start: presentation time of the first frame that is shown, in seconds on the clock of the file.
        duration: of the clip, in seconds.
    """
    return _read(path, start, duration, SAMPLE_RATE, "mono")[0]


def read_waveform(path: Path, start: float, duration: float, rate: int | None = None) -> tuple[Sound, Waveform | None]:
    """Read the sound of a clip in one or two channels; arguments as for `read_sound`.

    Args:
        rate: samples per second; by default those of the file.

    Returns:
        The sound, with `samples` at that rate and mixed; and the waveform, None unless the sound is `PRESENT`.
    """
    import av

    try:
        with open_container(path) as container:
            stream = _best_stream(container)
            if stream is None or stream.codec_context is None:
                return read_sound(path, start, duration), None
            rate, channels = rate or stream.rate or SAMPLE_RATE, stream.channels
    except (av.FFmpegError, ValueError):
        return read_sound(path, start, duration), None
    sound, values = _read(path, start, duration, rate, "mono" if channels == 1 else "stereo")
    return sound, Waveform(values, rate) if sound.state is SoundState.PRESENT else None


def _read(path: Path, start: float, duration: float, rate: int, layout: str) -> tuple[Sound, Samples]:
    """The sound, and its channels, (channels, n)."""
    nothing = np.zeros((1, 0), np.float32)
    try:
        with open_container(path) as container:
            stream = _best_stream(container)
            if stream is None:
                return NO_SOUND, nothing
            reader = _Reader(start, duration, rate, layout)
            return reader.read(container, stream), reader.values
    except MemoryError:
        raise
    except Exception as error:  # the pictures can be rated, whatever is wrong with the sound
        return Sound(SoundState.BROKEN, error=getattr(error, "strerror", None) or describe_exception(error)), nothing


class _Reader:
    """Puts the frames of an audio stream in their place on the clock of the pictures."""

    def __init__(self, start: float, duration: float, rate: int, layout: str) -> None:
        self._start, self._rate, self._layout = start, rate, layout
        self._limit = min(duration, MAX_SECONDS)
        self.values: Samples = np.zeros((1 if layout == "mono" else 2, round(self._limit * rate)), np.float32)
        self._first: float | None = None
        self._end = 0.0
        self._shift = 0.0
        self._loudness: float | None = None
        self._clipped = self._counted = self._not_finite = 0

    def read(self, container: InputContainer, stream: AudioStream) -> Sound:
        import av

        error: str | None = None
        try:
            if stream.codec_context is None:
                raise ClipUnreadable("no decoder is available for the codec of the sound")
            for frame in self._resampled(self._measured(self._finite(container.decode(stream)))):
                self._add(frame)
                if self._end > self._limit:
                    break
        except MemoryError:  # an FFmpegError too, but not the fault of the file
            raise
        except (av.FFmpegError, ClipUnreadable, ValueError) as caught:
            error = getattr(caught, "strerror", None) or str(caught)
        if error is None and self._first is None:
            error = "the stream contains no sound"
        seconds = max(0.0, self._end - (self._first or 0.0))
        loudness = self._loudness if seconds >= _MIN_LOUDNESS_SECONDS else None
        level = loudness if loudness is not None else _decibels(self.values)
        state = SoundState.BROKEN if error else SoundState.SILENT if level < SILENT_LUFS else SoundState.PRESENT
        return Sound(
            state,
            self.values.mean(0) if state is SoundState.PRESENT else np.zeros(0, np.float32),
            seconds,
            self._first or 0.0,
            loudness,
            self._clipped / max(1, self._counted),
            self._not_finite,
            error,
        )

    def _finite(self, frames: Iterator[AudioFrame]) -> Iterator[AudioFrame]:
        """The frames with 0 in the place of NaN and infinities, of which a single one would spoil the loudness."""
        for frame in frames:
            if frame.format.name in _FLOATING_POINT:
                values = frame.to_ndarray()
                finite = np.isfinite(values)
                if not finite.all():
                    self._not_finite += values.size - int(np.count_nonzero(finite))
                    frame = _with_values(frame, np.where(finite, values, values.dtype.type(0)))
            yield frame

    def _measured(self, frames: Iterator[AudioFrame]) -> Iterator[AudioFrame]:
        """The frames as they are; their loudness and clipping are measured in passing."""
        meter: Graph | None = None
        shape: tuple[str, str, int] | None = None
        for frame in frames:
            now = frame.format.name, frame.layout.name, frame.sample_rate
            if meter is None or shape != now:
                meter, shape = _loudness_meter(frame), now
            meter.push(frame)
            for measured in _pull_all(meter):
                if text := measured.metadata.get("lavfi.r128.I"):
                    loudness = float(text)
                    self._loudness = loudness if math.isfinite(loudness) else None  # of samples above 1e150
                values = measured.to_ndarray()
                self._clipped += int(np.count_nonzero(np.abs(values) >= FULL_SCALE))
                self._counted += values.size
            yield frame

    def _resampled(self, frames: Iterator[AudioFrame]) -> Iterator[AudioFrame]:
        from av.audio.resampler import AudioResampler

        resampler: AudioResampler | None = None
        shape: tuple[str, str, int] | None = None
        for frame in frames:
            now = frame.format.name, frame.layout.name, frame.sample_rate
            if resampler is None or shape != now:
                if resampler is not None:
                    yield from resampler.resample(None)
                # To integers: channels are then mixed without exceeding full scale.
                resampler, shape = AudioResampler("s16p", self._layout, self._rate), now
            yield from resampler.resample(frame)
        if resampler is not None:
            yield from resampler.resample(None)

    def _add(self, frame: AudioFrame) -> None:
        """Add resampled values; without a time, they follow the last ones."""
        time = self._end if frame.time is None else frame.time - self._start + self._shift
        if self._first is None:
            self._first = self._end = time
        elif not self._end - 0.1 <= time <= self._end + _MAX_GAP:
            self._shift += self._end - time
            time = self._end
        values = frame.to_ndarray().astype(np.float32) / 32768
        at, count = round(time * self._rate), values.shape[1]
        begin, stop = max(0, -at), min(count, self.values.shape[1] - at)
        if begin < stop:
            self.values[:, at + begin : at + stop] = values[:, begin:stop]
        self._end = time + count / self._rate


def _best_stream(container: InputContainer) -> AudioStream | None:
    """The audio stream that a player chooses."""
    return cast("AudioStream | None", container.streams.best("audio"))


def _with_values(frame: AudioFrame, values: NDArray[np.floating[Any]]) -> AudioFrame:
    """A frame at the same time, with other values."""
    from av.audio.frame import AudioFrame

    other = AudioFrame.from_ndarray(values, format=frame.format.name, layout=frame.layout)
    other.sample_rate, other.pts, other.time_base = frame.sample_rate, frame.pts, frame.time_base
    return other


def _loudness_meter(frame: AudioFrame) -> Graph:
    """ffmpeg's meter of EBU R 128, for frames like this one. What comes out has other times, and ends earlier."""
    from av.filter import Graph

    graph = Graph()
    source = graph.add_abuffer(
        sample_rate=frame.sample_rate, format=frame.format, layout=frame.layout, time_base=frame.time_base
    )
    graph.link_nodes(source, graph.add("ebur128", "metadata=1"), graph.add("abuffersink")).configure()
    return graph


def _pull_all(graph: Graph) -> Iterator[AudioFrame]:
    import av

    with suppress(av.BlockingIOError, av.EOFError):
        while True:
            yield graph.pull()  # type: ignore[misc]


def _decibels(samples: Samples) -> float:
    """Mean power relative to full scale, dB."""
    power = float((samples.astype(np.float64) ** 2).mean()) if samples.size else 0.0
    return 10 * float(np.log10(power + 1e-12))
