"""Fine-tune a backbone into a rater that agrees with human opinion scores: LoRA, QLoRA or full, under accelerate.

    train(TrainingConfig.load(Path("configs/thqa_qwen2_vl_7b_lora.yaml"), ["data.root=/data/thqa"]))

Checkpoints, mixed precision, FSDP and DeepSpeed are handled by transformers' `Trainer` (see `lmm_qa.training.trainer`).
This module checks the data, locks the run directory, resumes, and turns it into a rater directory at the end.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from filelock import FileLock, Timeout
from transformers import AutoConfig, PrinterCallback, TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations

from lmm_qa.defects.questions import questions
from lmm_qa.errors import ConfigError, ScoresError, TrainingError
from lmm_qa.evaluation.calibration import calibrate
from lmm_qa.evaluation.labels import Label, Pair, Score
from lmm_qa.evaluation.metrics import MIN_CLIPS, bootstrap
from lmm_qa.model.backbone import Backbone
from lmm_qa.model.calibration import Calibration
from lmm_qa.model.inputs import count_tokens, level_tokens, patch_factor
from lmm_qa.model.levels import LevelReading, read_levels
from lmm_qa.model.loading import choose_dtype, choose_model_dtype, load_processor
from lmm_qa.model.rater_config import EMBEDDED_NAME, FILE_NAME, RaterConfig
from lmm_qa.model.rater_plan import plan_rater
from lmm_qa.model.source import backbone_location, weights_fingerprint
from lmm_qa.training.adapters import trainable_model
from lmm_qa.training.collate import (
    TOO_LONG_ADVICE,
    EpochSampler,
    LabelledClip,
    RatingCollator,
    RatingDataset,
    content_number,
    explanation_target,
    measures,
)
from lmm_qa.training.config import AuxiliaryConfig, TrainingConfig
from lmm_qa.training.dataset import CheckedClip, DatasetCheck, Splits, check, load
from lmm_qa.training.export import model_card
from lmm_qa.training.processes import gather_prepared, start_processes
from lmm_qa.training.trainer import BEST_METRIC, GracefulStop, Log, MetricsLogger, RatingTrainer, write_text
from lmm_qa.training.vision_cache import VisionCache

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
LOCK_FILE = ".lock"

RESERVED_ARGUMENTS = {
    *("output_dir", "run_name", "seed", "report_to", "use_cpu", "disable_tqdm", "label_names", "remove_unused_columns"),
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate"),
    *("warmup_steps", "weight_decay", "max_grad_norm", "logging_steps", "logging_strategy", "save_strategy"),
    *("save_steps", "eval_strategy", "eval_steps", "load_best_model_at_end", "metric_for_best_model"),
    *("dataloader_num_workers", "dataloader_drop_last", "activation_checkpointing", "gradient_checkpointing"),
    *("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
}
"""`TrainingArguments` that have a key of their own in the configuration, or that this module relies on."""


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended."""

    output_dir: Path
    metrics: dict[str, Any]
    """Of the best checkpoint on the validation clips, each [value, low, high] with a 95% interval; empty without
    validation clips."""
    interrupted_by: int | None = None
    """Number of the signal that stopped the run; there is a checkpoint, and the same command resumes."""


def train(config: TrainingConfig, log: Log = print) -> TrainingResult:
    """Train, or resume training; the output directory becomes a rater directory.

    Under `accelerate launch` every process calls this; only the main process writes files and logs.

    Args:
        log: called with each line of progress. (A callback rather than `accelerate.logging`, whose messages are lost
            unless the caller configures handlers.)

    Raises:
        UsageError: the configuration, its tables or the run directory cannot be used.
        ModelError: the backbone cannot be loaded, or does not fit the prompt.
        TrainingError: clips are missing or too long, or the loss is not finite.
    """
    state = start_processes()
    run = TrainingRun.prepare(config, log if state.is_main_process else lambda _: None, state)
    with run_directory_lock(run.output_dir, state):
        if state.is_main_process:
            start_record(run.output_dir, run.record)
        state.wait_for_everyone()
        recorded = json.loads((run.output_dir / RUN_FILE).read_text(encoding="utf-8"))
        if "metrics" in recorded:
            run.log(f"{run.output_dir} is finished: nothing to do")
            return TrainingResult(run.output_dir, recorded["metrics"])
        return run.train()


