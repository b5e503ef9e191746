"""python -m pytest tests/model/test_source.py"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lmm_qa.config import Sampling, View
from lmm_qa.errors import ConfigError, ModelError, UsageError
from lmm_qa.model.prompt import load_prompt
from lmm_qa.model.rater_config import CALIBRATION_NAME, FILE_NAME, RaterConfig
from lmm_qa.model.source import backbone_location, compute_rater_id, resolve_model, weights_fingerprint


def write_model(folder: Path, seed: int = 0) -> Path:
    """A directory with the files that mark a model."""
    folder.mkdir(parents=True)
    weights = np.random.default_rng(seed).standard_normal((100, 100)).astype(np.float32)
    save_file({"weight": weights}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "qwen2_vl"}')
    return folder


def write_adapter(folder: Path, base: str | None, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    weights = np.random.default_rng(seed).standard_normal((4, 100)).astype(np.float32)
    save_file({"lora_A": weights}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "revision": None}))
    return folder


def write_rater(folder: Path, **settings: Any) -> None:
    (folder / FILE_NAME).write_text(json.dumps(settings))


# --- weights ----------------------------------------------------------------------------------------------------------


def test_a_model_directory(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    source = resolve_model(model)
    assert (source.name, source.backbone, source.adapter) == (str(model), str(model), None)
    assert source.settings == RaterConfig()
    assert source.note is not None
    assert "has no rater.json: default prompt, scale [1, 5], 8 uniform frames" in source.note


def test_a_rater_without_an_adapter(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    write_rater(model, scale=[0, 5])
    source = resolve_model(str(model))
    assert (source.backbone, source.adapter, source.note) == (str(model), None, None)
    assert source.settings.scale == (0, 5)


def test_an_adapter_names_its_base(tmp_path: Path, hub: Path) -> None:
    base = write_model(tmp_path / "base")
    source = resolve_model(write_adapter(tmp_path / "adapter", str(base)))
    assert (source.backbone, source.adapter) == (str(base), tmp_path / "adapter")
    assert source.note is not None
    assert "has no rater.json" in source.note
    write_model(cached(hub, "Qwen/Qwen2-VL-2B-Instruct"))
    remote = resolve_model(write_adapter(tmp_path / "other", "Qwen/Qwen2-VL-2B-Instruct"))
    assert (remote.backbone, remote.revision) == ("Qwen/Qwen2-VL-2B-Instruct", COMMIT)


def test_a_rater_directory_can_be_moved_with_its_base(tmp_path: Path) -> None:
    write_model(tmp_path / "here" / "base")
    adapter = write_adapter(tmp_path / "here" / "adapter", "/gone/base")
    write_rater(adapter, backbone="../base", views=[{"kind": "crop"}])
    first = resolve_model(adapter)
    assert first.backbone == str(tmp_path / "here" / "base")
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = resolve_model(tmp_path / "there" / "adapter")
    assert moved.backbone == str(tmp_path / "there" / "base")
    assert moved.settings.views == (View(kind="crop"),)


def test_a_rater_and_its_backbone_are_found_from_anywhere_and_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model and the run were named by relative paths."""
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_model(Path("models/base"))
    backbone = resolve_model("models/base").backbone
    assert backbone == str(tmp_path / "here" / "models" / "base")
    adapter = write_adapter(Path("runs/one"), backbone)
    stored = backbone_location("models/base", Path("runs/one"))
    assert stored == {"backbone": backbone, "backbone_relative": "../../models/base"}
    write_rater(adapter, **stored)
    monkeypatch.chdir(tmp_path / "elsewhere")
    first = resolve_model("../here/runs/one")
    assert first.backbone == backbone
    fingerprint = first.fingerprint
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = resolve_model("../there/runs/one")
    assert moved.backbone == str(tmp_path / "there" / "models" / "base")
    assert moved.fingerprint == fingerprint
    shutil.move(tmp_path / "there" / "runs", tmp_path / "alone")
    with pytest.raises(ModelError) as caught:
        resolve_model(tmp_path / "alone" / "one")
    for place in (tmp_path / "models" / "base", tmp_path / "here" / "models" / "base"):
        assert str(place) in str(caught.value)
    assert backbone_location("some/base", tmp_path) == {"backbone": "some/base", "backbone_relative": None}
    assert backbone_location("embedded", tmp_path) == {"backbone": "embedded", "backbone_relative": None}


