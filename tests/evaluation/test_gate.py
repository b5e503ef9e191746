"""python -m pytest tests/evaluation/test_gate.py"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from rating_rows import rating_row, rating_set

from lmm_qa.errors import ConfigError, ResultsError, UsageError
from lmm_qa.evaluation.compare import compare
from lmm_qa.evaluation.gate import Check, Limits, check_limits, write_junit
from lmm_qa.evaluation.pairing import RatingSet


def scored(folder: Path, name: str, scores: np.ndarray, blurred: int = 0) -> RatingSet:
    rows = [rating_row(f"{n}.mp4", float(score), ["blur"] if n < blurred else []) for n, score in enumerate(scores)]
    return rating_set(folder, name, rows)


def results(checks: list[Check]) -> dict[str, bool]:
    return {check.name: check.passed for check in checks}


SCORES = np.random.default_rng(0).normal(3.5, 0.4, 60)


@pytest.mark.parametrize(
    ("change", "spread", "passed", "words"),
    [
        (-0.3, 0.1, False, "it drops by more than 0.1"),
        (0.0, 0.1, True, "a larger drop than 0.1 is excluded"),
        (0.3, 0.1, True, "a larger drop than 0.1 is excluded"),
        (-0.02, 1.0, False, "a larger drop than 0.1 cannot be excluded"),  # the mean alone would pass
    ],
)
def test_a_drop_is_judged_by_the_end_of_its_interval(
    tmp_path: Path, change: float, spread: float, passed: bool, words: str
) -> None:
    noise = np.random.default_rng(1).normal(0, spread, 60)
    old, new = scored(tmp_path, "old", SCORES), scored(tmp_path, "new", SCORES + change + noise - noise.mean())
    comparison = compare(old, [new]).sets[0]
    assert comparison.difference.value == pytest.approx(change)
    (check,) = (one for one in check_limits(Limits(max_drop=0.1), new, comparison) if one.name == "drop")
    assert check.passed is passed is (comparison.difference.low >= -0.1)
    assert words in check.message
    assert f"mean score changes by {comparison.difference.value:+.2f} [{comparison.difference.low:+.2f}, " in str(check)


@pytest.mark.parametrize(
    ("limit", "passed", "words"),
    [
        (3.0, True, "below 3 is excluded"),
        (4.0, False, "it is below 4"),
        (3.49, False, "below 3.49 cannot be excluded"),
    ],
)
def test_a_mean_score_is_judged_by_the_end_of_its_interval(
    tmp_path: Path, limit: float, passed: bool, words: str
) -> None:
    new = scored(tmp_path, "new", SCORES - SCORES.mean() + 3.5)
    checks = check_limits(Limits(min_score=limit), new)
    assert results(checks) == {"rated": True, "pairs": True, "score": passed}
    assert words in checks[-1].message


def test_defects_are_limited_by_their_share(tmp_path: Path) -> None:
    new = scored(tmp_path, "new", SCORES, blurred=3)
    checks = check_limits(Limits(max_defect={"blur": 0.05, "stall": 0}), new)
    assert results(checks) == {"rated": True, "pairs": True, "defect blur": True, "defect stall": True}
    assert "blur in 3 of 60 clips (5.0%), at most 5.0% allowed" in checks[2].message
    assert not results(check_limits(Limits(max_defect={"blur": 0.04}), new))["defect blur"]


def test_a_defect_that_was_not_judged_fails(tmp_path: Path) -> None:
    new = scored(tmp_path, "new", SCORES)
    (*_, check) = check_limits(Limits(max_defect={"movement": 0.5}), new)
    assert not check.passed
    assert "was judged in none of 60 clips: rate them with --defects" in check.message


def test_few_pairs_and_failed_clips_fail(tmp_path: Path) -> None:
    rows = [rating_row(f"{n}.mp4", 3 + n / 20) for n in range(9)]
    old = rating_set(tmp_path, "old", [*rows, rating_row("9.mp4"), rating_row("gone.mp4")])
    new = rating_set(tmp_path, "new", [*rows, rating_row("9.mp4", None)])
    comparison = compare(old, [new]).sets[0]
    checks = check_limits(Limits(max_drop=0.1), new, comparison)
    assert results(checks) == {"rated": False, "pairs": False, "drop": True}
    assert checks[0].message == "1 of 10 clips could not be rated (9.mp4), at most 0 allowed"
    assert checks[1].message == "9 pairs, at least 10 needed; without a partner: 1 old, 0 new"
    relaxed = check_limits(Limits(max_drop=0.1, min_pairs=9, max_failed=1), new, comparison)
    assert all(results(relaxed).values())


def test_a_gate_without_limits_is_refused(tmp_path: Path) -> None:
    new = scored(tmp_path, "new", SCORES)
    with pytest.raises(UsageError, match="there is no limit: give --max-drop, --min-score or --max-defect"):
        check_limits(Limits(min_pairs=5), new)
    with pytest.raises(UsageError, match=r"max_drop 0.1 needs the ratings of the old set: --against OLD"):
        check_limits(Limits(max_drop=0.1), new)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_defect: {blurr: 0.1}", "no such defects: blurr"),
        ("max_defect: {blur: 5}", "less than or equal to 1"),
        ("max_drop: -0.1", "greater than or equal to 0"),
        ("maxdrop: 0.1", "known keys: max_drop, min_score, max_defect, min_pairs, max_failed"),
        ("min_score: .nan", "finite number"),
    ],
)
def test_invalid_limits_are_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "gate.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(words)):
        Limits.read(tmp_path / "gate.yaml")


def test_a_file_of_limits(tmp_path: Path) -> None:
    (tmp_path / "gate.yaml").write_text("max_drop: 0.1\nmax_defect:\n  blur: 0.05\n  stall: 0\nmin_pairs: 40\n")
    expected = Limits(max_drop=0.1, max_defect={"blur": 0.05, "stall": 0.0}, min_pairs=40)
    assert Limits.read(tmp_path / "gate.yaml") == expected


# --- JUnit XML -------------------------------------------------------------------------------------------------------

COUNTS = {"tests", "failures", "errors"}
JUNIT = {
    "testsuites": ({"name", "time", *COUNTS}, set(), {"testsuite"}),
    "testsuite": (
        {"name", "time", "timestamp", "hostname", "id", "package", "skipped", "group", "file", "log", "url", *COUNTS},
        {"name", *COUNTS},
        {"testsuite", "properties", "testcase", "system-out", "system-err"},
    ),
    "testcase": (
        {"name", "classname", "time", "group"},
        {"name"},
        {"skipped", "error", "failure", "system-out", "system-err"},
    ),
    "failure": ({"type", "message"}, set(), set()),
    "system-out": (set(), set(), set()),
}
"""Allowed attributes, required attributes and allowed children of each element, as in Jenkins' junit-10.xsd."""


