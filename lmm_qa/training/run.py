"""Fine-tune a backbone into a rater that agrees with people: LoRA, QLoRA or all weights, under accelerate.

    train(Recipe.load(Path("configs/thqa_qwen2_vl_7b_lora.yaml"), ["data.root=/data/thqa"]))

Checkpoints, mixed precision, FSDP and DeepSpeed are the business of transformers' `Trainer`; ours are the loss, what
the model sees (`lmm_qa.training.collate`) and the run directory, which becomes a rater directory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from torch import Tensor
from transformers import (
    AutoConfig,
    EvalPrediction,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations.integration_utils import get_available_reporting_integrations

from lmm_qa.atomic import replacing
from lmm_qa.defects.questions import questions
from lmm_qa.errors import ConfigError, ScoresError, TrainingError
from lmm_qa.evaluation.calibration import calibrate
from lmm_qa.evaluation.labels import Label, Pair, Score
from lmm_qa.evaluation.metrics import MIN_CLIPS, agreement, bootstrap
from lmm_qa.model.backbone import Backbone
from lmm_qa.model.calibration import Calibration
from lmm_qa.model.inputs import as_seen, count_tokens, level_tokens, patch_factor
from lmm_qa.model.levels import LevelReading, read_levels
from lmm_qa.model.loading import choose_dtype, load_processor
from lmm_qa.model.rater_config import EMBEDDED_NAME, FILE_NAME, RaterConfig, weights_fingerprint
from lmm_qa.rater import plan_rater
from lmm_qa.training import losses
from lmm_qa.training.adapters import tunable
from lmm_qa.training.collate import ADVICE, KINDS, Answers, Batch, Clip, Collate, Passes, Samples, explained
from lmm_qa.training.config import Loss, Recipe, Words
from lmm_qa.training.dataset import DatasetCheck, Seen, Splits, check, load
from lmm_qa.training.model_card import card
from lmm_qa.training.vision_cache import VisionCache

RUN_FILE = "run.json"


CURVE_FILE = "metrics.jsonl"


CHECKPOINTS = "checkpoints"


CHOICE = "srcc_plcc"


"""Which checkpoint is best: (SRCC + PLCC) / 2; the fitted curve of the main score flatters on few clips."""


OWNED = {
    *("output_dir", "run_name", "seed", "report_to", "use_cpu", "disable_tqdm", "label_names", "remove_unused_columns"),
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate"),
    *("warmup_steps", "weight_decay", "max_grad_norm", "logging_steps", "logging_strategy", "save_strategy"),
    *("save_steps", "eval_strategy", "eval_steps", "load_best_model_at_end", "metric_for_best_model"),
    *("dataloader_num_workers", "dataloader_drop_last"),
}


"""`TrainingArguments` that follow from a recipe's own keys, or from how we train."""


Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    folder: Path
    """The run directory."""
    metrics: dict[str, Any]
    """Of the best checkpoint on the validation clips, with 95% intervals; empty without validation clips."""
    interrupted_by: int | None = None
    """Number of the signal that stopped it; there is a checkpoint, and the same command goes on."""


def train(recipe: Recipe, say: Say = print) -> Outcome:
    """Train, or go on training, and leave a rater directory.

    Under `accelerate launch`, every process calls this; only the first writes and speaks.

    Args:
        say: called with each line of progress.

    Raises:
        UsageError: the recipe, its tables or the run directory cannot be used.
        ModelError: the backbone cannot be loaded, or does not fit the prompt.
        TrainingError: clips are missing or too long, or the loss is not finite.
    """
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=12))
    speak: Say = say if state.is_main_process else lambda _: None
    run = _Run.prepare(recipe, speak, state)
    if (finished := run.finished()) is not None:
        speak(f"{run.folder} is finished: nothing to do")
        return finished
    with _alone(run.folder, state):
        return run.go(speak, state)


# --- the loss --------------------------------------------------------------------------------------------------------


