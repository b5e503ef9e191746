"""rater.json: the settings that, together with weights, determine a score.

A rater directory is a PEFT adapter directory with this file, and with calibration.json if the rater is calibrated.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field

from lmm_qa.config import Sampling, ScaleEnds, Settings, View
from lmm_qa.model.levels import Scale
from lmm_qa.model.prompt import DEFAULT_PROMPT, LIP_SYNC, Prompt, load_prompt
from lmm_qa.video.measurement.classifier import measurement_id
from lmm_qa.video.measurement.lip_sync import lip_sync_id

FILE_NAME = "rater.json"
CALIBRATION_NAME = "calibration.json"
DEFECTS_NAME = "defects.json"

EMBEDDED_NAME = "embedded"
"""Name of the rater that ships with the package; as a backbone, the name of its base model."""

ExplanationCheck = Literal["facts", "grammar"]

WITHOUT_EFFECT = {
    *("training", "backbone", "backbone_relative", "revision", "backbone_weights", "quantization"),
    "explanation_check",
}
"""Settings that do not change a score, or that are not what a score depends on: it depends on the content of the
weights, and on the quantization that they are loaded in."""


class RaterConfig(Settings):
    """The content of rater.json."""

    backbone: str | None = Field(None, max_length=4096)
    """Directory or hub id of the base model; a relative path that exists is relative to this file; `embedded` for the
    base of the rater that ships with the package. None: the model in the same directory."""
    backbone_relative: str | None = Field(None, max_length=4096)
    """Path of a local backbone from the directory of this file, tried before `backbone`."""
    revision: str | None = Field(None, max_length=200)
    """Branch, tag or commit of the backbone on the hub."""
    backbone_weights: str | None = Field(None, max_length=200)
    """Fingerprint of a local backbone that the adapter was trained on; loading fails if its weights have changed."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Format of the backbone's weights in training and calibration: the adapter has learned to correct its errors, so
    the rater loads them in the same one unless another is requested."""
    prompt: Prompt = Field(default_factory=lambda: load_prompt(DEFAULT_PROMPT))
    scale: ScaleEnds = (1.0, 5.0)
    """MOS of the worst and of the best level."""
    sampling: Sampling = Sampling()
    views: tuple[View, ...] = Field((View(),), min_length=1, max_length=16)
    evidence_weight: float = Field(0.0, ge=0, le=100)
    """How much the measured quality counts beside the model's level distribution, for prompts that say what was
    measured: see `lmm_qa.model.levels.read_levels`. For a model that is too small to weigh the numbers in its prompt;
    fitted to clips that it was not trained on."""
    explanation_check: ExplanationCheck = "facts"
    """What an explanation in the model's words must satisfy to be shown: see `lmm_qa.defects.explanation.objection`.
    Does not change a score."""
    training: dict[str, Any] | None = None
    """For people: data and its fingerprint, metrics, versions. Does not change a score."""

    def declared_scale(self) -> Scale:
        """The scale as an object with anchors."""
        return Scale(*self.scale)

    def scoring_settings(self) -> dict[str, Any]:
        """The settings that determine a score, as plain data."""
        settings = self.model_dump(mode="json", exclude=WITHOUT_EFFECT)
        for key in ("description", "paraphrases"):
            del settings["prompt"][key]
        # Ids of raters that were made before these settings existed stay the same.
        if settings["prompt"]["frames"] == "video":
            del settings["prompt"]["frames"]
        if not settings["prompt"]["sound"]:
            del settings["prompt"]["sound"]
        if not settings["prompt"]["view_labels"]:
            del settings["prompt"]["view_labels"]
        if self.prompt.uses_measurement:
            settings["measurement"] = measurement_id()
        if LIP_SYNC in self.prompt.slots:
            settings["lip_sync"] = lip_sync_id()
        if not self.evidence_weight or not self.prompt.uses_measurement:
            del settings["evidence_weight"]
        return settings

    def override(self, **changes: Any) -> Self:
        """A copy with the changes that are not None.

        Raises:
            ConfigError: a changed value is invalid.
        """
        unchanged = {key: getattr(self, key) for key in type(self).model_fields}
        changed = {key: value for key, value in changes.items() if value is not None}
        return type(self).parse({**unchanged, **changed}, "these rater settings")
