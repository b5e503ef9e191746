"""python -m pytest tests/evaluation/test_html_report.py

Tests in a browser need Chromium (`apt-get install chromium`) and are skipped without it.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, find_browser
from clips import read_number, write_clip
from PIL import Image
from scipy import stats

import lmm_qa.cli.app
from lmm_qa.defects.vocabulary import DEFECTS
from lmm_qa.errors import ConfigError, ManifestError, ResultsError, ScoresError, UsageError
from lmm_qa.evaluation import evaluate
from lmm_qa.evaluation import html_report as report
from lmm_qa.evaluation.html_report import Axis, Filmstrip
from lmm_qa.evaluation.labels import Label, read_scores
from lmm_qa.files.tables import write_rows
from lmm_qa.manifest import content_id
from lmm_qa.ratings.rows import RatingRow

Row = dict[str, Any]

LEVELS = ("bad", "poor", "fair", "good", "excellent")
HOSTILE = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;{{ 7 * 7 }}.mp4"
VOID = {"meta", "img", "input"}


def rating(clip: str, score: float = 3.0, **more: Any) -> Row:
    """A row as `lmm-qa rate` writes it."""
    weights = np.exp(-((np.arange(1, 6) - score) ** 2))
    probabilities = dict(zip(LEVELS, (weights / weights.sum()).tolist(), strict=True))
    return {
        "clip": clip,
        "content_id": None,
        "score": score,
        "raw_score": None,
        "interval": None,
        "scale": [1.0, 5.0],
        "level": max(probabilities, key=probabilities.__getitem__),
        "probabilities": probabilities,
        "std": 0.5,
        "video": {"width": 192, "height": 128, "fps": 25.0, "frames": 100, "duration": 4.0, "decoder": "pyav"},
        "model": "embedded",
        "rater_id": "abc",
        "error": None,
        **more,
    }


def explained(clip: str, score: float = 3.0, **more: Any) -> Row:
    """A row with defects, a timeline and an explanation."""
    defects = dict.fromkeys((defect.name for defect in DEFECTS), 0.01) | {"blur": 0.91, "stall": 0.8, "lip_sync": None}
    found = [
        {"defect": "blur", "probability": 0.91, "place": "whole picture", "seconds": None},
        {"defect": "stall", "probability": 0.8, "place": None, "seconds": [[1.2, 2.0]]},
    ]
    timeline = {"window": 2.0, "seconds": [1.0, 2.0, 3.0], "scores": [score, 1.25, score], "low": [[1.5, 2.5]]}
    words = "The quality of this video is fair: it stands still."
    return rating(clip, score, defects=defects, found=found, timeline=timeline, explanation=words) | more


def failure(clip: str) -> Row:
    error = {"class": "ClipTruncated", "message": "stream breaks: 51 of 100 frames could be read"}
    return {**dict.fromkeys(rating("")), "clip": clip, "model": "embedded", "rater_id": "abc", "error": error}


def many(number: int) -> list[Row]:
    """Rows of which one in ten has no defect profile and one in fifty failed."""
    rng = random.Random(0)
    rows = []
    for n in range(number):
        name, score = f"folder/clip_{n}.mp4", round(rng.uniform(1, 5), 3)
        rows.append(failure(name) if n % 50 == 7 else (rating if n % 10 == 3 else explained)(name, score))
        if n % 4 == 0 and rows[-1].get("found"):
            rows[-1]["found"] = rows[-1]["found"][:1]
    return rows


def save(folder: Path, rows: list[Row]) -> Path:
    write_rows(folder / "ratings.jsonl", rows)
    return folder / "ratings.jsonl"


def page_of(folder: Path, rows: list[Row], labels: list[Label] | None = None, clips: list[str] | None = None) -> Path:
    """Write the ratings and their page."""
    loaded = report.load(save(folder, rows), labels or (), clips or ())
    report.write(loaded, report.filmstrips(loaded.clips, 1), folder / "report.html")
    return folder / "report.html"


class Reader(HTMLParser):
    """Parses a page and collects errors: unclosed or misnested tags, repeated attributes and ids."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.wrong: list[str] = []
        self._open: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))
        self.close()
        ids = Counter(attributes["id"] for _, attributes in self.tags if "id" in attributes)
        self.wrong += [f"id {name} {times} times" for name, times in ids.items() if times > 1]
        self.wrong += [f"{tag} is not closed" for tag in self._open]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if len({name for name, _ in attributes}) < len(attributes):
            self.wrong.append(f"{tag} has an attribute twice")
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.wrong.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, text: str) -> None:
        self.text += text

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def pictures(page: Path) -> list[tuple[bool, np.ndarray]]:
    """The thumbnails in order, and whether each is marked as the worst moment."""
    found = re.findall(
        r'<li( class="worst")?>(?:<button[^>]*>)?<img src="data:image/jpeg;base64,([^"]+)"',
        page.read_text(encoding="utf-8"),
    )
    return [(bool(worst), np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))) for worst, data in found]


