"""python -m pytest tests/degrade/test_full_reference.py"""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import pytest
from paths import SAMPLES
from PIL import Image

from lmm_qa.degrade.causes import DEGRADATIONS, FULL_FRAME, TEMPORAL, Pixels, degrade
from lmm_qa.degrade.full_reference import make_copy, mos, quality_ceiling, vmaf, vmaf_quality
from lmm_qa.video.face import Face, find_face


@pytest.fixture(scope="module")
def portrait() -> Pixels:
    """25 frames of a real talking face, 192 x 192."""
    with av.open(str(SAMPLES / "astronaut_clean.mp4")) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)][20:45]
    return np.stack([np.asarray(frame.resize((192, 192), Image.Resampling.BICUBIC)) for frame in frames])


@pytest.fixture(scope="module")
def face(portrait: Pixels) -> Face:
    return find_face(portrait)


def test_vmaf_equals_that_of_ffmpeg_on_files(portrait: Pixels, tmp_path: Path) -> None:
    blurred = degrade(portrait, "blur", 0.7).frames
    for name, frames in (("a.y4m", portrait), ("b.y4m", blurred)):
        raw = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "192x192", "-r", "25", "-i", "-", "-pix_fmt", "yuv420p")
        subprocess.run(
            [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *raw, str(tmp_path / name)],
            input=frames.tobytes(), check=True,
        )  # fmt: skip
    files = ["-i", str(tmp_path / "b.y4m"), "-i", str(tmp_path / "a.y4m"), "-lavfi", "libvmaf", "-f", "null", "-"]
    log = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), *files], capture_output=True, check=True, text=True).stderr
    assert vmaf(blurred, portrait) == pytest.approx(float(log.split("VMAF score: ")[1].split()[0]), abs=0.01)
    assert 20 < vmaf(blurred, portrait) < 80
    assert vmaf(portrait, portrait) > 95


def test_the_last_row_and_column_of_odd_sides_are_ignored(portrait: Pixels) -> None:
    odd = portrait[:4, :191, :189]
    assert vmaf(odd, odd) == vmaf(odd[:, :190, :188], odd[:, :190, :188])


def test_vmaf_to_quality() -> None:
    assert [vmaf_quality(value) for value in (0, 20, 58, 96, 100)] == [0, 0, 0.5, 1, 1]


def test_quality_ceiling() -> None:
    assert quality_ceiling(512, 512, 0.1, 0.5) == 1
    assert quality_ceiling(1080, 1920, 0.06, 0.38) == 1
    assert quality_ceiling(352, 640, 0.1, 0.5) == pytest.approx(0.9)
    assert quality_ceiling(100, 100, 0.1, 0.5) == pytest.approx(0.8)
    assert quality_ceiling(512, 512, 0.06 / 8, 0.5) == pytest.approx(0.85)
    assert quality_ceiling(512, 512, 0.03, 0.5) == pytest.approx(0.95)
    assert quality_ceiling(512, 512, 0.1, 0.31) == pytest.approx(0.775)
    assert quality_ceiling(512, 512, 0.1, 0.1) == pytest.approx(0.55)
    assert quality_ceiling(224, 224, 0, 0) == pytest.approx(0.65 * 0.55)


def test_quality_to_mos() -> None:
    assert mos(0.25, (1, 5)) == 2
    assert mos(0.25, (0, 100)) == 25


def test_no_degradation_costs_nothing(portrait: Pixels) -> None:
    copy = make_copy(portrait, [])
    assert np.array_equal(copy.frames, portrait)
    assert (copy.quality, copy.vmaf, copy.degradations) == (1, None, ())


@pytest.mark.parametrize("cause", DEGRADATIONS)
def test_quality_falls_with_the_strength(portrait: Pixels, face: Face, cause: str) -> None:
    copies = [make_copy(portrait, [(cause, strength)], seed=2, face=face) for strength in (0, 0.3, 0.65, 1)]
    quality = [copy.quality for copy in copies]
    assert quality[0] > 0.95
    assert np.all(np.diff(quality) < 0)
    assert quality[3] < (0.9 if cause == "buffering" else 0.75)  # its seconds count, and there is but one
    assert np.array_equal(copies[2].frames, degrade(portrait, cause, 0.65, 2, face=face).frames)


@pytest.mark.parametrize("cause", ["blur", "h264", "rescale"])
def test_for_some_causes_quality_is_vmaf_alone(portrait: Pixels, cause: str) -> None:
    copy = make_copy(portrait, [(cause, 0.6)])
    assert copy.vmaf == vmaf(copy.frames, portrait)
    assert copy.quality == vmaf_quality(copy.vmaf)
    some = make_copy(portrait, [(cause, 0.6)], vmaf_frames=[0, 1, 12, 13])
    assert some.vmaf == vmaf(copy.frames[[0, 1, 12, 13]], portrait[[0, 1, 12, 13]])


