"""From a folder of clean clips to the weights in the package, in one command; run it again, and it goes on.

    python scripts/embedded_model.py --clips CLIPS --portraits PORTRAITS --pictures PICTURES --work runs/embedded

CLIPS holds video files and an `index.csv` with columns `clip`, `repository` and `split` (train / val / test); PORTRAITS
(may be left out) pictures and an `index.csv` with columns `image` and `repository`; PICTURES (may be left out) large
photographs of anything. Steps: damaged copies (embedded_data.py), tokenizer, processor and first weights
(embedded_build.py), the phases of configs/embedded.yaml (embedded_train.py), the model into lmm_qa/embedded
(embedded_pack.py), the trees on what is measured (embedded_evidence.py), words (embedded_words.py), and the calibration
of answers and measurements on defects (lmm-qa degrade, embedded_defects.py). When each step began and
how long it took goes to WORK/steps.jsonl, losses and figures to WORK/run/log.jsonl, data and its fingerprint into
rater.json.

Hours on 2 cores; minutes to prepare and less to train with a GPU. With --start, the weights of an earlier model of the
same sizes are gone on from, and the phase that teaches the vision tower alone is left out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from embedded_data import index_of

from lmm_qa.defects.classifier import FILE
from lmm_qa.model.rater_config import DEFECTS_NAME, EMBEDDED

SCRIPTS = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--portraits", type=Path)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="model directory to go on from")
    parser.add_argument("--workers", default="2")
    args = parser.parse_args()
    work: Path = args.work
    data, init, run, held_out = work / "data", work / "init", work / "run", work / "held_out" / "labels.jsonl"
    work.mkdir(parents=True, exist_ok=True)

    def step(done: Path | None, script: str, *arguments: object) -> None:
        """Run a script, unless what it leaves when it is done is there; those that leave nothing know by themselves."""
        if done and done.exists():
            return
        command = [sys.executable, *script.split(), *map(str, arguments)]
        print(" ".join(command), flush=True)
        began = time.time()
        subprocess.run(command, check=True)
        with (work / "steps.jsonl").open("a") as file:
            file.write(
                json.dumps({"step": script, "began": round(began), "seconds": round(time.time() - began)}) + "\n"
            )

    portraits = ("--portraits", args.portraits) if args.portraits else ()
    pictures = ("--pictures", args.pictures) if args.pictures else ()
    start = ("--start", args.start) if args.start else ()
    step(None, f"{SCRIPTS}/embedded_data.py", "--clips", args.clips, *portraits, *pictures, "--out", data,
         "--workers", args.workers)  # fmt: skip
    step(init / "model.safetensors", f"{SCRIPTS}/embedded_build.py", "--data", data, "--out", init, *start)
    step(run / "adapter", f"{SCRIPTS}/embedded_train.py", "--data", data, "--init", init, "--out", run)
    spoken, copies = run / "words" / "adapter", work / "evidence"
    step(spoken, f"{SCRIPTS}/embedded_pack.py", "--run", run, "--data", data, "--init", init)
    step(None, f"{SCRIPTS}/embedded_evidence.py", "copies", "--clips", args.clips, *portraits, "-o", copies,
         "--workers", args.workers)  # fmt: skip
    clips = [args.clips / row["clip"] for row in index_of(args.clips) if row["split"] == "val"]
    step(held_out, "-m lmm_qa degrade", *clips, "-o", held_out, "--strengths", "0.35,0.75",
         "--pairs", 4, "--length", "3", "--workers", args.workers)  # fmt: skip
    for folder in (copies, held_out.parent):
        step(folder / "features.safetensors", f"{SCRIPTS}/embedded_evidence.py", "measure", folder,
             "--workers", args.workers)  # fmt: skip
    votes = work / "votes.jsonl"
    step(votes, f"{SCRIPTS}/embedded_evidence.py", "grow", copies, held_out.parent, "--votes", votes,
         "-o", work / FILE.name)  # fmt: skip
    shutil.copyfile(work / FILE.name, FILE)
    step(spoken, f"{SCRIPTS}/embedded_words.py", "--labels", copies / "labels.jsonl", "--out", run / "words", "--pack")
    step(run / "defects.json", f"{SCRIPTS}/embedded_defects.py", "fit", "--labels", held_out,
         "--votes", votes, "-o", run / "defects.json")  # fmt: skip
    shutil.copyfile(run / "defects.json", EMBEDDED / DEFECTS_NAME)


if __name__ == "__main__":
    main()
