"""Decide what a rater will do, before its weights are loaded.

A plan resolves the model, the settings and the calibration. That is enough to identify the ratings that it would make,
so a finished job is recognised at once, and a dry run loads no weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TypedDict, Unpack, get_args

import torch

from lmm_qa.config import Sampling, View
from lmm_qa.errors import ConfigError, ModelError, UsageError, address_in
from lmm_qa.model.backbone import Backbone
from lmm_qa.model.calibration import Calibration
from lmm_qa.model.loading import (
    Dtype,
    LoadOptions,
    Quantization,
    choose_device,
    choose_model_dtype,
    load_processor,
    requested_quantization,
)
from lmm_qa.model.prompt import Prompt, load_prompt
from lmm_qa.model.rater_config import RaterConfig
from lmm_qa.model.served import ServedBackbone, find_served, resolve_served
from lmm_qa.model.source import ModelSource, compute_rater_id, resolve_model

SERVED = "served"
"""In the place of a dtype: the server's choice."""


class SettingOptions(TypedDict, total=False):
    """Settings that replace those in the model's rater.json; None or a missing key leaves them as they are."""

    prompt: Prompt | str | Path | None
    """Name of a prompt in `prompts/`, path of a YAML file, or a `Prompt`."""
    scale: tuple[float, float] | None
    """MOS of the worst and of the best level."""
    sampling: Sampling | None
    """Which frames the model sees."""
    views: Sequence[View] | None
    """How each frame is shown: the whole picture, a crop, the face."""


class RaterOptions(SettingOptions, LoadOptions, total=False):
    """Everything that can be chosen about a rater besides the model: how it is loaded, and how it rates."""

    served_model: str | None
    """Name of the model, if `model` is the address of a server that has several."""


