"""Load a model with its processor and adapter; choose device, dtype and attention; estimate memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import torch

from lmm_qa.errors import ModelError, first_line
from lmm_qa.model import compat
from lmm_qa.model.chat_template import check_chat_template
from lmm_qa.model.hub import find_model
from lmm_qa.model.memory import free_memory
from lmm_qa.model.onednn import bfloat16_is_faster
from lmm_qa.model.source import EMBEDDED
from lmm_qa.model.weights import (
    DOWNLOAD_AGAIN,
    check_checkpoint,
    check_files,
    check_loaded,
    count_stored_parameters,
    load_adapter,
    stored_quantization,
)

Quantization = Literal["4bit", "8bit"]

Dtype = Literal["float32", "bfloat16", "float16"]

MAX_FLOAT32_PARAMETERS = 500_000_000
"""A CPU computes in float32 up to this size, and in bfloat16 above it: 2 GB of weights."""

BFLOAT16_VISION = "vision tower"
"""Name of the choice to round the factors of the vision tower's products to bfloat16. For the embedded rater, whose
scores hardly depend on it; those of a model that was tuned and calibrated in float32 may."""

MARGIN = 1.05
"""Memory for loading a model, relative to its weights."""

UNQUANTIZED = ("visual", "vision_tower", "audio_tower", "multi_modal_projector", "lm_head", "in_proj_a", "in_proj_b")
"""Modules that are never quantized: small compared with the language model, and sensitive because pixels pass through
them. The last two are the gates of Qwen3.5's linear attention, one number per head: on a CPU, bitsandbytes needs a
multiple of 32 for 4 bit."""


class LoadOptions(TypedDict, total=False):
    """How weights are loaded; every key is optional."""

    revision: str | None
    """Branch, tag or commit of a model on the Hugging Face hub."""
    quantization: Quantization | Literal["none"] | None
    """`4bit` (NF4) or `8bit` weights of the language model, by bitsandbytes. Saves memory, not time. `none`: as the
    checkpoint is stored, like None, but also for a rater that was tuned with quantized weights."""
    device: str | None
    """`cuda`, `cuda:1`, `mps` or `cpu`; see `choose_device`."""
    dtype: Dtype | None
    """See `choose_dtype`."""
    trust_remote_code: bool
    """Run Python code that comes with the model. Only for authors you trust."""


@dataclass(frozen=True)
class Choice:
    """A value chosen at run time, with the reason."""

    value: str
    reason: str

    def __str__(self) -> str:
        return f"{self.value} ({self.reason})"


@dataclass(frozen=True)
class LoadedModel:
    """What `load_model` returns."""

    model: Any
    """A transformers model, or a PEFT model around it."""
    processor: Any
    choices: dict[str, Choice]
    """Device, dtype, attention and quantization."""


def load_model(model: str, adapter: Path | None = None, **options: Unpack[LoadOptions]) -> LoadedModel:
    """Load weights (safetensors only) and processor from a directory or the hub.

    Args:
        model: directory or hub id of a transformers image-text-to-text model.
        adapter: directory of a PEFT adapter for it.
        options: see `LoadOptions`.

    Raises:
        ModelError: weights, processor or adapter cannot be loaded.
    """
    from transformers import AutoModelForImageTextToText

    processor = load_processor(model, **options)  # first, because it is fast and the weights are not
    device = choose_device(options.get("device"))
    dtype = choose_model_dtype(model, **options)
    attention = choose_attention(device.value, dtype.value)
    quantization = requested_quantization(options)
    choices = {"device": device, "dtype": dtype, "attention": attention}
    exact = device.value != "cpu" or dtype.value != "float32" or options.get("dtype") is not None
    if adapter == EMBEDDED and not exact and bfloat16_is_faster():
        choices[BFLOAT16_VISION] = Choice("bfloat16 products", "on this cpu; --dtype float32 is exact")
    kwargs = _hub_kwargs(model, options)
    config = read_config(model, **options)
    if quantization:
        if Path(model).is_dir() and (method := stored_quantization(Path(model))):
            raise ModelError(f"{model!r} is quantized already ({method}): load it without --quantization")
        _check_bitsandbytes(quantization, device.value)
        choices["quantization"] = Choice(quantization, "requested")
        kwargs["quantization_config"] = _bitsandbytes_config(quantization, getattr(torch, dtype.value))
    check_memory(model, **options)
    try:
        load: Any = AutoModelForImageTextToText.from_pretrained
        loaded, info = load(
            model,
            config=config,
            dtype=getattr(torch, dtype.value),
            attn_implementation=attention.value,
            device_map={"": device.value},
            use_safetensors=True,
            output_loading_info=True,
            **kwargs,
        )
    except Exception as error:  # transformers, safetensors and the hub raise a dozen classes
        check_loaded(repr(model), _missing_if_quantized(model, kwargs), advice=DOWNLOAD_AGAIN)
        raise ModelError(f"cannot load the model {model!r}: {first_line(error)}") from error
    check_checkpoint(model, info)
    compat.add_logits_to_keep(loaded)
    if dtype.value == "float32":
        torch.backends.cudnn.allow_tf32 = False  # on, the convolution of patches moves scores by up to 0.001
    stored = getattr(loaded.config, "quantization_config", None)
    if stored is not None and not quantization:
        choices["quantization"] = Choice(_method(stored), "as the checkpoint is stored")
        _cast_unquantized(loaded, getattr(torch, dtype.value))
    if adapter is not None:
        check_files(adapter)
        try:
            loaded = load_adapter(loaded, adapter)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"cannot load the adapter {adapter} for {model!r}: {first_line(error)}") from error
    return LoadedModel(loaded, processor, choices)


def load_processor(model: str, **options: Unpack[LoadOptions]) -> Any:
    """Load the processor of a model from a directory or the hub. Its tokenizer pads on the left.

    Raises:
        ModelError: the model has none, or it does not accept videos.
    """
    from transformers import AutoProcessor

    kwargs = _hub_kwargs(model, options)
    try:
        load: Any = AutoProcessor.from_pretrained
        processor = load(model, **kwargs)
    except Exception as error:
        raise ModelError(f"cannot load the processor of {model!r}: {first_line(error)}") from error
    if getattr(processor, "video_processor", None) is None:
        raise ModelError(
            f"{model!r} does not accept videos: its processor {type(processor).__name__} has no video processor"
        )
    if not processor.tokenizer.encode("video"):
        raise ModelError(
            f"the tokenizer of {model!r} has no vocabulary: tokenizer.json, or vocab.json and merges.txt, are missing"
        )
    if processor.chat_template is None:  # older checkpoints store it in tokenizer_config.json
        processor.chat_template = processor.tokenizer.chat_template
    if processor.chat_template is None:
        raise ModelError(f"{model!r} has no chat template: chat_template.jinja is missing")
    check_chat_template(processor, model)
    processor.tokenizer.padding_side = "left"  # the last position of every row is then the end of the stem
    return processor


def choose_device(device: str | None = None) -> Choice:
    """The requested device, or else the fastest available one.

    Raises:
        ModelError: the requested device is not available.
    """
    if device is not None:
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"device {device!r} cannot be used here: {reason}. Try --device cpu") from None
        return Choice(device, "requested")
    if torch.cuda.is_available():
        return Choice("cuda", torch.cuda.get_device_name())
    if torch.backends.mps.is_available():
        return Choice("mps", "Apple GPU")
    return Choice("cpu", "no GPU found")


def choose_dtype(device: str, dtype: Dtype | None = None, parameters: int = 0) -> Choice:
    """The requested dtype, or else the one that suits the device.

    Args:
        parameters: of the model; only asked for on a CPU.
    """
    if dtype is not None:
        return Choice(dtype, "requested")
    if device.startswith("cuda"):
        if is_ampere_or_newer(device):
            return Choice("bfloat16", "Ampere GPU or newer")
        return Choice("float16", "GPU older than Ampere: no bfloat16")
    if device.startswith("cpu") and parameters > MAX_FLOAT32_PARAMETERS:
        return Choice("bfloat16", f"{parameters / 1e9:.1f} billion parameters: half the memory of float32")
    return Choice("float32", f"exact, and reliable on {device}")


def choose_model_dtype(model: str, **options: Unpack[LoadOptions]) -> Choice:
    """The dtype that a model will be loaded in; see `choose_dtype`.

    Raises:
        ModelError: the device is not available; or the size of the model is needed, and cannot be found out.
    """
    device, dtype = choose_device(options.get("device")).value, options.get("dtype")
    needs_size = dtype is None and device.startswith("cpu")
    return choose_dtype(device, dtype, count_parameters(model, **options) if needs_size else 0)


def count_parameters(model: str, **options: Unpack[LoadOptions]) -> int:
    """Number of parameters of a checkpoint: from the headers of its weight files, from the hub, or from its config.

    Raises:
        ModelError: the configuration cannot be loaded, and it is needed.
    """
    folder = Path(model)
    if not folder.is_dir():
        found = find_model(model, options.get("revision"))
        if found.parameters:
            return found.parameters
        folder = found.cached_folder
    stored = count_stored_parameters(folder)
    return stored or sum(parameter.numel() for parameter in empty_model(model, **options).parameters())


def choose_attention(device: str, dtype: str) -> Choice:
    """flash-attn where it can run, else PyTorch's scaled dot product attention; never `eager`."""
    if not device.startswith("cuda"):
        return Choice("sdpa", f"on {device}")
    from transformers.utils.import_utils import is_flash_attn_2_available

    if not is_flash_attn_2_available():
        return Choice("sdpa", "flash-attn is not installed")
    if dtype == "float32":
        return Choice("sdpa", "flash-attn does not support float32")
    if not is_ampere_or_newer(device):
        return Choice("sdpa", "flash-attn needs an Ampere GPU or newer")
    return Choice("flash_attention_2", "flash-attn is installed")


