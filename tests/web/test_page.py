"""python -m pytest tests/web/test_page.py

One server with a password, as a user starts it, and one browser. Needs gradio, and Chromium (`apt-get install
chromium`).
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from browser import Browser, find_browser
from clips import write_clip
from paths import SAMPLES
from playwright.sync_api import expect
from rating_rows import rating_row

from lmm_qa.files.tables import write_rows

pytestmark = [
    pytest.mark.skipif(find_spec("gradio") is None, reason="needs gradio: pip install 'lmm-qa[web]'"),
    pytest.mark.skipif(find_browser() is None, reason="needs Chromium"),
]

PASSWORD = "täst word"
HOSTILE = "<img src=x onerror=alert(1)> ${alert(2)} {{7*7}}.mp4"
SPECIAL = "<a> {b} $1 &.mp4"
SHOWN = ":is(.downloads, .problem):visible"


@dataclass
class Server:
    """A running `lmm-qa web`."""

    url: str
    process: subprocess.Popen[str]
    folder: Path
    """In which it makes its private folder."""
    log: Path
    """What it says on stderr."""

    def get(self, path: str, **headers: str) -> tuple[int, str, dict[str, str]]:
        """Status, body and headers of an answer, without a password."""
        request = urllib.request.Request(self.url + path, headers=headers)
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, answer.read().decode(errors="replace"), dict(answer.headers)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode(errors="replace"), dict(error.headers)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uploads")
    write_clip(folder / "whole.mp4", frames=60)
    whole = (folder / "whole.mp4").read_bytes()
    (folder / HOSTILE.replace("/", "")).write_bytes(whole[:-3000])
    (folder / SPECIAL).write_bytes(whole)
    rows = [rating_row("whole.mp4", 3.5), rating_row(HOSTILE, 2.0, ["stall"])]
    write_rows(folder / "ratings.jsonl", rows)
    write_rows(folder / "uploaded.jsonl", [*rows, rating_row(f"folder/{SPECIAL}", 4.0)])
    return folder


@pytest.fixture(scope="module")
def server(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = ["web", str(clips / "ratings.jsonl"), "--port", str(port), "--workers", "1"]
    command = [sys.executable, "-m", "lmm_qa", *arguments]
    environment = os.environ | {"TMPDIR": str(folder), "LMM_QA_PASSWORD": PASSWORD, "GRADIO_SHARE": "True"}
    log = folder / "stderr"
    with log.open("w") as stderr:
        process = subprocess.Popen(command, env=environment, stderr=stderr, text=True, cwd=clips)
    while "\nopen http" not in f"\n{log.read_text()}":
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    yield Server(f"http://127.0.0.1:{port}/", process, folder, log)
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def browser(server: Server) -> Iterator[Browser]:
    """Logged in."""
    with Browser() as browser:
        browser.open(server.url)
        browser.page.get_by_label("username").fill("anybody")
        browser.page.get_by_label("password").fill(PASSWORD)
        browser.page.get_by_role("button", name="Login").click()
        browser.page.wait_for_selector("[data-sample]")
        yield browser


def upload(browser: Browser, place: str, *files: Path) -> None:
    """Give files to the upload of this id, and wait until they are there."""
    browser.page.locator(f"#{place} input[type=file]").set_input_files(files)
    browser.page.locator(f"#{place} .file-preview").wait_for(timeout=60_000)


def wait(browser: Browser) -> None:
    browser.page.wait_for_selector(SHOWN, timeout=60_000)


def revealed(browser: Browser) -> None:
    """Wait until the page has scrolled to the result: a click before that would miss."""
    browser.page.wait_for_function(
        """() => {
          const shown = [...document.querySelectorAll(".lmm-qa-result")].find((one) => one.offsetHeight > 50);
          const {scrollTop, scrollHeight} = document.scrollingElement;
          return Math.abs(shown.getBoundingClientRect().top) < 2 || scrollTop + innerHeight > scrollHeight - 2;
        }"""
    )


def fresh(browser: Browser) -> None:
    browser.page.reload()
    browser.page.wait_for_selector("[data-sample]")


def test_without_the_password_nothing_is_given_out(server: Server) -> None:
    status, page, _ = server.get("")
    assert status == 200 and '"auth_required":true' in page.replace(" ", "") and "data-sample" not in page
    for path in ("config", "gradio_api/queue/data?session_hash=x", "gradio_api/file=uploads/a"):
        assert server.get(path)[0] == 401, path
    status, _, headers = server.get(f"results/{'a' * 22}/clip0.mp4")
    assert status == 401
    policy = {name.lower(): value for name, value in headers.items()}["content-security-policy"]
    assert "sandbox" in policy and "frame-ancestors 'self'" in policy


def test_wrong_passwords_wait(server: Server) -> None:
    start = time.monotonic()
    for number in range(3):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(server.url + "login", b"username=a&password=b")
        refused.value.close()
        assert refused.value.code == 400 and time.monotonic() - start >= (0, 1, 3)[number]


def test_a_name_from_elsewhere_is_refused(server: Server) -> None:
    assert server.get("", Host="evil.example:80")[0] == 403
    for host in ("localhost:80", "localhost", "127.0.0.2:7860", "[::1]:80"):
        assert server.get("", Host=host)[0] == 200, host


def test_a_clip_is_rated_played_and_downloaded(browser: Browser, server: Server, clips: Path) -> None:
    page = browser.page
    upload(browser, "clips", clips / "whole.mp4")
    wait(browser)
    assert page.locator(".rated h2").inner_text() == "whole.mp4"
    assert page.locator(".strip img").count() > 8
    expect(page.locator(".levels li")).to_have_count(5)

    video = page.locator(".player video")
    page.locator(".strip button").nth(2).click()
    moment = float(page.locator(".strip button").nth(2).get_attribute("data-at") or "")
    assert video.evaluate("video => video.currentTime") == pytest.approx(moment, abs=0.01)
    page.locator(".player .lowest").click()
    lowest = float(page.locator(".player .lowest").get_attribute("data-at") or "")
    assert video.evaluate("video => video.currentTime") == pytest.approx(lowest, abs=0.01)
    page.locator(".player .seek").press("ArrowRight")
    assert video.evaluate("video => video.currentTime") == pytest.approx(lowest + 0.04, abs=0.03)
    plot = page.locator(".player .curve").bounding_box()
    assert plot is not None
    page.mouse.click(plot["x"] + plot["width"] / 4, plot["y"] + 5)
    assert video.evaluate("video => video.currentTime") == pytest.approx(2.4 / 4, abs=0.05)
    page.locator(".player .play").click()
    page.wait_for_function("document.querySelector('.player video').currentTime > 0.8")
    page.locator(".player .play").click()
    assert video.evaluate("video => video.paused")

    with page.expect_download() as row:
        page.get_by_role("link", name="ratings.jsonl").click()
    rated = json.loads(row.value.path().read_text(encoding="utf-8"))
    assert rated["clip"] == "whole.mp4" and rated["found"] is not None and rated["timeline"]
    with page.expect_download() as report:
        page.get_by_role("link", name="report.html").click()
    text = report.value.path().read_text(encoding="utf-8")
    assert 'src="data:video/mp4;base64,' in text
    command = page.locator("pre").inner_text()
    assert command == "lmm-qa rate whole.mp4 --explain --timeline -o ratings.jsonl"
    for content in (json.dumps(rated), text, page.content()):
        assert str(server.folder) not in content and str(Path.home()) not in content and str(SAMPLES) not in content


def test_a_clip_that_cannot_be_rated_says_why_and_costs_no_other(browser: Browser, clips: Path) -> None:
    fresh(browser)
    upload(browser, "clips", clips / "whole.mp4", clips / HOSTILE)
    wait(browser)
    page = browser.page
    assert "stream breaks" in page.locator(".problem").inner_text()
    expect(page.locator("details.rated")).to_have_count(1)
    assert page.locator("section.rated h2").inner_text() == HOSTILE
    assert page.locator("img[src='x']").count() == 0


def test_two_clips_are_compared_in_step(browser: Browser) -> None:
    fresh(browser)
    page = browser.page
    page.get_by_role("tab", name="Compare").click()
    upload(browser, "old", SAMPLES / "astronaut_clean.mp4")
    upload(browser, "new", SAMPLES / "astronaut_freeze_strong.mp4")
    page.get_by_role("button", name="Compare").last.click()
    wait(browser)
    assert re.fullmatch(
        r"astronaut_freeze_strong\.mp4 scores 1\.\d\d lower than astronaut_clean\.mp4: .*",
        page.locator(".verdict").inner_text(),
    )
    assert "stall" in page.locator(".pair figcaption").nth(1).inner_text()
    page.locator(".pair .play").click()
    page.wait_for_function("document.querySelector('.pair video').currentTime > 0.5")
    page.locator(".pair .play").click()
    times = browser.run("[...document.querySelectorAll('.pair video')].map(video => video.currentTime)")
    assert times[0] == pytest.approx(times[1], abs=0.15)


def test_a_set_of_the_operator_is_reported(browser: Browser) -> None:
    fresh(browser)
    page = browser.page
    page.get_by_role("tab", name="A set").click()
    page.get_by_label("Or a set on the server").click()
    page.get_by_role("option", name="ratings.jsonl").click()
    page.get_by_role("button", name="Make the report").click()
    wait(browser)
    revealed(browser)
    frame = page.frame_locator("iframe.report")
    # The script that opens rows comes after everything else in the document.
    frame.locator("footer").evaluate(
        "() => document.readyState === 'complete' || new Promise(done => addEventListener('load', done))"
    )
    expect(frame.locator("#clips tbody")).to_have_count(2)
    frame.locator("#clips tbody button").first.click()
    expect(frame.locator("#clips .detail")).to_have_count(1)


def test_uploaded_ratings_find_clips_with_special_characters_in_their_names(browser: Browser, clips: Path) -> None:
    fresh(browser)
    page = browser.page
    page.get_by_role("tab", name="A set").click()
    upload(browser, "set", clips / "uploaded.jsonl", clips / SPECIAL, clips / "whole.mp4")
    page.get_by_role("button", name="Make the report").click()
    wait(browser)
    with page.expect_download() as report:
        page.get_by_role("link", name="report.html").last.click()
    text = report.value.path().read_text(encoding="utf-8")
    assert text.count("data:video/mp4") == 2
    assert text.count("No frames: no clip of this name was found.") == 1, "the damaged one was not uploaded"


def test_a_rater_that_is_not_here_says_so(browser: Browser) -> None:
    fresh(browser)
    page = browser.page
    page.get_by_label("Rater", exact=True).click()
    page.get_by_role("option", name=re.compile("qrealign-mini")).click()
    page.locator("[data-sample]").first.click()
    wait(browser)
    assert (
        "This page downloads nothing: run lmm-qa rate CLIP --model qrealign-mini"
        in page.locator(".problem").inner_text()
    )


def test_a_request_is_cancelled(browser: Browser) -> None:
    fresh(browser)
    page = browser.page
    page.locator("[data-sample]").first.click()
    page.locator(".status:visible", has_text="Rating").wait_for()
    page.get_by_role("button", name="Cancel").first.click()
    page.locator(".status:visible", has_text="Cancelled").wait_for()
    time.sleep(0.5)
    assert page.locator(".status:visible").inner_text() == "Cancelled"


def test_what_was_rated_before_the_request_was_cancelled_is_shown(browser: Browser, clips: Path) -> None:
    fresh(browser)
    page = browser.page
    upload(browser, "clips", clips / "whole.mp4", *sorted(SAMPLES.glob("*.mp4"))[:4])
    page.locator(".progress[aria-valuenow='1']:visible").wait_for(timeout=60_000)
    page.get_by_role("button", name="Cancel").first.click()
    wait(browser)
    assert re.match(
        r"Cancelled: [1-4] of 5 clips done", page.locator(".lmm-qa-result .note:visible").first.inner_text()
    )
    assert page.locator(".rated h2, .rated summary").first.inner_text().startswith("whole.mp4")
    with page.expect_download() as rows:
        page.get_by_role("link", name="ratings.jsonl").click()
    assert "whole.mp4" in rows.value.path().read_text(encoding="utf-8")
    assert page.locator(".status:visible").inner_text().startswith("Cancelled")


def test_an_address_in_the_place_of_an_upload_is_not_fetched(browser: Browser, server: Server) -> None:
    """Nor is another file of the machine read, by a visitor who writes requests by hand."""
    script = """async path => {
      const rate = window.gradio_config.dependencies.find(one => one.inputs.length > 5);
      const data = rate.inputs.map(() => null);
      data[0] = [{path, orig_name: "a.mp4", meta: {_type: "gradio.FileData"}}];
      const call = {data, fn_index: rate.id, session_hash: "byhand" + Math.random()};
      const headers = {"Content-Type": "application/json"};
      await fetch("gradio_api/queue/join", {method: "POST", headers, body: JSON.stringify(call)});
      const answer = await fetch("gradio_api/queue/data?session_hash=" + call.session_hash);
      const reader = answer.body.getReader();
      for (let said = "";;) {
        const {value, done} = await reader.read();
        said += new TextDecoder().decode(value);
        if (done || said.includes("process_completed")) return said;
      }
    }"""
    for path in ("https://example.org/a.mp4", "/etc/passwd", str(SAMPLES / "index.csv")):
        said = browser.page.evaluate(script, path)
        assert '"success":false' in said.replace(" ", ""), path
        assert str(server.folder) not in said and "root:" not in said
    assert "this server fetches nothing, received 'https://example.org/a.mp4'" in server.log.read_text()


def test_nothing_else_can_be_read_and_nothing_left_the_machine(browser: Browser, server: Server, clips: Path) -> None:
    fetch = "async path => { const answer = await fetch(path); return [answer.status, await answer.text()] }"
    table = clips / "ratings.jsonl"  # which the operator offers
    for place in ("/etc/passwd", str(table), "ratings.jsonl", "../ratings.jsonl", str(SAMPLES / "index.csv")):
        status, _ = browser.page.evaluate(fetch, f"gradio_api/file={place}")
        assert status == 404, place
    assert browser.page.evaluate(fetch, "gradio_api/file=uploads/../results")[0] in (403, 404)
    for path in (f"results/{'a' * 22}/clip0.mp4", "results/..%2f..%2fuploads/x.mp4", "results/x/..%2fy.jsonl"):
        assert browser.page.evaluate(fetch, path)[0] == 404, path
    for path in ("gradio_api/file=http://127.0.0.1/", "gradio_api/proxy=http://127.0.0.1/", "gradio_api/info"):
        assert browser.page.evaluate(fetch, path)[0] == 404, path
    for path in ("", "config"):
        text = browser.page.evaluate(fetch, path)[1]
        assert str(server.folder) not in text and str(SAMPLES) not in text and str(clips) not in text, path
    elsewhere = [url for url in browser.requests() if not url.startswith(server.url)]
    assert elsewhere == [] and len(browser.requests()) > 50
    known = ("Method not implemented", "403", "404")  # gradio's own, and what was asked for above
    assert [line for line in browser.complaints() if not any(each in line for each in known)] == []

    assert "default-src 'self'" in server.get("")[2]["content-security-policy"]


def test_the_folder_is_private_and_is_deleted(server: Server) -> None:
    (folder,) = server.folder.glob("lmm-qa-web-*")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert any((folder / "uploads").rglob("whole.mp4")) and any((folder / "results").rglob("clip0.mp4"))
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(60)
    assert list(server.folder.glob("lmm-qa-web-*")) == []
