"""Grow the trees of lmm_qa/evidence.safetensors: what the features of a clip say of each defect.

    python scripts/embedded_evidence.py copies --clips CLIPS --portraits PORTRAITS -o evidence/copies
    python scripts/embedded_evidence.py measure evidence/copies
    python scripts/embedded_evidence.py measure evidence/val
    python scripts/embedded_evidence.py grow evidence/copies evidence/val --votes evidence/votes.jsonl

`copies`: of each clip of the split `train` (`index.csv` in CLIPS, see embedded_data.py) some seconds, now and then
shrunk, and of each portrait a slow move over it; with another look each round, since there are few sources and clips
differ most in their light and colours; damaged by one cause, by two, or not at all, at a strength by lot; and encoded
by x264 at a rate factor by lot, as clips that people rate are. No VMAF, so that a copy takes a second.
`measure`: the features of each copy (lmm_qa/features.py) into features.safetensors beside it; takes a set of `lmm-qa degrade` as
well, here of the clips of the split `val`. `grow`: in five folds, what trees say of the copies of sources that they
have not seen, for `embedded_defects.py fit` to calibrate by, and the average precision of that; then the trees, on all
sources, into the package. A first forest says which features it looks at most, and the one that is kept looks at those
alone: the others are chance.

`copies` goes on where it was stopped, and leaves labels.jsonl, a table of all.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from embedded_data import LUMA, camera, index_of, portraits_of_training, rows_of, run_all
from embedded_defects import average_precision, known
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file, save_file

from lmm_qa.config import Sampling, View
from lmm_qa.defects.classifier import FILE, Forests, log_odds
from lmm_qa.defects.features import FeatureExtractor
from lmm_qa.defects.vocabulary import BY_NAME, reference_defects
from lmm_qa.degrade.causes import (
    COMPRESSION,
    DEGRADATIONS,
    FACIAL,
    PICTURE,
    REPEATABLE_X264,
    TEMPORAL,
    Pixels,
    damage,
    encode,
)
from lmm_qa.degrade.full_reference import FAINT, change
from lmm_qa.ratings_io import read_rows, write_rows
from lmm_qa.video.decode import read_frames
from lmm_qa.video.face import find_face
from lmm_qa.video.probe import probe

Features = NDArray[np.float32]
KIND = {cause: number for number, kind in enumerate((FACIAL, PICTURE, COMPRESSION, TEMPORAL)) for cause in kind}
OFTEN = {
    "mouth_smear": 2, "teeth_smear": 1.5, "mouth_freeze": 3, "face_warp": 3, "background_wobble": 3, "seam": 2.5,
    "identity_drift": 2.5, "banding": 2, "colour_cast": 2.5, "bitrate_switch": 2, "stall": 1.5, "overexposure": 1.5,
    "underexposure": 1.5, "h264": 1.5, "h265": 1.5, "vp9": 1.5, "av1": 1.5,
}  # fmt: skip
"""Causes that are drawn more often: those that are the only one of their defect, or hard to see."""
HOW_MANY = (0.12, 0.63, 0.25)
"""Shares of copies with no, one and two causes."""
RATE_FACTORS = (9.0, 23.0)
SHORT_SIDES = {256: 0.1, 320: 0.1, 384: 0.2, 448: 0.2, 512: 0.2, 576: 0.1, 720: 0.1}
SEEN = 0.15
"""Share of `FAINT` that a damage changes the picture by: below, it is neither asserted nor absent."""
FACES = ("mouth", "lips", "geometry", "identity", "seam")
"""Defects that are not asserted where no face was found to damage."""
FOLDS = 5
SIGNS = 120
"""How many features a forest looks at."""
FOREST: dict[str, Any] = {
    "n_estimators": 200, "max_leaf_nodes": 48, "max_features": 0.4, "class_weight": "balanced_subsample",
    "random_state": 0, "n_jobs": -1,
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    source: Path
    still: bool
    round: int
    copies: int
    out: Path

    @property
    def name(self) -> str:
        return f"{self.source.name.replace('.', '_')}-{self.round}"


def drawn(lot: np.random.Generator, still: bool) -> list[tuple[str, float]]:
    """Causes of one copy and their strengths; two are of different kinds."""
    names = [cause for cause in DEGRADATIONS if not (still and cause == "mouth_freeze")]
    weights = np.array([OFTEN.get(cause, 1.0) for cause in names])
    count = lot.choice(3, p=HOW_MANY)
    while True:
        causes = [str(cause) for cause in lot.choice(names, count, replace=False, p=weights / weights.sum())]
        if len({KIND[cause] for cause in causes}) == count:
            break
    causes.sort(key=list(DEGRADATIONS).index)
    return [(cause, round(float(lot.uniform(0.25, 1)), 3)) for cause in causes]


def seconds_of(path: Path, lot: np.random.Generator) -> tuple[Pixels, float]:
    """Two to three seconds of a clip, from somewhere in its first twelve, shrunk to a short side by lot."""
    import av

    info = probe(path)
    count = int(min(lot.uniform(2, 3) * info.fps, 90))
    first = int(lot.integers(0, max(1, min(info.frames, int(12 * info.fps)) - count + 1)))
    shrink = min(1.0, int(lot.choice(list(SHORT_SIDES), p=list(SHORT_SIDES.values()))) / min(info.width, info.height))
    size = round(info.width * shrink), round(info.height * shrink)
    frames: list[NDArray[np.uint8]] = []
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number >= first:
                picture = Image.fromarray(np.rot90(frame.to_ndarray(format="rgb24"), -info.rotation // 90))
                frames.append(np.asarray(picture if shrink == 1 else picture.resize(size, Image.Resampling.LANCZOS)))
            if len(frames) == count:
                break
    return np.stack(frames), info.fps


def another_look(frames: Pixels, lot: np.random.Generator) -> Pixels:
    """The same clip as another camera sees it, perhaps from the other side: light, contrast, white balance and
    saturation within what nobody minds."""
    light = 1 + lot.normal(0, 0.08) + lot.normal(0, 0.03, 3)  # of each channel
    bend, contrast, saturation = np.exp(lot.normal(0, 0.12)), 1 + lot.normal(0, 0.06), lot.uniform(0.7, 1.2)
    values = (np.arange(256) / 255) ** bend
    table = np.clip(255 * (0.45 + contrast * (values - 0.45)), 0, 255)[:, None] * light
    turned = frames[:, :, ::-1] if lot.random() < 0.5 else frames
    looks = []
    for frame in turned:
        colours = table[frame, np.arange(3)].astype(np.float32)
        grey = colours @ np.array(LUMA, np.float32)
        look = np.clip(np.rint(grey[..., None] + saturation * (colours - grey[..., None])), 0, 255)
        looks.append(look.astype(np.uint8))
    return np.stack(looks)


def move_over(path: Path, lot: np.random.Generator) -> tuple[Pixels, float]:
    """A slow move over a picture."""
    picture = Image.open(path).convert("RGB")
    side, out, count = min(picture.size), 2 * int(lot.integers(128, 280)), int(lot.integers(50, 76))
    place, speed = lot.uniform(0.4, 0.6, 2), lot.normal(0, 0.02, 2)
    zoom, growth = lot.uniform(0.75, 0.95), lot.normal(0, 0.02)
    return camera(picture, side, out, count, (place, speed), (zoom, growth)), 25.0


def make(job: Job) -> list[dict[str, Any]]:
    """The copies of one source, the clean one first; their rows into NAME.json when all are there."""
    done = job.out / f"{job.name}.json"
    if done.exists():
        return list(json.loads(done.read_text()))
    lot = np.random.default_rng(zlib.crc32(job.name.encode()))
    source, fps = (move_over if job.still else seconds_of)(job.source, lot)
    if job.round:
        source = another_look(source, lot)
    face = find_face(source)
    rows: list[dict[str, Any]] = []
    for number in range(job.copies):
        damages, seed = drawn(lot, job.still) if number else [], int(lot.integers(2**31))
        frames, seen = source, []
        for cause, strength in damages:
            step = damage(frames, cause, strength, seed, fps=fps, face=face)
            seen.append(round(change(frames, step, fps) / (FAINT * strength), 3))
            frames = step.frames
        clip = f"{job.name}--{number:02d}.mp4"
        options = {**REPEATABLE_X264, "crf": f"{lot.uniform(*RATE_FACTORS):.1f}"}
        encode(frames, "libx264", options, Fraction(fps).limit_denominator(1001), str(job.out / clip))
        causes, strengths = [cause for cause, _ in damages], [strength for _, strength in damages]
        rows.append({"clip": clip, "group": job.source.name, "still": job.still, "causes": causes,
                     "strengths": strengths, "seen": seen, "face_found": face.found})  # fmt: skip
    partial = done.with_suffix(".tmp")
    partial.write_text(json.dumps(rows))
    partial.replace(done)
    return rows


def copies(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    index = index_of(args.clips)
    train = [args.clips / row["clip"] for row in index if row["split"] == "train"]
    portraits = portraits_of_training(args.portraits, index) if args.portraits else []
    jobs = [Job(path, False, number, 12, args.output) for number in range(args.rounds) for path in train]
    jobs += [Job(path, True, number, 8, args.output) for number in range(args.rounds) for path in portraits]
    jobs.sort(key=lambda job: (job.round, zlib.crc32(job.name.encode())))
    run_all(make, jobs, args.workers)
    write_rows(args.output / "labels.jsonl", rows_of(args.output))


def signs_of(path: Path) -> dict[str, float]:
    seen = read_frames(path, Sampling(strategy="pairs", frames=12), (View(max_pixels=784),), 28, measure=FeatureExtractor)
    if seen.features is None:
        raise SystemExit(f"{path} is too long to be measured")
    return seen.features


def measure(args: argparse.Namespace) -> None:
    clips = [row["clip"] for row in read_rows(args.folder / "labels.jsonl")]
    measured: list[list[float]] = []
    with ProcessPoolExecutor(args.workers) as pool:
        for number, features in enumerate(pool.map(signs_of, [args.folder / clip for clip in clips], chunksize=4)):
            measured.append([*features.values()])
            if number % 200 == 0:
                print(f"{number}/{len(clips)} copies", flush=True)
    kept = {"features": np.array(measured, np.float32)}
    names = {"names": json.dumps([*features]), "clips": json.dumps(clips)}
    save_file(kept, args.folder / "features.safetensors", names)


def read_signs(folder: Path) -> tuple[Features, list[str], list[dict[str, Any]]]:
    """The features of the copies in a folder, (copies, features), their names, and the row of each copy."""
    from safetensors import safe_open

    file = folder / "features.safetensors"
    with safe_open(file, framework="numpy") as stored:
        names, clips = (json.loads(stored.metadata()[key]) for key in ("names", "clips"))
    rows = {row["clip"]: row for row in read_rows(folder / "labels.jsonl")}
    return load_file(file)["features"], names, [rows[clip] for clip in clips]


def there_or_not(row: dict[str, Any]) -> dict[str, bool | None]:
    """Which defects a copy has; what hardly changed the picture, or a face that was not found, is not asserted."""
    if "seen" not in row:
        return known(row)
    found = reference_defects(zip(row["causes"], row["strengths"], strict=True))
    for cause, seen in zip(row["causes"], row["seen"], strict=True):
        if seen < SEEN:
            found |= {name: None for name in found if cause in BY_NAME[name].causes}
    if not row["face_found"]:
        found |= {name: None for name in FACES if found[name]}
    return found | ({"lips": None} if row["still"] else {})


def grown(features: Features, there: NDArray[np.bool_]) -> tuple[Any, NDArray[np.intp]]:
    """A forest, and which features it looks at."""
    from sklearn.ensemble import ExtraTreesClassifier

    first = ExtraTreesClassifier(**FOREST).fit(features, there)
    chosen = np.sort(np.argsort(-first.feature_importances_, kind="stable")[:SIGNS])
    return ExtraTreesClassifier(**FOREST).fit(features[:, chosen], there), chosen


def folds(groups: Sequence[str]) -> Iterator[NDArray[np.bool_]]:
    """Which copies are left out, all of a source together."""
    names = sorted(set(groups))
    order = np.random.default_rng(0).permutation(len(names))
    fold = {names[at]: number % FOLDS for number, at in enumerate(order)}
    of = np.array([fold[group] for group in groups])
    return (of == number for number in range(FOLDS))


def grow(args: argparse.Namespace) -> None:
    read = [read_signs(folder) for folder in args.folders]
    names = read[0][1]
    if any(other != names for _, other, _ in read):
        raise SystemExit("the folders were not measured by the same program: measure them again")
    features = np.concatenate([each for each, _, _ in read])
    rows = [row for _, _, each in read for row in each]
    truths = [there_or_not(row) for row in rows]
    groups = [Path(row["group"]).name for row in rows]
    kept: list[tuple[str, Any, NDArray[np.intp]]] = []
    precisions, votes = {}, {}
    for name in truths[0]:
        sure = np.array([each[name] is not None for each in truths])
        there = np.array([bool(each[name]) for each in truths])
        share = np.zeros(len(rows))
        for left_out in folds(groups):
            forest, chosen = grown(features[sure & ~left_out], there[sure & ~left_out])
            share[left_out] = forest.predict_proba(features[left_out][:, chosen])[:, 1]
        precisions[name] = round(average_precision(share[sure], there[sure]), 3)
        votes[name] = log_odds(share)
        print(f"{name:<16}{there[sure].sum():>5} of {sure.sum():<6}{precisions[name]}", flush=True)
        kept.append((name, *grown(features[sure], there[sure])))
    print(f"mean {np.mean([*precisions.values()]):.3f}")
    data = f"{len(rows)} copies of {len(set(groups))} sources: scripts/embedded_evidence.py"
    forests = as_arrays(kept, names)
    forests.save(args.output, f"{data}; average precision on sources left out: {json.dumps(precisions)}")
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")
    write_rows(args.votes, [
        {"clip": row["clip"], "group": group, "known": what,
         "log_odds": {name: round(float(odds[number]), 4) for name, odds in votes.items()}}
        for number, (row, group, what) in enumerate(zip(rows, groups, truths, strict=True))
    ])  # fmt: skip


def as_arrays(kept: Sequence[tuple[str, Any, NDArray[np.intp]]], names: list[str]) -> Forests:
    """The trees of scikit-learn, children beside each other: see `lmm_qa.defects.classifier.Forests`.

    Args:
        kept: a defect's name, its forest, and which of the features that one looks at.
        names: of all features.
    """
    sign: list[int] = []
    limit: list[float] = []
    child: list[int] = []
    root: list[int] = []
    defect: list[int] = []

    def add() -> int:
        """A node, to be filled in later."""
        for column in (sign, limit, child):
            column.append(0)
        return len(sign) - 1

    for number, (_, forest, chosen) in enumerate(kept):
        for grown_tree in forest.estimators_:
            tree = grown_tree.tree_
            defect.append(number)
            root.append(add())
            waiting = deque([(0, root[-1])])
            while waiting:
                node, at = waiting.popleft()
                if tree.children_left[node] < 0:
                    sign[at], limit[at] = -1, float(tree.value[node][0][1] / tree.value[node][0].sum())
                    continue
                sign[at], limit[at], child[at] = int(chosen[tree.feature[node]]), float(tree.threshold[node]), len(sign)
                waiting.extend((below, add()) for below in (tree.children_left[node], tree.children_right[node]))
    return Forests(
        tuple(name for name, _, _ in kept), tuple(names), np.array(sign, np.int16), np.array(limit, np.float32),
        np.array(child, np.int32), np.array(root, np.int32), np.array(defect, np.int16),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(required=True)
    sub = jobs.add_parser("copies")
    sub.set_defaults(job=copies)
    sub.add_argument("--clips", type=Path, required=True)
    sub.add_argument("--portraits", type=Path)
    sub.add_argument("--rounds", type=int, default=2, help="times that each source is gone through")
    sub.add_argument("-o", "--output", type=Path, required=True)
    sub.add_argument("--workers", type=int, default=2)
    sub = jobs.add_parser("measure")
    sub.set_defaults(job=measure)
    sub.add_argument("folder", type=Path)
    sub.add_argument("--workers", type=int, default=2)
    sub = jobs.add_parser("grow")
    sub.set_defaults(job=grow)
    sub.add_argument("folders", type=Path, nargs="+")
    sub.add_argument("--votes", type=Path, required=True, help="JSONL to write: what unseen copies were taken for")
    sub.add_argument("-o", "--output", type=Path, default=FILE)
    args = parser.parse_args()
    args.job(args)


if __name__ == "__main__":
    main()
