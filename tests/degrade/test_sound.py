"""python -m pytest tests/degrade/test_sound.py"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from clips import write_clip
from paths import SHARED
from scipy.signal import correlate

from lmm_qa.degrade.causes import encode
from lmm_qa.degrade.dataset import DegradationPlan, DegradedDataset
from lmm_qa.degrade.sound import SOUND, degrade_sound, follow_pictures, sound_offset, sync_quality
from lmm_qa.errors import UsageError
from lmm_qa.files.tables import Row
from lmm_qa.manifest import expand
from lmm_qa.video.sound import Waveform, read_waveform

RATE, SECONDS = 8000, 3.0


def noise(seconds: float, seed: int = 0, channels: int = 1) -> Waveform:
    values = np.random.default_rng(seed).normal(0, 0.1, (channels, round(seconds * RATE)))
    return Waveform(values.astype(np.float32), RATE)


def late_by(one: Waveform, other: Waveform) -> float:
    """Seconds by which `one` is later than `other`."""
    matches = correlate(one.values[0], other.values[0])
    return float(matches.argmax() - other.values.shape[1] + 1) / RATE


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("cause", ["audio_lead", "audio_lag"])
def test_offset_of_the_sound(cause: str, strength: float) -> None:
    source = noise(SECONDS + 1.5)
    degraded = degrade_sound(source, cause, strength, 0, seconds=SECONDS).waveform
    assert degraded.values.shape == (1, round(SECONDS * RATE))
    assert late_by(degraded, source) == pytest.approx(sound_offset(cause, strength), abs=1 / RATE)
    heard = degraded.values if cause == "audio_lead" else degraded.values[:, round(1.5 * RATE) :]
    assert (heard != 0).mean() > 0.99, "what follows the clip in the source is used"


def test_offsets_go_from_40_ms_to_a_second_and_a_half() -> None:
    assert sound_offset("audio_lag", 0.0) == pytest.approx(0.04)
    assert sound_offset("audio_lead", 1.0) == pytest.approx(-1.5)
    assert sound_offset("wrong_audio", 1.0) is None


def test_wrong_audio_is_that_of_the_other_clip() -> None:
    source, other = noise(SECONDS), noise(SECONDS, seed=1)
    half = degrade_sound(source, "wrong_audio", 0.5, 3, seconds=SECONDS, other=other).waveform.values
    changed = half != source.values
    assert changed.mean() == pytest.approx(0.5, abs=0.01)
    first, last = np.flatnonzero(changed[0])[[0, -1]]
    assert np.array_equal(half[:, first : last + 1], other.values[:, : last + 1 - first])


def test_drift_grows_to_one_percent() -> None:
    clicks = np.zeros((1, 20 * RATE), np.float32)
    clicks[:, [5 * RATE, 10 * RATE, 15 * RATE]] = 1
    slow = degrade_sound(Waveform(clicks, RATE), "drift", 1.0, 0, seconds=20.0).waveform.values[0]
    for second in (5, 10, 15):
        near = slow[second * RATE - RATE : second * RATE + RATE]
        assert near.argmax() / RATE - 1 == pytest.approx(0.01 * second, abs=0.001)


def test_quality_falls_with_the_offset_on_both_sides() -> None:
    assert sync_quality(0) == sync_quality(-0.04) == sync_quality(0.12) == pytest.approx(1)
    for sign in (-1, 1):
        curve = [sync_quality(sign * offset) for offset in np.linspace(0, 1.5, 31)]
        assert all(later <= before + 1e-9 for before, later in pairwise(curve))
    assert sync_quality(-0.5) < sync_quality(0.5), "early sound disturbs more"
    assert sync_quality(-9) == sync_quality(-1.5) > 0


@pytest.mark.skipif(not (SHARED / "thqa").is_dir(), reason="the label files of THQA-NTIRE are not there")
def test_quality_is_the_mean_opinion_of_thqa() -> None:
    opinions: dict[str, list[float]] = {}
    for name in ("train", "val"):
        for line in (SHARED / "thqa" / f"thqa_ntire_{name}.csv").read_text(encoding="utf-8").splitlines():
            clip, *_, mos = line.split(",")
            for mark in ("audio_lead_0.5", "audio_lead_1", "video_lead_0.5", "video_lead_1"):
                if clip.strip().endswith(f"_{mark}.mp4"):
                    opinions.setdefault(mark, []).append(float(mos))
    for mark, found in opinions.items():
        offset = float(mark.rpartition("_")[2]) * (-1 if mark.startswith("audio") else 1)
        assert len(found) == 45
        assert sync_quality(offset) * 3.6 == pytest.approx(np.mean(found), abs=0.01)
    assert len(opinions) == 4


def test_sound_follows_held_pictures() -> None:
    source = noise(SECONDS, channels=2)
    stalled = follow_pictures(source, [("stall", (1.0, 1.5))]).values
    held = slice(RATE, RATE + RATE // 2)
    assert not stalled[:, held].any()
    assert np.array_equal(np.delete(stalled, held, 1), np.delete(source.values, held, 1))
    late = follow_pictures(source, [("buffering", (0.0, 0.5))]).values
    assert not late[:, : RATE // 2].any() and np.array_equal(late[:, RATE // 2 :], source.values)


# --- Copies ----------------------------------------------------------------------------------------------------------


def speaking(path: Path, seed: int) -> Path:
    frames = np.random.default_rng(seed).integers(0, 255, (25, 64, 96, 3), np.uint8)
    encode(frames, "libx264", {"crf": "20"}, 25, str(path), noise(1.0, seed, channels=2))  # type: ignore[arg-type]
    return path


def make(folder: Path, plan: DegradationPlan) -> tuple[DegradedDataset, dict[str, Row]]:
    dataset = DegradedDataset(folder / "set" / "labels.jsonl", expand([folder / "clips"]), plan)
    rows = [row for row in dataset.make() if isinstance(row, dict)]
    return dataset, {row["clip"]: row for row in rows}


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    (tmp_path / "clips").mkdir()
    speaking(tmp_path / "clips" / "a.mp4", 1)
    speaking(tmp_path / "clips" / "b.mp4", 2)
    write_clip(tmp_path / "clips" / "mute.mp4", frames=25, size=(96, 64))
    return tmp_path


def test_copies_keep_their_sound(sources: Path) -> None:
    _, rows = make(sources, DegradationPlan(causes=("blur",), strengths=(0.5,)))
    for name, row in rows.items():
        waveform = read_waveform(sources / "set" / name, 0.0, 1.0)[1]
        assert row["sound"] == (waveform is not None) == ("mute" not in name)
        if waveform is not None:
            original = read_waveform(sources / "clips" / f"{name[0]}.mp4", 0.0, 1.0)[1]
            assert original is not None and abs(waveform.values - original.values).max() < 2 / 32768


def test_causes_in_the_sound(sources: Path) -> None:
    dataset, rows = make(sources, DegradationPlan(causes=tuple(SOUND), strengths=(0.8,)))
    assert dataset.without_sound == ["mute.mp4"]
    assert sorted(rows) == sorted(
        [f"{name}--{cause}.mp4" for name in "ab" for cause in ("clean", *(f"{one}-0.8" for one in SOUND))]
        + ["mute--clean.mp4"]
    )
    lead = rows["a--audio_lead-0.8.mp4"]
    assert lead["quality"] == pytest.approx(sync_quality(sound_offset("audio_lead", 0.8) or 0), abs=1e-4)
    assert "ahead of the lips" in lead["explanation"] and "lip_sync" not in str(lead["defects"])
    assert rows["a--wrong_audio-0.8.mp4"]["other_id"] == rows["b--clean.mp4"]["source_id"]
    again, _ = make(sources, DegradationPlan(causes=tuple(SOUND), strengths=(0.8,)))
    assert not again.pending


def test_wrong_audio_needs_two_sources(sources: Path) -> None:
    (sources / "clips" / "b.mp4").unlink()
    with pytest.raises(UsageError, match=r"only a\.mp4 has sound"):
        make(sources, DegradationPlan(causes=("wrong_audio",), strengths=(0.8,)))
