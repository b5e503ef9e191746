"""python -m pytest tests/training/test_legacy_files.py; checkpoints as they were published for transformers 4.45"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from backbones import add_adapter
from model_inputs import PROMPT, assert_equal_logits, random_clip
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from lmm_qa.model.backbone import Backbone
from lmm_qa.training.export import merge
from lmm_qa.training.legacy_files import write_legacy_files

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def logits(model: Path, adapter: Path | None = None) -> Any:
    backbone = Backbone.load(str(model), adapter, device="cpu", dtype="float32")
    return backbone.level_logits([random_clip(backbone, (2, 3))], PROMPT)[0]


def read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text())
    return content


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "internvl", "llava_onevision"])
def test_older_forms_mean_the_same(family: str, family_dir: Callable[[str], Path], tmp_path: Path) -> None:
    model, both = family_dir(family), tmp_path / "both"
    shutil.copytree(model, both)
    write_legacy_files(both)
    once = {file.name: file.read_bytes() for file in both.iterdir()}
    write_legacy_files(both)
    assert {file.name: file.read_bytes() for file in both.iterdir()} == once
    one, two = AutoProcessor.from_pretrained(model), AutoProcessor.from_pretrained(both)
    assert one.to_dict() == two.to_dict()
    assert one.chat_template == two.chat_template
    text = "Rate <|im_start|>this<|im_end|> video."
    assert one.tokenizer.encode(text) == two.tokenizer.encode(text)
    assert_equal_logits(logits(both), logits(model), 1e-6)
    # What transformers 4 looks for.
    assert read(both / "chat_template.json") == {"chat_template": one.chat_template}
    image, video = read(both / "preprocessor_config.json"), read(both / "video_preprocessor_config.json")
    assert image["image_processor_type"] and image["image_mean"] and video["video_processor_type"]
    rest = read(both / "processor_config.json")
    assert rest["processor_class"] and not any(isinstance(value, dict) for value in rest.values()), "refused by 4.52"
    tokenizer = read(both / "tokenizer_config.json")
    assert not isinstance(tokenizer.get("extra_special_tokens"), list)
    if family == "internvl":
        assert tokenizer["extra_special_tokens"]["start_image_token"] == "<img>"
    config = read(both / "config.json")
    assert config["torch_dtype"] == config["dtype"] == "float32"
    text_config = config["text_config"]
    assert text_config["rope_theta"] == text_config["rope_parameters"]["rope_theta"]
    if family == "qwen2_vl":
        assert text_config["rope_scaling"]["type"] == "mrope"
    if "qwen" in family:
        assert text_config["rope_scaling"]["mrope_section"] == [2, 3, 3]


def published_layout(model: Path, out: Path) -> Path:
    """A Qwen2-VL as it was released: a flat config.json, and the tensor names and files of transformers 4.45."""
    out.mkdir()
    config, processor = read(model / "config.json"), read(model / "processor_config.json")
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    for part in (text, config["vision_config"]):
        for name in ("dtype", "layer_types", "rope_parameters", "model_type"):
            part.pop(name, None)
    config["torch_dtype"] = config.pop("dtype")
    config |= text | {"model_type": "qwen2_vl", "transformers_version": "4.45.2", "rope_theta": rope["rope_theta"]}
    config["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    (out / "config.json").write_text(json.dumps(config))
    image = processor["image_processor"] | {"processor_class": "Qwen2VLProcessor"}
    size = image.pop("size")
    image |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    (out / "preprocessor_config.json").write_text(json.dumps(image))
    template = (model / "chat_template.jinja").read_text()
    (out / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    tokenizer = read(model / "tokenizer_config.json")
    tokens = tokenizer.pop("extra_special_tokens", [])
    for name in ("image_token", "video_token", "vision_bos_token", "vision_eos_token"):
        tokenizer.pop(name, None)
    tokenizer["additional_special_tokens"] = list(tokens.values() if isinstance(tokens, dict) else tokens)
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"tokenizer_class": "Qwen2Tokenizer"}))
    shutil.copyfile(model / "tokenizer.json", out / "tokenizer.json")
    tensors = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor
        for name, tensor in load_file(model / "model.safetensors").items()
    }
    assert {name.split(".")[0] for name in tensors} == {"model", "visual", "lm_head"}
    assert "model.layers.0.self_attn.q_proj.weight" in tensors
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_a_checkpoint_in_the_published_layout(family_dir: Callable[[str], Path], tmp_path: Path) -> None:
    new = family_dir("qwen2_vl")
    old = published_layout(new, tmp_path / "old")
    assert_equal_logits(logits(old), logits(new), 1e-6)
    tuned = add_adapter(old, tmp_path / "adapter")
    expected = logits(new, tuned)
    assert abs(expected.logits - logits(new).logits).max() > 1e-2
    assert_equal_logits(logits(old, tuned), expected, 1e-6)
    (tuned / "rater.json").write_text(json.dumps({"backbone": str(old)}))
    merge(tuned, tmp_path / "merged")
    assert_equal_logits(logits(tmp_path / "merged"), expected, 1e-3)
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == load_file(old / "model.safetensors").keys()
    for file in ("config.json", "preprocessor_config.json", "chat_template.json", "tokenizer_config.json"):
        assert read(tmp_path / "merged" / file) == read(old / file)
