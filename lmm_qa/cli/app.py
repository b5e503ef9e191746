"""The command `lmm-qa`. Turns words into calls, errors into exit codes; data to stdout or `-o`, the rest to stderr.

Exit codes: 0 done; 1 failed; 2 wrong usage; 3 done, but some clips could not be rated.
Imports of weight happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from lmm_qa.errors import ClipError, LmmQaError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from lmm_qa.distributed import Ranks, RayRaters
    from lmm_qa.manifest import Clip
    from lmm_qa.rater import Rater, RaterPlan
    from lmm_qa.ratings import Failure, Rating
    from lmm_qa.ratings_io import RatingsWriter
    from lmm_qa.tables import Row


T = TypeVar("T")


FAILED, WRONG_USAGE, SOME_CLIPS_FAILED, INTERRUPTED = 1, 2, 3, 130


PROGRESS_SECONDS = 30


"""How often a line of progress is written where stderr is no terminal."""


ANSWERED = 0.5


"""Share of the probability that yes and no together should hold after a closed question."""


QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # idle threads of torch leave the cores to the decoding processes
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


"""Read by the libraries when they are imported, which may be never."""


class Quantization(StrEnum):
    FOUR = "4bit"
    EIGHT = "8bit"


class Dtype(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Engine(StrEnum):
    LOCAL = "local"
    RAY = "ray"


class AnswerSource(StrEnum):
    ADAPTER = "adapter"
    BASE = "base"


class Mapping(StrEnum):
    LINEAR = "linear"
    LOGISTIC4 = "logistic4"
    ISOTONIC = "isotonic"


ClipColumn = Annotated[
    str | None,
    typer.Option(help="Column of the labels that names the clip.", show_default="clip, video, path, file or name"),
]


ScoreColumn = Annotated[
    str | None, typer.Option(help="Column of the labels that holds the MOS.", show_default="mos or score")
]


Inputs = Annotated[
    list[str],
    typer.Argument(
        help="Video files, folders (searched through), globs, or lists of clips: .csv .tsv .jsonl .parquet with a "
        "column clip, video or path; .txt with a path a line.",
        show_default=False,
    ),
]


Model = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        help="Rater directory, PEFT adapter, model directory, or an id on the Hugging Face hub.",
        show_default="the embedded model",
    ),
]


AnswersFrom = Annotated[
    AnswerSource,
    typer.Option(
        help="Who answers and explains, where the rater has an adapter: one that was tuned on levels alone may have "
        "lost its tongue."
    ),
]


Device = Annotated[str | None, typer.Option(help="cuda, cuda:1, mps, cpu.", show_default="the best one here")]


BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="The most clips that go through the model together. Lower it where a GPU runs out of memory.",
        show_default="64 on a GPU, and no more than 16,384 tokens; 1 on a CPU",
    ),
]


Workers = Annotated[int, typer.Option(min=1, help="Decoding processes.")]


Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds that decoding one clip may take.")]


WORKERS = min(4, os.cpu_count() or 1)


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def lmm_qa() -> None:
    """Rate the visual quality of talking-head video with a large multimodal model.

    Without `--model`, a small model that comes with the package does it: no GPU, no download.
    """


@app.command()
def rate(
    inputs: Inputs,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Where the ratings go: .jsonl, .csv or .parquet. Run again, and only what is "
            "missing is rated. Without it: a table on a terminal, JSON lines into a pipe.",
            show_default=False,
        ),
    ] = None,
    model: Model = None,
    defects: Annotated[
        bool, typer.Option("--defects", help="Also say which defects each clip has, where and when.")
    ] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Also say why, in words; brings --defects along.")] = False,
    timeline: Annotated[
        bool,
        typer.Option(
            "--timeline", help="Also rate windows of two seconds, two a second of the clip: that many times the work."
        ),
    ] = False,
    answers_from: AnswersFrom = AnswerSource.ADAPTER,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a model on the hub.", show_default=False)
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="Name of a prompt (talking_head, qalign) or a YAML file.", show_default="the model's"),
    ] = None,
    scale: Annotated[
        tuple[float, float] | None,
        typer.Option(help="MOS of the worst and of the best level, e.g. --scale 0 5.", show_default="the model's"),
    ] = None,
    sampling: Annotated[
        str | None,
        typer.Option(
            help="Which frames are looked at: uniform:8 | pairs:12 (moments of two close frames) | fps:2.",
            show_default="the model's",
        ),
    ] = None,
    view: Annotated[
        list[str] | None,
        typer.Option(
            help="What is made of them: whole:448 (shrunk into the area of 448 x 448) | crop:336 (window at native "
            "resolution) | face:224 (a square around the face, resized). Give it again for more than one.",
            show_default="the model's",
        ),
    ] = None,
    quantization: Annotated[
        Quantization | None, typer.Option(help="Weights in 4 or 8 bits: less memory.", show_default=False)
    ] = None,
    device: Device = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Number format.", show_default="suits the device")] = None,
    batch_size: BatchSize = None,
    workers: Workers = WORKERS,
    timeout: Timeout = 60.0,
    root: Annotated[
        Path | None, typer.Option(help="Folder that paths in lists are relative to.", show_default="the list's folder")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Forget what the output holds already.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be rated, tokens and memory; load no weights.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with a model from the hub.")
    ] = False,
    engine: Annotated[
        Engine, typer.Option(help="local: this process, or those of a launcher. ray: raters on a Ray cluster.")
    ] = Engine.LOCAL,
) -> None:
    """Rate clips: one score a clip, and the probabilities of the levels behind it.

    Several GPUs or machines: `accelerate launch` or `torchrun`, and their processes share the clips; or `--engine ray`.

    **Examples**

    `lmm-qa rate clip.mp4`

    `lmm-qa rate clips/ more/*.mp4 list.csv -o ratings.parquet`

    `lmm-qa rate clips/ --defects --timeline -o ratings.jsonl`

    `lmm-qa rate clips/ -m Qwen/Qwen2-VL-7B-Instruct --quantization 4bit -o ratings.jsonl`

    `accelerate launch --multi_gpu --num_processes 4 -m lmm_qa rate clips/ -o ratings.jsonl`
    """
    from lmm_qa.cli.console import render_table
    from lmm_qa.config import Sampling, View
    from lmm_qa.manifest import expand
    from lmm_qa.ratings_io import output_form

    if output is not None:
        output_form(output)
    clips = expand(inputs, root)
    chosen_sampling = Sampling.from_text(sampling) if sampling else None
    chosen_views = [View.from_text(text) for text in view] if view else None
    _quiet_libraries()
    from lmm_qa.distributed import Ranks, RayRaters
    from lmm_qa.rater import plan_rater
    from lmm_qa.ratings import Details

    ranks = Ranks.from_environment()
    if output is None and not dry_run and (ranks.world > 1 or engine is Engine.RAY):
        raise UsageError("rows of several processes come in no order, they need a file: -o ratings.jsonl")
    if ranks.world > 1 and engine is Engine.RAY:
        raise UsageError("--engine ray starts its processes itself: run it without accelerate launch or torchrun")
    plan = plan_rater(
        model,
        revision=revision,
        prompt=prompt,
        scale=scale,
        sampling=chosen_sampling,
        views=chosen_views,
        quantization=quantization.value if quantization else None,
        device=ranks.device(device),
        dtype=dtype.value if dtype else None,
        trust_remote_code=trust_remote_code,
    )
    if ranks.rank == 0:
        for note in plan.notes:
            _say(f"note: {note}")
        if dry_run:
            _print_plan(plan, clips, workers)
    if dry_run:
        return
    raters = RayRaters(plan, workers, _say) if engine is Engine.RAY else None
    details = Details(defects or explain, explain, timeline, answers_from.value)
    options = {"details": details, "batch_size": batch_size, "workers": workers, "timeout": timeout}
    run = _Run(raters.plan if raters else plan, ranks, raters, **options)
    failed = run.to_file(clips, output, overwrite) if output else run.to_stdout(clips, render_table)
    if failed:
        raise typer.Exit(SOME_CLIPS_FAILED)


@app.command()
def explain(
    inputs: Inputs,
    model: Model = None,
    answers_from: AnswersFrom = AnswerSource.ADAPTER,
    device: Device = None,
    batch_size: BatchSize = None,
    workers: Workers = WORKERS,
    timeout: Timeout = 60.0,
) -> None:
    """Say why clips are rated as they are: defects, where and when, and a sentence or two. JSON lines into a pipe.

    To keep that for many clips: `lmm-qa rate --explain -o ratings.jsonl`; to look at it: `lmm-qa report`.

    **Examples**

    `lmm-qa explain clip.mp4`

    `lmm-qa explain clips/ -m runs/thqa --answers-from base`
    """
    from lmm_qa.cli.console import render_explanations
    from lmm_qa.manifest import expand

    clips = expand(inputs)
    _quiet_libraries()
    from lmm_qa.distributed import Ranks
    from lmm_qa.rater import plan_rater
    from lmm_qa.ratings import Details

    ranks = Ranks.from_environment()
    if ranks.world > 1:
        raise UsageError("explain runs in one process; for several use rate --explain -o ratings.jsonl")
    plan = plan_rater(model, device=device)
    for note in plan.notes:
        _say(f"note: {note}")
    details = Details(defects=True, explanation=True, answers_from=answers_from.value)
    options = {"details": details, "batch_size": batch_size, "workers": workers, "timeout": timeout}
    if _Run(plan, ranks, None, **options).to_stdout(clips, render_explanations):
        raise typer.Exit(SOME_CLIPS_FAILED)


@app.command()
def evaluate(
    ratings: Annotated[
        Path,
        typer.Argument(
            help="Ratings: .jsonl, .csv or .parquet as `lmm-qa rate` writes them, or .txt with a line name,score a "
            "clip.",
            show_default=False,
        ),
    ],
    labels: Annotated[
        Path,
        typer.Argument(
            help="What people said: .csv, .tsv, .jsonl or .parquet with a clip column and a column mos or score.",
            show_default=False,
        ),
    ],
    prior: Annotated[
        Path | None,
        typer.Option(
            help="Labels of the training set of THQA-NTIRE: also say how far file names alone get, and the margin "
            "over that.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="Ratings of the same clips by another rater, to compare with.", show_default=False),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw scores against MOS, with the fitted curve: .svg.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="All figures, as JSON.", show_default=False)
    ] = None,
    clip_column: ClipColumn = None,
    score_column: ScoreColumn = None,
) -> None:
    """Compare ratings with what people said: SRCC, KRCC, PLCC, RMSE and the main score, with 95% intervals.

    Clips are matched by name, or by file name where that is unambiguous. Exit code 3: done, but some labelled clips
    have no score; the figures are about the others.

    **Examples**

    `lmm-qa evaluate ratings.jsonl labels.csv`

    `lmm-qa evaluate ratings.jsonl thqa_ntire_val.csv --prior thqa_ntire_train.csv --plot scatter.svg -o metrics.json`

    `lmm-qa evaluate tuned.jsonl labels.csv --against untuned.jsonl`
    """
    from lmm_qa.evaluation import evaluate as job
    from lmm_qa.evaluation.labels import read_labels, read_scores

    columns = (clip_column, score_column)
    scores, opinions = read_scores(ratings), read_labels(labels, *columns)
    training = read_labels(prior, *columns) if prior else ()
    others = read_scores(against) if against else ()
    with _console().status("resampling the clips"):
        found = job.evaluate(scores, opinions, prior=training, against=others, against_name=str(against))
    job.render(found, _console(stderr=False))
    if output is not None:
        job.write(found, output)
        _say(f"figures -> {output}")
    if plot is not None:
        job.plot(scores, opinions, found, plot)
        _say(f"plot -> {plot}")
    if not found.complete:
        raise typer.Exit(SOME_CLIPS_FAILED)


@app.command()
def calibrate(
    ratings: Annotated[
        Path,
        typer.Argument(help="Ratings by the rater that is to be calibrated, as for evaluate.", show_default=False),
    ],
    labels: Annotated[
        Path, typer.Argument(help="What people said of these clips, as for evaluate.", show_default=False)
    ],
    into: Annotated[Path, typer.Option(help="The rater directory: calibration.json goes there.", show_default=False)],
    kind: Annotated[Mapping, typer.Option(help="How raw scores become MOS.")] = Mapping.LOGISTIC4,
    coverage: Annotated[
        float, typer.Option(help="Share of the MOS that the prediction intervals are made to hold.")
    ] = 0.9,
    scale: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Lowest and highest MOS, where the ratings declare no scale.", show_default="the ratings'"),
    ] = None,
    clip_column: ClipColumn = None,
    score_column: ScoreColumn = None,
) -> None:
    """Map a rater's scores to MOS, with prediction intervals: from then on it rates so by itself.

    Half of the clips fit the mapping, the other half the intervals; persons (THQA-NTIRE), or what a column `group`
    says, stay on one side. What the intervals hold on groups that were left out of the fit is measured and shown.
    These clips can no longer test the rater.

    **Examples**

    `lmm-qa calibrate ratings.jsonl labels.csv --into runs/thqa`

    `lmm-qa calibrate ratings.jsonl labels.csv --into runs/thqa --kind isotonic --coverage 0.8`
    """
    from lmm_qa.evaluation import calibration as job
    from lmm_qa.evaluation.labels import join, read_labels, read_scores

    joined = join(read_labels(labels, clip_column, score_column), read_scores(ratings))
    calibration = job.calibrate(joined.pairs, kind.value, coverage=coverage, scale=scale)
    path = calibration.write(into)
    print(calibration.summary())
    _say(f"{calibration.n} clips of {calibration.groups} groups -> {path}")
    if unused := len(joined.failed) + len(joined.missing):
        _say(f"{_count(unused, 'labelled clip')} without a score had no part in it")
        raise typer.Exit(SOME_CLIPS_FAILED)


@app.command()
def report(
    ratings: Annotated[
        Path,
        typer.Argument(help="Ratings: .jsonl, .csv or .parquet, as `lmm-qa rate` writes them.", show_default=False),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The page: .html.", show_default=False)],
    labels: Annotated[
        Path | None, typer.Option(help="What people said of these clips, as for evaluate.", show_default=False)
    ] = None,
    clips: Annotated[
        list[str] | None,
        typer.Option(
            help="Where the clips are: a folder, a file, a glob or a list. May be given more than once.",
            show_default="the paths in the ratings",
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Decoding processes.")] = min(4, os.cpu_count() or 1),
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that decoding one clip may take.")] = 60.0,
    clip_column: ClipColumn = None,
    score_column: ScoreColumn = None,
) -> None:
    """Make one HTML file to look at: scores, a table to sort and filter, and of each clip its frames and the reasons.

    The page needs no network and no other file. Frames are read again from the clips; of a clip that is not found, or
    is not the one that was rated, the page says so.

    **Examples**

    `lmm-qa report ratings.jsonl --clips clips/ -o report.html`

    `lmm-qa report ratings.jsonl --clips clips/ --labels labels.csv -o report.html`
    """
    from lmm_qa.evaluation import html_report as job
    from lmm_qa.evaluation.labels import read_labels

    job.check_output(output)
    opinions = read_labels(labels, clip_column, score_column) if labels else ()
    with _console().status("reading the ratings"):
        page = job.load(ratings, opinions, clips or ())
    strips = _progress(job.strips(page.entries, workers, timeout), len(page.entries), "read")
    size = job.write(page, strips, output)
    if absent := len(page.entries) - size.clips:
        found = sum(entry.file is not None for entry in page.entries)
        where = "" if found else ": say where they are with --clips FOLDER"
        _say(f"of {_count(absent)} there are no frames{where}")
    _say(f"{_count(len(page.entries) + len(page.failed))}, {job.readable(size.page)} -> {output}")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, or the name of one in configs/.", show_default=False)],
    changes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SECTION.KEY=VALUE...",
            help="Values in place of those in the file; lists are changed as data.train.0.path=train.csv.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Say what would be trained, tokens, memory, time; decode the first batch; write nothing.",
        ),
    ] = False,
) -> None:
    """Tune a model to mean opinion scores. The result is a rater directory: rate with `--model` and nothing else.

    The same command goes on where a run was interrupted. Several GPUs or machines: `accelerate launch`, with a file of
    configs/accelerate/.

    **Examples**

    `lmm-qa train configs/thqa_qwen2_vl_2b_qlora.yaml data.root=/data/thqa training.learning_rate=2e-4`

    `lmm-qa train embedded_lora data.root=clips training.output=runs/mine --dry-run`

    `accelerate launch -m lmm_qa train configs/thqa_qwen2_vl_7b_lora.yaml data.root=/data/thqa`
    """
    from lmm_qa.training.config import Recipe

    chosen = Recipe.load(recipe, changes or ())
    _quiet_libraries()
    if dry_run:
        from lmm_qa.training.dry_run import preview

        print(preview(chosen))
        return
    from lmm_qa.training.run import train as job

    outcome = job(chosen, _say)
    if outcome.interrupted_by is not None:
        raise typer.Exit(128 + outcome.interrupted_by)


@app.command()
def merge(
    rater: Annotated[Path, typer.Argument(help="A rater directory with an adapter.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="The new model directory.", show_default=False)],
) -> None:
    """Calculate an adapter into the weights: a plain transformers model, which rates the same.

    **Example**

    `lmm-qa merge runs/thqa -o thqa-merged`
    """
    _quiet_libraries()
    from lmm_qa.training.export import merge as job

    job(rater, output)
    _say(f"merged -> {output}")


@app.command()
def push(
    rater: Annotated[Path, typer.Argument(help="A rater directory.", show_default=False)],
    repository: Annotated[str, typer.Argument(help="Where to, as user/name.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Only you can see it.")] = False,
) -> None:
    """Upload a rater to the Hugging Face hub, with its model card and without its checkpoints.

    **Example**

    `lmm-qa push runs/thqa me/thqa-rater --private`
    """
    _quiet_libraries()
    from lmm_qa.training.export import push as job

    print(job(rater, repository, private=private))


@app.command()
def submit(
    ratings: Annotated[Path, typer.Argument(help="Ratings, as for evaluate.", show_default=False)],
    listed: Annotated[
        Path,
        typer.Option(
            "--list",
            help="The organisers' list: .csv with a column Video, or .txt with a name a line.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The submission: .zip.", show_default=False)],
) -> None:
    """Make a challenge submission: a zip with output.txt, a line name,score for each listed clip, in that order.

    A listed clip without a score, and a rated clip that is not listed, are refused by name.

    **Example**

    `lmm-qa submit ratings.jsonl --list thqa_ntire_testlist.csv -o submission.zip`
    """
    from lmm_qa.evaluation.labels import read_names, read_scores
    from lmm_qa.evaluation.submission import submission_text, write_submission

    names = read_names(listed)
    write_submission(output, submission_text(read_scores(ratings), names))
    _say(f"{len(names)} clips -> {output}")


@app.command()
def degrade(
    inputs: Annotated[
        list[str],
        typer.Argument(help="Clean clips: video files, folders, globs, or lists, as for rate.", show_default=False),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help="The table of labels: .jsonl, .csv or .parquet. The copies go into its folder. Run again, and only "
            "what is missing is made.",
            show_default=False,
        ),
    ],
    causes: Annotated[
        str | None, typer.Option(help="Which damage: names with commas between them.", show_default="all causes")
    ] = None,
    strengths: Annotated[
        str, typer.Option(help="How much of each: numbers above 0 (nothing to see) up to 1 (unusable).")
    ] = "0.25,0.5,0.75,1",
    pairs: Annotated[int, typer.Option(min=0, help="Besides, so many pairs of causes a source, drawn by lot.")] = 0,
    length: Annotated[float, typer.Option(help="Seconds that are used of each source, from its beginning.")] = 5.0,
    scale: Annotated[
        tuple[float, float], typer.Option(help="MOS of the worst and of the best quality, e.g. --scale 0 5.")
    ] = (1.0, 5.0),
    seed: Annotated[int, typer.Option(help="The same seed gives the same copies.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes that make copies.")] = min(4, os.cpu_count() or 1),
    root: Annotated[
        Path | None, typer.Option(help="Folder that paths in lists are relative to.", show_default="the list's folder")
    ] = None,
) -> None:
    """Damage clean clips in known ways: copies as files, and a table with cause, strength, place, time and MOS of each.

    Of each source a clean copy, each cause at each strength, and pairs. The MOS is VMAF against the source, or a stated
    curve where VMAF cannot judge, under a ceiling by the source's own size and bit rate: nobody has seen these clips.
    The table serves as labels for evaluate, calibrate and training. Copies have no sound. Exit code 3: done, but of
    some sources no copies could be made.

    Causes: defocus, mouth_smear, mouth_freeze, teeth_smear, face_warp, background_wobble, seam, identity_drift;
    flicker, overexposure, underexposure, colour_cast, banding, blur, motion_blur, rescale, noise; jpeg, h264, h265,
    vp9, av1, bitrate_switch; buffering, stall, drop, jitter.

    **Examples**

    `lmm-qa degrade clips/ -o damaged/labels.jsonl`

    `lmm-qa degrade clips/ -o damaged/labels.csv --causes h264,stall,mouth_smear --strengths 0.3,0.8 --pairs 4`
    """
    from lmm_qa.degrade.causes import DEGRADATIONS
    from lmm_qa.degrade.dataset import BadSource, DegradedDataset, Recipe
    from lmm_qa.manifest import expand

    try:
        how_much = tuple(float(strength) for strength in strengths.split(","))
    except ValueError:
        raise UsageError(f"--strengths are numbers with commas between them, received {strengths!r}") from None
    which = tuple(DEGRADATIONS) if causes is None else tuple(cause.strip() for cause in causes.split(","))
    recipe = Recipe(which, how_much, pairs, seed, scale, length)
    copies = DegradedDataset(output, expand(inputs, root), recipe)
    if known := len(copies.jobs) - len(copies.waiting):
        _say(f"{known} copies are in {output.parent} already")
    began, made = time.monotonic(), 0
    bad: list[BadSource] = []
    for outcome in _progress(copies.make(workers), len(copies.waiting) + len(copies.bad), "made"):
        if isinstance(outcome, BadSource):
            bad.append(outcome)
            _say(f"{outcome.source}: {outcome.error}")
        else:
            made += 1
    failures = f", {sum(one.copies for one in bad)} of {_count(len(bad), 'source')} could not be made" if bad else ""
    _say(f"{known + made} copies{failures}; {made} now, in {time.monotonic() - began:.1f} s -> {output}")
    if bad:
        raise typer.Exit(SOME_CLIPS_FAILED)


@app.command()
def env() -> None:
    """Versions, device, number format, attention and decoders: what to put into a bug report."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    _quiet_libraries()
    from lmm_qa.model.loading import choose_attention, choose_device, choose_dtype

    device = choose_device()
    dtype = choose_dtype(device.value)
    print(f"lmm-qa        {version('lmm-qa')}")
    print(f"python        {platform.python_version()} on {platform.platform()}")
    for package in ("torch", "torchvision", "transformers", "peft", "accelerate", "bitsandbytes", "av", "decord"):
        try:
            print(f"{package:<13} {version(package)}")
        except PackageNotFoundError:
            print(f"{package:<13} not installed")
    print(f"device        {device}")
    print(f"dtype         {dtype}")
    print(f"attention     {choose_attention(device.value, dtype.value)}")
    print(f"cores         {os.cpu_count()}")


