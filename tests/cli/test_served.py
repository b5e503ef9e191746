"""python -m pytest tests/cli/test_served.py

The command with a served model: what is printed, what is kept when the server goes away, and what never leaves.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Command
from model_server import ModelServer, drop, status, works
from paths import EMBEDDED, SAMPLES

from lmm_qa import Rater, Sampling, View
from lmm_qa.files.tables import read_rows
from lmm_qa.model import server as server_module
from lmm_qa.model.served import ServedBackbone

KEY = "sk-secret-0123456789"
FAST = ("--sampling", "uniform:2", "--view", "whole:84", "--workers", "1")


@pytest.fixture(scope="module")
def running() -> Iterator[ModelServer]:
    with ModelServer(EMBEDDED / "base").running() as server:
        yield server


@pytest.fixture
def server(running: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelServer:
    """A server; and a working directory with five clips, one of them broken."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(server_module, "FIRST_DELAY", 0.0)
    monkeypatch.setattr(ServedBackbone, "parallel_batches", 1)
    monkeypatch.setenv("LMM_QA_API_KEY", KEY)
    (tmp_path / "clips").mkdir()
    for number, name in enumerate(("astronaut_clean", "avatar_clean", "astronaut_noise_strong", "astronaut_blur_mild")):
        shutil.copyfile(SAMPLES / f"{name}.mp4", tmp_path / "clips" / f"{number}.mp4")
    (tmp_path / "clips" / "5.mp4").write_text("no video")
    running.received, running.faults = [], []
    return running


def test_a_run_whose_server_goes_away_resumes(server: ModelServer, command: Command, tmp_path: Path) -> None:
    rate = ("rate", "clips", "-m", server.url, *FAST, "-o", "ratings.jsonl")
    server.faults = [works, works, works, *[drop] * server_module.ATTEMPTS]  # the first question has black frames
    done = command(*rate)
    assert done.code == 1
    assert done.err.count(f"note: the sampled frames of each clip are sent to {server.url}") == 1
    assert f"server {server.url} (vLLM 0.32.0), level probabilities exact" in done.err
    assert done.err.count("error: ") == 1
    assert "Rows written so far are kept; with -o, the same command resumes" in done.err
    kept = [path for path in tmp_path.iterdir() if path.is_file()]
    rows = [json.loads(line) for path in kept for line in path.read_text().splitlines()]
    assert [(row["clip"], row["error"]) for row in rows] == [("0.mp4", None), ("1.mp4", None)]

    server.faults, server.received = [works, works, status(400, f"too long for {KEY}")], []
    done = command(*rate)
    assert done.code == 3
    assert "2 of 5 clips already rated" in done.err
    assert len(server.received) == 2 + 1 + 2, "rated clips are not asked about again"
    found = {row["clip"]: row for row in read_rows(tmp_path / "ratings.jsonl")}
    assert [found[row["clip"]] for row in rows] == rows
    errors = {name: row["error"]["class"] for name, row in found.items() if row["error"]}
    assert errors == {"3.mp4": "ServerError", "5.mp4": "ClipUnreadable"}
    assert "400 Bad Request: too long for ***" in found["3.mp4"]["error"]["message"]

    assert command(*rate).code == 3
    found = {row["clip"]: row for row in read_rows(tmp_path / "ratings.jsonl")}
    local = Rater.from_pretrained(
        EMBEDDED / "base", device="cpu", sampling=Sampling(frames=2), views=[View(max_pixels=84 * 84)]
    )
    for name in ("0.mp4", "3.mp4"):
        assert found[name]["score"] == pytest.approx(local.rate(tmp_path / "clips" / name).score, abs=1e-4)
    assert {headers["Authorization"] for _, headers, _ in server.received} == {f"Bearer {KEY}"}
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*.jsonl"))
    assert KEY.encode() not in written and KEY not in done.err + done.out


def test_a_dry_run_sends_nothing_of_the_clips(server: ModelServer, command: Command) -> None:
    done = command("rate", "clips", "-m", server.url, *FAST, "--dry-run")
    assert done.code == 0
    assert "4 clips would be rated, 1 could not; at most" in done.err
    assert "memory" not in done.err
    assert {body for _, _, body in server.received} == {None}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--device", "cpu"), "--device cannot be used with a served model"),
        (("--defects", "--answers-from", "base"), "--answers-from base cannot be used with a served model"),
        (("--engine", "ray", "-o", "ratings.jsonl"), "--engine ray loads models on a cluster"),
        (("--served-model", "reter"), "does not serve 'reter'"),
    ],
)
def test_options_that_do_not_apply(
    server: ModelServer, command: Command, options: tuple[str, ...], problem: str
) -> None:
    done = command("rate", "clips", "-m", server.url, *options)
    assert done.code == 2
    assert problem in done.err
    assert server.questions == []
