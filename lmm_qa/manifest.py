"""Expand files, folders, globs and lists to an ordered list of distinct clips, and name each clip.

No video is decoded here; `content_id` hashes the bytes of a file.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import stat
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lmm_qa.errors import ClipNotFound, ClipUnreadable, ManifestError, address_in
from lmm_qa.files.tables import CLIP_COLUMNS, TABLE_SUFFIXES, Column, path_in, read_lines, read_table, shown

VIDEO_SUFFIXES = (
    *(".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4"),
    *(".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv", ".y4m"),
)
"""Files with these suffixes are searched for in folders. A file that is given by name may have any suffix."""

MANIFEST_SUFFIXES = (*TABLE_SUFFIXES, ".txt")
"""Lists of clips. A .txt file has one path per line and no header."""


@dataclass(frozen=True)
class Clip:
    """One clip to rate."""

    path: Path
    """The file may be missing, if it was given by name or in a list."""
    name: str
    """Name in rating rows: the path as given, or relative to the folder or list given. Posix, unique in a run."""
    origin: str
    """The input that it comes from: `argument`, `folder clips`, `glob clips/*.mp4`, `list.csv:12`."""


class _Found(NamedTuple):
    """A clip without its final name."""

    path: Path
    names: tuple[str, ...]
    """Possible names, the shortest first; a longer one is used if two clips would have the same name."""
    origin: str


def expand(inputs: Sequence[str | Path], root: Path | None = None) -> list[Clip]:
    """Return the clips of all inputs in order, each file once.

    Args:
        inputs: files, folders (searched recursively, in natural order, without hidden files), globs (`**` works) and
            lists of clips (.csv, .tsv, .jsonl, .parquet with one of `CLIP_COLUMNS`; .txt with one path per line).
            A missing file with the suffix of a video counts as a clip, which then gets an error row.
        root: the folder that paths in lists are relative to; by default the folder of the list.

    Raises:
        ManifestError: an input matches nothing, or a list is invalid.
    """
    if not inputs:
        raise ManifestError("no clips were given: name files, folders, globs or lists of clips")
    found = [one for given in inputs for one in _expand_input(os.fspath(given), root)]
    return _named(_distinct(found))


def content_id(path: Path) -> str:
    """`sha256:` and the first 32 hex digits of the SHA-256 of the file's bytes. Never blocks on a pipe or device.

    Raises:
        ClipNotFound: the file does not exist.
        ClipUnreadable: it is not a regular file, or cannot be read.
    """
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ClipUnreadable(f"{path} is not a regular file")
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:32]}"
    except (FileNotFoundError, NotADirectoryError):
        raise ClipNotFound(f"{path} does not exist") from None
    except OSError as error:
        raise ClipUnreadable(f"{path} cannot be read: {error.strerror}") from None


def _open_without_waiting(path: str, flags: int) -> int:
    """Without O_NONBLOCK, opening a named pipe waits for a writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


# --- one input -------------------------------------------------------------------------------------------------------


def _expand_input(given: str, root: Path | None) -> list[_Found]:
    if address_in(given):
        return [_Found(Path(given), (given,), "argument")]  # gets an error row, which says to download it
    if os.path.lexists(given):
        return _expand_path(given, root, "argument")
    if glob.has_magic(given):
        return _expand_glob(given, root)
    if Path(given).suffix.lower() in VIDEO_SUFFIXES:
        return [_Found(Path(given), _names(Path(given)), "argument")]  # gets its error row; the others are rated
    raise ManifestError(f"{given!r} does not exist: give a file, a folder, a glob or a list of clips")


def _expand_path(given: str, root: Path | None, origin: str) -> list[_Found]:
    path = Path(given)
    if path.is_dir():
        found = _in_folder(path)
        if not found:
            raise ManifestError(f"folder {given!r} and the folders in it contain no video ({' '.join(VIDEO_SUFFIXES)})")
        return found
    if path.suffix.lower() in MANIFEST_SUFFIXES:
        return _in_manifest(path, root)
    return [_Found(path, _names(path), origin)]


