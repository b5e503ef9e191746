"""Teach the packed model to speak, and leave what it rates and answers as it is.

    python scripts/embedded_words.py --labels train/labels.jsonl --out runs/words

Goes on with the adapter of the package, on the vision features of damaged copies of clips of training (`lmm-qa degrade`
or scripts/embedded_evidence.py). What it learns: to turn the level and the list of defects that it is told into the
sentences of the grammar (lmm_qa/explain.py). Half of the lists are what the copy has, with how strong it is; the others
are drawn by lot, so that what was found decides on the words, and nothing else. What it keeps: the probabilities at the
end of the rating prompt and of the closed questions stay close to those of the adapter that it began from (Hinton et
al., 2015, arXiv:1503.02531). An hour on 2 cores. Writes OUT/adapter; a killed run goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from embedded_pack import pack_adapter
from embedded_train import Part, Prefill, next_words, strongest_first, vision_tokens
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForImageTextToText

from lmm_qa.defects.explanation import Finding
from lmm_qa.defects.vocabulary import reference_defects
from lmm_qa.degrade.dataset import TIMED
from lmm_qa.model.inputs import patch_factor
from lmm_qa.model.rater_config import EMBEDDED, FILE_NAME, RaterConfig, resolve_model
from lmm_qa.ratings_io import read_rows
from lmm_qa.video.decode import read_frames

SENTENCES, ANSWERS = 4, 3  # a sample
PAIRS = (2, 2, 2, 6)  # moments that are shown in a step and those after it: all in every fourth
RATE, WARM = 1.5e-3, 50
KEPT = 4.0  # weight of what stays as it is
SAVED_EVERY = 200


def told(row: dict[str, Any], level: str, prefill: Prefill, draw: random.Random) -> Part:
    """A level and defects, and a sentence about them: those of the copy, or some drawn by lot."""
    known = reference_defects(zip(row["causes"], row["strengths"], strict=True))
    strengths: list[float] = []
    if draw.random() < 0.5:
        strength = strongest_first(row, [name for name, there in known.items() if there])
        names, strengths = [*strength], [*strength.values()]
    else:
        names = draw.sample(list(known), draw.choice((0, 1, 1, 1, 2, 2, 3)))
    found = []
    for name in names:
        first = 0.0 if name == "buffering" else round(draw.uniform(0, 9), 2)
        spans = [(first, first + draw.uniform(0.3, 5))]
        if draw.random() < 0.15:
            spans.append((spans[0][1] + draw.uniform(0.3, 2), spans[0][1] + draw.uniform(2.3, 4)))
        found.append(Finding(name, 1.0, tuple(spans) if name in TIMED and draw.random() < 0.85 else ()))
    words = prefill.prompt.levels
    level = level if draw.random() < 0.5 else draw.choice(words)
    absent = [name for name in known if name not in names]
    return prefill.spoken(found, absent, level, draw, strengths)


def features(
    rows: list[dict[str, Any]], folder: Path, model: Any, settings: RaterConfig, factor: int, cache: Path
) -> list[tuple[list[Any], list[Tensor]]]:
    """Shapes of the views, (T, H, W, 3) without T, and tokens, (moments, n, width), of each copy as it is rated."""
    cache.mkdir(parents=True, exist_ok=True)
    found = []
    for number, row in enumerate(rows):
        file = cache / f"{row['clip']}.pt"
        if not file.exists():
            seen = read_frames(folder / row["clip"], settings.sampling, settings.views, factor)
            views = [torch.from_numpy(view)[None] for view in seen.views]
            with torch.no_grad():
                tokens = [one[0].unflatten(0, (seen.views[0].shape[0] // 2, -1)) for one in vision_tokens(model, views)]
            kept = [one.bfloat16() for one in tokens]
            torch.save({"shapes": [list(view.shape[2:4]) for view in views], "tokens": kept}, file)
        kept = torch.load(file, weights_only=True)
        found.append((kept["shapes"], kept["tokens"]))
        if number % 200 == 0:
            print(f"features: {number}/{len(rows)}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=Path, required=True, help="of copies of clips of training")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--copies", type=int, default=1200, help="the most that are used")
    parser.add_argument("--pack", action="store_true", help="put the adapter into the package when it is done")
    args = parser.parse_args()
    torch.manual_seed(0)
    base = EMBEDDED.parent / "base"
    settings = resolve_model().settings
    prefill = Prefill(base, [view.kind for view in settings.views])

    def load(trained: bool) -> Any:
        model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
        return PeftModel.from_pretrained(model, EMBEDDED, is_trainable=trained)

    tuned, teacher = load(True), load(False).eval()
    core, before = tuned.base_model.model.model, teacher.base_model.model.model
    rows = read_rows(args.labels)
    rows = random.Random(0).sample(rows, min(args.copies, len(rows)))
    factor = patch_factor(prefill.processor) or 1
    seen = features(rows, args.labels.parent, teacher.base_model.model, settings, factor, args.out / "features")
    groups: dict[str, list[int]] = {}
    for number, (shapes, _) in enumerate(seen):
        groups.setdefault(str(shapes), []).append(number)
    names = list(groups)
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01)
    checkpoint, first = args.out / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        tuned.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
        print(f"going on from step {first}", flush=True)
    began = time.monotonic()
    for step in range(first, args.steps):
        draw = random.Random(step)
        rate = RATE * min(1.0, (step + 1) / WARM) * max(0.02, 1 - step / args.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        shapes = draw.choices(names, [len(groups[name]) for name in names])[0]
        chosen = draw.choices(groups[shapes], k=args.batch)
        count = PAIRS[step % len(PAIRS)]
        moments = sorted(draw.sample(range(6), count))
        tokens = [
            torch.stack([seen[number][1][view][moments].flatten(0, 1) for number in chosen]).float()
            for view in range(len(prefill.kinds))
        ]
        sizes = [(2 * count, *size, 3) for size in json.loads(shapes)]
        asked = [draw.sample(list(prefill.asked), ANSWERS) for _ in chosen]
        questions = [[prefill.score, *(prefill.asked[name][0] for name in each)] for each in asked]
        with torch.no_grad():
            inputs = prefill.inputs(before, sizes, questions)
            old_scores, old_answers = next_words(before, prefill, inputs, tokens)
        level = old_scores[:, : len(prefill.levels)].argmax(1).tolist()
        spoken = [
            [told(rows[number], prefill.prompt.levels[level[place]], prefill, draw) for _ in range(SENTENCES)]
            for place, number in enumerate(chosen)
        ]
        parts = [[*one, *other] for one, other in zip(questions, spoken, strict=True)]
        tuned.train()
        inputs = prefill.inputs(core, sizes, parts)
        scores, said = next_words(core, prefill, inputs, tokens)
        closed = torch.tensor([n < ANSWERS + 1 for each in parts for n, part in enumerate(each) for _ in part.wanted])
        words = F.cross_entropy(said[~closed], inputs["wanted"][~closed])
        kept = sum(
            F.kl_div(now.log_softmax(-1), was.log_softmax(-1), log_target=True, reduction="batchmean")
            for now, was in ((scores, old_scores), (said[closed], old_answers))
        )
        (words + KEPT * kept).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == args.steps - 1:
            right = (said[~closed].argmax(-1) == inputs["wanted"][~closed]).float().mean()
            line = {"phase": "words", "step": step, "of": args.steps, "words": round(float(words.detach()), 4),
                    "right": round(float(right), 4), "kept": round(float(kept.detach()), 5),
                    "seconds": round(time.monotonic() - began)}  # fmt: skip
            print(json.dumps(line), flush=True)
            with (args.out / "log.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        if (step + 1) % SAVED_EVERY == 0:
            adapter = {name: p for name, p in tuned.state_dict().items() if "lora_" in name}
            torch.save({"model": adapter, "optimizer": optimizer.state_dict(), "step": step + 1}, checkpoint)
    tuned.save_pretrained(args.out / "adapter")
    if args.pack:
        pack_adapter(args.out / "adapter")
        record = json.loads((EMBEDDED / FILE_NAME).read_text())
        record["training"]["phases"]["words"] = {"steps": args.steps, "words": line["words"], "kept": line["kept"]}
        (EMBEDDED / FILE_NAME).write_text(json.dumps(record, indent=2) + "\n")
        shutil.rmtree(args.out / "features")


if __name__ == "__main__":
    main()
