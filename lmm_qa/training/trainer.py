"""transformers' Trainer for raters: the loss on the level words, validation metrics, logging and graceful stop."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainerCallback

from lmm_qa.errors import ScoresError, TrainingError
from lmm_qa.evaluation.metrics import agreement
from lmm_qa.files.atomic import replacing
from lmm_qa.model import compat
from lmm_qa.model.rater_config import RaterConfig
from lmm_qa.model.weights import load_saved_weights
from lmm_qa.training import losses
from lmm_qa.training.collate import AUXILIARY_TASKS, AuxiliaryBatch, Batch, EpochSampler
from lmm_qa.training.config import AuxiliaryConfig, LossConfig

BEST_METRIC = "srcc_plcc"
"""Selects the best checkpoint: (SRCC + PLCC) / 2 without the fitted curve of the main score, which overfits few
clips."""

Log = Callable[[str], None]


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, with a newline at its end."""
    with replacing(path) as temporary:
        temporary.write_text(text.rstrip() + "\n" if text else "", encoding="utf-8")


class RatingTrainer(Trainer):
    """`Trainer` with the rating loss, `EpochSampler`, and the level logits as predictions."""

    def __init__(
        self,
        *,
        loss: LossConfig,
        auxiliary: AuxiliaryConfig | None,
        settings: RaterConfig,
        level_ids: tuple[int, ...],
        sampler: EpochSampler,
        **options: Any,
    ) -> None:
        """
        Args:
            auxiliary: None if no clip has auxiliary examples.
            level_ids: token ids of the level words, worst level first.
        """
        super().__init__(**options)
        self.loss, self.auxiliary, self.level_ids, self.sampler = loss, auxiliary, list(level_ids), sampler
        self.anchors = torch.tensor(settings.declared_scale().anchors(len(level_ids)))
        self.compute_metrics = lambda prediction: validation_metrics(prediction, self.anchors)
        self.loss_is_scaled_for_ga = False
        self.loss_parts: dict[str, list[Tensor]] = {}
        self.clip_names: list[str] = []
        """Clips of this process since the last step."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, *_: Any, **__: Any) -> Any:
        """The loss over the clips of all processes, so that pairs and correlations extend across processes."""
        self.clip_names += inputs["names"]
        ratings, answers = next_token_logits(model, inputs)
        contents = torch.tensor(inputs["contents"], device=self.accelerator.device)
        local = (ratings[:, self.level_ids], ratings.logsumexp(-1), *_labels(inputs, contents.device), contents)
        processes = self.accelerator.num_processes
        gathered = [self._gather(values) for values in local]
        loss, parts = weighted_loss(self.loss, self.anchors, *gathered)
        if self.auxiliary is not None:
            sums = self._gather(_auxiliary_losses(answers, inputs["auxiliary"])[None]).sum(0) / len(gathered[0])
            for task, total, count in zip(AUXILIARY_TASKS, sums, expected_examples(self.auxiliary), strict=True):
                if count:
                    parts[task] = total / count
                    loss = loss + getattr(self.loss, task) * parts[task]
        if not torch.isfinite(loss):
            raise self._not_finite("loss", float(loss.detach()), self.state.global_step + 1)
        for name, value in parts.items():
            self.loss_parts.setdefault(name, []).append(value.detach())
        # Gradients flow only through a process's own clips and are averaged over processes: scale them to make up.
        loss = loss + (processes - 1) * (loss - loss.detach())
        return (loss, None) if return_outputs else loss

    def _not_finite(self, what: str, value: float, step: int) -> TrainingError:
        return TrainingError(
            f"the {what} is {value} at step {step}, with the clips {', '.join(self.clip_names)}: lower "
            "training.learning_rate, or check these clips"
        )

    def _gather(self, values: Tensor) -> Tensor:
        """The values of all processes in the order of the clips; gradients flow into this process's own."""
        if self.accelerator.num_processes == 1:
            return values
        gathered: Tensor = self.accelerator.gather(values.detach())
        parts = list(torch.split(gathered, len(values)))
        parts[self.accelerator.process_index] = values
        return torch.cat(parts)

    def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The cross-entropy, the level logits and the MOS."""
        batch: Any = self._prepare_inputs(inputs)
        with torch.no_grad():
            logits = level_logits(model, batch, self.level_ids)[0]
            mos, std = _labels(batch, logits.device)
            targets = losses.level_targets(mos, self.anchors, self.loss.target, std)
            return losses.cross_entropy(logits, targets), logits, mos

    def log(self, logs: dict[str, float], *rest: Any, **named: Any) -> None:
        """Add the parts of the loss. Called after each step, before the step can become a checkpoint."""
        if "loss" in logs:
            # fp16 training skips steps with an infinite gradient and lowers its loss scale.
            if not (math.isfinite(logs.get("grad_norm", 0.0)) or self.args.fp16):
                raise self._not_finite("gradient", logs["grad_norm"], self.state.global_step)
            logs |= {name: float(torch.stack(values).mean()) for name, values in self.loss_parts.items()}
            self.loss_parts, self.clip_names = {}, []
        super().log(logs, *rest, **named)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._holds_whole_model():
            load_saved_weights(self.model if model is None else model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._holds_whole_model() and self.state.best_model_checkpoint:
            load_saved_weights(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _holds_whole_model(self) -> bool:
        """Whether checkpoints are written by the model's own `save_pretrained`, not by PEFT, FSDP or DeepSpeed."""
        return isinstance(self.model, PreTrainedModel) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _get_train_sampler(self, *_: Any) -> EpochSampler:
        return self.sampler

    def floating_point_ops(self, inputs: Any) -> int:
        return 0


