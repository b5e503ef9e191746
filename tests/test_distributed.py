"""python -m pytest tests/test_distributed.py

Ranks as threads with a store in memory, then as the processes of `accelerate launch`; a Ray cluster of two nodes.
"""

from __future__ import annotations

import os
import re
import signal
import socket
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
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, but not in __all__

import lmm_qa.cli.app
import lmm_qa.distributed
from lmm_qa.distributed import ClipQueue, Ranks, RayRaters
from lmm_qa.errors import LmmQaError, MissingExtra, ModelError, RankLost, ResultsError, UsageError
from lmm_qa.files.tables import journal, read_rows, write_rows
from lmm_qa.manifest import Clip
from lmm_qa.ratings.io import RatingsWriter, shard

fcntl = pytest.importorskip("fcntl", reason="Windows has neither these locks nor SIGKILL")

FORMS = (".jsonl", ".csv", ".parquet")
FAST = ("--device", "cpu", "--sampling", "uniform:2", "--view", "whole:56", "--workers", "1", "--batch-size", "1")
"""One clip per batch, so that the last digits of a score do not depend on which process rated which clips."""


def row(clip: str, score: float | None = 3.0, rater: str = "r") -> dict[str, Any]:
    error = None if score is not None else {"class": "ClipUnreadable", "message": "broken"}
    return {"clip": clip, "content_id": f"content of {clip}", "score": score, "rater_id": rater, "error": error}


def together(world: int, act: Callable[[Ranks], Any]) -> list[Any]:
    """Run `act` on all ranks at the same time; returns its results."""
    store = HashStore()
    with ThreadPoolExecutor(world) as threads:
        return list(threads.map(lambda rank: act(Ranks(rank, world, store)), range(world)))


# --- ranks -----------------------------------------------------------------------------------------------------------


def test_each_clip_is_claimed_once_and_a_slow_rank_claims_few() -> None:
    def act(ranks: Ranks) -> list[int]:
        mine = []
        for clip in ranks.claim(range(50)):
            mine.append(clip)
            time.sleep(0.2 if ranks.rank == 1 else 0.001)
        return mine

    quick, slow, other = together(3, act)
    assert sorted(quick + slow + other) == list(range(50))
    assert quick == sorted(quick) and len(slow) <= 5


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("clips", [1, 2, 7])
def test_ranks_divide_the_lookup_and_share_its_result(world: int, clips: int) -> None:
    looked_up: list[int] = []

    def known(clip: int) -> bool:
        looked_up.append(clip)
        return clip % 3 == 0

    def act(ranks: Ranks) -> list[int]:
        return ranks.unrated(range(clips), map(known, ranks.part(range(clips))))

    assert together(world, act) == [[clip for clip in range(clips) if clip % 3]] * world
    assert sorted(looked_up) == list(range(clips))


@pytest.mark.parametrize("slow", [0, 1])
def test_rank_0_counts_the_rows_of_all_and_waits_for_the_last(slow: int) -> None:
    ended = []

    def act(ranks: Ranks) -> int:
        def own() -> Iterator[None]:
            for _ in range((3, 5)[ranks.rank]):
                time.sleep(0.1 * (ranks.rank == slow))
                yield

        items = len(list(ranks.count_rows(own(), 8)))
        ended.append(ranks.rank)
        return items

    assert together(2, act)[0] == 8
    assert ended == [1, 0]


@pytest.mark.parametrize("suffix", FORMS)
@pytest.mark.parametrize("world", [1, 3])
def test_the_rows_of_all_ranks_are_merged_into_one_file(tmp_path: Path, suffix: str, world: int) -> None:
    clips = [f"{number}.mp4" for number in range(10)]
    output = tmp_path / f"ratings{suffix}"
    seen: list[list[str]] = []

    def act(ranks: Ranks) -> list[str]:
        with ranks.writer(output, clips, "r", False) as writer:
            for clip in reversed(ranks.part(clips)):
                writer.write(row(clip, None if clip == "4.mp4" else 3.0))
            if ranks.rank == 2:
                seen.append(sorted(path.name for path in tmp_path.iterdir() if "rank2" in path.name))
        return [each["clip"] for each in writer.rows]

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
        Ranks(0, 2, store).writer(tmp_path / "ratings.jsonl", ["a", "b"], "r", False),
    ):
        with (
            pytest.raises(UsageError, match=r"rank 1 has other clips or another rater than rank 0"),
            Ranks(1, 2, store).writer(tmp_path / "ratings.jsonl", clips, rater, False),
        ):
            raise AssertionError
        raise RuntimeError("ended")


