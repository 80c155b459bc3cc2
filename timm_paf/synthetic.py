"""Millions of generated images beside the real ones: checked once, then read row by row from where they lie.

Rows are read with ``pread``, not through a memory map: the pages of a map that were touched count as memory of the
process, which random rows drive up to the size of the file, while a read leaves them to the kernel's cache and
this process with one batch. Nothing is ever unpickled as code.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import struct
import weakref
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

__all__ = ['Permutation', 'SyntheticSet', 'open_synthetic']

ARRAY_NAMES = (('image', 'label'), ('X', 'Y'))
"""Of images and labels in an npz: DDPM and EDM sets, cifar5m."""

PICKLE_NAMES = ('data', 'extrapolated_targets')
"""Of images and labels in the pickle of TI-500K."""

Shape = tuple[int, ...]
Say = Callable[[str], None]


class Permutation:
    """A seeded bijection of [0, n) in constant memory: a Feistel cipher that walks on while it is outside of [0, n).

    Black, Rogaway: Ciphers with Arbitrary Finite Domains, CT-RSA 2002. It works on at most 4 n
    values, so a position takes 4 encryptions on average or fewer.

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
        """Positions (m,) in [0, n) -> the values there, int64."""
        values = self._encrypt(positions.astype(np.uint64))
        while (outside := values >= self.n).any():
            values[outside] = self._encrypt(values[outside])
        return values.astype(np.int64)

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            # the finalizer of SplitMix64 (Steele et al. 2014), which mixes every bit into every other
            mixed = right + key
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & self._mask)
        return (left << self._half) | right


class _Rows:
    """``count`` images of ``size`` bytes, one after another in a file from ``offset`` on."""

    def __init__(self, path: Path, offset: int, count: int, size: int):
        found = path.stat().st_size
        if found < offset + count * size:
            raise ValueError(f'{path} has {found:,} bytes; expected {offset + count * size:,} for {count:,} images: it '
                             'was cut short, fetch it again')
        self.path, self.offset, self.count, self.size = path, offset, count, size
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        if hasattr(os, 'posix_fadvise'):  # not on macOS
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead of a row

    def announce(self, row: int) -> None:
        """Let the disk begin to read a row."""
        if hasattr(os, 'posix_fadvise'):
            os.posix_fadvise(self._file, self.offset + row * self.size, self.size, os.POSIX_FADV_WILLNEED)

    def read(self, row: int, into: np.ndarray) -> None:
        if os.preadv(self._file, [into.data], self.offset + row * self.size) != self.size:
            raise OSError(f'{self.path} ends within image {row}; it was cut short since the training began')


class SyntheticSet:
    """Images (n, height, width, channels) uint8 that stay in their files, and labels that are held.

    ``synthetic[indices]`` gives the images of indices (m,), as uint8 (m, height, width, channels), and their labels as
    int64 (m,). `open_synthetic` makes one.
    """

    def __init__(self, name: str, image_shape: Shape, num_classes: int, parts: Sequence[_Rows], labels: np.ndarray):
        self.name, self.image_shape, self.num_classes = name, image_shape, num_classes
        self._parts, self._labels = list(parts), labels
        self._ends = np.cumsum([part.count for part in parts])

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, indices: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
        """
        Raises:
            IndexError: for an index outside of [0, n).
            OSError: for a file that was cut short after it was opened.
        """
        chosen = np.asarray(indices)
        if len(chosen) and not (chosen.min() >= 0 and chosen.max() < len(self)):
            raise IndexError(f'indices span [{chosen.min()}, {chosen.max()}]; {self.name} has {len(self):,} images')
        images = torch.empty((len(chosen), *self.image_shape), dtype=torch.uint8)
        into = images.numpy()
        places = np.argsort(chosen)  # a disk likes one direction
        parts = np.searchsorted(self._ends, chosen[places], side='right')
        rows = chosen[places] - np.append(0, self._ends)[parts]
        todo = list(zip(places.tolist(), [self._parts[part] for part in parts], rows.tolist()))
        for _, part, row in todo:  # first all of them, so that the disk has them in its queue at once
            part.announce(row)
        for place, part, row in todo:
            part.read(row, into[place])
        return images, torch.from_numpy(self._labels[chosen].astype(np.int64))

    def order(self, positions: np.ndarray, seed: int) -> np.ndarray:
        """Indices (m,) at these positions (m,) of an endless sequence; each n of them from a multiple of n on are a
        permutation of the set, and each such pass is another one."""
        passes, positions = np.divmod(positions, len(self))
        indices = np.empty_like(positions)
        for number in np.unique(passes).tolist():
            now = passes == number
            indices[now] = Permutation(len(self), seed, number)(positions[now])
        return indices

    def record(self) -> dict[str, Any]:
        """For JSON: files, count, and a SHA-256 of all labels as int64 and 1,000 evenly spaced images."""
        digest = hashlib.sha256()
        for start in range(0, len(self), 1 << 20):
            digest.update(self._labels[start:start + (1 << 20)].astype(np.int64).tobytes())
        digest.update(self[np.linspace(0, len(self) - 1, min(len(self), 1000)).astype(np.int64)][0].numpy().tobytes())
        return {'name': self.name, 'n': len(self), 'files': [part.path.name for part in self._parts],
                'sha256_of_sample': digest.hexdigest()}


