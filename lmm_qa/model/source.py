"""What `--model` stands for: where the weights, the settings and the calibration of a rater come from.

None, "embedded"                     the rater that ships with the package
a directory                          rater.json with or without an adapter; a PEFT adapter; a transformers model
an id on the Hugging Face hub        of any of these
a name in `configs/raters/`          a published rater: its weights on the hub, and how they are to be asked
the address of a server              one of its models: see `lmm_qa.model.served`
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lmm_qa.errors import ModelError, UsageError
from lmm_qa.model.hub import HubModel, find_model
from lmm_qa.model.presets import find_preset
from lmm_qa.model.rater_config import CALIBRATION_NAME, DEFECTS_NAME, EMBEDDED_NAME, FILE_NAME, RaterConfig
from lmm_qa.model.weights import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_files, is_identity

if TYPE_CHECKING:
    from lmm_qa.model.served import ServedModel

EMBEDDED = Path(__file__).parent / "embedded" / "adapter"
"""The rater that ships with the package."""

EMBEDDED_NOTE = (
    "the embedded rater scores damage to the signal (blur, compression, noise, stalls), not what people think of a "
    "generated head: lmm-qa raters lists models tuned on human scores"
)

CHUNK_BYTES = 1 << 16

CONFIG_FILES = (
    *("config.json", "adapter_config.json", "chat_template.jinja", "chat_template.json"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
)
"""Files that change a model's output as its weights do."""

DEFAULTS = "default prompt, scale [1, 5], 8 uniform frames, whole picture in at most 448 x 448 pixels"


