"""Workarounds for particular versions of transformers and PEFT, each with its reason.

Everything that depends on an interface which these libraries do not promise to keep is here, so that an upgrade is
checked by reading one file. Written for transformers 5.23 and PEFT 0.21.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.nn import functional


@contextmanager
def ignore_peft_deprecation() -> Iterator[None]:
    """Hide a FutureWarning that users can do nothing about.

    PEFT 0.21 reads `is_gradient_checkpointing`, which transformers 5.23 renamed to `is_activation_checkpointing`.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """Keep PEFT from importing bitsandbytes, which it needs only for quantized weights.

    PEFT 0.21 imports it wherever it is installed, and that imports PyTorch's compiler: 1.5 s, a fifth of the time in
    which `lmm-qa rate` rates one clip. It can be imported afterwards.
    """
    if "bitsandbytes" in sys.modules:
        yield
        return
    from transformers.utils.import_utils import is_bitsandbytes_available

    is_bitsandbytes_available()  # transformers stores the answer, which should not be that of the next lines
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # Python's way to make an import fail
    try:
        yield
    finally:
        sys.modules.pop("bitsandbytes", None)
        from peft import import_utils

        import_utils.is_bnb_available.cache_clear()
        import_utils.is_bnb_4bit_available.cache_clear()


def frame_kwargs(processor: Any, frames: str, resize: bool) -> dict[str, Any]:
    """Arguments by which a processor makes one input of each frame of a `video`, or of `images`: no tiles.

    Args:
        resize: whether the processor resizes the frames.
    """
    kwargs = {} if resize else {"do_resize": False}
    # The Qwen-VL processors warn unless this is set, even if they do not resize:
    # https://github.com/huggingface/transformers/pull/48071
    if frames == "video" and not resize and hasattr(processor.video_processor, "cap_pixels_per_frame"):
        kwargs["cap_pixels_per_frame"] = False
    # InternVL's processor cuts images into up to 12 tiles unless it is told not to, whatever its configuration says.
    if frames == "images" and hasattr(processor.image_processor, "crop_to_patches"):
        kwargs["crop_to_patches"] = False
    return kwargs


def published_placeholders(processor: Any, text: str) -> str:
    """A rendered chat in which every video becomes what the model was trained on.

    The chat template of Qwen3-VL puts a video between a start and an end token. Up to transformers 4 its processor
    replaced all three by the frames, each with its time and its own pair of these tokens, and so does vLLM;
    transformers 5 replaces only the middle one and so adds an outer pair.
    """
    start, end = getattr(processor, "vision_start_token", None), getattr(processor, "vision_end_token", None)
    if start is None or not hasattr(processor, "_calculate_timestamps"):
        return text
    return text.replace(f"{start}{processor.video_token}{end}", processor.video_token)


def without_outer_tokens(processor: Any, ids: Sequence[int]) -> list[int]:
    """Token ids of a prompt with videos, without the outer pairs that `published_placeholders` avoids."""
    if not hasattr(processor, "_calculate_timestamps"):
        return list(ids)
    names = (processor.vision_start_token, processor.vision_end_token, processor.video_token)
    start, end, video = processor.tokenizer.convert_tokens_to_ids(names)
    return [
        token
        for before, token, after in zip([None, *ids[:-1]], ids, [*ids[1:], None], strict=True)
        if not (token == start and after != video) and not (token == end and before != video)
    ]


