"""Training samples and batches: the dataset, its sampler and its collator.

Besides the rating prompt, a clip can have auxiliary examples: closed questions about defects, and a request to explain
its rating. If the model family allows it, they share one row of tokens with the rating prompt, as in rating: each
attends to the clip and to itself only. Otherwise each gets its own row.

A sample depends on the seed, the epoch and the clip only, not on the process that makes it or on earlier samples: a
resumed or distributed run sees exactly what an uninterrupted one would.
"""

from __future__ import annotations

import math
import random
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypedDict

import torch
from torch.utils.data import Dataset, Sampler

from lmm_qa.config import Sampling
from lmm_qa.defects.explanation import Finding, explanation_prompt, is_good, mentioned_defects, opening, template_text
from lmm_qa.defects.questions import questions
from lmm_qa.defects.vocabulary import TIMED_DEFECTS, VISIBLE, reference_defects
from lmm_qa.errors import ClipError, TrainingError
from lmm_qa.model.inputs import (
    TOKEN_INPUTS,
    append_question,
    append_tokens,
    collate_inputs,
    level_tokens,
    patch_factor,
    prepare_inputs,
    question_tokens,
)
from lmm_qa.model.prompt import LIP_SYNC, MEASURED, Prompt, Slots
from lmm_qa.model.rater_config import RaterConfig
from lmm_qa.rater import clip_input
from lmm_qa.training.config import AugmentationConfig, AuxiliaryConfig
from lmm_qa.training.dataset import Example
from lmm_qa.training.vision_cache import SampledClip, Tensors, VisionCache
from lmm_qa.video.decode import read_frames
from lmm_qa.video.measurement.evidence import UNKNOWN, evidence_text
from lmm_qa.video.measurement.features import FeatureExtractor

AUXILIARY_TASKS = ("defect_questions", "explanations")
"""Names of the auxiliary losses in `lmm_qa.training.config.LossConfig` and in metrics.jsonl."""

TIME_INPUTS = ("second_per_grid_ts", "video_second_per_grid")
"""Model inputs with the time between the frames of each video, of Qwen2.5-VL and of Omni models."""

TOO_LONG_ADVICE = "use fewer frames (rating.sampling) or smaller views (rating.views); nothing is truncated"

SampleKey = int | tuple[int, int]
"""Index of a clip; for training (epoch, index)."""


class LabelledClip(NamedTuple):
    """A readable clip with its label."""

    example: Example
    """MOS and std are on the rater's scale."""
    content_id: str


class AuxiliaryExample(NamedTuple):
    """A prompt about a clip besides its rating, with the expected answer."""

    task: int
    """Index into `AUXILIARY_TASKS`."""
    prompt_ids: list[int]
    """Tokens from the end of the last video or image up to the answer."""
    answer_ids: list[int]

    @property
    def input_ids(self) -> list[int]:
        """What the model reads under teacher forcing."""
        return [*self.prompt_ids, *self.answer_ids[:-1]]


class Sample(TypedDict):
    """One clip as model inputs, with its label."""

    name: str
    inputs: Tensors
    prefix_length: int
    """Tokens up to the end of the last video or image."""
    vision_features: Tensors
    """Cached output of the vision tower; empty if the inputs contain pixels."""
    mos: float
    std: float
    """NaN if unknown."""
    content: int
    """Equal for clips that show the same; -1 for a clip that is alone."""
    auxiliary: list[AuxiliaryExample]


class AuxiliaryBatch(TypedDict):
    """Where the n answer tokens of a batch are predicted, and what they should be."""

    columns: torch.Tensor
    """(K,) int64 columns of the inputs for which logits are needed; in the first one, the first B rows predict the
    rating."""
    positions: torch.Tensor
    """(n, 2) int64 row, and index into `columns`, where each token is predicted."""
    target_ids: torch.Tensor
    """(n,) int64."""
    weights: list[float]
    """(n,) 1 / number of tokens of the answer."""
    tasks: torch.Tensor
    """(n,) int64 index into `AUXILIARY_TASKS`."""
    segment_ids: torch.Tensor | None
    """(B, L) int64 if examples share rows: 0 the prefix that all segments of the row see, -1 padding, else a segment
    that sees itself and the prefix. None if each example has its own row."""
    position_offsets: torch.Tensor | None
    """(B, L) int64: how much lower a token's position is than if the segments of its row followed each other."""


