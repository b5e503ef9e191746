"""python -m pytest tests/degrade/test_dataset.py"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
from clips import ffmpeg, ffmpeg_frames, write_clip

import lmm_qa
import lmm_qa.cli.app
from lmm_qa.defects.explanation import mentioned_defects
from lmm_qa.defects.vocabulary import reference_defects
from lmm_qa.degrade.causes import COMPRESSION, DEGRADATIONS, FACIAL, PICTURE, TEMPORAL, damage
from lmm_qa.degrade.dataset import BadSource, DegradedDataset, Recipe, _words, read_clip
from lmm_qa.degrade.full_reference import ceiling, make_copy
from lmm_qa.errors import ClipError, ClipTruncated, MissingExtra, ResultsError, UsageError
from lmm_qa.evaluation.labels import read_labels
from lmm_qa.manifest import expand
from lmm_qa.ratings_io import read_rows, write_rows
from lmm_qa.tables import Row
from lmm_qa.training.dataset import Data, load

SAMPLES = Path(lmm_qa.__file__).parent / "samples"
QUICK = Recipe(causes=("blur", "stall"), strengths=(0.5, 1.0), pairs=1, length=0.4)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A folder with a real clip and a small one."""
    folder = tmp_path / "clips"
    folder.mkdir()
    shutil.copy(SAMPLES / "astronaut_clean.mp4", folder / "real.mp4")
    write_clip(folder / "small.mp4", frames=12, size=(96, 64), audio=True)
    return folder


def make(manifest: Path, sources: Path, recipe: Recipe = QUICK) -> list[Row | BadSource]:
    return list(DegradedDataset(manifest, expand([sources]), recipe).make())


def pictures(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "lmm_qa", *map(str, arguments)], capture_output=True, text=True)


# --- which copies ----------------------------------------------------------------------------------------------------


def test_each_cause_comes_at_each_strength() -> None:
    singles = [one for one in Recipe().damages("a") if len(one) == 1]
    assert len(singles) == len(set(singles)) == len(DEGRADATIONS) * 4
    assert Recipe().damages("a")[0] == ()


