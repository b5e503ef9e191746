"""Runs that are refused or stopped. Run: python -m pytest tests/training/test_run_errors.py"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from training_runs import MakeConfig, quiet, with_training

from lmm_qa.errors import ConfigError, TrainingError
from lmm_qa.training import run as run_module
from lmm_qa.training import trainer as trainer_module
from lmm_qa.training.run import last_checkpoint, train


def test_a_non_finite_loss_is_an_error_with_the_clips(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real, steps = trainer_module.weighted_loss, iter(range(100))

    def breaks(*arguments: Any) -> Any:
        loss, parts = real(*arguments)
        return (loss * float("nan") if next(steps) == 2 else loss), parts

    monkeypatch.setattr(trainer_module, "weighted_loss", breaks)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 3, with the clips (p\d+_\d\.mp4(, )?){4}"):
        train(make_config(), quiet)


@pytest.fixture
def incomplete(labelled: Path, tmp_path: Path) -> Path:
    """The labelled folder with one clip missing and one truncated."""
    folder = tmp_path / "incomplete"
    folder.mkdir()
    for file in labelled.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "p3_0.mp4").unlink()
    (folder / "p4_1.mp4").write_bytes((labelled / "p4_1.mp4").read_bytes()[:900])
    return folder


@pytest.mark.slow
def test_unreadable_clips_are_counted_before_training_starts(make_config: MakeConfig, incomplete: Path) -> None:
    data = make_config().data.model_copy(update={"root": incomplete})
    refused = make_config().model_copy(update={"data": data})
    lines: list[str] = []
    with pytest.raises(TrainingError, match="2 of 48 clips are missing or cannot be read"):
        train(refused, lines.append)
    assert any("p3_0.mp4" in line for line in lines) and any("p4_1.mp4" in line for line in lines)
    assert not refused.training.output_dir.exists()
    accepted = with_training(refused, skip_unreadable=True, epochs=0.2)
    train(accepted, quiet)
    counts = json.loads((accepted.training.output_dir / "run.json").read_text())["clips"]
    assert sum(counts.values()) == 46


def test_a_run_directory_is_not_reused_for_another_run(make_config: MakeConfig, tmp_path: Path) -> None:
    short = with_training(make_config(), epochs=0.2)
    train(short, quiet)
    with pytest.raises(ConfigError, match=r"config\.training\.learning_rate: 0\.002 -> 0\.5"):
        train(with_training(short, learning_rate=0.5), quiet)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="is not empty and contains no run"):
        train(with_training(short, output_dir=tmp_path / "other"), quiet)


@pytest.fixture
def other_process(tmp_path: Path) -> Iterator[None]:
    """A process that holds the lock of the run directory."""
    (tmp_path / "run").mkdir()
    code = "import sys, filelock\nwith filelock.FileLock(sys.argv[1]):\n    print('locked', flush=True)\n    input()"
    command = [sys.executable, "-c", code, str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "locked\n"
        yield
        process.communicate("\n")


@pytest.mark.usefixtures("other_process")
def test_a_process_without_the_lock_does_not_touch_the_run_directory(make_config: MakeConfig, tmp_path: Path) -> None:
    """Two runs start at the same time: the one that comes second neither writes run.json nor reads a half-made one."""
    with pytest.raises(ConfigError, match=r"another process is training in .*run"):
        train(with_training(make_config(), epochs=0.1), quiet)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


@pytest.mark.slow
def test_a_directory_in_which_no_run_got_further_than_the_lock_is_used(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    train(with_training(make_config(), epochs=0.1), quiet)
    assert (tmp_path / "run" / "rater.json").exists()


@pytest.mark.slow
def test_an_unfinished_run_of_another_process_is_not_resumed(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lock = FileLock(tmp_path / "run" / ".lock")
    train(with_training(make_config(), epochs=0.1, output_dir=tmp_path / "first"), quiet)
    (tmp_path / "run" / "run.json").write_text((tmp_path / "first" / "run.json").read_text())
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    del record["metrics"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    with lock, pytest.raises(ConfigError, match=r"another process is training in .*run"):
        train(with_training(make_config(), epochs=0.1), quiet)


def test_arguments_cannot_override_keys_of_the_configuration(make_config: MakeConfig) -> None:
    for name, value in (("max_steps", 3), ("per_device_train_batch_size", 64), ("seed", 4)):
        with pytest.raises(ConfigError, match=rf"training\.arguments: {name} cannot be set"):
            train(with_training(make_config(), arguments={name: value}), quiet)
    with pytest.raises(ConfigError, match=r"training\.arguments: learning_rat cannot be set"):
        train(with_training(make_config(), arguments={"learning_rat": 1}), quiet)


@pytest.mark.slow
def test_a_step_with_a_non_finite_gradient_is_not_saved(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = trainer_module.weighted_loss

    def steep(*arguments: Any) -> Any:
        loss, parts = real(*arguments)
        return loss + 0 * (loss - loss.detach()).sqrt(), parts  # finite, with an infinite gradient

    monkeypatch.setattr(trainer_module, "weighted_loss", steep)
    with pytest.raises(TrainingError, match=r"the gradient is nan at step 1, with the clips (p\d+_\d\.mp4(, )?){4}"):
        train(with_training(make_config(), eval_steps=1), quiet)
    assert last_checkpoint(tmp_path / "run" / "checkpoints") is None


def test_a_missing_logger_is_refused_before_any_work(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"training\.report_to names clearml, which is not installed"):
        train(with_training(make_config(), report_to=("clearml",)), quiet)
    assert not make_config().training.output_dir.exists()


@pytest.mark.parametrize("by", ["launcher", "argument"])
def test_fsdp_with_quantized_weights_is_refused(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    config = make_config(model__quantization="4bit")
    if by == "launcher":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    else:
        config = with_training(config, arguments={"fsdp": "full_shard"})
    with pytest.raises(ConfigError, match=r"FSDP cannot shard weights in 4bit \(model\.quantization\)"):
        train(config, quiet)
    assert not config.training.output_dir.exists()


def test_clips_longer_than_the_context_are_refused(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "context_length", lambda *_: 20)
    with pytest.raises(TrainingError, match=r"a clip takes \d+ tokens, the model's context is 20: use fewer frames"):
        train(make_config(), quiet)
