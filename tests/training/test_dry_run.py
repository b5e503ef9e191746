"""python -m pytest tests/training/test_dry_run.py"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import conversation_inputs, published
from clips import write_clip
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import VideoMetadata

from lmm_qa.errors import ConfigError, ManifestError, TrainingError
from lmm_qa.model.prompt import SLOTS
from lmm_qa.training.collate import Batch
from lmm_qa.training.config import TrainingConfig
from lmm_qa.training.dry_run import first_batch, preview
from lmm_qa.training.run import train
from lmm_qa.training.trainer import RatingTrainer
from lmm_qa.video.decode import read_frames
from lmm_qa.video.probe import probe

MakeConfig = Callable[..., TrainingConfig]

LANGUAGE = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
VISION = r".*visual\.blocks\.\d+\.(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)"
MERGER = r".*visual\.merger\.mlp\.[02]"

SIZES = [(192, 128)] * 5 + [(128, 128)] * 2 + [(256, 160)]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eight clips of three sizes, and labels.csv."""
    folder = tmp_path_factory.mktemp("labelled")
    with (folder / "labels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["clip", "mos", "group"])
        for number, size in enumerate(SIZES):
            write_clip(folder / f"{number}.mp4", frames=12, size=size)
            rows.writerow([f"{number}.mp4", 1.5 + 0.4 * number, f"person {number}"])
    return folder


@pytest.fixture
def make_config(labelled: Path, family_dir: Callable[[str], Path], tmp_path: Path) -> MakeConfig:
    """Configurations for a small model; keyword arguments override values as section__key=value."""

    def make(family: str = "qwen2_vl", **changes: Any) -> TrainingConfig:
        values: dict[str, Any] = {
            "model": {"backbone": str(family_dir(family)), "dtype": "float32"},
            "data": {
                "root": str(labelled),
                "train": [{"path": "labels.csv", "scale": [1, 5]}],
                "validation_share": 0,
                "calibration_share": 0,
            },
            "rating": {"sampling": {"frames": 4}},
            "augmentation": {"temporal_offsets": 1, "paraphrase_probability": 0},
            "training": {"output_dir": str(tmp_path / "run"), "cache_dir": str(tmp_path / "cache"), "batch_size": 3},
        }
        for place, value in changes.items():
            section, _, key = place.partition("__")
            values.setdefault(section, {})[key] = value
        return TrainingConfig.parse(values, "test")

    return make


def number(text: str) -> int:
    return int(text.replace(",", ""))


def found(pattern: str, report: str) -> tuple[str, ...]:
    match = re.search(pattern, report, re.MULTILINE)
    assert match, f"{pattern!r} is not in\n{report}"
    return match.groups()


def bytes_of(text: str) -> float:
    amount, unit = text.split()
    return float(amount) * {"MB": 1e6, "GB": 1e9}[unit]


def tree(folder: Path) -> dict[Path, tuple[int, int] | None]:
    """All folders and files below a folder, files with size and modification time."""
    stats = {path: path.stat() for path in folder.rglob("*")}
    return {path: (stat.st_size, stat.st_mtime_ns) if path.is_file() else None for path, stat in stats.items()}


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT 0.21 asks for it
@pytest.mark.parametrize(
    ("tuning", "targets"),
    [
        ({"r": 4}, LANGUAGE),
        ({"r": 8, "vision": True}, f"{LANGUAGE}|{VISION}"),
        ({"r": 4, "vision": True, "merger": True}, f"{LANGUAGE}|{VISION}|{MERGER}"),
    ],
    ids=["language", "vision", "merger"],
)
def test_trainable_weights_are_those_of_the_peft_model(
    make_config: MakeConfig, family_dir: Callable[[str], Path], tuning: dict[str, Any], targets: str
) -> None:
    chosen = make_config(tuning__r=16)
    report = preview(chosen.model_copy(update={"tuning": type(chosen.tuning)(**tuning)}))
    model: Any = AutoModelForImageTextToText.from_pretrained(family_dir("qwen2_vl"), dtype=torch.float32)
    real = get_peft_model(model, LoraConfig(r=tuning["r"], target_modules=targets))
    trained, everything = found(r"^trainable   ([\d,]+) of ([\d,]+) weights", report)
    assert (number(trained), number(everything)) == real.get_nb_trainable_parameters()
    assert "q_proj" in found(r"^  language  [\d,]+ of [\d,]+ in (.*)$", report)[0]
    parts = re.findall(r"^  (\w+) +([\d,]+) of ([\d,]+)", report, re.MULTILINE)
    assert sum(number(count) for _, count, _ in parts) == number(trained)
    assert sum(number(count) for _, _, count in parts) == number(everything)
    counts = {part: number(count) for part, count, _ in parts}
    assert bool(counts["vision"]) == tuning.get("vision", False)
    assert bool(counts["merger"]) == tuning.get("merger", False)


def test_full_tuning_trains_only_the_language_model(make_config: MakeConfig, family_dir: Callable[[str], Path]) -> None:
    report = preview(make_config(tuning__method="full"))
    model: Any = AutoModelForImageTextToText.from_pretrained(family_dir("qwen2_vl"), dtype=torch.float32)
    frozen = sum(p.numel() for p in model.model.visual.parameters())
    total = sum(p.numel() for p in model.parameters())
    trained, everything = found(r"^trainable   ([\d,]+) of ([\d,]+) weights", report)
    assert (number(trained), number(everything)) == (total - frozen, total)


# --- inputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "llava_onevision"])
def test_token_counts_are_those_of_the_processor(
    make_config: MakeConfig, family_dir: Callable[[str], Path], labelled: Path, family: str
) -> None:
    chosen = make_config(family)
    report = preview(chosen)
    processor = AutoProcessor.from_pretrained(family_dir(family))
    rater = chosen.rater_config()
    factor = {"qwen2_vl": 28, "qwen3_vl": 32, "llava_onevision": 1}[family]
    lengths = []
    for name in range(len(SIZES)):
        path = labelled / f"{name}.mp4"
        info, frames = probe(path), read_frames(path, rater.sampling, rater.views, factor)
        metadata = VideoMetadata(
            total_num_frames=info.frames, fps=info.fps, duration=info.duration, frames_indices=list(frames.indices)
        )
        views = [torch.from_numpy(view).permute(0, 3, 1, 2) for view in frames.views]
        slots = dict.fromkeys(SLOTS, 0.0)
        lengths.append(conversation_inputs(processor, rater.prompt, slots, views, metadata)["input_ids"].shape[1])
    fewest, most, middle, clips = found(r"^tokens      (\d+) to (\d+) per clip, median (\d+) \((\d+) clips\)", report)
    assert (int(fewest), int(most), int(clips)) == (min(lengths), max(lengths), len(SIZES))
    assert int(middle) == sorted(lengths)[len(SIZES) // 2]


def test_the_first_batch_is_decoded_and_shown(make_config: MakeConfig, labelled: Path) -> None:
    report = preview(make_config(training__seed=5))
    names, mos = found(r"^first batch (.*)\n +MOS (.*)$", report)
    table = (labelled / "labels.csv").read_text().splitlines()
    labels = {row["clip"]: float(row["mos"]) for row in csv.DictReader(table)}
    assert len(set(names.split(", "))) == 3
    assert [float(value) for value in mos.split(", ")] == pytest.approx([labels[name] for name in names.split(", ")])
    assert "video_grid_thw (3, 3)" in report
    assert names != found(r"^first batch (.*)$", preview(make_config(training__seed=6)))[0]


@pytest.mark.parametrize("auxiliary", [False, True])
def test_the_first_batch_is_the_one_that_training_starts_with(
    make_config: MakeConfig, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, auxiliary: bool
) -> None:
    """With augmentation and shuffling, and with auxiliary examples where the table has labels for them."""
    table = {"path": "labels.csv", "scale": [1, 5]}
    if auxiliary:
        rows = (labelled / "labels.csv").read_text().splitlines()
        described = [f"{row},blur,The quality of this video is fair: the picture is blurred." for row in rows[1:]]
        (tmp_path / "described.csv").write_text("\n".join([f"{rows[0]},defects,explanation", *described]))
        table["path"] = str(tmp_path / "described.csv")
    config = make_config(
        data__train=[table],
        augmentation__temporal_offsets=4,
        augmentation__paraphrase_probability=0.5,
        training__seed=5,
        training__cache_vision_features=False,
        training__num_workers=1,
        training__epochs=0.1,
    )
    drawn: list[Batch] = []

    def record(*arguments: Any) -> Batch:
        drawn.append(first_batch(*arguments))
        return drawn[-1]

    trained: list[Batch] = []

    def compute_loss(trainer: RatingTrainer, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        trained.append(inputs)
        return original(trainer, model, inputs, *rest, **named)

    original = RatingTrainer.compute_loss
    monkeypatch.setattr(RatingTrainer, "compute_loss", compute_loss)
    monkeypatch.setattr("lmm_qa.training.dry_run.first_batch", record)
    preview(config)
    train(config, lambda _: None)
    assert drawn[0]["names"] == trained[0]["names"] and drawn[0]["mos"] == pytest.approx(trained[0]["mos"])
    assert drawn[0]["inputs"].keys() == trained[0]["inputs"].keys() >= {"input_ids", "pixel_values_videos"}
    for name, value in drawn[0]["inputs"].items():
        assert torch.equal(value, trained[0]["inputs"][name]), name
    if auxiliary:
        assert drawn[0]["auxiliary"] is not None and trained[0]["auxiliary"] is not None
        for part in ("target_ids", "positions", "segment_ids"):
            assert torch.equal(drawn[0]["auxiliary"][part], trained[0]["auxiliary"][part]), part


def test_missing_videos_are_counted_and_named(make_config: MakeConfig, labelled: Path, tmp_path: Path) -> None:
    table = tmp_path / "more.csv"
    table.write_text((labelled / "labels.csv").read_text() + "gone.mp4,3,x\nlost.mp4,3,y\n")
    report = preview(make_config(data__train=[{"path": str(table), "scale": [1, 5]}]))
    assert "videos      8 of 10 files exist" in report
    assert f"missing, among others: {labelled / 'gone.mp4'}" in report
    table.write_text("clip,mos\ngone.mp4,3\n")
    with pytest.raises(TrainingError, match=r"0 of 1 files exist(?s:.*)correct data\.root"):
        preview(make_config(data__train=[{"path": str(table), "scale": [1, 5]}]))


def test_a_broken_video_is_named(make_config: MakeConfig, tmp_path: Path) -> None:
    write_clip(tmp_path / "whole.mp4", frames=12)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:-3000])
    (tmp_path / "labels.csv").write_text("clip,mos\nwhole.mp4,3\ncut.mp4,2\n")
    with pytest.raises(TrainingError, match=r"cut\.mp4 cannot be read: "):
        preview(make_config(data__root=str(tmp_path)))


def test_the_dry_run_refuses_what_training_refuses(make_config: MakeConfig) -> None:
    with pytest.raises(ManifestError, match="no column is named opinion"):
        preview(make_config(data__train=[{"path": "labels.csv", "scale": [1, 5], "mos": "opinion"}]))
    with pytest.raises(ConfigError, match="no_such_prompt"):
        preview(make_config(rating__prompt="no_such_prompt"))


# --- cost ------------------------------------------------------------------------------------------------------------


def test_steps_and_disk_follow_from_the_clips(make_config: MakeConfig) -> None:
    report = preview(
        make_config(training__epochs=3.05, training__gradient_accumulation_steps=2, augmentation__temporal_offsets=4)
    )
    assert re.search(r"^time        5 steps of 6 clips", report, re.MULTILINE), report  # 24.4 clips
    tokens = int(found(r"median (\d+)", report)[0])
    (disk,) = found(r"^disk        about ([\d.]+ MB) of vision features", report)
    assert bytes_of(disk) == pytest.approx(4 * len(SIZES) * tokens * 64 * 4, rel=0.05)  # 64 wide, float32


def test_features_with_deepstack_take_more_disk(make_config: MakeConfig) -> None:
    report = preview(make_config("qwen3_vl"))
    tokens = int(found(r"median (\d+)", report)[0])
    (disk,) = found(r"^disk        about ([\d.]+ MB) of vision features", report)
    assert bytes_of(disk) == pytest.approx(2 * len(SIZES) * tokens * 64 * 4, rel=0.05)  # one layer beside the last


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2_vl", {"training__cache_vision_features": False}),
        ("qwen2_vl", {"tuning__vision": True}),
        ("qwen2_vl", {"tuning__merger": True}),
        ("llava_onevision", {}),
    ],
)
def test_no_disk_space_is_reported_without_a_vision_cache(
    make_config: MakeConfig, family: str, changes: dict[str, Any]
) -> None:
    assert "vision features" not in preview(make_config(family, **changes))


