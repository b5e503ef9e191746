"""Print ratings on a terminal: a table of scores, or defects and explanations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lmm_qa.files.tables import Row, one_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

BARS = " ▁▂▃▄▅▆▇█"
ASCII_BARS = " .:-=+*#@"


def render_table(rows: Sequence[Row], console: Console, limit: int = 40) -> None:
    """Print a table of ratings with one line per clip, at most `limit` lines; failures are red.

    Level probabilities are shown as bars under the initials of the levels. Prediction intervals, if there are any,
    replace the std.
    """
    from rich.table import Table

    scales = {tuple(row["scale"]) for row in rows if row.get("scale")}
    levels: Iterable[str] = next((row["probabilities"] for row in rows if row.get("probabilities")), ())
    bars = BARS if console.encoding.lower().startswith("utf") else ASCII_BARS
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("clip", overflow="fold")
    table.add_column(
        f"score ({'-'.join(f'{end:g}' for end in min(scales))})" if len(scales) == 1 else "score", **_RIGHT
    )
    intervals = any(row.get("interval") for row in rows)
    table.add_column("interval" if intervals else "std", **_RIGHT)
    table.add_column("level")
    table.add_column(" ".join(level[:1] for level in levels), no_wrap=True)
    table.add_column("size", **_RIGHT)
    table.add_column("s", **_RIGHT)
    for row in rows[:limit]:
        table.add_row(*_line(row, bars, intervals))
    console.print(table)
    if len(rows) > limit:
        failed = sum(row.get("error") is not None for row in rows[limit:])
        console.print(f"... and {len(rows) - limit} more clips, {failed} of which failed", highlight=False)


_RIGHT: dict[str, Any] = {"justify": "right", "no_wrap": True}


def render_explanations(rows: Sequence[Row], console: Console) -> None:
    """Print the defects found in each clip and the explanation of its score."""
    from rich.padding import Padding
    from rich.text import Text

    bars = BARS if console.encoding.lower().startswith("utf") else ASCII_BARS
    for row in rows:
        console.print(Text(str(row["clip"]), style="bold"), highlight=False)
        if error := row.get("error"):
            console.print(Padding(Text(f"{error.get('class')}: {error.get('message')}", style="red"), (0, 0, 1, 2)))
            continue
        console.print(Padding(Text(f"{_number(row['score'], 2)}  {row['explanation']}"), (0, 0, 0, 2)))
        for one in row["found"]:
            place = one["place"] + "".join(f", {first:.1f}-{last:.1f} s" for first, last in one["seconds"] or ())
            bar = _bar(one["probability"], bars) * 8
            console.print(Padding(f"{one['defect']:<16}{bar} {one['probability']:.2f}  {place}", (0, 0, 0, 4)))
        unjudged = [name for name, probability in row["defects"].items() if probability is None]
        if unjudged:
            console.print(Padding(Text(f"not judged: {', '.join(unjudged)}", style="dim"), (0, 0, 1, 4)))


def _line(row: Row, bars: str, intervals: bool) -> list[Text]:
    from rich.text import Text

    error, video = row.get("error"), row.get("video") or {}
    size = f"{video['width']}x{video['height']}" if video.get("width") else ""
    level = one_line(f"{error.get('class')}: {error.get('message')}", 80) if error else str(row.get("level") or "")
    interval = ", ".join(_number(end, 2) for end in row.get("interval") or ())
    cells = (
        str(row["clip"]),
        "-" if error else _number(row.get("score"), 2),
        (interval and f"[{interval}]") if intervals else _number(row.get("std"), 2),
        level,
        " ".join(_bar(p, bars) for p in (row.get("probabilities") or {}).values()),
        size,
        _number(row.get("seconds"), 1),
    )
    return [Text(cell, style="red" if error else "") for cell in cells]


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _bar(probability: float, bars: str) -> str:
    """A bar for a probability; from 0.01 on it is never empty."""
    return bars[max(round(probability * (len(bars) - 1)), int(probability >= 0.01))]
