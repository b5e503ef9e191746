"""python -m pytest tests/test_rater.py

Real clips through the real decoder, processor and model class; the model is small, with random weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones import FAMILIES, add_adapter, conversation_inputs
from clips import ffmpeg, ffmpeg_frames, write_clip
from paths import SAMPLES
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.video_utils import VideoMetadata

from lmm_qa import ClipError, Failure, Rater, Rating, Sampling, View, load_prompt
from lmm_qa.defects.explanation import MAX_NAMED, objection
from lmm_qa.defects.questions import questions
from lmm_qa.defects.vocabulary import DEFECTS
from lmm_qa.errors import ClipNotFound, ClipUnreadable, ConfigError, LevelTokenError, UsageError
from lmm_qa.manifest import Clip, content_id
from lmm_qa.model.calibration import Calibration, ConformalInterval, LinearMapping, ScoreMapping
from lmm_qa.model.inputs import ClipInput
from lmm_qa.model.levels import LEVELS, read_levels
from lmm_qa.model.prompt import Prompt
from lmm_qa.model.rater_config import CALIBRATION_NAME, DEFECTS_NAME, RaterConfig
from lmm_qa.model.rater_plan import plan_rater
from lmm_qa.model.source import EMBEDDED
from lmm_qa.rater import clip_input
from lmm_qa.ratings.rows import STEP, WINDOW, Details
from lmm_qa.video.decode import Frames, read_frames, read_windows
from lmm_qa.video.decoder_pool import DecoderPool
from lmm_qa.video.measurement.classifier import predict
from lmm_qa.video.measurement.evidence import UNKNOWN, evidence_text
from lmm_qa.video.measurement.features import FeatureExtractor

TOLERANCE = 1e-4
SMALL: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
VIEWS = (View(max_pixels=112 * 112), View(kind="crop", size=56))

# PEFT 0.21 reads an attribute that transformers 5.23 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

needs_embedded = pytest.mark.skipif(
    not any(EMBEDDED.glob("*.safetensors")), reason=f"the embedded model is not there yet: {EMBEDDED} holds no weights"
)


@pytest.fixture(scope="module")
def model_dir(family_dir: Callable[[str], Path]) -> Path:
    return family_dir("qwen2_vl")


@pytest.fixture(scope="module")
def adapter_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_adapter(model_dir, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def rater(model_dir: Path) -> Rater:
    """Two views, so that clips of different shape have different numbers of tokens."""
    return Rater.from_pretrained(model_dir, sampling=Sampling(frames=4), views=VIEWS, **SMALL)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Clips of different shape and length."""
    folder = tmp_path_factory.mktemp("good")
    sizes = {"wide": (320, 96), "tall": (80, 240), "square": (128, 128), "small": (30, 40), "large": (400, 300)}
    paths = [write_clip(folder / f"{name}.mp4", frames=25, size=size) for name, size in sizes.items()]
    return [*paths, write_clip(folder / "one.mp4", frames=1), write_clip(folder / "long.mp4", frames=80)]


@pytest.fixture(scope="module")
def alone(rater: Rater, good: list[Path]) -> dict[str, Rating]:
    """Each clip rated by itself, without worker processes."""
    return {str(path): rater.rate(path) for path in good}


def decode(rater: Rater, clip: Path) -> Frames:
    """The frames that a rater sees of a clip."""
    measure = FeatureExtractor if rater.settings.prompt.uses_measurement else None
    return read_frames(clip, rater.settings.sampling, rater.settings.views, rater.factor, measure)


def assert_same_rating(one: Rating | Failure, other: Rating) -> None:
    assert isinstance(one, Rating), one
    assert (one.clip, one.content_id, one.level) == (other.clip, other.content_id, other.level)
    for name in ("score", "std", "level_mass"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), abs=TOLERANCE), name
    assert list(one.probabilities) == list(other.probabilities)
    assert list(one.probabilities.values()) == pytest.approx(list(other.probabilities.values()), abs=TOLERANCE)


# --- one clip --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_rates_a_clip(family: str, family_dir: Callable[[str], Path], good: list[Path]) -> None:
    rater = Rater.from_pretrained(family_dir(family), sampling=Sampling(frames=3), views=VIEWS, **SMALL)
    first, second = rater.rate_all(good[:2], workers=1)
    for path, rating in zip(good, (first, second), strict=False):
        assert_same_rating(rating, rater.rate(path))
        assert isinstance(rating, Rating)
        assert 1 < rating.score < 5
    assert first != second


