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


def read_levels(
    logits: Floats, log_normalizer: float, scale: Scale, quality: float | None = None, weight: float = 0.0
) -> LevelReading:
    """Read one clip's level logits.

    If the quality was measured too, the distribution is a product of two experts (Hinton, 2002): that of the model, and
    a normal density around the measured quality.

    Args:
        logits: (K,) logits of the level words at the last position of the stem, worst level first.
        log_normalizer: logsumexp of the logits over the whole vocabulary at that position.
        scale: the declared scale.
        quality: measured, 0 to 1; None if it was not.
        weight: of the measurement: 1 / (2 variance of its density, in squared steps between levels); 0: ignore it.
    """
    logits = np.asarray(logits, dtype=np.float32)
    mass = min(1.0, float(np.exp(logits.max() + np.log(np.exp(logits - logits.max()).sum()) - log_normalizer)))
    if quality is not None:
        steps = np.arange(len(logits), dtype=np.float32) - np.float32(quality * (len(logits) - 1))
        logits = logits - np.float32(weight) * steps**2
    weights = np.exp(logits - logits.max())
    total = weights.sum()
    probabilities = weights / total
    anchors = scale.anchors(len(logits))
    score = min(max(float(probabilities @ anchors), scale.low), scale.high)  # float32 rounding reaches beyond the ends
    return LevelReading(
        probabilities=tuple(float(p) for p in probabilities),
        score=score,
        std=float(np.sqrt(probabilities @ (anchors - np.float32(score)) ** 2)),
        level=int(probabilities.argmax()),
        mass=mass,
    )


@dataclass(frozen=True)
class LevelLogits:
    """Logits of the level words at the end of the stem."""

    logits: NDArray[np.float32]
    """(K,) logits of the level words, worst first."""
    log_normalizer: float
    """logsumexp over the whole vocabulary."""
