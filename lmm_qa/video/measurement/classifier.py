"""Defect classifier: from the measured features of a clip (`.features`) to its defects and quality.

Each defect has a forest of extremely randomised trees (Geurts, Ernst and Wehenkel, 2006), which predicts whether it is
present and how strong it is; another forest predicts the quality. They were trained on degraded copies of clips by
`scripts/embedded/classifier.py`. The forests belong to the package, not to a model: they use nothing that a model
answered. The calibration of a rater says how much they count beside its answers
(`lmm_qa.defects.calibration.PlattScaling`); a prompt can contain what they predict (`.evidence`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

FILE = Path(__file__).parent / "classifier.safetensors"

VERSION = 1
"""Raise it when the measured features change their values."""

MIN_PROBABILITY = 0.002
"""Probabilities are clipped to this distance from 0 and 1: trees that all agree may all be wrong."""

QUALITY = "quality"
"""Name of the forest that predicts the quality."""

ARRAYS = ("feature", "limit", "child", "severity", "root", "target")


@dataclass(frozen=True)
class Measurement:
    """What the forests predict for a clip."""

    log_odds: dict[str, float]
    """Log-odds (natural logarithm) of the presence of each defect."""
    severity: dict[str, float]
    """Of each defect: 0 (absent) to 1, the strength in `lmm_qa.degrade` at which a copy would look like this clip."""
    quality: float
    """0 (worst) to 1."""

    @property
    def numbers(self) -> dict[str, float]:
        """Quality and severities, by name."""
        return {QUALITY: self.quality, **self.severity}


@dataclass(frozen=True)
class Forests:
    """The forests of all defects and of the quality, as flat arrays of nodes.

    A node with `feature` >= 0 sends a clip to the node `child` if that feature is at most `limit`, else to `child` + 1.
    A node with `feature` -1 is a leaf. Its `limit` is the share of training clips there that had the defect, and its
    `severity` their mean strength; in the forest `QUALITY`, `limit` is their mean quality.
    """

    targets: tuple[str, ...]
    """Names of defects, and `QUALITY`."""
    features: tuple[str, ...]
    feature: NDArray[np.int16]
    limit: NDArray[np.float32]
    child: NDArray[np.int32]
    severity: NDArray[np.float16]
    """(nodes,): 0 to 1; 0 in inner nodes, and in the forest `QUALITY`."""
    root: NDArray[np.int32]
    """(trees,): the first node of each tree."""
    target: NDArray[np.int16]
    """(trees,): what each tree predicts, as a position in `targets`."""

    def predict(self, features: Mapping[str, float]) -> Measurement:
        """Predict the defects and the quality of a clip.

        Args:
            features: as returned by `lmm_qa.video.measurement.features.measure`.

        Raises:
            KeyError: a feature that the trees use is missing.
        """
        values = np.array([features[name] for name in self.features], np.float32)
        node = self.root.copy()
        while (inner := self.feature[node] >= 0).any():
            above = values[self.feature[node]] > self.limit[node]
            node = np.where(inner, self.child[node] + above, node)
        trees = np.bincount(self.target)
        limits = dict(zip(self.targets, np.bincount(self.target, self.limit[node]) / trees, strict=True))
        severities = dict(zip(self.targets, np.bincount(self.target, self.severity[node]) / trees, strict=True))
        quality = float(limits.pop(QUALITY))
        del severities[QUALITY]
        odds = log_odds(np.array([*limits.values()]))
        return Measurement(
            {name: float(value) for name, value in zip(limits, odds, strict=True)},
            {name: float(value) for name, value in severities.items()},
            quality,
        )

    def save(self, file: Path, data: str) -> None:
        """Write the forests to a file. `data` describes what they were trained on."""
        from safetensors.numpy import save_file

        arrays = {name: getattr(self, name) for name in ARRAYS}
        names = {"targets": json.dumps(self.targets), "features": json.dumps(self.features), "data": data}
        save_file(arrays, file, metadata=names)

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read a file that `save` wrote."""
        from safetensors import safe_open

        with safe_open(file, framework="numpy") as stored:
            names = stored.metadata()
            arrays: dict[str, Any] = {name: stored.get_tensor(name) for name in ARRAYS}
        return cls(tuple(json.loads(names["targets"])), tuple(json.loads(names["features"])), **arrays)


def log_odds(probabilities: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Log-odds (natural logarithm) of probabilities of any shape, clipped, see `MIN_PROBABILITY`."""
    clipped = np.clip(probabilities, MIN_PROBABILITY, 1 - MIN_PROBABILITY)
    return np.asarray(np.log(clipped / (1 - clipped)))


def measurement_id() -> str:
    """Short hash of everything that determines what is measured of a clip."""
    return _measurement_id(VERSION, FILE)


@cache
def _measurement_id(version: int, file: Path) -> str:
    return hashlib.sha256(f"{version} ".encode() + file.read_bytes()).hexdigest()[:16]


def evidence_names() -> tuple[str, ...]:
    """Names in `Measurement.numbers`, in their order."""
    return QUALITY, *(name for name in _forests(FILE).targets if name != QUALITY)


def predict(features: Mapping[str, float]) -> Measurement:
    """What the forests of the package predict; see `Forests.predict`."""
    return _forests(FILE).predict(features)


@cache
def _forests(file: Path) -> Forests:
    return Forests.read(file)
