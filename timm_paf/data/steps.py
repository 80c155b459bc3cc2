"""How a pass over a data set is cut into steps, and a step into the shares of processes and threads."""

from __future__ import annotations

import os

__all__ = ['cores', 'epoch_steps', 'share']


def epoch_steps(n: int, size: int, world: int, drop_last: bool) -> tuple[int, int]:
    """Returns the number of batches in an epoch, and how many images the last of them has.

    Args:
        n: number of images.
        size: images of a batch, at most ``n``.
        world: number of processes that share out each batch, a divisor of ``size``.
        drop_last: whether the images that fill no batch are left out.

    Raises:
        ValueError: if the last batch can't be divided among the processes.
    """
    steps, rest = divmod(n, size)
    if drop_last or not rest:
        return steps, size
    if rest % world:
        raise ValueError(f'the last batch of an epoch has {rest} of {n} images and there are {world} processes; '
                         'expected a multiple of them: choose another batch size, or drop the last batch')
    return steps + 1, rest


def share(size: int, rank: int, world: int) -> slice:
    """Returns the part of ``size`` images that is that of process ``rank``, from 0, of ``world``."""
    return slice(rank * size // world, (rank + 1) * size // world)


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
