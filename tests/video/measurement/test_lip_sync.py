"""python -m pytest tests/video/measurement/test_lip_sync.py"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from paths import SAMPLES, SHARED
from torch.nn import functional
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from lmm_qa.config import Sampling, View
from lmm_qa.video.decode import Frames, read_frames
from lmm_qa.video.display import Orientation
from lmm_qa.video.measurement import lip_sync
from lmm_qa.video.measurement.evidence import UNKNOWN, lip_sync_text
from lmm_qa.video.measurement.features import FeatureExtractor
from lmm_qa.video.measurement.lip_sync import LipSync, LipSyncMeter, compare, mel_spectrum
from lmm_qa.video.sound import SAMPLE_RATE


@pytest.fixture(scope="module")
def weights() -> lip_sync.Weights:
    return lip_sync._weights(lip_sync.FILE)[0]


# --- Networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "side"), [("locate", 32), ("mouth", 40)])
def test_networks_for_pictures_are_those_of_torch(weights: lip_sync.Weights, name: str, side: int) -> None:
    pictures = np.random.default_rng(0).normal(size=(3, 1, side, side)).astype(np.float32)
    known = {
        key.removeprefix(f"{name}."): torch.tensor(value) for key, value in weights.items() if key.startswith(name)
    }
    x = torch.tensor(pictures)
    for layer in range(sum(key.endswith("weight") and "convolution" in key for key in known)):
        kernel = known[f"convolution.{layer}.weight"]
        bias = known[f"convolution.{layer}.bias"]
        x = functional.relu(functional.conv2d(x, kernel, bias, stride=2, padding=kernel.shape[-1] // 2))
    x = functional.relu(functional.linear(x.flatten(1), known["linear.0.weight"], known["linear.0.bias"]))
    expected = functional.linear(x, known["linear.1.weight"], known["linear.1.bias"])
    assert lip_sync._convolutional(weights, name, pictures) == pytest.approx(expected.numpy(), abs=1e-4)


@pytest.mark.parametrize(("name", "stride"), [("mouth", 1), ("voice", 2)])
def test_networks_over_time_are_those_of_torch(weights: lip_sync.Weights, name: str, stride: int) -> None:
    first = weights[f"sync.0.{name}.0.weight"]
    values = np.random.default_rng(0).normal(size=(60, first.shape[1])).astype(np.float32)
    x = torch.tensor(values.T)[None]
    for layer in range(3):
        kernel, bias = (torch.tensor(weights[f"sync.0.{name}.{layer}.{kind}"]) for kind in ("weight", "bias"))
        pad = 2 if kernel.shape[-1] > 1 else 0
        x = functional.conv1d(x, kernel, bias, stride=stride if layer == 0 else 1, padding=pad)
        x = functional.gelu(x) if layer < 2 else x
    found = lip_sync._temporal(weights, f"sync.0.{name}", values, stride)
    assert found == pytest.approx(x[0].numpy().T, abs=1e-4)


def test_mel_spectrum_is_that_of_transformers(weights: lip_sync.Weights) -> None:
    samples = np.random.default_rng(0).normal(0, 0.1, 2 * SAMPLE_RATE).astype(np.float32)
    bank = mel_filter_bank(257, 40, 80, 7600, SAMPLE_RATE, norm="slaney", mel_scale="slaney")
    assert weights["mel"] == pytest.approx(bank, abs=1e-6)
    window = window_function(512, "hann", periodic=False)
    padded = np.pad(samples, (256, 256))
    power = spectrogram(padded, window, 512, 160, power=2.0, center=False, mel_filters=bank, mel_floor=0.0)
    expected = np.log(power + 1e-6).T[: 2 * 100 : 2]
    assert mel_spectrum(samples, weights["mel"], 100) == pytest.approx(expected, abs=1e-3)


# --- Offset and strength ---------------------------------------------------------------------------------------------


def pairs(count: int = 150, late: int = 0, signal: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Similarities of random vectors, alike at one offset; and those with the sound reversed."""
    rng = np.random.default_rng(seed)
    mouth = rng.normal(size=(count, 8))
    voice = rng.normal(size=(count, 8))
    kept = slice(max(0, late), count + min(0, late))
    voice[kept] += signal * mouth[max(0, -late) : count - max(0, late)]
    return mouth @ voice.T, mouth @ voice[::-1].T


@pytest.mark.parametrize("late", [-30, -8, 0, 5, 25])
def test_offset(late: int) -> None:
    found = compare(*pairs(late=late))
    assert found.offset == pytest.approx(late / lip_sync.RATE, abs=0.02)
    assert found.strength > 3


def test_strength_of_unrelated_sound_is_that_of_wrong_pairings() -> None:
    strengths = [compare(*pairs(signal=0, seed=seed)).strength for seed in range(40)]
    assert abs(np.mean(strengths)) < 0.5
    assert np.mean(np.array(strengths) > 3) < 0.1


def test_means_are_those_along_the_diagonals() -> None:
    values = np.random.default_rng(0).normal(size=(90, 90))
    offsets, shifts = np.arange(-38, 39), np.arange(0, 90, 7)
    expected = [[np.diagonal(np.roll(values, shift, axis=1), offset).mean() for shift in shifts] for offset in offsets]
    assert lip_sync._means(values, offsets, shifts) == pytest.approx(np.array(expected))


