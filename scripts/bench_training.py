"""Speed of training steps with cached vision features, and with pixels that go through the vision tower in every step.

    python scripts/bench_training.py -o runs/bench_training.json                          # the embedded model, on a CPU
    python scripts/bench_training.py --config DIR --random-weights    # full size, on a GPU

Both variants alternate in one run with LoRA on the language model and the same clips. Preparing the samples is timed
separately from loss, backward pass and optimizer step, because in training other processes do it. DIR contains
config.json and the files of tokenizer and processor; no weights are needed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from bench_rating import now, random_rater
from corpus import SAMPLES

from lmm_qa.manifest import content_id
from lmm_qa.model.backbone import Backbone
from lmm_qa.training.adapters import trainable_model
from lmm_qa.training.collate import Batch, LabelledClip, RatingCollator, RatingDataset
from lmm_qa.training.config import TrainingConfig
from lmm_qa.training.dataset import Example
from lmm_qa.training.trainer import level_logits, weighted_loss
from lmm_qa.training.vision_cache import VisionCache


def bench(config: TrainingConfig, backbone: Backbone, clips: list[Path], steps: int) -> dict[str, Any]:
    """Seconds per step of each variant, and peak memory on a GPU. A tower that is trained has no cached features."""
    settings, processor = config.rater_config(), backbone.processor
    with tempfile.TemporaryDirectory() as folder:
        cache = VisionCache(Path(folder), "bench", settings)
        examples = [
            LabelledClip(Example(p.name, p, 1 + n % 5, None, None, p, (1, 5)), content_id(p))
            for n, p in enumerate(clips)
        ]
        variants = {
            "pixels": RatingDataset(examples, settings, processor, 1 << 31, None),
            "cached": RatingDataset(examples, settings, processor, 1 << 31, cache),
        }
        if not config.uses_vision_cache(True):
            del variants["cached"]
        start = now()
        if "cached" in variants:
            cache.fill(variants["cached"].sampled_clips(), backbone, 2, lambda *_: None)
        per_clip = (now() - start) / len(clips)
        model = trainable_model(backbone.model, config)
        step = stepper(model, config, backbone)
        report: dict[str, Any] = {variant: {"samples": [], "step": [], "loss": []} for variant in variants}
        for number in range(steps + 1):
            for variant, samples in variants.items():
                size = config.training.batch_size
                chosen = [(number * size + place) % len(clips) for place in range(size)]
                start = now()
                batch = RatingCollator(processor)([samples[place] for place in chosen])
                prepared = now() - start
                if backbone.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                start = now()
                loss = step(batch)
                if number:  # the first one warms up
                    report[variant]["samples"].append(prepared)
                    report[variant]["step"].append(now() - start)
                    report[variant]["loss"].append(loss)
                if backbone.device.type == "cuda":
                    peak = max(report[variant].get("peak_bytes", 0), torch.cuda.max_memory_allocated())
                    report[variant]["peak_bytes"] = peak
    tokens = int(batch["inputs"]["input_ids"].shape[1])
    medians = {
        variant: {part: statistics.median(values[part]) for part in ("samples", "step")}
        for variant, values in report.items()
    }
    pixels, cached = (report.get(variant, report["pixels"])["step"] for variant in ("pixels", "cached"))
    gain = statistics.median(a / b for a, b in zip(pixels, cached, strict=True))
    return {"tokens": tokens, "batch": config.training.batch_size, "seconds_per_cached_clip": per_clip,
            "seconds": medians, "gain": gain, "runs": report}  # fmt: skip


def stepper(model: Any, config: TrainingConfig, backbone: Backbone) -> Callable[[Batch], float]:
    """Loss, backward pass and optimizer step of a batch."""
    settings = config.rater_config()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    anchors = torch.tensor(settings.declared_scale().anchors())
    tokens = list(backbone.level_tokens(settings.prompt, len(settings.views)))
    autocast = torch.autocast(backbone.device.type, torch.bfloat16, enabled=backbone.device.type == "cuda")
    model.train()

    def step(batch: Batch) -> float:
        for part in (batch["inputs"], batch["vision_features"]):
            part |= send_to_device(part, backbone.device, non_blocking=True)
        with autocast:
            logits = level_logits(model, batch, tokens)
        labels = (torch.tensor(batch[name], device=backbone.device) for name in ("mos", "std", "contents"))
        loss, _ = weighted_loss(config.loss, anchors, *logits, *labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def table(report: dict[str, Any]) -> str:
    """The report as readable text."""
    lines = [
        f"{report['tokens']} tokens per clip, batches of {report['batch']}",
        "",
        "variant   step s   samples s   peak GiB",
    ]
    for variant, seconds in report["seconds"].items():
        peak = report["runs"][variant].get("peak_bytes")
        lines.append(
            f"{variant:<8} {seconds['step']:8.3f} {seconds['samples']:11.3f} {peak / 2**30 if peak else 0:10.2f}"
        )
    lines += ["", f"cached vision features: steps {report['gain']:.2f} times as fast; caching one clip took "
              f"{report['seconds_per_cached_clip']:.3f} s, once"]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", nargs="*", type=Path, default=sorted(SAMPLES.glob("*.mp4")))
    parser.add_argument("--config", type=Path, help="directory of a model, with --random-weights without its weights")
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    config = TrainingConfig.parse(
        {
            "model": {"backbone": str(args.config or "embedded")},
            "data": {"train": [{"path": "none.csv", "scale": [1, 5]}]},
            "training": {"output_dir": "none", "batch_size": args.batch_size,
                         "gradient_checkpointing": args.gradient_checkpointing},
        },
        "the benchmark",
    )  # fmt: skip
    if args.random_weights:
        backbone = random_rater(args.config, None, None, None).backbone
    else:
        backbone = Backbone.load(str(config.rater_config().backbone))
    report = bench(config, backbone, args.clips, args.steps)
    print(table(report))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