def is_ampere_or_newer(device: str) -> bool:
    """Whether a CUDA device has compute capability 8.0: it computes in bfloat16, and FlashAttention-2 runs on it."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory that a model needs, estimated from its configuration."""

    parameters: int
    """Number of parameters."""
    weights: int
    """Bytes of the weights."""
    clip: int
    """Bytes for each clip of a batch during the prefill."""
    cache: int
    """Bytes of the KV cache of each clip, which is held while questions about its defects are asked; 0 if each question
    processes the clip again."""


def estimate_memory(model: str, tokens: int, **options: Unpack[LoadOptions]) -> MemoryEstimate:
    """Estimate memory without reading weights.

    A clip needs what one layer of the language model holds at a time (input and output, queries, keys, values, and the
    three products of the gated MLP) and its pixels; nothing is stored for a backward pass.

    Args:
        model: directory or hub id.
        tokens: length of one clip's prefill.
        options: see `LoadOptions`; without a dtype, the one that `choose_model_dtype` returns.

    Raises:
        ModelError: the configuration cannot be loaded.
    """
    empty = empty_model(model, **options)
    itemsize = getattr(torch, choose_model_dtype(model, **options).value).itemsize
    quantized = {"4bit": 0.5 + 4 / 64, "8bit": 1.0}  # NF4 stores a float32 scale per block of 64 weights
    stored = getattr(empty.config, "quantization_config", None)
    method = requested_quantization(options) or (_method(stored) if stored is not None else None)
    linear_itemsize = quantized.get(method, 1.0) if method else itemsize
    linear = sum(
        module.weight.numel()
        for name, module in empty.named_modules()
        if isinstance(module, torch.nn.Linear) and not any(part in name for part in UNQUANTIZED)
    )
    parameters = sum(parameter.numel() for parameter in empty.parameters())
    text = empty.config.get_text_config()
    layer = (6 * text.hidden_size + 3 * text.intermediate_size) * itemsize
    pixels = 28 * 28 * 2 * 3 * 4 * 2  # float32 patches of one token, and their copy on the device
    weights = int(linear * linear_itemsize + (parameters - linear) * itemsize)
    shared = compat.caches_every_token(empty.config)
    cache = tokens * cache_bytes(empty.config, itemsize) if shared else 0
    return MemoryEstimate(parameters, weights, tokens * (layer + pixels), cache)


