"""TODO-DOC video.views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from lmm_qa.config import View
from lmm_qa.video.face import face_window, find_face

if TYPE_CHECKING:
    pass


Picture = npt.NDArray[np.uint8]


"""(height, width, 3) uint8 RGB."""


SEARCHED = 3


"""Pictures of a clip in which the face is looked for: two have to agree, and each costs 10 to 40 ms."""


def view_size(height: int, width: int, view: View, factor: int) -> tuple[int, int]:
    """Size of the frames of a view.

    `face` is a square. `whole` is rounded as Qwen's `smart_resize` does it: both sides to the nearest multiple of
    `factor`; where the area exceeds `view.max_pixels`, both shrunk by the same ratio and rounded down; never under one
    `factor` a side.

    Args:
        height: of the displayed picture, pixels, at least 1.
        width: the same.
        view: see `lmm_qa.config.View`.
        factor: patch size x merge size of the vision tower, pixels (28 for Qwen2-VL, 32 for Qwen3-VL).

    Returns:
        (height, width) in pixels, multiples of `factor`.
    """
    height, width = max(height, factor), max(width, factor)
    if view.kind == "crop":
        return _multiple(min(view.size, height), factor), _multiple(min(view.size, width), factor)
    if view.kind == "face":
        return (_multiple(view.size, factor),) * 2
    rounded = round(height / factor) * factor, round(width / factor) * factor
    if rounded[0] * rounded[1] <= view.max_pixels:
        return rounded
    ratio = (height * width / view.max_pixels) ** 0.5
    shrunk = _multiple(height / ratio, factor), _multiple(width / ratio, factor)
    # A very long picture: the side that could not go under `factor` takes its pixels from the other.
    return (
        min(shrunk[0], _multiple(view.max_pixels / shrunk[1], factor)),
        min(shrunk[1], _multiple(view.max_pixels / shrunk[0], factor)),
    )


def _multiple(side: float, factor: int) -> int:
    """The largest multiple of `factor` that is not over `side`, at least one."""
    return max(1, int(side // factor)) * factor


def _render(picture: Picture, view: View, factor: int, face: tuple[int, int, int]) -> Picture:
    """Make one frame of a view from the whole picture; `face` is left, top and side of the window around it."""
    height, width = picture.shape[:2]
    rows, columns = view_size(height, width, view, factor)
    if view.kind == "crop":
        top = _window_start(height, rows, view.center[1])
        left = _window_start(width, columns, view.center[0])
        return picture[top : top + rows, left : left + columns]
    x, y, side = face
    box = (x, y, x + side, y + side) if view.kind == "face" else (0, 0, width, height)
    if box == (0, 0, columns, rows) == (0, 0, width, height):
        return picture
    return np.asarray(Image.fromarray(picture).resize((columns, rows), Image.Resampling.BICUBIC, box))


def pad_to_minimum(picture: Picture, factor: int) -> Picture:
    """Repeat the last row and column of a tiny picture until both sides are at least `factor`."""
    rows, columns = (max(0, factor - side) for side in picture.shape[:2])
    if not rows and not columns:
        return picture
    return np.pad(picture, ((0, rows), (0, columns), (0, 0)), mode="edge")


def _window_start(side: int, window: int, center: float) -> int:
    """Where a window begins that is centred at a fraction of a side and does not leave it."""
    return min(max(0, round(side * center - window / 2)), side - window)


# One clip, in this process


class _Rendered:
    """Views of the pictures that are kept, by frame number.

    Where a view is of the face, the first `SEARCHED` pictures wait until it has been looked for in them. The window
    that comes out holds for the whole clip: what moves in it is the head.
    """

    def __init__(self, views: Sequence[View], factor: int) -> None:
        self._views, self._factor = tuple(views), factor
        self._face: tuple[int, int, int] | None = None if any(view.kind == "face" for view in views) else (0, 0, 0)
        self._waiting: dict[int, Picture] = {}
        self._done: dict[int, list[Picture]] = {}

    def add(self, index: int, picture: Picture) -> None:
        """Make and keep the views of one picture."""
        self._waiting[index] = pad_to_minimum(picture, self._factor)
        if self._face is not None or len(self._waiting) == SEARCHED:
            self._finish()

    def stacked(self, indices: Sequence[int]) -> tuple[npt.NDArray[np.uint8], ...]:
        """The views of these frames, each (frames, height, width, 3)."""
        if self._waiting:
            self._finish()
        return tuple(np.stack(pictures) for pictures in zip(*(self._done[index] for index in indices), strict=True))

    def _finish(self) -> None:
        if self._face is None:
            pictures = np.stack(list(self._waiting.values()))
            self._face = face_window(find_face(pictures), *pictures.shape[1:3])
        for index, picture in self._waiting.items():
            self._done[index] = [_render(picture, view, self._factor, self._face) for view in self._views]
        self._waiting = {}
