"""Evaluate a rater: agreement of its ratings with the MOS, with bootstrap intervals and baselines.

Overall metrics can mislead: on a set of many generators, recognising the generator is enough for a high value. So an
evaluation also reports how well the rater orders the clips of one class and of one generator, and its margin over the
name-only prior (`lmm_qa.evaluation.thqa.NamePrior`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import TypeAdapter

from lmm_qa.errors import ScoresError
from lmm_qa.evaluation import metrics
from lmm_qa.evaluation.labels import Join, Label, Score, join, match, preview
from lmm_qa.evaluation.metrics import Bootstrap, Indices, Interval
from lmm_qa.evaluation.thqa import NamePrior, ThqaName, find_leaks, try_parse
from lmm_qa.model.calibration import Floats, Logistic4

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

RESAMPLES = 1000
CONFIDENCE = 0.95
MIN_GENERATOR_CLIPS = 20
"""A generator with fewer clips is shown, but left out of the mean within-generator SRCC: its own SRCC is too noisy."""


@dataclass(frozen=True)
class Subset:
    """The metrics of a subset of the clips."""

    n: int
    metrics: dict[str, Interval] | None
    """None if they are undefined."""
    undefined: str | None
    """Why they are undefined."""


@dataclass(frozen=True)
class Comparison:
    """Another source of scores for the same clips, and the margin of the ratings over it."""

    name: str
    n: int
    """Number of clips scored by both; all metrics here are about these."""
    metrics: dict[str, Interval]
    """Of the other source."""
    margin: dict[str, Interval]
    """Metric of the ratings minus metric of the other source, over the same resamples of the same clips."""


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`."""

    n: int
    """Number of clips that have both a label and a score; all metrics are about these."""
    failed: tuple[str, ...]
    """Labelled clips that the rater could not rate."""
    missing: tuple[str, ...]
    """Labelled clips that the ratings do not contain."""
    extra: tuple[str, ...]
    """Rated clips without a label."""
    metrics: dict[str, Interval]
    """`metrics.METRICS`, and `srcc_within`: the mean SRCC within the clips of one generator, over the generators (not
    3D distortions) that have `MIN_GENERATOR_CLIPS`."""
    logistic: Logistic4
    """The curve behind `plcc_fit` and `rmse_fit`."""
    by_class: dict[str, Subset]
    """For the clip classes of THQA-NTIRE; clips of other sets are `other`. Empty if no name is of THQA-NTIRE."""
    by_generator: dict[str, Subset]
    """By `class/generator`, or `3d/distortion`: SRCC and PLCC. A logistic would overfit so few clips."""
    coverage: float | None
    """Share of the MOS inside the prediction intervals of the ratings; None unless all ratings have one."""
    prior: Comparison | None
    leaks: tuple[str, ...]
    """Messages about clips of the prior's labels that show a person of these clips: a rater trained on them has seen
    that person."""
    against: Comparison | None
    resamples: int
    confidence: float
    seed: int

    @property
    def complete(self) -> bool:
        """Whether every labelled clip has a score."""
        return not self.failed and not self.missing


