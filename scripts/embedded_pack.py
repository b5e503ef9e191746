"""Put a trained model into the package: base in bfloat16, adapter, rater.json and defects.json.

    python scripts/embedded_pack.py --run runs/embedded --data data/embedded --init runs/embedded/init

Writes lmm_qa/embedded/base (a plain transformers model directory) and lmm_qa/embedded/adapter (a rater directory).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from embedded_data import rows_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from lmm_qa.config import Sampling, View
from lmm_qa.model.rater_config import DEFECTS_NAME, EMBEDDED, FILE_NAME, RaterConfig

CARD = "README.md"  # is written by hand, and stays


def training_record(run: Path, data: Path, init: Path) -> dict[str, Any]:
    """What the weights were made from: data and its fingerprint, phases with their last figures, versions."""
    rows = rows_of(data)
    clean = {row["segment"] for row in rows if not row["causes"]}  # what training compares with, and needs
    train = [row for row in rows if row["split"] == "train" and row["segment"] in clean]
    text = json.dumps([[row["name"], row["causes"], row["strengths"], row["quality"]] for row in train])
    phases: dict[str, Any] = {}
    for line in (run / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        figures = {key: value for key, value in entry.items() if key.startswith("val_")}
        phases[entry["phase"]] = {"steps": entry["of"], **figures}
    return {
        "recipe": "scripts/embedded_model.py with configs/embedded.yaml",
        "started_from": json.loads((init / "start.json").read_text()),
        "sources": len({row["source"] for row in train}),
        "copies": len(train),
        "data_sha256": hashlib.sha256(text.encode()).hexdigest()[:16],
        "labels": "VMAF against the source; stated curves for noise and timing; ceilings for the sources",
        "phases": phases,
        "versions": {package: version(package) for package in ("torch", "transformers", "peft")},
    }


def pack_adapter(folder: Path) -> None:
    """The weights of an adapter into the package, in bfloat16."""
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({key: value.bfloat16() for key, value in weights.items()}, EMBEDDED / "adapter_model.safetensors",
              metadata={"format": "pt"})  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--init", type=Path, required=True, help="what embedded_build.py made")
    parser.add_argument("--base", default="full", help="phase whose weights become the base")
    parser.add_argument("--config", type=Path, default=Path(__file__).parent.parent / "configs" / "embedded.yaml")
    args = parser.parse_args()
    recipe = yaml.safe_load(args.config.read_text())
    base = EMBEDDED.parent / "base"
    for folder in (base, EMBEDDED):
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.iterdir():
            if file.name != CARD:
                file.unlink()
    source = args.run / args.base
    AutoModelForImageTextToText.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(base)
    for name in ("chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, base / name)

    pack_adapter(args.run / "adapter")
    config = json.loads((args.run / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "lmm_qa/embedded/base"
    (EMBEDDED / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    rater = RaterConfig(
        backbone="../base",
        sampling=Sampling(strategy="pairs", frames=12),
        views=tuple(View.from_text(view) for view in recipe["views"]),
        training=training_record(args.run, args.data, args.init),
    )
    (EMBEDDED / FILE_NAME).write_text(rater.model_dump_json(indent=2) + "\n")
    if (args.run / DEFECTS_NAME).exists():
        shutil.copyfile(args.run / DEFECTS_NAME, EMBEDDED / DEFECTS_NAME)
    for file in (*base.iterdir(), *EMBEDDED.iterdir()):
        file.chmod(0o644)
    size = sum(file.stat().st_size for file in EMBEDDED.parent.rglob("*") if file.is_file())
    print(f"{EMBEDDED.parent}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
