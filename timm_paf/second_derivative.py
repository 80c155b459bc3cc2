"""The curvature of an activation, its largest second derivative; the closed forms of the PAFs are in kernels.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from . import kernels
from .activations import PAF

__all__ = ['curvature']

_PLAIN_CURVATURE: dict[type[nn.Module], Callable[[Any], float]] = {
    nn.ReLU: lambda act: math.inf,
    nn.LeakyReLU: lambda act: 0.0 if act.negative_slope == 1 else math.inf,
    nn.PReLU: lambda act: 0.0 if bool((act.weight == 1).all()) else math.inf,
    nn.ELU: lambda act: 1.0 if act.alpha == 1 else math.inf,
    # Past its threshold it is the identity: past 20, torch's default, without a step that float32 would see.
    nn.Softplus: lambda act: abs(act.beta) / 4 if act.threshold >= 20 else math.inf,
    nn.SiLU: lambda act: 0.5,
    nn.GELU: lambda act: math.sqrt(2 / math.pi)}  # of both its forms


def curvature(act: nn.Module) -> float:
    """Returns the largest second derivative of an activation, max |f''(x)| over all x, at its present values.

    It is a closed form, and infinite where the slope has a jump, as ReLU's at 0. Of an activation with values per
    channel it is the largest over the channels.

    Args:
        act: a `PAF`, or torch's ReLU, LeakyReLU, PReLU, ELU, GELU, SiLU or Softplus.

    Raises:
        TypeError: for another module.
    """
    if isinstance(act, PAF):
        values = [getattr(act, name).detach().cpu().double() for name in act.init]
        return float(kernels.KERNELS[act.kernel].curvature(*values).max())
    if type(act) not in _PLAIN_CURVATURE:
        raise TypeError(f'the curvature of {type(act).__name__} is not known; expected a PAF or one of '
                        + ', '.join(cls.__name__ for cls in _PLAIN_CURVATURE))
    return _PLAIN_CURVATURE[type(act)](act)
