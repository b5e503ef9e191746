"""The command `lmm-qa`: parses arguments, calls the package, turns errors into exit codes.

Data goes to stdout or `-o`, everything else to stderr. Exit codes: 0 done; 1 failed; 2 wrong usage; 3 done, but some
clips could not be rated; 4 a gate did not pass. Heavy imports happen inside the commands, so that `--help` answers at
once.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from lmm_qa.cli.decisions import compare, gate
from lmm_qa.cli.options import (
    CORES,
    DEFAULT_WORKERS,
    AnswersFrom,
    AnswerSource,
    BatchSize,
    CalibrationKind,
    ClipColumn,
    EmbedClips,
    Engine,
    Inputs,
    Model,
    Root,
    ScoreColumn,
    Timeout,
    Workers,
    with_rater_options,
)
from lmm_qa.cli.raters import raters
from lmm_qa.cli.select import select
from lmm_qa.cli.terminal import (
    FAILED,
    INTERRUPTED,
    SOME_CLIPS_FAILED,
    WRONG_USAGE,
    Terminated,
    end_on_signals,
    make_console,
    message,
    progress,
    quiet_libraries,
)
from lmm_qa.cli.web import web
from lmm_qa.errors import LmmQaError, UsageError, address_in, plural

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

    Without `--model`, it uses a small model that is included in the package and needs neither a GPU nor a download.
    """


@app.command()
@with_rater_options
def rate(
    inputs: Inputs,
    rater_options: dict[str, Any],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="File for the ratings: .jsonl, .csv or .parquet. Running the command again rates only what is "
            "missing. Without it: a table on a terminal, JSON lines in a pipe.",
            show_default=False,
        ),
    ] = None,
    model: Model = None,
    defects: Annotated[
        bool, typer.Option("--defects", help="Also report a defect profile: which defects, where and when.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Also explain each rating in words; implies --defects.")
    ] = False,
    timeline: Annotated[
        bool,
        typer.Option(
            "--timeline",
            help="Also rate windows of two seconds, one every half second. Takes as many times longer as there are "
            "windows.",
        ),
    ] = False,
    answers_from: AnswersFrom = AnswerSource.ADAPTER,
    batch_size: BatchSize = None,
    workers: Workers = DEFAULT_WORKERS,
    timeout: Timeout = 60.0,
    root: Root = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Discard the ratings in the output file.")] = False,
    safe_csv: Annotated[
        bool,
        typer.Option(
            "--safe-csv",
            help="In .csv, put an apostrophe before texts that a spreadsheet would run as a formula: those that begin "
            "with = + - @, a tab or a line break. For clips with names from strangers.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show what would be rated, tokens and memory; loads no weights."),
    ] = False,
    engine: Annotated[
        Engine,
        typer.Option(help="local: this process, or the processes of a launcher. ray: raters on a Ray cluster."),
    ] = Engine.LOCAL,
) -> None:
    """Rate clips: a score for each, and the probabilities of the quality levels it is computed from.

    On several GPUs or machines: start it with `accelerate launch` or `torchrun`, whose processes share the clips; or
    use `--engine ray`.

    **Examples**

    `lmm-qa rate clip.mp4`

    `lmm-qa rate clips/ more/*.mp4 list.csv -o ratings.parquet`

    `lmm-qa rate clips/ --defects --timeline -o ratings.jsonl`

    `lmm-qa rate clips/ -m Qwen/Qwen2-VL-7B-Instruct --quantization 4bit -o ratings.jsonl`

    `lmm-qa rate clips/ -m http://127.0.0.1:8000/v1 --defects -o ratings.jsonl` (a model served by vLLM)

    `accelerate launch --multi_gpu --num_processes 4 -m lmm_qa rate clips/ -o ratings.jsonl`
    """
    from lmm_qa.cli.console import render_table
    from lmm_qa.files.tables import output_form
    from lmm_qa.manifest import expand

    form = output_form(output) if output is not None else ""
    if safe_csv and form != ".csv":
        raise UsageError(f"--safe-csv is for -o FILE.csv, received {'no -o' if output is None else f'-o {output}'}")
    clips = expand(inputs, root)
    quiet_libraries()
    from lmm_qa.cli.dry_run import print_rating_plan
    from lmm_qa.cli.run import RatingRun
    from lmm_qa.distributed import Ranks, RayRaters
    from lmm_qa.model.rater_plan import plan_rater
    from lmm_qa.ratings.rows import Details

    ranks = Ranks.from_environment()
    if output is None and not dry_run and (ranks.world > 1 or engine is Engine.RAY):
        raise UsageError("several processes return rows in no particular order and need a file: -o ratings.jsonl")
    if ranks.world > 1 and engine is Engine.RAY:
        raise UsageError("--engine ray starts its own processes: run it without accelerate launch or torchrun")
    if address_in(model or ""):
        if engine is Engine.RAY:
            raise UsageError("--engine ray loads models on a cluster; a served model is used from this process")
    else:
        rater_options["device"] = ranks.device(rater_options["device"])
    plan = plan_rater(model, **rater_options)
    details = Details(defects or explain, explain, timeline, answers_from.value)
    if ranks.rank == 0:
        for note in plan.notes:
            message(f"note: {note}")
        if dry_run:
            print_rating_plan(plan, clips, workers, details)
    if dry_run:
        return
    raters = RayRaters(plan, workers, message) if engine is Engine.RAY else None
    options = {"batch_size": batch_size, "workers": workers, "timeout": timeout}
    run = RatingRun(raters.plan if raters else plan, details, ranks, raters, **options)
    failed = run.to_file(clips, output, overwrite, safe_csv) if output else run.to_stdout(clips, render_table)
    if failed:
        raise typer.Exit(SOME_CLIPS_FAILED)


