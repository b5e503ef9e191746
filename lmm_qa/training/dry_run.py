"""`lmm-qa train --dry-run`: data, tokens, memory, time and first batch of a run. Loads no weights, writes nothing."""

from __future__ import annotations

import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import PartialState

from lmm_qa.errors import ClipError, TrainingError
from lmm_qa.manifest import content_id
from lmm_qa.model.backbone import Backbone
from lmm_qa.model.inputs import count_tokens, patch_factor
from lmm_qa.model.loading import (
    LoadOptions,
    choose_device,
    choose_dtype,
    choose_model_dtype,
    empty_model,
    estimate_memory,
    load_processor,
)
from lmm_qa.model.rater_config import RaterConfig
from lmm_qa.training.activation_memory import PATCHES_PER_TOKEN, step_memory
from lmm_qa.training.adapters import component, trainable_model
from lmm_qa.training.collate import (
    Batch,
    EpochSampler,
    LabelledClip,
    RatingCollator,
    RatingDataset,
    content_number,
)
from lmm_qa.training.config import TrainingConfig
from lmm_qa.training.dataset import Example, load
from lmm_qa.training.run import available_tasks
from lmm_qa.video.probe import probe
from lmm_qa.video.views import view_size

PROBED_CLIPS = 50
"""Clips whose frame size is read to estimate token counts."""

UTILISATION = 0.4
"""Speed of training steps relative to a bare matrix product; a rule of thumb, not measured."""


