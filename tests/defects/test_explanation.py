"""python -m pytest tests/defects/test_explanation.py"""

from __future__ import annotations

import random
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmm_qa.defects.explanation import (
    MAX_NAMED,
    Finding,
    describe_findings,
    explain,
    explanation_prompt,
    is_good,
    mentioned_defects,
    objection,
    opening,
    template_text,
)
from lmm_qa.defects.vocabulary import VISIBLE
from lmm_qa.model.levels import LEVELS
from lmm_qa.model.prompt import Prompt, load_prompt
from lmm_qa.model.rater_config import FILE_NAME, ExplanationCheck, RaterConfig
from lmm_qa.model.source import EMBEDDED

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
    text = template_text(found, set(VISIBLE) - names, draw, each, good=is_good(level, LEVELS))
    whole = opening(RATING, level) + text
    assert mentioned_defects(whole) == names
    for check in get_args(ExplanationCheck):
        assert objection(whole, level, LEVELS, found, set(VISIBLE) - names, check) is None
    assert "  " not in whole
    assert "{" not in whole
    assert whole.endswith(".")


def test_sentences_have_variety_and_depend_on_the_draw_alone() -> None:
    found = [Finding("blur", 0.9), Finding("stall", 0.8, ((1.2, 2.0),))]
    said = {template_text(found, ["colour", "noise"], random.Random(seed)) for seed in range(200)}
    assert len(said) > 60
    assert template_text(found, ["noise"], random.Random(3)) == template_text(found, ["noise"], random.Random(3))
    timed = sum("from 1.2 to 2.0 s" in text for text in said)
    assert timed == len(said), "where a time is known, it is said"


def test_facts() -> None:
    assert describe_findings([]) == "none"
    found = [Finding("blur", 0.9), Finding("stall", 0.8, ((1.24, 2.0), (4.0, 5.5))), Finding("seam", 0.7)]
    assert describe_findings(found) == "blur; stall from 1.2 to 2.0 s and from 4.0 to 5.5 s; face seam"
    assert describe_findings([*found, Finding("noise", 0.6)]) == describe_findings(found), "no more than are named"


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
        ("There is little noise, and compression is not visible.", set()),
        ("The background blur is pleasant, and the person's identity stays the same.", set()),
        ("A microphone blocks part of the chin; the exposure is right and the frame rate high.", set()),
        ("The colours look unnatural.", set()),
        ("The expressions look unnatural.", {"movement"}),
    ],
)
def test_mentions(text: str, names: set[str]) -> None:
    assert mentioned_defects(text) == names


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
def test_the_grammar_check(text: str, why: str | None) -> None:
    found = [Finding("blur", 0.9, ((0.5, 1.0),))]
    reason = objection(text, "fair", LEVELS, found, ["noise"], "grammar")
    assert reason is None if why is None else why in str(reason)
    begun = "The quality of this video is fair"
    shown, reported = explain(text.removeprefix(begun), "fair", LEVELS, found, ["noise"], "id", begun, "grammar")
    assert reported == reason
    assert shown == text if why is None else objection(shown, "fair", LEVELS, found, ["noise"], "grammar") is None


# What large models write about a clip that is fair: blurred, and it stalls from 1.2 to 2.0 s.
FAIR = [Finding("blur", 0.9), Finding("stall", 0.8, ((1.2, 2.0),))]