def cache_bytes(config: Any, itemsize: int) -> int:
    """Bytes that the KV cache of a model takes for each token.

    Args:
        config: of a transformers model.
        itemsize: bytes of a number in the cache.
    """
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    layers = sum(kind != "linear_attention" for kind in kinds)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * layers * heads * width * itemsize)


def check_memory(model: str, **options: Unpack[LoadOptions]) -> None:
    """Refuse to load a model that does not fit into the memory that is free on its device.

    Raises:
        ModelError: it does not; the message has both sizes, and the options with which it would fit.
    """
    device, dtype = choose_device(options.get("device")).value, choose_model_dtype(model, **options).value
    free = free_memory(device)
    if MARGIN * count_parameters(model, **options) * getattr(torch, dtype).itemsize <= free:
        return  # whatever is quantized takes less

    def needed(**changes: Any) -> float:
        return MARGIN * estimate_memory(model, 0, **{**options, "dtype": dtype, **changes}).weights

    size = needed()
    if size <= free:
        return
    changes = {"--dtype bfloat16": {"dtype": "bfloat16"}, "--quantization 4bit": {"quantization": "4bit"}}
    sizes = {option: needed(**change) for option, change in changes.items()}
    fitting = [f"{option} ({bytes_ / 1e9:.1f} GB), " for option, bytes_ in sizes.items() if bytes_ <= free]
    raise ModelError(
        f"{model!r} does not fit into memory: in {dtype} it needs {size / 1e9:.1f} GB on {device}, where "
        f"{free / 1e9:.1f} GB are free. Use {''.join(fitting)}a smaller model, or one that is served elsewhere "
        "(--model http://HOST:PORT/v1)"
    )


