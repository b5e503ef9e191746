"""Train the embedded model, phase by phase, from the copies that scripts/embedded_data.py prepared.

    python scripts/embedded_train.py --data data/embedded --init runs/embedded/init --out runs/embedded

Phases (configs/embedded.yaml): `vision` teaches the vision tower alone, with heads that are thrown away, to read from
each 28 x 28 region its frequency energies, its motion and what the damage did to it, and from all regions together the
score, the causes and their strengths; `joint` trains the whole model through the prompt, the level words as targets;
`full` goes on with the geometry used for rating; `adapter` keeps the vision features and trains a LoRA on the language
model. Each phase is saved to OUT/<phase> and skipped when that is there; inside a phase a checkpoint is
written every few minutes and a killed run goes on from it. Every 300 steps a line goes to OUT/log.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from scipy.fft import dct
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.qwen2_vl.modeling_qwen2_vl import VisionAttention, apply_rotary_pos_emb_vision

from lmm_qa.degrade import DAMAGES, TEMPORAL
from lmm_qa.levels import LEVELS
from lmm_qa.prompting import load_prompt

CAUSES = tuple(DAMAGES)
PATCH, MERGED = 14, 28
CHECKPOINT_SECONDS = 240
DENSE = 11  # targets a merged token: 6 bands, motion in 2 bands, brightness, and loss and structure against the source
AUTOCAST = torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Batch:
    views: list[Tensor]  # each (B, T, H, W, 3) uint8
    clean: list[Tensor]  # the same windows of the undamaged source
    quality: Tensor  # (B,) in [0, 1]
    causes: Tensor  # (B, len(CAUSES)) strength, 0 where absent (an absent cause and strength 0 look alike)
    spatial: Tensor  # (B,) 1 where every frame shows the moment of the source's frame


class Copies:
    """The prepared copies of one split; looks again for new ones, since preparation may still be under way."""

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = folder, split
        self.rows: list[dict[str, Any]] = []
        self.refresh()

    def refresh(self) -> None:
        rows = [row for file in sorted(self.folder.glob("*.json")) for row in json.loads(file.read_text())]
        self.rows = [row for row in rows if row["split"] == self.split]
        self.clean = {row["segment"]: row["name"] for row in rows if not row["causes"]}
        self.rows = [row for row in self.rows if row["segment"] in self.clean]
        by_source: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows:
            by_source.setdefault(row["source"], []).append(row)
        self.by_source = list(by_source.values())

    def window(self, row: dict[str, Any], kind: str, side: int, pairs: list[int], draw: random.Random) -> list[Any]:
        damaged = np.load(self.folder / f"{row['name']}.{kind}.npy", mmap_mode="r")
        clean = np.load(self.folder / f"{self.clean[row['segment']]}.{kind}.npy", mmap_mode="r")
        height, width = damaged.shape[1:3]
        tall, wide = min(side, height) // MERGED * MERGED, min(side, width) // MERGED * MERGED
        top, left = draw.randint(0, height - tall), draw.randint(0, width - wide)
        frames = [2 * pair + offset for pair in pairs for offset in (0, 1)]
        flip = -1 if draw.random() < 0.5 else 1
        cut = [clip[frames, top : top + tall, left : left + wide][:, :, ::flip] for clip in (damaged, clean)]
        return [torch.from_numpy(np.ascontiguousarray(part)) for part in cut]

    def batch(self, size: int, side: int, pairs: int, kinds: tuple[str, ...], draw: random.Random) -> Batch:
        """Samples drawn evenly over the sources; all windows of a view have one shape (odd ones are drawn again)."""
        views: list[list[Tensor]] = [[] for _ in kinds]
        clean: list[list[Tensor]] = [[] for _ in kinds]
        rows: list[dict[str, Any]] = []
        while len(rows) < size:
            row = draw.choice(draw.choice(self.by_source))
            chosen = sorted(draw.sample(range(6), pairs))
            windows = [self.window(row, kind, side, chosen, draw) for kind in kinds]
            if rows and any(window[0].shape != view[0].shape for window, view in zip(windows, views, strict=True)):
                continue
            rows.append(row)
            for view, source, window in zip(views, clean, windows, strict=True):
                view.append(window[0])
                source.append(window[1])
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
        )


def patchify(frames: Tensor) -> tuple[Tensor, Tensor]:
    """What Qwen2VLVideoProcessor makes of (B, T, H, W, 3) uint8 frames: flat patches in [-1, 1] and the grid (B, 3)."""
    batch, count, height, width, _ = frames.shape
    rows, columns, times = height // PATCH, width // PATCH, count // 2
    pixels = frames.float().div(127.5).sub(1).permute(0, 1, 4, 2, 3)
    pixels = pixels.reshape(batch, times, 2, 3, rows // 2, 2, PATCH, columns // 2, 2, PATCH)
    flat = pixels.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(batch * times * rows * columns, -1)
    return flat, torch.tensor([[times, rows, columns]] * batch)


def merged_luma(frames: Tensor) -> Tensor:
    """(B, T, H, W, 3) -> (N, 2, 28, 28) luma in [0, 1], one row a merged token, in the order of the tokens."""
    batch, count, height, width, _ = frames.shape
    luma = frames.float() @ torch.tensor([0.299, 0.587, 0.114], device=frames.device) / 255
    luma = luma.reshape(batch, count // 2, 2, height // MERGED, MERGED, width // MERGED, MERGED)
    return luma.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, 2, MERGED, MERGED)


class DenseTargets:
    """What each merged token is asked to know of its own pixels, (N, DENSE), roughly unit scale."""

    def __init__(self) -> None:
        self.cosine = torch.from_numpy(dct(np.eye(MERGED), axis=0, norm="ortho").astype(np.float32)).to(DEVICE)
        radius = np.hypot(*np.divmod(np.arange(MERGED * MERGED), MERGED))
        edges = [0.5, 2.5, 5, 8, 12, 17, 40]
        bands = [(radius >= low) & (radius < high) for low, high in itertools.pairwise(edges)]
        self.bands = torch.tensor(np.array([band / band.sum() for band in bands]), dtype=torch.float32).T.to(DEVICE)

    def energies(self, pixels: Tensor) -> Tensor:
        return (self.cosine @ pixels @ self.cosine.T).flatten(1).square() @ self.bands

    def __call__(self, frames: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
        """Targets that need the damaged frames alone (N, 9), and those against the source (N, 2)."""
        ours, source = merged_luma(frames), merged_luma(clean)
        still, motion = self.energies(ours.mean(1)), self.energies(ours[:, 0] - ours[:, 1])
        motion = torch.stack([motion[:, :3].mean(1), motion[:, 3:].mean(1)], 1)
        own = torch.cat([torch.log10(torch.cat([still, motion], 1) + 1e-7) + 4, 2 * ours.mean((1, 2, 3))[:, None]], 1)
        a, b = ours[:, 0], source[:, 0]
        error = (a - b).square().mean((1, 2))
        spread = ((a - a.mean((1, 2), True)) * (b - b.mean((1, 2), True))).mean((1, 2))
        structure = (2 * spread + 9e-4) / (a.var((1, 2)) + b.var((1, 2)) + 9e-4)
        return own, torch.stack([torch.log10(error + 1e-6) / 2 + 2, 2 * structure], 1)


class Heads(nn.Module):
    """Thrown away after training: dense targets from each token, score and causes from the tokens' statistics."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, DENSE)
        self.pooled = nn.Sequential(nn.LayerNorm(2 * width), nn.Linear(2 * width, 128), nn.GELU(),
                                    nn.Linear(128, 1 + len(CAUSES)))  # fmt: skip

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, width) -> (B, N, DENSE) and (B, 1 + causes)."""
        return self.dense(tokens), self.pooled(torch.cat([tokens.mean(1), tokens.std(1)], 1))


def head_loss(heads: Heads, tokens: list[Tensor], batch: Batch, targets: DenseTargets) -> tuple[Tensor, Tensor]:
    """Losses of the heads over the views' tokens, each (B, N, width); and the predicted quality (B,)."""
    dense_loss = torch.zeros((), device=DEVICE)
    for view, clean, seen in zip(batch.views, batch.clean, tokens, strict=True):
        own, against = targets(view, clean)
        guess = heads.dense(seen).float().flatten(0, 1)
        weight = batch.spatial.repeat_interleave(seen.shape[1])[:, None]
        compared = F.smooth_l1_loss(guess[:, 9:], against, reduction="none") * weight
        dense_loss = dense_loss + F.smooth_l1_loss(guess[:, :9], own) + 2 * compared.mean()
    pooled = torch.stack([heads(seen)[1] for seen in tokens]).mean(0).float()
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
    q, k, v = (each.unflatten(0, (pictures, -1)).transpose(1, 2) for each in (q, k, v))
    mixed = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
    return self.proj(mixed.transpose(1, 2).flatten(0, 1).flatten(1))


