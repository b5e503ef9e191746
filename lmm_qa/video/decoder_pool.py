"""TODO-DOC video.decoder_pool."""

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
from typing import IO, TYPE_CHECKING, Any, Self, cast

from lmm_qa.config import Sampling, View
from lmm_qa.errors import (
    ClipError,
    ClipTimeout,
    ClipUnreadable,
    DecoderCrashed,
    LmmQaError,
    UsageError,
)

if TYPE_CHECKING:
    pass

from lmm_qa.video.decode import ClipMeasurement, Frames, Windows, _refuse_no_length, read_frames, read_windows

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


"""Environment of the worker processes: there is one for each core that is to decode, and threads that wait for a small
product of matrices keep the others from theirs (0.19 instead of 0.06 processor seconds a clip were seen)."""


# Many clips, in processes that can be killed

Reader = Callable[..., Any]


"""What a worker calls with a request, whose first part is the clip's path: `read_frames`, `read_windows`."""


_START_LIMIT = 60.0


"""Seconds that a worker may take to start: imports from a cold or distant disk, on a busy machine."""


class DecoderPool:
    """Worker processes that read clips, and can be killed when a decoder hangs or crashes.

    A worker is a fresh interpreter that imports this module and nothing of the caller's: it is safe beside threads,
    torch and CUDA, and needs no `if __name__ == "__main__"`. Use as a context manager; leaving it kills the workers.
    """

    def __init__(self, workers: int = 2, timeout: float = 60.0, *, _reader: Reader = read_frames) -> None:
        """
        Args:
            workers: processes, at least 1.
            timeout: seconds that one clip may take.
        """
        if workers < 1 or timeout <= 0:
            raise UsageError(f"workers and timeout must be positive, received {workers} and {timeout}")
        self._timeout = timeout
        self._reader = _reader
        self._workers = [_Worker() for _ in range(workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="lmm-qa-decoder")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the workers; clips not yet read are given up. May be called again."""
        for worker in self._workers:
            worker.close()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.discard()

    def imap(
        self,
        paths: Iterable[str | Path],
        sampling: Sampling,
        views: Sequence[View],
        factor: int,
        measure: type[ClipMeasurement] | None = None,
    ) -> Iterator[Frames | ClipError]:
        """Read clips, in order; at most two clips a worker are taken from `paths` ahead of the one handed out.

        A clip that cannot be read is handed out as its error (see `read_frames`); besides, ClipTimeout when it took
        longer than the limit, and DecoderCrashed when its worker died. The other clips go on.
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
        _refuse_no_length(window, step)
        requests = ((Path(path), sampling, tuple(views), factor, window, step, measure) for path in paths)
        return self._imap(read_windows, requests)

    def _imap(self, reader: Reader, requests: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        ahead: deque[Future[Any]] = deque()
        try:
            for request in requests:
                ahead.append(self._threads.submit(self._read, reader, request))
                if len(ahead) >= 2 * len(self._workers):
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

    def _read(self, reader: Reader, request: tuple[Any, ...]) -> Any:
        worker = self._idle.get()
        try:
            return worker.read(reader, request, self._timeout)
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
        self._complaints: IO[bytes] | None = None

    def read(self, reader: Reader, request: tuple[Any, ...], timeout: float) -> Any:
        """Have the process read a clip.

        Raises:
            ClipTimeout: it took longer than the limit.
            DecoderCrashed: the process died, or did not start.
            LmmQaError: what the reader raised.
        """
        path = request[0]
        process = self._running()
        try:
            kind, value = _exchange(process, (reader, request), timeout)
        except TimeoutError:
            self.discard()
            raise ClipTimeout(
                f"reading {path} took longer than {timeout:g} s: raise the time limit, or cut or shrink the clip"
            ) from None
        except EOFError:
            raise DecoderCrashed(f"the process that read {path} died: {self.discard()}") from None
        if not issubclass(kind, LmmQaError):
            return value
        error = kind.__new__(kind)
        Exception.__init__(error, value)
        raise error

    def close(self) -> None:
        """Kill the process, even while another thread waits for it, and start no other."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()

    def discard(self) -> str:
        """Kill the process, wait for its end and close what belonged to it; say how it ended."""
        with self._lock:
            process, complaints = self._process, self._complaints
            self._process = self._complaints = None
        if process is None or complaints is None:
            return "it was not running"
        process.kill()
        code = process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # what could not be written when the process died
                cast(IO[bytes], pipe).close()
        with complaints:
            complaints.seek(0)
            last = complaints.read().decode(errors="replace").strip().rpartition("\n")[2]
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{cause}, {last}" if last else cause

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self.discard()  # it died while idle, of something that is not the next clip's fault
        if self._process is not None:
            return self._process
        with self._lock:
            if self._closed:
                raise DecoderCrashed("the decoder pool was closed")
            self._complaints = tempfile.TemporaryFile()  # noqa: SIM115  `discard` closes it
            # The same search path as here, so that an import that works here works there.
            program = f"import sys; sys.path[:] = {sys.path!r}; from lmm_qa.video.decoder_pool import _serve; _serve()"
            process = self._process = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                env=os.environ | ONE_THREAD,
            )
        try:
            _exchange(process, None, _START_LIMIT)
        except (TimeoutError, EOFError):
            raise DecoderCrashed(f"no decoding process could be started: {self.discard()}") from None
        return process


def _exchange(process: subprocess.Popen[bytes], request: object, timeout: float) -> Any:
    """Send a request to a worker process and wait for its answer.

    Raises:
        TimeoutError: there was none in `timeout` seconds; the process has been killed.
        EOFError: the process died.
    """
    late = threading.Event()

    def kill() -> None:
        late.set()
        process.kill()

    limit = threading.Timer(timeout, kill)
    limit.daemon = True
    limit.start()
    message = pickle.dumps(request)
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
        limit.cancel()
        limit.join()
    if late.is_set():
        raise TimeoutError
    return answer


def _serve() -> None:
    """Read clips for a `DecoderPool` in another process, until that one closes the pipe."""
    import av  # noqa: F401  here, so that the first clip's time limit does not pay for it

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then kills this process
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whatever a decoder prints must not be an answer
    with suppress(EOFError, BrokenPipeError):
        while True:
            request = pickle.load(sys.stdin.buffer)
            pickle.dump(request and _answer(*request), answers, protocol=pickle.HIGHEST_PROTOCOL)
            answers.flush()


def _answer(reader: Reader, request: tuple[Any, ...]) -> tuple[type, Any]:
    """Read a clip: the class of what was read and this, or the class and message of the error."""
    try:
        read = reader(*request)
        return type(read), read
    except LmmQaError as error:
        return type(error), str(error)
    except Exception as error:
        return ClipUnreadable, f"reading {request[0]} failed: {type(error).__name__}: {error}"