def test_memory_grows_with_the_batch_and_shrinks_with_checkpointing(make_config: MakeConfig) -> None:
    def activations(**changes: Any) -> float:
        return bytes_of(found(r"\d+ clips ([\d.]+ [MG]B)$", preview(make_config(**changes)))[0])

    baseline = activations()
    assert activations(training__batch_size=6) == pytest.approx(2 * baseline, rel=0.1)
    assert activations(training__gradient_checkpointing=True) < 0.75 * baseline


@pytest.mark.parametrize(("quantization", "low", "high"), [(None, 16.5e9, 16.7e9), ("4bit", 6.5e9, 8e9)])
def test_the_size_of_the_published_7b_model_is_right(
    make_config: MakeConfig, quantization: str | None, low: float, high: float
) -> None:
    """The index of its weight files gives 16,584,333,312 bytes."""
    folder = str(published("qwen2.5-vl-7b-instruct"))
    report = preview(make_config(model__backbone=folder, model__dtype="bfloat16", model__quantization=quantization))
    assert low < bytes_of(found(r"frozen weights ([\d.]+ GB)", report)[0]) < high
    # 28 layers; q and o 3584 x 3584, k and v 3584 x 512, gate, up and down 3584 x 18944; rank 16
    adapter = 28 * 16 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
    assert number(found(r"^trainable   ([\d,]+)", report)[0]) == adapter


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_the_report_and_writes_nothing(make_config: MakeConfig, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    file = tmp_path / "config.yaml"
    file.write_text(make_config().model_dump_json(exclude_none=True))
    environment = {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache"), "TMPDIR": str(home)}
    environment = {name: value for name, value in environment.items() if not name.startswith("HF_")}
    command = [sys.executable, "-B", "-m", "lmm_qa", "train", str(file), "training.epochs=1", "--dry-run"]
    before = tree(tmp_path)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path) == before
    headings = re.findall(r"^(\w[\w ]{10}) ", done.stdout, re.MULTILINE)
    order = ["videos", "tokens", "trainable", "memory", "time", "disk", "first batch"]
    assert [word.strip() for word in headings if word.strip() in order] == order
    assert "3 steps of 3 clips" in done.stdout