def open_synthetic(
        path: str | Path | Sequence[str | Path], image_shape: Shape, num_classes: int,
        cache: str | Path | None = None, say: Say = print) -> SyntheticSet:
    """Synthetic images, checked: names, types, shapes, counts and every label.

    Args:
        path: an npz with ``image`` and ``label`` (DDPM, EDM) or ``X`` and ``Y`` (a part of cifar5m); the pickle of
            TI-500K; ``images.npy`` with ``labels.npy`` beside it (or any name with 'images' in it); a directory with
            such a pair or with npz parts, in the order of the numbers in their names; or a list of these.
        image_shape: (height, width, channels) that the images must have; they are uint8.
        num_classes: labels must be in [0, num_classes).
        cache: where what can't be read in place (a compressed npz, a pickle) is unpacked to, once; else beside it.
        say: is told before something is unpacked, and how large it will be.

    Raises:
        ValueError: for a file that is damaged or holds something else, or a pickle with anything but arrays and plain
            values in it.
        OSError: for a missing file, or no space to unpack one.
    """
    sources = [Path(path)] if isinstance(path, str | Path) else [Path(part) for part in path]
    parts, labels = [], []
    for source in [file for each in sources for file in _files(each)]:
        opened = _open(source, image_shape, num_classes, Path(cache) if cache else source.parent, say)
        parts.append(opened[0])
        labels.append(opened[1])
    if not parts:
        raise ValueError('the list of synthetic data is empty; expected at least one file or directory')
    return SyntheticSet(sources[0].name, image_shape, num_classes, parts, np.concatenate(labels))


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f'{path} is missing; expected synthetic data: an npz, a directory of them, a pickle, '
                                'or images.npy and labels.npy')
    if not path.is_dir():
        return [path]
    if (path / 'images.npy').is_file():
        return [path / 'images.npy']
    parts = sorted(path.glob('*.npz'), key=lambda part: [  # part10 after part9
        (int(digits or 0), text) for text, digits in re.findall(r'(\D*)(\d*)', part.name)])
    if not parts:
        raise FileNotFoundError(f'{path} has no .npz; expected npz parts, or images.npy and labels.npy')
    return parts


def _open(path: Path, image_shape: Shape, num_classes: int, cache: Path, say: Say) -> tuple[_Rows, np.ndarray]:
    with open(path, 'rb') as file:
        head = file.read(6)
    if head.startswith(b'PK'):
        return _open_npz(path, image_shape, num_classes, cache, say)
    if head == b'\x93NUMPY':
        return _open_npy(path, image_shape, num_classes)
    if head.startswith(b'\x80'):
        return _open_pickle(path, image_shape, num_classes, cache, say)
    raise ValueError(f'{path} begins with {head!r}; expected an npz, an npy or a pickle')


