"""A decoder that hangs, crashes or fails costs one clip. Run: python -m pytest tests/video/test_decoder_pool.py"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from clips import FACTOR, BrokenMeasurement, RecordingMeasurement, read_or_die, read_or_hang
from paths import TESTS

from lmm_qa.config import Sampling, View
from lmm_qa.errors import (
    ClipError,
    ClipNotFound,
    ClipTimeout,
    ClipTruncated,
    ClipUnreadable,
    DecoderCrashed,
    InternalError,
    UsageError,
)
from lmm_qa.video.decode import Frames, Windows, read_frames, read_windows
from lmm_qa.video.decoder_pool import DecoderPool

REQUEST = Sampling(frames=2), (View(),), FACTOR


def write_copies(clips_dir: Path, folder: Path, *names: str) -> list[Path]:
    raw = (clips_dir / "h264.mp4").read_bytes()
    for name in names:
        (folder / name).write_bytes(raw)
    return [folder / name for name in names]


def has_ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def process_ids(pool: DecoderPool) -> list[int]:
    return [worker._process.pid for worker in pool._workers if worker._process]


def test_results_are_in_order_with_errors_in_their_places(clips_dir: Path) -> None:
    names = ["one.mp4", "missing.mp4", "h264.mp4", "sound.m4a", "odd.webm", "animation.gif", "uneven.mkv"]
    with DecoderPool(2) as pool:
        results = list(pool.imap([clips_dir / name for name in names], *REQUEST))
        running = process_ids(pool)
    expected = [Frames, ClipNotFound, Frames, ClipUnreadable, Frames, Frames, Frames]
    assert [type(result) for result in results] == expected
    for name, result in zip(names, results, strict=True):
        if isinstance(result, Frames):
            alone = read_frames(clips_dir / name, *REQUEST)
            assert result.info == alone.info and np.array_equal(result.views[0], alone.views[0])
        else:
            assert name in str(result)
    assert len(running) == 2 and all(map(has_ended, running))


def test_workers_that_were_started_early_read_the_clips(clips_dir: Path) -> None:
    with DecoderPool(2) as pool:
        pool.start()
        started = process_ids(pool)
        pool.start()
        results = list(pool.imap([clips_dir / "one.mp4"] * 4, *REQUEST))
        assert len(started) == 2 and process_ids(pool) == started
    assert [type(result) for result in results] == [Frames] * 4
    assert all(map(has_ended, started))


@pytest.mark.parametrize("window", [None, 1.0])
def test_clips_that_were_read_in_advance_are_not_read_again(
    clips_dir: Path, tmp_path: Path, window: float | None
) -> None:
    paths = write_copies(clips_dir, tmp_path, "a.mp4", "b.mp4", "c.mp4")
    how = {"window": window, "step": 0.5} if window else {}
    with DecoderPool(1) as pool:
        pool.prefetch([paths[0], *paths], *REQUEST, **how)
        assert len(pool._prefetched) == 1  # two per worker, and both are the same clip
        pool.prefetch(paths[1:], *REQUEST, **how)
        for future in pool._prefetched.values():
            future.result()
        for path in paths[:2]:
            path.unlink()
        read = pool.imap_windows if window else pool.imap
        results = list(read(paths, *REQUEST, **how))
        assert [type(result) for result in results] == [Windows if window else Frames] * 3
        assert not pool._prefetched
        assert [type(result) for result in read(paths, *REQUEST, **how)][:2] == [ClipNotFound] * 2


def test_clips_that_were_read_for_other_views_are_read_again(clips_dir: Path) -> None:
    sampling, views, factor = REQUEST
    clip = clips_dir / "h264.mp4"
    with DecoderPool(1) as pool:
        pool.prefetch([clip], sampling, views, 2 * factor)
        (frames,) = pool.imap([clip], *REQUEST)
    assert isinstance(frames, Frames)
    assert np.array_equal(frames.views[0], read_frames(clip, *REQUEST).views[0])


def test_a_worker_that_dies_before_its_first_clip_costs_no_clip(clips_dir: Path) -> None:
    with DecoderPool(1) as pool:
        pool.start()
        process = pool._workers[0]._process
        assert process is not None
        process.kill()  # not waited for: it may still seem to run
        assert [type(result) for result in pool.imap([clips_dir / "one.mp4"] * 2, *REQUEST)] == [Frames] * 2


def test_workers_that_cannot_start_are_reported(clips_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    with DecoderPool(1) as pool:
        (result,) = pool.imap([clips_dir / "one.mp4"], *REQUEST)
    assert isinstance(result, DecoderCrashed) and "did not start: exit code 1, " in str(result)


def test_windows_are_read_by_workers_too(clips_dir: Path) -> None:
    names = ["h264.mp4", "missing.mp4", "one.mp4"]
    with DecoderPool(2) as pool:
        results = list(pool.imap_windows([clips_dir / name for name in names], *REQUEST, 0.8, 0.4))
    assert [type(result) for result in results] == [Windows, ClipNotFound, Windows]
    alone = read_windows(clips_dir / "h264.mp4", *REQUEST, 0.8, 0.4)
    assert isinstance(results[0], Windows)
    assert results[0].spans == alone.spans and results[0].positions == alone.positions
    assert np.array_equal(results[0].frames.views[0], alone.frames.views[0])
    assert results[0].frames.dynamics is not None


@pytest.mark.parametrize(("window", "step"), [(0, 1), (2, 0), (-1, 1), (float("nan"), 1)])
def test_window_and_step_must_be_positive(window: float, step: float) -> None:
    with DecoderPool(1) as pool, pytest.raises(UsageError, match="above 0 seconds"):
        pool.imap_windows([], *REQUEST, window, step)


def test_few_clips_are_read_ahead(clips_dir: Path) -> None:
    taken = 0

    def paths() -> Iterator[Path]:
        nonlocal taken
        for _ in range(20):
            taken += 1
            yield clips_dir / "one.mp4"

    with DecoderPool(1) as pool:
        for returned, _ in enumerate(pool.imap(paths(), *REQUEST), start=1):
            assert taken <= returned + 1
    assert taken == 20


def test_a_hanging_clip_costs_only_its_time_limit(clips_dir: Path, tmp_path: Path) -> None:
    paths = write_copies(clips_dir, tmp_path, "a.mp4", "hang.mp4", "b.mp4", "c.mp4")
    with DecoderPool(1, timeout=2, _reader=read_or_hang) as pool:
        results = list(pool.imap(paths, *REQUEST))
        running = process_ids(pool)
    assert [type(result) for result in results] == [Frames, ClipTimeout, Frames, Frames]
    assert "hang.mp4 took longer than 2 s" in str(results[1])
    assert all(map(has_ended, running))


def test_a_crashing_decoder_costs_one_clip(clips_dir: Path, tmp_path: Path) -> None:
    names = ("a.mp4", "abort.mp4", "b.mp4", "killed.mp4", "memory.mp4", "c.mp4")
    with DecoderPool(2, _reader=read_or_die) as pool:
        results = list(pool.imap(write_copies(clips_dir, tmp_path, *names), *REQUEST))
    expected = [Frames, DecoderCrashed, Frames, DecoderCrashed, DecoderCrashed, Frames]
    assert [type(result) for result in results] == expected
    assert [str(results[index]).rpartition(": ")[2] for index in (1, 3)] == ["signal SIGABRT", "signal SIGKILL"]
    assert "memory.mp4 ran out of memory" in str(results[4])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can limit the memory of a process")
def test_a_clip_that_needs_too_much_memory_costs_one_clip(clips_dir: Path, tmp_path: Path) -> None:
    with DecoderPool(1, _reader=read_or_die) as pool:
        results = list(pool.imap(write_copies(clips_dir, tmp_path, "a.mp4", "huge.mp4", "b.mp4"), *REQUEST))
    assert [type(result) for result in results] == [Frames, DecoderCrashed, Frames]
    assert "huge.mp4 ran out of memory" in str(results[1])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell a process that a pipe was closed")
def test_a_worker_ends_while_it_decodes_if_its_parent_is_killed(clips_dir: Path, tmp_path: Path) -> None:
    paths = [str(path) for path in write_copies(clips_dir, tmp_path, "a.mp4", "hang.mp4")]
    with subprocess.Popen([sys.executable, "-c", script_that_hangs(paths)], stdout=subprocess.PIPE) as process:
        assert process.stdout
        worker = int(process.stdout.readline().split()[0])
        time.sleep(0.5)
        process.kill()
    for _ in range(50):
        if has_ended(worker):
            return
        time.sleep(0.1)
    raise AssertionError(f"worker {worker} still runs 5 s after its parent was killed")


def script_that_hangs(paths: list[str]) -> str:
    """A program without a main guard that rates one clip, prints the worker's process number, and hangs in the next."""
    return (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from clips import read_or_hang\n"
        "from lmm_qa.config import Sampling, View\n"
        "from lmm_qa.video.decoder_pool import DecoderPool\n"
        "with DecoderPool(1, _reader=read_or_hang) as pool:\n"
        f"    for result in pool.imap({paths!r}, Sampling(frames=2), [View()], 28):\n"
        "        print(pool._workers[0]._process.pid, type(result).__name__, flush=True)\n"
    )


