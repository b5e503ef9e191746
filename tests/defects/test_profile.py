"""python -m pytest tests/defects/test_profile.py"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit

from lmm_qa.defects.calibration import DefectCalibration, PlattScaling
from lmm_qa.defects.profile import read_profile
from lmm_qa.defects.vocabulary import DEFECTS
from lmm_qa.ratings.rows import read_timeline
from lmm_qa.video.temporal import FrameDynamics


def test_answers_become_a_profile() -> None:
    calibration = DefectCalibration(
        defects={"blur": PlattScaling(), "noise": PlattScaling(threshold=0.9), "seam": PlattScaling(intercept=2.0)}
    )
    answers = {"seam": (0.0, 0.6), "noise": (1.0, 0.8), "blur": (3.0, 1.0), "mouth": (9.0, 1.0)}
    profile = read_profile(answers, calibration, None, {})
    assert list(profile.defects) == [defect.name for defect in DEFECTS]
    assert profile.defects["blur"] == pytest.approx(expit(3.0))
    assert profile.defects["seam"] == pytest.approx(expit(2.0))
    assert profile.defects["mouth"] is None, "the calibration does not know it"
    assert profile.defects["lip_sync"] is None
    assert [one.defect for one in profile.found] == ["blur", "seam"], (
        "the likeliest first; noise is below its threshold"
    )
    assert profile.absent == ["noise"]
    assert profile.mass == pytest.approx(0.85)
    assert profile.measured == {}


def test_what_is_not_asked_is_judged_by_what_was_measured() -> None:
    calibration = DefectCalibration(defects={"blur": PlattScaling(), "seam": PlattScaling(slope=0, measured=2.0)})
    profile = read_profile({"blur": (1.0, 1.0)}, calibration, None, {"seam": 1.5, "blur": 9.0, "noise": 9.0})
    assert profile.defects["blur"] == pytest.approx(expit(1.0)), "the calibration gives what was measured no weight"
    assert profile.defects["seam"] == pytest.approx(expit(3.0))
    assert profile.defects["noise"] is None
    assert [one.defect for one in profile.found] == ["seam", "blur"]
    unmeasured = read_profile({"blur": (1.0, 1.0)}, calibration, None, {})
    assert unmeasured.defects["seam"] is None, "nobody looked"
    alone = read_profile({}, calibration, None, {"seam": 1.5})
    assert alone.defects["blur"] is None, "nobody asked"
    assert alone.mass is None


def test_what_is_measured_joins_the_answers() -> None:
    """A picture that stands for a second, in light that jumps: when is said of what is not there all the time."""
    count, fps = 100, 25
    peak, light = np.full(count, 5.0, np.float32), np.full(count, 100, np.float32)
    peak[40:65], light[::2] = 0, 110
    flat = np.ones(count, np.float32)
    dynamics = FrameDynamics(np.arange(count, dtype=np.float32) / fps, count / fps, peak, flat, flat, light)
    measured = {"stall": 2.0, "buffering": -1.0, "flicker": 2.0, "jerkiness": -1.0, "bitrate_switch": -1.0}
    calibration = DefectCalibration(defects={name: PlattScaling(measured=1.5) for name in measured})
    profile = read_profile(dict.fromkeys(measured, (0.0, 1.0)), calibration, dynamics, measured)
    assert profile.measured == measured
    assert profile.defects["flicker"] == pytest.approx(expit(3.0))
    assert profile.defects["buffering"] == pytest.approx(expit(-1.5))
    seconds = {one.defect: one.seconds for one in profile.found}
    assert seconds == {"stall": (pytest.approx((39 / fps, 65 / fps)),), "flicker": ()}


def dynamics_of(
    seconds: float, still: tuple[float, float] = (0, 0), luma: float = 128, detail: float = 2
) -> FrameDynamics:
    """A clip of 25 frames per second that moves except in one span of seconds."""
    times = np.arange(round(seconds * 25), dtype=np.float32) / 25
    peak = np.where((times > still[0] - 1e-3) & (times < still[1] - 1e-3), 0.0, 5.0).astype(np.float32)
    flat = np.ones(len(times), np.float32)
    return FrameDynamics(times, seconds, peak, flat, detail * flat, luma * flat)


@pytest.mark.parametrize(
    ("dynamics", "certain"),
    [
        (dynamics_of(6), set()),
        (dynamics_of(6, (2, 2.8)), set()),
        (dynamics_of(6, (2, 3.1)), {"stall"}),
        (dynamics_of(22, (1, 21)), {"stall"}),
        (dynamics_of(1, (0.2, 0.9)), {"stall"}),
        (dynamics_of(6, (0, 6)), {"stall"}),
        (dynamics_of(6, (0, 2)), {"buffering"}),
        (dynamics_of(6, (0, 6), luma=16, detail=0), {"stall", "exposure"}),
        (dynamics_of(6, (0, 6), luma=235, detail=0), {"stall", "exposure"}),
        (dynamics_of(6, luma=18), set()),
    ],
)
def test_what_is_measured_beyond_doubt_is_not_outvoted(dynamics: FrameDynamics, certain: set[str]) -> None:
    names = ("stall", "buffering", "exposure", "lips")
    calibration = DefectCalibration(defects={name: PlattScaling(measured=1, threshold=0.8) for name in names})
    against = dict.fromkeys(names, -6.0)
    profile = read_profile(dict.fromkeys(names, (-6.0, 1.0)), calibration, dynamics, against)
    assert {finding.defect for finding in profile.found} == certain
    assert all(profile.defects[name] == pytest.approx(expit(-12.0)) for name in set(names) - certain)
    without = read_profile({}, DefectCalibration(defects={"lips": PlattScaling()}), dynamics, against)
    assert without.defects["stall"] is None, "the rater does not judge it"


def test_a_timeline_says_which_seconds_pull_the_score_down() -> None:
    spans = [(0.0, 2.0), (1.0, 3.0), (2.0, 4.0), (3.0, 5.0), (4.0, 6.0)]
    timeline = read_timeline(spans, [4.0, 4.1, 2.0, 2.5, 4.2], (1, 5))
    assert timeline.seconds == (1.0, 2.0, 3.0, 4.0, 5.0)
    assert timeline.low == ((2.5, 4.5),), "from half way to the windows that are well"
    assert timeline.model_dump(mode="json")["low"] == [[2.5, 4.5]]
    assert read_timeline(spans, [3.0, 3.1, 2.9, 3.0, 3.0], (1, 5)).low == ()
    assert read_timeline(spans, [1.0, 3.1, 2.9, 3.0, 1.0], (1, 5)).low == ((0.0, 1.5), (4.5, 6.0))
    assert read_timeline([(0.0, 1.5)], [2.0], (1, 5)).low == (), "one window has nothing to compare with"
