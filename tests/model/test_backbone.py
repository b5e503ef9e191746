"""python -m pytest tests/model/test_backbone.py

Small models with random weights behind the published tokenizers and processors: see backbones.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import scipy.special
import torch
from backbones import FAMILIES, add_adapter, conversation_inputs, published
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.video_utils import VideoMetadata

from lmm_qa.errors import ConfigError, LevelTokenError, ModelError
from lmm_qa.model.backbone import Backbone
from lmm_qa.model.inputs import ClipInput, count_tokens, level_tokens, patch_factor, prepare_inputs, decode_continuation
from lmm_qa.model.loading import choose_attention, choose_device, choose_dtype, estimate_memory, load_processor
from lmm_qa.model.onednn import OneDNNLinear, onednn_is_faster
from lmm_qa.model.prefill import SharedPrefill
from lmm_qa.model.prompt import Prompt, load_prompt
from lmm_qa.model.rater_config import EMBEDDED

QWEN = tuple(family for family in FAMILIES if family.startswith("qwen"))
PROMPT = load_prompt("talking_head")
SLOTS = Prompt(question="{frames:.0f} frames of {seconds:.2f} s:", stem="The quality is", system="You are strict.")
FPS = 25
"""Frame rate of the clips here."""


@pytest.fixture(scope="session")
def load(family_dir: Callable[[str], Path]) -> Callable[[str], Backbone]:
    loaded: dict[str, Backbone] = {}

    def get(family: str) -> Backbone:
        if family not in loaded:
            loaded[family] = Backbone.load(str(family_dir(family)), device="cpu", dtype="float32")
        return loaded[family]

    return get


@pytest.fixture(params=FAMILIES)
def backbone(request: pytest.FixtureRequest, load: Callable[[str], Backbone]) -> Backbone:
    return load(request.param)


def clip(backbone: Backbone, *sizes: tuple[int, int], frames: int = 4, step: int = 7, seed: int = 0) -> ClipInput:
    """Coloured noise; `sizes` are height and width of each view in tokens; every `step`-th frame is looked at."""
    factor = patch_factor(backbone.processor) or 28
    rng = np.random.default_rng(seed)
    views = tuple(
        rng.integers(0, 256, (frames, height * factor, width * factor, 3), dtype=np.uint8) // (1 + seed)
        for height, width in sizes
    )
    seconds = tuple(step * number / FPS for number in range(frames))
    duration = step * frames / FPS
    return ClipInput(views, seconds, duration, {"seconds": duration, "frames": float(frames)})


def through_the_chat_template(processor: Any, clip: ClipInput, prompt: Prompt) -> Any:
    """The model's inputs as transformers makes them; the frames' times as the clip's own frame numbers."""
    metadata = VideoMetadata(
        total_num_frames=round(clip.duration * FPS),
        fps=FPS,
        duration=clip.duration,
        frames_indices=[round(second * FPS) for second in clip.seconds],
    )
    return conversation_inputs(processor, prompt, clip.slots, clip.views, metadata)


def assert_same_reading(one: Any, other: Any, tolerance: float = 1e-4) -> None:
    assert one.logits == pytest.approx(other.logits, abs=tolerance)
    assert one.log_normalizer == pytest.approx(other.log_normalizer, abs=tolerance)


# --- inputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [PROMPT, SLOTS], ids=["talking_head", "with slots and system"])
@pytest.mark.parametrize("frames", [1, 4, 5])
def test_inputs_are_those_of_the_chat_template(backbone: Backbone, frames: int, prompt: Prompt) -> None:
    for one in (clip(backbone, (2, 3), frames=frames), clip(backbone, (2, 3), (4, 2), frames=frames)):
        ours = prepare_inputs(backbone.processor, [one], prompt)
        theirs = through_the_chat_template(backbone.processor, one, prompt)
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert torch.as_tensor(ours[key]).shape == torch.as_tensor(value).shape, key
            assert torch.allclose(torch.as_tensor(ours[key]), torch.as_tensor(value), rtol=1e-6, atol=0), key
        text = backbone.processor.tokenizer.decode(ours["input_ids"][0])
        assert text.endswith(f"assistant\n{prompt.stem}")


