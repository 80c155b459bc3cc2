"""Several processes at one task: ranks, a barrier, an end with their launcher, and a lock against other programs."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

__all__ = [
    'RANK', 'WORLD', 'barrier', 'default_device', 'end_with_launcher', 'exclusive_lock', 'process_group',
]

RANK, WORLD = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
"""The number of this process and how many there are, as torchrun and accelerate launch say it."""


def default_device() -> str:
    """Returns the GPU of this process where there is one, else the CPU."""
    if os.environ.get('ACCELERATE_USE_CPU', 'false').lower() in ('true', '1', 'yes') or not torch.cuda.is_available():
        return 'cpu'
    return f'cuda:{os.environ.get("LOCAL_RANK", 0)}'


def end_with_launcher() -> None:
    """Makes this process end with its launcher, however that ends, if it has one; on Linux alone.

    torchrun and accelerate launch, killed by SIGKILL, leave their workers behind, which would write beside the next.

    Raises:
        ValueError: if the launcher has ended already.
    """
    if 'LOCAL_RANK' not in os.environ:
        return
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if 'TORCHELASTIC_RUN_ID' in os.environ and sys.platform == 'linux':
        # An orphan's parent is the first process. In a container that may be torch's launcher, a Python, itself.
        try:
            parent = os.readlink(f'/proc/{os.getppid()}/exe')
        except OSError:
            parent = ''
        if os.getppid() == 1 and 'python' not in Path(parent).name:
            raise ValueError('the launcher of this process has ended')


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Joins the other processes, if there are any, and then ends with the launcher."""
    end_with_launcher()
    if WORLD == 1:
        yield
        return
    dist.init_process_group('gloo')
    try:
        yield
    finally:
        dist.destroy_process_group()


def barrier() -> None:
    """Waits for all processes to come here.

    Raises:
        ValueError: if one of them has ended.
    """
    if WORLD > 1:
        try:
            dist.barrier()
        except RuntimeError as error:
            raise ValueError(f'process {RANK} of {WORLD} stops: another one has ended') from error


@contextlib.contextmanager
def exclusive_lock(output: Path, what: str) -> Iterator[None]:
    """Holds a lock on an output, against other programs of one process or many. It ends with this process.

    Args:
        output: the file or directory that is written; it need not exist, the directory around it is made.
        what: what this program is, for the message.

    Raises:
        ValueError: if another program holds it.
    """
    path = output.resolve()  # which a link has too
    lock = path.with_name(f'.{path.name}.lock')
    lock.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() and not os.access(lock.parent, os.W_OK):
        lock = path / '.lock'
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before may have removed the file between the two lines above; then it locks nothing.
            if lock.exists() and os.path.samestat(os.fstat(file), lock.stat()):
                break
        except BlockingIOError:
            os.close(file)
            raise ValueError(f'another {what} is at work on {output}; wait for it, or give --output DIR') from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
                raise
            print(f'{lock.parent} knows no locks ({error.strerror}); start nothing else on {output} at the same time')
            break
        os.close(file)
    try:
        for part in path.parent.glob(f'.{glob.escape(path.name)}.*.part'):
            if part.is_file():
                part.unlink()  # left by a process that was killed
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(file)
