"""Prompts: a question about a clip, and the beginning of an answer whose next word is the level.

A prompt is a YAML file in `prompts/`. The frames come first, then the question, then the stem, which is
the beginning of the assistant's answer. The level word follows it. Knows nothing of tokenizers or models.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from lmm_qa.config import Settings
from lmm_qa.errors import ConfigError, plural
from lmm_qa.model.levels import LEVELS

SLOTS = ("seconds", "fps", "frames", "width", "height")
"""Properties of a clip that a question may contain: duration in seconds, frame rate, number of sampled frames, width
and height in pixels."""

MEASURED, LIP_SYNC = "measured", "lip_sync"
"""Further slots, for models that were tuned with them: what was measured on all frames, and the offset between lips and
sound, both in words (see `lmm_qa.video.measurement.evidence`)."""

Slots = Mapping[str, float | str]
"""Option type of the values of slots by name: numbers, and the texts of `MEASURED` and `LIP_SYNC`."""

SLOT_FORMAT = re.compile(r"(.?[<>=^])?[-+ ]?z?#?0?\d{0,2}[,_]?(\.\d{1,2})?[a-zA-Z%]?")
"""Formats of a slot: at most 99 characters and 99 digits, because a wider one is a text of any size."""

DEFAULT_PROMPT = "talking_head"

OTHER_FILES = ("defects", "explanation")
"""Files in `prompts/` that do not ask for a level."""


Frames = Literal["video", "images"]

Text = Annotated[str, Field(max_length=32_768)]
"""Option type of a text that the model reads; the context of most models is shorter."""


class Prompt(Settings):
    """One way to ask for a quality level."""

    description: str = Field("", max_length=32_768)
    """For people; the model never sees it."""
    system: Text | None = None
    """System message; without one, the model's chat template decides."""
    frames: Frames = "video"
    """How the model gets the frames of a view: as one `video`, or as separate `images`. A vision tower of the Qwen
    family merges two frames of a video into one row of tokens, and gives every image its own."""
    sound: bool = False
    """Whether the model also hears the clip: its sound, second by second between the frames of the first view. Only for
    models that take sound and frames together (Qwen2.5-Omni, Qwen3-Omni), and with the frames as one video."""
    view_labels: tuple[Text, ...] = Field((), max_length=16)
    """A text before each view, such as "A part of the picture at native resolution:"; none by default. Otherwise the
    model is not told how views differ."""
    question: Text
    """The user's message after the video(s). May use the slots in `SLOTS`, as in `{seconds:.1f}`, `{measured}` and
    `{lip_sync}`."""
    paraphrases: tuple[Text, ...] = Field((), max_length=1000)
    """The same question in other words, for training only, so that a rater does not depend on the wording."""
    stem: Text
    """The beginning of the assistant's answer; the next word is the level. It may start with a space, for models that
    were tuned so."""
    levels: tuple[Annotated[str, Field(max_length=100)], ...] = Field(LEVELS, max_length=100)
    """Level words, worst first. Each must be a single token after the stem."""

    @model_validator(mode="after")
    def _check_words(self) -> Self:
        if not self.stem.strip():
            raise ValueError("stem is empty")
        if self.stem.removeprefix(" ") != self.stem.strip():
            raise ValueError(
                f"stem ends with white space, or starts with more than a space: {self.stem!r}; the space before the "
                "level is added"
            )
        if len(self.levels) < 2 or len(set(self.levels)) != len(self.levels):
            raise ValueError(f"levels are at least two different words, worst first; received {list(self.levels)}")
        if not all(level and level == level.strip() for level in self.levels):
            raise ValueError(f"a level is a word without surrounding white space; received {list(self.levels)}")
        if self.sound and self.frames != "video":
            raise ValueError("sound is placed between the frames of a video: it needs frames: video")
        _check_question("question", self.question)
        for paraphrase in self.paraphrases:
            _check_question("paraphrase", paraphrase)
        return self

    @property
    def before_question(self) -> dict[str, Any]:
        """The options that change what comes before the question."""
        options = ("system", "frames", "sound", "view_labels")
        return {name: getattr(self, name) for name in options}

    @property
    def slots(self) -> set[str]:
        """Names of the slots that the question uses."""
        return {name for _, name, _, _ in string.Formatter().parse(self.question) if name is not None}

    @property
    def uses_measurement(self) -> bool:
        """Whether the question contains what was measured, so that every frame of a clip must be measured."""
        return bool(self.slots & {MEASURED, LIP_SYNC})

    def messages(self, views: int, images: int = 1, **values: float | str) -> list[dict[str, Any]]:
        """The chat up to the assistant's turn, in the format of transformers' chat templates.

        Args:
            views: number of views of the clip that come before the question.
            images: number of frames of each view; needed only if they are separate images.
            values: a value for each slot of the question; others are ignored.

        Raises:
            ConfigError: a slot has no value, or the number of labels is not that of the views.
        """
        if self.view_labels and len(self.view_labels) != views:
            raise ConfigError(
                f"the prompt has view_labels for {plural(len(self.view_labels), 'view')}, but the rater has "
                f"{plural(views, 'view')}: give a --view for each label, or another prompt"
            )
        if missing := sorted(self.slots - values.keys()):
            raise ConfigError(f"the prompt's question needs a value for {missing}: {self.question!r}")
        text = self.question.format(**values)
        kind, number = ("video", 1) if self.frames == "video" else ("image", images)
        content = []
        for label in self.view_labels or [None] * views:
            content += [{"type": "text", "text": label}] if label else []
            content += [{"type": kind} for _ in range(number)]
        content.append({"type": "text", "text": text})
        system = [{"role": "system", "content": [{"type": "text", "text": self.system}]}] if self.system else []
        return [*system, {"role": "user", "content": content}]


def _check_question(what: str, question: str) -> None:
    if not question.strip():
        raise ValueError(f"{what} is empty")
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(question) if name is not None]
    except ValueError as error:
        raise ValueError(f"{what} is not a valid template: {error}; write {{{{ and }}}} for braces") from None
    texts = (MEASURED, LIP_SYNC)
    if unknown := sorted(set(names) - {*SLOTS, *texts}):
        raise ValueError(f"{what} has unknown slots {unknown}; known: {', '.join((*SLOTS, *texts))}")
    try:
        for _, name, form, _ in string.Formatter().parse(question):
            if name in texts and form:
                raise ValueError(f"the slot {{{name}}} is a text without a format, received {form!r}")
            if name is not None and not SLOT_FORMAT.fullmatch(form or ""):
                raise ValueError(f"the format {form!r} is not one of a number")
        question.format(**dict.fromkeys(SLOTS, 1.0), **dict.fromkeys(texts, ""))
    except (LookupError, ValueError) as error:
        raise ValueError(f"{what} cannot be filled in: {error}; slots are numbers: {{seconds:.1f}}") from None


def prompt_names() -> list[str]:
    """Names of the prompts that come with the package."""
    files = resources.files("lmm_qa.prompt_files").iterdir()
    names = {file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml")}
    return sorted(names.difference(OTHER_FILES))


def load_prompt(name_or_path: str | Path) -> Prompt:
    """Load a prompt by its name in `prompts/` or by the path of a YAML file.

    Raises:
        ConfigError: there is no such prompt, or the file is invalid.
    """
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"}:
        return Prompt.read(path)
    if str(name_or_path) not in prompt_names():
        raise ConfigError(f"no prompt {str(name_or_path)!r}; give one of {', '.join(prompt_names())} or a .yaml file")
    with resources.as_file(resources.files("lmm_qa.prompt_files") / f"{name_or_path}.yaml") as file:
        return Prompt.read(file)
