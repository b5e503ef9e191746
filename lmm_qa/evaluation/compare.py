"""Compare generators by the ratings of their clips: is the new one better than the old one, and in what?

The clips of two sets are paired, and all statistics are about the differences within pairs, new minus old. Labels are
not needed. `lmm_qa.evaluation.evaluate` compares ratings with labels instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from pydantic import TypeAdapter

from lmm_qa.defects.vocabulary import BY_NAME
from lmm_qa.errors import ScoresError, UsageError, plural
from lmm_qa.evaluation.labels import preview
from lmm_qa.evaluation.metrics import Interval
from lmm_qa.evaluation.paired_statistics import (
    CONFIDENCE,
    POWER,
    RESAMPLES,
    GroupSums,
    Outcomes,
    detectable_difference,
    holm,
    mean_interval,
    outcomes,
    sign_test_p,
    wilcoxon_p,
)
from lmm_qa.evaluation.pairing import Pairing, RatingSet, check_same_rater, pair_sets
from lmm_qa.evaluation.selection import clip_groups
from lmm_qa.files.tables import Row, write_rows, writing
from lmm_qa.model.rater_config import EMBEDDED_NAME
from lmm_qa.ratings.rows import RatingRow

if TYPE_CHECKING:
    from rich.console import Console

TIE = 0.1
"""Scores that differ by no more are a tie, in MOS: the rater's own noise. With the embedded rater, 90% of clips change
by no more if they are encoded again without visible loss, see docs/guides/decide.md."""
SIGNIFICANT = 1 - CONFIDENCE
LARGEST = 10
"""Number of pairs in the list of those that differ most."""
SUFFIXES = (".json", ".csv", ".md")
"""Formats of a comparison."""

Decision = Literal["better", "worse", "no difference"]


@dataclass(frozen=True)
class DefectChange:
    """How often a defect was found in the clips of two sets."""

    defect: str
    judged: int
    """Pairs in which the defect was judged in both clips; the other numbers are about these."""
    old: int
    """Clips of the old set that have the defect."""
    new: int
    gained: int
    """Pairs of which only the new clip has it."""
    lost: int
    p: float
    """McNemar's exact test, Holm-corrected for the number of defects and sets that it can find a change in."""

    @property
    def testable(self) -> bool:
        """Whether the test would reach 5% if all pairs that differ did so in one direction. If not, it cannot find
        anything, right or wrong, and needs no correction (Tarone, Biometrics 46, 1990)."""
        return sign_test_p(self.gained + self.lost, 0) < SIGNIFICANT


@dataclass(frozen=True)
class ScorePair:
    """Two clips that belong together, and their scores."""

    old: str
    new: str
    group: str
    old_score: float
    new_score: float
    gained: tuple[str, ...]
    """Defects that only the new clip has."""
    lost: tuple[str, ...]

    @property
    def difference(self) -> float:
        """New minus old score."""
        return self.new_score - self.old_score


@dataclass(frozen=True)
class Unpaired:
    """Clips that are not in the statistics."""

    failed: tuple[tuple[str, str], ...]
    """Pairs of which at least one clip could not be rated."""
    old: tuple[str, ...]
    """Clips of the old set without a partner."""
    new: tuple[str, ...]


