"""Synthetic damage of known cause, strength, place and time, for training data, tests and demonstrations.

Works on decoded frames, (T, H, W, 3) uint8 RGB arrays, and returns an array of the same shape. Codec damage is real:
the frames go through the encoder and back. Knows nothing of files, models or labels.

Strength runs from 0 (nothing to see) to 1 (unusable), and what is seen of the damage grows with it; `MILD` and `STRONG`
are the two used in tests and figures. One seed gives one direction, place or moment for all strengths. Sizes in pixels
are meant for a picture whose short side is 512 and scale with the picture; what sits on the face scales with the face.
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

if TYPE_CHECKING:
    from av.video.stream import VideoStream


Pixels = NDArray[np.uint8]


Floats = NDArray[np.floating]


MILD, STRONG = 0.3, 0.8


WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


REPEATABLE_X264 = {"preset": "veryfast", "threads": "1", "x264-params": "cpu-independent=1"}


"""Options by which x264 makes the same bytes each time. With one thread alone it does not, for some small pictures."""


class Degraded(NamedTuple):
    """Frames, and where and when they differ from what they were."""

    frames: Pixels
    place: Box
    """The part of the picture outside of which nothing has changed, in all frames."""
    seconds: tuple[float, float]
    """From, to. Outside of them nothing has changed; save that after `buffering` everything comes late."""


@dataclass(frozen=True)
class _Clip:
    """What a damage is given."""

    frames: Pixels
    fps: float
    known_face: Face | None

    @cached_property
    def face(self) -> Face:
        return self.known_face or find_face(self.frames)

    @property
    def pixel(self) -> float:
        """Pixels of this picture for one of a picture whose short side is 512."""
        return float(min(self.frames.shape[1:3]) / 512)

    def changed(self, frames: Iterable[Pixels], place: Box = WHOLE, span: tuple[int, int] | None = None) -> Degraded:
        start, stop = span or (0, len(self.frames))
        stacked = frames if isinstance(frames, np.ndarray) else np.stack(list(frames))
        return Degraded(stacked, place, (start / self.fps, stop / self.fps))

    def each(self, change: Callable[[Image.Image], Image.Image]) -> Degraded:
        """The same change to every picture."""
        return self.changed(np.asarray(change(Image.fromarray(frame)), dtype=np.uint8) for frame in self.frames)

    def recoloured(self, table: Floats) -> Degraded:
        """Each value 0 to 255 replaced by what the table, (256,) or (256, 3), says."""
        values = _rounded(table)
        return self.changed(values[self.frames] if values.ndim == 1 else values[self.frames, np.arange(3)])

    def retimed(self, order: NDArray[np.intp], span: tuple[int, int] | None = None) -> Degraded:
        """Frame `order[i]` shown in place of frame i."""
        late = np.flatnonzero(order != np.arange(len(order)))
        return self.changed(self.frames[order], span=span or ((late[0], late[-1] + 1) if len(late) else (0, 0)))


# --- faces as generators make them -----------------------------------------------------------------------------------

# Parts of the face, as fractions of the box that the detector gives (forehead to chin).
_FACE: Box = (0.02, -0.2, 0.98, 1.12)


_HEAD: Box = (-0.2, -0.5, 1.2, 1.25)


_LOWER_FACE: Box = (0.14, 0.52, 0.86, 1.1)


_MOUTH: Box = (0.22, 0.6, 0.78, 0.98)


_TEETH: Box = (0.3, 0.68, 0.7, 0.9)


def defocus(clip: _Clip, strength: float, rng: np.random.Generator) -> Degraded:
    """The face alone out of focus: Gaussian blur, sigma up to 3.5% of the face's width."""
    return _on_face(clip, _FACE, 0.25, lambda part, _: _blurred(part, 0.035 * strength**1.3 * part.shape[1]))


