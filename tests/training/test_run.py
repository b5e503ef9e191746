"""python -m pytest tests/training/test_run.py"""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from filelock import FileLock

from lmm_qa.defects.explanation import Finding, explanation_prompt, opening
from lmm_qa.defects.questions import questions
from lmm_qa.defects.vocabulary import VISIBLE
from lmm_qa.degrade.causes import encode
from lmm_qa.errors import ConfigError, ModelError, TrainingError, UsageError
from lmm_qa.evaluation.labels import Label, Score, join
from lmm_qa.model.backbone import Backbone
from lmm_qa.model.calibration import Calibration
from lmm_qa.model.inputs import patch_factor
from lmm_qa.model.prefill import SharedPrefill
from lmm_qa.model.prompt import Prompt
from lmm_qa.model.rater_config import RaterConfig
from lmm_qa.rater import Rater, clip_input
from lmm_qa.training import run as run_module
from lmm_qa.training import trainer as trainer_module
from lmm_qa.training.adapters import lora_targets, trainable_model
from lmm_qa.training.config import TrainingConfig
from lmm_qa.training.export import merge, push
from lmm_qa.training.run import TrainingRun, last_checkpoint, train
from lmm_qa.video.decode import read_frames

PERSONS, CLIPS = 12, 4

MakeConfig = Callable[..., TrainingConfig]


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small clips of 12 persons and labels.csv: the lower the MOS, the darker and noisier the clip.

    described.jsonl has defects for three clips in four, and explanations for two in three.
    """
    folder = tmp_path_factory.mktemp("labelled")
    draw = np.random.default_rng(0)
    rows, described = [], []
    for person in range(PERSONS):
        still = draw.integers(60, 190, (1, 14, 14, 3)).repeat(8, 0).repeat(6, 1).repeat(6, 2)
        for clip in range(CLIPS):
            strength = draw.random()
            noisy = still - 80 * strength + draw.normal(0, 60 * strength, still.shape)
            frames = np.clip(noisy, 0, 255).astype(np.uint8)
            name = f"p{person}_{clip}.mp4"
            encode(frames, "libx264", {"crf": "10"}, Fraction(8), str(folder / name))
            rows.append((name, round(4.6 - 3.2 * strength, 3), f"p{person}"))
            described.append(
                {
                    **dict(zip(("clip", "mos", "group"), rows[-1], strict=True)),
                    "defects": None if clip == 3 else ["noise", "?blur"] if strength > 0.5 else [],
                    "explanation": "The quality of this video is fair: noise." if (person + clip) % 3 else None,
                }
            )
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("clip", "mos", "group"), *rows])
    (folder / "described.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in described))
    return folder


DESCRIBED = [{"path": "described.jsonl", "scale": [1, 5]}]


@pytest.fixture
def make_config(labelled: Path, family_dir: Callable[[str], Path], tmp_path: Path) -> MakeConfig:
    """Configurations of a short run on a small Qwen2-VL; keyword arguments override values as section__key=value."""

    def make(**changes: Any) -> TrainingConfig:
        values: dict[str, Any] = {
            "model": {"backbone": str(family_dir("qwen2_vl"))},
            "data": {
                "root": str(labelled),
                "train": [{"path": "labels.csv", "scale": [1, 5]}],
                "validation_share": 0.17,
                "calibration_share": 0.0,
            },
            "rating": {"sampling": {"frames": 4}, "views": [{"max_pixels": 7056}]},
            "augmentation": {"temporal_offsets": 2},
            "training": {
                "output_dir": str(tmp_path / "run"),
                "cache_dir": str(tmp_path / "cache"),
                "epochs": 1.2,
                "batch_size": 4,
                "learning_rate": 2e-3,
                "eval_steps": 4,
                "num_workers": 1,
            },
        }
        for place, value in changes.items():
            section, _, key = place.partition("__")
            values.setdefault(section, {})[key] = value
        return TrainingConfig.parse(values, "test")

    return make


def curve(folder: Path, part: str = "loss") -> dict[int, float]:
    """The loss of each step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [(row["step"], row[part]) for row in rows if "loss" in row]
    assert [step for step, _ in losses] == list(range(1, len(losses) + 1)), "one row per step"
    return dict(losses)


