"""Kill a rating run again and again, resume it, and check that no row is lost, duplicated or changed.

    python scripts/kill_and_resume.py --work runs/kill [--kills 20] [--clips 24] [-o runs/kill/report.json]

Each kill is a SIGKILL at a random time: of the whole process group, or, every other time, of the command alone, whose
decoding processes must then end on their own. After each kill the rows written so far are checked, and the same command
resumes. A run that completes is compared with an undisturbed one (all columns but `seconds`), and another one starts
with the next file format, until there were enough kills. Then faults: a full disk, an output that cannot be written,
truncated model files. Each must end with a clear error, with earlier rows intact. Exits with 1 if any check fails.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet
from damaged_files import SAMPLES, TOLERANCE
from rating_runs import make_clips, process_tree

from lmm_qa.model.source import EMBEDDED
from lmm_qa.tables import Row, journal, read_rows

FORMATS = (".jsonl", ".parquet", ".csv")
EMBEDDED_MODEL = EMBEDDED.parent


def sample_videos() -> list[bytes]:
    """The six smallest sample clips."""
    samples = sorted(SAMPLES.glob("*.mp4"), key=lambda path: path.stat().st_size)[:6]
    return [sample.read_bytes() for sample in samples]


def command(clips: Path, output: Path, *options: str | Path) -> list[str]:
    arguments = ("rate", clips, "-o", output, "--device", "cpu", "--batch-size", "2", *options)
    return [sys.executable, "-m", "lmm_qa", *map(str, arguments)]


@dataclass(frozen=True)
class Finished:
    code: int
    stderr: str
    seconds: float


def finish(arguments: Sequence[str], largest_file: int | None = None) -> Finished:
    """Run a command; files it writes are limited to `largest_file` bytes."""

    def limit() -> None:
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    start = time.monotonic()
    done = subprocess.run(arguments, capture_output=True, text=True, preexec_fn=limit)
    return Finished(done.returncode, done.stderr, time.monotonic() - start)


def kill(arguments: Sequence[str], growing: Path, rows: int, pause: float, alone: bool, wait: float = 60) -> bool:
    """Start a command and kill it `pause` seconds after it has written `rows` more rows.

    Args:
        alone: kill the command only, not its process group.
        wait: seconds in which all of its processes must end.

    Returns:
        Whether it was still running then.

    Raises:
        AssertionError: it failed before, or one of its processes outlived it.
    """
    enough = lines(growing) + rows
    with subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        while process.poll() is None and lines(growing) < enough:
            time.sleep(0.01)
        try:
            stderr = process.communicate(timeout=pause)[1].decode()
        except subprocess.TimeoutExpired:
            children = process_tree(psutil.Process(process.pid))[1:]
            if alone:
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            # Orphans may stay zombies.
            left = [each for each in psutil.wait_procs(children, timeout=wait)[1] if alive(each)]
            assert not left, f"outlived the command: {left}"
            return True
    assert process.returncode == 0, stderr
    return False


def alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def stored(output: Path) -> dict[str, Row]:
    """The rows that a run has written to the output and its journal, by clip.

    Raises:
        AssertionError: a file contains two rows of one clip.
    """
    found: dict[str, Row] = {}
    for path in (output, journal(output)):
        if path.exists() and path.stat().st_size:
            clips = clips_in(path)
            assert len(clips) == len(set(clips)), f"{path} contains two rows of a clip"
            found |= {row["clip"]: row for row in read_rows(path)}
    return found


def clips_in(path: Path) -> list[str]:
    """The clip of each row, duplicates included (`read_rows` would drop them)."""
    if path.suffix == ".parquet":
        return list(pyarrow.parquet.read_table(path, columns=["clip"])["clip"].to_pylist())
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            return [row["clip"] for row in csv.DictReader(file)]
    whole_lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line)["clip"] for line in whole_lines]


def differences(row: Row, other: Row) -> list[str]:
    """Columns that differ, except for the time spent and the last digits of numbers."""
    return [key for key in row.keys() | other.keys() if key != "seconds" and not same(row.get(key), other.get(key))]


def same(value: Any, other: Any) -> bool:
    if isinstance(value, float) and isinstance(other, int | float):
        return math.isclose(value, other, rel_tol=0, abs_tol=TOLERANCE)
    if isinstance(value, dict) and isinstance(other, dict):
        return value.keys() == other.keys() and all(same(value[key], other[key]) for key in value)
    if isinstance(value, list) and isinstance(other, list):
        return len(value) == len(other) and all(map(same, value, other))
    return bool(value == other)


def kill_repeatedly(work: Path, kills: int, clips: int, seed: int) -> Iterator[str]:
    """Kill and resume; yields a line for each kill and each complete run.

    Raises:
        AssertionError: a row was lost, duplicated or changed.
    """
    rng = random.Random(seed)
    names = make_clips(work / "clips", sample_videos(), clips)
    undisturbed = finish(command(work / "clips", work / "undisturbed.jsonl", "--overwrite"))
    assert undisturbed.code == 0, undisturbed.stderr
    expected = {row["clip"]: row for row in read_rows(work / "undisturbed.jsonl")}
    assert sorted(expected) == sorted(names)
    yield f"undisturbed: {clips} clips in {undisturbed.seconds:.0f} s"
    done = 0
    for run in itertools.count():
        output = work / f"ratings{FORMATS[run % len(FORMATS)]}"
        for path in (output, journal(output)):
            path.unlink(missing_ok=True)
        before: dict[str, Row] = {}
        while True:
            new, alone = rng.randrange(5), done % 2 == 1
            pause = rng.uniform(0, 0.5 if new else undisturbed.seconds / 4)
            growing = output if output.suffix == ".jsonl" else journal(output)
            if killed := done < kills:
                killed = kill(command(work / "clips", output), growing, new, pause, alone)
            else:
                ended = finish(command(work / "clips", output))
                assert ended.code == 0, ended.stderr
            rows = stored(output)
            assert before.keys() <= rows.keys(), f"lost: {before.keys() - rows.keys()}"
            for clip, row in rows.items():
                assert not (changed := differences(row, expected[clip])), f"{clip}: {changed} differ"
                assert clip not in before or before[clip] == row, f"{clip} was rated again"
            before = rows
            if not killed:
                break
            done += 1
            who = "the command" if alone else "the group"
            yield f"kill {done:>2}, of {who}, {pause:4.1f} s after {new} rows: {len(rows):>3} rows in {output.name}"
        assert clips_in(output) == names, "not every clip once, in order"
        yield f"complete: {len(before)} rows, as undisturbed, in {output.name}"
        if done == kills:
            return


def faults(work: Path) -> Iterator[tuple[str, Finished, str]]:
    """Faults outside the program: name, how the command ended, and what its last line should contain."""
    make_clips(work / "few", sample_videos(), 6)
    output = work / "faults.jsonl"
    first = finish(command(work / "few", output, "--overwrite"))
    assert first.code == 0, first.stderr
    whole = output.read_bytes()
    written = whole.splitlines(keepends=True)
    for suffix in FORMATS:
        path = work / f"full{suffix}"
        growing = path if suffix == ".jsonl" else journal(path)
        path.unlink(missing_ok=True)
        growing.write_bytes(b"".join(written[:2]))
        ended = finish(command(work / "few", path), largest_file=len(b"".join(written[:3])) + 100)
        assert growing.read_bytes().startswith(b"".join(written[:2])), "earlier rows are not intact"
        assert 2 <= len(stored(path)) <= 3, f"{len(stored(path))} rows"
        yield f"disk full {suffix}", ended, "File too large"
        again = finish(command(work / "few", path))
        assert again.code == 0 and len(read_rows(path)) == 6, again.stderr
    yield "output in /proc", finish(command(work / "few", Path("/proc/ratings.jsonl"))), "cannot write /proc/ratings"
    (work / "taken.jsonl").mkdir(exist_ok=True)
    yield "output is a folder", finish(command(work / "few", work / "taken.jsonl")), "it is a folder"
    for name in ("base/model.safetensors", "base/config.json", "base/tokenizer.json", "base/processor_config.json",
                 "adapter/adapter_model.safetensors", "adapter/adapter_config.json", "adapter/rater.json"):  # fmt: skip
        model = work / "model"
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(EMBEDDED_MODEL, model)
        with (model / name).open("r+b") as file:
            file.truncate((model / name).stat().st_size // 2)
        unrated = work / "unrated.jsonl"
        ended = finish(command(work / "few", unrated, "-m", model / "adapter"))
        assert not unrated.exists(), f"{name} truncated, and {unrated} was written"
        yield f"{name} truncated", ended, ""
    assert output.read_bytes() == whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for clips and ratings")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, help="all results, as JSON")
    args = parser.parse_args()
    results = []
    for line in kill_repeatedly(args.work, args.kills, args.clips, args.seed):
        print(line, flush=True)
        results.append(line)
    failed = 0
    for name, ended, expected in faults(args.work):
        last = (ended.stderr.strip().splitlines() or [""])[-1]
        clear = ended.code in (1, 2) and last.startswith("error: ") and expected in last
        failed += not clear or "Traceback" in ended.stderr
        results.append(f"{'ok' if clear else 'WRONG'}: {name}: exit code {ended.code}, {last}")
        print(results[-1], flush=True)
    if args.output:
        args.output.write_text(json.dumps(results, indent=1))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
