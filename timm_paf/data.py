"""Image sets that live whole on the device as uint8, and seeded batches of them, with synthetic images beside them.

Every random choice is a function of (seed, epoch, step), so a run resumes at any step without a saved sampler, and the
global batch is the same set of images whatever the number of processes.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    'DATASETS', 'Batches', 'ImageSet', 'SyntheticImages', 'cutmix', 'derive_seed', 'load_dataset', 'split_validation',
    'to_float',
]

DATASETS = {'cifar10': 10, 'cifar100': 100, 'digits': 10}
"""Names that `load_dataset` takes, and their number of classes."""


def derive_seed(*key: int) -> int:
    """A well-mixed 63-bit seed for each tuple of non-negative integers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


@dataclass(frozen=True)
class ImageSet:
    """Images (n, height, width, channels) uint8 and labels (n,) int64 in [0, num_classes).

    ``pad`` and ``flip`` say how training may change an image: a crop after zero padding, a horizontal flip.

    Raises:
        ValueError: for another dtype, shape, count or label range.
    """

    name: str
    images: Tensor
    labels: Tensor
    num_classes: int
    pad: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(f'{self.name}: images are {self.images.dtype} {tuple(self.images.shape)}; '
                             'expected uint8 (n, height, width, channels)')
        if self.labels.shape != self.images.shape[:1]:
            raise ValueError(f'{self.name}: {len(self.labels)} labels for {len(self.images)} images; expected as many')
        if len(self.labels) and not (int(self.labels.min()) >= 0 and int(self.labels.max()) < self.num_classes):
            raise ValueError(f'{self.name}: labels span [{int(self.labels.min())}, {int(self.labels.max())}]; '
                             f'expected [0, {self.num_classes - 1}]')

    def __len__(self) -> int:
        return len(self.labels)

    def sha256(self) -> str:
        """Of the image bytes followed by the labels as int64."""
        digest = hashlib.sha256(self.images.contiguous().numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()


def load_dataset(name: str, root: str | Path | None, train: bool) -> ImageSet:
    """The whole split of a data set.

    Args:
        name: 'cifar10' or 'cifar100' (torchvision's files, checked by their published MD5), or 'digits' (scikit-learn's
            1,797 handwritten digits, enlarged from 8 x 8 to 32 x 32; every fifth is a test image).
        root: directory that holds ``cifar-10-batches-py`` or ``cifar-100-python``; not used for digits.
        train: the training split, else the test split.

    Raises:
        ValueError: for an unknown name or a file whose MD5 is not the published one.
        FileNotFoundError: for a missing file.
    """
    if name not in DATASETS:
        raise ValueError(f'unknown data set {name!r}; expected one of {", ".join(DATASETS)}')
    return _digits(train) if name == 'digits' else _cifar(name, root, train)


def _digits(train: bool) -> ImageSet:
    from sklearn.datasets import load_digits

    digits = load_digits()
    test = np.arange(len(digits.target)) % 5 == 4
    chosen = ~test if train else test
    small = torch.from_numpy(digits.images[chosen]).float().unsqueeze(1) / 16
    large = F.interpolate(small, size=(32, 32), mode='bilinear', align_corners=False)
    images = (large * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()
    return ImageSet('digits', images, torch.from_numpy(digits.target[chosen]).long(), 10, pad=2, flip=False)


def _cifar(name: str, root: str | Path | None, train: bool) -> ImageSet:
    from torchvision import datasets
    from torchvision.datasets.utils import calculate_md5

    cls = datasets.CIFAR10 if name == 'cifar10' else datasets.CIFAR100
    if root is None:
        raise ValueError(f'{name} needs a directory; expected --data-dir DIR with {cls.base_folder} in it')
    folder = Path(root).absolute() / cls.base_folder
    mend = f'torchvision.datasets.{cls.__name__}({str(root)!r}, download=True) fetches it'
    # torchvision opens neither split without the files of both
    for file, md5 in [*cls.train_list, *cls.test_list, (cls.meta['filename'], cls.meta['md5'])]:
        path = folder / file
        if not path.is_file():
            raise FileNotFoundError(f'{path} is missing; expected the files of {name}: {mend}')
        found = calculate_md5(str(path))
        if found != md5:
            raise ValueError(f'{path} is corrupt: MD5 {found}, expected {md5}; delete it, then {mend}')
    data = cls(str(root), train=train, download=False)
    return ImageSet(name, torch.from_numpy(data.data), torch.tensor(data.targets), DATASETS[name])


def to_float(images: Tensor) -> Tensor:
    """uint8 (n, height, width, channels) -> float32 (n, channels, height, width) in [0, 1], in channels_last memory."""
    return images.permute(0, 3, 1, 2).float().div_(255)


def split_validation(data: ImageSet, n: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """Hold out ``n`` images, as many of each class; where that leaves a rest, some classes give one more.

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
    return (replace(data, images=data.images[~held_out], labels=data.labels[~held_out]),
            replace(data, name=f'{data.name}-val', images=data.images[held_out], labels=data.labels[held_out]))


def cutmix(
        x: Tensor, y: Tensor, num_classes: int, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Paste one box of another image of the batch into each image, and mix the labels by its area.

    Yun et al., CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features, ICCV 2019,
    https://arxiv.org/abs/1905.04899. One box for the batch, cut off where it leaves the image.

    Args:
        x: images (n, channels, height, width); not changed.
        y: labels (n,) in [0, num_classes).
        alpha: the share of the own image is drawn from Beta(alpha, alpha), before the box is cut off; above 0.
        generator: the only source of randomness; on the CPU the host waits for no device.

    Returns:
        Images like ``x``, and float32 labels (n, num_classes) that sum to 1.
    """
    if not alpha > 0:
        raise ValueError(f'the alpha of CutMix is {alpha}; expected above 0')
    # torch has no Beta distribution that takes a generator
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


class SyntheticImages(Protocol):
    """What `Batches` needs of a `synthetic.SyntheticSet`."""

    name: str
    image_shape: tuple[int, ...]
    num_classes: int

    def __getitem__(self, indices: np.ndarray) -> tuple[Tensor, Tensor]: ...

    def order(self, positions: np.ndarray, seed: int) -> np.ndarray: ...


class Batches:
    """Random access to the augmented training batches of one process.

    With synthetic images each batch has ``round(batch_size * fraction)`` of them after the real ones. They go round in
    an order of their own, without replacement until all were seen; an epoch is one pass over the real images.

    Args:
        data: the training images; moved to ``device`` whole.
        batch_size: of all processes together, real and synthetic.
        seed: of order and augmentation.
        device: where batches are made.
        rank, world: this process and how many there are.
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
        """Images (batch, channels, height, width) float32 in [0, 1] and labels, of optimizer step ``step`` from 0."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, 0, epoch))
            self._order = epoch, torch.randperm(len(self.data), generator=generator)
        chosen = self._order[1][index * self._real:(index + 1) * self._real]
        # drawn for the global batch, then cut: an image is augmented alike whatever process gets it
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
        """What of the numbers for the global batch, real images first, is of this process."""
        return torch.cat([drawn[:self._real][self._mine], drawn[self._real:][self._mine_made]])

    def _read_synthetic(self, step: int, reader: ThreadPoolExecutor) -> tuple[Tensor, Tensor]:
        """Those of a step, which were begun a step before if that was the last one asked for; then begin the next."""
        ahead, self._ahead = self._ahead, None
        rows = ahead[1].result() if ahead is not None and ahead[0] == step else self._synthetic_rows(step)
        self._ahead = step + 1, reader.submit(self._synthetic_rows, step + 1)
        return rows

    def _synthetic_rows(self, step: int) -> tuple[Tensor, Tensor]:
        assert self.synthetic is not None
        positions = step * self._made + np.arange(self._mine_made.start, self._mine_made.stop)
        return self.synthetic[self.synthetic.order(positions, derive_seed(self.seed, 3))]

    def _to_device(self, small: Tensor) -> Tensor:
        # from pinned memory the host goes on without waiting for the copy
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
