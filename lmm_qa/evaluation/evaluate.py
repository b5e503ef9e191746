"""How good a rater is: its ratings against human opinion, with intervals, and against what needs no rater at all.

Overall figures flatter: on a set of many generators, knowing the generator is most of the way. So an evaluation also
says how well the rater orders the clips of one class and of one generator, and by how much it beats the name-only prior
(`lmm_qa.evaluation.thqa.NamePrior`).
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lmm_qa.errors import ScoresError
from lmm_qa.evaluation import metrics
from lmm_qa.evaluation.labels import Join, Label, Score, join, match
from lmm_qa.evaluation.metrics import Bootstrap, Floats, Indices, Interval, Logistic4
from lmm_qa.evaluation.thqa import NamePrior, ThqaName, find_leaks, try_parse

if TYPE_CHECKING:
    from rich.console import Console


RESAMPLES = 1000


CONFIDENCE = 0.95


MIN_GENERATOR_CLIPS = 20


"""A generator with fewer clips is shown, but left out of the mean within-generator SRCC: its own SRCC is noise."""


@dataclass(frozen=True)
class Group:
    """The metrics of a part of the clips."""

    n: int
    metrics: dict[str, Interval] | None
    """None where none is defined."""
    undefined: str | None
    """Why not."""


@dataclass(frozen=True)
class Comparison:
    """Another source of scores for the same clips, and how far the ratings are ahead of it."""

    name: str
    n: int
    """Clips that both scored; all figures here are about these."""
    metrics: dict[str, Interval]
    """Of the other."""
    margin: dict[str, Interval]
    """The ratings' metric minus the other's, over the same resamples of the same clips."""


@dataclass(frozen=True)
class Evaluation:
    """What is found; `to_json` gives it as plain data."""

    n: int
    """Clips that have both a label and a score; all metrics are about these."""
    failed: tuple[str, ...]
    """Labelled clips that the rater could not rate."""
    missing: tuple[str, ...]
    """Labelled clips that the ratings do not name."""
    extra: tuple[str, ...]
    """Rated clips without a label."""
    metrics: dict[str, Interval]
    """`lmm_qa.evaluation.metrics.METRICS`, and `srcc_within`: the mean SRCC within the clips of one generator, over the generators
    (not: 3D distortions) that have `MIN_GENERATOR_CLIPS`."""
    logistic: Logistic4
    """The curve behind `plcc_fit` and `rmse_fit`."""
    by_class: dict[str, Group]
    """For the clip classes of THQA-NTIRE; clips of other sets are `other`. Empty where no name is of THQA-NTIRE."""
    by_generator: dict[str, Group]
    """By `class/generator`, or `3d/distortion`: SRCC and PLCC. A logistic fitted to so few clips would flatter."""
    coverage: float | None
    """Share of the MOS inside the ratings' prediction intervals, where all ratings carry one."""
    prior: Comparison | None
    leaks: tuple[str, ...]
    """What of the prior's labels shows a person of these clips, in words: a rater trained on it knows that person."""
    against: Comparison | None
    resamples: int
    confidence: float
    seed: int

    @property
    def complete(self) -> bool:
        """Whether every labelled clip has a score."""
        return not self.failed and not self.missing

    def to_json(self) -> dict[str, Any]:
        """As plain data; an interval is {value, low, high}, and null stands for what is not defined."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain


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
        labels: what people said.
        prior: labels of other clips, from which the name-only prior is made; the clips must be of THQA-NTIRE.
        against: ratings of the same clips by another rater.
        against_name: what to call that one.
        resamples, seed: of the bootstrap.

    Raises:
        ScoresError: too few clips, constant or non-finite scores; the ratings' calibration was fitted on some of the
            clips; the prior would be made from some of them.
        ManifestError: a prior is asked for, and a clip's name is not of THQA-NTIRE.
    """
    joined = join(labels, scores)
    _refuse_fitted(joined)
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
        by_class={kind: sample.group(x, part, metrics.METRICS) for kind, part in classes(sample.clips).items()},
        by_generator={kind: sample.group(x, part, ("srcc", "plcc")) for kind, part in _makers(sample.names).items()},
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
    """The clips of an evaluation, and how they are resampled."""

    clips: Sequence[str]
    names: Sequence[ThqaName | None]
    mos: Floats
    resamples: int
    seed: int

    @classmethod
    def of(cls, clips: Sequence[str], mos: Floats, resamples: int, seed: int) -> _Sample:
        return cls(clips, [try_parse(clip) for clip in clips], mos, resamples, seed)

    def bootstrap(self, scores: Floats) -> Bootstrap:
        """All metrics of one rater."""
        groups = _generators(self.names)
        return metrics.bootstrap(scores, self.mos, groups=groups, resamples=self.resamples, seed=self.seed)

    def group(self, scores: Floats, part: Indices, names: Sequence[str]) -> Group:
        """Some metrics of one rater on a part of the clips."""
        try:
            found = metrics.bootstrap(scores[part], self.mos[part], names, resamples=self.resamples, seed=self.seed)
        except ScoresError as error:
            return Group(len(part), None, str(error))
        return Group(len(part), found.intervals(CONFIDENCE), None)

    def part(self, part: Indices) -> _Sample:
        """Some of the clips."""
        return _Sample.of([self.clips[place] for place in part], self.mos[part], self.resamples, self.seed)


