"""python -m pytest tests/web/test_server.py"""

from __future__ import annotations

import asyncio
import os
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from lmm_qa.cli import web as command
from lmm_qa.errors import ConfigError, MissingExtra, ModelError, UsageError
from lmm_qa.web import server, workspace
from lmm_qa.web.jobs import Given, Request, _clips_only
from lmm_qa.web.server import Address
from lmm_qa.web.shelf import RaterSettings, Shelf, without_folders
from lmm_qa.web.workspace import Workspace, delete_old, find_file


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "::", "example.org"])
def test_other_machines_need_a_password(host: str) -> None:
    with pytest.raises(UsageError, match=f"--host {host} lets other machines use this page: set a password"):
        Address(host).check()
    Address(host, password="secret").check()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
def test_this_machine_needs_none(host: str) -> None:
    Address(host).check()


def test_the_password_is_read_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(command.PASSWORD, raising=False)
    assert command._password(False, None) is None
    monkeypatch.setenv(command.PASSWORD, "from outside")
    assert command._password(False, None) == "from outside"
    (tmp_path / "password").write_text("from a file\r\nrest", encoding="utf-8")
    assert command._password(True, tmp_path / "password") == "from a file"
    (tmp_path / "password").write_text("\n", encoding="utf-8")
    with pytest.raises(UsageError, match="the password is empty: the first line of"):
        command._password(True, tmp_path / "password")
    with pytest.raises(UsageError, match="cannot be read"):
        command._password(True, tmp_path / "nowhere")


def test_guessing_the_password_takes_longer_with_each_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "FIRST_WAIT", 0.1)
    monkeypatch.setattr(server, "LONGEST_WAIT", 0.3)

    async def attempts() -> None:
        check = server._check_password("täst word")
        start = time.monotonic()

        async def attempt(password: str) -> tuple[bool, float]:
            return await check("anybody", password), time.monotonic() - start

        made = await asyncio.gather(*map(attempt, ["a", "b", "c", "d", "täst word", "täst word"]))
        assert [right for right, _ in made] == [False] * 4 + [True] * 2
        least = [0, 0.1, 0.3, 0.6, 0.9, 0.9]
        assert all(moment >= earliest for (_, moment), earliest in zip(made, least, strict=True))

    asyncio.run(attempts())


def test_without_gradio_the_error_gives_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"lmm-qa web needs gradio.*pip install 'lmm-qa\[web\]'"):
        server.prepare()


@pytest.mark.skipif(find_spec("gradio") is None, reason="needs gradio: pip install 'lmm-qa[web]'")
def test_settings_of_gradio_in_the_environment_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GRADIO_SHARE", "GRADIO_ALLOWED_PATHS", *server.ENVIRONMENT):
        monkeypatch.setenv(name, "/")
    server.prepare()
    set_now = {name: value for name, value in os.environ.items() if name.startswith(("GRADIO_", "HF_HUB_"))}
    assert set_now.items() >= server.ENVIRONMENT.items()
    assert not {"GRADIO_SHARE", "GRADIO_ALLOWED_PATHS"} & set_now.keys()


@pytest.mark.skipif(find_spec("gradio") is None, reason="needs gradio: pip install 'lmm-qa[web]'")
def test_gradio_finds_no_template_in_our_html() -> None:
    from lmm_qa.web.page import inert

    assert not {"{", "}", "$"} & set(inert("<p>${alert(1)} {{ 7 * 7 }}</p>"))


def test_sets_have_names_that_do_not_say_where_they_are(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder / "clips").mkdir(parents=True)
    named = command._named([tmp_path / "a" / "clips", tmp_path / "b" / "clips"])
    assert list(named) == ["clips", "clips (2)"]
    with pytest.raises(UsageError, match="nowhere does not exist"):
        command._named([tmp_path / "nowhere"])
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UsageError, match=r"ratings are \.jsonl, \.csv or \.parquet"):
        command._named([tmp_path / "notes.txt"])


# --- the private folder ----------------------------------------------------------------------------------------------


def test_only_files_of_results_are_found(tmp_path: Path) -> None:
    upload = tmp_path / "CLIP.MP4"
    upload.write_bytes(b"video")
    before = Path.cwd()
    with Workspace() as place:
        result = place.new_result()
        token = result.folder.name
        assert result.add(upload, "clip0", uploaded=False).name == "clip0.mp4"
        found = find_file(token, "clip0.mp4")
        assert found and found.samefile(result.path("clip0.mp4")) and found.read_bytes() == b"video"
        result.path("clip1.txt").touch()
        (place.folder / "uploads" / "other.mp4").touch()
        for wrong in ("clip1.txt", "clip2.mp4", "../../uploads/other.mp4", "..", ""):
            assert find_file(token, wrong) is None, wrong
        assert find_file("..", "clip0.mp4") is None and find_file("a" * 22, "clip0.mp4") is None
    assert Path.cwd() == before and not place.folder.exists() and upload.exists()


