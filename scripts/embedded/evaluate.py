"""Evaluate raters side by side, on the same degraded copies of clips that they were not trained on.

    lmm-qa degrade CLIPS -o test/labels.jsonl --strengths 0.1,0.3,0.5,0.7,0.9 --pairs 2 --length 3
    python scripts/embedded/evaluate.py test/labels.jsonl --rater old=embedded --rater new=RATER \\
        --classifier new=CLASSIFIER --real REAL_CLIPS --work runs/evaluation -o report.json --markdown table.md

A rater is `embedded`, anything that `lmm-qa rate --model` takes, or a file of ratings (WORK/NAME.jsonl of an earlier
run). Each reads all files as `lmm-qa rate --defects` does; its rows are kept in WORK/NAME.jsonl, and the same command
resumes. Sections of the report:

    Agreement      SRCC, PLCC after the logistic, and their mean (`lmm_qa.evaluation.metrics`) with the labels: over all
                   copies, over those that have only causes of a set, and the mean SRCC within a source
    Within a cause SRCC over the copies with this cause alone and the clean copies of the same sources
    Ladders        Kendall's tau-b of strength (clean: 0) and falling score within each source and cause; constant: 0
    Sameness       change of the score, of 5 levels, when nothing visible changes: see `VARIANTS`; `phase`: other frames
                   of the same file, half a sampling step away
    Profile        average precision of each defect; for a cause of the head, of its defect on copies with it alone
                   against all copies without the defect
    No contradiction  of the copies whose profile is sure of a defect that was made strongly: share whose level is not
                   above the middle one; and the same of their labels
    Times          both ends of a stall, of buffering or of a bit-rate switch are within half a second
    Explanations   (--explain) precision and recall of the defects that they name; share written by the model
    Real clips     (--real) spread of the scores

Intervals contain 95% of 1,000 resamples of the sources (of real clips: of the clips), the same ones for all raters;
differences are to the first rater. A measure with a target says whether it is met.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau, spearmanr

sys.path.insert(0, str(Path(__file__).parents[1]))

from embedded.data import mirror, reencode, trim

from lmm_qa import Rater
from lmm_qa.defects.diagnosis import profile_id
from lmm_qa.defects.explanation import mentioned_defects
from lmm_qa.defects.vocabulary import DEFECTS
from lmm_qa.degrade.causes import (
    COMPRESSION,
    DEGRADATIONS,
    FACIAL,
    PICTURE,
    TEMPORAL,
)
from lmm_qa.degrade.dataset import REQUIRED_COLUMNS
from lmm_qa.errors import ClipError, LmmQaError, ScoresError
from lmm_qa.evaluation import metrics
from lmm_qa.files.tables import OUTPUT_SUFFIXES, Row, read_rows
from lmm_qa.manifest import Clip, content_id, expand
from lmm_qa.model.rater_plan import RaterPlan, plan_rater
from lmm_qa.ratings.io import RatingsWriter, read_ratings
from lmm_qa.ratings.rows import Details
from lmm_qa.training.dataset import Data, load
from lmm_qa.video.measurement import classifier

Floats = NDArray[np.float64]

MAIN_CAUSES = ("blur", "noise", "rescale", "h264", "h265", "stall", "drop")
SETS: Mapping[str, Collection[str]] = {"all causes": DEGRADATIONS, "seven main causes": MAIN_CAUSES, "head": FACIAL}
GROUPS = {"head": FACIAL, "picture": PICTURE, "codec": COMPRESSION, "time": TEMPORAL}
TIMED_CAUSES = ("stall", "buffering", "bitrate_switch")  # each is also the name of its defect

SRCC_TARGETS = {"all causes": 0.7, "seven main causes": 0.85}
HEAD_CAUSE_TARGET = 0.5  # SRCC within a cause of the head that the profile knows: at or above the next line
KNOWN = 0.7  # average precision
LADDER_TARGETS = {"head": 0.7, "picture": 0.9, "codec": 0.9}
SAMENESS_TARGET = 0.95
PROFILE_TARGET = 0.85
NO_CONTRADICTION_TARGET = 0.9

RESAMPLES = 1000
CONFIDENCE = 0.95
MIN_COPIES = 3  # for a correlation within a source
MOST_CLEAN = 40  # clean copies of which variants are made
NEGLIGIBLE = 0.15  # change of the score, on a scale from 1 to 5
SURE, STRONG = 0.9, 0.6  # probability of a defect, strength of its cause
TOLERANCE = 0.5  # seconds
PHASE = "phase"

Truth = Mapping[str, bool]
"""Whether a copy has each defect; defects that are neither present nor absent are left out."""
Ratings = Mapping[str, Row]
"""Rating rows by the name of the clip."""


@dataclass(frozen=True)
class Measure:
    """A number about a rater."""

    section: str
    name: str
    n: int
    """Number of copies, ladders, clips ... that it is about."""
    value: float
    resampled: Floats | None = None
    """(RESAMPLES,) the same over resamples of the sources, NaN where it is undefined; None: no interval."""
    target: float | None = None
    """Least value that is aimed at."""

    def interval(self) -> tuple[float, float] | None:
        """Percentiles of the resamples."""
        defined = self.resampled[np.isfinite(self.resampled)] if self.resampled is not None else ()
        if not len(defined):
            return None
        low, high = np.quantile(defined, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
        return float(low), float(high)

    def __sub__(self, other: Measure) -> Measure:
        """The paired difference of two raters."""
        resampled = None
        if self.resampled is not None and other.resampled is not None:
            resampled = self.resampled - other.resampled
        return replace(self, value=self.value - other.value, resampled=resampled, target=None)


@dataclass(frozen=True)
class Copies:
    """Degraded copies, and what is known about them."""

    rows: Sequence[Row]
    """Of the manifest of `lmm-qa degrade`."""
    truths: Sequence[Truth]

    @cached_property
    def mos(self) -> Floats:
        return np.array([row["mos"] for row in self.rows], dtype=np.float64)

    @cached_property
    def sources(self) -> NDArray[np.object_]:
        return np.array([row["source"] for row in self.rows], dtype=object)

    @cached_property
    def weights(self) -> NDArray[np.int64]:
        """(RESAMPLES, n) how often each resample contains each copy."""
        return source_weights(self.sources)

    def single(self, cause: str) -> list[int]:
        """Numbers of the copies with this cause alone."""
        return [number for number, row in enumerate(self.rows) if row["causes"] == [cause]]

    def clean(self, sources: Collection[str]) -> list[int]:
        """Numbers of the clean copies of these sources."""
        return [number for number, row in enumerate(self.rows) if not row["causes"] and row["source"] in sources]


# --- the report ------------------------------------------------------------------------------------------------------


def evaluate(
    raters: Mapping[str, str | Path | None],
    labels: Path,
    work: Path,
    *,
    real: Path | None = None,
    explain: bool = False,
    classifiers: Mapping[str, Path] | None = None,
    workers: int = 2,
) -> dict[str, Any]:
    """The report on some raters, ready for JSON.

    Args:
        raters: by name; each as for `lmm-qa rate --model`, None for the embedded one, or a file of ratings.
        labels: manifest of `lmm-qa degrade`; the copies are in its folder.
        work: folder for ratings and variants.
        real: folder of clips, for the spread of the scores.
        explain: let the raters write explanations.
        classifiers: the defect classifier of a rater, if it is not that of the package.
        workers: number of decoding processes.

    Raises:
        LmmQaError: a rater cannot be loaded, or has no rating of a copy; WORK has ratings of another rater.
    """
    rows = read_rows(labels)
    if lacking := [column for column in REQUIRED_COLUMNS if any(column not in row for row in rows)]:
        raise ScoresError(f"{labels} is no manifest of degraded copies: it lacks {', '.join(lacking)}")
    copies = [Clip(labels.parent / row["clip"], row["clip"], labels.name) for row in rows]
    clean = [clip for clip, row in zip(copies, rows, strict=True) if not row["causes"]][:MOST_CLEAN]
    variants = write_variants(clean, work / "variants")
    real_clips = [replace(clip, name=f"real/{clip.name}") for clip in expand([real])] if real else []
    details = Details(defects=True, explanation=explain)
    ratings: dict[str, Ratings] = {}
    other_phase: dict[str, Ratings] = {}
    for name, model in raters.items():
        with defect_classifier((classifiers or {}).get(name)):
            if model is not None and Path(model).suffix in OUTPUT_SUFFIXES and Path(model).is_file():
                ratings[name], other_phase[name] = read_files(Path(model), copies)
                continue
            plan = plan_rater(model)
            everything = [*copies, *(clip for each in variants.values() for clip in each), *real_clips]
            ratings[name] = rate(plan, everything, work / f"{name}.jsonl", details, workers)
            shifted = shift_phase(plan)
            other_phase[name] = (
                rate(shifted, clean, work / f"{name}.{PHASE}.jsonl", Details(), workers) if shifted else {}
            )
    truths = read_truths(labels)
    common = [row for row in rows if all(is_rated(each, row["clip"]) for each in ratings.values())]
    known = Copies(common, [truths[row["clip"]] for row in common])
    measures = {
        name: [
            *measure_copies(known, [each[row["clip"]] for row in common]),
            *sameness(each, other_phase[name], [clip.name for clip in clean], variants),
            *real_spread(each, [clip.name for clip in real_clips]),
        ]
        for name, each in ratings.items()
    }
    return {
        "labels": labels.name,
        "copies": len(common),
        "sources": len(set(known.sources)),
        "resamples": RESAMPLES,
        "raters": {name: describe(raters[name], each, copies) for name, each in ratings.items()},
        "measures": compare(measures),
        "real_clips": [
            {"clip": clip.name.removeprefix("real/")}
            | {name: {key: row.get(key) for key in ("score", "level", "std")}
               for name, each in ratings.items() if (row := each.get(clip.name))}
            for clip in real_clips
        ],
    }  # fmt: skip


def describe(model: str | Path | None, ratings: Ratings, copies: Sequence[Clip]) -> dict[str, Any]:
    """A rater, and the clips that it could not rate."""
    failed = {clip: str(row["error"]) for clip, row in ratings.items() if row.get("error") is not None}
    ids = sorted({ratings[clip.name]["rater_id"] for clip in copies})
    return {"model": str(model or "embedded"), "rater_id": ", ".join(ids), "failed": failed}


def measure_copies(copies: Copies, rated: Sequence[Row]) -> Iterator[Measure]:
    """All measures of a rater that need only the copies."""
    scores = np.array([row["score"] for row in rated], dtype=np.float64)
    precisions = [*profile_precision(copies, rated)]
    by_name = {measure.name: measure.value for measure in precisions}
    yield from agreement(copies, scores)
    yield from agreement_within_causes(copies, scores, {cause for cause in FACIAL if by_name.get(cause, 0) > KNOWN})
    yield from ladders(copies, scores)
    yield from precisions
    yield from no_contradiction(copies, rated)
    yield from times(copies, rated)
    yield from explanations(copies, rated)


def compare(measures: Mapping[str, Sequence[Measure]]) -> list[dict[str, Any]]:
    """One entry for each measure that some rater has, with all raters and the differences to the first one."""
    by_rater = {rater: {(one.section, one.name): one for one in each} for rater, each in measures.items()}
    first = next(iter(by_rater))
    keys = [*dict.fromkeys(key for each in by_rater.values() for key in each)]
    order = [*dict.fromkeys(section for section, _ in keys)]
    return [
        {
            "section": key[0],
            "measure": key[1],
            "values": {rater: numbers(each[key]) for rater, each in by_rater.items() if key in each},
            "differences": {
                rater: numbers(each[key] - by_rater[first][key])
                for rater, each in by_rater.items()
                if rater != first and key in each and key in by_rater[first]
            },
        }
        for key in sorted(keys, key=lambda key: order.index(key[0]))
    ]


def numbers(measure: Measure) -> dict[str, Any]:
    """A measure as plain data."""
    low, high = measure.interval() or (None, None)
    found = {"value": measure.value, "low": low, "high": high}
    rounded: dict[str, Any] = {key: None if value is None else round(value, 4) for key, value in found.items()}
    if measure.target is not None:
        rounded |= {"target": measure.target, "met": measure.value >= measure.target}
    return rounded | {"n": measure.n}


def markdown(report: Mapping[str, Any]) -> str:
    """The report as one table."""
    raters = list(report["raters"])
    columns = ["", "n", "target", *raters, *(f"{rater} - {raters[0]}" for rater in raters[1:])]
    lines = [f"{report['copies']} copies of {report['sources']} sources; 95% intervals over sources in brackets.", ""]
    lines += [f"- {name}: {one['model']}, rater {one['rater_id']}, {len(one['failed'])} clips failed"
              for name, one in report["raters"].items()]  # fmt: skip
    lines += ["", f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    section = ""
    for one in report["measures"]:
        if one["section"] != section:
            section = one["section"]
            lines.append(f"| **{section}** {'| ' * (len(columns) - 1)}|")
        values = one["values"]
        counts = " / ".join(dict.fromkeys(str(each["n"]) for each in values.values()))
        target = next((f"{each['target']:.2f}" for each in values.values() if "target" in each), "")
        cells = [cell(values.get(rater)) for rater in raters]
        cells += [cell(one["differences"].get(rater), "+.2f") for rater in raters[1:]]
        lines.append(f"| {' | '.join([one['measure'], counts, target, *cells])} |")
    return "\n".join(lines) + "\n"


def cell(numbers: Mapping[str, Any] | None, form: str = ".2f") -> str:
    """`0.53 [0.46, 0.59] not met`."""
    if numbers is None:
        return "-"
    between = "" if numbers["low"] is None else f" [{numbers['low']:{form}}, {numbers['high']:{form}}]"
    met = {None: "", True: " met", False: " **not met**"}[numbers.get("met")]
    return f"{numbers['value']:{form}}{between}{met}"


# --- rating ----------------------------------------------------------------------------------------------------------


def rate(plan: RaterPlan, clips: Sequence[Clip], journal: Path, details: Details, workers: int) -> Ratings:
    """The rows of all clips. They are appended to a file, and not made again."""
    profile = profile_id(plan.source, details.answers_from) if details.profile else None
    names = [clip.name for clip in clips]
    with RatingsWriter(journal, names, plan.rater_id, needs=details.columns, profile_id=profile) as writer:
        missing = [clip for clip in clips if not resumed(writer, clip)]
        print(f"{journal.name}: {len(missing)} of {len(clips)} clips to rate", flush=True)
        if missing:
            results = Rater.from_plan(plan).rate_all(missing, details=details, workers=workers)
            for number, result in enumerate(results, 1):
                writer.write(result.to_row())
                if number % 100 == 0:
                    print(f"{journal.name}: {number} of {len(missing)} rated", flush=True)
    return {row["clip"]: row for row in writer.rows}


def resumed(writer: RatingsWriter, clip: Clip) -> bool:
    """Whether an earlier run rated a clip."""
    with suppress(ClipError):  # it gets a row with this error
        return writer.resumes and writer.resume(clip.name, content_id(clip.path)) is not None
    return False


def read_files(path: Path, copies: Sequence[Clip]) -> tuple[Ratings, Ratings]:
    """The rows of an earlier run: of all clips, and of those seen at another phase, if they are there."""
    ratings = {row["clip"]: row for row in read_ratings(path)}
    if missing := [clip.name for clip in copies if clip.name not in ratings]:
        raise ScoresError(f"{path} lacks {len(missing)} of the copies, such as {missing[0]}")
    other = path.with_name(f"{path.stem}.{PHASE}{path.suffix}")
    return ratings, {row["clip"]: row for row in read_ratings(other)} if other.exists() else {}


def shift_phase(plan: RaterPlan) -> RaterPlan | None:
    """The same rater, with frames from half a sampling step away; None if its sampling has no phase."""
    sampling = plan.settings.sampling
    if sampling.strategy == "linspace":
        return None
    shifted = sampling.model_copy(update={"phase": (sampling.phase + 0.5) % 1})
    return replace(plan, settings=plan.settings.override(sampling=shifted))


@contextmanager
def defect_classifier(file: Path | None) -> Iterator[None]:
    """Within the context, profiles are made with this classifier; None: with that of the package."""
    before = classifier.FILE
    classifier.FILE = file or before
    try:
        yield
    finally:
        classifier.FILE = before


def is_rated(ratings: Ratings, clip: str) -> bool:
    """Whether there is a score."""
    return ratings.get(clip, {}).get("score") is not None


def read_truths(labels: Path) -> dict[str, Truth]:
    """The reference defects of each copy in a manifest, by its name."""
    rows = read_rows(labels)
    table = {"path": str(labels.absolute()), "videos": str(labels.parent.absolute()), "scale": rows[0]["scale"]}
    data = Data.parse({"train": [table], "validation_share": 0, "calibration_share": 0}, str(labels))
    return {
        example.name: {one.defect: True for one in example.found or ()} | dict.fromkeys(example.absent, False)
        for example in load(data, seed=0).train
    }


# --- variants --------------------------------------------------------------------------------------------------------


def remux(clip: Path, out: Path) -> None:
    """Copy the packets into a Matroska file."""
    with av.open(str(clip)) as source, av.open(str(out), mode="w") as container:
        stream = source.streams.video[0]
        copied = container.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is not None:  # not the empty packet at the end
                packet.stream = copied
                container.mux(packet)


VARIANTS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "mirrored": (mirror, ".mp4"),
    "trimmed": (trim, ".mp4"),
    "reencoded": (reencode, ".mp4"),
    "remuxed": (remux, ".mkv"),
}
"""How to write a clip that shows the same, and its suffix."""


def write_variants(clips: Sequence[Clip], folder: Path) -> dict[str, list[Clip]]:
    """Write the variants that do not exist yet; those of each kind, in the order of the clips."""
    variants: dict[str, list[Clip]] = {}
    for kind, (write, suffix) in VARIANTS.items():
        paths = [(folder / kind / clip.name).with_suffix(suffix) for clip in clips]
        for clip, path in zip(clips, paths, strict=True):
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                partial_file = path.with_name(f".{path.name}")
                write(clip.path, partial_file)
                partial_file.replace(path)
        variants[kind] = [
            Clip(path, variant_name(kind, clip.name), kind) for clip, path in zip(clips, paths, strict=True)
        ]
    return variants


def variant_name(kind: str, clip: str) -> str:
    """Name of a variant in rating rows."""
    return f"variants/{kind}/{clip}"


# --- resampling ------------------------------------------------------------------------------------------------------


def source_weights(sources: Sequence[str] | NDArray[np.object_]) -> NDArray[np.int64]:
    """(RESAMPLES, n): how often each resample of the sources contains each of n items, by the item's source."""
    index = {source: number for number, source in enumerate(dict.fromkeys(sources))}
    drawn = np.random.default_rng(0).integers(0, len(index), (RESAMPLES, len(index)))
    counts = np.stack([np.bincount(row, minlength=len(index)) for row in drawn])
    return counts[:, [index[source] for source in sources]]


