"""python -m pytest tests/test_security.py

Files from strangers, read by the real decoder in its worker processes. SECURITY.md lists all promises and their tests.
"""

from __future__ import annotations

import random
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from clips import write_clip
from paths import ROOT

from lmm_qa.config import Sampling, View
from lmm_qa.errors import ClipError
from lmm_qa.video.decode import Frames
from lmm_qa.video.decoder_pool import DecoderPool

HOW = (Sampling(frames=2), (View(),), 28)


def test_the_tests_that_security_md_names_exist() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    files = {
        name: (ROOT / name).read_text(encoding="utf-8") for name in re.findall(r"`((?:tests|scripts)/\S+\.py)`", text)
    }
    functions = re.findall(r"`(test_\w+)`", text)
    assert len(files) > 8 and len(functions) > 8
    assert [name for name in functions if not any(f"def {name}(" in code for code in files.values())] == []


class Listener:
    """A server on the loopback interface that counts connections."""

    def __init__(self) -> None:
        self.connections = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.connections += 1
            connection.close()

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    server = Listener()
    yield server
    server.close()


def references(target: str) -> dict[str, str]:
    """Text formats that make a player open something else."""
    url, (host, port) = f"http://{target}/a.mp4", target.split(":")
    dash = '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
    return {
        "playlist.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{url}\n#EXT-X-ENDLIST\n",
        "list.mkv": f"ffconcat version 1.0\nfile '{url}'\n",
        "subfile.webm": f"ffconcat version 1.0\nfile 'subfile,,start,0,end,9,,:{url}'\n",
        "dash.mov": f"{dash}<Representation><BaseURL>{url}</BaseURL></Representation></AdaptationSet></Period></MPD>",
        "session.avi": f"v=0\no=- 0 0 IN IP4 {host}\ns=x\nc=IN IP4 {host}\nt=0 0\nm=video {port} RTP/AVP 96\n",
        "smil.ts": f'<smil><body><video src="{url}"/></body></smil>',
        "redirect.asf": f"[Reference]\nRef1={url}\n",
    }


def test_no_file_or_name_makes_the_decoder_open_a_connection(listener: Listener, tmp_path: Path) -> None:
    with socket.create_connection(("127.0.0.1", int(listener.address.rpartition(":")[2]))):
        pass  # the server does count
    for name, text in references(listener.address).items():
        (tmp_path / name).write_text(text)
    names = [f"{scheme}://{listener.address}/a.mp4" for scheme in ("http", "https", "tcp", "rtmp", "rtsp", "ftp")]
    names += [
        f"concat:http://{listener.address}/a.mp4|b.mp4",
        f"subfile,,start,0,end,9,,:http://{listener.address}/a.mp4",
    ]
    paths = [*tmp_path.iterdir(), *map(Path, names)]
    with DecoderPool(2, 30) as pool:
        results = list(pool.imap([*paths, *names], *HOW))
    assert len(results) == len(references("a:1")) + 2 * len(names)
    assert all(isinstance(result, ClipError) for result in results)
    assert listener.connections == 1


def test_references_to_other_local_files_are_refused(tmp_path: Path) -> None:
    write_clip(tmp_path / "secret.mp4", frames=3)
    (tmp_path / "list.mkv").write_text("ffconcat version 1.0\nfile secret.mp4\n")
    (tmp_path / "playlist.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nsecret.mp4\n#EXT-X-ENDLIST\n")
    with DecoderPool(1, 30) as pool:
        for result in pool.imap([tmp_path / "list.mkv", tmp_path / "playlist.mp4"], *HOW):
            assert isinstance(result, ClipError)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_each_fuzzed_file_has_a_result_and_no_worker_is_left(tmp_path: Path, suffix: str) -> None:
    """`scripts/robustness.py` tries some hundred more."""
    rng = random.Random(0)
    whole = write_clip(tmp_path / f"whole{suffix}", frames=8).read_bytes()
    paths = []
    for number in range(12):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 8, 64))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        del data[rng.randrange(len(data) // 2, len(data)) : rng.choice((len(data), len(data) // 2))]
        paths.append(tmp_path / f"{number}{suffix}")
        paths[-1].write_bytes(data)
    before = psutil.Process().children()  # of other tests, such as a resource tracker
    with DecoderPool(2, 30) as pool:
        results = list(pool.imap(paths, *HOW))
        workers = [child for child in psutil.Process().children() if child not in before]
    assert len(results) == len(paths)
    assert all(isinstance(result, Frames | ClipError) for result in results)
    assert not [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]
