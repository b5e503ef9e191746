"""Train the networks of `lmm_qa.video.measurement.lip_sync`, and measure them on repositories that they have not seen.

    python scripts/lip_sync/train.py clips/index.csv more/index.csv --landmarks lips/ --work work/ -o sync.safetensors

`lips/` comes from scripts/lip_sync/landmarks.py. An index has the columns clip and repository; clips lie beside it.
Half an hour on two cores for 290 clips. What is finished is kept in work/, and the same command continues. It prints,
and writes to work/evaluation.json, how well held-out repositories are judged: all networks and the logistic
regression leave the repository out.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from scipy.ndimage import gaussian_filter1d
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from torch import nn
from torch.nn import functional
from transformers.audio_utils import mel_filter_bank

from lmm_qa.config import Sampling
from lmm_qa.errors import ClipError
from lmm_qa.video.decode import iterate_frames
from lmm_qa.video.face import boxes_at, follow_face
from lmm_qa.video.measurement import lip_sync
from lmm_qa.video.measurement.features import limit_size
from lmm_qa.video.measurement.lip_sync import LipSyncMeter, Weights, mel_spectrum, mouth_shape
from lmm_qa.video.probe import scan_container
from lmm_qa.video.sampling import sample_indices
from lmm_qa.video.sound import SAMPLE_RATE, SoundState, read_sound

FOLDS = 6
COMPONENTS = 8
"""Principal components of how lips move."""
MEASURES = 3
"""Opening, width and height of the mouth: what `mouth_shape` returns."""
ENSEMBLE = 3
"""Pairs of networks whose similarities are averaged."""
MAX_LAG = 38
"""Offsets in training, in vectors of 40 ms."""
NOT_SPEECH = ("Video-LLaMA", "Video-LLaVA", "moviepy", "LHM", "Thin-Plate", "AnimateAnyone")
"""Repositories whose clips seldom show who is heard (samples of video models, music, dance): left out altogether."""
NOT_LEARNED = (*NOT_SPEECH, "LivePortrait")
"""Also with sound that is often early or late, by what networks say that were trained on the others."""

OUTER = (61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 409, 270, 269, 267, 0, 37, 39, 40, 185)
INNER = (78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308, 415, 310, 311, 312, 13, 82, 81, 80, 191)
MIRRORED = (
    *(291, 375, 321, 405, 314, 17, 84, 181, 91, 146, 61, 185, 40, 39, 37, 0, 267, 269, 270, 409),
    *(308, 324, 318, 402, 317, 14, 87, 178, 88, 95, 78, 191, 80, 81, 82, 13, 312, 311, 310, 415),
)  # fmt: skip
LIPS = OUTER + INNER
"""Points of the mesh on the lips, and the same points in a mirrored face."""

UPPER, LOWER = 13, 14
"""The middle of the inner lips."""
EYES = (33, 263)
EYE_SHARE = 0.48
"""Distance of the outer corners of the eyes, relative to the box of our detector."""

PLACE_MEAN, PLACE_SCALE = np.array([0.5, 0.84, np.log(0.25)]), np.array([0.08, 0.08, 0.25])
LIP_SCALE = 0.03
LEFT, TOP, SIDE = lip_sync._WINDOW
MOUTH = lip_sync._MOUTH
LOCATOR_SIDE, MOUTH_SIDE = lip_sync._LOCATOR_SIDE, lip_sync._MOUTH_SIDE

Array = np.ndarray[Any, Any]


@dataclass
class Clip:
    """A clip with its targets."""

    name: str
    repository: str
    windows: Array
    """(n, 128, 128) around the lower face."""
    seconds: Array
    """(n,): when each appears."""
    lips: Array
    """(n, 40, 2): relative to the middle of the mouth, in units of the face's box."""
    middle: Array
    """(n, 2): of the mouth, in units of the box; NaN where no face was found."""
    found: bool
    """Whether our detector found the face; else the box is made from the mesh."""
    spectrum: Any
    """Mel spectrum, 50 per second; None without sound that can be heard."""
    shape: Array | None = None
    """(n, 3): what mouth networks say that have not seen the repository."""

    @property
    def inside(self) -> Array:
        """(n,): whether the mouth lies in the window."""
        x, y = self.middle.T
        with np.errstate(invalid="ignore"):
            return np.asarray((x > 0.1) & (x < 0.9) & (y > 0.5) & (y < 1.2))

    @property
    def width(self) -> Array:
        corners = self.lips[:, LIPS.index(78)] - self.lips[:, LIPS.index(308)]
        return np.asarray(np.linalg.norm(corners, axis=1))

    @property
    def opening(self) -> Array:
        return np.asarray(self.lips[:, LIPS.index(LOWER), 1] - self.lips[:, LIPS.index(UPPER), 1])


