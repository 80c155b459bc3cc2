"""The corruptions that are made here are what their authors define, by closed forms, whatever the number of images.

With the same draws each of them gave, on 50 CIFAR-10 images of each severity, the pixels of the authors' own functions
and of ImageMagick 6.9, bit for bit.
"""

from __future__ import annotations

import colorsys
import io
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from timm_paf.data import ImageSet
from timm_paf.data.corrupted import CORRUPTIONS, SEVERITIES, generate_cifar_c

for package in ('cv2', 'skimage', 'imagecorruptions'):
    pytest.importorskip(package, reason="needs pip install 'timm-paf[corruptions]'")

from timm_paf.data.corruptions import PARAMETERS, corrupt, frost_pictures  # noqa: E402

GREY = np.full((32, 32, 3), 128, np.uint8)
BLACK = np.zeros_like(GREY)
WHITE = np.full_like(GREY, 255)
FIXED = SimpleNamespace(uniform=lambda low, high: 0.0)
"""A generator of which every angle is 0."""


def by_severity(*values: Any) -> list[tuple[int, Any]]:
    return list(enumerate(values, 1))


def smooth(n: int) -> np.ndarray:
    small = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    large = F.interpolate(small, size=(32, 32), mode='bicubic').clamp(0, 1)
    return (large * 255).byte().permute(0, 2, 3, 1).numpy()


def rough() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)


def made(image: np.ndarray, corruption: str, severity: int, seed: int = 0) -> np.ndarray:
    return corrupt(image, corruption, severity, np.random.default_rng((seed, severity)))


def test_their_names_are_those_of_the_files() -> None:
    assert tuple(PARAMETERS) == CORRUPTIONS
    assert len(set(CORRUPTIONS)) == 15
    assert all(len(parameters) == len(SEVERITIES) for _, parameters in PARAMETERS.values())


@pytest.mark.parametrize('corruption', CORRUPTIONS)
def test_the_image_stays_and_changes_with_severity_and_seed(corruption: str) -> None:
    image = smooth(1)[0]
    before, found = image.copy(), [made(image, corruption, severity) for severity in SEVERITIES]
    assert np.array_equal(image, before)
    assert all(each.dtype == np.uint8 and each.shape == image.shape for each in found)
    # Motion 3 and 4 differ in the radius alone, which is beyond their Gaussian, and in the angle.
    assert len({each.tobytes() for each in (image, *found)}) >= (5 if corruption == 'motion_blur' else 6)
    assert np.array_equal(made(image, corruption, 3), found[2])
    random = corruption not in (
        'defocus_blur', 'zoom_blur', 'brightness', 'contrast', 'pixelate', 'jpeg_compression')
    assert any(not np.array_equal(made(image, corruption, 3, seed), found[2]) for seed in range(1, 4)) == random


@pytest.mark.parametrize('corruption', sorted({*CORRUPTIONS} - {
    'glass_blur', 'motion_blur', 'frost', 'elastic_transform', 'pixelate'}))  # whose parameters do not grow, or hardly
def test_more_severe_is_further_away(corruption: str) -> None:
    images = smooth(12)
    away = [np.mean([abs(made(image, corruption, severity, seed).astype(float) - image).mean()
                     for seed, image in enumerate(images)]) for severity in SEVERITIES]
    assert away == sorted(away)


@pytest.mark.parametrize(('severity', 'deviation'), by_severity(0.04, 0.06, 0.08, 0.09, 0.10))
def test_gaussian_noise_has_its_moments(severity: int, deviation: float) -> None:
    found = made(GREY, 'gaussian_noise', severity) / 255
    # Cut to integers, it is half a level lower; 3,072 values tell the deviation to 1.3 %.
    assert found.mean() == pytest.approx((128 - 0.5) / 255, abs=4 * deviation / 3072 ** 0.5)
    assert found.std() == pytest.approx(deviation, rel=0.05)


@pytest.mark.parametrize(('severity', 'photons'), by_severity(500, 250, 100, 75, 50))
def test_shot_noise_is_of_so_many_photons(severity: int, photons: int) -> None:
    found = made(GREY, 'shot_noise', severity) / 255
    deviation = (128 / 255 / photons) ** 0.5
    assert found.mean() == pytest.approx((128 - 0.5) / 255, abs=4 * deviation / 3072 ** 0.5)
    assert found.std() == pytest.approx(deviation, rel=0.05)
    assert set(np.unique(made(GREY, 'shot_noise', severity))) <= {
        int(count / photons * 255) for count in range(photons + 1)}
    assert not made(BLACK, 'shot_noise', severity).any()


@pytest.mark.parametrize(('severity', 'share'), by_severity(0.01, 0.02, 0.03, 0.05, 0.07))
def test_impulse_noise_makes_a_share_black_or_white(severity: int, share: float) -> None:
    found = made(GREY, 'impulse_noise', severity)
    values, counts = np.unique(found, return_counts=True)
    assert values.tolist() == [0, 128, 255]
    error = 4 * (share / 2 / found.size) ** 0.5
    assert counts[[0, 2]] / found.size == pytest.approx(share / 2, abs=error)


