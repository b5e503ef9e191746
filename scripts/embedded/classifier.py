"""The defect classifier: extremely randomised trees (Geurts, Ernst and Wehenkel, 2006) on the measured features.

One forest per defect of `lmm_qa.defects.vocabulary`. A first forest selects the most important features; the final one
uses these alone. Copies are encoded once more before they are measured, at rates that are common for clips that people
rate: `lmm-qa degrade` encodes with hardly any loss.
"""

from __future__ import annotations

import json
import tempfile
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from embedded.data import FACTOR, SCALE
from numpy.typing import NDArray
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.feature_selection import SelectFromModel
from sklearn.metrics import average_precision_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline

from lmm_qa.config import View
from lmm_qa.defects.classifier import Forests, log_odds
from lmm_qa.defects.features import FeatureExtractor
from lmm_qa.defects.vocabulary import reference_defects
from lmm_qa.degrade.causes import REPRODUCIBLE_X264, encode
from lmm_qa.degrade.dataset import read_clip
from lmm_qa.tables import read_rows, write_rows
from lmm_qa.training.dataset import Data, load
from lmm_qa.video.decode import read_frames

RATE_FACTORS = (9.0, 23.0)
LONGEST = 60.0  # seconds
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
        encode(frames, "libx264", options, Fraction(fps).limit_denominator(1001), str(path))
        features = read_frames(path, FeatureExtractor.sampling, (View(max_pixels=784),), FACTOR,
                               measure=FeatureExtractor).features  # fmt: skip
    if features is None:
        raise ValueError(f"{clip} is too long to be measured")
    return features


def read_copies(folder: Path, splits: Sequence[str]) -> LabelledCopies:
    """The measured copies of some splits with their labels."""
    clips: list[str] = []
    groups: list[str] = []
    features: list[NDArray[np.float32]] = []
    present: dict[str, list[float]] = {name: [] for name in reference_defects(())}
    for split in splits:
        table = {"path": f"{split}/table.jsonl", "videos": split, "scale": SCALE}
        shares = {"validation_share": 0, "calibration_share": 0}
        examples = load(Data.parse({"root": folder, "train": [table], **shares}, split), seed=0).train
        with np.load(folder / split / "features.npz") as measured:
            row = {clip: number for number, clip in enumerate(measured["clips"])}
            features.append(measured["features"][[row[example.name] for example in examples]])
            names = [str(name) for name in measured["names"]]
        for example in examples:
            clips.append(example.name)
            groups.append(str(example.group))
            found = {one.defect for one in example.found or ()}
            for name, values in present.items():
                values.append(1.0 if name in found else 0.0 if name in example.absent else np.nan)
    return LabelledCopies(clips, np.array(groups), np.concatenate(features), names,
                          {name: np.array(values) for name, values in present.items()})  # fmt: skip


def train_classifier(folder: Path, out: Path, settings: Mapping[str, Any], predictions: Path) -> None:
    """Train on all copies of the splits `train` and `val`.

    Args:
        folder: of the measured copies.
        out: classifier to write, see `lmm_qa.defects.classifier`.
        settings: the section `classifier` of model.yaml.
        predictions: JSONL to write: what forests that were trained on other sources predict for each copy.
    """
    copies = read_copies(folder, ("train", "val"))
    forests: dict[str, Pipeline] = {}
    held_out, precisions = {}, {}
    for name, labels in copies.present.items():
        known = ~np.isnan(labels)
        X, y, groups = copies.features[known], labels[known] == 1, copies.groups[known]
        folds = min(FOLDS, len(set(groups[y])), len(set(groups[~y])))
        if folds < 2:
            print(f"{name:<16} skipped: present in copies of {len(set(groups[y]))} sources", flush=True)
            continue
        model = forest(settings)
        shares = cross_val_predict(model, X, y, groups=groups, cv=GroupKFold(folds), method="predict_proba")[:, 1]
        precisions[name] = round(float(average_precision_score(y, shares)), 3)
        held_out[name] = dict(zip(np.flatnonzero(known).tolist(), log_odds(shares).tolist(), strict=True))
        forests[name] = model.fit(X, y)
        print(f"{name:<16}{y.sum():>6} of {len(y):<6} average precision {precisions[name]}", flush=True)
    if not forests:
        raise SystemExit("no defect is present in copies of two sources: nothing can be trained")
    rows = [
        {"clip": clip, "group": str(copies.groups[number]), "defects": {
            name: {"log_odds": round(found[number], 4), "present": bool(copies.present[name][number])}
            for name, found in held_out.items() if number in found}}
        for number, clip in enumerate(copies.clips)
    ]  # fmt: skip
    write_rows(predictions, rows)
    sources = len(set(copies.groups.tolist()))
    description = f"{len(copies.clips)} copies of {sources} sources; average precision on sources left out"
    export_forests(forests, copies.feature_names).save(out, f"{description}: {json.dumps(precisions)}")
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, mean average precision {np.mean([*precisions.values()]):.3f}")


def forest(settings: Mapping[str, Any]) -> Pipeline:
    """Feature selection by one forest, then another forest."""
    options = {**settings, "max_features": 0.4, "class_weight": "balanced_subsample", "random_state": 0, "n_jobs": -1}
    most = options.pop("features")
    selection = SelectFromModel(ExtraTreesClassifier(**options), max_features=most, threshold=-np.inf)
    return make_pipeline(selection, ExtraTreesClassifier(**options))


def export_forests(forests: Mapping[str, Pipeline], feature_names: Sequence[str]) -> Forests:
    """Fitted pipelines of `forest` as arrays, both children of a node side by side: see `Forests`."""
    feature: list[int] = []
    limit: list[float] = []
    child: list[int] = []
    root: list[int] = []
    defect: list[int] = []

    def add_node() -> int:
        for column in (feature, limit, child):
            column.append(0)
        return len(feature) - 1

    for number, (selection, model) in enumerate(forests.values()):
        selected = selection.get_support(indices=True)
        for estimator in model.estimators_:
            tree = estimator.tree_
            defect.append(number)
            root.append(add_node())
            waiting = deque([(0, root[-1])])
            while waiting:
                node, at = waiting.popleft()
                if tree.children_left[node] < 0:
                    feature[at], limit[at] = -1, float(tree.value[node][0][1] / tree.value[node][0].sum())
                    continue
                feature[at], limit[at] = int(selected[tree.feature[node]]), float(tree.threshold[node])
                child[at] = len(feature)
                waiting.extend((below, add_node()) for below in (tree.children_left[node], tree.children_right[node]))
    return Forests(
        tuple(forests), tuple(feature_names), np.array(feature, np.int16), np.array(limit, np.float32),
        np.array(child, np.int32), np.array(root, np.int32), np.array(defect, np.int16),
    )  # fmt: skip