def mouth_smear(clip: _Clip, strength: float, rng: np.random.Generator) -> Degraded:
    """The lower face soft, as if pasted from a smaller picture, and mixed with what it was moments before."""
    lag = 0.8 * strength
    kept: list[Floats] = []

    def smear(part: Pixels, _: int) -> Floats:
        now = _blurred(part, 0.035 * strength * part.shape[1])
        kept[:] = [lag * kept[0] + (1 - lag) * now if kept else now]
        return kept[0]

    return _on_face(clip, _LOWER_FACE, 0.35, smear)


def mouth_freeze(clip: _Clip, strength: float, rng: np.random.Generator) -> Degraded:
    """The mouth stands still on a moving head, for a share of the clip that grows to all of it."""
    count = len(clip.frames)
    frozen = round(count * strength)
    start = int(rng.random() * (count - frozen + 1))
    held: list[Pixels] = []

    def freeze(part: Pixels, _: int) -> Pixels:
        if not held:
            held.append(part)
        return held[0]

    return _on_face(clip, _MOUTH, 0.35, freeze, (start, start + frozen))


def teeth_smear(clip: _Clip, strength: float, rng: np.random.Generator) -> Degraded:
    """What is inside the mouth runs together sideways: no tooth can be told from the next."""

    def smear(part: Pixels, _: int) -> Floats:
        run = Image.fromarray(part).filter(ImageFilter.BoxBlur((0.25 * strength * part.shape[1], 0)))
        return _blurred(np.asarray(run), 0.03 * strength * part.shape[1])

    return _on_face(clip, _TEETH, 0.5, smear)


def face_warp(clip: _Clip, strength: float, rng: np.random.Generator) -> Degraded:
    """Eyes, nose and mouth pushed out of their places, by up to about a tenth of the face's width, swaying slowly."""
    field = _waves(rng, cycles=(0.7, 1.6), hertz=(0.2, 0.7))

    def warp(part: Pixels, number: int) -> Pixels:
        shift = 0.12 * strength * part.shape[1] * _oval(*_grid(_NODES, _NODES), 0.6)[..., None]
        return _warped(part, shift * field(_NODES, _NODES, number / clip.fps))

    return _on_face(clip, _HEAD, 0.1, warp)


def background_wobble(clip: _Clip, strength: float, rng: np.random.Generator) -> Degraded:
    """What is behind the head swims, by up to about 5% of the picture's short side; the person stands still."""
    field = _waves(rng, cycles=(1.0, 2.5), hertz=(0.7, 1.6))
    amount = 0.05 * strength * min(clip.frames.shape[1:3])
    steps = (np.arange(2 * _NODES + 1) / (2 * _NODES)).astype(np.float32)
    x, y = steps[None, :], steps[:, None]

    def wobble(number: int) -> Pixels:
        left, top, right, bottom = _part(clip.face.boxes[number], _HEAD)
        across = abs(x - (left + right) / 2) / (right - left)
        down = (y - (top + bottom) / 2) / (bottom - top)
        head = np.hypot(across * 2, down * 2)
        body = across * 2 / (1 + np.clip(4 * down - 1.2, 0, 2)) + 9 * (down < 0.2)
        behind = np.clip(2 * (np.minimum(head, body) - 1), 0, 1)[..., None]
        return _warped(clip.frames[number], amount * behind * field(2 * _NODES, 2 * _NODES, number / clip.fps))

    if strength == 0:
        return clip.changed(clip.frames.copy())
    return clip.changed(wobble(number) for number in range(len(clip.frames)))


def seam(clip: _Clip, strength: float, rng: np.random.Generator) -> Degraded:
    """The face, or its lower half in a box, pasted back lighter or darker, a little softer, with an edge to be seen."""
    boxed = bool(rng.integers(2))
    tint = rng.choice((-1, 1)) + 0.35 * rng.normal(size=3)
    tint *= 48 * strength / np.linalg.norm(tint)

    def paste(part: Pixels, _: int) -> Floats:
        tinted: Floats = _blurred(part, 0.012 * strength * part.shape[1]) + tint.astype(np.float32)
        return tinted

    feather = 0.03 + 0.25 * (1 - strength)
    return _on_face(clip, _LOWER_FACE if boxed else _FACE, feather, paste, boxed=boxed)


