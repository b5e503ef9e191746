"""Locate the face in each frame of a clip: for the face view, and for measurements and degradations of faces.

The detector is the frontal face cascade that scikit-image ships (local binary patterns, from OpenCV): it finds most
faces that look at the camera, including drawn ones, and few that are turned away. If it finds none, the face is
assumed where most talking heads have it, and `Face.found` is False.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from skimage.feature import Cascade

Boxes = NDArray[np.float64]

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, as fractions of the picture's width and height."""

ASSUMED_FACE: Box = (0.3, 0.2, 0.7, 0.6)
"""40% of the picture, in its upper middle; made square in pixels."""

WINDOW_SCALE = 1.5
"""Side of `face_window` relative to the box, which ends at the brows: includes hair, chin and the edge of the face."""

FOLLOWED_PICTURES = 4
"""Pictures that `follow_face` searches."""

_DETECTION_SIDE = 240
"""Long side in pixels of the pictures that are searched: a face of a tenth of it is too small to matter here."""

_KEY_FRAMES = 12
"""Frames that `find_face` searches."""

_MIN_OVERLAP = 0.3
"""Intersection over union of boxes of the same face."""

_MIN_DETECTIONS = 2
"""Key frames: something detected as a face only once is a flower, or a fold of a curtain."""

_SEARCH_MARGIN = 0.45
"""Sides of a box by which a face may have moved from one searched picture to the next."""


@dataclass(frozen=True)
class Face:
    """The face of a clip, from the forehead to the chin; square in pixels."""

    boxes: Boxes
    """(T, 4): a `Box` for each frame; it may extend beyond the picture."""
    found: bool
    """False: no face was detected, and this is `ASSUMED_FACE`."""


def find_face(frames: NDArray[np.uint8]) -> Face:
    """Find the face that is detected in most frames, and its position in each.

    Args:
        frames: (T, H, W, 3) uint8 RGB.
    """
    count, height, width = frames.shape[:3]
    keys = np.unique(np.linspace(0, count - 1, min(count, _KEY_FRAMES)).round().astype(int))
    detected = [_detect(frames[key]) for key in keys]
    boxes = np.concatenate(detected)
    support = np.array([sum((_overlap(box, others) > _MIN_OVERLAP).any() for others in detected) for box in boxes])
    if support.max(initial=0) < min(_MIN_DETECTIONS, len(keys)):
        return _assumed_face(count, width / height)
    size = boxes[:, 2] - boxes[:, 0]
    best = boxes[np.lexsort((size, support))[-1]]
    matches = []
    for key, others in zip(keys, detected, strict=True):
        overlaps = _overlap(best, others)
        if overlaps.max(initial=0) > _MIN_OVERLAP:
            matches.append((int(key), others[overlaps.argmax()]))
    return _interpolate(matches, count)


