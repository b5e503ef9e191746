"""Small backbones with random weights, built on the published tokenizer, chat template, processor and configuration
files (LMM_QA_SHARED/backbones), so that tests meet the real classes and the real vocabulary without any download."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import VideoMetadata

from lmm_qa.model.prompt import Prompt

SHARED = Path(os.environ.get("LMM_QA_SHARED", Path(__file__).parents[2] / "shared"))
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision")

LOUDER = 4
"""Weights as they are first drawn hardly react to what they see; these do, so that a test notices a wrong input."""

TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2}  # fmt: skip


def published(name: str) -> Path:
    folder = SHARED / "backbones" / name
    if not folder.is_dir():
        pytest.skip(f"no published backbone files at {folder}; set LMM_QA_SHARED")
    return folder


def build(family: str, out: Path) -> Path:
    """A directory that `--model` takes."""
    builders: dict[str, Callable[[Path], Any]] = {
        "qwen2_vl": _qwen2_vl,
        "qwen2_5_vl": _qwen2_5_vl,
        "qwen3_vl": _qwen3_vl,
        "llava_onevision": _llava_onevision,
    }
    config = builders[family](out)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= LOUDER
    model.save_pretrained(out)
    return out


def add_adapter(model: Path, out: Path, **options: Any) -> Path:
    """A LoRA adapter directory with random weights for a model directory, as PEFT writes it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    base = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    targets = r".*language_model.*\.(q_proj|v_proj|up_proj)"
    config = LoraConfig(**{"r": 4, "lora_alpha": 64, "target_modules": targets, "init_lora_weights": False} | options)
    get_peft_model(base, config).save_pretrained(out)
    return out


def conversation_inputs(
    processor: Any, prompt: Prompt, slots: dict[str, float], views: Sequence[Any], metadata: VideoMetadata
) -> Any:
    """A model's inputs as transformers makes them from one conversation that has the frames in it: no code of ours
    but the prompt's words."""
    messages = prompt.messages(len(views), **slots)
    places = (part for part in messages[-1]["content"] if part["type"] == "video")
    for part, view in zip(places, views, strict=True):
        part["video"] = view
    messages.append({"role": "assistant", "content": [{"type": "text", "text": prompt.stem}]})
    options: dict[str, Any] = {"do_sample_frames": False, "video_metadata": [metadata] * len(views)}
    if hasattr(processor.video_processor, "merge_size"):
        options["do_resize"] = False
    if hasattr(processor.video_processor, "cap_pixels_per_frame"):
        options["cap_pixels_per_frame"] = False
    return processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        continue_final_message=True,
        processor_kwargs=options,
    )


def _qwen2_5_files(out: Path) -> Path:
    source = published("qwen2.5-vl-7b-instruct")
    out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer_config.json", "vocab.json", "merges.txt", "preprocessor_config.json", "chat_template.json"):
        shutil.copyfile(source / name, out / name)
    return source


def _qwen2_5_vl(out: Path) -> Any:
    source = _qwen2_5_files(out)
    raw = json.loads((source / "config.json").read_text())
    raw |= TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    raw["vision_config"] |= {"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4,
                             "out_hidden_size": 64, "fullatt_block_indexes": [1]}  # fmt: skip
    return _config(raw, out)


def _qwen2_vl(out: Path) -> Any:
    """Qwen2-VL has the tokenizer, template and picture sizes of Qwen2.5-VL; its configuration differs in the tower."""
    source = _qwen2_5_files(out)
    processor = json.loads((out / "preprocessor_config.json").read_text())
    (out / "preprocessor_config.json").write_text(json.dumps(processor | {"processor_class": "Qwen2VLProcessor"}))
    raw = json.loads((source / "config.json").read_text())
    raw |= TEXT | {"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"]}
    raw["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 3, 3]}
    raw["vision_config"] = {"depth": 2, "embed_dim": 64, "hidden_size": 64, "mlp_ratio": 4, "num_heads": 4,
                            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}  # fmt: skip
    return _config(raw, out)


def _qwen3_vl(out: Path) -> Any:
    source = published("qwen3-vl-8b")
    shutil.copytree(source, out, dirs_exist_ok=True, copy_function=shutil.copyfile)
    out.chmod(0o755)
    raw = json.loads((source / "config.json").read_text())
    raw["text_config"] |= TEXT | {"head_dim": 16}
    raw["text_config"]["rope_scaling"] |= {"mrope_section": [2, 3, 3]}
    raw["vision_config"] |= {"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4,
                             "out_hidden_size": 64, "deepstack_visual_indexes": [0]}  # fmt: skip
    return _config(raw, out)


def _llava_onevision(out: Path) -> Any:
    """A family that is not Qwen's: every frame is resized to one fixed size, videos are stacked."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor
    from transformers.models.llava_onevision.image_processing_llava_onevision import LlavaOnevisionImageProcessor

    _qwen2_5_files(out)
    tokenizer = AutoProcessor.from_pretrained(out).tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<video>"]})
    template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
        "{% if part['type'] == 'video' %}<video>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.chat_template = template
    size = {"height": 56, "width": 56}
    for leftover in out.iterdir():
        leftover.unlink()
    LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=[[56, 56]]),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=template,
    ).save_pretrained(out)
    return LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 96,
                       "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56, "patch_size": 14,
                       "vision_use_head": False},
        text_config={"model_type": "qwen2", "vocab_size": 152064, **TEXT},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[56, 56]],
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )  # fmt: skip


def _config(raw: dict[str, Any], out: Path) -> Any:
    (out / "config.json").write_text(json.dumps(raw))
    return AutoConfig.from_pretrained(out)
