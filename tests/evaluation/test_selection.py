"""python -m pytest tests/evaluation/test_selection.py"""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paths import SAMPLES
from sklearn.linear_model import Ridge
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from typer.testing import CliRunner

from lmm_qa.cli.app import app
from lmm_qa.errors import ScoresError, UsageError
from lmm_qa.evaluation.labels import read_labels
from lmm_qa.evaluation.selection import (
    choose_clips,
    clip_groups,
    disagreement,
    fair_share,
    features,
    k_centre,
    ranks,
    uncertainty,
)
from lmm_qa.files.tables import Row, read_rows, write_rows
from lmm_qa.manifest import content_id


def ratings(n: int = 60, seed: int = 0) -> list[Row]:
    """Ratings whose defects predict the score, but for the last clip."""
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for number in range(n):
        blur, noise = rng.uniform(0, 1, 2)
        score = 5 - 2 * blur - 2 * noise + rng.normal(0, 0.05)
        rows.append(
            {
                "clip": f"p{number % 6}_{number}.mp4",
                "score": float(score),
                "std": float(rng.uniform(0.5, 1)),
                "probabilities": {"bad": 1 - score / 5, "excellent": score / 5},
                "defects": {"blur": float(blur), "noise": float(noise), "lip_sync": None},
                "found": [],
                "error": None,
            }
        )
    rows[-1]["score"] = 1.0 if rows[-1]["score"] > 3 else 5.0
    return rows


def names(rows: list[Row], number: int) -> list[str]:
    return [each.row["clip"] for each in choose_clips(rows, number, clip_groups(rows, r"^(p\d)_"))]


def test_the_choice_is_deterministic_and_independent_of_the_order() -> None:
    rows = ratings()
    assert names(rows, 20) == names(rows[::-1], 20)
    assert len(set(names(rows, 60))) == 60


def test_groups_have_a_fair_share() -> None:
    chosen = Counter(name[:2] for name in names(ratings(), 12))
    assert chosen == dict.fromkeys(["p0", "p1", "p2", "p3", "p4", "p5"], 2)


@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=30), st.data())
def test_the_share_is_the_smallest_that_suffices(groups: list[str], data: st.DataObject) -> None:
    number = data.draw(st.integers(1, len(groups)))
    sizes = Counter(groups).values()
    share = fair_share(groups, number)
    assert sum(min(size, share) for size in sizes) >= number
    assert sum(min(size, share - 1) for size in sizes) < number
    chosen = k_centre(np.arange(len(groups), dtype=np.float64)[:, None], number, np.ones(len(groups)), groups)
    assert len(set(chosen)) == number
    assert max(Counter(groups[at] for at in chosen).values()) <= share


