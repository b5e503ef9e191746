"""Hostile files: references to other files and servers, enormous sizes, deep nesting, and what is no video at all."""

from __future__ import annotations

import json
import os
import random
import socket
import struct
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from PIL import Image
from rating_runs import box

from corpus import (
    ANY,
    BROKEN,
    FRAMES,
    RATED,
    UNREADABLE,
    Case,
    ffmpeg,
    grown,
    patched,
    pictures,
    stored,
    write,
    write_sound,
)

HUGE = b"\xff" * 4
REFUSED_OR_RATED = ANY | {"ClipTimeout", "ClipTooLarge", "DecoderCrashed"}
"""What matters is memory: such a file gets a row, whatever it says."""


def cases(work: Path, canary: Path, server: str) -> Iterator[Case]:
    """All hostile files.

    Args:
        work: a folder for the sources of the files.
        canary: a sound video that must not be read; files refer to it.
        server: host and port that must not be contacted; files refer to it.
    """
    work.mkdir(parents=True, exist_ok=True)
    write(work / "plain.mp4", pictures(FRAMES, 256, 256), "libx264", "yuv420p")
    raw = (work / "plain.mp4").read_bytes()
    yield from references(canary, server)
    yield from references_in_containers(raw, canary, server)
    yield from enormous(work, raw)
    yield from nested(raw)
    yield from not_videos(work)
    yield from unusual_names(raw)
    yield from special_files(raw)


def hostile(name: str, data: bytes, outcomes: frozenset[str] = BROKEN) -> Case:
    return stored(name, data, outcomes, "hostile")


def references(canary: Path, server: str) -> Iterator[Case]:
    """Text that makes players open other files and addresses, under its own suffix and as .mp4."""
    for target, address in {"file": str(canary), "web": f"http://{server}/clip.mp4"}.items():
        texts = {
            "m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{address}\n#EXT-X-ENDLIST\n",
            "key.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:4\n"
            f'#EXT-X-KEY:METHOD=AES-128,URI="{address}"\n#EXTINF:4,\nplain.ts\n#EXT-X-ENDLIST\n',
            "map.m3u8": f'#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXT-X-MAP:URI="{address}"\n#EXTINF:4,\n{address}\n',
            "master.m3u8": f"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{address}\n",
            "subfile.m3u8": f"#EXTM3U\n#EXTINF:4,\nsubfile,,start,0,end,0,,:{address}\n#EXT-X-ENDLIST\n",
            "concat.m3u8": f"#EXTM3U\n#EXTINF:4,\nconcat:{address}|{address}\n#EXT-X-ENDLIST\n",
            "ffconcat": f"ffconcat version 1.0\nfile '{address}'\n",
            "mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
            'mediaPresentationDuration="PT4S"><Period><AdaptationSet mimeType="video/mp4"><Representation id="1" '
            f'bandwidth="1"><BaseURL>{address}</BaseURL></Representation></AdaptationSet></Period></MPD>',
            "xml": '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e SYSTEM "' + address + '">]><MPD>&e;</MPD>',
            "asx": f'<asx version="3.0"><entry><ref href="{address}"/></entry></asx>',
            "ram": f"{address}\n",
            "pls": f"[playlist]\nFile1={address}\nNumberOfEntries=1\n",
            "smil": f'<smil><body><video src="{address}"/></body></smil>',
            "svg": '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="64" '
            f'height="64"><image width="64" height="64" xlink:href="{address}"/></svg>',
            "avs": f'DirectShowSource("{address}")\n',
            "lavfi": f"movie={address}\n",
            "ffmeta": f";FFMETADATA1\ntitle={address}\n",
            "ass": f"[Script Info]\nScriptType: v4.00+\n[Fonts]\nfontname: {address}\n[Events]\n"
            "Dialogue: 0,0:00:00.00,0:00:04.00,Default,,0,0,0,,Hello\n",
            "srt": f'1\n00:00:00,000 --> 00:00:04,000\n<img src="{address}"/>\n',
            "vtt": f'WEBVTT\n\n00:00.000 --> 00:04.000\n<img src="{address}"/>\n',
            "imf.xml": '<?xml version="1.0"?><CompositionPlaylist xmlns="http://www.smpte-ra.org/schemas/2067-3/2016">'
            f"<Id>urn:uuid:1</Id><ContentTitle>{address}</ContentTitle></CompositionPlaylist>",
        }
        for name, text in texts.items():
            yield hostile(f"reference/{target}_{name}.mp4", text.encode(), UNREADABLE)
            if name.endswith(("m3u8", "ffconcat", "mpd", "svg", "avs")):
                yield hostile(f"reference/{target}.{name}", text.encode(), UNREADABLE)
    host, port = server.split(":")
    description = f"v=0\no=- 0 0 IN IP4 {host}\ns=x\nc=IN IP4 {host}\nt=0 0\nm=video {port} RTP/AVP 96\n"
    yield hostile("reference/web_sdp.mp4", (description + "a=rtpmap:96 H264/90000\n").encode(), UNREADABLE)
    yield hostile("reference/rtsp.mp4", f"rtsptext\nrtsp://{server}/clip\n".encode(), UNREADABLE)
    yield hostile("reference/terminal.mp4", b"\x1b[2J\x1b[31mHello\n" * 50, UNREADABLE)


