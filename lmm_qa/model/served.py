"""Rate with a model that a vLLM server holds: `--model http://HOST:PORT/v1`.

Frames are sampled, cut to views and encoded here, as PNG without loss; the server processes them and returns the
log-probabilities of the level words, so the ratings are those of the same weights in this process. The tokenizer and
the settings come from the directory or the hub id that the server names as its model: the server's prompt is compared
with the one that this machine would make, and must be equal.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from lmm_qa.errors import ModelError, ServerError, UsageError, plural
from lmm_qa.model import compat
from lmm_qa.model.inputs import (
    ClipInput,
    Pixels,
    decode_continuation,
    level_tokens,
    patch_factor,
    prepare_inputs,
    video_metadata,
)
from lmm_qa.model.levels import LevelLogits
from lmm_qa.model.loading import Choice
from lmm_qa.model.presets import find_preset
from lmm_qa.model.prompt import Prompt
from lmm_qa.model.server import MAX_REQUESTS, Server
from lmm_qa.model.source import ModelSource, resolve_model

T = TypeVar("T")

TOP_LOGPROBS = 20
"""Most tokens that servers list without `logprob_token_ids`."""

MAX_LOGPROB = 0.01
"""A log-probability is at most 0, up to rounding."""

MAX_SHIFT = 0.05
"""Greatest uncertainty of a score, as a share of the scale, if a level is not among the listed tokens."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

NO_THOUGHTS = "<think>\n\n</think>\n\n"
"""Empty thoughts. The template of Qwen3.5 adds them itself, but keeps a space at the beginning of the stem only if it
follows them."""

NO_TIMES = (
    "this model also sees the times of a video's frames, which the server refuses: start it with "
    "--trust-request-mm-kwargs, or use a prompt with `frames: images`"
)


WITHOUT_SOUND = (
    "use a prompt without sound (--prompt talking_head), or load the model in this process (--model with its directory "
    "or hub id)"
)

NESTED = (
    "as transformers 5.10 or newer makes them on the server; scores differ slightly from those of the same weights "
    "here, unless the prompt has `frames: images`"
)

SAME_PROMPT = (
    "The server must not resize or sample the frames again, and must use the model's own chat template: serve it with "
    "the model's own files, with vLLM 0.30 or newer, and for more than 32 frames with "
    """--media-io-kwargs '{"video": {"num_frames": -1}}'"""
)


@dataclass(frozen=True)
class ServedModel:
    """A model that a server offers, as the server describes it."""

    url: str
    name: str
    root: str | None
    """Directory on the server or hub id that it was loaded from."""
    version: str | None
    """Version of vLLM."""

    @property
    def identity(self) -> str:
        """What identifies the weights. It has no address, so that a run can be resumed with another server."""
        return json.dumps([self.name, self.root, self.version])


def find_served(url: str, name: str | None = None) -> ServedModel:
    """Ask a server what it serves.

    Args:
        url: of its API, such as http://127.0.0.1:8000/v1.
        name: of one of its models; not needed if there is only one.

    Raises:
        UsageError: the URL is invalid, or the server has several models or none of this name.
        ModelError: the server cannot be reached, or it is not a server of models.
    """
    server = Server(url)
    try:
        models = {str(model["id"]): model.get("root") for model in server.get("models")["data"]}
    except (TypeError, KeyError, AttributeError):
        raise ModelError(f"{server.url}/models does not list models: is it the API of a vLLM server?") from None
    if name is None and len(models) == 1:
        (name,) = models
    if name not in models:
        known = ", ".join(models) or "none"
        problem = f"does not serve {name!r}" if name else f"serves {plural(len(models), 'model')}"
        raise UsageError(f"{server.url} {problem}: choose one with --served-model (it serves: {known})")
    try:
        version = str(server.get(f"{server.url.removesuffix('/v1')}/version")["version"])
    except (ModelError, TypeError, KeyError):
        version = None
    return ServedModel(server.url, name, models[name], version)


