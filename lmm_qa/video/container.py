"""Open a video file strictly, and choose the stream that a player shows; refuse what is no video, with the reason."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from lmm_qa.errors import ClipNotFound, ClipTruncated, ClipUnreadable, address_in
from lmm_qa.video.integrity import find_structure_break

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.codeccontext import VideoCodecContext
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

MAX_SIDE = 16_384

MAX_AREA = 100_000_000
"""Pixels. Larger pictures are refused before memory is allocated for them."""

FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,vob,flv,live_flv,kux,asf,ogg,gif,apng,mxf,nut,ivf,"
    "obu,h264,hevc,vvc,av1,evc,m4v,mjpeg,dv,rm,rawvideo,yuv4mpegpipe,wtv,dirac,vc1,vc1test,h261,h263,cavsvideo,avs2,avs3,"
    "fits,film_cpk,roq,smk,bink,nsv,gxf,mtv,lvf,swf,aiff,wav,mp3,flac,aac,caf,"
    "png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe,ppm_pipe,pgm_pipe,jpegxl_pipe,jpegxl_anim,qoi_pipe,exr_pipe,dpx_pipe,"
    "image2,j2k_pipe,gif_pipe,sgi_pipe,psd_pipe,pam_pipe,pbm_pipe"
)
"""Formats that ffmpeg may open: none of them opens other files or addresses that a file names."""

CONTENTS = {
    b"#EXTM3U": "an HLS playlist, which names other files",
    b"ffconcat": "a list of other files for ffmpeg",
    b"<?xml": "an XML file, such as a DASH manifest, which names other files",
    b"v=0": "a session description (SDP), which names an address",
    b"<!DOCTYPE": "a web page",
    b"<html": "a web page",
    b"PK\3\4": "a ZIP archive: unpack it first",
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"%PDF": "a PDF file",
    b"version https://git-lfs": "a Git LFS pointer: run `git lfs pull` first",
}
"""First bytes of files that are no video, and what they are."""

STILL_CODECS = frozenset({"mjpeg", "png", "bmp", "tiff", "webp", "jpeg2000", "jpegxl"})
"""A stream of unknown length in one of these can be a single picture."""

LENIENT_CODECS = frozenset({"tiff"})
"""Decoders that report everything they do not know as an error."""

ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""Decoders of transparent WebM: those of ffmpeg itself leave the transparency out."""


@dataclass(frozen=True)
class OpenVideo:
    """The stream of a clip that a player shows."""

    container: InputContainer
    stream: VideoStream
    decoder: VideoCodecContext
    warnings: tuple[str, ...]

    def decode(self, packet: Packet[VideoStream]) -> list[VideoFrame]:
        """Decode a packet of the stream; an empty one returns the last frames."""
        return self.decoder.decode(packet if packet.size else None)


def is_webp(path: Path) -> bool:
    """Whether a file is WebP, which Pillow decodes.

    Raises: as `probe`.
    """
    refuse_non_file(path)
    with path.open("rb") as file:
        start = file.read(12)
    return start[:4] == b"RIFF" and start[8:] == b"WEBP"


@contextmanager
def open_video(path: Path, strict: bool = True) -> Iterator[OpenVideo]:
    """Open a clip for decoding on one thread, with ffmpeg's own messages off.

    Args:
        path: the clip.
        strict: the decoder reports an error where it would otherwise conceal damage.

    Raises: as `probe`.
    """
    import av
    from av.codec.context import Flags

    refuse_non_file(path)
    _refuse_other_content(path)
    av.logging.set_level(av.logging.PANIC)
    try:
        container = open_container(path)
    except MemoryError:
        raise ClipUnreadable(f"the tables of {path} need more memory than there is: it is damaged") from None
    except (av.FFmpegError, ValueError) as error:
        if find_structure_break(path) is not None:  # an MP4 cut off before its index, for one
            raise truncated_error(path, 0, 0) from None
        reason = getattr(error, "strerror", None) or error
        raise ClipUnreadable(f"no decoder finds a video in {path}: {reason}. Is it a complete video file?") from None
    with container:
        stream, warnings = _choose_stream(path, container)
        context = stream.codec_context
        if context is None:
            raise ClipUnreadable(f"no decoder is available for the codec of {path}: convert it to H.264")
        refuse_too_large(path, context.width, context.height)
        decoder = _alpha_decoder(stream) or context
        strict = strict and context.codec.canonical_name not in LENIENT_CODECS
        decoder.options = {"max_pixels": str(MAX_AREA)} | ({"err_detect": "explode"} if strict else {})
        decoder.flags |= Flags.unaligned  # or a cropped left edge would be shown as far as it is aligned in memory
        decoder.thread_count = 1
        yield OpenVideo(container, stream, decoder, warnings)


