"""python -m pytest tests/model/test_vision_tower.py"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import add_adapter
from model_inputs import IMAGES, PROMPT, QWEN, random_clip

from lmm_qa.model import compat, vision_tower
from lmm_qa.model.backbone import Backbone
from lmm_qa.model.inputs import prepare_inputs, vision_features
from lmm_qa.model.vision_tower import encode_pictures, picture_groups


@pytest.mark.parametrize("most", [1, 64, 1024], ids=["one picture", "some pictures", "one size"])
@pytest.mark.parametrize("prompt", [PROMPT, IMAGES], ids=["video", "images"])
@pytest.mark.parametrize("family", QWEN)
@torch.inference_mode()
def test_the_tower_returns_the_same_for_a_few_pictures_at_a_time(
    family: str, prompt: Any, most: int, load: Callable[[str], Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision_tower, "MAX_PATCHES", most)
    backbone = load(family)
    clips = [random_clip(backbone, (2, 3), (4, 2), frames=6), random_clip(backbone, (4, 2), (2, 2), seed=1)]
    inputs = prepare_inputs(backbone.processor, clips, prompt)
    expected = vision_features(backbone.model, inputs)
    given = encode_pictures(backbone.model, inputs)
    assert given.keys() - inputs.keys() == {"mm_encoder_outputs"}
    assert not any(name.startswith("pixel_values") for name in given)
    (output,) = given["mm_encoder_outputs"].values()
    (tokens,) = output.pooler_output
    assert torch.allclose(tokens, expected["tokens"], rtol=1e-4, atol=1e-4)
    assert expected["tokens"].std() > 0.01
    layers = output.deepstack_features or []
    assert len(layers) == len(expected.get("deepstack", []))
    for (layer,), other in zip(layers, expected.get("deepstack", []), strict=True):
        assert torch.allclose(layer, other, rtol=1e-4, atol=1e-4)


def test_groups_hold_pictures_of_one_size_and_a_limited_number_of_patches() -> None:
    grid = torch.tensor([[6, 12, 12], [6, 16, 16], [1, 16, 16], [2, 40, 40]])
    groups = picture_groups(grid)
    assert groups == [(6, 12, 12), (3, 16, 16), (4, 16, 16), (1, 40, 40), (1, 40, 40)]
    assert picture_groups(torch.tensor([[1, 4, 6]] * 3)) == [(3, 4, 6)]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT 0.21
def test_an_adapter_of_the_tower_is_applied(
    family_dir: Callable[[str], Path], tmp_path: Path, load: Callable[[str], Backbone]
) -> None:
    base = load("qwen2_vl")
    targets = r".*blocks.*\.(qkv|proj|fc1)"
    adapter = add_adapter(family_dir("qwen2_vl"), tmp_path / "adapter", target_modules=targets)
    adapted = Backbone.load(str(family_dir("qwen2_vl")), adapter, device="cpu", dtype="float32")
    inputs = prepare_inputs(base.processor, [random_clip(base, (2, 3), (4, 2))], PROMPT)
    with torch.inference_mode():
        plain = adapted.model(**inputs, logits_to_keep=1).logits[:, -1]
    assert compat.qwen2_vl_tower(adapted.model) is not None
    found = adapted.next_token_logits(inputs)
    assert torch.allclose(found, plain, atol=1e-4)
    assert not torch.allclose(found, base.next_token_logits(inputs), atol=1e-3)
    with adapted.without_adapter():
        assert torch.allclose(adapted.next_token_logits(inputs), base.next_token_logits(inputs), atol=1e-4)
