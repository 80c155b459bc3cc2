"""Data sets that are held whole, as uint8: CIFAR-10, CIFAR-100 and digits."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..files import is_of_machine
from ..wording import reason_of

__all__ = ['DATASETS', 'ImageSet', 'derive_seed', 'find_root', 'load_dataset', 'to_float']

DATASETS = {'cifar10': 10, 'cifar100': 100, 'digits': 10}
"""Names that `load_dataset` takes, and their number of classes."""


def derive_seed(*key: int) -> int:
    """Returns a well-mixed 63-bit seed for each tuple of non-negative integers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


@dataclass(frozen=True)
class ImageSet:
    """A data set in memory: images (n, height, width, channels) uint8 and labels (n,) int64 in [0, num_classes).

    ``pad`` and ``flip`` say how training may change an image: a crop after padding, a horizontal flip. ``label_names``
    are words for the classes, where the data set has such.

    Raises:
        ValueError: for another dtype, shape, count or label range.
    """

    name: str
    images: Tensor
    labels: Tensor
    num_classes: int
    pad: int = 4
    flip: bool = True
    label_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ValueError(f'the name of an ImageSet is a {type(self.name).__name__}; expected a text, before images')
        if not isinstance(self.images, Tensor):
            raise ValueError(f'{self.name}: images are of type {type(self.images).__name__}; expected a tensor '
                             '(torch.from_numpy)')
        shape = tuple(self.images.shape)
        if self.images.dtype != torch.uint8 or len(shape) != 4 or shape[1] < 5 <= shape[3]:  # channels stand last
            raise ValueError(f'{self.name}: images are {self.images.dtype} {shape}; '
                             'expected uint8 (n, height, width, channels)')
        if not isinstance(self.labels, Tensor) or self.labels.dtype != torch.int64:
            found = getattr(self.labels, 'dtype', type(self.labels).__name__)
            raise ValueError(f'{self.name}: labels are {found}; expected int64 (n,)')
        if self.labels.shape != self.images.shape[:1]:
            raise ValueError(f'{self.name}: {len(self.labels)} labels for {len(self.images)} images; expected as many')
        if len(self.labels) and not (int(self.labels.min()) >= 0 and int(self.labels.max()) < self.num_classes):
            raise ValueError(f'{self.name}: labels span [{int(self.labels.min())}, {int(self.labels.max())}]; '
                             f'expected [0, {self.num_classes - 1}]')

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: Tensor) -> ImageSet:
        """Returns some of the images; ``chosen`` has indices, or says of each whether."""
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])

    def sha256(self) -> str:
        """Returns the SHA-256 of the image bytes followed by the labels as int64."""
        digest = hashlib.sha256(self.images.contiguous().numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()


def find_root(name: str, given: str | Path | None = None) -> Path | None:
    """Returns the directory that holds the files of 'cifar10' or 'cifar100', None where nobody has any.

    Args:
        name: 'cifar10' or 'cifar100'.
        given: the directory that the user names: the one that has ``cifar-10-batches-py``, that directory itself, or
            the one above. Without it the environment variable CIFAR10_ROOT (CIFAR100_ROOT) is taken, else the first of
            ``data``, ``~/data`` and ``~/datasets`` that has the files.

    Raises:
        FileNotFoundError: if the user or the variable names a directory without the files.
    """
    folder, (file, _) = _cifar_class(name).base_folder, _cifar_class(name).test_list[0]
    variable = f'{name.upper()}_ROOT'
    named = given if given is not None else os.environ.get(variable) or None
    if named is None:
        places = [Path('data'), Path.home() / 'data', Path.home() / 'datasets']
        return next((place for place in places if (place / folder / file).is_file()), None)
    root = Path(os.path.expanduser(named))
    above = [root.parent] if root.name == folder else []
    for place in (root, *above, *(path.parent for path in sorted(root.glob(f'*/{folder}')))):
        if (place / folder / file).is_file():
            return place
    how = '--data-dir' if given is not None else variable
    raise FileNotFoundError(f'{how} is {named}, which has no {folder}/{file}; expected the directory that holds '
                            f'{folder}, or --download (in Python download=True) to fetch it')


def load_dataset(name: str, root: str | Path | None = None, train: bool = True, download: bool = False) -> ImageSet:
    """Returns the whole split of a data set.

    Args:
        name: 'cifar10' or 'cifar100' (torchvision's files, checked by their published MD5), or 'digits' (scikit-learn's
            1,797 handwritten digits, enlarged from 8 x 8 to 32 x 32; every fifth is a test image).
        root: directory that holds ``cifar-10-batches-py`` or ``cifar-100-python``, see `find_root`; not used for
            digits.
        train: whether to load the training split, else the test split.
        download: whether to fetch missing files through torchvision, into ``root`` or ``data``.

    Raises:
        ValueError: for an unknown name or a file whose MD5 is not the published one.
        FileNotFoundError: for a missing file.
    """
    if name not in DATASETS:
        raise ValueError(f'unknown data set {name!r}; expected one of {", ".join(DATASETS)}')
    return _digits(train) if name == 'digits' else _cifar(name, root, train, download)


def _cifar_class(name: str) -> Any:
    from torchvision import datasets

    return datasets.CIFAR10 if name == 'cifar10' else datasets.CIFAR100


def _digits(train: bool) -> ImageSet:
    from sklearn.datasets import load_digits

    digits = load_digits()
    test = np.arange(len(digits.target)) % 5 == 4
    chosen = ~test if train else test
    small = torch.from_numpy(digits.images[chosen]).float().unsqueeze(1) / 16
    large = F.interpolate(small, size=(32, 32), mode='bilinear', align_corners=False)
    images = (large * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()
    return ImageSet('digits', images, torch.from_numpy(digits.target[chosen]).long(), 10, pad=2, flip=False)


def _cifar(name: str, root: str | Path | None, train: bool, download: bool) -> ImageSet:
    from torchvision.datasets.utils import calculate_md5

    cls = _cifar_class(name)
    try:
        found = find_root(name, root)
    except FileNotFoundError:
        if not download:
            raise
        found = None
    if found is None and not download:
        raise FileNotFoundError(
            f'no {name} found in data, ~/data or ~/datasets; expected --data-dir DIR (in Python root) with '
            f'{cls.base_folder} in it, the variable {name.upper()}_ROOT, or --download (download=True) to fetch it')
    if found is None or download:
        found = found or Path(os.path.expanduser(root or 'data'))
        try:
            cls(str(found), download=True)  # only what is missing
        except (OSError, RuntimeError) as error:
            if is_of_machine(error):
                raise
            raise FileNotFoundError(f'{name} could not be downloaded to {found}: {reason_of(error)}; expected a '
                                    f'network, or --data-dir DIR with {cls.base_folder} in it') from error
    folder = found.absolute() / cls.base_folder
    # The files of both splits are checked, because torchvision opens neither split without them.
    for file, md5 in [*cls.train_list, *cls.test_list, (cls.meta['filename'], cls.meta['md5'])]:
        path = folder / file
        if not path.is_file():
            raise FileNotFoundError(f'{path} is missing; expected the files of {name}: --download fetches them')
        actual = calculate_md5(str(path))
        if actual != md5:
            raise ValueError(f'{path} is corrupt: MD5 {actual}, expected {md5}; delete it, then --download fetches it')
    data = cls(str(found), train=train, download=False)
    return ImageSet(name, torch.from_numpy(data.data), torch.tensor(data.targets), DATASETS[name],
                    label_names=tuple(data.classes))


def to_float(images: Tensor) -> Tensor:
    """Converts uint8 (n, height, width, channels) to float32 (n, channels, height, width) in [0, 1], channels_last."""
    return images.permute(0, 3, 1, 2).float().div_(255)
