"""Kill a rating run again and again, resume it, and check that no row is lost, doubled or changed.

    python scripts/kill_and_resume.py --work runs/kill [--kills 20] [--clips 24] [-o runs/kill/report.json]

Each kill is SIGKILL at a random moment, while the run starts or a while after a row was written: of the whole process
group, or, every other time, of the command alone, whose decoding processes must then end by themselves. After each kill
the rows so far are read; the same command then goes on. A run that gets to its end is compared with an undisturbed one
(all columns but `seconds`), and another begins, in another form of file, until there were enough kills. Then accidents:
a full disk, an output that cannot be written, model files cut short; each must end with a clear error, earlier rows
intact. Ends with 1 where something of this does not hold.
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
from damaged_files import SAMPLES, TOLERANCE, box

import lmm_qa
from lmm_qa.ratings_io import journal, read_rows

Row = dict[str, Any]
FORMS = (".jsonl", ".parquet", ".csv")
EMBEDDED = Path(lmm_qa.__file__).parent / "embedded"


def make_clips(folder: Path, count: int) -> list[Path]:
    """Sample clips under many names, each with other bytes and the same pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = sorted(SAMPLES.glob("*.mp4"), key=lambda path: path.stat().st_size)[:6]
    paths = []
    for number, sample in zip(range(count), itertools.cycle(samples), strict=False):
        path = folder / f"{number:04}_{sample.name}"
        path.write_bytes(sample.read_bytes() + box(number.to_bytes(4, "big")))
        paths.append(path)
    return paths


def command(clips: Path, output: Path, *options: str | Path) -> list[str]:
    arguments = ("rate", clips, "-o", output, "--device", "cpu", "--batch-size", "2", *options)
    return [sys.executable, "-m", "lmm_qa", *map(str, arguments)]


@dataclass(frozen=True)
class Ended:
    code: int
    complaints: str
    seconds: float


def finish(arguments: Sequence[str], largest_file: int | None = None) -> Ended:
    """Run a command to its end; it may write no file larger than so many bytes."""

    def limit() -> None:
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    began = time.monotonic()
    done = subprocess.run(arguments, capture_output=True, text=True, preexec_fn=limit)
    return Ended(done.returncode, done.stderr, time.monotonic() - began)


def kill(arguments: Sequence[str], growing: Path, rows: int, pause: float, alone: bool, patience: float = 60) -> bool:
    """Start a command and kill it, `pause` seconds after it has written so many rows; whether it still ran then.

    Raises:
        AssertionError: it failed before, or a process of it outlived it.
    """
    enough = lines(growing) + rows
    with subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        while process.poll() is None and lines(growing) < enough:
            time.sleep(0.01)
        try:
            complaints = process.communicate(timeout=pause)[1].decode()
        except subprocess.TimeoutExpired:
            children = psutil.Process(process.pid).children(recursive=True)
            if alone:
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            # Nobody may be there to bury those whose parent is gone.
            left = [each for each in psutil.wait_procs(children, timeout=patience)[1] if alive(each)]
            assert not left, f"outlived the command: {left}"
            return True
    assert process.returncode == 0, complaints
    return False


def alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def stored(output: Path) -> dict[str, Row]:
    """The rows that a run left, in the output or in the journal beside it, by clip.

    Raises:
        AssertionError: one file holds two rows of a clip.
    """
    found: dict[str, Row] = {}
    for path in (output, journal(output)):
        if path.exists() and path.stat().st_size:
            clips = clips_in(path)
            assert len(clips) == len(set(clips)), f"{path} holds two rows of a clip"
            found |= {row["clip"]: row for row in read_rows(path)}
    return found


def clips_in(path: Path) -> list[str]:
    """The clip of each row, read by other means than ours, which leave out what is double."""
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


