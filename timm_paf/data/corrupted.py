"""Test images under 15 common corruptions of five severities: those of files, or of CIFAR made here.

D. Hendrycks and T. Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and Perturbations,
ICLR 2019, https://arxiv.org/abs/1903.12261. CIFAR-10-C is at https://zenodo.org/records/2535967,
CIFAR-100-C at https://zenodo.org/records/3555552.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files import is_of_machine
from ..wording import reason_of
from .images import ImageSet, derive_seed

__all__ = ['CORRUPTIONS', 'KINDS', 'MAKERS', 'SEVERITIES', 'CorruptedImages', 'generate_cifar_c', 'open_cifar_c']

KINDS = {
    'noise': ('gaussian_noise', 'shot_noise', 'impulse_noise'),
    'blur': ('defocus_blur', 'glass_blur', 'motion_blur', 'zoom_blur'),
    'weather': ('snow', 'frost', 'fog', 'brightness'),
    'digital': ('contrast', 'elastic_transform', 'pixelate', 'jpeg_compression')}
"""The names of the corruptions, as those of their files, by kind."""

CORRUPTIONS = tuple(name for names in KINDS.values() for name in names)

SEVERITIES = range(1, 6)

MAKERS = ('numpy', 'scipy', 'scikit-image', 'opencv-python', 'opencv-python-headless', 'pillow', 'imagecorruptions')
"""Packages on which generated images depend."""

_WHOLE = 10_000  # test images of CIFAR, of which a file has those of severity 1, then those of 2, and so on


@dataclass(frozen=True)
class CorruptedImages:
    """The same images under each corruption and severity, read a few at a time.

    Args:
        name: of the set.
        labels: (n,) int64, the same under each corruption.
        read: takes corruption, severity, and the first and the last + 1 of some images; returns uint8
            (k, height, width, 3).
        about: what they depend on, for JSON: ``generated``, and ``data_sha256``, or ``seed`` and ``versions``.
    """

    name: str
    labels: Tensor
    read: Callable[[str, int, int, int], Tensor]
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.labels)


def open_cifar_c(folder: Path, n: int) -> CorruptedImages:
    """Returns the first ``n`` images of each severity in the files of CIFAR-10-C or CIFAR-100-C, read as needed.

    Args:
        folder: the directory with a .npy file for each corruption, uint8 (50000, 32, 32, 3), and labels.npy, (50000,).
        n: at most 10,000.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is no such array, or the labels are not the same for each severity.
    """
    missing = [f'{name}.npy' for name in (*CORRUPTIONS, 'labels') if not (folder / f'{name}.npy').is_file()]
    if missing:
        raise FileNotFoundError(f'{folder} lacks {", ".join(missing)}; expected the 15 corruptions and labels.npy: '
                                'fetch it again, or move the directory away to have its images generated')
    total = len(SEVERITIES) * _WHOLE
    arrays = {name: _open(folder / f'{name}.npy', (total, 32, 32, 3)) for name in CORRUPTIONS}
    labels = np.asarray(_open(folder / 'labels.npy', (total,)))
    if (labels.reshape(-1, _WHOLE) != labels[:_WHOLE]).any():
        raise ValueError(f'{folder}/labels.npy has other labels for each severity; expected the same ones: fetch it '
                         'again')

    def read(corruption: str, severity: int, first: int, last: int) -> Tensor:
        start = (severity - 1) * _WHOLE
        return torch.from_numpy(np.array(arrays[corruption][start + first:start + last]))

    digest = hashlib.sha256(labels[:n].astype(np.int64).tobytes())
    for name in CORRUPTIONS:
        for severity in SEVERITIES:
            digest.update(read(name, severity, 0, n).numpy().tobytes())
    return CorruptedImages(folder.name, torch.from_numpy(labels[:n].astype(np.int64)), read,
                           {'generated': False, 'data_sha256': digest.hexdigest()})


def _open(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        found: np.ndarray = np.lib.format.open_memmap(path, mode='r')
    except (ValueError, OSError) as error:
        if isinstance(error, PermissionError) or is_of_machine(error):
            raise
        raise ValueError(f'{path} is no .npy array ({reason_of(error)}); fetch it again') from error
    if found.shape != shape or found.dtype.kind not in 'ui' or (len(shape) > 1 and found.dtype != np.uint8):
        raise ValueError(f'{path} is {found.dtype} {found.shape}; expected uint8 {shape}')
    return found


def generate_cifar_c(data: ImageSet, n: int, seed: int) -> CorruptedImages:
    """Returns the first ``n`` test images of CIFAR with corruptions made here, each time that they are read.

    All that is random in an image is a function of the seed, its corruption, severity and number alone.

    Raises:
        ValueError: if a package of the extra ``corruptions`` is missing.
    """
    try:
        from .corruptions import corrupt, frost_pictures

        frost_pictures()
    except ImportError as error:
        raise ValueError(f'to generate corrupted images of {data.name}, a package is missing ({error}); '
                         "pip install 'timm-paf[corruptions]'") from error
    versions = {}
    for name in MAKERS:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)

    def read(corruption: str, severity: int, first: int, last: int) -> Tensor:
        number = CORRUPTIONS.index(corruption)
        return torch.from_numpy(np.stack([
            corrupt(data.images[index].numpy(), corruption, severity, np.random.default_rng(
                derive_seed(seed, number, severity, index))) for index in range(first, last)]))

    return CorruptedImages(f'generated from {data.name}, seed {seed}', data.labels[:n], read,
                           {'generated': True, 'seed': seed, 'versions': versions})