def test_a_backbone_named_from_another_working_directory(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions stored the path as it was typed, which looks like a hub id."""
    monkeypatch.chdir(tmp_path)
    write_model(Path("models/base"))
    adapter = write_adapter(tmp_path / "adapter", "models/base")
    write_rater(adapter, backbone="models/base")
    assert resolve_model(adapter).backbone == str(tmp_path / "models" / "base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    places = " or ".join(str(place / "models" / "base") for place in (adapter, tmp_path / "elsewhere"))
    with pytest.raises(ModelError, match=f"the backbone of .*adapter is not .* There is no directory {places}"):
        resolve_model(adapter)


@pytest.mark.parametrize("name", ["./gone", "/gone/model", "~/gone", "a/b/c"])
def test_a_missing_path_is_an_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"there is no model directory at '{name}': give a directory that contains"):
        resolve_model(name)


@pytest.mark.parametrize("embedded", [True, False])
def test_a_directory_has_no_revisions(embedded: bool, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"only a model on the hub has revisions; .* \(received 'v2'\)"):
        resolve_model(None if embedded else write_model(tmp_path / "model"), "v2")


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="there is no model directory at"):
        resolve_model(tmp_path / "model.safetensors")


def test_the_error_for_a_directory_without_a_model_lists_its_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"contains no rater\.json, .* \(found: nothing\)"):
        resolve_model(tmp_path)
    (tmp_path / "clip.mp4").touch()
    with pytest.raises(ModelError, match=r"\(found: clip\.mp4\)"):
        resolve_model(tmp_path)


def test_a_missing_base_model_is_an_error(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", "/gone/base")
    with pytest.raises(ModelError, match=r"the backbone of .*adapter, '/gone/base', does not exist"):
        resolve_model(adapter)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"base_model_name_or_path": null}'])
def test_an_adapter_without_a_base_model_is_an_error(tmp_path: Path, content: str) -> None:
    adapter = write_adapter(tmp_path / "adapter", None)
    (adapter / "adapter_config.json").write_text(content)
    with pytest.raises(ModelError, match=r"adapter_config\.json names no base model"):
        resolve_model(adapter)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The local cache of the Hugging Face hub, with no network behind it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(hub: Path, name: str, commit: str = COMMIT) -> Path:
    """Directory of a commit of a hub model in the cache; the main branch points to it."""
    folder = hub / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    return folder / "snapshots" / commit


def test_a_model_on_the_hub(hub: Path) -> None:
    write_model(cached(hub, "some/model"))
    source = resolve_model("some/model")
    assert (source.name, source.backbone, source.revision, source.adapter) == ("some/model", "some/model", COMMIT, None)
    assert source.note is not None
    assert source.note.startswith("some/model has no rater.json: default prompt")
    for name, revision in (("some/model", "v2"), ("some/not-downloaded", None), ("model", None)):
        with pytest.raises(ModelError, match=f"cannot reach .* for '{name}'.* the local cache does not"):
            resolve_model(name, revision)
    with pytest.raises(ModelError, match=r"Names of published raters: lmm-qa raters$"):
        resolve_model("qrealign-min")


def test_two_revisions_on_the_hub_are_two_raters(hub: Path) -> None:
    write_model(cached(hub, "some/model"))
    first = resolve_model("some/model")
    assert resolve_model("some/model", COMMIT) == first
    write_model(cached(hub, "some/model", commit=COMMIT[::-1]))
    second = resolve_model("some/model")
    ids = [compute_rater_id(source, source.settings, "float32", None) for source in (first, second)]
    assert (first.revision, second.revision) == (COMMIT, COMMIT[::-1])
    assert ids[0] != ids[1]


def test_an_adapter_on_the_hub(hub: Path) -> None:
    write_model(cached(hub, "some/base"))
    folder = write_adapter(cached(hub, "some/adapter"), "some/base")
    write_rater(folder, scale=[0, 5])
    source = resolve_model("some/adapter")
    assert (source.name, source.backbone, source.adapter) == ("some/adapter", "some/base", folder)
    assert source.settings.scale == (0, 5)


def test_a_rater_on_the_hub_without_an_adapter(hub: Path) -> None:
    write_rater(write_model(cached(hub, "some/rater")), scale=[0, 5])
    source = resolve_model("some/rater")
    assert (source.backbone, source.adapter, source.note) == ("some/rater", None, None)
    assert source.settings.scale == (0, 5)


def test_a_calibration_is_found_in_the_directory_of_its_rater(tmp_path: Path, hub: Path) -> None:
    base = write_model(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", str(base))
    on_the_hub = write_model(cached(hub, "some/rater"))
    write_rater(on_the_hub)
    sources = {base: base, adapter: adapter, "some/rater": on_the_hub}
    for model, folder in sources.items():
        before = resolve_model(model)
        assert before.calibration is None
        (folder / CALIBRATION_NAME).write_text("{}")
        after = resolve_model(model)
        assert after.calibration == folder / CALIBRATION_NAME
        assert after.fingerprint == before.fingerprint


# --- rater.json -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"scale": [5, 1]}, "scale: Value error, low must be below high, received [5.0, 1.0]"),
        ({"scale": [1, float("inf")]}, "scale.1: Input should be a finite number (received inf)"),
        ({"views": []}, "views: Tuple should have at least 1 item"),
        ({"promt": "qalign"}, "promt: Extra inputs are not permitted (received 'qalign')"),
        ({"sampling": {"frames": 0}}, "sampling.frames: Input should be greater than or equal to 1 (received 0)"),
    ],
)
def test_invalid_rater_files_are_errors(tmp_path: Path, settings: dict[str, Any], complaint: str) -> None:
    model = write_model(tmp_path / "model")
    write_rater(model, **settings)
    with pytest.raises(ConfigError) as caught:
        resolve_model(model)
    assert complaint in str(caught.value)
    assert str(model / FILE_NAME) in str(caught.value)


# --- identity --------------------------------------------------------------------------------------------------------


def test_different_weights_have_different_fingerprints(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    before = weights_fingerprint(model)
    shutil.copytree(model, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("A copy.")
    (tmp_path / "copy" / FILE_NAME).write_text("{}")
    assert weights_fingerprint(tmp_path / "copy") == before
    assert weights_fingerprint(write_model(tmp_path / "other", seed=1)) != before
    (tmp_path / "copy" / "config.json").write_text('{"model_type": "qwen2_vl", "rope_theta": 5}')
    assert weights_fingerprint(tmp_path / "copy") != before


def test_a_change_in_the_middle_of_a_large_file_changes_the_fingerprint(tmp_path: Path) -> None:
    """Frozen embeddings at the beginning, a frozen vision tower at the end: only what lies between has changed."""
    size = 200 << 20
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(size)  # sparse
    before = weights_fingerprint(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\1" * (2 << 20))
    assert weights_fingerprint(tmp_path) != before


def test_a_directory_without_weights_has_no_fingerprint(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"contains no weights \(\*\.safetensors\)"):
        weights_fingerprint(tmp_path)


def test_everything_that_changes_a_score_changes_the_rater_id(tmp_path: Path, hub: Path) -> None:
    write_model(cached(hub, "some/model"))
    model = write_model(tmp_path / "model")
    plain = resolve_model(model)
    tuned = resolve_model(write_adapter(tmp_path / "tuned", str(model)))
    again = resolve_model(write_adapter(tmp_path / "again", str(model), seed=1))
    remote = resolve_model(write_adapter(tmp_path / "remote", "some/model"))
    settings = RaterConfig()
    changes: list[dict[str, Any]] = [
        {"prompt": load_prompt("qalign")},
        {"scale": (0.0, 5.0)},
        {"sampling": Sampling(frames=9)},
        {"views": (View(max_pixels=784),)},
        {"views": (View(), View(kind="crop"))},
    ]
    found = [
        compute_rater_id(plain, settings, "float32", None),
        compute_rater_id(plain, settings, "bfloat16", None),
        compute_rater_id(plain, settings, "float32", "4bit"),
        compute_rater_id(plain, settings, "float32", "8bit"),
        compute_rater_id(tuned, settings, "float32", None),
        compute_rater_id(again, settings, "float32", None),
        compute_rater_id(remote, settings, "float32", None),
        compute_rater_id(replace(remote, revision="v2"), settings, "float32", None),
        compute_rater_id(plain, settings, "float32", None, "one calibration"),
        compute_rater_id(plain, settings, "float32", None, "another calibration"),
        *(compute_rater_id(plain, settings.override(**change), "float32", None) for change in changes),
    ]
    assert len(set(found)) == len(found) == 15


def test_changes_without_effect_on_scores_keep_the_rater_id(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    expected = compute_rater_id(resolve_model(model), RaterConfig(), "float32", None)
    shutil.move(model, tmp_path / "moved")
    moved = resolve_model(tmp_path / "moved")
    prompt = load_prompt("talking_head")
    unused = {"description": "Other words.", "paraphrases": ("How good is it?",)}
    described = RaterConfig(training={"clips": 3}, prompt=prompt.model_copy(update=unused))
    assert compute_rater_id(moved, described, "float32", None) == expected
