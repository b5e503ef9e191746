"""Labelled clips to train on: read through `datasets`, split by the person shown, found and decoded before training.

    splits = load(Data.parse({"root": "/data", "train": [{"path": "train.csv", "scale": [0, 5]}]}, "data"), seed=0)
    print(splits)                                       # how many clips where, and what was left out and why
    survey = check(splits.train, sampling, views, factor, cache=Path("runs/x/cache"))
    print(survey)                                       # what is missing or cannot be read

Knows tables, files and groups; nothing of models, targets or losses.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import math
import os
import re
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from lmm_qa.evaluation.labels import GROUP_COLUMN, LABEL_SUFFIXES, SCORE_COLUMNS, group_folds
from lmm_qa.evaluation.thqa import try_parse
from lmm_qa.manifest import CLIP_COLUMNS, VIDEO_SUFFIXES, content_id
from lmm_qa.video.decode import Frames
from lmm_qa.video.decoder_pool import DecoderPool

SHOWN = 3


"""Problems, and names, that a message lists before it only counts."""


DENIABLE = tuple(name for name in reference_defects(()) if name in VISIBLE)


"""Defects that a clip does not have where its row does not name them: those that a damage of ours can make."""


class Table(Settings):
    """Clips and what people said of them."""

    path: str
    """A .csv, .tsv, .jsonl or .parquet file or a data set directory, relative to `Data.root`; else an id on the Hugging
    Face hub. A file or directory is read anew each time and leaves nothing in a cache; a data set of the hub is
    downloaded once, into the cache of the hub's own tools."""
    split: str | None = None
    """Which split of a directory or hub data set. Default: the only one."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set. Default: its main branch."""
    videos: str = "."
    """Folder of the clips, relative to `Data.root`. A name without the suffix of a video gets that of the one video
    there that is otherwise called so. Default: `Data.root` itself."""
    scale: ScaleEnds
    """MOS of the worst and of the best clip that people could give: declared, never inferred. No default."""
    clip: str | None = None
    """Column that names the clip, or holds it as a video that is a file. Default: the first of
    `lmm_qa.manifest.CLIP_COLUMNS` that is there. Columns are found in any case."""
    mos: str | None = None
    """Column of the MOS. Default: the first of `lmm_qa.evaluation.labels.SCORE_COLUMNS` that is there."""
    std: str | None = None
    """Column of the standard deviation of the opinions, on `scale`; cells may be empty. Default: there is none."""
    votes: str | None = None
    """Column of the number of opinions; cells may be empty. Default: there is none."""
    group: str | None = None
    """Column that says which clips must stay together. Default: `group`, where there is one. See `Example.group`."""
    defects: str | None = None
    """Column of the defects that a clip has, the main ones first. Default: `defects`, where there is one. A cell is a
    list, or text with `;` between names of `lmm_qa.defects.vocabulary`. A name may be followed by its time, as in
    `stall from 1.2 to 2.0 s`; one with `?` before it is neither there nor absent. Defects that are not named are
    absent, all of them where the cell is empty; where it is null, or `?` alone, nothing is known."""
    explanation: str | None = None
    """Column of a text that says why a clip is rated so: `The quality of this video is fair: the picture is blurred.`
    What comes before the first level word only leads up to it. Cells may be empty. Default: `explanation`, where there
    is one."""


