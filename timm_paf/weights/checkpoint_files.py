"""Reads files of weights: tells their format by what they hold, and runs nothing that is in them.

A pickle of torch.save is read by torch's ``weights_only`` reader. Objects that checkpoints have beside the weights
(scalars of numpy, a Namespace, a Path) are not built: a `_Record` without behaviour takes the place of each.
"""

from __future__ import annotations

import itertools
import math
import os
import pickle
import re
import tarfile
import threading
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..files import is_of_machine
from ..wording import reason_of, shown
from .pickle_advice import advice

__all__ = ['check_file', 'check_tensors', 'read_file']

MAX_RATIO = 16  # bytes that an archive may claim for each that it has; torch.save packs nothing
_FAULTS = (
    pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError,
    MemoryError, AssertionError, OSError)  # of torch.load on a damaged file; RuntimeError has RecursionError too
_PACKED = (
    (b'\x1f\x8b', 'gzip'), (b'BZh', 'bzip2'), (b'\xfd7zXZ', 'xz'), (b'\x28\xb5\x2f\xfd', 'zstandard'),
    (b'7z\xbc\xaf', '7z'), (b'Rar!', 'rar'))
_lock = threading.Lock()  # torch's list of stand-ins is one for all threads


class _Record:
    """Stands for an object beside the weights; it keeps nothing and does nothing."""

    def __new__(cls, *args: Any) -> _Record:
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _record(*args: Any) -> _Record:
    return _Record()


def _dict(*args: Any) -> dict[Any, Any]:
    return {}  # a defaultdict without its factory; what follows in the file fills it


def _list(*args: Any) -> list[Any]:
    return []


def _stand_ins() -> dict[str, Any]:
    """Returns what takes the place of each class that is plain data, by its name in a pickle."""
    builtin = [f'{module}.{name}' for module in ('builtins', '__builtin__') for name in (
        'list', 'dict', 'int', 'float', 'str', 'bool', 'tuple', 'set', 'frozenset', 'bytes', 'complex', 'object',
        'slice', 'range', 'xrange', 'unicode', 'long')]
    numpy = [f'numpy.{core}.{name}' for core in ('core', '_core') for name in (
        'multiarray.scalar', 'multiarray._reconstruct', 'numeric._frombuffer')]
    scalars = [f'numpy.{name}' for name in (
        'bool', 'bool_', 'int8', 'uint8', 'int16', 'uint16', 'int32', 'uint32', 'int64', 'uint64', 'intc', 'longlong',
        'float16', 'float32', 'float64', 'longdouble', 'complex64', 'complex128', 'str_', 'bytes_', 'object_')]
    dtypes = [f'numpy.dtypes.{kind}DType' for kind in (
        'Bool', 'Int8', 'UInt8', 'Int16', 'UInt16', 'Int32', 'UInt32', 'Int64', 'UInt64', 'Float16', 'Float32',
        'Float64', 'LongDouble', 'Complex64', 'Complex128', 'Str', 'Bytes', 'Object', 'DateTime64', 'TimeDelta64')]
    random = [f'numpy.random.{name}' for name in (
        '_pickle.__randomstate_ctor', '_pickle.__generator_ctor', '_pickle.__bit_generator_ctor',
        '_mt19937.MT19937', '_pcg64.PCG64', '_philox.Philox', '_sfc64.SFC64', 'bit_generator.SeedSequence',
        'bit_generator.__pyx_unpickle_SeedSequence', 'mtrand.RandomState', '_generator.Generator')]
    paths = [f'{module}.{name}' for module in ('pathlib', 'pathlib._local') for name in (
        'Path', 'PurePath', 'PosixPath', 'PurePosixPath', 'WindowsPath', 'PureWindowsPath')]
    others = [
        'numpy.ndarray', 'numpy.dtype', 'argparse.Namespace', 'types.SimpleNamespace', 'datetime.datetime',
        'datetime.date', 'datetime.time', 'datetime.timedelta', 'datetime.timezone', 'decimal.Decimal',
        'fractions.Fraction', 'uuid.UUID', 'copy_reg._reconstructor', 'copyreg._reconstructor', 'typing.Any',
        'omegaconf.dictconfig.DictConfig', 'omegaconf.listconfig.ListConfig', 'omegaconf.base.ContainerMetadata',
        'omegaconf.base.Metadata', *(f'omegaconf.nodes.{kind}Node' for kind in (
            'Any', 'Integer', 'Float', 'String', 'Boolean', 'Bytes', 'Path', 'Enum'))]
    names = [*builtin, *numpy, *scalars, *dtypes, *random, *paths, *others]
    # Whether a name is of a class or of a function decides which instruction of a pickle may use it: a _Record
    # serves both, the functions only a call.
    return {
        **dict.fromkeys(names, _Record),
        **{name: _record for name in names if name.rpartition('.')[2].startswith('_')},
        **dict.fromkeys(('collections.defaultdict',), _dict), **dict.fromkeys(('collections.deque',), _list)}


