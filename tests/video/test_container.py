"""Which files are rated, from which stream, and which are refused. Run: python -m pytest tests/video/test_container.py

The clips are some of `scripts/corpus`; `scripts/robustness.py` rates all of them.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest
from clips import FACTOR, ffmpeg
from paths import SCRIPTS

sys.path.insert(0, str(SCRIPTS))
from corpus import Case, sound

from lmm_qa.config import Sampling, View
from lmm_qa.degrade.dataset import read_clip
from lmm_qa.errors import ClipNotFound, ClipTruncated, ClipUnreadable
from lmm_qa.video.decode import Frames, read_frames
from lmm_qa.video.probe import probe

SOUND = [
    *("fragmented/frag_keyframe.mp4", "fragmented/frag_every_frame.mp4", "fragmented/audio+frag_keyframe.mp4"),
    *("cut/open264_0.77.mkv", "cut/open264_0.3.mp4", "cut/open265_0.77.mkv", "cut/open265_0.77.ts"),
    *("transport/begun_at_0.2.ts", "transport/begun_at_0.4.ts", "transport/joined_same_clock.ts"),
    *("transport/concatenated_same_clock.ts", "transport/concatenated_forward.ts"),
    *("transport/concatenated_backward.ts", "transport/concatenated_three.ts"),
    *("padded/text.mp4", "padded/noise.mp4", "padded/mdat_too_long.mp4", "padded/text.ts", "padded/text.mkv"),
    *("codec/vp8_hidden_frames.webm", "codec/vp9_hidden_frames_in_packets.mkv", "animated/of_pillow.webp"),
]
STREAMS = ["thumbnail_first.mp4", "thumbnail_first.mkv", "second_is_default.mp4", "two_videos.ts"]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("sources")
    return {case.name: case for case in sound.cases(folder)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, cases: dict[str, Case]) -> Path:
    """A folder with the clips `SOUND` and `STREAMS`."""
    folder = tmp_path_factory.mktemp("corpus")
    for name in (*SOUND, *(f"streams/{name}" for name in STREAMS), "streams/cover_first.mp4"):
        (folder / name).parent.mkdir(exist_ok=True)
        cases[name].make(folder / name)
    return folder


def read(path: Path) -> Frames:
    return read_frames(path, Sampling(frames=2), (View(),), FACTOR)


def shown_by_ffmpeg(path: Path) -> int:
    """Number of frames that ffmpeg shows of a file, errors or not."""
    log = ffmpeg("-i", path, "-map", "0:v:0", "-fps_mode", "passthrough", "-f", "framecrc", "-").decode()
    return sum(not line.startswith("#") for line in log.splitlines())


@pytest.mark.parametrize("name", SOUND)
def test_sound_files_are_rated_with_the_frames_that_ffmpeg_shows(corpus: Path, name: str) -> None:
    info = read(corpus / name).info
    if not name.endswith(".webp"):
        assert info.frames == shown_by_ffmpeg(corpus / name)
    steps = [info.duration / info.frames * info.fps]
    assert steps == pytest.approx([1]) and info.duration < 6
    assert bool(info.warnings) == ("transport/joined" in name or "transport/concat" in name)
    if info.warnings:
        assert info.warnings[0].startswith("The clock of the file jumps; its ")


@pytest.mark.parametrize("name", STREAMS)
def test_the_stream_that_players_show_is_rated_and_the_row_says_so(corpus: Path, name: str) -> None:
    path = corpus / "streams" / name
    info = read(path).info
    assert info.frames > 1 and (info.width, info.height) == (160, 160)
    assert info.warnings and info.warnings[0].startswith("Of 2 video streams, ")
    assert read_clip(path, 0.2)[0].shape[1:] == (160, 160, 3)


def test_a_cover_is_no_stream(corpus: Path, tmp_path: Path) -> None:
    assert read(corpus / "streams/cover_first.mp4").info.warnings == ()
    ffmpeg("-i", corpus / "streams/cover_first.mp4", "-frames:v", "1", tmp_path / "cover.jpg")
    tone = ("-f", "lavfi", "-i", "sine=d=1", "-i", tmp_path / "cover.jpg", "-map", "0", "-map", "1")
    ffmpeg(*tone, "-c:v", "copy", "-c:a", "aac", "-disposition:v:0", "attached_pic", tmp_path / "cover.m4a")
    with pytest.raises(ClipUnreadable, match="only sound and a cover picture"):
        probe(tmp_path / "cover.m4a")


def test_lost_packets_before_a_keyframe_are_no_join(clips_dir: Path, tmp_path: Path) -> None:
    raw = (clips_dir / "h264.ts").read_bytes()
    packets = [raw[at : at + 188] for at in range(0, len(raw), 188)]
    video = [number for number, packet in enumerate(packets) if packet[1] & 0x1F == 1 and packet[2] == 0]
    lost = set(video[len(video) // 2 : len(video) // 2 + 6])
    damaged = tmp_path / "lost.ts"
    damaged.write_bytes(b"".join(packet for number, packet in enumerate(packets) if number not in lost))
    with pytest.raises(ClipTruncated):
        read(damaged)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("page.mp4", b"<!DOCTYPE html><html></html>", "a web page"),
        ("list.mp4", b"#EXTM3U\n#EXTINF:4,\nother.mp4\n", "an HLS playlist, which names other files"),
        ("list.m3u8", b"#EXTM3U\n#EXTINF:4,\nother.mp4\n", "an HLS playlist, which names other files"),
        ("list.txt.mp4", b"ffconcat version 1.0\nfile other.mp4\n", "a list of other files"),
        ("pointer.mp4", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 1\n", "Git LFS pointer"),
        ("paper.mp4", b"%PDF-1.7 ...", "a PDF file"),
    ],
)
def test_other_files_are_refused_by_what_they_are(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ClipUnreadable, match=f"{name} is not a video but .*{words}"):
        probe(tmp_path / name)


def test_an_archive_is_not_searched_for_pictures(corpus: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "clip.mp4", "w") as archive:
        archive.write(corpus / SOUND[0])
    with pytest.raises(ClipUnreadable, match="a ZIP archive: unpack it first"):
        probe(tmp_path / "clip.mp4")


def test_an_encrypted_video_is_named_so(clips_dir: Path, tmp_path: Path) -> None:
    key = ("-encryption_scheme", "cenc-aes-ctr", "-encryption_key", "76" * 16, "-encryption_kid", "a7" * 16)
    ffmpeg("-i", clips_dir / "h264.mp4", "-c", "copy", *key, tmp_path / "secret.mp4")
    with pytest.raises(ClipUnreadable, match=r"secret\.mp4 is encrypted \(DRM\)"):
        probe(tmp_path / "secret.mp4")


def test_an_address_is_named_whole() -> None:
    with pytest.raises(ClipNotFound, match=r"^https://example\.com/a/clip\.mp4 is an address, not a file: download"):
        probe(Path("https://example.com/a/clip.mp4"))


CASES = {
    "crop_metadata/clap.mp4": (256, 256, 10, 0.4),
    "crop_metadata/crop.mkv": (256, 256, 10, 0.4),
    "first_stream/thumb_first.mkv": (256, 256, 50, 2.0),
    "first_stream/second_default.mp4": (256, 256, 50, 2.0),
    "first_stream/two.ts": (256, 256, 50, 2.0),
    "fragmented_with_samples_in_moov/frag_keyframe.mp4": (128, 128, 50, 2.0),
    "fragmented_with_samples_in_moov/frag_every_frame.mp4": (128, 128, 50, 2.0),
    "frames_fewer_than_packets/cut264.mp4": (256, 256, 57, 2.28),
    "frames_fewer_than_packets/cut264.mkv": (256, 256, 60, 2.4),
    "frames_fewer_than_packets/cut265.mkv": (128, 128, 60, 2.4),
    "frames_fewer_than_packets/cut265.ts": (128, 128, 60, 2.4),
    "frames_fewer_than_packets/midgop.ts": (128, 128, 75, 3.0),
    "mirrored/rot90hflip.mp4": (256, 256, 25, 1.0),
    "small_messages/trailing_bytes.mp4": (64, 64, 25, 1.0),
    "small_messages/anim.webp": (64, 64, 5, 0.5),
    "ts_times_jump/catted.ts": (128, 128, 100, 4.0),
    "ts_times_jump/jump.ts": (128, 128, 100, 4.0),
    "ts_times_jump/back.ts": (128, 128, 100, 4.0),
}


@pytest.mark.parametrize("name", CASES)
def test_files_that_went_wrong_once(shared_dir: Path, name: str) -> None:
    info = read(shared_dir / "cases" / name).info
    width, height, frames, seconds = CASES[name]
    assert (info.width, info.height, info.frames) == (width, height, frames)
    assert info.duration == pytest.approx(seconds, abs=0.001)
