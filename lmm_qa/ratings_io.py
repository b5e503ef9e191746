"""Rating rows out and in: one row a clip, written as it comes, picked up again after an interruption.

A row is a plain dict that JSON can hold. What stands in it is the rater's business, except for the columns that say
which clip was rated by what (`clip`, `content_id`, `rater_id`) and whether that failed (`error`). Knows nothing of
models or videos.

CSV and Parquet are flat: `{"error": {"class": ...}}` becomes the column `error.class`. A flat table cannot tell a value
that is None from one that is not there: both are None when read back, as is a dict that holds nothing, or only None.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self, TextIO

from lmm_qa.atomic import replacing
from lmm_qa.errors import ResultsError, UsageError
from lmm_qa.tables import Row

if TYPE_CHECKING:
    pass

from lmm_qa.tables import _one_line

OUTPUT_SUFFIXES = (".jsonl", ".csv", ".parquet")


OUR_COLUMNS = ("clip", "content_id", "rater_id")


"""What every row of a file must have, for the file to be taken for ratings of ours."""


class RatingsWriter:
    """A file of ratings, while a run writes it.

        with RatingsWriter(path, [clip.name for clip in clips], rater_id) as sink:
            waiting = [clip for clip in clips if sink.resume(clip.name, content_id(clip.path)) is None]
            for rating in rate(waiting):
                sink.write(rating.to_row())

    Each row is with the operating system when `write` returns: in the file itself (.jsonl), or in the journal beside it
    (.csv, .parquet). When the block ends well, the file holds one row for each clip of the run, in the order of the
    run; before them stand the rows of clips that earlier runs rated and this run did not ask for. It is replaced in
    one step. When the block ends with an exception, or the process dies, all rows stay and the next run goes on.

    Where several processes write the rows of one run, each has a sink of its own. That of rank 0 is the one described
    here: it is entered before the others, calls `gather` after they were left, and is left last. The others write
    shards beside the file. Those of a run that died are taken up by the next one, however many processes it has.
    """

    def __init__(
        self,
        path: Path,
        clips: Sequence[str],
        rater_id: str,
        overwrite: bool = False,
        rank: int = 0,
        needs: Sequence[str] = (),
        profile_id: str | None = None,
    ) -> None:
        """
        Args:
            path: the file; its suffix (one of `OUTPUT_SUFFIXES`) says in which form. Missing folders are made.
            clips: the names of all clips of this run, in order, no two the same.
            rater_id: what rates them. Ratings of another rater, or of this one before it was calibrated, are neither
                reused nor mixed in.
            overwrite: forget what the file holds, whatever it is. It stays until the first new row is there; shards
                that a run left go at once.
            rank: which of the processes that write rows of this run.
            needs: columns that a row must have filled to be reused.
            profile_id: what makes the defect profiles of this run; rows with another profile_id are not reused. None:
                no profiles are requested.

        Raises:
            UsageError: the suffix is none of the three.
        """
        self.path = Path(os.path.realpath(path))
        self.rater_id = rater_id
        self.reused = 0
        """How many clips were answered by rows of earlier runs."""
        self.written = 0
        """How many rows this process has stored."""
        self.rank = rank
        self._form = output_form(path)
        self._journal = [] if self._form == ".jsonl" else [journal(self.path)]
        self._growing = shard(self.path, rank) if rank else (*self._journal, self.path)[0]
        self._stream: io.FileIO | None = None
        self._clips = dict.fromkeys(clips)
        self._overwrite = overwrite
        self._needs = needs
        self._profile_id = profile_id
        self._stored: list[Row] = []
        """What the file at `path` holds at this moment."""
        self._earlier: dict[str, Row] = {}
        """Rows of earlier runs, by clip."""
        self._rated: dict[str, Row] = {}
        """Those of them that hold a score, by content."""
        self._rows: dict[str, Row] = {}
        """Rows of this run, by clip."""

    @property
    def resumes(self) -> bool:
        """Whether earlier runs left anything that `resume` could find: else clips need not be hashed for it."""
        return bool(self._rated)

    @property
    def rows(self) -> list[Row]:
        """The rows of this run so far, in the order of its clips."""
        return [self._rows[clip] for clip in self._clips if clip in self._rows]

    def __enter__(self) -> Self:
        """Read what earlier runs left.

        Raises:
            ResultsError: the file cannot be read or written, is none of ours, or holds ratings of another rater; or
                another run is writing shards of it.
        """
        _check_writable(self.path)
        left = [] if self.rank else self._shards()
        if not self._overwrite:
            self._read_earlier(left)
        _remove(left)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Bring the file into its final form, if the run came to its end.

        Raises:
            ResultsError: the file cannot be written, or a clip of the run has no row.
        """
        if self._stream is not None:
            self._stream.close()
        if kind is None and not self.rank:
            self._finish()

    def resume(self, clip: str, content_id: str) -> Row | None:
        """The row of `clip`, if an earlier run rated its content, under whatever name; the clip is then done.

        None if it has to be rated, which is also so for one that failed before.

        Raises:
            ResultsError, ValueError: as for `write`.
        """
        known = self._rated.get(content_id)
        if known is None:
            return None
        row = {**known, "clip": clip}
        if self._earlier.get(clip) == row:
            self._rows[clip] = row
        else:
            self.write(row)
        self.reused += 1
        return row

    def write(self, row: Row) -> None:
        """Store the row of one clip.

        Raises:
            ResultsError: the row cannot be written, or is nothing that JSON can hold. Earlier rows are untouched.
            ValueError: the clip is not of this run.
        """
        if row["clip"] not in self._clips:
            raise ValueError(f"{row['clip']!r} is not among the clips of this run")
        self._store(row)
        self._rows[row["clip"]] = row
        self.written += 1

    def gather(self, written: int) -> None:
        """Take in the rows that the other ranks wrote: all their sinks are closed, and what they resumed is rated.

        Args:
            written: the sum of their `written`.

        Raises:
            ResultsError: there are more rows or fewer; all shards stay.
        """
        shards = self._shards()
        rows = [row for path in shards for row in _read(path, ".jsonl")]
        if len(rows) != written:
            raise ResultsError(
                f"the shards beside {self.path} hold {len(rows)} rows, the other ranks wrote {written}: all ranks need "
                "one file system, and no other run may write this file; the same command goes on from here"
            )
        for row in rows:
            self.write(row)
        for clip, row in self._earlier.items():
            if clip in self._clips and self._complete(row):
                self._rows.setdefault(clip, row)
        _remove(shards)

    def _complete(self, row: Row) -> bool:
        return (
            row.get("error") is None
            and all(row.get(column) is not None for column in self._needs)
            and self._profile_id in (None, row.get("profile_id"))
        )

    def _store(self, row: Row) -> None:
        line = f"{to_json(row)}\n".encode()
        try:
            if self._stream is None:
                self._stream = self._open()
            _append(self._stream, line)
        except OSError as error:
            raise _failure("write", self._growing, error) from None
        if self._growing == self.path:
            self._stored.append(row)

    def _shards(self) -> list[Path]:
        """The files of other ranks beside this one, none of them being written."""
        shards = sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}.rank*.partial.jsonl"))
        for path in shards:
            try:
                with io.FileIO(path, "r+") as stream:
                    _lock(stream, self.path)
            except OSError as error:
                raise _failure("read", path, error) from None
        return shards

    def _read_earlier(self, shards: Sequence[Path]) -> None:
        try:
            stored = _read(self.path, self._form) if _has_content(self.path) else []
            beside = {path: _read(path, ".jsonl") for path in (*self._journal, *shards) if _has_content(path)}
        except ResultsError as error:
            raise ResultsError(f"{error}; name another file, or replace it with --overwrite") from None
        for path, rows in {self.path: stored, **beside}.items():
            if any(column not in row for row in rows for column in OUR_COLUMNS):
                raise ResultsError(
                    f"{path} exists and does not hold ratings (columns {', '.join(OUR_COLUMNS)}): "
                    "name another file, or replace it with --overwrite"
                )
            if others := {row["rater_id"] for row in rows} - {self.rater_id, None}:
                raise ResultsError(
                    f"{path} holds ratings of another rater or calibration ({', '.join(sorted(map(str, others)))}; "
                    f"this one is {self.rater_id}): name another file, or replace it with --overwrite"
                )
        self._stored = stored
        self._earlier = {row["clip"]: row for rows in (stored, *beside.values()) for row in rows}
        self._rated = {row["content_id"]: row for row in self._earlier.values() if self._complete(row)}
        for path in shards:
            for row in beside.get(path, ()):
                self._store(row)

    def _open(self) -> io.FileIO:
        """Open what grows, cut off a row that was being written when an earlier run died, and keep other runs out."""
        stream = io.FileIO(self._growing, "a")
        _lock(stream, self._growing)
        if self._overwrite:
            stream.truncate(0)
        elif torn := _torn_bytes(self._growing):
            stream.truncate(stream.tell() - torn)
        elif not _ends_with_newline(self._growing):
            _append(stream, b"\n")
        return stream

    def _finish(self) -> None:
        if missing := [clip for clip in self._clips if clip not in self._rows]:
            raise ResultsError(f"{len(missing)} clips of the run have no row, the first is {missing[0]}")
        contents = {row.get("content_id") for row in self._rows.values()} - {None}
        kept = [
            row for clip, row in self._earlier.items() if clip not in self._rows and row["content_id"] not in contents
        ]
        rows = kept + self.rows
        if rows != self._stored:
            write_rows(self.path, rows)
            self._stored = rows
        _remove(self._journal)