def resolve_served(served: ServedModel) -> ModelSource:
    """The settings of a served model, and where its tokenizer is on this machine or on the hub.

    Raises:
        ModelError: the server names neither a directory of this machine nor an id on the hub.
        ConfigError: rater.json is invalid.
    """
    names = [name for name in (served.root, served.name) if name]
    local = next((name for name in names if Path(name).is_dir()), None)
    public = next((name for name in names if HUB_ID.fullmatch(name) or find_preset(name)), None)
    if not (found := local or public):
        raise ModelError(
            f"{served.url} serves {served.name!r} from {served.root!r}, which is neither a directory of this machine "
            "nor an id on the Hugging Face hub, so its tokenizer is not available here: copy that directory to the "
            "same path, without the weights if they are large, or serve a hub id"
        )
    return replace(resolve_model(found, weights=False), name=served.name, adapter=None, served=served)


class ServedBackbone:
    """A served model; takes the place of `lmm_qa.model.backbone.Backbone` in a rater. Threads may share it."""

    batch_size = 1
    parallel_batches = MAX_REQUESTS

    def __init__(self, served: ServedModel, processor: Any, prompt: Prompt) -> None:
        """
        Args:
            processor: of the served model.
            prompt: of the ratings.

        Raises:
            ModelError: the server cannot answer questions of this kind, or makes another prompt of them; or the prompt
                has sound.
            LevelTokenError: a level word is not a single token.
            ServerLost: it cannot be reached.
        """
        self.processor = processor
        self._served = served
        self._server = Server(served.url)
        self._threads = ThreadPoolExecutor(MAX_REQUESTS)
        if prompt.sound:
            raise ModelError(f"a served model gets no sound: {WITHOUT_SOUND}")
        if compat.is_omni(processor) and prompt.frames == "video":
            raise ModelError(
                "a server places the frames of a video in time by rules of its own for Omni models: use a prompt with "
                "`frames: images`, or load the model in this process (--model with its directory or hub id)"
            )
        self._sends_times = prompt.frames == "video" and _depends_on_times(processor)
        self._checked: set[tuple[tuple[int, ...], ...]] = set()
        self._exact = True
        """Whether it returns the probabilities of chosen tokens."""
        self._opening = ""
        """What the template needs before the stem."""
        self._nested = False
        """Whether it adds a second pair of vision tokens around a video."""
        self._probe(prompt)
        self.choices = {
            "server": Choice(served.url, f"vLLM {served.version}" if served.version else "of unknown version"),
            "level probabilities": Choice("exact", "by logprob_token_ids")
            if self._exact
            else Choice(f"from the {TOP_LOGPROBS} likeliest tokens", "the server does not support logprob_token_ids"),
        }
        if self._nested:
            self.choices["videos"] = Choice("in a second pair of vision tokens", NESTED)

    @property
    def description(self) -> str:
        """As of `Backbone`."""
        return "served"

    def level_tokens(self, prompt: Prompt, videos: int) -> tuple[int, ...]:
        """Token ids of the prompt's level words, worst first; see `lmm_qa.model.inputs.level_tokens`."""
        return level_tokens(self.processor, prompt, videos)

    def level_logits(self, clips: Sequence[ClipInput], prompt: Prompt) -> list[LevelLogits]:
        """As of `Backbone`: log-probabilities instead of logits, with a normalizer of 0.

        Raises:
            ServerError, ServerLost, ModelError: see `lmm_qa.model.server.Server.post`; or the server's prompt is
                another one than this machine's.
        """
        return [logits for (logits,) in self.share_prefill(clips, prompt).level_logits([prompt])]

    def share_prefill(self, clips: Sequence[ClipInput], prompt: Prompt) -> ServedClips:
        """Clips for several questions; the server keeps them in its prefix cache between these."""
        return ServedClips(self, clips, prompt)

    def in_cacheable_groups(
        self, run: Callable[[slice], list[T]], clips: Sequence[ClipInput], prompt: Prompt
    ) -> list[T]:
        """As of `Backbone`. The server manages its cache: all clips are one group."""
        return run(slice(0, len(clips)))

    def without_adapter(self) -> AbstractContextManager[None]:
        """As of `Backbone`: a served model has none that could be disabled."""
        return nullcontext()

    def map(self, function: Callable[..., T], *arguments: Sequence[Any]) -> list[T]:
        """As the built-in `map`, with at most `MAX_REQUESTS` calls at the same time, from all threads together."""
        return list(self._threads.map(function, *arguments))

    def read_levels(self, clip: ClipInput, media: Sequence[str], prompt: Prompt) -> LevelLogits:
        """Ask one question about one clip.

        Args:
            media: the frames, see `encode_frames`.
        """
        tokens = self.level_tokens(prompt, len(clip.views))
        answer = self._ask(clip, media, prompt, self._level_options(tokens))
        self._check_prompt(answer, clip, prompt)
        listed = _listed(answer)
        found = [next((listed[name] for name in self._names(token) if name in listed), None) for token in tokens]
        if not self._exact:
            return LevelLogits(bounded_logs(found, listed, prompt), 0.0)
        if None in found:
            missing = [word for word, value in zip(prompt.levels, found, strict=True) if value is None]
            raise ServerError(f"{self._server.url} answered without the probabilities of {', '.join(missing)}")
        return LevelLogits(np.array(found, dtype=np.float32), 0.0)

    def continue_stem(self, clip: ClipInput, media: Sequence[str], prompt: Prompt, max_new_tokens: int) -> str:
        """The text after the stem, including the space between, by greedy decoding."""
        answer = self._ask(clip, media, prompt, {"max_tokens": max_new_tokens})
        self._check_prompt(answer, clip, prompt)
        try:
            (choice,) = answer["choices"]
            if choice.get("token_ids") is not None:
                return decode_continuation(self.processor.tokenizer, prompt.stem, choice["token_ids"])
            return str(choice["message"]["content"])
        except (TypeError, KeyError, ValueError):
            raise ServerError(f"{self._server.url} answered without a text") from None

    def _ask(self, clip: ClipInput, media: Sequence[str], prompt: Prompt, options: dict[str, Any]) -> Any:
        body = {
            "model": self._served.name,
            "messages": chat(clip, media, prompt, self._opening),
            "add_generation_prompt": False,
            "continue_final_message": True,
            "chat_template_kwargs": {"enable_thinking": False},
            "temperature": 0,
            "repetition_penalty": 1.0,  # the default of vLLM is that of the model's generation_config.json
            "return_token_ids": True,
            **options,
        }
        if self._sends_times:
            body["media_io_kwargs"] = {"video": _times(clip)}
        return self._server.post("chat/completions", body)

    def _level_options(self, tokens: Sequence[int]) -> dict[str, Any]:
        which = {"logprob_token_ids": list(tokens)} if self._exact else {"top_logprobs": TOP_LOGPROBS}
        return {"max_tokens": 1, "logprobs": True, "return_tokens_as_token_ids": True, **which}

    def _probe(self, prompt: Prompt) -> None:
        """Find out with black frames what the server supports, before any frame of a clip is sent."""
        clip = _black_clip(self.processor, prompt)
        media = encode_frames(clip, prompt)
        problems = []
        for self._opening, self._nested in product(("", NO_THOUGHTS), (False, True)):
            if self._nested and prompt.frames == "images":
                continue
            answer = self._ask_anything(clip, media, prompt)
            problem = self._difference(answer, clip, prompt)
            if problem is None:
                return
            problems.append(problem)
        raise ModelError(f"the prompt {problems[0]}. {SAME_PROMPT}")

    def _ask_anything(self, clip: ClipInput, media: Sequence[str], prompt: Prompt) -> Any:
        """An answer, and whether it has the probabilities of chosen tokens: sets `self._exact`."""
        tokens = self.level_tokens(prompt, len(clip.views))
        try:
            answer = self._ask(clip, media, prompt, self._level_options(tokens))
            listed = _listed(answer)
        except ServerError as error:
            if "media_io_kwargs" in str(error):
                raise ModelError(NO_TIMES) from None
            if not self._exact:
                raise ModelError(f"the served model cannot be used: {error}") from None
            listed = {}
        if self._exact and any(listed.keys().isdisjoint(self._names(token)) for token in tokens):
            self._exact = False
            return self._ask_anything(clip, media, prompt)
        return answer

    def _names(self, token: int) -> tuple[str, ...]:
        """What servers call a token in an answer."""
        return f"token_id:{token}", self.processor.tokenizer.decode([token])

    def _check_prompt(self, answer: Any, clip: ClipInput, prompt: Prompt) -> None:
        """Compare the server's prompt with this machine's, once for each size of clips.

        Raises:
            ModelError: they differ for the first clip.
            ServerError: they differ for a clip of another size.
        """
        sizes = tuple(view.shape for view in clip.views)
        if sizes in self._checked:
            return
        if problem := self._difference(answer, clip, prompt):
            shown = ", ".join(f"{frames} of {width}x{height}" for frames, height, width, _ in sizes)
            message = f"the prompt for frames {shown} {problem}. {SAME_PROMPT}"
            raise ServerError(message) if self._checked else ModelError(message)
        self._checked.add(sizes)

    def _difference(self, answer: Any, clip: ClipInput, prompt: Prompt) -> str | None:
        """How the server's prompt differs from this machine's; None: it does not."""
        ours = prepare_inputs(self.processor, [clip], prompt)["input_ids"][0].tolist()
        try:
            theirs, number = answer.get("prompt_token_ids"), int(answer["usage"]["prompt_tokens"])
        except (AttributeError, TypeError, KeyError):
            return f"cannot be checked: {self._server.url} does not tell its number of tokens"
        if theirs and self._nested:
            theirs = compat.without_outer_tokens(self.processor, theirs)
            number = len(theirs)
        if number != len(ours):
            return f"has {number} tokens on the server, but {len(ours)} here"
        if theirs and theirs != ours:
            at = next(at for at, pair in enumerate(zip(theirs, ours, strict=True)) if pair[0] != pair[1])
            texts = [self.processor.tokenizer.decode(tokens[at : at + 8]) for tokens in (theirs, ours)]
            return f"differs from token {at} on: {texts[0]!r} on the server, {texts[1]!r} here"
        return None


class ServedClips:
    """Clips with encoded frames, for several questions: takes the place of `lmm_qa.model.prefill.SharedPrefill`."""

    def __init__(self, backbone: ServedBackbone, clips: Sequence[ClipInput], prompt: Prompt) -> None:
        self.backbone = backbone
        self.clips = clips
        self.media = [encode_frames(clip, prompt) for clip in clips]

    def level_logits(self, prompts: Sequence[Prompt]) -> list[list[LevelLogits]]:
        """As of `SharedPrefill`. Raises: see `ServedBackbone.level_logits`."""
        read, indices = self.backbone.read_levels, range(len(self.clips))
        # The first question alone, so that the others find the clip in the server's prefix cache.
        first = self.backbone.map(lambda index: read(self.clips[index], self.media[index], prompts[0]), indices)
        pairs = [(index, prompt) for index in indices for prompt in prompts[1:]]
        others = iter(self.backbone.map(lambda pair: read(self.clips[pair[0]], self.media[pair[0]], pair[1]), pairs))
        return [[first[index], *(next(others) for _ in prompts[1:])] for index in indices]

    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        """As of `SharedPrefill`. Raises: see `ServedBackbone.level_logits`."""
        limits = [max_new_tokens] * len(prompts)
        return self.backbone.map(self.backbone.continue_stem, self.clips, self.media, prompts, limits)


