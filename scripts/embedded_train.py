"""Train the embedded model, phase by phase, from the copies that scripts/embedded_data.py prepared.

    python scripts/embedded_train.py --data data/embedded --init runs/embedded/init --out runs/embedded

Phases (configs/embedded.yaml): `vision` teaches the vision tower alone, with heads that are thrown away, to read from
each 28 x 28 region its frequency energies, its motion and what the damage did to it, and from all regions of a view the
score, the causes and their strengths; `joint` trains the whole model through the prompt: the level words, closed
questions on the defects, and sentences that explain; `full` goes on with the geometry used for rating; `adapter` keeps
the vision features and trains a LoRA on the language model. Each phase is saved to OUT/<phase> and skipped when that
is there; inside a phase a checkpoint is written every few minutes and a killed run goes on from it. Every 150 steps a
line goes to OUT/log.jsonl.

A sample's questions share its prefix, as in rating: [videos] [score] [question] ... [explanation], each part seeing the
videos and itself alone, all at the same positions.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from embedded_data import FACE_SEEN, KINDS, LUMA, handed_on, rated_views, rows_of
from embedded_defects import known
from numpy.lib.stride_tricks import sliding_window_view
from scipy.fft import dct
from scipy.stats import spearmanr
from skimage.measure import block_reduce
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.qwen2_vl.modeling_qwen2_vl import VisionAttention, apply_rotary_pos_emb_vision

from lmm_qa.config import View
from lmm_qa.defects.explanation import Finding, explanation_prompt, is_good, sentence
from lmm_qa.defects.questions import questions
from lmm_qa.defects.vocabulary import BY_NAME
from lmm_qa.degrade.causes import DEGRADATIONS, FACIAL, TEMPORAL
from lmm_qa.degrade.dataset import TIMED
from lmm_qa.model.levels import LEVELS
from lmm_qa.model.prompt import Prompt, load_prompt

Made = TypeVar("Made")

CAUSES = tuple(DEGRADATIONS)
SIDES = {"whole": 112, "face": FACE_SEEN, "crop": 112}  # of the windows of the phase `vision`, one view at a time
PATCH, MERGED = 14, 28
CHECKPOINT_SECONDS = 240
OWN = 14  # targets a merged token: 6 bands, motion in 2, brightness, 2 colours, what is flat, what stands, blocks
DENSE = OWN + 2  # and against the source: loss and structure
CHANGED, UNCHANGED = 2.0, 0.5  # grey levels: a region that changed by more shows what was done, by less shows nothing
ASKED = 5  # closed questions a sample
SHARES = {"clip": 0.5, "portrait": 0.25, "picture": 0.25}  # of the samples, by what they were made of
RECOLOURED = 0.7  # share of the samples of which the colours are changed, unless colours are what is damaged
LIGHT = {"overexposure", "underexposure", "colour_cast"}
OF_HEADS = [name for name, defect in BY_NAME.items() if defect.causes and set(defect.causes) <= set(FACIAL)]
AUTOCAST = torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def known_defects(row: dict[str, Any]) -> dict[str, bool | None]:
    """What is known of a copy, without the lips of a photograph, and without a head that is not there."""
    unseen = ([] if row["head"] else OF_HEADS) + (["lips"] if row["still"] else [])
    return known(row) | dict.fromkeys(unseen)


def strongest_first(row: dict[str, Any], names: Sequence[str]) -> dict[str, float]:
    """How strong each of these defects of a copy is, by the strongest of its causes."""
    strength = dict(zip(row["causes"], row["strengths"], strict=True))
    of = {name: max(strength[cause] for cause in BY_NAME[name].causes if cause in strength) for name in names}
    return dict(sorted(of.items(), key=lambda one: -one[1]))


def recolouring(draw: random.Random) -> Callable[[Any], Any]:
    """A change of tone, white balance and saturation, for all that is seen of a sample: so that the model does not know
    its sources again."""
    grey = np.array(LUMA, np.float32)
    saturation, gamma = draw.uniform(0.4, 1.3), math.exp(draw.uniform(-0.25, 0.25))
    gains = np.array([draw.uniform(0.88, 1.0) for _ in range(3)], np.float32)
    mix = (saturation * np.eye(3, dtype=np.float32) + (1 - saturation) * grey) * gains[:, None]
    tone = (255 * np.linspace(0, 1, 256, dtype=np.float32) ** gamma).astype(np.float32)
    return lambda clip: (tone[clip] @ mix.T + 0.5).clip(0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Batch:
    views: list[Tensor]  # each (B, T, H, W, 3) uint8
    clean: list[Tensor]  # the same windows of the undamaged source
    quality: Tensor  # (B,) in [0, 1]
    causes: Tensor  # (B, len(CAUSES)) strength, 0 where absent (an absent cause and strength 0 look alike)
    spatial: Tensor  # (B,) 1 where every frame shows the moment of the source's frame
    single: Tensor  # (B,) 1 where no two damages are on top of each other
    rows: list[dict[str, Any]]


class Tree:
    """Copies by what they were made of, source and segment; each source of a kind, and each of its segments, is drawn
    as often as the next."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.kinds: dict[str, dict[str, dict[str, list[dict[str, Any]]]]] = {}
        for row in rows:
            kind = "clip" if not row["still"] else "portrait" if row["head"] else "picture"
            sources = self.kinds.setdefault(kind, {})
            sources.setdefault(row["source"], {}).setdefault(row["segment"], []).append(row)

    def draw(self, draw: random.Random) -> dict[str, Any]:
        kinds = list(self.kinds)
        sources = self.kinds[draw.choices(kinds, [SHARES[kind] for kind in kinds])[0]]
        segments = sources[draw.choice(list(sources))]
        return draw.choice(segments[draw.choice(list(segments))])


