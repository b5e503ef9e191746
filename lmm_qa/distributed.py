"""Rating in several processes: the ranks that a launcher starts, or raters on a Ray cluster.

**Ranks** (`accelerate launch`, `torchrun`) take clip after clip from one list: what has been taken is a counter in the
store by which the launcher's processes found each other. So a rank with longer clips or a slower GPU takes fewer of
them, and none waits for another before the end, when rank 0 gathers the shards (see `lmm_qa.ratings_io.RatingsWriter`). There is no
process group: nothing collective, and no time limit that a long clip could exceed.

**Ray** gives the raters their places. They take clips from one queue, results go to the process that asked; what a lost
rater had taken goes back into the queue. This is Ray Core: Ray Data hands out blocks, and the rows of a block come when
all of it is done.

All processes must see the clips, the model and the output under the same paths.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, yet exported by no __all__
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from lmm_qa.errors import LmmQaError, MissingExtra, UsageError
from lmm_qa.ratings_io import RatingsWriter

if TYPE_CHECKING:
    from lmm_qa.manifest import Clip
    from lmm_qa.rater import Rater, RaterPlan
    from lmm_qa.ratings import Failure, Rating


T = TypeVar("T")


PATIENCE = timedelta(days=7)


"""How long ranks wait for each other. The launcher ends all of them when one dies."""


POLL_SECONDS = 0.2


LOSSES = 2


"""So often may raters on Ray be lost without any result in between, times their number."""


class Ranks:
    """The processes that a launcher started for one command, seen from one of them; or that one, if it is alone."""

    def __init__(self, rank: int, world: int, store: Store) -> None:
        self.rank = rank
        self.world = world
        self._store = store

    @classmethod
    def from_environment(cls) -> Ranks:
        """Find the others by `RANK`, `WORLD_SIZE` and the rest of what launchers set.

        Raises:
            UsageError: there are others, and no way to reach them.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(0, 1, HashStore())
        try:
            store, rank, world = next(rendezvous("env://"))
        except ValueError as error:
            raise UsageError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and the other processes cannot be found: {error}; start "
                "with accelerate launch or torchrun, or unset WORLD_SIZE"
            ) from None
        store.set_timeout(PATIENCE)
        return cls(rank, world, PrefixStore("lmm_qa", store))

    def device(self, asked: str | None) -> str | None:
        """The device of this rank: the GPUs of a machine in turn, unless one was asked for by its number."""
        if self.world == 1 or asked not in (None, "cuda") or not torch.cuda.is_available():
            return asked
        return f"cuda:{int(os.environ.get('LOCAL_RANK', self.rank)) % torch.cuda.device_count()}"

    @contextmanager
    def sink(
        self, path: Path, clips: Sequence[str], rater_id: str, overwrite: bool, needs: Sequence[str] = ()
    ) -> Iterator[RatingsWriter]:
        """A `lmm_qa.ratings_io.RatingsWriter` for the rows of this rank; that of rank 0 ends with the rows of all.

        Raises:
            UsageError: this rank has other clips or another rater than rank 0.
            ResultsError: as for `RatingsWriter`.
        """
        ours = f"{rater_id} {len(clips)} {hashlib.sha256(json.dumps(clips).encode()).hexdigest()[:16]}"
        if self.rank == 0:
            with RatingsWriter(path, clips, rater_id, overwrite, needs=needs) as sink:
                self._store.set("run", ours)
                yield sink
                while self._store.add("closed", 0) < self.world - 1:
                    time.sleep(POLL_SECONDS)
                sink.gather(self._store.add("written", 0))
            return
        if (first := self._store.get("run").decode()) != ours:
            raise UsageError(
                f"rank {self.rank} would rate other clips, or with another rater, than rank 0 (rater, number and hash "
                f"of the clips are {ours} here, {first} there): all need the same command, files and kind of GPU"
            )
        with RatingsWriter(path, clips, rater_id, overwrite, self.rank, needs) as sink:
            yield sink
        self._store.add("written", sink.written)
        self._store.add("closed", 1)

    def share(self, clips: Sequence[T]) -> Sequence[T]:
        """Every so manieth clip: this rank's share of work that takes the same time for each."""
        return clips[self.rank :: self.world]

    def waiting(self, clips: Sequence[T], known: Iterable[bool]) -> list[T]:
        """The clips that still have to be rated, of all; `known` says of each in this rank's share whether it has been.

        This is where ranks wait for each other once: no row is written before all have looked up their share.
        """
        self._store.set(f"known{self.rank}", "".join("01"[each] for each in known))
        answers = ["0"] * len(clips)
        for rank in range(self.world):
            answers[rank :: self.world] = self._store.get(f"known{rank}").decode()
        return [clip for clip, answer in zip(clips, answers, strict=True) if answer == "0"]

    def taken(self, clips: Sequence[T]) -> Iterator[T]:
        """The clips that this rank is to rate: each time the next one that no rank has taken."""
        while (number := self._store.add("taken", 1)) <= len(clips):
            yield clips[number - 1]

    def settled(self, own: Iterable[object], total: int) -> Iterator[None]:
        """Store this rank's `own` rows; an item for each that any rank has stored. Rank 0 waits for those of all."""
        seen = 0
        for _ in own:
            now = self._store.add("settled", 1)
            yield from itertools.repeat(None, now - seen)
            seen = now
        while self.rank == 0 and seen < total:
            now = self._store.add("settled", 0)
            yield from itertools.repeat(None, now - seen)
            seen = now
            time.sleep(POLL_SECONDS)


