"""python -m pytest tests/video/test_face.py"""

from __future__ import annotations

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paths import SAMPLES

from lmm_qa.video.face import FOLLOWED_PICTURES, Face, boxes_at, face_window, find_face, follow_face

PORTRAIT = SAMPLES / "astronaut_clean.mp4"
EYES, MOUTH = (0.503, 0.393), (0.498, 0.55)
"""Where they are in that clip, by the numbers of the script that made it; the head moves by up to 0.03."""


@pytest.fixture(scope="module")
def portrait() -> np.ndarray:
    with av.open(str(PORTRAIT)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)][:30])


def test_a_face_is_found_from_forehead_to_chin(portrait: np.ndarray) -> None:
    face = find_face(portrait)
    assert face.found
    assert face.boxes.shape == (30, 4)
    left, top, right, bottom = face.boxes.T
    for x, y in (EYES, MOUTH):
        assert np.all((left < x) & (x < right) & (top < y) & (y < bottom))
    assert np.all((right - left < 0.5) & (abs((right - left) - (bottom - top)) < 0.01))
    assert np.all(abs((MOUTH[1] - top) / (bottom - top) - 0.78) < 0.1)


def test_a_face_is_followed(portrait: np.ndarray) -> None:
    moved = np.stack([np.roll(frame, (0, 3 * number), axis=(0, 1)) for number, frame in enumerate(portrait)])
    left = find_face(moved).boxes[:, 0] - find_face(portrait).boxes[:, 0]
    assert left == pytest.approx(3 * np.arange(30) / 384, abs=0.02)


@given(
    st.lists(st.floats(-0.5, 1.4), min_size=2, max_size=2),
    st.floats(0.001, 2),
    st.integers(1, 900),
    st.integers(1, 900),
)
def test_a_window_of_the_face_stays_in_the_picture(corner: list[float], size: float, height: int, width: int) -> None:
    boxes = np.array([[*corner, corner[0] + size, corner[1] + size * width / height]])
    x, y, side = face_window(Face(boxes, found=True), height, width)
    assert 1 <= side <= min(height, width)
    assert 0 <= x <= width - side
    assert 0 <= y <= height - side


def test_the_face_seen_most_is_taken_for_the_face(portrait: np.ndarray) -> None:
    """One that is there in a third of the clip does not count, though it is larger."""
    wide = np.pad(portrait, ((0, 0), (0, 0), (0, 384), (0, 0)), mode="edge")
    wide[:10, :, 384:] = wide[:10, :, :384]
    assert np.all(find_face(wide).boxes[:, 2] < 0.5)


def test_what_is_taken_for_a_face_once_is_none(portrait: np.ndarray) -> None:
    grey = np.full_like(portrait, 128)
    grey[0] = portrait[0]
    assert not find_face(grey).found
    grey[10:20] = portrait[10:20]
    assert find_face(grey).found
    assert find_face(portrait[:1]).found


@pytest.mark.parametrize(("height", "width"), [(90, 160), (160, 90), (1, 1)])
def test_where_there_is_no_face_one_is_assumed(height: int, width: int) -> None:
    face = find_face(np.full((3, height, width, 3), 128, np.uint8))
    assert not face.found
    assert face.boxes.shape == (3, 4)
    left, top, right, bottom = face.boxes[0]
    assert (right - left) * width == pytest.approx((bottom - top) * height)
    assert 0.3 <= left < 0.5 < right <= 0.7
    assert 0.2 <= top < 0.5


def test_a_few_pictures_are_followed_as_the_whole_clip_is(portrait: np.ndarray) -> None:
    moved = np.stack([np.roll(frame, (number, 3 * number), axis=(0, 1)) for number, frame in enumerate(portrait)])
    numbers = [0, 5, 11, 17, 23, 29]
    quick, thorough = follow_face([moved[number] for number in numbers]), find_face(moved)
    assert quick.found
    assert quick.boxes.shape == (len(numbers), 4)
    assert quick.boxes == pytest.approx(thorough.boxes[numbers], abs=0.04)


def test_a_face_that_comes_later_is_followed_from_there(portrait: np.ndarray) -> None:
    empty = np.full_like(portrait[0], 90)
    assert follow_face([empty, portrait[5], portrait[10], portrait[15]]).found
    assert not follow_face([portrait[0], empty, empty, empty]).found, "two pictures have to agree"
    nobody = follow_face([empty] * (FOLLOWED_PICTURES + 2))
    assert not nobody.found
    assert nobody.boxes.shape == (FOLLOWED_PICTURES + 2, 4)


def test_boxes_between_those_that_are_known() -> None:
    boxes = np.array([[0.1, 0.1, 0.5, 0.5], [0.3, 0.2, 0.7, 0.6], [0.3, 0.2, 0.7, 0.6]])
    found = boxes_at(boxes, [0, 10, 10], [0, 5, 10, 20])
    assert found[1] == pytest.approx([0.2, 0.15, 0.6, 0.55])
    assert found[3] == pytest.approx(boxes[1])
