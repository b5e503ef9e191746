"""A stall, a wait and a switch are found where they are, in what an encoder leaves of them; what is calm is none.

Run: python -m pytest tests/video/test_temporal.py
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from skimage.measure import block_reduce

from lmm_qa.config import Sampling, View
from lmm_qa.degrade.causes import degrade, encode
from lmm_qa.video.decode import read_frames
from lmm_qa.video.temporal import (
    Cadence,
    FrameDynamics,
    FrameDynamicsRecorder,
    buffering,
    cadence,
    flicker,
    stalls,
    switches,
)

FPS = 25
FLICKERS = 0.008
"""Between real clips, under 0.002, noisy ones, under 0.004, and jumps by 2%, from 0.009 on."""
WITHIN = 0.5
"""Seconds by which an end may be missed."""


def talking(count: int = 100, sway: float = 3.0) -> NDArray[np.uint8]:
    """(count, 128, 160, 3): a textured head that sways before a textured background, with a mouth that moves."""
    rng = np.random.default_rng(0)
    background, head = (gaussian_filter(rng.normal(128, 60, shape), 1.2) for shape in ((128, 160), (70, 50)))
    frames = np.empty((count, 128, 160))
    for number in range(count):
        picture = background.copy()
        left = 55 + round(sway * np.sin(number / 3))
        picture[30:100, left : left + 50] = head
        opened = 1 + round(3 * abs(np.sin(number * 0.7)))
        picture[80 : 80 + opened, left + 18 : left + 32] = 20
        frames[number] = picture
    return np.repeat(np.clip(frames, 0, 255).astype(np.uint8)[..., None], 3, axis=-1)


def traced(frames: NDArray[np.uint8], folder: Path, crf: int = 23) -> FrameDynamics:
    """The dynamics of these frames as an encoder leaves them."""
    encode(frames, "libx264", {"crf": str(crf), "preset": "veryfast"}, Fraction(FPS), str(folder / "clip.mp4"))
    dynamics = read_frames(folder / "clip.mp4", Sampling(frames=1), [View()], 28).dynamics
    assert dynamics is not None and len(dynamics.seconds) == len(frames)
    return dynamics


def by_hand(peak: list[float], quiet: float = 0.1, detail: float = 2.0) -> FrameDynamics:
    """A dynamics of which only the changes are told, 25 frames a second."""
    count = len(peak)
    seconds = np.arange(count, dtype=np.float32) / FPS
    flat = np.ones(count, np.float32)
    return FrameDynamics(seconds, count / FPS, np.array(peak, np.float32), quiet * flat, detail * flat, 128 * flat)


def close(found: tuple[float, float], true: tuple[float, float]) -> bool:
    return all(abs(one - other) <= WITHIN for one, other in zip(found, true, strict=True))


# What is measured


def test_the_numbers_are_what_they_are_called() -> None:
    """Pictures whose every pixel is a sample; more of them than are measured at once."""
    pictures = np.random.default_rng(0).integers(0, 256, (70, 48, 48)).astype(np.uint8)
    tracer = FrameDynamicsRecorder()
    for picture in pictures:
        tracer.add(picture)
    dynamics = tracer.dynamics(np.arange(70) / FPS, 70 / FPS)
    exact = pictures.astype(float)
    blocks = np.stack([block_reduce(change, (4, 4), np.mean).ravel() for change in np.abs(np.diff(exact, axis=0))])
    assert dynamics.peak_change[0] == dynamics.background_change[0] == 0
    assert np.allclose(dynamics.peak_change[1:], blocks.max(axis=1), atol=1e-3)
    assert np.allclose(dynamics.background_change[1:], np.sort(blocks, axis=1)[:, 36], atol=1e-3)
    assert np.allclose(dynamics.brightness, exact.mean(axis=(1, 2)), atol=1e-3)
    assert np.allclose(dynamics.detail, np.sqrt(np.abs(np.diff(exact, axis=2))).mean(axis=(1, 2)), atol=1e-4)


def test_only_the_last_sample_is_kept_of_frames() -> None:
    tracer = FrameDynamicsRecorder()
    for _ in range(200):
        tracer.add(np.zeros((480, 640), np.uint8))
    assert len(tracer._rows) <= 32


def test_pictures_that_change_their_size_can_be_measured() -> None:
    tracer = FrameDynamicsRecorder()
    for size in ((64, 64), (64, 64), (128, 96), (1, 1)):
        tracer.add(np.full(size, 100, np.uint8))
    dynamics = tracer.dynamics([0, 0.04, 0.08, 0.12], 0.16)
    assert dynamics.peak_change.tolist() == [0, 0, 0, 0] and dynamics.detail.tolist() == [0, 0, 0, 0]


# Pictures that stand


@pytest.mark.parametrize("crf", [10, 28])
@pytest.mark.parametrize("strength", [0.25, 0.9])
@pytest.mark.parametrize("other", [None, "noise", "blur"])
def test_a_stall_is_found_where_it_is(tmp_path: Path, crf: int, strength: float, other: str | None) -> None:
    frames = talking() if other is None else degrade(talking(), other, 0.5).frames
    stalled = degrade(frames, "stall", strength, seed=3, fps=FPS)
    dynamics = traced(stalled.frames, tmp_path, crf)
    assert [close(found, stalled.seconds) for found in stalls(dynamics)] == [True]
    assert buffering(dynamics) is None


@pytest.mark.parametrize("crf", [10, 28])
@pytest.mark.parametrize("strength", [0.25, 0.9])
def test_a_wait_is_found_at_the_beginning(tmp_path: Path, crf: int, strength: float) -> None:
    waiting = degrade(talking(), "buffering", strength, fps=FPS)
    dynamics = traced(waiting.frames, tmp_path, crf)
    found = buffering(dynamics)
    assert found is not None and found[0] == 0 and close(found, waiting.seconds)
    assert stalls(dynamics) == []


@pytest.mark.parametrize("crf", [18, 28])
@pytest.mark.parametrize("sway", [0.0, 3.0])
def test_a_calm_face_does_not_stand(tmp_path: Path, crf: int, sway: float) -> None:
    """Not even a photograph whose mouth alone moves, 1 in 300 of its pixels."""
    dynamics = traced(talking(sway=sway), tmp_path, crf)
    assert stalls(dynamics) == [] and buffering(dynamics) is None


@pytest.mark.parametrize("cause", ["drop", "jitter"])
def test_repeated_frames_are_no_stalls_but_a_low_rate(tmp_path: Path, cause: str) -> None:
    dynamics = traced(degrade(talking(), cause, 0.6, fps=FPS).frames, tmp_path, 18)
    assert stalls(dynamics) == []
    assert cadence(dynamics).rate < 15 < cadence(traced(talking(), tmp_path, 18)).rate


def test_regular_repeats_are_told_from_irregular_ones() -> None:
    regular, irregular = ([5.0 * (number % 4 == 0) for number in range(100)], [0.0] * 100)
    for number in np.cumsum([1, 7, 2, 1, 6, 3, 1, 8] * 3):
        irregular[number] = 5.0
    assert cadence(by_hand(regular)).rate == pytest.approx(FPS / 4)
    assert cadence(by_hand(regular)).unevenness == pytest.approx(0, abs=1e-5)
    assert cadence(by_hand(irregular)).unevenness > 0.5


def test_a_stall_says_nothing_about_the_pace() -> None:
    assert cadence(by_hand([5.0] * 30 + [0.0] * 50 + [5.0] * 20)).rate == pytest.approx(FPS, rel=0.05)


def test_a_keyframe_does_not_end_a_stall() -> None:
    dynamics = by_hand([5.0] * 20 + [0.0] * 20 + [1.0] + [0.0] * 20 + [5.0] * 20)
    assert stalls(dynamics) == [pytest.approx((19 / FPS, 61 / FPS), abs=1e-5)]


def test_a_photograph_that_is_refreshed_stands_all_the_time() -> None:
    dynamics = by_hand(([0.7] + [0.1] * 24) * 6)
    assert stalls(dynamics) == [(0.0, 6.0)]


def test_two_stalls_are_two() -> None:
    dynamics = by_hand([5.0] * 20 + [0.0] * 10 + [5.0] * 20 + [0.0] * 20 + [5.0] * 20)
    assert len(stalls(dynamics)) == 2


def test_a_moment_is_no_stall() -> None:
    assert stalls(by_hand([5.0] * 20 + [0.0] * 4 + [5.0] * 20)) == []


def test_a_picture_for_all_the_time_is_one_stall() -> None:
    dynamics = by_hand([0.0] * 50)
    assert stalls(dynamics) == [(0.0, 2.0)] and buffering(dynamics) is None
    assert cadence(dynamics) == Cadence(0.0, 0.0)


def test_a_clip_of_one_frame_has_nothing() -> None:
    dynamics = by_hand([0.0])
    assert (stalls(dynamics), buffering(dynamics), switches(dynamics)) == ([], None, [])


# Quality that switches


@pytest.mark.parametrize(("seed", "opening"), [(0, True), (1, False)])
@pytest.mark.parametrize("strength", [0.6, 0.9])
def test_a_switch_is_found_where_it_is(tmp_path: Path, seed: int, opening: bool, strength: float) -> None:
    switched = degrade(talking(), "bitrate_switch", strength, seed=seed, fps=FPS)
    assert (switched.seconds[0] == 0) == opening
    assert [close(found, switched.seconds) for found in switches(traced(switched.frames, tmp_path, 18))] == [True]


@pytest.mark.parametrize("cause", [None, "noise", "h264"])
def test_what_is_alike_all_the_time_is_no_switch(tmp_path: Path, cause: str | None) -> None:
    frames = degrade(talking(), cause, 0.7).frames if cause else talking()
    assert switches(traced(frames, tmp_path)) == []


def stepping(*levels: float, quiet: float = 1.0, gradual: int = 1) -> FrameDynamics:
    """A dynamics whose detail goes from level to level, 30 frames each, with a change of the quiet parts as it does."""
    dynamics = by_hand([5.0] * 30 * len(levels))
    detail = np.repeat(levels, 30)
    detail = np.convolve(np.pad(detail, gradual, mode="edge"), np.full(gradual, 1 / gradual), "same")[gradual:-gradual]
    still = np.full(len(detail), 0.1)
    still[30::30] = quiet
    return replace(dynamics, background_change=still.astype(np.float32), detail=detail.astype(np.float32))


def test_a_switch_begins_ends_or_does_both() -> None:
    assert switches(stepping(2, 1, 2)) == [pytest.approx((1.2, 2.4), abs=0.05)]
    assert switches(stepping(1, 2, 2)) == [pytest.approx((0, 1.2), abs=0.05)]
    assert switches(stepping(2, 2, 1)) == [pytest.approx((2.4, 3.6), abs=0.05)]


def test_detail_that_drifts_is_no_switch() -> None:
    assert switches(stepping(2, 1.5, 2, gradual=25)) == []


def test_another_scene_is_no_switch() -> None:
    assert switches(stepping(2, 1, quiet=40.0)) == []
    assert switches(stepping(2, 1, quiet=5.0)) != []


def test_the_likeliest_seconds_can_be_asked_for() -> None:
    faint = stepping(2, 1.95, 2)
    assert switches(faint) == []
    assert switches(faint, min_evidence=0) == [pytest.approx((1.2, 2.4), abs=0.05)]


def test_a_step_at_an_end_is_no_switch() -> None:
    """Too short to be one: the first and last frames of many clips are encoded otherwise."""
    dynamics = by_hand([5.0] * 60)
    detail = np.full(60, 2.0, np.float32)
    detail[:4] = detail[-4:] = 1.0
    quiet = np.where(np.isin(np.arange(60), (4, 56)), 3.0, 0.1).astype(np.float32)
    assert switches(replace(dynamics, background_change=quiet, detail=detail)) == []


# Brightness that jumps


@pytest.mark.parametrize("strength", [0.2, 0.9])
def test_flicker_is_found(tmp_path: Path, strength: float) -> None:
    assert flicker(traced(degrade(talking(), "flicker", strength, 3, fps=FPS).frames, tmp_path)) > FLICKERS


@pytest.mark.parametrize("cause", [None, "noise", "stall", "drop", "jitter", "h264"])
def test_what_does_not_flicker(tmp_path: Path, cause: str | None) -> None:
    frames = degrade(talking(), cause, 0.8, 3, fps=FPS).frames if cause else talking()
    assert flicker(traced(frames, tmp_path)) < FLICKERS / 2


def test_light_that_changes_slowly_or_once_does_not_flicker() -> None:
    count = 100
    steady, ramp = by_hand([5.0] * count), np.linspace(40, 200, count, dtype=np.float32)
    assert flicker(steady) == 0
    assert flicker(replace(steady, brightness=ramp)) < FLICKERS / 4
    assert flicker(replace(steady, brightness=np.where(np.arange(count) < 50, 60, 180).astype(np.float32))) == 0
    assert flicker(by_hand([0.0] * count)) == 0, "nothing moves"
    assert flicker(by_hand([5.0])) == 0, "one frame"
