"""Seeded batches of a data set that is held whole on the device, with synthetic images beside them.

Every random choice is a function of (seed, epoch, step), so a run resumes at any step without a saved sampler, and the
global batch is the same set of images whatever the number of processes.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor

from .images import ImageSet, derive_seed, to_float

__all__ = ['Batches', 'RandomAccess', 'SyntheticImages', 'cutmix', 'mixup', 'training_batch']


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


class SyntheticImages(Protocol):
    """The part of a `synthetic.SyntheticSet` that `Batches` needs."""

    name: str
    image_shape: tuple[int, ...]
    num_classes: int

    def __getitem__(self, indices: np.ndarray) -> tuple[Tensor, Tensor]: ...

    def order(self, positions: np.ndarray, seed: int) -> np.ndarray: ...


class Batches:
    """The augmented training batches of one process, by the number of the step.

    With synthetic images each batch has ``round(batch_size * fraction)`` of them after the real ones. They go round in
    an order of their own, without replacement until all were seen; an epoch is one pass over the real images.

    Args:
        data: the training images; moved to ``device`` whole.
        batch_size: images of a batch over all processes together, real and synthetic.
        seed: seed of order and augmentation.
        device: where batches are made.
        rank, world: number of this process, from 0, and how many there are.
        synthetic: images that stay on the disk; those of the next step are read while this one is at work.
        fraction: share of the batch that is synthetic, between 0 and 1; not used without ``synthetic``.

    Raises:
        ValueError: if the batch can't be divided among the processes or is larger than the data set, or if synthetic
            images differ from the real ones in shape or number of classes.
    """

    def __init__(
            self, data: ImageSet, batch_size: int, seed: int, device: torch.device | str,
            rank: int = 0, world: int = 1, synthetic: SyntheticImages | None = None, fraction: float = 0.5):
        if batch_size < 1 or batch_size % world:
            raise ValueError(f'batch size is {batch_size}; expected a positive multiple of the {world} processes')
        made = 0 if synthetic is None else round(batch_size * fraction)
        real = batch_size - made
        if synthetic is not None:
            _check_synthetic(data, synthetic, batch_size, fraction, world)
        if real > len(data):
            raise ValueError(
                f'batch size is {batch_size}{f" with {real} real images" if made else ""}; {data.name} has {len(data)} '
                'training images, expected at most that')
        self.data, self.synthetic = data, synthetic
        self.images, self.labels = data.images.to(device), data.labels.to(device)
        self.batch_size, self.seed = batch_size, seed
        self.steps_per_epoch = len(data) // real
        self._real, self._made = real, made
        self._mine = slice(rank * real // world, (rank + 1) * real // world)
        self._mine_made = slice(rank * made // world, (rank + 1) * made // world)
        self._order: tuple[int, Tensor] | None = None
        self._reader = ThreadPoolExecutor(1, 'synthetic') if synthetic is not None else None
        self._ahead: tuple[int, Future[tuple[Tensor, Tensor]]] | None = None

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Returns the images (batch, channels, height, width), float32 in [0, 1], and labels of a step, from 0."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, 0, epoch))
            self._order = epoch, torch.randperm(len(self.data), generator=generator)
        chosen = self._order[1][index * self._real:(index + 1) * self._real]
        # Random numbers are drawn for the global batch and then cut, so an image is augmented alike in any process.
        generator = torch.Generator().manual_seed(derive_seed(self.seed, 1, step))
        pad = self.data.pad
        shift = self._share(torch.randint(2 * pad + 1, (self.batch_size, 2), generator=generator))
        flip = self._share(torch.rand(self.batch_size, generator=generator)) < 0.5
        device = self.images.device
        chosen = self._to_device(chosen[self._mine])
        x, y = self.images[chosen], self.labels[chosen]
        if self._reader is not None:
            images, labels = self._read_synthetic(step, self._reader)
            x, y = torch.cat([x, self._to_device(images)]), torch.cat([y, self._to_device(labels)])
        height, width = x.shape[1:3]
        cols = torch.arange(width).repeat(len(flip), 1)
        if self.data.flip:
            cols = torch.where(flip[:, None], width - 1 - cols, cols)
        rows = self._to_device(torch.arange(height) + shift[:, :1])
        cols = self._to_device(cols + shift[:, 1:])
        x = F.pad(x, (0, 0, pad, pad, pad, pad))
        sample = torch.arange(len(x), device=device)
        return to_float(x[sample[:, None, None], rows[:, :, None], cols[:, None, :]]), y

    def _share(self, drawn: Tensor) -> Tensor:
        """Returns this process's part of the numbers for the global batch, in which real images come first."""
        return torch.cat([drawn[:self._real][self._mine], drawn[self._real:][self._mine_made]])

    def _read_synthetic(self, step: int, reader: ThreadPoolExecutor) -> tuple[Tensor, Tensor]:
        """Returns the synthetic images of a step, read ahead if the last step was the one before; begins the next."""
        ahead, self._ahead = self._ahead, None
        rows = ahead[1].result() if ahead is not None and ahead[0] == step else self._synthetic_rows(step)
        self._ahead = step + 1, reader.submit(self._synthetic_rows, step + 1)
        return rows

    def _synthetic_rows(self, step: int) -> tuple[Tensor, Tensor]:
        assert self.synthetic is not None
        positions = step * self._made + np.arange(self._mine_made.start, self._mine_made.stop)
        return self.synthetic[self.synthetic.order(positions, derive_seed(self.seed, 3))]

    def _to_device(self, small: Tensor) -> Tensor:
        # From pinned memory the copy runs while the host continues.
        device = self.images.device
        return (small.pin_memory() if device.type == 'cuda' else small).to(device, non_blocking=True)


def _check_synthetic(
        data: ImageSet, synthetic: SyntheticImages, batch_size: int, fraction: float, world: int) -> None:
    if synthetic.image_shape != tuple(data.images.shape[1:]) or synthetic.num_classes != data.num_classes:
        raise ValueError(
            f'{synthetic.name} has images {synthetic.image_shape} of {synthetic.num_classes} classes; expected '
            f'{tuple(data.images.shape[1:])} of {data.num_classes}, like {data.name}')
    if not 0 < fraction < 1:
        raise ValueError(f'the synthetic fraction is {fraction}; expected between 0 and 1, both excluded')

    def divides(size: int) -> bool:
        made = round(size * fraction)
        return 0 < made < size and made % world == 0 and (size - made) % world == 0

    if not divides(batch_size):
        made = round(batch_size * fraction)
        near = next((size for size in range(batch_size + 1, batch_size + 10_000) if divides(size)), None)
        raise ValueError(
            f'batch size {batch_size} with a synthetic fraction of {fraction} is {batch_size - made} real and {made} '
            f'synthetic images; expected positive multiples of the {world} processes'
            + (f', as with batch size {near}' if near else ', with another fraction'))


class RandomAccess(Protocol):
    """The part of batches that training needs: the batch of a step by its number, and how many make an epoch."""

    @property
    def data(self) -> Any: ...

    @property
    def steps_per_epoch(self) -> int: ...

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
