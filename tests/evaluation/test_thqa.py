"""python -m pytest tests/evaluation/test_thqa.py"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from lmm_qa.errors import ManifestError, ScoresError
from lmm_qa.evaluation.labels import Label, read_labels, read_names, read_scores
from lmm_qa.evaluation.metrics import agreement
from lmm_qa.evaluation.thqa import SCALE, SHRINKAGE, NamePrior, ThqaName, find_leaks, try_parse

SEN = "7889059_SEN_the_small_boy_put_the_worm_on_the_hook"


def clips(labels: tuple[Label, ...]) -> list[str]:
    return [label.clip for label in labels]


def mos(labels: tuple[Label, ...]) -> list[float]:
    return [label.mos for label in labels]


# --- names -----------------------------------------------------------------------------------------------------------


def test_the_three_patterns() -> None:
    assert ThqaName.parse("videos/14_dalle3_common_voice_en_35729059_audio2head.mp4") == ThqaName(
        "2d", 14, source="dalle3", audio="35729059", generator="audio2head"
    )
    assert ThqaName.parse("8_voice_en_34939394_wavlip.mp4") == ThqaName("v1", 8, audio="34939394", generator="wavlip")
    sentence = "the_small_boy_put_the_worm_on_the_hook"
    assert ThqaName.parse(f"{SEN}_stream_level_-2.mp4") == ThqaName(
        "3d", 7889059, sentence=sentence, distortion="stream_level", level=-2.0
    )
    assert ThqaName.parse(f"{SEN}_video_lead_0.5.mp4").level == 0.5


def test_groups_and_categories() -> None:
    portrait = ThqaName.parse("14_dalle3_common_voice_en_35729059_audio2head.mp4")
    assert portrait.group == ("2d", 14)
    assert portrait.categories == (("2d",), ("2d", "audio2head"), ("2d", "audio2head", "dalle3"))
    assert ThqaName.parse("14_voice_en_34939394_wavlip.mp4").group == ("v1", 14)
    assert ThqaName.parse(f"{SEN}_audio_lead_1.mp4").categories[-1] == ("3d", "audio_lead", "1")


@pytest.mark.parametrize(
    "name",
    [
        "clip.mp4",
        "14_dalle3_common_voice_en_35729059_audio2head.avi",
        "14_common_voice_en_1_x.mp4",
        f"{SEN}_blur_1.mp4",
        f"{SEN}_qp_level_.mp4",
        "",
    ],
)
def test_names_of_other_datasets_are_refused(name: str) -> None:
    assert try_parse(name) is None
    with pytest.raises(ManifestError, match="is not a file name of THQA-NTIRE"):
        ThqaName.parse(name)


# --- the name-only prior ---------------------------------------------------------------------------------------------


def test_prior_means_are_shrunk_towards_the_coarser_category() -> None:
    names = [f"{pid}_voice_en_1_{generator}.mp4" for pid, generator in ((1, "a"), (2, "a"), (3, "b"))]
    prior = NamePrior.fit(names, [5.0, 4.0, 0.0])
    v1 = (9 + SHRINKAGE * 3) / (3 + SHRINKAGE)
    assert prior.predict("9_voice_en_7_a.mp4") == pytest.approx((9 + SHRINKAGE * v1) / (2 + SHRINKAGE))
    assert prior.predict("9_voice_en_7_unseen.mp4") == pytest.approx(v1)
    assert prior.predict(f"{SEN}_qp_level_6.mp4") == pytest.approx(3.0)


def test_the_prior_needs_thqa_names_and_labels() -> None:
    with pytest.raises(ManifestError, match=r"'clip.mp4' is not a file name of THQA-NTIRE"):
        NamePrior.fit(["clip.mp4"], [3.0])
    with pytest.raises(ScoresError, match="needs labelled clips, received none"):
        NamePrior.fit([], [])


# --- groups on both sides of a split ---------------------------------------------------------------------------------


def test_a_person_on_both_sides_of_a_split_is_a_leak() -> None:
    train = ["14_flux_common_voice_en_1_wavlip.mp4", "14_flux_common_voice_en_2_wavlip.mp4", "14_voice_en_1_eat.mp4"]
    val = ["14_flux_common_voice_en_3_eat.mp4", "8_voice_en_1_eat.mp4"]
    (leak,) = find_leaks(train, val)
    assert (leak.group, leak.train, leak.held_out) == (("2d", 14), tuple(train[:2]), tuple(val[:1]))
    assert str(leak) == "2 training clips (wavlip) show 2d 14, as 1 held-out clips do: leave them out when training"
    assert find_leaks(train[2:], val) == ()


# --- the published files ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def thqa_dir(shared_dir: Path) -> Path:
    return shared_dir / "thqa"


def test_published_names_labels_and_lists(thqa_dir: Path) -> None:
    train, val = (read_labels(thqa_dir / f"thqa_ntire_{name}.csv") for name in ("train", "val"))
    test = read_names(thqa_dir / "thqa_ntire_testlist.csv")
    assert (len(train), len(val), len(test)) == (8927, 1714, 1606)
    counted = [Counter(ThqaName.parse(name).clip_class for name in names) for names in (clips(train), clips(val), test)]
    assert counted[:2] == [{"2d": 7487, "v1": 640, "3d": 800}, {"2d": 1534, "v1": 80, "3d": 100}]
    assert set(counted[2]) == {"2d", "v1", "3d"}

    assert list(read_names(thqa_dir / "thqa_ntire_vallist.csv")) == clips(val)
    assert [score.clip for score in read_scores(thqa_dir / "baseline_output.txt")] == clips(val)
    for labels in (train, val):
        assert SCALE[0] <= min(mos(labels)) < max(mos(labels)) <= SCALE[1]
    assert sum(mos(train)) / len(train) == pytest.approx(2.39, abs=0.005)

    assert {label.group for label in val if ThqaName.parse(label.clip).clip_class == "v1"} == {
        label.group for label in val if isinstance(label.group, tuple) and label.group[0] == "v1"
    }
    assert ("2d", 14) in {label.group for label in val}


def test_published_split_has_one_leak_and_its_prior_reaches_the_baseline(thqa_dir: Path) -> None:
    train, val = (read_labels(thqa_dir / f"thqa_ntire_{name}.csv") for name in ("train", "val"))
    (leak,) = find_leaks(clips(train), clips(val))
    assert leak.group == ("2d", 14)
    assert len(leak.train) == 55
    assert all(name.startswith("14_") and name.endswith("_wavlip.mp4") for name in leak.train)
    assert not any(name.endswith("_wavlip.mp4") for name in leak.held_out if name in leak.train)
    assert str(leak) == (
        "55 training clips (wavlip) show 2d 14, as 700 held-out clips do: leave them out when training"
    )
    assert find_leaks(set(clips(train)) - set(leak.train), clips(val)) == ()
    assert find_leaks(clips(train) + clips(val), read_names(thqa_dir / "thqa_ntire_testlist.csv")) == ()

    prior = NamePrior.fit(clips(train), mos(train))
    assert agreement([prior.predict(clip) for clip in clips(val)], mos(val))["main"] >= 0.78
