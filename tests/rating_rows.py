"""Rows of ratings, as `lmm-qa rate --defects` writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmm_qa.evaluation.pairing import RatingSet
from lmm_qa.files.tables import write_rows

JUDGED = ("blur", "noise", "stall")


def rating_row(clip: str, score: float | None = 3.0, found: Sequence[str] = (), **more: Any) -> dict[str, Any]:
    """A rating with a defect profile; without a score, that of a clip that could not be rated."""
    return {
        "clip": clip,
        "score": score,
        "scale": [1.0, 5.0],
        "model": "embedded",
        "prompt": "Rate it.",
        "rater_id": "r1",
        "calibration": None,
        "defects": {name: 0.9 if name in found else 0.1 for name in JUDGED} | {"movement": None},
        "found": [{"defect": name, "probability": 0.9} for name in found],
        "profile_id": "p1",
        "error": None if score is not None else {"class": "ClipUnreadable", "message": "no video"},
        **more,
    }


def rating_set(folder: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> RatingSet:
    """Write rows to a file, and read them."""
    path = folder / f"{name}.jsonl"
    write_rows(path, [dict(row) for row in rows])
    return RatingSet.read(path, name)