class Batch(TypedDict):
    """B samples."""

    names: list[str]
    inputs: dict[str, Any]
    """Tensors, and `TIME_INPUTS` as lists."""
    vision_features: Tensors
    mos: list[float]
    std: list[float]
    """Lists, because FSDP2 and DeepSpeed cast every floating-point tensor of a batch to half precision."""
    contents: list[int]
    auxiliary: AuxiliaryBatch | None
    """None if no clip has auxiliary examples."""


class RatingDataset(Dataset[Sample]):
    """Clips as the rater sees them; for training, with augmentation and auxiliary examples."""

    def __init__(
        self,
        clips: Sequence[LabelledClip],
        settings: RaterConfig,
        processor: Any,
        max_tokens: int,
        vision_cache: VisionCache | None,
        augmentation: AugmentationConfig | None = None,
        seed: int = 0,
        auxiliary: AuxiliaryConfig | None = None,
    ) -> None:
        """
        Args:
            clips: in an order that is the same in every run.
            settings: prompt, sampling and views of the rater.
            processor: of the backbone.
            max_tokens: context length of the model.
            vision_cache: filled cache of vision features; without one, frames are decoded.
            augmentation: for training only; keys are then (epoch, index).
            seed: of augmentation and auxiliary examples.
            auxiliary: for training only.
        """
        self.clips = clips
        self.settings = settings
        self.processor = processor
        self.factor = patch_factor(processor) or 1
        self.max_tokens = max_tokens
        self.vision_cache = vision_cache
        self.augmentation = augmentation
        self.seed = seed
        self.auxiliary = auxiliary
        self.measure = measures(settings.prompt, [clip.example for clip in clips])

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: SampleKey) -> Sample:
        clip, sampling, prompt = self.augment(key)
        example = clip.example
        try:
            inputs, features, slots = self._inputs(clip, sampling, prompt, None if isinstance(key, int) else key[0])
        except ClipError as error:
            raise TrainingError(f"{example.path} cannot be read: {error}") from error
        auxiliary = (
            [] if self.auxiliary is None or isinstance(key, int) else self.auxiliary_examples(clip, key[0], slots)
        )
        tokens = inputs["input_ids"].shape[1]
        prefix_length = tokens - len(self._prompt_ids(prompt, slots))
        tokens = max([tokens, *(prefix_length + len(one.input_ids) for one in auxiliary)])
        if tokens > self.max_tokens:
            raise TrainingError(
                f"{example.path} takes {tokens} tokens, the model's context is {self.max_tokens}: {TOO_LONG_ADVICE}"
            )
        return Sample(
            name=example.name,
            inputs=inputs,
            prefix_length=prefix_length,
            vision_features=features,
            mos=example.mos,
            std=math.nan if example.std is None else example.std,
            content=content_number(example),
            auxiliary=auxiliary,
        )

    def sampled_clips(self) -> list[SampledClip]:
        """Every clip with every frame selection that the dataset can draw."""
        return [
            SampledClip(clip.example.path, clip.content_id, sampling)
            for clip in self.clips
            for sampling in self._samplings()
        ]

    def _samplings(self) -> list[Sampling]:
        if self.augmentation is None or self.augmentation.temporal_offsets == 1:
            return [self.settings.sampling]
        count = self.augmentation.temporal_offsets
        return [self.settings.sampling.model_copy(update={"phase": (k + 0.5) / count}) for k in range(count)]

    def augment(self, key: SampleKey) -> tuple[LabelledClip, Sampling, Prompt]:
        """The clip of a key, with the frame selection and the prompt for this epoch."""
        prompt = self.settings.prompt
        if self.augmentation is None or isinstance(key, int):
            assert self.augmentation is None and isinstance(key, int), f"{key!r} does not fit the dataset's mode"
            return self.clips[key], self.settings.sampling, prompt
        epoch, index = key
        clip = self.clips[index]
        rng = random.Random(f"{self.seed} {epoch} {clip.content_id}")
        sampling = rng.choice(self._samplings())
        if prompt.paraphrases and rng.random() < self.augmentation.paraphrase_probability:
            prompt = prompt.model_copy(update={"question": rng.choice(prompt.paraphrases)})
        return clip, sampling, prompt

    def _inputs(
        self, clip: LabelledClip, sampling: Sampling, prompt: Prompt, epoch: int | None
    ) -> tuple[Tensors, Tensors, Slots]:
        """Model inputs, vision features if they are cached, and the values of the prompt's slots."""
        views, example = self.settings.views, clip.example
        if self.vision_cache is not None:
            cached = self.vision_cache.load(SampledClip(example.path, clip.content_id, sampling))
            texts = self._evidence(clip, cached.measured, cached.lip_sync, epoch)
            slots: Slots = {**cached.slots, **texts}
            inputs = append_question(self.processor, cached.inputs, prompt, len(views), slots)
            return inputs, cached.features, slots
        frames = read_frames(example.path, sampling, views, self.factor, FeatureExtractor if self.measure else None)
        seen = clip_input(frames)
        numbers = seen.measurement.numbers if seen.measurement else None
        texts = self._evidence(clip, numbers, str(seen.slots[LIP_SYNC]), epoch)
        seen = replace(seen, slots={**seen.slots, **texts})
        return dict(prepare_inputs(self.processor, [seen], prompt)), {}, seen.slots

    def _evidence(
        self, clip: LabelledClip, numbers: Mapping[str, float] | None, lip_sync: str, epoch: int | None
    ) -> dict[str, str]:
        """The content of the slots `{measured}` and `{lip_sync}`.

        In training they are sometimes missing, and the numbers are rounded at random.
        """
        numbers = clip.example.evidence or numbers
        if self.augmentation is None:
            return {MEASURED: evidence_text(numbers), LIP_SYNC: lip_sync}
        rng = random.Random(f"evidence {self.seed} {epoch} {clip.content_id}")
        if rng.random() < self.augmentation.evidence_dropout:
            return {MEASURED: evidence_text(None), LIP_SYNC: UNKNOWN}
        return {MEASURED: evidence_text(numbers, rng), LIP_SYNC: lip_sync}

    def auxiliary_examples(self, clip: LabelledClip, epoch: int, slots: Slots) -> list[AuxiliaryExample]:
        """The auxiliary examples of a clip in this epoch. `slots`: values of the prompts' slots."""
        assert self.auxiliary is not None
        config, prompt = self.auxiliary, self.settings.prompt
        rng = random.Random(f"words {self.seed} {epoch} {clip.content_id}")
        found = []
        for name, present in sample_defect_questions(clip.example, config.defect_questions, rng).items():
            question = questions()[name].model_copy(update=prompt.before_question)
            answers = level_tokens(self.processor, question, len(self.settings.views))
            found.append(AuxiliaryExample(0, self._prompt_ids(question, slots), [answers[present]]))
        if clip.example.explanation is not None and rng.random() < config.explanation_probability:
            if config.random_defects_probability and rng.random() < config.random_defects_probability:
                question, answer = random_explanation(prompt, rng)
            else:
                question, answer = explanation_target(clip.example, prompt)
            tokenizer = self.processor.tokenizer
            answer_ids = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            found.append(AuxiliaryExample(1, self._prompt_ids(question, slots), answer_ids))
        return found

    def _prompt_ids(self, prompt: Prompt, slots: Slots) -> list[int]:
        """Tokens after the last video or image."""
        return question_tokens(self.processor, prompt, len(self.settings.views), slots)


