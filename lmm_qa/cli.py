"""The command `lmm-qa`. Turns words into calls, errors into exit codes; data to stdout or `-o`, the rest to stderr.

Exit codes: 0 done; 1 failed; 2 wrong usage; 3 done, but some clips could not be rated.
Imports of weight happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmm_qa.errors import ClipError, LmmQaError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from lmm_qa.manifest import Clip
    from lmm_qa.rater import Failure, Rater, RaterPlan, Rating
    from lmm_qa.results import Row, Sink

FAILED, WRONG_USAGE, SOME_CLIPS_FAILED, INTERRUPTED = 1, 2, 3, 130
PROGRESS_SECONDS = 30
"""How often a line of progress is written where stderr is no terminal."""


class Quantization(StrEnum):
    FOUR = "4bit"
    EIGHT = "8bit"


class Dtype(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


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
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Video files, folders (searched through), globs, or lists of clips: .csv .tsv .jsonl .parquet with a "
            "column clip, video or path; .txt with a path a line.",
            show_default=False,
        ),
    ],
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
    model: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            help="Rater directory, PEFT adapter, model directory, or an id on the Hugging Face hub.",
            show_default="the embedded model",
        ),
    ] = None,
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
            "resolution). Give it twice for both.",
            show_default="the model's",
        ),
    ] = None,
    quantization: Annotated[
        Quantization | None, typer.Option(help="Weights in 4 or 8 bits: less memory.", show_default=False)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cuda, cuda:1, mps, cpu.", show_default="the best one here")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Number format.", show_default="suits the device")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips that go through the model together.")] = 4,
    workers: Annotated[int, typer.Option(min=1, help="Decoding processes.")] = min(4, os.cpu_count() or 1),
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that decoding one clip may take.")] = 60.0,
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
) -> None:
    """Rate clips: one score a clip, and the probabilities of the levels behind it.

    **Examples**

    `lmm-qa rate clip.mp4`

    `lmm-qa rate clips/ more/*.mp4 list.csv -o ratings.parquet`

    `lmm-qa rate clips/ -m Qwen/Qwen2-VL-7B-Instruct --quantization 4bit -o ratings.jsonl`
    """
    from lmm_qa.config import Sampling, View
    from lmm_qa.manifest import expand
    from lmm_qa.results import output_form

    if output is not None:
        output_form(output)
    clips = expand(inputs, root)
    chosen_sampling = Sampling.from_text(sampling) if sampling else None
    chosen_views = [View.from_text(text) for text in view] if view else None
    _quiet_libraries()
    from lmm_qa.rater import plan_rater

    plan = plan_rater(
        model,
        revision=revision,
        prompt=prompt,
        scale=scale,
        sampling=chosen_sampling,
        views=chosen_views,
        quantization=quantization.value if quantization else None,
        device=device,
        dtype=dtype.value if dtype else None,
        trust_remote_code=trust_remote_code,
    )
    if plan.source.note:
        _say(f"note: {plan.source.note}")
    if dry_run:
        _print_plan(plan, clips, workers)
        return
    run = _Run(plan, batch_size, workers, timeout)
    failed = run.to_file(clips, output, overwrite) if output else run.to_stdout(clips)
    if failed:
        raise typer.Exit(SOME_CLIPS_FAILED)


@app.command()
def env() -> None:
    """Versions, device, number format, attention and decoders: what to put into a bug report."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    _quiet_libraries()
    from lmm_qa.backbone import choose_attention, choose_device, choose_dtype

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
    """One rating run as the command does it: load late, show progress, count what failed."""

    def __init__(self, plan: RaterPlan, batch_size: int, workers: int, timeout: float) -> None:
        self.plan = plan
        self.options: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "timeout": timeout}

    def to_file(self, clips: Sequence[Clip], output: Path, overwrite: bool) -> int:
        """Rate what the file does not hold yet. Returns the number of clips that failed."""
        from lmm_qa.results import Sink, render_table

        began = time.monotonic()
        with Sink(output, [clip.name for clip in clips], self.plan.rater_id, overwrite) as sink:
            waiting = [clip for clip in clips if not _known(sink, clip)]
            if not waiting:
                _say(f"nothing to do: all {len(clips)} clips are rated in {output} (--overwrite rates them again)")
                return 0
            if sink.reused:
                _say(f"{sink.reused} of {len(clips)} clips are rated in {output} already")
            for result in self._results(waiting):
                sink.write(result.to_row())
            rows = sink.rows
        render_table(rows, _console())
        return _summarise(rows, len(waiting), time.monotonic() - began, f" -> {output}")

    def to_stdout(self, clips: Sequence[Clip]) -> int:
        """Rate all; a table on a terminal, JSON lines elsewhere. Returns the number of clips that failed."""
        from lmm_qa.results import print_row, render_table

        began = time.monotonic()
        rows: list[Row] = []
        for result in self._results(clips):
            rows.append(result.to_row())
            if not sys.stdout.isatty():
                print_row(rows[-1], sys.stdout)
        if sys.stdout.isatty():
            render_table(rows, _console(stderr=False))
        return _summarise(rows, len(rows), time.monotonic() - began, "")

    def _results(self, clips: Sequence[Clip]) -> Iterator[Rating | Failure]:
        rater = self.plan.load()
        _describe(rater)
        yield from _progress(rater.rate_all(clips, **self.options), len(clips))


