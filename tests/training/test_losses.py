"""python -m pytest tests/training/test_losses.py"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm, pearsonr
from torch import Tensor
from torch.autograd import gradcheck

from lmm_qa.errors import UsageError
from lmm_qa.model.levels import Scale, read_levels
from lmm_qa.training.losses import (
    VARIANCE_FLOOR,
    answers,
    consistency,
    cross_entropy,
    fidelity,
    level_mass,
    level_targets,
    plcc,
    score_and_variance,
)

ANCHORS = torch.tensor(Scale(1, 5).anchors())
NAN = math.nan

scales = st.sampled_from((Scale(1, 5), Scale(0, 5), Scale(0, 100), Scale(-1.3, 0.1)))
counts = st.integers(2, 7)
shares = st.lists(st.floats(0, 1) | st.sampled_from((0.0, 0.25, 0.5, 1.0)), min_size=1, max_size=6)
spreads = st.floats(0, 50) | st.floats(0, 1)


def on(scale: Scale, count: int, shares: list[float]) -> tuple[Tensor, Tensor]:
    """MOS at these shares of the scale, ends included, and the anchors."""
    anchors = torch.tensor(scale.anchors(count))
    mos = anchors[0] + (anchors[-1] - anchors[0]) * torch.tensor(shares)
    return mos.clamp(anchors[0], anchors[-1]), anchors


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


# Targets


@given(scales, counts, shares, spreads)
def test_targets_are_distributions_with_the_mos_as_their_mean(
    scale: Scale, count: int, shares: list[float], spread: float
) -> None:
    mos, anchors = on(scale, count, shares)
    width = float(anchors[-1] - anchors[0])
    for targets in (
        level_targets(mos, anchors),
        level_targets(mos, anchors, "gaussian", torch.full_like(mos, spread * width)),
    ):
        assert targets.shape == (len(mos), count) and targets.dtype == torch.float32
        assert bool((targets >= 0).all())
        torch.testing.assert_close(targets.sum(-1), torch.ones_like(mos), rtol=0, atol=1e-6)
        mean = (targets.double() * anchors.double()).sum(-1)
        torch.testing.assert_close(mean, mos.double(), rtol=0, atol=1e-6 * (width + abs(float(anchors[0]))))


@given(scales, counts, shares)
def test_two_hot_uses_the_two_levels_around_the_mos(scale: Scale, count: int, shares: list[float]) -> None:
    mos, anchors = on(scale, count, shares)
    expected = [[np.interp(float(each), anchors.double(), row) for row in np.eye(count)] for each in mos]
    torch.testing.assert_close(level_targets(mos, anchors), torch.tensor(expected).float(), rtol=0, atol=1e-6)


@given(scales, shares, st.floats(0.25, 2))
def test_gaussian_is_a_normal_density_at_the_anchors(scale: Scale, shares: list[float], spread: float) -> None:
    mos, anchors = on(scale, 5, shares)
    step = float(anchors[1] - anchors[0])
    targets = level_targets(mos, anchors, "gaussian", torch.full_like(mos, spread * step)).double()
    bends = targets.log().diff(2).numpy()
    seen = (targets > 1e-30).unfold(1, 3, 1).all(-1).numpy()  # below, float32 has fewer digits
    np.testing.assert_allclose(bends[seen], -1 / spread**2, rtol=1e-4)


def test_gaussian_equals_scipy_at_the_middle_of_the_scale() -> None:
    std = np.array([0.4, 0.8, 1.5])
    targets = level_targets(torch.full((3,), 3.0), ANCHORS, "gaussian", torch.tensor(std)).numpy()
    density = norm.pdf(ANCHORS.numpy(), 3, std[:, None])
    np.testing.assert_allclose(targets, density / density.sum(1, keepdims=True), rtol=1e-5)


def test_gaussian_keeps_the_spread_of_the_opinions() -> None:
    mos, std = torch.tensor([2.4, 3.0, 3.3]), torch.tensor([0.6, 0.6, 0.7])
    targets = level_targets(mos, ANCHORS, "gaussian", std)
    spread = (targets * (ANCHORS - mos[:, None]).square()).sum(-1).sqrt()
    torch.testing.assert_close(spread, std, rtol=0.05, atol=0)


@given(scales, counts, shares, st.floats(0, 0.1))
def test_a_gaussian_with_a_small_std_is_two_hot(scale: Scale, count: int, shares: list[float], spread: float) -> None:
    mos, anchors = on(scale, count, shares)
    std = torch.full_like(mos, spread * float(anchors.diff().min()))
    torch.testing.assert_close(
        level_targets(mos, anchors, "gaussian", std), level_targets(mos, anchors), rtol=0, atol=1e-6
    )


def test_clips_without_a_std_get_two_hot() -> None:
    mos = torch.tensor([1.7, 3.2, 4.9])
    two_hot = level_targets(mos, ANCHORS)
    mixed = level_targets(mos, ANCHORS, "gaussian", torch.tensor([NAN, 0.8, NAN]))
    assert torch.equal(mixed[[0, 2]], two_hot[[0, 2]])
    assert torch.equal(mixed[1:2], level_targets(mos[1:2], ANCHORS, "gaussian", torch.tensor([0.8])))
    assert int((mixed[1] > 1e-3).sum()) == 5
    assert torch.equal(level_targets(mos, ANCHORS, "gaussian"), two_hot)
    assert torch.equal(level_targets(mos, ANCHORS, "gaussian", torch.full((3,), NAN)), two_hot)
    assert torch.equal(level_targets(mos, ANCHORS, "two_hot", torch.tensor([NAN, 0.8, NAN])), two_hot)


def test_one_hot_is_the_nearest_level_and_the_worse_one_for_a_tie() -> None:
    mos = torch.tensor([1, 1.49, 1.5, 1.51, 3.5, 4.4, 4.6, 5])
    levels = [0, 0, 0, 1, 2, 3, 4, 4]
    assert torch.equal(level_targets(mos, ANCHORS, "one_hot"), torch.eye(5)[levels])


def test_anchors_may_be_unevenly_spaced() -> None:
    anchors = torch.tensor([0.0, 1.0, 5.0])
    mos = torch.tensor([0.5, 2.0, 4.0])
    expected = torch.tensor([[0.5, 0.5, 0], [0, 0.75, 0.25], [0, 0.25, 0.75]])
    assert torch.equal(level_targets(mos, anchors), expected)
    assert level_targets(mos, anchors, "one_hot").argmax(-1).tolist() == [0, 1, 2]
    for spread in (0.0, 2.0, 1e4):
        targets = level_targets(mos, anchors, "gaussian", torch.full((3,), spread))
        torch.testing.assert_close((targets * anchors).sum(-1), mos, rtol=0, atol=1e-6)
    far = torch.tensor([0.0, 1.0, 2.0, 20.0])
    sure = level_targets(torch.tensor([1.0]), far, "gaussian", torch.tensor([0.1]))
    torch.testing.assert_close(sure, torch.eye(4)[1:2], rtol=0, atol=1e-6)


@given(scales, st.sampled_from(("two_hot", "gaussian", "one_hot")), st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_a_better_clip_has_better_targets(scale: Scale, kind: str, shares: list[float]) -> None:
    """Stochastic dominance: a higher MOS never increases the probability of a level or worse."""
    mos, anchors = on(scale, 5, sorted(shares))
    std = torch.full_like(mos, 0.2 * (scale.high - scale.low))
    worse_or_equal = level_targets(mos, anchors, kind, std).cumsum(-1)
    assert bool((worse_or_equal.diff(dim=0) <= 1e-6).all())


@pytest.mark.parametrize("mos", [0.9, 5.1, NAN, math.inf])
def test_a_mos_outside_the_scale_is_refused(mos: float) -> None:
    with pytest.raises(UsageError, match=rf"on the scale \[1, 5\]; received {mos} for clip 2 of 3: declare the scale"):
        level_targets(torch.tensor([1.0, mos, 5.0]), ANCHORS)


@pytest.mark.parametrize("std", [-0.1, math.inf])
def test_an_invalid_std_is_refused(std: float) -> None:
    with pytest.raises(UsageError, match=f"a number >= 0; received {std} for clip 1 of 2: NaN stands for unknown"):
        level_targets(torch.tensor([2.0, 3.0]), ANCHORS, "gaussian", torch.tensor([std, 0.5]))


def test_the_ends_of_a_scale_that_float32_cannot_represent_are_valid() -> None:
    anchors = torch.tensor(Scale(-1.3, 0.1).anchors())
    targets = level_targets(torch.tensor([-1.3, 0.1], dtype=torch.float64), anchors)
    assert torch.equal(targets, torch.eye(5)[[0, 4]])


# Score and variance


@given(scales, st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=5, max_size=5), min_size=1, max_size=4))
def test_score_and_variance_equal_those_of_read_levels(scale: Scale, rows: list[list[float]]) -> None:
    score, variance = score_and_variance(torch.tensor(rows), torch.tensor(scale.anchors()))
    expected = [read_levels(np.float32(row), max(row), scale) for row in rows]
    width = scale.high - scale.low
    np.testing.assert_allclose(score.numpy(), [each.score for each in expected], atol=1e-6 * width, rtol=1e-6)
    np.testing.assert_allclose(variance.numpy(), [each.std**2 for each in expected], atol=1e-5 * width**2, rtol=1e-5)


def test_the_score_of_the_targets_is_the_mos() -> None:
    mos = torch.tensor([1.0, 2.2, 3.5, 5.0])
    targets = level_targets(mos, ANCHORS)
    score, variance = score_and_variance(targets.log(), ANCHORS)
    torch.testing.assert_close(score, mos)
    torch.testing.assert_close(variance, (mos % 1) * (1 - mos % 1), rtol=0, atol=1e-5)


# Losses


def test_gradients_equal_finite_differences() -> None:
    logits, anchors = draw(4, 5).requires_grad_(), ANCHORS.double()
    targets = draw(4, 5, seed=1).softmax(-1)
    others = draw(4, 9, seed=2).requires_grad_()
    mos, std = torch.tensor([1.2, 3.0, 3.0, 4.7]), torch.tensor([0.5, 0.7, NAN, 0.0])

    def mass(logits: Tensor, others: Tensor) -> Tensor:
        return level_mass(logits, torch.cat([logits, others], 1).logsumexp(1))

    assert gradcheck(lambda z: score_and_variance(z, anchors), logits)
    assert gradcheck(lambda z: cross_entropy(z, targets), logits)
    assert gradcheck(mass, (logits, others))
    assert gradcheck(lambda z: fidelity(*score_and_variance(z, anchors), mos), logits)
    assert gradcheck(lambda z: fidelity(*score_and_variance(z, anchors), mos, std), logits)
    assert gradcheck(lambda z: plcc(score_and_variance(z, anchors)[0], mos), logits)


def test_cross_entropy_and_level_mass_are_the_cross_entropy_over_the_vocabulary() -> None:
    vocabulary = draw(6, 40) * 3
    levels, targets = vocabulary[:, :5], draw(6, 5, seed=1).softmax(-1)
    whole = torch.nn.functional.cross_entropy(vocabulary, torch.nn.functional.pad(targets, (0, 35)))
    mass = level_mass(levels, vocabulary.logsumexp(1))
    torch.testing.assert_close(cross_entropy(levels, targets) + mass, whole)
    torch.testing.assert_close(mass, -vocabulary.softmax(1)[:, :5].sum(1).log().mean())


def test_consistency_is_the_mean_squared_difference_within_contents() -> None:
    score = torch.tensor([1.0, 3.0, 2.0, 2.5, 5.0, 4.0], requires_grad=True)
    contents = torch.tensor([8, 5, 8, 5, -1, -1])
    anchors = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    loss = consistency(score, contents, anchors)
    assert loss.item() == pytest.approx(((1 / 4) ** 2 + (0.5 / 4) ** 2) / 2)
    loss.backward()
    assert score.grad is not None and (score.grad != 0).tolist() == [True] * 4 + [False] * 2
    alone = consistency(score, torch.tensor([1, 2, 3, 4, -1, -1]), anchors)
    assert alone.item() == 0


def test_answers_have_equal_weight_whatever_their_length() -> None:
    """Two answers of the second task, of one token and of three: each counts as its mean."""
    logits, tokens = draw(4, 9), torch.tensor([3, 0, 8, 3])
    shares = torch.tensor([1, 1 / 3, 1 / 3, 1 / 3])
    found = answers(logits, tokens, shares, torch.tensor([1, 1, 1, 1]), 2)
    wanted = [torch.nn.CrossEntropyLoss()(logits[part], tokens[part]) for part in (slice(0, 1), slice(1, 4))]
    assert found.tolist() == pytest.approx([0, float(sum(wanted))])
    none = answers(logits[:0], tokens[:0], shares[:0], tokens[:0], 2)
    assert none.tolist() == [0, 0]
    both = cross_entropy(logits[:1, [3, 5]], torch.tensor([[1.0, 0.0]]))
    mass = level_mass(logits[:1, [3, 5]], logits[:1].logsumexp(-1))
    assert float(both + mass) == pytest.approx(float(wanted[0])), "a closed question: both words, and their mass"


def test_level_mass_is_never_negative() -> None:
    logits = draw(200, 5, dtype=torch.float32) * 30
    assert level_mass(logits, logits.logsumexp(1)) == 0
    assert level_mass(logits, logits.double().logsumexp(1).float() - 1e-5) == 0


@given(st.integers(0, 1000))
def test_cross_entropy_has_its_minimum_at_the_targets(seed: int) -> None:
    targets = draw(3, 5, seed=seed).softmax(-1)
    entropy = -(targets * targets.log()).sum(1).mean()
    best = targets.log().requires_grad_()
    loss = cross_entropy(best, targets)
    torch.testing.assert_close(loss, entropy)
    assert gradients(loss, best)[0].abs().max() < 1e-12
    assert cross_entropy(draw(3, 5, seed=seed + 1), targets) > loss


clips = st.lists(
    st.tuples(
        st.floats(1, 5),  # score
        st.floats(0, 2),  # its variance
        st.sampled_from((1.0, 2.5, 2.6, 4.0, 5.0)),
        st.sampled_from((NAN, 0.0, 0.5, 1.0)),
    ),
    min_size=2,
    max_size=6,
)


@given(clips)
def test_fidelity_is_the_formula_over_all_pairs(clips: list[tuple[float, float, float, float]]) -> None:
    losses: dict[bool, list[float]] = {True: [], False: []}
    for (s, v, mos, std), (s_other, v_other, mos_other, std_other) in itertools.combinations(clips, 2):
        guess = (s - s_other) / math.sqrt(v + v_other + VARIANCE_FLOOR)
        order = np.inf * (mos - mos_other) if mos != mos_other else 0
        judged = (mos - mos_other) / math.sqrt(std**2 + std_other**2 + VARIANCE_FLOOR)
        for with_std, reference in ((True, order if math.isnan(judged) else judged), (False, order)):
            overlaps = (math.sqrt(side(guess) * side(reference)) for side in (norm.cdf, norm.sf))
            losses[with_std].append(1 - sum(overlaps))
    assert len(losses[True]) == len(clips) * (len(clips) - 1) / 2
    score, variance, mos, std = torch.tensor(clips, dtype=torch.float64).T
    assert float(fidelity(score, variance, mos, std)) == pytest.approx(np.mean(losses[True]), abs=1e-9)
    assert float(fidelity(score, variance, mos)) == pytest.approx(np.mean(losses[False]), abs=1e-9)


def test_fidelity_is_0_only_at_the_labels() -> None:
    mos, std = torch.tensor([1.2, 2.9, 3.0, 4.6]), torch.tensor([0.6, 0.8, 0.0, 0.5])
    score = mos.clone().requires_grad_()
    loss = fidelity(score, std.square(), mos, std)
    assert loss == 0
    assert not gradients(loss, score)[0].any()
    assert fidelity(mos + torch.tensor([0, 0.1, 0, 0]), std.square(), mos, std) > 1e-4
    assert fidelity(mos, std.square() * 2, mos, std) > 1e-4


def test_a_small_difference_without_variance_is_not_certain() -> None:
    score = torch.tensor([3.0, 3.01]).requires_grad_()
    loss = fidelity(score, torch.zeros(2), torch.tensor([4.0, 2.0]))
    better = norm.cdf(-0.01 / math.sqrt(VARIANCE_FLOOR))
    assert loss.item() == pytest.approx(1 - math.sqrt(better), rel=1e-3)
    assert 0.3 < loss.item() < 0.7
    assert 1 < gradients(loss, score)[0].abs().max() < 100


def test_the_gradient_of_fidelity_sorts_a_pair() -> None:
    score = torch.tensor([3.0, 3.0]).requires_grad_()
    loss = fidelity(score, torch.tensor([0.5, 0.5]), torch.tensor([2.0, 4.0]))
    assert loss.item() == pytest.approx(1 - math.sqrt(0.5))
    (slope,) = gradients(loss, score)
    assert slope[0] > 0 > slope[1]
    assert float(slope.sum()) == pytest.approx(0, abs=1e-7)


@given(
    st.lists(
        st.tuples(st.floats(-1e4, 1e4, width=32), st.just(0.0) | st.floats(0, 10, width=32)), min_size=2, max_size=5
    ),
    st.integers(0, 100),
)
def test_fidelity_has_finite_gradients_everywhere(pairs: list[tuple[float, float]], seed: int) -> None:
    score, variance = (column.clone().requires_grad_() for column in torch.tensor(pairs).T)
    mos = draw(len(pairs), seed=seed).round()
    for std in (None, torch.zeros(len(pairs)), torch.full((len(pairs),), 0.7)):
        loss = fidelity(score, variance, mos, std)
        assert 0 <= loss <= 1 + 1e-6
        assert all(bool(each.isfinite().all()) for each in gradients(loss, score, variance))


@pytest.mark.parametrize("size", [1.0, 1e2, 1e4, 1e30])
@pytest.mark.parametrize("clips", [1, 2, 5])
def test_all_losses_and_their_gradients_are_finite_at_extreme_logits(size: float, clips: int) -> None:
    logits = (draw(clips, 5, dtype=torch.float32) * size).requires_grad_()
    mos = torch.linspace(1, 5, clips)
    score, variance = score_and_variance(logits, ANCHORS)
    for loss in (
        cross_entropy(logits, level_targets(mos, ANCHORS)),
        level_mass(logits, logits.logsumexp(1) + 1e3),
        fidelity(score, variance, mos),
        fidelity(score, variance, mos, torch.full((clips,), 0.5)),
        plcc(score, mos),
    ):
        assert bool(loss.isfinite()) and loss.shape == () and loss.dtype == torch.float32
        assert bool(torch.autograd.grad(loss, logits, retain_graph=True)[0].isfinite().all())


def test_fidelity_of_one_clip_is_0_with_zero_gradients() -> None:
    score, variance = torch.tensor([3.0]).requires_grad_(), torch.tensor([0.3]).requires_grad_()
    loss = fidelity(score, variance, torch.tensor([2.0]), torch.tensor([0.5]))
    assert loss == 0
    assert [each.tolist() for each in gradients(loss, score, variance)] == [[0], [0]]


@given(st.lists(st.tuples(st.floats(1, 5), st.floats(1, 5)), min_size=3, max_size=8))
def test_plcc_equals_scipy(pairs: list[tuple[float, float]]) -> None:
    score, mos = torch.tensor(pairs, dtype=torch.float64).T
    if min(score.std(), mos.std()) > 1e-3:
        assert float(plcc(score, mos)) == pytest.approx(1 - pearsonr(score, mos).statistic, abs=1e-9)


def test_plcc_is_0_for_correlation_1_and_2_for_correlation_minus_1() -> None:
    mos = torch.tensor([1.0, 2.5, 4.0, 4.5])
    assert float(plcc(0.1 * mos + 3, mos)) == pytest.approx(0, abs=1e-6)
    assert float(plcc(-mos, mos)) == pytest.approx(2, abs=1e-6)


@pytest.mark.parametrize(
    ("scores", "labels"),
    [
        ([3.3] * 7, [1, 2, 3, 4, 5, 1, 2]),  # the mean of seven 3.3 in float32 is not 3.3
        ([1, 2, 3, 4, 5, 1, 2], [3.3] * 7),
        ([0, 0], [1, 2]),
        ([2.1], [3.0]),
    ],
)
def test_plcc_of_constant_values_is_0_with_zero_gradients(scores: list[float], labels: list[float]) -> None:
    score = torch.tensor(scores, dtype=torch.float32).requires_grad_()
    loss = plcc(score, torch.tensor(labels))
    assert loss == 0
    assert gradients(loss, score)[0].tolist() == [0] * len(scores)


def test_plcc_of_a_small_spread_is_not_taken_for_constant() -> None:
    mos = torch.tensor([1.0, 2.0, 3.0, 5.0])
    assert float(plcc(3 + mos * 1e-3, mos)) == pytest.approx(0, abs=1e-4)
    assert float(plcc(3 - mos * 1e-3, mos)) == pytest.approx(2, abs=1e-4)


def all_losses(logits: Tensor, mos: Tensor, std: Tensor, log_normalizer: Tensor) -> Tensor:
    score, variance = score_and_variance(logits, ANCHORS)
    return torch.stack(
        [
            cross_entropy(logits, level_targets(mos, ANCHORS, "gaussian", std)),
            level_mass(logits, log_normalizer),
            fidelity(score, variance, mos, std),
            plcc(score, mos),
        ]
    )


def a_batch(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mos, std = torch.tensor([1.2, 4.4, 3.0, 3.0, 2.1, 5.0]), torch.tensor([0.5, NAN, 0.7, 0.6, NAN, 0.2])
    logits = draw(6, 5).to(dtype)
    return logits, mos, std, logits.float().logsumexp(1) + draw(6, seed=1, dtype=torch.float32).abs()


def test_the_order_of_the_batch_does_not_matter() -> None:
    batch = a_batch(torch.float64)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    torch.testing.assert_close(all_losses(*(each[order] for each in batch)), all_losses(*batch), rtol=0, atol=1e-6)


def test_16_bit_inputs_are_computed_in_float32() -> None:
    logits, *labels = a_batch(torch.bfloat16)
    expected = all_losses(logits.float(), *labels)
    assert torch.equal(all_losses(logits, *labels), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(all_losses(logits, *labels), expected)
        assert torch.equal(all_losses(logits.float(), *labels), expected)


def test_gradient_descent_finds_the_mos() -> None:
    mos = torch.tensor([1.2, 4.4, 3.0, 2.1])
    logits = torch.zeros(4, 5, requires_grad=True)
    targets = level_targets(mos, ANCHORS)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(200):
        score, variance = score_and_variance(logits, ANCHORS)
        loss = cross_entropy(logits, targets) + fidelity(score, variance, mos) + plcc(score, mos)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(score_and_variance(logits, ANCHORS)[0].detach(), mos, rtol=0, atol=0.1)
