"""Labelled clips to train on: read the tables, split them by group, and check that the videos can be decoded.

splits = load(Data.parse({"root": "/data", "train": [{"path": "train.csv", "scale": [0, 5]}]}, "data"), seed=0)
print(splits)       # number of clips in each split; what was excluded, and why
checked = check(splits.train, sampling, views, factor, cache=Path("runs/x/cache"))
print(checked)      # which clips are missing or cannot be decoded
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache as cached
from itertools import compress
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator

from lmm_qa.config import Sampling, ScaleEnds, Settings, View
from lmm_qa.defects.explanation import Finding
from lmm_qa.defects.vocabulary import VISIBLE, reference_defects
from lmm_qa.errors import ClipError, LmmQaError, ManifestError, UsageError
from lmm_qa.evaluation.labels import GROUP_COLUMN, SCORE_COLUMNS, group_folds, preview
from lmm_qa.evaluation.thqa import try_parse
from lmm_qa.files.tables import CLIP_COLUMNS, TABLE_SUFFIXES, Column, Row, find_columns, read_table
from lmm_qa.manifest import VIDEO_SUFFIXES, content_id
from lmm_qa.video.decode import Frames
from lmm_qa.video.decoder_pool import DecoderPool
from lmm_qa.video.measurement.classifier import evidence_names

MAX_PROBLEMS = 3
"""Problems of a table that a message quotes; the others are counted."""

ABSENT_IF_NOT_NAMED = tuple(name for name in reference_defects(()) if name in VISIBLE)
"""Defects that a clip does not have if its row names other defects, or none: those that `lmm-qa degrade` can make."""

OPTIONAL_COLUMNS = (GROUP_COLUMN, "defects", "explanation", "evidence", "same_as")
"""Columns that are used if a table has them, without being declared."""

COLUMNS: dict[str, tuple[str, ...]] = {
    "clip": CLIP_COLUMNS,
    "mos": SCORE_COLUMNS,
    "std": (),
    "votes": (),
    **{name: (name,) for name in OPTIONAL_COLUMNS},
}
"""Fields of `Table` that name a column, and what the column is called by default."""


class Table(Settings):
    """A table of labelled clips."""

    path: str
    """A .csv, .tsv, .jsonl or .parquet file or a data set directory, relative to `Data.root`; or a data set id of the
    Hugging Face hub. Files and directories are read again in each run; a data set of the hub is downloaded once, into
    the hub's own cache."""
    split: str | None = None
    """Split of a directory or hub data set. Default: the only one."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set. Default: its main branch."""
    videos: str = "."
    """Folder of the clips, relative to `Data.root`. If a name has no video suffix, the suffix of the only video with
    this name is added. Default: `Data.root` itself."""
    scale: ScaleEnds
    """Lowest and highest possible MOS. It is never inferred from the data. No default."""
    clip: str | None = None
    """Column of the clip names, or a video column whose videos are files. Default: the first of
    `lmm_qa.files.tables.CLIP_COLUMNS` that the table has. Case is ignored in column names."""
    mos: str | None = None
    """Column of the MOS. Default: the first of `lmm_qa.evaluation.labels.SCORE_COLUMNS` that the table has."""
    std: str | None = None
    """Column of the standard deviation of the opinion scores, in units of `scale`; may be empty. Default: none."""
    votes: str | None = None
    """Column of the number of opinion scores; cells may be empty. Default: none."""
    group: str | None = None
    """Column of the group: clips of one group are never on both sides of a split. Default: `group`, if the table has
    it. See `Example.group`."""
    defects: str | None = None
    """Column of the defects of a clip, the main ones first. Default: `defects`, if the table has it. A cell is a list,
    or text with `;` between names of `lmm_qa.defects.vocabulary`. A name may be followed by its time, as in
    `stall from 1.2 to 2.0 s`; `?` before a name means unknown. Defects that are not named are absent, all of them if
    the cell is empty; if it is null or `?`, nothing is known."""
    explanation: str | None = None
    """Column of a text that explains the rating: `The quality of this video is fair: the picture is blurred.` The text
    up to the first level word is not trained on. Cells may be empty. Default: `explanation`, if the table has it."""
    evidence: str | None = None
    """Column of what was measured of a clip, for prompts with the slot `{measured}`: an object with the numbers of
    `lmm_qa.video.measurement.classifier.evidence_names`, 0 to 1. Needed only if the package's forests were trained on
    the clips. Cells may be empty. Default: `evidence`, if the table has it; clips without it are measured."""

    same_as: str | None = None
    """Column of a text that is the same for clips that show the same in the same quality, such as a clip and its mirror
    image: they are trained to get the same score (`loss.consistency`). Cells may be empty. Default: `same_as`, if the
    table has it."""


