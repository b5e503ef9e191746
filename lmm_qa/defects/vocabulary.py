"""The vocabulary of defects: what can be wrong with a talking-head clip, how it shows, and what is asked about it.

Knows nothing of models. A defect is asked for by a closed question, which is a `Prompt` with two levels, so that it is
read as the score is. The wording is in `prompts/defects.yaml`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Defect:
    """One thing that can be wrong."""

    name: str
    term: str
    """Its name in a sentence."""
    definition: str
    shows: str
    """What is to be seen of it in the frames."""
    place: str
    """Where it shows, in words."""
    causes: tuple[str, ...] = ()
    """The damages of `lmm_qa.degrade.causes` that are this defect; empty where none of them makes it."""
    visible: bool = True
    """Whether frames without sound can show it. Where not, it is reported as not judged, and never guessed."""


DEFECTS = (
    Defect(
        "blur",
        "blur",
        "Loss of sharpness: out of focus, motion blur, or enlarged from a smaller picture.",
        "Edges are wide; hair, eyelashes and skin have no texture.",
        "whole picture",
        ("blur", "motion_blur", "rescale", "defocus"),
    ),
    Defect(
        "noise",
        "noise",
        "Random grain of the sensor or of a generator.",
        "Grain that differs from frame to frame, in flat and dark parts first.",
        "whole picture",
        ("noise",),
    ),
    Defect(
        "compression",
        "compression marks",
        "Marks of lossy coding.",
        "Blocks, ringing around edges, washed-out texture.",
        "whole picture",
        ("jpeg", "h264", "h265", "vp9", "av1"),
    ),
    Defect(
        "banding",
        "banding",
        "Too few levels of brightness.",
        "Smooth shades break into steps with edges.",
        "smooth surfaces",
        ("banding",),
    ),
    Defect(
        "exposure",
        "wrong exposure",
        "Too much or too little light.",
        "Lights burnt out, or shadows closed.",
        "whole picture",
        ("overexposure", "underexposure"),
    ),
    Defect(
        "colour", "colour cast", "Wrong white balance.", "Skin and whites tinted.", "whole picture", ("colour_cast",)
    ),
    Defect(
        "mouth",
        "malformed mouth",
        "The inside of the mouth is missing or malformed.",
        "Lips and teeth run together; no tooth can be told from the next.",
        "mouth",
        ("mouth_smear", "teeth_smear"),
    ),
    Defect(
        "lips",
        "little lip movement",
        "The lips hardly move while the head does.",
        "The same mouth in frames that differ.",
        "mouth",
        ("mouth_freeze",),
    ),
    Defect(
        "movement",
        "unnatural facial movement",
        "The face moves as no face does.",
        "Expressions that jump or come without muscles.",
        "face",
    ),
    Defect(
        "geometry",
        "warped face",
        "Parts of the face out of their places.",
        "Eyes, nose or chin bent, swaying or uneven.",
        "face",
        ("face_warp",),
    ),
    Defect(
        "identity",
        "identity drift",
        "The person turns into somebody else.",
        "Features and skin differ between start and end.",
        "face",
        ("identity_drift",),
    ),
    Defect(
        "background",
        "unstable background",
        "What stands still in the world moves in the picture.",
        "Lines behind the head bend and swim.",
        "background",
        ("background_wobble",),
    ),
    Defect(
        "seam",
        "face seam",
        "The face is pasted onto the head.",
        "An edge around the face or its lower half; its tint or sharpness differs.",
        "around the face",
        ("seam",),
    ),
    Defect(
        "flicker",
        "flicker",
        "Brightness that jumps.",
        "Neighbouring frames differ in brightness alone.",
        "whole picture",
        ("flicker",),
    ),
    Defect(
        "stall",
        "stall",
        "The clip freezes after it has begun.",
        "Frames that are the same for a while.",
        "whole picture",
        ("stall",),
    ),
    Defect(
        "buffering",
        "initial buffering",
        "The clip does not start at once.",
        "The first picture stands.",
        "whole picture",
        ("buffering",),
    ),
    Defect(
        "jerkiness",
        "jerky movement",
        "A low or irregular frame rate.",
        "Movement in steps.",
        "whole picture",
        ("drop", "jitter"),
    ),
    Defect(
        "bitrate_switch",
        "bit-rate switch",
        "Some seconds are of lower quality than the rest.",
        "Frames with blocks or blur among frames without.",
        "whole picture",
        ("bitrate_switch",),
    ),
    Defect(
        "quantisation",
        "3D quantisation",
        "A 3D head of coarse geometry or texture.",
        "Facets, steps in the outline, few colours on the skin.",
        "head",
    ),
    Defect(
        "lip_sync", "lip-sync offset", "Sound and lips apart.", "Nothing: it needs the sound.", "mouth", visible=False
    ),
)


BY_NAME = {defect.name: defect for defect in DEFECTS}


VISIBLE = tuple(defect.name for defect in DEFECTS if defect.visible)


PRESENT = 0.25


"""Strength of a damage from which on the defect is said to be there; below it, nobody is asked."""


_AMBIGUOUS_DEFECTS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("jpeg", "h264", "h265", "vp9", "av1"), ("blur", "banding")),
    "bitrate_switch": ("compression", "blur"),
    "banding": ("colour", "compression"),
    "defocus": ("mouth", "seam"),
    "mouth_smear": ("lips", "seam", "blur"),
    "mouth_freeze": ("mouth", "geometry", "movement", "seam"),
    "face_warp": ("identity", "movement", "background"),
    "seam": ("colour", "mouth", "blur"),
    "identity_drift": ("geometry", "blur", "movement"),
    "flicker": ("exposure", "jerkiness"),
    "buffering": ("stall", "lips", "jerkiness"),
    "stall": ("lips", "jerkiness", "buffering"),
    "jitter": ("stall", "movement", "lips", "buffering"),
    "drop": ("stall", "movement", "lips", "buffering"),
    "overexposure": ("colour", "banding"),
    "underexposure": ("noise", "banding"),
}


"""Defects that a damage may bring along: where it is at work, they are neither asserted nor absent."""


def reference_defects(damages: Iterable[tuple[str, float]]) -> dict[str, bool | None]:
    """Which defects a damaged copy of a good clip has: yes, no, or None where it cannot be said.

    Args:
        damages: causes (of `lmm_qa.degrade.causes`) and their strengths, 0 to 1.

    Returns:
        An entry for each defect that some cause of `lmm_qa.degrade.causes` makes.
    """
    damages = list(damages)
    known: dict[str, bool | None] = {defect.name: False for defect in DEFECTS if defect.causes}
    for cause, strength in damages:
        for name in _AMBIGUOUS_DEFECTS.get(cause, ()):
            if name in known and strength > 0:
                known[name] = None
    for cause, strength in damages:
        for name in known:
            if cause in BY_NAME[name].causes and strength > 0:
                known[name] = True if strength >= PRESENT else known[name] or None
    return known