def test_a_row_describes_how_its_rating_was_made(rater: Rater, good: list[Path], model_dir: Path) -> None:
    rating = rater.rate(good[0])
    assert rating.clip == str(good[0])
    assert rating.content_id == content_id(good[0])
    assert list(rating.probabilities) == ["bad", "poor", "fair", "good", "excellent"]
    assert sum(rating.probabilities.values()) == pytest.approx(1, abs=1e-6)
    assert rating.score == pytest.approx(sum(k * p for k, p in enumerate(rating.probabilities.values(), 1)), abs=1e-5)
    assert rating.level == max(rating.probabilities, key=lambda word: rating.probabilities[word])
    assert 0 < rating.level_mass < 1
    assert rating.frames.views == ()
    assert [view.shape for view in decode(rater, good[0]).views] == [(4, 56, 196, 3), (4, 56, 56, 3)]
    row = json.loads(json.dumps(rating.to_row()))
    assert row["frames"] == {"indices": [3, 9, 15, 21], "seconds": [0.12, 0.36, 0.6, 0.84]}
    assert row["video"] == {"width": 320, "height": 96, "fps": 25, "frames": 25, "duration": 1, "decoder": "pyav"}
    assert (row["model"], row["adapter"], row["error"]) == (str(model_dir), None, None)
    assert row["prompt"] == "Rate the visual quality of this talking-head video. The quality of this video is"
    assert row["rater_id"] == rater.rater_id
    assert row["scale"] == [1, 5]


def test_a_failure_has_the_columns_of_a_rating(rater: Rater, good: list[Path]) -> None:
    (failure,) = rater.rate_all(["gone.mp4"], workers=1)
    assert isinstance(failure, Failure)
    row = json.loads(json.dumps(failure.to_row()))
    assert row.keys() == rater.rate(good[0]).to_row().keys()
    assert row["error"]["class"] == "ClipNotFound"
    assert "gone.mp4" in row["error"]["message"]
    assert {key for key, value in row.items() if value is not None} == {"clip", "error", "model", "rater_id"}


def test_rating_one_clip_raises_its_error(rater: Rater, tmp_path: Path) -> None:
    with pytest.raises(ClipNotFound):
        rater.rate(tmp_path / "gone.mp4")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ClipUnreadable):
        rater.rate(tmp_path / "text.mp4")


def test_the_scale_is_the_declared_one(rater: Rater, model_dir: Path, good: list[Path]) -> None:
    other = Rater.from_pretrained(model_dir, scale=(0, 100), sampling=Sampling(frames=4), views=VIEWS, **SMALL)
    wide, narrow = other.rate(good[0]), rater.rate(good[0])
    assert wide.score == pytest.approx((narrow.score - 1) / 4 * 100, abs=1e-3)
    assert wide.probabilities == narrow.probabilities


def test_the_model_sees_the_filled_in_prompt(rater: Rater, model_dir: Path, good: list[Path]) -> None:
    question = "{seconds:.2f} s, {fps:.0f}/s, {frames:.0f} frames, {width:.0f}x{height:.0f}."
    prompt = Prompt(question=question, stem="It is")
    frames = decode(rater, good[0])
    (text,) = [part["text"] for message in prompt.messages(2, **clip_input(frames).slots)
               for part in message["content"] if part["type"] == "text"]  # fmt: skip
    assert text == "1.00 s, 25/s, 4 frames, 320x96."
    asked = Rater.from_pretrained(model_dir, prompt=prompt, sampling=Sampling(frames=4), views=VIEWS, **SMALL)
    rating = asked.rate(good[0])
    seen = clip_input(frames)
    untrue = ClipInput(seen.views, seen.seconds, seen.duration, dict.fromkeys(seen.slots, 7.0))
    (true_reading, untrue_reading) = asked.backbone.level_logits([seen, untrue], prompt)
    assert list(rating.probabilities.values()) == pytest.approx(softmax(true_reading.logits), abs=1e-5)
    assert np.abs(true_reading.logits - untrue_reading.logits).max() > 1e-3


@pytest.fixture(scope="module")
def told(model_dir: Path) -> Rater:
    """A rater that is told what was measured."""
    prompt = Prompt(question="Measured: {measured}. How good is it?", stem="It is")
    return Rater.from_pretrained(model_dir, prompt=prompt, sampling=Sampling(frames=4), views=VIEWS, **SMALL)


def test_the_model_is_told_what_was_measured(told: Rater, rater: Rater, good: list[Path]) -> None:
    rating = told.rate(good[0])
    frames = decode(told, good[0])
    assert frames.features
    evidence = evidence_text(predict(frames.features).numbers)
    assert rating.measured == rating.to_row()["measured"] == evidence != UNKNOWN
    assert rater.rate(good[0]).to_row()["measured"] is None
    written = told.settings.prompt.model_copy(update={"question": f"Measured: {evidence}. How good is it?"})
    silent = clip_input(replace(frames, features=None))
    (expected,), (unmeasured,) = (
        told.backbone.level_logits([silent], prompt) for prompt in (written, told.settings.prompt)
    )
    assert list(rating.probabilities.values()) == pytest.approx(softmax(expected.logits), abs=TOLERANCE)
    assert np.abs(expected.logits - unmeasured.logits).max() > 1e-3
    batched = list(told.rate_all(good, details=Details(defects=True), batch_size=len(good)))
    assert_same_rating(batched[0], rating)
    assert told.rater_id != rater.rater_id


