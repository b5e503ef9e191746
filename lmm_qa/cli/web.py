"""The command `lmm-qa web`: the page on which clips are rated in a browser."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from lmm_qa.cli.options import DEFAULT_WORKERS, Model, Timeout, Workers, with_rater_options
from lmm_qa.cli.terminal import message, quiet_libraries
from lmm_qa.errors import UsageError

PASSWORD = "LMM_QA_PASSWORD"


@with_rater_options
def web(
    rater_options: dict[str, Any],
    sets: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Folders of clips and files of ratings of this machine that the tab *A set* offers. Visitors cannot "
            "read any other file.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. One that other machines can reach needs a password.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port.", show_default="the first free one from 7860 on")
    ] = None,
    password: Annotated[
        bool,
        typer.Option(
            "--password", help=f"Ask for a password: the environment variable {PASSWORD} if it is set, else typed here."
        ),
    ] = False,
    password_file: Annotated[
        Path | None, typer.Option(help="Ask for a password: the first line of this file.", show_default=False)
    ] = None,
    max_size: Annotated[int, typer.Option(min=1, help="Largest upload, in MB.")] = 200,
    time_limit: Annotated[
        float, typer.Option(min=1, help="Time limit for a request, in seconds; clips that are left are not rated.")
    ] = 600.0,
    model: Model = None,
    workers: Workers = DEFAULT_WORKERS,
    timeout: Timeout = 60.0,
) -> None:
    """Open a page on this machine to rate clips, compare them and look at a set, in a browser.

    Nothing leaves the machine, and nothing is downloaded: of the published raters, those work whose weights are here.
    Uploads lie in a private folder, and are deleted after an hour and at the end. Requests wait in a queue. Needs the
    extra `web`: `pip install 'lmm-qa[web]'`.

    **Examples**

    `lmm-qa web`

    `lmm-qa web clips/ ratings.jsonl --port 8080`

    `lmm-qa web --host 0.0.0.0 --password-file password.txt --max-size 50`
    """
    from lmm_qa.web.server import Address, prepare, serve

    prepare()
    address = Address(host, port, _password(password, password_file), max_size)
    address.check()
    offered = _named(sets or [])
    quiet_libraries()
    from lmm_qa.model.prompt import prompt_names
    from lmm_qa.web.jobs import Jobs
    from lmm_qa.web.shelf import RaterSettings, Shelf
    from lmm_qa.web.workspace import Workspace

    if model and Path(model).is_dir():
        model = str(Path(model).resolve())
    shelf = Shelf(model, rater_options)
    for note in shelf.plan(shelf.first, RaterSettings()).notes:
        message(f"note: {note}")
    with Workspace() as workspace, Jobs(workspace, shelf, offered, workers, timeout, time_limit) as jobs:
        from lmm_qa.web.page import build

        serve(build(jobs, prompt_names()), address, lambda url: message(f"open {url} in a browser; Ctrl-C ends it"))


def _password(ask: bool, file: Path | None) -> str | None:
    """From the file, the environment or the terminal: an argument would be visible to other users of the machine."""
    if file is not None:
        try:
            password = file.read_text(encoding="utf-8").partition("\n")[0].strip("\r")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--password-file {file} cannot be read: {error}") from None
        where = f"the first line of {file}"
    elif PASSWORD in os.environ:
        password, where = os.environ[PASSWORD], f"the environment variable {PASSWORD}"
    elif ask:
        password = typer.prompt("Password for the page", hide_input=True, confirmation_prompt=True)
        where = "what you typed"
    else:
        return None
    if not password.strip():
        raise UsageError(f"the password is empty: {where}")
    return password


def _named(paths: list[Path]) -> dict[str, Path]:
    """Sets by a name that does not say where they are."""
    named: dict[str, Path] = {}
    for path in paths:
        if not path.exists():
            raise UsageError(f"{path} does not exist: give folders of clips and files of ratings")
        resolved = path.resolve()
        if resolved.is_file() and resolved.suffix.lower() not in (".jsonl", ".csv", ".parquet"):
            raise UsageError(f"ratings are .jsonl, .csv or .parquet, received {path}")
        name, number = resolved.name, 2
        while name in named:
            name, number = f"{resolved.name} ({number})", number + 1
        named[name] = resolved
    return named
