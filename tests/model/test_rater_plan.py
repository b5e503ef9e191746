"""python -m pytest tests/model/test_rater_plan.py; plans with a calibration: tests/test_rater.py"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from backbones import FAMILIES, OMNI, add_adapter
from model_inputs import QWEN
from paths import ROOT

from lmm_qa import Rater, Sampling, View
from lmm_qa.errors import ModelError
from lmm_qa.model.inputs import patch_factor
from lmm_qa.model.loading import load_processor
from lmm_qa.model.rater_plan import plan_rater

SMALL: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
VIEWS = (View(max_pixels=112 * 112), View(kind="crop", size=56))

# PEFT 0.21 reads an attribute that transformers 5.23 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def model_dir(family_dir: Callable[[str], Path]) -> Path:
    return family_dir("qwen2_vl")


@pytest.fixture(scope="module")
def adapter_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_adapter(model_dir, tmp_path_factory.mktemp("adapter"))


def test_the_identity_depends_on_model_and_settings(model_dir: Path, adapter_dir: Path) -> None:
    def identity(model: Path = model_dir, **options: Any) -> str:
        return plan_rater(model, **SMALL | options).rater_id

    changed = [
        identity(),
        identity(adapter_dir),
        identity(prompt="qalign"),
        identity(scale=(0, 5)),
        identity(sampling=Sampling(frames=4)),
        identity(sampling=Sampling(strategy="pairs")),
        identity(views=VIEWS),
        identity(views=VIEWS[::-1]),
        identity(dtype="bfloat16"),
        identity(quantization="8bit"),
    ]
    assert len(set(changed)) == len(changed)
    same = [
        identity(),
        identity(prompt="talking_head"),
        identity(prompt=ROOT / "prompts" / "talking_head.yaml"),
        identity(scale=(1.0, 5.0)),
        identity(sampling=Sampling.from_text("uniform:8")),
        identity(views=[View.from_text("whole:448")]),
    ]
    assert set(same) == {changed[0]}
    rater = Rater.from_pretrained(model_dir, sampling=Sampling(frames=4), views=VIEWS, **SMALL)
    assert rater.rater_id == identity(sampling=Sampling(frames=4), views=VIEWS)


@pytest.fixture
def tuned_in_4bit(adapter_dir: Path, model_dir: Path, tmp_path: Path) -> Path:
    """A rater directory that says that its backbone was quantized in training."""
    folder = shutil.copytree(adapter_dir, tmp_path / "rater")
    (folder / "rater.json").write_text(json.dumps({"backbone": str(model_dir), "quantization": "4bit"}))
    return folder


def test_a_rater_loads_its_backbone_as_in_training_unless_told_otherwise(tuned_in_4bit: Path) -> None:
    plan = plan_rater(tuned_in_4bit, **SMALL)
    assert plan.load_options["quantization"] == "4bit" and plan.notes == ()
    ids = {plan.rater_id}
    for requested, chosen, text in ((None, "4bit", ""), ("4bit", "4bit", ""), ("8bit", "8bit", "in 8bit"),
                                    ("none", None, "unquantized")):  # fmt: skip
        other = plan_rater(tuned_in_4bit, **{**SMALL, "quantization": requested})
        assert other.load_options["quantization"] == chosen
        if not text:
            assert (other.rater_id, other.notes) == (plan.rater_id, ())
        else:
            (note,) = other.notes
            assert "was tuned and calibrated with its backbone in 4bit" in note and f"with it {text}" in note
            ids.add(other.rater_id)
    (tuned_in_4bit / "rater.json").write_text(json.dumps({"backbone": plan.source.backbone}))
    assert len(ids) == 3 and plan_rater(tuned_in_4bit, **SMALL).rater_id in ids, "the id says what the weights are"


def test_quantized_weights_where_they_cannot_be_used_are_an_error(
    tuned_in_4bit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitsandbytes.supported_torch_devices", {"cuda"})
    message = r"in 4bit cannot be used on cpu: bitsandbytes [\d.]+ supports cuda\. Choose another --device, or"
    with pytest.raises(ModelError, match=message):
        plan_rater(tuned_in_4bit, **SMALL).load_backbone()
    assert plan_rater(tuned_in_4bit, **{**SMALL, "quantization": "none"}).load_backbone()


def test_a_plan_is_identified_without_loading_heavy_libraries(model_dir: Path) -> None:
    """So that a run that has nothing to do ends quickly."""
    script = """
import sys
from lmm_qa.model.inputs import patch_factor
from lmm_qa.model.loading import load_processor
from lmm_qa.model.rater_plan import plan_rater
plan_rater(sys.argv[1], device="cpu").rater_id
print(*sorted({"transformers", "peft", "scipy", "torchvision"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script, model_dir], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


@pytest.mark.parametrize("family", FAMILIES)
def test_the_patch_factor_is_known_before_the_processor_is_loaded(
    family: str, family_dir: Callable[[str], Path]
) -> None:
    plan = plan_rater(family_dir(family), **SMALL)
    loaded = patch_factor(load_processor(plan.source.backbone))
    known = family in QWEN and family not in OMNI
    assert plan.patch_factor in ((loaded,) if known else (loaded, None))


def test_the_patch_factor_of_the_embedded_model_is_known() -> None:
    assert plan_rater().patch_factor == Rater.from_pretrained().factor == 28
