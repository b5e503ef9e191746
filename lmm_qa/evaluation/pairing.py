"""Sets of ratings of different generators, and which of their clips belong together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath

from lmm_qa.errors import ResultsError, ScoresError, UsageError
from lmm_qa.evaluation.labels import match, preview
from lmm_qa.evaluation.row_filter import column_value
from lmm_qa.evaluation.thqa import try_parse
from lmm_qa.files.tables import Column, Row, read_table
from lmm_qa.ratings.io import read_ratings
from lmm_qa.ratings.rows import RatingRow

PAIR_BY = "name, stem, thqa, column=NAME or mapping=FILE"


@dataclass(frozen=True)
class RatingSet:
    """The ratings of one generator's clips."""

    name: str
    path: Path
    rows: tuple[Row, ...]
    ratings: tuple[RatingRow, ...]
    """The same, validated."""

    @classmethod
    def read(cls, path: Path, name: str, clips: Collection[str] | None = None) -> RatingSet:
        """Read ratings.

        Args:
            path: .jsonl, .csv or .parquet.
            name: of the set, in the output.
            clips: names of the clips to read; None: all.

        Raises:
            UsageError: the suffix is not that of ratings; a row is not a rating.
            ResultsError: the file cannot be read or is empty, or rates a clip twice.
        """
        rows = [row for row in read_ratings(path) if clips is None or row.get("clip") in clips]
        ratings = tuple(RatingRow.parse(row, f"{path}, row {number}") for number, row in enumerate(rows, 1))
        if not rows:
            raise ResultsError(f"{path} contains no ratings")
        twice = [clip for clip, times in Counter(rating.clip for rating in ratings).items() if times > 1]
        if twice:
            raise ResultsError(
                f"{path} rates {len(twice)} clips more than once ({preview(twice)}): keep the rows of one rater"
            )
        return cls(name, path, tuple(rows), ratings)

    @cached_property
    def rated(self) -> tuple[int, ...]:
        """Indices of the clips that have a score."""
        return tuple(at for at in range(len(self.ratings)) if self.score(at) is not None)

    @property
    def failed(self) -> tuple[str, ...]:
        """Clips that could not be rated."""
        return tuple(rating.clip for at, rating in enumerate(self.ratings) if self.score(at) is None)

    def score(self, at: int) -> float | None:
        """The score of a clip; None if it could not be rated."""
        rating = self.ratings[at]
        return None if rating.error else rating.score


@dataclass(frozen=True)
class Pairing:
    """The pairs of two sets, by index. Every clip is in exactly one of the fields."""

    pairs: tuple[tuple[int, int], ...]
    """Pairs with two scores, in the order of the old set."""
    failed: tuple[tuple[int, int], ...]
    """Pairs of which at least one clip could not be rated."""
    unpaired_old: tuple[int, ...]
    unpaired_new: tuple[int, ...]


def pair_sets(old: RatingSet, new: RatingSet, by: str = "name") -> Pairing:
    """Pair the clips of two sets. A clip that fits several others has no partner.

    Args:
        old, new: the sets.
        by: what the clips of a pair share. `name`: the name, as `lmm_qa.evaluation.labels.match` finds it. `stem`: the
            file name without folders and suffix. `thqa`: portrait and audio of a THQA-NTIRE name, whichever the
            generator. `column=NAME`: the value of a column. `mapping=FILE`: the pairs are listed in a table with the
            columns `old` and `new`.

    Raises:
        UsageError: `by` is none of these; the table cannot be used.
        ScoresError: there is no pair.
    """
    found = _partners(old, new, by)
    if not found:
        raise ScoresError(
            f"no clip of {old.name} ({preview([one.clip for one in old.ratings])}) has a partner by {by} in {new.name} "
            f"({preview([one.clip for one in new.ratings])}): choose how to pair them with --pair {PAIR_BY}"
        )
    scored = [old.score(one) is not None and new.score(other) is not None for one, other in found]
    taken_old, taken_new = {one for one, _ in found}, {other for _, other in found}
    return Pairing(
        tuple(pair for pair, both in zip(found, scored, strict=True) if both),
        tuple(pair for pair, both in zip(found, scored, strict=True) if not both),
        tuple(at for at in range(len(old.ratings)) if at not in taken_old),
        tuple(at for at in range(len(new.ratings)) if at not in taken_new),
    )


