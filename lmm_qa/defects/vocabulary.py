"""The vocabulary of defects: what can be wrong with a talking-head clip, and which degradations cause it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Defect:
    """One kind of defect."""

    name: str
    term: str
    """Name in sentences."""
    definition: str
    place: str
    """Where in the picture it appears, in words."""
    causes: tuple[str, ...] = ()
    """The degradations in `lmm_qa.degrade` that produce it; empty if none does."""
    visible: bool = True
    """Whether frames without sound can show it. If not, no model is asked about it, and it is measured."""


_CODECS = ("jpeg", "h264", "h265", "vp9", "av1")

# fmt: off
DEFECTS = (
    Defect("blur", "blur", "Loss of sharpness: out of focus, motion blur, or upscaled from a smaller picture.",
           "whole picture", ("blur", "motion_blur", "rescale", "defocus")),
    Defect("noise", "noise", "Random grain that differs from frame to frame.", "whole picture", ("noise",)),
    Defect("compression", "compression marks", "Blocks, ringing and washed-out texture from lossy coding.",
           "whole picture", _CODECS),
    Defect("banding", "banding", "Smooth shades break into visible steps.", "smooth surfaces", ("banding",)),
    Defect("exposure", "wrong exposure", "Highlights are blown out, or shadows are crushed.",
           "whole picture", ("overexposure", "underexposure")),
    Defect("colour", "colour cast", "Wrong white balance: skin and whites are tinted.",
           "whole picture", ("colour_cast",)),
    Defect("mouth", "malformed mouth", "Lips and teeth run together, or the inside of the mouth is missing.",
           "mouth", ("mouth_smear", "teeth_smear")),
    Defect("lips", "little lip movement", "The lips hardly move while the head does.", "mouth", ("mouth_freeze",)),
    Defect("movement", "unnatural facial movement", "The face moves as no real face does.", "face"),
    Defect("geometry", "warped face", "Eyes, nose or chin are bent or out of place.", "face", ("face_warp",)),
    Defect("identity", "identity drift", "The person turns into somebody else during the clip.",
           "face", ("identity_drift",)),
    Defect("background", "unstable background", "What should stand still behind the head bends and swims.",
           "background", ("background_wobble",)),
    Defect("seam", "face seam", "An edge around the face or its lower half, as if it were pasted onto the head.",
           "around the face", ("seam",)),
    Defect("flicker", "flicker", "The brightness jumps from frame to frame.", "whole picture", ("flicker",)),
    Defect("stall", "stall", "The clip freezes after it has started.", "whole picture", ("stall",)),
    Defect("buffering", "initial buffering", "The first picture stands still before the clip plays.",
           "whole picture", ("buffering",)),
    Defect("jerkiness", "jerky movement", "A low or irregular frame rate.", "whole picture", ("drop", "jitter")),
    Defect("bitrate_switch", "bit-rate switch", "A part of the clip is of lower quality than the rest.",
           "whole picture", ("bitrate_switch",)),
    Defect("quantisation", "3D quantisation", "A 3D head of coarse geometry or texture: facets, few colours.", "head"),
    Defect("lip_sync", "lip-sync offset", "Sound and lips are out of step.", "mouth",
           ("audio_lead", "audio_lag", "wrong_audio", "drift"), visible=False),
)
# fmt: on

BY_NAME = {defect.name: defect for defect in DEFECTS}

VISIBLE = tuple(defect.name for defect in DEFECTS if defect.visible)

TIMED_DEFECTS = ("stall", "buffering", "bitrate_switch", "lips")
"""Defects whose times are given in explanations."""

PRESENT_STRENGTH = 0.25
"""A degradation of at least this strength gives the clip its defect; below it, that is unknown."""

_SIDE_EFFECTS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(_CODECS, ("blur", "banding")),
    "bitrate_switch": ("compression", "blur"),
    "banding": ("colour", "compression"),
    "defocus": ("mouth", "seam"),
    "mouth_smear": ("lips", "seam", "blur", "lip_sync"),
    "mouth_freeze": ("mouth", "geometry", "movement", "seam", "lip_sync"),
    "face_warp": ("identity", "movement", "background"),
    "seam": ("colour", "mouth", "blur"),
    "identity_drift": ("geometry", "blur", "movement"),
    "flicker": ("exposure", "jerkiness"),
    "buffering": ("stall", "lips", "jerkiness"),
    "stall": ("lips", "jerkiness", "buffering"),
    "jitter": ("stall", "movement", "lips", "buffering", "lip_sync"),
    "drop": ("stall", "movement", "lips", "buffering", "lip_sync"),
    "overexposure": ("colour", "banding"),
    "underexposure": ("noise", "banding"),
}
"""Further defects that a degradation may cause: where it was applied, their presence is unknown."""


def check_names(names: Iterable[str], known: Iterable[str] = VISIBLE) -> None:
    """Check that these are names of defects, by default of visible ones.

    Raises:
        ValueError: some are not.
    """
    if unknown := set(names) - set(known):
        raise ValueError(f"no such defects: {', '.join(sorted(unknown))}; known: {', '.join(known)}")


def reference_defects(degradations: Iterable[tuple[str, float]]) -> dict[str, bool | None]:
    """Which defects a degraded copy of a good clip has: True, False, or None if unknown.

    Args:
        degradations: causes (see `lmm_qa.degrade`) and their strengths, 0 to 1.

    Returns:
        An entry for each visible defect that some cause produces, and for others that one of these causes produces.
    """
    applied = [(cause, strength) for cause, strength in degradations if strength > 0]
    causes = {cause for cause, _ in applied}
    known: dict[str, bool | None] = {
        defect.name: False for defect in DEFECTS if defect.causes and (defect.visible or causes & set(defect.causes))
    }
    for cause, _ in applied:
        known.update({name: None for name in _SIDE_EFFECTS.get(cause, ()) if name in known})
    for cause, strength in applied:
        for name in known:
            if cause in BY_NAME[name].causes:
                known[name] = True if strength >= PRESENT_STRENGTH else known[name] or None
    return known
