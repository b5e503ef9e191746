"""Measure the speed of rating, against the usual implementation of public raters and against its upper limit.

    python scripts/bench_rating.py -o runs/bench.json                                   # the embedded model, on a CPU
    python scripts/bench_rating.py --config DIR --random-weights --clips 64 -o ...      # true size, on a GPU

All paths use the same clips, frames, pixels and weights and run in turns; results are the median of several runs:

- reference: one clip at a time, decoded in the main thread (decord), frames as separate images, logits of the whole
  vocabulary at all positions;
- rater: `Rater.rate_all`;
- decoding only: the frames, read by as many processes as the rater uses;
- forward only: the model, on inputs that are already on its device.

The slower one of the last two is an upper limit. On a CPU they share the cores, so the sum of their processor times is
a limit as well. Processor time is less sensitive to other work on the machine than elapsed time. Set
OMP_WAIT_POLICY=PASSIVE, as `lmm-qa rate` does.

Also measured: the time of each stage, one after the other in one process; the cost of twelve closed questions on top of
the score, on one prefill and as the reference does it (one full forward pass per question); and the cost of a defect
profile. DIR contains config.json and the files of tokenizer and processor; weights are not needed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from corpus import SAMPLES
from PIL import Image
from rating_runs import resident_memory

from lmm_qa import Rater, Rating
from lmm_qa.config import Sampling, View
from lmm_qa.defects.questions import questions
from lmm_qa.model.backbone import Backbone
from lmm_qa.model.inputs import ClipInput, prepare_inputs
from lmm_qa.model.levels import LevelLogits, read_levels
from lmm_qa.model.loading import choose_attention, choose_device, choose_dtype, load_processor
from lmm_qa.model.prefill import SharedPrefill
from lmm_qa.model.prompt import DEFAULT_PROMPT, Prompt, load_prompt
from lmm_qa.model.rater_plan import plan_rater
from lmm_qa.rater import clip_input
from lmm_qa.ratings.rows import Details
from lmm_qa.video.decode import Frames, read_frames
from lmm_qa.video.decoder_pool import DecoderPool
from lmm_qa.video.probe import probe
from lmm_qa.video.sampling import sample_indices
from lmm_qa.video.views import view_size

Task = Callable[[], object]
STAGES = ("decode", "preprocess", "transfer", "vision", "prefill", "readout")
QUESTIONS = 12
"""Number of closed questions about defects."""


# --- paths -----------------------------------------------------------------------------------------------------------


def reference(rater: Rater, clips: Sequence[Path]) -> list[float]:
    """Scores of clips, computed as public raters do."""
    readings = [reference_answers(rater, clip, [rater.settings.prompt])[0] for clip in clips]
    scale = rater.settings.declared_scale()
    return [read_levels(each.logits, each.log_normalizer, scale).score for each in readings]


def reference_answers(rater: Rater, clip: Path, prompts: Sequence[Prompt]) -> list[LevelLogits]:
    """Level logits of a clip: decoded once, one full forward pass per prompt."""
    images = [Image.fromarray(picture) for picture in separate_images(rater, clip)]
    processor, answers = rater.backbone.processor, []
    for prompt in prompts:
        message = {"role": "user", "content": [*({"type": "image"} for _ in images),
                                               {"type": "text", "text": prompt.question}]}  # fmt: skip
        text = processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True) + prompt.stem
        inputs = processor(text=[text], images=images, do_resize=False, return_tensors="pt").to(rater.backbone.device)
        with torch.inference_mode():
            logits = rater.backbone.model(**inputs).logits[0, -1].float()
        tokens = list(rater.backbone.level_tokens(prompt, len(rater.settings.views)))
        answers.append(LevelLogits(logits[tokens].cpu().numpy(), torch.logsumexp(logits, dim=-1).item()))
    return answers


def separate_images(rater: Rater, clip: Path) -> Iterator[np.ndarray]:
    """Each sampled frame in each view, decoded in this thread."""
    info = probe(clip)
    indices = sample_indices([number / info.fps for number in range(info.frames)], rater.settings.sampling)
    try:
        import decord
    except ImportError:  # not everywhere
        whole = View(max_pixels=info.width * info.height)
        pictures = read_frames(clip, rater.settings.sampling, (whole,), 1).views[0]
    else:
        pictures = decord.VideoReader(str(clip), num_threads=1).get_batch(indices).asnumpy()
    for view in rater.settings.views:
        for picture in pictures:
            yield render_view(view, picture, rater.factor)


def render_view(view: View, picture: np.ndarray, factor: int) -> np.ndarray:
    height, width = picture.shape[:2]
    rows, columns = view_size(height, width, view, factor)
    if view.kind == "whole":
        return np.asarray(Image.fromarray(picture).resize((columns, rows), Image.Resampling.BICUBIC))
    top, left = (
        min(max(0, round(side * center - window / 2)), side - window)
        for side, window, center in zip((height, width), (rows, columns), reversed(view.center), strict=True)
    )
    return picture[top : top + rows, left : left + columns]


def rate(rater: Rater, clips: Sequence[Path], batch_size: int, workers: int) -> list[float]:
    results = rater.rate_all(clips, batch_size=batch_size, workers=workers)
    return [result.score for result in results if isinstance(result, Rating)]


def decode_only(rater: Rater, clips: Sequence[Path], workers: int) -> list[Frames]:
    with DecoderPool(workers) as pool:
        decoded = pool.imap(clips, rater.settings.sampling, rater.settings.views, rater.factor)
        return [frames for frames in decoded if isinstance(frames, Frames)]


def prepare(rater: Rater, clips: Sequence[Path], batch_size: int) -> list[Any]:
    """The inputs of all batches, on the model's device."""
    settings, backbone = rater.settings, rater.backbone
    frames = [clip_input(read_frames(clip, settings.sampling, settings.views, rater.factor)) for clip in clips]
    starts = range(0, len(frames), batch_size)
    return [
        inputs
        for start in starts
        for _, inputs in backbone.prepare_batches(frames[start : start + batch_size], settings.prompt)
    ]


