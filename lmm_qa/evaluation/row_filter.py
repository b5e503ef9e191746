"""Keep the ratings that fulfil a condition, and copy their clips: a filter for training data.

    score >= 3.5 and not stall and blur < 0.3

A condition consists of comparisons, `and`, `or`, `not`, parentheses, numbers, texts, and the names of columns
(`video.width`) and defects. In a comparison a defect is its probability; alone, it says whether the defect was found.
Null values are handled as in SQL: a comparison with null is unknown, and a row is kept only if the condition is true.
"""

from __future__ import annotations

import ast
import difflib
import operator
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lmm_qa.defects.vocabulary import BY_NAME
from lmm_qa.errors import ClipError, ResultsError, UsageError
from lmm_qa.files.tables import Row, writing
from lmm_qa.manifest import content_id
from lmm_qa.ratings.rows import describe_columns

Truth = bool | None
"""None: unknown, because a value is null."""
Test = Callable[[Row], Truth]

COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.In: lambda value, values: value in values,
    ast.NotIn: lambda value, values: value not in values,
}


@dataclass(frozen=True)
class Clause:
    """A part of a condition that is joined to the others by `and`, and what it did."""

    text: str
    dropped: int
    """Rated clips for which it is false."""
    unknown: int
    """Rated clips for which a value that decides it is null; they are not kept either."""


@dataclass(frozen=True)
class FilteredRows:
    """The result of a condition."""

    kept: tuple[Row, ...]
    clauses: tuple[Clause, ...]
    """In the order of the condition. A row that fails several clauses is counted in each."""
    failed: int
    """Clips without a score; they are never kept."""


def filter_rows(rows: Sequence[Row], condition: str) -> FilteredRows:
    """Keep the rated clips that fulfil a condition, see the module's docstring.

    Args:
        rows: ratings, as `lmm_qa.ratings.io.read_ratings` returns them.
        condition: for example `score >= 3.5 and not stall`; `True` keeps all that were rated.

    Raises:
        UsageError: the condition is not valid, contains an unknown name, or compares a text with a number.
    """
    try:
        tree = ast.parse(condition.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise UsageError(
            f"{condition!r} is not a condition: {reason}; write it as 'score >= 3.5 and not stall and blur < 0.3'"
        ) from None
    parts = tree.values if isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And) else [tree]
    rated = [row for row in rows if row.get("score") is not None and not row.get("error")]
    compiler = _Compiler(condition, rows)
    tests = [compiler.compile(part) for part in parts]
    truths = [[test(row) for row in rated] for test in tests]
    return FilteredRows(
        tuple(row for row, results in zip(rated, zip(*truths, strict=True), strict=True) if all(results)),
        tuple(
            Clause(ast.unparse(part), results.count(False), results.count(None))
            for part, results in zip(parts, truths, strict=True)
        ),
        len(rows) - len(rated),
    )


def column_value(row: Row, name: str) -> Any:
    """The value of a column by its name in a flat table, such as `video.width`; None if the row has no such column."""
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


