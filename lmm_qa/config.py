"""Base class of all configuration objects, and the two that every package shares: `Sampling` and `View`.

They are frozen, read from YAML or JSON, and refuse unknown keys. Files may come from strangers (rater.json of a
downloaded rater): their size is limited before they are parsed, and numbers, lists and texts have limits far beyond any
sensible value.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeGuard, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from lmm_qa.errors import ConfigError

MAX_BYTES = {".json": 16 << 20, ".yaml": 1 << 20}
"""Largest files that are read. The calibration of 100,000 clips has 6 MB; YAML is parsed slowly."""

MAX_NUMBER = 1e12
"""Largest magnitude of scores, weights and scales: products of a few of them are finite."""

MAX_PROBLEMS = 10
"""Problems of a file that an error lists."""

Bounded = Annotated[float, Field(ge=-MAX_NUMBER, le=MAX_NUMBER)]
"""Option type of a number of at most `MAX_NUMBER`, positive or negative."""


class Settings(BaseModel):
    """A frozen set of options. Unknown keys and numbers that are not finite are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def parse(cls, values: object, where: str) -> Self:
        """Validate plain data.

        Args:
            values: a dict of options.
            where: what the error message calls the source of the values.

        Raises:
            ConfigError: one line per problem, with the key and the value received.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            issues = _without_consequences(error.errors(include_url=False))
            lines = [_problem(cls, issue) for issue in issues[:MAX_PROBLEMS]]
            if len(issues) > MAX_PROBLEMS:
                lines.append(f"  and {len(issues) - MAX_PROBLEMS} more")
            if {"missing", "extra_forbidden"} & {issue["type"] for issue in issues}:
                lines.append(f"  known keys: {', '.join(cls.model_fields)}")
            raise ConfigError("\n".join([f"{where} cannot be used:", *lines])) from None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a YAML or JSON file.

        Raises:
            ConfigError: the file is missing or too large, is not valid YAML or JSON, or its content is invalid.
        """
        form = "JSON" if path.suffix == ".json" else "YAML"
        limit = MAX_BYTES[f".{form.lower()}"]
        try:
            with path.open("rb") as file:
                data = file.read(limit + 1)
            if len(data) > limit:
                raise ConfigError(f"{path} is larger than {limit >> 20} MB: a {form} file of settings is much smaller")
            values = json.loads(data) if form == "JSON" else yaml.safe_load(data.decode())
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from None
        except RecursionError:
            raise ConfigError(f"{path} is nested too deeply") from None
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"{path} is not valid {form}: {_cut(str(error), 300)}") from None
        return cls.parse(values, str(path))


def _without_consequences(issues: list[ErrorDetails]) -> list[ErrorDetails]:
    """Without lists that are too short only because their items are invalid."""
    outer = {issue["loc"][:length] for issue in issues for length in range(len(issue["loc"]))}
    return [issue for issue in issues if issue["type"] != "too_short" or issue["loc"] not in outer]


def _problem(settings: type[BaseModel], issue: ErrorDetails) -> str:
    """One line: the key, what is wrong with its value, and the value."""
    place = _cut(".".join(map(str, issue["loc"])), 80) or "(top level)"
    received = "" if issue["type"] == "missing" else f" (received {_shortened(issue['input'])})"
    line = f"  {place}: {_cut(issue['msg'], 500)}{received}"
    if issue["type"] == "extra_forbidden" and (section := _section(settings, issue["loc"][:-1])) is not settings:
        line += f"; known keys there: {', '.join(section.model_fields)}"
    return line


def _shortened(value: object) -> str:
    """The value in at most about 80 characters, without a representation of the whole: that may be very long."""
    return _cut(repr(value[:80]) if isinstance(value, str) else reprlib.repr(value), 80)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _section(settings: type[BaseModel], place: Sequence[int | str]) -> type[BaseModel]:
    """The class of the options at a location, or of the innermost enclosing one that is known."""
    for part in place:
        kind = settings.model_fields[str(part)].annotation if part in settings.model_fields else None
        settings = next((each for each in (kind, *get_args(kind)) if _is_settings(each)), settings)
    return settings


def _is_settings(kind: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _check_rising(ends: tuple[float, float]) -> tuple[float, float]:
    if not ends[0] < ends[1]:
        raise ValueError(f"low must be below high, received {list(ends)}")
    return ends


ScaleEnds = Annotated[tuple[Bounded, Bounded], AfterValidator(_check_rising)]
"""Option type of a scale: MOS of the worst and of the best quality, at most `MAX_NUMBER`. It may be negative."""

FPS_FRAMES = 32
"""Default limit of `fps` sampling."""


class Sampling(Settings):
    """Which frames of a clip the model sees."""

    strategy: Literal["uniform", "linspace", "fps", "pairs"] = "uniform"
    """`uniform`: `frames` frames, one in each of as many equal parts of the clip's duration.
    `linspace`: `frames` frames from the first to the last one of the clip, as Q-Align's successors take them.
    `fps`: `fps` frames per second, at most `frames`.
    `pairs`: `frames // 2` pairs of frames spread uniformly, the two frames of a pair `gap` seconds apart. A temporal
    patch of a Qwen-style vision tower covers two frames, so it sees whether anything moves."""
    frames: int = Field(8, ge=1, le=768)
    """Number of frames; for `fps` their maximum, 32 by default."""
    fps: float = Field(2.0, gt=0, le=1000)
    """Frames per second, for `fps` only."""
    gap: float = Field(0.08, gt=0, le=3600)
    """Seconds between the two frames of a pair, for `pairs` only."""
    phase: float = Field(0.5, ge=0, lt=1)
    """Position of each frame, or pair, within its part of the clip (for `fps`: within its step): 0 at the start, 0.5 in
    the middle. Training varies it, so that a clip is seen with different frames. Not for `linspace`."""

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read `uniform:8`, `linspace:8`, `pairs:12`, or `fps:2` (at most 32 frames; `fps:2:64` for another limit).

        Raises:
            ConfigError: it is none of these.
        """
        match text.split(":"):
            case ["fps", fps]:
                return cls.parse({"strategy": "fps", "fps": fps}, f"sampling {text!r}")
            case ["fps", fps, frames]:
                return cls.parse({"strategy": "fps", "fps": fps, "frames": frames}, f"sampling {text!r}")
            case [strategy, frames]:
                return cls.parse({"strategy": strategy, "frames": frames}, f"sampling {text!r}")
        raise ConfigError(f"sampling {text!r} is not of the form uniform:8, linspace:8, pairs:12 or fps:2")

    @model_validator(mode="before")
    @classmethod
    def _set_fps_default(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("strategy") == "fps":
            return {"frames": FPS_FRAMES, **values}
        return values

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.strategy == "pairs" and self.frames % 2:
            raise ValueError(f"strategy 'pairs' takes an even number of frames, received {self.frames}")
        return self


class View(Settings):
    """How the sampled frames are shown to the model. Each view is a video of its own; there can be several."""

    kind: Literal["whole", "fit", "crop", "face"] = "whole"
    """`whole`: the whole picture, resized to fit the pixel budget.
    `fit`: the whole picture, its long side reduced to at most `size`; then a second resize rounds both sides to the
    patch grid. The way of Q-ReAlign; `whole` does both at once.
    `crop`: a window of the picture at native resolution, never resized, so that compression artefacts and blur remain
    visible.
    `face`: a square around the face, resized to `size`, so that the mouth is visible even if the face is small."""
    max_pixels: int = Field(448 * 448, ge=28 * 28, le=100_000_000)
    """`whole`: maximum area of a frame in pixels; larger frames are shrunk, smaller ones keep their size (rounded to
    the vision tower's patch grid)."""
    size: int = Field(224, ge=28, le=4096)
    """`crop`: side of the square window in pixels, clipped to the picture. `face`: side of the resized square. `fit`:
    longest side of a frame in pixels."""
    center: tuple[float, float] = (0.5, 0.42)
    """`crop`: center of the window as fractions of width and height; heads are slightly above the middle."""

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read `whole:448` (the area of a square of that side), `fit:448` (the longest side), `crop:336` or `face:224`
        (the side of the square).

        Raises:
            ConfigError: it is none of these.
        """
        kind, _, side = text.partition(":")
        if not side.isdecimal() or len(side) > 9 or kind not in {"whole", "fit", "crop", "face"}:
            raise ConfigError(
                f"view {text!r} is not of the form whole:448, fit:448, crop:336 or face:224 (sides in pixels)"
            )
        size = {"max_pixels": int(side) ** 2} if kind == "whole" else {"size": int(side)}
        return cls.parse({"kind": kind, **size}, f"view {text!r}")

    @model_validator(mode="after")
    def _check_center(self) -> Self:
        if not all(0 <= part <= 1 for part in self.center):
            raise ValueError(f"center is a pair of fractions between 0 and 1, received {self.center}")
        return self