@app.command()
@with_rater_options
def explain(
    inputs: Inputs,
    rater_options: dict[str, Any],
    model: Model = None,
    answers_from: AnswersFrom = AnswerSource.ADAPTER,
    batch_size: BatchSize = None,
    workers: Workers = DEFAULT_WORKERS,
    timeout: Timeout = 60.0,
    root: Root = None,
) -> None:
    """Explain ratings: the defects of each clip, where and when, and a sentence or two. JSON lines in a pipe.

    To store explanations of many clips: `lmm-qa rate --explain -o ratings.jsonl`; to view them: `lmm-qa report`.

    **Examples**

    `lmm-qa explain clip.mp4`

    `lmm-qa explain clips/ -m runs/thqa --answers-from base`
    """
    from lmm_qa.cli.console import render_explanations
    from lmm_qa.manifest import expand

    clips = expand(inputs, root)
    quiet_libraries()
    from lmm_qa.cli.run import RatingRun
    from lmm_qa.distributed import Ranks
    from lmm_qa.model.rater_plan import plan_rater
    from lmm_qa.ratings.rows import Details

    ranks = Ranks.from_environment()
    if ranks.world > 1:
        raise UsageError("explain runs in one process; with several, use rate --explain -o ratings.jsonl")
    plan = plan_rater(model, **rater_options)
    for note in plan.notes:
        message(f"note: {note}")
    details = Details(defects=True, explanation=True, answers_from=answers_from.value)
    run = RatingRun(plan, details, ranks, batch_size=batch_size, workers=workers, timeout=timeout)
    if run.to_stdout(clips, render_explanations):
        raise typer.Exit(SOME_CLIPS_FAILED)


