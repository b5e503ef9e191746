"""First phase: train the vision tower alone, with targets for every merged token, before the language model.

For each region of 28 x 28 pixels the tower learns to predict frequency energies, motion, colour and the effect of the
degradation; for all regions of a window together, quality and causes. The prediction heads are discarded. These targets
need the undamaged source of each copy, so this phase does not use `lmm-qa train`.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from embedded.data import FACTOR, LUMA, SCALE, ViewCache
from scipy.fft import dct
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor, EvalPrediction, Trainer, TrainingArguments

from lmm_qa.degrade.causes import DEGRADATIONS, FACIAL, TEMPORAL
from lmm_qa.files.tables import read_rows

CAUSES = tuple(DEGRADATIONS)
WINDOW = 112  # pixels; windows of one size make batches simple
PAIRS = 2  # pairs of frames in a sample
OWN_TARGETS = 14  # of a token: 6 frequency bands, 2 of motion, brightness, 2 colours, flatness, stillness, blocks
DENSE_TARGETS = OWN_TARGETS + 2  # and against the source: error and structure
CHANGED, UNCHANGED = 2.0, 0.5  # grey levels: regions that changed by more show the damage, by less show none


class WindowDataset(Dataset[dict[str, Tensor]]):
    """Windows of copies, each with the same window of its undamaged source."""

    def __init__(self, folder: Path, views: ViewCache, training: bool) -> None:
        """
        Args:
            folder: of the copies and their labels.jsonl.
            training: draw windows at random; otherwise the same ones each time.
        """
        self.folder, self.views, self.training = folder, views, training
        rows = read_rows(folder / "labels.jsonl")
        self.clean = {row["source"]: row["clip"] for row in rows if not row["causes"]}
        self.rows = [row for row in rows if row["source"] in self.clean]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`frames` and `clean`, (4, 112, 112, 3) uint8; `quality` in [0, 1]; `causes`, (27,): 0.3 to 1 by the strength,
        0 where absent; `aligned`: 1 if each frame shows the same time as that of the source."""
        row = self.rows[index]
        rng = np.random.default_rng(int(torch.randint(2**31, ())) if self.training else index)
        copies, sources = (self.views.read(self.folder / clip) for clip in (row["clip"], self.clean[row["source"]]))
        number = int(rng.integers(len(copies)))
        copy, source = copies[number], sources[number]
        pairs = np.sort(rng.choice(len(copy) // 2, PAIRS, replace=len(copy) < 2 * PAIRS))
        moments = np.stack([2 * pairs, 2 * pairs + 1], 1).ravel()
        both = [pad(view[np.minimum(moments, len(view) - 1)]) for view in (copy, source)]
        height, width = both[0].shape[1:3]
        corners = rng.integers(0, (height - WINDOW + 1, width - WINDOW + 1), (4, 2))
        windows = [[view[:, y : y + WINDOW, x : x + WINDOW] for view in both] for y, x in corners]
        if set(row["causes"]) & set(FACIAL):  # damage to a part of the face would be missed by most windows
            windows.sort(key=lambda pair: -np.abs(pair[0].astype(np.int16) - pair[1]).mean())
        flip = -1 if rng.random() < 0.5 else 1
        frames, clean = (torch.from_numpy(view[:, :, ::flip].copy()) for view in windows[0])
        causes = torch.zeros(len(CAUSES))
        for cause, strength in zip(row["causes"], row["strengths"], strict=True):
            causes[CAUSES.index(cause)] = 0.3 + 0.7 * strength
        quality = (row["mos"] - SCALE[0]) / (SCALE[1] - SCALE[0])
        aligned = float(not set(row["causes"]) & set(TEMPORAL) and copy.shape == source.shape)
        return {"frames": frames, "clean": clean, "quality": torch.tensor(quality, dtype=torch.float32),
                "causes": causes, "aligned": torch.tensor(aligned)}  # fmt: skip


def pad(frames: np.ndarray) -> np.ndarray:
    """Frames of at least the size of a window: smaller ones are mirrored at their edges."""
    missing = [(0, max(0, WINDOW - side)) for side in frames.shape[1:3]]
    return np.pad(frames, ((0, 0), *missing, (0, 0)), mode="symmetric")


def patchify(frames: Tensor, patch: int = 14) -> tuple[Tensor, Tensor]:
    """The same as Qwen2VLVideoProcessor: flat patches in [-1, 1] of (B, T, H, W, 3) uint8 frames, and the grid (B, 3).

    (The processor takes lists of videos, on the CPU, and is several times as slow.)
    """
    batch, count, height, width, _ = frames.shape
    rows, columns, times = height // patch, width // patch, count // 2
    pixels = frames.float().div(127.5).sub(1).permute(0, 1, 4, 2, 3)
    pixels = pixels.reshape(batch, times, 2, 3, rows // 2, 2, patch, columns // 2, 2, patch)
    flat = pixels.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(batch * times * rows * columns, -1)
    return flat, torch.tensor([[times, rows, columns]] * batch, device=frames.device)


def token_regions(frames: Tensor) -> Tensor:
    """(B, T, H, W, C) -> (N, 2, 28, 28, C), one row for each merged token, in the order of the tokens."""
    batch, count, height, width, channels = frames.shape
    parts = frames.reshape(batch, count // 2, 2, height // FACTOR, FACTOR, width // FACTOR, FACTOR, channels)
    return parts.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, 2, FACTOR, FACTOR, channels)


class DenseTargets(nn.Module):
    """Targets of each merged token: properties of its pixels, at roughly unit scale, and how they changed."""

    cosine: Tensor
    bands: Tensor
    grey: Tensor

    def __init__(self) -> None:
        super().__init__()
        radius = np.hypot(*np.divmod(np.arange(FACTOR * FACTOR), FACTOR))
        edges = [0.5, 2.5, 5, 8, 12, 17, 40]
        bands = np.array([(radius >= low) & (radius < high) for low, high in itertools.pairwise(edges)], np.float32)
        cosine = dct(np.eye(FACTOR), axis=0, norm="ortho").astype(np.float32)
        self.register_buffer("cosine", torch.from_numpy(cosine), persistent=False)
        self.register_buffer("bands", torch.from_numpy(bands / bands.sum(1, keepdims=True)).T, persistent=False)
        self.register_buffer("grey", torch.from_numpy(LUMA / 255), persistent=False)

    def energies(self, pixels: Tensor) -> Tensor:
        """Mean squared cosine coefficients of (N, 28, 28) pixels in six frequency bands, (N, 6)."""
        return (self.cosine @ pixels @ self.cosine.T).flatten(1).square() @ self.bands

    def forward(self, frames: Tensor, clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Targets from the damaged frames alone (N, 14), from both (N, 2), and the mean change in grey levels (N,)."""
        pixels, pixels_clean = token_regions(frames).float(), token_regions(clean).float()
        luma, source = pixels @ self.grey, pixels_clean @ self.grey
        still, motion = self.energies(luma.mean(1)), self.energies(luma[:, 0] - luma[:, 1])
        motion = torch.stack([motion[:, :3].mean(1), motion[:, 3:].mean(1)], 1)
        bands = torch.log10(torch.cat([still, motion], 1) + 1e-7) + 4
        red, green, blue = (pixels.mean((1, 2, 3)) / 255).unbind(1)
        first, second = pixels[..., 1].unbind(1)  # green is close to luma, and whole numbers
        steps = [first.diff(dim=1).abs().mean(2), first.diff(dim=2).abs().mean(1)]  # (N, 27) each
        flat = torch.stack([(first.diff(dim=dim) == 0).float().mean((1, 2)) for dim in (1, 2)]).sum(0)
        frozen = (first == second).float().mean((1, 2))
        folded = [step[:, :24].reshape(-1, 3, 8).mean(1) for step in steps]  # codecs have blocks of eight pixels
        blocks = torch.stack([torch.log((f.amax(1) + 0.5) / (f.median(1).values + 0.5)) for f in folded]).sum(0)
        brightness, colours = 2 * luma.mean((1, 2, 3)), (4 * (red - green), 4 * (blue - green))
        own = torch.cat([bands, torch.stack([brightness, *colours, flat, frozen, blocks], 1)], 1)
        a, b = luma[:, 0], source[:, 0]
        error = (a - b).square().mean((1, 2))
        covariance = ((a - a.mean((1, 2), True)) * (b - b.mean((1, 2), True))).mean((1, 2))
        structure = (2 * covariance + 9e-4) / (a.var((1, 2)) + b.var((1, 2)) + 9e-4)
        against = torch.stack([torch.log10(error + 1e-6) / 2 + 2, 2 * structure], 1)
        return own, against, (pixels - pixels_clean).abs().mean((1, 2, 3, 4))


class VisionPretraining(nn.Module):
    """A vision tower with heads: dense targets and causes from each token; from the statistics of these alone, so that
    no source can be recognised by anything else, quality and causes."""

    def __init__(self, tower: nn.Module, width: int) -> None:
        super().__init__()
        self.tower, self.targets = tower, DenseTargets()
        self.dense = nn.Linear(width, DENSE_TARGETS)
        self.causes = nn.Linear(width, len(CAUSES))
        nn.init.constant_(self.causes.bias, -3)
        statistics = 3 * (DENSE_TARGETS + len(CAUSES))
        self.pooled = nn.Sequential(nn.Linear(statistics, 128), nn.GELU(), nn.Linear(128, 1 + len(CAUSES)))

    def forward(self, frames: Tensor, clean: Tensor, quality: Tensor, causes: Tensor, aligned: Tensor
                ) -> dict[str, Tensor]:  # fmt: skip
        """Loss and predicted quality (B,) of a batch of `WindowDataset`."""
        tokens = self.tower(*patchify(frames)).pooler_output.unflatten(0, (len(frames), -1))
        dense, places = self.dense(tokens), self.causes(tokens)
        both = torch.cat([dense, places.sigmoid()], -1)
        pooled = self.pooled(torch.cat([both.mean(1), both.std(1), both.amax(1)], 1)).float()

        own, against, change = self.targets(frames, clean)
        predicted = dense.float().flatten(0, 1)
        per_token = tokens.shape[1]
        comparable, single = (
            one.repeat_interleave(per_token)[:, None] for one in (aligned, ((causes > 0).sum(1) < 2).float())
        )
        compared = F.smooth_l1_loss(predicted[:, OWN_TARGETS:], against, reduction="none") * comparable
        loss = F.smooth_l1_loss(predicted[:, :OWN_TARGETS], own) + 2 * compared.mean()
        # A cause shows where the pixels changed. Which of two causes changed them is unknown; and where the moments
        # differ, every region changed.
        present = (causes > 0).float().repeat_interleave(per_token, 0)
        shown = present * (change > CHANGED)[:, None]
        known = ((change > CHANGED) | (change < UNCHANGED))[:, None] * comparable * single
        each = F.binary_cross_entropy_with_logits(places.float().flatten(0, 1), shown, reduction="none")
        loss = loss + (each * torch.where(present > 0, known, 1.0)).sum(1).mean()
        loss = loss + 2 * F.smooth_l1_loss(pooled[:, 0], quality, beta=0.1)
        loss = loss + 4 * F.smooth_l1_loss(pooled[:, 1:], causes, beta=0.1)
        return {"loss": loss, "predicted": pooled[:, 0]}


def train_vision(base: Path, data: Path, views: Mapping[str, ViewCache], out: Path, settings: Mapping[str, Any],
                 workers: int) -> None:  # fmt: skip
    """Train the vision tower of BASE and write the whole model to OUT; resumes from its last checkpoint.

    Args:
        data: folder with the copies of the splits `train` and `val`.
        views: of the copies of each split.
        settings: the section `vision_phase` of model.yaml: some of `transformers.TrainingArguments`.
    """
    options = dict(settings)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    checkpoints = out.with_name(f"{out.name}_checkpoints")
    trainer = Trainer(
        model=VisionPretraining(model.model.visual, model.config.text_config.hidden_size),
        args=TrainingArguments(
            str(checkpoints),
            per_device_train_batch_size=options.pop("batch_size"),
            lr_scheduler_type="cosine",
            warmup_steps=min(200, options["max_steps"] // 5),
            weight_decay=0.05,
            adam_beta2=0.98,
            eval_strategy="steps",
            save_steps=options["eval_steps"],
            save_total_limit=1,
            logging_steps=options["eval_steps"],
            dataloader_num_workers=workers,
            remove_unused_columns=False,
            label_names=["quality"],
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            **options,
        ),
        train_dataset=WindowDataset(data / "train", views["train"], training=True),
        eval_dataset=WindowDataset(data / "val", views["val"], training=False),
        compute_metrics=lambda found: {"srcc": srcc(found)},
    )
    trainer.train(resume_from_checkpoint=any(checkpoints.glob("checkpoint-*")))
    processor: Any = AutoProcessor
    processor.from_pretrained(base).save_pretrained(out)
    (out / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1))
    model.save_pretrained(out)
    shutil.rmtree(checkpoints, ignore_errors=True)


def srcc(found: EvalPrediction) -> float:
    """Of predicted and true quality."""
    return float(spearmanr(found.predictions, found.label_ids)[0])
