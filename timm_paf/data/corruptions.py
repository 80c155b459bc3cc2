"""The 15 common corruptions of CIFAR-10-C and CIFAR-100-C, for images of 32 x 32 pixels.

D. Hendrycks and T. Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and Perturbations,
ICLR 2019, https://arxiv.org/abs/1903.12261. The parameters are those with which its authors made the two sets, weaker
than ImageNet-C's. The package imagecorruptions has ImageNet-C's parameters alone; from it come the pictures of frost.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from scipy.ndimage import map_coordinates, zoom
from skimage.color import hsv2rgb, rgb2hsv
from skimage.filters import gaussian
from skimage.util import random_noise

__all__ = ['PARAMETERS', 'SIDE', 'corrupt', 'frost_pictures']

SIDE = 32
"""Height and width of the images."""


def corrupt(image: np.ndarray, corruption: str, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Returns a corrupted image, uint8 (32, 32, 3).

    Args:
        image: uint8 (32, 32, 3).
        corruption: a key of `PARAMETERS`.
        severity: from 1 to 5.
        rng: what random parts are drawn from.

    Raises:
        ValueError: for images of another shape or type, an unknown corruption or severity.
    """
    if image.shape != (SIDE, SIDE, 3) or image.dtype != np.uint8:
        raise ValueError(f'the image is {image.dtype} {image.shape}; expected uint8 ({SIDE}, {SIDE}, 3)')
    if corruption not in PARAMETERS or severity not in range(1, 6):
        raise ValueError(f'no corruption {corruption!r} of severity {severity}; expected one of '
                         f'{", ".join(PARAMETERS)}, and 1 to 5')
    make, parameters = PARAMETERS[corruption]
    found = make(image, parameters[severity - 1], rng)
    # The authors' files hold values that were cut, not rounded, to integers.
    return found if found.dtype == np.uint8 else (np.clip(found, 0, 1) * 255).astype(np.uint8)


# Each of these takes the image, uint8, and its parameters of one severity. What it returns is a float image in which 0
# is black and 1 is white, with values outside, too, or the image as uint8.


