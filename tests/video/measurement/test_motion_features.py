"""python -m pytest tests/video/measurement/test_motion_features.py"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, shift

from lmm_qa.video.display import UPRIGHT, Orientation
from lmm_qa.video.measurement.motion_features import MAX_FRAMES, MotionFeatureRecorder

Frames = NDArray[np.uint8]
BOX = np.array([[0.3, 0.2, 0.7, 0.6]])
"""A face that does not move."""


def recorded(frames: Iterable[Frames], orientation: Orientation = UPRIGHT, fps: float = 25) -> MotionFeatureRecorder:
    motion = MotionFeatureRecorder(orientation)
    for number, frame in enumerate(frames):
        motion.add_frame(frame, number / fps)
    return motion


def head(count: int = 60, held: Sequence[int] = (), side: int = 160) -> Frames:
    """A face whose parts all change from frame to frame, except the mouth in the frames `held`."""
    rng = np.random.default_rng(0)
    frames = rng.integers(90, 110, (count, side, side)).astype(np.uint8)
    left, top, right, bottom = (round(edge * side) for edge in (0.40, 0.44, 0.60, 0.60))
    for number in held:
        frames[number, top:bottom, left:right] = frames[held[0], top:bottom, left:right]
    return frames


def test_lips_that_stand_still_for_a_second_move_less_than_the_face() -> None:
    speaking = recorded(head()).lip_motion(BOX, [0])
    standing = recorded(head(held=range(20, 45))).lip_motion(BOX, [0])
    assert speaking["lips_least_22"] == pytest.approx(0, abs=0.3)
    assert standing["lips_least_22"] < speaking["lips_least_22"] - 0.5
    assert standing["lips_still_8"] < speaking["lips_still_8"] - 0.5
    assert standing["lips_90"] == pytest.approx(speaking["lips_90"], abs=0.1), "they move for the rest of the time"


def swaying(fps: float) -> Iterator[Frames]:
    """3 s of a face that sways, with a mouth that opens and closes, and stands still from 1.0 to 1.8 s."""
    rng = np.random.default_rng(0)
    background, face = (gaussian_filter(rng.normal(128, 60, (side, side)), 1.5) for side in (160, 110))
    for number in range(round(3 * fps)):
        time = number / fps
        moved = shift(face, (2 * np.sin(4.4 * time), 4 * np.sin(3.1 * time)), order=1, mode="nearest")
        picture = background.copy()
        picture[32:96, 48:112] = moved[23:87, 23:87]
        opening = 2 + 5 * abs(np.sin(14 * time)) * (not 1 <= time < 1.8)
        open_rows = np.clip(opening - np.arange(8), 0, 1)[:, None]
        picture[72:80, 66:94] = picture[72:80, 66:94] * (1 - open_rows) + 20 * open_rows
        yield np.clip(picture, 0, 255).astype(np.uint8)


def test_lip_motion_is_measured_in_seconds() -> None:
    at_25, at_30, at_50, at_60 = (recorded(swaying(fps), fps=fps).lip_motion(BOX, [0]) for fps in (25, 30, 50, 60))
    assert at_50 == pytest.approx(at_25, abs=1e-9), "every other frame is the same picture"
    assert at_60 == pytest.approx(at_30, abs=1e-9)
    assert at_30 == pytest.approx(at_25, abs=0.35), "less change from one frame to the next"


def test_a_moving_face_is_followed() -> None:
    """A head crosses the picture: with its box interpolated, all parts of it change alike."""
    rng = np.random.default_rng(1)
    frames = np.full((40, 160, 320), 100, np.uint8)
    face = rng.integers(60, 140, (100, 100)).astype(np.uint8)
    for number in range(40):
        frames[number, 30:130, 4 * number : 4 * number + 100] = face + number % 2
    boxes = np.array([[0, 30 / 160, 100 / 320, 130 / 160], [156 / 320, 30 / 160, 256 / 320, 130 / 160]])
    lips = recorded(frames).lip_motion(boxes, [0, 39])
    assert np.isfinite([*lips.values()]).all()
    assert lips["lips_50"] == pytest.approx(0, abs=0.5), "all parts change alike"


def test_an_encoder_that_refreshes_every_fourth_frame_has_a_period_of_four() -> None:
    rng = np.random.default_rng(2)
    steady = np.repeat(rng.integers(0, 255, (1, 96, 128)), 64, axis=0) + rng.integers(0, 3, (64, 96, 128))
    copied = steady.copy()
    for number in range(64):
        copied[number] = copied[number // 4 * 4]
    copied[:, ::7] += rng.integers(0, 3, (64, 14, 128))  # something moves in every frame
    even, beating = (recorded(frames.astype(np.uint8)).coding_rhythm() for frames in (steady, copied))
    assert beating["same_again_4"] > 0.8 > even["same_again_4"] + 0.5
    assert beating["same_period"] + 2 in (4, 8, 12, 16)
    assert beating["same_beat"] > even["same_beat"] + 1


def test_stored_rotation_does_not_change_lip_motion() -> None:
    """Rows of stored frames are columns of displayed ones, so the coding rhythm may differ."""
    frames = head(held=range(10, 40))
    upright, stored = recorded(frames), recorded(np.rot90(frames, -1, (1, 2)), Orientation(3))
    assert upright.lip_motion(BOX, [0]) == pytest.approx(stored.lip_motion(BOX, [0]))


def test_features_are_finite_for_any_number_and_size_of_frames() -> None:
    names = list(recorded(head()).coding_rhythm())
    grey = np.full((64, 48), 100, np.uint8)
    for frames in ([], [grey], [grey, grey], [grey, np.full((32, 7), 90, np.uint8)], [np.zeros((1, 1), np.uint8)] * 3):
        motion = recorded(frames)
        assert list(motion.coding_rhythm()) == names
        assert np.isfinite([*motion.coding_rhythm().values(), *motion.lip_motion(BOX, [0]).values()]).all()


def test_pictures_are_kept_up_to_a_frame_of_another_size() -> None:
    """Later ones would be compared with frames that are not their neighbours."""
    frames = head(40)
    other = np.zeros((32, 32), np.uint8)
    mixed = recorded([*frames[:20], other, *frames[20:]])
    assert mixed.lip_motion(BOX, [0]) == recorded(frames[:20]).lip_motion(BOX, [0])
    assert len(mixed.coding_rhythm()) == len(recorded(frames).coding_rhythm())


def test_memory_for_a_long_clip_is_limited() -> None:
    motion = recorded(np.broadcast_to(np.uint8(7), (MAX_FRAMES + 50, 40, 300)))
    assert len(motion._small) == MAX_FRAMES
    assert len(motion._pending) <= 33
    assert motion._small[0].shape[1] <= 200
