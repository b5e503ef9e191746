"""A server with an OpenAI-style API: requests with time limits and retries, and errors that say what it answered.

A request that fails is either the fault of one clip (`ServerError`), or of the server, and then it ends the run
(`ServerLost`). The API key is in no message, row or hash. Redirects are not followed, so nothing is sent to another
address than the one given (a proxy in the environment is used as by other programs).
"""

from __future__ import annotations

import os
import random
import time
import weakref
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from lmm_qa.errors import ModelError, ServerError, ServerLost, UsageError

KEY_VARIABLES = ("LMM_QA_API_KEY", "OPENAI_API_KEY")
"""Environment variables with the API key; the first that is set counts."""

MAX_REQUESTS = 8
"""Number of requests that the server gets at the same time."""

REQUEST_SECONDS = 300.0
"""Time limit for the answer to one request."""

CONNECT_SECONDS = 10.0

ATTEMPTS = 6

FIRST_DELAY = 0.5
"""Seconds before the first repetition of a request; each further delay is twice as long, give or take a quarter."""

MAX_DELAY = 120.0
"""Most seconds that a server may ask to wait (Retry-After)."""

BUSY = (429, 502, 503, 504)
"""Status codes of a server that is overloaded or restarting, or of a proxy that does not reach it."""

MAX_CHARACTERS = 300
"""Longest part of a server's answer in a message."""

RESUME_HINT = "Rows written so far are kept; with -o, the same command resumes"


class Server:
    """The API at one address. Several threads may use it at the same time."""

    def __init__(self, url: str) -> None:
        """
        Args:
            url: with the version of the API, such as http://127.0.0.1:8000/v1.

        Raises:
            UsageError: the URL is invalid, or contains a secret; or the API key in the environment is invalid.
        """
        self.url = url.rstrip("/")
        self._key = _api_key()
        self._lost: str | None = None
        """Why the server is given up."""
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx2.Limits(max_connections=MAX_REQUESTS)
        timeout = httpx2.Timeout(REQUEST_SECONDS, connect=CONNECT_SECONDS, pool=None)
        self._client = httpx2.Client(base_url=_checked_url(self.url), headers=headers, limits=limits, timeout=timeout)
        weakref.finalize(self, self._client.close)

    def get(self, path: str) -> Any:
        """JSON at a path relative to the URL. Asked once, to find out what the server is.

        Raises:
            ModelError: the server cannot be reached, or refuses.
        """
        try:
            return self._request("GET", path, None, attempts=1)
        except ServerError as error:
            raise ModelError(str(error)) from None
        except ServerLost as error:
            problem = str(error).removesuffix(f". {RESUME_HINT}")
            raise ModelError(f"{problem}. Start the server, or correct its address") from None

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The answer to a JSON body. Repeated if the server is busy or cannot be reached.

        Raises:
            ServerError: the server refuses this request, fails on it, or needs too long.
            ServerLost: it is busy or cannot be reached, for good.
            ModelError: it refuses all requests: the API key or the address is wrong.
        """
        return self._request("POST", path, body, ATTEMPTS)

    def _request(self, method: str, path: str, body: dict[str, Any] | None, attempts: int) -> Any:
        problem, status = "", 0
        for attempt in range(attempts):
            if self._lost:
                raise ServerLost(self._lost)
            delay = FIRST_DELAY * 2**attempt * random.uniform(0.75, 1.25)
            try:
                response = self._client.request(method, path, json=body)
            except (httpx2.ReadTimeout, httpx2.WriteTimeout):
                raise ServerError(
                    f"{self.url} did not answer within {REQUEST_SECONDS:g} s, the time limit of a request"
                ) from None
            except httpx2.RequestError as error:
                problem, status = self._clean(f"cannot reach {self.url}: {error or type(error).__name__}"), 0
            else:
                if response.is_success:
                    return self._content(response)
                problem, status = f"{self.url} answered {self._describe(response)}", response.status_code
                if status < 500 and status != 429:
                    raise self._refusal(problem, status)
                delay = max(delay, _retry_after(response))
            if attempt + 1 < attempts:
                time.sleep(min(delay, MAX_DELAY))
        if status and status not in BUSY:
            raise ServerError(problem)
        if attempts > 1:
            problem = f"{problem} ({attempts} attempts)"
            self._lost = f"{problem}. {RESUME_HINT}"
        raise ServerLost(f"{problem}. {RESUME_HINT}")

    def _refusal(self, problem: str, status: int) -> ModelError | ServerError:
        if status in (401, 403):
            return ModelError(f"{problem}. Set the API key in the environment variable {KEY_VARIABLES[0]}")
        if status == 404 or status < 400:
            return ModelError(f"{problem}. Give the address of the API itself, such as http://127.0.0.1:8000/v1")
        return ServerError(problem)

    def _content(self, response: httpx2.Response) -> Any:
        try:
            return response.json()
        except ValueError:
            text = self._clean(response.text)
            raise ServerError(f"{self.url} answered with something other than JSON: {text!r}") from None

    def _describe(self, response: httpx2.Response) -> str:
        """Status and message of an error, in one line."""
        try:
            content = response.json()
            error = content.get("error") or content.get("detail") or content
            text = str(error.get("message") or error if isinstance(error, dict) else error)
        except (ValueError, AttributeError):
            text = response.text
        where = f" to {response.headers['Location']}" if response.is_redirect else ""
        return self._clean(f"{response.status_code} {response.reason_phrase}{where}: {text}").rstrip(": ")

    def _clean(self, text: str) -> str:
        """One short line, without the API key."""
        text = text.replace(self._key, "***") if self._key else text
        return " ".join(text.split())[:MAX_CHARACTERS]


def _checked_url(url: str) -> httpx2.URL:
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise UsageError(f"the address of the served model is not a URL: {error}") from None
    if parsed.userinfo or parsed.query:
        raise UsageError(
            "the address of a served model must not contain a password or a query, because it is in messages: set the "
            f"API key in the environment variable {KEY_VARIABLES[0]}"
        )
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UsageError(f"the address of a served model is http(s)://HOST:PORT/v1, received {url!r}")
    return parsed


def _api_key() -> str | None:
    for variable in KEY_VARIABLES:
        if key := os.environ.get(variable, "").strip():
            if not (key.isascii() and key.isprintable()):
                raise UsageError(f"{variable} contains characters that an API key cannot have")
            return key
    return None


def _retry_after(response: httpx2.Response) -> float:
    """Seconds that the server asks to wait (RFC 9110, 10.2.3: a number or a date); 0 if it does not."""
    value = response.headers.get("Retry-After", "")
    try:
        return float(value)
    except ValueError:
        pass
    try:
        return (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
    except (TypeError, ValueError):
        return 0.0
