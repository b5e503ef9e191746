"""The training recipe: one YAML file that says what is tuned, on which clips, towards what, and how long.

Single values can be changed without editing the file, as `training.learning_rate=2e-4`. Knows nothing of torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from lmm_qa.config import Sampling, ScaleEnds, Settings, View
from lmm_qa.errors import ConfigError
from lmm_qa.model.prompt import Prompt, load_prompt
from lmm_qa.model.rater_config import EMBEDDED_NAME, RaterConfig, resolve_model
from lmm_qa.training.dataset import Data

CACHE = Path("~/.cache/lmm_qa")


class Model(Settings):
    """What is tuned."""

    backbone: str
    """Directory or hub id of a transformers image-text-to-text model; `embedded`: the base of the model that ships
    with the package."""
    revision: str | None = None
    """Branch, tag or commit of the backbone on the hub."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Keep the frozen weights of the language model in 4 (QLoRA, NF4) or 8 bits: less memory, not less time."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Number format; by default the one that suits the device. Trained weights are always float32."""
    trust_remote_code: bool = False
    """Run Python that comes with the backbone. Only for authors whom you trust."""


class Rating(Settings):
    """How the tuned rater asks, and what it looks at; goes into its rater.json. What is left out is as the backbone's
    own rater.json says, or by default as for any model."""

    prompt: str | Prompt | None = None
    """Name in `prompts/`, a YAML file, or the prompt itself."""
    scale: ScaleEnds | None = None
    """MOS of the worst and of the best level; by default that of the training tables, which must then agree."""
    sampling: Sampling | None = None
    """Which frames."""
    views: tuple[View, ...] | None = Field(None, min_length=1)
    """What is made of them."""

    def settings(self, backbone: RaterConfig, scale: tuple[float, float]) -> RaterConfig:
        """The content of rater.json, save the backbone.

        Raises:
            ConfigError: there is no such prompt.
        """
        return backbone.override(
            prompt=load_prompt(self.prompt) if isinstance(self.prompt, str) else self.prompt,
            scale=self.scale or scale,
            sampling=self.sampling,
            views=self.views,
        )


class Augmentation(Settings):
    """How a clip varies from pass to pass. Rating has no such chance in it."""

    paraphrases: float = Field(0.5, ge=0, le=1)
    """Share of the samples that put the question in other words, where the prompt has `paraphrases`."""
    offsets: int = Field(4, ge=1, le=64)
    """In how many ways the frames are chosen, each shifted in time against the others; 1: as in rating. With kept
    vision features each costs disk space and one more run of the vision tower."""


class Words(Settings):
    """What a clip is asked beside its score in each pass, where its table has the columns `defects` and
    `explanation`; so that one rater rates and explains. All of it shares one look at the clip, where the family can."""

    defects: int = Field(2, ge=0)
    """Closed questions on defects: half of them on what is there, as far as that goes, the rest on what is not."""
    explanations: float = Field(1.0, ge=0, le=1)
    """Share of the passes in which it is explained."""


class Tuning(Settings):
    """Which weights are trained."""

    method: Literal["lora", "full"] = "lora"
    """`lora`: low-rank adapters on the language model, the rest frozen (Hu et al., 2021). `full`: all weights of the
    language model."""
    r: int = Field(16, ge=1)
    """`lora`: rank."""
    alpha: int = Field(32, ge=1)
    """`lora`: what the adapter adds is scaled by alpha / r."""
    dropout: float = Field(0.05, ge=0, lt=1)
    """`lora`: dropout before the adapter."""
    vision: bool = False
    """Train the vision tower too: by adapters for `lora`, else all its weights."""
    merger: bool = False
    """Train what carries vision tokens into the language model too."""


class Loss(Settings):
    """What is minimised: a weighted sum, see `lmm_qa.training.losses`."""

    target: Literal["two_hot", "gaussian", "one_hot"] = "two_hot"
    """Distribution over the levels that stands for a MOS. `gaussian` needs the standard deviation of the opinions."""
    cross_entropy: float = Field(1.0, ge=0)
    """Weight of the soft cross-entropy on the level words."""
    level_mass: float = Field(0.1, ge=0)
    """Weight of -log(probability that any level word follows): keeps the answer a level."""
    fidelity: float = Field(1.0, ge=0)
    """Weight of the fidelity loss over all pairs of the batch: the order of clips."""
    plcc: float = Field(0.0, ge=0)
    """Weight of 1 - PLCC over the batch."""
    defects: float = Field(1.0, ge=0)
    """Weight of the cross-entropy on the answers to closed questions; clips that are asked none count as 0."""
    explanations: float = Field(0.3, ge=0)
    """Weight of the cross-entropy on the words of explanations; clips that have none count as 0."""

    @model_validator(mode="after")
    def _some_weight(self) -> Self:
        if not self.cross_entropy + self.fidelity + self.plcc:
            raise ValueError("one of cross_entropy, fidelity and plcc must have a weight above 0")
        return self


class Training(Settings):
    """How long, how fast, and where to."""

    output: Path
    """Run directory: becomes a rater directory. Run again, training goes on from its last checkpoint."""
    passes: float = Field(3.0, gt=0)
    """Times that each clip is seen."""
    batch_size: int = Field(8, ge=1)
    """Clips that go through the model together on one device. Pairwise losses compare the clips of all devices."""
    accumulation: int = Field(1, ge=1)
    """Batches before each step."""
    learning_rate: float = Field(1e-4, gt=0)
    """Of AdamW, at its highest."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises; then it falls as half a cosine."""
    weight_decay: float = Field(0.0, ge=0)
    """Of AdamW."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Longer gradients are scaled down to this."""
    gradient_checkpointing: bool = False
    """Calculate activations again instead of keeping them: much less memory, a third more time."""
    every: int = Field(200, ge=1)
    """Steps from one checkpoint and evaluation on the validation clips to the next. The best one is kept."""
    keep_vision: bool | None = None
    """Run the frozen vision tower once a clip and keep what it says on disk; by default wherever that can be done."""
    cache: Path = CACHE
    """Folder for what is kept between runs: vision features, and which clips are readable."""
    workers: int = Field(4, ge=1)
    """Processes that read clips, on each device."""
    skip_unreadable: bool = False
    """Train without clips that are missing or cannot be read, instead of refusing to begin."""
    report_to: tuple[str, ...] = ()
    """Where else the curves go: tensorboard, trackio, wandb, mlflow. They always go to metrics.jsonl."""
    seed: int = 0
    """Of the split, the order, the augmentation and the first adapter weights."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further `transformers.TrainingArguments`, by their own names."""

    def clips_a_step(self, processes: int) -> int:
        """On all devices."""
        return self.batch_size * self.accumulation * processes

    def steps(self, clips: int, processes: int) -> int:
        """Of a run over so many training clips."""
        return math.ceil(self.passes * clips / self.clips_a_step(processes))


