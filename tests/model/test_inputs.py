"""python -m pytest tests/model/test_inputs.py"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from backbones import THINKING_TEMPLATE
from model_inputs import (
    FPS,
    HYBRID,
    IMAGES,
    NO_THOUGHTS,
    PROMPT,
    QWEN,
    SLOTS,
    chat_template_inputs,
    random_clip,
)

from lmm_qa.errors import LevelTokenError
from lmm_qa.model.backbone import Backbone
from lmm_qa.model.inputs import count_tokens, decode_continuation, level_tokens, prepare_inputs, prompt_text
from lmm_qa.model.prompt import Prompt, load_prompt

LABELS = Prompt(**PROMPT.model_dump() | {"view_labels": IMAGES.view_labels})


@pytest.mark.parametrize("prompt", [PROMPT, SLOTS, LABELS, IMAGES], ids=["plain", "slots, system", "labels", "images"])
@pytest.mark.parametrize("frames", [1, 4, 5])
def test_inputs_equal_those_of_the_chat_template(
    backbone: Backbone, frames: int, prompt: Prompt, request: pytest.FixtureRequest
) -> None:
    thoughts = NO_THOUGHTS if request.node.callspec.params["backbone"] in HYBRID else ""
    for views in [((2, 3),), ((2, 3), (4, 2))][1 if prompt.view_labels else 0 :]:
        one = random_clip(backbone, *views, frames=frames)
        ours = prepare_inputs(backbone.processor, [one], prompt)
        theirs = chat_template_inputs(backbone.processor, one, prompt)
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert torch.as_tensor(ours[key]).shape == torch.as_tensor(value).shape, key
            assert torch.allclose(torch.as_tensor(ours[key]), torch.as_tensor(value), rtol=1e-6, atol=0), key
        text = backbone.processor.tokenizer.decode(ours["input_ids"][0])
        assert text.endswith(f"assistant\n{thoughts}{prompt.stem}")


def test_patches_contain_the_pixels(load: Callable[[str], Backbone]) -> None:
    """Neither resized nor sampled: what was put in can be taken out again."""
    backbone = load("qwen2_vl")
    one = random_clip(backbone, (2, 3))
    inputs = prepare_inputs(backbone.processor, [one], PROMPT)
    video = backbone.processor.video_processor
    assert inputs["video_grid_thw"].tolist() == [[2, 4, 6]]
    patches = inputs["pixel_values_videos"].reshape(2, 2, 3, 2, 2, 3, 2, 14, 14)  # T, y, x, y, x in a token, C, t, H, W
    pixels = patches.permute(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(4, 56, 84, 3).numpy()
    restored = (pixels * np.array(video.image_std) + np.array(video.image_mean)) * 255
    assert np.rint(restored).astype(int).tolist() == one.views[0].tolist()


def test_frame_times_are_passed_to_families_that_use_them(load: Callable[[str], Backbone]) -> None:
    processor = load("qwen2_5_vl").processor
    one = random_clip(load("qwen2_5_vl"), (2, 2), frames=4, step=10)
    inputs = prepare_inputs(processor, [one], PROMPT)
    assert [float(seconds) for seconds in inputs["second_per_grid_ts"]] == pytest.approx([2 * 10 / FPS])
    processor = load("qwen3_vl").processor
    inputs = prepare_inputs(processor, [random_clip(load("qwen3_vl"), (2, 2), frames=5, step=25)], PROMPT)
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    assert [text.count(f"<{time} seconds>") for time in ("0.5", "2.5", "4.0")] == [1, 1, 1]


def test_tokens_are_counted_without_a_clip(backbone: Backbone) -> None:
    one = random_clip(backbone, (2, 3), (4, 2))
    sizes = [view.shape[1:3] for view in one.views]
    counted = count_tokens(backbone.processor, 4, sizes, PROMPT)
    assert counted == prepare_inputs(backbone.processor, [one], PROMPT)["input_ids"].shape[1]


@pytest.mark.parametrize("name", ["talking_head", "qalign"])
@pytest.mark.parametrize("family", QWEN)
def test_levels_are_single_tokens_after_the_stem(family: str, name: str, load: Callable[[str], Backbone]) -> None:
    processor = load(family).processor
    for videos in (1, 2):
        tokens = level_tokens(processor, load_prompt(name), videos)
        assert [processor.tokenizer.decode([token]) for token in tokens] == [" bad", " poor", " fair", " good",
                                                                             " excellent"]  # fmt: skip
        assert len(set(tokens)) == 5


@pytest.mark.parametrize(
    ("changes", "complaints"),
    [
        ({"stem": 'The quality is "'}, ("'poor' is 2 tokens after the stem 'The quality is \"'", "['po', 'or']")),
        ({"stem": "The quality is (("}, ("after the stem 'The quality is (('", "'poor'")),
        ({"stem": "This is video-"}, ("the stem 'This is video-'",)),
        ({"levels": ("bad", "mediocre-ish")}, ("'mediocre-ish' is 2 tokens", "['Ġmediocre', '-ish']")),
        ({"levels": ("bad", "splendiferous")}, ("'splendiferous' is 4 tokens", "['Ġspl', 'endif', 'er', 'ous']")),
        ({"levels": ("caf\u00e9", "cafe\u0301")}, ("two levels are the same token",)),
    ],
)
@pytest.mark.parametrize("family", QWEN)
def test_levels_that_are_not_single_tokens_are_errors(
    family: str, changes: dict[str, Any], complaints: tuple[str, ...], load: Callable[[str], Backbone]
) -> None:
    with pytest.raises(LevelTokenError) as caught:
        level_tokens(load(family).processor, Prompt(**PROMPT.model_dump() | changes), 1)
    for complaint in complaints:
        assert complaint in str(caught.value)


@pytest.mark.parametrize("stem", ["The quality is:", "Quality (of 5), all in all,", "质量"])
def test_a_stem_may_end_in_punctuation_before_a_space(stem: str, load: Callable[[str], Backbone]) -> None:
    backbone = load("qwen2_vl")
    prompt = Prompt(question="?", stem=stem)
    assert level_tokens(backbone.processor, prompt, 1) == level_tokens(backbone.processor, PROMPT, 1)


def test_a_stem_after_empty_thoughts_keeps_its_tokens(load: Callable[[str], Backbone]) -> None:
    processor, prompt = copy.copy(load("qwen3_vl").processor), load_prompt("qrealign")
    processor.chat_template = THINKING_TEMPLATE
    text = prompt_text(processor, prompt, 1, {}, images=2)
    chat = text.removesuffix(prompt.stem)
    assert chat.endswith(NO_THOUGHTS)
    whole, before, stem = (processor.tokenizer.encode(part, add_special_tokens=False)
                           for part in (text, chat, prompt.stem))  # fmt: skip
    assert whole == before + stem


def test_decoding_keeps_the_space_after_the_stem() -> None:
    """Also where the tokenizer drops it at the beginning of a text, as those of Llama do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel({"\u2581It": 0, "\u2581is": 1, "\u2581blurred": 2, ".": 3, "?": 4}, unk_token="?")
    )
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert tokenizer.decode([2, 3]) == "blurred."
    assert decode_continuation(tokenizer, "It is", [2, 3]) == " blurred."