# --- Pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_windows_are_those_of_the_picture_as_displayed(turns: int) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (90, 120), np.uint8)
    upright = LipSyncMeter()
    turned = LipSyncMeter(Orientation(turns))
    upright.add_frame(Orientation(turns).apply(picture), 0.0)
    turned.add_frame(picture, 0.0)
    box = np.array([[0.3, 0.2, 0.7, 0.6]])
    assert np.array_equal(upright.windows(box, [0]), turned.windows(box, [0]))


def test_every_other_frame_of_60_per_second_is_used_and_memory_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = LipSyncMeter()
    for number in range(12):
        meter.add_frame(np.zeros((20, 30), np.uint8), number / 60)
    box = np.array([[0.3, 0.2, 0.7, 0.6]])
    assert len(meter.windows(box, [0])) == 6
    monkeypatch.setattr(lip_sync, "MAX_BYTES", 5 * 600)
    short = LipSyncMeter()
    for number in range(12):
        short.add_frame(np.zeros((20, 30), np.uint8), number / 25)
    assert len(short.windows(box, [0])) == 5


def test_too_little_to_compare() -> None:
    meter = LipSyncMeter()
    box = np.array([[0.3, 0.2, 0.7, 0.6]])
    assert meter.measure(box, [0], np.zeros(SAMPLE_RATE * 9, np.float32)) is None
    for number in range(100):
        meter.add_frame(np.zeros((20, 30), np.uint8), number / 25)
    assert meter.measure(box, [0], np.zeros(SAMPLE_RATE, np.float32)) is None


def test_a_face_that_does_not_move_is_not_judged() -> None:
    meter = LipSyncMeter()
    for number in range(100):
        meter.add_frame(np.full((200, 300), 90, np.uint8), number / 25)
    noise = np.random.default_rng(0).normal(0, 0.1, 4 * SAMPLE_RATE).astype(np.float32)
    found = meter.measure(np.array([[0.3, 0.2, 0.7, 0.6]]), [0], noise)
    assert found is not None and found.probability is None
    assert len(found.mouth) == len(found.voice) == 99


def test_clips_without_sound_have_no_lip_sync() -> None:
    frames = read_frames(SAMPLES / "avatar_clean.mp4", Sampling(), (View(),), 28, FeatureExtractor)
    assert frames.features is not None and frames.lip_sync is None and frames.measurement_error is None


# --- Real clips ------------------------------------------------------------------------------------------------------


def measured(path: Path) -> Frames:
    return read_frames(path, Sampling(), (View(),), 28, FeatureExtractor)


@pytest.mark.skipif(not (SHARED / "clips").is_dir(), reason="the real clips are not there")
def test_a_real_clip_and_the_same_with_late_sound(tmp_path: Path) -> None:
    from clips import ffmpeg

    # From a repository that the networks were trained on; scripts/lip_sync/train.py measures others.
    clip = SHARED / "clips" / "dreamtalk__acknowledgement_english-M030_front_neutral_level1_001-male_face.mp4"
    original = measured(clip).lip_sync
    late = tmp_path / "late.mp4"
    ffmpeg("-i", clip, "-itsoffset", "0.6", "-i", clip, "-map", "0:v", "-map", "1:a", "-c", "copy", "-t", "14", late)
    shifted = measured(late).lip_sync
    assert original is not None and shifted is not None
    assert original.offset == pytest.approx(0, abs=0.08) and original.strength > 3
    assert shifted.offset == pytest.approx(0.6, abs=0.08) and shifted.strength > 3
    assert original.probability is not None and shifted.probability is not None
    assert original.probability < 0.5 < shifted.probability


@pytest.mark.parametrize("method", ["add_frame", "measure"])
def test_a_failure_costs_lip_sync_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    from clips import ffmpeg

    silent, heard = SAMPLES / "astronaut_clean.mp4", tmp_path / "heard.mp4"
    ffmpeg("-i", silent, "-f", "lavfi", "-i", "anoisesrc=d=9:a=0.1", "-c:v", "copy", "-shortest", heard)
    expected = measured(heard)
    assert expected.lip_sync is not None and expected.measurement_error is None

    def fail(*_: object) -> None:
        raise ZeroDivisionError("lips")

    monkeypatch.setattr(LipSyncMeter, method, fail)
    frames = measured(heard)
    assert frames.features == expected.features and frames.lip_sync is None
    assert str(frames.measurement_error).startswith("ZeroDivisionError: lips (")
    assert "test_lip_sync.py:" in str(frames.measurement_error)


# --- Words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "strength", "text"),
    [
        (0.42, 6.6, "sound 0.4 s late, match 7"),
        (-0.38, 12.0, "sound 0.4 s early, match 9"),
        (0.04, -3.0, "sound in time, match 0"),
        (None, None, UNKNOWN),
    ],
)
def test_words_for_a_prompt(offset: float | None, strength: float | None, text: str) -> None:
    assert lip_sync_text(offset, strength) == text


@pytest.mark.parametrize(("offset", "strength", "clear"), [(0.4, 3.1, 0.4), (0.4, 2.9, None), (0.05, 8.0, None)])
def test_offsets_that_are_stated(offset: float, strength: float, clear: float | None) -> None:
    assert LipSync(offset, strength, 3.0, 0.9, (), ()).clear_offset == clear