def ratio(section: str, name: str, parts: Sequence[float], wholes: Sequence[float], weights: NDArray[np.int64],
          target: float | None = None, n: int | None = None) -> Iterator[Measure]:  # fmt: skip
    """Sum of the parts / sum of the wholes; nothing if the latter is 0.

    Args:
        parts, wholes: (n,) of each item.
        weights: (RESAMPLES, n).
    """
    part, whole = np.asarray(parts, dtype=np.float64), np.asarray(wholes, dtype=np.float64)
    if not len(whole) or not whole.sum():
        return
    below = weights @ whole
    resampled = np.divide(weights @ part, below, out=np.full(len(below), np.nan), where=below > 0)
    yield Measure(section, name, len(part) if n is None else n, float(part.sum() / whole.sum()),
                  several(weights, resampled), target)  # fmt: skip


def mean(section: str, name: str, values: Sequence[float], sources: Sequence[str], target: float | None = None,
         n: int | None = None) -> Iterator[Measure]:  # fmt: skip
    """Mean of the values of items, with the source of each; nothing without items."""
    if len(values):
        yield from ratio(section, name, values, [1.0] * len(values), source_weights(sources), target, n)


def statistic(section: str, name: str, function: Callable[[Any], Any], values: Floats,
              weights: NDArray[np.int64]) -> Measure:  # fmt: skip
    """Any function of the values of items."""
    resampled = np.array([function(np.repeat(values, row)) for row in weights], dtype=np.float64)
    return Measure(section, name, len(values), float(function(values)), several(weights, resampled))