def _open_npy(path: Path, image_shape: Shape, num_classes: int) -> tuple[_Rows, np.ndarray]:
    beside = path.with_name(path.name.replace('images', 'labels'))
    if beside == path or not beside.is_file():
        raise FileNotFoundError(f'{path} has no labels; expected images.npy and labels.npy side by side')
    with open(path, 'rb') as file:
        shape, dtype = _header(file, str(path))
        count = _check_images(str(path), shape, dtype, image_shape)
        offset = file.tell()
    with open(beside, 'rb') as file:
        labels = _read_labels(file, str(beside), count, num_classes)
    return _Rows(path, offset, count, int(np.prod(image_shape))), labels


def _open_npz(path: Path, image_shape: Shape, num_classes: int, cache: Path, say: Say) -> tuple[_Rows, np.ndarray]:
    size = int(np.prod(image_shape))
    try:
        with zipfile.ZipFile(path) as archive:
            found = [name.removesuffix('.npy') for name in archive.namelist()]
            names = next((pair for pair in ARRAY_NAMES if set(pair) <= set(found)), None)
            if names is None:
                raise ValueError(f'{path} holds {", ".join(found) or "nothing"}; expected image and label, or X and Y')
            member = archive.getinfo(f'{names[0]}.npy')
            with archive.open(member) as stream:
                shape, dtype = _header(stream, f'{path}: {names[0]}')
                count = _check_images(f'{path}: {names[0]}', shape, dtype, image_shape)
                header = stream.tell()
            with archive.open(f'{names[1]}.npy') as stream:
                labels = _read_labels(stream, f'{path}: {names[1]}', count, num_classes)
            if member.file_size != header + count * size:
                raise ValueError(f'{path}: {names[0]} has {member.file_size - header:,} bytes; expected '
                                 f'{count * size:,} for its shape {shape}')
            if member.compress_type == zipfile.ZIP_STORED:
                return _Rows(path, _member_offset(path, member) + header, count, size), labels

            def write(folder: Path) -> None:
                with archive.open(member) as stream, open(folder / 'images.npy', 'wb') as out:
                    shutil.copyfileobj(stream, out, 1 << 24)
                np.save(folder / 'labels.npy', labels)

            folder = _unpack(path, cache, member.file_size + labels.nbytes, say, write)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ValueError(f'{path} is damaged ({error}); fetch it again') from error
    return _open_npy(folder / 'images.npy', image_shape, num_classes)


def _member_offset(path: Path, member: zipfile.ZipInfo) -> int:
    """Where the bytes of a member begin: its local header is 30 bytes, its name and an extra field, which may be longer
    than the one in the archive's directory."""
    with open(path, 'rb') as file:
        file.seek(member.header_offset)
        local = file.read(30)
    if len(local) < 30 or not local.startswith(b'PK\x03\x04'):
        raise zipfile.BadZipFile(f'no header of {member.filename} at byte {member.header_offset}')
    return member.header_offset + 30 + sum(struct.unpack('<HH', local[26:30]))


def _header(stream: IO[bytes], where: str) -> tuple[Shape, np.dtype[Any]]:
    """Shape and type of a .npy stream, which is left at its first value."""
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except ValueError as error:
        raise ValueError(f'{where} is no .npy array: {str(error).splitlines()[0]}') from error
    if fortran and len(shape) > 1:
        raise ValueError(f'{where} is in Fortran order; expected C order: save it with np.ascontiguousarray')
    return shape, dtype


def _check_images(where: str, shape: Shape, dtype: np.dtype[Any], image_shape: Shape) -> int:
    if dtype != np.uint8 or len(shape) != 4 or shape[1:] != image_shape or not shape[0]:
        raise ValueError(f'{where} is {dtype} {shape}; expected uint8 (n, {", ".join(map(str, image_shape))})')
    return shape[0]