def main() -> None:
    """Entry point: errors of ours become one line and an exit code."""
    try:
        app()
    except UsageError as error:
        _say(f"error: {error}")
        sys.exit(WRONG_USAGE)
    except LmmQaError as error:
        _say(f"error: {error}")
        sys.exit(FAILED)
    except SystemExit as done:
        if done.code == INTERRUPTED:  # what typer makes of Ctrl-C
            _say("interrupted; with -o, the same command goes on from here")
        raise
    except BrokenPipeError:
        # The reader of our output has gone: nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)


class _Run:
    """One rating run as the command does it: load late, show progress, count what failed. Only rank 0 speaks."""

    def __init__(self, plan: RaterPlan, ranks: Ranks, raters: RayRaters | None, **options: Any) -> None:
        self.plan = plan
        self.ranks = ranks
        self.raters = raters
        self.options = options

    def to_file(self, clips: Sequence[Clip], output: Path, overwrite: bool) -> int:
        """Rate what the file does not hold yet. Returns the number of clips that failed, on rank 0."""
        from lmm_qa.cli.console import render_table

        began = time.monotonic()
        ranks, names = self.ranks, [clip.name for clip in clips]
        with ranks.sink(output, names, self.plan.rater_id, overwrite, self.options["details"].columns) as sink:
            share = ranks.share(clips)
            looked_up = self._shown((_known(sink, clip) for clip in share), len(share), "looked up")
            waiting = ranks.waiting(clips, looked_up)
            self._say_known(len(clips), len(waiting), output)
            if waiting:
                written = _written(sink, self._results(ranks.taken(waiting)))
                for _ in self._shown(ranks.settled(written, len(waiting)), len(waiting), "rated"):
                    pass
        if ranks.rank or not waiting:
            return 0
        render_table(sink.rows, _console())
        _doubt_the_speaker(sink.rows)
        return _summarise(sink.rows, len(waiting), time.monotonic() - began, f" -> {output}")

    def to_stdout(self, clips: Sequence[Clip], render: Callable[[Sequence[Row], Console], None]) -> int:
        """Rate all; rendered on a terminal, JSON lines elsewhere. Returns the number of clips that failed."""
        from lmm_qa.ratings_io import print_row

        began = time.monotonic()
        rows: list[Row] = []
        for result in self._shown(self._results(clips), len(clips), "rated"):
            rows.append(result.to_row())
            if not sys.stdout.isatty():
                print_row(rows[-1], sys.stdout)
        if sys.stdout.isatty():
            render(rows, _console(stderr=False))
        _doubt_the_speaker(rows)
        return _summarise(rows, len(rows), time.monotonic() - began, "")

    def _results(self, clips: Iterable[Clip]) -> Iterator[Rating | Failure]:
        if self.raters is not None:
            _say(f"model {self.plan.source.name} in {_count(self.raters.number, 'rater')} on a Ray cluster")
            return self.raters.rate(clips, **self.options)
        rater = self.plan.load()
        if self.ranks.rank == 0:
            _describe(rater)
        return rater.rate_all(clips, **self.options)

    def _shown(self, results: Iterable[T], total: int, verb: str) -> Iterable[T]:
        return results if self.ranks.rank else _progress(results, total, verb)

    def _say_known(self, clips: int, waiting: int, output: Path) -> None:
        if self.ranks.rank or waiting == clips:
            return
        if waiting:
            _say(f"{clips - waiting} of {_count(clips)} rated in {output} already")
        else:
            _say(f"nothing to do: {_count(clips)} rated in {output} already (--overwrite rates again)")


