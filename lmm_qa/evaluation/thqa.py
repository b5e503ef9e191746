"""THQA-NTIRE (NTIRE 2025 XGC challenge, track 3: talking heads): what its file names say, and how much they give away.

Every clip's file name follows one of three patterns:

    class  example                                              made by
    2d     14_dalle3_common_voice_en_35729059_audio2head.mp4    a generator, from a portrait of a text-to-image model
    v1     8_voice_en_34939394_wavlip.mp4                       a generator, from a portrait (the first THQA set)
    3d     7889059_SEN_the_small_boy_..._video_lead_1.mp4       a 3D scan, spoken by an actor, then distorted

`pid` is the prompt (2d), portrait (v1) or scan (3d); the numbers of different classes have nothing to do with each
other. MOS run from 0 to 5. Knows names and numbers; opens neither videos nor label files.
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


"""MOS of the worst and of the best clip that the scale allows."""


ClipClass = Literal["2d", "v1", "3d"]


Group = tuple[ClipClass, int]


"""Clips of one group show one person: they must stay on one side of every split."""


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
    """What a file name says. What a class has no word for is None."""

    clip_class: ClipClass
    pid: int
    source: str | None = None
    """2d: the text-to-image model that drew the portrait."""
    audio: str | None = None
    """2d, v1: number of the recording in Common Voice."""
    generator: str | None = None
    """2d, v1: the method that made the portrait talk."""
    sentence: str | None = None
    """3d: what is said."""
    distortion: str | None = None
    """3d: `qp_level`, `qt_level`: quantisation of positions, of texture coordinates; `stream_level`: an opening segment
    at another code rate; `audio_lead`, `video_lead`: lip-sync offset; `pause_start`, `pause_middle`: stalls."""
    level: float | None = None
    """3d: how much of it; seconds for leads and pauses."""

    @classmethod
    def parse(cls, clip: str) -> ThqaName:
        """Read a clip's file name; folders before it do not matter.

        Raises:
            ManifestError: it follows none of the three patterns.
        """
        name = PurePosixPath(clip).name
        for clip_class, pattern in _PATTERNS.items():
            if found := pattern.fullmatch(name):
                parts: dict[str, str] = found.groupdict()
                level = parts.pop("level", None)
                return cls(clip_class, int(parts.pop("pid")), level=None if level is None else float(level), **parts)
        raise ManifestError(
            f"{name!r} is no file name of THQA-NTIRE, such as 14_dalle3_common_voice_en_35729059_audio2head.mp4"
        )

    @property
    def group(self) -> Group:
        """Class and pid: the person shown."""
        return self.clip_class, self.pid

    @property
    def maker(self) -> str:
        """The generator, or for 3d the distortion."""
        return str(self.generator or self.distortion)

    @property
    def kinds(self) -> tuple[tuple[str, ...], ...]:
        """What the clip is one of, from coarse to fine: class; class and maker; class, maker, and source (2d) or level
        (3d)."""
        finest = self.source if self.level is None else f"{self.level:g}"
        parts = (self.clip_class, self.maker, *([finest] if finest else []))
        return tuple(parts[:length] for length in range(1, len(parts) + 1))


def try_parse(clip: str) -> ThqaName | None:
    """`ThqaName.parse`, or None for a name of another set."""
    try:
        return ThqaName.parse(clip)
    except ManifestError:
        return None


# --- what the name alone predicts ------------------------------------------------------------------------------------

SHRINKAGE = 10.0


"""A mean over n clips counts as n / (n + 10), the mean of the next coarser kind for the rest."""


@dataclass(frozen=True)
class NamePrior:
    """Predicts a clip's MOS from its file name, no pixel seen: the bar that a rater has to clear.

    Each kind of clip (`ThqaName.kinds`) gets the mean MOS of its clips, shrunk towards the kind that it is part of:

        m(kind) = (sum of its MOS + 10 m(coarser kind)) / (n + 10),    coarsest: the mean of all

    and a clip gets the mean of the finest of its kinds that was seen.
    """

    mean: float
    kinds: Mapping[tuple[str, ...], float]

    @classmethod
    def fit(cls, clips: Sequence[str], mos: Sequence[float]) -> NamePrior:
        """Take the means of labelled clips.

        Raises:
            ManifestError: a name is none of THQA-NTIRE.
            ScoresError: there are no clips.
        """
        if not clips:
            raise ScoresError("the name-only prior needs labelled clips, received none")
        overall = sum(mos) / len(mos)
        members: dict[tuple[str, ...], list[float]] = defaultdict(list)
        for clip, value in zip(clips, mos, strict=True):
            for kind in ThqaName.parse(clip).kinds:
                members[kind].append(value)
        means: dict[tuple[str, ...], float] = {}
        for kind in sorted(members, key=len):
            coarser = means.get(kind[:-1], overall)
            means[kind] = (sum(members[kind]) + SHRINKAGE * coarser) / (len(members[kind]) + SHRINKAGE)
        return cls(overall, MappingProxyType(means))

    def predict(self, clip: str) -> float:
        """MOS that the name suggests.

        Raises:
            ManifestError: the name is none of THQA-NTIRE.
        """
        known = [self.kinds[kind] for kind in ThqaName.parse(clip).kinds if kind in self.kinds]
        return known[-1] if known else self.mean


# --- groups that lie on both sides of a split ------------------------------------------------------------------------


@dataclass(frozen=True)
class Leak:
    """A group with clips on both sides of a split."""

    group: Group
    train: tuple[str, ...]
    """Its clips on the training side: those to leave out."""
    held_out: tuple[str, ...]

    def __str__(self) -> str:
        clip_class, pid = self.group
        makers = ", ".join(sorted({ThqaName.parse(clip).maker for clip in self.train}))
        return (
            f"{len(self.train)} training clips ({makers}) show {clip_class} {pid}, as {len(self.held_out)} held-out "
            "clips do: leave them out when training"
        )


def find_leaks(train: Iterable[str], held_out: Iterable[str]) -> tuple[Leak, ...]:
    """The groups that lie on both sides, in order. As published, train and val share one: prompt 14 of 2d, of which 55
    clips by wavlip are in train.

    Raises:
        ManifestError: a name is none of THQA-NTIRE.
    """
    ours, theirs = _by_group(train), _by_group(held_out)
    return tuple(Leak(group, tuple(ours[group]), tuple(theirs[group])) for group in sorted(ours.keys() & theirs.keys()))


def _by_group(clips: Iterable[str]) -> dict[Group, list[str]]:
    groups: dict[Group, list[str]] = defaultdict(list)
    for clip in clips:
        groups[ThqaName.parse(clip).group].append(clip)
    return groups