def _refuse_fitted(joined: Join) -> None:
    fitted = [pair.score.clip for pair in joined.pairs if pair.score.fitted]
    if fitted:
        raise ScoresError(
            f"the calibration of these ratings was fitted on {len(fitted)} of the {len(joined.pairs)} clips "
            f"({_some(fitted)}): they are no test of it; evaluate on other clips"
        )


def _coverage(joined: Join) -> float | None:
    inside = [
        pair.score.interval[0] <= pair.label.mos <= pair.score.interval[1]
        for pair in joined.pairs
        if pair.score.interval is not None
    ]
    return sum(inside) / len(inside) if len(inside) == len(joined.pairs) else None


# --- parts of the clips ----------------------------------------------------------------------------------------------


def classes(clips: Sequence[str]) -> dict[str, Indices]:
    """Indices of the clips of each class of THQA-NTIRE, and of the `other` clips; empty where all are others."""
    names = [try_parse(clip) for clip in clips]
    return _parts(["other" if name is None else name.clip_class for name in names]) if any(names) else {}


def _makers(names: Sequence[ThqaName | None]) -> dict[str, Indices]:
    return _parts([None if name is None else "/".join(name.kinds[1]) for name in names])


def _generators(names: Sequence[ThqaName | None]) -> list[Indices]:
    """The clips of each generator with enough of them."""
    kinds = ["/".join(name.kinds[1]) if name is not None and name.generator else None for name in names]
    return [part for part in _parts(kinds).values() if len(part) >= MIN_GENERATOR_CLIPS]


