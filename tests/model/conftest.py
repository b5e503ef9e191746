"""The tests of the model package run a second time on the published tokenizers, where these are there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from backbones import FAMILIES, PUBLISHED, build

from lmm_qa.model.backbone import Backbone


@pytest.fixture(scope="session", params=["own", *(["published"] if PUBLISHED.is_dir() else [])])
def family_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """As `family_dir` of the whole suite; then with the published tokenizer, chat template and processor files."""
    made: dict[str, Path] = {}

    def directory(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp("backbones") / family
            made[family] = build(family, folder, published=request.param == "published")
        return made[family]

    return directory


@pytest.fixture(scope="session")
def load(family_dir: Callable[[str], Path]) -> Callable[[str], Backbone]:
    loaded: dict[str, Backbone] = {}

    def get(family: str) -> Backbone:
        if family not in loaded:
            loaded[family] = Backbone.load(str(family_dir(family)), device="cpu", dtype="float32")
        return loaded[family]

    return get


@pytest.fixture(params=FAMILIES)
def backbone(request: pytest.FixtureRequest, load: Callable[[str], Backbone]) -> Backbone:
    return load(request.param)
