"""A challenge submission: a zip with one file, output.txt, at its root: `name.mp4,score` a line, LF, no header, in the
order of the organisers' list. Every listed clip has its score, or there is no submission.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

from lmm_qa.atomic import replacing
from lmm_qa.errors import ScoresError, UsageError
from lmm_qa.evaluation.labels import Score, match

FILE_NAME = "output.txt"


FIRST_DATE = (1980, 1, 1, 0, 0, 0)


"""The earliest time that a zip can hold: the same scores give the same bytes."""


def submission_text(scores: Sequence[Score], names: Sequence[str]) -> str:
    """The content of output.txt.

    Raises:
        ScoresError: a listed clip has no score, or a score no listed clip; names them.
    """
    found = match(names, [score.clip for score in scores])
    by_clip = {score.clip: score for score in scores}
    taken = set(found.values())
    missing = [name for name in names if name not in found]
    failed = [name for name in names if name in found and by_clip[found[name]].value is None]
    extra = [score.clip for score in scores if score.clip not in taken]
    problems = [
        *_problem("are listed and not in the ratings", missing),
        *_problem("could not be rated", [f"{name} ({by_clip[found[name]].error})" for name in failed]),
        *_problem("are rated and not listed", extra),
    ]
    if problems:
        raise ScoresError("\n  ".join(["no submission is written: each listed clip needs one score", *problems]))
    return "".join(f"{name},{by_clip[found[name]].value!r}\n" for name in names)


def _problem(what: str, clips: Sequence[str], limit: int = 10) -> list[str]:
    """How many, and the first of them; nothing where there are none."""
    more = [f"    and {len(clips) - limit} more"] if len(clips) > limit else []
    return [f"{len(clips)} {what}:", *(f"    {clip}" for clip in clips[:limit]), *more] if clips else []


def write_submission(path: Path, text: str) -> None:
    """Write the zip, whole or not at all; the same text gives the same bytes.

    Raises:
        UsageError: it is not called .zip.
        ScoresError: it cannot be written.
    """
    if path.suffix.lower() != ".zip":
        raise UsageError(f"a submission is a .zip, received {path}")
    entry = zipfile.ZipInfo(FILE_NAME, FIRST_DATE)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.create_system = 3  # Unix, wherever it is made
    entry.external_attr = 0o644 << 16
    try:
        with replacing(path) as beside, zipfile.ZipFile(beside, "w") as archive:
            archive.writestr(entry, text.encode())
    except OSError as error:
        raise ScoresError(f"cannot write {path}: {error.strerror or error}") from None