def test_the_measured_quality_counts_as_much_as_rater_json_says(told: Rater, good: list[Path]) -> None:
    frames = decode(told, good[0])
    assert frames.features
    quality = predict(frames.features).quality
    weighing = copy(told)
    weighing.settings = told.settings.override(evidence_weight=2.0)
    (logits,) = told.backbone.level_logits([clip_input(frames)], told.settings.prompt)
    expected = softmax(logits.logits - 2.0 * (np.arange(5) - 4 * quality) ** 2)
    for details in (Details(), Details(defects=True)):
        rating = weighing.rate(good[0], details)
        assert list(rating.probabilities.values()) == pytest.approx(expected, abs=TOLERANCE)
    assert rating.level_mass == pytest.approx(told.rate(good[0]).level_mass, abs=TOLERANCE)
    assert weighing.settings.scoring_settings() != told.settings.scoring_settings()
    silent = weighing.settings.override(prompt=load_prompt("talking_head"))
    assert "evidence_weight" not in silent.scoring_settings(), "it has no effect without the measurement"


def test_a_timeline_is_told_what_was_measured_on_the_whole_clip(told: Rater, good: list[Path]) -> None:
    rating = told.rate(good[-1], Details(timeline=True))
    assert rating.timeline is not None
    settings = told.settings
    windows = read_windows(good[-1], settings.sampling, settings.views, told.factor, WINDOW, STEP)
    last = clip_input(windows[len(windows) - 1])
    (read,) = told.backbone.level_logits(
        [replace(last, slots={**last.slots, "measured": str(rating.measured)})], settings.prompt
    )
    reading = read_levels(read.logits, read.log_normalizer, settings.declared_scale())
    assert rating.timeline.scores[-1] == pytest.approx(reading.score, abs=TOLERANCE)


def test_the_identity_of_a_rater_that_is_told_depends_on_the_trees(
    told: Rater, rater: Rater, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = told.settings.scoring_settings(), rater.settings.scoring_settings()
    monkeypatch.setattr("lmm_qa.video.measurement.classifier.VERSION", -1)
    assert told.settings.scoring_settings() != before[0]
    assert rater.settings.scoring_settings() == before[1]


def softmax(logits: Any) -> Any:
    weights = np.exp(logits.astype(float) - logits.max())
    return weights / weights.sum()


def test_a_prompt_that_does_not_fit_the_tokenizer_is_refused(model_dir: Path) -> None:
    prompt = Prompt(question="?", stem="It is", levels=("bad", "splendiferous"))
    tokens = len(AutoTokenizer.from_pretrained(model_dir).encode(" splendiferous"))
    assert tokens > 1
    with pytest.raises(LevelTokenError, match=f"'splendiferous' is {tokens} tokens after the stem 'It is'"):
        Rater.from_pretrained(model_dir, prompt=prompt, **SMALL)


# --- many clips ------------------------------------------------------------------------------------------------------


def test_the_clips_have_different_scores(alone: dict[str, Rating]) -> None:
    """Otherwise the tests below could not fail."""
    scores = sorted(rating.score for rating in alone.values())
    assert len(scores) == 7
    assert min(b - a for a, b in pairwise(scores)) > 5 * TOLERANCE
    assert scores[-1] - scores[0] > 0.1


@pytest.mark.parametrize(
    ("batch_size", "workers", "order"),
    [(1, 1, slice(None)), (2, 2, slice(None, None, -1)), (8, 2, slice(None)), (8, 1, slice(1, 6, 2))],
)
def test_a_score_does_not_depend_on_the_others(
    rater: Rater, good: list[Path], alone: dict[str, Rating], batch_size: int, workers: int, order: slice
) -> None:
    asked = good[order]
    results = list(rater.rate_all(asked, batch_size=batch_size, workers=workers))
    assert [result.clip for result in results] == [str(path) for path in asked]
    for result in results:
        assert_same_rating(result, alone[result.clip])


def test_clips_with_different_numbers_of_frames_in_one_batch(model_dir: Path, good: list[Path]) -> None:
    rater = Rater.from_pretrained(model_dir, sampling=Sampling.from_text("fps:3"), views=VIEWS[:1], **SMALL)
    with DecoderPool(1) as decoders:
        results = list(rater.rate_all(good, batch_size=8, decoders=decoders))
        again = list(rater.rate_all(good, batch_size=8, decoders=decoders))  # it stays open
    assert {len(result.frames.indices) for result in results if isinstance(result, Rating)} == {1, 3, 10}
    for path, result, second in zip(good, results, again, strict=True):
        assert_same_rating(result, rater.rate(path))
        assert_same_rating(second, result)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_failures_keep_their_position(
    rater: Rater, good: list[Path], alone: dict[str, Rating], tmp_path: Path, batch_size: int
) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "cut.mp4").write_bytes(good[-1].read_bytes()[:-500])
    bad = {str(tmp_path / "gone.mp4"): "ClipNotFound", str(tmp_path / "text.mp4"): "ClipUnreadable"}
    bad[str(tmp_path / "cut.mp4")] = "ClipTruncated"
    gone, text, cut = bad
    asked = [gone, *map(str, good[:3]), text, cut, str(good[3]), gone]
    results = list(rater.rate_all(asked, batch_size=batch_size, workers=2))
    assert [result.clip for result in results] == asked
    for result in results:
        if result.clip in bad:
            assert isinstance(result, Failure)
            assert isinstance(result.error, ClipError)
            assert type(result.error).__name__ == bad[result.clip]
            assert (result.content_id is None) == (result.clip == gone)
        else:
            assert_same_rating(result, alone[result.clip])


