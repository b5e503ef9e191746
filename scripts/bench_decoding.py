"""How fast do decoders give the sampled frames of clips, and do they give the same pictures?

    python scripts/bench_decoding.py [CLIPS ...] [--frames 8] [--runs 3] [-o runs/decoding.json]

One process and one thread for each decoder, in turns, the median of several runs: PyAV that decodes every frame, decord
and torchcodec (where they are installed) that seek, and ours (`lmm_qa.video.decode.read_frames`: strict, every frame, checked
from end to end), which besides renders its view. Then ours in worker processes. Difference: of the pictures from those
of PyAV, mean over all, in grey levels; "fails": clips that a decoder cannot open, or where it counts other frames.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from damaged_files import SAMPLES
from numpy.typing import NDArray

from lmm_qa.config import Sampling, View
from lmm_qa.video.decode import read_frames
from lmm_qa.video.decoder_pool import DecoderPool
from lmm_qa.video.probe import probe

Pictures = NDArray[np.uint8]
Decoder = Callable[[Path, Sequence[int]], Pictures]


def with_pyav(path: Path, indices: Sequence[int]) -> Pictures:
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        wanted = set(indices)
        kept = {
            number: frame.to_ndarray(format="rgb24")
            for number, frame in enumerate(container.decode(video=0))
            if number in wanted
        }
    return np.stack([kept[index] for index in indices])


def with_decord(path: Path, indices: Sequence[int]) -> Pictures:
    import decord

    pictures: Pictures = decord.VideoReader(str(path), num_threads=1).get_batch(list(indices)).asnumpy()
    return pictures


def with_torchcodec(path: Path, indices: Sequence[int]) -> Pictures:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1)
    pictures: Pictures = decoder.get_frames_at(list(indices)).data.numpy()
    return pictures


def with_ours(path: Path, indices: Sequence[int]) -> Pictures:
    frames = read_frames(path, Sampling(frames=len(indices)), (View(max_pixels=1 << 30),), 2)
    return frames.views[0]


DECODERS: dict[str, Decoder] = {
    "PyAV": with_pyav,
    "decord": with_decord,
    "torchcodec": with_torchcodec,
    "ours": with_ours,
}


def installed() -> dict[str, Decoder]:
    import importlib.util

    return {name: decode for name, decode in DECODERS.items()
            if name in ("PyAV", "ours") or importlib.util.find_spec(name) is not None}  # fmt: skip


def bench(clips: Sequence[Path], frames: int, runs: int, workers: int) -> dict[str, Any]:
    # What is compared is decoding, not sampling: all get the numbers that ours takes.
    asked = {clip: read_frames(clip, Sampling(frames=frames), (View(),), 28).indices for clip in clips}
    infos = [probe(clip) for clip in clips]
    expected = {clip: with_pyav(clip, indices).astype(np.int16) for clip, indices in asked.items()}
    decoders = installed()
    report: dict[str, Any] = {name: {"wall": [], "processor": [], "fails": [], "differences": []} for name in decoders}
    for run in range(runs):
        for name, decode in decoders.items():
            mine = report[name]
            wall, processor = time.perf_counter(), time.process_time()
            got: dict[Path, Pictures] = {}
            for clip, indices in asked.items():
                try:
                    got[clip] = decode(clip, indices)
                except Exception as error:  # decoders have a dozen kinds
                    if not run:
                        mine["fails"].append(f"{clip.name}: {type(error).__name__}")
            mine["wall"].append(time.perf_counter() - wall)
            mine["processor"].append(time.process_time() - processor)
            if not run:
                mine["differences"] = [
                    float(np.abs(pictures - expected[clip]).mean())
                    for clip, pictures in got.items()
                    if pictures.shape == expected[clip].shape
                ]
    pool_seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        with DecoderPool(workers) as pool:
            for _result in pool.imap(clips, Sampling(frames=frames), (View(),), 28):
                pass
        pool_seconds.append(time.perf_counter() - began)
    pixels = sum(info.frames * info.width * info.height for info in infos)
    return {
        "clips": len(clips),
        "frames_asked": frames,
        "frames_in_all": sum(info.frames for info in infos),
        "seconds_of_video": sum(info.duration for info in infos),
        "decoders": {
            name: {
                "wall_seconds": statistics.median(mine["wall"]),
                "processor_seconds": statistics.median(mine["processor"]),
                "megapixels_per_second": pixels / 1e6 / statistics.median(mine["processor"]),
                "mean_difference": statistics.fmean(mine["differences"]) if mine["differences"] else None,
                "fails": mine["fails"],
            }
            for name, mine in report.items()
        },
        "ours_in_processes": {"workers": workers, "wall_seconds": statistics.median(pool_seconds)},
    }


def table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['frames_asked']} frames of each of {report['clips']} clips ({report['frames_in_all']} frames, "
        f"{report['seconds_of_video']:.0f} s of video)",
        f"{'':<12} {'wall s':>8} {'cpu s':>8} {'difference':>11} {'fails':>6}",
    ]
    for name, each in report["decoders"].items():
        difference = "" if each["mean_difference"] is None else f"{each['mean_difference']:.3f}"
        lines.append(
            f"{name:<12} {each['wall_seconds']:>8.2f} {each['processor_seconds']:>8.2f} {difference:>11} "
            f"{len(each['fails']):>6}"
        )
    pool = report["ours_in_processes"]
    return "\n".join(
        [*lines, f"ours in {pool['workers']} processes, their start included: {pool['wall_seconds']:.2f} s"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", nargs="*", type=Path, help="video files; by default the package's samples")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, help="all figures, as JSON")
    args = parser.parse_args()
    report = bench(args.clips or sorted(SAMPLES.glob("*.mp4")), args.frames, args.runs, args.workers)
    print(table(report))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
