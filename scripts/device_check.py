"""Measure rating and training on a CUDA card, with random weights of true size. Start it with `device_check.sh`.

Each stage writes a JSON file as soon as it ends, and `summary.json` and `summary.md` are updated after each, so an
aborted run leaves what it has measured. Stages of one model share a process; a stage that fails, crashes or exceeds its
time limit is recorded with the reason, and the others go on. When the time is up, no further stage starts.

With `--dry-run`, all stages run with tiny models on the CPU: their numbers mean nothing, but every line is executed.
"""

from __future__ import annotations

import argparse
import csv
import gc
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import bench_rating
import bench_training
import torch
from bench_rating import Task, now, peak_memory, run_in_turns
from corpus import SAMPLES

from lmm_qa import Rater
from lmm_qa.model.loading import estimate_memory
from lmm_qa.model.rater_plan import plan_rater
from lmm_qa.model.source import EMBEDDED
from lmm_qa.ratings.rows import Details
from lmm_qa.training.config import TrainingConfig
from lmm_qa.training.dry_run import preview

Report = dict[str, Any]
"""What a stage returns; `headline` is its line in summary.md."""

PACKAGES = ("torch", "torchvision", "transformers", "peft", "accelerate", "bitsandbytes", "flash-attn", "av", "decord")

GRACE = 20.0
"""Seconds that a running stage may exceed the total time by."""


class NotAvailable(Exception):
    """A stage cannot run here; the message says why."""


# --- models ----------------------------------------------------------------------------------------------------------

QWEN2_TOWER = {"depth": 32, "embed_dim": 1280, "num_heads": 16}
QWEN2_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
QWEN3_ROPE = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}


def sizes(hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int, vocabulary: int) -> Report:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": vocabulary,
    }


MODELS: dict[str, Report] = {
    "qwen2_vl_7b": {
        "model_type": "qwen2_vl",
        "tie_word_embeddings": False,
        "text_config": {**sizes(3584, 18944, 28, 28, 4, 152064), "rope_parameters": QWEN2_ROPE},
        "vision_config": {**QWEN2_TOWER, "hidden_size": 3584},
    },
    "qwen2_vl_2b": {
        "model_type": "qwen2_vl",
        "tie_word_embeddings": True,
        "text_config": {**sizes(1536, 8960, 28, 12, 2, 151936), "rope_parameters": QWEN2_ROPE},
        "vision_config": {**QWEN2_TOWER, "hidden_size": 1536},
    },
    "qwen3_vl_4b": {
        "model_type": "qwen3_vl",
        "tie_word_embeddings": True,
        "text_config": {**sizes(2560, 9728, 36, 32, 8, 151936), "head_dim": 128, "rope_parameters": QWEN3_ROPE},
        "vision_config": {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "out_hidden_size": 2560,
            "deepstack_visual_indexes": [5, 11, 17],
        },
    },
}
"""Configurations of the published models, without what is the same in all of them."""