class Data(Settings):
    """Tables to train on and to validate on, and the shares of clips to hold out."""

    root: Path = Path()
    """Folder that tables and videos are relative to. Default: the working directory."""
    train: tuple[Table, ...] = Field(min_length=1)
    """Tables to train on, at least one."""
    validation: tuple[Table, ...] = ()
    """Tables to validate on. Default: none; a share of the training groups is held out."""
    validation_share: float = Field(0.1, ge=0, lt=1)
    """Share of the training clips, in whole groups, held out if there is no validation table; 0, or about a hundredth
    at least. Default: 0.1."""
    calibration_share: float = Field(0.1, ge=0, lt=1)
    """Share of the training clips, in whole groups, held out to map scores to MOS. Default: 0.1. (Of THQA-NTIRE, a
    smaller share can be a single person.)"""

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        if self.validation_share + self.calibration_share >= 1:
            raise ValueError(
                f"validation_share and calibration_share leave nothing to train on: "
                f"{self.validation_share:g} + {self.calibration_share:g}"
            )
        return self


@dataclass(frozen=True)
class Example:
    """A labelled clip."""

    name: str
    """As in the table."""
    path: Path
    """Absolute. The file may be missing, see `check`."""
    mos: float
    """On `scale`."""
    std: float | None
    """Standard deviation of the opinion scores, in units of `scale`."""
    votes: int | None
    """Number of opinion scores."""
    group: Hashable
    """Clips of one group are never on both sides of a split.

    - a text: from the group column. Equal texts of different tables are one group: a person that is in two sets must
      not be validated on, while sets that number their persons alike only lose training clips, which
      `Splits.excluded` reports. (To avoid that, write `konvid-1`, not `1`.)
    - a pair: class and pid of a THQA-NTIRE name, in any table.
    - a `Path`: the clip is its own group. Clips with the same name in different folders are different.
    """
    scale: tuple[float, float]
    """Lowest and highest possible MOS."""
    found: tuple[Finding, ...] | None = None
    """Defects of the clip, the main ones first; None if nothing is known about them."""
    absent: tuple[str, ...] = ()
    """Names of defects that the clip does not have."""
    explanation: str | None = None
    """Explanation of the rating, in words."""
    evidence: dict[str, float] | None = field(default=None, hash=False)
    """What was measured, see `Table.evidence`."""
    same_as: str | None = None
    """Equal for clips that show the same, see `Table.same_as`."""

    def on(self, scale: tuple[float, float]) -> Example:
        """The example with its labels mapped linearly to another scale."""
        if scale == self.scale:
            return self
        (low, high), (new_low, new_high) = self.scale, scale
        ratio = (new_high - new_low) / (high - low)
        return replace(
            self,
            mos=min(max(new_low + (self.mos - low) * ratio, new_low), new_high),
            std=None if self.std is None else self.std * ratio,
            scale=scale,
        )


@dataclass(frozen=True)
class ExcludedGroup:
    """Training clips that are excluded because validation has clips of their group."""

    group: Hashable
    clips: tuple[str, ...]
    held_out: int
    """Number of validation clips of the group."""

    def __str__(self) -> str:
        group = " ".join(map(str, self.group)) if isinstance(self.group, tuple) else str(self.group)
        return (
            f"{len(self.clips)} training clips are excluded: they belong to {group}, as do {self.held_out} validation "
            f"clips ({preview(self.clips)})"
        )