def test_a_shard_that_rank_0_cannot_see_is_an_error(tmp_path: Path) -> None:
    """As when the ranks' machines have no common file system."""

    def act(ranks: Ranks) -> None:
        output = tmp_path / str(ranks.rank) / "ratings.jsonl"
        with ranks.writer(output, ["a", "b"], "r", False) as writer:
            writer.write(row("ab"[ranks.rank]))

    with pytest.raises(ResultsError, match="contain 0 rows, but the other ranks wrote 1: all ranks need the same file"):
        together(2, act)
    assert read_rows(tmp_path / "0" / "ratings.jsonl") == [row("a")]
    assert read_rows(shard(tmp_path / "1" / "ratings.jsonl", 1)) == [row("b")]


def test_resumed_rows_are_in_the_merged_file(tmp_path: Path) -> None:
    """A clip that failed is rated again; one that moved is found by its content."""
    output = tmp_path / "ratings.jsonl"
    write_rows(output, [row("a"), row("b"), row("c", None), row("old")])
    clips = ["a", "b", "c", "new"]
    contents = {clip: f"content of {clip}" for clip in clips} | {"new": "content of old"}

    def act(ranks: Ranks) -> list[str]:
        with ranks.writer(output, clips, "r", False) as writer:
            share = ranks.part(clips)
            known = [writer.resume(clip, contents[clip]) is not None for clip in share]
            waiting = ranks.unrated(clips, known)
            for clip in ranks.claim(waiting):
                writer.write(row(clip, 4.0))
        return waiting

    assert together(2, act) == [["c"], ["c"]]
    assert read_rows(output) == [row("a"), row("b"), row("c", 4.0), row("old") | {"clip": "new"}]


def test_a_failure_of_an_earlier_run_does_not_count_as_rated(tmp_path: Path) -> None:
    write_rows(tmp_path / "ratings.jsonl", [row("a", None)])
    with (
        pytest.raises(ResultsError, match="1 clips of the run have no row"),
        RatingsWriter(tmp_path / "ratings.jsonl", ["a"], "r") as writer,
    ):
        writer.gather(0)


def test_ranks_use_the_gpus_of_a_machine_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "6")
    store = HashStore()
    assert Ranks(9, 16, store).device(None) == Ranks(9, 16, store).device("cuda") == "cuda:2"
    assert Ranks(9, 16, store).device("cpu") == "cpu" and Ranks(9, 16, store).device("cuda:0") == "cuda:0"
    assert Ranks(0, 1, store).device(None) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Ranks(9, 16, store).device(None) is None


def test_missing_rendezvous_variables_are_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = Ranks.from_environment()
    assert (alone.rank, alone.world) == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UsageError, match=r"WORLD_SIZE is 2, .* MASTER_ADDR expected.*accelerate launch or torchrun"):
        Ranks.from_environment()


# --- shards that a run left ------------------------------------------------------------------------------------------


def leave_shards(output: Path, *shares: Sequence[dict[str, Any]]) -> None:
    """Write the files that ranks above 0 leave when they die."""
    for rank, rows in enumerate(shares, 1):
        write_rows(shard(output, rank), rows)