def expected_examples(auxiliary: AuxiliaryConfig) -> tuple[float, float]:
    """Auxiliary examples per clip and epoch of each task in `AUXILIARY_TASKS`."""
    return auxiliary.defect_questions, auxiliary.explanation_probability


def _labels(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B,) float32 MOS and standard deviation, NaN where unknown."""
    return torch.tensor(batch["mos"], device=device), torch.tensor(batch["std"], device=device)


def next_token_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits over the vocabulary, float32: (B, vocabulary) after the rating prompt, and (n, vocabulary) where the
    tokens of auxiliary answers are predicted."""
    inputs, auxiliary, features = batch["inputs"], batch["auxiliary"], batch["vision_features"]
    vision: dict[str, Any] = compat.vision_kwargs(features, inputs) if features else {}
    if auxiliary is not None and auxiliary["segment_ids"] is not None:
        inputs = _prefix_sharing_inputs(model, inputs, auxiliary)
    inputs = compat.with_positions(model, inputs)
    if auxiliary is None:
        logits = model(**inputs, **vision, logits_to_keep=1, use_cache=False).logits[:, 0].float()
        return logits, logits[:0]
    logits = model(**inputs, **vision, logits_to_keep=auxiliary["columns"], use_cache=False).logits
    row, column = auxiliary["positions"].unbind(-1)
    return logits[: len(batch["names"]), 0].float(), logits[row, column].float()


def _prefix_sharing_inputs(model: Any, inputs: Mapping[str, Tensor], auxiliary: AuxiliaryBatch) -> dict[str, Tensor]:
    """Inputs with a mask and positions under which the segments of a row continue its prefix independently."""
    segments, offsets = auxiliary["segment_ids"], auxiliary["position_offsets"]
    assert segments is not None and offsets is not None
    mask = ((segments[:, None] == 0) | (segments[:, None] == segments[:, :, None])).tril()
    positions = compat.position_ids(model, inputs)
    return {**inputs, "attention_mask": mask[:, None], "position_ids": positions - offsets}


def _auxiliary_losses(logits: Tensor, auxiliary: AuxiliaryBatch | None) -> Tensor:
    """(tasks,) sum of the losses of the examples of each task."""
    if auxiliary is None:
        return logits.new_zeros(len(AUXILIARY_TASKS))
    weights = torch.tensor(auxiliary["weights"], device=logits.device)
    return losses.answers(logits, auxiliary["target_ids"], weights, auxiliary["tasks"], len(AUXILIARY_TASKS))


def level_logits(model: Any, batch: Batch, level_ids: list[int]) -> tuple[Tensor, Tensor]:
    """(B, K) float32 logits of the level words, and (B,) logsumexp over the vocabulary."""
    logits, _ = next_token_logits(model, batch)
    return logits[:, level_ids], logits.logsumexp(-1)


