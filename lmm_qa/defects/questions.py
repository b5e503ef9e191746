"""TODO-DOC defects.questions."""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path
from typing import Self

from pydantic import model_validator

from lmm_qa.config import Settings
from lmm_qa.defects.vocabulary import VISIBLE
from lmm_qa.model.prompt import Prompt


class Questions(Settings):
    """`prompts/defects.yaml`."""

    question: str
    """The user's message, with `{question}` in it."""
    stem: str
    answers: tuple[str, str]
    """The words for no and for yes, single tokens after the stem."""
    questions: dict[str, str]

    @model_validator(mode="after")
    def _of_the_vocabulary(self) -> Self:
        if unknown := set(self.questions) - set(VISIBLE):
            raise ValueError(f"no such defects: {', '.join(sorted(unknown))}; known: {', '.join(VISIBLE)}")
        return self


@cache
def questions() -> dict[str, Prompt]:
    """The closed question of each defect that frames can show, in the order of `DEFECTS`."""
    with resources.as_file(resources.files("lmm_qa.prompt_files") / "defects.yaml") as file:
        return _prompts(file)


def _prompts(file: Path) -> dict[str, Prompt]:
    texts = Questions.read(file)
    return {
        name: Prompt(
            question=texts.question.format(question=texts.questions[name]), stem=texts.stem, levels=texts.answers
        )
        for name in VISIBLE
        if name in texts.questions
    }
