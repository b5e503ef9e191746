"""Frames are the right ones, upright and complete. Run: python -m pytest tests/video/test_decode.py"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import (
    FACTOR,
    UNEVEN,
    BrokenMeasurement,
    RecordingMeasurement,
    ffmpeg,
    ffmpeg_frames,
    read,
    read_numbers,
    write_damaged,
)
from PIL import Image

from lmm_qa.config import Sampling, View
from lmm_qa.errors import ClipTruncated, UsageError
from lmm_qa.video import decode, views
from lmm_qa.video.decode import ClipMeasurement, read_frames, read_windows
from lmm_qa.video.display import Orientation
from lmm_qa.video.playback import playback
from lmm_qa.video.probe import probe, scan_container

WHOLE = View()

# Every kind of clip

KINDS = {
    "h264.mp4": ("h264", 60),
    "faststart.mp4": ("h264", 60),
    "h264.mkv": ("h264", 60),
    "h264.ts": ("h264", 60),
    "fragmented.mp4": ("h264", 60),
    "bt709.mp4": ("h264", 60),
    "full_range.mp4": ("h264", 60),
    "one.mp4": ("h264", 1),
    "odd.mp4": ("h264", 30),
    "odd.webm": ("vp9", 30),
    "h264_10bit.mp4": ("h264", 30),
    "hevc_10bit.mp4": ("hevc", 30),
    "hevc.mkv": ("hevc", 30),
    "prores.mov": ("prores", 30),
    "animation.gif": ("gif", 30),
    "uneven.mp4": ("h264", 30),
    "uneven.mkv": ("h264", 30),
    "av1.mp4": ("av1", 8),
    "vp8.webm": ("vp8", 60),
    "mpeg4.avi": ("mpeg4", 60),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_right_frames_with_the_right_pixels(clips_dir: Path, name: str) -> None:
    path = clips_dir / name
    codec, count = KINDS[name]
    frames = read(path, Sampling(frames=7))
    info = frames.info
    assert (info.codec, info.frames) == (codec, count)
    assert info == probe(path)
    assert frames.indices == read_numbers(frames)
    assert frames.views[0].dtype == np.uint8 and frames.views[0].flags.c_contiguous
    if info.width % 2 == info.height % 2 == 0:
        expected = ffmpeg_frames(path, info.width, info.height)
        assert len(expected) == count
        # The ffmpeg program rounds 10 bits to 8 differently.
        assert np.abs(frames.views[0] - expected[list(frames.indices)].astype(float)).mean() < 0.6


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_metadata_is_applied(clips_dir: Path, degrees: int) -> None:
    path = clips_dir / f"turned_{degrees}.mp4"
    frames = read(path, Sampling(frames=5))
    info = frames.info
    assert info.orientation == Orientation(4 - degrees // 90)  # ffmpeg's option counts the other way round
    assert (info.width, info.height) == ((192, 128) if degrees == 180 else (128, 192))
    assert np.array_equal(frames.views[0], ffmpeg_frames(path, info.width, info.height)[list(frames.indices)])


def test_an_edit_list_hides_frames(clips_dir: Path) -> None:
    frames = read(clips_dir / "edit_list.mp4", Sampling(frames=4))
    assert frames.info.frames < frames.info.declared_frames
    hidden = 60 - frames.info.frames
    assert read_numbers(frames) == tuple(index + hidden for index in frames.indices)


def test_packets_that_show_nothing_are_not_frames(clips_dir: Path) -> None:
    path = clips_dir / "hidden_packets.webm"
    frames = read(path, Sampling(frames=60))
    assert probe(path).frames == frames.info.frames == 60
    assert frames.info.fps == pytest.approx(25)
    assert frames.indices == read_numbers(frames) == tuple(range(60))


@pytest.mark.parametrize("name", ["uneven.mp4", "uneven.mkv"])
def test_seconds_are_presentation_times(clips_dir: Path, name: str) -> None:
    frames = read(clips_dir / name, Sampling(frames=300))
    assert sorted(set(frames.indices)) == list(range(30))
    assert frames.indices == read_numbers(frames)
    seconds = [frames.seconds[frames.indices.index(number)] for number in range(30)]
    assert seconds == pytest.approx([moment / 1000 for moment in UNEVEN], abs=1e-3)
    assert frames.info.duration == pytest.approx(UNEVEN[-1] / 1000 + 0.04, abs=1e-3)


def test_transparent_pixels_are_white(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (0, 0, 32, 64))
    picture.save(tmp_path / "half.gif", transparency=0, save_all=True)
    view = read(tmp_path / "half.gif", Sampling(frames=1)).views[0][0]
    assert (view[:, :32] == (255, 0, 0)).all()
    assert (view[:, 32:] == 255).all()


# Seeking with decord


@pytest.mark.parametrize("name", ["h264.mp4", "bt709.mp4", "full_range.mp4", "mpeg4.avi", "uneven.mkv", "vp8.webm"])
def test_decord_reads_the_same_pictures(clips_dir: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("decord")
    whole = read(clips_dir / name)
    monkeypatch.setattr(decode, "MAX_FULL_DECODE_PIXELS", 0)
    seeked = read(clips_dir / name)
    assert (whole.decoder, seeked.decoder) == ("pyav", "decord")
    assert (whole.indices, whole.seconds, whole.info) == (seeked.indices, seeked.seconds, seeked.info)
    assert np.abs(whole.views[0].astype(int) - seeked.views[0]).max() <= 3


@pytest.mark.parametrize(
    "name", ["animation.gif", "av1.mp4", "turned_90.mp4", "h264_10bit.mp4", "hevc.mkv", "edit_list.mp4"]
)
def test_clips_that_decord_reads_wrongly_are_decoded_completely(
    clips_dir: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read(clips_dir / name)
    monkeypatch.setattr(decode, "MAX_FULL_DECODE_PIXELS", 0)
    again = read(clips_dir / name)
    assert again.decoder == "pyav"
    assert np.array_equal(whole.views[0], again.views[0])


# Windows of time


@pytest.mark.parametrize("sampling", [Sampling(frames=5), Sampling(strategy="pairs", frames=6)])
def test_a_window_equals_a_clip_cut_to_it(clips_dir: Path, tmp_path: Path, sampling: Sampling) -> None:
    two_views = View(), View(kind="crop", size=64)
    windows = read_windows(clips_dir / "h264.mp4", sampling, two_views, FACTOR, 0.8, 0.4)
    assert [span[0] for span in windows.spans] == pytest.approx([0, 0.4, 0.8, 1.2, 1.6])
    assert len(windows) == len(list(windows)) == 5
    for start, window in zip((0, 10, 20, 30, 40), windows, strict=True):
        filters = f"trim=start_frame={start}:end_frame={start + 20},setpts=PTS-STARTPTS"
        ffmpeg("-i", clips_dir / "h264.mp4", "-vf", filters, "-c:v", "ffv1", tmp_path / "cut.mkv")
        cut = read(tmp_path / "cut.mkv", sampling, *two_views)
        assert window.indices == tuple(start + index for index in cut.indices)
        assert window.seconds == pytest.approx([start / 25 + moment for moment in cut.seconds])
        assert all(np.array_equal(ours, theirs) for ours, theirs in zip(window.views, cut.views, strict=True))
        assert window.info == windows.frames.info and window.dynamics is None


def test_each_frame_of_windows_is_rendered_once(clips_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 60 frames; 17 windows have 170 frames together."""
    rendered: list[int] = []
    render = views._render

    def counted(*arguments: Any) -> Any:
        rendered.append(1)
        return render(*arguments)

    monkeypatch.setattr(views, "_render", counted)
    windows = read_windows(clips_dir / "h264.mp4", Sampling(frames=10), [WHOLE], FACTOR, 0.8, 0.1)
    assert sum(map(len, windows.positions)) == 170
    assert len(rendered) == len(set(windows.frames.indices)) == len(windows.frames.views[0]) <= 60


