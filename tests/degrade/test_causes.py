"""python -m pytest tests/degrade/test_causes.py"""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from clips import numbered_picture, read_number
from paths import SAMPLES
from PIL import Image
from scipy.ndimage import gaussian_filter, gaussian_laplace

from lmm_qa.degrade.causes import (
    COMPRESSION,
    DEGRADATIONS,
    FACIAL,
    FULL_FRAME,
    MILD,
    PICTURE,
    STRONG,
    TEMPORAL,
    DegradedFrames,
    Pixels,
    degrade,
    encode,
    noise_sigma,
)
from lmm_qa.video.face import Face, find_face

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
MOUTH = (0.498, 0.55)


@pytest.fixture(scope="module")
def portrait() -> Pixels:
    """24 frames of a real talking face, 192 pixels wide and 176 high."""
    with av.open(str(SAMPLES / "astronaut_clean.mp4")) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)][20:68:2]
    return np.stack([np.asarray(frame.resize((192, 192), Image.Resampling.BICUBIC))[:176] for frame in frames])


@pytest.fixture(scope="module")
def face(portrait: Pixels) -> Face:
    found = find_face(portrait)
    assert found.found
    return found


@pytest.fixture(scope="module")
def numbered() -> Pixels:
    """24 numbered frames of odd size."""
    return np.stack([numbered_picture(number, 121, 93) for number in range(24)])


def error(clip: Pixels, damaged: Pixels) -> float:
    """Mean absolute error of the pixels."""
    return float(np.abs(clip.astype(float) - damaged).mean())


def window(degraded: DegradedFrames, fps: float = 25.0) -> np.ndarray:
    """(T, H, W): True within the place and seconds of a degradation."""
    count, height, width = degraded.frames.shape[:3]
    first, stop = (round(moment * fps) for moment in degraded.seconds)
    left, top, right, bottom = (
        round(edge * side) for edge, side in zip(degraded.place, (width, height) * 2, strict=True)
    )
    inside = np.zeros((count, height, width), bool)
    inside[first:stop, top:bottom, left:right] = True
    return inside


@pytest.mark.parametrize("cause", DEGRADATIONS)
def test_a_degradation_is_reproducible_and_grows_from_nothing(portrait: Pixels, face: Face, cause: str) -> None:
    before = portrait.copy()
    levels = [degrade(portrait, cause, strength, seed=1, face=face) for strength in STRENGTHS]
    for degraded in levels:
        assert degraded.frames.shape == portrait.shape
        assert degraded.frames.dtype == np.uint8
    errors = [error(portrait, degraded.frames) for degraded in levels]
    assert errors[0] < 2.5 if cause in COMPRESSION else errors[0] == 0
    assert np.all(np.diff(errors) > 0)
    assert np.array_equal(degrade(portrait, cause, 0.75, seed=1, face=face).frames, levels[3].frames)
    assert np.array_equal(portrait, before)


@pytest.mark.parametrize("cause", sorted(DEGRADATIONS.keys() - {"buffering"}))
def test_nothing_changes_outside_place_and_seconds(portrait: Pixels, face: Face, cause: str) -> None:
    for seed in range(2):
        degraded = degrade(portrait, cause, 0.5, seed, fps=12.5, face=face)
        inside, changed = window(degraded, 12.5), (degraded.frames != portrait).any(axis=-1)
        assert not (changed & ~inside).any()
        assert changed.any(axis=(1, 2))[inside.any(axis=(1, 2))].mean() > 0.7
        assert 0 <= degraded.seconds[0] < degraded.seconds[1] <= 24 / 12.5


@pytest.mark.parametrize("cause", (*PICTURE, "jpeg", "h264", "h265", "vp9", "av1", "drop"))
def test_the_place_of_a_global_degradation_is_the_full_frame(portrait: Pixels, cause: str) -> None:
    degraded = degrade(portrait, cause, STRONG)
    assert degraded.place == FULL_FRAME
    assert degraded.seconds[1] == 24 / 25


@pytest.mark.parametrize("cause", [cause for cause in FACIAL if cause != "background_wobble"])
def test_the_place_of_a_degradation_of_the_face_is_the_face(portrait: Pixels, face: Face, cause: str) -> None:
    left, top, right, bottom = degrade(portrait, cause, STRONG, face=face).place
    assert left < MOUTH[0] < right
    assert top < MOUTH[1] * 192 / 176 < bottom
    wide, high = face.boxes[0, 2:] - face.boxes[0, :2]
    assert right - left < 1.6 * wide
    assert bottom - top < 2 * high


def test_a_face_that_is_not_given_is_detected(portrait: Pixels, face: Face) -> None:
    given, found = degrade(portrait, "seam", 0.5, face=face), degrade(portrait, "seam", 0.5)
    assert given.place == found.place
    assert np.array_equal(given.frames, found.frames)


