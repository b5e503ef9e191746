"""python -m pytest tests/model/test_onednn.py"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from model_inputs import (
    PROMPT,
    QWEN,
    random_clip,
)
from paths import SAMPLES

from lmm_qa import Rater
from lmm_qa.model.backbone import Backbone
from lmm_qa.model.loading import BFLOAT16_VISION
from lmm_qa.model.onednn import OneDNNLinear, bfloat16_is_faster, linear, onednn_is_faster

LAYERS: dict[str, tuple[torch.nn.Module, tuple[int, ...]]] = {
    "linear": (torch.nn.Linear(24, 7), (5, 24)),
    "linear without bias, three axes": (torch.nn.Linear(24, 7, bias=False), (2, 5, 24)),
    "linear of nothing": (torch.nn.Linear(24, 7), (0, 24)),
    "linear in half precision": (torch.nn.Linear(24, 7, dtype=torch.bfloat16), (5, 24)),
    "linear in double precision": (torch.nn.Linear(24, 7, dtype=torch.float64), (5, 24)),
    "patches": (torch.nn.Conv3d(3, 8, (2, 4, 4), stride=(2, 4, 4)), (5, 3, 2, 4, 4)),
    "patches without bias": (torch.nn.Conv3d(3, 8, (2, 4, 4), bias=False), (5, 3, 2, 4, 4)),
    "a kernel that moves": (torch.nn.Conv3d(3, 8, (2, 4, 4), stride=(2, 4, 4)), (5, 3, 4, 8, 4)),
    "a kernel with a margin": (torch.nn.Conv3d(3, 8, (2, 4, 4), padding=1), (5, 3, 2, 4, 4)),
    "groups": (torch.nn.Conv3d(4, 8, (2, 4, 4), groups=2), (5, 4, 2, 4, 4)),
}


@pytest.mark.parametrize("quicker", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
@torch.inference_mode()
def test_a_layer_computed_by_onednn_is_equal(kind: str, quicker: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lmm_qa.model.onednn.onednn_is_faster", lambda: quicker and torch.backends.mkldnn.is_available()
    )
    layer, shape = LAYERS[kind]
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(layer.weight.dtype)
    expected = layer(values)
    with OneDNNLinear():
        found = layer(values)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no AVX-512")
@pytest.mark.parametrize("kind", LAYERS)
@torch.inference_mode()
def test_factors_are_rounded_to_bfloat16_and_pixels_are_not(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmm_qa.model.onednn.onednn_is_faster", lambda: True)
    layer, shape = LAYERS[kind]
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(layer.weight.dtype)
    expected = layer(values)
    with OneDNNLinear(torch.bfloat16):
        found = layer(values)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert torch.allclose(found, expected, atol=0.03)
    rounded = isinstance(layer, torch.nn.Linear) and layer.weight.dtype == torch.float32 and len(values)
    assert torch.allclose(found, expected, atol=1e-6) != bool(rounded)


@pytest.mark.parametrize("quicker", [True, False])
@torch.inference_mode()
def test_a_swish_is_computed_with_its_layer(quicker: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lmm_qa.model.onednn.onednn_is_faster", lambda: quicker and torch.backends.mkldnn.is_available()
    )
    values, weight, bias = torch.randn(5, 24), torch.randn(7, 24), torch.randn(7)
    expected = torch.nn.functional.silu(values @ weight.T + bias)
    assert torch.allclose(linear(values, weight, bias, "swish"), expected, atol=1e-5)


def test_the_embedded_model_rounds_to_bfloat16_where_that_is_faster() -> None:
    """The score hardly changes: 0.0009 at most on 42 clips."""
    exact, fast = (Rater.from_pretrained("embedded", device="cpu", dtype=dtype) for dtype in ("float32", None))
    assert BFLOAT16_VISION not in exact.backbone.choices
    assert (BFLOAT16_VISION in fast.backbone.choices) == bfloat16_is_faster()
    for clip in (SAMPLES / "astronaut_clean.mp4", SAMPLES / "astronaut_noise_strong.mp4"):
        scores = [rater.rate(clip).score for rater in (exact, fast)]
        assert scores[0] == pytest.approx(scores[1], abs=0.002)
        assert (scores[0] != scores[1]) == bfloat16_is_faster()


@pytest.mark.parametrize("family", QWEN)
def test_a_cpu_computes_all_layers_with_onednn(family: str, load: Callable[[str], Backbone]) -> None:
    backbone = load(family)
    backbone.level_logits([random_clip(backbone, (2, 3))], PROMPT)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        backbone.level_logits([random_clip(backbone, (2, 3))], PROMPT)
    calls = {event.key: event.count for event in profile.key_averages()}
    parts = [part for name, part in backbone.model.named_modules() if "audio_tower" not in name]  # there is no sound
    # Those of the linear attention of Qwen3.5; the patch embedding is a product.
    assert calls.get("aten::convolution", 0) == sum(isinstance(part, torch.nn.Conv1d) for part in parts)
    # The experts of Qwen3-Omni are one product of all, their router is a layer.
    layers = sum(isinstance(part, torch.nn.Linear) or type(part).__name__.endswith("Router") for part in parts)
    assert calls.get("mkldnn::_linear_pointwise", 0) == (layers + 1 if onednn_is_faster() else 0)