def test_windows_include_the_whole_clip(clips_dir: Path) -> None:
    alone = read(clips_dir / "h264.mp4", Sampling(frames=7))
    whole = read_windows(clips_dir / "h264.mp4", Sampling(frames=7), [WHOLE], FACTOR, 0.5, 0.5).whole
    assert (whole.indices, whole.seconds, whole.info) == (alone.indices, alone.seconds, alone.info)
    assert np.array_equal(whole.views[0], alone.views[0])
    assert whole.dynamics is not None and alone.dynamics is not None
    assert np.array_equal(whole.dynamics.detail, alone.dynamics.detail)


def test_windows_use_time_if_frames_are_uneven(clips_dir: Path) -> None:
    """A window has the frames that are on screen: one that is held before, and those that appear."""
    windows = read_windows(clips_dir / "uneven.mp4", Sampling(frames=4), [WHOLE], FACTOR, 0.1, 0.1)
    for span, window in zip(windows.spans, windows, strict=True):
        appear = [index for index, moment in enumerate(UNEVEN) if span[0] - 1e-6 <= moment / 1000 < span[1] - 1e-6]
        shown = max(index for index, moment in enumerate(UNEVEN) if moment / 1000 <= span[0] + 1e-6)
        assert set(window.indices) <= {shown, *appear}
        assert read_numbers(window) == window.indices


