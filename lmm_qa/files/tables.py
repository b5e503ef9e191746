"""Read and write tables of rows: .csv, .tsv, .jsonl and .parquet.

`read_table` reads tables of users (clip lists, labels): it finds columns by name and keeps CSV cells as text.
`read_rows` and `write_rows` store nested rows, as in ratings. CSV and Parquet are flat: `{"error": {"class": ...}}`
becomes the column `error.class`. They cannot distinguish None from a missing value, an empty dict, or a dict of None.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lmm_qa.errors import LmmQaError, ManifestError, ResultsError, UsageError
from lmm_qa.files.atomic import replacing

Row = dict[str, Any]

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
"""Formats that can be read."""
OUTPUT_SUFFIXES = (".jsonl", ".csv", ".parquet")
"""Formats that can be written."""
CLIP_COLUMNS = ("clip", "video", "path", "file", "filename", "name")
"""Usual names of the column that names the clip, by precedence."""
FORMULA = re.compile(r"[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
"""Beginning of a cell that spreadsheets take for a formula, with the full-width forms (OWASP, "CSV Injection")."""
PARQUET_BATCH = 256
"""Rows of a Parquet file that are in memory as Python objects at once."""


class Column(NamedTuple):
    """A column to find in a table."""

    name: str
    """Its key in the rows that `read_table` returns."""
    candidates: Sequence[str]
    """Names that it may have in the file, by precedence; case and surrounding space are ignored."""
    required: bool = True
    """If False, the values are None where the file has no such column."""


# --- reading tables of users -----------------------------------------------------------------------------------------


def read_table(
    path: Path, columns: Sequence[Column], error: type[LmmQaError] = ManifestError
) -> Iterator[tuple[str, Row]]:
    """Yield `file:line` (for Parquet `file:row`, from 1) and the requested columns of each row that is not blank.

    Text is UTF-8, with or without a byte order mark, with any line ends. CSV cells are text. A key that a JSON object
    lacks is None.

    Raises:
        LmmQaError: of the class `error`: the file cannot be read, has another format, or lacks a required column.
    """
    names, rows = _read(path, error)
    found = find_columns(names, columns, str(path), error) if names else {}
    for line, row in rows:
        yield f"{path}:{line}", {column.name: row.get(found.get(column.name, "")) for column in columns}


def find_columns(
    names: Sequence[str], columns: Sequence[Column], where: str, error: type[LmmQaError] = ManifestError
) -> dict[str, str]:
    """Return the actual name of each requested column that is among `names`.

    Raises:
        LmmQaError: of the class `error`: a required column is missing. The message begins with `where`.
    """
    known = {_normalised(name): name for name in reversed(names)}
    found: dict[str, str] = {}
    missing: list[str] = []
    for column in columns:
        present = [known[key] for key in map(_normalised, column.candidates) if key in known]
        if present:
            found[column.name] = present[0]
        elif column.required:
            missing.append(f"no column is named {_either(column.candidates)}")
    if missing:
        raise error(f"{where}: {'; '.join(missing)}; the columns are: {', '.join(names)}")
    return found


def read_lines(path: Path, error: type[LmmQaError] = ManifestError) -> Iterator[tuple[str, str]]:
    """Yield `file:line` and the stripped text of each line that is not blank.

    Raises:
        LmmQaError: of the class `error`: the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        raise _unreadable(path, problem, error) from None
    yield from ((f"{path}:{line}", cell.strip()) for line, cell in enumerate(text.split("\n"), 1) if cell.strip())


def _normalised(name: str) -> str:
    return name.strip().casefold()


