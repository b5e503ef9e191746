"""Publish a tuned rater: model card, merging the adapter into the weights, upload to the Hugging Face hub."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from lmm_qa.errors import ModelError, UsageError
from lmm_qa.model.calibration import Calibration
from lmm_qa.model.hub import find_model
from lmm_qa.model.rater_config import DEFECTS_NAME, EMBEDDED_NAME, FILE_NAME, RaterConfig
from lmm_qa.model.rater_plan import plan_rater
from lmm_qa.model.source import resolve_model
from lmm_qa.training.config import TrainingConfig
from lmm_qa.training.legacy_files import write_legacy_files
from lmm_qa.training.merging import COPIED_FILES, merge_weights

PUBLISHED_FILES = ("README.md", "metrics.jsonl", "*.safetensors", "*.json", "*.jinja", "*.txt")

CHECKPOINT_FILES = ("*.safetensors", *COPIED_FILES)

CARD = """\
---
{front}---

# {name}

A video quality rater for talking heads: {backbone}, tuned ({method}) to mean opinion scores with lmm_qa.

    lmm-qa rate clips/ --model {name} -o ratings.jsonl

## How it works

It sees {frames} frames of a clip. The score is computed from the probabilities of {levels} after "{stem}".
Scores are on [{low:g}, {high:g}]. {sound}

## Data

{data}
Splits are by person (group), never by clip. {left_out}
Fingerprint of clips and labels: `{fingerprint}`.

## Results

{metrics}
{calibration}
## Training

    {tuning}
    {loss}
    {training}

Made with {versions}.

## Intended use and limits