def test_a_clip_shorter_than_a_window_is_one_window(clips_dir: Path) -> None:
    windows = read_windows(clips_dir / "h264.mp4", Sampling(), [WHOLE], FACTOR, 5, 1)
    whole = read(clips_dir / "h264.mp4")
    (span,) = windows.spans
    assert span == pytest.approx((0.0, 2.4))
    assert windows[0].indices == whole.indices and np.array_equal(windows[0].views[0], whole.views[0])


def test_memory_for_windows_is_bounded(clips_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = clips_dir / "h264.mp4", Sampling(frames=4), [WHOLE], FACTOR, 0.4, 0.1
    assert (len(read_windows(*request)), read_windows(*request).step) == (21, 0.1)
    monkeypatch.setattr(decode, "MAX_WINDOW_BYTES", (5 + 1) * 4 * 192 * 128 * 3)
    windows = read_windows(*request)
    assert len(windows) == 5 and windows.step == pytest.approx(0.5)
    assert windows.spans[-1] == pytest.approx((2.0, 2.4))
    assert sum(view.nbytes for view in windows.frames.views) <= decode.MAX_WINDOW_BYTES


@pytest.mark.parametrize(("window", "step"), [(0, 1), (2, 0), (-1, 1), (float("nan"), 1)])
def test_window_and_step_must_be_positive(clips_dir: Path, window: float, step: float) -> None:
    with pytest.raises(UsageError, match=f"above 0 seconds, received {window:g} and {step:g}"):
        read_windows(clips_dir / "h264.mp4", Sampling(), [WHOLE], FACTOR, window, step)


def test_windows_of_a_damaged_clip_are_an_error(clips_dir: Path, tmp_path: Path) -> None:
    raw = (clips_dir / "h264.mkv").read_bytes()
    copy = write_damaged(clips_dir / "h264.mkv", tmp_path, raw[: len(raw) // 2])
    with pytest.raises(ClipTruncated):
        read_windows(copy, Sampling(), [WHOLE], FACTOR, 1, 1)


# Frame dynamics


@pytest.mark.parametrize("name", ["h264.mp4", "odd.webm", "h264_10bit.mp4", "animation.gif", "uneven.mkv", "tiny.mp4"])
def test_dynamics_are_measured_on_the_luma_of_every_frame(clips_dir: Path, name: str) -> None:
    """They agree with the change from frame to frame in grey pictures of another decoder."""
    frames = read(clips_dir / name)
    dynamics, info = frames.dynamics, frames.info
    assert dynamics is not None
    shown = playback(scan_container(clips_dir / name).seconds, info.duration)
    appears = np.diff(shown.frames, prepend=-1) > 0
    assert appears.sum() == info.frames and (appears.all() or name == "uneven.mkv")
    assert len(dynamics.peak_change) == len(dynamics.background_change) == len(dynamics.detail) == len(shown.frames)
    assert dynamics.duration == info.duration
    assert dynamics.seconds == pytest.approx(shown.seconds)
    assert set(frames.seconds) <= set(shown.seconds)
    grey = ffmpeg_frames(clips_dir / name, info.width, info.height).astype(float) @ (0.299, 0.587, 0.114)
    rows, columns = (np.arange(48) * 2 + 1) * info.height // 96, (np.arange(48) * 2 + 1) * info.width // 96
    change = np.abs(np.diff(grey[:, rows[:, None], columns], axis=0)).reshape(-1, 12, 4, 12, 4).mean(axis=(2, 4))
    # The ramp of brightness is stored in 219 steps, and shown in 255.
    assert not dynamics.peak_change[~appears].any()
    assert dynamics.peak_change[appears][1:] == pytest.approx(change.max(axis=(1, 2)) * 219 / 255, rel=0.2, abs=2)


def test_nothing_is_measured_if_decord_seeks(clips_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("decord", reason="decord has no wheels for this machine")
    monkeypatch.setattr(decode, "MAX_FULL_DECODE_PIXELS", 0)
    frames = read(clips_dir / "h264.mp4")
    assert frames.decoder == "decord" and frames.dynamics is None
    windows = read_windows(clips_dir / "h264.mp4", Sampling(), [WHOLE], FACTOR, 1, 1)
    assert windows.frames.decoder == "pyav" and windows.frames.dynamics is not None


# Measurements


@pytest.mark.parametrize(
    ("name", "quarter_turns", "luma_height", "frames"),
    [("h264.mp4", 0, 128, 60), ("turned_180.mp4", 2, 128, 60), ("hidden_packets.webm", 0, 128, 60)],
)
def test_a_measurement_receives_every_frame_and_its_own_pictures(
    clips_dir: Path, name: str, quarter_turns: int, luma_height: int, frames: int
) -> None:
    path, sampling = clips_dir / name, RecordingMeasurement.sampling
    measured = read_frames(path, Sampling(frames=3), [WHOLE], FACTOR, RecordingMeasurement)
    expected = {
        "quarter_turns": quarter_turns,
        "luma_height": luma_height,
        "frames": frames,
        "pictures": 4,
        "measured_frames": frames,
    } | {f"number_{place}": number for place, number in enumerate(read_numbers(read(path, sampling)))}
    assert measured.features == expected
    assert measured.measurement_error is None
    windows = read_windows(path, Sampling(frames=3), [WHOLE], FACTOR, 0.8, 0.4, RecordingMeasurement)
    assert windows.whole.features == expected and windows[0].features is None


def test_a_measurement_of_a_short_clip_receives_each_picture_once(clips_dir: Path) -> None:
    features = read_frames(clips_dir / "one.mp4", Sampling(), [WHOLE], FACTOR, RecordingMeasurement).features
    assert features is not None and (features["pictures"], features["number_3"]) == (1, 0)


@pytest.mark.parametrize("method", ["__init__", "add_frame", "add_picture", "features"])
def test_a_failing_measurement_does_not_cost_the_clip(clips_dir: Path, method: str) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a bug in a feature")

    broken: type[ClipMeasurement] = type("Broken", (RecordingMeasurement,), {method: fail})
    alone = read(clips_dir / "h264.mp4")
    frames = read_frames(clips_dir / "h264.mp4", Sampling(), [WHOLE], FACTOR, broken)
    assert np.array_equal(frames.views[0], alone.views[0])
    assert frames.dynamics is not None and frames.features is None
    assert frames.measurement_error is not None
    assert frames.measurement_error.startswith("ZeroDivisionError: a bug in a feature (")
    assert "test_decode.py:" in frames.measurement_error


def test_windows_tell_that_the_measurement_failed(clips_dir: Path) -> None:
    windows = read_windows(clips_dir / "h264.mp4", Sampling(), [WHOLE], FACTOR, 1, 1, BrokenMeasurement)
    assert "KeyError: 'a feature'" in str(windows.whole.measurement_error)
    assert windows[0].measurement_error is None


def test_importing_is_cheap() -> None:
    heavy = "import sys, lmm_qa.video.decode; print({'torch', 'transformers', 'av', 'decord'} & set(sys.modules))"
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {heavy}"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == "set()"
