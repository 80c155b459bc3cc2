"""Augmentation by policies, drawn for each image from a seed of its own in whatever thread makes it."""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import auto_augment, create_transform, random_erasing
from timm.data.constants import IMAGENET_DEFAULT_MEAN
from torch import Tensor
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from ..wording import reason_of
from .idbh import idbh

__all__ = ['POLICIES_WITH_CROP', 'Augmentation']

POLICIES_WITH_CROP = {'idbh-weak': 0.5, 'idbh-strong': 1.0}
"""Policies for small images that have their own crop and flip, and how probably each erases a box."""

GREY = np.array([round(255 * value) for value in IMAGENET_DEFAULT_MEAN], np.uint8)
"""ImageNet's mean, with which timm fills what a policy leaves empty, and what is erased."""


class _Drawn(threading.local):
    """The generators of this thread while it augments an image, else None; NumPy's is made when it is asked for."""

    python: Any = None
    numpy: Callable[[], Any] | None = None
    torch: torch.Generator | None = None


class _Module:
    """A module with other functions where ``find`` has them, such as those of this thread's generator."""

    def __init__(self, module: Any, find: Callable[[str], Any]):
        self._module, self._find = module, find

    def __getattr__(self, name: str) -> Any:
        return self._find(name) or getattr(self._module, name)


_drawn = _Drawn()
_random = _Module(random, lambda name: getattr(_drawn.python, name, None))
_numpy = _Module(np, lambda name: _drawn.numpy() if name == 'random' and _drawn.numpy is not None else None)
_image_ops = _Module(ImageOps, lambda name: _posterize if name == 'posterize' else None)


def _posterize(image: Image.Image, bits: int) -> Image.Image:
    """Returns an image of so many bits; newer Pillow refuses 0, which timm asks for at a policy's highest level."""
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)


def _jitter(*bounds: tuple[float, float] | None) -> tuple[Any, ...]:
    """Draws what torchvision's ColorJitter does: the order of its parts, and the strength of each."""
    order = torch.randperm(4, generator=_drawn.torch)
    return order, *(None if each is None else float(torch.empty(1).uniform_(*each, generator=_drawn.torch))
                    for each in bounds)


def _auto_augment(policies: int) -> tuple[int, Tensor, Tensor]:
    """Draws what torchvision's AutoAugment does: which policy, whether each of its two parts is done, and the signs."""
    policy = int(torch.randint(policies, (1,), generator=_drawn.torch))
    return policy, torch.rand(2, generator=_drawn.torch), torch.randint(2, (2,), generator=_drawn.torch)


def _idbh(erase: float, image: Image.Image) -> Image.Image:
    assert _drawn.torch is not None
    return idbh(image, _drawn.torch, erase)


class Augmentation:
    """The augmentation after crop and flip: a policy or a change of colours, then random erasing.

    An image with a seed becomes what timm's and torchvision's transforms make of it with all generators at that seed.
    timm draws from the module ``random``, which all threads share; here the names that its modules have for ``random``
    and NumPy lead to generators of the thread while it augments, and to the modules themselves otherwise.

    Args:
        size: side of the images in pixels.
        aa: policy: RandAugment, AutoAugment or AugMix in timm's words, such as 'rand-m9-mstd0.5-inc1'; 'cifar10',
            torchvision's AutoAugment for CIFAR-10; one of `POLICIES_WITH_CROP`; None for none.
        color_jitter: strength of random brightness, contrast and saturation; timm leaves it out beside most policies.
        reprob: probability that a box is erased, which then has ImageNet's mean colour (timm's mode 'const').

    Attributes:
        crops: whether the policy has its own crop and flip, so that an image comes to it as it is.

    Raises:
        ValueError: for a policy that is unknown.
    """

    def __init__(self, size: int, aa: str | None = None, color_jitter: float = 0.0, reprob: float = 0.0):
        self.options = {'aa': aa, 'color_jitter': color_jitter, 'reprob': reprob}
        self.crops = aa in POLICIES_WITH_CROP
        policy: Any = None
        if self.crops:
            policy = functools.partial(_idbh, POLICIES_WITH_CROP[str(aa)])
        elif aa == 'cifar10':
            policy = AutoAugment(AutoAugmentPolicy.CIFAR10)
            policy.get_params = _auto_augment
        try:
            _, made, _ = create_transform(
                size, is_training=True, auto_augment=aa if policy is None else None, color_jitter=color_jitter or None,
                interpolation='bicubic', separate=True)
        except (AssertionError, ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"--aa {aa} is none of timm's policies ({reason_of(error)}); expected one such as "
                             f'rand-m9-mstd0.5-inc1, original or v0, or cifar10, {", ".join(POLICIES_WITH_CROP)}'
                             ) from error
        self._transforms: list[Any] = made.transforms
        for each in self._transforms:
            if hasattr(each, 'get_params'):
                each.get_params = _jitter
        if policy is not None:
            self._transforms.insert(0, policy)
        self._erase = random_erasing.RandomErasing(reprob, mode='const', device='cpu') if reprob else None
        auto_augment.random = random_erasing.random = _random
        auto_augment.np, auto_augment.ImageOps = _numpy, _image_ops

    def __call__(self, pixels: np.ndarray, seed: int) -> np.ndarray:
        """Returns an image (size, size, 3) uint8 augmented, a function of it and of the seed, from 0 to 2^63, alone."""
        _drawn.python = random.Random(seed)
        _drawn.numpy = functools.cache(lambda: np.random.RandomState(seed % 2 ** 32))
        _drawn.torch = torch.Generator().manual_seed(seed)
        try:
            image = Image.fromarray(pixels)
            for transform in self._transforms:
                image = transform(image)
            found = np.asarray(image)
            if self._erase is not None:
                kept: Tensor = self._erase(torch.ones(1, *found.shape[:2], dtype=torch.bool))[0]
                found = np.where(kept.numpy()[:, :, None], found, GREY)
            return found
        finally:
            _drawn.python = _drawn.numpy = _drawn.torch = None
