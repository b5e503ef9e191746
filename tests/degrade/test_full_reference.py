"""python -m pytest tests/degrade/test_full_reference.py"""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

import lmm_qa
from lmm_qa.degrade.causes import DEGRADATIONS, TEMPORAL, WHOLE, Pixels, damage
from lmm_qa.degrade.full_reference import ceiling, make_copy, mos, vmaf, vmaf_quality
from lmm_qa.video.face import Face, find_face


@pytest.fixture(scope="module")
def portrait() -> Pixels:
    """25 frames of a real face that talks, 192 x 192."""
    with av.open(str(Path(lmm_qa.__file__).parent / "samples" / "astronaut_clean.mp4")) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)][20:45]
    return np.stack([np.asarray(frame.resize((192, 192), Image.Resampling.BICUBIC)) for frame in frames])


@pytest.fixture(scope="module")
def face(portrait: Pixels) -> Face:
    return find_face(portrait)


def test_vmaf_is_that_of_ffmpeg_on_files(portrait: Pixels, tmp_path: Path) -> None:
    blurred = damage(portrait, "blur", 0.7).frames
    for name, frames in (("a.y4m", portrait), ("b.y4m", blurred)):
        raw = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "192x192", "-r", "25", "-i", "-", "-pix_fmt", "yuv420p")
        subprocess.run(
            [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *raw, str(tmp_path / name)],
            input=frames.tobytes(), check=True,
        )  # fmt: skip
    files = ["-i", str(tmp_path / "b.y4m"), "-i", str(tmp_path / "a.y4m"), "-lavfi", "libvmaf", "-f", "null", "-"]
    said = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), *files], capture_output=True, check=True, text=True).stderr
    assert vmaf(blurred, portrait) == pytest.approx(float(said.split("VMAF score: ")[1].split()[0]), abs=0.01)
    assert 20 < vmaf(blurred, portrait) < 80
    assert vmaf(portrait, portrait) > 95


def test_odd_sides_are_compared_without_the_last_row(portrait: Pixels) -> None:
    odd = portrait[:4, :191, :189]
    assert vmaf(odd, odd) == vmaf(odd[:, :190, :188], odd[:, :190, :188])


def test_what_a_vmaf_is_worth() -> None:
    assert [vmaf_quality(value) for value in (0, 20, 58, 96, 100)] == [0, 0, 0.5, 1, 1]


def test_a_source_has_its_ceiling() -> None:
    assert ceiling(512, 512, 0.1) == 1
    assert ceiling(1080, 1920, 0.06) == 1
    assert ceiling(352, 640, 0.1) == pytest.approx(0.9)
    assert ceiling(100, 100, 0.1) == pytest.approx(0.8)
    assert ceiling(512, 512, 0.06 / 8) == pytest.approx(0.85)
    assert ceiling(512, 512, 0.03) == pytest.approx(0.95)
    assert ceiling(224, 224, 0) == pytest.approx(0.65)


def test_quality_on_a_scale() -> None:
    assert mos(0.25, (1, 5)) == 2
    assert mos(0.25, (0, 100)) == 25


def test_no_damage_is_worth_everything(portrait: Pixels) -> None:
    copy = make_copy(portrait, [])
    assert np.array_equal(copy.frames, portrait)
    assert (copy.quality, copy.vmaf, copy.steps) == (1, None, ())


@pytest.mark.parametrize("cause", DEGRADATIONS)
def test_the_more_damage_the_less_quality(portrait: Pixels, face: Face, cause: str) -> None:
    copies = [make_copy(portrait, [(cause, strength)], seed=2, face=face) for strength in (0, 0.3, 0.65, 1)]
    quality = [copy.quality for copy in copies]
    assert quality[0] > 0.95
    assert np.all(np.diff(quality) < 0)
    assert quality[3] < (0.9 if cause == "buffering" else 0.75)  # its seconds count, and there is but one
    assert np.array_equal(copies[2].frames, damage(portrait, cause, 0.65, 2, face=face).frames)


@pytest.mark.parametrize("cause", ["blur", "h264", "rescale"])
def test_where_vmaf_judges_it_alone_counts(portrait: Pixels, cause: str) -> None:
    copy = make_copy(portrait, [(cause, 0.6)])
    assert copy.vmaf == vmaf(copy.frames, portrait)
    assert copy.quality == vmaf_quality(copy.vmaf)
    some = make_copy(portrait, [(cause, 0.6)], judged=[0, 1, 12, 13])
    assert some.vmaf == vmaf(copy.frames[[0, 1, 12, 13]], portrait[[0, 1, 12, 13]])


@pytest.mark.parametrize("cause", ["noise", "banding"])
def test_where_vmaf_is_lenient_a_curve_limits_it(portrait: Pixels, cause: str) -> None:
    copy = make_copy(portrait, [(cause, 0.5)])
    assert copy.vmaf is not None
    assert copy.quality < vmaf_quality(copy.vmaf)
    assert copy.quality == pytest.approx({"noise": math.exp(-42 * 0.5**1.5 / 30), "banding": 0.625}[cause])


