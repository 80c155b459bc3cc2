"""Millions of generated images beside the real ones: checked once, then read row by row from where they lie."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .array_files import Log, Rows, Shape, array_files, open_array_file

__all__ = ['Permutation', 'SyntheticSet', 'open_synthetic']


class Permutation:
    """A seeded bijection of [0, n) in constant memory: a Feistel cipher, applied again while a value is outside [0, n).

    Black, Rogaway: Ciphers with Arbitrary Finite Domains, CT-RSA 2002. The cipher works on at most 4 n values, so a
    position takes 4 encryptions on average or fewer.

    Args:
        n: number of values, 1 to 2^62.
        key: non-negative integers; each tuple gives another bijection.
    """

    def __init__(self, n: int, *key: int):
        assert 1 <= n <= 2 ** 62
        self.n = n
        half = max(1, ((n - 1).bit_length() + 1) // 2)
        self._half, self._mask = np.uint64(half), np.uint64(2 ** half - 1)
        self._keys = np.random.SeedSequence(key).generate_state(8, np.uint64)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Returns the values, int64 (m,) in [0, n), at positions (m,) in [0, n)."""
        values = self._encrypt(positions.astype(np.uint64))
        while (outside := values >= self.n).any():
            values[outside] = self._encrypt(values[outside])
        return values.astype(np.int64)

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            # The round function is the finalizer of SplitMix64 (Steele et al. 2014), which mixes every bit into every
            # other.
            mixed = right + key
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & self._mask)
        return (left << self._half) | right


class SyntheticSet:
    """A set of images (n, height, width, channels) uint8 that stay in their files, with labels held in memory.

    ``synthetic[indices]`` gives the images of indices (m,), as uint8 (m, height, width, channels), and their labels as
    int64 (m,). `open_synthetic` makes one.
    """

    def __init__(self, name: str, image_shape: Shape, num_classes: int, parts: Sequence[Rows], labels: np.ndarray):
        self.name, self.image_shape, self.num_classes = name, image_shape, num_classes
        self._parts, self._labels = list(parts), labels
        self._ends = np.cumsum([part.count for part in parts])

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, indices: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
        """Returns the images and labels of indices (m,).

        Raises:
            IndexError: for an index outside of [0, n).
            OSError: for a file that was cut short after it was opened.
        """
        chosen = np.asarray(indices)
        if len(chosen) and not (chosen.min() >= 0 and chosen.max() < len(self)):
            raise IndexError(f'indices span [{chosen.min()}, {chosen.max()}]; {self.name} has {len(self):,} images')
        images = torch.empty((len(chosen), *self.image_shape), dtype=torch.uint8)
        into = images.numpy()
        places = np.argsort(chosen)  # a disk is fastest in one direction
        parts = np.searchsorted(self._ends, chosen[places], side='right')
        rows = chosen[places] - np.append(0, self._ends)[parts]
        todo = list(zip(places.tolist(), [self._parts[part] for part in parts], rows.tolist()))
        for _, part, row in todo:  # all rows are announced first, so that the disk has them in its queue at once
            part.announce(row)
        for place, part, row in todo:
            part.read(row, into[place])
        return images, torch.from_numpy(self._labels[chosen].astype(np.int64))

    def order(self, positions: np.ndarray, seed: int) -> np.ndarray:
        """Returns the indices (m,) at positions (m,) of an endless sequence of passes over the set.

        Each pass of n positions from a multiple of n on is a permutation of the set, and each pass is another one.
        """
        passes, positions = np.divmod(positions, len(self))
        indices = np.empty_like(positions)
        for number in np.unique(passes).tolist():
            now = passes == number
            indices[now] = Permutation(len(self), seed, number)(positions[now])
        return indices

    def record(self) -> dict[str, Any]:
        """Returns for JSON: files, count, and a SHA-256 of all labels as int64 and 1,000 evenly spaced images."""
        digest = hashlib.sha256()
        for start in range(0, len(self), 1 << 20):
            digest.update(self._labels[start:start + (1 << 20)].astype(np.int64).tobytes())
        digest.update(self[np.linspace(0, len(self) - 1, min(len(self), 1000)).astype(np.int64)][0].numpy().tobytes())
        return {'name': self.name, 'n': len(self), 'files': [part.path.name for part in self._parts],
                'sha256_of_sample': digest.hexdigest()}


def open_synthetic(
        path: str | Path | Sequence[str | Path], image_shape: Shape, num_classes: int,
        cache: str | Path | None = None, log: Log = print) -> SyntheticSet:
    """Opens synthetic images and checks names, types, shapes, counts and every label.

    Args:
        path: an npz with ``image`` and ``label`` (DDPM, EDM), ``X`` and ``Y`` (a part of cifar5m), ``images`` and
            ``labels``, or ``arr_0`` and ``arr_1`` (guided diffusion), in any case; the pickle of TI-500K;
            ``images.npy`` with ``labels.npy`` beside it (or any name with 'images' in it); a directory with such a
            pair or with npz parts, in the order of the numbers in their names; or a list of these. Labels are (n,) or
            (n, 1); ``~`` is the home directory.
        image_shape: (height, width, channels) that the images must have; they are uint8.
        num_classes: number of classes; labels must be in [0, num_classes).
        cache: directory into which a file that can't be read in place (a compressed npz, a pickle) is unpacked, once;
            default: beside the file.
        log: gets a line before something is unpacked, with the size it will have.

    Raises:
        ValueError: for a file that is damaged or holds something else, or a pickle with anything but arrays and plain
            values in it.
        OSError: for a missing file, or no space to unpack one.
    """
    sources = [Path(os.path.expanduser(part)) for part in ([path] if isinstance(path, str | Path) else path)]
    unpacked = None if cache is None else Path(os.path.expanduser(cache))
    parts, labels = [], []
    for source in [file for each in sources for file in array_files(each)]:
        opened = open_array_file(source, image_shape, num_classes, unpacked or source.parent, log)
        parts.append(opened[0])
        labels.append(opened[1])
    if not parts:
        raise ValueError('the list of synthetic data is empty; expected at least one file or directory')
    return SyntheticSet(sources[0].name, image_shape, num_classes, parts, np.concatenate(labels))


