"""Runs with questions about defects and explanations. Run: python -m pytest tests/training/test_run_auxiliary.py"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_runs import DESCRIBED, PERSONS, MakeConfig, curve, quiet, with_training

from lmm_qa.defects.explanation import Finding, explanation_prompt, opening
from lmm_qa.defects.questions import questions
from lmm_qa.defects.vocabulary import VISIBLE
from lmm_qa.errors import ConfigError, TrainingError
from lmm_qa.model.backbone import Backbone
from lmm_qa.model.inputs import patch_factor
from lmm_qa.model.prefill import SharedPrefill
from lmm_qa.model.prompt import Prompt
from lmm_qa.model.rater_config import RaterConfig
from lmm_qa.rater import clip_input
from lmm_qa.training import trainer as trainer_module
from lmm_qa.training.run import train
from lmm_qa.video.decode import read_frames


def share_of_last(backbone: Backbone, clip: Path, settings: RaterConfig, prompts: Sequence[Prompt]) -> list[float]:
    """Probability of the last level for each prompt, as in rating."""
    frames = read_frames(clip, settings.sampling, settings.views, patch_factor(backbone.processor) or 1)
    (answers,) = SharedPrefill(backbone, [clip_input(frames)]).level_logits(prompts)
    return [float(torch.tensor(answer.logits).softmax(-1)[-1]) for answer in answers]


@pytest.mark.slow
def test_one_adapter_learns_to_rate_answer_and_explain(
    make_config: MakeConfig, labelled: Path, family_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    """All clips have one defect and lack another. The base model is undecided about both."""
    base = str(family_dir("qwen3_vl"))
    unsure = [f"?{name}" for name in VISIBLE if name not in ("blur", "seam")]
    rows = [json.loads(line) for line in (labelled / "described.jsonl").read_text().splitlines()]
    explanation = "The quality of this clip is fair: the picture is blurred."
    described = [{**row, "defects": ["blur", *unsure], "explanation": explanation} for row in rows]
    (tmp_path / "all.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in described))
    table = {"path": str(tmp_path / "all.jsonl"), "videos": str(labelled), "scale": [1, 5]}
    config = make_config(model__backbone=base, data__train=[table])
    config = with_training(config, epochs=3, eval_steps=30, learning_rate=5e-3)
    lines: list[str] = []
    outcome = train(config, lines.append)
    assert "of 40 training clips, 40 have known defects, and 40 an explanation" in lines
    assert outcome.metrics.keys() >= {"main", "srcc"}
    for part in ("explanations", "defect_questions"):
        losses = [*curve(tmp_path / "run", part).values()]
        assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 1, part
    settings = config.rater_config()
    stem = f"{opening(settings.prompt, 'fair')}: the picture is"
    words = {"stem": stem, "levels": ("always", "never", "blurred")}
    prompts = [questions()["blur"], questions()["seam"],
             explanation_prompt(settings.prompt, [Finding("blur", 1.0)]).model_copy(update=words)]  # fmt: skip
    backbone = Backbone.load(base, adapter=tmp_path / "run", device="cpu")
    blur, seam, blurred = share_of_last(backbone, labelled / "p0_0.mp4", settings, prompts)
    with backbone.without_adapter():
        before = share_of_last(backbone, labelled / "p0_0.mp4", settings, prompts)
    assert all(0.4 < share < 0.6 for share in before[:2]), before  # undecided
    assert blur > 0.8 and seam < 0.1 and blurred > before[2] + 0.1, (blur, seam, blurred, before)


@pytest.mark.slow
def test_auxiliary_tasks_do_not_change_the_rating_loss(make_config: MakeConfig, tmp_path: Path) -> None:
    plain = with_training(make_config(), epochs=0.4, output_dir=tmp_path / "plain")
    disabled = make_config(data__train=DESCRIBED, auxiliary__defect_questions=0, auxiliary__explanation_probability=0)
    auxiliary = make_config(data__train=DESCRIBED)
    train(plain, quiet)
    train(with_training(disabled, epochs=0.4, output_dir=tmp_path / "disabled"), quiet)
    train(with_training(auxiliary, epochs=0.4, output_dir=tmp_path / "auxiliary"), quiet)
    assert (tmp_path / "plain/metrics.jsonl").read_bytes() == (tmp_path / "disabled/metrics.jsonl").read_bytes()
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("plain", "disabled")]
    assert weights[0] == weights[1]
    rows = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0]) for name in ("plain", "auxiliary")
    ]
    for part in ("cross_entropy", "fidelity", "level_mass"):
        assert rows[0][part] == pytest.approx(rows[1][part], abs=1e-4), "same clips, same prompt"
    total = rows[1]["loss"] - rows[1]["defect_questions"] - 0.3 * rows[1]["explanations"]
    assert total == pytest.approx(rows[0]["loss"], abs=1e-4)
    assert rows[1]["defect_questions"] > 1 and rows[1]["explanations"] > 1


@pytest.mark.parametrize(
    ("family", "prompt"),
    [("qwen3_vl", "talking_head"), ("qwen3_5", "qrealign"), ("llava_onevision", "qrealign")],
)
def test_auxiliary_tasks_work_for_other_families(
    make_config: MakeConfig, family_dir: Callable[[str], Path], family: str, prompt: str, tmp_path: Path
) -> None:
    """Those of Q-ReAlign with frames as images."""
    model = {"model__backbone": str(family_dir(family)), "rating__prompt": prompt}
    train(with_training(make_config(**model, data__train=DESCRIBED), epochs=0.3), quiet)
    losses = [*curve(tmp_path / "run", "explanations").values()]
    assert len(losses) == 3 and all(loss > 0 for loss in losses)


@pytest.mark.slow
def test_a_resumed_run_has_the_auxiliary_examples_of_an_uninterrupted_one(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = with_training(make_config(data__train=DESCRIBED), epochs=0.8, eval_steps=3)
    train(with_training(base, output_dir=tmp_path / "undisturbed"), quiet)
    disturbed = with_training(base, output_dir=tmp_path / "disturbed")
    real, steps = trainer_module.weighted_loss, iter(range(100))

    def dies(*arguments: Any) -> Any:
        if next(steps) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(trainer_module, "weighted_loss", dies)
        train(disturbed, quiet)
    lines: list[str] = []
    train(disturbed, lines.append)
    assert any(re.match(r"resuming from .*checkpoint-3", line) for line in lines)
    for part in ("loss", "defect_questions", "explanations"):
        assert curve(tmp_path / "disturbed", part) == curve(tmp_path / "undisturbed", part)
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("undisturbed", "disturbed")]
    assert weights[0] == weights[1]


def test_other_defect_labels_make_another_run(make_config: MakeConfig, labelled: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    rows = [json.loads(line) for line in (labelled / "described.jsonl").read_text().splitlines()]
    config = make_config(data__train=[{"path": str(table), "videos": str(labelled), "scale": [1, 5]}])
    for defect in ("blur", "noise"):
        lines = [f"{row['clip']},{row['mos']},{row['group']},{defect}" for row in rows]
        table.write_text("\n".join(["clip,mos,group,defects", *lines]))
        if defect == "blur":
            train(with_training(config, epochs=0.1), quiet)
        else:
            with pytest.raises(ConfigError, match="contains a run with another configuration, other data"):
                train(with_training(config, epochs=0.1), quiet)


def test_an_explanation_without_a_level_word_is_refused_before_training(
    make_config: MakeConfig, labelled: Path, tmp_path: Path
) -> None:
    (tmp_path / "t.csv").write_text(
        "clip,mos,group,explanation\n"
        + "".join(f"p{person}_0.mp4,3,p{person},The picture is blurred.\n" for person in range(PERSONS))
    )
    table = {"path": str(tmp_path / "t.csv"), "videos": str(labelled), "scale": [1, 5]}
    with pytest.raises(TrainingError, match=r"the explanation of 'p\d+_0\.mp4' has none of the words bad, poor, "):
        train(make_config(data__train=[table]), quiet)
    assert not (tmp_path / "run").exists()
