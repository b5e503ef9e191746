"""python -m pytest tests/cli/test_decisions.py

The commands compare and gate as a user runs them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from browser import Browser, find_browser
from clips import write_clip
from commands import Command
from paths import ROOT
from rating_rows import rating_row

from lmm_qa.files.tables import read_rows, write_rows
from lmm_qa.manifest import content_id


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with old.jsonl, and new.jsonl that is worse and stalls."""
    monkeypatch.chdir(tmp_path)
    scores = [3 + (number * 7 % 20) / 20 for number in range(20)]
    old = [rating_row(f"{number:02}.mp4", score) for number, score in enumerate(scores)]
    changes = [0.5 + (number * 3 % 7) / 30 for number in range(20)]
    new = [rating_row(row["clip"], row["score"] - change, ["stall"]) for row, change in zip(old, changes, strict=True)]
    write_rows(tmp_path / "old.jsonl", old)
    write_rows(tmp_path / "new.jsonl", new)
    return tmp_path


# --- compare ---------------------------------------------------------------------------------------------------------


def test_compare_prints_the_verdict_first(folder: Path, command: Command) -> None:
    code, out, err = command("compare", "old.jsonl", "new.jsonl", "-o", "c.json")
    assert code == 0
    first = out.splitlines()[0]
    assert first.startswith("new is worse than old by 0.60 [0.5")
    assert first.endswith("on 20 pairs; stall 0 -> 20.")
    assert "not how natural a generated face is" in out
    assert err == "comparison -> c.json\n"
    assert json.loads((folder / "c.json").read_text())["sets"][0]["decision"] == "worse"


def test_compare_accepts_several_sets(folder: Path, command: Command) -> None:
    (folder / "more").mkdir()
    shutil.copy("old.jsonl", folder / "more" / "old.jsonl")
    code, out, _ = command("compare", "old.jsonl", "new.jsonl", "more/old.jsonl", "-o", "c.md")
    assert code == 0
    assert out.splitlines()[0].startswith("new is worse than old.jsonl by")
    assert out.splitlines()[1].startswith("no difference shown between old.jsonl and more/old.jsonl: +0.00 [+0.00, ")
    assert (folder / "c.md").read_text().startswith("**new is worse than old.jsonl by")


def test_compare_says_if_clips_could_not_be_rated(folder: Path, command: Command) -> None:
    write_rows(folder / "new.jsonl", [*read_rows(folder / "new.jsonl")[:-1], rating_row("19.mp4", None)])
    code, out, _ = command("compare", "old.jsonl", "new.jsonl")
    assert code == 3
    assert "pairs with a clip that could not be rated" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("old.jsonl", "new.jsonl", "-o", "c.txt"), "a comparison is written as .json, .csv, .md, received 'c.txt'"),
        (("old.jsonl", "new.jsonl", "--report", "c.json"), "name it .html, received 'c.json'"),
        (("old.jsonl", "new.jsonl", "--pair", "nam"), "--pair is name, stem, thqa, column=NAME or mapping=FILE"),
        (("old.jsonl", "clip.mp4"), "the format of 'clip.mp4' is not known by its suffix"),
        (("old.jsonl", "new.jsonl", "--clips", "a", "--clips", "b", "--clips", "c"), "or once for each of the 2"),
    ],
)
def test_wrong_usage_of_compare(folder: Path, command: Command, arguments: tuple[str, ...], words: str) -> None:
    code, _, err = command("compare", *arguments)
    assert code == 2
    assert words in err


def test_folders_are_rated_once(folder: Path, command: Command, family_dir: Callable[[str], Path]) -> None:
    for name, size in (("one", (64, 64)), ("two", (96, 64))):
        (folder / name).mkdir()
        for number in range(3):
            write_clip(folder / name / f"{number}.mp4", frames=3 + number, size=size)
    arguments = ("compare", "one", "two", "-m", family_dir("qwen2_vl"), "--workers", "1")
    code, out, err = command(*arguments)
    assert code == 0, err
    assert "on 3 pairs" in out.splitlines()[0]
    (ratings,) = folder.glob("one.*.jsonl")
    assert f"one: ratings in {ratings}" in err
    assert err.count("has no rater.json: default prompt") == 1  # for all folders
    assert all(row["defects"] for row in read_rows(ratings))
    (folder / "two" / "2.mp4").unlink()
    code, out, err = command(*arguments)
    assert "on 2 pairs" in out.splitlines()[0]  # the row of the clip that is gone does not count
    assert err.count("nothing to do") == 2
    code, out, err = command(*arguments, "--dtype", "bfloat16", "--sampling", "uniform:2")
    assert code == 0 and "dtype bfloat16" in err
    assert len(list(folder.glob("one.*.jsonl"))) == 2  # another rater, another file


