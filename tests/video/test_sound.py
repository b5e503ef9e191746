"""python -m pytest tests/video/test_sound.py"""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from clips import ffmpeg, read, write_clip

from lmm_qa.video.probe import scan_container
from lmm_qa.video.sound import SAMPLE_RATE, Sound, SoundState, read_sound, read_waveform

SECONDS = 2.0


def speech(rate: int = 44_100, seconds: float = SECONDS, channels: int = 2) -> np.ndarray:
    """(channels, n): noise that swells four times a second, different on each channel."""
    times = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(0).normal(size=(channels, len(times)))
    return (0.1 * noise * (0.2 + np.sin(4 * np.pi * times) ** 2)).astype(np.float32)


def with_sound(
    folder: Path, sound: np.ndarray, *options: str, rate: int = 44_100, codec: str = "flac", name: str = "clip.mp4"
) -> Path:
    """A clip of `SECONDS` with this sound, muxed by the ffmpeg program; `options` come before the sound."""
    picture = write_clip(folder / "picture.mp4", frames=round(25 * SECONDS))
    raw = folder / "sound.f32"
    raw.write_bytes(np.ascontiguousarray(sound.T, np.float32).tobytes())
    form = ("-f", "f32le", "-ar", str(rate), "-ac", str(len(sound)))
    bits = ("-sample_fmt:a", "s16") if codec == "flac" else ()
    ffmpeg("-i", picture, *options, *form, "-i", raw, "-c:v", "copy", "-c:a", codec, *bits, folder / name)
    return folder / name


def sound_of(path: Path) -> Sound:
    scan = scan_container(path)
    return read_sound(path, scan.start, scan.info.duration)


@pytest.mark.parametrize(("rate", "channels"), [(44_100, 2), (48_000, 1), (16_000, 1), (8_000, 2)])
def test_samples_are_those_of_ffmpeg(tmp_path: Path, rate: int, channels: int) -> None:
    path = with_sound(tmp_path, speech(rate, channels=channels), rate=rate)
    raw = ffmpeg("-i", path, "-map", "0:a", "-ac", "1", "-ar", str(SAMPLE_RATE), "-f", "s16le", "-")
    expected = np.frombuffer(raw, np.int16).astype(np.float32) / 32768
    sound = sound_of(path)
    assert sound.state is SoundState.PRESENT and sound.error is None
    assert len(sound.samples) == SECONDS * SAMPLE_RATE
    shared = min(len(expected), len(sound.samples))
    assert abs(sound.samples[:shared] - expected[:shared]).max() < 2 / 32768


def test_loudness_is_that_of_the_ffmpeg_program(tmp_path: Path) -> None:
    path = with_sound(tmp_path, speech(seconds=SECONDS))
    meter = ("-map", "0:a", "-af", "ebur128", "-f", "null", "-")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostats", "-i", path, *meter]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    integrated = float(re.findall(r"I:\s+(-?[\d.]+) LUFS", said)[-1])
    assert sound_of(path).loudness == pytest.approx(integrated, abs=0.1)


def test_clipped_share(tmp_path: Path) -> None:
    tone = np.zeros((1, 32_000), np.float32)
    tone[:, ::4] = 1.0
    assert sound_of(with_sound(tmp_path, tone, rate=16_000)).clipped == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("late", [-0.4, 0.0, 0.3])
def test_sound_has_its_place_on_the_clock_of_the_pictures(tmp_path: Path, late: float) -> None:
    original = with_sound(tmp_path, speech(), name="original.mkv")
    moved = tmp_path / "moved.mkv"
    ffmpeg("-i", original, "-itsoffset", str(late), "-i", original, "-map", "0:v", "-map", "1:a", "-c", "copy", moved)
    there, here = sound_of(original), sound_of(moved)
    shift = round(abs(late) * SAMPLE_RATE)
    first, second = (there.samples, here.samples) if late > 0 else (here.samples, there.samples)
    assert here.offset == pytest.approx(late, abs=0.002)
    part = first[100 : len(first) - shift - 100]
    best = max(range(-20, 21), key=lambda by: float(part @ second[shift + 100 + by :][: len(part)]))
    assert abs(best) <= 16, "times in Matroska are in milliseconds"
    if late > 0:
        assert not here.samples[: shift - 32].any()


def test_pictures_that_start_late_are_the_clock(tmp_path: Path) -> None:
    original = with_sound(tmp_path, speech(), name="original.mkv")
    moved = tmp_path / "moved.mkv"
    ffmpeg("-itsoffset", "0.5", "-i", original, "-i", original, "-map", "0:v", "-map", "1:a", "-c", "copy", moved)
    assert scan_container(moved).start == pytest.approx(0.5, abs=0.002)
    assert sound_of(moved).offset == pytest.approx(-0.5, abs=0.002)