def vision_kwargs(features: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Arguments that pass precomputed `lmm_qa.model.inputs.vision_features` to a model's forward, instead of pixels.

    They are shaped like the output of `get_video_features`: https://github.com/huggingface/transformers/pull/45783

    Args:
        features: of all clips of a batch.
        inputs: the other inputs of the batch.
    """
    layers = [(layer,) for layer in features["deepstack"]] if "deepstack" in features else None
    output = SimpleNamespace(pooler_output=(features["tokens"],), deepstack_features=layers)
    return {"mm_encoder_outputs": {"image" if "image_grid_thw" in inputs else "video": output}}


OMNI = frozenset({"qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"})
"""Values of `model_type` of the families that read sound and frames in the order of their times."""


AFTER_SOUND = 1600
"""Samples of silence behind a sound: more than the window of a column of the spectrogram, which has 400."""


def is_omni(processor: Any) -> bool:
    """Whether a processor is that of a model in `OMNI`."""
    return hasattr(processor, "position_id_per_seconds")


def thinker_config(config: Any) -> Any:
    """The configuration of the part that answers, if it is that of a whole Omni model, which also speaks; else itself.

    transformers loads that part alone from the checkpoint of the whole model.
    """
    thinker = getattr(config, "thinker_config", None)
    if thinker is None:
        return config
    thinker.name_or_path, thinker._commit_hash = config.name_or_path, getattr(config, "_commit_hash", None)
    return thinker


def add_logits_to_keep(model: Any) -> None:
    """Give the forward of an Omni model the argument `logits_to_keep`, which that of other families has.

    Without it, it computes the logits of all tokens: 1 GB for 1,500 tokens in float32.
    """
    if model.config.model_type not in OMNI:
        return
    from transformers.modeling_outputs import CausalLMOutputWithPast

    @functools.wraps(type(model).forward)
    def forward(self: Any, *, logits_to_keep: int | torch.Tensor = 0, **inputs: Any) -> Any:
        output = self.model(**inputs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        return CausalLMOutputWithPast(logits=logits, past_key_values=output.past_key_values)

    model.forward = MethodType(forward, model)  # a copy of the model gets one of its own


def omni_kwargs(processor: Any, seconds: Sequence[float], sound: np.ndarray[Any, Any] | None) -> dict[str, Any]:
    """Arguments by which the processor of an Omni model places one clip's frames in time, and its sound among them.

    Args:
        seconds: of the frames.
        sound: (n,) samples; it becomes part of the first view.
    """
    kwargs: dict[str, Any] = {"fps": processor.video_processor.temporal_patch_size / second_per_grid(seconds)}
    if sound is None:
        return kwargs
    kwargs |= {"audio": [sound], "audio_from_video_indices": [0], "load_audio_from_video": True}
    # The processor of Qwen2.5-Omni pads every sound to 5 minutes before it computes what the model reads, of which it
    # marks the columns of the sound. With this much silence, those are the same, and nothing is cut off.
    return kwargs | {"audio_kwargs": {"max_length": len(sound) + AFTER_SOUND}}


def second_per_grid(seconds: Sequence[float]) -> float:
    """Seconds from one pair of frames to the next, for Omni models.

    In 1024ths of a second, in such a way that neither this number nor the 2 frames per this time are rounded: processor
    and model each compute from it which sounds come before which frames, the one in float64, the other in float32, and
    disagree where a frame and a sound have the same time but for rounding.

    Args:
        seconds: of the frames; each two become one row of tokens.
    """
    starts = seconds[::2]
    exact = (starts[-1] - starts[0]) / (len(starts) - 1) if len(starts) > 1 else 1.0
    nearest = max(round(exact * 1024), 1)
    ticks = sorted(range(max(nearest - 16, 1), nearest + 17), key=lambda tick: abs(tick - nearest))
    return next(tick / 1024 for tick in ticks if 2 / (2 / (tick / 1024)) == tick / 1024)


def qwen2_vl_tower(model: Any) -> Any:
    """The vision tower of a Qwen2-VL that uses PyTorch's attention; None for other models."""
    towers = (part for part in model.modules() if type(part).__name__ == "Qwen2VisionTransformerPretrainedModel")
    return next((tower for tower in towers if tower.config._attn_implementation == "sdpa"), None)


def qwen2_vl_rotation(
    tower: Any, hidden: torch.Tensor, grid: tuple[int, int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of the angles of the rotary position embedding in the vision tower of Qwen2-VL.

    Args:
        tower: see `qwen2_vl_tower`.
        hidden: embedded patches, for their device.
        grid: number of pictures, and their height and width in patches.

    Returns:
        Each (patches, 1, width of a head) float32.
    """
    from transformers.vision_utils import get_vision_position_ids

    positions = get_vision_position_ids(torch.tensor([grid], device=hidden.device), tower.spatial_merge_size)
    cosine, sine = tower.rotary_pos_emb(hidden, positions)
    return cosine[:, None].float(), sine[:, None].float()


def position_ids(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Positions of the tokens of prepared inputs, as the model's forward would compute them.

    Returns:
        (3, B, tokens) for a model with M-RoPE (time, height, width), else (B, tokens).
    """
    rope = _rope(model)
    if rope is None:
        return inputs["attention_mask"].cumsum(-1) - 1
    if rope.config.model_type in OMNI:
        return _omni_position_ids(rope, inputs)
    positions: torch.Tensor = rope.get_rope_index(**inputs)[0]
    return positions


def _omni_position_ids(rope: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    """As `position_ids`, for clips that all have as many views.

    With sound, the sound is part of the first view. For the views after it, transformers would count positions as for
    words, because it expects every video of a chat to have sound or none: they get theirs in a call of their own.
    """
    # Inputs may end in a video whose end token comes with the question; transformers expects a token behind it.
    ids, mask = functional.pad(inputs["input_ids"], (0, 1)), functional.pad(inputs["attention_mask"], (0, 1), value=1)
    images, videos = inputs.get("image_grid_thw"), inputs.get("video_grid_thw")
    seconds = torch.as_tensor(inputs.get("video_second_per_grid", ()), dtype=torch.float32)
    if "feature_attention_mask" not in inputs:
        plain: torch.Tensor = rope.get_rope_index(ids, images, videos, mask, second_per_grids=seconds)[0]
        return plain[..., :-1]
    assert videos is not None
    lengths, views = inputs["feature_attention_mask"].sum(-1), len(videos) // len(ids)
    positions: torch.Tensor = torch.ones(3, *ids.shape, device=ids.device)
    for row, real in enumerate(mask.bool()):
        own, first, after = ids[row, real], row * views, (row + 1) * views
        parts = [(own, slice(first, after))]
        if views > 1:
            second = int((own == rope.config.vision_start_token_id).nonzero()[1])
            parts = [(own[:second], slice(first, first + 1)), (own[second:], slice(first + 1, after))]
        sound: dict[str, Any] = {"use_audio_in_video": True, "audio_seqlens": lengths[row : row + 1]}
        found = list[torch.Tensor]()
        for part, own_videos in parts:
            known = (part[None], None, videos[own_videos], torch.ones_like(part[None]))
            places = rope.get_rope_index(*known, second_per_grids=seconds[own_videos], **sound)[0][:, 0]
            found.append(places + (found[-1].max() + 1 if found else 0))
            sound = {}
        positions[:, row, real] = torch.cat(found, dim=-1).to(positions)
    return positions[..., :-1]


def with_positions(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Prepared inputs with the positions of the tokens in place of the times, for Omni models; of others unchanged.

    Their own forward computes wrong ones in the cases that `_omni_position_ids` is about.
    """
    if "position_ids" not in inputs:
        rope = _rope(model)
        if rope is None or rope.config.model_type not in OMNI:
            return inputs
        inputs = {**inputs, "position_ids": _omni_position_ids(rope, inputs)}
    return {name: value for name, value in inputs.items() if name != "video_second_per_grid"}


def _rope(model: Any) -> Any:
    """The part of a model that computes positions in time, height and width; None if it has only one position."""
    return next((module for module in model.modules() if hasattr(module, "get_rope_index")), None)


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


OLD_PREFIXES = (
    {"model.language_model.": "model.", "model.visual.": "visual."},  # Qwen2-VL, Qwen2.5-VL
    {
        "model.language_model.": "language_model.model.",
        "lm_head": "language_model.lm_head",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    },  # LLaVA-OneVision
)
"""Prefixes of module names, and what they were before transformers 4.52, which changed the names in adapters:
https://github.com/huggingface/transformers/pull/37033"""

ADAPTER_PREFIX = "base_model.model."


def old_module_names(modules: Iterable[str], tensors: Iterable[str]) -> dict[str, str]:
    """Old to present names of the modules of a model, if the tensors of an adapter use old names; else nothing.

    Args:
        modules: present names of a model's modules.
        tensors: names of an adapter's tensors.
    """
    present, tensors = set(modules), list(tensors)
    for prefixes in OLD_PREFIXES:
        old_to_new = {}
        for name in present:
            new = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
            old_to_new[prefixes.get(new, "") + name.removeprefix(new)] = name
        if any(owner and owner not in present for owner in (_owner(tensor, old_to_new) for tensor in tensors)):
            return old_to_new
    return {}


def rename_tensor(tensor: str, renames: Mapping[str, str]) -> str:
    """The present name of an adapter's tensor; unchanged if the model has no such module."""
    module = _owner(tensor, renames)
    if module is None:
        return tensor
    return ADAPTER_PREFIX + renames[module] + tensor.removeprefix(ADAPTER_PREFIX + module)


def rename_targets(config: Any, renames: Mapping[str, str]) -> None:
    """Replace patterns of old module names in a PEFT configuration by the present names of the modules they match."""
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    if not getattr(config, "target_modules", None):
        return
    matches = {old: new for old, new in renames.items() if check_target_module_exists(config, old)}
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, name, None)
        if patterns:
            keys = {new: get_pattern_key(list(patterns), old) for old, new in matches.items()}
            setattr(config, name, {new: patterns[key] for new, key in keys.items() if key in patterns})
    config.target_modules = set(matches.values())
    for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if hasattr(config, name):
            setattr(config, name, None)


def _owner(tensor: str, modules: Collection[str]) -> str | None:
    """The module among these that an adapter's tensor belongs to."""
    parts = tensor.removeprefix(ADAPTER_PREFIX).split(".")
    candidates = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((name for name in candidates if name in modules), None)


def parameter_names(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """The parameter that transformers loads each stored tensor of a checkpoint into.

    Tensors that it converts (splits, joins, transposes) or does not load are left out.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    parameters: Any = dict(model.named_parameters())
    mapping = get_model_conversion_mapping(model)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    names = {}
    for name in stored:
        # As `convert_and_load_state_dict_in_model` does.
        renamed, conversion = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        if renamed not in parameters and name in parameters:
            renamed, conversion = rename_source_key(name, [], [], model.base_model_prefix, parameters)
        if renamed in parameters and conversion is None:
            names[name] = renamed
    return names


def adapted_modules(model: Any) -> Iterator[tuple[str, Any]]:
    """Names and outermost PEFT modules in a model that an adapter was put into."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inside: str | None = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            inside = f"{name}."
            yield name, module


def base_module(module: Any) -> Any:
    """The module of the base model inside a PEFT module."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module.original_module


def merged_module(module: Any) -> Any:
    """Merge a PEFT module into its base module, as `merge_and_unload` does for a whole model."""
    if hasattr(module, "unload_and_optionally_merge_module"):
        return module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    module.merge()
    return module.get_base_layer()


def base_tensors(adapter: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of an adapter file by the names that they would have in the base model: trained biases and embeddings are
    stored under these."""
    return {name.removeprefix(ADAPTER_PREFIX).replace(".base_layer.", "."): value for name, value in adapter.items()}