class Copies:
    """The prepared copies of one split; looks again for new ones, since preparation may still be under way."""

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = folder, split
        self.rows: list[dict[str, Any]] = []
        self.sizes: dict[str, tuple[tuple[int, ...], ...]] = {}
        self.header = 0  # bytes before the pixels, the same in all files
        self.refresh()

    def refresh(self) -> None:
        rows = rows_of(self.folder)
        self.rows = [row for row in rows if row["split"] == self.split]
        self.clean = {row["segment"]: row["name"] for row in rows if not row["causes"]}
        self.rows = [row for row in self.rows if row["segment"] in self.clean]
        for row in self.rows:
            row.setdefault("head", True)  # data of before there were pictures without
            row["known"] = known_defects(row)
        self.tree = Tree(self.rows)
        self.alike: dict[Any, Tree] = {}

    def shapes(self, row: dict[str, Any]) -> tuple[tuple[int, ...], ...]:
        """(frames, height, width, 3) of each view."""
        if row["segment"] not in self.sizes:
            clean = self.clean[row["segment"]]
            views = [np.load(self.folder / f"{clean}.{kind}.npy", mmap_mode="r") for kind in KINDS]
            self.header = views[0].offset
            self.sizes[row["segment"]] = tuple(view.shape for view in views)
        return self.sizes[row["segment"]]

    def read(self, name: str, kind: str, shape: tuple[int, ...], pairs: list[int]) -> Any:
        """The frames of these pairs, (2 pairs, H, W, 3); other threads go on meanwhile."""
        size = 2 * math.prod(shape[1:])
        file = self.folder / f"{name}.{kind}.npy"
        found = [np.fromfile(file, np.uint8, size, offset=self.header + pair * size) for pair in pairs]
        return np.concatenate(found).reshape(-1, *shape[1:])

    def window(self, row: dict[str, Any], kind: str, side: int, pairs: list[int], draw: random.Random,
               recolour: Callable[[Any], Any]) -> list[Any]:  # fmt: skip
        """A part of a view of a copy and of its source; damage to a face is inside, more often than by chance."""
        shape = self.shapes(row)[KINDS.index(kind)]
        damaged = self.read(row["name"], kind, shape, pairs)
        clean = self.read(self.clean[row["segment"]], kind, shape, pairs)
        if kind == "crop":
            lot = draw.random()  # the same encoder for both
            damaged, clean = (handed_on(clip, random.Random(lot)) for clip in (damaged, clean))
        height, width = damaged.shape[1:3]
        tall, wide = min(side, height) // MERGED * MERGED, min(side, width) // MERGED * MERGED
        top, left = draw.randint(0, height - tall), draw.randint(0, width - wide)
        if (tall, wide) != (height, width) and set(row["causes"]) & set(FACIAL) and draw.random() < 0.7:
            moment = draw.randrange(len(damaged))
            change = np.abs(damaged[moment].astype(np.int16) - clean[moment]).sum(-1)
            blocks = block_reduce(change, (PATCH, PATCH), np.sum)
            sums = sliding_window_view(blocks, (tall // PATCH, wide // PATCH)).sum((2, 3))
            best = np.unravel_index(sums.argmax(), sums.shape)
            top, left = min(PATCH * int(best[0]), height - tall), min(PATCH * int(best[1]), width - wide)
        flip = -1 if draw.random() < 0.5 else 1
        cut = [clip[:, top : top + tall, left : left + wide][:, :, ::flip] for clip in (damaged, clean)]
        return [torch.from_numpy(np.ascontiguousarray(recolour(part))) for part in cut]

    def batch(self, size: int, sides: dict[str, int], pairs: int, draw: random.Random) -> Batch:
        """Samples drawn from the tree; all windows of a view have one shape, that of the first drawn."""

        def cut(row: dict[str, Any]) -> list[tuple[int, ...]]:
            shapes = dict(zip(KINDS, self.shapes(row), strict=True))
            return [tuple(min(side, edge) // MERGED for edge in shapes[kind][1:3]) for kind, side in sides.items()]

        rows = [self.tree.draw(draw)]
        shape = cut(rows[0])
        key = (*sides.items(), *shape)
        if key not in self.alike:
            self.alike[key] = Tree([row for row in self.rows if cut(row) == shape])
        rows += [self.alike[key].draw(draw) for _ in range(size - 1)]
        views: list[list[Tensor]] = [[] for _ in sides]
        clean: list[list[Tensor]] = [[] for _ in sides]
        for row in rows:
            chosen = sorted(draw.sample(range(6), pairs))
            fit = self.split == "train" and not set(row["causes"]) & LIGHT and draw.random() < RECOLOURED
            recolour = recolouring(draw) if fit else np.asarray
            for number, (kind, side) in enumerate(sides.items()):
                window = self.window(row, kind, side, chosen, draw, recolour)
                views[number].append(window[0])
                clean[number].append(window[1])
        strengths = torch.zeros(size, len(CAUSES))
        for number, row in enumerate(rows):
            for cause, strength in zip(row["causes"], row["strengths"], strict=True):
                strengths[number, CAUSES.index(cause)] = 0.3 + 0.7 * strength
        return Batch(
            views=[torch.stack(view).to(DEVICE) for view in views],
            clean=[torch.stack(source).to(DEVICE) for source in clean],
            quality=torch.tensor([row["quality"] for row in rows]).to(DEVICE),
            causes=strengths.to(DEVICE),
            spatial=torch.tensor([float(not set(row["causes"]) & set(TEMPORAL)) for row in rows]).to(DEVICE),
            single=torch.tensor([float(len(row["causes"]) < 2) for row in rows]).to(DEVICE),
            rows=rows,
        )


def patchify(frames: Tensor) -> tuple[Tensor, Tensor]:
    """What Qwen2VLVideoProcessor makes of (B, T, H, W, 3) uint8 frames: flat patches in [-1, 1] and the grid (B, 3)."""
    batch, count, height, width, _ = frames.shape
    rows, columns, times = height // PATCH, width // PATCH, count // 2
    pixels = frames.float().div(127.5).sub(1).permute(0, 1, 4, 2, 3)
    pixels = pixels.reshape(batch, times, 2, 3, rows // 2, 2, PATCH, columns // 2, 2, PATCH)
    flat = pixels.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(batch * times * rows * columns, -1)
    return flat, torch.tensor([[times, rows, columns]] * batch)


def merged(frames: Tensor) -> Tensor:
    """(B, T, H, W, C) -> (N, 2, 28, 28, C), one row a merged token, in the order of the tokens."""
    batch, count, height, width, channels = frames.shape
    parts = frames.reshape(batch, count // 2, 2, height // MERGED, MERGED, width // MERGED, MERGED, channels)
    return parts.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, 2, MERGED, MERGED, channels)


class DenseTargets:
    """What each merged token is asked to know of its own pixels, roughly unit scale; and what was done to them."""

    def __init__(self) -> None:
        self.cosine = torch.from_numpy(dct(np.eye(MERGED), axis=0, norm="ortho").astype(np.float32)).to(DEVICE)
        radius = np.hypot(*np.divmod(np.arange(MERGED * MERGED), MERGED))
        edges = [0.5, 2.5, 5, 8, 12, 17, 40]
        bands = [(radius >= low) & (radius < high) for low, high in itertools.pairwise(edges)]
        self.bands = torch.tensor(np.array([band / band.sum() for band in bands]), dtype=torch.float32).T.to(DEVICE)
        self.grey = torch.tensor(LUMA, device=DEVICE) / 255

    def energies(self, pixels: Tensor) -> Tensor:
        return (self.cosine @ pixels @ self.cosine.T).flatten(1).square() @ self.bands

    def __call__(self, frames: Tensor, clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Targets that need the damaged frames alone (N, OWN), those against the source (N, 2), and the mean change in
        grey levels (N,)."""
        pixels, pixels_clean = merged(frames).float(), merged(clean).float()
        ours, source = pixels @ self.grey, pixels_clean @ self.grey
        still, motion = self.energies(ours.mean(1)), self.energies(ours[:, 0] - ours[:, 1])
        motion = torch.stack([motion[:, :3].mean(1), motion[:, 3:].mean(1)], 1)
        bands = torch.log10(torch.cat([still, motion], 1) + 1e-7) + 4
        red, green, blue = (pixels.mean((1, 2, 3)) / 255).unbind(1)
        # Green says most about brightness, and is whole numbers, as luma is not.
        first, second = pixels[..., 1].unbind(1)
        steps = [first.diff(dim=1).abs().mean(2), first.diff(dim=2).abs().mean(1)]  # (N, 27) each
        flat = sum((first.diff(dim=dim) == 0).float().mean((1, 2)) for dim in (1, 2))
        frozen = (first == second).float().mean((1, 2))
        folded = [step[:, :24].reshape(-1, 3, 8).mean(1) for step in steps]  # blocks of codecs: eight pixels apart
        blocks = sum(torch.log((fold.amax(1) + 0.5) / (fold.median(1).values + 0.5)) for fold in folded)
        light, colours = 2 * ours.mean((1, 2, 3)), (4 * (red - green), 4 * (blue - green))
        own = torch.cat([bands, torch.stack([light, *colours, flat, frozen, blocks], 1)], 1)
        a, b = ours[:, 0], source[:, 0]
        error = (a - b).square().mean((1, 2))
        spread = ((a - a.mean((1, 2), True)) * (b - b.mean((1, 2), True))).mean((1, 2))
        structure = (2 * spread + 9e-4) / (a.var((1, 2)) + b.var((1, 2)) + 9e-4)
        against = torch.stack([torch.log10(error + 1e-6) / 2 + 2, 2 * structure], 1)
        return own, against, (pixels - pixels_clean).abs().mean((1, 2, 3, 4))


class Heads(nn.Module):
    """Thrown away after training: from each token its dense targets and what was done there; and from the statistics
    of these alone, so that no source is known again by anything else, score and causes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, DENSE)
        self.places = nn.Linear(width, len(CAUSES))
        nn.init.constant_(self.places.bias, -3)
        self.pooled = nn.Sequential(nn.Linear(3 * (DENSE + len(CAUSES)), 128), nn.GELU(),
                                    nn.Linear(128, 1 + len(CAUSES)))  # fmt: skip

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, width) -> (B, N, DENSE), log-odds of each cause (B, N, causes), and (B, 1 + causes)."""
        dense, places = self.dense(tokens), self.places(tokens)
        seen = torch.cat([dense, places.sigmoid()], -1)
        return dense, places, self.pooled(torch.cat([seen.mean(1), seen.std(1), seen.amax(1)], 1))


def head_loss(heads: Heads, tokens: list[Tensor], batch: Batch, targets: DenseTargets) -> tuple[Tensor, Tensor]:
    """Losses of the heads over the views' tokens, each (B, N, width); and the predicted quality (B,)."""
    dense_loss = torch.zeros((), device=DEVICE)
    pooled_views = []
    for view, clean, seen in zip(batch.views, batch.clean, tokens, strict=True):
        own, against, change = targets(view, clean)
        dense, places, pooled = heads(seen)
        pooled_views.append(pooled)
        guess = dense.float().flatten(0, 1)
        spatial, single = (one.repeat_interleave(seen.shape[1])[:, None] for one in (batch.spatial, batch.single))
        compared = F.smooth_l1_loss(guess[:, OWN:], against, reduction="none") * spatial
        dense_loss = dense_loss + F.smooth_l1_loss(guess[:, :OWN], own) + 2 * compared.mean()
        # What was done is to be seen where the pixels changed. Of two damages at once nobody knows which it was, and
        # where time is out of step every region changed.
        done = (batch.causes > 0).float().repeat_interleave(seen.shape[1], 0)
        there = done * (change > CHANGED)[:, None]
        sure = ((change > CHANGED) | (change < UNCHANGED))[:, None] * spatial * single
        weight = torch.where(done > 0, sure, 1.0)
        each = F.binary_cross_entropy_with_logits(places.float().flatten(0, 1), there, reduction="none")
        dense_loss = dense_loss + (each * weight).sum(1).mean()
    pooled = torch.stack(pooled_views).mean(0).float()
    score = F.smooth_l1_loss(pooled[:, 0], batch.quality, beta=0.1)
    causes = F.smooth_l1_loss(pooled[:, 1:], batch.causes, beta=0.1)
    return dense_loss / len(tokens) + 2 * score + 4 * causes, pooled[:, 0]


def attend_in_one_call(self: VisionAttention, hidden_states: Tensor, cu_seqlens: Tensor,
                       position_embeddings: tuple[Tensor, Tensor], **_: Any) -> Tensor:  # fmt: skip
    """The vision tower's attention for pictures of one size: the same numbers as the original, which goes through the
    pictures one by one and spends most of its time on calls."""
    pictures = len(cu_seqlens) - 1
    q, k, v = self.qkv(hidden_states).reshape(len(hidden_states), 3, self.num_heads, -1).unbind(1)
    q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
    q, k, v = (each.unflatten(0, (pictures, -1)).transpose(1, 2).to(v.dtype) for each in (q, k, v))
    # On a CPU in bfloat16, at a hundred patches, the backward pass of the fused kernel takes three times as long.
    mixed = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1).to(v.dtype) @ v
    return self.proj(mixed.transpose(1, 2).flatten(0, 1).flatten(1))


VisionAttention.forward = attend_in_one_call


@dataclass(frozen=True)
class Part:
    """What comes after the videos: a question, the begin of its answer, and what should follow."""

    ids: list[int]
    wanted: list[int]  # the answer's tokens, of which the last `len(wanted)` ids but one are the context; score: none


class Prefill:
    """The prompts as token ids, and where the level words stand in the vocabulary."""

    def __init__(self, base: Path, kinds: Sequence[str]) -> None:
        self.kinds = kinds  # of the views, in the order of the prompt
        self.prompt = load_prompt("talking_head")
        self.processor = AutoProcessor.from_pretrained(base)
        tokenizer = self.processor.tokenizer
        self.video = tokenizer.convert_tokens_to_ids("<|video_pad|>")
        self.end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.levels = [self.word(" " + level) for level in self.prompt.levels]
        self.prefix = self.split(self.prompt)[0]
        self.score = Part(self.split(self.prompt)[1], [])
        self.asked = {
            name: [Part(self.split(prompt)[1], [self.word(" " + answer)]) for answer in prompt.levels]
            for name, prompt in questions().items()
        }
        self.positions: dict[tuple[Any, ...], Tensor] = {}

    def word(self, text: str) -> int:
        (token,) = self.processor.tokenizer(text)["input_ids"]
        return int(token)

    def split(self, prompt: Prompt, more: str = "") -> tuple[list[int], list[int]]:
        """Ids up to the last video, and after it."""
        chat = self.processor.apply_chat_template(
            prompt.messages(len(self.kinds)), tokenize=False, add_generation_prompt=True
        )
        before, mark, after = (chat + prompt.stem + more).rpartition("<|video_pad|>")
        tokenizer = self.processor.tokenizer
        return tokenizer(before + mark)["input_ids"], tokenizer(after)["input_ids"]

    def explanation(self, row: dict[str, Any], draw: random.Random) -> Part:
        """A sentence of the grammar on one copy, after its level."""
        strength = strongest_first(row, [name for name, known in row["known"].items() if known])
        found = []
        for name in strength:
            first = 0.0 if name == "buffering" else draw.uniform(0, 8)
            when = ((first, first + draw.uniform(0.3, 5)),) if name in TIMED and draw.random() < 0.85 else ()
            found.append(Finding(name, 1.0, when))
        absent = [name for name, known in row["known"].items() if known is False]
        level = self.prompt.levels[round(row["quality"] * (len(LEVELS) - 1))]
        return self.spoken(found, absent, level, draw, [*strength.values()])

    def spoken(
        self, found: list[Finding], absent: list[str], level: str, draw: random.Random, strengths: list[float]
    ) -> Part:
        """What the model is told, and a sentence of the grammar about it (see `lmm_qa.defects.explanation.sentence`)."""
        text = sentence(found, absent, draw, strengths, is_good(level, self.prompt.levels))
        _, context = self.split(explanation_prompt(self.prompt, found), f" {level}")
        said = [*self.processor.tokenizer(text)["input_ids"], self.end]
        return Part(context + said[:-1], said)

    def parts(self, row: dict[str, Any], draw: random.Random, explained: bool) -> list[Part]:
        """The score, and some closed questions (what is there first) or the words about a head, which are as long."""
        there = [name for name, known in row["known"].items() if known]
        absent = [name for name, known in row["known"].items() if known is False]
        asked = draw.sample(there, min(len(there), 3))
        asked += draw.sample(absent, min(len(absent), ASKED - len(asked)))
        if explained and row["head"]:
            return [self.score, self.explanation(row, draw)]
        return [self.score, *(self.asked[name][bool(row["known"][name])] for name in asked)]

    def inputs(self, model: Any, shapes: list[tuple[int, ...]], parts: list[list[Part]]) -> dict[str, Tensor]:
        """Ids, positions and mask of a batch in which each view has one shape, (T, H, W, 3).

        `at`: (n, 2) places (sample, position) whose next token is to be `wanted`; `scores`: (B,) positions.
        """
        sizes = [(shape[0] // 2, shape[1] // PATCH, shape[2] // PATCH) for shape in shapes]
        counts = iter([math.prod(size) // 4 for size in sizes])
        ids = [copy for token in self.prefix for copy in [token] * (next(counts) if token == self.video else 1)]
        key = tuple(sizes)
        if key not in self.positions:
            row = torch.tensor([ids])
            kinds = (row == self.video).int() * 2
            self.positions[key], _ = model.get_rope_index(row, kinds, video_grid_thw=torch.tensor(sizes))
        prefix = self.positions[key]  # (3, 1, P)
        after, length = int(prefix.max()) + 1, len(ids)
        longest = max(sum(len(part.ids) for part in each) for each in parts)
        longest = -(-longest // 64) * 64  # few different shapes: oneDNN compiles kernels for each
        batch, total = len(parts), length + longest
        tokens = torch.full((batch, total), self.end)
        tokens[:, :length] = torch.tensor(ids)
        positions = torch.full((3, batch, total), after)
        positions[:, :, :length] = prefix
        segment = torch.full((batch, total), -1)
        segment[:, :length] = 0
        at, wanted = [], []
        for number, each in enumerate(parts):
            start = length
            for index, part in enumerate(each):
                stop = start + len(part.ids)
                tokens[number, start:stop] = torch.tensor(part.ids)
                positions[:, number, start:stop] = after + torch.arange(len(part.ids))
                segment[number, start:stop] = index + 1
                at += [(number, stop - len(part.wanted) + offset) for offset in range(len(part.wanted))]
                wanted += part.wanted
                start = stop
        seen = (segment[:, None] == 0) | (segment[:, None] == segment[:, :, None])
        mask = seen & torch.ones(total, total, dtype=torch.bool).tril()
        found = {
            "input_ids": tokens, "position_ids": positions, "mask": mask[:, None],
            "at": torch.tensor(at), "wanted": torch.tensor(wanted),
            "scores": torch.tensor([length + len(self.score.ids) - 1] * batch),
            "answers": torch.tensor([len(part.wanted) == 1 for each in parts for part in each for _ in part.wanted]),
        }  # fmt: skip
        return {name: value.to(DEVICE) for name, value in found.items()}


def vision_tokens(model: Any, views: list[Tensor]) -> list[Tensor]:
    """Merged tokens of each view, (B, N, width)."""
    tokens = []
    for view in views:
        patches, grid = patchify(view)
        seen = model.model.visual(patches, grid.to(DEVICE)).pooler_output
        tokens.append(seen.reshape(len(view), -1, seen.shape[-1]))
    return tokens


def next_words(core: Any, prefill: Prefill, inputs: dict[str, Tensor], tokens: list[Tensor]) -> tuple[Tensor, Tensor]:
    """float32 logits: (B, vocabulary) at the end of the rating prompt, the level words first, worst level first; and
    (n, vocabulary) at the places of the other answers.

    `core` is the Qwen2VLModel (which PEFT changes in place): its language model is called with the vision tokens put in
    place, as its own forward does.
    """
    embeds = core.get_input_embeddings()(inputs["input_ids"])
    place = (inputs["input_ids"] == prefill.video)[..., None]
    embeds = embeds.masked_scatter(place, torch.cat(tokens, 1).to(embeds.dtype))
    hidden = core.language_model(
        inputs_embeds=embeds, position_ids=inputs["position_ids"], attention_mask={"full_attention": inputs["mask"]},
        use_cache=False,
    ).last_hidden_state  # fmt: skip
    words = core.get_input_embeddings().weight.T
    scores = (hidden[torch.arange(len(hidden)), inputs["scores"]] @ words).float()
    others = [word for word in range(scores.shape[1]) if word not in prefill.levels]
    answers = (hidden[inputs["at"][:, 0], inputs["at"][:, 1]] @ words).float()
    return scores[:, prefill.levels + others], answers


def answer_loss(logits: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean cross-entropies of the closed questions, and of the words of explanations (0 where there are none)."""
    each = F.cross_entropy(logits, inputs["wanted"], reduction="none")
    closed = inputs["answers"]
    return each[closed].mean(), each[~closed].mean() if (~closed).any() else torch.zeros((), device=DEVICE)


def level_loss(vocabulary: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
    """Soft cross-entropy on two-hot targets (over the whole vocabulary, so that the level words hold its mass),
    fidelity over all pairs, and distance; and the predicted quality in [0, 1]."""
    logits = vocabulary[:, : len(LEVELS)]
    mass = (vocabulary.logsumexp(-1) - logits.logsumexp(-1)).mean()
    anchors = torch.linspace(0, 1, logits.shape[1], device=logits.device)
    target = (1 - (quality[:, None] - anchors).abs() * (logits.shape[1] - 1)).clamp(0)
    cross = -(target * logits.log_softmax(-1)).sum(-1).mean()
    p = logits.softmax(-1)
    guess = p @ anchors
    variance = (p * (anchors - guess[:, None]).square()).sum(-1) + 1e-3
    root = (variance[:, None] + variance).sqrt()
    better = torch.special.ndtr((guess[:, None] - guess) / root).clamp(1e-6, 1 - 1e-6)
    reference_defects = torch.special.ndtr((quality[:, None] - quality) / 0.1)
    fidelity = 1 - (better * reference_defects + 1e-8).sqrt() - ((1 - better) * (1 - reference_defects) + 1e-8).sqrt()
    return mass + cross + fidelity.mean() + 2 * F.smooth_l1_loss(guess, quality, beta=0.1), guess


class Clock:
    """Optimizer, cosine schedule, checkpoints and the log of one phase."""

    def __init__(self, name: str, phase: dict[str, Any], out: Path, modules: dict[str, nn.Module]) -> None:
        self.name, self.out, self.modules = name, out, modules
        self.steps = phase["samples"] // phase["batch"]
        self.rate = phase["learning_rate"]
        trained = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=self.rate, betas=(0.9, 0.98))
        self.trained, self.step, self.saved = trained, 0, time.monotonic()
        self.file = out / f"{name}.checkpoint.pt"
        if self.file.exists():
            state = torch.load(self.file, map_location=DEVICE, weights_only=True)
            for key, module in modules.items():
                module.load_state_dict(state["modules"][key])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
            print(f"{name}: going on from step {self.step}", flush=True)

    def __iter__(self) -> Iterator[int]:
        while self.step < self.steps:
            warm, done = min(1.0, (self.step + 1) / min(200, self.steps / 5)), self.step / self.steps
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
            yield self.step
            self.step += 1
            if time.monotonic() - self.saved > CHECKPOINT_SECONDS:
                self.save()
        self.file.unlink(missing_ok=True)

    def save(self) -> None:
        partial = self.file.with_suffix(".tmp")
        modules = {key: module.state_dict() for key, module in self.modules.items()}
        torch.save({"modules": modules, "optimizer": self.optimizer.state_dict(), "step": self.step}, partial)
        partial.replace(self.file)
        self.saved = time.monotonic()

    def update(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise SystemExit(f"{self.name}: loss is {loss.item()} at step {self.step}")
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def log(self, **values: Any) -> None:
        line = json.dumps(
            {"phase": self.name, "step": self.step, "of": self.steps, "time": round(time.time()), **values}
        )
        print(line, flush=True)
        with (self.out / "log.jsonl").open("a") as file:
            file.write(line + "\n")


def ahead(make: Callable[[int], Made], steps: range) -> Iterator[Made]:
    """What `make` gives for each step, made in a thread while the last is worked on."""
    with ThreadPoolExecutor(1) as thread:
        coming = deque(thread.submit(make, step) for step in steps[:2])
        for step in steps:
            yield coming.popleft().result()
            if step + 2 in steps:
                coming.append(thread.submit(make, step + 2))


def seed_of(name: str, step: int) -> random.Random:
    """A step's samples depend on the step alone, so that a resumed run draws what an undisturbed one would."""
    return random.Random(f"{name} {step}")


def train_heads_and_model(name: str, phase: dict[str, Any], out: Path, data: Path, model: Any, heads: Heads,
                          prefill: Prefill) -> None:  # fmt: skip
    """The phases `vision` (tower alone), `joint` and `full` (through the prompt)."""
    spoken = name != "vision"
    train, val, targets = Copies(data, "train"), Copies(data, "val"), DenseTargets()
    if not spoken:  # windows of few shapes: worth a compiler's time
        model.model.visual.compile(dynamic=False)
    clock = Clock(name, phase, out, {"model": model if spoken else model.model.visual, "heads": heads})
    began, first = time.monotonic(), clock.step

    def run(batch: Batch, draw: random.Random) -> tuple[Tensor, dict[str, float], Tensor, Tensor, dict[str, Tensor]]:
        tokens = vision_tokens(model, batch.views)
        loss, guess = head_loss(heads, tokens, batch, targets)
        losses = {"heads": loss}
        answers, inputs = torch.empty(0), {}
        if spoken:
            parts = [prefill.parts(row, draw, explained=number % 4 == 0) for number, row in enumerate(batch.rows)]
            inputs = prefill.inputs(model.model, [tuple(view.shape[1:]) for view in batch.views], parts)
            scores, answers = next_words(model.model, prefill, inputs, tokens)
            losses["levels"], guess = level_loss(scores, batch.quality)
            losses["closed"], losses["words"] = answer_loss(answers, inputs)
            loss = 0.5 * loss + losses["levels"] + 3 * losses["closed"] + 0.3 * losses["words"]
        return loss, {key: round(value.item(), 4) for key, value in losses.items()}, guess, answers, inputs

    def drawn(step: int) -> tuple[Batch, random.Random]:
        if step % 50 == 0:
            train.refresh()
        draw = seed_of(name, step)
        kind = KINDS[step % len(KINDS)]
        sides = phase["sides"] if spoken else {kind: SIDES[kind]}
        return train.batch(phase["batch"], sides, phase["pairs"], draw), draw

    for step, (batch, draw) in zip(clock, ahead(drawn, range(clock.step, clock.steps)), strict=True):
        model.train()
        with AUTOCAST:
            loss, parts, _, _, _ = run(batch, draw)
        clock.update(loss)
        if step % 150 == 0 or step == clock.steps - 1:
            model.eval()
            guesses: list[float] = []
            truths: list[float] = []
            right: list[bool] = []
            with torch.no_grad(), AUTOCAST:
                for number in range(256 // phase["batch"]):
                    check = seed_of("val", number)
                    held = val.batch(phase["batch"], phase.get("sides", {"face": SIDES["face"]}), phase["pairs"], check)
                    _, _, guess, answers, inputs = run(held, check)
                    guesses += guess.tolist()
                    truths += held.quality.tolist()
                    if spoken:
                        closed = inputs["answers"]
                        right += (answers.argmax(-1) == inputs["wanted"])[closed].tolist()
            rate = (step + 1 - first) * phase["batch"] / (time.monotonic() - began)
            clock.log(**parts, val_srcc=round(float(spearmanr(guesses, truths)[0]), 4),
                      val_answers=round(sum(right) / max(len(right), 1), 4), samples_per_s=round(rate, 1),
                      copies=len(train.rows))  # fmt: skip


def train_adapter(phase: dict[str, Any], lora: dict[str, Any], out: Path, data: Path, model: Any,
                  prefill: Prefill) -> None:  # fmt: skip
    """LoRA on the language model, over vision features that are computed once."""
    from peft import LoraConfig, get_peft_model

    model.eval().requires_grad_(False)
    cache = out / "features"
    cache.mkdir(exist_ok=True)

    def features(copies: Copies, row: dict[str, Any]) -> dict[str, Any]:
        """Views' shapes and tokens of one copy as it is rated, all pairs."""
        file = cache / f"{row['name']}.pt"
        if not file.exists():
            views = [torch.from_numpy(view) for view in rated_views(copies.folder, row["name"], prefill.kinds)]
            with torch.no_grad(), AUTOCAST:
                tokens = vision_tokens(model, [view[None].to(DEVICE) for view in views])
            kept = [token[0].bfloat16().cpu() for token in tokens]
            torch.save({"shapes": [list(view.shape) for view in views], "tokens": kept}, file)
        return dict(torch.load(file, weights_only=True))

    splits = {split: Copies(data, split) for split in ("train", "val")}
    groups: dict[str, dict[str, list[tuple[dict[str, Any], list[Tensor]]]]] = {}
    for split, copies in splits.items():
        groups[split] = {}
        most = phase["copies"] // (1 if split == "train" else 4)
        rows = seed_of("adapter", -1).sample(copies.rows, min(len(copies.rows), most))
        for number, row in enumerate(rows):
            kept = features(copies, row)
            groups[split].setdefault(str(kept["shapes"]), []).append((row, kept["tokens"]))
            if number % 500 == 0:
                print(f"features of {split}: {number}/{len(rows)}", flush=True)

    torch.manual_seed(0)
    config = LoraConfig(r=lora["r"], lora_alpha=lora["alpha"], target_modules=lora["target"], lora_dropout=0.05,
                        task_type="CAUSAL_LM")  # fmt: skip
    tuned = get_peft_model(model, config)
    clock = Clock("adapter", phase, out, {"model": tuned})

    def run(
        shapes: str, chosen: list[tuple[dict[str, Any], list[Tensor]]], draw: random.Random, words: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        views = range(len(prefill.kinds))
        tokens = [torch.stack([sample[1][view] for sample in chosen]).float().to(DEVICE) for view in views]
        quality = torch.tensor([sample[0]["quality"] for sample in chosen]).to(DEVICE)
        parts = [prefill.parts(row, draw, words and number % 2 == 0) for number, (row, _) in enumerate(chosen)]
        inputs = prefill.inputs(model.model, json.loads(shapes), parts)
        with AUTOCAST:
            scores, answers = next_words(model.model, prefill, inputs, tokens)
        loss, guess = level_loss(scores, quality)
        closed, spoken = answer_loss(answers, inputs)
        return loss + 3 * closed + spoken, guess, quality

    names = list(groups["train"])
    sizes = [len(groups["train"][name]) for name in names]
    for step in clock:
        tuned.train()
        draw = seed_of("adapter", step)
        shapes = draw.choices(names, sizes)[0]
        loss, _, _ = run(shapes, draw.choices(groups["train"][shapes], k=phase["batch"]), draw)
        clock.update(loss)
        if step % 200 == 0 or step == clock.steps - 1:
            tuned.eval()
            guesses: list[float] = []
            reference_defects: list[float] = []
            with torch.no_grad():
                for shapes, samples in groups["val"].items():
                    for start in range(0, len(samples), 32):
                        _, guess, quality = run(shapes, samples[start : start + 32], seed_of("val", start), words=False)
                        guesses += guess.tolist()
                        reference_defects += quality.tolist()
            clock.log(loss=round(loss.item(), 4), val_srcc=round(float(spearmanr(guesses, reference_defects)[0]), 4))
    tuned.save_pretrained(out / "adapter")


def fitting(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a state that have the shapes of the module: heads of an earlier list of causes."""
    ours = module.state_dict()
    return {name: value for name, value in state.items() if name in ours and ours[name].shape == value.shape}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--init", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=Path(__file__).parent.parent / "configs" / "embedded.yaml")
    args = parser.parse_args()
    recipe = yaml.safe_load(args.config.read_text())
    torch.manual_seed(recipe["seed"])
    args.out.mkdir(parents=True, exist_ok=True)
    prefill = Prefill(args.init, [View.from_text(view).kind for view in recipe["views"]])
    before = args.init
    heads = Heads(recipe["text"]["hidden_size"]).to(DEVICE)
    for name, phase in recipe["phases"].items():
        folder = args.out / name
        if not folder.exists():
            model = AutoModelForImageTextToText.from_pretrained(before, dtype=torch.float32).to(DEVICE)
            if (before / "heads.pt").exists():
                heads.load_state_dict(
                    fitting(torch.load(before / "heads.pt", map_location=DEVICE, weights_only=True), heads),
                    strict=False,
                )
            if name == "adapter":
                train_adapter(phase, recipe["lora"], args.out, args.data, model, prefill)
            else:
                train_heads_and_model(name, phase, args.out, args.data, model, heads, prefill)
                model.save_pretrained(folder)
                prefill.processor.save_pretrained(folder)
                torch.save(heads.state_dict(), folder / "heads.pt")
        before = folder


if __name__ == "__main__":
    main()