def quiet(_: str) -> None:
    """Discards log lines."""


# --- a complete run --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(labelled: Path, family_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run, with a calibration."""
    folder = tmp_path_factory.mktemp("tuned")
    config = TrainingConfig.parse(
        {
            "model": {"backbone": str(family_dir("qwen2_vl"))},
            "data": {
                "root": str(labelled),
                "train": [{"path": "labels.csv", "scale": [1, 5]}],
                "validation_share": 0.17,
                "calibration_share": 0.5,
            },
            "augmentation": {"paraphrase_probability": 0.0, "temporal_offsets": 1},
            "rating": {"sampling": {"frames": 4}, "views": [{"max_pixels": 7056}]},
            "training": {
                "output_dir": str(folder / "run"),
                "cache_dir": str(folder / "cache"),
                "epochs": 30,
                "batch_size": 8,
                "learning_rate": 5e-3,
                "eval_steps": 15,
                "num_workers": 1,
            },
        },
        "test",
    )
    lines: list[str] = []
    outcome = train(config, lines.append)
    assert outcome.interrupted_by is None
    assert lines[-1] == f"done: lmm-qa rate CLIPS --model {folder / 'run'}"
    again: list[str] = []
    assert train(config, again.append).metrics == outcome.metrics
    assert again[-1] == f"{folder / 'run'} is finished: nothing to do"
    return folder / "run"


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
    assert training["metrics"].keys() >= {"main", "srcc", "plcc"}
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


def test_a_merged_model_gives_the_same_ratings(tuned: Path, labelled: Path, tmp_path: Path) -> None:
    merge(tuned, tmp_path / "merged")
    one, two = (Rater.from_pretrained(model).rate(labelled / "p1_1.mp4") for model in (tuned, tmp_path / "merged"))
    assert two.adapter is None and one.raw_score is not None
    assert (two.raw_score, two.score) == pytest.approx((one.raw_score, one.score), abs=1e-3)
    assert two.interval == pytest.approx(one.interval, abs=1e-3)
    assert two.probabilities == pytest.approx(one.probabilities, abs=1e-4)
    with pytest.raises(ModelError, match="has no adapter to merge"):
        merge(tmp_path / "merged", tmp_path / "again")
    with pytest.raises(UsageError, match="is not empty"):
        merge(tuned, tmp_path / "merged")


def test_push_uploads_only_raters_that_others_can_load(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="nobody else could load the adapter; merge it first"):
        push(tuned, "me/rater")
    calls: dict[str, Any] = {}
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda _, name, **rest: calls.update(repo=name, **rest))

    def upload(_: object, **options: Any) -> str:
        from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]  # not in __all__

        files = [str(path.relative_to(tuned)) for path in tuned.rglob("*") if path.is_file()]
        patterns = {"allow_patterns": options["allow_patterns"], "ignore_patterns": options["ignore_patterns"]}
        calls["files"] = sorted(filter_repo_objects(files, **patterns))
        return "https://hub/commit"

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: SimpleNamespace(sha="0" * 40))
    settings = RaterConfig.read(tuned / "rater.json")
    public = settings.model_copy(update={"backbone": "Qwen/Qwen2-VL-2B-Instruct", "backbone_weights": None})
    original = (tuned / "rater.json").read_text()
    try:
        (tuned / "rater.json").write_text(public.model_dump_json())
        (tuned / "checkpoints" / "checkpoint-1").mkdir(parents=True)
        (tuned / "checkpoints" / "checkpoint-1" / "optimizer.safetensors").touch()
        assert push(tuned, "me/rater", private=True) == "https://hub/commit"
    finally:
        (tuned / "rater.json").write_text(original)
        (tuned / "checkpoints" / "checkpoint-1" / "optimizer.safetensors").unlink()
        (tuned / "checkpoints" / "checkpoint-1").rmdir()
    assert calls["repo"] == "me/rater" and calls["private"] is True
    assert calls["files"] == sorted(
        [*("README.md", "adapter_config.json", "adapter_model.safetensors", "calibration.json"),
         *("metrics.jsonl", "rater.json")]
    )  # fmt: skip


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


