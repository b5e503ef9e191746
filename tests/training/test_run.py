"""python -m pytest tests/training/test_run.py"""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

from lmm_qa.defects.explanation import Finding, explanation_prompt, opening
from lmm_qa.defects.questions import questions
from lmm_qa.defects.vocabulary import VISIBLE
from lmm_qa.degrade.causes import encode
from lmm_qa.errors import ConfigError, ModelError, TrainingError, UsageError
from lmm_qa.model.calibration import Calibration
from lmm_qa.evaluation.labels import Label, Score, join
from lmm_qa.model.backbone import Backbone
from lmm_qa.model.prefill import Prefill
from lmm_qa.model.prompt import Prompt
from lmm_qa.model.rater_config import RaterConfig
from lmm_qa.rater import Rater, clip_input
from lmm_qa.training import run as job
from lmm_qa.training.adapters import adapter_targets
from lmm_qa.training.config import Recipe
from lmm_qa.training.export import merge, push
from lmm_qa.training.run import last_checkpoint, train
from lmm_qa.video.decode import read_frames

PERSONS, CLIPS = 12, 4


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small clips of 12 persons whose MOS falls with their noise, and labels.csv; described.jsonl tells of
    three clips in four which defects they have, and of two in three why they are rated so."""
    folder = tmp_path_factory.mktemp("labelled")
    draw = np.random.default_rng(0)
    rows, described = [], []
    for person in range(PERSONS):
        still = draw.integers(60, 190, (1, 14, 14, 3)).repeat(8, 0).repeat(6, 1).repeat(6, 2)
        for clip in range(CLIPS):
            strength = draw.random()
            frames = np.clip(still + draw.normal(0, 60 * strength, still.shape), 0, 255).astype(np.uint8)
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
def recipe(labelled: Path, family_dir: Callable[[str], Path], tmp_path: Path) -> Callable[..., Recipe]:
    """A short run on a small Qwen2-VL; keyword arguments change single values, as section__key=value."""

    def make(**changes: Any) -> Recipe:
        values: dict[str, Any] = {
            "model": {"backbone": str(family_dir("qwen2_vl"))},
            "data": {
                "root": str(labelled),
                "train": [{"path": "labels.csv", "scale": [1, 5]}],
                "validation_share": 0.17,
                "calibration_share": 0.0,
            },
            "rating": {"sampling": {"frames": 4}, "views": [{"max_pixels": 7056}]},
            "augmentation": {"offsets": 2},
            "training": {
                "output": str(tmp_path / "run"),
                "cache": str(tmp_path / "cache"),
                "passes": 1.2,
                "batch_size": 4,
                "learning_rate": 2e-3,
                "every": 4,
                "workers": 1,
            },
        }
        for place, value in changes.items():
            section, _, key = place.partition("__")
            values.setdefault(section, {})[key] = value
        return Recipe.parse(values, "test")

    return make


def curve(folder: Path, part: str = "loss") -> dict[int, float]:
    """The loss of each step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [(row["step"], row[part]) for row in rows if "loss" in row]
    assert [step for step, _ in losses] == list(range(1, len(losses) + 1)), "a row for each step, each once"
    return dict(losses)


def quiet(_: str) -> None:
    """Says nothing."""


# --- a run, whole ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(labelled: Path, family_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory whose run is over, with a calibration."""
    folder = tmp_path_factory.mktemp("tuned")
    recipe = Recipe.parse(
        {
            "model": {"backbone": str(family_dir("qwen2_vl"))},
            "data": {
                "root": str(labelled),
                "train": [{"path": "labels.csv", "scale": [1, 5]}],
                "validation_share": 0.17,
                "calibration_share": 0.5,
            },
            "augmentation": {"paraphrases": 0.0, "offsets": 1},
            "rating": {"sampling": {"frames": 4}, "views": [{"max_pixels": 7056}]},
            "training": {
                "output": str(folder / "run"),
                "cache": str(folder / "cache"),
                "passes": 30,
                "batch_size": 8,
                "learning_rate": 5e-3,
                "every": 15,
                "workers": 1,
                "seed": 3,
            },
        },
        "test",
    )
    said: list[str] = []
    outcome = train(recipe, said.append)
    assert outcome.interrupted_by is None
    assert said[-1] == f"done: lmm-qa rate CLIPS --model {folder / 'run'}"
    again: list[str] = []
    assert train(recipe, again.append).metrics == outcome.metrics
    assert again[-1] == f"{folder / 'run'} is finished: nothing to do"
    return folder / "run"


