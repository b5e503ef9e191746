"""Runs on Omni models, with the sound in the prompt. Run: python -m pytest tests/training/test_run_sound.py"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from backbones import OMNI, add_adapter, add_talker
from model_inputs import assert_equal_logits, random_clip
from safetensors.torch import load_file
from scipy.stats import spearmanr
from training_runs import MakeConfig

from lmm_qa.degrade.causes import encode
from lmm_qa.model import compat
from lmm_qa.model.backbone import Backbone
from lmm_qa.model.inputs import ClipInput, prepare_inputs, question_tokens, vision_features
from lmm_qa.model.prompt import load_prompt
from lmm_qa.model.rater_config import RaterConfig
from lmm_qa.rater import Rater
from lmm_qa.training.adapters import component, trainable_model
from lmm_qa.training.collate import RatingCollator, Sample
from lmm_qa.training.dry_run import preview
from lmm_qa.training.export import merge
from lmm_qa.training.run import train
from lmm_qa.training.trainer import next_token_logits
from lmm_qa.video.sound import SAMPLE_RATE, Waveform

SOUND = load_prompt("talking_head_sound")


def write_heard_clip(path: Path, loudness: float, seed: int) -> None:
    """Two seconds of one grey picture, with noise of this loudness."""
    samples = np.random.default_rng(seed).normal(0, 0.3 * loudness, 2 * SAMPLE_RATE).clip(-1, 1)
    sound = Waveform(samples.astype(np.float32)[None], SAMPLE_RATE)
    encode(np.full((16, 84, 84, 3), 128, np.uint8), "libx264", {"crf": "10"}, Fraction(8), str(path), sound)


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of clips that only sound different, and labels.csv: the louder, the lower the MOS."""
    folder = tmp_path_factory.mktemp("heard")
    draw = np.random.default_rng(0)
    rows = ["clip,mos,group"]
    for person in range(12):
        for clip in range(3):
            loudness = draw.uniform(0.01, 1)
            write_heard_clip(folder / f"p{person}_{clip}.mkv", loudness, 3 * person + clip)
            rows.append(f"p{person}_{clip}.mkv,{4.6 - 3.2 * loudness:.3f},p{person}")
    (folder / "labels.csv").write_text("\n".join(rows))
    return folder