# --- auxiliary tasks -------------------------------------------------------------------------------------------------


def share_of_last(backbone: Backbone, clip: Path, settings: RaterConfig, prompts: Sequence[Prompt]) -> list[float]:
    """Probability of the last level for each prompt, as in rating."""
    frames = read_frames(clip, settings.sampling, settings.views, patch_factor(backbone.processor) or 1)
    (answers,) = SharedPrefill(backbone, [clip_input(frames)]).level_logits(prompts)
    return [float(torch.tensor(answer.logits).softmax(-1)[-1]) for answer in answers]


def test_one_adapter_learns_to_rate_answer_and_explain(
    make_config: MakeConfig, labelled: Path, family_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    """All clips have one defect and lack another. The base model is undecided about both."""
    base = str(family_dir("qwen3_vl"))
    unsure = [f"?{name}" for name in VISIBLE if name not in ("blur", "seam")]
    rows = [json.loads(line) for line in (labelled / "described.jsonl").read_text().splitlines()]
    explanation = "The quality of this clip is fair: the picture is blurred."
    described = [{**row, "defects": ["blur", *unsure], "explanation": explanation} for row in rows]
    (tmp_path / "all.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in described))
    table = {"path": str(tmp_path / "all.jsonl"), "videos": str(labelled), "scale": [1, 5]}
    config = make_config(model__backbone=base, data__train=[table])
    config = with_training(config, epochs=3, eval_steps=30, learning_rate=5e-3)
    lines: list[str] = []
    outcome = train(config, lines.append)
    assert "of 40 training clips, 40 have known defects, and 40 an explanation" in lines
    assert outcome.metrics.keys() >= {"main", "srcc"}
    for part in ("explanations", "defect_questions"):
        losses = [*curve(tmp_path / "run", part).values()]
        assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 1, part
    settings = config.rater_config()
    stem = f"{opening(settings.prompt, 'fair')}: the picture is"
    words = {"stem": stem, "levels": ("always", "never", "blurred")}
    prompts = [questions()["blur"], questions()["seam"],
             explanation_prompt(settings.prompt, [Finding("blur", 1.0)]).model_copy(update=words)]  # fmt: skip
    backbone = Backbone.load(base, adapter=tmp_path / "run", device="cpu")
    blur, seam, blurred = share_of_last(backbone, labelled / "p0_0.mp4", settings, prompts)
    with backbone.without_adapter():
        before = share_of_last(backbone, labelled / "p0_0.mp4", settings, prompts)
    assert before[0] < 0.5 and before[1] > 0.2, before
    assert blur > 0.8 and seam < 0.1 and blurred > before[2] + 0.1, (blur, seam, blurred, before)


def test_auxiliary_tasks_do_not_change_the_rating_loss(make_config: MakeConfig, tmp_path: Path) -> None:
    plain = with_training(make_config(), epochs=0.4, output_dir=tmp_path / "plain")
    disabled = make_config(data__train=DESCRIBED, auxiliary__defect_questions=0, auxiliary__explanation_probability=0)
    auxiliary = make_config(data__train=DESCRIBED)
    train(plain, quiet)
    train(with_training(disabled, epochs=0.4, output_dir=tmp_path / "disabled"), quiet)
    train(with_training(auxiliary, epochs=0.4, output_dir=tmp_path / "auxiliary"), quiet)
    assert (tmp_path / "plain/metrics.jsonl").read_bytes() == (tmp_path / "disabled/metrics.jsonl").read_bytes()
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("plain", "disabled")]
    assert weights[0] == weights[1]
    rows = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0]) for name in ("plain", "auxiliary")
    ]
    for part in ("cross_entropy", "fidelity", "level_mass"):
        assert rows[0][part] == pytest.approx(rows[1][part], abs=1e-4), "same clips, same prompt"
    total = rows[1]["loss"] - rows[1]["defect_questions"] - 0.3 * rows[1]["explanations"]
    assert total == pytest.approx(rows[0]["loss"], abs=1e-4)
    assert rows[1]["defect_questions"] > 1 and rows[1]["explanations"] > 1


