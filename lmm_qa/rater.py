"""Rate clips: the path from a video file to a score. Read this module first.

    clip.mp4 -> decode, sample frames -> views -> one prefill of [video][question] -> logits of the level words
                (lmm_qa.video)                    (lmm_qa.model)
             -> measure every frame -> words in the question, if the rater was tuned with them
                (lmm_qa.defects)
             -> level probabilities -> score -> calibrated score, prediction interval
                (model.levels)                  (model.calibration)

    rater = Rater.from_pretrained()          # the model that ships with the package
    rater.rate("clip.mp4").score             # a float on rater.settings.scale

`Rater.rate_all` rates many clips: worker processes decode while the model runs. `Rater.rate_frames` rates clips that
are in memory. `Details` requests more than the score: a defect profile and an explanation (lmm_qa.defects), and the
score over time.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import tee
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, get_args

import torch

from lmm_qa.defects.calibration import UNCALIBRATED, read_calibration
from lmm_qa.defects.diagnosis import Explanation, ask_profiles, profile_id, write_explanations
from lmm_qa.defects.profile import AnswerSource, Profile
from lmm_qa.errors import ClipError, UsageError
from lmm_qa.manifest import Clip, content_id
from lmm_qa.model.inputs import ClipInput, patch_factor
from lmm_qa.model.levels import LevelLogits, LevelReading, read_levels
from lmm_qa.model.prompt import LIP_SYNC, MEASURED
from lmm_qa.model.rater_plan import RaterOptions, RaterPlan, plan_rater
from lmm_qa.ratings.rows import STEP, WINDOW, CalibrationUse, Details, Failure, Rating, Timeline, read_timeline
from lmm_qa.video.decode import Frames, Windows, read_frames, read_windows
from lmm_qa.video.decoder_pool import DecoderPool
from lmm_qa.video.frame_array import FrameArray, read_batch
from lmm_qa.video.measurement.classifier import predict
from lmm_qa.video.measurement.evidence import evidence_text, lip_sync_text
from lmm_qa.video.measurement.features import FeatureExtractor
from lmm_qa.video.sound import NO_SOUND, SAMPLE_RATE, SoundState

if TYPE_CHECKING:
    from lmm_qa.model.backbone import Backbone
    from lmm_qa.model.rater_config import RaterConfig
    from lmm_qa.model.served import ServedBackbone
    from lmm_qa.video.frame_array import FramesInMemory

SCORE_ONLY = Details()

WINDOWS_PER_PREFILL = 8
"""Number of windows of a timeline in one prefill."""


@dataclass(frozen=True)
class DecodedClip:
    """A clip that is ready for the model."""

    clip: Clip
    content_id: str
    frames: Frames
    """Sampled from the whole clip."""
    windows: Windows | None
    """For the timeline; None if it was not requested."""


class Rater:
    """A loaded model with its prompt, scale, sampling and calibration. Make one with `Rater.from_pretrained`."""

    def __init__(self, backbone: Backbone | ServedBackbone, plan: RaterPlan) -> None:
        """
        Raises:
            LevelTokenError: a level word is not a single token for this model.
            ConfigError: defects.json is invalid.
        """
        self.backbone = backbone
        self.source = plan.source
        self.settings = plan.settings
        self.calibration = plan.calibration
        self.defect_calibration = read_calibration(plan.source.defects)
        self.raw_rater_id = plan.raw_rater_id
        self.rater_id = plan.rater_id
        self._profile_ids = {
            answers_from: profile_id(plan.source, answers_from) for answers_from in get_args(AnswerSource)
        }
        self.factor = patch_factor(backbone.processor) or 1
        backbone.level_tokens(self.settings.prompt, len(self.settings.views))

    @classmethod
    def from_pretrained(cls, model: str | Path | None = None, **options: Unpack[RaterOptions]) -> Rater:
        """Load a rater. Arguments and errors: see `lmm_qa.model.rater_plan.plan_rater`.

        A calibration.json beside the model is applied, unless prompt, scale, sampling or views differ from the model's.

        Raises:
            ModelError, LevelTokenError: the model cannot be loaded or does not fit the prompt.
        """
        return cls.from_plan(plan_rater(model, **options))

    @classmethod
    def from_plan(cls, plan: RaterPlan) -> Rater:
        """Load the weights of a planned rater. Raises as `from_pretrained` does."""
        return cls(plan.load_backbone(), plan)

    def rate(self, path: str | Path, details: Details = SCORE_ONLY) -> Rating:
        """Rate one clip; decodes in this process.

        Raises:
            ClipError: it cannot be rated; the class gives the reason.
            ModelError: the model returns numbers that are not finite.
        """
        clip = Clip(Path(path), str(path), "argument")
        content = content_id(clip.path)
        how = (self.settings.sampling, self.settings.views, self.factor)
        measure = measurement(self.settings, details)
        decoded = (
            read_windows(clip.path, *how, WINDOW, STEP, measure)
            if details.timeline
            else read_frames(clip.path, *how, measure)
        )
        return self._rate_batch([_decoded_clip(clip, content, decoded)], details)[0]

    def rate_frames(self, frames: FramesInMemory, fps: float, details: Details = SCORE_ONLY) -> Rating | list[Rating]:
        """Rate clips that are in memory, as if they were files without loss.

        Several threads may call this at the same time, except with `details.answers_from="base"`, which disables the
        adapter for all of them.

        Args:
            frames: a clip, (T, H, W, 3) or (T, 3, H, W) with T at least 2, or a batch of clips, (B, T, ...): NumPy
                arrays or torch tensors on any device, RGB, uint8 or floating point in [0, 1]. Also a list of PIL images
                (a clip), or a list of clips of any lengths (a batch).
            fps: frames per second.
            details: what to report besides the score. A profile, and a prompt that contains what was measured, copy
                every frame to the CPU; else only those that the model sees are copied.

        Returns:
            The rating of a clip, or one rating per clip of a batch. `content_id` is a hash of the sampled frames.

        Raises:
            UsageError: shape, dtype, values or fps differ from that; the message says what was received. Or the prompt
                has sound.
            ModelError: the model returns numbers that are not finite.
            ServerError, ServerLost: a served model cannot rate a clip, or does not answer any more.
        """
        clips, batched = read_batch(frames, fps)
        ratings = self._rate_arrays(clips, details)
        return ratings if batched else ratings[0]

    def reward(self, frames: FramesInMemory, fps: float) -> torch.Tensor:
        """Scores of clips in memory, for reinforcement learning or best-of-n sampling. No gradient flows through them.

        Args:
            frames, fps: as for `rate_frames`.

        Returns:
            (B,) float32 scores on `settings.scale`, on the device of `frames`; (1,) for a single clip.

        Raises: as `rate_frames`.
        """
        clips, _ = read_batch(frames, fps)
        scores = [rating.score for rating in self._rate_arrays(clips, SCORE_ONLY)]
        first = frames[0] if isinstance(frames, list | tuple) else frames
        return torch.tensor(scores, device=first.device if isinstance(first, torch.Tensor) else None)

    def _rate_arrays(self, arrays: Sequence[FrameArray], details: Details) -> list[Rating]:
        if self.settings.prompt.sound:
            raise UsageError(
                "frames in memory have no sound, which this rater's prompt gives to the model (sound: true): rate "
                "files, or use a prompt without sound"
            )
        names = [f"frames[{number}]" for number in range(len(arrays))] if len(arrays) > 1 else ["frames"]
        clips = (self._sampled_clip(array, name, details) for array, name in zip(arrays, names, strict=True))
        if len(arrays) == 1:
            return self._rate_batch(list(clips), details)
        ratings = []
        for result in self._rate_decoded(clips, details):
            if isinstance(result, Failure):
                raise result.error
            ratings.append(result)
        return ratings

    def _sampled_clip(self, array: FrameArray, name: str, details: Details) -> DecodedClip:
        how = (self.settings.sampling, self.settings.views, self.factor)
        measure = measurement(self.settings, details)
        sampled = (
            array.read_windows(*how, WINDOW, STEP, measure) if details.timeline else array.read_frames(*how, measure)
        )
        whole = sampled.whole if isinstance(sampled, Windows) else sampled
        return _decoded_clip(Clip(Path(name), name, "memory"), frames_id(whole), sampled)

    def rate_all(
        self,
        clips: Iterable[str | Path | Clip],
        *,
        details: Details = SCORE_ONLY,
        batch_size: int | None = None,
        workers: int = 2,
        timeout: float = 60.0,
        decoders: DecoderPool | None = None,
    ) -> Iterator[Rating | Failure]:
        """Rate many clips. A clip's score does not depend on batch size, order or the other clips.

        Args:
            clips: paths, or entries of a manifest.
            details: what to report besides the score.
            batch_size: clips handed to the model at a time; it forms batches of similar length from them (see
                `Backbone.batches`), and their results come together. Default: 64 on a GPU, 1 on a CPU.
            workers: number of decoding processes.
            timeout: time limit for decoding one clip, in seconds.
            decoders: an open pool to decode with, which stays open, instead of a new one with `workers` and `timeout`.

        Yields:
            One result per clip, in order; a `Failure` for a clip that cannot be rated.

        Raises:
            UsageError: batch_size, workers or timeout is not positive.
            ModelError: the model returns numbers that are not finite.
            ServerLost: a served model does not answer any more.
        """
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"batch_size must be positive, received {batch_size}")
        with nullcontext(decoders) if decoders else DecoderPool(workers, timeout) as pool:
            yield from self._rate_decoded(self._decode(pool, clips, details), details, batch_size)

    def _rate_decoded(
        self, clips: Iterable[DecodedClip | Failure], details: Details, batch_size: int | None = None
    ) -> Iterator[Rating | Failure]:
        """Rate decoded clips in batches, while the next ones are decoded; one result per clip, in order."""
        if batch_size is None:
            batch_size = self.backbone.batch_size
        with self._thread_pool(details) as (threads, parallel):
            pending: deque[Future[list[Rating | Failure]]] = deque()
            for batch in _batches(clips, batch_size):
                pending.append(threads.submit(self._rate_or_fail, batch, details))
                # A failure is reported as soon as the clips before it are done.
                flush = isinstance(batch[0], Failure)
                while pending and (flush or len(pending) > parallel or pending[0].done()):
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()

    def _decode(
        self, pool: DecoderPool, clips: Iterable[str | Path | Clip], details: Details
    ) -> Iterator[DecodedClip | Failure]:
        """Decode clips in worker processes; results in order."""
        named, copy = tee(clip if isinstance(clip, Clip) else Clip(Path(clip), str(clip), "argument") for clip in clips)
        paths = (clip.path for clip in copy)
        how = decoding(self.settings, self.factor, details)
        results: Iterator[Frames | Windows | ClipError] = (
            pool.imap_windows(paths, **how) if details.timeline else pool.imap(paths, **how)
        )
        for clip, decoded in zip(named, results, strict=True):
            yield self._decoded_or_failure(clip, decoded)

    def _decoded_or_failure(self, clip: Clip, decoded: Frames | Windows | ClipError) -> DecodedClip | Failure:
        try:
            content = content_id(clip.path)
        except ClipError as error:  # the file may have gone since it was decoded
            error = decoded if isinstance(decoded, ClipError) else error
            return Failure(clip.name, None, error, self.source.name, self.rater_id)
        if isinstance(decoded, ClipError):
            return Failure(clip.name, content, decoded, self.source.name, self.rater_id)
        return _decoded_clip(clip, content, decoded)

    @contextmanager
    def _thread_pool(self, details: Details) -> Iterator[tuple[ThreadPoolExecutor, int]]:
        """Threads that rate batches, and their number; see `Backbone.parallel_batches`.

        A model whose adapter is disabled for the answers rates one batch at a time, because that affects all threads.
        """
        cores = torch.get_num_threads()
        parallel = 1 if details.answers_from == "base" else self.backbone.parallel_batches
        share = max(1, cores // parallel)
        pool = ThreadPoolExecutor(parallel, initializer=torch.set_num_threads, initargs=(share,))
        try:
            yield pool, parallel
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(cores)

    def _rate_or_fail(self, batch: Sequence[DecodedClip | Failure], details: Details) -> list[Rating | Failure]:
        decoded = [clip for clip in batch if isinstance(clip, DecodedClip)]
        results: Sequence[Rating | Failure]
        try:
            results = self._rate_batch(decoded, details)
        except ClipError as error:
            if len(decoded) > 1:  # only one of them may be at fault
                return [result for clip in batch for result in self._rate_or_fail([clip], details)]
            names = (self.source.name, self.rater_id)
            results = [Failure(clip.clip.name, clip.content_id, error, *names) for clip in decoded]
        ordered = iter(results)
        return [next(ordered) if isinstance(clip, DecodedClip) else clip for clip in batch]

    def _rate_batch(self, clips: Sequence[DecodedClip], details: Details) -> list[Rating]:
        """Rate decoded clips with one prefill per clip (more with a timeline)."""
        if not clips:
            return []
        start = time.perf_counter()
        inputs = [clip_input(clip.frames) for clip in clips]
        readings: Sequence[LevelReading]
        profiles: Sequence[Profile | None] = [None] * len(clips)
        explanations: Sequence[Explanation | None] = [None] * len(clips)
        if details.profile:
            readings, profiles, explanations = zip(*self._diagnose(clips, inputs, details), strict=True)
        else:
            readings = self._read_levels(inputs)
        timelines = [
            self._timeline(clip.windows, one) if clip.windows else None for clip, one in zip(clips, inputs, strict=True)
        ]
        seconds = (time.perf_counter() - start) / len(clips)
        return [
            replace(
                self._rating(clip, reading, seconds),
                profile=profile,
                profile_id=self._profile_ids[details.answers_from] if profile else None,
                explanation=explanation.text if explanation else None,
                explained_by=explanation.source if explanation else None,
                timeline=timeline,
                measured=str(one.slots[MEASURED]) if MEASURED in self.settings.prompt.slots else None,
            )
            for clip, one, reading, profile, explanation, timeline in zip(
                clips, inputs, readings, profiles, explanations, timelines, strict=True
            )
        ]

    def _read_levels(self, inputs: Sequence[ClipInput]) -> list[LevelReading]:
        """The quality level of each clip, and nothing else."""
        logits = self.backbone.level_logits(inputs, self.settings.prompt)
        return [self._read(each, one) for each, one in zip(logits, inputs, strict=True)]

    def _read(self, logits: LevelLogits, one: ClipInput) -> LevelReading:
        settings = self.settings
        quality = one.measurement.quality if one.measurement and settings.prompt.uses_measurement else None
        scale = settings.declared_scale()
        return read_levels(logits.logits, logits.log_normalizer, scale, quality, settings.evidence_weight)

    def _diagnose(
        self, clips: Sequence[DecodedClip], inputs: Sequence[ClipInput], details: Details
    ) -> list[tuple[LevelReading, Profile, Explanation | None]]:
        """Level, defect profile and explanation of each clip."""

        def diagnose(group: slice) -> list[tuple[LevelReading, Profile, Explanation | None]]:
            return self._diagnose_together(clips[group], inputs[group], details)

        return self.backbone.in_cacheable_groups(diagnose, inputs, self.settings.prompt)

    def _diagnose_together(
        self, clips: Sequence[DecodedClip], inputs: Sequence[ClipInput], details: Details
    ) -> list[tuple[LevelReading, Profile, Explanation | None]]:
        """As `_diagnose`, on one prefill.

        With answers from the base model there are two: the level is always read with the adapter.
        """
        prompt = self.settings.prompt
        base = details.answers_from == "base" and self.source.adapter is not None
        readings = self._read_levels(inputs) if base else None
        explanations: Sequence[Explanation | None] = [None] * len(clips)
        with self.backbone.without_adapter() if base else nullcontext():
            prefill = self.backbone.share_prefill(inputs, prompt)
            calibration = UNCALIBRATED if base else self.defect_calibration
            profiles, logits = ask_profiles(prefill, prompt, calibration, [clip.frames for clip in clips])
            readings = readings or [self._read(each, one) for each, one in zip(logits, inputs, strict=True)]
            if details.explanation:
                levels = [prompt.levels[reading.level] for reading in readings]
                contents = [clip.content_id for clip in clips]
                check = self.settings.explanation_check
                frames = [clip.frames for clip in clips]
                explanations = write_explanations(prefill, prompt, levels, profiles, contents, frames, check)
        return list(zip(readings, profiles, explanations, strict=True))

    def _timeline(self, windows: Windows, whole: ClipInput) -> Timeline:
        """Rate each window as a clip of its own, and calibrate its score as that of a clip.

        Args:
            whole: the whole clip, for what was measured: a window is not measured by itself.
        """
        measured = {slot: whole.slots[slot] for slot in (MEASURED, LIP_SYNC)}
        readings: list[LevelReading] = []
        for start in range(0, len(windows), WINDOWS_PER_PREFILL):
            stop = min(start + WINDOWS_PER_PREFILL, len(windows))
            inputs = [self._window_input(windows, number) for number in range(start, stop)]
            inputs = [replace(one, slots={**one.slots, **measured}, measurement=whole.measurement) for one in inputs]
            readings += self._read_levels(inputs)
        scores = [reading.score for reading in readings]
        if self.calibration:
            scores = [self.calibration.apply(reading.score, reading.std).mos for reading in readings]
        return read_timeline(windows.spans, scores, self.settings.scale)

    def _window_input(self, windows: Windows, number: int) -> ClipInput:
        """The model's input for a window, with the sound of the window only."""
        one = clip_input(windows[number])
        if not self.settings.prompt.sound:
            return one
        start, end = windows.spans[number]
        samples = slice(round(start * SAMPLE_RATE), round(end * SAMPLE_RATE))
        return replace(one, duration=end - start, sound=None if one.sound is None else one.sound[samples])

    def _rating(self, decoded: DecodedClip, reading: LevelReading, seconds: float) -> Rating:
        """The rating of a clip without details; calibrated if the rater is."""
        clip, prompt = decoded.clip, self.settings.prompt
        rating = Rating(
            clip=clip.name,
            content_id=decoded.content_id,
            score=reading.score,
            raw_score=None,
            interval=None,
            calibration=None,
            scale=self.settings.scale,
            level=prompt.levels[reading.level],
            probabilities=dict(zip(prompt.levels, reading.probabilities, strict=True)),
            std=reading.std,
            level_mass=reading.mass,
            frames=without_arrays(decoded.frames),
            model=self.source.name,
            adapter=str(self.source.adapter) if self.source.adapter else None,
            prompt=f"{prompt.question} {prompt.stem.lstrip()}",
            rater_id=self.rater_id,
            seconds=seconds,
        )
        if self.calibration is None:
            return rating
        mos, low, high = self.calibration.apply(reading.score, reading.std)
        fitted = self.calibration.was_fitted_on(clip.name, decoded.content_id)
        use = CalibrationUse(id=self.calibration.identity, fitted=fitted, raw_rater_id=self.raw_rater_id)
        return replace(rating, score=mos, raw_score=reading.score, interval=(low, high), calibration=use)


