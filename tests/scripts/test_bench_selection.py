"""python -m pytest tests/scripts/test_bench_selection.py"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from paths import SCRIPTS

from lmm_qa.files.tables import write_rows


def test_each_rule_is_measured_for_both_models(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ratings, labels = [], []
    for number in range(64):
        blur = float(rng.uniform())
        score = 5 - 3 * blur + float(rng.normal(0, 0.3))
        clip, rest = f"{number}.mp4", {"scale": [0.0, 8.0], "rater_id": "r", "error": None}
        ratings.append({"clip": clip, "score": score, "std": 0.5 + blur / 9, "defects": {"blur": blur}, **rest})
        labels.append({"clip": clip, "mos": 5 - 3 * blur, "group": f"source {number % 8}"})
    write_rows(tmp_path / "ratings.jsonl", ratings)
    write_rows(tmp_path / "labels.jsonl", labels)
    command = [sys.executable, str(SCRIPTS / "bench_selection.py"), "ratings.jsonl", "labels.jsonl"]
    done = subprocess.run(
        [*command, "--seeds", "1", "-o", "curves.json"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert set(curves) == {"calibration", "ridge"}
    for rules in curves.values():
        assert {"random", "diversity"} < set(rules)
        assert any(name.startswith("lmm-qa select") for name in rules)
        assert all(set(curve) == {"20", "30"} for curve in rules.values())
    assert curves["ridge"]["random"]["30"][0] < 0.5
    assert "RMSE with the labels of all 32 clips" in done.stdout