def encode_frames(clip: ClipInput, prompt: Prompt) -> list[str]:
    """Data URLs of the frames, as PNG: one for each view, or for each frame of each view.

    The type video/jpeg stands for a sequence of pictures; vLLM opens them whatever their format is.
    """
    pictures = [[_png(frame) for frame in view] for view in clip.views]
    if prompt.frames == "video":
        return [f"data:video/jpeg;base64,{','.join(view)}" for view in pictures]
    return [f"data:image/png;base64,{picture}" for view in pictures for picture in view]


def _png(frame: Pixels) -> str:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getbuffer()).decode()


def chat(clip: ClipInput, media: Sequence[str], prompt: Prompt, opening: str = "") -> list[dict[str, Any]]:
    """The messages of a request, with the stem as the beginning of the assistant's answer.

    Args:
        media: see `encode_frames`.
        opening: text before the stem.
    """
    urls = iter(media)
    messages = prompt.messages(len(clip.views), len(clip.seconds), **clip.slots)
    for part in messages[-1]["content"]:
        if part["type"] != "text":
            part["type"] = f"{part['type']}_url"
            part[part["type"]] = {"url": next(urls)}
    return [*messages, {"role": "assistant", "content": opening + prompt.stem}]


def _times(clip: ClipInput) -> dict[str, Any]:
    """The times of the frames, as vLLM takes them."""
    metadata = video_metadata(clip, clip.views[0])
    return {
        "num_frames": -1,
        "fps": metadata.fps,
        "frames_indices": list(metadata.frames_indices or ()),
        "total_num_frames": metadata.total_num_frames,
        "duration": metadata.duration,
    }


