"""Lip sync: by how much the sound of a clip is late, measured on a face that was found in its pictures.

    luma of each frame -> window around the face -> where the mouth is -> how far it is open, and its shape    (mouth)
    sound -> logarithmic mel spectrogram                                                                        (voice)
    both -> a vector every 40 ms each -> mean similarity at each offset within 1.5 s

Two small convolutional networks see the mouth; three pairs of others make the vectors, and their similarities are
averaged. All together have some 226,000 weights.
`scripts/lip_sync/train.py` trains them: the first two on what a published face mesh says about the frames of clips, the
others such that vectors of a moment are alike, and those of different moments are not.

A similarity means little by itself: it depends on the person, the language and the length of the clip. So it is
compared with what wrong pairings of the same clip give: its sound shifted by seconds, and reversed. `LipSync.strength`
says how far the best offset stands out from them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image

from lmm_qa.video.display import UPRIGHT, Orientation
from lmm_qa.video.face import boxes_at
from lmm_qa.video.sound import SAMPLE_RATE, Samples

Floats = NDArray[np.floating[Any]]
Grey = NDArray[np.uint8]
Weights = dict[str, NDArray[np.float32]]

FILE = Path(__file__).parent / "lip_sync.safetensors"

RATE = 25
"""Vectors per second."""

MAX_OFFSET = 1.5
"""Seconds."""

MIN_SPEECH = 2.0
"""Seconds of visible speech that are needed to judge."""

QUIET = 8.0
"""Natural logarithm of power below the loudest moment at which `voice_level` is 0."""

SPEECH_LEVEL = 0.5
"""`voice_level` from which speech is heard."""

MIN_MOTION = 0.006
"""Standard deviation of the opening of the mouth, relative to the face's box, from which somebody speaks."""

CLEAR_MATCH, LEAST_OFFSET = 3.0, 0.1
"""Strength from which an offset is stated in words, and the smallest such offset in seconds."""

MAX_BYTES, MAX_PICTURES = 96 << 20, 1500
"""Memory for pictures, and their number: 15 s of 512 x 512 pixels at 25 per second, at most a minute. What comes later
is not measured."""

_MIN_INTERVAL = 0.0245
"""Seconds between two pictures: of 50 or 60 frames per second, every other one is used."""

_PICTURE_SIDE = 512
"""Largest long side of the pictures, in pixels."""

_WINDOW = (-0.05, 0.30, 1.1)
"""Left, top and side of the window around the lower face, relative to the face's box."""

_WINDOW_SIDE = 128

_LOCATOR_SIDE = 32

_MOUTH = 0.46
"""Side of the window around the mouth, relative to the face's box."""

_MOUTH_SIDE = 40

_FFT, _HOP = 512, 160
"""Samples: 32 and 10 ms."""

_EDGE = 20
"""Vectors that must overlap at an offset, 0.8 s."""


@dataclass(frozen=True)
class LipSync:
    """What lips and sound of a clip say about each other."""

    offset: float
    """Seconds by which the sound is late; negative: it is early. Within `MAX_OFFSET`; means little if `strength` is
    low."""
    strength: float
    """How far the similarity at this offset is above that of wrong pairings, in their standard deviations."""
    speech: float
    """Seconds in which somebody can be heard while the mouth is seen."""
    probability: float | None
    """That the sound is 0.3 s or more early or late, or belongs to something else. None: not judged, because there is
    less than `MIN_SPEECH`, or the mouth does not move."""
    mouth: tuple[float, ...]
    """Opening of the mouth relative to the height of the face's box, `RATE` times per second."""
    voice: tuple[float, ...]
    """Loudness of the sound, 0 to 1, `RATE` times per second."""

    @property
    def clear_offset(self) -> float | None:
        """The offset in seconds if it stands out; None if sound and lips match nowhere, or at offset 0."""
        return self.offset if self.strength >= CLEAR_MATCH and abs(self.offset) >= LEAST_OFFSET else None


