"""python -m pytest tests/model/test_hub.py

Against a small HTTP server that answers like the Hugging Face hub. huggingface_hub reads the address of the hub when it
is imported, so every look-up runs in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

FIRST, SECOND = "1" * 40, "2" * 40

RESOLVE = """
import json, sys, time
from lmm_qa.errors import LmmQaError
from lmm_qa.model.source import compute_rater_id, resolve_model
start = time.monotonic()
try:
    source = resolve_model(*sys.argv[1:])
    result = {
        "revision": source.revision,
        "backbone": source.backbone,
        "adapter": str(source.adapter),
        "scale": source.settings.scale,
        "note": source.note,
        "calibration": str(source.calibration),
        "rater_id": compute_rater_id(source, source.settings, "float32", None),
    }
except LmmQaError as error:
    result = {"error": f"{type(error).__name__}: {error}"}
print(json.dumps(result | {"seconds": time.monotonic() - start}))
"""

LOAD_PROCESSOR = """
import json, sys, time
import transformers, huggingface_hub
from lmm_qa.errors import ModelError
from lmm_qa.model.loading import load_processor
transformers.AutoProcessor  # imported before the clock starts
start = time.monotonic()
try:
    load_processor(*sys.argv[1:])
    result = {}
except ModelError as error:
    result = {"error": str(error)}
