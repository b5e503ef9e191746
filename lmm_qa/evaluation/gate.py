"""Pass or fail a set of rated clips: limits that a build must keep.

A limit on a mean is compared with the end of its 95% interval, not with the mean: a build passes only if the data
exclude that the limit is exceeded. Few clips therefore fail rather than pass by luck.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, field_validator

from lmm_qa.config import Settings
from lmm_qa.defects.vocabulary import BY_NAME, check_names
from lmm_qa.errors import ScoresError, UsageError
from lmm_qa.evaluation.compare import SetComparison, found_defects
from lmm_qa.evaluation.labels import preview
from lmm_qa.evaluation.paired_statistics import GroupSums, mean_interval
from lmm_qa.evaluation.pairing import RatingSet
from lmm_qa.evaluation.selection import clip_groups
from lmm_qa.files.tables import writing

MIN_CLIPS = 10
"""With fewer clips, a 95% interval misses the truth more often than in 5% of cases."""

NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 does not allow (section 2.2)."""


class Limits(Settings):
    """What a set of clips must keep; the keys of gate.yaml."""

    max_drop: float | None = Field(None, ge=0)
    """Largest drop of the mean score against the old set. The lower end of the interval of new minus old must not lie
    below -max_drop."""
    min_score: float | None = None
    """Least mean score. The lower end of its interval must not lie below."""
    max_defect: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=dict)
    """Largest share of the clips with a defect, by the name of the defect."""
    min_pairs: int = Field(MIN_CLIPS, ge=2)
    """Least number of pairs; without an old set, of rated clips."""
    max_failed: int = Field(0, ge=0)
    """Largest number of clips that cannot be rated."""

    def check(self, has_old: bool) -> None:
        """Check that there is a limit, and an old set if one needs it.

        Raises:
            UsageError: there is not.
        """
        if self.max_drop is None and self.min_score is None and not self.max_defect:
            raise UsageError("there is no limit: give --max-drop, --min-score or --max-defect, or a file with --config")
        if self.max_drop is not None and not has_old:
            raise UsageError(f"the limit max_drop {self.max_drop:g} needs the ratings of the old set: --against OLD")

    @field_validator("max_defect")
    @classmethod
    def _check_names(cls, limits: dict[str, float]) -> dict[str, float]:
        check_names(limits, BY_NAME)
        return limits


@dataclass(frozen=True)
class Check:
    """The result for one limit."""

    name: str
    passed: bool
    message: str
    """One sentence, without a full stop."""

    def __str__(self) -> str:
        return f"{'pass' if self.passed else 'FAIL'}  {self.name}: {self.message}"


def check_limits(
    limits: Limits, new: RatingSet, comparison: SetComparison | None = None, group: str | None = None
) -> list[Check]:
    """Check all limits.

    Args:
        limits: at least one of max_drop, min_score and max_defect.
        new: the clips.
        comparison: with the old set; needed for `max_drop`.
        group: as for `lmm_qa.evaluation.compare.compare`, for the interval of the mean score.

    Raises:
        UsageError: there is no limit, or `max_drop` without a comparison.
    """
    limits.check(comparison is not None)
    checks = [_check_failed(limits.max_failed, new), _check_number(limits.min_pairs, new, comparison)]
    if limits.max_drop is not None and comparison is not None:
        checks.append(_check_drop(limits.max_drop, comparison))
    if limits.min_score is not None:
        checks.append(_check_score(limits.min_score, new, group))
    return checks + [_check_defect(name, limit, new) for name, limit in limits.max_defect.items()]


def _check_failed(limit: int, new: RatingSet) -> Check:
    failed = new.failed
    which = f" ({preview(failed)})" if failed else ""
    text = f"{len(failed)} of {len(new.ratings)} clips could not be rated{which}, at most {limit} allowed"
    return Check("rated", len(failed) <= limit, text)


def _check_number(limit: int, new: RatingSet, comparison: SetComparison | None) -> Check:
    number, what = (len(new.rated), "rated clips") if comparison is None else (comparison.n, "pairs")
    unpaired = "" if comparison is None else f"; without a partner: {len(comparison.unpaired.old)} old, "
    unpaired += "" if comparison is None else f"{len(comparison.unpaired.new)} new"
    return Check("pairs", number >= limit, f"{number} {what}, at least {limit} needed{unpaired}")


def _check_drop(limit: float, comparison: SetComparison) -> Check:
    change = comparison.difference
    text = f"mean score changes by {change.value:+.2f} [{change.low:+.2f}, {change.high:+.2f}]: "
    if change.low >= -limit:
        return Check("drop", True, f"{text}a larger drop than {limit:g} is excluded")
    if change.high < -limit:
        return Check("drop", False, f"{text}it drops by more than {limit:g}")
    return Check("drop", False, f"{text}a larger drop than {limit:g} cannot be excluded; more pairs would show more")


def _check_score(limit: float, new: RatingSet, group: str | None) -> Check:
    scores = np.array([new.score(at) for at in new.rated], dtype=np.float64)
    try:
        mean = mean_interval(GroupSums.of(scores, clip_groups([new.rows[at] for at in new.rated], group)))
    except ScoresError as error:
        return Check("score", False, str(error))
    text = f"mean score {mean.value:.2f} [{mean.low:.2f}, {mean.high:.2f}]: "
    if mean.low >= limit:
        return Check("score", True, f"{text}below {limit:g} is excluded")
    if mean.high < limit:
        return Check("score", False, f"{text}it is below {limit:g}")
    return Check("score", False, f"{text}below {limit:g} cannot be excluded; more clips would show more")


def _check_defect(name: str, limit: float, new: RatingSet) -> Check:
    judged = [found[name] for found in (found_defects(new.ratings[at]) for at in new.rated) if name in found]
    term = BY_NAME[name].term
    if not judged:
        reason = f"{term} was judged in none of {len(new.rated)} clips: rate them with --defects"
        return Check(f"defect {name}", False, reason)
    share = sum(judged) / len(judged)
    text = f"{term} in {sum(judged)} of {len(judged)} clips ({share:.1%}), at most {limit:.1%} allowed"
    return Check(f"defect {name}", share <= limit, text)


def write_junit(checks: Sequence[Check], path: Path, name: str) -> None:
    """Write the checks as JUnit XML, which CI systems show as tests.

    Args:
        checks: the checks.
        path: the file.
        name: of the set of clips.

    Raises:
        ResultsError: the file cannot be written.
    """
    counts = {"tests": str(len(checks)), "failures": str(sum(not check.passed for check in checks)), "errors": "0"}
    root = ET.Element("testsuites", counts)
    suite = ET.SubElement(root, "testsuite", {"name": _printable(f"lmm-qa gate {name}"), **counts, "time": "0"})
    for check in checks:
        case = ET.SubElement(suite, "testcase", {"classname": "lmm-qa.gate", "name": check.name, "time": "0"})
        text = _printable(check.message)
        if check.passed:
            ET.SubElement(case, "system-out").text = text
        else:
            ET.SubElement(case, "failure", {"type": "limit", "message": text}).text = text
    ET.indent(root)
    with writing(path) as temporary:
        ET.ElementTree(root).write(temporary, encoding="utf-8", xml_declaration=True)


def _printable(text: str) -> str:
    return NOT_XML.sub("\ufffd", text)
