"""Synthetic damage of known cause and strength, for training data, tests and demonstrations.

Works on decoded frames, (T, H, W, 3) uint8 RGB arrays, and returns an array of the same shape. Codec damage is real:
the frames go through the encoder and back. Knows nothing of files, models or labels.

Strength runs from 0 (just visible) to 1 (unusable); `MILD` and `STRONG` are the two used in tests and figures.
Sizes in pixels are meant for a picture whose short side is 512 and scale with the picture.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

if TYPE_CHECKING:
    from av.video.stream import VideoStream

Pixels = NDArray[np.uint8]

MILD, STRONG = 0.3, 0.8


def blur(frames: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Gaussian blur, sigma 0.6 to 6 pixels."""
    sigma = 0.6 * 10**strength * _relative_size(frames)
    return _each(frames, lambda image: image.filter(ImageFilter.GaussianBlur(sigma)))


def rescale(frames: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Shrunk by a factor of 1.3 to 8 and enlarged again, both bicubic."""
    factor = 1.3 * (8 / 1.3) ** strength
    height, width = frames.shape[1:3]
    small = (max(2, round(width / factor)), max(2, round(height / factor)))
    bicubic = Image.Resampling.BICUBIC
    return _each(frames, lambda image: image.resize(small, bicubic).resize((width, height), bicubic))


def noise(frames: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """White Gaussian noise, fresh in every frame, standard deviation 3 to 48 of 255."""
    sigma = np.float32(3 * 16**strength)
    noisy = [frame + sigma * rng.standard_normal(frame.shape, dtype=np.float32) for frame in frames]
    return np.stack([np.clip(np.rint(frame), 0, 255).astype(np.uint8) for frame in noisy])


def jpeg(frames: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Every frame a JPEG of quality 50 down to 4."""
    quality = round(50 * (4 / 50) ** strength)

    def squeeze(image: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer)

    return _each(frames, squeeze)


def h264(frames: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """H.264 at constant rate factor 28 to 50."""
    return _transcode(frames, "libx264", {"crf": f"{28 + 22 * strength:.1f}", "preset": "veryfast", "threads": "1"})


def h265(frames: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """H.265 at constant rate factor 29 to 50."""
    options = {"crf": f"{29 + 21 * strength:.1f}", "preset": "ultrafast", "x265-params": "log-level=none:pools=1"}
    return _transcode(frames, "libx265", options)


def vp9(frames: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """VP9 at constant quality 42 to 63."""
    options = {"crf": f"{round(42 + 21 * strength)}", "b": "0", "deadline": "realtime", "cpu-used": "8", "threads": "1"}
    return _transcode(frames, "libvpx-vp9", options)


def stall(frames: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """One frame stands still for 15% to 80% of the clip, somewhere in it; the frames behind it are lost."""
    held = stalled_frames(len(frames), strength)
    start = int(rng.integers(0, len(frames) - held + 1))
    order = np.arange(len(frames))
    order[start : start + held] = start
    return frames[order]


def drop(frames: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Frame rate divided by 2 to 12: each kept frame stands in for those behind it."""
    hold = round(2 * 6**strength)
    return frames[np.arange(len(frames)) // hold * hold]


def stalled_frames(count: int, strength: float) -> int:
    """How many of `count` frames `stall` replaces by a still picture."""
    return max(2, round(count * (0.15 + 0.65 * strength)))


DAMAGES: dict[str, Callable[[Pixels, float, np.random.Generator], Pixels]] = {
    function.__name__: function for function in (blur, rescale, noise, jpeg, h264, h265, vp9, stall, drop)
}
COMPRESSION = ("jpeg", "h264", "h265", "vp9")
TEMPORAL = ("stall", "drop")


def damage(frames: Pixels, cause: str, strength: float, seed: int = 0) -> Pixels:
    """Apply one named damage.

    Args:
        frames: (T, H, W, 3) uint8 RGB.
        cause: a key of `DAMAGES`.
        strength: 0 (just visible) to 1 (unusable).
        seed: the same seed gives the same pixels.

    Raises:
        ValueError: unknown cause, strength out of range, or frames of another shape or type.
    """
    if cause not in DAMAGES:
        raise ValueError(f"unknown damage {cause!r}; known: {', '.join(DAMAGES)}")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is between 0 and 1, received {strength}")
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames are (T, H, W, 3) uint8, received {frames.shape} {frames.dtype}")
    return DAMAGES[cause](frames, strength, np.random.default_rng(seed))


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


def _transcode(frames: Pixels, codec: str, options: dict[str, str]) -> Pixels:
    import av

    buffer = io.BytesIO()
    encode(frames, codec, options, Fraction(25), buffer)
    buffer.seek(0)
    height, width = frames.shape[1:3]
    with av.open(buffer, mode="r") as container:
        decoded = [frame.to_ndarray(format="rgb24")[:height, :width] for frame in container.decode(video=0)]
    if len(decoded) != len(frames):
        raise RuntimeError(f"{codec} gave {len(decoded)} frames back for {len(frames)}")
    return np.stack(decoded)


def _each(frames: Pixels, change: Callable[[Image.Image], Image.Image]) -> Pixels:
    return np.stack([np.asarray(change(Image.fromarray(frame)), dtype=np.uint8) for frame in frames])


def _relative_size(frames: Pixels) -> float:
    return float(min(frames.shape[1:3]) / 512)
