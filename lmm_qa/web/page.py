"""The page: gradio gives the frame, uploads, queue and cancel; what is shown of clips is HTML of ours."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, cast

import gradio as gr
from gradio.data_classes import FileData, ListFiles

from lmm_qa.config import Sampling, View
from lmm_qa.errors import LmmQaError, UsageError
from lmm_qa.evaluation.html_report import asset, render, thumbnail
from lmm_qa.manifest import VIDEO_SUFFIXES
from lmm_qa.video.decode import Frames
from lmm_qa.video.decoder_pool import DecoderPool
from lmm_qa.web.jobs import PAIR_BY, RATINGS, Given, Jobs, Request, Step
from lmm_qa.web.shelf import RaterSettings

QUEUE = 20
"""Requests that may wait; one is worked on."""

SAMPLES = Path(str(resources.files("lmm_qa"))) / "samples"

TITLE = """<div class="lmm-qa">
<h1>lmm_qa</h1><p class="note">Rates the visual quality of talking-head video.</p>
</div>"""

REVEAL = """() => {
  const results = [...document.querySelectorAll(".lmm-qa-result")];
  const behavior = matchMedia("(prefers-reduced-motion: reduce)").matches ? "instant" : "smooth";
  results.find((one) => one.offsetHeight > 50)?.scrollIntoView({block: "start", behavior});
}"""
"""Shows the result of the tab that is open."""

PICK = """element.addEventListener("click", ({target}) => {
  const button = target.closest("[data-sample]");
  if (button) trigger("select", {sample: button.dataset.sample});
})"""
"""Tells gradio which sample was pressed."""


def head() -> str:
    """The style sheet and the script of the player.

    The sheet is that of the report for what is inside of `.lmm-qa`; gradio's own parts keep theirs. It is here, because
    gradio would change its selectors, and runs no script in the results.
    """
    inside = "".join(map(asset, ("report.css", "comparison.css", "web.css")))
    style = f"{asset('document.css')}\n.lmm-qa {{\n{inside}\n}}\n{asset('gradio.css')}"
    return f"<style>{style}</style>\n<script>{asset('player.js')}</script>"


def theme() -> gr.themes.Base:
    """Colours of the report, and fonts of the system: gradio's own are fetched from elsewhere."""
    paper, raised, ink, quiet, line, blue = (
        f"var(--{name})" for name in ("paper", "raised", "ink", "quiet", "line", "blue")
    )
    plain = {
        "body_background_fill": paper,
        "body_text_color": ink,
        "body_text_color_subdued": quiet,
        "background_fill_primary": raised,
        "background_fill_secondary": paper,
        "block_background_fill": raised,
        "block_border_color": line,
        "block_label_background_fill": raised,
        "block_label_text_color": quiet,
        "block_title_text_color": quiet,
        "block_info_text_color": quiet,
        "border_color_primary": line,
        "border_color_accent": blue,
        "color_accent": blue,
        "color_accent_soft": "var(--faint)",
        "input_background_fill": raised,
        "input_border_color": line,
        "input_border_width": "1px",
        "table_even_background_fill": raised,
        "table_odd_background_fill": "var(--faint)",
        "link_text_color": blue,
        "button_primary_background_fill": blue,
        "button_primary_background_fill_hover": blue,
        "button_primary_text_color": paper,
        "button_secondary_background_fill": "var(--faint)",
        "button_secondary_background_fill_hover": line,
        "button_secondary_text_color": ink,
        "loader_color": blue,
        "slider_color": blue,
        "checkbox_background_color_selected": blue,
        "checkbox_border_color_selected": blue,
    }
    base = gr.themes.Base(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"], radius_size=gr.themes.sizes.radius_sm
    )
    dark = {f"{name}_dark": value for name, value in plain.items()}
    return base.set(**plain, **{name: value for name, value in dark.items() if name in _settable(base)})


def _settable(base: gr.themes.Base) -> set[str]:
    import inspect

    return set(inspect.signature(base.set).parameters)