VisionAttention.forward = attend_in_one_call


class Prefill:
    """The rating prompt as token ids for a given geometry, and where the level words stand in the vocabulary."""

    def __init__(self, base: Path) -> None:
        prompt = load_prompt("talking_head")
        self.processor = AutoProcessor.from_pretrained(base)
        tokenizer = self.processor.tokenizer
        self.video = tokenizer.convert_tokens_to_ids("<|video_pad|>")
        chat = self.processor.apply_chat_template(prompt.messages(2), tokenize=False, add_generation_prompt=True)
        self.ids = tokenizer(chat + prompt.stem)["input_ids"]
        self.levels = [tokenizer(" " + word)["input_ids"][0] for word in prompt.levels]
        self.positions: dict[tuple[Any, ...], Tensor] = {}

    def inputs(self, model: Any, grids: list[Tensor]) -> dict[str, Tensor]:
        """Input ids and three-dimensional positions for a batch in which each view has one grid."""
        sizes = [tuple(grid[0].tolist()) for grid in grids]
        counts = iter([math.prod(size) // 4 for size in sizes])
        ids = [copy for token in self.ids for copy in [token] * (next(counts) if token == self.video else 1)]
        row = torch.tensor([ids])
        key = tuple(sizes)
        if key not in self.positions:
            kinds = (row == self.video).int() * 2
            self.positions[key], _ = model.get_rope_index(row, kinds, video_grid_thw=torch.tensor(sizes))
        batch = len(grids[0])
        return {
            "input_ids": row.expand(batch, -1).to(DEVICE),
            "position_ids": self.positions[key].expand(3, batch, -1).to(DEVICE),
        }


def vision_tokens(model: Any, views: list[Tensor]) -> list[Tensor]:
    """Merged tokens of each view, (B, N, width)."""
    tokens = []
    for view in views:
        patches, grid = patchify(view)
        seen = model.model.visual(patches, grid.to(DEVICE)).pooler_output
        tokens.append(seen.reshape(len(view), -1, seen.shape[-1]))
    return tokens


def next_word(core: Any, prefill: Prefill, views: list[Tensor], tokens: list[Tensor]) -> Tensor:
    """(B, vocabulary) float32 logits at the stem's end, the level words first, worst level first.

    `core` is the Qwen2VLModel (which PEFT changes in place): its language model is called with the vision tokens put in
    place, as its own forward does.
    """
    grids = [torch.tensor([[v.shape[1] // 2, v.shape[2] // PATCH, v.shape[3] // PATCH]] * len(v)) for v in views]
    inputs = prefill.inputs(core, grids)
    embeds = core.get_input_embeddings()(inputs["input_ids"])
    place = (inputs["input_ids"] == prefill.video)[..., None]
    embeds = embeds.masked_scatter(place, torch.cat(tokens, 1).to(embeds.dtype))
    hidden = core.language_model(inputs_embeds=embeds, position_ids=inputs["position_ids"], use_cache=False)
    logits = (hidden.last_hidden_state[:, -1] @ core.get_input_embeddings().weight.T).float()
    others = [word for word in range(logits.shape[1]) if word not in prefill.levels]
    return logits[:, prefill.levels + others]


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
    truth = torch.special.ndtr((quality[:, None] - quality) / 0.1)
    fidelity = 1 - (better * truth + 1e-8).sqrt() - ((1 - better) * (1 - truth) + 1e-8).sqrt()
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
            warm, done = min(1.0, (self.step + 1) / 200), self.step / self.steps
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


def seed_of(name: str, step: int) -> random.Random:
    """A step's samples depend on the step alone, so that a resumed run draws what an undisturbed one would."""
    return random.Random(f"{name} {step}")


def train_heads_and_model(name: str, phase: dict[str, Any], out: Path, data: Path, model: Any, heads: Heads,
                          prefill: Prefill) -> None:  # fmt: skip
    """The phases `vision` (tower alone), `joint` and `full` (through the prompt)."""
    spoken = name != "vision"
    train, val, targets = Copies(data, "train"), Copies(data, "val"), DenseTargets()
    clock = Clock(name, phase, out, {"model": model if spoken else model.model.visual, "heads": heads})
    began, first = time.monotonic(), clock.step
    for step in clock:
        model.train()
        draw = seed_of(name, step)
        kinds = ("whole", "crop") if spoken else (draw.choice(("whole", "crop", "crop")),)
        batch = train.batch(phase["batch"], phase["crop"], phase["pairs"], kinds, draw)
        with AUTOCAST:
            tokens = vision_tokens(model, batch.views)
            loss, _ = head_loss(heads, tokens, batch, targets)
            parts = {"heads": loss.item()}
            if spoken:
                words, _ = level_loss(next_word(model.model, prefill, batch.views, tokens), batch.quality)
                parts["levels"] = words.item()
                loss = 0.5 * loss + words
        clock.update(loss)
        if step % 50 == 0:
            train.refresh()
        if step % 150 == 0 or step == clock.steps - 1:
            model.eval()
            guesses: list[float] = []
            truth: list[float] = []
            with torch.no_grad(), AUTOCAST:
                for number in range(4 if spoken else 8):
                    check = seed_of("val", number)
                    kinds = ("whole", "crop") if spoken else ("crop",)
                    held = val.batch(min(phase["batch"], 32), phase["crop"], phase["pairs"], kinds, check)
                    tokens = vision_tokens(model, held.views)
                    guess = head_loss(heads, tokens, held, targets)[1]
                    if spoken:
                        guess = level_loss(next_word(model.model, prefill, held.views, tokens), held.quality)[1]
                    guesses += guess.tolist()
                    truth += held.quality.tolist()
            rate = (step + 1 - first) * phase["batch"] / (time.monotonic() - began)
            clock.log(**parts, val_srcc=round(float(spearmanr(guesses, truth)[0]), 4), samples_per_s=round(rate, 1),
                      copies=len(train.rows))  # fmt: skip


def train_adapter(phase: dict[str, Any], lora: dict[str, Any], out: Path, data: Path, model: Any,
                  prefill: Prefill) -> None:  # fmt: skip
    """LoRA on the language model, over vision features that are computed once."""
    from peft import LoraConfig, get_peft_model

    model.eval().requires_grad_(False)
    cache = out / "features"
    cache.mkdir(exist_ok=True)

    def features(copies: Copies, row: dict[str, Any]) -> dict[str, Any]:
        """Views' shapes and tokens of one copy as it is rated: whole view, crop in the middle, all pairs."""
        file = cache / f"{row['name']}.pt"
        if not file.exists():
            views = [
                torch.from_numpy(np.load(copies.folder / f"{row['name']}.{kind}.npy")) for kind in ("whole", "crop")
            ]
            with torch.no_grad(), AUTOCAST:
                tokens = vision_tokens(model, [view[None].to(DEVICE) for view in views])
            kept = [token[0].bfloat16().cpu() for token in tokens]
            torch.save({"shapes": [list(view.shape) for view in views], "tokens": kept}, file)
        return dict(torch.load(file, weights_only=True))

    splits = {split: Copies(data, split) for split in ("train", "val")}
    groups: dict[str, dict[str, list[tuple[dict[str, Any], list[Tensor]]]]] = {}
    for split, copies in splits.items():
        groups[split] = {}
        for number, row in enumerate(copies.rows):
            kept = features(copies, row)
            groups[split].setdefault(str(kept["shapes"]), []).append((row, kept["tokens"]))
            if number % 500 == 0:
                print(f"features of {split}: {number}/{len(copies.rows)}", flush=True)

    torch.manual_seed(0)
    config = LoraConfig(r=lora["r"], lora_alpha=lora["alpha"], target_modules=lora["target"], lora_dropout=0.05,
                        task_type="CAUSAL_LM")  # fmt: skip
    tuned = get_peft_model(model, config)
    clock = Clock("adapter", phase, out, {"model": tuned})

    def run(shapes: str, chosen: list[tuple[dict[str, Any], list[Tensor]]]) -> tuple[Tensor, Tensor, Tensor]:
        views = [torch.empty(len(chosen), *shape, device="meta") for shape in json.loads(shapes)]
        tokens = [torch.stack([sample[1][view] for sample in chosen]).float().to(DEVICE) for view in range(2)]
        quality = torch.tensor([sample[0]["quality"] for sample in chosen]).to(DEVICE)
        with AUTOCAST:
            logits = next_word(model.model, prefill, views, tokens)
        return *level_loss(logits, quality), quality

    names = list(groups["train"])
    sizes = [len(groups["train"][name]) for name in names]
    for step in clock:
        tuned.train()
        draw = seed_of("adapter", step)
        shapes = draw.choices(names, sizes)[0]
        loss, _, _ = run(shapes, draw.choices(groups["train"][shapes], k=phase["batch"]))
        clock.update(loss)
        if step % 200 == 0 or step == clock.steps - 1:
            tuned.eval()
            guesses: list[float] = []
            truth: list[float] = []
            with torch.no_grad():
                for shapes, samples in groups["val"].items():
                    for start in range(0, len(samples), 32):
                        _, guess, quality = run(shapes, samples[start : start + 32])
                        guesses += guess.tolist()
                        truth += quality.tolist()
            clock.log(loss=loss.item(), val_srcc=round(float(spearmanr(guesses, truth)[0]), 4))
    tuned.save_pretrained(out / "adapter")


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
    prefill = Prefill(args.init)
    before = args.init
    heads = Heads(recipe["text"]["hidden_size"]).to(DEVICE)
    for name, phase in recipe["phases"].items():
        folder = args.out / name
        if not folder.exists():
            model = AutoModelForImageTextToText.from_pretrained(before, dtype=torch.float32).to(DEVICE)
            if (before / "heads.pt").exists():
                heads.load_state_dict(torch.load(before / "heads.pt", map_location=DEVICE, weights_only=True))
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
