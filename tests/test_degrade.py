"""python -m pytest tests/test_degrade.py"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from clips import numbered_picture, read_number

from lmm_qa.degrade import COMPRESSION, DAMAGES, MILD, STRONG, TEMPORAL, Pixels, damage, encode, stalled_frames

SPATIAL = sorted(DAMAGES.keys() - set(TEMPORAL))


@pytest.fixture(scope="module")
def clip() -> Pixels:
    """24 numbered frames of odd size with some texture, so that there is something to lose."""
    rng = np.random.default_rng(0)
    texture = rng.integers(-24, 25, (93, 121, 1))
    frames = np.stack([numbered_picture(number, 121, 93) for number in range(24)])
    return np.clip(frames + texture, 0, 255).astype(np.uint8)


def error(clip: Pixels, damaged: Pixels) -> float:
    """Mean squared error of the pixels."""
    return float(np.mean((clip.astype(float) - damaged) ** 2))


@pytest.mark.parametrize("cause", DAMAGES)
def test_a_damage_keeps_the_shape_is_repeatable_and_grows(clip: Pixels, cause: str) -> None:
    before = clip.copy()
    levels = [damage(clip, cause, strength, seed=1) for strength in (0.0, MILD, STRONG, 1.0)]
    for damaged in levels:
        assert damaged.shape == clip.shape
        assert damaged.dtype == np.uint8
    errors = [error(clip, damaged) for damaged in levels]
    assert 0 < errors[0] < errors[1] < errors[2] < errors[3]
    assert np.array_equal(damage(clip, cause, STRONG, seed=1), levels[2])
    assert np.array_equal(clip, before)


@pytest.mark.parametrize("cause", SPATIAL)
def test_spatial_damage_leaves_the_frames_in_order(clip: Pixels, cause: str) -> None:
    damaged = damage(clip, cause, MILD)
    assert all(error(clip[i], damaged[i]) < error(clip[i], damaged[(i + 8) % 24]) for i in range(24))


@pytest.mark.parametrize("strength", [0.0, MILD, STRONG, 1.0])
def test_a_stall_holds_one_frame(clip: Pixels, strength: float) -> None:
    for seed in range(5):
        numbers = [read_number(frame) for frame in damage(clip, "stall", strength, seed)]
        held = stalled_frames(24, strength)
        start = next(i for i in range(24) if numbers[i : i + held] == [i] * held)
        assert numbers == [*range(start), *[start] * held, *range(start + held, 24)]


def test_how_long_a_stall_is() -> None:
    assert [stalled_frames(100, strength) for strength in (0, MILD, STRONG, 1)] == [15, 34, 67, 80]
    assert stalled_frames(2, 0) == 2


def test_dropped_frames_are_stood_in_for_by_those_before(clip: Pixels) -> None:
    assert [read_number(frame) for frame in damage(clip, "drop", 0)] == [i // 2 * 2 for i in range(24)]
    assert [read_number(frame) for frame in damage(clip, "drop", 1)] == [i // 12 * 12 for i in range(24)]


def test_only_noise_and_stalls_are_drawn_by_lot(clip: Pixels) -> None:
    drawn = {cause for cause in DAMAGES if not np.array_equal(damage(clip, cause, 0.5, 1), damage(clip, cause, 0.5, 2))}
    assert drawn == {"noise", "stall"}


def test_noise_is_fresh_in_every_frame() -> None:
    still = np.full((3, 64, 64, 3), 128, np.uint8)
    noise = damage(still, "noise", MILD).astype(float) - still
    assert noise.std() == pytest.approx(3 * 16**MILD, rel=0.05)
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.05


def test_one_frame_can_be_damaged(clip: Pixels) -> None:
    for cause in SPATIAL:
        assert damage(clip[:1], cause, STRONG).shape == (1, 93, 121, 3)


def test_what_cannot_be_damaged(clip: Pixels) -> None:
    with pytest.raises(ValueError, match=r"unknown damage 'fog'; known: blur, rescale, "):
        damage(clip, "fog", 0.5)
    for strength in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=f"strength is between 0 and 1, received {strength}"):
            damage(clip, "blur", strength)
    for frames in (clip[0], clip.astype(np.float32), clip[..., :2]):
        with pytest.raises(ValueError, match=r"frames are \(T, H, W, 3\) uint8, received"):
            damage(frames, "blur", 0.5)


def test_the_groups_are_damages() -> None:
    assert {*COMPRESSION, *TEMPORAL} < DAMAGES.keys()


def test_a_file_can_be_written(clip: Pixels, tmp_path: Path) -> None:
    encode(clip, "libx264", {"crf": "10"}, Fraction(30), str(tmp_path / "clip.mp4"))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].average_rate == 30
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert [picture.shape for picture in pictures] == [(94, 122, 3)] * 24
    assert [read_number(picture[:93, :121]) for picture in pictures] == list(range(24))