@app.command()
def evaluate(
    ratings: Annotated[
        Path,
        typer.Argument(
            help="Ratings: .jsonl, .csv or .parquet from `lmm-qa rate`, or .txt with one line name,score per clip.",
            show_default=False,
        ),
    ],
    labels: Annotated[
        Path,
        typer.Argument(
            help="Human opinion scores: .csv, .tsv, .jsonl or .parquet with a clip column and a column mos or score.",
            show_default=False,
        ),
    ],
    prior: Annotated[
        Path | None,
        typer.Option(
            help="Labels of the THQA-NTIRE training set: also report how well scores can be predicted from file names "
            "alone, and the rater's margin over that.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="Ratings of the same clips by another rater, for comparison.", show_default=False),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Plot scores against MOS, with the fitted curve: .svg.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="All results, as JSON.", show_default=False)
    ] = None,
    clip_column: ClipColumn = None,
    score_column: ScoreColumn = None,
) -> None:
    """Compare ratings with human opinion: SRCC, KRCC, PLCC, RMSE and the main score, with 95% confidence intervals.

    Clips are matched by the end of their paths. Exit code 3: done, but some labelled clips have
    no score and are not included.

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
    with make_console().status("resampling the clips"):
        found = job.evaluate(scores, opinions, prior=training, against=others, against_name=str(against))
    job.render(found, make_console(stderr=False))
    if output is not None:
        job.write(found, output)
        message(f"results -> {output}")
    if plot is not None:
        job.plot(scores, opinions, found, plot)
        message(f"plot -> {plot}")
    if not found.complete:
        raise typer.Exit(SOME_CLIPS_FAILED)


@app.command()
def calibrate(
    ratings: Annotated[
        Path,
        typer.Argument(help="Ratings by the rater to be calibrated, as for evaluate.", show_default=False),
    ],
    labels: Annotated[
        Path, typer.Argument(help="Human opinion scores of these clips, as for evaluate.", show_default=False)
    ],
    into: Annotated[
        Path, typer.Option(help="The rater directory; calibration.json is written there.", show_default=False)
    ],
    kind: Annotated[
        CalibrationKind, typer.Option(help="Shape of the curve that maps scores to MOS.")
    ] = CalibrationKind.LOGISTIC4,
    coverage: Annotated[float, typer.Option(help="Nominal coverage of the prediction intervals.")] = 0.9,
    scale: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Lowest and highest MOS, if the ratings declare no scale.", show_default="the ratings'"),
    ] = None,
    clip_column: ClipColumn = None,
    score_column: ScoreColumn = None,
) -> None:
    """Fit a curve that maps a rater's scores to MOS, with prediction intervals. The rater then applies it on its own.

    Half of the clips determine the curve, the other half the intervals. Clips of one person (THQA-NTIRE) or of one
    `group` (a column of the labels) stay together. The coverage on groups that were left out of the fit is reported.
    These clips can no longer be used to test the rater.

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
    message(f"{calibration.n} clips of {calibration.groups} groups -> {path}")
    if unused := len(joined.failed) + len(joined.missing):
        message(f"{plural(unused, 'labelled clip')} without a score not used")
        raise typer.Exit(SOME_CLIPS_FAILED)


@app.command()
def report(
    ratings: Annotated[
        Path,
        typer.Argument(help="Ratings: .jsonl, .csv or .parquet from `lmm-qa rate`.", show_default=False),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The page: .html.", show_default=False)],
    labels: Annotated[
        Path | None, typer.Option(help="Human opinion scores of these clips, as for evaluate.", show_default=False)
    ] = None,
    clips: Annotated[
        list[str] | None,
        typer.Option(
            help="Where the clips are: a folder, a file, a glob or a list. Can be repeated.",
            show_default="their paths in the ratings, below the working directory and the folder of the ratings",
        ),
    ] = None,
    embed_clips: EmbedClips = False,
    workers: Workers = DEFAULT_WORKERS,
    timeout: Timeout = 60.0,
    clip_column: ClipColumn = None,
    score_column: ScoreColumn = None,
) -> None:
    """Make an HTML report: a table of the clips to sort and filter; for each its frames, defects and explanation.

    The report is a single file and needs no network. Frames are decoded from the clips; the report says which clips
    were not found or have changed since they were rated. A clip plays above its timeline if the page contains it, or if
    it lies in the folder of the page.

    **Examples**

    `lmm-qa report ratings.jsonl --clips clips/ -o report.html`

    `lmm-qa report ratings.jsonl --clips clips/ --embed-clips -o report.html`

    `lmm-qa report ratings.jsonl --clips clips/ --labels labels.csv -o report.html`
    """
    from lmm_qa.evaluation import html_report as job
    from lmm_qa.evaluation.labels import read_labels
    from lmm_qa.evaluation.player import EMBED_LIMIT

    job.check_output(output)
    opinions = read_labels(labels, clip_column, score_column) if labels else ()
    with make_console().status("reading the ratings"):
        page = job.load(ratings, opinions, clips or ())
    strips = progress(job.filmstrips(page.clips, workers, timeout), len(page.clips), "read")
    size = job.write(page, strips, output, EMBED_LIMIT if embed_clips else 0)
    if absent := len(page.clips) - size.clips:
        found = sum(clip.file is not None for clip in page.clips)
        hint = "" if found else ": give their location with --clips FOLDER"
        message(f"no frames of {plural(absent)}{hint}")
    message(f"{plural(len(page.clips) + len(page.failures))}, {job.format_bytes(size.page)} -> {output}")


app.command()(compare)
app.command()(gate)
app.command()(select)
app.command()(raters)
app.command()(web)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A YAML file, or the name of one in configs/.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SECTION.KEY=VALUE...",
            help="Values that replace those in the file; for an item of a list: data.train.0.path=train.csv.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Show what would be trained, tokens, memory and time; decode the first batch; write nothing.",
        ),
    ] = False,
) -> None:
    """Fine-tune a model on mean opinion scores. The result is a rater directory for `lmm-qa rate --model`.

    Running the same command again resumes an interrupted run. For several GPUs or machines, use `accelerate launch`
    with a file from configs/accelerate/.

    **Examples**

    `lmm-qa train configs/thqa_qwen2_vl_2b_qlora.yaml data.root=/data/thqa training.learning_rate=2e-4`

    `lmm-qa train embedded_lora data.root=clips training.output_dir=runs/mine --dry-run`

    `accelerate launch -m lmm_qa train configs/thqa_qwen2_vl_7b_lora.yaml data.root=/data/thqa`
    """
    from lmm_qa.training.config import TrainingConfig

    chosen = TrainingConfig.load(config, overrides or ())
    quiet_libraries()
    if dry_run:
        from lmm_qa.training.dry_run import preview

        print(preview(chosen))
        return
    from lmm_qa.training.run import train as job

    outcome = job(chosen, message)
    if outcome.interrupted_by is not None:
        raise typer.Exit(128 + outcome.interrupted_by)


