"""Small backbones of each model family with random weights: real transformers classes, no download.

`build` makes a directory that `--model` takes. Its tokenizer is trained here, on a few sentences, and splits
text as Qwen's does. With `published=True` tokenizer, chat template, processor settings and configuration are the
published files of Qwen2.5-VL and Qwen3-VL, where LMM_QA_SHARED/backbones has them, with smaller widths and depths;
there are none of Qwen3.5 and InternVL3.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import EMBEDDED, SHARED
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast
from transformers.video_utils import VideoMetadata

from lmm_qa.model.backbone import Backbone
from lmm_qa.model.prompt import Prompt

OMNI = ("qwen2_5_omni", "qwen3_omni_moe")
"""Families that take sound: `build` writes the thinker, `add_talker` makes it a whole model, as published ones are."""
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", *OMNI, "internvl", "llava_onevision")
PUBLISHED = SHARED / "backbones"

WEIGHT_SCALE = 4
"""Freshly initialised weights hardly react to their input; scaled up, a wrong input changes the logits visibly."""

SOUND_SCALE = 4
"""Likewise for the layers before and behind those of the audio tower."""

TEXT: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                        "num_key_value_heads": 2}  # fmt: skip
TOWER: dict[str, Any] = {"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "out_hidden_size": 64}
QWEN2_TOWER: dict[str, Any] = {"depth": 2, "embed_dim": 64, "hidden_size": 64, "mlp_ratio": 4, "num_heads": 4,
                               "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}  # fmt: skip
MROPE = {"mrope_section": [2, 3, 3]}


def published(name: str) -> Path:
    """The folder of a model's published files; the test is skipped where it is absent."""
    folder = PUBLISHED / name
    if not folder.is_dir():
        pytest.skip(f"no published backbone files at {folder}; set LMM_QA_SHARED")
    return folder


def builder(folder: Path, *, published: bool = False) -> Callable[[str], Path]:
    """Makes the directory of a family's small model, in a folder, when it is first asked for."""
    return cache(lambda family: build(family, folder / family, published=published))


def loader(directory: Callable[[str], Path]) -> Callable[[str], Backbone]:
    """Loads a family's small model when it is first asked for."""
    return cache(lambda family: Backbone.load(str(directory(family)), device="cpu", dtype="float32"))


def build(family: str, out: Path, *, published: bool = False) -> Path:
    """Write a small model of a family with its processor; returns `out`."""
    own: dict[str, Callable[[Path], Any]] = {
        "qwen2_vl": _qwen2_vl,
        "qwen2_5_vl": _qwen2_5_vl,
        "qwen3_vl": _qwen3_vl,
        "qwen3_5": _qwen3_5,
        "qwen2_5_omni": _qwen2_5_omni,
        "qwen3_omni_moe": _qwen3_omni_moe,
        "internvl": _internvl,
        "llava_onevision": _llava_onevision,
    }
    from_published: dict[str, Callable[[Path], Any]] = {
        "qwen2_vl": _published_qwen2_vl,
        "qwen2_5_vl": _published_qwen2_5_vl,
        "qwen3_vl": _published_qwen3_vl,
        "llava_onevision": _published_llava_onevision,
    }
    if published and family not in from_published:
        pytest.skip(f"no published files of {family}")
    out.mkdir(parents=True, exist_ok=True)
    config = (from_published if published else own)[family](out)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter *= WEIGHT_SCALE * (SOUND_SCALE if re.search(r"audio_tower\.(conv|proj)", name) else 1)
    model.save_pretrained(out)
    return out