def measures(prompt: Prompt, examples: Iterable[Example]) -> bool:
    """Whether every frame of the clips must be measured: for the prompt, unless their tables say what was measured."""
    unknown = MEASURED in prompt.slots and any(example.evidence is None for example in examples)
    return unknown or LIP_SYNC in prompt.slots


def sample_defect_questions(example: Example, count: int, rng: random.Random) -> dict[str, bool]:
    """Names of `count` defects to ask about, and whether the clip has them: half present, half absent if possible."""
    present = [one.defect for one in example.found or () if one.defect in questions()]
    absent = [name for name in example.absent if name in questions()]
    half = count // 2 + rng.randrange(2) * (count % 2)
    chosen = rng.sample(present, min(len(present), max(half, count - len(absent))))
    rest = rng.sample(absent, min(len(absent), count - len(chosen)))
    return dict.fromkeys(chosen, True) | dict.fromkeys(rest, False)


def explanation_target(example: Example, prompt: Prompt) -> tuple[Prompt, str]:
    """The prompt that asks for a clip's explanation, its stem ending in the level word, and the text that follows.

    The prompt lists the defects of the clip's row; if they are unknown, those that the text mentions.

    Raises:
        TrainingError: the text has no level word.
    """
    text = example.explanation or ""
    words = "|".join(map(re.escape, prompt.levels))
    if not (level := re.search(rf"\b(?:{words})\b", text)):
        raise TrainingError(
            f"the explanation of {example.name!r} has none of the words {', '.join(prompt.levels)}: write it like "
            f"{opening(prompt, prompt.levels[-1])!r}, followed by the reason; received {text!r}"
        )
    found = example.found
    if found is None:
        found = tuple(Finding(name, 1.0) for name in VISIBLE if name in mentioned_defects(text))
    return _with_opening(prompt, found, level[0]), text[level.end() :].rstrip()