def _read_labels(stream: IO[bytes], where: str, count: int, num_classes: int) -> np.ndarray:
    """All labels, in the smallest type that holds them: 50 million are 50 MB, not 400."""
    shape, dtype = _header(stream, where)
    if dtype.kind not in 'iu' or len(shape) != 1:
        raise ValueError(f'{where} is {dtype} {shape}; expected integers (n,)')
    if shape != (count,):
        raise ValueError(f'{where}: {shape[0]:,} labels for {count:,} images; expected as many')
    labels = np.empty(count, np.min_scalar_type(num_classes - 1))
    low, high, chunk = num_classes, -1, 1 << 20
    for start in range(0, count, chunk):
        block = stream.read(min(chunk, count - start) * dtype.itemsize)
        if len(block) != min(chunk, count - start) * dtype.itemsize:
            raise ValueError(f'{where} ends within label {start + len(block) // dtype.itemsize:,} of {count:,}; it was '
                             'cut short, fetch it again')
        values = np.frombuffer(block, dtype)
        low, high = min(low, int(values.min())), max(high, int(values.max()))
        labels[start:start + len(values)] = values.astype(labels.dtype)
    _check_range(where, low, high, num_classes)
    return labels


def _check_range(where: str, low: int, high: int, num_classes: int) -> None:
    if low < 0 or high >= num_classes:
        raise ValueError(f'{where}: labels span [{low}, {high}]; expected [0, {num_classes - 1}]')


def _unpack(path: Path, cache: Path, size: int, say: Say, write: Callable[[Path], None]) -> Path:
    """The directory that ``write`` filled with images.npy and labels.npy of ``path``, now or in an earlier run."""
    from .files import read_json, whole_directory, write_json

    folder = cache / f'{path.name}.unpacked'
    source = {'bytes': path.stat().st_size, 'mtime_ns': path.stat().st_mtime_ns}
    cache.mkdir(parents=True, exist_ok=True)
    lock = os.open(cache, os.O_RDONLY)
    try:
        locked = False
        with contextlib.suppress(OSError):  # some network disks have no locks: then each process unpacks, one wins
            fcntl.flock(lock, fcntl.LOCK_EX)
            locked = True
        if folder.is_dir():
            if read_json(folder / 'source.json') != source:
                raise ValueError(f'{folder} was made from another {path.name}; delete that directory')
            return folder
        if locked:
            for left in cache.glob(f'.{folder.name}.*.part'):  # by a process that was killed while it wrote
                shutil.rmtree(left)
        free = shutil.disk_usage(cache).free
        if size > free:
            raise OSError(f'{path} needs {size / 1e9:.2f} GB unpacked, {cache} has {free / 1e9:.2f} GB free; make '
                          'room, or name another directory for it')
        say(f'unpacks {path} to {folder}, {size / 1e9:.2f} GB, once')
        try:
            with whole_directory(folder) as part:
                write(part)
                write_json(part / 'source.json', source)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and folder.is_dir():
                return folder  # another process was first
            raise OSError(f'{folder} could not be written: {error.strerror or error}; make room, or name another '
                          'directory for it') from error
    finally:
        os.close(lock)
    return folder


def _open_pickle(path: Path, image_shape: Shape, num_classes: int, cache: Path, say: Say) -> tuple[_Rows, np.ndarray]:
    from .array_pickle import arrays_of_pickle

    def write(folder: Path) -> None:
        images, labels = arrays_of_pickle(path, PICKLE_NAMES)
        where = f'{path}: {PICKLE_NAMES[1]}'
        count = _check_images(f'{path}: {PICKLE_NAMES[0]}', images.shape, images.dtype, image_shape)
        if labels.shape != (count,) or labels.dtype.kind not in 'iu':
            raise ValueError(f'{where} is {labels.dtype} {labels.shape}; expected integers ({count},)')
        _check_range(where, int(labels.min()), int(labels.max()), num_classes)
        np.save(folder / 'images.npy', np.ascontiguousarray(images))
        np.save(folder / 'labels.npy', labels)

    # arrays are most of a pickle, so it is about as large as what comes out
    return _open_npy(_unpack(path, cache, path.stat().st_size, say, write) / 'images.npy', image_shape, num_classes)
