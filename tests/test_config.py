"""python -m pytest tests/test_config.py"""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from lmm_qa.config import Sampling, View
from lmm_qa.errors import ConfigError
from lmm_qa.model.prompt import Prompt
from lmm_qa.model.rater_config import RaterConfig


def test_sampling_from_text() -> None:
    assert Sampling.from_text("uniform:8") == Sampling()
    assert Sampling.from_text("pairs:12") == Sampling(strategy="pairs", frames=12)
    assert Sampling.from_text("fps:2") == Sampling(strategy="fps", fps=2, frames=32)
    assert Sampling.from_text("fps:0.5:64") == Sampling(strategy="fps", fps=0.5, frames=64)


def test_fps_has_one_default_however_it_is_made(tmp_path: Path) -> None:
    (tmp_path / "sampling.yaml").write_text("strategy: fps\nfps: 2\n")
    limit = {
        Sampling.from_text("fps:2"),
        Sampling(strategy="fps", fps=2),
        Sampling(strategy="fps"),
        Sampling.parse({"strategy": "fps"}, "here"),
        Sampling.read(tmp_path / "sampling.yaml"),
    }
    assert [sampling.frames for sampling in limit] == [32]
    saved = Sampling(strategy="fps", frames=8)
    assert Sampling.model_validate_json(saved.model_dump_json()) == saved, "files name the limit and keep it"
    assert Sampling().frames == 8


def test_view_from_text() -> None:
    assert View.from_text("whole:448") == View()
    assert View.from_text("crop:336") == View(kind="crop", size=336)
    assert View.from_text("face:224") == View(kind="face", size=224)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("uniform", "'uniform' is not of the form uniform:8, pairs:12 or fps:2"),
        ("uniform:8:9", "'uniform:8:9' is not of the form"),
        ("", "'' is not of the form"),
        ("random:8", "strategy: Input should be 'uniform', 'fps' or 'pairs' (received 'random')"),
        ("uniform:0", "frames: Input should be greater than or equal to 1 (received '0')"),
        ("uniform:many", "(received 'many')"),
        ("uniform:769", "frames: Input should be less than or equal to 768 (received '769')"),
        ("fps:0", "fps: Input should be greater than 0 (received '0')"),
        ("fps:inf", "fps: Input should be a finite number (received 'inf')"),
        ("fps:nan", "fps: Input should be a finite number (received 'nan')"),
        ("pairs:7", "strategy 'pairs' takes an even number of frames, received 7"),
    ],
)
def test_invalid_sampling_is_refused_and_quoted(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Sampling.from_text(text)
    assert complaint in str(caught.value)
    assert f"sampling {text!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("whole", "is not of the form whole:448, crop:336 or face:224"),
        ("part:448", "is not of the form"),
        ("whole:-448", "is not of the form"),
        ("whole:10", "max_pixels: Input should be greater than or equal to 784 (received 100)"),
        ("crop:10", "size: Input should be greater than or equal to 28 (received 10)"),
    ],
)
def test_invalid_views_are_refused_and_quoted(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        View.from_text(text)
    assert complaint in str(caught.value)
    assert f"view {text!r}" in str(caught.value)


def test_the_center_of_a_crop_is_inside_the_picture() -> None:
    with pytest.raises(ConfigError, match=r"center is a pair of fractions between 0 and 1, received \(0\.5, 1\.5\)"):
        View.parse({"kind": "crop", "center": [0.5, 1.5]}, "here")


def test_an_unknown_key_in_a_section_lists_the_keys_of_that_section() -> None:
    with pytest.raises(ConfigError) as caught:
        RaterConfig.parse(
            {"views": [{"size": 300, "sise": 1}], "sampling": {"frame": 3}, "long": "x" * 500}, "rater.json"
        )
    text = str(caught.value)
    assert "views.0.sise: Extra inputs are not permitted (received 1); known keys there: kind, max_pixels" in text
    assert "sampling.frame: Extra inputs are not permitted (received 3); known keys there: strategy, frames" in text
    assert "x" * 70 in text and "x" * 90 not in text
    with pytest.raises(ConfigError, match=r"question: Field required\n"):
        Prompt.parse({"stem": "It is"}, "prompt.yaml")


def test_unknown_keys_are_named_and_known_ones_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        Sampling.parse({"frame": 8, "strategi": "fps"}, "run.yaml")
    lines = str(caught.value).splitlines()
    assert lines[0] == "run.yaml cannot be used:"
    assert "  frame: Extra inputs are not permitted (received 8)" in lines
    assert "  strategi: Extra inputs are not permitted (received 'fps')" in lines
    assert lines[-1] == "  known keys: strategy, frames, fps, gap, phase"


def test_a_value_that_is_not_a_dict_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\(top level\): .* \(received 'uniform:8'\)"):
        Sampling.parse("uniform:8", "here")


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Sampling().frames = 9  # type: ignore[misc]


def test_files_are_yaml_or_json(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("strategy: pairs\nframes: 4\n")
    (tmp_path / "a.json").write_text('{"strategy": "pairs", "frames": 4}')
    assert Sampling.read(tmp_path / "a.yaml") == Sampling.read(tmp_path / "a.json")
    assert Sampling.read(tmp_path / "a.json") == Sampling(strategy="pairs", frames=4)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.yaml", b"frames: [8", "is not valid YAML"),
        ("a.json", b"{", "is not valid JSON"),
        ("a.yaml", b"\xff\xfe\x00", "is not valid YAML"),
        ("a.yaml", b"frames: eight", "frames: Input should be a valid integer"),
    ],
)
def test_errors_name_the_invalid_file(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        Sampling.read(tmp_path / name)
    assert complaint in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_errors_name_the_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*gone\.yaml: No such file"):
        Sampling.read(tmp_path / "gone.yaml")
