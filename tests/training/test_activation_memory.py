"""python -m pytest tests/training/test_activation_memory.py"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import FAMILIES
from model_inputs import random_clip
from training_runs import MakeConfig

from lmm_qa.model.backbone import Backbone
from lmm_qa.model.inputs import prepare_inputs
from lmm_qa.model.loading import empty_model
from lmm_qa.model.prompt import Prompt
from lmm_qa.training.activation_memory import LiveMemory, step_memory, text_layer, vision_layer, vision_layers
from lmm_qa.training.adapters import trainable_model


class SavedBytes:
    """Bytes of the tensors that autograd saves, each storage once, without parameters."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.saved: dict[int, torch.UntypedStorage] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.saved[storage.data_ptr()] = storage  # holds it, so that its address is not used again
        return tensor

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self.saved.values())


@pytest.fixture
def empty(make_config: MakeConfig, family_dir: Callable[[str], Path]) -> Callable[[str, str], Any]:
    """Makes models with adapters on the meta device."""

    def make(family: str, dtype: str) -> Any:
        bare = empty_model(str(family_dir(family))).to(getattr(torch, dtype))
        with torch.device("meta"):
            return trainable_model(bare, make_config(tuning__vision=True, tuning__merger=True))

    return make


@pytest.fixture
def loaded(make_config: MakeConfig, family_dir: Callable[[str], Path]) -> Callable[..., tuple[Any, Any]]:
    """Makes the same models with weights, and inputs of two clips."""

    def make(family: str, dtype: Any, **changes: Any) -> tuple[Any, Any]:
        backbone = Backbone.load(str(family_dir(family)), device="cpu", dtype=dtype)
        clips = [random_clip(backbone, (8, 8), seed=seed) for seed in (0, 1)]
        inputs = prepare_inputs(backbone.processor, clips, Prompt(question="How good?", stem="It is"))
        config = make_config(tuning__vision=True, tuning__merger=True, **changes)
        return trainable_model(backbone.model, config).train(), inputs

    return make


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_kept_is_what_autograd_saves(
    family: str, dtype: str, empty: Callable[..., Any], loaded: Callable[..., tuple[Any, Any]]
) -> None:
    model, inputs = loaded(family, dtype)
    saved = SavedBytes(model)
    autocast = torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32")
    with autocast, torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        model(**inputs, logits_to_keep=1, use_cache=False)
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "fused_dropout": False}
    text = text_layer(empty(family, dtype), *inputs["input_ids"].shape, **options)
    layers = vision_layers(empty(family, dtype))
    tower = vision_layer(layers[0], len(inputs["pixel_values_videos"]), **options)
    kept = text.of(2, checkpointing=False)[0] + tower.of(len(layers), checkpointing=False)[0]
    assert kept == pytest.approx(saved.total, rel=0.1)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_is_that_of_a_real_step(
    family: str, checkpointing: bool, empty: Callable[..., Any], loaded: Callable[..., tuple[Any, Any]]
) -> None:
    model, inputs = loaded(family, "bfloat16", training__gradient_checkpointing=checkpointing)
    memory = LiveMemory()
    with memory, torch.autocast("cpu", torch.bfloat16):
        model(**inputs, logits_to_keep=1, use_cache=False).logits.sum().backward()
    clips, tokens = inputs["input_ids"].shape
    options = {"checkpointing": checkpointing, "vision": True, "fused_dropout": False}
    estimate = step_memory(empty(family, "bfloat16"), clips, tokens, torch.bfloat16, **options)
    assert estimate == pytest.approx(memory.peak, rel=0.15)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_estimated(family: str, empty: Callable[..., Any]) -> None:
    def estimate(vision: bool) -> int:
        model = empty(family, "bfloat16")
        return step_memory(model, 2, 64, torch.bfloat16, checkpointing=True, vision=vision, fused_dropout=True)

    assert 0 < estimate(vision=False) < estimate(vision=True)
