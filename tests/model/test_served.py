"""python -m pytest tests/model/test_served.py

Ratings of a served model against those of the same weights in this process. The server is `model_server.ModelServer`;
with LMM_QA_VLLM, the path of a `vllm` executable, also a real one.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backbones import build
from hypothesis import given
from hypothesis import strategies as st
from model_inputs import CLOSED, PROMPT, random_clip
from model_server import ModelServer, status, works
from paths import EMBEDDED, SAMPLES

from lmm_qa import Failure, Rater, Rating, Sampling, View
from lmm_qa.errors import ModelError, ServerError, UsageError
from lmm_qa.model import server as server_module
from lmm_qa.model.backbone import Backbone
from lmm_qa.model.loading import load_processor
from lmm_qa.model.prompt import Prompt
from lmm_qa.model.rater_config import RaterConfig
from lmm_qa.model.rater_plan import plan_rater
from lmm_qa.model.served import ServedBackbone, ServedModel, bounded_logs, find_served
from lmm_qa.ratings.rows import Details

BASE = EMBEDDED / "base"
EVERYTHING = Details(defects=True, explanation=True, timeline=True)
NO_WAIT = pytest.mark.usefixtures("no_wait")
CLIPS = [SAMPLES / name for name in ("astronaut_blur_strong.mp4", "avatar_clean.mp4")]

TWO_VIEWS = Prompt(
    system="You are strict.",
    view_labels=("The picture:", "A part of it:"),
    question="{frames:.0f} frames of {seconds:.2f} s. How good is it?",
    stem="The quality is",
)


@pytest.fixture(scope="module")
def rater_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded base model as a rater that sees few and small frames."""
    folder = tmp_path_factory.mktemp("served") / "rater"
    shutil.copytree(BASE, folder)
    config = RaterConfig(sampling=Sampling(frames=2), views=(View(max_pixels=84 * 84), View(kind="crop", size=56)))
    (folder / "rater.json").write_text(config.model_dump_json())
    return folder


@pytest.fixture(scope="module")
def running(rater_dir: Path) -> Iterator[ModelServer]:
    with ModelServer(rater_dir).running() as server:
        yield server


@pytest.fixture
def server(running: ModelServer, monkeypatch: pytest.MonkeyPatch) -> ModelServer:
    """A server of the rater, without faults."""
    running.received, running.faults, running.most_at_once = [], [], 0
    for option, value in {
        "chosen_tokens": True,
        "trusts_media_kwargs": False,
        "scale": 1.0,
        "version": "0.32.0",
        "models": dict(running.models),
    }.items():
        monkeypatch.setattr(running, option, value)
    for variable in server_module.KEY_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    return running


@pytest.fixture
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "FIRST_DELAY", 0.0)


@pytest.fixture(scope="module")
def local(rater_dir: Path) -> Rater:
    return Rater.from_pretrained(rater_dir, device="cpu", dtype="float32")


def connect(server: ModelServer, backbone: Backbone, frames: str = "video") -> ServedBackbone:
    prompt = PROMPT.model_copy(update={"frames": frames})
    return ServedBackbone(ServedModel(server.url, "rater", None, None), backbone.processor, prompt)


def assert_same(served: Rating | Failure, here: Rating | Failure, tolerance: float = 2e-4) -> None:
    """Equal rows up to rounding, apart from the name, the identity and the time."""
    assert isinstance(served, Rating) and isinstance(here, Rating)
    own, expected = (dict(_leaves(result.to_row())) for result in (served, here))
    for leaves in (own, expected):
        for column in ("model", "rater_id", "seconds"):
            assert leaves.pop((column,))
    assert own.keys() == expected.keys()
    for place, value in expected.items():
        assert own[place] == (pytest.approx(value, abs=tolerance) if isinstance(value, float) else value), place


