"""The command `lmm-qa select`: keep rated clips by a condition, or choose clips to be labelled."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from lmm_qa.cli.terminal import SOME_CLIPS_FAILED, make_console, message
from lmm_qa.errors import UsageError, plural
from lmm_qa.files.tables import Row


def select(
    ratings: Annotated[
        Path,
        typer.Argument(help="Ratings: .jsonl, .csv or .parquet from `lmm-qa rate`.", show_default=False),
    ],
    keep: Annotated[
        str | None,
        typer.Option(
            help="Keep the clips that fulfil a condition on columns and defects, with < <= > >= == != in, and, or, "
            "not. In a comparison a defect is its probability; alone, it says whether the defect was found.",
            show_default=False,
        ),
    ] = None,
    to_label: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Choose this many clips that are worth a human opinion: unlike each other, and with uncertain scores.",
            show_default=False,
        ),
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(
            help="For --to-label: the column with the person or source of a clip, or a regular expression whose group "
            "matches it in the clip's name, e.g. '^(.+?)__'. Each has a fair share of the clips.",
            show_default="class and person of THQA-NTIRE names",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="File for the selected rows: .jsonl, .csv or .parquet. With --to-label it is a list with an empty "
            "column mos. Without it: a table on a terminal, JSON lines in a pipe.",
            show_default=False,
        ),
    ] = None,
    copy_to: Annotated[
        Path | None,
        typer.Option(
            help="Also copy the selected clips into this folder, under their names in the ratings. Other files are "
            "never overwritten.",
            show_default=False,
        ),
    ] = None,
    clips: Annotated[
        list[str] | None,
        typer.Option(
            help="Where the clips to be copied are: a folder, a file, a glob or a list. Can be repeated.",
            show_default="the paths in the ratings",
        ),
    ] = None,
) -> None:
    """Select rated clips: by a condition (a filter for training data), or those that are worth a human opinion.

    A comparison with a value that is null is neither true nor false, as in SQL, and does not keep the clip; it is
    counted. Clips that could not be rated are never selected. Exit code 3: done, but some clips could not be copied.

    **Examples**

    `lmm-qa select ratings.jsonl --keep 'score >= 3.5 and not stall and blur < 0.3' --copy-to clean/`

    `lmm-qa select ratings.parquet --keep "level in ('good', 'excellent') and video.width >= 512" -o kept.jsonl`

    `lmm-qa select ratings.jsonl --to-label 200 --group '^(.+?)_' -o label_these.csv`
    """
    from lmm_qa.evaluation.labels import find_videos
    from lmm_qa.evaluation.row_filter import copy_clips, filter_rows
    from lmm_qa.evaluation.selection import choose_clips, clip_groups
    from lmm_qa.files.tables import output_form, write_rows
    from lmm_qa.ratings.io import read_ratings

    if keep is None and to_label is None:
        raise UsageError("nothing to select by: give a condition with --keep, or a number of clips with --to-label")
    if output is not None:
        output_form(output)
        if output.exists() and output.samefile(ratings):
            raise UsageError(f"-o would replace the ratings {ratings}: name another file")
    rows = read_ratings(ratings)
    filtered = filter_rows(rows, keep or "True")
    selected = list(filtered.kept)
    if keep is not None:
        failed = f"; {filtered.failed} could not be rated" if filtered.failed else ""
        message(f"kept {len(selected)} of {plural(len(rows))}{failed}")
        for clause in filtered.clauses:
            unknown = f", unknown for {clause.unknown}" if clause.unknown else ""
            message(f"  {clause.text:<40} false for {clause.dropped}{unknown}")
    table = selected
    if to_label is not None:
        chosen = choose_clips(selected, to_label, clip_groups(selected, group))
        selected, table = [each.row for each in chosen], [each.to_row() for each in chosen]
        message(f"chose {plural(len(chosen))} of {len({each.group for each in chosen})} groups to be labelled")
    if output is not None:
        write_rows(output, table)
        message(f"{plural(len(table), 'row')} -> {output}")
    elif copy_to is None:
        _show(selected, table)
    if copy_to is not None:
        files = find_videos([row["clip"] for row in selected], clips or (), ratings.parent)
        copies = copy_clips(selected, files, copy_to)
        present = f", {copies.present} already there" if copies.present else ""
        message(f"copied {plural(copies.copied)}{present} -> {copy_to}")
        for problem in copies.problems:
            message(f"not copied: {problem}")
        if copies.problems:
            raise typer.Exit(SOME_CLIPS_FAILED)


def _show(selected: Sequence[Row], table: Sequence[Row]) -> None:
    """Print ratings on a terminal, or the rows of the output as JSON lines in a pipe."""
    from lmm_qa.cli.console import render_table
    from lmm_qa.ratings.io import print_row

    if sys.stdout.isatty():
        render_table(selected, make_console(stderr=False))
    else:
        for row in table:
            print_row(row, sys.stdout)