@pytest.mark.parametrize("family", OMNI)
def test_a_run_learns_from_the_sound(
    family: str, make_config: MakeConfig, heard: Path, family_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    """From a whole model, as it is published; the run directory rates, and so does the merged model."""
    whole = add_talker(family_dir(family), tmp_path / "whole")
    config = make_config(model__backbone=str(whole), data__root=str(heard), augmentation__temporal_offsets=1)
    config = config.model_copy(update={"rating": config.rating.model_copy(update={"prompt": SOUND})})
    changes = {"epochs": 4, "batch_size": 8, "learning_rate": 5e-3, "eval_steps": 100}
    config = config.model_copy(update={"training": config.training.model_copy(update=changes)})
    lines: list[str] = []
    outcome = train(config, lines.append)
    run = tmp_path / "run"
    assert lines[-1] == f"done: lmm-qa rate CLIPS --model {run}"
    assert RaterConfig.read(run / "rater.json").prompt.sound
    trained = {name for name in load_file(run / "adapter_model.safetensors") if "language_model" not in name}
    assert not trained, "towers are frozen"
    rater = Rater.from_pretrained(run, device="cpu")
    clips = sorted(heard.glob("*.mkv"))
    ratings = list(rater.rate_all(clips, workers=1))
    mos = dict(line.split(",")[:2] for line in (heard / "labels.csv").read_text().splitlines()[1:])
    scores = [rating.raw_score or rating.score for rating in ratings]
    assert spearmanr(scores, [float(mos[clip.name]) for clip in clips]).statistic > 0.8
    assert outcome.metrics["srcc"][0] > 0.8
    merge(run, tmp_path / "merged")
    merged, before = load_file(tmp_path / "merged" / "model.safetensors"), load_file(whole / "model.safetensors")
    assert merged.keys() == before.keys()
    changed = {name for name, value in merged.items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("thinker.model.") for name in changed)
    again = list(Rater.from_pretrained(tmp_path / "merged", device="cpu").rate_all(clips[:3], workers=1))
    assert [rating.score for rating in again] == pytest.approx([rating.score for rating in ratings[:3]], abs=1e-4)


def heard_clip(backbone: Backbone, seed: int) -> ClipInput:
    one = random_clip(backbone, (2, 3), (3, 2), frames=4, seed=seed, step=10 + 20 * seed)
    samples = np.random.default_rng(seed).normal(0, 0.2, round(one.duration * SAMPLE_RATE)).astype(np.float32)
    return replace(one, sound=samples)


@pytest.fixture(params=OMNI)
def hearing(request: pytest.FixtureRequest, family_dir: Callable[[str], Path]) -> Backbone:
    return Backbone.load(str(family_dir(request.param)), device="cpu", dtype="float32")


@torch.no_grad()
def test_batches_with_sound_equal_rating(hearing: Backbone) -> None:
    """Collated clips, with the pixels or with the vision features in their place."""
    clips = [heard_clip(hearing, seed) for seed in (0, 1)]
    expected = [hearing.level_logits([one], SOUND)[0] for one in clips]
    tokens = list(hearing.level_tokens(SOUND, 2))
    for cached in (False, True):
        samples = []
        for one in clips:
            inputs = dict(prepare_inputs(hearing.processor, [one], SOUND))
            features = vision_features(hearing.model, inputs) if cached else {}
            if cached:
                del inputs["pixel_values_videos"]
            length = inputs["input_ids"].shape[1] - len(question_tokens(hearing.processor, SOUND, 2, one.slots))
            samples.append(Sample(name="a", inputs=inputs, prefix_length=length, vision_features=features, mos=3.0,
                                  std=math.nan, content=-1, auxiliary=[]))  # fmt: skip
        batch = RatingCollator(hearing.processor)(samples)
        assert isinstance(batch["inputs"]["video_second_per_grid"], list), "FSDP2 and DeepSpeed would round them"
        logits, _ = next_token_logits(hearing.model, batch)
        for row, reading in zip(logits, expected, strict=True):
            assert row[tokens].tolist() == pytest.approx(reading.logits, abs=1e-4)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_audio_tower_is_frozen(hearing: Backbone, method: str, make_config: MakeConfig) -> None:
    config = make_config(tuning__method=method, tuning__vision=True, tuning__merger=True)
    model = trainable_model(hearing.model, config).train()
    one = prepare_inputs(hearing.processor, [heard_clip(hearing, 0)], SOUND)
    inputs = compat.with_positions(model, dict(one))
    model(**inputs, logits_to_keep=1, use_cache=False).logits.square().mean().backward()
    trained = {component(name) for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {"language", "vision", "merger"} | ({None} if method == "full" else set())


def test_a_dry_run_counts_the_sound(
    make_config: MakeConfig, heard: Path, family_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    whole = add_talker(family_dir("qwen3_omni_moe"), tmp_path / "whole")
    config = make_config(model__backbone=str(whole), data__root=str(heard))
    silent = preview(config)
    config = config.model_copy(update={"rating": config.rating.model_copy(update={"prompt": SOUND})})
    report = preview(config)
    tokens = [int(text.partition("tokens      ")[2].split()[0]) for text in (silent, report)]
    assert 26 + 2 <= tokens[1] - tokens[0] <= 26 + 20, "2 s of sound, its start and end, and another question"
    assert "  audio     0 of " in report and "input_features (4, 16, 200)" in report and "memory      about" in report


def test_the_settings_of_a_run_with_sound_name_it(make_config: MakeConfig) -> None:
    config = make_config(rating__prompt="talking_head_sound")
    assert json.loads(config.rater_config().model_dump_json())["prompt"]["sound"] is True


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT 0.21
def test_logits_of_a_merged_thinker_equal_those_with_its_adapter(
    hearing: Backbone, family_dir: Callable[[str], Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = family_dir(request.node.callspec.params["hearing"])
    adapter = add_adapter(model, tmp_path / "adapter")
    (adapter / "rater.json").write_text(json.dumps({"backbone": str(model)}))
    tuned = Backbone.load(str(model), adapter=adapter, device="cpu", dtype="float32")
    merge(adapter, tmp_path / "merged")
    merged = Backbone.load(str(tmp_path / "merged"), device="cpu", dtype="float32")
    one = heard_clip(hearing, 0)
    (reading,), (other,) = tuned.level_logits([one], SOUND), merged.level_logits([one], SOUND)
    assert abs(reading.logits - hearing.level_logits([one], SOUND)[0].logits).max() > 0.05
    assert_equal_logits(reading, other, 1e-4 * float(abs(reading.logits).max()))