def add_adapter(model: Path, out: Path, **options: Any) -> Path:
    """A LoRA adapter directory with random weights for a model directory, as PEFT writes it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    base = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    up = "k_proj" if hasattr(base.config.get_text_config(), "num_experts") else "up_proj"  # experts are one tensor
    targets = rf".*language_model.*\.(q_proj|v_proj|in_proj_qkv|{up})"
    config = LoraConfig(**{"r": 4, "lora_alpha": 64, "target_modules": targets, "init_lora_weights": False} | options)
    get_peft_model(base, config).save_pretrained(out)
    return out


def conversation_inputs(
    processor: Any, prompt: Prompt, slots: dict[str, float], views: Sequence[Any], metadata: VideoMetadata
) -> Any:
    """A model's inputs as transformers makes them from one conversation that holds the frames: none of our code but
    the words of the prompt."""
    messages = prompt.messages(len(views), len(views[0]), **slots)
    kind, media = "video", [*views]
    options: dict[str, Any] = {"do_sample_frames": False, "video_metadata": [metadata] * len(views)}
    if prompt.frames == "images":
        kind, media, options = "image", [Image.fromarray(frame) for view in views for frame in view], {}
    parts = (part for part in messages[-1]["content"] if part["type"] == kind)
    for part, medium in zip(parts, media, strict=True):
        part[kind] = medium
    messages.append({"role": "assistant", "content": [{"type": "text", "text": prompt.stem}]})
    if hasattr(processor.video_processor, "merge_size"):
        options["do_resize"] = False
    if hasattr(processor, "seconds_per_chunk") and kind == "video":  # an Omni model
        options["fps"] = 2 / seconds_of_rows(metadata)
    if hasattr(processor.video_processor, "cap_pixels_per_frame") and kind == "video":
        options["cap_pixels_per_frame"] = False
    if hasattr(processor.image_processor, "crop_to_patches") and kind == "image":
        options["crop_to_patches"] = False
    inputs = processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        continue_final_message=True,
        processor_kwargs=options,
    )
    return _published_form(processor, inputs) if kind == "video" else inputs


def seconds_of_rows(metadata: VideoMetadata) -> float:
    """Time between the rows of tokens of a video, two frames each, in 1024ths of a second."""
    starts: Any = (metadata.frames_indices or [])[::2]
    return round((starts[1] - starts[0]) / metadata.fps * 1024) / 1024 if len(starts) > 1 else 1.0


def _published_form(processor: Any, inputs: Any) -> Any:
    """Inputs of Qwen3-VL as its release makes them: only frames are between vision tokens, not the video as well."""
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    outer = r"<\|vision_start\|>(?=<[\d.]+ seconds>)|(?<=<\|vision_end\|>)<\|vision_end\|>"
    ids = processor.tokenizer(re.sub(outer, "", text), add_special_tokens=False, return_tensors="pt")
    types = torch.tensor(processor.create_mm_token_type_ids(ids["input_ids"].tolist()))
    return inputs | ids | ({"mm_token_type_ids": types} if "mm_token_type_ids" in inputs else {})


# With a tokenizer that is trained here

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
                  "<|video_pad|>")  # fmt: skip
VOCABULARY = 1024
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen's tokenizers split a text into words: letters with the space before them, digits one by one."""

TEXT_TO_LEARN = """
You are watching a talking-head video. Rate the visual quality of this video: is it bad, poor, fair, good or excellent?
The quality of this video is good. How would you judge the quality of this clip? The quality of the video is poor.
Look at the face, the mouth, the teeth and the eyes. Is the picture blurred? Is there noise? Answer with yes or no: no.
Are there compression marks, such as blocks or ringing? Does the brightness flicker? Does the clip freeze? Answer: yes.
Explain why the quality of this video is fair: the picture is blurred from 1.0 to 2.5 s, and the background moves.
"""
"""Fixed, so that models with random weights answer the same whatever is edited elsewhere."""

WORDS = "bad poor fair good excellent yes no never often always caf\u00e9 mediocre spl"
"""Single tokens after a space."""
PIECES = {"bad": 500, "fair": 500, "po": 3000, "or": 3000, "endif": 500, "er": 500, "ous": 500, "-ish": 500}
"""Single tokens by themselves, and how often the training text has them: "poor" without its space is two tokens, as in
Qwen's vocabulary."""


@cache
def _trained() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    text = [TEXT_TO_LEARN]
    text += [f" {word}" for word in WORDS.split() for _ in range(500)]
    text += [piece for piece, count in PIECES.items() for _ in range(count)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def _tokenizer(**extra: str) -> Any:
    """With further special tokens by the names under which a processor looks for them."""
    end_of_text, _, end_of_turn, *_ = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(_trained()),
        eos_token=end_of_turn,
        pad_token=end_of_text,
        extra_special_tokens=extra,
    )


def _qwen_tokenizer() -> Any:
    return _tokenizer(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_bos_token="<|vision_start|>",
        vision_eos_token="<|vision_end|>",
    )


def _chat_template() -> str:
    return (EMBEDDED / "base" / "chat_template.jinja").read_text(encoding="utf-8")


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    """Ids that a configuration of the Qwen-VL family names."""
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
             "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}  # fmt: skip
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}