@pytest.mark.parametrize(
    "text",
    [
        ". The lighting is good, but the picture is blurred.",
        ". The woman has fair skin, and her hair lacks texture because of blur.",
        ". There is strong backlight, and the face is slightly out of focus.",
        ": poor focus softens the face, although the framing is excellent.",
        ": the image looks soft throughout.",
        ". The bad focus hides the eyelashes.",
        " because the clip freezes from 1.2 to 2.0 s.",
        " because playback freezes for about 0.8 seconds, starting at 1.2 s.",
        " because it freezes around the 2 second mark.",
        ": it is good that the colours stay natural, yet the blur is strong.",
        ", not excellent: fine detail is missing!",
        ". It would be good without the blur.",
        ". The exposure is balanced, the frame rate is steady and the person's identity is consistent.",
        ". The clip is excellent in colour but poor in sharpness.",
        ". A good microphone stands in front of the speaker, whose voice cannot be judged here.",
        ". The background blur is deliberate, the face is soft as well.",
        ". Compression is barely visible and there is little noise. However, details are soft.",
        ". The picture is blurred, the picture is soft. Overall, acceptable.",
        ". The speaker turns after 3 s. There are no defects in the background.",
        ". Skin tones are excellent and the movement of the lips is natural. No other defects.",
        " for a 4-second clip: it is blurred and it stalls.",
    ],
)
def test_plausible_text_of_a_large_model_is_shown(text: str) -> None:
    begun, absent = "The quality of this video is fair", sorted(set(VISIBLE) - {"blur", "stall"})
    assert explain(text, "fair", LEVELS, FAIR, absent, "id", begun) == (begun + text, None)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (". Overall, the quality is good.", "it says good, and the rating fair"),
        (". The picture is blurred, yet the clip looks very good.", "it says good, and the rating fair"),
        (", but it is excellent overall.", "it says excellent, and the rating fair"),
        (". This is a poor video with blur.", "it says poor, and the rating fair"),
        (". It has excellent image quality.", "it says excellent, and the rating fair"),
        (". Blurred and stalling. Good quality overall.", "it says good, and the rating fair"),
        (". The clip is flawless.", "it says flawless, and the rating fair"),
        (". The brightness flickers throughout.", "it names what was not found: flicker"),
        (". The picture is noisy and shows blocking.", "it names what was not found: compression, noise"),
        (". There is no visible blur.", "it denies what was found: blur"),
        (". The clip stalls, but the face is sharp.", "it says that the face is sharp, and blur was found"),
        (". The clip freezes from 2.5 to 3.0 s.", "it gives a time that was not measured: 2.5 s"),
        (" because it stalls for 3 seconds.", "it gives a time that was not measured: 3 s"),
        (". There are no visible defects.", "it says no visible defects, and blur, stall was found"),
        (". The picture is blurred and the clip also", "it does not come to an end"),
        (".", "it is empty"),
        ("", "it does not come to an end"),
    ],
)
def test_text_that_contradicts_the_rating_is_replaced(text: str, reason: str) -> None:
    begun, absent = "The quality of this video is fair", sorted(set(VISIBLE) - {"blur", "stall"})
    shown, reported = explain(text, "fair", LEVELS, FAIR, absent, "id", begun)
    assert reported == reason
    assert shown.startswith(begun) and shown != begun + text
    assert objection(shown, "fair", LEVELS, FAIR, absent) is None


def test_the_check_does_not_change_the_identity_of_a_rater() -> None:
    assert RaterConfig(explanation_check="grammar").scoring_settings() == RaterConfig().scoring_settings()
    assert RaterConfig.read(EMBEDDED / FILE_NAME).explanation_check == "grammar"


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
        said = objection(blurred.format(level), level, LEVELS, found, check="grammar")
        assert said is None if why is None else why in str(said)


def test_the_two_main_defects_are_named() -> None:
    found = [Finding("blur", 0.9), Finding("noise", 0.8), Finding("flicker", 0.7)]
    said = "The quality of this video is fair: {}."
    both = objection(said.format("noise covers the blurred picture"), "fair", LEVELS, found, check="grammar")
    assert both is None
    one = said.format("the brightness of the blurred picture flickers")
    assert objection(one, "fair", LEVELS, found, check="grammar") == "it leaves out what was found: noise"


def test_a_short_stem_does_not_break_off() -> None:
    assert (
        objection("Quality: fair. The picture is blurred.", "fair", LEVELS, [Finding("blur", 0.9)], (), "grammar")
        is None
    )