def test_a_run_directory_rates_without_any_flag(tuned: Path, labelled: Path) -> None:
    rater = Rater.from_pretrained(tuned)
    assert rater.settings.sampling.frames == 4 and rater.settings.scale == (1, 5)
    rating = rater.rate(labelled / "p0_0.mp4")
    assert 1 <= rating.score <= 5 and rating.adapter == str(tuned)
    assert rating.calibration is not None and rating.interval is not None and rating.raw_score is not None


def test_it_says_what_it_was_made_from(tuned: Path) -> None:
    training = RaterConfig.read(tuned / "rater.json").training
    assert training is not None
    assert training["clips"] == {"train": 16, "validation": 8, "calibration": 24}
    assert training["groups"] == {"train": 4, "validation": 2, "calibration": 6}
    assert training["metrics"].keys() >= {"main", "srcc", "plcc"}
    card = (tuned / "README.md").read_text()
    front = card.split("---")[1]
    assert "library_name: peft" in front and "base_model" not in front, "a directory of this machine says nothing"
    for word in ("Intended use, and limits", "8 validation clips", training["data"], "LoRA of rank 16", "mapping"):
        assert word in card
    assert not list(tuned.glob("checkpoints/checkpoint-*")) and not list(tuned.rglob("*.bin"))


def test_the_calibration_knows_the_clips_that_it_was_fitted_on(tuned: Path, labelled: Path) -> None:
    calibration = Calibration.read(tuned / "calibration.json")
    rater = Rater.from_pretrained(tuned)
    ratings = [rater.rate(path) for path in sorted(labelled.glob("*.mp4"))]
    fitted = [rating.calibration.fitted for rating in ratings if rating.calibration]
    assert len(fitted) == PERSONS * CLIPS and sum(fitted) == calibration.n == 24


def test_training_predicts_what_rating_says(tuned: Path, labelled: Path) -> None:
    """The validation figure that training noted is that of the rater, computed by rating the clips."""
    record = json.loads((tuned / "run.json").read_text())
    calibration = Calibration.read(tuned / "calibration.json")
    rater = Rater.from_pretrained(tuned)
    with (labelled / "labels.csv").open() as file:
        mos = {row["clip"]: float(row["mos"]) for row in csv.DictReader(file)}
    ratings = {name: rater.rate(labelled / name) for name in mos}
    # The mapping was fitted to raw scores of its clips: their fingerprint and the interval come out again.
    from lmm_qa.evaluation.calibration import calibrate

    labels = [Label(name, value, name.partition("_")[0]) for name, value in mos.items()]
    scores = [
        Score(name, rating.raw_score, std=rating.std, scale=rating.scale, content_id=rating.content_id)
        for name, rating in ratings.items()
        if rating.calibration and rating.calibration.fitted
    ]
    again = calibrate(join(labels, scores).pairs)
    assert again.fingerprint == calibration.fingerprint
    assert again.spread.half_width == pytest.approx(calibration.spread.half_width, rel=1e-3)
    assert record["metrics"]["main"][0] <= 1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT 0.21's business
def test_plain_peft_loads_the_adapter(tuned: Path, family_dir: Callable[[str], Path]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    base: Any = AutoModelForImageTextToText.from_pretrained(family_dir("qwen2_vl"), dtype=torch.float32)
    ours = Backbone.load(str(family_dir("qwen2_vl")), adapter=tuned, device="cpu")
    theirs = PeftModel.from_pretrained(base, tuned)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=ids).logits, ours.model(input_ids=ids).logits)
    moved = [value.abs().max() for name, value in theirs.named_parameters() if "lora_B" in name]
    assert len(moved) == 14 and all(value > 0 for value in moved), "every projection of both layers has learned"


