"""Closed questions about defects: each is a `Prompt` with the two levels no and yes, and is read like a rating.

The wording is in `prompts/defects.yaml`.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Self

from pydantic import model_validator

from lmm_qa.config import Settings
from lmm_qa.defects.vocabulary import VISIBLE, check_names
from lmm_qa.model.prompt import Prompt


class Questions(Settings):
    """Contents of `prompts/defects.yaml`."""

    question: str
    """The user message; `{question}` in it is replaced by the question about a defect."""
    stem: str
    answers: tuple[str, str]
    """The words for no and yes; each must be a single token after the stem."""
    questions: dict[str, str]

    @model_validator(mode="after")
    def _check_defects(self) -> Self:
        check_names(self.questions)
        return self


@cache
def questions() -> dict[str, Prompt]:
    """The question about each visible defect, by its name, in the order of the vocabulary."""
    with resources.as_file(resources.files("lmm_qa.prompt_files") / "defects.yaml") as file:
        texts = Questions.read(file)
    return {
        name: Prompt(
            question=texts.question.format(question=texts.questions[name]), stem=texts.stem, levels=texts.answers
        )
        for name in VISIBLE
        if name in texts.questions
    }