def test_pictures_that_cannot_be_shown_are_not_the_clock(tmp_path: Path) -> None:
    """A cut before an open group of pictures: the first ones refer to pictures that are not there."""
    original = with_sound(tmp_path, speech(), name="original.mkv")
    open_group = ("-c:v", "libx264", "-x264-params", "open-gop=1:keyint=10:min-keyint=10:scenecut=0", "-bf", "3")
    ffmpeg("-i", original, *open_group, "-c:a", "copy", tmp_path / "open.mkv")
    ffmpeg("-ss", "1.1", "-i", tmp_path / "open.mkv", "-c", "copy", tmp_path / "cut.mkv")
    scan = scan_container(tmp_path / "cut.mkv")
    frames = read(tmp_path / "cut.mkv")
    left_out = scan.info.frames - frames.info.frames
    assert left_out > 0 and frames.sound is not None
    assert frames.sound.offset == pytest.approx(sound_of(tmp_path / "cut.mkv").offset - left_out / 25, abs=0.002)


def test_a_clip_without_sound(tmp_path: Path) -> None:
    sound = sound_of(write_clip(tmp_path / "mute.mp4"))
    assert sound.state is SoundState.NONE and not len(sound.samples) and sound.loudness is None


def test_silence(tmp_path: Path) -> None:
    sound = sound_of(write_clip(tmp_path / "silent.mp4", audio=True))
    assert sound.state is SoundState.SILENT and not len(sound.samples)
    assert sound.loudness == -70


def test_short_sound_has_no_loudness_and_is_heard(tmp_path: Path) -> None:
    sound = sound_of(with_sound(tmp_path, speech(seconds=0.3)))
    assert sound.state is SoundState.PRESENT and sound.loudness is None
    assert sound.seconds == pytest.approx(0.3, abs=0.01)
    assert not sound.samples[round(0.31 * SAMPLE_RATE) :].any()


def test_damaged_sound_leaves_the_clip_alone(tmp_path: Path) -> None:
    path = with_sound(tmp_path, speech(), codec="aac")
    data = bytearray(path.read_bytes())
    scan = scan_container(path)
    import av

    with av.open(str(path)) as container:
        packets = [(packet.pos or 0, packet.size) for packet in container.demux(audio=0) if packet.size]
    for position, size in packets[10:]:
        data[position : position + size] = b"\xff" * size
    path.write_bytes(bytes(data))
    frames = read(path)
    assert frames.info.frames == scan.info.frames
    assert frames.sound is not None and frames.sound.state is SoundState.BROKEN
    assert frames.sound.error and not len(frames.sound.samples)


@pytest.mark.parametrize(("codec", "channels"), [("pcm_f32le", 1), ("pcm_f32le", 2), ("pcm_f64le", 2)])
def test_samples_that_are_no_numbers_count_as_0(tmp_path: Path, codec: str, channels: int) -> None:
    values = speech(16_000, channels=channels)
    zeros = values.copy()
    values[0, 5000], values[-1, 9000:9100] = np.nan, -np.inf
    zeros[0, 5000], zeros[-1, 9000:9100] = 0, 0
    sound = sound_of(with_sound(tmp_path, values, rate=16_000, codec=codec, name="clip.mkv"))
    expected = sound_of(with_sound(tmp_path, zeros, rate=16_000, codec=codec, name="zeros.mkv"))
    assert expected.state is SoundState.PRESENT and expected.warning is None
    assert sound.not_finite == 101 and np.array_equal(sound.samples, expected.samples)
    assert replace(sound, samples=expected.samples, not_finite=0) == expected
    assert sound.warning == "NaN or infinite values in the sound, counted as 0: 101 samples."


def test_a_bug_costs_the_sound_and_not_the_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyError("a layout")

    path = with_sound(tmp_path, speech())
    monkeypatch.setattr("lmm_qa.video.sound._loudness_meter", fail)
    sound = read(path).sound
    assert sound is not None and sound.state is SoundState.BROKEN and "KeyError" in str(sound.error)


def test_only_the_length_of_the_clip_is_read(tmp_path: Path) -> None:
    sound = sound_of(with_sound(tmp_path, speech(seconds=3 * SECONDS)))
    assert len(sound.samples) == SECONDS * SAMPLE_RATE
    assert sound.seconds < SECONDS + 0.3


def test_the_waveform_is_lossless(tmp_path: Path) -> None:
    stored = speech(seconds=SECONDS)
    path = with_sound(tmp_path, stored)
    sound, waveform = read_waveform(path, 0.0, SECONDS)
    assert waveform is not None and waveform.rate == 44_100
    assert waveform.values.shape == stored.shape
    assert abs(waveform.values - stored).max() < 2 / 32768
    assert sound.samples == pytest.approx(waveform.values.mean(0))


def test_every_decoded_clip_has_its_sound(tmp_path: Path) -> None:
    frames = read(with_sound(tmp_path, speech()))
    assert frames.sound is not None and frames.sound.state is SoundState.PRESENT