def _text(tokenizer: Any, rope: dict[str, Any], **more: Any) -> dict[str, Any]:
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    return {**TEXT, **ends, "vocab_size": VOCABULARY, "rope_parameters": {"rope_theta": 10000.0, **rope}, **more}


def _qwen2_vl(out: Path) -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    tokenizer = _qwen_tokenizer()
    Qwen2VLProcessor(
        Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), chat_template=_chat_template()
    ).save_pretrained(out)
    rope = {"rope_type": "default", **MROPE}
    return Qwen2VLConfig(text_config=_text(tokenizer, rope), vision_config=QWEN2_TOWER, **_special_tokens(tokenizer))


def _qwen2_5_vl(out: Path) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    tokenizer = _qwen_tokenizer()
    Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), chat_template=_chat_template()
    ).save_pretrained(out)
    tower = {**TOWER, "fullatt_block_indexes": [1], "window_size": 112, "tokens_per_second": 2}
    rope = {"rope_type": "default", **MROPE}
    return Qwen2_5_VLConfig(text_config=_text(tokenizer, rope), vision_config=tower, **_special_tokens(tokenizer))


def _qwen3_processor(out: Path, chat_template: str) -> Any:
    """Write the processor of Qwen3-VL and Qwen3.5; returns its tokenizer."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    tokenizer = _qwen_tokenizer()
    size = {"shortest_edge": 64 * 64, "longest_edge": 1280 * 1024}
    Qwen3VLProcessor(
        Qwen2VLImageProcessor(patch_size=16, size=size),
        tokenizer,
        Qwen3VLVideoProcessor(),
        chat_template=chat_template,
    ).save_pretrained(out)
    return tokenizer


QWEN3_ROPE: dict[str, Any] = {"rope_type": "default", "mrope_interleaved": True, **MROPE}
QWEN3_TOWER: dict[str, Any] = {**TOWER, "patch_size": 16, "num_position_embeddings": 2304}


def _qwen3_vl(out: Path) -> Any:
    from transformers import Qwen3VLConfig

    tokenizer = _qwen3_processor(out, _chat_template())
    tower = {**QWEN3_TOWER, "deepstack_visual_indexes": [0]}
    text = _text(tokenizer, QWEN3_ROPE, head_dim=16)
    return Qwen3VLConfig(text_config=text, vision_config=tower, **_special_tokens(tokenizer))


THINKING_TEMPLATE = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{%- for part in message.content %}"
    "{%- if part.type == 'text' %}{{ part.text }}{%- else %}"
    "{{ '<|vision_start|><|' + part.type + '_pad|><|vision_end|>' }}{%- endif %}{%- endfor %}{{ '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
    "{%- else %}{{ '<think>\n' }}{%- endif %}{%- endif %}"
)
"""As that of the larger models of Qwen3.5, which think unless they are told not to."""


def _qwen3_5(out: Path) -> Any:
    from transformers import Qwen3_5Config

    tokenizer = _qwen3_processor(out, THINKING_TEMPLATE)
    hybrid = {"head_dim": 64, "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 16,
              "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4}  # fmt: skip
    text = _text(tokenizer, QWEN3_ROPE, **hybrid)
    return Qwen3_5Config(text_config=text, vision_config=QWEN3_TOWER, **_special_tokens(tokenizer))


def _omni_processor(out: Path, processor: Any, names: tuple[str, ...], patch_size: int) -> dict[str, Any]:
    """Write the processor of an Omni model; returns what its configuration says of tokens.

    Args:
        names: the tokens for an image, a video, a sound, and the start and end of pictures and of sound.
    """
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor, WhisperFeatureExtractor

    image, video, audio, *ends = names
    kinds = ("image_token", "video_token", "audio_token", "vision_bos_token", "vision_eos_token", "audio_bos_token",
             "audio_eos_token")  # fmt: skip
    tokenizer = _tokenizer(**dict(zip(kinds, names, strict=True)))
    marks = {"image": f"{ends[0]}{image}{ends[1]}", "video": f"{ends[0]}{video}{ends[1]}",
             "audio": f"{ends[2]}{audio}{ends[3]}"}  # fmt: skip
    template = (
        "{%- for message in messages %}{% if loop.first and message.role != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + message.role + '\n' }}{%- for part in message.content %}"
        "{%- if part.type == 'text' %}{{ part.text }}"
        + "".join(f"{{%- elif part.type == '{kind}' %}}{{{{ '{mark}' }}}}" for kind, mark in marks.items())
        + "{%- endif %}{%- endfor %}{{ '<|im_end|>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
    )
    processor(
        image_processor=Qwen2VLImageProcessor(patch_size=patch_size),
        video_processor=Qwen2VLVideoProcessor(patch_size=patch_size),
        feature_extractor=WhisperFeatureExtractor(feature_size=MEL_BANDS, chunk_length=300),
        tokenizer=tokenizer,
        chat_template=template,
    ).save_pretrained(out)
    ids = dict(zip(kinds, tokenizer.convert_tokens_to_ids(names), strict=True))
    return {
        "tokens": {
            "audio_start_token_id": ids["audio_bos_token"],
            "vision_start_token_id": ids["vision_bos_token"],
            "vision_end_token_id": ids["vision_eos_token"],
        },
        "placeholders": {kind: ids[f"{kind}_token"] for kind in ("image", "video", "audio")},
        "audio_end": ids["audio_eos_token"],
        "tokenizer": tokenizer,
    }


MEL_BANDS = 16
AUDIO_TOWER: dict[str, Any] = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64,
                               "output_dim": 64, "num_mel_bins": MEL_BANDS}  # fmt: skip


def _qwen2_5_omni(out: Path) -> Any:
    """The thinker of a Qwen2.5-Omni."""
    from transformers import Qwen2_5OmniProcessor
    from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniThinkerConfig

    names = ("<|IMAGE|>", "<|VIDEO|>", "<|AUDIO|>", "<|vision_bos|>", "<|vision_eos|>", "<|audio_bos|>",
             "<|audio_eos|>")  # fmt: skip
    made = _omni_processor(out, Qwen2_5OmniProcessor, names, 14)
    text = _text(made["tokenizer"], {"rope_type": "default", **MROPE}, vocab_size=len(made["tokenizer"]))
    return Qwen2_5OmniThinkerConfig(
        text_config=text,
        vision_config={**TOWER, "fullatt_block_indexes": [1], "window_size": 112},
        audio_config={**AUDIO_TOWER, "n_window": 100},
        audio_end_token_id=made["audio_end"],
        **made["tokens"],
        **{f"{kind}_token_index": token for kind, token in made["placeholders"].items()},
    )


def _qwen3_omni_moe(out: Path) -> Any:
    """The thinker of a Qwen3-Omni: its language model is a mixture of experts."""
    from transformers import Qwen3OmniMoeProcessor
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeThinkerConfig

    names = ("<|image_pad|>", "<|video_pad|>", "<|audio_pad|>", "<|vision_start|>", "<|vision_end|>",
             "<|audio_start|>", "<|audio_end|>")  # fmt: skip
    made = _omni_processor(out, Qwen3OmniMoeProcessor, names, 16)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16}
    text = _text(made["tokenizer"], QWEN3_ROPE, vocab_size=len(made["tokenizer"]), **experts)
    return Qwen3OmniMoeThinkerConfig(
        text_config=text,
        vision_config={**QWEN3_TOWER, "deepstack_visual_indexes": [0]},
        audio_config={**AUDIO_TOWER, "n_window": 50, "downsample_hidden_size": 8},
        position_id_per_seconds=13,
        **made["tokens"],
        **{f"{kind}_token_id": token for kind, token in made["placeholders"].items()},
    )


def add_talker(thinker: Path, out: Path) -> Path:
    """A whole Omni model, which also speaks: the weights of a thinker, and tensor names as in the published files."""
    shutil.copytree(thinker, out)
    config = json.loads((thinker / "config.json").read_text())
    parts = {"qwen2_5_omni_thinker": ("qwen2_5_omni", "token2wav"), "qwen3_omni_moe_thinker": ("qwen3_omni_moe",
                                                                                               "code2wav")}  # fmt: skip
    kind, voice = parts[config["model_type"]]
    (out / "config.json").write_text(json.dumps({"model_type": kind, "thinker_config": config}))
    tensors = {f"talker.model.layers.{layer}.self_attn.q_proj.weight": torch.ones(8, 8) for layer in (0, 1)}
    tensors |= {f"{voice}.x.weight": torch.ones(4), "talker.codec_head.weight": torch.ones(3, 3)}
    for name, value in load_file(thinker / "model.safetensors").items():
        tensors[name if name.startswith("thinker.") else f"thinker.{name}"] = value
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


INTERNVL_TOKENS = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
                   "video_token": "<video>"}  # fmt: skip


def _internvl(out: Path) -> Any:
    """Every frame is resized to one fixed size, and a video is one image per frame for the model."""
    from transformers import GotOcr2ImageProcessor, InternVLConfig, InternVLProcessor, InternVLVideoProcessor

    tokenizer = _tokenizer(**INTERNVL_TOKENS)
    template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<IMG_CONTEXT>\n{% elif part['type'] == 'video' %}<video>\n"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    size = {"height": 56, "width": 56}
    InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=template,
    ).save_pretrained(out)
    return InternVLConfig(
        vision_config={"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
                       "image_size": [56, 56], "patch_size": [14, 14]},
        text_config={"model_type": "qwen2", "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id,
                     "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, **TEXT},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )  # fmt: skip


def _llava_onevision(out: Path) -> Any:
    return _llava(out, _tokenizer(), VOCABULARY)


def _llava(out: Path, tokenizer: Any, vocabulary: int) -> Any:
    """A family that is not Qwen's: every frame is resized to one fixed size, videos are stacked."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor
    from transformers.models.llava_onevision.image_processing_llava_onevision import LlavaOnevisionImageProcessor

    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<video>"]})
    template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<{{ part['type'] }}>\n{% endif %}{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.chat_template = template
    size = {"height": 56, "width": 56}
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
        text_config={"model_type": "qwen2", "vocab_size": vocabulary, "eos_token_id": tokenizer.eos_token_id,
                     "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, **TEXT},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[56, 56]],
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )  # fmt: skip


# With the published tokenizer, template, processor and configuration


def _qwen2_5_files(out: Path) -> Path:
    source = published("qwen2.5-vl-7b-instruct")
    for name in ("tokenizer_config.json", "vocab.json", "merges.txt", "preprocessor_config.json", "chat_template.json"):
        shutil.copyfile(source / name, out / name)
    return source


def _published_qwen2_5_vl(out: Path) -> Any:
    source = _qwen2_5_files(out)
    raw = json.loads((source / "config.json").read_text())
    raw |= TEXT | {"rope_scaling": {"type": "mrope", **MROPE}}
    raw["vision_config"] |= TOWER | {"fullatt_block_indexes": [1]}
    return _config(raw, out)


def _published_qwen2_vl(out: Path) -> Any:
    """Qwen2-VL has the tokenizer, template and picture sizes of Qwen2.5-VL; its configuration differs in the tower."""
    source = _qwen2_5_files(out)
    processor = json.loads((out / "preprocessor_config.json").read_text())
    (out / "preprocessor_config.json").write_text(json.dumps(processor | {"processor_class": "Qwen2VLProcessor"}))
    raw = json.loads((source / "config.json").read_text())
    raw |= TEXT | {"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"]}
    raw |= {"rope_scaling": {"type": "mrope", **MROPE}, "vision_config": QWEN2_TOWER}
    return _config(raw, out)