class RatingTrainer(Trainer):
    """`Trainer` with our loss on the level words, our sampler, and the level logits as predictions."""

    def __init__(
        self,
        *,
        loss: Loss,
        words: Words | None,
        settings: RaterConfig,
        tokens: tuple[int, ...],
        passes: Passes,
        **options: Any,
    ):
        """
        Args:
            words: what clips are asked beside their score; None where no table tells.
        """
        super().__init__(**options)
        self.loss, self.words, self.tokens, self.passes = loss, words, list(tokens), passes
        self.anchors = torch.tensor(settings.declared_scale().anchors(len(tokens)))
        self.compute_metrics = lambda prediction: figures(prediction, self.anchors)
        self.loss_is_scaled_for_ga = False
        self.parts: dict[str, list[Tensor]] = {}
        self.names: list[str] = []
        """The clips of this process since the last step."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, *_: Any, **__: Any) -> Any:
        """Over the clips of all processes, so that pairs and correlations reach across them."""
        self.names += inputs["names"]
        ratings, answers = next_words(model, inputs)
        read = (ratings[:, self.tokens], ratings.logsumexp(-1), *_opinions(inputs, self.accelerator.device))
        count = self.accelerator.num_processes
        everyone = [self._from_all(values) for values in read] if count > 1 else list(read)
        loss, parts = weighted_loss(self.loss, self.anchors, *everyone)
        if self.words is not None:
            sums = _answer_losses(answers, inputs["answers"])[None]
            sums = (self._from_all(sums) if count > 1 else sums).sum(0) / len(everyone[0])
            for name, value in zip(KINDS, sums, strict=True):
                if asked := getattr(self.words, name):
                    parts[name] = value / asked
                    loss = loss + getattr(self.loss, name) * parts[name]
        if not torch.isfinite(loss):
            raise self._not_finite("loss", float(loss.detach()), self.state.global_step + 1)
        for name, value in parts.items():
            self.parts.setdefault(name, []).append(value.detach())
        # Each process has the gradient of its own clips alone, and theirs are averaged: together, that of the loss.
        loss = loss + (count - 1) * (loss - loss.detach())
        return (loss, None) if return_outputs else loss

    def _not_finite(self, what: str, value: float, step: int) -> TrainingError:
        return TrainingError(
            f"the {what} is {value} at step {step}, with the clips {', '.join(self.names)}: lower "
            "training.learning_rate, or look at these clips"
        )

    def _from_all(self, values: Tensor) -> Tensor:
        """The values of all processes in the order of the clips; gradients flow into our own."""
        everyone: Tensor = self.accelerator.gather(values.detach())
        parts = list(torch.split(everyone, len(values)))
        parts[self.accelerator.process_index] = values
        return torch.cat(parts)

    def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The cross-entropy, the level logits, and the MOS."""
        batch: Any = self._prepare_inputs(inputs)
        with torch.no_grad():
            logits, _normalizer = read_level_logits(model, batch, self.tokens)
            mos, std = _opinions(batch, logits.device)
            targets = losses.level_targets(mos, self.anchors, self.loss.target, std)
            return losses.cross_entropy(logits, targets), logits, mos

    def log(self, logs: dict[str, float], *rest: Any, **named: Any) -> None:
        """The parts of the loss beside their sum. Called after each step, before it can become a checkpoint."""
        if "loss" in logs:
            if not (math.isfinite(logs.get("grad_norm", 0.0)) or self.args.fp16):  # fp16 scales its gradients down
                raise self._not_finite("gradient", logs["grad_norm"], self.state.global_step)
            logs |= {name: float(torch.stack(values).mean()) for name, values in self.parts.items()}
            self.parts, self.names = {}, []
        super().log(logs, *rest, **named)

    def _get_train_sampler(self, *_: Any) -> Passes:
        return self.passes

    def floating_point_ops(self, inputs: Any) -> int:
        return 0


def _opinions(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B,) float32 MOS, and standard deviations, NaN where there is none."""
    return torch.tensor(batch["mos"], device=device), torch.tensor(batch["std"], device=device)


def next_words(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """float32 logits over the vocabulary: (B, vocabulary) at the end of the rating prompt, and (n, vocabulary) at the
    tokens of the batch's answers."""
    seen: dict[str, Any] = as_seen(batch["features"]) if batch["features"] else {}
    inputs, answers = batch["inputs"], batch["answers"]
    if answers is None:
        logits = model(**inputs, **seen, logits_to_keep=1, use_cache=False).logits[:, 0].float()
        return logits, logits[:0]
    if answers["segments"] is not None:
        inputs = _sharing(model, inputs, answers)
    logits = model(**inputs, **seen, logits_to_keep=answers["columns"], use_cache=False).logits
    row, number = answers["places"].unbind(-1)
    return logits[: len(batch["names"]), 0].float(), logits[row, number].float()