def test_a_merged_model_rates_the_same(tuned: Path, labelled: Path, tmp_path: Path) -> None:
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


def test_only_what_others_can_load_is_pushed(tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="nobody else could load the adapter; merge it first"):
        push(tuned, "me/rater")
    calls: dict[str, Any] = {}
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda _, name, **rest: calls.update(repo=name, **rest))

    def upload(_: object, **options: Any) -> str:
        from huggingface_hub.utils import filter_repo_objects

        files = [str(path.relative_to(tuned)) for path in tuned.rglob("*") if path.is_file()]
        patterns = {"allow_patterns": options["allow_patterns"], "ignore_patterns": options["ignore_patterns"]}
        calls["files"] = sorted(filter_repo_objects(files, **patterns))
        return "https://hub/commit"

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    settings = RaterConfig.read(tuned / "rater.json")
    public = settings.model_copy(update={"backbone": "Qwen/Qwen2-VL-2B-Instruct", "backbone_weights": None})
    kept = (tuned / "rater.json").read_text()
    try:
        (tuned / "rater.json").write_text(public.model_dump_json())
        (tuned / "checkpoints" / "checkpoint-1").mkdir(parents=True)
        (tuned / "checkpoints" / "checkpoint-1" / "optimizer.safetensors").touch()
        assert push(tuned, "me/rater", private=True) == "https://hub/commit"
    finally:
        (tuned / "rater.json").write_text(kept)
        (tuned / "checkpoints" / "checkpoint-1" / "optimizer.safetensors").unlink()
        (tuned / "checkpoints" / "checkpoint-1").rmdir()
    assert calls["repo"] == "me/rater" and calls["private"] is True
    assert calls["files"] == sorted(
        [*("README.md", "adapter_config.json", "adapter_model.safetensors", "calibration.json"),
         *("metrics.jsonl", "rater.json")]
    )  # fmt: skip


