"""python -m pytest tests/evaluation/test_evaluate.py"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import pearsonr, spearmanr

from lmm_qa.errors import ManifestError, ScoresError
from lmm_qa.evaluation.evaluate import Evaluation, evaluate, plot, render, write
from lmm_qa.evaluation.labels import Label, Score, read_labels, read_scores
from lmm_qa.evaluation.metrics import METRICS, SRCC_WITHIN

GENERATORS = ("wavlip", "sadtalker", "eat")


def thqa_labels(n: int = 90, pid: int = 1) -> list[Label]:
    """Clips with THQA names by three generators, each much better than the one before."""
    rng = np.random.default_rng(pid)
    names = [f"{pid}_flux_common_voice_en_{number}_{GENERATORS[number % 3]}.mp4" for number in range(n)]
    return [Label(name, float(1 + place % 3 + rng.uniform(-1, 1)), ("2d", pid)) for place, name in enumerate(names)]


def ratings(labels: Sequence[Label], noise: float = 0.3, seed: int = 0, **more: Any) -> list[Score]:
    rng = np.random.default_rng(seed)
    return [Score(f"clips/{label.clip}", label.mos + rng.normal(0, noise), **more) for label in labels]


def printed(evaluation: Evaluation, width: int = 80) -> str:
    output = io.StringIO()
    render(evaluation, Console(file=output, width=width, markup=False))
    return output.getvalue()


# --- comparisons -----------------------------------------------------------------------------------------------------


def test_unmatched_clips_are_counted_and_named() -> None:
    labels = thqa_labels()
    scores = [Score("new.mp4", 1.0), Score(labels[0].clip, None, "ClipTruncated: x"), *ratings(labels)[2:]]
    found = evaluate(scores, labels, resamples=20)
    assert not found.complete
    assert found.n == 88
    assert (found.failed, found.missing, found.extra) == ((labels[0].clip,), (labels[1].clip,), ("new.mp4",))
    assert printed(found, 300).splitlines()[:4] == [
        "88 clips have a score and a MOS",
        f"Labelled, but could not be rated: 1 ({labels[0].clip})",
        f"Labelled, but not in the ratings: 1 ({labels[1].clip})",
        "Rated without a label: 1 (new.mp4)",
    ]


def test_a_rater_that_only_recognises_the_generator_has_no_srcc_within() -> None:
    labels = thqa_labels()
    scores = [Score(label.clip, float(place % 3)) for place, label in enumerate(labels)]
    found = evaluate(scores, labels, prior=thqa_labels(pid=2), resamples=100)
    assert found.metrics["main"].value > 0.7
    assert found.metrics[SRCC_WITHIN].value == 0
    assert found.prior is not None
    assert found.prior.margin["srcc"].value == pytest.approx(0, abs=1e-9)
    group = found.by_generator["2d/eat"]
    assert (group.metrics, group.undefined) == (None, "all 30 score values are 2: no correlation is defined")
    assert "all 30 score values" in " ".join(printed(found, 200).split())


def test_other_datasets_have_no_classes_and_no_prior() -> None:
    labels = [Label(f"{number}.mp4", label.mos, number) for number, label in enumerate(thqa_labels())]
    found = evaluate(ratings(labels), labels, resamples=20)
    assert (found.by_class, found.by_generator, set(found.metrics)) == ({}, {}, set(METRICS))
    with pytest.raises(ManifestError, match=r"'0.mp4' is not a file name of THQA-NTIRE"):
        evaluate(ratings(labels), labels, prior=thqa_labels(), resamples=20)


def test_a_prior_from_the_test_set_is_refused() -> None:
    labels = thqa_labels()
    with pytest.raises(ScoresError, match=r"the prior's labels contain 90 of the clips to evaluate on \(1_flux"):
        evaluate(ratings(labels), labels, prior=labels, resamples=20)


def test_two_raters_are_compared_on_the_clips_of_both() -> None:
    labels = thqa_labels()
    worse = ratings(labels, noise=1.5, seed=3)[10:]
    found = evaluate(ratings(labels), labels, against=worse, against_name="old.jsonl", resamples=200)
    assert found.against is not None
    assert (found.n, found.against.n, found.against.name) == (90, 80, "old.jsonl")
    assert found.against.margin["main"].low > 0
    assert "the ratings are ahead of old.jsonl on 80 clips" in " ".join(printed(found).split())
    assert max(len(line) for line in printed(found).splitlines()) <= 80
    assert "margin of the ratings" in printed(found)
    swapped = evaluate(worse, labels, against=ratings(labels), resamples=200)
    assert swapped.against is not None
    assert swapped.against.margin["main"].value == pytest.approx(-found.against.margin["main"].value)
    assert "the ratings are behind the other ratings" in " ".join(printed(swapped).split())


def test_a_comparison_needs_metrics_of_the_other_rater() -> None:
    labels = thqa_labels()
    constant = [Score(label.clip, 3.0) for label in labels]
    with pytest.raises(ScoresError, match=r"cannot compare with old: all 90 score values are 3"):
        evaluate(ratings(labels), labels, against=constant, against_name="old", resamples=20)
    with pytest.raises(ScoresError, match=r"old scores 4 of these clips: at least 5 are needed"):
        evaluate(ratings(labels), labels, against=ratings(labels[:4]), against_name="old", resamples=20)


def test_clips_of_the_calibration_are_refused() -> None:
    labels = thqa_labels()
    scores = [*ratings(labels[:3], calibrated=True, fitted=True), *ratings(labels[3:], calibrated=True)]
    with pytest.raises(ScoresError, match="the calibration of these ratings was fitted on 3 of the 90 clips"):
        evaluate(scores, labels)
    assert evaluate(scores, labels[3:], resamples=20).n == 87


def test_coverage_of_the_prediction_intervals() -> None:
    labels = thqa_labels()
    held = [Score(label.clip, label.mos + place % 2, interval=(label.mos + place % 2 - 0.5, 9.0))
            for place, label in enumerate(labels)]  # fmt: skip
    found = evaluate(held, labels, resamples=20)
    assert found.coverage == 0.5
    assert "50.0% of the MOS lie inside" in printed(found, 200)
    assert evaluate(ratings(labels), labels, resamples=20).coverage is None


# --- JSON and plot ---------------------------------------------------------------------------------------------------


def test_json_output(tmp_path: Path) -> None:
    labels = thqa_labels()
    found = evaluate(ratings(labels), labels, against=ratings(labels, seed=1), resamples=20)
    write(found, tmp_path / "m.json")
    read = json.loads((tmp_path / "m.json").read_text())
    assert read["metrics"]["main"]["value"] == found.metrics["main"].value
    assert read["by_generator"]["2d/eat"]["metrics"]["srcc"]["high"] <= 1
    assert (read["n"], read["missing"], read["prior"], read["against"]["n"]) == (90, [], None, 90)
    with pytest.raises(ScoresError, match="cannot write"):
        write(found, tmp_path / "gone" / "m.json")


def test_the_plot_shows_each_clip_and_is_reproducible(tmp_path: Path) -> None:
    labels = thqa_labels()
    scores = ratings(labels)
    found = evaluate(scores, labels, resamples=20)
    for name in ("one.svg", "two.svg"):
        plot(scores, labels, found, tmp_path / name)
    text = (tmp_path / "one.svg").read_text()
    assert text == (tmp_path / "two.svg").read_text()
    root = ElementTree.fromstring(text)
    assert [len(group.findall("{*}g/{*}use")) for group in root.findall(".//{*}g[@id='clips-2d']")] == [90]
    assert f"main {found.metrics['main'].value:.4f}" in text
    with pytest.raises(ScoresError, match=r"a plot is written as \.svg, received .*p\.png"):
        plot(scores, labels, found, tmp_path / "p.png")
    with pytest.raises(ScoresError, match="cannot write"):
        plot(scores, labels, found, tmp_path / "gone" / "p.svg")


# --- a set with all three classes ------------------------------------------------------------------------------------


def three_classes(pid: int, seed: int) -> list[Label]:
    """72 clips of 2d by three generators, 24 of v1 by one, 15 of 3d with three distortions."""
    rng = np.random.default_rng(seed)
    v1 = [f"{pid}_voice_en_{number}_makeittalk.mp4" for number in range(24)]
    distortions = ("qp_level", "pause_start", "audio_lead")
    scans = [f"{pid}_SEN_a_b_{distortions[number % 3]}_{number}.mp4" for number in range(15)]
    mos = rng.uniform(1, 4, 39).tolist()
    others = [Label(clip, value, clip) for clip, value in zip(v1 + scans, mos, strict=True)]
    return [*thqa_labels(72, pid), *others]


def test_metrics_of_a_set_with_all_classes() -> None:
    labels = three_classes(1, seed=0)
    scores = ratings(labels, noise=0.8)
    found = evaluate(scores, labels, prior=three_classes(2, seed=1), resamples=200)
    x, y = np.array([score.value for score in scores]), np.array([label.mos for label in labels])
    assert found.complete and found.n == 111
    assert found.metrics["srcc"].value == pytest.approx(spearmanr(x, y).statistic)
    assert found.metrics["plcc"].value == pytest.approx(pearsonr(x, y).statistic)
    assert found.metrics["plcc_fit"].value == pytest.approx(pearsonr(found.logistic(x), y).statistic, abs=1e-6)
    assert {name: subset.n for name, subset in found.by_class.items()} == {"2d": 72, "3d": 15, "v1": 24}
    assert all(set(subset.metrics or ()) == set(METRICS) for subset in found.by_class.values())
    assert {name: subset.n for name, subset in found.by_generator.items()} == {
        **{f"2d/{name}": 24 for name in GENERATORS},
        **{f"3d/{name}": 5 for name in ("audio_lead", "pause_start", "qp_level")},
        "v1/makeittalk": 24,
    }
    large = [subset for subset in found.by_generator.values() if subset.n > 20]
    generators = [subset.metrics["srcc"].value for subset in large if subset.metrics]
    assert np.mean(generators) == pytest.approx(found.metrics[SRCC_WITHIN].value)
    assert found.prior is not None
    margin = found.prior.margin
    assert margin["main"].value == pytest.approx(found.metrics["main"].value - found.prior.metrics["main"].value)
    assert margin[SRCC_WITHIN].low > 0
    assert max(len(line) for line in printed(found).splitlines()) <= 80


# --- the published baseline ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def baseline(shared_dir: Path) -> Evaluation:
    folder = shared_dir / "thqa"
    scores, labels = read_scores(folder / "baseline_output.txt"), read_labels(folder / "thqa_ntire_val.csv")
    return evaluate(scores, labels, prior=read_labels(folder / "thqa_ntire_train.csv"), resamples=200)


def test_the_baseline_has_its_published_metrics(baseline: Evaluation) -> None:
    found = {name: round(interval.value, 4) for name, interval in baseline.metrics.items()}
    assert baseline.complete
    assert (baseline.n, found["srcc"], found["plcc"]) == (1714, 0.7702, 0.8065)
    assert (found["plcc_fit"], found["main"]) == (0.8081, 0.7892)
    assert found[SRCC_WITHIN] == pytest.approx(0.30, abs=0.005)

    assert {name: subset.n for name, subset in baseline.by_class.items()} == {"2d": 1534, "3d": 100, "v1": 80}
    assert len(baseline.by_generator) == 14 + 8 + 7
    assert sum(subset.n for subset in baseline.by_generator.values()) == 1714
    assert all(set(subset.metrics or ()) == set(METRICS) for subset in baseline.by_class.values())
    generators = [
        subset.metrics["srcc"].value
        for name, subset in baseline.by_generator.items()
        if name[:2] == "2d" and subset.metrics
    ]
    assert np.mean(generators) == pytest.approx(baseline.metrics[SRCC_WITHIN].value)


def test_the_prior_is_as_good_as_the_baseline_except_within_generators(baseline: Evaluation) -> None:
    assert baseline.prior is not None
    assert baseline.prior.metrics["main"].value >= 0.78
    margin = baseline.prior.margin
    assert margin["main"].low < 0 < margin["main"].high
    assert margin[SRCC_WITHIN].low > 0
    assert margin["main"].value == pytest.approx(baseline.metrics["main"].value - baseline.prior.metrics["main"].value)

    text = printed(baseline)
    for expected in ("0.7702 [", "0.8065 [", "0.7892 [", "0.7847", "name-only prior", "2d/wavlip"):
        assert expected in text
    assert "the ratings are not distinguishable from name-only prior on 1714 clips" in " ".join(text.split())
    assert "55 training clips (wavlip) show 2d 14" in " ".join(text.split())
    assert max(len(line) for line in text.splitlines()) <= 80


# --- the command -----------------------------------------------------------------------------------------------------


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lmm_qa", "evaluate", *map(str, arguments)], capture_output=True, text=True
    )


def test_the_command(tmp_path: Path) -> None:
    labels = thqa_labels()
    (tmp_path / "l.csv").write_text("Video,Score\r\n" + "".join(f"{label.clip},{label.mos}\r\n" for label in labels))
    (tmp_path / "r.txt").write_text("".join(f"{score.clip},{score.value}\n" for score in ratings(labels)[1:]))
    done = command(tmp_path / "r.txt", tmp_path / "l.csv", "--plot", tmp_path / "s.svg", "-o", tmp_path / "m.json")
    assert done.returncode == 3, done.stderr
    assert "89 clips have a score and a MOS Labelled, but not in the ratings: 1" in " ".join(done.stdout.split())
    assert json.loads((tmp_path / "m.json").read_text())["n"] == 89
    assert (tmp_path / "s.svg").exists()


def test_the_command_reports_an_error_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("clip,mos\n" + "".join(f"{n}.mp4,{n}\n" for n in range(9)))
    (tmp_path / "r.txt").write_text("".join(f"{n}.mp4,3\n" for n in range(9)))
    done = command(tmp_path / "r.txt", tmp_path / "l.csv")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: all 9 score values are 3: no correlation is defined\n"
    (tmp_path / "r.txt").unlink()
    missing = command(tmp_path / "r.txt", tmp_path / "l.csv")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert "r.txt: No such file or directory" in missing.stderr
