"""Make the sample clips of lmm_qa/samples: a still portrait that blinks and talks, clean and damaged.

    python scripts/make_sample_clips.py [--out lmm_qa/samples] [--sheet sheet.png]

Needs the extra `degrade` (scikit-image contains the portrait). The same seed gives the same frames; the same versions
of PyAV and x264 give the same files.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter, gaussian_filter1d, map_coordinates

from lmm_qa.degrade.causes import MILD, STRONG, degrade, encode

Frames = NDArray[np.uint8]
"""(frames, height, width, 3), RGB."""
Grid = NDArray[np.float64]

FPS = 25
FRAMES = 100
SIDE = 384
SEED = 7


@dataclass(frozen=True)
class Pose:
    """Position of the face in one frame. Displacements are in pixels of the animated picture."""

    jaw: float
    """How far the lower lip is below its position in the still; negative values close the smiling mouth."""
    blink: float
    """0: eyes open, 1: closed."""
    yaw: float
    """Sideways shift of the face's middle; hair and ears move less, so that the head seems to turn."""
    nod: float
    """The same, downwards."""
    tilt: float
    """Rotation of the head about the neck, radians."""
    zoom: float
    """Scale of the whole picture."""


# --- what moves when -------------------------------------------------------------------------------------------------


def speech(rng: np.random.Generator) -> Grid:
    """An envelope of speech in [0, 1]: syllables, four or five a second, in phrases with a pause between."""
    loudness = np.zeros(FRAMES)
    moment = 0.15
    while moment < FRAMES / FPS - 0.2:
        loudness[int(moment * FPS)] = rng.uniform(0.45, 1.0)
        moment += rng.uniform(0.17, 0.27) if rng.random() > 0.13 else rng.uniform(0.45, 0.6)
    envelope: Grid = gaussian_filter1d(loudness, 1.5)
    return np.clip(envelope / float(np.percentile(envelope, 97)), 0, 1)


def drift(rng: np.random.Generator, seconds: float) -> Grid:
    """Slow random movement with a root mean square of 1; `seconds` is about how long one swing takes."""
    path: Grid = gaussian_filter1d(rng.standard_normal(FRAMES), seconds * FPS / 3, mode="wrap")
    path -= path.mean()
    return path / float(path.std())


def blinks(moments: tuple[float, ...]) -> Grid:
    """Eyelids over time: each blink takes about a quarter of a second."""
    time = np.arange(FRAMES) / FPS
    return np.clip(sum(1.25 * np.exp(-(((time - moment) / 0.07) ** 2)) for moment in moments), 0, 1)


def performance(rng: np.random.Generator) -> list[Pose]:
    """One pose per frame."""
    voice = speech(rng)
    jaw = -6.5 + 13.5 * voice
    yaw, nod, tilt = 3.2 * drift(rng, 1.6), 1.3 * drift(rng, 1.2) + 1.0 * voice, 0.022 * drift(rng, 2.0)
    zoom = 1.0 + 0.012 * drift(rng, 3.0)
    return [Pose(*pose) for pose in zip(jaw, blinks((0.9, 3.1)), yaw, nod, tilt, zoom, strict=True)]


# --- the portrait ----------------------------------------------------------------------------------------------------

# All coordinates are pixels of scikit-image's 512 x 512 `astronaut`.
CROP_LEFT, CROP_TOP, CROP_SIDE = 96.0, 2.0, 256.0
HEAD_X, HEAD_Y, NECK_Y = 224.0, 95.0, 185.0
MOUTH_X, MOUTH_Y, MOUTH_HALF, MOUTH_SAG, CHIN_Y = 223.5, 141.0, 20.5, 8.7, 178.0
EYES = ((202.5, 101.0, 10.5, 4.8, 3.6), (247.5, 104.0, 11.5, 5.0, 2.8))
"""Middle, line between the corners, half width, upper lid above that line, lower lid below it."""


