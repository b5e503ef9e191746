"""Measure whether chosen clips are worth more labels than random ones (`lmm_qa.evaluation.selection`).

    lmm-qa degrade clips/ -o set/labels.jsonl --strengths 0.3,0.8 --length 2
    lmm-qa rate set/labels.jsonl --defects -o set/ratings.jsonl
    python scripts/bench_selection.py set/ratings.jsonl set/labels.jsonl [--seeds 5] [-o selection.json]

The MOS of a degraded set come from the strength of the damage, not from people. For each seed, half of the groups
(sources) are the pool that clips are chosen from, the other half is the test set. Each rule chooses n clips of the
pool, which are labelled; two models are fitted to these labels and tested:

    calibration   the 4-parameter logistic of `lmm-qa calibrate`: score -> MOS
    ridge         linear regression with a penalty: score, level and defect probabilities -> MOS

Printed is the RMSE on the test set in MOS, mean over the seeds; in brackets, the number of seeds in which the rule has
a lower RMSE than random choice, itself the mean of `DRAWS` draws.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np

from lmm_qa.errors import ConfigError, ScoresError
from lmm_qa.evaluation.calibration import calibrate
from lmm_qa.evaluation.labels import Pair, group_folds, join, read_labels, read_scores
from lmm_qa.evaluation.selection import Floats, choose_clips, disagreement, features, k_centre, ranks, uncertainty
from lmm_qa.files.tables import Row
from lmm_qa.ratings.io import read_ratings

SIZES = (20, 30, 40, 60, 80, 120, 160)
DRAWS = 20
RIDGE = 10.0


class Pool(NamedTuple):
    """Clips that can be labelled."""

    rows: list[Row]
    groups: list[str]

    @property
    def unsure(self) -> Floats:
        return ranks(uncertainty(self.rows))

    @property
    def contrary(self) -> Floats:
        found = disagreement(self.rows)
        assert found is not None, "rate the clips with --defects"
        return ranks(found)


Rule = Callable[[Pool, int], Sequence[int]]
Errors = dict[str, dict[str, dict[int, list[float]]]]
"""RMSE by model, rule and number of labels; one per seed."""


def top(weights: Floats, number: int) -> Sequence[int]:
    """The clips with the largest weights."""
    return [int(at) for at in np.argsort(-weights, kind="stable")[:number]]


def spread(pool: Pool, number: int, weights: Floats | float = 1.0, points: Floats | None = None) -> Sequence[int]:
    """k-centre greedy selection."""
    ones = np.ones(len(pool.rows))
    return k_centre(features(pool.rows) if points is None else points, number, weights * ones, pool.groups)


def scores_of(pool: Pool) -> Floats:
    """(n, 1) scores."""
    return np.array([[row["score"]] for row in pool.rows])


def to_label(pool: Pool, number: int) -> Sequence[int]:
    """The rule of `lmm-qa select --to-label`."""
    index = {row["clip"]: at for at, row in enumerate(pool.rows)}
    return [index[candidate.row["clip"]] for candidate in choose_clips(pool.rows, number, pool.groups)]


RULES: dict[str, Rule] = {
    "uncertainty": lambda pool, n: top(pool.unsure, n),
    "disagreement": lambda pool, n: top(pool.contrary, n),
    "diversity": lambda pool, n: spread(pool, n),
    "diversity of the score": lambda pool, n: spread(pool, n, points=scores_of(pool)),
    "diversity (1 + uncertainty)": lambda pool, n: spread(pool, n, 1 + pool.unsure),
    "diversity (1 + uncertainty + disagreement)": lambda pool, n: spread(pool, n, 1 + pool.unsure + pool.contrary),
    "diversity (1 + 2 disagreement)": lambda pool, n: spread(pool, n, 1 + 2 * pool.contrary),
    "lmm-qa select: diversity (1 + disagreement)": to_label,
}


def calibration_error(labelled: Sequence[Pair], test: Sequence[Pair], seed: int) -> float:
    """RMSE of calibrated scores; NaN if no calibration can be fitted."""
    try:
        fitted = calibrate(labelled, seed=seed)
    except (ScoresError, ConfigError):
        return float("nan")
    predicted = [fitted.apply(pair.score.value or 0.0, pair.score.std).mos for pair in test]
    return rmse(np.array(predicted), test)


def ridge_error(inputs: Floats, mos: Floats, test_inputs: Floats, test: Sequence[Pair]) -> float:
    """RMSE of a linear regression."""
    centre = inputs.mean(axis=0)
    gram = (inputs - centre).T @ (inputs - centre) + RIDGE * np.eye(inputs.shape[1])
    slopes = np.linalg.solve(gram, (inputs - centre).T @ (mos - mos.mean()))
    return rmse(mos.mean() + (test_inputs - centre) @ slopes, test)


def rmse(predicted: Floats, test: Sequence[Pair]) -> float:
    """Root of the mean squared error, in MOS."""
    return float(np.sqrt(np.mean((predicted - np.array([pair.label.mos for pair in test])) ** 2)))


def errors(
    pairs: Sequence[Pair], inputs: Floats, labelled: Sequence[int], test: Sequence[int], seed: int
) -> tuple[float, float]:
    """RMSE of the calibration and of the linear regression."""
    training, held_out = [pairs[at] for at in labelled], [pairs[at] for at in test]
    mos = np.array([pair.label.mos for pair in training])
    linear = ridge_error(inputs[list(labelled)], mos, inputs[list(test)], held_out)
    return calibration_error(training, held_out, seed), linear


def measure(rows: Sequence[Row], pairs: Sequence[Pair], seeds: int) -> Errors:
    """RMSE of each model, rule and n, one per seed."""
    result: Errors = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    everything: list[tuple[float, float]] = []
    groups = [str(pair.label.group) for pair in pairs]
    inputs = features(rows)
    for seed in range(seeds):
        half = group_folds(groups, 2, seed)
        inside, test = np.flatnonzero(half == 0).tolist(), np.flatnonzero(half == 1).tolist()
        pool = Pool([rows[at] for at in inside], [groups[at] for at in inside])
        everything.append(errors(pairs, inputs, inside, test, seed))
        for n in [n for n in SIZES if n <= len(inside)]:
            rng = np.random.default_rng(seed)
            draws = [errors(pairs, inputs, rng.permutation(inside)[:n].tolist(), test, seed) for _ in range(DRAWS)]
            found = {
                name: errors(pairs, inputs, [inside[at] for at in rule(pool, n)], test, seed)
                for name, rule in RULES.items()
            }
            found["random"] = (float(np.nanmean([one for one, _ in draws])), fmean(other for _, other in draws))
            for name, (calibrated, linear) in found.items():
                result["calibration"][name][n].append(calibrated)
                result["ridge"][name][n].append(linear)
    calibrated, linear = np.mean(everything, axis=0)
    print(f"RMSE with the labels of all {len(inside)} clips: {calibrated:.3f} (calibration), {linear:.3f} (ridge)")
    return result


def main() -> None:
    """Measure and print the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ratings", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    by_name = {row["clip"]: row for row in read_ratings(arguments.ratings)}
    pairs = join(read_labels(arguments.labels), read_scores(arguments.ratings)).pairs
    result = measure([by_name[pair.score.clip] for pair in pairs], pairs, arguments.seeds)
    for model, rules in result.items():
        random = rules["random"]
        print(f"\n{model}: RMSE in MOS, mean of {arguments.seeds} seeds (in how many of them below random)")
        print(f"{'labels':<50}" + "".join(f"{n:>11}" for n in random))
        for name in ("random", *RULES):
            cells = []
            for n, values in rules[name].items():
                better = sum(one < other for one, other in zip(values, random[n], strict=True))
                cells.append(f"{np.nanmean(values):.3f}" + ("    " if name == "random" else f" ({better})"))
            print(f"{name:<50}" + "".join(f"{cell:>11}" for cell in cells))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