def _sharing(model: Any, inputs: Mapping[str, Tensor], answers: Answers) -> dict[str, Tensor]:
    """Inputs with the mask and the positions by which the parts of a row do not know of each other."""
    segments, back = answers["segments"], answers["back"]
    assert segments is not None and back is not None
    mask = ((segments[:, None] == 0) | (segments[:, None] == segments[:, :, None])).tril()
    knows_positions = next((module for module in model.modules() if hasattr(module, "get_rope_index")), None)
    if knows_positions is None:
        positions = inputs["attention_mask"].cumsum(-1) - 1
    else:
        positions = knows_positions.get_rope_index(**inputs)[0]
    return {**inputs, "attention_mask": mask[:, None], "position_ids": positions - back}


def _answer_losses(logits: Tensor, answers: Answers | None) -> Tensor:
    """Sum over the records of each kind."""
    if answers is None:
        return logits.new_zeros(len(KINDS))
    shares = torch.tensor(answers["shares"], device=logits.device)
    return losses.answers(logits, answers["tokens"], shares, answers["kinds"], len(KINDS))


def read_level_logits(model: Any, batch: Batch, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """(B, K) float32 logits of the level words, and (B,) logsumexp over the vocabulary."""
    logits, _ = next_words(model, batch)
    return logits[:, tokens], logits.logsumexp(-1)


def weighted_loss(
    loss: Loss, anchors: Tensor, logits: Tensor, normalizer: Tensor, mos: Tensor, std: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The recipe's loss of (B, K) level logits, and its parts without their weights."""
    anchors = anchors.to(logits.device)
    score, variance = losses.read(logits, anchors)
    targets = losses.level_targets(mos, anchors, loss.target, std)
    parts = {"cross_entropy": losses.cross_entropy(logits, targets)}
    if loss.level_mass:
        parts["level_mass"] = losses.level_mass(logits, normalizer)
    if loss.fidelity:
        parts["fidelity"] = losses.fidelity(score, variance, mos, std)
    if loss.plcc:
        parts["plcc"] = losses.plcc(score, mos)
    total = torch.stack([getattr(loss, name) * value for name, value in parts.items()]).sum()
    return total, parts


def figures(prediction: EvalPrediction, anchors: Tensor) -> dict[str, float]:
    """SRCC, KRCC, PLCC and main score of predicted level logits.

    Raises:
        TrainingError: they are not finite.
    """
    if not np.isfinite(prediction.predictions).all():
        raise TrainingError("the model's answers to validation clips are not finite: lower training.learning_rate")
    score, _ = losses.read(torch.as_tensor(prediction.predictions), anchors)
    try:
        found = agreement(score.numpy(), np.asarray(prediction.label_ids))
    except ScoresError:
        return {CHOICE: -1.0}  # constant scores say nothing: no better than the worst
    return {**found, CHOICE: (found["srcc"] + found["plcc"]) / 2}


# --- the run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """All that is decided before weights are loaded."""

    recipe: Recipe
    folder: Path
    settings: RaterConfig
    """The rater.json to be."""
    processor: Any
    clips: Mapping[str, tuple[Clip, ...]]
    """train, validation and calibration."""
    record: dict[str, Any]
    """The content of run.json."""
    batch: int
    """Clips a step, on all devices."""
    steps: int
    keeps_vision: bool
    words: Words | None
    """What clips are asked beside their score; None where no training table tells."""
    tokens: tuple[int, ...]
    limit: int

    @classmethod
    def prepare(cls, recipe: Recipe, speak: Say, state: PartialState) -> _Run:
        """Read tables, look at all clips, and refuse what cannot work."""
        folder = recipe.training.output.expanduser()
        named, known = recipe.training.arguments.keys(), {field.name for field in fields(TrainingArguments)}
        if wrong := sorted(named & OWNED | named - known):
            raise ConfigError(
                f"training.arguments: {', '.join(wrong)} cannot be set: no TrainingArguments, or such as follow "
                "from the recipe's own keys"
            )
        available: Any = get_available_reporting_integrations
        if absent := set(recipe.training.report_to) - set(available()):
            raise ConfigError(
                f"training.report_to names {', '.join(sorted(absent))}, which is not installed: install it, or leave "
                f"it out; the curves are in {folder / CURVE_FILE} anyway"
            )
        if "tensorboard" in recipe.training.report_to:
            os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")  # not among the checkpoints
        settings = recipe.rater()
        options: dict[str, Any] = {"revision": settings.revision, "trust_remote_code": recipe.model.trust_remote_code}
        processor = load_processor(str(settings.backbone), **options)
        tokens = level_tokens(processor, settings.prompt, len(settings.views))
        splits = load(recipe.data, recipe.training.seed)
        speak(str(splits))
        surveys = _survey(splits, recipe, settings, patch_factor(processor) or 1, speak, state)
        clips = {name: _readable(survey, settings.scale) for name, survey in surveys.items()}
        longest = _longest(processor, settings, surveys)
        limit = _limit(str(settings.backbone), options)
        if longest > limit:
            raise TrainingError(f"a clip takes {longest} tokens, and the model {limit}: {ADVICE}")
        speak(f"{longest} tokens for the longest clip")
        words = _words(recipe, settings, processor, clips["train"], speak)
        batch = recipe.training.clips_a_step(state.num_processes)
        steps = recipe.training.steps(len(clips["train"]), state.num_processes)
        record = {**_record(recipe, settings, splits, clips), "batch": batch}
        if state.is_main_process:
            _begin(folder, record)
        state.wait_for_everyone()
        keeps = recipe.keeps_vision(patch_factor(processor) is not None)
        return cls(recipe, folder, settings, processor, clips, record, batch, steps, keeps, words, tokens, limit)

    def finished(self) -> Outcome | None:
        """The outcome of a run that is over."""
        recorded = json.loads((self.folder / RUN_FILE).read_text(encoding="utf-8"))
        return Outcome(self.folder, recorded["metrics"]) if "metrics" in recorded else None

    def go(self, speak: Say, state: PartialState) -> Outcome:
        """Train to the end, or to a signal."""
        backbone = self.load(state.device)
        store = self.keep_vision(backbone, speak, state)
        trainer = self.trainer(tunable(backbone.model, self.recipe), backbone, store, speak)
        checkpoint = last_checkpoint(self.folder / CHECKPOINTS, state.num_processes)
        speak(f"going on from {checkpoint}" if checkpoint else f"{self.steps} steps of {self.batch} clips")
        stop = _Stop(trainer.accelerator)
        trainer.add_callback(stop)
        try:
            with stop:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except TrainingError as error:
            # From a process that makes samples it comes with that one's traceback.
            raise TrainingError(
                str(error).strip().splitlines()[-1].removeprefix("lmm_qa.errors.TrainingError: ")
            ) from None
        if stop.stopped:
            step = trainer.state.global_step
            speak(f"interrupted at step {step} of {self.steps}: the same command goes on from there")
            return Outcome(self.folder, {}, stop.signal)
        return self.finish(trainer, store, speak, state)

    def load(self, device: torch.device) -> Backbone:
        """The backbone in the number format to train in."""
        model, full = self.recipe.model, self.recipe.tuning.method == "full"
        return Backbone.load(
            str(self.settings.backbone),
            revision=self.settings.revision,
            quantization=model.quantization,
            device=str(device),
            dtype="float32" if full else model.dtype,  # trained weights need the precision; autocast gives the speed
            trust_remote_code=model.trust_remote_code,
        )

    def samples(self, split: str, store: VisionCache | None) -> Samples:
        """The clips of a split, with variations for training alone."""
        augmentation, words = (self.recipe.augmentation, self.words) if split == "train" else (None, None)
        settings, seed = self.settings, self.recipe.training.seed
        return Samples(self.clips[split], settings, self.processor, self.limit, store, augmentation, seed, words)

    def keep_vision(self, backbone: Backbone, speak: Say, state: PartialState) -> VisionCache | None:
        """Fill the store, each process its share."""
        if not self.keeps_vision:
            return None
        local = Path(str(self.settings.backbone))
        commit = getattr(backbone.model.config, "_commit_hash", None) or self.settings.revision
        weights = weights_fingerprint(local) if local.is_dir() else f"{self.settings.backbone}@{commit}"
        folder = self.recipe.training.cache.expanduser() / "vision"
        store = VisionCache(folder, f"{weights} {backbone.choices['dtype'].value}", self.settings)
        looks = [look for split in self.clips for look in self.samples(split, store).looks()]
        ours = store.missing(looks[state.process_index :: state.num_processes])
        progress = _Progress(f"vision tower, kept in {folder}", len(ours), speak)
        store.fill(ours, backbone, self.recipe.training.workers, progress.to)
        state.wait_for_everyone()
        return store

    def trainer(self, model: Any, backbone: Backbone, store: VisionCache | None, speak: Say) -> RatingTrainer:
        """Everything put together."""
        training, recipe = self.recipe.training, self.recipe
        # A pass goes on in the middle of a batch: all batches are full.
        passes = Passes(len(self.clips["train"]), self.steps * self.batch, training.seed)
        every, watched = min(training.every, self.steps), len(self.clips["validation"]) >= MIN_CLIPS
        if not watched:
            count = len(self.clips["validation"])
            speak(f"{count} validation clips are too few to choose a checkpoint by: the last one is taken")
        precision = recipe.model.dtype or choose_dtype(str(backbone.device)).value
        schedule = {"eval_steps": every, "load_best_model_at_end": True, "metric_for_best_model": CHOICE}
        options: dict[str, Any] = {
            "output_dir": str(self.folder / CHECKPOINTS),
            "num_train_epochs": 1,
            "per_device_train_batch_size": training.batch_size,
            "per_device_eval_batch_size": training.batch_size,
            "gradient_accumulation_steps": training.accumulation,
            "learning_rate": training.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": math.ceil(training.warmup * self.steps),
            "weight_decay": training.weight_decay,
            "max_grad_norm": training.max_grad_norm,
            "bf16": precision == "bfloat16",
            "fp16": precision == "float16",
            "use_cpu": backbone.device.type == "cpu",
            "logging_steps": 1,  # so that the curve does not depend on where a run was interrupted
            "save_strategy": "steps",
            "save_steps": every,
            "save_total_limit": 2,
            "eval_strategy": "steps" if watched else "no",
            **(schedule if watched else {}),
            "dataloader_num_workers": training.workers,
            "dataloader_pin_memory": backbone.device.type == "cuda",
            "remove_unused_columns": False,
            "ddp_find_unused_parameters": False,
            "label_names": ["mos"],
            "report_to": list(training.report_to) or "none",
            "run_name": self.folder.name,
            "seed": training.seed,
            "disable_tqdm": True,
        }
        try:
            arguments = TrainingArguments(**{**options, **training.arguments})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"training.arguments cannot be used: {error}") from None
        shares = backbone.shares_prefills
        if self.words is not None and shares and backbone.choices["attention"].value != "sdpa":
            backbone.model.set_attn_implementation("sdpa")  # flash-attn knows no masks but padding
        arguments._n_gpu = min(arguments.n_gpu, 1)  # a process has one GPU; else Trainer takes all, by DataParallel
        trainer = RatingTrainer(
            loss=recipe.loss,
            words=self.words,
            settings=self.settings,
            tokens=self.tokens,
            passes=passes,
            model=model,
            args=arguments,
            data_collator=Collate(self.processor, shares),
            train_dataset=self.samples("train", store),
            eval_dataset=self.samples("validation", store) if watched else None,
            processing_class=self.processor if recipe.tuning.method == "full" else None,
            callbacks=[_Curve(self.folder / CURVE_FILE, self.batch, speak)],
        )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        return trainer

    def finish(self, trainer: RatingTrainer, store: VisionCache | None, speak: Say, state: PartialState) -> Outcome:
        """Turn the run directory into a rater directory."""
        metrics = {}
        if self.clips["validation"]:
            scores = [reading.score for reading in self._predict(trainer, "validation", store)]
            mos = [clip.example.mos for clip in self.clips["validation"]]
            with suppress(ScoresError):  # too few clips for an interval, or constant scores
                found = bootstrap(scores, mos).intervals()
                metrics = {name: [round(float(value), 4) for value in found[name]] for name in found}
        calibrating = self._predict(trainer, "calibration", store) if self.clips["calibration"] else None
        trainer.save_model(str(self.folder))
        if state.is_main_process:
            with suppress(FileNotFoundError):
                (self.folder / "training_args.bin").unlink()  # a pickle; run.json says the same
            self._write(metrics, calibrating, speak)
        state.wait_for_everyone()
        return Outcome(self.folder, metrics)

    def _predict(self, trainer: RatingTrainer, split: str, store: VisionCache | None) -> list[LevelReading]:
        """Scores and stds of a split, as rating gives them."""
        logits = trainer.predict(self.samples(split, store)).predictions
        return [read_levels(row, math.inf, self.settings.declared_scale()) for row in np.asarray(logits)]

    def _write(self, metrics: dict[str, Any], calibrating: list[LevelReading] | None, speak: Say) -> None:
        """rater.json, calibration.json and the model card; then run.json says that the run is over."""
        recipe, record = self.recipe, {**self.record, "metrics": metrics}
        summary = {name: record[name] for name in ("clips", "groups", "data", "versions", "metrics")}
        base = Path(str(self.settings.backbone))
        where: dict[str, Any] = {"backbone": None, "revision": None}
        if recipe.tuning.method == "lora":
            name = EMBEDDED_NAME if recipe.model.backbone == EMBEDDED_NAME else self.settings.backbone
            weights = weights_fingerprint(base) if base.is_dir() else None
            where = {"backbone": name, "backbone_weights": weights}
        rater = self.settings.model_copy(update={"training": summary, **where})
        write_text(self.folder / FILE_NAME, rater.model_dump_json(indent=2))
        calibration = self._calibrate(calibrating, speak) if calibrating else None
        write_text(self.folder / "README.md", card(self.folder.name, rater, recipe, record, calibration))
        write_text(self.folder / RUN_FILE, json.dumps(record, indent=2))
        for checkpoint in (self.folder / CHECKPOINTS).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        speak(f"done: lmm-qa rate CLIPS --model {self.folder}")

    def _calibrate(self, readings: list[LevelReading], speak: Say) -> Calibration | None:
        model = self.recipe.model
        rater_id = plan_rater(self.folder, dtype=model.dtype, quantization=model.quantization).raw_rater_id
        pairs = [
            Pair(
                Label(clip.example.name, clip.example.mos, clip.example.group),
                Score(
                    clip.example.name,
                    reading.score,
                    std=reading.std,
                    scale=self.settings.scale,
                    content_id=clip.content_id,
                    rater_id=rater_id,
                ),
            )
            for clip, reading in zip(self.clips["calibration"], readings, strict=True)
        ]
        try:
            calibration = calibrate(pairs)
        except (ScoresError, ConfigError) as error:
            speak(f"not calibrated: {error}")
            return None
        calibration.write(self.folder)
        return calibration


def _survey(
    splits: Splits, recipe: Recipe, settings: RaterConfig, factor: int, speak: Say, state: PartialState
) -> dict[str, DatasetCheck]:
    """Look at every clip; each process decodes its share, and tells the others."""
    training = recipe.training
    everything = (*splits.train, *splits.validation, *splits.calibration)
    ours = everything[state.process_index :: state.num_processes]
    first = check(
        ours,
        settings.sampling,
        settings.views,
        factor,
        cache=training.cache.expanduser(),
        workers=training.workers,
        progress=_Progress("reading clips", len(ours), speak).to,
    )
    known = dict(gather_object(list(zip(ours, first.found, strict=True))))
    parts = {"train": splits.train, "validation": splits.validation, "calibration": splits.calibration}
    surveys = {name: DatasetCheck(part, tuple(known[example] for example in part), 0) for name, part in parts.items()}
    failed = [survey for survey in surveys.values() if survey.failed]
    for survey in failed:
        speak(str(survey))
    if failed and not training.skip_unreadable:
        count = sum(len(survey.failed) for survey in failed)
        raise TrainingError(
            f"{count} of {len(everything)} clips are missing or cannot be read, the first of them "
            f"{failed[0].failed[0][0].path}: correct data.root, or leave them out with training.skip_unreadable=true"
        )
    return surveys


def _readable(survey: DatasetCheck, scale: tuple[float, float]) -> tuple[Clip, ...]:
    both = zip(survey.examples, survey.found, strict=True)
    clips = tuple(Clip(example.on(scale), found.content_id) for example, found in both if isinstance(found, Seen))
    if survey.examples and not clips:
        raise TrainingError(f"none of {len(survey.examples)} clips can be read: look at data.root")
    return clips


def _words(recipe: Recipe, settings: RaterConfig, processor: Any, clips: Sequence[Clip], speak: Say) -> Words | None:
    """What clips are asked beside their score, as far as their tables tell; refuses what cannot be asked."""
    known = sum(clip.example.found is not None for clip in clips)
    told = [clip.example for clip in clips if clip.example.explanation]
    words = Words(defects=recipe.words.defects if known else 0, explanations=recipe.words.explanations if told else 0.0)
    if words.defects:
        for question in questions().values():
            level_tokens(processor, question, len(settings.views))
    if words.explanations:
        for example in told:
            explained(example, settings.prompt)
    if not words.defects and not words.explanations:
        return None
    speak(f"of {len(clips)} training clips, {known} have known defects, and {len(told)} an explanation")
    return words


def _longest(processor: Any, settings: RaterConfig, surveys: Mapping[str, DatasetCheck]) -> int:
    """Tokens of the longest clip."""
    shapes = {found.sizes for survey in surveys.values() for found in survey.found if isinstance(found, Seen)}
    return max(
        count_tokens(processor, sizes[0][0], [(height, width) for _, height, width in sizes], settings.prompt)
        for sizes in shapes
    )


def _limit(backbone: str, options: dict[str, Any]) -> int:
    """Tokens that a model was made for."""
    config: Any = AutoConfig.from_pretrained(backbone, **options)
    return int(getattr(config.get_text_config(), "max_position_embeddings", 1 << 31))


def _record(
    recipe: Recipe, settings: RaterConfig, splits: Splits, clips: Mapping[str, tuple[Clip, ...]]
) -> dict[str, Any]:
    """What run.json says: all that the weights depend on."""
    digest = hashlib.sha256()
    for split, members in clips.items():
        for clip in members:
            example = clip.example
            digest.update(f"{split} {clip.content_id} {example.mos!r} {example.std!r}\n".encode())
            if example.found is not None or example.explanation is not None:
                digest.update(f"{example.found} {example.absent} {example.explanation!r}\n".encode())
    described = recipe.model_dump(mode="json")
    for key in ("output", "cache", "workers", "report_to", "keep_vision"):
        described["training"].pop(key)
    described["data"].pop("root")
    return {
        "recipe": described,
        "rater": settings.asked(),
        "clips": {split: len(members) for split, members in clips.items()},
        "groups": {split: len({clip.example.group for clip in members}) for split, members in clips.items()},
        "left_out": [str(one) for one in splits.left_out],
        "data": digest.hexdigest()[:16],
        "versions": {name: version(name) for name in ("lmm-qa", "torch", "transformers", "peft", "accelerate")},
    }


def _begin(folder: Path, record: dict[str, Any]) -> None:
    """Make the run directory, or make sure that it is the one of this recipe."""
    path = folder / RUN_FILE
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        keys = ("recipe", "rater", "data") if "metrics" in before else ("recipe", "rater", "data", "batch")
        changed = [key for key in keys if before.get(key) != record[key]]
        if changed:
            places = [f"{place}: {old} -> {new}" for place, old, new in _differences(before, record, changed)]
            raise ConfigError(
                f"{folder} holds a run of another recipe, other data or another number of processes "
                f"({'; '.join(places[:5])}): choose another training.output, or remove the directory to begin anew"
            )
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no run: choose another training.output")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record, indent=2))


def write_text(path: Path, text: str) -> None:
    """A whole file or none."""
    with replacing(path) as beside:
        beside.write_text(text.rstrip() + "\n" if text else "", encoding="utf-8")


def _differences(before: Any, after: Any, keys: list[str]) -> list[tuple[str, Any, Any]]:
    found = []
    for key in keys:
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            inner = [name for name in {**old, **new} if old.get(name) != new.get(name)]
            found += [(f"{key}.{place}", was, now) for place, was, now in _differences(old, new, inner)]
        else:
            found.append((key, old, new))
    return found


@contextmanager
def _alone(folder: Path, state: PartialState) -> Iterator[None]:
    """Keep other runs out of a run directory: one whose launcher was killed may live on."""
    lock = FileLock(folder / ".lock", timeout=0)
    if not state.is_main_process:
        yield
        return
    try:
        with lock:
            yield
    except Timeout:
        raise ConfigError(f"another process is training in {folder}: wait for its end, or stop it") from None


def last_checkpoint(folder: Path, processes: int = 1) -> Path | None:
    """The newest checkpoint that is whole: the Trainer writes its state last, and each process that of its chance."""
    chance = ["rng_state.pth"] if processes == 1 else [f"rng_state_{number}.pth" for number in range(processes)]
    steps = sorted((int(path.name.rpartition("-")[2]), path) for path in folder.glob("checkpoint-*"))
    for _, path in reversed(steps):
        with suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            if all((path / name).is_file() for name in chance):
                return path
    return None


# --- what the user sees ----------------------------------------------------------------------------------------------


class _Progress:
    """A line now and then for long work."""

    def __init__(self, what: str, total: int, speak: Say, seconds: float = 15.0) -> None:
        self.what, self.total, self.speak, self.seconds = what, total, speak, seconds
        self.began = self.spoke = time.monotonic()

    def to(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.spoke > self.seconds or (done == total and now - self.began > self.seconds):
            self.spoke = now
            self.speak(f"{self.what}: {done} of {total}, {now - self.began:.0f} s")


class _Curve(TrainerCallback):
    """metrics.jsonl, and a line for people."""

    def __init__(self, path: Path, batch: int, speak: Say) -> None:
        self.path, self.batch, self.speak = path, batch, speak
        self.began, self.first = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forget what was logged after the checkpoint that the run goes on from."""
        self.began, self.first = time.monotonic(), state.global_step
        if state.is_world_process_zero and self.path.exists():
            kept = []
            for line in self.path.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError):  # a full disk may have cut one off
                    kept += [line] if json.loads(line)["step"] <= state.global_step else []
            write_text(self.path, "".join(f"{line}\n" for line in kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        logs = {name: value for name, value in (logs or {}).items() if "runtime" not in name and "_per_" not in name}
        logs.pop("epoch", None)
        if not state.is_world_process_zero or not {"loss", f"eval_{CHOICE}"} & logs.keys():
            return
        row = {name.replace("eval_", "validation_"): round(value, 6) for name, value in logs.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **row}) + "\n")
        if "loss" in row and state.global_step % 10 and state.global_step < state.max_steps:
            return
        shown = [name for name in row if name in SHOWN]
        text = "  ".join(f"{name.replace('validation_', '')} {row[name]:.4g}" for name in shown)
        done, seconds = state.global_step - self.first, time.monotonic() - self.began
        speed = f"  {done * self.batch / seconds:.3g} clips/s" if done and "loss" in row else ""
        where = "" if "loss" in row else "validation  "
        self.speak(f"step {state.global_step}/{state.max_steps}  {where}{text}{speed}")


SHOWN = ("loss", "cross_entropy", "fidelity", "plcc", *KINDS, "learning_rate", "validation_main", "validation_srcc",
         "validation_plcc", "validation_loss")  # fmt: skip


class _Stop(TrainerCallback):
    """SIGTERM and Ctrl-C end the run at the next step, with a checkpoint; a second Ctrl-C at once."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.signal: int | None = None
        self.stopped = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> None:
        with suppress(ValueError):  # not in the main thread: then signals are the caller's business
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self._heard)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, frame: object) -> None:
        """Launchers and job schedulers may send SIGTERM twice, to the group and to the process."""
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(number, self.before[number])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        heard = torch.tensor(self.signal or 0, device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            heard = self.accelerator.gather(heard[None]).max()
        if int(heard) and state.global_step < state.max_steps:
            self.signal, self.stopped = int(heard), True
            control.should_save = control.should_training_stop = True