class LipSyncMeter:
    """Receives every frame of a clip; stores a small picture of each.

    Args:
        orientation: how stored frames are turned for display.
    """

    def __init__(self, orientation: Orientation = UPRIGHT) -> None:
        self._orientation = orientation
        self._pictures: list[Grey] = []
        self._numbers: list[int] = []
        self._seconds: list[float] = []
        self._frames = self._bytes = 0
        self._shape: tuple[int, ...] | None = None

    def add_frame(self, luma: Grey, second: float) -> None:
        """Receive the luma plane of the next frame, (height, width), as stored, and when it appears."""
        self._shape = self._shape or luma.shape
        due = not self._seconds or second - self._seconds[-1] >= _MIN_INTERVAL
        if due and luma.shape == self._shape and self._bytes < MAX_BYTES and len(self._pictures) < MAX_PICTURES:
            factor = -(-max(luma.shape) // _PICTURE_SIDE)
            stored = Image.fromarray(np.ascontiguousarray(luma))
            small = np.array(stored if factor == 1 else stored.reduce(factor))
            self._pictures.append(self._orientation.apply(small))
            self._numbers.append(self._frames)
            self._seconds.append(second)
            self._bytes += small.size
        self._frames += 1

    def windows(self, boxes: Floats, indices: Sequence[int]) -> Grey:
        """(n, 128, 128): the window around the lower face in each stored picture; arguments as for `measure`."""
        return face_windows(self._pictures, boxes_at(boxes, indices, self._numbers))

    def measure(self, boxes: Floats, indices: Sequence[int], samples: Samples) -> LipSync | None:
        """Compare lips and sound.

        Args:
            boxes: (n, 4): the face in some displayed frames, as fractions of their width and height.
            indices: (n,): numbers of these frames.
            samples: (n,) mono sound at `SAMPLE_RATE` from the first frame on.

        Returns:
            None for less than 2 s of pictures or sound.
        """
        duration = min(self._seconds[-1], len(samples) / SAMPLE_RATE) if self._seconds else 0.0
        count = int(min(duration, MAX_PICTURES / RATE) * RATE)
        if count < 2 * RATE:
            return None
        weights, settings = _weights(FILE)
        shape, visible = mouth_shape(weights, self.windows(boxes, indices))
        moments = np.arange(count) / RATE
        shape = np.stack([np.interp(moments, self._seconds, each) for each in shape.T], axis=1)
        seen = np.interp(moments, self._seconds, visible) > 0.5
        spectrum = mel_spectrum(samples[: count * SAMPLE_RATE // RATE + _FFT], weights["mel"], 2 * count)
        loud = voice_level(spectrum)
        alike = similarity(weights, shape, spectrum)
        backwards = similarity(weights, shape, np.ascontiguousarray(spectrum[::-1]))
        evidence = compare(alike, backwards)
        speech = float((seen & (loud > SPEECH_LEVEL)).sum()) / RATE
        judged = speech >= MIN_SPEECH and shape[:, 0].std() >= MIN_MOTION
        odds = float(np.dot(settings["weights"], evidence.numbers) + settings["intercept"])
        return LipSync(
            offset=evidence.offset,
            strength=evidence.strength,
            speech=speech,
            probability=1 / (1 + float(np.exp(-np.clip(odds, -60, 60)))) if judged else None,
            mouth=tuple(shape[:, 0].tolist()),
            voice=tuple(loud.tolist()),
        )


# --- Mouth -----------------------------------------------------------------------------------------------------------


def face_windows(pictures: Sequence[Grey], boxes: Floats) -> Grey:
    """(n, 128, 128): the window around the lower face of each picture; black outside of it.

    Args:
        pictures: (height, width) each.
        boxes: (n, 4): the face, as fractions of the pictures' width and height.
    """
    left, top, side = _WINDOW
    windows = np.empty((len(pictures), _WINDOW_SIDE, _WINDOW_SIDE), np.uint8)
    for number, (picture, box) in enumerate(zip(pictures, boxes, strict=True)):
        x, y, right, bottom = box * (picture.shape[1::-1] * 2)
        width, height = right - x, bottom - y
        x, y = x + left * width, y + top * height
        windows[number] = _cut(picture, (x, y, x + side * width, y + side * height), _WINDOW_SIDE)
    return windows


def _cut(picture: Grey, extent: tuple[float, float, float, float], side: int) -> Grey:
    """(side, side): a part of a picture, given by its left, top, right and bottom in pixels; black outside of it."""
    image = Image.fromarray(picture)
    return np.asarray(image.transform((side, side), Image.Transform.EXTENT, extent, Image.Resampling.BILINEAR))


def mouth_shape(weights: Weights, windows: Grey) -> tuple[Floats, Floats]:
    """What the networks see in windows around the lower face.

    Returns:
        (n, 3): opening, width and height of the mouth, relative to the face's box. (n,): probability that a mouth is
        visible.
    """
    from scipy.ndimage import (
        gaussian_filter1d,
        median_filter,
    )  # slow to import, for those who only ask for `lip_sync_id`

    count, share = len(windows), _WINDOW_SIDE // _LOCATOR_SIDE
    small = windows.reshape(count, _LOCATOR_SIDE, share, _LOCATOR_SIDE, share).mean((2, 4), dtype=np.float32)
    found = _convolutional(weights, "locate", _normalised(small))
    place = found[:, :3] * weights["locate.scale"] + weights["locate.mean"]
    centre = median_filter(place[:, :2], (5, 1), mode="nearest")
    centre = gaussian_filter1d(centre, 1.5, axis=0, mode="nearest")
    left, top, side = _WINDOW
    corner = np.clip((centre - _MOUTH / 2 - (left, top)) / side, 0, 1 - _MOUTH / side) * _WINDOW_SIDE
    mouths = np.empty((count, _MOUTH_SIDE, _MOUTH_SIDE), np.float32)
    for number, (x, y) in enumerate(corner.tolist()):
        length = _MOUTH / side * _WINDOW_SIDE
        mouths[number] = _cut(windows[number], (x, y, x + length, y + length), _MOUTH_SIDE)
    shape = _convolutional(weights, "mouth", _normalised(mouths))
    return shape, 1 / (1 + np.exp(-np.clip(found[:, 3], -60, 60)))


def _normalised(pictures: Floats) -> Floats:
    """(n, 1, h, w) with the mean 0 and about the standard deviation 1."""
    centred = pictures - pictures.mean((1, 2), keepdims=True)
    spread = np.sqrt((centred**2).sum((1, 2), keepdims=True) / (pictures[0].size - 1))
    return np.asarray((centred / (spread + 4))[:, None], np.float32)


def _convolutional(weights: Weights, name: str, x: Floats) -> Floats:
    """Convolutions with stride 2 and ReLU, then two linear layers."""
    layer = 0
    while (kernel := weights.get(f"{name}.convolution.{layer}.weight")) is not None:
        pad = kernel.shape[-1] // 2
        padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        views = sliding_window_view(padded, kernel.shape[-2:], axis=(2, 3))[:, :, ::2, ::2]
        bias = weights[f"{name}.convolution.{layer}.bias"]
        x = np.maximum(np.tensordot(views, kernel, axes=((1, 4, 5), (1, 2, 3))) + bias, 0).transpose(0, 3, 1, 2)
        layer += 1
    x = x.reshape(len(x), -1)
    x = np.maximum(x @ weights[f"{name}.linear.0.weight"].T + weights[f"{name}.linear.0.bias"], 0)
    return np.asarray(x @ weights[f"{name}.linear.1.weight"].T + weights[f"{name}.linear.1.bias"])


# --- Voice -----------------------------------------------------------------------------------------------------------


def mel_spectrum(samples: Samples, bank: NDArray[np.float32], count: int) -> Floats:
    """(count, bands): natural logarithm of the power in each mel band, `2 * RATE` times per second.

    Args:
        samples: (n,) mono at `SAMPLE_RATE`.
        bank: (257, bands) mel filters.
        count: number of rows.
    """
    padded = np.pad(samples, (_FFT // 2, _FFT // 2))
    frames = sliding_window_view(padded, _FFT)[::_HOP] * np.hanning(_FFT).astype(np.float32)
    power = abs(np.fft.rfft(frames, axis=1).astype(np.complex64)) ** 2
    bands = np.log(power @ bank + 1e-6)
    moments = np.arange(count) / (2 * RATE)
    known = np.arange(len(bands)) * (_HOP / SAMPLE_RATE)
    return np.stack([np.interp(moments, known, band) for band in bands.T], axis=1)


def voice_level(spectrum: Floats) -> Floats:
    """(n,): loudness, 0 to 1, `RATE` times per second, from the (2 n, bands) of `mel_spectrum`."""
    loud = spectrum.reshape(len(spectrum) // 2, 2, -1).mean((1, 2))
    return np.asarray(np.clip((loud - loud.max()) / QUIET + 1, 0, 1))


# --- Both ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Evidence:
    offset: float
    strength: float
    numbers: tuple[float, ...]
    """What the probability depends on: the best similarity near offset 0, the best far from it, their difference, and
    the distance of the offset from 0 times the strength."""


def network_inputs(shape: Floats, spectrum: Floats) -> tuple[Floats, Floats]:
    """What the networks that make the vectors receive, (n, 6) and (2 n, bands); arguments as for `similarity`."""
    from scipy.ndimage import gaussian_filter1d

    moving = shape - gaussian_filter1d(shape, RATE, axis=0)
    heard = np.maximum(spectrum, spectrum.max() - 9)
    return (
        np.concatenate([moving * 20, moving / (moving.std(0) + 0.002)], axis=1),
        (heard - heard.mean()) / (heard.std() + 0.1),
    )


def similarity(weights: Weights, shape: Floats, spectrum: Floats) -> Floats:
    """(n, n): similarity of the mouth at each moment to the voice at each moment, -1 to 1, means removed.

    Args:
        shape: (n, 3), as returned by `mouth_shape`, `RATE` times per second.
        spectrum: (2 n, bands), as returned by `mel_spectrum`.
    """
    mouth, heard = network_inputs(shape, spectrum)
    count = int(weights["sync.count"].item())
    total = np.zeros((len(shape), len(shape)))
    for number in range(count):
        seen = _unit(_temporal(weights, f"sync.{number}.mouth", mouth, 1))
        voice = _unit(_temporal(weights, f"sync.{number}.voice", heard, 2))[: len(seen)]
        total += (seen - seen.mean(0)) @ (voice - voice.mean(0)).T / count
    return total


def _unit(vectors: Floats) -> Floats:
    """Vectors of the length 1."""
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12))


def _temporal(weights: Weights, name: str, x: Floats, stride: int) -> Floats:
    """Three convolutions over time with GELU between them: (n, channels) to (n / stride, width)."""
    from scipy.special import erf

    for layer in range(3):
        kernel, bias = weights[f"{name}.{layer}.weight"], weights[f"{name}.{layer}.bias"]
        margin, step = (2, stride if layer == 0 else 1) if kernel.shape[2] > 1 else (0, 1)
        views = sliding_window_view(np.pad(x, ((margin, margin), (0, 0))), kernel.shape[2], axis=0)[::step]
        x = np.tensordot(views, kernel, axes=((1, 2), (1, 2))) + bias
        if layer < 2:
            x = x * 0.5 * (1 + erf(x / np.sqrt(2)))
    return np.asarray(x)


def compare(similarity: Floats, backwards: Floats) -> _Evidence:
    """Find the offset at which mouth and voice are most alike, and compare it with wrong pairings.

    Args:
        similarity: (n, n), of the mouth at each moment to the voice at each moment.
        backwards: the same with the sound reversed.
    """
    count, most = len(similarity), round(MAX_OFFSET * RATE)
    offsets = np.array([k for k in range(-most, most + 1) if count - abs(k) > _EDGE])
    shifts = np.arange(most + RATE // 2, count - most - RATE // 2, 5)
    wrong = [_means(similarity, offsets, shifts).max(0), _means(backwards, offsets, np.arange(0, count, 9)).max(0)]
    maxima = np.concatenate(wrong)
    centre, spread = float(maxima.mean()), float(maxima.std()) + 1e-3
    curve = (_means(similarity, offsets, np.zeros(1, int))[:, 0] - centre) / spread
    best = int(curve.argmax())
    between = 0.0
    if 0 < best < len(curve) - 1:  # the vertex of the parabola through three points
        before, at, after = curve[best - 1 : best + 2]
        between = (before - after) / 2 / min(before - 2 * at + after, -1e-9)
    distance = abs(offsets)
    near, far = float(curve[distance <= 4].max()), float(curve[distance >= 6].max())
    offset, strength = (offsets[best] + between) / RATE, float(curve[best])
    weight = min(abs(offset), 0.6) * min(max(strength, 0.0), 4.0)
    return _Evidence(float(offset), strength, (near, far, far - near, weight))


def _means(similarity: Floats, offsets: NDArray[np.int_], shifts: NDArray[np.int_]) -> Floats:
    """(offsets, shifts): mean similarity at each offset when the sound is shifted in a circle first.

    At the offset k, the mean is over the n - |k| moments that have a partner, whatever the shift.
    """
    count = len(similarity)
    moments = np.arange(count)
    skewed = similarity[moments[:, None], (moments[:, None] + moments) % count]
    sums = np.concatenate([np.zeros((1, count)), skewed.cumsum(0)])
    means = np.empty((len(offsets), len(shifts)))
    for number, offset in enumerate(offsets.tolist()):
        first, stop = max(0, -offset), count - max(0, offset)
        column = (offset - shifts) % count
        means[number] = (sums[stop, column] - sums[first, column]) / (stop - first)
    return means


def lip_sync_id() -> str:
    """Short hash of the networks."""
    return _file_hash(FILE)


@cache
def _file_hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


@cache
def _weights(file: Path) -> tuple[Weights, dict[str, Any]]:
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as stored:
        weights = {name: stored.get_tensor(name).astype(np.float32) for name in stored.keys()}  # noqa: SIM118
        return weights, json.loads(stored.metadata()["settings"])
