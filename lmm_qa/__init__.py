"""A video large multimodal model as a quality rater for talking-head video.

    from lmm_qa import Rater
    Rater.from_pretrained().rate("clip.mp4").score

Public names are imported on first use, so that `import lmm_qa` loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmm_qa.config import Sampling, View
    from lmm_qa.errors import ClipError, LmmQaError
    from lmm_qa.model.prompt import Prompt, load_prompt
    from lmm_qa.rater import Rater
    from lmm_qa.ratings.io import read_ratings
    from lmm_qa.ratings.rows import Details, Failure, Rating

_MODULES = {
    "ClipError": "errors",
    "Details": "ratings.rows",
    "Failure": "ratings.rows",
    "LmmQaError": "errors",
    "Prompt": "model.prompt",
    "Rater": "rater",
    "Rating": "ratings.rows",
    "Sampling": "config",
    "View": "config",
    "load_prompt": "model.prompt",
    "read_ratings": "ratings.io",
}

__all__ = [
    "ClipError",
    "Details",
    "Failure",
    "LmmQaError",
    "Prompt",
    "Rater",
    "Rating",
    "Sampling",
    "View",
    "load_prompt",
    "read_ratings",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lmm_qa' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lmm_qa.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
