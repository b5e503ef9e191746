"""THQA-NTIRE (NTIRE 2025 XGC challenge, track 3: talking heads): parse its file names, and predict the MOS from them.

Every file name follows one of three patterns:

    class  example                                              made by
    2d     14_dalle3_common_voice_en_35729059_audio2head.mp4    a generator, from a portrait of a text-to-image model
    v1     8_voice_en_34939394_wavlip.mp4                       a generator, from a portrait (the first THQA set)
    3d     7889059_SEN_the_small_boy_..._video_lead_1.mp4       a 3D scan of a speaking actor, then distorted

`pid` is the number of the prompt (2d), portrait (v1) or scan (3d); the numbers of different classes are unrelated. MOS
range from 0 to 5.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Literal

from lmm_qa.errors import ManifestError, ScoresError

SCALE = (0.0, 5.0)
"""Lowest and highest MOS."""

ClipClass = Literal["2d", "v1", "3d"]
Group = tuple[ClipClass, int]
"""(class, pid). Clips of one group show one person: they must stay on one side of every split."""

_PATTERNS: Mapping[ClipClass, re.Pattern[str]] = MappingProxyType(
    {
        "2d": re.compile(
            r"(?P<pid>\d+)_(?P<source>[a-z0-9]+)_common_voice_en_(?P<audio>\d+)_(?P<generator>[a-z0-9]+)\.mp4"
        ),
        "v1": re.compile(r"(?P<pid>\d+)_voice_en_(?P<audio>\d+)_(?P<generator>[a-z]+)\.mp4"),
        "3d": re.compile(
            r"(?P<pid>\d+)_SEN_(?P<sentence>[a-z_]+?)_(?P<distortion>qp_level|qt_level|stream_level|audio_lead"
            r"|video_lead|pause_start|pause_middle)_(?P<level>-?\d+(?:\.\d+)?)\.mp4"
        ),
    }
)


@dataclass(frozen=True)
class ThqaName:
    """The parts of a file name; None for those that its class does not have."""

    clip_class: ClipClass
    pid: int
    source: str | None = None
    """2d: the text-to-image model that drew the portrait."""
    audio: str | None = None
    """2d, v1: number of the recording in Common Voice."""
    generator: str | None = None
    """2d, v1: the method that animated the portrait."""
    sentence: str | None = None
    """3d: the spoken sentence."""
    distortion: str | None = None
    """3d: `qp_level`, `qt_level`: quantisation of positions, of texture coordinates; `stream_level`: an opening segment
    at another code rate; `audio_lead`, `video_lead`: lip-sync offset; `pause_start`, `pause_middle`: stalls."""
    level: float | None = None
    """3d: its strength; seconds for leads and pauses."""

    @classmethod
    def parse(cls, clip: str) -> ThqaName:
        """Parse a file name; folders before it are ignored.

        Raises:
            ManifestError: the name follows none of the three patterns.
        """
        name = PurePosixPath(clip).name
        for clip_class, pattern in _PATTERNS.items():
            if found := pattern.fullmatch(name):
                parts: dict[str, str] = found.groupdict()
                level = parts.pop("level", None)
                return cls(clip_class, int(parts.pop("pid")), level=None if level is None else float(level), **parts)
        raise ManifestError(
            f"{name!r} is not a file name of THQA-NTIRE, such as 14_dalle3_common_voice_en_35729059_audio2head.mp4"
        )

    @property
    def group(self) -> Group:
        """Class and pid: the person shown."""
        return self.clip_class, self.pid

    @property
    def method(self) -> str:
        """The generator, or for 3d the distortion."""
        return str(self.generator or self.distortion)

    @property
    def categories(self) -> tuple[tuple[str, ...], ...]:
        """The nested categories of the clip, from coarse to fine: class; class and method; class, method and source
        (2d) or level (3d)."""
        finest = self.source if self.level is None else f"{self.level:g}"
        parts = (self.clip_class, self.method, *([finest] if finest else []))
        return tuple(parts[:length] for length in range(1, len(parts) + 1))


def try_parse(clip: str) -> ThqaName | None:
    """`ThqaName.parse`, or None for a name of another set."""
    try:
        return ThqaName.parse(clip)
    except ManifestError:
        return None


# --- the name-only prior ---------------------------------------------------------------------------------------------

SHRINKAGE = 10.0
"""The mean over n clips of a category gets the weight n / (n + 10), the next coarser category the rest."""


@dataclass(frozen=True)
class NamePrior:
    """Predicts the MOS of a clip from its file name, without a pixel: the baseline that a rater has to beat.

    Each category of clips (`ThqaName.categories`) gets its mean MOS, shrunk towards that of the next coarser category:

        m(category) = (sum of its MOS + 10 m(coarser category)) / (n + 10),    coarsest: the mean of all clips

    and a clip gets the mean of its finest category that was seen in the labels.
    """

    mean: float
    category_means: Mapping[tuple[str, ...], float]

    @classmethod
    def fit(cls, clips: Sequence[str], mos: Sequence[float]) -> NamePrior:
        """Compute the means of labelled clips.

        Raises:
            ManifestError: a name is not of THQA-NTIRE.
            ScoresError: there are no clips.
        """
        if not clips:
            raise ScoresError("the name-only prior needs labelled clips, received none")
        overall = sum(mos) / len(mos)
        members: dict[tuple[str, ...], list[float]] = defaultdict(list)
        for clip, value in zip(clips, mos, strict=True):
            for category in ThqaName.parse(clip).categories:
                members[category].append(value)
        means: dict[tuple[str, ...], float] = {}
        for category in sorted(members, key=len):
            coarser = means.get(category[:-1], overall)
            means[category] = (sum(members[category]) + SHRINKAGE * coarser) / (len(members[category]) + SHRINKAGE)
        return cls(overall, MappingProxyType(means))

    def predict(self, clip: str) -> float:
        """The MOS predicted from the file name.

        Raises:
            ManifestError: the name is not of THQA-NTIRE.
        """
        means = self.category_means
        seen = [means[category] for category in ThqaName.parse(clip).categories if category in means]
        return seen[-1] if seen else self.mean


# --- groups on both sides of a split ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Leak:
    """A group with clips on both sides of a split."""

    group: Group
    train: tuple[str, ...]
    """Its training clips: those to leave out."""
    held_out: tuple[str, ...]

    def __str__(self) -> str:
        clip_class, pid = self.group
        methods = ", ".join(sorted({ThqaName.parse(clip).method for clip in self.train}))
        return (
            f"{len(self.train)} training clips ({methods}) show {clip_class} {pid}, as {len(self.held_out)} held-out "
            "clips do: leave them out when training"
        )


def find_leaks(train: Iterable[str], held_out: Iterable[str]) -> tuple[Leak, ...]:
    """The groups on both sides, sorted. The published train and val sets share one: prompt 14 of 2d, of which 55 clips
    by wavlip are in train.

    Raises:
        ManifestError: a name is not of THQA-NTIRE.
    """
    train_groups, test_groups = _by_group(train), _by_group(held_out)
    shared = sorted(train_groups.keys() & test_groups.keys())
    return tuple(Leak(group, tuple(train_groups[group]), tuple(test_groups[group])) for group in shared)


def _by_group(clips: Iterable[str]) -> dict[Group, list[str]]:
    groups: dict[Group, list[str]] = defaultdict(list)
    for clip in clips:
        groups[ThqaName.parse(clip).group].append(clip)
    return groups
