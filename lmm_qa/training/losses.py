"""Target distributions over the level words for a MOS, and the losses. Operates on tensors only.

    targets         t_k >= 0, sum t_k = 1, sum t_k a_k = MOS (one_hot: nearly)
    cross_entropy   - sum_k t_k log p_k                               p = softmax over the K level words
    level_mass      - log(probability of all level words together, over the whole vocabulary)
    fidelity        1 - sqrt(P P*) - sqrt((1 - P)(1 - P*))            P = Phi((s_a - s_b) / sqrt(v_a + v_b)), pairs a, b
    plcc            1 - Pearson(s, MOS)
    consistency     ((s_a - s_b) / (a_K - a_1))^2 over pairs a, b that show the same content, such as a mirror image
    answers         - log p(token), p = softmax over the vocabulary, for each token of an answer

cross_entropy + level_mass is the cross-entropy over the whole vocabulary. Each loss is a scalar over the given clips:
pairs and correlations do not extend beyond them. Everything is computed in float32 or float64, under autocast too.
Training the level words so that their probabilities give the score follows Q-Align (Wu et al., 2023); soft targets from
the mean and standard deviation of the opinions, combined with fidelity, follow DeQA-Score (You et al., 2025).
"""

from __future__ import annotations

from typing import Literal, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

from lmm_qa.errors import UsageError

TargetKind = Literal["two_hot", "gaussian", "one_hot"]


VARIANCE_FLOOR = 1e-4
"""Added to the variance of the difference of two scores, in squared MOS units, so that P keeps a gradient if both have
no variance."""

CONSTANT = 1e-5
"""Values with a relative spread below this are constant up to float32 rounding."""


def level_targets(mos: Tensor, anchors: Tensor, kind: TargetKind = "two_hot", std: Tensor | None = None) -> Tensor:
    """The target distribution over the levels for each clip.

    two_hot   linear interpolation between the two levels around the MOS.
    gaussian  a normal density with the std of the opinions, sampled at the anchors, with its centre shifted so that the
              mean is the MOS. Never negative, and the mean is exact at the ends of the scale too. (DeQA-Score
              integrates over bins and corrects linearly.) A std below a tenth of the step between levels gives two_hot.
    one_hot   the nearest level; the worse one for a tie. (Q-Align cuts the scale into K equal parts; here the levels at
              the two ends get half a part.)

    Args:
        mos: (B,) on the scale of the anchors.
        anchors: (K,) MOS of the levels, ascending.
        kind: see above.
        std: (B,) standard deviation of the opinions about each clip, in MOS units, for `gaussian` only. Clips for which
            it is NaN, or all clips without it, get two_hot.

    Returns:
        (B, K) float32 on the device of `mos`; rows sum to 1.

    Raises:
        UsageError: a MOS is outside the scale or NaN, a std is negative or infinite.
    """
    labels, levels = (each.detach().float().double().cpu() for each in (mos, anchors))  # not every device has float64
    low, high = float(levels[0]), float(levels[-1])
    _refuse(
        ~((labels >= low) & (labels <= high)),
        labels,
        f"a MOS must be on the scale [{low:g}, {high:g}]",
        "declare the scale on which the opinions were given",
    )
    match kind:
        case "two_hot":
            targets = _two_hot(labels, levels)
        case "gaussian":
            targets = _two_hot(labels, levels)
            if std is not None:
                spread = std.detach().double().cpu()
                _refuse(
                    (spread < 0) | spread.isinf(),
                    spread,
                    "the standard deviation of opinions must be a number >= 0",
                    "NaN stands for unknown",
                )
                known = ~spread.isnan()
                targets[known] = _gaussian(labels[known], levels, spread[known])
        case "one_hot":
            middles = (levels[1:] + levels[:-1]) / 2
            targets = F.one_hot(torch.bucketize(labels, middles), len(levels))
        case _:
            assert_never(kind)
    return targets.float().to(mos.device)