def config_folder(folder: Path, name: str, tiny: bool) -> Path:
    """A directory with config.json of a model in `MODELS`, and a processor with a small vocabulary."""
    if (folder / "config.json").exists():
        return folder
    from transformers import AutoConfig, AutoProcessor, Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    base = EMBEDDED.parent / "base"
    model = MODELS[name]
    text, vision = dict(model["text_config"]), dict(model["vision_config"])
    if tiny:
        text |= sizes(64, 128, 2, 4, 2, 2048)
        text["rope_parameters"] = text["rope_parameters"] | {"mrope_section": [2, 3, 3]}
        vision |= {"depth": 2, "num_heads": 4}
        if name == "qwen3_vl_4b":
            text["head_dim"] = 16
            vision |= {"hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 64}
            vision["deepstack_visual_indexes"] = [0]
        else:
            vision |= {"embed_dim": 64, "hidden_size": 64}
    special = json.loads((base / "config.json").read_text())
    tokens = {key: special[key] for key in special if key.endswith("_token_id")}
    ends = {key: special["text_config"][key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    values = {**model, **tokens, "text_config": {**text, **ends}, "vision_config": vision}
    folder.mkdir(parents=True, exist_ok=True)
    processor = AutoProcessor.from_pretrained(base)
    if name == "qwen3_vl_4b":
        size = {"shortest_edge": 64 * 64, "longest_edge": 1280 * 1024}
        processor = Qwen3VLProcessor(
            Qwen2VLImageProcessor(patch_size=16, size=size),
            processor.tokenizer,
            Qwen3VLVideoProcessor(),
            chat_template=processor.chat_template,
        )
    processor.save_pretrained(folder)
    AutoConfig.for_model(values.pop("model_type"), **values).save_pretrained(folder)
    return folder


@dataclass
class Bench:
    """Settings of a run, and the models that its stages share."""

    scratch: Path
    """For configurations, a checkpoint and cached features; removed at the end."""
    dry_run: bool
    number: int
    """Clips that are rated."""

    @property
    def device(self) -> str:
        return "cpu" if self.dry_run else "cuda"

    @property
    def batch_size(self) -> int:
        return 1 if self.dry_run else 64

    @property
    def workers(self) -> int:
        return 1 if self.dry_run else max(2, min(12, (os.cpu_count() or 2) - 2))

    def clips(self, number: int | None = None) -> list[Path]:
        """Samples, repeated as needed."""
        return list(itertools.islice(itertools.cycle(sorted(SAMPLES.glob("*.mp4"))), number or self.number))

    def few(self, number: int) -> list[Path]:
        """As many different clips as a slow path can rate."""
        return self.clips(2 if self.dry_run else number)

    def config(self, name: str) -> Path:
        return config_folder(self.scratch / name, name, self.dry_run)

    def random_rater(self, name: str) -> Rater:
        return bench_rating.random_rater(self.config(name), self.device, None, None)

    @cached_property
    def rater_7b(self) -> Rater:
        """In bf16. Training changes its model, so that must come last."""
        return self.random_rater("qwen2_vl_7b")

    @cached_property
    def checkpoint_7b(self) -> Path:
        """A saved model with random weights."""
        folder = config_folder(self.scratch / "checkpoint", "qwen2_vl_7b", self.dry_run)
        if not any(folder.glob("*.safetensors")):
            rater = self.random_rater("qwen2_vl_7b")
            log("saving random weights")
            rater.backbone.model.save_pretrained(folder)
            del rater
            free_memory()
        return folder

    def rater_4bit(self) -> Rater:
        """Loaded anew each time: after rating on a CPU, bitsandbytes cannot train it."""
        return Rater.from_pretrained(self.checkpoint_7b, quantization="4bit", device=self.device)

    def recipe(self, name: str, backbone: Path) -> TrainingConfig:
        """A training configuration of the package for this backbone, with the samples as its data."""
        folder = self.scratch / "data"
        folder.mkdir(exist_ok=True)
        with (folder / "labels.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["clip", "mos"])
            rows.writerows([str(clip), 1 + number % 5] for number, clip in enumerate(self.clips(12)))
        overrides = [
            f"model.backbone={backbone}",
            f"data.root={folder}",
            "data.train.0.path=labels.csv",
            "data.train.0.videos=.",
            "data.validation=[]",
            "data.validation_share=0",
            "data.calibration_share=0",
            f"training.output_dir={self.scratch / 'run'}",
            f"training.cache_dir={self.scratch / 'cache'}",
        ]
        if self.dry_run:
            overrides += ["training.batch_size=2", "rating.sampling.frames=2", "model.dtype=float32"]
        return TrainingConfig.load(Path(name), overrides)


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- stages ----------------------------------------------------------------------------------------------------------


def environment(bench: Bench) -> Report:
    """The machine and the versions of the packages."""
    report: Report = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "packages": {name: installed(name) for name in PACKAGES},
        "clips": bench.number,
        "scratch_free_bytes": shutil.disk_usage(bench.scratch).free,
    }
    card = "no card: dry run"
    if not bench.dry_run:
        free, total = torch.cuda.mem_get_info()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip() if shutil.which(query[0]) else ""
        card = torch.cuda.get_device_name()
        report |= {
            "card": card,
            "capability": torch.cuda.get_device_capability(),
            "driver": driver,
            "cuda": torch.version.cuda,
            "free_bytes": free,
            "total_bytes": total,
        }
    names = ("torch", "transformers", "peft", "bitsandbytes", "flash-attn")
    report["headline"] = ", ".join([card, *(f"{name} {report['packages'][name] or 'missing'}" for name in names)])
    return report


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def rating(bench: Bench, rater: Rater) -> Report:
    """Clips per second of `Rater.rate_all`, of the reference and of the upper limits, and the time of each stage."""
    clips, few, size, workers = bench.clips(), bench.few(12), bench.batch_size, bench.workers
    batches = bench_rating.prepare(rater, clips[:64], size)
    scores = bench_rating.rate(rater, few, size, workers)  # this and the next also warm up
    bench_rating.forward_only(rater, batches)
    bench_rating.reference(rater, few[:1])
    overlapping: dict[str, Task] = {
        "rater": lambda: bench_rating.rate(rater, clips, size, workers),
        "decoding only": lambda: bench_rating.decode_only(rater, clips, workers),
    }
    measured = run_in_turns(overlapping, len(clips), 1)
    forward: dict[str, Task] = {"forward only": partial(bench_rating.forward_only, rater, batches)}
    measured |= run_in_turns(forward, len(clips[:64]), 1 if bench.dry_run else 3)
    forward.clear()
    measured |= run_in_turns({"reference": lambda: bench_rating.reference(rater, few)}, len(few), 1)
    tokens = batches[0]["input_ids"].shape[1]
    shapes = [list(batch["input_ids"].shape) for batch in batches]
    del batches
    free_memory()
    speed = {name: each["clips_per_second"] for name, each in measured.items()}
    return {
        "parameters": sum(parameter.numel() for parameter in rater.backbone.model.parameters()),
        "choices": {name: str(choice) for name, choice in rater.backbone.choices.items()},
        "clips": len(clips),
        "batch_size": size,
        "workers": workers,
        "batches": shapes,
        "tokens_per_clip": tokens,
        "paths": measured,
        "seconds_per_clip_and_stage": bench_rating.stages(rater, few, len(few)),
        "scores": scores,
        "headline": f"{speed['rater']:.2f} clips/s of {tokens} tokens; reference {speed['reference']:.2f}, forward "
        f"only {speed['forward only']:.2f}, decoding only {speed['decoding only']:.2f}; peak "
        f"{gibibytes(measured['rater']['peak_device_bytes'])}",
    }


def rating_7b(bench: Bench) -> Report:
    """Rating with a Qwen2-VL 7B."""
    rater, report = loaded(lambda: bench.rater_7b)
    return report | rating(bench, rater)


def rating_2b(bench: Bench) -> Report:
    """Rating with a Qwen2-VL 2B."""
    return rating(bench, bench.random_rater("qwen2_vl_2b"))


def rating_qwen3_vl_4b(bench: Bench) -> Report:
    """Rating with a Qwen3-VL 4B."""
    return rating(bench, bench.random_rater("qwen3_vl_4b"))


def loaded(load: Callable[[], Rater]) -> tuple[Rater, Report]:
    """A rater, and the time and memory of loading it."""
    with peak_memory() as peak:
        start = now()
        rater = load()
        seconds = now() - start
    weights = sum(each.numel() * each.element_size() for each in rater.backbone.model.parameters())
    return rater, {"load_seconds": seconds, "load_peak_bytes": dict(peak), "weights_bytes": weights}


def two_views_7b(bench: Bench) -> Report:
    """The whole picture and a crop, as in the recipes, with a Qwen2-VL 7B."""
    one = bench.rater_7b
    settings = bench.recipe("thqa_qwen2_vl_7b_lora", bench.config("qwen2_vl_7b")).rating
    dtype = one.backbone.choices["dtype"].value
    plan = plan_rater(bench.config("qwen2_vl_7b"), views=settings.views, device=bench.device, dtype=dtype)
    two = Rater(one.backbone, replace(plan, source=one.source))
    clips, few, size, workers = bench.clips(), bench.few(4), bench.batch_size, bench.workers
    tokens: dict[str, int] = {}
    paths: dict[str, Task] = {}
    for name, rater in (("one view", one), ("two views", two)):
        tokens[name] = bench_rating.prepare(rater, few[:1], 1)[0]["input_ids"].shape[1]
        bench_rating.rate(rater, few, size, workers)  # warms up
        paths[name] = partial(bench_rating.rate, rater, clips, size, workers)
    measured = run_in_turns(paths, len(clips), 1)
    speed = {name: each["clips_per_second"] for name, each in measured.items()}
    return {
        "views": [view.model_dump() for view in two.settings.views],
        "tokens_per_clip": tokens,
        "paths": measured,
        "headline": "; ".join(
            f"{name}: {speed[name]:.2f} clips/s of {tokens[name]} tokens, peak "
            f"{gibibytes(measured[name]['peak_device_bytes'])}"
            for name in paths
        ),
    }


def defects_7b(bench: Bench) -> Report:
    """The defect profile with a Qwen2-VL 7B, relative to the score alone."""
    rater, size, workers = bench.rater_7b, bench.batch_size, bench.workers
    clips = bench.clips()

    def rate(details: Details) -> list[Any]:
        return list(rater.rate_all(clips, details=details, batch_size=size, workers=workers))

    bench_rating.rate(rater, bench.few(12), size, workers)  # warms up
    paths: dict[str, Task] = {
        "score": lambda: rate(Details()),
        "score and profile": lambda: rate(Details(defects=True)),
    }
    measured = run_in_turns(paths, len(clips), 1)
    speed = {name: each["clips_per_second"] for name, each in measured.items()}
    peak = {name: gibibytes(each["peak_device_bytes"]) for name, each in measured.items()}
    return {
        "batch_size": size,
        "paths": measured,
        "cost_over_score": speed["score"] / speed["score and profile"],
        "questions": bench_rating.cost_of_questions(rater, bench.few(4), 1),
        "headline": f"{speed['score and profile']:.2f} clips/s with profile, {speed['score']:.2f} without; "
        f"peak {peak['score and profile']} and {peak['score']}",
    }


def flash_attention_7b(bench: Bench) -> Report:
    """Scores and speed with flash-attn and with PyTorch's attention."""
    from transformers.utils.import_utils import is_flash_attn_2_available

    if not is_flash_attn_2_available():
        raise NotAvailable("flash-attn is not installed")
    rater, clips = bench.rater_7b, bench.clips()
    before = rater.backbone.model.config._attn_implementation
    scores, speed = {}, {}
    for attention in ("sdpa", "flash_attention_2"):
        rater.backbone.model.set_attn_implementation(attention)
        scores[attention] = bench_rating.rate(rater, bench.few(12), bench.batch_size, bench.workers)
        batches = bench_rating.prepare(rater, clips, bench.batch_size)
        start = now()
        bench_rating.forward_only(rater, batches)
        speed[attention] = len(clips) / (now() - start)
    rater.backbone.model.set_attn_implementation(before)
    difference = largest_difference(*scores.values())
    return {
        "scores": scores,
        "forward_clips_per_second": speed,
        "largest_difference": difference,
        "headline": f"forward only: flash-attn {speed['flash_attention_2']:.2f} clips/s, PyTorch {speed['sdpa']:.2f}; "
        f"scores differ by at most {difference:.2g}",
    }


def quantized_7b(bench: Bench) -> Report:
    """Loading a Qwen2-VL 7B from disk in bf16 and in 4 bits, and rating with both."""
    check_bitsandbytes()
    folder, clips, few, size = bench.checkpoint_7b, bench.clips(), bench.few(12), bench.batch_size
    loaders = {"bf16": lambda: Rater.from_pretrained(folder, device=bench.device), "4bit": bench.rater_4bit}
    report: Report = {"checkpoint_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors"))}
    scores, lines = {}, []
    for name, load in loaders.items():
        rater, report[name] = loaded(load)
        scores[name] = bench_rating.rate(rater, few, size, bench.workers)  # also warms up
        path = partial(bench_rating.rate, rater, clips, size, bench.workers)
        report[name] |= run_in_turns({name: path}, len(clips), 1)[name]
        del rater, path
        free_memory()
        lines.append(
            f"{name}: loaded in {report[name]['load_seconds']:.1f} s, peak "
            f"{gibibytes(report[name]['load_peak_bytes']['device'])}; {report[name]['clips_per_second']:.2f} clips/s, "
            f"peak {gibibytes(report[name]['peak_device_bytes'])}"
        )
    estimate = estimate_memory(str(folder), 1, quantization="4bit", device=bench.device).weights
    return {
        **report,
        "scores": scores,
        "largest_difference": largest_difference(*scores.values()),
        "estimated_4bit_weights_bytes": estimate,
        "headline": f"{'; '.join(lines)}; 4-bit weights {gibibytes(report['4bit']['weights_bytes'])}, estimated "
        f"{gibibytes(estimate)}",
    }


def lora_7b(bench: Bench) -> Report:
    """Training steps of the LoRA recipe for a Qwen2-VL 7B."""
    config = bench.recipe("thqa_qwen2_vl_7b_lora", bench.config("qwen2_vl_7b"))
    return training(bench, config, bench.rater_7b)


def qlora_7b(bench: Bench) -> Report:
    """Training steps of the QLoRA recipe for a Qwen2-VL 7B."""
    check_bitsandbytes()
    return training(bench, bench.recipe("thqa_qwen2_vl_7b_qlora", bench.checkpoint_7b), bench.rater_4bit())


def lora_vision_7b(bench: Bench) -> Report:
    """Training steps of the recipe that also tunes the vision tower of a Qwen2-VL 7B."""
    names = [Path(file.name).stem for file in resources.files("lmm_qa.config_files").iterdir()]
    chosen = [name for name in names if name.startswith("thqa_qwen2_vl_7b") and name.endswith("vision")]
    if not chosen:
        raise NotAvailable("there is no such recipe")
    config = bench.recipe(min(chosen), bench.config("qwen2_vl_7b"))
    return training(bench, config, bench.random_rater("qwen2_vl_7b"))


def training(bench: Bench, config: TrainingConfig, rater: Rater) -> Report:
    """Seconds and peak memory of training steps, next to the estimates of `lmm-qa train --dry-run`."""
    free_memory()
    tower = bench_rating.module(rater.backbone.model, "visual", "vision_tower")
    with bytes_kept(tower) as vision:
        measured = bench_training.bench(config, rater.backbone, bench.clips(12), 1 if bench.dry_run else 3)
    estimate = preview(config)
    memory = re.search(r"^memory +about ([\d.]+ [GM]B)", estimate, re.MULTILINE)
    parts = []
    for name, seconds in measured["seconds"].items():
        peak = measured["runs"][name].get("peak_bytes", 0)
        parts.append(f"{name}: {seconds['step']:.2f} s/step, peak {gibibytes(peak)} ({peak / 1e9:.1f} GB)")
    return {
        "recipe": config.model_dump(mode="json"),
        "measured": measured,
        "vision_tower": vision,
        "estimate": estimate.splitlines(),
        "headline": f"{measured['batch']} clips of {measured['tokens']} tokens; {'; '.join(parts)}; estimated by the "
        f"dry run: {memory[1] if memory else 'nothing'}; vision tower keeps {gibibytes(vision['kept_bytes'])}",
    }


@contextmanager
def bytes_kept(part: torch.nn.Module) -> Iterator[Report]:
    """Bytes on the card that a frozen module keeps for a backward pass, without its output: 0 if all is well."""
    report: Report = {"kept_bytes": 0, "output_requires_grad": False}
    before: list[int] = []

    def allocated() -> int:
        return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0

    def after(_: object, __: object, output: Any) -> None:
        outputs = [each for each in tensors(output) if each is not None]
        own = sum(each.numel() * each.element_size() for each in outputs)
        report["kept_bytes"] = max(report["kept_bytes"], allocated() - before.pop() - own)
        report["output_requires_grad"] |= any(each.requires_grad for each in outputs)

    hooks = [
        part.register_forward_pre_hook(lambda *_: before.append(allocated())),
        part.register_forward_hook(after),
    ]
    try:
        yield report
    finally:
        for hook in hooks:
            hook.remove()


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The different tensors in nested outputs of a module."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        yield from {id(each): each for item in value for each in tensors(item)}.values()


def embedded(bench: Bench) -> Report:
    """The embedded rater on the card and on the CPU."""
    samples, size, workers = bench.few(12), bench.batch_size, bench.workers
    variants = {"cpu float32": ("cpu", "float32"), "float32": (bench.device, "float32"),
                "bfloat16": (bench.device, "bfloat16")}  # fmt: skip
    scores: dict[str, list[float]] = {}
    speed: dict[str, float] = {}
    for name, (device, dtype) in variants.items():
        rater = Rater.from_pretrained(device=device, dtype=dtype)
        batch = 1 if device == "cpu" else size
        scores[name] = bench_rating.rate(rater, samples, batch, workers)
        clips = bench.clips(min(24, bench.number)) if device == "cpu" else bench.clips()
        start = now()
        bench_rating.rate(rater, clips, batch, workers)
        speed[name] = len(clips) / (now() - start)
    differences = {name: largest_difference(scores["cpu float32"], scores[name]) for name in list(variants)[1:]}
    return {
        "scores": scores,
        "clips_per_second": speed,
        "largest_differences": differences,
        "agrees": differences["float32"] <= 1e-3,
        "headline": "; ".join(
            f"{name}: {speed[name]:.2f} clips/s"
            + (f", scores differ from the CPU's by at most {differences[name]:.2g}" if name in differences else "")
            for name in variants
        ),
    }


def check_bitsandbytes() -> None:
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:  # missing, or its library does not fit the card's driver
        raise NotAvailable(f"bitsandbytes cannot be imported: {error}") from None


def largest_difference(one: Sequence[float], other: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def gibibytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


# --- the run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    measure: Callable[[Bench], Report]
    process: str
    """Stages with the same name share a process and its models."""
    limit: float
    """Seconds, including the start of the process and making the model."""

    @property
    def name(self) -> str:
        return self.measure.__name__


STAGES = {
    stage.name: stage
    for stage in (
        Stage(environment, "7b", 150),
        Stage(rating_7b, "7b", 180),
        Stage(two_views_7b, "7b", 90),
        Stage(defects_7b, "7b", 120),
        Stage(flash_attention_7b, "7b", 60),
        Stage(lora_7b, "7b", 150),
        Stage(embedded, "embedded", 90),
        Stage(quantized_7b, "4bit", 210),
        Stage(qlora_7b, "4bit", 150),
        Stage(lora_vision_7b, "vision", 150),
        Stage(rating_2b, "2b", 100),
        Stage(rating_qwen3_vl_4b, "qwen3", 120),
    )
}
"""In the order in which they run."""


def log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def run_here(names: Sequence[str], bench: Bench, output: Path, deadline: float) -> None:
    """Run stages in this process, until one fails or the time is up."""
    for name in names:
        if time.time() > deadline:
            return
        log(f"{name}: {STAGES[name].measure.__doc__}")
        start = time.monotonic()
        try:
            record = {"status": "measured", "result": STAGES[name].measure(bench)}
        except NotAvailable as error:
            record = {"status": "not available", "reason": str(error)}
        except Exception as error:
            record = {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:2000]}
            traceback.print_exc()
        finish(output, name, {**record, "seconds": round(time.monotonic() - start, 1)})
        if record["status"] == "failed":
            return  # memory may be full, and after some errors of CUDA every further call fails
        free_memory()


def finish(output: Path, name: str, record: Report) -> None:
    """Write the record of a stage and update the summaries."""
    write(output / f"{name}.json", json.dumps({"stage": name, **record}, indent=1, default=str))
    records = {path.stem: json.loads(path.read_text()) for path in record_files(output)}
    records = {name: records[name] for name in STAGES if name in records}
    write(output / "summary.json", json.dumps(records, indent=1))
    lines = ["| stage | seconds | result |", "|---|---|---|"]
    for stage, each in records.items():
        line = each["result"]["headline"] if "result" in each else f"{each['status']}: {each['reason']}"
        lines.append(f"| {stage} | {each['seconds']} | {' '.join(line.split())[:600]} |")
    write(output / "summary.md", "\n".join(lines) + "\n")
    log(lines[2 + list(records).index(name)])


def record_files(output: Path) -> list[Path]:
    return [path for name in STAGES if (path := output / f"{name}.json").exists()]


def write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".partial")
    temporary.write_text(text)
    temporary.replace(path)


