"""Make the embedded model: from a folder of clean clips to packed weights, in one command.

    python scripts/embedded/make.py --clips CLIPS --portraits PORTRAITS --pictures PICTURES --work runs/embedded

CLIPS contains videos and `index.csv` (clip, repository, split: train / val / test); PORTRAITS, optional, photographs of
heads and `index.csv` (image, repository); PICTURES, optional, large photographs of anything else. The same command
resumes an interrupted run; finished steps are skipped. Hours on 2 cores.

Steps, and what they leave in the work folder:

    data         degraded copies with labels                     data/{train,val,test}
    features     measured features of the copies                 data/{train,val}/features.npz
    classifier   trees on these features                         classifier.safetensors
    evidence     what trees of other sources predict             data/{train,val}/evidence.jsonl
    base         tokenizer, processor and initial weights        base
    vision       vision tower alone, with dense targets          vision
    joint        all weights: lmm-qa train joint.yaml            joint
    adapter      LoRA: lmm-qa train adapter.yaml                 adapter
    pack         base and adapter in bfloat16                    model
    calibration  defect profile                                  model/adapter/defects.json
    evaluate     figures on the copies of the split test         report.json

steps.jsonl records how long each took.

On a GPU (gpu.yaml: ten minutes of an H100): prepare the data here, go on there, bring the results home.

    make.py --clips CLIPS --portraits PORTRAITS --work runs/gpu --config gpu.yaml --archive data.tar   # to `evidence`
    make.py --archive data.tar --work there --config gpu.yaml --workers 16                   # on the GPU's machine
    cp -r there/{base,vision,joint,adapter,model,answers.jsonl,steps.jsonl} runs/gpu/
    make.py --clips CLIPS --portraits PORTRAITS --work runs/gpu --config gpu.yaml                      # `evaluate`

data.tar (at most 60 MiB) has segments and labels; the copies are made again on the GPU's machine, without measuring.
"""

from __future__ import annotations

import argparse
import json
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # the modules import each other as embedded.NAME, in worker processes too

from embedded.data import TRAINING_SPLITS, ViewCache, make_data, restore_copies, write_archive  # noqa: E402

from lmm_qa.training.config import TrainingConfig  # noqa: E402
from lmm_qa.video.measurement import classifier as package_classifier  # noqa: E402


