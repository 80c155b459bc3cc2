"""Images that are held out of a training set, as many of each class."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch

from .images import ImageSet, derive_seed
from .indexed import IndexedImages

__all__ = ['split_validation']

Images = TypeVar('Images', ImageSet, IndexedImages)


def split_validation(data: Images, n: int, seed: int) -> tuple[Images, Images]:
    """Holds out ``n`` images, as many of each class; where that leaves a rest, some classes give one more.

    Args:
        data: the training images, an `ImageSet` or an `IndexedImages`; not changed.
        n: number of images to hold out.
        seed: seed of the choice.

    Returns:
        The images to train on and those held out, both in the order they had; a pure function of ``seed``.

    Raises:
        ValueError: if a class has too few images to keep one for training.
    """
    if n < 1:
        raise ValueError(f'{n} images to hold out of {data.name}; expected at least 1')
    generator = torch.Generator().manual_seed(derive_seed(seed, 5))
    held_out = torch.zeros(len(data), dtype=torch.bool)
    for place, label in enumerate(torch.randperm(data.num_classes, generator=generator).tolist()):
        members = (data.labels == label).nonzero().flatten()
        count = n // data.num_classes + (place < n % data.num_classes)
        if count and count >= len(members):
            raise ValueError(f'{n} held-out images are {count} of class {label}, of which {data.name} has '
                             f'{len(members)}; expected fewer, so that some are left for training')
        held_out[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return data.take(~held_out), replace(data.take(held_out), name=f'{data.name}-val')
