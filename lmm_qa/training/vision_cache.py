"""What a frozen vision tower says of each clip: computed once, kept on disk, read by every training step after that.

A file a clip and choice of frames, named by all that determines its content (the clip's bytes, the frames, the views,
the weights, the number format), so that runs and processes share a folder. Files are written whole or not at all.
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

from lmm_qa.atomic import replacing
from lmm_qa.config import Sampling
from lmm_qa.errors import ClipError, TrainingError
from lmm_qa.model.backbone import Backbone
from lmm_qa.model.inputs import ClipInput, patch_factor, prepare_inputs, vision_features, without_question
from lmm_qa.model.prompt import SLOTS
from lmm_qa.model.rater_config import RaterConfig
from lmm_qa.rater import clip_input
from lmm_qa.video.decoder_pool import DecoderPool

Tensors = dict[str, torch.Tensor]


FEATURES = ("tokens", "deepstack")


FORMAT = 1


"""To be raised when what is kept, or how clips are decoded, changes."""


class Look(NamedTuple):
    """One clip, looked at in one way."""

    path: Path
    content_id: str
    sampling: Sampling


class Kept(NamedTuple):
    """What stands for a clip's pixels."""

    inputs: Tensors
    """The model's inputs, without pixels and without a question: see `lmm_qa.model.inputs.with_question`."""
    features: Tensors
    """See `lmm_qa.model.inputs.vision_features`."""
    slots: dict[str, float]
    """Values for the prompt's slots."""


@dataclass(frozen=True)
class VisionCache:
    """The folder, and what all its files for one backbone and one way of rating have in common."""

    folder: Path
    weights: str
    """Fingerprint of the backbone and its number format."""
    settings: RaterConfig
    """Views, and the prompt's system message."""

    def path(self, look: Look) -> Path:
        """Where a look is kept."""
        parts = {
            "content": look.content_id,
            "sampling": look.sampling.model_dump(),
            "views": [view.model_dump() for view in self.settings.views],
            "system": self.settings.prompt.system,
            "weights": self.weights,
            "made by": [FORMAT, version("transformers")],
        }
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
        return self.folder / key[:2] / f"{key}.safetensors"

    def load(self, look: Look) -> Kept:
        """What is kept of a look.

        Raises:
            TrainingError: they are not there any more.
        """
        path = self.path(look)
        try:
            kept = load_file(path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                path.unlink()  # torn by a machine that was lost
            raise TrainingError(
                f"the vision features of {look.path} cannot be read from {path} ({error}): start again, and what is "
                "missing is made anew"
            ) from None
        slots = dict(zip(SLOTS, kept.pop("slots").tolist(), strict=True))
        features = {name: kept.pop(name) for name in FEATURES if name in kept}
        return Kept(kept, features, slots)

    def missing(self, looks: Sequence[Look]) -> list[Look]:
        """Those that are not kept yet, each once, in order."""
        return list({self.path(look): look for look in looks if not self.path(look).exists()}.values())

    def fill(
        self,
        looks: Sequence[Look],
        backbone: Backbone,
        workers: int,
        progress: Callable[[int, int], object],
    ) -> None:
        """Run the vision tower over looks that are missing.

        Args:
            backbone: loaded, on its device.
            workers: decoding processes.
            progress: called after each look with the number done, and that of all.

        Raises:
            TrainingError: a clip cannot be read, or the folder cannot be written to.
        """
        by_sampling: dict[Sampling, list[Look]] = {}
        for look in looks:
            by_sampling.setdefault(look.sampling, []).append(look)
        factor, done = patch_factor(backbone.processor) or 1, 0
        with DecoderPool(workers) as pool:
            for sampling, group in by_sampling.items():
                read = pool.imap((look.path for look in group), sampling, self.settings.views, factor)
                for look, frames in zip(group, read, strict=True):
                    if isinstance(frames, ClipError):
                        raise TrainingError(f"{look.path} cannot be read any more: {frames}") from frames
                    self._keep(look, backbone, clip_input(frames))
                    done += 1
                    progress(done, len(looks))

    @torch.inference_mode()
    def _keep(self, look: Look, backbone: Backbone, clip: ClipInput) -> None:
        prompt, processor = self.settings.prompt, backbone.processor
        inputs = without_question(
            processor, prepare_inputs(processor, [clip], prompt), prompt, len(clip.views), clip.slots
        )
        seen = vision_features(backbone.model, {name: value.to(backbone.device) for name, value in inputs.items()})
        del inputs["pixel_values_videos"]
        inputs["slots"] = torch.tensor([clip.slots[name] for name in SLOTS], dtype=torch.float64)
        kept = {name: value.cpu().contiguous() for name, value in {**inputs, **seen}.items()}
        path = self.path(look)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as beside:
                save_file(kept, beside)
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"cannot keep vision features in {self.folder}: {error}") from None
