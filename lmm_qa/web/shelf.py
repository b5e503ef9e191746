"""The raters that a web server offers: which there are, what they are and are not, and those that are loaded."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from typing import Any

from lmm_qa.config import Sampling, View
from lmm_qa.errors import ModelError, UsageError
from lmm_qa.model.backbone import Backbone
from lmm_qa.model.presets import presets
from lmm_qa.model.rater_config import EMBEDDED_NAME
from lmm_qa.model.rater_plan import RaterPlan, plan_rater
from lmm_qa.model.served import ServedBackbone
from lmm_qa.model.source import EMBEDDED_NOTE
from lmm_qa.rater import Rater

LOADED = 2
"""Models in memory at the same time."""
MAX_FRAMES, MAX_PIXELS = 64, 1024 * 1024
"""Limits of what a visitor may ask a model to look at: frames, and pixels of each."""

_FOLDERS = re.compile(
    r"(?<![\w:/.~-])(?:~|[A-Za-z]:)?[/\\]"
    r"(?:[^\s/\\:'\"]+(?:(?: +|(?<=\w)'(?=\w))[^\s/\\:'\"]+)*(?<![(\[{<=,;])[/\\])*(?=[^\s/\\])"
)
"""The folders of a path. Their names may have spaces and apostrophes: rather cut a word too many than show a folder."""


@dataclass(frozen=True)
class RaterSettings:
    """How a rater is to rate; None: as it was made to."""

    prompt: str | None = None
    """Name of a prompt."""
    scale: tuple[float, float] | None = None
    sampling: str | None = None
    """As `lmm-qa rate --sampling`."""
    views: tuple[str, ...] = ()
    """As `lmm-qa rate --view`."""

    def options(self) -> dict[str, Any]:
        """For `lmm_qa.model.rater_plan.plan_rater`.

        Raises:
            ConfigError: sampling or view is not of the right form.
            UsageError: they ask for too much.
        """
        sampling = Sampling.from_text(self.sampling) if self.sampling else None
        views = [View.from_text(text) for text in self.views]
        if sampling and sampling.frames > MAX_FRAMES:
            raise UsageError(f"a visitor may have a model look at {MAX_FRAMES} frames, received {self.sampling}")
        for text, view in zip(self.views, views, strict=True):
            if max(view.max_pixels if view.kind == "whole" else 0, view.size**2) > MAX_PIXELS:
                raise UsageError(f"a visitor may have a model look at {MAX_PIXELS} pixels a frame, received {text}")
        if self.scale and not self.scale[0] < self.scale[1]:
            raise UsageError(f"low must be below high in the scale, received {self.scale[0]:g} {self.scale[1]:g}")
        return {"prompt": self.prompt, "scale": self.scale, "sampling": sampling, "views": views or None}

    def arguments(self) -> list[str]:
        """The same for the command line."""
        given = ["--prompt", self.prompt] if self.prompt else []
        given += ["--scale", *(f"{end:g}" for end in self.scale)] if self.scale else []
        given += ["--sampling", self.sampling] if self.sampling else []
        return given + [part for view in self.views for part in ("--view", view)]


@dataclass(frozen=True)
class About:
    """What a rater is and is not."""

    name: str
    what: str
    tuned_on: str
    published: tuple[tuple[str, str], ...] = ()
    """Figures that its authors published, and where."""
    notes: tuple[str, ...] = ()


@dataclass
class Shelf:
    """The raters that can be chosen. Each is loaded when it is first used."""

    model: str | None = None
    """Of the operator, as `lmm-qa rate --model`; offered after the embedded one, and chosen at first."""
    options: dict[str, Any] = field(default_factory=dict)
    """`lmm_qa.model.rater_plan.RaterOptions` of the operator. The settings and the device hold for all raters."""
    _loaded: dict[str, Backbone | ServedBackbone] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def names(self) -> list[tuple[str, str]]:
        """Label and name of each rater, the embedded one first. A name does not tell where a model is."""
        own = [] if self.first in (EMBEDDED_NAME, *presets()) else [(self.first, self.first)]
        published = [(f"{name} ({preset.parameters:.2g} B)", name) for name, preset in presets().items()]
        return [(EMBEDDED_NAME, EMBEDDED_NAME), *own, *published]

    @property
    def first(self) -> str:
        """Name of the one that is chosen at first."""
        return without_folders(self.model) if self.model else EMBEDDED_NAME

    def about(self, name: str) -> About:
        """What a rater is and is not; loads nothing."""
        if name == EMBEDDED_NAME:
            note = EMBEDDED_NOTE[0].upper() + EMBEDDED_NOTE[1:].partition(":")[0]
            what = "A small model of the Qwen2-VL architecture that ships with the package."
            return About(name, what, "no human scores", notes=(f"{note}.",))
        if name in presets():
            preset = presets()[name]
            figures = tuple((each.figure, each.source) for each in preset.published)
            size = f"{preset.parameters:g} billion parameters, about {preset.memory:.0f} GB of memory."
            size += f" Licence of the weights: {preset.license}."
            return About(name, f"{preset.description}.", preset.tuned_on or "no human scores", figures, (size,))
        served = "://" in name
        sent: tuple[str, ...] = ("The sampled frames of each clip are sent to this server.",) if served else ()
        what = f"{'A model on a server' if served else 'A rater'} that the operator of this page has chosen."
        return About(name, what, "see its model card", notes=sent)

    def plan(self, name: str, settings: RaterSettings) -> RaterPlan:
        """Plan a rater, as the command does.

        Raises:
            UsageError, ModelError: the settings or the rater cannot be used here.
        """
        chosen = name == self.first
        own = self.options if chosen else {}
        shared = {key: self.options.get(key) for key in ("device", "prompt", "scale", "sampling", "views")}
        given = {key: value for key, value in settings.options().items() if value is not None}
        try:
            return plan_rater(self.model if chosen else name, **{**shared, **own, **given})
        except ModelError as error:
            if name in presets():
                error = ModelError(
                    f"{error}. This page downloads nothing: run lmm-qa rate CLIP --model {name} once on its machine"
                )
            raise error from None

    def rater(self, name: str, settings: RaterSettings) -> Rater:
        """A rater that is ready; the weights are loaded if they are not in memory.

        Raises:
            UsageError, ModelError: the settings or the rater cannot be used here.
        """
        plan = self.plan(name, settings)
        with self._lock:
            if name not in self._loaded:
                while len(self._loaded) >= LOADED:
                    self._loaded.pop(next(iter(self._loaded)))
                self._loaded[name] = plan.load_backbone()
            backbone = self._loaded[name] = self._loaded.pop(name)  # the last one to go
        if isinstance(backbone, ServedBackbone):
            return Rater.from_plan(plan)  # it depends on the prompt, and loads nothing
        return Rater(backbone, plan)


def without_folders(text: str) -> str:
    """A text in which a path from the root of the file system is only its last part. Addresses are left as they are."""
    return _FOLDERS.sub("", text)