def test_a_bug_is_reported_as_a_bug_and_costs_one_clip(clips_dir: Path, tmp_path: Path) -> None:
    paths = write_copies(clips_dir, tmp_path, "a.mp4", "bug.mp4", "b.mp4")
    with DecoderPool(1, _reader=read_or_die) as pool:
        results = list(pool.imap(paths, *REQUEST))
    assert [type(result) for result in results] == [Frames, InternalError, Frames]
    message = str(results[1])
    assert f"reading {paths[1]} failed because of a bug in lmm_qa: ZeroDivisionError: division by zero (" in message
    line = 1 + (TESTS / "clips.py").read_text().split("\n").index('        raise ZeroDivisionError("division by zero")')
    assert f"clips.py:{line})" in message
    assert message.endswith("please report it with the output of lmm-qa env")


def test_a_failing_measurement_costs_no_clip(clips_dir: Path) -> None:
    paths = [clips_dir / "h264.mp4", clips_dir / "one.mp4"]
    with DecoderPool(1) as pool:
        broken = list(pool.imap(paths, *REQUEST, BrokenMeasurement))
        windows = list(pool.imap_windows(paths, *REQUEST, 1, 1, BrokenMeasurement))
        working = list(pool.imap(paths, *REQUEST, RecordingMeasurement))
    for result in broken:
        assert isinstance(result, Frames) and result.features is None
        assert "KeyError: 'a feature' (" in str(result.measurement_error)
    assert all(isinstance(result, Windows) and result.whole.measurement_error for result in windows)
    assert all(isinstance(result, Frames) and result.features for result in working)


