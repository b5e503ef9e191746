"""python -m pytest tests/test_distributed.py

Ranks as threads with a store in memory, then as the processes of `accelerate launch`; a Ray cluster of two nodes.
"""

from __future__ import annotations

import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from clips import write_clip
from torch.distributed import HashStore

import lmm_qa.cli.app
from lmm_qa.distributed import LOSSES, Ranks, RayRaters, _Queue
from lmm_qa.errors import LmmQaError, MissingExtra, ModelError, ResultsError, UsageError
from lmm_qa.manifest import Clip
from lmm_qa.ratings_io import RatingsWriter, journal, read_rows, shard, write_rows

fcntl = pytest.importorskip("fcntl", reason="Windows has neither these locks nor SIGKILL")

FORMS = (".jsonl", ".csv", ".parquet")
FAST = ("--device", "cpu", "--sampling", "uniform:2", "--view", "whole:56", "--workers", "1", "--batch-size", "1")
"""One clip a batch: then the last digits of a score do not depend on which clips came to which process."""


def row(clip: str, score: float | None = 3.0, rater: str = "r") -> dict[str, Any]:
    error = None if score is not None else {"class": "ClipUnreadable", "message": "broken"}
    return {"clip": clip, "content_id": f"content of {clip}", "score": score, "rater_id": rater, "error": error}


def together(world: int, act: Callable[[Ranks], Any]) -> list[Any]:
    """What `act` returns on each rank, all at the same time."""
    store = HashStore()
    with ThreadPoolExecutor(world) as threads:
        return list(threads.map(lambda rank: act(Ranks(rank, world, store)), range(world)))


# --- ranks -----------------------------------------------------------------------------------------------------------


def test_each_clip_is_taken_once_and_a_slow_rank_takes_few() -> None:
    def act(ranks: Ranks) -> list[int]:
        mine = []
        for clip in ranks.taken(range(50)):
            mine.append(clip)
            time.sleep(0.2 if ranks.rank == 1 else 0.001)
        return mine

    quick, slow, other = together(3, act)
    assert sorted(quick + slow + other) == list(range(50))
    assert quick == sorted(quick) and len(slow) <= 5


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("clips", [1, 2, 7])
def test_looking_up_is_shared_and_the_answers_are_brought_together(world: int, clips: int) -> None:
    looked_up: list[int] = []

    def known(clip: int) -> bool:
        looked_up.append(clip)
        return clip % 3 == 0

    def act(ranks: Ranks) -> list[int]:
        return ranks.waiting(range(clips), map(known, ranks.share(range(clips))))

    assert together(world, act) == [[clip for clip in range(clips) if clip % 3]] * world
    assert sorted(looked_up) == list(range(clips))


@pytest.mark.parametrize("slow", [0, 1])
def test_rank_0_counts_what_all_have_settled_and_alone_waits_for_the_last(slow: int) -> None:
    ended = []

    def act(ranks: Ranks) -> int:
        def own() -> Iterator[None]:
            for _ in range((3, 5)[ranks.rank]):
                time.sleep(0.1 * (ranks.rank == slow))
                yield

        items = len(list(ranks.settled(own(), 8)))
        ended.append(ranks.rank)
        return items

    assert together(2, act)[0] == 8
    assert ended == [1, 0]


@pytest.mark.parametrize("suffix", FORMS)
@pytest.mark.parametrize("world", [1, 3])
def test_the_rows_of_all_ranks_become_one_file(tmp_path: Path, suffix: str, world: int) -> None:
    clips = [f"{number}.mp4" for number in range(10)]
    output = tmp_path / f"ratings{suffix}"
    seen: list[list[str]] = []

    def act(ranks: Ranks) -> list[str]:
        with ranks.sink(output, clips, "r", False) as sink:
            for clip in reversed(ranks.share(clips)):
                sink.write(row(clip, None if clip == "4.mp4" else 3.0))
            if ranks.rank == 2:
                seen.append(sorted(path.name for path in tmp_path.iterdir() if "rank2" in path.name))
        return [each["clip"] for each in sink.rows]

    first, *_ = together(world, act)
    assert first == clips
    assert read_rows(output) == [row(clip, None if clip == "4.mp4" else 3.0) for clip in clips]
    assert list(tmp_path.iterdir()) == [output]
    assert seen == ([[f"ratings{suffix}.rank2.partial.jsonl"]] if world == 3 else [])


