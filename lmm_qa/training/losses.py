"""From a MOS to what the level words should say, and how far a model is from it. Knows tensors: no model, no files.

    targets         t_k >= 0, sum t_k = 1, sum t_k a_k = MOS (one_hot: nearly)
    cross_entropy   - sum_k t_k log p_k                               p = softmax over the K level words
    level_mass      - log(share of the whole vocabulary's probability on the level words)
    fidelity        1 - sqrt(P P*) - sqrt((1 - P)(1 - P*))            P = Phi((s_a - s_b) / sqrt(v_a + v_b)), pairs a, b
    plcc            1 - Pearson(s, MOS)
    answers         - log p(token), p = softmax over the vocabulary, for each token of an answer in words

cross_entropy + level_mass is the cross-entropy over the whole vocabulary; so is that of a closed question, of which it
keeps the probability on the two words that are read. Each loss is a scalar and speaks of the clips
that it is given: pairs and correlations do not reach beyond them. All is computed in float32 at least, under autocast
too. Training the level words so that their probabilities give the score follows Q-Align (Wu et al., 2023); soft targets
from the opinions' mean and spread, with fidelity beside them, follow DeQA-Score (You et al., 2025).
"""

from __future__ import annotations

from typing import Literal, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

from lmm_qa.errors import UsageError

TargetKind = Literal["two_hot", "gaussian", "one_hot"]


VARIANCE_FLOOR = 1e-4


"""Added to the variance of each difference of two clips, in squared MOS units: two sure readings leave P a gradient."""


CONSTANT = 1e-5


"""Values whose spread is below this share of their size are constant but for the rounding of float32."""