def identity_drift(clip: _Clip, strength: float, rng: np.random.Generator) -> Degraded:
    """The person turns into another one: features move, skin loses its texture and changes its tint until the end."""
    spots = np.array([(-0.35, -0.15), (0.35, -0.15), (0.0, 0.12), (0.0, 0.42), (-0.5, 0.45), (0.5, 0.45)])
    moves = rng.normal(size=spots.shape)
    moves[1::4] = moves[0::4] * (-1, 1)  # faces stay about symmetric
    moves[2:4, 0] *= 0.2
    moves *= 0.065 / abs(moves).max()
    x, y = _grid(_NODES, _NODES)
    near = np.exp(-((x[..., None] - spots[:, 0]) ** 2 + (y[..., None] - spots[:, 1]) ** 2) / 0.1)
    field = (near @ moves) * _oval(x, y, 0.4)[..., None]
    tint = rng.normal(size=3)
    tint *= 30 / np.linalg.norm(tint)
    last = max(len(clip.frames) - 1, 1)

    def drift(part: Pixels, number: int) -> Floats:
        progress = np.float32(strength * number / last)
        moved = _warped(part, 2 * progress * part.shape[1] * field)
        return _blurred(moved, 0.008 * float(progress) * part.shape[1]) + progress * tint.astype(np.float32)

    return _on_face(clip, _HEAD, 0.35, drift)


# --- the picture -----------------------------------------------------------------------------------------------------


def flicker(clip: _Clip, strength: float, rng: np.random.Generator) -> Degraded:
    """Brightness that jumps from frame to frame, by up to 40%."""
    count = len(clip.frames)
    swing = np.sin(2 * np.pi * (rng.uniform(4, 10) * np.arange(count) / clip.fps + rng.random()))
    gains = 1 + 0.4 * strength * (0.5 * swing + 0.5 * rng.uniform(-1, 1, count))
    values = np.arange(256)
    return clip.changed(_rounded(gain * values)[frame] for gain, frame in zip(gains, clip.frames, strict=True))


def overexposure(clip: _Clip, strength: float, rng: np.random.Generator) -> Degraded:
    """Up to 2.5 stops too bright: the lights burn out."""
    return clip.recoloured(_exposed(2.5 * strength))


def underexposure(clip: _Clip, strength: float, rng: np.random.Generator) -> Degraded:
    """Up to 4 stops too dark: the shadows close."""
    return clip.recoloured(_exposed(-4 * strength))


def colour_cast(clip: _Clip, strength: float, rng: np.random.Generator) -> Degraded:
    """A wrong white balance: warm, cold, green or magenta, up to 2 stops between channels."""
    stops = np.array([(0.8, 0.0, -1.2), (-1.2, 0.0, 0.8), (-0.8, 0.7, -0.8), (0.6, -1.2, 0.6)])[rng.integers(4)]
    return clip.recoloured(np.stack([_exposed(strength * stop) for stop in stops], axis=1))


def banding(clip: _Clip, strength: float, rng: np.random.Generator) -> Degraded:
    """256 levels a channel down to 6: smooth shades break into steps."""
    steps = 256 * (6 / 256) ** strength - 1
    return clip.recoloured(np.rint(np.arange(256) / 255 * steps) / steps * 255)


def blur(clip: _Clip, strength: float, rng: np.random.Generator) -> Degraded:
    """Gaussian blur, sigma up to 3.6 pixels."""
    sigma = 3.6 * strength**1.25 * clip.pixel
    return clip.each(lambda image: image.filter(ImageFilter.GaussianBlur(sigma)))


def motion_blur(clip: _Clip, strength: float, rng: np.random.Generator) -> Degraded:
    """Everything smeared along one direction, over up to 16 pixels."""
    angle = np.pi * rng.random()
    length = 16 * strength**1.2 * clip.pixel
    return clip.changed(_smeared(frame, length * np.sin(angle), length * np.cos(angle)) for frame in clip.frames)


