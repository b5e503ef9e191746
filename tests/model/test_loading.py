"""python -m pytest tests/model/test_loading.py"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.nn.modules as bnb
import numpy as np
import pytest
import torch
from backbones import FAMILIES, published
from model_inputs import (
    PROMPT,
    random_clip,
)
from transformers import AutoTokenizer

from lmm_qa.errors import ModelError
from lmm_qa.model.backbone import Backbone
from lmm_qa.model.loading import choose_attention, choose_device, choose_dtype, estimate_memory, load_processor

GATES = ("in_proj_a", "in_proj_b")
"""Layers of Qwen3.5 that are too narrow for 4 bit."""


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_models_are_close_to_float32(
    family: str, quantization: Any, load: Callable[[str], Backbone], family_dir: Callable[[str], Path]
) -> None:
    exact = load(family)
    small = Backbone.load(str(family_dir(family)), device="cpu", dtype="float32", quantization=quantization)
    kind = {"4bit": bnb.Linear4bit, "8bit": bnb.Linear8bitLt}[quantization]
    linear = {name: type(part) for name, part in small.model.named_modules() if isinstance(part, torch.nn.Linear)}
    quantized = {name for name, part in linear.items() if issubclass(part, kind)}
    assert quantized == {name for name in linear if "language_model" in name and not name.endswith(GATES)}
    assert {linear[name] for name in linear.keys() - quantized} == {torch.nn.Linear}
    assert any("vis" in name for name in linear.keys() - quantized)
    one = random_clip(exact, (2, 3))
    (expected,), (reading,) = exact.level_logits([one], PROMPT), small.level_logits([one], PROMPT)
    spread = float(np.abs(expected.logits).max())
    assert np.isfinite(reading.logits).all()
    assert reading.logits == pytest.approx(expected.logits, abs=spread * {"4bit": 0.5, "8bit": 0.15}[quantization])
    assert small.choices["quantization"].value == quantization


def test_a_model_without_video_support_is_an_error(tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor, LlavaProcessor

    tokenizer = AutoTokenizer.from_pretrained(published("qwen2.5-vl-7b-instruct"))
    LlavaProcessor(CLIPImageProcessor(), tokenizer, patch_size=14).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="does not accept videos: its processor LlavaProcessor has no video processor"):
        load_processor(str(tmp_path))


def test_load_errors_name_what_failed(family_dir: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(family_dir("qwen2_vl"), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"cannot load the model '.*model': OSError: "):
        Backbone.load(str(tmp_path / "model"), device="cpu")
    torch.save({}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"cannot load the model '.*model'"):  # a pickle can run code
        Backbone.load(str(tmp_path / "model"), device="cpu")
    with pytest.raises(ModelError, match=r"cannot load the processor of '.*empty'"):
        (tmp_path / "empty").mkdir()
        Backbone.load(str(tmp_path / "empty"), device="cpu")
    with pytest.raises(ModelError, match=r"cannot load the adapter .*empty for '.*qwen2_vl'"):
        Backbone.load(str(family_dir("qwen2_vl")), adapter=tmp_path / "empty", device="cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_is_estimated_without_weights(family: str, load: Any, family_dir: Any, tmp_path: Path) -> None:
    shutil.copy(family_dir(family) / "config.json", tmp_path)
    model = load(family).model
    memory = estimate_memory(str(tmp_path), 1000, dtype="float32")
    assert memory.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert memory.weights == 4 * memory.parameters
    in_layers = sum(part.weight.numel() for name, part in model.named_modules()
                    if isinstance(part, torch.nn.Linear) and "language_model" in name
                    and not name.endswith(GATES))  # fmt: skip
    assert (
        estimate_memory(str(tmp_path), 1000, dtype="float32", quantization="8bit").weights
        == memory.weights - 3 * in_layers
    )
    assert estimate_memory(str(tmp_path), 2000, dtype="float32").clip == 2 * memory.clip
    with pytest.raises(ModelError, match="is neither a directory nor a hub id"):
        estimate_memory(str(tmp_path / "gone"), 1000, dtype="float32")


def test_choices_state_their_reason() -> None:
    assert str(choose_device("cpu")) == "cpu (requested)"
    with pytest.raises(ModelError, match=r"device 'cuda:99' cannot be used here: .*Try --device cpu"):
        choose_device("cuda:99")
    assert choose_device().value in {"cpu", "cuda", "mps"}
    assert str(choose_dtype("cpu")) == "float32 (exact, and reliable on cpu)"
    assert str(choose_dtype("cpu", "bfloat16")) == "bfloat16 (requested)"
    assert str(choose_attention("cpu", "float32")) == "sdpa (on cpu)"
    assert choose_attention("cuda", "float32").value == "sdpa"  # flash-attn or not


@pytest.mark.parametrize(
    ("capability", "dtype", "attention"),
    [
        ((7, 5), "float16", "sdpa"),
        ((8, 0), "bfloat16", "flash_attention_2"),
        ((12, 0), "bfloat16", "flash_attention_2"),
    ],
)
def test_flash_attention_and_bfloat16_need_an_ampere_gpu(
    capability: tuple[int, int], dtype: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("transformers.utils.import_utils.is_flash_attn_2_available", lambda: True)
    assert choose_dtype("cuda:1").value == dtype
    assert choose_attention("cuda:1", dtype).value == attention
    assert choose_attention("cuda:1", "float32").value == "sdpa"
