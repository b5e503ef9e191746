"""python -m pytest tests/video/test_probe.py"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from clips import ffmpeg, read

from lmm_qa.config import Sampling
from lmm_qa.errors import ClipNotFound, ClipUnreadable
from lmm_qa.video.probe import probe


def test_audio_is_noticed(clips_dir: Path) -> None:
    assert probe(clips_dir / "faststart.mp4").has_audio
    assert not probe(clips_dir / "h264.mp4").has_audio


def test_frames_that_an_avi_leaves_out_are_not_damage(clips_dir: Path) -> None:
    info = read(clips_dir / "left_out.avi").info
    assert info.frames < info.declared_frames == 25


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ClipNotFound, match=r"no clip at .*missing\.mp4"):
        probe(tmp_path / "missing.mp4")


@pytest.mark.parametrize(
    "content", [b"", b"not a video\n" * 50, b"#EXTM3U\n#EXTINF:1,\nh264.mp4\n#EXT-X-ENDLIST\n", bytes(5000)]
)
@pytest.mark.parametrize("name", ["clip.mp4", "clip.txt"])
def test_files_that_are_not_videos(clips_dir: Path, tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / "h264.mp4").write_bytes((clips_dir / "h264.mp4").read_bytes())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ClipUnreadable, match=name):
        read(tmp_path / name)


def test_an_audio_file_a_folder_and_a_pipe(clips_dir: Path, tmp_path: Path) -> None:
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


def test_no_real_clip_is_taken_for_damaged(shared_dir: Path) -> None:
    clips = sorted(path for path in (shared_dir / "clips").iterdir() if path.suffix != ".csv")
    for path in clips:
        assert probe(path).frames > 1
    smallest = sorted(clips, key=lambda path: path.stat().st_size)[:40]
    for path in smallest:
        frames = read(path, Sampling(frames=4), factor=28)
        assert len(set(frames.indices)) == 4