def test_failures_do_not_wait_for_a_batch(rater: Rater, good: list[Path]) -> None:
    taken: list[str] = []

    def clips() -> Iterator[str]:
        for name in [f"gone_{number}.mp4" for number in range(20)]:
            taken.append(name)
            yield name

    results = rater.rate_all(clips(), batch_size=8, workers=1)
    assert next(results).clip == "gone_0.mp4"
    assert len(taken) <= 3
    assert [result.clip for result in results] == [f"gone_{number}.mp4" for number in range(1, 20)]


def test_clips_of_a_list_keep_their_names(rater: Rater, good: list[Path]) -> None:
    (result,) = rater.rate_all([Clip(good[0], "called/so.mp4", "list.csv:2")], workers=1)
    assert result.clip == "called/so.mp4"


def test_no_clips_give_no_results(rater: Rater) -> None:
    assert list(rater.rate_all([])) == []


def test_batches_hold_at_least_one_clip(rater: Rater, good: list[Path]) -> None:
    with pytest.raises(UsageError, match="batch_size must be positive, received 0"):
        next(rater.rate_all(good, batch_size=0))


# --- adapters --------------------------------------------------------------------------------------------------------


def test_an_adapter_without_rater_json(adapter_dir: Path, model_dir: Path, good: list[Path]) -> None:
    plain, tuned = Rater.from_pretrained(model_dir, **SMALL), Rater.from_pretrained(adapter_dir, **SMALL)
    assert tuned.settings == RaterConfig() == plain.settings
    assert tuned.source.note is not None
    assert "has no rater.json: default prompt, scale [1, 5], 8 uniform frames" in tuned.source.note
    rating = tuned.rate(good[0])
    assert rating.adapter == str(adapter_dir)
    assert len(rating.frames.indices) == 8
    assert abs(rating.score - plain.rate(good[0]).score) > 0.01


def test_an_adapter_with_rater_json(adapter_dir: Path, good: list[Path], tmp_path: Path) -> None:
    shutil.copytree(adapter_dir, tmp_path / "rater")
    says = {"scale": [0, 5], "sampling": {"frames": 2}, "prompt": load_prompt("qalign").model_dump()}
    (tmp_path / "rater" / "rater.json").write_text(json.dumps(says))
    rater = Rater.from_pretrained(tmp_path / "rater", **SMALL)
    assert rater.source.note is None
    rating = rater.rate(good[0])
    assert (rating.scale, len(rating.frames.indices)) == ((0, 5), 2)
    assert rating.prompt.endswith("The quality of the video is")
    given = Rater.from_pretrained(tmp_path / "rater", scale=(1, 5), sampling=Sampling(frames=3), **SMALL).rate(good[0])
    assert (given.scale, len(given.frames.indices)) == ((1, 5), 3)


def assert_peft_alone_agrees(adapter: Path, base: str, rater: Rater, clip: Path) -> None:
    rating, frames = rater.rate(clip), decode(rater, clip)
    model: Any = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    from peft import PeftModel

    model = PeftModel.from_pretrained(model, adapter).eval()
    processor = AutoProcessor.from_pretrained(base)
    info = frames.info
    metadata = VideoMetadata(info.frames, info.fps, duration=info.duration, frames_indices=[*frames.indices])
    prompt = rater.settings.prompt
    inputs = conversation_inputs(processor, prompt, clip_input(frames).slots, frames.views, metadata)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    words = [processor.tokenizer.encode(f" {word}", add_special_tokens=False) for word in prompt.levels]
    levels = logits[[word for (word,) in words]].numpy()
    (reading,) = rater.backbone.level_logits([clip_input(frames)], prompt)
    assert reading.logits == pytest.approx(levels, abs=TOLERANCE)
    if rater.settings.evidence_weight:
        assert frames.features
        steps = np.arange(5) - 4 * predict(frames.features).quality
        levels = levels - rater.settings.evidence_weight * steps**2
    assert list(rating.probabilities.values()) == pytest.approx(softmax(levels), abs=TOLERANCE)


