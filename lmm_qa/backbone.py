"""The LMM with its processor and adapter: views of clips in, level logits out, in one prefill; words, too.

Works with every image-text-to-text model of transformers whose processor takes videos. What the Qwen-VL family has in
common is used where it is there (a patch grid, so that views keep their own sizes); other families resize as their own
processor says. Knows nothing of clips on disk, of scores or scales.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lmm_qa.errors import ConfigError, LevelTokenError, ModelError
from lmm_qa.prompting import Prompt

if TYPE_CHECKING:
    from transformers.video_utils import VideoMetadata

Quantization = Literal["4bit", "8bit"]
Dtype = Literal["float32", "bfloat16", "float16"]
Pixels = NDArray[np.uint8]
Each = TypeVar("Each")

UNQUANTIZED = ["visual", "vision_tower", "multi_modal_projector", "lm_head"]
"""Modules that stay in full precision: small beside the language model, and the pixels go through them."""

TOKENS_AT_ONCE = 16_384
"""Tokens that a GPU gets together, padding included: 24 clips of the embedded model, 12 of 1,319 tokens. A clip of more
goes alone."""

PROMPT_TOKENS = 64
"""About as many as come with the vision tokens of a clip."""

NO_SPACE_AFTER = frozenset("\"'`\u2018“„«([{<-\u2013\u2014/_*#")
"""Characters that are written without a space before the next word."""


@dataclass(frozen=True)
class Choice:
    """Something chosen at run time, and why; printed once."""

    value: str
    reason: str

    def __str__(self) -> str:
        return f"{self.value} ({self.reason})"


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


@dataclass(frozen=True)
class LevelLogits:
    """What one prefill says at the end of the stem."""

    logits: NDArray[np.float32]
    """(K,) logits of the level words, worst first."""
    log_normalizer: float
    """logsumexp over the whole vocabulary."""


def choose_device(device: str | None = None) -> Choice:
    """The asked device, or the best one that is here.

    Raises:
        ModelError: the device that was asked for is not here.
    """
    if device is not None:
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"device {device!r} cannot be used here: {reason}. Try --device cpu") from None
        return Choice(device, "as asked")
    if torch.cuda.is_available():
        return Choice("cuda", torch.cuda.get_device_name())
    if torch.backends.mps.is_available():
        return Choice("mps", "Apple GPU")
    return Choice("cpu", "no GPU found")


def choose_dtype(device: str, dtype: Dtype | None = None) -> Choice:
    """The asked number format, or the one that suits the device."""
    if dtype is not None:
        return Choice(dtype, "as asked")
    if device.startswith("cuda"):
        if torch.cuda.get_device_capability(device)[0] >= 8:
            return Choice("bfloat16", "GPU of the Ampere generation or newer")
        return Choice("float16", "GPU older than Ampere: no bfloat16")
    return Choice("float32", f"exact, and what {device} does reliably")


def choose_attention(device: str, dtype: str) -> Choice:
    """flash-attn where it can run, else PyTorch's scaled dot product attention; never `eager`."""
    if not device.startswith("cuda"):
        return Choice("sdpa", f"on {device}")
    from transformers.utils.import_utils import is_flash_attn_2_available

    if not is_flash_attn_2_available():
        return Choice("sdpa", "flash-attn is not installed")
    if dtype == "float32":
        return Choice("sdpa", "flash-attn does not calculate in float32")
    return Choice("flash_attention_2", "flash-attn is installed")


class Backbone:
    """A loaded model with its processor. Make one with `Backbone.load`."""

    def __init__(self, model: Any, processor: Any, choices: dict[str, Choice]) -> None:
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
            choices["quantization"] = Choice(quantization, "as asked")
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
        with Products() if self.device.type == "cpu" else nullcontext():
            return self.model(**inputs)

    def prefill(self, clips: Sequence[ClipInput], system: str | None = None) -> Prefill:
        """Look at clips once, to ask many things about each: the vision tower and all tokens before a question.

        Args:
            system: system message of the prompts to come.
        """
        return Prefill(self, clips, system)

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


