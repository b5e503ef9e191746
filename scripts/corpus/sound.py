"""Sound files: whatever players show completely, in many codecs, containers and ways of writing them.

Sizes are small. A case is a line of ffmpeg options where that is enough; most start from one lossless source.
"""

from __future__ import annotations

import shlex
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from PIL import Image
from rating_runs import box

from corpus import FRAMES, RATED, SAMPLES, Case, ffmpeg, grown, patched, pictures

SIZE = 160
HEVC = "-c:v libx265 -x265-params log-level=none"
VP9 = "-c:v libvpx-vp9 -cpu-used 8 -deadline realtime"
AV1 = "-c:v libsvtav1 -preset 12"

CODECS = {
    "h264.mp4": "-c:v libx264 -pix_fmt yuv420p",
    "h264_baseline.mp4": "-c:v libx264 -profile:v baseline -pix_fmt yuv420p",
    "h264_422.mp4": "-c:v libx264 -pix_fmt yuv422p",
    "h264_444.mp4": "-c:v libx264 -pix_fmt yuv444p",
    "h264_10bit.mp4": "-c:v libx264 -pix_fmt yuv420p10le",
    "h264_422_10bit.mov": "-c:v libx264 -pix_fmt yuv422p10le",
    "h264_gray.mp4": "-c:v libx264 -pix_fmt gray",
    "h264_rgb.mkv": "-c:v libx264rgb -pix_fmt rgb24",
    "h264_lossless.mkv": "-c:v libx264 -qp 0 -pix_fmt yuv444p",
    "h264_intra.mov": "-c:v libx264 -g 1 -pix_fmt yuv420p",
    "h264_slices.mp4": "-c:v libx264 -slices 4 -pix_fmt yuv420p",
    "h264_intra_refresh.mp4": "-c:v libx264 -x264-params intra-refresh=1:keyint=12 -pix_fmt yuv420p",
    "h264_open_group.mp4": "-c:v libx264 -x264-params open-gop=1:keyint=12:bframes=3 -pix_fmt yuv420p",
    "h264_pyramid.mp4": "-c:v libx264 -bf 8 -x264-params b-pyramid=normal:ref=8 -pix_fmt yuv420p",
    "openh264.mp4": "-c:v libopenh264 -b:v 300k -pix_fmt yuv420p",
    "hevc.mp4": f"{HEVC} -tag:v hvc1 -pix_fmt yuv420p",
    "hevc_hev1.mp4": f"{HEVC} -tag:v hev1 -pix_fmt yuv420p",
    "hevc_10bit.mp4": f"{HEVC} -pix_fmt yuv420p10le",
    "hevc_12bit.mkv": f"{HEVC} -pix_fmt yuv420p12le",
    "hevc_422_10bit.mkv": f"{HEVC} -pix_fmt yuv422p10le",
    "hevc_444.mp4": f"{HEVC} -pix_fmt yuv444p",
    "hevc_gray.mkv": f"{HEVC} -pix_fmt gray",
    "hevc_kvazaar.mkv": "-c:v libkvazaar -pix_fmt yuv420p",
    "vvc.mp4": "-c:v libvvenc -preset faster -pix_fmt yuv420p10le -frames:v 8",
    "vp8.webm": "-c:v libvpx -cpu-used 8 -pix_fmt yuv420p",
    "vp8_hidden_frames.webm": "-c:v libvpx -auto-alt-ref 1 -lag-in-frames 16 -b:v 200k",
    "vp9.webm": f"{VP9} -pix_fmt yuv420p",
    "vp9.mp4": f"{VP9} -pix_fmt yuv420p",
    "vp9_422.webm": f"{VP9} -pix_fmt yuv422p",
    "vp9_444.webm": f"{VP9} -pix_fmt yuv444p",
    "vp9_10bit.webm": f"{VP9} -pix_fmt yuv420p10le",
    "vp9_12bit.mkv": f"{VP9} -pix_fmt yuv420p12le",
    "vp9_hidden_frames.webm": "-c:v libvpx-vp9 -cpu-used 4 -auto-alt-ref 1 -lag-in-frames 20 -b:v 200k",
    "vp9_hidden_frames_in_packets.mkv": "-c:v libvpx-vp9 -cpu-used 4 -auto-alt-ref 1 -lag-in-frames 20 -b:v 200k "
    "-bsf:v vp9_superframe_split",
    "vp9_rgb.webm": f"{VP9} -pix_fmt gbrp",
    "av1.mp4": f"{AV1} -pix_fmt yuv420p",
    "av1.webm": f"{AV1} -pix_fmt yuv420p",
    "av1_10bit.mp4": f"{AV1} -pix_fmt yuv420p10le",
    "av1_aom.mkv": "-c:v libaom-av1 -cpu-used 8 -pix_fmt yuv420p -frames:v 12",
    "av1_aom_444.mkv": "-c:v libaom-av1 -cpu-used 8 -pix_fmt yuv444p -frames:v 12",
    "av1_aom_12bit.mp4": "-c:v libaom-av1 -cpu-used 8 -pix_fmt yuv420p12le -frames:v 8",
    "av1_gray.mp4": "-c:v libaom-av1 -cpu-used 8 -pix_fmt gray -frames:v 8",
    "mpeg1.mpg": "-c:v mpeg1video -f mpeg",
    "mpeg1_raw.m1v": "-c:v mpeg1video -f mpeg1video",
    "mpeg2.mpg": "-c:v mpeg2video -f vob",
    "mpeg2.ts": "-c:v mpeg2video",
    "mpeg2_422.mkv": "-c:v mpeg2video -pix_fmt yuv422p",
    "mpeg4.mp4": "-c:v mpeg4 -bf 2",
    "mpeg4_packed.avi": "-c:v libxvid -bf 2",
    "mpeg4_quarter_pixel.mkv": "-c:v mpeg4 -flags +qpel+mv4",
    "msmpeg4v2.avi": "-c:v msmpeg4v2",
    "msmpeg4v3.avi": "-c:v msmpeg4",
    "wmv1.wmv": "-c:v wmv1",
    "wmv2.wmv": "-c:v wmv2",
    "flv1.flv": "-c:v flv",
    "h263.3gp": "-c:v h263 -s 176x144",
    "h263p.avi": "-c:v h263p",
    "h261.mkv": "-c:v h261 -s 176x144",
    "mjpeg.avi": "-c:v mjpeg -pix_fmt yuvj420p",
    "mjpeg_422.mov": "-c:v mjpeg -pix_fmt yuvj422p",
    "mjpeg_444.mp4": "-c:v mjpeg -pix_fmt yuvj444p",
    "mjpeg_raw.mjpeg": "-c:v mjpeg -pix_fmt yuvj420p",
    "ljpeg.avi": "-c:v ljpeg -strict -1 -pix_fmt yuvj420p",
    "jpeg2000.mov": "-c:v jpeg2000 -frames:v 6",
    "prores.mov": "-c:v prores_ks -profile:v standard",
    "prores_4444.mov": "-c:v prores_ks -profile:v 4444 -pix_fmt yuv444p10le",
    "prores_xq.mov": "-c:v prores_ks -profile:v 4444xq -pix_fmt yuv444p12le",
    "dnxhd.mov": "-c:v dnxhd -profile:v dnxhr_sq -s 256x128 -pix_fmt yuv422p",
    "dnxhr_444.mxf": "-c:v dnxhd -profile:v dnxhr_444 -s 256x128 -pix_fmt yuv444p10le",
    "cineform.mov": "-c:v cfhd -pix_fmt yuv422p10le",
    "ffv1.mkv": "-c:v ffv1 -level 3 -pix_fmt yuv420p",
    "ffv1_16bit.mkv": "-c:v ffv1 -level 3 -pix_fmt gray16le",
    "ffv1_rgb.mkv": "-c:v ffv1 -level 3 -pix_fmt bgr0",
    "ffv1_slices.avi": "-c:v ffv1 -level 3 -slices 4 -slicecrc 1",
    "huffyuv.avi": "-c:v huffyuv -pix_fmt yuv422p",
    "ffvhuff.mkv": "-c:v ffvhuff -pix_fmt yuv420p",
    "utvideo.avi": "-c:v utvideo -pix_fmt yuv420p",
    "magicyuv.avi": "-c:v magicyuv -pix_fmt yuv444p",
    "qtrle.mov": "-c:v qtrle -pix_fmt rgb24",
    "svq1.mov": "-c:v svq1 -pix_fmt yuv410p",
    "cinepak.avi": "-c:v cinepak -s 64x64 -frames:v 6",
    "zlib.avi": "-c:v zlib",
    "zmbv.avi": "-c:v zmbv",
    "flashsv.flv": "-c:v flashsv",
    "snow.avi": "-c:v snow -strict -2",
    "dirac_vc2.mkv": "-c:v vc2 -pix_fmt yuv422p10le",
    "rv10.rm": "-c:v rv10",
    "rv20.rm": "-c:v rv20",
    "theora.ogv": "-c:v libtheora -q:v 6",
    "theora_444.ogg": "-c:v libtheora -q:v 6 -pix_fmt yuv444p",
    "dv.dv": "-c:v dvvideo -s 720x576 -pix_fmt yuv420p -r 25",
    "dv.avi": "-c:v dvvideo -s 720x576 -pix_fmt yuv420p -r 25",
    "dv_ntsc.mov": "-c:v dvvideo -s 720x480 -pix_fmt yuv411p -r 30000/1001",
    "v210.mov": "-c:v v210 -pix_fmt yuv422p10le",
    "rawvideo.avi": "-c:v rawvideo -pix_fmt bgr24",
    "rawvideo.mov": "-c:v rawvideo -pix_fmt yuyv422",
    "rawvideo.nut": "-c:v rawvideo -pix_fmt yuv420p",
    "yuv4mpeg.y4m": "-pix_fmt yuv420p",
    "yuv4mpeg_444_10bit.y4m": "-pix_fmt yuv444p10le -strict -1",
    "gif.gif": "-vf split[a][b];[a]palettegen[p];[b][p]paletteuse",
    "apng.apng": "-c:v apng -plays 0",
    "webp.webp": "-c:v libwebp_anim -loop 0",
    "webp_lossless.webp": "-c:v libwebp_anim -lossless 1",
    "png.mov": "-c:v png -pix_fmt rgb24",
    "png_48bit.mkv": "-c:v png -pix_fmt rgb48be -frames:v 6",
    "bmp.avi": "-c:v bmp -frames:v 6",
    "hap.mov": "-c:v hap",
    "roq.roq": "-c:v roqvideo -s 256x128 -r 30 -quake3_compat 0",
    "smc.mov": "-c:v smc -frames:v 6",
    "rpza.mov": "-c:v rpza -frames:v 6",
}
"""Each codec with its pixel formats, by file name."""