def test_a_face_may_extend_beyond_the_picture(portrait: Pixels) -> None:
    for corner in ((-0.3, -0.4), (0.7, 0.8), (2.0, 2.0)):
        outside = Face(np.tile((*corner, corner[0] + 0.6, corner[1] + 0.6), (24, 1)), found=True)
        for cause in FACIAL:
            degraded = degrade(portrait, cause, STRONG, face=outside)
            assert not ((degraded.frames != portrait).any(axis=-1) & ~window(degraded)).any()


@pytest.mark.parametrize("cause", (*PICTURE, "jpeg", "h264", "h265", "vp9", "av1"))
def test_degradations_of_pictures_keep_their_order(numbered: Pixels, cause: str) -> None:
    degraded = degrade(numbered, cause, MILD).frames
    assert all(error(numbered[i], degraded[i]) < error(numbered[i], degraded[(i + 8) % 24]) for i in range(24))


@pytest.mark.parametrize("cause", (*FACIAL, *PICTURE, *COMPRESSION, *TEMPORAL))
def test_one_frame_can_be_degraded(numbered: Pixels, cause: str) -> None:
    assert degrade(numbered[:1], cause, STRONG).frames.shape == (1, 93, 121, 3)


# Each cause does what its name says


def test_blur_is_gaussian(portrait: Pixels) -> None:
    blurred = degrade(portrait[:1], "blur", 1).frames
    sigma = 3.6 * 176 / 512
    assert error(gaussian_filter(portrait[:1].astype(float), (0, sigma, sigma, 0)).astype(np.uint8), blurred) < 1


@pytest.mark.parametrize("seed", range(4))
def test_motion_blur_turns_a_point_into_a_line_around_it(seed: int) -> None:
    point = np.zeros((1, 512, 512, 3), np.uint8)
    point[0, 255:258, 255:258] = 255
    weight = degrade(point, "motion_blur", 1, seed).frames[0, :, :, 0].astype(float)
    places = np.argwhere(weight > 0.1 * weight.max())
    weights = weight[tuple(places.T)] / weight[tuple(places.T)].sum()
    middle = weights @ places
    assert middle == pytest.approx([256, 256], abs=1)
    spread = np.linalg.eigvalsh(np.cov(places.T, aweights=weights))
    assert spread[1] == pytest.approx(16**2 / 12, rel=0.35)  # the variance of a uniform line
    assert spread[0] < 3


def test_noise_is_new_in_every_frame() -> None:
    still = np.full((3, 64, 64, 3), 128, np.uint8)
    noise = degrade(still, "noise", MILD).frames.astype(float) - still
    assert noise.std() == pytest.approx(noise_sigma(MILD), rel=0.05)
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.05


def test_exposure_brightens_and_darkens_by_stops() -> None:
    grey = np.full((1, 8, 8, 3), 64, np.uint8)
    assert degrade(grey, "overexposure", 0.4).frames[0, 0, 0, 0] == round(255 * (2 * (64 / 255) ** 2.2) ** (1 / 2.2))
    assert degrade(grey, "underexposure", 0.25).frames[0, 0, 0, 0] == round(255 * ((64 / 255) ** 2.2 / 2) ** (1 / 2.2))


def test_a_colour_cast_moves_channels_apart() -> None:
    grey = np.full((1, 8, 8, 3), 100, np.uint8)
    casts = {tuple(degrade(grey, "colour_cast", 0.5, seed).frames[0, 0, 0].tolist()) for seed in range(20)}
    assert len(casts) == 4
    assert all(max(cast) - min(cast) > 20 for cast in casts)


def test_banding_leaves_few_levels() -> None:
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, None, :, None], (1, 4, 256, 3)).copy()
    levels = [len(np.unique(degrade(ramp, "banding", strength).frames)) for strength in STRENGTHS]
    assert levels == [256, 100, 39, 15, 6]


def test_flicker_changes_brightness_and_nothing_else(portrait: Pixels) -> None:
    grey = np.full((50, 4, 4, 3), 120, np.uint8)
    flickering = degrade(grey, "flicker", 1).frames
    assert np.all(flickering == flickering[:, :1, :1, :1])
    levels = flickering[:, 0, 0, 0] / 120
    assert levels.min() < 0.8
    assert levels.max() > 1.2
    assert levels.min() >= 0.6
    assert levels.max() <= 1.4


def sharpness(picture: Pixels) -> float:
    return float(gaussian_laplace(picture.mean(axis=-1), 1).std())


def test_defocus_blurs_the_face_and_leaves_the_rest(portrait: Pixels, face: Face) -> None:
    degraded = degrade(portrait, "defocus", STRONG, face=face)
    left, top, right, bottom = (
        round(edge * side) for edge, side in zip(face.boxes[0], (192, 176, 192, 176), strict=True)
    )
    middle = np.s_[0, top + 10 : bottom - 10, left + 10 : right - 10]
    assert sharpness(degraded.frames[middle]) < 0.4 * sharpness(portrait[middle])


