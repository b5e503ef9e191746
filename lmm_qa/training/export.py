"""Give a tuned rater away: as a plain transformers model, or on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from lmm_qa.errors import ModelError, UsageError
from lmm_qa.model.backbone import Backbone
from lmm_qa.model.rater_config import EMBEDDED_NAME, FILE_NAME, resolve_model
from lmm_qa.rater import plan_rater
from lmm_qa.training.model_card import retitled

FILES = ("README.md", "metrics.jsonl", "*.safetensors", "*.json", "*.jinja", "*.txt")


"""What of a run directory is given away: no checkpoints."""


def merge(rater: Path, folder: Path) -> None:
    """Write a rater as a plain transformers model: its adapter calculated into the weights, in float32.

    The folder is a rater directory too: same question, same frames, same calibration, same scores but for rounding.

    Raises:
        UsageError: `folder` is there and not empty, or `rater` is no directory.
        ModelError: the rater cannot be loaded, or has no adapter.
    """
    source = resolve_model(rater)
    if source.adapter is None:
        raise ModelError(f"{rater} has no adapter to merge: it is a whole model already")
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty: name a new folder")
    backbone = Backbone.load(source.backbone, revision=source.revision, adapter=source.adapter, device="cpu",
                             dtype="float32")  # fmt: skip
    merged = backbone.model.merge_and_unload()
    merged.save_pretrained(folder)
    backbone.processor.save_pretrained(folder)
    settings = source.settings.model_copy(update={"backbone": None, "revision": None, "backbone_weights": None})
    (folder / FILE_NAME).write_text(settings.model_dump_json(indent=2) + "\n", encoding="utf-8")
    if (rater / "README.md").is_file():
        text = (rater / "README.md").read_text(encoding="utf-8")
        (folder / "README.md").write_text(retitled(text), encoding="utf-8")
    if calibration := plan_rater(rater, device="cpu").calibration:
        same = {"rater_id": plan_rater(folder, device="cpu").raw_rater_id}  # other weights, the same scores
        calibration.model_copy(update=same).write(folder)


def push(rater: Path, repository: str, *, private: bool = False) -> str:
    """Upload a rater directory to the hub, without its checkpoints.

    Args:
        repository: `user/name`; made where it is missing.
        private: only you can see it.

    Returns:
        The address of the commit.

    Raises:
        UsageError: `rater` is no directory, or others could not load it, since its backbone lies on this machine.
        ModelError: the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    source = resolve_model(rater)
    if not rater.is_dir():
        raise UsageError(f"{rater} is no directory")
    if source.adapter and source.settings.backbone != EMBEDDED_NAME and Path(source.backbone).is_dir():
        raise UsageError(
            f"the backbone of {rater} is a directory of this machine, {source.backbone}: nobody else could load the "
            "adapter; merge it first (lmm-qa merge) and push the merged model"
        )
    try:
        hub = HfApi()
        hub.create_repo(repository, private=private, exist_ok=True)
        done = hub.upload_folder(repo_id=repository, folder_path=rater, allow_patterns=list(FILES),
                                 ignore_patterns=["checkpoints/*", "run.json"])  # fmt: skip
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise ModelError(
            f"cannot upload {rater} to {repository!r}: {error}; are you logged in (hf auth login)?"
        ) from None
    return str(done)
