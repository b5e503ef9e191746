"""Tables of plain rows."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]

from typing import Any


def _one_line(text: str, length: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 3]}..."
