"""python -m pytest tests/test_manifest.py"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmm_qa.errors import ClipNotFound, ClipUnreadable, ManifestError
from lmm_qa.manifest import Clip, _natural, content_id, expand


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(*paths: str) -> None:
    """Files whose bytes differ by their names."""
    for path in paths:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(path)


def names(clips: Sequence[Clip]) -> list[str]:
    return [clip.name for clip in clips]


def refusal(*inputs: str | Path) -> str:
    with pytest.raises(ManifestError) as caught:
        expand(inputs)
    return str(caught.value)


# --- files and folders -----------------------------------------------------------------------------------------------


def test_a_file_has_the_name_given_on_the_command_line(here: Path) -> None:
    touch("a/clip.mp4")
    assert expand(["a/clip.mp4"]) == [Clip(Path("a/clip.mp4"), "a/clip.mp4", "argument")]
    assert names(expand([here / "a" / "clip.mp4"])) == [(here / "a" / "clip.mp4").as_posix()]


def test_a_named_file_may_have_any_suffix(here: Path) -> None:
    touch("clip.bin", "clip", "CLIP[1].MP4")
    assert names(expand(["clip.bin", "clip", "CLIP[1].MP4"])) == ["clip.bin", "clip", "CLIP[1].MP4"]


def test_a_folder_is_searched_in_natural_order(here: Path) -> None:
    touch("clips/b/c.MP4", "clips/take10.webm", "clips/take9.mov", "clips/A.gif", "clips/notes.md", "clips/list.csv")
    clips = expand(["clips/"])
    assert names(clips) == ["A.gif", "b/c.MP4", "take9.mov", "take10.webm"]
    assert clips[1] == Clip(Path("clips/b/c.MP4"), "b/c.MP4", "folder clips")


def test_hidden_files_and_folders_are_left_out(here: Path) -> None:
    touch("clips/._a.mp4", "clips/.cache/b.mp4", "clips/c.mp4")
    assert names(expand(["clips"])) == ["c.mp4"]


def test_links_to_folders_are_followed_once(here: Path) -> None:
    touch("clips/a/1.mp4", "elsewhere/2.mp4")
    Path("clips/a/loop").symlink_to("..", target_is_directory=True)
    Path("clips/again").symlink_to("a", target_is_directory=True)
    Path("clips/out").symlink_to("../elsewhere", target_is_directory=True)
    Path("clips/self").symlink_to("self")
    assert names(expand(["clips"])) == ["a/1.mp4", "out/2.mp4"]


def test_a_broken_link_to_a_clip_is_a_clip(here: Path) -> None:
    Path("clips").mkdir()
    Path("clips/gone.mp4").symlink_to("nowhere.mp4")
    assert names(expand(["clips"])) == ["gone.mp4"]
    assert names(expand(["clips/gone.mp4"])) == ["clips/gone.mp4"]


def test_a_file_given_twice_is_listed_once_at_its_first_position(here: Path) -> None:
    touch("clips/a.mp4", "clips/b.mp4")
    Path("link.mp4").symlink_to("clips/b.mp4")
    clips = expand(["link.mp4", "clips", "./clips/a.mp4", here / "clips" / "b.mp4"])
    assert [(clip.name, clip.origin) for clip in clips] == [("link.mp4", "argument"), ("a.mp4", "folder clips")]


def test_clips_with_equal_file_names_get_longer_names(here: Path) -> None:
    touch("x/a.mp4", "y/a.mp4", "y/b.mp4")
    assert names(expand(["x", "y"])) == ["x/a.mp4", "y/a.mp4", "b.mp4"]


def test_a_clip_gets_its_absolute_path_if_the_longer_name_is_taken(here: Path) -> None:
    touch("x/a.mp4", "y/a.mp4", "z/x/a.mp4")
    assert names(expand(["x", "y", "z"])) == [(here / "x/a.mp4").as_posix(), "y/a.mp4", "z/x/a.mp4"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse file names that are not Unicode")
def test_a_name_that_is_not_unicode_can_be_written_to_a_file(here: Path) -> None:
    Path("clips").mkdir()
    Path(os.fsdecode(b"clips/\xff\xc3\xa9.mp4")).write_bytes(b"")
    (clip,) = expand(["clips"])
    assert clip.name == r"\xffé.mp4"
    assert clip.path.exists()


@given(st.lists(st.integers(0, 10**6), unique=True))
def test_natural_order_sorts_by_number(numbers: list[int]) -> None:
    assert sorted((f"clip{n}.mp4" for n in numbers), key=_natural) == [f"clip{n}.mp4" for n in sorted(numbers)]


# --- globs -----------------------------------------------------------------------------------------------------------


def test_globs_are_expanded(here: Path) -> None:
    touch("clips/a10.mp4", "clips/a9.mp4", "clips/deep/b.mp4", "clips/c.txt", "clips/d.bin")
    assert names(expand(["clips/*.mp4"])) == ["clips/a9.mp4", "clips/a10.mp4"]
    assert names(expand(["clips/**/*.mp4"])) == ["clips/a9.mp4", "clips/a10.mp4", "clips/deep/b.mp4"]
    assert names(expand(["clips/*.bin"])) == ["clips/d.bin"]
    assert names(expand(["clips/a*"])) == ["clips/a9.mp4", "clips/a10.mp4"]
    assert sorted(names(expand(["cli*"]))) == ["a10.mp4", "a9.mp4", "deep/b.mp4"]
    assert expand(["clips/a9*"])[0].origin == "glob clips/a9*"


# --- lists of clips --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("list.csv", "id,Video\n1,a.mp4\n2,sub/b.mp4\n"),
        ("list.CSV", "\ufeffPATH\r\na.mp4\r\n\r\nsub/b.mp4\r\n"),
        ("list.csv", 'clip,text\n"a.mp4","two\nlines"\nsub/b.mp4,x\n'),
        ("list.tsv", "score\tFile Name\tfilename\n1\tz\ta.mp4\n2\tz\tsub/b.mp4\n"),
        ("list.jsonl", '{"file": "a.mp4"}\n\n{"x": 1, "file": "sub/b.mp4"}\n'),
        ("list.txt", "a.mp4\r\n\r\n sub/b.mp4"),
    ],
)
def test_text_lists(here: Path, file: str, text: str) -> None:
    Path("lists").mkdir()
    Path("lists", file).write_bytes(text.encode())
    clips = expand([f"lists/{file}"])
    assert names(clips) == ["a.mp4", "sub/b.mp4"]
    assert [clip.path for clip in clips] == [Path("lists/a.mp4"), Path("lists/sub/b.mp4")]


def test_parquet_lists(here: Path) -> None:
    table = pyarrow.table({"mos": [1.0, 2.0], "Name": ["a.mp4", "b.mp4"]})
    pyarrow.parquet.write_table(table, "list.parquet")
    assert expand(["list.parquet"])[1] == Clip(Path("b.mp4"), "b.mp4", "list.parquet:2")


def test_the_preferred_path_column_is_used_whatever_the_column_order(here: Path) -> None:
    Path("list.csv").write_text("name,path,video\nn.mp4,p.mp4,v.mp4\n")
    assert names(expand(["list.csv"])) == ["v.mp4"]


def test_list_entries_with_missing_files_are_included(here: Path) -> None:
    touch("there.mp4")
    Path("list.csv").write_text("clip\nmissing.mp4\nthere.mp4\n")
    assert [(clip.name, clip.origin, clip.path.exists()) for clip in expand(["list.csv"])] == [
        ("missing.mp4", "list.csv:2", False),
        ("there.mp4", "list.csv:3", True),
    ]


def test_list_entries_are_relative_to_root(here: Path) -> None:
    touch("data/a.mp4")
    Path("list.csv").write_text(f"clip\na.mp4\n{here}/b.mp4\n")
    assert [clip.path for clip in expand(["list.csv"], root=Path("data"))] == [Path("data/a.mp4"), here / "b.mp4"]


def test_the_same_entry_of_two_lists_is_one_clip(here: Path) -> None:
    Path("one.csv").write_text("clip\na.mp4\nb.mp4\n")
    Path("two.txt").write_text("b.mp4\nc.mp4\n./a.mp4\n")
    assert names(expand(["one.csv", "two.txt"])) == ["a.mp4", "b.mp4", "c.mp4"]


def test_the_published_lists_of_thqa(shared_dir: Path) -> None:
    first = "14_dalle3_common_voice_en_35729059_audio2head.mp4"
    for file, count, name in (
        ("thqa_ntire_train.csv", 8927, "15_dalle3_common_voice_en_36411224_audio2head.mp4"),
        ("thqa_ntire_val.csv", 1714, first),
        ("thqa_ntire_vallist.csv", 1714, first),
        ("thqa_ntire_testlist.csv", 1606, "10_dalle3_common_voice_en_35787446_audio2head.mp4"),
    ):
        path = shared_dir / "thqa" / file
        clips = expand([path], root=Path("videos"))
        assert len(clips) == count
        assert clips[0] == Clip(Path("videos", name), name, f"{path}:2")
        assert all(clip.name.endswith(".mp4") for clip in clips)


def test_a_missing_video_given_by_name_is_a_clip(here: Path) -> None:
    touch("there.mp4")
    assert expand(["gone.MP4", "there.mp4"]) == [
        Clip(Path("gone.MP4"), "gone.MP4", "argument"),
        Clip(Path("there.mp4"), "there.mp4", "argument"),
    ]


# --- refusals --------------------------------------------------------------------------------------------------------


def test_inputs_that_match_no_clip_are_errors(here: Path) -> None:
    touch("notes/readme.md")
    assert "no clips were given" in refusal()
    assert "'gone' does not exist" in refusal("gone")
    assert "'gone.csv' does not exist" in refusal("gone.csv")
    assert "'*.mp4' does not exist, and as a glob it matches no clip" in refusal("*.mp4")
    assert "folder 'notes' and the folders in it contain no video (.3gp " in refusal("notes")


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("l.csv", b"", "l.csv is empty: expected a header with the names of the columns"),
        ("l.csv", b"clip\n", "l.csv lists no clips"),
        ("l.csv", b"a.mp4,3\n", "l.csv: no column is named clip, video, path, file, filename or name;"),
        ("l.csv", b"id,mos\n1,2\n", "the columns are: id, mos"),
        ("l.csv", b"id,clip\n1,a.mp4\n2\n", "l.csv:3: expected 2 cells, received 1"),
        ("l.csv", b"id,clip\n1, \n", "l.csv:2: expected the path of a clip, received ' '"),
        ("l.csv", b"clip\n\xff\xfe.mp4\n", "cannot read l.csv: it is not UTF-8 text"),
        ("l.csv", b"clip\n" + b"x" * 200_000 + b"\n", "l.csv:2: invalid CSV: field larger"),
        ("l.csv", b"clip\na\0.mp4\n", "l.csv:2: 'a\\x00.mp4' cannot be a file name"),
        ("l.jsonl", b"", "l.jsonl lists no clips"),
        ("l.jsonl", b'{"clip": "a"}\n{"clip": \n', "l.jsonl:2: expected a JSON object, received '{\"clip\":' (Exp"),
        ("l.jsonl", b'"a.mp4"\n', "l.jsonl:1: expected a JSON object, received '\"a.mp4\"'"),
        ("l.jsonl", b'{"clip": "a.mp4"}\n{"mos": 1}\n', "l.jsonl:2: expected the path of a clip, received None"),
        ("l.jsonl", b'{"clip": 7}\n', "l.jsonl:1: expected the path of a clip, received 7"),
        ("l.jsonl", b'{"clip": "\\ud800.mp4"}\n', "l.jsonl:1: '\\ud800.mp4' cannot be a file name"),
        ("l.parquet", b"PAR0", "l.parquet is not a Parquet file"),
        ("l.txt", b"\n \n", "l.txt lists no clips"),
    ],
)
def test_invalid_lists_are_errors(here: Path, file: str, content: bytes, expected: str) -> None:
    Path(file).write_bytes(content)
    assert expected in refusal(file)


def test_parquet_lists_without_a_path_column_are_errors(here: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"clip": ["a.mp4", None]}), "l.parquet")
    assert "l.parquet:2: expected the path of a clip, received None" in refusal("l.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"mos": [1.0]}), "l.parquet")
    assert "the columns are: mos" in refusal("l.parquet")


# --- content ---------------------------------------------------------------------------------------------------------


def test_content_id_is_the_hash_of_the_bytes(here: Path) -> None:
    data = os.urandom(3_000_001)
    Path("a.mp4").write_bytes(data)
    Path("b.mp4").write_bytes(data)
    Path("c.mp4").write_bytes(data[:-1])
    assert content_id(Path("a.mp4")) == "sha256:" + hashlib.sha256(data).hexdigest()[:32]
    assert content_id(Path("a.mp4")) == content_id(Path("b.mp4")) != content_id(Path("c.mp4"))


def test_content_id_of_something_that_is_not_a_file_is_an_error(here: Path) -> None:
    touch("file.mp4")
    for missing in ("gone.mp4", "file.mp4/inside.mp4"):
        with pytest.raises(ClipNotFound, match=r"mp4 does not exist"):
            content_id(Path(missing))
    with pytest.raises(ClipUnreadable, match="cannot be read: Is a directory"):
        content_id(here)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.timeout(20)
def test_content_id_does_not_block_on_a_pipe(here: Path) -> None:
    os.mkfifo("pipe.mp4")
    with pytest.raises(ClipUnreadable, match=r"pipe\.mp4 is not a regular file"):
        content_id(Path("pipe.mp4"))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.mp4")
        with pytest.raises(ClipUnreadable, match=r"socket\.mp4 cannot be read"):
            content_id(Path("socket.mp4"))


# --- the module ------------------------------------------------------------------------------------------------------


def test_importing_the_module_loads_no_heavy_libraries() -> None:
    code = "import json, sys, lmm_qa.manifest; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert "lmm_qa.manifest" in loaded
    assert not {"torch", "transformers", "pyarrow", "pandas", "numpy"} & set(loaded)


@pytest.mark.parametrize("address", ["https://example.com/a/clip.mp4", "https://x.com/watch?v=1", "s3://b/c.mp4"])
def test_addresses_are_clips_with_their_whole_names(here: Path, address: str) -> None:
    """They get an error row, which says to download them; the other clips are rated."""
    touch("a.mp4")
    Path("list.csv").write_text(f"clip\na.mp4\n{address}\n")
    assert names(expand([address, "a.mp4"])) == [address, "a.mp4"]
    assert names(expand(["list.csv"])) == ["a.mp4", address]


def test_videos_inside_a_table_are_refused_in_a_line(here: Path) -> None:
    for cell in ({"path": "a.mp4", "bytes": b"x" * 50_000}, b"x" * 50_000):
        pyarrow.parquet.write_table(pyarrow.table({"clip": [cell]}), "videos.parquet")
        with pytest.raises(
            ManifestError, match=r"videos\.parquet:1: the table contains the video itself: save it"
        ) as error:
            expand(["videos.parquet"])
        assert len(str(error.value)) < 200
    pyarrow.parquet.write_table(pyarrow.table({"clip": [{"path": "a.mp4", "bytes": None}]}), "paths.parquet")
    assert names(expand(["paths.parquet"])) == ["a.mp4"]


def test_a_link_and_its_target_are_one_clip(here: Path) -> None:
    touch("a.mp4")
    Path("link.mp4").symlink_to("a.mp4")
    assert names(expand(["a.mp4", "link.mp4"])) == ["a.mp4"]
    assert names(expand(["link.mp4", "a.mp4"])) == ["link.mp4"]
