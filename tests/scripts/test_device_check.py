"""python -m pytest tests/scripts/test_device_check.py

The check of a GPU, at tiny size on the CPU. `scripts/device_check.sh --dry-run` runs all of its stages.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from paths import SCRIPTS


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.mark.slow
def test_stages_run_on_the_cpu(tmp_path: Path) -> None:
    command = ["sh", str(SCRIPTS / "device_check.sh"), "--dry-run", "-o", str(tmp_path), "--stages"]
    stages = ["environment", "flash_attention_7b", "lora_7b"]
    environment = {**os.environ, "PYTHON": sys.executable}
    subprocess.run([*command, ",".join(stages)], check=True, env=environment, capture_output=True, timeout=200)
    records = json.loads((tmp_path / "summary.json").read_text())
    assert list(records) == stages
    assert all(json.loads((tmp_path / f"{name}.json").read_text()) == records[name] for name in stages)
    assert records["environment"]["result"]["packages"]["torch"]
    assert records["flash_attention_7b"]["status"] in ("not available", "measured")
    training = records["lora_7b"]["result"]
    assert training["measured"]["seconds"].keys() == {"pixels", "cached"}
    assert not training["vision_tower"]["output_requires_grad"], "the vision tower is frozen"
    assert "estimated by the dry run" in (tmp_path / "summary.md").read_text()


def test_a_stage_that_hangs_or_crashes_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import device_check

    monkeypatch.setattr(device_check, "GRACE", 0)
    programs = {"embedded": "raise SystemExit(3)", "rating_2b": "import time; time.sleep(60)"}
    start = subprocess.Popen

    def child(command: list[str]) -> subprocess.Popen[bytes]:
        return start([sys.executable, "-c", programs[command[command.index("--stages") + 1]]])

    monkeypatch.setattr(subprocess, "Popen", child)
    args = argparse.Namespace(output=tmp_path, clips=1, dry_run=True)
    names = ["embedded", "rating_2b", "rating_qwen3_vl_4b"]
    device_check.run_all(names, args, tmp_path, time.time() + 2)
    records = json.loads((tmp_path / "summary.json").read_text())
    assert [(name, each["status"], each["reason"]) for name, each in records.items()] == [
        ("embedded", "failed", "its process ended with exit code 3"),
        ("rating_2b", "failed", "still running when the time was up"),
        ("rating_qwen3_vl_4b", "left out", "the time was up"),
    ]