def random_explanation(prompt: Prompt, rng: random.Random) -> tuple[Prompt, str]:
    """As `explanation_target`, for a level and up to three defects drawn at random, with a template sentence."""
    known = list(reference_defects(()))
    found = []
    for name in rng.sample(known, rng.choice((0, 1, 1, 1, 2, 2, 3))):
        start = 0.0 if name == "buffering" else round(rng.uniform(0, 9), 2)
        spans = [(start, start + rng.uniform(0.3, 5))]
        if rng.random() < 0.15:
            spans.append((spans[0][1] + rng.uniform(0.3, 2), spans[0][1] + rng.uniform(2.3, 4)))
        found.append(Finding(name, 1.0, tuple(spans) if name in TIMED_DEFECTS and rng.random() < 0.85 else ()))
    absent = set(known) - {one.defect for one in found}
    level = rng.choice(prompt.levels)
    return _with_opening(prompt, found, level), template_text(found, absent, rng, good=is_good(level, prompt.levels))


def _with_opening(prompt: Prompt, found: Sequence[Finding], level: str) -> Prompt:
    return explanation_prompt(prompt, found).model_copy(update={"stem": opening(prompt, level)})


def content_number(example: Example) -> int:
    """A number that is equal for clips that show the same; -1 for a clip that is alone."""
    return -1 if example.same_as is None else zlib.crc32(example.same_as.encode())


class EpochSampler(Sampler[tuple[int, int]]):
    """Keys (epoch, index) of `samples` training samples; every epoch has its own random order.

    Clips that show the same follow each other, so that they meet in a batch.
    """

    def __init__(self, contents: Sequence[int], samples: int, seed: int) -> None:
        """
        Args:
            contents: `content_number` of each clip.
        """
        self.samples, self.seed = samples, seed
        groups: dict[tuple[int, int], list[int]] = {}
        for index, content in enumerate(contents):
            groups.setdefault((content, index if content < 0 else -1), []).append(index)
        self.clips, self.groups = len(contents), list(groups.values())

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.samples, self.clips):
            epoch = start // self.clips
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            groups = torch.randperm(len(self.groups), generator=generator).tolist()
            order = [index for group in groups for index in self.groups[group]]
            yield from ((epoch, index) for index in order[: self.samples - start])


@dataclass(frozen=True)
class RatingCollator:
    """Joins samples into a batch."""

    processor: Any
    share_prefix: bool = False
    """Put auxiliary examples into the row of their clip: see `lmm_qa.model.backbone.Backbone.can_share_prefill`."""

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        rows, auxiliary, any_auxiliary = list(samples), None, any(sample["auxiliary"] for sample in samples)
        if any_auxiliary and not self.share_prefix:
            rows += [_own_row(sample, example) for sample in samples for example in sample["auxiliary"]]
        inputs = collate_inputs(self.processor, [row["inputs"] for row in rows])
        if any_auxiliary:
            inputs, auxiliary = (_shared_rows if self.share_prefix else _separate_rows)(inputs, samples)
        times = {name: inputs.pop(name).tolist() for name in TIME_INPUTS if name in inputs}
        features: Tensors = {}
        for name in samples[0]["vision_features"]:
            features[name] = torch.cat([row["vision_features"][name] for row in rows], dim=-2)
        return Batch(
            names=[sample["name"] for sample in samples],
            inputs=inputs | times,
            vision_features=features,
            mos=[sample["mos"] for sample in samples],
            std=[sample["std"] for sample in samples],
            contents=[sample["content"] for sample in samples],
            auxiliary=auxiliary,
        )


