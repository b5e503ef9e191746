"""From a decoded frame to the picture that a viewer sees.

A stored picture is cropped, turned, mirrored, and shown with pixels that need not be square; its colours can be those
of a high dynamic range (HDR), and it can be transparent. `Display` holds what a container says about this, and converts
frames. Interlaced frames are deinterlaced before that, in `lmm_qa.video.decode`.

HDR is tone-mapped as by ffmpeg's filters `zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt709`,
`tonemap=mobius:param=0.3:peak=4.926:desat=0` and `zscale=t=bt709`: light relative to a reference white of 203 cd/m2
(ITU-R BT.2408), with BT.709 primaries, is unchanged up to 0.3 and compressed by a Moebius curve above, so that 1,000
cd/m2 become white; the display has a gamma of 2.4 (ITU-R BT.1886).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

Picture = npt.NDArray[np.uint8]
"""(height, width, 3) uint8 RGB."""

LUMA_PLANE_FORMATS = frozenset({"yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p", "nv12", "gray"})
"""Pixel formats whose first plane is luma, one byte per pixel."""

WHITE_LUMA = 235
"""Luma of white, on which transparent pixels are shown (ITU-R BT.601)."""

MAX_PIXEL_ASPECT = 8.0
"""Pixels that are said to be wider or higher than this are taken for square ones: the value is damaged."""

EXACT_ANGLE = 0.9998
"""Cosine of 1 degree. A display matrix that differs by more from a multiple of 90 degrees is reported."""


class Transfer(IntEnum):
    """Transfer characteristics of HDR video (ITU-T H.273, table 3)."""

    PQ = 16
    HLG = 18


@dataclass(frozen=True)
class Orientation:
    """How a stored picture is shown: first mirrored, then turned."""

    quarter_turns: int = 0
    """Clockwise, 0 to 3."""
    mirrored: bool = False
    """Left and right are exchanged, before it is turned."""

    def apply(self, picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Show a picture (height, width, ...); a view of it."""
        return np.rot90(picture[:, ::-1] if self.mirrored else picture, -self.quarter_turns)

    def matrix(self) -> npt.NDArray[np.int64]:
        """(2, 2): maps a stored direction (right, down) to the displayed one."""
        turn = np.array([[0, -1], [1, 0]])
        return np.linalg.matrix_power(turn, self.quarter_turns) @ np.diag([-1 if self.mirrored else 1, 1])


UPRIGHT = Orientation()


def read_orientation(frame: VideoFrame) -> tuple[Orientation, bool]:
    """The orientation in the display matrix of a frame, which a container or a bit stream (SEI) gives.

    Returns:
        The nearest of the eight orientations, and whether the matrix says exactly that.
    """
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # side data of a kind that PyAV does not know: it tells only the rotation then
        return Orientation(round(-frame.rotation / 90) % 4), True
    if data is None:
        return UPRIGHT, True
    # A point p right and q down is shown at (a p + c q, b p + d q); ISO/IEC 14496-12, 6.2.2.
    a, b, _, c, d = np.frombuffer(memoryview(cast(bytes, data)), "<i4")[:5].astype(np.float64)
    shown = np.array([[a, c], [b, d]])
    if not shown.any():
        return UPRIGHT, False
    candidates = [Orientation(turns, mirrored) for mirrored, turns in product((False, True), range(4))]
    best = max(candidates, key=lambda one: float((one.matrix() * shown).sum()))
    # The columns are the directions of the stored axes.
    lengths = np.linalg.norm(shown, axis=0)
    cosines = (best.matrix() * shown).sum(axis=0) / np.maximum(lengths, 1e-9)
    return best, bool((cosines >= EXACT_ANGLE).all())


