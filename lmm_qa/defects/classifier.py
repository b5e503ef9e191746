"""Defect classifier: from the measured features of a clip (`lmm_qa.defects.features`) to log-odds of each defect.

Each defect has a forest of extremely randomised trees (Geurts, Ernst and Wehenkel, 2006), trained on degraded copies of
clips by `scripts/embedded/classifier.py`. The forests belong to the package, not to a model: they use nothing that a
model answered. The calibration of a rater says how much they count beside its answers
(`lmm_qa.defects.calibration.PlattScaling`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

FILE = Path(__file__).parent / "classifier.safetensors"

MIN_PROBABILITY = 0.002
"""Probabilities are clipped to this distance from 0 and 1: trees that all agree may all be wrong."""

TENSORS = {"feature": "sign", "limit": "limit", "child": "child", "root": "root", "defect": "defect"}
"""Field of `Forests` -> name of the array in the file, which is older than the field names."""


@dataclass(frozen=True)
class Forests:
    """The forests of all defects, as flat arrays of nodes.

    A node with `feature` >= 0 sends a clip to the node `child` if that feature is at most `limit`, else to `child` + 1.
    A node with `feature` -1 is a leaf; its `limit` is the share of training clips there that had the defect.
    """

    defects: tuple[str, ...]
    features: tuple[str, ...]
    feature: NDArray[np.int16]
    limit: NDArray[np.float32]
    child: NDArray[np.int32]
    root: NDArray[np.int32]
    """(trees,): the first node of each tree."""
    defect: NDArray[np.int16]
    """(trees,): the defect that each tree is about, as a position in `defects`."""

    def defect_log_odds(self, features: Mapping[str, float]) -> dict[str, float]:
        """Log-odds (natural logarithm) of each defect.

        Args:
            features: as returned by `lmm_qa.defects.features.measure`.

        Raises:
            KeyError: a feature that the trees use is missing.
        """
        values = np.array([features[name] for name in self.features], np.float32)
        node = self.root.copy()
        while (inner := self.feature[node] >= 0).any():
            above = values[self.feature[node]] > self.limit[node]
            node = np.where(inner, self.child[node] + above, node)
        probabilities = np.bincount(self.defect, self.limit[node]) / np.bincount(self.defect)
        return {name: float(odds) for name, odds in zip(self.defects, log_odds(probabilities), strict=True)}

    def save(self, file: Path, data: str) -> None:
        """Write the forests to a file. `data` describes what they were trained on."""
        from safetensors.numpy import save_file

        arrays = {stored: getattr(self, name) for name, stored in TENSORS.items()}
        names = {"defects": json.dumps(self.defects), "signs": json.dumps(self.features), "data": data}
        save_file(arrays, file, metadata=names)

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read a file that `save` wrote."""
        from safetensors import safe_open

        with safe_open(file, framework="numpy") as stored:
            names = stored.metadata()
            arrays: dict[str, Any] = {name: stored.get_tensor(tensor) for name, tensor in TENSORS.items()}
        return cls(tuple(json.loads(names["defects"])), tuple(json.loads(names["signs"])), **arrays)


def log_odds(probabilities: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Log-odds (natural logarithm) of probabilities of any shape, clipped, see `MIN_PROBABILITY`."""
    clipped = np.clip(probabilities, MIN_PROBABILITY, 1 - MIN_PROBABILITY)
    return np.asarray(np.log(clipped / (1 - clipped)))


def defect_log_odds(features: Mapping[str, float]) -> dict[str, float]:
    """Log-odds of each defect from the forests of the package; see `Forests.defect_log_odds`."""
    return _bundled_forests().defect_log_odds(features)


@cache
def _bundled_forests() -> Forests:
    return Forests.read(FILE)
