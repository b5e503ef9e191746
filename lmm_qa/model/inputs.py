"""From the views of a clip and a prompt to the tensors that a model takes, made by the model's own processor.

Also the other direction: the token ids of the level words, and the text of generated tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from lmm_qa.errors import LevelTokenError, ModelError
from lmm_qa.model import compat
from lmm_qa.model.chat_template import render_chat
from lmm_qa.model.prompt import LIP_SYNC, MEASURED, Frames, Prompt, Slots
from lmm_qa.video.measurement.classifier import Measurement, evidence_names
from lmm_qa.video.measurement.evidence import evidence_text, lip_sync_text
from lmm_qa.video.sound import SAMPLE_RATE, Samples

if TYPE_CHECKING:
    from transformers.video_utils import VideoMetadata

Pixels = NDArray[np.uint8]

MIN_SOUND = 1.0
"""Seconds of sound that a model gets at least; silence follows a shorter one. The audio tower of Qwen3-Omni reads one
second at a time, and the end of a shorter sound would depend on the other clips of the batch."""

TOKEN_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids")
"""Model inputs with one number per token, (B, tokens)."""

SOUND_INPUTS = ("input_features", "feature_attention_mask")
"""Model inputs with one column per 10 ms of sound, (B, mel bands, columns) and (B, columns)."""

NO_SPACE_AFTER = frozenset("\"'`\u2018“„«([{<-\u2013\u2014/_*#")
"""Characters that are followed by a word without a space."""


@dataclass(frozen=True)
class ClipInput:
    """What the model sees of one clip."""

    views: tuple[Pixels, ...]
    """Each (T, H, W, 3) uint8 RGB."""
    seconds: tuple[float, ...]
    """Presentation time of the T frames."""
    duration: float
    """Seconds."""
    slots: Slots
    """Values for the prompt's slots."""
    measurement: Measurement | None = None
    """What was measured of the whole clip; None if it was not measured."""
    sound: Samples | None = None
    """(n,) mono samples of `SAMPLE_RATE`, -1 to 1, from the first frame on; None if the clip has no sound."""


def check_sound(processor: Any, prompt: Prompt) -> None:
    """Refuse a prompt with sound for a model that cannot hear.

    Raises:
        ModelError: says what to do.
    """
    if prompt.sound and not compat.is_omni(processor):
        raise ModelError(
            f"the prompt gives the model the sound of a clip (sound: true), which {type(processor).__name__} does not "
            "take: use a Qwen2.5-Omni or Qwen3-Omni model, or a prompt without sound (--prompt talking_head)"
        )


