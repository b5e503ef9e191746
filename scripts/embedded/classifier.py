"""The defect classifier: extremely randomised trees (Geurts, Ernst and Wehenkel, 2006) on the measured features.

One forest per defect of `lmm_qa.defects.vocabulary`, and one for the quality. A first forest selects the most important
features; the final one uses these alone. Copies are encoded once more before they are measured, at rates that are
common for clips that people rate: `lmm-qa degrade` encodes with hardly any loss.
"""

from __future__ import annotations

import json
import tempfile
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from embedded.data import FACTOR, LONGEST, SCALE, write_clip
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.metrics import average_precision_score
from sklearn.model_selection import GroupKFold

from lmm_qa.config import View
from lmm_qa.defects.vocabulary import BY_NAME, reference_defects
from lmm_qa.degrade.causes import REPRODUCIBLE_X264
from lmm_qa.degrade.dataset import read_clip
from lmm_qa.files.tables import read_rows, write_rows
from lmm_qa.model.levels import LEVELS
from lmm_qa.training.dataset import Data, load
from lmm_qa.video.decode import read_frames
from lmm_qa.video.measurement.classifier import QUALITY, Forests, log_odds
from lmm_qa.video.measurement.features import FeatureExtractor

RATE_FACTORS = (9.0, 23.0)
FOLDS = 5


@dataclass(frozen=True)
class LabelledCopies:
    """Copies of clips of several splits."""

    clips: list[str]
    groups: NDArray[np.str_]
    """(n,): the source of each."""
    features: NDArray[np.float32]
    """(n, features)."""
    feature_names: list[str]
    present: dict[str, NDArray[np.float64]]
    """By defect, (n,): 1 where the copy has it, 0 where it does not, NaN where that is unknown."""
    strength: dict[str, NDArray[np.float64]]
    """By defect, (n,): the highest strength of its causes, 0 where there is none."""
    quality: NDArray[np.float64]
    """(n,): 0 to 1."""


def measure_copies(folder: Path, workers: int) -> None:
    """Write FOLDER/features.npz: the features of all copies in FOLDER/table.jsonl."""
    clips = [row["clip"] for row in read_rows(folder / "table.jsonl")]
    measured = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for number, features in enumerate(pool.map(measure_copy, [folder / clip for clip in clips], chunksize=4), 1):
            measured.append(features)
            if number % 200 == 0 or number == len(clips):
                print(f"{folder.name}: {number} of {len(clips)} copies measured", flush=True)
    values = np.array([list(features.values()) for features in measured], np.float32)
    partial_file = folder / ".features.npz"
    np.savez(partial_file, clips=clips, names=list(measured[0]), features=values)
    partial_file.replace(folder / "features.npz")


def measure_copy(clip: Path) -> dict[str, float]:
    """The features of a copy after another encoding, at a rate factor that depends on its name."""
    rng = np.random.default_rng(zlib.crc32(clip.name.encode()))
    frames, fps, _ = read_clip(clip, LONGEST)
    options = {**REPRODUCIBLE_X264, "crf": f"{rng.uniform(*RATE_FACTORS):.1f}"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, clip.name)
        write_clip(frames, fps, options, path)
        features = read_frames(path, FeatureExtractor.sampling, (View(max_pixels=784),), FACTOR,
                               measure=FeatureExtractor).features  # fmt: skip
    if features is None:
        raise ValueError(f"{clip} is too long to be measured")
    return features


def read_copies(folder: Path, splits: Sequence[str]) -> LabelledCopies:
    """The measured copies of some splits with their labels."""
    clips: list[str] = []
    groups: list[str] = []
    quality: list[float] = []
    features: list[NDArray[np.float32]] = []
    present: dict[str, list[float]] = {name: [] for name in reference_defects(())}
    strength: dict[str, list[float]] = {name: [] for name in present}
    for split in splits:
        table = {"path": f"{split}/table.jsonl", "videos": split, "scale": SCALE}
        shares = {"validation_share": 0, "calibration_share": 0}
        examples = load(Data.parse({"root": folder, "train": [table], **shares}, split), seed=0).train
        labels = {row["clip"]: row for row in read_rows(folder / split / "labels.jsonl")}
        with np.load(folder / split / "features.npz") as measured:
            row = {clip: number for number, clip in enumerate(measured["clips"])}
            features.append(measured["features"][[row[example.name] for example in examples]])
            names = [str(name) for name in measured["names"]]
        for example in examples:
            clips.append(example.name)
            groups.append(str(example.group))
            quality.append((example.mos - SCALE[0]) / (SCALE[1] - SCALE[0]))
            found = {one.defect for one in example.found or ()}
            label = labels[example.same_as or example.name]
            applied = dict(zip(label["causes"], label["strengths"], strict=True))
            for name, values in present.items():
                values.append(1.0 if name in found else 0.0 if name in example.absent else np.nan)
                strength[name].append(max((applied.get(cause, 0.0) for cause in BY_NAME[name].causes), default=0.0))
    return LabelledCopies(clips, np.array(groups), np.concatenate(features), names,
                          {name: np.array(values) for name, values in present.items()},
                          {name: np.array(values) for name, values in strength.items()}, np.array(quality))  # fmt: skip


