"""python -m pytest tests/evaluation/test_player.py

Tests in a browser need Chromium (`apt-get install chromium`) and are skipped without it.
"""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path

import pytest
from browser import Browser, find_browser
from clips import read, write_clip
from rating_rows import rating_row

from lmm_qa.evaluation import html_report as report
from lmm_qa.evaluation.player import ClipAddresses, is_playable
from lmm_qa.files.tables import write_rows
from lmm_qa.manifest import content_id


def test_what_browsers_play(clips_dir: Path) -> None:
    playable = ("h264.mp4", "odd.webm", "av1.mp4", "vp8.webm", "turned_90.mp4", "full_range.mp4")
    not_playable = (
        "odd.mp4",
        "h264_10bit.mp4",
        "hevc_10bit.mp4",
        "prores.mov",
        "h264.mkv",
        "mpeg4.avi",
        "animation.gif",
    )
    for names, expected in ((playable, True), (not_playable, False)):
        for name in names:
            assert is_playable(clips_dir / name, read(clips_dir / name).info) == expected, name


def test_clips_are_embedded_up_to_a_limit_and_then_linked_if_beside_the_page(tmp_path: Path) -> None:
    page = tmp_path / "pages" / "report.html"
    beside = page.parent / "clips" / "a #1.mp4"
    elsewhere = tmp_path / "b.mp4"
    beside.parent.mkdir(parents=True)
    for file in (beside, elsewhere):
        file.write_bytes(bytes(100))
    embedded = f"data:video/mp4;base64,{base64.b64encode(bytes(100)).decode()}"
    linked = "clips/a%20%231.mp4"
    some = ClipAddresses(page, 150)
    assert [some.address(file) for file in (elsewhere, beside, elsewhere)] == [embedded, linked, None]
    none = ClipAddresses(page)
    assert [none.address(file) for file in (elsewhere, beside)] == [None, linked]
    (page.parent / "link.mp4").symlink_to(elsewhere)
    assert none.address(page.parent / "link.mp4") is None


PLAYS = """video => new Promise(done => {
  const look = () => 0.2 < video.currentTime && video.currentTime < 3 ? done() : setTimeout(look, 50);
  look();
})"""


def explained(path: Path) -> dict[str, object]:
    """A row with a timeline and a stall from 1.2 to 2.0 s."""
    timeline = {"window": 2.0, "seconds": [1.0, 2.0, 3.0], "scores": [3.0, 1.25, 3.5], "low": [[1.5, 2.5]]}
    found = [{"defect": "stall", "probability": 0.8, "place": "whole picture", "seconds": [[1.2, 2.0]]}]
    video = {"width": 192, "height": 128, "fps": 25.0, "frames": 100, "duration": 4.0}
    row = rating_row(path.name, 3.0, ["stall"]) | {"timeline": timeline, "found": found, "video": video}
    return row | {"content_id": content_id(path)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page that contains its first clip, plays the second from its file, and cannot play the third."""
    folder = tmp_path_factory.mktemp("pages")
    first = write_clip(folder / "first.mp4", frames=100)
    second = write_clip(folder / "second.mp4", frames=100, keyframes_every=5)
    third = folder / "third.webm"
    third.write_bytes(second.read_bytes())  # a browser looks at the content, and plays it as well
    write_rows(folder / "ratings.jsonl", [explained(path) for path in (first, second, third)])
    loaded = report.load(folder / "ratings.jsonl", clips=[str(folder)])
    strips = [replace(strip, playable=True) for strip in report.filmstrips(loaded.clips, 1)]
    size = report.write(loaded, strips, folder / "report.html", first.stat().st_size)
    third.write_bytes(b"no video")
    assert (size.embedded, size.linked) == (1, 2)
    return folder


@pytest.mark.skipif(find_browser() is None, reason="needs Chromium")
def test_the_clips_of_a_report_play_above_their_timeline(folder: Path) -> None:
    with Browser() as browser:
        browser.open(folder / "report.html")
        page = browser.page
        for number in (1, 2):
            page.locator(f"#c{number} .name button").click()
            clip = page.locator(f"#c{number}")
            video = clip.locator("video")
            video.evaluate("v => v.readyState > 0 || new Promise(done => v.addEventListener('loadedmetadata', done))")
            for target, moment in ((".lane .mark", 1.2), (".lowest", 2.0), (".low", 1.5), (".moment", 1.2)):
                clip.locator(target).first.click()
                assert video.evaluate("v => v.currentTime") == pytest.approx(moment, abs=0.01), target
            assert clip.locator(".second").inner_text() == "1.2"
            assert clip.locator(".score-now").inner_text() == "score 3.00"
            clip.locator(".seek").focus()
            browser.press("End")
            assert video.evaluate("v => v.currentTime") == pytest.approx(4.0, abs=0.05)
            assert clip.locator(".seek").get_attribute("aria-valuetext") == "4.0 s, score 3.50"
            clip.locator(".play").click()  # starts over
            video.evaluate(PLAYS)
            clip.locator(".play").click()
            assert video.evaluate("v => v.paused")
        assert browser.complaints() == []
        assert set(browser.requests()) == {(folder / name).as_uri() for name in ("report.html", "second.mp4")}


@pytest.mark.skipif(find_browser() is None, reason="needs Chromium")
def test_a_clip_that_the_browser_cannot_play_leaves_its_frames(folder: Path) -> None:
    with Browser() as browser:
        browser.open(folder / "report.html")
        browser.page.locator("#c3 .name button").click()
        browser.page.locator("#c3 .unplayable").wait_for()
        assert browser.page.locator("#c3 video").count() == 0
        assert browser.page.locator("#c3 .strip img").count() == report.THUMBNAILS
