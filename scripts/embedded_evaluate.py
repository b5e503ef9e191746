"""How well does a rater order damage on clips that it never saw? Made files, rated through the real path.

    python scripts/embedded_evaluate.py --clips CLIPS --split test --work runs/evaluate -o runs/evaluate/report.json

From each clip of the split: the first seconds, once clean and with each cause at mild and at strong strength, all
encoded alike at a rate without visible loss. Reported for each cause: in how many of the clips the scores order
clean > mild, mild > strong, and all three; chance is 1/2, 1/2 and 1/6. Besides, how far the score moves under what
should not matter: encoding once more without visible loss, another container, a flip, a trim of 5% at both ends.
"""

from __future__ import annotations

import argparse
import csv
import json
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from lmm_qa.degrade.causes import MILD, STRONG, Pixels, damage, encode

CAUSES = {"blur": "blur", "compression": "h264", "noise": "noise", "freezing": "stall", "rescaling": "rescale"}
HARMLESS = {"reencoding": "mp4", "container": "mkv", "flip": "mp4", "trim": "mp4"}  # and the suffix of the copy
X264 = {"crf": "12", "preset": "veryfast"}
NO_VISIBLE_LOSS = {"crf": "15", "preset": "medium"}
LIMIT = 0.15  # how far the score may move where nothing is to be seen, on a scale of 1 to 5


def first_seconds(clip: Path, seconds: float = float("inf")) -> tuple[Pixels, Fraction]:
    import av

    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        fps = Fraction(stream.average_rate or 25).limit_denominator(1001)
        frames = []
        for frame in container.decode(stream):
            frames.append(frame.to_ndarray(format="rgb24"))
            if len(frames) >= seconds * fps:
                break
    return np.stack(frames), fps


def make_copies(clip: Path, seconds: float, out: Path) -> list[dict[str, Any]]:
    """Write all copies of one clip; those that are there are left alone."""
    rows: list[dict[str, Any]] = [{"cause": "clean", "strength": 0.0, "name": f"{clip.stem}--clean.mp4"}]
    rows += [{"cause": cause, "strength": strength, "name": f"{clip.stem}--{cause}-{strength:g}.mp4"}
             for cause in CAUSES for strength in (MILD, STRONG)]  # fmt: skip
    rows += [{"cause": harmless, "strength": 0.0, "name": f"{clip.stem}--{harmless}.{suffix}"}
             for harmless, suffix in HARMLESS.items()]  # fmt: skip
    missing = [row for row in rows if not (out / str(row["name"])).exists()]
    if missing:
        frames, fps = first_seconds(clip, seconds)
        for row in missing:
            copy, x264 = frames, X264
            if row["cause"] == "reencoding":
                copy, x264 = first_seconds(out / f"{clip.stem}--clean.mp4")[0], NO_VISIBLE_LOSS
            elif row["cause"] in CAUSES:
                seed = zlib.crc32(str(row["name"]).encode())
                copy = damage(frames, CAUSES[row["cause"]], row["strength"], seed, fps=float(fps)).frames
            elif row["cause"] == "flip":
                copy = np.ascontiguousarray(frames[:, :, ::-1])
            elif row["cause"] == "trim":
                copy = frames[len(frames) // 20 : len(frames) - len(frames) // 20]
            partial = out / f".{row['name']}"
            encode(copy, "libx264", x264, fps, str(partial))
            partial.replace(out / str(row["name"]))
    return [{**row, "source": clip.name} for row in rows]


def ordering(scores: dict[tuple[str, str, float], float], sources: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for cause in CAUSES:
        triples = [
            (scores[source, "clean", 0.0], scores[source, cause, MILD], scores[source, cause, STRONG])
            for source in sources
        ]
        yield (
            cause,
            {
                "clips": len(triples),
                "clean_above_mild": sum(clean > mild for clean, mild, _ in triples) / len(triples),
                "mild_above_strong": sum(mild > strong for _, mild, strong in triples) / len(triples),
                "all_three": sum(clean > mild > strong for clean, mild, strong in triples) / len(triples),
                "mean_scores": [round(float(mean), 3) for mean in np.mean(triples, axis=0)],
            },
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, required=True, help="folder with video files and index.csv (clip, split)")
    parser.add_argument("--split", default="test")
    parser.add_argument("--model", default=None, help="rater to judge; by default the embedded one")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of the copies")
    parser.add_argument("--work", type=Path, required=True, help="folder for the copies")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()

    from lmm_qa import Rater, Rating

    args.work.mkdir(parents=True, exist_ok=True)
    with (args.clips / "index.csv").open(newline="") as file:
        clips = [args.clips / row["clip"] for row in csv.DictReader(file) if row["split"] == args.split]
    with ProcessPoolExecutor(2) as pool:
        made = [row for rows in pool.map(make_copies, clips, [args.seconds] * len(clips), [args.work] * len(clips))
                for row in rows]  # fmt: skip
    print(f"{len(made)} copies of {len(clips)} clips in {args.work}", flush=True)
    rater = Rater.from_pretrained(args.model)
    scores: dict[tuple[str, str, float], float] = {}
    for row, result in zip(made, rater.rate_all([args.work / row["name"] for row in made]), strict=True):
        if not isinstance(result, Rating):
            raise SystemExit(f"{row['name']}: {result.error}")
        row["score"] = result.score
        scores[row["source"], row["cause"], row["strength"]] = result.score
    sources = [clip.name for clip in clips]
    report: dict[str, Any] = {"split": args.split, "model": args.model or "embedded", "rater_id": rater.rater_id}
    report["ordering"] = dict(ordering(scores, sources))
    moved = {
        name: np.array([abs(scores[s, name, 0.0] - scores[s, "clean", 0.0]) for s in sources]) for name in HARMLESS
    }
    report["moved_by_the_harmless"] = {
        name: {
            "median": round(float(np.median(by)), 3),
            "most": round(float(by.max()), 3),
            "within": float(np.mean(by <= LIMIT)),
        }
        for name, by in moved.items()
    }
    report["rows"] = made
    args.output.write_text(json.dumps(report, indent=1))
    print(f"{'cause':<12} clean>mild  mild>strong  all three   mean scores clean, mild, strong")
    for cause, row in report["ordering"].items():
        shares = f"{row['clean_above_mild']:>10.0%}  {row['mild_above_strong']:>11.0%}  {row['all_three']:>9.0%}"
        print(f"{cause:<12} {shares}   {row['mean_scores']}")
    for name, by in report["moved_by_the_harmless"].items():
        moved_by = f"{by['median']} (median), {by['most']} (most)"
        print(f"{name:<12} moves the score by {moved_by}; {by['within']:.0%} by at most {LIMIT}")


if __name__ == "__main__":
    main()
