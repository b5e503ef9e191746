"""python -m pytest tests/model/test_backbone.py"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
from backbones import FAMILIES
from model_inputs import (
    IMAGES,
    PROMPT,
    QWEN,
    assert_equal_logits,
    chat_template_inputs,
    random_clip,
)
from transformers import AutoModelForImageTextToText

from lmm_qa.errors import ModelError
from lmm_qa.model.backbone import MAX_BATCH_TOKENS, Backbone
from lmm_qa.model.inputs import ClipInput, patch_factor, prepare_inputs
from lmm_qa.model.prefill import SharedPrefill


def test_level_logits_equal_a_plain_forward_pass(
    backbone: Backbone, family_dir: Callable[[str], Path], request: pytest.FixtureRequest
) -> None:
    family = request.node.callspec.params["backbone"]
    one = random_clip(backbone, (2, 3), (4, 2), frames=5)
    plain = AutoModelForImageTextToText.from_pretrained(family_dir(family), dtype=torch.float32).eval()
    words = [backbone.processor.tokenizer.encode(f" {word}", add_special_tokens=False) for word in PROMPT.levels]
    for prompt in (PROMPT, IMAGES):
        (reading,) = backbone.level_logits([one], prompt)
        with torch.no_grad():
            logits = plain(**chat_template_inputs(backbone.processor, one, prompt)).logits[0, -1].double().numpy()
        assert reading.logits == pytest.approx(logits[[word for (word,) in words]], abs=1e-4)
        assert reading.log_normalizer == pytest.approx(scipy.special.logsumexp(logits), abs=1e-4)


def test_level_logits_do_not_depend_on_the_batch(backbone: Backbone) -> None:
    """Views of different sizes, so of different lengths: all but the longest are padded."""
    sizes = [((2, 2), (2, 2)), ((3, 4), (2, 3)), ((6, 5), (4, 4))]
    clips = [random_clip(backbone, *views, seed=seed) for seed, views in enumerate(sizes)]
    lengths = prepare_inputs(backbone.processor, clips, PROMPT)["attention_mask"].sum(dim=1).tolist()
    assert patch_factor(backbone.processor) is None or len(set(lengths)) == 3
    alone = [backbone.level_logits([one], PROMPT)[0] for one in clips]
    assert np.ptp([reading.logits for reading in alone], axis=0).max() > 0.05, "the clips look alike to the model"
    for order in ([0, 1, 2], [2, 0, 1], [1, 1]):
        together = backbone.level_logits([clips[i] for i in order], PROMPT)
        for i, reading in zip(order, together, strict=True):
            assert_equal_logits(reading, alone[i])


def test_padding_does_not_change_logits(backbone: Backbone) -> None:
    """As on a GPU; a CPU gets the clips one by one."""
    clips = [
        random_clip(backbone, *views, seed=seed) for seed, views in enumerate([((2, 2), (2, 2)), ((6, 5), (4, 4))])
    ]
    tokens = list(backbone.level_tokens(PROMPT, 2))
    for prompt in (PROMPT, IMAGES):
        together = backbone.next_token_logits(prepare_inputs(backbone.processor, clips, prompt))
        for one, logits in zip(clips, together, strict=True):
            (reading,) = backbone.level_logits([one], prompt)
            assert logits[tokens].tolist() == pytest.approx(reading.logits, abs=1e-4)
            assert torch.logsumexp(logits, 0).item() == pytest.approx(reading.log_normalizer, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_gets_batches_and_a_cpu_single_clips(family: str, load: Callable[[str], Backbone]) -> None:
    backbone = load(family)
    clips = [random_clip(backbone, (2, 3), frames=frames) for frames in (4, 4, 6)]
    assert backbone.batches(clips) == [[0], [1], [2]]
    model: Any = SimpleNamespace(device="cuda")
    model.eval = lambda: model
    gpu = Backbone(model, backbone.processor, {})
    assert gpu.batches(clips) == ([[0, 1, 2]] if family in QWEN else [[0, 1], [2]])


def test_batches_have_similar_lengths_and_a_limit(
    load: Callable[[str], Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load("qwen2_vl")
    monkeypatch.setattr("lmm_qa.model.backbone.PROMPT_TOKENS", 10)
    monkeypatch.setattr("lmm_qa.model.backbone.MAX_BATCH_TOKENS", 60)
    clips = [random_clip(backbone, (1, moments), frames=2) for moments in (2, 9, 2, 10, 3, 70, 2, 2)]
    model: Any = SimpleNamespace(device="cuda", eval=lambda: model)
    # Of 12, 19, 12, 20, 13, 80, 12 and 12 tokens.
    assert Backbone(model, backbone.processor, {}).batches(clips) == [[0, 2, 6, 7], [4, 1, 3], [5]]


class OtherDevice(str):
    """A device that is not called a CPU, and is one."""

    type = "elsewhere"


def test_the_next_batch_is_prepared_in_a_thread(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next is prepared in a thread; what is read is what each clip alone gives, in the order of the clips."""
    clips = [random_clip(backbone, (2, 3), (2, 2), frames=2 * frames, seed=frames) for frames in (3, 1, 4, 2, 1)]
    alone = [backbone.level_logits([one], PROMPT)[0] for one in clips]
    monkeypatch.setattr("lmm_qa.model.backbone.MAX_BATCH_TOKENS", 250)
    monkeypatch.setattr(Backbone, "device", OtherDevice("cpu"))
    assert 1 < len(backbone.batches(clips)) < 5
    for reading, one in zip(backbone.level_logits(clips, PROMPT), alone, strict=True):
        assert_equal_logits(reading, one)
    for (answer,), one in zip(SharedPrefill(backbone, clips).level_logits([PROMPT]), alone, strict=True):
        assert_equal_logits(answer, one, 2e-5)