MUXERS = {
    "video.mp4": "",
    "video.mov": "",
    "video.m4v": "",
    "video.3gp": "",
    "video.3g2": "",
    "video.f4v": "",
    "video.ismv": "",
    "video.mkv": "",
    "video.avi": "-bsf:v h264_mp4toannexb",
    "video.flv": "",
    "video.ts": "",
    "video.m2ts": "-mpegts_m2ts_mode 1",
    "video.nut": "",
    "video.asf": "",
    "video.wtv": "-c:v mpeg2video",
    "video.mxf": "",
    "video.gxf": "-c:v mpeg2video -s 720x576 -flags +ildct+ilme",
    "video.h264": "",
    "video.no_suffix": "-f mp4",
    "live.mkv": "-live 1",
    "cues_first.mkv": "-cues_to_front 1",
    "clusters.mkv": "-cluster_time_limit 100",
    "headers_stripped.mkv": "-reserve_index_space 5000",
    "checksums_off.mkv": "-write_crc32 0",
    "faststart.mp4": "-movflags faststart",
    "no_edit_list.mp4": "-use_editlist 0",
    "rtp_hint.mp4": "-movflags rtphint",
    "tables_behind.mov": "-movflags disable_chpl",
    "timecode.mov": "-timecode 01:00:00:00",
    "brand_isml.mp4": "-movflags isml+frag_keyframe -f ismv",
    "odml.avi": "-write_channel_mask 0 -reserve_index_space 10000",
    "bitrate_padding.ts": "-muxrate 2000k",
    "many_tables.ts": "-pat_period 0.02 -sdt_period 0.02",
    "resend_headers.ts": "-mpegts_flags resend_headers",
    "large_pes.ts": "-pes_payload_size 65000",
    "no_index.flv": "-flvflags no_duration_filesize",
}
"""H.264 (MPEG-2 where said) in containers and with their options."""

