"""Compare the speed and the pictures of video decoders on the sampled frames of clips.

    python scripts/bench_decoding.py [CLIPS ...] [--frames 8] [--runs 3] [-o runs/decoding.json]

Decoders, each in this process on one thread, in turns, median of several runs: PyAV decoding every frame; decord and
torchcodec (if installed) seeking; and `lmm_qa.video.decode.read_frames`, which decodes every frame strictly, checks the
file and renders a view. Then lmm_qa in worker processes.

difference: mean absolute difference from PyAV's pictures, in grey levels. fails: clips that a decoder cannot open, or
in which it counts another number of frames.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import av
import numpy as np
from corpus import SAMPLES
from numpy.typing import NDArray

from lmm_qa.config import Sampling, View
from lmm_qa.video.decode import read_frames
from lmm_qa.video.decoder_pool import DecoderPool
from lmm_qa.video.probe import probe

Pictures = NDArray[np.uint8]
"""(frames, height, width, 3) RGB."""


def with_pyav(path: Path, indices: Sequence[int]) -> Pictures:
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        wanted = set(indices)
        pictures = {
            number: frame.to_ndarray(format="rgb24")
            for number, frame in enumerate(container.decode(video=0))
            if number in wanted
        }
    return np.stack([pictures[index] for index in indices])


def with_decord(path: Path, indices: Sequence[int]) -> Pictures:
    import decord

    pictures: Pictures = decord.VideoReader(str(path), num_threads=1).get_batch(list(indices)).asnumpy()
    return pictures


def with_torchcodec(path: Path, indices: Sequence[int]) -> Pictures:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1)
    pictures: Pictures = decoder.get_frames_at(list(indices)).data.numpy()
    return pictures


def with_lmm_qa(path: Path, indices: Sequence[int]) -> Pictures:
    return read_frames(path, Sampling(frames=len(indices)), (View(max_pixels=100_000_000),), 2).views[0]


DECODERS: dict[str, tuple[str, Callable[[Path, Sequence[int]], Pictures]]] = {
    "PyAV": ("av", with_pyav),
    "decord": ("decord", with_decord),
    "torchcodec": ("torchcodec", with_torchcodec),
    "lmm_qa": ("lmm_qa", with_lmm_qa),
}
"""Module that must be installed, and function, by name."""


def bench(clips: Sequence[Path], frames: int, runs: int, workers: int) -> dict[str, Any]:
    # Decoding is compared, not sampling: all decoders get the indices that lmm_qa samples.
    indices = {clip: read_frames(clip, Sampling(frames=frames), (View(),), 28).indices for clip in clips}
    expected = {clip: with_pyav(clip, numbers).astype(np.int16) for clip, numbers in indices.items()}
    infos = [probe(clip) for clip in clips]
    decoders = {name: read for name, (module, read) in DECODERS.items() if importlib.util.find_spec(module)}
    results: dict[str, Any] = {name: {"wall": [], "processor": []} for name in decoders}
    for _ in range(runs):
        for name, decode in decoders.items():
            result: dict[str, Any] = results[name] | {"fails": [], "differences": []}
            decoded: dict[Path, Pictures] = {}
            wall, processor = time.perf_counter(), time.process_time()
            for clip, numbers in indices.items():
                try:
                    decoded[clip] = decode(clip, numbers)
                except Exception as error:  # decoders raise a dozen kinds
                    result["fails"].append(f"{clip.name}: {type(error).__name__}")
            result["wall"].append(time.perf_counter() - wall)
            result["processor"].append(time.process_time() - processor)
            for clip, pictures in decoded.items():
                if pictures.shape == expected[clip].shape:
                    result["differences"].append(float(np.abs(pictures - expected[clip]).mean()))
            results[name] = result
    worker_seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        with DecoderPool(workers) as pool:
            list(pool.imap(clips, Sampling(frames=frames), (View(),), 28))
        worker_seconds.append(time.perf_counter() - start)
    megapixels = sum(info.frames * info.width * info.height for info in infos) / 1e6
    return {
        "clips": len(clips),
        "sampled_frames": frames,
        "frames": sum(info.frames for info in infos),
        "seconds_of_video": sum(info.duration for info in infos),
        "decoders": {
            name: {
                "wall_seconds": median(result["wall"]),
                "processor_seconds": median(result["processor"]),
                "megapixels_per_second": megapixels / median(result["processor"]),
                "mean_difference": fmean(result["differences"]) if result["differences"] else None,
                "fails": result["fails"],
            }
            for name, result in results.items()
        },
        "lmm_qa_in_workers": {"workers": workers, "wall_seconds": median(worker_seconds)},
    }


def table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['sampled_frames']} frames of each of {report['clips']} clips ({report['frames']} frames, "
        f"{report['seconds_of_video']:.0f} s of video)",
        f"{'':<12} {'wall s':>8} {'cpu s':>8} {'difference':>11} {'fails':>6}",
    ]
    for name, result in report["decoders"].items():
        difference = "" if result["mean_difference"] is None else f"{result['mean_difference']:.3f}"
        lines.append(
            f"{name:<12} {result['wall_seconds']:>8.2f} {result['processor_seconds']:>8.2f} {difference:>11} "
            f"{len(result['fails']):>6}"
        )
    pool = report["lmm_qa_in_workers"]
    lines.append(f"lmm_qa in {pool['workers']} worker processes, including their start: {pool['wall_seconds']:.2f} s")
    return "\n".join(lines)


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