@dataclass(frozen=True)
class ModelSource:
    """Where the weights of a rater come from, and its settings."""

    name: str
    """As the user gave it; `embedded` for the one that ships with the package."""
    backbone: str
    """Directory or hub id of the base model."""
    revision: str | None
    """Commit of a backbone on the hub; None for a directory."""
    adapter: Path | None
    """PEFT adapter directory."""
    settings: RaterConfig
    note: str | None
    """Message for the user: what was assumed, or what the rater is not made for."""
    calibration: Path | None = None
    """calibration.json, if the rater has one."""
    defects: Path | None = None
    """defects.json, if the rater has one: see `lmm_qa.defects.calibration.DefectCalibration`."""
    served: ServedModel | None = None
    """The model on a server that answers; `backbone` is then only where its processor is."""

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Identity of the weights: a hash of their content if they are local, else hub id and commit.

        Of a served model it is what the server says of it, and a hash of its weights if they are also here.
        """
        local = Path(self.backbone)
        if self.served:
            here = weights_fingerprint(local) if any(local.glob("*.safetensors")) else ""
            return {"backbone": self.served.identity + here, "adapter": ""}
        base = weights_fingerprint(local) if local.is_dir() else f"{self.backbone}@{self.revision}"
        return {"backbone": base, "adapter": weights_fingerprint(self.adapter) if self.adapter else ""}


def resolve_model(model: str | Path | None = None, revision: str | None = None, weights: bool = True) -> ModelSource:
    """Find the files and settings of a rater. Fetches small files from the hub, but no weights other than adapters.

    Args:
        model: see the module's docstring.
        revision: branch, tag or commit of a hub id.
        weights: whether a directory must contain weights.

    Raises:
        UsageError: `model` is a path without a directory, or a directory with a revision.
        ModelError: the directory does not contain a model; the hub does not have it, or cannot be reached.
        ConfigError: rater.json is invalid.
    """
    embedded = model in (None, EMBEDDED_NAME)
    path = EMBEDDED if embedded else Path(str(model)).expanduser()
    if path.is_dir() or embedded:
        if revision:
            raise UsageError(f"only a model on the hub has revisions; {path} is a directory (received {revision!r})")
        if embedded:
            return replace(_from_directory(path, EMBEDDED_NAME), note=EMBEDDED_NOTE)
        return _from_directory(path, str(model), weights)
    if found := find_preset(str(model)):
        name, preset = found
        hub = find_model(preset.model, revision or preset.revision)
        return ModelSource(name, preset.model, hub.commit, None, preset.settings(), None)
    if path.exists() or _looks_like_a_path(str(model)):
        raise UsageError(
            f"there is no model directory at {str(model)!r}: give a directory that contains rater.json, "
            "adapter_config.json or config.json, an id on the hub such as Qwen/Qwen2-VL-7B-Instruct, or a name that "
            "lmm-qa raters lists"
        )
    try:
        hub = find_model(str(model), revision)
    except ModelError as error:
        if "/" in str(model):
            raise
        raise ModelError(f"{error}. Names of published raters: lmm-qa raters") from None
    return _from_hub(hub)


def _from_hub(model: HubModel) -> ModelSource:
    if model.file(ADAPTER_CONFIG):
        return _from_directory(model.snapshot(), model.name)
    file = model.file(FILE_NAME)
    if file is None:
        note = f"{model.name} has no {FILE_NAME}: {DEFAULTS}"
        return ModelSource(model.name, model.name, model.commit, None, RaterConfig(), note)
    settings = RaterConfig.read(file)
    if settings.backbone:
        raise _no_adapter(model.name, settings.backbone)
    return ModelSource(
        model.name,
        model.name,
        model.commit,
        None,
        settings,
        None,
        model.file(CALIBRATION_NAME),
        model.file(DEFECTS_NAME),
    )


def _from_directory(folder: Path, name: str, weights: bool = True) -> ModelSource:
    check_files(folder)
    adapter = folder if (folder / ADAPTER_CONFIG).is_file() else None
    is_rater = (folder / FILE_NAME).is_file()
    if is_rater:
        settings = RaterConfig.read(folder / FILE_NAME)
        note = None
    elif adapter or (folder / "config.json").is_file():
        settings = RaterConfig()
        note = f"{folder} has no {FILE_NAME}: {DEFAULTS}"
    else:
        found = ", ".join(sorted(file.name for file in folder.glob("*"))[:8]) or "nothing"
        raise ModelError(
            f"{folder} is not a model directory: it contains no {FILE_NAME}, adapter_config.json or config.json "
            f"(found: {found})"
        )
    backbone, revision = settings.backbone, settings.revision
    is_complete = not weights or any(folder.glob("*.safetensors"))
    if is_rater and adapter is None and (backbone or not is_complete):
        raise _no_adapter(str(folder), backbone)
    if backbone is None and adapter:
        backbone, revision = read_adapter_base(adapter)
    places = _backbone_places(folder, backbone, settings.backbone_relative)
    local = next((place for place in places if place.is_dir()), None)
    backbone = os.path.abspath(local) if local else _backbone_on_hub(folder, str(backbone), places)
    if local:
        revision = None
        check_files(Path(backbone))
        if settings.backbone_weights and settings.backbone_weights != weights_fingerprint(Path(backbone)):
            raise ModelError(
                f"{folder} was trained on other weights than those in {backbone}: restore them, or train again"
            )
    else:
        try:
            revision = find_model(backbone, revision).commit
        except ModelError as error:
            raise ModelError(f"the backbone of {folder} is not available: {error}. {_tried(places)}") from None
    files = (folder / CALIBRATION_NAME, folder / DEFECTS_NAME)
    calibration, defects = (file if file.is_file() else None for file in files)
    if adapter and is_identity(adapter):
        effect = f"the adapter {adapter} changes nothing: all of its B matrices are zero"
        note = f"{note}; {effect}" if note else effect
    return ModelSource(name, backbone, revision, adapter, settings, note, calibration, defects)


def _no_adapter(name: str, backbone: str | None) -> ModelError:
    if backbone is None:
        return ModelError(f"{name} contains no weights (*.safetensors) and no adapter ({ADAPTER_CONFIG})")
    return ModelError(
        f"{name} has a {FILE_NAME} for an adapter of the backbone {backbone!r}, but no adapter: add "
        f"{ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}, or name the backbone itself to rate without an adapter"
    )


def backbone_location(backbone: str, folder: Path) -> dict[str, str | None]:
    """Settings of the rater.json in `folder` that name a backbone.

    A directory is named by its absolute path, and by its path from the folder: a rater is found from anywhere, and also
    after it was moved together with its backbone.
    """
    if backbone == EMBEDDED_NAME or not Path(backbone).is_dir():
        return {"backbone": backbone, "backbone_relative": None}
    place = os.path.abspath(backbone)
    try:
        relative = Path(os.path.relpath(place, folder)).as_posix()
    except ValueError:  # another drive of Windows
        relative = None
    return {"backbone": place, "backbone_relative": relative}


def _backbone_places(folder: Path, backbone: str | None, relative: str | None) -> list[Path]:
    """Directories in which the backbone of a rater may be, the most likely one first.

    Raters of earlier versions have a path from the folder or from the working directory of their training.
    """
    if backbone is None:
        return [folder]
    if backbone == EMBEDDED_NAME:
        return [EMBEDDED.parent / "base"]
    named = Path(backbone).expanduser()
    return [*([folder / relative] if relative else []), folder / named, named]


def _backbone_on_hub(folder: Path, backbone: str, places: Sequence[Path]) -> str:
    """The hub id that a rater names as its backbone, if it is no directory."""
    if _looks_like_a_path(backbone):
        raise ModelError(
            f"the backbone of {folder}, {backbone!r}, does not exist. {_tried(places)}: move it there, or correct "
            f"`backbone` in {FILE_NAME} (base_model_name_or_path in {ADAPTER_CONFIG})"
        )
    return backbone


def _tried(places: Sequence[Path]) -> str:
    return f"There is no directory {' or '.join(dict.fromkeys(map(os.path.abspath, places)))}"


def read_adapter_base(adapter: Path) -> tuple[str, str | None]:
    """Base model and revision in the adapter_config.json of a PEFT adapter directory.

    Raises:
        ModelError: it names none.
    """
    file = adapter / ADAPTER_CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config["base_model_name_or_path"], str):
            raise TypeError("base_model_name_or_path is not a string")
        return config["base_model_name_or_path"], config.get("revision")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file} names no base model ({type(error).__name__}: {error})") from None


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def weights_fingerprint(folder: Path) -> str:
    """Hash of the weights in a directory, and of the files in `CONFIG_FILES`.

    Of a weight file larger than 16 MiB, 256 chunks spread evenly over it are hashed. That is fast for 15 GB, and misses
    no training: it changes most tensors, if not always the first (embeddings) and last ones (a frozen vision tower).

    Raises:
        ModelError: the directory contains no safetensors file.
    """
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} contains no weights (*.safetensors)")
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            for start in range(0, size, max(CHUNK_BYTES, size // 256)):
                stream.seek(start)
                digest.update(stream.read(CHUNK_BYTES))
    for file in sorted(folder / name for name in CONFIG_FILES):
        if file.is_file():
            digest.update(f"{file.name} ".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def compute_rater_id(
    source: ModelSource, settings: RaterConfig, dtype: str, quantization: str | None, calibration: str | None = None
) -> str:
    """Short hash of everything that determines a score; finished ratings are recognised by it.

    Args:
        calibration: identity of the calibration, for the id of calibrated scores; None for the id of raw scores.
    """
    parts = {**source.fingerprint, **settings.scoring_settings(), "dtype": dtype, "quantization": quantization}
    if calibration:
        parts["calibration"] = calibration
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
