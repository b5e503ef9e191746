"""python -m pytest tests/model/test_families.py

What differs between the families of models; what they have in common is tested with the module that does it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from backbones import FAMILIES, add_adapter, builder, loader
from model_inputs import CLOSED, HYBRID, IMAGES, NO_THOUGHTS, PROMPT, assert_equal_logits, random_clip
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from lmm_qa.model.backbone import Backbone
from lmm_qa.model.inputs import level_tokens, prepare_inputs, prompt_text, tokens_per_frame
from lmm_qa.model.prefill import SharedPrefill
from lmm_qa.model.prompt import Prompt, load_prompt
from lmm_qa.training.adapters import lora_targets
from lmm_qa.training.export import merge

QREALIGN = load_prompt("qrealign")


@pytest.fixture(scope="module")
def family_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Without the published tokenizers: nothing here depends on them."""
    return builder(tmp_path_factory.mktemp("backbones"))


@pytest.fixture(scope="module")
def load(family_dir: Callable[[str], Path]) -> Callable[[str], Backbone]:
    return loader(family_dir)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frame_is_one_image(family: str, load: Callable[[str], Backbone]) -> None:
    """Neither tiles, nor two frames in one, however large it is."""
    backbone = load(family)
    one = random_clip(backbone, (2, 7), (9, 2), frames=3)
    inputs = prepare_inputs(backbone.processor, [one], IMAGES)
    if "image_grid_thw" in inputs:
        assert inputs["image_grid_thw"].tolist() == [[1, 4, 14]] * 3 + [[1, 18, 4]] * 3
    else:
        assert len(inputs["pixel_values"]) == 6
        placeholder = backbone.processor.tokenizer.convert_tokens_to_ids(backbone.processor.image_token)
        per_image = {"internvl": 4, "llava_onevision": 17}[family]
        assert inputs["input_ids"][0].tolist().count(placeholder) == 6 * per_image


@pytest.mark.parametrize("family", ["internvl", "llava_onevision"])
@pytest.mark.parametrize("prompt", [PROMPT, IMAGES], ids=["video", "images"])
def test_batches_of_fixed_size_frames_count_their_tokens(
    family: str, prompt: Prompt, load: Callable[[str], Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not their pixels: a small view takes as many tokens as a large one."""
    backbone = load(family)
    per_frame = tokens_per_frame(backbone.processor, prompt.frames)
    for size in (1, 9):
        clips = [random_clip(backbone, (size, size), (2, 2), frames=frames) for frames in (3, 4)]
        shorter, longer = (prepare_inputs(backbone.processor, [one], prompt)["input_ids"].shape[1] for one in clips)
        assert longer - shorter == 2 * per_frame
    clips = [random_clip(backbone, (size, size), (2, 2), frames=4) for size in (1, 9, 1, 9)]
    monkeypatch.setattr("lmm_qa.model.backbone.PROMPT_TOKENS", 0)
    monkeypatch.setattr(Backbone, "device", torch.device("cuda"))
    for limit, batches in ((16 * per_frame, [2, 2]), (16 * per_frame - 1, [1, 1, 1, 1])):
        monkeypatch.setattr("lmm_qa.model.backbone.MAX_BATCH_TOKENS", limit)
        assert [len(batch) for batch in backbone.batches(clips, prompt)] == batches


@pytest.mark.parametrize("family", FAMILIES)
def test_a_clip_of_one_image_in_a_batch(family: str, load: Callable[[str], Backbone]) -> None:
    """LLaVA-OneVision cuts it into tiles, as it was trained to, if it is the only one of its conversation."""
    backbone = load(family)
    clips = [random_clip(backbone, (2, 3), frames=frames, seed=frames) for frames in (1, 3)]
    prompt = PROMPT.model_copy(update={"frames": "images"})
    together = backbone.next_token_logits(prepare_inputs(backbone.processor, clips, prompt))
    for one, logits in zip(clips, together, strict=True):
        (alone,) = backbone.next_token_logits(prepare_inputs(backbone.processor, [one], prompt))
        torch.testing.assert_close(logits, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stem_may_start_with_a_space(family: str, load: Callable[[str], Backbone]) -> None:
    """The tokens of the stem follow those of the chat, as in the code of Q-ReAlign."""
    backbone = load(family)
    tokenizer = backbone.processor.tokenizer
    chat = prompt_text(backbone.processor, QREALIGN, 1, {}, images=2).removesuffix(QREALIGN.stem)
    assert chat.endswith("assistant\n" + (NO_THOUGHTS if family in HYBRID else ""))
    one = random_clip(backbone, (2, 3), frames=2)
    ids = prepare_inputs(backbone.processor, [one], QREALIGN)["input_ids"][0].tolist()
    stem = tokenizer(QREALIGN.stem, add_special_tokens=False)["input_ids"]
    before = tokenizer(chat, add_special_tokens=False)["input_ids"]
    assert ids[-len(stem) :] == stem and ids[-len(stem) - 5 : -len(stem)] == before[-5:]
    words = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in QREALIGN.levels]
    assert [*level_tokens(backbone.processor, QREALIGN, 1)] == [token for (token,) in words]
    (text,) = SharedPrefill(backbone, [one], QREALIGN).generate([QREALIGN], 4)
    (whole,) = backbone.model.generate(
        **prepare_inputs(backbone.processor, [one], QREALIGN), do_sample=False, max_new_tokens=4
    ).tolist()
    assert text == tokenizer.decode(whole[len(ids) :], skip_special_tokens=True)


def test_weights_for_predicting_several_tokens_are_ignored(family_dir: Callable[[str], Path], tmp_path: Path) -> None:
    """Checkpoints of Qwen3.5 have them, and transformers has no use for them."""
    model = Path(shutil.copytree(family_dir("qwen3_5"), tmp_path / "model"))
    tensors = load_file(model / "model.safetensors") | {"mtp.fc.weight": torch.zeros(2, 2)}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert Backbone.load(str(model), device="cpu", dtype="float32").level_tokens(PROMPT, 1)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT 0.21
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_on_the_default_layers_can_be_loaded_by_peft_and_merged(
    family: str, load: Callable[[str], Backbone], family_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    from peft import PeftModel

    base, model = load(family), family_dir(family)
    adapter = add_adapter(model, tmp_path / "adapter", target_modules=lora_targets(base.model, {"language"}))
    (adapter / "rater.json").write_text(json.dumps({"backbone": str(model)}))
    tuned = Backbone.load(str(model), adapter=adapter, device="cpu", dtype="float32")
    one = random_clip(base, (2, 3), frames=2)
    (reading,), (untuned,) = tuned.level_logits([one], PROMPT), base.level_logits([one], PROMPT)
    assert abs(reading.logits - untuned.logits).max() > 0.05
    plain = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32), adapter)
    with torch.no_grad():
        theirs = plain(**prepare_inputs(base.processor, [one], PROMPT)).logits[0, -1]
    tokens = list(tuned.level_tokens(PROMPT, 1))
    assert theirs[tokens].tolist() == pytest.approx(reading.logits, abs=1e-4)
    merge(adapter, tmp_path / "merged")
    merged = Backbone.load(str(tmp_path / "merged"), device="cpu", dtype="float32")
    spread = float(abs(reading.logits).max())
    for prompt in (PROMPT, CLOSED):
        assert_equal_logits(merged.level_logits([one], prompt)[0], tuned.level_logits([one], prompt)[0], 1e-4 * spread)