def _leaves(value: Any, place: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(part, (*place, key))
    else:
        yield place, value


# --- equal to the local backend --------------------------------------------------------------------------------------


def test_rows_equal_those_of_the_same_weights_here(server: ModelServer, local: Rater) -> None:
    rater = Rater.from_pretrained(server.url)
    assert rater.settings == local.settings
    assert_same(rater.rate(CLIPS[0], EVERYTHING), local.rate(CLIPS[0], EVERYTHING))
    for served, clip in zip(rater.rate_all(CLIPS, workers=1), CLIPS, strict=True):
        assert_same(served, local.rate(clip))
    assert 1 < server.most_at_once <= server_module.MAX_REQUESTS


@pytest.mark.parametrize("frames", ["video", "images"])
def test_views_labels_and_images(server: ModelServer, local: Rater, frames: str) -> None:
    backbone = local.backbone
    assert isinstance(backbone, Backbone)
    prompt = TWO_VIEWS.model_copy(update={"frames": frames})
    closed = CLOSED.model_copy(update=prompt.before_question)
    clips = [random_clip(backbone, (4, 3), (2, 2), seed=seed) for seed in range(2)]
    served = connect(server, backbone, frames).share_prefill(clips, prompt)
    expected = backbone.share_prefill(clips, prompt)
    for ours, theirs in zip(
        served.level_logits([prompt, closed]), expected.level_logits([prompt, closed]), strict=True
    ):
        for one, other in zip(ours, theirs, strict=True):
            assert one.logits == pytest.approx(other.logits - other.log_normalizer, abs=1e-4)
            assert one.log_normalizer == 0.0
    assert served.generate([prompt, closed], 8) == expected.generate([prompt, closed], 8)


def test_the_times_of_frames_are_sent_where_they_matter(server: ModelServer, tmp_path: Path) -> None:
    folder = build("qwen2_5_vl", tmp_path)
    backbone = Backbone.load(str(folder), device="cpu", dtype="float32")
    clip = random_clip(backbone, (4, 4), frames=4, step=20)
    with ModelServer(folder).running() as timed:
        with pytest.raises(ModelError, match=r"--trust-request-mm-kwargs, or use a prompt with `frames: images`"):
            connect(timed, backbone)
        connect(timed, backbone, "images")
        timed.trusts_media_kwargs = True
        (served,) = connect(timed, backbone).level_logits([clip], PROMPT)
    (expected,) = backbone.level_logits([clip], PROMPT)
    assert served.logits == pytest.approx(expected.logits - expected.log_normalizer, abs=1e-4)
    (other,) = backbone.level_logits([replace(clip, duration=9.0, seconds=(0.0, 3.0, 6.0, 9.0))], PROMPT)
    assert np.abs(other.logits - expected.logits).max() > 1e-3, "the times have no effect on this model"


def test_videos_of_qwen3_vl(tmp_path: Path) -> None:
    """A server with transformers 5.10 or newer puts them into a second pair of vision tokens."""
    folder = build("qwen3_vl", tmp_path)
    backbone = Backbone.load(str(folder), device="cpu", dtype="float32")
    clip = random_clip(backbone, (4, 4), (2, 2), frames=4, step=20)
    with ModelServer(folder).running() as newest:
        newest.trusts_media_kwargs = True
        served = connect(newest, backbone)
        assert str(served.choices["videos"]).startswith("in a second pair of vision tokens (as transformers 5.10")
        assert len(served.level_logits([clip], PROMPT)) == 1
        images = PROMPT.model_copy(update={"frames": "images"})
        served = connect(newest, backbone, "images")
        assert "videos" not in served.choices
        (ours,), (expected,) = served.level_logits([clip], images), backbone.level_logits([clip], images)
        assert ours.logits == pytest.approx(expected.logits - expected.log_normalizer, abs=1e-4)


THINKING_TEMPLATE = """
{%- macro text(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}{%- for part in content -%}
{%- if part.type == 'text' -%}{{ part.text }}
{%- else -%}<|vision_start|><|{{ part.type }}_pad|><|vision_end|>{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- set content = text(message.content)|trim -%}
{{ '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' -%}
{{ '<think>\n\n</think>\n\n' + content.split('</think>')[-1].lstrip('\n') }}
{%- else -%}{{ content }}{%- endif -%}
{{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n<think>\n' }}
{%- if enable_thinking is defined and enable_thinking is false -%}{{ '\n</think>\n\n' }}{%- endif -%}{%- endif -%}
"""
"""As that of Qwen3.5: it trims what people and models say, and opens every answer with thoughts."""


@pytest.mark.parametrize("stem", [" The quality of the video is", "The quality of the video is"])
def test_a_template_that_thinks_and_trims(
    server: ModelServer, local: Rater, monkeypatch: pytest.MonkeyPatch, stem: str
) -> None:
    processor = load_processor(str(BASE))
    processor.chat_template = THINKING_TEMPLATE
    monkeypatch.setattr(server.processor, "chat_template", THINKING_TEMPLATE)
    assert isinstance(local.backbone, Backbone)
    backbone = Backbone(local.backbone.model, processor, {})
    prompt = PROMPT.model_copy(update={"stem": stem, "frames": "images"})
    clip = random_clip(backbone, (3, 3))
    served = ServedBackbone(ServedModel(server.url, "rater", None, None), processor, prompt)
    (ours,), (expected,) = served.level_logits([clip], prompt), backbone.level_logits([clip], prompt)
    assert ours.logits == pytest.approx(expected.logits - expected.log_normalizer, abs=1e-4)


# --- what the server is ----------------------------------------------------------------------------------------------


def test_a_server_with_several_models(server: ModelServer, monkeypatch: pytest.MonkeyPatch, rater_dir: Path) -> None:
    monkeypatch.setattr(server, "models", {"rater": str(rater_dir), "other/model": None})
    with pytest.raises(UsageError, match=r"serves 2 models: choose one with --served-model \(it serves: rater, other/"):
        find_served(server.url)
    with pytest.raises(UsageError, match="does not serve 'reter'"):
        find_served(server.url, "reter")
    assert find_served(server.url + "/", "rater") == ServedModel(server.url, "rater", str(rater_dir), "0.32.0")
    plan = plan_rater(server.url, served_model="rater")
    assert (plan.source.name, plan.dtype, plan.source.adapter) == ("rater", "served", None)


def test_the_identity_is_what_the_server_says_and_not_its_address(server: ModelServer, rater_dir: Path) -> None:
    plan = plan_rater(server.url)
    with ModelServer().running() as other:
        other.models = dict(server.models)
        moved = plan_rater(other.url)
        assert (moved.rater_id, moved.raw_rater_id) == (plan.rater_id, plan.raw_rater_id)
        other.version = "0.33.0"
        changed = {plan_rater(other.url).rater_id}
        other.version = None  # not vLLM
        changed.add(plan_rater(other.url).rater_id)
        other.models = {"tuned": str(rater_dir)}
        changed.add(plan_rater(other.url).rater_id)
    assert len(changed | {plan.rater_id, plan_rater(server.url, scale=(0, 5)).rater_id}) == 5


def test_other_weights_in_the_directory_of_the_server_are_another_rater(
    server: ModelServer, monkeypatch: pytest.MonkeyPatch, rater_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(rater_dir, tmp_path / "merged")
    monkeypatch.setattr(server, "models", {"rater": str(tmp_path / "merged")})
    before = plan_rater(server.url).rater_id
    assert plan_rater(server.url).rater_id == before
    weights = tmp_path / "merged" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert plan_rater(server.url).rater_id != before


def test_the_processor_is_in_a_directory_that_the_server_names(
    server: ModelServer, monkeypatch: pytest.MonkeyPatch, rater_dir: Path, tmp_path: Path
) -> None:
    without_weights = tmp_path / "without"
    shutil.copytree(rater_dir, without_weights, ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr(server, "models", {"rater": str(without_weights)})
    assert plan_rater(server.url).source.backbone == str(without_weights)
    monkeypatch.setattr(server, "models", {"rater": "/gone/rater"})
    with pytest.raises(ModelError, match=r"serves 'rater' from '/gone/rater', which is neither a directory of this"):
        plan_rater(server.url)


def test_options_of_loading_weights_are_refused(server: ModelServer) -> None:
    with pytest.raises(UsageError, match=r"^--quantization, --dtype cannot be used with a served model"):
        plan_rater(server.url, quantization="4bit", dtype="float32")
    with pytest.raises(UsageError, match="--served-model needs the address of a server"):
        plan_rater(served_model="rater")
    assert server.received == []


# --- answers that are not as expected --------------------------------------------------------------------------------


def test_without_chosen_tokens_the_likeliest_ones_are_read(server: ModelServer, local: Rater) -> None:
    server.chosen_tokens = False
    rater = Rater.from_pretrained(server.url)
    assert str(rater.backbone.choices["level probabilities"]) == (
        "from the 20 likeliest tokens (the server does not support logprob_token_ids)"
    )
    rating, expected = rater.rate(CLIPS[0]), local.rate(CLIPS[0])
    assert rating.score == pytest.approx(expected.score, abs=0.05 * 4)
    server.chosen_tokens = True
    server.faults = [status(400, "logprob_token_ids: Extra inputs are not permitted")]
    assert "20 likeliest" in str(Rater.from_pretrained(server.url).backbone.choices["level probabilities"])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda choice: choice.pop("logprobs"), "answered without the probabilities of tokens"),
        (
            lambda choice: choice["logprobs"]["content"][0]["top_logprobs"].__delitem__(slice(1, 9)),
            "probabilities of bad",
        ),
        (lambda choice: choice["logprobs"]["content"][0]["top_logprobs"][1].update(logprob=math.nan), "not finite"),
        (
            lambda choice: choice["logprobs"]["content"][0]["top_logprobs"][1].update(logprob=17.5),
            "with logits such as 17.5 in the place of log-probabilities",
        ),
    ],
)
def test_answers_without_what_was_asked_for(
    server: ModelServer, local: Rater, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None], problem: str
) -> None:
    rater = Rater.from_pretrained(server.url)
    answer = server.answer

    def changed(body: dict[str, Any]) -> dict[str, Any]:
        given = answer(body)
        change(given["choices"][0])
        return given

    monkeypatch.setattr(server, "answer", changed)
    with pytest.raises(ServerError, match=problem):
        rater.rate(CLIPS[0])


PROBABILITIES = st.lists(st.one_of(st.none(), st.floats(-12, 0)), min_size=2, max_size=6)


@given(PROBABILITIES, st.floats(-14, -1))
def test_levels_that_are_not_listed_are_bounded(found: list[float | None], smallest: float) -> None:
    """The range of the score is that of all combinations of nothing and the bound."""
    listed = {str(number): value for number, value in enumerate(found) if value is not None} | {"other": smallest}
    words = tuple(f"w{number}" for number in range(len(found)))
    prompt = PROMPT.model_copy(update={"levels": words})
    bound = math.exp(min(listed.values()))
    choices = [(0.0, bound) if value is None else (math.exp(value),) for value in found]
    positions = np.linspace(0, 1, len(found))
    scores = [positions @ weights / sum(weights) for weights in product(*choices) if sum(weights)]
    uncertain = all(value is None for value in found) or max(scores) - min(scores) > 0.05
    try:
        logs = bounded_logs(found, listed, prompt)
    except ServerError as error:
        assert uncertain and "Use vLLM" in str(error)
    else:
        assert not uncertain
        assert logs == pytest.approx([min(listed.values()) if value is None else value for value in found])


@NO_WAIT
def test_a_server_that_resizes_is_refused(server: ModelServer, local: Rater) -> None:
    rater = Rater.from_pretrained(server.url)
    server.scale = 2.0
    with pytest.raises(ModelError, match=r"^the prompt has \d+ tokens on the server, but \d+ here\. The server must"):
        Rater.from_pretrained(server.url)  # before a clip is sent
    with pytest.raises(ModelError, match=r"^the prompt for frames 2 of 84x84, 2 of 56x56 has \d+ tokens on the server"):
        rater.rate(CLIPS[0])
    server.scale = 1.0
    backbone = local.backbone
    assert isinstance(backbone, Backbone)
    served, (small, large) = connect(server, backbone), (random_clip(backbone, (n, n)) for n in (2, 4))
    served.level_logits([small], PROMPT)
    server.scale = 2.0
    served.level_logits([small], PROMPT)  # a size that was right once
    with pytest.raises(ServerError, match="tokens on the server"):
        served.level_logits([large], PROMPT)