def test_old_uploads_and_results_are_deleted() -> None:
    with Workspace() as place:
        old, new = place.new_result(), place.new_result()
        upload = workspace.UPLOADS / "hash"
        upload.mkdir()
        for folder in (old.folder, upload):
            os.utime(folder, (0, 0))
        delete_old(place.folder, time.time() - workspace.KEPT)
        assert new.folder.is_dir() and not old.folder.exists() and not upload.exists()


# --- requests --------------------------------------------------------------------------------------------------------


def test_paths_of_this_machine_are_cut_from_messages() -> None:
    assert without_folders("cannot read /srv/data/a.mp4: no such file") == "cannot read a.mp4: no such file"
    assert without_folders(r"C:\Users\me\a.mp4 is damaged (/usr/lib/x.py:12)") == "a.mp4 is damaged (x.py:12)"
    for folder in ("/srv/my data", "/srv/a  b/Bob's clips (1)", "~/my data/in", "C:\\My Clips\\new ones"):
        path = f"{folder}/a b.mp4"
        assert without_folders(f"cannot read {path}: no such file") == "cannot read a b.mp4: no such file"
        assert without_folders(f"TypeError: '{path}' ({path}:3)") == "TypeError: 'a b.mp4' (a b.mp4:3)"
    assert without_folders("moved /srv/my data/a.mp4 to /srv/b c/d.mp4") == "moved a.mp4 to d.mp4"
    for text in ("http://127.0.0.1:8000/v1 does not answer", "results/ab/clip0.mp4", "1 / 2 and/or 3"):
        assert without_folders(text) == text


def test_settings_are_those_of_the_command() -> None:
    settings = RaterSettings("qalign", (0.0, 100.0), "uniform:4", ("whole:224", "face:224"))
    command_line = Request("qrealign-mini", settings, False, "base").command(["a b.mp4"], Shelf())
    assert command_line == (
        "lmm-qa rate 'a b.mp4' --explain --model qrealign-mini --answers-from base --prompt qalign --scale 0 100 "
        "--sampling uniform:4 --view whole:224 --view face:224 -o ratings.jsonl"
    )
    assert settings.options()["sampling"].frames == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (RaterSettings(sampling="uniform:500"), "64 frames, received uniform:500"),
        (RaterSettings(views=("whole:5000",)), "1048576 pixels a frame, received whole:5000"),
        (RaterSettings(views=("crop:2000",)), "received crop:2000"),
        (RaterSettings(scale=(5.0, 1.0)), "low must be below high in the scale, received 5 1"),
        (RaterSettings(sampling="often"), "is not of the form"),
    ],
)
def test_a_visitor_cannot_ask_for_too_much(settings: RaterSettings, message: str) -> None:
    with pytest.raises((UsageError, ConfigError), match=message):
        settings.options()


def test_the_embedded_rater_comes_first_and_an_own_one_does_not_say_where_it_is() -> None:
    shelf = Shelf("/srv/models/mine")
    assert [name for _, name in shelf.names][:2] == ["embedded", "mine"] and shelf.first == "mine"
    assert "not what people think" in shelf.about("embedded").notes[0]
    assert shelf.about("qrealign-mini").published


def test_a_rater_that_is_not_here_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object) -> None:
        raise ModelError("the local cache does not have it")

    monkeypatch.setattr("lmm_qa.model.source.find_model", offline)
    with pytest.raises(ModelError, match="downloads nothing: run lmm-qa rate CLIP --model qrealign-mini once"):
        Shelf().plan("qrealign-mini", RaterSettings())


def test_clips_of_one_name_get_different_names() -> None:
    names = [one.name for one in _clips_only([Given(Path(place), "a.mp4") for place in ("1/a.mp4", "2/a.mp4")])]
    assert names == ["a.mp4", "a (2).mp4"]
    with pytest.raises(UsageError, match="give at least one clip"):
        _clips_only([])
    with pytest.raises(UsageError, match=r"received r\.jsonl: the tab A set shows ratings"):
        _clips_only([Given(Path("r.jsonl"), "r.jsonl")])