class _Inputs:
    """The rater and its settings, shared by the tabs."""

    def __init__(self, jobs: Jobs, prompts: Sequence[str]) -> None:
        shelf = jobs.shelf
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=260):
                self.rater = gr.Dropdown(shelf.names, value=shelf.first, label="Rater", filterable=False)
            with gr.Column(scale=5, min_width=260):
                self.about = html(render("web_parts", kind="about", rater=shelf.about(shelf.first)))
        with gr.Accordion("Settings", open=False), gr.Row():
            self.timeline = gr.Checkbox(True, label="Score over time", info="--timeline; slower")
            own = ("the rater's own", "")
            self.prompt = gr.Dropdown([own, *prompts], value="", label="Prompt", info="--prompt")
            self.sampling = gr.Textbox("", label="Frames", info="--sampling", placeholder="uniform:8")
            self.views = gr.Textbox("", label="Views", info="--view; one or more", placeholder="whole:448 face:224")
            self.scale = gr.Textbox("", label="Scale", info="--scale", placeholder="1 5")
            self.answers = gr.Dropdown(
                ["adapter", "base"], value="adapter", label="Explained by", info="--answers-from"
            )
        self.rater.change(
            lambda name: inert(render("web_parts", kind="about", rater=shelf.about(name))),
            self.rater,
            self.about,
            show_progress="hidden",
            queue=False,
            api_visibility="private",
        )

    @property
    def all(self) -> list[Any]:
        return [self.rater, self.timeline, self.prompt, self.sampling, self.views, self.scale, self.answers]

    @staticmethod
    def request(
        rater: str, timeline: bool, prompt: str, sampling: str, views: str, scale: str, answers: Any
    ) -> Request:
        """Raises UsageError if the scale is not two numbers."""
        try:
            ends = [float(part) for part in scale.split()]
        except ValueError:
            ends = [0.0]
        if len(ends) not in (0, 2):
            raise UsageError(f"the scale is two numbers, such as 1 5, received {scale!r}")
        settings = RaterSettings(
            prompt or None, (ends[0], ends[1]) if ends else None, sampling.strip() or None, tuple(views.split())
        )
        return Request(rater, settings, timeline, answers)


def build(jobs: Jobs, prompts: Sequence[str]) -> gr.Blocks:
    """Build the page.

    Args:
        jobs: what is done on request.
        prompts: names of the prompts that can be chosen.
    """
    samples = {path.stem: path for path in sorted(SAMPLES.glob("*.mp4"))}
    videos = list(VIDEO_SUFFIXES)
    page = gr.Blocks(title="lmm_qa", analytics_enabled=False, fill_width=False)
    with page:
        html(TITLE)
        inputs = _Inputs(jobs, prompts)
        with gr.Tab("Rate"):
            with gr.Row(equal_height=True):
                with gr.Column(scale=2, min_width=260):
                    clips = _file_input("Clips", "clips", videos, 170)
                with gr.Column(scale=5, min_width=260):
                    pictures = _sample_pictures(samples, jobs.decoders)
                    picker = html(render("web_parts", kind="samples", samples=pictures), js_on_load=PICK)
            start, cancel, status, result = _outputs("Rate")

            def rate(by: gr.Request, files: list[Given], *values: Any) -> Iterator[Any]:
                yield from _run(jobs, lambda: jobs.rate(files, inputs.request(*values), _visitor(by, "rate")))

            def rate_sample(by: gr.Request, event: gr.EventData, *values: Any) -> Iterator[Any]:
                name = str(event._data.get("sample"))
                given = [Given(samples[name], samples[name].name, uploaded=False)] if name in samples else []
                yield from _run(jobs, lambda: jobs.rate(given, inputs.request(*values), _visitor(by, "rate")))

            events = [
                _listen(listen, rate, [clips, *inputs.all], [status, result]) for listen in (clips.upload, start.click)
            ]
            events.append(_listen(picker.select, rate_sample, inputs.all, [status, result]))
            _cancel(jobs, cancel, "rate", events, [status, result])
        with gr.Tab("Compare"):
            with gr.Row():
                old = _file_input("Old", "old", videos)
                new = _file_input("New", "new", videos)
            pairs = gr.Radio(
                list(PAIR_BY), value="name", label="Pairs share", info="If there are several clips. --pair"
            )
            start, cancel, status, result = _outputs("Compare")

            def compare(by: gr.Request, old: list[Given], new: list[Given], pairs: str, *values: Any) -> Iterator[Any]:
                visitor = _visitor(by, "compare")
                yield from _run(jobs, lambda: jobs.compare(old, new, pairs, inputs.request(*values), visitor))

            events = [_listen(start.click, compare, [old, new, pairs, *inputs.all], [status, result])]
            _cancel(jobs, cancel, "compare", events, [status, result])
        with gr.Tab("A set"):
            with gr.Row():
                files = _file_input("Ratings and their clips, or clips", "set", [*videos, *RATINGS])
                offered = gr.Dropdown(
                    list(jobs.sets), label="Or a set on the server", value=None, visible=bool(jobs.sets)
                )
            start, cancel, status, result = _outputs("Make the report")

            def report(by: gr.Request, files: list[Given], offered: str | None, *values: Any) -> Iterator[Any]:
                visitor = _visitor(by, "report")
                yield from _run(jobs, lambda: jobs.report(files, offered, inputs.request(*values), visitor))

            events = [_listen(start.click, report, [files, offered, *inputs.all], [status, result])]
            _cancel(jobs, cancel, "report", events, [status, result])
    page.queue(default_concurrency_limit=1, max_size=QUEUE)
    return page