def arch(x: Grid, middle: float, half: float) -> Grid:
    """A parabola: 1 in the middle, 0 from `half` on."""
    return np.clip(1 - ((x - middle) / half) ** 2, 0, None)


def blinked(x: Grid, y: Grid, blink: float) -> Grid:
    """Where to read each pixel's y so that the upper lids come down: the skin above stretches, the lashes move."""
    source = y.copy()
    for middle, corners, half, above, below in EYES:
        bow = arch(x, middle, half)
        lashes, lower = corners - above * bow, corners + below * bow
        edge = lashes + blink * (lower - 1.0 - lashes) * (bow > 0)
        stretch_from = lashes - 5.0
        on_lid = (bow > 0) & (y > stretch_from) & (y <= edge)
        on_lashes = (bow > 0) & (y > edge) & (y <= edge + 2.2)
        source = np.where(on_lid, stretch_from + (y - stretch_from) * 5.0 / (edge - stretch_from), source)
        source = np.where(on_lashes, lashes + (y - edge), source)
    return source


def talked(x: Grid, y: Grid, jaw: float) -> tuple[Grid, Grid]:
    """Where to read each pixel's y so that lip and chin move by `jaw`; and how much it shows of the mouth (0 to 1)."""
    bow = arch(x, MOUTH_X, MOUTH_HALF)
    lip = MOUTH_Y + MOUTH_SAG * bow
    depth = np.clip((y - lip) / (CHIN_Y - lip), 0, 1)
    at_lip, at_chin = bow**0.6, np.exp(-(((x - MOUTH_X) / 34) ** 2))
    fade = np.clip((NECK_Y + 12 - y) / (NECK_Y + 12 - CHIN_Y), 0, 1)
    shift = jaw * ((1 - depth) * at_lip + depth * 0.8 * at_chin) * fade * fade * (3 - 2 * fade)
    opening = jaw * at_lip
    moved_lip = lip + np.where(bow > 0, opening, 0)
    inside = (bow > 0) & (y > lip) & (y < moved_lip)
    source = np.where(y >= moved_lip, y - shift, y)
    source = np.where(inside, lip - 0.4, source)
    edge = np.clip(np.minimum(y - lip, moved_lip - y) / 1.2, 0, 1)
    return source, np.where(inside, edge, 0)


def posed(x: Grid, y: Grid, pose: Pose) -> tuple[Grid, Grid]:
    """Where to read each pixel so that the head turns, nods and tilts while shoulders and background stay."""
    far = np.hypot((x - HEAD_X) / 92, (y - HEAD_Y) / 112)
    head = np.clip(1.6 - far, 0, 1)
    head = head * head * (3 - 2 * head)
    face = np.exp(-(((x - HEAD_X) / 48) ** 2) - ((y - HEAD_Y - 10) / 70) ** 2)
    relief = head * (0.55 + 0.6 * face)
    sin = np.sin(pose.tilt) * head
    return x - pose.yaw * relief + sin * (y - NECK_Y), y - pose.nod * relief - sin * (x - HEAD_X)


def animate_portrait(poses: list[Pose]) -> Iterator[NDArray[np.uint8]]:
    """The astronaut Eileen Collins (NASA, public domain) from scikit-image, animated by `poses`."""
    import skimage.data

    photograph: Any = skimage.data.astronaut
    still = photograph().astype(np.float64)
    still += 0.4 * (still - gaussian_filter(still, (1.0, 1.0, 0)))  # it is magnified: keep the edges crisp
    steps = (np.arange(SIDE) + 0.5) / SIDE - 0.5
    rows, columns = np.meshgrid(steps, steps, indexing="ij")
    gullet = np.array([58.0, 18.0, 18.0])
    for pose in poses:
        x = CROP_LEFT + CROP_SIDE * (0.5 + columns / pose.zoom)
        y = CROP_TOP + CROP_SIDE * (0.5 + rows / pose.zoom)
        x, y = posed(x, y, pose)
        y, inside = talked(x, y, pose.jaw)
        y = blinked(x, y, pose.blink)
        frame = np.stack([map_coordinates(still[..., c], (y, x), order=3, mode="nearest") for c in range(3)], axis=-1)
        frame += inside[..., None] * (gullet - frame)
        yield np.clip(frame, 0, 255).round().astype(np.uint8)


