"""Rate many clips in one run and check that memory and time a clip stay flat.

    python scripts/long_run.py --work runs/long [--clips 2000] [-o runs/long/report.json]

The clips are small, of six sizes in turn, all of other bytes. Compared: resident memory of the command and its decoding
processes, and processor time a clip (which other work on the machine disturbs less than wall time), after the first 200
clips and at the end. Ends with 1 where memory grew by 5% or more, or a clip takes 10% longer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from damaged_files import box, pictures, write
from watched_run import Run, family, watched_run

from lmm_qa.ratings_io import read_rows

SIZES = ((64, 64), (96, 128), (128, 128), (192, 128), (128, 224), (256, 256))
WARM = 200
"""Clips after which nothing should change any more."""
WINDOW = 100
"""Clips over which memory is averaged, at the beginning and at the end."""
MEMORY_GROWTH, TIME_GROWTH = 0.05, 0.10

Moment = tuple[int, int, float]
"""Clips rated, bytes of resident memory, seconds of processor time."""


def make_clips(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for number, (width, height) in enumerate(SIZES):
        path = folder.parent / f"size{number}.mp4"
        write(path, pictures(24, width, height), "libx264", "yuv420p")
        made.append(path.read_bytes())
    for number, data in zip(range(count), itertools.cycle(made), strict=False):
        (folder / f"{number:05}.mp4").write_bytes(data + box(number.to_bytes(4, "big")))


def rate(folder: Path, output: Path, limit: float) -> tuple[Run, list[Moment]]:
    moments: list[Moment] = []

    def look(root: psutil.Process) -> None:
        rows = output.read_bytes().count(b"\n") if output.exists() else 0
        memory, processor = 0, 0.0
        for process in family(root):
            with suppress(psutil.Error):
                memory += process.memory_info().rss
                times = process.cpu_times()
                processor += times.user + times.system
        moments.append((rows, memory, processor))

    output.unlink(missing_ok=True)
    # Few pixels: what could grow is the same, and the run takes minutes.
    light = ("--device", "cpu", "--sampling", "uniform:2", "--view", "whole:56")
    return watched_run([sys.executable, "-m", "lmm_qa", "rate", folder, "-o", output, *light], limit, look), moments


def flatness(moments: Sequence[Moment], clips: int) -> dict[str, Any]:
    """Memory and time a clip after the first `WARM` clips and at the end of a run."""
    early = [memory for rows, memory, _ in moments if WARM <= rows < WARM + WINDOW]
    late = [memory for rows, memory, _ in moments if clips - WINDOW <= rows < clips]
    middle = (WARM + clips) // 2
    memory = statistics.median(early), statistics.median(late)
    time = processor_time(moments, WARM, middle), processor_time(moments, middle, clips - WINDOW)
    return {
        "memory": memory,
        "memory_growth": memory[1] / memory[0] - 1,
        "processor_seconds_a_clip": time,
        "time_growth": time[1] / time[0] - 1,
    }


def processor_time(moments: Sequence[Moment], first: int, last: int) -> float:
    """Processor seconds a clip between two numbers of rated clips."""
    begin = next(moment for moment in moments if moment[0] >= first)
    end = next(moment for moment in moments if moment[0] >= last)
    return (end[2] - begin[2]) / (end[0] - begin[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for clips and ratings")
    parser.add_argument("--clips", type=int, default=2000)
    parser.add_argument("--limit", type=float, default=7200.0, help="seconds that the run may take")
    parser.add_argument("-o", "--output", type=Path, help="all figures, as JSON")
    args = parser.parse_args()
    if args.clips < WARM + 2 * WINDOW:
        parser.error(f"--clips: at least {WARM + 2 * WINDOW}, received {args.clips}")
    make_clips(args.work / "clips", args.clips)
    run, moments = rate(args.work / "clips", args.work / "ratings.jsonl", args.limit)
    if run.code != 0:
        sys.exit(f"exit code {run.code} after {run.seconds:.0f} s: {run.complaints[-2000:]}")
    rows = read_rows(args.work / "ratings.jsonl")
    assert len({row["clip"] for row in rows}) == len(rows) == args.clips
    assert not any(row["error"] for row in rows)
    found = flatness(moments, args.clips)
    (early, late), (before, after) = found["memory"], found["processor_seconds_a_clip"]
    print(
        f"{args.clips} clips in {run.seconds:.0f} s; resident memory {early / 2**20:.0f} MiB after {WARM}, "
        f"{late / 2**20:.0f} MiB at the end ({found['memory_growth']:+.1%}); "
        f"processor time a clip {before:.3f} s, then {after:.3f} s ({found['time_growth']:+.1%})"
    )
    if args.output:
        args.output.write_text(json.dumps({**found, "clips": args.clips, "seconds": run.seconds, "moments": moments}))
    sys.exit(found["memory_growth"] >= MEMORY_GROWTH or found["time_growth"] >= TIME_GROWTH)


if __name__ == "__main__":
    main()