@pytest.mark.parametrize("suffix", FORMS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_ranks_resumes_from_the_shards_of_a_dead_run(tmp_path: Path, suffix: str, world: int) -> None:
    output = tmp_path / f"some [new]*{suffix}"
    clips = list("abcdef")
    write_rows(output if suffix == ".jsonl" else journal(output), [row("a"), row("b", None)])
    leave_shards(output, [row("b", 2.0)], [row("c"), row("d")])
    with shard(output, 2).open("ab") as file:
        file.write(b'{"clip": "e", "content_id": "content of e", "rat')
    other = shard(tmp_path / f"{output.name}.old{suffix}", 1)
    other.write_text("no rows")

    def act(ranks: Ranks) -> list[str]:
        with ranks.writer(output, clips, "r", False) as writer:
            known = [writer.resume(clip, f"content of {clip}") is not None for clip in ranks.part(clips)]
            waiting = ranks.unrated(clips, known)
            for clip in ranks.claim(waiting):
                writer.write(row(clip, 5.0))
        return waiting

    assert together(world, act) == [["e", "f"]] * world
    assert read_rows(output) == [row("a"), row("b", 2.0), row("c"), row("d"), row("e", 5.0), row("f", 5.0)]
    assert sorted(tmp_path.iterdir()) == sorted([output, other])


def test_rows_of_shards_survive_a_second_crash(tmp_path: Path) -> None:
    """They become part of what grows, before anything new is written."""
    output = tmp_path / "ratings.csv"
    leave_shards(output, [row("a")], [row("b")])
    with pytest.raises(RuntimeError), RatingsWriter(output, list("abc"), "r") as writer:
        writer.write(row("c"))
        raise RuntimeError("died")
    assert list(tmp_path.iterdir()) == [journal(output)]
    assert read_rows(journal(output)) == [row("a"), row("b"), row("c")]


def test_shards_of_another_rater_are_refused_and_not_deleted(tmp_path: Path) -> None:
    output = tmp_path / "ratings.jsonl"
    leave_shards(output, [row("a", rater="other")])
    with pytest.raises(ResultsError, match=r"rank1\.partial\.jsonl contains ratings of another rater"):
        RatingsWriter(output, ["a"], "r").__enter__()
    assert read_rows(shard(output, 1)) == [row("a", rater="other")]


def test_overwrite_discards_shards(tmp_path: Path) -> None:
    output = tmp_path / "ratings.csv"
    write_rows(output, [row("a", 1.0), row("b", 1.0)])
    shard(output, 1).write_text("no rows")

    def act(ranks: Ranks) -> None:
        with ranks.writer(output, ["a", "b"], "r", True) as writer:
            assert not writer.resumes
            writer.write(row("ab"[ranks.rank]))

    together(2, act)
    assert read_rows(output) == [row("a"), row("b")]
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("overwrite", [True, False])
def test_shards_that_are_being_written_are_not_touched(tmp_path: Path, overwrite: bool) -> None:
    output = tmp_path / "ratings.jsonl"
    with RatingsWriter(output, ["a"], "r", rank=3) as writer:
        writer.write(row("a"))
        with pytest.raises(ResultsError, match="another run is writing it"):
            RatingsWriter(output, ["a"], "r", overwrite).__enter__()
        with RatingsWriter(output, ["a"], "r", overwrite, rank=2):
            pass  # the ranks of one run do not block each other
    assert read_rows(shard(output, 3)) == [row("a")]
    with shard(output, 3).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the writer has released its lock


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(family_dir: Callable[[str], Path]) -> Path:
    return family_dir("qwen2_vl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `clips`: 40 with the same pictures and different bytes, and one that is not a video."""
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
    rate_here(folder, "alone.jsonl", model)
    return rows(folder / "alone.jsonl")


def rate_here(folder: Path, output: str, model: Path) -> None:
    """`lmm-qa rate` in this process: all clips but one can be rated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["lmm-qa", *command(output, model)[3:]])
        with pytest.raises(SystemExit) as ended:
            lmm_qa.cli.app.main()
    assert ended.value.code == 3


def rows(path: Path) -> list[dict[str, Any]]:
    """All columns except the time spent."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read_rows(path)]


def command(
    output: str, model: Path, *options: str, processes: int = 1, program: Sequence[str] = ("-m", "lmm_qa")
) -> list[str]:
    """`lmm-qa rate`, under `accelerate launch` where there are several processes."""
    several = ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1", "--main_process_port", "0"]
    launch = ["-m", "accelerate.commands.launch", *several, "--mixed_precision", "no", "--dynamo_backend", "no"]
    start = [sys.executable, *(launch if processes > 1 else []), *program, "rate"]
    return [*start, "clips", "-o", output, "-m", str(model), *FAST, *options]


def written(folder: Path, output: str) -> dict[str, list[str]]:
    """The complete lines in each file of a run that is going on or has died."""
    return {path.name: re.findall(r".*\n", path.read_text()) for path in folder.glob(f"{output}*")}


HELD = """
import time
from pathlib import Path

import lmm_qa.distributed
from lmm_qa.cli.app import main
from lmm_qa.distributed import Ranks

KILLED, FLAG = {killed}, Path({flag!r})
lmm_qa.distributed.HEARTBEAT_SECONDS, lmm_qa.distributed.HEARTBEAT_TIMEOUT = 0.2, 10.0
claim = Ranks.claim

def held(ranks, clips):
    for number, clip in enumerate(claim(ranks, clips), 1):
        if ranks.rank == KILLED and number == 8:
            FLAG.touch()
            time.sleep(1000)
        if ranks.rank != KILLED and number == 8:
            while not FLAG.exists():
                time.sleep(0.05)
            while KILLED == 0:
                ranks._store.check(["never"])
                time.sleep(0.05)
        yield clip

Ranks.claim = held
main()
"""


def held(folder: Path, killed: int) -> str:
    """Write a program: `lmm-qa`, whose rank `killed` keeps its 8th clip until it is killed, however busy the machine.

    The other ranks wait with their 8th clip until then, and if rank 0 is killed, until they notice that.
    """
    flag = folder / "held"
    flag.unlink(missing_ok=True)
    program = folder / f"held{killed}.py"
    program.write_text(HELD.format(killed=killed, flag=str(flag)))
    return str(program)


def wait_until_held(folder: Path, running: subprocess.Popen[str], output: str) -> None:
    """Wait until the rank to be killed keeps a clip, two ranks have written rows, and all together at least six."""

    def ready() -> bool:
        rows = [len(lines) for lines in written(folder, output).values()]
        return (folder / "held").exists() and sum(rows) >= 6 and sum(map(bool, rows)) >= 2

    while not ready():
        assert running.poll() is None, running.communicate()[1]
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_after_a_rank_is_killed_three_ranks_resume_without_loss(
    folder: Path, model: Path, alone: list[dict[str, Any]]
) -> None:
    program = held(folder, killed=1)
    start = command("two.csv", model, processes=2, program=[program])
    with subprocess.Popen(start, cwd=folder, stderr=subprocess.PIPE, text=True) as run:
        wait_until_held(folder, run, "two.csv")
        ranks = {
            each.environ()["RANK"]: each
            for each in psutil.Process(run.pid).children()
            if each.environ().get("RANK") and program in each.cmdline()
        }
        assert sorted(ranks) == ["0", "1"]
        os.kill(ranks["1"].pid, signal.SIGKILL)
        run.communicate(timeout=120)
        assert run.returncode == 1
    left = written(folder, "two.csv")
    before = sum(map(len, left.values()))
    assert left.keys() == {"two.csv.partial.jsonl", "two.csv.rank1.partial.jsonl"} and before < 41
    failed = sum("ClipUnreadable" in line for lines in left.values() for line in lines)
    done = subprocess.run(command("two.csv", model, processes=3), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1 and re.search(r"exitcode *: 3 ", done.stderr), done.stderr  # the launcher has but 0, 1
    assert f"{before - failed} of 41 clips already rated in two.csv" in done.stderr
    assert done.stderr.count("41 clips") == 1 and done.stderr.count("model ") <= 2, "only rank 0 prints"
    assert f"40 clips rated, 1 could not be rated; {41 - before + failed} new" in done.stderr
    assert rows(folder / "two.csv") == alone
    assert written(folder, "two.csv").keys() == {"two.csv"}


# --- ranks that die --------------------------------------------------------------------------------------------------


def test_a_rank_without_a_heartbeat_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmm_qa.distributed, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(lmm_qa.distributed, "HEARTBEAT_TIMEOUT", 0.5)
    store = HashStore()
    rank0, rank1 = Ranks(0, 3, store), Ranks(1, 3, store)
    rank1.start_heartbeat(store)
    start = time.monotonic()
    with pytest.raises(RankLost, match=r"rank 2 of 3 has died or cannot be reached: no heartbeat for 0\.5 s"):
        rank0.unrated(["a", "b", "c"], [False])
    assert time.monotonic() - start < 10


def test_a_rank_that_is_done_needs_no_heartbeat(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lmm_qa.distributed, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(lmm_qa.distributed, "HEARTBEAT_TIMEOUT", 0.5)

    def act(ranks: Ranks) -> None:
        ranks.start_heartbeat(ranks._store)
        with ranks.writer(tmp_path / "ratings.jsonl", ["a", "b", "c"], "r") as writer:
            if ranks.rank == 2:
                time.sleep(2)  # rank 1 has long finished
            writer.write(row("abc"[ranks.rank]))

    together(3, act)
    assert read_rows(tmp_path / "ratings.jsonl") == [row("a"), row("b"), row("c")]


def start_ranks(world: int, folder: Path, output: str, model: Path, killed: int) -> list[subprocess.Popen[str]]:
    """Processes that nobody ends when one dies, as on several machines without a common launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    arguments = [sys.executable, held(folder, killed), *command(output, model)[3:]]
    return [
        subprocess.Popen(arguments, cwd=folder, env=common | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("killed", "message"),
    [
        (1, "error: rank 1 of 3 has died or cannot be reached: no heartbeat for 10 s. Rows written so far are kept"),
        (0, "error: lost the connection between the ranks; rank 0 or the launcher has died"),
    ],
)
def test_the_death_of_a_rank_ends_the_run_and_it_can_be_resumed(
    folder: Path, model: Path, alone: list[dict[str, Any]], killed: int, message: str
) -> None:
    output = f"killed{killed}.jsonl"
    ranks = start_ranks(3, folder, output, model, killed)
    try:
        wait_until_held(folder, ranks[killed], output)
        ranks[killed].kill()
        start = time.monotonic()
        messages = [rank.communicate(timeout=120)[1] for rank in ranks]
        assert time.monotonic() - start < 60
    finally:
        for rank in ranks:
            rank.kill()
    assert message in "".join(messages)
    assert "Traceback" not in "".join(messages)
    # Rank 0 waits for the others; they wait for nobody, but cannot claim clips without rank 0, which holds the list.
    failed = {0} if killed else {1, 2}
    codes = [rank.returncode for rank in ranks]
    assert {rank for rank in range(3) if codes[rank] == 1} == failed, (codes, messages)
    before = sum(map(len, written(folder, output).values()))
    assert 6 <= before < 41
    rate_here(folder, output, model)
    assert rows(folder / output) == alone
    assert written(folder, output).keys() == {output}


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
    assert "need a file: -o ratings.jsonl" in capfd.readouterr().err


# --- Ray -------------------------------------------------------------------------------------------------------------


def test_ray_refuses_a_numbered_device() -> None:
    with pytest.raises(UsageError, match=r"--device is cuda or cpu, received 'cuda:1'"):
        RayRaters(plan(device="cuda:1"), 1, print)


def test_without_ray_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"--engine ray needs ray, .* pip install 'lmm-qa\[ray\]'"):
        RayRaters(plan(), 1, print)


def plan(dtype: str = "float32", **load_options: Any) -> Any:
    """Stands for a `RaterPlan` of which only device and dtype matter."""

    @dataclass(frozen=True)
    class Plan:  # local: Ray pickles it by value, its workers cannot import this file
        load_options: dict[str, Any]
        dtype: str

    return Plan(load_options, dtype)


def test_the_queue_returns_clips_in_order_and_none_to_dismissed_raters() -> None:
    clips = [Clip(Path(name), name, "argument") for name in "abcd"]
    queue = ClipQueue(clips)
    assert [queue.take(1), queue.take(2), queue.take(1)] == clips[:3]
    queue.put_back(queue.dismiss(1))
    assert queue.take(1) is None
    assert [queue.take(2) for _ in range(4)] == [clips[0], clips[2], clips[3], None]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A Ray cluster of one node with one core; tests add others."""
    pytest.importorskip("ray", reason="pip install 'lmm-qa[ray]'")
    from ray.cluster_utils import Cluster

    # Twice a second instead of every three seconds, Ray asks whether a node is alive; a busy one has as long to answer.
    checks = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500}
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": checks}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    cluster.shutdown()


def wait_for_rater(node: Any, running: subprocess.Popen[str]) -> psutil.Process:
    """Wait until the rater on a node of Ray has taken a clip, and a decoding process has it."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    while running.poll() is None:
        for each in raylet.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if "decoder_pool" in " ".join(each.cmdline()) and (rater := each.parent()):
                    return rater
        time.sleep(0.02)
    raise AssertionError(running.communicate()[1])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_after_a_ray_node_is_killed_the_rows_are_those_of_one_process(
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
        first = wait_for_rater(nodes.head_node, run)
        first.suspend()  # or it might be done before the other begins
        wait_for_rater(second, run)
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


def raters(load: Callable[[], Any], messages: list[str], dtype: str = "float32") -> RayRaters:
    """Raters made by a function, which Ray sends to the nodes."""
    return RayRaters(plan(dtype), 1, messages.append, lambda _: load())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_idle_rater_takes_over_the_clips_of_a_lost_node(nodes: Any, driver: Any, tmp_path: Path) -> None:
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


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_errors_of_ray_raters_are_reported(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmm_qa.distributed, "MAX_LOSSES", 1)
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
    with pytest.raises(LmmQaError, match="raters keep dying"):
        list(dying.rate(clips))
    assert len(said) == dying.number + 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_gpus_of_a_ray_cluster_determine_number_and_dtype_of_raters(nodes: Any, driver: Any) -> None:
    """The cluster does not check the declared number of GPUs."""
    with pytest.raises(UsageError, match="no node of the Ray cluster has a GPU"):
        RayRaters(plan(device="cuda"), 1, print)
    with pytest.raises(UsageError, match="no node of the Ray cluster has 2 cores"):
        RayRaters(plan(), 2, print)
    cpu = raters(print, [], "float64")
    assert (cpu.number, cpu.plan.load_options) == (1, {"device": "cpu"})
    nodes.add_node(num_cpus=2, num_gpus=2)
    gpu = raters(print, [], "float64")
    assert (gpu.number, gpu.plan.load_options) == (2, {"dtype": "float64"})