def _own_row(sample: Sample, example: AuxiliaryExample) -> Sample:
    """The sample's clip with an auxiliary example in place of the rating prompt."""
    inputs, ids, length = sample["inputs"], torch.tensor([example.input_ids]), sample["prefix_length"]
    prefix = {name: each[:, :length] if name in TOKEN_INPUTS else each for name, each in inputs.items()}
    return {**sample, "inputs": append_tokens(prefix, ids, torch.ones_like(ids))}


def _shared_rows(inputs: Tensors, samples: Sequence[Sample]) -> tuple[Tensors, AuxiliaryBatch]:
    """Append the auxiliary examples behind the rating prompt of their clip: the first of every row in one block, then
    the second, and so on. A block is as wide as its longest example and padded on the left, so all end in one column.
    """
    examples, real = [sample["auxiliary"] for sample in samples], inputs["attention_mask"].bool()
    width = real.shape[1]
    prompt_lengths = torch.tensor(
        [len(sample["inputs"]["input_ids"][0]) - sample["prefix_length"] for sample in samples]
    )
    segment_ids = [torch.where(real, (torch.arange(width) >= width - prompt_lengths[:, None]).long(), -1)]
    offsets, offset = [torch.zeros_like(segment_ids[0])], prompt_lengths
    blocks, columns = list[torch.Tensor](), [width - 1]
    answers = list[tuple[AuxiliaryExample, int, range]]()
    for number in range(max(map(len, examples))):
        block = [(row, each[number]) for row, each in enumerate(examples) if number < len(each)]
        block_width = max(len(example.input_ids) for _, example in block)
        first, longest = len(columns), max(len(example.answer_ids) for _, example in block)
        width += block_width
        columns += range(width - longest, width)
        tokens = torch.full((len(examples), block_width), -1)
        for row, example in block:
            tokens[row, block_width - len(example.input_ids) :] = torch.tensor(example.input_ids)
            answers.append((example, row, range(first + longest - len(example.answer_ids), first + longest)))
        blocks.append(tokens)
        segment_ids.append(torch.where(tokens >= 0, number + 2, -1))
        offsets.append(offset[:, None].expand_as(tokens))
        offset = offset + (tokens >= 0).sum(1)
    added = torch.cat(blocks, dim=1)
    auxiliary = _auxiliary_batch(columns, answers, torch.cat(segment_ids, dim=1), torch.cat(offsets, dim=1))
    return append_tokens(inputs, added.clamp(min=0), added >= 0), auxiliary


def _separate_rows(inputs: Tensors, samples: Sequence[Sample]) -> tuple[Tensors, AuxiliaryBatch]:
    """Auxiliary examples in rows of their own, behind those of the ratings; each ends where its last token is
    predicted."""
    examples = [example for sample in samples for example in sample["auxiliary"]]
    last, longest = inputs["input_ids"].shape[1] - 1, max(len(example.answer_ids) for example in examples)
    answers = [
        (example, row, range(len(example.answer_ids) - 1, -1, -1))
        for row, example in enumerate(examples, start=len(samples))
    ]
    return inputs, _auxiliary_batch(range(last, last - longest, -1), answers, None, None)


def _auxiliary_batch(
    columns: Sequence[int],
    answers: Sequence[tuple[AuxiliaryExample, int, range]],
    segment_ids: torch.Tensor | None,
    position_offsets: torch.Tensor | None,
) -> AuxiliaryBatch:
    """
    Args:
        columns: as in the result.
        answers: examples, each with its row and the indices into `columns` at which its answer is predicted.
    """
    return AuxiliaryBatch(
        columns=torch.tensor(list(columns)),
        positions=torch.tensor([(row, index) for _, row, indices in answers for index in indices]),
        target_ids=torch.tensor([token for example, _, _ in answers for token in example.answer_ids]),
        weights=[1 / len(example.answer_ids) for example, _, _ in answers for _ in example.answer_ids],
        tasks=torch.tensor([example.task for example, _, _ in answers for _ in example.answer_ids]),
        segment_ids=segment_ids,
        position_offsets=position_offsets,
    )