print(json.dumps(result | {"seconds": time.monotonic() - start}))
"""


class Hub(ThreadingHTTPServer):
    """A hub with models of several commits; `main` is the last one."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.models: dict[str, dict[str, dict[str, str]]] = {}
        self.status: dict[str, int] = {}
        """Answers other than the right one, by the end of the path."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        for end, status in self.server.status.items():
            if path.endswith(end):
                return self.answer(status)
        for name, commits in self.server.models.items():
            if path.startswith(f"/api/models/{name}"):
                return self.answer_api(commits, path.removeprefix(f"/api/models/{name}").strip("/").split("/"))
            if path.startswith(f"/{name}/resolve/"):
                commit, _, file = path.removeprefix(f"/{name}/resolve/").partition("/")
                return self.answer_file(commits, commit, file)
        return self.answer(404, headers={"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def answer_api(self, commits: dict[str, dict[str, str]], rest: list[str]) -> None:
        commit = rest[1] if len(rest) > 1 and rest[1] != "main" else list(commits)[-1]
        if commit not in commits:
            return self.answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        if rest[0] == "tree":
            content = commits[commit].items()
            return self.answer_json([{"type": "file", "path": path, "size": len(text), "oid": etag(text)}
                                     for path, text in content])  # fmt: skip
        return self.answer_json({"id": "some/model", "sha": commit, "siblings": []})

    def answer_file(self, commits: dict[str, dict[str, str]], commit: str, file: str) -> None:
        if file not in commits[commit]:
            return self.answer(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        text = commits[commit][file]
        return self.answer(200, text, {"X-Repo-Commit": commit, "ETag": f'"{etag(text)}"'})

    def answer_json(self, content: Any) -> None:
        self.answer(200, json.dumps(content), {"Content-Type": "application/json"})

    def answer(self, status: int, text: str = "", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(text)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


def etag(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def closed_port() -> str:
    """Address of a hub that does not answer."""
    with Hub() as server:
        return server.url


def run(code: str, url: str, home: Path, *arguments: str, **environment: str) -> Any:
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", **environment}
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(process.stdout)


def write_cache(home: Path) -> None:
    """What the cache holds of a model that transformers has loaded."""
    model = home / "hub" / "models--some--model"
    for file, text in {
        f"snapshots/{FIRST}/config.json": "{}",
        "refs/main": FIRST,
        f".no_exist/{FIRST}/adapter_config.json": "",
    }.items():
        (model / file).parent.mkdir(parents=True)
        (model / file).write_text(text)


def test_a_hub_that_cannot_be_reached_is_an_error_at_once(closed_port: str, tmp_path: Path) -> None:
    found = run(RESOLVE, closed_port, tmp_path, "some/model")
    assert found["error"].startswith("ModelError: cannot reach the Hugging Face hub for 'some/model' (ConnectError: ")
    assert found["error"].endswith(
        "and the local cache does not have it: connect to the network, or give the directory of a model"
    )
    assert found["seconds"] < 15
    found = run(LOAD_PROCESSOR, closed_port, tmp_path, "some/model")
    assert found["error"].startswith("cannot reach the Hugging Face hub for 'some/model' (ConnectError: ")
    assert found["seconds"] < 15


def test_transformers_reads_only_the_cache_if_the_hub_cannot_be_reached(closed_port: str, tmp_path: Path) -> None:
    write_cache(tmp_path)
    found = run(LOAD_PROCESSOR, closed_port, tmp_path, "some/model")
    assert found["error"].startswith("cannot load the processor of 'some/model': ")
    assert found["seconds"] < 15


def test_a_model_on_the_hub_is_identified_by_its_commit(hub: Hub, closed_port: str, tmp_path: Path) -> None:
    hub.models["some/model"] = {FIRST: {"config.json": "{}"}}
    first = run(RESOLVE, hub.url, tmp_path, "some/model")
    assert first["revision"] == FIRST
    assert first["note"].startswith("some/model has no rater.json: default prompt, scale [1, 5], 8 uniform frames")
    hub.models["some/model"][SECOND] = {"config.json": "{}"}
    second = run(RESOLVE, hub.url, tmp_path, "some/model")
    assert second["revision"] == SECOND
    assert second["rater_id"] != first["rater_id"]
    assert run(RESOLVE, hub.url, tmp_path, "some/model", FIRST)["rater_id"] == first["rater_id"]
    missing = run(RESOLVE, hub.url, tmp_path, "some/model", "v9")
    assert missing["error"].startswith(
        "ModelError: the Hugging Face hub refuses 'some/model' at revision 'v9': Revision"
    )


def test_a_rater_on_the_hub(hub: Hub, closed_port: str, tmp_path: Path) -> None:
    files = {"config.json": "{}", "rater.json": '{"scale": [0, 5]}', "calibration.json": "{}"}
    hub.models["some/model"] = {FIRST: files}
    found = run(RESOLVE, hub.url, tmp_path, "some/model")
    assert (found["scale"], found["note"]) == ([0, 5], None)
    assert Path(found["calibration"]).read_text() == "{}"
    offline = run(RESOLVE, closed_port, tmp_path, "some/model", HF_HUB_OFFLINE="1")
    assert {**offline, "seconds": 0} == {**found, "seconds": 0}


def test_an_adapter_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    adapter = {
        "adapter_config.json": '{"base_model_name_or_path": "some/base"}',
        "adapter_model.safetensors": "weights",
    }
    hub.models |= {"some/adapter": {FIRST: adapter}, "some/base": {SECOND: {"config.json": "{}"}}}
    found = run(RESOLVE, hub.url, tmp_path, "some/adapter")
    assert (found["backbone"], found["revision"]) == ("some/base", SECOND)
    assert (Path(found["adapter"]) / "adapter_model.safetensors").read_text() == "weights"


WITHOUT_PAUSES = "import time\ntime.sleep = lambda seconds: None\n"
"""huggingface_hub repeats a request that is answered with 500, with pauses of 23 s in all."""


@pytest.mark.parametrize("status", [403, 500])
def test_a_rater_file_that_cannot_be_fetched_is_an_error(status: int, hub: Hub, tmp_path: Path) -> None:
    hub.models["some/model"] = {FIRST: {"config.json": "{}", "rater.json": '{"scale": [0, 5]}'}}
    hub.status["/rater.json"] = status
    found = run(WITHOUT_PAUSES + RESOLVE, hub.url, tmp_path, "some/model")
    assert found["error"].startswith(
        "ModelError: cannot fetch rater.json of 'some/model' from the Hugging Face hub: "
    ), found
    assert found["error"].endswith("Try again later")
    hub.status.clear()
    assert run(RESOLVE, hub.url, tmp_path, "some/model")["scale"] == [0, 5]


def test_a_rater_file_that_may_exist_is_an_error_without_a_network(hub: Hub, closed_port: str, tmp_path: Path) -> None:
    """transformers has cached the model, but not the rater.json, which it does not know."""
    write_cache(tmp_path)
    found = run(RESOLVE, closed_port, tmp_path, "some/model")
    assert found["error"].startswith("ModelError: cannot fetch rater.json of 'some/model' from the Hugging Face hub: ")
    assert found["error"].endswith("or set HF_HUB_OFFLINE=1 to use the local cache as it is")
    assert run(RESOLVE, closed_port, tmp_path, "some/model", HF_HUB_OFFLINE="1")["revision"] == FIRST
    hub.models["some/model"] = {FIRST: {"config.json": "{}"}}
    known = run(RESOLVE, hub.url, tmp_path, "some/model")
    without_network = run(RESOLVE, closed_port, tmp_path, "some/model")
    assert without_network["rater_id"] == known["rater_id"]


def test_a_hub_that_is_down_is_not_a_missing_model(hub: Hub, tmp_path: Path) -> None:
    hub.status["/api/models/some/model"] = 500
    found = run(RESOLVE, hub.url, tmp_path, "some/model")
    assert found["error"].startswith("ModelError: cannot reach the Hugging Face hub for 'some/model' (HfHubHTTPError: ")
    assert found["seconds"] < 15


def test_a_model_that_the_hub_does_not_have(hub: Hub, tmp_path: Path) -> None:
    found = run(RESOLVE, hub.url, tmp_path, "some/model")
    assert found["error"].startswith(
        "ModelError: 'some/model' is neither a directory nor a model that you can access on the Hugging Face hub: "
    )
