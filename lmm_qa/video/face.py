"""Where the face is in each frame of a clip: for the view of it, and for damage that is about faces.

The detector is the frontal face cascade that scikit-image carries (local binary patterns, from OpenCV): it finds most
faces that look at the camera, drawn ones included, and few that look aside. Where it finds none, the face is assumed
where talking heads mostly have it, and `Face.found` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from skimage.feature import Cascade


Box = tuple[float, float, float, float]


"""Left, top, right, bottom, as fractions of the picture's width and height."""


ASSUMED: Box = (0.3, 0.2, 0.7, 0.6)


"""A face of 40% of the picture, in its upper middle; made square in pixels."""


_DETECTION_SIDE = 240


"""Long side in pixels of the pictures that are searched: a face of a tenth of it is too small to matter here."""


_KEY_FRAMES = 12


AROUND = 1.5


"""Side of `face_window` in sides of the box, which ends at the brows: hair, chin and the edge of the face come in."""


_OVERLAP = 0.3


_SEEN_AT_LEAST = 2


"""Key frames: what is taken for a face once only is a flower, or a fold of a curtain."""


FOLLOWED = 4


"""Pictures that `follow_face` searches."""


_BESIDE = 0.45


"""Sides of a box by which it may have moved from one searched picture to the next."""


@dataclass(frozen=True)
class Face:
    """The face of a clip, from the forehead to the chin and as wide as high in pixels."""

    boxes: NDArray[np.float64]
    """(T, 4): a `Box` for each frame; it may reach out of the picture."""
    found: bool
    """False: no face was found, and this is where one mostly is."""


def find_face(frames: NDArray[np.uint8]) -> Face:
    """The face that is seen in most frames, followed through the clip.

    Args:
        frames: (T, H, W, 3) uint8 RGB.
    """
    count, height, width = frames.shape[:3]
    keys = np.unique(np.linspace(0, count - 1, min(count, _KEY_FRAMES)).round().astype(int))
    seen = [_detect(frames[key]) for key in keys]
    everywhere = np.concatenate(seen)
    support = np.array([sum((_overlap(box, others) > _OVERLAP).any() for others in seen) for box in everywhere])
    if support.max(initial=0) < min(_SEEN_AT_LEAST, len(keys)):
        return Face(np.tile(_square(ASSUMED, width / height), (count, 1)), found=False)
    size = everywhere[:, 2] - everywhere[:, 0]
    best = everywhere[np.lexsort((size, support))[-1]]
    matches = [(key, boxes[_overlap(best, boxes).argmax()]) for key, boxes in zip(keys, seen, strict=True)
               if len(boxes) and _overlap(best, boxes).max() > _OVERLAP]  # fmt: skip
    return _along(matches, count)


def follow_face(frames: Sequence[NDArray[np.uint8]]) -> Face:
    """The largest face of the first picture that shows one, followed; a quarter of the time that `find_face` takes.

    For a few pictures of a clip: `FOLLOWED` of them are searched, the first in whole, the others about that place.

    Args:
        frames: each (H, W, 3) uint8 RGB, all of one size.
    """
    height, width = frames[0].shape[:2]
    keys = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), FOLLOWED)).round().astype(int))
    matches: list[tuple[int, NDArray[np.float64]]] = []
    for key in keys:
        near = matches[-1][1] if matches else None
        if near is None and key > keys[len(keys) // 2]:
            break  # two have to agree
        found = _detect(frames[key], near)
        if len(found):
            sides = found[:, 2] - found[:, 0]
            away = sides if near is None else -np.hypot(*(found[:, :2] - near[:2] + found[:, 2:] - near[2:]).T)
            matches.append((int(key), found[away.argmax()]))
    if len(matches) < min(_SEEN_AT_LEAST, len(keys)):
        return Face(np.tile(_square(ASSUMED, width / height), (len(frames), 1)), found=False)
    return _along(matches, len(frames))


def _along(matches: Sequence[tuple[int, NDArray[np.float64]]], count: int) -> Face:
    """Boxes of one size in all frames, from those in some."""
    moments, boxes = np.array([key for key, _ in matches]), np.array([box for _, box in matches])
    centers, halves = (boxes[:, :2] + boxes[:, 2:]) / 2, np.median(boxes[:, 2:] - boxes[:, :2], axis=0) / 2
    path = np.stack([np.interp(np.arange(count), moments, centers[:, axis]) for axis in range(2)], axis=1)
    return Face(np.concatenate([path - halves, path + halves], axis=1), found=True)


def face_window(face: Face, height: int, width: int, around: float = AROUND) -> tuple[int, int, int]:
    """One square window of the picture for the whole clip, with the face inside.

    Args:
        face: of a clip of (height, width) pixels.
        around: side of the window in sides of the face's box.

    Returns:
        Left, top and side in pixels; never out of the picture, so it is smaller where the face fills that.
    """
    left, top, right, bottom = np.median(face.boxes, axis=0) * (width, height, width, height)
    side = max(1, round(min(around * max(right - left, bottom - top), height, width)))
    x = round(np.clip((left + right - side) / 2, 0, width - side))
    y = round(np.clip((top + bottom - side) / 2, 0, height - side))
    return x, y, side


def _detect(frame: NDArray[np.uint8], near: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
    """(n, 4) boxes of the faces in one picture; or of those about a place, of about that size."""
    height, width = frame.shape[:2]
    shrink = min(1.0, _DETECTION_SIDE / max(height, width))
    small = Image.fromarray(frame).resize((max(1, round(width * shrink)), max(1, round(height * shrink))))
    sides = np.array([small.width, small.height] * 2)
    side, corner, finer = min(small.size), (0, 0), 1.15
    least, most = max(24, side // 6), side
    if near is not None:
        left, top, right, bottom = near * sides
        wide = right - left
        corner = max(0, int(left - _BESIDE * wide)), max(0, int(top - _BESIDE * wide))
        small = small.crop((*corner, min(small.width, int(right + _BESIDE * wide)),
                            min(small.height, int(bottom + _BESIDE * wide))))  # fmt: skip
        least, most, finer = max(24, int(0.72 * wide)), max(25, int(1.4 * wide)), 1.1
    found = _cascade().detect_multi_scale(
        np.asarray(small),
        scale_factor=finer,
        step_ratio=1,
        min_size=(least, least),
        max_size=(most, most),
        min_neighbor_number=3,
    )
    boxes = [(one["c"], one["r"], one["c"] + one["width"], one["r"] + one["height"]) for one in found]
    return np.asarray((np.array(boxes, dtype=np.float64).reshape(-1, 4) + np.array(corner * 2)) / sides)


@cache
def _cascade() -> Cascade:
    import skimage.data  # here, as only clips whose face is asked for need it
    from skimage.feature import Cascade

    return Cascade(skimage.data.lbp_frontal_face_cascade_filename())  # type: ignore[no-untyped-call]


def _overlap(box: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Intersection over union of one box with each of the (n, 4) others."""
    inner = np.clip(np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2]), 0, None).prod(axis=1)
    union = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(axis=1) - inner
    return np.asarray(inner / union, dtype=np.float64)


def _square(box: Box, aspect: float) -> NDArray[np.float64]:
    """The box, its longer side in pixels shortened about the middle; `aspect` is the picture's width / height."""
    left, top, right, bottom = box
    wide, high = min(1, 1 / aspect) * (right - left) / 2, min(1, aspect) * (bottom - top) / 2
    x, y = (left + right) / 2, (top + bottom) / 2
    return np.array([x - wide, y - high, x + wide, y + high])