def output_form(path: Path) -> str:
    """The suffix of `path`, one of `OUTPUT_SUFFIXES`.

    Raises:
        UsageError: it is none of them.
    """
    if (form := path.suffix.lower()) in OUTPUT_SUFFIXES:
        return form
    raise UsageError(f"cannot tell the form of {str(path)!r} by its suffix: use .jsonl, .csv or .parquet")


def journal(path: Path) -> Path:
    """Where the rows of a run that is still going are kept, for forms that cannot grow by a row."""
    return path.with_name(f"{path.name}.partial.jsonl")


def shard(path: Path, rank: int) -> Path:
    """Where a rank above 0 keeps its rows of a run that is still going."""
    return path.with_name(f"{path.name}.rank{rank}.partial.jsonl")


# --- whole files -----------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[Row]:
    """The rows of a .jsonl, .csv or .parquet file. A row that a run was writing when it died is left out.

    Where a run died before it tidied up, a clip that failed and then did not has two rows: the later one counts.

    Raises:
        UsageError: the suffix is none of the three.
        ResultsError: the file cannot be read.
    """
    rows = _read(path, output_form(path))
    latest: dict[object, Row] = {}
    for number, row in enumerate(rows):
        latest[(row["clip"], row.get("rater_id")) if "clip" in row else number] = row
    return list(latest.values())


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write all rows into a .jsonl, .csv or .parquet file, which is there whole or not at all.

    Raises:
        UsageError: the suffix is none of the three.
        ResultsError: it cannot be written, or the rows do not fit into a table.
    """
    write: dict[str, Callable[[BinaryIO, Sequence[Row]], None]]
    write = {".jsonl": _write_jsonl, ".csv": _write_csv, ".parquet": _write_parquet}
    try:
        with replacing(path) as beside:
            with open(beside, "wb") as file:
                write[output_form(path)](file, rows)
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                shutil.copymode(path, beside)
    except OSError as error:
        raise _failure("write", path, error) from None


def to_json(row: Row) -> str:
    """One line of JSON, Unicode as it is; what UTF-8 cannot hold is escaped.

    Raises:
        ResultsError: the row holds something else than JSON knows (NaN is such a thing).
    """
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ResultsError(f"the row of {row.get('clip')!r} cannot be written as JSON: {error}") from None
    return _utf8(text)


def _utf8(text: str) -> str:
    """The text with an escape for each code unit that UTF-8 cannot hold; within JSON it stays the same text."""
    return text.encode("utf-8", "backslashreplace").decode()


def print_row(row: Row, stream: TextIO) -> None:
    """Write a row as one line of JSON, at once, in a form that the stream's encoding can hold.

    Raises:
        ResultsError: as for `to_json`.
    """
    text = to_json(row)
    try:
        text.encode(stream.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(row)
    stream.write(f"{text}\n")
    stream.flush()


def _read(path: Path, form: str) -> list[Row]:
    read = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    try:
        return read[form](path)
    except OSError as error:
        hint = f"; an unfinished run left {journal(path)}: run it again" if journal(path).exists() else ""
        raise ResultsError(f"{_failure('read', path, error)}{hint}") from None


# --- JSONL -----------------------------------------------------------------------------------------------------------


def _read_jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            row = _object(line)
            if row is not None:
                rows.append(row)
            elif line.endswith(b"\n") or not line.startswith(b"{"):
                received = _one_line(repr(line.decode("utf-8", "replace")), 80)
                raise ResultsError(f"{path}:{number}: a row of JSON was expected, received {received}")
    return rows


def _object(line: bytes) -> Row | None:
    """The JSON object that a line holds; None if it holds anything else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _torn_bytes(path: Path) -> int:
    """The length of a last line that is cut short; 0 when the last line is whole."""
    last = b""
    with path.open("rb") as file:
        for line in file:
            last = line
    return len(last) if last and not last.endswith(b"\n") and _object(last) is None else 0


