"""The path of a clip: sampled frames -> prompt -> one prefill -> level probabilities -> score -> calibrated score.

    rater = Rater.from_pretrained()          # the model that ships with the package
    rater.rate("clip.mp4").score             # a float on rater.settings.scale

`Rater.rate_all` is the same for many clips: decoding in worker processes, batches through the model, one result a
clip, in order, an error where a clip cannot be rated. `Details` asks for more than the score: which defects the clip
has, why in words, how the score goes over time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import product, tee
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
import torch

from lmm_qa.config import Sampling, View
from lmm_qa.defects.calibration import UNCALIBRATED, read_calibration
from lmm_qa.defects.classifier import defect_log_odds
from lmm_qa.defects.explanation import explain, explanation_prompt, opening
from lmm_qa.defects.profile import Profile, read_profile
from lmm_qa.defects.questions import questions
from lmm_qa.errors import ClipError, ConfigError, ModelError, UsageError
from lmm_qa.manifest import Clip, content_id
from lmm_qa.model.backbone import Backbone
from lmm_qa.model.inputs import ClipInput, patch_factor
from lmm_qa.model.levels import LevelLogits, LevelReading, read_levels
from lmm_qa.model.loading import Dtype, Quantization, choose_device, choose_dtype
from lmm_qa.model.prefill import Prefill
from lmm_qa.model.prompt import Prompt, load_prompt
from lmm_qa.model.rater_config import ModelSource, RaterConfig, identity, resolve_model
from lmm_qa.ratings import STEP, WINDOW, Timeline, read_timeline
from lmm_qa.video.decode import Frames, Windows, read_frames, read_windows
from lmm_qa.video.decoder_pool import DecoderPool

if TYPE_CHECKING:
    from lmm_qa.model.calibration import Calibration

from lmm_qa.ratings import CalibrationUse, Details, Failure, Rating

MAX_WORDS = 96


"""Tokens of an explanation: three clauses and what is good, in the vocabulary of the embedded model."""


WINDOWS_AT_ONCE = 8


"""Windows of a timeline that go through the model together."""


SIDE_BY_SIDE = 4


"""Clips that go through the model at the same time on a CPU, each on its share of the cores; one on each of two."""


Seen = Frames | Windows


"""What was read of a clip: the sampled frames; or those of each window too."""


Read = tuple[Clip, str | None, Seen | ClipError]


"""A clip, its content id where it could be read, and what was seen."""


@dataclass(frozen=True)
class RaterPlan:
    """A rater that is decided on and not loaded yet: enough to know what it would do, and whether it has done it."""

    source: ModelSource
    settings: RaterConfig
    quantization: Quantization | None
    device: str | None
    dtype: Dtype | None
    trust_remote_code: bool
    calibration: Calibration | None
    """What raw scores go through; None where the model has none, or it does not apply."""
    notes: tuple[str, ...]
    """What was assumed or left out; to be told to the user."""

    @property
    def raw_rater_id(self) -> str:
        """Short hash of all that determines a raw score: weights, prompt, scale, sampling, views, number format."""
        return identity(self.source, self.settings, self.dtype_chosen, self.quantization)

    @property
    def rater_id(self) -> str:
        """Short hash of all that determines a score: `raw_rater_id` and the calibration."""
        calibration = self.calibration.identity if self.calibration else None
        return identity(self.source, self.settings, self.dtype_chosen, self.quantization, calibration)

    @property
    def dtype_chosen(self) -> str:
        """Number format that the weights will be loaded in."""
        return choose_dtype(choose_device(self.device).value, self.dtype).value

    def load(self) -> Rater:
        """Load the weights. Raises as `Rater.from_pretrained` does."""
        backbone = Backbone.load(
            self.source.backbone,
            revision=self.source.revision,
            adapter=self.source.adapter,
            quantization=self.quantization,
            device=self.device,
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
        )
        return Rater(backbone, self)


def plan_rater(
    model: str | Path | None = None,
    *,
    revision: str | None = None,
    prompt: Prompt | str | Path | None = None,
    scale: tuple[float, float] | None = None,
    sampling: Sampling | None = None,
    views: Sequence[View] | None = None,
    quantization: Quantization | None = None,
    device: str | None = None,
    dtype: Dtype | None = None,
    trust_remote_code: bool = False,
) -> RaterPlan:
    """Decide on a rater without loading it. Arguments and errors are those of `Rater.from_pretrained`."""
    source = resolve_model(model, revision)
    settings = source.settings.override(
        prompt=load_prompt(prompt) if isinstance(prompt, str | Path) else prompt,
        scale=scale,
        sampling=sampling,
        views=tuple(views) if views else None,
    )
    _check_device(device)
    calibration, why_not = _calibration(source, settings)
    notes = tuple(note for note in (source.note, why_not) if note)
    return RaterPlan(source, settings, quantization, device, dtype, trust_remote_code, calibration, notes)


def _check_device(device: str | None) -> None:
    try:
        choose_device(device)
    except ModelError as error:
        cuda = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        here = ["cpu", *cuda, *(["mps"] if torch.backends.mps.is_available() else [])]
        raise UsageError(f"{error} (devices here: {', '.join(here)})") from None


def _calibration(source: ModelSource, settings: RaterConfig) -> tuple[Calibration | None, str | None]:
    """The model's calibration, if it has one that applies; if it has one that does not, why."""
    path = source.calibration
    if path is None:
        return None, None
    from lmm_qa.model.calibration import Calibration

    usual = source.settings.asked()
    if changed := [key for key, value in settings.asked().items() if value != usual[key]]:
        return None, f"{path} is for the rater's own {', '.join(changed)}, others were asked for: scores are raw"
    try:
        calibration = Calibration.read(path)
    except ConfigError as error:
        raise ConfigError(f"{error}\nmake it again with lmm-qa calibrate, or remove it to get raw scores") from None
    if calibration.scale != settings.scale:
        raise ConfigError(
            f"the scale of {path} is {calibration.scale}, that of the rater {settings.scale}: set the scale of the MOS "
            "in rater.json, rate and calibrate again; or remove the calibration to get raw scores"
        )
    formats = product(get_args(Dtype), (None, *get_args(Quantization)))
    if calibration.rater_id not in (None, *(identity(source, settings, *numbers) for numbers in formats)):
        return None, f"{path} is for other weights or settings: scores are raw; rate and calibrate again"
    return calibration, None


