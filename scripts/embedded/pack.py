"""Turn the trained weights into what ships with the package: base and adapter in bfloat16, and rater.json."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from lmm_qa.model.rater_config import FILE_NAME, RaterConfig
from lmm_qa.training.run import RUN_FILE


def pack_model(joint: Path, adapter: Path, out: Path, evidence_weight: float) -> None:
    """Write OUT/base (a transformers model directory) and OUT/adapter (a rater directory).

    Args:
        joint: run directory with all weights.
        adapter: run directory of the adapter on top of them.
        evidence_weight: see `embedded.classifier.evidence_weight`.
    """
    base, rater = out / "base", out / "adapter"
    rater.mkdir(parents=True, exist_ok=True)
    AutoModelForImageTextToText.from_pretrained(joint, dtype=torch.bfloat16).save_pretrained(base)
    processor: Any = AutoProcessor
    processor.from_pretrained(joint).save_pretrained(base)
    weights = {name: value.bfloat16() for name, value in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(weights, rater / "adapter_model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(adapter / "README.md", rater / "README.md")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "../base"
    (rater / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    settings = RaterConfig.read(adapter / FILE_NAME)
    training = {"recipe": "scripts/embedded/make.py", "phases": {one.name: summary(one) for one in (joint, adapter)}}
    update = {"backbone": "../base", "backbone_weights": None, "evidence_weight": evidence_weight, "training": training}
    (rater / FILE_NAME).write_text(settings.model_copy(update=update).model_dump_json(indent=2) + "\n")
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: {size / 1e6:.1f} MB")


def summary(run: Path) -> dict[str, Any]:
    """What rater.json records of a phase."""
    record = json.loads((run / RUN_FILE).read_text())
    return {name: record[name] for name in ("clips", "groups", "data", "versions", "metrics")}
