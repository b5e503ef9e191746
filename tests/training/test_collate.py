"""python -m pytest tests/training/test_collate.py"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones import FAMILIES
from model_inputs import HYBRID, QWEN
from torch.distributed.utils import _apply_to_tensors

from lmm_qa.config import Sampling, View
from lmm_qa.defects.explanation import Finding, explanation_prompt, mentioned_defects, opening
from lmm_qa.defects.questions import questions
from lmm_qa.defects.vocabulary import BY_NAME, VISIBLE
from lmm_qa.errors import TrainingError
from lmm_qa.model import compat
from lmm_qa.model.backbone import Backbone
from lmm_qa.model.inputs import (
    ClipInput,
    append_question,
    collate_inputs,
    patch_factor,
    prepare_inputs,
    question_tokens,
    remove_question,
    vision_features,
)
from lmm_qa.model.loading import load_processor
from lmm_qa.model.prompt import Prompt
from lmm_qa.model.rater_config import RaterConfig
from lmm_qa.rater import clip_input
from lmm_qa.training.collate import (
    EpochSampler,
    LabelledClip,
    RatingCollator,
    RatingDataset,
    Sample,
    explanation_target,
    random_explanation,
    sample_defect_questions,
)
from lmm_qa.training.config import AugmentationConfig, AuxiliaryConfig
from lmm_qa.training.dataset import Example
from lmm_qa.training.trainer import next_token_logits
from lmm_qa.training.vision_cache import SampledClip, VisionCache
from lmm_qa.video.decode import read_frames
from lmm_qa.video.measurement.classifier import evidence_names
from lmm_qa.video.measurement.evidence import evidence_text
from lmm_qa.video.measurement.features import FeatureExtractor

Load = Callable[[str], Backbone]

PROMPT = Prompt(question="How good is it?", paraphrases=("Good?", "Is it {seconds:.1f} s of quality?"), stem="It is")
SLOTS = {"seconds": 2.0, "fps": 25.0, "frames": 4.0, "width": 96.0, "height": 64.0}


@pytest.fixture(scope="module")
def load(family_dir: Callable[[str], Path]) -> Load:
    """Loads a small model of a family, once."""
    return cache(lambda family: Backbone.load(str(family_dir(family)), device="cpu"))


def clip(seed: int, factor: int, sides: tuple[int, int] = (2, 3)) -> ClipInput:
    """Noise in two views of different sizes."""
    draw = np.random.default_rng(seed)
    views = tuple(draw.integers(0, 256, (4, side * factor, 2 * factor, 3), dtype=np.uint8) for side in sides)
    return ClipInput(views, (0.0, 0.5, 1.0, 1.5), 2.0, SLOTS)


def equal(one: Any, two: Any) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


@pytest.mark.parametrize("frames", ["video", "images"])
@pytest.mark.parametrize("family", FAMILIES)
def test_another_question_reuses_the_processed_pixels(family: str, frames: str, load: Load) -> None:
    processor = load(family).processor
    pixels = clip(0, patch_factor(processor) or 14)
    prompt = PROMPT.model_copy(update={"frames": frames, "view_labels": ("All of it:", "A part of it:")})
    first = remove_question(processor, prepare_inputs(processor, [pixels], prompt), prompt, 2, SLOTS)
    for question in (PROMPT.question, *PROMPT.paraphrases):
        other = prompt.model_copy(update={"question": question})
        equal(append_question(processor, first, other, 2, SLOTS), dict(prepare_inputs(processor, [pixels], other)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("frames", ["video", "images"])
def test_collated_clips_equal_a_batch_of_the_processor(family: str, frames: str, load: Load) -> None:
    prompt = PROMPT.model_copy(update={"frames": frames})
    processor = load(family).processor
    factor = patch_factor(processor)
    clips = [clip(0, factor or 14), clip(1, factor or 14, (4, 2))]
    single = [dict(prepare_inputs(processor, [one], prompt)) for one in clips]
    equal(collate_inputs(processor, single), dict(prepare_inputs(processor, clips, prompt)))


@pytest.mark.parametrize("frames", ["video", "images"])
@pytest.mark.parametrize("family", QWEN)
def test_vision_features_replace_the_pixels(family: str, frames: str, load: Load) -> None:
    prompt = PROMPT.model_copy(update={"frames": frames})
    backbone = load(family)
    clips = [clip(0, patch_factor(backbone.processor) or 1), clip(1, patch_factor(backbone.processor) or 1, (4, 2))]
    single = [dict(prepare_inputs(backbone.processor, [one], prompt)) for one in clips]
    with torch.no_grad():
        expected = backbone.model(**collate_inputs(backbone.processor, single), logits_to_keep=1).logits
        features = [vision_features(backbone.model, inputs) for inputs in single]
        joined = {name: torch.cat([each[name] for each in features], dim=-2) for name in features[0]}
        for inputs in single:
            del inputs["pixel_values_videos" if frames == "video" else "pixel_values"]
        batch = collate_inputs(backbone.processor, single)
        given = backbone.model(**batch, **compat.vision_kwargs(joined, batch), logits_to_keep=1).logits
        swapped = {name: value.flip(-2) for name, value in joined.items()}
        wrong = backbone.model(**batch, **compat.vision_kwargs(swapped, batch), logits_to_keep=1).logits
    assert ("deepstack" in joined) == (family in ("qwen3_vl", "qwen3_omni_moe"))
    torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-4)
    assert (wrong - expected).abs().max() > 1e-2, "the model depends on the features"


@pytest.mark.parametrize(("clips", "samples"), [(5, 17), (5, 5), (7, 3)])
def test_each_epoch_has_every_clip_once_in_its_own_order(clips: int, samples: int) -> None:
    keys = list(EpochSampler([-1] * clips, samples, seed=1))
    assert len(keys) == len(EpochSampler([-1] * clips, samples, seed=1)) == samples
    assert max(Counter(keys).values()) == 1
    orders = [[index for number, index in keys if number == epoch] for epoch in range(-(-samples // clips))]
    assert all(sorted(order) == list(range(clips)) for order in orders if len(order) == clips)
    assert list(EpochSampler([-1] * clips, samples, seed=1)) == keys
    if samples > 2 * clips:
        assert orders[0] != orders[1] and keys != list(EpochSampler([-1] * clips, samples, seed=2))


def test_clips_that_show_the_same_follow_each_other() -> None:
    contents = [-1, 7, 3, -1, 7, 3, 7, -1]
    orders = [[index for epoch, index in EpochSampler(contents, 80, seed=1) if epoch == number] for number in range(10)]
    assert all(sorted(order) == list(range(8)) for order in orders)
    for order in orders:
        seen = "".join("ab"[contents[index] == 3] if contents[index] > 0 else "-" for index in order)
        assert "aaa" in seen and "bb" in seen, seen
    assert len({tuple(order) for order in orders}) > 5


@pytest.fixture
def dataset(family_dir: Callable[[str], Path], clips_dir: Path) -> RatingDataset:
    processor = load_processor(str(family_dir("qwen2_vl")))
    settings = RaterConfig(prompt=PROMPT, sampling=Sampling(frames=4), views=(View(max_pixels=56 * 56),))
    files = sorted(clips_dir.glob("*.mp4"))[:3]
    clips = [LabelledClip(Example(file.name, file, 3.0, None, None, file, (1, 5)), file.name) for file in files]
    return RatingDataset(
        clips,
        settings,
        processor,
        10_000,
        None,
        AugmentationConfig(paraphrase_probability=0.5, temporal_offsets=3),
        seed=4,
    )


def test_a_sample_depends_only_on_seed_epoch_and_clip(dataset: RatingDataset) -> None:
    draws = {(number, index): dataset.augment((number, index)) for number in range(40) for index in range(3)}
    assert all(dataset.augment(key) == drawn for key, drawn in reversed(draws.items()))
    phases = Counter(sampling.phase for _, sampling, _ in draws.values())
    questions = Counter(prompt.question for _, _, prompt in draws.values())
    assert sorted(phases) == pytest.approx([1 / 6, 0.5, 5 / 6]) and min(phases.values()) > 20
    assert 40 < questions[PROMPT.question] < 80 and min(questions[question] for question in PROMPT.paraphrases) > 12
    assert {(sampled.content_id, sampled.sampling) for sampled in dataset.sampled_clips()} == {
        (clip.content_id, sampling) for clip, sampling, _ in draws.values()
    }, "the cached frame selections are those that are drawn"


def test_without_augmentation_a_sample_has_the_inputs_of_rating(dataset: RatingDataset) -> None:
    dataset.augmentation = None
    assert [sampled.sampling for sampled in dataset.sampled_clips()] == [dataset.settings.sampling] * 3
    sample = dataset[1]
    frames = read_frames(dataset.clips[1].example.path, dataset.settings.sampling, dataset.settings.views, 28)
    equal(sample["inputs"], dict(prepare_inputs(dataset.processor, [clip_input(frames)], PROMPT)))


def test_a_clip_with_too_many_tokens_is_named(dataset: RatingDataset) -> None:
    dataset.max_tokens = 10
    with pytest.raises(TrainingError, match=r"\.mp4 takes \d+ tokens, the model's context is 10: use fewer frames"):
        dataset[0, 0]


def test_batches_contain_their_samples(dataset: RatingDataset) -> None:
    first = dataset.clips[0]
    dataset.clips = [first._replace(example=replace(first.example, std=0.5)), *dataset.clips[1:]]
    parts = [dataset[0, index] for index in range(3)]
    batch = RatingCollator(dataset.processor)(parts)
    assert batch["names"] == [clip.example.name for clip in dataset.clips]
    assert batch["mos"] == [3.0] * 3 and [math.isnan(std) for std in batch["std"]] == [False, True, True]
    equal(batch["inputs"], collate_inputs(dataset.processor, [part["inputs"] for part in parts]))
    assert batch["vision_features"] == {}


EVIDENCE = {name: 0.5 for name in evidence_names()}


@pytest.fixture
def measured_dataset(dataset: RatingDataset) -> RatingDataset:
    """The dataset with a prompt that contains what was measured; the table says it for the first clip."""
    prompt = Prompt(question="Measured: {measured}. How good is it?", stem="It is")
    first, *rest = dataset.clips
    clips = [first._replace(example=replace(first.example, evidence=EVIDENCE)), *rest]
    settings = dataset.settings.override(prompt=prompt)
    augmentation = AugmentationConfig(evidence_dropout=0.25, temporal_offsets=1)
    return RatingDataset(clips, settings, dataset.processor, 10_000, None, augmentation, seed=4)


def question_of(dataset: RatingDataset, key: Any) -> str:
    """What a sample says between the pictures and the answer."""
    sample = dataset[key]
    return str(dataset.processor.tokenizer.decode(sample["inputs"]["input_ids"][0, sample["prefix_length"] :]))


def test_evidence_of_the_table_is_rounded_at_random_and_sometimes_missing(measured_dataset: RatingDataset) -> None:
    texts = [question_of(measured_dataset, (epoch, 0)) for epoch in range(60)]
    missing = [text for text in texts if "Measured: unknown." in text]
    assert 5 < len(missing) < 30
    assert {text.partition("blur ")[2][:1] for text in texts if text not in missing} == {"4", "5"}
    assert question_of(measured_dataset, (3, 0)) == texts[3]


def test_clips_without_evidence_are_measured_as_in_rating(measured_dataset: RatingDataset, tmp_path: Path) -> None:
    assert measured_dataset.measure
    path, settings = measured_dataset.clips[1].example.path, measured_dataset.settings
    frames = read_frames(path, settings.sampling, settings.views, measured_dataset.factor, FeatureExtractor)
    evidence = clip_input(frames).slots["measured"]
    measured_dataset.augmentation = None
    assert f"Measured: {evidence}. How" in question_of(measured_dataset, 1)
    assert f"Measured: {evidence_text(EVIDENCE)}. How" in question_of(measured_dataset, 0)


def test_clips_are_not_measured_if_their_tables_or_the_prompt_make_it_superfluous(
    dataset: RatingDataset, measured_dataset: RatingDataset
) -> None:
    known = [clip._replace(example=replace(clip.example, evidence=EVIDENCE)) for clip in measured_dataset.clips]
    assert not dataset.measure
    assert not RatingDataset(known, measured_dataset.settings, dataset.processor, 10_000, None).measure


@pytest.mark.parametrize("measure", [False, True])
def test_the_cache_keeps_what_was_measured(
    measured_dataset: RatingDataset, load: Load, tmp_path: Path, measure: bool
) -> None:
    cache = VisionCache(tmp_path, "weights", measured_dataset.settings, measure)
    measured_dataset.augmentation = None
    cache.fill(measured_dataset.sampled_clips(), load("qwen2_vl"), 1, lambda *_: None)
    decoded = question_of(measured_dataset, 1)
    measured_dataset.vision_cache = cache
    assert (question_of(measured_dataset, 1) == decoded) == measure
    assert ("Measured: unknown." in question_of(measured_dataset, 1)) == (not measure)
    other = VisionCache(tmp_path, "weights", measured_dataset.settings, not measure)
    assert other.missing(measured_dataset.sampled_clips()) == measured_dataset.sampled_clips()


def test_cache_files_are_named_by_everything_that_determines_their_content(tmp_path: Path) -> None:
    settings = RaterConfig()
    cache, sampled = VisionCache(tmp_path, "weights", settings), SampledClip(Path("a.mp4"), "content", Sampling())
    others = [
        cache.path(sampled._replace(content_id="other")),
        cache.path(sampled._replace(sampling=Sampling(phase=0.25))),
        VisionCache(tmp_path, "other", settings).path(sampled),
        VisionCache(tmp_path, "weights", settings.override(views=(View(max_pixels=99999),))).path(sampled),
        VisionCache(
            tmp_path, "weights", settings.override(prompt=settings.prompt.model_copy(update={"system": "Rate."}))
        ).path(sampled),
    ]
    assert len({cache.path(sampled), *others}) == 6
    assert cache.path(sampled._replace(path=Path("moved.mp4"))) == cache.path(sampled), "a clip may be moved"
    assert cache.missing([sampled, sampled._replace(path=Path("moved.mp4"))]) == [
        sampled._replace(path=Path("moved.mp4"))
    ]
    cache.path(sampled).parent.mkdir(parents=True)
    cache.path(sampled).write_bytes(b"damaged")
    assert cache.missing([sampled]) == []
    with pytest.raises(TrainingError, match=r"the vision features of a\.mp4 cannot be read from"):
        cache.load(sampled)
    assert cache.missing([sampled]) == [sampled], "a damaged file is computed again"


# --- auxiliary examples ----------------------------------------------------------------------------------------------

FOUND = (Finding("stall", 1.0, ((1.2, 2.0),)), Finding("blur", 1.0))
SAID = "The quality is fair: it freezes from 1.2 to 2.0 s. "


def relabel(clip: LabelledClip, **labels: Any) -> LabelledClip:
    return clip._replace(example=replace(clip.example, **labels))


@pytest.fixture
def described(dataset: RatingDataset) -> RatingDataset:
    """Three clips: with defects and an explanation, without labels, and without defects."""
    first, second, third = dataset.clips
    dataset.clips = [
        relabel(first, found=FOUND, absent=("noise", "seam"), explanation=SAID),
        second,
        relabel(third, found=(), absent=("noise",)),
    ]
    dataset.auxiliary = AuxiliaryConfig(defect_questions=3)
    return dataset


def reference_logits(
    backbone: Backbone, dataset: RatingDataset, index: int, prompt: Prompt, more: list[int]
) -> torch.Tensor:
    """Logits after each of the last 1 + len(more) tokens, for one clip and one prompt in a row of their own."""
    path, settings = dataset.clips[index].example.path, dataset.settings
    frames = clip_input(read_frames(path, settings.sampling, settings.views, dataset.factor))
    inputs = dict(prepare_inputs(backbone.processor, [frames], prompt))
    tail = torch.tensor([more], dtype=torch.int64)
    for name, added in (("input_ids", tail), ("attention_mask", tail * 0 + 1), ("mm_token_type_ids", tail * 0)):
        if name in inputs:
            inputs[name] = torch.cat((inputs[name], added.to(inputs[name])), dim=1)
    logits: torch.Tensor = backbone.model(**inputs, logits_to_keep=1 + len(more)).logits[0]
    return logits


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "frames"),
    [*((family, "video") for family in FAMILIES), ("qwen2_vl", "images"), ("qwen3_vl", "images")],
)
def test_auxiliary_examples_do_not_see_each_other(
    family: str, frames: str, load: Load, described: RatingDataset
) -> None:
    prompt = PROMPT.model_copy(update={"frames": frames})
    described.settings = described.settings.override(prompt=prompt)
    backbone = load(family)
    described.processor, described.factor = backbone.processor, patch_factor(backbone.processor) or 1
    described.augmentation = AugmentationConfig(paraphrase_probability=0, temporal_offsets=1)
    tokenizer = backbone.processor.tokenizer
    spoken = explanation_prompt(prompt, FOUND).model_copy(update={"stem": opening(prompt, "fair")})
    tokens = [*tokenizer(": it freezes from 1.2 to 2.0 s.")["input_ids"], tokenizer.eos_token_id]
    logits = [reference_logits(backbone, described, 0, spoken, tokens[:-1])]
    for index in (0, 2):
        for name, present in sample_defect_questions(
            described.clips[index].example, 3, auxiliary_rng(described, index)
        ).items():
            question = questions()[name].model_copy(update={"frames": frames})
            logits.append(reference_logits(backbone, described, index, question, []))
            tokens += tokenizer(" yes" if present else " no")["input_ids"]
    ratings = torch.cat([reference_logits(backbone, described, index, prompt, []) for index in range(3)])
    wanted = torch.cat(logits)
    assert backbone.can_share_prefill == (family not in HYBRID)
    for shares in {False, backbone.can_share_prefill}:
        batch = RatingCollator(backbone.processor, shares)([described[0, index] for index in range(3)])
        found, answers = next_token_logits(backbone.model, batch)
        torch.testing.assert_close(found, ratings, atol=1e-4, rtol=1e-4)
        assert batch["auxiliary"] is not None and len(answers) == len(wanted) == len(tokens)
        nearest = torch.cdist(answers, wanted).argmin(dim=0)
        assert len(set(nearest.tolist())) == len(tokens)
        torch.testing.assert_close(answers[nearest], wanted, atol=1e-4, rtol=1e-4)
        assert batch["auxiliary"]["target_ids"][nearest].tolist() == tokens
        kinds, weights = batch["auxiliary"]["tasks"][nearest], torch.tensor(batch["auxiliary"]["weights"])[nearest]
        assert kinds.tolist() == [1] * (len(tokens) - 4) + [0] * 4
        assert weights.tolist() == pytest.approx([1 / (len(tokens) - 4)] * (len(tokens) - 4) + [1] * 4)


def auxiliary_rng(dataset: RatingDataset, index: int) -> random.Random:
    """The RNG of a clip's auxiliary examples in epoch 0."""
    return random.Random(f"words {dataset.seed} 0 {dataset.clips[index].content_id}")


