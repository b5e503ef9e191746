"""Ask several questions about the same clips; their video tokens are processed only once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from itertools import takewhile
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from lmm_qa.errors import ConfigError
from lmm_qa.model.inputs import ClipInput, decode_continuation, prepare_inputs, question_tokens, remove_question
from lmm_qa.model.levels import LevelLogits
from lmm_qa.model.prompt import Prompt

if TYPE_CHECKING:
    from lmm_qa.model.backbone import Backbone, CachedPrefix

T = TypeVar("T")

ANY_PROMPT = Prompt(question="?", stem="?")


class SharedPrefill:
    """The KV cache of clips up to the end of their videos, from which every question continues.

    Questions leave it unchanged. If the model cannot share a prefill (see `Backbone.can_share_prefill`), each question
    processes the clips again, with the same results.
    """

    def __init__(self, backbone: Backbone, clips: Sequence[ClipInput], prompt: Prompt = ANY_PROMPT) -> None:
        """
        Args:
            prompt: has what all questions must share, because it comes before them: `Prompt.before_question`.
        """
        self.backbone = backbone
        self.clips = clips
        self.before_question = prompt.before_question
        any_prompt = ANY_PROMPT.model_copy(update=self.before_question)
        self._prefixes: list[tuple[list[int], CachedPrefix]] = []
        for indices, inputs in backbone.prepare_batches(clips, any_prompt) if backbone.can_share_prefill else ():
            videos = remove_question(backbone.processor, inputs, any_prompt, len(clips[0].views), {})
            self._prefixes.append((indices, backbone.prefill(videos)[0]))

    def level_logits(self, prompts: Sequence[Prompt]) -> list[list[LevelLogits]]:
        """Ask several questions about each clip.

        Returns:
            For each clip one `LevelLogits` per prompt, equal to those of `Backbone.level_logits`.

        Raises:
            ConfigError: a prompt differs from this prefill's before the question.
            ModelError: see `Backbone.level_logits`.
        """
        self._check_prompts(prompts)
        if self._prefixes:
            questions = [[self._question_tokens(clip, prompt) for prompt in prompts] for clip in self.clips]
            batches = (
                (indices, self.backbone.extend_cache(deepcopy(prefix), [questions[index] for index in indices]))
                for indices, prefix in self._prefixes
            )
            logits = torch.stack(in_clip_order(batches))
            videos = len(self.clips[0].views)
            columns = [
                self.backbone.select_level_logits(logits[:, column], prompt, videos)
                for column, prompt in enumerate(prompts)
            ]
        else:
            columns = [self.backbone.level_logits(self.clips, prompt) for prompt in prompts]
        return [list(row) for row in zip(*columns, strict=True)]

    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        """Continue the stem of one prompt per clip by greedy decoding, up to the end of the answer.

        Args:
            prompts: one per clip; their levels are ignored.
            max_new_tokens: length limit of the answers.

        Returns:
            The text after each stem, including the space between.

        Raises:
            ConfigError: see `level_logits`.
        """
        self._check_prompts(prompts)
        started = self._ask_each(list(zip(self.clips, prompts, strict=True)))
        answers = in_clip_order(
            (indices, self._decode_greedily(prefix, logits, max_new_tokens)) for indices, prefix, logits in started
        )
        tokenizer = self.backbone.processor.tokenizer
        return [
            decode_continuation(tokenizer, prompt.stem, answer) for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def _ask_each(
        self, questions: Sequence[tuple[ClipInput, Prompt]]
    ) -> Iterator[tuple[list[int], CachedPrefix, torch.Tensor]]:
        """Ask one question per clip: indices of each batch, its cache, (B, vocabulary) logits of the first token."""
        for indices, prefix in self._prefixes:
            extended = deepcopy(prefix)
            tokens = [[self._question_tokens(*questions[index])] for index in indices]
            yield indices, extended, self.backbone.extend_cache(extended, tokens)[:, 0]
        if not self._prefixes:
            for index, (clip, prompt) in enumerate(questions):
                inputs = prepare_inputs(self.backbone.processor, [clip], prompt).to(self.backbone.device)
                yield [index], *self.backbone.prefill(inputs)

    def _decode_greedily(self, prefix: CachedPrefix, logits: torch.Tensor, max_new_tokens: int) -> list[list[int]]:
        """Token ids of each answer without its end token.

        Args:
            logits: (B, vocabulary) of the first token.
        """
        configured: Any = self.backbone.model.generation_config.eos_token_id
        ends = configured if isinstance(configured, list) else [configured]
        stops = {self.backbone.processor.tokenizer.eos_token_id, *ends}
        answers: list[list[int]] = [[token] for token in logits.argmax(dim=-1).tolist()]
        while len(answers[0]) < max_new_tokens and any(stops.isdisjoint(answer) for answer in answers):
            logits = self.backbone.extend_cache(prefix, [[answer[-1:]] for answer in answers])[:, 0]
            for answer, token in zip(answers, logits.argmax(dim=-1).tolist(), strict=True):
                answer.append(token)
        return [list(takewhile(lambda token: token not in stops, answer)) for answer in answers]

    def _question_tokens(self, clip: ClipInput, prompt: Prompt) -> list[int]:
        return question_tokens(self.backbone.processor, prompt, len(clip.views), clip.slots)

    def _check_prompts(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            for option, value in prompt.before_question.items():
                if value != self.before_question[option]:
                    raise ConfigError(
                        f"the question {prompt.question!r} has {option} {value!r}, but this prefill was made with "
                        f"{self.before_question[option]!r}: make another one for it"
                    )


def in_clip_order(batches: Iterable[tuple[Sequence[int], Iterable[T]]]) -> list[T]:
    """Flatten the results of batches, each with the indices of its clips, into the order of the clips."""
    results = {index: result for indices, batch in batches for index, result in zip(indices, batch, strict=True)}
    return [results[index] for index in range(len(results))]
