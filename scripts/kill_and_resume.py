"""Kill rating runs with every signal at every stage, resume them, and check that nothing is lost and nothing is left.

    python scripts/kill_and_resume.py --work runs/kill [--clips 12] [--seed 0] [-o runs/kill/report.json]

For each signal and each file format, a run is killed during its start, while it decodes, after some rows, and while it
writes the final file; each time the same command resumes. Signals go to the command alone or to its process group, in
turn; SIGPIPE comes from a reader of the output that ends. After each kill, no process may be left (how long that takes
is reported) and no temporary file (after SIGKILL: one, which the next run reuses), and the rows must be those of an
undisturbed run, all columns but `seconds`. A run that completes must contain every clip once, in order.

Then faults: a full disk, an output that cannot be written, truncated model files. Each must end with a clear error and
earlier rows intact. Exits with 1 if any check fails.
"""

from __future__ import annotations

import argparse
import csv
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet
from rating_runs import make_clips

import lmm_qa
from lmm_qa.files.tables import Row, journal, read_rows, write_rows
from lmm_qa.model.source import EMBEDDED

SAMPLES = Path(lmm_qa.__file__).parent / "samples"
TOLERANCE = 1e-4
"""Allowed difference of scores: sums of floating-point numbers depend on their order."""
FORMATS = (".jsonl", ".csv", ".parquet")
SIGNALS = ("SIGKILL", "SIGTERM", "SIGHUP", "SIGINT", "SIGPIPE")
MOMENTS = ("start", "decoding", "rating", "writing")
OTHERS = 10_000
"""Rows of other clips in each file: they must survive, and writing the final file takes long enough to be hit."""
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


@dataclass(frozen=True)
class Kill:
    """What a kill did."""

    signal: str
    format: str
    moment: str
    group: bool
    """Whether the signal went to the process group; if not, to the command alone."""
    code: int
    """Exit code; -n: ended by the signal n."""
    seconds: float
    """From the signal until the last process had ended."""
    rows: int
    """Rows of the run in the file and its journal afterwards."""
    problem: str | None = None

    def __str__(self) -> str:
        whom = "group" if self.group else "command"
        return (
            f"{self.signal:<7} {self.format:<8} {self.moment:<8} to the {whom:<7}: exit code {self.code:>3}, all ended "
            f"after {self.seconds:.2f} s, {self.rows:>2} rows: {self.problem or 'ok'}"
        )


def kill(
    arguments: Sequence[str], name: str, group: bool, reached: Callable[[psutil.Process], bool], wait: float = 60
) -> tuple[int, float] | None:
    """Start a command and kill it at a moment.

    Args:
        name: the signal. SIGPIPE is not sent: the reader of stdout and stderr ends.
        group: send it to the process group, not to the command alone.
        reached: whether the moment has come; called with the command's process.
        wait: seconds in which all of its processes must end.

    Returns:
        Exit code, and seconds until all processes had ended; None if the command was done before.

    Raises:
        AssertionError: it failed before, or one of its processes outlived it.
    """

    def accept_signals() -> None:
        for each in (signal.SIGHUP, signal.SIGINT):  # ignored under nohup, and in the background of a shell
            signal.signal(each, signal.SIG_DFL)

    reader, writer = os.pipe()
    with subprocess.Popen(
        arguments, stdout=writer, stderr=writer, start_new_session=True, preexec_fn=accept_signals
    ) as process:
        os.close(writer)
        while process.poll() is None and not reached(psutil.Process(process.pid)):
            time.sleep(0.001)
        with open(reader, "rb") as output:
            if process.poll() is not None:
                assert process.returncode == 0, output.read().decode()
                return None
            start = time.monotonic()
            if name != "SIGPIPE":
                number = getattr(signal, name)
                os.killpg(process.pid, number) if group else process.send_signal(number)
                process.wait(wait)
        process.wait(wait)
    while left := session(process.pid):
        assert time.monotonic() - start < wait, f"outlived the command: {left}"
        time.sleep(0.01)
    return process.returncode, time.monotonic() - start


def session(leader: int) -> list[psutil.Process]:
    """The running processes of a session. Orphans may stay zombies."""
    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


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


