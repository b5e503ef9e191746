"""The command `lmm-qa raters`: which published raters are known, and what is known about them."""

from __future__ import annotations

from typing import Annotated

import typer

from lmm_qa.cli.terminal import make_console, message

EMBEDDED = "its own measure of damage to the signal (blur, compression, noise, stalls); not human scores"


def raters(
    name: Annotated[
        str | None, typer.Argument(help="Show this rater with all published figures.", show_default=False)
    ] = None,
    json: Annotated[
        bool,
        typer.Option("--json", help="Print the settings of NAME as a rater.json, for a local copy of its weights."),
    ] = False,
) -> None:
    """List published raters that `--model` knows by name: size, memory, licence, and what they were tuned on.

    Their weights come from the Hugging Face hub when they are first used. To use a copy in a directory, put the
    settings there as rater.json.

    **Examples**

    `lmm-qa raters`

    `lmm-qa raters qrealign-mini`

    `lmm-qa raters qrealign-mini --json > /models/Q-ReAlign-Mini-0.8B/rater.json`
    """
    from rich.table import Table

    from lmm_qa.errors import UsageError
    from lmm_qa.model.presets import get_preset, presets
    from lmm_qa.model.rater_config import EMBEDDED_NAME

    console = make_console(stderr=False)
    if not console.is_terminal:
        console.width = 1000  # do not wrap lines in a file
    if name is None:
        if json:
            raise UsageError("--json prints the settings of one rater: give its name, see lmm-qa raters")
        table = Table("name", "weights", "memory", "licence", "tuned on", show_edge=False, pad_edge=False)
        table.add_row(EMBEDDED_NAME, "ships with the package", "0.3 GB", "Apache-2.0", EMBEDDED)
        for known, preset in presets().items():
            memory, tuned_on = f"{preset.memory:.0f} GB", preset.tuned_on or "nothing: zero-shot"
            table.add_row(known, preset.model, memory, preset.license, tuned_on)
        console.print(table)
        message("memory: weights in 16 bits and one clip, roughly. Published figures: lmm-qa raters NAME")
        return
    if name == EMBEDDED_NAME and not json:
        console.print(f"{name} ships with the package and rates if there is no --model. It has learned {EMBEDDED}.")
        return
    preset = get_preset(name)
    if json:
        print(preset.settings().model_dump_json(indent=2, exclude_none=True))
        return
    settings = preset.settings()
    facts = {
        "what": preset.description,
        "weights": f"{preset.model} on the Hugging Face hub, {preset.parameters:g} billion parameters",
        "revision": preset.revision or "main",
        "licence": preset.license,
        "memory": f"about {preset.memory:.0f} GB",
        "tuned on": preset.tuned_on or "no human scores: it rates zero-shot",
        "published": "\n".join(f"{each.figure} ({each.source})" for each in preset.published) or "nothing about rating",
        "question": settings.prompt.question,
        "answer": f"{settings.prompt.stem.strip()} ...",
        "frames": f"{settings.sampling.frames} as {settings.prompt.frames}",
        "scale": "{:g} to {:g}".format(*settings.scale),
    }
    table = Table.grid(padding=(0, 2))
    for fact, value in facts.items():
        table.add_row(fact, value)
    console.print(table, highlight=False)
