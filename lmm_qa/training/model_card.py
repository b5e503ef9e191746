"""The model card of a run directory: what the rater is, what it was made from, how well it does, what it is not for."""

from __future__ import annotations

import re
from typing import Any

import yaml

from lmm_qa.model.calibration import Calibration
from lmm_qa.model.rater_config import RaterConfig
from lmm_qa.training.config import Recipe

CARD = """\
---
{front}---

# {name}

A video quality rater for talking heads: {backbone}, tuned ({method}) to mean opinion scores with lmm_qa.

    lmm-qa rate clips/ --model {name} -o ratings.jsonl

## What it answers

It sees {frames} frames of a clip and reads the probabilities of {levels} after "{stem}".
Scores are on [{low:g}, {high:g}]. It hears nothing: lip-sync is not judged.

## Data

{data}
Splits are by person (group), never by clip. {left_out}
Fingerprint of clips and labels: `{fingerprint}`.

## How well it does

{metrics}
{calibration}
## Training

    {tuning}
    {loss}
    {training}

Made with {versions}.

## Intended use, and limits

To rank and rate clips like those that it was tuned on. On other generators, persons, resolutions or codecs its scores
may be wrong without showing it: compare with opinions of your own first (`lmm-qa evaluate`). It must not decide about
people.
"""


def card(name: str, rater: RaterConfig, recipe: Recipe, record: dict[str, Any], calibration: Calibration | None) -> str:
    """Markdown with the front matter of the Hugging Face hub.

    Args:
        name: of the rater.
        rater: its rater.json.
        recipe: what it was tuned by.
        record: content of its run.json, with `metrics`.
        calibration: its calibration.json.
    """
    backbone = recipe.model.backbone
    adapter = recipe.tuning.method == "lora"
    tables = ", ".join(f"`{table.path}`" for table in recipe.data.train)
    counts = "; ".join(
        f"{split}: {count} clips of {record['groups'][split]} groups" for split, count in record["clips"].items()
    )
    quantized = f", backbone in {recipe.model.quantization}" if recipe.model.quantization else ""
    return CARD.format(
        front=_front(backbone, adapter),
        name=name,
        backbone=backbone,
        method=f"LoRA of rank {recipe.tuning.r}{quantized}" if adapter else "all weights",
        frames=rater.sampling.frames,
        levels=", ".join(rater.prompt.levels),
        stem=rater.prompt.stem,
        low=rater.scale[0],
        high=rater.scale[1],
        data=f"Labels: {tables}.\n{counts}.",
        left_out=" ".join(f"{one}." for one in record["left_out"]),
        fingerprint=record["data"],
        metrics=_table(record["metrics"], record["clips"]["validation"]) + _as_trained(recipe),
        calibration="\nScores are calibrated:\n\n" + _indented(calibration.summary()) if calibration else "",
        tuning=f"tuning    {recipe.tuning}",
        loss=f"loss      {recipe.loss}",
        training=f"training  {recipe.training.passes:g} passes, batch {recipe.training.batch_size}, "
        f"learning rate {recipe.training.learning_rate:g}, seed {recipe.training.seed}",
        versions=", ".join(f"{package} {number}" for package, number in record["versions"].items()),
    )


def retitled(text: str) -> str:
    """The card of an adapter as that of the model that it was merged into: the front matter made anew."""
    _, front, body = text.split("---\n", 2)
    return f"---\n{_front(yaml.safe_load(front).get('base_model'), False)}---\n{body}"


def _front(backbone: str | None, adapter: bool) -> str:
    """Front matter; a backbone that lies in a directory, or in this package, means nothing to the hub."""
    public = {"base_model": backbone} if backbone and re.fullmatch(r"[\w.-]+/[\w.-]+", backbone) else {}
    front = {
        **public,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "video-text-to-text",
        "tags": ["lmm_qa", "video-quality-assessment", "talking-head", *(["lora"] if adapter else [])],
    }
    return yaml.safe_dump(front, sort_keys=False)


def _table(metrics: dict[str, list[float]], clips: int) -> str:
    if not metrics:
        return "Not measured: there were no validation clips, or too few."
    rows = [f"| {name} | {value:.4f} | {low:.4f} to {high:.4f} |" for name, (value, low, high) in metrics.items()]
    head = "The checkpoint that did best on these clips was taken, so new clips will do a little worse."
    title = f"On the {clips} validation clips, with 95% bootstrap intervals. {head}"
    return "\n".join([title, "", "| | value | 95% |", "| --- | --- | --- |", *rows, ""])


def _as_trained(recipe: Recipe) -> str:
    bits = recipe.model.quantization
    return f"\nMeasured with the backbone in {bits}: rate with `--quantization {bits}`.\n" if bits else ""


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())
