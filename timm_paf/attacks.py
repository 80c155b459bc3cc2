"""Threat models and projected gradient descent.

Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", https://arxiv.org/abs/1706.06083.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ['ThreatModel', 'budget_used', 'frozen_view', 'parse_fraction', 'pgd']


def parse_fraction(value: str | int | float | Fraction) -> Fraction:
    """An exact number: '8/255' is eight 255ths and '0.031' is 31 thousandths.

    Raises:
        ValueError: if it is no number.
    """
    try:
        return Fraction(str(value)) if isinstance(value, float) else Fraction(value)
    except (ValueError, ZeroDivisionError, TypeError):
        raise ValueError(f'{value!r} is not a number; expected one such as 8/255 or 0.5') from None


@dataclass(frozen=True)
class ThreatModel:
    """What the attacker may do, for images in [0, 1], and how PGD uses it.

    Args:
        norm: 'Linf' or 'L2', as RobustBench names them.
        eps: radius, exact: '8/255' for Linf, '0.5' for L2.
        step: step size; None is a quarter of eps, as 2/255 is of 8/255.
        steps: number of steps; 0 leaves the images as they are.
        random_start: begin at a point drawn uniformly from the ball, clipped to [0, 1].

    Raises:
        ValueError: for an unknown norm or a size that can't be meant, such as eps 8 in place of 8/255.
    """

    norm: str = 'Linf'
    eps: Fraction = Fraction(8, 255)
    step: Fraction | None = None
    steps: int = 10
    random_start: bool = True

    def __post_init__(self) -> None:
        if self.norm not in _NORMS:
            raise ValueError(f'unknown norm {self.norm!r}; expected one of {", ".join(_NORMS)}')
        for name in ('eps', 'step'):
            given = getattr(self, name)
            value = self.eps / 4 if given is None else parse_fraction(given)
            if value < 0 or (self.norm == 'Linf' and value > 1):
                hint = f'; images are in [0, 1], write {value}/255' if value > 1 else ''
                raise ValueError(f'{name} is {value}; expected between 0 and 1 for {self.norm}{hint}'
                                 if self.norm == 'Linf' else f'{name} is {value}; expected at least 0')
            object.__setattr__(self, name, value)
        if self.steps < 0:
            raise ValueError(f'steps is {self.steps}; expected at least 0')

    def record(self) -> dict[str, str | int | bool]:
        """For JSON, with eps and step as exact fractions."""
        return {'norm': self.norm, 'eps': str(self.eps), 'step': str(self.step), 'steps': self.steps,
                'random_start': self.random_start}


class _Norm(NamedTuple):
    """A norm is a random start, a step uphill, and a projection to the ball; all on (batch, ...)."""

    start: Callable[[Tensor, float, torch.Generator | None], Tensor]
    step: Callable[[Tensor, float], Tensor]
    project: Callable[[Tensor, Tensor, float], Tensor]
    size: Callable[[Tensor], Tensor]


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def _linf_start(x0: Tensor, eps: float, generator: torch.Generator | None) -> Tensor:
    return x0 + torch.empty_like(x0).uniform_(-eps, eps, generator=generator)


def _linf_step(grad: Tensor, size: float) -> Tensor:
    return size * grad.sign()


def _linf_project(x: Tensor, x0: Tensor, eps: float) -> Tensor:
    low, high = x0 - eps, x0 + eps
    # rounding may have put an end of the interval just outside: one float back, so that |x - x0| <= eps holds exactly
    low = torch.where(x0 - low > eps, torch.nextafter(low, x0), low)
    high = torch.where(high - x0 > eps, torch.nextafter(high, x0), high)
    return torch.minimum(torch.maximum(x, low), high)


def _l2_size(delta: Tensor) -> Tensor:
    return delta.flatten(1).norm(dim=1)


def _l2_start(x0: Tensor, eps: float, generator: torch.Generator | None) -> Tensor:
    # a normal direction, and a radius whose power makes the point uniform in the ball's volume
    direction = torch.empty_like(x0).normal_(generator=generator)
    u = torch.empty(len(x0), dtype=x0.dtype, device=x0.device).uniform_(generator=generator)
    radius = eps * u ** (1 / x0[0].numel())
    return x0 + direction * _per_sample(radius / _l2_size(direction).clamp_min(1e-12), x0)


def _l2_step(grad: Tensor, size: float) -> Tensor:
    return grad * _per_sample(size / _l2_size(grad).clamp_min(1e-12), grad)


def _l2_project(x: Tensor, x0: Tensor, eps: float) -> Tensor:
    delta = x - x0
    # a hundred-thousandth inside the ball, so that rounding does not put the result outside it
    factor = ((1 - 1e-5) * eps / _l2_size(delta).clamp_min(1e-12)).clamp_max(1.0)
    return x0 + delta * _per_sample(factor, x)


_NORMS = {
    'Linf': _Norm(_linf_start, _linf_step, _linf_project, lambda delta: delta.flatten(1).abs().amax(1)),
    'L2': _Norm(_l2_start, _l2_step, _l2_project, _l2_size),
}


def budget_used(x: Tensor, x0: Tensor, norm: str) -> Tensor:
    """Size of the perturbation of each sample, (batch,), in that norm."""
    return _NORMS[norm].size(x - x0)


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, afterwards every module in the mode it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def frozen_view(model: nn.Module) -> nn.Module:
    """The same network for attacks alone: in eval mode, without gradients of parameters, always up to date.

    Its parameters and buffers are those of ``model`` in memory, so it follows every update in place (an optimizer's
    step, BatchNorm's statistics, ``load_state_dict``), and a change of mode of either does not reach the other. That
    lets ``torch.compile`` make one program for the attack, which computes no gradient that nobody asks for.

    Args:
        model: on its device and in its memory format already; moving it later parts the two.
    """
    memo: dict[int, Any] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
    memo |= {id(b): b for b in model.buffers()}
    return copy.deepcopy(model, memo).eval().requires_grad_(False)


def pgd(
        model: nn.Module,
        x0: Tensor,
        y: Tensor,
        threat: ThreatModel,
        generator: torch.Generator | None = None,
        *,
        check: bool = True,
) -> Tensor:
    """Adversarial images that maximise the cross-entropy, by projected gradient ascent in eval mode.

    The model keeps its mode, its parameters and their gradients.

    Args:
        model: images to logits (batch, classes); the bare network, not a DDP wrapper.
        x0: (batch, channels, height, width), float, in [0, 1].
        y: (batch,) int64 labels.
        threat: the budget, the step and how many of them.
        generator: source of the random start, on the device of ``x0``.
        check: see that the images are in [0, 1], for which the host waits for the device.

    Returns:
        Images like ``x0``, detached, in [0, 1] and within ``threat.eps`` of it, sample by sample.

    Raises:
        ValueError: if an image is outside [0, 1].
    """
    low, high = (bound.item() for bound in torch.aminmax(x0)) if check and x0.numel() else (0.0, 0.0)
    if not (low >= 0 and high <= 1):
        raise ValueError(f'images span [{low:.4g}, {high:.4g}]; expected [0, 1]: divide by 255, without mean and std')
    assert threat.step is not None
    norm, eps, step = _NORMS[threat.norm], float(threat.eps), float(threat.step)
    x = x0.detach()
    if not threat.steps or not eps:
        return x.clone()
    with _eval_mode(model):
        if threat.random_start:
            x = norm.project(norm.start(x, eps, generator), x0, eps).clamp(0, 1)
        for _ in range(threat.steps):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                # a sum: a sample's gradient does not depend on its batch, and the update ignores the scale
                loss = F.cross_entropy(model(x).float(), y, reduction='sum')
                grad, = torch.autograd.grad(loss, x)
            with torch.no_grad():
                x = norm.project(x + norm.step(grad, step), x0, eps).clamp(0, 1)
    return x.detach()
