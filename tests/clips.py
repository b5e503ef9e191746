"""Small test clips whose every frame carries its own number, so that a test can prove which frame it was given.

The upper quarter of a frame holds eight columns, white for a set bit and black for a clear one, most significant bit
first; below, a ramp in colour moves with the frame number. PyAV writes the clips; the ffmpeg program that
imageio-ffmpeg carries does what PyAV cannot (rotation metadata, VP8, cutting without decoding).
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import imageio_ffmpeg
import numpy as np

from lmm_qa.config import Sampling, View
from lmm_qa.video.decode import Frames, read_frames
from lmm_qa.video.display import Orientation
from lmm_qa.video.sound import Sound
from lmm_qa.video.temporal import FrameDynamics

BITS = 8


def numbered_picture(number: int, width: int, height: int) -> np.ndarray:
    """Draw one frame, (height, width, 3) uint8 RGB, that carries `number` (0..255)."""
    x = np.linspace(0, 1, width)[None, :]
    y = np.linspace(0, 1, height)[:, None]
    phase = number / 16
    channels = (x * 200 + 20 + 0 * y, y * 200 + 20 + 0 * x, 120 + 90 * np.sin(6 * (x + y) + phase))
    picture = np.stack([np.clip(channel, 0, 255) for channel in channels], axis=-1).astype(np.uint8)
    columns = np.arange(width) * BITS // width
    bits = (number >> (BITS - 1 - columns)) & 1
    picture[: max(1, height // 4)] = (bits * 255).astype(np.uint8)[None, :, None]
    return picture


def read_number(picture: np.ndarray) -> int:
    """Read the number that a frame carries; any size will do, as long as the whole frame is there."""
    height, width = picture.shape[:2]
    row = picture[height // 8].astype(float).mean(axis=-1)
    centers = [int((bit + 0.5) * width / BITS) for bit in range(BITS)]
    return sum(int(row[center] > 127) << (BITS - 1 - bit) for bit, center in enumerate(centers))


def write_clip(
    path: Path,
    *,
    frames: int = 30,
    size: tuple[int, int] = (192, 128),
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    milliseconds: Sequence[int] | None = None,
    keyframes_every: int = 12,
    audio: bool = False,
    muxer: dict[str, str] | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Write a clip of numbered frames, 25 a second, or shown at the given `milliseconds`."""
    width, height = size
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.codec_context.gop_size = keyframes_every
        stream.codec_context.time_base = Fraction(1, 1000) if milliseconds else Fraction(1, 25)
        sound = container.add_stream("aac", rate=16000) if audio else None
        for number in range(frames):
            picture = av.VideoFrame.from_ndarray(numbered_picture(number, width, height), format="rgb24")
            picture.pts = milliseconds[number] if milliseconds else number
            picture.time_base = stream.codec_context.time_base
            container.mux(stream.encode(picture))
            if sound is not None:
                tone = av.AudioFrame.from_ndarray(np.zeros((1, 640), np.float32), format="fltp", layout="mono")
                tone.sample_rate, tone.pts, tone.time_base = 16000, number * 640, Fraction(1, 16000)
                container.mux(sound.encode(tone))
        container.mux(stream.encode(None))
        if sound is not None:
            container.mux(sound.encode(None))
    return path


def write_sound(path: Path) -> Path:
    """Write a file with sound and no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        tone.sample_rate, tone.pts = 16000, 0
        container.mux(stream.encode(tone))
        container.mux(stream.encode(None))
    return path


def ffmpeg(*arguments: str | Path) -> bytes:
    """Run the ffmpeg program on its own; return what it writes to its standard output."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True).stdout


