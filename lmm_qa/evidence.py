"""What the signs of a clip (`lmm_qa.signs`) say of each defect: log-odds, from trees that were grown on damaged copies.

The trees are of the package, and not of a model: they know what the decoder measured, and nothing of what a model
answered. Each rater's calibration says how much this counts beside its own answers (`lmm_qa.defects.Logistic`).
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

FILE = Path(__file__).parent / "evidence.safetensors"

SUREST = 0.002
"""Share of a forest's votes that is never gone below, on either side: trees that all agree may all be wrong."""


@dataclass(frozen=True)
class Forests:
    """Trees of all defects, their nodes one after the other.

    A node with a `sign` of at least 0 sends a clip to its `child` where the sign is at most the `limit`, else to the
    node after that; one with a sign of -1 is a leaf, and its limit is the share of copies that had the defect.
    """

    defects: tuple[str, ...]
    signs: tuple[str, ...]
    sign: NDArray[np.int16]
    limit: NDArray[np.float32]
    child: NDArray[np.int32]
    root: NDArray[np.int32]
    """(trees,): where each begins."""
    defect: NDArray[np.int16]
    """(trees,): which defect it is about."""

    def weigh(self, signs: Mapping[str, float]) -> dict[str, float]:
        """Log-odds of each defect, natural logarithm.

        Args:
            signs: what `lmm_qa.signs.measure` gives.

        Raises:
            KeyError: one that the trees look at is not there.
        """
        values = np.array([signs[name] for name in self.signs], np.float32)
        node = self.root.copy()
        while (inner := self.sign[node] >= 0).any():
            beyond = values[self.sign[node]] > self.limit[node]
            node = np.where(inner, self.child[node] + beyond, node)
        votes = np.bincount(self.defect, self.limit[node]) / np.bincount(self.defect)
        return {name: float(odds) for name, odds in zip(self.defects, log_odds(votes), strict=True)}

    def save(self, file: Path, data: str) -> None:
        """Write all of it, and for people what it was grown on."""
        from safetensors.numpy import save_file

        arrays = {name: getattr(self, name) for name in ("sign", "limit", "child", "root", "defect")}
        names = {"defects": json.dumps(self.defects), "signs": json.dumps(self.signs), "data": data}
        save_file(arrays, file, metadata=names)

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read what `save` wrote."""
        from safetensors import safe_open

        with safe_open(file, framework="numpy") as stored:
            names = stored.metadata()
            arrays: dict[str, Any] = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        return cls(tuple(json.loads(names["defects"])), tuple(json.loads(names["signs"])), **arrays)


def log_odds(votes: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Natural logarithm of the odds by shares of a forest's votes, of any shape: see `SUREST`."""
    share = np.clip(votes, SUREST, 1 - SUREST)
    return np.asarray(np.log(share / (1 - share)))


def weigh(signs: Mapping[str, float]) -> dict[str, float]:
    """Log-odds of each defect, by the trees of the package. See `Forests.weigh`."""
    return _of_the_package().weigh(signs)


@cache
def _of_the_package() -> Forests:
    return Forests.read(FILE)
