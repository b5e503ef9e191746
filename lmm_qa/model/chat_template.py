"""Render chat templates, which are programs of the authors of models: transformers runs them in a sandbox of jinja2.

The sandbox denies access to Python's internals and to files, but limits neither time nor memory. So a template that is
not the well-known one of Qwen2-VL is first rendered in a process with limits.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from lmm_qa.errors import ModelError, first_line

CPU_SECONDS = 10
MEMORY = 2 << 30
"""Bytes of address space."""
MAX_CHARACTERS = 1_000_000
"""Longest text that a template may give; the context of models is shorter."""

RENDER = """
import json, math, sys, time
from transformers.utils.chat_template_utils import render_jinja_template

seconds, memory, characters = map(int, sys.argv[1:])
arguments = json.load(sys.stdin)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time()) + seconds,) * 2)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
except (ImportError, ValueError, OSError):  # Windows has no limits, macOS none on memory
    pass
try:
    (text,), _ = render_jinja_template(**arguments)
except MemoryError:
    sys.exit(f"it needs more than {memory >> 20} MB")
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
if len(text) > characters:
    sys.exit(f"its text has {len(text):,} characters, more than {characters:,}")
"""
"""Program of the process with limits. It imports neither torch nor the model."""

_accepted: set[str] = set()
"""Templates that were accepted, each with everything else that its text depends on, as JSON."""

MESSAGES = [
    {"role": "system", "content": [{"type": "text", "text": "Be exact."}]},
    {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "How good is it?"}]},
]


def check_chat_template(processor: Any, model: str) -> None:
    """Render the chat template of a processor once, in a process with limits on time, memory and length.

    A template that was accepted is not rendered again in this process.

    Raises:
        ModelError: it exceeds a limit, or cannot be rendered.
    """
    template = _template(processor)
    if template == _known_template():
        return
    arguments = json.dumps(
        {
            "conversations": [MESSAGES],
            "chat_template": template,
            "add_generation_prompt": True,
            **getattr(processor.tokenizer, "special_tokens_map", {}),
            **_no_thinking(processor),
        },
        default=str,
    )
    if arguments in _accepted:
        return
    try:
        done = subprocess.run(
            [sys.executable, "-c", RENDER, *map(str, (CPU_SECONDS, MEMORY, MAX_CHARACTERS))],
            input=arguments,
            capture_output=True,
            text=True,
            timeout=60 + CPU_SECONDS,
        )
        problem = (done.stderr.strip().splitlines() or [f"it takes more than {CPU_SECONDS} s"])[-1]
    except subprocess.TimeoutExpired:
        problem = f"it takes more than {CPU_SECONDS} s"
    else:
        if done.returncode == 0:
            _accepted.add(arguments)
            return
    raise ModelError(f"the chat template of {model!r} cannot be used: {problem[:300]}")


def render_chat(processor: Any, messages: list[dict[str, Any]]) -> str:
    """The chat up to the beginning of the assistant's answer, which is after its thoughts for a model that thinks.

    Raises:
        ModelError: the template fails, or its text is too long.
    """
    options = {"tokenize": False, "add_generation_prompt": True, **_no_thinking(processor)}
    try:
        text = str(processor.apply_chat_template(messages, **options))
    except Exception as error:  # whatever a template raises
        raise ModelError(f"the chat template of the model cannot be rendered: {first_line(error)}") from error
    if len(text) > MAX_CHARACTERS:
        raise ModelError(f"the chat template of the model gives {len(text):,} characters, more than {MAX_CHARACTERS:,}")
    return text


def _template(processor: Any) -> str | None:
    template = processor.chat_template
    return template.get("default") if isinstance(template, dict) else template


def _no_thinking(processor: Any) -> dict[str, bool]:
    """The variable by which the templates of Qwen3.5 leave out the thoughts, which most of its sizes write by default.

    transformers warns about variables that a template does not use.
    """
    return {"enable_thinking": False} if "enable_thinking" in (_template(processor) or "") else {}


@cache
def _known_template() -> str:
    return (Path(__file__).parent / "embedded" / "base" / "chat_template.jinja").read_text(encoding="utf-8")
