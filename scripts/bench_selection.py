"""Measure whether chosen clips are worth more labels than random ones (`lmm_qa.evaluation.selection`).

    lmm-qa degrade clips/ -o set/labels.jsonl --strengths 0.3,0.8 --length 2
    lmm-qa rate set/labels.jsonl --defects -o set/ratings.jsonl
    python scripts/bench_selection.py set/ratings.jsonl set/labels.jsonl [-o selection.json]

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
from lmm_qa.evaluation.selection import Floats, disagreement, features, k_centre, ranks, uncertainty
from lmm_qa.ratings_io import read_ratings
from lmm_qa.tables import Row

SEEDS = range(5)
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


def top(weights: Floats, number: int) -> Sequence[int]:
    """The clips with the largest weights."""
    return np.argsort(-weights, kind="stable")[:number].tolist()


def spread(pool: Pool, number: int, weights: Floats | float = 1.0, points: Floats | None = None) -> Sequence[int]:
    """k-centre greedy selection."""
    ones = np.ones(len(pool.rows))
    return k_centre(features(pool.rows) if points is None else points, number, weights * ones, pool.groups)


def scores_of(pool: Pool) -> Floats:
    """(n, 1) scores."""
    return np.array([[row["score"]] for row in pool.rows])


RULES: dict[str, Rule] = {
    "uncertainty": lambda pool, n: top(pool.unsure, n),
    "disagreement": lambda pool, n: top(pool.contrary, n),
    "diversity": lambda pool, n: spread(pool, n),
    "diversity of the score": lambda pool, n: spread(pool, n, points=scores_of(pool)),
    "diversity x (1 + uncertainty)": lambda pool, n: spread(pool, n, 1 + pool.unsure),
    "diversity x (1 + disagreement)": lambda pool, n: spread(pool, n, 1 + pool.contrary),
    "diversity x (1 + both)": lambda pool, n: spread(pool, n, 1 + pool.unsure + pool.contrary),
    "diversity x (2 - disagreement)": lambda pool, n: spread(pool, n, 2 - pool.contrary),
    "diversity x (1 + uncertainty) (2 - disagreement)": lambda pool, n: spread(
        pool, n, (1 + pool.unsure) * (2 - pool.contrary)
    ),
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


def measure(rows: Sequence[Row], pairs: Sequence[Pair]) -> dict[str, dict[str, dict[int, list[float]]]]:
    """RMSE of each model, rule and n, one per seed."""
    result: dict[str, dict[str, dict[int, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    groups = [str(pair.label.group) for pair in pairs]
    described = features(rows)
    for seed in SEEDS:
        half = group_folds(groups, 2, seed)
        inside, outside = np.flatnonzero(half == 0), np.flatnonzero(half == 1)
        pool = Pool([rows[at] for at in inside], [groups[at] for at in inside])
        test = [pairs[at] for at in outside]

        def errors(
            chosen: Sequence[int], inside: np.ndarray = inside, outside: np.ndarray = outside, seed: int = seed
        ) -> tuple[float, float]:
            taken = inside[list(chosen)]
            labelled, test = [pairs[at] for at in taken], [pairs[at] for at in outside]
            mos = np.array([pair.label.mos for pair in labelled])
            linear = ridge_error(described[taken], mos, described[outside], test)
            return calibration_error(labelled, test, seed), linear

        for n in [n for n in SIZES if n <= len(inside)]:
            rng = np.random.default_rng(seed)
            draws = [errors(rng.permutation(len(inside))[:n].tolist()) for _ in range(DRAWS)]
            found = {name: errors(rule(pool, n)) for name, rule in RULES.items()}
            found["random"] = (float(np.nanmean([one for one, _ in draws])), fmean(other for _, other in draws))
            for name, (calibrated, linear) in found.items():
                result["calibration"][name][n].append(calibrated)
                result["ridge"][name][n].append(linear)
        everything = errors(range(len(inside)))
        print(f"seed {seed}: {len(inside)} clips in the pool, {len(test)} to test; RMSE with all labels "
              f"{everything[0]:.3f} (calibration), {everything[1]:.3f} (ridge)")  # fmt: skip
    return result


def main() -> None:
    """Measure and print the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ratings", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    by_name = {row["clip"]: row for row in read_ratings(arguments.ratings)}
    pairs = join(read_labels(arguments.labels), read_scores(arguments.ratings)).pairs
    result = measure([by_name[pair.score.clip] for pair in pairs], pairs)
    for model, rules in result.items():
        random = rules["random"]
        print(f"\n{model}: RMSE in MOS, mean of {len(SEEDS)} seeds (in how many of them below random)")
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
