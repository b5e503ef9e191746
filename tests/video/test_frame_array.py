"""python -m pytest tests/video/test_frame_array.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clips import ffmpeg_frames, numbered_picture, read_number, write_clip
from PIL import Image

from lmm_qa.config import Sampling, View
from lmm_qa.errors import UsageError
from lmm_qa.video.decode import read_frames, read_windows
from lmm_qa.video.frame_array import FrameArray, read_batch
from lmm_qa.video.measurement.features import FeatureExtractor

SAMPLING = Sampling(frames=4)
VIEWS = (View(max_pixels=112 * 112), View(kind="crop", size=56), View(kind="face", size=56))
NUMBERED = np.stack([numbered_picture(number, 96, 64) for number in range(12)])


def sampled(frames: Any, **how: Any) -> tuple[np.ndarray, ...]:
    (array,), _ = read_batch(frames, 25)
    return array.read_frames(SAMPLING, VIEWS, 28).views


@pytest.mark.parametrize(
    ("suffix", "codec", "pixels"), [("mkv", "ffv1", "bgr0"), ("mov", "png", "rgb24"), ("avi", "utvideo", "gbrp")]
)
def test_frames_in_memory_are_read_as_those_of_a_lossless_file(
    tmp_path: Path, suffix: str, codec: str, pixels: str
) -> None:
    clip = write_clip(tmp_path / f"a.{suffix}", frames=60, codec=codec, pixel_format=pixels)
    array = FrameArray(ffmpeg_frames(clip, 192, 128), 25)
    from_file = read_windows(clip, SAMPLING, VIEWS, 28, 1.0, 0.5, FeatureExtractor)
    in_memory = array.read_windows(SAMPLING, VIEWS, 28, 1.0, 0.5, FeatureExtractor)
    assert np.array(in_memory.spans) == pytest.approx(np.array(from_file.spans))
    for one, other in (
        (in_memory.frames, from_file.frames),
        (in_memory.whole, from_file.whole),
        (in_memory[1], from_file[1]),
    ):
        assert one.indices == other.indices
        assert one.seconds == pytest.approx(other.seconds)
        assert all(np.array_equal(a, b) for a, b in zip(one.views, other.views, strict=True))
    assert in_memory.frames.features == pytest.approx(from_file.frames.features)
    assert in_memory.frames.features == pytest.approx(read_frames(clip, SAMPLING, VIEWS, 28, FeatureExtractor).features)


def test_without_measurement_the_same_frames_are_sampled() -> None:
    array = FrameArray(NUMBERED, 25)
    plain, measured = (array.read_frames(SAMPLING, VIEWS, 28, measure) for measure in (None, FeatureExtractor))
    assert plain.indices == measured.indices == (1, 4, 7, 10)
    assert all(np.array_equal(a, b) for a, b in zip(plain.views, measured.views, strict=True))
    assert [read_number(picture) for picture in array.pictures(plain.indices)] == [1, 4, 7, 10]
    assert (plain.info.frames, plain.info.duration, plain.info.width, plain.info.height) == (12, 0.48, 96, 64)
    assert plain.decoder == measured.decoder == "memory"


@pytest.mark.parametrize(
    "frames",
    [
        torch.from_numpy(NUMBERED),
        torch.from_numpy(NUMBERED).permute(0, 3, 1, 2),
        NUMBERED.transpose(0, 3, 1, 2),
        NUMBERED / 255,
        (NUMBERED / 255).astype(np.float32),
        torch.from_numpy(NUMBERED).float().div(255).requires_grad_(),
        NUMBERED / 255 * 1.0005,
        [Image.fromarray(picture) for picture in NUMBERED],
        list(NUMBERED),
        [torch.from_numpy(picture) for picture in NUMBERED],
        np.flip(np.flip(NUMBERED, 0), 0),
    ],
    ids=[
        "tensor",
        "first",
        "numpy_first",
        "float64",
        "float32",
        "gradient",
        "overshoot",
        "pil",
        "list",
        "tensors",
        "view",
    ],
)
def test_kinds_of_frames(frames: Any) -> None:
    assert all(np.array_equal(a, b) for a, b in zip(sampled(frames), sampled(NUMBERED), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_at_most_one_or_two_steps_off(dtype: torch.dtype) -> None:
    (array,), _ = read_batch(torch.from_numpy(NUMBERED).div(255).to(dtype), 25)
    difference = array.pictures(range(12)).astype(int) - NUMBERED
    assert np.abs(difference).max() <= (1 if dtype == torch.float16 else 2)


def test_read_only_frames_cause_no_warning() -> None:
    frames = NUMBERED.copy()
    frames.setflags(write=False)
    assert len(sampled(frames)) == 3


@pytest.mark.parametrize(
    ("frames", "clips", "batched"),
    [
        (NUMBERED, 1, False),
        (NUMBERED[None], 1, True),
        (torch.from_numpy(NUMBERED)[None].expand(3, -1, -1, -1, -1), 3, True),
        ([NUMBERED, NUMBERED[:5, :32]], 2, True),
        ([[Image.fromarray(picture) for picture in NUMBERED]] * 2, 2, True),
    ],
)
def test_batches(frames: Any, clips: int, batched: bool) -> None:
    arrays, is_batch = read_batch(frames, 25)
    assert (len(arrays), is_batch) == (clips, batched)


NAN = np.where(np.arange(12)[:, None, None, None] == 7, np.nan, NUMBERED / 255)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (NUMBERED[0], r"received shape \(64, 96, 3\), dtype uint8, values 0 to 220"),
        (NUMBERED[..., :1], r"expected a clip, .* received shape \(12, 64, 96, 1\)"),
        (np.zeros((2, 2, 2, 2, 2, 3)), r"received shape \(2, 2, 2, 2, 2, 3\)"),
        (np.zeros((5, 3, 64, 3), np.uint8), r"second or the last dimension of shape \(5, 3, 64, 3\), dtype uint8"),
        (NUMBERED[:1], r"at least 2 frames, with pixels; received shape \(1, 64, 96, 3\)"),
        (NUMBERED[:0], r"at least 2 frames, with pixels; received shape \(0, 64, 96, 3\), dtype uint8$"),
        (NUMBERED[:, :0], r"at least 2 frames, with pixels"),
        (
            NUMBERED.astype(np.float32),
            r"values in \[0, 1\]; received shape .*, dtype float32, values \d+ to 255: convert",
        ),
        (NUMBERED / 127.5 - 1, r"dtype float64, values -1 to 1: convert them, with \(frames \+ 1\) / 2"),
        (NAN, r"not a number \(NaN\); received .* values nan to nan"),
        (torch.from_numpy(NAN), r"not a number \(NaN\); received .*dtype float64, values nan to nan"),
        (np.where(np.isnan(NAN), np.inf, NAN), r"values \S+ to inf"),
        (NUMBERED.astype(np.int64), r"frames are uint8, or floating point in \[0, 1\]; received .*dtype int64"),
        (NUMBERED > 100, "dtype bool"),
        ([], "empty list"),
        (NUMBERED[None][:0], "empty batch, shape"),
        ("clip.mp4", "received str"),
        ([NUMBERED[0], NUMBERED[1, :8]], r"pictures of one size, .*\[\(8, 96, 3\), \(64, 96, 3\)\]"),
        ([1, 2], r"received \[\(\)\]"),
    ],
)
def test_what_cannot_be_rated_is_described(frames: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_batch(frames, 25)


@pytest.mark.parametrize("fps", [0, -25, float("nan"), float("inf")])
def test_a_frame_rate_is_positive(fps: float) -> None:
    with pytest.raises(UsageError, match="fps must be a number above 0"):
        read_batch(NUMBERED, fps)


def test_only_sampled_frames_leave_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    original = torch.Tensor.cpu

    def cpu(tensor: torch.Tensor) -> torch.Tensor:
        copied.append(len(tensor))
        return original(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    sampled(torch.from_numpy(NUMBERED))
    assert copied == [SAMPLING.frames]