def refuse_large_batches(backbone: Backbone, most: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The model runs out of memory with more clips than these in a batch. Returns the sizes that were tried, as a list
    that grows."""
    tried: list[int] = []
    original = Backbone._forward

    def forward(self: Backbone, **inputs: Any) -> Any:
        tried.append(len(inputs["input_ids"]))
        if tried[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")
        return original(self, **inputs)

    monkeypatch.setattr(Backbone, "_forward", forward)
    monkeypatch.setattr(Backbone, "device", OtherDevice("cpu"))
    monkeypatch.setattr(backbone, "_fitting_tokens", MAX_BATCH_TOKENS)
    return tried


def test_batches_that_do_not_fit_are_halved(load: Callable[[str], Backbone], monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load("qwen2_vl")
    clips = [random_clip(backbone, (2, 3), frames=2, seed=seed) for seed in range(5)]
    alone = [backbone.level_logits([one], PROMPT)[0] for one in clips]
    tried = refuse_large_batches(backbone, 2, monkeypatch)
    for reading, one in zip(backbone.level_logits(clips, PROMPT), alone, strict=True):
        assert_equal_logits(reading, one)
    assert tried == [5, 2, 2, 1]
    again = len(tried)
    backbone.level_logits(clips, PROMPT)
    assert tried[again:] == [2, 2, 1], "the size that fits is remembered"
    monkeypatch.setattr(backbone, "_fitting_tokens", MAX_BATCH_TOKENS)

    def ask(group: slice) -> list[Any]:
        return [answer for (answer,) in backbone.share_prefill(clips[group], PROMPT).level_logits([PROMPT])]

    for answer, one in zip(backbone.in_cacheable_groups(ask, clips, PROMPT), alone, strict=True):
        assert_equal_logits(answer, one, 2e-5)


def test_a_clip_that_does_not_fit_is_an_error(load: Callable[[str], Backbone], monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load("qwen2_vl")
    tried = refuse_large_batches(backbone, 0, monkeypatch)
    with pytest.raises(
        ModelError,
        match=r"a single clip does not fit .* \(OutOfMemoryError: CUDA out of memory\. Tried to allocate 2 GiB\.\): "
        r"use fewer frames",
    ):
        backbone.level_logits([random_clip(backbone, (2, 3), frames=2)] * 3, PROMPT)
    assert tried == [3, 1]


def test_caches_are_held_of_as_many_clips_as_fit(
    load: Callable[[str], Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load("qwen2_vl")
    clips = [random_clip(backbone, (2, 3), frames=2 * frames) for frames in (1, 1, 1, 9, 1)]
    # Two layers of two heads of 16, keys and values in float32; 6 tokens for two frames, and 64 of the prompt.
    short = 2 * 2 * 2 * 16 * 4 * (6 + 64)
    monkeypatch.setattr("lmm_qa.model.backbone.free_memory", lambda device: 2 * (2 * short + 1))
    groups: list[slice] = []

    def run(group: slice) -> list[int]:
        groups.append(group)
        return list(range(group.start, group.stop))

    assert backbone.in_cacheable_groups(run, clips, PROMPT) == [0, 1, 2, 3, 4]
    assert groups == [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 5)]


def test_clips_with_different_frame_counts_share_a_batch(backbone: Backbone) -> None:
    clips = [random_clip(backbone, (2, 3), frames=frames, seed=frames) for frames in (4, 1, 7)]
    for one, reading in zip(clips, backbone.level_logits(clips, PROMPT), strict=True):
        assert_equal_logits(reading, backbone.level_logits([one], PROMPT)[0])


def test_every_view_changes_the_logits(backbone: Backbone) -> None:
    both = random_clip(backbone, (2, 3), (4, 2))
    other = ClipInput((both.views[0], both.views[1][:, ::-1].copy()), both.seconds, both.duration, both.slots)
    first = ClipInput(both.views[:1], both.seconds, both.duration, both.slots)
    readings = [backbone.level_logits([one], PROMPT)[0].logits for one in (both, other, first)]
    assert np.abs(readings[0] - readings[1]).max() > 1e-3
    assert np.abs(readings[0] - readings[2]).max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_close_to_float32(family: str, load: Callable[[str], Backbone], family_dir: Any) -> None:
    exact = load(family)
    half = Backbone.load(str(family_dir(family)), device="cpu", dtype="bfloat16")
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    one = random_clip(exact, (2, 3))
    (expected,), (reading,) = exact.level_logits([one], PROMPT), half.level_logits([one], PROMPT)
    assert reading.logits.dtype == np.float32
    assert reading.logits == pytest.approx(expected.logits, abs=0.1 * float(np.abs(expected.logits).max()))


def test_attention_is_never_eager(backbone: Backbone) -> None:
    used = {
        part.config._attn_implementation
        for part in backbone.model.modules()
        if getattr(part, "config", None) is not None
    }
    assert used == {"sdpa"}
    assert backbone.choices["attention"].value == "sdpa"


def test_logits_that_are_not_finite_are_an_error(family_dir: Callable[[str], Path]) -> None:
    backbone = Backbone.load(str(family_dir("qwen2_vl")), device="cpu", dtype="float32")
    with torch.no_grad():
        backbone.model.lm_head.weight[0] = torch.nan
    with pytest.raises(ModelError, match="logits are not finite in float32"):
        backbone.level_logits([random_clip(backbone, (2, 2))], PROMPT)