def rescale(clip: _Clip, strength: float, rng: np.random.Generator) -> Degraded:
    """Shrunk by a factor of up to 8 and enlarged again, both bicubic."""
    factor = 8**strength
    height, width = clip.frames.shape[1:3]
    small = (max(2, round(width / factor)), max(2, round(height / factor)))
    return clip.changed(_resized(_resized(clip.frames, small), (width, height)))


def noise(clip: _Clip, strength: float, rng: np.random.Generator) -> Degraded:
    """White Gaussian noise, fresh in every frame, standard deviation up to 42 of 255."""
    sigma = np.float32(noise_deviation(strength))
    return clip.changed(
        _rounded(frame + sigma * rng.standard_normal(frame.shape, dtype=np.float32)) for frame in clip.frames
    )


# --- the encoder -----------------------------------------------------------------------------------------------------


def jpeg(clip: _Clip, strength: float, rng: np.random.Generator) -> Degraded:
    """Every frame a JPEG of quality 95 down to 4."""
    quality = round(95 * (4 / 95) ** strength)

    def squeeze(image: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer)

    return clip.each(squeeze)


def h264(clip: _Clip, strength: float, rng: np.random.Generator) -> Degraded:
    """H.264 at constant rate factor 15 to 51."""
    return clip.changed(_h264(clip.frames, strength, clip.fps))


def h265(clip: _Clip, strength: float, rng: np.random.Generator) -> Degraded:
    """H.265 at constant rate factor 15 to 51."""
    options = {"crf": f"{15 + 36 * strength:.1f}", "preset": "ultrafast", "x265-params": "log-level=none:pools=1"}
    return clip.changed(transcode(clip.frames, "libx265", options, clip.fps))


def vp9(clip: _Clip, strength: float, rng: np.random.Generator) -> Degraded:
    """VP9 at constant quality 15 to 63, its picture shrunk by up to 3, as for low rates it is."""
    options = {"b": "0", "deadline": "realtime", "cpu-used": "8", "threads": "1"}
    return _shrunk_and_encoded(clip, strength, "libvpx-vp9", options)


def av1(clip: _Clip, strength: float, rng: np.random.Generator) -> Degraded:
    """AV1 at constant rate factor 15 to 63, its picture shrunk by up to 3, as for low rates it is."""
    os.environ.setdefault("SVT_LOG", "1")  # errors only: it writes a page to stderr for each clip
    with _usual_priority():
        return _shrunk_and_encoded(clip, strength, "libsvtav1", {"preset": "9", "svtav1-params": "lp=1"})


def bitrate_switch(clip: _Clip, strength: float, rng: np.random.Generator) -> Degraded:
    """H.264 as in `h264` for 30% to 60% of the clip: for its opening, or somewhere in it."""
    count = len(clip.frames)
    share, start = rng.uniform(0.3, 0.6), max(0.0, rng.uniform(-1, 1))
    length = max(1, round(share * count))
    first = int(start * (count - length))
    frames = clip.frames.copy()
    frames[first : first + length] = _h264(clip.frames[first : first + length], strength, clip.fps)
    return clip.changed(frames, span=(first, first + length))


# --- the network and the player: the same pictures at other times ----------------------------------------------------


def buffering(clip: _Clip, strength: float, rng: np.random.Generator) -> Degraded:
    """The first picture stands for up to 60% of the clip, then the clip plays; its end is cut off."""
    count = len(clip.frames)
    held = round(0.6 * strength * count)
    return clip.retimed(np.maximum(np.arange(count) - held, 0), (0, held))


def stall(clip: _Clip, strength: float, rng: np.random.Generator) -> Degraded:
    """One picture stands still for up to 80% of the clip, somewhere in it; the frames behind it are lost."""
    count = len(clip.frames)
    held = round(0.8 * strength * count)
    start = int(rng.random() * (count - held))
    order = np.arange(count)
    order[start : start + held + 1] = start
    return clip.retimed(order)