def forward_only(rater: Rater, batches: Sequence[Any]) -> None:
    for inputs in batches:
        rater.backbone.next_token_logits(inputs)


# --- measuring -------------------------------------------------------------------------------------------------------


@contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """Peak bytes in the block: `host`, resident memory of all processes; `device`, allocated by torch on the GPU."""
    peak = {"host": 0, "device": 0}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak["host"] = max(peak["host"], resident_memory(psutil.Process()))

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        if torch.cuda.is_available():
            peak["device"] = torch.cuda.max_memory_allocated()


def run_in_turns(paths: dict[str, Task], clips: int, runs: int) -> dict[str, dict[str, Any]]:
    """Run all paths in turns, several times, so that other work on the machine affects all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    processor: dict[str, list[float]] = {name: [] for name in paths}
    memory: dict[str, dict[str, int]] = {}
    for _ in range(runs):
        for name, run in paths.items():
            with peak_memory() as peak:
                start, busy = now(), processor_time()
                run()
                seconds[name].append(now() - start)
                processor[name].append(processor_time() - busy)
            memory[name] = peak
    return {
        name: {
            "clips_per_second": clips / statistics.median(seconds[name]),
            "processor_seconds_per_clip": statistics.median(processor[name]) / clips,
            "seconds": [round(each, 3) for each in seconds[name]],
            "peak_host_bytes": memory[name]["host"],
            "peak_device_bytes": memory[name]["device"],
        }
        for name in paths
    }


def now() -> float:
    """Time in seconds, after all pending work of the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def processor_time() -> float:
    """Seconds of all cores, of this process and of its children that have ended."""
    return sum(os.times()[:4])


@torch.inference_mode()
def stages(rater: Rater, clips: Sequence[Path], batch_size: int) -> dict[str, float]:
    """Seconds per clip of each stage, without any overlap."""
    spent = dict.fromkeys(STAGES, 0.0)
    settings, backbone = rater.settings, rater.backbone
    tower, head = module(backbone.model, "visual", "vision_tower"), module(backbone.model, "lm_head")
    # A CPU calls the parts of the tower, for a few pictures at a time.
    ends = getattr(tower, "patch_embed", tower), getattr(tower, "merger", tower)
    hooks = [*timed(*ends, spent, "vision"), *timed(head, head, spent, "readout")]
    tokens = list(backbone.level_tokens(settings.prompt, len(settings.views)))
    for first in range(0, len(clips), batch_size):
        start = now()
        frames = [
            read_frames(clip, settings.sampling, settings.views, rater.factor)
            for clip in clips[first : first + batch_size]
        ]
        spent["decode"] += now() - start
        clips_in = [clip_input(each) for each in frames]
        for places in backbone.batches(clips_in):
            start = now()
            inputs = prepare_inputs(backbone.processor, [clips_in[place] for place in places], settings.prompt)
            spent["preprocess"] += (ready := now()) - start
            inputs = inputs.to(backbone.device)
            spent["transfer"] += (moved := now()) - ready
            inside = spent["vision"] + spent["readout"]
            logits = backbone.next_token_logits(inputs)
            spent["prefill"] += (passed := now()) - moved - (spent["vision"] + spent["readout"] - inside)
            normalizers = torch.logsumexp(logits, -1).tolist()
            for row, normalizer in zip(logits[:, tokens].cpu().numpy(), normalizers, strict=True):
                read_levels(row, normalizer, settings.declared_scale())
            spent["readout"] += now() - passed
    for hook in hooks:
        hook.remove()
    return {name: seconds / len(clips) for name, seconds in spent.items()}