@dataclass(frozen=True)
class Splits:
    """Clips of each split, sorted by path. No group is in two splits."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    calibration: tuple[Example, ...]
    excluded: tuple[ExcludedGroup, ...]
    """Training clips of groups that are in the validation tables. THQA-NTIRE as published has 55 of them."""

    def __str__(self) -> str:
        parts = {"train": self.train, "validation": self.validation, "calibration": self.calibration}
        counts = [f"{name} {len(part)} clips of {len({e.group for e in part})} groups" for name, part in parts.items()]
        return "\n".join(["; ".join(counts), *map(str, self.excluded)])


def load(data: Data, seed: int) -> Splits:
    """Read the tables and split by group. The result does not depend on the order of rows or tables.

    Validation and calibration clips are whole groups, chosen by `seed`: about as many clips as their shares say, at
    least one group each, large groups as likely as small ones (see `lmm_qa.evaluation.labels.group_folds`).

    Raises:
        ManifestError: a table cannot be read, lacks a column, contains an invalid value, or has too few groups to be
            split. The message names the table and the row (from 1, without the header).
    """
    root = data.root.expanduser().absolute()
    train, validation = _read_all(data.train, root), _read_all(data.validation, root)
    train, excluded = _exclude_leaks(train, validation)
    shares = (0.0 if data.validation else data.validation_share, data.calibration_share)
    train, held_out, calibration = _split_by_group(train, shares, seed)
    return Splits(train, validation or held_out, calibration, excluded)


# --- splitting -------------------------------------------------------------------------------------------------------


def _exclude_leaks(
    train: Sequence[Example], validation: Sequence[Example]
) -> tuple[tuple[Example, ...], tuple[ExcludedGroup, ...]]:
    """The training clips that share neither group nor file with a validation clip, and the others by group."""
    # If a file is in both, its training group is excluded even if the validation table has no groups.
    group_of = {example.path: example.group for example in train}
    held_out = Counter(group for e in validation for group in {e.group, group_of.get(e.path, e.group)})
    leaks: dict[Hashable, list[str]] = defaultdict(list)
    for example in train:
        if example.group in held_out:
            leaks[example.group].append(example.name)
    excluded = tuple(ExcludedGroup(group, tuple(leaks[group]), held_out[group]) for group in sorted(leaks, key=repr))
    return tuple(example for example in train if example.group not in held_out), excluded


def _split_by_group(
    train: tuple[Example, ...], shares: tuple[float, float], seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...], tuple[Example, ...]]:
    """What remains of the training clips, and the clips of each share; a share of 0 has none.

    Groups are assigned to folds of about equal size; each share is the nearest number of folds, at least one.
    """
    groups = {example.group for example in train}
    fractions = [max(Fraction(share).limit_denominator(100), Fraction(1, 100)) for share in shares if share]
    folds = min(math.lcm(*(fraction.denominator for fraction in fractions)), len(groups))
    wanted = [max(1, round(share * folds)) if share else 0 for share in shares]
    if sum(wanted) >= folds:
        raise ManifestError(
            f"{len(train)} training clips in {len(groups)} groups are too few to train on and to hold out shares of "
            f"{shares[0]:g} (validation) and {shares[1]:g} (calibration): add clips, or declare a finer `group` column"
        )
    fold_of = group_folds([example.group for example in train], folds, seed)
    # The largest group is always in fold 0, so the order of the folds is random too.
    parts = np.split(np.random.default_rng(seed).permutation(folds), np.cumsum(wanted))
    held_out, calibration, rest = (tuple(compress(train, np.isin(fold_of, part))) for part in parts)
    return rest, held_out, calibration


# --- reading ---------------------------------------------------------------------------------------------------------


def _read_all(tables: Sequence[Table], root: Path) -> tuple[Example, ...]:
    labelled: dict[Path, str] = {}
    examples = [example for table in tables for example in _read(table, root, labelled)]
    return tuple(sorted(examples, key=lambda example: str(example.path)))


def _read(table: Table, root: Path, labelled: dict[Path, str]) -> list[Example]:
    """The examples of one table. Adds to `labelled`, by clip, the table and row of its label."""
    folder = root / Path(table.videos).expanduser()
    if not folder.is_dir():
        raise ManifestError(f"the videos of {table.path} were not found: {folder} is no folder; set `videos` or `root`")
    rows, find = _rows(table, root), _video_finder(folder)
    examples: list[Example] = []
    problems: list[str] = []
    for number, row in enumerate(rows, 1):
        try:
            example = _example(row, table.scale, find)
            if example.path in labelled:
                raise ManifestError(
                    f"{example.name!r} has a label already, in {labelled[example.path]}: keep one of them"
                )
        except ManifestError as error:
            problems.append(f"  row {number}: {error}")
            continue
        labelled[example.path] = f"{table.path}, row {number}"
        examples.append(example)
    if problems:
        more = [f"  and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
        count = f"{len(problems)} of {len(rows)} rows of {table.path} cannot be used:"
        raise ManifestError("\n".join([count, *problems[:MAX_PROBLEMS], *more]))
    if not examples:
        raise ManifestError(f"{table.path} contains no labels")
    return examples


def _example(row: Row, scale: tuple[float, float], find: Callable[[str], Path]) -> Example:
    name = _text(row["clip"])
    if not name or "\0" in name:
        raise ManifestError(f"expected the name of a clip, received {row['clip']!r}")
    mos = _number(row["mos"], "MOS", name)
    if not scale[0] <= mos <= scale[1]:
        raise ManifestError(
            f"MOS {mos:g} of {name!r} is outside the declared scale [{scale[0]:g}, {scale[1]:g}]: declare the scale "
            "that people rated on"
        )
    std = _number(row["std"], "the standard deviation", name) if _text(row.get("std")) else None
    if std is not None and std < 0:
        raise ManifestError(f"the standard deviation of {name!r} is negative: {std:g}")
    votes = _number(row["votes"], "the number of votes", name) if _text(row.get("votes")) else None
    if votes is not None and (votes < 1 or votes % 1):
        raise ManifestError(f"the number of votes of {name!r} is a whole number from 1, received {votes:g}")
    path, parsed = find(name), try_parse(name)
    group: Hashable = _text(row.get("group")) or (path if parsed is None else parsed.group)
    found, absent = _defects(row.get("defects"), name)
    explanation = _text(row.get("explanation")) or None
    return Example(
        name, path, mos, std, None if votes is None else int(votes), group, scale, found, absent, explanation,
        _evidence(row.get("evidence"), name), _text(row.get("same_as")) or None,
    )  # fmt: skip


_DEFECT = re.compile(r"(\??) *(\w+)((?: (?:and )?from \d+(?:\.\d+)? to \d+(?:\.\d+)? s)*)")


def _defects(cell: Any, name: str) -> tuple[tuple[Finding, ...] | None, tuple[str, ...]]:
    """The defects that a clip has (None if nothing is known), and those that it does not have."""
    if cell is None or cell != cell or cell == "?":
        return None, ()
    if isinstance(cell, str):
        cell = _as_list(cell)
    if not isinstance(cell, list):
        raise ManifestError(f"the defects of {name!r} are names with ; between them, received {cell!r}")
    found: list[Finding] = []
    named: set[str] = set()
    for text in cell:
        match = _DEFECT.fullmatch(str(text).strip())
        unknown, defect, when = match.groups() if match else ("", "", "")
        times = [float(number) for number in re.findall(r"[\d.]+", when)]
        if not match or times != sorted(times):
            raise ManifestError(
                f"a defect of {name!r} is a name, as in blur, ?seam or stall from 1.2 to 2.0 s; received {text!r}"
            )
        if defect not in VISIBLE:
            raise ManifestError(f"{name!r} has the unknown defect {defect!r}: use {', '.join(VISIBLE)}")
        if defect in named:
            raise ManifestError(f"{name!r} has the defect {defect!r} twice")
        named.add(defect)
        if not unknown:
            found.append(Finding(defect, 1.0, tuple(zip(times[::2], times[1::2], strict=True))))
    return tuple(found), tuple(defect for defect in ABSENT_IF_NOT_NAMED if defect not in named)


def _evidence(cell: Any, name: str) -> dict[str, float] | None:
    """What was measured of a clip; None if the cell is empty."""
    if cell is None or cell != cell or cell == "":
        return None
    try:
        numbers = json.loads(cell) if isinstance(cell, str) else cell
        found = {key: float(numbers[key]) for key in evidence_names()}
    except (ValueError, TypeError, KeyError) as error:
        raise ManifestError(
            f"the evidence of {name!r} is an object with numbers for {', '.join(evidence_names())}; received {cell!r} "
            f"({error})"
        ) from None
    if not all(0 <= value <= 1 for value in found.values()):
        raise ManifestError(f"the evidence of {name!r} is between 0 and 1, received {cell!r}")
    return found


def _as_list(cell: str) -> Any:
    """Parse a CSV cell: a JSON list, or items separated by `;`."""
    try:
        return json.loads(cell) if cell.startswith("[") else cell.split(";") if cell.strip() else []
    except ValueError:
        return cell


def _text(value: object) -> str:
    """A cell as text, "" if empty. 7.0 becomes 7: pandas stores integers as floats in columns with empty cells."""
    if value is None or value != value:
        return ""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def _number(value: Any, what: str, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ManifestError(f"{what} of {name!r} is a finite number, received {value!r}")
    return number


def _video_finder(folder: Path) -> Callable[[str], Path]:
    """A function from the name of a clip to its path; the file may be missing."""

    @cached
    def videos(place: Path) -> Mapping[str, list[str]]:
        """Videos by name without suffix. Listing a folder once is faster than testing each name with each suffix."""
        found: dict[str, list[str]] = defaultdict(list)
        for file in sorted(os.listdir(place)) if place.is_dir() else ():
            stem, suffix = os.path.splitext(file)
            if suffix.lower() in VIDEO_SUFFIXES:
                found[stem].append(file)
        return found

    def find(name: str) -> Path:
        path = Path(os.path.abspath(folder / name))
        if path.suffix.lower() in VIDEO_SUFFIXES or path.is_file():
            return path
        files = videos(path.parent).get(path.name, [path.name])
        if len(files) > 1:
            raise ManifestError(f"{name!r} could be any of {', '.join(files)}: give its suffix")
        return path.with_name(files[0])

    return find


def _rows(table: Table, root: Path) -> list[Row]:
    """The rows of a table, with the keys of `COLUMNS`. Clips in a video column are replaced by their paths."""
    local = root / Path(table.path).expanduser()
    columns = []
    for name, usual in COLUMNS.items():
        declared: str | None = getattr(table, name)
        columns.append(
            Column(name, (declared,) if declared else usual, declared is not None or name in ("clip", "mos"))
        )
    if local.is_file():
        if table.split or table.revision:
            raise ManifestError(
                f"{local} is a file: it has no splits and no revision, received {table.split or table.revision!r}"
            )
        rows: Iterable[Row] = (row for _, row in read_table(local, columns))
    elif local.exists() or _is_hub_id(table.path):
        rows = _dataset_rows(table, local, columns)
    else:
        raise ManifestError(
            f"there is no table at {local}: give a file ({', '.join(TABLE_SUFFIXES)}) or a data set directory, "
            "relative to `root`, or an id on the Hugging Face hub such as name/set"
        )
    return [{**row, "clip": _video_path(row["clip"], table)} for row in rows]


def _video_path(value: Any, table: Table) -> Any:
    """The path in a cell of a video column; the value of another cell."""
    if not isinstance(value, Mapping):
        return value
    if value.get("bytes") is not None or not value.get("path"):
        raise ManifestError(
            f"{table.path} contains the videos themselves: write them to files, and add a column with the file names"
        )
    return value["path"]


def _is_hub_id(path: str) -> bool:
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", path)) and Path(path).suffix.lower() not in TABLE_SUFFIXES


# --- data set directories and the hub --------------------------------------------------------------------------------


def _dataset_rows(table: Table, local: Path, columns: Sequence[Column]) -> Iterator[Row]:
    try:
        # A temporary cache: the default cache would keep a copy of each version of a local data set.
        with tempfile.TemporaryDirectory() as cache, _quiet_datasets(local.exists()):
            dataset = _open_dataset(table, local, cache).with_format("arrow")
            names = find_columns(dataset.column_names, columns, table.path)
            cells = dataset.select_columns(sorted(set(names.values())))
            # Read the first row alone: it shows whether a video column contains file names or gigabytes of video.
            for part in (cells[:1], cells[1:]):
                for row in part.to_pylist():
                    yield {column.name: row.get(names.get(column.name, "")) for column in columns}
    except LmmQaError:
        raise
    except Exception as error:  # datasets and the libraries below it raise many classes
        cause = error.__cause__ or error
        what = str(local) if local.exists() else f"{table.path} from the Hugging Face hub ({local} does not exist)"
        message = next(iter(str(cause).strip().splitlines()), "")
        raise ManifestError(f"cannot read {what}: {type(cause).__name__}: {message}") from None


def _open_dataset(table: Table, local: Path, cache: str) -> Any:
    """The `datasets.Dataset` of a directory or of a data set on the hub."""
    import datasets

    if local.exists() and table.revision:
        raise ManifestError(f"only data sets on the hub have a revision; {local} is local, received {table.revision!r}")
    if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
        found = datasets.load_from_disk(str(local))
    elif local.is_dir():
        found = datasets.load_dataset(str(local), cache_dir=cache)
    else:
        found = datasets.load_dataset(table.path, revision=table.revision)
    if isinstance(found, datasets.Dataset):
        found = {str(found.split or "train"): found}
    split = table.split or (next(iter(found)) if len(found) == 1 else None)
    if split not in found:
        raise ManifestError(f"{table.path} has the splits {', '.join(found)}: name one (received {table.split!r})")
    return found[split]


@contextmanager
def _quiet_datasets(local: bool) -> Iterator[None]:
    """Hide the progress bars of `datasets`, and its log for a local data set, whose errors we report.

    Warnings about the hub are shown: offline, `datasets` uses an earlier download, whatever its revision.
    """
    import datasets

    verbosity, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL if local else datasets.logging.WARNING)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()


# --- checking the videos ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckedClip:
    """A clip that can be decoded without errors."""

    content_id: str
    sizes: tuple[tuple[int, int, int], ...]
    """(frames, height, width) of each view, as the model receives it."""
    seconds: float
    """Duration."""


@dataclass(frozen=True)
class DatasetCheck:
    """The result of `check`."""

    examples: tuple[Example, ...]
    outcomes: tuple[CheckedClip | ClipError, ...]
    """Of each example, in order."""
    decoded: int
    """Number of files that were decoded; the others were in the cache."""

    @property
    def failed(self) -> tuple[tuple[Example, ClipError], ...]:
        """The examples that cannot be trained on, with the reason."""
        both = zip(self.examples, self.outcomes, strict=True)
        return tuple((example, outcome) for example, outcome in both if isinstance(outcome, ClipError))

    def __str__(self) -> str:
        """One line, and one more for each kind of failure, with its count, the first names and the first message."""
        kinds = Counter(type(error).__name__ for _, error in self.failed)
        lines = [f"{len(self.examples) - len(self.failed)} of {len(self.examples)} clips can be read"]
        for kind, count in kinds.most_common():
            failures = [(example.name, error) for example, error in self.failed if type(error).__name__ == kind]
            lines.append(f"  {kind}: {count} ({preview([name for name, _ in failures])}); {failures[0][1]}")
        return "\n".join(lines)


def check(
    examples: Sequence[Example],
    sampling: Sampling,
    views: Sequence[View],
    factor: int,
    *,
    cache: Path,
    workers: int = 2,
    timeout: float = 60.0,
    progress: Callable[[int, int], object] | None = None,
) -> DatasetCheck:
    """Decode every clip strictly, unless the cache says that it can be decoded.

    Args:
        examples: the clips; a file that occurs twice is decoded once.
        sampling, views, factor: as for `lmm_qa.video.decode.read_frames`.
        cache: folder that records clips that could be decoded, by path, size and modification time, separately for
            each combination of sampling, views and factor. Created if missing; several processes may use it at once.
            Failures are not recorded: the file may be copied again, a share mounted, a time limit raised.
        workers: number of decoding processes.
        timeout: seconds per clip.
        progress: called with the number of files done and of all files, at the start and after each decoded file.

    Raises:
        UsageError: `workers` or `timeout` is not positive, or `cache` cannot be written.
    """
    known = CheckedClipCache(cache, sampling, views, factor)
    paths = list(dict.fromkeys(example.path for example in examples))
    # Read before decoding: a file that changes meanwhile must not be found in the cache.
    versions = {path: _file_version(path) for path in paths}
    outcomes: dict[Path, CheckedClip | ClipError] = {
        path: clip for path in paths if (clip := known.get(path, versions[path]))
    }
    unknown = [path for path in paths if path not in outcomes]
    if progress:
        progress(len(outcomes), len(paths))
    with DecoderPool(workers, timeout) as pool:
        for path, frames in zip(unknown, pool.imap(unknown, sampling, views, factor), strict=True):
            outcomes[path] = outcome = _outcome(path, frames)
            if isinstance(outcome, CheckedClip):
                known.add(path, versions[path], outcome)
            if progress:
                progress(len(outcomes), len(paths))
    return DatasetCheck(tuple(examples), tuple(outcomes[example.path] for example in examples), len(unknown))


FileVersion = tuple[int, int]
"""Size in bytes and modification time in nanoseconds."""


def _file_version(path: Path) -> FileVersion | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _outcome(path: Path, frames: Frames | ClipError) -> CheckedClip | ClipError:
    if isinstance(frames, ClipError):
        return frames
    try:
        sizes = tuple((len(view), view.shape[1], view.shape[2]) for view in frames.views)
        return CheckedClip(content_id(path), sizes, frames.info.duration)
    except ClipError as error:
        return error


class CheckedClipCache:
    """A file with one line of JSON per clip.

    A line is appended by a single write, so that several processes can append at once. Incomplete lines are ignored.
    """

    def __init__(self, folder: Path, sampling: Sampling, views: Sequence[View], factor: int) -> None:
        settings = [sampling.model_dump(), [view.model_dump() for view in views], factor]
        name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        self._file = folder / f"clips-{name}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file.touch()
            lines = self._file.read_bytes().splitlines()
        except OSError as error:
            raise UsageError(f"cannot record in {folder} which clips were checked: {error.strerror or error}") from None
        self._known: dict[str, tuple[FileVersion, CheckedClip]] = {}
        for line in lines:
            try:
                path, size, changed, content, sizes, seconds = json.loads(line)
            except (ValueError, TypeError):
                continue
            clip = CheckedClip(content, tuple((t, h, w) for t, h, w in sizes), seconds)
            self._known[path] = (size, changed), clip

    def get(self, path: Path, version: FileVersion | None) -> CheckedClip | None:
        """The clip, if this version of the file was added."""
        known, clip = self._known.get(str(path), (None, None))
        return clip if version is not None and known == version else None

    def add(self, path: Path, version: FileVersion | None, clip: CheckedClip) -> None:
        """Record a clip; does nothing without a version (the file did not exist)."""
        if version is not None:
            line = json.dumps([str(path), *version, clip.content_id, clip.sizes, clip.seconds])
            with self._file.open("ab", buffering=0) as file:
                file.write(f"\n{line}\n".encode())