def several(weights: NDArray[np.int64], resampled: Floats) -> Floats | None:
    """None if there is only one source, which has no interval."""
    return resampled if np.ptp(weights) else None


# --- scores ----------------------------------------------------------------------------------------------------------


def agreement(copies: Copies, scores: Floats) -> Iterator[Measure]:
    """Correlation with the labels: over sets of causes, and within a source."""
    section = "Agreement"
    for name, causes in SETS.items():
        chosen = [number for number, row in enumerate(copies.rows) if set(row["causes"]) <= set(causes)]
        for metric, label in {"srcc": "SRCC", "plcc_fit": "PLCC", "main": "main score"}.items():
            target = SRCC_TARGETS.get(name) if metric == "srcc" else None
            yield from correlation(section, f"{label}, {name}", metric, copies, scores, chosen, target)
        within = {
            source: rank_correlation(scores[numbers], copies.mos[numbers])
            for source, numbers in grouped(copies.sources, chosen).items()
            if len(numbers) >= MIN_COPIES and np.ptp(copies.mos[numbers]) > 0
        }
        yield from mean(section, f"mean SRCC within a source, {name}", [*within.values()], [*within])


def agreement_within_causes(copies: Copies, scores: Floats, known: Collection[str]) -> Iterator[Measure]:
    """SRCC within each cause.

    Args:
        known: causes with a target.
    """
    for cause in DEGRADATIONS:
        degraded = copies.single(cause)
        chosen = [*copies.clean({copies.sources[number] for number in degraded}), *degraded]
        target = HEAD_CAUSE_TARGET if cause in known else None
        yield from correlation("Within a cause: SRCC", cause, "srcc", copies, scores, chosen, target)


