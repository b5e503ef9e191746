"""Runs that must have equal losses. Run: python -m pytest tests/training/test_run_resume.py"""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
from training_runs import DESCRIBED, MakeConfig, command, curve, quiet, with_training, write_config

from lmm_qa.training.config import TrainingConfig
from lmm_qa.training.run import last_checkpoint, train


@pytest.mark.slow
@pytest.mark.parametrize(("frames", "epochs", "steps"), [("video", 1.2, 12), ("images", 0.2, 2)])
def test_cached_vision_features_do_not_change_the_loss(
    make_config: MakeConfig, tmp_path: Path, frames: str, epochs: float, steps: int
) -> None:
    prompt = {"question": "How good is it?", "stem": "The quality is", "frames": frames}
    base = make_config(data__train=DESCRIBED, rating__prompt=prompt, training__epochs=epochs)
    base = with_training(base, cache_dir=tmp_path / "cache")
    cached, uncached = tmp_path / "cached", tmp_path / "uncached"
    train(with_training(base, output_dir=cached), quiet)
    assert list((tmp_path / "cache" / "vision").rglob("*.safetensors"))
    train(with_training(base, output_dir=uncached, cache_vision_features=False), quiet)
    assert curve(cached) == pytest.approx(curve(uncached), abs=1e-5)
    assert len(curve(cached)) == steps


@pytest.fixture(scope="module")
def undisturbed(make_config_in: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> TrainingConfig:
    """The configuration of a finished run, with dropout and an epoch that ends between two checkpoints: both depend on
    the RNG state."""
    config = with_training(make_config_in(tmp_path_factory.mktemp("undisturbed")), epochs=1.6, eval_steps=3)
    train(config, quiet)
    return config


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_resumed_run_equals_an_uninterrupted_one(
    undisturbed: TrainingConfig, tmp_path: Path, number: signal.Signals
) -> None:
    disturbed = with_training(undisturbed, output_dir=tmp_path / "disturbed")
    running = command(write_config(disturbed, tmp_path / "config.yaml"))
    assert running.stderr
    for line in running.stderr:
        if line.startswith("step 6/16  validation"):
            running.send_signal(number)
            break
    _, stderr = running.communicate(timeout=120)
    if number == signal.SIGTERM:
        assert running.returncode == 128 + number and "run the same command to resume" in stderr
    else:
        assert running.returncode == -number
    folders = [config.training.output_dir for config in (undisturbed, disturbed)]
    assert not (folders[1] / "rater.json").exists()
    lines: list[str] = []
    assert train(disturbed, lines.append).interrupted_by is None
    assert any(re.match(r"resuming from .*checkpoint-\d+", line) for line in lines)
    assert curve(folders[1]) == pytest.approx(curve(folders[0]), abs=1e-5)
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]


def test_an_incomplete_checkpoint_is_skipped(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "none") is None
    for step, state in ((3, "{}"), (20, "{}"), (100, '{"global'), (110, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "rng_state.pth").touch()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-20"
    assert last_checkpoint(tmp_path, processes=2) is None, "the RNG state of every process is needed"


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_process(make_config: MakeConfig, tmp_path: Path) -> None:
    """The same clips per step, 2 x 2 instead of 1 x 4, with fidelity and PLCC over all four and auxiliary examples for
    some of them; interrupted in between."""
    base = make_config(tuning__lora_dropout=0.0, loss__plcc=0.5, data__train=DESCRIBED)
    one = with_training(base, output_dir=tmp_path / "one", batch_size=4)
    two = write_config(with_training(base, output_dir=tmp_path / "two", batch_size=2), tmp_path / "two.yaml")
    train(one, quiet)
    running = command(two, processes=2)
    assert running.stderr
    for line in running.stderr:
        if re.match(r"step 10/12  loss", line):
            running.send_signal(signal.SIGTERM)
            break
    _, stderr = running.communicate(timeout=240)
    assert running.returncode != 0
    again = command(two, processes=2)
    _, stderr = again.communicate(timeout=240)
    assert again.returncode == 0, stderr
    assert "resuming from" in stderr
    assert stderr.count("done: lmm-qa rate") == 1, "only the main process logs"
    for part in ("loss", "fidelity", "defect_questions", "explanations"):
        assert curve(tmp_path / "two", part) == pytest.approx(curve(tmp_path / "one", part), abs=2e-4)
    metrics = [json.loads((tmp_path / name / "run.json").read_text())["metrics"]["srcc"] for name in ("one", "two")]
    assert metrics[0] == pytest.approx(metrics[1], abs=0.05)


@pytest.mark.slow
def test_gradient_accumulation_equals_a_larger_batch(make_config: MakeConfig, tmp_path: Path) -> None:
    """Without pairwise losses, which do not extend across forward passes."""
    base = make_config(tuning__lora_dropout=0.0, loss__fidelity=0.0, data__train=DESCRIBED)
    train(with_training(base, output_dir=tmp_path / "one", batch_size=4), quiet)
    train(with_training(base, output_dir=tmp_path / "two", batch_size=2, gradient_accumulation_steps=2), quiet)
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), abs=2e-4)


@pytest.mark.slow
def test_cached_features_work_in_bfloat16(make_config: MakeConfig, tmp_path: Path) -> None:
    half = with_training(make_config(model__dtype="bfloat16"), epochs=0.4)
    train(with_training(half, output_dir=tmp_path / "cached"), quiet)
    train(with_training(half, output_dir=tmp_path / "uncached", cache_vision_features=False), quiet)
    assert curve(tmp_path / "cached") == pytest.approx(curve(tmp_path / "uncached"), abs=0.03)