class Rater:
    """A backbone, a prompt, a scale, and which frames to look at. Make one with `Rater.from_pretrained`."""

    def __init__(self, backbone: Backbone, plan: RaterPlan) -> None:
        """Checks that the level words are single tokens for this backbone.

        Raises:
            LevelTokenError: they are not.
        """
        self.backbone = backbone
        self.source = plan.source
        self.settings = plan.settings
        self.calibration = plan.calibration
        self.defect_calibration = read_calibration(plan.source.defects)
        self.raw_rater_id = plan.raw_rater_id
        self.rater_id = plan.rater_id
        self.factor = patch_factor(backbone.processor) or 1
        backbone.level_tokens(self.settings.prompt, len(self.settings.views))

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        revision: str | None = None,
        prompt: Prompt | str | Path | None = None,
        scale: tuple[float, float] | None = None,
        sampling: Sampling | None = None,
        views: Sequence[View] | None = None,
        quantization: Quantization | None = None,
        device: str | None = None,
        dtype: Dtype | None = None,
        trust_remote_code: bool = False,
    ) -> Rater:
        """Load a rater.

        Args:
            model: None for the embedded one; else a rater directory, a PEFT adapter directory, a transformers model
                directory, or an id on the hub.
            revision: branch, tag or commit of an id on the hub.
            prompt: name of a prompt in `prompts/`, path of a YAML file, or a `Prompt`.
            scale: MOS of the worst and of the best level.
            sampling: which frames are looked at.
            views: what is made of them.
            quantization, device, dtype, trust_remote_code: see `lmm_qa.backbone.Backbone.load`.

        What is not given is as the model's rater.json says; without one: prompt `talking_head`, scale [1, 5],
        8 uniform frames, the whole picture in at most 448 x 448 pixels. A calibration.json beside it is applied, unless
        prompt, scale, sampling or views are given that differ from the model's.

        Raises:
            ModelError, LevelTokenError: the model cannot be loaded or does not fit the prompt.
            UsageError: `model` is a path and no directory lies there, or a directory of which a revision is asked; the
                device is not here.
            ConfigError: prompt, scale, rater.json or calibration.json say something they may not say.
        """
        return plan_rater(
            model,
            revision=revision,
            prompt=prompt,
            scale=scale,
            sampling=sampling,
            views=views,
            quantization=quantization,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        ).load()

    def rate(self, path: str | Path, details: Details = Details()) -> Rating:
        """Rate one clip, in this process.

        Raises:
            ClipError: it cannot be rated; the class says why.
            ModelError: the model gives numbers that are not finite.
        """
        clip = Clip(Path(path), str(path), "argument")
        content = content_id(clip.path)
        looks = (clip.path, self.settings.sampling, self.settings.views, self.factor)
        asked = details.profile
        seen = read_windows(*looks, WINDOW, STEP, asked) if details.timeline else read_frames(*looks, asked)
        return self._rate_batch([(clip, content, seen)], details)[0]

    def rate_all(
        self,
        clips: Iterable[str | Path | Clip],
        *,
        details: Details = Details(),
        batch_size: int | None = None,
        workers: int = 2,
        timeout: float = 60.0,
    ) -> Iterator[Rating | Failure]:
        """Rate many clips; one result for each, in order. A clip's score does not depend on the others.

        Args:
            clips: paths, or entries of a manifest.
            details: what is asked besides the score.
            batch_size: clips that are handed to the model together. It takes them in batches of similar length (see
                `Backbone.batches`), and gives their results together. By default 64 on a GPU, 1 on a CPU.
            workers: decoding processes.
            timeout: seconds that decoding one clip may take.

        Raises:
            UsageError: one of these numbers is not positive.
            ModelError: the model gives numbers that are not finite.
        """
        if batch_size is None:
            batch_size = 1 if self.backbone.device.type == "cpu" else 64
        if batch_size < 1:
            raise UsageError(f"batch_size must be positive, received {batch_size}")
        named = (clip if isinstance(clip, Clip) else Clip(Path(clip), str(clip), "argument") for clip in clips)
        ours, theirs = tee(named)
        paths = (clip.path for clip in theirs)
        looks = (self.settings.sampling, self.settings.views, self.factor)
        with DecoderPool(workers, timeout) as pool, self._threads(details) as (threads, most):
            decoded: Iterator[Seen | ClipError]
            if details.timeline:
                decoded = pool.imap_windows(paths, *looks, WINDOW, STEP, details.profile)
            else:
                decoded = pool.imap(paths, *looks, details.profile)
            read = ((clip, *_with_content(clip, seen)) for clip, seen in zip(ours, decoded, strict=True))
            coming: deque[Future[list[Rating | Failure]]] = deque()
            for batch, failed in _batches(read, batch_size):
                coming.append(threads.submit(self._settle, batch, details))
                # Failures wait only for the clips before them.
                while coming and (failed or len(coming) > most or coming[0].done()):
                    yield from coming.popleft().result()
            while coming:
                yield from coming.popleft().result()

    @contextmanager
    def _threads(self, details: Details) -> Iterator[tuple[ThreadPoolExecutor, int]]:
        """Threads that rate batches, and their number.

        The cores of a CPU do more in `SIDE_BY_SIDE` models' work than in one whose layers they share: they never wait
        for each other. A GPU takes one batch at a time, and so does a model whose adapter is put aside meanwhile.
        """
        cores = torch.get_num_threads()
        alone = self.backbone.device.type != "cpu" or details.answers_from == "base"
        most = 1 if alone else min(SIDE_BY_SIDE, cores)
        try:
            with ThreadPoolExecutor(most, initializer=torch.set_num_threads, initargs=(cores // most,)) as threads:
                yield threads, most
        finally:
            torch.set_num_threads(cores)

    def _settle(self, waiting: Sequence[Read], details: Details) -> list[Rating | Failure]:
        """Results for clips that are read or failed, in order."""
        good = [(clip, content, seen) for clip, content, seen in waiting if content and not isinstance(seen, ClipError)]
        ratings = iter(self._rate_batch(good, details))
        return [
            Failure(clip.name, content, seen, self.source.name, self.rater_id)
            if isinstance(seen, ClipError)
            else next(ratings)
            for clip, content, seen in waiting
        ]

    def _rate_batch(self, clips: Sequence[tuple[Clip, str, Seen]], details: Details) -> list[Rating]:
        """One prefill for all; then each clip's level logits become its score."""
        if not clips:
            return []
        began = time.perf_counter()
        looked_at = [seen.whole if isinstance(seen, Windows) else seen for _, _, seen in clips]
        inputs = [clip_input(frames) for frames in looked_at]
        nothing: list[None] = [None] * len(clips)
        profiles: Sequence[Profile | None] = nothing
        texts: Sequence[str | None] = nothing
        if details.profile:
            logits, profiles, texts = self._ask(inputs, looked_at, details)
        else:
            logits = self.backbone.read(inputs, self.settings.prompt)
        readings = [self._reading(each) for each in logits]
        timelines = [self._timeline(seen) if isinstance(seen, Windows) else None for _, _, seen in clips]
        seconds = (time.perf_counter() - began) / len(clips)
        ratings = [
            replace(self._rating(clip, content, frames, reading, seconds), profile=profile, timeline=timeline)
            for (clip, content, _), frames, reading, profile, timeline in zip(
                clips, looked_at, readings, profiles, timelines, strict=True
            )
        ]
        return [_explained(rating, text, self.settings.prompt) for rating, text in zip(ratings, texts, strict=True)]

    def _reading(self, logits: LevelLogits) -> LevelReading:
        return read_levels(logits.logits, logits.log_normalizer, self.settings.declared_scale())

    def _ask(
        self, inputs: Sequence[ClipInput], looked_at: Sequence[Frames], details: Details
    ) -> tuple[list[LevelLogits], list[Profile], list[str | None]]:
        """Level logits, profile and words of each clip, all on one prefill (two, where the base speaks)."""
        prompt, backbone = self.settings.prompt, self.backbone
        base = details.answers_from == "base" and self.source.adapter is not None
        calibration = UNCALIBRATED if base else self.defect_calibration
        asked = {name: _of(question, prompt) for name, question in questions().items() if calibration.asks(name)}
        logits = backbone.read(inputs, prompt) if base else []
        with backbone.without_adapter() if base else nullcontext():
            prefill = Prefill(backbone, inputs, prompt.system)
            answers = prefill.ask([*asked.values(), prompt])
            logits = logits or [each[-1] for each in answers]
            profiles = [
                read_profile(
                    dict(zip(asked, map(_yes, each), strict=False)),
                    calibration,
                    frames.dynamics,
                    defect_log_odds(frames.features) if frames.features else {},
                )
                for each, frames in zip(answers, looked_at, strict=True)
            ]
            texts: list[str | None] = [None] * len(inputs)
            if details.explanation:
                levels = [prompt.levels[self._reading(each).level] for each in logits]
                begun = [
                    explanation_prompt(prompt, profile.found).model_copy(update={"stem": opening(prompt, level)})
                    for profile, level in zip(profiles, levels, strict=True)
                ]
                texts = [*prefill.continue_texts(begun, MAX_WORDS)]
        return logits, profiles, texts

    def _timeline(self, windows: Windows) -> Timeline:
        """A rating of each window; raw, since a calibration is for whole clips, then calibrated as the score is."""
        logits = [
            each
            for start in range(0, len(windows), WINDOWS_AT_ONCE)
            for each in self.backbone.read(
                [clip_input(windows[number]) for number in range(start, min(start + WINDOWS_AT_ONCE, len(windows)))],
                self.settings.prompt,
            )
        ]
        readings = [self._reading(each) for each in logits]
        if self.calibration:
            scores = [self.calibration.apply(reading.score, reading.std)[0] for reading in readings]
        else:
            scores = [reading.score for reading in readings]
        return read_timeline(windows.spans, scores, self.settings.scale)

    def _rating(self, clip: Clip, content: str, frames: Frames, reading: LevelReading, seconds: float) -> Rating:
        prompt = self.settings.prompt
        rating = Rating(
            clip=clip.name,
            content_id=content,
            score=reading.score,
            raw_score=None,
            interval=None,
            calibration=None,
            scale=self.settings.scale,
            level=prompt.levels[reading.level],
            probabilities=dict(zip(prompt.levels, reading.probabilities, strict=True)),
            std=reading.std,
            level_mass=reading.mass,
            frames=replace(frames, views=(), dynamics=None, features=None),
            model=self.source.name,
            adapter=str(self.source.adapter) if self.source.adapter else None,
            prompt=f"{prompt.question} {prompt.stem}",
            rater_id=self.rater_id,
            seconds=seconds,
        )
        return _calibrated(rating, self.calibration, self.raw_rater_id) if self.calibration else rating


def _calibrated(rating: Rating, calibration: Calibration, raw_rater_id: str) -> Rating:
    mos, low, high = calibration.apply(rating.score, rating.std)
    use = CalibrationUse(calibration.identity, calibration.was_fitted_on(rating.clip, rating.content_id), raw_rater_id)
    return replace(rating, score=mos, raw_score=rating.score, interval=(low, high), calibration=use)


def _batches(read: Iterable[Read], size: int) -> Iterator[tuple[list[Read], bool]]:
    """As many clips that could be read, failures between them; and failures before which nothing waits. Says which."""
    waiting: list[Read] = []
    for clip in read:
        waiting.append(clip)
        good = sum(not isinstance(entry[2], ClipError) for entry in waiting)
        if good in (0, size):
            yield waiting, good == 0
            waiting = []
    if waiting:
        yield waiting, False


def clip_input(frames: Frames) -> ClipInput:
    """What the model gets to see of a clip that has been read."""
    info = frames.info
    slots = {
        "seconds": info.duration,
        "fps": info.fps,
        "frames": float(len(frames.indices)),
        "width": float(info.width),
        "height": float(info.height),
    }
    return ClipInput(frames.views, frames.seconds, info.duration, slots)


def _of(question: Prompt, prompt: Prompt) -> Prompt:
    """A question under the system message of the rating prompt, so that both share a prefill."""
    return question.model_copy(update={"system": prompt.system})


def _yes(answer: LevelLogits) -> tuple[float, float]:
    """Log-odds of yes against no, and the share of the vocabulary's probability that both hold."""
    no, yes = (float(logit) for logit in answer.logits)
    return yes - no, float(np.exp(np.logaddexp(no, yes) - answer.log_normalizer))


def _explained(rating: Rating, text: str | None, prompt: Prompt) -> Rating:
    """The rating with its words, where there are some."""
    if text is None or rating.profile is None:
        return rating
    profile, begun = rating.profile, opening(prompt, rating.level)
    words, objection = explain(
        text, rating.level, prompt.levels, profile.found, profile.absent, rating.content_id, begun
    )
    return replace(rating, explanation=words, explained_by=objection or "model")


def _with_content(clip: Clip, seen: Seen | ClipError) -> tuple[str | None, Seen | ClipError]:
    """The clip's content id; a file that can no longer be read is an error, decoded or not."""
    try:
        return content_id(clip.path), seen
    except ClipError as error:
        return None, seen if isinstance(seen, ClipError) else error
