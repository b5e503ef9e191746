"""Command line options that several commands share, each declared once."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

DEFAULT_WORKERS = min(4, os.cpu_count() or 1)


class Quantization(StrEnum):
    FOUR = "4bit"
    EIGHT = "8bit"
    NONE = "none"


class Dtype(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Engine(StrEnum):
    LOCAL = "local"
    RAY = "ray"


class AnswerSource(StrEnum):
    ADAPTER = "adapter"
    BASE = "base"


class CalibrationKind(StrEnum):
    LINEAR = "linear"
    LOGISTIC4 = "logistic4"
    ISOTONIC = "isotonic"


Inputs = Annotated[
    list[str],
    typer.Argument(
        help="Video files, folders (searched recursively), globs, or lists of clips: .csv .tsv .jsonl .parquet with a "
        "column clip, video or path; .txt with one path per line.",
        show_default=False,
    ),
]

Model = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        help="Name of a published rater (see lmm-qa raters), rater directory, PEFT adapter, model directory, id on the "
        "Hugging Face hub, or the address of a vLLM server, such as http://127.0.0.1:8000/v1 (API key: environment "
        "variable LMM_QA_API_KEY).",
        show_default="the embedded model",
    ),
]

AnswersFrom = Annotated[
    AnswerSource,
    typer.Option(
        help="Which model answers the questions about defects and writes the explanation: the fine-tuned one (adapter) "
        "or the one it was tuned from (base). Fine-tuning on scores alone can degrade both. The score always comes "
        "from the adapter."
    ),
]

BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Maximum number of clips in one forward pass. A GPU without enough memory takes fewer.",
        show_default="64 on a GPU, and at most 16,384 tokens; 1 on a CPU",
    ),
]

CORES = "the number of cores, at most 4"

Workers = Annotated[int, typer.Option(min=1, help="Number of decoding processes.", show_default=CORES)]

Timeout = Annotated[float, typer.Option(min=0.1, help="Time limit for decoding one clip, in seconds.")]

Root = Annotated[
    Path | None, typer.Option(help="Folder that paths in lists are relative to.", show_default="the list's folder")
]

EmbedClips = Annotated[
    bool,
    typer.Option(
        "--embed-clips",
        help="Put the clips themselves into the page, up to 50 MB in all. Without it, and beyond that, the page plays "
        "the clips that lie in its own folder or below, and shows frames of the others.",
    ),
]

ClipColumn = Annotated[
    str | None,
    typer.Option(help="Column with the clip names in the labels.", show_default="clip, video, path, file or name"),
]

ScoreColumn = Annotated[
    str | None, typer.Option(help="Column with the MOS in the labels.", show_default="mos or score")
]

MODEL_PANEL = "Model and settings"


def rater_options(
    served_model: Annotated[
        str | None,
        typer.Option(
            help="Which model of the server, if --model is an address.", show_default="the only one that it serves"
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="Name of a prompt (talking_head, talking_head_measured, talking_head_measured_sync, "
            "talking_head_sound, talking_head_views, qalign, qrealign) or a YAML file.",
            show_default="the model's",
        ),
    ] = None,
    scale: Annotated[
        tuple[float, float] | None,
        typer.Option(help="MOS of the worst and of the best level, e.g. --scale 0 5.", show_default="the model's"),
    ] = None,
    sampling: Annotated[
        str | None,
        typer.Option(
            help="Which frames the model sees: uniform:8 | linspace:8 (with the first and the last one) | "
            "pairs:12 (6 pairs of nearby frames) | fps:2 (at most 32 frames; fps:2:64 for another limit).",
            show_default="the model's",
        ),
    ] = None,
    view: Annotated[
        list[str] | None,
        typer.Option(
            help="How frames are shown to the model: whole:448 (shrunk to the area of 448 x 448) | fit:448 (long side "
            "at most 448) | crop:336 (window at native resolution) | face:224 (a square around the face, resized). "
            "Repeat it for several views.",
            show_default="the model's",
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a model on the hub.", show_default=False)
    ] = None,
    quantization: Annotated[
        Quantization | None,
        typer.Option(
            help="Load weights in 4 or 8 bits: saves memory. none: unquantized, also for a rater that was tuned so.",
            show_default="as the rater was tuned",
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cuda, cuda:1, mps or cpu.", show_default="the best one available")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Number format.", show_default="depends on device and size")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with a model from the hub.")
    ] = False,
) -> dict[str, Any]:
    """The `lmm_qa.model.rater_plan.RaterOptions` of a command line. Raises ConfigError if a value is invalid."""
    from lmm_qa.config import Sampling, View

    return {
        "served_model": served_model,
        "prompt": prompt,
        "scale": scale,
        "sampling": Sampling.from_text(sampling) if sampling else None,
        "views": [View.from_text(text) for text in view] if view else None,
        "revision": revision,
        "quantization": quantization.value if quantization else None,
        "device": device,
        "dtype": dtype.value if dtype else None,
        "trust_remote_code": trust_remote_code,
    }


def with_rater_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `rater_options`; it receives their values as its parameter `rater_options`."""
    shared = inspect.signature(rater_options, eval_str=True).parameters
    own = inspect.signature(command, eval_str=True).parameters

    @wraps(command)
    def wrapped(**values: Any) -> None:
        options = rater_options(**{name: values.pop(name) for name in shared})
        command(**values, rater_options=options)

    for parameter in shared.values():
        parameter.annotation.__metadata__[0].rich_help_panel = MODEL_PANEL
    parameters = [*(parameter for name, parameter in own.items() if name != "rater_options"), *shared.values()]
    wrapped.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    )
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped
