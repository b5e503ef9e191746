"""python -m pytest tests/defects/test_motion_features.py"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from lmm_qa.defects.motion_features import WATCHED, MotionFeatureRecorder

Frames = NDArray[np.uint8]
BOX = np.array([[0.3, 0.2, 0.7, 0.6]])
"""A face that stands still."""


def passed(frames: Iterable[Frames], turns: int = 0) -> MotionFeatureRecorder:
    motion = MotionFeatureRecorder(turns)
    for frame in frames:
        motion.add(frame)
    return motion


def head(count: int = 60, held: Sequence[int] = (), side: int = 160) -> Frames:
    """A face whose every part moves from frame to frame, save the mouth in those that are held."""
    lot = np.random.default_rng(0)
    frames = lot.integers(90, 110, (count, side, side)).astype(np.uint8)
    left, top, right, bottom = (round(edge * side) for edge in (0.40, 0.44, 0.60, 0.60))
    for number in held:
        frames[number, top:bottom, left:right] = frames[held[0], top:bottom, left:right]
    return frames


def test_lips_that_stand_for_a_second_are_stiller_than_their_face() -> None:
    speaking = passed(head()).lips(BOX, [0])
    standing = passed(head(held=range(20, 45))).lips(BOX, [0])
    assert speaking["lips_least_22"] == pytest.approx(0, abs=0.3)
    assert standing["lips_least_22"] < speaking["lips_least_22"] - 0.5
    assert standing["lips_still_8"] < speaking["lips_still_8"] - 0.5
    assert standing["lips_90"] == pytest.approx(speaking["lips_90"], abs=0.1), "the rest of the time they move"


def test_a_face_is_followed() -> None:
    """A head that crosses the picture: its own frame of reference stands still where its box is known."""
    lot = np.random.default_rng(1)
    frames = np.full((40, 160, 320), 100, np.uint8)
    face = lot.integers(60, 140, (100, 100)).astype(np.uint8)
    for number in range(40):
        frames[number, 30:130, 4 * number : 4 * number + 100] = face + number % 2
    boxes = np.array([[0, 30 / 160, 100 / 320, 130 / 160], [156 / 320, 30 / 160, 256 / 320, 130 / 160]])
    lips = passed(frames).lips(boxes, [0, 39])
    assert np.isfinite([*lips.values()]).all()
    assert lips["lips_50"] == pytest.approx(0, abs=0.5), "all of it changes alike"


def test_what_an_encoder_refreshes_every_fourth_frame_beats() -> None:
    lot = np.random.default_rng(2)
    steady = np.repeat(lot.integers(0, 255, (1, 96, 128)), 64, axis=0) + lot.integers(0, 3, (64, 96, 128))
    copied = steady.copy()
    for number in range(64):
        copied[number] = copied[number // 4 * 4]
    copied[:, ::7] += lot.integers(0, 3, (64, 14, 128))  # something always moves
    even, beating = (passed(frames.astype(np.uint8)).rhythm() for frames in (steady, copied))
    assert beating["same_again_4"] > 0.8 > even["same_again_4"] + 0.5
    assert beating["same_period"] + 2 in (4, 8, 12, 16)
    assert beating["same_beat"] > even["same_beat"] + 1


def test_how_frames_are_stored_does_not_matter() -> None:
    """A clip that is displayed turned has the same lips; lines run the other way."""
    frames = head(held=range(10, 40))
    upright, stored = passed(frames), passed(np.rot90(frames, -1, (1, 2)), turns=1)
    assert upright.lips(BOX, [0]) == pytest.approx(stored.lips(BOX, [0]))


def test_one_frame_two_sizes_and_nothing_at_all() -> None:
    names = list(passed(head()).rhythm())
    grey = np.full((64, 48), 100, np.uint8)
    for frames in ([], [grey], [grey, grey], [grey, np.full((32, 7), 90, np.uint8)], [np.zeros((1, 1), np.uint8)] * 3):
        motion = passed(frames)
        assert list(motion.rhythm()) == names
        assert np.isfinite([*motion.rhythm().values(), *motion.lips(BOX, [0]).values()]).all()


def test_frames_of_another_size_are_not_watched() -> None:
    """Those after them would be taken for their neighbours, and have other numbers than the pictures."""
    frames = head(40)
    other = np.zeros((32, 32), np.uint8)
    mixed = passed([*frames[:20], other, *frames[20:]])
    assert mixed.lips(BOX, [0]) == passed(frames[:20]).lips(BOX, [0])
    assert len(mixed.rhythm()) == len(passed(frames).rhythm())


def test_of_a_long_clip_no_more_is_kept() -> None:
    motion = passed(np.broadcast_to(np.uint8(7), (WATCHED + 50, 40, 300)))
    assert len(motion._small) == WATCHED
    assert len(motion._waiting) <= 33
    assert motion._small[0].shape[1] <= 200