def drop(clip: _Clip, strength: float, rng: np.random.Generator) -> Degraded:
    """Frame rate divided by up to 12, evenly: each kept frame stands in for those behind it."""
    hold = slowed(strength)
    count = len(clip.frames)
    return clip.retimed(np.ceil(np.floor(np.arange(count) / hold + 1e-9) * hold - 1e-9).astype(np.intp))


def jitter(clip: _Clip, strength: float, rng: np.random.Generator) -> Degraded:
    """Frames arrive up to 0.4 s late, each by chance, and in order: pictures stand, then time jumps."""
    count = len(clip.frames)
    late = rng.uniform(0, 0.4 * clip.fps, count)
    late[0] = 0
    arrival = np.maximum.accumulate(np.arange(count) + strength * late)
    return clip.retimed(np.searchsorted(arrival, np.arange(count), side="right") - 1)


def noise_deviation(strength: float) -> float:
    """Standard deviation that `noise` adds, of 255."""
    return float(42 * strength**1.5)


def slowed(strength: float) -> float:
    """What `drop` divides the frame rate by."""
    return float(12**strength)


FACIAL = (
    "defocus", "mouth_smear", "mouth_freeze", "teeth_smear", "face_warp", "background_wobble", "seam", "identity_drift",
)  # fmt: skip


PICTURE = (
    "flicker", "overexposure", "underexposure", "colour_cast", "banding", "blur", "motion_blur", "rescale", "noise",
)  # fmt: skip


COMPRESSION = ("jpeg", "h264", "h265", "vp9", "av1", "bitrate_switch")


TEMPORAL = ("buffering", "stall", "drop", "jitter")


"""The same pictures at other times."""


DEGRADATIONS: dict[str, Callable[[_Clip, float, np.random.Generator], Degraded]] = {
    function.__name__: function
    for function in (
        *(defocus, mouth_smear, mouth_freeze, teeth_smear, face_warp, background_wobble, seam, identity_drift),
        *(flicker, overexposure, underexposure, colour_cast, banding, blur, motion_blur, rescale, noise),
        *(jpeg, h264, h265, vp9, av1, bitrate_switch),
        *(buffering, stall, drop, jitter),
    )
}


"""All causes, in the order in which they befall a clip: its making, the camera, the encoder, the network."""


def damage(
    frames: Pixels, cause: str, strength: float, seed: int = 0, *, fps: float = 25.0, face: Face | None = None
) -> Degraded:
    """Apply one named damage.

    Args:
        frames: (T, H, W, 3) uint8 RGB.
        cause: a key of `DEGRADATIONS`.
        strength: 0 (nothing to see) to 1 (unusable).
        seed: the same seed gives the same pixels.
        fps: frames a second.
        face: where the face is in these frames; by default it is looked for when a cause needs it.

    Raises:
        ValueError: unknown cause, strength out of range, or frames of another shape or type.
    """
    if cause not in DEGRADATIONS:
        raise ValueError(f"unknown damage {cause!r}; known: {', '.join(DEGRADATIONS)}")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is between 0 and 1, received {strength}")
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames are (T, H, W, 3) uint8, received {frames.shape} {frames.dtype}")
    if face is not None and len(face.boxes) != len(frames):
        raise ValueError(f"the face is known in {len(face.boxes)} frames, and there are {len(frames)}")
    return DEGRADATIONS[cause](_Clip(frames, fps, face), strength, np.random.default_rng(seed))


def encode(frames: Pixels, codec: str, options: dict[str, str], fps: Fraction, file: io.BytesIO | str) -> None:
    """Encode frames as 4:2:0 video into a Matroska buffer or a file whose container its suffix names.

    Args:
        frames: (T, H, W, 3) uint8; an odd last row or column is repeated, since 4:2:0 stores pairs.
    """
    import av

    height, width = frames.shape[1:3]
    padded = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with av.open(file, mode="w", format="matroska" if isinstance(file, io.BytesIO) else None) as container:
        stream = cast("VideoStream", container.add_stream(codec, rate=fps, options=options))
        stream.height, stream.width, stream.pix_fmt = padded.shape[1], padded.shape[2], "yuv420p"
        for frame in padded:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _h264(frames: Pixels, strength: float, fps: float) -> Pixels:
    return transcode(frames, "libx264", {"crf": f"{15 + 36 * strength:.1f}", **REPEATABLE_X264}, fps)


