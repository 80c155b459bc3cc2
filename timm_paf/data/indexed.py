"""Images of any size that are reached by their index and decoded as they are needed, and seeded batches of them.

Every random choice is a function of (seed, epoch, image), so batches do not depend on how many threads or processes
make them, and a run resumes at any step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from .augmentation import Augmentation
from .images import derive_seed
from .steps import cores, epoch_steps, share

__all__ = ['IndexedBatches', 'IndexedImages', 'Transform', 'evaluation_transform']

Box = tuple[int, int, int, int]
Transform = Callable[[Image.Image], np.ndarray]


@dataclass(frozen=True)
class IndexedImages(ABC):
    """Images by their index, their labels (n,) int64 in [0, num_classes), and the names of the classes."""

    name: str
    labels: Tensor
    classes: tuple[str, ...]

    @abstractmethod
    def read(self, index: int, quick: bool = False) -> Image.Image:
        """Returns an image as RGB.

        Args:
            index: number of the image, from 0.
            quick: whether a small form of the image will do; all of its bytes are read even so.

        Raises:
            ValueError: if the image can't be decoded; the message is the reason alone.
        """

    @abstractmethod
    def where(self, index: int) -> str:
        """Returns the place of an image, for messages."""

    @abstractmethod
    def names(self) -> list[str]:
        """Returns the name of each image, by which `without` knows it."""

    @abstractmethod
    def take(self, chosen: Tensor) -> Self:
        """Returns some of the images, with the same classes; ``chosen`` has indices, or says of each whether."""

    @abstractmethod
    def digest(self) -> dict[str, str]:
        """Returns a SHA-256 by a name that says what it is of."""

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def __len__(self) -> int:
        return len(self.labels)

    def label_names(self) -> list[str]:
        """Returns the names of the classes as text that every file takes."""
        return [name.encode(errors='surrogateescape').decode(errors='replace') for name in self.classes]

    def spread(self, n: int) -> Self:
        """Returns ``n`` images evenly spaced, so of all classes; all of them if there are fewer.

        Raises:
            ValueError: for less than one image.
        """
        if n < 1:
            raise ValueError(f'{n} images of {self.name} are asked for; expected at least 1')
        return self.take(torch.linspace(0, len(self) - 1, min(n, len(self))).long())

    def without(self, left_out: Iterable[str]) -> Self:
        """Returns all images but those of some `names`, which need not be there, with the same classes.

        Raises:
            ValueError: if none is left.
        """
        gone = set(left_out)
        kept = [index for index, name in enumerate(self.names()) if name not in gone]
        if not kept:
            raise ValueError(f"none of the {len(self):,} images of {self.name} can be read")
        return self.take(torch.tensor(kept))

    def check(self, log: Callable[[str], None], rank: int = 0, world: int = 1,
              gather: Callable[[list[tuple[int, str]]], list[tuple[int, str]]] = list, workers: int | None = None,
              skip: bool = False) -> list[str]:
        """Decodes all images once, so that a damaged one does not stop a run in the middle.

        JPEGs are decoded at an eighth of their size, several times as fast as in training; every byte is read. Each
        process checks its share, and all of them raise the same error.

        Args:
            log: function that gets a line when all images can be read.
            rank, world: number of this process, from 0, and how many there are.
            gather: function that joins the lists of all processes.
            workers: number of threads that decode; default: the cores that this process may use.
            skip: whether images that can't be decoded are told to ``log`` and returned, and no error.

        Returns:
            The `names` of the images that can't be decoded, for `without`.

        Raises:
            ValueError: if images can't be decoded; it names up to five and says how many there are.
        """
        from tqdm import tqdm

        def fault(index: int) -> tuple[int, str]:
            try:
                self.read(index, quick=True)
            except ValueError as error:
                return index, f'{self.where(index)} ({error})'
            return index, ''

        mine = range(rank, len(self), world)
        with ThreadPoolExecutor(workers or cores(), 'check') as pool:
            # Without a terminal there is no bar.
            bar = tqdm(pool.map(fault, mine), 'checks images', len(mine), disable=True if rank else None, leave=False)
            wrong = dict(sorted(gather([(index, text) for index, text in bar if text])))
        if not wrong:
            log(f'all {len(self):,} images of {self.name} can be read')
            return []
        more = f' and {len(wrong) - 5:,} more' if len(wrong) > 5 else ''
        found = f"{len(wrong):,} of {len(self):,} images can't be read: {', '.join(list(wrong.values())[:5])}{more}"
        if not skip:
            raise ValueError(f'{found}; replace or remove them and start the same command again, or add '
                             '--skip-unreadable')
        log(f'{found}; they are left out')
        names = self.names()
        return [names[index] for index in wrong]

    def centre(self, index: int, size: int, crop_pct: float = 0.875) -> np.ndarray:
        """Returns an image for evaluation, as uint8 (size, size, 3): timm's evaluation transform, bicubic.

        Args:
            index: number of the image, from 0.
            size: side of the crop in pixels.
            crop_pct: share of the resized image's shorter side that the crop has, in (0, 1].

        Raises:
            ValueError: for a file that can't be decoded.
        """
        return evaluation_transform(size, crop_pct)(self._decode(index))

    def centres(self, size: int, crop_pct: float = 0.875, workers: int | None = None) -> Tensor:
        """Returns all images as `centre` gives them, uint8 (n, size, size, 3), for a `data.ImageSet` to evaluate on.

        Raises:
            ValueError: for a file that can't be decoded.
        """
        return self.transformed(evaluation_transform(size, crop_pct), workers)

    def transformed(self, transform: Transform, workers: int | None = None) -> Tensor:
        """Returns all images as a transform gives them, uint8 (n, height, width, 3).

        Raises:
            ValueError: for a file that can't be decoded, or images that come out in several sizes.
        """
        images: Tensor | None = None
        with ThreadPoolExecutor(workers or cores(), 'decode') as pool:
            for index, image in enumerate(pool.map(lambda index: transform(self._decode(index)), range(len(self)))):
                if images is None:
                    images = torch.empty((len(self), *image.shape), dtype=torch.uint8)
                if image.shape != images.shape[1:]:
                    raise ValueError(f'{self.where(index)} comes out as {image.shape[0]} x {image.shape[1]} and '
                                     f'{self.where(0)} as {images.shape[1]} x {images.shape[2]}; expected one size')
                images.numpy()[index] = image
        assert images is not None, 'there is no empty set'
        return images

    def training_crop(self, index: int, size: int, rng: np.random.Generator) -> np.ndarray:
        """Returns an image for training: a `random_box` of it, mirrored every other time, as uint8 (size, size, 3).

        Raises:
            ValueError: for a file that can't be decoded.
        """
        rgb = self._decode(index)
        # The crop comes before the resizing: resize(box=...) rounds differently and differs from torchvision's by a
        # grey level.
        crop = rgb.crop(random_box(*rgb.size, rng)).resize((size, size), Image.Resampling.BICUBIC)
        pixels = np.asarray(crop)
        return pixels[:, ::-1] if rng.random() < 0.5 else pixels

    def _decode(self, index: int) -> Image.Image:
        try:
            return self.read(index)
        except ValueError as error:
            raise ValueError(f'{self.where(index)} is no readable image: {error}; put back the file as it was, or '
                             'replace or remove it and start a new run') from error


def evaluation_transform(size: int, crop_pct: float = 0.875, interpolation: str = 'bicubic',
                         crop_mode: str = 'center') -> Transform:
    """Returns timm's transform for evaluation, to uint8 (size, size, 3).

    Args:
        size: side of the crop in pixels.
        crop_pct: share of the resized image's shorter side that the crop has, in (0, 1].
        interpolation, crop_mode: as in timm's ``pretrained_cfg``.
    """
    made: Any = create_transform((3, size, size), is_training=False, use_prefetcher=True, crop_pct=crop_pct,
                                 interpolation=interpolation, crop_mode=crop_mode)
    return lambda image: np.asarray(made(image)).transpose(1, 2, 0)


def random_box(width: int, height: int, rng: np.random.Generator) -> Box:
    """Returns left, top, right, bottom of a box of 8% to 100% of the area, with an aspect ratio of 3/4 to 4/3.

    Szegedy et al., Going Deeper with Convolutions, CVPR 2015, https://arxiv.org/abs/1409.4842. If none of ten draws
    fits into the image, the result is the largest central box of such a ratio.
    """
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(float(np.sqrt(area * ratio))), round(float(np.sqrt(area / ratio)))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width * 4 / 3)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


class IndexedBatches:
    """The augmented training batches of one process, by the number of the step, like `data.Batches`.

    Threads decode the images of a step, and those of the next step while the first is at work; Pillow lets them run
    side by side.

    Args:
        data: the training images.
        batch_size: images of a batch over all processes together.
        seed: seed of order and augmentation.
        device: where batches are put.
        rank, world: number of this process, from 0, and how many there are.
        size: side of the square images that come out, in pixels.
        augmentation: changes an image after crop and flip, by a seed; None for none.
        workers: number of threads that decode; default: the cores that this process may use.
        drop_last: whether an epoch ends with the last whole batch; else with a smaller one of the images that are left.

    Raises:
        ValueError: if a batch can't be divided among the processes or is larger than the data set.
    """

    def __init__(
            self, data: IndexedImages, batch_size: int, seed: int, device: torch.device | str,
            rank: int = 0, world: int = 1, size: int = 224, augmentation: Augmentation | None = None,
            workers: int | None = None, drop_last: bool = True):
        if batch_size < 1 or batch_size % world:
            raise ValueError(f'batch size is {batch_size}; expected a positive multiple of the {world} processes')
        if batch_size > len(data):
            raise ValueError(
                f'batch size is {batch_size}; {data.name} has {len(data)} training images, expected at most that')
        self.data, self.batch_size, self.seed, self.size = data, batch_size, seed, size
        self.device, self.augmentation = torch.device(device), augmentation
        self.steps_per_epoch, self.last_size = epoch_steps(len(data), batch_size, world, drop_last)
        self.rank, self.world = rank, world
        self._order: tuple[int, np.ndarray] | None = None
        self._workers = ThreadPoolExecutor(workers or cores(), 'decode')
        self._ahead: dict[int, tuple[Tensor, list[Future[np.ndarray]]]] = {}

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Returns images (batch, 3, size, size), float32 in [0, 1], channels_last, and labels of a step, from 0.

        Raises:
            ValueError: for a file that can't be decoded.
        """
        labels, images = self._ahead.pop(step) if step in self._ahead else self._begin(step)
        for _, left in self._ahead.values():  # images begun for a step that was not asked for
            for future in left:
                future.cancel()
        self._ahead = {step + 1: self._begin(step + 1)}
        x = torch.from_numpy(np.stack([image.result() for image in images]))
        return self._to_device(x).permute(0, 3, 1, 2).float().div_(255), self._to_device(labels)

    def _begin(self, step: int) -> tuple[Tensor, list[Future[np.ndarray]]]:
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self._rng(0, epoch).permutation(len(self.data))
        batch = self._order[1][index * self.batch_size:(index + 1) * self.batch_size]
        chosen = batch[share(len(batch), self.rank, self.world)]
        futures = [self._workers.submit(self._image, image, epoch) for image in chosen.tolist()]
        return self.data.labels[torch.from_numpy(chosen)], futures

    def _image(self, index: int, epoch: int) -> np.ndarray:
        crop = self.data.training_crop(index, self.size, self._rng(1, epoch, index))
        return crop if self.augmentation is None else self.augmentation(crop, derive_seed(self.seed, 8, epoch, index))

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, *key))

    def _to_device(self, host: Tensor) -> Tensor:
        return (host.pin_memory() if self.device.type == 'cuda' else host).to(self.device, non_blocking=True)