def html(value: str, **options: Any) -> gr.HTML:
    """A component with HTML of ours."""
    return gr.HTML(inert(value), apply_default_css=False, **{"js_on_load": None, **options})


def inert(value: str) -> str:
    """HTML in which gradio finds no template: it evaluates `${}` and `{{}}` in values."""
    return value.replace("{", "&#123;").replace("}", "&#125;").replace("$", "&#36;")


def _file_input(label: str, name: str, suffixes: list[str], height: int = 150) -> gr.File:
    """An upload whose files keep the names that they have for the visitor: gradio removes characters from its own."""
    file = gr.File(label=label, elem_id=name, file_count="multiple", file_types=suffixes, height=height)
    read = file.preprocess

    def preprocess(payload: ListFiles | FileData | None) -> list[Given]:
        files = [] if payload is None else [payload] if isinstance(payload, FileData) else payload.root
        paths = [Path(str(path)) for path in cast(list[str], read(payload) or [])]
        names = [Path(file.orig_name or "").name for file in files]
        return [Given(path, name or path.name) for path, name in zip(paths, names, strict=True)]

    # Not a subclass: gradio would write a .pyi file beside this module.
    file.preprocess = preprocess  # type: ignore[assignment,method-assign]
    return file


def _outputs(verb: str) -> tuple[gr.Button, gr.Button, gr.HTML, gr.HTML]:
    with gr.Row(elem_classes="lmm-qa-buttons"):
        start = gr.Button(verb, variant="primary", scale=0, min_width=190)
        cancel = gr.Button("Cancel", scale=0, min_width=100)
    return start, cancel, html(""), html("", elem_classes="lmm-qa-result")


def _listen(listen: Callable[..., Any], run: Callable[..., Any], inputs: list[Any], outputs: list[Any]) -> Any:
    """All jobs wait in one queue, and one is worked on."""
    event = listen(
        run,
        inputs,
        outputs,
        concurrency_id="jobs",
        concurrency_limit=1,
        show_progress="minimal",
        show_progress_on=outputs[:1],
        trigger_mode="once",
        api_visibility="private",
    )
    event.success(None, None, None, js=REVEAL, api_visibility="private")
    return event


def _cancel(jobs: Jobs, button: gr.Button, tab: str, events: list[Any], outputs: list[Any]) -> None:
    """A request that waits leaves the queue. Of one that is worked on, what is rated is shown when it has ended."""
    text = inert(render("web_parts", kind="status", text="Cancelled", total=0))
    button.click(lambda: text, None, outputs[:1], cancels=events, queue=False, api_visibility="private")

    def show(by: gr.Request) -> Any:
        shown = list(_run(jobs, lambda: jobs.cancel(_visitor(by, tab))))
        return shown[-1] if shown else (gr.skip(), gr.skip())

    button.click(show, None, outputs, queue=False, show_progress="hidden", api_visibility="private")


def _visitor(by: gr.Request, tab: str) -> str:
    """Who asks: one request of each tab of the page can be worked on or wait."""
    return f"{by.session_hash} {tab}"


def _run(jobs: Jobs, start: Callable[[], Iterator[Step]]) -> Iterator[Any]:
    """Show the steps of a job; an error takes the place of the status, and the last result stays."""
    try:
        for step in start():
            status = render("web_parts", kind="status", text=step.text, done=step.done, total=step.total)
            yield inert(status), gr.skip() if step.html is None else inert(step.html)
    except LmmQaError as error:
        yield inert(render("web_parts", kind="problem", text=jobs.public(error))), gr.skip()
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        text = f"This is a bug in lmm_qa ({type(error).__name__}). The server has printed the details."
        yield inert(render("web_parts", kind="problem", text=text)), gr.skip()


def _sample_pictures(samples: dict[str, Path], decoders: DecoderPool) -> list[tuple[str, Any]]:
    """Name and a frame of each sample clip."""
    read = decoders.imap(samples.values(), Sampling(frames=1), (View(max_pixels=160 * 160),), factor=2)
    return [
        (name, thumbnail(frames.views[0][0], frames.seconds[0]))
        for name, frames in zip(samples, read, strict=True)
        if isinstance(frames, Frames)
    ]