@pytest.mark.parametrize(("clips", "rater"), [(["b", "a"], "r"), (["a"], "r"), (["a", "b"], "other")])
def test_ranks_that_disagree_are_refused(tmp_path: Path, clips: list[str], rater: str) -> None:
    store = HashStore()
    with (
        pytest.raises(RuntimeError, match="ended"),
        Ranks(0, 2, store).sink(tmp_path / "ratings.jsonl", ["a", "b"], "r", False),
    ):
        with (
            pytest.raises(UsageError, match=r"rank 1 would rate other clips, or with another rater, than rank 0"),
            Ranks(1, 2, store).sink(tmp_path / "ratings.jsonl", clips, rater, False),
        ):
            raise AssertionError
        raise RuntimeError("ended")


def test_a_shard_that_rank_0_does_not_see_is_noticed(tmp_path: Path) -> None:
    """As when the ranks' machines have no common file system."""

    def act(ranks: Ranks) -> None:
        output = tmp_path / str(ranks.rank) / "ratings.jsonl"
        with ranks.sink(output, ["a", "b"], "r", False) as sink:
            sink.write(row("ab"[ranks.rank]))

    with pytest.raises(ResultsError, match=r"hold 0 rows, the other ranks wrote 1: all ranks need one file system"):
        together(2, act)
    assert read_rows(tmp_path / "0" / "ratings.jsonl") == [row("a")]
    assert read_rows(shard(tmp_path / "1" / "ratings.jsonl", 1)) == [row("b")]


def test_what_ranks_resume_is_in_the_file_of_all(tmp_path: Path) -> None:
    """A clip that failed is rated again; one that moved is found by its content."""
    output = tmp_path / "ratings.jsonl"
    write_rows(output, [row("a"), row("b"), row("c", None), row("old")])
    clips = ["a", "b", "c", "new"]
    contents = {clip: f"content of {clip}" for clip in clips} | {"new": "content of old"}

    def act(ranks: Ranks) -> list[str]:
        with ranks.sink(output, clips, "r", False) as sink:
            share = ranks.share(clips)
            known = [sink.resume(clip, contents[clip]) is not None for clip in share]
            waiting = ranks.waiting(clips, known)
            for clip in ranks.taken(waiting):
                sink.write(row(clip, 4.0))
        return waiting

    assert together(2, act) == [["c"], ["c"]]
    assert read_rows(output) == [row("a"), row("b"), row("c", 4.0), row("old") | {"clip": "new"}]


def test_a_failure_of_an_earlier_run_is_no_row_of_this_one(tmp_path: Path) -> None:
    write_rows(tmp_path / "ratings.jsonl", [row("a", None)])
    with (
        pytest.raises(ResultsError, match="1 clips of the run have no row"),
        RatingsWriter(tmp_path / "ratings.jsonl", ["a"], "r") as sink,
    ):
        sink.gather(0)


def test_gpus_of_a_machine_are_taken_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "6")
    store = HashStore()
    assert Ranks(9, 16, store).device(None) == Ranks(9, 16, store).device("cuda") == "cuda:2"
    assert Ranks(9, 16, store).device("cpu") == "cpu" and Ranks(9, 16, store).device("cuda:0") == "cuda:0"
    assert Ranks(0, 1, store).device(None) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Ranks(9, 16, store).device(None) is None


def test_ranks_that_cannot_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = Ranks.from_environment()
    assert (alone.rank, alone.world) == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UsageError, match=r"WORLD_SIZE is 2, .* MASTER_ADDR expected.*accelerate launch or torchrun"):
        Ranks.from_environment()


# --- shards that a run left ------------------------------------------------------------------------------------------


def leave(output: Path, *shares: Sequence[dict[str, Any]]) -> None:
    """What ranks above 0 leave that die."""
    for rank, rows in enumerate(shares, 1):
        write_rows(shard(output, rank), rows)