def _either(words: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


# --- reading and writing nested rows ---------------------------------------------------------------------------------


def read_rows(path: Path) -> list[Row]:
    """Read what `write_rows` wrote. The last line of a .jsonl file is left out if its writer died while writing it.

    Raises:
        UsageError: the suffix is not one of `OUTPUT_SUFFIXES`.
        ResultsError: the file cannot be read.
    """
    form = output_form(path)
    _, rows = _read(path, ResultsError, skip_incomplete=True)
    if form == ".jsonl":
        return [row for _, row in rows]
    decode = _decoded if form == ".csv" else _unchanged
    return [_nested({column: decode(value) for column, value in row.items()}) for _, row in rows]


def write_rows(path: Path, rows: Sequence[Row], safe_csv: bool = False) -> None:
    """Write all rows into a .jsonl, .csv or .parquet file. The file is replaced in one step.

    Args:
        path: the file.
        rows: its content.
        safe_csv: put an apostrophe before texts in .csv that a spreadsheet would run as a formula (see `FORMULA`);
            `read_rows` removes it.

    Raises:
        UsageError: the suffix is not one of `OUTPUT_SUFFIXES`.
        ResultsError: the file cannot be written, or the rows do not fit into a table.
    """
    write: Mapping[str, Callable[[BinaryIO, Sequence[Row]], None]]
    write_csv = partial(_write_csv, safe=safe_csv)
    write = {".jsonl": _write_jsonl, ".csv": write_csv, ".parquet": _write_parquet}
    try:
        with replacing(path) as temporary:
            with open(temporary, "wb") as file:
                write[output_form(path)](file, rows)
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                shutil.copymode(path, temporary)
    except OSError as error:
        raise unwritable(path, error) from None


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Give a temporary path that replaces `path` when the block ends; missing folders are created.

    Raises:
        ResultsError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise unwritable(path, error) from None


def output_form(path: Path) -> str:
    """Return the suffix of `path` in lower case, one of `OUTPUT_SUFFIXES`.

    Raises:
        UsageError: the suffix is another one.
    """
    if (form := path.suffix.lower()) in OUTPUT_SUFFIXES:
        return form
    raise UsageError(f"the format of {str(path)!r} is not known by its suffix: use .jsonl, .csv or .parquet")


def to_json(row: Row) -> str:
    """Return one line of JSON. Non-ASCII characters are written as they are; lone surrogates are escaped.

    Raises:
        ResultsError: a value cannot be represented in JSON (NaN, for example).
    """
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ResultsError(f"the row of {row.get('clip')!r} cannot be written as JSON: {error}") from None
    return _escape_surrogates(text)


def journal(path: Path) -> Path:
    """The .jsonl file with the rows of an unfinished run, for formats to which no row can be appended."""
    return path.with_name(f"{path.name}.partial.jsonl")


def is_object(line: bytes) -> bool:
    """Whether a line is a complete JSON object."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def unwritable(path: Path, error: OSError) -> ResultsError:
    """The error for a file that cannot be written."""
    return ResultsError(f"cannot write {path}: {error.strerror or error}")


def shown(value: object) -> str:
    """A cell of a table, for messages: on one line and not long, whatever is in it."""
    return one_line(repr(value), 80)


def path_in(value: object) -> object:
    """The path in a cell of a `Video` or `Image` column of datasets, {"path", "bytes"}; any other value as it is."""
    return value["path"] if isinstance(value, dict) and isinstance(value.get("path"), str) else value


def one_line(text: str, length: int) -> str:
    """The text without line breaks, cut to `length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 3]}..."


def _write_jsonl(file: BinaryIO, rows: Sequence[Row]) -> None:
    file.writelines(f"{to_json(row)}\n".encode() for row in rows)


def _write_csv(file: BinaryIO, rows: Sequence[Row], safe: bool) -> None:
    flat = [_flat(row) for row in rows]
    columns = _ordered_columns(flat)
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(columns)
    table.writerows([_encoded(row.get(column), safe) for column in columns] for row in flat)
    text.detach()


def _write_parquet(file: BinaryIO, rows: Sequence[Row]) -> None:
    import pyarrow
    import pyarrow.parquet

    flat = [_flat(row) for row in rows]
    arrays = {}
    for column in _ordered_columns(flat):
        try:
            array = pyarrow.array([_storable(row.get(column)) for row in flat])
        except (pyarrow.ArrowException, OverflowError) as error:
            raise ResultsError(f"column {column!r} fits no Parquet type: {error}; use .jsonl") from None
        # Arrow's `null` type of a column without values would not match the type of this column in other files.
        arrays[column] = array.cast(pyarrow.string()) if pyarrow.types.is_null(array.type) else array
    pyarrow.parquet.write_table(pyarrow.table(arrays), file)


def _storable(value: Any) -> Any:
    """Arrow's strings are UTF-8; file names may contain other bytes."""
    if isinstance(value, list):
        return [_storable(item) for item in value]
    return _escape_surrogates(value) if isinstance(value, str) else value


def _escape_surrogates(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _encoded(value: Any, safe: bool) -> str:
    """A CSV cell: empty for None, JSON for everything but a string that cannot be mistaken for JSON."""
    if value is None:
        return ""
    if isinstance(value, str) and _decoded(value) == value and not re.search(r"[\0\r\ud800-\udfff]", value):
        return f"'{value}" if safe and FORMULA.match(value) else value
    return _escape_surrogates(json.dumps(value, ensure_ascii=False))


def _decoded(cell: str) -> Any:
    """The inverse of `_encoded`."""
    if not cell:
        return None
    if cell.startswith("'") and FORMULA.match(cell, 1):
        return cell[1:]
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return cell


def _unchanged(value: Any) -> Any:
    return value


def _flat(row: Row, prefix: str = "") -> Row:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: Row = {}
    for key, value in row.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = None if value == {} else value
    return flat


def _nested(flat: Row) -> Row:
    """The inverse of `_flat`; a dict whose values are all None becomes None."""
    nested: Row = {}
    for column, value in flat.items():
        *groups, leaf = column.split(".")
        inner = nested
        for group in groups:
            inner = inner.setdefault(group, {})
            if not isinstance(inner, dict):  # a table from elsewhere that has both `a` and `a.b`
                inner, leaf = nested, column
                break
        inner.setdefault(leaf, value)
    return {key: _none_if_empty(value) for key, value in nested.items()}


def _none_if_empty(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    filled = {key: _none_if_empty(inner) for key, inner in value.items()}
    return None if all(inner is None for inner in filled.values()) else filled


def _ordered_columns(rows: Iterable[Row]) -> list[str]:
    """All columns by first occurrence, with the columns of a dict side by side.

    `error` (None in most rows) is dropped if there are `error.class` and `error.message`.

    Raises:
        ResultsError: a column is a dict in some rows and has another type in others.
    """
    filled: dict[str, bool] = {}
    for row in rows:
        for column, value in row.items():
            filled[column] = filled.get(column, False) or value is not None
    parents = {column[: dot.start()] for column in filled for dot in re.finditer(r"\.", column)}
    for column in sorted(parents):
        if filled.get(column):
            raise ResultsError(f"{column!r} is a dict in some rows and has another type in others: use .jsonl")
    position = {top: number for number, top in enumerate(dict.fromkeys(column.split(".")[0] for column in filled))}
    return sorted((c for c in filled if c not in parents), key=lambda column: position[column.split(".")[0]])


# --- the formats -----------------------------------------------------------------------------------------------------

Rows = Iterable[tuple[int, Row]]
"""Line (in Parquet: row) numbers from 1, and rows."""


def _read(path: Path, error: type[LmmQaError], skip_incomplete: bool = False) -> tuple[Sequence[str], Rows]:
    """Column names and rows of a file."""
    form = path.suffix.lower()
    try:
        if form in (".csv", ".tsv"):
            return _read_csv(path, "\t" if form == ".tsv" else ",", error)
        if form == ".jsonl":
            return _read_jsonl(path, error, skip_incomplete)
        if form == ".parquet":
            return _read_parquet(path, error)
    except (OSError, UnicodeDecodeError) as problem:
        raise _unreadable(path, problem, error) from None
    raise error(f"{path}: a table is one of {', '.join(TABLE_SUFFIXES)}")


def _read_csv(path: Path, delimiter: str, error: type[LmmQaError]) -> tuple[Sequence[str], Rows]:
    rows: list[tuple[int, Row]] = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, delimiter=delimiter)
        try:
            names = _distinct(next(filter(any, reader), []))
            if not names:
                raise error(f"{path} is empty: expected a header with the names of the columns")
            for cells in reader:
                if not any(map(str.strip, cells)):
                    continue
                if len(cells) != len(names):
                    raise error(f"{path}:{reader.line_num}: expected {len(names)} cells, received {len(cells)}")
                rows.append((reader.line_num, dict(zip(names, cells, strict=True))))
        except csv.Error as problem:
            raise error(f"{path}:{reader.line_num}: invalid CSV: {problem}") from None
    return names, rows


def _distinct(header: Iterable[str]) -> list[str]:
    """Column names; a column without a name, or with that of an earlier one, gets its number."""
    names: list[str] = []
    for number, cell in enumerate(map(str.strip, header), 1):
        names.append(cell if cell and cell not in names else f"{cell or 'column'}.{number}")
    return names


def _read_jsonl(path: Path, error: type[LmmQaError], skip_incomplete: bool) -> tuple[Sequence[str], Rows]:
    rows: list[tuple[int, Row]] = []
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(keepends=True), 1):
        if not line.strip():
            continue
        row, reason = None, ""
        try:
            row = json.loads(line)
        except json.JSONDecodeError as problem:
            reason = f" ({problem.msg})"
        except (ValueError, RecursionError) as problem:
            reason = f" ({problem})"
        if isinstance(row, dict):
            rows.append((number, row))
        elif not (skip_incomplete and line.startswith(b"{") and not line.endswith(b"\n")):
            received = one_line(repr(line.decode("utf-8", "replace").strip()), 80)
            raise error(f"{path}:{number}: expected a JSON object, received {received}{reason}")
    return list(dict.fromkeys(name for _, row in rows for name in row)), rows


def _read_parquet(path: Path, error: type[LmmQaError]) -> tuple[Sequence[str], Rows]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as problem:
        raise error(f"{path} is not a Parquet file: {problem}") from None

    def rows() -> Iterator[tuple[int, Row]]:
        number = 0
        try:
            for batch in file.iter_batches(PARQUET_BATCH):
                for row in batch.to_pylist():
                    yield (number := number + 1), row
        except (pyarrow.ArrowException, OSError) as problem:
            raise error(f"cannot read {path}, row {number + 1}: {problem}") from None

    return file.schema_arrow.names, rows()


def _unreadable(path: Path, problem: OSError | UnicodeDecodeError, error: type[LmmQaError]) -> LmmQaError:
    if isinstance(problem, UnicodeDecodeError):
        return error(f"cannot read {path}: it is not UTF-8 text: {problem}; save it as UTF-8")
    return error(f"cannot read {path}: {problem.strerror or problem}")