def measurement(settings: RaterConfig, details: Details) -> type[FeatureExtractor] | None:
    """What measures every frame of a clip: for the profile, and for prompts that contain what was measured."""
    return FeatureExtractor if details.profile or settings.prompt.uses_measurement else None


def decoding(settings: RaterConfig, factor: int, details: Details) -> dict[str, Any]:
    """Arguments of `DecoderPool.imap`, or of `imap_windows` for a timeline, with which a rater reads clips."""
    window = {"window": WINDOW, "step": STEP} if details.timeline else {}
    how = {"sampling": settings.sampling, "views": settings.views, "factor": factor}
    return {**how, "measure": measurement(settings, details), **window}


def clip_input(frames: Frames) -> ClipInput:
    """The model's input for a decoded clip."""
    info = frames.info
    measurement = predict(frames.features) if frames.features else None
    slots: dict[str, float | str] = {
        "seconds": info.duration,
        "fps": info.fps,
        "frames": float(len(frames.indices)),
        "width": float(info.width),
        "height": float(info.height),
        MEASURED: evidence_text(measurement.numbers if measurement else None),
        LIP_SYNC: lip_sync_text(*((sync.offset, sync.strength) if (sync := frames.lip_sync) else (None, None))),
    }
    heard = frames.sound.samples if frames.sound and frames.sound.state is SoundState.PRESENT else None
    return ClipInput(frames.views, frames.seconds, info.duration, slots, measurement, heard)