@pytest.mark.parametrize(('severity', 'kernel'), by_severity(
    0.4, 0.5, 0.6, [[0, 0.2, 0], [0.2, 0.2, 0.2], [0, 0.2, 0]], [[1 / 9] * 3] * 3))
def test_defocus_blur_of_a_point_is_the_kernel(severity: int, kernel: float | list[list[float]]) -> None:
    """Up to severity 3 the disk is a point, so that the kernel is a Gaussian of 3 x 3; then a disk that stays sharp."""
    if isinstance(kernel, float):
        line = np.exp(-np.array([-1, 0, 1]) ** 2 / (2 * kernel ** 2))
        line /= line.sum()
        kernel = np.outer(line, line).tolist()
    image = BLACK.copy()
    image[10, 20] = 255
    found = made(image, 'defocus_blur', severity)
    np.testing.assert_allclose(found[9:12, 19:22], 255 * np.array(kernel)[..., None].repeat(3, 2), atol=1.01)
    found[9:12, 19:22] = 0
    assert not found.any()


def test_glass_blur_takes_each_pixel_from_beside_it() -> None:
    image = rough()
    found = made(image, 'glass_blur', 1).astype(int)  # whose Gaussian is too narrow to reach another pixel
    inner = found[2:, 2:]
    beside = [image[2 - down:32 - down, 2 - right:32 - right].astype(int) for down in (0, 1) for right in (0, 1)]
    away = np.min([abs(inner - each).max(2) for each in beside], 0)
    assert away.max() <= 2  # twice cut to integers
    taken = [(abs(inner - each).max(2) <= 2).mean() for each in beside]
    assert taken == pytest.approx(4 * [1 / 4], abs=0.08)


@pytest.mark.parametrize(('severity', 'parameters'), by_severity((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)))
def test_motion_blur_of_a_point_is_half_a_gaussian(severity: int, parameters: tuple[int, float]) -> None:
    radius, deviation = parameters
    image = BLACK.copy()
    image[16, 25] = 255
    found = corrupt(image, 'motion_blur', severity, FIXED)
    weights = np.exp(-np.arange(2 * radius + 1) ** 2 / (2 * deviation ** 2))
    weights *= 255 / weights.sum()
    np.testing.assert_allclose(found[16, 25 - 2 * radius:26][::-1], weights[:, None].repeat(3, 1), atol=1.01)
    found[16] = 0
    assert not found.any()


@pytest.mark.parametrize('corruption', ['defocus_blur', 'glass_blur', 'motion_blur', 'zoom_blur', 'elastic_transform',
                                        'pixelate', 'jpeg_compression', 'contrast'])
def test_an_image_of_one_colour_has_nothing_to_blur(corruption: str) -> None:
    for severity in SEVERITIES:
        found = made(GREY, corruption, severity).astype(int)
        assert abs(found - 128).max() <= 2  # twice cut to integers


@pytest.mark.parametrize(('severity', 'kept'), by_severity(0.95, 0.9, 0.9, 0.85, 0.8))
def test_snow_is_grey_on_a_paler_image(severity: int, kept: float) -> None:
    found = made(BLACK, 'snow', severity)
    assert (found == found[..., :1]).all()
    assert found.min() >= int((1 - kept) * 0.5 * 255) - 1
    least = int((kept + (1 - kept)) * 255) - 1
    assert made(WHITE, 'snow', severity).min() >= least


@pytest.mark.parametrize(('severity', 'parts'), by_severity((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)))
def test_frost_is_a_part_of_a_picture_on_the_image(severity: int, parts: tuple[float, float]) -> None:
    of_image, of_frost = parts
    frost, more = (made(np.full_like(GREY, level), 'frost', severity).astype(float) for level in (0, 100))
    inside = more < 255
    np.testing.assert_allclose((more - frost)[inside], of_image * 100, atol=1.01)
    frosts = [np.lib.stride_tricks.sliding_window_view(picture, (32, 32), (0, 1)) for picture in frost_pictures()]
    nearest = min(abs(windows * of_frost - frost.transpose(2, 0, 1)).max((2, 3, 4)).min() for windows in frosts)
    assert nearest <= 1


@pytest.mark.parametrize(('severity', 'thickness'), by_severity(0.2, 0.5, 0.75, 1, 1.5))
def test_fog_is_a_landscape_on_the_image(severity: int, thickness: float) -> None:
    point = BLACK.copy()
    point[0, 0] = 255  # the largest value, on which the fog depends
    fog, white = (made(image, 'fog', severity).astype(float) for image in (point, WHITE))
    np.testing.assert_allclose((white - fog)[1:, 1:], 255 / (1 + thickness), atol=1.01)
    # The landscape reaches from 0 to 1, in all channels alike.
    assert white.min() == pytest.approx(255 / (1 + thickness), abs=1.01)
    assert white.max() == pytest.approx(255, abs=1.01)
    assert (white == white[..., :1]).all()


