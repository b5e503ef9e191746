"""python -m pytest tests/training/test_export.py"""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmm_qa.errors import ModelError, UsageError
from lmm_qa.model.rater_config import RaterConfig
from lmm_qa.model.source import EMBEDDED
from lmm_qa.rater import Rater
from lmm_qa.training.export import merge, push


def test_a_merged_model_gives_the_same_ratings(tuned: Path, labelled: Path, tmp_path: Path) -> None:
    merge(tuned, tmp_path / "merged")
    one, two = (Rater.from_pretrained(model).rate(labelled / "p1_1.mp4") for model in (tuned, tmp_path / "merged"))
    assert two.adapter is None and one.raw_score is not None
    assert (two.raw_score, two.score) == pytest.approx((one.raw_score, one.score), abs=1e-3)
    assert two.interval == pytest.approx(one.interval, abs=1e-3)
    assert two.probabilities == pytest.approx(one.probabilities, abs=1e-4)
    with pytest.raises(ModelError, match="has no adapter to merge"):
        merge(tmp_path / "merged", tmp_path / "again")
    with pytest.raises(UsageError, match="is not empty"):
        merge(tuned, tmp_path / "merged")


def test_a_merged_rater_keeps_what_its_answers_about_defects_mean(tmp_path: Path) -> None:
    """And a model card without front matter gets one."""
    shutil.copytree(EMBEDDED.parent, tmp_path / "embedded")
    adapter = tmp_path / "embedded" / EMBEDDED.name
    (adapter / "README.md").write_text("# Mine\n")
    merge(adapter, tmp_path / "merged")
    assert (tmp_path / "merged" / "defects.json").read_bytes() == (EMBEDDED / "defects.json").read_bytes()
    card = (tmp_path / "merged" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and card.endswith("---\n\n# Mine\n")


def test_a_rater_that_was_tuned_on_quantized_weights_loses_its_calibration(tuned: Path, tmp_path: Path) -> None:
    """Its adapter has learned to correct the quantization, which the merged weights do not have."""
    shutil.copytree(tuned, tmp_path / "rater")
    settings = RaterConfig.read(tuned / "rater.json").model_copy(update={"quantization": "4bit"})
    (tmp_path / "rater" / "rater.json").write_text(settings.model_dump_json())
    note = merge(tmp_path / "rater", tmp_path / "merged")
    assert str(note).startswith(
        "calibration.json left out, because the merged weights differ a little from the 4bit ones"
    )
    assert RaterConfig.read(tmp_path / "merged" / "rater.json").quantization is None
    assert not (tmp_path / "merged" / "calibration.json").exists()


def test_push_uploads_only_raters_that_others_can_load(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="nobody else could load the adapter; merge it first"):
        push(tuned, "me/rater")
    calls: dict[str, Any] = {}
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda _, name, **rest: calls.update(repo=name, **rest))

    def upload(_: object, **options: Any) -> str:
        from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]  # not in __all__

        files = [str(path.relative_to(tuned)) for path in tuned.rglob("*") if path.is_file()]
        patterns = {"allow_patterns": options["allow_patterns"], "ignore_patterns": options["ignore_patterns"]}
        calls["files"] = sorted(filter_repo_objects(files, **patterns))
        return "https://hub/commit"

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: SimpleNamespace(sha="0" * 40))
    settings = RaterConfig.read(tuned / "rater.json")
    public = settings.model_copy(
        update=dict.fromkeys(("backbone_relative", "backbone_weights")) | {"backbone": "Qwen/Qwen2-VL-2B-Instruct"}
    )
    original = (tuned / "rater.json").read_text()
    try:
        (tuned / "rater.json").write_text(public.model_dump_json())
        (tuned / "checkpoints" / "checkpoint-1").mkdir(parents=True)
        (tuned / "checkpoints" / "checkpoint-1" / "optimizer.safetensors").touch()
        assert push(tuned, "me/rater", private=True) == "https://hub/commit"
    finally:
        (tuned / "rater.json").write_text(original)
        (tuned / "checkpoints" / "checkpoint-1" / "optimizer.safetensors").unlink()
        (tuned / "checkpoints" / "checkpoint-1").rmdir()
    assert calls["repo"] == "me/rater" and calls["private"] is True
    assert calls["files"] == sorted(
        [*("README.md", "adapter_config.json", "adapter_model.safetensors", "calibration.json"),
         *("metrics.jsonl", "rater.json")]
    )  # fmt: skip
