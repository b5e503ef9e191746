"""Damaged files are refused, not read in part. Run: python -m pytest tests/video/test_integrity.py"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from clips import read, write_damaged

from lmm_qa.errors import ClipTruncated, ClipUnreadable
from lmm_qa.video.integrity import find_structure_break
from lmm_qa.video.probe import probe

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


@pytest.mark.parametrize("name", [*DAMAGED, "odd.webm", "h264.ts"])
def test_the_structure_of_a_whole_file_is_intact(clips_dir: Path, tmp_path: Path, name: str) -> None:
    raw = (clips_dir / name).read_bytes()
    assert find_structure_break(clips_dir / name) is None
    assert find_structure_break(write_damaged(clips_dir / name, tmp_path, raw[:-1])) is not None


@pytest.mark.parametrize("name", [*DAMAGED, "odd.webm", "h264.ts"])
@pytest.mark.parametrize("part", [0.35, 0.6, 0.85, 0.97, 0.999])
def test_a_clip_that_is_cut_off_is_refused(clips_dir: Path, tmp_path: Path, name: str, part: float) -> None:
    raw = (clips_dir / name).read_bytes()
    copy = write_damaged(clips_dir / name, tmp_path, raw[: int(len(raw) * part)])
    for reader in (read, probe):
        with pytest.raises(ClipTruncated, match=r"stream breaks: \d+( of (about )?\d+)? frames could be read"):
            reader(copy)


def test_the_message_counts_the_frames(clips_dir: Path, tmp_path: Path) -> None:
    raw = (clips_dir / "faststart.mp4").read_bytes()
    copy = write_damaged(clips_dir / "faststart.mp4", tmp_path, raw[: len(raw) // 2])
    with pytest.raises(ClipTruncated, match=r"stream breaks: [12]\d of 60 frames could be read") as caught:
        read(copy)
    assert str(copy) in str(caught.value)


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("place", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("filling", ["zeros", "noise"])
def test_overwritten_bytes_are_noticed(clips_dir: Path, tmp_path: Path, name: str, place: float, filling: str) -> None:
    raw = bytearray((clips_dir / name).read_bytes())
    pictures = max(raw.find(b"mdat"), raw.find(b"movi"), 0)  # in AVI, much padding comes before them
    length = (len(raw) - pictures) // 10
    start = pictures + int((len(raw) - pictures) * place)
    raw[start : start + length] = bytes(length) if filling == "zeros" else random.Random(0).randbytes(length)
    with pytest.raises((ClipTruncated, ClipUnreadable)):
        read(write_damaged(clips_dir / name, tmp_path, bytes(raw)))


@pytest.mark.parametrize(
    ("table", "field", "value"), [("stts", 8, 1), ("stts", 8, 61), ("stsz", 8, 1), ("stsz", 8, 59), ("stsc", 12, 0)]
)
@pytest.mark.parametrize("name", ["h264.mp4", "edit_list.mp4"])
def test_contradicting_mp4_tables_are_noticed(
    clips_dir: Path, tmp_path: Path, name: str, table: str, field: int, value: int
) -> None:
    """Otherwise ffmpeg would silently return the frames that are in both tables."""
    raw = bytearray((clips_dir / name).read_bytes())
    place = raw.rindex(table.encode()) + 4 + field
    raw[place : place + 4] = value.to_bytes(4, "big")
    for reader in (read, probe):
        with pytest.raises(ClipTruncated, match=r"stream breaks: \d+( of \d+)? frames could be read"):
            reader(write_damaged(clips_dir / name, tmp_path, bytes(raw)))


def test_a_damaged_real_clip_is_refused(shared_dir: Path, tmp_path: Path) -> None:
    path = shared_dir / "clips" / "SadTalker__camera_qRrq9DqY_0000-RD_Radio31_000.mp4"
    raw = bytearray(path.read_bytes())
    middle = len(raw) // 2
    raw[middle : middle + 4096] = bytes(4096)
    with pytest.raises(ClipTruncated, match=r"stream breaks: \d+ of 200 frames could be read"):
        read(write_damaged(path, tmp_path, bytes(raw)))
