"""python -m pytest tests/training/test_adapters.py"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
import torch
from backbones import FAMILIES
from model_inputs import random_clip
from training_runs import MakeConfig

from lmm_qa.model.backbone import Backbone
from lmm_qa.model.inputs import prepare_inputs
from lmm_qa.model.loading import empty_model
from lmm_qa.model.prompt import Prompt
from lmm_qa.training.adapters import lora_targets, trainable_model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parts", [(), ("vision",), ("merger",), ("vision", "merger")])
def test_lora_targets_the_linear_layers_of_the_chosen_components(
    family: str, parts: Sequence[str], family_dir: Callable[[str], Path]
) -> None:
    model = empty_model(str(family_dir(family)))
    targets = lora_targets(model, {"language", *parts})
    names = {name for name, _ in model.named_modules()}
    hit = {name for name in names if re.fullmatch(targets, name)} if isinstance(targets, str) else names & {*targets}
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert hit <= linear
    merger = {name for name in linear if "merger" in name or "projector" in name}
    tower = {name for name in linear if ("visual" in name or "vision_tower" in name)} - merger
    language = {name for name in linear if "language_model" in name}
    assert language and hit & language == language
    assert hit & merger == (merger if "merger" in parts else set())
    assert hit & tower == (tower if "vision" in parts else set())
    assert "lm_head" not in hit


@pytest.mark.parametrize(
    ("family", "trained"),
    [
        ("qwen2_vl", "language"),
        ("qwen2_vl", "language and merger"),
        ("qwen2_vl", "language, full"),
        ("qwen2_vl", "language, merger and vision"),
        ("qwen2_5_vl", "language"),
        ("qwen3_vl", "language"),
        ("qwen3_5", "language"),
        ("qwen2_5_omni", "language"),
        ("qwen2_5_omni", "language, full"),
        ("qwen3_omni_moe", "language"),
        ("internvl", "language"),
        ("llava_onevision", "language"),
    ],
)
def test_only_a_trained_vision_tower_keeps_activations_for_the_backward_pass(
    family: str, trained: str, make_config: MakeConfig, family_dir: Callable[[str], Path]
) -> None:
    """With activation checkpointing, which changes no gradient."""
    tuning = {"tuning__method": "full" if "full" in trained else "lora", "tuning__merger": "merger" in trained,
              "tuning__vision": "vision" in trained, "tuning__lora_dropout": 0.0}  # fmt: skip
    gradients = []
    tower: list[bool] = []
    backbone = Backbone.load(str(family_dir(family)), device="cpu")
    for checkpointing in (False, True):
        config = make_config(**tuning, training__gradient_checkpointing=checkpointing)
        model = trainable_model(copy.deepcopy(backbone.model), config).train()
        for name, module in model.named_modules():
            if re.search(r"(visual|vision_tower)\.", name) and not re.search("merger|projector", name):
                module.register_forward_hook(lambda *found: tower.append(_requires_grad(found[2])))
        clips = [random_clip(backbone, (2, 2), seed=seed) for seed in (0, 1)]
        inputs = prepare_inputs(backbone.processor, clips, Prompt(question="How good?", stem="It is"))
        model(**inputs, logits_to_keep=1, use_cache=False).logits.square().mean().backward()
        assert len(tower) > 10 and any(tower) == ("vision" in trained)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:  # B starts as zero, so A has no gradient
                assert parameter.grad is not None and parameter.grad.any(), name
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    without, with_checkpointing = gradients
    for name, gradient in without.items():
        if gradient is not None:
            torch.testing.assert_close(with_checkpointing[name], gradient, msg=name)


def _requires_grad(output: object) -> bool:
    if isinstance(output, torch.Tensor):
        return output.requires_grad
    values = output.values() if isinstance(output, dict) else output
    return isinstance(values, Iterable) and any(map(_requires_grad, values))
