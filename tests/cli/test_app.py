"""python -m pytest tests/cli/test_app.py

The command as a user runs it. Each `python -m lmm_qa` loads torch anew, so that most tests call its entry point here.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import psutil
import pytest
import torch
from backbones import add_adapter
from clips import write_clip
from commands import Command, run_python
from safetensors import safe_open
from transformers import AutoProcessor
from typer.main import get_command

import lmm_qa.cli.app
import lmm_qa.cli.terminal
from lmm_qa import Sampling, View, load_prompt
from lmm_qa.files.tables import read_rows
from lmm_qa.manifest import content_id
from lmm_qa.model.calibration import Calibration
from lmm_qa.model.inputs import prepare_inputs
from lmm_qa.rater import clip_input
from lmm_qa.video.decode import read_frames

FAST = ("--device", "cpu", "--sampling", "uniform:2", "--view", "whole:56", "--workers", "1")


@pytest.fixture(scope="module")
def model(family_dir: Callable[[str], Path]) -> Path:
    return family_dir("qwen2_vl")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a folder `clips` of three clips."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips" / "more").mkdir(parents=True)
    for number, (name, size) in enumerate({"a": (64, 64), "b": (96, 64), "more/c": (64, 128)}.items(), 3):
        write_clip(tmp_path / "clips" / f"{name}.mp4", frames=number, size=size)
    return tmp_path


def add_broken(folder: Path) -> dict[str, str]:
    """Broken clips, and the class of error that each is."""
    whole = (folder / "clips" / "a.mp4").read_bytes()
    (folder / "clips" / "cut.mp4").write_bytes(whole[:-200])
    (folder / "clips" / "empty.mp4").touch()
    (folder / "clips" / "text.mp4").write_text("no video")
    return {"cut.mp4": "ClipTruncated", "empty.mp4": "ClipUnreadable", "text.mp4": "ClipUnreadable"}


# --- in a process of its own -----------------------------------------------------------------------------------------


# PEFT 0.21 reads an attribute that transformers 5.23 has deprecated.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_pipe_gets_one_json_line_per_clip(folder: Path, model: Path) -> None:
    adapter = add_adapter(model, folder / "adapter")
    done = run_python("-m", "lmm_qa", "rate", "clips/a.mp4", "gone.mp4", "-m", "adapter", *FAST, cwd=folder)
    assert done.code == 3
    good, gone = done.rows
    assert (good["clip"], good["error"], good["scale"]) == ("clips/a.mp4", None, [1, 5])
    assert 1 < good["score"] < 5
    assert (gone["clip"], gone["score"], gone["error"]["class"]) == ("gone.mp4", None, "ClipNotFound")
    assert good["adapter"] == str(adapter.relative_to(folder))
    note, loaded, summary = done.err.splitlines()  # and nothing of what the libraries have to say
    assert note.startswith("note: adapter has no rater.json: default prompt, scale [1, 5]")
    assert loaded.startswith("model adapter (Qwen2VLForConditionalGeneration + adapter); device cpu (requested), dtype")
    assert loaded.endswith("attention sdpa (on cpu)")
    assert summary.startswith("1 clip rated, 1 could not be rated; 2 new, in ")


def test_help_and_import_load_no_heavy_library(tmp_path: Path) -> None:
    script = """
import sys
import lmm_qa
heavy = {"torch", "transformers", "numpy", "peft", "scipy", "pyarrow", "av", "pandas", "datasets"}
print("import:", *sorted(heavy & sys.modules.keys()))
sys.argv = ["lmm-qa", *sys.argv[1:]]
from lmm_qa.cli.app import main
try:
    main()
finally:
    print("help:", *sorted(heavy & sys.modules.keys()))
