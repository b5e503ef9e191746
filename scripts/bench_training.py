"""How fast are training steps, with vision features that are kept and with pixels that go through the tower each time?

    python scripts/bench_training.py -o runs/bench_training.json                          # the embedded model, on a CPU
    python scripts/bench_training.py --config DIR --random-weights    # true size, on a GPU

LoRA on the language model, in one run, on the same clips, in turns: samples made from the clips, loss, backward pass
and optimizer step. Making samples is timed apart, for in training other processes do it. DIR holds config.json and the
files of tokenizer and processor; no weights are needed.
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
from bench_rating import now, random_rater
from damaged_files import SAMPLES

from lmm_qa.manifest import content_id
from lmm_qa.model.backbone import Backbone
from lmm_qa.training.adapters import trainable_model
from lmm_qa.training.collate import Batch, LabelledClip, RatingCollator, RatingDataset
from lmm_qa.training.config import TrainingConfig
from lmm_qa.training.dataset import Example
from lmm_qa.training.trainer import level_logits, weighted_loss
from lmm_qa.training.vision_cache import VisionCache


def bench(recipe: TrainingConfig, backbone: Backbone, clips: list[Path], steps: int) -> dict[str, Any]:
    """Seconds a step on both ways, and peak memory on a GPU."""
    settings, processor = recipe.rater_config(), backbone.processor
    with tempfile.TemporaryDirectory() as folder:
        store = VisionCache(Path(folder), "bench", settings)
        examples = [
            LabelledClip(Example(p.name, p, 1 + n % 5, None, None, p, (1, 5)), content_id(p))
            for n, p in enumerate(clips)
        ]
        ways = {
            "pixels": RatingDataset(examples, settings, processor, 1 << 31, None),
            "kept": RatingDataset(examples, settings, processor, 1 << 31, store),
        }
        began = now()
        store.fill(ways["kept"].sampled_clips(), backbone, 2, lambda *_: None)
        filled = (now() - began) / len(clips)
        model = trainable_model(backbone.model, recipe)
        step = stepper(model, recipe, backbone)
        report: dict[str, Any] = {way: {"samples": [], "step": [], "loss": []} for way in ways}
        for number in range(steps + 1):
            for way, samples in ways.items():
                size = recipe.training.batch_size
                chosen = [(number * size + place) % len(clips) for place in range(size)]
                began = now()
                batch = RatingCollator(processor)([samples[place] for place in chosen])
                made = now() - began
                if backbone.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                began = now()
                loss = step(batch)
                if number:  # the first one warms up
                    report[way]["samples"].append(made)
                    report[way]["step"].append(now() - began)
                    report[way]["loss"].append(loss)
                if backbone.device.type == "cuda":
                    peak = max(report[way].get("peak_bytes", 0), torch.cuda.max_memory_allocated())
                    report[way]["peak_bytes"] = peak
    tokens = int(batch["inputs"]["input_ids"].shape[1])
    medians = {
        way: {part: statistics.median(values[part]) for part in ("samples", "step")} for way, values in report.items()
    }
    gain = statistics.median(a / b for a, b in zip(report["pixels"]["step"], report["kept"]["step"], strict=True))
    return {"tokens": tokens, "batch": recipe.training.batch_size, "keeping": filled, "seconds": medians, "gain": gain,
            "runs": report}  # fmt: skip


def stepper(model: Any, recipe: TrainingConfig, backbone: Backbone) -> Callable[[Batch], float]:
    """Loss, backward pass and optimizer step of a batch."""
    settings = recipe.rater_config()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    anchors = torch.tensor(settings.declared_scale().anchors())
    tokens = list(backbone.level_tokens(settings.prompt, len(settings.views)))
    autocast = torch.autocast(backbone.device.type, torch.bfloat16, enabled=backbone.device.type == "cuda")
    model.train()

    def step(batch: Batch) -> float:
        for part in (batch["inputs"], batch["vision_features"]):
            part |= {name: value.to(backbone.device, non_blocking=True) for name, value in part.items()}
        with autocast:
            read = level_logits(model, batch, tokens)
        opinions = (torch.tensor(batch[name], device=backbone.device) for name in ("mos", "std"))
        loss, _ = weighted_loss(recipe.loss, anchors, *read, *opinions)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def table(report: dict[str, Any]) -> str:
    """For people."""
    lines = [
        f"{report['tokens']} tokens a clip, batches of {report['batch']}",
        "",
        "way       step s   samples s   peak GiB",
    ]
    for way, seconds in report["seconds"].items():
        peak = report["runs"][way].get("peak_bytes")
        lines.append(f"{way:<8} {seconds['step']:8.3f} {seconds['samples']:11.3f} {peak / 2**30 if peak else 0:10.2f}")
    lines += ["", f"kept vision features: steps {report['gain']:.2f} times as fast; keeping one clip took "
              f"{report['keeping']:.3f} s, once"]  # fmt: skip
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
    recipe = TrainingConfig.parse(
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
        backbone = Backbone.load(str(recipe.rater_config().backbone))
    report = bench(recipe, backbone, args.clips, args.steps)
    print(table(report))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