class Experiment:
    """The steps, with their paths."""

    def __init__(self, work: Path, settings: dict[str, Any], workers: int) -> None:
        self.work, self.settings, self.workers = work, settings, workers
        rating = self.phase("joint", "base").rating
        if rating.sampling is None or rating.views is None:
            raise SystemExit("joint.yaml: rating.sampling and rating.views are required")
        self.views = {
            split: ViewCache(work / "views" / split, rating.sampling, rating.views) for split in TRAINING_SPLITS
        }

    def phase(self, name: str, backbone: str) -> TrainingConfig:
        """The configuration of a phase of `lmm-qa train`."""
        overrides = {
            "model.backbone": self.work / backbone,
            "data.root": self.work / "data",
            "training.output_dir": self.work / name,
            "training.cache_dir": self.work / "cache",
            "training.num_workers": self.workers,
        }
        changes = [f"{key}={value}" for key, value in overrides.items()]
        return TrainingConfig.load(HERE / f"{name}.yaml", [*changes, *self.settings[f"{name}_phase"]])

    def step(self, name: str, result: Path, function: Callable[..., object], *arguments: object) -> None:
        """Run a step unless its result, which it writes last, exists."""
        if result.exists():
            print(f"{name}: done", flush=True)
            return
        print(f"{name} ...", flush=True)
        start = time.time()
        function(*arguments)
        with (self.work / "steps.jsonl").open("a") as file:
            file.write(json.dumps({"step": name, "seconds": round(time.time() - start, 1)}) + "\n")

    def unpack(self, archive: Path) -> None:
        """Begin with what `write_archive` wrote on another machine."""
        if not (self.work / "steps.jsonl").exists():
            with tarfile.open(archive) as files:
                files.extractall(self.work, filter="data")
        restore_copies(self.work / "data", TRAINING_SPLITS, self.workers)

    def train(self, name: str, backbone: str) -> None:
        """Run `lmm-qa train` for a phase."""
        from lmm_qa.training.run import train

        if train(self.phase(name, backbone)).interrupted_by:
            raise SystemExit(f"{name}: interrupted; the same command resumes")

    def prepare(self, clips: Path, portraits: Path | None, pictures: Path | None) -> None:
        """The steps up to `evidence`. Worker processes for data do not need torch, so it is imported late."""
        work, data, settings, workers = self.work, self.work / "data", self.settings, self.workers
        predictions = work / "predictions.jsonl"
        self.step("data", data / "test" / "table.jsonl", make_data, clips, portraits, pictures, data, settings["data"],
                  workers)  # fmt: skip
        from embedded.classifier import add_evidence, measure_copies, train_classifier

        for split in TRAINING_SPLITS:
            self.step(f"features of {split}", data / split / "features.npz", measure_copies, data / split, workers)
        self.step("classifier", work / "classifier.safetensors", train_classifier, data,
                  work / "classifier.safetensors", settings["classifier"], predictions)  # fmt: skip
        for split in TRAINING_SPLITS:
            self.step(f"evidence of {split}", data / split / "evidence.jsonl", add_evidence, data, split, predictions)

    def train_all(self) -> None:
        """The steps from `base` on."""
        from embedded.base import build_base
        from embedded.calibration import answer_questions, fit_calibration
        from embedded.classifier import evidence_weight
        from embedded.evaluate import evaluate
        from embedded.pack import pack_model
        from embedded.vision import train_vision

        work, data, model, settings, workers = (
            self.work, self.work / "data", self.work / "model", self.settings, self.workers
        )  # fmt: skip
        rater, predictions, answers = model / "adapter", work / "predictions.jsonl", work / "answers.jsonl"
        package_classifier.FILE = work / "classifier.safetensors"  # raters measure with it from here on
        self.step("base", work / "base" / "model.safetensors", build_base, settings, data / "train",
                  self.views["train"], work / "base")  # fmt: skip
        self.step("vision", work / "vision" / "model.safetensors", train_vision, work / "base", data, self.views,
                  work / "vision", settings["vision_phase"], workers)  # fmt: skip
        self.step("joint", work / "joint" / "rater.json", self.train, "joint", "vision")
        self.step("adapter", work / "adapter" / "rater.json", self.train, "adapter", "joint")
        self.step("pack", rater / "rater.json", pack_model, work / "joint", work / "adapter", model,
                  evidence_weight(data, predictions))  # fmt: skip
        self.step("answers", answers, answer_questions, rater, data / "val", answers)
        self.step("calibration", rater / "defects.json", fit_calibration, predictions, answers, rater / "defects.json")
        if (data / "test" / "labels.jsonl").exists():
            self.step("evaluate", work / "report.json", self.report, evaluate, rater)

    def report(self, evaluate: Callable[..., dict[str, Any]], rater: Path) -> None:
        """Evaluate the packed model."""
        labels = self.work / "data" / "test" / "labels.jsonl"
        report = evaluate({"new": rater}, labels, self.work / "evaluation", explain=True, workers=self.workers)
        (self.work / "report.json").write_text(json.dumps(report, indent=1) + "\n")


def read_settings(config: Path) -> dict[str, Any]:
    """model.yaml, with the sections of another file over its own."""
    settings: dict[str, Any] = yaml.safe_load((HERE / "model.yaml").read_text())
    for name, section in yaml.safe_load(config.read_text()).items():
        settings[name] = settings[name] | section if isinstance(section, dict) else section
    return settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, help="required, unless an archive is read")
    parser.add_argument("--portraits", type=Path)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=HERE / "model.yaml", help="what differs from model.yaml")
    parser.add_argument("--archive", type=Path, help="written after the step evidence; without --clips, read")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    if not args.clips and not args.archive:
        parser.error(
            "--clips is required: a folder of videos with index.csv (or --archive, to go on with prepared data)"
        )
    work: Path = args.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    experiment = Experiment(work, read_settings(args.config), args.workers)
    if args.clips:
        experiment.prepare(args.clips, args.portraits, args.pictures)
        if args.archive:
            write_archive(work, args.archive)
            return
    else:
        experiment.unpack(args.archive)
    experiment.train_all()


if __name__ == "__main__":
    main()
