"""How a pass over a data set is cut into steps, and a step into the shares of processes and threads."""

from __future__ import annotations

import os

__all__ = ['check_sizes', 'cores', 'epoch_steps', 'share']


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


def check_sizes(sizes: tuple[int, int], world: int, parts: int, pairs: bool) -> None:
    """Checks that the images of a process can be worked on, in any batch and in the last of an epoch.

    Args:
        sizes: images of a batch, and of the last one of an epoch, over all processes together.
        world: number of processes.
        parts: parts that a process works on one after the other.
        pairs: whether its images are mixed in pairs.

    Raises:
        ValueError: if a part, or a pair, would not be whole, or a part of the last batch have one image alone.
    """
    for size, where in zip(sizes, ('', ' in the last batch of an epoch')):
        own = size // world
        if own % parts:
            raise ValueError(f'accumulate is {parts}; expected a divisor of the {own} images of a process{where}')
        if pairs and own % 2:
            raise ValueError(
                f'mixup pairs the images of a batch and a process has {own}{where}; expected an even number')
        if own == parts and size < sizes[0]:  # BatchNorm may refuse that, an epoch from now
            raise ValueError(f'there is 1 image to work on at once{where}; expected more: another batch size, or '
                             'drop the last batch')


def share(size: int, rank: int, world: int) -> slice:
    """Returns the part of ``size`` images that is that of process ``rank``, from 0, of ``world``."""
    return slice(rank * size // world, (rank + 1) * size // world)


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