def fitted_sound(clip: ClipInput) -> Samples:
    """The sound as the model gets it: from the first frame to the end of the clip, to 10 ms, at least `MIN_SOUND`.

    Silence takes the place of what is missing: all of it for a clip without sound.
    """
    samples = np.zeros(round(max(clip.duration, MIN_SOUND) * 100) * SAMPLE_RATE // 100, np.float32)
    if clip.sound is not None:
        known = clip.sound[: round(clip.duration * SAMPLE_RATE)][: len(samples)]
        samples[: len(known)] = known
    return samples


def patch_factor(processor: Any) -> int | None:
    """Side in pixels of the square that one vision token covers, for families whose videos may have any size.

    None if the family resizes every frame to one fixed size.
    """
    video = processor.video_processor
    if getattr(video, "patch_size", None) and getattr(video, "merge_size", None):
        return int(video.patch_size * video.merge_size)
    return None


def prompt_text(processor: Any, prompt: Prompt, views: int, slots: Slots, images: int = 1) -> str:
    """The chat up to the end of the stem, with one placeholder per video, or per image.

    Args:
        images: number of frames of each view; needed only if they are separate images.
    """
    return compat.published_placeholders(processor, render_chat(processor, prompt.messages(views, images, **slots))) + (
        prompt.stem
    )


def prepare_inputs(processor: Any, clips: Sequence[ClipInput], prompt: Prompt) -> Any:
    """Model inputs of a batch, padded on the left, as a transformers `BatchFeature` on the CPU.

    Frames are not sampled again and, on a patch grid, not resized: the model sees the views as they are. Without a
    patch grid the processor resizes each frame to one fixed size.
    """
    if compat.is_omni(processor):  # all videos of a call would have the times of one
        return _joined(processor, [_prepare_together(processor, [clip], prompt) for clip in clips])
    return _prepare_together(processor, clips, prompt)


def _joined(processor: Any, prepared: Sequence[Any]) -> Any:
    from transformers import BatchFeature

    return prepared[0] if len(prepared) == 1 else BatchFeature(collate_inputs(processor, prepared))


def _prepare_together(processor: Any, clips: Sequence[ClipInput], prompt: Prompt) -> Any:
    texts = [prompt_text(processor, prompt, len(clip.views), clip.slots, len(clip.seconds)) for clip in clips]
    views = [[torch.from_numpy(view).permute(0, 3, 1, 2) for view in clip.views] for clip in clips]
    kwargs: dict[str, Any] = {"text": texts, "padding": True, "return_tensors": "pt"}
    kwargs |= compat.frame_kwargs(processor, prompt.frames, resize=patch_factor(processor) is None)
    if prompt.frames == "images":
        return processor(images=[[frame for view in clip for frame in view] for clip in views], **kwargs)
    if compat.is_omni(processor):
        sound = fitted_sound(clips[0]) if prompt.sound else None
        kwargs |= compat.omni_kwargs(processor, clips[0].seconds, sound)
    return processor(
        videos=[view for clip in views for view in clip],
        video_metadata=[video_metadata(clip, view) for clip in clips for view in clip.views],
        do_sample_frames=False,
        **kwargs,
    )


def video_metadata(clip: ClipInput, view: Pixels) -> VideoMetadata:
    """Frame times, for processors that write them into the prompt (Qwen3-VL) or the positions (Qwen2.5-VL)."""
    from transformers.video_utils import VideoMetadata

    ticks = 1000  # frame numbers at 1000 fps: times are exact even if the frame rate varies
    return VideoMetadata(
        total_num_frames=max(round(clip.duration * ticks), 1),
        fps=float(ticks),
        width=view.shape[2],
        height=view.shape[1],
        duration=clip.duration,
        frames_indices=[round(second * ticks) for second in clip.seconds],
    )


def collate_inputs(processor: Any, clips: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Combine the inputs of single clips into one batch: equal to `prepare_inputs` of all of them.

    Args:
        clips: inputs of one clip each: (1, tokens) token inputs, and pixels and sizes of its views.
    """
    longest = max(clip["input_ids"].shape[1] for clip in clips)
    padding = dict.fromkeys(TOKEN_INPUTS, 0) | {"input_ids": processor.tokenizer.pad_token_id}
    batch = {}
    for name in clips[0]:
        parts = [clip[name] for clip in clips]
        if name in padding:
            parts = [functional.pad(part, (longest - part.shape[1], 0), value=padding[name]) for part in parts]
        elif name in SOUND_INPUTS:
            most = max(part.shape[-1] for part in parts)
            parts = [functional.pad(part, (0, most - part.shape[-1])) for part in parts]
        batch[name] = torch.cat(parts)
    return batch


def remove_question(
    processor: Any, inputs: Mapping[str, torch.Tensor], prompt: Prompt, videos: int, slots: Slots
) -> dict[str, torch.Tensor]:
    """Prepared inputs up to the end of the last video or image; `append_question` is the inverse.

    A batch of several clips needs a question without slots.
    """
    length = len(question_tokens(processor, prompt, videos, slots))
    return {name: value[:, :-length] if name in TOKEN_INPUTS else value for name, value in inputs.items()}


def append_question(
    processor: Any, inputs: Mapping[str, torch.Tensor], prompt: Prompt, videos: int, slots: Slots
) -> dict[str, torch.Tensor]:
    """Inputs of one clip and a prompt, equal to `prepare_inputs`, from inputs without a question: pixels are reused.

    Args:
        prompt: any that has the system message that the inputs were prepared with.
    """
    tokens = torch.tensor(question_tokens(processor, prompt, videos, slots))[None]
    return append_tokens(inputs, tokens, torch.ones_like(tokens))


def append_tokens(
    inputs: Mapping[str, torch.Tensor], ids: torch.Tensor, attention_mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Prepared inputs with text tokens appended.

    Args:
        ids: (B, n) token ids.
        attention_mask: (B, n), zero or False for padding.
    """
    added = {"input_ids": ids, "attention_mask": attention_mask, "mm_token_type_ids": torch.zeros_like(ids)}
    return {
        name: torch.cat((value, added[name].to(value)), dim=1) if name in TOKEN_INPUTS else value
        for name, value in inputs.items()
    }


def question_tokens(processor: Any, prompt: Prompt, videos: int, slots: Slots) -> list[int]:
    """Token ids of everything after the last video or image.

    They do not depend on what comes before: its placeholder is a special token, at which tokenizers always split.
    """
    placeholder = processor.video_token if prompt.frames == "video" else processor.image_token
    text = prompt_text(processor, prompt, videos, slots).rpartition(placeholder)[2]
    return list(processor.tokenizer(text, add_special_tokens=False)["input_ids"])


def count_tokens(
    processor: Any, frames: int, sizes: Sequence[tuple[int, int]], prompt: Prompt, seconds: float | None = None
) -> int:
    """Number of tokens in the prefill of a clip, as the processor makes them from black frames and silence.

    Args:
        frames: number of frames.
        sizes: (height, width) of each view in pixels.
        seconds: duration of the clip, for prompts with sound; by default a second per frame.
    """
    views = tuple(np.zeros((frames, height, width, 3), np.uint8) for height, width in sizes)
    slots: Slots = {
        **dict.fromkeys(prompt.slots, 0.0),
        MEASURED: evidence_text(dict.fromkeys(evidence_names(), 0.0)),
        LIP_SYNC: lip_sync_text(0.0, 0.0),
    }
    duration = float(frames) if seconds is None else seconds
    clip = ClipInput(views, tuple(number * duration / frames for number in range(frames)), duration, slots)
    return int(prepare_inputs(processor, [clip], prompt)["input_ids"].shape[1])


@functools.lru_cache(maxsize=64)
def tokens_per_frame(processor: Any, frames: Frames) -> int:
    """Number of tokens of each frame, for families that resize every frame to one fixed size."""
    prompt = Prompt(question="?", stem="?", frames=frames)
    return count_tokens(processor, 3, [(28, 28)], prompt) - count_tokens(processor, 2, [(28, 28)], prompt)


def vision_features(model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Output of the vision tower and merger for prepared pixels; for families with a patch grid.

    `lmm_qa.model.compat.vision_kwargs` passes it to the model's forward instead of pixels.

    Returns:
        `tokens`: (N, width) vision tokens of all views, in order. `deepstack`: (layers, N, width), if the tower feeds
        several layers of the language model (Qwen3-VL).
    """
    if "pixel_values" in inputs:
        output = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
    else:
        pixels, grid = inputs["pixel_values_videos"], inputs["video_grid_thw"]
        output = model.model.get_video_features(pixels, grid, return_dict=True)
    features = {"tokens": torch.cat(tuple(output.pooler_output))}
    if layers := getattr(output, "deepstack_features", None):
        features["deepstack"] = torch.stack([torch.cat(tuple(layer)) for layer in layers])
    return features


def level_tokens(processor: Any, prompt: Prompt, videos: int) -> tuple[int, ...]:
    """Token ids of the level words as the continuation of the stem, worst level first.

    A level word follows a space, except after an opening quote, a hyphen or similar (`NO_SPACE_AFTER`).

    Raises:
        LevelTokenError: a word is not exactly one token in this position, or two words have the same token.
        ModelError: the prompt has sound, and the model takes none.
    """
    check_sound(processor, prompt)
    before = prompt_text(processor, prompt, videos, dict.fromkeys(prompt.slots, 0.0))
    return _level_tokens(processor.tokenizer, before, prompt.stem, prompt.levels)


@functools.lru_cache(maxsize=64)
def _level_tokens(tokenizer: Any, before: str, stem: str, words: tuple[str, ...]) -> tuple[int, ...]:
    context = tokenizer(before, add_special_tokens=False)["input_ids"]
    space = "" if stem[-1] in NO_SPACE_AFTER else " "
    ids: dict[str, int] = {}
    for word in words:
        whole = tokenizer(f"{before}{space}{word}", add_special_tokens=False)["input_ids"]
        if whole[: len(context)] != context:
            pieces = tokenizer.convert_ids_to_tokens(whole[-8:])
            raise LevelTokenError(
                f"the level {word!r} changes the tokens of the stem {stem!r}: together they end in {pieces}. End the "
                "stem with a whole word, without punctuation that the tokenizer joins to the next word"
            )
        added = whole[len(context) :]
        if len(added) != 1:
            raise LevelTokenError(
                f"the level {word!r} is {len(added)} tokens after the stem {stem!r}: "
                f"{tokenizer.convert_ids_to_tokens(added)}. A level must be one token: choose another word, or a stem "
                "that ends in a word rather than in an opening quote or bracket"
            )
        ids[word] = added[0]
    if len(set(ids.values())) != len(ids):
        raise LevelTokenError(f"two levels are the same token after the stem {stem!r}: {ids}")
    return tuple(ids.values())


def decode_continuation(tokenizer: Any, stem: str, tokens: Sequence[int]) -> str:
    """Text of tokens that follow the stem, including the space between.

    They are decoded together with the stem: some tokenizers drop a space at the beginning of a text.
    """
    stem_tokens = tokenizer(stem, add_special_tokens=False)["input_ids"]
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
    return str(decode([*stem_tokens, *tokens])).removeprefix(decode(stem_tokens))
