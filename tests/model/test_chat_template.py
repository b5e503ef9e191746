"""python -m pytest tests/model/test_chat_template.py"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from model_inputs import HYBRID, NO_THOUGHTS

import lmm_qa.model.chat_template
from lmm_qa.errors import ModelError
from lmm_qa.model.chat_template import MESSAGES, check_chat_template, render_chat
from lmm_qa.model.loading import load_processor

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
INTERNALS = "{{ ''.__class__.__mro__[1].__subclasses__() }}"

UNBOUNDED = {
    "an endless loop": (LOOP, "it takes more than 1 s"),
    "a number that grows": ("{{ 9 ** (9 ** 9) }}", "it takes more than 1 s"),
    "a text that grows": ("{{ 'x' * 10 ** 11 }}", "it needs more than 2048 MB"),
    "a long text": ("{{ 'x' * 10 ** 7 }}", "its text has 10,000,000 characters, more than 1,000,000"),
    "internals of Python": (INTERNALS, "SecurityError: access to attribute"),
}

DENIED = {
    INTERNALS: "SecurityError: access to attribute",
    "{{ messages.append(1) }}": "SecurityError",
    "{% include '/etc/passwd' %}": "no loader",
    "{% for a in range(10**9) %}{% endfor %}": "OverflowError: Range too big",
    "{% for %}": "TemplateSyntaxError",
    "{{ raise_exception('one message only') }}": "TemplateError: one message only",
    "{{ 'x' * 2000000 }}": "gives 2,000,000 characters, more than 1,000,000",
}


def processor(template: str | dict[str, str]) -> Any:
    """What the check reads of a processor."""
    return SimpleNamespace(chat_template=template, tokenizer=SimpleNamespace(special_tokens_map={"eos_token": "<e>"}))


@pytest.mark.parametrize(("template", "problem"), UNBOUNDED.values(), ids=UNBOUNDED)
def test_a_template_beyond_a_limit_is_refused(template: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmm_qa.model.chat_template, "CPU_SECONDS", 1)
    with pytest.raises(ModelError, match="the chat template of 'some/model' cannot be used: ") as caught:
        check_chat_template(processor(template), "some/model")
    assert problem in str(caught.value) and len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 400


def test_harmless_templates_are_accepted() -> None:
    check_chat_template(processor("{% for m in messages %}{{ m.role }}{{ eos_token }}{% endfor %}"), "m")
    check_chat_template(processor({"default": "{{ messages[0].role }}", "tools": LOOP}), "m")


def test_the_well_known_template_needs_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("started a process"))
    known = Path(lmm_qa.model.chat_template.__file__).parent / "embedded" / "base" / "chat_template.jinja"
    check_chat_template(processor(known.read_text()), "m")


def test_an_accepted_template_is_not_rendered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    one, other = processor("{{ messages[0].role }}: once"), processor("{{ messages[0].role }}: twice")
    check_chat_template(one, "m")
    refused = processor("{{ raise_exception('always') }}")
    for _ in range(2):
        with pytest.raises(ModelError, match="TemplateError: always"):
            check_chat_template(refused, "m")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("started a process"))
    check_chat_template(one, "m")
    with pytest.raises(pytest.fail.Exception, match="started a process"):
        check_chat_template(other, "m")
    one.tokenizer.special_tokens_map = {"eos_token": "<another>"}
    with pytest.raises(pytest.fail.Exception, match="started a process"):
        check_chat_template(one, "m")


def test_loading_a_model_checks_its_template(family_dir: Callable[[str], Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(family_dir("qwen2_vl"), model)
    (model / "chat_template.json").unlink(missing_ok=True)
    (model / "chat_template.jinja").write_text(INTERNALS)
    with pytest.raises(ModelError, match=r"chat template of '.*model' cannot be used: SecurityError"):
        load_processor(str(model))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_5"])
def test_a_model_that_can_think_is_told_not_to(
    family: str, family_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever its template does by default. Other templates get no variable that transformers would warn about."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    loaded = load_processor(str(family_dir(family)))
    assert render_chat(loaded, MESSAGES).endswith("<|im_start|>assistant\n" + (NO_THOUGHTS if family in HYBRID else ""))
    for condition in ("is defined and enable_thinking is true", "is not defined or enable_thinking"):
        loaded.chat_template = (
            f"{{% if enable_thinking {condition} %}}{{{{ raise_exception('it thinks') }}}}{{% endif %}}"
        )
        check_chat_template(loaded, "m")
        assert render_chat(loaded, MESSAGES) == ""
    assert not caplog.records


def test_what_the_sandbox_denies_is_an_error(family_dir: Callable[[str], Path]) -> None:
    loaded = load_processor(str(family_dir("qwen2_vl")))
    loaded.chat_template = "{{ messages | length }}"
    assert render_chat(loaded, MESSAGES) == "2"
    for template, problem in DENIED.items():
        loaded.chat_template = template
        with pytest.raises(ModelError, match="the chat template of the model ") as caught:
            render_chat(loaded, MESSAGES)
        assert problem in str(caught.value)
