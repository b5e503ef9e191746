"""Headless Chromium for tests, by playwright: the browser of the system, none is downloaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Self

from playwright.sync_api import ConsoleMessage, Error, Page, sync_playwright

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> str | None:
    """Path of an installed Chromium or Chrome."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Browser:
    """A browser with one page; use as a context manager."""

    def __init__(self) -> None:
        self._playwright = sync_playwright().start()
        self._browser = self._playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        self._complaints: list[str] = []
        self._requests: list[str] = []
        self.page: Page

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._browser.close()
        self._playwright.stop()

    def open(self, address: Path | str, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a file or URL in a new page, and wait until it is complete. Clears complaints and requests."""
        for context in self._browser.contexts:
            context.close()
        scheme = "dark" if dark else "light"
        screen = {"width": width, "height": height}
        self.page = self._browser.new_page(viewport=screen, color_scheme=scheme, is_mobile=width < 500)
        self._complaints, self._requests = [], []
        self.page.set_default_timeout(15_000)
        self.page.on("console", self._note_console)
        self.page.on("pageerror", self._note_error)
        self.page.on("request", lambda request: self._requests.append(request.url))
        self.page.goto(address.as_uri() if isinstance(address, Path) else address)

    def _note_console(self, message: ConsoleMessage) -> None:
        if message.type not in ("debug", "verbose"):
            self._complaints.append(f"{message.type}: {message.text}")

    def _note_error(self, error: Error) -> None:
        self._complaints.append(str(error))

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page; promises are awaited."""
        return self.page.evaluate(script)

    def click(self, selector: str) -> None:
        """Click the center of the first element that matches."""
        self.page.locator(selector).first.click()

    def press(self, key: str) -> None:
        """Press a key, such as Tab or Enter."""
        self.page.keyboard.press(key)

    def type(self, text: str) -> None:
        """Type into the focused element."""
        self.page.keyboard.insert_text(text)

    def layouts(self) -> int:
        """Number of page layouts so far."""
        session = self.page.context.new_cdp_session(self.page)
        session.send("Performance.enable")
        metrics = session.send("Performance.getMetrics")["metrics"]
        session.detach()
        return int(next(metric["value"] for metric in metrics if metric["name"] == "LayoutCount"))

    def complaints(self) -> list[str]:
        """Exceptions and log entries since the page was opened, such as violations of the content security policy."""
        self.run("new Promise(requestAnimationFrame)")
        return list(self._complaints)

    def requests(self) -> list[str]:
        """URLs requested by the page, without those that stay in it."""
        return [url for url in self._requests if not url.startswith(("data:", "blob:"))]

    def screenshot(self, path: Path) -> None:
        """Write the visible area as PNG."""
        self.page.screenshot(path=path)
