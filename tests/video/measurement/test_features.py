"""python -m pytest tests/video/measurement/test_features.py"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from clips import write_clip
from numpy.typing import NDArray
from paths import SAMPLES
from PIL import Image

from lmm_qa.config import Sampling, View
from lmm_qa.degrade.causes import degrade
from lmm_qa.degrade.dataset import read_clip
from lmm_qa.video.decode import Frames, read_frames
from lmm_qa.video.decoder_pool import DecoderPool
from lmm_qa.video.face import follow_face
from lmm_qa.video.measurement.features import MAX_SHORT_SIDE, FeatureExtractor, limit_size, measure, window
from lmm_qa.video.measurement.motion_features import MotionFeatureRecorder
from lmm_qa.video.sampling import sample_indices
from lmm_qa.video.temporal import FrameDynamicsRecorder

PORTRAIT = SAMPLES / "astronaut_clean.mp4"
FPS = 25.0


@pytest.fixture(scope="module")
def portrait() -> NDArray[np.uint8]:
    return read_clip(PORTRAIT, 3.0)[0]


def features(frames: NDArray[np.uint8]) -> dict[str, float]:
    """Features of a clip in memory."""
    recorder, motion = FrameDynamicsRecorder(), MotionFeatureRecorder()
    for number, frame in enumerate(frames):
        luma = np.asarray(Image.fromarray(frame).convert("L"))
        recorder.add(luma)
        motion.add_frame(luma, number / FPS)
    seconds = np.arange(len(frames)) / FPS
    indices = sample_indices(seconds.tolist(), FeatureExtractor.sampling)
    dynamics = recorder.dynamics(seconds.tolist(), len(frames) / FPS)
    pictures = [frames[index] for index in indices]
    return measure(pictures, follow_face(pictures), indices, dynamics, motion)


@pytest.mark.parametrize(
    ("cause", "feature", "rises"),
    [
        ("blur", "sharpness_x", False),
        ("noise", "change_25", True),
        ("jpeg", "blocks_8_x", True),
        ("banding", "comb", True),
        ("underexposure", "light_99.5", False),
        ("overexposure", "burnt", True),
        ("colour_cast", "neutral", False),
        ("teeth_smear", "teeth_fine_small", False),
        ("mouth_freeze", "mouth_to_face_left_later_first", False),
        ("face_warp", "stiff_later_bends", True),
        ("background_wobble", "behind", True),
        ("identity_drift", "drift_hue_face", True),
        ("flicker", "jumps", True),
        ("stall", "stall", True),
        ("drop", "pace", False),
    ],
)
def test_a_degradation_changes_its_feature(portrait: NDArray[np.uint8], cause: str, feature: str, rises: bool) -> None:
    before = features(portrait)[feature]
    mild, strong = (features(degrade(portrait, cause, strength, 3, fps=FPS).frames)[feature] for strength in (0.4, 0.9))
    assert (strong > before + 0.1) if rises else (strong < before - 0.1), (before, mild, strong)
    assert (strong >= mild - 0.15) if rises else (strong <= mild + 0.15), (before, mild, strong)


def test_every_clip_has_the_same_finite_features(portrait: NDArray[np.uint8]) -> None:
    names = list(features(portrait))
    black = np.zeros((60, 64, 48, 3), np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (30, 97, 331, 3), dtype=np.uint8)
    for frames in (black, noise, portrait[:1], portrait[:, :, :40], black[:1]):
        found = features(frames)
        assert list(found) == names
        assert np.isfinite([*found.values()]).all()


def test_a_large_picture_is_reduced_by_an_integer_factor() -> None:
    picture = np.zeros((2200, 3000, 3), np.uint8)
    assert limit_size(picture).shape == (734, 1000, 3)
    small = picture[:MAX_SHORT_SIDE, :2000]
    assert limit_size(small) is small


@pytest.mark.parametrize(
    "box", [(0.2, 0.2, 0.7, 0.7), (-0.3, -0.4, 0.4, 0.3), (0.6, 0.7, 1.3, 1.4), (1.2, 1.2, 1.5, 1.5)]
)
def test_a_window_has_its_size_wherever_it_is(box: tuple[float, ...]) -> None:
    ramp = np.tile(np.arange(200, dtype=np.uint8)[:, None, None], (1, 200, 3))
    found = window(ramp, np.array(box), (0.0, 1.0), 80)
    assert found.shape == (80, 80, 3)
    wanted = np.clip(np.linspace(box[1] * 200, box[3] * 200, 80), 0, 199)
    assert abs(found[:, 40, 0] - wanted).max() < 4


def test_features_are_measured_while_a_clip_is_decoded_if_requested(tmp_path: Path) -> None:
    looks = (Sampling(frames=4), [View(max_pixels=50_176)], 28)
    alone = read_frames(PORTRAIT, *looks, measure=FeatureExtractor)
    assert alone.features is not None
    assert read_frames(PORTRAIT, *looks).features is None
    frames = read_clip(PORTRAIT, 99.0)[0]
    in_memory = features(frames)
    for name in ("comb", "behind", "stiff_later_bends", "teeth_fine_small"):
        assert alone.features[name] == pytest.approx(in_memory[name], abs=1e-6), "the same twelve pictures"
    tiny = write_clip(tmp_path / "tiny.mp4", size=(16, 20), frames=3)
    with DecoderPool(2) as pool:
        first, second = pool.imap([PORTRAIT, tiny], *looks, measure=FeatureExtractor)
    assert isinstance(first, Frames) and isinstance(second, Frames)
    assert first.features == alone.features, "in any process"
    assert second.features is not None and list(second.features) == list(alone.features)