# --- the page --------------------------------------------------------------------------------------------------------


@pytest.fixture
def page(folder: Path, command: Command) -> Path:
    """A page of ten pairs; the clips of the first differ in length, and the last pair has no clips."""
    for name, frames in (("old", 30), ("new", 60)):
        (folder / name).mkdir()
        rows = read_rows(folder / f"{name}.jsonl")[:10]
        for number, row in enumerate(rows[:9]):
            path = write_clip(folder / name / row["clip"], frames=frames if number == 0 else 25, size=(64, 48))
            row["content_id"] = content_id(path)
        write_rows(folder / f"{name}.jsonl", rows)
    write_clip(folder / "new" / "08.mp4", frames=5, size=(64, 48))  # not the clip that was rated
    arguments = ("--report", "c.html", "--clips", "old", "--clips", "new", "--workers", "1")
    code, _, err = command("compare", "old.jsonl", "new.jsonl", *arguments)
    assert code == 0, err
    assert err.startswith("10 pairs, 8 with frames, ")
    return folder / "c.html"


def test_the_page_has_the_verdict_and_the_pairs(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "new is worse than old by" in text
    assert text.count('class="pair"') == 10
    assert text.count("<img ") == 8 * 2 * 12
    assert "No frames: 09.mp4 and 09.mp4 not found." in text
    assert "new/08.mp4 is not the clip that was rated: its content differs" in text
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text
    assert "http" not in text.replace("http-equiv", "")


@pytest.mark.skipif(find_browser() is None, reason="needs Chromium")
def test_one_slider_moves_both_clips(page: Path) -> None:
    with Browser() as browser:
        browser.open(page)
        shown = (
            "[...document.querySelectorAll('#p1 .frames')].map(side => "
            "[...side.children].filter(frame => !frame.hidden).map(frame => frame.alt))"
        )
        moved = (
            "(() => { const slider = document.querySelector('#p1 .seek'); slider.value = 0.92;"
            " slider.dispatchEvent(new Event('input', {bubbles: true}));"
            " return document.querySelector('#p1 output').value })()"
        )
        before = browser.run(shown)
        assert [len(side) for side in before] == [1, 1]
        label = browser.run(moved)
        after = browser.run(shown)
        assert [len(side) for side in after] == [1, 1]
        assert after != before
        seconds = [float(side[0].split(" at ")[1].removesuffix(" s")) for side in after]
        assert seconds[0] == pytest.approx(seconds[1], abs=0.1)
        assert float(label.removesuffix(" s")) == pytest.approx(seconds[0], abs=0.1)
        times = browser.run("[...document.querySelectorAll('#p1 video')].map(video => video.currentTime)")
        assert times == [0.92, 0.92]
        assert browser.complaints() == []
        assert all(url.startswith(page.parent.as_uri()) for url in browser.requests())


# --- gate ------------------------------------------------------------------------------------------------------------


def test_gate_fails_with_exit_code_4(folder: Path, command: Command) -> None:
    limits = ("--max-drop", "0.10", "--max-defect", "blur=0.05", "--max-defect", "stall=0")
    code, out, err = command("gate", "new.jsonl", "--against", "old.jsonl", *limits, "--junit", "gate.xml")
    assert code == 4
    lines = out.splitlines()
    assert lines[0].startswith("new is worse than old by 0.60")
    assert [line[:20].split(":")[0] for line in lines[1:-1]] == [
        *("pass  rated", "pass  pairs", "FAIL  drop", "pass  defect blur", "FAIL  defect stall"),
    ]
    assert lines[-1] == "the gate fails: 2 of 5 checks"
    assert "JUnit XML -> gate.xml" in err
    assert "note: The rater is not calibrated to human opinions" in err
    assert ET.parse(folder / "gate.xml").getroot().attrib["failures"] == "2"


def test_gate_passes_with_exit_code_0(folder: Path, command: Command) -> None:
    code, out, _ = command("gate", "old.jsonl", "--against", "old.jsonl", "--max-drop", "0")
    assert code == 0
    assert out.splitlines()[-1] == "the gate passes: 3 checks"
    assert command("gate", "old.jsonl", "--min-score", "3")[0] == 0


def test_options_replace_the_values_of_the_file(folder: Path, command: Command) -> None:
    (folder / "gate.yaml").write_text("max_drop: 0.1\nmax_defect: {stall: 0, blur: 0}\n")
    arguments = ("gate", "new.jsonl", "--against", "old.jsonl", "--config", "gate.yaml")
    assert command(*arguments)[0] == 4
    assert command(*arguments, "--max-drop", "0.8")[0] == 4
    assert command(*arguments, "--max-drop", "0.8", "--max-defect", "stall=1")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "there is no limit: give --max-drop, --min-score or --max-defect"),
        (("--max-drop", "0.1"), "needs the ratings of the old set: --against OLD"),
        (("--max-defect", "blur"), "--max-defect is NAME=SHARE, such as blur=0.05, received 'blur'"),
        (("--max-defect", "blurr=0.1"), "no such defects: blurr"),
        (("--max-defect", "blur=much"), "valid number"),
    ],
)
def test_wrong_usage_of_gate(folder: Path, command: Command, arguments: tuple[str, ...], words: str) -> None:
    code, _, err = command("gate", "new.jsonl", *arguments)
    assert code == 2
    assert words in err


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt" or shutil.which("make") is None, reason="needs make and bash")
def test_gate_stops_a_pipe_and_a_makefile(folder: Path) -> None:
    gate = f"{sys.executable} -m lmm_qa gate"
    (folder / "Makefile").write_text(f"release: check\n\techo released\ncheck:\n\t{gate} $(NEW).jsonl --min-score 3\n")
    piped = f"set -o pipefail; {gate} new.jsonl --min-score 3 | tail -n 1"
    done = subprocess.run(["bash", "-c", piped], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (4, "the gate fails: 1 of 3 checks\n")
    # Not as a part of the make that may run these tests.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    failed = subprocess.run(["make", "NEW=new"], capture_output=True, text=True, env=environment)
    assert failed.returncode == 2
    assert "Error 4" in failed.stderr
    assert "released" not in failed.stdout
    passed = subprocess.run(["make", "NEW=old"], capture_output=True, text=True, env=environment)
    assert passed.returncode == 0
    assert passed.stdout.endswith("released\n")


# --- the guide -------------------------------------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    """The code blocks of a language in the guide."""
    text = (ROOT / "docs" / "guides" / "decide.md").read_text(encoding="utf-8")
    return [part.split("```")[0] for part in text.split(f"```{language}\n")[1:]]


@pytest.fixture
def project(folder: Path) -> Path:
    """A project as the guide describes it: ratings of both versions, and the limits."""
    (folder / "old.jsonl").rename(folder / "baseline.jsonl")
    (folder / "gate.yaml").write_text(blocks("yaml")[0])
    return folder


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs bash")
def test_the_github_workflow_of_the_guide(project: Path) -> None:
    steps = yaml.safe_load(blocks("yaml")[1])["jobs"]["gate"]["steps"]
    commands = [step["run"] for step in steps if "run" in step]
    gate, summary = (next(one for one in commands if name in one) for name in ("lmm-qa gate", "lmm-qa compare"))
    environment = os.environ | {"GITHUB_STEP_SUMMARY": "summary.md"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])

    def run(command: str) -> int:  # with the default shell of GitHub
        return subprocess.run(["bash", "-e", "-c", command], env=environment, capture_output=True).returncode

    assert run(gate) == 4
    assert ET.parse("gate.xml").getroot().attrib["failures"] == "2"
    assert run(summary) == 0
    assert Path("summary.md").read_text().startswith("**new is worse than baseline by 0.60")
    shutil.copy("baseline.jsonl", "new.jsonl")
    assert run(gate) == 0


@pytest.mark.slow
def test_the_pytest_example_of_the_guide(project: Path) -> None:
    (project / "test_quality.py").write_text(blocks("python")[0])
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "test_quality.py"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "2 failed, 3 passed" in done.stdout
    assert "test_quality[drop]" in done.stdout
    assert "it drops by more than 0.1" in done.stdout