def empty_model(model: str, **options: Unpack[LoadOptions]) -> Any:
    """The model on the meta device: all modules and shapes, no weights.

    Raises:
        ModelError: the configuration cannot be loaded.
    """
    from transformers import AutoModelForImageTextToText

    config = read_config(model, **options)
    try:
        with torch.device("meta"):
            build: Any = AutoModelForImageTextToText.from_config
            return build(config, trust_remote_code=options.get("trust_remote_code", False))
    except Exception as error:
        raise ModelError(f"cannot load the configuration of {model!r}: {first_line(error)}") from error


def read_config(model: str, **options: Unpack[LoadOptions]) -> Any:
    """The transformers configuration of the model that rates; of an Omni model that is its thinker.

    Raises:
        ModelError: it cannot be loaded.
    """
    from transformers import AutoConfig

    try:
        return compat.thinker_config(AutoConfig.from_pretrained(model, **_hub_kwargs(model, options)))
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"cannot load the configuration of {model!r}: {first_line(error)}") from error


def _hub_kwargs(model: str, options: LoadOptions) -> dict[str, Any]:
    """The arguments that every `from_pretrained` of transformers takes.

    If the hub cannot be reached, only its local cache is used: transformers would try each of a dozen files for 23 s.
    """
    kwargs = {"revision": options.get("revision"), "trust_remote_code": options.get("trust_remote_code", False)}
    if Path(model).is_dir():
        check_files(Path(model))
    else:
        found = find_model(model, options.get("revision"))
        kwargs |= {"revision": found.commit, "local_files_only": found.unreachable is not None}
    return kwargs


def requested_quantization(options: LoadOptions) -> Quantization | None:
    """The quantization of the options without `none`."""
    quantization = options.get("quantization")
    return None if quantization == "none" else quantization


def _check_bitsandbytes(quantization: Quantization, device: str) -> None:
    """Raise ModelError if quantized weights cannot be used on the device."""
    try:
        import bitsandbytes

        supported = sorted(bitsandbytes.supported_torch_devices)
    except (ImportError, OSError, RuntimeError) as error:
        reason = f"bitsandbytes cannot be imported ({first_line(error)})"
    else:
        if torch.device(device).type in supported:
            return
        reason = f"bitsandbytes {bitsandbytes.__version__} supports {', '.join(supported)}"
    raise ModelError(
        f"weights in {quantization} cannot be used on {device}: {reason}. Choose another --device, or --quantization "
        f"none: a rater that was tuned in {quantization} then gives slightly different scores"
    )


def _bitsandbytes_config(quantization: Quantization, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    config: Any = BitsAndBytesConfig
    skipped = compat.skip_patterns(UNQUANTIZED)
    if quantization == "8bit":
        return config(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return config(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,
    )


def _missing_if_quantized(model: str, kwargs: dict[str, Any]) -> set[str]:
    """Tensors that a checkpoint stored quantized lacks; found by reading it as if it were not quantized.

    Quantized loading fails on such a checkpoint, with an error that does not name them.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    load: Any = AutoModelForImageTextToText.from_pretrained
    options = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        config = compat.thinker_config(AutoConfig.from_pretrained(model, **kwargs))
        if getattr(config, "quantization_config", None) is None:
            return set()
        del config.quantization_config
        missing: set[str] = load(model, config=config, **options, **kwargs)[1]["missing_keys"]
    except Exception:  # the first error is reported
        return set()
    return missing


def _method(stored: Any) -> str:
    """Name of a checkpoint's quantization: `4bit`, `8bit`, or the method if it is not bitsandbytes."""
    config = stored if isinstance(stored, dict) else stored.to_dict()
    bits = next((name for name in ("4bit", "8bit") if config.get(f"load_in_{name}")), None)
    return bits or str(getattr(config["quant_method"], "value", config["quant_method"]))


def _cast_unquantized(model: Any, dtype: torch.dtype) -> None:
    """Cast what is not quantized in a checkpoint that is: transformers leaves it as it is stored."""
    plain = (torch.float32, torch.bfloat16, torch.float16)
    for module in model.modules():
        if hasattr(module, "compute_dtype"):  # bitsandbytes' Linear4bit
            module.compute_dtype, module.compute_type_is_set = dtype, True
        parameters = list(module.parameters(recurse=False))
        tensors = [*parameters, *module.buffers(recurse=False)]
        # Packed 4-bit weights can have a plain dtype as well.
        if all(tensor.dtype in plain and not hasattr(tensor, "quant_state") for tensor in tensors):
            for parameter in parameters:
                parameter.data = parameter.data.to(dtype)