def _parts(kinds: Sequence[str | None]) -> dict[str, Indices]:
    """Indices of the clips of each kind, the kinds in alphabetical order."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, kind in enumerate(kinds):
        if kind is not None:
            places[kind].append(place)
    return {kind: np.array(places[kind], dtype=np.intp) for kind in sorted(places)}


# --- other sources of scores -----------------------------------------------------------------------------------------


def _predict(labels: Sequence[Label], clips: Sequence[str]) -> Floats:
    """What the name-only prior of these labels says of these clips."""
    shared = match(clips, [label.clip for label in labels])
    if shared:
        raise ScoresError(
            f"the prior's labels hold {len(shared)} of the clips to evaluate on ({_some(list(shared))}): take the "
            "labels of the training set"
        )
    prior = NamePrior.fit([label.clip for label in labels], [label.mos for label in labels])
    return np.array([prior.predict(clip) for clip in clips])


def _compare_ratings(scores: Sequence[Score], name: str, x: Floats, sample: _Sample) -> Comparison:
    """On the clips that the other rater scored too."""
    labels = [Label(clip, float(mos), clip) for clip, mos in zip(sample.clips, sample.mos, strict=True)]
    joined = join(labels, scores)
    _refuse_fitted(joined)
    place = {clip: number for number, clip in enumerate(sample.clips)}
    both = np.array([place[pair.label.clip] for pair in joined.pairs], dtype=np.intp)
    if len(both) < metrics.MIN_CLIPS:
        raise ScoresError(f"{name} scores {len(both)} of these clips: at least {metrics.MIN_CLIPS} are needed")
    common = sample.part(both)
    return _compare(name, common.bootstrap(x[both]), common, joined.scores)


def _compare(name: str, ratings: Bootstrap, sample: _Sample, other: Floats) -> Comparison:
    try:
        theirs = sample.bootstrap(other)
    except ScoresError as error:
        raise ScoresError(f"the comparison with {name} cannot be made: {error}") from None
    return Comparison(name, len(other), theirs.intervals(CONFIDENCE), (ratings - theirs).intervals(CONFIDENCE))


# --- showing it ------------------------------------------------------------------------------------------------------

TITLES = {
    "main": "main",
    "srcc": "SRCC",
    "krcc": "KRCC",
    "plcc": "PLCC",
    "plcc_fit": "PLCC_fit",
    "rmse_fit": "RMSE_fit",
    metrics.WITHIN: "SRCC within",
}


def render(evaluation: Evaluation, console: Console) -> None:
    """Print it for people: what was compared, the figures, what they owe to the generator."""
    console.print(_counts(evaluation))
    console.print()
    console.print(_overall_table(evaluation.metrics, evaluation.prior))
    if evaluation.against is not None:
        console.print()
        console.print(_overall_table({}, evaluation.against))
    if evaluation.by_class:
        console.print()
        console.print(_group_table(evaluation))
    notes = _notes(evaluation)
    if notes:
        console.print()
    for note in notes:
        console.print(note)


def _counts(evaluation: Evaluation) -> str:
    parts = [f"{evaluation.n} clips have a score and a MOS"]
    for what, clips in (
        ("labelled ones could not be rated", evaluation.failed),
        ("labelled ones are not in the ratings", evaluation.missing),
        ("rated ones have no label", evaluation.extra),
    ):
        if clips:
            parts.append(f"{len(clips)} {what}: {_some(clips)}")
    return "\n".join(parts)


def _overall_table(own: dict[str, Interval], comparison: Comparison | None) -> Any:
    """The ratings' own figures beside those of another, or, where there are none to show, the other's alone."""
    from rich.table import Table

    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("")
    if own:
        table.add_column("ratings")
    if comparison is not None:
        table.add_column(comparison.name, overflow="fold")
        table.add_column("margin of the ratings")
    for name in own or (comparison.metrics if comparison is not None else ()):
        cells = [_figure(own[name])] if own else []
        if comparison is not None:
            other = comparison.metrics[name]
            cells += [f"{other.value:.4f}" if own else _figure(other), _figure(comparison.margin[name], signed=True)]
        table.add_row(TITLES[name], *cells)
    return table


def _group_table(evaluation: Evaluation) -> Any:
    from rich.table import Table

    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    for title in ("part", "clips", "SRCC", "PLCC", "main"):
        table.add_column(title, justify="right" if title == "clips" else "left")
    for groups in (evaluation.by_class, evaluation.by_generator):
        for name, group in groups.items():
            if group.metrics is None:
                table.add_row(name, str(group.n), group.undefined)
                continue
            srcc, others = group.metrics["srcc"], [group.metrics.get(metric) for metric in ("plcc", "main")]
            values = ["" if other is None else f"{other.value:.4f}" for other in others]
            style = "dim" if group.n < MIN_GENERATOR_CLIPS else None
            table.add_row(name, str(group.n), _figure(srcc), *values, style=style)
        table.add_section()
    return table


def _notes(evaluation: Evaluation) -> list[str]:
    notes = [
        f"Brackets: {evaluation.confidence:.0%} intervals, {evaluation.resamples} resamples of clips, "
        f"seed {evaluation.seed}. PLCC_fit, RMSE_fit: after the 4-parameter logistic. main = (SRCC + PLCC_fit) / 2."
    ]
    if metrics.WITHIN in evaluation.metrics:
        notes.append(
            f"SRCC within: mean of the SRCC within each generator of at least {MIN_GENERATOR_CLIPS} clips, where "
            "knowing the generator does not help."
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
        verdict = "not told apart from"
    return (
        f"By main, the ratings are {verdict} {comparison.name} on {comparison.n} clips: "
        f"{margin.value:+.4f} [{margin.low:+.4f}, {margin.high:+.4f}]."
    )


def _figure(interval: Interval | None, signed: bool = False) -> str:
    if interval is None:
        return ""
    sign = "+" if signed else ""
    return f"{interval.value:{sign}.4f} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"


def _some(clips: Sequence[str], limit: int = 3) -> str:
    shown = ", ".join(clips[:limit])
    return shown if len(clips) <= limit else f"{shown}, ..."


def _plain(value: Any) -> Any:
    """What JSON can hold."""
    if isinstance(value, Interval):
        return {name: _plain(part) for name, part in value._asdict().items()}
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write(evaluation: Evaluation, path: Path) -> None:
    """Write all figures as JSON.

    Raises:
        ScoresError: it cannot be written.
    """
    try:
        path.write_text(json.dumps(evaluation.to_json(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ScoresError(f"cannot write {path}: {error.strerror or error}") from None


COLORS = {"2d": "#1f6f8b", "v1": "#d1703c", "3d": "#5b8c3a", "other": "#1f6f8b"}


"""Of the classes; apart in lightness too, for those who do not tell colours apart."""


def plot(scores: Sequence[Score], labels: Sequence[Label], evaluation: Evaluation, path: Path) -> None:
    """Draw scores against MOS with the fitted curve, as SVG; the same data give the same file.

    Raises:
        ScoresError: the file cannot be written, or is not called .svg.
    """
    if path.suffix.lower() != ".svg":
        raise ScoresError(f"a plot is written as .svg, received {path}")
    import matplotlib
    from matplotlib.figure import Figure

    joined = join(labels, scores)
    x, y = joined.scores, joined.mos
    parts = classes([pair.label.clip for pair in joined.pairs]) or {"other": np.arange(len(x))}
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
    figures = [f"{TITLES[name]} {evaluation.metrics[name].value:.4f}" for name in ("main", "srcc", "plcc_fit")]
    return f"{', '.join(figures)} ({evaluation.n} clips)"
