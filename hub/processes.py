"""Several processes at one task: their ranks, a barrier where they wait for one another, and a lock against others."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

RANK, WORLD = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
"""The number of this process and how many there are, as torchrun and accelerate launch say it."""


def default_device() -> str:
    """Returns the GPU of this process where there is one, else the CPU."""
    if os.environ.get('ACCELERATE_USE_CPU', 'false').lower() in ('true', '1', 'yes') or not torch.cuda.is_available():
        return 'cpu'
    return f'cuda:{os.environ.get("LOCAL_RANK", 0)}'


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Joins the other processes, if there are any; on Linux this one then ends with its launcher, however that ends."""
    if WORLD == 1:
        yield
        return
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
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
    """Holds a lock on an output, against other programs of one process or many.

    Args:
        output: the file that is written.
        what: what this program is, for the message.

    Raises:
        ValueError: if another program holds it.
    """
    lock = output.with_name(f'.{output.name}.lock')
    with open(lock, 'w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f'another {what} is at work on {output}; wait for it, or give --output DIR') from None
        for part in output.parent.glob(f'.{output.name}.*.part'):
            part.unlink()  # left by a process that was killed
        try:
            yield
        finally:
            lock.unlink()
