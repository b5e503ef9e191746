"""A self-contained HTML page of a comparison: the verdict, the tables, and pairs of clips side by side.

The two clips of a pair play in step, or are shown in still frames at the same moment; one slider moves both. Like the
report of ratings (`lmm_qa.evaluation.html_report`), the page needs no network.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np

from lmm_qa.config import View
from lmm_qa.errors import ClipError, ClipUnreadable
from lmm_qa.evaluation.compare import PAIR_HEADER, Comparison, ScorePair, SetComparison, footnotes, sections
from lmm_qa.evaluation.html_report import SAMPLING, Axis, PageSize, Thumbnail, thumbnail, write_page
from lmm_qa.evaluation.pairing import RatingSet
from lmm_qa.evaluation.player import ClipAddresses, is_playable
from lmm_qa.manifest import content_id
from lmm_qa.video.decode import Frames
from lmm_qa.video.decoder_pool import DecoderPool

PAIRS = 24
"""Pairs on the page, those that differ most; shared by several sets."""
MOMENTS = 12
"""Moments of a pair that the slider can show."""
VIEW = View(max_pixels=288 * 288)


@dataclass(frozen=True)
class PairFrames:
    """The frames of a pair at the same moments."""

    moments: tuple[float, ...] = ()
    """Seconds."""
    old: tuple[Thumbnail, ...] = ()
    new: tuple[Thumbnail, ...] = ()
    missing: str | None = None
    """Why there are none."""
    duration: float = 0.0
    """Seconds that both clips last."""
    playable: bool = False
    """Whether browsers play both clips."""
    sizes: tuple[tuple[int, int], ...] = ()
    """Width and height of both clips."""


@dataclass(frozen=True)
class PagePair:
    """A pair on the page."""

    number: int
    """From 1, over all sets."""
    comparison: SetComparison
    pair: ScorePair
    files: tuple[Path | None, Path | None]
    """The videos, old and new; None if not found."""
    contents: tuple[str | None, str | None]
    """Their content_id in the ratings."""


def page_pairs(
    comparison: Comparison, sets: Sequence[RatingSet], videos: Sequence[Mapping[str, Path]]
) -> list[PagePair]:
    """The pairs that differ most, set by set.

    Args:
        comparison: of the sets.
        sets: the old set and the others, in the order of the comparison.
        videos: for each of the sets, the video of each clip that was found.
    """
    contents = [{rating.clip: rating.content_id for rating in each.ratings} for each in sets]
    numbers, limit = count(1), -(-PAIRS // len(comparison.sets))
    found = []
    for at, each in enumerate(comparison.sets, 1):
        for pair in sorted(each.pairs, key=lambda pair: -abs(pair.difference))[:limit]:
            files = videos[0].get(pair.old), videos[at].get(pair.new)
            known = contents[0][pair.old], contents[at][pair.new]
            found.append(PagePair(next(numbers), each, pair, files, known))
    return found


def pair_frames(
    pairs: Sequence[PagePair], workers: int = 2, timeout: float = 60.0, decoders: DecoderPool | None = None
) -> Iterator[PairFrames]:
    """Decode the frames of each pair, in order; only a few clips are in memory at a time.

    Args:
        pairs: of `page_pairs`.
        workers: decoding processes.
        timeout: limit for one clip, in seconds.
        decoders: an open pool, which stays open, instead of a new one with `workers` and `timeout`.
    """
    with nullcontext(decoders) if decoders else DecoderPool(workers, timeout) as pool:
        complete = (file for pair in pairs if all(pair.files) for file in pair.files if file)
        decoded = pool.imap(complete, SAMPLING, (VIEW,), factor=2)
        for pair in pairs:
            absent = [name for name, file in zip((pair.pair.old, pair.pair.new), pair.files, strict=True) if not file]
            if absent:
                yield PairFrames(missing=f"{' and '.join(absent)} not found")
                continue
            old, new = next(decoded), next(decoded)
            try:
                yield synchronised(_checked(old, pair, 0), _checked(new, pair, 1), pair.files)
            except ClipError as error:
                yield PairFrames(missing=str(error))


def _checked(frames: Frames | ClipError, pair: PagePair, side: int) -> Frames:
    """The frames of the old (0) or new (1) clip, if it is the one that was rated."""
    if isinstance(frames, ClipError):
        raise frames
    file = pair.files[side]
    if file is not None and pair.contents[side] not in (None, content_id(file)):
        raise ClipUnreadable(f"{file} is not the clip that was rated: its content differs")
    return frames


def synchronised(old: Frames, new: Frames, files: tuple[Path | None, Path | None]) -> PairFrames:
    """The frames nearest to moments that are evenly spread over the time that both clips last.

    Args:
        old, new: densely sampled frames with one view.
        files: of both clips.
    """
    shared = min(old.seconds[-1], new.seconds[-1])
    moments = tuple((number + 0.5) / MOMENTS * shared for number in range(MOMENTS))
    duration = min(old.info.duration, new.info.duration)
    known = zip(files, (old.info, new.info), strict=True)
    playable = all(file is not None and is_playable(file, info) for file, info in known)
    sizes = tuple((frames.info.width, frames.info.height) for frames in (old, new))
    return PairFrames(moments, _at(old, moments), _at(new, moments), None, duration, playable, sizes)


def _at(frames: Frames, moments: Iterable[float]) -> tuple[Thumbnail, ...]:
    nearest = [int(np.abs(np.array(frames.seconds) - moment).argmin()) for moment in moments]
    return tuple(thumbnail(frames.views[0][index], frames.seconds[index]) for index in nearest)


def write(
    comparison: Comparison, pairs: Sequence[PagePair], frames: Iterable[PairFrames], path: Path, embed: int = 0
) -> PageSize:
    """Write the page atomically, pair by pair.

    Args:
        comparison: the content.
        pairs: the pairs to show.
        frames: of each pair, in order.
        path: the page, .html; missing folders are created.
        embed: bytes of clips that the page may contain, see `lmm_qa.evaluation.player`.

    Raises:
        UsageError, ResultsError: the page cannot be written there.
    """
    size, addresses = PageSize(), ClipAddresses(path, embed)
    write_page(
        path,
        "comparison",
        size,
        comparison=comparison,
        axis=difference_axis(comparison),
        sections=[each for each in sections(comparison) if each.header != PAIR_HEADER],  # the pairs are below
        notes=footnotes(comparison),
        total=len(pairs),
        pairs=_with_videos(zip(pairs, frames, strict=True), addresses, size),
    )
    return size


def difference_axis(comparison: Comparison) -> Axis:
    """The axis of the mean differences: all intervals, and 0."""
    intervals = [each.difference for each in comparison.sets]
    return Axis.over([0.0, *(end for each in intervals for end in (each.low, each.high))])


def _with_videos(
    pairs: Iterable[tuple[PagePair, PairFrames]], addresses: ClipAddresses, size: PageSize
) -> Iterator[tuple[PagePair, PairFrames, tuple[str | None, str | None]]]:
    """Add the addresses of each pair that can be played; both or none."""
    for pair, frames in pairs:
        size.frames += sum(len(one.jpeg) for one in (*frames.old, *frames.new))
        size.clips += bool(frames.moments)
        old, new = pair.files
        videos: tuple[str | None, str | None] = (None, None)
        if old and new and frames.playable:
            videos = size.address(addresses, old), size.address(addresses, new)
        yield pair, frames, videos if all(videos) else (None, None)
