"""Compare the tensors of a checkpoint or adapter with those that the model needs.

transformers and PEFT fill missing tensors with random numbers and ignore tensors that they have no place for. Either
would give a score that is not the model's, so both are errors here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lmm_qa.errors import ModelError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"

HARMLESS = re.compile(r"rotary_emb\.inv_freq$|\.position_ids$|\.rotary_emb\.(cos|sin)_cached$")
"""Buffers that older versions of transformers stored, and that a model computes itself."""

PLAIN_DTYPES = {"F64", "F32", "F16", "BF16"}

LFS_POINTER = b"version https://git-lfs.github.com/spec/"

NAMES_SHOWN = 3

DOWNLOAD_AGAIN = "Download or export the checkpoint again, complete, with the config.json that belongs to it"


def check_loaded(
    what: str,
    missing: Collection[str] = (),
    unexpected: Collection[str] = (),
    mismatched: Collection[str] = (),
    advice: str = "",
) -> None:
    """Refuse weights that do not fit the model exactly.

    Args:
        what: the checkpoint, for the message.
        missing: tensors that the model needs and the checkpoint lacks, without tied ones.
        unexpected: tensors that the model has no place for; those that match `HARMLESS` are ignored.
        mismatched: tensors whose shape is not the model's.
        advice: what the user can do.

    Raises:
        ModelError: there are any; the message has their number and the first names.
    """
    unexpected = [name for name in unexpected if not HARMLESS.search(name)]
    groups = {"missing": missing, "unexpected": unexpected, "of another shape": mismatched}
    found = [f"{len(names)} {kind} ({_first_names(names)})" for kind, names in groups.items() if names]
    if found:
        raise ModelError(f"the tensors of {what} do not fit the model: {'; '.join(found)}. {advice}".rstrip())


def check_checkpoint(model: str, info: Mapping[str, Any]) -> None:
    """Check the loading info of a transformers model (`output_loading_info=True`).

    Raises:
        ModelError: tensors are missing, unexpected or of another shape.
    """
    if info.get("error_msgs"):
        raise ModelError(f"the tensors of {model!r} do not fit the model: {info['error_msgs'][0]}")
    shapes = [f"{name}: {list(stored)} instead of {list(needed)}" for name, stored, needed in info["mismatched_keys"]]
    check_loaded(repr(model), info["missing_keys"], info["unexpected_keys"], shapes, DOWNLOAD_AGAIN)


def load_saved_weights(model: Any, folder: str) -> None:
    """Load weights that the model's `save_pretrained` wrote, as a training run does when it resumes.

    It saves some architectures (Qwen2-VL) under the parameter names of their first release. `from_pretrained` renames
    them, `Trainer` does not: https://github.com/huggingface/transformers/issues/43701

    Raises:
        ModelError: tensors are missing, unexpected or of another shape.
    """
    saved: Any = type(model)
    loaded, info = saved.from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    check_checkpoint(folder, info)
    model.load_state_dict(loaded.state_dict())


def load_adapter(model: Any, adapter: Path) -> Any:
    """Put a PEFT adapter around a model, and check that every tensor of the file found its place.

    An adapter with the module names from before transformers 4.52 is loaded under today's names.

    Raises:
        ModelError: tensors are missing, unexpected or of another shape.
        Exception: PEFT refuses the adapter.
    """
    from lmm_qa.model import compat

    quantized = getattr(model.config, "quantization_config", None) is not None
    with nullcontext() if quantized else compat.without_bitsandbytes():
        return _load_adapter(model, adapter)


def _load_adapter(model: Any, adapter: Path) -> Any:
    from peft import PeftConfig, PeftType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    from lmm_qa.model import compat

    file = adapter / ADAPTER_WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(f"it has no {ADAPTER_WEIGHTS}: copy it there, or save the adapter again")
    tensors = load_file(file)
    config: Any = PeftConfig.from_pretrained(str(adapter))
    if config.peft_type == PeftType.PREFIX_TUNING:
        raise ModelError(
            f"the adapter {adapter} is of the kind {config.peft_type.value}, which does not work with videos: use one "
            "that changes weights, such as LoRA"
        )
    config.inference_mode = True
    config.base_model_name_or_path = model.name_or_path  # a rater's adapter is loaded from where rater.json says
    renames = compat.old_module_names([name for name, _ in model.named_modules()], tensors)
    if renames:
        tensors = {compat.rename_tensor(name, renames): tensor for name, tensor in tensors.items()}
        compat.rename_targets(config, renames)
    with compat.ignore_peft_deprecation():
        wrapped: Any = get_peft_model(model, config)
        needed = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        shapes = [
            f"{name}: {list(tensor.shape)} instead of {list(needed[name].shape)}"
            for name, tensor in tensors.items()
            if name in needed and tensor.shape != needed[name].shape
        ]
        missing, unexpected = needed.keys() - tensors.keys(), tensors.keys() - needed.keys()
        if not shapes and not missing:
            loaded: Any = set_peft_model_state_dict(wrapped, tensors)
            # Embeddings can be stored with an adapter. PEFT adds its name for an adapter, "default", to some names.
            unexpected &= {re.sub(r"\.default(?=\.|$)", "", name) for name in loaded.unexpected_keys}
    advice = "Use the base model and the adapter_config.json that it was trained with"
    check_loaded(f"the adapter {adapter}", missing, unexpected, shapes, advice)
    return wrapped


def is_identity(adapter: Path) -> bool:
    """Whether a LoRA adapter changes nothing, because all of its B matrices are zero."""
    try:
        with safe_open(adapter / ADAPTER_WEIGHTS, "pt") as file:
            names = [name for name in file.keys() if ".lora_A." not in name]  # noqa: SIM118 (not a dict)
            return all(".lora_B." in name and not file.get_tensor(name).any() for name in names)
    except (OSError, SafetensorError):  # loading it says what is wrong
        return False


def check_files(folder: Path) -> None:
    """Refuse a directory whose files are Git LFS pointers, or whose weights are not quantized as config.json says.

    Raises:
        ModelError: names the file and what to do.
    """
    for file in sorted(file for kind in ("*.safetensors", "*.json", "*.jinja") for file in folder.glob(kind)):
        with file.open("rb") as stream:
            if stream.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ModelError(
                    f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` in {folder}, or download it"
                )
    method = stored_quantization(folder)
    weights = sorted(folder.glob("model*.safetensors"))
    if method and weights and all(_is_plain(file) for file in weights):
        raise ModelError(
            f"{folder / 'config.json'} declares weights quantized with {method}, but they are not quantized: remove "
            "quantization_config from it, or use the weights that belong to it"
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model in a directory: those of its index, one model.safetensors, or else all.

    Some checkpoints come with the same weights in further files, for other libraries.
    """
    index = folder / WEIGHTS_INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def count_stored_parameters(folder: Path) -> int:
    """Number of weights in a directory, from the headers of its files; 0 if they are absent or cannot be read."""
    count = 0
    try:
        for file in weight_files(folder):
            with safe_open(file, "pt") as tensors:
                names = tensors.keys()
                count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
    except (OSError, ValueError, KeyError, SafetensorError):  # loading it says what is wrong
        return 0
    return count


def stored_quantization(folder: Path) -> str | None:
    """The quantization method that the config.json in a directory declares."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return str(config["quantization_config"]["quant_method"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_plain(file: Path) -> bool:
    try:
        with safe_open(file, "pt") as tensors:
            names = tensors.keys()
            return all(tensors.get_slice(name).get_dtype() in PLAIN_DTYPES for name in names)
    except (OSError, SafetensorError):  # loading it says what is wrong
        return False


def _first_names(names: Collection[str]) -> str:
    shown = sorted(names)[:NAMES_SHOWN]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "")
