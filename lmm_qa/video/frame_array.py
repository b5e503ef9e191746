"""Clips that never were a file: frames in memory, as NumPy arrays, torch tensors or PIL images.

They are checked, sampled, rendered and measured like the decoded frames of a file (`lmm_qa.video.decode`). Of a tensor
on a GPU, only the sampled frames are copied to the CPU, unless every frame is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, cast

import numpy as np
import numpy.typing as npt

from lmm_qa.config import Sampling, View
from lmm_qa.errors import UsageError
from lmm_qa.video.decode import (
    Choice,
    ClipMeasurement,
    Frames,
    Note,
    Windows,
    collect_frames,
    select_windows,
    stack_frames,
)
from lmm_qa.video.display import Display
from lmm_qa.video.playback import Playback
from lmm_qa.video.probe import ClipInfo, ContainerScan
from lmm_qa.video.sampling import sample_indices
from lmm_qa.video.views import ViewRenderer

if TYPE_CHECKING:
    import torch
    from av.video.frame import VideoFrame
    from PIL.Image import Image

    Array: TypeAlias = npt.NDArray[Any] | torch.Tensor
    FramesInMemory: TypeAlias = Array | Sequence[Array] | Sequence[Image] | Sequence[Sequence[Image]]

EXPECTED = "expected a clip, (T, H, W, 3) or (T, 3, H, W), or a batch of clips, (B, T, H, W, 3) or (B, T, 3, H, W)"

MIN_FRAMES = 2

OVERSHOOT = 1e-3
"""How far values may lie outside [0, 1]; they are clipped. Resizing and half precision overshoot a little."""

CHUNK = 32
"""Frames that are converted at once if every frame is needed."""


class FrameArray:
    """The frames of one clip in memory, RGB."""

    def __init__(self, frames: Array, fps: float) -> None:
        """
        Args:
            frames: (T, H, W, 3) or (T, 3, H, W), T at least 2; uint8, or floating point in [0, 1].
            fps: frames per second.

        Raises:
            UsageError: shape, dtype, range of values or fps differ from that.
        """
        if not (fps > 0 and math.isfinite(fps)):
            raise UsageError(f"fps must be a number above 0, received {fps!r}")
        frames = frames.detach() if _is_tensor(frames) else frames
        last, first = (frames.ndim == 4 and frames.shape[axis] == 3 for axis in (3, 1))
        if not (last or first):
            raise UsageError(f"{EXPECTED}; received {describe(frames)}")
        if last and first:
            raise UsageError(
                f"the channels can be the second or the last dimension of {describe(frames)}: use frames whose height "
                "and width are not 3 pixels"
            )
        if len(frames) < MIN_FRAMES or 0 in frames.shape:
            raise UsageError(f"a clip has at least {MIN_FRAMES} frames, with pixels; received {describe(frames)}")
        self._frames = frames
        self._channels_first = not last
        self._is_float = _check_values(frames)
        height, width = frames.shape[2:] if self._channels_first else frames.shape[1:3]
        count = len(frames)
        info = ClipInfo(
            frames=count,
            declared_frames=count,
            fps=float(fps),
            duration=count / fps,
            width=int(width),
            height=int(height),
            codec="rawvideo",
            pixel_format="rgb24",
            container="memory",
            has_audio=False,
        )
        seconds = tuple(index / fps for index in range(count))
        self._scan = ContainerScan(Path("frames"), info, seconds, Display(info.width, info.height))

    def pictures(self, indices: Sequence[int]) -> npt.NDArray[np.uint8]:
        """(n, H, W, 3) uint8, C-contiguous, in the memory of the CPU; only these frames are copied from a GPU."""
        chosen: Any = self._frames[list(indices)]
        if _is_tensor(chosen):
            if self._is_float:
                chosen = (chosen.float() * 255).round().clamp(0, 255).byte()
            chosen = chosen.cpu().numpy()
        elif self._is_float:
            chosen = np.clip(np.rint(chosen.astype(np.float32) * 255), 0, 255).astype(np.uint8)
        if self._channels_first:
            chosen = chosen.transpose(0, 2, 3, 1)
        return np.ascontiguousarray(chosen)

    def read_frames(
        self, sampling: Sampling, views: Sequence[View], factor: int, measure: type[ClipMeasurement] | None = None
    ) -> Frames:
        """The sampled frames; arguments and result as for `lmm_qa.video.decode.read_frames`."""
        return self._collect(lambda seconds: sample_indices(seconds, sampling), views, factor, measure)

    def read_windows(
        self,
        sampling: Sampling,
        views: Sequence[View],
        factor: int,
        window: float,
        step: float,
        measure: type[ClipMeasurement] | None = None,
    ) -> Windows:
        """The sampled frames of windows; arguments and result as for `lmm_qa.video.decode.read_windows`."""

        def collect(choose: Choice) -> tuple[Sequence[float], Frames]:
            return self._scan.seconds, self._collect(choose, views, factor, measure)

        return select_windows(self._scan.info, collect, sampling, views, factor, window, step)

    def _collect(
        self,
        choose: Choice,
        views: Sequence[View],
        factor: int,
        measure: type[ClipMeasurement] | None,
    ) -> Frames:
        if measure:
            return collect_frames(self._scan, self._video_frames, choose, views, factor, measure, "memory")[1]
        screen = Playback(tuple(range(len(self._scan.seconds))), self._scan.seconds)
        moments = choose(screen.seconds)
        distinct = sorted(set(moments))
        renderer = ViewRenderer(views, factor)
        for index, picture in zip(distinct, self.pictures(distinct), strict=True):
            renderer.add(index, picture)
        return stack_frames(self._scan, screen, moments, renderer, "memory")

    def _video_frames(self, scan: ContainerScan, _notes: set[Note]) -> Iterator[VideoFrame]:
        """Every frame, as the decoder of an RGB file returns them."""
        from fractions import Fraction

        from av.video.frame import VideoFrame

        for start in range(0, len(scan.seconds), CHUNK):
            stop = min(start + CHUNK, len(scan.seconds))
            for index, picture in enumerate(self.pictures(range(start, stop)), start):
                frame = VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = index, 1 / Fraction(scan.info.fps).limit_denominator(10_000)
                yield frame


def read_batch(frames: FramesInMemory, fps: float) -> tuple[list[FrameArray], bool]:
    """Check frames in memory.

    Args:
        frames: a clip or a batch of clips, see `EXPECTED`. A list of PIL images or of frames is a clip. A list of clips
            is a batch; they can have different sizes and lengths.
        fps: frames per second, of all clips.

    Returns:
        The clips, and whether a batch was given.

    Raises:
        UsageError: as for `FrameArray`.
    """
    if isinstance(frames, list | tuple):
        if not frames:
            raise UsageError(f"{EXPECTED}; received an empty list")
        clips = [_stack(each) for each in frames] if _is_clip(frames[0]) else [_stack(frames)]
        return [FrameArray(clip, fps) for clip in clips], _is_clip(frames[0])
    array = cast("Array", frames)
    if not hasattr(array, "ndim") or not hasattr(array, "dtype"):
        raise UsageError(f"{EXPECTED}; received {type(frames).__name__}")
    if array.ndim != 5:
        return [FrameArray(array, fps)], False
    if not len(array):
        raise UsageError(f"{EXPECTED}; received an empty batch, {describe(array)}")
    return [FrameArray(clip, fps) for clip in array], True


def describe(frames: Array) -> str:
    """Shape, dtype and range of an array, for messages."""
    text = f"shape {tuple(frames.shape)}, dtype {str(frames.dtype).removeprefix('torch.')}"
    if 0 in frames.shape or "complex" in text:
        return text
    return f"{text}, values {float(frames.min()):g} to {float(frames.max()):g}"


def _is_tensor(frames: object) -> TypeGuard[torch.Tensor]:
    return type(frames).__module__.partition(".")[0] == "torch"


def _is_clip(item: object) -> bool:
    """Whether an item of a list is a clip; otherwise it is a frame."""
    return isinstance(item, list | tuple) or getattr(item, "ndim", 0) == 4


def _stack(frames: Any) -> Array:
    """A list of PIL images or of frames as one array."""
    from PIL.Image import Image

    if not isinstance(frames, list | tuple):
        return cast("Array", frames)
    frames = [np.asarray(frame.convert("RGB")) if isinstance(frame, Image) else frame for frame in frames]
    shapes = {tuple(getattr(frame, "shape", ())) for frame in frames}
    if len(shapes) != 1 or len(min(shapes)) != 3:
        raise UsageError(
            f"the frames of a clip are pictures of one size, (H, W, 3) or (3, H, W); received {sorted(shapes)}"
        )
    if _is_tensor(frames[0]):
        import torch

        return torch.stack(frames)
    return np.stack(frames)


def _check_values(frames: Array) -> bool:
    """Check dtype and range; return whether the values are floating point."""
    dtype = str(frames.dtype).removeprefix("torch.")
    if dtype == "uint8":
        return False
    if "float" not in dtype or "float8" in dtype:
        raise UsageError(f"frames are uint8, or floating point in [0, 1]; received {describe(frames)}")
    low, high = float(frames.min()), float(frames.max())
    if math.isnan(low) or math.isnan(high):
        raise UsageError(f"frames contain values that are not a number (NaN); received {describe(frames)}")
    if low < -OVERSHOOT or high > 1 + OVERSHOOT:
        raise UsageError(
            f"floating-point frames have values in [0, 1]; received {describe(frames)}: convert them, with "
            "(frames + 1) / 2 from [-1, 1], or to uint8 from [0, 255]"
        )
    return True
