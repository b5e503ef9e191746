"""Messages and progress bars on stderr, and exit codes."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")

FAILED, WRONG_USAGE, SOME_CLIPS_FAILED, GATE_FAILED, INTERRUPTED = 1, 2, 3, 4, 130
"""Exit codes. A command that another signal than Ctrl-C's ended returns 128 + the number of the signal."""

PROGRESS_SECONDS = 30
"""Interval of progress messages if stderr is not a terminal."""

LIBRARY_ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # idle threads of torch leave the cores to the decoding processes
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


def quiet_libraries() -> None:
    """Turn off progress bars, advice and busy waiting of the libraries. Call it before they are imported."""
    for name, value in LIBRARY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class Terminated(SystemExit):
    """SIGTERM or SIGHUP was received."""


def end_on_signals() -> None:
    """Make SIGTERM and SIGHUP end the command as Ctrl-C does, with a clean-up: worker processes end, no temporary files
    are left.

    A signal that is ignored, as SIGHUP is under nohup, stays ignored.
    """
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            with suppress(ValueError):  # outside the main thread, signals are the caller's business
                signal.signal(number, _terminate)


def _terminate(number: int, _: object) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # launchers may send it twice, to the process and to its group
    raise Terminated(128 + number)


def message(text: str) -> None:
    """Print a line to stderr, at once."""
    print(text, file=sys.stderr, flush=True)


def make_console(stderr: bool = True) -> Console:
    """A console that prints text as it is, without highlighting or markup."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False)


def progress(results: Iterable[T], total: int, verb: str) -> Iterator[T]:
    """Pass results on and show how many there are, the rate, and the time left.

    A progress bar on a terminal, else a message every `PROGRESS_SECONDS`.
    """
    console = make_console()
    start = last = time.monotonic()
    if console.is_terminal:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        text = TextColumn("{task.description}, {task.fields[rate]:.2f} clips/s")
        columns = (BarColumn(), MofNCompleteColumn(), text, TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(verb, total=total, rate=0.0)
            for done, result in enumerate(results, 1):
                bar.update(task, completed=done, rate=done / (time.monotonic() - start))
                yield result
        return
    for done, result in enumerate(results, 1):
        yield result
        now = time.monotonic()
        if now - last > PROGRESS_SECONDS and done < total:
            rate = done / (now - start)
            message(f"{done} of {total} clips {verb}, {rate:.2f} clips/s, {(total - done) / rate:.0f} s left")
            last = now