def _written(sink: RatingsWriter, results: Iterable[Rating | Failure]) -> Iterator[None]:
    for result in results:
        sink.write(result.to_row())
        yield


def _known(sink: RatingsWriter, clip: Clip) -> bool:
    from lmm_qa.manifest import content_id

    try:
        return sink.resumes and sink.resume(clip.name, content_id(clip.path)) is not None
    except ClipError:
        return False  # it will get its error row


def _describe(rater: Rater) -> None:
    """Say once what was chosen at run time, and why."""
    choices = ", ".join(f"{name} {choice}" for name, choice in rater.backbone.choices.items())
    kind = type(rater.backbone.model.get_base_model() if rater.source.adapter else rater.backbone.model).__name__
    adapter = " + adapter" if rater.source.adapter else ""
    calibration = f"; calibrated ({rater.calibration.mapping.kind})" if rater.calibration else ""
    _say(f"model {rater.source.name} ({kind}{adapter}); {choices}{calibration}")


def _doubt_the_speaker(rows: Sequence[Row]) -> None:
    """Say so if the model hardly answers: an adapter that was tuned on levels alone may have lost its tongue."""
    masses = sorted(row["defect_mass"] for row in rows if row.get("defect_mass") is not None)
    if masses and (middle := masses[len(masses) // 2]) < ANSWERED:
        _say(
            f"note: yes and no hold {middle:.0%} of the probability after the questions on defects (median): the model "
            "does not answer them, do not trust the profile; where the rater has an adapter, try --answers-from base"
        )
    spoken = [row["explained_by"] for row in rows if row.get("explained_by")]
    if replaced := sum(by != "model" for by in spoken):
        _say(
            f"note: {replaced} of {_count(len(spoken), 'explanation')} contradicted the rating, left out a defect or "
            "broke off, and were replaced by sentences of ours (column explained_by says why)"
        )


def _count(number: int, noun: str = "clip") -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _progress(results: Iterable[T], total: int, verb: str) -> Iterator[T]:
    """Pass results on; show how many, how fast, how long still: a bar on a terminal, a line now and then elsewhere."""
    console = _console()
    began = last = time.monotonic()
    if console.is_terminal:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        text = TextColumn("{task.description}, {task.fields[rate]:.2f} clips/s")
        columns = (BarColumn(), MofNCompleteColumn(), text, TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(verb, total=total, rate=0.0)
            for done, result in enumerate(results, 1):
                bar.update(task, completed=done, rate=done / (time.monotonic() - began))
                yield result
        return
    for done, result in enumerate(results, 1):
        yield result
        now = time.monotonic()
        if now - last > PROGRESS_SECONDS and done < total:
            rate = done / (now - began)
            _say(f"{done} of {total} clips {verb}, {rate:.2f} clips/s, {(total - done) / rate:.0f} s left")
            last = now


def _summarise(rows: Sequence[Row], fresh: int, seconds: float, where: str) -> int:
    failed = sum(row["error"] is not None for row in rows)
    failures = f", {failed} could not be rated" if failed else ""
    _say(f"{_count(len(rows) - failed)} rated{failures}; {fresh} now, in {seconds:.1f} s{where}")
    return failed


def _print_plan(plan: RaterPlan, clips: Sequence[Clip], workers: int) -> None:
    """Frames, pixels and tokens of each clip, and memory: what a run would do."""
    from concurrent.futures import ThreadPoolExecutor

    from rich.table import Table

    from lmm_qa.model.inputs import count_tokens, patch_factor
    from lmm_qa.model.loading import estimate_memory, load_processor
    from lmm_qa.video.probe import ClipInfo, probe
    from lmm_qa.video.sampling import sample_indices
    from lmm_qa.video.views import view_size

    remote: dict[str, Any] = {"revision": plan.source.revision, "trust_remote_code": plan.trust_remote_code}
    processor = load_processor(plan.source.backbone, **remote)
    factor = patch_factor(processor) or 1
    settings = plan.settings

    def look(clip: Clip) -> ClipInfo | ClipError:
        try:
            return probe(clip.path)
        except ClipError as error:
            return error

    table = Table("clip", "picture", "seconds", "frames", "views", "tokens", show_edge=False, pad_edge=False)
    counted: dict[tuple[int, tuple[tuple[int, int], ...]], int] = {}
    most = failed = 0
    with ThreadPoolExecutor(workers) as pool:
        for clip, info in zip(clips, pool.map(look, clips), strict=True):
            if isinstance(info, ClipError):
                table.add_row(clip.name, "", "", "", f"{type(info).__name__}: {info}", "", style="red")
                failed += 1
                continue
            sizes = tuple(view_size(info.height, info.width, view, factor) for view in settings.views)
            frames = len(sample_indices([number / info.fps for number in range(info.frames)], settings.sampling))
            if (frames, sizes) not in counted:
                counted[frames, sizes] = count_tokens(processor, frames, sizes, settings.prompt)
            tokens = counted[frames, sizes]
            most = max(most, tokens)
            views = " ".join(f"{width}x{height}" for height, width in sizes)
            table.add_row(
                clip.name, f"{info.width}x{info.height}", f"{info.duration:.1f}", f"{frames}", views, f"{tokens}"
            )
    console = _console(stderr=False)
    if not console.is_terminal:
        console.width = 1000  # a file has no edge to wrap lines at
    console.print(table)
    memory = estimate_memory(plan.source.backbone, most, plan.dtype_chosen, plan.quantization, **remote)
    _say(
        f"{_count(len(clips) - failed)} would be rated"
        + (f", {failed} could not" if failed else "")
        + f"; at most {most} tokens a clip; {memory.parameters / 1e6:,.0f} M parameters; memory: about "
        f"{memory.weights / 2**30:.2f} GiB of weights and {memory.clip / 2**30:.3f} GiB for each clip of a batch"
    )


def _console(stderr: bool = True) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False)


def _quiet_libraries() -> None:
    """Their progress bars, advice and busy waiting are not for the people who use this command."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
