"""Measure what `Rater.rate_frames` adds to the model: a batch of clips in memory, against the bare model.

    python scripts/bench_frames.py [--clips 16] [--frames 8] [--side 448] [--rounds 7] [--device cpu]

bare          preprocessing by the processor and one prefill per clip, of views that are rendered beforehand
rate_frames   the whole path from (B, T, 3, H, W) float frames on the device: checks, sampling, views, ratings

Both run in turn in every round, so that a busy machine slows both; printed are the medians.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch

from lmm_qa import Rater, Sampling, View
from lmm_qa.rater import clip_input
from lmm_qa.video.frame_array import read_batch


def seconds(task: Callable[[], object], device: torch.device) -> float:
    """Duration of a task."""
    start = time.perf_counter()
    task()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"clips": 16, "frames": 8, "side": 448, "rounds": 7}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device")
    given = parser.parse_args()
    sampling, view = Sampling(frames=given.frames), View(max_pixels=given.side**2)
    rater = Rater.from_pretrained(sampling=sampling, views=[view], device=given.device)
    device = rater.backbone.device
    size = (given.clips, given.frames, 3, given.side, given.side)
    videos = torch.rand(size, generator=torch.Generator().manual_seed(0)).to(device)
    clips, _ = read_batch(videos, 25)
    inputs = [clip_input(clip.read_frames(sampling, [view], rater.factor)) for clip in clips]
    prompt = rater.settings.prompt

    def bare() -> object:
        return rater.backbone.level_logits(inputs, prompt)

    def rate_frames() -> object:
        return rater.rate_frames(videos, 25)

    bare(), rate_frames()
    rounds = [(seconds(bare, device), seconds(rate_frames, device)) for _ in range(given.rounds)]
    base, whole = (median(times) for times in zip(*rounds, strict=True))
    print(f"{given.clips} clips of {given.frames} frames, {given.side}x{given.side}, {device}, {given.rounds} rounds")
    print(f"bare         {base:.3f} s")
    print(
        f"rate_frames  {whole:.3f} s, {whole / base - 1:+.1%}; median ratio {median(b / a for a, b in rounds) - 1:+.1%}"
    )


if __name__ == "__main__":
    main()