def test_weights_that_were_exchanged_under_an_adapter_are_noticed(
    tuned: Path, family_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    settings = RaterConfig.read(tuned / "rater.json")
    for file in tuned.glob("adapter*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    other = settings.model_copy(update={"backbone_weights": "0123456789abcdef"})
    (tmp_path / "rater.json").write_text(other.model_dump_json())
    with pytest.raises(ModelError, match="was tuned on other weights than those that now lie in"):
        Rater.from_pretrained(tmp_path)


# --- words beside the score ------------------------------------------------------------------------------------------


def share_of_last(backbone: Backbone, clip: Path, settings: RaterConfig, prompts: Sequence[Prompt]) -> list[float]:
    """P(last level) of each prompt, read as rating does."""
    frames = read_frames(clip, settings.sampling, settings.views, 28)
    (answers,) = Prefill(backbone, [clip_input(frames)]).ask(prompts)
    return [float(torch.tensor(answer.logits).softmax(-1)[-1]) for answer in answers]


def test_one_adapter_rates_answers_and_explains(recipe: Callable[..., Recipe], labelled: Path, tmp_path: Path) -> None:
    """It learns that the one of two defects is there, and the other is not, and to say so."""
    unsure = [f"?{name}" for name in VISIBLE if name not in ("blur", "seam")]
    rows = [json.loads(line) for line in (labelled / "described.jsonl").read_text().splitlines()]
    said = "The quality of this clip is fair: the picture is blurred."
    described = [{**row, "defects": ["blur", *unsure], "explanation": said} for row in rows]
    (tmp_path / "all.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in described))
    table = {"path": str(tmp_path / "all.jsonl"), "videos": str(labelled), "scale": [1, 5]}
    run = with_training(recipe(data__train=[table]), passes=3, every=30, learning_rate=5e-3)
    lines: list[str] = []
    outcome = train(run, lines.append)
    assert "of 40 training clips, 40 have known defects, and 40 an explanation" in lines
    assert outcome.metrics.keys() >= {"main", "srcc"}
    for part in ("explanations", "defects"):
        losses = [*curve(tmp_path / "run", part).values()]
        assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 1, part
    settings = run.rater()
    begun = f"{opening(settings.prompt, 'fair')}: the picture is"
    words = {"stem": begun, "levels": ("sharp", "noisy", "blurred")}
    asked = [questions()["blur"], questions()["seam"],
             explanation_prompt(settings.prompt, [Finding("blur", 1.0)]).model_copy(update=words)]  # fmt: skip
    backbone = Backbone.load(str(run.model.backbone), adapter=tmp_path / "run", device="cpu")
    blur, seam, blurred = share_of_last(backbone, labelled / "p0_0.mp4", settings, asked)
    with backbone.without_adapter():
        before = share_of_last(backbone, labelled / "p0_0.mp4", settings, asked)
    assert before[0] < 0.5 and before[1] > 0.2, before
    assert blur > 0.8 and seam < 0.1 and blurred > before[2] + 0.1, (blur, seam, blurred, before)


def test_without_words_training_is_what_it_was(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    plain = with_training(recipe(), passes=0.4, output=tmp_path / "plain")
    silent = recipe(data__train=DESCRIBED, words__defects=0, words__explanations=0)
    asked = recipe(data__train=DESCRIBED)
    train(plain, quiet)
    train(with_training(silent, passes=0.4, output=tmp_path / "silent"), quiet)
    train(with_training(asked, passes=0.4, output=tmp_path / "asked"), quiet)
    assert (tmp_path / "plain/metrics.jsonl").read_bytes() == (tmp_path / "silent/metrics.jsonl").read_bytes()
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("plain", "silent")]
    assert weights[0] == weights[1]
    rows = [json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0]) for name in ("plain", "asked")]
    for part in ("cross_entropy", "fidelity", "level_mass"):
        assert rows[0][part] == pytest.approx(rows[1][part], abs=1e-4), "the same clips, the same question"
    total = rows[1]["loss"] - rows[1]["defects"] - 0.3 * rows[1]["explanations"]
    assert total == pytest.approx(rows[0]["loss"], abs=1e-4)
    assert rows[1]["defects"] > 1 and rows[1]["explanations"] > 1


@pytest.mark.parametrize("family", ["qwen3_vl", "llava_onevision"])
def test_other_families_learn_words(recipe: Callable[..., Recipe], family_dir: Callable[[str], Path], family: str,
                                    tmp_path: Path) -> None:  # fmt: skip
    train(with_training(recipe(model__backbone=str(family_dir(family)), data__train=DESCRIBED), passes=0.3), quiet)
    losses = [*curve(tmp_path / "run", "explanations").values()]
    assert len(losses) == 3 and all(loss > 0 for loss in losses)


def test_an_interrupted_run_asks_what_an_undisturbed_one_would(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = with_training(recipe(data__train=DESCRIBED), passes=0.8, every=3)
    train(with_training(base, output=tmp_path / "undisturbed"), quiet)
    disturbed = with_training(base, output=tmp_path / "disturbed")
    real, steps = job.weighted_loss, iter(range(100))

    def dies(*arguments: Any) -> Any:
        if next(steps) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(job, "weighted_loss", dies)
        train(disturbed, quiet)
    said: list[str] = []
    train(disturbed, said.append)
    assert any(re.match(r"going on from .*checkpoint-3", line) for line in said)
    for part in ("loss", "defects", "explanations"):
        assert curve(tmp_path / "disturbed", part) == curve(tmp_path / "undisturbed", part)
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("undisturbed", "disturbed")]
    assert weights[0] == weights[1]


def test_other_words_make_another_run(recipe: Callable[..., Recipe], labelled: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    rows = [json.loads(line) for line in (labelled / "described.jsonl").read_text().splitlines()]
    run = recipe(data__train=[{"path": str(table), "videos": str(labelled), "scale": [1, 5]}])
    for defect in ("blur", "noise"):
        lines = [f"{row['clip']},{row['mos']},{row['group']},{defect}" for row in rows]
        table.write_text("\n".join(["clip,mos,group,defects", *lines]))
        if defect == "blur":
            train(with_training(run, passes=0.1), quiet)
        else:
            with pytest.raises(ConfigError, match="holds a run of another recipe, other data"):
                train(with_training(run, passes=0.1), quiet)


def test_an_explanation_without_a_level_is_refused_at_once(
    recipe: Callable[..., Recipe], labelled: Path, tmp_path: Path
) -> None:
    (tmp_path / "t.csv").write_text(
        "clip,mos,group,explanation\n"
        + "".join(f"p{person}_0.mp4,3,p{person},The picture is blurred.\n" for person in range(PERSONS))
    )
    table = {"path": str(tmp_path / "t.csv"), "videos": str(labelled), "scale": [1, 5]}
    with pytest.raises(TrainingError, match=r"the explanation of 'p\d+_0\.mp4' has none of the words bad, poor, "):
        train(recipe(data__train=[table]), quiet)
    assert not (tmp_path / "run").exists()


# --- the same curve, however it comes about --------------------------------------------------------------------------


def test_kept_vision_features_change_no_loss(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    kept, read, base = tmp_path / "kept", tmp_path / "read", recipe(data__train=DESCRIBED)
    train(with_training(base, output=kept), quiet)
    assert list((tmp_path / "cache" / "vision").rglob("*.safetensors"))
    train(with_training(base, output=read, keep_vision=False), quiet)
    assert curve(kept) == pytest.approx(curve(read), abs=1e-5)
    assert len(curve(kept)) == 12


def with_training(recipe: Recipe, **changes: Any) -> Recipe:
    """Other values in the section `training`."""
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=changes)})


