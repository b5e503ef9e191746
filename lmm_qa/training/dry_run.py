"""What a training run would take, without weights, and without writing anything: `lmm-qa train --dry-run`."""

from __future__ import annotations

import shutil
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForImageTextToText

from lmm_qa.errors import ClipError, TrainingError
from lmm_qa.model.inputs import count_tokens, patch_factor
from lmm_qa.model.loading import choose_device, choose_dtype, estimate_memory, load_processor
from lmm_qa.model.rater_config import RaterConfig
from lmm_qa.training.adapters import part_of, tunable
from lmm_qa.training.collate import Clip, Collate, Passes, Samples
from lmm_qa.training.config import Recipe
from lmm_qa.training.dataset import load
from lmm_qa.video.probe import probe
from lmm_qa.video.views import view_size

PROBED = 50


"""Clips whose size is looked at."""


UTILISATION = 0.4


"""Share of a bare matrix product's speed that training steps reach; a rule of thumb, not measured."""


@dataclass(frozen=True)
class _Cost:
    """Of one clip in one training step."""

    operations: float
    """Floating point operations."""
    memory: float
    """Bytes of what is kept for the backward pass."""


def preview(recipe: Recipe) -> str:
    """Report on a run, for people; decodes the first batch, loads no weights, writes nothing.

    Raises:
        UsageError, ModelError, TrainingError: as `lmm_qa.training.run.train` would.
    """
    settings, training = recipe.rater(), recipe.training
    backbone = str(settings.backbone)
    options: dict[str, Any] = {"revision": settings.revision, "trust_remote_code": recipe.model.trust_remote_code}
    processor = load_processor(backbone, **options)
    factor = patch_factor(processor)
    splits = load(recipe.data, training.seed)
    everything = (*splits.train, *splits.validation, *splits.calibration)
    absent = [example.path for example in everything if not example.path.is_file()]
    lines = [str(splits), f"videos      {len(everything) - len(absent)} of {len(everything)} files are there"]
    if absent:
        lines.append(f"            missing, among others: {absent[0]}")
    present = [example for example in splits.train if example.path.is_file()]
    if not present:
        raise TrainingError("\n".join([*lines, "no training video is there: correct data.root"]))
    tokens = _token_counts(processor, settings, factor or 1, [e.path for e in present[:: -(-len(present) // PROBED)]])
    lines.append(
        f"tokens      {min(tokens)} to {max(tokens)} a clip, median {median(tokens):.0f} ({len(tokens)} clips)"
    )
    device = choose_device()
    dtype = recipe.model.dtype or choose_dtype(device.value).value
    model = _empty(backbone, options, recipe)
    lines += _parameter_lines(model)
    kept = recipe.keeps_vision(factor is not None)
    cost = _cost(model, recipe, int(median(tokens)), dtype, kept)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = estimate_memory(backbone, 1, dtype, recipe.model.quantization, **options).weights
    state = 16 * trainable  # in float32: the weights, their gradients, and what AdamW knows of them
    if recipe.tuning.method == "full":
        weights = 4 * (sum(p.numel() for p in model.parameters()) - trainable)
    needed = weights + state + training.batch_size * cost.memory
    lines.append(
        f"memory      about {_gigabytes(needed)} on each device: frozen weights {_gigabytes(weights)}, trained ones "
        f"with gradients and optimizer {_gigabytes(state)}, {training.batch_size} clips "
        f"{_gigabytes(training.batch_size * cost.memory)}"
    )
    processes = PartialState().num_processes
    batch, steps = training.clips_a_step(processes), training.steps(len(present), processes)
    speed = _matrix_speed(device.value, dtype) * UTILISATION
    seconds = cost.operations * training.batch_size * training.accumulation / speed
    lines.append(
        f"time        {steps} steps of {batch} clips, about {_duration(seconds)} each on {device} in {dtype}: "
        f"{_duration(steps * seconds)} (from the speed of a matrix product; decoding may be slower)"
    )
    if kept:
        size = torch.empty((), dtype=getattr(torch, dtype)).element_size()
        width = model.config.get_text_config().hidden_size
        layers = 1 + len(getattr(model.config.vision_config, "deepstack_visual_indexes", ()))
        looks = recipe.augmentation.offsets * len(present) + len(everything) - len(splits.train)
        disk = looks * median(tokens) * width * size * layers
        cache = training.cache.expanduser().absolute()
        free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.is_dir())).free
        lines.append(
            f"disk        about {_gigabytes(disk)} of vision features in {cache}, where {_gigabytes(free)} are free"
        )
    lines.append(_first_batch(recipe, settings, processor, present))
    return "\n".join(lines)


def _token_counts(processor: Any, settings: RaterConfig, factor: int, paths: list[Path]) -> list[int]:
    counts, known = [], dict[tuple[tuple[int, int], ...], int]()
    for path in paths:
        try:
            info = probe(path)
        except ClipError:
            continue
        sizes = tuple(view_size(info.height, info.width, view, factor) for view in settings.views)
        if sizes not in known:
            known[sizes] = count_tokens(processor, settings.sampling.frames, sizes, settings.prompt)
        counts.append(known[sizes])
    if not counts:
        raise TrainingError(f"none of {len(paths)} clips can be read, the first of them {paths[0]}")
    return counts


def _empty(backbone: str, options: dict[str, Any], recipe: Recipe) -> Any:
    """The model to be trained, without weights."""
    config = AutoConfig.from_pretrained(backbone, **options)
    build: Any = AutoModelForImageTextToText.from_config
    with torch.device("meta"):
        empty = build(config, trust_remote_code=recipe.model.trust_remote_code)
        model = recipe.model.model_copy(update={"quantization": None})
        return tunable(empty, recipe.model_copy(update={"model": model}))


def _parameter_lines(model: Any) -> list[str]:
    total, trained = Counter[str](), Counter[str]()
    kinds: dict[str, set[str]] = defaultdict(set)
    for name, parameter in model.named_parameters():
        part = part_of(name) or "other"
        total[part] += parameter.numel()
        if parameter.requires_grad:
            trained[part] += parameter.numel()
            names = [piece for piece in name.split(".") if piece.endswith("_proj") or piece in ("qkv", "proj")]
            kinds[part].update(names[-1:])
    everything, all_trained = sum(total.values()), sum(trained.values())
    lines = [f"trainable   {all_trained:,} of {everything:,} weights ({all_trained / everything:.2%})"]
    for part, count in total.items():
        where = f" in {', '.join(sorted(kinds[part]))}" if kinds[part] else ""
        lines.append(f"  {part:<9} {trained[part]:,} of {count:,}{where}")
    return lines


def _cost(model: Any, recipe: Recipe, tokens: int, dtype: str, kept: bool) -> _Cost:
    """An estimate from sizes: two operations for each weight and token forward, two for the gradient of what goes in,
    two for that of the weights, two to calculate again what was not kept."""
    text = model.config.get_text_config()
    weights = {part: 0 for part in ("language", "vision", "merger")}
    for name, parameter in model.named_parameters():
        if (part := part_of(name)) and "embed_tokens" not in name:
            weights[part] += parameter.numel()
    full, again = recipe.tuning.method == "full", recipe.training.gradient_checkpointing
    each = 4 + 2 * full + 2 * again
    operations = float(each * tokens * weights["language"])
    if not kept:
        patches = 4 * tokens
        operations += (each if recipe.tuning.vision else 2) * patches * weights["vision"]
    size = torch.empty((), dtype=getattr(torch, dtype)).element_size()
    layer = tokens * size * (10 * text.hidden_size + 5 * text.intermediate_size)
    whole = text.num_hidden_layers * (tokens * size * text.hidden_size if again else layer)
    return _Cost(operations, whole + layer)


def _matrix_speed(device: str, dtype: str) -> float:
    """Floating point operations a second in a matrix product."""
    side = 1024 if device == "cpu" else 8192
    a = torch.randn(side, side, device=device).to(getattr(torch, dtype))
    best = 0.0
    for _ in range(4):
        began = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        best = max(best, 2 * side**3 / (time.perf_counter() - began))
    return best


def _first_batch(recipe: Recipe, settings: RaterConfig, processor: Any, examples: list[Any]) -> str:
    """Decode what the first step sees."""
    clips = [Clip(example.on(settings.scale), str(example.path)) for example in examples]
    samples = Samples(clips, settings, processor, 1 << 31, None, recipe.augmentation, recipe.training.seed)
    keys = list(Passes(len(clips), min(recipe.training.batch_size, len(clips)), recipe.training.seed))
    batch = Collate(processor)([samples[key] for key in keys])
    shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in batch["inputs"].items())
    mos = ", ".join(f"{value:.2f}" for value in batch["mos"])
    return f"first batch {', '.join(batch['names'])}\n            MOS {mos}\n            {shapes}"


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.2g} MB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.3g} h"
