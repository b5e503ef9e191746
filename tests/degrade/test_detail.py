"""python -m pytest tests/degrade/test_detail.py"""

from __future__ import annotations

from statistics import NormalDist

import av
import numpy as np
import pytest
from paths import SAMPLES
from scipy.ndimage import gaussian_filter

from lmm_qa.degrade.causes import Pixels, degrade
from lmm_qa.degrade.detail import STEP_SHARPNESS, edge_sharpness


@pytest.fixture(scope="module")
def portrait() -> Pixels:
    """Eight frames of a real talking face, 384 x 384."""
    with av.open(str(SAMPLES / "astronaut_clean.mp4")) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)][20:28])


def squares(contrast: float = 160, sigma: float = 0.0, side: int = 256) -> Pixels:
    """Two frames of a checkerboard with squares of 32 pixels, blurred by a Gaussian."""
    rows, columns = np.mgrid[:side, :side] // 32
    picture = np.where((rows + columns) % 2, 40.0 + contrast, 40.0)
    blurred = gaussian_filter(picture, sigma) if sigma else picture
    return np.repeat(np.rint(blurred).astype(np.uint8)[None, ..., None], 3, axis=3).repeat(2, axis=0)


def test_a_step_has_the_sharpness_of_a_step() -> None:
    assert edge_sharpness(squares()) == STEP_SHARPNESS == 0.5


@pytest.mark.parametrize("sigma", [0.9, 1.2])
def test_a_blurred_edge_has_the_slope_of_the_gaussian(sigma: float) -> None:
    expected = (NormalDist(0, sigma).cdf(1.5) - NormalDist(0, sigma).cdf(-0.5)) / 2
    assert edge_sharpness(squares(sigma=sigma)) == pytest.approx(expected, abs=0.02)


def test_contrast_flat_areas_and_bars_around_the_picture_do_not_matter() -> None:
    soft = squares(sigma=1.6)
    measured = edge_sharpness(soft)
    assert measured < 0.3
    assert edge_sharpness(squares(contrast=60, sigma=1.6)) == pytest.approx(measured, abs=0.01)
    flat = soft.copy()
    flat[:, :, 112:] = soft[:, :, 112:113]
    assert edge_sharpness(flat) == pytest.approx(measured, abs=0.01)
    boxed = np.pad(soft, ((0, 0), (30, 30), (30, 30), (0, 0)))
    assert edge_sharpness(boxed) == pytest.approx(measured, abs=0.01)


def test_a_picture_without_edges_is_not_judged() -> None:
    assert edge_sharpness(np.full((3, 64, 64, 3), 90, np.uint8)) == STEP_SHARPNESS


def test_large_pictures_are_measured_at_a_common_size() -> None:
    assert edge_sharpness(squares(sigma=1.6, side=1440)) > edge_sharpness(squares(sigma=1.6, side=720)) + 0.1


def test_blur_and_rescaling_soften_a_portrait_and_noise_does_not_sharpen_it(portrait: Pixels) -> None:
    sharp = edge_sharpness(portrait)
    assert sharp > 0.38
    for cause in ("blur", "rescale"):
        mild, strong = (edge_sharpness(degrade(portrait, cause, strength).frames) for strength in (0.4, 0.8))
        assert strong < mild < sharp
    soft = np.stack([gaussian_filter(frame, (1.6, 1.6, 0)) for frame in portrait])
    noise = np.random.default_rng(0).normal(0, 5, soft.shape)
    noisy = np.clip(soft + noise, 0, 255).astype(np.uint8)
    assert edge_sharpness(soft) <= edge_sharpness(noisy) < edge_sharpness(soft) + 0.06
    darker = (portrait * 0.4).astype(np.uint8)
    assert edge_sharpness(darker) == pytest.approx(sharp, abs=0.03)
