"""python -m pytest tests/web/test_jobs.py"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from clips import read_or_hang, write_clip
from paths import EMBEDDED, SAMPLES
from rating_rows import rating_row

from lmm_qa import Rater
from lmm_qa.errors import UsageError
from lmm_qa.evaluation.html_report import RatedClip
from lmm_qa.files.tables import read_rows, write_rows
from lmm_qa.manifest import Clip
from lmm_qa.model.rater_config import EMBEDDED_NAME
from lmm_qa.ratings.rows import RatingRow
from lmm_qa.video.decode import read_frames
from lmm_qa.video.decoder_pool import DecoderPool
from lmm_qa.web.jobs import Given, Jobs, Request, Step
from lmm_qa.web.looked_at import WIDE, looked_at
from lmm_qa.web.shelf import RaterSettings, Shelf
from lmm_qa.web.workspace import Workspace

pytestmark = pytest.mark.skipif(not any(EMBEDDED.rglob("*.safetensors")), reason=f"no embedded model at {EMBEDDED}")

REQUEST = Request(EMBEDDED_NAME, RaterSettings(sampling="uniform:2"), timeline=False)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Given]:
    folder = tmp_path_factory.mktemp("clips")
    paths = [write_clip(folder / f"{name}.mp4", frames=12, size=(96, 64)) for name in ("a", "b", "c")]
    return [Given(path, path.name) for path in paths]


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def jobs(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with Workspace() as workspace, Jobs(workspace, shelf, workers=1) as jobs:
        yield jobs


def last(steps: Iterator[Step]) -> str:
    """The result of a job."""
    (html,) = [step.html for step in steps if step.html is not None]
    return html


def test_sets_of_clips_are_compared_as_by_the_command(jobs: Jobs, clips: list[Given]) -> None:
    html = last(jobs.compare(clips, clips, "name", REQUEST))
    assert "no difference shown between old and new: +0.00 [+0.00, +0.00] on 3 pairs" in html
    assert html.count('<section class="pair"') == 3 and html.count("<video ") == 6
    assert "comparison.html" in html and "ratings.jsonl" in html


def test_warnings_do_not_show_where_the_package_lies(jobs: Jobs, clips: list[Given]) -> None:
    clip = Clip(clips[0].path, clips[0].name, "upload")
    warning = f"TypeError: in {clip.path} (/usr/lib/python3/site-packages/lmm_qa/video/sound.py:3)"
    row = {"error": None, "adapter": None, "model": "embedded", "warnings": [warning]}
    assert jobs._public_row(row, clip)["warnings"] == ["TypeError: in a.mp4 (sound.py:3)"]


def test_nothing_to_compare_with_is_an_error(jobs: Jobs, clips: list[Given]) -> None:
    with pytest.raises(UsageError, match="give clips on both sides"):
        last(jobs.compare(clips, [], "name", REQUEST))


def test_clips_that_are_left_when_the_time_is_over_are_reported(jobs: Jobs, clips: list[Given]) -> None:
    jobs.time_limit = 0.0
    html = last(jobs.rate(clips, REQUEST))
    assert html.count("the request took longer than 0 s: ask for fewer clips") == 3


def processes(jobs: Jobs) -> list[int]:
    """The numbers of the decoding processes."""
    workers = [*jobs.decoders._workers, *jobs._shown_by._workers]
    return [worker._process.pid for worker in workers if worker._process]


def test_requests_share_decoding_processes_which_end_with_the_server(
    shelf: Shelf, clips: list[Given], tmp_path: Path
) -> None:
    broken = Given(tmp_path / "broken.mp4", "broken.mp4")
    broken.path.write_bytes(clips[0].path.read_bytes()[:-1000])
    with Workspace() as workspace, Jobs(workspace, shelf, workers=1) as jobs:
        started = processes(jobs)
        for given in (clips[:2], [broken], clips[:1]):
            assert "lmm-qa rate" in last(jobs.rate(given, REQUEST))
            assert processes(jobs) == started and len(started) == 2
        for process in started:
            os.kill(process, signal.SIGKILL)
        assert "Not rated" not in last(jobs.rate(clips[:1], REQUEST))
        replaced = processes(jobs)
    for process in (*started, *replaced):
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_a_clip_that_hangs_in_a_request_that_was_stopped_does_not_hold_up_the_next(
    jobs: Jobs, clips: list[Given], tmp_path: Path
) -> None:
    jobs.decoders.close()
    hanging = Given(tmp_path / "hanging.mp4", "hanging.mp4")
    hanging.path.write_bytes(clips[0].path.read_bytes() + b"hang")
    with DecoderPool(1, timeout=600, _reader=read_or_hang) as jobs.decoders:
        steps = jobs.rate([*clips, clips[0], hanging], REQUEST)
        while next(steps).text != "Rating b.mp4":  # the last clip is read ahead
            pass
        assert isinstance(steps, Generator)
        steps.close()
        assert "Not rated" not in last(jobs.rate(clips[1:], REQUEST))


def test_what_was_rated_before_a_request_was_cancelled_is_shown(jobs: Jobs, clips: list[Given]) -> None:
    steps = jobs.rate(clips, REQUEST, "somebody")
    while next(steps).text != "Rating c.mp4":
        pass
    assert isinstance(steps, Generator)
    steps.close()
    assert list(jobs.cancel("somebody else")) == []
    html = last(jobs.cancel("somebody"))
    assert "Cancelled: 2 of 3 clips done" in html and "report.html" in html and "lmm-qa rate a.mp4 b.mp4" in html
    (rows,) = Path("results").rglob("ratings.jsonl")
    assert [row["clip"] for row in read_rows(rows)] == ["a.mp4", "b.mp4"]
    assert list(jobs.cancel("somebody")) == [], "it was shown"
    assert "Cancelled" not in last(jobs.rate(clips[:1], REQUEST, "somebody"))
    assert list(jobs.cancel("somebody")) == [], "nothing is worked on"


def test_a_comparison_that_was_cancelled_shows_clips_of_one_name(jobs: Jobs, clips: list[Given]) -> None:
    steps = jobs.compare(clips, clips, "name", REQUEST, "somebody")
    texts = [next(steps).text for _ in range(8)]
    assert texts[-1] == "Rating b.mp4" and isinstance(steps, Generator)
    steps.close()
    html = last(jobs.cancel("somebody"))
    assert "Cancelled: 4 of 6 clips done" in html and "ratings.jsonl" in html and "report.html" not in html


def test_cancelling_does_not_wait_for_a_clip_that_hangs(jobs: Jobs, clips: list[Given], tmp_path: Path) -> None:
    jobs.decoders.close()
    hanging = Given(tmp_path / "hanging.mp4", "hanging.mp4")
    hanging.path.write_bytes(clips[0].path.read_bytes() + b"hang")
    with DecoderPool(1, timeout=600, _reader=read_or_hang) as jobs.decoders, ThreadPoolExecutor(1) as threads:
        steps = jobs.rate([*clips, clips[0], hanging], REQUEST, "somebody")
        while next(steps).text != "Rating b.mp4":
            pass
        left = threads.submit(list, steps)
        time.sleep(2)  # it waits for the last clip
        html = last(jobs.cancel("somebody"))
        assert re.search("Cancelled: [1-4] of 5 clips done", html) and "Not rated" not in html
        assert [step for step in left.result() if step.html] == []
        assert "Not rated" not in last(jobs.rate(clips[1:], REQUEST))


def test_uploaded_ratings_find_the_clips_that_come_with_them(jobs: Jobs, clips: list[Given], tmp_path: Path) -> None:
    write_rows(tmp_path / "r.jsonl", [rating_row("folder/a.mp4", 3.0), rating_row("folder/z.mp4", 2.0)])
    html = last(jobs.report([Given(tmp_path / "r.jsonl", "r.jsonl"), *clips], None, REQUEST))
    (page,) = Path("results").rglob("report.html")
    text = page.read_text(encoding="utf-8")
    assert f"results/{page.parent.name}/report.html" in html
    assert text.count("data:video/mp4") == 1 and "No frames: no clip of this name was found." in text
    assert [row["clip"] for row in read_rows(page.with_name("ratings.jsonl"))] == ["folder/a.mp4", "folder/z.mp4"]


def test_errors_name_the_upload_and_not_its_place(jobs: Jobs, tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"score": 3}\n', encoding="utf-8")
    with pytest.raises(UsageError) as raised:
        last(jobs.report([Given(tmp_path / "r.jsonl", "mine.jsonl")], None, REQUEST))
    assert str(raised.value).startswith("mine.jsonl, row 1")
    with pytest.raises(UsageError, match=r"give clips or a file of ratings$"):
        last(jobs.report([], "nothing", REQUEST))


def test_a_defect_of_the_mouth_has_a_box_in_the_lower_half_of_the_face() -> None:
    path = SAMPLES / "astronaut_clean.mp4"
    settings = Rater.from_pretrained().settings
    frames = read_frames(path, settings.sampling, (*settings.views, WIDE), 28)
    found = [{"defect": name, "probability": 0.9} for name in ("mouth", "geometry", "blur")]
    row = RatingRow.parse(rating_row(path.name, 3.0) | {"found": found}, "here")
    whole, window = looked_at(RatedClip(1, row, 3.0, path), frames, settings.views)
    assert "the whole picture" in whole.title and "at native resolution" in window.title
    assert not any(frame.boxes for frame in window.thumbnails)
    for frame in whole.thumbnails:
        mouth, face = frame.boxes
        assert (mouth.name, face.name) == ("malformed mouth", "warped face")
        assert face.left < mouth.left and mouth.left + mouth.width < face.left + face.width
        assert face.top + face.height / 2 < mouth.top < face.top + face.height
