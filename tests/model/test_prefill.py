"""python -m pytest tests/model/test_prefill.py"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones import FAMILIES, add_adapter
from model_inputs import (
    CLOSED,
    HYBRID,
    IMAGES,
    PROMPT,
    QUESTIONS,
    QWEN,
    SLOTS,
    assert_equal_logits,
    chat_template_inputs,
    random_clip,
)

from lmm_qa.errors import ConfigError, ModelError
from lmm_qa.model.backbone import Backbone
from lmm_qa.model.inputs import ClipInput, prepare_inputs
from lmm_qa.model.prefill import SharedPrefill
from lmm_qa.model.prompt import Prompt
from lmm_qa.model.source import EMBEDDED

ONE_SYSTEM = Prompt(question=CLOSED.question, stem=CLOSED.stem, levels=CLOSED.levels, system=SLOTS.system)


VIEWS = [((2, 2), (2, 2)), ((6, 5), (4, 4)), ((3, 4), (2, 3))]


@pytest.fixture(params=["one by one", "together"])
def grouping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips as a CPU gets them, and as a GPU does."""
    if request.param == "together":
        orders = {1: [[0]], 3: [[2, 0], [1]]}
        monkeypatch.setattr(Backbone, "batches", lambda self, clips, frames="video": orders[len(clips)])


def different_clips(backbone: Backbone) -> list[ClipInput]:
    """Of different sizes and durations: their prefills and their questions have different lengths."""
    return [random_clip(backbone, *views, seed=seed, step=40 * seed + 1) for seed, views in enumerate(VIEWS)]


def generated(backbone: Backbone, one: ClipInput, prompt: Prompt, **options: Any) -> list[int]:
    """What transformers writes after the stem of a conversation that it has not seen before."""
    inputs = chat_template_inputs(backbone.processor, one, prompt)
    (whole,) = backbone.model.generate(**inputs, do_sample=False, **options).tolist()
    return list(whole[inputs["input_ids"].shape[1] :])


@pytest.mark.usefixtures("grouping")
def test_a_shared_prefill_equals_separate_ones(backbone: Backbone) -> None:
    clips = different_clips(backbone)
    images = tuple(prompt.model_copy(update=IMAGES.before_question) for prompt in (SLOTS, CLOSED))
    for prompts in (QUESTIONS, (SLOTS, ONE_SYSTEM), images):
        prefill = SharedPrefill(backbone, clips, prompts[0])
        answers = prefill.level_logits(prompts)
        assert [len(row) for row in answers] == [len(prompts)] * 3
        for number, prompt in enumerate(prompts):
            for row, alone in zip(answers, (backbone.level_logits([one], prompt)[0] for one in clips), strict=True):
                assert_equal_logits(row[number], alone, 2e-5)
        for (again,), row in zip(prefill.level_logits(prompts[-1:]), answers, strict=True):
            assert_equal_logits(again, row[-1], 2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_vision_tower_runs_once_for_all_questions(family: str, load: Callable[[str], Backbone]) -> None:
    backbone = load(family)
    clips, seen = different_clips(backbone), []
    tower = next(part for name, part in backbone.model.named_modules() if name.endswith(("visual", "vision_tower")))
    embedding = next(part for part in tower.modules() if isinstance(part, torch.nn.Conv2d | torch.nn.Conv3d))
    hook = embedding.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].numel()))
    try:
        prefill = SharedPrefill(backbone, clips)
        prefill.level_logits(QUESTIONS)
        prefill.generate([PROMPT] * 3, 2)
    finally:
        hook.remove()
    assert backbone.can_share_prefill == (family not in HYBRID)
    inputs = [prepare_inputs(backbone.processor, [clip], PROMPT) for clip in clips]
    pixels = sum(value.numel() for each in inputs for name, value in each.items() if name.startswith("pixel_values"))
    assert sum(seen) == pixels * (len(QUESTIONS) + 1 if family in HYBRID else 1)


@pytest.mark.usefixtures("grouping")
def test_generated_text_equals_that_of_transformers(backbone: Backbone) -> None:
    clips, prompts = different_clips(backbone), [PROMPT, QUESTIONS[2], CLOSED]
    images = [prompt.model_copy(update={"frames": "images"}) for prompt in prompts]
    written = [generated(backbone, *pair, max_new_tokens=6) for pair in zip(clips, images, strict=True)]
    texts = SharedPrefill(backbone, clips, images[0]).generate(images, 6)
    assert texts == [backbone.processor.tokenizer.decode(row, skip_special_tokens=True) for row in written]
    prefill = SharedPrefill(backbone, clips)
    before = prefill.level_logits(QUESTIONS)
    texts = prefill.generate(prompts, 12)
    written = [generated(backbone, *pair, max_new_tokens=12) for pair in zip(clips, prompts, strict=True)]
    assert len({token for row in written for token in row}) > 5, "a model that always says the same tells nothing"
    assert texts == [backbone.processor.tokenizer.decode(row) for row in written]
    for row, again in zip(before, prefill.level_logits(QUESTIONS), strict=True):
        for one, other in zip(row, again, strict=True):
            assert one.logits.tolist() == other.logits.tolist(), "writing changed the prefill"


