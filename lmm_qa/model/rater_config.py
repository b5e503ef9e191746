"""rater.json: what, together with weights, determines a score. It makes an adapter directory a complete rater.

A rater directory is a PEFT adapter directory plus this file, and calibration.json where it is calibrated. Knows nothing
of how models are loaded, nor of what a calibration says.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field

from lmm_qa.config import Sampling, ScaleEnds, Settings, View
from lmm_qa.errors import ModelError, UsageError
from lmm_qa.model.levels import Scale
from lmm_qa.model.prompt import DEFAULT_PROMPT, Prompt, load_prompt

FILE_NAME = "rater.json"


CALIBRATION_NAME = "calibration.json"


DEFECTS_NAME = "defects.json"


EMBEDDED = Path(__file__).parent / "embedded" / "adapter"


"""The rater that ships with the package."""


EMBEDDED_NAME = "embedded"


"""What it, and as a backbone its base, are called."""


PIECE = 1 << 16


READING_FILES = (
    *("config.json", "adapter_config.json", "chat_template.jinja", "chat_template.json"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
)


"""Files beside the weights that change what a model says of the same clip."""


ExplanationCheck = Literal["facts", "grammar"]


class RaterConfig(Settings):
    """How a rater asks and what it looks at."""

    backbone: str | None = None
    """Directory or hub id of the base model; a relative path that exists is relative to this file; `embedded` for the
    base of the rater that ships with the package. Without one, the model that the file lies with."""
    revision: str | None = None
    """Branch, tag or commit of the backbone on the hub."""
    backbone_weights: str | None = None
    """Fingerprint of the backbone that the adapter was made for, where that lies in a directory; must still be it."""
    prompt: Prompt = Field(default_factory=lambda: load_prompt(DEFAULT_PROMPT))
    scale: ScaleEnds = (1.0, 5.0)
    """MOS of the worst and of the best level: declared, never inferred."""
    sampling: Sampling = Sampling()
    views: tuple[View, ...] = Field((View(),), min_length=1)
    explanation_check: ExplanationCheck = "facts"
    """What an explanation in the model's words must satisfy to be shown: see `lmm_qa.defects.explanation.objection`.
    Does not change a score."""
    training: dict[str, Any] | None = None
    """For people: data and its fingerprint, figures, versions. Does not change a score."""

    def declared_scale(self) -> Scale:
        """The scale as an object with anchors."""
        return Scale(*self.scale)

    def asked(self) -> dict[str, Any]:
        """What of this determines a score, as plain data."""
        no_effect = {"training", "backbone", "revision", "backbone_weights", "explanation_check"}
        asked = self.model_dump(mode="json", exclude=no_effect)
        for silent in ("description", "paraphrases"):
            del asked["prompt"][silent]
        return asked

    def override(self, **changes: Any) -> Self:
        """A copy with the changes that are not None.

        Raises:
            ConfigError: one of them may not be so.
        """
        kept = {key: getattr(self, key) for key in type(self).model_fields}
        changed = {key: value for key, value in changes.items() if value is not None}
        return type(self).parse({**kept, **changed}, "what was asked for")


@dataclass(frozen=True)
class ModelSource:
    """Where the weights of a rater come from, and how it asks."""

    name: str
    """What the user called it; `embedded` for the one that ships with the package."""
    backbone: str
    """Directory or hub id."""
    revision: str | None
    adapter: Path | None
    settings: RaterConfig
    note: str | None
    """What was assumed because nothing said so; to be told to the user."""
    calibration: Path | None = None
    """calibration.json, where the rater has one."""
    defects: Path | None = None
    """defects.json, where the rater has one: see `lmm_qa.defects.calibration.DefectCalibration`."""

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Identity of the weights: of local ones by content, of those on the hub by id and revision."""
        local = Path(self.backbone)
        base = weights_fingerprint(local) if local.is_dir() else f"{self.backbone}@{self.revision or 'main'}"
        return {"backbone": base, "adapter": weights_fingerprint(self.adapter) if self.adapter else ""}


