"""RobustBench's 5,000 images of ImageNet and ImageNet-C, in its order and with its preprocessings."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from timm_paf.data import ImageFolder
from timm_paf.data.corrupted import CORRUPTIONS, SEVERITIES, CorruptedImages
from timm_paf.data.indexed import Transform

IDS = 'imagenet_test_image_ids.txt'
"""The file in RobustBench's package that lists the images, 'CLASS/NAME.JPEG' in each line."""

Side = int | tuple[int, int] | None

PREPROCESSINGS: dict[str, tuple[Side, str, int | None]] = {
    'Res256Crop224': (256, 'bilinear', 224), 'BicubicRes256Crop224': (256, 'bicubic', 224),
    'Res224': ((224, 224), 'bilinear', None), 'Crop288': (None, 'bilinear', 288), 'none': (None, 'bilinear', None)}
"""RobustBench's names, with the size that an image is resized to (one number: of its shorter side), how, and the side
of the central crop."""


def preprocessing(name: str) -> Transform:
    """Returns a preprocessing of RobustBench, to uint8 (height, width, 3).

    Raises:
        ValueError: for an unknown name.
    """
    from torchvision import transforms

    if name not in PREPROCESSINGS:
        raise ValueError(f'unknown preprocessing {name!r}; expected one of {", ".join(PREPROCESSINGS)}')
    size, how, side = PREPROCESSINGS[name]
    steps: list[Any] = [] if size is None else [transforms.Resize(size, transforms.InterpolationMode(how))]
    made = transforms.Compose(steps + ([] if side is None else [transforms.CenterCrop(side)]))
    return lambda image: np.asarray(made(image))


def open_board(root: str | Path | None, n: int, split: str = 'val') -> ImageFolder:
    """Returns the first ``n`` images of RobustBench's list, all 5,000 if there are fewer.

    Args:
        root: directory with ``val/CLASS/NAME.JPEG``, as ImageNet's validation set is sorted for torchvision; where
            RobustBench is not installed, with its list `IDS`.
        n: number of images.
        split: the directory below ``root``.

    Raises:
        FileNotFoundError: if the images or the list are missing.
        ValueError: for less than one image, or another number of classes than ImageNet has.
    """
    if root is None:
        raise FileNotFoundError('imagenet needs a directory; expected --data-dir DIR with DIR/val/CLASS/NAME.JPEG')
    if n < 1:
        raise ValueError(f'{n} images are asked for; expected at least 1')
    root = Path(os.path.expanduser(root))
    names = _ids(root)[:n]
    folder = root / split
    classes = tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())) if folder.is_dir() else ()
    numbers = {name: number for number, name in enumerate(classes)}
    missing = [name for name in names if name.partition('/')[0] not in numbers or not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {len(missing):,} of the {len(names):,} images of RobustBench's list, "
                                f"such as {missing[0]}; expected ImageNet's validation set with a directory for each "
                                'class')
    if len(classes) != 1000:  # the list has images of 997 of them, and a label is the place among all
        raise ValueError(f'{folder} has {len(classes)} directories; expected the 1,000 of the classes of ImageNet')
    return ImageFolder('imagenet', torch.tensor([numbers[name.partition('/')[0]] for name in names]), classes,
                       tuple(folder / name for name in names), folder)


def open_imagenet_c(root: str | Path | None, n: int) -> CorruptedImages:
    """Returns the first ``n`` images of RobustBench's list under each corruption, 224 x 224 as its boards have them.

    Args:
        root: directory with ``ImageNet-C/CORRUPTION/SEVERITY/CLASS/NAME.JPEG``, as its archives unpack.
        n: number of images.

    Raises:
        FileNotFoundError, ValueError: see `open_board`.
    """
    folders = {(name, severity): open_board(root, n, f'ImageNet-C/{name}/{severity}')
               for name in CORRUPTIONS for severity in SEVERITIES}
    transform = preprocessing('Res224')

    def read(corruption: str, severity: int, first: int, last: int) -> torch.Tensor:
        return folders[corruption, severity].take(torch.arange(first, last)).transformed(transform)

    listing = hashlib.sha256(''.join(folder.sha256() for folder in folders.values()).encode()).hexdigest()
    return CorruptedImages('ImageNet-C', next(iter(folders.values())).labels, read, {
        'generated': False, 'data_sha256': listing, 'preprocessing': 'Res224'})


def _ids(root: Path) -> list[str]:
    package = importlib.util.find_spec('robustbench')  # found and not imported
    places = [] if package is None else package.submodule_search_locations or []
    for place in (*(Path(place) / 'helper_files' for place in places), root):
        if (place / IDS).is_file():
            return (place / IDS).read_text().split()
    raise FileNotFoundError(f"{IDS} is not there; expected RobustBench, which has it (pip install 'timm-paf"
                            f"[robustbench]'), or its file in {root}")
