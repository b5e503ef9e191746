"""The words about a rating: what a model is told when it is asked to explain, and whether its answer may be shown.

The model continues a sentence that is begun with the level that was read, and is told which defects were found. Its
words never touch the score; and where they contradict it, name a defect that was not found or leave out one that was,
the sentence of a small grammar is shown in their place. The same grammar writes the sentences of the training data.
Pure text: no model.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Self

from pydantic import model_validator

from lmm_qa.config import Settings
from lmm_qa.defects.vocabulary import BY_NAME
from lmm_qa.model.prompt import Prompt

MAX_NAMED = 3


"""Defects that an explanation names: the likeliest ones."""


LEAST_NAMED = 2


"""Of these it must name the first so many."""


CLAUSE = 5


"""Words that make a clause: no sentence of the grammar has the same so many twice."""


LEAST_WORDS = 3


"""Words that a sentence of an explanation has: a small model ends some after *The face.*"""


Seconds = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Finding:
    """A defect that is said to be there."""

    defect: str
    """Its name in `lmm_qa.defects.vocabulary`."""
    probability: float
    seconds: Seconds = ()
    """From, to, of each time; empty: all the time, or not known."""

    def to_row(self) -> dict[str, object]:
        """As plain data."""
        seconds = [[round(moment, 2) for moment in span] for span in self.seconds] or None
        place = BY_NAME[self.defect].place
        return {"defect": self.defect, "probability": self.probability, "place": place, "seconds": seconds}


class Wording(Settings):
    """`prompts/explanation.yaml`."""

    question: str
    """The user's message after the clip; `{defects}` in it becomes the list of what was found."""

    @model_validator(mode="after")
    def _takes_defects(self) -> Self:
        try:
            self.question.format(defects="")
        except (LookupError, ValueError) as error:
            raise ValueError(f"question may have the one slot {{defects}}: {error}") from None
        return self


@cache
def _wording() -> Wording:
    with resources.as_file(resources.files("lmm_qa.prompt_files") / "explanation.yaml") as file:
        return Wording.read(file)


def explanation_prompt(prompt: Prompt, found: Sequence[Finding]) -> Prompt:
    """What the model is asked, for a rating that was read with `prompt`; its answer begins with `opening`."""
    question = _wording().question.format(defects=facts(found))
    return Prompt(system=prompt.system, question=question.replace("{", "{{").replace("}", "}}"), stem=prompt.stem)


def opening(prompt: Prompt, level: str) -> str:
    """How every explanation begins."""
    return f"{prompt.stem} {level}"


def facts(found: Sequence[Finding]) -> str:
    """The defects as the model is told them: `blur; stall from 1.2 to 2.0 s`, or `none`."""
    told = [BY_NAME[one.defect].term + _when(one.seconds) for one in found[:MAX_NAMED]]
    return "; ".join(told) or "none"


def _when(seconds: Seconds) -> str:
    return " and".join(f" from {first:.1f} to {last:.1f} s" for first, last in seconds[:2])


# --- the grammar -----------------------------------------------------------------------------------------------------

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


