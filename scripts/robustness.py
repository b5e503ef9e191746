"""Rate more than a thousand sound, damaged and hostile files in one run, and compare the results with ffmpeg's.

    python scripts/robustness.py --work runs/robustness [--every 20] [-o report.json] [--docs docs/robustness.md]

The files are generated (`scripts/corpus`), with good clips among them. Checks: one row per file; sound files are rated
with as many frames as ffmpeg shows, from the stream that it chooses; damaged and hostile files have the expected
result; the good clips have the same scores as without the others; the command ends in time, without a traceback, with
exit code 3, and leaves no process and no temporary file; its memory stays below a limit; nothing contacts the server,
and (with strace) opens the file, that the hostile files refer to.

ffmpeg's verdict is that of `ffmpeg -xerror -err_detect explode`: exit code, messages, frames. Only this script needs
ffmpeg: `pip install imageio-ffmpeg`. Exit code 1 if a check fails.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import av
import psutil
from av import library_versions
from compare_pixels import compare_pictures, pixel_table
from corpus import RATED, SAMPLES, SHORT, Case, damaged, ffmpeg_binary, hostile, sound
from kill_and_resume import kill_table
from rating_runs import Run, process_tree, watched_run

from lmm_qa.files.tables import read_rows
from lmm_qa.manifest import VIDEO_SUFFIXES
from lmm_qa.video.decode import Note

TOLERANCE = 1e-4
"""Allowed difference of scores: sums of floating-point numbers depend on their order."""
GROUPS = ("sound", "damaged", "hostile")


@dataclass(frozen=True)
class Verdict:
    """What ffmpeg says about a file."""

    frames: int
    """Frames that it shows."""
    size: str
    """Width x height of the first one, turned and cropped for display."""
    error: str
    """The first message, or the exit code; empty if there is none. ffmpeg was told to stop at the first error."""


@dataclass(frozen=True)
class Result:
    """What this package and ffmpeg say about a file."""

    path: str
    group: str
    kind: str
    outcome: str
    """`RATED`, `SHORT` or the class of the error."""
    says: str
    """The message of the error; or size and number of frames, with warnings."""
    ffmpeg: Verdict | None
    """None for what is not a regular file."""
    disagreement: str = ""
    """How both differ; empty if they agree."""


@dataclass
class Report:
    """Results of a run."""

    files: int
    seconds: float
    peak_alone: int
    """Bytes: resident memory of all processes, for the good clips alone."""
    peak: int
    """The same for all files."""
    versions: dict[str, str]
    results: list[Result]
    failures: list[str] = field(default_factory=list)
    """Checks that failed."""

    @property
    def table(self) -> dict[str, dict[str, int]]:
        """For each group and kind, the number of files with each outcome."""
        table: dict[str, Counter[str]] = defaultdict(Counter)
        for result in self.results:
            table[f"{result.group}/{result.kind}"][result.outcome] += 1
        return {kind: dict(outcomes.most_common()) for kind, outcomes in table.items()}


# ffmpeg


def ask_ffmpeg(path: Path, *, strict: bool = True) -> Verdict | None:
    """Decode the video stream that ffmpeg chooses; None for what is not a regular file."""
    if not path.is_file():
        return None
    demuxer = ("-err_detect", "explode") if strict else ()
    inputs = (*demuxer, "-protocol_whitelist", "file,crypto,data", "-i", f"file:{path}")
    outputs = ("-an", "-sn", "-dn", "-fps_mode", "passthrough", "-f", "framecrc", "-")
    command = [ffmpeg_binary(), "-v", "error", "-nostdin", *(["-xerror"] if strict else []), *inputs, *outputs]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
    except subprocess.TimeoutExpired:
        return Verdict(0, "", "no end after 60 s")
    lines = done.stdout.splitlines()
    size, aspect = (
        next((line.split()[-1] for line in lines if line.startswith(f"#{key} ")), "") for key in ("dimensions", "sar")
    )
    if aspect not in ("", "0/1", "1/1"):
        size += f" in pixels of {aspect.replace('/', ':')}"
    messages = [re.sub(r"^\[[^]]*\] ", "", line) for line in done.stderr.splitlines()]
    error = next(iter(messages), f"exit code {done.returncode}" if done.returncode else "")
    return Verdict(sum(not line.startswith("#") for line in lines), size, error.replace(str(path), path.name))


def compare(case: Case, outcome: str, row: dict[str, Any], strict: Verdict | None, lenient: Verdict | None) -> str:
    """How a row differs from what ffmpeg says; empty if it does not."""
    if strict is None or lenient is None:
        return ""
    broken = strict.error or strict.frames < case.frames
    if outcome not in (RATED, SHORT):
        return "" if broken or case.group == "hostile" else "refused, and ffmpeg finds nothing wrong"
    video = row["video"]
    if case.group == "damaged":
        if strict.error or strict.frames != video["frames"]:
            return f"rated, and ffmpeg: {strict.error or f'{strict.frames} frames'}"
        return ""
    if case.group == "sound" and video["frames"] != lenient.frames:
        return f"{video['frames']} frames, and ffmpeg shows {lenient.frames}"
    size = f"{video['width']}x{video['height']}"
    if "in pixels of" in lenient.size or Note.RESIZED in (row.get("warnings") or ()):
        return ""  # ffmpeg tells the stored size, and of changing sizes the first one
    sides = zip((video["width"], video["height"]), map(int, lenient.size.split("x")), strict=True)
    # ffmpeg crops to whole chroma samples.
    return "" if all(abs(here - there) <= 1 for here, there in sides) else f"{size}, and ffmpeg shows {lenient.size}"


# The run


@contextmanager
def watched_server() -> Iterator[tuple[str, list[str]]]:
    """Listen on a local port; yields its address and the list of connections so far."""
    connections: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            with suppress(OSError):
                while True:
                    connection, address = server.accept()
                    connections.append("{}:{}".format(*address))
                    connection.close()

        threading.Thread(target=accept, daemon=True).start()
        yield "{}:{}".format(*server.getsockname()), connections
        server.shutdown(socket.SHUT_RDWR)


def build(cases: Sequence[Case], folder: Path) -> None:
    """Make the files. Those that ffmpeg makes are made two at a time."""

    def make(case: Case) -> None:
        path = folder / case.path
        path.parent.mkdir(parents=True, exist_ok=True)
        case.make(path)

    # Sockets are bound relative to the current folder, which is the same in all threads.
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(make, (case for case in cases if case.kind != "no_file")))
    for case in cases:
        if case.kind == "no_file":
            make(case)


def rate(
    inputs: Sequence[Path], output: Path, timeout: float, limit: float, seen: set[psutil.Process], *before: str
) -> Run:
    """Rate inputs; `seen` receives all processes of the run."""
    temporary = output.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    start = [*before, sys.executable, "-m", "lmm_qa", "rate"]
    options: list[str | Path] = ["-o", output, "--overwrite", "--timeout", str(timeout), "--device", "cpu"]

    def observe(root: psutil.Process) -> None:
        seen.update(process_tree(root))

    # torch makes a folder for its compiler's cache in any case, once per user.
    variables = {"TMPDIR": str(temporary), "TORCHINDUCTOR_CACHE_DIR": str(output.with_suffix(".torch"))}
    return watched_run([*start, *inputs, *options], limit, observe, variables)


def run(work: Path, every: int, seed: int, timeout: float, limit: float, memory: int) -> Report:
    """Make the files, rate the good clips alone and all files, ask ffmpeg, check everything."""
    shutil.rmtree(work, ignore_errors=True)
    folder, canary = work / "files", work / "canary" / "canary.mp4"
    (folder / "good").mkdir(parents=True)
    canary.parent.mkdir()
    shutil.copyfile(SAMPLES / "avatar_clean.mp4", canary)
    good = [folder / "good" / sample.name for sample in sorted(SAMPLES.glob("*.mp4"))[::3]]
    for path in good:
        shutil.copyfile(SAMPLES / path.name, path)
    with watched_server() as (server, connections):
        cases = [
            *sound.cases(work / "sources" / "sound"),
            *damaged.cases(work / "sources" / "damaged", seed),
            *hostile.cases(work / "sources" / "hostile", canary, server),
        ][::every]
        build(cases, folder)
        # A folder is searched for the usual suffixes; files with others are given by name.
        by_name = [folder / case.path for case in cases if Path(case.path).suffix.lower() not in VIDEO_SUFFIXES]
        seen: set[psutil.Process] = set()
        alone = rate(good, work / "alone.jsonl", timeout, limit, seen)
        together = rate([folder, *by_name], work / "together.jsonl", timeout, limit, seen)
        failures = list(traces(work, seen, connections))
        if shutil.which("strace"):
            failures += trace_system_calls(folder, by_name, canary, work, timeout, limit)
    paths = [folder / case.path for case in cases]
    with ThreadPoolExecutor(2) as threads:
        strict = list(threads.map(ask_ffmpeg, paths))
        lenient = list(threads.map(partial(ask_ffmpeg, strict=False), paths))
    ratings = (work / "together.jsonl", work / "alone.jsonl")
    verdicts = list(zip(strict, lenient, strict=True))
    return check(cases, verdicts, folder, good, together, alone, *ratings, memory, failures)


def traces(work: Path, seen: set[psutil.Process], connections: Sequence[str]) -> Iterator[str]:
    """What the runs left behind or contacted."""
    _, left = psutil.wait_procs(seen, timeout=10)
    yield from (f"still running: {process}" for process in left)
    for temporary in work.glob("*.tmp"):
        yield from (f"left behind: {path.relative_to(work)}" for path in temporary.rglob("*"))
    yield from (f"connection from {address}" for address in connections)


def trace_system_calls(
    folder: Path, by_name: Sequence[Path], canary: Path, work: Path, timeout: float, limit: float
) -> Iterator[str]:
    """Rate the files that refer to others once more, and look for sockets and for the file that they refer to."""
    log = work / "system_calls.txt"
    kinds = [path for kind in ("reference", "named") if (path := folder / "hostile" / kind).is_dir()]
    inputs = [*kinds, *(path for path in by_name if path.parent in kinds)]
    if not inputs:
        return
    strace = ("strace", "-f", "-qq", "--seccomp-bpf", "-e", "trace=connect,openat,open", "-o", str(log))
    done = rate(inputs, work / "traced.jsonl", timeout, limit, set(), *strace)
    if done.code not in (0, 3):
        yield f"traced run: exit code {done.code}: {done.stderr[-1000:]}"
    for line in log.read_text(errors="replace").splitlines():
        if canary.parent.name + "/" + canary.name in line or ("connect(" in line and "AF_INET" in line):
            yield f"system call: {line[:300].replace(f'{work}/', '')}"


def check(
    cases: Sequence[Case],
    verdicts: Sequence[tuple[Verdict | None, Verdict | None]],
    folder: Path,
    good: Sequence[Path],
    together: Run,
    alone: Run,
    ratings: Path,
    ratings_alone: Path,
    memory: int,
    failures: Sequence[str] = (),
) -> Report:
    """Compare the rows with what is expected, and with ffmpeg.

    Args:
        cases: the files in `folder`.
        verdicts: of ffmpeg on each, when it stops at the first error and when it continues.
        good: the clips among them whose scores are compared.
        together, alone: the run on all files and that on the good clips, with the file of ratings of each.
        memory: limit, bytes.
        failures: checks that failed before.
    """
    failures = list(failures)
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in read_rows(ratings):
        rows[row["clip"].removeprefix(printable(f"{folder}/"))].append(row)
    if together.code != 3:
        failures.append(f"exit code {together.code} after {together.seconds:.0f} s: {together.stderr[-2000:]}")
    if "Traceback" in together.stderr:
        failures.append(together.stderr[-2000:])
    if together.peak > memory:
        failures.append(f"memory: {together.peak / 2**30:.2f} GiB, the limit is {memory / 2**30:.2f} GiB")
    results = []
    for case, (strict, lenient) in zip(cases, verdicts, strict=True):
        matching = rows.pop(printable(case.path), [])
        if len(matching) != 1:
            failures.append(f"{case.path}: {len(matching)} rows, expected 1")
            continue
        row = matching[0]
        frames = lenient.frames if case.group == "sound" and lenient else case.frames
        outcome = outcome_of(row, frames)
        says = describe(row).replace(printable(f"{folder}/"), "")
        disagreement = compare(case, outcome, row, strict, lenient)
        shown = strict and replace(strict, error=strict.error.replace(f"{folder.parent}/", ""))
        results.append(Result(printable(case.path), case.group, case.kind, outcome, says, shown, disagreement))
        if outcome not in case.outcomes:
            failures.append(f"{case.path}: {outcome}, expected {' or '.join(sorted(case.outcomes))}: {says}")
        elif case.group == "sound" and disagreement:
            failures.append(f"{case.path}: {disagreement}")
        elif row["error"] and Path(printable(case.path)).name not in row["error"]["message"]:
            failures.append(f"{case.path}: the message does not name the file: {says}")
    expected = {row["content_id"]: row["score"] for row in read_rows(ratings_alone)}
    for path in good:
        matching = rows.pop(path.relative_to(folder).as_posix(), [])
        if len(matching) != 1 or abs((matching[0]["score"] or 0) - expected[matching[0]["content_id"]]) > TOLERANCE:
            says = "; ".join(map(describe, matching)) or "no row"
            failures.append(f"{path.name}: the score differs from that without the other files: {says}")
    failures += [f"{name}: a row for no file" for name in rows]
    return Report(len(cases), together.seconds, alone.peak, together.peak, versions(), results, failures)


def outcome_of(row: dict[str, Any], frames: int = 0) -> str:
    if row["error"]:
        return str(row["error"]["class"])
    return RATED if row["video"]["frames"] >= frames else SHORT


def describe(row: dict[str, Any]) -> str:
    if row["error"]:
        return str(row["error"]["message"])
    video = row["video"]
    warnings = "".join(f"; {warning}" for warning in row.get("warnings") or ())
    return f"{video['width']}x{video['height']}, {video['frames']} frames, {video['duration']:g} s{warnings}"


def printable(name: str) -> str:
    """The name in rows of a file whose name is not valid UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def versions() -> dict[str, str]:
    first = subprocess.run([ffmpeg_binary(), "-version"], capture_output=True, text=True).stdout.split()
    libavcodec = ".".join(map(str, library_versions["libavcodec"]))
    return {
        "lmm_qa": importlib.metadata.version("lmm_qa"),
        "Python": platform.python_version(),
        "PyAV": f"{av.__version__} (libavcodec {libavcodec})",
        "ffmpeg": first[2],
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


# The page


def page(report: Report, pixels: str, kills: str) -> str:
    """The report as a page of the documentation, in Markdown."""
    return "".join(
        f"{part.strip()}\n\n"
        for part in (
            INTRODUCTION.format(versions=", ".join(f"{name} {version}" for name, version in report.versions.items())),
            summary(report),
            "## Checks\n\n" + checks(report),
            "## Memory\n\n" + memory_figures(report),
            f"## Pixels\n\n{pixels}" if pixels else "",
            f"## Killed runs\n\n{kills}" if kills else "",
            "## Where the results differ from ffmpeg's\n\n" + disagreements(report),
            *(f"## Every {group} file\n\n" + every_file(report, group) for group in ("sound", "hostile")),
        )
        if part.strip()
    )


INTRODUCTION = """
# Robustness

Generated by `python scripts/robustness.py --work runs/robustness --docs docs/robustness.md`; do not edit.
{versions}.

All files are generated by `scripts/corpus` from a sample clip and are rated in one run of `lmm-qa rate`, with good
clips among them. *Sound* files are what players show completely. *Damaged* files are cut off, overwritten or contradict
themselves; bytes that decode to wrong pixels cannot be noticed. *Hostile* files refer to other files and servers,
declare enormous sizes, or are no video. ffmpeg's verdict is that of `ffmpeg -xerror -err_detect explode`, which stops
at the first error; it also stops at some that no viewer notices, such as the start of a recording within a group of
pictures.
"""


def summary(report: Report) -> str:
    lines = ["| group | kind | files | rated | refused | ffmpeg agrees |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    for group in GROUPS:
        results = [result for result in report.results if result.group == group]
        for kind in (None, *dict.fromkeys(result.kind for result in results)):
            chosen = [result for result in results if kind in (None, result.kind)]
            rated = sum(result.outcome in (RATED, SHORT) for result in chosen)
            compared = [result for result in chosen if result.ffmpeg]
            agreed = sum(not result.disagreement for result in compared)
            counts = (len(chosen), rated, len(chosen) - rated, f"{agreed} of {len(compared)}")
            cells = (f"**{group}**" if kind is None else "", kind or "all", *counts)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def memory_figures(report: Report) -> str:
    return (
        "Peak of the resident memory of all processes, with shared pages counted for each process: "
        f"{report.peak / 2**30:.2f} GiB; for the good clips alone {report.peak_alone / 2**30:.2f} GiB. "
        f"{report.files} files took {report.seconds:.0f} s."
    )


def checks(report: Report) -> str:
    if not report.failures:
        return (
            "All passed: each file has one row, the good clips have the same scores as without the others, no process "
            "and no temporary file was left, nothing contacted the server or opened the file that hostile files name."
        )
    lines = (f"- {escaped(failure[:300])}" for failure in report.failures)
    return f"{len(report.failures)} failed:\n\n" + "\n".join(lines)


def disagreements(report: Report) -> str:
    lines = ["| file | here | ffmpeg |", "| --- | --- | --- |"]
    for result in report.results:
        if result.disagreement and result.ffmpeg:
            lines.append(f"| {escaped(result.path)} | {escaped(result.says)} | {verdict(result.ffmpeg)} |")
    return "\n".join(lines) if len(lines) > 2 else "Nowhere."


def every_file(report: Report, group: str) -> str:
    lines = ["| file | here | ffmpeg |", "| --- | --- | --- |"]
    for result in report.results:
        if result.group == group:
            name = escaped(result.path.partition("/")[2])
            says = result.says if result.outcome in (RATED, SHORT) else f"{result.outcome}: {result.says}"
            lines.append(f"| {name} | {escaped(says)} | {verdict(result.ffmpeg)} |")
    return "\n".join(lines)


def kills_section(report: Path) -> str:
    """The kills in a report of scripts/kill_and_resume.py."""
    kills = json.loads(report.read_text())["kills"]
    unharmed = sum(kill["problem"] is None for kill in kills)
    return (
        f"{unharmed} of {len(kills)} kills without loss, and without a process or a temporary file left "
        f"(`scripts/kill_and_resume.py`).\n\n{kill_table(kills)}"
    )


def verdict(said: Verdict | None) -> str:
    if said is None:
        return ""
    shown = f"{said.size}, {said.frames} frames" if said.frames else "0 frames"
    return f"{shown}; {escaped(said.error[:100])}" if said.error else shown


def escaped(text: str) -> str:
    """Text that may have any characters, for a cell of a Markdown table."""
    visible = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
    return re.sub(r"([\\`*_{}\[\]<>#|~$&])", r"\\\1", visible)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the files; its content is deleted")
    parser.add_argument("--every", type=int, default=1, help="use only every Nth file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=60.0, help="time limit for decoding one clip, seconds")
    parser.add_argument("--limit", type=float, default=3600.0, help="time limit for each run, seconds")
    parser.add_argument(
        "--memory",
        type=float,
        default=5.0,
        help="limit for all processes together, GiB: 2 for the model, and 3 that a worker may use",
    )
    parser.add_argument("--kills", type=Path, help="report of scripts/kill_and_resume.py, for the page")
    parser.add_argument("-o", "--output", type=Path, help="the report, as JSON")
    parser.add_argument("--docs", type=Path, help="the report, as a page of the documentation")
    args = parser.parse_args()
    report = run(args.work.absolute(), args.every, args.seed, args.timeout, args.limit, int(args.memory * 2**30))
    for kind, outcomes in report.table.items():
        print(f"{kind:<20} {sum(outcomes.values()):>4}  " + ", ".join(f"{n} {name}" for name, n in outcomes.items()))
    print(
        f"{report.files} files and the good clips in {report.seconds:.0f} s; peak memory "
        f"{report.peak / 2**30:.2f} GiB, good clips alone {report.peak_alone / 2**30:.2f} GiB; "
        f"{sum(bool(result.disagreement) for result in report.results)} results differ from ffmpeg's"
    )
    for failure in report.failures:
        print(f"FAILED  {failure}")
    if args.output:
        args.output.write_text(json.dumps(asdict(report) | {"table": report.table}, indent=1))
    if args.docs:
        sound_clips = (result.path.partition("/")[2] for result in report.results if result.group == "sound")
        pixels = pixel_table(compare_pictures(args.work / "files" / "sound", sound_clips))
        args.docs.write_text(page(report, pixels, kills_section(args.kills) if args.kills else ""))
    sys.exit(bool(report.failures))


if __name__ == "__main__":
    main()