def test_the_patches_are_the_pixels(load: Callable[[str], Backbone]) -> None:
    """Neither resized nor sampled: what was put in can be taken out again."""
    backbone = load("qwen2_vl")
    one = clip(backbone, (2, 3))
    inputs = prepare_inputs(backbone.processor, [one], PROMPT)
    video = backbone.processor.video_processor
    assert inputs["video_grid_thw"].tolist() == [[2, 4, 6]]
    patches = inputs["pixel_values_videos"].reshape(2, 2, 3, 2, 2, 3, 2, 14, 14)  # T, y, x, y, x in a token, C, t, H, W
    pixels = patches.permute(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(4, 56, 84, 3).numpy()
    restored = (pixels * np.array(video.image_std) + np.array(video.image_mean)) * 255
    assert np.rint(restored).astype(int).tolist() == one.views[0].tolist()


def test_time_reaches_the_families_that_know_it(load: Callable[[str], Backbone]) -> None:
    processor = load("qwen2_5_vl").processor
    one = clip(load("qwen2_5_vl"), (2, 2), frames=4, step=10)
    inputs = prepare_inputs(processor, [one], PROMPT)
    assert [float(seconds) for seconds in inputs["second_per_grid_ts"]] == pytest.approx([2 * 10 / FPS])
    processor = load("qwen3_vl").processor
    inputs = prepare_inputs(processor, [clip(load("qwen3_vl"), (2, 2), frames=5, step=25)], PROMPT)
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    assert [text.count(f"<{time} seconds>") for time in ("0.5", "2.5", "4.0")] == [1, 1, 1]


def test_tokens_are_counted_without_a_clip(backbone: Backbone) -> None:
    one = clip(backbone, (2, 3), (4, 2))
    sizes = [view.shape[1:3] for view in one.views]
    counted = count_tokens(backbone.processor, 4, sizes, PROMPT)
    assert counted == prepare_inputs(backbone.processor, [one], PROMPT)["input_ids"].shape[1]


# --- reading ---------------------------------------------------------------------------------------------------------


def test_a_reading_is_the_last_position_of_a_plain_forward_pass(
    backbone: Backbone, family_dir: Callable[[str], Path], request: pytest.FixtureRequest
) -> None:
    family = request.node.callspec.params["backbone"]
    one = clip(backbone, (2, 3), (4, 2), frames=5)
    (reading,) = backbone.level_logits([one], PROMPT)
    plain = AutoModelForImageTextToText.from_pretrained(family_dir(family), dtype=torch.float32).eval()
    with torch.no_grad():
        logits = plain(**through_the_chat_template(backbone.processor, one, PROMPT)).logits[0, -1].double().numpy()
    words = [backbone.processor.tokenizer.encode(f" {word}", add_special_tokens=False) for word in PROMPT.levels]
    assert reading.logits == pytest.approx(logits[[word for (word,) in words]], abs=1e-4)
    assert reading.log_normalizer == pytest.approx(scipy.special.logsumexp(logits), abs=1e-4)


def test_a_reading_does_not_depend_on_the_batch(backbone: Backbone) -> None:
    """Views of different sizes, so of different lengths: all but the longest are padded."""
    sizes = [((2, 2), (2, 2)), ((3, 4), (2, 3)), ((6, 5), (4, 4))]
    clips = [clip(backbone, *views, seed=seed) for seed, views in enumerate(sizes)]
    lengths = prepare_inputs(backbone.processor, clips, PROMPT)["attention_mask"].sum(dim=1).tolist()
    assert patch_factor(backbone.processor) is None or len(set(lengths)) == 3
    alone = [backbone.level_logits([one], PROMPT)[0] for one in clips]
    assert np.ptp([reading.logits for reading in alone], axis=0).max() > 0.05, "the clips look alike to the model"
    for order in ([0, 1, 2], [2, 0, 1], [1, 1]):
        together = backbone.level_logits([clips[i] for i in order], PROMPT)
        for i, reading in zip(order, together, strict=True):
            assert_same_reading(reading, alone[i])


def test_what_else_is_in_a_padded_batch_changes_nothing(backbone: Backbone) -> None:
    """As on a GPU; a CPU gets the clips one by one."""
    clips = [clip(backbone, *views, seed=seed) for seed, views in enumerate([((2, 2), (2, 2)), ((6, 5), (4, 4))])]
    together = backbone.next_token_logits(prepare_inputs(backbone.processor, clips, PROMPT))
    tokens = list(backbone.level_tokens(PROMPT, 2))
    for one, logits in zip(clips, together, strict=True):
        (reading,) = backbone.level_logits([one], PROMPT)
        assert logits[tokens].tolist() == pytest.approx(reading.logits, abs=1e-4)
        assert torch.logsumexp(logits, 0).item() == pytest.approx(reading.log_normalizer, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_gets_clips_together(family: str, load: Callable[[str], Backbone]) -> None:
    backbone = load(family)
    clips = [clip(backbone, (2, 3), frames=frames) for frames in (4, 4, 6)]
    assert backbone.batches(clips) == [[0], [1], [2]]
    model: Any = SimpleNamespace(device="cuda")
    model.eval = lambda: model
    gpu = Backbone(model, backbone.processor, {})
    assert gpu.batches(clips) == ([[0, 1, 2]] if family in QWEN else [[0, 1], [2]])


def test_batches_are_of_similar_lengths_and_bounded(
    load: Callable[[str], Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load("qwen2_vl")
    monkeypatch.setattr("lmm_qa.model.backbone.PROMPT_TOKENS", 10)
    monkeypatch.setattr("lmm_qa.model.backbone.MAX_BATCH_TOKENS", 60)
    clips = [clip(backbone, (1, moments), frames=2) for moments in (2, 9, 2, 10, 3, 70, 2, 2)]
    model: Any = SimpleNamespace(device="cuda", eval=lambda: model)
    # Of 12, 19, 12, 20, 13, 80, 12 and 12 tokens.
    assert Backbone(model, backbone.processor, {}).batches(clips) == [[0, 2, 6, 7], [4, 1, 3], [5]]


class Elsewhere(str):
    """A device that is not called a CPU, and is one."""

    type = "elsewhere"


def test_a_gpu_gets_the_next_batch_while_it_works(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next is prepared in a thread; what is read is what each clip alone gives, in the order of the clips."""
    clips = [clip(backbone, (2, 3), (2, 2), frames=2 * frames, seed=frames) for frames in (3, 1, 4, 2, 1)]
    alone = [backbone.level_logits([one], PROMPT)[0] for one in clips]
    monkeypatch.setattr("lmm_qa.model.backbone.MAX_BATCH_TOKENS", 200)
    monkeypatch.setattr(Backbone, "device", Elsewhere("cpu"))
    assert 1 < len(backbone.batches(clips)) < 5
    for reading, one in zip(backbone.level_logits(clips, PROMPT), alone, strict=True):
        assert_same_reading(reading, one)
    for (answer,), one in zip(SharedPrefill(backbone, clips).level_logits([PROMPT]), alone, strict=True):
        assert_same_reading(answer, one, 2e-5)


def test_clips_of_different_lengths_go_together(backbone: Backbone) -> None:
    clips = [clip(backbone, (2, 3), frames=frames, seed=frames) for frames in (4, 1, 7)]
    for one, reading in zip(clips, backbone.level_logits(clips, PROMPT), strict=True):
        assert_same_reading(reading, backbone.level_logits([one], PROMPT)[0])


def test_every_view_counts(backbone: Backbone) -> None:
    both = clip(backbone, (2, 3), (4, 2))
    other = ClipInput((both.views[0], both.views[1][:, ::-1].copy()), both.seconds, both.duration, both.slots)
    first = ClipInput(both.views[:1], both.seconds, both.duration, both.slots)
    readings = [backbone.level_logits([one], PROMPT)[0].logits for one in (both, other, first)]
    assert np.abs(readings[0] - readings[1]).max() > 1e-3
    assert np.abs(readings[0] - readings[2]).max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_reads_much_the_same(family: str, load: Callable[[str], Backbone], family_dir: Any) -> None:
    exact = load(family)
    half = Backbone.load(str(family_dir(family)), device="cpu", dtype="bfloat16")
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    one = clip(exact, (2, 3))
    (expected,), (reading,) = exact.level_logits([one], PROMPT), half.level_logits([one], PROMPT)
    assert reading.logits.dtype == np.float32
    assert reading.logits == pytest.approx(expected.logits, abs=0.1 * float(np.abs(expected.logits).max()))


LAYERS: dict[str, tuple[torch.nn.Module, tuple[int, ...]]] = {
    "linear": (torch.nn.Linear(24, 7), (5, 24)),
    "linear without bias, three axes": (torch.nn.Linear(24, 7, bias=False), (2, 5, 24)),
    "linear of nothing": (torch.nn.Linear(24, 7), (0, 24)),
    "linear in half precision": (torch.nn.Linear(24, 7, dtype=torch.bfloat16), (5, 24)),
    "linear in double precision": (torch.nn.Linear(24, 7, dtype=torch.float64), (5, 24)),
    "patches": (torch.nn.Conv3d(3, 8, (2, 4, 4), stride=(2, 4, 4)), (5, 3, 2, 4, 4)),
    "patches without bias": (torch.nn.Conv3d(3, 8, (2, 4, 4), bias=False), (5, 3, 2, 4, 4)),
    "a kernel that moves": (torch.nn.Conv3d(3, 8, (2, 4, 4), stride=(2, 4, 4)), (5, 3, 4, 8, 4)),
    "a kernel with a margin": (torch.nn.Conv3d(3, 8, (2, 4, 4), padding=1), (5, 3, 2, 4, 4)),
    "groups": (torch.nn.Conv3d(4, 8, (2, 4, 4), groups=2), (5, 4, 2, 4, 4)),
}


@pytest.mark.parametrize("quicker", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
@torch.inference_mode()
def test_a_layer_as_a_product_is_that_layer(kind: str, quicker: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lmm_qa.model.onednn.onednn_is_faster", lambda: quicker and torch.backends.mkldnn.is_available()
    )
    layer, shape = LAYERS[kind]
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(layer.weight.dtype)
    expected = layer(values)
    with OneDNNLinear():
        found = layer(values)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("family", QWEN)
def test_a_reading_on_a_cpu_is_made_of_products(family: str, load: Callable[[str], Backbone]) -> None:
    backbone = load(family)
    backbone.level_logits([clip(backbone, (2, 3))], PROMPT)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        backbone.level_logits([clip(backbone, (2, 3))], PROMPT)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert not any("conv" in name for name in calls), "the patch embedding is a product"
    layers = sum(isinstance(part, torch.nn.Linear) for part in backbone.model.modules())
    assert calls.get("mkldnn::_linear_pointwise", 0) == (layers + 1 if onednn_is_faster() else 0)


def test_attention_is_never_the_slow_one(backbone: Backbone) -> None:
    used = {
        part.config._attn_implementation
        for part in backbone.model.modules()
        if getattr(part, "config", None) is not None
    }
    assert used == {"sdpa"}
    assert backbone.choices["attention"].value == "sdpa"


def test_numbers_that_are_not_finite_are_an_error(family_dir: Callable[[str], Path]) -> None:
    backbone = Backbone.load(str(family_dir("qwen2_vl")), device="cpu", dtype="float32")
    with torch.no_grad():
        backbone.model.lm_head.weight[0] = torch.nan
    with pytest.raises(ModelError, match="logits are not finite in float32"):
        backbone.level_logits([clip(backbone, (2, 2))], PROMPT)


# --- many questions on one prefill, and words ----------------------------------------------------------------------


CLOSED = Prompt(question="Is the picture blurred?", stem="The answer is", levels=("no", "yes"))
QUESTIONS = (
    PROMPT,
    CLOSED,
    Prompt(
        question="In {seconds:.2f} s, does it stand still?",
        stem="It stands still:",
        levels=("never", "often", "always"),
    ),
    load_prompt("qalign"),
)
ONE_SYSTEM = Prompt(question=CLOSED.question, stem=CLOSED.stem, levels=CLOSED.levels, system=SLOTS.system)
VIEWS = [((2, 2), (2, 2)), ((6, 5), (4, 4)), ((3, 4), (2, 3))]


@pytest.fixture(params=["one by one", "together"])
def grouping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips as a CPU gets them, and as a GPU does."""
    if request.param == "together":
        orders = {1: [[0]], 3: [[2, 0], [1]]}
        monkeypatch.setattr(Backbone, "batches", lambda self, clips: orders[len(clips)])


def unlike_clips(backbone: Backbone) -> list[ClipInput]:
    """Of different sizes and durations: their prefills and their questions have different lengths."""
    return [clip(backbone, *views, seed=seed, step=40 * seed + 1) for seed, views in enumerate(VIEWS)]


@pytest.mark.usefixtures("grouping")
def test_questions_on_one_prefill_read_as_on_their_own(backbone: Backbone) -> None:
    clips = unlike_clips(backbone)
    for system, prompts in {None: QUESTIONS, SLOTS.system: (SLOTS, ONE_SYSTEM)}.items():
        prefill = SharedPrefill(backbone, clips, system)
        answers = prefill.level_logits(prompts)
        assert [len(row) for row in answers] == [len(prompts)] * 3
        for number, prompt in enumerate(prompts):
            for row, alone in zip(answers, (backbone.level_logits([one], prompt)[0] for one in clips), strict=True):
                assert_same_reading(row[number], alone, 2e-5)
        for (again,), row in zip(prefill.level_logits(prompts[-1:]), answers, strict=True):
            assert_same_reading(again, row[-1], 2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_vision_tower_runs_once_for_all_questions(family: str, load: Callable[[str], Backbone]) -> None:
    backbone = load(family)
    clips, looks = unlike_clips(backbone), []
    tower = next(part for name, part in backbone.model.named_modules() if name.endswith(("visual", "vision_tower")))
    hook = tower.register_forward_hook(lambda *_: looks.append(1))
    try:
        prefill = SharedPrefill(backbone, clips)
        prefill.level_logits(QUESTIONS)
        prefill.generate([PROMPT] * 3, 2)
    finally:
        hook.remove()
    assert backbone.can_share_prefill == (family in QWEN)
    assert len(looks) == 3 if family in QWEN else len(looks) == 3 * len(QUESTIONS) + 3


def generated(backbone: Backbone, one: ClipInput, prompt: Prompt, **options: Any) -> list[int]:
    """What transformers writes after the stem of a conversation that it has not seen before."""
    inputs = through_the_chat_template(backbone.processor, one, prompt)
    (whole,) = backbone.model.generate(**inputs, do_sample=False, **options).tolist()
    return list(whole[inputs["input_ids"].shape[1] :])


@pytest.mark.usefixtures("grouping")
def test_words_are_those_of_generate(backbone: Backbone) -> None:
    clips, prompts = unlike_clips(backbone), [PROMPT, QUESTIONS[2], CLOSED]
    prefill = SharedPrefill(backbone, clips)
    before = prefill.level_logits(QUESTIONS)
    texts = prefill.generate(prompts, 12)
    written = [generated(backbone, *pair, max_new_tokens=12) for pair in zip(clips, prompts, strict=True)]
    assert len({token for row in written for token in row}) > 5, "a model that always says the same tells nothing"
    assert texts == [backbone.processor.tokenizer.decode(row) for row in written]
    for row, again in zip(before, prefill.level_logits(QUESTIONS), strict=True):
        for one, other in zip(row, again, strict=True):
            assert one.logits.tolist() == other.logits.tolist(), "writing changed the prefill"


@pytest.mark.parametrize("where", ["generation config", "list in the generation config", "tokenizer"])
def test_words_end_where_the_answer_does(
    where: str, load: Callable[[str], Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load("qwen2_vl")
    clips = unlike_clips(backbone)
    monkeypatch.setattr(Backbone, "batches", lambda self, clips: [[2, 1, 0]])
    prefill, tokenizer = SharedPrefill(backbone, clips), backbone.processor.tokenizer
    stop = generated(backbone, clips[0], PROMPT, max_new_tokens=10)[4]
    if where == "tokenizer":
        monkeypatch.setattr(type(tokenizer), "eos_token_id", stop, raising=False)
    else:
        ends = stop if where == "generation config" else [stop, 5]
        monkeypatch.setattr(backbone.model.generation_config, "eos_token_id", ends)
    written = [generated(backbone, one, PROMPT, max_new_tokens=10, eos_token_id=stop, pad_token_id=0) for one in clips]
    assert sorted(len(row) for row in written) == [5, 10, 10], "one answer ends before the others"
    assert written[0].pop() == stop
    assert prefill.generate([PROMPT] * 3, 10) == [tokenizer.decode(row) for row in written]


def test_the_space_before_the_first_word_is_kept() -> None:
    """Also where the tokenizer drops it at the beginning of a text, as those of Llama do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel({"\u2581It": 0, "\u2581is": 1, "\u2581blurred": 2, ".": 3, "?": 4}, unk_token="?")
    )
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert tokenizer.decode([2, 3]) == "blurred."
    assert decode_continuation(tokenizer, "It is", [2, 3]) == " blurred."


def test_a_question_with_another_system_message_is_refused(load: Callable[[str], Backbone]) -> None:
    prefill = SharedPrefill(load("qwen2_vl"), [clip(load("qwen2_vl"), (2, 2))], SLOTS.system)
    message = r"'Is the picture blurred\?' has the system message None, but this prefill was made with 'You are strict.'"
    with pytest.raises(ConfigError, match=message):
        prefill.level_logits([SLOTS, CLOSED])
    with pytest.raises(ConfigError, match=message):
        prefill.generate([CLOSED], 2)


def test_a_sliding_window_shares_no_prefill(family_dir: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(family_dir("qwen2_vl"), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    config["text_config"] |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1,
                              "layer_types": ["full_attention", "sliding_attention"]}  # fmt: skip
    file.write_text(json.dumps(config))
    backbone = Backbone.load(str(tmp_path / "model"), device="cpu", dtype="float32")
    assert not backbone.can_share_prefill
    one = clip(backbone, (3, 4))
    for prompt, answer in zip(QUESTIONS, SharedPrefill(backbone, [one]).level_logits(QUESTIONS)[0], strict=True):
        assert_same_reading(answer, backbone.level_logits([one], prompt)[0], 2e-5)


def test_attention_that_knows_no_masks_is_replaced_for_the_questions(family_dir: Callable[[str], Path]) -> None:
    """Eager attention stands for flash-attn here: it adds a mask of truths to its scores."""
    backbone = Backbone.load(str(family_dir("qwen3_vl")), device="cpu", dtype="float32")
    one = clip(backbone, (2, 3))
    expected = [backbone.level_logits([one], prompt)[0] for prompt in QUESTIONS]
    backbone.model.set_attn_implementation("eager")
    for answer, reading in zip(SharedPrefill(backbone, [one]).level_logits(QUESTIONS)[0], expected, strict=True):
        assert_same_reading(answer, reading, 2e-5)
    assert backbone.model.config._attn_implementation == "eager"
    assert backbone.model.config.text_config._attn_implementation == "eager"


def test_answers_that_are_not_finite_are_an_error(family_dir: Callable[[str], Path]) -> None:
    backbone = Backbone.load(str(family_dir("qwen2_vl")), device="cpu", dtype="float32")
    with torch.no_grad():
        backbone.model.lm_head.weight[backbone.level_tokens(CLOSED, 1)[0]] = torch.inf
    with pytest.raises(ModelError, match="logits are not finite in float32"):
        SharedPrefill(backbone, [clip(backbone, (2, 2))]).level_logits(QUESTIONS)


# PEFT 0.21 asks transformers 5.23 by a name that it has given up.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("family", QWEN)
def test_the_adapter_or_the_base_speaks(
    family: str, load: Callable[[str], Backbone], family_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    base = load(family)
    adapter = add_adapter(family_dir(family), tmp_path / "adapter")
    tuned = Backbone.load(str(family_dir(family)), adapter=adapter, device="cpu", dtype="float32")
    one = clip(base, (2, 3), (4, 2), step=40)
    (ours,) = SharedPrefill(tuned, [one]).level_logits(QUESTIONS)
    with tuned.without_adapter(), base.without_adapter():
        within = SharedPrefill(tuned, [one])
        (plain,), said = within.level_logits(QUESTIONS), within.generate([PROMPT], 12)
        assert said == SharedPrefill(base, [one]).generate([PROMPT], 12)
    assert SharedPrefill(tuned, [one]).generate([PROMPT], 12) != said
    for prompt, adapted, unadapted in zip(QUESTIONS, ours, plain, strict=True):
        assert_same_reading(adapted, tuned.level_logits([one], prompt)[0], 2e-5)
        assert_same_reading(unadapted, base.level_logits([one], prompt)[0], 2e-5)
        assert np.abs(adapted.logits - unadapted.logits).max() > 0.05


@pytest.mark.skipif(not any(EMBEDDED.glob("*.safetensors")), reason=f"no embedded model at {EMBEDDED}")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_embedded_model_answers_on_one_prefill_as_on_many() -> None:
    from lmm_qa import Rater

    backbone, prompts = Rater.from_pretrained(device="cpu").backbone, (PROMPT, CLOSED)
    clips = [clip(backbone, (6, 6), (8, 8), frames=12), clip(backbone, (8, 5), (8, 8), frames=10, seed=1)]
    prefill = SharedPrefill(backbone, clips)
    for one, answers in zip(clips, prefill.level_logits(prompts), strict=True):
        for prompt, answer in zip(prompts, answers, strict=True):
            assert_same_reading(answer, backbone.level_logits([one], prompt)[0], 2e-5)
    texts = prefill.generate(prompts, 12)
    assert texts == [
        backbone.processor.tokenizer.decode(generated(backbone, *pair, max_new_tokens=12), skip_special_tokens=True)
        for pair in zip(clips, prompts, strict=True)
    ]


# --- level tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["talking_head", "qalign"])
@pytest.mark.parametrize("family", QWEN)
def test_the_levels_are_single_tokens_in_context(family: str, name: str, load: Callable[[str], Backbone]) -> None:
    processor = load(family).processor
    for videos in (1, 2):
        tokens = level_tokens(processor, load_prompt(name), videos)
        assert [processor.tokenizer.decode([token]) for token in tokens] == [" bad", " poor", " fair", " good",
                                                                             " excellent"]  # fmt: skip
        assert len(set(tokens)) == 5


@pytest.mark.parametrize(
    ("changes", "complaints"),
    [
        ({"stem": 'The quality is "'}, ("'poor' is 2 tokens after the stem 'The quality is \"'", "['po', 'or']")),
        ({"stem": "The quality is (("}, ("after the stem 'The quality is (('", "'poor'")),
        ({"stem": "This is video-"}, ("the stem 'This is video-'",)),
        ({"levels": ("bad", "mediocre-ish")}, ("'mediocre-ish' is 2 tokens", "['Ġmediocre', '-ish']")),
        ({"levels": ("bad", "splendiferous")}, ("'splendiferous' is 4 tokens", "['Ġspl', 'endif', 'er', 'ous']")),
        ({"levels": ("caf\u00e9", "cafe\u0301")}, ("two levels are the same token",)),
    ],
)
@pytest.mark.parametrize("family", QWEN)
def test_levels_that_are_not_single_tokens_are_refused(
    family: str, changes: dict[str, Any], complaints: tuple[str, ...], load: Callable[[str], Backbone]
) -> None:
    with pytest.raises(LevelTokenError) as caught:
        level_tokens(load(family).processor, Prompt(**PROMPT.model_dump() | changes), 1)
    for complaint in complaints:
        assert complaint in str(caught.value)


@pytest.mark.parametrize("stem", ["The quality is:", "Quality (of 5), all in all,", "质量"])
def test_a_stem_may_end_in_punctuation_that_a_space_follows(stem: str, load: Callable[[str], Backbone]) -> None:
    backbone = load("qwen2_vl")
    prompt = Prompt(question="?", stem=stem)
    assert level_tokens(backbone.processor, prompt, 1) == level_tokens(backbone.processor, PROMPT, 1)


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_models_read_much_the_same(
    family: str, quantization: Any, load: Callable[[str], Backbone], family_dir: Callable[[str], Path]
) -> None:
    exact = load(family)
    small = Backbone.load(str(family_dir(family)), device="cpu", dtype="float32", quantization=quantization)
    kind = {"4bit": bitsandbytes.nn.Linear4bit, "8bit": bitsandbytes.nn.Linear8bitLt}[quantization]
    linear = {name: type(part) for name, part in small.model.named_modules() if isinstance(part, torch.nn.Linear)}
    quantized = {name for name, part in linear.items() if issubclass(part, kind)}
    assert quantized == {name for name in linear if "language_model" in name}
    assert {linear[name] for name in linear.keys() - quantized} == {torch.nn.Linear}
    assert any("vis" in name for name in linear.keys() - quantized)
    one = clip(exact, (2, 3))
    (expected,), (reading,) = exact.level_logits([one], PROMPT), small.level_logits([one], PROMPT)
    spread = float(np.abs(expected.logits).max())
    assert np.isfinite(reading.logits).all()
    assert reading.logits == pytest.approx(expected.logits, abs=spread * {"4bit": 0.5, "8bit": 0.15}[quantization])
    assert small.choices["quantization"].value == quantization


def test_a_model_that_takes_no_videos_is_refused(tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor, LlavaProcessor

    tokenizer = AutoTokenizer.from_pretrained(published("qwen2.5-vl-7b-instruct"))
    LlavaProcessor(CLIPImageProcessor(), tokenizer, patch_size=14).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="does not accept videos: its processor LlavaProcessor has no video processor"):
        load_processor(str(tmp_path))


def test_what_cannot_be_loaded_is_named(family_dir: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(family_dir("qwen2_vl"), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"cannot load the model '.*model': OSError: "):
        Backbone.load(str(tmp_path / "model"), device="cpu")
    torch.save({}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"cannot load the model '.*model'"):  # a pickle can run code
        Backbone.load(str(tmp_path / "model"), device="cpu")
    with pytest.raises(ModelError, match=r"cannot load the processor of '.*empty'"):
        (tmp_path / "empty").mkdir()
        Backbone.load(str(tmp_path / "empty"), device="cpu")
    with pytest.raises(ModelError, match=r"cannot load the adapter .*empty for '.*qwen2_vl'"):
        Backbone.load(str(family_dir("qwen2_vl")), adapter=tmp_path / "empty", device="cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_is_estimated_without_weights(family: str, load: Any, family_dir: Any, tmp_path: Path) -> None:
    shutil.copy(family_dir(family) / "config.json", tmp_path)
    model = load(family).model
    memory = estimate_memory(str(tmp_path), 1000, dtype="float32")
    assert memory.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert memory.weights == 4 * memory.parameters
    in_layers = sum(part.weight.numel() for name, part in model.named_modules()
                    if isinstance(part, torch.nn.Linear) and "language_model" in name)  # fmt: skip
    assert estimate_memory(str(tmp_path), 1000, dtype="float32", quantization="8bit").weights == memory.weights - 3 * in_layers
    assert estimate_memory(str(tmp_path), 2000, dtype="float32").clip == 2 * memory.clip
    with pytest.raises(ModelError, match="cannot load the configuration"):
        estimate_memory(str(tmp_path / "gone"), 1000, dtype="float32")


def test_choices_say_why() -> None:
    assert str(choose_device("cpu")) == "cpu (requested)"
    with pytest.raises(ModelError, match=r"device 'cuda:99' cannot be used here: .*Try --device cpu"):
        choose_device("cuda:99")
    assert choose_device().value in {"cpu", "cuda", "mps"}
    assert str(choose_dtype("cpu")) == "float32 (exact, and reliable on cpu)"
    assert str(choose_dtype("cpu", "bfloat16")) == "bfloat16 (requested)"
    assert str(choose_attention("cpu", "float32")) == "sdpa (on cpu)"
    assert choose_attention("cuda", "float32").value == "sdpa"  # flash-attn or not