def test_damage_to_the_face_is_judged_there(portrait: Pixels, face: Face) -> None:
    copy = make_copy(portrait, [("defocus", 0.6)], face=face)
    assert copy.vmaf is not None
    assert copy.vmaf < vmaf(copy.frames, portrait) - 5
    assert copy.quality == vmaf_quality(copy.vmaf)
    mouth = make_copy(portrait, [("mouth_smear", 0.6)], face=face)
    assert mouth.quality == pytest.approx(1 - 0.8 * (1 - vmaf_quality(mouth.vmaf or 0)))


def test_a_standstill_costs_what_people_said(portrait: Pixels) -> None:
    """Against the mean opinions of THQA-NTIRE that the curves are after: 1 and 2 seconds, of 3.6 for none."""
    opinions = {("buffering", 1): 2.77, ("buffering", 2): 2.06, ("stall", 1): 1.91, ("stall", 2): 1.45}
    rng = np.random.default_rng(0)
    moving = rng.integers(0, 256, (100, 16, 16, 3), dtype=np.uint8)
    for (cause, seconds), opinion in opinions.items():
        strength = seconds / 4 / {"buffering": 0.6, "stall": 0.8}[cause]
        copy = make_copy(moving, [(cause, strength)])
        assert copy.steps[0].seconds[1] - copy.steps[0].seconds[0] == pytest.approx(seconds)
        assert copy.vmaf is None
        assert copy.quality == pytest.approx(opinion / 3.6, abs=0.05)


@pytest.mark.parametrize("cause", [*TEMPORAL, "mouth_freeze"])
def test_where_nothing_moves_standing_still_costs_nothing(portrait: Pixels, face: Face, cause: str) -> None:
    still, there = np.repeat(portrait[:1], 25, axis=0), Face(np.repeat(face.boxes[:1], 25, axis=0), found=True)
    assert make_copy(still, [(cause, 0.8)], face=there).quality == 1
    assert make_copy(portrait, [(cause, 0.8)], face=there).quality < 0.9


def test_a_pair_that_vmaf_judges_is_judged_together(portrait: Pixels) -> None:
    copy = make_copy(portrait, [("h264", 0.5), ("rescale", 0.5)])
    assert [step.cause for step in copy.steps] == ["rescale", "h264"]
    smaller = damage(portrait, "rescale", 0.5).frames
    assert np.array_equal(copy.frames, damage(smaller, "h264", 0.5).frames)
    assert copy.vmaf == vmaf(copy.frames, portrait)
    assert copy.quality == vmaf_quality(copy.vmaf)


def test_a_pair_of_which_vmaf_judges_one_is_a_product(portrait: Pixels, face: Face) -> None:
    for other in ("stall", "seam"):
        both = make_copy(portrait, [(other, 0.5), ("h264", 0.5)], seed=3, face=face)
        single = make_copy(portrait, [(other, 0.5)], seed=3, face=face)
        assert both.vmaf is not None
        assert both.quality == pytest.approx(vmaf_quality(both.vmaf) * single.quality, abs=0.02)
        if other == "seam":  # VMAF judges the encoder against what the encoder was given
            assert both.vmaf == vmaf(both.frames, single.frames)


def test_each_step_knows_its_place(portrait: Pixels, face: Face) -> None:
    seam, stall = make_copy(portrait, [("stall", 0.5), ("seam", 0.8)], face=face).steps
    assert (seam.cause, seam.strength, seam.seconds) == ("seam", 0.8, (0, 1))
    assert seam.place == damage(portrait, "seam", 0.8, face=face).place
    assert (stall.cause, stall.place) == ("stall", WHOLE)


def test_a_tiny_place_can_be_judged(portrait: Pixels) -> None:
    for middle in (0.02, 0.5, 0.98):
        tiny = Face(np.tile((middle - 0.02, middle - 0.02, middle + 0.02, middle + 0.02), (25, 1)), found=True)
        assert make_copy(portrait, [("teeth_smear", 1)], face=tiny).vmaf is not None


def test_vmaf_needs_a_picture(portrait: Pixels) -> None:
    with pytest.raises(ValueError, match="VMAF needs 32 x 32 pixels, received 40 x 31"):
        vmaf(portrait[:, :31, :40], portrait[:, :31, :40])


def test_what_makes_no_copy(portrait: Pixels) -> None:
    with pytest.raises(ValueError, match="unknown damage 'fog'"):
        make_copy(portrait, [("blur", 0.5), ("fog", 0.5)])
    with pytest.raises(ValueError, match="each cause can befall a clip once, received blur, blur"):
        make_copy(portrait, [("blur", 0.5), ("blur", 0.7)])
