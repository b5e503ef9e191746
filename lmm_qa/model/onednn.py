"""TODO-DOC model.onednn."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    pass


class OneDNNLinear(TorchFunctionMode):
    """Has a CPU calculate layers as matrix products of oneDNN where these are quicker; for inference alone.

    The same numbers to rounding, and the model stays as it is. PyTorch's linear layers in float32 call MKL, which makes
    little of AMD's processors: 100 GFLOP/s on a core of Zen 5, where oneDNN does 220. The patch embedding of the
    Qwen-VL family is a convolution whose kernel covers its input, so a product too: for a clip of the embedded model
    34 ms as PyTorch does it, 12 with MKL, 5 with oneDNN.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        plain = not types and not kwargs  # no weights of a quantized kind, and all arguments in their places
        if plain and function is functional.linear:
            return _linear(*args)
        if plain and function is functional.conv3d and args[4:5] == ((0, 0, 0),):  # padding
            patches, kernels, bias = args[:3]
            if patches.shape[1:] == kernels.shape[1:]:
                return _linear(patches.flatten(1), kernels.flatten(1), bias)[..., None, None, None]
        return function(*args, **(kwargs or {}))


def _linear(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if not _onednn_is_quicker() or not values.dtype == weight.dtype == torch.float32:
        return functional.linear(values, weight, bias)
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(values, weight, bias, "none", [], "")
    return product


@functools.cache
def _onednn_is_quicker() -> bool:
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.cpu.get_cpu_capability() == "AVX512"
