"""python -m pytest tests/ratings/test_rows.py"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from paths import SAMPLES

from lmm_qa.errors import ClipTruncated, ConfigError
from lmm_qa.ratings.rows import CalibrationUse, Failure, Rating, RatingRow, Timeline, describe_columns
from lmm_qa.video.decode import Frames
from lmm_qa.video.probe import probe
from lmm_qa.video.sound import Sound, SoundState


@pytest.fixture
def rating() -> Rating:
    sample_clip = SAMPLES / "avatar_clean.mp4"
    frames = Frames((), (0, 9), (0.0, 0.360004), probe(sample_clip), "pyav", None, None, None)
    return Rating(
        clip="a.mp4",
        content_id="sha256:a",
        score=3.5,
        raw_score=3.0,
        interval=(2.0, 4.0),
        calibration=CalibrationUse(id="c", fitted=False, raw_rater_id="r"),
        scale=(1.0, 5.0),
        level="good",
        probabilities={"bad": 0.25, "good": 0.75},
        std=0.5,
        level_mass=0.9,
        frames=frames,
        model="tiny",
        adapter=None,
        prompt="Rate it.",
        rater_id="rc",
        seconds=0.123456,
        timeline=Timeline(window=2.0, seconds=(1.0,), scores=(3.123456,), low=()),
    )


def test_a_rating_and_a_failure_have_the_columns_of_the_schema(rating: Rating) -> None:
    row = rating.to_row()
    failed = Failure("b.mp4", None, ClipTruncated("3 of 9 frames"), "tiny", "rc").to_row()
    assert list(row) == list(failed) == list(RatingRow.model_fields)
    assert json.loads(json.dumps(row)) == row
    assert row["frames"] == {"indices": [0, 9], "seconds": [0.0, 0.36]}
    assert (row["interval"], row["seconds"], row["timeline"]["scores"]) == ([2.0, 4.0], 0.1235, [3.1235])
    assert failed["error"] == {"class": "ClipTruncated", "message": "3 of 9 frames"}
    assert {name for name, value in failed.items() if value is not None} == {"clip", "model", "rater_id", "error"}


def test_a_failed_measurement_becomes_a_warning(rating: Rating) -> None:
    assert rating.to_row()["warnings"] is None
    failed = replace(rating, frames=replace(rating.frames, measurement_error="ValueError: x (features.py:3)"))
    assert failed.to_row()["warnings"] == ["ValueError: x (features.py:3)"]
    assert failed.to_row()["score"] == 3.5


def test_sound_with_values_that_are_no_numbers_becomes_a_warning(rating: Rating) -> None:
    heard = replace(rating, frames=replace(rating.frames, sound=Sound(SoundState.PRESENT, not_finite=1)))
    assert heard.to_row()["warnings"] == ["NaN or infinite values in the sound, counted as 0: 1 sample."]


def test_rows_of_other_versions_can_be_read(rating: Rating) -> None:
    row = rating.to_row()
    assert RatingRow.parse(row | {"new": 1, "video": row["video"] | {"codec": "h264"}}, "here").to_row() == row
    assert RatingRow.parse({"clip": "a", "error": "broken"}, "here").error == "broken"
    with pytest.raises(ConfigError, match="expected one score per window, received 0 for 1 windows"):
        RatingRow.parse({"clip": "a", "timeline": {"seconds": [1.0], "scores": []}}, "here")


def test_every_column_is_described() -> None:
    columns = {name: (kind, text) for name, kind, text in describe_columns()}
    assert all(text for _, text in columns.values())
    assert {name for name in columns if "." not in name} == set(RatingRow.model_fields)
    assert columns["interval"][0] == "[number, number]"
    assert columns["video.width"][0] == "integer"
    assert columns["error.class"][0] == "string"
    assert "found[].probability" in columns
