"""TODO-DOC model.inputs."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from lmm_qa.model.prompt import Prompt

if TYPE_CHECKING:
    from transformers.video_utils import VideoMetadata


Pixels = NDArray[np.uint8]


PROMPT_TOKENS = 64


"""About as many as come with the vision tokens of a clip."""


@dataclass(frozen=True)
class ClipInput:
    """What the model gets to see of one clip."""

    views: tuple[Pixels, ...]
    """Each (T, H, W, 3) uint8 RGB."""
    seconds: tuple[float, ...]
    """When the T frames are shown."""
    duration: float
    """Seconds."""
    slots: dict[str, float]
    """Values for the prompt's slots."""


def patch_factor(processor: Any) -> int | None:
    """Pixels a side that one token of the language model covers, where a view may have any size on such a grid.

    None where the family resizes every frame to one fixed size.
    """
    video = processor.video_processor
    if getattr(video, "patch_size", None) and getattr(video, "merge_size", None):
        return int(video.patch_size * video.merge_size)
    return None


def prompt_text(processor: Any, prompt: Prompt, videos: int, slots: dict[str, float]) -> str:
    """The chat up to the end of the stem, with one placeholder a video."""
    messages = prompt.messages(videos, **slots)
    return str(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)) + prompt.stem


def prepare_inputs(processor: Any, clips: Sequence[ClipInput], prompt: Prompt) -> Any:
    """The model's inputs for a batch, padded on the left; made by the model's own processor.

    Frames are neither sampled nor, on a patch grid, resized again: the views are what the model sees.
    """
    texts = [prompt_text(processor, prompt, len(clip.views), clip.slots) for clip in clips]
    videos = [torch.from_numpy(view).permute(0, 3, 1, 2) for clip in clips for view in clip.views]
    metadata = [_metadata(clip, view) for clip in clips for view in clip.views]
    options: dict[str, Any] = {"do_sample_frames": False}
    if patch_factor(processor) is not None:
        options["do_resize"] = False
        # Qwen2-VL's processor warns unless this is set; it concerns resizing, which is done already.
        if hasattr(processor.video_processor, "cap_pixels_per_frame"):
            options["cap_pixels_per_frame"] = False
    return processor(text=texts, videos=videos, video_metadata=metadata, padding=True, return_tensors="pt", **options)


def join_inputs(processor: Any, clips: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One batch of clips whose inputs were prepared singly: the same as `prepare_inputs` of them all.

    Args:
        clips: each the inputs of one clip: (1, tokens) sequences, and pixels and sizes of its views.
    """
    longest = max(clip["input_ids"].shape[1] for clip in clips)
    fill = dict.fromkeys(SEQUENCES, 0) | {"input_ids": processor.tokenizer.pad_token_id}
    joined = {}
    for name in clips[0]:
        parts = [clip[name] for clip in clips]
        if name in fill:
            parts = [functional.pad(part, (longest - part.shape[1], 0), value=fill[name]) for part in parts]
        joined[name] = torch.cat(parts)
    return joined


def without_question(
    processor: Any, inputs: Mapping[str, torch.Tensor], prompt: Prompt, videos: int, slots: dict[str, float]
) -> dict[str, torch.Tensor]:
    """Prepared inputs up to the end of the last video; `with_question` adds what comes after it again.

    For families with a patch grid; of several clips together, where the question has no slots.
    """
    tail = len(question_tokens(processor, prompt, videos, slots))
    return {name: value[:, :-tail] if name in SEQUENCES else value for name, value in inputs.items()}


def with_question(
    processor: Any, inputs: Mapping[str, torch.Tensor], prompt: Prompt, videos: int, slots: dict[str, float]
) -> dict[str, torch.Tensor]:
    """What `prepare_inputs` gives for a clip and a prompt, from inputs without question, and without work on pixels.

    Any prompt whose system message is the one that the inputs were prepared with.
    """
    tail = torch.tensor(question_tokens(processor, prompt, videos, slots))[None]
    return with_tokens(inputs, tail, torch.ones_like(tail))


def with_tokens(inputs: Mapping[str, torch.Tensor], ids: torch.Tensor, real: torch.Tensor) -> dict[str, torch.Tensor]:
    """Prepared inputs with further words, (B, n) token ids; `real`, of the same shape, is false at padding."""
    added = {"input_ids": ids, "attention_mask": real, "mm_token_type_ids": torch.zeros_like(ids)}
    return {
        name: torch.cat((value, added[name].to(value)), dim=1) if name in SEQUENCES else value
        for name, value in inputs.items()
    }


SEQUENCES = ("input_ids", "attention_mask", "mm_token_type_ids")


"""Inputs that hold a number for each token."""


def question_tokens(processor: Any, prompt: Prompt, videos: int, slots: dict[str, float]) -> list[int]:
    """What comes after the last video: a special token, so that it is split into tokens by itself."""
    text = prompt_text(processor, prompt, videos, slots).rpartition(processor.video_token)[2]
    return list(processor.tokenizer(text, add_special_tokens=False)["input_ids"])


def text_after(tokenizer: Any, stem: str, answer: Sequence[int]) -> str:
    """The answer in words; decoded with the stem, without which some tokenizers drop the space between."""
    begun = tokenizer(stem, add_special_tokens=False)["input_ids"]
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
    return str(decode([*begun, *answer])).removeprefix(decode(begun))


def vision_features(model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the vision tower and the merger make of prepared pixels; for families with a patch grid.

    Returns:
        `tokens`, (N, width): the vision tokens of all views, in order. For towers that feed several layers of the
        language model (Qwen3-VL), `deepstack`, (layers, N, width), too.
    """
    seen = model.model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True)
    found = {"tokens": torch.cat(tuple(seen.pooler_output))}
    if layers := getattr(seen, "deepstack_features", None):
        found["deepstack"] = torch.stack([torch.cat(tuple(layer)) for layer in layers])
    return found