def mouth(frames: Pixels) -> Pixels:
    x, y = round(MOUTH[0] * 192), round(MOUTH[1] * 192)
    return frames[:, y - 3 : y + 4, x - 5 : x + 6]


def test_a_frozen_mouth_does_not_move(portrait: Pixels) -> None:
    still = Face(np.tile((0.33, 0.3, 0.67, 0.671), (24, 1)), found=True)
    frozen = mouth(degrade(portrait, "mouth_freeze", 1, face=still).frames)
    assert error(frozen[1:], frozen[:-1]) == 0
    assert error(mouth(portrait)[1:], mouth(portrait)[:-1]) > 2
    half = degrade(portrait, "mouth_freeze", 0.5, face=still)
    assert half.seconds[1] - half.seconds[0] == pytest.approx(12 / 25)


@pytest.mark.parametrize("cause", ["mouth_smear", "teeth_smear"])
def test_a_smeared_mouth_has_no_detail(portrait: Pixels, face: Face, cause: str) -> None:
    smeared = degrade(portrait, cause, 1, face=face).frames
    assert sharpness(mouth(smeared)[8]) < 0.5 * sharpness(mouth(portrait)[8])


def test_teeth_run_together_sideways(portrait: Pixels, face: Face) -> None:
    across = [np.abs(np.diff(mouth(frames).astype(float), axis=2)).mean()
              for frames in (portrait, degrade(portrait, "teeth_smear", 1, face=face).frames)]  # fmt: skip
    assert across[1] < 0.4 * across[0]


def test_a_wobbling_background_does_not_change_the_face(portrait: Pixels, face: Face) -> None:
    degraded = degrade(portrait, "background_wobble", 1, face=face).frames
    for number in (0, 12, 23):
        left, top, right, bottom = (
            round(edge * side) for edge, side in zip(face.boxes[number], (192, 176, 192, 176), strict=True)
        )
        assert error(degraded[number, top:bottom, left:right], portrait[number, top:bottom, left:right]) == 0
    assert error(degraded[:, :, :30], portrait[:, :, :30]) > 1


def test_a_warped_face_keeps_its_colours(portrait: Pixels, face: Face) -> None:
    """Its pixels are moved, not painted over."""
    degraded = degrade(portrait, "face_warp", STRONG, face=face).frames
    inside = window(degrade(portrait, "face_warp", STRONG, face=face))[0]
    before, after = portrait[0][inside].astype(float), degraded[0][inside].astype(float)
    assert after.mean(axis=0) == pytest.approx(before.mean(axis=0), abs=6)
    assert after.std() == pytest.approx(before.std(), rel=0.1)
    assert error(portrait[0], degraded[0]) > 2


@pytest.mark.parametrize("cause", ["face_warp", "background_wobble"])
def test_a_warp_takes_nothing_from_outside_the_picture(cause: str) -> None:
    white, here = np.full((10, 320, 240, 3), 255, np.uint8), Face(np.tile((0.4, 0.15, 0.6, 0.3), (10, 1)), found=True)
    for seed in range(4):
        assert np.array_equal(degrade(white, cause, 1, seed, fps=5, face=here).frames, white)


def test_a_seam_is_an_edge_around_the_face() -> None:
    plain = np.full((2, 200, 200, 3), 120, np.uint8)
    here = Face(np.tile((0.3, 0.3, 0.7, 0.7), (2, 1)), found=True)
    for seed in range(6):
        shift = degrade(plain, "seam", 1, seed, face=here).frames[0].astype(float).mean(axis=-1) - 120
        assert abs(shift[120, 100]) > 10
        assert abs(shift[5, 5]) == 0
        assert np.abs(np.diff(shift[120])).max() > 0.5 * abs(shift[120, 100])


def test_identity_drifts_until_the_end(portrait: Pixels, face: Face) -> None:
    degraded = degrade(portrait, "identity_drift", 1, face=face).frames
    errors = [error(portrait[number], degraded[number]) for number in (0, 6, 12, 18, 23)]
    assert errors[0] == 0
    assert errors == sorted(errors)
    assert errors[-1] > 3


def test_a_bit_rate_switch_is_often_at_the_start(portrait: Pixels) -> None:
    starts = [degrade(portrait[:, :64, :64], "bitrate_switch", STRONG, seed).seconds[0] for seed in range(12)]
    assert 3 <= starts.count(0.0) <= 9


