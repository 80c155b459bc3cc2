"""Image folders with a directory for each class."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .decoding import read_image
from .folder_files import SPLITS, class_files, split_directories
from .indexed import IndexedImages

__all__ = ['ImageFolder', 'open_folder']


@dataclass(frozen=True)
class ImageFolder(IndexedImages):
    """Image files with their labels; see `open_folder`."""

    files: tuple[Path, ...]
    root: Path = Path()

    def read(self, index: int, quick: bool = False) -> Image.Image:
        return read_image(self.files[index], quick)

    def where(self, index: int) -> str:
        return str(self.files[index])

    def names(self) -> list[str]:
        """Returns the path of each image below the directory of the split."""
        return [file.relative_to(self.root).as_posix() for file in self.files]

    def take(self, chosen: Tensor) -> ImageFolder:
        indices = torch.arange(len(self))[chosen]
        return replace(self, files=tuple(self.files[i] for i in indices.tolist()), labels=self.labels[indices])

    def digest(self) -> dict[str, str]:
        return {'sha256_of_listing': self.sha256()}

    def sha256(self) -> str:
        """Returns the SHA-256 of names, sizes and labels of the files in their order, but not of their content."""
        digest = hashlib.sha256()
        for file, label in zip(self.files, self.labels.tolist()):
            line = f'{file.parent.name}/{file.name} {file.stat().st_size} {label}\n'
            digest.update(line.encode(errors='surrogateescape'))  # a name may be of any bytes
        return digest.hexdigest()


def open_folder(root: str | Path, train: bool) -> ImageFolder:
    """Opens the images under ROOT/train, or under the first of ROOT/val, validation, valid and test that is there.

    Classes are the directories of a split that hold images, at any depth, in timm's natural order; both splits must
    have the same ones. Hidden files and directories don't count, a link to a directory is followed once, and files
    are told to be images by their extensions.

    Args:
        root: the directory ROOT that has a directory for each split; ``~`` is the home directory.
        train: whether to open the training split, else the evaluation split.

    Raises:
        FileNotFoundError: without such a directory, or without an image in it.
        ValueError: for images outside of a class, less than two classes, or splits with other classes; training takes
            no notice of a ROOT/test that has no classes.
    """
    root = Path(os.path.expanduser(root))
    found = split_directories(root)
    folder, other = found[train], found[not train]
    if folder is None:
        *names, last = SPLITS[train]
        raise FileNotFoundError(f'{root} has no {", ".join(names)}{" or " if names else ""}{last}; expected '
                                f'{root}/train and {root}/val, each with a directory of images for each class')
    samples, classes = class_files(folder, other, unlabelled=train and other is not None and other.name == 'test')
    return ImageFolder(root.absolute().name, torch.tensor([label for _, label in samples]), classes,
                       tuple(folder / file for file, _ in samples), folder)
