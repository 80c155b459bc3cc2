"""Image sets that live whole on the device as uint8, and seeded batches of them.

Every random choice is a function of (seed, epoch, step), so a run resumes at any step without a saved sampler, and the
global batch is the same set of images whatever the number of processes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ['DATASETS', 'Batches', 'ImageSet', 'derive_seed', 'load_dataset', 'to_float']

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


class Batches:
    """Random access to the augmented training batches of one process.

    Args:
        data: the training images; moved to ``device`` whole.
        batch_size: of all processes together.
        seed: of order and augmentation.
        device: where batches are made.
        rank, world: this process and how many there are.

    Raises:
        ValueError: if the batch can't be divided among the processes or is larger than the data set.
    """

    def __init__(
            self, data: ImageSet, batch_size: int, seed: int, device: torch.device | str,
            rank: int = 0, world: int = 1):
        if batch_size < 1 or batch_size % world:
            raise ValueError(f'batch size is {batch_size}; expected a positive multiple of the {world} processes')
        if batch_size > len(data):
            raise ValueError(
                f'batch size is {batch_size}; {data.name} has {len(data)} training images, expected at most that')
        self.data = data
        self.images, self.labels = data.images.to(device), data.labels.to(device)
        self.batch_size, self.seed = batch_size, seed
        self.steps_per_epoch = len(data) // batch_size
        self._mine = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
        self._order: tuple[int, Tensor] | None = None

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Images (batch, channels, height, width) float32 in [0, 1] and labels, of optimizer step ``step`` from 0."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, 0, epoch))
            self._order = epoch, torch.randperm(len(self.data), generator=generator)
        chosen = self._order[1][index * self.batch_size:(index + 1) * self.batch_size]
        # drawn for the global batch, then cut: an image is augmented alike whatever process gets it
        generator = torch.Generator().manual_seed(derive_seed(self.seed, 1, step))
        pad = self.data.pad
        shift = torch.randint(2 * pad + 1, (self.batch_size, 2), generator=generator)[self._mine]
        flip = torch.rand(self.batch_size, generator=generator)[self._mine] < 0.5
        device = self.images.device
        chosen = self._to_device(chosen[self._mine])
        x = self.images[chosen]
        height, width = x.shape[1:3]
        cols = torch.arange(width).repeat(len(flip), 1)
        if self.data.flip:
            cols = torch.where(flip[:, None], width - 1 - cols, cols)
        rows = self._to_device(torch.arange(height) + shift[:, :1])
        cols = self._to_device(cols + shift[:, 1:])
        x = F.pad(x, (0, 0, pad, pad, pad, pad))
        sample = torch.arange(len(x), device=device)
        return to_float(x[sample[:, None, None], rows[:, :, None], cols[:, None, :]]), self.labels[chosen]

    def _to_device(self, small: Tensor) -> Tensor:
        # from pinned memory the host goes on without waiting for the copy
        device = self.images.device
        return (small.pin_memory() if device.type == 'cuda' else small).to(device, non_blocking=True)