def test_half_of_the_defect_questions_are_about_present_defects() -> None:
    example = Example("a", Path("a"), 3.0, None, None, "g", (1, 5), FOUND, ("noise", "seam", "flicker"))
    for count in (1, 2, 3, 4):
        draws = [sample_defect_questions(example, count, random.Random(number)) for number in range(200)]
        assert all(len(drawn) == count for drawn in draws)
        assert sum(sum(drawn.values()) for drawn in draws) == pytest.approx(100 * count, abs=30)
        assert {name for drawn in draws for name in drawn} == {"stall", "blur", "noise", "seam", "flicker"}
    everything = sample_defect_questions(example, 9, random.Random(0))
    assert everything == {"stall": True, "blur": True, "noise": False, "seam": False, "flicker": False}
    assert list(sample_defect_questions(replace(example, absent=()), 2, random.Random(0)).values()) == [True, True]
    assert list(sample_defect_questions(replace(example, found=()), 2, random.Random(0)).values()) == [False, False]
    assert sample_defect_questions(replace(example, found=None, absent=()), 2, random.Random(0)) == {}


def test_the_explanation_prompt_is_that_of_rating() -> None:
    example = Example("a", Path("a"), 3.0, None, None, "g", (1, 5), FOUND, (), SAID)
    prompt, said = explanation_target(example, PROMPT)
    assert (prompt.stem, said) == ("It is fair", ": it freezes from 1.2 to 2.0 s.")
    assert "stall from 1.2 to 2.0 s; blur" in prompt.question
    unlabelled, _ = explanation_target(replace(example, found=None), PROMPT)
    assert "Defects found: stall." in unlabelled.question, "the defects that the text mentions"
    none, _ = explanation_target(replace(example, found=()), PROMPT)
    assert "Defects found: none." in none.question
    with pytest.raises(TrainingError, match=r"the explanation of 'a' has none of the words bad, poor, .*'It is exc"):
        explanation_target(replace(example, explanation="Blurred."), PROMPT)