def _ends_with_newline(path: Path) -> bool:
    """Also true of an empty file: what matters is that a new line can begin."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _write_jsonl(file: BinaryIO, rows: Sequence[Row]) -> None:
    file.writelines(f"{to_json(row)}\n".encode() for row in rows)


# --- flat tables -----------------------------------------------------------------------------------------------------


def _read_csv(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        try:
            columns = next(reader, [])
            rows = []
            for cells in reader:
                if len(cells) != len(columns):
                    raise ResultsError(
                        f"{path}:{reader.line_num}: {len(columns)} cells were expected, received {len(cells)}"
                    )
                rows.append(_nested(dict(zip(columns, map(_value, cells), strict=True))))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ResultsError(f"{path}:{reader.line_num + 1}: this is no CSV: {error}") from None
    return rows


def _write_csv(file: BinaryIO, rows: Sequence[Row]) -> None:
    flat = [_flat(row) for row in rows]
    columns = _columns(flat)
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(columns)
    table.writerows([_cell(row.get(column)) for column in columns] for row in flat)
    text.detach()


def _cell(value: Any) -> str:
    """What stands for a value: nothing for None, JSON for what is no string or could be taken for something else."""
    if value is None:
        return ""
    if isinstance(value, str) and _value(value) == value and not re.search(r"[\0\r\ud800-\udfff]", value):
        return value
    return _utf8(json.dumps(value, ensure_ascii=False))


def _value(cell: str) -> Any:
    """The value that a cell stands for: `_cell`, the other way."""
    if not cell:
        return None
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return cell


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path).read()
    except pyarrow.ArrowException as error:
        raise ResultsError(f"{path} is no Parquet file: {error}") from None
    return [_nested(row) for row in table.to_pylist()]


def _write_parquet(file: BinaryIO, rows: Sequence[Row]) -> None:
    import pyarrow
    import pyarrow.parquet

    flat = [_flat(row) for row in rows]
    arrays = {}
    for column in _columns(flat):
        try:
            array = pyarrow.array([_storable(row.get(column)) for row in flat])
        except (pyarrow.ArrowException, OverflowError) as error:
            raise ResultsError(f"column {column!r} fits no Parquet type: {error}; use .jsonl") from None
        # A column without any value would get the type `null`, which the other files of a project would not share.
        arrays[column] = array.cast(pyarrow.string()) if pyarrow.types.is_null(array.type) else array
    pyarrow.parquet.write_table(pyarrow.table(arrays), file)


def _storable(value: Any) -> Any:
    """Arrow's strings are UTF-8: what is not (bytes in a file's name that are no text) is escaped."""
    if isinstance(value, list):
        return [_storable(item) for item in value]
    return _utf8(value) if isinstance(value, str) else value


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
    """`_flat`, the other way; a dict of nothing but None becomes None."""
    nested: Row = {}
    for column, value in flat.items():
        *groups, leaf = column.split(".")
        inner = nested
        for group in groups:
            inner = inner.setdefault(group, {})
            if not isinstance(inner, dict):  # a table of somebody else's, with columns `a` and `a.b`
                inner, leaf = nested, column
                break
        inner.setdefault(leaf, value)
    return {key: _without_hollow(value) for key, value in nested.items()}


def _without_hollow(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    filled = {key: _without_hollow(inner) for key, inner in value.items()}
    return None if all(inner is None for inner in filled.values()) else filled


def _columns(rows: Iterable[Row]) -> list[str]:
    """All columns in the order in which they come first, the parts of a dict together.

    `error` (None in most rows) gives way to `error.class` and `error.message` (of the others).

    Raises:
        ResultsError: a column is a dict in some rows and something else in others.
    """
    filled: dict[str, bool] = {}
    for row in rows:
        for column, value in row.items():
            filled[column] = filled.get(column, False) or value is not None
    groups = {group for column in filled for group in _groups(column)}
    for column in sorted(groups):
        if filled.get(column):
            raise ResultsError(f"{column!r} is a dict in some rows and something else in others: use .jsonl")
    place = {top: number for number, top in enumerate(dict.fromkeys(column.split(".")[0] for column in filled))}
    return sorted((column for column in filled if column not in groups), key=lambda column: place[column.split(".")[0]])


def _groups(column: str) -> Iterator[str]:
    """`a` and `a.b` for `a.b.c`."""
    parts = column.split(".")
    return (".".join(parts[:length]) for length in range(1, len(parts)))


# --- the file system -------------------------------------------------------------------------------------------------


def _check_writable(path: Path) -> None:
    """Find out before hours of rating, not after."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _failure("write", path, error) from None
    if path.exists() and not path.is_file():
        raise ResultsError(f"cannot write {path}: it is {'a folder' if path.is_dir() else 'no regular file'}")
    if not os.access(path.parent, os.W_OK):
        raise ResultsError(f"cannot write {path}: its folder may not be written to")


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _append(stream: io.FileIO, line: bytes) -> None:
    """All of a line or, as far as the disk lets us, nothing of it."""
    start = stream.seek(0, os.SEEK_END)
    try:
        rest = memoryview(line)
        while rest:
            rest = rest[stream.write(rest) :]
    except OSError:
        with suppress(OSError):
            stream.truncate(start)
        raise


def _lock(stream: io.FileIO, path: Path) -> None:
    """Keep two runs from writing one file. Where the file system knows no locks there is none."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        raise ResultsError(f"cannot write {path}: another run is writing it; wait, or name another file") from None
    except OSError:
        return


def _failure(verb: str, path: Path, error: OSError) -> ResultsError:
    return ResultsError(f"cannot {verb} {path}: {error.strerror or error}")
