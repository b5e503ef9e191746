"""Frames are the right ones, upright and whole; damage is told, never hidden; a hanging decoder costs one clip.

Run: python -m pytest tests/video/test_decode.py
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from clips import UNEVEN, ffmpeg, ffmpeg_frames, read_number, read_or_die, read_or_hang
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lmm_qa.config import Sampling, View
from lmm_qa.errors import (
    ClipError,
    ClipNotFound,
    ClipTimeout,
    ClipTruncated,
    ClipUnreadable,
    DecoderCrashed,
    UsageError,
)
from lmm_qa.video import decode as video
from lmm_qa.video.decode import Frames, Windows, read_frames, read_windows
from lmm_qa.video.decoder_pool import DecoderPool
from lmm_qa.video.face import face_window, find_face
from lmm_qa.video.probe import probe
from lmm_qa.video.sampling import sample_indices, window_spans
from lmm_qa.video.views import view_size

SAMPLES = Path(video.__file__).parent / "samples"
WHOLE = View()
FACTOR = 2
"""Small, so that the clips (192x128) keep their size."""


def read(path: Path, sampling: Sampling | None = None, *views: View, factor: int = FACTOR) -> Frames:
    return read_frames(path, sampling or Sampling(), views or (WHOLE,), factor)


def numbers(frames: Frames) -> tuple[int, ...]:
    """The numbers that the pictures of the first view carry."""
    return tuple(read_number(picture) for picture in frames.views[0])


# Which frames


@st.composite
def timelines(draw: st.DrawFn) -> list[float]:
    gaps = draw(st.lists(st.floats(0.001, 2), max_size=60))
    return [0.0, *np.cumsum(gaps)]


samplings = st.builds(
    Sampling,
    strategy=st.sampled_from(["uniform", "fps", "pairs"]),
    frames=st.integers(1, 20).map(lambda half: 2 * half),
    fps=st.floats(0.1, 60),
    gap=st.floats(0.01, 5),
)


@given(timelines(), samplings)
def test_indices_lie_in_the_clip_and_are_as_many_as_asked(seconds: list[float], sampling: Sampling) -> None:
    indices = sample_indices(seconds, sampling)
    assert all(0 <= index < len(seconds) for index in indices)
    assert 1 <= len(indices) <= sampling.frames
    assert len(indices) == sampling.frames or sampling.strategy == "fps"
    if sampling.strategy != "pairs":
        assert indices == sorted(indices)


@given(timelines(), samplings)
def test_the_frames_of_a_pair_differ_and_are_the_gap_apart(seconds: list[float], sampling: Sampling) -> None:
    indices = sample_indices(seconds, sampling.model_copy(update={"strategy": "pairs"}))
    longest = max((after - before for before, after in pairwise(seconds)), default=0)
    for first, second in zip(indices[::2], indices[1::2], strict=True):
        assert second > first or len(seconds) == 1
        if seconds[-1] >= sampling.gap:
            assert abs(seconds[second] - seconds[first] - sampling.gap) <= longest + 1e-5


def test_uniform_takes_the_middle_of_equal_shares() -> None:
    assert sample_indices([index / 25 for index in range(250)], Sampling(frames=5)) == [25, 75, 125, 175, 225]


def test_a_clip_with_too_few_frames_repeats_them() -> None:
    assert sample_indices([0.0, 0.04], Sampling(frames=4)) == [0, 0, 1, 1]


def test_fps_goes_by_time_and_falls_back_to_uniform() -> None:
    steady = [index / 25 for index in range(250)]
    assert sample_indices(steady, Sampling(strategy="fps", fps=1, frames=20)) == list(range(0, 250, 25))
    assert sample_indices(steady, Sampling(strategy="fps", fps=5, frames=5)) == [25, 75, 125, 175, 225]
    uneven = [0.0, 0.1, 0.2, 2.0, 3.0]
    assert sample_indices(uneven, Sampling(strategy="fps", fps=1, frames=20)) == [0, 2, 3, 4]


def test_pairs_are_moved_back_inside_at_the_end() -> None:
    steady = [index / 25 for index in range(10)]
    assert sample_indices(steady, Sampling(strategy="pairs", frames=4, gap=0.08)) == [2, 4, 7, 9]
    assert sample_indices(steady, Sampling(strategy="pairs", frames=4, gap=0.2)) == [2, 7, 4, 9]


# Which pixels


sides = st.integers(1, 5000)
factors = st.sampled_from([2, 14, 28, 32])


def test_the_phase_moves_frames_within_their_shares() -> None:
    seconds = [index / 25 for index in range(100)]
    for phase, expected in ((0.0, [0, 25, 50, 75]), (0.5, [12, 37, 62, 87]), (0.99, [24, 49, 74, 99])):
        assert sample_indices(seconds, Sampling(frames=4, phase=phase)) == expected
    assert sample_indices(seconds, Sampling(strategy="pairs", frames=4, phase=0.0, gap=0.08)) == [0, 2, 50, 52]
    assert sample_indices(seconds, Sampling(strategy="fps", fps=1, frames=4, phase=0.75)) == [6, 31, 56, 81]


@given(sides, sides, st.integers(28 * 28, 10**6), factors)
def test_whole_views_fit_the_grid_and_the_budget(height: int, width: int, budget: int, factor: int) -> None:
    rows, columns = view_size(height, width, View(max_pixels=budget), factor)
    assert rows % factor == columns % factor == 0
    assert rows >= factor <= columns
    assert rows * columns <= max(budget, factor * factor)


@given(st.integers(28, 3000), st.integers(28, 3000), st.integers(28 * 28, 10**6))
def test_whole_views_are_rounded_as_qwen_does_it(height: int, width: int, budget: int) -> None:
    smart_resize = pytest.importorskip("transformers.models.qwen2_vl.image_processing_qwen2_vl").smart_resize
    rows, columns = smart_resize(height, width, factor=28, min_pixels=28 * 28, max_pixels=budget)
    if rows * columns <= budget:  # Qwen's own can exceed the budget on very long pictures
        assert view_size(height, width, View(max_pixels=budget), 28) == (rows, columns)


@given(sides, sides, st.integers(28, 1000), factors)
def test_crops_fit_the_grid_and_the_picture(height: int, width: int, size: int, factor: int) -> None:
    view = View(kind="crop", size=size)
    for side, cropped in zip((height, width), view_size(height, width, view, factor), strict=True):
        assert cropped % factor == 0
        assert factor <= cropped <= max(factor, min(size, side))
        assert cropped > min(size, side) - factor


@given(
    st.integers(1, 90), st.integers(1, 90), st.sampled_from(["whole", "crop", "face"]), st.floats(0, 1), st.floats(0, 1)
)
def test_rendered_pictures_have_the_foretold_size(height: int, width: int, kind: str, x: float, y: float) -> None:
    view = View(kind=kind, size=56, max_pixels=56 * 56, center=(x, y))
    rendered = video._Rendered([view], 28)
    for index in range(5):
        rendered.add(index, np.zeros((height, width, 3), np.uint8))
    (pictures,) = rendered.stacked([4, 0, 0])
    assert pictures.shape == (3, *view_size(height, width, view, 28), 3)


def test_crop_takes_the_pixels_as_decoded(clips_dir: Path) -> None:
    crop = View(kind="crop", size=64, center=(1.0, 0.5))
    frames = read(clips_dir / "h264.mp4", Sampling(frames=3), WHOLE, crop)
    assert frames.views[0].shape == (3, 128, 192, 3)
    assert np.array_equal(frames.views[1], frames.views[0][:, 32:96, 128:192])


def test_the_face_fills_its_view() -> None:
    """One window for all frames, with the face of the clip (by the script that made it) in its middle."""
    views = WHOLE, View(kind="face", size=144)
    frames = read(SAMPLES / "astronaut_clean.mp4", Sampling(frames=6), *views)
    whole, face = frames.views
    assert face.shape == (6, 144, 144, 3)
    x, y, side = face_window(find_face(whole[:3]), *whole.shape[1:3])
    assert side < 250
    assert x + side / 2 == pytest.approx(0.50 * 384, abs=0.1 * side)
    assert y + side / 2 == pytest.approx(0.45 * 384, abs=0.1 * side)
    inner = (slice(4, -4),) * 2  # at the edge of a box, resizing looks beyond it
    for number in range(6):
        window = Image.fromarray(whole[number, y : y + side, x : x + side])
        cut = np.asarray(window.resize((144, 144), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(cut - face[number])[inner].max() < 2


def test_a_clip_with_no_face_has_a_view_of_it(clips_dir: Path) -> None:
    frames = read(clips_dir / "h264.mp4", Sampling(frames=2), WHOLE, View(kind="face", size=56), factor=28)
    assert frames.views[1].shape == (2, 56, 56, 3)


def test_whole_view_is_resized_into_the_budget(clips_dir: Path) -> None:
    frames = read(clips_dir / "h264.mp4", Sampling(frames=4), View(max_pixels=10_000), factor=28)
    assert frames.views[0].shape == (4, 56, 112, 3)
    assert numbers(frames) == frames.indices


def test_a_tiny_clip_is_padded(clips_dir: Path) -> None:
    frames = read(clips_dir / "tiny.mp4", Sampling(frames=2), WHOLE, View(kind="crop"), factor=28)
    assert [view.shape for view in frames.views] == [(2, 28, 28, 3)] * 2
    assert (frames.views[1][:, 9:] == frames.views[1][:, 9:10]).all()


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
    assert frames.indices == numbers(frames)
    assert frames.views[0].dtype == np.uint8 and frames.views[0].flags.c_contiguous
    if info.width % 2 == info.height % 2 == 0:
        expected = ffmpeg_frames(path, info.width, info.height)
        assert len(expected) == count
        # 10 bits are brought down to 8 with another rounding there.
        assert np.abs(frames.views[0] - expected[list(frames.indices)].astype(float)).mean() < 0.6


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_metadata_is_applied(clips_dir: Path, degrees: int) -> None:
    path = clips_dir / f"turned_{degrees}.mp4"
    frames = read(path, Sampling(frames=5))
    info = frames.info
    assert info.rotation == 360 - degrees  # ffmpeg's option counts the other way round
    assert (info.width, info.height) == ((192, 128) if degrees == 180 else (128, 192))
    assert np.array_equal(frames.views[0], ffmpeg_frames(path, info.width, info.height)[list(frames.indices)])


def test_an_edit_list_hides_frames(clips_dir: Path) -> None:
    frames = read(clips_dir / "edit_list.mp4", Sampling(frames=4))
    assert frames.info.frames < frames.info.declared_frames
    hidden = 60 - frames.info.frames
    assert numbers(frames) == tuple(index + hidden for index in frames.indices)


def test_packets_that_show_nothing_are_no_frames(clips_dir: Path) -> None:
    path = clips_dir / "hidden_packets.webm"
    frames = read(path, Sampling(frames=60))
    assert probe(path).frames > frames.info.frames == 60
    assert frames.info.fps == pytest.approx(25)
    assert frames.indices == numbers(frames) == tuple(range(60))


def test_frames_left_out_of_an_avi_are_no_damage(clips_dir: Path) -> None:
    info = read(clips_dir / "left_out.avi").info
    assert info.frames < info.declared_frames == 25


@pytest.mark.parametrize("name", ["uneven.mp4", "uneven.mkv"])
def test_seconds_are_the_real_ones(clips_dir: Path, name: str) -> None:
    frames = read(clips_dir / name, Sampling(frames=30))
    assert frames.indices == tuple(range(30))
    assert frames.seconds == pytest.approx([moment / 1000 for moment in UNEVEN], abs=1e-3)
    assert frames.info.duration == pytest.approx(UNEVEN[-1] / 1000 + 0.04, abs=1e-3)


def test_sound_is_noticed(clips_dir: Path) -> None:
    assert probe(clips_dir / "faststart.mp4").has_audio
    assert not probe(clips_dir / "h264.mp4").has_audio


def test_transparent_pixels_lie_on_white(tmp_path: Path) -> None:
    from PIL import Image

    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (0, 0, 32, 64))
    picture.save(tmp_path / "half.gif", transparency=0, save_all=True)
    view = read(tmp_path / "half.gif", Sampling(frames=1)).views[0][0]
    assert (view[:, :32] == (255, 0, 0)).all()
    assert (view[:, 32:] == 255).all()


@pytest.mark.parametrize("name", ["h264.mp4", "bt709.mp4", "full_range.mp4", "mpeg4.avi", "uneven.mkv", "vp8.webm"])
def test_decord_seeks_to_the_same_pictures(clips_dir: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("decord")
    whole = read(clips_dir / name)
    monkeypatch.setattr(video, "WHOLE_DECODE_PIXELS", 0)
    sought = read(clips_dir / name)
    assert (whole.decoder, sought.decoder) == ("pyav", "decord")
    assert (whole.indices, whole.seconds, whole.info) == (sought.indices, sought.seconds, sought.info)
    assert np.abs(whole.views[0].astype(int) - sought.views[0]).max() <= 3


@pytest.mark.parametrize(
    "name", ["animation.gif", "av1.mp4", "turned_90.mp4", "h264_10bit.mp4", "hevc.mkv", "edit_list.mp4"]
)
def test_what_decord_gets_wrong_is_not_left_to_it(clips_dir: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read(clips_dir / name)
    monkeypatch.setattr(video, "WHOLE_DECODE_PIXELS", 0)
    again = read(clips_dir / name)
    assert again.decoder == "pyav"
    assert np.array_equal(whole.views[0], again.views[0])


# Real clips


def real_clips(shared_dir: Path) -> list[Path]:
    return sorted(path for path in (shared_dir / "clips").iterdir() if path.suffix != ".csv")


def test_no_real_clip_is_taken_for_broken(shared_dir: Path) -> None:
    clips = real_clips(shared_dir)
    for path in clips:
        assert probe(path).frames > 1
    smallest = sorted(clips, key=lambda path: path.stat().st_size)[:40]
    for path in smallest:
        frames = read(path, Sampling(frames=4), factor=28)
        assert len(set(frames.indices)) == 4


# Damage

DAMAGED = [
    "faststart.mp4",
    "h264.mp4",
    "h264.mkv",
    "hevc.mkv",
    "fragmented.mp4",
    "mpeg4.avi",
    "animation.gif",
    "vp8.webm",
]


def damaged(path: Path, folder: Path, data: bytes) -> Path:
    copy = folder / path.name
    copy.write_bytes(data)
    return copy


@pytest.mark.parametrize("name", [*DAMAGED, "odd.webm", "h264.ts"])
@pytest.mark.parametrize("part", [0.35, 0.6, 0.85, 0.97, 0.999])
def test_a_clip_cut_short_is_told(clips_dir: Path, tmp_path: Path, name: str, part: float) -> None:
    raw = (clips_dir / name).read_bytes()
    copy = damaged(clips_dir / name, tmp_path, raw[: int(len(raw) * part)])
    for look in (read, probe):
        with pytest.raises(ClipTruncated, match=r"stream breaks: \d+( of (about )?\d+)? frames could be read"):
            look(copy)


def test_the_message_counts_the_frames(clips_dir: Path, tmp_path: Path) -> None:
    raw = (clips_dir / "faststart.mp4").read_bytes()
    copy = damaged(clips_dir / "faststart.mp4", tmp_path, raw[: len(raw) // 2])
    with pytest.raises(ClipTruncated, match=r"stream breaks: [12]\d of 60 frames could be read") as caught:
        read(copy)
    assert str(copy) in str(caught.value)


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("place", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("filling", ["zeros", "noise"])
def test_overwritten_bytes_are_told(clips_dir: Path, tmp_path: Path, name: str, place: float, filling: str) -> None:
    raw = bytearray((clips_dir / name).read_bytes())
    pictures = max(raw.find(b"mdat"), raw.find(b"movi"), 0)  # in AVI, much padding comes before them
    length = (len(raw) - pictures) // 10
    start = pictures + int((len(raw) - pictures) * place)
    raw[start : start + length] = bytes(length) if filling == "zeros" else random.Random(0).randbytes(length)
    with pytest.raises((ClipTruncated, ClipUnreadable)):
        read(damaged(clips_dir / name, tmp_path, bytes(raw)))


@pytest.mark.parametrize(
    ("table", "field", "value"), [("stts", 8, 1), ("stts", 8, 61), ("stsz", 8, 1), ("stsz", 8, 59), ("stsc", 12, 0)]
)
@pytest.mark.parametrize("name", ["h264.mp4", "edit_list.mp4"])
def test_tables_that_contradict_each_other_are_told(
    clips_dir: Path, tmp_path: Path, name: str, table: str, field: int, value: int
) -> None:
    """Otherwise ffmpeg would show as many frames as both tables have, without a word."""
    raw = bytearray((clips_dir / name).read_bytes())
    place = raw.rindex(table.encode()) + 4 + field
    raw[place : place + 4] = value.to_bytes(4, "big")
    for look in (read, probe):
        with pytest.raises(ClipTruncated, match=r"stream breaks: \d+( of \d+)? frames could be read"):
            look(damaged(clips_dir / name, tmp_path, bytes(raw)))


def test_a_damaged_real_clip_is_told(shared_dir: Path, tmp_path: Path) -> None:
    path = shared_dir / "clips" / "SadTalker__camera_qRrq9DqY_0000-RD_Radio31_000.mp4"
    raw = bytearray(path.read_bytes())
    middle = len(raw) // 2
    raw[middle : middle + 4096] = bytes(4096)
    with pytest.raises(ClipTruncated, match=r"stream breaks: \d+ of 200 frames could be read"):
        read(damaged(path, tmp_path, bytes(raw)))


# What is no clip


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ClipNotFound, match=r"no clip at .*missing\.mp4"):
        probe(tmp_path / "missing.mp4")


@pytest.mark.parametrize(
    "content", [b"", b"not a video\n" * 50, b"#EXTM3U\n#EXTINF:1,\nh264.mp4\n#EXT-X-ENDLIST\n", bytes(5000)]
)
@pytest.mark.parametrize("name", ["clip.mp4", "clip.txt"])
def test_what_is_no_video(clips_dir: Path, tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / "h264.mp4").write_bytes((clips_dir / "h264.mp4").read_bytes())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ClipUnreadable, match=name):
        read(tmp_path / name)


def test_sound_alone_a_folder_and_a_pipe(clips_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ClipUnreadable, match="no video stream, only: audio"):
        read(clips_dir / "sound.m4a")
    with pytest.raises(ClipUnreadable, match="a folder"):
        read(tmp_path)
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(ClipUnreadable, match="a pipe"):
        read(tmp_path / "pipe.mp4")


def test_huge_pictures_are_refused(tmp_path: Path) -> None:
    ffmpeg("-f", "lavfi", "-i", "color=s=16400x32", "-frames:v", "2", "-c:v", "mjpeg", tmp_path / "wide.avi")
    with pytest.raises(ClipUnreadable, match=r"wide\.avi is 16400x32; at most 16384 pixels a side"):
        read(tmp_path / "wide.avi")


# Windows of time


@given(st.floats(0.04, 200), st.floats(0.1, 10), st.floats(0.05, 10))
def test_windows_cover_the_clip(duration: float, window: float, step: float) -> None:
    spans = window_spans(duration, window, step)
    assert spans[0][0] == 0 and spans[-1][1] == duration
    assert len(spans) == 1 or all(last - first == pytest.approx(window) for first, last in spans)
    assert all(0 < after[0] - before[0] <= step + 1e-5 for before, after in pairwise(spans))


def test_windows_begin_a_step_apart_and_the_last_ends_the_clip() -> None:
    assert window_spans(5, 2, 1) == [(0, 2), (1, 3), (2, 4), (3, 5)]
    assert window_spans(4.7, 2, 1) == [(0, 2), (1, 3), (2, 4), (pytest.approx(2.7), 4.7)]
    assert window_spans(1.5, 2, 1) == [(0, 1.5)]


@pytest.mark.parametrize("sampling", [Sampling(frames=5), Sampling(strategy="pairs", frames=6)])
def test_a_window_holds_what_a_cut_of_it_would(clips_dir: Path, tmp_path: Path, sampling: Sampling) -> None:
    views = View(), View(kind="crop", size=64)
    windows = read_windows(clips_dir / "h264.mp4", sampling, views, FACTOR, 0.8, 0.4)
    assert [span[0] for span in windows.spans] == pytest.approx([0, 0.4, 0.8, 1.2, 1.6])
    assert len(windows) == len(list(windows)) == 5
    for start, window in zip((0, 10, 20, 30, 40), windows, strict=True):
        filters = f"trim=start_frame={start}:end_frame={start + 20},setpts=PTS-STARTPTS"
        ffmpeg("-i", clips_dir / "h264.mp4", "-vf", filters, "-c:v", "ffv1", tmp_path / "cut.mkv")
        cut = read(tmp_path / "cut.mkv", sampling, *views)
        assert window.indices == tuple(start + index for index in cut.indices)
        assert window.seconds == pytest.approx([start / 25 + moment for moment in cut.seconds])
        assert all(np.array_equal(ours, theirs) for ours, theirs in zip(window.views, cut.views, strict=True))
        assert window.info == windows.frames.info and window.dynamics is None


def test_each_frame_of_windows_is_rendered_once(clips_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 60 frames; 17 windows look 170 times at them."""
    rendered = []
    render = video._render
    monkeypatch.setattr(video, "_render", lambda picture, *rest: (rendered.append(1), render(picture, *rest))[1])
    windows = read_windows(clips_dir / "h264.mp4", Sampling(frames=10), [WHOLE], FACTOR, 0.8, 0.1)
    assert sum(map(len, windows.rows)) == 170
    assert len(rendered) == len(set(windows.frames.indices)) == len(windows.frames.views[0]) <= 60