def correlation(section: str, name: str, metric: str, copies: Copies, scores: Floats, chosen: Sequence[int],
                target: float | None) -> Iterator[Measure]:  # fmt: skip
    """One of `lmm_qa.evaluation.metrics.METRICS` on some copies; nothing where it is undefined."""
    units = copies.sources[list(chosen)]
    with suppress(ScoresError):
        found = metrics.bootstrap(scores[list(chosen)], copies.mos[list(chosen)], [metric], units=units,
                                  resamples=RESAMPLES)  # fmt: skip
        resampled = found.resampled[metric] if len(set(units)) > 1 else None
        yield Measure(section, name, len(chosen), found.values[metric], resampled, target)


def rank_correlation(scores: Floats, mos: Floats) -> float:
    """SRCC; equal scores order nothing."""
    return float(spearmanr(scores, mos).statistic) if len(scores) and np.ptp(scores) > 0 else 0.0


def ladders(copies: Copies, scores: Floats) -> Iterator[Measure]:
    """Whether scores fall with the strength: mean of Kendall's tau-b over the ladders of a group, and of a cause."""
    section = "Ladders: Kendall's tau"
    found = {cause: taus(copies, scores, cause) for cause in DEGRADATIONS}
    group_of = {cause: group for group, causes in GROUPS.items() for cause in causes}
    for group, causes in GROUPS.items():
        pairs = [pair for cause in causes for pair in found[cause].items()]
        values, sources = [value for _, value in pairs], [source for source, _ in pairs]
        yield from mean(section, f"causes of group {group}", values, sources, LADDER_TARGETS.get(group))
    for cause, by_source in found.items():
        target = LADDER_TARGETS.get(group_of[cause])
        yield from mean(section, cause, [*by_source.values()], [*by_source], target)