@dataclass(frozen=True)
class SetComparison:
    """A set of clips compared with the old one."""

    old: str
    new: str
    """Names of the sets."""
    n: int
    """Number of pairs."""
    groups: int
    """Number of groups, which the interval and the tests are about."""
    old_mean: float
    new_mean: float
    difference: Interval
    """Mean of new minus old score."""
    outcomes: Outcomes
    superiority: float
    """Probability that the new clip of a pair is better."""
    wilcoxon_p: float
    """Of the signed-rank test, Holm-corrected for the number of sets."""
    sign_test_p: float
    """Likewise, of the sign test."""
    detectable: float
    """The smallest difference that so many pairs could have shown, with a power of 80%."""
    corrected: bool
    """Whether there are several new sets. Then a difference also needs a Wilcoxon p value below 5%."""
    defects: tuple[DefectChange, ...]
    """Sorted by p value; empty if the ratings have no comparable defect profiles."""
    pairs: tuple[ScorePair, ...]
    """In the order of the old set."""
    unpaired: Unpaired

    @property
    def decision(self) -> Decision:
        """Whether the interval excludes 0."""
        if self.corrected and self.wilcoxon_p >= SIGNIFICANT:
            return "no difference"
        return "better" if self.difference.low > 0 else "worse" if self.difference.high < 0 else "no difference"

    @property
    def verdict(self) -> str:
        """The result in one sentence, without a full stop."""
        value, low, high = self.difference.value, self.difference.low, self.difference.high
        pairs = f"on {plural(self.n, 'pair')}"
        match self.decision:
            case "better":
                text = f"{self.new} is better than {self.old} by {value:.2f} [{low:.2f}, {high:.2f}] {pairs}"
            case "worse":
                text = f"{self.new} is worse than {self.old} by {-value:.2f} [{-high:.2f}, {-low:.2f}] {pairs}"
            case _:
                text = f"no difference shown between {self.old} and {self.new}: {_interval(self.difference)} {pairs}, "
                excluded = low > 0 or high < 0
                text += (
                    f"corrected p {_p(self.wilcoxon_p)}" if excluded else f"which can show one of {self.detectable:.2f}"
                )
        changes = [f"{_term(one.defect)} {one.old} -> {one.new}" for one in self.defects if one.p < SIGNIFICANT]
        return "; ".join([text, *changes[:3]])

    @property
    def largest(self) -> list[ScorePair]:
        """The pairs that differ most, in decreasing order."""
        return sorted(self.pairs, key=lambda pair: -abs(pair.difference))[:LARGEST]


@dataclass(frozen=True)
class Comparison:
    """One or more sets of clips compared with the same old one."""

    sets: tuple[SetComparison, ...]
    notes: tuple[str, ...]
    """What the scores do not mean, and what could not be compared."""
    tie: float
    resamples: int
    confidence: float
    seed: int

    @property
    def failed(self) -> bool:
        """Whether some clips could not be rated."""
        return any(each.unpaired.failed for each in self.sets)


