"""How much memory is free for a model."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import psutil
import torch

CGROUP_FILES = {
    "": ("", "memory.max", "memory.current", ""),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
}
"""Folder of a hierarchy of control groups, files with limit and usage, and prefix of what memory.stat sums over a group
and those inside it: for version 2, which names no controllers, and version 1."""


def free_memory(device: str) -> int:
    """Bytes that this process can still use: of the GPU, or of main memory (which an Apple GPU shares).

    Main memory may be limited by a container or batch system (control groups of Linux).
    """
    if device.startswith("cuda"):
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    return min(int(psutil.virtual_memory().available), *free_in_cgroups())


def free_in_cgroups(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes that each memory limit on this process leaves; its own limit, and those of the groups around it."""
    lines = groups.read_text().splitlines() if groups.is_file() else []
    free = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        version = next((name for name in controllers.split(",") if name in CGROUP_FILES), None)
        if version is None:
            continue
        hierarchy, limit, usage, total = CGROUP_FILES[version]
        own = root / hierarchy / path.lstrip("/")
        for folder in (own, *own.parents):
            with suppress(OSError, ValueError):  # the root has no limit; that of others can be "max"
                # Cached files are counted as usage, although the kernel drops them when memory is needed.
                statistics = (folder / "memory.stat").read_text()
                pages = re.findall(rf"^{total}(?:in)?active_file (\d+)$", statistics, re.MULTILINE)
                cached = sum(map(int, pages))
                free.append(int((folder / limit).read_text()) - int((folder / usage).read_text()) + cached)
            if folder == root / hierarchy:
                break
    return free
