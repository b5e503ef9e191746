"""Video files for `scripts/robustness.py`: sound, damaged and hostile ones, all generated from a sample clip.

`sound.cases`, `damaged.cases` and `hostile.cases` yield a `Case` per file, reproducibly.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

import lmm_qa

SAMPLES = Path(lmm_qa.__file__).parent / "samples"
FRAMES = 36
"""Frames of most clips."""

RATED, SHORT = "rated", "rated, with fewer frames"
UNREADABLE = frozenset({"ClipUnreadable"})
BROKEN = frozenset({"ClipTruncated", "ClipUnreadable"})
BROKEN_OR_RATED = BROKEN | {RATED}
"""If changed bytes inside a picture can still decode, or a changed field can be irrelevant."""
ANY = BROKEN_OR_RATED | {SHORT}
"""If the changed file can declare that it has, or shows, fewer frames."""


@dataclass(frozen=True)
class Case:
    """One file to rate."""

    name: str
    """Path in the folder of its group; its first part is the kind."""
    make: Callable[[Path], object]
    outcomes: frozenset[str] = BROKEN
    """Allowed results: classes of errors, `RATED`, `SHORT`."""
    frames: int = FRAMES
    """Frames that a player shows; of a damaged file: frames before the damage."""
    group: str = "damaged"
    """"sound", "damaged" or "hostile"."""

    @property
    def kind(self) -> str:
        return self.name.partition("/")[0]

    @property
    def path(self) -> str:
        return f"{self.group}/{self.name}"


def stored(name: str, data: bytes, outcomes: frozenset[str] = BROKEN, group: str = "damaged") -> Case:
    """A file with these bytes."""
    return Case(name, lambda path: path.write_bytes(data), outcomes, group=group)


def ffmpeg_binary() -> str:
    """The ffmpeg program of imageio-ffmpeg; only the corpus and its comparison need it.

    Raises:
        SystemExit: it is not installed.
    """
    try:
        import imageio_ffmpeg
    except ImportError:
        raise SystemExit("the corpus is made with ffmpeg: pip install imageio-ffmpeg") from None
    return str(imageio_ffmpeg.get_ffmpeg_exe())


def ffmpeg(*arguments: str | Path) -> None:
    """Run ffmpeg.

    Raises:
        RuntimeError: it failed; with its messages.
    """
    command = [ffmpeg_binary(), "-v", "error", "-nostdin", "-y", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")


def pictures(count: int, width: int, height: int) -> list[np.ndarray]:
    """The first frames of a sample clip in any size, (height, width, 3)."""
    with av.open(str(SAMPLES / "astronaut_clean.mp4")) as container:
        decoded = container.decode(video=0)
        return [next(decoded).to_ndarray(format="rgb24", width=width, height=height) for _ in range(count)]


def write(path: Path, frames: Sequence[np.ndarray], codec: str, pixel_format: str, **muxer: str) -> None:
    """Encode frames, 25 per second, with a keyframe every 12."""
    with av.open(str(path), "w", options=muxer) as container:
        options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
        stream = container.add_stream(codec, rate=Fraction(25), options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixel_format
        stream.codec_context.gop_size = 12
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_sound(path: Path, codec: str = "aac") -> None:
    """Write a second of silence, without a picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16000)
        kind = "fltp" if codec == "aac" else "s16"
        tone = av.AudioFrame.from_ndarray(
            np.zeros((1, 16000), np.float32 if codec == "aac" else np.int16), kind, "mono"
        )
        tone.sample_rate, tone.pts = 16000, 0
        container.mux(stream.encode(tone))
        container.mux(stream.encode())


def patched(raw: bytes, mark: bytes, offset: int, value: bytes, *, whole: bool = False) -> bytes:
    """Overwrite the bytes at an offset after a mark, or the mark itself if `whole`."""
    at = raw.find(mark)
    if at < 0:
        raise ValueError(f"{mark!r} does not occur")
    at += 0 if whole else len(mark) + offset if offset >= 0 else offset
    return raw[:at] + value + raw[at + len(value) :]


def grown(raw: bytes, boxes: Sequence[bytes], data: bytes) -> bytes:
    """Append data to the innermost of nested MP4 boxes, given from the outermost, and correct their lengths."""
    changed, starts, at = bytearray(raw), list[int](), 0
    for kind in boxes:
        at = raw.index(kind, at)
        starts.append(at - 4)
    end = starts[-1] + int.from_bytes(raw[starts[-1] : starts[-1] + 4], "big")
    for start in starts:
        length = int.from_bytes(raw[start : start + 4], "big") + len(data)
        changed[start : start + 4] = length.to_bytes(4, "big")
    changed[end:end] = data
    return bytes(changed)