def weighted_loss(
    loss: LossConfig, anchors: Tensor, logits: Tensor, normalizer: Tensor, mos: Tensor, std: Tensor, contents: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The rating loss and its unweighted parts.

    Args:
        anchors: (K,) MOS of the levels.
        logits: (B, K) of the level words.
        normalizer: (B,) logsumexp over the vocabulary.
        mos: (B,).
        std: (B,), NaN where unknown.
        contents: (B,), see `losses.consistency`.
    """
    anchors = anchors.to(logits.device)
    score, variance = losses.score_and_variance(logits, anchors)
    targets = losses.level_targets(mos, anchors, loss.target, std)
    parts = {"cross_entropy": losses.cross_entropy(logits, targets)}
    if loss.level_mass:
        parts["level_mass"] = losses.level_mass(logits, normalizer)
    if loss.fidelity:
        parts["fidelity"] = losses.fidelity(score, variance, mos, std)
    if loss.plcc:
        parts["plcc"] = losses.plcc(score, mos)
    if loss.consistency and (contents >= 0).any():
        parts["consistency"] = losses.consistency(score, contents, anchors)
    total = torch.stack([getattr(loss, name) * value for name, value in parts.items()]).sum()
    return total, parts


def validation_metrics(prediction: EvalPrediction, anchors: Tensor) -> dict[str, float]:
    """SRCC, KRCC, PLCC and main score of predicted level logits, and `BEST_METRIC`.

    Raises:
        TrainingError: the logits are not finite.
    """
    if not np.isfinite(prediction.predictions).all():
        raise TrainingError("the model's outputs on validation clips are not finite: lower training.learning_rate")
    score, _ = losses.score_and_variance(torch.as_tensor(prediction.predictions), anchors)
    try:
        found = agreement(score.numpy(), np.asarray(prediction.label_ids))
    except ScoresError:
        return {BEST_METRIC: -1.0}  # constant scores: as bad as the worst ranking
    return {**found, BEST_METRIC: (found["srcc"] + found["plcc"]) / 2}


class MetricsLogger(TrainerCallback):
    """Writes metrics.jsonl, and a readable line every ten steps."""

    SHOWN = ("loss", "cross_entropy", "fidelity", "plcc", *AUXILIARY_TASKS, "learning_rate", "validation_main",
             "validation_srcc", "validation_plcc", "validation_loss")  # fmt: skip

    def __init__(self, path: Path, clips_per_step: int, log: Log) -> None:
        self.path, self.clips_per_step, self.log = path, clips_per_step, log
        self.start_time, self.first_step = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Drop what was logged after the checkpoint from which the run resumes."""
        self.start_time, self.first_step = time.monotonic(), state.global_step
        if state.is_world_process_zero and self.path.exists():
            earlier = []
            for line in self.path.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError):  # a line that a full disk cut off
                    earlier += [line] if json.loads(line)["step"] <= state.global_step else []
            write_text(self.path, "".join(f"{line}\n" for line in earlier))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        logs = {name: value for name, value in (logs or {}).items() if "runtime" not in name and "_per_" not in name}
        logs.pop("epoch", None)
        if not state.is_world_process_zero or not {"loss", f"eval_{BEST_METRIC}"} & logs.keys():
            return
        row = {name.replace("eval_", "validation_"): round(value, 6) for name, value in logs.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **row}) + "\n")
        training = "loss" in row
        if training and state.global_step % 10 and state.global_step < state.max_steps:
            return
        text = "  ".join(f"{name.replace('validation_', '')} {row[name]:.4g}" for name in row if name in self.SHOWN)
        steps, seconds = state.global_step - self.first_step, time.monotonic() - self.start_time
        speed = f"  {steps * self.clips_per_step / seconds:.3g} clips/s" if steps and training else ""
        self.log(f"step {state.global_step}/{state.max_steps}  {'' if training else 'validation  '}{text}{speed}")


class GracefulStop(TrainerCallback):
    """SIGTERM and Ctrl-C end training after the current step, with a checkpoint; a second Ctrl-C at once.

    Unlike transformers' `enable_jit_checkpoint` it handles Ctrl-C too, and all processes stop at the same step.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.signal: int | None = None
        self.stopped = False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        with suppress(ValueError):  # outside the main thread signals are the caller's business
            for number in (signal.SIGTERM, signal.SIGINT):
                self.previous[number] = signal.signal(number, self._handle)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        """Launchers and job schedulers may send SIGTERM twice, to the process group and to the process."""
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(number, self.previous[number])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        received = torch.tensor([self.signal or 0], device=self.accelerator.device)
        number = int(self.accelerator.gather(received).max())
        if number and state.global_step < state.max_steps:
            self.signal, self.stopped = number, True
            control.should_save = control.should_training_stop = True