@dataclass(frozen=True)
class TrainingRun:
    """Everything that is known before weights are loaded."""

    config: TrainingConfig
    state: PartialState
    log: Log
    settings: RaterConfig
    """The future rater.json."""
    processor: Any
    clips: Mapping[str, tuple[LabelledClip, ...]]
    """train, validation and calibration."""
    record: dict[str, Any]
    """The content of run.json."""
    auxiliary: AuxiliaryConfig | None
    """None if no training table has defects or explanations."""
    level_ids: tuple[int, ...]
    max_tokens: int

    @property
    def output_dir(self) -> Path:
        return self.config.training.output_dir.expanduser()

    @property
    def steps(self) -> int:
        return self.config.training.steps(len(self.clips["train"]), self.state.num_processes)

    @classmethod
    def prepare(cls, config: TrainingConfig, log: Log, state: PartialState) -> TrainingRun:
        """Read tables, decode every clip once, and refuse what cannot work. Writes nothing to the run directory."""
        _check_arguments(config)
        settings = config.rater_config()
        options: dict[str, Any] = {"revision": settings.revision, "trust_remote_code": config.model.trust_remote_code}
        processor = load_processor(str(settings.backbone), **options)
        level_ids = level_tokens(processor, settings.prompt, len(settings.views))
        splits = load(config.data, config.training.seed)
        log(str(splits))
        checks = _check_clips(splits, config, settings, patch_factor(processor) or 1, log, state)
        clips = {name: _readable(checked, settings.scale) for name, checked in checks.items()}
        longest = _longest_clip(processor, settings, checks)
        max_tokens = context_length(str(settings.backbone), options)
        if longest > max_tokens:
            raise TrainingError(
                f"a clip takes {longest} tokens, the model's context is {max_tokens}: {TOO_LONG_ADVICE}"
            )
        log(f"{longest} tokens for the longest clip")
        auxiliary = available_tasks(config, settings, processor, clips["train"], log)
        record = {
            **_run_record(config, settings, splits, clips),
            "clips_per_step": config.training.clips_per_step(state.num_processes),
        }
        return cls(config, state, log, settings, processor, clips, record, auxiliary, level_ids, max_tokens)

    def train(self) -> TrainingResult:
        """Train to the end, or until a signal."""
        backbone = self.load_backbone()
        vision_cache = self.fill_vision_cache(backbone)
        gather_prepared([], self.state)  # one machine may have downloaded the backbone an hour before another
        trainer = self.build_trainer(trainable_model(backbone.model, self.config), backbone, vision_cache)
        checkpoint = last_checkpoint(self.output_dir / CHECKPOINTS, self.state.num_processes)
        per_step = self.record["clips_per_step"]
        self.log(f"resuming from {checkpoint}" if checkpoint else f"{self.steps} steps of {per_step} clips")
        stop = GracefulStop(trainer.accelerator)
        trainer.add_callback(stop)
        try:
            with stop:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except TrainingError as error:
            # An error in a data loader process arrives with that process's traceback in its message.
            message = str(error).strip().splitlines()[-1].removeprefix("lmm_qa.errors.TrainingError: ")
            raise TrainingError(message) from None
        if stop.stopped:
            self.log(f"interrupted at step {trainer.state.global_step} of {self.steps}: run the same command to resume")
            return TrainingResult(self.output_dir, {}, stop.signal)
        return self.finish(trainer, vision_cache)

    @property
    def compute_dtype(self) -> str:
        """Number format of the computation; trained weights are float32."""
        model, device = self.config.model, str(self.state.device)
        if self.config.tuning.method == "full":
            return choose_dtype(device, model.dtype).value
        return choose_model_dtype(
            str(self.settings.backbone), revision=self.settings.revision, device=device, dtype=model.dtype,
            trust_remote_code=model.trust_remote_code,
        ).value  # fmt: skip

    def load_backbone(self) -> Backbone:
        """The backbone in the number format for training."""
        model, full = self.config.model, self.config.tuning.method == "full"
        return Backbone.load(
            str(self.settings.backbone),
            revision=self.settings.revision,
            quantization=model.quantization,
            device=str(self.state.device),
            dtype="float32" if full else model.dtype,  # trained weights need the precision; autocast gives the speed
            trust_remote_code=model.trust_remote_code,
        )

    def dataset(self, split: str, vision_cache: VisionCache | None) -> RatingDataset:
        """The clips of a split; with augmentation and auxiliary examples for training only."""
        augmentation, auxiliary = (self.config.augmentation, self.auxiliary) if split == "train" else (None, None)
        return RatingDataset(
            self.clips[split],
            self.settings,
            self.processor,
            self.max_tokens,
            vision_cache,
            augmentation,
            self.config.training.seed,
            auxiliary,
        )

    def fill_vision_cache(self, backbone: Backbone) -> VisionCache | None:
        """Compute missing vision features; each process does its share."""
        if not self.config.uses_vision_cache(patch_factor(self.processor) is not None):
            return None
        local = Path(str(self.settings.backbone))
        commit = getattr(backbone.model.config, "_commit_hash", None) or self.settings.revision
        weights = weights_fingerprint(local) if local.is_dir() else f"{self.settings.backbone}@{commit}"
        folder = self.config.training.cache_dir.expanduser() / "vision"
        examples = [clip.example for clips in self.clips.values() for clip in clips]
        measure = measures(self.settings.prompt, examples)
        cache = VisionCache(folder, f"{weights} {backbone.choices['dtype'].value}", self.settings, measure)
        needed = [clip for split in self.clips for clip in self.dataset(split, cache).sampled_clips()]
        share = cache.missing(needed[self.state.process_index :: self.state.num_processes])
        progress = _Progress(f"vision features, cached in {folder}", self.log)
        cache.fill(share, backbone, self.config.training.num_workers, progress)
        return cache

    def build_trainer(self, model: Any, backbone: Backbone, vision_cache: VisionCache | None) -> RatingTrainer:
        """The trainer, ready to train."""
        config, training = self.config, self.config.training
        has_validation = len(self.clips["validation"]) >= MIN_CLIPS
        if not has_validation:
            count = len(self.clips["validation"])
            self.log(f"{count} validation clips are too few to select a checkpoint: the last one is used")
        share_prefix = backbone.can_share_prefill
        if self.auxiliary is not None and share_prefix and backbone.choices["attention"].value != "sdpa":
            backbone.model.set_attn_implementation("sdpa")  # flash-attn supports padding masks only
        # All batches are full: a batch may span two epochs.
        contents = [content_number(clip.example) for clip in self.clips["train"]]
        sampler = EpochSampler(contents, self.steps * self.record["clips_per_step"], training.seed)
        trainer = RatingTrainer(
            loss=config.loss,
            auxiliary=self.auxiliary,
            settings=self.settings,
            level_ids=self.level_ids,
            sampler=sampler,
            model=model,
            args=self._training_arguments(backbone, has_validation),
            data_collator=RatingCollator(self.processor, share_prefix),
            train_dataset=self.dataset("train", vision_cache),
            eval_dataset=self.dataset("validation", vision_cache) if has_validation else None,
            processing_class=self.processor if config.tuning.method == "full" else None,
            callbacks=[MetricsLogger(self.output_dir / METRICS_FILE, self.record["clips_per_step"], self.log)],
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _training_arguments(self, backbone: Backbone, has_validation: bool) -> TrainingArguments:
        training = self.config.training
        eval_steps = min(training.eval_steps, self.steps)
        precision = self.compute_dtype
        selection = {"eval_steps": eval_steps, "load_best_model_at_end": True, "metric_for_best_model": BEST_METRIC}
        options: dict[str, Any] = {
            "output_dir": str(self.output_dir / CHECKPOINTS),
            "num_train_epochs": 1,  # EpochSampler yields all epochs in one go
            "per_device_train_batch_size": training.batch_size,
            "per_device_eval_batch_size": training.batch_size,
            "gradient_accumulation_steps": training.gradient_accumulation_steps,
            "learning_rate": training.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": math.ceil(training.warmup_ratio * self.steps),
            "weight_decay": training.weight_decay,
            "max_grad_norm": training.max_grad_norm,
            "bf16": precision == "bfloat16",
            "fp16": precision == "float16",
            "use_cpu": backbone.device.type == "cpu",
            "logging_steps": 1,  # so that the curve does not depend on where a run was interrupted
            "save_strategy": "steps",
            "save_steps": eval_steps,
            "save_total_limit": 2,
            "eval_strategy": "steps" if has_validation else "no",
            **(selection if has_validation else {}),
            "dataloader_num_workers": training.num_workers,
            "dataloader_pin_memory": backbone.device.type == "cuda",
            "remove_unused_columns": False,
            "ddp_find_unused_parameters": False,
            "label_names": ["mos"],
            "report_to": list(training.report_to) or "none",
            "run_name": self.output_dir.name,
            "seed": training.seed,
            "disable_tqdm": True,
        }
        try:
            arguments = TrainingArguments(**{**options, **training.arguments})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"training.arguments cannot be used: {error}") from None
        arguments._n_gpu = min(arguments.n_gpu, 1)  # one GPU per process; Trainer would use DataParallel over all
        return arguments

    def finish(self, trainer: RatingTrainer, vision_cache: VisionCache | None) -> TrainingResult:
        """Evaluate, calibrate, and turn the run directory into a rater directory."""
        metrics: dict[str, list[float]] = {}
        if self.clips["validation"]:
            scores = [reading.score for reading in self._predict(trainer, "validation", vision_cache)]
            mos = [clip.example.mos for clip in self.clips["validation"]]
            with suppress(ScoresError):  # too few clips for an interval, or constant scores
                for name, interval in bootstrap(scores, mos).intervals().items():
                    metrics[name] = [round(float(x), 4) for x in (interval.value, interval.low, interval.high)]
        calibrating = self._predict(trainer, "calibration", vision_cache) if self.clips["calibration"] else None
        trainer.save_model(str(self.output_dir))
        if self.state.is_main_process:
            with suppress(FileNotFoundError):
                (self.output_dir / "training_args.bin").unlink()  # a pickle; run.json has the same content
            self._write_rater(metrics, calibrating)
        self.state.wait_for_everyone()
        return TrainingResult(self.output_dir, metrics)

    def _predict(self, trainer: RatingTrainer, split: str, vision_cache: VisionCache | None) -> list[LevelReading]:
        """Readings of a split, as in rating."""
        logits = trainer.predict(self.dataset(split, vision_cache)).predictions
        return [read_levels(row, math.inf, self.settings.declared_scale()) for row in np.asarray(logits)]

    def _write_rater(self, metrics: dict[str, Any], calibrating: list[LevelReading] | None) -> None:
        """Write rater.json, calibration.json and the model card; then run.json, which marks the run as finished."""
        folder, config, record = self.output_dir, self.config, {**self.record, "metrics": metrics}
        summary = {name: record[name] for name in ("clips", "groups", "data", "versions", "metrics")}
        summary["dtype"] = self.compute_dtype
        base = Path(str(self.settings.backbone))
        where: dict[str, Any] = {"backbone": None, "backbone_relative": None, "revision": None}
        if config.tuning.method == "lora":
            name = EMBEDDED_NAME if config.model.backbone == EMBEDDED_NAME else self.settings.backbone
            weights = weights_fingerprint(base) if base.is_dir() else None
            where = {**backbone_location(str(name), folder), "backbone_weights": weights}
        rater = self.settings.model_copy(
            update={"training": summary, "quantization": config.model.quantization, **where}
        )
        write_text(folder / FILE_NAME, rater.model_dump_json(indent=2))
        calibration = self._calibrate(calibrating) if calibrating else None
        write_text(folder / "README.md", model_card(folder.name, rater, config, record, calibration))
        write_text(folder / RUN_FILE, json.dumps(record, indent=2))
        for checkpoint in (folder / CHECKPOINTS).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        self.log(f"done: lmm-qa rate CLIPS --model {folder}")

    def _calibrate(self, readings: list[LevelReading]) -> Calibration | None:
        model, scale = self.config.model, self.settings.scale
        rater_id = plan_rater(self.output_dir, dtype=model.dtype, quantization=model.quantization).raw_rater_id
        pairs = []
        for (example, content_id), reading in zip(self.clips["calibration"], readings, strict=True):
            score = Score(
                example.name, reading.score, std=reading.std, scale=scale, content_id=content_id, rater_id=rater_id
            )
            pairs.append(Pair(Label(example.name, example.mos, example.group), score))
        try:
            calibration = calibrate(pairs)
        except (ScoresError, ConfigError) as error:
            self.log(f"not calibrated: {error}")
            return None
        calibration.write(self.output_dir)
        return calibration


