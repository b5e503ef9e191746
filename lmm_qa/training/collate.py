"""What a training step gets to see: clips drawn, looked at, asked about, and joined into batches.

Beside its score, a clip may be asked for defects, and to be explained: a `Record` for each. Where the family of models
allows it, a clip's records share what comes before them, as in rating: one row of tokens, in which each record sees the
clip and itself. Else each has a row of its own.

A sample depends on the seed, the pass over the data and the clip alone: not on the process that makes it, nor on what
came before, so that a run that was interrupted, or is shared by several processes, sees what an undisturbed one would.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import torch
from torch.utils.data import Dataset, Sampler

from lmm_qa.config import Sampling
from lmm_qa.defects.explanation import Finding, explanation_prompt, mentions, opening
from lmm_qa.defects.questions import questions
from lmm_qa.defects.vocabulary import VISIBLE
from lmm_qa.errors import ClipError, TrainingError
from lmm_qa.model.inputs import (
    SEQUENCES,
    join_inputs,
    level_tokens,
    patch_factor,
    prepare_inputs,
    question_tokens,
    with_question,
    with_tokens,
)
from lmm_qa.model.prompt import Prompt
from lmm_qa.model.rater_config import RaterConfig
from lmm_qa.rater import clip_input
from lmm_qa.training.config import Augmentation, Words
from lmm_qa.training.dataset import Example
from lmm_qa.training.vision_cache import Look, Tensors, VisionCache
from lmm_qa.video.decode import read_frames

Key = int | tuple[int, int]


"""A clip's number; in training, with the pass before it."""


class Clip(NamedTuple):
    """A labelled clip that can be read."""

    example: Example
    """With MOS and std on the rater's scale."""
    content_id: str


KINDS = ("defects", "explanations")


"""Of records, as `lmm_qa.training.config.Loss` weighs them."""


class Record(NamedTuple):
    """Something that a clip is asked beside its score."""

    kind: int
    """Number in `KINDS`."""
    question: list[int]
    """Tokens after the last video, to where the answer begins."""
    answer: list[int]
    """Tokens that should follow."""

    @property
    def tokens(self) -> list[int]:
        """What the model reads, to say the answer word by word."""
        return [*self.question, *self.answer[:-1]]


class Sample(TypedDict):
    """One clip as the model gets it, and what people said of it."""

    name: str
    inputs: Tensors
    begun: int
    """Tokens before the question."""
    features: Tensors
    """What was kept of the vision tower; empty where the inputs hold pixels."""
    mos: float
    std: float
    """NaN where it is not known."""
    records: list[Record]


class Answers(TypedDict):
    """The answers of a batch that has records: n tokens."""

    columns: torch.Tensor
    """(K,) columns of the inputs whose next token matters; in the first one, the first B rows say the rating."""
    places: torch.Tensor
    """(n, 2) row, and number in `columns`, of each token's prediction."""
    tokens: torch.Tensor
    """(n,) what should be said there."""
    shares: list[float]
    """(n,) 1 / tokens of its answer."""
    kinds: torch.Tensor
    """(n,) number in `KINDS`."""
    segments: torch.Tensor | None
    """Of inputs in which records share a row, (B, L): 0 what all of a row see, -1 padding, else a part that sees itself
    and what all see. None where each record has its own row."""
    back: torch.Tensor | None
    """(B, L) by how much a token's position is lower than if all parts of the row followed each other."""


class Batch(TypedDict):
    """Samples joined: B clips."""

    names: list[str]
    inputs: Tensors
    features: Tensors
    mos: list[float]
    std: list[float]
    """Lists, for DeepSpeed rounds all tensors that it moves."""
    answers: Answers | None
    """None where no clip has records."""