def run_all(names: Sequence[str], args: argparse.Namespace, scratch: Path, deadline: float) -> None:
    """Run stages in processes of their own: one per model, and a new one after a failure."""
    output: Path = args.output
    for process in dict.fromkeys(STAGES[name].process for name in names):
        while pending := [name for name in names if STAGES[name].process == process and not done(output, name)]:
            if time.time() > deadline:
                break
            command = [sys.executable, __file__, "-o", str(output), "--clips", str(args.clips), "--stages",
                       ",".join(pending), "--scratch", str(scratch), "--deadline", str(deadline)]  # fmt: skip
            child = subprocess.Popen([*command, *(["--dry-run"] if args.dry_run else [])])
            reason = watch(child, pending, output, deadline)
            unfinished = [name for name in pending if not done(output, name)]
            if unfinished and (reason or child.returncode):
                reason = reason or f"its process ended with exit code {child.returncode}"
                finish(output, unfinished[0], {"status": "failed", "reason": reason, "seconds": 0})
    for name in names:
        if not done(output, name):
            finish(output, name, {"status": "left out", "reason": "the time was up", "seconds": 0})


def done(output: Path, name: str) -> bool:
    return (output / f"{name}.json").exists()


def watch(child: subprocess.Popen[bytes], names: Sequence[str], output: Path, deadline: float) -> str | None:
    """Wait for a process; kill it when a stage exceeds its limit. Returns the reason, or None if it ended by itself."""
    current, since = names[0], time.time()
    while child.poll() is None:
        time.sleep(0.2)
        unfinished = [name for name in names if not done(output, name)]
        if unfinished and unfinished[0] != current:
            current, since = unfinished[0], time.time()
        late = time.time() > deadline + GRACE
        if late or time.time() - since > STAGES[current].limit:
            child.kill()
            child.wait()
            return "still running when the time was up" if late else f"took more than {STAGES[current].limit:.0f} s"
    return None