To rank and rate clips like those that it was tuned on. For other generators, persons, resolutions or codecs, its scores
may be wrong without any sign of it: compare with opinions of your own first (`lmm-qa evaluate`). It must not be used to
judge people.
"""


def model_card(
    name: str, rater: RaterConfig, config: TrainingConfig, record: dict[str, Any], calibration: Calibration | None
) -> str:
    """Markdown with the front matter of the Hugging Face hub.

    Args:
        name: of the rater.
        rater: its rater.json.
        config: of its training.
        record: content of its run.json, with `metrics`.
        calibration: its calibration.json.
    """
    backbone, bits = config.model.backbone, config.model.quantization
    adapter = config.tuning.method == "lora"
    tables = ", ".join(f"`{table.path}`" for table in config.data.train)
    counts = "; ".join(
        f"{split}: {count} clips of {record['groups'][split]} groups" for split, count in record["clips"].items()
    )
    metrics = _metrics_table(record["metrics"], record["clips"]["validation"])
    if bits:
        metrics += f"\nMeasured with the backbone in {bits}, which is how it rates unless told otherwise.\n"
    summary = calibration.summary() if calibration else ""
    return CARD.format(
        front=_front_matter(backbone, adapter),
        name=name,
        backbone=backbone,
        method=f"LoRA of rank {config.tuning.r}{f', backbone in {bits}' if bits else ''}" if adapter else "all weights",
        frames=rater.sampling.frames,
        levels=", ".join(rater.prompt.levels),
        stem=rater.prompt.stem,
        low=rater.scale[0],
        high=rater.scale[1],
        sound="It also hears the sound." if rater.prompt.sound else "The score does not use the sound.",
        data=f"Labels: {tables}.\n{counts}.",
        left_out=" ".join(f"{one}." for one in record["left_out"]),
        fingerprint=record["data"],
        metrics=metrics,
        calibration="\nScores are calibrated:\n\n" + "".join(f"    {line}\n" for line in summary.splitlines())
        if summary
        else "",
        tuning=f"tuning    {config.tuning}",
        loss=f"loss      {config.loss}",
        training=f"training  {config.training.epochs:g} epochs, batch size {config.training.batch_size}, "
        f"learning rate {config.training.learning_rate:g}, seed {config.training.seed}",
        versions=", ".join(f"{package} {number}" for package, number in record["versions"].items()),
    )


def _front_matter(backbone: str | None, adapter: bool) -> str:
    """Names the backbone only if it is a hub id: a local directory means nothing to others."""
    public = {"base_model": backbone} if backbone and re.fullmatch(r"[\w.-]+/[\w.-]+", backbone) else {}
    front = {
        **public,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "video-text-to-text",
        "tags": ["lmm_qa", "video-quality-assessment", "talking-head", *(["lora"] if adapter else [])],
    }
    return yaml.safe_dump(front, sort_keys=False)


def _metrics_table(metrics: dict[str, list[float]], clips: int) -> str:
    if not metrics:
        return "Not measured: there were no validation clips, or too few."
    rows = [f"| {name} | {value:.4f} | {low:.4f} to {high:.4f} |" for name, (value, low, high) in metrics.items()]
    head = (
        f"On the {clips} validation clips, with 95% bootstrap intervals. These clips also selected the checkpoint, so "
        "expect a little less on new clips."
    )
    return "\n".join([head, "", "| | value | 95% |", "| --- | --- | --- |", *rows, ""])


def merge(rater: Path, folder: Path) -> str | None:
    """Write a rater as a plain transformers model, with its adapter merged into the weights of the checkpoint.

    The weights keep the checkpoint's dtype, names and files; the change is computed in float32. Settings are also
    written in the form that transformers 4 and what is built on it read, see `write_legacy_files`. The folder is also
    a rater directory: same prompt, frames and calibration; the same scores up to rounding to that dtype. A rater that
    was tuned on quantized weights gives slightly different scores when merged, and loses its calibration.

    Returns:
        A note for the user if a calibration was left out.

    Raises:
        UsageError: `folder` exists and is not empty, or `rater` is not a directory.
        ModelError: the rater cannot be loaded, has no adapter, or has one that cannot be merged.
    """
    source = resolve_model(rater)
    if source.adapter is None:
        raise ModelError(f"{rater} has no adapter to merge: it is a complete model already")
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty: name a new folder")
    checkpoint = Path(source.backbone)
    if not checkpoint.is_dir():
        checkpoint = find_model(source.backbone, source.revision).snapshot(CHECKPOINT_FILES)
    merge_weights(checkpoint, source.adapter, folder)
    write_legacy_files(folder)
    settings = source.settings.model_copy(
        update=dict.fromkeys(("backbone", "backbone_relative", "revision", "backbone_weights", "quantization"))
    )
    (folder / FILE_NAME).write_text(settings.model_dump_json(indent=2) + "\n", encoding="utf-8")
    if (rater / "README.md").is_file():
        card = (rater / "README.md").read_text(encoding="utf-8")
        _, front, body = card.split("---\n", 2) if card.startswith("---\n") else ("", "{}", f"\n{card}")
        front = _front_matter(yaml.safe_load(front).get("base_model"), adapter=False)
        (folder / "README.md").write_text(f"---\n{front}---\n{body}", encoding="utf-8")
    if bits := source.settings.quantization:
        fitted = [file.name for file in (source.calibration, source.defects) if file]
        reason = f"the merged weights differ a little from the {bits} ones that {rater} was tuned on"
        return f"{' and '.join(fitted)} left out, because {reason}: calibrate again" if fitted else None
    # Scores and answers are the same, so what was fitted to them holds for the merged weights as well.
    if source.defects:
        shutil.copyfile(source.defects, folder / DEFECTS_NAME)
    if calibration := plan_rater(rater, device="cpu").calibration:
        rater_id = plan_rater(folder, device="cpu").raw_rater_id
        calibration.model_copy(update={"rater_id": rater_id}).write(folder)
    return None


def push(rater: Path, repository: str, *, private: bool = False) -> str:
    """Upload a rater directory to the hub, without checkpoints.

    Args:
        repository: `user/name`; created if missing.
        private: visible to you only.

    Returns:
        The URL of the commit.

    Raises:
        UsageError: `rater` is not a directory, or others could not load it because its backbone is a local directory.
        ModelError: the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    source = resolve_model(rater)
    if not rater.is_dir():
        raise UsageError(f"{rater} is not a directory")
    if source.adapter and source.settings.backbone != EMBEDDED_NAME and Path(source.backbone).is_dir():
        raise UsageError(
            f"the backbone of {rater} is a directory of this machine, {source.backbone}: nobody else could load the "
            "adapter; merge it first (lmm-qa merge) and push the merged model"
        )
    try:
        hub = HfApi()
        hub.create_repo(repository, private=private, exist_ok=True)
        commit = hub.upload_folder(repo_id=repository, folder_path=rater, allow_patterns=list(PUBLISHED_FILES),
                                   ignore_patterns=["checkpoints/*", "run.json"])  # fmt: skip
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise ModelError(
            f"cannot upload {rater} to {repository!r}: {error}; are you logged in (hf auth login)?"
        ) from None
    return str(commit)