# --- the avatar ------------------------------------------------------------------------------------------------------


def ellipse(draw: ImageDraw.ImageDraw, x: float, y: float, half_x: float, half_y: float, fill: str) -> None:
    if half_x > 0 and half_y > 0:
        draw.ellipse((x - half_x, y - half_y, x + half_x, y + half_y), fill=fill)


def draw_avatar(pose: Pose) -> NDArray[np.uint8]:
    """A drawn face with the same pose, on a canvas three times as large that is then reduced."""
    scale = 3
    side = SIDE * scale
    shades = np.linspace((96, 132, 168), (188, 206, 220), side)[:, None, :].repeat(side, axis=1)
    image = Image.fromarray(shades.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    unit = side / 100
    turn, nod = pose.yaw * 0.45 * unit, pose.nod * 0.45 * unit
    middle, eyes_y, mouth_y = 50 * unit, 44 * unit + nod, 62 * unit + nod
    jaw = max(pose.jaw + 6.5, 0) * 0.55 * unit

    draw.rounded_rectangle((18 * unit, 84 * unit, 82 * unit, 130 * unit), 16 * unit, fill="#2f5d50")
    draw.rounded_rectangle((43 * unit, 66 * unit, 57 * unit, 90 * unit), 6 * unit, fill="#c98d6b")
    ellipse(draw, middle + turn * 0.3, 40 * unit + nod, 28 * unit, 31 * unit, "#3a2418")
    ellipse(draw, middle + turn * 0.6, 48 * unit + nod + jaw * 0.3, 22.5 * unit, 27 * unit + jaw * 0.3, "#e0a884")
    for side_of_face in (-1, 1):
        ellipse(draw, middle + turn * 0.1 + side_of_face * 23 * unit, 48 * unit + nod, 3 * unit, 5 * unit, "#d39a77")
    draw.chord((27 * unit + turn * 0.4, 12 * unit + nod, 73 * unit + turn * 0.4, 52 * unit + nod), 180, 360, "#3a2418")
    for side_of_face in (-1, 1):
        x = middle + turn + side_of_face * 9 * unit
        draw.arc((x - 5 * unit, 36.5 * unit + nod, x + 5 * unit, 44 * unit + nod), 200, 340, "#3a2418", int(0.9 * unit))
        ellipse(draw, x, eyes_y, 4 * unit, 2.7 * unit, "#fbf8f2")
        ellipse(draw, x + turn * 0.25, eyes_y, 2.1 * unit, 2.1 * unit, "#4d6f7d")
        ellipse(draw, x + turn * 0.25, eyes_y, 1.0 * unit, 1.0 * unit, "#15181c")
        lid = 5.8 * unit * pose.blink
        draw.rectangle((x - 4.2 * unit, eyes_y - 3 * unit, x + 4.2 * unit, eyes_y - 3 * unit + lid), fill="#e0a884")
        lash = eyes_y - 2.7 * unit + lid * 0.95
        draw.arc((x - 4.2 * unit, lash, x + 4.2 * unit, lash + 3 * unit), 190, 350, "#3a2418", int(0.6 * unit))
    nose_x = middle + turn * 1.3
    draw.arc(
        (nose_x - 2.5 * unit, 49 * unit + nod, nose_x + 2.5 * unit, 54 * unit + nod), 20, 160, "#b87b5a", int(unit)
    )
    ellipse(draw, middle + turn, mouth_y + jaw * 0.5, 7.6 * unit, 1.9 * unit + jaw * 0.55, "#b4524c")
    ellipse(draw, middle + turn, mouth_y + jaw * 0.5, 6.2 * unit, max(0.35 * unit, jaw * 0.5), "#4a1416")
    if jaw > 1.5 * unit:
        ellipse(draw, middle + turn, mouth_y + jaw * 0.2, 4.8 * unit, min(1.0 * unit, jaw * 0.16), "#f4efe6")
    centre = (middle, 88 * unit)
    image = image.rotate(-np.degrees(pose.tilt) * 0.6, Image.Resampling.BICUBIC, center=centre)
    margin = 4 * unit  # the corners that the rotation leaves empty
    return np.asarray(
        image.resize((SIDE, SIDE), Image.Resampling.LANCZOS, (margin, margin, side - margin, side - margin))
    )


# --- damage and files ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    source: str
    damage: str
    strength: str
    crf: int = 20

    @property
    def clip(self) -> str:
        return "_".join(part for part in (self.source, self.damage, self.strength) if part) + ".mp4"


DAMAGE = {"blur": "blur", "noise": "noise", "downscale": "rescale", "freeze": "stall"}
"""Name in the samples: name in lmm_qa.degrade.causes. Compression comes from the rate factor of the encoder."""
STRENGTH = {"mild": MILD, "strong": STRONG}

SAMPLES = (
    Sample("astronaut", "clean", ""),
    Sample("astronaut", "blur", "mild"),
    Sample("astronaut", "blur", "strong"),
    Sample("astronaut", "compression", "mild", crf=35),
    Sample("astronaut", "compression", "strong", crf=45),
    Sample("astronaut", "noise", "mild", crf=25),
    Sample("astronaut", "noise", "strong", crf=30),
    Sample("astronaut", "freeze", "mild"),
    Sample("astronaut", "freeze", "strong"),
    Sample("astronaut", "downscale", "strong"),
    Sample("avatar", "clean", ""),
    Sample("avatar", "compression", "strong", crf=45),
)

SOURCES: dict[str, Callable[[list[Pose]], Iterator[NDArray[np.uint8]]]] = {
    "astronaut": animate_portrait,
    "avatar": lambda poses: (draw_avatar(pose) for pose in poses),
}


def contact_sheet(clips: dict[str, Frames], path: Path, columns: int = 8) -> None:
    """A picture with some frames of each clip, one row per clip, for inspection."""
    rows = [np.concatenate(frames[:: max(1, len(frames) // columns)][:columns], axis=1) for frames in clips.values()]
    Image.fromarray(np.concatenate(rows)).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the sample clips.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "lmm_qa" / "samples")
    parser.add_argument("--sheet", type=Path, help="also write a picture with some frames of each clip")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    originals: dict[str, Frames] = {}
    shown: dict[str, Frames] = {}
    for number, (source, animate) in enumerate(SOURCES.items()):
        originals[source] = np.stack(list(animate(performance(np.random.default_rng(SEED + number)))))
    with (options.out / "index.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["clip", "source", "damage", "strength"])
        for sample in SAMPLES:
            frames = originals[sample.source]
            if sample.damage in DAMAGE:
                frames = degrade(frames, DAMAGE[sample.damage], STRENGTH[sample.strength], SEED, fps=FPS).frames
            shown[sample.clip] = frames
            h264 = {"crf": str(sample.crf), "preset": "slow", "threads": "1"}  # one thread: the same bytes everywhere
            encode(frames, "libx264", h264, Fraction(FPS), str(options.out / sample.clip))
            table.writerow([sample.clip, sample.source, sample.damage, sample.strength])
            print(f"{sample.clip}: {(options.out / sample.clip).stat().st_size / 1000:.0f} kB")
    if options.sheet:
        contact_sheet(shown, options.sheet)


if __name__ == "__main__":
    main()