def test_a_random_explanation_is_about_the_defects_in_its_prompt() -> None:
    rng, levels = random.Random(0), set()
    for _ in range(300):
        prompt, text = random_explanation(PROMPT, rng)
        level = prompt.stem.removeprefix("It is ")
        listed = prompt.question.partition("Defects found: ")[2]
        named = {name for name in VISIBLE if BY_NAME[name].term in listed}
        assert mentioned_defects(text) == named and len(named) <= 3
        levels.add(level)
    assert levels == set(PROMPT.levels)


def test_random_explanations_are_drawn_as_often_as_configured(described: RatingDataset) -> None:
    own = explanation_target(described.clips[0].example, PROMPT)[1]
    tokenizer = described.processor.tokenizer
    for probability, fewest, most in ((0.0, 40, 40), (0.5, 10, 30), (1.0, 0, 0)):
        described.auxiliary = AuxiliaryConfig(defect_questions=0, random_defects_probability=probability)
        drawn = [described.auxiliary_examples(described.clips[0], epoch, SLOTS)[0] for epoch in range(40)]
        texts = [tokenizer.decode(example.answer_ids, skip_special_tokens=True) for example in drawn]
        assert fewest <= texts.count(own) <= most


def test_auxiliary_examples_depend_only_on_seed_epoch_and_clip(described: RatingDataset) -> None:
    described.auxiliary = AuxiliaryConfig(defect_questions=1, explanation_probability=0.5)
    draws = [described.auxiliary_examples(described.clips[0], number, SLOTS) for number in range(20)]
    assert draws[::-1] == [
        described.auxiliary_examples(described.clips[0], number, SLOTS) for number in reversed(range(20))
    ]
    assert 2 < sum(len(records) == 2 for records in draws) < 18
    assert len({tuple(records[0].prompt_ids) for records in draws}) == 4
    described.seed += 1
    assert draws != [described.auxiliary_examples(described.clips[0], number, SLOTS) for number in range(20)]
    drawn = described.augment((0, 0))
    described.auxiliary = None
    assert described.augment((0, 0)) == drawn, "augmentation does not depend on auxiliary tasks"