def test_windows_come_with_the_whole(clips_dir: Path) -> None:
    whole = read(clips_dir / "h264.mp4", Sampling(frames=7))
    beside = read_windows(clips_dir / "h264.mp4", Sampling(frames=7), [WHOLE], FACTOR, 0.5, 0.5).whole
    assert (beside.indices, beside.seconds, beside.info) == (whole.indices, whole.seconds, whole.info)
    assert np.array_equal(beside.views[0], whole.views[0])
    assert beside.dynamics is not None and whole.dynamics is not None
    assert np.array_equal(beside.dynamics.detail, whole.dynamics.detail)


def test_windows_go_by_time_where_frames_are_uneven(clips_dir: Path) -> None:
    """A window in which no frame appears shows the one that is on screen."""
    windows = read_windows(clips_dir / "uneven.mp4", Sampling(frames=4), [WHOLE], FACTOR, 0.1, 0.1)
    for span, window in zip(windows.spans, windows, strict=True):
        appear = [index for index, moment in enumerate(UNEVEN) if span[0] - 1e-6 <= moment / 1000 < span[1] - 1e-6]
        shown = max(index for index, moment in enumerate(UNEVEN) if moment / 1000 <= span[0] + 1e-6)
        assert set(window.indices) <= set(appear or [shown])
        assert numbers(window) == window.indices