def without_arrays(frames: Frames) -> Frames:
    """What a rating tells about the frames, without pictures, sound and measurements."""
    sound = replace(frames.sound, samples=NO_SOUND.samples) if frames.sound else None
    return replace(frames, views=(), dynamics=None, features=None, sound=sound)


def frames_id(frames: Frames) -> str:
    """`frames:` and the first 32 hex digits of the SHA-256 of what the model sees of a clip that is not a file."""
    digest = hashlib.sha256(repr((frames.seconds, frames.info.duration)).encode())
    for view in frames.views:
        digest.update(repr(view.shape).encode())
        digest.update(view.tobytes())
    return f"frames:{digest.hexdigest()[:32]}"


def _decoded_clip(clip: Clip, content: str, decoded: Frames | Windows) -> DecodedClip:
    if isinstance(decoded, Windows):
        return DecodedClip(clip, content, decoded.whole, decoded)
    return DecodedClip(clip, content, decoded, None)


def _batches(clips: Iterable[DecodedClip | Failure], size: int) -> Iterator[list[DecodedClip | Failure]]:
    """Batches of `size` decoded clips, with the failures between them.

    A failure at the start of a batch is a batch of its own, so that it is reported without waiting for clips.
    """
    batch: list[DecodedClip | Failure] = []
    decoded = 0
    for clip in clips:
        batch.append(clip)
        decoded += isinstance(clip, DecodedClip)
        if decoded in (0, size):
            yield batch
            batch, decoded = [], 0
    if batch:
        yield batch
