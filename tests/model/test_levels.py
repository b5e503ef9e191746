"""python -m pytest tests/model/test_levels.py"""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import example, given
from hypothesis import strategies as st

from lmm_qa.errors import ConfigError
from lmm_qa.model.levels import LEVELS, LevelReading, Scale, read_levels

SCALES = (Scale(1, 5), Scale(0, 5), Scale(0, 100), Scale(-1.3, 0.1))

level_logits = st.lists(st.floats(-1e4, 1e4, width=32), min_size=5, max_size=5).map(np.float32)
near_logits = st.lists(st.floats(-20, 20, width=32), min_size=5, max_size=5).map(np.float32)
scales = st.sampled_from(SCALES)


def read(logits: object, scale: Scale = SCALES[0], log_normalizer: float | None = None) -> LevelReading:
    values = np.asarray(logits, np.float32)
    total = float(scipy.special.logsumexp(values.astype(float)))
    return read_levels(values, total if log_normalizer is None else log_normalizer, scale)


@given(near_logits, scales)
def test_the_reading_is_that_of_float64_arithmetic(logits: np.ndarray, scale: Scale) -> None:
    reading = read(logits, scale)
    probabilities = scipy.special.softmax(logits.astype(np.float64))
    anchors = np.linspace(scale.low, scale.high, 5)
    score = probabilities @ anchors
    width = scale.high - scale.low
    assert reading.probabilities == pytest.approx(probabilities, abs=1e-6)
    assert reading.score == pytest.approx(score, abs=1e-6 * width)
    assert reading.std == pytest.approx(math.sqrt(probabilities @ (anchors - score) ** 2), abs=1e-3 * width)
    assert reading.probabilities[reading.level] == max(reading.probabilities)


@given(near_logits, scales, st.floats(0, 1), st.floats(0, 20))
def test_a_measured_quality_multiplies_the_distribution_by_a_normal_density(
    logits: np.ndarray, scale: Scale, quality: float, weight: float
) -> None:
    reading = read_levels(logits, 30.0, scale, quality, weight)
    density = scipy.stats.norm(4 * quality, 1 / math.sqrt(2 * weight) if weight else 1e9).logpdf(np.arange(5))
    probabilities = scipy.special.softmax(logits.astype(np.float64) + density)
    assert reading.probabilities == pytest.approx(probabilities, abs=1e-4)
    assert reading.mass == read_levels(logits, 30.0, scale).mass, "the share of the words is that of the model alone"
    assert read_levels(logits, 30.0, scale, None, weight) == read_levels(logits, 30.0, scale)


@given(level_logits, scales)
@example(np.float32([0, 0, 0, 0, 1e4]), Scale(-1.3, 0.1))  # 0.1 in float32 is more than 0.1
def test_a_score_is_on_the_scale_whatever_the_logits(logits: np.ndarray, scale: Scale) -> None:
    reading = read(logits, scale)
    assert scale.low <= reading.score <= scale.high
    assert sum(reading.probabilities) == pytest.approx(1, abs=1e-6)
    assert 0 <= reading.std <= (scale.high - scale.low) / 2 * (1 + 1e-6)
    assert 0 <= reading.mass <= 1
    assert all(map(math.isfinite, (*reading.probabilities, reading.score, reading.std, reading.mass)))


@given(near_logits, st.floats(-1000, 1000, width=32))
def test_a_shift_of_all_logits_changes_nothing(logits: np.ndarray, shift: float) -> None:
    moved = read(logits + np.float32(shift))
    assert moved.score == pytest.approx(read(logits).score, abs=1e-3)
    assert moved.probabilities == pytest.approx(read(logits).probabilities, abs=1e-3)


@given(near_logits, st.floats(0.5, 10, width=32))
def test_more_for_the_best_level_is_a_higher_score(logits: np.ndarray, more: float) -> None:
    better, worse = logits.copy(), logits.copy()
    better[-1] += np.float32(more)
    worse[0] += np.float32(more)
    rounding = 1e-5
    assert read(worse).score - rounding <= read(logits).score <= read(better).score + rounding


def test_a_clear_change_moves_the_score() -> None:
    scores = [read([0, 0, 0, 0, more]).score for more in (-5, -1, 0, 1, 5)]
    assert scores == sorted(set(scores))


def test_certainty_is_an_anchor() -> None:
    for k, anchor in enumerate((0, 1.25, 2.5, 3.75, 5)):
        reading = read(np.where(np.arange(5) == k, 1e4, -1e4), Scale(0, 5))
        assert (reading.score, reading.std, reading.level) == (anchor, 0, k)


def test_no_opinion_is_the_middle() -> None:
    reading = read(np.zeros(5), Scale(1, 5))
    assert reading.score == pytest.approx(3)
    assert reading.std == pytest.approx(math.sqrt(2))


def test_mass_is_the_share_of_the_whole_vocabulary() -> None:
    rng = np.random.default_rng(0)
    vocabulary = (3 * rng.standard_normal(1000)).astype(np.float32)
    words = rng.choice(1000, 5, replace=False)
    reading = read(vocabulary[words], log_normalizer=float(scipy.special.logsumexp(vocabulary.astype(np.float64))))
    share = scipy.special.softmax(vocabulary.astype(np.float64))[words]
    assert reading.mass == pytest.approx(share.sum(), rel=1e-5)
    assert reading.probabilities == pytest.approx(share / share.sum(), rel=1e-5)


def test_other_numbers_of_levels_span_the_same_scale() -> None:
    assert read([0, 1e4, 0], Scale(0, 10)).score == 5
    assert Scale(0, 5).anchors(3).tolist() == [0, 2.5, 5]
    assert Scale().anchors().tolist() == [1, 2, 3, 4, 5]
    assert len(LEVELS) == 5


@pytest.mark.parametrize("ends", [(5, 1), (3, 3), (math.nan, 5), (1, math.inf)])
def test_a_scale_has_two_ends(ends: tuple[float, float]) -> None:
    with pytest.raises(ConfigError) as caught:
        Scale(*ends)
    assert f"received [{ends[0]}, {ends[1]}]" in str(caught.value)
