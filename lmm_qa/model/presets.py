"""Published raters by name: which weights on the Hugging Face hub, and how they are to be asked.

Each is a YAML file in `configs/raters/`; its name is that of the file. To add one, add a file.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Literal

from pydantic import Field

from lmm_qa.config import Sampling, ScaleEnds, Settings, View
from lmm_qa.errors import ConfigError
from lmm_qa.model.prompt import DEFAULT_PROMPT, load_prompt
from lmm_qa.model.rater_config import RaterConfig


class PublishedFigure(Settings):
    """How well a rater agrees with people, as its authors published it."""

    figure: str
    """Data set, measure and value."""
    source: str
    """URL."""


class Preset(Settings):
    """A published rater."""

    description: str
    """What it is, in a few words."""
    model: str
    """Id on the hub."""
    revision: str | None = None
    """Commit on the hub, where it is known; otherwise the main branch."""
    parameters: float = Field(gt=0)
    """Number of parameters in billions."""
    license: str
    """Of the weights, as the hub states it."""
    tuned_on: str | None = None
    """Human scores that it was tuned on; None: it was not, and rates zero-shot."""
    published: tuple[PublishedFigure, ...] = ()
    checked: Literal["weights", "inputs"] = "inputs"
    """How we have checked it. `weights`: run with its published weights. `inputs`: token ids, patch grid and pixels
    equal those of an independent reference, and logits do with small random weights of its family."""
    prompt: str = DEFAULT_PROMPT
    """Name of the prompt in `prompts/`."""
    scale: ScaleEnds = (1.0, 5.0)
    """MOS of the worst and of the best level. Scores published on another scale, such as [0, 1], are linear in it."""
    sampling: Sampling = Sampling()
    views: tuple[View, ...] = Field((View(),), min_length=1, max_length=16)

    @property
    def memory(self) -> float:
        """Gigabytes that it needs, roughly: weights in 16 bits, and 1 GB for a clip."""
        return 2 * self.parameters + 1

    def settings(self) -> RaterConfig:
        """The settings of a rater with these weights."""
        return RaterConfig(prompt=load_prompt(self.prompt), scale=self.scale, sampling=self.sampling, views=self.views)


@cache
def presets() -> dict[str, Preset]:
    """All published raters by name; tuned ones first, then by size.

    Raises:
        ConfigError: a file in `configs/raters/` is invalid.
    """
    files = (resources.files("lmm_qa.config_files") / "raters").iterdir()
    found = {}
    for file in files:
        if file.name.endswith(".yaml"):
            with resources.as_file(file) as path:
                found[file.name.removesuffix(".yaml")] = Preset.read(path)
    return dict(sorted(found.items(), key=lambda item: (item[1].tuned_on is None, item[1].parameters, item[0])))


def find_preset(name: str) -> tuple[str, Preset] | None:
    """Name and preset of a published rater, given its name or its id on the hub; None if there is none."""
    for known, preset in presets().items():
        if name == known or name.lower() == preset.model.lower():
            return known, preset
    return None


def get_preset(name: str) -> Preset:
    """The preset of a published rater.

    Raises:
        ConfigError: there is no such rater.
    """
    found = find_preset(name)
    if found is None:
        raise ConfigError(f"no published rater is called {name!r}; known: {', '.join(presets())}")
    return found[1]