@pytest.mark.parametrize("family", ["qwen3_vl", "llava_onevision"])
def test_auxiliary_tasks_work_for_other_families(
    make_config: MakeConfig, family_dir: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    train(with_training(make_config(model__backbone=str(family_dir(family)), data__train=DESCRIBED), epochs=0.3), quiet)
    losses = [*curve(tmp_path / "run", "explanations").values()]
    assert len(losses) == 3 and all(loss > 0 for loss in losses)


def test_a_resumed_run_has_the_auxiliary_examples_of_an_uninterrupted_one(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = with_training(make_config(data__train=DESCRIBED), epochs=0.8, eval_steps=3)
    train(with_training(base, output_dir=tmp_path / "undisturbed"), quiet)
    disturbed = with_training(base, output_dir=tmp_path / "disturbed")
    real, steps = trainer_module.weighted_loss, iter(range(100))

    def dies(*arguments: Any) -> Any:
        if next(steps) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(trainer_module, "weighted_loss", dies)
        train(disturbed, quiet)
    lines: list[str] = []
    train(disturbed, lines.append)
    assert any(re.match(r"resuming from .*checkpoint-3", line) for line in lines)
    for part in ("loss", "defect_questions", "explanations"):
        assert curve(tmp_path / "disturbed", part) == curve(tmp_path / "undisturbed", part)
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("undisturbed", "disturbed")]
    assert weights[0] == weights[1]


def test_other_defect_labels_make_another_run(make_config: MakeConfig, labelled: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    rows = [json.loads(line) for line in (labelled / "described.jsonl").read_text().splitlines()]
    config = make_config(data__train=[{"path": str(table), "videos": str(labelled), "scale": [1, 5]}])
    for defect in ("blur", "noise"):
        lines = [f"{row['clip']},{row['mos']},{row['group']},{defect}" for row in rows]
        table.write_text("\n".join(["clip,mos,group,defects", *lines]))
        if defect == "blur":
            train(with_training(config, epochs=0.1), quiet)
        else:
            with pytest.raises(ConfigError, match="contains a run with another configuration, other data"):
                train(with_training(config, epochs=0.1), quiet)


def test_an_explanation_without_a_level_word_is_refused_before_training(
    make_config: MakeConfig, labelled: Path, tmp_path: Path
) -> None:
    (tmp_path / "t.csv").write_text(
        "clip,mos,group,explanation\n"
        + "".join(f"p{person}_0.mp4,3,p{person},The picture is blurred.\n" for person in range(PERSONS))
    )
    table = {"path": str(tmp_path / "t.csv"), "videos": str(labelled), "scale": [1, 5]}
    with pytest.raises(TrainingError, match=r"the explanation of 'p\d+_0\.mp4' has none of the words bad, poor, "):
        train(make_config(data__train=[table]), quiet)
    assert not (tmp_path / "run").exists()


# --- equal loss curves -----------------------------------------------------------------------------------------------


def test_cached_vision_features_do_not_change_the_loss(make_config: MakeConfig, tmp_path: Path) -> None:
    cached, uncached, base = tmp_path / "cached", tmp_path / "uncached", make_config(data__train=DESCRIBED)
    train(with_training(base, output_dir=cached), quiet)
    assert list((tmp_path / "cache" / "vision").rglob("*.safetensors"))
    train(with_training(base, output_dir=uncached, cache_vision_features=False), quiet)
    assert curve(cached) == pytest.approx(curve(uncached), abs=1e-5)
    assert len(curve(cached)) == 12


def with_training(config: TrainingConfig, **changes: Any) -> TrainingConfig:
    """Override keys of the section `training`."""
    return config.model_copy(update={"training": config.training.model_copy(update=changes)})


def write_config(config: TrainingConfig, path: Path) -> Path:
    path.write_text(json.dumps(config.model_dump(mode="json")))  # JSON is YAML
    return path


def command(*words: str | Path, processes: int = 1) -> subprocess.Popen[str]:
    """Start `lmm-qa train`, under `accelerate launch` for several processes (on a CPU they use gloo)."""
    several = ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1", "--main_process_port", "0"]
    launch = ["-m", "accelerate.commands.launch", *several, "--mixed_precision", "no", "--dynamo_backend", "no"]
    start = [*(launch if processes > 1 else []), "-m", "lmm_qa", "train", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *start], text=True, stderr=subprocess.PIPE, env=environment)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_resumed_run_equals_an_uninterrupted_one(
    make_config: MakeConfig, tmp_path: Path, number: signal.Signals
) -> None:
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    # With dropout and an epoch that ends between two checkpoints: both depend on the RNG state.
    train(with_training(make_config(), output_dir=undisturbed, epochs=1.6, eval_steps=3), quiet)
    path = write_config(
        with_training(make_config(), output_dir=disturbed, epochs=1.6, eval_steps=3), tmp_path / "config.yaml"
    )
    running = command(path)
    assert running.stderr
    for line in running.stderr:
        if line.startswith("step 6/16  validation"):
            running.send_signal(number)
            break
    _, stderr = running.communicate(timeout=120)
    if number == signal.SIGTERM:
        assert running.returncode == 128 + number and "run the same command to resume" in stderr
    else:
        assert running.returncode == -number
    assert not (disturbed / "rater.json").exists()
    again = command(path)
    _, stderr = again.communicate(timeout=120)
    assert again.returncode == 0, stderr
    assert re.search(r"resuming from .*checkpoint-\d+", stderr)
    assert curve(disturbed) == pytest.approx(curve(undisturbed), abs=1e-5)
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (undisturbed, disturbed)]
    assert weights[0] == weights[1]


def test_an_incomplete_checkpoint_is_skipped(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "none") is None
    for step, state in ((3, "{}"), (20, "{}"), (100, '{"global'), (110, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "rng_state.pth").touch()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-20"
    assert last_checkpoint(tmp_path, processes=2) is None, "the RNG state of every process is needed"


def test_two_processes_have_the_losses_of_one_process(make_config: MakeConfig, tmp_path: Path) -> None:
    """The same clips per step, 2 x 2 instead of 1 x 4, with fidelity and PLCC over all four and auxiliary examples for
    some of them; interrupted in between."""
    base = make_config(tuning__lora_dropout=0.0, loss__plcc=0.5, data__train=DESCRIBED)
    one = with_training(base, output_dir=tmp_path / "one", batch_size=4)
    two = write_config(with_training(base, output_dir=tmp_path / "two", batch_size=2), tmp_path / "two.yaml")
    train(one, quiet)
    running = command(two, processes=2)
    assert running.stderr
    for line in running.stderr:
        if re.match(r"step 10/12  loss", line):
            running.send_signal(signal.SIGTERM)
            break
    _, stderr = running.communicate(timeout=240)
    assert running.returncode != 0
    again = command(two, processes=2)
    _, stderr = again.communicate(timeout=240)
    assert again.returncode == 0, stderr
    assert "resuming from" in stderr
    assert stderr.count("done: lmm-qa rate") == 1, "only the main process logs"
    for part in ("loss", "fidelity", "defect_questions", "explanations"):
        assert curve(tmp_path / "two", part) == pytest.approx(curve(tmp_path / "one", part), abs=2e-4)
    metrics = [json.loads((tmp_path / name / "run.json").read_text())["metrics"]["srcc"] for name in ("one", "two")]
    assert metrics[0] == pytest.approx(metrics[1], abs=0.05)


def test_gradient_accumulation_equals_a_larger_batch(make_config: MakeConfig, tmp_path: Path) -> None:
    """Without pairwise losses, which do not extend across forward passes."""
    base = make_config(tuning__lora_dropout=0.0, loss__fidelity=0.0, data__train=DESCRIBED)
    train(with_training(base, output_dir=tmp_path / "one", batch_size=4), quiet)
    train(with_training(base, output_dir=tmp_path / "two", batch_size=2, gradient_accumulation_steps=2), quiet)
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), abs=2e-4)


