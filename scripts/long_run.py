"""Rate many clips in one run and check that memory and time per clip do not grow.

    python scripts/long_run.py --work runs/long [--clips 2000] [-o runs/long/report.json]

The clips are small, of six sizes, all with different content. Resident memory of all processes and processor time per
clip are compared after the first 200 clips and at the end. Exits with 1 if memory grows by 5% or time by 10%.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from corpus import pictures, write
from rating_runs import Run, make_clips, process_tree, resident_memory, watched_run

from lmm_qa.files.tables import read_rows

SIZES = ((64, 64), (96, 128), (128, 128), (192, 128), (128, 224), (256, 256))
WARM_UP = 200
"""Clips that are not counted."""
WINDOW = 100
"""Clips over which memory is averaged, at the beginning and at the end."""
MAX_MEMORY_GROWTH, MAX_TIME_GROWTH = 0.05, 0.10

Sample = tuple[int, int, float]
"""Clips rated, bytes of resident memory, seconds of processor time."""


def make_videos(folder: Path) -> list[bytes]:
    """A small clip of each size."""
    folder.mkdir(parents=True, exist_ok=True)
    videos = []
    for number, (width, height) in enumerate(SIZES):
        path = folder / f"size{number}.mp4"
        write(path, pictures(24, width, height), "libx264", "yuv420p")
        videos.append(path.read_bytes())
    return videos


def rate(folder: Path, output: Path, limit: float) -> tuple[Run, list[Sample]]:
    """Rate a folder with few pixels per clip, which is enough to find growth and takes minutes."""
    samples: list[Sample] = []

    def observe(root: psutil.Process) -> None:
        rows = output.read_bytes().count(b"\n") if output.exists() else 0
        processor = 0.0
        for process in process_tree(root):
            with suppress(psutil.Error):
                processor += sum(process.cpu_times()[:2])
        samples.append((rows, resident_memory(root), processor))

    output.unlink(missing_ok=True)
    options = ("--device", "cpu", "--sampling", "uniform:2", "--view", "whole:56")
    command = [sys.executable, "-m", "lmm_qa", "rate", folder, "-o", output, *options]
    return watched_run(command, limit, observe), samples


def measure_growth(samples: Sequence[Sample], clips: int) -> dict[str, Any]:
    """Memory and processor time per clip, after the warm-up and at the end of a run, and their growth."""
    early = [memory for rows, memory, _ in samples if WARM_UP <= rows < WARM_UP + WINDOW]
    late = [memory for rows, memory, _ in samples if clips - WINDOW <= rows < clips]
    middle = (WARM_UP + clips) // 2
    memory = statistics.median(early), statistics.median(late)
    time = processor_time(samples, WARM_UP, middle), processor_time(samples, middle, clips - WINDOW)
    return {
        "memory": memory,
        "memory_growth": memory[1] / memory[0] - 1,
        "processor_seconds_per_clip": time,
        "time_growth": time[1] / time[0] - 1,
    }


def processor_time(samples: Sequence[Sample], first: int, last: int) -> float:
    """Processor seconds per clip between two numbers of rated clips."""
    begin = next(sample for sample in samples if sample[0] >= first)
    end = next(sample for sample in samples if sample[0] >= last)
    return (end[2] - begin[2]) / (end[0] - begin[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for clips and ratings")
    parser.add_argument("--clips", type=int, default=2000)
    parser.add_argument("--limit", type=float, default=7200.0, help="time limit of the run, in seconds")
    parser.add_argument("-o", "--output", type=Path, help="all results, as JSON")
    args = parser.parse_args()
    if args.clips < WARM_UP + 2 * WINDOW:
        parser.error(f"--clips: at least {WARM_UP + 2 * WINDOW}, received {args.clips}")
    make_clips(args.work / "clips", make_videos(args.work), args.clips)
    run, samples = rate(args.work / "clips", args.work / "ratings.jsonl", args.limit)
    if run.code != 0:
        sys.exit(f"exit code {run.code} after {run.seconds:.0f} s: {run.stderr[-2000:]}")
    rows = read_rows(args.work / "ratings.jsonl")
    assert len({row["clip"] for row in rows}) == len(rows) == args.clips
    assert not any(row["error"] for row in rows)
    growth = measure_growth(samples, args.clips)
    (early, late), (before, after) = growth["memory"], growth["processor_seconds_per_clip"]
    print(
        f"{args.clips} clips in {run.seconds:.0f} s; resident memory {early / 2**20:.0f} MiB after {WARM_UP} clips, "
        f"{late / 2**20:.0f} MiB at the end ({growth['memory_growth']:+.1%}); "
        f"processor time per clip {before:.3f} s, then {after:.3f} s ({growth['time_growth']:+.1%})"
    )
    if args.output:
        args.output.write_text(json.dumps({**growth, "clips": args.clips, "seconds": run.seconds, "samples": samples}))
    sys.exit(growth["memory_growth"] >= MAX_MEMORY_GROWTH or growth["time_growth"] >= MAX_TIME_GROWTH)


if __name__ == "__main__":
    main()
