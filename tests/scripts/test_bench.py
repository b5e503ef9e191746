"""python -m pytest tests/scripts/test_bench.py

The benchmarks: whether each measured path does its work, not how long it takes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import SAMPLES, SCRIPTS

from lmm_qa import Rater
from lmm_qa.config import Sampling, View
from lmm_qa.model.source import EMBEDDED
from lmm_qa.video.decode import read_frames

CLIPS = [SAMPLES / "astronaut_clean.mp4", SAMPLES / "astronaut_blur_strong.mp4", SAMPLES / "avatar_clean.mp4"]

pytestmark = [
    pytest.mark.skipif(not any(EMBEDDED.glob("*.safetensors")), reason=f"no embedded model at {EMBEDDED}"),
    # PEFT 0.21 reads an attribute that transformers 5.23 has deprecated.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.fixture(scope="module")
def rater() -> Rater:
    return Rater.from_pretrained(device="cpu")


def test_the_reference_gets_the_same_pixels(rater: Rater) -> None:
    import bench_rating

    settings = rater.settings
    views = read_frames(CLIPS[0], settings.sampling, settings.views, rater.factor).views
    assert [view.kind for view in settings.views] == ["whole", "crop"]
    expected = [picture for view in views for picture in view]
    separate = list(bench_rating.separate_images(rater, CLIPS[0]))
    assert len(separate) == len(expected)
    for picture, other in zip(separate, expected, strict=True):
        assert picture.shape == other.shape
        assert np.abs(picture.astype(int) - other).max() <= 3  # decord's pixels


@pytest.mark.slow
def test_every_path_rates_every_clip(rater: Rater, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_rating

    monkeypatch.setattr(bench_rating, "QUESTIONS", 2)
    report = bench_rating.bench(rater, CLIPS, batch_size=2, workers=1, runs=1)
    plain = bench_rating.without_measurement(rater)
    assert report["scores"]["rater"] == pytest.approx([plain.rate(clip).score for clip in CLIPS[:2]], abs=1e-4)
    clean, blurred = report["scores"]["reference"]
    assert 1 < blurred < clean < 5
    assert report["paths"].keys() == {"reference", "rater", "decoding only", "forward only", "measured"}
    assert report["measured_over_rater"] > 1 and "measured: told" in bench_rating.table(report)
    for each in report["paths"].values():
        assert each["clips_per_second"] == pytest.approx(3 / each["seconds"][0], rel=0.01)
        assert each["peak_host_bytes"] > 1 << 27
        assert each["processor_seconds_per_clip"] > 0.01  # decoding only: that of processes which have ended
    limit = min(report["paths"][name]["clips_per_second"] for name in ("decoding only", "forward only"))
    assert report["rater_over_limit"] == pytest.approx(report["paths"]["rater"]["clips_per_second"] / limit)
    assert report["stages"].keys() == set(bench_rating.STAGES)
    assert all(seconds > 0 for seconds in report["stages"].values())
    assert report["stages"]["readout"] < report["stages"]["vision"]
    assert "3 clips" in bench_rating.table(report)
    assert report["questions"]["questions"] == 2
    assert "2 questions: processor time" in bench_rating.table(report)


def test_questions_share_a_prefill_or_have_one_each(rater: Rater, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_rating

    from lmm_qa.defects.questions import questions

    monkeypatch.setattr(bench_rating, "QUESTIONS", 5)
    patches: list[int] = []
    tower = next(part for name, part in rater.backbone.model.named_modules() if name.endswith("visual"))
    hook = tower.patch_embed.register_forward_hook(lambda _, inputs, __: patches.append(len(inputs[0])))
    try:
        cost = bench_rating.cost_of_questions(rater, CLIPS[1:2], runs=1)
    finally:
        hook.remove()
    # Looks at the clip: score and five questions on one prefill, and one by one, to compare; then the score alone and
    # with the questions, of frames that lie ready, of decoded ones, as a rating and its profile, and as the reference,
    # which has twice as many patches: frames as separate images are not merged in pairs.
    (clip,) = bench_rating.prepare(rater, CLIPS[1:2], 1)
    looks = sum(patches) / len(clip["pixel_values_videos"])
    assert looks == (1 + 6) + (1 + 1) + (1 + 1) + (1 + 1) + 2 * (1 + 6)
    assert (cost["questions"], cost["clips"]) == (5, 1)
    assert cost["largest_difference"] < 1e-4, "on one prefill or on many"
    times = cost["times_the_score"]
    assert times.keys() == {"score", "decoding + score", "rating", "reference"}
    spent = {name: each["processor_seconds_per_clip"] for name, each in cost["paths"].items()}
    assert times["score"]["processor"] == spent["score + questions"] / spent["score"]
    score, *closed = rater.settings.prompt, *list(questions().values())[:2]
    answers = bench_rating.reference_answers(rater, CLIPS[1], [score, *closed])
    assert [len(each.logits) for each in answers] == [5, 2, 2]
    assert answers[1].logits.tolist() != answers[2].logits.tolist()


def test_stages_add_up(rater: Rater) -> None:
    import bench_rating

    began = bench_rating.now()
    spent = bench_rating.stages(rater, CLIPS, 2)
    assert sum(spent.values()) * len(CLIPS) == pytest.approx(bench_rating.now() - began, rel=0.1)
    part = bench_rating.module(rater.backbone.model, "visual")
    assert not part._forward_hooks and not part._forward_pre_hooks


def test_a_configuration_alone_makes_a_rater(family_dir: Callable[[str], Path], tmp_path: Path) -> None:
    import bench_rating

    config = tmp_path / "small"
    config.mkdir()
    for file in family_dir("qwen2_vl").iterdir():
        if file.suffix != ".safetensors":
            (config / file.name).write_bytes(file.read_bytes())
    rater = bench_rating.random_rater(config, "cpu", Sampling(frames=2), [View(max_pixels=56 * 56)])
    scores = bench_rating.rate(rater, CLIPS, 2, 1)
    assert len(scores) == 3 and all(1 < score < 5 for score in scores)


def test_decoders_give_the_same_pictures(clips_dir: Path) -> None:
    import bench_decoding

    names = ["h264.mp4", "hevc.mkv", "uneven.mp4", "animation.gif"]
    report = bench_decoding.bench([clips_dir / name for name in names], frames=4, runs=1, workers=1)
    assert report["decoders"]["PyAV"]["fails"] == report["decoders"]["lmm_qa"]["fails"] == []
    assert report["decoders"]["lmm_qa"]["mean_difference"] < 0.6
    if "decord" in report["decoders"]:
        assert [fail.split(":")[0] for fail in report["decoders"]["decord"]["fails"]] == ["animation.gif"]
    assert report["frames"] == 150
    assert "4 frames of each of 4 clips" in bench_decoding.table(report)


def samples(memory: Callable[[int], int], time: Callable[[int], float], clips: int) -> list[Any]:
    spent = np.cumsum([0.0, *(time(clip) for clip in range(clips))])
    return [(clip, memory(clip), spent[clip]) for clip in range(0, clips + 1, 4)]


def test_growth_is_detected() -> None:
    import long_run

    flat = long_run.measure_growth(samples(lambda clip: 1000 + clip % 7, lambda clip: 0.1, 2000), 2000)
    assert flat["memory_growth"] == pytest.approx(0, abs=0.01)
    assert flat["time_growth"] == pytest.approx(0, abs=1e-6)
    assert flat["processor_seconds_per_clip"] == pytest.approx((0.1, 0.1))
    warm = long_run.measure_growth(samples(lambda clip: 1000 * min(clip, 200), lambda clip: 0.1, 2000), 2000)
    assert warm["memory_growth"] == 0
    leaking = long_run.measure_growth(samples(lambda clip: 100_000 + 10 * clip, lambda clip: 0.1, 2000), 2000)
    assert leaking["memory_growth"] == pytest.approx(0.166, abs=0.01)
    slower = long_run.measure_growth(samples(lambda clip: 1000, lambda clip: 0.1 + clip / 10_000, 2000), 2000)
    assert slower["time_growth"] > 0.5
