"""Which weights are trained: adapters put on, or weights set free; the rest frozen."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from torch import nn

from lmm_qa.training.config import Recipe, Tuning

MERGER = re.compile(r"merger|multi_modal_projector|connector")


VISION = re.compile(r"(^|\.)(visual|vision_tower|vision_model)\.")


LANGUAGE = re.compile(r"(^|\.)language_model\.")


"""Names of a model's modules, by part; the merger often lies inside the vision tower."""


def part_of(name: str) -> str | None:
    """The part of the model that a module or weight belongs to: language, vision or merger."""
    if MERGER.search(name):
        return "merger"
    if VISION.search(name):
        return "vision"
    return "language" if LANGUAGE.search(name) else None


def tuned_parts(tuning: Tuning) -> set[str]:
    """The parts whose weights are trained."""
    return {"language"} | {part for part in ("vision", "merger") if getattr(tuning, part)}


def tunable(model: Any, recipe: Recipe) -> Any:
    """The model as it is trained: for `lora` a PEFT model, for `full` the same one."""
    tuning, parts = recipe.tuning, tuned_parts(recipe.tuning)
    if recipe.training.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if tuning.method == "full":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_((part_of(name) or "language") in parts)
        return model
    from peft import LoraConfig, get_peft_model  # not its preparation of quantized models, which blows up the rest

    with warnings.catch_warnings():
        # PEFT 0.21 asks by a name that transformers 5.23 has given up: nothing for our users.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        config = LoraConfig(
            r=tuning.r,
            lora_alpha=tuning.alpha,
            lora_dropout=tuning.dropout,
            target_modules=adapter_targets(model, parts),
            task_type="CAUSAL_LM",
            revision=recipe.model.revision,
        )
        torch.manual_seed(recipe.training.seed)
        return get_peft_model(model, config)


def adapter_targets(model: nn.Module, parts: set[str]) -> str:
    """A regular expression for the linear layers of these parts, as PEFT takes it."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen = [re.escape(name) for name in linear if part_of(name) in parts]
    return "|".join(dict.fromkeys(re.sub(r"\.\d+(?=\\\.)", r".\\d+", name) for name in chosen))