# --- checks before training ------------------------------------------------------------------------------------------


def _check_arguments(config: TrainingConfig) -> None:
    """Refuse further `TrainingArguments`, loggers and launchers that cannot be used."""
    training = config.training
    given, known = training.arguments.keys(), {field.name for field in fields(TrainingArguments)}
    if wrong := sorted(given & RESERVED_ARGUMENTS | given - known):
        raise ConfigError(
            f"training.arguments: {', '.join(wrong)} cannot be set: not one of TrainingArguments, or set by a key of "
            "its own"
        )
    if config.model.quantization and (training.arguments.get("fsdp") or parse_flag_from_env("ACCELERATE_USE_FSDP")):
        raise ConfigError(
            f"FSDP cannot shard weights in {config.model.quantization} (model.quantization): leave the key out, or "
            "give each GPU the whole model with configs/accelerate/one_machine.yaml"
        )
    available: Any = get_available_reporting_integrations
    if missing := set(training.report_to) - set(available()):
        raise ConfigError(
            f"training.report_to names {', '.join(sorted(missing))}, which is not installed: install it, or leave it "
            f"out; the curves are always in {training.output_dir.expanduser() / METRICS_FILE}"
        )
    if "tensorboard" in training.report_to:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(training.output_dir.expanduser() / "tensorboard")