def _published_qwen3_vl(out: Path) -> Any:
    source = published("qwen3-vl-8b")
    shutil.copytree(source, out, dirs_exist_ok=True, copy_function=shutil.copyfile)
    out.chmod(0o755)
    raw = json.loads((source / "config.json").read_text())
    raw["text_config"] |= TEXT | {"head_dim": 16}
    raw["text_config"]["rope_scaling"] |= MROPE
    raw["vision_config"] |= TOWER | {"deepstack_visual_indexes": [0]}
    return _config(raw, out)


def _published_llava_onevision(out: Path) -> Any:
    """Built on the tokenizer of Qwen2.5, as the published models of the family are."""
    source = _qwen2_5_files(out)
    tokenizer = AutoProcessor.from_pretrained(out).tokenizer
    for leftover in out.iterdir():
        leftover.unlink()
    config = _llava(out, tokenizer, 152064)
    # The same vocabulary in the files of Qwen2.5: tokenizer.json takes four times as long to load.
    (out / "tokenizer.json").unlink()
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(source / name, out / name)
    settings = json.loads((out / "tokenizer_config.json").read_text())
    added = {number: token.__getstate__() for number, token in tokenizer.added_tokens_decoder.items()}
    (out / "tokenizer_config.json").write_text(json.dumps(settings | {"added_tokens_decoder": added}))
    return config


def _config(raw: dict[str, Any], out: Path) -> Any:
    (out / "config.json").write_text(json.dumps(raw))
    return AutoConfig.from_pretrained(out)