"""
    for arguments in (("--help",), ("rate", "--help")):
        done = run_python("-c", script, *arguments, cwd=tmp_path)
        assert done.code == 0, done.err
        lines = done.out.splitlines()
        assert (lines[0], lines[-1]) == ("import:", "help:")
        assert "Usage: lmm-qa" in done.out
        assert done.err == ""


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no signals to another process")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_an_interrupted_run_can_be_resumed(folder: Path, model: Path, command: Command, name: str) -> None:
    number = getattr(signal, name)
    for copy in range(40):  # enough that none is the last before this process notices the first, on a busy machine
        shutil.copy(folder / "clips" / "a.mp4", folder / "clips" / f"copy{copy}.mp4")
        with (folder / "clips" / f"copy{copy}.mp4").open("ab") as file:
            file.write(b"\0\0\0\x09free" + bytes([copy]))  # an empty box: the same pictures, other bytes
    arguments = ("rate", "clips", "-m", model, *FAST, "--batch-size", "1", "-o", "r.jsonl")
    with subprocess.Popen(
        [sys.executable, "-m", "lmm_qa", *map(str, arguments)], cwd=folder, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        while not (folder / "r.jsonl").exists() or not (folder / "r.jsonl").read_bytes().count(b"\n"):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        complaint = process.stderr.read()
    assert process.returncode == 128 + number
    assert workers and not psutil.wait_procs(workers, timeout=0)[1]
    assert complaint.splitlines()[-1] == "interrupted; with -o, the same command resumes"
    assert "Traceback" not in complaint
    kept = read_rows(folder / "r.jsonl")
    assert 1 <= len(kept) < 43
    done = command(*arguments)
    assert done.code == 0
    assert f"{len(kept)} of 43 clips already rated in r.jsonl" in done.err
    rows = read_rows(folder / "r.jsonl")
    assert len(rows) == 43
    assert all(row in rows for row in kept)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")
def test_a_terminal_gets_a_table(folder: Path, model: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.openpty()
    with open(theirs, "w", encoding="utf-8") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        patch.setenv("TERM", "xterm")
        done = command("rate", "clips", "-m", model, *FAST)
        assert done.code == 0
        assert "3 clips rated; 3 new" in done.err
        shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    for word in ("clip", "score", "a.mp4", "b.mp4", "more/c.mp4"):
        assert word in shown
    assert '"score"' not in shown


# --- rating into a file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_second_run_has_nothing_to_do(folder: Path, model: Path, command: Command, suffix: str) -> None:
    output = folder / "out" / f"ratings{suffix}"
    arguments = ("rate", "clips", "-m", model, *FAST, "-o", output)
    done = command(*arguments)
    assert done.code == 0, done.err
    assert done.out == ""
    assert "3 clips rated; 3 new, in " in done.err
    rows = read_rows(output)
    assert [row["clip"] for row in rows] == ["a.mp4", "b.mp4", "more/c.mp4"]
    assert [row["content_id"] for row in rows] == [content_id(folder / "clips" / row["clip"]) for row in rows]
    assert all(1 < row["score"] < 5 for row in rows)
    before = output.read_bytes()
    again = command(*arguments)
    assert again.code == 0
    assert f"nothing to do: 3 clips already rated in {output} (--overwrite rates again)" in again.err
    assert output.read_bytes() == before


def test_one_clip_is_singular(folder: Path, model: Path, command: Command) -> None:
    arguments = ("rate", "clips/a.mp4", "-m", model, *FAST, "-o", "r.jsonl")
    assert "1 clip would be rated; " in command(*arguments, "--dry-run").err
    assert "1 clip rated; 1 new" in command(*arguments).err
    assert "nothing to do: 1 clip already rated in r.jsonl" in command(*arguments).err


def test_looking_up_rated_clips_shows_progress(
    folder: Path, model: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lmm_qa.cli.terminal, "PROGRESS_SECONDS", -1)
    arguments = ("rate", "clips", "-m", model, *FAST, "-o", "r.jsonl")
    first, second = command(*arguments), command(*arguments)
    assert "2 of 3 clips rated, " in first.err
    assert "2 of 3 clips looked up, " in second.err


def test_overwrite_rates_again(folder: Path, model: Path, command: Command) -> None:
    arguments = ("rate", "clips", "-m", model, *FAST, "-o", "r.jsonl")
    command(*arguments)
    first = read_rows(Path("r.jsonl"))
    done = command(*arguments, "--overwrite")
    assert done.code == 0
    assert "3 clips rated; 3 new" in done.err
    second = read_rows(Path("r.jsonl"))
    assert [row["score"] for row in second] == pytest.approx([row["score"] for row in first], abs=1e-4)
    assert [row["seconds"] for row in second] != [row["seconds"] for row in first]


def test_only_new_clips_are_rated(folder: Path, model: Path, command: Command) -> None:
    arguments = ("rate", "clips", "-m", model, *FAST, "-o", "r.jsonl")
    command(*arguments)
    before = read_rows(Path("r.jsonl"))
    write_clip(folder / "clips" / "aa.mp4", frames=9)
    shutil.move(folder / "clips" / "b.mp4", folder / "clips" / "renamed.mp4")
    done = command(*arguments)
    assert done.code == 0
    assert "3 of 4 clips already rated in r.jsonl" in done.err
    assert "4 clips rated; 1 new" in done.err
    after = {row["clip"]: row for row in read_rows(Path("r.jsonl"))}
    assert after["a.mp4"] == before[0]
    assert after["renamed.mp4"] == before[1] | {"clip": "renamed.mp4"}


def test_other_settings_do_not_reuse_ratings(folder: Path, model: Path, command: Command) -> None:
    command("rate", "clips", "-m", model, *FAST, "-o", "r.jsonl")
    before = Path("r.jsonl").read_bytes()
    done = command("rate", "clips", "-m", model, *FAST, "--prompt", "qalign", "-o", "r.jsonl")
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith("error: ")
    assert Path("r.jsonl").read_bytes() == before


# --- calibrated ------------------------------------------------------------------------------------------------------


RATE = ("rate", "-m", "rater", "--device", "cpu", "--workers", "1")


def run_here(folder: Path, *arguments: str) -> tuple[int, str]:
    """Run `lmm-qa` in this process, for fixtures of the module; returns exit code and stderr."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(said), pytest.raises(SystemExit) as ended:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["lmm-qa", *arguments])
        lmm_qa.cli.app.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code, said.getvalue()