_STAND_INS: list[Any] = [(stand_in, name) for name, stand_in in _stand_ins().items()]


def check_file(path: str | Path) -> None:
    """Refuses what is no file of weights, before anything in it is read.

    A zip archive, which `torch.save` writes, is compared with its own checksums: torch itself checks none.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is empty, a web page (of a download that failed), a pointer of Git LFS or git-annex, an
            archive that holds files, cut off or damaged.
    """
    path = Path(path)
    if path.is_symlink() and not path.exists() and 'annex/objects' in os.readlink(path):
        raise ValueError(f'{path} is a link of git-annex whose file is not here; run git annex get on it')
    if not path.is_file():
        raise FileNotFoundError(f'{path} is no file; expected a checkpoint')
    with open(path, 'rb') as file:
        head = file.read(4096)
    if not head:
        raise ValueError(f'{path} is empty; expected a checkpoint: get it again')
    if head.startswith(b'version https://git-lfs.github.com/spec/'):
        raise ValueError(f'{path} is a pointer of Git LFS and not the file itself; run git lfs pull in its clone')
    if head.startswith(b'/annex/objects/') or b'/.git/annex/objects/' in head[:400].partition(b'\n')[0]:
        raise ValueError(f'{path} is a pointer of git-annex and not the file itself; run git annex get on it')
    if head.lstrip()[:14].lower().startswith((b'<!doctype html', b'<html')):
        title = re.search(rb'<title[^>]*>(.*?)</title', head, re.IGNORECASE | re.DOTALL)
        what = shown(' '.join(title[1].decode(errors='replace').split())) if title else 'without a title'
        raise ValueError(f'{path} is a web page ({what}); expected a checkpoint: remove it and get it again')
    if head.startswith(b'PK\x03\x04'):
        _check_zip(path)
    elif not _is_safetensors(head) and not head.startswith(b'\x80'):
        _refuse_archive(path, head)


def _is_safetensors(head: bytes) -> bool:
    """Tells by the first bytes: the length of a JSON header, and its brace."""
    return head[8:9] == b'{' and int.from_bytes(head[:8], 'little') < 1 << 32


def _refuse_archive(path: Path, head: bytes) -> None:
    try:
        with tarfile.open(path) as archive:
            names = ', '.join(shown(member.name) for member in itertools.islice(archive, 3))
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, ArithmeticError, MemoryError):
        names = ''
    if names:
        raise ValueError(f'{path} is a tar archive of {names}; expected a checkpoint: unpack it (tar -xf) and give the '
                         'file that was in it')
    for magic, kind in _PACKED:
        if head.startswith(magic):
            raise ValueError(f'{path} is packed with {kind}; expected a checkpoint: unpack it')


