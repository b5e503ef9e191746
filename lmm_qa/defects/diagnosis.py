"""Ask the model about defects: closed questions for the profile, then an explanation in words.

Both reuse one prefill of the clips, so that the model processes their pixels once. `profile_id` identifies everything
besides the rater that determines the answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np

from lmm_qa.defects.calibration import DefectCalibration
from lmm_qa.defects.explanation import explain, explanation_prompt, lip_sync_sentence, opening
from lmm_qa.defects.profile import LIP_SYNC, AnswerSource, Profile, read_profile
from lmm_qa.defects.questions import questions
from lmm_qa.defects.vocabulary import BY_NAME
from lmm_qa.model.levels import LevelLogits
from lmm_qa.model.prompt import Prompt
from lmm_qa.model.rater_config import ExplanationCheck
from lmm_qa.model.source import ModelSource
from lmm_qa.video.decode import Frames
from lmm_qa.video.measurement import classifier, lip_sync

if TYPE_CHECKING:
    from lmm_qa.model.prefill import SharedPrefill
    from lmm_qa.model.served import ServedClips

MAX_TOKENS = 96
"""Length limit of an explanation: about three clauses and a positive remark in the embedded model's vocabulary."""

PROFILE_VERSION = 3
"""Raise it when the measured features, or the code that makes profiles and explanations, change their results."""


@dataclass(frozen=True)
class Explanation:
    """The text shown beside a rating."""

    text: str
    source: str
    """`model`, or the reason why the model's text was replaced (see `lmm_qa.defects.explanation`)."""


def ask_profiles(
    prefill: SharedPrefill | ServedClips,
    prompt: Prompt,
    calibration: DefectCalibration,
    frames: Sequence[Frames],
) -> tuple[list[Profile], list[LevelLogits]]:
    """Ask all closed questions and the rating prompt about each clip.

    Args:
        prefill: of the clips, made with `prompt`.
        prompt: the rating prompt; its level logits are read along with the answers.
        calibration: turns answers into probabilities; questions whose answers it does not use are not asked.
        frames: the decoded clips, with their frame dynamics.

    Returns:
        Profile and level logits of each clip.
    """
    prompts = {
        name: question.model_copy(update=prompt.before_question)
        for name, question in questions().items()
        if calibration.asks(name)
    }
    profiles, level_logits = [], []
    logits = prefill.level_logits([*prompts.values(), prompt])
    for clip, seen, answers in zip(frames, prefill.clips, logits, strict=True):
        *closed, levels = answers
        measured = seen.measurement.log_odds if seen.measurement else {}
        odds = {name: _yes_log_odds(answer) for name, answer in zip(prompts, closed, strict=True)}
        profiles.append(read_profile(odds, calibration, clip.dynamics, measured, clip.lip_sync))
        level_logits.append(levels)
    return profiles, level_logits


def _yes_log_odds(answer: LevelLogits) -> tuple[float, float]:
    """Log-odds of yes against no, and the share of the vocabulary's probability on both words."""
    no, yes = (float(logit) for logit in answer.logits)
    return yes - no, float(np.exp(np.logaddexp(no, yes) - answer.log_normalizer))


def write_explanations(
    prefill: SharedPrefill | ServedClips,
    prompt: Prompt,
    levels: Sequence[str],
    profiles: Sequence[Profile],
    content_ids: Sequence[str],
    frames: Sequence[Frames],
    check: ExplanationCheck,
) -> list[Explanation]:
    """Let the model explain each rating; text that contradicts the rating is replaced.

    The model sees pictures. A lip-sync offset that was found is added in a sentence.

    Args:
        prefill, prompt: as for `ask_profiles`.
        levels: the level word of each clip.
        profiles: of each clip.
        content_ids: of each clip; seeds of the replacement text, so that a clip always gets the same one.
        frames: of each clip, with what was measured of its lip sync.
        check: what the model's text must satisfy; see `lmm_qa.defects.explanation.objection`.
    """
    openings = [opening(prompt, level) for level in levels]
    visible = [tuple(one for one in profile.found if BY_NAME[one.defect].visible) for profile in profiles]
    requests = [
        explanation_prompt(prompt, shown).model_copy(update={"stem": stem})
        for shown, stem in zip(visible, openings, strict=True)
    ]
    texts = prefill.generate(requests, MAX_TOKENS)
    explanations = []
    for text, level, profile, shown, seed, stem, clip in zip(
        texts, levels, profiles, visible, content_ids, openings, frames, strict=True
    ):
        words, objection = explain(text, level, prompt.levels, shown, profile.absent, seed, stem, check)
        if clip.lip_sync and any(one.defect == LIP_SYNC for one in profile.found):
            words = f"{words} {lip_sync_sentence(clip.lip_sync.clear_offset)}"
        explanations.append(Explanation(words, objection or "model"))
    return explanations


def profile_id(source: ModelSource, answers_from: AnswerSource) -> str:
    """Short hash of everything that determines a profile and its explanation, apart from the rater's identity.

    Args:
        source: of the rater.
        answers_from: which model answers; without an adapter there is only one.
    """
    base = answers_from == "base" and source.adapter is not None
    calibration = None if base else source.defects  # the base model's answers are not calibrated
    prompts = resources.files("lmm_qa.prompt_files")
    digest = hashlib.sha256(f"{PROFILE_VERSION} {base} {source.settings.explanation_check}".encode())
    for content in (
        calibration.read_bytes() if calibration else b"",
        classifier.FILE.read_bytes(),
        lip_sync.FILE.read_bytes(),
        *((prompts / name).read_bytes() for name in ("defects.yaml", "explanation.yaml")),
    ):
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:16]
