"""python -m pytest tests/video/test_playback.py"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from clips import FACTOR, UNEVEN, ffmpeg, ffmpeg_frames, read_number, write_clip
from hypothesis import given
from hypothesis import strategies as st

from lmm_qa.config import Sampling, View
from lmm_qa.video.decode import read_frames, read_windows
from lmm_qa.video.playback import MAX_REPEATS, playback
from lmm_qa.video.sampling import sample_indices
from lmm_qa.video.temporal import cadence, stalls


def held(frames: int, at: int, seconds: float, fps: float = 25) -> list[int]:
    """Milliseconds at which frames appear, of which one is held."""
    return [round(1000 * (number / fps + seconds * (number > at))) for number in range(frames)]


@pytest.mark.parametrize("fps", [7.5, 23.976, 25, 29.97, 50, 59.94, 120])
@pytest.mark.parametrize("digits", [3, 9])
def test_at_a_constant_rate_every_frame_is_shown_once(fps: float, digits: int) -> None:
    for count in (1, 2, 3, 250, 1000):
        seconds = [round(number / fps, digits) for number in range(count)]
        shown = playback(seconds, count / fps)
        assert shown.frames == tuple(range(count))
        assert shown.seconds == tuple(seconds)


@given(st.lists(st.floats(-0.3, 0.3), min_size=3, max_size=200), st.sampled_from([15.0, 25.0, 29.97, 60.0]))
def test_jitter_repeats_nothing(jitter: list[float], fps: float) -> None:
    seconds = [(number + offset - jitter[0]) / fps for number, offset in enumerate(jitter)]
    intervals = np.diff(seconds)
    if intervals.max() < 1.7 * np.median(intervals):
        assert playback(seconds, seconds[-1] + float(np.median(intervals))).frames == tuple(range(len(seconds)))


@given(st.lists(st.floats(0, 2000), max_size=50), st.floats(0, 1e9))
def test_every_frame_is_shown_when_it_appears_and_memory_is_bounded(gaps: list[float], last: float) -> None:
    seconds = [0.0, *np.cumsum(gaps).tolist()]
    shown = playback(seconds, seconds[-1] + last)
    assert len(shown.frames) == len(shown.seconds) <= len(seconds) + MAX_REPEATS
    assert sorted(set(shown.frames)) == list(range(len(seconds)))
    assert all(before <= after for before, after in pairwise(shown.seconds))
    for frame, second in zip(shown.frames, shown.seconds, strict=True):
        assert second >= seconds[frame]
        assert frame == len(seconds) - 1 or second <= seconds[frame + 1]


@pytest.mark.parametrize(
    "milliseconds",
    [held(50, 24, 4.0), held(60, 0, 2.0), held(40, 38, 3.0), UNEVEN, [40 * n for n in range(80) if n % 5 and n % 7]],
    ids=["held", "held at the start", "held at the end", "uneven", "dropped"],
)
def test_a_variable_rate_is_read_like_the_playback_that_ffmpeg_makes_of_it(
    tmp_path: Path, milliseconds: list[int]
) -> None:
    variable = write_clip(tmp_path / "variable.mp4", frames=len(milliseconds), milliseconds=milliseconds)
    constant = tmp_path / "constant.mp4"
    ffmpeg("-i", variable, "-vf", "fps=25:round=near", "-fps_mode", "cfr", "-crf", "4", constant)
    numbers = [read_number(picture) for picture in ffmpeg_frames(constant, 192, 128)]
    for sampling in (Sampling(frames=16), Sampling(strategy="pairs", frames=12), Sampling(strategy="fps", fps=5)):
        one, other = (read_frames(path, sampling, [View()], FACTOR) for path in (variable, constant))
        differences = np.subtract(one.indices, [numbers[index] for index in other.indices])
        # Frames that appear between two ticks of the constant clock may be one apart.
        assert abs(differences).max() <= (milliseconds is UNEVEN)
        assert one.seconds == pytest.approx(other.seconds, abs=0.041)
    assert one.dynamics is not None and other.dynamics is not None
    assert np.array(stalls(one.dynamics)) == pytest.approx(np.array(stalls(other.dynamics)), abs=0.05)
    difference = 0.1 if milliseconds is UNEVEN else 0.02
    assert cadence(one.dynamics).rate == pytest.approx(cadence(other.dynamics).rate, rel=difference)


def test_a_window_within_a_hold_shows_the_held_frame(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "held.mp4", frames=50, milliseconds=held(50, 24, 4.0))
    windows = read_windows(clip, Sampling(frames=4), [View()], FACTOR, 1.0, 0.5)
    inside = [window for span, window in zip(windows.spans, windows, strict=True) if span[0] >= 1 and span[1] <= 5]
    assert len(inside) >= 6
    for window in inside:
        assert {read_number(picture) for picture in window.views[0]} == set(window.indices) == {24}
    for span, window in zip(windows.spans, windows, strict=True):
        assert all(span[0] - 1e-3 <= second <= span[1] for second in window.seconds)
    assert read_frames(clip, Sampling(frames=4), [View()], FACTOR).indices == windows.whole.indices


@given(
    st.integers(1, 3000),
    st.integers(1, 64),
    st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.999]),
    st.sampled_from([12.0, 23.976, 25.0, 29.97, 59.94]),
    st.sampled_from([2, 3, 9]),
)
def test_at_a_constant_rate_time_selects_what_the_number_would(
    frames: int, count: int, phase: float, fps: float, digits: int
) -> None:
    """Times with rounded digits too, as in Matroska."""
    seconds = [round(number / fps, digits) for number in range(frames)]
    if digits == 2 and fps > 30:  # centiseconds: too coarse for this rate
        return
    expected = [int((part + phase) * frames / count) for part in range(count)]
    assert sample_indices(seconds, Sampling(frames=count, phase=phase)) == expected


def test_uniform_goes_by_time_if_the_rate_changes() -> None:
    """30 frames a second for 4 s, then 24 for 4 s: half of the samples are of each half."""
    seconds = [*np.arange(0, 4, 1 / 30), *np.arange(4, 8 - 1e-9, 1 / 24)]
    indices = sample_indices(seconds, Sampling(frames=8))
    assert [seconds[index] for index in indices] == pytest.approx(np.arange(8) + 0.5, abs=1 / 24)
    assert sum(index < 120 for index in indices) == 4


@pytest.mark.parametrize("delays", [[40] * 60, [30, 40, 50, 40] * 15, [33, 34, 33] * 20, [33] * 45 + [42] * 45])
def test_real_variable_rates_have_no_stall_and_no_low_rate(tmp_path: Path, delays: list[int]) -> None:
    milliseconds = np.cumsum([0, *delays[:-1]]).tolist()
    clip = write_clip(tmp_path / "clip.mp4", frames=len(delays), milliseconds=milliseconds)
    dynamics = read_frames(clip, Sampling(frames=1), [View()], FACTOR).dynamics
    assert dynamics is not None and len(dynamics.seconds) == len(delays)
    assert stalls(dynamics) == []
    assert cadence(dynamics).rate == pytest.approx(1000 * len(delays) / sum(delays), rel=0.05)


def test_delays_of_an_animation_are_its_playback(tmp_path: Path) -> None:
    """Delays of 40 and 400 ms: the picture stands still for the longer ones."""
    delays = [40] * 10 + [400] + [40] * 10
    milliseconds = np.cumsum([0, *delays[:-1]]).tolist()
    clip = write_clip(tmp_path / "a.gif", frames=21, milliseconds=milliseconds, codec="gif", pixel_format="rgb8")
    frames = read_frames(clip, Sampling(frames=12), [View()], FACTOR)
    assert frames.info.duration == pytest.approx(1.2, abs=0.02)
    shown = frames.seconds
    appear = np.array(milliseconds) / 1000
    assert frames.indices == tuple(int(np.searchsorted(appear, second + 1e-6, "right")) - 1 for second in shown)
    assert frames.indices.count(10) == 4