def ffmpeg_frames(path: Path, width: int, height: int) -> np.ndarray:
    """Decode a clip with the ffmpeg program: (frames, height, width, 3) uint8 RGB, upright."""
    raw = ffmpeg("-i", path, "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)


def write_all(folder: Path) -> Path:
    """Write one clip of each kind that the tests need; a few seconds."""
    quiet_hevc = {"x265-params": "log-level=none"}
    steady = write_clip(folder / "h264.mp4", frames=60)
    write_clip(folder / "faststart.mp4", frames=60, audio=True, muxer={"movflags": "faststart"})
    write_clip(folder / "h264.mkv", frames=60, audio=True)
    write_clip(folder / "one.mp4", frames=1)
    write_clip(folder / "odd.mp4", size=(177, 133), pixel_format="yuv444p")
    write_clip(folder / "odd.webm", size=(177, 133), codec="libvpx-vp9")
    write_clip(folder / "tiny.mp4", size=(22, 10))
    write_clip(folder / "h264_10bit.mp4", pixel_format="yuv420p10le")
    write_clip(folder / "hevc_10bit.mp4", codec="libx265", pixel_format="yuv420p10le", options=quiet_hevc)
    write_clip(folder / "hevc.mkv", codec="libx265", options=quiet_hevc)
    write_clip(folder / "prores.mov", codec="prores_ks", pixel_format="yuv422p10le")
    write_clip(folder / "animation.gif", codec="gif", pixel_format="rgb8")
    write_clip(folder / "uneven.mp4", milliseconds=UNEVEN)
    write_clip(folder / "uneven.mkv", milliseconds=UNEVEN)
    for degrees in (90, 180, 270):
        ffmpeg("-display_rotation", str(degrees), "-i", steady, "-c", "copy", folder / f"turned_{degrees}.mp4")
    ffmpeg("-i", steady, "-c:v", "libaom-av1", "-cpu-used", "8", "-frames:v", "8", folder / "av1.mp4")
    ffmpeg("-i", steady, "-c:v", "libvpx", folder / "vp8.webm")
    two_passes = ("-c:v", "libvpx", "-auto-alt-ref", "1", "-lag-in-frames", "16", "-b:v", "200k")
    for number, target in ((1, ("-f", "null", "-")), (2, (folder / "hidden_packets.webm",))):
        ffmpeg("-i", steady, *two_passes, "-pass", str(number), "-passlogfile", folder / "passes", *target)
    ffmpeg("-f", "lavfi", "-i", "color=red:s=64x64:d=1", "-c:v", "libxvid", "-bf", "2", folder / "left_out.avi")
    ffmpeg("-i", steady, "-c:v", "mpeg4", "-q:v", "3", folder / "mpeg4.avi")
    ffmpeg("-i", steady, "-c", "copy", folder / "h264.ts")
    ffmpeg("-i", steady, "-c", "copy", "-movflags", "frag_keyframe+empty_moov", folder / "fragmented.mp4")
    ffmpeg("-ss", "0.3", "-i", steady, "-c", "copy", folder / "edit_list.mp4")
    bt709 = ("-vf", "scale=out_color_matrix=bt709", "-colorspace", "bt709", "-color_primaries", "bt709")
    ffmpeg("-i", steady, *bt709, "-color_trc", "bt709", folder / "bt709.mp4")
    ffmpeg("-i", steady, "-pix_fmt", "yuvj420p", folder / "full_range.mp4")
    write_sound(folder / "sound.m4a")
    return folder


UNEVEN = [0, 20, 220, 260, 280, 480, 500, 540, 740, 760, 800, 1000]
UNEVEN += [1020 + 40 * step for step in range(18)]
"""When the 30 frames of the clips of uneven frame rate appear, in milliseconds."""


FACTOR = 2
"""Patch factor small enough for the clips (192x128) to keep their size."""


def read(path: Path, sampling: Sampling | None = None, *views: View, factor: int = FACTOR) -> Frames:
    """Read a clip in this process, with default arguments."""
    return read_frames(path, sampling or Sampling(), views or (View(),), factor)


def read_numbers(frames: Frames) -> tuple[int, ...]:
    """The numbers that the pictures of the first view carry."""
    return tuple(read_number(picture) for picture in frames.views[0])


def write_damaged(original: Path, folder: Path, data: bytes) -> Path:
    """Write other content under the name of a clip."""
    copy = folder / original.name
    copy.write_bytes(data)
    return copy


# Readers and measurements for a DecoderPool, in a module that its worker processes can import


def read_or_hang(path: Path, *request: Any) -> Frames:
    """Read a clip, but never return from one that is called `hang` or ends in that word."""
    if path.stem == "hang" or path.read_bytes().endswith(b"hang"):
        time.sleep(3600)
    return read_frames(path, *request)


def read_or_die(path: Path, *request: Any) -> Frames:
    """Read a clip, but die or fail on one called after the way to do so."""
    print("decoders print what they like")
    if path.stem == "abort":
        os.abort()
    if path.stem == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if path.stem == "bug":
        raise ZeroDivisionError("division by zero")
    if path.stem == "memory":
        raise MemoryError
    if path.stem == "huge":
        np.zeros(5 << 30, np.uint8)
    return read_frames(path, *request)


class RecordingMeasurement:
    """A `ClipMeasurement` that returns what it received."""

    sampling = Sampling(strategy="pairs", frames=4)

    def __init__(self, orientation: Orientation, sound: Sound | None) -> None:
        self.orientation = orientation
        self.sound = sound
        self.heights: list[int] = []
        self.numbers: dict[int, int] = {}

    def add_frame(self, luma: np.ndarray, second: float) -> None:
        self.heights.append(luma.shape[0])

    def add_picture(self, index: int, picture: np.ndarray) -> None:
        self.numbers[index] = read_number(picture)

    def features(self, indices: Sequence[int], dynamics: FrameDynamics) -> dict[str, float]:
        received: dict[str, float] = {
            "quarter_turns": self.orientation.quarter_turns,
            "luma_height": self.heights[0],
            "frames": len(self.heights),
            "pictures": len(self.numbers),
            "measured_frames": len(dynamics.seconds),
        }
        return received | {f"number_{place}": self.numbers[index] for place, index in enumerate(indices)}

    def lip_sync(self) -> None:
        return None


class BrokenMeasurement(RecordingMeasurement):
    """Fails after the last frame."""

    def features(self, indices: Sequence[int], dynamics: FrameDynamics) -> dict[str, float]:
        raise KeyError("a feature")