def follow_face(frames: Sequence[NDArray[np.uint8]]) -> Face:
    """Find the largest face of the first picture with one, and follow it; four times as fast as `find_face`.

    For a few pictures of a clip: `FOLLOWED_PICTURES` of them are searched, the first one completely, the others near
    the last position.

    Args:
        frames: each (H, W, 3) uint8 RGB, all of one size.
    """
    height, width = frames[0].shape[:2]
    keys = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), FOLLOWED_PICTURES)).round().astype(int))
    matches: list[tuple[int, Boxes]] = []
    for key in keys:
        near = matches[-1][1] if matches else None
        if near is None and key > keys[len(keys) // 2]:
            break  # too few pictures are left for two detections
        detected = _detect(frames[key], near)
        if len(detected):
            sides = detected[:, 2] - detected[:, 0]
            rank = sides if near is None else -np.hypot(*(detected[:, :2] - near[:2] + detected[:, 2:] - near[2:]).T)
            matches.append((int(key), detected[rank.argmax()]))
    if len(matches) < min(_MIN_DETECTIONS, len(keys)):
        return _assumed_face(len(frames), width / height)
    return _interpolate(matches, len(frames))


def face_window(face: Face, height: int, width: int, scale: float = WINDOW_SCALE) -> tuple[int, int, int]:
    """Choose one square window of the picture for the whole clip, with the face inside.

    Args:
        face: of a clip of (height, width) pixels.
        scale: side of the window relative to the face's box.

    Returns:
        Left, top and side in pixels; never outside the picture, so it is smaller if the face fills that.
    """
    left, top, right, bottom = np.median(face.boxes, axis=0) * (width, height, width, height)
    side = max(1, round(min(scale * max(right - left, bottom - top), height, width)))
    x = round(np.clip((left + right - side) / 2, 0, width - side))
    y = round(np.clip((top + bottom - side) / 2, 0, height - side))
    return x, y, side


def boxes_at(boxes: NDArray[np.floating[Any]], indices: Sequence[int], numbers: Sequence[int]) -> Boxes:
    """(n, 4): the boxes of a face, known in the frames `indices`, in the n frames `numbers`."""
    known, first = np.unique(indices, return_index=True)
    return np.stack([np.interp(numbers, known, edge) for edge in boxes[first].T], axis=1)


def _interpolate(matches: Sequence[tuple[int, Boxes]], count: int) -> Face:
    """Boxes of one size for all `count` frames, from those detected in some: (frame number, box)."""
    keys, boxes = np.array([key for key, _ in matches]), np.array([box for _, box in matches])
    centers, half_sides = (boxes[:, :2] + boxes[:, 2:]) / 2, np.median(boxes[:, 2:] - boxes[:, :2], axis=0) / 2
    path = np.stack([np.interp(np.arange(count), keys, centers[:, axis]) for axis in range(2)], axis=1)
    return Face(np.concatenate([path - half_sides, path + half_sides], axis=1), found=True)


def _assumed_face(count: int, aspect: float) -> Face:
    """`ASSUMED_FACE` in `count` frames of an aspect ratio (width / height), its longer side in pixels shortened."""
    left, top, right, bottom = ASSUMED_FACE
    half_width, half_height = min(1, 1 / aspect) * (right - left) / 2, min(1, aspect) * (bottom - top) / 2
    x, y = (left + right) / 2, (top + bottom) / 2
    box = np.array([x - half_width, y - half_height, x + half_width, y + half_height])
    return Face(np.tile(box, (count, 1)), found=False)


def _detect(frame: NDArray[np.uint8], near: Boxes | None = None) -> Boxes:
    """(n, 4) boxes of the faces in a picture; only those near a box and of about its size if one is given."""
    height, width = frame.shape[:2]
    shrink = min(1.0, _DETECTION_SIDE / max(height, width))
    small = Image.fromarray(frame).resize((max(1, round(width * shrink)), max(1, round(height * shrink))))
    sides = np.array([small.width, small.height] * 2)
    longest, corner, scale_factor = min(small.size), (0, 0), 1.15
    shortest = max(24, longest // 6)
    if near is not None:
        left, top, right, bottom = near * sides
        side = right - left
        margin = _SEARCH_MARGIN * side
        corner = max(0, int(left - margin)), max(0, int(top - margin))
        stop = min(small.width, int(right + margin)), min(small.height, int(bottom + margin))
        small = small.crop((*corner, *stop))
        shortest, longest, scale_factor = max(24, int(0.72 * side)), max(25, int(1.4 * side)), 1.1
    found = _cascade().detect_multi_scale(
        np.asarray(small),
        scale_factor=scale_factor,
        step_ratio=1,
        min_size=(shortest, shortest),
        max_size=(longest, longest),
        min_neighbor_number=3,
    )
    boxes = [(each["c"], each["r"], each["c"] + each["width"], each["r"] + each["height"]) for each in found]
    return np.asarray((np.array(boxes, dtype=np.float64).reshape(-1, 4) + np.array(corner * 2)) / sides)


@cache
def _cascade() -> Cascade:
    import skimage.data  # slow to import, and needed for faces only
    from skimage.feature import Cascade

    return Cascade(skimage.data.lbp_frontal_face_cascade_filename())  # type: ignore[no-untyped-call]


def _overlap(box: Boxes, others: Boxes) -> Boxes:
    """Intersection over union of a box (4,) with each of the others (n, 4)."""
    inner = np.clip(np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2]), 0, None).prod(axis=1)
    union = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(axis=1) - inner
    return np.asarray(inner / union, dtype=np.float64)