FRAGMENTS = [
    "frag_keyframe",
    "frag_every_frame",
    "empty_moov",
    "frag_keyframe+empty_moov",
    "frag_keyframe+empty_moov+default_base_moof",
    "frag_keyframe+delay_moov",
    "frag_every_frame+empty_moov+default_base_moof",
    "frag_keyframe+separate_moof",
    "frag_keyframe+empty_moov+separate_moof",
    "frag_keyframe+empty_moov+dash",
    "cmaf",
    "cmaf+delay_moov+skip_sidx",
    "frag_keyframe+empty_moov+omit_tfhd_offset",
    "frag_keyframe+skip_trailer",
    "frag_keyframe+negative_cts_offsets",
    "frag_keyframe+empty_moov+frag_discont",
    "frag_keyframe+hybrid_fragmented",
    "hybrid_fragmented",
]

SIZES = [(2, 2), (17, 13), (177, 133), (1, 301), (15, 600), (600, 16), (720, 1280)]


def cases(work: Path) -> Iterator[Case]:
    """All sound files. `work` is a folder for the sources of the files."""
    work.mkdir(parents=True, exist_ok=True)
    source = make_sources(work)
    for name, options in CODECS.items():
        yield transcoded(f"codec/{name}", source, options)
    for name, options in MUXERS.items():
        codec = "" if "-c:v" in options else "-c copy"
        yield transcoded(f"container/{name}", work / "plain.mp4", f"{codec} {options}")
    for flags in FRAGMENTS:
        yield transcoded(f"fragmented/{flags}.mp4", work / "plain.mp4", f"-c copy -movflags {flags}")
        if "every" not in flags:
            with_audio = work / "with_audio.mp4"
            yield transcoded(f"fragmented/audio+{flags}.mp4", with_audio, f"-c copy -movflags {flags}")
    for width, height in SIZES:
        yield transcoded(f"size/{width}x{height}.mp4", source, f"-s {width}x{height} -c:v libx264 -pix_fmt yuv444p")
        even = f"-s {width + width % 2}x{height + height % 2} -pix_fmt yuv420p -c:v mpeg4"
        yield transcoded(f"size/{width}x{height}.mkv", source, even)
    for frames in (1, 2, 3):
        yield transcoded(f"length/{frames}_frames.mp4", source, f"-frames:v {frames} -c:v libx264 -pix_fmt yuv420p")
        yield transcoded(f"length/{frames}_frames.gif", source, f"-frames:v {frames}")
    yield from copied_parts(work)
    yield from transport_streams(work)
    yield from joined_and_padded(work)
    yield from presentation_times(work)
    yield from orientations_and_shapes(work)
    yield from alpha(source)
    yield from colours(source)
    yield from interlaced(source)
    yield from changing_resolution(work)
    yield from several_streams(work)