class Data(Settings):
    """What to train on, and what to keep away from training."""

    root: Path = Path()
    """Folder that tables and videos are relative to. Default: the current folder."""
    train: tuple[Table, ...] = Field(min_length=1)
    """What to train on; at least one table."""
    validation: tuple[Table, ...] = ()
    """What to watch the training with. Default: none, a share of the training groups is held out."""
    validation_share: float = Field(0.1, ge=0, lt=1)
    """Share of the training clips, in whole groups, held out where there is no validation table; 0, or about a
    hundredth at least. Default: 0.1."""
    calibration_share: float = Field(0.1, ge=0, lt=1)
    """Share of the training clips, in whole groups, held out to map scores to MOS. Default: 0.1. (Of THQA-NTIRE, a
    smaller one can be a single person.)"""

    @model_validator(mode="after")
    def _something_is_left(self) -> Self:
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
    """As the table calls it."""
    path: Path
    """Absolute. Whether a video lies there, `check` says."""
    mos: float
    """On `scale`."""
    std: float | None
    """Standard deviation of the opinions, in units of `scale`."""
    votes: int | None
    """Number of opinions."""
    group: Hashable
    """Clips of one group never lie on both sides of a split.

    - a text: what the table's group column says. The same text means the same in all tables: a person overlooked would
      make validation lie, while two sets that number their persons alike only cost training clips, of which
      `Splits.left_out` tells. (Write `konvid-1` then, not `1`.)
    - a pair: class and pid of a THQA-NTIRE name, in whichever table.
    - a `Path`: the clip itself. Clips of the same name in different folders are two.
    """
    scale: tuple[float, float]
    """MOS of the worst and of the best clip that people could give."""
    found: tuple[Finding, ...] | None = None
    """Defects that are there, the main ones first; None where nothing is known."""
    absent: tuple[str, ...] = ()
    """Names of defects that are not there."""
    explanation: str | None = None
    """Why it is rated so."""

    def on(self, scale: tuple[float, float]) -> Example:
        """The same opinions on another scale, worst on worst and best on best, linear between."""
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
class LeftOut:
    """Training clips that are not trained on, because validation has clips of their group."""

    group: Hashable
    clips: tuple[str, ...]
    held_out: int
    """Validation clips of the group."""

    def __str__(self) -> str:
        group = " ".join(map(str, self.group)) if isinstance(self.group, tuple) else str(self.group)
        return (
            f"{len(self.clips)} training clips are left out: they belong to {group}, as {self.held_out} validation "
            f"clips do ({_some(self.clips)})"
        )