def module(model: torch.nn.Module, *names: str) -> torch.nn.Module:
    found: torch.nn.Module = next(part for path, part in model.named_modules() if path.rpartition(".")[2] in names)
    return found


def timed(first: torch.nn.Module, last: torch.nn.Module, spent: dict[str, float], stage: str) -> list[Any]:
    """Hooks that add up the time from the start of one module to the end of another."""
    starts: list[float] = []

    def after(*_: object) -> None:
        spent[stage] += now() - starts.pop()

    return [first.register_forward_pre_hook(lambda *_: starts.append(now())), last.register_forward_hook(after)]


# --- the benchmark ---------------------------------------------------------------------------------------------------


def cost_of_questions(rater: Rater, clips: Sequence[Path], runs: int) -> dict[str, Any]:
    """Cost of closed questions on top of the score, with frames in memory and with decoding; and of a defect profile
    as `rate --defects` makes it, with the measured features."""
    settings, backbone = rater.settings, rater.backbone
    score = settings.prompt
    closed = [each.model_copy(update={"system": score.system}) for each in questions().values()][:QUESTIONS]
    prompts = [score, *closed]

    def decoded() -> list[ClipInput]:
        frames = [read_frames(clip, settings.sampling, settings.views, rater.factor) for clip in clips]
        return [clip_input(each) for each in frames]

    def answers(clips: Sequence[ClipInput]) -> list[list[LevelLogits]]:
        return SharedPrefill(backbone, clips, score).level_logits(prompts)

    ready = decoded()
    together = answers(ready)  # this and the next also warm up
    one_by_one = zip(*(backbone.level_logits(ready, prompt) for prompt in prompts), strict=True)
    pairs = [pair for rows in zip(together, one_by_one, strict=True) for pair in zip(*rows, strict=True)]
    paths: dict[str, Task] = {
        "score": lambda: backbone.level_logits(ready, score),
        "score + questions": lambda: answers(ready),
        "decoding + score": lambda: backbone.level_logits(decoded(), score),
        "decoding + score + questions": lambda: answers(decoded()),
        "rating": lambda: [rater.rate(clip) for clip in clips],
        "rating + questions": lambda: [rater.rate(clip, Details(defects=True)) for clip in clips],
        "reference": lambda: [reference_answers(rater, clip, [score]) for clip in clips],
        "reference + questions": lambda: [reference_answers(rater, clip, prompts) for clip in clips],
    }
    measured = run_in_turns(paths, len(clips), runs)
    return {
        "questions": len(closed),
        "clips": len(clips),
        "largest_difference": max(float(np.abs(one.logits - other.logits).max()) for one, other in pairs),
        "paths": measured,
        "times_the_score": {
            name: {
                "processor": with_questions["processor_seconds_per_clip"] / alone["processor_seconds_per_clip"],
                "clock": alone["clips_per_second"] / with_questions["clips_per_second"],
            }
            for name, alone in measured.items()
            if (with_questions := measured.get(f"{name} + questions"))
        },
    }


