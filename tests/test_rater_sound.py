"""python -m pytest tests/test_rater_sound.py"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from backbones import OMNI

from lmm_qa.config import Sampling, View
from lmm_qa.degrade.causes import encode
from lmm_qa.errors import ModelError, UsageError
from lmm_qa.rater import Rater, clip_input
from lmm_qa.ratings.rows import STEP, WINDOW, Details, Rating
from lmm_qa.video.decode import read_frames, read_windows
from lmm_qa.video.sound import SAMPLE_RATE, Waveform

SMALL = {"sampling": Sampling(frames=4), "views": [View(max_pixels=7056)], "device": "cpu", "dtype": "float32"}
FPS, SECONDS = 8, 4


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same picture with two sounds, with silence, and without sound."""
    folder, draw = tmp_path_factory.mktemp("heard"), np.random.default_rng(0)
    pictures = draw.integers(0, 256, (FPS * SECONDS, 84, 84, 3), dtype=np.uint8)
    sounds = [draw.normal(0, level, (1, SECONDS * SAMPLE_RATE)).clip(-1, 1) for level in (0.05, 0.3, 0.0)]
    sounds[0][:, : 2 * SAMPLE_RATE] *= 0.01
    for number, sound in enumerate([*sounds, None]):
        waveform = None if sound is None else Waveform(sound.astype(np.float32), SAMPLE_RATE)
        encode(pictures, "libx264", {"crf": "10"}, Fraction(FPS), str(folder / f"{number}.mkv"), waveform)
    return sorted(folder.glob("*.mkv"))


@pytest.fixture(scope="module", params=OMNI)
def rater(request: pytest.FixtureRequest, family_dir: Callable[[str], Path]) -> Rater:
    return Rater.from_pretrained(family_dir(request.param), prompt="talking_head_sound", **SMALL)


def test_the_sound_of_a_file_is_heard(rater: Rater, clips: list[Path]) -> None:
    ratings = list(rater.rate_all(clips, workers=1, batch_size=4))
    scores = [rating.score for rating in ratings if isinstance(rating, Rating)]
    assert len(scores) == 4 and len({*np.round(scores, 3)}) == 3, "silence is what a clip without sound has"
    assert scores[2] == pytest.approx(scores[3], abs=1e-5)
    for path, score in zip(clips, scores, strict=True):
        assert rater.rate(path).score == pytest.approx(score, abs=1e-5)
    one = clip_input(read_frames(clips[1], rater.settings.sampling, rater.settings.views, rater.factor))
    assert one.sound is not None and len(one.sound) == SECONDS * SAMPLE_RATE
    (logits,) = rater.backbone.level_logits([one], rater.settings.prompt)
    probabilities = np.exp(logits.logits) / np.exp(logits.logits).sum()
    assert scores[1] == pytest.approx(float(probabilities @ np.arange(1, 6)), abs=1e-4)


def test_a_window_of_a_timeline_has_its_own_sound(rater: Rater, clips: list[Path]) -> None:
    settings = rater.settings
    timeline = rater.rate(clips[0], Details(timeline=True)).timeline
    assert timeline is not None and len(timeline.scores) > 2
    windows = read_windows(clips[0], settings.sampling, settings.views, rater.factor, WINDOW, STEP)
    for number, score in enumerate(timeline.scores):
        start, end = windows.spans[number]
        one = clip_input(windows[number])
        assert one.sound is not None
        heard = one.sound[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)]
        (logits,) = rater.backbone.level_logits([replace(one, sound=heard, duration=end - start)], settings.prompt)
        probabilities = np.exp(logits.logits) / np.exp(logits.logits).sum()
        assert score == pytest.approx(float(probabilities @ np.arange(1, 6)), abs=1e-4)


def test_frames_in_memory_have_no_sound(rater: Rater) -> None:
    frames = np.zeros((4, 84, 84, 3), np.uint8)
    with pytest.raises(UsageError, match="frames in memory have no sound"):
        rater.rate_frames(frames, FPS)
    with pytest.raises(UsageError, match="frames in memory have no sound"):
        rater.reward(frames, FPS)


@pytest.mark.parametrize("family", OMNI)
def test_an_omni_model_rates_without_sound_by_default(
    family: str, family_dir: Callable[[str], Path], clips: list[Path]
) -> None:
    rater = Rater.from_pretrained(family_dir(family), **SMALL)
    assert len({rating.score for rating in rater.rate_all(clips, workers=1) if isinstance(rating, Rating)}) == 1


def test_a_rater_that_cannot_hear_is_refused(family_dir: Callable[[str], Path]) -> None:
    with pytest.raises(ModelError, match=r"use a Qwen2\.5-Omni or Qwen3-Omni model"):
        Rater.from_pretrained(family_dir("qwen2_vl"), prompt="talking_head_sound", **SMALL)
