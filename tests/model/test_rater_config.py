"""python -m pytest tests/model/test_rater_config.py"""

from __future__ import annotations

from pathlib import Path

import pytest

from lmm_qa.config import Sampling, View
from lmm_qa.errors import ConfigError
from lmm_qa.model.prompt import load_prompt
from lmm_qa.model.rater_config import FILE_NAME, RaterConfig


def test_the_defaults() -> None:
    default = RaterConfig()
    assert default.prompt == load_prompt("talking_head")
    assert default.scale == (1, 5)
    assert default.sampling == Sampling(strategy="uniform", frames=8)
    assert default.views == (View(kind="whole", max_pixels=448 * 448),)


def test_a_written_configuration_is_read_back(tmp_path: Path) -> None:
    settings = RaterConfig(
        backbone="../base",
        prompt=load_prompt("qalign"),
        scale=(0, 5),
        sampling=Sampling.from_text("pairs:12"),
        views=(View(), View.from_text("crop:224")),
        training={"clips": 3},
    )
    (tmp_path / FILE_NAME).write_text(settings.model_dump_json(indent=2))
    assert RaterConfig.read(tmp_path / FILE_NAME) == settings


def test_override_changes_the_given_settings() -> None:
    base = RaterConfig(scale=(0, 5), training={"clips": 3})
    changed = base.override(sampling=Sampling(frames=4), scale=None, prompt=None)
    assert (changed.sampling.frames, changed.scale, changed.training) == (4, (0, 5), {"clips": 3})
    with pytest.raises(ConfigError, match=r"these rater settings cannot be used:\n  scale: .* received \[5.0, 0.0\]"):
        base.override(scale=(5.0, 0.0))
