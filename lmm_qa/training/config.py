"""The training configuration: a YAML file with the model, the data, the loss and the hyper-parameters of a run.

Single values can be overridden without editing the file, e.g. `training.learning_rate=2e-4`. Does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from lmm_qa.config import Sampling, ScaleEnds, Settings, View
from lmm_qa.errors import ConfigError
from lmm_qa.model.prompt import Prompt, load_prompt
from lmm_qa.model.rater_config import EMBEDDED_NAME, RaterConfig
from lmm_qa.model.source import resolve_model
from lmm_qa.training.dataset import Data

DEFAULT_CACHE_DIR = Path("~/.cache/lmm_qa")


RENAMED_KEYS = {
    "tuning.alpha": "tuning.lora_alpha",
    "tuning.dropout": "tuning.lora_dropout",
    "augmentation.paraphrases": "augmentation.paraphrase_probability",
    "augmentation.offsets": "augmentation.temporal_offsets",
    "words.defects": "auxiliary.defect_questions",
    "words.explanations": "auxiliary.explanation_probability",
    "loss.defects": "loss.defect_questions",
    "training.output": "training.output_dir",
    "training.passes": "training.epochs",
    "training.accumulation": "training.gradient_accumulation_steps",
    "training.warmup": "training.warmup_ratio",
    "training.every": "training.eval_steps",
    "training.keep_vision": "training.cache_vision_features",
    "training.cache": "training.cache_dir",
    "training.workers": "training.num_workers",
}
"""Keys of earlier versions and their current names. Old keys are refused; the next release drops this table."""


class ModelConfig(Settings):
    """The model to tune."""

    backbone: str
    """Directory or hub id of a transformers image-text-to-text model; `embedded`: the base of the model that ships
    with the package."""
    revision: str | None = None
    """Branch, tag or commit of the backbone on the hub."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Load the frozen weights of the language model in 4 bits (QLoRA, NF4) or 8 bits: less memory, not less time."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Number format of the frozen weights; the default depends on the device. Trained weights are always float32."""
    trust_remote_code: bool = False
    """Run Python code that comes with the backbone. Only enable it for authors you trust."""


class RatingConfig(Settings):
    """How the tuned rater prompts the model and what it shows it; becomes part of its rater.json. Keys left out keep
    the value of the backbone's own rater.json, or the general default."""

    prompt: str | Prompt | None = None
    """Name in `prompts/`, a YAML file, or the prompt itself."""
    scale: ScaleEnds | None = None
    """MOS of the worst and best level; by default the scale of the training tables, which must then agree."""
    sampling: Sampling | None = None
    """Which frames."""
    views: tuple[View, ...] | None = Field(None, min_length=1)
    """The videos made from the frames."""

    def rater_config(self, backbone: RaterConfig, scale: tuple[float, float]) -> RaterConfig:
        """The content of rater.json, except for the backbone.

        Raises:
            ConfigError: there is no such prompt.
        """
        return backbone.override(
            prompt=load_prompt(self.prompt) if isinstance(self.prompt, str) else self.prompt,
            scale=self.scale or scale,
            sampling=self.sampling,
            views=self.views,
            evidence_weight=0.0,  # the losses are those of the model's own distribution
        )


class AugmentationConfig(Settings):
    """How a clip varies from epoch to epoch. Rating itself is deterministic."""

    paraphrase_probability: float = Field(0.5, ge=0, le=1)
    """Probability of asking a paraphrased question, for prompts that have `paraphrases`."""
    temporal_offsets: int = Field(4, ge=1, le=64)
    """Number of frame selections per clip, shifted in time against each other; 1: the selection used for rating. With
    cached vision features, each selection costs disk space and one run of the vision tower."""

    evidence_dropout: float = Field(0.1, ge=0, le=1)
    """Probability that `{measured}` and `{lip_sync}` say that a clip was not measured, for prompts with these slots."""


class AuxiliaryConfig(Settings):
    """Tasks besides the score, for clips whose table has the columns `defects` and `explanation`: one adapter then
    rates, answers and explains. In model families that support it, all tasks share one prefill of the clip."""

    defect_questions: int = Field(2, ge=0)
    """Closed questions about defects per clip and epoch: half about defects that are present, if there are enough, the
    rest about absent ones."""
    explanation_probability: float = Field(1.0, ge=0, le=1)
    """Probability that a clip is explained in an epoch."""
    random_defects_probability: float = Field(0.0, ge=0, le=1)
    """Probability that an explanation is about a level and defects drawn at random, with a template sentence as the
    answer. It teaches a small model to phrase the defect list in its prompt instead of recalling training sentences."""


