"""Rate in several processes: ranks started by a launcher, or raters on a Ray cluster.

**Ranks** (`accelerate launch`, `torchrun`): each claims one clip after the other from a shared list, so that a slower
rank rates fewer clips. The only shared state is the key-value store through which the launcher's processes found each
other; there is no process group and nothing collective. Each rank writes its rows to a file of its own, and rank 0
merges these files at the end (see `lmm_qa.ratings.io.RatingsWriter`). A daemon thread of each rank updates a heartbeat
in the store: a rank that waits for others raises an error when one of them has died.

**Ray**: raters on the nodes take clips from one queue and send the results back to the process that runs the command.
The clips of a rater that was lost go back into the queue. This uses Ray Core, because Ray Data would return the rows of
a block only when the whole block is done.

All processes must see the clips, the model and the output under the same paths.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib
import itertools
import json
import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.distributed import DistError, HashStore  # type: ignore[attr-defined]  # public, but not in __all__
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from lmm_qa.errors import LmmQaError, MissingExtra, RankLost, UsageError
from lmm_qa.rater import Rater
from lmm_qa.ratings.io import RatingsWriter

if TYPE_CHECKING:
    from lmm_qa.manifest import Clip
    from lmm_qa.model.rater_plan import RaterPlan
    from lmm_qa.ratings.rows import Failure, Rating


T = TypeVar("T")

STORE_TIMEOUT = timedelta(minutes=30)
"""Limit for a single operation on the store, and for all ranks to start."""

HEARTBEAT_SECONDS = 5.0

HEARTBEAT_TIMEOUT = 60.0
"""A rank without a heartbeat for this many seconds counts as dead."""

POLL_SECONDS = 0.2

RESUME_HINT = "Rows written so far are kept; run the same command again to resume"

MAX_LOSSES = 2
"""Raters on Ray that may be lost in a row without a result, as a multiple of their number."""


class Ranks:
    """The processes of one command, seen from one of them; a command without a launcher is rank 0 of 1."""

    def __init__(self, rank: int, world: int, store: Store) -> None:
        self.rank = rank
        self.world = world
        self._store: Any = _CheckedStore(store)
        self._done = threading.Event()

    @classmethod
    def from_environment(cls) -> Ranks:
        """Connect to the other processes by `RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT`; start the heartbeat.

        Raises:
            UsageError: there are other processes, but the environment does not say how to reach them.
            RankLost: they did not all start within `STORE_TIMEOUT`.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(0, 1, HashStore())
        try:
            store, rank, world = next(rendezvous("env://", timeout=STORE_TIMEOUT))
            store.set_timeout(STORE_TIMEOUT)
            ranks = cls(rank, world, PrefixStore("lmm_qa", store))
            # A connection of its own: an operation that waits would block the heartbeat.
            ranks.start_heartbeat(PrefixStore("lmm_qa", store.clone()))
        except DistError as error:
            raise _store_lost(error) from None
        except ValueError as error:
            raise UsageError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and the other processes cannot be found: {error}; start "
                "with accelerate launch or torchrun, or unset WORLD_SIZE"
            ) from None
        return ranks

    def start_heartbeat(self, store: Store) -> None:
        """Update this rank's heartbeat in the background until it has closed its writer, or the process ends."""

        def beat() -> None:
            for count in itertools.count():
                try:
                    store.set(f"heartbeat{self.rank}", str(count))
                except DistError:
                    return  # the main thread notices, too
                if self._done.wait(HEARTBEAT_SECONDS):
                    return

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()

        def stop() -> None:
            self._done.set()
            thread.join(HEARTBEAT_SECONDS)

        # A thread that is inside the store when Python ends aborts the process, which would hide the exit code.
        atexit.register(stop)

    def device(self, requested: str | None) -> str | None:
        """The device of this rank: the GPUs of a machine in turn, unless one was requested by its number."""
        if self.world == 1 or requested not in (None, "cuda") or not torch.cuda.is_available():
            return requested
        return f"cuda:{int(os.environ.get('LOCAL_RANK', self.rank)) % torch.cuda.device_count()}"

    @contextmanager
    def writer(
        self,
        path: Path,
        clips: Sequence[str],
        rater_id: str,
        overwrite: bool = False,
        needs: Sequence[str] = (),
        profile_id: str | None = None,
        safe_csv: bool = False,
    ) -> Iterator[RatingsWriter]:
        """A `RatingsWriter` for the rows of this rank. At the end, rank 0 waits for the others and merges all rows.

        Arguments: see `lmm_qa.ratings.io.RatingsWriter`.

        Raises:
            UsageError: this rank has other clips or another rater than rank 0.
            RankLost: a rank that this one waits for has died.
            ResultsError: as for `RatingsWriter`.
        """
        digest = hashlib.sha256(json.dumps([*clips, profile_id]).encode()).hexdigest()[:16]
        own = f"{rater_id} {len(clips)} {digest}"
        if self.rank == 0:
            with RatingsWriter(path, clips, rater_id, overwrite, 0, needs, profile_id, safe_csv) as writer:
                self._store.set("run", own)
                yield writer
                self._wait_until(lambda: self._closed() >= self.world - 1)
                rows = self._store.add("rows of ranks above 0", 0)
                writer.gather(rows)
            self._done.set()
            return
        self._wait_until(lambda: self._store.check(["run"]))
        first = self._store.get("run").decode()
        if first != own:
            raise UsageError(
                f"rank {self.rank} has other clips or another rater than rank 0 (rater, number and hash of the clips: "
                f"{own} here, {first} there): all ranks need the same command, files and kind of GPU"
            )
        with RatingsWriter(path, clips, rater_id, overwrite, self.rank, needs, profile_id) as writer:
            yield writer
        self._store.add("rows of ranks above 0", writer.written)
        self._store.set(f"closed{self.rank}", "1")
        self._done.set()

    def part(self, clips: Sequence[T]) -> Sequence[T]:
        """This rank's equal part of work that is divided in advance: looking up which clips are rated."""
        return clips[self.rank :: self.world]

    def unrated(self, clips: Sequence[T], rated: Iterable[bool]) -> list[T]:
        """The clips, of all ranks, that still have to be rated. All ranks wait here for each other.

        So no row is written before all ranks have looked up their part.

        Args:
            clips: all clips of the run.
            rated: for each clip in this rank's `part`, whether it has been rated by an earlier run.

        Raises:
            RankLost: another rank has died.
        """
        self._store.set(f"rated{self.rank}", "".join("01"[each] for each in rated))
        keys = [f"rated{rank}" for rank in range(self.world)]
        self._wait_until(lambda: self._store.check(keys))
        answers = ["0"] * len(clips)
        for rank, key in enumerate(keys):
            answers[rank :: self.world] = self._store.get(key).decode()
        return [clip for clip, answer in zip(clips, answers, strict=True) if answer == "0"]

    def claim(self, clips: Sequence[T]) -> Iterator[T]:
        """The clips that this rank has to rate: each time the next one that no rank has claimed."""
        while True:
            number = self._store.add("claimed", 1)
            if number > len(clips):
                return
            yield clips[number - 1]

    def count_rows(self, own: Iterable[object], total: int) -> Iterator[None]:
        """Consume `own`, one item per row that this rank writes; yields once per row that any rank has written.

        Rank 0 then waits until all ranks together have written `total` rows.

        Raises:
            RankLost: a rank has died, on rank 0.
        """
        counted = 0
        for _ in own:
            written = self._store.add("written", 1)
            yield from itertools.repeat(None, written - counted)
            counted = written
        while self.rank == 0 and counted < total:
            self._wait_until(partial(self._has_more_rows_than, counted))
            written = self._store.add("written", 0)
            yield from itertools.repeat(None, written - counted)
            counted = written

    def _has_more_rows_than(self, counted: int) -> bool:
        return bool(self._store.add("written", 0) > counted)

    def _closed(self) -> int:
        """How many of the other ranks have closed their writers."""
        return sum(self._store.check([f"closed{rank}"]) for rank in range(1, self.world))

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        """Poll the store until a condition is true.

        Raises:
            RankLost: a rank that has not closed its writer had no heartbeat for `HEARTBEAT_TIMEOUT` seconds; or the
                store cannot be reached.
        """
        last_beats = {rank: ("", time.monotonic()) for rank in range(self.world) if rank != self.rank}
        next_check = 0.0
        while not condition():
            if time.monotonic() >= next_check:
                self._check_heartbeats(last_beats)
                next_check = time.monotonic() + HEARTBEAT_SECONDS
            time.sleep(POLL_SECONDS)

    def _check_heartbeats(self, last_beats: dict[int, tuple[str, float]]) -> None:
        """Update the last heartbeat of each rank and when this rank first saw it, by its own clock."""
        for rank, (last, since) in last_beats.items():
            key = f"heartbeat{rank}"
            beat = self._store.get(key).decode() if self._store.check([key]) else ""
            if beat != last:
                last_beats[rank] = (beat, time.monotonic())
            elif time.monotonic() - since > HEARTBEAT_TIMEOUT and not self._store.check([f"closed{rank}"]):
                raise RankLost(
                    f"rank {rank} of {self.world} has died or cannot be reached: no heartbeat for "
                    f"{HEARTBEAT_TIMEOUT:g} s. {RESUME_HINT}"
                )


class _CheckedStore:
    """A store whose errors are `RankLost`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operation = getattr(self._store, name)

        def checked(*arguments: Any) -> Any:
            try:
                return operation(*arguments)
            except DistError as error:
                raise _store_lost(error) from None

        return checked


def _store_lost(error: DistError) -> RankLost:
    return RankLost(f"lost the connection between the ranks; rank 0 or the launcher has died: {error}. {RESUME_HINT}")


# --- Ray -------------------------------------------------------------------------------------------------------------


class RayRaters:
    """Raters on the Ray cluster at `RAY_ADDRESS` or on this machine; if none runs, a local one is started.

    One rater per GPU of the cluster; without GPUs, one per `workers` cores of a node.
    """

    def __init__(
        self,
        plan: RaterPlan,
        workers: int,
        report: Callable[[str], None],
        load: Callable[[RaterPlan], Rater] = Rater.from_plan,
    ) -> None:
        """
        Args:
            plan: the rater. Device and dtype are chosen for the nodes of the cluster, see `self.plan`.
            workers: decoding processes of each rater.
            report: receives messages about lost raters.
            load: loads a rater, on its node.

        Raises:
            MissingExtra: Ray is not installed.
            UsageError: no node has enough cores, or the requested device.
        """
        device = plan.load_options.get("device")
        if device not in (None, "cuda", "cpu"):
            raise UsageError(f"on a Ray cluster, --device is cuda or cpu, received {device!r}")
        try:
            self._ray: Any = importlib.import_module("ray")
        except ModuleNotFoundError:
            raise MissingExtra("ray", "ray", "--engine ray") from None
        self._report = report
        self._load = load
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if not self._ray.is_initialized():
            self._ray.init(log_to_driver=False, logging_level="error")
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        gpus = 0 if device == "cpu" else sum(int(node.get("GPU", 0)) for node in nodes)
        self.number = gpus or sum(int(node.get("CPU", 0)) // workers for node in nodes)
        if device == "cuda" and not gpus:
            raise UsageError("no node of the Ray cluster has a GPU: leave out --device cuda")
        if not self.number:
            raise UsageError(f"no node of the Ray cluster has {workers} cores: ask for fewer --workers")
        self._resources = {"num_cpus": workers, "num_gpus": 1 if gpus else 0}
        self.plan = plan
        if not gpus:
            self.plan = replace(plan, load_options={**plan.load_options, "device": "cpu"})
        elif plan.load_options.get("dtype") is None:
            # Choose it on a node: this machine may have other GPUs, or none.
            choose = self._ray.remote(**self._resources)(_dtype)
            dtype = self._ray.get(choose.remote(plan))
            self.plan = replace(plan, load_options={**plan.load_options, "dtype": dtype})

    def rate(self, clips: Iterable[Clip], **options: Any) -> Iterator[Rating | Failure]:
        """Rate clips; one result per clip, in the order in which they are done.

        Args:
            clips: their names are unique.
            options: those of `lmm_qa.rater.Rater.rate_all`.

        Raises:
            LmmQaError: an error of a rater; or raters keep dying.
        """
        ray, clips = self._ray, list(clips)
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        here = strategies.NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        queue = ray.remote(num_cpus=0, scheduling_strategy=here)(ClipQueue).remote(clips)
        actor = ray.remote(**self._resources)(_RayRater)
        numbers = itertools.count()

        def start() -> tuple[int, Any]:
            number = next(numbers)
            return number, actor.remote(number, self.plan, self._load, Path.cwd(), queue)

        unrated = {clip.name: clip for clip in clips}
        idle = [start() for _ in range(self.number)]
        finished: list[tuple[int, Any]] = []
        running: dict[Any, tuple[int, Any]] = {}
        losses = 0
        while unrated:
            running |= {rater.rate.options(num_returns="streaming").remote(options): (n, rater) for n, rater in idle}
            idle = []
            [results], _ = ray.wait(list(running), num_returns=1)
            try:
                result = ray.get(next(results))
            except StopIteration:  # the queue is empty, unless clips of a lost rater come back
                finished.append(running.pop(results))
            except ray.exceptions.RayActorError as error:
                number, rater = running.pop(results)
                ray.kill(rater)  # it may only be unreachable
                returned = [clip for clip in ray.get(queue.dismiss.remote(number)) if clip.name in unrated]
                ray.get(queue.put_back.remote(returned))
                losses += 1
                self._report(f"a rater was lost ({type(error).__name__}); {len(returned)} of its clips will be retried")
                if losses > MAX_LOSSES * self.number:
                    raise LmmQaError(
                        f"raters keep dying: {losses} since the last result. Look for the reason in Ray's logs; it may "
                        "be memory, see --batch-size and --workers"
                    ) from None
                idle, finished = [*finished, start()], []
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, LmmQaError):
                    raise error.cause from None
                raise
            else:
                losses = 0
                if unrated.pop(result.clip, None):
                    yield result


class ClipQueue:
    """The clips that no rater has taken; an actor on the node of the command."""

    def __init__(self, clips: Iterable[Clip]) -> None:
        self._clips = deque(clips)
        self._taken: dict[int, list[Clip]] = defaultdict(list)
        self._dismissed: set[int] = set()

    def take(self, rater: int) -> Clip | None:
        """The next clip, for the rater of this number; None when there is none, or the rater was dismissed."""
        if not self._clips or rater in self._dismissed:
            return None
        self._taken[rater].append(clip := self._clips.popleft())
        return clip

    def dismiss(self, rater: int) -> list[Clip]:
        """The clips that a rater took; it gets no more."""
        self._dismissed.add(rater)
        return self._taken.pop(rater, [])

    def put_back(self, clips: Sequence[Clip]) -> None:
        """Make clips the next ones to be taken."""
        self._clips.extendleft(reversed(clips))


class _RayRater:
    """A rater on a node of the cluster."""

    def __init__(
        self, number: int, plan: RaterPlan, load: Callable[[RaterPlan], Rater], folder: Path, queue: Any
    ) -> None:
        self._number, self._plan, self._load, self._folder, self._queue = number, plan, load, folder, queue
        self._rater: Rater | None = None

    def rate(self, options: dict[str, Any]) -> Iterator[Rating | Failure]:
        """Rate clips from the queue until it is empty. Loads the model here: Ray hides errors of a constructor."""
        ray: Any = importlib.import_module("ray")
        try:
            os.chdir(self._folder)
        except OSError as error:
            raise UsageError(
                f"a node of the Ray cluster cannot enter {self._folder} ({error.strerror}): all nodes need the folders "
                "of the clips and of the model under the same paths"
            ) from None
        self._rater = self._rater or self._load(self._plan)
        clips = iter(lambda: ray.get(self._queue.take.remote(self._number)), None)
        # No `yield from`: Ray sends values into its generators, and `rate_all` may return an iterator without `send`.
        for result in self._rater.rate_all(clips, **options):  # noqa: UP028
            yield result


def _dtype(plan: RaterPlan) -> str:
    return plan.dtype