def taus(copies: Copies, scores: Floats, cause: str) -> dict[str, float]:
    """Kendall's tau-b between strength and falling score, for each source with a clean copy and two strengths."""
    found = {}
    for source, numbers in grouped(copies.sources, copies.single(cause)).items():
        ladder = [*copies.clean({source})[:1], *numbers]
        strengths = [max(copies.rows[number]["strengths"], default=0.0) for number in ladder]
        if 0.0 in strengths and len(set(strengths)) >= MIN_COPIES:
            fall = -scores[ladder]
            found[source] = float(kendalltau(strengths, fall).statistic) if np.ptp(fall) > 0 else 0.0
    return found


def grouped(sources: NDArray[np.object_], chosen: Sequence[int]) -> dict[str, list[int]]:
    """The chosen numbers by their source."""
    groups: dict[str, list[int]] = defaultdict(list)
    for number in chosen:
        groups[sources[number]].append(number)
    return groups


def sameness(ratings: Ratings, other_phase: Ratings, clean: Sequence[str], variants: Collection[str]
             ) -> Iterator[Measure]:  # fmt: skip
    """How far the score moves when a clip shows the same thing."""
    for kind in (*variants, PHASE):
        same = other_phase if kind == PHASE else ratings
        names = [(clip, clip if kind == PHASE else variant_name(kind, clip)) for clip in clean]
        pairs = [(ratings[one], same[other]) for one, other in names
                 if is_rated(ratings, one) and is_rated(same, other)]  # fmt: skip
        if not pairs:
            continue
        moved = np.array([abs(one["score"] - other["score"]) * 4 / (one["scale"][1] - one["scale"][0])
                          for one, other in pairs])  # fmt: skip
        section, weights = "Sameness", source_weights([str(number) for number in range(len(moved))])
        yield from ratio(section, f"{kind}: share within {NEGLIGIBLE}", moved <= NEGLIGIBLE, np.ones(len(moved)),
                         weights, SAMENESS_TARGET)  # fmt: skip
        yield statistic(section, f"{kind}: median change", np.median, moved, weights)
        yield Measure(section, f"{kind}: largest change", len(moved), float(moved.max()))