# --- Ray -------------------------------------------------------------------------------------------------------------


class RayRaters:
    """Raters on the Ray cluster that `RAY_ADDRESS` or this machine names; without any, on one of this machine alone.

    One for each GPU of the cluster; without any, one for each `workers` cores of a node.
    """

    def __init__(self, plan: RaterPlan, workers: int, say: Callable[[str], None]) -> None:
        """
        Args:
            plan: the rater. Device and number format are chosen by what the cluster has, see `self.plan`.
            workers: decoding processes of each rater.
            say: what is told of lost raters.

        Raises:
            MissingExtra: Ray is not installed.
            UsageError: no node has so many cores, or the device that was asked for.
        """
        if plan.device not in (None, "cuda", "cpu"):
            raise UsageError(f"on a Ray cluster, --device is cuda or cpu, received {plan.device!r}")
        try:
            self._ray: Any = importlib.import_module("ray")
        except ModuleNotFoundError:
            raise MissingExtra("ray", "ray", "--engine ray") from None
        self._say = say
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if not self._ray.is_initialized():
            self._ray.init(log_to_driver=False, logging_level="error")
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        gpus = 0 if plan.device == "cpu" else sum(int(node.get("GPU", 0)) for node in nodes)
        self.number = gpus or sum(int(node.get("CPU", 0)) // workers for node in nodes)
        if plan.device == "cuda" and not gpus:
            raise UsageError("no node of the Ray cluster has a GPU: leave out --device cuda")
        if not self.number:
            raise UsageError(f"no node of the Ray cluster has {workers} cores: ask for fewer --workers")
        self._place = {"num_cpus": workers, "num_gpus": 1 if gpus else 0}
        self.plan = plan if gpus else replace(plan, device="cpu")
        if gpus and plan.dtype is None:  # it suits the GPUs, and the machine of the command may have others or none
            choose = self._ray.remote(**self._place)(_dtype)
            self.plan = replace(plan, dtype=self._ray.get(choose.remote(plan)))

    def rate(self, clips: Iterable[Clip], **options: Any) -> Iterator[Rating | Failure]:
        """Rate clips, no two of one name; one result for each, as they come.

        Args:
            clips: what is rated.
            options: those of `lmm_qa.rater.Rater.rate_all`.

        Raises:
            LmmQaError: what a rater raised; or raters die one after the other.
        """
        ray, clips = self._ray, list(clips)
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        here = strategies.NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        queue = ray.remote(num_cpus=0, scheduling_strategy=here)(_Queue).remote(clips)
        actor = ray.remote(**self._place)(_RayRater)
        numbers = itertools.count()

        def start() -> tuple[int, Any]:
            number = next(numbers)
            return number, actor.remote(number, self.plan, Path.cwd(), queue)

        waiting = {clip.name: clip for clip in clips}
        ready = [start() for _ in range(self.number)]
        ended: list[tuple[int, Any]] = []
        running: dict[Any, tuple[int, Any]] = {}
        losses = 0
        while waiting:
            running |= {rater.rate.options(num_returns="streaming").remote(options): (n, rater) for n, rater in ready}
            ready = []
            [results], _ = ray.wait(list(running), num_returns=1)
            try:
                result = ray.get(next(results))
            except StopIteration:  # the queue is empty, until somebody is lost
                ended.append(running.pop(results))
            except ray.exceptions.RayActorError as error:
                number, rater = running.pop(results)
                ray.kill(rater)  # it may be out of reach only
                taken = [clip for clip in ray.get(queue.dismiss.remote(number)) if clip.name in waiting]
                ray.get(queue.put_back.remote(taken))
                losses += 1
                self._say(f"a rater was lost ({type(error).__name__}); {len(taken)} of its clips are for others now")
                if losses > LOSSES * self.number:
                    raise LmmQaError(
                        f"raters die one after the other, {losses} since the last result: look for the reason in the "
                        "logs of Ray; memory is one, see --batch-size and --workers"
                    ) from None
                ready, ended = [*ended, start()], []
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, LmmQaError):
                    raise error.cause from None
                raise
            else:
                losses = 0
                if waiting.pop(result.clip, None):
                    yield result


