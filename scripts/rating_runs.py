"""Helpers of the scripts that run `lmm-qa rate`: clips with distinct content, and a run whose memory is observed."""

from __future__ import annotations

import itertools
import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

INTERVAL = 0.1
"""Seconds between two memory measurements."""


def box(data: bytes) -> bytes:
    """An MP4 box that players skip: appended to a file, it changes the content id but not the pictures."""
    return (8 + len(data)).to_bytes(4, "big") + b"free" + data


def make_clips(folder: Path, videos: Sequence[bytes], count: int) -> list[str]:
    """Write MP4 files in turn until there are `count`, all with different bytes. Returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number:05}.mp4" for number in range(count)]
    for number, (name, video) in enumerate(zip(names, itertools.cycle(videos), strict=False)):
        (folder / name).write_bytes(video + box(number.to_bytes(4, "big")))
    return names


@dataclass(frozen=True)
class Run:
    """A command that has ended, or was killed at its time limit."""

    code: int | None
    """Exit code; None: killed at the time limit."""
    stderr: str
    seconds: float
    memory: list[tuple[float, int]] = field(repr=False)
    """(seconds since the start, bytes): resident memory of all processes; shared pages count for each of them."""

    @property
    def peak(self) -> int:
        return max((size for _, size in self.memory), default=0)


def watched_run(
    command: Sequence[str | Path],
    limit: float,
    observe: Callable[[psutil.Process], object] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Run:
    """Run a command, for at most `limit` seconds; calls `observe` with its process every `INTERVAL` seconds.

    Args:
        environment: variables in addition to those of this process.
    """
    start = time.monotonic()
    memory: list[tuple[float, int]] = []
    stderr: list[str] = []
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=os.environ | dict(environment or {}),
    ) as process:
        assert process.stderr is not None
        reader = threading.Thread(target=lambda stream: stderr.append(stream.read()), args=(process.stderr,))
        reader.start()
        root = psutil.Process(process.pid)
        late = False
        while process.poll() is None:
            memory.append((time.monotonic() - start, resident_memory(root)))
            if observe is not None:
                observe(root)
            if late := time.monotonic() - start > limit:
                for each in process_tree(root):
                    with suppress(psutil.Error):
                        each.kill()
            time.sleep(INTERVAL)
        reader.join()
    code = None if late else process.returncode
    return Run(code, "".join(stderr), time.monotonic() - start, memory)


def resident_memory(root: psutil.Process) -> int:
    """Bytes of resident memory of a process and its descendants."""
    total = 0
    for process in process_tree(root):
        with suppress(psutil.Error):
            total += process.memory_info().rss
    return total


def process_tree(root: psutil.Process) -> list[psutil.Process]:
    """A process and its descendants; empty if it has ended."""
    try:
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []
