"""python -m pytest tests/defects/test_explanation.py"""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmm_qa.defects.explanation import (
    MAX_NAMED,
    Finding,
    explain,
    explanation_prompt,
    facts,
    is_good,
    mentions,
    objection,
    opening,
    sentence,
)
from lmm_qa.defects.vocabulary import VISIBLE
from lmm_qa.model.levels import LEVELS
from lmm_qa.model.prompt import Prompt, load_prompt

findings = st.lists(
    st.builds(
        Finding,
        st.sampled_from(VISIBLE),
        st.floats(0.5, 1),
        st.sampled_from([(), ((1.2, 2.0),), ((0.0, 0.5), (3.0, 4.25))]),
    ),
    max_size=MAX_NAMED,
    unique_by=lambda one: one.defect,
)
RATING = load_prompt("talking_head")


@given(findings, st.sampled_from(LEVELS), st.integers(0, 10**6), st.booleans())
def test_the_grammar_says_what_was_found_and_nothing_else(
    found: list[Finding], level: str, seed: int, strengths: bool
) -> None:
    draw, names = random.Random(seed), {one.defect for one in found}
    each = [draw.random() for _ in found] if strengths else ()
    text = sentence(found, set(VISIBLE) - names, draw, each, good=is_good(level, LEVELS))
    whole = opening(RATING, level) + text
    assert mentions(whole) == names
    assert objection(whole, level, LEVELS, found) is None
    assert "  " not in whole
    assert "{" not in whole
    assert whole.endswith(".")


def test_sentences_have_variety_and_depend_on_the_draw_alone() -> None:
    found = [Finding("blur", 0.9), Finding("stall", 0.8, ((1.2, 2.0),))]
    said = {sentence(found, ["colour", "noise"], random.Random(seed)) for seed in range(200)}
    assert len(said) > 60
    assert sentence(found, ["noise"], random.Random(3)) == sentence(found, ["noise"], random.Random(3))
    timed = sum("from 1.2 to 2.0 s" in text for text in said)
    assert timed == len(said), "where a time is known, it is said"


def test_facts() -> None:
    assert facts([]) == "none"
    found = [Finding("blur", 0.9), Finding("stall", 0.8, ((1.24, 2.0), (4.0, 5.5))), Finding("seam", 0.7)]
    assert facts(found) == "blur; stall from 1.2 to 2.0 s and from 4.0 to 5.5 s; face seam"
    assert facts([*found, Finding("noise", 0.6)]) == facts(found), "no more than are named"


def test_the_question_carries_the_facts_and_the_system_message() -> None:
    prompt = Prompt(system="You rate.", question="How good?", stem="It is", levels=("bad", "good"))
    asked = explanation_prompt(prompt, [Finding("blur", 0.9)])
    (system, user) = asked.messages(1)
    assert system["content"][0]["text"] == "You rate."
    assert "Defects found: blur." in user["content"][-1]["text"]
    assert opening(prompt, "good") == "It is good"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("The picture is blurry and noisy.", {"blur", "noise"}),
        ("There is no blur, and no noise either.", set()),
        ("Free of compression, but the brightness flickers.", {"flicker"}),
        ("The clip freezes twice without warning.", {"stall"}),
        ("Not blurred. It is blurred later.", {"blur"}),
        ("Visible blocking artefacts around the mouth.", {"compression"}),
        ("The face is sharp and the colours are natural.", set()),
        ("The bit-rate drops.", {"bitrate_switch"}),
    ],
)
def test_mentions(text: str, names: set[str]) -> None:
    assert mentions(text) == names


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("The quality of this video is fair: the picture is blurred.", None),
        ("The quality of this video is fair: it looks excellent though blurred.", "excellent"),
        ("The quality of this video is fair: noise covers the blurred picture.", "noise"),
        ("The quality of this video is fair, and so on.", "leaves out what was found: blur"),
        ("The quality of this video is fair: the picture is blurred and", "end"),
        ("The quality of this video is fair: the picture is blurred from 0.5 to 1.0 s. The face.", "breaks off"),
        ("The quality of this video is fair: the picture is blurred. There is no visible defect.", "no visible defect"),
        ("The quality of this video is fair: the picture is blurred. There is no other defect.", None),
        ("The quality of this video is fair: the picture is blurred. There are no defects besides that.", None),
        ("The quality of this video is fair: the picture is blurred. There are no compression artefacts.", None),
        ("The quality of this video is fair: the picture is blurred, and the mouth not flawless.", None),
        ("The quality of this video is fair: it is blurred. On the positive side, the positive side.", "repeats"),
        (
            "The quality of this video is fair: the picture is strongly blurred, and the picture is strongly blurred.",
            "repeats itself: the picture is strongly blurred",
        ),
        ("The quality of this video is fair: it is blurred from 0.5 to 1.0 s, and soft from 0.5 to 1.0 s.", None),
        ("The quality of this video is fair: soft over the whole picture, blurred over the whole picture.", None),
        ("The quality of this video is fair: the picture is blurred. Still, the face is sharp.", "the face is sharp"),
        ("The quality of this video is fair: it is blurred. On the positive side, the same.", "without a verb"),
        ("The quality of this video is fair: it is blurred. The face is steady stands out.", "two verbs"),
        ("The quality of this video is fair: the picture is severe blur covers the picture.", "two verbs"),
        ("The quality of this video is fair: it is a blur that covers the face, and what is behind is soft.", None),
        ("The quality of this video is fair because it is blurred. Nothing else is wrong.", None),
        ("The quality of this video is fair: it is blurred from 0.5 to 2.0 s.", "not measured: 2.0 s"),
        ("The quality of this video is fair: it is blurred for 3 seconds.", "not measured: 3 s"),
        ("The quality of this video is fair: it is a blurred 3D head of 1080p.", None),
    ],
)
def test_words_that_contradict_the_rating_are_not_shown(text: str, why: str | None) -> None:
    found = [Finding("blur", 0.9, ((0.5, 1.0),))]
    said = objection(text, "fair", LEVELS, found)
    assert said is None if why is None else why in str(said)
    begun = "The quality of this video is fair"
    shown, reason = explain(text.removeprefix(begun), "fair", LEVELS, found, ["noise"], "id", begun)
    assert reason == said
    assert shown == text if why is None else objection(shown, "fair", LEVELS, found) is None


@pytest.mark.parametrize(
    ("level", "why"), [("good", None), ("excellent", None), ("fair", "no defect"), ("bad", "no defect")]
)
def test_a_clip_below_good_is_not_called_faultless(level: str, why: str | None) -> None:
    begun, text = f"The quality of this video is {level}", ". No defect stands out."
    shown, reason = explain(text, level, LEVELS, [], ["noise"], "id", begun)
    assert reason is None if why is None else why in str(reason)
    assert ("defect stands out" in shown) == (why is None)
    assert objection(shown, level, LEVELS, []) is None


def test_a_good_clip_has_no_severe_defect() -> None:
    blurred, found = "The quality of this video is {}. The picture is severely blurred.", [Finding("blur", 0.9)]
    for level, why in (("excellent", "severely"), ("good", "severely"), ("fair", None), ("bad", None)):
        said = objection(blurred.format(level), level, LEVELS, found)
        assert said is None if why is None else why in str(said)


def test_the_two_main_defects_are_named() -> None:
    found = [Finding("blur", 0.9), Finding("noise", 0.8), Finding("flicker", 0.7)]
    said = "The quality of this video is fair: {}."
    assert objection(said.format("noise covers the blurred picture"), "fair", LEVELS, found) is None
    assert objection(said.format("the brightness of the blurred picture flickers"), "fair", LEVELS, found) == (
        "it leaves out what was found: noise"
    )


def test_a_short_stem_does_not_break_off() -> None:
    assert objection("Quality: fair. The picture is blurred.", "fair", LEVELS, [Finding("blur", 0.9)]) is None