class Forest:
    """The forest of one target: a first forest selects the features, another uses these alone.

    A leaf of the forest of a defect has two values: the share of copies that have the defect, as if as many had it as
    not, and the mean strength of all copies there.
    """

    def __init__(self, trees: int, leaves: int, features: int) -> None:
        """
        Args:
            trees: number of trees.
            leaves: most leaves of a tree.
            features: number of features that are selected.
        """
        options: dict[str, Any] = {"max_leaf_nodes": leaves, "max_features": 0.4, "random_state": 0, "n_jobs": -1}
        self.most = features
        self.first = ExtraTreesRegressor(max(trees // 4, 1), **options)
        self.model = ExtraTreesRegressor(trees, **options)
        self.selected: NDArray[np.intp] = np.array([], np.intp)
        self.strength: list[NDArray[np.float64]] = []

    def fit(self, X: NDArray[np.float32], target: NDArray[np.float64], strength: NDArray[np.float64] | None = None
            ) -> Forest:  # fmt: skip
        """
        Args:
            X: (n, features).
            target: (n,): presence of a defect, or the quality.
            strength: (n,), of the defect.
        """
        weight = None if strength is None else np.where(target == 1, 0.5 / (target == 1).mean(),
                                                        0.5 / (target == 0).mean())  # fmt: skip
        y = target if strength is None else np.stack([target, strength], 1)
        self.first.fit(X, y, weight)
        self.selected = np.sort(np.argsort(-self.first.feature_importances_, kind="stable")[: self.most])
        self.model.fit(X[:, self.selected], y, weight)
        if strength is not None:
            for tree in self.model.estimators_:
                leaf = tree.apply(X[:, self.selected])
                count = np.bincount(leaf, minlength=tree.tree_.node_count)
                total = np.bincount(leaf, strength, minlength=tree.tree_.node_count)
                self.strength.append(total / np.maximum(count, 1))
        return self

    def predict(self, X: NDArray[np.float32]) -> NDArray[np.float64]:
        """(n, 2): target and strength, mean over the trees."""
        target = np.reshape(self.model.predict(X[:, self.selected]), (len(X), -1))[:, 0]
        severity = np.zeros(len(X))
        for tree, means in zip(self.model.estimators_, self.strength, strict=False):  # none for the quality
            severity += means[tree.apply(X[:, self.selected])] / len(self.strength)
        return np.stack([target, severity], 1)


def train_classifier(folder: Path, out: Path, settings: Mapping[str, Any], predictions: Path) -> None:
    """Train on all copies of the splits `train` and `val`.

    Args:
        folder: of the measured copies.
        out: classifier to write, see `lmm_qa.video.measurement.classifier`.
        settings: the section `classifier` of model.yaml.
        predictions: JSONL to write: what forests that were trained on other sources predict for each copy.
    """
    copies = read_copies(folder, ("train", "val"))
    forests: dict[str, Forest] = {}
    held_out: dict[str, NDArray[np.float64]] = {}  # by target, (n, 2): see `Forest.predict`
    precisions = {}
    count = min(FOLDS, len(set(copies.groups.tolist())))
    folds = [*GroupKFold(count, shuffle=True, random_state=0).split(copies.features, groups=copies.groups)]
    for name, labels in [*copies.present.items(), (QUALITY, copies.quality)]:
        known, strength = ~np.isnan(labels), copies.strength.get(name)

        leaves = settings["quality_leaves" if strength is None else "max_leaf_nodes"]

        def fitted(rows: NDArray[np.intp], labels: NDArray[np.float64] = labels, leaves: int = leaves,
                   strength: NDArray[np.float64] | None = strength) -> Forest:  # fmt: skip
            return Forest(settings["n_estimators"], leaves, settings["features"]).fit(
                copies.features[rows], labels[rows], None if strength is None else strength[rows]
            )

        if strength is not None and any(len(set(labels[train][known[train]])) < 2 for train, _ in folds):
            print(f"{name:<16} skipped: too few sources have copies with it", flush=True)
            continue
        predicted = np.zeros((len(labels), 2))
        for train, test in folds:
            predicted[test] = fitted(train[known[train]]).predict(copies.features[test])
        held_out[name] = predicted
        forests[name] = fitted(np.flatnonzero(known))
        if strength is None:
            precisions["quality (SRCC)"] = round(float(spearmanr(predicted[:, 0], labels)[0]), 3)
            print(f"{name:<16}SRCC {precisions['quality (SRCC)']}", flush=True)
            continue
        precisions[name] = round(float(average_precision_score(labels[known] == 1, predicted[known, 0])), 3)
        order = round(float(spearmanr(predicted[:, 1], strength)[0]), 3)
        print(f"{name:<16}{int(np.nansum(labels)):>6} of {known.sum():<6} average precision {precisions[name]}, "
              f"SRCC of the severity {order}", flush=True)  # fmt: skip
    if len(forests) < 2:
        raise SystemExit("no defect is present in copies of enough sources: nothing can be trained")
    defects = [name for name in held_out if name != QUALITY]
    evidence = {QUALITY: held_out[QUALITY][:, 0]} | {name: held_out[name][:, 1] for name in defects}
    rows = [
        {"clip": clip, "group": str(copies.groups[number]),
         "defects": {name: {"log_odds": round(float(log_odds(held_out[name][number, 0])), 4),
                            "present": bool(copies.present[name][number])}
                     for name in defects if not np.isnan(copies.present[name][number])},
         "evidence": {name: round(min(max(float(values[number]), 0.0), 1.0), 4) for name, values in evidence.items()}}
        for number, clip in enumerate(copies.clips)
    ]  # fmt: skip
    write_rows(predictions, rows)
    sources = len(set(copies.groups.tolist()))
    description = f"{len(copies.clips)} copies of {sources} sources; average precision on sources left out"
    export_forests(forests, copies.feature_names).save(out, f"{description}: {json.dumps(precisions)}")
    found = [value for name, value in precisions.items() if name in copies.present]
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, mean average precision {np.mean(found):.3f}")


def add_evidence(folder: Path, split: str, predictions: Path) -> None:
    """Write FOLDER/SPLIT/evidence.jsonl: the table with the column `evidence`, from forests of other sources."""
    evidence = {row["clip"]: row["evidence"] for row in read_rows(predictions)}
    rows = read_rows(folder / split / "table.jsonl")
    write_rows(folder / split / "evidence.jsonl", [{**row, "evidence": evidence[row["clip"]]} for row in rows])


def evidence_weight(folder: Path, predictions: Path) -> float:
    """Weight of the measured quality beside a model's level distribution, see `lmm_qa.model.levels.read_levels`: by the
    error of forests on the sources that they were not trained on.

    Args:
        folder: of the splits `train` and `val`.
        predictions: of `train_classifier`.
    """
    mos = {row["clip"]: row["mos"] for split in ("train", "val") for row in read_rows(folder / split / "table.jsonl")}
    low, high = SCALE
    errors = [row["evidence"][QUALITY] - (mos[row["clip"]] - low) / (high - low) for row in read_rows(predictions)]
    return round(1 / (2 * float(np.mean(np.square(errors))) * (len(LEVELS) - 1) ** 2), 2)


def export_forests(forests: Mapping[str, Forest], feature_names: Sequence[str]) -> Forests:
    """Fitted forests as arrays, both children of a node side by side: see `Forests`."""
    feature: list[int] = []
    limit: list[float] = []
    child: list[int] = []
    severity: list[float] = []
    root: list[int] = []
    target: list[int] = []

    def add_node() -> int:
        for column in (feature, limit, child, severity):
            column.append(0)
        return len(feature) - 1

    for number, forest in enumerate(forests.values()):
        for index, estimator in enumerate(forest.model.estimators_):
            tree = estimator.tree_
            target.append(number)
            root.append(add_node())
            waiting = deque([(0, root[-1])])
            while waiting:
                node, at = waiting.popleft()
                if tree.children_left[node] < 0:
                    feature[at], limit[at] = -1, float(np.ravel(tree.value[node])[0])
                    severity[at] = float(forest.strength[index][node]) if forest.strength else 0.0
                    continue
                feature[at], limit[at] = int(forest.selected[tree.feature[node]]), float(tree.threshold[node])
                child[at] = len(feature)
                waiting.extend((below, add_node()) for below in (tree.children_left[node], tree.children_right[node]))
    return Forests(
        tuple(forests), tuple(feature_names), np.array(feature, np.int16), np.array(limit, np.float32),
        np.array(child, np.int32), np.array(severity, np.float16), np.array(root, np.int32), np.array(target, np.int16),
    )  # fmt: skip