def references_in_containers(raw: bytes, canary: Path, server: str) -> Iterator[Case]:
    """Videos whose tables refer to samples in other files (ISO/IEC 14496-12, 8.7.2; QuickTime reference movies)."""
    path = (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref", b"url ")
    for target, address in {"file": f"file://{canary}", "web": f"http://{server}/clip.mp4"}.items():
        outside = grown(patched(raw, b"url ", 0, bytes(4)), path, address.encode() + b"\0")
        yield hostile(f"reference/{target}_samples.mp4", outside, REFUSED_OR_RATED)
        data = b"rdrf" + bytes(4) + b"url " + struct.pack(">I", len(address) + 1) + address.encode() + b"\0"
        for kind in (b"rmda", b"rmra", b"moov"):
            data = kind + struct.pack(">I", len(data) + 4) + data
            data = data[4:8] + data[:4] + data[8:]
        yield hostile(f"reference/{target}_movie.mov", struct.pack(">I", 8) + b"wide" + data, UNREADABLE)
        name = address.encode("utf-16-le") + b"\0\0"
        yield hostile(f"reference/{target}_asf.wmv", bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c") + name)
    alias = grown(patched(raw, b"url ", 0, b"alis", whole=True), (*path[:-1], b"alis"), bytes(140) + b"plain.mp4")
    yield hostile("reference/file_alias.mov", alias, REFUSED_OR_RATED)


def enormous(work: Path, raw: bytes) -> Iterator[Case]:
    """Small files that declare enormous pictures, or counts of entries, or expand enormously."""
    side = 65535
    scanlines = zlib.compress(bytes((30_000 // 8 + 1) * 30_000), 9)
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    yield hostile("enormous/bomb.png", png(header, scanlines), REFUSED_OR_RATED)
    yield hostile("enormous/header.png", png(struct.pack(">IIBBBBB", side, side, 16, 6, 0, 0, 0), zlib.compress(b"")))
    yield hostile("enormous/bomb_as_video.mp4", png(header, scanlines), REFUSED_OR_RATED)
    delay = b"\x21\xf9\x04\0\x0a\0\0\0"
    picture = delay + struct.pack("<BHHHHB", 0x2C, 0, 0, 1, 1, 0) + b"\x02\x02\x4c\x01\0"
    screen = struct.pack("<HH", side, side) + b"\x80\0\0" + bytes(6)
    yield hostile("enormous/screen.gif", b"GIF89a" + screen + picture * 3 + b";", REFUSED_OR_RATED)
    screen = struct.pack("<HH", 9000, 9000) + b"\x80\0\0" + bytes(6)
    yield hostile("enormous/many_frames.gif", b"GIF89a" + screen + picture * 300 + b";", REFUSED_OR_RATED)
    screen = struct.pack("<HH", 2, 2) + b"\x80\0\0" + bytes(6)
    yield hostile("enormous/very_many_frames.gif", b"GIF89a" + screen + picture * 200_000 + b";", REFUSED_OR_RATED)
    first, *more = (Image.fromarray(each) for each in pictures(3, 64, 64))
    first.save(work / "animation.webp", save_all=True, append_images=more)
    animation = (work / "animation.webp").read_bytes()
    yield hostile("enormous/canvas.webp", patched(animation, b"VP8X", 8, b"\xff" * 6), REFUSED_OR_RATED)
    yield hostile("enormous/frame.webp", patched(animation, b"ANMF", 10, b"\xff" * 6), REFUSED_OR_RATED)
    first.save(work / "photo.jpg")
    photo = (work / "photo.jpg").read_bytes()
    large_photo = patched(photo, b"\xff\xc0", 3, struct.pack(">HH", side, side))
    yield hostile("enormous/header.jpg", large_photo, REFUSED_OR_RATED)
    yield hostile("enormous/header.mjpeg", large_photo * 3, REFUSED_OR_RATED)
    for suffix in ("bmp", "tga", "tiff", "qoi", "pcx", "sgi"):
        Image.new("RGB", (64, 64)).save(work / f"p.{suffix}") if suffix in (
            "bmp",
            "tga",
            "tiff",
            "pcx",
            "sgi",
        ) else None
    bitmap = (work / "p.bmp").read_bytes()
    yield hostile("enormous/header.bmp", bitmap[:18] + struct.pack("<ii", side, side) + bitmap[26:], REFUSED_OR_RATED)
    targa = (work / "p.tga").read_bytes()
    yield hostile("enormous/header.tga", targa[:12] + b"\xff" * 4 + targa[16:], REFUSED_OR_RATED)
    sgi = (work / "p.sgi").read_bytes()
    yield hostile("enormous/header.sgi", sgi[:6] + b"\xff" * 4 + sgi[10:], REFUSED_OR_RATED)
    for form in ("420jpeg", "444p16"):
        data = f"YUV4MPEG2 W{side} H{side} F25:1 C{form}\nFRAME\n".encode() + bytes(5000)
        yield hostile(f"enormous/{form}.y4m", data, REFUSED_OR_RATED)
    yield hostile("enormous/track.mp4", patched(raw, b"avc1", 24, b"\xff\xff\xff\xff"), REFUSED_OR_RATED)
    for codec, muxer in (("ffv1", "mkv"), ("rawvideo", "avi"), ("mpeg4", "avi"), ("libvpx", "webm"), ("flv", "flv")):
        write(work / f"{codec}.{muxer}", pictures(3, 64, 64), codec, "bgr24" if codec == "rawvideo" else "yuv420p")
    matroska = (work / "ffv1.mkv").read_bytes()
    for name in ("ffv1.mkv", "libvpx.webm"):
        data = (work / name).read_bytes()
        yield hostile(f"enormous/track_{name}", wide_matroska(data), REFUSED_OR_RATED)
    for name in ("rawvideo.avi", "mpeg4.avi"):
        data = patched((work / name).read_bytes(), b"strf", 8, struct.pack("<ii", side, side))
        yield hostile(f"enormous/track_{name}", data, REFUSED_OR_RATED)
    keyframe = b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", 16383, 16383)
    ivf = b"DKIF\0\0\x20\0VP80" + struct.pack("<HHIIII", 16383, 16383, 25, 1, 3, 0)
    packet = struct.pack("<IQ", len(keyframe) + 50, 0) + keyframe + bytes(50)
    yield hostile("enormous/vp8.ivf", ivf + packet * 3, REFUSED_OR_RATED)
    for table in ("stts", "stsz", "stco", "stsc", "ctts", "stss", "elst", "stsd", "dref"):
        at = 8 if table == "stsz" else 4
        for value in (HUGE, b"\x0f\xff\xff\xff"):
            data = patched(raw, table.encode(), at, value) if table.encode() in raw else raw + table.encode()
            yield hostile(f"enormous/{table}_{value.hex()}.mp4", data, REFUSED_OR_RATED)
    for offset in (4, 8):
        data = patched((work / "mpeg4.avi").read_bytes(), b"idx1", offset - 4, HUGE)
        yield hostile(f"enormous/index_{offset}.avi", data, REFUSED_OR_RATED)
    size = bytes.fromhex("1654ae6b") + b"\x08" + b"\x7f" * 7
    yield hostile("enormous/element.mkv", matroska.replace(bytes.fromhex("1654ae6b"), size, 1), REFUSED_OR_RATED)
    expanding = zlib.compress(bytes(1 << 27), 9)
    movie = b"cmov" + struct.pack(">I4s4sI4sI", 12, b"dcom", b"zlib", len(expanding) + 12, b"cmvd", 1 << 27) + expanding
    compressed = struct.pack(">I4s", len(movie) + 12, b"moov") + struct.pack(">I", len(movie) + 4) + movie
    yield hostile("enormous/compressed_index.mov", b"\0\0\0\x14ftypqt  \0\0\0\0qt  " + compressed, REFUSED_OR_RATED)
    yield Case("enormous/sparse.mp4", partial(write_sparse, size=1 << 31), UNREADABLE, group="hostile")
    wide = partial(write_pictures, count=2, width=16400, height=32, codec="mjpeg", pixel_format="yuvj420p")
    yield Case("enormous/wide.avi", wide, UNREADABLE, group="hostile")
    large = partial(write_pictures, count=2, width=9000, height=9000, codec="ffv1", pixel_format="yuv420p")
    yield Case("enormous/allowed.mkv", large, frozenset({RATED}), 2, "hostile")


def wide_matroska(raw: bytes) -> bytes:
    """Declare a width and a height of 65535 in a Matroska file whose picture is 64x64."""
    return raw.replace(b"\xb0\x81\x40", b"\xb0\x81\x7f").replace(b"\xb0\x82\x00\x40", b"\xb0\x82\xff\xff")


def png(header: bytes, scanlines: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", scanlines) + chunk(b"IEND", b"")


def write_sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def write_pictures(path: Path, *, count: int, width: int, height: int, codec: str, pixel_format: str) -> None:
    write(path, pictures(count, width, height), codec, pixel_format)


def nested(raw: bytes) -> Iterator[Case]:
    """Boxes in boxes, ten thousand deep."""
    for kind in (b"moov", b"trak", b"udta", b"meta"):
        data = b""
        for _ in range(10_000):
            data = struct.pack(">I4s", len(data) + 8, kind) + data
        yield hostile(f"nested/{kind.decode()}.mp4", raw[:32] + data, UNREADABLE | {"ClipTruncated", "DecoderCrashed"})
        yield hostile(f"nested/{kind.decode()}_behind.mp4", raw + data, REFUSED_OR_RATED)
    tags = b""
    for _ in range(3_000):
        tags = b"\x67\xc8" + b"\x10" + len(tags).to_bytes(3, "big") + tags
    segment = b"\x18\x53\x80\x67\x01\xff\xff\xff\xff\xff\xff\xff"
    head = bytes.fromhex("1a45dfa3") + b"\x8b" + b"\x42\x82\x88matroska"
    body = b"\x12\x54\xc3\x67" + b"\x10" + len(tags).to_bytes(3, "big") + tags
    yield hostile("nested/tags.mkv", head + segment + body, BROKEN | {"DecoderCrashed"})
    lists = b""
    for _ in range(5_000):
        lists = b"LIST" + struct.pack("<I", len(lists) + 4) + b"hdrl" + lists
    yield hostile("nested/lists.avi", b"RIFF" + struct.pack("<I", len(lists) + 4) + b"AVI " + lists)


def not_videos(work: Path) -> Iterator[Case]:
    """What is no video, is encrypted, or contains no picture."""
    rng = random.Random(0)
    for suffix in ("mp4", "mkv", "gif"):
        for size in (0, 1, 8, 4096, 1 << 20):
            yield hostile(f"no_video/{size}_zeros.{suffix}", bytes(size), UNREADABLE)
        yield hostile(f"no_video/noise.{suffix}", rng.randbytes(1 << 20), UNREADABLE)
    texts = {
        "text": "This is not a video.\n" * 100,
        "page": "<!DOCTYPE html><html><body><h1>404 Not Found</h1></body></html>",
        "json": json.dumps({"error": "access absent"}),
        "pointer": "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "script": "#!/bin/sh\ntouch started\n",
    }
    for name, text in texts.items():
        yield hostile(f"no_video/{name}.mp4", text.encode(), UNREADABLE)
    for name, magic in {"pdf": b"%PDF-1.7\n", "elf": b"\x7fELF", "gzip": b"\x1f\x8b\x08"}.items():
        yield hostile(f"no_video/{name}.mp4", magic + rng.randbytes(5000), UNREADABLE)
    with zipfile.ZipFile(work / "archive.zip", "w") as archive:
        Image.new("RGB", (64, 64)).save(work / "picture.jpg")
        archive.write(work / "picture.jpg", "picture.jpg")
    yield hostile("no_video/zip_with_a_picture.mp4", (work / "archive.zip").read_bytes(), UNREADABLE)
    for codec, name in {"aac": "sound.mp4", "libopus": "sound.mkv", "pcm_s16le": "wave.avi"}.items():
        yield Case(f"no_video/{name}", partial(write_sound, codec=codec), UNREADABLE, group="hostile")
    Image.new("RGB", (64, 64)).save(work / "cover.jpg")
    write_sound(work / "sound.m4a")
    yield Case("no_video/sound_with_cover.m4a", partial(write_covered_sound, work), UNREADABLE, group="hostile")
    for scheme in ("cenc-aes-ctr",):
        yield Case(f"no_video/encrypted_{scheme}.mp4", partial(encrypt, work / "plain.mp4", scheme), group="hostile")


def write_covered_sound(work: Path, path: Path) -> None:
    inputs = ("-i", work / "sound.m4a", "-i", work / "cover.jpg", "-map", "0", "-map", "1")
    ffmpeg(*inputs, "-c", "copy", "-disposition:v:0", "attached_pic", path)


def encrypt(source: Path, scheme: str, path: Path) -> None:
    keys = (
        "-encryption_key",
        "76a6c65c5ea762046bd749a2e632ccbb",
        "-encryption_kid",
        "a7e61c373e219033c21091fa607bf3b8",
    )
    ffmpeg("-i", source, "-c", "copy", "-encryption_scheme", scheme, *keys, path)


def unusual_names(raw: bytes) -> Iterator[Case]:
    """Sound videos whose names look like options, addresses, patterns or commands."""
    names = [
        *("说话的头 视频", "متحدث", "говорящая голова", "話す頭", "หัวพูด", "דובר", "cafe\u0301", "👩🏽\u200d🚀"),
        *("two  spaces ", "new\nline", "tab\tback\\slash", "quote'\"`", "$(touch x);&|", "-rf", "--help", "a%03d"),
        *("[glob]*?", "file:clip", "http:__x", "concat:a|b", "pipe:0", "\u202emp4.exe", "\x1b[31mred", "a" * 250),
        *("subfile,,start,0,end,0,,:a", "crypto:a", "data:video_mp4;base64,", "cache:a", "lavfi:testsrc", "%d", "-i"),
        *("async:a", "tcp:127.0.0.1:1", "=1+1", "@SUM(A1)", "<b>name", "&amp;", "CON", "{a,b}", "~root"),
    ]
    for number, name in enumerate(names):
        yield hostile(f"named/{name}.mp4", raw + box(bytes([number])), frozenset({RATED}))
    yield hostile(os.fsdecode(b"named/\xff\xfe\x80.mp4"), raw + box(b"!"), frozenset({RATED}))


def special_files(raw: bytes) -> Iterator[Case]:
    """Links, pipes, devices and folders, in place of files."""

    def special(name: str, make: object, outcomes: frozenset[str] = UNREADABLE) -> Case:
        assert callable(make)
        return Case(f"no_file/{name}", make, outcomes, group="hostile")

    rated = frozenset({RATED})
    yield special("loop.mp4", lambda path: path.symlink_to(path.name))
    yield special("there.mp4", lambda path: path.symlink_to("back.mp4"))
    yield special("back.mp4", lambda path: path.symlink_to("there.mp4"))
    yield special("dangling.mp4", lambda path: path.symlink_to("gone.mp4"), frozenset({"ClipNotFound"}))
    yield special("pipe.mp4", os.mkfifo)
    yield special("socket.mp4", listen)
    for device in ("zero", "full", "tty", "random"):
        yield special(f"{device}.mp4", partial(Path.symlink_to, target=f"/dev/{device}"))
    yield special("memory.mp4", lambda path: path.symlink_to("/proc/self/mem"))
    yield special("passwords.mp4", lambda path: path.symlink_to("/etc/passwd"))
    yield special("folder.mp4/inside.mp4", lambda path: path.write_bytes(raw + box(b"in")), rated)

    def in_looping_folder(path: Path) -> None:
        path.write_bytes(raw + box(b"out"))
        (path.parent / "again").symlink_to("..")

    def forbidden(path: Path) -> None:
        path.write_bytes(raw + box(b"no"))
        path.chmod(0)

    yield special("loop/inside.mp4", in_looping_folder, rated)
    # root may read everything
    yield special("forbidden.mp4", forbidden, rated if os.geteuid() == 0 else UNREADABLE)


def listen(path: Path) -> None:
    """Make a socket, from inside its folder because socket paths must be short."""
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)
