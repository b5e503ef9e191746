"""Labelled clips, and runs on them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_runs import CLIPS, PERSONS, MakeConfig

from lmm_qa.degrade.causes import encode
from lmm_qa.training.config import TrainingConfig
from lmm_qa.training.run import train


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


@pytest.fixture(scope="session")
def training_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of most runs: which clips could be decoded, and vision features. Runs of one user share it, too."""
    return tmp_path_factory.mktemp("training_cache")


@pytest.fixture(scope="session")
def make_config_in(labelled: Path, family_dir: Callable[[str], Path], training_cache: Path) -> MakeConfig:
    """Configurations of a short run on a small Qwen2-VL, by the folder that gets its directory `run`; keyword arguments
    override values as section__key=value."""

    def make(folder: Path, **changes: Any) -> TrainingConfig:
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
                "output_dir": str(folder / "run"),
                "cache_dir": str(training_cache),
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


@pytest.fixture
def make_config(make_config_in: MakeConfig, tmp_path: Path) -> MakeConfig:
    """As `make_config_in`, for the folder of the test."""
    return partial(make_config_in, tmp_path)


@pytest.fixture(scope="session")
def tuned(
    labelled: Path, family_dir: Callable[[str], Path], training_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
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
                "cache_dir": str(training_cache),
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
