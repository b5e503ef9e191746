"""What the features of a clip (`lmm_qa.defects.features`) say of each defect: log-odds, from trees that were grown on damaged copies.

The trees are of the package, and not of a model: they know what the decoder measured, and nothing of what a model
answered. Each rater's calibration says how much this counts beside its own answers (`lmm_qa.defects.calibration.Logistic`).
`scripts/embedded_evidence.py` grows them: extremely randomised trees (Geurts, Ernst and Wehenkel, 2006), a forest a
defect.
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


MIN_VOTE_SHARE = 0.002


"""Share of a forest's votes that is never gone below, on either side: trees that all agree may all be wrong."""


TENSORS = {"feature": "sign", "limit": "limit", "child": "child", "root": "root", "defect": "defect"}
"""Names of the arrays in the file, which is older than the names here."""


@dataclass(frozen=True)
class Forests:
    """Trees of all defects, their nodes one after the other.

    A node with a `feature` of at least 0 sends a clip to its `child` where the feature is at most the `limit`, else to the
    node after that; one with a feature of -1 is a leaf, and its limit is the share of copies that had the defect.
    """

    defects: tuple[str, ...]
    features: tuple[str, ...]
    feature: NDArray[np.int16]
    limit: NDArray[np.float32]
    child: NDArray[np.int32]
    root: NDArray[np.int32]
    """(trees,): where each begins."""
    defect: NDArray[np.int16]
    """(trees,): which defect it is about."""

    def defect_log_odds(self, features: Mapping[str, float]) -> dict[str, float]:
        """Log-odds of each defect, natural logarithm.

        Args:
            features: what `lmm_qa.defects.features.measure` gives.

        Raises:
            KeyError: one that the trees look at is not there.
        """
        values = np.array([features[name] for name in self.features], np.float32)
        node = self.root.copy()
        while (inner := self.feature[node] >= 0).any():
            beyond = values[self.feature[node]] > self.limit[node]
            node = np.where(inner, self.child[node] + beyond, node)
        votes = np.bincount(self.defect, self.limit[node]) / np.bincount(self.defect)
        return {name: float(odds) for name, odds in zip(self.defects, log_odds(votes), strict=True)}

    def save(self, file: Path, data: str) -> None:
        """Write all of it, and for people what it was grown on."""
        from safetensors.numpy import save_file

        arrays = {stored: getattr(self, name) for name, stored in TENSORS.items()}
        names = {"defects": json.dumps(self.defects), "signs": json.dumps(self.features), "data": data}
        save_file(arrays, file, metadata=names)

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read what `save` wrote."""
        from safetensors import safe_open

        with safe_open(file, framework="numpy") as stored:
            names = stored.metadata()
            arrays: dict[str, Any] = {name: stored.get_tensor(tensor) for name, tensor in TENSORS.items()}
        return cls(tuple(json.loads(names["defects"])), tuple(json.loads(names["signs"])), **arrays)


def log_odds(votes: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Natural logarithm of the odds by shares of a forest's votes, of any shape: see `MIN_VOTE_SHARE`."""
    share = np.clip(votes, MIN_VOTE_SHARE, 1 - MIN_VOTE_SHARE)
    return np.asarray(np.log(share / (1 - share)))


def defect_log_odds(features: Mapping[str, float]) -> dict[str, float]:
    """Log-odds of each defect, by the trees of the package. See `Forests.defect_log_odds`."""
    return _of_the_package().defect_log_odds(features)


@cache
def _of_the_package() -> Forests:
    return Forests.read(FILE)
