"""python -m pytest tests/model/test_prompt.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

from lmm_qa.errors import ConfigError
from lmm_qa.model.levels import LEVELS
from lmm_qa.model.prompt import DEFAULT_PROMPT, OTHER_FILES, SLOTS, Prompt, load_prompt, prompt_names

FAIR: dict[str, Any] = {"question": "How good is it?", "stem": "It is"}


def refusal(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        Prompt.parse(FAIR | changes, "here")
    return str(caught.value)


def test_every_prompt_in_the_folder_is_shipped_and_loads() -> None:
    assert sorted([*prompt_names(), *OTHER_FILES]) == sorted(file.stem for file in (ROOT / "prompts").glob("*.yaml"))
    assert DEFAULT_PROMPT in prompt_names()
    for name in prompt_names():
        prompt = load_prompt(name)
        assert prompt == load_prompt(ROOT / "prompts" / f"{name}.yaml") == load_prompt(f"{ROOT}/prompts/{name}.yaml")
        assert prompt.description
        assert prompt.levels == LEVELS


def test_a_prompt_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yml"
    file.write_text("question: Sharp?\nstem: It looks\nlevels: [awful, fine]\nsystem: Be strict.\n")
    prompt = load_prompt(file)
    assert prompt.messages(1) == [
        {"role": "system", "content": [{"type": "text", "text": "Be strict."}]},
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Sharp?"}]},
    ]
    assert prompt.levels == ("awful", "fine")


def test_the_media_come_first() -> None:
    (message,) = Prompt(**FAIR).messages(2)
    assert [part["type"] for part in message["content"]] == ["video", "video", "text"]


def test_a_label_before_each_view() -> None:
    prompt = load_prompt("talking_head_views")
    content = prompt.model_copy(update={"frames": "images"}).messages(2, 3)[-1]["content"]
    shown = [part.get("text", part["type"]) for part in content]
    first, second = prompt.view_labels
    assert shown == [first, *["image"] * 3, second, *["image"] * 3, prompt.question]
    with pytest.raises(ConfigError, match="view_labels for 2 views, but the rater has 1 view: give a --view for each"):
        prompt.messages(1)


def test_slots_are_filled() -> None:
    prompt = Prompt.parse(FAIR | {"question": "{seconds:.1f} s, {width:.0f}x{height:.0f}, {{sic}}"}, "here")
    assert prompt.slots == {"seconds", "width", "height"}
    (message,) = prompt.messages(1, seconds=2.04, width=640.0, height=480.0, fps=25.0)
    assert message["content"][-1]["text"] == "2.0 s, 640x480, {sic}"
    with pytest.raises(ConfigError, match=r"needs a value for \['height', 'width'\]"):
        prompt.messages(1, seconds=2.0)


def test_what_was_measured_is_a_text() -> None:
    prompt = Prompt.parse(FAIR | {"question": "Measured: {measured}. It has {frames:.0f} frames. How is it?"}, "here")
    assert prompt.uses_measurement and not Prompt.parse(FAIR, "here").uses_measurement
    (message,) = prompt.messages(1, measured="blur {3}", frames=2.0)
    assert message["content"][-1]["text"] == "Measured: blur {3}. It has 2 frames. How is it?"
    with pytest.raises(ConfigError, match=r"needs a value for \['measured'\]"):
        prompt.messages(1, frames=2.0)
    assert "the slot {measured} is a text without a format, received '.1f'" in refusal(question="{measured:.1f}")


def test_paraphrases_are_checked_like_the_question() -> None:
    assert "paraphrase has unknown slots ['length']" in refusal(paraphrases=["Fine?", "{length}"])
    assert "paraphrase is empty" in refusal(paraphrases=[" "])


def test_unknown_slots_are_named_with_those_that_are_known() -> None:
    message = refusal(question="{length} of {seconds}")
    assert "question has unknown slots ['length']; known: " + ", ".join(SLOTS) in message
    assert "unknown slots ['']" in refusal(question="{}")
    assert "unknown slots ['0']" in refusal(question="{0}")
    assert "unknown slots ['seconds.real']" in refusal(question="{seconds.real}")


@pytest.mark.parametrize(
    ("question", "complaint"),
    [
        ("100 % {", "question is not a valid template"),
        ("{seconds:q}", "question cannot be filled in"),
        ("{frames:d}", "question cannot be filled in"),
        ("{seconds:{digits}}", "question cannot be filled in"),
    ],
)
def test_a_question_that_cannot_be_filled_in_is_refused_at_once(question: str, complaint: str) -> None:
    assert complaint in refusal(question=question)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"question": " "}, "question is empty"),
        ({"stem": ""}, "stem is empty"),
        ({"stem": "It is "}, "stem ends with white space, or starts with more than a space: 'It is '"),
        ({"levels": ["good"]}, "at least two different words, worst first; received ['good']"),
        ({"levels": ["good", "good"]}, "at least two different words, worst first; received ['good', 'good']"),
        ({"levels": ["", "good"]}, "a level is a word without surrounding white space; received ['', 'good']"),
        ({"levels": [" bad", "good"]}, "a level is a word without surrounding white space; received [' bad', 'good']"),
        ({"levels": [False, "good"]}, "levels.0: Input should be a valid string (received False)"),
        ({"quesiton": "?"}, "quesiton: Extra inputs are not permitted (received '?')"),
    ],
)
def test_what_a_prompt_may_not_say(changes: dict[str, Any], complaint: str) -> None:
    assert complaint in refusal(**changes)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match="stem: Field required"):
        Prompt.parse({"question": "?"}, "here")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no prompt 'talking-head'; give one of .*talking_head.* or a \.yaml file"):
        load_prompt("talking-head")
    with pytest.raises(ConfigError, match=r"cannot read gone\.yaml"):
        load_prompt("gone.yaml")
