"""A server that answers as vLLM does, with a small model that runs in this process, and that can fail on request.

It uses none of the package's code for prompts or inputs: frames, chat and times come from the request alone.
"""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import VideoMetadata

Fault = Callable[["ModelServer", "Handler"], bool]
"""Called for each question; returns whether it has answered."""


class ModelServer:
    """What the server is, what it has received, and how it fails."""

    def __init__(self, model: Path | None = None) -> None:
        if model:
            self.model = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
            self.processor = AutoProcessor.from_pretrained(model)
        self.models: dict[str, str | None] = {"rater": str(model)}
        """Names, and the places that they were loaded from."""
        self.version: str | None = "0.32.0"
        self.chosen_tokens = True
        """Whether it supports `logprob_token_ids`; otherwise it ignores them."""
        self.trusts_media_kwargs = False
        self.scale = 1.0
        """Resizes frames by this factor, as a server with other limits on pixels does."""
        self.faults: list[Fault] = []
        """The first one handles the next question, and so on."""
        self.received: list[tuple[str, dict[str, str], Any]] = []
        """Path, headers and body of each request."""
        self.most_at_once = self._at_once = 0
        self.url = ""
        self._lock = threading.Lock()

    @property
    def questions(self) -> list[Any]:
        """Bodies of the questions."""
        return [body for _, _, body in self.received if body]

    @contextmanager
    def running(self, port: int = 0) -> Iterator[ModelServer]:
        handler = type("BoundHandler", (Handler,), {"server_state": self})
        server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_port}/v1"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()

    @contextmanager
    def counted(self) -> Iterator[None]:
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            yield
        finally:
            with self._lock:
                self._at_once -= 1

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a question.

        Raises:
            ValueError: the server refuses it.
        """
        if body.get("media_io_kwargs") and not self.trusts_media_kwargs:
            raise ValueError("Per-request media_io_kwargs are disabled by default")
        inputs = self._inputs(body)
        tokens = inputs["input_ids"].shape[1]
        with self._lock, torch.inference_mode():
            made = self.model.generate(
                **inputs, max_new_tokens=body["max_tokens"], do_sample=False, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        logs = made.logits[0][0].float().log_softmax(-1)
        new = made.sequences[0, tokens:].tolist()
        choice: dict[str, Any] = {"message": {"role": "assistant", "content": self.processor.decode(new)}}
        if body.get("return_token_ids"):
            choice["token_ids"] = new
        if body.get("logprobs"):
            listed = logs.topk(body.get("top_logprobs", 0)).indices.tolist()
            if self.chosen_tokens and "logprob_token_ids" in body:
                listed = [new[0], *body["logprob_token_ids"]]  # vLLM lists the token that it chose, too
            top = [{"token": f"token_id:{token}", "logprob": float(logs[token])} for token in listed]
            choice["logprobs"] = {"content": [{"top_logprobs": top}]}
        answer = {"choices": [choice], "usage": {"prompt_tokens": tokens}}
        return answer | ({"prompt_token_ids": inputs["input_ids"][0].tolist()} if body.get("return_token_ids") else {})

    def _inputs(self, body: dict[str, Any]) -> Any:
        videos, images = [], []
        for message in body["messages"]:
            for part in message["content"] if isinstance(message["content"], list) else ():
                if part["type"] == "video_url":
                    part["type"] = "video"
                    videos.append(torch.stack(self._frames(part.pop("video_url")["url"], "data:video/jpeg;base64,")))
                elif part["type"] == "image_url":
                    part["type"] = "image"
                    images += self._frames(part.pop("image_url")["url"], "data:image/png;base64,")
        text = self.processor.apply_chat_template(
            body["messages"],
            tokenize=False,
            add_generation_prompt=body["add_generation_prompt"],
            continue_final_message=body["continue_final_message"],
            **(body["chat_template_kwargs"] if "enable_thinking" in self.processor.chat_template else {}),
        )
        kwargs: dict[str, Any] = {"do_resize": False, "return_tensors": "pt"}
        if images:
            return self.processor(text=[text], images=images, **kwargs)
        if not videos:
            return self.processor(text=[text], return_tensors="pt")
        given = body.get("media_io_kwargs", {}).get("video", {})
        metadata = VideoMetadata(
            total_num_frames=given.get("total_num_frames", len(videos[0])),
            fps=given.get("fps", 1.0),
            duration=given.get("duration"),
            frames_indices=given.get("frames_indices", list(range(len(videos[0])))),
        )
        return self.processor(
            text=[text], videos=videos, video_metadata=[metadata] * len(videos), do_sample_frames=False, **kwargs
        )

    def _frames(self, url: str, prefix: str) -> list[Any]:
        assert url.startswith(prefix)
        pictures = [Image.open(io.BytesIO(base64.b64decode(part))) for part in url.removeprefix(prefix).split(",")]
        assert {picture.format for picture in pictures} == {"PNG"}
        resized = [picture.resize([int(self.scale * side) for side in picture.size]) for picture in pictures]
        return [torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in resized]


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server_state: ModelServer

    def do_GET(self) -> None:
        state = self.server_state
        state.received.append((self.path, dict(self.headers), None))
        if self.path == "/v1/models":
            self.reply({"object": "list", "data": [{"id": name, "root": root} for name, root in state.models.items()]})
        elif self.path == "/version" and state.version:
            self.reply({"version": state.version})
        else:
            self.reply({"detail": "Not Found"}, 404)

    def do_POST(self) -> None:
        state = self.server_state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        state.received.append((self.path, dict(self.headers), json.loads(json.dumps(body))))
        with state.counted():
            if state.faults and state.faults.pop(0)(state, self):
                return
            try:
                self.reply(state.answer(body))
            except ValueError as error:
                self.reply({"error": {"message": str(error), "type": "BadRequestError", "code": 400}}, 400)

    def reply(self, content: Any, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        with suppress(ConnectionError):  # the client may have given up
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def status(code: int, message: str = "overloaded", **headers: str) -> Fault:
    """Answers with an error."""

    def fault(_: ModelServer, handler: Handler) -> bool:
        handler.reply({"error": {"message": message, "code": code}}, code, **headers)
        return True

    return fault


def content(data: bytes) -> Fault:
    """Answers with something else."""

    def fault(_: ModelServer, handler: Handler) -> bool:
        handler.reply(data)
        return True

    return fault


def slow(seconds: float) -> Fault:
    """Answers late."""

    def fault(_: ModelServer, handler: Handler) -> bool:
        time.sleep(seconds)
        return False

    return fault


def drop(_: ModelServer, handler: Handler) -> bool:
    """Closes the connection without an answer, as a server that is killed does."""
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)
    return True


def works(_: ModelServer, handler: Handler) -> bool:
    """No fault."""
    return False