def _depends_on_times(processor: Any) -> bool:
    """Whether the inputs of a model depend on the times of a video's frames."""
    prompt = Prompt(question="?", stem="?")
    first, second = (prepare_inputs(processor, [_black_clip(processor, prompt, step)], prompt) for step in (1.0, 5.0))
    return any(not torch.equal(torch.as_tensor(first[name]), torch.as_tensor(second[name])) for name in first)


def _black_clip(processor: Any, prompt: Prompt, step: float = 1.0) -> ClipInput:
    """Four black frames, `step` seconds apart, in as many views as the prompt has labels for."""
    side = 8 * (patch_factor(processor) or 28)
    views = (np.zeros((4, side, side, 3), np.uint8),) * max(1, len(prompt.view_labels))
    return ClipInput(views, (0.0, step, 2 * step, 3 * step), 4 * step, dict.fromkeys(prompt.slots, 1.0))


def _listed(answer: Any) -> dict[str, float]:
    """Log-probabilities of the tokens after the stem, by the names that the server gives the tokens."""
    try:
        entries = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        listed = {str(entry["token"]): float(entry["logprob"]) for entry in entries}
    except (TypeError, KeyError, IndexError, ValueError):
        raise ServerError("the server answered without the probabilities of tokens") from None
    values = list(listed.values())
    if not np.isfinite(values).all():
        raise ServerError(f"the server answered with log-probabilities that are not finite: {values}")
    if max(values, default=0.0) > MAX_LOGPROB:
        raise ServerError(
            f"the server answered with logits such as {max(values):g} in the place of log-probabilities, which are at "
            "most 0: start it without --logprobs-mode"
        )
    return listed


def bounded_logs(found: Sequence[float | None], listed: dict[str, float], prompt: Prompt) -> np.ndarray[Any, Any]:
    """Log-probabilities of the levels; those that are not listed are at most the smallest listed one, and set to it.

    Raises:
        ServerError: the score is too uncertain.
    """
    smallest = min(listed.values())
    absent = np.array([value is None for value in found])
    logs = np.array([smallest if value is None else value for value in found], dtype=np.float32)
    weights = np.exp(logs.astype(np.float64))
    positions = np.linspace(0, 1, len(weights))
    scores = []
    for cut in range(len(weights) + 1):  # the extreme scores: every absent level above a level is 0, or below it
        for zero in (absent & (np.arange(len(weights)) < cut), absent & (np.arange(len(weights)) >= cut)):
            used = np.where(zero, 0.0, weights)
            scores.append(used @ positions / used.sum() if used.any() else np.nan)
    shift = float(np.max(scores) - np.min(scores))
    if not shift <= MAX_SHIFT:
        words = ", ".join(word for word, missing in zip(prompt.levels, absent, strict=True) if missing)
        raise ServerError(
            f"{words} are not among the {len(listed)} tokens that the server lists, so the score would be uncertain by "
            f"{shift:.0%} of the scale. Use vLLM 0.30 or newer, which supports logprob_token_ids"
        )
    return logs
