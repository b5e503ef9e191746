"""python -m pytest tests/model/test_sound.py"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones import FAMILIES, OMNI, add_talker, builder, loader
from model_inputs import CLOSED, PROMPT, SLOTS, assert_equal_logits, random_clip
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from lmm_qa.errors import ConfigError, ModelError
from lmm_qa.model import compat
from lmm_qa.model.backbone import Backbone
from lmm_qa.model.inputs import (
    ClipInput,
    count_tokens,
    fitted_sound,
    level_tokens,
    patch_factor,
    prepare_inputs,
)
from lmm_qa.model.loading import estimate_memory
from lmm_qa.model.prefill import SharedPrefill
from lmm_qa.model.prompt import Prompt, load_prompt
from lmm_qa.model.rater_config import RaterConfig
from lmm_qa.model.served import ServedBackbone, ServedModel
from lmm_qa.video.sound import SAMPLE_RATE

SOUND = load_prompt("talking_head_sound")
QUESTIONS = tuple(prompt.model_copy(update={"sound": True}) for prompt in (PROMPT, CLOSED))

Load = Callable[[str], Backbone]


@pytest.fixture(scope="module")
def family_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Without the published tokenizers: there are none of these families."""
    return builder(tmp_path_factory.mktemp("backbones"))


@pytest.fixture(scope="module")
def load(family_dir: Callable[[str], Path]) -> Load:
    return loader(family_dir)


@pytest.fixture(params=OMNI)
def hearing(request: pytest.FixtureRequest, load: Load) -> Backbone:
    return load(request.param)


def noise(seconds: float, seed: int = 0) -> Any:
    """Noise whose loudness goes up and down."""
    times = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    draw = np.random.default_rng(seed).normal(0, 0.2, len(times))
    return (draw * (1 + np.sin(2 * np.pi * (1 + seed) * times)) / 2).astype(np.float32)


def heard_clip(backbone: Backbone, *sizes: tuple[int, int], seed: int = 0, **options: Any) -> ClipInput:
    one = random_clip(backbone, *sizes, seed=seed, **options)
    return replace(one, sound=noise(one.duration, seed))


def their_inputs(processor: Any, one: ClipInput, prompt: Prompt) -> Any:
    """Inputs by the processor and the chat template alone, with the sound in the first view."""
    messages = [
        *prompt.messages(len(one.views), **one.slots),
        {"role": "assistant", "content": [{"type": "text", "text": prompt.stem}]},
    ]
    text = processor.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    starts = one.seconds[::2]
    seconds = round((starts[1] - starts[0]) * 1024) / 1024 if len(starts) > 1 else 1.0
    return processor(
        text=text,
        videos=[list(view) for view in one.views],
        audio=[one.sound],
        audio_from_video_indices=[0],
        load_audio_from_video=True,
        fps=2 / seconds,
        do_resize=False,
        do_sample_frames=False,
        cap_pixels_per_frame=False,
        return_tensors="pt",
    )


@pytest.mark.parametrize("frames", [2, 8, 9])
@torch.no_grad()
def test_logits_with_sound_equal_those_of_transformers(
    hearing: Backbone, frames: int, family_dir: Callable[[str], Path], request: pytest.FixtureRequest
) -> None:
    """Its processor pads the sound to five minutes, or not at all; its model orders frames and sound by itself."""
    family = request.node.callspec.params["hearing"]
    plain = AutoModelForImageTextToText.from_pretrained(family_dir(family), dtype=torch.float32).eval()
    one = heard_clip(hearing, (2, 3), frames=frames, step=20)
    for prompt in (SOUND, SLOTS.model_copy(update={"sound": True})):
        theirs, ours = their_inputs(hearing.processor, one, prompt), prepare_inputs(hearing.processor, [one], prompt)
        assert theirs.keys() == ours.keys()
        assert torch.equal(theirs["input_ids"], ours["input_ids"])
        columns = int(ours["feature_attention_mask"].sum())
        assert columns == int(theirs["feature_attention_mask"].sum()) == round(one.duration * 100)
        assert torch.allclose(theirs["input_features"][..., :columns], ours["input_features"][..., :columns], atol=1e-5)
        logits = plain(**theirs, use_audio_in_video=True).logits[0, -1]
        (reading,) = hearing.level_logits([one], prompt)
        words = [hearing.processor.tokenizer.encode(f" {word}", add_special_tokens=False) for word in prompt.levels]
        assert logits[[word for (word,) in words]].tolist() == pytest.approx(reading.logits, abs=1e-4)
        assert logits.logsumexp(0).item() == pytest.approx(reading.log_normalizer, abs=1e-4)