class Experiment:
    """Clips, and what an undisturbed run writes for them."""

    def __init__(self, work: Path, clips: int, seed: int, options: Sequence[str | Path] = ()) -> None:
        """
        Args:
            work: folder for clips and ratings.
            clips: number of clips.
            seed: of the moments.
            options: further ones of `lmm-qa rate`.
        """
        self.work = work
        self.options = options
        self.rng = random.Random(seed)
        self.names = make_clips(work / "clips", sample_videos(), clips)
        path = work / "undisturbed.jsonl"
        ended = finish(command(work / "clips", path, "--overwrite", *options))
        assert ended.code == 0, ended.stderr
        self.seconds = ended.seconds
        self.expected = {row["clip"]: row for row in read_rows(path)}
        assert sorted(self.expected) == sorted(self.names)
        model = self.expected[self.names[0]]
        self.others = [model | {"clip": f"other{n}.mp4", "content_id": f"other{n}"} for n in range(OTHERS)]

    def run(self, name: str, suffix: str, moments: Sequence[str] = MOMENTS) -> Iterator[Kill]:
        """Kill a run at each moment, resume it each time, and let it complete."""
        folder = self.work / f"{name}{suffix}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        output = folder / f"ratings{suffix}"
        write_rows(output, self.others)
        arguments = command(self.work / "clips", output, *self.options)
        before: dict[str, Row] = {}
        for number, moment in enumerate(moments):
            if name == "SIGPIPE":  # without a reader of its messages, a run may complete: each is a new one
                journal(output).unlink(missing_ok=True)
                write_rows(output, self.others)
                before = {}
            group = (number + FORMATS.index(suffix)) % 2 == 1 and name != "SIGPIPE"
            code, seconds, rows, problem = 0, 0.0, before, None
            try:
                ended = kill(arguments, name, group, self._at(moment, output, len(before)))
                assert ended, "the run completed before it was killed"
                code, seconds = ended
                rows = self._check(output, before)
                check_end(name, moment, code, output)
            except AssertionError as error:
                problem = str(error)
            yield Kill(name, suffix, moment, group, code, seconds, len(rows), problem)
            before = rows
        ended_well = finish(arguments)
        assert ended_well.code == 0, ended_well.stderr
        assert len(self._check(output, before)) == len(self.names)
        order = [*(row["clip"] for row in self.others), *self.names]
        assert clips_in(output) == order, "not every clip once, in order"
        assert os.listdir(folder) == [output.name], f"left: {os.listdir(folder)}"

    def _at(self, moment: str, output: Path, done: int) -> Callable[[psutil.Process], bool]:
        """Whether a run that has `done` rows so far has reached a moment."""
        growing, before = (output, OTHERS) if output.suffix == ".jsonl" else (journal(output), 0)
        share = self.rng.random()
        match moment:
            case "start":
                end = time.monotonic() + share * self.seconds / 3
                return lambda _: time.monotonic() > end
            case "decoding":
                return lambda process: bool(decoders(process))
            case "rating":
                rows = before + done + 1 + int(3 * share)
                return lambda _: lines(growing) >= rows
            case _:  # rows appended in order leave nothing else to write
                rows = before + len(self.names)
                return lambda _: temporary(output).exists() or (output == growing and lines(output) >= rows)

    def _check(self, output: Path, before: dict[str, Row]) -> dict[str, Row]:
        """The rows of the run so far.

        Raises:
            AssertionError: a row was lost, changed or rated again.
        """
        found = stored(output)
        lost = [row["clip"] for row in self.others if row["clip"] not in found]
        assert not lost, f"{len(lost)} rows of other clips were lost"
        rows = {clip: row for clip, row in found.items() if not clip.startswith("other")}
        assert before.keys() <= rows.keys(), f"lost: {before.keys() - rows.keys()}"
        for clip, row in rows.items():
            assert not (changed := differences(row, self.expected[clip])), f"{clip}: {changed} differ"
            assert clip not in before or before[clip] == row, f"{clip} was rated again"
        return rows


def check_end(name: str, moment: str, code: int, output: Path) -> None:
    number = getattr(signal, name)
    codes = {-number} if name == "SIGKILL" else {0, 1} if name == "SIGPIPE" else {128 + number}
    if moment == "start" and name != "SIGPIPE":  # the interpreter may not have reached the command
        codes.add(-number)
    assert code in codes, f"exit code {code}"
    allowed = {output.name, journal(output).name} | ({temporary(output).name} if name == "SIGKILL" else set())
    assert not (left := set(os.listdir(output.parent)) - allowed), f"files left: {left}"


def temporary(output: Path) -> Path:
    """Where the final file is written before it replaces the output."""
    return output.with_name(f".{output.name}.tmp")


def decoders(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return [child for child in process.children() if "decoder_pool" in " ".join(child.cmdline())]
    return []


def kill_all(
    work: Path, clips: int, seed: int, signals: Sequence[str] = SIGNALS, formats: Sequence[str] = FORMATS
) -> Iterator[Kill]:
    """Kill runs by each signal, for each format, at each moment. A check that fails is the `problem` of its kill.

    Raises:
        AssertionError: a run could not be completed, or its rows are not those of an undisturbed run.
    """
    experiment = Experiment(work, clips, seed)
    for name in signals:
        for suffix in formats:
            yield from experiment.run(name, suffix)


def kill_table(kills: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of the kills in a report: how many of each signal and format passed all checks."""
    formats = list(dict.fromkeys(each["format"] for each in kills))
    rows = [["signal", *formats, "exit codes", "until all processes had ended, at most"]]
    for name in dict.fromkeys(each["signal"] for each in kills):
        of_signal = [each for each in kills if each["signal"] == name]
        cells = []
        for suffix in formats:
            passed = [each["problem"] is None for each in of_signal if each["format"] == suffix]
            cells.append(f"{sum(passed)} of {len(passed)}")
        codes = ", ".join(map(str, sorted({each["code"] for each in of_signal})))
        rows.append([name, *cells, codes, f"{max(each['seconds'] for each in of_signal):.1f} s"])
    rows.insert(1, ["---"] * len(rows[0]))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


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
    parser.add_argument("--clips", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, help="all results, as JSON")
    args = parser.parse_args()
    kills = []
    for one in kill_all(args.work, args.clips, args.seed):
        print(one, flush=True)
        kills.append(asdict(one))
    failed = sum(each["problem"] is not None for each in kills)
    print(f"{len(kills) - failed} of {len(kills)} kills without loss and without leftovers", flush=True)
    results = []
    for name, ended, expected in faults(args.work):
        last = (ended.stderr.strip().splitlines() or [""])[-1]
        clear = ended.code in (1, 2) and last.startswith("error: ") and expected in last
        failed += not clear or "Traceback" in ended.stderr
        results.append({"fault": name, "code": ended.code, "message": last, "ok": clear})
        print(f"{'ok' if clear else 'WRONG'}: {name}: exit code {ended.code}, {last}", flush=True)
    if args.output:
        args.output.write_text(json.dumps({"kills": kills, "faults": results}, indent=1))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