def real_spread(ratings: Ratings, clips: Sequence[str]) -> Iterator[Measure]:
    """How far apart the scores of real clips are."""
    scores = np.array([ratings[clip]["score"] for clip in clips if is_rated(ratings, clip)])
    if not len(scores):
        return
    section, weights = "Real clips: score", source_weights([str(number) for number in range(len(scores))])
    yield Measure(section, "minimum", len(scores), float(scores.min()))
    for share, name in {0.25: "first quartile", 0.5: "median", 0.75: "third quartile"}.items():
        yield statistic(section, name, partial(np.quantile, q=share), scores, weights)
    yield Measure(section, "maximum", len(scores), float(scores.max()))
    yield statistic(section, "standard deviation", np.std, scores, weights)


# --- defects ---------------------------------------------------------------------------------------------------------


def profile_precision(copies: Copies, rated: Sequence[Row]) -> Iterator[Measure]:
    """Average precision of each defect that is judged on all copies, and that some have and others do not."""
    section = "Profile: average precision"
    found: list[Measure] = []
    for defect in DEFECTS:
        found += precision(section, defect.name, defect.name, copies, rated, range(len(rated)))
    if found:
        resampled = [one.resampled for one in found if one.resampled is not None]
        defined = np.array(resampled) if len(resampled) == len(found) else None
        yield Measure(section, "mean over the defects", len(found), float(np.mean([one.value for one in found])),
                      None if defined is None else np.nanmean(defined, axis=0), PROFILE_TARGET)  # fmt: skip
    yield from found
    for cause in FACIAL:
        single = set(copies.single(cause))
        for defect in DEFECTS:
            if cause in defect.causes:
                chosen = [number for number, truth in enumerate(copies.truths)
                          if number in single or truth.get(defect.name) is False]  # fmt: skip
                yield from precision(section, cause, defect.name, copies, rated, chosen)


