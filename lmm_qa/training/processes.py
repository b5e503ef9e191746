"""How long the processes of a distributed run wait for each other.

A training step takes seconds, so a process that hangs is noticed after half an hour. Before the first step each process
decodes its own share of the clips, downloads the backbone and runs the vision tower, which can take one of them hours
longer.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from torch import distributed

T = TypeVar("T")

STEP_TIMEOUT = timedelta(minutes=30)
"""Of every exchange between processes, except for `gather_prepared`."""

PREPARATION_TIMEOUT = timedelta(hours=12)


def start_processes() -> PartialState:
    """Connect the processes that a launcher has started; a single process is a run by itself."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=STEP_TIMEOUT)


def gather_prepared(values: list[T], state: PartialState) -> list[T]:
    """The values of all processes, in the order of processes, as soon as each of them has called this."""
    if state.num_processes == 1:
        return values
    # A group of its own, because the timeout of a group is fixed; gloo, because its processes wait on the CPU.
    group = distributed.new_group(backend="gloo", timeout=PREPARATION_TIMEOUT)
    assert isinstance(group, distributed.ProcessGroup)
    parts: list[list[T]] = [[]] * state.num_processes
    distributed.all_gather_object(parts, values, group=group)
    distributed.destroy_process_group(group)
    return [value for part in parts for value in part]