def write_recipe(recipe: Recipe, path: Path) -> Path:
    path.write_text(json.dumps(recipe.model_dump(mode="json")))  # JSON is YAML
    return path


def command(*words: str | Path, processes: int = 1) -> subprocess.Popen[str]:
    """`lmm-qa train`, under `accelerate launch` where there are several processes (on a CPU they meet by gloo)."""
    several = ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1", "--main_process_port", "0"]
    launch = ["-m", "accelerate.commands.launch", *several, "--mixed_precision", "no", "--dynamo_backend", "no"]
    start = [*(launch if processes > 1 else []), "-m", "lmm_qa", "train", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *start], text=True, stderr=subprocess.PIPE, env=environment)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(
    recipe: Callable[..., Recipe], tmp_path: Path, number: signal.Signals
) -> None:
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    # Dropout and a pass that ends between two checkpoints: both need the state of all that is random.
    train(with_training(recipe(), output=undisturbed, passes=1.6, every=3), quiet)
    path = write_recipe(with_training(recipe(), output=disturbed, passes=1.6, every=3), tmp_path / "recipe.yaml")
    running = command(path)
    assert running.stderr
    for line in running.stderr:
        if line.startswith("step 6/16  validation"):
            running.send_signal(number)
            break
    _, said = running.communicate(timeout=120)
    if number == signal.SIGTERM:
        assert running.returncode == 128 + number and "the same command goes on from there" in said
    else:
        assert running.returncode == -number
    assert not (disturbed / "rater.json").exists()
    again = command(path)
    _, said = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert re.search(r"going on from .*checkpoint-\d+", said)
    assert curve(disturbed) == pytest.approx(curve(undisturbed), abs=1e-5)
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (undisturbed, disturbed)]
    assert weights[0] == weights[1]