class _Compiler:
    """Turns the syntax tree of a condition into functions of a row. Nothing of it is run by Python itself."""

    def __init__(self, condition: str, rows: Sequence[Row]) -> None:
        self._condition = condition
        self._profiled = any(row.get("defects") for row in rows)
        self._columns = {name for name, kind, _ in describe_columns() if "[]" not in name and kind != "object"}
        self._columns |= {name for row in rows for name in _names(row)}

    def compile(self, node: ast.expr) -> Test:
        match node:
            case ast.BoolOp(op, operands):
                return _junction([self.compile(operand) for operand in operands], isinstance(op, ast.Or))
            case ast.UnaryOp(ast.Not(), operand):
                return _negation(self.compile(operand))
            case ast.Compare(left, operators, right):
                values = [self._operand(each) for each in (left, *right)]
                if any(type(each) not in COMPARISONS for each in operators):
                    raise self._unsupported(node)
                steps = zip(values, operators, values[1:], strict=False)  # a < b < c is a < b and b < c
                return _junction([self._comparison(*step, ast.unparse(node)) for step in steps], False)
            case ast.Constant(bool() as truth):
                return lambda row: truth
            case ast.Name() | ast.Attribute():
                return self._flag(ast.unparse(node))
        raise self._unsupported(node)

    def _flag(self, name: str) -> Test:
        """A name alone: whether the defect was found, or a column that is true or false."""
        if self._is_defect(name):
            return lambda row: _was_found(row, name)

        def value(row: Row) -> Truth:
            found = column_value(row, name)
            if found is None or isinstance(found, bool):
                return found
            raise UsageError(f"{self._condition!r}: {name} alone is not a condition: compare it with a value")

        return value

    def _operand(self, node: ast.expr) -> Callable[[Row], Any]:
        """One side of a comparison: the value of a name, or a constant."""
        if isinstance(node, ast.Name | ast.Attribute):
            name = ast.unparse(node)
            column = f"defects.{name}" if self._is_defect(name) else name
            return lambda row: column_value(row, column)
        try:
            constant = ast.literal_eval(node)
        except (ValueError, TypeError, MemoryError, RecursionError):
            raise self._unsupported(node) from None
        return lambda row: constant

    def _is_defect(self, name: str) -> bool:
        """Whether a name is that of a defect; if not, it is that of a column."""
        if name in BY_NAME:
            if not self._profiled:
                raise UsageError(
                    f"{self._condition!r}: the ratings have no defect profiles, so {name} is unknown: rate the clips "
                    "with --defects"
                )
            return True
        if name not in self._columns:
            close = difflib.get_close_matches(name, [*self._columns, *BY_NAME], n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"defects are {', '.join(BY_NAME)}"
            raise UsageError(f"{self._condition!r}: no column or defect is named {name}; {hint}")
        return False

    def _comparison(
        self, left: Callable[[Row], Any], comparison: ast.cmpop, right: Callable[[Row], Any], text: str
    ) -> Test:
        compare = COMPARISONS[type(comparison)]
        contains = isinstance(comparison, ast.In | ast.NotIn)

        def test(row: Row) -> Truth:
            one, other = left(row), right(row)
            if one is None or other is None:
                return None
            others = other if contains and isinstance(other, list | tuple | set) else [other]
            if any(isinstance(value, str) is not isinstance(one, str) for value in others):
                raise UsageError(
                    f"{self._condition!r}: {text} compares {one!r} with {other!r} in the row of {row.get('clip')!r}"
                )
            try:
                return compare(one, other)
            except TypeError as error:
                raise UsageError(f"{self._condition!r}: {text}: {error} ({row.get('clip')!r})") from None

        return test

    def _unsupported(self, node: ast.expr) -> UsageError:
        return UsageError(
            f"{self._condition!r}: {ast.unparse(node)} is not supported; a condition has comparisons (< <= > >= == != "
            "in), and, or, not, numbers, texts, and names of columns and defects"
        )


def _junction(tests: Sequence[Test], decisive: bool) -> Test:
    """`or` if the decisive truth is True, `and` if it is False (Kleene's three-valued logic)."""

    def result(row: Row) -> Truth:
        found = [test(row) for test in tests]
        if decisive in found:
            return decisive
        return None if None in found else not decisive

    return result


def _negation(test: Test) -> Test:
    def result(row: Row) -> Truth:
        found = test(row)
        return None if found is None else not found

    return result


def _was_found(row: Row, defect: str) -> Truth:
    if row.get("found") is None or column_value(row, f"defects.{defect}") is None:
        return None
    return any(one["defect"] == defect for one in row["found"])


def _names(row: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _names(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


# --- copying ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Copies:
    """What was copied."""

    copied: int
    present: int
    """Clips whose copy existed already."""
    problems: tuple[str, ...]
    """Why other clips were not copied, a sentence each."""


def copy_clips(rows: Iterable[Row], files: Mapping[str, Path], folder: Path) -> Copies:
    """Copy clips into a folder, under their names in the ratings, with subfolders.

    A clip that is missing or has changed since it was rated is not copied, and listed in the result.

    Args:
        rows: the ratings of the clips.
        files: where the clips are, by their name in the ratings.
        folder: created if it does not exist.

    Raises:
        ResultsError: another file has the name of a copy (nothing is copied then), or a copy cannot be written.
    """
    pending: dict[Path, Path] = {}
    contents: dict[Path, str] = {}
    problems: list[str] = []
    present = 0
    for row in rows:
        name = row["clip"]
        if name not in files:
            problems.append(f"{name} was not found")
            continue
        try:
            content = content_id(files[name])
            if row.get("content_id") not in (None, content):
                problems.append(f"{name} has changed since it was rated ({files[name]})")
                continue
            target = folder / _inside(name)
            existing = contents.get(target) or (content_id(target) if os.path.lexists(target) else None)
        except ClipError as error:
            problems.append(str(error))
            continue
        if existing not in (None, content):
            raise ResultsError(f"{target} exists and is not the clip {name}: choose another folder; nothing was copied")
        contents[target] = content
        if existing is None:
            pending[target] = files[name]
        else:
            present += 1
    for target, source in pending.items():
        with writing(target) as temporary:
            shutil.copy2(source, temporary)
    return Copies(len(pending), present, tuple(problems))


def _inside(name: str) -> PurePosixPath:
    """A clip's name as a path that does not leave its folder: without a leading slash, and without `..`."""
    path = PurePosixPath(name)
    return PurePosixPath(*(part for part in path.parts if part not in (path.anchor, "..")))
