"""The pictures are those that ffmpeg shows. Run: python -m pytest tests/video/test_display.py

The clips are some of `scripts/corpus`; `scripts/compare_pixels.py` compares all of them.
"""

from __future__ import annotations

import sys
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
from clips import FACTOR
from paths import SCRIPTS
from PIL import Image

sys.path.insert(0, str(SCRIPTS))
from compare_pixels import LIMITS, difference, kind_of
from corpus import Case, sound

from lmm_qa.config import Sampling, View
from lmm_qa.degrade.dataset import read_clip
from lmm_qa.video.decode import Note, iterate_frames, read_frames
from lmm_qa.video.display import (
    KNEE,
    PEAK,
    REFERENCE_WHITE,
    Crop,
    Display,
    Orientation,
    Transfer,
    convert,
    hlg_gain,
    linear_table,
    moebius,
)
from lmm_qa.video.integrity import read_crop
from lmm_qa.video.probe import probe, scan_container
from lmm_qa.video.temporal import switches

PIXELS = [
    *(f"orientation/{degrees}{mirrored}.mp4" for degrees in (90, 180, 270) for mirrored in ("", "_mirrored")),
    "orientation/0_mirrored.mkv",
    "orientation/vertical_flip.mp4",
    "orientation/message_flip_horizontal.ts",
    "shape/clean_aperture_half.mp4",
    "shape/cropped_narrow.mkv",
    "shape/cropped_turned_half.mp4",
    "shape/cropped_in_h264.mp4",
    "shape/pixel_2_1.mp4",
    "alpha/vp8.webm",
    "alpha/vp9.webm",
    "alpha/prores.mov",
    "alpha/gif.gif",
    "colour/pq.mp4",
    "colour/hlg.mp4",
    "colour/full_range.mp4",
    "colour/matrix_bt2020nc.mp4",
    "interlaced/tff_h264.mp4",
    "interlaced/bff_ffv1.mkv",
]
OTHERS = [
    *("orientation/45.mp4", "shape/pixel_1_2.mp4", "shape/pixel_turned.mp4", "still/still.png"),
    *("resolution/up.mkv", "resolution/up.ts", "resolution/down.ts"),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the clips `PIXELS` and `OTHERS`."""
    folder = tmp_path_factory.mktemp("corpus")
    cases: dict[str, Case] = {case.name: case for case in sound.cases(folder / "sources")}
    for name in (*PIXELS, *OTHERS):
        (folder / name).parent.mkdir(exist_ok=True)
        cases[name].make(folder / name)
    return folder


@pytest.mark.parametrize("name", PIXELS)
def test_pictures_equal_those_of_ffmpeg(corpus: Path, name: str) -> None:
    kind = kind_of(name)
    assert kind is not None and difference(corpus / name, kind) < LIMITS[kind]


@pytest.mark.parametrize(
    ("name", "warning"),
    [
        ("orientation/90_mirrored.mp4", None),
        ("orientation/45.mp4", "no multiple of 90 degrees"),
        ("colour/pq.mp4", "HDR video, tone-mapped"),
        ("colour/hlg.mp4", "HDR video, tone-mapped"),
        ("colour/matrix_bt2020nc.mp4", None),
        ("interlaced/tff_h264.mp4", Note.INTERLACED),
        ("resolution/up.mkv", Note.RESIZED),
        ("still/still.png", "A still picture, not a video"),
    ],
)
def test_the_row_says_what_was_changed(corpus: Path, name: str, warning: str | None) -> None:
    info = read_frames(corpus / name, Sampling(frames=2), (View(),), FACTOR).info
    assert len(info.warnings) == (warning is not None)
    assert warning is None or warning in info.warnings[0]


def test_deinterlacing_changes_neither_number_nor_times(corpus: Path) -> None:
    scan = scan_container(corpus / "interlaced/tff_h264.mp4")
    times = [frame.time for frame in iterate_frames(scan, set())]
    assert times == pytest.approx([second + (times[0] or 0) for second in scan.seconds])


def test_one_converter_serves_frames_of_all_kinds(corpus: Path) -> None:
    """Colour spaces, ranges, formats and sizes in turns, against PyAV, which makes a converter for each frame."""
    frames = []
    for path in sorted(corpus.rglob("*.mp4")):
        with av.open(str(path)) as container:
            frames += list(islice(container.decode(video=0), 1))
    kinds = {(frame.format.name, frame.colorspace, frame.color_range) for frame in frames}
    assert len(kinds) >= 3
    for frame in [*frames, *reversed(frames)]:
        assert np.array_equal(convert(frame, "gray").to_ndarray(), frame.reformat(format="gray").to_ndarray())
        for size in ((frame.width, frame.height), (64, 48)):
            expected = frame.to_ndarray(format="rgb24", width=size[0], height=size[1])
            assert np.array_equal(convert(frame, "rgb24", *size).to_ndarray(), expected)


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("mirrored", [False, True])
def test_an_orientation_moves_pixels_as_its_matrix_does(turns: int, mirrored: bool) -> None:
    orientation = Orientation(turns, mirrored)
    stored = np.zeros((5, 7), np.uint8)
    stored[2, 3], stored[2, 4], stored[3, 3] = 1, 2, 3  # the centre, and the pixels right of and below it
    places = [np.argwhere(orientation.apply(stored) == value)[0][::-1] for value in (1, 2, 3)]
    assert np.array_equal(places[1] - places[0], orientation.matrix()[:, 0])
    assert np.array_equal(places[2] - places[0], orientation.matrix()[:, 1])


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("shape/pixel_2_1.mp4", (384, 128)),
        ("shape/pixel_1_2.mp4", (192, 256)),
        ("shape/pixel_turned.mp4", (128, 512)),
        ("shape/cropped_turned_half.mp4", (64, 96)),
    ],
)
def test_sizes_are_those_on_a_screen_with_square_pixels(corpus: Path, name: str, size: tuple[int, int]) -> None:
    info = probe(corpus / name)
    assert (info.width, info.height) == size


def test_the_whole_is_resized_in_one_step_and_the_crop_has_the_stored_pixels(corpus: Path) -> None:
    path = corpus / "shape/pixel_2_1.mp4"
    scan = scan_container(path)
    stored = scan.display.picture(next(iter(iterate_frames(scan, set()))))
    assert stored.shape == (128, 192, 3)
    views = (View(), View(kind="crop", size=112))
    whole, crop = (view[0] for view in read_frames(path, Sampling(frames=1, phase=0), views, FACTOR).views)
    expected = Image.fromarray(stored).resize(whole.shape[1::-1], Image.Resampling.BICUBIC)
    assert whole.shape[1] > 2 * whole.shape[0] and np.array_equal(whole, np.asarray(expected))
    starts = ((row, column) for row in range(17) for column in range(81))
    assert any(np.array_equal(crop, stored[row : row + 112, column : column + 112]) for row, column in starts)


def test_a_crop_that_leaves_nothing_is_ignored(corpus: Path) -> None:
    path = corpus / "shape/clean_aperture_half.mp4"
    assert read_crop(path, 0, 192, 128) == Crop(48, 32, 48, 32)
    assert read_crop(path, 0, 60, 128) == Crop() == read_crop(path, 1, 192, 128)


@pytest.mark.parametrize("name", ["alpha/vp8.webm", "alpha/vp9.webm", "alpha/prores.mov"])
def test_what_is_measured_and_degraded_is_on_white_too(corpus: Path, name: str) -> None:
    scan = scan_container(corpus / name)
    frame = next(iter(iterate_frames(scan, set())))
    assert scan.display.luma(frame)[:8, :8].min() >= 233
    assert read_clip(corpus / name, 0.2)[0][:, :8, :8].min() >= 253


def test_tone_mapping_follows_the_standards() -> None:
    code = round(65535 * 0.5807)  # PQ of 203 cd/m2: ITU-R BT.2408, table 1
    assert linear_table(Transfer.PQ)[code] == pytest.approx(1, rel=2e-3)
    assert linear_table(Transfer.PQ)[65535] * REFERENCE_WHITE == pytest.approx(10_000, rel=1e-4)
    scene = linear_table(Transfer.HLG)[[round(65535 * 0.75), 65535]]  # HLG of the reference white, and of 1,000 cd/m2
    assert scene * hlg_gain(scene) == pytest.approx([1, PEAK], rel=5e-3)
    light = np.linspace(0, PEAK, 1000, dtype=np.float32)
    mapped = moebius(light)
    assert np.array_equal(mapped[light <= KNEE], light[light <= KNEE])
    assert mapped[-1] == pytest.approx(1, abs=1e-5) and (np.diff(mapped) > 0).all()


def test_the_luma_of_hdr_is_that_of_its_picture(corpus: Path) -> None:
    scan = scan_container(corpus / "colour/pq.mp4")
    frame = next(iter(iterate_frames(scan, set())))
    luma = scan.display.luma(frame).astype(float)
    picture = scan.display.picture(frame) @ np.array([0.2126, 0.7152, 0.0722])
    assert np.corrcoef(luma.ravel(), picture.ravel())[0, 1] > 0.99
    assert abs(luma.mean() - picture.mean()) < 12


@pytest.mark.parametrize("name", ["resolution/up.ts", "resolution/down.ts"])
def test_of_two_resolutions_the_small_one_has_less_detail(corpus: Path, name: str) -> None:
    frames = read_frames(corpus / name, Sampling(frames=4), (View(),), FACTOR)
    assert (frames.info.width, frames.info.height) == (320, 240)
    assert frames.dynamics is not None
    half = len(frames.dynamics.detail) // 2
    first, second = frames.dynamics.detail[:half].mean(), frames.dynamics.detail[half:].mean()
    assert (first < second) == ("up" in name)
    for start, end in switches(frames.dynamics):
        assert (start == 0) == ("up" in name) and end - start < 0.7 * frames.info.duration


def test_a_display_of_pixels_that_are_not_square() -> None:
    display = Display(100, 50, Crop(10, 0, 10, 0), Orientation(1), float(Fraction(3, 2)))
    assert display.picture_size == (80, 50) and display.size == (120, 50)
    assert len(list(islice(iter(display.pixel_shape), 2))) == 2