def as_seen(features: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Keyword arguments that give kept `vision_features` to a model's forward, in place of pixels."""
    layers = [(layer,) for layer in features["deepstack"]] if "deepstack" in features else None
    return {
        "mm_encoder_outputs": {"video": SimpleNamespace(pooler_output=(features["tokens"],), deepstack_features=layers)}
    }


def count_tokens(processor: Any, frames: int, sizes: Sequence[tuple[int, int]], prompt: Prompt) -> int:
    """Tokens of one clip's prefill: `frames` frames in views of these (height, width), and the prompt.

    Counted by the processor itself on black frames.
    """
    views = tuple(np.zeros((frames, height, width, 3), np.uint8) for height, width in sizes)
    slots = dict.fromkeys(prompt.slots, 0.0)
    clip = ClipInput(views, tuple(float(number) for number in range(frames)), float(frames), slots)
    return int(prepare_inputs(processor, [clip], prompt)["input_ids"].shape[1])


def _metadata(clip: ClipInput, view: Pixels) -> VideoMetadata:
    """When the frames are shown, in the form that processors with time stamps (Qwen2.5-VL, Qwen3-VL) read it."""
    from transformers.video_utils import VideoMetadata

    ticks = 1000  # frame numbers at a thousand a second: exact times also where the frame rate varies
    return VideoMetadata(
        total_num_frames=max(round(clip.duration * ticks), 1),
        fps=float(ticks),
        width=view.shape[2],
        height=view.shape[1],
        duration=clip.duration,
        frames_indices=[round(second * ticks) for second in clip.seconds],
    )


from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lmm_qa.errors import LevelTokenError

NO_SPACE_AFTER = frozenset("\"'`\u2018“„«([{<-\u2013\u2014/_*#")
"""Characters that are written without a space before the next word."""


def level_tokens(processor: Any, prompt: Prompt, videos: int) -> tuple[int, ...]:
    """Token ids of the level words as they come after the stem, worst first.

    A space comes between, save after an opening quote, a hyphen and their like: a model goes on there without one.

    Raises:
        LevelTokenError: a word is not exactly one token there, or two words share one. Shows the pieces.
    """
    before = prompt_text(processor, prompt, videos, dict.fromkeys(prompt.slots, 0.0))
    return _level_tokens(processor.tokenizer, before, prompt.stem, prompt.levels)


@functools.lru_cache(maxsize=64)
def _level_tokens(tokenizer: Any, before: str, stem: str, words: tuple[str, ...]) -> tuple[int, ...]:
    context = tokenizer(before, add_special_tokens=False)["input_ids"]
    space = "" if stem[-1] in NO_SPACE_AFTER else " "
    found: dict[str, int] = {}
    for word in words:
        whole = tokenizer(f"{before}{space}{word}", add_special_tokens=False)["input_ids"]
        if whole[: len(context)] != context:
            pieces = tokenizer.convert_ids_to_tokens(whole[-8:])
            raise LevelTokenError(
                f"the level {word!r} changes how the stem {stem!r} is split into tokens: it ends in {pieces}. "
                "End the stem with a whole word, without punctuation that the tokenizer joins to the next word"
            )
        added = whole[len(context) :]
        if len(added) != 1:
            raise LevelTokenError(
                f"the level {word!r} is {len(added)} tokens after the stem {stem!r}: "
                f"{tokenizer.convert_ids_to_tokens(added)}. A level must be one token: choose another word, or a stem "
                "that ends in a word rather than in an opening quote or bracket"
            )
        found[word] = added[0]
    if len(set(found.values())) != len(found):
        raise LevelTokenError(f"two levels are the same token after the stem {stem!r}: {found}")
    return tuple(found.values())
