"""python -m pytest tests/defects/test_vocabulary.py"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy.special import expit

from lmm_qa.defects.calibration import UNCALIBRATED, DefectCalibration, PlattScaling, read_calibration
from lmm_qa.defects.questions import questions
from lmm_qa.defects.vocabulary import BY_NAME, DEFECTS, PRESENT_STRENGTH, VISIBLE, reference_defects
from lmm_qa.degrade.causes import DEGRADATIONS
from lmm_qa.degrade.sound import SOUND
from lmm_qa.errors import ConfigError
from lmm_qa.model.prompt import load_prompt, prompt_names


def test_every_damage_is_a_defect() -> None:
    causes = [cause for defect in DEFECTS for cause in defect.causes]
    assert sorted(causes) == sorted((*DEGRADATIONS, *SOUND)), "each cause belongs to one defect"


def test_every_visible_defect_has_a_closed_question() -> None:
    asked = questions()
    assert tuple(asked) == VISIBLE
    for name, prompt in asked.items():
        assert prompt.levels == ("no", "yes"), name
        assert "yes or no" in prompt.question
        assert "{" not in prompt.question
    assert "lip_sync" not in asked, "frames do not show it"
    assert not BY_NAME["lip_sync"].visible


def test_questions_are_no_rating_prompts() -> None:
    assert {"talking_head", "qalign"} <= set(prompt_names())
    assert not {"defects", "explanation"} & set(prompt_names())
    with pytest.raises(ConfigError, match="defects"):
        load_prompt("defects")


def test_what_a_damaged_copy_has() -> None:
    assert set(reference_defects([]).values()) == {False}
    assert reference_defects([("noise", 0.5)])["noise"] is True
    assert reference_defects([("noise", PRESENT_STRENGTH / 2)])["noise"] is None, "hardly to be seen: nobody is asked"
    assert reference_defects([("noise", 0.0)])["noise"] is False
    strong = reference_defects([("h264", 0.9)])
    assert strong["compression"] is True
    assert strong["blur"] is None, "compression blurs too"
    assert strong["noise"] is False
    both = reference_defects([("h264", 0.9), ("blur", 0.9)])
    assert both["compression"] is both["blur"] is True
    assert reference_defects([("blur", 0.1), ("rescale", 0.8)])["blur"] is True, "one that shows is enough"
    assert reference_defects([("rescale", 0.8), ("blur", 0.1)])["blur"] is True, "in whatever order"
    assert "lip_sync" not in reference_defects([])
    assert "movement" not in reference_defects([])


@pytest.mark.parametrize(("odds", "measured"), [(0.0, 0.0), (2.5, 1.0), (-30.0, -1.0), (1000.0, 1.0)])
def test_probability_is_a_logistic_function(odds: float, measured: float) -> None:
    calibration = DefectCalibration(defects={"stall": PlattScaling(slope=0.7, measured=1.5, intercept=-0.4)})
    expected = expit(0.7 * odds + 1.5 * measured - 0.4)
    assert calibration.probability("stall", odds, measured) == pytest.approx(expected)
    assert calibration.probability("blur", odds) is None, "not listed: not judged"


def test_without_a_calibration_the_answer_is_taken_as_it_is() -> None:
    assert read_calibration(None) is UNCALIBRATED
    assert set(UNCALIBRATED.defects) == set(VISIBLE)
    assert UNCALIBRATED.probability("blur", 1.2) == pytest.approx(expit(1.2))
    assert UNCALIBRATED.probability("blur", 1.2, -0.5) == pytest.approx(expit(0.7)), "what was measured counts as much"


def test_an_answer_without_weight_is_not_asked_for() -> None:
    calibration = DefectCalibration(defects={"blur": PlattScaling(), "seam": PlattScaling(slope=0, measured=2.0)})
    assert calibration.asks("blur")
    assert not calibration.asks("seam"), "what was measured says it all"
    assert not calibration.asks("noise"), "not judged"
    assert calibration.probability("seam", 9.0, 1.5) == pytest.approx(expit(3.0))


def test_a_calibration_is_read_and_checked(tmp_path: Path) -> None:
    file = tmp_path / "defects.json"
    file.write_text(json.dumps({"defects": {"blur": {"slope": 2.0}}, "data": "some"}))
    assert read_calibration(file).probability("blur", 1.0) == pytest.approx(expit(2.0))
    file.write_text(json.dumps({"defects": {"blurr": {}}}))
    with pytest.raises(ConfigError, match=r"blurr.*known: blur, noise(.|\n)*fit it again"):
        read_calibration(file)
    file.write_text(json.dumps({"defects": {"blur": {"slope": -1}}}))
    with pytest.raises(ConfigError, match=r"defects\.blur\.slope"):
        read_calibration(file)