def test_a_clip_with_too_many_auxiliary_tokens_is_refused(described: RatingDataset) -> None:
    described.max_tokens = described[0, 1]["inputs"]["input_ids"].shape[1] + 12
    described[0, 1]
    with pytest.raises(TrainingError, match=r"takes \d+ tokens, the model's context is"):
        described[0, 0]


def test_times_of_frames_are_not_rounded_by_mixed_precision(load: Load) -> None:
    """FSDP2 and DeepSpeed cast all floating-point tensors of a batch; the positions of Qwen2.5-VL depend on times."""
    backbone = load("qwen2_5_vl")
    processor = backbone.processor
    pixels = replace(clip(0, 28, (2,)), duration=12.999)
    inputs = dict(prepare_inputs(processor, [pixels], PROMPT))
    prefix_length = inputs["input_ids"].shape[1] - len(question_tokens(processor, PROMPT, 1, SLOTS))
    sample = Sample(name="a", inputs=inputs, prefix_length=prefix_length, vision_features={}, mos=3.0, std=math.nan,
                    content=-1, auxiliary=[])  # fmt: skip
    batch = RatingCollator(processor)([sample, sample])
    half = _apply_to_tensors(
        lambda tensor: tensor.bfloat16() if tensor.is_floating_point() else tensor, batch["inputs"]
    )
    assert half["pixel_values_videos"].dtype == torch.bfloat16
    expected = compat.position_ids(backbone.model, inputs)
    assert torch.equal(compat.position_ids(backbone.model, half), expected.repeat(1, 2, 1))
    rounded = inputs | {"second_per_grid_ts": inputs["second_per_grid_ts"].bfloat16()}
    assert not torch.equal(compat.position_ids(backbone.model, rounded), expected), "the times matter"