def _check_clips(
    splits: Splits, config: TrainingConfig, settings: RaterConfig, factor: int, log: Log, state: PartialState
) -> dict[str, DatasetCheck]:
    """Decode every clip; each process does its share and shares the results."""
    training = config.training
    everything = (*splits.train, *splits.validation, *splits.calibration)
    share = everything[state.process_index :: state.num_processes]
    checked = check(
        share,
        settings.sampling,
        settings.views,
        factor,
        cache=training.cache_dir.expanduser(),
        workers=training.num_workers,
        progress=_Progress("checking clips", log),
    )
    known = dict(gather_prepared(list(zip(share, checked.outcomes, strict=True)), state))
    parts = {"train": splits.train, "validation": splits.validation, "calibration": splits.calibration}
    checks = {name: DatasetCheck(part, tuple(known[example] for example in part), 0) for name, part in parts.items()}
    failed = [checked for checked in checks.values() if checked.failed]
    for checked in failed:
        log(str(checked))
    if failed and not training.skip_unreadable:
        count = sum(len(checked.failed) for checked in failed)
        raise TrainingError(
            f"{count} of {len(everything)} clips are missing or cannot be read, the first of them "
            f"{failed[0].failed[0][0].path}: correct data.root, or leave them out with training.skip_unreadable=true"
        )
    return checks