def test_cached_features_work_in_bfloat16(make_config: MakeConfig, tmp_path: Path) -> None:
    half = with_training(make_config(model__dtype="bfloat16"), epochs=0.4)
    train(with_training(half, output_dir=tmp_path / "cached"), quiet)
    train(with_training(half, output_dir=tmp_path / "uncached", cache_vision_features=False), quiet)
    assert curve(tmp_path / "cached") == pytest.approx(curve(tmp_path / "uncached"), abs=0.03)


# --- trainable weights -----------------------------------------------------------------------------------------------


def test_qlora_on_a_cpu(make_config: MakeConfig, labelled: Path, tmp_path: Path) -> None:
    train(make_config(model__quantization="4bit"), quiet)
    losses = list(curve(tmp_path / "run").values())
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    assert Rater.from_pretrained(tmp_path / "run", quantization="4bit").rate(labelled / "p0_0.mp4").score


def test_full_tuning(make_config: MakeConfig, labelled: Path, tmp_path: Path) -> None:
    train(make_config(tuning__method="full"), quiet)
    losses = list(curve(tmp_path / "run").values())
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    rating = Rater.from_pretrained(tmp_path / "run").rate(labelled / "p0_0.mp4")
    assert rating.adapter is None and rating.model == str(tmp_path / "run")


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


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision"])
@pytest.mark.parametrize("parts", [(), ("vision",), ("merger",), ("vision", "merger")])
def test_lora_targets_the_linear_layers_of_the_chosen_components(
    family: str, parts: Sequence[str], family_dir: Callable[[str], Path]
) -> None:
    model = Backbone.load(str(family_dir(family)), device="cpu").model
    pattern = lora_targets(model, {"language", *parts})
    hit = {name for name, module in model.named_modules() if re.fullmatch(pattern, name)}
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert hit <= linear
    merger = {name for name in linear if "merger" in name or "projector" in name}
    tower = {name for name in linear if ("visual" in name or "vision_tower" in name)} - merger
    language = {name for name in linear if "language_model" in name}
    assert language and hit & language == language
    assert hit & merger == (merger if "merger" in parts else set())
    assert hit & tower == (tower if "vision" in parts else set())
    assert "lm_head" not in hit


