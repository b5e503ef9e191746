"""python -m pytest tests/model/test_server.py"""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace
from typing import Any

import pytest
from model_server import ModelServer, content, drop, slow, status

from lmm_qa.errors import ModelError, ServerError, ServerLost, UsageError
from lmm_qa.model import server as module
from lmm_qa.model.server import ATTEMPTS, Server

KEY = "sk-secret-0123456789"
ANSWER = {"answer": 42}


class Parrot(ModelServer):
    """A server without a model."""

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        return ANSWER


@pytest.fixture
def parrot() -> Iterator[Parrot]:
    with Parrot().running() as server:
        assert isinstance(server, Parrot)
        yield server


@pytest.fixture(autouse=True)
def delays(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The delays between attempts, which take no time here."""
    slept: list[float] = []
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=slept.append))
    for variable in module.KEY_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    return slept


def ask(parrot: Parrot) -> Any:
    return Server(parrot.url).post("chat/completions", {"messages": [{"content": ""}, {"content": ""}]})


def test_a_busy_server_is_asked_again(parrot: Parrot, delays: list[float]) -> None:
    parrot.faults = [status(503), drop, status(429), status(500)]
    assert ask(parrot) == ANSWER
    assert len(parrot.received) == 5
    assert [round(delay / module.FIRST_DELAY) for delay in delays] == [
        pytest.approx(2**number, rel=0.3) for number in range(4)
    ]


def test_it_waits_as_long_as_the_server_asks(parrot: Parrot, delays: list[float]) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=30))
    parrot.faults = [status(429, Retry_After="7"), status(503, Retry_After=date), status(429, Retry_After="86400")]
    assert ask(parrot) == ANSWER
    assert delays == [7.0, pytest.approx(30, abs=3), module.MAX_DELAY]


@pytest.mark.parametrize(("fault", "named"), [(status(429, "quota"), "429 Too Many Requests: quota"), (drop, "reach")])
def test_a_server_that_stays_away_is_lost_for_all(parrot: Parrot, fault: Any, named: str) -> None:
    parrot.faults = [fault] * ATTEMPTS
    server = Server(parrot.url)
    with pytest.raises(ServerLost, match=f"{named}.*the same command resumes"):
        server.post("chat/completions", {"messages": [{"content": ""}, {"content": ""}]})
    with pytest.raises(ServerLost, match=named):  # at once
        server.post("chat/completions", {})
    assert len(parrot.received) == ATTEMPTS


def test_an_error_of_one_question_does_not_end_the_run(parrot: Parrot) -> None:
    parrot.faults = [status(500, "out of cheese")] * ATTEMPTS
    server = Server(parrot.url)
    question = {"messages": [{"content": ""}, {"content": ""}]}
    with pytest.raises(ServerError, match=r"answered 500 Internal Server Error: out of cheese"):
        server.post("chat/completions", question)
    parrot.faults = [status(400, "too  many\ntokens" + " x" * 1000)]
    with pytest.raises(ServerError, match=r"answered 400 Bad Request: too many tokens x") as refused:
        server.post("chat/completions", question)
    assert len(str(refused.value)) < 400
    parrot.faults = [content(b"<html>")]
    with pytest.raises(ServerError, match="something other than JSON: '<html>'"):
        server.post("chat/completions", question)
    assert server.post("chat/completions", question) == ANSWER


def test_a_slow_server(parrot: Parrot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REQUEST_SECONDS", 0.1)
    parrot.faults = [slow(0.4)]
    start = time.monotonic()
    with pytest.raises(ServerError, match=r"did not answer within 0\.1 s, the time limit of a request"):
        ask(parrot)
    assert time.monotonic() - start < 0.4


def test_errors_of_the_address_or_the_key_end_the_run(parrot: Parrot) -> None:
    parrot.faults = [status(401, "who are you?")]
    with pytest.raises(ModelError, match=r"401 Unauthorized: who are you\?\. Set the API key .* LMM_QA_API_KEY"):
        ask(parrot)
    with pytest.raises(ModelError, match=r"404 Not Found.*Give the address of the API itself"):
        Server(parrot.url + "/v2").get("models")


def test_redirects_are_not_followed(parrot: Parrot) -> None:
    with Parrot().running() as other:
        parrot.faults = [status(307, Location=f"{other.url}/chat/completions")]
        with pytest.raises(ModelError, match=f"307 Temporary Redirect to {other.url}"):
            ask(parrot)
        assert other.received == []


def test_a_server_that_does_not_run_is_reported_at_once(delays: list[float]) -> None:
    with Parrot().running() as gone:
        pass
    with pytest.raises(ModelError, match=r"^cannot reach http://127\.0\.0\.1:\d+/v1: .*refused\. Start the server, or"):
        Server(gone.url).get("models")
    assert delays == []


@pytest.mark.parametrize("variable", module.KEY_VARIABLES)
def test_the_key_is_sent_but_never_shown(parrot: Parrot, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, f" {KEY}\n")
    server = Server(parrot.url)
    parrot.faults = [status(401, f"Incorrect API key provided: {KEY}"), status(400, KEY), content(KEY.encode())]
    for _ in range(3):
        with pytest.raises((ModelError, ServerError)) as refused:
            server.post("chat/completions", {"messages": [{"content": ""}, {"content": ""}]})
        assert KEY not in f"{refused.value!r}{refused.value.__cause__!r}"
    assert {headers["Authorization"] for _, headers, _ in parrot.received} == {f"Bearer {KEY}"}


def test_the_first_key_counts(parrot: Parrot, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(parrot)
    assert "Authorization" not in parrot.received[-1][1]
    monkeypatch.setenv("OPENAI_API_KEY", "other")
    monkeypatch.setenv("LMM_QA_API_KEY", "own")
    ask(parrot)
    assert parrot.received[-1][1]["Authorization"] == "Bearer own"
    monkeypatch.setenv("LMM_QA_API_KEY", "sch\u00f6n")
    with pytest.raises(UsageError, match=r"^LMM_QA_API_KEY contains characters that an API key cannot have$"):
        Server(parrot.url)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("ftp://host/v1", r"is http\(s\)://HOST:PORT/v1, received 'ftp://host/v1'"),
        ("http:///v1", "is http"),
        ("http://host:port/v1", "is not a URL"),
        ("http://user:hidden@host/v1", "must not contain a password"),
        ("http://host/v1?key=hidden", "must not contain a password or a query"),
    ],
)
def test_addresses(url: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem) as refused:
        Server(url)
    assert "hidden" not in str(refused.value)