@dataclass(frozen=True)
class RaterPlan:
    """A rater whose weights are not loaded yet."""

    source: ModelSource
    settings: RaterConfig
    load_options: LoadOptions
    calibration: Calibration | None
    """Applied to raw scores; None if the model has none or it does not apply."""
    notes: tuple[str, ...]
    """Messages for the user: assumptions, and why a calibration is not applied."""

    @property
    def raw_rater_id(self) -> str:
        """Short hash of everything that determines a raw score: weights, prompt, scale, sampling, views, dtype."""
        return compute_rater_id(self.source, self.settings, self.dtype, self.load_options.get("quantization"))

    @property
    def rater_id(self) -> str:
        """Short hash of everything that determines a score: `raw_rater_id` and the calibration."""
        calibration = self.calibration.identity if self.calibration else None
        return compute_rater_id(
            self.source, self.settings, self.dtype, self.load_options.get("quantization"), calibration
        )

    @cached_property
    def dtype(self) -> str:
        """Dtype that the weights will be loaded in; `served` if that is up to a server."""
        if self.source.served:
            return SERVED
        return choose_model_dtype(self.source.backbone, **self.load_options).value

    @property
    def patch_factor(self) -> int | None:
        """Patch size x merge size of a model in a local directory, before its processor is loaded; None if the model is
        elsewhere or config.json does not say."""
        try:
            vision = json.loads(Path(self.source.backbone, "config.json").read_text(encoding="utf-8"))["vision_config"]
            return int(vision["patch_size"] * vision["spatial_merge_size"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def load_backbone(self) -> Backbone | ServedBackbone:
        """Load the weights, or connect to the server that has them.

        Raises:
            ModelError: they cannot be loaded, or the server cannot be used.
        """
        if self.source.served:
            processor = load_processor(self.source.backbone, **self.load_options)
            return ServedBackbone(self.source.served, processor, self.settings.prompt)
        return Backbone.load(self.source.backbone, adapter=self.source.adapter, **self.load_options)


def plan_rater(model: str | Path | None = None, **options: Unpack[RaterOptions]) -> RaterPlan:
    """Plan a rater without loading its weights.

    Args:
        model: None for the embedded model; else a rater directory, a PEFT adapter directory, a transformers model
            directory, an id on the Hugging Face hub, or the address of a server (http://HOST:PORT/v1).
        options: see `RaterOptions`. Settings that are not given come from the model's rater.json; without one: prompt
            `talking_head`, scale [1, 5], 8 uniform frames, the whole picture in at most 448 x 448 pixels.

    Raises:
        UsageError: `model` is a path without a directory, or a directory with a revision; the device is not available.
        ModelError: the directory does not contain a model.
        ConfigError: prompt, scale, rater.json or calibration.json are invalid.
    """
    prompt, views = options.get("prompt"), options.get("views")
    if url := address_in(str(model)):
        _refuse_options(options)
        source = resolve_served(find_served(url, options.get("served_model")))
    else:
        if options.get("served_model"):
            raise UsageError("--served-model needs the address of a server: --model http://HOST:PORT/v1")
        source = resolve_model(model, options.get("revision"))
    settings = source.settings.override(
        prompt=load_prompt(prompt) if isinstance(prompt, str | Path) else prompt,
        scale=options.get("scale"),
        sampling=options.get("sampling"),
        views=tuple(views) if views else None,
    )
    _check_device(options.get("device"))
    quantization, changed = _choose_quantization(source, options)
    load_options: LoadOptions = {
        "revision": source.revision,
        "quantization": quantization,
        "device": options.get("device"),
        "dtype": options.get("dtype"),
        "trust_remote_code": options.get("trust_remote_code", False),
    }
    calibration, reason = _choose_calibration(source, settings)
    notes = tuple(note for note in (source.note, changed, reason) if note)
    return RaterPlan(source, settings, load_options, calibration, notes)


def _refuse_options(options: RaterOptions) -> None:
    """Raise UsageError for options of loading weights, which a server has loaded already."""
    names = ("revision", "quantization", "device", "dtype", "trust_remote_code")
    if given := [f"--{name.replace('_', '-')}" for name in names if options.get(name)]:
        raise UsageError(f"{', '.join(given)} cannot be used with a served model: set it when you start the server")


def _choose_quantization(source: ModelSource, options: LoadOptions) -> tuple[Quantization | None, str | None]:
    """The requested quantization, or else that of the rater's training; and a note for the user if they differ."""
    tuned = None if source.served else source.settings.quantization
    if options.get("quantization") is None:
        return tuned, None
    chosen = requested_quantization(options)
    if tuned is None or chosen == tuned:
        return chosen, None
    return chosen, (
        f"{source.name} was tuned and calibrated with its backbone in {tuned}, and rates with it "
        f"{f'in {chosen}' if chosen else 'unquantized'}: scores are slightly different"
    )


def _check_device(device: str | None) -> None:
    try:
        choose_device(device)
    except ModelError as error:
        cuda = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        available = ["cpu", *cuda, *(["mps"] if torch.backends.mps.is_available() else [])]
        raise UsageError(f"{error} (available devices: {', '.join(available)})") from None


def _choose_calibration(source: ModelSource, settings: RaterConfig) -> tuple[Calibration | None, str | None]:
    """The model's calibration if it applies to these settings; else the reason why it does not, for the user."""
    path = source.calibration
    if path is None:
        return None, None
    defaults, chosen = source.settings.scoring_settings(), settings.scoring_settings()
    if changed := [key for key in chosen if chosen[key] != defaults[key]]:
        names = ", ".join(changed)
        return None, f"{path} is for the rater's own {names}, which this run changes: scores are not calibrated"
    try:
        calibration = Calibration.read(path)
    except ConfigError as error:
        raise ConfigError(f"{error}\nrun lmm-qa calibrate again, or remove the file to get raw scores") from None
    if calibration.scale != settings.scale:
        raise ConfigError(
            f"{path} has the scale {calibration.scale}, the rater {settings.scale}: set the scale of the MOS in "
            "rater.json, then rate and calibrate again; or remove the calibration to get raw scores"
        )
    if calibration.rater_id not in (None, *_rater_ids(source, settings)):
        return None, f"{path} was fitted to other weights or settings: scores are not calibrated; calibrate again"
    return calibration, None


def _rater_ids(source: ModelSource, settings: RaterConfig) -> Iterator[str]:
    """Raw rater ids of these weights in all formats: a calibration that was fitted to one holds for all."""
    if source.served:
        yield compute_rater_id(source, settings, SERVED, None)
        source = replace(source, served=None)  # the server has the weights of its directory here
        if Path(source.backbone).is_dir() and not any(Path(source.backbone).glob("*.safetensors")):
            return
    for dtype, quantization in product(get_args(Dtype), (None, *get_args(Quantization))):
        yield compute_rater_id(source, settings, dtype, quantization)
