"""Read labels (MOS) and ratings from files, and join them by clip name."""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmm_qa.errors import ManifestError, ScoresError
from lmm_qa.evaluation.thqa import try_parse
from lmm_qa.files.tables import (
    CLIP_COLUMNS,
    OUTPUT_SUFFIXES,
    Column,
    Row,
    find_columns,
    path_in,
    read_lines,
    read_table,
    shown,
)
from lmm_qa.manifest import VIDEO_SUFFIXES, expand
from lmm_qa.ratings.io import read_ratings

SCORE_COLUMNS = ("mos", "score")
"""Usual names of the MOS column, by precedence; case is ignored."""
GROUP_COLUMN = "group"
"""Optional column: clips of one group (one person, one source) stay on one side of every split."""


@dataclass(frozen=True)
class Label:
    """The MOS of one clip."""

    clip: str
    mos: float
    group: Hashable
    """Clips of one group (one person, one source) are never on both sides of a split. The column `group`, else (class,
    pid) of a THQA-NTIRE name, else the clip itself."""


@dataclass(frozen=True)
class Score:
    """The score of one clip by a rater."""

    clip: str
    value: float | None
    """None if the clip could not be rated."""
    error: str | None = None
    """Why it could not be rated."""
    raw: float | None = None
    """The value before calibration, if the ratings contain it."""
    std: float | None = None
    """Standard deviation of the level distribution, in units of the raw score."""
    interval: tuple[float, float] | None = None
    """Calibrated prediction interval, in MOS units."""
    scale: tuple[float, float] | None = None
    """Lowest and highest score of the rater's scale."""
    content_id: str | None = None
    rater_id: str | None = None
    """Identity of the rater that produced the raw score."""
    calibrated: bool = False
    fitted: bool = False
    """Whether the rater's calibration was fitted on this clip."""


class Pair(NamedTuple):
    """A clip with a label and a score."""

    label: Label
    score: Score
    """Its `value` is not None."""


@dataclass(frozen=True)
class Join:
    """Labels and scores of the same clips, and those without a match."""

    pairs: tuple[Pair, ...]
    """In the order of the labels."""
    failed: tuple[Score, ...]
    """Labelled clips that the rater could not rate."""
    missing: tuple[str, ...]
    """Labelled clips that are not in the ratings."""
    extra: tuple[str, ...]
    """Rated clips without a label."""

    @property
    def mos(self) -> NDArray[np.float64]:
        """(n,) MOS of the pairs."""
        return np.array([pair.label.mos for pair in self.pairs], dtype=np.float64)

    @property
    def scores(self) -> NDArray[np.float64]:
        """(n,) scores of the pairs."""
        return np.array([pair.score.value for pair in self.pairs], dtype=np.float64)


# --- reading ---------------------------------------------------------------------------------------------------------


def read_labels(path: Path, clip_column: str | None = None, score_column: str | None = None) -> tuple[Label, ...]:
    """Read the labels of a table, in order.

    Args:
        path: .csv, .tsv, .jsonl or .parquet; any line ends, with or without a byte order mark.
        clip_column: the column that names the clip; by default the first of `CLIP_COLUMNS` in the table.
        score_column: the column with the MOS; by default the first of `SCORE_COLUMNS` in the table.

    Raises:
        ManifestError: the file cannot be read, a column or a value is missing, a MOS is not a finite number, or a clip
            is repeated; with file and line.
    """
    labels: dict[str, Label] = {}
    columns = (
        _clip_column(clip_column),
        Column("mos", SCORE_COLUMNS if score_column is None else (score_column,)),
        Column("group", (GROUP_COLUMN,), required=False),
    )
    for where, row in read_table(path, columns):
        clip, group = _clip(row["clip"], where), row["group"]
        if clip in labels:
            raise ManifestError(f"{where}: {clip!r} already has a label, {labels[clip].mos:g}: keep one of the two")
        labels[clip] = Label(clip, _number(row["mos"], where), _group(clip) if group in (None, "") else str(group))
    if not labels:
        raise ManifestError(f"{path} contains no labels")
    return tuple(labels.values())


