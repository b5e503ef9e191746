"""The web server: gradio on this machine, with what it must not do turned off.

Nothing leaves the machine: no share link, analytics, version check, fonts or scripts from elsewhere; a policy in each
answer forbids the browser to load anything from another place. Visitors see uploads and results of their own, under
names that cannot be guessed, and no file or path of the machine.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import os
import re
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from lmm_qa.errors import MissingExtra, UsageError

ENVIRONMENT = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_TEMP_DIR": "uploads",  # relative to the private folder, see lmm_qa.web.workspace
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""Set before gradio is imported."""

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "worker-src 'self' blob:; frame-ancestors 'self'; object-src 'none'; base-uri 'self'; form-action 'self'"
)
"""What the page may load: gradio needs scripts and styles in the page, and templates that it evaluates."""
HEADERS = {
    b"content-security-policy": POLICY.encode(),
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
}

NEEDED = re.compile(
    r"/(|config|login/?|logout|theme\.css|favicon\.ico|(assets|static|svelte)/.*|results/.*|gradio_api/("
    r"startup-events|user/?|login_check/?|heartbeat/.*|upload|upload_progress|queue/(join|data)|run/predict|cancel|"
    r"file=uploads/.*))"
)
"""Paths that the page asks for. Gradio has others: it fetches addresses for visitors, converts recordings, ..."""

RESULT_POLICY = b"sandbox allow-scripts allow-downloads; frame-ancestors 'self'; object-src 'none'; base-uri 'none'"
"""That of results: a report runs as if it came from another place, and says itself what it may load."""

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds between a wrong password and the next attempt: after the first wrong one, doubled with each, and at most."""

_PORT = re.compile(r":\d+$")


@dataclass(frozen=True)
class Address:
    """Where the server listens, and who may use it."""

    host: str = "127.0.0.1"
    port: int | None = None
    """None: the first free one from 7860 on."""
    password: str | None = None
    max_size: int = 200
    """Megabytes of an upload."""

    def check(self) -> None:
        """Raises UsageError if other machines could use it without a password."""
        if not self.local and not self.password:
            raise UsageError(
                f"--host {self.host} lets other machines use this page: set a password (--password, --password-file or "
                "the environment variable LMM_QA_PASSWORD), or leave out --host"
            )

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        return _is_loopback(self.host)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def prepare() -> None:
    """Check that gradio is there, and turn off what it would do on its own. Call it before gradio is imported.

    Raises:
        MissingExtra: it is not installed.
    """
    if find_spec("gradio") is None:
        raise MissingExtra("gradio", "web", "lmm-qa web")
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]  # such as GRADIO_SHARE and GRADIO_ALLOWED_PATHS
    os.environ.update(ENVIRONMENT)


def serve(page: Any, address: Address, started: Callable[[str], None]) -> None:
    """Serve the page until the process is told to end.

    Args:
        page: from `lmm_qa.web.page.build`.
        address: where.
        started: called with the URL once it can be opened.

    Raises:
        UsageError: the port is taken, or the host is not one of this machine.
    """
    from gradio import processing_utils
    from starlette.middleware import Middleware
    from starlette.routing import Route

    from lmm_qa.web.page import head, theme

    address.check()
    processing_utils.async_ssrf_protected_download = _refuse_download
    routes = [Route("/results/{token}/{name}", _result)]
    try:
        _, url, _ = page.launch(
            server_name=address.host,
            server_port=address.port,
            auth=_check_password(address.password) if address.password else None,
            auth_message="Any name, and the password of this page." if address.password else None,
            share=False,
            allowed_paths=[],
            max_file_size=f"{address.max_size}mb",
            app_kwargs={"routes": routes, "middleware": [Middleware(_Guard, local=address.local)]},
            prevent_thread_lock=True,
            quiet=True,
            show_error=False,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            inbrowser=False,
            theme=theme(),
            head=head(),
        )
    except OSError as error:
        raise UsageError(
            f"cannot listen on {address.host}, port {address.port or '7860 to 7959'}: {error}: choose another --port"
        ) from None
    started(url)
    try:
        _wait()
    finally:
        page.server.force_exit = True  # does not wait for browsers that keep the page open
        page.close(verbose=False)


def _wait() -> None:
    """Until Ctrl-C or SIGTERM, which the command turns into exceptions."""
    while True:
        if hasattr(signal, "pause"):
            signal.pause()
        else:
            threading.Event().wait(1.0)


def _check_password(password: str) -> Callable[[str, str], Awaitable[bool]]:
    """A check for gradio. Attempts are checked one after the other, whoever makes them; after wrong ones they wait."""
    turn = asyncio.Lock()
    wrong, next_check = 0, 0.0

    async def check(_: str, given: str) -> bool:
        nonlocal wrong, next_check
        async with turn:
            await asyncio.sleep(next_check - time.monotonic())
            right = hmac.compare_digest(given.encode(), password.encode())
            wrong = 0 if right else wrong + 1
            next_check = time.monotonic() + min(FIRST_WAIT * 2 ** min(wrong - 1, 30), LONGEST_WAIT) if wrong else 0.0
        return right

    return check


async def _result(request: Any) -> Any:
    """Send a file of a result to those who know its name, and the password if there is one."""
    from starlette.responses import FileResponse, PlainTextResponse

    from lmm_qa.web.workspace import ANSWER_TYPES, find_file

    app = request.app
    if app.auth is not None and not any(
        app.tokens.get(request.cookies.get(f"access-token-{kind}{app.cookie_id}")) for kind in ("", "unsecure-")
    ):
        return PlainTextResponse("log in first", 401)
    path = find_file(request.path_params["token"], request.path_params["name"])
    if path is None:
        return PlainTextResponse("not there, or deleted: results are kept for an hour", 404)
    return FileResponse(path, media_type=ANSWER_TYPES[path.suffix], headers={"cache-control": "private, no-store"})


async def _refuse_download(url: str, cache_dir: str) -> str:
    """In the place of gradio's download of an address that a visitor gives as a file."""
    raise ValueError(f"this server fetches nothing, received {url!r}")


class _Guard:
    """Adds the headers to all answers. Refuses what the page does not need, and names that this machine does not have:
    a page from elsewhere could otherwise have its own name point here."""

    def __init__(self, app: Any, local: bool) -> None:
        self._app, self._local = app, local

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import PlainTextResponse

        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        if self._local and not _is_loopback(_PORT.sub("", host).strip("[]")):
            await PlainTextResponse(f"this page is for its own machine, not for {host!r}", 403)(scope, receive, send)
            return
        if not NEEDED.fullmatch(scope["path"]):
            await PlainTextResponse("this page has no such part", 404)(scope, receive, send)
            return
        result = scope["path"].startswith("/results/")

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = HEADERS | ({b"content-security-policy": RESULT_POLICY} if result else {})
                message["headers"] = [*message["headers"], *headers.items()]
            await send(message)

        await self._app(scope, receive, send_with_headers)