@pytest.mark.parametrize("cause", ["noise", "banding"])
def test_for_some_causes_a_curve_limits_the_quality(portrait: Pixels, cause: str) -> None:
    copy = make_copy(portrait, [(cause, 0.5)])
    assert copy.vmaf is not None
    assert copy.quality < vmaf_quality(copy.vmaf)
    assert copy.quality == pytest.approx({"noise": math.exp(-42 * 0.5**1.5 / 30), "banding": 0.625}[cause])


def test_degradations_of_the_face_are_judged_there(portrait: Pixels, face: Face) -> None:
    copy = make_copy(portrait, [("defocus", 0.6)], face=face)
    assert copy.vmaf is not None
    assert copy.vmaf < vmaf(copy.frames, portrait) - 5
    assert copy.quality == vmaf_quality(copy.vmaf)
    mouth = make_copy(portrait, [("mouth_smear", 0.6)], face=face)
    assert mouth.quality == pytest.approx(1 - 0.8 * (1 - vmaf_quality(mouth.vmaf or 0)))


def test_buffering_and_stalls_follow_human_opinions(portrait: Pixels) -> None:
    """The curves were fitted to the mean opinions of THQA-NTIRE for 1 and 2 seconds; 3.6 for none."""
    opinions = {("buffering", 1): 2.77, ("buffering", 2): 2.06, ("stall", 1): 1.91, ("stall", 2): 1.45}
    rng = np.random.default_rng(0)
    moving = rng.integers(0, 256, (100, 16, 16, 3), dtype=np.uint8)
    for (cause, seconds), opinion in opinions.items():
        strength = seconds / 4 / {"buffering": 0.6, "stall": 0.8}[cause]
        copy = make_copy(moving, [(cause, strength)])
        assert copy.degradations[0].seconds[1] - copy.degradations[0].seconds[0] == pytest.approx(seconds)
        assert copy.vmaf is None
        assert copy.quality == pytest.approx(opinion / 3.6, abs=0.05)


@pytest.mark.parametrize("cause", [*TEMPORAL, "mouth_freeze"])
def test_freezing_what_does_not_move_costs_nothing(portrait: Pixels, face: Face, cause: str) -> None:
    still, there = np.repeat(portrait[:1], 25, axis=0), Face(np.repeat(face.boxes[:1], 25, axis=0), found=True)
    assert make_copy(still, [(cause, 0.8)], face=there).quality == 1
    assert make_copy(portrait, [(cause, 0.8)], face=there).quality < 0.9


def test_causes_that_vmaf_judges_have_one_vmaf(portrait: Pixels) -> None:
    copy = make_copy(portrait, [("h264", 0.5), ("rescale", 0.5)])
    assert [each.cause for each in copy.degradations] == ["rescale", "h264"]
    smaller = degrade(portrait, "rescale", 0.5).frames
    assert np.array_equal(copy.frames, degrade(smaller, "h264", 0.5).frames)
    assert copy.vmaf == vmaf(copy.frames, portrait)
    assert copy.quality == vmaf_quality(copy.vmaf)


def test_the_quality_of_other_causes_is_multiplied(portrait: Pixels, face: Face) -> None:
    for other in ("stall", "seam"):
        both = make_copy(portrait, [(other, 0.5), ("h264", 0.5)], seed=3, face=face)
        single = make_copy(portrait, [(other, 0.5)], seed=3, face=face)
        assert both.vmaf is not None
        assert both.quality == pytest.approx(vmaf_quality(both.vmaf) * single.quality, abs=0.02)
        if other == "seam":  # VMAF judges the encoder against what the encoder was given
            assert both.vmaf == vmaf(both.frames, single.frames)


def test_each_degradation_has_its_place_and_time(portrait: Pixels, face: Face) -> None:
    seam, stall = make_copy(portrait, [("stall", 0.5), ("seam", 0.8)], face=face).degradations
    assert (seam.cause, seam.strength, seam.seconds) == ("seam", 0.8, (0, 1))
    assert seam.place == degrade(portrait, "seam", 0.8, face=face).place
    assert (stall.cause, stall.place) == ("stall", FULL_FRAME)


def test_a_tiny_region_can_be_judged(portrait: Pixels) -> None:
    for middle in (0.02, 0.5, 0.98):
        tiny = Face(np.tile((middle - 0.02, middle - 0.02, middle + 0.02, middle + 0.02), (25, 1)), found=True)
        assert make_copy(portrait, [("teeth_smear", 1)], face=tiny).vmaf is not None


def test_vmaf_needs_a_minimum_size(portrait: Pixels) -> None:
    with pytest.raises(ValueError, match="VMAF needs 32 x 32 pixels, received 40 x 31"):
        vmaf(portrait[:, :31, :40], portrait[:, :31, :40])


def test_invalid_degradations_are_refused(portrait: Pixels) -> None:
    with pytest.raises(ValueError, match="unknown degradation 'fog'"):
        make_copy(portrait, [("blur", 0.5), ("fog", 0.5)])
    with pytest.raises(ValueError, match="each cause can be applied once, received blur, blur"):
        make_copy(portrait, [("blur", 0.5), ("blur", 0.7)])