@torch.no_grad()
def test_views_after_the_first_have_the_positions_of_videos(hearing: Backbone) -> None:
    """Both halves as transformers gives them to a chat of one video: the first with sound, the second without."""
    rope = hearing.model
    one = heard_clip(hearing, (2, 3), (4, 2), frames=6)
    inputs = prepare_inputs(hearing.processor, [one], SOUND)
    ours = compat.position_ids(rope, inputs)[:, 0]
    first = their_inputs(hearing.processor, replace(one, views=one.views[:1]), SOUND)
    expected = rope.get_rope_index(
        first["input_ids"],
        video_grid_thw=first["video_grid_thw"],
        attention_mask=first["attention_mask"],
        use_audio_in_video=True,
        audio_seqlens=first["feature_attention_mask"].sum(-1),
        second_per_grids=first["video_second_per_grid"],
    )[0][:, 0].float()
    ids, start = inputs["input_ids"][0], rope.config.vision_start_token_id
    cut = int((ids == start).nonzero()[1])
    assert torch.equal(ours[:, :cut], expected[:, :cut])
    silent = prepare_inputs(hearing.processor, [replace(one, views=one.views[1:])], PROMPT)
    alone = compat.position_ids(rope, silent)[:, 0].float()
    rest = alone[:, int((silent["input_ids"][0] == start).nonzero()[0]) :]
    videos = int((ids[cut:] == ids[cut + 1]).sum()) + 1
    shifted = rest - rest[0, 0] + ours[:, cut - 1].max() + 1
    assert torch.equal(ours[:, cut : cut + videos], shifted[:, :videos])
    texts = ours[:, cut + videos :]
    assert torch.equal(texts[0], texts[0, 0] + torch.arange(texts.shape[1])) and torch.equal(texts[0], texts[2])


@pytest.mark.parametrize("duration", [0.7, 2.4, 4.8, 5.0, 6.6, 7.3, 9.6, 10.1])
def test_a_sound_is_where_its_time_is(hearing: Backbone, duration: float) -> None:
    """Also at the times of frames that are whole numbers but for rounding: 1.2 s times 13 or 25."""
    seconds = tuple((number + 0.5) * duration / 16 for number in range(16))
    one = replace(random_clip(hearing, (2, 3), frames=16), seconds=seconds, duration=duration, sound=noise(duration))
    inputs = prepare_inputs(hearing.processor, [one], SOUND)
    positions, ids = compat.position_ids(hearing.model, inputs)[:, 0], inputs["input_ids"][0]
    sound, video = (positions[:, ids == getattr(hearing.processor, f"{kind}_token_id")] for kind in ("audio", "video"))
    start = positions[0, ids == hearing.model.config.audio_start_token_id] + 1
    assert torch.equal(sound, (start + torch.arange(sound.shape[1])).expand(3, -1))
    rate = hearing.processor.position_id_per_seconds
    assert sound.shape[1] == pytest.approx(max(duration, 1.0) * rate, abs=2)
    times = (video[0] - start).reshape(8, 6)
    assert torch.equal(times, times[:, :1].expand(8, 6))
    assert times[:, 0].tolist() == pytest.approx([number * duration / 8 * rate for number in range(8)], abs=1.01)
    assert (video[1:] - start).max(dim=1).values.tolist() == [1, 2]


def test_logits_with_sound_do_not_depend_on_the_batch(hearing: Backbone) -> None:
    """Sounds of different lengths, one shorter than what the tower reads at a time, and none."""
    clips = [
        heard_clip(hearing, (2, 2), (2, 2), frames=2, step=5),
        heard_clip(hearing, (6, 5), (4, 4), frames=6, step=33, seed=1),
        replace(random_clip(hearing, (3, 4), (2, 3), seed=2), sound=None),
    ]
    lengths = prepare_inputs(hearing.processor, clips, SOUND)["feature_attention_mask"].sum(-1).tolist()
    assert lengths == [100, 792, 112]
    tokens = list(hearing.level_tokens(SOUND, 2))
    alone = [hearing.level_logits([one], SOUND)[0] for one in clips]
    for order in ([0, 1, 2], [2, 0], [1, 1, 0]):
        together = hearing.next_token_logits(prepare_inputs(hearing.processor, [clips[i] for i in order], SOUND))
        for i, logits in zip(order, together, strict=True):
            assert logits[tokens].tolist() == pytest.approx(alone[i].logits, abs=1e-4)
            assert torch.logsumexp(logits, 0).item() == pytest.approx(alone[i].log_normalizer, abs=1e-4)


