"""Explanations in words: the request to a model, the check of its answer, and the template text that may replace it.

The model continues a sentence that already states the level, and it is given the defects that were found. Its words
never affect the score. If they contradict the rating or the measurements, a template text is shown instead. The same
templates produce the explanations in training data. Text only: no model is used here.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Self

from pydantic import model_validator

from lmm_qa.config import Settings
from lmm_qa.defects.vocabulary import BY_NAME
from lmm_qa.model.prompt import Prompt
from lmm_qa.model.rater_config import ExplanationCheck

MAX_NAMED = 3
"""The model is told at most this many defects, the likeliest first."""

MUST_NAME = 2
"""The grammar check requires the first this many of them to be named."""

REPEATED_WORDS = 5
"""The grammar check rejects a run of this many words that occurs twice: no template contains one."""

MIN_WORDS = 3
"""An explanation, or a sentence under the grammar check, with fewer words counts as incomplete."""

Spans = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Finding:
    """A defect that was found in a clip."""

    defect: str
    """Its name in `lmm_qa.defects.vocabulary`."""
    probability: float
    seconds: Spans = ()
    """Start and end of each occurrence; empty if it lasts for the whole clip or its times are unknown."""

    def to_row(self) -> dict[str, object]:
        """As plain data, for a results row."""
        seconds = [[round(second, 2) for second in span] for span in self.seconds] or None
        place = BY_NAME[self.defect].place
        return {"defect": self.defect, "probability": self.probability, "place": place, "seconds": seconds}


class ExplanationRequest(Settings):
    """Contents of `prompts/explanation.yaml`."""

    question: str
    """The user message that follows the clip; `{defects}` in it is replaced by the list of findings."""

    @model_validator(mode="after")
    def _check_placeholders(self) -> Self:
        try:
            self.question.format(defects="")
        except (LookupError, ValueError) as error:
            raise ValueError(f"question may contain only the placeholder {{defects}}: {error}") from None
        return self


@cache
def _explanation_request() -> ExplanationRequest:
    with resources.as_file(resources.files("lmm_qa.prompt_files") / "explanation.yaml") as file:
        return ExplanationRequest.read(file)


def explanation_prompt(prompt: Prompt, found: Sequence[Finding]) -> Prompt:
    """The prompt that asks for an explanation of a rating made with `prompt`; the answer starts with `opening`."""
    question = _explanation_request().question.format(defects=describe_findings(found))
    own = {"question": question.replace("{", "{{").replace("}", "}}"), "stem": prompt.stem}
    return Prompt(**prompt.before_question, **own)


def opening(prompt: Prompt, level: str) -> str:
    """The first words of every explanation: the stem of the rating prompt and the level."""
    return f"{prompt.stem} {level}"


def describe_findings(found: Sequence[Finding]) -> str:
    """The list of defects that the model is given: `blur; stall from 1.2 to 2.0 s`, or `none`."""
    return "; ".join(BY_NAME[each.defect].term + _times(each.seconds) for each in found[:MAX_NAMED]) or "none"


def _times(seconds: Spans) -> str:
    return " and".join(f" from {start:.1f} to {end:.1f} s" for start, end in seconds[:2])


# --- Template sentences ----------------------------------------------------------------------------------------------

_CLAUSES: dict[str, tuple[str, ...]] = {
    "blur": ("the picture is {adverb} blurred", "there is {adjective} blur over the whole picture",
             "{adjective} blur takes the texture from hair and skin"),
    "noise": ("{adjective} noise covers the picture", "the picture is {adverb} noisy",
              "there is {adjective} noise in the flat parts of the picture"),
    "compression": ("compression {adverb} shows as blocks and ringing",
                    "there are {adjective} compression marks around the face",
                    "{adjective} compression has washed out the texture"),
    "banding": ("{adjective} banding breaks smooth shades into steps",
                "there is {adjective} banding on smooth surfaces"),
    "exposure": ("the exposure is {adverb} wrong", "{adverb} wrong exposure hides detail in the face"),
    "colour": ("the colours are {adverb} shifted", "there is a {adjective} colour cast over the whole picture",
               "the skin has a {adjective} colour cast"),
    "mouth": ("the mouth is {adverb} smeared", "the teeth run together in a {adverb} malformed mouth",
              "there is {adjective} smearing of the mouth and the teeth"),
    "lips": ("the lips hardly move{when}", "the mouth stands still while the head moves{when}",
             "there is little lip movement{when}"),
    "movement": ("the movement of the face is {adverb} unnatural",),
    "geometry": ("the face is {adverb} warped", "there is {adjective} warping of the face",
                 "eyes and nose sway out of their places in a {adverb} warped face"),
    "identity": ("the identity of the person drifts", "the person {adverb} changes, an identity drift",
                 "there is {adjective} identity drift towards the end"),
    "background": ("the background is {adverb} unstable", "the background wobbles behind the head",
                   "there is {adjective} wobbling of the background"),
    "seam": ("a {adjective} seam runs around the face", "the face looks pasted, with a {adjective} seam around it"),
    "flicker": ("the brightness flickers {adverb}", "there is {adjective} flicker of the brightness"),
    "stall": ("the picture freezes{when}", "the clip stalls{when}", "a stall holds the picture{when}"),
    "buffering": ("initial buffering holds the first picture{when}", "the clip opens with buffering{when}",
                  "buffering delays the start{when}"),
    "jerkiness": ("the movement is {adverb} jerky", "the frame rate is low, and the movement {adverb} jerky"),
    "bitrate_switch": ("the bit rate is lower{when}", "the bit rate drops{when}",
                       "a segment has a lower bit rate than the rest{when}"),
    "quantisation": ("the head shows {adjective} quantisation, as a coarse 3D model does",),
}  # fmt: skip

_STRENGTHS = (
    (0.45, ("slightly", "mildly"), ("slight", "mild")),
    (0.7, ("clearly", "visibly"), ("clear", "visible")),
    (1.01, ("strongly", "severely"), ("strong", "severe")),
)
"""Upper limit of the strength, adverbs and adjectives for it."""

_POSITIVE = {
    "blur": "the face is sharp",
    "noise": "flat parts are clean",
    "compression": "fine texture is kept",
    "exposure": "the face is well lit",
    "colour": "the colours are natural",
    "mouth": "the teeth are distinct",
    "geometry": "the face keeps its shape",
    "identity": "the person stays the same",
    "background": "what is behind the head is steady",
    "flicker": "the light is steady",
    "jerkiness": "the movement is smooth",
    "stall": "the clip plays without a halt",
}
"""Positive remark about a clip without the defect."""

_JOIN_DEFECTS = (": {}.", ", as {}.", " because {}.", ". {}.")

_NO_DEFECT = (". No defect stands out.", ": no defect stands out.", ". There is no visible defect.")

_UNKNOWN_CAUSE = (". What lowers it is none of the defects asked about.", ", for none of the reasons asked about.")

_INTRODUCE_POSITIVE = ("{}.", "On the positive side, {}.", "Still, {}.", "At least {}.")


def template_text(
    found: Sequence[Finding],
    absent: Collection[str],
    rng: random.Random,
    strengths: Sequence[float] = (),
    good: bool = True,
) -> str:
    """The text after the opening, such as `: the picture is blurred. The colours are natural.`

    Args:
        found: the defects, the main ones first.
        absent: names of defects that the clip does not have; the positive remark is about one of them.
        rng: chooses between the templates.
        strengths: strength of each defect in `found`, 0 to 1; if empty, the text does not say how strong they are.
        good: whether the level is one that a clip without defects can have (see `is_good`).
    """
    clauses = []
    for number, finding in enumerate(found[:MAX_NAMED]):
        adverb = adjective = ""
        if number < len(strengths):
            degree = next(degree for degree, (limit, *_) in enumerate(_STRENGTHS) if strengths[number] < limit)
            # No defect is called severe in a clip of a good level.
            _, adverbs, adjectives = _STRENGTHS[min(degree, len(_STRENGTHS) - 2) if good else degree]
            adverb, adjective = rng.choice(adverbs), rng.choice(adjectives)
        template = rng.choice(_CLAUSES[finding.defect])
        clause = template.format(adverb=adverb, adjective=adjective, when=_times(finding.seconds))
        clauses.append(re.sub(r" +", " ", clause).strip())
    if len(clauses) > 1 and rng.random() < 0.3:
        text = ". " + ". ".join(_capitalize(clause) for clause in clauses) + "."
    elif clauses:
        listed = clauses[0] if len(clauses) == 1 else f"{', '.join(clauses[:-1])}, and {clauses[-1]}"
        join = rng.choice(_JOIN_DEFECTS)
        text = join.format(_capitalize(listed) if join.startswith(".") else listed)
    else:
        text = rng.choice(_NO_DEFECT if good else _UNKNOWN_CAUSE)
    if remarks := [remark for name, remark in _POSITIVE.items() if name in absent]:
        introduction = rng.choice(_INTRODUCE_POSITIVE if clauses else _INTRODUCE_POSITIVE[:1])
        text += " " + _capitalize(introduction.format(rng.choice(remarks)))
    return text


def lip_sync_sentence(offset: float | None) -> str:
    """How lips and sound are out of step: `The sound is about 0.4 s ahead of the lips.`

    Args:
        offset: seconds by which the sound is late; None if it fits the lips at no offset.
    """
    if offset is None:
        return "The sound does not fit the lips."
    return f"The sound is about {abs(offset):.1f} s {'behind' if offset > 0 else 'ahead of'} the lips."


def is_good(level: str, levels: Sequence[str]) -> bool:
    """Whether a level is in the upper half; in the lower half something must be wrong. `levels`: worst first."""
    return 2 * list(levels).index(level) > len(levels) - 1


def _capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]


# --- Defects that a text mentions ------------------------------------------------------------------------------------

_MENTIONS = {
    "blur": r"blur\w*|unsharp\w*|out of focus|soft focus",
    "noise": r"nois[ey]\w*|grain\w*",
    "compression": r"compress\w*|block(?:y|ing|iness|s and)|ringing|macroblock\w*|pixelat\w*",
    "banding": r"banding|posteri[sz]\w*",
    "exposure": r"(?:wrong|bad|poor|incorrect) exposure|exposure is \w*\s?(?:wrong|off|bad|poor|too \w+)"
    r"|(?:over|under)-?expos\w*|too (?:dark|bright)",
    "colour": r"colou?r cast|colou?rs? (?:is|are) \w*\s?(?:shifted|wrong|off)|tint\w*",
    "mouth": r"smear\w*|malformed|teeth run",
    "lips": r"lips? (?:hardly|barely)|little lip movement|mouth stands still",
    "movement": r"unnatural(?:ly)? (?:\w+ )?(?:mov\w+|motion|expression\w*)"
    r"|(?:mov\w+|motion|expressions?)[^.,;:]{0,30} unnatural\w*",
    "geometry": r"warp\w*|distort\w*|deform\w*",
    "identity": r"identity (?:\w+ ){0,3}?(?:drift|chang|shift)\w*|person \w*\s?changes",
    "background": r"background (?:is|was) \w*\s?unstable|unstable background|wobbl\w*",
    "seam": r"seams?(?! of)|pasted",
    "flicker": r"flicker\w*",
    "stall": r"stall\w*|freez\w*|frozen?|picture stands still",
    "buffering": r"buffer\w*",
    "jerkiness": r"jerk\w*|stutter\w*|judder\w*|(?:low|uneven|irregular) frame rate"
    r"|frame rate (?:is|was) \w*\s?(?:low|uneven|irregular)|frame rate drops",
    "bitrate_switch": r"low(?:er)? bit-? ?rate|bit-? ?rate (?:is |was )?(?:drops|falls|switches|low|lower)",
    "quantisation": r"quanti[sz]\w*",
}
"""Keywords by which a text says that a clip has a defect."""

_DELIBERATE = (
    r"background blur|(?:blurred|blurry|out of focus) background|background is \w*\s?(?:blurr\w+|out of focus)"
    r"|tinted (?:glasses|lenses|windows?)"
)
"""Not defects, though the same words are used."""

_NEGATED_BEFORE = (
    r"\b(?:(?:no|not|without|free (?:of|from)|neither|nor|hardly any|isn't|aren't)\b[^.;:]{0,25}"
    r"|(?:hardly|barely|(?<!a )little|minimal) (?:any |visible )?)$"
)

_NEGATED_AFTER = r"[^.,;:]{0,30}\b(?:is|are|was|were)(?:n't| not| hardly| barely| absent| minimal| negligible)\b"

_NEGATION = (
    r"\b(?:no|not|without|free (?:of|from)|neither|nor|isn't|aren't) "
    r"(?:(?:an?|any|visible|obvious|apparent|noticeable|perceptible|(?:sign|trace|hint)s? of) )*$"
)


def mentioned_defects(text: str) -> set[str]:
    """Names of the defects that a text says a clip has, by keywords; a negation near a keyword excludes it."""
    return {name for name, before, after in _keywords(text) if not _is_negated(before, after)}


def _negated_defects(text: str) -> set[str]:
    """Names of the defects that a text says a clip does not have at all."""
    return {name for name, before, _ in _keywords(text) if re.search(_NEGATION, before)}


def _keywords(text: str) -> Iterable[tuple[str, str, str]]:
    """Each keyword of a defect: the name of the defect, and the text before and after the keyword."""
    text = re.sub(_DELIBERATE, "", text.lower())
    for name, pattern in _MENTIONS.items():
        for match in re.finditer(rf"\b(?:{pattern})\b", text):
            yield name, text[: match.start()], text[match.end() :]


def _is_negated(before: str, after: str) -> bool:
    return bool(re.search(_NEGATED_BEFORE, before) or re.match(_NEGATED_AFTER, after))


# --- Whether a text may be shown -------------------------------------------------------------------------------------

_VIDEO = r"(?:[\w-]+ )?(?:video|clip)"

_SUBJECT = (
    r"(?:(?:^|[.!?,;:]\s*|\b(?:the|this|its|overall|general|visual|video|picture|image|and|but|that|because|\w+'s) )"
    rf"quality(?: of (?:the|this) (?:{_VIDEO}|picture|image))?"
    rf"|(?<!of )\b(?:the|this) {_VIDEO}|\b(?:the|its) (?:overall )?(?:rating|score|level)|\bit|\bthis)"
)

_BE = r"(?:is|was|looks|seems|appears|remains|can be called|(?:is|was) (?:rated|considered|judged)(?: as)?)(?: to be)?"

_DEGREE = r"(?:(?:very|quite|rather|really|overall|generally|mostly|still|pretty|relatively|fairly|only|truly) ){0,2}"

_STATEMENT_ENDS = (
    r"(?=\s*(?:$|[.,;:!?)])| (?:and|or|but|because|as|since|with|without|though|although|despite|overall|even|while|"
    r"throughout|in (?:every|all|general)|on the whole|quality|video|clip)\b)"
)

_LEVEL_STATEMENTS = (
    rf"{_SUBJECT} {_BE} {_DEGREE}(LEVEL){_STATEMENT_ENDS}",
    rf"{_SUBJECT} (?:is|was|has|shows|offers) (?:of )?(?:an? )?{_DEGREE}(LEVEL)"
    r" (?:overall |visual |video |picture |image |talking-head )?(?:quality|video|clip|rating)\b",
    rf"\ban? {_DEGREE}(LEVEL)(?:[ -]quality)? {_VIDEO}\b",
    rf"(?:[.!?] |\boverall[,:]? ){_DEGREE}(LEVEL) quality{_STATEMENT_ENDS}",
    rf"\boverall[,:]? {_DEGREE}(LEVEL){_STATEMENT_ENDS}",
)
"""Patterns of sentences that state the level of the whole clip, not of its lighting or skin, for example."""

_NOT_STATED = r"\b(?:not|never|than|would|could|should|if|short of|far from|instead of|\w+n't)\b[^.;:]{0,20}$"

_CLAIMS_NO_DEFECT = (
    r"\b(?:no|without) (?:a |any )?(?:(?:visible|obvious|apparent|noticeable) )?(?:defect|flaw)s?\b"
    r"(?! (?:other|besides|except|apart|(?:in|on|around) (?!the (?:video|clip|picture|image))))"
)

_SECONDS = r"(?:\s*|-)(?:s|sec|secs|seconds?)\b(?! (?:video|clip))"

_TIME = rf"\b\d+(?:\.\d+)?(?=(?:\s*(?:to|and|-|\u2013)\s*\d+(?:\.\d+)?)?{_SECONDS})"
"""A number of seconds, but not that in "a 4-second clip"."""

_SENTENCE_END = r"(?<=[.!?])\s+"


def objection(
    text: str,
    level: str,
    levels: Sequence[str],
    found: Sequence[Finding],
    absent: Collection[str] = (),
    check: ExplanationCheck = "facts",
) -> str | None:
    """The reason why an explanation must not be shown beside its rating; None if there is none.

    Args:
        text: the whole explanation, including the opening.
        level: the level of the rating.
        levels: all level words, worst first.
        found: the defects that were found, the likeliest first.
        absent: the defects that were judged and not found.
        check: `facts` rejects a text that contradicts the level or a measurement, is empty or incomplete; `grammar`
            also rejects a text that no template could have produced, which is how a very small model fails.
    """
    reason = _contradiction(text, level, levels, found, absent)
    return reason or (_deviation(text, level, levels, found[:MAX_NAMED]) if check == "grammar" else None)


def _contradiction(
    text: str, level: str, levels: Sequence[str], found: Sequence[Finding], absent: Collection[str]
) -> str | None:
    lower, names = text.lower(), {finding.defect for finding in found}
    if (stated := _contradicting_level(lower, level, levels, bool(found))) is not None:
        return f"it says {stated}, and the rating {level}"
    if invented := sorted(mentioned_defects(text) & set(absent)):
        return f"it names what was not found: {', '.join(invented)}"
    if negated := sorted((_negated_defects(text) - mentioned_defects(text)) & names):
        return f"it denies what was found: {', '.join(negated)}"
    if praised := next((name for name in names if name in _POSITIVE and _POSITIVE[name] in lower), None):
        return f"it says that {_POSITIVE[praised]}, and {praised} was found"
    if (time := _wrong_time(text, found)) is not None:
        return f"it gives a time that was not measured: {time} s"
    if claim := re.search(_CLAIMS_NO_DEFECT, lower):
        if found:
            return f"it says {claim[0]}, and {', '.join(sorted(names))} was found"
        if not is_good(level, levels):
            return f"it says {claim[0]}, and the rating {level}"
    if not re.search(r"[.!?][\"'\u201d\u2019)]*$", text.rstrip()):
        return "it does not come to an end"
    if len(re.findall(r"\w+", re.split(rf"\b{re.escape(level)}\b", text, maxsplit=1)[-1])) < MIN_WORDS:
        return "it is empty"
    return None


def _contradicting_level(text: str, level: str, levels: Sequence[str], defective: bool) -> str | None:
    """Another level than the rated one that a text, in lower case, states for the whole clip."""
    wrong = {*levels} - {level} | ({"flawless", "perfect"} if defective or not is_good(level, levels) else set())
    words = "|".join(re.escape(each.lower()) for each in sorted(wrong))
    for pattern in _LEVEL_STATEMENTS:
        for match in re.finditer(pattern.replace("LEVEL", words), text):
            if not re.search(_NOT_STATED, text[: match.start()]):
                return match[1]
    return None


def _wrong_time(text: str, found: Sequence[Finding]) -> str | None:
    """A time that a text gives for a defect and that matches no measured start, end or duration to the digits given."""
    for sentence in re.split(_SENTENCE_END, text):
        named = mentioned_defects(sentence)
        spans = [span for finding in found if finding.defect in named for span in finding.seconds]
        measured = [second for start, end in spans for second in (start, end, end - start)]
        for time in re.findall(_TIME, sentence) if named else ():
            tolerance = 0.5 * 10.0 ** -len(time.partition(".")[2]) + 1e-6
            if not any(abs(float(time) - second) <= tolerance for second in measured):
                return str(time)
    return None


# --- The grammar check -----------------------------------------------------------------------------------------------

_CONJUNCTIONS = r"that|which|who|where|when|while|as|because|since|and|but|or|if|than|what|how|so|whether"

_TWO_VERBS = (
    r"(?<!what )(?<!that )(?<!which )(?<!who )\b(?:is|are)\b"
    rf"(?:(?!\b(?:{_CONJUNCTIONS})\b)[^.,;:])*?\b(?:is|are|stands|covers|takes|hides|breaks)\b"
)
"""Two verbs in one clause, as in *the face is steady stands out*."""

_VERB = (
    r"\b(?:is|are|was|were|be|been|has|have|had|do|does|did|can|could|may|might|must|will|would|should|"
    r"\w{2,}(?:s|ed))\b"
)
"""A verb, or a word that looks like one."""

_SEVERE = rf"\b(?:{'|'.join(itertools.chain(*_STRENGTHS[-1][1:]))})\b"


def _deviation(text: str, level: str, levels: Sequence[str], told: Sequence[Finding]) -> str | None:
    """How a text that contradicts nothing differs from those that the templates can produce."""
    lower, named = text.lower(), mentioned_defects(text)
    if invented := sorted(named - {finding.defect for finding in told}):
        return f"it names what was not found: {', '.join(invented)}"
    if omitted := next((finding.defect for finding in told[:MUST_NAME] if finding.defect not in named), None):
        return f"it leaves out what was found: {omitted}"
    if is_good(level, levels) and (severe := re.search(_SEVERE, lower)):
        return f"it says {severe[0]}, and the rating {level}"
    sentences = re.split(_SENTENCE_END, text.strip())[1:]
    if broken := next((sentence for sentence in sentences if len(sentence.split()) < MIN_WORDS), None):
        return f"it breaks off: {broken}"
    if repeated := _repetition(lower):
        return f"it repeats itself: {repeated}"
    if verbless := next((sentence for sentence in sentences if not re.search(_VERB, sentence.lower())), None):
        return f"it has a sentence without a verb: {verbless}"
    if doubled := re.search(_TWO_VERBS, lower):
        return f"it has two verbs in one clause: {doubled[0]}"
    return None


def _repetition(text: str) -> str | None:
    """Words in a lower-case text that are repeated at once, or a run of `REPEATED_WORDS` in two clauses.

    Clauses end at punctuation; runs with a number are ignored, since two defects can have the same times.
    """
    if repeated := re.search(r"\b(\w+(?:\W+\w+){2,4})\W+\1\b", text):
        return repeated[1]
    runs = []
    for clause in re.split(r"[.,;:](?:\s|$)", text):
        words = re.findall(r"\w+", clause)
        runs += [" ".join(words[start : start + REPEATED_WORDS]) for start in range(len(words) - REPEATED_WORDS + 1)]
    return next((run for run in runs if runs.count(run) > 1 and not re.search(r"\d", run)), None)


def explain(
    text: str | None,
    level: str,
    levels: Sequence[str],
    found: Sequence[Finding],
    absent: Collection[str],
    seed: str,
    start: str,
    check: ExplanationCheck = "facts",
) -> tuple[str, str | None]:
    """The explanation to show: the model's text if there is no objection, otherwise a template text.

    Args:
        text: the model's continuation of `start`; None if the model was not asked.
        level, levels, found, absent, check: see `objection`.
        seed: chooses the template text; the same for the same clip.
        start: first words of the explanation, see `opening`; a space before them is not shown.

    Returns:
        the text, and the objection to the model's own if it was replaced.
    """
    start = start.lstrip()
    reason: str | None = "the model was not asked"
    if text is not None and (reason := objection(start + text, level, levels, found, absent, check)) is None:
        return start + text, None
    return start + template_text(found, absent, random.Random(seed), good=is_good(level, levels)), reason
