"""python -m pytest tests/video/measurement/test_evidence.py"""

from __future__ import annotations

import random

import pytest

from lmm_qa.video.measurement.classifier import QUALITY, evidence_names
from lmm_qa.video.measurement.evidence import UNKNOWN, evidence_text

NUMBERS = {QUALITY: 0.615, "blur": 0.3, "noise": 0.0, "stall": 1.0}


def test_the_wording_is_fixed() -> None:
    assert evidence_text(NUMBERS) == "quality 61, blur 3, noise 0, stall 9"
    assert evidence_text({QUALITY: 0.0, "blur": -0.1}) == "quality 00, blur 0"
    assert evidence_text({QUALITY: 1.0, "blur": 1.1}) == "quality 99, blur 9"
    assert evidence_text(None) == UNKNOWN


def test_in_training_numbers_are_rounded_to_either_side() -> None:
    rng = random.Random(3)
    texts = [evidence_text(NUMBERS, rng) for _ in range(2000)]
    values = [[int(part.rsplit(" ", 1)[1]) for part in text.split(", ")] for text in texts]
    means = [sum(column) / len(values) for column in zip(*values, strict=True)]
    assert means == pytest.approx([0.615 * 99, 0.3 * 9, 0, 9], abs=0.05), "on average, nothing is lost"
    assert {value[1] for value in values} == {2, 3}


def test_the_names_of_the_package() -> None:
    names = evidence_names()
    assert names[0] == QUALITY and len(set(names)) == len(names) == 18
