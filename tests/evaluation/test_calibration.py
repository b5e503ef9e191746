"""python -m pytest tests/evaluation/test_calibration.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from lmm_qa.cli.app import app
from lmm_qa.errors import ConfigError, ScoresError
from lmm_qa.evaluation.calibration import (
    MAPPING_FITS,
    calibrate,
    fit_interval,
    fit_isotonic,
    fit_linear,
    fit_logistic,
)
from lmm_qa.evaluation.labels import Label, Pair, Score, join, read_labels, read_scores
from lmm_qa.model.calibration import Calibration, Floats, Logistic4, MappingKind
from lmm_qa.model.rater_config import CALIBRATION_NAME

KINDS = pytest.mark.parametrize("kind", list(MAPPING_FITS))


def pairs(n: int = 400, groups: int = 20, seed: int = 0, **more: Any) -> list[Pair]:
    """Clips whose score is a logistic of the noisy MOS. Every second clip has twice the noise and twice the std."""
    rng = np.random.default_rng(seed)
    made = []
    for number, mos in enumerate(rng.uniform(0.5, 4.5, n)):
        std = 0.4 * (1 + number % 2)
        raw = 1 + 4 / (1 + np.exp(-(mos + rng.normal(0, std) - 2.5)))
        score = Score(f"{number}.mp4", raw, std=std, rater_id="r", **{"scale": (0.0, 5.0)} | more)
        made.append(Pair(Label(f"{number}.mp4", mos, f"person {number % groups}"), score))
    return made


# --- mappings --------------------------------------------------------------------------------------------------------


def test_each_fit_recovers_its_own_curve() -> None:
    x = np.linspace(1, 5, 50)
    line = fit_linear(x, 2 * x - 1)
    assert (line.slope, line.intercept) == pytest.approx((2, -1))
    curve = fit_logistic(x, Logistic4(b1=4.5, b2=0.5, b3=3, b4=0.6)(x))
    assert (curve.b1, curve.b2, curve.b3, curve.b4) == pytest.approx((4.5, 0.5, 3, 0.6), rel=1e-4)
    steps = fit_isotonic(x, np.floor(x))
    assert steps(x) == pytest.approx(np.floor(x))
    assert len(steps.scores) <= 10  # corners, not clips


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=30))
def test_the_isotonic_fit_never_falls_and_beats_the_mean(points: list[tuple[int, int]]) -> None:
    x, y = np.array(points, dtype=np.float64).T
    try:
        curve = fit_isotonic(x, y)
    except ConfigError:  # all of it flat: the MOS does not rise with the score
        return
    assert (np.diff(curve(np.linspace(-1, 10, 200))) >= 0).all()
    assert np.mean((curve(x) - y) ** 2) <= np.var(y) + 1e-12


@KINDS
def test_scores_that_fall_as_the_mos_rises_are_refused(kind: MappingKind) -> None:
    falling = [Pair(pair.label, Score(pair.score.clip, -(pair.score.value or 0))) for pair in pairs()]
    with pytest.raises(ConfigError, match="mapping fitted cannot be used"):
        calibrate(falling, kind, scale=(0, 5))


@KINDS
def test_calibrated_scores_are_closer_to_the_mos(kind: MappingKind) -> None:
    calibration, fresh = calibrate(pairs(), kind), pairs(seed=1)
    before = np.mean([(pair.score.value - pair.label.mos) ** 2 for pair in fresh if pair.score.value])
    after = [calibration.apply(pair.score.value or 0, pair.score.std).mos - pair.label.mos for pair in fresh]
    assert np.mean(np.square(after)) < 0.7 * before


# --- intervals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.9])
def test_coverage_on_new_clips_is_the_nominal_one(coverage: float) -> None:
    calibration = calibrate(pairs(2000), "isotonic", coverage=coverage)
    inside = []
    for pair in pairs(2000, seed=1):
        mos, low, high = calibration.apply(pair.score.value or 0, pair.score.std)
        assert 0 <= low <= mos <= high <= 5
        inside.append(low <= pair.label.mos <= high)
    assert np.mean(inside) == pytest.approx(coverage, abs=0.04)
    assert calibration.check is not None
    assert calibration.check.coverage == pytest.approx(coverage, abs=0.04)
    assert calibration.check.lowest <= calibration.check.coverage


def test_a_large_std_gives_a_wide_interval() -> None:
    calibration = calibrate(pairs(scale=None), "linear", scale=(-100, 100))
    wide, narrow = (calibration.apply(3.0, std) for std in (0.8, 0.4))
    assert wide.high - wide.low == pytest.approx(2 * (narrow.high - narrow.low))
    floor = calibration.interval.std_floor
    assert floor is not None
    assert calibration.apply(3.0, 0.0) == calibration.apply(3.0, floor)
    with pytest.raises(ScoresError, match="intervals of this calibration depend on the std of the rating"):
        calibration.apply(3.0)


def test_without_std_all_intervals_are_equally_wide() -> None:
    plain = [Pair(pair.label, Score(pair.score.clip, pair.score.value)) for pair in pairs()]
    calibration = calibrate(plain, "linear")
    assert (calibration.scale, calibration.interval.std_floor) == (None, None)
    assert calibration.apply(3.0) == calibration.apply(3.0, 0.7)


def errors(n: int) -> Floats:
    return np.arange(1, n + 1, dtype=np.float64)


def test_the_conformal_rank() -> None:
    assert fit_interval(errors(9), None, 0.9).half_width == 9  # ceil(10 * 0.9) = 9th
    assert fit_interval(errors(99), None, 0.9).half_width == 90
    assert fit_interval(errors(99), None, 0.55).half_width == 55  # 100 * 0.55 is more than 55 in floating point
    with pytest.raises(ScoresError, match=r"coverage 0\.9 needs 9 clips besides those of the mapping, received 8"):
        fit_interval(errors(8), None, 0.9)
    with pytest.raises(ScoresError, match="more than half of the ratings have a std of 0"):
        fit_interval(errors(9), np.array([0.0] * 5 + [1.0] * 4), 0.9)


# --- the file --------------------------------------------------------------------------------------------------------


def test_a_calibration_is_read_as_it_was_written(tmp_path: Path) -> None:
    for kind in MAPPING_FITS:
        calibration = calibrate(pairs(), kind)
        assert Calibration.read(calibration.write(tmp_path)) == calibration
    assert [path.name for path in tmp_path.iterdir()] == [CALIBRATION_NAME]
    assert len({calibrate(pairs(), kind).identity for kind in MAPPING_FITS}) == 3
    with pytest.raises(ConfigError, match="is not a directory: give the directory of the rater"):
        calibration.write(tmp_path / "gone")


def test_the_old_key_spread_is_refused_by_its_new_name(tmp_path: Path) -> None:
    path = calibrate(pairs()).write(tmp_path)
    path.write_text(path.read_text().replace('"interval"', '"spread"'))
    with pytest.raises(ConfigError, match="the key spread was renamed to interval"):
        Calibration.read(path)


def test_was_fitted_on() -> None:
    named = calibrate(pairs())
    assert named.was_fitted_on("elsewhere/7.mp4")
    assert not named.was_fitted_on("400.mp4")
    hashed = [Pair(pair.label, Score(pair.score.clip, pair.score.value, content_id=f"sha256:{pair.score.clip}"))
              for pair in pairs()]  # fmt: skip
    by_content = calibrate(hashed, scale=(0, 5))
    assert by_content.was_fitted_on("renamed.mp4", "sha256:7.mp4")
    assert not by_content.was_fitted_on("7.mp4", "sha256:another")
    assert (named.n, named.groups, named.rater_id) == (400, 20, "r")


def test_the_fingerprint_depends_on_clips_and_mos_only() -> None:
    one = calibrate(pairs())
    assert calibrate(pairs()[::-1], "isotonic").fingerprint == one.fingerprint
    changed = pairs()
    changed[3] = Pair(Label("3.mp4", 4.9, changed[3].label.group), changed[3].score)
    assert calibrate(changed).fingerprint != one.fingerprint


def test_raw_scores_of_calibrated_ratings_are_used() -> None:
    again = [
        Pair(pair.label, Score(pair.score.clip, 2.0, raw=pair.score.value, std=pair.score.std, calibrated=True))
        for pair in pairs()
    ]
    assert calibrate(again).mapping == calibrate(pairs()).mapping
    without = [Pair(pair.label, Score(pair.score.clip, pair.score.value, calibrated=True)) for pair in pairs()]
    with pytest.raises(ScoresError, match=r"the rating of 0.mp4 is already calibrated and has no raw_score"):
        calibrate(without)


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        (pairs(4), {}, "4 clips have both a score and a MOS: at least 5 are needed"),
        (pairs(groups=1), {}, "clips of at least two groups"),
        (pairs(12), {}, "coverage 0.9 needs 9 clips besides those of the mapping, received 6"),
        (pairs(), {"coverage": 1.0}, "coverage must lie between 0 and 1, received 1"),
        (pairs(), {"scale": (1, 5)}, r"the MOS run from 0\.5\S+ to 4\.4\S+, outside the scale \[1, 5\]"),
        (pairs(), {"scale": (5, 0)}, r"low < high; received \[5, 0\]"),
        (
            pairs(),
            {"scale": (0, 100)},
            r"MOS is given as \(0, 100\), the ratings declare \(0\.0, 5\.0\): set",
        ),
        ([*pairs(), *pairs(9, seed=1, scale=(1.0, 5.0))], {}, "the ratings declare several scales"),
        ([*pairs(), Pair(Label("x", 1.0, "x"), Score("x", 1.0))], {}, "some ratings have a std and some have none"),
    ],
)
def test_invalid_input_is_refused(made: list[Pair], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ScoresError, match=message):
        calibrate(made, **options)


def test_two_groups_are_too_few_for_cross_validation() -> None:
    calibration = calibrate(pairs(groups=2))
    assert calibration.check is None
    assert "not done" in calibration.summary()


def test_predictions_are_clipped_to_the_scale_before_the_errors_are_measured() -> None:
    """One group scores far beyond what the mapping was fitted on: its MOS is the scale's end, as is the prediction."""
    usual = [(1 + place / 200, 1 + place / 10, f"group {place % 8}") for place in range(40)]
    beyond = [(400.0 + place, 5.0, "beyond") for place in range(5)]
    made = [
        Pair(Label(f"{number}.mp4", mos, group), Score(f"{number}.mp4", score))
        for number, (score, mos, group) in enumerate(usual + beyond)
    ]
    assert all(calibrate(made, "linear", scale=(1, 5), seed=seed).interval.half_width <= 4 for seed in range(6))


