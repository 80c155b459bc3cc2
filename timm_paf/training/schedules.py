"""The schedules of the learning rate, by name."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ['SCHEDULES']

SCHEDULES: dict[str, Callable[[float], float]] = {
    'cosine': lambda t: 0.5 * (1 + math.cos(math.pi * t)),
    'linear': lambda t: 1 - t,
    'piecewise': lambda t: 1.0 if t < 0.5 else 0.1 if t < 0.75 else 0.01,
    'constant': lambda t: 1.0,
    # torch's OneCycleLR goes up from a 25th over three tenths of the run, then down to 0, both along a cosine.
    'one-cycle': lambda t: (0.52 - 0.48 * math.cos(math.pi * t / 0.3) if t < 0.3
                            else 0.5 * (1 + math.cos(math.pi * (t - 0.3) / 0.7))),
}
"""Schedules: progress in [0, 1] -> share of the learning rate between ``min_lr`` (0) and ``lr`` (1)."""
