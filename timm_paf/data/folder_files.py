"""The image files of a directory with a directory for each class, and the directory of each split."""

from __future__ import annotations

import os
import re
from collections import deque
from pathlib import Path

__all__ = ['class_files', 'natural_order', 'split_directories']

SPLITS = {True: ('train',), False: ('val', 'validation', 'valid', 'test')}
"""Names of the directory of a split, by whether it is the training split; the first that is there counts."""

EXTENSIONS = frozenset({
    '.png', '.apng', '.jpg', '.jpeg', '.jpe', '.jfif', '.webp', '.avif', '.bmp', '.dib', '.gif', '.tif', '.tiff',
    '.ppm', '.pgm', '.pbm', '.pnm', '.jp2', '.tga'})
"""Extensions of images that Pillow opens: those of timm and torchvision, and others that people have."""

UNOPENED = frozenset({'.heic', '.heif', '.jxl'})
"""Extensions of images that Pillow does not open. They are refused, because a class of them would vanish."""

HIDDEN = frozenset({'__MACOSX', '@eaDir', '$RECYCLE.BIN'})
"""Directories that archives and file servers leave behind, with copies of images in them."""


def split_directories(root: Path) -> dict[bool, Path | None]:
    """Returns the directories of the training split (True) and the evaluation split (False), None where missing."""
    return {train: next((path for name in names if (path := root / name).is_dir()), None)
            for train, names in SPLITS.items()}


def natural_order(name: str) -> tuple[list[str | int], str]:
    """Returns a key that sorts numbers in names by their value, as timm does; equal ones, such as A and a, as text."""
    parts: list[str | int] = [*re.split(r'(\d+)', name.lower())]
    parts[1::2] = map(int, parts[1::2])
    return parts, name


def class_files(folder: Path, other: Path | None = None, unlabelled: bool = False) -> tuple[
        list[tuple[str, int]], tuple[str, ...]]:
    """Returns images with their labels, by label and path, and the names of the classes in natural order.

    Args:
        folder: the directory of a split. Its directories with an image in them, at any depth, are the classes.
        other: the directory of the other split, which must have the same classes.
        unlabelled: whether ``other`` may be a directory without classes, as images to submit labels for are.

    Raises:
        FileNotFoundError: if ``folder`` or ``other`` has no image.
        ValueError: for images outside of a class, less than two classes, or splits with other classes.
    """
    found = _images(folder)
    _check_classes(folder, found)
    if other is not None:
        others = _images(other)
        if not unlabelled or ('' not in others and len(others) > 1):
            _check_classes(other, others)
            if apart := found.keys() ^ others.keys():
                raise ValueError(f'{folder} and {other} have different classes, such as {min(apart)}; expected the '
                                 'same ones')
    classes = tuple(sorted(found, key=natural_order))
    return [(file, label) for label, name in enumerate(classes) for file in sorted(found[name])], classes


def _check_classes(folder: Path, found: dict[str, list[str]]) -> None:
    if not found:
        raise FileNotFoundError(f'{folder} has no images; expected a directory of them for each class')
    if '' in found or len(found) < 2:
        raise ValueError(f'{folder} has images of {"no class" if "" in found else f"one class, {min(found)}"}; '
                         f'expected each in a directory of its class, such as {folder}/dog/1.jpg')


def _images(folder: Path) -> dict[str, list[str]]:
    """Returns paths below ``folder`` by class, '' for those beside the classes, without hidden ones.

    Each directory is walked once, whatever links lead to it: real directories first, then links to others.

    Raises:
        ValueError: for a directory that can't be read or is two classes, or an image that Pillow doesn't open.
    """
    home = Path(os.path.realpath(folder))
    seen = {str(place): '' for place in home.parents}
    found: dict[str, list[str]] = {}
    unopened: list[str] = []
    directories, links = deque(['']), deque[str]()
    while directories or links:
        place = (directories or links).popleft()
        real = os.path.realpath(folder / place)
        if real in seen:
            if place and '/' not in place and seen[real]:
                raise ValueError(f'{folder}/{place} and {folder}/{seen[real]} are the same directory; expected one for '
                                 'each class: remove the link')
            continue
        seen[real] = place
        for entry in _entries(folder / place):
            path, link = f'{place}/{entry.name}' if place else entry.name, entry.is_symlink()
            extension = os.path.splitext(entry.name)[1].lower()
            if os.path.isdir(entry.path) if link else entry.is_dir():
                (links if link else directories).append(path)
            elif extension in EXTENSIONS and _may_be_read(entry):
                found.setdefault(place.partition('/')[0], []).append(path)
            elif extension in UNOPENED:
                unopened.append(path)
    if unopened:
        raise ValueError(f"{folder} has {len(unopened)} images that Pillow doesn't open, such as {min(unopened)}; "
                         f'expected png, jpg or webp: convert them, or move them out of {folder}')
    return found


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Returns what is in a directory, by name, without what is hidden."""
    try:
        with os.scandir(folder) as entries:
            kept = [entry for entry in entries if not entry.name.startswith('.') and entry.name not in HIDDEN]
    except OSError as error:
        raise ValueError(f"{folder} can't be read ({error.strerror}); expected a directory of images: give it the "
                         'permission, or move it away') from error
    return sorted(kept, key=lambda entry: entry.name)


def _may_be_read(entry: os.DirEntry[str]) -> bool:
    """Returns whether an entry is a file, or a link to one or to nothing; a link to nothing is an unreadable image."""
    if entry.is_symlink():
        return os.path.isfile(entry.path) or not os.path.exists(entry.path)
    return entry.is_file()