def test_a_trained_vision_tower_is_not_cached(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(tuning__vision=True, tuning__merger=True)
    train(with_training(config, epochs=0.4), quiet)
    assert not (tmp_path / "cache" / "vision").exists()
    assert len(curve(tmp_path / "run")) == 4
    names = (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    assert b"visual.blocks.0.attn.qkv.lora_A" in names and b"visual.merger.mlp.0.lora_A" in names


# --- errors ----------------------------------------------------------------------------------------------------------


def test_a_non_finite_loss_is_an_error_with_the_clips(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real, steps = trainer_module.weighted_loss, iter(range(100))

    def breaks(*arguments: Any) -> Any:
        loss, parts = real(*arguments)
        return (loss * float("nan") if next(steps) == 2 else loss), parts

    monkeypatch.setattr(trainer_module, "weighted_loss", breaks)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 3, with the clips (p\d+_\d\.mp4(, )?){4}"):
        train(make_config(), quiet)


@pytest.fixture
def incomplete(labelled: Path, tmp_path: Path) -> Path:
    """The labelled folder with one clip missing and one truncated."""
    folder = tmp_path / "incomplete"
    folder.mkdir()
    for file in labelled.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "p3_0.mp4").unlink()
    (folder / "p4_1.mp4").write_bytes((labelled / "p4_1.mp4").read_bytes()[:900])
    return folder


def test_unreadable_clips_are_counted_before_training_starts(make_config: MakeConfig, incomplete: Path) -> None:
    data = make_config().data.model_copy(update={"root": incomplete})
    refused = make_config().model_copy(update={"data": data})
    lines: list[str] = []
    with pytest.raises(TrainingError, match="2 of 48 clips are missing or cannot be read"):
        train(refused, lines.append)
    assert any("p3_0.mp4" in line for line in lines) and any("p4_1.mp4" in line for line in lines)
    assert not refused.training.output_dir.exists()
    accepted = with_training(refused, skip_unreadable=True, epochs=0.2)
    train(accepted, quiet)
    counts = json.loads((accepted.training.output_dir / "run.json").read_text())["clips"]
    assert sum(counts.values()) == 46


def test_a_run_directory_is_not_reused_for_another_run(make_config: MakeConfig, tmp_path: Path) -> None:
    short = with_training(make_config(), epochs=0.2)
    train(short, quiet)
    with pytest.raises(ConfigError, match=r"config\.training\.learning_rate: 0\.002 -> 0\.5"):
        train(with_training(short, learning_rate=0.5), quiet)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="is not empty and contains no run"):
        train(with_training(short, output_dir=tmp_path / "other"), quiet)


@pytest.fixture
def other_process(tmp_path: Path) -> Iterator[None]:
    """A process that holds the lock of the run directory."""
    (tmp_path / "run").mkdir()
    code = "import sys, filelock\nwith filelock.FileLock(sys.argv[1]):\n    print('locked', flush=True)\n    input()"
    command = [sys.executable, "-c", code, str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "locked\n"
        yield
        process.communicate("\n")


@pytest.mark.usefixtures("other_process")
def test_a_process_without_the_lock_does_not_touch_the_run_directory(make_config: MakeConfig, tmp_path: Path) -> None:
    """Two runs start at the same time: the one that comes second neither writes run.json nor reads a half-made one."""
    with pytest.raises(ConfigError, match=r"another process is training in .*run"):
        train(with_training(make_config(), epochs=0.1), quiet)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_directory_in_which_no_run_got_further_than_the_lock_is_used(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    train(with_training(make_config(), epochs=0.1), quiet)
    assert (tmp_path / "run" / "rater.json").exists()


def test_an_unfinished_run_of_another_process_is_not_resumed(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lock = FileLock(tmp_path / "run" / ".lock")
    train(with_training(make_config(), epochs=0.1, output_dir=tmp_path / "first"), quiet)
    (tmp_path / "run" / "run.json").write_text((tmp_path / "first" / "run.json").read_text())
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    del record["metrics"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    with lock, pytest.raises(ConfigError, match=r"another process is training in .*run"):
        train(with_training(make_config(), epochs=0.1), quiet)


def test_arguments_cannot_override_keys_of_the_configuration(make_config: MakeConfig) -> None:
    for name, value in (("max_steps", 3), ("per_device_train_batch_size", 64), ("seed", 4)):
        with pytest.raises(ConfigError, match=rf"training\.arguments: {name} cannot be set"):
            train(with_training(make_config(), arguments={name: value}), quiet)
    with pytest.raises(ConfigError, match=r"training\.arguments: learning_rat cannot be set"):
        train(with_training(make_config(), arguments={"learning_rat": 1}), quiet)


def test_a_step_with_a_non_finite_gradient_is_not_saved(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = trainer_module.weighted_loss

    def steep(*arguments: Any) -> Any:
        loss, parts = real(*arguments)
        return loss + 0 * (loss - loss.detach()).sqrt(), parts  # finite, with an infinite gradient

    monkeypatch.setattr(trainer_module, "weighted_loss", steep)
    with pytest.raises(TrainingError, match=r"the gradient is nan at step 1, with the clips (p\d+_\d\.mp4(, )?){4}"):
        train(with_training(make_config(), eval_steps=1), quiet)
    assert last_checkpoint(tmp_path / "run" / "checkpoints") is None


def test_a_missing_logger_is_refused_before_any_work(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"training\.report_to names clearml, which is not installed"):
        train(with_training(make_config(), report_to=("clearml",)), quiet)
    assert not make_config().training.output_dir.exists()


def test_clips_longer_than_the_context_are_refused(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "context_length", lambda *_: 20)
    with pytest.raises(TrainingError, match=r"a clip takes \d+ tokens, the model's context is 20: use fewer frames"):
        train(make_config(), quiet)