@pytest.mark.parametrize(('severity', 'more'), by_severity(0.05, 0.1, 0.15, 0.2, 0.3))
def test_brightness_is_the_value_of_hsv(severity: int, more: float) -> None:
    image = rough()
    expected = []
    for pixel in image.reshape(-1, 3) / 255:
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        expected.append(colorsys.hsv_to_rgb(hue, saturation, min(1, value + more)))
    np.testing.assert_allclose(
        made(image, 'brightness', severity).reshape(-1, 3), np.floor(255 * np.array(expected)), atol=1)


@pytest.mark.parametrize(('severity', 'kept'), by_severity(0.75, 0.5, 0.4, 0.3, 0.15))
def test_contrast_shrinks_to_the_mean_of_each_channel(severity: int, kept: float) -> None:
    image = rough()
    mean = image.mean((0, 1))
    np.testing.assert_allclose(made(image, 'contrast', severity), np.floor((image - mean) * kept + mean), atol=1)


def test_elastic_transform_moves_no_pixel_further_than_its_parameters() -> None:
    """At severity 1, an affine map by up to 0.08 of the side at three of the corners of a square of 20 pixels."""
    ramp = np.broadcast_to((np.arange(32, dtype=np.uint8) * 8)[:, None], (32, 32))
    image = np.stack([ramp, ramp.T, ramp], 2)
    for seed in range(5):
        moved = (made(image, 'elastic_transform', 1, seed).astype(float) - image)[8:24, 8:24, :2] / 8
        assert 0.05 < abs(moved).max() < 3 * 0.08 * 32
        # An affine map of a ramp is a ramp.
        rows, columns = np.mgrid[8:24, 8:24].reshape(2, -1)
        plane = np.stack([rows, columns, np.ones_like(rows)], 1)
        for channel in range(2):
            left = np.linalg.lstsq(plane, moved[..., channel].ravel(), rcond=None)[1]
            assert (left / plane.shape[0]) ** 0.5 < 0.1


def box(length: int, to: int) -> np.ndarray:
    """Pillow's box filter, (to, length): the mean of the pixels whose middle lies in the new pixel."""
    scale = length / to
    away = (np.arange(length) + 0.5 - (np.arange(to)[:, None] + 0.5) * scale) / max(scale, 1)
    weights = (away > -0.5) & (away <= 0.5)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(('severity', 'side'), by_severity(30, 28, 27, 24, 20))
def test_pixelate_leaves_so_many_pixels(severity: int, side: int) -> None:
    image = rough()
    once = box(side, 32) @ box(32, side)
    expected = np.einsum('ij,jkc,lk->ilc', once, image.astype(float), once)
    np.testing.assert_allclose(made(image, 'pixelate', severity), expected, atol=2)


@pytest.mark.parametrize(('severity', 'quality'), by_severity(80, 65, 58, 50, 40))
def test_jpeg_is_of_its_quality(severity: int, quality: int) -> None:
    image, file = smooth(1)[0], io.BytesIO()
    Image.fromarray(image).save(file, 'JPEG', quality=quality)
    assert np.array_equal(made(image, 'jpeg_compression', severity), np.asarray(Image.open(file)))


@pytest.mark.parametrize('fault', [
    {'image': GREY[:31]}, {'image': GREY / 255}, {'corruption': 'rain'}, {'severity': 0}, {'severity': 6}])
def test_what_it_does_not_know_is_refused(fault: dict[str, object]) -> None:
    with pytest.raises(ValueError, match='expected'):
        corrupt(**{'image': GREY, 'corruption': 'fog', 'severity': 1, 'rng': np.random.default_rng(0), **fault})


def digits(n: int) -> ImageSet:
    return ImageSet('cifar10', torch.from_numpy(smooth(n)), torch.arange(n), 10)


@pytest.mark.parametrize('corruption', CORRUPTIONS)
def test_the_first_images_are_the_same_for_any_number(corruption: str) -> None:
    few, many = generate_cifar_c(digits(9), 3, 7), generate_cifar_c(digits(9), 9, 7)
    assert len(few) == 3
    assert torch.equal(few.labels, many.labels[:3])
    whole = many.read(corruption, 4, 0, 9)
    assert torch.equal(few.read(corruption, 4, 0, 3), whole[:3])
    assert torch.equal(many.read(corruption, 4, 5, 6), whole[5:6])
    assert few.about['generated']
    assert few.about['seed'] == 7
    assert {'numpy', 'scikit-image', 'imagecorruptions'} <= few.about['versions'].keys()


def test_each_image_corruption_and_severity_has_draws_of_its_own() -> None:
    same = ImageSet('cifar10', torch.from_numpy(np.stack([GREY] * 3)), torch.zeros(3, dtype=torch.long), 10)
    found = {image.numpy().tobytes() for seed in (0, 1) for severity in (1, 2)
             for image in generate_cifar_c(same, 3, seed).read('gaussian_noise', severity, 0, 3)}
    assert len(found) == 12


@pytest.mark.parametrize('package', ['cv2', 'imagecorruptions'])
def test_a_missing_package_is_named_with_its_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, 'timm_paf.data.corruptions')
    frost_pictures.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"{package}.*pip install 'timm-paf\[corruptions\]'"):
        generate_cifar_c(digits(1), 1, 0)
