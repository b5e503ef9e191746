"""python -m pytest tests/training/test_run.py"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from training_runs import CLIPS, PERSONS, MakeConfig, curve, quiet, with_training

from lmm_qa.errors import ModelError
from lmm_qa.evaluation.labels import Label, Score, join
from lmm_qa.model.backbone import Backbone
from lmm_qa.model.calibration import Calibration
from lmm_qa.model.rater_config import RaterConfig
from lmm_qa.rater import Rater
from lmm_qa.training.adapters import trainable_model
from lmm_qa.training.run import TrainingRun, train


def test_a_run_directory_is_a_complete_rater(tuned: Path, labelled: Path) -> None:
    rater = Rater.from_pretrained(tuned)
    assert rater.settings.sampling.frames == 4 and rater.settings.scale == (1, 5)
    rating = rater.rate(labelled / "p0_0.mp4")
    assert 1 <= rating.score <= 5 and rating.adapter == str(tuned)
    assert rating.calibration is not None and rating.interval is not None and rating.raw_score is not None


def test_rater_json_and_model_card_describe_the_training(tuned: Path) -> None:
    training = RaterConfig.read(tuned / "rater.json").training
    assert training is not None
    assert training["clips"] == {"train": 16, "validation": 8, "calibration": 24}
    assert training["groups"] == {"train": 4, "validation": 2, "calibration": 6}
    assert training["metrics"].keys() >= {"main", "srcc", "plcc"} and training["dtype"] == "float32"
    card = (tuned / "README.md").read_text()
    front = card.split("---")[1]
    assert "library_name: peft" in front and "base_model" not in front, "a local directory means nothing to others"
    for word in ("Intended use and limits", "8 validation clips", training["data"], "LoRA of rank 16", "mapping"):
        assert word in card
    assert not list(tuned.glob("checkpoints/checkpoint-*")) and not list(tuned.rglob("*.bin"))


def test_the_calibration_records_the_clips_that_it_was_fitted_on(tuned: Path, labelled: Path) -> None:
    calibration = Calibration.read(tuned / "calibration.json")
    rater = Rater.from_pretrained(tuned)
    ratings = [rater.rate(path) for path in sorted(labelled.glob("*.mp4"))]
    fitted = [rating.calibration.fitted for rating in ratings if rating.calibration]
    assert len(fitted) == PERSONS * CLIPS and sum(fitted) == calibration.n == 24


def test_predictions_in_training_equal_those_of_rating(tuned: Path, labelled: Path) -> None:
    """The calibration fitted in training is the one that ratings of the same clips give."""
    record = json.loads((tuned / "run.json").read_text())
    calibration = Calibration.read(tuned / "calibration.json")
    rater = Rater.from_pretrained(tuned)
    with (labelled / "labels.csv").open() as file:
        mos = {row["clip"]: float(row["mos"]) for row in csv.DictReader(file)}
    ratings = {name: rater.rate(labelled / name) for name in mos}
    from lmm_qa.evaluation.calibration import calibrate

    labels = [Label(name, value, name.partition("_")[0]) for name, value in mos.items()]
    scores = [
        Score(name, rating.raw_score, std=rating.std, scale=rating.scale, content_id=rating.content_id)
        for name, rating in ratings.items()
        if rating.calibration and rating.calibration.fitted
    ]
    again = calibrate(join(labels, scores).pairs)
    assert again.fingerprint == calibration.fingerprint
    assert again.interval.half_width == pytest.approx(calibration.interval.half_width, rel=1e-3)
    assert record["metrics"]["main"][0] <= 1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT 0.21
def test_peft_loads_the_adapter(tuned: Path, family_dir: Callable[[str], Path]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    base: Any = AutoModelForImageTextToText.from_pretrained(family_dir("qwen2_vl"), dtype=torch.float32)
    ours = Backbone.load(str(family_dir("qwen2_vl")), adapter=tuned, device="cpu")
    theirs = PeftModel.from_pretrained(base, tuned)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=ids).logits, ours.model(input_ids=ids).logits)
    moved = [value.abs().max() for name, value in theirs.named_parameters() if "lora_B" in name]
    assert len(moved) == 14 and all(value > 0 for value in moved), "every projection of both layers was trained"


def test_an_adapter_on_other_base_weights_is_refused(
    tuned: Path, family_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    settings = RaterConfig.read(tuned / "rater.json")
    for file in tuned.glob("adapter*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    other = settings.model_copy(update={"backbone_weights": "0123456789abcdef"})
    (tmp_path / "rater.json").write_text(other.model_dump_json())
    with pytest.raises(ModelError, match="was trained on other weights than those in"):
        Rater.from_pretrained(tmp_path)


@pytest.mark.slow
def test_qlora_on_a_cpu(make_config: MakeConfig, labelled: Path, tmp_path: Path) -> None:
    # Long enough that scores rise with the MOS: a calibration is refused otherwise.
    longer = {"training__epochs": 8, "training__learning_rate": 5e-3}
    train(make_config(model__quantization="4bit", data__calibration_share=0.5, **longer), quiet)
    losses = list(curve(tmp_path / "run").values())
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    rater = Rater.from_pretrained(tmp_path / "run")
    assert rater.backbone.choices["quantization"].value == "4bit", "as in training, without an option"
    rating, calibration = rater.rate(labelled / "p0_0.mp4"), Calibration.read(tmp_path / "run" / "calibration.json")
    assert rating.calibration is not None and rating.calibration.raw_rater_id == calibration.rater_id


@pytest.mark.slow
def test_full_tuning(make_config: MakeConfig, labelled: Path, tmp_path: Path) -> None:
    train(make_config(tuning__method="full"), quiet)
    losses = list(curve(tmp_path / "run").values())
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    rating = Rater.from_pretrained(tmp_path / "run").rate(labelled / "p0_0.mp4")
    assert rating.adapter is None and rating.model == str(tmp_path / "run")


@pytest.mark.slow
def test_full_tuning_loads_its_checkpoints(make_config: MakeConfig, tmp_path: Path) -> None:
    """The best one at the end, and the last one when it resumes: Qwen2-VL saves its weights under other names."""
    config = make_config(tuning__method="full")
    train(config, quiet)
    run = TrainingRun.prepare(config, quiet, PartialState())
    backbone = run.load_backbone()
    initial = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    trainer = run.build_trainer(trainable_model(backbone.model, config), backbone, None)
    trainer._load_from_checkpoint(str(tmp_path / "run"))
    saved = Backbone.load(str(tmp_path / "run"), device="cpu", dtype="float32").model.state_dict()
    loaded = trainer.model.state_dict()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert not all(torch.equal(loaded[name], initial[name]) for name in saved)
    trainer.model.load_state_dict(initial)
    trainer.state.best_model_checkpoint = str(tmp_path / "run")
    trainer._load_best_model()
    assert all(torch.equal(value, saved[name]) for name, value in trainer.model.state_dict().items())


def test_a_trained_vision_tower_is_not_cached(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(tuning__vision=True, tuning__merger=True, training__gradient_checkpointing=True)
    train(with_training(config, epochs=0.4, cache_dir=tmp_path / "cache"), quiet)
    assert not (tmp_path / "cache" / "vision").exists()
    assert len(curve(tmp_path / "run")) == 4
    names = (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    assert b"visual.blocks.0.attn.qkv.lora_A" in names and b"visual.merger.mlp.0.lora_A" in names
