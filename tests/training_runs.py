"""Short training runs and what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmm_qa.training.config import TrainingConfig

PERSONS, CLIPS = 12, 4

MakeConfig = Callable[..., TrainingConfig]

DESCRIBED = [{"path": "described.jsonl", "scale": [1, 5]}]


def curve(folder: Path, part: str = "loss") -> dict[int, float]:
    """The loss of each step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [(row["step"], row[part]) for row in rows if "loss" in row]
    assert [step for step, _ in losses] == list(range(1, len(losses) + 1)), "one row per step"
    return dict(losses)


def quiet(_: str) -> None:
    """Discards log lines."""


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