def random_rater(config: Path, device: str | None, sampling: Sampling | None, views: list[View] | None) -> Rater:
    """A rater with the architecture of a config.json and random weights."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    where = choose_device(device)
    dtype = choose_dtype(where.value)
    attention = choose_attention(where.value, dtype.value)
    plan = plan_rater(config, device=device, dtype=dtype.value, sampling=sampling, views=views)
    plan = replace(plan, source=replace(plan.source, backbone="random weights", name=f"{config.name}, random weights"))
    torch.manual_seed(0)
    with torch.device(where.value):
        model = AutoModelForImageTextToText.from_config(
            AutoConfig.from_pretrained(config),
            dtype=getattr(torch, dtype.value),
            attn_implementation=attention.value,
        )
    choices = {"device": where, "dtype": dtype, "attention": attention}
    return Rater(Backbone(model, load_processor(str(config)), choices), plan)


def without_measurement(rater: Rater) -> Rater:
    """The rater with the same weights that is not told what was measured, as public raters are not."""
    if not rater.settings.prompt.uses_measurement:
        return rater
    plain = copy(rater)
    plain.settings = rater.settings.override(prompt=load_prompt(DEFAULT_PROMPT))
    return plain


def bench(rater: Rater, clips: Sequence[Path], batch_size: int, workers: int, runs: int) -> dict[str, Any]:
    told, rater = rater, without_measurement(rater)
    batches = prepare(rater, clips, batch_size)
    few = clips[:batch_size]
    scores = {"reference": reference(rater, few), "rater": rate(rater, few, batch_size, workers)}  # also warms up
    paths: dict[str, Task] = {
        "reference": lambda: reference(rater, clips),
        "rater": lambda: rate(rater, clips, batch_size, workers),
        "decoding only": lambda: decode_only(rater, clips, workers),
        "forward only": lambda: forward_only(rater, batches),
    }
    if told is not rater:
        paths["measured"] = lambda: rate(told, clips, batch_size, workers)
    measured = run_in_turns(paths, len(clips), runs)
    speed = {name: each["clips_per_second"] for name, each in measured.items()}
    work = {name: each["processor_seconds_per_clip"] for name, each in measured.items()}
    return {
        "model": rater.source.name,
        "parameters": sum(parameter.numel() for parameter in rater.backbone.model.parameters()),
        "choices": {name: str(choice) for name, choice in rater.backbone.choices.items()},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "clips": len(clips),
        "batch_size": batch_size,
        "workers": workers,
        "tokens_per_clip": int(batches[0]["input_ids"].shape[1]),
        "paths": measured,
        "rater_over_reference": speed["rater"] / speed["reference"],
        "rater_over_limit": speed["rater"] / min(speed["decoding only"], speed["forward only"]),
        "needed_over_spent": (work["decoding only"] + work["forward only"]) / work["rater"],
        "measured_over_rater": work["measured"] / work["rater"] if "measured" in work else None,
        "stages": stages(rater, clips, batch_size),
        "questions": cost_of_questions(rater, few, runs),
        "scores": scores,
    }


def table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['model']}, {report['parameters'] / 1e6:,.0f} M parameters; {', '.join(report['choices'].values())}; "
        f"{report['clips']} clips, {report['tokens_per_clip']} tokens each, batches of {report['batch_size']}, "
        f"{report['workers']} decoding processes",
        f"{'':<14} {'clips/s':>8} {'cpu s/clip':>11} {'host GiB':>9} {'device GiB':>11}",
    ]
    for name, each in report["paths"].items():
        host, device = each["peak_host_bytes"] / 2**30, each["peak_device_bytes"] / 2**30
        speed, processor = each["clips_per_second"], each["processor_seconds_per_clip"]
        lines.append(f"{name:<14} {speed:>8.2f} {processor:>11.3f} {host:>9.2f} {device:>11.2f}")
    lines.append(
        f"rater: {report['rater_over_reference']:.2f} x the reference, {report['rater_over_limit']:.2f} of the limit; "
        f"{report['needed_over_spent']:.2f} of its processor time is decoding and forward pass"
    )
    if report["measured_over_rater"]:
        ratio = f"{report['measured_over_rater']:.2f}"
        lines.append(f"measured: told what was measured on every frame; {ratio} times the rater's processor time")
    spent = ", ".join(f"{name} {seconds * 1000:.0f}" for name, seconds in report["stages"].items())
    lines.append(f"milliseconds per clip of each stage, without overlap: {spent}")
    cost = report["questions"]
    times = "; ".join(
        f"{name} {each['processor']:.2f} (clock {each['clock']:.2f})" for name, each in cost["times_the_score"].items()
    )
    return "\n".join(
        [*lines, f"{cost['questions']} questions: processor time as a multiple of that without them: {times}"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", type=Path, help="video files; by default the package's samples")
    parser.add_argument("--model", help="as for lmm-qa rate")
    parser.add_argument("--config", type=Path, help="directory with config.json and the processor's files")
    parser.add_argument("--random-weights", action="store_true", help="required with --config: no weights are loaded")
    parser.add_argument("--device")
    parser.add_argument("--sampling", type=Sampling.from_text)
    parser.add_argument("--view", type=View.from_text, action="append")
    parser.add_argument("--clips", type=int, default=24, help="number of clips; files are repeated as needed")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, help="all results, as JSON")
    args = parser.parse_args()
    if (args.config is not None) != args.random_weights:
        parser.error("--config DIR and --random-weights belong together")
    if args.config:
        rater = random_rater(args.config, args.device, args.sampling, args.view)
    else:
        rater = Rater.from_pretrained(args.model, device=args.device, sampling=args.sampling, views=args.view)
    files = args.inputs or sorted(SAMPLES.glob("*.mp4"))
    clips = list(itertools.islice(itertools.cycle(files), args.clips))
    report = bench(rater, clips, args.batch_size, args.workers, args.runs)
    print(table(report))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
