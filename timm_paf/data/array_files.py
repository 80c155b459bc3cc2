"""Image arrays in npz, npy and pickle files, checked and read row by row from where they lie.

Rows are read with ``pread``, not through a memory map. The touched pages of a map count as memory of the process, and
random rows drive that up to the size of the file; a read leaves the pages to the kernel's cache, and this process with
one batch. Nothing is ever unpickled as code.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import struct
import weakref
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..files import atomic_directory, read_json, write_json
from .array_pickle import arrays_of_pickle

__all__ = ['Log', 'Rows', 'Shape', 'array_files', 'open_array_file']

ARRAY_NAMES = (('image', 'label'), ('X', 'Y'))
"""Names of images and labels in an npz: those of DDPM and EDM sets, and those of cifar5m."""


PICKLE_NAMES = ('data', 'extrapolated_targets')
"""Names of images and labels in the pickle of TI-500K."""


Shape = tuple[int, ...]


Log = Callable[[str], None]


class Rows:
    """The images in a file: ``count`` images of ``size`` bytes, one after another from ``offset`` on."""

    def __init__(self, path: Path, offset: int, count: int, size: int):
        found = path.stat().st_size
        if found < offset + count * size:
            raise ValueError(f'{path} has {found:,} bytes; expected {offset + count * size:,} for {count:,} images: it '
                             'was cut short, fetch it again')
        self.path, self.offset, self.count, self.size = path, offset, count, size
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        if hasattr(os, 'posix_fadvise'):  # not on macOS
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)  # the kernel does not read ahead of a row

    def announce(self, row: int) -> None:
        """Lets the disk begin to read a row."""
        if hasattr(os, 'posix_fadvise'):
            os.posix_fadvise(self._file, self.offset + row * self.size, self.size, os.POSIX_FADV_WILLNEED)

    def read(self, row: int, into: np.ndarray) -> None:
        """Reads a row into an array of its ``size`` bytes."""
        if os.preadv(self._file, [into.data], self.offset + row * self.size) != self.size:
            raise OSError(f'{self.path} ends within image {row}; it was cut short since the training began')


def array_files(path: Path) -> list[Path]:
    """Returns the files of images that a path names: the file itself, or those of a directory in their order."""
    if not path.exists():
        raise FileNotFoundError(f'{path} is missing; expected synthetic data: an npz, a directory of them, a pickle, '
                                'or images.npy and labels.npy')
    if not path.is_dir():
        return [path]
    if (path / 'images.npy').is_file():
        return [path / 'images.npy']
    parts = sorted(path.glob('*.npz'), key=lambda part: [  # part10 comes after part9
        (int(digits or 0), text) for text, digits in re.findall(r'(\D*)(\d*)', part.name)])
    if not parts:
        raise FileNotFoundError(f'{path} has no .npz; expected npz parts, or images.npy and labels.npy')
    return parts


def open_array_file(path: Path, image_shape: Shape, num_classes: int, cache: Path, log: Log) -> tuple[Rows, np.ndarray]:
    """Returns the images and the labels of a file, after checking them; see `synthetic.open_synthetic`."""
    with open(path, 'rb') as file:
        head = file.read(6)
    if head.startswith(b'PK'):
        return _open_npz(path, image_shape, num_classes, cache, log)
    if head == b'\x93NUMPY':
        return _open_npy(path, image_shape, num_classes)
    if head.startswith(b'\x80'):
        return _open_pickle(path, image_shape, num_classes, cache, log)
    raise ValueError(f'{path} begins with {head!r}; expected an npz, an npy or a pickle')


def _open_npy(path: Path, image_shape: Shape, num_classes: int) -> tuple[Rows, np.ndarray]:
    beside = path.with_name(path.name.replace('images', 'labels'))
    if beside == path or not beside.is_file():
        raise FileNotFoundError(f'{path} has no labels; expected images.npy and labels.npy side by side')
    with open(path, 'rb') as file:
        shape, dtype = _header(file, str(path))
        count = _check_images(str(path), shape, dtype, image_shape)
        offset = file.tell()
    with open(beside, 'rb') as file:
        labels = _read_labels(file, str(beside), count, num_classes)
    return Rows(path, offset, count, int(np.prod(image_shape))), labels


def _open_npz(path: Path, image_shape: Shape, num_classes: int, cache: Path, log: Log) -> tuple[Rows, np.ndarray]:
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
                return Rows(path, _member_offset(path, member) + header, count, size), labels

            def write(folder: Path) -> None:
                with archive.open(member) as stream, open(folder / 'images.npy', 'wb') as out:
                    shutil.copyfileobj(stream, out, 1 << 24)
                np.save(folder / 'labels.npy', labels)

            folder = _unpack(path, cache, member.file_size + labels.nbytes, log, write)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ValueError(f'{path} is damaged ({error}); fetch it again') from error
    return _open_npy(folder / 'images.npy', image_shape, num_classes)


def _member_offset(path: Path, member: zipfile.ZipInfo) -> int:
    """Returns where the bytes of a member begin: after a local header of 30 bytes, its name and an extra field, which
    may be longer than the one in the archive's directory."""
    with open(path, 'rb') as file:
        file.seek(member.header_offset)
        local = file.read(30)
    if len(local) < 30 or not local.startswith(b'PK\x03\x04'):
        raise zipfile.BadZipFile(f'no header of {member.filename} at byte {member.header_offset}')
    return member.header_offset + 30 + sum(struct.unpack('<HH', local[26:30]))


def _header(stream: IO[bytes], where: str) -> tuple[Shape, np.dtype[Any]]:
    """Returns shape and type of a .npy stream, and leaves the stream at its first value."""
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
    """Returns all labels, in the smallest type that holds them: 50 million are 50 MB, not 400."""
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


def _unpack(path: Path, cache: Path, size: int, log: Log, write: Callable[[Path], None]) -> Path:
    """Returns the directory that ``write`` filled with images.npy and labels.npy of ``path``, now or in another run."""
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
            for left in cache.glob(f'.{folder.name}.*.part'):  # left by a process that was killed while it wrote
                shutil.rmtree(left)
        free = shutil.disk_usage(cache).free
        if size > free:
            raise OSError(f'{path} needs {size / 1e9:.2f} GB unpacked, {cache} has {free / 1e9:.2f} GB free; make '
                          'room, or name another directory for it')
        log(f'unpacks {path} to {folder}, {size / 1e9:.2f} GB, once')
        try:
            with atomic_directory(folder) as part:
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


def _open_pickle(path: Path, image_shape: Shape, num_classes: int, cache: Path, log: Log) -> tuple[Rows, np.ndarray]:
    def write(folder: Path) -> None:
        images, labels = arrays_of_pickle(path, PICKLE_NAMES)
        where = f'{path}: {PICKLE_NAMES[1]}'
        count = _check_images(f'{path}: {PICKLE_NAMES[0]}', images.shape, images.dtype, image_shape)
        if labels.shape != (count,) or labels.dtype.kind not in 'iu':
            raise ValueError(f'{where} is {labels.dtype} {labels.shape}; expected integers ({count},)')
        _check_range(where, int(labels.min()), int(labels.max()), num_classes)
        np.save(folder / 'images.npy', np.ascontiguousarray(images))
        np.save(folder / 'labels.npy', labels)

    # Arrays are most of a pickle, so the unpacked files are about as large as the pickle.
    return _open_npy(_unpack(path, cache, path.stat().st_size, log, write) / 'images.npy', image_shape, num_classes)
