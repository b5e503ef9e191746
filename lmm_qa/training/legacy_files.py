"""Write the files of a model directory in the older forms too, for programs that read transformers 4.

transformers 5 has new names for some settings and files. It reads the older ones as well, so both can be there. Tried
with transformers 4.52 and 4.57.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROPE_NAMES = {"rope_theta", "partial_rotary_factor"}
"""Settings inside `rope_parameters` that transformers 4 has beside `rope_scaling`."""

COMMON_TOKENS = {f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
"""Keys of tokenizer_config.json that every tokenizer can have; others are of one kind of model."""


def write_legacy_files(folder: Path) -> None:
    """Add what is missing for transformers 4, and for what is built on it (vLLM).

    config.json: `rope_theta` and `rope_scaling` beside `rope_parameters`, `torch_dtype` beside `dtype`. The settings of
    the language model stay in `text_config` if they are there, which needs transformers 4.52.
    preprocessor_config.json and video_preprocessor_config.json in place of parts of processor_config.json, which
    transformers 4.52 refuses; chat_template.json beside chat_template.jinja.
    tokenizer_config.json: `additional_special_tokens` in place of a list `extra_special_tokens`, which becomes a
    mapping of the tokens that only some models have.
    """
    _edit(folder / "config.json", _older_config)
    _edit(folder / "tokenizer_config.json", _older_tokenizer)
    _write_preprocessors(folder)
    template, older = folder / "chat_template.jinja", folder / "chat_template.json"
    if template.is_file() and not older.exists():
        _write(older, {"chat_template": template.read_text(encoding="utf-8")})


def _older_config(config: dict[str, Any]) -> dict[str, Any]:
    found = {"torch_dtype": config["dtype"], **config} if isinstance(config.get("dtype"), str) else dict(config)
    if isinstance(config.get("text_config"), dict):
        found["text_config"] = _older_config(config["text_config"])
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_type" in rope:  # not one for each kind of layer
        settings = {name: value for name, value in rope.items() if name not in ROPE_NAMES}
        if "mrope_section" in settings and "mrope_interleaved" not in settings:
            settings = {"type": "mrope", **settings}  # as Qwen2-VL and Qwen2.5-VL were published
        older = {name: rope[name] for name in ROPE_NAMES if name in rope}
        if settings != {"rope_type": "default"}:
            older["rope_scaling"] = settings
        found = {**older, **found}
    return found


def _older_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    found = dict(config)
    if isinstance(found.get("extra_special_tokens"), list):
        found["additional_special_tokens"] = found.pop("extra_special_tokens")
    named = {key: value for key, value in config.items() if key.endswith("_token") and isinstance(value, str)}
    if names := named.keys() - COMMON_TOKENS:
        found.setdefault("extra_special_tokens", {name: named[name] for name in sorted(names)})
    if found.get("tokenizer_class") == "TokenizersBackend":
        found["tokenizer_class"] = "PreTrainedTokenizerFast"
    return found


def _write_preprocessors(folder: Path) -> None:
    file = folder / "processor_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    names = {"image_processor": "preprocessor_config.json", "video_processor": "video_preprocessor_config.json"}
    parts = {part: name for part, name in names.items() if isinstance(config.get(part), dict)}
    for part, name in parts.items():
        if not (folder / name).exists():
            _write(folder / name, {**config[part], "processor_class": config.get("processor_class")})
    if parts:
        _write(file, {key: value for key, value in config.items() if key not in parts})


def _edit(file: Path, change: Any) -> None:
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        after = change(before)
        if after != before:
            _write(file, after)


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
