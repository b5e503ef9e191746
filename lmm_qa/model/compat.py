"""Workarounds for particular versions of transformers and PEFT, each with its reason.

Everything that depends on an interface which these libraries do not promise to keep is here, so that an upgrade is
checked by reading one file. Written for transformers 5.23 and PEFT 0.21.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch


@contextmanager
def ignore_peft_deprecation() -> Iterator[None]:
    """Hide a FutureWarning that users can do nothing about.

    PEFT 0.21 reads `is_gradient_checkpointing`, which transformers 5.23 renamed to `is_activation_checkpointing`.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def no_resize_kwargs(processor: Any) -> dict[str, Any]:
    """Arguments that keep a processor with a patch grid from resizing videos."""
    kwargs = {"do_resize": False}
    # The Qwen-VL processors warn unless this is set, even if they do not resize:
    # https://github.com/huggingface/transformers/pull/48071
    if hasattr(processor.video_processor, "cap_pixels_per_frame"):
        kwargs["cap_pixels_per_frame"] = False
    return kwargs


def vision_kwargs(features: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Arguments that pass precomputed `lmm_qa.model.inputs.vision_features` to a model's forward, instead of pixels.

    They are shaped like the output of `get_video_features`: https://github.com/huggingface/transformers/pull/45783
    """
    layers = [(layer,) for layer in features["deepstack"]] if "deepstack" in features else None
    video = SimpleNamespace(pooler_output=(features["tokens"],), deepstack_features=layers)
    return {"mm_encoder_outputs": {"video": video}}


def position_ids(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Positions of the tokens of prepared inputs, as the model's forward would compute them.

    Returns:
        (3, B, tokens) for a model with M-RoPE (time, height, width), else (B, tokens).
    """
    rope = next((module for module in model.modules() if hasattr(module, "get_rope_index")), None)
    if rope is None:
        return inputs["attention_mask"].cumsum(-1) - 1
    positions: torch.Tensor = rope.get_rope_index(**inputs)[0]
    return positions


def load_saved_weights(model: Any, folder: str) -> None:
    """Load weights that the model's `save_pretrained` wrote.

    It saves some architectures (Qwen2-VL) under the parameter names of their first release. `from_pretrained` renames
    them, `Trainer` does not: https://github.com/huggingface/transformers/issues/43701
    """
    saved: Any = type(model)
    model.load_state_dict(saved.from_pretrained(folder, dtype=model.dtype).state_dict())


def caches_every_token(config: Any) -> bool:
    """Whether the KV cache of a model holds every token: no layer has a sliding window or a recurrent state.

    transformers gives such layers other classes of cache.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


def skip_patterns(modules: Sequence[str]) -> list[str]:
    """`llm_int8_skip_modules` for modules anywhere in a model.

    transformers 5 matches from the start of the full name: https://github.com/huggingface/transformers/pull/42455
    """
    return [rf"(?:.*\.)?{name}" for name in modules]