def _check_zip(path: Path) -> None:
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            claimed = sum(info.file_size for info in entries)
            if claimed > MAX_RATIO * size:
                raise ValueError(f'{path} has {size:,} bytes and claims {claimed:,} unpacked; expected a file of '
                                 'torch.save, which packs nothing: do not unpack it')
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError, MemoryError, OverflowError,
            OSError) as error:
        if isinstance(error, PermissionError) or (isinstance(error, OSError) and is_of_machine(error)):
            raise
        raise ValueError(f'{path} is cut off or damaged ({reason_of(error, 120)}); get it again') from error
    before = min((info.header_offset for info in entries), default=0)
    if before:  # a download that resumed in the middle with the beginning of the file
        raise ValueError(f'{path} is damaged: {before:,} other bytes come before the archive; get it again')
    if damaged is not None:
        raise ValueError(f'{path} is damaged: {shown(damaged)} has another CRC-32 than the file says; get it again')
    inside = [Path(info.filename).name for info in entries]
    if 'data.pkl' not in inside and inside:
        raise ValueError(f'{path} is cut off or no checkpoint (a zip archive of {shown(", ".join(inside[:3]))}); '
                         'expected a file of torch.save or safetensors: unpack it and give the file that was in it')
    if 'constants.pkl' in inside:
        raise ValueError(f'{path} is a program of TorchScript; expected weights: where you trust it, save them alone: '
                         'torch.save(torch.jit.load(PATH).state_dict(), NEW)')


def read_file(path: Path) -> Any:
    """Returns the content of a file of torch.save or safetensors, after `check_file`; nothing in it is run.

    The format is told by the content, whatever the file is called.

    Raises:
        FileNotFoundError, ValueError: as `check_file`, or if the file needs code or is of another kind.
    """
    path = Path(path)
    check_file(path)
    with open(path, 'rb') as file:
        head = file.read(9)
    if _is_safetensors(head) or (path.suffix == '.safetensors' and head[:1] != b'\x80' and head[:2] != b'PK'):
        try:
            return load_file(path)
        except (SafetensorError, *_FAULTS) as error:
            raise ValueError(f'{path} is cut off or no safetensors file ({shown(error)}); get it again') from error
    try:
        return _torch_load(path)
    except _FAULTS as error:
        code = re.search(
            r'GLOBAL (\S+)|Unsupported operand|unrecognized function|Can only (?:build|create)', str(error))
        if code and (found := advice(path, code[1] or '')):
            raise ValueError(f'{path} {found}') from None
        reason = shown(str(error).strip().split('\n')[0].split('. ')[0] or type(error).__name__)
        raise ValueError(f'{path} is cut off or no checkpoint ({reason}); expected a file of torch.save or '
                         'safetensors') from error


def _torch_load(path: Path) -> Any:
    with _lock, warnings.catch_warnings(), torch.serialization.safe_globals(_STAND_INS), open(path, 'rb') as file:
        warnings.simplefilter('ignore')  # of another protocol than 2; the file is refused where that matters
        archive = zipfile.is_zipfile(file)
        file.seek(0)
        content = torch.load(file, map_location='cpu', weights_only=True)
        if not archive and file.read(1):  # the old format has no checksums
            raise ValueError('more bytes than one checkpoint')
        return content


def check_tensors(state: dict[str, Tensor], path: Path) -> None:
    """Refuses tensors that are no plain array of numbers, or claim far more entries than their file has bytes.

    Raises:
        ValueError: if there is one.
    """
    size = path.stat().st_size
    for key, value in state.items():
        kind = 'meta' if value.is_meta else 'sparse' if value.layout != torch.strided else 'quantised' \
            if value.is_quantized else 'complex' if value.is_complex() else ''
        if kind:
            raise ValueError(f'{path}: {shown(key)} is a {kind} tensor; expected dense real weights: save them as such')
        if (entries := math.prod(value.shape)) > 8 * MAX_RATIO * size:
            raise ValueError(f'{path}: {shown(key)} claims {entries:,} entries in a file of {size:,} bytes; expected '
                             'weights that are there: get it again from somebody you trust')