def _gaussian_noise(image: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    return image / 255 + rng.normal(size=image.shape, scale=deviation)


def _shot_noise(image: np.ndarray, photons: float, rng: np.random.Generator) -> np.ndarray:
    return rng.poisson(image / 255 * photons) / photons


def _impulse_noise(image: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    found: np.ndarray = random_noise(image / 255, mode='s&p', rng=rng, amount=share)
    return found


def _defocus_blur(image: np.ndarray, parameters: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    radius, deviation = parameters
    x, y = np.meshgrid(np.arange(-8, 9), np.arange(-8, 9))
    disk = (x ** 2 + y ** 2 <= radius ** 2).astype(np.float32)
    return cv2.filter2D(image / 255, -1, cv2.GaussianBlur(disk / disk.sum(), (3, 3), sigmaX=deviation))


def _glass_blur(image: np.ndarray, parameters: tuple[float, int, int], rng: np.random.Generator) -> np.ndarray:
    deviation, distance, rounds = parameters
    found = (gaussian(image / 255, deviation, channel_axis=-1) * 255).astype(np.uint8)
    places = range(SIDE - distance, distance, -1)
    shifts = rng.integers(-distance, distance, size=(rounds, len(places), len(places), 2))
    for each in shifts.tolist():
        for row, of_row in zip(places, each):
            for column, (dx, dy) in zip(places, of_row):
                # The authors' code means to swap the two pixels. What it does is to copy one, and so do their files.
                found[row, column] = found[row + dy, column + dx]
    blurred: np.ndarray = gaussian(found / 255, deviation, channel_axis=-1)
    return blurred


def _motion_blur(image: np.ndarray, parameters: tuple[int, float], rng: np.random.Generator) -> np.ndarray:
    return _moved(image, *parameters, rng.uniform(-45, 45))


def _moved(image: np.ndarray, radius: int, deviation: float, angle: float) -> np.ndarray:
    """Returns an image blurred as ImageMagick's MotionBlurImage does, uint8 as the image.

    Args:
        image: uint8 (height, width) or (height, width, channels).
        radius: number of pixels on one side, of which a kernel of half a Gaussian has 2 radius + 1.
        deviation: standard deviation of that Gaussian, in pixels.
        angle: direction, in degrees.
    """
    along = np.arange(2 * radius + 1)
    kernel = np.exp(-along ** 2 / (2 * deviation ** 2))
    across, down = (np.ceil(along * part - 0.5).astype(int)
                    for part in (np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))))
    height, width = image.shape[:2]
    rows = np.clip(np.arange(height) + down[:, None], 0, height - 1)
    columns = np.clip(np.arange(width) + across[:, None], 0, width - 1)
    taken = image[rows[:, :, None], columns[:, None, :]].astype(float)
    # ImageMagick rounds to 16 bits, and cuts those to 8 where it writes the file.
    return (np.rint(257 * np.tensordot(kernel / kernel.sum(), taken, 1)) // 257).astype(np.uint8)


def _zoom_blur(image: np.ndarray, largest: float, rng: np.random.Generator) -> np.ndarray:
    sharp = (image / 255).astype(np.float32)
    factors = np.arange(1, largest, 0.01)
    total = np.zeros_like(sharp)
    for factor in factors:
        total += _zoomed(sharp, factor)
    return (sharp + total) / (len(factors) + 1)


def _zoomed(image: np.ndarray, factor: float) -> np.ndarray:
    """Returns the middle of a square image (side, side, channels), enlarged to its size."""
    side = len(image)
    kept = int(np.ceil(side / factor))
    first = (side - kept) // 2
    large: np.ndarray = zoom(image[first:first + kept, first:first + kept], (factor, factor, 1), order=1)
    first = (len(large) - side) // 2
    return large[first:first + side, first:first + side]


def _snow(image: np.ndarray, parameters: tuple[float, ...], rng: np.random.Generator) -> np.ndarray:
    mean, deviation, factor, least, radius, blur, kept = parameters
    flakes = _zoomed(rng.normal(size=(SIDE, SIDE), loc=mean, scale=deviation)[..., None], factor)[..., 0]
    flakes = np.where(flakes < least, 0, np.clip(flakes, 0, 1))
    fallen = _moved((flakes * 255).astype(np.uint8), int(radius), blur, rng.uniform(-135, -45))[..., None] / 255
    x = image.astype(np.float32) / 255
    pale = np.maximum(x, cv2.cvtColor(x, cv2.COLOR_RGB2GRAY)[..., None] * 1.5 + 0.5)
    return kept * x + (1 - kept) * pale + fallen + np.rot90(fallen, k=2)


def _frost(image: np.ndarray, parameters: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    of_image, of_frost = parameters
    frost = frost_pictures()[rng.integers(5)]  # the authors drew from five of their six pictures
    row, column = (int(rng.integers(0, length - SIDE)) for length in frost.shape[:2])
    frost = frost[row:row + SIDE, column:column + SIDE]
    return np.clip(of_image * image + of_frost * frost, 0, 255).astype(np.uint8)


@cache
def frost_pictures() -> tuple[np.ndarray, ...]:
    """Returns the pictures of frost, a fifth of their size, RGB.

    Raises:
        ModuleNotFoundError: without imagecorruptions, which brings them.
        ValueError: if one of them can't be read.
    """
    package = importlib.util.find_spec('imagecorruptions')  # found and not imported: it needs older packages
    if package is None or package.origin is None:
        raise ModuleNotFoundError("No module named 'imagecorruptions'")
    folder = Path(package.origin).with_name('frost')
    found = []
    for name in ('frost1.png', 'frost2.png', 'frost3.png', 'frost4.jpg', 'frost5.jpg'):
        picture = cv2.imread(str(folder / name))
        if picture is None:
            raise ValueError(f"{folder / name} can't be read; pip install --force-reinstall --no-deps imagecorruptions")
        found.append(cv2.resize(picture, (0, 0), fx=0.2, fy=0.2)[..., ::-1])
    return tuple(found)


def _fog(image: np.ndarray, parameters: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    thickness, decay = parameters
    x = image / 255
    most = x.max()
    return (x + thickness * _plasma(decay, rng)[..., None]) * most / (most + thickness)


def _plasma(decay: float, rng: np.random.Generator) -> np.ndarray:
    """Returns a random height map in [0, 1], (32, 32), by the diamond-square algorithm on a torus.

    Args:
        decay: the factor by which the random part shrinks where the grid is refined to half its step.
        rng: what the random part is drawn from.
    """
    heights = np.zeros((SIDE, SIDE))
    step, reach = SIDE, 100.0

    def around(total: np.ndarray) -> np.ndarray:
        return total / 4 + reach * rng.uniform(-reach, reach, total.shape)

    while step > 1:
        corners, centres = heights[::step, ::step], heights[step // 2::step, step // 2::step]
        left = corners + np.roll(corners, -1, 0)
        centres[:] = around(left + np.roll(left, -1, 1))
        heights[::step, step // 2::step] = around(
            centres + np.roll(centres, 1, 0) + (corners + np.roll(corners, -1, 1)))
        heights[step // 2::step, ::step] = around(
            centres + np.roll(centres, 1, 1) + (corners + np.roll(corners, -1, 0)))
        step, reach = step // 2, reach / decay
    heights -= heights.min()
    return heights / heights.max()


def _brightness(image: np.ndarray, more: float, rng: np.random.Generator) -> np.ndarray:
    hsv = rgb2hsv(image / 255)
    hsv[..., 2] = np.clip(hsv[..., 2] + more, 0, 1)
    found: np.ndarray = hsv2rgb(hsv)
    return found


def _contrast(image: np.ndarray, kept: float, rng: np.random.Generator) -> np.ndarray:
    x = image / 255
    mean = x.mean((0, 1), keepdims=True)
    return (x - mean) * kept + mean


def _elastic_transform(
        image: np.ndarray, parameters: tuple[float, float, float], rng: np.random.Generator) -> np.ndarray:
    strength, deviation, tilt = (SIDE * share for share in parameters)
    middle, reach = SIDE // 2, SIDE // 3
    corners = np.array([[reach, reach], [reach, -reach], [-reach, -reach]], np.float32) + np.float32(middle)
    moved = corners + rng.uniform(-tilt, tilt, size=corners.shape).astype(np.float32)
    x = cv2.warpAffine(image.astype(np.float32) / 255, cv2.getAffineTransform(corners, moved), (SIDE, SIDE),
                       borderMode=cv2.BORDER_REFLECT_101)
    across, down = (
        (gaussian(rng.uniform(-1, 1, size=(SIDE, SIDE)), deviation, mode='reflect', truncate=3) * strength)
        .astype(np.float32)[..., None] for _ in range(2))
    row, column, channel = np.indices(image.shape)
    found: np.ndarray = map_coordinates(x, (row + down, column + across, channel), order=1, mode='reflect')
    return found


def _pixelate(image: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    side = int(SIDE * share)
    small = Image.fromarray(image).resize((side, side), Image.Resampling.BOX)
    return np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BOX))


def _jpeg_compression(image: np.ndarray, quality: int, rng: np.random.Generator) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, 'JPEG', quality=quality)
    with Image.open(file) as opened:
        return np.asarray(opened)


Make = Callable[[np.ndarray, Any, np.random.Generator], np.ndarray]

PARAMETERS: dict[str, tuple[Make, tuple[Any, ...]]] = {
    'gaussian_noise': (_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    'shot_noise': (_shot_noise, (500, 250, 100, 75, 50)),
    'impulse_noise': (_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    'defocus_blur': (_defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    'glass_blur': (_glass_blur, ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))),
    'motion_blur': (_motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    'zoom_blur': (_zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    'snow': (_snow, (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8))),
    'frost': (_frost, ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
    'fog': (_fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    'brightness': (_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    'contrast': (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    'elastic_transform': (_elastic_transform, (
        (0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))),
    'pixelate': (_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    'jpeg_compression': (_jpeg_compression, (80, 65, 58, 50, 40))}
"""By name: the function, and its parameters of the five severities."""