# --- Data ------------------------------------------------------------------------------------------------------------


def read_clips(indices: Sequence[Path], landmarks: Path, work: Path, bank: Array) -> list[Clip]:
    clips = []
    for index in indices:
        for row in csv.DictReader(index.open(encoding="utf-8")):
            points, cached = landmarks / f"{Path(row['clip']).stem}.npz", work / "clips" / f"{row['clip']}.npz"
            if not points.exists():
                continue
            if not cached.exists():
                try:
                    data = read_clip(index.parent / row["clip"], np.load(points), bank)
                except ClipError as error:
                    print(f"{row['clip']}: {error}")
                    continue
                cached.parent.mkdir(parents=True, exist_ok=True)
                np.savez_compressed(cached, **data)
            stored = dict(np.load(cached))
            if len(stored.get("windows", ())) < 5:
                continue
            spectrum = stored["spectrum"] if len(stored["spectrum"]) else None
            names = ("windows", "seconds", "lips", "middle")
            known = {name: stored[name] for name in names}
            clips.append(
                Clip(
                    row["clip"],
                    row["repository"].split("/")[-1],
                    **known,
                    found=bool(stored["found"]),
                    spectrum=spectrum,
                )
            )
    return clips


def read_clip(path: Path, mesh: Any, bank: Array) -> dict[str, Any]:
    scan = scan_container(path)
    wanted = sample_indices(scan.seconds, Sampling(strategy="pairs", frames=12))
    meter, pictures = LipSyncMeter(scan.display.orientation), {}
    for index, frame in enumerate(iterate_frames(scan, set())):
        if index in wanted:
            pictures[index] = limit_size(scan.display.picture(frame))
        meter.add_frame(scan.display.luma(frame), scan.seconds[min(index, len(scan.seconds) - 1)])
    face = follow_face([pictures[index] for index in wanted])
    place = {int(number): at for at, number in enumerate(mesh["frames"])}
    used = [at for at, number in enumerate(meter._numbers) if number in place]
    points = mesh["points"][[place[meter._numbers[at]] for at in used]]
    if not used or np.isfinite(points[:, 0, 0]).mean() < 0.3:
        return {"windows": np.zeros((0, 128, 128), np.uint8)}
    numbers = [meter._numbers[at] for at in used]
    aspect = np.array(meter._pictures[0].shape[::-1])
    boxes, indices = (face.boxes, wanted) if face.found else mesh_boxes(points, numbers, aspect)
    followed = boxes_at(boxes, indices, numbers)
    relative = (points - followed[:, None, :2]) / (followed[:, None, 2:] - followed[:, None, :2])
    middle = relative[:, [UPPER, LOWER]].mean(1)
    sound = read_sound(path, scan.start, scan.info.duration)
    seconds = np.array(meter._seconds)[used]
    count = int(min(seconds[-1], sound.seconds) * lip_sync.RATE)
    heard = sound.state is SoundState.PRESENT and count >= 50
    return {
        "windows": meter.windows(boxes, indices)[used],
        "seconds": seconds,
        "lips": np.nan_to_num(relative[:, LIPS] - middle[:, None]).astype(np.float32),
        "middle": middle.astype(np.float32),
        "found": face.found,
        "spectrum": mel_spectrum(sound.samples, bank, 2 * count).astype(np.float32) if heard else np.zeros((0, 1)),
    }


