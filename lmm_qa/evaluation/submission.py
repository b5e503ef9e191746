"""Challenge submissions: a zip with output.txt at its root, one line `name.mp4,score` per clip, LF, no header, in the
order of the organisers' list. A submission is written only if every listed clip has a score.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

from lmm_qa.errors import ScoresError, UsageError
from lmm_qa.evaluation.labels import Score, match
from lmm_qa.files.atomic import replacing

FILE_NAME = "output.txt"
ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The earliest date in a zip. A fixed date makes the zip reproducible."""


def submission_text(scores: Sequence[Score], names: Sequence[str]) -> str:
    """The content of output.txt.

    Args:
        scores: the ratings.
        names: the organisers' list.

    Raises:
        ScoresError: a listed clip has no score, or a rated clip is not listed; with their names.
    """
    found = match(names, [score.clip for score in scores])
    by_clip = {score.clip: score for score in scores}
    listed = {name: by_clip[found[name]] for name in names if name in found}
    taken = set(found.values())
    problems = [
        *_problem("are listed and not in the ratings", [name for name in names if name not in listed]),
        *_problem("could not be rated", [f"{n} ({score.error})" for n, score in listed.items() if score.value is None]),
        *_problem("are rated and not listed", [score.clip for score in scores if score.clip not in taken]),
    ]
    if problems:
        raise ScoresError("\n  ".join(["no submission was written: each listed clip needs one score", *problems]))
    return "".join(f"{name},{score.value!r}\n" for name, score in listed.items())


def _problem(description: str, clips: Sequence[str], limit: int = 10) -> list[str]:
    """The number of clips and the names of the first ones; empty without clips."""
    more = [f"    and {len(clips) - limit} more"] if len(clips) > limit else []
    return [f"{len(clips)} {description}:", *(f"    {clip}" for clip in clips[:limit]), *more] if clips else []


def write_submission(path: Path, text: str) -> None:
    """Write the zip atomically; the same text gives the same bytes.

    Raises:
        UsageError: the path does not end in .zip.
        ScoresError: the file cannot be written.
    """
    if path.suffix.lower() != ".zip":
        raise UsageError(f"a submission is a .zip, received {path}")
    entry = zipfile.ZipInfo(FILE_NAME, ZIP_EPOCH)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.create_system = 3  # Unix, on every system
    entry.external_attr = 0o644 << 16
    try:
        with replacing(path) as beside, zipfile.ZipFile(beside, "w") as archive:
            archive.writestr(entry, text.encode())
    except OSError as error:
        raise ScoresError(f"cannot write {path}: {error.strerror or error}") from None
