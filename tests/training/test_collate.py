"""python -m pytest tests/training/test_collate.py"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmm_qa.config import Sampling, View
from lmm_qa.defects.explanation import Finding, explanation_prompt, opening
from lmm_qa.defects.questions import questions
from lmm_qa.errors import TrainingError
from lmm_qa.model import compat
from lmm_qa.model.backbone import Backbone
from lmm_qa.model.inputs import (
    ClipInput,
    append_question,
    collate_inputs,
    patch_factor,
    prepare_inputs,
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
    explanation_target,
    sample_defect_questions,
)
from lmm_qa.training.config import AugmentationConfig, AuxiliaryConfig
from lmm_qa.training.dataset import Example
from lmm_qa.training.trainer import next_token_logits
from lmm_qa.training.vision_cache import SampledClip, VisionCache
from lmm_qa.video.decode import read_frames

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
PROMPT = Prompt(question="How good is it?", paraphrases=("Good?", "Is it {seconds:.1f} s of quality?"), stem="It is")
SLOTS = {"seconds": 2.0, "fps": 25.0, "frames": 4.0, "width": 96.0, "height": 64.0}


def clip(seed: int, factor: int, sides: tuple[int, int] = (2, 3)) -> ClipInput:
    """Noise in two views of different sizes."""
    draw = np.random.default_rng(seed)
    views = tuple(draw.integers(0, 256, (4, side * factor, 2 * factor, 3), dtype=np.uint8) for side in sides)
    return ClipInput(views, (0.0, 0.5, 1.0, 1.5), 2.0, SLOTS)


def equal(one: Any, two: Any) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


@pytest.mark.parametrize("family", QWEN)
def test_another_question_costs_no_work_on_pixels_and_changes_nothing(
    family: str, family_dir: Callable[[str], Path]
) -> None:
    processor = load_processor(str(family_dir(family)))
    seen = clip(0, patch_factor(processor) or 1)
    first = remove_question(processor, prepare_inputs(processor, [seen], PROMPT), PROMPT, 2, SLOTS)
    for question in (PROMPT.question, *PROMPT.paraphrases):
        other = PROMPT.model_copy(update={"question": question})
        equal(append_question(processor, first, other, 2, SLOTS), dict(prepare_inputs(processor, [seen], other)))


@pytest.mark.parametrize("family", [*QWEN, "llava_onevision"])
def test_clips_prepared_singly_make_the_batch_of_all(family: str, family_dir: Callable[[str], Path]) -> None:
    processor = load_processor(str(family_dir(family)))
    factor = patch_factor(processor)
    clips = [clip(0, factor or 14), clip(1, factor or 14, (4, 2))]
    single = [dict(prepare_inputs(processor, [one], PROMPT)) for one in clips]
    equal(collate_inputs(processor, single), dict(prepare_inputs(processor, clips, PROMPT)))


@pytest.mark.parametrize("family", QWEN)
def test_vision_features_stand_for_the_pixels(family: str, family_dir: Callable[[str], Path]) -> None:
    backbone = Backbone.load(str(family_dir(family)), device="cpu")
    clips = [clip(0, patch_factor(backbone.processor) or 1), clip(1, patch_factor(backbone.processor) or 1, (4, 2))]
    single = [dict(prepare_inputs(backbone.processor, [one], PROMPT)) for one in clips]
    with torch.no_grad():
        expected = backbone.model(**collate_inputs(backbone.processor, single), logits_to_keep=1).logits
        features = [vision_features(backbone.model, inputs) for inputs in single]
        joined = {name: torch.cat([each[name] for each in features], dim=-2) for name in features[0]}
        for inputs in single:
            del inputs["pixel_values_videos"]
        batch = collate_inputs(backbone.processor, single)
        given = backbone.model(**batch, **compat.vision_kwargs(joined), logits_to_keep=1).logits
        swapped = {name: value.flip(-2) for name, value in joined.items()}
        wrong = backbone.model(**batch, **compat.vision_kwargs(swapped), logits_to_keep=1).logits
    assert ("deepstack" in joined) == (family == "qwen3_vl")
    torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-4)
    assert (wrong - expected).abs().max() > 1e-2, "the features matter"


@pytest.mark.parametrize(("clips", "samples"), [(5, 17), (5, 5), (7, 3)])
def test_each_pass_sees_every_clip_once_in_another_order(clips: int, samples: int) -> None:
    keys = list(EpochSampler(clips, samples, seed=1))
    assert len(keys) == len(EpochSampler(clips, samples, seed=1)) == samples
    assert max(Counter(keys).values()) == 1
    orders = [[index for number, index in keys if number == wanted] for wanted in range(-(-samples // clips))]
    assert all(sorted(order) == list(range(clips)) for order in orders if len(order) == clips)
    assert list(EpochSampler(clips, samples, seed=1)) == keys
    if samples > 2 * clips:
        assert orders[0] != orders[1] and keys != list(EpochSampler(clips, samples, seed=2))


@pytest.fixture
def samples(family_dir: Callable[[str], Path], clips_dir: Path) -> RatingDataset:
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


def test_a_sample_depends_on_seed_pass_and_clip_alone(samples: RatingDataset) -> None:
    draws = {(number, index): samples._augment((number, index)) for number in range(40) for index in range(3)}
    assert all(samples._augment(key) == drawn for key, drawn in reversed(draws.items()))
    phases = Counter(sampling.phase for _, sampling, _ in draws.values())
    questions = Counter(prompt.question for _, _, prompt in draws.values())
    assert sorted(phases) == pytest.approx([1 / 6, 0.5, 5 / 6]) and min(phases.values()) > 20
    assert 40 < questions[PROMPT.question] < 80 and min(questions[question] for question in PROMPT.paraphrases) > 12
    assert {(look.content_id, look.sampling) for look in samples.sampled_clips()} == {
        (clip.content_id, sampling) for clip, sampling, _ in draws.values()
    }, "what is kept is what is drawn"


def test_without_augmentation_it_is_what_rating_sees(samples: RatingDataset) -> None:
    samples.augmentation = None
    assert [look.sampling for look in samples.sampled_clips()] == [samples.settings.sampling] * 3
    rated = samples[1]
    frames = read_frames(samples.clips[1].example.path, samples.settings.sampling, samples.settings.views, 28)
    equal(rated["inputs"], dict(prepare_inputs(samples.processor, [clip_input(frames)], PROMPT)))


def test_a_clip_of_too_many_tokens_is_refused_by_name(samples: RatingDataset) -> None:
    samples.max_tokens = 10
    with pytest.raises(TrainingError, match=r"\.mp4 takes \d+ tokens, the model's context holds 10: use fewer frames"):
        samples[0, 0]


def test_batches_hold_what_their_samples_hold(samples: RatingDataset) -> None:
    first = samples.clips[0]
    samples.clips = [first._replace(example=replace(first.example, std=0.5)), *samples.clips[1:]]
    parts = [samples[0, index] for index in range(3)]
    batch = RatingCollator(samples.processor)(parts)
    assert batch["names"] == [clip.example.name for clip in samples.clips]
    assert batch["mos"] == [3.0] * 3 and [math.isnan(std) for std in batch["std"]] == [False, True, True]
    equal(batch["inputs"], collate_inputs(samples.processor, [part["inputs"] for part in parts]))
    assert batch["vision_features"] == {}


def test_what_is_kept_is_named_by_all_that_determines_it(tmp_path: Path) -> None:
    settings = RaterConfig()
    store, look = VisionCache(tmp_path, "weights", settings), SampledClip(Path("a.mp4"), "content", Sampling())
    others = [
        store.path(look._replace(content_id="other")),
        store.path(look._replace(sampling=Sampling(phase=0.25))),
        VisionCache(tmp_path, "other", settings).path(look),
        VisionCache(tmp_path, "weights", settings.override(views=(View(max_pixels=99999),))).path(look),
        VisionCache(
            tmp_path, "weights", settings.override(prompt=settings.prompt.model_copy(update={"system": "Rate."}))
        ).path(look),
    ]
    assert len({store.path(look), *others}) == 6
    assert store.path(look._replace(path=Path("moved.mp4"))) == store.path(look), "a file may move"
    assert store.missing([look, look._replace(path=Path("moved.mp4"))]) == [look._replace(path=Path("moved.mp4"))]
    store.path(look).parent.mkdir(parents=True)
    store.path(look).write_bytes(b"torn")
    assert store.missing([look]) == []
    with pytest.raises(TrainingError, match=r"the vision features of a\.mp4 cannot be read from"):
        store.load(look)
    assert store.missing([look]) == [look], "it is made anew"


# --- words beside the score ------------------------------------------------------------------------------------------

FOUND = (Finding("stall", 1.0, ((1.2, 2.0),)), Finding("blur", 1.0))
SAID = "The quality is fair: it freezes from 1.2 to 2.0 s. "


def described(clip: LabelledClip, **more: Any) -> LabelledClip:
    return clip._replace(example=replace(clip.example, **more))


@pytest.fixture
def asked(samples: RatingDataset) -> RatingDataset:
    """Clips with much, nothing, and little to be asked."""
    first, second, third = samples.clips
    samples.clips = [
        described(first, found=FOUND, absent=("noise", "seam"), explanation=SAID),
        second,
        described(third, found=(), absent=("noise",)),
    ]
    samples.auxiliary = AuxiliaryConfig(defect_questions=3)
    return samples


def alone(backbone: Backbone, samples: RatingDataset, index: int, prompt: Prompt, more: list[int]) -> torch.Tensor:
    """Logits after each of the last 1 + len(more) tokens, of one clip and one prompt, as transformers prepares them."""
    path, settings = samples.clips[index].example.path, samples.settings
    frames = clip_input(read_frames(path, settings.sampling, settings.views, samples.factor))
    inputs = dict(prepare_inputs(backbone.processor, [frames], prompt))
    tail = torch.tensor([more], dtype=torch.int64)
    for name, added in (("input_ids", tail), ("attention_mask", tail * 0 + 1), ("mm_token_type_ids", tail * 0)):
        if name in inputs:
            inputs[name] = torch.cat((inputs[name], added.to(inputs[name])), dim=1)
    logits: torch.Tensor = backbone.model(**inputs, logits_to_keep=1 + len(more)).logits[0]
    return logits


@torch.no_grad()
@pytest.mark.parametrize("family", [*QWEN, "llava_onevision"])
def test_records_know_nothing_of_each_other(
    family: str, family_dir: Callable[[str], Path], asked: RatingDataset
) -> None:
    backbone = Backbone.load(str(family_dir(family)), device="cpu")
    asked.processor, asked.factor = backbone.processor, patch_factor(backbone.processor) or 1
    asked.augmentation = AugmentationConfig(paraphrase_probability=0, temporal_offsets=1)
    tokenizer = backbone.processor.tokenizer
    spoken = explanation_prompt(PROMPT, FOUND).model_copy(update={"stem": opening(PROMPT, "fair")})
    tokens = [*tokenizer(": it freezes from 1.2 to 2.0 s.")["input_ids"], tokenizer.eos_token_id]
    logits = [alone(backbone, asked, 0, spoken, tokens[:-1])]
    for index in (0, 2):
        for name, there in sample_defect_questions(asked.clips[index].example, 3, chance(asked, index)).items():
            logits.append(alone(backbone, asked, index, questions()[name], []))
            tokens += tokenizer(" yes" if there else " no")["input_ids"]
    ratings = torch.cat([alone(backbone, asked, index, PROMPT, []) for index in range(3)])
    wanted = torch.cat(logits)
    assert backbone.can_share_prefill == (family != "llava_onevision")
    for shares in {False, backbone.can_share_prefill}:
        batch = RatingCollator(backbone.processor, shares)([asked[0, index] for index in range(3)])
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


def chance(samples: RatingDataset, index: int) -> random.Random:
    """What a clip has in pass 0."""
    return random.Random(f"words {samples.seed} 0 {samples.clips[index].content_id}")


def test_what_is_there_is_asked_as_often_as_what_is_not() -> None:
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


def test_an_explanation_is_asked_as_in_rating() -> None:
    example = Example("a", Path("a"), 3.0, None, None, "g", (1, 5), FOUND, (), SAID)
    prompt, said = explanation_target(example, PROMPT)
    assert (prompt.stem, said) == ("It is fair", ": it freezes from 1.2 to 2.0 s.")
    assert "stall from 1.2 to 2.0 s; blur" in prompt.question
    told, _ = explanation_target(replace(example, found=None), PROMPT)
    assert "Defects found: stall." in told.question, "what the text names"
    none, _ = explanation_target(replace(example, found=()), PROMPT)
    assert "Defects found: none." in none.question
    with pytest.raises(TrainingError, match=r"the explanation of 'a' has none of the words bad, poor, .*'It is exc"):
        explanation_target(replace(example, explanation="Blurred."), PROMPT)


def test_records_depend_on_seed_pass_and_clip_alone(asked: RatingDataset) -> None:
    asked.auxiliary = AuxiliaryConfig(defect_questions=1, explanation_probability=0.5)
    draws = [asked._auxiliary(asked.clips[0], number, SLOTS) for number in range(20)]
    assert draws[::-1] == [asked._auxiliary(asked.clips[0], number, SLOTS) for number in reversed(range(20))]
    assert 2 < sum(len(records) == 2 for records in draws) < 18
    assert len({tuple(records[0].prompt_ids) for records in draws}) == 4
    asked.seed += 1
    assert draws != [asked._auxiliary(asked.clips[0], number, SLOTS) for number in range(20)]
    drawn = asked._augment((0, 0))
    asked.auxiliary = None
    assert asked._augment((0, 0)) == drawn, "what is looked at does not hang on what is asked"


def test_a_record_of_too_many_tokens_is_refused(asked: RatingDataset) -> None:
    asked.max_tokens = asked[0, 1]["inputs"]["input_ids"].shape[1] + 12
    asked[0, 1]
    with pytest.raises(TrainingError, match=r"takes \d+ tokens, the model's context holds"):
        asked[0, 0]
