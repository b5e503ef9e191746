"""Render views of a frame: the whole picture resized, a crop at native resolution, or the face."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from lmm_qa.config import View
from lmm_qa.video.display import Picture, displayed_size
from lmm_qa.video.face import face_window, find_face

FACE_SEARCH_FRAMES = 3
"""Pictures of a clip in which the face is searched for: two have to agree, and each costs 10 to 40 ms."""


def view_size(height: int, width: int, view: View, factor: int) -> tuple[int, int]:
    """Size of the frames of a view.

    `face` is a square. `fit` is `fitted_size`, rounded to the nearest multiples of `factor`. `whole` is rounded like
    Qwen's `smart_resize`: both sides to the nearest multiple of `factor`; if the area exceeds `view.max_pixels`, both
    are shrunk by the same ratio and rounded down; at least one `factor` a side.

    Args:
        height: of the displayed picture, pixels, at least 1.
        width: of the displayed picture, pixels, at least 1.
        view: see `lmm_qa.config.View`.
        factor: patch size x merge size of the vision tower, pixels (28 for Qwen2-VL, 32 for Qwen3-VL).

    Returns:
        (height, width) in pixels, multiples of `factor`.
    """
    height, width = max(height, factor), max(width, factor)
    if view.kind == "crop":
        return _round_down(min(view.size, height), factor), _round_down(min(view.size, width), factor)
    if view.kind == "face":
        return (_round_down(view.size, factor),) * 2
    if view.kind == "fit":
        height, width = fitted_size(height, width, view)
    rounded = max(round(height / factor), 1) * factor, max(round(width / factor), 1) * factor
    if view.kind == "fit" or rounded[0] * rounded[1] <= view.max_pixels:
        return rounded
    ratio = (height * width / view.max_pixels) ** 0.5
    shrunk = _round_down(height / ratio, factor), _round_down(width / ratio, factor)
    # In a very long picture one side is raised to `factor`; the other side has to make up for it.
    return (
        min(shrunk[0], _round_down(view.max_pixels / shrunk[1], factor)),
        min(shrunk[1], _round_down(view.max_pixels / shrunk[0], factor)),
    )


def fitted_size(height: int, width: int, view: View) -> tuple[int, int]:
    """Size of a picture of the view `fit` after its long side was reduced: rounded down, at least a pixel."""
    ratio = min(1.0, view.size / max(height, width))
    return max(1, int(height * ratio)), max(1, int(width * ratio))


def pad_to_minimum(picture: Picture, side: int) -> Picture:
    """Repeat the last row and column of a tiny picture until both sides are at least `side` pixels."""
    rows, columns = (max(0, side - size) for size in picture.shape[:2])
    if not rows and not columns:
        return picture
    return np.pad(picture, ((0, rows), (0, columns), (0, 0)), mode="edge")


class ViewRenderer:
    """Renders and stores the views of frames.

    If there is a view of the face, the first `FACE_SEARCH_FRAMES` pictures are stored until it has been searched for in
    them. Its window is fixed for the whole clip, so that motion of the head stays visible.
    """

    def __init__(self, views: Sequence[View], factor: int, pixel_shape: tuple[float, float] = (1.0, 1.0)) -> None:
        """
        Args:
            views: to be rendered.
            factor: patch size x merge size of the vision tower, pixels.
            pixel_shape: height and width of a stored pixel on the screen. `whole` and `face` show it so; `crop` has the
                pixels as they are stored, because that is where coding artefacts are.
        """
        self._views, self._factor, self._pixel_shape = tuple(views), factor, pixel_shape
        self._face: tuple[int, int, int] | None = None if any(view.kind == "face" for view in views) else (0, 0, 0)
        self._pending: dict[int, Picture] = {}
        self._rendered: dict[int, list[Picture]] = {}

    def add(self, index: int, picture: Picture) -> None:
        """Render the views of one frame."""
        self._pending[index] = pad_to_minimum(picture, self._factor)
        if self._face is not None or len(self._pending) == FACE_SEARCH_FRAMES:
            self._render_pending()

    def stack(self, indices: Sequence[int]) -> tuple[npt.NDArray[np.uint8], ...]:
        """Return the views of these frames: for each View an array (frames, height, width, 3) uint8 RGB."""
        if self._pending:
            self._render_pending()
        return tuple(np.stack(pictures) for pictures in zip(*(self._rendered[index] for index in indices), strict=True))

    def _render_pending(self) -> None:
        if self._face is None:
            pictures = np.stack([on_screen(picture, self._pixel_shape) for picture in self._pending.values()])
            self._face = face_window(find_face(pictures), *pictures.shape[1:3])
        for index, picture in self._pending.items():
            self._rendered[index] = [
                _render(picture, view, self._factor, self._face, self._pixel_shape) for view in self._views
            ]
        self._pending = {}


def on_screen(picture: Picture, pixel_shape: tuple[float, float]) -> Picture:
    """A picture resized so that its pixels are square."""
    return _resize(picture, displayed_size(picture.shape[:2], pixel_shape))


def _resize(picture: Picture, size: tuple[int, int]) -> Picture:
    """A picture in another (height, width)."""
    if size == picture.shape[:2]:
        return picture
    return np.asarray(Image.fromarray(picture).resize(size[::-1], Image.Resampling.BICUBIC))


def _render(
    picture: Picture, view: View, factor: int, face: tuple[int, int, int], pixel_shape: tuple[float, float]
) -> Picture:
    """Render one view of a picture; `face` is the left, top and side of the window around the face, on the screen."""
    height, width = picture.shape[:2]
    if view.kind == "crop":
        rows, columns = view_size(height, width, view, factor)
        top = _window_start(height, rows, view.center[1])
        left = _window_start(width, columns, view.center[0])
        return picture[top : top + rows, left : left + columns]
    if view.kind == "fit":
        picture = on_screen(picture, pixel_shape)
        height, width = picture.shape[:2]
        return _resize(_resize(picture, fitted_size(height, width, view)), view_size(height, width, view, factor))
    rows, columns = view_size(*displayed_size((height, width), pixel_shape), view, factor)
    x, y, side = face
    down, right = pixel_shape
    box = (
        (x / right, y / down, min((x + side) / right, width), min((y + side) / down, height))
        if view.kind == "face"
        else (0, 0, width, height)
    )
    if box == (0, 0, columns, rows) == (0, 0, width, height):
        return picture
    return np.asarray(Image.fromarray(picture).resize((columns, rows), Image.Resampling.BICUBIC, box))


def _window_start(side: int, window: int, center: float) -> int:
    """Start of a window centred at a fraction of a side, moved so that it stays inside."""
    return min(max(0, round(side * center - window / 2)), side - window)


def _round_down(side: float, factor: int) -> int:
    """Round down to a multiple of `factor`, but to at least one."""
    return max(1, int(side // factor)) * factor