def mesh_boxes(points: Array, numbers: Sequence[int], size: Array) -> tuple[Array, list[int]]:
    """Boxes as our detector would give them, at a few frames, from the eyes and the mouth of the mesh."""
    known = np.flatnonzero(np.isfinite(points[:, 0, 0]))[:: max(1, len(points) // 4)]
    pixels = points * size
    side = np.nanmedian(np.linalg.norm(pixels[:, EYES[0]] - pixels[:, EYES[1]], axis=1)) / EYE_SHARE
    corner = pixels[known][:, [UPPER, LOWER]].mean(1) - side * PLACE_MEAN[:2]
    return np.concatenate([corner, corner + side], axis=1) / np.tile(size, 2), [numbers[at] for at in known]


# --- Mouth -----------------------------------------------------------------------------------------------------------


class Picture(nn.Module):
    """Convolutions with stride 2, then two linear layers: `lip_sync._convolutional`."""

    def __init__(self, widths: Sequence[int], side: int, hidden: int, outputs: int) -> None:
        super().__init__()
        kernels, last = [5, *[3] * (len(widths) - 1)], 1
        self.convolution = nn.ModuleList()
        for width, kernel in zip(widths, kernels, strict=True):
            self.convolution.append(nn.Conv2d(last, width, kernel, 2, kernel // 2))
            last, side = width, (side + 1) // 2
        self.linear = nn.ModuleList([nn.Linear(last * side**2, hidden), nn.Linear(hidden, outputs)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.convolution:
            x = functional.relu(layer(x))
        x = functional.dropout(x.flatten(1), 0.2, self.training)
        x = functional.dropout(functional.relu(self.linear[0](x)), 0.1, self.training)
        scores: torch.Tensor = self.linear[1](x)
        return scores

    def weights(self, name: str) -> Weights:
        return {f"{name}.{key}": value.detach().numpy().copy() for key, value in self.state_dict().items()}


def normalised(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean((-1, -2), keepdim=True)) / (x.std((-1, -2), keepdim=True) + 4)


def cut(windows: torch.Tensor, x: Any, y: Any, side: Any, pixels: int, flip: Any, turn: Any) -> torch.Tensor:
    """(B, 1, pixels, pixels): a square around a point, mirrored where `flip` is -1, turned by radians."""
    share = side / SIDE
    matrix = torch.zeros(len(windows), 2, 3)
    matrix[:, 0, 0], matrix[:, 0, 1] = share * flip * torch.cos(turn), -share * torch.sin(turn)
    matrix[:, 1, 0], matrix[:, 1, 1] = share * flip * torch.sin(turn), share * torch.cos(turn)
    matrix[:, 0, 2], matrix[:, 1, 2] = (x - LEFT) / SIDE * 2 - 1, (y - TOP) / SIDE * 2 - 1
    pictures = windows[:, None]
    if (reduction := round(float(share.mean()) * windows.shape[-1] / pixels)) > 1:
        pictures = functional.avg_pool2d(pictures, reduction)
    grid = functional.affine_grid(matrix, [len(windows), 1, pixels, pixels], align_corners=False)
    return functional.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


def photographed(pictures: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Other gradations, noise, and less resolution."""
    values = pictures.numpy().copy()
    for number, picture in enumerate(values):
        if (draw := rng.random()) < 0.15:
            picture = picture + rng.normal(0, rng.uniform(2, 14), picture.shape)
        elif draw < 0.35:
            reduced = functional.avg_pool2d(torch.tensor(picture)[None], int(rng.integers(2, 4)))
            picture = functional.interpolate(reduced, picture.shape[-2:], mode="bilinear")[0].numpy()
        values[number] = np.clip(picture / 255 + 1e-3, 0, 1) ** np.exp(rng.normal(0, 0.3)) * 255
    return torch.tensor(values, dtype=torch.float32)


class Draw:
    """Random frames of random clips."""

    def __init__(self, clips: Sequence[Clip], rng: np.random.Generator) -> None:
        self.rng = rng
        self.seen = [(clip, np.flatnonzero(clip.inside)) for clip in clips if clip.inside.sum() > 3]
        self.unseen = [(clip, np.flatnonzero(~clip.inside)) for clip in clips if (~clip.inside).sum() > 3]
        self.wide = {}
        for clip, frames in self.seen:  # those in which the mouth differs most from its usual opening
            deviation = abs(clip.opening - np.median(clip.opening[frames]))
            self.wide[clip.name] = frames[deviation[frames] >= np.median(deviation[frames])]

    def frames(self, count: int, seen: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Windows, middles, widths and lips."""
        windows, middles, widths, lips = [], [], [], []
        pool = self.seen if seen else self.unseen
        for _ in range(count if pool else 0):
            clip, frames = pool[self.rng.integers(len(pool))]
            frames = self.wide[clip.name] if seen and self.rng.random() < 0.5 else frames
            at = frames[self.rng.integers(len(frames))]
            windows.append(clip.windows[at])
            middles.append(np.nan_to_num(clip.middle[at], nan=0.5))
            widths.append(clip.width[at])
            lips.append(clip.lips[at])
        shape = (len(windows),)
        return (
            torch.tensor(np.array(windows).reshape(*shape, 128, 128), dtype=torch.float32),
            torch.tensor(np.array(middles).reshape(*shape, 2), dtype=torch.float32),
            torch.tensor(np.array(widths).reshape(shape), dtype=torch.float32),
            torch.tensor(np.array(lips).reshape(*shape, len(LIPS), 2), dtype=torch.float32),
        )

    def normal(self, scale: float, count: int) -> torch.Tensor:
        return torch.tensor(self.rng.normal(0, scale, count), dtype=torch.float32)

    def flips(self, count: int) -> torch.Tensor:
        return torch.tensor(np.where(self.rng.random(count) < 0.5, -1.0, 1.0), dtype=torch.float32)


def optimise(net: nn.Module, steps: int, loss: Callable[[], torch.Tensor], rate: float, decay: float) -> None:
    optimiser = torch.optim.AdamW(net.parameters(), rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, steps)
    net.train()
    for _ in range(steps):
        value = loss()
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        schedule.step()
    net.eval()


def train_mouth(clips: Sequence[Clip], components: Array, seed: int, speed: float) -> Weights:
    """The two networks that see the mouth; the second returns its opening and the components of the lips."""
    torch.manual_seed(seed)
    draw = Draw(clips, np.random.default_rng(seed))
    mean, scale = (torch.tensor(each, dtype=torch.float32) for each in (PLACE_MEAN, PLACE_SCALE))
    locator, batch, wrong = Picture((10, 16), LOCATOR_SIDE, 32, 4), 96, 10

    def locate() -> torch.Tensor:
        parts = [draw.frames(batch - wrong), draw.frames(wrong, seen=False)]
        windows, middles, widths, _ = (torch.cat(each) for each in zip(*parts, strict=True))
        count = len(windows)
        visible = (torch.arange(count) < batch - wrong).float()
        flip, x, y = draw.flips(count), draw.normal(0.07, count), draw.normal(0.07, count)
        side = SIDE * torch.exp(draw.normal(0.08, count))
        seen = cut(windows, 0.5 + x, LEFT + 0.9 + y, side, LOCATOR_SIDE, flip, torch.zeros(count))
        zoom = SIDE / side
        target = torch.stack(
            [
                (middles[:, 0] - 0.5 - x) * flip * zoom + 0.5,
                (middles[:, 1] - LEFT - 0.9 - y) * zoom + LEFT + 0.9,
                torch.log(widths.clamp(0.05) * zoom),
            ],
            1,
        )
        output = locator(normalised(photographed(seen, draw.rng)))
        error = functional.smooth_l1_loss(output[:, :3], (target - mean) / scale, reduction="none").mean(1)
        return (error * visible).mean() + 0.3 * functional.binary_cross_entropy_with_logits(output[:, 3], visible)

    optimise(locator, round(1800 * speed), locate, 3e-3, 0.02)
    usual = torch.tensor(np.concatenate([clip.lips[clip.inside] for clip in clips if clip.inside.any()]).mean(0))
    mirrored = [LIPS.index(point) for point in MIRRORED]
    mouth = Picture((16, 32, 48), MOUTH_SIDE, 64, 2 * len(LIPS))

    def shape() -> torch.Tensor:
        windows, middles, _, lips = draw.frames(batch)
        flip, turn, zoom = draw.flips(batch), draw.normal(0.1, batch), torch.exp(draw.normal(0.1, batch))
        x = (middles[:, 0] + draw.normal(0.025, batch)).clamp(LEFT + 0.25, LEFT + SIDE - 0.25)
        y = (middles[:, 1] + draw.normal(0.025, batch)).clamp(TOP + 0.25, TOP + SIDE - 0.25)
        seen = photographed(cut(windows, x, y, MOUTH * zoom, MOUTH_SIDE, flip, turn), draw.rng)
        points = lips + (middles - torch.stack([x, y], 1))[:, None]
        cosine, sine = torch.cos(turn)[:, None], torch.sin(turn)[:, None]
        across = (points[..., 0] * cosine + points[..., 1] * sine) * flip[:, None]
        down = points[..., 1] * cosine - points[..., 0] * sine
        target = torch.stack([across, down], -1) / zoom[:, None, None]
        target = torch.where((flip < 0)[:, None, None], target[:, mirrored], target)
        return functional.smooth_l1_loss(mouth(normalised(seen)), ((target - usual) / LIP_SCALE).flatten(1), beta=0.5)

    optimise(mouth, round(3600 * speed), shape, 3e-3, 0.05)
    weights = locator.weights("locate") | mouth.weights("mouth")
    weights |= {"locate.mean": PLACE_MEAN.astype(np.float32), "locate.scale": PLACE_SCALE.astype(np.float32)}
    opening = np.zeros((len(LIPS), 2))
    opening[LIPS.index(LOWER), 1], opening[LIPS.index(UPPER), 1] = 1, -1
    rows = np.concatenate([opening.reshape(1, -1), components])
    weight, bias = weights["mouth.linear.1.weight"], weights["mouth.linear.1.bias"]
    weights["mouth.linear.1.weight"] = (rows @ weight * LIP_SCALE).astype(np.float32)
    weights["mouth.linear.1.bias"] = (rows @ (bias * LIP_SCALE + usual.numpy().ravel())).astype(np.float32)
    return weights


def measures(weights: Weights, components: Array) -> Weights:
    """The same networks as `mouth_shape` reads them.

    The mouth's width and height are taken from the components alone, which leaves out how single points are off.
    """
    rows = np.zeros((2, len(LIPS), 2))
    rows[0, LIPS.index(308), 0], rows[0, LIPS.index(78), 0] = 1, -1
    rows[1, LIPS.index(17), 1], rows[1, LIPS.index(0), 1] = 1, -1
    shares = rows.reshape(2, -1) @ components.T
    change = np.block([[np.ones((1, 1)), np.zeros((1, COMPONENTS))], [np.zeros((2, 1)), shares]])
    last = {f"mouth.linear.1.{kind}": change @ weights[f"mouth.linear.1.{kind}"] for kind in ("weight", "bias")}
    return weights | {name: value.astype(np.float32) for name, value in last.items()}


def lip_components(clips: Sequence[Clip]) -> Array:
    """(8, 80): principal components of how lips move within a clip."""
    moves = []
    for clip in clips:
        if clip.inside.sum() > 30:
            lips = clip.lips[clip.inside].reshape(-1, 2 * len(LIPS))
            lips = lips - gaussian_filter1d(lips, 25, axis=0)
            moves.append(lips / (lips.std() + 0.002))
    return np.linalg.svd(np.concatenate(moves), full_matrices=False)[2][:COMPONENTS]


# --- Lips and sound --------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """The two networks that make vectors: `lip_sync._temporal`."""

    def __init__(self, hidden: int = 40, width: int = 16) -> None:
        super().__init__()
        self.mouth = self._layers(2 * MEASURES, hidden, width, 5, 1)
        self.voice = self._layers(40, hidden, width, 6, 2)
        self.temperature = nn.Parameter(torch.tensor(2.0))

    @staticmethod
    def _layers(inputs: int, hidden: int, width: int, kernel: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv1d(inputs, hidden, kernel, stride=stride, padding=2), nn.GELU(), nn.Dropout(0.25),
            nn.Conv1d(hidden, hidden, 5, padding=2), nn.GELU(), nn.Dropout(0.25), nn.Conv1d(hidden, width, 1),
        )  # fmt: skip

    def forward(self, mouth: torch.Tensor, voice: torch.Tensor) -> torch.Tensor:
        """(B, 2 * MAX_LAG + 1): scaled mean similarity at each offset."""
        seen = functional.normalize(self.mouth(mouth.transpose(1, 2)), dim=1)
        heard = functional.normalize(self.voice(voice.transpose(1, 2)), dim=1)
        pairs = torch.einsum("bdt,bds->bts", seen, heard)
        means = [pairs.diagonal(lag, 1, 2).mean(1) for lag in range(2 * MAX_LAG + 1)]
        scores: torch.Tensor = torch.stack(means, 1) * self.temperature.exp()
        return scores

    def weights(self, name: str) -> Weights:
        found = {}
        for net in ("mouth", "voice"):
            for layer, place in enumerate((0, 3, 6)):
                for kind in ("weight", "bias"):
                    found[f"{name}.{net}.{layer}.{kind}"] = getattr(getattr(self, net)[place], kind).detach().numpy()
        return found


def shape_at_rate(clip: Clip) -> Array:
    moments = np.arange(len(clip.spectrum) // 2) / lip_sync.RATE
    return np.stack([np.interp(moments, clip.seconds, each) for each in clip.shape.T], axis=1)


def train_pairs(clips: Sequence[Clip], seed: int, speed: float) -> Weights:
    """Vectors of a moment alike, those of different moments not: the right offset among all."""
    known = [lip_sync.network_inputs(shape_at_rate(clip), clip.spectrum) for clip in clips]
    weights: Weights = {"sync.count": np.array(ENSEMBLE, np.float32)}
    for member in range(ENSEMBLE):
        torch.manual_seed(seed + member)
        rng = np.random.default_rng(seed + member)
        pair, lags = Pair(), torch.arange(2 * MAX_LAG + 1)

        def loss(pair: Pair = pair, lags: torch.Tensor = lags, rng: np.random.Generator = rng) -> torch.Tensor:
            length = int(rng.choice([50, 75, 100]))
            mouths, voices, targets = zip(*(example(known, length, rng) for _ in range(48)), strict=True)
            scores = pair(*(torch.tensor(np.stack(each), dtype=torch.float32) for each in (mouths, voices)))
            near = torch.exp(-0.5 * ((lags[None] - torch.tensor(targets)[:, None]) / 0.8) ** 2)
            value: torch.Tensor = -(near / near.sum(1, keepdim=True) * scores.log_softmax(1)).sum(1).mean()
            return value

        optimise(pair, round(500 * speed), loss, 4e-3, 0.1)
        weights |= pair.weights(f"sync.{member}")
    return weights


def example(known: Sequence[tuple[Array, Array]], length: int, rng: np.random.Generator) -> tuple[Array, Array, int]:
    """A part of a clip with its sound shifted; other speeds, voices, faces and noises than those of the clip."""
    mouth, voice = known[int(rng.integers(len(known)))]
    speed = np.exp(rng.normal(0, 0.12))
    count = int(len(mouth) / speed)
    mouth, voice = (stretched(each, speed, size) for each, size in ((mouth, count), (voice, 2 * count)))
    start, lag = int(rng.integers(0, max(1, count - length + 1))), int(rng.integers(-30, 31))
    mouth = mouth[start : start + length]
    mouth = np.pad(mouth, ((0, length - len(mouth)), (0, 0)))
    at = np.arange(2 * (start - MAX_LAG - lag), 2 * (start - MAX_LAG - lag + length + 2 * MAX_LAG))
    inside = (at >= 0) & (at < len(voice))
    voice = np.where(inside[:, None], voice[np.clip(at, 0, len(voice) - 1)], voice.min())
    voice = np.roll(voice, rng.integers(-2, 3), axis=1)
    if rng.random() < 0.5:
        other = np.resize(known[int(rng.integers(len(known)))][1], voice.shape)
        voice = np.logaddexp(2 * voice, 2 * (other - rng.uniform(0.5, 2.5))) / 2
    if rng.random() < 0.3:
        mouth = gaussian_filter1d(mouth, rng.uniform(0.4, 1), axis=0)
    mouth = mouth * np.exp(rng.normal(0, 0.3, (1, mouth.shape[1]))) + rng.normal(0, 0.15, mouth.shape)
    voice = voice * np.exp(rng.normal(0, 0.15)) + rng.normal(0, 0.15, voice.shape) + rng.normal(0, 0.25, (1, 40))
    return mouth, voice, MAX_LAG + lag


def stretched(values: Array, speed: float, count: int) -> Array:
    at = np.clip(np.arange(count) * speed, 0, len(values) - 1)
    low = at.astype(int)
    share = (at - low)[:, None]
    return np.asarray(values[low] * (1 - share) + values[np.minimum(low + 1, len(values) - 1)] * share)


# --- Evaluation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A clip with its own sound, the same sound shifted, or the sound of another clip."""

    clip: str
    repository: str
    kind: str
    true_offset: float
    evidence: Any
    speech: float
    motion: float


def cases(clip: Clip, others: Sequence[Clip], weights: Weights, seed: int) -> Iterator[Case]:
    rng, shape = np.random.default_rng(seed), shape_at_rate(clip)
    speech = float((lip_sync.voice_level(clip.spectrum) > lip_sync.SPEECH_LEVEL).sum()) / lip_sync.RATE

    def case(kind: str, offset: float, spectrum: Array) -> Case:
        backwards = np.ascontiguousarray(spectrum[::-1])
        similarities = [lip_sync.similarity(weights, shape, each) for each in (spectrum, backwards)]
        evidence = lip_sync.compare(*similarities)
        return Case(clip.name, clip.repository, kind, offset, evidence, speech, float(shape[:, 0].std()))

    yield case("own", 0.0, clip.spectrum)
    for _ in range(4):
        steps = int(rng.choice([-1, 1]) * rng.integers(8, 31))
        shifted = np.roll(clip.spectrum, 2 * steps, axis=0)
        shifted[slice(2 * steps) if steps > 0 else slice(2 * steps, None)] = clip.spectrum.min()
        yield case("shifted", steps / lip_sync.RATE, shifted)
    strangers = [each for each in others if each.repository != clip.repository]
    for _ in range(3):
        yield case("wrong", 0.0, np.resize(strangers[rng.integers(len(strangers))].spectrum, clip.spectrum.shape))


def regression(found: Sequence[Case]) -> LogisticRegression:
    """Out of step or not; the three kinds count as if there were as many in step as out of step."""
    wrong = np.array([case.kind != "own" for case in found])
    weight = np.where(wrong, 1 / wrong.sum(), 1 / (~wrong).sum()) * len(found) / 2
    return LogisticRegression().fit([case.evidence.numbers for case in found], wrong, sample_weight=weight)


def evaluate(found: Sequence[Case]) -> tuple[dict[str, Any], LogisticRegression]:
    """Figures on held-out repositories, and the regression on all of them."""
    probability = np.zeros(len(found))
    for repository in {case.repository for case in found}:
        held = np.array([case.repository == repository for case in found])
        model = regression([case for case, out in zip(found, held, strict=True) if not out])
        numbers = [case.evidence.numbers for case, out in zip(found, held, strict=True) if out]
        probability[held] = model.predict_proba(numbers)[:, 1]
    kinds = np.array([case.kind for case in found])
    error = np.array([case.evidence.offset - case.true_offset for case in found])
    strength = np.array([case.evidence.strength for case in found])
    own = kinds == "own"
    figures: dict[str, Any] = {"clips": int(own.sum()), "repositories": len({case.repository for case in found})}
    for name, chosen in (("own", own), ("shifted", kinds == "shifted")):
        for least in (-99, 1, 2, 3):
            used = chosen & (strength >= least)
            figures[f"{name}, strength >= {least}"] = {
                "share": round(float(used.sum() / chosen.sum()), 3),
                **{f"within {ms} ms": round(float((abs(error[used]) <= ms / 1000).mean()), 3) for ms in (80, 120, 200)},
            }
    for kind in ("shifted", "wrong"):
        used = own | (kinds == kind)
        weight = np.where(own[used], 1 / own.sum(), 1 / (kinds == kind).sum())
        precision = average_precision_score(~own[used], probability[used], sample_weight=weight)
        figures[f"average precision, {kind} (as many as own)"] = round(float(precision), 3)
    for threshold in (0.5, 0.6, 0.7, 0.8, 0.9):
        figures[f"found at {threshold}"] = {
            kind: round(float((probability[kinds == kind] >= threshold).mean()), 3)
            for kind in ("own", "shifted", "wrong")
        }
    return figures, regression(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("indices", nargs="+", type=Path)
    parser.add_argument("--landmarks", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--speed", type=float, default=1.0, help="share of the training steps, for a test")
    arguments = parser.parse_args()
    bank = mel_filter_bank(257, 40, 80, 7600, SAMPLE_RATE, norm="slaney", mel_scale="slaney").astype(np.float32)
    clips = read_clips(arguments.indices, arguments.landmarks, arguments.work, bank)
    start = time.monotonic()

    def report(what: str) -> None:
        print(f"{time.monotonic() - start:5.0f} s  {what}", flush=True)

    report(f"{len(clips)} clips, {sum(clip.found for clip in clips)} with a face that the detector found")
    repositories = sorted({clip.repository for clip in clips})
    order = np.random.default_rng(1).permutation(len(repositories))
    folds = [{repositories[at] for at in order[fold::FOLDS]} for fold in range(FOLDS)]
    components = lip_components(clips)

    def mouths(name: str, chosen: Sequence[Clip]) -> Weights:
        file = arguments.work / f"mouth_{name}.npz"
        if not file.exists():
            np.savez(file, **train_mouth(chosen, components, 0, arguments.speed))
        return dict(np.load(file))

    for number, held in enumerate(folds):
        weights = measures(mouths(str(number), [clip for clip in clips if clip.repository not in held]), components)
        agreement = []
        for clip in clips:
            if clip.repository in held:
                clip.shape = mouth_shape(weights, clip.windows)[0]
                frames = clip.inside
                if clip.found and frames.sum() > 30 and clip.opening[frames].std() > 0.02:
                    agreement.append(np.corrcoef(clip.shape[frames, 0], clip.opening[frames])[0, 1])
        known = f"median correlation {np.median(agreement):.2f} of {len(agreement)}"
        report(f"fold {number}: opening against the mesh, {known}")

    heard = [clip for clip in clips if clip.spectrum is not None]
    taught = [clip for clip in heard if not any(each in clip.repository for each in NOT_LEARNED)]
    found: list[Case] = []
    for number, held in enumerate(folds):
        weights = train_pairs([clip for clip in taught if clip.repository not in held], 10, arguments.speed)
        for clip in heard:
            if clip.repository in held and clip.found:
                found += cases(clip, heard, weights, len(found))
        report(f"fold {number}: {len(found)} cases")
    judged = [case for case in found if case.speech >= lip_sync.MIN_SPEECH and case.motion >= lip_sync.MIN_MOTION]
    spoken = [case for case in judged if not any(each in case.repository for each in NOT_SPEECH)]
    figures, model = evaluate(spoken)
    for case in found:
        if case.kind == "own":
            offset, strength = case.evidence.offset, case.evidence.strength
            known = f"speech {case.speech:4.1f} s, motion {case.motion:.3f}"
            print(f"{case.clip:<60.60} {offset:6.2f} s, strength {strength:5.1f}, {known}")
    print(json.dumps(figures, indent=2))
    (arguments.work / "evaluation.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")

    final = measures(mouths("all", clips), components) | train_pairs(taught, 10, arguments.speed) | {"mel": bank}
    settings = {"weights": model.coef_[0].tolist(), "intercept": float(model.intercept_[0])}
    arrays = {name: np.ascontiguousarray(np.asarray(value, np.float32)) for name, value in final.items()}
    halves = {
        name: value.astype(np.float16) if value.ndim > 1 and name != "mel" else value for name, value in arrays.items()
    }
    save_file(halves, arguments.output, metadata={"settings": json.dumps(settings)})
    report(f"{sum(value.size for value in final.values())} weights -> {arguments.output}")


if __name__ == "__main__":
    main()