def test_pairs_are_of_different_kinds_and_drawn_for_each_source() -> None:
    recipe = Recipe(pairs=40, seed=5)
    pairs = [one for one in recipe.damages("a") if len(one) == 2]
    assert len(pairs) == len(set(pairs)) == 40
    for kind in (FACIAL, PICTURE, COMPRESSION, TEMPORAL):
        assert not any({first, second} <= set(kind) for (first, _), (second, _) in pairs)
    assert recipe.damages("a") == Recipe(pairs=40, seed=5).damages("a")
    assert recipe.damages("a") != recipe.damages("b")
    assert recipe.damages("a") != Recipe(pairs=40, seed=6).damages("a")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"causes": ("blur", "fog")}, "unknown cause 'fog': use defocus, "),
        ({"causes": ()}, "give at least one cause and one strength"),
        ({"causes": ("blur", "blur")}, "cause blur is given twice"),
        ({"strengths": (0.5, 0.0)}, "above 0 and at most 1, received 0;"),
        ({"strengths": (1.5,)}, "received 1.5"),
        ({"scale": (5, 1)}, "from the worst to the best MOS, received 5 1"),
        ({"length": 0}, "above 0 seconds, received 0"),
        ({"causes": ("blur", "noise"), "pairs": 1}, "0 to 0 pairs can be made, received 1"),
        ({"causes": ("blur", "h264"), "strengths": (0.5, 1), "pairs": 5}, "0 to 4 pairs can be made, received 5"),
    ],
)
def test_what_is_no_recipe(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe(**wrong)  # type: ignore[arg-type]


# --- reading a source ------------------------------------------------------------------------------------------------


def test_the_first_seconds_are_read_upright(clips_dir: Path) -> None:
    frames, fps, bits = read_clip(clips_dir / "turned_90.mp4", 0.5)
    assert fps == pytest.approx(25)
    assert np.array_equal(frames, ffmpeg_frames(clips_dir / "turned_90.mp4", 128, 192)[:12])
    packets = ffmpeg("-i", clips_dir / "h264.mp4", "-c", "copy", "-f", "h264", "-")
    assert read_clip(clips_dir / "h264.mp4", 60)[2] == pytest.approx(8 * len(packets) / (60 * 192 * 128), rel=0.05)
    assert bits > 0


def test_what_cannot_be_read(clips_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ClipError, match="22x10: 64 pixels a side"):
        read_clip(clips_dir / "tiny.mp4", 1)
    (tmp_path / "cut.mp4").write_bytes((clips_dir / "h264.mp4").read_bytes()[:-400])
    with pytest.raises(ClipTruncated):
        read_clip(tmp_path / "cut.mp4", 10)


# --- the set ---------------------------------------------------------------------------------------------------------


def test_a_row_says_what_was_done(sources: Path, tmp_path: Path) -> None:
    rows = make(tmp_path / "set" / "labels.jsonl", sources)
    assert read_rows(tmp_path / "set" / "labels.jsonl") == rows
    assert len(rows) == 2 * 6
    by_name = {row["clip"]: row for row in rows if isinstance(row, dict)}
    assert set(by_name) == {path.name for path in (tmp_path / "set").glob("*.mp4")}

    frames, fps, bits = read_clip(sources / "real.mp4", 0.4)
    row = by_name["real--stall-0.5.mp4"]
    copy = make_copy(frames, [("stall", 0.5)], row["seed"], fps=fps)
    assert row["causes"] == ["stall"]
    assert row["strengths"] == [0.5]
    assert row["places"] == [[0, 0, 1, 1]]
    assert row["seconds"] == [pytest.approx(list(copy.steps[0].seconds))]
    assert row["source"] == row["group"] == "real.mp4"
    assert row["vmaf"] is None
    assert row["scale"] == [1, 5]
    assert row["ceiling"] == pytest.approx(ceiling(384, 384, bits), abs=1e-4)
    assert row["mos"] == pytest.approx(1 + 4 * copy.quality * row["ceiling"], abs=1e-3)
    assert row["face_found"] is True
    assert by_name["small--clean.mp4"]["face_found"] is False
    assert by_name["real--clean.mp4"]["causes"] == []
    assert by_name["real--clean.mp4"]["mos"] == pytest.approx(1 + 4 * row["ceiling"], abs=1e-3)
    assert by_name["real--blur-1.mp4"]["vmaf"] < by_name["real--blur-0.5.mp4"]["vmaf"]
    assert by_name["real--blur-1.mp4"]["mos"] < by_name["real--blur-0.5.mp4"]["mos"] < by_name["real--clean.mp4"]["mos"]
    assert sum(len(row["causes"]) == 2 for row in by_name.values()) == 2


def test_a_file_holds_the_damaged_frames(sources: Path, tmp_path: Path) -> None:
    rows = make(tmp_path / "set" / "labels.csv", sources, Recipe(("blur",), (0.7,), length=0.4))
    frames, *_ = read_clip(sources / "real.mp4", 0.4)
    row = next(row for row in rows if isinstance(row, dict) and row["clip"] == "real--blur-0.7.mp4")
    stored = pictures(tmp_path / "set" / row["clip"])
    assert np.abs(stored.astype(int) - damage(frames, "blur", 0.7, row["seed"]).frames).mean() < 2
    with av.open(str(tmp_path / "set" / "small--clean.mp4")) as container:
        assert [stream.type for stream in container.streams] == ["video"]
        assert container.streams.video[0].average_rate == pytest.approx(25)
    clean = pictures(tmp_path / "set" / "real--clean.mp4")
    assert 10 * np.log10(255**2 / np.mean((clean.astype(float) - frames) ** 2)) > 38


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_the_manifest_serves_as_labels_and_as_a_list(sources: Path, tmp_path: Path, suffix: str) -> None:
    manifest = tmp_path / "set" / f"labels{suffix}"
    rows = make(manifest, sources)
    labels = read_labels(manifest)
    assert [(label.clip, label.mos, label.group) for label in labels] == [
        (row["clip"], row["mos"], row["source"]) for row in read_rows(manifest)
    ]
    assert len(labels) == len(rows)
    assert all(clip.path.is_file() for clip in expand([manifest]))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the folders `clips` and `set`."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "clips").mkdir()
    shutil.copy(SAMPLES / "astronaut_clean.mp4", folder / "clips" / "real.mp4")
    make(folder / "set" / "labels.jsonl", folder / "clips")
    return folder


def test_the_manifest_teaches_defects_and_words(made: Path) -> None:
    rows = {row["clip"]: row for row in read_rows(made / "set" / "labels.jsonl")}
    options = {"validation_share": 0, "calibration_share": 0}
    for suffix in (".jsonl", ".csv", ".parquet"):
        write_rows(made / "set" / f"labels{suffix}", [*rows.values()])
        table = {"path": f"labels{suffix}", "scale": [1, 5]}
        examples = load(Data.parse({"root": made / "set", "train": [table], **options}, "data"), seed=0).train
        assert {example.name for example in examples} == set(rows)
        for example in examples:
            row = rows[example.name]
            known = reference_defects(zip(row["causes"], row["strengths"], strict=True))
            assert example.found is not None and example.explanation is not None
            found = {one.defect for one in example.found}
            assert found <= {name for name, there in known.items() if there}
            assert set(example.absent) == {name for name, there in known.items() if there is False}
            assert mentioned_defects(example.explanation) == found
            level = ("bad", "poor", "fair", "good", "excellent")[round(row["mos"] - 1)]
            assert re.match(rf"The quality of this video is {level}\b", example.explanation)
        (stalled,) = next(example.found for example in examples if example.name == "real--stall-0.5.mp4") or ()
        first, last = (round(moment, 1) for moment in rows["real--stall-0.5.mp4"]["seconds"][0])
        assert (stalled.defect, stalled.seconds) == ("stall", ((first, last),))
        assert f"from {first} to {last} s" in rows["real--stall-0.5.mp4"]["explanation"]


def test_an_older_manifest_learns_the_words(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "set", tmp_path / "set")
    rows = read_rows(made / "set" / "labels.jsonl")
    older = [{name: row[name] for name in row if name not in ("defects", "explanation")} for row in rows]
    write_rows(tmp_path / "set" / "labels.csv", older)
    assert make(tmp_path / "set" / "labels.csv", made / "clips") == [], "no copy is made again"
    assert read_rows(tmp_path / "set" / "labels.csv") == rows


ROW: Row = {"clip": "a--x.mp4", "seed": 3, "scale": [0, 5], "mos": 2.4, "quality": 0.5}


def words(causes: dict[str, float], seconds: float = 4.0, **more: object) -> Row:
    spans = [(0.0, seconds)] * len(causes)
    return _words(ROW | {"causes": [*causes], "strengths": [*causes.values()], "seconds": spans} | more)


def test_the_strongest_defect_comes_first() -> None:
    assert words({"blur": 0.3, "noise": 0.9})["defects"] == ["noise", "blur"]
    assert words({"blur": 0.3, "rescale": 0.9, "noise": 0.6})["defects"] == ["blur", "noise"]


def test_what_cannot_be_seen_is_neither_there_nor_absent() -> None:
    assert words({"colour_cast": 0.9})["defects"] == ["colour"]
    unseen = words({"colour_cast": 0.9}, quality=0.97, mos=4.9)
    assert unseen["defects"] == ["?colour"]
    assert not mentioned_defects(unseen["explanation"]) and "the video is" not in unseen["explanation"]
    assert words({"colour_cast": 0.1})["defects"] == ["?colour"]
    late = words({"bitrate_switch": 0.9, "buffering": 0.5})["defects"]
    assert late[0] == "buffering from 0.0 to 4.0 s" and "?bitrate_switch" in late, "its end may be cut off"
    assert words({"stall": 0.3}, seconds=0.01)["defects"][0] == "stall", "no time that lasts nothing"


def test_the_level_is_the_nearest_of_the_scale() -> None:
    said = [words({}, mos=mos, quality=1)["explanation"] for mos in (0, 0.7, 2.4, 4.3, 4.5)]
    levels = [re.findall(r"\w+", text)[6] for text in said]
    assert levels == ["bad", "poor", "fair", "good", "excellent"]


def test_the_same_seed_makes_the_same_files(sources: Path, tmp_path: Path) -> None:
    recipe = Recipe(("noise", "stall"), (0.5,), pairs=1, length=0.2)
    for name in ("one", "two"):
        make(tmp_path / name / "labels.jsonl", sources, recipe)
    assert (tmp_path / "one" / "labels.jsonl").read_bytes() == (tmp_path / "two" / "labels.jsonl").read_bytes()
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_what_is_there_is_not_made_again(sources: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "set" / "labels.csv"
    make(manifest, sources)
    before = manifest.read_text()
    times = {path: path.stat().st_mtime_ns for path in manifest.parent.glob("*.mp4")}
    assert make(manifest, sources) == []
    gone = manifest.parent / "small--blur-1.mp4"
    gone.unlink()
    (again,) = make(manifest, sources)
    assert isinstance(again, dict)
    assert again["clip"] == gone.name
    assert manifest.read_text() == before
    assert {path: path.stat().st_mtime_ns for path in times if path != gone} == {
        path: moment for path, moment in times.items() if path != gone
    }


def test_what_would_be_another_copy_is_made_again(sources: Path, tmp_path: Path) -> None:
    manifest, one = tmp_path / "set" / "labels.jsonl", {"causes": ("blur",), "strengths": (0.5,), "length": 0.2}
    make(manifest, sources, Recipe(**one))
    assert len(make(manifest, sources, Recipe(**one, seed=1))) == 4
    assert len(make(manifest, sources, Recipe(**one, seed=1, scale=(0, 5)))) == 4
    assert len(make(manifest, sources, Recipe(**one | {"length": 0.1}, seed=1, scale=(0, 5)))) == 4
    make(manifest, sources, Recipe(**one, seed=1, scale=(0, 5)))
    write_clip(sources / "small.mp4", frames=9, size=(96, 64))
    assert len(make(manifest, sources, Recipe(**one, seed=1, scale=(0, 5)))) == 2
    assert len(read_rows(manifest)) == 4


def test_other_sources_keep_their_rows(sources: Path, tmp_path: Path) -> None:
    manifest, recipe = tmp_path / "set" / "labels.parquet", Recipe(("blur",), (0.5,), length=0.2)
    make(manifest, sources / "small.mp4", recipe)
    make(manifest, sources / "real.mp4", recipe)
    assert [row["source"] for row in read_rows(manifest)] == [
        str(sources / name) for name in ("small.mp4", "small.mp4", "real.mp4", "real.mp4")
    ]


def test_sources_of_one_name_have_copies_of_their_own(sources: Path, tmp_path: Path) -> None:
    (sources / "more").mkdir()
    write_clip(sources / "more" / "small.mkv", frames=12, size=(64, 64))
    rows = make(tmp_path / "set" / "labels.jsonl", sources, Recipe(("blur",), (0.5,), length=0.2))
    assert len({row["clip"] for row in rows if isinstance(row, dict)}) == 6


def test_a_bad_source_does_not_stop_the_others(sources: Path, tmp_path: Path) -> None:
    (sources / "text.mp4").write_text("no video")
    rows = make(tmp_path / "set" / "labels.jsonl", sources)
    bad = [row for row in rows if isinstance(row, BadSource)]
    assert [(one.source, one.copies) for one in bad] == [("text.mp4", 6)]
    assert bad[0].error.startswith("ClipUnreadable: ")
    assert len(read_labels(tmp_path / "set" / "labels.jsonl")) == 12


def test_copies_do_not_lie_beside_their_sources(sources: Path) -> None:
    with pytest.raises(UsageError, match=r"beside their source real\.mp4: name a manifest in another folder"):
        DegradedDataset(sources / "labels.jsonl", expand([sources]), QUICK)


def test_without_the_extra_it_says_what_to_install(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = DegradedDataset(tmp_path / "set" / "labels.csv", expand([sources]), QUICK)
    monkeypatch.setattr("lmm_qa.degrade.dataset.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'lmm-qa\[degrade\]'"):
        list(copies.make())


def test_another_table_is_left_alone(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("clip,mos\na.mp4,3\n")
    with pytest.raises(ResultsError, match=r"labels\.csv exists and is no manifest of damaged copies"):
        DegradedDataset(tmp_path / "labels.csv", expand([sources]), QUICK)
    with pytest.raises(UsageError, match="by its suffix"):
        DegradedDataset(tmp_path / "set", expand([sources]), QUICK)


# --- the command -----------------------------------------------------------------------------------------------------

FEW = ("--causes", "blur,h264", "--strengths", "0.5", "--length", "0.2", "--workers", "1")


def test_the_command_makes_a_set(sources: Path, tmp_path: Path) -> None:
    (sources / "text.mp4").write_text("no video")
    missing = sources / "missing.mp4"
    manifest = tmp_path / "set" / "labels.csv"
    done = run("degrade", sources, missing, "-o", manifest, *FEW, "--pairs", "1", "--scale", "0", "5")
    assert done.returncode == 3
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert any(line.startswith("text.mp4: ClipUnreadable: ") for line in lines)
    assert any("missing.mp4: ClipNotFound: " in line for line in lines)
    assert lines[-1].startswith("8 copies, 8 of 2 sources could not be made; 8 now, in ")
    assert len(read_labels(manifest)) == 8
    assert {tuple(row["scale"]) for row in read_rows(manifest)} == {(0, 5)}
    again = run("degrade", sources / "real.mp4", "-o", manifest, *FEW, "--pairs", "1", "--scale", "0", "5")
    assert again.returncode == 0
    assert "4 copies are in" in again.stderr


def test_the_help_names_all_causes() -> None:
    said = re.search(r"Causes: ([^.]*)\.", " ".join((lmm_qa.cli.degrade.__doc__ or "").split()))
    assert said is not None
    assert re.split("[,;] ", said[1]) == list(DEGRADATIONS)


def test_what_the_command_refuses(sources: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (("--strengths", "a,b"), "--strengths are numbers with commas between them, received 'a,b'"),
        (("--causes", "fog"), "unknown cause 'fog'"),
    ):
        done = run("degrade", sources, "-o", tmp_path / "set" / "labels.csv", *arguments)
        assert done.returncode == 2
        assert message in done.stderr
    assert not (tmp_path / "set").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_killed_run_goes_on_where_it_was(sources: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "set" / "labels.csv"
    causes = ("--causes", "blur,rescale,jpeg", "--strengths", "0.2,0.4,0.6,0.8,1")
    command = [sys.executable, "-m", "lmm_qa", "degrade", str(sources / "real.mp4"), "-o", str(manifest), *causes]
    running = subprocess.Popen([*command, "--workers", "1", "--length", "0.6"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("set/real--*.mp4"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Traceback" not in said
    assert not manifest.exists()
    made = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("set/real--*.mp4")}
    done = subprocess.run([*command, "--workers", "1", "--length", "0.6"], capture_output=True, text=True)
    assert done.returncode == 0
    assert len(read_labels(manifest)) == 16
    kept = [name for name, moment in made.items() if (manifest.parent / name).stat().st_mtime_ns == moment]
    assert len(kept) >= 3
    assert not list(manifest.parent.glob("*.partial.jsonl"))
