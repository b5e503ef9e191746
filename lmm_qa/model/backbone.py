"""The LMM with its processor and adapter: views of clips in, level logits out, in one prefill; words, too.

Works with every image-text-to-text model of transformers whose processor takes videos. What the Qwen-VL family has in
common is used where it is there (a patch grid, so that views keep their own sizes); other families resize as their own
processor says. Knows nothing of clips on disk, of scores or scales.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from lmm_qa.errors import ModelError
from lmm_qa.model.prompt import Prompt

if TYPE_CHECKING:
    pass

from lmm_qa.model.inputs import PROMPT_TOKENS, SEQUENCES, ClipInput, level_tokens, patch_factor, prepare_inputs
from lmm_qa.model.levels import LevelLogits
from lmm_qa.model.loading import (
    Dtype,
    Quantization,
    RuntimeChoice,
    _bitsandbytes,
    _first_line,
    choose_attention,
    choose_device,
    choose_dtype,
    load_processor,
)
from lmm_qa.model.onednn import OneDNNLinear

TOKENS_AT_ONCE = 16_384


"""Tokens that a GPU gets together, padding included: 24 clips of the embedded model, 12 of 1,319 tokens. A clip of more
goes alone."""


class Backbone:
    """A loaded model with its processor. Make one with `Backbone.load`."""

    def __init__(self, model: Any, processor: Any, choices: dict[str, RuntimeChoice]) -> None:
        self.model = model.eval()
        self.processor = processor
        self.choices = choices

    @classmethod
    def load(
        cls,
        model: str,
        *,
        revision: str | None = None,
        adapter: Path | None = None,
        quantization: Quantization | None = None,
        device: str | None = None,
        dtype: Dtype | None = None,
        trust_remote_code: bool = False,
    ) -> Backbone:
        """Load weights (safetensors only) and processor from a directory or the hub.

        Args:
            model: directory or hub id of a transformers image-text-to-text model.
            revision: branch, tag or commit on the hub.
            adapter: PEFT adapter directory to put on top.
            quantization: `4bit` (NF4) or `8bit` weights of the language model, by bitsandbytes. Saves memory, not time.
            device, dtype: chosen with `choose_device`, `choose_dtype` where not given.
            trust_remote_code: run Python that comes with the model. Only for authors whom you trust.

        Raises:
            ModelError: anything of it cannot be loaded.
        """
        from transformers import AutoModelForImageTextToText

        where = choose_device(device)
        precision = choose_dtype(where.value, dtype)
        attention = choose_attention(where.value, precision.value)
        numbers = getattr(torch, precision.value)
        options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        processor = load_processor(model, **options)  # before the weights, which take their time
        if quantization:
            options["quantization_config"] = _bitsandbytes(quantization, numbers)
        try:
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                model,
                dtype=numbers,
                attn_implementation=attention.value,
                device_map={"": where.value},
                use_safetensors=True,
                **options,
            )
        except Exception as error:  # transformers, safetensors and the hub raise a dozen kinds
            raise ModelError(f"cannot load the model {model!r}: {_first_line(error)}") from error
        if adapter is not None:
            from peft import PeftModel

            try:
                with warnings.catch_warnings():
                    # PEFT 0.21 asks by a name that transformers 5.23 has given up: nothing for our users.
                    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
                    loaded = PeftModel.from_pretrained(loaded, str(adapter))
            except Exception as error:
                raise ModelError(f"cannot put the adapter {adapter} onto {model!r}: {_first_line(error)}") from error
        choices = {"device": where, "dtype": precision, "attention": attention}
        if quantization:
            choices["quantization"] = RuntimeChoice(quantization, "as asked")
        return cls(loaded, processor, choices)

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return torch.device(self.model.device)

    def level_tokens(self, prompt: Prompt, videos: int) -> tuple[int, ...]:
        """Token ids of the prompt's level words, worst first; see `level_tokens`."""
        return level_tokens(self.processor, prompt, videos)

    @torch.inference_mode()
    def read(self, clips: Sequence[ClipInput], prompt: Prompt) -> list[LevelLogits]:
        """One prefill for a batch of clips.

        Returns:
            One `LevelLogits` a clip, in order. They do not depend on what else is in the batch.

        Raises:
            ModelError: they are not finite, as happens in float16 with models that were not made for it.
        """
        read = ((places, self.last_logits(inputs)) for places, inputs in self.prepared(clips, prompt))
        return self.level_logits(torch.stack(_by_place(read)), prompt, len(clips[0].views))

    def level_logits(self, logits: torch.Tensor, prompt: Prompt, videos: int) -> list[LevelLogits]:
        """Those of the prompt's levels, out of (B, vocabulary) logits at the end of its stem.

        Raises:
            ModelError: they are not finite.
        """
        tokens = torch.tensor(self.level_tokens(prompt, videos), device=logits.device)
        normalizers = torch.logsumexp(logits, dim=-1)
        if not (torch.isfinite(normalizers).all() and torch.isfinite(logits[:, tokens]).all()):
            raise ModelError(
                f"in {self.choices['dtype'].value}, the model gives numbers that are not finite: try --dtype float32, "
                "or look at its weights"
            )
        return [
            LevelLogits(row, normalizer)
            for row, normalizer in zip(logits[:, tokens].cpu().numpy(), normalizers.tolist(), strict=True)
        ]

    def batches(self, clips: Sequence[ClipInput]) -> list[list[int]]:
        """Which clips go through the model together: their places in `clips`.

        A GPU gets as many as fill `TOKENS_AT_ONCE`, clips of similar length together; where the family has no patch
        grid, and so stacks its videos, clips of as many frames. A CPU gets one at a time: what a layer hands to the
        next stays in its caches.
        """
        if self.device.type == "cpu":
            return [[place] for place in range(len(clips))]
        grid = patch_factor(self.processor)
        patch = 2 * (grid or 28) ** 2  # pixels that one token covers; without a grid, about
        lengths = [sum(view[..., 0].size for view in clip.views) // patch + PROMPT_TOKENS for clip in clips]
        kinds = [0 if grid else len(clip.seconds) for clip in clips]
        found: list[list[int]] = []
        for place in sorted(range(len(clips)), key=lambda place: (kinds[place], lengths[place])):
            last = found[-1] if found else []
            fits = (len(last) + 1) * lengths[place] <= TOKENS_AT_ONCE  # it is the longest: the others are padded
            if last and fits and kinds[last[0]] == kinds[place]:
                last.append(place)
            else:
                found.append([place])
        return found

    def prepared(self, clips: Sequence[ClipInput], prompt: Prompt) -> Iterator[tuple[list[int], Any]]:
        """Places of the clips of each batch, and its inputs on the device.

        A GPU is kept busy: while the model runs on one batch, the next is prepared and sent.
        """

        def prepare(places: list[int]) -> Any:
            inputs = prepare_inputs(self.processor, [clips[place] for place in places], prompt)
            if self.device.type != "cuda":
                return inputs.to(self.device)
            return {name: value.pin_memory().to(self.device, non_blocking=True) for name, value in inputs.items()}

        batches = self.batches(clips)
        if self.device.type == "cpu":
            yield from ((places, prepare(places)) for places in batches)
            return
        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(prepare, batches[0])
            for places, following in zip(batches, [*batches[1:], None], strict=True):
                inputs = coming.result()
                if following:
                    coming = thread.submit(prepare, following)
                yield places, inputs

    @torch.inference_mode()
    def last_logits(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One prefill of prepared inputs on the model's device.

        Returns:
            (B, vocabulary) float32 logits of the next word.
        """
        logits: torch.Tensor = self._forward(**inputs, logits_to_keep=1, use_cache=False).logits
        return logits[:, -1].float()

    def _forward(self, **inputs: Any) -> Any:
        with OneDNNLinear() if self.device.type == "cpu" else nullcontext():
            return self.model(**inputs)

    def without_adapter(self) -> AbstractContextManager[None]:
        """Within this context the base model speaks, not the adapter; a model without one stays as it is.

        A `Prefill` keeps what one of the two saw: make it and use it on the same side.
        """
        disabled: AbstractContextManager[None] = getattr(self.model, "disable_adapter", nullcontext)()
        return disabled

    @property
    def shares_prefills(self) -> bool:
        """Whether questions about a clip can share what comes before them: the family has a patch grid, and all that
        its layers keep is keys and values of every token."""
        from transformers.cache_utils import DynamicCache, DynamicLayer

        kept = DynamicCache(config=self.model.config).layers  # a sliding window and a running state have other classes
        return patch_factor(self.processor) is not None and all(type(layer) is DynamicLayer for layer in kept)

    @torch.inference_mode()
    def begin(self, inputs: Mapping[str, torch.Tensor]) -> tuple[Context, torch.Tensor]:
        """One prefill of prepared inputs on the model's device that can be gone on from.

        Returns:
            The context, and (B, vocabulary) float32 logits of the next word.
        """
        output = self._forward(**inputs, logits_to_keep=1, use_cache=True)
        context = Context(output.past_key_values, inputs["attention_mask"].bool(), self._next_position(inputs))
        return context, output.logits[:, -1].float()

    def _next_position(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(B, 1) position of a word that comes after prepared inputs.

        M-RoPE counts fewer positions in a video than it has tokens. What a model keeps of that (`rope_deltas`) is off
        where inputs end in a video of more moments than it is wide: words go on from its width.
        """
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if not hasattr(base.model, "get_rope_index"):
            return inputs["attention_mask"].sum(dim=1, keepdim=True)
        longer = {name: functional.pad(inputs[name], (0, 1), value=int(name == "attention_mask")) for name in SEQUENCES}
        positions: torch.Tensor = base.model.get_rope_index(**{**inputs, **longer})[0]
        return positions[0, :, -1:]

    @torch.inference_mode()
    def go_on(self, context: Context, branches: Sequence[Sequence[Sequence[int]]]) -> torch.Tensor:
        """Go on from a context with token sequences that do not see each other, and keep them in it.

        They pass through the model as one sequence with a mask, so that the context is not copied for each. After more
        than one, nothing can go on from there.

        Args:
            branches: for each of B clips the same number N of sequences.

        Returns:
            (B, N, vocabulary) float32 logits of the word after each.
        """
        widths = [max(map(len, each)) for each in zip(*branches, strict=True)]
        # Padded on the left: a branch ends at the same place for all clips. Steps below 0 are padding.
        padded = [[pair for tokens, width in zip(row, widths, strict=True)
                   for pair in enumerate([0] * (width - len(tokens)) + [*tokens], len(tokens) - width)]
                  for row in branches]  # fmt: skip
        step, ids = torch.tensor(padded, device=self.device).unbind(-1)
        ends = torch.tensor(widths, device=self.device).cumsum(0)
        real = torch.cat((context.real, step >= 0), dim=1)
        inputs = {"input_ids": ids, "position_ids": context.position + step, "logits_to_keep": ends - 1}
        if len(widths) == 1:
            output = self._forward(**inputs, attention_mask=real, past_key_values=context.cache)
        else:
            branch = torch.repeat_interleave(ends.diff(prepend=ends.new_zeros(1)))
            apart = (branch[:, None] == branch).tril()
            visible = functional.pad(apart, (context.real.shape[1], 0), value=True) & real[:, None]
            with self._masked_attention():
                output = self._forward(**inputs, attention_mask=visible[:, None], past_key_values=context.cache)
        context.real, context.position = real, context.position + step[:, -1:] + 1
        logits: torch.Tensor = output.logits
        return logits.float()

    @contextmanager
    def _masked_attention(self) -> Iterator[None]:
        """PyTorch's attention: flash-attn knows no masks but padding."""
        usual = self.model.config._attn_implementation
        if usual != "sdpa":
            self.model.set_attn_implementation("sdpa")
        try:
            yield
        finally:
            if usual != "sdpa":
                self.model.set_attn_implementation(usual)


from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

Each = TypeVar("Each")


@dataclass
class Context:
    """What a model keeps of B token sequences, to go on from."""

    cache: Any
    """Keys and values: a cache of transformers."""
    real: torch.Tensor
    """(B, tokens) bool; False is padding."""
    position: torch.Tensor
    """(B, 1) position of the next token."""


def _by_place(batches: Iterable[tuple[list[int], Iterable[Each]]]) -> list[Each]:
    """What batches gave for each of their clips, in the order of all clips."""
    found = {place: each for places, batch in batches for place, each in zip(places, batch, strict=True)}
    return [found[place] for place in range(len(found))]