def test_the_sound_changes_the_logits(hearing: Backbone) -> None:
    one = heard_clip(hearing, (2, 3), (4, 2), frames=8)
    late = replace(one, sound=np.roll(noise(one.duration), SAMPLE_RATE // 2))
    silent, other = replace(one, sound=None), replace(one, sound=noise(one.duration, 3))
    readings = [hearing.level_logits([each], SOUND)[0].logits for each in (one, late, silent, other)]
    for first, second in ((0, 1), (0, 2), (0, 3), (2, 3)):
        assert np.abs(readings[first] - readings[second]).max() > 1e-3
    unheard = [hearing.level_logits([each], PROMPT)[0].logits for each in (one, silent)]
    assert np.array_equal(*unheard), "a prompt without sound"


def test_a_clip_without_sound_is_silent(hearing: Backbone) -> None:
    one = random_clip(hearing, (2, 3), frames=6, step=11)
    silence = replace(one, sound=np.zeros(round(one.duration * SAMPLE_RATE), np.float32))
    assert_equal_logits(hearing.level_logits([one], SOUND)[0], hearing.level_logits([silence], SOUND)[0], 1e-6)


@pytest.mark.parametrize(("duration", "length"), [(2.0, 32000), (2.004, 32000), (0.3, 16000)])
def test_a_sound_is_as_long_as_its_clip(duration: float, length: int, load: Load) -> None:
    clip = replace(random_clip(load(OMNI[0]), (2, 2)), duration=duration)
    for seconds in (0.1, 5.0):
        sound = noise(seconds)
        fitted = fitted_sound(replace(clip, sound=sound))
        known = min(len(sound), round(duration * SAMPLE_RATE), length)
        assert len(fitted) == length and fitted.dtype == np.float32
        assert np.array_equal(fitted[:known], sound[:known]) and not fitted[known:].any()


def different_clips(backbone: Backbone) -> list[ClipInput]:
    views = [((2, 2), (2, 2)), ((6, 5), (4, 4)), ((3, 4), (2, 3))]
    return [heard_clip(backbone, *sizes, seed=seed, step=40 * seed + 1) for seed, sizes in enumerate(views)]


def test_questions_share_a_prefill_with_sound(hearing: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = different_clips(hearing)
    alone = [[hearing.level_logits([one], prompt)[0] for prompt in QUESTIONS] for one in clips]
    single = [replace(one, views=one.views[:1]) for one in clips]
    alone_single = [[hearing.level_logits([one], prompt)[0] for prompt in QUESTIONS] for one in single]
    assert hearing.can_share_prefill
    for batches in ([[0], [1], [2]], [[2, 0], [1]]):
        monkeypatch.setattr(Backbone, "batches", lambda self, clips, prompt, batches=batches: batches)
        for group, expected in ((clips, alone), (single, alone_single)):
            shared = SharedPrefill(hearing, group, SOUND).level_logits(QUESTIONS)
            for row, readings in zip(shared, expected, strict=True):
                for answer, one in zip(row, readings, strict=True):
                    assert_equal_logits(answer, one, 2e-5)
    with pytest.raises(ConfigError, match="has sound False, but this prefill was made with True"):
        SharedPrefill(hearing, clips, SOUND).level_logits([PROMPT])


def test_text_with_sound_equals_that_of_transformers(
    hearing: Backbone, family_dir: Callable[[str], Path], request: pytest.FixtureRequest
) -> None:
    family = request.node.callspec.params["hearing"]
    plain = AutoModelForImageTextToText.from_pretrained(family_dir(family), dtype=torch.float32).eval()
    one = heard_clip(hearing, (3, 4), frames=6)
    inputs = their_inputs(hearing.processor, one, SOUND)
    written = plain.generate(**inputs, use_audio_in_video=True, do_sample=False, max_new_tokens=10)
    new = written[0, inputs["input_ids"].shape[1] :]
    expected = hearing.processor.tokenizer.decode(new, skip_special_tokens=True)
    assert SharedPrefill(hearing, [one], SOUND).generate([SOUND], 10) == [expected]


def test_only_the_wanted_logits_are_computed(hearing: Backbone) -> None:
    shapes: list[Sequence[int]] = []
    hook = hearing.model.lm_head.register_forward_hook(lambda *found: shapes.append(found[2].shape[:2]))
    try:
        clips = different_clips(hearing)
        hearing.next_token_logits(prepare_inputs(hearing.processor, clips, SOUND))
        SharedPrefill(hearing, clips[:1], SOUND).level_logits(QUESTIONS)
    finally:
        hook.remove()
    assert shapes == [(3, 1), (1, 1), (1, 2)]


@pytest.mark.parametrize("seconds", [0.5, 3.2])
def test_tokens_with_sound_are_counted(hearing: Backbone, seconds: float) -> None:
    one = replace(random_clip(hearing, (2, 3), (4, 2), frames=6), duration=seconds)
    one = replace(one, seconds=tuple((number + 0.5) * seconds / 6 for number in range(6)), sound=noise(seconds))
    sizes = [view.shape[1:3] for view in one.views]
    counted = count_tokens(hearing.processor, 6, sizes, SOUND, seconds)
    assert counted == prepare_inputs(hearing.processor, [one], SOUND)["input_ids"].shape[1]
    assert counted > count_tokens(hearing.processor, 6, sizes, PROMPT, seconds) + 12


def test_a_gpu_gets_batches_that_count_the_sound(hearing: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = [heard_clip(hearing, (2, 2), frames=2, step=step, seed=step) for step in (25, 25, 100)]
    tokens = [round(2 * seconds * hearing.processor.position_id_per_seconds) for seconds in (1, 4)]
    monkeypatch.setattr(Backbone, "device", torch.device("cuda"))
    monkeypatch.setattr("lmm_qa.model.backbone.PROMPT_TOKENS", 0)
    monkeypatch.setattr("lmm_qa.model.backbone.MAX_BATCH_TOKENS", 2 * (4 + tokens[0]))
    assert hearing.batches(clips, PROMPT) == [[0, 1, 2]]
    assert hearing.batches(clips, SOUND) == [[0, 1], [2]]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in OMNI])
def test_a_model_that_cannot_hear_is_refused(family: str, load: Load) -> None:
    with pytest.raises(ModelError, match=r"sound: true\), which \w+Processor does not take: use a Qwen2\.5-Omni or"):
        level_tokens(load(family).processor, SOUND, 1)


def test_a_server_gets_neither_sound_nor_videos_of_omni_models(hearing: Backbone, load: Load) -> None:
    served = ServedModel("http://127.0.0.1:9/v1", "rater", None, None)
    for processor in (hearing.processor, load("qwen2_vl").processor):
        with pytest.raises(ModelError, match=r"a served model gets no sound: use a prompt without sound \(--prompt"):
            ServedBackbone(served, processor, SOUND)
    with pytest.raises(ModelError, match="use a prompt with `frames: images`, or load the model in this process"):
        ServedBackbone(served, hearing.processor, PROMPT)


def test_sound_needs_the_frames_as_a_video() -> None:
    with pytest.raises(ConfigError, match="it needs frames: video"):
        Prompt.parse({**SOUND.model_dump(), "frames": "images"}, "this prompt")


def test_ids_of_raters_without_sound_stay_the_same() -> None:
    assert "sound" not in RaterConfig().scoring_settings()["prompt"]
    assert RaterConfig(prompt=SOUND).scoring_settings()["prompt"]["sound"] is True


@pytest.mark.parametrize("family", OMNI)
def test_the_thinker_of_a_whole_model_is_loaded(
    family: str, load: Load, family_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    """A checkpoint as it is published: it also speaks."""
    whole, thinker = add_talker(family_dir(family), tmp_path / "whole"), load(family)
    assert "thinker_config" in json.loads((whole / "config.json").read_text())
    loaded = Backbone.load(str(whole), device="cpu", dtype="float32")
    one = heard_clip(thinker, (2, 3), frames=4)
    assert_equal_logits(loaded.level_logits([one], SOUND)[0], thinker.level_logits([one], SOUND)[0], 1e-6)
    parameters = sum(parameter.numel() for parameter in thinker.model.parameters())
    assert estimate_memory(str(whole), 100, dtype="float32").parameters == parameters
    tensors = load_file(whole / "model.safetensors")
    assert any(not name.startswith("thinker.") for name in tensors)
    for part in ("audio_tower", "visual", "model.layers.1.self_attn.q_proj"):
        broken = Path(shutil.copytree(whole, tmp_path / part))
        left = {name: value for name, value in tensors.items() if not name.startswith(f"thinker.{part}")}
        save_file(left, broken / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=rf"{len(tensors) - len(left)} missing \(model\."):
            Backbone.load(str(broken), device="cpu", dtype="float32")
    surplus = Path(shutil.copytree(whole, tmp_path / "surplus"))
    save_file(tensors | {"thinker.model.x": torch.ones(2)}, surplus / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="1 unexpected"):
        Backbone.load(str(surplus), device="cpu", dtype="float32")


def test_frames_are_as_large_as_their_view(hearing: Backbone) -> None:
    factor = patch_factor(hearing.processor)
    assert factor == {"qwen2_5_omni_thinker": 28, "qwen3_omni_moe_thinker": 32}[hearing.model.config.model_type]
