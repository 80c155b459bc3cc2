"""Image arrays in npz, npy and pickle files, checked and read row by row from where they lie.

Rows are read with ``pread``, not through a memory map. The touched pages of a map count as memory of the process, and
random rows drive that up to the size of the file; a read leaves the pages to the kernel's cache, and this process with
one batch. Nothing is ever unpickled as code.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import lzma
import os
import re
import shutil
import struct
import tokenize
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..files import atomic_directory, read_json, write_json
from ..wording import reason_of
from .array_pickle import arrays_of_pickle

__all__ = ['Log', 'Rows', 'Shape', 'array_files', 'open_array_file']

ARRAY_NAMES = (('image', 'label'), ('X', 'Y'), ('images', 'labels'), ('arr_0', 'arr_1'))
"""Names of images and labels in an npz, in any case: of DDPM and EDM sets, of cifar5m, and of guided diffusion."""

MAX_RATIO = 1100
"""Bytes of an array for each byte of its file; deflate packs zeros 1,032 to one, and images less."""


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
        raise FileNotFoundError(f'{path} is missing; expected synthetic data, --synthetic FILE:SHARE: an npz, a '
                                'directory of them, a pickle, or images.npy and labels.npy (headers of recipes say '
                                'where theirs are)')
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
        rows = Rows(path, file.tell(), count, int(np.prod(image_shape)))
    with open(beside, 'rb') as file:
        labels = _read_labels(file, str(beside), count, num_classes)
    return rows, labels


def _open_npz(path: Path, image_shape: Shape, num_classes: int, cache: Path, log: Log) -> tuple[Rows, np.ndarray]:
    size = int(np.prod(image_shape))
    try:
        with zipfile.ZipFile(path) as archive:
            found = [name.removesuffix('.npy') for name in archive.namelist() if name.endswith('.npy')]
            names = _names(path, found)
            member = archive.getinfo(f'{names[0]}.npy')
            with _member(archive, member.filename) as stream:
                shape, dtype = _header(stream, f'{path}: {names[0]}')
                count = _check_images(f'{path}: {names[0]}', shape, dtype, image_shape)
                header = stream.tell()
            if member.file_size != header + count * size:
                raise ValueError(f'{path}: {names[0]} has {member.file_size - header:,} bytes; expected '
                                 f'{count * size:,} for its shape {shape}')
            if member.file_size > MAX_RATIO * path.stat().st_size:  # before memory or disk is taken for it
                raise ValueError(f'{path}: {names[0]} claims {member.file_size:,} bytes in a file of '
                                 f'{path.stat().st_size:,}; expected images: fetch it again')
            with _member(archive, f'{names[1]}.npy') as stream:
                labels = _read_labels(stream, f'{path}: {names[1]}', count, num_classes)
            if member.compress_type == zipfile.ZIP_STORED:
                return Rows(path, _member_offset(path, member) + header, count, size), labels

            def write(folder: Path) -> None:
                with _member(archive, member.filename) as stream, open(folder / 'images.npy', 'wb') as out:
                    shutil.copyfileobj(stream, out, 1 << 24)
                np.save(folder / 'labels.npy', labels)

            folder = _unpack(path, cache, member.file_size + labels.nbytes, log, write)
    # RuntimeError is that of an encrypted member.
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError) as error:
        raise ValueError(f'{path} is damaged ({error}); fetch it again') from error
    return _open_npy(folder / 'images.npy', image_shape, num_classes)


@contextlib.contextmanager
def _member(archive: zipfile.ZipFile, name: str) -> Iterator[IO[bytes]]:
    """Yields the stream of a member; where bz2 calls damage an OSError, it is a BadZipFile."""
    with archive.open(name) as stream:
        try:
            yield stream
        except OSError as error:
            if error.errno is None:
                raise zipfile.BadZipFile(str(error)) from error
            raise


def _names(path: Path, found: list[str]) -> tuple[str, str]:
    """Returns the names of images and labels among those in an npz."""
    for images, labels in ARRAY_NAMES:
        if images in found and labels in found:
            return images, labels
    for images, labels in ARRAY_NAMES:
        alike = [[name for name in found if name.lower() == wanted.lower()] for wanted in (images, labels)]
        if [len(names) for names in alike] == [1, 1]:
            return alike[0][0], alike[1][0]
    expected = ', '.join(' and '.join(pair) for pair in ARRAY_NAMES[:-1])
    held = ' '.join(', '.join(found).split())[:200] or 'nothing'
    raise ValueError(f'{path} holds {held}; expected {expected}, or '
                     f'{" and ".join(ARRAY_NAMES[-1])}')


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
    except (ValueError, TypeError, OverflowError, RecursionError, MemoryError, SyntaxError, tokenize.TokenError,
            struct.error) as error:  # a header is a literal of Python, which may be anything
        raise ValueError(f'{where} is no .npy array: {reason_of(error)}; expected one of numpy: fetch it '
                         'again') from error
    if not all(0 <= length < 2 ** 48 for length in shape):
        raise ValueError(f'{where} claims a shape that no file has; expected one of numpy: fetch it again')
    if fortran and sum(length > 1 for length in shape) > 1:
        raise ValueError(f'{where} is in Fortran order; expected C order: save it with np.ascontiguousarray')
    return shape, dtype


def _check_images(where: str, shape: Shape, dtype: np.dtype[Any], image_shape: Shape) -> int:
    if dtype != np.uint8 or len(shape) != 4 or shape[1:] != image_shape or shape[0] < 1:
        raise ValueError(f'{where} is {dtype} {shape}; expected uint8 (n, {", ".join(map(str, image_shape))})')
    return shape[0]


def _read_labels(stream: IO[bytes], where: str, count: int, num_classes: int) -> np.ndarray:
    """Returns all labels, in the smallest type that holds them: 50 million are 50 MB, not 400."""
    shape, dtype = _header(stream, where)
    if dtype.kind not in 'iu' or not shape or shape[1:] not in ((), (1,)):
        raise ValueError(f'{where} is {dtype} {shape}; expected integers (n,)')
    if shape[0] != count:
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
        labels = labels[:, 0] if labels.shape == (count, 1) else labels
        if labels.shape != (count,) or labels.dtype.kind not in 'iu':
            raise ValueError(f'{where} is {labels.dtype} {labels.shape}; expected integers ({count},)')
        _check_range(where, int(labels.min()), int(labels.max()), num_classes)
        np.save(folder / 'images.npy', np.ascontiguousarray(images))
        np.save(folder / 'labels.npy', labels)

    # Arrays are most of a pickle, so the unpacked files are about as large as the pickle.
    return _open_npy(_unpack(path, cache, path.stat().st_size, log, write) / 'images.npy', image_shape, num_classes)
