"""Memory of the activations of a training step, counted without computing or allocating anything.

One layer of the language model, and one of the vision tower if it is trained, run forward and backward on PyTorch's
fake tensors, which have a shape and a dtype but no content. What is alive at each moment is what a real step would
hold, including what is easily forgotten: PEFT casts the input of each adapter to float32, and dropout stores a mask.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PATCHES_PER_TOKEN = 4
"""Patches in the vision tower for each token of the language model: the merger joins 2 x 2 of them."""


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of one layer for a batch."""

    inputs: int
    """Its input: what activation checkpointing keeps."""
    kept: int
    """After the forward pass, for the backward pass."""
    peak: int
    """At most, during both."""

    def of(self, layers: int, checkpointing: bool) -> tuple[int, int]:
        """Bytes kept for the backward pass through this number of layers, and bytes needed above them to compute."""
        if checkpointing:
            return layers * self.inputs, self.peak
        return layers * self.kept, self.peak - self.kept


def step_memory(
    model: Any, clips: int, tokens: int, dtype: torch.dtype, *, checkpointing: bool, vision: bool, fused_dropout: bool
) -> int:
    """Bytes of activations at the peak of a training step.

    Args:
        model: on the meta device, with its adapters; left unusable.
        clips: in a batch.
        tokens: of a clip.
        dtype: of the computation.
        checkpointing: whether activations are computed again in the backward pass.
        vision: whether the vision tower gets a backward pass.
        fused_dropout: whether dropout stores its mask in one byte, as on a GPU, or in float32, as on a CPU.
    """
    text = text_layer(model, clips, tokens, dtype, fused_dropout=fused_dropout)
    kept, needed = text.of(model.config.get_text_config().num_hidden_layers, checkpointing)
    if not vision:
        return kept + needed
    layers = vision_layers(model)
    tower = vision_layer(layers[0], clips * tokens * PATCHES_PER_TOKEN, dtype, fused_dropout=fused_dropout)
    tower_kept, tower_needed = tower.of(len(layers), checkpointing)
    # The backward pass through the tower starts when that through the language model has ended.
    return tower_kept + max(kept + needed, tower_needed)


def text_layer(model: Any, clips: int, tokens: int, dtype: torch.dtype, *, fused_dropout: bool) -> LayerMemory:
    """Memory of the first layer of the language model; arguments as for `step_memory`."""
    text = next(module for name, module in model.named_modules() if name.endswith("language_model"))
    text.layers = text.layers[:1]
    width = model.config.get_text_config().hidden_size

    def forward(hidden: Tensor) -> Tensor:
        result: Tensor = text(inputs_embeds=hidden, use_cache=False).last_hidden_state
        return result

    return _run(text, forward, (clips, tokens, width), dtype, fused_dropout)


def vision_layers(model: Any) -> nn.ModuleList:
    """The layers of the vision tower."""
    tower = next(module for name, module in model.named_modules() if name.endswith(("visual", "vision_tower")))
    lists = (module for module in tower.modules() if isinstance(module, nn.ModuleList))
    return max((layers for layers in lists if len({*map(type, layers)}) == 1), key=len)


def vision_layer(layer: Any, patches: int, dtype: torch.dtype, *, fused_dropout: bool) -> LayerMemory:
    """Memory of a layer of the vision tower for a batch of patches; arguments as for `step_memory`."""
    width = next(layer.parameters()).numel()  # of the norm in front
    parameters = inspect.signature(layer.forward).parameters

    def forward(hidden: Tensor) -> Tensor:
        # NumPy, because the layer reads the values.
        known: dict[str, Any] = {"cu_seqlens": np.array([0, patches]), "attention_mask": None}
        if "position_embeddings" in parameters:
            known["position_embeddings"] = (torch.empty(patches, layer.attn.head_dim),) * 2
        result = layer(hidden, **{name: value for name, value in known.items() if name in parameters})
        return result if isinstance(result, Tensor) else result[0]

    return _run(layer, forward, (patches, width) if "cu_seqlens" in parameters else (1, patches, width), dtype,
                fused_dropout)  # fmt: skip


def _run(
    module: nn.Module, forward: Callable[[Tensor], Tensor], shape: tuple[int, ...], dtype: torch.dtype, fused: bool
) -> LayerMemory:
    """Run `forward`, which calls the module, on fake tensors of a CPU."""
    for dropout in module.modules():
        if fused and isinstance(dropout, nn.Dropout):
            dropout.forward = _FusedDropout(dropout.p)  # type: ignore[assignment]
    with FakeTensorMode(allow_non_fake_inputs=True):
        module.to_empty(device="cpu").train()
        hidden = torch.empty(shape, dtype=dtype, requires_grad=True)
        memory = LiveMemory()
        with memory, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            result = forward(hidden)
            kept = memory.live
            torch.autograd.backward(result.sum())
    return LayerMemory(hidden.nbytes, kept, memory.peak)


@dataclass(frozen=True)
class _FusedDropout:
    p: float

    def __call__(self, values: Tensor) -> Tensor:
        return torch.native_dropout(values, self.p, True)[0]


class LiveMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors that are made and alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.storages = weakref.WeakSet[torch.UntypedStorage]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and (storage := value.untyped_storage()) not in self.storages:
                self.storages.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, count: int) -> None:
        self.live += count
        self.peak = max(self.peak, self.live)