def test_peft_alone_gives_the_same_logits(adapter_dir: Path, model_dir: Path, good: list[Path]) -> None:
    rater = Rater.from_pretrained(adapter_dir, sampling=Sampling(frames=4), views=VIEWS, **SMALL)
    assert_peft_alone_agrees(adapter_dir, str(model_dir), rater, good[0])


# --- calibration ---------------------------------------------------------------------------------------------------


MAPPING = LinearMapping(slope=0.5, intercept=2.4)


def calibrated_copy(rater: Rater, folder: Path, **changes: Any) -> Path:
    """The model of a rater as a rater directory with its settings, calibrated."""
    shutil.copytree(rater.source.backbone, folder)
    (folder / "rater.json").write_text(rater.settings.model_dump_json())
    write_calibration(folder, **{"rater_id": rater.rater_id} | changes)
    return folder


def write_calibration(folder: Path, mapping: ScoreMapping = MAPPING, **changes: Any) -> Calibration:
    values: dict[str, Any] = {"scale": (1, 5), "rater_id": None, "n": 9, "groups": 9, "fingerprint": "f", "clips": ()}
    interval = ConformalInterval(coverage=0.9, half_width=0.8, std_floor=0.1)
    calibration = Calibration(mapping=mapping, interval=interval, check=None, **values | changes)
    calibration.write(folder)
    return calibration


def fitted_on(*clips: Path) -> tuple[str, ...]:
    """What `Calibration.clips` holds for these clips."""
    return tuple(sorted(hashlib.sha256(content_id(clip).encode()).hexdigest()[:12] for clip in clips))


def test_a_calibration_is_applied(rater: Rater, alone: dict[str, Rating], good: list[Path], tmp_path: Path) -> None:
    folder = calibrated_copy(rater, tmp_path / "rater", clips=fitted_on(good[1]))
    tuned = Rater.from_pretrained(folder, **SMALL)
    assert tuned.calibration == Calibration.read(folder / CALIBRATION_NAME)
    results = list(tuned.rate_all([*good[:3], "gone.mp4"], batch_size=2, workers=1))
    for path, result in zip(good[:3], results, strict=False):
        plain = alone[str(path)]
        assert_same_rating(replace(plain, score=0.5 * plain.score + 2.4), tuned.rate(path))
        assert isinstance(result, Rating)
        assert_same_rating(result, tuned.rate(path))
        assert (plain.raw_score, plain.interval, plain.calibration) == (None, None, None)
        assert result.raw_score == pytest.approx(plain.score, abs=TOLERANCE)
        assert result.interval == pytest.approx(
            (max(1, result.score - 0.8 * plain.std), min(5, result.score + 0.8 * plain.std)), abs=TOLERANCE
        )
        row = json.loads(json.dumps(result.to_row()))
        assert (row["raw_score"], row["interval"]) == (result.raw_score, list(result.interval or ()))
        assert row["calibration"] == {
            "id": tuned.calibration.identity,
            "fitted": path == good[1],
            "raw_rater_id": rater.rater_id,
        }
        assert row["rater_id"] == tuned.rater_id
    failed = results[-1].to_row()
    assert failed.keys() == row.keys()
    assert (failed["raw_score"], failed["interval"], failed["calibration"]) == (None, None, None)
    assert failed["rater_id"] == tuned.rater_id