def kill_often(work: Path, kills: int, clips: int, seed: int) -> Iterator[str]:
    """Kill and resume; a line for each kill and for each run that got to its end.

    Raises:
        AssertionError: a row was lost, doubled or changed.
    """
    rng = random.Random(seed)
    names = [path.name for path in make_clips(work / "clips", clips)]
    undisturbed = finish(command(work / "clips", work / "undisturbed.jsonl", "--overwrite"))
    assert undisturbed.code == 0, undisturbed.complaints
    expected = {row["clip"]: row for row in read_rows(work / "undisturbed.jsonl")}
    assert sorted(expected) == sorted(names)
    yield f"undisturbed: {clips} clips in {undisturbed.seconds:.0f} s"
    done = 0
    for life in itertools.count():
        output = work / f"ratings{FORMS[life % len(FORMS)]}"
        for path in (output, journal(output)):
            path.unlink(missing_ok=True)
        kept: dict[str, Row] = {}
        while True:
            fresh, alone = rng.randrange(5), done % 2 == 1
            pause = rng.uniform(0, 0.5 if fresh else undisturbed.seconds / 4)
            growing = output if output.suffix == ".jsonl" else journal(output)
            if killed := done < kills:
                killed = kill(command(work / "clips", output), growing, fresh, pause, alone)
            else:  # the last one is left in peace
                ended = finish(command(work / "clips", output))
                assert ended.code == 0, ended.complaints
            rows = stored(output)
            assert kept.keys() <= rows.keys(), f"lost: {kept.keys() - rows.keys()}"
            for clip, row in rows.items():
                assert not (changed := differences(row, expected[clip])), f"{clip}: {changed} differ"
                assert clip not in kept or kept[clip] == row, f"{clip} was rated again"
            kept = rows
            if not killed:
                break
            done += 1
            who = "the command" if alone else "the group"
            yield f"kill {done:>2}, of {who}, {pause:4.1f} s after row {fresh}: {len(rows):>3} rows in {output.name}"
        assert clips_in(output) == names, "not every clip once, in order"
        yield f"to the end: {len(kept)} rows, as undisturbed, in {output.name}"
        if done == kills:
            return


def accidents(work: Path) -> Iterator[tuple[str, Ended, str]]:
    """What can go wrong around a run: its name, how the command ended, and what was expected in its last line."""
    make_clips(work / "few", 6)
    output = work / "accident.jsonl"
    first = finish(command(work / "few", output, "--overwrite"))
    assert first.code == 0, first.complaints
    whole = output.read_bytes()
    written = whole.splitlines(keepends=True)
    for suffix in FORMS:
        path = work / f"full{suffix}"
        growing = path if suffix == ".jsonl" else journal(path)
        path.unlink(missing_ok=True)
        growing.write_bytes(b"".join(written[:2]))
        ended = finish(command(work / "few", path), largest_file=len(b"".join(written[:3])) + 100)
        assert growing.read_bytes().startswith(b"".join(written[:2])), "earlier rows are not intact"
        assert 2 <= len(stored(path)) <= 3, f"{len(stored(path))} rows"
        yield f"disk full {suffix}", ended, "File too large"
        again = finish(command(work / "few", path))
        assert again.code == 0 and len(read_rows(path)) == 6, again.complaints
    yield "output in /proc", finish(command(work / "few", Path("/proc/ratings.jsonl"))), "cannot write /proc/ratings"
    (work / "taken.jsonl").mkdir(exist_ok=True)
    yield "output is a folder", finish(command(work / "few", work / "taken.jsonl")), "it is a folder"
    for name in ("base/model.safetensors", "base/config.json", "base/tokenizer.json", "base/processor_config.json",
                 "adapter/adapter_model.safetensors", "adapter/adapter_config.json", "adapter/rater.json"):  # fmt: skip
        model = work / "model"
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(EMBEDDED, model)
        with (model / name).open("r+b") as file:
            file.truncate((model / name).stat().st_size // 2)
        unrated = work / "unrated.jsonl"
        ended = finish(command(work / "few", unrated, "-m", model / "adapter"))
        assert not unrated.exists(), f"{name} cut short, and {unrated} was written"
        yield f"{name} cut short", ended, ""
    assert output.read_bytes() == whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for clips and ratings")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, help="what happened, as JSON")
    args = parser.parse_args()
    told = []
    for line in kill_often(args.work, args.kills, args.clips, args.seed):
        print(line, flush=True)
        told.append(line)
    failed = 0
    for name, ended, expected in accidents(args.work):
        last = (ended.complaints.strip().splitlines() or [""])[-1]
        clear = ended.code in (1, 2) and last.startswith("error: ") and expected in last
        failed += not clear or "Traceback" in ended.complaints
        told.append(f"{'as it should' if clear else 'WRONG'}: {name}: exit code {ended.code}, {last}")
        print(told[-1], flush=True)
    if args.output:
        args.output.write_text(json.dumps(told, indent=1))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
