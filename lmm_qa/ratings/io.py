"""A file of ratings that a run writes row by row, and that a later run resumes.

The writer knows these columns of a row: `clip`, `content_id`, `rater_id`, `profile_id` and `error`.
"""

from __future__ import annotations

import glob
import io
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from lmm_qa.errors import ResultsError
from lmm_qa.files.tables import Row, is_object, journal, output_form, read_rows, to_json, unwritable, write_rows

REQUIRED_COLUMNS = ("clip", "content_id", "rater_id")
"""A file whose rows lack one of these does not contain ratings."""


class RatingsWriter:
    """Writes the ratings of one run, and reuses those of earlier runs.

        with RatingsWriter(path, [clip.name for clip in clips], rater_id) as writer:
            unrated = [clip for clip in clips if writer.resume(clip.name, content_id(clip.path)) is None]
            for rating in rate(unrated):
                writer.write(rating.to_row())

    When `write` returns, the row has been handed to the operating system: appended to the file itself (.jsonl), or to
    the journal beside it (.csv, .parquet). When the block ends without an exception, the file is replaced in one step.
    It then contains the rows of earlier runs for clips that are not in this run, followed by one row for each clip of
    this run, in order. When the block raises, or the process dies, all rows are kept and the next run resumes.

    If several processes write the rows of one run, each has its own writer. The writer of rank 0 works as described
    here: it is entered before the others, calls `gather` after they were left, and is left last. The others write
    shards beside the file. Shards of a run that died are read by the next run, however many processes that has.
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
        safe_csv: bool = False,
    ) -> None:
        """
        Args:
            path: the file; its suffix (one of `lmm_qa.files.tables.OUTPUT_SUFFIXES`) gives the format. Missing folders
                are created.
            clips: names of all clips of this run, in order, without duplicates.
            rater_id: identity of the rater. A file with ratings of another one, or of the same one with another
                calibration, is refused.
            overwrite: ignore the existing content of the file. It is deleted when the first row is written; shards
                of an earlier run are deleted at once.
            rank: index of this process among those that write rows of this run.
            needs: columns that a row must have a value for to be reused.
            profile_id: what makes the defect profiles of this run; rows with another profile_id are not reused. None:
                no profiles are requested.
            safe_csv: as for `lmm_qa.files.tables.write_rows`.

        Raises:
            UsageError: the suffix is none of the three.
        """
        self.path = Path(os.path.realpath(path))
        self.rater_id = rater_id
        self.reused = 0
        """Number of clips of this run that have a row of an earlier run."""
        self.written = 0
        """Number of rows that this process has written."""
        self.rank = rank
        self._journal = [] if output_form(path) == ".jsonl" else [journal(self.path)]
        self._appended = shard(self.path, rank) if rank else (*self._journal, self.path)[0]
        """The file that rows are appended to."""
        self._stream: io.FileIO | None = None
        self._clips = dict.fromkeys(clips)
        self._overwrite = overwrite
        self._needs = needs
        self._profile_id = profile_id
        self._safe_csv = safe_csv
        self._stored: list[Row] = []
        """The existing content of the file at `path`."""
        self._earlier: dict[str, Row] = {}
        """Rows of earlier runs, by clip."""
        self._reusable: dict[str, Row] = {}
        """Those of them that can be reused, by content_id."""
        self._rows: dict[str, Row] = {}
        """Rows of this run, by clip."""

    @property
    def resumes(self) -> bool:
        """Whether `resume` can find anything; if not, there is no need to hash the clips."""
        return bool(self._reusable)

    @property
    def rows(self) -> list[Row]:
        """The rows of this run so far, in the order of its clips."""
        return [self._rows[clip] for clip in self._clips if clip in self._rows]

    def __enter__(self) -> Self:
        """Read the rows of earlier runs.

        Raises:
            ResultsError: the file cannot be read or written, does not contain ratings, or those of another rater; or
                another run is writing shards of it.
        """
        _check_writable(self.path)
        shards = [] if self.rank else self._shards()
        if not self._overwrite:
            self._read_earlier(shards)
        _remove(shards)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Write the final file, if the block did not raise.

        Raises:
            ResultsError: the file cannot be written, or a clip of the run has no row.
        """
        if self._stream is not None:
            self._stream.close()
        if kind is None and not self.rank:
            self._finish()

    def resume(self, clip: str, content_id: str) -> Row | None:
        """Return the row of `clip`, if an earlier run rated a clip with the same content, under any name.

        None if it has to be rated, also if an earlier run failed to rate it.

        Raises:
            ResultsError, ValueError: as for `write`.
        """
        known = self._reusable.get(content_id)
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
            ResultsError: the row cannot be written, or cannot be represented in JSON. Earlier rows are unchanged.
            ValueError: the clip is not in this run.
        """
        if row["clip"] not in self._clips:
            raise ValueError(f"{row['clip']!r} is not among the clips of this run")
        self._append(row)
        self._rows[row["clip"]] = row
        self.written += 1

    def gather(self, written: int) -> None:
        """Read the rows that the other ranks wrote and add the clips that they resumed. Their writers must be closed.

        Args:
            written: the sum of their `written`.

        Raises:
            ResultsError: the number of rows differs; all shards are kept.
        """
        shards = self._shards()
        rows = [row for path in shards for row in read_rows(path)]
        if len(rows) != written:
            raise ResultsError(
                f"the shards beside {self.path} contain {len(rows)} rows, but the other ranks wrote {written}: all "
                "ranks need the same file system, and no other run may write this file; run the same command to resume"
            )
        for row in rows:
            self.write(row)
        for clip, row in self._earlier.items():
            if clip in self._clips and self._is_reusable(row):
                self._rows.setdefault(clip, row)
        _remove(shards)

    def _is_reusable(self, row: Row) -> bool:
        return (
            row.get("error") is None
            and all(row.get(column) is not None for column in self._needs)
            and self._profile_id in (None, row.get("profile_id"))
        )

    def _append(self, row: Row) -> None:
        line = f"{to_json(row)}\n".encode()
        try:
            if self._stream is None:
                self._stream = self._open()
            _append_line(self._stream, line)
        except OSError as error:
            raise unwritable(self._appended, error) from None
        if self._appended == self.path:
            self._stored.append(row)

    def _shards(self) -> list[Path]:
        """The shards of other ranks.

        Raises:
            ResultsError: a shard cannot be read, or a running process is writing to it.
        """
        shards = sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}.rank*.partial.jsonl"))
        for path in shards:
            try:
                with io.FileIO(path, "r+") as stream:
                    _lock(stream, self.path)
            except OSError as error:
                raise ResultsError(f"cannot read {path}: {error.strerror or error}") from None
        return shards

    def _read_earlier(self, shards: Sequence[Path]) -> None:
        try:
            found = {path: _read_if_any(path) for path in (self.path, *self._journal, *shards)}
        except ResultsError as error:
            raise ResultsError(f"{error}; name another file, or replace it with --overwrite") from None
        for path, rows in found.items():
            if any(column not in row for row in rows for column in REQUIRED_COLUMNS):
                raise ResultsError(
                    f"{path} exists and does not contain ratings (columns {', '.join(REQUIRED_COLUMNS)}): "
                    "name another file, or replace it with --overwrite"
                )
            if others := {row["rater_id"] for row in rows} - {self.rater_id, None}:
                raise ResultsError(
                    f"{path} contains ratings of another rater or calibration ({', '.join(sorted(map(str, others)))}; "
                    f"this one is {self.rater_id}): name another file, or replace it with --overwrite"
                )
        self._stored = found[self.path]
        self._earlier = {row["clip"]: row for rows in found.values() for row in rows}
        self._reusable = {row["content_id"]: row for row in self._earlier.values() if self._is_reusable(row)}
        for path in shards:
            for row in found[path]:
                self._append(row)

    def _open(self) -> io.FileIO:
        """Open the file that rows are appended to, lock it, and remove a row that an earlier run did not complete."""
        stream = io.FileIO(self._appended, "a+")
        _lock(stream, self._appended)
        if self._overwrite:
            stream.truncate(0)
            return stream
        stream.seek(0)
        last = stream.readall().rpartition(b"\n")[2]
        if last:
            if is_object(last):
                _append_line(stream, b"\n")
            else:
                stream.truncate(stream.tell() - len(last))
        return stream

    def _finish(self) -> None:
        if missing := [clip for clip in self._clips if clip not in self._rows]:
            raise ResultsError(f"{len(missing)} clips of the run have no row, the first is {missing[0]}")
        contents = {row.get("content_id") for row in self._rows.values()} - {None}
        others = [
            row for clip, row in self._earlier.items() if clip not in self._rows and row["content_id"] not in contents
        ]
        rows = others + self.rows
        if rows != self._stored or self._safe_csv:  # the existing file may not be safe
            write_rows(self.path, rows, self._safe_csv)
            self._stored = rows
        _remove(self._journal)


def shard(path: Path, rank: int) -> Path:
    """The file with the rows of a rank above 0 while a run is unfinished."""
    return path.with_name(f"{path.name}.rank{rank}.partial.jsonl")


def read_ratings(path: str | Path) -> list[Row]:
    """Read the ratings of a .jsonl, .csv or .parquet file.

    If a run died before its end, a clip can have several rows of one rater; the last one is returned.

    Raises:
        UsageError: the suffix is none of the three.
        ResultsError: the file cannot be read.
    """
    path = Path(path)
    try:
        rows = read_rows(path)
    except ResultsError as error:
        if path.exists() or not journal(path).exists():
            raise
        raise ResultsError(f"{error}; an unfinished run left {journal(path)}: run the same command again") from None
    last = {(row["clip"], row.get("rater_id")) if "clip" in row else n: row for n, row in enumerate(rows)}
    return list(last.values())


def print_row(row: Row, stream: TextIO) -> None:
    """Write a row as one line of JSON in the stream's encoding, and flush.

    Raises:
        ResultsError: as for `lmm_qa.files.tables.to_json`.
    """
    text = to_json(row)
    try:
        text.encode(stream.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(row)
    stream.write(f"{text}\n")
    stream.flush()


# --- the file system -------------------------------------------------------------------------------------------------


def _check_writable(path: Path) -> None:
    """Fail before hours of rating, not after."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from None
    if path.exists() and not path.is_file():
        raise ResultsError(f"cannot write {path}: it is {'a folder' if path.is_dir() else 'not a regular file'}")
    if not os.access(path.parent, os.W_OK):
        raise ResultsError(f"cannot write {path}: its folder is not writable")


def _read_if_any(path: Path) -> list[Row]:
    return read_rows(path) if path.exists() and path.stat().st_size else []


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _append_line(stream: io.FileIO, line: bytes) -> None:
    """Append a whole line or, if the disk is full, nothing."""
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
    """Keep a second run from writing the same file. The lock ends with the process.

    The lock is on the file itself: `filelock` would truncate it, or leave a second file beside it. File systems
    without locks, and Windows, are not protected.
    """
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
