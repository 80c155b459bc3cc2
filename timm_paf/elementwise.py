"""Recognises an activation by what it does: a function of each element for itself that is not linear."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .files import is_of_machine

__all__ = ['Elementwise', 'could_be_elementwise', 'recognise']

_FORMULAS: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
    ('relu', F.relu), ('relu6', F.relu6), ('elu', F.elu), ('selu', F.selu), ('softplus', F.softplus), ('gelu', F.gelu),
    ('gelu', partial(F.gelu, approximate='tanh')), ('gelu', lambda x: x * torch.sigmoid(1.702 * x)), ('silu', F.silu),
    ('mish', F.mish), ('hard_swish', F.hardswish), ('hard_mish', lambda x: x / 2 * (x + 2).clamp(0, 2)),
    ('squared_relu', lambda x: F.relu(x).square()))


class _Unfit(Exception):
    """Of a module that does not give a result for each element of what it is tried with."""


class Elementwise(NamedTuple):
    """What `recognise` found of a module.

    Attributes:
        name: the activation that it computes, one of `activation_sites.ACTIVATIONS`; None for another function.
        squashes: whether it is a sigmoid or tanh of some form: it rises, and stays within [-1, 1].
    """

    name: str | None
    squashes: bool


def could_be_elementwise(module: nn.Module) -> bool:
    """Returns whether it is worth trying a module: it is small, and none of torch's layers that are no activations."""
    kind = type(module).__module__
    if kind.startswith('torch.nn.modules.') and kind != 'torch.nn.modules.activation':
        return False
    values = [*module.parameters(), *module.buffers()]
    return _is_scalar(module) or (not module._modules and all(value.ndim <= 1 for value in values))


def _is_scalar(module: nn.Module) -> bool:
    """Returns whether a module has no value per channel; one that has may be a norm at its start, say."""
    return all(value.numel() <= 1 for value in [*module.parameters(), *module.buffers()])


def recognise(module: nn.Module, args: tuple[Any, ...], out: Any) -> Elementwise | None:
    """Returns what a module computes, if that is a nonlinear function of each element for itself, else None.

    The module is called a few times, on other values of the shape that it was called with.

    Args:
        module: a module in eval mode.
        args: arguments of a call, of which one, a tensor, makes it worth trying.
        out: the result of that call.
    """
    if len(args) != 1 or not isinstance(args[0], Tensor) or not isinstance(out, Tensor) or args[0].is_meta \
            or not args[0].is_floating_point() or (out.shape, out.dtype) != (args[0].shape, args[0].dtype) \
            or not out.numel() or not out.ndim:
        return None
    like, generator = args[0], torch.Generator().manual_seed(0)

    def values() -> Tensor:  # a few hundred at least, without a change to the state of torch's own generator
        shape = (max(like.shape[0], -(-256 // like[:1].numel())), *like.shape[1:])
        return (16 * torch.rand(shape, generator=generator) - 8).to(like)

    def call(x: Tensor) -> Tensor:
        try:
            y = module(x.clone())  # it may act in place
        except Exception as error:  # of somebody else's module, which did not expect these values
            if isinstance(error, ImportError | NameError) or is_of_machine(error):
                raise
            raise _Unfit from error
        if not isinstance(y, Tensor) or y.shape != x.shape or not y.is_floating_point():
            raise _Unfit
        return y.clone()

    tolerance = 2e-2 if like.element_size() < 4 else 1e-4
    close = partial(torch.allclose, rtol=tolerance, atol=tolerance)
    x, other = values(), values()
    swap = values() > 0
    try:
        y = call(x)
        if not close(call(torch.where(swap, other, x))[~swap], y[~swap]):
            return None  # an element's result depends on others, or on chance
        if close(call(x + other) + call(torch.zeros_like(x)), y + call(other)):
            return None  # linear: dropout, scale, identity
        ordered = y.flatten()[x.flatten().argsort()]
        squashes = bool((ordered.diff() >= -tolerance).all()) and bool(call(1000 * x).abs().max() <= 1)
    except _Unfit:
        return None
    if not _is_scalar(module):
        return Elementwise(None, squashes)
    lowest = x.flatten().argmin()
    slope = (y.flatten()[lowest] / x.flatten()[lowest]).item()
    for name, formula in (*_FORMULAS, ('leaky_relu', lambda x: F.leaky_relu(x, slope))):
        if close(y, formula(x)):
            return Elementwise(name, False)
    return Elementwise(None, squashes)
