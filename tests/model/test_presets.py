"""python -m pytest tests/model/test_presets.py"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones import conversation_inputs
from paths import ROOT
from PIL import Image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from transformers.video_utils import VideoMetadata

from lmm_qa.config import Sampling, View
from lmm_qa.errors import ConfigError, UsageError
from lmm_qa.model import source
from lmm_qa.model.hub import HubModel
from lmm_qa.model.inputs import level_tokens, patch_factor, prepare_inputs
from lmm_qa.model.loading import load_processor
from lmm_qa.model.presets import find_preset, get_preset, presets
from lmm_qa.model.prompt import load_prompt
from lmm_qa.model.rater_config import RaterConfig
from lmm_qa.model.source import resolve_model
from lmm_qa.rater import clip_input
from lmm_qa.training.config import TrainingConfig
from lmm_qa.video.frame_array import FrameArray


def test_every_file_is_a_preset_with_a_source_for_each_figure() -> None:
    assert set(presets()) == {file.stem for file in (ROOT / "configs" / "raters").glob("*.yaml")}
    for preset in presets().values():
        assert preset.model.count("/") == 1
        assert all(figure.source.startswith("https://") for figure in preset.published)
        assert (preset.tuned_on is None) == (not preset.published)
    first, *_, last = presets().values()
    assert first.tuned_on
    assert last.tuned_on is None


def test_qrealign_is_asked_as_its_authors_do() -> None:
    settings = get_preset("qrealign-mini").settings()
    assert settings.prompt == load_prompt("qrealign")
    assert settings.prompt.frames == "images"
    assert settings.prompt.stem == " The quality of the video is"
    assert settings.prompt.levels == ("bad", "poor", "fair", "good", "excellent")
    assert settings.sampling == Sampling(strategy="linspace", frames=8)
    assert settings.views == (View(kind="fit", size=448),)


def test_the_recipe_that_goes_on_from_qrealign_asks_it_in_the_same_way() -> None:
    recipe, preset = TrainingConfig.load(Path("thqa_qrealign")), presets()["qrealign-mini"]
    assert recipe.model.backbone == preset.model
    settings = recipe.rating.rater_config(RaterConfig(), recipe.scale)
    assert settings == preset.settings().override(scale=(0, 5))


def test_a_rater_is_found_by_its_name_and_by_its_id_on_the_hub() -> None:
    preset = presets()["qrealign-lite"]
    assert find_preset("qrealign-lite") == find_preset("Q-Future/Q-ReAlign-Lite-4B") == ("qrealign-lite", preset)
    assert find_preset("somebody/Q-ReAlign-Lite-4B") is None
    with pytest.raises(ConfigError, match="no published rater is called 'qrealign'; known: qrealign-mini, "):
        get_preset("qrealign")


def test_its_settings_go_with_a_local_copy_of_the_weights(tmp_path: Path) -> None:
    settings = get_preset("qrealign-pro").settings()
    (tmp_path / "rater.json").write_text(settings.model_dump_json(exclude_none=True))
    assert RaterConfig.read(tmp_path / "rater.json") == settings


@pytest.mark.parametrize("name", ["qrealign-mini", "q-future/Q-ReAlign-Mini-0.8B"])
def test_a_name_stands_for_weights_at_the_known_revision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def found(model: str, revision: str | None) -> HubModel:
        asked.append((model, revision))
        return HubModel(model, revision or "0" * 40, None)

    monkeypatch.setattr(source, "find_model", found)
    preset = presets()["qrealign-mini"]
    resolved = resolve_model(name)
    assert (resolved.name, resolved.backbone, resolved.revision) == ("qrealign-mini", preset.model, preset.revision)
    assert resolved.settings == preset.settings()
    assert resolve_model(name, "main").revision == "main"
    assert asked == [(preset.model, preset.revision), (preset.model, "main")]


def test_a_path_that_does_not_exist_is_answered_with_all_that_could_be_meant() -> None:
    with pytest.raises(UsageError, match="or a name that lmm-qa raters lists"):
        resolve_model("./qrealign-mini")


# The inputs of each preset against a reference that shares no code with them but the words of the prompt

FAMILY = {"q-future/Q-ReAlign": "qwen3_5", "Qwen/Qwen3.5": "qwen3_5", "Qwen/Qwen3-VL": "qwen3_vl",
          "OpenGVLab/InternVL3": "internvl"}  # fmt: skip
FPS = 25
CLIP = np.random.default_rng(0).integers(0, 256, (37, 300, 500, 3), np.uint8)
"""Larger than 448 x 448 pixels, and its sides are no multiples of 32."""


@cache
def cached_processor(folder: Path) -> Any:
    return load_processor(str(folder))


@pytest.mark.parametrize("name", presets())
def test_inputs_equal_an_independent_reference(name: str, family_dir: Callable[[str], Path]) -> None:
    preset = presets()[name]
    (family,) = {each for start, each in FAMILY.items() if preset.model.startswith(start)}
    processor, settings = cached_processor(family_dir(family)), preset.settings()
    frames = FrameArray(CLIP, FPS).read_frames(settings.sampling, settings.views, patch_factor(processor) or 1)
    ours = prepare_inputs(processor, [clip_input(frames)], settings.prompt)
    theirs = qrealign_inputs(processor) if preset.prompt == "qrealign" else zero_shot_inputs(processor)
    assert set(ours) == set(theirs)
    for key in theirs:
        assert torch.equal(ours[key], theirs[key]), key
    words = [processor.tokenizer(f" {word}").input_ids for word in ("bad", "poor", "fair", "good", "excellent")]
    assert [[token] for token in level_tokens(processor, settings.prompt, 1)] == words


def qrealign_inputs(processor: Any) -> Any:
    """As the public code of Q-ReAlign makes them from a video: frames, template and stem."""
    images = []
    for index in [int(np.round(place)) for place in np.linspace(0, len(CLIP) - 1, 8)]:
        image = Image.fromarray(CLIP[index])
        image = image.resize((int(image.width * 448 / 500), int(image.height * 448 / 500)))
        rows, columns = smart_resize(image.height, image.width, factor=32, min_pixels=4 * 32**2, max_pixels=2**24)
        images.append(image.resize((columns, rows)))
    text = (
        "<|im_start|>user\n" + "<|vision_start|><|image_pad|><|vision_end|>" * 8 + "How would you rate the quality of "
        "this video?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    inputs = processor(text=[text], images=images, do_resize=False, return_tensors="pt")
    stem = torch.tensor([processor.tokenizer(" The quality of the video is").input_ids])
    for key, added in (
        ("input_ids", stem),
        ("attention_mask", torch.ones_like(stem)),
        ("mm_token_type_ids", torch.zeros_like(stem)),
    ):
        inputs[key] = torch.cat((inputs[key], added), dim=1)
    return inputs


def zero_shot_inputs(processor: Any) -> Any:
    """Eight frames from the middle of as many equal parts, whole, in at most 448 x 448 pixels."""
    factor = getattr(processor.video_processor, "patch_size", None)
    factor = factor * processor.video_processor.merge_size if isinstance(factor, int) else 1
    _, height, width, _ = CLIP.shape
    rows, columns = smart_resize(height, width, factor=factor, min_pixels=factor**2, max_pixels=448**2)
    indices = [int((part + 0.5) * len(CLIP) / 8) for part in range(8)]
    frames = np.stack([np.asarray(Image.fromarray(CLIP[index]).resize((columns, rows))) for index in indices])
    metadata = VideoMetadata(total_num_frames=len(CLIP), fps=FPS, duration=len(CLIP) / FPS, frames_indices=indices)
    return conversation_inputs(processor, load_prompt("talking_head"), {}, [frames], metadata)