def read_names(path: Path, clip_column: str | None = None) -> tuple[str, ...]:
    """Read the clip names of a list, in order: a table with one of `CLIP_COLUMNS`, or a .txt with one name per line.

    Raises:
        ManifestError: as for `read_labels`.
    """
    if path.suffix.lower() == ".txt":
        names = list(read_lines(path))
    else:
        names = [(where, _clip(row["clip"], where)) for where, row in read_table(path, [_clip_column(clip_column)])]
    seen: set[str] = set()
    for where, name in names:
        if name in seen:
            raise ManifestError(f"{where}: {name!r} is listed already")
        seen.add(name)
    if not names:
        raise ManifestError(f"{path} lists no clips")
    return tuple(name for _, name in names)


def read_scores(path: Path) -> tuple[Score, ...]:
    """Read scores: ratings or another table with a clip column and `score` (.jsonl, .csv, .parquet), or lines
    `name,score` without a header (.txt, the layout of a challenge submission).

    Raises:
        ManifestError: a row has no clip or no score, a clip has two scores, or the calibrations of the rows differ.
        ResultsError: the file cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix == ".txt":
        scores = [_score_of_line(line, where) for where, line in read_lines(path)]
    elif suffix in OUTPUT_SUFFIXES:
        rows = read_ratings(path)
        scores = [_score_of_row(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)]
        if len({_calibration(row).get("id") for row in rows if not row.get("error")}) > 1:
            raise ManifestError(
                f"{path} mixes calibrated and raw scores, or scores of several calibrations: keep one kind"
            )
    else:
        raise ManifestError(
            f"{path}: ratings are {', '.join(OUTPUT_SUFFIXES)}, or .txt with one line name,score per clip"
        )
    if not scores:
        raise ManifestError(f"{path} contains no ratings")
    twice = [clip for clip, times in Counter(score.clip for score in scores).items() if times > 1]
    if twice:
        raise ManifestError(f"{path} rates {len(twice)} clips more than once ({twice[0]!r}): keep one rater's rows")
    return tuple(scores)


def _clip_column(name: str | None) -> Column:
    return Column("clip", CLIP_COLUMNS if name is None else (name,))


def _score_of_line(line: str, where: str) -> Score:
    clip, comma, value = line.rpartition(",")
    if not comma or not clip:
        raise ManifestError(f"{where}: expected name,score, received {line[:80]!r}")
    return Score(clip, _number(value, where))


def _score_of_row(row: Row, where: str) -> Score:
    clip = _clip(row[find_columns(list(row), [_clip_column(None)], where)["clip"]], where)
    error = row.get("error")
    if error:
        known = isinstance(error, Mapping)
        return Score(clip, None, f"{error.get('class')}: {error.get('message')}" if known else str(error))
    if "score" not in row:
        raise ManifestError(f"{where}: no column is named score; the columns are: {', '.join(row)}")
    calibration = _calibration(row)
    raw, std = row.get("raw_score"), row.get("std")
    return Score(
        clip=clip,
        value=_number(row["score"], where),
        raw=None if raw is None else _number(raw, where),
        std=None if std is None else _number(std, where),
        interval=_ends(row.get("interval")),
        scale=_ends(row.get("scale")),
        content_id=row.get("content_id"),
        rater_id=calibration.get("raw_rater_id") or row.get("rater_id"),
        calibrated=bool(calibration),
        fitted=bool(calibration.get("fitted")),
    )


def _calibration(row: Row) -> Mapping[str, Any]:
    value = row.get("calibration")
    return value if isinstance(value, Mapping) else {}


def _ends(value: Sequence[float] | None) -> tuple[float, float] | None:
    return (float(value[0]), float(value[1])) if value else None


def _clip(value: object, where: str) -> str:
    name = path_in(value)
    if not isinstance(name, str) or not name.strip():
        raise ManifestError(f"{where}: expected the name of a clip, received {shown(value)}")
    return name.strip()


def _number(value: object, where: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]  # other types raise TypeError, caught below
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ManifestError(f"{where}: expected a finite number, received {shown(value)}")
    return number


def _group(clip: str) -> Hashable:
    name = try_parse(clip)
    return clip if name is None else name.group


# --- joining ---------------------------------------------------------------------------------------------------------


def join(labels: Sequence[Label], scores: Sequence[Score]) -> Join:
    """Match labels and scores by `match`. Nothing is dropped: the result lists the labels and scores without a match.

    Raises:
        ScoresError: there is no match at all.
    """
    labelled, scored = [label.clip for label in labels], [score.clip for score in scores]
    found = match(labelled, scored)
    if several := ambiguous(labelled, scored):
        name, fitting = next(iter(several.items()))
        raise ScoresError(
            f"{len(several)} labels cannot be told apart among the rated clips: {name!r}, for one, fits "
            f"{preview(fitting)}. Write more of the path into the labels or rate from the same folder (folder/clip.mp4)"
        )
    if not found:
        raise ScoresError(
            f"none of the {len(labels)} labelled clips ({preview(labelled, 1)}) is among the {len(scores)} rated ones "
            f"({preview(scored, 1)}): are these ratings and labels of the same clips? Names match if one is the end of "
            "the other, folders included"
        )
    by_clip = {score.clip: score for score in scores}
    partners = [(label, by_clip[found[label.clip]]) for label in labels if label.clip in found]
    taken = set(found.values())
    return Join(
        pairs=tuple(Pair(label, score) for label, score in partners if score.value is not None),
        failed=tuple(score for _, score in partners if score.value is None),
        missing=tuple(clip for clip in labelled if clip not in found),
        extra=tuple(clip for clip in scored if clip not in taken),
    )


def preview(names: Sequence[str], limit: int = 3) -> str:
    """The first names of a list, for messages."""
    return ", ".join([*names[:limit], *(["..."] if len(names) > limit else [])]) or "none"


def match(wanted: Sequence[str], given: Sequence[str]) -> dict[str, str]:
    """The given name for each wanted name that has one.

    Two names match if one of them, as a path, is the end of the other: `id01/0.mp4` matches `/data/id01/0.mp4`, but not
    `id02/0.mp4`. The longest end counts. A name that fits more than one is left out, see `ambiguous`. Unicode forms,
    backslashes and drive letters do not matter; nor do upper and lower case, or a suffix that only one of both has,
    unless they tell names apart.
    """
    found: dict[str, str] = {}
    taken: set[str] = set()
    most = min(len(set(wanted)), len(set(given)))
    for fit in _fits(wanted, given):
        if len(found) == most:
            break
        if len(fit.ones) == len(fit.others) == 1:
            (one,), (other,) = fit.ones, fit.others
            if one not in found and other not in taken and not _other_suffix(one, other):
                found[one] = other
                taken.add(other)
    return found


def ambiguous(wanted: Sequence[str], given: Sequence[str]) -> dict[str, list[str]]:
    """The wanted names that `match` leaves out because it cannot tell them or the given ones apart, with the latter."""
    found = match(wanted, given)
    taken = set(found.values())
    candidates: dict[str, list[str]] = {}
    for ones, others in _fits(
        [one for one in wanted if one not in found], [other for other in given if other not in taken]
    ):
        for one in ones:
            if len(others) > 1 or not _other_suffix(one, others[0]):
                candidates.setdefault(one, others)
    return candidates


class _Fit(NamedTuple):
    """Names that end alike."""

    ones: list[str]
    """Wanted names. They or `others` are no longer than the common end."""
    others: list[str]
    """Given names."""


def _fits(wanted: Sequence[str], given: Sequence[str]) -> Iterator[_Fit]:
    """Wanted and given names of which one is the end of the other; the closest and longest matches first."""
    for key in PATH_KEYS:
        ones, others = ([(name, key(_parts(name))) for name in dict.fromkeys(names)] for names in (wanted, given))
        deepest = max((len(parts) for _, parts in (*ones, *others)), default=0)
        for depth in range(deepest, 0, -1):
            by_end: dict[Parts, tuple[list[str], list[str], list[str], list[str]]]
            by_end = defaultdict(lambda: ([], [], [], []))
            for side, names in ((0, ones), (2, others)):
                for name, parts in names:
                    if len(parts) >= depth:
                        by_end[parts[-depth:]][side + (len(parts) > depth)].append(name)
            for whole_ones, longer_ones, whole_others, longer_others in by_end.values():
                if whole_ones and (whole_others or longer_others):
                    yield _Fit([*whole_ones, *(longer_ones if whole_others else [])], [*whole_others, *longer_others])
                elif longer_ones and whole_others:
                    yield _Fit(longer_ones, whole_others)


Parts = tuple[str, ...]


def _parts(name: str) -> Parts:
    """The parts of a path, however it is written."""
    path = re.sub(r"^[A-Za-z]:", "", unicodedata.normalize("NFC", name).replace("\\", "/"))
    return tuple(part for part in path.split("/") if part not in ("", "."))


def _without_suffix(parts: Parts) -> Parts:
    """Only the suffix of a video is removed: `clip_0.5` keeps its 5."""
    path = PurePosixPath(parts[-1]) if parts else PurePosixPath()
    return (*parts[:-1], path.stem) if path.suffix.lower() in VIDEO_SUFFIXES else parts


def _other_suffix(one: str, other: str) -> bool:
    """Whether both are videos of different kinds: `a.mp4` is not `a.mov`."""
    suffixes = {PurePosixPath(name).suffix.lower() for name in (one, other)}
    return len(suffixes) == 2 and suffixes <= set(VIDEO_SUFFIXES)


def _folded(parts: Parts) -> Parts:
    return tuple(part.casefold() for part in parts)


PATH_KEYS: tuple[Callable[[Parts], Parts], ...] = (
    lambda parts: parts,
    _folded,
    _without_suffix,
    lambda parts: _folded(_without_suffix(parts)),
)
"""What two names may differ in, the closest match first."""


def find_videos(names: Sequence[str], clips: Sequence[str], folder: Path) -> dict[str, Path]:
    """The video of each clip name, if it is found.

    Ratings may come from strangers: names cannot point to files outside of the folders given here, nor can links in
    these folders.

    Args:
        names: of clips, as in a file of ratings.
        clips: where to look: files, folders, globs and lists, as for rating. If empty, each name is taken as a path
            relative to the working directory, else to `folder`, and the file must be below one of these two.
        folder: of the ratings.

    Raises:
        ManifestError: `clips` match nothing.
    """
    if clips:
        folders = [path for path in map(Path, clips) if path.is_dir()]
        given = {
            clip.name: clip.path
            for clip in expand(clips)
            if not any(map(clip.path.is_relative_to, folders)) or _really_below(clip.path, folders)
        }
        return {name: given[found] for name, found in match(list(dict.fromkeys(names)), list(given)).items()}
    candidates = ((name, path) for name in names for path in (folder / name, Path(name)))
    found = ((name, path) for name, path in candidates if os.path.isfile(path))
    return {name: path for name, path in found if _really_below(path, (folder, Path()))}


def _really_below(path: Path, folders: Iterable[Path]) -> bool:
    """Whether a file is in one of the folders after all links are followed."""
    real = Path(os.path.realpath(path))
    return any(real.is_relative_to(os.path.realpath(folder)) for folder in folders)


def group_folds(groups: Sequence[Hashable], folds: int, seed: int = 0) -> NDArray[np.intp]:
    """Assign each clip to a fold, 0 to `folds` - 1, (n,); a group is in one fold, and folds are of about equal size.

    Groups are assigned by decreasing size, each to the fold with the fewest clips; the seed orders equal groups.
    The result does not depend on the order of the clips.

    Raises:
        ScoresError: there are fewer groups than folds.
    """
    sizes = Counter(groups)
    if folds < 1 or len(sizes) < folds:
        raise ScoresError(f"{len(sizes)} groups of clips cannot fill {folds} folds")
    names = sorted(sizes, key=repr)
    shuffled = [names[index] for index in np.random.default_rng(seed).permutation(len(names))]
    filled = [0] * folds
    fold_of: dict[Hashable, int] = {}
    for group in sorted(shuffled, key=lambda group: -sizes[group]):
        fold_of[group] = min(range(folds), key=filled.__getitem__)
        filled[fold_of[group]] += sizes[group]
    return np.array([fold_of[group] for group in groups], dtype=np.intp)