@pytest.fixture(scope="module")
def calibrated(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a rater directory, its ratings (raw.jsonl), labels, and calibration.json made from these."""
    folder = tmp_path_factory.mktemp("calibrated")
    (folder / "old").mkdir()
    (folder / "new").mkdir()
    for number in range(18):
        name = f"{'old' if number < 12 else 'new'}/{number}.mp4"
        write_clip(folder / name, frames=3 + number % 3, size=(48 + 16 * (number % 5), 64 + 16 * (number % 7)))
    shutil.copytree(model, folder / "rater")
    settings = {"scale": [0, 5], "sampling": {"frames": 2}, "views": [{"kind": "whole", "max_pixels": 56 * 56}]}
    (folder / "rater" / "rater.json").write_text(json.dumps(settings))
    code, said = run_here(folder, *RATE, "old", "new", "-o", "all.jsonl")
    assert code == 0, said
    rows = read_rows(folder / "all.jsonl")
    with (folder / "labels.csv").open("w") as labels:
        labels.write("clip,mos\n")
        labels.writelines(
            f"{row['clip']},{2 + row['score'] / 4 + number % 3 / 50}\n" for number, row in enumerate(rows)
        )
    (folder / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:12]))
    calibrate = ("calibrate", "raw.jsonl", "labels.csv", "--into", "rater", "--kind", "linear", "--coverage", "0.8")
    code, said = run_here(folder, *calibrate)
    assert code == 3, said
    assert "6 labelled clips without a score not used" in said
    return folder


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_calibrated_rater_needs_no_flag(
    calibrated: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.chdir(calibrated)
    output = tmp_path / f"r{suffix}"
    done = command(*RATE, "old", "new", "gone.mp4", "-o", output)
    assert done.code == 3, done.err
    assert "; calibrated (linear)" in done.err
    assert "interval" in done.err
    *rows, gone = read_rows(output)
    calibration = Calibration.read(Path("rater/calibration.json"))
    raw = read_rows(Path("all.jsonl"))
    assert calibration.rater_id == raw[0]["rater_id"]
    assert len(rows) == 18
    for number, (row, before) in enumerate(zip(rows, raw, strict=True)):
        assert row["raw_score"] == pytest.approx(before["score"], abs=1e-4)
        assert (row["score"], *row["interval"]) == pytest.approx(calibration.apply(row["raw_score"], row["std"]))
        assert row["calibration"] == {
            "id": calibration.identity,
            "fitted": number < 12,
            "raw_rater_id": before["rater_id"],
        }
        assert (row["level"], row["rater_id"] == before["rater_id"]) == (before["level"], False)
    assert (gone["score"], gone["raw_score"], gone["interval"], gone["calibration"]) == (None, None, None, None)
    again = command(*RATE, "old", "new", "-o", output)
    assert (again.code, "nothing to do: 18 clips already rated" in again.err) == (0, True)
    refused = command("evaluate", output, "labels.csv")
    assert refused.code == 1
    assert "error: the calibration of these ratings was fitted on 12 of the 18 clips" in refused.err


def test_raw_and_calibrated_ratings_are_not_mixed(
    calibrated: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was rated before calibrating stays as it is, and is not taken for calibrated."""
    monkeypatch.chdir(calibrated)
    output = tmp_path / "r.jsonl"
    shutil.copy("raw.jsonl", output)
    done = command(*RATE, "old", "-o", output)
    assert done.code == 1
    assert "contains ratings of another rater or calibration" in done.err.splitlines()[-1]
    assert output.read_bytes() == Path("raw.jsonl").read_bytes()
    assert command(*RATE, "old", "-o", output, "--overwrite").code == 0
    assert all(row["calibration"] for row in read_rows(output))


def test_calibrated_ratings_can_be_calibrated_again(
    calibrated: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(calibrated, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    first = Calibration.read(Path("rater/calibration.json"))
    for turn in range(2):
        assert command(*RATE, "old", "-o", f"{turn}.csv").code == 0
        done = command(
            *("calibrate", f"{turn}.csv", "labels.csv", "--into", "rater", "--kind", "linear", "--coverage", "0.8")
        )
        assert done.code == 3, done.err
        again = Calibration.read(Path("rater/calibration.json"))
        assert again.mapping.model_dump() == pytest.approx(first.mapping.model_dump(), abs=1e-3)
        assert again.rater_id == first.rater_id
        assert again.clips == first.clips


def test_fresh_clips_test_a_calibrated_rater(
    calibrated: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(calibrated)
    assert command(*RATE, "new", "-o", tmp_path / "r.jsonl").code == 0
    done = command("evaluate", tmp_path / "r.jsonl", "labels.csv")
    assert done.code == 3, done.err
    assert "of the MOS lie inside the ratings' prediction intervals" in done.out


def test_other_settings_than_the_calibrated_ones_give_one_note(
    calibrated: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(calibrated)
    done = command(*RATE, "new", "--sampling", "uniform:3")
    assert done.code == 0
    assert done.err.count("note: rater/calibration.json is for the rater's own sampling, which this run changes") == 1
    assert all((row["raw_score"], row["interval"], row["calibration"]) == (None, None, None) for row in done.rows)
    assert "calibrated (" not in done.err


def test_a_broken_calibration_ends_with_2(
    calibrated: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(calibrated, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    Path("rater/calibration.json").write_text("{")
    done = command(*RATE, "new")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: rater/calibration.json is not valid JSON")


# --- clips that cannot be rated --------------------------------------------------------------------------------------


def test_broken_clips_get_error_rows_and_the_others_are_rated(folder: Path, model: Path, command: Command) -> None:
    broken = add_broken(folder)
    arguments = ("rate", "clips", "gone.mp4", "-m", model, *FAST, "-o", "r.jsonl")
    done = command(*arguments)
    assert done.code == 3
    assert "3 clips rated, 4 could not be rated; 7 new" in done.err
    rows = {row["clip"]: row for row in read_rows(Path("r.jsonl"))}
    assert {name: row["error"]["class"] for name, row in rows.items() if row["error"]} == broken | {
        "gone.mp4": "ClipNotFound"
    }
    assert {name for name, row in rows.items() if row["score"] is not None} == {"a.mp4", "b.mp4", "more/c.mp4"}
    again = command(*arguments)
    assert again.code == 3
    assert "3 of 7 clips already rated in r.jsonl" in again.err
    assert len(read_rows(Path("r.jsonl"))) == 7


def test_lists_and_globs(folder: Path, model: Path, command: Command) -> None:
    Path("list.csv").write_text("clip,mos\nb.mp4,3\nmissing.mp4,2\n")
    done = command("rate", "clips/*.mp4", "list.csv", "--root", "clips", "-m", model, *FAST)
    assert done.code == 3
    assert [(row["clip"], bool(row["error"])) for row in done.rows] == [
        ("clips/a.mp4", False),
        ("clips/b.mp4", False),
        ("missing.mp4", True),
    ]


# --- dry run ---------------------------------------------------------------------------------------------------------


def count_input_tokens(model: Path, clip: Path) -> int:
    """Length of the model's input for a clip with the options `FAST`."""
    processor = AutoProcessor.from_pretrained(model)
    frames = read_frames(clip, Sampling(frames=2), [View(max_pixels=56 * 56)], 28)
    inputs = prepare_inputs(processor, [clip_input(frames)], load_prompt("talking_head"))
    return int(inputs["input_ids"].shape[1])


def test_a_dry_run_loads_no_weights(folder: Path, model: Path, command: Command) -> None:
    add_broken(folder)
    shutil.copytree(model, folder / "model")
    arguments = ("rate", "clips", "-m", "model", *FAST, "--scale", "0", "5")
    (folder / "model" / "model.safetensors").write_bytes(b"these are no weights")
    done = command(*arguments, "--dry-run")
    assert done.code == 0, done.err
    table = [[cell.strip() for cell in re.split("[│┃]", line)] for line in done.out.splitlines()]
    lines = {name: cells for name, *cells in table}
    assert lines["clip"] == ["picture", "seconds", "frames", "views", "tokens"]
    tokens = {name: count_input_tokens(model, folder / "clips" / name) for name in ("a.mp4", "more/c.mp4")}
    assert tokens["a.mp4"] == tokens["more/c.mp4"] + 2, "4 and 2 patches of 28 x 28 pixels"
    assert lines["a.mp4"] == ["64x64", "0.1", "2", "56x56", str(tokens["a.mp4"])]
    assert lines["more/c.mp4"] == ["64x128", "0.2", "2", "28x56", str(tokens["more/c.mp4"])]
    assert lines["cut.mp4"][3].startswith("ClipTruncated: ")
    with safe_open(model / "model.safetensors", "np") as weights:
        parameters = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    assert (
        f"3 clips would be rated, 3 could not; at most {tokens['a.mp4']} tokens per clip; "
        f"{parameters / 1e6:,.1f} M parameters"
    ) in done.err
    assert "GiB for the weights" in done.err and "KV cache" not in done.err
    assert "GiB of KV cache for each of the clips" in command(*arguments, "--dry-run", "--defects").err
    assert command(*arguments).code == 1


def test_the_environment(command: Command) -> None:
    done = command("env")
    assert done.code == 0
    entries = {line.split()[0]: line.split(maxsplit=1)[1] for line in done.out.splitlines()}
    for name in ("lmm-qa", "python", "torch", "torchvision", "transformers", "peft", "bitsandbytes", "av", "decord"):
        assert entries[name]
    assert entries["device"].split()[0] in {"cpu", "cuda", "mps"}
    assert entries["attention"].split()[0] in {"sdpa", "flash_attention_2"}


# --- wrong usage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["clips", "--sampling", "some:8"], "sampling 'some:8' cannot be used"),
        (["clips", "--sampling", "8"], "sampling '8' is not of the form uniform:8, linspace:8, pairs:12 or fps:2"),
        (["clips", "--view", "whole"], "view 'whole' is not of the form whole:448, fit:448, crop:336 or face:224"),
        (["clips", "--prompt", "shout"], "no prompt 'shout'; give one of "),
        (["clips", "--scale", "5", "1"], "low must be below high, received [5.0, 1.0]"),
        (["clips", "-o", "ratings.xlsx"], ".xlsx"),
        (["clips", "-m", "./gone"], "there is no model directory at './gone'"),
        (["clips", "--dtype", "int4"], "--dtype"),
        (["clips", "--batch-size", "0"], "--batch-size"),
        (["nothing"], "folder 'nothing' and the folders in it contain no video"),
        (["gone"], "'gone' does not exist: give a file, a folder, a glob or a list of clips"),
        (["gone/*.mp4"], "as a glob it matches no clip"),
        ([], "Missing argument"),
    ],
)
def test_wrong_usage_ends_with_2_and_a_message(
    folder: Path, model: Path, command: Command, arguments: list[str], complaint: str
) -> None:
    (folder / "nothing").mkdir()
    defaults = [] if "-m" in arguments else ["-m", str(model)]
    done = command("rate", *arguments, *defaults)
    assert done.code == 2, done.err
    assert complaint in done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    assert sorted(path.name for path in folder.iterdir()) == ["clips", "nothing"]


def test_a_model_that_cannot_be_loaded_ends_with_1(folder: Path, command: Command) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "qwen9_vl"}')
    (folder / "model" / "model.safetensors").write_bytes(b"")
    done = command("rate", "clips", "-m", "model", *FAST)
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith(f"error: cannot load the processor of '{folder / 'model'}': ")


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_an_unavailable_device_ends_with_2(folder: Path, model: Path, command: Command, device: str) -> None:
    done = command("rate", "clips", "-m", model, "--device", device)
    assert done.code == 2
    assert f"error: device '{device}' cannot be used here" in done.err
    here = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    assert f"(available devices: {', '.join(here)}" in done.err


# --- defects and explanations ----------------------------------------------------------------------------------------


def test_explain_reports_defects_and_explanation(command: Command, folder: Path, model: Path) -> None:
    done = command("explain", "clips/a.mp4", "gone.mp4", "-m", model, "--device", "cpu", "--workers", "1")
    assert done.code == 3
    good, gone = done.rows
    assert good["explanation"].startswith(f"The quality of this video is {good['level']}")
    assert good["explained_by"] == "model" or "replaced by template sentences" in done.err
    assert all(one["probability"] == good["defects"][one["defect"]] for one in good["found"])
    assert good["defects"]["lip_sync"] is None
    assert gone["error"]["class"] == "ClipNotFound"
    assert gone["explanation"] is None
    assert "the model does not answer them" in done.err, "random weights put nothing on yes and no"
    assert "--answers-from base" in done.err


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_rows_without_the_requested_details_are_rated_again(
    suffix: str, command: Command, folder: Path, model: Path
) -> None:
    out = folder / f"r.{suffix}"
    rate = ("rate", "clips", "-m", model, *FAST, "-o", out)
    assert command(*rate).code == 0
    plain = read_rows(out)
    assert plain[0]["defects"] is plain[0]["timeline"] is None
    done = command(*rate, "--defects", "--timeline")
    assert done.code == 0
    assert "3 clips rated; 3 new" in done.err
    rows = read_rows(out)
    assert len(rows) == 3
    assert rows[0]["score"] == pytest.approx(plain[0]["score"], abs=1e-4)
    assert rows[0]["defects"]["blur"] is not None
    assert isinstance(rows[0]["found"], list)
    assert rows[0]["timeline"]["scores"]
    for asked in (("--defects",), (), ("--timeline", "--defects")):
        assert "nothing to do" in command(*rate, *asked).err, "what is there is enough"


# PEFT 0.21 uses a name that transformers 5.23 has deprecated.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_profiles_made_in_another_way_are_not_reused(command: Command, folder: Path, model: Path) -> None:
    adapter = add_adapter(model, folder / "adapter")
    rate = ("rate", "clips", "-m", "adapter", *FAST, "-o", "r.jsonl")

    def profile_id() -> str:
        (found,) = {row["profile_id"] for row in read_rows(Path("r.jsonl"))}
        assert isinstance(found, str)
        return found

    assert command(*rate, "--defects", "--answers-from", "adapter").code == 0
    from_adapter, rows = profile_id(), read_rows(Path("r.jsonl"))
    done = command(*rate, "--defects", "--answers-from", "base")
    assert (done.code, "3 clips rated; 3 new" in done.err) == (0, True)
    from_base, others = profile_id(), read_rows(Path("r.jsonl"))
    assert from_base != from_adapter
    assert [row["score"] for row in others] == pytest.approx([row["score"] for row in rows], abs=1e-4)
    assert all(row["defects"] != other["defects"] for row, other in zip(rows, others, strict=True))
    assert "nothing to do" in command(*rate, "--defects", "--answers-from", "base").err
    assert "nothing to do" in command(*rate).err, "without a profile, only the score matters"

    assert command(*rate, "--defects").code == 0
    assert profile_id() == from_adapter
    (adapter / "defects.json").write_text('{"defects": {"blur": {}}}')
    assert "3 clips rated; 3 new" in command(*rate, "--defects").err, "another calibration of the profile"
    assert profile_id() not in {from_adapter, from_base}


def test_without_an_adapter_the_source_of_answers_makes_no_difference(
    command: Command, folder: Path, model: Path
) -> None:
    rate = ("rate", "clips", "-m", model, *FAST, "--defects", "-o", "r.jsonl")
    assert command(*rate).code == 0
    assert "nothing to do" in command(*rate, "--answers-from", "base").err


def test_commands_that_load_a_model_have_the_same_options() -> None:
    commands = get_command(lmm_qa.cli.app.app).commands  # type: ignore[attr-defined]

    def options(name: str) -> dict[str, str]:
        return {parameter.opts[0]: parameter.help for parameter in commands[name].params if parameter.opts[0][0] == "-"}

    shared = options("explain")
    assert {"--dtype", "--quantization", "--revision", "--trust-remote-code", "--prompt", "--sampling"} <= set(shared)
    loading = [name for name in commands if "--model" in {opt for each in commands[name].params for opt in each.opts}]
    assert {"rate", "explain", "compare", "gate"} <= set(loading)
    settings = {name: text for name, text in shared.items() if name not in ("--answers-from", "--batch-size", "--root")}
    for name in loading:
        assert settings.items() <= options(name).items(), name


def test_explain_uses_the_model_options(command: Command, folder: Path, model: Path) -> None:
    done = command(
        *(
            "explain",
            "clips/a.mp4",
            "-m",
            model,
            *FAST,
            "--dtype",
            "bfloat16",
            "--prompt",
            "qalign",
            "--scale",
            "0",
            "5",
        )
    )
    assert done.code == 0, done.err
    (row,) = done.rows
    assert "dtype bfloat16" in done.err
    assert (len(row["frames"]["indices"]), row["scale"]) == (2, [0, 5])
    assert row["prompt"].endswith("The quality of the video is")


def test_every_command_has_an_example() -> None:
    commands = get_command(lmm_qa.cli.app.app).commands  # type: ignore[attr-defined]
    assert [name for name, command in commands.items() if f"`lmm-qa {name}" not in command.help] == []
