"""python -m pytest tests/video/test_views.py"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from clips import read, read_numbers
from hypothesis import given
from hypothesis import strategies as st
from paths import SAMPLES
from PIL import Image

from lmm_qa.config import Sampling, View
from lmm_qa.video.face import face_window, find_face
from lmm_qa.video.views import ViewRenderer, view_size

WHOLE = View()

sides = st.integers(1, 5000)
factors = st.sampled_from([2, 14, 28, 32])


@given(sides, sides, st.integers(28 * 28, 10**6), factors)
def test_whole_views_fit_the_patch_grid_and_the_pixel_budget(height: int, width: int, budget: int, factor: int) -> None:
    rows, columns = view_size(height, width, View(max_pixels=budget), factor)
    assert rows % factor == columns % factor == 0
    assert rows >= factor <= columns
    assert rows * columns <= max(budget, factor * factor)


@given(st.integers(28, 3000), st.integers(28, 3000), st.integers(28 * 28, 10**6))
def test_whole_views_are_rounded_as_by_qwen(height: int, width: int, budget: int) -> None:
    smart_resize = pytest.importorskip("transformers.models.qwen2_vl.image_processing_qwen2_vl").smart_resize
    rows, columns = smart_resize(height, width, factor=28, min_pixels=28 * 28, max_pixels=budget)
    if rows * columns <= budget:  # Qwen's own can exceed the budget on very long pictures
        assert view_size(height, width, View(max_pixels=budget), 28) == (rows, columns)


@given(sides, sides, st.integers(28, 1000), factors)
def test_crops_fit_the_patch_grid_and_the_picture(height: int, width: int, size: int, factor: int) -> None:
    view = View(kind="crop", size=size)
    for side, cropped in zip((height, width), view_size(height, width, view, factor), strict=True):
        assert cropped % factor == 0
        assert factor <= cropped <= max(factor, min(size, side))
        assert cropped > min(size, side) - factor


KINDS = st.sampled_from(["whole", "fit", "crop", "face"])


@given(st.integers(1, 90), st.integers(1, 90), KINDS, st.floats(0, 1), st.floats(0, 1))
def test_rendered_pictures_have_the_predicted_size(height: int, width: int, kind: str, x: float, y: float) -> None:
    view = View(kind=kind, size=56, max_pixels=56 * 56, center=(x, y))
    renderer = ViewRenderer([view], 28)
    for index in range(5):
        renderer.add(index, np.zeros((height, width, 3), np.uint8))
    (pictures,) = renderer.stack([4, 0, 0])
    assert pictures.shape == (3, *view_size(height, width, view, 28), 3)


@pytest.mark.parametrize(("height", "width"), [(720, 1280), (1080, 607), (256, 256), (450, 130), (40, 64)])
def test_fit_reduces_the_long_side_and_then_rounds_to_the_grid(height: int, width: int) -> None:
    smart_resize = pytest.importorskip("transformers.models.qwen2_vl.image_processing_qwen2_vl").smart_resize
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    renderer = ViewRenderer([View(kind="fit", size=448)], 32)
    renderer.add(0, picture)
    image = Image.fromarray(picture)
    if max(height, width) > 448:
        ratio = 448 / max(height, width)
        image = image.resize((max(1, int(width * ratio)), max(1, int(height * ratio))))
    rows, columns = smart_resize(image.height, image.width, factor=32, min_pixels=32 * 32, max_pixels=16384 * 32 * 32)
    expected = np.asarray(image.resize((columns, rows)))
    assert np.array_equal(renderer.stack([0])[0][0], expected)


def test_a_crop_has_the_decoded_pixels(clips_dir: Path) -> None:
    crop = View(kind="crop", size=64, center=(1.0, 0.5))
    frames = read(clips_dir / "h264.mp4", Sampling(frames=3), WHOLE, crop)
    assert frames.views[0].shape == (3, 128, 192, 3)
    assert np.array_equal(frames.views[1], frames.views[0][:, 32:96, 128:192])


def test_the_face_fills_its_view() -> None:
    """One window for all frames, with the face in its middle (the script that made the clip says where it is)."""
    views = WHOLE, View(kind="face", size=144)
    frames = read(SAMPLES / "astronaut_clean.mp4", Sampling(frames=6), *views)
    whole, face = frames.views
    assert face.shape == (6, 144, 144, 3)
    x, y, side = face_window(find_face(whole[:3]), *whole.shape[1:3])
    assert side < 250
    assert x + side / 2 == pytest.approx(0.50 * 384, abs=0.1 * side)
    assert y + side / 2 == pytest.approx(0.45 * 384, abs=0.1 * side)
    inner = (slice(4, -4),) * 2  # at the edge of a box, resizing includes pixels beyond it
    for number in range(6):
        window = Image.fromarray(whole[number, y : y + side, x : x + side])
        cut = np.asarray(window.resize((144, 144), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(cut - face[number])[inner].max() < 2


def test_a_clip_without_a_face_has_a_face_view(clips_dir: Path) -> None:
    frames = read(clips_dir / "h264.mp4", Sampling(frames=2), WHOLE, View(kind="face", size=56), factor=28)
    assert frames.views[1].shape == (2, 56, 56, 3)


def test_a_whole_view_is_resized_to_the_pixel_budget(clips_dir: Path) -> None:
    frames = read(clips_dir / "h264.mp4", Sampling(frames=4), View(max_pixels=10_000), factor=28)
    assert frames.views[0].shape == (4, 56, 112, 3)
    assert read_numbers(frames) == frames.indices


def test_a_tiny_clip_is_padded(clips_dir: Path) -> None:
    frames = read(clips_dir / "tiny.mp4", Sampling(frames=2), WHOLE, View(kind="crop"), factor=28)
    assert [view.shape for view in frames.views] == [(2, 28, 28, 3)] * 2
    assert (frames.views[1][:, 9:] == frames.views[1][:, 9:10]).all()
