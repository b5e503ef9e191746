"""Synthetic degradations of known cause, strength, place and time, for training data, tests and demonstrations.

They take decoded frames, a (T, H, W, 3) uint8 RGB array, and return an array of the same shape. Compression is real:
frames are encoded and decoded again.

Strength is between 0 (invisible) and 1 (unusable); the visible effect grows with it. For one seed, direction, place and
time are the same at all strengths. Sizes in pixels are for a picture with a short side of 512 and scale with the
picture; degradations of the face scale with the face.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from lmm_qa.video.face import Box, Face, find_face
from lmm_qa.video.sound import Waveform

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.video.stream import VideoStream

Pixels = NDArray[np.uint8]

Floats = NDArray[np.floating]

MILD, STRONG = 0.3, 0.8
"""Strengths for tests and figures."""

FULL_FRAME: Box = (0.0, 0.0, 1.0, 1.0)

REPRODUCIBLE_X264 = {"preset": "veryfast", "threads": "1", "x264-params": "cpu-independent=1"}
"""Options with which x264 always produces the same bytes; a single thread is not enough for some small pictures."""


class DegradedFrames(NamedTuple):
    """Degraded frames, and where and when they differ from the source."""

    frames: Pixels
    place: Box
    """Nothing changed outside this part of the picture, in any frame."""
    seconds: tuple[float, float]
    """Start and end; nothing changed outside them, except that everything after `buffering` is late."""


@dataclass(frozen=True)
class _Source:
    """The frames to degrade, and what the degradations need to know about them."""

    frames: Pixels
    fps: float
    known_face: Face | None

    @cached_property
    def face(self) -> Face:
        return self.known_face or find_face(self.frames)

    @property
    def pixel(self) -> float:
        """Scale of sizes that are stated for a short side of 512 pixels."""
        return float(min(self.frames.shape[1:3]) / 512)

    def replaced(
        self, frames: Iterable[Pixels], place: Box = FULL_FRAME, span: tuple[int, int] | None = None
    ) -> DegradedFrames:
        """The result of a degradation that changed `place` in the frames from `span[0]` up to `span[1]`."""
        start, stop = span or (0, len(self.frames))
        stacked = frames if isinstance(frames, np.ndarray) else np.stack(list(frames))
        return DegradedFrames(stacked, place, (start / self.fps, stop / self.fps))

    def filtered(self, change: Callable[[Image.Image], Image.Image]) -> DegradedFrames:
        """Apply the same change to every frame."""
        return self.replaced(np.asarray(change(Image.fromarray(frame)), dtype=np.uint8) for frame in self.frames)

    def mapped(self, table: Floats) -> DegradedFrames:
        """Replace each value 0 to 255 by its entry in a table, (256,) or (256, 3)."""
        values = _rounded(table)
        return self.replaced(values[self.frames] if values.ndim == 1 else values[self.frames, np.arange(3)])

    def retimed(self, order: NDArray[np.intp], span: tuple[int, int] | None = None) -> DegradedFrames:
        """Show frame `order[i]` in place of frame i."""
        late = np.flatnonzero(order != np.arange(len(order)))
        return self.replaced(self.frames[order], span=span or ((late[0], late[-1] + 1) if len(late) else (0, 0)))


# --- Defects of generated faces --------------------------------------------------------------------------------------

# Parts of the face, relative to the box of the detector (forehead to chin).
_FACE: Box = (0.02, -0.2, 0.98, 1.12)

_HEAD: Box = (-0.2, -0.5, 1.2, 1.25)

_LOWER_FACE: Box = (0.14, 0.52, 0.86, 1.1)

_MOUTH: Box = (0.22, 0.6, 0.78, 0.98)

_TEETH: Box = (0.3, 0.68, 0.7, 0.9)


def defocus(source: _Source, strength: float, rng: np.random.Generator) -> DegradedFrames:
    """Blur the face only: Gaussian, sigma up to 3.5% of the width of the face."""
    return _on_face(source, _FACE, 0.25, lambda part, _: _blurred(part, 0.035 * strength**1.3 * part.shape[1]))


def mouth_smear(source: _Source, strength: float, rng: np.random.Generator) -> DegradedFrames:
    """Blur the lower face, as if pasted from a smaller picture, and blend it with its recent past."""
    lag = 0.8 * strength
    previous: list[Floats] = []

    def smear(part: Pixels, _: int) -> Floats:
        now = _blurred(part, 0.035 * strength * part.shape[1])
        previous[:] = [lag * previous[0] + (1 - lag) * now if previous else now]
        return previous[0]

    return _on_face(source, _LOWER_FACE, 0.35, smear)


def mouth_freeze(source: _Source, strength: float, rng: np.random.Generator) -> DegradedFrames:
    """Freeze the mouth on a moving head, for a share of the clip that grows to all of it."""
    count = len(source.frames)
    frozen = round(count * strength)
    start = int(rng.random() * (count - frozen + 1))
    held: list[Pixels] = []

    def freeze(part: Pixels, _: int) -> Pixels:
        if not held:
            held.append(part)
        return held[0]

    return _on_face(source, _MOUTH, 0.35, freeze, (start, start + frozen))


def teeth_smear(source: _Source, strength: float, rng: np.random.Generator) -> DegradedFrames:
    """Smear the inside of the mouth sideways, so that single teeth cannot be seen."""

    def smear(part: Pixels, _: int) -> Floats:
        run = Image.fromarray(part).filter(ImageFilter.BoxBlur((0.25 * strength * part.shape[1], 0)))
        return _blurred(np.asarray(run), 0.03 * strength * part.shape[1])

    return _on_face(source, _TEETH, 0.5, smear)


def face_warp(source: _Source, strength: float, rng: np.random.Generator) -> DegradedFrames:
    """Displace eyes, nose and mouth by up to about a tenth of the width of the face, swaying slowly."""
    field = _waves(rng, cycles=(0.7, 1.6), hertz=(0.2, 0.7))

    def warp(part: Pixels, number: int) -> Pixels:
        shift = 0.12 * strength * part.shape[1] * _oval(*_grid(_NODES, _NODES), 0.6)[..., None]
        return _warped(part, shift * field(_NODES, _NODES, number / source.fps))

    return _on_face(source, _HEAD, 0.1, warp)


def background_wobble(source: _Source, strength: float, rng: np.random.Generator) -> DegradedFrames:
    """Make the background swim, by up to about 5% of the short side of the picture, behind a steady person."""
    field = _waves(rng, cycles=(1.0, 2.5), hertz=(0.7, 1.6))
    amount = 0.05 * strength * min(source.frames.shape[1:3])
    steps = (np.arange(2 * _NODES + 1) / (2 * _NODES)).astype(np.float32)
    x, y = steps[None, :], steps[:, None]

    def wobble(number: int) -> Pixels:
        left, top, right, bottom = _part(source.face.boxes[number], _HEAD)
        across = abs(x - (left + right) / 2) / (right - left)
        down = (y - (top + bottom) / 2) / (bottom - top)
        head = np.hypot(across * 2, down * 2)
        body = across * 2 / (1 + np.clip(4 * down - 1.2, 0, 2)) + 9 * (down < 0.2)
        behind = np.clip(2 * (np.minimum(head, body) - 1), 0, 1)[..., None]
        return _warped(source.frames[number], amount * behind * field(2 * _NODES, 2 * _NODES, number / source.fps))

    if strength == 0:
        return source.replaced(source.frames.copy())
    return source.replaced(wobble(number) for number in range(len(source.frames)))


def seam(source: _Source, strength: float, rng: np.random.Generator) -> DegradedFrames:
    """Paste the face, or a box around its lower half, back lighter or darker and a little softer, with an edge."""
    boxed = bool(rng.integers(2))
    tint = rng.choice((-1, 1)) + 0.35 * rng.normal(size=3)
    tint *= 48 * strength / np.linalg.norm(tint)

    def paste(part: Pixels, _: int) -> Floats:
        tinted: Floats = _blurred(part, 0.012 * strength * part.shape[1]) + tint.astype(np.float32)
        return tinted

    feather = 0.03 + 0.25 * (1 - strength)
    return _on_face(source, _LOWER_FACE if boxed else _FACE, feather, paste, boxed=boxed)


def identity_drift(source: _Source, strength: float, rng: np.random.Generator) -> DegradedFrames:
    """Turn the person into another one: until the end, facial features move and skin loses texture and changes tint."""
    spots = np.array([(-0.35, -0.15), (0.35, -0.15), (0.0, 0.12), (0.0, 0.42), (-0.5, 0.45), (0.5, 0.45)])
    moves = rng.normal(size=spots.shape)
    moves[1::4] = moves[0::4] * (-1, 1)  # keeps faces roughly symmetric
    moves[2:4, 0] *= 0.2
    moves *= 0.065 / abs(moves).max()
    x, y = _grid(_NODES, _NODES)
    near = np.exp(-((x[..., None] - spots[:, 0]) ** 2 + (y[..., None] - spots[:, 1]) ** 2) / 0.1)
    field = (near @ moves) * _oval(x, y, 0.4)[..., None]
    tint = rng.normal(size=3)
    tint *= 30 / np.linalg.norm(tint)
    last = max(len(source.frames) - 1, 1)

    def drift(part: Pixels, number: int) -> Floats:
        progress = np.float32(strength * number / last)
        moved = _warped(part, 2 * progress * part.shape[1] * field)
        return _blurred(moved, 0.008 * float(progress) * part.shape[1]) + progress * tint.astype(np.float32)

    return _on_face(source, _HEAD, 0.35, drift)


# --- Picture ---------------------------------------------------------------------------------------------------------


def flicker(source: _Source, strength: float, rng: np.random.Generator) -> DegradedFrames:
    """Change the brightness from frame to frame, by up to 40%."""
    count = len(source.frames)
    swing = np.sin(2 * np.pi * (rng.uniform(4, 10) * np.arange(count) / source.fps + rng.random()))
    gains = 1 + 0.4 * strength * (0.5 * swing + 0.5 * rng.uniform(-1, 1, count))
    values = np.arange(256)
    return source.replaced(_rounded(gain * values)[frame] for gain, frame in zip(gains, source.frames, strict=True))


def overexposure(source: _Source, strength: float, rng: np.random.Generator) -> DegradedFrames:
    """Up to 2.5 stops too bright: highlights clip."""
    return source.mapped(_exposed(2.5 * strength))


def underexposure(source: _Source, strength: float, rng: np.random.Generator) -> DegradedFrames:
    """Up to 4 stops too dark: shadows are crushed."""
    return source.mapped(_exposed(-4 * strength))


def colour_cast(source: _Source, strength: float, rng: np.random.Generator) -> DegradedFrames:
    """A wrong white balance: warm, cold, green or magenta, up to 2 stops between channels."""
    stops = np.array([(0.8, 0.0, -1.2), (-1.2, 0.0, 0.8), (-0.8, 0.7, -0.8), (0.6, -1.2, 0.6)])[rng.integers(4)]
    return source.mapped(np.stack([_exposed(strength * stop) for stop in stops], axis=1))


def banding(source: _Source, strength: float, rng: np.random.Generator) -> DegradedFrames:
    """Reduce the 256 levels of each channel down to 6: smooth shades break into steps."""
    steps = 256 * (6 / 256) ** strength - 1
    return source.mapped(np.rint(np.arange(256) / 255 * steps) / steps * 255)


def blur(source: _Source, strength: float, rng: np.random.Generator) -> DegradedFrames:
    """Gaussian blur, sigma up to 3.6 pixels."""
    sigma = 3.6 * strength**1.25 * source.pixel
    return source.filtered(lambda image: image.filter(ImageFilter.GaussianBlur(sigma)))


def motion_blur(source: _Source, strength: float, rng: np.random.Generator) -> DegradedFrames:
    """Smear everything along one direction, over up to 16 pixels."""
    angle = np.pi * rng.random()
    length = 16 * strength**1.2 * source.pixel
    return source.replaced(_smeared(frame, length * np.sin(angle), length * np.cos(angle)) for frame in source.frames)


def rescale(source: _Source, strength: float, rng: np.random.Generator) -> DegradedFrames:
    """Downscale by a factor of up to 8 and upscale again, both bicubic."""
    factor = 8**strength
    height, width = source.frames.shape[1:3]
    small = (max(2, round(width / factor)), max(2, round(height / factor)))
    return source.replaced(_resized(_resized(source.frames, small), (width, height)))


def noise(source: _Source, strength: float, rng: np.random.Generator) -> DegradedFrames:
    """Add white Gaussian noise, new in every frame, with a standard deviation of up to 42 of 255."""
    sigma = np.float32(noise_sigma(strength))
    return source.replaced(
        _rounded(frame + sigma * rng.standard_normal(frame.shape, dtype=np.float32)) for frame in source.frames
    )


# --- Encoder ---------------------------------------------------------------------------------------------------------


def jpeg(source: _Source, strength: float, rng: np.random.Generator) -> DegradedFrames:
    """Compress every frame as a JPEG of quality 95 down to 4."""
    quality = round(95 * (4 / 95) ** strength)

    def squeeze(image: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer)

    return source.filtered(squeeze)


def h264(source: _Source, strength: float, rng: np.random.Generator) -> DegradedFrames:
    """H.264 at a constant rate factor of 15 to 51."""
    return source.replaced(_h264(source.frames, strength, source.fps))


def h265(source: _Source, strength: float, rng: np.random.Generator) -> DegradedFrames:
    """H.265 at a constant rate factor of 15 to 51."""
    options = {"crf": f"{15 + 36 * strength:.1f}", "preset": "ultrafast", "x265-params": "log-level=none:pools=1"}
    return source.replaced(transcode(source.frames, "libx265", options, source.fps))


def vp9(source: _Source, strength: float, rng: np.random.Generator) -> DegradedFrames:
    """VP9 at a constant quality of 15 to 63, downscaled by up to 3, as is usual at low rates."""
    options = {"b": "0", "deadline": "realtime", "cpu-used": "8", "threads": "1"}
    return _downscale_and_encode(source, strength, "libvpx-vp9", options)


def av1(source: _Source, strength: float, rng: np.random.Generator) -> DegradedFrames:
    """AV1 at a constant rate factor of 15 to 63, downscaled by up to 3, as is usual at low rates."""
    os.environ.setdefault("SVT_LOG", "1")  # errors only; by default it prints a page per clip
    with _unchanged_priority():
        return _downscale_and_encode(source, strength, "libsvtav1", {"preset": "9", "svtav1-params": "lp=1"})


def bitrate_switch(source: _Source, strength: float, rng: np.random.Generator) -> DegradedFrames:
    """Compress 30% to 60% of the clip as `h264` does: its start, or somewhere in it."""
    count = len(source.frames)
    share, start = rng.uniform(0.3, 0.6), max(0.0, rng.uniform(-1, 1))
    length = max(1, round(share * count))
    first = int(start * (count - length))
    frames = source.frames.copy()
    frames[first : first + length] = _h264(source.frames[first : first + length], strength, source.fps)
    return source.replaced(frames, span=(first, first + length))


# --- Network and player: the same frames at other times --------------------------------------------------------------


def buffering(source: _Source, strength: float, rng: np.random.Generator) -> DegradedFrames:
    """Hold the first frame for up to 60% of the clip, then play it; its end is cut off."""
    count = len(source.frames)
    held = round(0.6 * strength * count)
    return source.retimed(np.maximum(np.arange(count) - held, 0), (0, held))


def stall(source: _Source, strength: float, rng: np.random.Generator) -> DegradedFrames:
    """Hold one frame for up to 80% of the clip, somewhere in it; the frames that it covers are lost."""
    count = len(source.frames)
    held = round(0.8 * strength * count)
    start = int(rng.random() * (count - held))
    order = np.arange(count)
    order[start : start + held + 1] = start
    return source.retimed(order)


def drop(source: _Source, strength: float, rng: np.random.Generator) -> DegradedFrames:
    """Divide the frame rate by up to 12: each remaining frame is shown until the next one."""
    hold = frame_rate_divisor(strength)
    count = len(source.frames)
    return source.retimed(np.ceil(np.floor(np.arange(count) / hold + 1e-9) * hold - 1e-9).astype(np.intp))


def jitter(source: _Source, strength: float, rng: np.random.Generator) -> DegradedFrames:
    """Delay each frame by a random time of up to 0.4 s, in order: pictures freeze, then skip."""
    count = len(source.frames)
    late = rng.uniform(0, 0.4 * source.fps, count)
    late[0] = 0
    arrival = np.maximum.accumulate(np.arange(count) + strength * late)
    return source.retimed(np.searchsorted(arrival, np.arange(count), side="right") - 1)


def noise_sigma(strength: float) -> float:
    """Standard deviation of the noise that `noise` adds, of 255."""
    return float(42 * strength**1.5)


def frame_rate_divisor(strength: float) -> float:
    """The factor by which `drop` divides the frame rate."""
    return float(12**strength)


_GROUPS = (
    (defocus, mouth_smear, mouth_freeze, teeth_smear, face_warp, background_wobble, seam, identity_drift),
    (flicker, overexposure, underexposure, colour_cast, banding, blur, motion_blur, rescale, noise),
    (jpeg, h264, h265, vp9, av1, bitrate_switch),
    (buffering, stall, drop, jitter),
)
FACIAL, PICTURE, COMPRESSION, TEMPORAL = (tuple(function.__name__ for function in group) for group in _GROUPS)
DEGRADATIONS: dict[str, Callable[[_Source, float, np.random.Generator], DegradedFrames]] = {
    function.__name__: function for group in _GROUPS for function in group
}
"""All causes, in the order in which they occur: generation, picture, encoder, network."""


def degrade(
    frames: Pixels, cause: str, strength: float, seed: int = 0, *, fps: float = 25.0, face: Face | None = None
) -> DegradedFrames:
    """Apply one degradation.

    Args:
        frames: (T, H, W, 3) uint8 RGB.
        cause: a key of `DEGRADATIONS`.
        strength: 0 (invisible) to 1 (unusable).
        seed: the same seed gives the same pixels.
        fps: frames per second.
        face: of these frames; by default it is detected if the cause needs it.

    Raises:
        ValueError: the cause is unknown, the strength out of range, or the frames have another shape or type.
    """
    if cause not in DEGRADATIONS:
        raise ValueError(f"unknown degradation {cause!r}; known: {', '.join(DEGRADATIONS)}")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be between 0 and 1, received {strength}")
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames must be (T, H, W, 3) uint8, received {frames.shape} {frames.dtype}")
    if face is not None and len(face.boxes) != len(frames):
        raise ValueError(f"the face has boxes for {len(face.boxes)} frames, and there are {len(frames)}")
    return DEGRADATIONS[cause](_Source(frames, fps, face), strength, np.random.default_rng(seed))


def encode(
    frames: Pixels,
    codec: str,
    options: dict[str, str],
    fps: Fraction,
    file: io.BytesIO | str,
    sound: Waveform | None = None,
) -> None:
    """Encode frames as 4:2:0 video, into a Matroska buffer or a file whose suffix determines the container.

    Args:
        frames: (T, H, W, 3) uint8; an odd last row or column is repeated, since 4:2:0 needs even sides.
        sound: starts with the first frame; stored without loss (FLAC, 16 bits).
    """
    import av

    height, width = frames.shape[1:3]
    padded = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with av.open(file, mode="w", format="matroska" if isinstance(file, io.BytesIO) else None) as container:
        stream = cast("VideoStream", container.add_stream(codec, rate=fps, options=options))
        stream.height, stream.width, stream.pix_fmt = padded.shape[1], padded.shape[2], "yuv420p"
        track: AudioStream | None = None
        if sound is not None:
            layout = "mono" if len(sound.values) == 1 else "stereo"
            track = container.add_stream("flac", rate=sound.rate, layout=layout, format="s16")
        for frame in padded:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
        if sound is not None and track is not None:
            values = np.rint(np.clip(sound.values, -1, 1) * 32767).astype(np.int16)
            heard = av.AudioFrame.from_ndarray(values.T.reshape(1, -1), format="s16", layout=layout)
            heard.rate, heard.pts, heard.time_base = sound.rate, 0, Fraction(1, sound.rate)
            container.mux(track.encode(heard))
            container.mux(track.encode())


def _h264(frames: Pixels, strength: float, fps: float) -> Pixels:
    return transcode(frames, "libx264", {"crf": f"{15 + 36 * strength:.1f}", **REPRODUCIBLE_X264}, fps)


def _downscale_and_encode(source: _Source, strength: float, codec: str, options: dict[str, str]) -> DegradedFrames:
    """At full size, the worst setting of these codecs would still look fair."""
    height, width = source.frames.shape[1:3]
    factor = min(3**strength**2, max(1.0, min(height, width) / _MIN_ENCODED_SIDE))
    small = (round(width / factor), round(height / factor))
    frames = _resized(source.frames, small)
    decoded = transcode(frames, codec, {**options, "crf": f"{round(15 + 48 * strength)}"}, source.fps)
    return source.replaced(_resized(decoded, (width, height)))


@contextmanager
def _unchanged_priority() -> Iterator[None]:
    """As root, SVT-AV1 gives the calling thread real-time priority and does not reset it."""
    if not hasattr(os, "sched_getscheduler"):
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


_MIN_ENCODED_SIDE = 64
"""Pixels; SVT-AV1 refuses smaller pictures."""


def _resized(frames: Pixels, size: tuple[int, int]) -> Pixels:
    """Bicubic; `size` is (width, height)."""
    if size == frames.shape[2:0:-1]:
        return frames
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in frames])


def transcode(frames: Pixels, codec: str, options: dict[str, str], fps: float) -> Pixels:
    """Encode (T, H, W, 3) uint8 frames (see `encode`) and decode them again."""
    import av

    buffer = io.BytesIO()
    encode(frames, codec, options, Fraction(fps).limit_denominator(1001), buffer)
    buffer.seek(0)
    height, width = frames.shape[1:3]
    with av.open(buffer, mode="r") as container:
        decoded = [frame.to_ndarray(format="rgb24")[:height, :width] for frame in container.decode(video=0)]
    if len(decoded) != len(frames):
        raise RuntimeError(f"{codec} returned {len(decoded)} frames for {len(frames)}")
    return np.stack(decoded)


def _rounded(values: Floats) -> Pixels:
    return np.asarray(np.clip(np.rint(values), 0, 255), dtype=np.uint8)


def _exposed(stops: float) -> NDArray[np.float64]:
    """(256,): new value of each grey level when the exposure changes by `stops`, at a gamma of 2.2."""
    return np.asarray(np.arange(256) * 2 ** (stops / 2.2), dtype=np.float64)


def _blurred(part: Pixels, sigma: float) -> Floats:
    return np.asarray(Image.fromarray(part).filter(ImageFilter.GaussianBlur(sigma)), dtype=np.float32)


def _smeared(frame: Pixels, down: float, right: float) -> Pixels:
    """Average along a line around each pixel, with the Fourier transform of the line, a sinc."""
    from scipy.fft import fftfreq, irfft2, next_fast_len, rfft2, rfftfreq

    height, width = frame.shape[:2]
    margin = math.ceil(max(abs(down), abs(right)))
    rows, columns = (next_fast_len(side + 2 * margin, real=True) for side in (height, width))
    below, beside = rows - height - margin, columns - width - margin
    picture = np.pad(frame, ((margin, below), (margin, beside), (0, 0)), mode="edge").astype(np.float32)
    line = np.sinc(fftfreq(rows)[:, None] * down + rfftfreq(columns) * right).astype(np.float32)
    smeared = irfft2(rfft2(picture, axes=(0, 1)) * line[..., None], s=(rows, columns), axes=(0, 1))
    return _rounded(smeared[margin : margin + height, margin : margin + width])


# --- Parts of the picture --------------------------------------------------------------------------------------------

_NODES = 14
"""Cells per side of the grid on which warps are defined."""


def _part(box: NDArray[np.float64], part: Box) -> NDArray[np.float64]:
    """A part of a box, both as left, top, right, bottom; the part is relative to the box."""
    return box[[0, 1, 0, 1]] + np.array(part) * (box[2:] - box[:2])[[0, 1, 0, 1]]


def _on_face(
    source: _Source,
    part: Box,
    feather: float,
    edit: Callable[[Pixels, int], Floats | Pixels],
    span: tuple[int, int] | None = None,
    boxed: bool = False,
) -> DegradedFrames:
    """Edit a part of the face.

    Args:
        part: relative to the box of the face.
        feather: share of the radius of the part over which the edit fades out.
        edit: gets the (h, w, 3) pixels of the part, of the same size in all frames, and the number of the frame.
        span: first frame, and the one after the last.
        boxed: edit a rectangle instead of an oval.
    """
    height, width = source.frames.shape[1:3]
    first, stop = span or (0, len(source.frames))
    boxes = np.array([_part(box, part) for box in source.face.boxes]) * (width, height, width, height)
    wide, high = (max(2, round(float(side))) for side in (boxes[0, 2:] - boxes[0, :2]))
    corners = np.rint(boxes[:, :2]).astype(int)
    x, y = _grid(high - 1, wide - 1)
    reach = np.maximum(abs(x), abs(y)) if boxed else np.hypot(x, y)
    mask = np.clip((1 - reach) / np.float32(feather), 0, 1)[..., None]
    frames = source.frames.copy()
    for number in range(first, stop):
        left, top = corners[number]
        rows, columns = np.arange(top, top + high), np.arange(left, left + wide)
        inside = np.ix_((rows >= 0) & (rows < height), (columns >= 0) & (columns < width))
        where = np.ix_(np.clip(rows, 0, height - 1), np.clip(columns, 0, width - 1))
        before = source.frames[number][where]
        after = _rounded(before + mask * (edit(before, number) - before.astype(np.float32)))
        visible = frames[number, max(top, 0) : max(top + high, 0), max(left, 0) : max(left + wide, 0)]
        visible[...] = after[inside]
    used = corners[first:stop] if stop > first else corners
    (left, top), (right, bottom) = used.min(axis=0), used.max(axis=0)
    sides = (width, height) * 2
    edges = np.clip([left, top, right + wide, bottom + high], 0, sides) / sides
    return source.replaced(frames, cast("Box", tuple(edges.tolist())), (first, stop))


def _grid(rows: int, columns: int) -> tuple[Floats, Floats]:
    """x (1, columns + 1) and y (rows + 1, 1), each from -1 to 1."""
    return (
        np.linspace(-1, 1, columns + 1, dtype=np.float32)[None, :],
        np.linspace(-1, 1, rows + 1, dtype=np.float32)[:, None],
    )


def _oval(x: Floats, y: Floats, feather: float) -> Floats:
    """1 in the middle, falling to 0 at the oval that touches the edges; 0 outside."""
    return np.clip((1 - np.hypot(x, y)) / np.float32(feather), 0, 1)


def _waves(
    rng: np.random.Generator, cycles: tuple[float, float], hertz: tuple[float, float]
) -> Callable[[int, int, float], NDArray[np.float64]]:
    """A smooth random field of displacements that sways with time; (rows + 1, columns + 1, 2), about -1 to 1."""
    waves = 4
    angle, turn = rng.uniform(0, 2 * np.pi, waves), rng.uniform(0, 2 * np.pi, waves)
    frequency, pace = np.pi * rng.uniform(*cycles, waves), 2 * np.pi * rng.uniform(*hertz, waves)
    push = rng.normal(size=(waves, 2))
    push /= np.linalg.norm(push, axis=1, keepdims=True)

    def field(rows: int, columns: int, seconds: float) -> NDArray[np.float64]:
        x, y = _grid(rows, columns)
        along = x[..., None] * np.cos(angle) + y[..., None] * np.sin(angle)
        return np.asarray(np.sin(frequency * along + turn + pace * seconds) @ push / 2)

    return field


def _warped(part: Pixels, shift: Floats) -> Pixels:
    """Warp a picture: each node of a grid takes the pixel at a distance of `shift`, (rows + 1, columns + 1, 2) as x, y.

    Nodes on an edge are not moved, and nothing is taken from outside the picture.
    """
    height, width = part.shape[:2]
    rows, columns = shift.shape[0] - 1, shift.shape[1] - 1
    x = np.linspace(0, width, columns + 1).round().astype(int)
    y = np.linspace(0, height, rows + 1).round().astype(int)
    from_x = np.broadcast_to(x.astype(float), shift.shape[:2]).copy()
    from_y = np.broadcast_to(y.astype(float)[:, None], shift.shape[:2]).copy()
    from_x[:, 1:-1] = np.clip(from_x[:, 1:-1] + shift[:, 1:-1, 0], 0, width - 1)
    from_y[1:-1] = np.clip(from_y[1:-1] + shift[1:-1, :, 1], 0, height - 1)

    def corner(row: int, column: int) -> tuple[float, float]:
        return float(from_x[row, column]), float(from_y[row, column])

    mesh = [
        (
            (int(x[c]), int(y[r]), int(x[c + 1]), int(y[r + 1])),
            (*corner(r, c), *corner(r + 1, c), *corner(r + 1, c + 1), *corner(r, c + 1)),
        )
        for r in range(rows)
        for c in range(columns)
        if x[c] < x[c + 1] and y[r] < y[r + 1]
    ]
    image = Image.fromarray(part)
    return np.asarray(image.transform(image.size, Image.Transform.MESH, mesh, Image.Resampling.BICUBIC))
