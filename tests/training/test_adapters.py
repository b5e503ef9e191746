"""python -m pytest tests/training/test_adapters.py"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from lmm_qa.model.backbone import Backbone
from lmm_qa.training.adapters import lora_targets


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision"])
@pytest.mark.parametrize("parts", [(), ("vision",), ("merger",), ("vision", "merger")])
def test_lora_targets_the_linear_layers_of_the_chosen_components(
    family: str, parts: Sequence[str], family_dir: Callable[[str], Path]
) -> None:
    model = Backbone.load(str(family_dir(family)), device="cpu").model
    pattern = lora_targets(model, {"language", *parts})
    hit = {name for name, module in model.named_modules() if re.fullmatch(pattern, name)}
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert hit <= linear
    merger = {name for name in linear if "merger" in name or "projector" in name}
    tower = {name for name in linear if ("visual" in name or "vision_tower" in name)} - merger
    language = {name for name in linear if "language_model" in name}
    assert language and hit & language == language
    assert hit & merger == (merger if "merger" in parts else set())
    assert hit & tower == (tower if "vision" in parts else set())
    assert "lm_head" not in hit
