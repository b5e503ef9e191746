"""Run a command and watch the memory of it and of all processes that it starts."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

INTERVAL = 0.1
"""Seconds between two looks at the memory."""


@dataclass(frozen=True)
class Run:
    """A command that has ended, or was killed for taking too long."""

    code: int | None
    """Exit code; None: killed after the time limit."""
    complaints: str
    """Its stderr."""
    seconds: float
    memory: list[tuple[float, int]] = field(repr=False)
    """(seconds since the start, bytes): resident memory of all processes together; pages that they share count for
    each."""

    @property
    def peak(self) -> int:
        return max((size for _, size in self.memory), default=0)


def watched_run(
    command: Sequence[str | Path], limit: float, look: Callable[[psutil.Process], object] | None = None
) -> Run:
    """Run a command to its end, at most `limit` seconds; `look` is called with its process every `INTERVAL` seconds."""
    began = time.monotonic()
    memory: list[tuple[float, int]] = []
    complaints: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        reader = threading.Thread(target=lambda stream: complaints.append(stream.read()), args=(process.stderr,))
        reader.start()
        root = psutil.Process(process.pid)
        late = False
        while process.poll() is None:
            memory.append((time.monotonic() - began, resident(root)))
            if look is not None:
                look(root)
            if late := time.monotonic() - began > limit:
                kill_tree(root)
            time.sleep(INTERVAL)
        reader.join()
    code = None if late else process.returncode
    return Run(code, "".join(complaints), time.monotonic() - began, memory)


def resident(root: psutil.Process) -> int:
    """Bytes of resident memory of a process and its descendants."""
    total = 0
    for process in family(root):
        with suppress(psutil.Error):
            total += process.memory_info().rss
    return total


def kill_tree(root: psutil.Process) -> None:
    for process in family(root):
        with suppress(psutil.Error):
            process.kill()


def family(root: psutil.Process) -> list[psutil.Process]:
    try:
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []
