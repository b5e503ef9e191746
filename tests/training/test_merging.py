"""python -m pytest tests/training/test_merging.py; with adapters of older versions: tests/model/test_weights.py"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import add_adapter
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from lmm_qa.errors import ModelError
from lmm_qa.training import merging
from lmm_qa.training.merging import merge_weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]

LANGUAGE = r".*language_model.*\.(q_proj|v_proj|up_proj)"

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"use_rslora": True, "rank_pattern": {"up_proj": 2}},
    "tower and merger": {"target_modules": LANGUAGE + r"|.*visual\.blocks.*\.qkv|.*merger\.mlp\.[02]"},
    "dora": {"use_dora": True},
    "whole modules": {"modules_to_save": ["norm"]},
    "biases": {"bias": "lora_only"},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.fixture(scope="module")
def sharded(family_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16, in several files."""
    model, out = family_dir("qwen2_5_vl"), tmp_path_factory.mktemp("sharded")
    AutoModelForImageTextToText.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(
        out, max_shard_size="150KB"
    )
    AutoProcessor.from_pretrained(model).save_pretrained(out)
    (out / "rater.json").write_text("{}")
    (out / "training_args.bin").write_bytes(b"pickle")
    return out


@pytest.mark.parametrize("kind", ADAPTERS)
def test_merged_weights_are_those_of_peft(kind: str, sharded: Path, tmp_path: Path) -> None:
    adapter, merged = add_adapter(sharded, tmp_path / "adapter", **ADAPTERS[kind]), tmp_path / "merged"
    if kind == "biases":  # as training would change them
        tensors = load_file(adapter / "adapter_model.safetensors")
        assert any(name.endswith("base_layer.bias") for name in tensors)
    merge_weights(sharded, adapter, merged)
    base = AutoModelForImageTextToText.from_pretrained(sharded, dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, adapter).merge_and_unload().to(torch.bfloat16).state_dict()
    load: Any = AutoModelForImageTextToText.from_pretrained
    found, info = load(merged, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    before = AutoModelForImageTextToText.from_pretrained(sharded, dtype=torch.bfloat16).state_dict()
    changed = {name for name, tensor in expected.items() if not torch.equal(tensor, before[name])}
    assert changed
    for name, tensor in found.state_dict().items():
        if name in changed:
            torch.testing.assert_close(tensor, expected[name], rtol=2**-8, atol=1e-6)
        else:
            assert torch.equal(tensor, before[name]), name


def test_files_and_names_are_those_of_the_checkpoint(sharded: Path, tmp_path: Path) -> None:
    adapter, merged = add_adapter(sharded, tmp_path / "adapter"), tmp_path / "merged"
    merge_weights(sharded, adapter, merged)
    weights = sorted(file.name for file in sharded.glob("*.safetensors"))
    assert len(weights) > 2
    assert sorted(file.name for file in merged.glob("*.safetensors")) == weights
    index = "model.safetensors.index.json"
    assert json.loads((merged / index).read_text()) == json.loads((sharded / index).read_text())
    for file in weights:
        one, two = load_file(sharded / file), load_file(merged / file)
        assert {name: (t.dtype, t.shape) for name, t in one.items()} == {
            name: (t.dtype, t.shape) for name, t in two.items()
        }
    assert not (merged / "training_args.bin").exists() and not (merged / "rater.json").exists()


def test_an_interrupted_merge_leaves_nothing_that_loads(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overwrite(file: Path, _: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, "_overwrite", overwrite)
    adapter, merged = add_adapter(sharded, tmp_path / "adapter"), tmp_path / "merged"
    with pytest.raises(KeyboardInterrupt):
        merge_weights(sharded, adapter, merged)
    assert list(merged.glob("*.safetensors")) and not (merged / "config.json").exists()


def test_a_folder_that_cannot_be_written_to_is_an_error(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=r"cannot write the merged model to .*, which needs [\d.e-]+ GB: .*file"):
        merge_weights(sharded, add_adapter(sharded, tmp_path / "adapter"), tmp_path / "file" / "merged")
