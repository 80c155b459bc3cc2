"""The end of an attack for images whose iterates repeat: Doldo et al., https://arxiv.org/abs/2503.19347."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ['LONGEST_CYCLE', 'move_until_repeated']

LONGEST_CYCLE = 12
"""The longest cycle of iterates that is looked for, as long as any that was met (tests/benchmarks/cycles.py)."""


def move_until_repeated(
        move: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]], x: Tensor, x0: Tensor, target: Tensor,
        steps: int) -> Tensor:
    """Returns the images after so many moves; an image that comes again moves on only to its last place in the cycle.

    Args:
        move: (images, clean images, targets) -> the next images, and the losses of those before, (batch,).
        x: images (batch, ...) to begin with.
        x0: the clean images, like ``x``.
        target: (batch, ...) what the loss compares with.
        steps: number of moves.
    """
    index = torch.arange(len(x), device=x.device)
    last, found, checked = torch.full_like(index, steps), torch.empty_like(x), False
    before: deque[tuple[Tensor, Tensor]] = deque(maxlen=LONGEST_CYCLE)
    for done in range(1, steps + 1):
        after, losses = move(x, x0, target)
        for length, (known, then) in zip(range(len(before), 0, -1), before):  # the shortest cycle has the last word
            again = (losses == then).nonzero().squeeze(1)  # a random network has other losses for the same image
            again = again[(x[again] == known[again]).flatten(1).all(1)]
            last[again] = done + (steps - done) % length
        before.append((x, losses))
        x, stays = after, last > done
        if bool(stays.all()):
            continue
        if not checked and done < steps:
            some = stays if bool(stays.any()) else ~stays
            if not torch.equal(move(x, x0, target)[0][some], move(x[some], x0[some], target[some])[0]):
                for _ in range(steps - done):
                    x = move(x, x0, target)[0]
                return x
            checked = True
        found[index[~stays]] = x[~stays]
        x, x0, target, index, last = (each[stays] for each in (x, x0, target, index, last))
        before = deque(((known[stays], then[stays]) for known, then in before), LONGEST_CYCLE)
        if not len(x):
            break
    return found
