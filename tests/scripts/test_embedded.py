"""python -m pytest tests/scripts/test_embedded.py

The scripts that make the embedded model: single steps, then the whole experiment at tiny size.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from clips import ffmpeg
from paths import SAMPLES, SCRIPTS
from PIL import Image

from lmm_qa import Rater
from lmm_qa.defects.calibration import DefectCalibration
from lmm_qa.files.tables import read_rows, write_rows
from lmm_qa.ratings.rows import Details


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


# --- calibration of the defect profile -------------------------------------------------------------------------------


def synthetic_copies(sources: int, answers_help: bool) -> tuple[Any, Any, Any, list[str]]:
    """Log-odds of a classifier that is often right, labels and log-odds of answers of fifty copies of each source; and
    the sources."""
    rng = np.random.default_rng(4)
    present = rng.random(50 * sources) < 0.3
    measured = 2.0 * present - 1.5 + rng.normal(0, 1.2, len(present))
    odds = (1.5 * present if answers_help else 0.0) + rng.normal(0, 1, len(present))
    return measured, present, odds, [f"clip {number}" for number in range(sources) for _ in range(50)]


def test_without_helpful_answers_the_calibration_is_logistic_regression_on_all_copies() -> None:
    from embedded.calibration import fit_defect
    from sklearn.linear_model import LogisticRegression

    measured, present, _, _ = synthetic_copies(8, answers_help=False)
    found = fit_defect(measured, present, np.zeros(len(present), bool), np.array([]), [])
    expected = LogisticRegression(tol=1e-8).fit(measured[:, None], present)
    assert found.slope == 0
    assert (found.measured, found.intercept) == pytest.approx((expected.coef_[0, 0], expected.intercept_[0]), abs=2e-3)


@pytest.mark.parametrize("offset", [0.0, 2.0])
@pytest.mark.parametrize("answers_help", [True, False])
def test_answers_count_where_they_help_on_sources_left_out(answers_help: bool, offset: float) -> None:
    """A classifier that is off for the copies with answers does not make the answers count."""
    from embedded.calibration import fit_defect
    from sklearn.metrics import average_precision_score, f1_score

    measured, present, odds, groups = synthetic_copies(12, answers_help)
    asked = np.arange(len(present)) < 300
    measured = measured + offset * asked
    found = fit_defect(measured, present, asked, odds[asked], groups[:300])
    assert (found.slope > 0) == answers_help
    used = asked if answers_help else np.ones(len(present), bool)
    answers = odds[used] if answers_help else 0.0
    p = 1 / (1 + np.exp(-(found.slope * answers + found.measured * measured[used] + found.intercept)))
    assert found.average_precision == pytest.approx(average_precision_score(present[used], p), abs=1e-3)
    best = max(f1_score(present[used], p >= limit) for limit in np.linspace(0.25, 0.95, 71))
    assert f1_score(present[used], p >= found.threshold - 1e-4) >= best - 1e-9


# --- the whole experiment --------------------------------------------------------------------------------------------


def test_the_training_table_says_nothing_about_defects_that_its_sources_cannot_show(tmp_path: Path) -> None:
    """The lips of a photograph do not move; a landscape has no head."""
    from embedded.data import HEAD_DEFECTS, Segment, write_table

    segments = [Segment(Path("a.mp4"), "clip", 0), Segment(Path("b.jpg"), "portrait", 0),
                Segment(Path("c.jpg"), "picture", 0)]  # fmt: skip
    by_name = {segment.path(tmp_path).name: segment for segment in segments}
    rows = [{"clip": f"{number}.mp4", "source": name, "mos": 3.0, "explanation": "fair", "defects": ["blur", "?mouth"]}
            for number, name in enumerate(by_name)]  # fmt: skip
    write_rows(tmp_path / "labels.jsonl", rows)
    write_table(tmp_path, by_name)
    clip, portrait, picture = read_rows(tmp_path / "table.jsonl")
    assert clip == {"clip": "0.mp4", "mos": 3.0, "group": "a.mp4", "defects": ["blur", "?mouth"], "explanation": "fair"}
    assert portrait["defects"] == ["blur", "?mouth", "?lips"] and portrait["group"] == "b.jpg"
    assert sorted(picture["defects"]) == sorted(["blur", *(f"?{name}" for name in HEAD_DEFECTS)])
    assert picture["explanation"] is None


def test_variants_show_the_same_as_their_originals(tmp_path: Path) -> None:
    from embedded.data import add_variants

    from lmm_qa.degrade.dataset import read_clip

    names = [f"{number}.mp4" for number in range(6)]
    for name in names:
        shutil.copyfile(SAMPLES / "avatar_clean.mp4", tmp_path / name)
    write_rows(tmp_path / "table.jsonl", [{"clip": name, "mos": 3.5, "group": "a", "defects": ["blur"],
                                           "explanation": "It is fair."} for name in names])  # fmt: skip
    add_variants(tmp_path, 1.0, 1)
    rows = read_rows(tmp_path / "table.jsonl")
    originals, variants = rows[:6], rows[6:]
    assert [row["same_as"] for row in rows] == 2 * names and len(variants) == 6
    assert [row["explanation"] for row in originals] == ["It is fair."] * 6
    assert all(row["explanation"] is None and row["mos"] == 3.5 and row["defects"] == ["blur"] for row in variants)
    kinds = {row["clip"].rpartition("__")[2] for row in variants}
    assert len(kinds) >= 2 and kinds <= {"mirrored.mp4", "trimmed.mp4", "encoded.mp4"}
    clean, _, _ = read_clip(tmp_path / "0.mp4", 60)
    for row in variants:
        frames, _, _ = read_clip(tmp_path / row["clip"], 60)
        cut = len(clean) // 20 if "trimmed" in row["clip"] else 0
        expected = (
            clean[cut : len(clean) - cut, :, ::-1] if "mirrored" in row["clip"] else clean[cut : len(clean) - cut]
        )
        assert frames.shape == expected.shape
        assert np.abs(frames.astype(int) - expected).mean() < 3
    before = (tmp_path / "table.jsonl").read_bytes()
    add_variants(tmp_path, 0.0, 1)
    assert len(read_rows(tmp_path / "table.jsonl")) == len(before.splitlines())


def test_patches_are_those_of_the_processor() -> None:
    import torch
    from embedded.vision import patchify
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    frames = torch.randint(256, (2, 4, 112, 84, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    half = [0.5, 0.5, 0.5]
    processor = Qwen2VLVideoProcessor(image_mean=half, image_std=half, cap_pixels_per_frame=False)
    expected = processor([clip.permute(0, 3, 1, 2) for clip in frames], do_resize=False, return_tensors="pt")
    patches, grid = patchify(frames)
    assert torch.allclose(patches, expected["pixel_values_videos"], atol=1e-5)
    assert torch.equal(grid, expected["video_grid_thw"])


def tiny_settings() -> dict[str, Any]:
    """model.yaml, as small as every step allows."""
    settings: dict[str, Any] = yaml.safe_load((SCRIPTS / "embedded" / "model.yaml").read_text())
    settings["vision"] |= {"depth": 1, "embed_dim": 48, "num_heads": 2}
    settings["text"] |= {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
                         "num_key_value_heads": 1, "mrope_section": [4, 6, 6]}  # fmt: skip
    settings["data"] |= {"strengths": [[], [[0.8]]], "val_strengths": [[0.4, 0.8]], "test_strengths": [[0.4, 0.8]],
                         "causes": ["blur", "stall"], "cause_groups": 1, "pairs": 0, "length": 1.0,
                         "variants": 0.3, "val_round": 1}  # fmt: skip
    settings["vision_phase"] |= {"max_steps": 2, "batch_size": 2, "eval_steps": 1}
    settings["joint_phase"] = ["training.epochs=0.7", "training.batch_size=2", "training.eval_steps=2",
                               "augmentation.temporal_offsets=1"]  # fmt: skip
    settings["adapter_phase"] = settings["joint_phase"]
    settings["classifier"] |= {"n_estimators": 5, "features": 20}
    return settings


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_command_makes_a_rater_on_two_machines_and_does_nothing_twice(tmp_path: Path) -> None:
    import skimage.data

    clips, portraits, work = tmp_path / "clips", tmp_path / "portraits", tmp_path / "work"
    clips.mkdir()
    portraits.mkdir()
    splits = {"train": "astronaut_clean", "val": "avatar_clean", "test": "astronaut_noise_mild"}
    for split, name in splits.items():  # in half their size: every frame of every copy is measured
        ffmpeg("-i", SAMPLES / f"{name}.mp4", "-vf", "scale=iw/2:ih/2", clips / f"{split}.mp4")
    index = [f"{split}.mp4,me/{split},{split}" for split in splits]
    (clips / "index.csv").write_text("\n".join(["clip,repository,split", *index, ""]))
    photograph: Any = skimage.data.astronaut
    Image.fromarray(photograph()).resize((256, 256)).save(portraits / "portrait.png")
    (portraits / "index.csv").write_text("image,repository\nportrait.png,me/other\nmissing.png,me/test\n")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_settings()))
    make = [sys.executable, str(SCRIPTS / "embedded" / "make.py"), "--config", str(tmp_path / "tiny.yaml")]
    command = [*make, "--clips", str(clips), "--portraits", str(portraits), "--work", str(work)]
    archive, gpu = tmp_path / "data.tar", tmp_path / "gpu"
    subprocess.run([*command, "--archive", str(archive)], check=True)
    assert not (work / "base").exists()
    subprocess.run([*make, "--archive", str(archive), "--work", str(gpu)], check=True)
    for split in ("train", "val"):
        copies = sorted(path.name for path in (work / "data" / split).glob("*.mp4"))
        kinds = {name.rpartition("__")[2] for name in copies}
        assert len(copies) >= 5 and bool(kinds & {"mirrored.mp4", "trimmed.mp4", "encoded.mp4"}) == (split == "train")
        for name in copies:
            assert (gpu / "data" / split / name).read_bytes() == (work / "data" / split / name).read_bytes()
    for name in ("base", "vision", "joint", "adapter", "model", "answers.jsonl", "steps.jsonl"):
        (gpu / name).rename(work / name)
    files = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file() and path.name != "steps.jsonl"}
    last = subprocess.run(command, check=True, capture_output=True, text=True)
    assert files.items() <= {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}.items()
    *earlier, evaluation = [json.loads(line)["step"] for line in (work / "steps.jsonl").read_text().splitlines()]
    assert evaluation == "evaluate"
    assert [line for line in last.stdout.splitlines() if line.endswith(": done")] == [f"{one}: done" for one in earlier]

    rater = Rater.from_pretrained(work / "model" / "adapter")
    rating = rater.rate(SAMPLES / "avatar_clean.mp4", details=Details(defects=True, explanation=True))
    assert rating.adapter is not None and 1 <= rating.score <= 5 and rating.explanation
    calibration = DefectCalibration.read(work / "model" / "adapter" / "defects.json")
    assert calibration.defects.keys() <= {"blur", "stall"} and calibration.defects
    report = json.loads((work / "report.json").read_text())
    assert report["copies"] == 5 and report["raters"]["new"]["failed"] == {}
    values = {(one["section"], one["measure"]): one["values"]["new"]["value"] for one in report["measures"]}
    assert values["Profile: average precision", "mean over the defects"] == pytest.approx(
        np.mean([values["Profile: average precision", defect] for defect in ("blur", "stall")]), abs=1e-4
    )
    assert values["Sameness", "remuxed: largest change"] < 0.001
    assert {("Sameness", "phase: largest change"), ("Explanations", "recall")} <= values.keys()
    phases = json.loads((work / "model" / "adapter" / "rater.json").read_text())["training"]["phases"]
    assert phases["adapter"]["clips"] == {"train": 8, "validation": 5, "calibration": 0}  # two variants
