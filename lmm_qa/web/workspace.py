"""The private folder of a web server: uploads and results. Nothing else of the machine can be read through it."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from lmm_qa.evaluation.player import MEDIA_TYPES
from lmm_qa.manifest import VIDEO_SUFFIXES

KEPT = 3600.0
"""Seconds after which uploads and results are deleted."""
SWEEP = 300.0
"""Seconds between two looks for what is to be deleted."""

UPLOADS, RESULTS = Path("uploads"), Path("results")
"""Relative to the private folder, which is the working directory of the server: so gradio, which tells the browser the
paths of uploads, tells it nothing about the machine."""

ANSWER_TYPES: Mapping[str, str] = {**MEDIA_TYPES, ".html": "text/html; charset=utf-8", ".jsonl": "application/x-ndjson"}
"""Files that are served, and as what."""

_TOKEN, _NAME = re.compile(r"[A-Za-z0-9_-]{22}"), re.compile(r"[a-z0-9_]+\.[a-z0-9]+")


@dataclass(frozen=True)
class Result:
    """The folder of one request. Its name cannot be guessed."""

    folder: Path
    """Absolute, for a job that still runs when the working directory is no longer the private folder."""

    def path(self, name: str) -> Path:
        """A file in it."""
        return self.folder / name

    def address(self, name: str) -> str:
        """URL of a file in it, relative to the page."""
        return f"results/{self.folder.name}/{name}"

    def add(self, file: Path, name: str, uploaded: bool) -> Path:
        """Make a clip or a table part of it, without a copy.

        Args:
            file: an upload, or a file of the server that its operator has named.
            name: without suffix, in lower-case letters, digits and underscores.
            uploaded: an upload may be deleted before the result is.

        Returns:
            Its path, with a suffix that says what it is.
        """
        suffix = file.suffix.lower()
        known = suffix in (*VIDEO_SUFFIXES, ".jsonl", ".csv", ".parquet")
        path = self.path(f"{name}{suffix if known else '.bin'}")
        if uploaded:
            os.link(file, path)
        else:
            path.symlink_to(file.resolve())
        return path


class Workspace:
    """Makes the private folder, and the working directory of this process; deletes it at the end.

    Use as a context manager. Only the owner of the process can read it.
    """

    def __enter__(self) -> Self:
        self._before = Path.cwd()
        self.folder = Path(tempfile.mkdtemp(prefix="lmm-qa-web-"))  # with mode 0700
        os.chdir(self.folder)
        UPLOADS.mkdir()
        RESULTS.mkdir()
        self._ended = threading.Event()
        threading.Thread(target=self._sweep, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        os.chdir(self._before)
        shutil.rmtree(self.folder, ignore_errors=True)

    def new_result(self) -> Result:
        """An empty folder for a request."""
        folder = self.folder / RESULTS / secrets.token_urlsafe(16)
        folder.mkdir()
        return Result(folder)

    def _sweep(self) -> None:
        while not self._ended.wait(SWEEP):
            delete_old(self.folder, time.time() - KEPT)


def find_file(token: str, name: str) -> Path | None:
    """A file of a result that may be served; None if there is no such file."""
    if not _TOKEN.fullmatch(token) or not _NAME.fullmatch(name) or Path(name).suffix not in ANSWER_TYPES:
        return None
    path = RESULTS / token / name
    return path if path.is_file() else None


def delete_old(folder: Path, before: float) -> None:
    """Delete uploads and results that were made before a time, in seconds since 1970."""
    for kind in (UPLOADS, RESULTS):
        for one in (folder / kind).iterdir():
            with suppress(OSError):  # deleted by somebody else
                if one.stat().st_mtime < before:
                    shutil.rmtree(one)