def level_targets(mos: Tensor, anchors: Tensor, kind: TargetKind = "two_hot", std: Tensor | None = None) -> Tensor:
    """The distribution over the levels that the model should give each clip.

    two_hot   the two levels around the MOS share it by linear interpolation.
    gaussian  a normal density of the opinions' std, taken at the anchors, its centre moved until the mean is the MOS.
              Never negative, and the mean is right at the ends of the scale too. (DeQA-Score integrates over bins and
              corrects linearly.) A std below a tenth of the step between levels gives two_hot.
    one_hot   the nearest level; half-way the worse one. (Q-Align cuts the scale into K equal parts instead; here the
              levels at the two ends get half a part.)

    Args:
        mos: (B,) on the scale of the anchors.
        anchors: (K,) MOS of the levels, worst first, rising.
        kind: see above.
        std: (B,) standard deviation of the opinions about each clip, in MOS units, read by `gaussian` alone. A clip
            where it is NaN, or all clips without it, get two_hot.

    Returns:
        (B, K) float32 on the device of `mos`; rows sum to 1.

    Raises:
        UsageError: a MOS is off the scale or not a number, a std is negative or infinite.
    """
    labels, levels = (each.detach().float().double().cpu() for each in (mos, anchors))  # not every device has float64
    low, high = float(levels[0]), float(levels[-1])
    _refuse(
        ~((labels >= low) & (labels <= high)),
        labels,
        f"a MOS must lie on the scale [{low:g}, {high:g}]",
        "declare the scale that the opinions were given on",
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


def read(logits: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Score and spread of each clip, with their gradients; the arithmetic of `lmm_qa.model.levels.read_levels`.

    Args:
        logits: (B, K) logits of the level words, worst level first.
        anchors: (K,) MOS of the levels.

    Returns:
        (B,) expected MOS, and (B,) variance of the level distribution in squared MOS units.
    """
    probabilities = _wide(logits).softmax(-1)
    anchors = anchors.to(probabilities)
    score = (probabilities * anchors).sum(-1)  # not a matrix product: autocast would round it to 16 bits
    variance = (probabilities * (anchors - score[:, None]).square()).sum(-1)
    return score, variance


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Of (B, K) level logits with (B, K) targets; at its least, the entropy of the targets, where p = targets."""
    logits = _wide(logits)
    return F.cross_entropy(logits, targets.to(logits))


def level_mass(logits: Tensor, log_normalizer: Tensor) -> Tensor:
    """Mean of -log(share of the vocabulary's probability that the level words hold), >= 0.

    Args:
        logits: (B, K) logits of the level words.
        log_normalizer: (B,) logsumexp of the logits over the whole vocabulary, taken in float32.
    """
    return (_wide(log_normalizer) - _wide(logits).logsumexp(-1)).clamp(min=0).mean()


def fidelity(score: Tensor, variance: Tensor, mos: Tensor, std: Tensor | None = None) -> Tensor:
    """How wrong the model is about which of two clips is better: the mean over all B (B - 1) / 2 pairs, in [0, 1].

    P is the probability that clip a beats clip b by Thurstone's law of comparative judgment, P* that of the opinions:
    by the same law from their MOS and std where both stds are known, else 1, 1/2 (equal MOS) or 0. The loss is FRank's
    (Tsai et al., 2007), brought to quality with uncertainty by UNIQUE (Zhang et al., 2021).

    It is computed as half the squared distance between (sqrt P, sqrt(1 - P)) and (sqrt P*, sqrt(1 - P*)), which is the
    same number with less rounding. Gradients are finite everywhere, but vanish for a pair on which the model is both
    sure and wrong: such a pair needs `cross_entropy`.

    Args:
        score: (B,) in MOS units.
        variance: (B,) of the scores, >= 0, in squared MOS units.
        mos: (B,).
        std: (B,) standard deviation of the opinions about each clip, in MOS units; NaN where unknown.

    Returns:
        A scalar; for one clip 0, with gradients of 0.
    """
    score, variance = _wide(score), _wide(variance)
    mos = mos.to(score)
    a, b = torch.triu_indices(len(score), len(score), offset=1, device=score.device)
    order = (mos[a] - mos[b]).sign()
    reference_defects = torch.stack([1 + order, 1 - order]).div(2).sqrt()
    if std is not None:
        spread = std.to(score).square()
        judged = _root_odds(mos[a] - mos[b], spread[a] + spread[b])
        reference_defects = torch.where(judged.isnan(), reference_defects, judged)
    guess = _root_odds(score[a] - score[b], variance[a] + variance[b])
    return (guess - reference_defects).square().sum() / 2 / max(len(a), 1)


def plcc(score: Tensor, mos: Tensor) -> Tensor:
    """1 - Pearson's correlation of (B,) scores with (B,) MOS, in [0, 2].

    Where it is undefined (one clip, or scores or MOS that are all the same), 0 with gradients of 0.
    """
    score = _wide(score)
    mos = mos.to(score)
    x, y = score - score.mean(), mos - mos.mean()
    varied = (x.norm() > CONSTANT * score.norm()) & (y.norm() > CONSTANT * mos.norm())
    loss: Tensor = (1 - F.cosine_similarity(x, y, dim=0)) * varied
    return loss


def answers(logits: Tensor, tokens: Tensor, shares: Tensor, kinds: Tensor, count: int) -> Tensor:
    """Cross-entropy of answers in words, summed by kind.

    Args:
        logits: (n, vocabulary), one row for each token of each answer.
        tokens: (n,) the tokens that should be said.
        shares: (n,) what each token counts: those of an answer 1 together.
        kinds: (n,) number of the kind of each, below `count`.

    Returns:
        (count,) sums; 0 for a kind that does not occur.
    """
    each = F.cross_entropy(_wide(logits), tokens, reduction="none") * shares
    return each.new_zeros(count).index_add(0, kinds, each)


def _wide(tensor: Tensor) -> Tensor:
    """In float32, or in float64 where it is so already."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _two_hot(mos: Tensor, levels: Tensor) -> Tensor:
    below = torch.bucketize(mos, levels[1:-1])
    share = ((mos - levels[below]) / (levels[below + 1] - levels[below]))[:, None]
    return F.one_hot(below, len(levels)) * (1 - share) + F.one_hot(below + 1, len(levels)) * share


def _gaussian(mos: Tensor, levels: Tensor, std: Tensor) -> Tensor:
    """Moving the centre of a normal density multiplies it by exp(tilt level): the tilt is found by bisection."""
    step = levels.diff().min()
    goal, levels = (mos - levels[0]) / step, (levels - levels[0]) / step
    variance = (std / step).clamp(min=0.1).square()[:, None]
    most = levels[-1] / variance[:, 0] + 100  # all but exp(-100) on the last level
    least = -most
    for _ in range(80):
        tilt = (least + most) / 2
        targets = (tilt[:, None] * levels - levels.square() / (2 * variance)).softmax(-1)
        short = (targets * levels).sum(-1) < goal
        least, most = torch.where(short, tilt, least), torch.where(short, most, tilt)
    return targets


def _root_odds(difference: Tensor, variance: Tensor) -> Tensor:
    """(2, pairs): the square roots of the probabilities that the first and that the second clip is the better one."""
    z = (difference / (variance + VARIANCE_FLOOR).sqrt()).clamp(-30, 30)  # P is 0 beyond, where torch's d log P is inf
    root: Tensor = torch.special.log_ndtr(torch.stack([z, -z])).div(2).exp()
    return root


def _refuse(bad: Tensor, values: Tensor, what: str, advice: str) -> None:
    if bad.any():
        place = int(bad.nonzero()[0])
        raise UsageError(f"{what}; received {values[place]:g} for clip {place + 1} of {len(values)}: {advice}")