@pytest.mark.parametrize("suffix", FORMS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_ranks_takes_up_what_was_left(tmp_path: Path, suffix: str, world: int) -> None:
    output = tmp_path / f"some [new]*{suffix}"
    clips = list("abcdef")
    write_rows(output if suffix == ".jsonl" else journal(output), [row("a"), row("b", None)])
    leave(output, [row("b", 2.0)], [row("c"), row("d")])
    with shard(output, 2).open("ab") as file:
        file.write(b'{"clip": "e", "content_id": "content of e", "rat')
    other = shard(tmp_path / f"{output.name}.old{suffix}", 1)
    other.write_text("no rows")

    def act(ranks: Ranks) -> list[str]:
        with ranks.sink(output, clips, "r", False) as sink:
            known = [sink.resume(clip, f"content of {clip}") is not None for clip in ranks.share(clips)]
            waiting = ranks.waiting(clips, known)
            for clip in ranks.taken(waiting):
                sink.write(row(clip, 5.0))
        return waiting

    assert together(world, act) == [["e", "f"]] * world
    assert read_rows(output) == [row("a"), row("b", 2.0), row("c"), row("d"), row("e", 5.0), row("f", 5.0)]
    assert sorted(tmp_path.iterdir()) == sorted([output, other])


def test_shards_stay_in_a_run_that_dies_again(tmp_path: Path) -> None:
    """They become part of what grows, before anything new is written."""
    output = tmp_path / "ratings.csv"
    leave(output, [row("a")], [row("b")])
    with pytest.raises(RuntimeError), RatingsWriter(output, list("abc"), "r") as sink:
        sink.write(row("c"))
        raise RuntimeError("died")
    assert list(tmp_path.iterdir()) == [journal(output)]
    assert read_rows(journal(output)) == [row("a"), row("b"), row("c")]


def test_shards_of_another_rater_are_refused_and_stay(tmp_path: Path) -> None:
    output = tmp_path / "ratings.jsonl"
    leave(output, [row("a", rater="other")])
    with pytest.raises(ResultsError, match=r"rank1\.partial\.jsonl holds ratings of another rater"):
        RatingsWriter(output, ["a"], "r").__enter__()
    assert read_rows(shard(output, 1)) == [row("a", rater="other")]


def test_overwriting_forgets_shards(tmp_path: Path) -> None:
    output = tmp_path / "ratings.csv"
    write_rows(output, [row("a", 1.0), row("b", 1.0)])
    shard(output, 1).write_text("no rows")

    def act(ranks: Ranks) -> None:
        with ranks.sink(output, ["a", "b"], "r", True) as sink:
            assert not sink.resumes
            sink.write(row("ab"[ranks.rank]))

    together(2, act)
    assert read_rows(output) == [row("a"), row("b")]
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("overwrite", [True, False])
def test_shards_that_are_being_written_are_left_alone(tmp_path: Path, overwrite: bool) -> None:
    output = tmp_path / "ratings.jsonl"
    with RatingsWriter(output, ["a"], "r", rank=3) as sink:
        sink.write(row("a"))
        with pytest.raises(ResultsError, match="another run is writing it"):
            RatingsWriter(output, ["a"], "r", overwrite).__enter__()
        with RatingsWriter(output, ["a"], "r", overwrite, rank=2):
            pass  # ranks do not mind each other
    assert read_rows(shard(output, 3)) == [row("a")]
    with shard(output, 3).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the sink has let go of it


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(family_dir: Callable[[str], Path]) -> Path:
    return family_dir("qwen2_vl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `clips`: 40 of the same pictures and other bytes, and one that is none."""
    folder = tmp_path_factory.mktemp("wide")
    (folder / "clips").mkdir()
    whole = write_clip(folder / "clip.mp4", frames=150, size=(64, 64)).read_bytes()
    for number in range(40):
        (folder / "clips" / f"{number:02}.mp4").write_bytes(whole + struct.pack(">I4sI", 12, b"free", number))
    (folder / "clips" / "text.mp4").write_text("no video")
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path, model: Path) -> list[dict[str, Any]]:
    """The rows of one process."""
    done = subprocess.run(command("alone.jsonl", model), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    return rows(folder / "alone.jsonl")


def rows(path: Path) -> list[dict[str, Any]]:
    """All columns but the time that was spent."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read_rows(path)]


def command(output: str, model: Path, *options: str, processes: int = 1) -> list[str]:
    """`lmm-qa rate`, under `accelerate launch` where there are several processes."""
    several = ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1", "--main_process_port", "0"]
    launch = ["-m", "accelerate.commands.launch", *several, "--mixed_precision", "no", "--dynamo_backend", "no"]
    start = [sys.executable, *(launch if processes > 1 else []), "-m", "lmm_qa", "rate"]
    return [*start, "clips", "-o", output, "-m", str(model), *FAST, *options]


def written(folder: Path, output: str) -> dict[str, list[str]]:
    """The whole lines of each file of a run that is going or has died."""
    return {path.name: re.findall(r".*\n", path.read_text()) for path in folder.glob(f"{output}*")}


def in_need(folder: Path, running: subprocess.Popen[str], output: str, lines: int) -> None:
    """Wait until a run has written so many rows."""
    while sum(map(len, written(folder, output).values())) < lines:
        assert running.poll() is None, running.communicate()[1]
        time.sleep(0.01)


@pytest.mark.timeout(900)
def test_a_rank_that_is_killed_loses_nothing_and_three_end_it_as_one(
    folder: Path, model: Path, alone: list[dict[str, Any]]
) -> None:
    with subprocess.Popen(command("two.csv", model, processes=2), cwd=folder, stderr=subprocess.PIPE, text=True) as run:
        in_need(folder, run, "two.csv", 8)
        ranks = {
            each.environ()["RANK"]: each
            for each in psutil.Process(run.pid).children()
            if each.environ().get("RANK") and "lmm_qa" in each.cmdline()
        }
        assert sorted(ranks) == ["0", "1"]
        while not (folder / "two.csv.rank1.partial.jsonl").exists() and run.poll() is None:
            time.sleep(0.01)  # on a busy machine the other rank has written its first rows alone
        os.kill(ranks["1"].pid, signal.SIGKILL)
        run.communicate(timeout=120)
        assert run.returncode == 1
    left = written(folder, "two.csv")
    before = sum(map(len, left.values()))
    assert left.keys() == {"two.csv.partial.jsonl", "two.csv.rank1.partial.jsonl"} and before < 41
    failed = sum("ClipUnreadable" in line for lines in left.values() for line in lines)
    done = subprocess.run(command("two.csv", model, processes=3), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1 and re.search(r"exitcode *: 3 ", done.stderr), done.stderr  # the launcher has but 0, 1
    assert f"{before - failed} of 41 clips rated in two.csv already" in done.stderr
    assert done.stderr.count("41 clips") == 1 and done.stderr.count("model ") <= 2, "only rank 0 speaks"
    assert f"40 clips rated, 1 could not be rated; {41 - before + failed} now" in done.stderr
    assert rows(folder / "two.csv") == alone
    assert written(folder, "two.csv").keys() == {"two.csv"}


@pytest.mark.parametrize(("environment", "options"), [({}, ["--engine", "ray"]), ({"WORLD_SIZE": "2"}, [])])
def test_several_processes_need_a_file(
    folder: Path, environment: dict[str, str], options: list[str], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(
        Ranks, "from_environment", lambda: Ranks(0, int(environment.get("WORLD_SIZE", "1")), HashStore())
    )
    monkeypatch.setattr(sys, "argv", ["lmm-qa", "rate", str(folder / "clips"), *options])
    with pytest.raises(SystemExit) as ended:
        lmm_qa.cli.app.main()
    assert ended.value.code == 2
    assert "they need a file: -o ratings.jsonl" in capfd.readouterr().err


# --- Ray -------------------------------------------------------------------------------------------------------------


def test_devices_that_no_cluster_has_are_refused() -> None:
    with pytest.raises(UsageError, match=r"--device is cuda or cpu, received 'cuda:1'"):
        RayRaters(Plan(device="cuda:1"), 1, print)  # type: ignore[arg-type]


def test_without_ray_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"--engine ray needs ray, .* pip install 'lmm-qa\[ray\]'"):
        RayRaters(Plan(), 1, print)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Plan:
    """Stands for a plan of which only the device matters."""

    device: str | None = None
    dtype: str | None = None


def test_the_queue_gives_back_in_order_and_nothing_to_the_dismissed() -> None:
    clips = [Clip(Path(name), name, "argument") for name in "abcd"]
    queue = _Queue(clips)
    assert [queue.take(1), queue.take(2), queue.take(1)] == clips[:3]
    queue.put_back(queue.dismiss(1))
    assert queue.take(1) is None
    assert [queue.take(2) for _ in range(4)] == [clips[0], clips[2], clips[3], None]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A Ray cluster of one node with one core; tests add others."""
    pytest.importorskip("ray", reason="pip install 'lmm-qa[ray]'")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


def at_work(node: Any, running: subprocess.Popen[str]) -> psutil.Process:
    """Wait until the rater on a node of Ray has taken a clip, and a decoding process has it."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    while running.poll() is None:
        for each in raylet.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if "_serve" in " ".join(each.cmdline()) and (rater := each.parent()):
                    return rater
        time.sleep(0.02)
    raise AssertionError(running.communicate()[1])


@pytest.mark.timeout(900)
def test_a_ray_node_is_killed_and_the_rows_are_those_of_one_process(
    nodes: Any, folder: Path, model: Path, alone: list[dict[str, Any]]
) -> None:
    second = nodes.add_node(num_cpus=1)
    run = subprocess.Popen(
        command("ray.jsonl", model, "--engine", "ray"),
        cwd=folder,
        env=os.environ | {"RAY_ADDRESS": nodes.address},
        stderr=subprocess.PIPE,
        text=True,
    )
    with run:
        first = at_work(nodes.head_node, run)
        first.suspend()  # or it might be done before the other begins
        at_work(second, run)
        nodes.remove_node(second, allow_graceful=False)
        before = sum(map(len, written(folder, "ray.jsonl").values()))
        first.resume()
        _, said = run.communicate(timeout=400)
    assert before < 41
    assert run.returncode == 3, said
    assert "in 2 raters on a Ray cluster" in said and "a rater was lost" in said
    assert rows(folder / "ray.jsonl") == alone


@pytest.fixture
def driver(nodes: Any) -> Iterator[Any]:
    """This process as one that asks the cluster."""
    import ray

    nodes.wait_for_nodes(60)  # until those that are dead count as dead
    ray.init(address=nodes.address, log_to_driver=False, logging_level="error")
    yield ray
    ray.shutdown()


def raters(load: Callable[[], Any], said: list[str], chosen: str = "") -> RayRaters:
    """Raters that a function makes, which Ray takes along."""

    @dataclass(frozen=True)
    class Made:
        device: str | None = None
        dtype: str | None = None
        dtype_chosen: str = chosen

        def load(self) -> Any:
            return load()

    return RayRaters(Made(), 1, said.append)  # type: ignore[arg-type]


@pytest.mark.timeout(900)
def test_clips_of_a_lost_node_go_to_a_rater_that_had_nothing_left_to_do(
    nodes: Any, driver: Any, tmp_path: Path
) -> None:
    second = nodes.add_node(num_cpus=1)
    head, taken = driver.get_runtime_context().get_node_id(), tmp_path / "taken"

    class Fake:
        def rate_all(self, clips: Iterator[Clip]) -> Iterator[Any]:
            import ray

            if ray.get_runtime_context().get_node_id() != head:
                taken.write_text(next(clips).name)
                time.sleep(1000)
            while not taken.exists():
                time.sleep(0.1)
            for clip in clips:
                yield SimpleNamespace(clip=clip.name)

    clips = [Clip(Path(name), name, "argument") for name in "abcd"]
    said: list[str] = []
    both = raters(Fake, said)
    assert both.number == 2
    rated = []
    for result in both.rate(clips):
        rated.append(result.clip)
        if len(rated) == 3:
            time.sleep(1)  # the other rater comes to its end
            nodes.remove_node(second, allow_graceful=False)
    assert sorted(rated) == list("abcd") and rated[-1] == taken.read_text()
    assert len(said) == 1 and "1 of its clips" in said[0]


@pytest.mark.timeout(900)
def test_what_goes_wrong_in_a_ray_rater_is_told(driver: Any) -> None:
    said: list[str] = []

    def broken() -> Any:
        raise ModelError("cut short")

    def crash() -> Any:
        os._exit(1)

    clips = [Clip(Path(f"{number}.mp4"), f"{number}.mp4", "argument") for number in range(3)]
    with pytest.raises(ModelError, match="cut short"):
        list(raters(broken, said).rate(clips))
    assert not said
    dying = raters(crash, said)
    with pytest.raises(LmmQaError, match="raters die one after the other"):
        list(dying.rate(clips))
    assert len(said) == LOSSES * dying.number + 1


@pytest.mark.timeout(900)
def test_gpus_of_a_ray_cluster_decide_how_many_raters_and_in_which_numbers(nodes: Any, driver: Any) -> None:
    """The cluster believes what is said of a node's GPUs."""
    with pytest.raises(UsageError, match="no node of the Ray cluster has a GPU"):
        RayRaters(Plan(device="cuda"), 1, print)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no node of the Ray cluster has 2 cores"):
        RayRaters(Plan(), 2, print)  # type: ignore[arg-type]
    cpu = raters(print, [], "float64")
    assert (cpu.number, cpu.plan.device, cpu.plan.dtype) == (1, "cpu", None)
    nodes.add_node(num_cpus=2, num_gpus=2)
    gpu = raters(print, [], "float64")
    assert (gpu.number, gpu.plan.device, gpu.plan.dtype) == (2, None, "float64")