@app.command()
def merge(
    rater: Annotated[Path, typer.Argument(help="A rater directory with an adapter.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="The new model directory.", show_default=False)],
) -> None:
    """Merge an adapter into the weights: a plain transformers model with the same scores.

    **Example**

    `lmm-qa merge runs/thqa -o thqa-merged`
    """
    quiet_libraries()
    from lmm_qa.training.export import merge as job

    note = job(rater, output)
    message(f"merged -> {output}")
    if note:
        message(f"note: {note}")


@app.command()
def push(
    rater: Annotated[Path, typer.Argument(help="A rater directory.", show_default=False)],
    repository: Annotated[str, typer.Argument(help="Destination on the hub: user/name.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
) -> None:
    """Upload a rater to the Hugging Face hub, with its model card and without its checkpoints.

    **Example**

    `lmm-qa push runs/thqa me/thqa-rater --private`
    """
    quiet_libraries()
    from lmm_qa.training.export import push as job

    print(job(rater, repository, private=private))


@app.command()
def submit(
    ratings: Annotated[Path, typer.Argument(help="Ratings, as for evaluate.", show_default=False)],
    listed: Annotated[
        Path,
        typer.Option(
            "--list",
            help="The organisers' list of clips: .csv with a column Video, or .txt with one name per line.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The submission: .zip.", show_default=False)],
) -> None:
    """Make a challenge submission: a zip with output.txt, one line name,score per listed clip, in list order.

    Listed clips without a score and rated clips that are not listed are errors.

    **Example**

    `lmm-qa submit ratings.jsonl --list thqa_ntire_testlist.csv -o submission.zip`
    """
    from lmm_qa.evaluation.labels import read_names, read_scores
    from lmm_qa.evaluation.submission import submission_text, write_submission

    names = read_names(listed)
    write_submission(output, submission_text(read_scores(ratings), names))
    message(f"{len(names)} clips -> {output}")


@app.command()
def degrade(
    inputs: Annotated[
        list[str],
        typer.Argument(help="Clean clips: video files, folders, globs or lists, as for rate.", show_default=False),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help="Table of the labels: .jsonl, .csv or .parquet. The copies are written to its folder. Running the "
            "command again makes only what is missing.",
            show_default=False,
        ),
    ],
    causes: Annotated[
        str | None, typer.Option(help="Which degradations, separated by commas.", show_default="all causes")
    ] = None,
    strengths: Annotated[
        str,
        typer.Option(help="How strong each is: numbers above 0 (invisible) up to 1 (unusable), separated by commas."),
    ] = "0.25,0.5,0.75,1",
    pairs: Annotated[
        int, typer.Option(min=0, help="Also make copies with two degradations: this many random pairs per source.")
    ] = 0,
    length: Annotated[float, typer.Option(help="Use the first seconds of each source.")] = 5.0,
    scale: Annotated[
        tuple[float, float], typer.Option(help="MOS of the worst and of the best quality, e.g. --scale 0 5.")
    ] = (1.0, 5.0),
    seed: Annotated[int, typer.Option(help="Seed of the random choices.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Number of processes.", show_default=CORES)] = DEFAULT_WORKERS,
    root: Root = None,
) -> None:
    """Create degraded copies of clean clips, with reference labels: cause, strength, place, time and MOS.

    Each source gives a clean copy, one copy per cause and strength, and the pairs. Nobody has rated these clips: the
    MOS comes from VMAF against the source, or from a documented curve for causes that VMAF cannot measure, limited by
    the size and bit rate of the source. The table can be used as labels for evaluate, calibrate and train. Copies have
    the sound of their source. Exit code 3: done, but some sources could not be used.

    Causes: defocus, mouth_smear, mouth_freeze, teeth_smear, face_warp, background_wobble, seam, identity_drift;
    flicker, overexposure, underexposure, colour_cast, banding, blur, motion_blur, rescale, noise; jpeg, h264, h265,
    vp9, av1, bitrate_switch; buffering, stall, drop, jitter. In the sound, and only if they are named, because a model
    that does not hear cannot learn from them: audio_lead, audio_lag, wrong_audio, drift.

    **Examples**

    `lmm-qa degrade clips/ -o degraded/labels.jsonl`

    `lmm-qa degrade clips/ -o degraded/labels.csv --causes h264,stall,mouth_smear --strengths 0.3,0.8 --pairs 4`

    `lmm-qa degrade clips/ -o sync/labels.csv --causes audio_lead,audio_lag,wrong_audio`
    """
    from lmm_qa.degrade.causes import DEGRADATIONS
    from lmm_qa.degrade.dataset import DegradationPlan, DegradedDataset, FailedSource
    from lmm_qa.manifest import expand

    try:
        how_much = tuple(float(strength) for strength in strengths.split(","))
    except ValueError:
        raise UsageError(f"--strengths are numbers separated by commas, received {strengths!r}") from None
    which = tuple(DEGRADATIONS) if causes is None else tuple(cause.strip() for cause in causes.split(","))
    plan = DegradationPlan(which, how_much, pairs, seed, scale, length)
    dataset = DegradedDataset(output, expand(inputs, root), plan)
    if dataset.without_sound:
        message(f"{plural(len(dataset.without_sound), 'source')} without sound: no copies with causes in the sound")
    if known := len(dataset.tasks) - len(dataset.pending):
        message(f"{known} copies already in {output.parent}")
    start, made = time.monotonic(), 0
    failed: list[FailedSource] = []
    for outcome in progress(dataset.make(workers), len(dataset.pending) + len(dataset.failed), "made"):
        if isinstance(outcome, FailedSource):
            failed.append(outcome)
            message(f"{outcome.source}: {outcome.error}")
        else:
            made += 1
    count = sum(each.copies for each in failed)
    failures = f", {count} of {plural(len(failed), 'source')} could not be made" if failed else ""
    message(f"{known + made} copies{failures}; {made} new, in {time.monotonic() - start:.1f} s -> {output}")
    if failed:
        raise typer.Exit(SOME_CLIPS_FAILED)


@app.command()
def env() -> None:
    """Show versions, device, dtype and attention implementation, for bug reports.

    **Example**

    `lmm-qa env`
    """
    import platform
    from importlib.metadata import PackageNotFoundError, version

    quiet_libraries()
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
    """Entry point: turns errors of the package into a message and an exit code."""
    # Imports of torch and transformers create a million objects that stay: with Python's default threshold of 700, the
    # garbage collector spends 0.7 s on them.
    gc.set_threshold(10_000)
    end_on_signals()
    try:
        app()
    except UsageError as error:
        message(f"error: {error}")
        sys.exit(WRONG_USAGE)
    except LmmQaError as error:
        message(f"error: {error}")
        sys.exit(FAILED)
    except SystemExit as done:
        if done.code == INTERRUPTED or isinstance(done, Terminated):  # the former is typer's exit code for Ctrl-C
            with suppress(OSError):  # a terminal sends SIGHUP when it is closed, and cannot be written to then
                message("interrupted; with -o, the same command resumes")
        raise
    except BrokenPipeError:
        # The process that reads the output has ended.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)