# --- content of the page ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows",
    [
        [{"clip": "bare.mp4", "score": 2.5}],
        [rating("one.mp4")],
        [failure("only.mp4")],
        [explained("a.mp4", 2.0), rating("b.mp4", 4.0, interval=[3.0, 4.5], raw_score=3.9), failure("c.mp4")],
        [explained("a.mp4", 2.0, found=None), explained("b.mp4", found=[]), rating("c.mp4", defects={"odd": 0.7})],
        [explained("a.mp4", video=None, level=None), rating("b.mp4", probabilities={"bad": None, "good": 1.0})],
    ],
    ids=["bare", "plain", "failed", "mixed", "findings", "gaps"],
)
def test_the_page_is_valid_and_self_contained(rows: list[Row], tmp_path: Path) -> None:
    page = Reader(page_of(tmp_path, rows))
    assert not page.wrong
    for row in rows:
        assert row["clip"] in page.text
    addresses = [
        value
        for _, attributes in page.tags
        for name in ("src", "href", "srcset", "action")
        if (value := attributes.get(name))
    ]
    assert all(address.startswith(("#", "data:image/jpeg;base64,")) for address in addresses)
    assert len(page.all("script")) == 1 and not page.all("link") and "@import" not in page.text
    assert "url(" not in page.text and "http:" not in page.text and "https:" not in page.text
    (policy,) = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert policy is not None and policy.startswith("default-src 'none'")


def test_all_values_of_a_row_are_shown(tmp_path: Path) -> None:
    page = Reader(page_of(tmp_path, [explained("a.mp4", 2.84, interval=[2.1, 3.5], raw_score=2.71)]))
    for text in (
        "2.84",
        "2.10",
        "3.50",
        "2.71",
        "91%",
        "whole picture",
        "1.2 to 2.0 s",
        "it stands still",
        "lip-sync offset",
    ):
        assert text in page.text, text
    for defect in DEFECTS:
        assert defect.term in page.text
    assert page.text.count("not judged") == 1
    assert "lowest" in page.text and "1.25" in page.text


def test_the_source_of_the_explanation_is_shown(tmp_path: Path) -> None:
    rows = [explained("a.mp4", explained_by="model"), explained("b.mp4", explained_by="it says good", defect_mass=0.03)]
    page = Reader(page_of(tmp_path, rows)).text
    assert page.count("Not in the model") == 1 and "s words: it says good." in page
    assert page.count("defect mass") == 1 and "0.03" in page


def test_failed_clips_are_listed_with_the_reason(tmp_path: Path) -> None:
    rows = [rating("a.mp4"), failure("b.mp4"), {"clip": "c.mp4", "error": "gone"}, {"clip": "d.mp4"}]
    page = Reader(page_of(tmp_path, rows)).text
    listed = page[page.index("Could not be rated") :]
    assert "b.mp4" in listed and "ClipTruncated: stream breaks: 51 of 100 frames" in listed
    assert "c.mp4" in listed and "gone" in listed
    assert "d.mp4" in listed and "no score" in listed


def test_markup_in_rows_is_escaped(tmp_path: Path) -> None:
    rows = [
        explained(HOSTILE, explanation=HOSTILE, model=HOSTILE, level=HOSTILE, content_id=HOSTILE, prompt=HOSTILE),
        rating(
            "b.mp4", found=[{"defect": HOSTILE, "probability": 0.9, "place": HOSTILE}], probabilities={HOSTILE: 1.0}
        ),
        {"clip": "c" + HOSTILE, "error": {"class": HOSTILE, "message": HOSTILE}},
    ]
    page = Reader(page_of(tmp_path, rows))
    assert not page.wrong
    assert len(page.all("script")) == 1 and not page.all("img")
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count(HOSTILE) >= 10


