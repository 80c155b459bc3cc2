"""Seeded batches of a data set that is held whole in memory, with synthetic images beside them.

Every random choice is a function of (seed, epoch, step), so a run resumes at any step without a saved sampler, and the
global batch is the same set of images whatever the number of processes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .augmentation import Augmentation
from .images import ImageSet, derive_seed, to_float
from .steps import cores, epoch_steps, share

__all__ = ['PAD_MODES', 'Batches', 'SyntheticImages']

PAD_MODES = ('zeros', 'reflect')
"""What an image is padded with before it is cropped: black, or the image mirrored at its edge, as NumPy's 'reflect'."""

TOGETHER = 16
"""Images that a thread augments at a time."""

Rows = tuple[Tensor, Tensor]
"""Images (m, height, width, channels) uint8, and their labels (m,)."""


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
    an order of their own, without replacement until all were seen; an epoch is one pass over the real images. What the
    host does for a step, to read synthetic images and to augment, is done while the step before is at work.

    Args:
        data: the training images; moved to ``device`` whole, unless there is an ``augmentation``.
        batch_size: images of a batch over all processes together, real and synthetic.
        seed: seed of order and augmentation.
        device: where batches are put.
        rank, world: number of this process, from 0, and how many there are.
        synthetic: images that stay on the disk.
        fraction: share of the batch that is synthetic, between 0 and 1; not used without ``synthetic``.
        pad_mode: one of `PAD_MODES`.
        augmentation: changes each image on the host after crop and flip, or in place of them where it has its own, by a
            seed of the epoch and the image; None for crop and flip alone.
        synthetic_augment: whether synthetic images are cropped, flipped and augmented like the real ones.
        drop_last: whether an epoch ends with the last whole batch; else its last batch has the real images that are
            left, and as many synthetic ones as the others.
        workers: number of threads that augment; default: the cores that this process may use.

    Attributes:
        steps_per_epoch: number of batches in an epoch.
        last_size: images of the last batch of an epoch over all processes together.
        synthetic_size: synthetic images of each batch over all processes together.
        rank, world: as they were given.

    Raises:
        ValueError: if a batch can't be divided among the processes or is larger than the data set, if synthetic images
            differ from the real ones in shape or number of classes, or for images too small to be padded so.
    """

    def __init__(
            self, data: ImageSet, batch_size: int, seed: int, device: torch.device | str,
            rank: int = 0, world: int = 1, synthetic: SyntheticImages | None = None, fraction: float = 0.5, *,
            pad_mode: str = 'zeros', augmentation: Augmentation | None = None, synthetic_augment: bool = True,
            drop_last: bool = True, workers: int | None = None):
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
        if pad_mode not in PAD_MODES or (pad_mode == 'reflect' and data.pad >= min(data.images.shape[1:3])):
            raise ValueError(f'the pad mode is {pad_mode!r} with {data.pad} pixels; expected one of '
                             f'{", ".join(PAD_MODES)}, and images larger than what is reflected')
        self.data, self.synthetic, self.augmentation = data, synthetic, augmentation
        self.device = torch.device(device)
        home = self.device if augmentation is None else 'cpu'
        self.images, self.labels = data.images.to(home), data.labels.to(home)
        self.batch_size, self.seed = batch_size, seed
        self.pad_mode, self.synthetic_augment = pad_mode, synthetic_augment
        self.steps_per_epoch, last = epoch_steps(len(data), real, world, drop_last)
        self.last_size = last + made
        self._real, self.rank, self.world = real, rank, world
        self.synthetic_size, self._mine_made = made, share(made, rank, world)
        self._order: tuple[int, Tensor] | None = None
        self._reader = ThreadPoolExecutor(1, 'ahead') if synthetic is not None or augmentation is not None else None
        self._workers = None if augmentation is None else ThreadPoolExecutor(workers or cores(), 'augment')
        self._ahead: tuple[int, Future[Rows]] | None = None

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Returns the images (batch, channels, height, width), float32 in [0, 1], and labels of a step, from 0."""
        if self.augmentation is not None and self._reader is not None:
            images, labels = self._from_host(step, self._reader)
            return to_float(self._to_device(images)), self._to_device(labels)
        chosen = self._to_device(self._chosen(step))
        x, y = self.images[chosen], self.labels[chosen]
        if self._reader is not None:
            images, labels = self._from_host(step, self._reader)
            x, y = torch.cat([x, self._to_device(images)]), torch.cat([y, self._to_device(labels)])
        return to_float(self._crop(x, step)), y

    def _chosen(self, step: int) -> Tensor:
        """Returns the indices of this process's real images of a step."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, 0, epoch))
            self._order = epoch, torch.randperm(len(self.data), generator=generator)
        batch = self._order[1][index * self._real:(index + 1) * self._real]
        return batch[share(len(batch), self.rank, self.world)]

    def _crop(self, x: Tensor, step: int) -> Tensor:
        """Returns the images of a step (n, height, width, channels), real ones first, shifted and mirrored."""
        # Random numbers are drawn for the global batch and then cut, so an image is augmented alike in any process.
        generator = torch.Generator().manual_seed(derive_seed(self.seed, 1, step))
        pad, made = self.data.pad, self._mine_made.stop - self._mine_made.start
        shift, flip = (self._share(drawn, len(x) - made) for drawn in (
            torch.randint(2 * pad + 1, (self.batch_size, 2), generator=generator),
            torch.rand(self.batch_size, generator=generator) < 0.5))
        if made and not self.synthetic_augment:
            shift[-made:], flip[-made:] = pad, False
        height, width = x.shape[1:3]
        rows = torch.arange(height) + shift[:, :1]
        cols = torch.arange(width).repeat(len(flip), 1)
        if self.data.flip:
            cols = torch.where(flip[:, None], width - 1 - cols, cols)
        cols = cols + shift[:, 1:]
        if self.pad_mode == 'reflect':
            rows, cols = _reflected(rows - pad, height), _reflected(cols - pad, width)
        else:
            x = F.pad(x, (0, 0, pad, pad, pad, pad))
        rows, cols = (self._to_device(each, x.device) for each in (rows, cols))
        sample = torch.arange(len(x), device=x.device)
        return x[sample[:, None, None], rows[:, :, None], cols[:, None, :]]

    def _share(self, drawn: Tensor, real: int) -> Tensor:
        """Returns this process's part, ``real`` of it for real images, of what is drawn for the global batch."""
        first = self.rank * real
        return torch.cat([drawn[first:first + real], drawn[self._real:][self._mine_made]])

    def _from_host(self, step: int, reader: ThreadPoolExecutor) -> Rows:
        """Returns what the host makes for a step, made ahead if the last step was the one before; begins the next."""
        ahead, self._ahead = self._ahead, None
        rows = ahead[1].result() if ahead is not None and ahead[0] == step else self._host_part(step)()
        self._ahead = step + 1, reader.submit(self._host_part(step + 1))
        return rows

    def _host_part(self, step: int) -> Callable[[], Rows]:
        if self.augmentation is None:
            return functools.partial(self._synthetic_rows, step)
        return functools.partial(self._augmented, step, self._chosen(step))

    def _positions(self, step: int) -> np.ndarray:
        """Returns the places of this process's synthetic images of a step in the order that they go round in."""
        return step * self.synthetic_size + np.arange(self._mine_made.start, self._mine_made.stop)

    def _synthetic_rows(self, step: int) -> Rows:
        assert self.synthetic is not None
        return self.synthetic[self.synthetic.order(self._positions(step), derive_seed(self.seed, 3))]

    def _augmented(self, step: int, chosen: Tensor) -> Rows:
        """Returns the augmented images of a step, real ones first, and their labels."""
        augment, workers = self.augmentation, self._workers
        assert augment is not None
        assert workers is not None
        x, y = self.images[chosen], self.labels[chosen]
        seeds = [derive_seed(self.seed, 8, step // self.steps_per_epoch, index) for index in chosen.tolist()]
        if self.synthetic is not None:
            images, labels = self._synthetic_rows(step)
            x, y = torch.cat([x, images]), torch.cat([y, labels])
            if self.synthetic_augment:
                seeds += [derive_seed(self.seed, 10, position) for position in self._positions(step).tolist()]
        if not augment.crops:
            x = self._crop(x, step)
        pixels = x.numpy()

        def some(start: int) -> list[np.ndarray]:
            part = slice(start, start + TOGETHER)
            return [augment(image, seed) for image, seed in zip(pixels[part], seeds[part])]

        made = [image for part in workers.map(some, range(0, len(seeds), TOGETHER)) for image in part]
        return torch.cat([torch.from_numpy(np.stack(made)), x[len(made):]]), y

    def _to_device(self, small: Tensor, device: torch.device | None = None) -> Tensor:
        # From pinned memory the copy runs while the host continues.
        device = self.device if device is None else device
        return (small.pin_memory() if device.type == 'cuda' else small).to(device, non_blocking=True)


def _reflected(places: Tensor, length: int) -> Tensor:
    """Returns places from -length + 1 to 2 length - 2, reflected at 0 and at length - 1."""
    return length - 1 - (length - 1 - places.abs()).abs()


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
