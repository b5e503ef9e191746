"""The tests of the model package run a second time on the published tokenizers, where these are there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from backbones import FAMILIES, PUBLISHED, builder, loader

from lmm_qa.model.backbone import Backbone


@pytest.fixture(scope="session", params=["own", *(["published"] if PUBLISHED.is_dir() else [])])
def family_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """As `family_dir` of the whole suite; then with the published tokenizer, chat template and processor files."""
    return builder(tmp_path_factory.mktemp("backbones"), published=request.param == "published")


@pytest.fixture(scope="session")
def load(family_dir: Callable[[str], Path]) -> Callable[[str], Backbone]:
    return loader(family_dir)


@pytest.fixture(params=FAMILIES)
def backbone(request: pytest.FixtureRequest, load: Callable[[str], Backbone]) -> Backbone:
    return load(request.param)
