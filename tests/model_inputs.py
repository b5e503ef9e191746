"""Prompts and random clips for the tests of the model package."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from backbones import FAMILIES, conversation_inputs
from transformers.video_utils import VideoMetadata

from lmm_qa.model.backbone import Backbone
from lmm_qa.model.inputs import ClipInput, patch_factor
from lmm_qa.model.prompt import Prompt, load_prompt

QWEN = tuple(family for family in FAMILIES if family.startswith("qwen"))
"""Families with a patch grid."""

HYBRID = ("qwen3_5",)
"""Families with layers whose state is recurrent: questions cannot share a prefill."""

NO_THOUGHTS = "<think>\n\n</think>\n\n"
"""How the answer of a model of `HYBRID` begins if it does not think."""


PROMPT = load_prompt("talking_head")


IMAGES = PROMPT.model_copy(update={"frames": "images", "view_labels": ("The whole picture:", "A part of it:")})


SLOTS = Prompt(question="{frames:.0f} frames of {seconds:.2f} s:", stem="The quality is", system="You are strict.")


FPS = 25
"""Frame rate of the clips here."""


def random_clip(
    backbone: Backbone, *sizes: tuple[int, int], frames: int = 4, step: int = 7, seed: int = 0
) -> ClipInput:
    """Coloured noise; `sizes` are height and width of each view in tokens; every `step`-th frame is looked at."""
    factor = patch_factor(backbone.processor) or 28
    rng = np.random.default_rng(seed)
    views = tuple(
        rng.integers(0, 256, (frames, height * factor, width * factor, 3), dtype=np.uint8) // (1 + seed)
        for height, width in sizes
    )
    seconds = tuple(step * number / FPS for number in range(frames))
    duration = step * frames / FPS
    return ClipInput(views, seconds, duration, {"seconds": duration, "frames": float(frames)})


def chat_template_inputs(processor: Any, clip: ClipInput, prompt: Prompt) -> Any:
    """The model's inputs as transformers makes them; the frames' times as the clip's own frame numbers."""
    metadata = VideoMetadata(
        total_num_frames=round(clip.duration * FPS),
        fps=FPS,
        duration=clip.duration,
        frames_indices=[round(second * FPS) for second in clip.seconds],
    )
    return conversation_inputs(processor, prompt, clip.slots, clip.views, metadata)


def assert_equal_logits(one: Any, other: Any, tolerance: float = 1e-4) -> None:
    assert one.logits == pytest.approx(other.logits, abs=tolerance)
    assert one.log_normalizer == pytest.approx(other.log_normalizer, abs=tolerance)


CLOSED = Prompt(question="Is the picture blurred?", stem="The answer is", levels=("no", "yes"))


QUESTIONS = (
    PROMPT,
    CLOSED,
    Prompt(
        question="In {seconds:.2f} s, does it stand still?",
        stem="It stands still:",
        levels=("never", "often", "always"),
    ),
    load_prompt("qalign"),
)
