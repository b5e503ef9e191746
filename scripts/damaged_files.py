"""Rate several hundred damaged files with good clips among them, and check the results.

    python scripts/damaged_files.py --work runs/damaged [--every 10] [-o runs/damaged/report.json]

All files are made from one sample clip of the package, reproducibly for a seed. Checks: the command ends in time,
without a traceback, with exit code 3; one row per file; every file that must fail does, with an error of the right
class; clips are rated with all their frames; the good clips have the same scores as without the others; memory stays
below a limit.
Prints a table; exit code 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import socket
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from rating_runs import Run, box, watched_run

import lmm_qa
from lmm_qa.tables import read_rows

SAMPLES = Path(lmm_qa.__file__).parent / "samples"
FRAMES = 36
"""Frames of the clips before they are damaged."""
TOLERANCE = 1e-4
"""Allowed difference of scores: sums of floating-point numbers depend on their order."""

RATED, SHORT = "rated", "rated, with fewer frames"
UNREADABLE = frozenset({"ClipUnreadable"})
BROKEN = frozenset({"ClipTruncated", "ClipUnreadable"})
BROKEN_OR_RATED = BROKEN | {RATED}
"""If changed bytes inside a picture can still decode, or a changed field can be irrelevant."""
ANY = BROKEN_OR_RATED | {SHORT}
"""If the changed file can declare that it has, or shows, fewer frames."""


@dataclass(frozen=True)
class Case:
    """One file to rate."""

    name: str
    """Path in the folder; its first part is the kind of damage."""
    make: Callable[[Path], object]
    outcomes: frozenset[str] = BROKEN
    """Allowed results: classes of errors, `RATED`, `SHORT`."""
    frames: int = FRAMES
    """Frames of the undamaged file."""

    @property
    def kind(self) -> str:
        return self.name.partition("/")[0]


# Undamaged files


def pictures(count: int, width: int, height: int) -> list[np.ndarray]:
    """The first frames of a sample clip in any size, (height, width, 3)."""
    with av.open(str(SAMPLES / "astronaut_clean.mp4")) as container:
        decoded = container.decode(video=0)
        return [next(decoded).to_ndarray(format="rgb24", width=width, height=height) for _ in range(count)]


def write(path: Path, frames: Sequence[np.ndarray], codec: str, pixel_format: str, **muxer: str) -> None:
    with av.open(str(path), "w", options=muxer) as container:
        options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
        stream = container.add_stream(codec, rate=Fraction(25), options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixel_format
        stream.codec_context.gop_size = 12
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_sound(path: Path, codec: str = "aac") -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16000)
        kind = "fltp" if codec == "aac" else "s16"
        tone = av.AudioFrame.from_ndarray(
            np.zeros((1, 16000), np.float32 if codec == "aac" else np.int16), kind, "mono"
        )
        tone.sample_rate, tone.pts = 16000, 0
        container.mux(stream.encode(tone))
        container.mux(stream.encode())


CONTAINERS: dict[str, tuple[str, str, dict[str, str]]] = {
    "h264.mp4": ("libx264", "yuv420p", {}),
    "faststart.mp4": ("libx264", "yuv420p", {"movflags": "faststart"}),
    "fragmented.mp4": ("libx264", "yuv420p", {"movflags": "frag_keyframe+empty_moov"}),
    "h264.mov": ("libx264", "yuv420p", {}),
    "h264.mkv": ("libx264", "yuv420p", {}),
    "h264.ts": ("libx264", "yuv420p", {}),
    "hevc.mp4": ("libx265", "yuv420p", {}),
    "vp9.webm": ("libvpx-vp9", "yuv420p", {}),
    "mpeg4.avi": ("mpeg4", "yuv420p", {}),
    "animation.gif": ("gif", "rgb8", {}),
}


def write_sources(folder: Path) -> dict[str, bytes]:
    """Write the same pictures in each container; return the bytes of the files by name."""
    folder.mkdir(parents=True, exist_ok=True)
    frames = pictures(FRAMES, 256, 256)
    for name, (codec, pixel_format, muxer) in CONTAINERS.items():
        write(folder / name, frames, codec, pixel_format, **muxer)
    return {name: (folder / name).read_bytes() for name in CONTAINERS}


# Damage


def cases(sources: dict[str, bytes], seed: int) -> Iterator[Case]:
    """All files, grouped by kind."""
    rng = random.Random(seed)
    yield from cut_short(sources)
    yield from flipped_bits(sources, rng)
    yield from overwritten(sources, rng)
    yield from broken_headers(sources)
    yield from not_videos(rng)
    yield from wrong_fields(sources)
    yield from unusual(sources)
    yield from unusual_names(sources)
    yield from special_files(sources)


def cut_short(sources: dict[str, bytes]) -> Iterator[Case]:
    for name, raw in sources.items():
        for part in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98):
            yield stored(f"cut/{part:.2f}_{name}", raw[: int(len(raw) * part)])
        # Half of the last unit of the file, whatever that is, and its last byte.
        yield stored(f"cut/half_packet_{name}", raw[: -len(raw) // 200 or -1])
        yield stored(f"cut/last_byte_{name}", raw[:-1])


def flipped_bits(sources: dict[str, bytes], rng: random.Random) -> Iterator[Case]:
    """Flip single and several bits at the start, in the index of an MP4, in the pictures and at the end.

    The start and the index contain times and edit lists, which can hide frames; a GIF does not declare its frames.
    """
    for name, raw in sources.items():
        index = raw.find(b"moov")
        places = {"start": (0, 512), "pictures": (len(raw) // 3, len(raw) // 2), "end": (len(raw) - 512, len(raw))}
        if index > 0:
            places["index"] = (index, min(index + 1200, len(raw)))
        for place, (begin, end) in places.items():
            for bits in (1, 4, 64):
                changed = bytearray(raw)
                for _ in range(bits):
                    changed[rng.randrange(begin, end)] ^= 1 << rng.randrange(8)
                hides_frames = place in ("start", "index") or name.endswith(".gif")
                yield stored(f"flipped/{place}_{bits}_{name}", bytes(changed), ANY if hides_frames else BROKEN_OR_RATED)


def overwritten(sources: dict[str, bytes], rng: random.Random) -> Iterator[Case]:
    """Overwrite or remove a twelfth of the picture data; some codecs decode anything (see docs/decoding.md)."""
    undetected = {"vp9.webm": BROKEN_OR_RATED, "hevc.mp4": BROKEN_OR_RATED, "animation.gif": ANY}
    for name, raw in sources.items():
        outcomes = undetected.get(name, BROKEN)
        pictured = max(raw.find(b"mdat"), raw.find(b"movi"), 0)
        for place in (0.1, 0.5, 0.8):
            start = pictured + int((len(raw) - pictured) * place)
            length = (len(raw) - pictured) // 12
            for filling, data in (("zeros", bytes(length)), ("noise", rng.randbytes(length))):
                changed = raw[:start] + data + raw[start + length :]
                yield stored(f"overwritten/{filling}_{place}_{name}", changed, outcomes)
            yield stored(f"overwritten/left_out_{place}_{name}", raw[:start] + raw[start + length :], outcomes)


def broken_headers(sources: dict[str, bytes]) -> Iterator[Case]:
    for name, raw in sources.items():
        outcomes = BROKEN_OR_RATED if name.endswith(".ts") else BROKEN  # MPEG-TS repeats its header
        yield stored(f"header/zeros_{name}", bytes(64) + raw[64:], outcomes)
        yield stored(f"header/none_{name}", raw[64:], outcomes)
        other = sources["h264.mkv" if name != "h264.mkv" else "mpeg4.avi"]
        yield stored(f"header/other_{name}", other[:64] + raw[64:], outcomes)


def not_videos(rng: random.Random) -> Iterator[Case]:
    for suffix in ("mp4", "mkv", "gif"):
        for size in (0, 1, 8, 4096, 1 << 20):
            yield stored(f"no_video/{size}_zeros.{suffix}", bytes(size), UNREADABLE)
        yield stored(f"no_video/noise.{suffix}", rng.randbytes(1 << 20), UNREADABLE)
    texts = {
        "text": "This is not a video.\n" * 100,
        "page": "<!DOCTYPE html><html><body><h1>404 Not Found</h1></body></html>",
        "json": json.dumps({"error": "access absent"}),
        "pointer": "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n../good/0.mp4\n#EXT-X-ENDLIST\n",
        "concat": "ffconcat version 1.0\nfile ../good/0.mp4\n",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
        "a=rtpmap:96 H264/90000\n",
        "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'mediaPresentationDuration="PT4S"><Period><AdaptationSet mimeType="video/mp4"><Representation id="1" '
        'bandwidth="1"><BaseURL>../good/0.mp4</BaseURL></Representation></AdaptationSet></Period></MPD>',
        "subtitles": "1\n00:00:00,000 --> 00:00:04,000\nHello\n",
        "far_away": "http://127.0.0.1:1/clip.mp4\n",
    }
    for name, text in texts.items():
        yield stored(f"no_video/{name}.mp4", text.encode(), UNREADABLE)
    for name, magic in {"zip": b"PK\3\4", "pdf": b"%PDF-1.7\n", "elf": b"\x7fELF", "gzip": b"\x1f\x8b\x08"}.items():
        yield stored(f"no_video/{name}.mp4", magic + rng.randbytes(5000), UNREADABLE)
    yield Case("no_video/sound.mp4", write_sound, UNREADABLE)
    yield Case("no_video/sound.mkv", write_sound, UNREADABLE)
    yield Case("no_video/wave.avi", lambda path: write_sound(path, "pcm_s16le"), UNREADABLE)
    yield Case("no_video/sparse.mp4", lambda path: sparse(path, 1 << 31), UNREADABLE)


def wrong_fields(sources: dict[str, bytes]) -> Iterator[Case]:
    """Write an impossible size, count, time or dimension over one field (ISO/IEC 14496-12; AVI; GIF89a)."""
    most, large = b"\xff" * 4, b"\x7f\xff\xff\xff"
    # {box: {offset of the field after the box's name: values}}; -4 is the length of the box.
    fields: dict[str, dict[int, tuple[bytes, ...]]] = {
        "moov": {-4: (most, large, b"\0\0\0\x09")},
        "mdat": {-4: (most, large, b"\0\0\0\x10")},
        "trak": {-4: (most, bytes(4))},
        "stbl": {-4: (most, bytes(4))},
        "mvhd": {12: (bytes(4), most), 16: (most, bytes(4))},
        "tkhd": {20: (most, bytes(4)), 76: (most,)},
        "mdhd": {12: (bytes(4), b"\0\0\0\1", most), 16: (most, bytes(4))},
        "stsz": {4: (large, b"\0\0\0\1"), 8: (most, b"\0\0\x10\0", b"\0\0\0\1", bytes(4)), 12: (most, bytes(4))},
        "stts": {4: (most, bytes(4)), 8: (most, b"\0\0\0\1"), 12: (most, large, bytes(4))},
        "stsc": {4: (most, bytes(4)), 12: (most, bytes(4))},
        "stco": {4: (most, bytes(4)), 8: (most, bytes(4))},
        "avc1": {24: (most, bytes(4), b"\x40\0\x40\0"), -4: (most,)},
        "avcC": {0: (most,), 4: (b"\xff",), -4: (most, b"\0\0\0\x08")},
    }
    raw = sources["faststart.mp4"]
    for name, places in fields.items():
        for offset, values in places.items():
            for value in values:
                changed = patched(raw, name.encode(), offset, value)
                hides_frames = (name, offset) in (("mdhd", 12), ("stts", 12))  # times, to which an edit list refers
                outcomes = ANY if hides_frames else BROKEN_OR_RATED
                yield stored(f"field/{name}{offset:+d}_{value.hex()}.mp4", changed, outcomes)
    for name in (
        "moov",
        "trak",
        "mdia",
        "minf",
        "stbl",
        "stsd",
        "avc1",
        "avcC",
        "stts",
        "stsz",
        "stco",
        "stsc",
        "vide",
    ):
        yield stored(f"field/{name}_renamed.mp4", patched(raw, name.encode(), 0, b"zzzz", whole=True), BROKEN_OR_RATED)
    gif, avi = sources["animation.gif"], sources["mpeg4.avi"]
    yield stored("field/screen.gif", gif[:6] + b"\xff\xff\xff\xff" + gif[10:], BROKEN_OR_RATED)
    yield stored("field/picture.gif", patched(gif, b"\x2c\0\0\0\0", 0, most), BROKEN_OR_RATED)
    for offset in (8, 24, 40):
        yield stored(
            f"field/main_header{offset}.avi", patched(avi, b"avih", offset, b"\xff\xff\xff\x7f"), BROKEN_OR_RATED
        )
    for offset in (24, 28, 36):
        for value in (bytes(4), b"\xff\xff\xff\x7f"):
            yield stored(
                f"field/stream_header{offset}_{value.hex()}.avi", patched(avi, b"strh", offset, value), BROKEN_OR_RATED
            )
    duration = sources["h264.mkv"].find(b"\x44\x89\x88")
    for value in (b"\x7f\xef" + b"\xff" * 6, b"\x7f\xf8" + bytes(6), b"\xff\xf0" + bytes(6)):
        changed = patched(sources["h264.mkv"], b"\x44\x89\x88", 0, value)
        yield stored(f"field/duration_{value[:2].hex()}.mkv", changed if duration > 0 else b"", BROKEN_OR_RATED)


def unusual(sources: dict[str, bytes]) -> Iterator[Case]:
    """Valid files, or nearly so."""
    rated = frozenset({RATED})
    for frames in (1, 2, 3):
        yield encoded(f"unusual/{frames}_frames.mp4", frames, 64, 64)
        yield encoded(f"unusual/{frames}_frames.gif", frames, 64, 64, "gif", "rgb8")
    for width, height in ((2, 2), (17, 13), (177, 133), (1, 301), (15, 2000), (3000, 16), (4096, 2304)):
        yield encoded(f"unusual/{width}x{height}.mp4", 6, width, height, pixel_format="yuv444p")
    yield encoded("unusual/large.mkv", 2, 9000, 9000, "ffv1")
    yield Case(
        "unusual/too_large.avi", lambda path: write(path, pictures(2, 16400, 32), "mjpeg", "yuvj420p"), UNREADABLE
    )
    raw = sources["h264.mp4"]
    yield stored("unusual/padded.mp4", raw + bytes(100_000), rated)
    yield stored("unusual/junk_behind.mp4", raw + b"\xa5junk" * 10_000, BROKEN_OR_RATED)
    yield stored("unusual/twice.mp4", raw + raw, BROKEN_OR_RATED)
    for suffix in ("mkv", "avi", "gif", "ts", "webm", "mov"):
        yield stored(f"unusual/in_truth_mp4.{suffix}", raw, rated)


def unusual_names(sources: dict[str, bytes]) -> Iterator[Case]:
    names = [
        *("说话的头 视频", "متحدث", "говорящая голова", "話す頭", "หัวพูด", "דובר", "cafe\u0301", "👩🏽\u200d🚀"),
        *("two  spaces ", "new\nline", "tab\tback\\slash", "quote'\"`", "$(touch x);&|", "-rf", "--help", "a%03d"),
        *("[glob]*?", "file:clip", "http:__x", "concat:a|b", "pipe:0", "\u202emp4.exe", "\x1b[31mred", "a" * 250),
    ]
    for number, name in enumerate(names):
        data = sources["h264.mp4"] + box(bytes([number]))
        yield stored(f"named/{name}.mp4", data, frozenset({RATED}))
    yield stored(os.fsdecode(b"named/\xff\xfe\x80.mp4"), sources["h264.mp4"] + box(b"!"), frozenset({RATED}))


def special_files(sources: dict[str, bytes]) -> Iterator[Case]:
    """Links, pipes, devices and folders, in place of files."""
    missing = frozenset({"ClipNotFound"})
    yield Case("no_file/loop.mp4", lambda path: path.symlink_to(path.name), UNREADABLE)
    yield Case("no_file/there.mp4", lambda path: path.symlink_to("back.mp4"), UNREADABLE)
    yield Case("no_file/back.mp4", lambda path: path.symlink_to("there.mp4"), UNREADABLE)
    yield Case("no_file/dangling.mp4", lambda path: path.symlink_to("gone.mp4"), missing)
    yield Case("no_file/pipe.mp4", os.mkfifo, UNREADABLE)
    yield Case("no_file/socket.mp4", listen, UNREADABLE)
    for device in ("zero", "full", "tty"):
        yield Case(f"no_file/{device}.mp4", partial(Path.symlink_to, target=f"/dev/{device}"), UNREADABLE)
    yield Case("no_file/memory.mp4", lambda path: path.symlink_to("/proc/self/mem"), UNREADABLE)
    whole = sources["h264.mp4"]
    yield Case("no_file/folder.mp4/inside.mp4", lambda path: path.write_bytes(whole + box(b"in")), frozenset({RATED}))

    def in_looping_folder(path: Path) -> None:
        path.write_bytes(whole + box(b"out"))
        (path.parent / "again").symlink_to("..")

    def forbidden(path: Path) -> None:
        path.write_bytes(whole + box(b"no"))
        path.chmod(0)

    yield Case("no_file/loop/inside.mp4", in_looping_folder, frozenset({RATED}))
    outcome = frozenset({RATED}) if os.geteuid() == 0 else UNREADABLE  # root may read everything
    yield Case("no_file/forbidden.mp4", forbidden, outcome)


def stored(name: str, data: bytes, outcomes: frozenset[str] = BROKEN) -> Case:
    return Case(name, lambda path: path.write_bytes(data), outcomes)


def encoded(
    name: str, frames: int, width: int, height: int, codec: str = "libx264", pixel_format: str = "yuv420p"
) -> Case:
    """An undamaged clip."""
    return Case(
        name,
        lambda path: write(path, pictures(frames, width, height), codec, pixel_format),
        frozenset({RATED}),
        frames,
    )


def patched(raw: bytes, mark: bytes, offset: int, value: bytes, *, whole: bool = False) -> bytes:
    """Overwrite the bytes at an offset after a mark, or the mark itself if `whole`."""
    at = raw.find(mark)
    if at < 0:
        raise ValueError(f"{mark!r} does not occur")
    at += 0 if whole else len(mark) + offset if offset >= 0 else offset
    return raw[:at] + value + raw[at + len(value) :]


def sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def listen(path: Path) -> None:
    """Make a socket, from inside its folder because socket paths must be short."""
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


# Results


@dataclass
class Report:
    """Results of a run."""

    files: int
    seconds: float
    peak_alone: int
    peak: int
    table: dict[str, dict[str, int]]
    """For each kind of damage, the number of files with each result."""
    failures: list[str] = field(default_factory=list)
    """Checks that failed."""


def rate(inputs: Sequence[Path], output: Path, timeout: float, limit: float) -> Run:
    start: list[str | Path] = [sys.executable, "-m", "lmm_qa", "rate"]
    options = ["--overwrite", "--timeout", str(timeout), "--device", "cpu"]
    return watched_run([*start, *inputs, "-o", output, *options], limit)


def check(
    chosen: Sequence[Case], folder: Path, good: Sequence[Path], alone: Run, together: Run, work: Path, memory: int
) -> Report:
    by_name = {printable(case.name): case for case in chosen}
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in read_rows(work / "together.jsonl"):
        rows[row["clip"]].append(row)
    table: dict[str, Counter[str]] = defaultdict(Counter)
    failures: list[str] = []
    if together.code != 3:
        failures.append(f"exit code {together.code} after {together.seconds:.0f} s: {together.stderr[-2000:]}")
    if "Traceback" in together.stderr:
        failures.append(together.stderr[-2000:])
    for name, case in by_name.items():
        matching = rows.pop(name, [])
        outcome = outcome_of(matching[0], case.frames) if len(matching) == 1 else f"{len(matching)} rows"
        table[case.kind][outcome] += 1
        if outcome not in case.outcomes:
            failures.append(f"{name}: {outcome}, expected {' or '.join(sorted(case.outcomes))}: {describe(matching)}")
        elif matching[0]["error"] and Path(name).name not in matching[0]["error"]["message"]:
            failures.append(f"{name}: the message does not name the file: {describe(matching)}")
    expected = {row["content_id"]: row["score"] for row in read_rows(work / "alone.jsonl")}
    for path in good:
        matching = rows.pop(path.relative_to(folder).as_posix(), [])
        table["good"][outcome_of(matching[0]) if matching else "no row"] += 1
        if len(matching) != 1 or abs((matching[0]["score"] or 0) - expected[matching[0]["content_id"]]) > TOLERANCE:
            failures.append(f"{path.name}: the score differs from that without the damaged files: {describe(matching)}")
    failures += [f"{name}: a row for no file" for name in rows]
    if together.peak > memory:
        failures.append(f"memory: {together.peak / 2**30:.2f} GiB, the limit is {memory / 2**30:.2f} GiB")
    counts = {kind: dict(outcomes.most_common()) for kind, outcomes in table.items()}
    return Report(len(by_name), together.seconds, alone.peak, together.peak, counts, failures)


def outcome_of(row: dict[str, Any], frames: int = 0) -> str:
    if row["error"]:
        return str(row["error"]["class"])
    return RATED if row["video"]["frames"] >= frames else SHORT


def describe(rows: Sequence[dict[str, Any]]) -> str:
    return "; ".join(row["error"]["message"] if row["error"] else f"score {row['score']}" for row in rows) or "no row"


def printable(name: str) -> str:
    """The name in rows of a file whose name is not valid UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def run(work: Path, every: int, seed: int, timeout: float, limit: float, memory: int) -> Report:
    """Make the files, rate the good clips alone and all files, check the rows."""
    folder = work / "files"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "good").mkdir(parents=True)
    good = [folder / "good" / sample.name for sample in sorted(SAMPLES.glob("*.mp4"))[::3]]
    for path in good:
        shutil.copyfile(SAMPLES / path.name, path)
    chosen = list(cases(write_sources(work / "sources"), seed))[::every]
    for case in chosen:
        path = folder / case.name
        path.parent.mkdir(parents=True, exist_ok=True)
        case.make(path)
    alone = rate(good, work / "alone.jsonl", timeout, limit)
    together = rate([folder], work / "together.jsonl", timeout, limit)
    return check(chosen, folder, good, alone, together, work, memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the files; its content is deleted")
    parser.add_argument("--every", type=int, default=1, help="use only every Nth file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=120.0, help="time limit for decoding one clip, seconds")
    parser.add_argument("--limit", type=float, default=1800.0, help="time limit for the run, seconds")
    parser.add_argument("--memory", type=float, default=4.0, help="limit for all processes together, GiB")
    parser.add_argument("-o", "--output", type=Path, help="the report, as JSON")
    args = parser.parse_args()
    report = run(args.work, args.every, args.seed, args.timeout, args.limit, int(args.memory * 2**30))
    for kind, outcomes in report.table.items():
        print(f"{kind:<12} {sum(outcomes.values()):>4}  " + ", ".join(f"{n} {name}" for name, n in outcomes.items()))
    print(
        f"{report.files} damaged files and the good clips in {report.seconds:.0f} s; peak memory "
        f"{report.peak / 2**30:.2f} GiB, good clips alone {report.peak_alone / 2**30:.2f} GiB"
    )
    for failure in report.failures:
        print(f"FAILED  {failure}")
    if args.output:
        args.output.write_text(json.dumps(vars(report), indent=1))
    sys.exit(bool(report.failures))


if __name__ == "__main__":
    main()