def test_characters_not_allowed_in_html_are_replaced(tmp_path: Path) -> None:
    ratings = tmp_path / "ratings.jsonl"
    ratings.write_text(json.dumps(rating("a\x00\x1b[31m\udcff\ufffe.mp4")) + "\n", encoding="utf-8")
    loaded = report.load(ratings)
    report.write(loaded, [Filmstrip()], tmp_path / "report.html")
    assert "a��[31m��.mp4" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_csv_and_parquet_give_the_same_content(suffix: str, tmp_path: Path) -> None:
    rows = [explained("a.mp4", 2.0, interval=[1.5, 2.5]), rating("b.mp4"), failure("c.mp4")]
    write_rows(tmp_path / f"ratings{suffix}", rows)
    flat, plain = report.load(tmp_path / f"ratings{suffix}"), report.load(save(tmp_path, rows))
    assert flat.clips[0].row == plain.clips[0].row
    assert flat.failures == plain.failures


def test_the_page_is_reproducible(tmp_path: Path) -> None:
    first = page_of(tmp_path, many(5)).read_bytes()
    assert page_of(tmp_path, many(5)).read_bytes() == first


def test_the_histogram_counts_every_clip(tmp_path: Path) -> None:
    scores = [1.0, 1.01, 2.5, 4.99, 5.0]
    bins = report.load(save(tmp_path, [rating(f"{score}.mp4", score) for score in scores])).bins
    assert [n for *_, n in bins if n] == [2, 1, 2]
    assert sum(n for *_, n in bins) == len(scores)
    assert (bins[0][0], bins[-1][1]) == (1.0, 5.0)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (1, 5, [1, 2, 3, 4, 5]),
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (0.5, 4.2, [1, 2, 3, 4]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round(low: float, high: float, ticks: list[float]) -> None:
    assert Axis(low, high).ticks == ticks


def test_an_axis_over_equal_values() -> None:
    axis = Axis.over([3.0, 3.0])
    assert axis.at(3.0) == 50 and axis.at(99.0) == 100 and axis.at(-99.0) == 0


# --- frames ----------------------------------------------------------------------------------------------------------


def test_the_worst_moment_is_marked(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", frames=100)  # 4 s
    shots = pictures(page_of(tmp_path, [explained("a.mp4")], clips=[str(tmp_path)]))
    numbers = [read_number(picture) for _, picture in shots]
    assert numbers == sorted(set(numbers)) and len(numbers) == report.THUMBNAILS
    (worst,) = [number for number, (marked, _) in zip(numbers, shots, strict=True) if marked]
    assert abs(worst / 25 - 2.0) <= 0.125  # the lowest score is at 2 s


@pytest.mark.parametrize(
    ("more", "worst"),
    [
        ({"timeline": {"seconds": [1, 2, 3], "scores": [1.0, 3.0, 2.0], "low": [[2.5, 3.5]]}}, 3.0),
        ({"timeline": {"seconds": [1, 2, 3], "scores": [1.0, 3.0, 2.0], "low": [[1.1, 1.3]]}}, 1.2),
        ({"timeline": {"seconds": [1, 2, 3], "scores": [1.0, 3.0, 2.0], "low": []}}, 1.6),
        ({"timeline": None}, 1.6),
        ({"timeline": None, "found": [{"defect": "jerkiness", "probability": 0.9, "seconds": [[0, 4]]}]}, None),
        ({"timeline": None, "found": []}, None),
        ({"timeline": None, "found": None}, None),
    ],
)
def test_worst_moment(more: Row, worst: float | None) -> None:
    row = RatingRow.parse(explained("a.mp4", **more), "here")
    found = report.RatedClip(1, row, 3.0, None).worst_moment
    assert found == (None if worst is None else pytest.approx(worst))


def test_a_clip_without_defects_has_no_worst_moment(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", frames=100)
    shots = pictures(page_of(tmp_path, [rating("a.mp4")], clips=[str(tmp_path)]))
    assert len(shots) == report.THUMBNAILS and not any(marked for marked, _ in shots)


def test_a_short_clip_has_fewer_frames(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", frames=1)
    assert len(pictures(page_of(tmp_path, [explained("a.mp4")], clips=[str(tmp_path)]))) == 1


def test_clips_are_found_beside_the_ratings_and_by_their_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_clip(tmp_path / "beside.mp4", frames=2)
    write_clip(tmp_path / "here" / "near.mp4", frames=2)
    write_clip(tmp_path / "far.mp4", frames=2)
    names = ("beside.mp4", "near.mp4", str(tmp_path / "far.mp4"))
    files = (tmp_path / "beside.mp4", Path("near.mp4"), tmp_path / "far.mp4")
    rows = [rating(name, content_id=content_id(file)) for name, file in zip(names, files, strict=True)]
    rows.append(rating("x" * 5000, content_id="sha256:0"))
    assert [clip.file is not None for clip in report.load(save(tmp_path, rows)).clips] == [True, True, True, False]


def test_ratings_cannot_name_files_outside_of_the_given_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an absolute path, a path with `..`, a link to a file or a link to a folder."""
    shared, private = tmp_path / "shared", tmp_path / "private"
    shared.mkdir()
    private.mkdir()
    monkeypatch.chdir(shared)
    write_clip(private / "secret.mp4", frames=2)
    write_clip(shared / "own.mp4", frames=2)
    (shared / "link.mp4").symlink_to(private / "secret.mp4")
    (shared / "folder").symlink_to(private)
    secret, own = content_id(private / "secret.mp4"), content_id(shared / "own.mp4")
    names = [
        "../private/secret.mp4",
        str(private / "secret.mp4"),
        "link.mp4",
        "folder/secret.mp4",
        "secret.mp4",
        "a\0b",
    ]
    rows = [*(rating(name, content_id=secret) for name in names), rating("own.mp4", content_id=own)]
    for clips in ((), (".",), (str(shared),)):
        loaded = report.load(save(shared, rows), clips=clips)
        assert [clip.row.clip for clip in loaded.clips if clip.file] == ["own.mp4"]
    (shared / "link to own.mp4").symlink_to("own.mp4")
    linked = report.load(save(shared, [rating("link to own.mp4", content_id=own)]))
    assert linked.clips[0].file == Path("link to own.mp4")
    assert report.load(save(shared, rows[:1]), clips=[str(private)]).clips[0].file == private / "secret.mp4"


def test_without_a_content_id_a_video_is_shown_only_if_its_folder_is_given(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", frames=2)
    ratings = save(tmp_path, [rating("a.mp4")])
    assert report.load(ratings).clips[0].file is None
    assert report.load(ratings, clips=[str(tmp_path)]).clips[0].file == tmp_path / "a.mp4"


def test_a_hostile_row_is_refused_or_shown(tmp_path: Path) -> None:
    """Texts of any length, many frames, times beyond the clip, defects without a name."""
    frames = {"indices": list(range(10**5)), "seconds": [1e12] * 10**5}
    video = {"width": 10**30, "height": 1, "fps": 1e12, "duration": 1e12}
    found = [{"defect": "", "probability": 0.9, "place": "x" * 10**5, "seconds": [[-1e12, 1e12]]}]
    rows = [rating("a" * 10**5, frames=frames, video=video, found=found, explanation=HOSTILE * 10**3)]
    page = Reader(page_of(tmp_path, rows))
    assert not page.wrong and len(page.all("script")) == 1
    for number in (math.nan, math.inf, 10**400, -1e308):
        (tmp_path / "ratings.jsonl").write_text(json.dumps(rating("a.mp4") | {"score": number}))
        with pytest.raises(ConfigError, match=r"row 1 cannot be used:\n  score: Input should be "):
            report.load(tmp_path / "ratings.jsonl")


def test_clips_without_frames_have_a_reason_and_the_rest_is_shown(tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    names = ("good", "changed", "broken", "last")
    for frames, name in enumerate(names, 30):
        write_clip(clips / f"{name}.mp4", frames=frames)
    rows = [rating(f"{name}.mp4", content_id=content_id(clips / f"{name}.mp4")) for name in names]
    shutil.copy(clips / "good.mp4", clips / "changed.mp4")
    (clips / "broken.mp4").write_bytes((clips / "broken.mp4").read_bytes()[:-200])
    page = page_of(tmp_path, [*rows, rating("away.mp4")], clips=[str(clips)])
    said = re.findall(r"No frames: ([^<]*)", page.read_text(encoding="utf-8"))
    assert len(said) == 3
    assert "changed.mp4 is not the clip that was rated" in said[0]
    assert "stream breaks" in said[1]
    assert "no clip of this name" in said[2]
    assert len(pictures(page)) == 2 * report.THUMBNAILS


def test_the_footer_states_the_size_of_the_page(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", frames=100)
    path = page_of(tmp_path, [rating("a.mp4"), rating("b.mp4")], clips=[str(tmp_path)])
    page = path.read_text(encoding="utf-8")
    said = re.search(r"This page: (\d+) kB, of which (\d+) kB are frames of 1 clip\.", page)
    assert said is not None
    assert int(said[1]) == pytest.approx(path.stat().st_size / 1e3, abs=1)
    assert int(said[2]) == pytest.approx(sum(map(len, re.findall(r"base64,([^\"]+)", page))) / 1e3, abs=1)


# --- labels ----------------------------------------------------------------------------------------------------------


def labelled(number: int = 40) -> tuple[list[Row], list[Label]]:
    rng = np.random.default_rng(0)
    scores = rng.uniform(1, 5, number).round(3)
    mos = (1 + 4 / (1 + np.exp(-1.5 * (scores - 3))) + rng.normal(0, 0.2, number)).round(3)
    mos[3] += 2  # rated far too low
    rows = [rating(f"clip_{n}.mp4", score) for n, score in enumerate(scores.tolist())]
    return rows, [Label(f"clip_{n}.mp4", value, n) for n, value in enumerate(mos.tolist())]


def test_labels_bring_a_scatter_plot_metrics_and_the_largest_errors(tmp_path: Path) -> None:
    rows, labels = labelled()
    path = page_of(tmp_path, rows, labels)
    page, text = Reader(path), path.read_text(encoding="utf-8")
    assert not page.wrong
    assert len(page.all("circle")) == len(labels)
    (curve,) = re.findall(r'<polyline points="([^"]+)"', text)
    srcc = stats.spearmanr([row["score"] for row in rows], [label.mos for label in labels]).statistic
    assert f"<td>{srcc:.3f}</td>" in text
    errors = re.findall(
        r'<a href="#c(\d+)">clip_(\d+)\.mp4</a></th><td>[\d.]+</td><td>[\d.]+</td><td>([+-][\d.]+)<', text
    )
    assert len(errors) == report.LARGEST_ERRORS
    assert errors[0][:2] == ("4", "3") and float(errors[0][2]) < -1.5
    sizes = [abs(float(error)) for *_, error in errors]
    assert sizes == sorted(sizes, reverse=True)
    assert len(curve.split()) == 100


def test_an_error_is_measured_from_the_fitted_curve(tmp_path: Path) -> None:
    rows, labels = labelled()
    loaded = report.load(save(tmp_path, rows), labels)
    errors = np.array([clip.prediction_error for clip in loaded.clips], float)
    fitted = evaluate.evaluate(read_scores(tmp_path / "ratings.jsonl"), labels)
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(fitted.metrics["rmse_fit"].value, rel=1e-6)


def test_clips_without_labels_are_still_shown(tmp_path: Path) -> None:
    rows, labels = labelled()
    page = page_of(tmp_path, [*rows, rating("new.mp4"), failure("lost.mp4")], [*labels, Label("lost.mp4", 1.0, 0)])
    text = Reader(page).text
    assert "Rated without a label: 1." in text and "Labelled, but could not be rated: 1." in text
    assert "new.mp4" in text


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([rating("clip_0.mp4"), rating("clip_1.mp4", 2.0)], "at least 5"),
        (
            [rating(f"clip_{n}.mp4", 1.0 + n / 9, calibration={"id": "x", "fitted": True}) for n in range(30)],
            "fitted on",
        ),
    ],
    ids=["few", "fitted"],
)
def test_the_page_says_why_metrics_are_undefined(rows: list[Row], why: str, tmp_path: Path) -> None:
    path = page_of(tmp_path, rows, labelled()[1])
    page = Reader(path)
    assert not page.wrong
    assert re.search(f"No metrics: [^<]*{why}", path.read_text(encoding="utf-8"))
    assert len(page.all("circle")) == len(rows) and "Largest errors" in page.text


def test_labels_of_other_clips_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ScoresError, match="none of the 1 labelled clips"):
        report.load(save(tmp_path, [rating("a.mp4")]), [Label("other.mp4", 1.0, 0)])


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"score": 3.0}, r"ratings\.jsonl, row 2 .*\n  clip: Field required"),
        ({**rating("a.mp4"), "score": "high"}, r"score: .*received 'high'"),
        (rating("a.mp4", interval=[1.0]), r"interval.1: Field required"),
        (rating("a.mp4", found=[{"defect": "blur", "probability": 7}]), r"found.0.probability: .*received 7"),
        (
            rating("a.mp4", timeline={"seconds": [1, 2], "scores": [3]}),
            "expected one score per window, received 1 for 2 windows",
        ),
    ],
)
def test_invalid_rows_are_refused(row: Row, message: str, tmp_path: Path) -> None:
    (tmp_path / "ratings.jsonl").write_text(f"{json.dumps(rating('first.mp4'))}\n{json.dumps(row)}\n", encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        report.load(tmp_path / "ratings.jsonl")


def test_empty_ratings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "ratings.jsonl").touch()
    with pytest.raises(ResultsError, match="contains no ratings"):
        report.load(tmp_path / "ratings.jsonl")


def test_a_folder_without_clips_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ManifestError, match="contain no video"):
        report.load(save(tmp_path, [rating("a.mp4")]), clips=[str(tmp_path / "empty")])


def test_only_html_paths_are_written(tmp_path: Path) -> None:
    ratings = save(tmp_path, [rating("a.mp4")])
    before = ratings.read_bytes()
    with pytest.raises(UsageError, match=r"name it \.html"):
        report.write(report.load(ratings), [Filmstrip()], ratings)
    assert ratings.read_bytes() == before
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ResultsError, match="it is a folder"):
        report.write(report.load(ratings), [Filmstrip()], tmp_path / "folder.html")


def test_the_page_is_written_atomically(tmp_path: Path) -> None:
    page = page_of(tmp_path, [rating("a.mp4"), rating("b.mp4")])
    before = page.read_bytes()

    def breaks() -> Iterator[Filmstrip]:
        yield Filmstrip()
        raise KeyboardInterrupt

    loaded = report.load(tmp_path / "ratings.jsonl")
    with pytest.raises(KeyboardInterrupt):
        report.write(loaded, breaks(), page)
    assert page.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ratings.jsonl", "report.html"]


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """`lmm-qa report` in this process: exit code and what it says."""

    def run(*arguments: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["lmm-qa", "report", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            lmm_qa.cli.app.main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, capfd.readouterr().err

    return run


def test_the_command_writes_a_page(command: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    rows, labels = labelled(6)
    write_clip(tmp_path / "clip_2.mp4", frames=20)
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("clip", "mos"), *((label.clip, label.mos) for label in labels)])
    page = tmp_path / "new" / "report.html"
    code, said = command(
        save(tmp_path, rows), "--labels", tmp_path / "labels.csv", "--clips", tmp_path, "-o", page, "--workers", "1"
    )
    assert code == 0
    assert "no frames of 5 clips" in said and re.search(rf"6 clips, \d\d kB -> {page}", said)
    assert len(pictures(page)) == report.THUMBNAILS and "Largest errors" in page.read_text(encoding="utf-8")


def test_the_command_hints_at_the_clips_option(command: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    code, said = command(save(tmp_path, [rating("a.mp4")]), "-o", tmp_path / "report.html")
    assert code == 0 and "no frames of 1 clip: give their location with --clips FOLDER" in said


def test_the_command_checks_the_output_first(command: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    assert command(tmp_path / "none.jsonl", "-o", tmp_path / "page.txt")[0] == 2
    code, said = command(tmp_path / "none.jsonl", "-o", tmp_path / "page.html")
    assert code == 1 and "cannot read" in said


# --- in a browser ----------------------------------------------------------------------------------------------------


def large_page(folder: Path, number: int) -> Path:
    """The page of this many labelled clips, four of them with frames."""
    if find_browser() is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    rows = many(number)
    rows[0]["clip"] = HOSTILE
    for n in range(1, 5):
        (folder / "folder").mkdir(exist_ok=True)
        write_clip(folder / "folder" / f"clip_{n}.mp4", frames=60)
    rng = np.random.default_rng(0)
    labels = [Label(row["clip"], row["score"] + rng.normal(0, 0.3), row["clip"]) for row in rows if row["score"]]
    return page_of(folder, rows, labels, [str(folder)])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 clips, of which 196 could be rated."""
    return large_page(tmp_path_factory.mktemp("page"), 200)


@pytest.fixture(scope="module")
def chromium(page: Path) -> Iterator[Browser]:
    with Browser() as started:
        yield started


@pytest.fixture
def browser(chromium: Browser, page: Path) -> Browser:
    chromium.open(page)
    return chromium


SHOWN = "[...document.querySelectorAll('#clips tbody:not([hidden])')]"
COUNT = "document.querySelector('output').value"


def column(browser: Browser, name: str) -> list[str]:
    """The text of a column in the visible rows, in order."""
    script = (
        "(() => { const headers = [...document.querySelectorAll('#clips thead th')];"
        f" const at = headers.findIndex(header => header.innerText === '{name}');"
        f" return {SHOWN}.map(b => b.rows[0].cells[at].innerText.trim()) }})()"
    )
    found: list[str] = browser.run(script)
    return found


def header(name: str) -> str:
    """The selector of a column's button."""
    places = ["clip", "score", "std", "level", "defects", "lowest", "MOS", "error", "size", "length"]
    return f"#clips thead th:nth-child({places.index(name) + 1}) button"


def test_a_browser_shows_the_page_without_errors(browser: Browser, page: Path) -> None:
    assert browser.run(COUNT) == "196 of 196"
    assert browser.run(f"{SHOWN}.length") == 196
    assert browser.run(f"{SHOWN}[0].querySelector('.name').textContent.trim()") == HOSTILE
    assert browser.run("document.querySelectorAll('#clips thead th').length") == 10
    browser.click("#c1 .name button")
    assert browser.run("document.querySelector('#c1 .words').innerText.length") > 10
    assert browser.requests() == [page.as_uri()]
    assert browser.complaints() == []


def test_sorting(browser: Browser) -> None:
    before = column(browser, "score")
    numbers = sorted(map(float, before))
    browser.click(header("score"))
    assert list(map(float, column(browser, "score"))) == numbers
    assert (
        browser.run("document.querySelector('#clips thead th:nth-child(2)').getAttribute('aria-sort')") == "ascending"
    )
    browser.click(header("score"))
    assert list(map(float, column(browser, "score"))) == numbers[::-1]
    assert browser.run("document.querySelectorAll('[aria-sort=descending]').length") == 1

    browser.click(header("clip"))
    names = column(browser, "clip")
    assert [n for n in names if n.startswith("folder")] == [
        f"folder/clip_{n}.mp4" for n in range(1, 200) if n % 50 != 7
    ]  # numeric order
    browser.click(header("level"))
    levels = [LEVELS.index(level) for level in column(browser, "level")]
    assert levels == sorted(levels)
    for _ in range(2):  # missing values come last in both directions
        browser.click(header("lowest"))
        lowest = column(browser, "lowest")
        assert lowest[0] and not lowest[-1] and lowest == [cell for cell in lowest if cell] + [""] * lowest.count("")

    for place in range(1, 11):
        browser.click(f"#clips thead th:nth-child({place}) button")
        assert browser.run(f"document.querySelector('#clips thead th:nth-child({place})').ariaSort") == "ascending"
        assert browser.run("document.querySelectorAll('#clips [aria-sort]').length") == 1
    assert browser.run(f"{SHOWN}.length") == 196
    assert browser.complaints() == []


def test_filtering(browser: Browser) -> None:
    browser.click("#filter input")
    browser.type("CLIP_12 stands")
    names = column(browser, "clip")
    assert names == [f"folder/clip_{n}.mp4" for n in (12, *range(120, 130)) if n % 10 != 3]
    assert browser.run(COUNT) == f"{len(names)} of 196"
    browser.type("nowhere")
    assert browser.run("document.querySelector('#nothing').hidden") is False and browser.run(COUNT) == "0 of 196"

    browser.run("filter.reset(); applyFilter()")
    stall = [n for n in range(200) if n % 50 != 7 and n % 10 != 3 and n % 4 != 0]
    browser.click("#defects li:nth-child(2) button")  # blur is in more clips
    assert column(browser, "clip") == [f"folder/clip_{n}.mp4" for n in stall]
    assert browser.run("document.querySelector('select').selectedOptions[0].text") == f"stall ({len(stall)})"
    assert browser.run("document.querySelector('#defects [aria-pressed=true]').innerText.startsWith('stall')")
    browser.click("#defects li:nth-child(2) button")
    assert browser.run(COUNT) == "196 of 196"


def test_opening_and_closing(browser: Browser) -> None:
    browser.click("#c2 .number")
    assert browser.run("document.querySelector('#c2 button').ariaExpanded") == "true"
    browser.run("Promise.all([...document.querySelectorAll('#c2 .strip img')].map(i => i.decode()))")
    assert browser.run("document.querySelectorAll('#c2 .strip img').length") == report.THUMBNAILS
    assert browser.run("document.querySelector('#c2 .strip img').naturalWidth") == 166
    assert browser.run("document.querySelectorAll('#c2 .strip .worst').length") == 1
    assert "stands still" in browser.run("document.querySelector('#c2 .words').innerText")
    browser.click(header("score"))  # sorting keeps details with their clip
    assert browser.run("document.querySelector('#c2').rows.length") == 2
    browser.click("#c2 .words")  # a click on the text does not close it
    assert browser.run("document.querySelector('#c2').rows.length") == 2
    browser.click("#c2 .number")
    assert browser.run("document.querySelector('#c2').rows.length") == 1
    assert browser.run("document.querySelectorAll('.detail').length") == 0


def test_keyboard_only(browser: Browser) -> None:
    browser.run("document.querySelector('#filter input').focus()")
    for _ in range(3):  # defect filter, first column, second column
        browser.press("Tab")
    browser.press("Enter")
    assert browser.run("document.querySelector('#clips thead th:nth-child(2)').ariaSort") == "ascending"
    for _ in range(9):  # remaining columns, first clip
        browser.press("Tab")
    browser.press("Enter")
    assert browser.run("document.activeElement.ariaExpanded") == "true"
    assert browser.run(f"{SHOWN}[0].querySelectorAll('.detail').length") == 1
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.press("Enter")
    assert browser.run("document.querySelectorAll('.detail').length") == 0


def test_links_open_their_clip(browser: Browser, page: Path) -> None:
    browser.run(
        "(() => { const i = document.querySelector('#filter input'); i.value = 'nothing like it';"
        " i.dispatchEvent(new Event('input', {bubbles: true})) })()"
    )
    target = browser.run("document.querySelector('.plain a[href^=\"#c\"]').getAttribute('href')")
    browser.click(".plain a[href^='#c']")
    assert browser.run(f"document.querySelector('{target} button').ariaExpanded") == "true"
    assert browser.run(COUNT) == "196 of 196"
    top = browser.run(f"document.querySelector('{target}').getBoundingClientRect().top")
    assert 0 <= top < 200
    browser.run(
        "document.querySelectorAll('.scatter a')[30]"
        ".dispatchEvent(new MouseEvent('click', {bubbles: true, cancelable: true}))"
    )
    assert browser.run("document.querySelectorAll('.detail').length") == 2


def test_thumbnails_load_when_scrolled_into_view(browser: Browser) -> None:
    seen = "document.querySelectorAll('.thumb img').length"
    assert browser.run(seen) == 0
    browser.run("document.querySelector('#c2').scrollIntoView()")
    browser.run("new Promise(done => setTimeout(done, 300))")
    assert browser.run(seen) == 4


def test_phone_layout_in_light_and_dark(chromium: Browser, page: Path) -> None:
    phone = chromium
    for dark in (False, True):
        phone.open(page, width=375, height=800, dark=dark)
        phone.click("#c2 .name button")
        assert phone.run("document.documentElement.scrollWidth") == 375
        background = phone.run("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == dark
        assert phone.run("parseFloat(getComputedStyle(document.querySelector('#c2 .words')).fontSize)") >= 16
        phone.click("#clips thead th:nth-child(2) button")
        assert list(map(float, column(phone, "score"))) == sorted(map(float, column(phone, "score")))
        assert phone.complaints() == []


LAYOUTS = 3
"""Limit of page layouts for one action; it takes one."""


def test_a_thousand_clips_take_few_layouts(chromium: Browser, tmp_path: Path) -> None:
    chromium.open(large_page(tmp_path, 1000))
    for action in (
        "document.querySelector('#clips thead th:nth-child(2) button').click()",
        "filter.text.value = 'clip_1'; filter.dispatchEvent(new Event('input'))",
        "clips.slice(0, 20).forEach(clip => toggle(clip, true))",
    ):
        before = chromium.layouts()
        chromium.run(f"{{ {action}; document.body.offsetHeight }}")
        assert chromium.layouts() - before <= LAYOUTS, f"{action}: one layout per row takes seconds"
    assert chromium.run("document.querySelectorAll('.detail').length") == 20