class TuningConfig(Settings):
    """Which weights are trained."""

    method: Literal["lora", "full"] = "lora"
    """`lora`: low-rank adapters on the language model, everything else frozen (Hu et al., 2021). `full`: all weights of
    the language model."""
    r: int = Field(16, ge=1)
    """`lora`: rank."""
    lora_alpha: int = Field(32, ge=1)
    """`lora`: the adapter's output is scaled by lora_alpha / r."""
    lora_dropout: float = Field(0.05, ge=0, lt=1)
    """`lora`: dropout in front of the adapter."""
    vision: bool = False
    """Also train the vision tower: with adapters for `lora`, all its weights for `full`."""
    merger: bool = False
    """Also train the projector between vision tower and language model."""


class LossConfig(Settings):
    """The weighted sum to minimise, see `lmm_qa.training.losses`."""

    target: Literal["two_hot", "gaussian", "one_hot"] = "two_hot"
    """Target distribution over the levels for a MOS. `gaussian` needs the standard deviation of the opinions."""
    cross_entropy: float = Field(1.0, ge=0)
    """Weight of the soft cross-entropy on the level words."""
    level_mass: float = Field(0.1, ge=0)
    """Weight of -log(probability that the next token is any level word): keeps the answer a level."""
    fidelity: float = Field(1.0, ge=0)
    """Weight of the fidelity loss over all pairs of clips in the batch: the ranking."""
    plcc: float = Field(0.0, ge=0)
    """Weight of 1 - PLCC over the batch."""
    consistency: float = Field(10.0, ge=0)
    """Weight of the squared difference between the scores of clips that show the same (column `same_as`)."""
    defect_questions: float = Field(1.0, ge=0)
    """Weight of the cross-entropy on the answers to closed questions; clips without questions count as 0."""
    explanations: float = Field(0.3, ge=0)
    """Weight of the cross-entropy on the tokens of explanations; clips without one count as 0."""

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        if not self.cross_entropy + self.fidelity + self.plcc:
            raise ValueError("one of cross_entropy, fidelity and plcc must have a weight above 0")
        return self


class RunConfig(Settings):
    """Optimisation, checkpoints and where they are written."""

    output_dir: Path
    """Run directory; becomes a rater directory. Running the same command again resumes from the last checkpoint."""
    epochs: float = Field(3.0, gt=0)
    """How often each clip is seen."""
    batch_size: int = Field(8, ge=1)
    """Clips per forward pass on one device. Pairwise losses compare the clips of all devices."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Forward passes per optimizer step."""
    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate of AdamW."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """Share of the steps with a rising learning rate; a cosine decay follows."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of AdamW."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: much less memory, a third more time."""
    eval_steps: int = Field(200, ge=1)
    """Steps between checkpoints, each evaluated on the validation clips. The best one is kept."""
    cache_vision_features: bool | None = None
    """Run the frozen vision tower once per clip and cache its output on disk; by default wherever that is possible."""
    cache_dir: Path = DEFAULT_CACHE_DIR
    """Folder shared by all runs: vision features, and which clips are known to decode."""
    num_workers: int = Field(4, ge=1)
    """Processes that decode clips, per device."""
    skip_unreadable: bool = False
    """Train without clips that are missing or cannot be decoded, instead of refusing to start."""
    report_to: tuple[str, ...] = ()
    """Further destinations of the metrics: tensorboard, trackio, wandb, mlflow. metrics.jsonl is always written."""
    seed: int = 0
    """Seed of the split, the order, the augmentation and the initial adapter weights."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further `transformers.TrainingArguments`, by their own names."""

    def clips_per_step(self, processes: int) -> int:
        """Clips of one optimizer step on all devices."""
        return self.batch_size * self.gradient_accumulation_steps * processes

    def steps(self, clips: int, processes: int) -> int:
        """Optimizer steps of a run over this number of training clips."""
        return math.ceil(self.epochs * clips / self.clips_per_step(processes))