def _partners(old: RatingSet, new: RatingSet, by: str) -> list[tuple[int, int]]:
    kind, _, argument = by.partition("=")
    match kind, argument:
        case "name", "":
            return _by_name(old, new)
        case "stem", "":
            return _by_key(old, new, lambda row: PurePosixPath(row["clip"]).stem)
        case "thqa", "":
            return _by_key(old, new, _thqa_content)
        case "column", name if name:
            return _by_key(old, new, lambda row: column_value(row, name))
        case "mapping", file if file:
            return _by_mapping(old, new, Path(file))
    raise UsageError(f"--pair is {PAIR_BY}, received {by!r}")


def _by_key(old: RatingSet, new: RatingSet, key: Callable[[Row], Hashable]) -> list[tuple[int, int]]:
    partners = _unique(map(key, new.rows))
    return [(at, partners[value]) for value, at in _unique(map(key, old.rows)).items() if value in partners]


def _unique(keys: Iterable[Hashable]) -> dict[Hashable, int]:
    """The index of each key that occurs once; without None."""
    keys = list(keys)
    uses = Counter(keys)
    return {key: at for at, key in enumerate(keys) if key is not None and uses[key] == 1}


def _thqa_content(row: Row) -> Hashable:
    name = try_parse(row["clip"])
    return None if name is None else replace(name, generator=None)


def _by_name(old: RatingSet, new: RatingSet) -> list[tuple[int, int]]:
    indices = _indices(new)
    found = match(list(_indices(old)), list(indices))
    return [(at, indices[found[clip]]) for clip, at in _indices(old).items() if clip in found]


def _by_mapping(old: RatingSet, new: RatingSet, file: Path) -> list[tuple[int, int]]:
    lines = list(read_table(file, [Column("old", ("old",)), Column("new", ("new",))]))
    found = []
    for each, side in ((old, "old"), (new, "new")):
        names = [str(row[side]) for _, row in lines]
        if twice := [name for name, times in Counter(names).items() if times > 1]:
            raise UsageError(f"{file} lists {preview(twice)} more than once in the column {side}")
        partners, indices = match(names, list(_indices(each))), _indices(each)
        if missing := [name for name in names if name not in partners]:
            raise UsageError(
                f"{file} lists {len(missing)} clips in the column {side} that {each.path} does not contain: "
                f"{preview(missing)}"
            )
        found.append([indices[partners[name]] for name in names])
    return sorted(zip(*found, strict=True))


def _indices(ratings: RatingSet) -> Mapping[str, int]:
    return {row["clip"]: at for at, row in enumerate(ratings.rows)}


# --- the rater -------------------------------------------------------------------------------------------------------


def check_same_rater(sets: Sequence[RatingSet]) -> None:
    """Check that one rater made all ratings: scores of different raters are not comparable.

    Raises:
        ScoresError: the `rater_id` differs; the message says in what the raters differ, as far as the ratings tell.
    """
    first: dict[str | None, tuple[str, RatingRow]] = {}
    for each in sets:
        for at in each.rated:
            first.setdefault(each.ratings[at].rater_id, (each.name, each.ratings[at]))
    if len(first) < 2:
        return
    (one_set, one), (other_set, other), *_ = first.values()
    where = f"{one_set} and {other_set}" if one_set != other_set else f"{one_set} contains ratings that"
    raise ScoresError(
        f"{where} were not made by the same rater (rater_id {one.rater_id} and {other.rater_id}): "
        f"{_difference(one, other)}. Their scores are not comparable: rate all clips with the same rater"
    )


def _difference(one: RatingRow, other: RatingRow) -> str:
    """In what two raters differ."""
    parts: dict[str, tuple[object, object]] = {
        name: (getattr(one, name), getattr(other, name))
        for name in ("model", "adapter", "prompt", "scale")
        if getattr(one, name) != getattr(other, name)
    }
    before, after = (row.calibration.id if row.calibration else None for row in (one, other))
    if before != after:
        parts["calibration"] = (before, after)
    if not parts:
        return "the weights, dtype, sampling or views differ, which the ratings do not name"
    return "they differ in " + ", ".join(f"{name} ({_named(a)} and {_named(b)})" for name, (a, b) in parts.items())


def _named(value: object) -> str:
    return "none" if value is None else repr(value) if isinstance(value, str) else str(value)
