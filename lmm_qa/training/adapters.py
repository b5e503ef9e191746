"""Select the weights that are trained: add adapters or unfreeze weights, and freeze everything else."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from lmm_qa.model import compat
from lmm_qa.training.config import TrainingConfig, TuningConfig

# Names of a model's modules, by component; the merger is often inside the vision tower.
MERGER = re.compile(r"merger|multi_modal_projector|connector")
VISION = re.compile(r"(^|\.)(visual|vision_tower|vision_model)\.")
AUDIO = re.compile(r"(^|\.)audio_tower\.")
LANGUAGE = re.compile(r"(^|\.)language_model\.")


def component(name: str) -> str | None:
    """The component that a module or parameter belongs to: language, vision, merger, or audio (never trained)."""
    if AUDIO.search(name):
        return "audio"
    if MERGER.search(name):
        return "merger"
    if VISION.search(name):
        return "vision"
    return "language" if LANGUAGE.search(name) else None


def trained_components(tuning: TuningConfig) -> set[str]:
    """The components whose weights are trained."""
    return {"language"} | {part for part in ("vision", "merger") if getattr(tuning, part)}


def trainable_model(model: Any, config: TrainingConfig) -> Any:
    """The model with its trainable weights set up: a PEFT model for `lora`, the same model for `full`."""
    components = trained_components(config.tuning)
    if config.tuning.method == "full":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_((component(name) or "language") in components)
    else:
        model = _with_adapters(model, config, components)
    if config.training.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        # It makes the outputs of all input embeddings require gradients, those of the vision tower included: even a
        # frozen tower would then keep its activations and get a backward pass. Only reentrant checkpointing needs that.
        model.disable_input_require_grads()
    return model


def _with_adapters(model: Any, config: TrainingConfig, components: set[str]) -> Any:
    # Without peft.prepare_model_for_kbit_training, which casts everything that is not quantized to float32. Before
    # activation checkpointing is enabled: PEFT would make input embeddings require gradients once more.
    from peft import LoraConfig, get_peft_model

    with compat.ignore_peft_deprecation():
        lora = LoraConfig(
            r=config.tuning.r,
            lora_alpha=config.tuning.lora_alpha,
            lora_dropout=config.tuning.lora_dropout,
            target_modules=lora_targets(model, components),
            task_type="CAUSAL_LM",
            revision=config.model.revision,
        )
        torch.manual_seed(config.training.seed)
        return get_peft_model(model, lora)


def lora_targets(model: Any, components: set[str]) -> str | list[str]:
    """The linear layers of these components, as PEFT's `target_modules` takes them: a regular expression for names.

    For a mixture of experts the names themselves: of a regular expression PEFT 0.21 would keep only the last parts of
    the names that it matches, such as q_proj, which other components have too. The experts are no linear layers, and
    are not adapted.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen = [name for name in linear if component(name) in components]
    if hasattr(model.config.get_text_config(), "num_experts"):
        return chosen
    return "|".join(dict.fromkeys(re.sub(r"\.\d+(?=\\\.)", r".\\d+", re.escape(name)) for name in chosen))