def _readable(checked: DatasetCheck, scale: tuple[float, float]) -> tuple[LabelledClip, ...]:
    both = zip(checked.examples, checked.outcomes, strict=True)
    clips = tuple(
        LabelledClip(example.on(scale), found.content_id) for example, found in both if isinstance(found, CheckedClip)
    )
    if checked.examples and not clips:
        raise TrainingError(f"none of {len(checked.examples)} clips can be read: check data.root")
    return clips


def available_tasks(
    config: TrainingConfig, settings: RaterConfig, processor: Any, clips: Sequence[LabelledClip], log: Log
) -> AuxiliaryConfig | None:
    """The auxiliary tasks for which the training clips have labels; None if there are none.

    Raises:
        LevelTokenError: a closed question does not fit the tokenizer.
        TrainingError: an explanation has no level word.
    """
    with_defects = sum(clip.example.found is not None for clip in clips)
    explained = [clip.example for clip in clips if clip.example.explanation]
    unavailable = {"defect_questions": with_defects, "explanation_probability": explained}
    tasks = config.auxiliary.model_copy(update={name: 0 for name, labels in unavailable.items() if not labels})
    if tasks.defect_questions:
        for question in questions().values():
            level_tokens(processor, question, len(settings.views))
    if tasks.explanation_probability:
        for example in explained:
            explanation_target(example, settings.prompt)
    if not tasks.defect_questions and not tasks.explanation_probability:
        return None
    log(f"of {len(clips)} training clips, {with_defects} have known defects, and {len(explained)} an explanation")
    return tasks


def _longest_clip(processor: Any, settings: RaterConfig, checks: Mapping[str, DatasetCheck]) -> int:
    """Tokens of the longest clip."""
    longest = dict[tuple[tuple[int, int, int], ...], float]()
    for checked in checks.values():
        for clip in checked.outcomes:
            if isinstance(clip, CheckedClip):
                longest[clip.sizes] = max(clip.seconds, longest.get(clip.sizes, 0.0))
    return max(
        count_tokens(processor, sizes[0][0], [(height, width) for _, height, width in sizes], settings.prompt, seconds)
        for sizes, seconds in longest.items()
    )


def context_length(backbone: str, options: dict[str, Any]) -> int:
    """Tokens that the model was trained to read."""
    config: Any = AutoConfig.from_pretrained(backbone, **options)
    return int(getattr(config.get_text_config(), "max_position_embeddings", 1 << 31))