def test_a_calibration_changes_the_identity(rater: Rater, tmp_path: Path) -> None:
    folder = calibrated_copy(rater, tmp_path / "rater")
    first = plan_rater(folder, **SMALL)
    write_calibration(folder, LinearMapping(slope=0.5, intercept=2.5), rater_id=rater.rater_id)
    second = plan_rater(folder, **SMALL)
    (folder / CALIBRATION_NAME).unlink()
    without = plan_rater(folder, **SMALL)
    assert len({first.rater_id, second.rater_id, rater.rater_id}) == 3
    assert first.raw_rater_id == second.raw_rater_id == without.rater_id == without.raw_rater_id == rater.rater_id


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prompt": "qalign"}, "prompt"),
        ({"scale": (0, 5)}, "scale"),
        ({"sampling": Sampling(frames=5)}, "sampling"),
        ({"views": VIEWS[:1], "scale": (1, 4)}, "scale, views"),
    ],
)
def test_a_calibration_is_not_applied_to_changed_settings(
    rater: Rater, tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    folder = calibrated_copy(rater, tmp_path / "rater")
    plan = plan_rater(folder, **SMALL, **options)
    assert plan.calibration is None
    (note,) = plan.notes
    assert note == (
        f"{folder / CALIBRATION_NAME} is for the rater's own {named}, which this run changes: scores are not calibrated"
    )
    (folder / CALIBRATION_NAME).unlink()
    assert plan_rater(folder, **SMALL, **options).rater_id == plan.rater_id == plan.raw_rater_id


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16"},
        {"quantization": "4bit"},
        {"dtype": "float16", "quantization": "8bit"},
        {"scale": (1, 5), "sampling": Sampling.from_text("uniform:4"), "views": VIEWS, "prompt": "talking_head"},
    ],
)
def test_dtype_quantization_and_unchanged_settings_keep_the_calibration(
    rater: Rater, tmp_path: Path, options: dict[str, Any]
) -> None:
    folder = calibrated_copy(rater, tmp_path / "rater")
    plan = plan_rater(folder, **SMALL | options)
    assert plan.calibration == Calibration.read(folder / CALIBRATION_NAME)
    assert plan.notes == ()


