"""Damaged files: clips in many containers that are cut off, overwritten, or contradict themselves."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from corpus import ANY, BROKEN, BROKEN_OR_RATED, FRAMES, Case, ffmpeg, patched, pictures, stored, write

CONTAINERS: dict[str, tuple[str, str, dict[str, str]]] = {
    "h264.mp4": ("libx264", "yuv420p", {}),
    "faststart.mp4": ("libx264", "yuv420p", {"movflags": "faststart"}),
    "fragmented.mp4": ("libx264", "yuv420p", {"movflags": "frag_keyframe+empty_moov"}),
    "h264.mov": ("libx264", "yuv420p", {}),
    "h264.mkv": ("libx264", "yuv420p", {}),
    "h264.ts": ("libx264", "yuv420p", {}),
    "hevc.mp4": ("libx265", "yuv420p", {}),
    "vp9.webm": ("libvpx-vp9", "yuv420p", {}),
    "mpeg4.avi": ("mpeg4", "yuv420p", {}),
    "animation.gif": ("gif", "rgb8", {}),
}


OTHER_FORMATS = {
    "mpeg2.ts": "-c:v mpeg2video",
    "mpeg2.mpg": "-c:v mpeg2video -f mpeg",
    "mpeg1.mpg": "-c:v mpeg1video -f mpeg",
    "theora.ogv": "-c:v libtheora",
    "flv1.flv": "-c:v flv",
    "h264.flv": "-c:v libx264 -pix_fmt yuv420p",
    "wmv2.wmv": "-c:v wmv2",
    "av1.mp4": "-c:v libsvtav1 -preset 12",
    "av1.webm": "-c:v libsvtav1 -preset 12",
    "vp8.webm": "-c:v libvpx -cpu-used 8",
    "vp9.mp4": "-c:v libvpx-vp9 -cpu-used 8 -deadline realtime",
    "prores.mov": "-c:v prores_ks",
    "mjpeg.avi": "-c:v mjpeg -pix_fmt yuvj420p",
    "mjpeg.mov": "-c:v mjpeg -pix_fmt yuvj420p",
    "ffv1.mkv": "-c:v ffv1 -level 3 -slicecrc 1",
    "huffyuv.avi": "-c:v huffyuv",
    "qtrle.mov": "-c:v qtrle",
    "mpeg4.mp4": "-c:v mpeg4 -bf 2",
    "hevc.ts": "-c:v libx265 -x265-params log-level=none -pix_fmt yuv420p",
    "hevc.mkv": "-c:v libx265 -x265-params log-level=none -pix_fmt yuv420p",
    "h264_intra.mp4": "-c:v libx264 -g 1 -pix_fmt yuv420p",
    "frag_keyframe.mp4": "-c:v libx264 -g 12 -pix_fmt yuv420p -movflags frag_keyframe",
    "webp.webp": "-c:v libwebp_anim",
    "apng.apng": "-c:v apng",
}
"""More codecs and containers, with ffmpeg's options."""


def cases(work: Path, seed: int = 0) -> Iterator[Case]:
    """All damaged files. `work` is a folder for the files before they are damaged."""
    sources = write_sources(work)
    rng = random.Random(seed)
    yield from cut_short(sources)
    yield from flipped_bits(sources, rng)
    yield from overwritten(sources, rng)
    yield from broken_headers(sources)
    yield from wrong_fields(sources)
    yield from damaged_in_other_formats(work, rng)


def write_sources(folder: Path) -> dict[str, bytes]:
    """Write the same pictures in each container; return the bytes of the files by name."""
    folder.mkdir(parents=True, exist_ok=True)
    frames = pictures(FRAMES, 256, 256)
    for name, (codec, pixel_format, muxer) in CONTAINERS.items():
        write(folder / name, frames, codec, pixel_format, **muxer)
    return {name: (folder / name).read_bytes() for name in CONTAINERS}