def make_sources(work: Path) -> Path:
    """Write the lossless source, and what is copied without encoding: H.264 with open and closed groups, HEVC, VP9."""
    source, plain = work / "source.mkv", work / "plain.mp4"
    sample = SAMPLES / "astronaut_clean.mp4"
    rate = ("-frames:v", FRAMES, "-vf", f"scale={SIZE}:{SIZE}")
    ffmpeg("-i", sample, *map(str, rate), "-c:v", "ffv1", "-pix_fmt", "yuv444p", "-an", source)
    encode(source, plain, "-c:v libx264 -g 12 -pix_fmt yuv420p")
    ffmpeg("-f", "lavfi", "-i", f"sine=d={FRAMES / 25}", "-c:a", "aac", work / "tone.m4a")
    ffmpeg("-i", plain, "-i", work / "tone.m4a", "-c", "copy", work / "with_audio.mp4")
    encode(source, work / "open264.mkv", "-c:v libx264 -x264-params open-gop=1:keyint=10:min-keyint=10:scenecut=0")
    encode(source, work / "open265.mkv", f"{HEVC}:keyint=10:min-keyint=10:open-gop=1:bframes=3 -pix_fmt yuv420p")
    encode(source, work / "closed265.mp4", f"{HEVC}:keyint=10:min-keyint=10:open-gop=0 -pix_fmt yuv420p")
    encode(source, work / "vp9.webm", f"{VP9} -g 10")
    encode(source, work / "mpeg2.mpg", "-c:v mpeg2video -bf 2 -g 10 -f mpeg")
    encode(source, work / "mpeg4.mp4", "-c:v mpeg4 -bf 2 -g 10")
    return source


def encode(source: Path, target: Path, options: str, before: str = "") -> None:
    """Run ffmpeg from a file to a file, with options after the input, and `before` it."""
    ffmpeg(*shlex.split(before), "-i", source, *shlex.split(options), "-bitexact", target)


def sound(name: str, make: Callable[[Path], object]) -> Case:
    return Case(name, make, frozenset({RATED}), group="sound")


def transcoded(name: str, source: Path, options: str, before: str = "") -> Case:
    return sound(name, lambda path: encode(source, path, options, before))


def copied_parts(work: Path) -> Iterator[Case]:
    """Cuts without encoding: they begin within a group, with leading pictures or with an edit list."""
    for source in ("plain.mp4", "open264.mkv", "open265.mkv", "closed265.mp4", "vp9.webm", "mpeg4.mp4"):
        # MP4 and Matroska store headers once; without them, MPEG-TS cannot begin at an open group, or in MPEG-4.
        suffixes = ["mkv"] if source == "vp9.webm" else ["mp4", "mkv"]
        if source in ("plain.mp4", "open265.mkv", "closed265.mp4"):
            suffixes.append("ts")
        for suffix in suffixes:
            for start in (0.3, 0.5, 0.77):
                name = f"cut/{Path(source).stem}_{start}.{suffix}"
                yield transcoded(name, work / source, "-c copy", f"-ss {start}")
        yield transcoded(f"cut/{Path(source).stem}_end.mkv", work / source, "-c copy -t 0.6")
    for start in (0.3, 0.77):
        yield transcoded(f"cut/mpeg2_{start}.mpg", work / "mpeg2.mpg", "-c copy -f mpeg", f"-ss {start}")
        yield transcoded(f"cut/mpeg2_{start}.ts", work / "mpeg2.mpg", "-c copy", f"-fflags +genpts -ss {start}")
        keep = f"-c copy -copyts -ss {start}"
        yield transcoded(f"cut/after_opening_{start}.mp4", work / "with_audio.mp4", keep)


