"""Compare the displayed pictures of clips with those of ffmpeg: orientation, cropping, alpha, colours, interlacing.

    python scripts/compare_pixels.py --work runs/pixels [--every 5]

The clips are those of `scripts/corpus/sound.py`. Prints a table in Markdown: mean and maximum over the clips of a kind
of the mean absolute difference of RGB values. Exit code 1 if a clip exceeds the limit of its kind. Needs ffmpeg:
`pip install imageio-ffmpeg`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
from corpus import ffmpeg_binary, sound

from lmm_qa.video.container import ALPHA_DECODERS
from lmm_qa.video.decode import iterate_frames
from lmm_qa.video.probe import ContainerScan, scan_container

FRAMES = 8
"""Frames of each clip that are compared, from its start."""

LIMITS = {
    "orientation": 1.0,
    "shape": 1.0,
    "alpha": 1.0,
    "interlaced": 1.0,
    "range and matrix": 1.0,
    "tone mapping": 6.0,
}
"""Largest mean difference allowed, of 255."""

TONE_MAP = (
    "zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt709,tonemap=mobius:param=0.3:peak=4.926:desat=0,"
    "zscale=t=bt709:m=bt709:r=tv,format=yuv444p"
)


def kind_of(name: str) -> str | None:
    """The row of the table for a clip of the corpus; None if it is not compared."""
    folder, _, file = name.partition("/")
    if folder == "colour":
        return "tone mapping" if file.startswith(("pq", "hlg")) else "range and matrix"
    # ffmpeg turns the picture by other angles within its frame, and crops to whole chroma samples.
    if file.startswith(("45", "10")) or "_odd" in file:
        return None
    return folder if folder in LIMITS else None


def ffmpeg_pictures(path: Path, kind: str, scan: ContainerScan) -> np.ndarray:
    """What ffmpeg shows: (frames, height, width, 3) float, on white where it is transparent."""
    height, width = scan.display.picture_size
    transparent_webm = scan.info.pixel_format == "yuva420p" and scan.info.codec in ALPHA_DECODERS
    decoder = ["-c:v", ALPHA_DECODERS[scan.info.codec]] if transparent_webm else []
    filters = {"interlaced": "bwdif=mode=send_frame:deint=interlaced", "tone mapping": TONE_MAP}.get(kind)
    command = [ffmpeg_binary(), "-v", "error", *decoder, "-i", str(path), *(["-vf", filters] if filters else [])]
    command += ["-fps_mode", "passthrough", "-frames:v", str(FRAMES), "-f", "rawvideo", "-pix_fmt", "rgba", "-"]
    raw = subprocess.run(command, check=True, capture_output=True).stdout
    layered = np.frombuffer(raw, np.uint8).reshape(-1, height, width, 4).astype(float)
    alpha = layered[..., 3:] / 255
    return layered[..., :3] * alpha + 255 * (1 - alpha)


def difference(path: Path, kind: str) -> float:
    """Mean absolute difference of the first pictures, of 255; infinite if ffmpeg shows another number or size."""
    scan = scan_container(path)
    frames = islice(iterate_frames(scan, set()), FRAMES)
    ours = np.stack([scan.display.picture(frame) for frame in frames])
    try:
        theirs = ffmpeg_pictures(path, kind, scan)
    except ValueError:
        return float("inf")
    return float(np.abs(ours - theirs).mean()) if ours.shape == theirs.shape else float("inf")


def compare_pictures(folder: Path, names: Iterable[str]) -> dict[str, dict[str, float]]:
    """Difference of each clip, by kind and name."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for name in names:
        if (kind := kind_of(name)) is not None:
            found[kind][name] = difference(folder / name, kind)
    return found


def pixel_table(found: dict[str, dict[str, float]]) -> str:
    """The table, in Markdown."""
    lines = ["| kind | clips | mean difference of 255 | largest | limit |", "| --- | ---: | ---: | ---: | ---: |"]
    for kind, clips in found.items():
        values = list(clips.values())
        lines.append(f"| {kind} | {len(values)} | {np.mean(values):.2f} | {max(values):.2f} | {LIMITS[kind]:g} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the clips")
    parser.add_argument("--every", type=int, default=1, help="compare every N-th clip")
    arguments = parser.parse_args()
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    cases = [case for case in sound.cases(work / "sources") if kind_of(case.name)][:: arguments.every]
    for case in cases:
        path = work / "files" / case.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            case.make(path)
    found = compare_pictures(work / "files", [case.name for case in cases])
    print(pixel_table(found))
    exceeding = {name: value for kind, clips in found.items() for name, value in clips.items() if value > LIMITS[kind]}
    for name, value in exceeding.items():
        print(f"{name}: {value:.2f}", file=sys.stderr)
    sys.exit(bool(exceeding))


if __name__ == "__main__":
    main()