_MERITS = {
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


_JOINED = (": {}.", ", as {}.", " because {}.", ". {}.")


_FLAWLESS = (". No defect stands out.", ": no defect stands out.", ". There is no visible defect.")


_UNTOLD = (". What lowers it is none of the defects asked about.", ", for none of the reasons asked about.")


_MERIT = ("{}.", "On the positive side, {}.", "Still, {}.", "At least {}.")


def sentence(
    found: Sequence[Finding],
    absent: Collection[str],
    draw: random.Random,
    strengths: Sequence[float] = (),
    good: bool = True,
) -> str:
    """What follows the opening, such as `: the picture is blurred. The colours are natural.`

    Args:
        found: the defects, the main ones first.
        absent: names of defects that are not there; what is good is chosen from their opposites.
        draw: where the variety comes from.
        strengths: of the defects found, 0 to 1; without them no word says how strong.
        good: whether the level is one that a clip without a defect may have (see `is_good`).
    """
    clauses = []
    for number, one in enumerate(found[:MAX_NAMED]):
        adverb = adjective = ""
        if number < len(strengths):
            degree = next(degree for degree, (limit, *_) in enumerate(_STRENGTHS) if strengths[number] < limit)
            # Nothing is said to be severe in a clip of a good level.
            _, adverbs, adjectives = _STRENGTHS[min(degree, len(_STRENGTHS) - 2) if good else degree]
            adverb, adjective = draw.choice(adverbs), draw.choice(adjectives)
        clause = draw.choice(_CLAUSES[one.defect]).format(adverb=adverb, adjective=adjective, when=_when(one.seconds))
        clauses.append(re.sub(r" +", " ", clause).strip().replace("a  ", "a "))
    if len(clauses) > 1 and draw.random() < 0.3:
        said = ". " + ". ".join(_capital(clause) for clause in clauses) + "."
    elif clauses:
        listed = clauses[0] if len(clauses) == 1 else f"{', '.join(clauses[:-1])}, and {clauses[-1]}"
        joined = draw.choice(_JOINED)
        said = joined.format(_capital(listed) if joined.startswith(".") else listed)
    else:
        said = draw.choice(_FLAWLESS if good else _UNTOLD)
    if merits := [merit for name, merit in _MERITS.items() if name in absent]:
        said += " " + _capital(draw.choice(_MERIT if clauses else _MERIT[:1]).format(draw.choice(merits)))
    return said


def is_good(level: str, levels: Sequence[str]) -> bool:
    """Whether a level is in the better half: below it, something must be wrong. `levels`: worst first."""
    return 2 * list(levels).index(level) > len(levels) - 1


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# --- whether words may be shown --------------------------------------------------------------------------------------

_MENTIONS = {
    "blur": r"blur\w*|unsharp\w*|out of focus|soft focus",
    "noise": r"nois[ey]\w*|grain\w*",
    "compression": r"compress\w*|block\w*|ringing|macroblock\w*|pixelat\w*",
    "banding": r"banding|posteri[sz]\w*",
    "exposure": r"exposure|(?:over|under)-?exposed|too (?:dark|bright)",
    "colour": r"colou?r cast|colou?rs? (?:is|are) \w*\s?(?:shifted|wrong|off)|tint\w*",
    "mouth": r"smear\w*|malformed|teeth run",
    "lips": r"lips? (?:hardly|barely)|lip movement|mouth stands still",
    "movement": r"unnatural\w*",
    "geometry": r"warp\w*|distort\w*|deform\w*",
    "identity": r"identity|person \w*\s?changes",
    "background": r"background (?:is|was) \w*\s?unstable|background wobbles|wobbl\w*",
    "seam": r"seams?|pasted",
    "flicker": r"flicker\w*",
    "stall": r"stall\w*|freez\w*|frozen?",
    "buffering": r"buffer\w*",
    "jerkiness": r"jerk\w*|stutter\w*|frame rate|judder\w*",
    "bitrate_switch": r"bit-? ?rate",
    "quantisation": r"quanti[sz]\w*",
}


_FAULTLESS = (
    r"\b(?:(?:no|without) (?:a |any )?(?:(?:visible|obvious|apparent|noticeable|major) )?(?:defect|flaw)s?\b"
    r"(?! (?:other|besides|except|apart))|(?<!not )flawless\w*)"
)


_LINKS = r"that|which|who|where|when|while|as|because|since|and|but|or|if|than|what|how|so|whether"


_TWO_VERBS = (
    r"(?<!what )(?<!that )(?<!which )(?<!who )\b(?:is|are)\b"
    rf"(?:(?!\b(?:{_LINKS})\b)[^.,;:])*?\b(?:is|are|stands|covers|takes|hides|breaks)\b"
)


"""Two verbs in one clause: *the face is steady stands out*. Not after a word that begins another clause."""


_VERB = (
    r"\b(?:is|are|was|were|be|been|has|have|had|do|does|did|can|could|may|might|must|will|would|should|"
    r"\w{2,}(?:s|ed))\b"
)


"""What is a verb, or looks like one: a sentence without is mostly a piece of one."""


_GRAVE = rf"\b(?:{'|'.join(itertools.chain(*_STRENGTHS[-1][1:]))})\b"


"""The words for what is strongest: no clip of a good level has earned them."""


_MOMENT = r"\b\d+(?:\.\d+)?(?=\s*(?:s|sec|secs|seconds?)\b|\s*(?:to|and|-|\u2013)\s*\d)"


"""A number of seconds."""


_NEGATION = r"\b(?:no|not|without|free of|neither|nor|hardly any|isn't|aren't)\b[^.;:]{0,25}$"


def mentions(text: str) -> set[str]:
    """Names of the defects that a text says are there: plain words, with a look at a negation before them."""
    text = text.lower()
    return {
        name
        for name, pattern in _MENTIONS.items()
        for match in re.finditer(rf"\b(?:{pattern})\b", text)
        if not re.search(_NEGATION, text[: match.start()])
    }


def objection(text: str, level: str, levels: Sequence[str], told: Sequence[Finding]) -> str | None:
    """Why an explanation may not be shown beside its rating; None if it may.

    Args:
        text: the whole explanation, opening included.
        level: the level word that was read.
        levels: all level words, worst first.
        told: the defects that it may name, the likeliest first, with the times that it may give.
    """
    lower, found = text.lower(), {one.defect for one in told}
    words = set(re.findall(r"\w+", lower))
    if others := sorted(words & (set(levels) - {level})):
        return f"it says {', '.join(others)}, and the rating {level}"
    named = mentions(text)
    if invented := sorted(named - found):
        return f"it names what was not found: {', '.join(invented)}"
    if left_out := next((one.defect for one in told[:LEAST_NAMED] if one.defect not in named), None):
        return f"it leaves out what was found: {left_out}"
    measured = re.findall(_MOMENT, facts(told))
    if guessed := next((moment for moment in re.findall(_MOMENT, lower) if moment not in measured), None):
        return f"it gives a time that was not measured: {guessed} s"
    if claim := re.search(_FAULTLESS, lower):
        if found:
            return f"it says {claim[0]}, and {', '.join(sorted(found))} was found"
        if not is_good(level, levels):
            return f"it says {claim[0]}, and the rating {level}"
    if is_good(level, levels) and (grave := re.search(_GRAVE, lower)):
        return f"it says {grave[0]}, and the rating {level}"
    if not text.rstrip().endswith("."):
        return "it does not come to an end"
    sentences = re.split(r"(?<=\.)\s+", text.strip())
    if broken := next((each for each in sentences[1:] if len(each.split()) < LEAST_WORDS), None):
        return f"it breaks off: {broken}"
    if praised := next((name for name in found if _MERITS.get(name, "\n") in lower), None):
        return f"it says that {_MERITS[praised]}, and {praised} was found"
    if again := _repeated(lower):
        return f"it repeats itself: {again}"
    if mute := next((each for each in sentences[1:] if not re.search(_VERB, each.lower())), None):
        return f"it has a sentence without a verb: {mute}"
    if torn := re.search(_TWO_VERBS, lower):
        return f"it has two verbs and nothing that joins them: {torn[0]}"
    return None


def _repeated(text: str) -> str | None:
    """What a text in lower case says twice: some words one after the other, or a clause anywhere; times may well be.
    A clause ends at a comma."""
    if twice := re.search(r"\b(\w+(?:\W+\w+){2,4})\W+\1\b", text):
        return twice[1]
    clauses = []
    for between in re.split(r"[.,;:](?:\s|$)", text):
        words = re.findall(r"\w+", between)
        clauses += [" ".join(words[start : start + CLAUSE]) for start in range(len(words) - CLAUSE + 1)]
    return next((one for one in clauses if clauses.count(one) > 1 and not re.search(r"\d", one)), None)


def explain(text: str | None, level: str, levels: Sequence[str], found: Sequence[Finding], absent: Collection[str],
            seed: str, begun: str) -> tuple[str, str | None]:  # fmt: skip
    """The model's words where they may be shown, else those of the grammar; and why, else.

    Args:
        text: what the model said after `begun`; None where it was not asked.
        level, levels: see `objection`.
        found, absent: of the profile.
        seed: whatever is the same for the same clip.
        begun: `opening`.
    """
    told = found[:MAX_NAMED]
    if text is None:
        why: str | None = "the model was not asked"
    else:
        whole = begun + text
        why = objection(whole, level, levels, told)
        if why is None:
            return whole, None
    return begun + sentence(told, absent, random.Random(seed), good=is_good(level, levels)), why