def test_another_chat_template_is_refused(server: ModelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    template = server.processor.chat_template
    monkeypatch.setattr(server.processor, "chat_template", template.replace("<|im_end|>", "<|endoftext|>"))
    with pytest.raises(ModelError, match=r"differs from token \d+ on: '<\|endoftext\|>.*on the server, '<\|im_end\|>"):
        Rater.from_pretrained(server.url)


@NO_WAIT
def test_one_clip_fails_and_the_others_are_rated(server: ModelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    rater = Rater.from_pretrained(server.url)
    monkeypatch.setattr(server_module, "MAX_REQUESTS", 1)
    monkeypatch.setattr(rater.backbone, "parallel_batches", 1)
    server.faults = [works, status(400, "the prompt is too long")]
    first, second, third = rater.rate_all([*CLIPS, CLIPS[0]], workers=1)
    assert isinstance(first, Rating) and isinstance(third, Rating) and isinstance(second, Failure)
    assert type(second.error) is ServerError and "400 Bad Request: the prompt is too long" in str(second.error)
    assert second.to_row()["error"]["class"] == "ServerError"
    server.faults = [works, *[status(500)] * server_module.ATTEMPTS]
    results = list(rater.rate_all([*CLIPS, CLIPS[0]], batch_size=3, workers=1))
    assert sum(isinstance(result, Failure) for result in results) == 0, "a batch is tried again clip by clip"
    server.faults = [status(400, "no")] * 2
    with pytest.raises(ServerError):
        rater.rate_frames(np.zeros((2, 4, 64, 64, 3), np.uint8), 25)


# --- a real server ---------------------------------------------------------------------------------------------------

VLLM = os.environ.get("LMM_QA_VLLM")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not VLLM, reason="LMM_QA_VLLM is not set to the path of a vllm executable")
def test_a_real_vllm_server(local: Rater, rater_dir: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(VLLM), "serve", str(rater_dir), "--port", str(port), "--host", "127.0.0.1", "--dtype", "float32",
               "--max-model-len", "2048", "--max-num-seqs", "4", "--enforce-eager"]  # fmt: skip
    settings = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    log = tmp_path / "vllm.log"
    with log.open("w") as output:
        vllm = subprocess.Popen(
            command, stdout=output, stderr=output, env=os.environ | settings, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        while not _is_up(f"{url}/health"):
            assert vllm.poll() is None, log.read_text()[-3000:]
            time.sleep(2)
        rater = Rater.from_pretrained(f"{url}/v1")
        assert "vLLM" in str(rater.backbone.choices["server"])
        assert "exact" in str(rater.backbone.choices["level probabilities"])
        for details in (Details(), EVERYTHING):
            results = rater.rate_all(CLIPS, details=details, workers=1)
            for served, here in zip(results, local.rate_all(CLIPS, details=details, workers=1), strict=True):
                assert_same(served, here)
        images = plan_rater(f"{url}/v1", prompt=TWO_VIEWS.model_copy(update={"frames": "images"}))
        score = Rater.from_plan(images).rate(CLIPS[0]).score
        same = Rater.from_plan(plan_rater(rater_dir, prompt=images.settings.prompt, device="cpu", dtype="float32"))
        assert score == pytest.approx(same.rate(CLIPS[0]).score, abs=1e-3)
    finally:
        os.killpg(vllm.pid, signal.SIGTERM)
        vllm.wait(60)


def _is_up(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(url, timeout=2).status == 200)
    except OSError:
        return False
