"""python -m pytest tests/test_metric.py"""

from __future__ import annotations

import builtins
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clips import numbered_picture

from lmm_qa import Rater, Sampling, View
from lmm_qa.errors import MissingExtra

torchmetrics = pytest.importorskip("torchmetrics", reason="the extra metrics is not installed")

VIDEOS = torch.from_numpy(
    np.stack([np.stack([numbered_picture(start + n, 64, 48) for n in range(6)]) for start in (0, 40, 80, 120)])
)
"""(4, 6, 48, 64, 3) uint8."""


def small_rater(model: Path) -> Rater:
    return Rater.from_pretrained(
        model, sampling=Sampling(frames=4), views=[View(max_pixels=56 * 56)], device="cpu", dtype="float32"
    )


@pytest.fixture(scope="module")
def rater(family_dir: Callable[[str], Path]) -> Rater:
    return small_rater(family_dir("qwen2_vl"))


def test_the_mean_over_updates_until_a_reset(rater: Rater) -> None:
    from lmm_qa.metric import VideoQuality

    metric = VideoQuality(rater, fps=25)
    scores = rater.reward(VIDEOS, 25)
    metric.update(VIDEOS[:1])
    metric.update(VIDEOS[1:])
    assert metric.compute() == pytest.approx(float(scores.mean()), abs=1e-6)
    assert metric(VIDEOS[2:]) == pytest.approx(float(scores[2:].mean()), abs=1e-6)  # the value of this batch
    metric.reset()
    metric.update(VIDEOS[:1])
    assert metric.compute() == pytest.approx(float(scores[0]), abs=1e-6)
    assert metric.higher_is_better


def test_in_a_collection(rater: Rater) -> None:
    from lmm_qa.metric import VideoQuality

    collection = torchmetrics.MetricCollection({"quality": VideoQuality(rater, fps=25)})
    collection.update(VIDEOS)
    assert collection.compute()["quality"] == pytest.approx(float(rater.reward(VIDEOS, 25).mean()), abs=1e-6)


def test_without_torchmetrics_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "torchmetrics":
            raise ModuleNotFoundError(name)
        return original(name, *rest)

    monkeypatch.delitem(sys.modules, "lmm_qa.metric", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r"pip install 'lmm-qa\[metrics\]'"):
        importlib.import_module("lmm_qa.metric")


RANK = """
import sys
from pathlib import Path
import torch
from test_metric import VIDEOS, small_rater
from lmm_qa.metric import VideoQuality

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
metric = VideoQuality(small_rater(Path(sys.argv[1])), fps=25)
metric.update(VIDEOS[:1] if rank == 0 else VIDEOS[1:])
Path(sys.argv[2], str(rank)).write_text(repr(float(metric.compute())))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_ranks_compute_the_mean_of_all_clips(family_dir: Callable[[str], Path], rater: Rater, tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, str(tmp_path / "rank.py"), str(family_dir("qwen2_vl")), str(tmp_path)]
    paths = {"PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    subprocess.run(command, check=True, env=os.environ | paths, timeout=240)
    expected = float(rater.reward(VIDEOS, 25).mean())
    assert [float((tmp_path / rank).read_text()) for rank in "01"] == pytest.approx([expected] * 2, abs=1e-5)