def test_buffering_holds_the_first_frame_and_delays_the_rest(numbered: Pixels) -> None:
    degraded = degrade(numbered, "buffering", 0.5, fps=10)
    assert [read_number(frame) for frame in degraded.frames] == [0] * 7 + list(range(17))
    assert degraded.seconds == (0.0, 0.7)


@pytest.mark.parametrize("strength", [MILD, STRONG, 1.0])
def test_a_stall_holds_one_frame(numbered: Pixels, strength: float) -> None:
    starts = set()
    for seed in range(5):
        degraded = degrade(numbered, "stall", strength, seed)
        held = round(24 * 0.8 * strength)
        start = round(degraded.seconds[0] * 25) - 1
        assert degraded.seconds[1] - degraded.seconds[0] == pytest.approx(held / 25)
        numbers = [read_number(frame) for frame in degraded.frames]
        assert numbers == [*range(start), *[start] * (held + 1), *range(start + held + 1, 24)]
        starts.add(start)
    assert len(starts) > 1


def test_dropped_frames_are_replaced_by_those_before(numbered: Pixels) -> None:
    assert [read_number(frame) for frame in degrade(numbered, "drop", 0).frames] == list(range(24))
    assert [read_number(frame) for frame in degrade(numbered, "drop", 1).frames] == [i // 12 * 12 for i in range(24)]
    half = [read_number(frame) for frame in degrade(numbered, "drop", 0.5).frames]
    assert all(shown <= number for number, shown in enumerate(half))
    assert len(set(half)) == 7  # 24 / 12 ** 0.5


def test_jitter_freezes_and_skips_but_never_goes_back(numbered: Pixels) -> None:
    for seed in range(5):
        shown = np.array([read_number(frame) for frame in degrade(numbered, "jitter", STRONG, seed).frames])
        steps = np.diff(shown)
        assert steps.min() == 0
        assert steps.max() > 1
        assert np.all(shown <= np.arange(24))


def test_the_seed_makes_random_choices(portrait: Pixels, face: Face) -> None:
    def one(cause: str, seed: int) -> Pixels:
        return degrade(portrait[:12], cause, 0.5, seed, face=Face(face.boxes[:12], True)).frames

    drawn = {
        cause for cause in DEGRADATIONS if any(not np.array_equal(one(cause, 0), one(cause, s)) for s in range(1, 4))
    }
    fixed = {"defocus", "mouth_smear", "teeth_smear", "overexposure", "underexposure", "banding", "blur", "rescale"}
    assert drawn == DEGRADATIONS.keys() - fixed - {"jpeg", "h264", "h265", "vp9", "av1", "buffering", "drop"}


def test_invalid_arguments_are_refused(numbered: Pixels, face: Face) -> None:
    with pytest.raises(ValueError, match=r"unknown degradation 'fog'; known: defocus, mouth_smear, "):
        degrade(numbered, "fog", 0.5)
    for strength in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=f"strength must be between 0 and 1, received {strength}"):
            degrade(numbered, "blur", strength)
    for frames in (numbered[0], numbered.astype(np.float32), numbered[..., :2]):
        with pytest.raises(ValueError, match=r"frames must be \(T, H, W, 3\) uint8, received"):
            degrade(frames, "blur", 0.5)
    with pytest.raises(ValueError, match="the face has boxes for 24 frames, and there are 5"):
        degrade(numbered[:5], "blur", 0.5, face=face)


@pytest.mark.parametrize("cause", COMPRESSION)
def test_encoders_are_reproducible(cause: str) -> None:
    small = np.stack([numbered_picture(number, 96, 64) for number in range(12)])
    noisy = degrade(small, "noise", 0.5, 3).frames
    assert len({degrade(noisy, cause, 0.5).frames.tobytes() for _ in range(12)}) == 1


def test_the_groups_contain_all_degradations() -> None:
    assert [*FACIAL, *PICTURE, *COMPRESSION, *TEMPORAL] == list(DEGRADATIONS)


def test_encoders_print_nothing(portrait: Pixels, capfd: pytest.CaptureFixture[str]) -> None:
    for cause in COMPRESSION:
        degrade(portrait[:3], cause, 0.5)
    assert capfd.readouterr() == ("", "")


def test_a_file_can_be_written(numbered: Pixels, tmp_path: Path) -> None:
    encode(numbered, "libx264", {"crf": "10"}, Fraction(30), str(tmp_path / "clip.mp4"))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].average_rate == 30
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert [picture.shape for picture in pictures] == [(94, 122, 3)] * 24
    assert [read_number(picture[:93, :121]) for picture in pictures] == list(range(24))


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="this system has no scheduling policies to ask for")
def test_an_encoder_does_not_change_the_scheduling(numbered: Pixels) -> None:
    before = os.sched_getscheduler(0)
    degrade(numbered, "av1", 0.5)
    assert os.sched_getscheduler(0) == before, "SVT-AV1 makes itself a real-time process where it may"
