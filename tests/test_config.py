"""python -m pytest tests/test_config.py"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lmm_qa.config import MAX_BYTES, Sampling, Settings, View
from lmm_qa.defects.calibration import DefectCalibration
from lmm_qa.errors import ConfigError
from lmm_qa.model.calibration import Calibration
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
        ("uniform", "'uniform' is not of the form uniform:8, linspace:8, pairs:12 or fps:2"),
        ("uniform:8:9", "'uniform:8:9' is not of the form"),
        ("", "'' is not of the form"),
        ("random:8", "strategy: Input should be 'uniform', 'linspace', 'fps' or 'pairs' (received 'random')"),
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
        ("whole", "is not of the form whole:448, fit:448, crop:336 or face:224"),
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


# --- files from strangers --------------------------------------------------------------------------------------------

INTERVAL = {"coverage": 0.9, "half_width": 1.0, "std_floor": 0.1}
CALIBRATION = {
    "mapping": {"kind": "linear", "slope": 1.0, "intercept": 0.0},
    "interval": INTERVAL,
    "scale": [1, 5],
    "rater_id": "r",
    "n": 10,
    "groups": 2,
    "fingerprint": "f",
    "clips": ["0123456789ab"],
    "check": None,
}
PROMPT = {"question": "Sharp?", "stem": "It is"}
ISOTONIC = {"kind": "isotonic", "scores": [1, 2], "mos": [1, 2]}
LOGISTIC = {"kind": "logistic4", "b1": 5, "b2": 1, "b3": 3, "b4": 1}


@pytest.mark.parametrize(
    ("kind", "values", "key", "limit"),
    [
        (RaterConfig, {"scale": [1, 1e308]}, "scale.1", "less than or equal to 1000000000000"),
        (RaterConfig, {"scale": [-1e13, 5]}, "scale.0", "greater than or equal to -1000000000000"),
        (RaterConfig, {"scale": [1, math.inf]}, "scale.1", "finite number"),
        (RaterConfig, {"scale": [math.nan, 5]}, "scale.0", "finite number"),
        (RaterConfig, {"scale": [1, 10**400]}, "scale.1", "valid number"),
        (RaterConfig, {"scale": [5, 1]}, "scale", "low must be below high"),
        (RaterConfig, {"sampling": {"frames": 10**9}}, "sampling.frames", "less than or equal to 768"),
        (RaterConfig, {"sampling": {"strategy": "fps", "fps": 1e300}}, "sampling.fps", "less than or equal to 1000"),
        (RaterConfig, {"sampling": {"gap": 1e300}}, "sampling.gap", "less than or equal to 3600"),
        (RaterConfig, {"views": [{"max_pixels": 10**12}]}, "views.0.max_pixels", "less than or equal to 100000000"),
        (RaterConfig, {"views": [{"size": 10**6}]}, "views.0.size", "less than or equal to 4096"),
        (RaterConfig, {"views": [{}] * 10**5}, "views", "at most 16 items"),
        (RaterConfig, {"backbone": "x" * 10**6}, "backbone", "at most 4096 characters"),
        (RaterConfig, {"prompt": PROMPT | {"question": "x" * 10**6}}, "prompt.question", "at most 32768 characters"),
        (RaterConfig, {"prompt": PROMPT | {"levels": ["x"] * 10**6}}, "prompt.levels", "at most 100 items"),
        (RaterConfig, {"prompt": PROMPT | {"question": "{fps:999999999}"}}, "prompt", "not one of a number"),
        (RaterConfig, {"prompt": PROMPT | {"question": "{fps:.999999999f}"}}, "prompt", "not one of a number"),
        (Calibration, {"mapping": LOGISTIC | {"b1": 1e308}}, "mapping.logistic4.b1", "less than or equal to"),
        (Calibration, {"mapping": LOGISTIC | {"b4": -1}}, "mapping.logistic4.b4", "greater than 0"),
        (Calibration, {"mapping": ISOTONIC | {"mos": [0, 1e300]}}, "mapping.isotonic.mos.1", "less than or equal to"),
        (Calibration, {"mapping": ISOTONIC | {"scores": ["x"] * 10**6}}, "mapping.isotonic.scores.0", "valid number"),
        (Calibration, {"scale": [5, 1]}, "scale", "low must be below high"),
        (Calibration, {"interval": INTERVAL | {"half_width": 1e300}}, "interval.half_width", "less than or equal to"),
        (Calibration, {"clips": [0] * 10**6}, "clips.0", "valid string"),
        (Calibration, {"n": 10**300}, "n", "less than or equal to"),
        (DefectCalibration, {"defects": {"blur": {"slope": 1e308}}}, "defects.blur.slope", "less than or equal to"),
        (DefectCalibration, {"defects": {"blur": {"intercept": math.nan}}}, "defects.blur.intercept", "finite number"),
    ],
)  # fmt: skip
def test_a_value_beyond_its_limit_is_refused_in_two_lines(
    tmp_path: Path, kind: type[Settings], values: dict[str, Any], key: str, limit: str
) -> None:
    complete = CALIBRATION if kind is Calibration else {}
    (tmp_path / "a.json").write_text(json.dumps(complete | values))
    with pytest.raises(ConfigError) as caught:
        kind.read(tmp_path / "a.json")
    first, second = str(caught.value).splitlines()
    assert first == f"{tmp_path / 'a.json'} cannot be used:"
    assert key in second and limit in second and "(received " in second and len(second) < 700


def test_unusual_values_are_accepted() -> None:
    RaterConfig.parse({"scale": [-3, 3], "sampling": {"strategy": "fps", "fps": 0.01}, "views": [{}] * 8}, "here")
    RaterConfig.parse({"prompt": PROMPT | {"question": "{seconds:>+08.2f} {width:,.0f} {fps:e} {frames:.0%}"}}, "here")
    Calibration.parse(CALIBRATION | {"scale": None, "mapping": LOGISTIC | {"b1": 2e5, "b2": -2e5, "b4": 1e-5}}, "here")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.json", b"[" * 10**6, "a.json is nested too deeply"),
        ("a.yaml", b"[" * 10**4, "a.yaml is nested too deeply"),
        ("a.json", b'{"frames": ' + b"9" * 10**5 + b"}", "a.json is not valid JSON"),
        ("a.json", b" " * (MAX_BYTES[".json"] + 1), "a.json is larger than 16 MB"),
        ("a.yaml", b"#" * (MAX_BYTES[".yaml"] + 1), "a.yaml is larger than 1 MB"),
        ("a.json", json.dumps({f"k{n}": n for n in range(10**4)}).encode(), "  and 9990 more"),
        ("a.json", json.dumps({"k" * 10**6: 1}).encode(), "...: Extra inputs"),
    ],
)  # fmt: skip
def test_a_file_of_any_size_costs_a_short_message(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        Sampling.read(tmp_path / name)
    assert complaint in str(caught.value) and len(str(caught.value)) < 2000


def test_aliases_that_multiply_are_not_written_out(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))]
    (tmp_path / "a.yaml").write_text("\n".join([*lines, "frames: *a11"]))
    with pytest.raises(ConfigError, match="frames: Input should be a valid integer") as caught:
        Sampling.read(tmp_path / "a.yaml")
    assert len(str(caught.value)) < 3000