def test_leaving_early_kills_the_workers(clips_dir: Path, tmp_path: Path) -> None:
    paths = write_copies(clips_dir, tmp_path, "a.mp4", "hang.mp4")
    start = time.monotonic()
    with DecoderPool(2, _reader=read_or_hang) as pool:
        results = pool.imap(paths, *REQUEST)
        assert isinstance(next(results), Frames)
        running = process_ids(pool)
    assert time.monotonic() - start < 20
    assert running and all(map(has_ended, running))


def test_a_worker_that_dies_while_idle_costs_no_clip(clips_dir: Path) -> None:
    with DecoderPool(1) as pool:
        assert isinstance(next(pool.imap([clips_dir / "one.mp4"], *REQUEST)), Frames)
        worker = pool._workers[0]
        assert worker._process is not None
        worker._process.kill()
        worker._process.wait()
        assert isinstance(next(pool.imap([clips_dir / "one.mp4"], *REQUEST)), Frames)


@pytest.mark.parametrize("delay", [0.0, 0.5])
def test_clips_that_nobody_waits_for_can_be_interrupted(clips_dir: Path, tmp_path: Path, delay: float) -> None:
    paths = write_copies(clips_dir, tmp_path, "a.mp4", "hang.mp4")
    with DecoderPool(1, timeout=600, _reader=read_or_hang) as pool:
        left = pool.imap(paths, *REQUEST)
        assert isinstance(next(left), Frames)
        time.sleep(delay)  # the second clip is about to be read, or being read
        pool.interrupt()
        assert [type(result) for result in pool.imap(paths[:1] * 2, *REQUEST)] == [Frames] * 2
        assert isinstance(next(left), DecoderCrashed)


def test_a_plain_script_can_be_interrupted(clips_dir: Path, tmp_path: Path) -> None:
    """The script has no main guard; Ctrl-C reaches it and its workers, as from a terminal."""
    paths = [str(path) for path in write_copies(clips_dir, tmp_path, "a.mp4", "hang.mp4")]
    script = tmp_path / "script.py"
    script.write_text(script_that_hangs(paths))
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout and process.stderr
        worker, kind = process.stdout.readline().decode().split()
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        stderr = process.communicate(timeout=20)[1].decode()
    assert kind == "Frames"
    assert stderr.rstrip().endswith("KeyboardInterrupt")
    assert has_ended(int(worker))


def test_workers_and_timeout_must_be_positive() -> None:
    with pytest.raises(UsageError, match="received 0 and 60"):
        DecoderPool(0)
    with pytest.raises(UsageError, match="received 2 and -1"):
        DecoderPool(2, timeout=-1)


def test_errors_of_clips_are_clip_errors() -> None:
    kinds = (ClipNotFound, ClipTimeout, ClipTruncated, DecoderCrashed, InternalError)
    assert all(issubclass(kind, ClipError) for kind in kinds)
