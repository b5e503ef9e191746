"""python -m pytest tests/model/test_weights.py"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import FAMILIES, add_adapter
from model_inputs import PROMPT, assert_equal_logits, random_clip
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from lmm_qa.errors import ModelError
from lmm_qa.model.backbone import Backbone
from lmm_qa.model.compat import skip_patterns
from lmm_qa.model.loading import UNQUANTIZED
from lmm_qa.model.source import resolve_model
from lmm_qa.model.weights import check_checkpoint, load_saved_weights
from lmm_qa.training.export import merge

FamilyDir = Callable[[str], Path]

pytestmark = [  # of PEFT, when the adapters here are made
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

OLD_NAMES: dict[str, dict[str, str]] = {
    "qwen2_vl": {"model.language_model.": "model.", "model.visual.": "visual."},
    "qwen2_5_vl": {"model.language_model.": "model.", "model.visual.": "visual."},
    "llava_onevision": {"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower."},
}
"""Prefixes of module names, and what they were before transformers 4.52."""


def load(model: Path, adapter: Path | None = None) -> Backbone:
    return Backbone.load(str(model), adapter, device="cpu", dtype="float32")


def logits(backbone: Backbone) -> Any:
    return backbone.level_logits([random_clip(backbone, (2, 3))], PROMPT)[0]


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    (file,) = folder.glob("*.safetensors")
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def edit_json(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def copy_of(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


def save_quantized(model: Path, out: Path, bits: str) -> Path:
    """A checkpoint quantized by bitsandbytes, stored with everything else in bfloat16."""
    options: dict[str, Any] = {f"load_in_{bits}": True, "llm_int8_skip_modules": skip_patterns(UNQUANTIZED)}
    if bits == "4bit":
        options |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    config: Any = BitsAndBytesConfig
    loaded = AutoModelForImageTextToText.from_pretrained(
        model, dtype=torch.bfloat16, quantization_config=config(**options), device_map={"": "cpu"}
    )
    shutil.copytree(model, out)
    loaded.save_pretrained(out)
    return out


# Checkpoints


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_that_does_not_fit_is_refused(family: str, family_dir: FamilyDir, tmp_path: Path) -> None:
    model = copy_of(family_dir(family), tmp_path)
    tensors = load_file(model / "model.safetensors")
    vision = sorted(name for name in tensors if re.search(r"visual\.|vision_tower\.", name))
    without = {name: tensor for name, tensor in tensors.items() if name not in vision}
    edit_tensors(model, lambda _: without)
    with pytest.raises(
        ModelError, match=rf"do not fit the model: {len(vision)} missing \(\S+vis.+, \.\.\.\)\. Download"
    ):
        load(model)
    edit_tensors(model, lambda _: {f"module.{name}": tensor for name, tensor in tensors.items()})
    with pytest.raises(ModelError, match=rf"\d+ missing \(.*\); {len(tensors)} unexpected \(module\."):
        load(model)
    edit_tensors(model, lambda _: tensors | {"surplus.weight": torch.zeros(2)})
    with pytest.raises(ModelError, match=r"do not fit the model: 1 unexpected \(surplus\.weight\)\."):
        load(model)
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    edit_tensors(model, lambda _: tensors | {name: tensors[name][:-1].clone()})
    with pytest.raises(ModelError, match=r"cannot load the model|of another shape"):
        load(model)


def test_buffers_that_older_versions_stored_are_harmless(family_dir: FamilyDir, tmp_path: Path) -> None:
    model = copy_of(family_dir("qwen2_vl"), tmp_path)
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(2)}
    edit_tensors(model, lambda tensors: tensors | buffers)
    assert_equal_logits(logits(load(model)), logits(load(family_dir("qwen2_vl"))), 1e-6)


def test_resuming_checks_the_saved_weights(family_dir: FamilyDir, tmp_path: Path) -> None:
    saved = copy_of(family_dir("qwen2_vl"), tmp_path)
    model = load(family_dir("qwen2_vl")).model
    load_saved_weights(model, str(saved))
    edit_tensors(saved, lambda tensors: {name: tensors[name] for name in list(tensors)[3:]})
    with pytest.raises(ModelError, match="3 missing"):
        load_saved_weights(model, str(saved))


def test_loading_errors_and_shapes_are_reported() -> None:
    info: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
    check_checkpoint("m", info)
    with pytest.raises(ModelError, match=r"1 of another shape \(a: \[2\] instead of \[3\]\)"):
        check_checkpoint("m", info | {"mismatched_keys": {("a", (2,), (3,))}})
    with pytest.raises(ModelError, match="do not fit the model: bad header"):
        check_checkpoint("m", info | {"error_msgs": ["bad header"]})


# Quantized checkpoints


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantized_checkpoint_rates_as_one_quantized_when_loaded(
    bits: Any, family_dir: FamilyDir, tmp_path: Path
) -> None:
    model = save_quantized(family_dir("qwen2_vl"), tmp_path / "quantized", bits)
    stored = load(model)
    assert str(stored.choices["quantization"]) == f"{bits} (as the checkpoint is stored)"
    quantized = Backbone.load(str(family_dir("qwen2_vl")), device="cpu", dtype="float32", quantization=bits)
    found, expected = logits(stored), logits(quantized)
    spread = float(abs(expected.logits).max())
    assert found.logits == pytest.approx(expected.logits, abs=0.05 * spread)  # the rest was rounded to bfloat16
    with pytest.raises(ModelError, match=r"is quantized already \(.*\): load it without --quantization"):
        Backbone.load(str(model), device="cpu", quantization=bits)
    weight = next(name for name in load_file(model / "model.safetensors") if name.endswith("down_proj.weight"))
    edit_tensors(model, lambda tensors: {name: tensor for name, tensor in tensors.items() if weight not in name})
    with pytest.raises(ModelError, match=r"do not fit the model: .*missing \(.*down_proj"):
        load(model)


@pytest.mark.parametrize("method", ["fp8", "bitsandbytes"])
def test_plain_weights_that_are_declared_quantized_are_refused(
    method: str, family_dir: FamilyDir, tmp_path: Path
) -> None:
    model = copy_of(family_dir("qwen2_vl"), tmp_path)
    edit_json(model / "config.json", lambda config: config | {"quantization_config": {"quant_method": method}})
    for attempt in (resolve_model, load):
        with pytest.raises(
            ModelError, match=rf"config\.json declares weights quantized with {method}, but they are not"
        ):
            attempt(model)


# Adapters


def old_adapter(adapter: Path, out: Path, names: dict[str, str], targets: Any) -> Path:
    """The adapter as PEFT wrote it before transformers 4.52."""
    shutil.copytree(adapter, out)

    def old(name: str) -> str:
        bare = name.removeprefix("base_model.model.")
        new = next((prefix for prefix in names if bare.startswith(prefix)), "")
        return "base_model.model." + names.get(new, "") + bare.removeprefix(new)

    edit_tensors(out, lambda tensors: {old(name): tensor for name, tensor in tensors.items()})
    edit_json(out / "adapter_config.json", lambda config: config | {"target_modules": targets})
    return out


@pytest.mark.parametrize("family", OLD_NAMES)
@pytest.mark.parametrize("vision", [False, True])
def test_an_adapter_with_old_names_changes_the_same(
    family: str, vision: bool, family_dir: FamilyDir, tmp_path: Path
) -> None:
    model, names = family_dir(family), OLD_NAMES[family]
    tower = next(name for name in ("model.visual.", "model.vision_tower.") if name in names)
    new = re.escape("model.language_model.") + r".*\.(q_proj|v_proj|up_proj)"
    old = re.escape(names["model.language_model."]) + r"layers.*\.(q_proj|v_proj|up_proj)"
    if vision:
        new += "|" + re.escape(tower) + r".*\.(qkv|fc1)"
        old += "|" + re.escape(names[tower]) + r".*\.(qkv|fc1)"
    adapter = add_adapter(model, tmp_path / "new", target_modules=new, rank_pattern={"up_proj": 2})
    expected = logits(load(model, adapter))
    assert abs(expected.logits - logits(load(model)).logits).max() > 1e-2
    renamed = old_adapter(adapter, tmp_path / "old", names, old)
    assert_equal_logits(logits(load(model, renamed)), expected, 1e-6)
    first = min(load_file(renamed / "adapter_model.safetensors"))
    edit_tensors(renamed, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != first})
    with pytest.raises(ModelError, match=r"the tensors of the adapter .* do not fit the model: 1 missing \(base_model"):
        load(model, renamed)


def test_an_adapter_with_old_names_by_suffix_and_layer(family_dir: FamilyDir, tmp_path: Path) -> None:
    model, names = family_dir("qwen2_vl"), OLD_NAMES["qwen2_vl"]
    targets = r"model\.language_model\.layers\.1\..*\.(q_proj|v_proj)"
    adapter = add_adapter(model, tmp_path / "new", target_modules=targets)
    renamed = old_adapter(adapter, tmp_path / "old", names, ["q_proj", "v_proj"])
    edit_json(renamed / "adapter_config.json", lambda config: config | {"layers_to_transform": [1]})
    assert_equal_logits(logits(load(model, renamed)), logits(load(model, adapter)), 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_that_does_not_fit_is_refused(family: str, family_dir: FamilyDir, tmp_path: Path) -> None:
    model = family_dir(family)
    adapter = add_adapter(model, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    last = {name: tensor for name, tensor in tensors.items() if ".layers.1." in name}
    edit_tensors(adapter, lambda _: {name: tensor for name, tensor in tensors.items() if name not in last})
    with pytest.raises(ModelError, match=rf"do not fit the model: {len(last)} missing \(.*\.layers\.1\..*\)\. Use"):
        load(model, adapter)
    surplus = {name.replace(".layers.1.", ".layers.2."): tensor.clone() for name, tensor in last.items()}
    edit_tensors(adapter, lambda _: tensors | surplus)
    with pytest.raises(ModelError, match=rf"do not fit the model: {len(last)} unexpected \(.*\.layers\.2\."):
        load(model, adapter)
    q = {name: tensor for name, tensor in tensors.items() if ".q_proj." in name}
    edit_tensors(adapter, lambda _: tensors | {name.replace("q_proj", "o_proj"): q[name].clone() for name in q})
    with pytest.raises(ModelError, match=rf"do not fit the model: {len(q)} unexpected \(.*\.o_proj\."):
        load(model, adapter)
    edit_tensors(adapter, lambda _: {name: tensor[..., :2].clone() for name, tensor in tensors.items()})
    with pytest.raises(ModelError, match=r"\d+ of another shape \(.*: \[\d+, 2\] instead of \[\d+, \d+\]"):
        load(model, adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"cannot load the adapter .*: it has no adapter_model\.safetensors"):
        load(model, adapter)


def test_modules_to_save_and_dora_load(family_dir: FamilyDir, tmp_path: Path) -> None:
    model = family_dir("qwen2_vl")
    plain = logits(load(model))
    for name, options in {"dora": {"use_dora": True}, "saved": {"modules_to_save": ["norm"]}}.items():
        adapter = add_adapter(model, tmp_path / name, **options)
        assert abs(logits(load(model, adapter)).logits - plain.logits).max() > 1e-2


def test_an_adapter_over_a_quantized_checkpoint_is_checked(family_dir: FamilyDir, tmp_path: Path) -> None:
    model = save_quantized(family_dir("qwen2_vl"), tmp_path / "quantized", "4bit")
    adapter = add_adapter(family_dir("qwen2_vl"), tmp_path / "adapter")
    assert abs(logits(load(model, adapter)).logits - logits(load(model)).logits).max() > 1e-2
    edit_tensors(adapter, lambda tensors: dict(list(tensors.items())[2:]))
    with pytest.raises(ModelError, match="2 missing"):
        load(model, adapter)


def test_a_note_says_that_an_adapter_changes_nothing(family_dir: FamilyDir, tmp_path: Path) -> None:
    model = family_dir("qwen2_vl")
    for zero in (True, False):
        adapter = add_adapter(model, tmp_path / f"zero_{zero}", init_lora_weights=zero)
        note = resolve_model(adapter).note
        assert note is not None
        assert ("changes nothing: all of its B matrices are zero" in note) == zero


def test_a_rater_without_its_adapter_is_refused(family_dir: FamilyDir, tmp_path: Path) -> None:
    (tmp_path / "rater.json").write_text(json.dumps({"backbone": str(family_dir("qwen2_vl"))}))
    with pytest.raises(ModelError, match=r"has a rater\.json for an adapter of the backbone .*, but no adapter: add"):
        resolve_model(tmp_path)
    (tmp_path / "rater.json").write_text("{}")
    with pytest.raises(ModelError, match=r"contains no weights .* and no adapter"):
        resolve_model(tmp_path)


# Merging


def write_rater(adapter: Path, model: Path) -> Path:
    (adapter / "rater.json").write_text(json.dumps({"backbone": str(model)}))
    return adapter


@pytest.mark.parametrize("family", OLD_NAMES)
def test_merging_an_adapter_with_old_names(family: str, family_dir: FamilyDir, tmp_path: Path) -> None:
    model, names = family_dir(family), OLD_NAMES[family]
    adapter = add_adapter(model, tmp_path / "new")
    targets = r"(?!.*vis).*\.(q_proj|v_proj|up_proj)"
    renamed = write_rater(old_adapter(adapter, tmp_path / "old", names, targets), model)
    merge(renamed, tmp_path / "merged")
    stored = {tensor.dtype for tensor in load_file(model / "model.safetensors").values()}
    if stored == {torch.float32}:
        assert_equal_logits(logits(load(tmp_path / "merged")), logits(load(model, adapter)), 1e-3)
    else:  # rounded to the dtype of the checkpoint
        (dtype,) = stored
        merged = load(model, adapter)
        merged.model = merged.model.merge_and_unload()
        for parameter in merged.model.parameters():
            parameter.data = parameter.data.to(dtype).float()
        assert_equal_logits(logits(load(tmp_path / "merged")), logits(merged), 1e-4)
    edit_tensors(renamed, lambda tensors: dict(list(tensors.items())[2:]))
    with pytest.raises(ModelError, match="2 missing"):
        merge(renamed, tmp_path / "never")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"])
def test_an_adapter_of_virtual_tokens_cannot_be_merged(kind: str, family_dir: FamilyDir, tmp_path: Path) -> None:
    import peft

    model = family_dir("qwen2_vl")
    base = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    sizes = {"num_layers": 2, "token_dim": 64, "num_attention_heads": 4}
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=2, **sizes)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    adapter = write_rater(tmp_path / "adapter", model)
    if kind == "PrefixTuningConfig":
        with pytest.raises(ModelError, match="is of the kind PREFIX_TUNING, which does not work with videos"):
            load(model, adapter)
    else:
        assert abs(logits(load(model, adapter)).logits - logits(load(model)).logits).max() > 1e-3
    with pytest.raises(ModelError, match=r"cannot be merged into weights|does not work with videos"):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    edit_tensors(adapter, lambda tensors: {f"{name}_": tensor for name, tensor in tensors.items()})
    if kind != "PrefixTuningConfig":
        with pytest.raises(ModelError, match=r"1 missing \(prompt_embeddings\); 1 unexpected \(prompt_embeddings_\)"):
            load(model, adapter)


def test_merging_into_quantized_weights_is_refused(family_dir: FamilyDir, tmp_path: Path) -> None:
    model = save_quantized(family_dir("qwen2_vl"), tmp_path / "quantized", "4bit")
    adapter = write_rater(add_adapter(family_dir("qwen2_vl"), tmp_path / "adapter"), model)
    with pytest.raises(ModelError, match="cannot be merged into quantized weights"):
        merge(adapter, tmp_path / "merged")


def test_merging_into_shared_embeddings_is_refused(family_dir: FamilyDir, tmp_path: Path) -> None:
    model = copy_of(family_dir("qwen2_vl"), tmp_path)
    edit_json(model / "config.json", lambda config: config | {"tie_word_embeddings": True})
    edit_tensors(model, lambda tensors: {name: value for name, value in tensors.items() if name != "lm_head.weight"})
    adapter = write_rater(add_adapter(model, tmp_path / "adapter", target_modules=["lm_head", "q_proj"]), model)
    with pytest.raises(ModelError, match="changes lm_head, whose weights are shared"):
        merge(adapter, tmp_path / "merged")


# Processor and files


def test_a_chat_template_in_tokenizer_config_is_used(family_dir: FamilyDir, tmp_path: Path) -> None:
    model = copy_of(family_dir("qwen2_vl"), tmp_path)
    template = AutoProcessor.from_pretrained(model).chat_template
    for file in ("chat_template.jinja", "chat_template.json"):
        (model / file).unlink(missing_ok=True)
    edit_json(model / "tokenizer_config.json", lambda config: config | {"chat_template": template})
    assert_equal_logits(logits(load(model)), logits(load(family_dir("qwen2_vl"))), 1e-6)
    edit_json(model / "tokenizer_config.json", lambda config: {k: v for k, v in config.items() if k != "chat_template"})
    with pytest.raises(ModelError, match="has no chat template: "):
        load(model)


def test_a_missing_tokenizer_is_named(family_dir: FamilyDir, tmp_path: Path) -> None:
    model = copy_of(family_dir("qwen2_vl"), tmp_path)
    for file in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        (model / file).unlink(missing_ok=True)
    with pytest.raises(ModelError, match=r"has no vocabulary: tokenizer\.json|cannot load the processor"):
        load(model)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "processor_config.json"])
def test_git_lfs_pointers_are_named(name: str, family_dir: FamilyDir, tmp_path: Path) -> None:
    model = copy_of(family_dir("qwen2_vl"), tmp_path)
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 12626904\n"
    (model / name).write_text(pointer)
    for attempt in (resolve_model, load):
        with pytest.raises(
            ModelError, match=rf"{re.escape(name)} is a Git LFS pointer, not the file itself: run `git lfs"
        ):
            attempt(model)