def _expand_glob(pattern: str, root: Path | None) -> list[_Found]:
    """A pattern with a suffix (`*.bin`) matches any file; `*` and `**` match videos only."""
    any_suffix = not glob.has_magic(Path(pattern).suffix) and Path(pattern).suffix != ""
    found: list[_Found] = []
    for match in sorted(glob.glob(pattern, recursive=True), key=_natural):
        path = Path(match)
        if path.is_dir():
            found += _in_folder(path)
        elif any_suffix or path.suffix.lower() in VIDEO_SUFFIXES:
            found += _expand_path(match, root, f"glob {pattern}")
    if not found:
        raise ManifestError(f"{pattern!r} does not exist, and as a glob it matches no clip: check the pattern")
    return found


def _in_folder(folder: Path) -> list[_Found]:
    files = sorted(_videos(folder), key=lambda file: _natural(file.relative_to(folder).as_posix()))
    return [_Found(file, _names(file.relative_to(folder), file), f"folder {folder.as_posix()}") for file in files]


def _videos(folder: Path) -> Iterator[Path]:
    """Videos in a folder and its subfolders. Each real folder is visited once, so cyclic links end; links come last."""
    folders, links, seen = deque([folder]), deque[Path](), set[str]()
    while folders or links:
        current = folders.popleft() if folders else links.popleft()
        if (real := os.path.realpath(current)) in seen:
            continue
        seen.add(real)
        try:
            entries = sorted(entry for entry in current.iterdir() if not entry.name.startswith("."))
        except OSError as error:
            raise ManifestError(f"folder {str(current)!r} cannot be searched: {error.strerror}") from None
        for entry in entries:
            if os.path.isdir(entry):
                (links if entry.is_symlink() else folders).append(entry)
            elif entry.suffix.lower() in VIDEO_SUFFIXES:
                yield entry


# --- lists of clips --------------------------------------------------------------------------------------------------


def _in_manifest(manifest: Path, root: Path | None) -> list[_Found]:
    base = manifest.parent if root is None else root
    values: Iterable[tuple[str, object]]
    if manifest.suffix.lower() == ".txt":
        values = read_lines(manifest)
    else:
        values = ((where, row["clip"]) for where, row in read_table(manifest, [Column("clip", CLIP_COLUMNS)]))
    entries = [(where, _entry(value, where)) for where, value in values]
    if not entries:
        raise ManifestError(f"{manifest} lists no clips")
    return [
        _Found(Path(entry), (entry,), where)
        if address_in(entry)
        else _Found(base / entry, _names(Path(entry), base / entry), where)
        for where, entry in entries
    ]


def _entry(value: object, where: str) -> str:
    """The path of a clip that a list contains.

    Raises:
        ManifestError: it cannot be a path.
    """
    if isinstance(value, bytes) or (isinstance(value, dict) and value.get("bytes") is not None):
        raise ManifestError(
            f"{where}: the table contains the video itself: save it as a file, and list its path instead"
        )
    value = path_in(value)
    if not isinstance(value, str) or not value.strip():
        raise ManifestError(f"{where}: expected the path of a clip, received {shown(value)}")
    try:
        if b"\0" not in os.fsencode(value):
            return value.strip()
    except UnicodeEncodeError:
        pass
    raise ManifestError(f"{where}: {shown(value)} cannot be a file name")


# --- names -----------------------------------------------------------------------------------------------------------


def _names(*paths: Path) -> tuple[str, ...]:
    """Possible names of a clip, the shortest first, its absolute path last."""
    return tuple(_printable(path) for path in (*paths, Path(os.path.abspath(paths[-1]))))


def _printable(path: Path) -> str:
    """Posix, and Unicode even if the name on disk is not: invalid bytes become `\\xff`."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def _distinct(found: Iterable[_Found]) -> list[_Found]:
    """The first of those that are the same file, in order."""
    first: dict[str, _Found] = {}
    for one in found:
        first.setdefault(os.path.realpath(one.path), one)
    return list(first.values())


def _named(found: Sequence[_Found]) -> list[Clip]:
    """Give each clip its shortest unique name: all clips that share a name take a longer one."""
    lengths = [0] * len(found)
    while True:
        names = [one.names[length] for one, length in zip(found, lengths, strict=True)]
        uses = Counter(names)
        clashing = [i for i, name in enumerate(names) if uses[name] > 1 and lengths[i] + 1 < len(found[i].names)]
        if not clashing:
            return [Clip(one.path, name, one.origin) for one, name in zip(found, names, strict=True)]
        for i in clashing:
            lengths[i] += 1


def _natural(text: str) -> tuple[list[str | int], str]:
    """Sort key that puts clip2 before clip10."""
    parts = re.split(r"(\d+)", text.casefold())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], text
