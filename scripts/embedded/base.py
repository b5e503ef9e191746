"""The untrained embedded model: tokenizer, processor, configuration and initial weights.

The architecture is transformers' Qwen2VLForConditionalGeneration with the sizes of model.yaml. The patch embedding is
not initialised at random but as a local frequency basis: cosine coefficients of the luma of a patch, of the difference
of its two frames, and of its colour, each scaled to unit variance over training patches, so that faint high frequencies
(noise, lost detail) count as much as brightness.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from embedded.data import ViewCache
from scipy.fft import dct
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from lmm_qa.defects.explanation import (
    Finding,
    describe_findings,
    explanation_prompt,
    is_good,
    opening,
    template_text,
)
from lmm_qa.defects.questions import questions
from lmm_qa.defects.vocabulary import VISIBLE
from lmm_qa.files.tables import read_rows
from lmm_qa.model.prompt import load_prompt

CORPUS = Path(__file__).parent / "corpus.txt"
PATCHES_PER_COPY = 100
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>"]  # fmt: skip
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>"
    "{%- elif part['type'] == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- else -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


def build_tokenizer(size: int) -> Qwen2Tokenizer:
    """Train a byte-level BPE of the Qwen kind on corpus.txt and all prompts and answers."""
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer  # Qwen's own splitting
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    plain.train_from_iterator(corpus(), trainer)
    trained: Any = json.loads(plain.to_str())["model"]
    merges: list[Any] = [tuple(pair) for pair in trained["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL[1:],
        model_max_length=32768,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def corpus() -> list[str]:
    """corpus.txt, the prompts (ten times, as they are read most), and explanations from the templates."""
    lines = CORPUS.read_text(encoding="utf-8").splitlines()
    rating = load_prompt("talking_head")
    prompts = [rating, *questions().values(), explanation_prompt(rating, ())]
    lines += 10 * [f"{prompt.question}\n{prompt.stem} {word}" for prompt in prompts for word in prompt.levels]
    draw = random.Random(0)
    for _ in range(400):
        found = [Finding(name, 1.0, ((0.5, 2.0),)) for name in draw.sample(VISIBLE, draw.randint(0, 3))]
        level = draw.choice(rating.levels)
        text = template_text(found, VISIBLE, draw, [draw.random() for _ in found], is_good(level, rating.levels))
        lines.append(f"{describe_findings(found)}\n{opening(rating, level)}{text}")
    return lines


def build_processor(tokenizer: Qwen2Tokenizer) -> Any:
    """A processor with a pixel range for small pictures; pixel values from -1 to 1."""
    size = {"shortest_edge": 28 * 28, "longest_edge": 448 * 448}
    half = [0.5, 0.5, 0.5]
    processor: Any = Qwen2VLProcessor
    return processor(
        image_processor=Qwen2VLImageProcessor(size=size, image_mean=half, image_std=half),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size, image_mean=half, image_std=half, cap_pixels_per_frame=False),
        chat_template=CHAT_TEMPLATE,
    )


def build_config(settings: Mapping[str, Any], tokenizer: Qwen2Tokenizer) -> Qwen2VLConfig:
    text = dict(settings["text"])
    section = text.pop("mrope_section")
    ids: dict[str, Any] = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    return Qwen2VLConfig(
        vision_config={**settings["vision"], "hidden_size": text["hidden_size"]},
        text_config={
            **text,
            "vocab_size": -(-len(tokenizer) // 64) * 64,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section},
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": True,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def build_base(settings: Mapping[str, Any], copies: Path, views: ViewCache, out: Path) -> None:
    """Write the untrained model to OUT.

    Args:
        settings: content of model.yaml.
        copies: folder with labels.jsonl of training copies.
        views: of these copies; the last view gives the patches.
    """
    torch.manual_seed(settings["seed"])
    tokenizer = build_tokenizer(settings["vocabulary_size"])
    model = Qwen2VLForConditionalGeneration(build_config(settings, tokenizer))
    patches = training_patches(copies, views)
    with torch.no_grad():
        model.model.visual.patch_embed.proj.weight.copy_(frequency_basis(patches, settings["vision"]["embed_dim"]))
    build_processor(tokenizer).save_pretrained(out)
    model.save_pretrained(out)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{out}: {count / 1e6:.2f} M parameters, {len(tokenizer)} tokens")


def training_patches(copies: Path, views: ViewCache, most: int = 200) -> np.ndarray:
    """Random patches of training copies, (n, 3, 2, 14, 14) float32 in [-1, 1]."""
    clips = [row["clip"] for row in read_rows(copies / "labels.jsonl")]
    rng = random.Random(0)
    patches = []
    for clip in rng.sample(clips, min(most, len(clips))):
        frames = views.read(copies / clip)[-1]
        for _ in range(PATCHES_PER_COPY):
            t = 2 * rng.randrange(len(frames) // 2)
            y, x = rng.randrange(frames.shape[1] - 13), rng.randrange(frames.shape[2] - 13)
            patches.append(frames[t : t + 2, y : y + 14, x : x + 14].transpose(3, 0, 1, 2) / np.float32(127.5) - 1)
    return np.stack(patches)


def frequency_basis(patches: np.ndarray, width: int) -> torch.Tensor:
    """Weights of the patch embedding, (width, 3, 2, 14, 14): whitened cosine coefficients.

    Half of the channels see the luma of both frames, a third the difference of the frames, the rest colour.

    Args:
        patches: (n, 3, 2, 14, 14), which scale the weights.
        width: number of channels.
    """
    side = patches.shape[-1]
    cosine = dct(np.eye(side), axis=0, norm="ortho")
    basis = np.einsum("ay,bx->abyx", cosine, cosine).reshape(side * side, side, side)
    radius = np.hypot(*np.divmod(np.arange(side * side), side))
    order = np.argsort(radius, kind="stable")

    def pick(count: int, low: int) -> np.ndarray:
        """The `low` lowest frequencies, and others evenly spaced over the rest."""
        return np.concatenate([order[:low], order[np.linspace(low, len(order) - 1, count - low).astype(int)]])

    luma, blue, red = np.array([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]])
    both, change = np.array([0.5, 0.5]), np.array([0.5, -0.5])
    still, moving = width // 2, width // 3
    colour = (width - still - moving) // 2
    parts = [
        (luma, both, pick(still, still // 3)),
        (luma, change, pick(moving, moving // 4)),
        (blue, both, order[:colour]),
        (red, both, order[: width - still - moving - colour]),
    ]
    weights = np.concatenate(
        [np.einsum("c,t,kyx->kctyx", channel, time, basis[chosen]) for channel, time, chosen in parts]
    )
    response = patches.reshape(len(patches), -1) @ weights.reshape(len(weights), -1).T
    weights /= response.std(axis=0).clip(1e-3)[:, None, None, None, None]
    return torch.from_numpy(weights.astype(np.float32))