def evaluate(
    scores: Sequence[Score],
    labels: Sequence[Label],
    *,
    prior: Sequence[Label] = (),
    against: Sequence[Score] = (),
    against_name: str = "the other ratings",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Evaluation:
    """Compare ratings with labels.

    Args:
        scores: the ratings.
        labels: the MOS.
        prior: labels of other clips, to fit the name-only prior to; the clips must be of THQA-NTIRE.
        against: ratings of the same clips by another rater.
        against_name: name of that rater in the output.
        resamples, seed: for the bootstrap.

    Raises:
        ScoresError: too few clips, constant or non-finite scores; the ratings' calibration was fitted on some of the
            clips; the prior's labels contain some of the clips.
        ManifestError: a prior is given, and a clip's name is not of THQA-NTIRE.
    """
    joined = join(labels, scores)
    _check_held_out(joined)
    sample = _Sample.of([pair.label.clip for pair in joined.pairs], joined.mos, resamples, seed)
    x, _ = metrics.checked(joined.scores, joined.mos)
    ratings = sample.bootstrap(x)
    return Evaluation(
        n=len(sample.clips),
        failed=tuple(score.clip for score in joined.failed),
        missing=joined.missing,
        extra=joined.extra,
        metrics=ratings.intervals(CONFIDENCE),
        logistic=metrics.fit_logistic4(x, sample.mos),
        by_class=sample.subsets(x, clip_classes(sample.names), metrics.METRICS),
        by_generator=sample.subsets(x, _methods(sample.names), ("srcc", "plcc")),
        coverage=_coverage(joined),
        prior=_compare("name-only prior", ratings, sample, _predict(prior, sample.clips)) if prior else None,
        leaks=tuple(map(str, find_leaks([label.clip for label in prior], sample.clips))) if prior else (),
        against=_compare_ratings(against, against_name, x, sample) if against else None,
        resamples=resamples,
        confidence=CONFIDENCE,
        seed=seed,
    )


@dataclass(frozen=True)
class _Sample:
    """The clips of an evaluation, and the options of their bootstrap."""

    clips: Sequence[str]
    names: Sequence[ThqaName | None]
    mos: Floats
    resamples: int
    seed: int

    @classmethod
    def of(cls, clips: Sequence[str], mos: Floats, resamples: int, seed: int) -> _Sample:
        return cls(clips, [try_parse(clip) for clip in clips], mos, resamples, seed)

    def bootstrap(self, scores: Floats) -> Bootstrap:
        """All metrics of the scores of one rater, (n,)."""
        groups = _large_generators(self.names)
        return metrics.bootstrap(scores, self.mos, groups=groups, resamples=self.resamples, seed=self.seed)

    def subsets(self, scores: Floats, parts: dict[str, Indices], names: Sequence[str]) -> dict[str, Subset]:
        """These metrics of one rater on each part of the clips."""
        return {name: self._subset(scores[part], self.mos[part], names) for name, part in parts.items()}

    def _subset(self, scores: Floats, mos: Floats, names: Sequence[str]) -> Subset:
        try:
            bootstrap = metrics.bootstrap(scores, mos, names, resamples=self.resamples, seed=self.seed)
        except ScoresError as error:
            return Subset(len(mos), None, str(error))
        return Subset(len(mos), bootstrap.intervals(CONFIDENCE), None)

    def select(self, indices: Indices) -> _Sample:
        return _Sample.of([self.clips[index] for index in indices], self.mos[indices], self.resamples, self.seed)


def _check_held_out(joined: Join) -> None:
    fitted = [pair.score.clip for pair in joined.pairs if pair.score.fitted]
    if fitted:
        raise ScoresError(
            f"the calibration of these ratings was fitted on {len(fitted)} of the {len(joined.pairs)} clips "
            f"({preview(fitted)}): they cannot test it; evaluate on other clips"
        )


def _coverage(joined: Join) -> float | None:
    inside = [
        pair.score.interval[0] <= pair.label.mos <= pair.score.interval[1]
        for pair in joined.pairs
        if pair.score.interval is not None
    ]
    return sum(inside) / len(inside) if len(inside) == len(joined.pairs) else None


# --- parts of the clips ----------------------------------------------------------------------------------------------


def clip_classes(names: Sequence[ThqaName | None]) -> dict[str, Indices]:
    """Indices of the clips of each class of THQA-NTIRE, and of the `other` clips; empty if all are of other sets."""
    return _indices_by(["other" if name is None else name.clip_class for name in names]) if any(names) else {}


def _methods(names: Sequence[ThqaName | None]) -> dict[str, Indices]:
    return _indices_by([None if name is None else f"{name.clip_class}/{name.method}" for name in names])


def _large_generators(names: Sequence[ThqaName | None]) -> list[Indices]:
    """The clips of each generator that has `MIN_GENERATOR_CLIPS`."""
    parts = _methods([name if name is not None and name.generator else None for name in names])
    return [part for part in parts.values() if len(part) >= MIN_GENERATOR_CLIPS]


def _indices_by(keys: Sequence[str | None]) -> dict[str, Indices]:
    """Indices of each key but None, the keys in alphabetical order."""
    indices: dict[str, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        if key is not None:
            indices[key].append(index)
    return {key: np.array(indices[key], dtype=np.intp) for key in sorted(indices)}


# --- other sources of scores -----------------------------------------------------------------------------------------


def _predict(labels: Sequence[Label], clips: Sequence[str]) -> Floats:
    """Scores of the clips by the name-only prior of these labels."""
    shared = match(clips, [label.clip for label in labels])
    if shared:
        raise ScoresError(
            f"the prior's labels contain {len(shared)} of the clips to evaluate on ({preview(list(shared))}): use the "
            "labels of the training set"
        )
    prior = NamePrior.fit([label.clip for label in labels], [label.mos for label in labels])
    return np.array([prior.predict(clip) for clip in clips])


def _compare_ratings(scores: Sequence[Score], name: str, x: Floats, sample: _Sample) -> Comparison:
    """The comparison on the clips that the other rater scored too."""
    labels = [Label(clip, float(mos), clip) for clip, mos in zip(sample.clips, sample.mos, strict=True)]
    joined = join(labels, scores)
    _check_held_out(joined)
    index = {clip: number for number, clip in enumerate(sample.clips)}
    both = np.array([index[pair.label.clip] for pair in joined.pairs], dtype=np.intp)
    if len(both) < metrics.MIN_CLIPS:
        raise ScoresError(f"{name} scores {len(both)} of these clips: at least {metrics.MIN_CLIPS} are needed")
    common = sample.select(both)
    return _compare(name, common.bootstrap(x[both]), common, joined.scores)


def _compare(name: str, ratings: Bootstrap, sample: _Sample, other: Floats) -> Comparison:
    try:
        baseline = sample.bootstrap(other)
    except ScoresError as error:
        raise ScoresError(f"cannot compare with {name}: {error}") from None
    return Comparison(name, len(other), baseline.intervals(CONFIDENCE), (ratings - baseline).intervals(CONFIDENCE))


# --- output ----------------------------------------------------------------------------------------------------------

TITLES = {
    "main": "main",
    "srcc": "SRCC",
    "krcc": "KRCC",
    "plcc": "PLCC",
    "plcc_fit": "PLCC_fit",
    "rmse_fit": "RMSE_fit",
    metrics.SRCC_WITHIN: "SRCC within",
}


def render(evaluation: Evaluation, console: Console) -> None:
    """Print the counts of clips, the tables of metrics, and notes on how to read them."""
    console.print(_counts(evaluation), end="\n\n")
    console.print(_overall_table(evaluation.metrics, evaluation.prior))
    if evaluation.against is not None:
        console.print()
        console.print(_overall_table({}, evaluation.against))
    if evaluation.by_class:
        console.print()
        console.print(_subset_table(evaluation))
    console.print("", *_notes(evaluation), sep="\n")


def unmatched(evaluation: Evaluation) -> dict[str, tuple[str, ...]]:
    """Descriptions of the clips left out of the metrics, and those clips; without empty ones."""
    parts = {
        "Labelled, but could not be rated": evaluation.failed,
        "Labelled, but not in the ratings": evaluation.missing,
        "Rated without a label": evaluation.extra,
    }
    return {description: clips for description, clips in parts.items() if clips}


def _counts(evaluation: Evaluation) -> str:
    lines = [f"{evaluation.n} clips have a score and a MOS"]
    lines += [f"{text}: {len(clips)} ({preview(clips)})" for text, clips in unmatched(evaluation).items()]
    return "\n".join(lines)


def _overall_table(own: dict[str, Interval], comparison: Comparison | None) -> Table:
    """The metrics of the ratings beside those of the comparison; with empty `own`, those of the comparison alone."""
    from rich.table import Table

    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("")
    if own:
        table.add_column("ratings")
    if comparison is not None:
        table.add_column(comparison.name, overflow="fold")
        table.add_column("margin of the ratings")
    for name in own or (comparison.metrics if comparison is not None else ()):
        cells = [_format(own[name])] if own else []
        if comparison is not None:
            other = comparison.metrics[name]
            cells += [f"{other.value:.4f}" if own else _format(other), _format(comparison.margin[name], sign="+")]
        table.add_row(TITLES[name], *cells)
    return table


def _subset_table(evaluation: Evaluation) -> Table:
    from rich.table import Table

    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    for title in ("part", "clips", "SRCC", "PLCC", "main"):
        table.add_column(title, justify="right" if title == "clips" else "left")
    for subsets in (evaluation.by_class, evaluation.by_generator):
        for name, subset in subsets.items():
            if subset.metrics is None:
                table.add_row(name, str(subset.n), subset.undefined)
                continue
            others = [f"{subset.metrics[each].value:.4f}" for each in ("plcc", "main") if each in subset.metrics]
            style = "dim" if subset.n < MIN_GENERATOR_CLIPS else None
            table.add_row(name, str(subset.n), _format(subset.metrics["srcc"]), *others, style=style)
        table.add_section()
    return table


def _notes(evaluation: Evaluation) -> list[str]:
    notes = [
        f"Brackets: {evaluation.confidence:.0%} intervals, {evaluation.resamples} resamples of clips, "
        f"seed {evaluation.seed}. PLCC_fit, RMSE_fit: after the 4-parameter logistic. main = (SRCC + PLCC_fit) / 2."
    ]
    if metrics.SRCC_WITHIN in evaluation.metrics:
        notes.append(
            f"SRCC within: mean of the SRCC within each generator that has at least {MIN_GENERATOR_CLIPS} clips. "
            "Recognising the generator does not help there."
        )
    notes += [_verdict(other) for other in (evaluation.prior, evaluation.against) if other is not None]
    notes += [f"Leak: {leak}." for leak in evaluation.leaks]
    if evaluation.coverage is not None:
        notes.append(f"{evaluation.coverage:.1%} of the MOS lie inside the ratings' prediction intervals.")
    return notes


def _verdict(comparison: Comparison) -> str:
    margin = comparison.margin["main"]
    if margin.low > 0:
        verdict = "ahead of"
    elif margin.high < 0:
        verdict = "behind"
    else:
        verdict = "not distinguishable from"
    return (
        f"On main, the ratings are {verdict} {comparison.name} on {comparison.n} clips: "
        f"{margin.value:+.4f} [{margin.low:+.4f}, {margin.high:+.4f}]."
    )


def _format(interval: Interval, sign: str = "") -> str:
    return f"{interval.value:{sign}.4f} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"


def write(evaluation: Evaluation, path: Path) -> None:
    """Write the evaluation as JSON; null stands for an undefined number.

    Raises:
        ScoresError: it cannot be written.
    """
    try:
        path.write_bytes(TypeAdapter(Evaluation).dump_json(evaluation, indent=2) + b"\n")
    except OSError as error:
        raise ScoresError(f"cannot write {path}: {error.strerror or error}") from None


COLORS = {"2d": "#1f6f8b", "v1": "#d1703c", "3d": "#5b8c3a", "other": "#1f6f8b"}
"""Of the clip classes; different in lightness too, for readers with colour blindness."""


def plot(scores: Sequence[Score], labels: Sequence[Label], evaluation: Evaluation, path: Path) -> None:
    """Plot scores against MOS with the fitted curve, as SVG; the same data give the same file.

    Raises:
        ScoresError: the file cannot be written, or is not called .svg.
    """
    if path.suffix.lower() != ".svg":
        raise ScoresError(f"a plot is written as .svg, received {path}")
    import matplotlib
    from matplotlib.figure import Figure

    joined = join(labels, scores)
    x, y = joined.scores, joined.mos
    names = [try_parse(pair.label.clip) for pair in joined.pairs]
    parts = clip_classes(names) or {"other": np.arange(len(x))}
    with matplotlib.rc_context({"svg.hashsalt": "lmm_qa", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(6, 5), layout="constrained")
        axes = figure.add_subplot()
        for name in sorted(parts, key=lambda name: -len(parts[name])):
            part = parts[name]
            label = f"{name} ({len(part)})" if len(parts) > 1 else None
            dots = axes.scatter(x[part], y[part], s=12, alpha=0.45, linewidths=0, color=COLORS[name], label=label)
            dots.set_gid(f"clips-{name}")
        line = np.linspace(x.min(), x.max(), 200)
        axes.plot(line, evaluation.logistic(line), color="black", linewidth=1.6, label="4-parameter logistic")
        axes.set(xlabel="score", ylabel="MOS", title=_caption(evaluation))
        axes.grid(color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper left", markerscale=1.6)
        try:
            figure.savefig(path, format="svg", metadata={"Date": None})
        except OSError as error:
            raise ScoresError(f"cannot write {path}: {error.strerror or error}") from None


def _caption(evaluation: Evaluation) -> str:
    values = [f"{TITLES[name]} {evaluation.metrics[name].value:.4f}" for name in ("main", "srcc", "plcc_fit")]
    return f"{', '.join(values)} ({evaluation.n} clips)"
