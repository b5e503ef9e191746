"""The frames and crops that a model looked at, with boxes around the places of defects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lmm_qa.config import View
from lmm_qa.defects.vocabulary import BY_NAME
from lmm_qa.evaluation.html_report import Filmstrip, PlaceBox, RatedClip, Thumbnail, thumbnail
from lmm_qa.evaluation.player import is_playable
from lmm_qa.video.decode import Frames
from lmm_qa.video.face import Box, find_face

WIDE = View(max_pixels=384 * 384)
"""The view in which faces are searched for; decoded after those of the model."""

PLACES: dict[str, Box] = {
    "face": (0.0, 0.0, 1.0, 1.0),
    "mouth": (0.25, 0.62, 0.75, 0.97),
    "around the face": (-0.15, -0.25, 1.15, 1.15),
    "head": (-0.25, -0.45, 1.25, 1.2),
}
"""Places in the picture, as fractions of the box of the face: left, top, right, bottom."""

REPORTED = 6
"""Frames of a clip in a report."""
SMALL = 144 * 128
"""Pixels of each."""


def looked_at(clip: RatedClip, frames: Frames, views: Sequence[View]) -> list[Filmstrip]:
    """A strip for each view, with boxes in those that show the whole picture.

    Args:
        clip: with its defects.
        frames: sampled as the rater does, with its views and then `WIDE`.
        views: of the rater.
    """
    distinct = sorted({second: number for number, second in reversed(list(enumerate(frames.seconds)))}.values())
    boxes = place_boxes(clip, frames, distinct)
    strips = []
    for view, pictures in zip(views, frames.views, strict=False):
        height, width = pictures.shape[1:3]
        whole = view.kind in ("whole", "fit")
        shots = [
            Thumbnail(**{**vars(thumbnail(pictures[at], frames.seconds[at])), "boxes": boxes[place] if whole else ()})
            for place, at in enumerate(distinct)
        ]
        strips.append(Filmstrip(tuple(shots), title=_title(view, width, height)))
    return strips


def report_strip(clip: RatedClip, file: Path, frames: Frames) -> Filmstrip:
    """A few small frames of the same, for a report."""
    pictures = frames.views[-1]
    chosen = sorted({int((share + 0.5) * len(pictures) / REPORTED) for share in range(REPORTED)})
    worst = clip.worst_moment
    nearest = None if worst is None else min(chosen, key=lambda at: abs(frames.seconds[at] - worst))
    shots = tuple(thumbnail(_small(pictures[at]), frames.seconds[at], at == nearest) for at in chosen)
    return Filmstrip(shots, playable=is_playable(file, frames.info))


def place_boxes(clip: RatedClip, frames: Frames, chosen: Sequence[int]) -> list[tuple[PlaceBox, ...]]:
    """For each chosen frame, a box for each known place of a defect; none if no face was found."""
    places: dict[str, list[str]] = {}
    for name in clip.found_names:
        if name in BY_NAME and BY_NAME[name].place in PLACES:
            places.setdefault(BY_NAME[name].place, []).append(BY_NAME[name].term)
    face = find_face(frames.views[-1]) if places else None
    if face is None or not face.found:
        return [()] * len(chosen)
    return [
        tuple(_box(", ".join(terms), face.boxes[at], PLACES[place]) for place, terms in places.items()) for at in chosen
    ]


def _box(name: str, face: np.ndarray, part: Box) -> PlaceBox:
    left, top, right, bottom = face
    width, height = right - left, bottom - top
    edges = (left + part[0] * width, top + part[1] * height, left + part[2] * width, top + part[3] * height)
    x, y, end, foot = (round(100 * min(1.0, max(0.0, float(edge))), 2) for edge in edges)
    return PlaceBox(name, x, y, round(end - x, 2), round(foot - y, 2))


def _title(view: View, width: int, height: int) -> str:
    size = f"{width} x {height} pixels"
    match view.kind:
        case "crop":
            return f"What the model looked at: a window of {size} at native resolution"
        case "face":
            return f"What the model looked at: the face, {size}"
    return f"What the model looked at: the whole picture, {size}"


def _small(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    ratio = min(1.0, (SMALL / (height * width)) ** 0.5)
    size = max(1, round(width * ratio)), max(1, round(height * ratio))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