def compare(
    old: RatingSet,
    new: Sequence[RatingSet],
    *,
    by: str = "name",
    group: str | None = None,
    tie: float = TIE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compare sets of rated clips with an old one.

    Args:
        old: the set that the others are compared with.
        new: the others.
        by: how clips are paired, see `lmm_qa.evaluation.pairing.pair_sets`.
        group: the column of `old`, or the pattern in its clip names, with the person or source of a clip, see
            `lmm_qa.evaluation.selection.clip_groups`. By default: the person of THQA-NTIRE names, else each pair is a
            group.
        tie: scores that differ by no more are a tie.
        resamples, seed: for the bootstrap.

    Raises:
        UsageError: `by` or `group` cannot be used.
        ScoresError: the sets were rated by different raters; there are fewer than two pairs or groups.
    """
    check_same_rater([old, *new])
    profiled = _same_profiles([old, *new])
    found = [
        _compare(old, each, pair_sets(old, each, by), group, tie, resamples, seed, profiled is None) for each in new
    ]
    notes = [*scope_notes([old, *new]), *([profiled] if profiled else [])]
    return Comparison(_corrected(found), tuple(notes), tie, resamples, CONFIDENCE, seed)


def scope_notes(sets: Sequence[RatingSet]) -> list[str]:
    """Sentences about what the scores of these ratings do not mean."""
    ratings = [each.ratings[at] for each in sets for at in each.rated]
    notes = []
    if any(rating.model == EMBEDDED_NAME for rating in ratings):
        notes.append(
            "The embedded rater judges damage to the signal (blur, compression, noise, stalls ...), not how natural a "
            "generated face is."
        )
    if not all(rating.calibration for rating in ratings):
        notes.append("The rater is not calibrated to human opinions (lmm-qa calibrate): differences are not MOS.")
    if any(rating.rater_id is None for rating in ratings):
        notes.append("The ratings have no rater_id: whether the same rater made them cannot be checked.")
    return notes


def found_defects(rating: RatingRow) -> dict[str, bool]:
    """Whether each defect that was judged was found."""
    if rating.found is None or rating.defects is None:
        return {}
    found = {one.defect for one in rating.found}
    return {name: name in found for name, probability in rating.defects.items() if probability is not None}


def _same_profiles(sets: Sequence[RatingSet]) -> str | None:
    """None if the defect profiles can be compared, else the reason why not."""
    profiles = {each.ratings[at].profile_id for each in sets for at in each.rated if each.ratings[at].defects}
    if not profiles:
        return "The ratings have no defect profiles: rate the clips with --defects to compare defects too."
    if len(profiles) > 1:
        return f"Defects are not compared: the profiles were made in different ways (profile_id {_listed(profiles)})."
    return None


def _compare(
    old: RatingSet,
    new: RatingSet,
    pairing: Pairing,
    group: str | None,
    tie: float,
    resamples: int,
    seed: int,
    profiled: bool,
) -> SetComparison:
    groups = clip_groups([old.rows[one] for one, _ in pairing.pairs], group)
    pairs = tuple(
        _score_pair(old.ratings[one], new.ratings[other], of_pair, profiled)
        for (one, other), of_pair in zip(pairing.pairs, groups, strict=True)
    )
    differences = np.array([pair.difference for pair in pairs], dtype=np.float64)
    try:
        sums = GroupSums.of(differences, groups)
    except ScoresError as error:
        raise ScoresError(f"{old.name} and {new.name} cannot be compared: {error}") from None
    counts = outcomes(differences, tie)
    by_group = outcomes(sums.means, tie)
    return SetComparison(
        old=old.name,
        new=new.name,
        n=len(pairs),
        groups=len(sums.sums),
        old_mean=float(np.mean([pair.old_score for pair in pairs])),
        new_mean=float(np.mean([pair.new_score for pair in pairs])),
        difference=mean_interval(sums, resamples=resamples, seed=seed),
        outcomes=counts,
        superiority=counts.superiority,
        wilcoxon_p=wilcoxon_p(sums.means),
        sign_test_p=sign_test_p(by_group.wins, by_group.losses),
        detectable=detectable_difference(sums),
        corrected=False,
        defects=_defect_changes(old, new, pairing) if profiled else (),
        pairs=pairs,
        unpaired=Unpaired(
            tuple((old.ratings[one].clip, new.ratings[other].clip) for one, other in pairing.failed),
            tuple(old.ratings[at].clip for at in pairing.unpaired_old),
            tuple(new.ratings[at].clip for at in pairing.unpaired_new),
        ),
    )


def _score_pair(old: RatingRow, new: RatingRow, group: str, profiled: bool) -> ScorePair:
    had, has = (found_defects(old), found_defects(new)) if profiled else ({}, {})
    changed = {name: has[name] for name in has if name in had and had[name] != has[name]}
    assert old.score is not None and new.score is not None
    return ScorePair(
        old=old.clip,
        new=new.clip,
        group=group,
        old_score=old.score,
        new_score=new.score,
        gained=tuple(name for name, gained in changed.items() if gained),
        lost=tuple(name for name, gained in changed.items() if not gained),
    )


def _defect_changes(old: RatingSet, new: RatingSet, pairing: Pairing) -> tuple[DefectChange, ...]:
    """With p values that are not corrected yet."""
    judged = [(found_defects(old.ratings[one]), found_defects(new.ratings[other])) for one, other in pairing.pairs]
    names = dict.fromkeys(name for had, _ in judged for name in had)
    changes = []
    for name in names:
        both = [(had[name], has[name]) for had, has in judged if name in had and name in has]
        gained, lost = both.count((False, True)), both.count((True, False))
        old_count = sum(had for had, _ in both)
        changes.append(
            DefectChange(name, len(both), old_count, old_count + gained - lost, gained, lost, sign_test_p(gained, lost))
        )
    return tuple(changes)


def _corrected(sets: Sequence[SetComparison]) -> tuple[SetComparison, ...]:
    """With p values corrected for the number of tests."""
    defect_p = iter(holm([one.p for each in sets for one in each.defects if one.testable]))
    wilcoxon, sign_test = holm([each.wilcoxon_p for each in sets]), holm([each.sign_test_p for each in sets])
    corrected = []
    for each, p, sign_p in zip(sets, wilcoxon, sign_test, strict=True):
        defects = [replace(one, p=next(defect_p)) if one.testable else one for one in each.defects]
        defects.sort(key=lambda one: (one.p, -abs(one.new - one.old)))
        corrected.append(
            replace(each, wilcoxon_p=p, sign_test_p=sign_p, corrected=len(sets) > 1, defects=tuple(defects))
        )
    return tuple(corrected)


# --- output ----------------------------------------------------------------------------------------------------------


class Section(NamedTuple):
    """A table of the output."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


DEFECT_HEADER = ("defect", "old", "new", "gained", "lost", "p")
PAIR_HEADER = ("clip", "old", "new", "difference", "defects")


def sections(comparison: Comparison) -> list[Section]:
    """The tables of a comparison: statistics, and for each set the defects, the largest differences, unpaired clips."""
    sets = comparison.sets
    found = [Section(f"Compared with {sets[0].old}", ("", *(each.new for each in sets)), _statistics(sets))]
    for each in sets:
        where = f" in {each.new}" if len(sets) > 1 else ""
        changed = [one for one in each.defects if one.old or one.new]
        if changed:
            found.append(Section(f"Clips with a defect{where}", DEFECT_HEADER, _defects(changed)))
        found.append(Section(f"Largest differences{where}", PAIR_HEADER, [_pair(pair) for pair in each.largest]))
        if left_out := _left_out(each):
            found.append(Section(f"Not compared{where}", ("", "clips", ""), left_out))
    return found


def _statistics(sets: Sequence[SetComparison]) -> list[tuple[str, ...]]:
    lines: Mapping[str, list[str]] = {
        "pairs": [f"{each.n}" + (f" in {each.groups} groups" if each.groups < each.n else "") for each in sets],
        "mean score": [f"{each.old_mean:.2f} -> {each.new_mean:.2f}" for each in sets],
        "difference": [_interval(each.difference) for each in sets],
        "P(new better)": [f"{each.superiority:.2f}" for each in sets],
        "wins / ties / losses": [" / ".join(map(str, each.outcomes)) for each in sets],
        "Wilcoxon p": [_p(each.wilcoxon_p) for each in sets],
        "sign test p": [_p(each.sign_test_p) for each in sets],
        "detectable difference": [f"{each.detectable:.2f}" for each in sets],
    }
    return [(name, *cells) for name, cells in lines.items()]


def _defects(changes: Sequence[DefectChange]) -> list[tuple[str, ...]]:
    numbers = [(one.old, one.new, one.gained, one.lost) for one in changes]
    return [(_term(one.defect), *map(str, each), _p(one.p)) for one, each in zip(changes, numbers, strict=True)]


def _pair(pair: ScorePair) -> tuple[str, ...]:
    name = pair.old if pair.old == pair.new else f"{pair.old} -> {pair.new}"
    changes = [*(f"+{_term(one)}" for one in pair.gained), *(f"-{_term(one)}" for one in pair.lost)]
    return name, f"{pair.old_score:.2f}", f"{pair.new_score:.2f}", f"{pair.difference:+.2f}", ", ".join(changes)


def _left_out(each: SetComparison) -> list[tuple[str, ...]]:
    parts = {
        "pairs with a clip that could not be rated": [old for old, _ in each.unpaired.failed],
        f"no partner, in {each.old}": each.unpaired.old,
        f"no partner, in {each.new}": each.unpaired.new,
    }
    return [(text, str(len(clips)), preview(clips)) for text, clips in parts.items() if clips]


def footnotes(comparison: Comparison) -> list[str]:
    """What the numbers mean."""
    corrected = ", Holm-corrected for the number of sets" if len(comparison.sets) > 1 else ""
    return [
        *comparison.notes,
        f"Brackets: {comparison.confidence:.0%} intervals, {comparison.resamples} resamples, seed {comparison.seed}. "
        f"Tie: scores differ by at most {comparison.tie:g}. p: two-sided{corrected}; of defects: McNemar's exact test, "
        f"Holm-corrected. Detectable difference: found with a probability of {POWER:.0%}.",
    ]


def render(comparison: Comparison, console: Console) -> None:
    """Print the verdicts, notes and tables."""
    from rich.table import Table

    if not console.is_terminal:
        console.width = 1000  # do not wrap lines in a file
    for each in comparison.sets:
        console.print(f"{each.verdict}.", style="bold")
    for section in sections(comparison):
        table = Table(show_edge=False, pad_edge=False, header_style="bold", title=section.title, title_justify="left")
        for number, name in enumerate(section.header):
            table.add_column(name, overflow="fold", justify="left" if number in (0, 5) else "right")
        for row in section.rows:
            table.add_row(*row)
        console.print("", table, sep="\n")
    console.print("", *footnotes(comparison), sep="\n")


def to_markdown(comparison: Comparison) -> str:
    """The comparison as Markdown, for a comment on a pull request."""
    lines = [f"**{_escaped(each.verdict)}.**\n" for each in comparison.sets]
    for section in sections(comparison):
        lines += [f"### {_escaped(section.title)}\n"]
        lines += [_markdown_row(section.header), _markdown_row(["---"] * len(section.header))]
        lines += [*map(_markdown_row, section.rows), ""]
    return "\n".join([*lines, *(f"{note}\n" for note in map(_escaped, footnotes(comparison)))])


def to_rows(comparison: Comparison) -> list[Row]:
    """One row for each pair, and for each clip or pair that is not in the statistics."""
    rows: list[Row] = []
    for each in comparison.sets:
        for pair in each.pairs:
            won = pair.difference > comparison.tie
            outcome = "win" if won else "loss" if pair.difference < -comparison.tie else "tie"
            row = {"set": each.new, "old": pair.old, "new": pair.new, "outcome": outcome, "group": pair.group}
            scores = {"old_score": pair.old_score, "new_score": pair.new_score, "difference": pair.difference}
            rows.append(row | scores | {"gained": list(pair.gained), "lost": list(pair.lost)})
        out = each.unpaired
        rows += [{"set": each.new, "old": old, "new": new, "outcome": "failed"} for old, new in out.failed]
        rows += [{"set": each.new, "old": old, "new": None, "outcome": "unpaired"} for old in out.old]
        rows += [{"set": each.new, "old": None, "new": new, "outcome": "unpaired"} for new in out.new]
    return rows


def check_output(path: Path) -> None:
    """Check the suffix of an output file before hours of rating.

    Raises:
        UsageError: it is none of `SUFFIXES`.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"a comparison is written as {', '.join(SUFFIXES)}, received {str(path)!r}")


def write(comparison: Comparison, path: Path) -> None:
    """Write the comparison: everything as .json, the pairs as .csv, the tables as .md.

    Raises:
        UsageError: the suffix is none of these.
        ResultsError: the file cannot be written.
    """
    check_output(path)
    form = path.suffix.lower()
    if form == ".csv":
        write_rows(path, to_rows(comparison))
        return
    if form == ".json":
        verdicts = [{"verdict": each.verdict, "decision": each.decision} for each in comparison.sets]
        values = TypeAdapter(Comparison).dump_python(comparison, mode="json")
        values["sets"] = [verdict | each for verdict, each in zip(verdicts, values["sets"], strict=True)]
        content = TypeAdapter(dict).dump_json(values, indent=2) + b"\n"
    else:
        content = to_markdown(comparison).encode()
    with writing(path) as temporary:
        temporary.write_bytes(content)


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_escaped, cells))} |"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, in a table too. Names of clips may contain any character."""
    flat = " ".join(text.split())
    return "".join(f"\\{letter}" if letter in "\\`*_|<[#" else letter for letter in flat)


def _interval(interval: Interval) -> str:
    return f"{interval.value:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"


def _p(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _term(defect: str) -> str:
    return BY_NAME[defect].term if defect in BY_NAME else defect


def _listed(names: set[str | None]) -> str:
    return ", ".join(sorted(str(name) for name in names))
