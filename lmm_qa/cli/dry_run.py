"""`lmm-qa rate --dry-run`: frames, pixels and tokens of each clip, and the memory needed. Loads no weights."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from rich.table import Table

from lmm_qa.cli.terminal import make_console, message
from lmm_qa.errors import ClipError, plural
from lmm_qa.model.inputs import count_tokens, patch_factor
from lmm_qa.model.loading import estimate_memory, load_processor
from lmm_qa.video.probe import ClipInfo, probe
from lmm_qa.video.sampling import sample_indices
from lmm_qa.video.views import view_size

if TYPE_CHECKING:
    from lmm_qa.manifest import Clip
    from lmm_qa.model.rater_plan import RaterPlan
    from lmm_qa.ratings.rows import Details


def print_rating_plan(plan: RaterPlan, clips: Sequence[Clip], workers: int, details: Details) -> None:
    """Print a table of the clips to stdout, and a summary to stderr."""
    processor = load_processor(plan.source.backbone, **plan.load_options)
    factor = patch_factor(processor) or 1
    settings = plan.settings
    table = Table("clip", "picture", "seconds", "frames", "views", "tokens", show_edge=False, pad_edge=False)
    counted: dict[tuple[int, tuple[tuple[int, int], ...], float | None], int] = {}
    most = failed = 0
    with ThreadPoolExecutor(workers) as pool:
        for clip, info in zip(clips, pool.map(_probe, clips), strict=True):
            if isinstance(info, ClipError):
                table.add_row(clip.name, "", "", "", f"{type(info).__name__}: {info}", "", style="red")
                failed += 1
                continue
            sizes = tuple(view_size(info.height, info.width, view, factor) for view in settings.views)
            frames = len(sample_indices([number / info.fps for number in range(info.frames)], settings.sampling))
            seconds = round(info.duration, 1) if settings.prompt.sound else None
            if (frames, sizes, seconds) not in counted:
                counted[frames, sizes, seconds] = count_tokens(processor, frames, sizes, settings.prompt, seconds)
            tokens = counted[frames, sizes, seconds]
            most = max(most, tokens)
            views = " ".join(f"{width}x{height}" for height, width in sizes)
            picture, duration = f"{info.width}x{info.height}", f"{info.duration:.1f}"
            table.add_row(clip.name, picture, duration, f"{frames}", views, f"{tokens}")
    console = make_console(stderr=False)
    if not console.is_terminal:
        console.width = 1000  # do not wrap lines in a file
    console.print(table)
    summary = (
        f"{plural(len(clips) - failed)} would be rated"
        + (f", {failed} could not" if failed else "")
        + f"; at most {most} tokens per clip"
    )
    if not plan.source.served:
        memory = estimate_memory(plan.source.backbone, most, **plan.load_options)
        summary += (
            f"; {memory.parameters / 1e6:,.1f} M parameters; memory: about {memory.weights / 2**30:.2f} GiB for the "
            f"weights and {memory.clip / 2**30:.3f} GiB for each clip of a batch"
        )
        if details.profile and memory.cache:
            summary += (
                f"; for the defects also {memory.cache / 2**30:.3f} GiB of KV cache for each of the clips that are "
                "rated together (--batch-size), in at most half of the free memory"
            )
    message(summary)


def _probe(clip: Clip) -> ClipInfo | ClipError:
    try:
        return probe(clip.path)
    except ClipError as error:
        return error