# --- the run directory -----------------------------------------------------------------------------------------------


def _run_record(
    config: TrainingConfig, settings: RaterConfig, splits: Splits, clips: Mapping[str, tuple[LabelledClip, ...]]
) -> dict[str, Any]:
    """The content of run.json: everything that the weights depend on."""
    digest = hashlib.sha256()
    for split, members in clips.items():
        for clip in members:
            example = clip.example
            digest.update(f"{split} {clip.content_id} {example.mos!r} {example.std!r}\n".encode())
            if example.found is not None or example.explanation is not None:
                digest.update(f"{example.found} {example.absent} {example.explanation!r}\n".encode())
            if example.evidence is not None or example.same_as is not None:
                digest.update(f"{example.evidence} {example.same_as!r}\n".encode())
    plain = config.model_dump(mode="json")
    for key in ("output_dir", "cache_dir", "num_workers", "report_to", "cache_vision_features"):
        plain["training"].pop(key)
    plain["data"].pop("root")
    return {
        "config": plain,
        "rater": settings.scoring_settings(),
        "clips": {split: len(members) for split, members in clips.items()},
        "groups": {split: len({clip.example.group for clip in members}) for split, members in clips.items()},
        "left_out": [str(one) for one in splits.excluded],
        "data": digest.hexdigest()[:16],
        "versions": {name: version(name) for name in ("lmm-qa", "torch", "transformers", "peft", "accelerate")},
    }


@contextmanager
def run_directory_lock(folder: Path, state: PartialState) -> Iterator[None]:
    """Create the run directory and keep other runs out of it: a run whose launcher was killed may still be alive.

    Raises:
        ConfigError: another process has the lock, or the directory contains something other than a run.
    """
    if not state.is_main_process:
        yield
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names - {LOCK_FILE} and RUN_FILE not in names:
        raise ConfigError(f"{folder} is not empty and contains no run: choose another training.output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LOCK_FILE, timeout=0):
            yield
    except Timeout:
        raise ConfigError(f"another process is training in {folder}: wait until it ends, or stop it") from None


def start_record(folder: Path, record: dict[str, Any]) -> None:
    """Write run.json, or make sure that the existing one belongs to the same run. Call it with the lock held.

    Raises:
        ConfigError: the directory contains another run.
    """
    path = folder / RUN_FILE
    if not path.exists():
        write_text(path, json.dumps(record, indent=2))
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    keys = ("config", "rater", "data") if "metrics" in before else ("config", "rater", "data", "clips_per_step")
    if differences := _differences(before, record, keys):
        places = [f"{place}: {old} -> {new}" for place, old, new in differences[:5]]
        raise ConfigError(
            f"{folder} contains a run with another configuration, other data or another number of processes "
            f"({'; '.join(places)}): choose another training.output_dir, or remove the directory to start over"
        )


def _differences(before: Any, after: Any, keys: Sequence[str]) -> list[tuple[str, Any, Any]]:
    """(place, old, new) of the values that differ below these keys."""
    found: list[tuple[str, Any, Any]] = []
    for key in keys:
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += [(f"{key}.{place}", was, now) for place, was, now in _differences(old, new, [*{**old, **new}])]
        elif old != new:
            found.append((key, old, new))
    return found


def last_checkpoint(folder: Path, processes: int = 1) -> Path | None:
    """The newest complete checkpoint; None if there is none.

    Trainer writes its state last, and each process its RNG state: an incomplete checkpoint, which transformers'
    `get_last_checkpoint` would return, lacks one of these files.
    """
    rng_files = ["rng_state.pth"] if processes == 1 else [f"rng_state_{number}.pth" for number in range(processes)]
    steps = sorted((int(path.name.rpartition("-")[2]), path) for path in folder.glob("checkpoint-*"))
    for _, path in reversed(steps):
        with suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            if all((path / name).is_file() for name in rng_files):
                return path
    return None


class _Progress:
    """Logs a line every 15 seconds; readable in log files, unlike a progress bar."""

    def __init__(self, what: str, log: Log, seconds: float = 15.0) -> None:
        self.what, self.log, self.seconds = what, log, seconds
        self.start = self.last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last > self.seconds or (done == total and now - self.start > self.seconds):
            self.last = now
            self.log(f"{self.what}: {done} of {total}, {now - self.start:.0f} s")