def score_and_variance(logits: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Differentiable version of `lmm_qa.model.levels.read_levels`.

    Args:
        logits: (B, K) logits of the level words, worst level first.
        anchors: (K,) MOS of the levels.

    Returns:
        (B,) expected MOS, and (B,) variance of the level distribution in squared MOS units.
    """
    probabilities = _float32(logits).softmax(-1)
    anchors = anchors.to(probabilities)
    score = (probabilities * anchors).sum(-1)  # not a matrix product: autocast would round it to 16 bits
    variance = (probabilities * (anchors - score[:, None]).square()).sum(-1)
    return score, variance


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of (B, K) level logits with (B, K) targets; its minimum is the entropy of the targets."""
    logits = _float32(logits)
    return F.cross_entropy(logits, targets.to(logits))


def level_mass(logits: Tensor, log_normalizer: Tensor) -> Tensor:
    """Mean of -log(probability of all level words together), >= 0.

    Args:
        logits: (B, K) logits of the level words.
        log_normalizer: (B,) float32 logsumexp of the logits over the whole vocabulary.
    """
    return (_float32(log_normalizer) - _float32(logits).logsumexp(-1)).clamp(min=0).mean()


def fidelity(score: Tensor, variance: Tensor, mos: Tensor, std: Tensor | None = None) -> Tensor:
    """The mean pairwise ranking error over all B (B - 1) / 2 pairs, in [0, 1].

    P is the model's probability that clip a is better than clip b by Thurstone's law of comparative judgment; P* is the
    one of the opinions: by the same law from their MOS and std if both stds are known, else 1, 1/2 (equal MOS) or 0.
    The loss is FRank's (Tsai et al., 2007); UNIQUE (Zhang et al., 2021) introduced it to quality assessment.

    It is computed as half the squared distance between (sqrt P, sqrt(1 - P)) and (sqrt P*, sqrt(1 - P*)), which is the
    same with less rounding error. Gradients are finite everywhere, but vanish for a pair about which the model is
    certain and wrong: such a pair needs `cross_entropy`.

    Args:
        score: (B,) in MOS units.
        variance: (B,) of the scores, >= 0, in squared MOS units.
        mos: (B,).
        std: (B,) standard deviation of the opinions about each clip, in MOS units; NaN if unknown.

    Returns:
        A scalar; 0 with zero gradients for a single clip.
    """
    score, variance = _float32(score), _float32(variance)
    mos = mos.to(score)
    a, b = torch.triu_indices(len(score), len(score), offset=1, device=score.device)
    order = (mos[a] - mos[b]).sign()
    reference = torch.stack([1 + order, 1 - order]).div(2).sqrt()
    if std is not None:
        spread = std.to(score).square()
        judged = _root_probabilities(mos[a] - mos[b], spread[a] + spread[b])
        reference = torch.where(judged.isnan(), reference, judged)
    guess = _root_probabilities(score[a] - score[b], variance[a] + variance[b])
    return (guess - reference).square().sum() / 2 / max(len(a), 1)


def plcc(score: Tensor, mos: Tensor) -> Tensor:
    """1 - Pearson correlation of (B,) scores with (B,) MOS, in [0, 2].

    If it is undefined (one clip, constant scores or constant MOS), 0 with zero gradients.
    """
    score = _float32(score)
    mos = mos.to(score)
    x, y = score - score.mean(), mos - mos.mean()
    varied = (x.norm() > CONSTANT * score.norm()) & (y.norm() > CONSTANT * mos.norm())
    loss: Tensor = (1 - F.cosine_similarity(x, y, dim=0)) * varied
    return loss


def consistency(score: Tensor, contents: Tensor, anchors: Tensor) -> Tensor:
    """Mean squared difference of the scores of clips with the same content, relative to the length of the scale.

    Args:
        score: (B,) in MOS units.
        contents: (B,) int64: equal numbers for equal content, -1 for clips that are alone.
        anchors: (K,) MOS of the levels.

    Returns:
        A scalar; 0 with zero gradients if no two clips have the same content.
    """
    score = _float32(score)
    a, b = torch.triu_indices(len(score), len(score), offset=1, device=score.device)
    same = (contents[a] == contents[b]) & (contents[a] >= 0)
    difference = (score[a] - score[b]) / (anchors.max() - anchors.min())
    return (difference.square() * same).sum() / same.sum().clamp(min=1)


def answers(logits: Tensor, target_ids: Tensor, weights: Tensor, tasks: Tensor, count: int) -> Tensor:
    """Cross-entropy of answers in words, summed by task.

    Args:
        logits: (n, vocabulary), one row for each token of each answer.
        target_ids: (n,) expected token ids.
        weights: (n,) of the tokens; those of one answer sum to 1.
        tasks: (n,) task index of each token, below `count`.

    Returns:
        (count,) sums; 0 for a task that does not occur.
    """
    each = F.cross_entropy(_float32(logits), target_ids, reduction="none") * weights
    return each.new_zeros(count).index_add(0, tasks, each)


def _float32(tensor: Tensor) -> Tensor:
    """As float32; float64 stays float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _two_hot(mos: Tensor, levels: Tensor) -> Tensor:
    below = torch.bucketize(mos, levels[1:-1])
    share = ((mos - levels[below]) / (levels[below + 1] - levels[below]))[:, None]
    return F.one_hot(below, len(levels)) * (1 - share) + F.one_hot(below + 1, len(levels)) * share


def _gaussian(mos: Tensor, levels: Tensor, std: Tensor) -> Tensor:
    """Shifting the centre of a normal density multiplies it by exp(tilt * level): bisection finds the tilt."""
    step = levels.diff().min()
    goal, levels = (mos - levels[0]) / step, (levels - levels[0]) / step
    variance = (std / step).clamp(min=0.1).square()[:, None]
    upper = levels[-1] / variance[:, 0] + 100  # puts all but exp(-100) on the last level
    lower = -upper
    for _ in range(80):
        tilt = (lower + upper) / 2
        targets = (tilt[:, None] * levels - levels.square() / (2 * variance)).softmax(-1)
        short = (targets * levels).sum(-1) < goal
        lower, upper = torch.where(short, tilt, lower), torch.where(short, upper, tilt)
    return targets


def _root_probabilities(difference: Tensor, variance: Tensor) -> Tensor:
    """(2, pairs): square roots of the probabilities that the first and the second clip is the better one."""
    z = (difference / (variance + VARIANCE_FLOOR).sqrt()).clamp(-30, 30)  # beyond, torch's d log P is infinite
    root: Tensor = torch.special.log_ndtr(torch.stack([z, -z])).div(2).exp()
    return root


def _refuse(bad: Tensor, values: Tensor, what: str, advice: str) -> None:
    if bad.any():
        index = int(bad.nonzero()[0])
        raise UsageError(f"{what}; received {values[index]:g} for clip {index + 1} of {len(values)}: {advice}")