def _shrunk_and_encoded(clip: _Clip, strength: float, codec: str, options: dict[str, str]) -> Degraded:
    """These codecs at their worst still look fair at full size."""
    height, width = clip.frames.shape[1:3]
    factor = min(3**strength**2, max(1.0, min(height, width) / _SMALLEST_ENCODED))
    small = (round(width / factor), round(height / factor))
    frames = _resized(clip.frames, small)
    decoded = transcode(frames, codec, {**options, "crf": f"{round(15 + 48 * strength)}"}, clip.fps)
    return clip.changed(_resized(decoded, (width, height)))


@contextmanager
def _usual_priority() -> Iterator[None]:
    """Where it may (as root), SVT-AV1 makes the thread that calls it a real-time one, and leaves it so."""
    if not hasattr(os, "sched_getscheduler"):
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


_SMALLEST_ENCODED = 64


"""Pixels; less than that SVT-AV1 refuses."""


def _resized(frames: Pixels, size: tuple[int, int]) -> Pixels:
    """Bicubic; `size` is (width, height)."""
    if size == frames.shape[2:0:-1]:
        return frames
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in frames])


def transcode(frames: Pixels, codec: str, options: dict[str, str], fps: float) -> Pixels:
    """What an encoder hands on of (T, H, W, 3) uint8 frames: encoded (see `encode`) and decoded again."""
    import av

    buffer = io.BytesIO()
    encode(frames, codec, options, Fraction(fps).limit_denominator(1001), buffer)
    buffer.seek(0)
    height, width = frames.shape[1:3]
    with av.open(buffer, mode="r") as container:
        decoded = [frame.to_ndarray(format="rgb24")[:height, :width] for frame in container.decode(video=0)]
    if len(decoded) != len(frames):
        raise RuntimeError(f"{codec} gave {len(decoded)} frames back for {len(frames)}")
    return np.stack(decoded)


def _rounded(values: Floats) -> Pixels:
    return np.asarray(np.clip(np.rint(values), 0, 255), dtype=np.uint8)


def _exposed(stops: float) -> NDArray[np.float64]:
    """(256,): what each value becomes when `stops` more light falls in, at a gamma of 2.2."""
    return np.asarray(np.arange(256) * 2 ** (stops / 2.2), dtype=np.float64)


def _blurred(part: Pixels, sigma: float) -> Floats:
    return np.asarray(Image.fromarray(part).filter(ImageFilter.GaussianBlur(sigma)), dtype=np.float32)


def _smeared(frame: Pixels, down: float, right: float) -> Pixels:
    """Averaged along a line about each point, by its Fourier transform, a sinc."""
    from scipy.fft import fftfreq, irfft2, next_fast_len, rfft2, rfftfreq

    height, width = frame.shape[:2]
    margin = math.ceil(max(abs(down), abs(right)))
    rows, columns = (next_fast_len(side + 2 * margin, real=True) for side in (height, width))
    below, beside = rows - height - margin, columns - width - margin
    picture = np.pad(frame, ((margin, below), (margin, beside), (0, 0)), mode="edge").astype(np.float32)
    line = np.sinc(fftfreq(rows)[:, None] * down + rfftfreq(columns) * right).astype(np.float32)
    smeared = irfft2(rfft2(picture, axes=(0, 1)) * line[..., None], s=(rows, columns), axes=(0, 1))
    return _rounded(smeared[margin : margin + height, margin : margin + width])


# --- parts of the picture --------------------------------------------------------------------------------------------

_NODES = 14


"""Cells a side of the grid on which warps are given."""


def _part(box: NDArray[np.float64], part: Box) -> NDArray[np.float64]:
    """A part of a box, both as left, top, right, bottom; the part in fractions of the box."""
    return box[[0, 1, 0, 1]] + np.array(part) * (box[2:] - box[:2])[[0, 1, 0, 1]]


