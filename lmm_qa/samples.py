"""What a training step gets to see: clips drawn, looked at, asked about, and joined into batches.

A sample depends on the seed, the pass over the data and the clip alone: not on the process that makes it, nor on what
came before, so that a run that was interrupted, or is shared by several processes, sees what an undisturbed one would.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import torch
from torch.utils.data import Dataset, Sampler

from lmm_qa.backbone import join_inputs, patch_factor, prepare_inputs, with_question
from lmm_qa.config import Sampling
from lmm_qa.dataset import Example
from lmm_qa.errors import ClipError, TrainingError
from lmm_qa.features import Look, Tensors, VisionStore
from lmm_qa.prompting import Prompt
from lmm_qa.rater import clip_input
from lmm_qa.rater_file import RaterFile
from lmm_qa.recipe import Augmentation
from lmm_qa.video import read_frames

Key = int | tuple[int, int]
"""A clip's number; in training, with the pass before it."""


class Clip(NamedTuple):
    """A labelled clip that can be read."""

    example: Example
    """With MOS and std on the rater's scale."""
    content_id: str


class Sample(TypedDict):
    """One clip as the model gets it, and what people said of it."""

    name: str
    inputs: Tensors
    features: Tensors
    """What was kept of the vision tower; empty where the inputs hold pixels."""
    mos: float
    std: float
    """NaN where it is not known."""


class Batch(TypedDict):
    """Samples joined: B clips."""

    names: list[str]
    inputs: Tensors
    features: Tensors
    mos: list[float]
    std: list[float]
    """Lists, for DeepSpeed rounds all tensors that it moves."""


class Samples(Dataset[Sample]):
    """Clips as they are rated; in training, with its variations.

    A key is (pass, clip) in training, a clip's number else.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        settings: RaterFile,
        processor: Any,
        limit: int,
        store: VisionStore | None,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        """
        Args:
            clips: in an order that does not change from run to run.
            settings: how the rater asks, and what it looks at.
            processor: of the backbone.
            limit: tokens that the model can take.
            store: kept vision features; without one, frames are read from the clips.
            augmentation: for training alone.
            seed: of the augmentation.
        """
        self.clips = clips
        self.settings = settings
        self.processor = processor
        self.factor = patch_factor(processor) or 1
        self.limit = limit
        self.store = store
        self.augmentation = augmentation
        self.seed = seed

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: Key) -> Sample:
        clip, sampling, prompt = self._draw(key)
        try:
            inputs, features = self._look(Look(clip.example.path, clip.content_id, sampling), prompt)
        except ClipError as error:
            raise TrainingError(f"{clip.example.path} cannot be read: {error}") from error
        if (tokens := inputs["input_ids"].shape[1]) > self.limit:
            raise TrainingError(f"{clip.example.path} takes {tokens} tokens, the model {self.limit}: {ADVICE}")
        std = math.nan if clip.example.std is None else clip.example.std
        return Sample(name=clip.example.name, inputs=inputs, features=features, mos=clip.example.mos, std=std)

    def looks(self) -> list[Look]:
        """All that will be looked at."""
        return [
            Look(clip.example.path, clip.content_id, sampling) for clip in self.clips for sampling in self._samplings()
        ]

    def _samplings(self) -> list[Sampling]:
        if self.augmentation is None or self.augmentation.offsets == 1:
            return [self.settings.sampling]
        count = self.augmentation.offsets
        return [self.settings.sampling.model_copy(update={"phase": (k + 0.5) / count}) for k in range(count)]

    def _draw(self, key: Key) -> tuple[Clip, Sampling, Prompt]:
        prompt = self.settings.prompt
        if self.augmentation is None or isinstance(key, int):
            assert self.augmentation is None and isinstance(key, int), f"{key!r} is a key of the other kind"
            return self.clips[key], self.settings.sampling, prompt
        number, index = key
        clip = self.clips[index]
        draw = random.Random(f"{self.seed} {number} {clip.content_id}")
        sampling = draw.choice(self._samplings())
        if prompt.paraphrases and draw.random() < self.augmentation.paraphrases:
            prompt = prompt.model_copy(update={"question": draw.choice(prompt.paraphrases)})
        return clip, sampling, prompt

    def _look(self, look: Look, prompt: Prompt) -> tuple[Tensors, Tensors]:
        """The model's inputs and, where they are kept, the vision features."""
        if self.store is not None:
            kept = self.store.load(look)
            views = len(self.settings.views)
            return with_question(self.processor, kept.inputs, prompt, views, kept.slots), kept.features
        frames = read_frames(look.path, look.sampling, self.settings.views, self.factor)
        return dict(prepare_inputs(self.processor, [clip_input(frames)], prompt)), {}


ADVICE = "look at fewer frames (rating.sampling) or at smaller views (rating.views); nothing is cut off"


class Passes(Sampler[tuple[int, int]]):
    """Keys of `samples` training samples: pass after pass over the clips, each in its own random order."""

    def __init__(self, clips: int, samples: int, seed: int) -> None:
        self.clips, self.samples, self.seed = clips, samples, seed

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.samples, self.clips):
            number = start // self.clips
            order = torch.randperm(self.clips, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + number))
            yield from ((number, index) for index in order.tolist()[: self.samples - start])


@dataclass(frozen=True)
class Collate:
    """Joins samples into a batch."""

    processor: Any

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        features: Tensors = {}
        for name in samples[0]["features"]:
            features[name] = torch.cat([sample["features"][name] for sample in samples], dim=-2)
        return Batch(
            names=[sample["name"] for sample in samples],
            inputs=join_inputs(self.processor, [sample["inputs"] for sample in samples]),
            features=features,
            mos=[sample["mos"] for sample in samples],
            std=[sample["std"] for sample in samples],
        )