def test_k_centre_covers_clusters_before_it_repeats_one() -> None:
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.array([[0.0, 0], [10, 0], [0, 10], [10, 10]]), 25, axis=0)
    points = (clusters + rng.normal(0, 0.1, clusters.shape)).astype(np.float64)
    chosen = k_centre(points, 4, np.ones(100), [str(at) for at in range(100)])
    assert {at // 25 for at in chosen} == {0, 1, 2, 3}
    heavy = np.where(np.arange(100) == 99, 100.0, 1.0)
    assert 99 in k_centre(points, 2, heavy, [str(at) for at in range(100)])


def test_a_clip_that_contradicts_its_defects_is_chosen_early() -> None:
    rows = ratings()
    contrary = disagreement(rows)
    assert contrary is not None
    assert np.argmax(contrary) == len(rows) - 1
    assert rows[-1]["clip"] in names(rows, 12)


def test_disagreement_is_leave_one_out_ridge_regression() -> None:
    rows = ratings()
    table = np.array([[row["defects"]["blur"], row["defects"]["noise"]] for row in rows])
    table = (table - table.mean(axis=0)) / table.std(axis=0)
    scores = np.array([row["score"] for row in rows])
    predicted = cross_val_predict(Ridge(1.0), table, scores, cv=LeaveOneOut())
    assert disagreement(rows) == pytest.approx(np.abs(scores - predicted))


def test_ratings_without_profiles_or_with_intervals() -> None:
    rows = [{**row, "defects": None, "interval": [1.0, 1.0 + row["std"]]} for row in ratings()]
    assert disagreement(rows) is None
    assert uncertainty(rows) == pytest.approx([row["std"] for row in rows])
    assert features(rows).shape == (60, 3)
    assert len(names(rows, 10)) == 10
    with pytest.raises(ScoresError, match="neither interval nor std"):
        uncertainty([{**row, "std": None} for row in ratings()])


def test_equal_clips_can_be_chosen() -> None:
    rows = [{**ratings()[0], "clip": f"{number}.mp4"} for number in range(5)]
    assert len(choose_clips(rows, 3, clip_groups(rows))) == 3
    assert ranks(np.array([2.0, 2.0])) == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("number", [0, 61])
def test_a_number_that_is_not_there(number: int) -> None:
    with pytest.raises(ScoresError, match="request 1 to 60"):
        names(ratings(), number)


def test_groups_of_clips() -> None:
    rows: list[Row] = [{"clip": "14_dalle3_common_voice_en_35729059_audio2head.mp4"}, {"clip": "x.mp4", "who": 3}]
    assert clip_groups(rows) == ["2d/14", "x.mp4"]
    assert clip_groups(rows[1:], "who") == ["3"]
    for group, problem in (("who", "has no group"), (r"^(\d+)_", "'x.mp4' has no group"), ("(", "regular expression")):
        with pytest.raises(UsageError, match=problem):
            clip_groups(rows, group)
    with pytest.raises(UsageError, match="has no group"):
        clip_groups(rows, "(?:x)")


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def rated_samples(tmp_path: Path) -> Path:
    """Three samples with made-up ratings, one of which failed, and the file of their ratings."""
    (tmp_path / "clips").mkdir()
    rows = []
    for number, row in enumerate(ratings(3)):
        file = sorted(SAMPLES.glob("*.mp4"))[number]
        shutil.copy(file, tmp_path / "clips" / row["clip"])
        rows.append({**row, "score": 2.0 + number, "content_id": content_id(file)})
    rows.append({"clip": "broken.mp4", "score": None, "error": {"class": "ClipTruncated", "message": "cut off"}})
    write_rows(tmp_path / "ratings.jsonl", rows)
    return tmp_path / "ratings.jsonl"


def test_select_keeps_and_copies(rated_samples: Path, tmp_path: Path) -> None:
    output, folder = tmp_path / "kept.csv", tmp_path / "clean"
    command = ["select", str(rated_samples), "--keep", "score >= 3 and not stall", "-o", str(output)]
    done = CliRunner().invoke(app, [*command, "--copy-to", str(folder)])
    assert done.exit_code == 0, done.output
    assert "kept 0 of 4 clips; 1 could not be rated" in done.stderr  # stall was not judged
    assert "unknown for 3" in done.stderr
    command[3] = "score >= 3"
    done = CliRunner().invoke(app, [*command, "--copy-to", str(folder), "--clips", str(tmp_path / "clips")])
    assert done.exit_code == 0, done.output
    assert "copied 2 clips" in done.stderr
    kept = [row["clip"] for row in read_rows(output)]
    assert kept == sorted(path.name for path in folder.iterdir()) == ["p1_1.mp4", "p2_2.mp4"]


def test_select_reports_clips_that_are_not_found(rated_samples: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["select", str(rated_samples), "--keep", "score > 1", "--copy-to", str(tmp_path)])
    assert done.exit_code == 3
    assert "not copied: p0_0.mp4 was not found" in done.stderr


def test_select_chooses_clips_to_label(rated_samples: Path, tmp_path: Path) -> None:
    output = tmp_path / "label_these.csv"
    done = CliRunner().invoke(app, ["select", str(rated_samples), "--to-label", "2", "-o", str(output)])
    assert done.exit_code == 0, done.output
    with output.open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["mos"] for row in table] == ["", ""]
    labelled = tmp_path / "labelled.csv"
    labelled.write_text(output.read_text().replace(".mp4,,", ".mp4,3.5,"))
    assert [(label.mos, label.clip) for label in read_labels(labelled)] == [(3.5, row["clip"]) for row in table]


def test_select_prints_json_lines_in_a_pipe(rated_samples: Path) -> None:
    done = CliRunner().invoke(app, ["select", str(rated_samples), "--keep", "score > 3.5"])
    assert [json.loads(line)["clip"] for line in done.stdout.splitlines()] == ["p2_2.mp4"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "--keep, or a number of clips with --to-label"),
        (["--keep", "score > 1", "-o", "ratings.jsonl"], "would replace the ratings"),
        (["--keep", "score > 1", "-o", "ratings.txt"], "use .jsonl, .csv or .parquet"),
        (["--to-label", "9"], "request 1 to 3"),
    ],
)
def test_select_refuses(
    rated_samples: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], problem: str
) -> None:
    monkeypatch.chdir(rated_samples.parent)
    done = CliRunner().invoke(app, ["select", "ratings.jsonl", *arguments])
    assert done.exit_code == 1
    assert problem in str(done.exception)