def _on_face(
    clip: _Clip,
    part: Box,
    feather: float,
    edit: Callable[[Pixels, int], Floats | Pixels],
    span: tuple[int, int] | None = None,
    boxed: bool = False,
) -> Degraded:
    """Replace a part of the face by what `edit` makes of it.

    Args:
        part: which part, in fractions of the face's box.
        feather: the share of the part's radius over which the edit fades out.
        edit: from the (h, w, 3) pixels of the part, which is of the same size in all frames, and the frame's number.
        span: frames from, to.
        boxed: the part is a rectangle, not an oval.
    """
    height, width = clip.frames.shape[1:3]
    first, stop = span or (0, len(clip.frames))
    boxes = np.array([_part(box, part) for box in clip.face.boxes]) * (width, height, width, height)
    wide, high = (max(2, round(float(side))) for side in (boxes[0, 2:] - boxes[0, :2]))
    corners = np.rint(boxes[:, :2]).astype(int)
    x, y = _grid(high - 1, wide - 1)
    reach = np.maximum(abs(x), abs(y)) if boxed else np.hypot(x, y)
    mask = np.clip((1 - reach) / np.float32(feather), 0, 1)[..., None]
    frames = clip.frames.copy()
    for number in range(first, stop):
        left, top = corners[number]
        rows, columns = np.arange(top, top + high), np.arange(left, left + wide)
        inside = np.ix_((rows >= 0) & (rows < height), (columns >= 0) & (columns < width))
        where = np.ix_(np.clip(rows, 0, height - 1), np.clip(columns, 0, width - 1))
        before = clip.frames[number][where]
        after = _rounded(before + mask * (edit(before, number) - before.astype(np.float32)))
        seen = frames[number, max(top, 0) : max(top + high, 0), max(left, 0) : max(left + wide, 0)]
        seen[...] = after[inside]
    used = corners[first:stop] if stop > first else corners
    (left, top), (right, bottom) = used.min(axis=0), used.max(axis=0)
    sides = (width, height) * 2
    edges = np.clip([left, top, right + wide, bottom + high], 0, sides) / sides
    return clip.changed(frames, cast("Box", tuple(edges.tolist())), (first, stop))


def _grid(rows: int, columns: int) -> tuple[Floats, Floats]:
    """x (1, columns + 1) and y (rows + 1, 1), each from -1 to 1."""
    return (
        np.linspace(-1, 1, columns + 1, dtype=np.float32)[None, :],
        np.linspace(-1, 1, rows + 1, dtype=np.float32)[:, None],
    )


def _oval(x: Floats, y: Floats, feather: float) -> Floats:
    """1 in the middle, falling to 0 at the oval that touches the edges."""
    return np.clip((1 - np.hypot(x, y)) / np.float32(feather), 0, 1)


def _waves(
    rng: np.random.Generator, cycles: tuple[float, float], hertz: tuple[float, float]
) -> Callable[[int, int, float], NDArray[np.float64]]:
    """A smooth random field of displacements, (rows + 1, columns + 1, 2) within about -1 to 1, that sways with time."""
    waves = 4
    angle, turn = rng.uniform(0, 2 * np.pi, waves), rng.uniform(0, 2 * np.pi, waves)
    many, pace = np.pi * rng.uniform(*cycles, waves), 2 * np.pi * rng.uniform(*hertz, waves)
    push = rng.normal(size=(waves, 2))
    push /= np.linalg.norm(push, axis=1, keepdims=True)

    def field(rows: int, columns: int, seconds: float) -> NDArray[np.float64]:
        x, y = _grid(rows, columns)
        along = x[..., None] * np.cos(angle) + y[..., None] * np.sin(angle)
        return np.asarray(np.sin(many * along + turn + pace * seconds) @ push / 2)

    return field


def _warped(part: Pixels, shift: Floats) -> Pixels:
    """Each point of a grid, (rows + 1, columns + 1, 2), takes what lies `shift` (x, y) pixels from it.

    Points on an edge stay on it, and the others within, so that nothing is taken from outside of the picture.
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
