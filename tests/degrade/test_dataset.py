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
from paths import SAMPLES

import lmm_qa
import lmm_qa.cli.app
from lmm_qa.defects.explanation import mentioned_defects
from lmm_qa.defects.vocabulary import reference_defects
from lmm_qa.degrade.causes import COMPRESSION, DEGRADATIONS, FACIAL, PICTURE, TEMPORAL, degrade
from lmm_qa.degrade.dataset import DegradationPlan, DegradedDataset, FailedSource, read_clip, training_columns
from lmm_qa.degrade.detail import edge_sharpness
from lmm_qa.degrade.full_reference import make_copy, quality_ceiling
from lmm_qa.errors import ClipError, ClipTruncated, MissingExtra, ResultsError, UsageError
from lmm_qa.evaluation.labels import read_labels
from lmm_qa.files.tables import Row, read_rows, write_rows
from lmm_qa.manifest import expand
from lmm_qa.training.dataset import Data, load

QUICK = DegradationPlan(causes=("blur", "stall"), strengths=(0.5, 1.0), pairs=1, length=0.4)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A folder with a real clip and a small one."""
    folder = tmp_path / "clips"
    folder.mkdir()
    shutil.copy(SAMPLES / "astronaut_clean.mp4", folder / "real.mp4")
    write_clip(folder / "small.mp4", frames=12, size=(96, 64), audio=True)
    return folder


def make(manifest: Path, sources: Path, plan: DegradationPlan = QUICK) -> list[Row | FailedSource]:
    return list(DegradedDataset(manifest, expand([sources]), plan).make())


def pictures(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "lmm_qa", *map(str, arguments)], capture_output=True, text=True)


# --- The plan --------------------------------------------------------------------------------------------------------


def test_each_cause_is_applied_at_each_strength() -> None:
    singles = [each for each in DegradationPlan().copies("a") if len(each) == 1]
    assert len(singles) == len(set(singles)) == len(DEGRADATIONS) * 4
    assert DegradationPlan().copies("a")[0] == ()


def test_pairs_are_of_different_groups_and_depend_on_the_source() -> None:
    plan = DegradationPlan(pairs=40, seed=5)
    pairs = [each for each in plan.copies("a") if len(each) == 2]
    assert len(pairs) == len(set(pairs)) == 40
    for group in (FACIAL, PICTURE, COMPRESSION, TEMPORAL):
        assert not any({first, second} <= set(group) for (first, _), (second, _) in pairs)
    assert plan.copies("a") == DegradationPlan(pairs=40, seed=5).copies("a")
    assert plan.copies("a") != plan.copies("b")
    assert plan.copies("a") != DegradationPlan(pairs=40, seed=6).copies("a")


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
def test_an_invalid_plan_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DegradationPlan(**wrong)


# --- Reading a source ------------------------------------------------------------------------------------------------


def test_the_first_seconds_are_read_and_rotated(clips_dir: Path) -> None:
    frames, fps, bits = read_clip(clips_dir / "turned_90.mp4", 0.5)
    assert fps == pytest.approx(25)
    assert np.array_equal(frames, ffmpeg_frames(clips_dir / "turned_90.mp4", 128, 192)[:12])
    packets = ffmpeg("-i", clips_dir / "h264.mp4", "-c", "copy", "-f", "h264", "-")
    assert read_clip(clips_dir / "h264.mp4", 60)[2] == pytest.approx(8 * len(packets) / (60 * 192 * 128), rel=0.05)
    assert bits > 0


def test_a_source_that_cannot_be_read_is_an_error(clips_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ClipError, match="22x10: sources need at least 64 pixels a side"):
        read_clip(clips_dir / "tiny.mp4", 1)
    (tmp_path / "cut.mp4").write_bytes((clips_dir / "h264.mp4").read_bytes()[:-400])
    with pytest.raises(ClipTruncated):
        read_clip(tmp_path / "cut.mp4", 10)


# --- The data set ----------------------------------------------------------------------------------------------------


def test_a_row_describes_its_copy(sources: Path, tmp_path: Path) -> None:
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
    assert row["seconds"] == [pytest.approx(list(copy.degradations[0].seconds))]
    assert row["source"] == row["group"] == "real.mp4"
    assert row["vmaf"] is None
    assert row["scale"] == [1, 5]
    assert row["ceiling"] == pytest.approx(quality_ceiling(384, 384, bits, edge_sharpness(frames)), abs=1e-4)
    assert row["mos"] == pytest.approx(1 + 4 * copy.quality * row["ceiling"], abs=1e-3)
    assert row["face_found"] is True
    assert by_name["small--clean.mp4"]["face_found"] is False
    assert by_name["real--clean.mp4"]["causes"] == []
    assert by_name["real--clean.mp4"]["mos"] == pytest.approx(1 + 4 * row["ceiling"], abs=1e-3)
    assert by_name["real--blur-1.mp4"]["vmaf"] < by_name["real--blur-0.5.mp4"]["vmaf"]
    assert by_name["real--blur-1.mp4"]["mos"] < by_name["real--blur-0.5.mp4"]["mos"] < by_name["real--clean.mp4"]["mos"]
    assert sum(len(row["causes"]) == 2 for row in by_name.values()) == 2


def test_a_file_contains_the_degraded_frames(sources: Path, tmp_path: Path) -> None:
    rows = make(tmp_path / "set" / "labels.csv", sources, DegradationPlan(("blur",), (0.7,), length=0.4))
    frames, *_ = read_clip(sources / "real.mp4", 0.4)
    row = next(row for row in rows if isinstance(row, dict) and row["clip"] == "real--blur-0.7.mp4")
    stored = pictures(tmp_path / "set" / row["clip"])
    assert np.abs(stored.astype(int) - degrade(frames, "blur", 0.7, row["seed"]).frames).mean() < 2
    with av.open(str(tmp_path / "set" / "small--clean.mp4")) as container:
        assert [stream.type for stream in container.streams] == ["video"]
        assert container.streams.video[0].average_rate == pytest.approx(25)
    clean = pictures(tmp_path / "set" / "real--clean.mp4")
    assert 10 * np.log10(255**2 / np.mean((clean.astype(float) - frames) ** 2)) > 38


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_the_table_can_be_used_as_labels_and_as_a_list_of_clips(sources: Path, tmp_path: Path, suffix: str) -> None:
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


def test_the_table_can_be_used_to_train_on_defects_and_explanations(made: Path) -> None:
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
            found = {finding.defect for finding in example.found}
            assert found <= {name for name, present in known.items() if present}
            assert set(example.absent) == {name for name, present in known.items() if present is False}
            assert mentioned_defects(example.explanation) == found
            level = ("bad", "poor", "fair", "good", "excellent")[round(row["mos"] - 1)]
            assert re.match(rf"The quality of this video is {level}\b", example.explanation)
        (stalled,) = next(example.found for example in examples if example.name == "real--stall-0.5.mp4") or ()
        first, last = (round(moment, 1) for moment in rows["real--stall-0.5.mp4"]["seconds"][0])
        assert (stalled.defect, stalled.seconds) == ("stall", ((first, last),))
        assert f"from {first} to {last} s" in rows["real--stall-0.5.mp4"]["explanation"]


def test_missing_training_columns_are_added_to_an_older_table(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "set", tmp_path / "set")
    rows = read_rows(made / "set" / "labels.jsonl")
    older = [{name: row[name] for name in row if name not in ("defects", "explanation")} for row in rows]
    write_rows(tmp_path / "set" / "labels.csv", older)
    assert make(tmp_path / "set" / "labels.csv", made / "clips") == [], "no copy is made again"
    assert read_rows(tmp_path / "set" / "labels.csv") == rows


ROW: Row = {"clip": "a--x.mp4", "seed": 3, "scale": [0, 5], "mos": 2.4, "quality": 0.5}


def columns(causes: dict[str, float], seconds: float = 4.0, **more: object) -> Row:
    spans = [(0.0, seconds)] * len(causes)
    return training_columns(ROW | {"causes": [*causes], "strengths": [*causes.values()], "seconds": spans} | more)


def test_the_strongest_defect_is_first() -> None:
    assert columns({"blur": 0.3, "noise": 0.9})["defects"] == ["noise", "blur"]
    assert columns({"blur": 0.3, "rescale": 0.9, "noise": 0.6})["defects"] == ["blur", "noise"]


def test_an_imperceptible_defect_is_neither_present_nor_absent() -> None:
    assert columns({"colour_cast": 0.9})["defects"] == ["colour"]
    unseen = columns({"colour_cast": 0.9}, quality=0.97, mos=4.9)
    assert unseen["defects"] == ["?colour"]
    assert not mentioned_defects(unseen["explanation"]) and "the video is" not in unseen["explanation"]
    assert columns({"colour_cast": 0.1})["defects"] == ["?colour"]
    late = columns({"bitrate_switch": 0.9, "buffering": 0.5})["defects"]
    assert late[0] == "buffering from 0.0 to 4.0 s" and "?bitrate_switch" in late, "its end may be cut off"
    assert columns({"stall": 0.3}, seconds=0.01)["defects"][0] == "stall", "no empty span"


def test_the_level_is_the_nearest_on_the_scale() -> None:
    texts = [columns({}, mos=mos, quality=1)["explanation"] for mos in (0, 0.7, 2.4, 4.3, 4.5)]
    levels = [re.findall(r"\w+", text)[6] for text in texts]
    assert levels == ["bad", "poor", "fair", "good", "excellent"]


def test_the_same_seed_makes_the_same_files(sources: Path, tmp_path: Path) -> None:
    plan = DegradationPlan(("noise", "stall"), (0.5,), pairs=1, length=0.2)
    for name in ("one", "two"):
        make(tmp_path / name / "labels.jsonl", sources, plan)
    assert (tmp_path / "one" / "labels.jsonl").read_bytes() == (tmp_path / "two" / "labels.jsonl").read_bytes()
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_an_existing_copy_is_not_made_again(sources: Path, tmp_path: Path) -> None:
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


def test_a_copy_with_another_identity_is_made_again(sources: Path, tmp_path: Path) -> None:
    manifest, one = tmp_path / "set" / "labels.jsonl", {"causes": ("blur",), "strengths": (0.5,), "length": 0.2}
    make(manifest, sources, DegradationPlan(**one))
    assert len(make(manifest, sources, DegradationPlan(**one, seed=1))) == 4
    assert len(make(manifest, sources, DegradationPlan(**one, seed=1, scale=(0, 5)))) == 4
    assert len(make(manifest, sources, DegradationPlan(**one | {"length": 0.1}, seed=1, scale=(0, 5)))) == 4
    make(manifest, sources, DegradationPlan(**one, seed=1, scale=(0, 5)))
    write_clip(sources / "small.mp4", frames=9, size=(96, 64))
    assert len(make(manifest, sources, DegradationPlan(**one, seed=1, scale=(0, 5)))) == 2
    assert len(read_rows(manifest)) == 4


def test_other_sources_keep_their_rows(sources: Path, tmp_path: Path) -> None:
    manifest, plan = tmp_path / "set" / "labels.parquet", DegradationPlan(("blur",), (0.5,), length=0.2)
    make(manifest, sources / "small.mp4", plan)
    make(manifest, sources / "real.mp4", plan)
    assert [row["source"] for row in read_rows(manifest)] == [
        str(sources / name) for name in ("small.mp4", "small.mp4", "real.mp4", "real.mp4")
    ]


def test_sources_with_the_same_name_have_different_copies(sources: Path, tmp_path: Path) -> None:
    (sources / "more").mkdir()
    write_clip(sources / "more" / "small.mkv", frames=12, size=(64, 64))
    rows = make(tmp_path / "set" / "labels.jsonl", sources, DegradationPlan(("blur",), (0.5,), length=0.2))
    assert len({row["clip"] for row in rows if isinstance(row, dict)}) == 6


def test_a_failed_source_does_not_stop_the_others(sources: Path, tmp_path: Path) -> None:
    (sources / "text.mp4").write_text("no video")
    rows = make(tmp_path / "set" / "labels.jsonl", sources)
    failed = [row for row in rows if isinstance(row, FailedSource)]
    assert [(each.source, each.copies) for each in failed] == [("text.mp4", 6)]
    assert failed[0].error.startswith("ClipUnreadable: ")
    assert len(read_labels(tmp_path / "set" / "labels.jsonl")) == 12


def test_copies_are_not_written_next_to_their_sources(sources: Path) -> None:
    with pytest.raises(UsageError, match=r"next to their source real\.mp4: name a table in another folder"):
        DegradedDataset(sources / "labels.jsonl", expand([sources]), QUICK)


def test_a_missing_extra_is_an_error_that_says_what_to_install(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = DegradedDataset(tmp_path / "set" / "labels.csv", expand([sources]), QUICK)
    monkeypatch.setattr("lmm_qa.degrade.dataset.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'lmm-qa\[degrade\]'"):
        list(dataset.make())


def test_a_table_that_was_not_made_here_is_not_overwritten(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("clip,mos\na.mp4,3\n")
    with pytest.raises(ResultsError, match=r"labels\.csv exists and is not a table of degraded copies"):
        DegradedDataset(tmp_path / "labels.csv", expand([sources]), QUICK)
    with pytest.raises(UsageError, match="by its suffix"):
        DegradedDataset(tmp_path / "set", expand([sources]), QUICK)


# --- The command -----------------------------------------------------------------------------------------------------

FEW = ("--causes", "blur,h264", "--strengths", "0.5", "--length", "0.2", "--workers", "1")


def test_the_command_makes_a_data_set(sources: Path, tmp_path: Path) -> None:
    (sources / "text.mp4").write_text("no video")
    missing = sources / "missing.mp4"
    manifest = tmp_path / "set" / "labels.csv"
    done = run("degrade", sources, missing, "-o", manifest, *FEW, "--pairs", "1", "--scale", "0", "5")
    assert done.returncode == 3
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert any(line.startswith("text.mp4: ClipUnreadable: ") for line in lines)
    assert any("missing.mp4: ClipNotFound: " in line for line in lines)
    assert lines[-1].startswith("8 copies, 8 of 2 sources could not be made; 8 new, in ")
    assert len(read_labels(manifest)) == 8
    assert {tuple(row["scale"]) for row in read_rows(manifest)} == {(0, 5)}
    again = run("degrade", sources / "real.mp4", "-o", manifest, *FEW, "--pairs", "1", "--scale", "0", "5")
    assert again.returncode == 0
    assert "4 copies already in" in again.stderr


def test_the_help_names_all_causes() -> None:
    listed = re.search(r"Causes: ([^.]*)\.", " ".join((lmm_qa.cli.app.degrade.__doc__ or "").split()))
    assert listed is not None
    assert re.split("[,;] ", listed[1]) == list(DEGRADATIONS)


def test_the_command_refuses_invalid_options(sources: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (("--strengths", "a,b"), "--strengths are numbers separated by commas, received 'a,b'"),
        (("--causes", "fog"), "unknown cause 'fog'"),
    ):
        done = run("degrade", sources, "-o", tmp_path / "set" / "labels.csv", *arguments)
        assert done.returncode == 2
        assert message in done.stderr
    assert not (tmp_path / "set").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_an_interrupted_run_is_continued(sources: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "set" / "labels.csv"
    causes = ("--causes", "blur,rescale,jpeg", "--strengths", "0.2,0.4,0.6,0.8,1")
    command = [sys.executable, "-m", "lmm_qa", "degrade", str(sources / "real.mp4"), "-o", str(manifest), *causes]
    running = subprocess.Popen([*command, "--workers", "1", "--length", "0.6"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("set/real--*.mp4"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, stderr = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Traceback" not in stderr
    assert not manifest.exists()
    made = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("set/real--*.mp4")}
    done = subprocess.run([*command, "--workers", "1", "--length", "0.6"], capture_output=True, text=True)
    assert done.returncode == 0
    assert len(read_labels(manifest)) == 16
    kept = [name for name, moment in made.items() if (manifest.parent / name).stat().st_mtime_ns == moment]
    assert len(kept) >= 3
    assert not list(manifest.parent.glob("*.partial.jsonl"))
