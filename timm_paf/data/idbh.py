"""IDBH, an augmentation of small images that was searched for robustness, with a crop and a flip of its own.

Li, Spratling, "Data Augmentation Alone Can Improve Adversarial Training", ICLR 2023, https://arxiv.org/abs/2301.09879.
"""

from __future__ import annotations

import math

import torch
from PIL import Image
from torchvision.transforms import functional as F

__all__ = ['idbh']

LONGEST_SHIFT = 10
"""Pixels, in rows and columns together, that a crop takes away at most."""

CHANGES = {
    'saturation': (0.1, 1.9), 'brightness': (0.5, 1.9), 'contrast': (0.5, 1.9), 'sharpness': (0.1, 1.9),
    'autocontrast': None, 'equalize': None, 'shear': (0.05, 0.15), 'rotate': (1, 11)}
"""The changes of colour and shape, one of which an image gets, and the strengths of each: factors; the shear in
radians; of a rotation whole degrees below the second."""

ERASED = (0.02, 0.33), tuple(torch.tensor((0.3, 3.3)).log().tolist())
"""Bounds of the share of an image that is erased, and of the logarithm of the box's height over its width."""


def idbh(image: Image.Image, generator: torch.Generator, erase: float) -> Image.Image:
    """Returns an image mirrored every other time, cropped and shifted, changed in colour or shape, and erased.

    Random numbers are drawn in the order of the authors' code, so that the same state of the generator gives the image
    that theirs gives.

    Args:
        image: an image of about 32 x 32 pixels, RGB.
        generator: the only source of randomness, on the CPU.
        erase: probability that a box becomes black; 0.5 in the weak version for CIFAR-10, 1 in the strong one.
    """
    if _uniform(generator) < 0.5:
        image = F.hflip(image)
    image = _changed(_shifted(image, generator), generator)
    if _uniform(generator) < erase:
        _erase(image, generator)
    return image


def _uniform(generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    return float(torch.rand(1, generator=generator) * (high - low) + low)


def _integer(generator: torch.Generator, low: int, end: int) -> int:
    return int(torch.randint(low, end, (1,), generator=generator))


def _shifted(image: Image.Image, generator: torch.Generator) -> Image.Image:
    """Returns a crop of an image at another place of a black image of the same size (the authors' CropShift)."""
    lost = _integer(generator, 0, LONGEST_SHIFT + 1)
    lost_cols = _integer(generator, 0, lost + 1)
    lost_rows = lost - lost_cols
    (left, top), (right, below) = ((_integer(generator, 0, lost_cols + 1), _integer(generator, 0, lost_rows + 1))
                                   for _ in range(2))
    # Theirs is padded on all sides and cut out again at a place that is drawn.
    moved = Image.new(image.mode, image.size)
    width, height = image.width - lost_cols, image.height - lost_rows
    moved.paste(image.crop((left, top, left + width, top + height)), (lost_cols - right, lost_rows - below))
    return moved


def _changed(image: Image.Image, generator: torch.Generator) -> Image.Image:
    name, strengths = list(CHANGES.items())[int(_uniform(generator) * len(CHANGES))]
    if strengths is None:
        return F.autocontrast(image) if name == 'autocontrast' else F.equalize(image)
    if name == 'rotate':
        whole = _integer(generator, *map(int, strengths))
        return F.rotate(image, -whole if _integer(generator, 0, 2) else whole)
    strength = _uniform(generator, *strengths)
    if name == 'shear':
        degrees = math.degrees(-strength if _integer(generator, 0, 2) else strength)
        shear = [degrees, 0.0] if _integer(generator, 0, 2) else [0.0, degrees]
        return F.affine(image, angle=0.0, translate=[0, 0], scale=1.0, shear=shear)
    return getattr(F, f'adjust_{name}')(image, strength)


def _erase(image: Image.Image, generator: torch.Generator) -> None:
    """Blackens a box of an image in place, as torchvision's RandomErasing draws it; nothing if ten boxes do not fit.

    Zhong et al., Random Erasing Data Augmentation, https://arxiv.org/abs/1708.04896.
    """
    for _ in range(10):
        area, log_ratio = (torch.empty(1).uniform_(*bounds, generator=generator) for bounds in ERASED)
        pixels, ratio = image.height * image.width * area.item(), log_ratio.exp().item()
        height, width = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if height < image.height and width < image.width:
            top = _integer(generator, 0, image.height - height + 1)
            left = _integer(generator, 0, image.width - width + 1)
            image.paste((0, 0, 0), (left, top, left + width, top + height))
            return
