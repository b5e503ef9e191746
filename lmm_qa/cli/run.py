"""A rating run of the command: resume, rate, write rows, show progress, summarise."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lmm_qa.cli.console import render_table
from lmm_qa.cli.terminal import make_console, message, progress
from lmm_qa.defects.diagnosis import profile_id
from lmm_qa.errors import ClipError, UsageError, plural
from lmm_qa.manifest import content_id
from lmm_qa.model.backbone import Backbone
from lmm_qa.rater import Rater, decoding
from lmm_qa.ratings.io import print_row
from lmm_qa.video.decoder_pool import DecoderPool

if TYPE_CHECKING:
    from rich.console import Console

    from lmm_qa.distributed import Ranks, RayRaters
    from lmm_qa.files.tables import Row
    from lmm_qa.manifest import Clip
    from lmm_qa.model.rater_plan import RaterPlan
    from lmm_qa.ratings.io import RatingsWriter
    from lmm_qa.ratings.rows import Details, Failure, Rating

T = TypeVar("T")

MIN_ANSWER_MASS = 0.5
"""Least share of the probability that yes and no should have together after a closed question."""


class RatingRun:
    """Rates clips locally, as one of several ranks, or on a Ray cluster. Only rank 0 prints messages."""

    def __init__(
        self, plan: RaterPlan, details: Details, ranks: Ranks, raters: RayRaters | None = None, **options: Any
    ) -> None:
        """
        Args:
            plan: the rater; its weights are loaded only if there is something to rate.
            details: what to report besides the score.
            ranks: the processes of this run.
            raters: on a Ray cluster; None: rate in this process.
            options: batch_size, workers and timeout of `lmm_qa.rater.Rater.rate_all`.

        Raises:
            UsageError: a served model cannot answer without its adapter.
        """
        if plan.source.served and details.answers_from == "base":
            raise UsageError("--answers-from base cannot be used with a served model: serve the base model instead")
        self.plan = plan
        self.details = details
        self.ranks = ranks
        self.raters = raters
        self.options = options

    def to_file(self, clips: Sequence[Clip], output: Path, overwrite: bool, safe_csv: bool = False) -> int:
        """Rate the clips that the file does not contain yet. Returns the number of clips that failed, on rank 0.

        Options: see `lmm_qa.ratings.io.RatingsWriter`.
        """
        start = time.monotonic()
        ranks, details = self.ranks, self.details
        names = [clip.name for clip in clips]
        profile = profile_id(self.plan.source, details.answers_from) if details.profile else None
        how = (overwrite, details.columns, profile, safe_csv)
        with ranks.writer(output, names, self.plan.rater_id, *how) as writer:
            part = ranks.part(clips)
            rated = self._progress((_is_rated(writer, clip) for clip in part), len(part), "looked up")
            unrated = ranks.unrated(clips, rated)
            self._report_resumed(len(clips), len(unrated), output)
            if unrated:
                with self._decoders(unrated) as decoders:
                    rows = _write_rows(writer, self._results(ranks.claim(unrated), decoders))
                    for _ in self._progress(ranks.count_rows(rows, len(unrated)), len(unrated), "rated"):
                        pass
        if ranks.rank or not unrated:
            return 0
        render_table(writer.rows, make_console())
        _warn_about_answers(writer.rows)
        return _summarise(writer.rows, len(unrated), time.monotonic() - start, f" -> {output}")

    def to_stdout(self, clips: Sequence[Clip], render: Callable[[Sequence[Row], Console], None]) -> int:
        """Rate all clips; rendered on a terminal, JSON lines otherwise. Returns the number of clips that failed."""
        start = time.monotonic()
        rows: list[Row] = []
        with self._decoders(clips) as decoders:
            for result in self._progress(self._results(clips, decoders), len(clips), "rated"):
                rows.append(result.to_row())
                if not sys.stdout.isatty():
                    print_row(rows[-1], sys.stdout)
        if sys.stdout.isatty():
            render(rows, make_console(stderr=False))
        _warn_about_answers(rows)
        return _summarise(rows, len(rows), time.monotonic() - start, "")

    @contextmanager
    def _decoders(self, clips: Sequence[Clip]) -> Iterator[DecoderPool | None]:
        """The processes that decode: they start, and read the first clips, while the model is loaded. None on a Ray
        cluster."""
        if self.raters is not None:
            yield None
            return
        with DecoderPool(min(self.options["workers"], len(clips)), self.options["timeout"]) as decoders:
            decoders.start()
            if self.ranks.world == 1 and (factor := self.plan.patch_factor):
                decoders.prefetch([clip.path for clip in clips], **decoding(self.plan.settings, factor, self.details))
            yield decoders

    def _results(self, clips: Iterable[Clip], decoders: DecoderPool | None) -> Iterator[Rating | Failure]:
        options = {"details": self.details, **self.options}
        if self.raters is not None:
            message(f"model {self.plan.source.name} in {plural(self.raters.number, 'rater')} on a Ray cluster")
            return self.raters.rate(clips, **options)
        rater = Rater.from_plan(self.plan)
        if self.ranks.rank == 0:
            _describe(rater, self.details)
        return rater.rate_all(clips, decoders=decoders, **options)

    def _progress(self, results: Iterable[T], total: int, verb: str) -> Iterable[T]:
        return results if self.ranks.rank else progress(results, total, verb)

    def _report_resumed(self, clips: int, unrated: int, output: Path) -> None:
        if self.ranks.rank or unrated == clips:
            return
        if unrated:
            message(f"{clips - unrated} of {plural(clips)} already rated in {output}")
        else:
            message(f"nothing to do: {plural(clips)} already rated in {output} (--overwrite rates again)")


def _write_rows(writer: RatingsWriter, results: Iterable[Rating | Failure]) -> Iterator[None]:
    for result in results:
        writer.write(result.to_row())
        yield


def _is_rated(writer: RatingsWriter, clip: Clip) -> bool:
    try:
        return writer.resumes and writer.resume(clip.name, content_id(clip.path)) is not None
    except ClipError:
        return False  # the run writes its error row


def _describe(rater: Rater, details: Details) -> None:
    """Report what was chosen at run time, and why."""
    choices = ", ".join(f"{name} {choice}" for name, choice in rater.backbone.choices.items())
    calibration = f"; calibrated ({rater.calibration.mapping.kind})" if rater.calibration else ""
    message(f"model {rater.source.name} ({rater.backbone.description}); {choices}{calibration}")
    if rater.source.served:
        message(f"note: the sampled frames of each clip are sent to {rater.source.served.url}")
    if details.profile and isinstance(rater.backbone, Backbone) and not rater.backbone.can_share_prefill:
        message("note: each question about defects reads the clip again: the cache of this model cannot be shared")


def _warn_about_answers(rows: Sequence[Row]) -> None:
    """Warn if the model does not answer the questions about defects, or if its explanations were replaced."""
    masses = sorted(row["defect_mass"] for row in rows if row.get("defect_mass") is not None)
    if masses and (median := masses[len(masses) // 2]) < MIN_ANSWER_MASS:
        message(
            f"note: after the questions about defects, yes and no have {median:.0%} of the probability (median): the "
            "model does not answer them, and its defect profile is not reliable. If the rater has an adapter, try "
            "--answers-from base"
        )
    sources = [row["explained_by"] for row in rows if row.get("explained_by")]
    if replaced := sum(source != "model" for source in sources):
        message(
            f"note: {replaced} of {plural(len(sources), 'explanation')} contradicted the rating, left out a defect or "
            "were incomplete, and were replaced by template sentences (column explained_by gives the reason)"
        )


def _summarise(rows: Sequence[Row], new: int, seconds: float, where: str) -> int:
    failed = sum(row["error"] is not None for row in rows)
    failures = f", {failed} could not be rated" if failed else ""
    message(f"{plural(len(rows) - failed)} rated{failures}; {new} new, in {seconds:.1f} s{where}")
    return failed