def resolve_model(model: str | Path | None = None, revision: str | None = None) -> ModelSource:
    """Find out what `--model` stands for.

    Args:
        model: None or `embedded` for the embedded rater; a rater directory (rater.json, with or without an adapter); a
            PEFT adapter directory; a transformers model directory; or an id on the hub of any of these.
        revision: of an id on the hub.

    Raises:
        UsageError: it is a path and no directory lies there, or a directory of which a revision is asked.
        ModelError: the directory holds no model.
        ConfigError: its rater.json cannot be used.
    """
    embedded = model in (None, EMBEDDED_NAME)
    path = EMBEDDED if embedded else Path(str(model)).expanduser()
    if path.is_dir() or embedded:
        if revision:
            raise UsageError(f"a revision is one of a model on the hub; {path} is a directory (received {revision!r})")
        return _from_directory(path, EMBEDDED_NAME if embedded else str(model))
    if path.exists() or _looks_like_a_path(str(model)):
        raise UsageError(
            f"there is no model directory at {str(model)!r}: give a directory that holds rater.json, "
            "adapter_config.json or config.json, or an id on the hub such as Qwen/Qwen2-VL-7B-Instruct"
        )
    if _from_hub(str(model), "adapter_config.json", revision):
        return _from_directory(_snapshot(str(model), revision), str(model))
    if file := _from_hub(str(model), FILE_NAME, revision):
        settings = RaterConfig.read(file)
        backbone, version = (settings.backbone, settings.revision) if settings.backbone else (str(model), revision)
        calibration, defects = (_from_hub(str(model), name, revision) for name in (CALIBRATION_NAME, DEFECTS_NAME))
        return ModelSource(str(model), backbone, version, None, settings, None, calibration, defects)
    note = "no rater.json: default prompt, scale [1, 5], 8 uniform frames, whole view of at most 448 x 448 pixels"
    return ModelSource(str(model), str(model), revision, None, RaterConfig(), note)


def weights_fingerprint(folder: Path) -> str:
    """Hash of a directory's weight files, and of the small files by which a model reads text and pixels.

    Of a weight file larger than 16 MiB, 256 pieces spread evenly over it: fast on 15 GB, and training changes most
    tensors, but neither the first (embeddings) nor the last ones (a frozen vision tower), which lie at the ends.

    Raises:
        ModelError: it holds no safetensors file.
    """
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} holds no weights (*.safetensors)")
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            for start in range(0, size, max(PIECE, size // 256)):
                stream.seek(start)
                digest.update(stream.read(PIECE))
    for file in sorted(folder / name for name in READING_FILES):
        if file.is_file():
            digest.update(f"{file.name} ".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def identity(
    source: ModelSource, settings: RaterConfig, dtype: str, quantization: str | None, calibration: str | None = None
) -> str:
    """Short hash of all that determines a score; part of the key by which finished ratings are recognised.

    With the identity of a calibration, that of the calibrated scores; without one, that of the raw scores.
    """
    parts = {**source.fingerprint, **settings.asked(), "dtype": dtype, "quantization": quantization}
    if calibration:
        parts["calibration"] = calibration
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _from_directory(folder: Path, name: str) -> ModelSource:
    adapter = folder if (folder / "adapter_config.json").is_file() else None
    if (folder / FILE_NAME).is_file():
        settings = RaterConfig.read(folder / FILE_NAME)
        note = None
    elif adapter or (folder / "config.json").is_file():
        settings = RaterConfig()
        note = (
            f"{folder} has no {FILE_NAME}: default prompt, scale [1, 5], 8 uniform frames, whole view up to 448 x 448"
        )
    else:
        found = ", ".join(sorted(file.name for file in folder.glob("*"))[:8]) or "nothing"
        raise ModelError(
            f"{folder} is no model: it holds no {FILE_NAME}, adapter_config.json or config.json (found: {found})"
        )
    backbone, revision = settings.backbone, settings.revision
    if backbone is None and adapter:
        backbone, revision = read_adapter_base(adapter)
    if backbone == EMBEDDED_NAME:
        backbone = str(EMBEDDED.parent / "base")
    elif backbone is not None and (folder / backbone).is_dir():
        backbone = str((folder / backbone).resolve())
    elif backbone is not None and _looks_like_a_path(backbone) and not Path(backbone).is_dir():
        raise ModelError(f"the backbone of {folder}, {backbone!r}, is not there: correct it in {FILE_NAME}")
    if settings.backbone_weights and settings.backbone_weights != weights_fingerprint(Path(str(backbone))):
        raise ModelError(
            f"{folder} was tuned on other weights than those that now lie in {backbone}: put the former ones back, or "
            "tune again"
        )
    files = (folder / CALIBRATION_NAME, folder / DEFECTS_NAME)
    calibration, defects = (file if file.is_file() else None for file in files)
    return ModelSource(name, backbone or str(folder), revision, adapter, settings, note, calibration, defects)


def read_adapter_base(adapter: Path) -> tuple[str, str | None]:
    """Base model and revision that a PEFT adapter directory names.

    Raises:
        ModelError: its adapter_config.json cannot be used.
    """
    file = adapter / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config["base_model_name_or_path"], str):
            raise TypeError("base_model_name_or_path is not a string")
        return config["base_model_name_or_path"], config.get("revision")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file} names no base model ({type(error).__name__}: {error})") from None


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _from_hub(model: str, name: str, revision: str | None) -> Path | None:
    """A file of a hub repository; None where it has none, or the hub cannot be asked."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, name, revision=revision))
    except (EntryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        return None  # a wrong id or a missing network shows when the model is loaded


def _snapshot(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, revision=revision))