def precision(section: str, name: str, defect: str, copies: Copies, rated: Sequence[Row], chosen: Sequence[int]
              ) -> Iterator[Measure]:  # fmt: skip
    """Average precision of a defect on some copies."""
    numbers = [number for number in chosen if defect in copies.truths[number]]
    present = np.array([copies.truths[number][defect] for number in numbers], dtype=bool)
    values = [(rated[number].get("defects") or {}).get(defect) for number in numbers]
    if None in values or len(set(present)) < 2:
        return
    weights = copies.weights[:, numbers]
    value = average_precision(present, np.array(values), np.ones((1, len(numbers)), dtype=np.int64))[0]
    yield Measure(section, name, int(present.sum()), float(value),
                  several(copies.weights, average_precision(present, np.array(values), weights)))  # fmt: skip


def average_precision(present: NDArray[np.bool_], values: Floats, weights: NDArray[np.int64]) -> Floats:
    """`sklearn.metrics.average_precision_score` with each row of (B, n) sample weights at once, (B,); NaN where no item
    that is present has a weight.

    A call for each resample would take a minute for each rater.
    """
    order = np.argsort(-values, kind="stable")
    last = np.flatnonzero(np.diff(values[order], append=np.nan) != 0)  # of the items with the same value
    hits = np.cumsum(weights[:, order] * present[order], axis=1)[:, last]
    named = np.cumsum(weights[:, order], axis=1)[:, last]
    steps = np.diff(hits, axis=1, prepend=0)
    total = hits[:, -1].astype(np.float64)
    found = np.sum(hits / np.maximum(named, 1) * steps, axis=1)
    return np.asarray(np.divide(found, total, out=np.full(len(total), np.nan), where=total > 0))


def no_contradiction(copies: Copies, rated: Sequence[Row]) -> Iterator[Measure]:
    """Whether the level agrees with defects that are strong and that the profile is sure of."""
    section = "No contradiction: level at most the middle one"
    sure = [
        {
            cause
            for cause, strength in zip(copy["causes"], copy["strengths"], strict=True)
            for defect in DEFECTS
            if strength >= STRONG and cause in defect.causes and ((row["defects"] or {}).get(defect.name) or 0) > SURE
        }
        for copy, row in zip(copies.rows, rated, strict=True)
    ]
    for name, causes in {"all": DEGRADATIONS, **GROUPS}.items():
        chosen = [number for number, found in enumerate(sure) if found & set(causes)]
        sources = [copies.sources[number] for number in chosen]
        low = [at_most_middle(rated[number]) for number in chosen]
        target = NO_CONTRADICTION_TARGET if name == "all" else None
        yield from mean(section, name if name == "all" else f"causes of group {name}", low, sources, target)
        if name == "all":
            labelled = [label_at_most_middle(copies.rows[number]) for number in chosen]
            yield from mean(section, "labels of the same copies", labelled, sources)


