"""Disk cache of the frozen vision tower's output: computed once per clip, read by every training step after that.

There is one file per clip and frame selection. Its name is a hash of everything that determines the content (the clip's
bytes, the frames, the views, the weights, the number format), so runs and processes can share a folder. Files are
written atomically.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lmm_qa.config import Sampling
from lmm_qa.errors import ClipError, TrainingError
from lmm_qa.files.atomic import replacing
from lmm_qa.model.backbone import Backbone
from lmm_qa.model.inputs import ClipInput, patch_factor, prepare_inputs, remove_question, vision_features
from lmm_qa.model.prompt import SLOTS
from lmm_qa.model.rater_config import RaterConfig
from lmm_qa.rater import clip_input
from lmm_qa.video.decoder_pool import DecoderPool
from lmm_qa.video.measurement.classifier import evidence_names, measurement_id
from lmm_qa.video.measurement.evidence import UNKNOWN, lip_sync_text
from lmm_qa.video.measurement.features import FeatureExtractor
from lmm_qa.video.measurement.lip_sync import LipSync, lip_sync_id

Tensors = dict[str, torch.Tensor]

FEATURES = ("tokens", "deepstack")

FORMAT = 1
"""Increase it when the content of the files, or the decoding of clips, changes."""


class SampledClip(NamedTuple):
    """A clip with a frame selection."""

    path: Path
    content_id: str
    sampling: Sampling


class CachedClip(NamedTuple):
    """The stored data of a sampled clip."""

    inputs: Tensors
    """Model inputs without pixels and without a question: see `lmm_qa.model.inputs.append_question`."""
    features: Tensors
    """See `lmm_qa.model.inputs.vision_features`."""
    slots: dict[str, float]
    """Values of the prompt's slots that are numbers."""
    measured: dict[str, float] | None
    """What was measured: see `lmm_qa.video.measurement.evidence.evidence_text`; None if the clip was not measured."""
    lip_sync: str
    """The content of the slot `{lip_sync}`."""


@dataclass(frozen=True)
class VisionCache:
    """Cached vision features of one backbone under one rater configuration."""

    folder: Path
    weights: str
    """Fingerprint of the backbone and its number format."""
    settings: RaterConfig
    """For the views, and what the prompt puts before the question."""
    measure: bool = False
    """Measure every frame of the clips, for prompts with the slot `{measured}`."""

    def path(self, clip: SampledClip) -> Path:
        """The file of a sampled clip, whether it exists or not."""
        before_question = self.settings.prompt.before_question
        if not before_question["sound"]:
            del before_question["sound"]  # files that were made before this setting existed keep their names
        parts = {
            "content": clip.content_id,
            "sampling": clip.sampling.model_dump(),
            "views": [view.model_dump() for view in self.settings.views],
            **before_question,
            "weights": self.weights,
            "made by": [FORMAT, version("transformers")],
        }
        if self.measure:
            parts["measured by"] = [measurement_id(), lip_sync_id()]
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
        return self.folder / key[:2] / f"{key}.safetensors"

    def load(self, clip: SampledClip) -> CachedClip:
        """Read the file of a sampled clip.

        Raises:
            TrainingError: it is missing or damaged; a damaged file is removed.
        """
        path = self.path(clip)
        try:
            stored = load_file(path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                path.unlink()  # cut off by a machine crash
            raise TrainingError(
                f"the vision features of {clip.path} cannot be read from {path} ({error}): run the command again to "
                "compute what is missing"
            ) from None
        slots = dict(zip(SLOTS, stored.pop("slots").tolist(), strict=True))
        numbers = stored.pop("measured", None)
        measured = None if numbers is None else dict(zip(evidence_names(), numbers.tolist(), strict=True))
        lip_sync = lip_sync_text(*stored.pop("lip_sync").tolist()) if "lip_sync" in stored else UNKNOWN
        features = {name: stored.pop(name) for name in FEATURES if name in stored}
        return CachedClip(stored, features, slots, measured, lip_sync)

    def missing(self, clips: Sequence[SampledClip]) -> list[SampledClip]:
        """Those that are not in the cache, each once, in order."""
        return list({self.path(clip): clip for clip in clips if not self.path(clip).exists()}.values())

    def fill(
        self,
        clips: Sequence[SampledClip],
        backbone: Backbone,
        workers: int,
        progress: Callable[[int, int], object],
    ) -> None:
        """Run the vision tower on clips and store its output.

        Args:
            backbone: loaded, on its device.
            workers: decoding processes.
            progress: called after each clip with the number done and the total.

        Raises:
            TrainingError: a clip cannot be decoded, or the folder is not writable.
        """
        by_sampling: dict[Sampling, list[SampledClip]] = {}
        for clip in clips:
            by_sampling.setdefault(clip.sampling, []).append(clip)
        factor, done = patch_factor(backbone.processor) or 1, 0
        with DecoderPool(workers) as pool:
            for sampling, group in by_sampling.items():
                measure = FeatureExtractor if self.measure else None
                decoded = pool.imap((clip.path for clip in group), sampling, self.settings.views, factor, measure)
                for clip, frames in zip(group, decoded, strict=True):
                    if isinstance(frames, ClipError):
                        raise TrainingError(f"{clip.path} could be decoded before, but not now: {frames}") from frames
                    self._store(clip, backbone, clip_input(frames), frames.lip_sync)
                    done += 1
                    progress(done, len(clips))

    @torch.inference_mode()
    def _store(self, clip: SampledClip, backbone: Backbone, pixels: ClipInput, lip_sync: LipSync | None) -> None:
        prompt, processor = self.settings.prompt, backbone.processor
        inputs = remove_question(
            processor, prepare_inputs(processor, [pixels], prompt), prompt, len(pixels.views), pixels.slots
        )
        features = vision_features(backbone.model, {name: value.to(backbone.device) for name, value in inputs.items()})
        for pixel_values in ("pixel_values", "pixel_values_videos"):
            inputs.pop(pixel_values, None)
        inputs["slots"] = torch.tensor([pixels.slots[name] for name in SLOTS], dtype=torch.float64)
        if pixels.measurement:
            inputs["measured"] = torch.tensor([*pixels.measurement.numbers.values()], dtype=torch.float64)
        if lip_sync:
            inputs["lip_sync"] = torch.tensor([lip_sync.offset, lip_sync.strength], dtype=torch.float64)
        tensors = {name: value.cpu().contiguous() for name, value in {**inputs, **features}.items()}
        path = self.path(clip)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                save_file(tensors, temporary)
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"cannot write vision features to {self.folder}: {error}") from None