def test_the_order_of_the_clips_does_not_matter() -> None:
    made = pairs(60, groups=7)
    shuffled = [made[place] for place in np.random.default_rng(1).permutation(len(made))]
    one, two = calibrate(made), calibrate(shuffled)
    assert two.interval.half_width == pytest.approx(one.interval.half_width, rel=1e-6)
    assert two.apply(2.5, 0.5) == pytest.approx(one.apply(2.5, 0.5), rel=1e-6)


# --- published labels ------------------------------------------------------------------------------------------------


def test_coverage_on_persons_left_out_of_thqa(shared_dir: Path) -> None:
    labels = read_labels(shared_dir / "thqa" / "thqa_ntire_val.csv")
    scores = read_scores(shared_dir / "thqa" / "baseline_output.txt")
    for kind in MAPPING_FITS:
        calibration = calibrate(join(labels, scores).pairs, kind, scale=(0, 5))
        check = calibration.check
        assert check is not None
        assert (calibration.n, calibration.groups, check.folds) == (1714, 5, 5)
        assert 0.8 < check.lowest < check.coverage < 0.95
        assert check.rmse < 0.7


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"clip": pair.score.clip, "score": pair.score.value, "std": pair.score.std, "scale": [0, 5], "rater_id": "r"}
        for pair in pairs()
    ]
    rows.append({"clip": "broken.mp4", "score": None, "error": {"class": "ClipTruncated", "message": "3 of 9"}})
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"{pair.label.clip},{pair.label.mos},{pair.label.group}\n" for pair in pairs()]
    (tmp_path / "l.csv").write_text("clip,mos,group\n" + "".join(lines))
    command = ["calibrate", f"{tmp_path}/r.jsonl", f"{tmp_path}/l.csv", "--into", str(tmp_path), "--kind", "isotonic"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert Calibration.read(tmp_path / CALIBRATION_NAME) == calibrate(pairs(), "isotonic")
    assert "nominal coverage 90%" in done.stdout
    assert "on groups left out of the fit, 5 folds" in done.stdout
    (tmp_path / "l.csv").write_text("clip,mos,group\n" + "".join(lines) + "broken.mp4,1,g\n")
    partly = CliRunner().invoke(app, command)
    assert partly.exit_code == 3
    assert "1 labelled clip without a score not used" in partly.stderr