def transport_streams(work: Path) -> Iterator[Case]:
    """MPEG-TS that begins within a group or whose clock jumps, as recorders and packagers write it."""

    def late_start(path: Path, share: float) -> None:
        raw = (work / "whole.ts").read_bytes()
        path.write_bytes(raw[188 * int(len(raw) // 188 * share) :])

    def join(path: Path, parts: tuple[str, ...], counted: bool) -> None:
        raw = b"".join((work / part).read_bytes() for part in parts)
        path.write_bytes(continued(raw) if counted else raw)

    encode(work / "plain.mp4", work / "whole.ts", "-c copy")
    encode(work / "plain.mp4", work / "later.ts", "-c copy -output_ts_offset 50000")
    encode(work / "plain.mp4", work / "wrapping.ts", "-c copy -output_ts_offset 95442.5")
    for share in (0.1, 0.2, 0.4, 0.5):
        yield sound(f"transport/begun_at_{share}.ts", partial(late_start, share=share))
    for name, parts in {
        "same_clock": ("whole.ts", "whole.ts"),
        "forward": ("whole.ts", "later.ts"),
        "backward": ("later.ts", "whole.ts"),
        "three": ("whole.ts", "later.ts", "whole.ts"),
    }.items():
        yield sound(f"transport/joined_{name}.ts", partial(join, parts=parts, counted=True))
        yield sound(f"transport/concatenated_{name}.ts", partial(join, parts=parts, counted=False))
    yield sound("transport/clock_wraps.ts", lambda path: path.write_bytes((work / "wrapping.ts").read_bytes()))


def continued(raw: bytes) -> bytes:
    """Renumber the continuity counters of MPEG-TS packets, per stream."""
    data, counts = bytearray(raw), dict[int, int]()
    for at in range(0, len(data), 188):
        stream = (data[at + 1] & 31) << 8 | data[at + 2]
        if data[at + 3] & 0x10:
            counts[stream] = (counts.get(stream, -1) + 1) & 15
        data[at + 3] = data[at + 3] & 0xF0 | counts.get(stream, 0)
    return bytes(data)


def joined_and_padded(work: Path) -> Iterator[Case]:
    """More bytes than the video needs."""

    def plain(change: Callable[[bytes], bytes], source: str = "plain.mp4") -> Callable[[Path], object]:
        return lambda path: path.write_bytes(change((work / source).read_bytes()))

    yield sound("padded/zeros.mp4", plain(lambda raw: raw + bytes(100_000)))
    yield sound("padded/text.mp4", plain(lambda raw: raw + b"text after the last box"))
    yield sound("padded/noise.mp4", plain(lambda raw: raw + b"\xa5junk" * 10_000))
    yield sound("padded/two_bytes.mp4", plain(lambda raw: raw + b"\r\n"))
    yield sound("padded/box.mp4", plain(lambda raw: raw + box(b"abcdefgh")))
    yield sound("padded/free_first.mp4", plain(lambda raw: raw.replace(b"free", b"skip", 1)))
    yield sound("padded/twice.mp4", plain(lambda raw: raw + raw))
    yield sound("padded/mdat_too_long.mp4", plain(longer_mdat, "faststart.mp4"))
    yield sound("padded/mdat_to_the_end.mp4", plain(lambda raw: patched(raw, b"mdat", -8, bytes(4)), "faststart.mp4"))
    yield sound("padded/text.mkv", plain(lambda raw: raw + b"text", "open264.mkv"))
    yield sound("padded/text.webm", plain(lambda raw: raw + b"text", "vp9.webm"))
    yield sound("padded/text.avi", plain(lambda raw: raw + b"text", "plain.avi"))
    yield sound("padded/text.gif", plain(lambda raw: raw + b"text", "plain.gif"))
    yield sound("padded/text.ts", plain(lambda raw: raw + b"text", "whole.ts"))
    yield sound("padded/zeros.ts", plain(lambda raw: raw + bytes(188 * 4), "whole.ts"))
    encode(work / "plain.mp4", work / "faststart.mp4", "-c copy -movflags faststart")
    encode(work / "source.mkv", work / "plain.avi", "-c:v mpeg4")
    encode(work / "source.mkv", work / "plain.gif", "")
    for suffix in ("mkv", "avi", "gif", "ts", "webm", "mov", "webp", "mpg"):
        yield sound(f"suffix/in_truth_mp4.{suffix}", plain(lambda raw: raw))
    for source in ("vp9.webm", "plain.gif", "plain.avi", "whole.ts", "mpeg2.mpg", "open264.mkv"):
        yield sound(f"suffix/in_truth_{source.partition('.')[2]}.mp4", plain(lambda raw: raw, source))


def longer_mdat(raw: bytes) -> bytes:
    length = int.from_bytes(raw[raw.find(b"mdat") - 4 : raw.find(b"mdat")], "big")
    return patched(raw, b"mdat", -4, (length + 5000).to_bytes(4, "big"))


def presentation_times(work: Path) -> Iterator[Case]:
    """Frames shown for different times."""
    source = work / "source.mkv"
    h264 = "-c:v libx264 -pix_fmt yuv420p"
    for name, expression in {
        "hold_4_s": "if(lt(N,18),N/25/TB,(N/25+4)/TB)",
        "hold_first": "if(lt(N,1),0,(N/25+2)/TB)",
        "random": "(N+0.4*random(0))/25/TB",
        "two_rates": "if(lt(N,18),N/50,18/50+(N-18)/10)/TB",
        "slow": "N/2/TB",
        "late": "(N/25+3)/TB",
    }.items():
        for suffix in ("mp4", "mkv", "webm", "mov"):
            codec = f"{VP9}" if suffix == "webm" else h264
            yield transcoded(f"time/{name}.{suffix}", source, f"-vf \"setpts='{expression}'\" -fps_mode vfr {codec}")
    for rate in ("24000/1001", "60", "120", "1", "1000/33"):
        yield transcoded(
            f"time/rate_{rate.replace('/', '_')}.mp4", work / "plain.mp4", f"-vf setpts=N -r {rate} {h264}"
        )
    yield transcoded("time/audio_first.mp4", work / "with_audio.mp4", "-c copy", "-itsoffset 0.5")
    yield transcoded("time/audio_longer.mp4", work / "plain.mp4", "-f lavfi -i sine=d=6 -c copy -c:a aac")
    yield transcoded("time/start_at_100_s.ts", work / "plain.mp4", "-c copy -output_ts_offset 100")
    yield transcoded("time/start_negative.mkv", work / "plain.mp4", "-c copy -output_ts_offset -0.2")
    for pulldown in ("drop", "repeat"):
        options = "-vf mpdecimate" if pulldown == "drop" else "-vf fps=50"
        yield transcoded(f"time/frames_{pulldown}.mp4", source, f"{options} -fps_mode vfr {h264}")


def orientations_and_shapes(work: Path) -> Iterator[Case]:
    """The eight orientations, other angles, clean apertures, container cropping, pixel aspect ratios."""
    plain = work / "oblong.mp4"
    encode(work / "source.mkv", plain, "-vf scale=192:128 -c:v libx264 -pix_fmt yuv420p")
    for degrees in (0, 90, 180, 270):
        for flip in ("", "-display_hflip"):
            name = f"orientation/{degrees}{'_mirrored' if flip else ''}"
            before = f"-display_rotation {degrees} {flip}"
            for suffix in ("mp4", "mkv", "mov"):
                yield transcoded(f"{name}.{suffix}", plain, "-c copy", before)
    yield transcoded("orientation/vertical_flip.mp4", plain, "-c copy", "-display_vflip")
    for degrees in (45, 10):
        yield transcoded(f"orientation/{degrees}.mp4", plain, "-c copy", f"-display_rotation {degrees}")
    for options in ("rotate=90", "rotate=180", "rotate=270", "flip=horizontal", "flip=vertical"):
        bsf = f"-c copy -bsf:v h264_metadata=display_orientation=insert:{options}"
        for suffix in ("mp4", "ts"):
            yield transcoded(f"orientation/message_{options.replace('=', '_')}.{suffix}", plain, bsf)
    for name, (width, height) in {"half": (96, 64), "odd": (177, 121), "narrow": (64, 128)}.items():
        make = partial(write_clean_aperture, plain, width, height)
        yield sound(f"shape/clean_aperture_{name}.mp4", make)
        yield sound(f"shape/cropped_{name}.mkv", partial(copy_through, make, "clap.mp4", ""))
        yield sound(f"shape/cropped_turned_{name}.mp4", partial(copy_through, make, "clap.mp4", "-display_rotation 90"))
    bsf = "-c copy -bsf:v h264_metadata=crop_left=16:crop_right=32:crop_top=8:crop_bottom=24"
    yield transcoded("shape/cropped_in_h264.mp4", plain, bsf)
    for ratio in ("2/1", "1/2", "12/11", "64/45"):
        name = ratio.replace("/", "_")
        sar = f"-vf scale=192:128,setsar={ratio} -c:v"
        for suffix, codec in {"mp4": "libx264", "mkv": "libx264", "webm": VP9[5:], "avi": "mpeg4"}.items():
            yield transcoded(f"shape/pixel_{name}.{suffix}", work / "source.mkv", f"{sar} {codec} -pix_fmt yuv420p")
    yield transcoded("shape/pixel_of_container.mp4", plain, "-c copy -aspect 4:1")
    yield transcoded("shape/pixel_turned.mp4", plain, "-c copy -aspect 4:1", "-display_rotation 90")


def write_clean_aperture(source: Path, width: int, height: int, path: Path) -> None:
    """Put a centred clean aperture into an MP4 whose index is at its end (ISO/IEC 14496-12, 12.1.4)."""
    boxes = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1")
    aperture = struct.pack(">I4s8I", 40, b"clap", width, 1, height, 1, 0, 1, 0, 1)
    path.write_bytes(grown(source.read_bytes(), boxes, aperture))


def copy_through(make: Callable[[Path], object], name: str, before: str, path: Path) -> None:
    """Copy a file that is made first, under a temporary name, into another container."""
    first = path.with_name(f"{path.stem}_{name}")
    make(first)
    encode(first, path, "-c copy", before)
    first.unlink()


def alpha(source: Path) -> Iterator[Case]:
    mask = "format=yuva444p,geq=lum='lum(X,Y)':cb='cb(X,Y)':cr='cr(X,Y)':a='if(lt(hypot(X-80,Y-80),60),255,0)'"
    for name, options in {
        "vp8.webm": "-c:v libvpx -auto-alt-ref 0 -pix_fmt yuva420p",
        "vp9.webm": f"{VP9} -auto-alt-ref 0 -pix_fmt yuva420p",
        "vp9.mkv": f"{VP9} -auto-alt-ref 0 -pix_fmt yuva420p",
        "prores.mov": "-c:v prores_ks -profile:v 4444 -pix_fmt yuva444p10le",
        "png.mov": "-c:v png -pix_fmt rgba",
        "qtrle.mov": "-c:v qtrle -pix_fmt argb",
        "ffv1.mkv": "-c:v ffv1 -pix_fmt yuva420p",
        "ffv1_10bit.mkv": "-c:v ffv1 -pix_fmt yuva444p10le",
        "apng.apng": "-c:v apng -pix_fmt rgba",
        "gif.gif": "",
        "webp.webp": "-c:v libwebp_anim -pix_fmt bgra",
        "rawvideo.mov": "-c:v rawvideo -pix_fmt argb",
        "utvideo.avi": "-c:v utvideo -pix_fmt gbrap",
        "hap.mov": "-c:v hap -format hap_alpha",
    }.items():
        yield transcoded(f"alpha/{name}", source, f"-vf {shlex.quote(mask)} -frames:v 8 {options}")


def colours(source: Path) -> Iterator[Case]:
    bt709 = "range=tv:color_primaries=bt709:color_trc=bt709:colorspace=bt709"
    linear = f"scale=out_color_matrix=bt709,format=yuv420p,setparams={bt709},zscale=t=linear:npl=203,format=gbrpf32le"
    for name, transfer in {"pq": "smpte2084", "hlg": "arib-std-b67"}.items():
        chain = f"{linear},zscale=p=2020:t={transfer}:m=2020_ncl:r=tv,format=yuv420p10le"
        tags = f"-color_primaries bt2020 -color_trc {transfer} -colorspace bt2020nc"
        for suffix, codec in {"mp4": HEVC, "mkv": HEVC, "webm": VP9, "av1.mp4": AV1}.items():
            yield transcoded(f"colour/{name}.{suffix}", source, f"-vf {chain} {codec} {tags}")
    for matrix in ("bt709", "bt470bg", "smpte170m", "smpte240m", "bt2020nc", "fcc"):
        options = f"-vf scale=out_color_matrix={matrix.replace('nc', '')} -colorspace {matrix} -pix_fmt yuv420p"
        yield transcoded(f"colour/matrix_{matrix}.mp4", source, f"{options} -c:v libx264")
    for suffix, codec in {"mp4": "libx264", "mkv": HEVC[5:], "webm": VP9[5:]}.items():
        options = "-vf scale=out_range=full -color_range pc -pix_fmt yuv420p -c:v"
        yield transcoded(f"colour/full_range.{suffix}", source, f"{options} {codec}")
    yield transcoded("colour/yuvj.mp4", source, "-pix_fmt yuvj420p -c:v libx264")


def interlaced(source: Path) -> Iterator[Case]:
    for order in ("tff", "bff"):
        weave = f"-vf scale=192:128,interlace=scan={order}"
        for name, codec in {
            "h264.mp4": f"libx264 -x264-params {order}=1 -flags +ildct+ilme -pix_fmt yuv420p",
            "h264.ts": f"libx264 -x264-params {order}=1 -flags +ildct+ilme -pix_fmt yuv420p",
            "mpeg2.mpg": f"mpeg2video -flags +ildct+ilme -field_order {order[0] * 2} -f mpeg",
            "mpeg4.avi": "mpeg4 -flags +ildct+ilme",
            "prores.mov": f"prores_ks -flags +ildct -field_order {order[0] * 2}",
            "ffv1.mkv": f"ffv1 -field_order {order[0] * 2}",
            "huffyuv.avi": "huffyuv -s 192x576 -flags +ildct -pix_fmt yuv422p",
        }.items():
            yield transcoded(f"interlaced/{order}_{name}", source, f"{weave} -c:v {codec}")
    fields = "-vf scale=192:128,interlace -c:v libx264 -x264-params fake-interlaced=1 -pix_fmt yuv420p"
    yield transcoded("interlaced/marked_only.mp4", source, fields)


def changing_resolution(work: Path) -> Iterator[Case]:
    """Streams whose pictures change their size, as video calls and adaptive recordings have."""

    def join(path: Path, codec: str, suffix: str, sizes: tuple[str, ...]) -> None:
        middle = work / f"joined_{path.name}.{suffix}"
        raw = b""
        for size in sizes:
            encode(work / "source.mkv", middle, f"-s {size} -c:v {codec} -frames:v 12 -pix_fmt yuv420p")
            # One IVF header is enough.
            raw += middle.read_bytes()[32 if suffix == "ivf" and raw else 0 :]
        middle.write_bytes(continued(raw) if suffix == "ts" else raw)
        encode(middle, path, "-c copy") if path.suffix == ".mkv" else path.write_bytes(middle.read_bytes())

    for name, codec, suffix, sizes in (
        ("down.ts", "libx264", "ts", ("320x240", "160x120")),
        ("up.ts", "libx264", "ts", ("160x120", "320x240")),
        ("down.h264", "libx264", "h264", ("320x240", "160x120")),
        ("shape.h264", "libx264", "h264", ("320x240", "160x240", "320x120")),
        ("down.hevc", HEVC[5:], "hevc", ("320x240", "160x120")),
        ("up.mkv", "libx264", "ts", ("160x120", "320x240")),
        ("vp9.ivf", VP9[5:], "ivf", ("320x240", "160x120")),
        ("vp8.ivf", "libvpx", "ivf", ("160x120", "320x240")),
    ):
        yield sound(f"resolution/{name}", partial(join, codec=codec, suffix=suffix, sizes=sizes))


def several_streams(work: Path) -> Iterator[Case]:
    """Thumbnails, covers, several videos, sounds, subtitles, chapters and attachments beside the video."""
    main, audio = work / "plain.mp4", work / "with_audio.mp4"
    encode(main, work / "thumb.jpg", "-frames:v 1 -q:v 3")
    encode(main, work / "small.mp4", "-s 64x64 -c:v libx264 -pix_fmt yuv420p")
    encode(main, work / "large.mp4", "-s 320x320 -c:v libx264 -pix_fmt yuv420p")
    (work / "text.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nHello\n")
    (work / "chapters.txt").write_text(";FFMETADATA1\n[CHAPTER]\nTIMEBASE=1/1000\nSTART=0\nEND=700\ntitle=One\n")

    def together(name: str, inputs: list[Path], options: str) -> Case:
        first, *more = inputs
        maps = " ".join(f"-map {number}" for number in range(len(inputs)))
        added = " ".join(f"-i {shlex.quote(str(path))}" for path in more)
        return transcoded(f"streams/{name}", first, f"{added} {maps} -c copy {options}")

    default = "-disposition:v:0 0 -disposition:v:1 default"
    for suffix in ("mp4", "mkv", "mov"):
        yield together(f"thumbnail_first.{suffix}", [work / "thumb.jpg", main], default)
        yield together(f"second_is_default.{suffix}", [work / "large.mp4", main], default)
        yield together(f"large_second.{suffix}", [work / "small.mp4", main], "-disposition:v 0")
    yield together("cover_first.mp4", [work / "thumb.jpg", main], "-disposition:v:0 attached_pic")
    yield together("cover_second.mp4", [main, work / "thumb.jpg"], "-disposition:v:1 attached_pic")
    yield together("two_videos.ts", [work / "small.mp4", main], "")
    yield together("two_videos.avi", [work / "small.mp4", main], "-bsf:v h264_mp4toannexb")
    yield together("audio_first.mp4", [work / "tone.m4a", main], "")
    yield together("subtitles.mp4", [audio, work / "text.srt"], "-c:s mov_text")
    yield together("subtitles.mkv", [audio, work / "text.srt"], "-c:s srt")
    yield transcoded(
        "streams/attachment.mkv", audio, f"-c copy -attach {work / 'text.srt'} -metadata:s:t mimetype=text/plain"
    )
    yield transcoded(
        "streams/cover_attached.mkv", audio, f"-c copy -attach {work / 'thumb.jpg'} -metadata:s:t mimetype=image/jpeg"
    )
    for suffix in ("mp4", "mkv"):
        yield transcoded(
            f"streams/chapters.{suffix}", audio, f"-i {work / 'chapters.txt'} -map_metadata 1 -map_chapters 1 -c copy"
        )
    yield transcoded("streams/data.mov", audio, "-map 0 -c copy -timecode 00:00:00:00")
    yield transcoded("streams/metadata_odd.mp4", audio, "-c copy -metadata title=\x1b[31m -metadata comment=-x")
    for name, options in {
        "still.jpg": "-frames:v 1",
        "still.png": "-frames:v 1",
        "still.bmp": "-frames:v 1",
        "still.tiff": "-frames:v 1",
        "still.webp": "-frames:v 1",
        "still.jp2": "-frames:v 1",
    }.items():
        yield transcoded(f"still/{name}", work / "source.mkv", options)
    for suffix in ("webp", "gif", "png", "tiff"):
        yield sound(f"animated/of_pillow.{suffix}", write_animation)
    yield sound("still/one.avif", lambda path: Image.fromarray(pictures(1, 64, 64)[0]).save(path))


def write_animation(path: Path) -> None:
    """Write frames of different durations with Pillow."""
    first, *more = (Image.fromarray(picture) for picture in pictures(8, 64, 64))
    first.save(path, save_all=True, append_images=more, duration=[100, 40, 40, 500, 40, 40, 40, 100])
