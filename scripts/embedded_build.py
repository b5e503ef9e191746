"""Build the embedded model before training: tokenizer, processor, configuration, first weights.

    python scripts/embedded_build.py --data data/embedded --out runs/embedded/init

The architecture is transformers' Qwen2VLForConditionalGeneration with the sizes of configs/embedded.yaml. The patch
embedding does not start at random but as a local frequency basis: cosine coefficients of the luma of a patch, of the
difference of its two frames, and of its colour, each scaled to unit variance over the training patches, so that faint
high frequencies (noise, the loss of detail) speak as loudly as brightness does.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from embedded_data import rows_of
from scipy.fft import dct
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from lmm_qa.defects.explanation import Finding, explanation_prompt, facts, is_good, opening, sentence
from lmm_qa.defects.questions import questions
from lmm_qa.defects.vocabulary import VISIBLE
from lmm_qa.model.prompt import load_prompt
from lmm_qa.model.rater_config import weights_fingerprint

CONFIGS = Path(__file__).parent.parent / "configs"
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
    """A byte-level BPE of the Qwen kind, trained on configs/embedded_corpus.txt and all that is asked and answered."""
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer  # Qwen's own splitting
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    plain.train_from_iterator(corpus(), trainer)
    trained = json.loads(plain.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(pair) for pair in trained["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL[1:],
        model_max_length=32768,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def corpus() -> list[str]:
    """The corpus, the prompts (ten times, since each is one line of what is read most) and sentences of the grammar."""
    lines = (CONFIGS / "embedded_corpus.txt").read_text(encoding="utf-8").splitlines()
    rating = load_prompt("talking_head")
    prompts = [rating, *questions().values(), explanation_prompt(rating, ())]
    lines += 10 * [f"{prompt.question}\n{prompt.stem} {word}" for prompt in prompts for word in prompt.levels]
    draw = random.Random(0)
    for _ in range(400):
        found = [Finding(name, 1.0, ((0.5, 2.0),)) for name in draw.sample(VISIBLE, draw.randint(0, 3))]
        level = draw.choice(rating.levels)
        text = sentence(found, VISIBLE, draw, [draw.random() for _ in found], is_good(level, rating.levels))
        lines.append(f"{facts(found)}\n{opening(rating, level)}{text}")
    return lines


def build_processor(tokenizer: Qwen2Tokenizer) -> Qwen2VLProcessor:
    """Processor with a pixel range fit for small pictures; values from -1 to 1."""
    size = {"shortest_edge": 28 * 28, "longest_edge": 448 * 448}
    half = [0.5, 0.5, 0.5]
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, image_mean=half, image_std=half),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size, image_mean=half, image_std=half, cap_pixels_per_frame=False),
        chat_template=CHAT_TEMPLATE,
    )


def build_config(recipe: dict[str, Any], tokenizer: Qwen2Tokenizer) -> Qwen2VLConfig:
    text = dict(recipe["text"])
    section = text.pop("mrope_section")
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    return Qwen2VLConfig(
        vision_config={**recipe["vision"], "hidden_size": text["hidden_size"]},
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


def training_patches(data: Path, count: int = 20000) -> np.ndarray:
    """Patches of the training copies, (count, 3, 2, 14, 14) in [-1, 1]."""
    names = sorted(data.glob("*.crop.npy"))
    train = [row["name"] for row in rows_of(data) if row["split"] == "train"]
    if not names or not train:
        raise SystemExit(f"no training copies in {data}; run scripts/embedded_data.py first")
    draw = random.Random(0)
    patches = []
    while len(patches) < count:
        clip = np.load(data / f"{draw.choice(train)}.crop.npy", mmap_mode="r")
        for _ in range(20):
            t = 2 * draw.randrange(len(clip) // 2)
            y, x = draw.randrange(clip.shape[1] - 13), draw.randrange(clip.shape[2] - 13)
            patches.append(clip[t : t + 2, y : y + 14, x : x + 14].transpose(3, 0, 1, 2) / np.float32(127.5) - 1)
    return np.stack(patches)


def frequency_basis(patches: np.ndarray, width: int) -> torch.Tensor:
    """Weights of the patch embedding, (width, 3, 2, 14, 14): whitened cosine coefficients.

    A half of the channels sees the luma of both frames, a third the difference of the frames, the rest colour.
    """
    side = patches.shape[-1]
    cosine = dct(np.eye(side), axis=0, norm="ortho")
    basis = np.einsum("ay,bx->abyx", cosine, cosine).reshape(side * side, side, side)
    radius = np.hypot(*np.divmod(np.arange(side * side), side))
    order = np.argsort(radius, kind="stable")

    def pick(count: int, low: int) -> np.ndarray:
        """The `low` lowest frequencies, and the others evenly from all the rest."""
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


def carry_over(model: Qwen2VLForConditionalGeneration, tokenizer: Qwen2Tokenizer, start: Path) -> None:
    """Weights of an earlier model of the same sizes; a token keeps its embedding where both vocabularies have it."""
    before = Qwen2VLForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
    known = Qwen2Tokenizer.from_pretrained(start).get_vocab()
    old, new = before.get_input_embeddings().weight, model.get_input_embeddings().weight
    state = before.state_dict()
    with torch.no_grad():
        new.copy_(old.mean(0) + 0.02 * torch.randn_like(new))
        for token, number in tokenizer.get_vocab().items():
            if token in known:
                new[number] = old[known[token]]
    state = {name: value for name, value in state.items() if "embed_tokens" not in name and "lm_head" not in name}
    model.load_state_dict(state, strict=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=CONFIGS / "embedded.yaml")
    parser.add_argument("--start", type=Path, help="weights of an earlier model to go on from, in place of new ones")
    args = parser.parse_args()
    recipe = yaml.safe_load(args.config.read_text())
    torch.manual_seed(recipe["seed"])
    tokenizer = build_tokenizer(recipe["vocabulary"])
    model = Qwen2VLForConditionalGeneration(build_config(recipe, tokenizer))
    if args.start:
        carry_over(model, tokenizer, args.start)
    else:
        with torch.no_grad():
            model.model.visual.patch_embed.proj.weight.copy_(
                frequency_basis(training_patches(args.data), recipe["vision"]["embed_dim"])
            )
    model.save_pretrained(args.out)
    (args.out / "start.json").write_text(json.dumps(weights_fingerprint(args.start) if args.start else None))
    build_processor(tokenizer).save_pretrained(args.out)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.out}: {count / 1e6:.2f} M parameters, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