class Recipe(Settings):
    """A training run, whole."""

    model: Model
    data: Data
    rating: Rating = Rating()
    tuning: Tuning = Tuning()
    augmentation: Augmentation = Augmentation()
    words: Words = Words()
    loss: Loss = Loss()
    training: Training

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.tuning.method == "full" and self.model.quantization:
            raise ValueError("quantized weights cannot be trained: use tuning.method lora, or no model.quantization")
        if self.training.keep_vision and (self.tuning.vision or self.tuning.merger):
            raise ValueError("what a vision tower says can only be kept while tower and merger are frozen")
        return self

    @classmethod
    def load(cls, path: Path, changes: Sequence[str] = ()) -> Self:
        """Read a recipe and change single values.

        Args:
            path: YAML file; paths in it are relative to the working directory. Or the name of one in `configs/`. A file
                that `extends` another one, named in the same way or relative to itself, holds only what differs.
            changes: each `section.key=value`, the value in YAML, as `training.learning_rate=2e-4`.

        Raises:
            ConfigError: the file or a change cannot be used.
        """
        values = _read(path)
        for change in changes:
            _change(values, change)
        return cls.parse(values, str(path))

    def keeps_vision(self, patch_grid: bool) -> bool:
        """Whether vision features are kept.

        Args:
            patch_grid: whether the backbone is of a family with one, see `lmm_qa.model.inputs.patch_factor`.

        Raises:
            ConfigError: they are asked for, and the family has none.
        """
        if self.training.keep_vision and not patch_grid:
            raise ConfigError("training.keep_vision: this family of models has no patch grid; leave the key out")
        frozen = not (self.tuning.vision or self.tuning.merger)
        return frozen and patch_grid and self.training.keep_vision is not False

    @property
    def scale(self) -> tuple[float, float]:
        """Of the rater.

        Raises:
            ConfigError: the tables have different ones, and `rating.scale` chooses none.
        """
        scales = {table.scale for table in self.data.train}
        if self.rating.scale is None and len(scales) > 1:
            raise ConfigError(f"the training tables have the scales {sorted(scales)}: choose with rating.scale")
        return self.rating.scale or scales.pop()

    def rater(self) -> RaterConfig:
        """The content of the run's rater.json, without what training adds.

        Raises:
            UsageError, ModelError: there is no such backbone.
            ConfigError: scale or prompt cannot be decided.
        """
        source = resolve_model(self.model.backbone, self.model.revision)
        if source.adapter is not None and source.name != EMBEDDED_NAME:
            raise ConfigError(f"model.backbone {self.model.backbone!r} is an adapter: merge it first (lmm-qa merge)")
        settings = self.rating.settings(source.settings, self.scale)
        return settings.override(backbone=source.backbone, revision=source.revision)


def _read(path: Path) -> Any:
    """Plain data of a recipe, laid over that of the one that it extends."""
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
        return _over(_read(path.parent / base if base.suffix else base), values)
    except RecursionError:
        raise ConfigError(f"{path} extends itself, by way of {base}") from None


def _over(base: Any, values: Any) -> Any:
    """`values` laid over `base`, mapping by mapping; a list is replaced whole."""
    if not (isinstance(base, dict) and isinstance(values, dict)):
        return values
    return base | {key: _over(base.get(key), value) for key, value in values.items()}


def _change(values: Any, change: str) -> None:
    """Apply `section.key=value` to plain data."""
    where, equals, text = change.partition("=")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        equals = ""
    if not equals or not where:
        raise ConfigError(f"a change is of the form section.key=value, received {change!r}")
    for name in where.split("."):
        parent = values
        try:
            place = int(name) if isinstance(values, list) else name
            values = values.setdefault(place, {}) if isinstance(values, dict) else values[place]
        except (TypeError, ValueError, IndexError):
            raise ConfigError(f"{change!r}: there is no {name!r} to change") from None
    parent[place] = value