def damaged_in_other_formats(folder: Path, rng: random.Random) -> Iterator[Case]:
    """Cut, overwrite and change other formats. Many of them declare no length, and decode what is left."""
    write(folder / "lossless.mkv", pictures(FRAMES, 160, 160), "ffv1", "yuv444p")
    for name, options in OTHER_FORMATS.items():
        ffmpeg("-i", folder / "lossless.mkv", *options.split(), folder / f"other_{name}")
        raw = (folder / f"other_{name}").read_bytes()
        for share in (0.3, 0.6, 0.9):
            yield stored(f"other/cut_{share}_{name}", raw[: int(len(raw) * share)], ANY)
        length = len(raw) // 12
        for share in (0.3, 0.7):
            start = int(len(raw) * share)
            for filling, data in (("zeros", bytes(length)), ("noise", rng.randbytes(length)), ("left_out", b"")):
                changed = raw[:start] + data + raw[start + length :]
                yield stored(f"other/{filling}_{share}_{name}", changed, ANY)


def cut_short(sources: dict[str, bytes]) -> Iterator[Case]:
    for name, raw in sources.items():
        for part in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98):
            yield stored(f"cut/{part:.2f}_{name}", raw[: int(len(raw) * part)])
        # Half of the last unit of the file, whatever that is, and its last byte.
        yield stored(f"cut/half_packet_{name}", raw[: -len(raw) // 200 or -1])
        yield stored(f"cut/last_byte_{name}", raw[:-1])


def flipped_bits(sources: dict[str, bytes], rng: random.Random) -> Iterator[Case]:
    """Flip single and several bits at the start, in the index of an MP4, in the pictures and at the end.

    The start and the index contain times and edit lists, which can hide frames; a GIF does not declare its frames.
    """
    for name, raw in sources.items():
        index = raw.find(b"moov")
        places = {"start": (0, 512), "pictures": (len(raw) // 3, len(raw) // 2), "end": (len(raw) - 512, len(raw))}
        if index > 0:
            places["index"] = (index, min(index + 1200, len(raw)))
        for place, (begin, end) in places.items():
            for bits in (1, 4, 64):
                changed = bytearray(raw)
                for _ in range(bits):
                    changed[rng.randrange(begin, end)] ^= 1 << rng.randrange(8)
                hides_frames = place in ("start", "index") or name.endswith(".gif")
                yield stored(f"flipped/{place}_{bits}_{name}", bytes(changed), ANY if hides_frames else BROKEN_OR_RATED)


def overwritten(sources: dict[str, bytes], rng: random.Random) -> Iterator[Case]:
    """Overwrite or remove a twelfth of the picture data; some codecs decode anything (see docs/decoding.md)."""
    undetected = {"vp9.webm": BROKEN_OR_RATED, "hevc.mp4": BROKEN_OR_RATED, "animation.gif": ANY}
    for name, raw in sources.items():
        outcomes = undetected.get(name, BROKEN)
        pictured = max(raw.find(b"mdat"), raw.find(b"movi"), 0)
        for place in (0.1, 0.5, 0.8):
            start = pictured + int((len(raw) - pictured) * place)
            length = (len(raw) - pictured) // 12
            for filling, data in (("zeros", bytes(length)), ("noise", rng.randbytes(length))):
                changed = raw[:start] + data + raw[start + length :]
                yield stored(f"overwritten/{filling}_{place}_{name}", changed, outcomes)
            yield stored(f"overwritten/left_out_{place}_{name}", raw[:start] + raw[start + length :], outcomes)


def broken_headers(sources: dict[str, bytes]) -> Iterator[Case]:
    for name, raw in sources.items():
        outcomes = BROKEN_OR_RATED if name.endswith(".ts") else BROKEN  # MPEG-TS repeats its header
        yield stored(f"header/zeros_{name}", bytes(64) + raw[64:], outcomes)
        yield stored(f"header/none_{name}", raw[64:], outcomes)
        other = sources["h264.mkv" if name != "h264.mkv" else "mpeg4.avi"]
        yield stored(f"header/other_{name}", other[:64] + raw[64:], outcomes)


def wrong_fields(sources: dict[str, bytes]) -> Iterator[Case]:
    """Write an impossible size, count, time or dimension over one field (ISO/IEC 14496-12; AVI; GIF89a)."""
    most, large = b"\xff" * 4, b"\x7f\xff\xff\xff"
    # {box: {offset of the field after the box's name: values}}; -4 is the length of the box.
    fields: dict[str, dict[int, tuple[bytes, ...]]] = {
        "moov": {-4: (most, large, b"\0\0\0\x09")},
        "mdat": {-4: (most, large, b"\0\0\0\x10")},
        "trak": {-4: (most, bytes(4))},
        "stbl": {-4: (most, bytes(4))},
        "mvhd": {12: (bytes(4), most), 16: (most, bytes(4))},
        "tkhd": {20: (most, bytes(4)), 76: (most,)},
        "mdhd": {12: (bytes(4), b"\0\0\0\1", most), 16: (most, bytes(4))},
        "stsz": {4: (large, b"\0\0\0\1"), 8: (most, b"\0\0\x10\0", b"\0\0\0\1", bytes(4)), 12: (most, bytes(4))},
        "stts": {4: (most, bytes(4)), 8: (most, b"\0\0\0\1"), 12: (most, large, bytes(4))},
        "stsc": {4: (most, bytes(4)), 12: (most, bytes(4))},
        "stco": {4: (most, bytes(4)), 8: (most, bytes(4))},
        "avc1": {24: (most, bytes(4), b"\x40\0\x40\0"), -4: (most,)},
        "avcC": {0: (most,), 4: (b"\xff",), -4: (most, b"\0\0\0\x08")},
    }
    raw = sources["faststart.mp4"]
    for name, places in fields.items():
        for offset, values in places.items():
            for value in values:
                changed = patched(raw, name.encode(), offset, value)
                hides_frames = (name, offset) in (("mdhd", 12), ("stts", 12))  # times, to which an edit list refers
                outcomes = ANY if hides_frames else BROKEN_OR_RATED
                yield stored(f"field/{name}{offset:+d}_{value.hex()}.mp4", changed, outcomes)
    for name in (
        "moov",
        "trak",
        "mdia",
        "minf",
        "stbl",
        "stsd",
        "avc1",
        "avcC",
        "stts",
        "stsz",
        "stco",
        "stsc",
        "vide",
    ):
        yield stored(f"field/{name}_renamed.mp4", patched(raw, name.encode(), 0, b"zzzz", whole=True), BROKEN_OR_RATED)
    gif, avi = sources["animation.gif"], sources["mpeg4.avi"]
    yield stored("field/screen.gif", gif[:6] + b"\xff\xff\xff\xff" + gif[10:], BROKEN_OR_RATED)
    yield stored("field/picture.gif", patched(gif, b"\x2c\0\0\0\0", 0, most), BROKEN_OR_RATED)
    for offset in (8, 24, 40):
        yield stored(
            f"field/main_header{offset}.avi", patched(avi, b"avih", offset, b"\xff\xff\xff\x7f"), BROKEN_OR_RATED
        )
    for offset in (24, 28, 36):
        for value in (bytes(4), b"\xff\xff\xff\x7f"):
            yield stored(
                f"field/stream_header{offset}_{value.hex()}.avi", patched(avi, b"strh", offset, value), BROKEN_OR_RATED
            )
    duration = sources["h264.mkv"].find(b"\x44\x89\x88")
    for value in (b"\x7f\xef" + b"\xff" * 6, b"\x7f\xf8" + bytes(6), b"\xff\xf0" + bytes(6)):
        changed = patched(sources["h264.mkv"], b"\x44\x89\x88", 0, value)
        yield stored(f"field/duration_{value[:2].hex()}.mkv", changed if duration > 0 else b"", BROKEN_OR_RATED)
