"""The data sets of timm that are reached by index: those of torchvision, of the datasets package, and tar files."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset
from torch import Tensor

from ..files import is_of_machine
from ..wording import reason_of
from .decoding import read_image, reading
from .folder_files import SPLITS, split_directories
from .folders import open_folder
from .images import DATASETS
from .indexed import IndexedImages

__all__ = ['INDEXED', 'ITERABLE', 'TimmImages', 'name_fault', 'open_images']

INDEXED = ('imagenet', 'folder', 'torch/NAME', 'hfds/NAME')
"""Names that `open_images` takes; NAME is one that timm knows."""

ITERABLE = ('hfids', 'tfds', 'wds')
"""The first parts of timm's names of data sets that are read in their order alone."""

SAMPLE = 1000
"""Number of images that a SHA-256 is of, evenly spaced."""


@dataclass(frozen=True)
class TimmImages(IndexedImages):
    """The images of a map-style data set that timm made, at ``indices`` (n,) of it."""

    dataset: Any
    indices: Tensor
    lock: contextlib.AbstractContextManager[Any]
    """What a thread holds while it reads."""

    def stored(self, index: int) -> bytes | Image.Image:
        """Returns what the data set holds of an image: its file's content, or pixels."""
        number = int(self.indices[index])
        reader = getattr(self.dataset, 'reader', None)
        if reader is None:
            found: bytes | Image.Image = self.dataset[number][0]
            return found
        # timm's own data set would give the next image in place of one that can't be read.
        with self.lock, reader[number][0] as file:
            content: bytes = file.read()
            return content

    def read(self, index: int, quick: bool = False) -> Image.Image:
        with reading():
            stored = self.stored(index)
        return read_image(stored, quick)

    def where(self, index: int) -> str:
        return f'image {int(self.indices[index])} of {self.name}'

    def names(self) -> list[str]:
        """Returns the number of each image in the data set."""
        return [str(index) for index in self.indices.tolist()]

    def take(self, chosen: Tensor) -> TimmImages:
        return replace(self, indices=self.indices[chosen], labels=self.labels[chosen])

    def digest(self) -> dict[str, str]:
        """Returns a SHA-256 of all labels as int64, and of what is stored of 1,000 evenly spaced images."""
        digest = hashlib.sha256(self.labels.numpy().tobytes())
        for index in torch.linspace(0, len(self) - 1, min(SAMPLE, len(self))).long().tolist():
            stored = self.stored(index)
            digest.update(stored if isinstance(stored, bytes) else np.asarray(stored).tobytes())
        return {'sha256_of_sample': digest.hexdigest()}


def open_images(name: str, root: str | Path | None, train: bool, download: bool = False) -> IndexedImages:
    """Opens a split of images that are reached by index.

    Args:
        name: 'folder', for which see `folders.open_folder`, or ``train.tar`` and ``val.tar`` in place of the
            directories; 'imagenet', a folder of 1,000 classes; or 'torch/NAME' or 'hfds/NAME' of
            ``timm.data.create_dataset``.
        root: the directory of the data set; of hfds the cache, which need not be said.
        train: whether to open the training split, else the evaluation split.
        download: whether torchvision may fetch what lacks.

    Raises:
        FileNotFoundError: if there are no images.
        ValueError: for a data set that can't be reached by index or opened, or labels that are no classes.
    """
    kind, _, rest = name.partition('/')
    if fault := name_fault(name):
        raise ValueError(fault)
    if name not in ('folder', 'imagenet') and not (kind in ('torch', 'hfds') and rest):
        raise ValueError(f'unknown data set {name!r}; expected one of {", ".join((*DATASETS, *INDEXED))}')
    if root is None and kind != 'hfds':
        raise FileNotFoundError(f'{name} needs a directory; expected --data-dir DIR')
    place = None if root is None else Path(os.path.expanduser(root))
    if kind == 'imagenet' and place is not None:
        images = open_images('folder', place, train)
        if images.num_classes != 1000:
            raise ValueError(f'{place} has {images.num_classes} classes; expected the 1,000 of ImageNet, or --dataset '
                             'folder')
        return replace(images, name='imagenet')
    if kind == 'folder' and place is not None:
        tar = next((file for split in SPLITS[train] if (file := place / f'{split}.tar').is_file()), None)
        if tar is None or split_directories(place)[train] is not None:
            return open_folder(place, train)
        # timm would keep a pickle beside a large file, and read one that lies there.
        return _wrap(name, _create(name, '', tar, cache_tarinfo=False), threading.Lock())
    if kind == 'hfds':
        if importlib.util.find_spec('datasets') is None:
            raise ValueError(f'{name} needs the package datasets; pip install datasets')
        os.environ.setdefault('HF_DATASETS_TRUST_REMOTE_CODE', '0')  # of older versions: runs nobody's script
        return _wrap(name, _create(name, name, place, splits=SPLITS[train]))
    if rest in ('folder', 'image_folder') and place is not None:  # timm takes ROOT itself where it lacks the split
        split = split_directories(place)[train]
        if split is None:
            raise FileNotFoundError(f'{place} has no directory {" or ".join(SPLITS[train])}; expected one, with a '
                                    'directory of images for each class')
        place = split
    return _wrap(name, _create(name, name, place, splits=('train' if train else 'validation',), search_split=False,
                               download=download))