def check_junit(element: ET.Element) -> None:
    allowed, required, children = JUNIT[element.tag]
    assert required <= set(element.keys()) <= allowed, element.attrib
    assert {child.tag for child in element} <= children
    for name in set(element.keys()) & COUNTS:
        assert element.attrib[name].isdecimal()
    if element.tag in ("testsuites", "testsuite"):
        assert int(element.attrib["tests"]) == len(element.findall(".//testcase"))
        assert int(element.attrib["failures"]) == len(element.findall(".//failure"))
    for child in element:
        check_junit(child)


def test_junit_xml_has_the_usual_structure(tmp_path: Path) -> None:
    checks = [Check("drop", False, "a\x00b\x1b[0m \ud800 <&\"'> \ufffe"), Check("defect blur", True, "fine ✓")]
    write_junit(checks, tmp_path / "made" / "gate.xml", "new\x07 & <old>")
    root = ET.parse(tmp_path / "made" / "gate.xml").getroot()
    check_junit(root)
    (failure,) = root.iter("failure")
    assert failure.attrib["message"] == failure.text == "a\ufffdb\ufffd[0m \ufffd <&\"'> \ufffd"
    assert [case.attrib["name"] for case in root.iter("testcase")] == ["drop", "defect blur"]


def test_junit_xml_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResultsError, match="cannot write"):
        write_junit([Check("drop", True, "")], tmp_path / "file" / "gate.xml", "new")