@pytest.mark.parametrize("changed", ["weights", "settings"])
def test_a_calibration_is_not_applied_to_a_changed_rater(rater: Rater, tmp_path: Path, changed: str) -> None:
    folder = calibrated_copy(rater, tmp_path / "rater")
    if changed == "weights":
        weights = bytearray((folder / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (folder / "model.safetensors").write_bytes(weights)
    else:
        (folder / "rater.json").write_text(rater.settings.override(sampling=Sampling(frames=6)).model_dump_json())
    plan = plan_rater(folder, **SMALL)
    assert plan.calibration is None
    (note,) = plan.notes
    assert note.endswith("was fitted to other weights or settings: scores are not calibrated; calibrate again")
    write_calibration(folder, rater_id=None)  # fitted to a table that does not say what made its scores
    assert plan_rater(folder, **SMALL).calibration is not None


@pytest.mark.parametrize("scale", [(0.0, 5.0), None])
def test_a_calibration_for_another_scale_is_refused(
    rater: Rater, tmp_path: Path, scale: tuple[float, float] | None
) -> None:
    folder = calibrated_copy(rater, tmp_path / "rater", scale=scale)
    with pytest.raises(ConfigError) as caught:
        Rater.from_pretrained(folder, **SMALL)
    assert str(caught.value) == (
        f"{folder / CALIBRATION_NAME} has the scale {scale}, the rater (1.0, 5.0): set the scale of the MOS in "
        "rater.json, then rate and calibrate again; or remove the calibration to get raw scores"
    )


@pytest.mark.parametrize("content", ["{", "[]", '{"mapping": {"kind": "cubic"}}', '{"scale": [1, 5]}'])
def test_an_invalid_calibration_is_an_error(rater: Rater, tmp_path: Path, content: str) -> None:
    folder = calibrated_copy(rater, tmp_path / "rater")
    (folder / CALIBRATION_NAME).write_text(content)
    with pytest.raises(ConfigError) as caught:
        plan_rater(folder, **SMALL)
    assert str(caught.value).startswith(str(folder / CALIBRATION_NAME))
    assert str(caught.value).endswith("run lmm-qa calibrate again, or remove the file to get raw scores")


# --- the embedded model ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded() -> Rater:
    return Rater.from_pretrained(device="cpu", dtype="float32")


@needs_embedded
def test_the_two_lines_of_the_readme() -> None:
    from lmm_qa import Rater

    rater = Rater.from_pretrained()
    score = rater.rate(SAMPLES / "astronaut_clean.mp4").score
    assert isinstance(score, float)
    assert rater.settings.scale[0] < score < rater.settings.scale[1]


@needs_embedded
def test_the_embedded_model_is_a_complete_rater(embedded: Rater) -> None:
    assert embedded.source.name == "embedded"
    assert str(embedded.source.note).startswith("the embedded rater scores damage to the signal")
    rating = embedded.rate(SAMPLES / "astronaut_clean.mp4")
    assert rating.model == "embedded"
    assert all(map(math.isfinite, rating.probabilities.values()))


@needs_embedded
def test_the_embedded_model_does_not_depend_on_the_batch(embedded: Rater, good: list[Path]) -> None:
    asked = [SAMPLES / "astronaut_clean.mp4", good[0], SAMPLES / "astronaut_noise_strong.mp4"]
    for path, result in zip(asked, embedded.rate_all(asked, batch_size=8, workers=1), strict=True):
        assert_same_rating(result, embedded.rate(path))


@needs_embedded
def test_peft_alone_agrees_on_the_embedded_model(embedded: Rater) -> None:
    assert_peft_alone_agrees(EMBEDDED, embedded.source.backbone, embedded, SAMPLES / "astronaut_clean.mp4")


@needs_embedded
def test_strong_degradations_lower_the_score_of_the_samples(embedded: Rater) -> None:
    results = [*embedded.rate_all(sorted(SAMPLES.glob("*.mp4")))]
    scores = {Path(result.clip).stem: result.score for result in results if isinstance(result, Rating)}
    strong = [name for name in scores if name.endswith("_strong")]
    lower = [name for name in strong if scores[name] < scores[f"{name.split('_')[0]}_clean"]]
    assert len(strong) >= 5
    assert len(lower) > len(strong) / 2, scores


# --- more than the score ---------------------------------------------------------------------------------------------

EVERYTHING = Details(defects=True, explanation=True, timeline=True)


def test_details_do_not_change_the_score(rater: Rater, good: list[Path], alone: dict[str, Rating]) -> None:
    for path, result in zip(good, rater.rate_all(good, details=EVERYTHING, batch_size=3), strict=True):
        assert_same_rating(result, alone[str(path)])
        assert isinstance(result, Rating)
        assert result.profile is not None
        assert result.timeline is not None
        assert result.explanation is not None
        assert result.explanation.startswith(f"{rater.settings.prompt.stem} {result.level}")
        told = result.profile.found[:MAX_NAMED]
        said = objection(result.explanation, result.level, LEVELS, told)
        assert said is None, "whatever a model with random weights says"
        row = json.loads(json.dumps(result.to_row()))
        assert row["defects"]["lip_sync"] is None
        assert set(row["defects"]) == {defect.name for defect in DEFECTS}
        assert row["timeline"]["scores"]


def test_answers_equal_those_to_single_questions(rater: Rater, good: list[Path]) -> None:
    rating = rater.rate(good[0], Details(defects=True))
    assert rating.profile is not None
    assert rating.explanation is None
    clip = clip_input(decode(rater, good[0]))
    for name, question in questions().items():
        (alone,) = rater.backbone.level_logits([clip], question)
        assert rating.profile.log_odds[name] == pytest.approx(float(alone.logits[1] - alone.logits[0]), abs=1e-3), name


def test_a_timeline_rates_each_window_as_a_clip(rater: Rater, good: list[Path]) -> None:
    long = good[-1]
    timeline = rater.rate(long, Details(timeline=True)).timeline
    assert timeline is not None
    assert len(timeline.scores) == len(timeline.seconds) > 1
    windows = read_windows(long, rater.settings.sampling, rater.settings.views, rater.factor, WINDOW, STEP)
    (last,) = rater.backbone.level_logits([clip_input(windows[len(windows) - 1])], rater.settings.prompt)
    reading = read_levels(last.logits, last.log_normalizer, rater.settings.declared_scale())
    assert timeline.scores[-1] == pytest.approx(reading.score, abs=TOLERANCE)
    short = rater.rate(good[0], Details(timeline=True))
    assert short.timeline is not None
    (score,) = short.timeline.scores
    assert score == pytest.approx(short.score, abs=TOLERANCE), "a short clip is one window"


def test_the_base_model_can_answer_while_the_adapter_rates(
    adapter_dir: Path, good: list[Path], model_dir: Path
) -> None:
    adapted = Rater.from_pretrained(adapter_dir, sampling=Sampling(frames=4), views=VIEWS, **SMALL)
    base = Rater.from_pretrained(model_dir, sampling=Sampling(frames=4), views=VIEWS, **SMALL)
    own, others = (adapted.rate(good[0], Details(defects=True, answers_from=who)) for who in ("adapter", "base"))
    plain = base.rate(good[0], Details(defects=True))
    assert own.score == pytest.approx(others.score, abs=TOLERANCE)
    assert own.score != pytest.approx(plain.score, abs=TOLERANCE)
    assert own.profile and others.profile and plain.profile
    assert others.profile.log_odds == pytest.approx(plain.profile.log_odds, abs=1e-3)
    assert own.profile.log_odds != pytest.approx(plain.profile.log_odds, abs=1e-3)


def test_only_defects_in_the_calibration_are_judged(adapter_dir: Path, good: list[Path], tmp_path: Path) -> None:
    folder = shutil.copytree(adapter_dir, tmp_path / "rater")
    (folder / DEFECTS_NAME).write_text(json.dumps({"defects": {"blur": {"intercept": 40.0}, "noise": {}}}))
    rater = Rater.from_pretrained(folder, sampling=Sampling(frames=4), views=VIEWS, **SMALL)
    profile = rater.rate(good[0], Details(defects=True)).profile
    assert profile is not None
    assert [name for name, probability in profile.defects.items() if probability is not None] == ["blur", "noise"]
    assert profile.found[0].defect == "blur"
    assert profile.defects["blur"] == pytest.approx(1)
    (folder / DEFECTS_NAME).write_text("[]")
    with pytest.raises(ConfigError, match="fit it again"):
        Rater.from_pretrained(folder, **SMALL)


# --- frames in memory ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lossless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seconds with a stall, in RGB without loss."""
    folder = tmp_path_factory.mktemp("lossless")
    path = write_clip(folder / "moving.mkv", frames=75, size=(160, 128), codec="ffv1", pixel_format="bgr0")
    stalled = folder / "stalled.mkv"
    stall = "select='not(between(n,30,54))',loop=25:1:29"  # frame 29 stands for a second
    ffmpeg("-i", path, "-vf", f"{stall},setpts=N/25/TB", "-c:v", "ffv1", "-pix_fmt", "bgr0", stalled)
    return stalled


@pytest.mark.parametrize("details", [Details(), Details(defects=True, timeline=True)], ids=["score", "all"])
def test_frames_in_memory_are_rated_as_a_lossless_file(rater: Rater, lossless: Path, details: Details) -> None:
    expected = rater.rate(lossless, details).to_row()
    frames = ffmpeg_frames(lossless, 160, 128).copy()
    for given in (frames, torch.from_numpy(frames).permute(0, 3, 1, 2) / 255):
        rating = rater.rate_frames(given, 25, details)
        assert isinstance(rating, Rating)
        row = rating.to_row()
        assert row["score"] == pytest.approx(expected["score"], abs=1e-6)
        assert row["frames"] == expected["frames"]
        if details.defects:
            assert row["defects"] == pytest.approx(expected["defects"], abs=1e-6)
        assert row["timeline"] == expected["timeline"]
        assert row["found"] == expected["found"]
        assert row["content_id"].startswith("frames:")
        assert row["video"] == {**expected["video"], "decoder": "memory"}


def test_a_batch_gives_the_ratings_of_its_clips(rater: Rater, lossless: Path) -> None:
    frames = ffmpeg_frames(lossless, 160, 128)
    clips = [frames[:25], frames[25:40, :64], frames[40:42]]
    ratings = rater.rate_frames(clips, 25)
    assert isinstance(ratings, list)
    alone = [rater.rate_frames(clip, 25) for clip in clips]
    assert [rating.clip for rating in ratings] == ["frames[0]", "frames[1]", "frames[2]"]
    for one, other in zip(ratings, alone, strict=True):
        assert isinstance(other, Rating)
        assert one.score == pytest.approx(other.score, abs=TOLERANCE)
        assert one.content_id == other.content_id
    assert len({rating.content_id for rating in ratings}) == 3
    (single,) = rater.rate_frames(frames[None, :25], 25)  # type: ignore[misc]  # a list
    assert single.score == pytest.approx(ratings[0].score, abs=TOLERANCE)


def test_the_reward_is_a_tensor_without_gradient(rater: Rater) -> None:
    videos = torch.rand(3, 5, 3, 40, 48, generator=torch.Generator().manual_seed(0)).requires_grad_()
    reward = rater.reward(videos, fps=16)
    assert (reward.shape, reward.dtype, reward.device) == ((3,), torch.float32, videos.device)
    assert not reward.requires_grad
    ratings = rater.rate_frames(videos, 16)
    assert isinstance(ratings, list)
    assert reward.tolist() == pytest.approx([rating.score for rating in ratings], abs=TOLERANCE)
    assert rater.reward(videos[0], fps=16).shape == (1,)
    assert rater.reward([videos[0], videos[1]], fps=16).device == videos.device


def test_threads_rate_frames_at_the_same_time(rater: Rater) -> None:
    rng = np.random.default_rng(0)
    clips = [rng.integers(0, 255, (6, 56, 56 + 28 * number, 3), np.uint8) for number in range(8)]
    expected = [float(rater.reward(clip, 25)) for clip in clips]
    before = torch.get_num_threads()
    with ThreadPoolExecutor(4) as threads:
        alone = list(threads.map(lambda clip: float(rater.reward(clip, 25)), clips * 3))
        batches = list(threads.map(lambda start: rater.reward(clips[start : start + 4], 25).tolist(), [0, 4] * 3))
    assert alone == pytest.approx(expected * 3, abs=TOLERANCE)
    assert [score for batch in batches for score in batch] == pytest.approx(expected * 3, abs=TOLERANCE)
    assert torch.get_num_threads() == before


def test_frames_that_cannot_be_rated(rater: Rater) -> None:
    with pytest.raises(
        UsageError, match=r"at least 2 frames, with pixels; received shape \(1, 40, 48, 3\), dtype uint8"
    ):
        rater.rate_frames(np.zeros((1, 40, 48, 3), np.uint8), 25)
