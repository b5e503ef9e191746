"""Write files that are complete or absent, also after a crash."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path in the same folder. It replaces `path` when the block ends, and is deleted if it raises.

    The temporary path has a fixed name, so that the file of a process that was killed is reused by the next one. If
    another process is replacing `path`, waits for it.

    Raises:
        OSError: `path` cannot be replaced.
    """
    beside = path.with_name(f".{path.name}.tmp")
    with _locked(beside), _deleted_if_left(beside):
        yield beside
        os.replace(beside, path)


@contextmanager
def _deleted_if_left(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Create a file and lock it. Windows and some network file systems have no such locks: there it is not locked."""
    if sys.platform == "win32":
        yield
        return
    while True:
        with open(path, "ab") as file:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            with _deleted_if_left(path):
                if _is_at(path, file.fileno()):  # else the process that it waited for has moved it
                    file.truncate(0)
                    yield
                    return


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
