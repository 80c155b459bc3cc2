"""The norms of a perturbation as an attack uses them: a random start, a step uphill, a projection, a size.

The step in L1 is that of Tramer & Boneh's SLIDE, https://arxiv.org/abs/1904.13000.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels import upcast

__all__ = ['NORMS', 'Norm', 'per_sample', 'perturbation_norm']


class Norm(NamedTuple):
    """A norm as its random start, its step uphill, its projection to the ball and its size, all on (batch, ...)."""

    start: Callable[[Tensor, float, torch.Generator | None], Tensor]
    step: Callable[[Tensor, Tensor, float], Tensor]
    """The step uphill, (gradient, images, size) -> change of the images, for images in [0, 1]."""
    project: Callable[[Tensor, Tensor, float], Tensor]
    size: Callable[[Tensor], Tensor]


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Returns ``values`` (batch,) as (batch, 1, ...), with as many dimensions as ``like``."""
    return values.view(-1, *[1] * (like.ndim - 1))


def _linf_start(x0: Tensor, eps: float, generator: torch.Generator | None) -> Tensor:
    return x0 + torch.empty_like(x0).uniform_(-eps, eps, generator=generator)


def _linf_step(grad: Tensor, x: Tensor, size: float) -> Tensor:
    return size * grad.sign()


def _linf_project(x: Tensor, x0: Tensor, eps: float) -> Tensor:
    low, high = (upcast(x0) - eps).to(x0.dtype), (upcast(x0) + eps).to(x0.dtype)
    # Rounding may have put an end of the interval just outside; such an end goes one float back, so that
    # |x - x0| <= eps holds exactly.
    low = torch.where(upcast(x0) - upcast(low) > eps, torch.nextafter(low, x0), low)
    high = torch.where(upcast(high) - upcast(x0) > eps, torch.nextafter(high, x0), high)
    return torch.minimum(torch.maximum(x, low), high)


def _scale_into(delta: Tensor, x0: Tensor, eps: float, size: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns x0 + delta in the dtype of x0, with each sample's delta scaled down where it is larger than eps."""
    # The target is a hundred-thousandth inside the ball, so that rounding does not put the result outside it.
    factor = ((1 - 1e-5) * eps / size(delta).clamp_min(1e-12)).clamp_max(1.0)
    delta = delta * per_sample(factor, delta)
    x = (upcast(x0) + delta).to(x0.dtype)
    # That margin is too small where eps spans few floats, as in half precision: there the result is rounded towards x0.
    moved = upcast(x) - upcast(x0)
    outwards = per_sample(size(moved) > (1 - 1e-6) * eps, x) & (moved.abs() > delta.abs())
    return torch.where(outwards, torch.nextafter(x, x0), x)


def _l2_size(delta: Tensor) -> Tensor:
    return delta.flatten(1).norm(dim=1)


def _l2_start(x0: Tensor, eps: float, generator: torch.Generator | None) -> Tensor:
    # The direction is a normalised normal sample; the power of the radius makes the point uniform in the ball's volume.
    direction = torch.empty_like(upcast(x0)).normal_(generator=generator)
    u = torch.empty(len(x0), dtype=direction.dtype, device=x0.device).uniform_(generator=generator)
    radius = eps * u ** (1 / math.prod(x0.shape[1:]))
    return x0 + direction * per_sample(radius / _l2_size(direction).clamp_min(1e-12), x0)


def _l2_step(grad: Tensor, x: Tensor, size: float) -> Tensor:
    grad = upcast(grad).nan_to_num(0, 0, 0)  # else one NaN or infinity makes the whole image NaN
    # Squares of a very small gradient, of an image that the network is sure of, or of a very large one are 0 or
    # infinite; the direction does not depend on the scale.
    largest = grad.abs().flatten(1).amax(1)
    grad = grad / per_sample(torch.where((largest > 1e-9) & (largest < 1e9) | (largest == 0), 1.0, largest), grad)
    return grad * per_sample(size / _l2_size(grad).clamp_min(1e-12), grad)


def _l2_project(x: Tensor, x0: Tensor, eps: float) -> Tensor:
    return _scale_into(upcast(x) - upcast(x0), x0, eps, _l2_size)


def _l1_size(delta: Tensor) -> Tensor:
    return delta.flatten(1).abs().sum(1)


def _l1_start(x0: Tensor, eps: float, generator: torch.Generator | None) -> Tensor:
    # The first d of d + 1 exponentials, divided by the sum of all, are uniform below the simplex: Barthe et al. 2005,
    # https://arxiv.org/abs/math/0503650.
    magnitude = torch.empty_like(upcast(x0)).exponential_(generator=generator)
    sign = torch.empty_like(magnitude).uniform_(-1, 1, generator=generator).sign()
    rest = torch.empty(len(x0), dtype=magnitude.dtype, device=x0.device).exponential_(generator=generator)
    return x0 + sign * magnitude * per_sample(eps / (_l1_size(magnitude) + rest), x0)


def _l1_step(grad: Tensor, x: Tensor, size: float) -> Tensor:
    """Moves equally the hundredth of the pixels with the largest gradient, among the pixels that the box leaves free.

    The steepest direction in L1 is one pixel alone, which would take a step for each; SLIDE takes a share of them.
    """
    grad = upcast(grad)
    blocked = ((grad > 0) & (x >= 1)) | ((grad < 0) & (x <= 0))
    grad = torch.where(blocked, 0.0, grad)
    count = math.ceil(math.prod(grad.shape[1:]) / 100)
    smallest = grad.abs().flatten(1).topk(count).values[:, -1]
    sparse = grad.sign() * (grad.abs() >= per_sample(smallest, grad))
    return sparse * per_sample(size / _l1_size(sparse).clamp_min(1), grad)


def _l1_project(x: Tensor, x0: Tensor, eps: float) -> Tensor:
    """Returns the nearest point of the ball: Duchi et al. 2008, https://doi.org/10.1145/1390156.1390191."""
    delta = upcast(x) - upcast(x0)
    # Every magnitude loses the same amount, so much that the sum left is eps. If the k largest stay above 0, the amount
    # is (sum of the k largest - eps) / k, and the right k is the one where this is largest.
    largest = delta.abs().flatten(1).sort(dim=1, descending=True).values
    ranks = torch.arange(1, largest.shape[1] + 1, dtype=largest.dtype, device=largest.device)
    loss = ((largest.cumsum(1) - eps) / ranks).amax(1).clamp_min(0)
    delta = delta.sign() * (delta.abs() - per_sample(loss, delta)).clamp_min(0)
    return _scale_into(delta, x0, eps, _l1_size)


NORMS = {
    'Linf': Norm(_linf_start, _linf_step, _linf_project, lambda delta: delta.flatten(1).abs().amax(1)),
    'L2': Norm(_l2_start, _l2_step, _l2_project, _l2_size),
    'L1': Norm(_l1_start, _l1_step, _l1_project, _l1_size),
}


def perturbation_norm(x: Tensor, x0: Tensor, norm: str) -> Tensor:
    """Returns the size of each sample's perturbation.

    Args:
        x: perturbed images (batch, ...).
        x0: the clean images, like ``x``.
        norm: a key of `NORMS`.

    Returns:
        (batch,) sizes of ``x - x0`` in that norm.
    """
    return NORMS[norm].size(x - x0)
