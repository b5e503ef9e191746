"""Run the vision tower of the Qwen-VL families on a few pictures at a time, for inference on a CPU.

Pictures do not attend to each other in these towers, so the results are the same. The activations of a few pictures fit
into the caches of a core, and mostly into memory that the process already has. For a whole clip at once, the tower of
the embedded model gets up to 150 MB of new memory from the operating system, which can be a third of its time.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import torch
from torch.nn import functional

from lmm_qa.model import compat
from lmm_qa.model.inputs import vision_features
from lmm_qa.model.onednn import OneDNNLinear, linear

FAMILIES = frozenset({"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"})
"""Values of `model_type` in config.json for which this has been checked."""

MAX_PATCHES = 1024
"""Patches of the pictures that the tower gets at a time; a larger picture is alone."""

QUICK_GELU = 1.702
"""Quick GELU: x * sigmoid(1.702 x)."""


def encode_pictures(
    model: Any, inputs: Mapping[str, torch.Tensor], factors: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Run the vision tower on the pixels of prepared inputs.

    Args:
        model: of one of the `FAMILIES`, or an adapter around it.
        inputs: see `lmm_qa.model.inputs.prepare_inputs`.
        factors: see `lmm_qa.model.onednn.OneDNNLinear`.

    Returns:
        Arguments for the model's forward: the inputs, with the output of the tower instead of pixels.
    """
    name, grid_name = (
        ("pixel_values", "image_grid_thw") if "pixel_values" in inputs else ("pixel_values_videos", "video_grid_thw")
    )
    groups = picture_groups(inputs[grid_name])
    patches = torch.split(inputs[name], [count * height * width for count, height, width in groups])
    tower = compat.qwen2_vl_tower(model)
    with OneDNNLinear(factors):
        outputs = [
            {"tokens": encode_equal_pictures(tower, part.to(tower.dtype), group, factors)}
            if tower
            else vision_features(model, {name: part, grid_name: torch.tensor([group])})
            for part, group in zip(patches, groups, strict=True)
        ]
    features = {key: torch.cat([output[key] for output in outputs], dim=-2) for key in outputs[0]}
    others = {key: value for key, value in inputs.items() if key != name}
    return others | compat.vision_kwargs(features, inputs)


def picture_groups(grid: torch.Tensor) -> list[tuple[int, int, int]]:
    """Divide pictures into groups of equal size with at most `MAX_PATCHES`, in order.

    Args:
        grid: (videos, 3) number of pictures of each video, and their height and width in patches.

    Returns:
        Number of pictures of each group, and their height and width in patches.
    """
    groups = []
    sizes = ((height, width) for count, height, width in grid.tolist() for _ in range(count))
    for (height, width), pictures in groupby(sizes):
        count = len(list(pictures))
        parts = -(-count // max(1, MAX_PATCHES // (height * width)))
        # As equal as possible.
        groups += [(count * (part + 1) // parts - count * part // parts, height, width) for part in range(parts)]
    return groups


def encode_equal_pictures(
    tower: Any, patches: torch.Tensor, group: tuple[int, int, int], factors: torch.dtype
) -> torch.Tensor:
    """Output of the vision tower of Qwen2-VL, as its own forward computes it but with one attention for all pictures.

    Args:
        tower: see `lmm_qa.model.compat.qwen2_vl_tower`.
        patches: (count x height x width, numbers per patch) prepared pixels.
        group: number of pictures, and their height and width in patches.
        factors: see `lmm_qa.model.onednn.OneDNNLinear`.

    Returns:
        (tokens, width of the language model).
    """
    hidden = tower.patch_embed(patches)
    rotation = compat.qwen2_vl_rotation(tower, hidden, group)
    for block in tower.blocks:
        hidden += _attention(block.attn, block.norm1(hidden), group[0], *rotation)
        hidden += _perceptron(block.mlp, block.norm2(hidden), factors)
    merged: torch.Tensor = tower.merger(hidden)
    return merged


def _attention(
    attention: Any, hidden: torch.Tensor, pictures: int, cosine: torch.Tensor, sine: torch.Tensor
) -> torch.Tensor:
    """Self-attention within each picture.

    Args:
        hidden: (N, width), the patches of all pictures.
        pictures: their number.
        cosine, sine: (N, 1, width of a head) of the angles of the rotary position embedding.
    """
    projected = attention.qkv(hidden).view(len(hidden), 3, attention.num_heads, -1)
    query, key = (_rotate(projected[:, part].float(), cosine, sine).to(hidden.dtype) for part in (0, 1))
    queries, keys, values = (
        each.reshape(pictures, -1, *each.shape[1:]).transpose(1, 2) for each in (query, key, projected[:, 2])
    )  # (pictures, heads, patches, width of a head)
    attended = functional.scaled_dot_product_attention(queries, keys, values, scale=attention.scaling)
    output: torch.Tensor = attention.proj(attended.transpose(1, 2).reshape(len(hidden), -1))
    return output


def _perceptron(mlp: Any, hidden: torch.Tensor, factors: torch.dtype) -> torch.Tensor:
    """Two linear layers with a quick GELU between them.

    With its 1.702 in the weights of both layers it is a swish, which oneDNN computes together with the first layer.
    """
    first, second = mlp.fc1, mlp.fc2
    plain = type(first) is type(second) is torch.nn.Linear and first.weight.dtype == torch.float32
    if not plain or type(mlp.act).__name__ != "QuickGELUActivation":
        output: torch.Tensor = mlp(hidden)
        return output
    swished = linear(hidden, QUICK_GELU * first.weight, QUICK_GELU * first.bias, "swish", factors)
    return linear(swished, second.weight / QUICK_GELU, second.bias, factors=factors)


def _rotate(values: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Apply the rotary position embedding to (N, heads, width of a head) float32 queries or keys."""
    first, second = values.chunk(2, dim=-1)
    return (values * cosine).add_(torch.cat((-second, first), dim=-1).mul_(sine))