def _choose_stream(path: Path, container: InputContainer) -> tuple[VideoStream, tuple[str, ...]]:
    """The stream that players show: a default one, then one with more than one frame, then the largest picture."""
    from av.stream import Disposition

    covers = Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & covers]
    if not streams:
        if container.streams.video:
            raise ClipUnreadable(f"{path} contains no video stream, only sound and a cover picture")
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise ClipUnreadable(f"{path} contains no video stream, only: {kinds}")
    if len(streams) == 1:
        return streams[0], ()

    def rank(stream: VideoStream) -> tuple[bool, bool, int]:
        context = stream.codec_context
        codec = context.codec.canonical_name if context else ""
        moves = stream.frames > 1 or (stream.frames == 0 and codec not in STILL_CODECS)
        area = context.width * context.height if context else 0
        return bool(stream.disposition & Disposition.default), moves, area

    chosen = max(streams, key=rank)
    left_out = ", ".join(_described(stream) for stream in streams if stream is not chosen)
    return chosen, (f"Of {len(streams)} video streams, {_described(chosen)} is rated; left out: {left_out}.",)


def _described(stream: VideoStream) -> str:
    context = stream.codec_context
    return f"{stream.index} ({context.width}x{context.height})" if context else f"{stream.index} (no decoder)"


def _alpha_decoder(stream: VideoStream) -> VideoCodecContext | None:
    """A decoder that keeps the transparency of VP8 and VP9; None if the stream is not transparent."""
    import av

    name = ALPHA_DECODERS.get(stream.codec_context.codec.canonical_name)
    if name is None or stream.metadata.get("alpha_mode") != "1":
        return None
    return cast("VideoCodecContext", av.CodecContext.create(name, "r"))


def truncated_error(path: Path, read: int, total: int, *, estimated: bool = False) -> ClipTruncated:
    """Make the error for a clip of which `read` of (about) `total` frames could be read."""
    of = f" of {'about ' if estimated else ''}{total}" if total > read else ""
    return ClipTruncated(f"stream breaks: {read}{of} frames could be read ({path}); make or copy the file again")


def refuse_non_file(path: Path) -> None:
    """Refuse everything but readable files with content; a named pipe or a device would block or never end."""
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode):
            path.open("rb").close()
    except (FileNotFoundError, NotADirectoryError):
        if address := address_in(str(path)):
            raise ClipNotFound(f"{address} is an address, not a file: download it first") from None
        raise ClipNotFound(f"no clip at {path}") from None
    except (OSError, ValueError) as error:
        raise ClipUnreadable(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise ClipUnreadable(f"{path} is {kind}, not a file: give the path of one clip")
    if not status.st_size:
        raise ClipUnreadable(f"{path} is empty (0 bytes): make or copy it again")


def refuse_too_large(path: Path, width: int, height: int) -> None:
    if max(width, height) > MAX_SIDE or width * height > MAX_AREA:
        raise ClipUnreadable(
            f"the picture of {path} is {width}x{height}; at most {MAX_SIDE} pixels a side and "
            f"{MAX_AREA // 1_000_000} million in all are supported: scale it down first"
        )


def _refuse_other_content(path: Path) -> None:
    """Refuse a file that begins like something other than a video."""
    with path.open("rb") as file:
        start = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
    for first, what in CONTENTS.items():
        if start[: len(first)].lower() == first.lower():
            raise ClipUnreadable(f"{path} is not a video but {what}")


def open_container(path: Path, **options: str) -> InputContainer:
    """Open a file of any kind, with additional options for its demuxer."""
    import av

    # An absolute path is never taken for an address or a pattern, and no file can make ffmpeg open another one.
    strict = {"protocol_whitelist": "file", "format_whitelist": FORMATS, "enable_drefs": "0", "pattern_type": "none"}
    return av.open(str(path.absolute()), metadata_errors="replace", options=strict | options)
