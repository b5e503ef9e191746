"""TODO-DOC model.prefill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch

from lmm_qa.errors import ConfigError
from lmm_qa.model.backbone import Context, _by_place
from lmm_qa.model.prompt import Prompt

if TYPE_CHECKING:
    pass

from lmm_qa.model.backbone import Backbone
from lmm_qa.model.inputs import ClipInput, prepare_inputs, question_tokens, text_after, without_question
from lmm_qa.model.levels import LevelLogits


class Prefill:
    """Clips that a model has looked at, to ask it many things about each. One prefill a clip.

    Nothing that is asked changes it. Where no prefill can be shared (see `Backbone.shares_prefills`), the model looks
    anew for each question, with the same results.
    """

    def __init__(self, backbone: Backbone, clips: Sequence[ClipInput], system: str | None = None) -> None:
        self.backbone = backbone
        self.clips = clips
        self.system = system
        any_prompt = Prompt(system=system, question="?", stem="?")
        self._begun = [
            (
                places,
                backbone.begin(without_question(backbone.processor, inputs, any_prompt, len(clips[0].views), {}))[0],
            )
            for places, inputs in (backbone.prepared(clips, any_prompt) if backbone.shares_prefills else ())
        ]

    def ask(self, prompts: Sequence[Prompt]) -> list[list[LevelLogits]]:
        """Several questions about each clip.

        Returns:
            For each clip one `LevelLogits` a prompt: those that `Backbone.read` gives.

        Raises:
            ConfigError: a prompt's system message is not the one that the clips were looked at with.
            ModelError: see `Backbone.read`.
        """
        self._check(prompts)
        if not self._begun:
            columns = [self.backbone.read(self.clips, prompt) for prompt in prompts]
        else:
            questions = [[self._tokens(clip, prompt) for prompt in prompts] for clip in self.clips]
            logits = torch.stack(
                _by_place(
                    (places, self.backbone.go_on(deepcopy(begun), [questions[place] for place in places]))
                    for places, begun in self._begun
                )
            )
            videos = len(self.clips[0].views)
            columns = [self.backbone.level_logits(logits[:, number], prompt, videos)
                       for number, prompt in enumerate(prompts)]  # fmt: skip
        return [list(row) for row in zip(*columns, strict=True)]

    def continue_texts(self, prompts: Sequence[Prompt], max_tokens: int) -> list[str]:
        """Go on from the stem of a prompt a clip, greedily, to the end of the answer or for `max_tokens`.

        Args:
            prompts: one a clip; their levels play no part.

        Returns:
            What follows each stem, from the space between on.

        Raises:
            ConfigError: see `ask`.
        """
        self._check(prompts)
        started = self._started(list(zip(self.clips, prompts, strict=True)))
        answers = _by_place((places, self._write(context, logits, max_tokens)) for places, context, logits in started)
        tokenizer = self.backbone.processor.tokenizer
        return [text_after(tokenizer, prompt.stem, answer) for prompt, answer in zip(prompts, answers, strict=True)]

    def _started(self, asked: Sequence[tuple[ClipInput, Prompt]]) -> Iterator[tuple[list[int], Context, torch.Tensor]]:
        """Places, context and logits of the first word of each batch, one question a clip."""
        for places, begun in self._begun:
            context = deepcopy(begun)
            yield places, context, self.backbone.go_on(context, [[self._tokens(*asked[each])] for each in places])[:, 0]
        if not self._begun:
            for place, (clip, prompt) in enumerate(asked):
                inputs = prepare_inputs(self.backbone.processor, [clip], prompt).to(self.backbone.device)
                yield [place], *self.backbone.begin(inputs)

    def _write(self, context: Context, logits: torch.Tensor, max_tokens: int) -> list[list[int]]:
        """The likeliest token again and again, for all clips of a context; `logits` are those of the first."""
        configured: Any = self.backbone.model.generation_config.eos_token_id
        ends = configured if isinstance(configured, list) else [configured]
        stops = {self.backbone.processor.tokenizer.eos_token_id, *ends}
        written: list[list[int]] = [[token] for token in logits.argmax(dim=-1).tolist()]
        while len(written[0]) < max_tokens and any(stops.isdisjoint(row) for row in written):
            logits = self.backbone.go_on(context, [[row[-1:]] for row in written])[:, 0]
            for row, token in zip(written, logits.argmax(dim=-1).tolist(), strict=True):
                row.append(token)
        return [list(takewhile(lambda token: token not in stops, row)) for row in written]

    def _tokens(self, clip: ClipInput, prompt: Prompt) -> list[int]:
        return question_tokens(self.backbone.processor, prompt, len(clip.views), clip.slots)

    def _check(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if prompt.system != self.system:
                raise ConfigError(
                    f"the question {prompt.question!r} has the system message {prompt.system!r}, but the clips were "
                    f"looked at with {self.system!r}: make a prefill for it"
                )