def name_fault(name: str) -> str | None:
    """Returns why a data set of timm is not taken, None for one that is."""
    kind, _, rest = name.partition('/')
    if kind in ITERABLE:
        return (f'{name} is read in its order alone, and a step that is resumed needs its images by index; expected '
                f'{", ".join(INDEXED)}')
    if kind == 'hfds' and rest.startswith(('/', '~')):  # the name goes into records that are published
        return f'{name} names a place of this machine; expected hfds/ORG/NAME, or a directory relative to here'
    return None


def _create(name: str, of_timm: str, root: Path | None, splits: Iterable[str] = ('train',), **kwargs: Any) -> Any:
    """Returns timm's data set for the first split that is there."""
    first: Exception | None = None
    for split in splits:
        try:
            return create_dataset(of_timm, None if root is None else str(root), split=split, **kwargs)
        except Exception as error:  # of torchvision, datasets, tarfile, and the network
            if isinstance(error, NameError) or is_of_machine(error):
                raise
            first = first or error
            if 'Unknown split' not in str(error):
                break
    assert first is not None
    raise ValueError(f"{name} can't be opened{'' if root is None else f' in {root}'}: {reason_of(first)}; expected a "
                     'data set that timm.data.create_dataset opens, with images and labels') from first


def _wrap(name: str, dataset: Any, lock: contextlib.AbstractContextManager[Any] | None = None) -> TimmImages:
    """Returns the images of a data set; threads take turns where there is a lock.

    Raises:
        ValueError: if it has labels that are none of its classes, or less than two classes.
    """
    if hasattr(dataset, 'loader'):
        dataset.loader = _content  # torchvision's cuts images of 16 bits off at 255
    labels, classes = torch.as_tensor(np.asarray(_labels(dataset)), dtype=torch.int64), _classes(dataset)
    if not len(labels):
        raise FileNotFoundError(f'{name} has no images')
    low, high = int(labels.min()), int(labels.max())
    classes = classes or tuple(map(str, range(high + 1)))
    if low < 0 or high >= len(classes) or len(classes) < 2:
        raise ValueError(f'{name}: labels span [{low}, {high}] with {len(classes)} classes; expected two classes or '
                         'more, and a label of [0, classes) for each image')
    return TimmImages(name, labels, classes, dataset, torch.arange(len(labels)), lock or contextlib.nullcontext())


def _content(path: str) -> bytes:
    return Path(path).read_bytes()


def _labels(dataset: Any) -> Any:
    """Returns the labels, without a look at the images where the data set has them apart."""
    source = getattr(dataset, 'reader', dataset)
    if hasattr(source, 'label_key'):  # of the package datasets
        return list(source.dataset[source.label_key])
    if hasattr(source, 'targets'):
        found = np.asarray(source.targets)
        return found[:, 0] if found.ndim == 2 else found  # QMNIST has more facts than the label
    pairs = getattr(source, 'samples', None)
    if pairs is not None:
        return [label for _, label in pairs]
    if getattr(source, 'target_type', None) == ['full']:  # of INaturalist
        return [label for label, _ in source.index]
    return [dataset[index][1] for index in range(len(dataset))]


def _classes(dataset: Any) -> tuple[str, ...]:
    """Returns the names of the classes; () where the data set has none."""
    source = getattr(dataset, 'reader', dataset)
    numbers = getattr(source, 'class_name_to_idx', None) or getattr(source, 'class_to_idx', None) or {}
    names = getattr(source, 'classes', None) or getattr(source, 'all_categories', None) or sorted(
        numbers, key=lambda name: numbers[name])
    return tuple(', '.join(name) if isinstance(name, tuple | list) else str(name) for name in names)