@dataclass(frozen=True)
class Splits:
    """Clips by what they are for, each sorted by path. No group lies in two of them."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    calibration: tuple[Example, ...]
    left_out: tuple[LeftOut, ...]
    """Training clips of groups that lie in the validation tables. THQA-NTIRE as published has 55 of them."""

    def __str__(self) -> str:
        parts = {"train": self.train, "validation": self.validation, "calibration": self.calibration}
        counts = [f"{name} {len(part)} clips of {len({e.group for e in part})} groups" for name, part in parts.items()]
        return "\n".join(["; ".join(counts), *map(str, self.left_out)])


def load(data: Data, seed: int) -> Splits:
    """Read the tables and split by group. Neither the order of the rows nor that of the tables matters.

    Validation and calibration clips are whole groups, drawn by `seed`; about as many clips as their shares say, at
    least one group each, large and small groups alike (`lmm_qa.evaluation.labels.group_folds`).

    Raises:
        ManifestError: a table cannot be found, read or understood, holds a value that it may not hold, or the groups
            are too few to be split. A message names the table, and the rows, from 1 without the header.
    """
    root = data.root.expanduser().absolute()
    train, validation = _read_all(data.train, root), _read_all(data.validation, root)
    train, left_out = _without_leaks(train, validation)
    shares = (0.0 if data.validation else data.validation_share, data.calibration_share)
    train, drawn, calibration = _deal(train, shares, seed)
    return Splits(train, validation or drawn, calibration, left_out)


# --- splitting -------------------------------------------------------------------------------------------------------


def _without_leaks(
    train: Sequence[Example], validation: Sequence[Example]
) -> tuple[tuple[Example, ...], tuple[LeftOut, ...]]:
    """The training clips that share neither group nor file with validation, and the others by group."""
    # A file on both sides carries its training group over, even where the validation table tells no groups.
    trained = {example.path: example.group for example in train}
    held = Counter(group for e in validation for group in {e.group, trained.get(e.path, e.group)})
    leaks: dict[Hashable, list[str]] = defaultdict(list)
    for example in train:
        if example.group in held:
            leaks[example.group].append(example.name)
    left_out = tuple(LeftOut(group, tuple(leaks[group]), held[group]) for group in sorted(leaks, key=repr))
    return tuple(example for example in train if example.group not in held), left_out


def _deal(
    train: tuple[Example, ...], shares: tuple[float, float], seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...], tuple[Example, ...]]:
    """Training clips, sorted, in three parts: what remains, and one part for each share, 0 for none.

    Groups are dealt to folds of like size, of which each part gets as many as its share asks for, at least one.
    """
    groups = {example.group for example in train}
    parts = [max(Fraction(share).limit_denominator(100), Fraction(1, 100)) for share in shares if share]
    folds = min(math.lcm(*(part.denominator for part in parts)), len(groups))
    wanted = [max(1, round(share * folds)) if share else 0 for share in shares]
    if sum(wanted) >= folds:
        raise ManifestError(
            f"{len(train)} training clips in {len(groups)} groups are too few to train on and to hold out shares of "
            f"{shares[0]:g} (validation) and {shares[1]:g} (calibration): add clips, or name what tells persons apart"
        )
    fold_of = group_folds([example.group for example in train], folds, seed)
    # The largest group lies in fold 0 always: which folds are held out is drawn as well.
    first, second, rest = np.split(np.random.default_rng(seed).permutation(folds), np.cumsum(wanted))
    return _of(train, np.isin(fold_of, rest)), _of(train, np.isin(fold_of, first)), _of(train, np.isin(fold_of, second))


def _of(examples: Sequence[Example], chosen: Iterable[bool]) -> tuple[Example, ...]:
    return tuple(compress(examples, chosen))


def _sorted(examples: Sequence[Example]) -> tuple[Example, ...]:
    return tuple(sorted(examples, key=lambda example: str(example.path)))


# --- reading ---------------------------------------------------------------------------------------------------------

Row = dict[str, Any]


WHERE_THERE = (GROUP_COLUMN, "defects", "explanation")


"""Columns that are read under these names, and need not be there."""


COLUMNS: dict[str, tuple[str, ...]] = {
    "clip": CLIP_COLUMNS,
    "mos": SCORE_COLUMNS,
    "std": (),
    "votes": (),
    **{name: (name,) for name in WHERE_THERE},
}


"""What we read of a row, and what it is usually called."""


def _read_all(tables: Sequence[Table], root: Path) -> tuple[Example, ...]:
    seen: dict[Path, str] = {}
    return _sorted([example for table in tables for example in _read(table, root, seen)])


def _read(table: Table, root: Path, seen: dict[Path, str]) -> list[Example]:
    """The examples of one table. `seen`, added to: where each clip of this and earlier tables has its label."""
    folder = root / Path(table.videos).expanduser()
    if not folder.is_dir():
        raise ManifestError(f"the videos of {table.path} are not there: {folder} is no folder; set `videos` or `root`")
    rows, find = _rows(table, root), _finder(folder)
    examples: list[Example] = []
    problems: list[str] = []
    for number, row in enumerate(rows, 1):
        try:
            example = _example(row, table.scale, find)
            if example.path in seen:
                raise ManifestError(f"{example.name!r} has a label already, in {seen[example.path]}: keep one of them")
        except ManifestError as error:
            problems.append(f"  row {number}: {error}")
            continue
        seen[example.path] = f"{table.path}, row {number}"
        examples.append(example)
    if problems:
        more = [f"  and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        count = f"{len(problems)} of {len(rows)} rows of {table.path} cannot be used:"
        raise ManifestError("\n".join([count, *problems[:SHOWN], *more]))
    if not examples:
        raise ManifestError(f"{table.path} holds no labels")
    return examples


def _example(row: Row, scale: tuple[float, float], find: Callable[[str], Path]) -> Example:
    name = _text(row["clip"])
    if not name or "\0" in name:
        raise ManifestError(f"the name of a clip was expected, received {row['clip']!r}")
    mos = _number(row["mos"], "MOS", name)
    if not scale[0] <= mos <= scale[1]:
        raise ManifestError(
            f"MOS {mos:g} of {name!r} lies outside the declared scale [{scale[0]:g}, {scale[1]:g}]: declare the scale "
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
    said = _text(row.get("explanation")) or None
    return Example(name, path, mos, std, None if votes is None else int(votes), group, scale, found, absent, said)


_DEFECT = re.compile(r"(\??) *(\w+)((?: (?:and )?from \d+(?:\.\d+)? to \d+(?:\.\d+)? s)*)")


def _defects(cell: Any, name: str) -> tuple[tuple[Finding, ...] | None, tuple[str, ...]]:
    """What a cell says to be there, None where it says nothing, and what is not there."""
    if cell is None or cell != cell or cell == "?":
        return None, ()
    if isinstance(cell, str):
        cell = _listed(cell)
    if not isinstance(cell, list):
        raise ManifestError(f"the defects of {name!r} are names with ; between them, received {cell!r}")
    found: list[Finding] = []
    named: set[str] = set()
    for text in cell:
        match = _DEFECT.fullmatch(str(text).strip())
        unsure, defect, when = match.groups() if match else ("", "", "")
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
        if not unsure:
            found.append(Finding(defect, 1.0, tuple(zip(times[::2], times[1::2], strict=True))))
    return tuple(found), tuple(defect for defect in DENIABLE if defect not in named)


def _listed(cell: str) -> Any:
    """The parts of a text; a list within a CSV is JSON."""
    try:
        return json.loads(cell) if cell.startswith("[") else cell.split(";") if cell.strip() else []
    except ValueError:
        return cell


def _text(value: object) -> str:
    """A cell as text; nothing for an empty one. A number that a table with gaps turned into 7.0 is 7 again."""
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


def _finder(folder: Path) -> Callable[[str], Path]:
    """From the name of a clip to where it is, or should be."""

    @cached
    def videos(place: Path) -> Mapping[str, list[str]]:
        """Videos by their names without suffix; one look at a folder is cheaper than one for each name and suffix."""
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
    """The rows of a table with the columns that are needed, under our names: those of `COLUMNS`."""
    local = root / Path(table.path).expanduser()
    try:
        # A local table is not left behind in a cache, where it would be copied again for each of its versions.
        with tempfile.TemporaryDirectory() as scratch, _quiet(local.exists()):
            dataset = _open(table, local, scratch).with_format("arrow")
            columns = _columns(table, dataset.column_names)
            cells = dataset.select_columns(sorted(set(columns.values())))
            # The first row alone first: it tells whether a video column holds names or gigabytes.
            rows = [_row(row, columns, table) for part in (cells[:1], cells[1:]) for row in part.to_pylist()]
    except LmmQaError:
        raise
    except Exception as error:  # the library, and those that it stands on, raise dozens of classes
        cause = error.__cause__ or error
        what = str(local) if local.exists() else f"{local} is not there, and {table.path} on the hub"
        message = next(iter(str(cause).strip().splitlines()), "")
        raise ManifestError(f"{what} cannot be read: {type(cause).__name__}: {message}") from None
    return rows


def _row(cells: Mapping[str, Any], columns: Mapping[str, str], table: Table) -> Row:
    """A row under our names, with the file of its video where that stands in a video column."""
    row = {ours: cells[theirs] for ours, theirs in columns.items()}
    if isinstance(video := row["clip"], Mapping):
        if video.get("bytes") is not None or not video.get("path"):
            raise ManifestError(
                f"{table.path} holds its videos inside itself: write them to files, and name these in a column"
            )
        row["clip"] = video["path"]
    return row


def _open(table: Table, local: Path, scratch: str) -> Any:
    """The data set of a table, of the library's class `Dataset`."""
    import datasets

    if not local.exists() and not _is_hub_id(table.path):
        raise ManifestError(
            f"there is no table at {local}: give a file ({', '.join(LABEL_SUFFIXES)}) or a data set directory, "
            "relative to `root`, or an id on the hub such as name/set"
        )
    if local.exists() and table.revision:
        raise ManifestError(f"a revision is one of a data set on the hub; {local} is not (received {table.revision!r})")
    if local.is_file():
        if table.split:
            raise ManifestError(f"a file has no splits; {local} is one (received {table.split!r})")
        found = _open_file(local, scratch)
    elif (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
        found = datasets.load_from_disk(str(local))
    elif local.is_dir():
        found = datasets.load_dataset(str(local), cache_dir=scratch)
    else:
        found = datasets.load_dataset(table.path, revision=table.revision)
    if isinstance(found, datasets.Dataset):
        found = {str(found.split or "train"): found}
    split = table.split or (next(iter(found)) if len(found) == 1 else None)
    if split not in found:
        raise ManifestError(f"{table.path} has the splits {', '.join(found)}: name one (received {table.split!r})")
    return found[split]


def _is_hub_id(path: str) -> bool:
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", path)) and Path(path).suffix.lower() not in LABEL_SUFFIXES


def _open_file(file: Path, scratch: str) -> Any:
    import datasets

    suffix = file.suffix.lower()
    if suffix not in LABEL_SUFFIXES:
        raise ManifestError(f"{file}: a table is one of {', '.join(LABEL_SUFFIXES)}")
    options: dict[str, Any] = {"data_files": glob.escape(str(file)), "cache_dir": scratch}
    if suffix == ".jsonl":
        return datasets.load_dataset("json", **options)
    if suffix == ".parquet":
        return datasets.load_dataset("parquet", **options)
    separator = "\t" if suffix == ".tsv" else ","
    names = _header(file, separator)
    # All cells as the text that they are: clip 0012 is not clip 12, and one called NA is no missing one.
    features = datasets.Features({name: datasets.Value("string") for name in names})
    options |= {"sep": separator, "names": names, "header": 0, "features": features, "na_filter": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Length of header")  # of pandas: cells that no column has room for
        return datasets.load_dataset("csv", index_col=False, **options)


def _header(file: Path, separator: str) -> list[str]:
    """The column names of a CSV; one that has none, or that of an earlier column, gets its number."""
    with file.open(newline="", encoding="utf-8-sig") as stream:
        rows = (row for row in csv.reader(stream, delimiter=separator) if row)
        cells = next(rows, [])
        if not cells:
            raise ManifestError(f"{file} is empty: a header with the names of the columns was expected")
        if next(rows, None) is None:
            raise ManifestError(f"{file} holds no labels")
    names: list[str] = []
    for number, cell in enumerate(map(str.strip, cells), 1):
        names.append(cell if cell and cell not in names else f"{cell or 'column'}.{number}")
    return names


def _columns(table: Table, names: Sequence[str]) -> dict[str, str]:
    """What each of our columns is called in a table that has the columns `names`."""
    known = {name.strip().casefold(): name for name in reversed(names)}
    candidates: dict[str, Sequence[str]] = {}
    for ours, usual in COLUMNS.items():
        declared: str | None = getattr(table, ours)
        candidates[ours] = (declared,) if declared else usual
        if ours in WHERE_THERE and not declared and ours not in known:
            candidates[ours] = ()
    found: dict[str, str] = {}
    missing: list[str] = []
    for ours, allowed in candidates.items():
        there = [known[name.strip().casefold()] for name in allowed if name.strip().casefold() in known]
        if there:
            found[ours] = there[0]
        elif allowed:
            missing.append(f"no column is named {' or '.join(allowed)} (`{ours}`)")
    if missing:
        raise ManifestError(f"{table.path}: {'; '.join(missing)}; the columns are: {', '.join(names)}")
    return found


@contextmanager
def _quiet(local: bool) -> Iterator[None]:
    """No bars of `datasets`, and for a local table none of its complaints, which our errors repeat. Of the hub, its
    warnings stay (offline it gives what was downloaded once, whatever the revision), and the bars of its downloads."""
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
class Seen:
    """A clip that decodes from its first frame to its last."""

    content_id: str
    sizes: tuple[tuple[int, int, int], ...]
    """(frames, height, width) of each view, as the model will get it."""


@dataclass(frozen=True)
class DatasetCheck:
    """What a look at all clips found."""

    examples: tuple[Example, ...]
    found: tuple[Seen | ClipError, ...]
    """For each example, in order."""
    decoded: int
    """Files that were decoded now; the others were known from before."""

    @property
    def failed(self) -> tuple[tuple[Example, ClipError], ...]:
        """What cannot be trained on, and why."""
        both = zip(self.examples, self.found, strict=True)
        return tuple((example, found) for example, found in both if isinstance(found, ClipError))

    def __str__(self) -> str:
        """One line; for each kind of failure one more, with its count, the first names, and the first message."""
        kinds = Counter(type(error).__name__ for _, error in self.failed)
        lines = [f"{len(self.examples) - len(self.failed)} of {len(self.examples)} clips can be read"]
        for kind, count in kinds.most_common():
            failures = [(example.name, error) for example, error in self.failed if type(error).__name__ == kind]
            lines.append(f"  {kind}: {count} ({_some([name for name, _ in failures])}); {failures[0][1]}")
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
    """Find every clip and decode it strictly, or remember from an earlier time that it can be decoded.

    Args:
        examples: the clips; one that occurs twice is looked at once.
        sampling, views, factor: as for `lmm_qa.video.decode.read_frames`.
        cache: folder in which clips that were decoded are remembered, by path, size and time of change, for these
            sampling, views and factor. Made where it is missing; several processes may use it at once. Failures are
            not remembered: a file can be copied again, a share mounted, a time limit raised.
        workers: decoding processes.
        timeout: seconds that one clip may take.
        progress: called with the number of files done, and of all files: at the start and after each that is decoded.

    Raises:
        UsageError: `workers` or `timeout` is not positive, or `cache` cannot be written.
    """
    memo = _Memo(cache, sampling, views, factor)
    paths = list(dict.fromkeys(example.path for example in examples))
    # Taken before decoding, so that a clip that changes meanwhile is not known next time.
    stamps = {path: _stamp(path) for path in paths}
    found: dict[Path, Seen | ClipError] = {path: seen for path in paths if (seen := memo.get(path, stamps[path]))}
    fresh = [path for path in paths if path not in found]
    if progress:
        progress(len(found), len(paths))
    with DecoderPool(workers, timeout) as pool:
        for path, frames in zip(fresh, pool.imap(fresh, sampling, views, factor), strict=True):
            found[path] = result = _seen(path, frames)
            if isinstance(result, Seen):
                memo.add(path, stamps[path], result)
            if progress:
                progress(len(found), len(paths))
    return DatasetCheck(tuple(examples), tuple(found[example.path] for example in examples), len(fresh))


Stamp = tuple[int, int]


"""Size in bytes, and time of the last change in nanoseconds."""


def _stamp(path: Path) -> Stamp | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _seen(path: Path, frames: Frames | ClipError) -> Seen | ClipError:
    if isinstance(frames, ClipError):
        return frames
    try:
        return Seen(content_id(path), tuple((len(view), view.shape[1], view.shape[2]) for view in frames.views))
    except ClipError as error:
        return error


class _Memo:
    """A file with a line of JSON a clip. Each is added in one write, so that processes do not cut into each other's
    lines; one that a crash cut off is skipped."""

    def __init__(self, folder: Path, sampling: Sampling, views: Sequence[View], factor: int) -> None:
        look = [sampling.model_dump(), [view.model_dump() for view in views], factor]
        name = hashlib.sha256(json.dumps(look).encode()).hexdigest()[:16]
        self._file = folder / f"clips-{name}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file.touch()
            lines = self._file.read_bytes().splitlines()
        except OSError as error:
            raise UsageError(f"{folder} cannot keep which clips were checked: {error.strerror or error}") from None
        self._known: dict[str, tuple[Stamp, Seen]] = {}
        for line in lines:
            try:
                path, size, changed, content, sizes = json.loads(line)
            except (ValueError, TypeError):
                continue
            self._known[path] = (size, changed), Seen(content, tuple((t, h, w) for t, h, w in sizes))

    def get(self, path: Path, stamp: Stamp | None) -> Seen | None:
        """What is known of a clip as it is now."""
        then, seen = self._known.get(str(path), (None, None))
        return seen if then is not None and then == stamp else None

    def add(self, path: Path, stamp: Stamp | None, seen: Seen) -> None:
        """Remember a clip, unless it was not there when it was looked at."""
        if stamp is not None:
            line = json.dumps([str(path), *stamp, seen.content_id, seen.sizes])
            with self._file.open("ab", buffering=0) as file:
                file.write(f"\n{line}\n".encode())


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