def preview(config: TrainingConfig) -> str:
    """A readable report on a run, with the first batch decoded.

    Raises:
        UsageError, ModelError, TrainingError: as `lmm_qa.training.run.train` would.
    """
    settings, training = config.rater_config(), config.training
    backbone = str(settings.backbone)
    options: LoadOptions = {
        "revision": settings.revision,
        "quantization": config.model.quantization,
        "dtype": config.model.dtype,
        "trust_remote_code": config.model.trust_remote_code,
    }
    processor = load_processor(backbone, **options)
    factor = patch_factor(processor)
    splits = load(config.data, training.seed)
    everything = (*splits.train, *splits.validation, *splits.calibration)
    missing = [example.path for example in everything if not example.path.is_file()]
    lines = [str(splits), f"videos      {len(everything) - len(missing)} of {len(everything)} files exist"]
    if missing:
        lines.append(f"            missing, among others: {missing[0]}")
    present = [example for example in splits.train if example.path.is_file()]
    if not present:
        raise TrainingError("\n".join([*lines, "no training video exists: correct data.root"]))
    probed = [example.path for example in present[:: -(-len(present) // PROBED_CLIPS)]]
    tokens = _token_counts(processor, settings, factor or 1, probed)
    lines.append(
        f"tokens      {min(tokens)} to {max(tokens)} per clip, median {median(tokens):.0f} ({len(tokens)} clips)"
    )
    device = choose_device()
    full = config.tuning.method == "full"
    dtype = (choose_dtype(device.value, config.model.dtype) if full else choose_model_dtype(backbone, **options)).value
    empty = empty_model(backbone, **options)
    with torch.device("meta"):
        model = trainable_model(empty.to(torch.float32 if full else getattr(torch, dtype)), config)
    lines += _parameter_lines(model)
    cached = config.uses_vision_cache(factor is not None)
    operations = _step_operations(model, config, int(median(tokens)), cached)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = estimate_memory(backbone, 1, **options).weights
    state = 16 * trainable  # float32 weights, gradients and both moments of AdamW
    if full:
        weights = 4 * (sum(p.numel() for p in model.parameters()) - trainable)
    can_share_prefill = Backbone(model, processor, {}).can_share_prefill
    activations = step_memory(
        model,
        training.batch_size,
        int(median(tokens)),
        getattr(torch, dtype),
        checkpointing=training.gradient_checkpointing,
        vision=config.tuning.vision,
        fused_dropout=device.value != "cpu",
    )
    lines.append(
        f"memory      about {_gigabytes(weights + state + activations)} on each device: frozen weights "
        f"{_gigabytes(weights)}, trained ones with gradients and optimizer {_gigabytes(state)}, "
        f"{training.batch_size} clips {_gigabytes(activations)}"
    )
    processes = PartialState().num_processes
    steps = training.steps(len(present), processes)
    speed = _matmul_speed(device.value, dtype) * UTILISATION
    seconds = operations * training.batch_size * training.gradient_accumulation_steps / speed
    lines.append(
        f"time        {steps} steps of {training.clips_per_step(processes)} clips, about {_duration(seconds)} each "
        f"on {device} in {dtype}: {_duration(steps * seconds)} (from the speed of a matrix product; decoding may be "
        "slower)"
    )
    if cached:
        size = torch.empty((), dtype=getattr(torch, dtype)).element_size()
        width = model.config.get_text_config().hidden_size
        layers = 1 + len(getattr(model.config.vision_config, "deepstack_visual_indexes", ()))
        entries = config.augmentation.temporal_offsets * len(present) + len(everything) - len(splits.train)
        disk = entries * median(tokens) * width * size * layers
        folder = training.cache_dir.expanduser().absolute()
        free = shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.is_dir())).free
        lines.append(
            f"disk        about {_gigabytes(disk)} of vision features in {folder}, where {_gigabytes(free)} are free"
        )
    batch = first_batch(config, settings, processor, present, can_share_prefill)
    shapes = ", ".join(f"{name} {tuple(torch.as_tensor(value).shape)}" for name, value in batch["inputs"].items())
    mos = ", ".join(f"{value:.2f}" for value in batch["mos"])
    lines.append(f"first batch {', '.join(batch['names'])}\n            MOS {mos}\n            {shapes}")
    return "\n".join(lines)


def first_batch(
    config: TrainingConfig, settings: RaterConfig, processor: Any, examples: Sequence[Example], share_prefix: bool
) -> Batch:
    """The first batch of training on these examples (of the first process), decoded from the clips.

    Args:
        share_prefix: see `RatingCollator`.

    Raises:
        TrainingError: one of its clips cannot be read.
    """
    training, count = config.training, len(examples)
    contents = [content_number(example) for example in examples]
    keys = list(EpochSampler(contents, min(training.batch_size, count), training.seed))
    drawn = {index for _, index in keys}
    clips = [
        LabelledClip(example.on(settings.scale), content_id(example.path) if index in drawn else "")
        for index, example in enumerate(examples)
    ]
    auxiliary = available_tasks(config, settings, processor, clips, lambda _: None)
    dataset = RatingDataset(clips, settings, processor, 1 << 31, None, config.augmentation, training.seed, auxiliary)
    return RatingCollator(processor, share_prefix)([dataset[key] for key in keys])


def _token_counts(processor: Any, settings: RaterConfig, factor: int, paths: list[Path]) -> list[int]:
    counts, known = [], dict[tuple[tuple[tuple[int, int], ...], float], int]()
    for path in paths:
        try:
            info = probe(path)
        except ClipError:
            continue
        sizes = tuple(view_size(info.height, info.width, view, factor) for view in settings.views)
        seconds = round(info.duration, 1) if settings.prompt.sound else 1.0
        if (sizes, seconds) not in known:
            frames = settings.sampling.frames
            known[sizes, seconds] = count_tokens(processor, frames, sizes, settings.prompt, seconds)
        counts.append(known[sizes, seconds])
    if not counts:
        raise TrainingError(f"none of {len(paths)} clips can be read, the first of them {paths[0]}")
    return counts


def _parameter_lines(model: Any) -> list[str]:
    total, trained = Counter[str](), Counter[str]()
    layers: dict[str, set[str]] = defaultdict(set)
    for name, parameter in model.named_parameters():
        part = component(name) or "other"
        total[part] += parameter.numel()
        if parameter.requires_grad:
            trained[part] += parameter.numel()
            names = [piece for piece in name.split(".") if piece.endswith("_proj") or piece in ("qkv", "proj")]
            layers[part].update(names[-1:])
    everything, all_trained = sum(total.values()), sum(trained.values())
    lines = [f"trainable   {all_trained:,} of {everything:,} weights ({all_trained / everything:.2%})"]
    for part, count in total.items():
        where = f" in {', '.join(sorted(layers[part]))}" if layers[part] else ""
        lines.append(f"  {part:<9} {trained[part]:,} of {count:,}{where}")
    return lines


def _step_operations(model: Any, config: TrainingConfig, tokens: int, cached: bool) -> float:
    """Estimated floating-point operations per clip and training step.

    Two operations per weight and token forward, two for the gradient of the input, two for the gradient of the weights,
    and two to recompute activations.
    """
    weights = Counter[str | None]()
    for name, parameter in model.named_parameters():
        if "embed_tokens" not in name:
            weights[component(name)] += parameter.numel()
    recompute = config.training.gradient_checkpointing
    per_weight = 4 + 2 * (config.tuning.method == "full") + 2 * recompute
    operations = float(per_weight * tokens * weights["language"])
    if not cached:
        patches = PATCHES_PER_TOKEN * tokens
        operations += (per_weight if config.tuning.vision else 2) * patches * weights["vision"]
    return operations


def _matmul_speed(device: str, dtype: str) -> float:
    """Floating-point operations per second in a matrix product."""
    side = 1024 if device == "cpu" else 8192
    a = torch.randn(side, side, device=device).to(getattr(torch, dtype))
    best = 0.0
    for _ in range(4):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.2g} MB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.3g} h"
