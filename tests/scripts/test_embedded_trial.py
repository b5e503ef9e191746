"""python -m pytest tests/scripts/test_embedded_trial.py"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from paths import SAMPLES, SCRIPTS

from lmm_qa.files.tables import Row, write_rows


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


def write_split(folder: Path, repositories: list[str], seed: int) -> None:
    """Three sources of each repository, seven copies of each; the first of eight features is the quality with noise."""
    rng = np.random.default_rng(seed)
    causes: list[list[str]] = [[], ["blur"], ["stall"], ["noise"], ["seam"], ["face_warp"], ["defocus"]]
    rows: list[Row] = [
        {"clip": f"{one}{number}--{cause}.mp4", "source": f"{one}__{number}.mp4", "causes": cause, "mos": quality}
        for one in repositories for number in range(3)
        for cause, quality in zip(causes, rng.uniform(1, 5, len(causes)).tolist(), strict=True)
    ]  # fmt: skip
    folder.mkdir(parents=True)
    write_rows(folder / "labels.jsonl", rows)
    features = rng.normal(size=(len(rows), 8))
    features[:, 0] = np.array([row["mos"] for row in rows]) + rng.normal(0, 0.2, len(rows))
    np.savez(folder / "features.npz", clips=[row["clip"] for row in rows], names=list("abcdefgh"), features=features)


def test_quality_is_predicted_for_repositories_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from embedded import trial

    write_split(tmp_path / "data/train", [f"train{letter}" for letter in "abcdef"], 1)
    write_split(tmp_path / "data/val", ["val"], 2)
    monkeypatch.setattr(trial, "network_is_installed", lambda: False)
    monkeypatch.setattr(sys, "argv", ["trial", "--data", f"{tmp_path}/data", "--out", f"{tmp_path}/out/trial.json"])
    trial.main()
    assert "skipped the network" in capsys.readouterr().out
    report = json.loads((tmp_path / "out/trial.json").read_text())
    assert report["copies"]["train"] == {"copies": 126, "sources": 18, "repositories": 6}
    assert set(report["srcc"]) == {"cross-validation", "val"}
    for sizes in report["srcc"].values():
        for measures in sizes["all"].values():
            assert measures["all"] > 0.9
            assert measures["head, within sources"] != measures["all, within sources"]


def test_the_repository_is_read_from_the_name_of_the_source() -> None:
    from embedded.trial import repository

    names = {
        "fantasy-talking__15-1.mp4": "fantasy-talking",
        "KwaiVGI__LivePortrait__e4a25d61.mp4": "liveportrait",
        "clip__KwaiVGI__LivePortrait__e4a25d61.mp4__1.mp4": "liveportrait",
        "clip__LivePortrait__s18.mp4__1.mp4": "liveportrait",
        "portrait__AniTalker__Einstein.png__0.mp4": "anitalker",
        "alone.mp4": "alone.mp4",
    }
    assert {name: repository(name) for name in names} == names


def test_the_pictures_of_a_copy() -> None:
    from embedded.trial import centre, read_pictures, whole

    pictures = read_pictures(SAMPLES / "astronaut_clean.mp4")
    assert pictures.shape == (2, 4, 224, 224, 3)
    assert pictures.dtype == np.uint8
    neighbours, apart = (np.abs(pictures[0, 0].astype(int) - pictures[0, other]).mean() for other in (1, 2))
    assert neighbours < apart
    small = np.zeros((100, 50, 3), np.uint8)
    assert centre(small).shape == whole(small).shape == (224, 224, 3)
