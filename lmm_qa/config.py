"""What can be configured, as frozen objects read from YAML or JSON; unknown keys are refused.

Knows nothing of pixels, models or files other than the one it is asked to read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self, TypeGuard, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from lmm_qa.errors import ConfigError


class Settings(BaseModel):
    """A frozen set of options that refuses keys it does not know, and numbers that are not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def parse(cls, values: object, where: str) -> Self:
        """Validate plain data; every complaint names its key and the value received.

        Raises:
            ConfigError: with one line for each thing that is wrong.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            lines = []
            for issue in error.errors(include_url=False):
                place = ".".join(str(part) for part in issue["loc"]) or "(top level)"
                received = "" if issue["type"] == "missing" else f" (received {_shortened(issue['input'])})"
                lines.append(f"  {place}: {issue['msg']}{received}")
                if issue["type"] == "extra_forbidden" and (section := _section(cls, issue["loc"][:-1])) is not cls:
                    lines[-1] += f"; known keys there: {', '.join(section.model_fields)}"
            known = ", ".join(cls.model_fields)
            raise ConfigError("\n".join([f"{where} cannot be used:", *lines, f"  known keys: {known}"])) from None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a YAML or JSON file.

        Raises:
            ConfigError: the file is missing, is no YAML/JSON, or holds something else than this.
        """
        try:
            text = path.read_text(encoding="utf-8")
            values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from None
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"{path} is not valid {'JSON' if path.suffix == '.json' else 'YAML'}: {error}") from None
        return cls.parse(values, str(path))


def _shortened(value: object, length: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _section(settings: type[BaseModel], place: Sequence[int | str]) -> type[BaseModel]:
    """The class of the options at a place, as far as it can be followed."""
    for part in place:
        kind = settings.model_fields[str(part)].annotation if part in settings.model_fields else None
        settings = next((each for each in (kind, *get_args(kind)) if _is_settings(each)), settings)
    return settings


def _is_settings(kind: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _rising(ends: tuple[float, float]) -> tuple[float, float]:
    if not ends[0] < ends[1]:
        raise ValueError(f"low must be below high, received {list(ends)}")
    return ends


ScaleEnds = Annotated[tuple[float, float], AfterValidator(_rising)]


"""MOS of the worst and of the best quality: a scale that is declared, as an option."""


class Sampling(Settings):
    """Which frames of a clip are looked at."""

    strategy: Literal["uniform", "fps", "pairs"] = "uniform"
    """`uniform`: `frames` frames, each in its equal share of the clip. `fps`: `fps` frames a second,
    at most `frames`. `pairs`: `frames // 2` moments spread uniformly, each as two frames `gap` seconds apart, so
    that one temporal patch of a Qwen-style vision tower (two frames) sees motion, and that there is none in a stall."""
    frames: int = Field(8, ge=1, le=768)
    """Number of frames (the largest number for `fps`)."""
    fps: float = Field(2.0, gt=0)
    """Frames a second, for `fps` only."""
    gap: float = Field(0.08, gt=0)
    """Seconds between the two frames of a pair, for `pairs` only."""
    phase: float = Field(0.5, ge=0, lt=1)
    """Where in its share of the clip (for `fps`: in its step) each frame, or pair, lies: 0 at the beginning, 0.5 in
    the middle. Training varies it; two phases of one clip show different frames of the same seconds."""

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read `uniform:8`, `pairs:12`, or `fps:2` (at most 32 frames; `fps:2:64` for another limit).

        Raises:
            ConfigError: it is none of these.
        """
        match text.split(":"):
            case ["fps", fps]:
                return cls.parse({"strategy": "fps", "fps": fps, "frames": 32}, f"sampling {text!r}")
            case ["fps", fps, frames]:
                return cls.parse({"strategy": "fps", "fps": fps, "frames": frames}, f"sampling {text!r}")
            case [strategy, frames]:
                return cls.parse({"strategy": strategy, "frames": frames}, f"sampling {text!r}")
        raise ConfigError(f"sampling {text!r} is not of the form uniform:8, pairs:12 or fps:2")

    @model_validator(mode="after")
    def _even_pairs(self) -> Self:
        if self.strategy == "pairs" and self.frames % 2:
            raise ValueError(f"strategy 'pairs' takes an even number of frames, received {self.frames}")
        return self


class View(Settings):
    """One video made from the sampled frames. A prompt can hold several views of the same frames."""

    kind: Literal["whole", "crop", "face"] = "whole"
    """`whole`: the whole picture, resized into the pixel budget. `crop`: a window of the picture at native
    resolution, never resized: what compression and blur did to the pixels stays visible. `face`: a square around the
    face, resized to `size`: what ails a mouth can be seen however small the face is."""
    max_pixels: int = Field(448 * 448, ge=28 * 28)
    """`whole`: the largest area of a frame in pixels; larger frames are shrunk, smaller ones keep their size
    (rounded to the vision tower's patch grid)."""
    size: int = Field(224, ge=28)
    """`crop`: side of the square window in pixels; clipped to the picture where that is smaller. `face`: side of the
    square in pixels, whatever the size of the face."""
    center: tuple[float, float] = (0.5, 0.42)
    """`crop`: centre of the window as fractions of width and height. Heads sit a little above the middle."""

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read `whole:448` (the area of a square of that side), `crop:336` or `face:224` (the side of the square).

        Raises:
            ConfigError: it is none of these.
        """
        kind, _, side = text.partition(":")
        if not side.isdecimal() or kind not in {"whole", "crop", "face"}:
            raise ConfigError(f"view {text!r} is not of the form whole:448, crop:336 or face:224 (sides in pixels)")
        size = {"max_pixels": int(side) ** 2} if kind == "whole" else {"size": int(side)}
        return cls.parse({"kind": kind, **size}, f"view {text!r}")

    @model_validator(mode="after")
    def _center_inside(self) -> Self:
        if not all(0 <= part <= 1 for part in self.center):
            raise ValueError(f"center is a pair of fractions between 0 and 1, received {self.center}")
        return self
