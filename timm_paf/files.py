"""Writes files that are whole or not there, and records what made them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .wording import first_line_of

__all__ = [
    'atomic_directory', 'atomic_write', 'environment', 'hub_directory', 'imported_version', 'is_of_machine',
    'read_json', 'read_record', 'record_sha256', 'save_torch', 'sha256', 'write_json', 'write_record',
]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _mode(bits: int) -> int:
    """Returns the mode of a new file or directory under this process's umask, which nothing but setting it tells."""
    mask = os.umask(0o077)
    os.umask(mask)
    return bits & ~mask


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a path to write to, which takes the place of ``path`` once the block is done and the file on the disk.

    If the block raises, ``path`` stays as it was. The umask decides who may read it: safetensors makes private files.
    """
    path = Path(path)
    part = path.with_name(f'.{path.name}.{os.getpid()}.part')
    try:
        yield part
        part.chmod(_mode(0o666))
        _sync(part)
        os.replace(part, path)
        _sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yields a directory to fill, which becomes ``path`` once the block is done and the files are on the disk.

    Raises:
        FileExistsError: if ``path`` is there already.
    """
    path = Path(path).absolute()
    if path.exists():
        raise FileExistsError(f'{path} exists; expected a new directory')
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f'.{path.name}.', suffix='.part', dir=path.parent))
    try:
        yield part
        for file in part.rglob('*'):
            file.chmod(_mode(0o777 if file.is_dir() else 0o666))
            _sync(file)
        _sync(part)
        part.chmod(_mode(0o777))  # mkdtemp makes it private
        os.rename(part, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def is_of_machine(error: BaseException) -> bool:
    """Returns whether an exception is of the machine and says nothing of a file's content: no memory, too many open
    files, a disk that fails, is full or is not there any more."""
    if isinstance(error, OSError):
        return error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ENOSPC,
                               errno.EDQUOT)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and 'DefaultCPUAllocator' in str(error))  # as torch says it of a CPU


def write_json(path: str | Path, record: Any) -> None:
    """Writes a record as JSON, by `atomic_write`."""
    with atomic_write(path) as part:
        part.write_text(json.dumps(record, indent=2) + '\n')


MAX_JSON = 64 << 20
"""Bytes of a JSON file that is read: verdicts of all test images under dozens of attacks have a tenth of it."""


def read_json(path: str | Path) -> Any:
    """Reads a JSON file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no JSON, or larger than any of ours.
    """
    path = Path(path)
    if not path.is_file():
        directory = '' if path.parent.is_dir() else f', and {path.parent} is no directory'
        raise FileNotFoundError(f'{path} is missing{directory}')
    if (size := path.stat().st_size) > MAX_JSON:
        raise ValueError(f'{path} has {size:,} bytes; expected at most {MAX_JSON:,}')
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is not JSON ({error}); it may have been cut short') from None


def record_sha256(record: dict[str, Any]) -> str:
    """Returns the SHA-256 of a record's content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def write_record(path: str | Path, record: dict[str, Any]) -> None:
    """Writes a record by `write_json`, with ``record_format`` and its own ``record_sha256``, for `read_record`."""
    record = {**record, 'record_format': 1}
    write_json(path, {**record, 'record_sha256': record_sha256(json.loads(json.dumps(record)))})


def read_record(path: str | Path) -> dict[str, Any]:
    """Reads a record of `write_record`, without the two entries that it added; one that has neither is taken as it is.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no JSON object, or was changed since it was written.
    """
    record = read_json(path)
    if not isinstance(record, dict):
        raise ValueError(f'{path} is no record; expected a JSON object')
    expected = record.pop('record_sha256', None)
    if expected is not None or 'record_format' in record:
        if expected != (found := record_sha256(record)):
            raise ValueError(f'{path} is damaged: record_sha256 {expected}, found {found}')
        del record['record_format']
    return record


def save_torch(state: Any, path: str | Path) -> None:
    """Saves by torch.save, but raises OSError where the file can't be written (torch's writer raises RuntimeError)."""
    try:
        torch.save(state, path)
    except RuntimeError as error:
        raise OSError(f'{path} could not be written, is there space left? {first_line_of(error)}') from error


def sha256(path: str | Path) -> str:
    """Returns the SHA-256 of a file as a hex digest."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hub_directory() -> Path:
    """Returns the directory of programs, recipes and bundles: in a wheel timm_paf/hub, in a clone hub beside it."""
    package = Path(__file__).resolve().parent
    return package / 'hub' if (package / 'hub').is_dir() else package.parent / 'hub'


def environment() -> dict[str, Any]:
    """Returns versions, hardware, command and git commit, for a result that somebody will repeat."""
    versions = {'python': platform.python_version()}
    for name in ('timm-paf', 'torch', 'timm', 'accelerate', 'numpy'):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    for name in ('robustbench', 'autoattack'):  # which a checkout on the path may give
        versions |= imported_version(name)
    hardware: dict[str, Any] = {'cpu': _cpu(), 'capability': torch.backends.cpu.get_cpu_capability(),
                                'cores': os.cpu_count(), 'threads': torch.get_num_threads()}
    if torch.cuda.is_available():
        hardware['gpu'] = f'{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}'
    return {'versions': versions, 'hardware': hardware, 'git_commit': _git_commit(Path(__file__).resolve().parents[1]),
            'command': _command(sys.orig_argv)}


def _command(argv: list[str]) -> str:
    """Returns the command that was typed, without the paths of the interpreter and the console command."""
    words = argv[1:]
    if words and Path(words[0]).name == 'timm-paf':
        return shlex.join(['timm-paf', *words[1:]])
    return shlex.join(['python', *words])


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                return line.split(':', 1)[1].strip()
    return platform.processor() or platform.machine()


def imported_version(module: str) -> dict[str, str]:
    """Returns the package that ``import module`` gives and its version, without importing it; {} if it gives none.

    The version is 'unknown' where no metadata lies beside the package. Behind it stands '+' and the commit where pip
    recorded one or the package lies in a clone.
    """
    try:
        spec = importlib.util.find_spec(module)
    except ValueError:  # an imported module that has none
        return {}
    name = getattr(spec and spec.loader, 'stand_in', module)  # see autoattack_import
    if name != module:
        spec = importlib.util.find_spec(name)
    places = list(spec.submodule_search_locations or ()) if spec else []
    if not places:
        return {}
    root = Path(places[0]).resolve().parent
    dist = next(iter(importlib.metadata.distributions(name=name, path=[str(root)])), None) or _editable(name, root)
    origin = json.loads((dist.read_text('direct_url.json') if dist else None) or '{}')
    commit = origin.get('vcs_info', {}).get('commit_id') or _git_commit(root)
    return {name: (dist.version if dist else 'unknown') + (f'+{commit}' if commit else '')}


def _editable(name: str, root: Path) -> importlib.metadata.Distribution | None:
    """Returns the metadata of a package that pip installed from ``root`` without copying it."""
    for dist in importlib.metadata.distributions(name=name):
        origin = json.loads(dist.read_text('direct_url.json') or '{}')
        if origin.get('dir_info', {}).get('editable') and origin['url'] == root.as_uri():
            return dist
    return None


def _git_commit(root: Path) -> str | None:
    """Returns the commit of the clone ``root``, with '-dirty' where tracked files differ from it.

    It is None for a directory that merely lies inside of a clone, such as that of an installed wheel.
    """
    if not (root / '.git').exists():
        return None
    try:
        done = subprocess.run(
            ['git', '-C', str(root), 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*'],
            capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