def at_most_middle(row: Row) -> bool:
    """Whether the level is at most "fair"."""
    levels = list(row["probabilities"])
    return levels.index(row["level"]) <= len(levels) // 2


def label_at_most_middle(row: Row) -> bool:
    """Whether the MOS is nearer to "fair", or a level below, than to "good"."""
    low, high = row["scale"]
    return bool((row["mos"] - low) / (high - low) <= 0.625)


def times(copies: Copies, rated: Sequence[Row]) -> Iterator[Measure]:
    """Whether both ends of the only degradation of a copy are found within half a second."""
    for cause in TIMED_CAUSES:
        chosen = copies.single(cause)
        right = [time_is_right(copies.rows[number], rated[number]) for number in chosen]
        yield from mean("Times within half a second", cause, right, [copies.sources[number] for number in chosen])


def time_is_right(copy: Row, row: Row) -> bool:
    """Whether both ends of the only degradation of a copy are found."""
    first, last = copy["seconds"][0]
    spans = [span for one in row["found"] or () if one["defect"] == copy["causes"][0] for span in one["seconds"] or ()]
    return any(abs(a - first) <= TOLERANCE and abs(b - last) <= TOLERANCE for a, b in spans)


def explanations(copies: Copies, rated: Sequence[Row]) -> Iterator[Measure]:
    """How much of what they name is present, and how much of what is present they name."""
    if not all(row.get("explanation") for row in rated):
        return
    section, weights = "Explanations", copies.weights
    named = [mentioned_defects(row["explanation"]) for row in rated]
    pairs = [*zip(copies.truths, named, strict=True)]
    right = [sum(truth.get(name) is True for name in said) for truth, said in pairs]
    judged = [sum(name in truth for name in said) for truth, said in pairs]
    present = [sum(truth.values()) for truth in copies.truths]
    yield from ratio(section, "precision", right, judged, weights, n=sum(judged))
    yield from ratio(section, "recall", right, present, weights, n=sum(present))
    own = [row["explained_by"] == "model" for row in rated]
    yield from ratio(section, "written by the model", own, [1] * len(own), weights)


# --- the command -----------------------------------------------------------------------------------------------------


def named(text: str) -> tuple[str, str]:
    """NAME=VALUE."""
    name, separator, value = text.partition("=")
    if not (name and separator and value) or "/" in name:
        raise argparse.ArgumentTypeError(f"expected NAME=PATH, received {text!r}")
    return name, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", type=Path, help="manifest of lmm-qa degrade")
    parser.add_argument("--rater", type=named, action="append", required=True, metavar="NAME=PATH",
                        help="model, file of ratings, or `embedded`; differences are to the first")  # fmt: skip
    parser.add_argument("--classifier", type=named, action="append", default=[], metavar="NAME=FILE",
                        help="defect classifier of a rater; by default that of the package")  # fmt: skip
    parser.add_argument("--real", type=Path, help="folder of clips for the spread of the scores")
    parser.add_argument("--explain", action="store_true", help="also measure the explanations (slow)")
    parser.add_argument("--work", type=Path, required=True, help="folder for ratings and variants")
    parser.add_argument("--workers", type=int, default=2, help="decoding processes")
    parser.add_argument("-o", "--output", type=Path, required=True, help="report as JSON")
    parser.add_argument("--markdown", type=Path, help="report as a table")
    args = parser.parse_args()
    raters = {name: None if path == "embedded" else path for name, path in args.rater}
    classifiers = {name: Path(file) for name, file in args.classifier}
    if len(raters) < len(args.rater) or classifiers.keys() - raters.keys():
        parser.error("each rater needs its own name, and --classifier the name of a rater")
    try:
        report = evaluate(raters, args.labels, args.work, real=args.real, explain=args.explain,
                          classifiers=classifiers, workers=args.workers)  # fmt: skip
    except LmmQaError as error:
        raise SystemExit(str(error)) from None
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    table = markdown(report)
    if args.markdown:
        args.markdown.write_text(table)
    print(table)


if __name__ == "__main__":
    main()
