"""The commands `lmm-qa compare` and `lmm-qa gate`: is a generator better than another, is it good enough."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmm_qa.cli.options import DEFAULT_WORKERS, EmbedClips, Model, Timeout, Workers, with_rater_options
from lmm_qa.cli.terminal import (
    GATE_FAILED,
    SOME_CLIPS_FAILED,
    make_console,
    message,
    progress,
    quiet_libraries,
)
from lmm_qa.errors import UsageError, plural

if TYPE_CHECKING:
    from lmm_qa.evaluation.compare import Comparison
    from lmm_qa.evaluation.pairing import RatingSet
    from lmm_qa.model.rater_plan import RaterPlan

RATED_OR_CLIPS = (
    "Ratings (.jsonl, .csv or .parquet from `lmm-qa rate`), or a folder of clips. A folder is rated, with defects, "
    "into a file beside it; the next time, only clips that are new or have changed are rated."
)

Pair = Annotated[
    str,
    typer.Option(
        metavar="BY",
        help="What the clips of a pair share: name (relative name, or its end) | stem (file name without suffix) | "
        "thqa (portrait and audio of THQA-NTIRE names, across generators) | column=NAME (a column of the ratings) | "
        "mapping=FILE (a table with the columns old and new).",
    ),
]

Group = Annotated[
    str | None,
    typer.Option(
        help="Column of the ratings with the person or source of a clip, or a regular expression whose group matches "
        "it in the clip's name, e.g. '^(.+?)__'. Clips of one group are not independent; the interval allows for that.",
        show_default="the person of THQA-NTIRE names, else each pair is independent",
    ),
]


@with_rater_options
def compare(
    old: Annotated[Path, typer.Argument(help=RATED_OR_CLIPS, show_default=False)],
    new: Annotated[list[Path], typer.Argument(help="The same, of one or more others.", show_default=False)],
    rater_options: dict[str, Any],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="The comparison as .json (everything), .csv (a row for each pair) or .md (for a pull request).",
            show_default=False,
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="A page with pairs of clips side by side: .html.", show_default=False),
    ] = None,
    clips: Annotated[
        list[str] | None,
        typer.Option(
            help="For --report: where the clips are, a folder, a file, a glob or a list; once for all sets, or once "
            "for each in their order.",
            show_default="the folders given, or the paths in the ratings",
        ),
    ] = None,
    embed_clips: EmbedClips = False,
    pair: Pair = "name",
    group: Group = None,
    tie: Annotated[float, typer.Option(min=0, help="Scores that differ by no more are a tie, in MOS.")] = 0.1,
    model: Model = None,
    workers: Workers = DEFAULT_WORKERS,
    timeout: Timeout = 60.0,
) -> None:
    """Compare generators by the ratings of their clips: is NEW better than OLD, by how much, and in what?

    No labels are needed. The mean difference has a 95% interval (bootstrap of pairs or groups); wins, ties and losses,
    tests, the smallest difference that so many pairs can show, defects that became more or less frequent, and the pairs
    that differ most follow. Several new sets are each compared with OLD, and tests are corrected for their number. Exit
    code 3: done, but some clips could not be rated.

    **Examples**

    `lmm-qa compare old.jsonl new.jsonl`

    `lmm-qa compare yesterday/ today/ --report compare.html -o compare.md`

    `lmm-qa compare wav2lip.jsonl sadtalker.jsonl musetalk.jsonl --pair thqa`

    `lmm-qa compare old.parquet new.parquet --pair column=prompt_id --group speaker -o pairs.csv`
    """
    from lmm_qa.evaluation import compare as job
    from lmm_qa.evaluation.html_report import check_output

    if output is not None:
        job.check_output(output)
    if report is not None:
        check_output(report)
    if clips and len(clips) not in (1, 1 + len(new)):
        raise UsageError(f"--clips is given once for all sets, or once for each of the {1 + len(new)}")
    sets = _read_sets([old, *new], model, rater_options, workers, timeout)
    with make_console().status("resampling the pairs"):
        found = job.compare(sets[0], sets[1:], by=pair, group=group, tie=tie)
    job.render(found, make_console(stderr=False))
    if output is not None:
        job.write(found, output)
        message(f"comparison -> {output}")
    if report is not None:
        _write_page(found, sets, [old, *new], clips or [], workers, timeout, report, embed_clips)
    if found.failed:
        raise typer.Exit(SOME_CLIPS_FAILED)


@with_rater_options
def gate(
    new: Annotated[Path, typer.Argument(help=RATED_OR_CLIPS, show_default=False)],
    rater_options: dict[str, Any],
    against: Annotated[
        Path | None, typer.Option(help="The same, of the old version; for --max-drop.", show_default=False)
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="Largest drop of the mean score. The gate fails unless the 95% interval of new minus old excludes a "
            "larger one.",
            show_default=False,
        ),
    ] = None,
    min_score: Annotated[
        float | None,
        typer.Option(
            help="Least mean score. The gate fails unless its 95% interval excludes a lower one.", show_default=False
        ),
    ] = None,
    max_defect: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SHARE",
            help="Largest share of the clips with a defect, e.g. blur=0.05. Can be repeated.",
            show_default=False,
        ),
    ] = None,
    min_pairs: Annotated[
        int | None,
        typer.Option(help="Least number of pairs; without --against, of rated clips.", show_default="10"),
    ] = None,
    max_failed: Annotated[
        int | None, typer.Option(help="Largest number of clips that cannot be rated.", show_default="0")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with limits: max_drop, min_score, max_defect, min_pairs, max_failed. Options replace its "
            "values.",
            show_default=False,
        ),
    ] = None,
    junit: Annotated[
        Path | None, typer.Option(help="Also write the results as JUnit XML, for CI systems.", show_default=False)
    ] = None,
    pair: Pair = "name",
    group: Group = None,
    model: Model = None,
    workers: Workers = DEFAULT_WORKERS,
    timeout: Timeout = 60.0,
) -> None:
    """Check rated clips against limits, to stop a build: exit code 0 if all are kept, 4 if not.

    A limit on a mean is compared with the end of its 95% interval, not with the mean itself: the gate passes only if
    the data exclude that the limit is exceeded. With few clips the interval is wide, and the gate fails.

    **Examples**

    `lmm-qa gate new.jsonl --against old.jsonl --max-drop 0.10 --max-defect blur=0.05 --max-defect stall=0`

    `lmm-qa gate clips/ --min-score 3.5 --junit gate.xml`

    `lmm-qa gate new.jsonl --against old.jsonl --config gate.yaml --junit gate.xml`
    """
    from lmm_qa.evaluation import gate as job
    from lmm_qa.evaluation.compare import compare as compare_sets
    from lmm_qa.evaluation.compare import scope_notes

    options = {"max_drop": max_drop, "min_score": min_score, "min_pairs": min_pairs, "max_failed": max_failed}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    read = job.Limits.read(config).model_dump(exclude_unset=True) if config else {}
    defects = read.get("max_defect", {}) | _shares(max_defect or [])
    limits = job.Limits.parse({**read, **given, "max_defect": defects}, "the limits")
    limits.check(against is not None)
    sets = _read_sets([new] if against is None else [against, new], model, rater_options, workers, timeout)
    comparison = None
    if against is not None:
        with make_console().status("resampling the pairs"):
            comparison = compare_sets(sets[0], sets[1:], by=pair, group=group).sets[0]
        print(f"{comparison.verdict}.")
    checks = job.check_limits(limits, sets[-1], comparison, group)
    for check in checks:
        print(check)
    if junit is not None:
        job.write_junit(checks, junit, sets[-1].name)
        message(f"JUnit XML -> {junit}")
    for note in scope_notes(sets):
        message(f"note: {note}")
    if failed := sum(not check.passed for check in checks):
        print(f"the gate fails: {failed} of {plural(len(checks), 'check')}")
        raise typer.Exit(GATE_FAILED)
    print(f"the gate passes: {plural(len(checks), 'check')}")


def _shares(texts: Sequence[str]) -> dict[str, str]:
    """`blur=0.05` as a name and a number, which is validated with the other limits."""
    pairs = [text.partition("=") for text in texts]
    if wrong := [text for text, (name, equals, _) in zip(texts, pairs, strict=True) if not name or not equals]:
        raise UsageError(f"--max-defect is NAME=SHARE, such as blur=0.05, received {wrong[0]!r}")
    return {name: share for name, _, share in pairs}


# --- sets of clips ---------------------------------------------------------------------------------------------------


def _read_sets(
    paths: Sequence[Path], model: str | None, rater_options: dict[str, Any], workers: int, timeout: float
) -> list[RatingSet]:
    """Read the ratings of each path; folders are rated first."""
    from lmm_qa.evaluation.pairing import RatingSet

    names = [path.resolve().name if path.is_dir() else path.stem for path in paths]
    uses = Counter(names)
    names = [name if uses[name] == 1 else path.as_posix() for name, path in zip(names, paths, strict=True)]
    plan = _plan(model, rater_options) if any(path.is_dir() for path in paths) else None
    sets = []
    for path, name in zip(paths, names, strict=True):
        if plan and path.is_dir():
            ratings, clips = _rate(path, plan, workers, timeout)
            sets.append(RatingSet.read(ratings, name, clips))
        else:
            sets.append(RatingSet.read(path, name))
    return sets


def _plan(model: str | None, rater_options: dict[str, Any]) -> RaterPlan:
    """The rater of all folders."""
    quiet_libraries()
    from lmm_qa.model.rater_plan import plan_rater

    plan = plan_rater(model, **rater_options)
    for note in plan.notes:
        message(f"note: {note}")
    return plan


def _rate(folder: Path, plan: RaterPlan, workers: int, timeout: float) -> tuple[Path, frozenset[str]]:
    """Rate the clips of a folder that are not rated yet. Returns the file of ratings and the names of the clips."""
    from lmm_qa.cli.run import RatingRun
    from lmm_qa.distributed import Ranks
    from lmm_qa.manifest import expand
    from lmm_qa.ratings.rows import Details

    clips = expand([folder])
    ranks = Ranks.from_environment()
    if ranks.world > 1:
        raise UsageError("folders are rated in one process; with several, use lmm-qa rate --defects -o ratings.jsonl")
    place = folder.resolve()
    ratings = place.with_name(f"{place.name}.{plan.rater_id}.jsonl")
    message(f"{folder}: ratings in {ratings}")
    RatingRun(plan, Details(defects=True), ranks, workers=workers, timeout=timeout).to_file(clips, ratings, False)
    return ratings, frozenset(clip.name for clip in clips)


def _write_page(
    comparison: Comparison,
    sets: Sequence[RatingSet],
    paths: Sequence[Path],
    clips: Sequence[str],
    workers: int,
    timeout: float,
    output: Path,
    embed_clips: bool,
) -> None:
    from lmm_qa.evaluation import comparison_page as job
    from lmm_qa.evaluation.html_report import format_bytes
    from lmm_qa.evaluation.labels import find_videos
    from lmm_qa.evaluation.player import EMBED_LIMIT

    places = [[one] for one in clips] if len(clips) > 1 else [list(clips)] * len(sets)
    videos = []
    for each, path, place in zip(sets, paths, places, strict=True):
        inside = path if path.is_dir() else path.parent
        # In a place that the user did not name, only the hash of its content proves that a file is the rated clip.
        named = bool(place) or path.is_dir()
        names = [rating.clip for rating in each.ratings if named or rating.content_id]
        videos.append(find_videos(names, place, inside))
    pairs = job.page_pairs(comparison, sets, videos)
    frames = progress(job.pair_frames(pairs, workers, timeout), len(pairs), "read")
    size = job.write(comparison, pairs, frames, output, EMBED_LIMIT if embed_clips else 0)
    if not size.clips:
        message("no clips were found: give their location with --clips FOLDER, once for each set")
    message(f"{plural(len(pairs), 'pair')}, {size.clips} with frames, {format_bytes(size.page)} -> {output}")
