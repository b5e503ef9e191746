"""python -m pytest tests/model/test_presets.py"""

from __future__ import annotations

from pathlib import Path

import pytest
from paths import ROOT

from lmm_qa.config import Sampling, View
from lmm_qa.errors import ConfigError, UsageError
from lmm_qa.model import source
from lmm_qa.model.hub import HubModel
from lmm_qa.model.presets import find_preset, get_preset, presets
from lmm_qa.model.prompt import load_prompt
from lmm_qa.model.rater_config import RaterConfig
from lmm_qa.model.source import resolve_model


def test_every_file_is_a_preset_with_a_source_for_each_figure() -> None:
    assert set(presets()) == {file.stem for file in (ROOT / "configs" / "raters").glob("*.yaml")}
    for preset in presets().values():
        assert preset.model.count("/") == 1
        assert all(figure.source.startswith("https://") for figure in preset.published)
        assert (preset.tuned_on is None) == (not preset.published)
    first, *_, last = presets().values()
    assert first.tuned_on
    assert last.tuned_on is None


def test_qrealign_is_asked_as_its_authors_do() -> None:
    settings = get_preset("qrealign-mini").settings()
    assert settings.prompt == load_prompt("qrealign")
    assert settings.prompt.frames == "images"
    assert settings.prompt.stem == " The quality of the video is"
    assert settings.prompt.levels == ("bad", "poor", "fair", "good", "excellent")
    assert settings.sampling == Sampling(strategy="linspace", frames=8)
    assert settings.views == (View(kind="fit", size=448),)


def test_a_rater_is_found_by_its_name_and_by_its_id_on_the_hub() -> None:
    preset = presets()["qrealign-lite"]
    assert find_preset("qrealign-lite") == find_preset("Q-Future/Q-ReAlign-Lite-4B") == ("qrealign-lite", preset)
    assert find_preset("somebody/Q-ReAlign-Lite-4B") is None
    with pytest.raises(ConfigError, match="no published rater is called 'qrealign'; known: qrealign-mini, "):
        get_preset("qrealign")


def test_its_settings_go_with_a_local_copy_of_the_weights(tmp_path: Path) -> None:
    settings = get_preset("qrealign-pro").settings()
    (tmp_path / "rater.json").write_text(settings.model_dump_json(exclude_defaults=True))
    assert RaterConfig.read(tmp_path / "rater.json") == settings


@pytest.mark.parametrize("name", ["qrealign-mini", "q-future/Q-ReAlign-Mini-0.8B"])
def test_a_name_stands_for_weights_at_the_known_revision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def found(model: str, revision: str | None) -> HubModel:
        asked.append((model, revision))
        return HubModel(model, revision or "0" * 40, None)

    monkeypatch.setattr(source, "find_model", found)
    preset = presets()["qrealign-mini"]
    resolved = resolve_model(name)
    assert (resolved.name, resolved.backbone, resolved.revision) == ("qrealign-mini", preset.model, preset.revision)
    assert resolved.settings == preset.settings()
    assert resolve_model(name, "main").revision == "main"
    assert asked == [(preset.model, preset.revision), (preset.model, "main")]


def test_a_path_that_does_not_exist_is_answered_with_all_that_could_be_meant() -> None:
    with pytest.raises(UsageError, match="or a name that lmm-qa raters lists"):
        resolve_model("./qrealign-mini")
