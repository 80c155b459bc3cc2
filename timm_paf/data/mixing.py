"""A batch as training sees it: shuffled where generated images come last, and mixed by CutMix or mixup.

Every random choice is a function of (seed, step), and of the process where the function says so.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor

from .images import derive_seed

__all__ = ['RandomAccess', 'cutmix', 'mixup', 'training_batch']


def cutmix(
        x: Tensor, y: Tensor, num_classes: int, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pastes one box of another image of the batch into each image, and mixes the labels by its area.

    Yun et al., CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features, ICCV 2019,
    https://arxiv.org/abs/1905.04899. The batch has one box, cut off where it leaves the image.

    Args:
        x: images (n, channels, height, width); not changed.
        y: labels (n,) in [0, num_classes).
        num_classes: number of classes, the width of the mixed labels.
        alpha: parameter of Beta(alpha, alpha), from which the share of the own image is drawn before the box is cut
            off; above 0.
        generator: the only source of randomness; with one on the CPU the host waits for no device.

    Returns:
        Images like ``x``, and float32 labels (n, num_classes) that sum to 1.
    """
    if not alpha > 0:
        raise ValueError(f'the alpha of CutMix is {alpha}; expected above 0')
    # NumPy draws, because torch has no Beta distribution that takes a generator.
    rng = np.random.default_rng(int(torch.randint(2 ** 62, (), generator=generator, device=generator.device)))
    height, width = x.shape[2:]
    side = np.sqrt(1 - rng.beta(alpha, alpha))
    bounds = []
    for length in (height, width):
        centre, half = int(rng.integers(length)), int(length * side) // 2
        bounds.append(slice(max(centre - half, 0), min(centre + half, length)))
    chosen = torch.from_numpy(rng.permutation(len(x)))
    partner = (chosen.pin_memory() if x.is_cuda else chosen).to(x.device, non_blocking=True)
    mixed = x.clone()
    mixed[:, :, bounds[0], bounds[1]] = x[partner][:, :, bounds[0], bounds[1]]
    share = (bounds[0].stop - bounds[0].start) * (bounds[1].stop - bounds[1].start) / (height * width)
    labels = F.one_hot(y, num_classes).float()
    return mixed, labels * (1 - share) + labels[partner] * share


def mixup(
        x: Tensor, y: Tensor, num_classes: int, alpha: float, cutmix_alpha: float, seed: int) -> tuple[Tensor, Tensor]:
    """Mixes each image and its label with its neighbour's, the first with the second and so on, as timm's `Mixup`.

    Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018, https://arxiv.org/abs/1710.09412. The share is
    one for the batch, and neighbours are in one process, so an image is mixed alike in any number of processes.

    Args:
        x: images (n, channels, height, width) in [0, 1]; n is even.
        y: labels (n,) in [0, num_classes).
        num_classes: number of classes, the width of the mixed labels.
        alpha: parameter of Beta(alpha, alpha), from which the share of the own image is drawn; above 0.
        cutmix_alpha: that of CutMix, which every other batch on average has in place of mixup; 0 for none.
        seed: the only source of randomness.

    Returns:
        Images like ``x``, and float32 labels (n, num_classes) that sum to 1.

    Raises:
        ValueError: for an odd number of images.
    """
    if len(x) % 2:
        raise ValueError(f'mixup pairs the images of a batch and a process has {len(x)}; expected an even number')
    # timm pairs the first image with the last, so neighbours go to opposite places.
    order = torch.cat([torch.arange(0, len(x), 2), torch.arange(1, len(x), 2).flip(0)])
    back = order.argsort()
    order, back = ((each.pin_memory() if x.is_cuda else each).to(x.device, non_blocking=True) for each in (order, back))
    mix = Mixup(alpha, cutmix_alpha, label_smoothing=0.0, num_classes=num_classes)
    before = np.random.get_state()
    np.random.seed(seed % 2 ** 32)  # timm draws from NumPy's global generator
    try:
        images, labels = mix(x[order], y[order])
    finally:
        np.random.set_state(before)
    return images.clamp_(0, 1)[back], labels[back]  # of rounding; an attack starts within [0, 1]


class RandomAccess(Protocol):
    """The part of batches that training needs: the batch of a step by its number, how many make an epoch, and how many
    images the last of these has."""

    @property
    def data(self) -> Any: ...

    @property
    def steps_per_epoch(self) -> int: ...

    @property
    def last_size(self) -> int: ...

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]: ...


def training_batch(
        batches: RandomAccess, step: int, seed: int, rank: int = 0, *, shuffle: bool = False, alpha: float = 0.0,
        mixup_alpha: float = 0.0) -> tuple[Tensor, Tensor]:
    """Returns the batch of a step as training sees it: shuffled, and mixed by CutMix or mixup where that is asked for.

    Args:
        batches: the batches of this process.
        step: optimizer step, from 0.
        seed: seed of the shuffle and of the mixing.
        rank: number of this process; each process has boxes and partners of its own for CutMix without mixup.
        shuffle: whether the images of the batch change places, because synthetic ones come last.
        alpha: parameter of `cutmix`, at least 0; 0 for none.
        mixup_alpha: parameter of `mixup`, at least 0; 0 for none. With both, a batch is mixed by one of the two.

    Returns:
        Images (batch, channels, height, width) in [0, 1], and labels (batch,), or mixed ones (batch, classes).
    """
    x, y = batches[step]
    if mixup_alpha:  # before the shuffle, which is another one for each number of processes
        x, y = mixup(x, y, batches.data.num_classes, mixup_alpha, alpha, derive_seed(seed, 9, step))
    if shuffle:  # else parts of an accumulated batch would be all real or all synthetic
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(derive_seed(seed, 7, step)))
        order = (order.pin_memory() if x.is_cuda else order).to(x.device, non_blocking=True)
        x, y = x[order], y[order]
    if alpha and not mixup_alpha:
        generator = torch.Generator().manual_seed(derive_seed(seed, 6, step, rank))
        x, y = cutmix(x, y, batches.data.num_classes, alpha, generator)
    return x, y