class Samples(Dataset[Sample]):
    """Clips as they are rated; in training, with its variations.

    A key is (pass, clip) in training, a clip's number else.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        settings: RaterConfig,
        processor: Any,
        limit: int,
        store: VisionCache | None,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        words: Words | None = None,
    ) -> None:
        """
        Args:
            clips: in an order that does not change from run to run.
            settings: how the rater asks, and what it looks at.
            processor: of the backbone.
            limit: tokens that the model can take.
            store: kept vision features; without one, frames are read from the clips.
            augmentation: for training alone.
            seed: of the augmentation, and of what is asked.
            words: what clips are asked beside their score, for training alone.
        """
        self.clips = clips
        self.settings = settings
        self.processor = processor
        self.factor = patch_factor(processor) or 1
        self.limit = limit
        self.store = store
        self.augmentation = augmentation
        self.seed = seed
        self.words = words

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: Key) -> Sample:
        clip, sampling, prompt = self._draw(key)
        try:
            inputs, features, slots = self._look(Look(clip.example.path, clip.content_id, sampling), prompt)
        except ClipError as error:
            raise TrainingError(f"{clip.example.path} cannot be read: {error}") from error
        records = [] if self.words is None or isinstance(key, int) else self._records(clip, key[0], slots)
        tokens = inputs["input_ids"].shape[1]
        begun = tokens - len(self._question(prompt, slots))
        tokens = max([tokens, *(begun + len(record.tokens) for record in records)])
        if tokens > self.limit:
            raise TrainingError(f"{clip.example.path} takes {tokens} tokens, the model {self.limit}: {ADVICE}")
        example = clip.example
        std = math.nan if example.std is None else example.std
        return Sample(
            name=example.name,
            inputs=inputs,
            begun=begun,
            features=features,
            mos=example.mos,
            std=std,
            records=records,
        )

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

    def _look(self, look: Look, prompt: Prompt) -> tuple[Tensors, Tensors, dict[str, float]]:
        """The model's inputs; where they are kept, the vision features; and values for the slots of questions."""
        if self.store is not None:
            kept = self.store.load(look)
            views = len(self.settings.views)
            return with_question(self.processor, kept.inputs, prompt, views, kept.slots), kept.features, kept.slots
        clip = clip_input(read_frames(look.path, look.sampling, self.settings.views, self.factor))
        return dict(prepare_inputs(self.processor, [clip], prompt)), {}, clip.slots

    def _records(self, clip: Clip, number: int, slots: dict[str, float]) -> list[Record]:
        """What a clip is asked in a pass. The same in all passes but for the choice."""
        assert self.words is not None
        example, views = clip.example, len(self.settings.views)
        draw = random.Random(f"words {self.seed} {number} {clip.content_id}")
        records = []
        for name, there in ask(example, self.words.defects, draw).items():
            prompt = questions()[name]
            words = level_tokens(self.processor, prompt, views)
            records.append(Record(0, self._question(prompt, slots), [words[there]]))
        if example.explanation is not None and draw.random() < self.words.explanations:
            prompt, said = explained(example, self.settings.prompt)
            tokenizer = self.processor.tokenizer
            answer = [*tokenizer(said, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            records.append(Record(1, self._question(prompt, slots), answer))
        return records

    def _question(self, prompt: Prompt, slots: dict[str, float]) -> list[int]:
        """The tokens that come after the last video."""
        return question_tokens(self.processor, prompt, len(self.settings.views), slots)


def ask(example: Example, count: int, draw: random.Random) -> dict[str, bool]:
    """Defects that a clip is asked for, and whether they are there: half and half, as far as there are such."""
    there = [one.defect for one in example.found or () if one.defect in questions()]
    absent = [name for name in example.absent if name in questions()]
    half = count // 2 + draw.randrange(2) * (count % 2)
    first = draw.sample(there, min(len(there), max(half, count - len(absent))))
    rest = draw.sample(absent, min(len(absent), count - len(first)))
    return dict.fromkeys(first, True) | dict.fromkeys(rest, False)


def explained(example: Example, prompt: Prompt) -> tuple[Prompt, str]:
    """How a clip's explanation is asked for, its answer begun as far as the level word; and what follows.

    The model is told the defects of the clip's row; without any, those that the text names.

    Raises:
        TrainingError: the text has no level word.
    """
    text = example.explanation or ""
    words = "|".join(map(re.escape, prompt.levels))
    if not (level := re.search(rf"\b(?:{words})\b", text)):
        raise TrainingError(
            f"the explanation of {example.name!r} has none of the words {', '.join(prompt.levels)}: write it like "
            f"{opening(prompt, prompt.levels[-1])!r}, and why; received {text!r}"
        )
    found = example.found
    if found is None:
        found = tuple(Finding(name, 1.0) for name in VISIBLE if name in mentions(text))
    asked = explanation_prompt(prompt, found).model_copy(update={"stem": opening(prompt, level[0])})
    return asked, text[level.end() :].rstrip()


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
    shares: bool = False
    """Whether records share a row with their clip: see `lmm_qa.backbone.Backbone.shares_prefills`."""

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        rows, answers, asked = list(samples), None, any(sample["records"] for sample in samples)
        if asked and not self.shares:
            rows += [_alone(sample, record) for sample in samples for record in sample["records"]]
        inputs = join_inputs(self.processor, [row["inputs"] for row in rows])
        if asked:
            inputs, answers = (_together if self.shares else _apart)(inputs, samples)
        features: Tensors = {}
        for name in samples[0]["features"]:
            features[name] = torch.cat([row["features"][name] for row in rows], dim=-2)
        return Batch(
            names=[sample["name"] for sample in samples],
            inputs=inputs,
            features=features,
            mos=[sample["mos"] for sample in samples],
            std=[sample["std"] for sample in samples],
            answers=answers,
        )


def _alone(sample: Sample, record: Record) -> Sample:
    """A clip with a record in place of the rating prompt."""
    inputs, ids = sample["inputs"], torch.tensor([record.tokens])
    before = {name: each[:, : sample["begun"]] if name in SEQUENCES else each for name, each in inputs.items()}
    return {**sample, "inputs": with_tokens(before, ids, torch.ones_like(ids))}


def _together(inputs: Tensors, samples: Sequence[Sample]) -> tuple[Tensors, Answers]:
    """Records come after the rating prompt of their clip; those that are first in their rows are as wide as the widest
    of them, and so on: padded on the left, all end in one column."""
    records, real = [sample["records"] for sample in samples], inputs["attention_mask"].bool()
    width = real.shape[1]
    questions = torch.tensor([sample["inputs"]["input_ids"].shape[1] - sample["begun"] for sample in samples])
    segments = torch.where(real, (torch.arange(width) >= width - questions[:, None]).long(), -1)
    parts, back = [segments], [torch.zeros_like(segments)]
    ids, passed = list[torch.Tensor](), questions
    columns, at = [width - 1], list[tuple[Record, int, range]]()
    for number in range(max(map(len, records))):
        line = [(row, each[number]) for row, each in enumerate(records) if number < len(each)]
        wide = max(len(record.tokens) for _, record in line)
        first, most = len(columns), max(len(record.answer) for _, record in line)
        width += wide
        columns += range(width - most, width)
        tokens = torch.full((len(records), wide), -1)
        for row, record in line:
            tokens[row, wide - len(record.tokens) :] = torch.tensor(record.tokens)
            at.append((record, row, range(first + most - len(record.answer), first + most)))
        ids.append(tokens)
        parts.append(torch.where(tokens >= 0, number + 2, -1))
        back.append(passed[:, None].expand_as(tokens))
        passed = passed + (tokens >= 0).sum(1)
    added = torch.cat(ids, dim=1)
    answers = _answers(columns, at, torch.cat(parts, dim=1), torch.cat(back, dim=1))
    return with_tokens(inputs, added.clamp(min=0), added >= 0), answers


def _apart(inputs: Tensors, samples: Sequence[Sample]) -> tuple[Tensors, Answers]:
    """Each record has a row of its own, behind those of the ratings, that ends where its last word is to be said."""
    listed = [record for sample in samples for record in sample["records"]]
    last, most = inputs["input_ids"].shape[1] - 1, max(len(record.answer) for record in listed)
    at = [(record, row, range(len(record.answer) - 1, -1, -1)) for row, record in enumerate(listed, start=len(samples))]
    return inputs, _answers(range(last, last - most, -1), at, None, None)


def _answers(
    columns: Sequence[int],
    at: Sequence[tuple[Record, int, range]],
    segments: torch.Tensor | None,
    back: torch.Tensor | None,
) -> Answers:
    """From records, their rows, and the numbers of the columns in which their answers are predicted."""
    return Answers(
        columns=torch.tensor(list(columns)),
        places=torch.tensor([(row, number) for _, row, numbers in at for number in numbers]),
        tokens=torch.tensor([token for record, _, _ in at for token in record.answer]),
        shares=[1 / len(record.answer) for record, _, _ in at for _ in record.answer],
        kinds=torch.tensor([record.kind for record, _, _ in at for _ in record.answer]),
        segments=segments,
        back=back,
    )
