"""The schedules of the learning rate, by name."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ['RISE', 'SCHEDULES']


def _one_cycle(t: float, rise: float = 0.3) -> float:
    # torch's OneCycleLR goes up from a 25th over three tenths of the run, then down to 0, both along a cosine.
    return (0.52 - 0.48 * math.cos(math.pi * t / rise) if t < rise
            else 0.5 * (1 + math.cos(math.pi * (t - rise) / (1 - rise))))


def _triangular(t: float, rise: float = 0.5) -> float:
    return t / rise if t < rise else (1 - t) / (1 - rise)


SCHEDULES: dict[str, Callable[..., float]] = {
    'cosine': lambda t: 0.5 * (1 + math.cos(math.pi * t)),
    'linear': lambda t: 1 - t,
    'piecewise': lambda t: 1.0 if t < 0.5 else 0.1 if t < 0.75 else 0.01,
    'constant': lambda t: 1.0,
    'one-cycle': _one_cycle,
    'triangular': _triangular,
}
"""Schedules: progress in [0, 1] -> share of the learning rate between ``min_lr`` (0) and ``lr`` (1)."""

RISE = {'one-cycle': 0.3, 'triangular': 0.5}
"""The schedules that rise to their peak, which take the share of the run until then as a second number, above 0 and
below 1; the share without one."""