class _Queue:
    """The clips that no rater has taken. It lives beside the command, and is lost with that only."""

    def __init__(self, clips: Iterable[Clip]) -> None:
        self._clips = deque(clips)
        self._taken: dict[int, list[Clip]] = defaultdict(list)
        self._dismissed: set[int] = set()

    def take(self, number: int) -> Clip | None:
        """The next clip, for the rater of this number; None when there is none."""
        if not self._clips or number in self._dismissed:
            return None
        self._taken[number].append(clip := self._clips.popleft())
        return clip

    def dismiss(self, number: int) -> list[Clip]:
        """What a rater has taken that gets nothing more."""
        self._dismissed.add(number)
        return self._taken.pop(number, [])

    def put_back(self, clips: Sequence[Clip]) -> None:
        self._clips.extendleft(reversed(clips))


class _RayRater:
    """A rater on some node of the cluster."""

    def __init__(self, number: int, plan: RaterPlan, folder: Path, queue: Any) -> None:
        self._number, self._plan, self._folder, self._queue = number, plan, folder, queue
        self._rater: Rater | None = None

    def rate(self, options: dict[str, Any]) -> Iterator[Rating | Failure]:
        """Rate clips from the queue until it is empty. Loads here and not before: errors of a constructor get lost."""
        ray: Any = importlib.import_module("ray")
        try:
            os.chdir(self._folder)
        except OSError as error:
            raise UsageError(
                f"a node of the Ray cluster cannot enter {self._folder} ({error.strerror}): all nodes need the folders "
                "of the clips and of the model under the same paths"
            ) from None
        self._rater = self._rater or self._plan.load()
        clips = iter(lambda: ray.get(self._queue.take.remote(self._number)), None)
        # No `yield from`: Ray sends values into its generators, and what `rate_all` delegates to need not take them.
        for result in self._rater.rate_all(clips, **options):  # noqa: UP028
            yield result


def _dtype(plan: RaterPlan) -> str:
    return plan.dtype_chosen
