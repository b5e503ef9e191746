"""Choose which clips are worth a human opinion.

A label is worth most where the measured defects contradict the score, and where no similar clip is chosen yet. The next
clip of k-centre greedy selection (Sener and Savarese, 2018) is

    argmax  distance(clip, nearest chosen clip) * (1 + disagreement)        disagreement as a rank from 0 to 1

No group (person, source) has more than its share of the clips. Nothing is random: the same ratings give the same clips,
in whatever order they come. The uncertainty of a score is reported but does not enter the rule: it is largest in the
middle of the scale, and made the choice worse than a random one (`scripts/bench_selection.py`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from lmm_qa.errors import ScoresError, UsageError
from lmm_qa.evaluation.row_filter import column_value
from lmm_qa.evaluation.thqa import try_parse
from lmm_qa.files.tables import Row

Floats = NDArray[np.float64]

RIDGE = 1.0
"""Penalty of the regression of scores on defects, per unit of variance."""


@dataclass(frozen=True)
class Candidate:
    """A clip that was chosen to be labelled."""

    row: Row
    group: str
    uncertainty: float
    """Width of the prediction interval, or the std of a rater that is not calibrated."""
    disagreement: float | None
    """Distance of the score from what the defects predict, in MOS; None if the ratings have no defect profiles."""

    def to_row(self) -> Row:
        """A row of the list to be labelled: `mos` is to be filled in."""
        return {
            "clip": self.row["clip"],
            "mos": None,
            "group": self.group,
            "score": self.row["score"],
            "uncertainty": self.uncertainty,
            "disagreement": self.disagreement,
            "content_id": self.row.get("content_id"),
        }


def choose_clips(rows: Sequence[Row], number: int, groups: Sequence[str]) -> list[Candidate]:
    """Choose the clips to label, the most useful first.

    Args:
        rows: ratings of one rater, without those of failed clips.
        number: of clips to choose.
        groups: of each row; no group has more clips than `fair_share`.

    Raises:
        ScoresError: there are fewer rows than clips to choose.
    """
    if not 1 <= number <= len(rows):
        raise ScoresError(
            f"{number} clips to label were requested, and {len(rows)} are rated: request 1 to {len(rows)}"
        )
    order = sorted(range(len(rows)), key=lambda at: str(rows[at]["clip"]))
    rows, groups = [rows[at] for at in order], [groups[at] for at in order]
    unsure, contrary = uncertainty(rows), disagreement(rows)
    weights = np.ones(len(rows)) if contrary is None else 1 + ranks(contrary)
    chosen = k_centre(features(rows), number, weights, groups)
    return [
        Candidate(rows[at], groups[at], float(unsure[at]), None if contrary is None else float(contrary[at]))
        for at in chosen
    ]


def clip_groups(rows: Sequence[Row], group: str | None = None) -> list[str]:
    """The group (person, source) of each clip.

    Args:
        rows: ratings.
        group: a column, or a regular expression whose first group matches it in the clip's name. By default it is
            read from THQA-NTIRE names; any other clip is a group of its own.

    Raises:
        UsageError: the regular expression is invalid or does not match a clip; a row has no value in the column.
    """
    if group is None:
        parsed = [(row["clip"], try_parse(row["clip"])) for row in rows]
        return [clip if name is None else "/".join(map(str, name.group)) for clip, name in parsed]
    if "(" not in group:
        values = [column_value(row, group) for row in rows]
    else:
        try:
            pattern = re.compile(group)
        except re.error as error:
            raise UsageError(f"--group {group!r} is not a regular expression: {error}") from None
        found = [pattern.search(row["clip"]) if pattern.groups else None for row in rows]
        values = [one.group(1) if one else None for one in found]
    for row, value in zip(rows, values, strict=True):
        if value is None:
            raise UsageError(
                f"{row['clip']!r} has no group by {group!r}: give a column of the ratings, or a regular expression "
                "with one group in parentheses that matches every clip's name"
            )
    return list(map(str, values))


def uncertainty(rows: Sequence[Row]) -> Floats:
    """(n,) width of the prediction interval, or the std if a row has no interval.

    Raises:
        ScoresError: a row has neither.
    """
    if all(row.get("interval") for row in rows):
        return np.array([row["interval"][1] - row["interval"][0] for row in rows], dtype=np.float64)
    if without := [row["clip"] for row in rows if row.get("std") is None]:
        raise ScoresError(f"the rating of {without[0]} has neither interval nor std: rate the clips with `lmm-qa rate`")
    return np.array([row["std"] for row in rows], dtype=np.float64)


def disagreement(rows: Sequence[Row]) -> Floats | None:
    """(n,) distance of each score from its prediction by ridge regression on the defects of the other clips, in MOS.

    The errors of leaving one clip out are exact: residual / (1 - leverage). None without defect profiles.
    """
    defects = _standardised(_defects(rows))
    if not defects.shape[1]:
        return None
    scores = np.array([row["score"] for row in rows], dtype=np.float64)
    design = np.column_stack([np.ones(len(rows)), defects])
    penalty = RIDGE * np.diag([0.0, *[1.0] * defects.shape[1]])
    projection = np.linalg.solve(design.T @ design + penalty, design.T)
    leverage = np.einsum("ij,ji->i", design, projection)
    errors: Floats = np.abs(scores - design @ (projection @ scores)) / np.maximum(1 - leverage, 1e-6)
    return errors


def features(rows: Sequence[Row]) -> Floats:
    """(n, d) description of each clip: score, level probabilities and defect probabilities, each of unit variance.

    A value that a row lacks is replaced by the mean of the others.
    """
    levels = _columns([row.get("probabilities") or {} for row in rows])
    scores = np.array([[row["score"]] for row in rows], dtype=np.float64)
    return _standardised(np.column_stack([scores, levels, _defects(rows)]))


def ranks(values: Floats) -> Floats:
    """(n,) ranks from 0 for the lowest to 1 for the highest; ties share their mean."""
    from_one: Floats = rankdata(values)
    return (from_one - 1) / max(len(values) - 1, 1)


def k_centre(points: Floats, number: int, weights: Floats, groups: Sequence[str]) -> list[int]:
    """Greedily choose the point with the largest weight times distance from the nearest chosen one.

    Args:
        points: (n, d); the first choice is the one nearest to their mean.
        number: of points to choose, at most n.
        weights: (n,) above 0.
        groups: of each point; see `fair_share`.

    Returns:
        Indices in the order of choice. Of equal points, the first is chosen.
    """
    share = fair_share(groups, number)
    room = Counter(dict.fromkeys(groups, share))
    free = np.ones(len(points), dtype=bool)
    distances = np.full(len(points), np.inf)
    chosen: list[int] = []
    at = int(np.argmin(np.linalg.norm(points - points.mean(axis=0), axis=1)))
    while True:
        chosen.append(at)
        free[at] = False
        room[groups[at]] -= 1
        if not room[groups[at]]:
            free &= np.array([group != groups[at] for group in groups])
        if len(chosen) == number:
            return chosen
        distances = np.minimum(distances, np.linalg.norm(points - points[at], axis=1))
        at = int(np.argmax(np.where(free, weights * distances, -1)))


def fair_share(groups: Sequence[str], number: int) -> int:
    """The smallest number of clips per group with which `number` clips can be chosen, at most `len(groups)`."""
    sizes = Counter(groups).values()
    return next(share for share in range(1, max(sizes) + 1) if sum(min(size, share) for size in sizes) >= number)


def _defects(rows: Sequence[Row]) -> Floats:
    """(n, d) probabilities of the defects that were judged in some row."""
    return _columns([row.get("defects") or {} for row in rows])


def _columns(values: Sequence[Mapping[str, float | None]]) -> Floats:
    names = list(dict.fromkeys(name for row in values for name in row))
    table = [[np.nan if (value := row.get(name)) is None else value for name in names] for row in values]
    return np.array(table, dtype=np.float64).reshape(len(values), len(names))


def _standardised(table: Floats) -> Floats:
    """The columns with mean 0 and standard deviation 1, gaps filled with the mean; constant columns are left out."""
    table = table[:, ~np.isnan(table).all(axis=0)]
    table = np.where(np.isnan(table), np.nanmean(table, axis=0), table)
    table = table[:, table.std(axis=0) > 1e-9]
    standardised: Floats = (table - table.mean(axis=0)) / table.std(axis=0)
    return standardised
