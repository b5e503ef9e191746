"""From the logits of the level words to a score. Pure arithmetic: no model, no files.

    p     = softmax(z[level 1], ..., z[level K])     float32
    score = sum_k p_k a_k                            a = linspace(low, high, K)
    std   = sqrt(sum_k p_k (a_k - score)^2)
    mass  = sum of the level words' probabilities in the softmax over the whole vocabulary

The level words are those of absolute category rating (ITU-R BT.500, P.910); reading a score from their
probabilities follows Q-Align (Wu et al., 2023, equation 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmm_qa.errors import ConfigError

LEVELS = ("bad", "poor", "fair", "good", "excellent")


"""The five levels of absolute category rating, worst first."""


Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Scale:
    """A declared rating scale: the MOS of the worst and of the best level."""

    low: float = 1.0
    high: float = 5.0

    def __post_init__(self) -> None:
        if not (np.isfinite(self.low) and np.isfinite(self.high) and self.low < self.high):
            raise ConfigError(f"a scale is two numbers, low < high; received [{self.low}, {self.high}]")

    def anchors(self, count: int = len(LEVELS)) -> Floats:
        """MOS of each level, (count,) float32, worst first."""
        return np.linspace(self.low, self.high, count, dtype=np.float32)


@dataclass(frozen=True)
class LevelReading:
    """Level probabilities and score of one clip."""

    probabilities: tuple[float, ...]
    """P(level), worst first; sums to 1."""
    score: float
    """Expected MOS, on the scale."""
    std: float
    """Standard deviation of the level distribution, in MOS units."""
    level: int
    """Index of the likeliest level."""
    mass: float
    """Share of the vocabulary's probability on the level words. Low: the model does not understand the prompt."""


def read_levels(logits: Floats, log_normalizer: float, scale: Scale) -> LevelReading:
    """Read one clip's level logits.

    Args:
        logits: (K,) logits of the level words at the last position of the stem, worst level first.
        log_normalizer: logsumexp of the logits over the whole vocabulary at that position.
        scale: the declared scale.
    """
    logits = np.asarray(logits, dtype=np.float32)
    top = logits.max()
    weights = np.exp(logits - top)
    total = weights.sum()
    probabilities = weights / total
    anchors = scale.anchors(len(logits))
    score = min(max(float(probabilities @ anchors), scale.low), scale.high)  # float32 rounding reaches beyond the ends
    return LevelReading(
        probabilities=tuple(float(p) for p in probabilities),
        score=score,
        std=float(np.sqrt(probabilities @ (anchors - np.float32(score)) ** 2)),
        level=int(probabilities.argmax()),
        mass=min(1.0, float(np.exp(top + np.log(total) - log_normalizer))),
    )


@dataclass(frozen=True)
class LevelLogits:
    """Logits of the level words at the end of the stem."""

    logits: NDArray[np.float32]
    """(K,) logits of the level words, worst first."""
    log_normalizer: float
    """logsumexp over the whole vocabulary."""