@dataclass(frozen=True)
class Crop:
    """Pixels of a decoded picture that are not shown, on each side."""

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0

    def apply(self, picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Crop a picture (height, width, ...); a view of it."""
        height, width = picture.shape[:2]
        return picture[self.top : height - self.bottom, self.left : width - self.right]


UNCROPPED = Crop()


@dataclass(frozen=True)
class Display:
    """How the frames of a clip are shown."""

    width: int
    """Of the decoded picture, pixels. Frames of another size are resized to this one."""
    height: int
    crop: Crop = UNCROPPED
    orientation: Orientation = UPRIGHT
    pixel_aspect: float = 1.0
    """Width of a stored pixel, relative to its height."""

    @property
    def picture_size(self) -> tuple[int, int]:
        """(height, width) of the pictures: cropped and turned, with the pixels as they are stored."""
        height = self.height - self.crop.top - self.crop.bottom
        width = self.width - self.crop.left - self.crop.right
        return (height, width) if self.orientation.quarter_turns % 2 == 0 else (width, height)

    @property
    def pixel_shape(self) -> tuple[float, float]:
        """(height, width) of a pixel of a picture on the screen; the shorter side is 1."""
        aspect = self.pixel_aspect if self.orientation.quarter_turns % 2 == 0 else 1 / self.pixel_aspect
        return (1.0, aspect) if aspect >= 1 else (1 / aspect, 1.0)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) on a screen with square pixels."""
        return displayed_size(self.picture_size, self.pixel_shape)

    def picture(self, frame: VideoFrame) -> Picture:
        """Convert a decoded frame to RGB, as it is displayed but for the shape of its pixels; see `picture_size`."""
        if is_hdr(frame):
            picture = tone_map(frame, self.width, self.height)
        elif is_transparent(frame):
            layered = convert(frame, "rgba", self.width, self.height).to_ndarray().astype(np.uint16)
            alpha = layered[..., 3:]
            picture = ((layered[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
        else:
            rgb = convert(frame, "rgb24", self.width, self.height).to_ndarray()
            picture = rgb.astype(np.uint8, copy=False)
        return self.orientation.apply(self.crop.apply(picture))

    def luma(self, frame: VideoFrame) -> npt.NDArray[np.uint8]:
        """The cropped luma of a frame, (height, width), not turned; a view of its memory if that has 8 bits."""
        if (frame.width, frame.height) != (self.width, self.height):
            frame = convert(frame, frame.format.name, self.width, self.height)
        if is_hdr(frame):
            grey = convert(frame, "gray16le").to_ndarray()
            return self.crop.apply(luma_table(Transfer(frame.color_trc))[grey])
        if frame.format.name in LUMA_PLANE_FORMATS:
            return self.crop.apply(_first_plane(frame))
        if is_transparent(frame):
            alpha = convert(frame, "rgba").to_ndarray()[..., 3].astype(np.uint16)
            grey = convert(frame, "gray").to_ndarray()
            blended = (grey * alpha + WHITE_LUMA * (255 - alpha) + 127) // 255
            return self.crop.apply(blended.astype(np.uint8))
        return self.crop.apply(_first_plane(convert(frame, "gray")))


def is_transparent(frame: VideoFrame) -> bool:
    """Whether a frame has an alpha channel."""
    return any(component.is_alpha for component in frame.format.components)


def displayed_size(size: tuple[int, int], pixel_shape: tuple[float, float]) -> tuple[int, int]:
    """(height, width) on a screen of a picture of (height, width) pixels of this shape."""
    return round(size[0] * pixel_shape[0]), round(size[1] * pixel_shape[1])


_of_thread = threading.local()


def convert(frame: VideoFrame, pixel_format: str, width: int | None = None, height: int | None = None) -> VideoFrame:
    """A frame in another pixel format, and in another size if one is given.

    The converter is kept: `VideoFrame.reformat` makes one for each frame, which takes four times as long as the
    conversion of 384 x 384 pixels.
    """
    from av.video.reformatter import VideoReformatter

    if not hasattr(_of_thread, "converter"):
        _of_thread.converter = VideoReformatter()
    converted: VideoFrame = _of_thread.converter.reformat(frame, width, height, pixel_format, threads=1)
    return converted


def _first_plane(frame: VideoFrame) -> npt.NDArray[np.uint8]:
    from av.video.plane import VideoPlane

    plane = VideoPlane(frame, 0)
    # A read-only view: for a writable one, PyAV would first make a copy.
    stored = np.frombuffer(memoryview(cast(bytes, plane)), np.uint8).reshape(-1, abs(plane.line_size))
    return stored[: frame.height, : frame.width]


# High dynamic range

REFERENCE_WHITE = 203.0
"""cd/m2; ITU-R BT.2408, 3.2."""

PEAK = 1000 / REFERENCE_WHITE
"""The brightest light that is still distinguished, relative to the reference white."""

KNEE = 0.3
"""Light up to which the curve changes nothing."""

BT2020_TO_BT709 = np.array(
    [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]], np.float32
)
"""Linear light; ITU-R BT.2087, inverted."""

BT2020_LUMA = np.array([0.2627, 0.6780, 0.0593], np.float32)


def is_hdr(frame: VideoFrame) -> bool:
    """Whether the values of a frame are those of PQ or HLG."""
    return frame.color_trc in (Transfer.PQ, Transfer.HLG)


def tone_map(frame: VideoFrame, width: int, height: int) -> Picture:
    """Convert an HDR frame to RGB of the usual dynamic range; see the description of the module for the curve."""
    coded = convert(frame, "rgb48le", width, height).to_ndarray()
    transfer = Transfer(frame.color_trc)
    light = linear_table(transfer)[coded]
    if transfer is Transfer.HLG:
        light *= hlg_gain(light @ BT2020_LUMA)[..., None]
    light = np.maximum(light @ BT2020_TO_BT709.T, 0)
    brightest = light.max(axis=2, keepdims=True)
    light *= moebius(brightest) / np.maximum(brightest, 1e-6)
    picture: Picture = np.rint(255 * np.clip(light, 0, 1) ** np.float32(1 / 2.4)).astype(np.uint8)
    return picture


def moebius(light: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Compress light above `KNEE` so that `PEAK` becomes 1: value and slope are continuous."""
    a = -KNEE * KNEE * (PEAK - 1) / (KNEE * KNEE - 2 * KNEE + PEAK)
    b = (KNEE * KNEE - 2 * KNEE * PEAK + PEAK) / max(PEAK - 1, 1e-6)
    compressed = (b * b + 2 * b * KNEE + KNEE * KNEE) / (b - a) * (light + a) / (light + b)
    return np.where(light <= KNEE, light, compressed).astype(np.float32)


def hlg_gain(luma: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Factor from scene light to display light at 1,000 cd/m2 (ITU-R BT.2100, table 5: OOTF with gamma 1.2).

    Args:
        luma: scene light, relative to the reference white as `linear_table` gives it, any shape.
    """
    gain: npt.NDArray[np.float32] = np.maximum(luma / PEAK, 1e-6) ** np.float32(0.2)
    return gain


@cache
def linear_table(transfer: Transfer) -> npt.NDArray[np.float32]:
    """(65536,): linear light of each 16-bit value, relative to the reference white (ITU-R BT.2100, tables 4 and 5).

    For HLG it is scene light, scaled so that 1 becomes `PEAK`.
    """
    coded = np.arange(65536) / 65535
    if transfer is Transfer.PQ:
        m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
        power = coded ** (1 / m2)
        light = 10_000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1) / REFERENCE_WHITE
    else:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = PEAK * np.where(coded <= 0.5, coded**2 / 3, (np.exp((coded - c) / a) + b) / 12)
    return light.astype(np.float32)


@cache
def luma_table(transfer: Transfer) -> npt.NDArray[np.uint8]:
    """(65536,): tone-mapped 8-bit luma of each full-range 16-bit luma, as if the picture were grey."""
    light = linear_table(transfer)
    if transfer is Transfer.HLG:
        light = light * hlg_gain(light)
    table: npt.NDArray[np.uint8] = np.rint(255 * np.clip(moebius(light), 0, 1) ** (1 / 2.4)).astype(np.uint8)
    return table