class Prefill:
    """Clips that a model has looked at, to ask it many things about each. Made by `Backbone.prefill`.

    Nothing that is asked changes it. Where no prefill can be shared (see `Backbone.shares_prefills`), the model looks
    anew for each question, with the same results.
    """

    def __init__(self, backbone: Backbone, clips: Sequence[ClipInput], system: str | None) -> None:
        self.backbone = backbone
        self.clips = clips
        self.system = system
        any_prompt = Prompt(system=system, question="?", stem="?")
        self._begun = [
            (
                places,
                backbone.begin(without_question(backbone.processor, inputs, any_prompt, len(clips[0].views), {}))[0],
            )
            for places, inputs in (backbone.prepared(clips, any_prompt) if backbone.shares_prefills else ())
        ]

    def ask(self, prompts: Sequence[Prompt]) -> list[list[LevelLogits]]:
        """Several questions about each clip.

        Returns:
            For each clip one `LevelLogits` a prompt: those that `Backbone.read` gives.

        Raises:
            ConfigError: a prompt's system message is not the one that the clips were looked at with.
            ModelError: see `Backbone.read`.
        """
        self._check(prompts)
        if not self._begun:
            columns = [self.backbone.read(self.clips, prompt) for prompt in prompts]
        else:
            questions = [[self._tokens(clip, prompt) for prompt in prompts] for clip in self.clips]
            logits = torch.stack(
                _by_place(
                    (places, self.backbone.go_on(deepcopy(begun), [questions[place] for place in places]))
                    for places, begun in self._begun
                )
            )
            videos = len(self.clips[0].views)
            columns = [self.backbone.level_logits(logits[:, number], prompt, videos)
                       for number, prompt in enumerate(prompts)]  # fmt: skip
        return [list(row) for row in zip(*columns, strict=True)]

    def continue_texts(self, prompts: Sequence[Prompt], max_tokens: int) -> list[str]:
        """Go on from the stem of a prompt a clip, greedily, to the end of the answer or for `max_tokens`.

        Args:
            prompts: one a clip; their levels play no part.

        Returns:
            What follows each stem, from the space between on.

        Raises:
            ConfigError: see `ask`.
        """
        self._check(prompts)
        started = self._started(list(zip(self.clips, prompts, strict=True)))
        answers = _by_place((places, self._write(context, logits, max_tokens)) for places, context, logits in started)
        tokenizer = self.backbone.processor.tokenizer
        return [text_after(tokenizer, prompt.stem, answer) for prompt, answer in zip(prompts, answers, strict=True)]

    def _started(self, asked: Sequence[tuple[ClipInput, Prompt]]) -> Iterator[tuple[list[int], Context, torch.Tensor]]:
        """Places, context and logits of the first word of each batch, one question a clip."""
        for places, begun in self._begun:
            context = deepcopy(begun)
            yield places, context, self.backbone.go_on(context, [[self._tokens(*asked[each])] for each in places])[:, 0]
        if not self._begun:
            for place, (clip, prompt) in enumerate(asked):
                inputs = prepare_inputs(self.backbone.processor, [clip], prompt).to(self.backbone.device)
                yield [place], *self.backbone.begin(inputs)

    def _write(self, context: Context, logits: torch.Tensor, max_tokens: int) -> list[list[int]]:
        """The likeliest token again and again, for all clips of a context; `logits` are those of the first."""
        configured: Any = self.backbone.model.generation_config.eos_token_id
        ends = configured if isinstance(configured, list) else [configured]
        stops = {self.backbone.processor.tokenizer.eos_token_id, *ends}
        written: list[list[int]] = [[token] for token in logits.argmax(dim=-1).tolist()]
        while len(written[0]) < max_tokens and any(stops.isdisjoint(row) for row in written):
            logits = self.backbone.go_on(context, [[row[-1:]] for row in written])[:, 0]
            for row, token in zip(written, logits.argmax(dim=-1).tolist(), strict=True):
                row.append(token)
        return [list(takewhile(lambda token: token not in stops, row)) for row in written]

    def _tokens(self, clip: ClipInput, prompt: Prompt) -> list[int]:
        return question_tokens(self.backbone.processor, prompt, len(clip.views), clip.slots)

    def _check(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if prompt.system != self.system:
                raise ConfigError(
                    f"the question {prompt.question!r} has the system message {prompt.system!r}, but the clips were "
                    f"looked at with {self.system!r}: make a prefill for it"
                )


class Products(TorchFunctionMode):
    """Has a CPU calculate layers as matrix products of oneDNN where these are quicker; for inference alone.

    The same numbers to rounding, and the model stays as it is. PyTorch's linear layers in float32 call MKL, which makes
    little of AMD's processors: 100 GFLOP/s on a core of Zen 5, where oneDNN does 220. The patch embedding of the
    Qwen-VL family is a convolution whose kernel covers its input, so a product too: for a clip of the embedded model
    34 ms as PyTorch does it, 12 with MKL, 5 with oneDNN.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        plain = not types and not kwargs  # no weights of a quantized kind, and all arguments in their places
        if plain and function is functional.linear:
            return _linear(*args)
        if plain and function is functional.conv3d and args[4:5] == ((0, 0, 0),):  # padding
            patches, kernels, bias = args[:3]
            if patches.shape[1:] == kernels.shape[1:]:
                return _linear(patches.flatten(1), kernels.flatten(1), bias)[..., None, None, None]
        return function(*args, **(kwargs or {}))


def _linear(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if not _onednn_is_quicker() or not values.dtype == weight.dtype == torch.float32:
        return functional.linear(values, weight, bias)
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(values, weight, bias, "none", [], "")
    return product


@functools.cache
def _onednn_is_quicker() -> bool:
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.cpu.get_cpu_capability() == "AVX512"


def load_processor(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The processor of a model, from a directory or the hub, set to pad on the left.

    Raises:
        ModelError: there is none, or it takes no videos.
    """
    from transformers import AutoProcessor

    try:
        load: Any = AutoProcessor.from_pretrained
        processor = load(model, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelError(f"cannot load the processor of {model!r}: {_first_line(error)}") from error
    if getattr(processor, "video_processor", None) is None:
        raise ModelError(f"{model!r} takes no videos: its processor {type(processor).__name__} has no video processor")
    processor.tokenizer.padding_side = "left"  # so that the last position is the stem's end in every row
    return processor


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


@dataclass(frozen=True)
class Memory:
    """What a model takes, in bytes; an estimate from its configuration."""

    parameters: int
    """Their number."""
    weights: int
    """Bytes of the weights."""
    clip: int
    """Bytes that one more clip in a batch takes during the prefill."""


def estimate_memory(
    model: str,
    tokens: int,
    dtype: str,
    quantization: Quantization | None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Memory:
    """Estimate memory from the configuration alone: no weights are read.

    A clip takes what one layer of the language model holds at once (hidden states in and out, queries, keys, values,
    and the three products of the gated MLP) and its pixels; nothing is kept for a backward pass.

    Args:
        tokens: of one clip's prefill.

    Raises:
        ModelError: the configuration cannot be loaded.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            build: Any = AutoModelForImageTextToText.from_config
            empty = build(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelError(f"cannot read the configuration of {model!r}: {_first_line(error)}") from error
    number = getattr(torch, dtype).itemsize
    small = {"4bit": 0.56, "8bit": 1.0, None: number}[quantization]  # NF4 in blocks of 64 with float32 scales
    linear = sum(part.weight.numel() for name, part in empty.named_modules()
                 if isinstance(part, torch.nn.Linear) and not any(word in name for word in UNQUANTIZED))  # fmt: skip
    parameters = sum(parameter.numel() for parameter in empty.parameters())
    text = config.get_text_config()
    layer = (6 * text.hidden_size + 3 * text.intermediate_size) * number
    pixels = 28 * 28 * 2 * 3 * 4 * 2  # float32 patches of a token, once as made and once as moved
    return Memory(parameters, int(linear * small + (parameters - linear) * number), tokens * (layer + pixels))


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


def _bitsandbytes(quantization: Quantization, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    config: Any = BitsAndBytesConfig
    kept = [rf"(?:.*\.)?{name}" for name in UNQUANTIZED]  # transformers matches from the start of a module's full name
    if quantization == "8bit":
        return config(load_in_8bit=True, llm_int8_skip_modules=kept)
    return config(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