@pytest.mark.parametrize("where", ["generation config", "list in the generation config", "tokenizer"])
def test_generation_stops_at_the_end_token(
    where: str, load: Callable[[str], Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load("qwen2_vl")
    clips = different_clips(backbone)
    monkeypatch.setattr(Backbone, "batches", lambda self, clips, frames="video": [[2, 1, 0]])
    prefill, tokenizer = SharedPrefill(backbone, clips), backbone.processor.tokenizer
    answers = [generated(backbone, one, PROMPT, max_new_tokens=10) for one in clips]
    stop = next(token for token in answers[0][1:] if token not in answers[1] + answers[2])
    length = answers[0].index(stop) + 1
    if where == "tokenizer":
        monkeypatch.setattr(type(tokenizer), "eos_token_id", stop, raising=False)
    else:
        ends = stop if where == "generation config" else [stop, 5]
        monkeypatch.setattr(backbone.model.generation_config, "eos_token_id", ends)
    written = [generated(backbone, one, PROMPT, max_new_tokens=10, eos_token_id=stop, pad_token_id=0) for one in clips]
    assert sorted(len(row) for row in written) == [length, 10, 10], "one answer ends before the others"
    assert written[0].pop() == stop
    assert prefill.generate([PROMPT] * 3, 10) == [tokenizer.decode(row) for row in written]


def test_a_question_with_another_system_message_is_an_error(load: Callable[[str], Backbone]) -> None:
    prefill = SharedPrefill(load("qwen2_vl"), [random_clip(load("qwen2_vl"), (2, 2))], SLOTS)
    message = r"'Is the picture blurred\?' has system None, but this prefill was made with 'You are strict.'"
    with pytest.raises(ConfigError, match=message):
        prefill.level_logits([SLOTS, CLOSED])
    with pytest.raises(ConfigError, match=message):
        prefill.generate([CLOSED], 2)


def test_a_sliding_window_cannot_share_a_prefill(family_dir: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(family_dir("qwen2_vl"), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    config["text_config"] |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1,
                              "layer_types": ["full_attention", "sliding_attention"]}  # fmt: skip
    file.write_text(json.dumps(config))
    backbone = Backbone.load(str(tmp_path / "model"), device="cpu", dtype="float32")
    assert not backbone.can_share_prefill
    one = random_clip(backbone, (3, 4))
    for prompt, answer in zip(QUESTIONS, SharedPrefill(backbone, [one]).level_logits(QUESTIONS)[0], strict=True):
        assert_equal_logits(answer, backbone.level_logits([one], prompt)[0], 2e-5)


def test_attention_without_mask_support_is_replaced_for_questions(family_dir: Callable[[str], Path]) -> None:
    """Eager attention stands for flash-attn here: it adds a mask of truths to its scores."""
    backbone = Backbone.load(str(family_dir("qwen3_vl")), device="cpu", dtype="float32")
    one = random_clip(backbone, (2, 3))
    expected = [backbone.level_logits([one], prompt)[0] for prompt in QUESTIONS]
    backbone.model.set_attn_implementation("eager")
    for answer, reading in zip(SharedPrefill(backbone, [one]).level_logits(QUESTIONS)[0], expected, strict=True):
        assert_equal_logits(answer, reading, 2e-5)
    assert backbone.model.config._attn_implementation == "eager"
    assert backbone.model.config.text_config._attn_implementation == "eager"


def test_answers_that_are_not_finite_are_an_error(family_dir: Callable[[str], Path]) -> None:
    backbone = Backbone.load(str(family_dir("qwen2_vl")), device="cpu", dtype="float32")
    with torch.no_grad():
        backbone.model.lm_head.weight[backbone.level_tokens(CLOSED, 1)[0]] = torch.inf
    with pytest.raises(ModelError, match="logits are not finite in float32"):
        SharedPrefill(backbone, [random_clip(backbone, (2, 2))]).level_logits(QUESTIONS)


# PEFT 0.21 reads an attribute that transformers 5.23 has deprecated.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("family", QWEN)
def test_the_adapter_can_be_disabled(
    family: str, load: Callable[[str], Backbone], family_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    base = load(family)
    adapter = add_adapter(family_dir(family), tmp_path / "adapter")
    tuned = Backbone.load(str(family_dir(family)), adapter=adapter, device="cpu", dtype="float32")
    one = random_clip(base, (2, 3), (4, 2), step=40)
    (ours,) = SharedPrefill(tuned, [one]).level_logits(QUESTIONS)
    with tuned.without_adapter(), base.without_adapter():
        within = SharedPrefill(tuned, [one])
        (plain,), said = within.level_logits(QUESTIONS), within.generate([PROMPT], 12)
        assert said == SharedPrefill(base, [one]).generate([PROMPT], 12)
    assert SharedPrefill(tuned, [one]).generate([PROMPT], 12) != said
    for prompt, adapted, unadapted in zip(QUESTIONS, ours, plain, strict=True):
        assert_equal_logits(adapted, tuned.level_logits([one], prompt)[0], 2e-5)
        assert_equal_logits(unadapted, base.level_logits([one], prompt)[0], 2e-5)
        assert np.abs(adapted.logits - unadapted.logits).max() > 0.05


@pytest.mark.skipif(not any(EMBEDDED.glob("*.safetensors")), reason=f"no embedded model at {EMBEDDED}")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_embedded_model_gives_equal_answers_on_a_shared_prefill() -> None:
    from lmm_qa import Rater

    backbone, prompts = Rater.from_pretrained(device="cpu").backbone, (PROMPT, CLOSED)
    clips = [random_clip(backbone, (6, 6), (8, 8), frames=12), random_clip(backbone, (8, 5), (8, 8), frames=10, seed=1)]
    prefill = SharedPrefill(backbone, clips)
    for one, answers in zip(clips, prefill.level_logits(prompts), strict=True):
        for prompt, answer in zip(prompts, answers, strict=True):
            assert_equal_logits(answer, backbone.level_logits([one], prompt)[0], 2e-5)
    texts = prefill.generate(prompts, 12)
    assert texts == [
        backbone.processor.tokenizer.decode(generated(backbone, *pair, max_new_tokens=12), skip_special_tokens=True)
        for pair in zip(clips, prompts, strict=True)
    ]