def _known(sink: Sink, clip: Clip) -> bool:
    from lmm_qa.manifest import content_id

    try:
        return sink.resume(clip.name, content_id(clip.path)) is not None
    except ClipError:
        return False  # it will get its error row


def _describe(rater: Rater) -> None:
    """Say once what was chosen at run time, and why."""
    choices = ", ".join(f"{name} {choice}" for name, choice in rater.backbone.choices.items())
    kind = type(rater.backbone.model.get_base_model() if rater.source.adapter else rater.backbone.model).__name__
    adapter = " + adapter" if rater.source.adapter else ""
    _say(f"model {rater.source.name} ({kind}{adapter}); {choices}")


def _progress(results: Iterable[Rating | Failure], total: int) -> Iterator[Rating | Failure]:
    """Pass results on; show how many, how fast, how long still: a bar on a terminal, a line now and then elsewhere."""
    console = _console()
    began = last = time.monotonic()
    if console.is_terminal:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=total, rate="")
            for done, result in enumerate(results, 1):
                bar.update(task, completed=done, rate=f"{done / (time.monotonic() - began):.2f} clips/s")
                yield result
        return
    for done, result in enumerate(results, 1):
        yield result
        now = time.monotonic()
        if now - last > PROGRESS_SECONDS and done < total:
            rate = done / (now - began)
            _say(f"{done} of {total} clips, {rate:.2f} clips/s, {(total - done) / rate:.0f} s left")
            last = now


def _summarise(rows: Sequence[Row], fresh: int, seconds: float, where: str) -> int:
    failed = sum(row["error"] is not None for row in rows)
    failures = f", {failed} could not be rated" if failed else ""
    _say(f"{len(rows) - failed} clips rated{failures}; {fresh} now, in {seconds:.1f} s{where}")
    return failed


def _print_plan(plan: RaterPlan, clips: Sequence[Clip], workers: int) -> None:
    """Frames, pixels and tokens of each clip, and memory: what a run would do."""
    from concurrent.futures import ThreadPoolExecutor

    from rich.table import Table

    from lmm_qa.backbone import count_tokens, estimate_memory, load_processor, patch_factor
    from lmm_qa.video import ClipInfo, probe, sample_indices, view_size

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
    _console(stderr=False).print(table)
    memory = estimate_memory(plan.source.backbone, most, plan.dtype_chosen, plan.quantization, **remote)
    _say(
        f"{len(clips) - failed} clips would be rated"
        + (f", {failed} could not" if failed else "")
        + f"; at most {most} tokens a clip; {memory.parameters / 1e6:,.0f} M parameters; memory: about "
        f"{memory.weights / 2**30:.2f} GiB of weights and {memory.clip / 2**30:.3f} GiB for each clip of a batch"
    )


def _console(stderr: bool = True) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False)


def _quiet_libraries() -> None:
    """Their progress bars and advice are not for the people who use this command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    with contextlib.suppress(ImportError):
        logging: Any = importlib.import_module("transformers.utils.logging")
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
