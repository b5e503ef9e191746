"""The forward path of a loaded model: batches of clips in, logits of the level words out, in one prefill.

Works with every image-text-to-text model of transformers whose processor accepts videos, and with the thinkers of Omni
models. Clips of families with a patch grid (Qwen-VL, Qwen-Omni) keep their own sizes. Questions about a clip share its
prefill (`lmm_qa.model.prefill`), except in families with layers that have a recurrent state (Qwen3.5) or a sliding
window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar, Unpack

import torch
from torch.nn import functional

from lmm_qa.errors import ModelError, first_line
from lmm_qa.model import compat, vision_tower
from lmm_qa.model.inputs import (
    ClipInput,
    append_tokens,
    level_tokens,
    patch_factor,
    prepare_inputs,
    tokens_per_frame,
)
from lmm_qa.model.levels import LevelLogits
from lmm_qa.model.loading import BFLOAT16_VISION, Choice, LoadOptions, cache_bytes, load_model
from lmm_qa.model.memory import free_memory
from lmm_qa.model.onednn import OneDNNLinear
from lmm_qa.model.prefill import ANY_PROMPT, SharedPrefill, in_clip_order
from lmm_qa.model.prompt import Prompt

T = TypeVar("T")

GPU_BATCH_SIZE = 64

CPU_THREADS = 4
"""Maximum number of clips that a CPU rates in parallel, each in one thread with its share of the cores."""

MAX_BATCH_TOKENS = 16_384
"""Tokens in one batch on a GPU, padding included: 24 clips of the embedded model, or 12 of 1,319 tokens. A longer clip
is a batch by itself."""

FIXED_SIZE_FAMILIES = {"internvl", "llava_onevision"}
"""Families without a patch grid that are known to take a shared prefill."""

CACHE_SHARE = 0.5
"""Share of the free memory for KV caches that are held for several questions."""

PROMPT_TOKENS = 64
"""Estimated number of text tokens per clip, for forming batches."""


@dataclass
class CachedPrefix:
    """KV cache of B sequences, ready to be extended."""

    cache: Any
    """A transformers cache with keys and values."""
    attention_mask: torch.Tensor
    """(B, tokens) bool; False is padding."""
    next_position: torch.Tensor
    """(B, 1) position of the next token."""


class Backbone:
    """A loaded model with its processor. Make one with `Backbone.load`."""

    def __init__(self, model: Any, processor: Any, choices: dict[str, Choice]) -> None:
        self.model = model.eval()
        self.processor = processor
        self.choices = choices
        self._vision_factors = torch.bfloat16 if BFLOAT16_VISION in choices else torch.float32
        self._fitting_tokens: float = MAX_BATCH_TOKENS
        """Tokens in one batch that fit into memory, as far as is known."""

    @classmethod
    def load(cls, model: str, adapter: Path | None = None, **options: Unpack[LoadOptions]) -> Backbone:
        """Load a model. Arguments and errors: see `lmm_qa.model.loading.load_model`."""
        loaded = load_model(model, adapter, **options)
        return cls(loaded.model, loaded.processor, loaded.choices)

    @property
    def device(self) -> torch.device:
        """Device of the inputs."""
        return torch.device(self.model.device)

    @property
    def description(self) -> str:
        """Class of the model, and whether it has an adapter."""
        has_adapter = hasattr(self.model, "get_base_model")
        model = self.model.get_base_model() if has_adapter else self.model
        return f"{type(model).__name__}{' + adapter' if has_adapter else ''}"

    @property
    def batch_size(self) -> int:
        """Default number of clips to hand over at a time."""
        return 1 if self.device.type == "cpu" else GPU_BATCH_SIZE

    @property
    def parallel_batches(self) -> int:
        """Number of threads that should hand over clips at the same time.

        On a CPU, several threads that each run a whole model on a share of the cores are faster than one model whose
        layers use all cores, because they never wait for each other. A GPU runs one batch at a time.
        """
        return min(CPU_THREADS, torch.get_num_threads()) if self.device.type == "cpu" else 1

    def level_tokens(self, prompt: Prompt, videos: int) -> tuple[int, ...]:
        """Token ids of the prompt's level words, worst first; see `lmm_qa.model.inputs.level_tokens`."""
        return level_tokens(self.processor, prompt, videos)

    @torch.inference_mode()
    def level_logits(self, clips: Sequence[ClipInput], prompt: Prompt) -> list[LevelLogits]:
        """Logits of the level words for each clip, in order. They do not depend on the other clips.

        Raises:
            ModelError: logits are not finite, as can happen in float16; or a clip alone does not fit into memory.
        """

        def run() -> torch.Tensor:
            prepared = self.prepare_batches(clips, prompt)
            return torch.stack(in_clip_order((indices, self.next_token_logits(inputs)) for indices, inputs in prepared))

        logits = self.retry_with_smaller_batches(run, clips, prompt)
        return self.select_level_logits(logits, prompt, len(clips[0].views))

    def retry_with_smaller_batches(self, run: Callable[[], T], clips: Sequence[ClipInput], prompt: Prompt) -> T:
        """Return the result of a function; whenever it runs out of GPU memory, call it again with smaller batches.

        Args:
            run: processes the clips in the batches of `prepare_batches`.

        Raises:
            ModelError: it runs out of memory with one clip at a time.
        """
        while True:
            try:
                return run()
            except torch.OutOfMemoryError as error:
                reason = first_line(error)
            # After the exception is gone, and with its traceback the tensors of the failed batch.
            torch.cuda.empty_cache()
            tried = [batch for batch in self.batches(clips, prompt) if len(batch) > 1]
            if not tried:
                raise ModelError(
                    f"a single clip does not fit into the memory of the GPU ({reason}): use fewer frames (--sampling "
                    "uniform:4), smaller pictures (--view whole:224), --quantization 4bit, or a smaller model"
                )
            lengths = self._lengths(clips, prompt)
            self._fitting_tokens = max(len(batch) * lengths[batch[-1]] for batch in tried) / 2

    def in_cacheable_groups(
        self, run: Callable[[slice], list[T]], clips: Sequence[ClipInput], prompt: Prompt
    ) -> list[T]:
        """Call a function on groups of clips whose KV caches fit into memory at the same time.

        Args:
            run: returns a result for each clip of a group; makes a `SharedPrefill` of them.

        Returns:
            The results, in the order of the clips.

        Raises:
            ModelError: a clip alone does not fit into memory.
        """
        results: list[T] = []
        while len(results) < len(clips):
            rest = clips[len(results) :]
            group = slice(len(results), len(results) + self._cacheable(rest, prompt))
            results += self.retry_with_smaller_batches(partial(run, group), clips[group], prompt)
        return results

    def _cacheable(self, clips: Sequence[ClipInput], prompt: Prompt) -> int:
        """How many of these clips, from the first one on, to process before the caches of all are freed."""
        if len(clips) == 1 or not self.can_share_prefill:
            return len(clips)
        each = cache_bytes(self.model.config, self.model.dtype.itemsize)
        limit = CACHE_SHARE * free_memory(str(self.device))
        sizes = accumulate(each * length for length in self._lengths(clips, prompt))
        return max(1, sum(size <= limit for size in sizes))

    def select_level_logits(self, logits: torch.Tensor, prompt: Prompt, videos: int) -> list[LevelLogits]:
        """Pick the level words from (B, vocabulary) float32 logits at the end of the prompt's stem.

        Raises:
            ModelError: logits are not finite.
        """
        tokens = torch.tensor(self.level_tokens(prompt, videos), device=logits.device)
        normalizers = torch.logsumexp(logits, dim=-1)
        if not (torch.isfinite(normalizers).all() and torch.isfinite(logits[:, tokens]).all()):
            raise ModelError(
                f"the model's logits are not finite in {self.choices['dtype'].value}: try --dtype float32; if that "
                "does not help, the weights are damaged"
            )
        return [
            LevelLogits(row, normalizer)
            for row, normalizer in zip(logits[:, tokens].cpu().numpy(), normalizers.tolist(), strict=True)
        ]

    def batches(self, clips: Sequence[ClipInput], prompt: Prompt = ANY_PROMPT) -> list[list[int]]:
        """Group clips into batches; each is a list of indices into `clips`.

        A GPU gets batches of similar length with at most `MAX_BATCH_TOKENS`, or fewer if those did not fit into memory;
        families without a patch grid stack their videos, so their batches also have equal frame counts. A CPU gets one
        clip at a time: the activations of a layer then stay in its caches.
        """
        if self.device.type == "cpu":
            return [[index] for index in range(len(clips))]
        lengths = self._lengths(clips, prompt)
        frame_counts = [0 if patch_factor(self.processor) else len(clip.seconds) for clip in clips]
        limit = min(self._fitting_tokens, MAX_BATCH_TOKENS)
        batches: list[list[int]] = []
        for index in sorted(range(len(clips)), key=lambda index: (frame_counts[index], lengths[index])):
            last = batches[-1] if batches else []
            fits = (len(last) + 1) * lengths[index] <= limit  # the others are padded to this length
            if last and fits and frame_counts[last[0]] == frame_counts[index]:
                last.append(index)
            else:
                batches.append([index])
        return batches

    def _lengths(self, clips: Sequence[ClipInput], prompt: Prompt) -> list[int]:
        """Estimated number of tokens of each clip."""
        if (factor := patch_factor(self.processor)) is None:
            per_frame = tokens_per_frame(self.processor, prompt.frames)
            return [len(clip.views) * len(clip.seconds) * per_frame + PROMPT_TOKENS for clip in clips]
        pixels_per_token = (2 if prompt.frames == "video" else 1) * factor**2
        sound = self.processor.position_id_per_seconds if prompt.sound else 0
        return [
            sum(view[..., 0].size for view in clip.views) // pixels_per_token
            + math.ceil(sound * clip.duration)
            + PROMPT_TOKENS
            for clip in clips
        ]

    def prepare_batches(self, clips: Sequence[ClipInput], prompt: Prompt) -> Iterator[tuple[list[int], Any]]:
        """Indices of the clips of each batch, and its inputs on the device.

        For a GPU, the next batch is prepared in a thread while the model runs on the current one.
        """

        def prepare(indices: list[int]) -> Any:
            inputs = prepare_inputs(self.processor, [clips[index] for index in indices], prompt)
            if self.device.type != "cuda":
                return inputs.to(self.device)
            return {name: value.pin_memory().to(self.device, non_blocking=True) for name, value in inputs.items()}

        batches = self.batches(clips, prompt)
        if self.device.type == "cpu":
            yield from ((indices, prepare(indices)) for indices in batches)
            return
        with ThreadPoolExecutor(1) as thread:
            prepared = thread.submit(prepare, batches[0])
            for indices, following in zip(batches, [*batches[1:], None], strict=True):
                inputs = prepared.result()
                if following:
                    prepared = thread.submit(prepare, following)
                yield indices, inputs

    @torch.inference_mode()
    def next_token_logits(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(B, vocabulary) float32 logits of the token after prepared inputs, which are on the model's device."""
        logits: torch.Tensor = self._forward(**inputs, logits_to_keep=1, use_cache=False).logits
        return logits[:, -1].float()

    def _forward(self, **inputs: Any) -> Any:
        inputs = compat.with_positions(self.model, inputs)
        if self.device.type != "cpu":
            return self.model(**inputs)
        has_pixels = "pixel_values" in inputs or "pixel_values_videos" in inputs
        if has_pixels and self.model.config.model_type in vision_tower.FAMILIES:
            inputs = vision_tower.encode_pictures(self.model, inputs, self._vision_factors)
        with OneDNNLinear():
            return self.model(**inputs)

    def without_adapter(self) -> AbstractContextManager[None]:
        """Context in which the base model runs without its adapter; no effect if there is none.

        The KV cache of a `SharedPrefill` depends on the adapter: create and use it on the same side.
        """
        disabled: AbstractContextManager[None] = getattr(self.model, "disable_adapter", nullcontext)()
        return disabled

    def share_prefill(self, clips: Sequence[ClipInput], prompt: Prompt) -> SharedPrefill:
        """Process clips once for several questions; `prompt` has what the questions share, see `SharedPrefill`."""
        return SharedPrefill(self, clips, prompt)

    @property
    def can_share_prefill(self) -> bool:
        """Whether several questions can continue the KV cache of one video: it holds every token, and the family is one
        for which this has been checked."""
        checked = patch_factor(self.processor) is not None or self.model.config.model_type in FIXED_SIZE_FAMILIES
        return checked and compat.caches_every_token(self.model.config)

    @torch.inference_mode()
    def prefill(self, inputs: Mapping[str, torch.Tensor]) -> tuple[CachedPrefix, torch.Tensor]:
        """Prefill the KV cache with prepared inputs, which are on the model's device.

        Returns:
            The cached prefix, and (B, vocabulary) float32 logits of the next token.
        """
        output = self._forward(**inputs, logits_to_keep=1, use_cache=True)
        prefix = CachedPrefix(output.past_key_values, inputs["attention_mask"].bool(), self._next_position(inputs))
        return prefix, output.logits[:, -1].float()

    def _next_position(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(B, 1) position of a text token that follows prepared inputs.

        M-RoPE gives a video fewer positions than tokens. The `rope_deltas` that a model stores for this purpose are
        wrong if the inputs end in a video with more time steps than columns, so a token is appended for this.
        """
        ones = inputs["attention_mask"].new_ones((len(inputs["input_ids"]), 1))
        positions = compat.position_ids(self.model, append_tokens(inputs, torch.zeros_like(ones), ones))
        return positions.reshape(-1, *positions.shape[-2:])[0, :, -1:]

    @torch.inference_mode()
    def extend_cache(self, prefix: CachedPrefix, sequences: Sequence[Sequence[Sequence[int]]]) -> torch.Tensor:
        """Append token sequences that do not attend to each other to a cached prefix, in place.

        All sequences of a clip are one row with a block-diagonal attention mask, so the cache is not copied for each.
        A prefix that was extended with more than one sequence must not be extended again.

        Args:
            sequences: for each of the B clips, the same number N of token sequences.

        Returns:
            (B, N, vocabulary) float32 logits of the token after each sequence.
        """
        widths = [max(map(len, column)) for column in zip(*sequences, strict=True)]
        ids, offsets = _pad_left(sequences, widths, self.device)
        ends = torch.tensor(widths, device=self.device).cumsum(0)
        mask = torch.cat((prefix.attention_mask, offsets >= 0), dim=1)
        inputs = {
            "input_ids": ids,
            "position_ids": prefix.next_position + offsets,
            "logits_to_keep": ends - 1,
            "past_key_values": prefix.cache,
        }
        if len(widths) == 1:
            output = self._forward(**inputs, attention_mask=mask)
        else:
            sequence_ids = torch.repeat_interleave(ends.diff(prepend=ends.new_zeros(1)))
            own = (sequence_ids[:, None] == sequence_ids).tril()
            visible = functional.pad(own, (prefix.attention_mask.shape[1], 0), value=True) & mask[:, None]
            with self._sdpa_attention():
                output = self._forward(**inputs, attention_mask=visible[:, None])
        prefix.attention_mask, prefix.next_position = mask, prefix.next_position + offsets[:, -1:] + 1
        logits: torch.Tensor = output.logits
        return logits.float()

    @contextmanager
    def _sdpa_attention(self) -> Iterator[None]:
        """Switch to PyTorch's attention: flash-attn supports no masks other than padding."""
        usual = self.model.config._attn_implementation
        if usual != "sdpa":
            self.model.set_attn_implementation("sdpa")
        try:
            yield
        finally:
            if usual != "sdpa":
                self.model.set_attn_implementation(usual)


def _pad_left(
    sequences: Sequence[Sequence[Sequence[int]]], widths: Sequence[int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Concatenate the sequences of each clip, each padded to its width, so that they end in the same columns.

    Returns:
        (B, sum of widths) token ids, and offsets of the tokens in their sequence; negative offsets are padding.
    """
    rows = [
        [
            pair
            for tokens, width in zip(row, widths, strict=True)
            for pair in enumerate([0] * (width - len(tokens)) + [*tokens], len(tokens) - width)
        ]
        for row in sequences
    ]
    offsets, ids = torch.tensor(rows, device=device).unbind(-1)
    return ids, offsets