def test_a_checkpoint_that_was_cut_off_is_not_taken(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "none") is None
    for step, state in ((3, "{}"), (20, "{}"), (100, '{"global'), (110, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "rng_state.pth").touch()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-20"
    assert last_checkpoint(tmp_path, processes=2) is None, "each process must have said what its chance was"


def test_two_processes_have_the_losses_of_one(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """The same clips a step, 2 x 2 for 1 x 4, fidelity and PLCC over the pairs of all four, words of some of them;
    interrupted besides."""
    base = recipe(tuning__dropout=0.0, loss__plcc=0.5, data__train=DESCRIBED)
    one = with_training(base, output=tmp_path / "one", batch_size=4)
    two = write_recipe(with_training(base, output=tmp_path / "two", batch_size=2), tmp_path / "two.yaml")
    train(one, quiet)
    running = command(two, processes=2)
    assert running.stderr
    for line in running.stderr:
        if re.match(r"step 10/12  loss", line):
            running.send_signal(signal.SIGTERM)
            break
    _, said = running.communicate(timeout=240)
    assert running.returncode != 0
    again = command(two, processes=2)
    _, said = again.communicate(timeout=240)
    assert again.returncode == 0, said
    assert "going on from" in said
    assert said.count("done: lmm-qa rate") == 1, "only the first process speaks"
    for part in ("loss", "fidelity", "defects", "explanations"):
        assert curve(tmp_path / "two", part) == pytest.approx(curve(tmp_path / "one", part), abs=2e-4)
    metrics = [json.loads((tmp_path / name / "run.json").read_text())["metrics"]["srcc"] for name in ("one", "two")]
    assert metrics[0] == pytest.approx(metrics[1], abs=0.05)


def test_accumulated_batches_have_the_gradient_of_one(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Without pairwise losses, which do not reach from one batch to the next."""
    base = recipe(tuning__dropout=0.0, loss__fidelity=0.0, data__train=DESCRIBED)
    train(with_training(base, output=tmp_path / "one", batch_size=4), quiet)
    train(with_training(base, output=tmp_path / "two", batch_size=2, accumulation=2), quiet)
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), abs=2e-4)


def test_kept_features_serve_bfloat16_as_well(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    half = with_training(recipe(model__dtype="bfloat16"), passes=0.4)
    train(with_training(half, output=tmp_path / "kept"), quiet)
    train(with_training(half, output=tmp_path / "read", keep_vision=False), quiet)
    assert curve(tmp_path / "kept") == pytest.approx(curve(tmp_path / "read"), abs=0.03)


# --- what can be trained ---------------------------------------------------------------------------------------------


def test_quantized_weights_are_tuned_on_a_cpu(recipe: Callable[..., Recipe], labelled: Path, tmp_path: Path) -> None:
    train(recipe(model__quantization="4bit"), quiet)
    losses = list(curve(tmp_path / "run").values())
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    assert Rater.from_pretrained(tmp_path / "run", quantization="4bit").rate(labelled / "p0_0.mp4").score


def test_all_weights_can_be_tuned(recipe: Callable[..., Recipe], labelled: Path, tmp_path: Path) -> None:
    train(recipe(tuning__method="full"), quiet)
    losses = list(curve(tmp_path / "run").values())
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    rating = Rater.from_pretrained(tmp_path / "run").rate(labelled / "p0_0.mp4")
    assert rating.adapter is None and rating.model == str(tmp_path / "run")


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision"])
@pytest.mark.parametrize("parts", [(), ("vision",), ("merger",), ("vision", "merger")])
def test_adapters_go_where_they_should(family: str, parts: Sequence[str], family_dir: Callable[[str], Path]) -> None:
    model = Backbone.load(str(family_dir(family)), device="cpu").model
    pattern = adapter_targets(model, {"language", *parts})
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


def test_other_families_and_a_tuned_tower_train_from_pixels(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    run = recipe(tuning__vision=True, tuning__merger=True)
    train(with_training(run, passes=0.4), quiet)
    assert not (tmp_path / "cache" / "vision").exists()
    assert len(curve(tmp_path / "run")) == 4
    names = (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    assert b"visual.blocks.0.attn.qkv.lora_A" in names and b"visual.merger.mlp.0.lora_A" in names


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_the_clips(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real, steps = job.weighted_loss, iter(range(100))

    def breaks(*arguments: Any) -> Any:
        loss, parts = real(*arguments)
        return (loss * float("nan") if next(steps) == 2 else loss), parts

    monkeypatch.setattr(job, "weighted_loss", breaks)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 3, with the clips (p\d+_\d\.mp4(, )?){4}"):
        train(recipe(), quiet)


@pytest.fixture
def incomplete(labelled: Path, tmp_path: Path) -> Path:
    """The labelled folder without one clip, and with one cut short."""
    folder = tmp_path / "incomplete"
    folder.mkdir()
    for file in labelled.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "p3_0.mp4").unlink()
    (folder / "p4_1.mp4").write_bytes((labelled / "p4_1.mp4").read_bytes()[:900])
    return folder


def test_unreadable_clips_are_counted_before_training_begins(recipe: Callable[..., Recipe], incomplete: Path) -> None:
    data = recipe().data.model_copy(update={"root": incomplete})
    refused = recipe().model_copy(update={"data": data})
    said: list[str] = []
    with pytest.raises(TrainingError, match="2 of 48 clips are missing or cannot be read"):
        train(refused, said.append)
    assert any("p3_0.mp4" in line for line in said) and any("p4_1.mp4" in line for line in said)
    assert not refused.training.output.exists()
    accepted = with_training(refused, skip_unreadable=True, passes=0.2)
    train(accepted, quiet)
    counts = json.loads((accepted.training.output / "run.json").read_text())["clips"]
    assert sum(counts.values()) == 46


def test_a_run_directory_is_not_used_for_another_run(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    short = with_training(recipe(), passes=0.2)
    train(short, quiet)
    with pytest.raises(ConfigError, match=r"recipe\.training\.learning_rate: 0\.002 -> 0\.5"):
        train(with_training(short, learning_rate=0.5), quiet)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        train(with_training(short, output=tmp_path / "other"), quiet)


def test_two_runs_do_not_share_a_directory(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lock = FileLock(tmp_path / "run" / ".lock")
    train(with_training(recipe(), passes=0.1, output=tmp_path / "first"), quiet)
    (tmp_path / "run" / "run.json").write_text((tmp_path / "first" / "run.json").read_text())
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    del record["metrics"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    with lock, pytest.raises(ConfigError, match=r"another process is training in .*run"):
        train(with_training(recipe(), passes=0.1), quiet)


def test_arguments_do_not_contradict_the_recipe(recipe: Callable[..., Recipe]) -> None:
    for name, value in (("max_steps", 3), ("per_device_train_batch_size", 64), ("seed", 4)):
        with pytest.raises(ConfigError, match=rf"training\.arguments: {name} cannot be set"):
            train(with_training(recipe(), arguments={name: value}), quiet)
    with pytest.raises(ConfigError, match=r"training\.arguments: learning_rat cannot be set"):
        train(with_training(recipe(), arguments={"learning_rat": 1}), quiet)


def test_a_gradient_that_is_not_finite_never_becomes_a_checkpoint(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = job.weighted_loss

    def steep(*arguments: Any) -> Any:
        loss, parts = real(*arguments)
        return loss + 0 * (loss - loss.detach()).sqrt(), parts  # finite, of infinite slope

    monkeypatch.setattr(job, "weighted_loss", steep)
    with pytest.raises(TrainingError, match=r"the gradient is nan at step 1, with the clips (p\d+_\d\.mp4(, )?){4}"):
        train(with_training(recipe(), every=1), quiet)
    assert last_checkpoint(tmp_path / "run" / "checkpoints") is None


def test_a_logger_that_is_not_installed_is_refused_before_any_work(recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(ConfigError, match=r"training\.report_to names clearml, which is not installed"):
        train(with_training(recipe(), report_to=("clearml",)), quiet)
    assert not recipe().training.output.exists()


def test_clips_that_are_too_long_for_the_model_are_refused(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "_limit", lambda *_: 20)
    with pytest.raises(TrainingError, match=r"a clip takes \d+ tokens, and the model 20: look at fewer frames"):
        train(recipe(), quiet)