def test_a_clip_shorter_than_a_window_is_one(clips_dir: Path) -> None:
    windows = read_windows(clips_dir / "h264.mp4", Sampling(), [WHOLE], FACTOR, 5, 1)
    whole = read(clips_dir / "h264.mp4")
    assert windows.spans == ((0.0, pytest.approx(2.4)),)
    assert windows[0].indices == whole.indices and np.array_equal(windows[0].views[0], whole.views[0])


def test_memory_for_windows_is_bounded(clips_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = clips_dir / "h264.mp4", Sampling(frames=4), [WHOLE], FACTOR, 0.4, 0.1
    assert (len(read_windows(*request)), read_windows(*request).step) == (21, 0.1)
    monkeypatch.setattr(video, "WINDOWS_BYTES", (5 + 1) * 4 * 192 * 128 * 3)
    windows = read_windows(*request)
    assert len(windows) == 5 and windows.step == pytest.approx(0.5)
    assert windows.spans[-1] == pytest.approx((2.0, 2.4))
    assert sum(view.nbytes for view in windows.frames.views) <= video.WINDOWS_BYTES


@pytest.mark.parametrize(("window", "step"), [(0, 1), (2, 0), (-1, 1), (float("nan"), 1)])
def test_windows_and_steps_last_some_time(clips_dir: Path, window: float, step: float) -> None:
    with pytest.raises(UsageError, match=f"above 0 seconds, received {window:g} and {step:g}"):
        read_windows(clips_dir / "h264.mp4", Sampling(), [WHOLE], FACTOR, window, step)
    with DecoderPool(1) as pool, pytest.raises(UsageError, match="above 0 seconds"):
        pool.imap_windows([], Sampling(), [WHOLE], FACTOR, window, step)


def test_windows_of_a_damaged_clip_are_an_error(clips_dir: Path, tmp_path: Path) -> None:
    raw = (clips_dir / "h264.mkv").read_bytes()
    with pytest.raises(ClipTruncated):
        read_windows(damaged(clips_dir / "h264.mkv", tmp_path, raw[: len(raw) // 2]), Sampling(), [WHOLE], 2, 1, 1)


# What is measured of every frame


@pytest.mark.parametrize("name", ["h264.mp4", "odd.webm", "h264_10bit.mp4", "animation.gif", "uneven.mkv", "tiny.mp4"])
def test_every_frame_is_measured(clips_dir: Path, name: str) -> None:
    """In its brightness: as much changes from frame to frame as in grey pictures of another decoder."""
    frames = read(clips_dir / name)
    dynamics, info = frames.dynamics, frames.info
    assert dynamics is not None and len(dynamics.peak_change) == len(dynamics.background_change) == len(dynamics.detail) == info.frames
    assert dynamics.duration == info.duration and dynamics.seconds[list(frames.indices)] == pytest.approx(
        frames.seconds
    )
    grey = ffmpeg_frames(clips_dir / name, info.width, info.height).astype(float) @ (0.299, 0.587, 0.114)
    rows, columns = (np.arange(48) * 2 + 1) * info.height // 96, (np.arange(48) * 2 + 1) * info.width // 96
    change = np.abs(np.diff(grey[:, rows[:, None], columns], axis=0)).reshape(-1, 12, 4, 12, 4).mean(axis=(2, 4))
    # The ramp of brightness is stored in 219 steps, and shown in 255.
    assert dynamics.peak_change[1:] == pytest.approx(change.max(axis=(1, 2)) * 219 / 255, rel=0.2, abs=2)


def test_where_decord_seeks_nothing_is_measured(clips_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("decord", reason="decord has no wheels for this machine")
    monkeypatch.setattr(video, "WHOLE_DECODE_PIXELS", 0)
    frames = read(clips_dir / "h264.mp4")
    assert frames.decoder == "decord" and frames.dynamics is None
    windows = read_windows(clips_dir / "h264.mp4", Sampling(), [WHOLE], FACTOR, 1, 1)
    assert windows.frames.decoder == "pyav" and windows.frames.dynamics is not None


# Processes that can be killed


def pool_request() -> tuple[Sampling, tuple[View, ...], int]:
    return Sampling(frames=2), (WHOLE,), FACTOR


def named_copies(clips_dir: Path, folder: Path, *names: str) -> list[Path]:
    raw = (clips_dir / "h264.mp4").read_bytes()
    for name in names:
        (folder / name).write_bytes(raw)
    return [folder / name for name in names]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def pids(pool: DecoderPool) -> list[int]:
    return [worker._process.pid for worker in pool._workers if worker._process]


def test_results_come_in_order_with_errors_in_their_places(clips_dir: Path) -> None:
    names = ["one.mp4", "missing.mp4", "h264.mp4", "sound.m4a", "odd.webm", "animation.gif", "uneven.mkv"]
    with DecoderPool(2) as pool:
        results = list(pool.imap([clips_dir / name for name in names], *pool_request()))
        running = pids(pool)
    assert [type(result) for result in results] == [
        Frames,
        ClipNotFound,
        Frames,
        ClipUnreadable,
        Frames,
        Frames,
        Frames,
    ]
    for name, result in zip(names, results, strict=True):
        if isinstance(result, Frames):
            alone = read_frames(clips_dir / name, *pool_request())
            assert result.info == alone.info and np.array_equal(result.views[0], alone.views[0])
        else:
            assert name in str(result)
    assert len(running) == 2 and all(map(gone, running))


def test_windows_come_from_processes_too(clips_dir: Path) -> None:
    names = ["h264.mp4", "missing.mp4", "one.mp4"]
    with DecoderPool(2) as pool:
        results = list(pool.imap_windows([clips_dir / name for name in names], *pool_request(), 0.8, 0.4))
    assert [type(result) for result in results] == [Windows, ClipNotFound, Windows]
    alone = read_windows(clips_dir / "h264.mp4", *pool_request(), 0.8, 0.4)
    assert isinstance(results[0], Windows) and results[0].spans == alone.spans and results[0].rows == alone.rows
    assert np.array_equal(results[0].frames.views[0], alone.frames.views[0])
    assert results[0].frames.dynamics is not None


def test_look_ahead_is_bounded(clips_dir: Path) -> None:
    taken = 0

    def paths() -> Iterator[Path]:
        nonlocal taken
        for _ in range(20):
            taken += 1
            yield clips_dir / "one.mp4"

    with DecoderPool(1) as pool:
        for given_out, _ in enumerate(pool.imap(paths(), *pool_request()), start=1):
            assert taken <= given_out + 1
    assert taken == 20


def test_a_hanging_clip_costs_its_time_limit_and_nothing_else(clips_dir: Path, tmp_path: Path) -> None:
    paths = named_copies(clips_dir, tmp_path, "a.mp4", "hang.mp4", "b.mp4", "c.mp4")
    with DecoderPool(1, timeout=2, _reader=read_or_hang) as pool:
        results = list(pool.imap(paths, *pool_request()))
        running = pids(pool)
    assert [type(result) for result in results] == [Frames, ClipTimeout, Frames, Frames]
    assert "hang.mp4 took longer than 2 s" in str(results[1])
    assert all(map(gone, running))


def test_a_dying_decoder_costs_one_clip(clips_dir: Path, tmp_path: Path) -> None:
    paths = named_copies(clips_dir, tmp_path, "a.mp4", "abort.mp4", "b.mp4", "killed.mp4", "bug.mp4", "c.mp4")
    with DecoderPool(2, _reader=read_or_die) as pool:
        results = list(pool.imap(paths, *pool_request()))
    expected = [Frames, DecoderCrashed, Frames, DecoderCrashed, ClipUnreadable, Frames]
    assert [type(result) for result in results] == expected
    assert [str(results[index]).rpartition(": ")[2] for index in (1, 3)] == ["signal SIGABRT", "signal SIGKILL"]
    assert "ZeroDivisionError: division by zero" in str(results[4])


def test_leaving_early_leaves_nothing_behind(clips_dir: Path, tmp_path: Path) -> None:
    paths = named_copies(clips_dir, tmp_path, "a.mp4", "hang.mp4")
    start = time.monotonic()
    with DecoderPool(2, _reader=read_or_hang) as pool:
        results = pool.imap(paths, *pool_request())
        assert isinstance(next(results), Frames)
        running = pids(pool)
    assert time.monotonic() - start < 20
    assert running and all(map(gone, running))


def test_an_idle_worker_that_dies_is_no_clips_fault(clips_dir: Path) -> None:
    with DecoderPool(1) as pool:
        assert isinstance(next(pool.imap([clips_dir / "one.mp4"], *pool_request())), Frames)
        worker = pool._workers[0]
        assert worker._process is not None
        worker._process.kill()
        worker._process.wait()
        assert isinstance(next(pool.imap([clips_dir / "one.mp4"], *pool_request())), Frames)


def test_a_plain_script_can_be_interrupted(clips_dir: Path, tmp_path: Path) -> None:
    """The script has no main guard; Ctrl-C reaches it and its workers, as from a terminal."""
    paths = [str(path) for path in named_copies(clips_dir, tmp_path, "a.mp4", "hang.mp4")]
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from clips import read_or_hang\n"
        "from lmm_qa.config import Sampling, View\n"
        "from lmm_qa.video import DecoderPool\n"
        "with DecoderPool(1, _reader=read_or_hang) as pool:\n"
        f"    for result in pool.imap({paths!r}, Sampling(frames=2), [View()], 28):\n"
        "        print(pool._workers[0]._process.pid, type(result).__name__, flush=True)\n"
    )
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout and process.stderr
        worker, kind = process.stdout.readline().decode().split()
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        complaints = process.communicate(timeout=20)[1].decode()
    assert kind == "Frames"
    assert complaints.rstrip().endswith("KeyboardInterrupt")
    assert gone(int(worker))


def test_a_pool_needs_workers_and_time() -> None:
    with pytest.raises(UsageError, match="received 0 and 60"):
        DecoderPool(0)
    with pytest.raises(UsageError, match="received 2 and -1"):
        DecoderPool(2, timeout=-1)


def test_importing_is_cheap() -> None:
    heavy = "import sys, lmm_qa.video.decode; print({'torch', 'transformers', 'av', 'decord'} & set(sys.modules))"
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {heavy}"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == "set()"


def test_errors_of_clips_are_clip_errors() -> None:
    assert all(issubclass(kind, ClipError) for kind in (ClipNotFound, ClipTimeout, ClipTruncated, DecoderCrashed))