def scratch_folder() -> Path:
    """A new temporary folder for 16 GB: in memory if there is room, because that is faster."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 24e9
    return Path(tempfile.mkdtemp(prefix="device_check_", dir=memory if roomy else None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/device_check"), help="folder for the results")
    parser.add_argument("--minutes", type=float, default=12, help="start no further stage after this time")
    parser.add_argument("--stages", default=",".join(STAGES), help="some of them, separated by commas: %(default)s")
    parser.add_argument("--clips", type=int, help="clips to rate; the samples are repeated as needed (default 192)")
    parser.add_argument("--dry-run", action="store_true", help="tiny models on the CPU, to test this script")
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.clips = args.clips or (3 if args.dry_run else 192)
    names = [name for name in STAGES if name in args.stages.split(",")]
    if unknown := set(args.stages.split(",")) - set(STAGES):
        parser.error(f"unknown stages: {', '.join(sorted(unknown))}")
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA card is available: --dry-run runs all stages with tiny models on the CPU")
    if args.scratch:
        run_here(names, Bench(args.scratch, args.dry_run, args.clips), args.output, args.deadline)
        return
    args.output.mkdir(parents=True, exist_ok=True)
    for path in record_files(args.output):
        path.unlink()
    scratch = scratch_folder()
    try:
        run_all(names, args, scratch, time.time() + 60 * args.minutes)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print((args.output / "summary.md").read_text())


if __name__ == "__main__":
    main()
