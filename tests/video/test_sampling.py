"""python -m pytest tests/video/test_sampling.py"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmm_qa.config import Sampling
from lmm_qa.video.sampling import sample_indices, window_spans


@st.composite
def frame_times(draw: st.DrawFn) -> list[float]:
    gaps = draw(st.lists(st.floats(0.001, 2), max_size=60))
    return [0.0, *np.cumsum(gaps)]


samplings = st.builds(
    Sampling,
    strategy=st.sampled_from(["uniform", "fps", "pairs"]),
    frames=st.integers(1, 20).map(lambda half: 2 * half),
    fps=st.floats(0.1, 60),
    gap=st.floats(0.01, 5),
)


@given(frame_times(), samplings)
def test_indices_are_in_range_and_as_many_as_requested(seconds: list[float], sampling: Sampling) -> None:
    indices = sample_indices(seconds, sampling)
    assert all(0 <= index < len(seconds) for index in indices)
    assert 1 <= len(indices) <= sampling.frames
    assert len(indices) == sampling.frames or sampling.strategy == "fps"
    if sampling.strategy != "pairs":
        assert indices == sorted(indices)


@given(frame_times(), samplings)
def test_the_frames_of_a_pair_differ_by_the_gap(seconds: list[float], sampling: Sampling) -> None:
    indices = sample_indices(seconds, sampling.model_copy(update={"strategy": "pairs"}))
    longest = max((after - before for before, after in pairwise(seconds)), default=0)
    for first, second in zip(indices[::2], indices[1::2], strict=True):
        assert second > first or len(seconds) == 1
        if seconds[-1] >= sampling.gap:
            assert abs(seconds[second] - seconds[first] - sampling.gap) <= longest + 1e-5


def test_uniform_takes_the_middle_of_equal_parts() -> None:
    assert sample_indices([index / 25 for index in range(250)], Sampling(frames=5)) == [25, 75, 125, 175, 225]


@given(st.integers(1, 500), st.integers(1, 40))
def test_linspace_takes_the_frames_that_numpy_rounds_to(clip: int, frames: int) -> None:
    sampling = Sampling(strategy="linspace", frames=frames)
    expected = [round(place) for place in np.linspace(0, clip - 1, frames)]
    assert sample_indices([index / 25 for index in range(clip)], sampling) == expected


def test_frames_of_a_short_clip_are_repeated() -> None:
    assert sample_indices([0.0, 0.04], Sampling(frames=4)) == [0, 0, 1, 1]


def test_fps_uses_time_and_falls_back_to_uniform() -> None:
    steady = [index / 25 for index in range(250)]
    assert sample_indices(steady, Sampling(strategy="fps", fps=1, frames=20)) == list(range(0, 250, 25))
    assert sample_indices(steady, Sampling(strategy="fps", fps=5, frames=5)) == [25, 75, 125, 175, 225]
    uneven = [0.0, 0.1, 0.2, 2.0, 3.0]
    assert sample_indices(uneven, Sampling(strategy="fps", fps=1, frames=20)) == [0, 2, 3, 4]


def test_a_pair_at_the_end_is_moved_back_into_the_clip() -> None:
    steady = [index / 25 for index in range(10)]
    assert sample_indices(steady, Sampling(strategy="pairs", frames=4, gap=0.08)) == [2, 4, 7, 9]
    assert sample_indices(steady, Sampling(strategy="pairs", frames=4, gap=0.2)) == [2, 7, 4, 9]


def test_phase_moves_frames_within_their_parts() -> None:
    seconds = [index / 25 for index in range(100)]
    for phase, expected in ((0.0, [0, 25, 50, 75]), (0.5, [12, 37, 62, 87]), (0.99, [24, 49, 74, 99])):
        assert sample_indices(seconds, Sampling(frames=4, phase=phase)) == expected
    assert sample_indices(seconds, Sampling(strategy="pairs", frames=4, phase=0.0, gap=0.08)) == [0, 2, 50, 52]
    assert sample_indices(seconds, Sampling(strategy="fps", fps=1, frames=4, phase=0.75)) == [6, 31, 56, 81]


@given(st.floats(0.04, 200), st.floats(0.1, 10), st.floats(0.05, 10))
def test_windows_cover_the_clip(duration: float, window: float, step: float) -> None:
    spans = window_spans(duration, window, step)
    assert spans[0][0] == 0 and spans[-1][1] == duration
    assert len(spans) == 1 or all(last - first == pytest.approx(window) for first, last in spans)
    assert all(0 < after[0] - before[0] <= step + 1e-5 for before, after in pairwise(spans))


def test_windows_start_at_every_step_and_the_last_ends_with_the_clip() -> None:
    assert window_spans(5, 2, 1) == [(0, 2), (1, 3), (2, 4), (3, 5)]
    assert window_spans(4.7, 2, 1) == [(0, 2), (1, 3), (2, 4), (pytest.approx(2.7), 4.7)]
    assert window_spans(1.5, 2, 1) == [(0, 1.5)]
