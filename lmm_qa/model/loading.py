"""TODO-DOC model.loading."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch

from lmm_qa.errors import ModelError

if TYPE_CHECKING:
    pass


Quantization = Literal["4bit", "8bit"]


Dtype = Literal["float32", "bfloat16", "float16"]


class LoadOptions(TypedDict, total=False):
    """How weights are loaded; every key is optional."""

    revision: str | None
    """Branch, tag or commit of a model on the Hugging Face hub."""
    quantization: Quantization | None
    """`4bit` (NF4) or `8bit` weights of the language model, by bitsandbytes. Saves memory, not time."""
    device: str | None
    """`cuda`, `cuda:1`, `mps` or `cpu`; see `choose_device`."""
    dtype: Dtype | None
    """See `choose_dtype`."""
    trust_remote_code: bool
    """Run Python code that comes with the model. Only for authors you trust."""


UNQUANTIZED = ["visual", "vision_tower", "multi_modal_projector", "lm_head"]


"""Modules that stay in full precision: small beside the language model, and the pixels go through them."""


@dataclass(frozen=True)
class RuntimeChoice:
    """Something chosen at run time, and why; printed once."""

    value: str
    reason: str

    def __str__(self) -> str:
        return f"{self.value} ({self.reason})"


def choose_device(device: str | None = None) -> RuntimeChoice:
    """The asked device, or the best one that is here.

    Raises:
        ModelError: the device that was asked for is not here.
    """
    if device is not None:
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"device {device!r} cannot be used here: {reason}. Try --device cpu") from None
        return RuntimeChoice(device, "as asked")
    if torch.cuda.is_available():
        return RuntimeChoice("cuda", torch.cuda.get_device_name())
    if torch.backends.mps.is_available():
        return RuntimeChoice("mps", "Apple GPU")
    return RuntimeChoice("cpu", "no GPU found")


def choose_dtype(device: str, dtype: Dtype | None = None) -> RuntimeChoice:
    """The asked number format, or the one that suits the device."""
    if dtype is not None:
        return RuntimeChoice(dtype, "as asked")
    if device.startswith("cuda"):
        if torch.cuda.get_device_capability(device)[0] >= 8:
            return RuntimeChoice("bfloat16", "GPU of the Ampere generation or newer")
        return RuntimeChoice("float16", "GPU older than Ampere: no bfloat16")
    return RuntimeChoice("float32", f"exact, and what {device} does reliably")


def choose_attention(device: str, dtype: str) -> RuntimeChoice:
    """flash-attn where it can run, else PyTorch's scaled dot product attention; never `eager`."""
    if not device.startswith("cuda"):
        return RuntimeChoice("sdpa", f"on {device}")
    from transformers.utils.import_utils import is_flash_attn_2_available

    if not is_flash_attn_2_available():
        return RuntimeChoice("sdpa", "flash-attn is not installed")
    if dtype == "float32":
        return RuntimeChoice("sdpa", "flash-attn does not calculate in float32")
    return RuntimeChoice("flash_attention_2", "flash-attn is installed")


def load_processor(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The processor of a model, from a directory or the hub, set to pad on the left.

    Raises:
        ModelError: there is none, or it takes no videos.
    """
    from transformers import AutoProcessor

    try:
        load: Any = AutoProcessor.from_pretrained
        processor = load(model, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelError(f"cannot load the processor of {model!r}: {_first_line(error)}") from error
    if getattr(processor, "video_processor", None) is None:
        raise ModelError(f"{model!r} takes no videos: its processor {type(processor).__name__} has no video processor")
    processor.tokenizer.padding_side = "left"  # so that the last position is the stem's end in every row
    return processor


@dataclass(frozen=True)
class Memory:
    """What a model takes, in bytes; an estimate from its configuration."""

    parameters: int
    """Their number."""
    weights: int
    """Bytes of the weights."""
    clip: int
    """Bytes that one more clip in a batch takes during the prefill."""


def estimate_memory(
    model: str,
    tokens: int,
    dtype: str,
    quantization: Quantization | None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Memory:
    """Estimate memory from the configuration alone: no weights are read.

    A clip takes what one layer of the language model holds at once (hidden states in and out, queries, keys, values,
    and the three products of the gated MLP) and its pixels; nothing is kept for a backward pass.

    Args:
        tokens: of one clip's prefill.

    Raises:
        ModelError: the configuration cannot be loaded.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            build: Any = AutoModelForImageTextToText.from_config
            empty = build(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelError(f"cannot read the configuration of {model!r}: {_first_line(error)}") from error
    number = getattr(torch, dtype).itemsize
    small = {"4bit": 0.56, "8bit": 1.0, None: number}[quantization]  # NF4 in blocks of 64 with float32 scales
    linear = sum(part.weight.numel() for name, part in empty.named_modules()
                 if isinstance(part, torch.nn.Linear) and not any(word in name for word in UNQUANTIZED))  # fmt: skip
    parameters = sum(parameter.numel() for parameter in empty.parameters())
    text = config.get_text_config()
    layer = (6 * text.hidden_size + 3 * text.intermediate_size) * number
    pixels = 28 * 28 * 2 * 3 * 4 * 2  # float32 patches of a token, once as made and once as moved
    return Memory(parameters, int(linear * small + (parameters - linear) * number), tokens * (layer + pixels))


def _bitsandbytes(quantization: Quantization, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    config: Any = BitsAndBytesConfig
    kept = [rf"(?:.*\.)?{name}" for name in UNQUANTIZED]  # transformers matches from the start of a module's full name
    if quantization == "8bit":
        return config(load_in_8bit=True, llm_int8_skip_modules=kept)
    return config(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
