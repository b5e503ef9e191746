"""Read many clips in worker processes that can be killed when a decoder hangs or crashes."""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self, cast

from lmm_qa.config import Sampling, View
from lmm_qa.errors import (
    ClipError,
    ClipTimeout,
    DecoderCrashed,
    InternalError,
    LmmQaError,
    UsageError,
    describe_exception,
)
from lmm_qa.video.decode import ClipMeasurement, Frames, Windows, check_window, read_frames, read_windows

SINGLE_THREADED = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Environment of the workers. There is one per core that decodes; with more threads each, small matrix products make
them wait for each other (0.19 instead of 0.06 processor seconds per clip were measured)."""

START_TIMEOUT = 60.0
"""Seconds that a worker may take to start: imports from a cold or remote disk, on a busy machine."""

MEMORY_LIMIT = 3 << 30
"""Bytes of memory that a worker may use, where the operating system can limit it (Linux): the largest pictures that are
accepted, 16 of which a decoder may store, need 2.4 GB."""

Reader = Callable[..., Any]
"""Called by a worker with a request, which starts with the clip's path: `read_frames` or `read_windows`."""


class DecoderPool:
    """Worker processes that read clips, and are killed when a decoder hangs.

    A worker is a new interpreter that imports this module and nothing from the caller: it is safe beside threads,
    torch and CUDA, and needs no `if __name__ == "__main__"`. Use as a context manager; leaving it kills the workers.
    """

    def __init__(self, workers: int = 2, timeout: float = 60.0, *, _reader: Reader = read_frames) -> None:
        """
        Args:
            workers: processes, at least 1.
            timeout: seconds that reading one clip may take.
        """
        if workers < 1 or timeout <= 0:
            raise UsageError(f"workers and timeout must be positive, received {workers} and {timeout}")
        self._timeout = timeout
        self._reader = _reader
        self._interrupts = 0
        self._prefetched: dict[tuple[Any, ...], Future[Any]] = {}
        self._workers = [_Worker() for _ in range(workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="lmm-qa-decoder")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the workers now, without waiting for them. Otherwise each starts with its first clip."""
        for worker in self._workers:
            worker.start()

    def prefetch(
        self,
        paths: Sequence[str | Path],
        sampling: Sampling,
        views: Sequence[View],
        factor: int,
        measure: type[ClipMeasurement] | None = None,
        window: float | None = None,
        step: float | None = None,
    ) -> None:
        """Start reading the first clips, two per worker, for the `imap` that follows with the same arguments.

        Args:
            window, step: for `imap_windows`.
        """
        how = (sampling, tuple(views), factor, *(() if window is None else (window, step)), measure)
        reader = self._reader if window is None else read_windows
        for path in paths[: 2 * len(self._workers)]:
            request = (Path(path), *how)
            if (reader, request) not in self._prefetched:
                self._prefetched[reader, request] = self._threads.submit(self._read, reader, request, self._interrupts)

    def interrupt(self) -> None:
        """Abandon the clips that were asked for until now, even those that are being read; the pool stays open.

        They get a DecoderCrashed. A worker that reads one of them is killed, and replaced when it is next needed.
        """
        self._interrupts += 1
        for worker in self._workers:
            worker.interrupt()

    def close(self) -> None:
        """Kill the workers and abandon clips that are not read yet. May be called again."""
        for worker in self._workers:
            worker.close()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.stop()

    def imap(
        self,
        paths: Iterable[str | Path],
        sampling: Sampling,
        views: Sequence[View],
        factor: int,
        measure: type[ClipMeasurement] | None = None,
    ) -> Iterator[Frames | ClipError]:
        """Read clips, in order. At most two clips per worker are taken from `paths` in advance.

        For a clip that cannot be read, yields the error (see `read_frames`) and continues with the others; besides
        those of `read_frames`, ClipTimeout (over the time limit), DecoderCrashed (its worker died) and InternalError
        (an unexpected exception).
        """
        requests = ((Path(path), sampling, tuple(views), factor, measure) for path in paths)
        return self._imap(self._reader, requests)

    def imap_windows(
        self,
        paths: Iterable[str | Path],
        sampling: Sampling,
        views: Sequence[View],
        factor: int,
        window: float,
        step: float,
        measure: type[ClipMeasurement] | None = None,
    ) -> Iterator[Windows | ClipError]:
        """Read windows over clips (see `read_windows`), as `imap` reads frames.

        Raises:
            UsageError: the window or the step is not above 0.
        """
        check_window(window, step)
        requests = ((Path(path), sampling, tuple(views), factor, window, step, measure) for path in paths)
        return self._imap(read_windows, requests)

    def _imap(self, reader: Reader, requests: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        ahead: deque[Future[Any]] = deque()
        try:
            for request in requests:
                begun = self._prefetched.pop((reader, request), None)
                ahead.append(begun or self._threads.submit(self._read, reader, request, self._interrupts))
                if len(ahead) >= 2 * len(self._workers):
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

    def _read(self, reader: Reader, request: tuple[Any, ...], interrupts: int) -> Any:
        worker = self._idle.get()
        try:
            return worker.read(reader, request, self._timeout, lambda: self._interrupts == interrupts)
        except ClipError as error:
            return error
        finally:
            self._idle.put(worker)


class _Worker:
    """One process that reads one clip at a time; started when first needed, and again after it died."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: IO[bytes] | None = None
        self._reading = False

    def read(self, reader: Reader, request: tuple[Any, ...], timeout: float, is_wanted: Callable[[], bool]) -> Any:
        """Have the process read a clip.

        Raises:
            ClipTimeout: it took longer than the limit.
            DecoderCrashed: the process died or did not start, or the clip is not wanted any more.
            LmmQaError: raised by the reader; InternalError for any other exception in the process.
        """
        path = request[0]
        process = self._running_process()
        with self._lock:
            if not is_wanted():
                raise DecoderCrashed(f"reading {path} was interrupted")
            self._reading = True
        try:
            kind, value = _exchange(process, (reader, request), timeout)
        except TimeoutError:
            self.stop()
            raise ClipTimeout(
                f"reading {path} took longer than {timeout:g} s: raise the time limit, or cut or shrink the clip"
            ) from None
        except EOFError:
            raise DecoderCrashed(f"the process that read {path} died: {self.stop()}") from None
        finally:
            self._reading = False
        if not issubclass(kind, LmmQaError):
            return value
        error = kind.__new__(kind)
        Exception.__init__(error, value)
        raise error

    def interrupt(self) -> None:
        """Kill the process if it is reading a clip."""
        with self._lock:
            if self._reading and self._process is not None:
                self._process.kill()

    def close(self) -> None:
        """Kill the process, even while another thread waits for it, and start no other."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()

    def stop(self) -> str:
        """Kill the process, wait for its end and release its resources; return how it ended."""
        with self._lock:
            process, stderr = self._process, self._stderr
            self._process = self._stderr = None
        if process is None or stderr is None:
            return "it was not running"
        process.kill()
        code = process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # unwritten data of a process that died
                cast(IO[bytes], pipe).close()
        with stderr:
            stderr.seek(0)
            last_line = stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{cause}, {last_line}" if last_line else cause

    def _running_process(self) -> subprocess.Popen[bytes]:
        """The process, which has just answered, so that the time limit of a clip does not include its start.

        It is started if necessary, and again if it died since its last clip: that is not the fault of the next one.

        Raises:
            DecoderCrashed: it could not be started.
        """
        for can_start_again in (True, False):
            process = self.start()
            try:
                _exchange(process, None, START_TIMEOUT)
                return process
            except (TimeoutError, EOFError) as error:
                ended = self.stop()
                if isinstance(error, TimeoutError) or not can_start_again:
                    break
        raise DecoderCrashed(f"the decoder process did not start: {ended}")

    def start(self) -> subprocess.Popen[bytes]:
        """Start the process unless it runs, and do not wait for it.

        Raises:
            DecoderCrashed: the pool was closed.
        """
        with self._lock:
            if self._process is not None:
                return self._process
            if self._closed:
                raise DecoderCrashed("the decoder pool was closed")
            self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  `stop` closes it
            # The same search path as here, so that an import that works here works there.
            program = f"import sys; sys.path[:] = {sys.path!r}; from lmm_qa.video.decoder_pool import serve; serve()"
            self._process = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=os.environ | SINGLE_THREADED,
            )
            return self._process


def _exchange(process: subprocess.Popen[bytes], request: object, timeout: float) -> Any:
    """Send a request to a worker process and wait for its answer.

    Raises:
        TimeoutError: no answer within `timeout` seconds; the process has been killed.
        EOFError: the process died.
    """
    message = pickle.dumps(request)
    late = threading.Event()

    def kill() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(timeout, kill)
    timer.daemon = True
    timer.start()
    requests, answers = cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)
    try:
        requests.write(message)
        requests.flush()
        answer = pickle.load(answers)
    except (OSError, EOFError, pickle.UnpicklingError):
        answer = None
        if not late.is_set():
            raise EOFError from None
    finally:
        timer.cancel()
        timer.join()
    if late.is_set():
        raise TimeoutError
    return answer


def serve() -> None:
    """Main loop of a worker process: read clips until the parent closes the pipe."""
    import av  # noqa: F401  imported before the first clip, whose time limit should not include it

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then kills this process
    _limit_memory()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what a decoder prints must not mix with answers
    with suppress(EOFError, BrokenPipeError):
        while True:
            request = pickle.load(sys.stdin.buffer)
            pickle.dump(request and _answer(*request), answers, protocol=pickle.HIGHEST_PROTOCOL)
            answers.flush()


def _limit_memory() -> None:
    """Have the operating system refuse this process more than `MEMORY_LIMIT`; not on macOS and Windows."""
    if sys.platform != "linux":
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = MEMORY_LIMIT if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _end_with_parent() -> None:
    """End this process as soon as nobody can receive its answers, even while it decodes; not on Windows."""
    import select

    if not hasattr(select, "poll"):
        return
    watched = select.poll()
    watched.register(sys.stdin.fileno(), 0)  # reports only that the other end was closed
    watched.poll()
    os._exit(1)


def _answer(reader: Reader, request: tuple[Any, ...]) -> tuple[type, Any]:
    """Read a clip; return the class and value of the result, or the class and message of the error."""
    path = request[0]
    try:
        result = reader(*request)
        return type(result), result
    except LmmQaError as error:
        return type(error), str(error)
    except MemoryError:
        return DecoderCrashed, f"the process that read {path} ran out of memory: use fewer workers or a smaller clip"
    except Exception as error:
        return InternalError, (
            f"reading {path} failed because of a bug in lmm_qa: {describe_exception(error)}; please report it with the "
            "output of lmm-qa env"
        )
