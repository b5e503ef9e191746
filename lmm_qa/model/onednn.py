"""Faster products of float32 matrices on CPUs with AVX-512, through oneDNN."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class OneDNNLinear(TorchFunctionMode):
    """Context in which a CPU computes linear layers with oneDNN where that is faster. For inference only.

    The model is not modified, and results are equal up to rounding. PyTorch computes float32 linear layers with MKL,
    which is slow on AMD processors: 100 GFLOP/s on a Zen 5 core, against 220 with oneDNN. The patch embedding of the
    Qwen-VL family is a convolution whose kernel covers its whole input, so it is a matrix product too: for a clip of
    the embedded model it takes 34 ms as a convolution, 12 with MKL, 5 with oneDNN.

    Args:
        factors: dtype to which values, weights and results of float32 linear layers are rounded; sums are float32. On a
            Zen 4 core, bfloat16 takes half the time. The patch embedding is computed in float32 in any case: bfloat16
            would move pixels by up to a quarter of a grey level.
    """

    def __init__(self, factors: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.factors = factors

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        plain = not types and not kwargs  # no quantized weights, and all arguments are positional
        if plain and function is functional.linear:
            values, weight, bias = args if len(args) == 3 else (*args, None)
            return linear(values, weight, bias, factors=self.factors)
        if plain and function is functional.conv3d and args[4:5] == ((0, 0, 0),):  # no padding
            patches, kernels, bias = args[:3]
            if patches.shape[1:] == kernels.shape[1:]:
                return linear(patches.flatten(1), kernels.flatten(1), bias)[..., None, None, None]
        return function(*args, **(kwargs or {}))


def linear(
    values: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    factors: torch.dtype = torch.float32,
) -> torch.Tensor:
    """A linear layer and, optionally, an activation.

    Args:
        values: (..., inputs).
        weight: (outputs, inputs).
        bias: (outputs,).
        activation: "none", or "swish" for x * sigmoid(x).
        factors: see `OneDNNLinear`.
    """
    if not onednn_is_faster() or not values.dtype == weight.dtype == torch.float32:
        product = functional.linear(values, weight, bias)
        return functional.silu(product) if activation == "swish" else product
    if factors != torch.float32:
        values, weight, bias = values.to(factors), weight.to(factors), None if bias is None else bias.to(factors)
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(values, weight, bias, activation, [], "")
    return result.float()


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this PyTorch has oneDNN's linear operator and this CPU has AVX-512."""
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.cpu.get_cpu_capability() == "AVX512"


@functools.cache
def bfloat16_is_faster() -> bool:
    """Whether this CPU multiplies bfloat16 numbers faster than float32 numbers: Zen 4 and Sapphire Rapids do."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return onednn_is_faster() and bool(supported())