class TrainingConfig(Settings):
    """Everything that defines a training run."""

    model: ModelConfig
    data: Data
    rating: RatingConfig = RatingConfig()
    tuning: TuningConfig = TuningConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    auxiliary: AuxiliaryConfig = AuxiliaryConfig()
    loss: LossConfig = LossConfig()
    training: RunConfig

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.tuning.method == "full" and self.model.quantization:
            raise ValueError("quantized weights cannot be trained: use tuning.method lora, or no model.quantization")
        if self.training.cache_vision_features and (self.tuning.vision or self.tuning.merger):
            raise ValueError("vision features can only be cached while the vision tower and the merger are frozen")
        return self

    @classmethod
    def parse(cls, values: object, where: str) -> Self:
        """Validate plain data; for a renamed key, the error gives the new name.

        Raises:
            ConfigError: with one line for each thing that is wrong.
        """
        if old := [f"  {key} was renamed to {RENAMED_KEYS[key]}" for key in _keys(values) if key in RENAMED_KEYS]:
            raise ConfigError("\n".join([f"{where} cannot be used:", *old]))
        return super().parse(values, where)

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file and override single values.

        Args:
            path: YAML file, in which paths are relative to the working directory; or the name of a file in `configs/`.
                A file that `extends` another one, named in the same way or relative to itself, has only what differs.
            overrides: each `section.key=value` with the value in YAML, e.g. `training.learning_rate=2e-4`.

        Raises:
            ConfigError: the file or an override is invalid.
        """
        values = _read(path)
        for override in overrides:
            _apply(values, override)
        return cls.parse(values, str(path))

    def uses_vision_cache(self, patch_grid: bool) -> bool:
        """Whether vision features are cached.

        Args:
            patch_grid: whether the backbone's family has a patch grid, see `lmm_qa.model.inputs.patch_factor`.

        Raises:
            ConfigError: caching is requested for a family without a patch grid.
        """
        if self.training.cache_vision_features and not patch_grid:
            raise ConfigError(
                "training.cache_vision_features: this model family has no patch grid, so its vision features cannot "
                "be cached; leave the key out"
            )
        frozen = not (self.tuning.vision or self.tuning.merger)
        return frozen and patch_grid and self.training.cache_vision_features is not False

    @property
    def scale(self) -> tuple[float, float]:
        """The scale of the rater: MOS of the worst and the best level.

        Raises:
            ConfigError: the tables have different scales and `rating.scale` is not set.
        """
        scales = {table.scale for table in self.data.train}
        if self.rating.scale is None and len(scales) > 1:
            raise ConfigError(f"the training tables have the scales {sorted(scales)}: choose with rating.scale")
        return self.rating.scale or scales.pop()

    def rater_config(self) -> RaterConfig:
        """The content of the run's rater.json, without what training adds to it.

        Raises:
            UsageError, ModelError: there is no such backbone.
            ConfigError: scale or prompt cannot be determined.
        """
        source = resolve_model(self.model.backbone, self.model.revision)
        if source.adapter is not None and source.name != EMBEDDED_NAME:
            raise ConfigError(f"model.backbone {self.model.backbone!r} is an adapter: merge it first (lmm-qa merge)")
        settings = self.rating.rater_config(source.settings, self.scale)
        return settings.override(backbone=source.backbone, revision=source.revision)


def _keys(values: object) -> Iterator[str]:
    """`section.key` of all keys in plain data, as far as it is well-formed."""
    for section, keys in values.items() if isinstance(values, dict) else ():
        yield from (f"{section}.{key}" for key in (keys if isinstance(keys, dict) else ()))


def _read(path: Path) -> Any:
    """Plain data of a configuration, merged over the one that it extends."""
    packaged = resources.files("lmm_qa.config_files") / f"{path}.yaml"
    try:
        text = (path if path.suffix or not packaged.is_file() else packaged).read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except OSError as error:
        files = sorted(file.name for file in resources.files("lmm_qa.config_files").iterdir())
        names = ", ".join(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))
        raise ConfigError(f"cannot read {path}: {error.strerror}; give a file, or one of {names}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict) or "extends" not in values:
        return values
    base = Path(str(values.pop("extends")))
    try:
        return _merge(_read(path.parent / base if base.suffix else base), values)
    except RecursionError:
        raise ConfigError(f"{path} extends itself, by way of {base}") from None


def _merge(base: Any, values: Any) -> Any:
    """`values` merged over `base`, mapping by mapping; a list is replaced as a whole."""
    if not (isinstance(base, dict) and isinstance(values, dict)):
        return values
    return base | {key: _merge(base.get(key), value) for key, value in values.items()}


def _apply(values: Any, override: str) -> None:
    """Apply `section.key=value` to plain data."""
    where, equals, text = override.partition("=")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        equals = ""
    if not equals or not where:
        raise ConfigError(f"an override has the form section.key=value, received {override!r}")
    for name in where.split("."):
        parent = values
        try:
            place = int(name) if isinstance(values, list) else name
            values = values.setdefault(place, {}) if isinstance(values, dict) else values[place]
        except (TypeError, ValueError, IndexError):
            raise ConfigError(f"{override!r}: there is no {name!r} to change") from None
    parent[place] = value
