"""Gradients through operations that have none: rounding, clipping, thresholds, casts to integers, masks.

Backward pass differentiable approximation, Athalye, Carlini, Wagner, https://arxiv.org/abs/1802.00420: forward the
network is as it is, back a flat operation is the identity. RobustBench does this for MeanSparse by a class of its own;
here it is done for the operations of any network, whatever its modules are called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode

__all__ = ['BPDA', 'flat_operations']

_FLAT = frozenset(('round', 'floor', 'ceil', 'trunc', 'fix', 'sign', 'sgn', 'heaviside', 'threshold', 'hardshrink',
                   'softshrink', 'masked_fill', 'fake_quantize_per_tensor_affine', 'fake_quantize_per_channel_affine'))
"""Operations whose first argument the identity leads to."""
_CUT = frozenset(('clamp', 'clip', 'clamp_min', 'clamp_max', 'hardtanh', 'minimum', 'maximum'))
"""Operations that are flat beyond bounds. Back they are a tenth of the identity there: a network with ReLU6 would be
linear with all of it."""
_LEAK = 0.1
_GREATER = frozenset(('gt', 'ge', 'greater', 'greater_equal'))
_LESS = frozenset(('lt', 'le', 'less', 'less_equal'))
_CASTS = frozenset(('to', 'type', 'type_as', 'float', 'double', 'half', 'bfloat16', 'bool', 'byte', 'char', 'short',
                    'int', 'long'))
_TIMES = frozenset(('mul', 'multiply', 'rmul', 'imul'))
_DIVISIONS = frozenset(('div', 'divide', 'floor_divide', 'floordiv'))
_SEEN = _FLAT | _CUT | _TIMES | _DIVISIONS | {'where', 'setitem'}


class _Straight(torch.autograd.Function):
    """The value of one tensor with the gradient of another, of the same shape."""

    @staticmethod
    def forward(ctx: Any, surrogate: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _tracked(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _is_mask(x: Any) -> bool:
    """Returns whether a tensor says yes or no: a bool, or what a cast made of one."""
    return isinstance(x, Tensor) and (x.dtype == torch.bool or hasattr(x, '_mask'))


class _FlatOperations(TorchFunctionMode):
    """Gives flat operations another gradient, and remembers their names."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(
            self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (),
            kwargs: dict[str, Any] | None = None) -> Any:
        kwargs, written = kwargs or {}, getattr(func, '__name__', '')
        name = written.strip('_')  # of round, round_, __gt__
        if not torch.is_grad_enabled() or not args:
            return func(*args, **kwargs)
        if name in _GREATER | _LESS and len(args) == 2 and any(map(_tracked, args)):
            value: Any = func(*args)
            value._soft = args[0] - args[1] if name in _GREATER else args[1] - args[0]
            return value
        if name in _CASTS and isinstance(args[0], Tensor):
            return self._cast(func, args, kwargs)
        if name not in _SEEN:
            return func(*args, **kwargs)
        in_place = name in ('setitem', 'imul') or (written.endswith('_') and not written.endswith('__'))
        # What is changed in place is not what led to it any more.
        surrogate = self._surrogate(name, (args[0].clone(), *args[1:]) if in_place else args, kwargs)
        if surrogate is None:
            return func(*args, **kwargs)
        copied = args[0].detach().clone() if in_place or kwargs.get('inplace') else args[0]
        with torch.no_grad():
            value = func(copied, *args[1:], **kwargs)
        value = copied if name == 'setitem' else value
        if value.shape != surrogate.shape:
            return func(*args, **kwargs)
        self.names.add(name)
        found = _Straight.apply(surrogate, value)
        return args[0].copy_(found) if in_place else found

    @staticmethod
    def _surrogate(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Returns the tensor whose gradient an operation gets, None for one that keeps its own."""
        x, surrogate = args[0], None
        if name in _FLAT:
            surrogate = x
        elif name in _CUT:
            kwargs = {key: value for key, value in kwargs.items() if key != 'inplace'}
            surrogate = _LEAK * x + (1 - _LEAK) * getattr(torch, name, nn.functional.hardtanh)(*args, **kwargs)
        elif name == 'setitem' and _is_mask(args[1]) and not _tracked(args[2]):
            surrogate = x
        elif name in _TIMES and len(args) == 2 and _is_mask(x) != _is_mask(args[1]):
            surrogate = args[1] if _is_mask(x) else x
        elif name in _DIVISIONS and len(args) == 2 and (name.startswith('floor') or kwargs.get('rounding_mode')):
            surrogate = x / args[1]
        elif name == 'where' and len(args) == 3:
            condition, *branches = args if x.dtype == torch.bool else (args[1], x, args[2])  # x.where(condition, y)
            tracked = [branch for branch in branches if _tracked(branch)]
            if len(tracked) == 1:
                surrogate = tracked[0]
            elif not tracked and hasattr(condition, '_soft'):
                surrogate = (branches[0] - branches[1]) * condition._soft
        return surrogate if _tracked(surrogate) else None

    def _cast(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Casts; what a comparison or a cast to integers loses is kept beside the tensor for the cast to floats."""
        x, value = args[0], func(*args, **kwargs)
        if not isinstance(value, Tensor):  # of __bool__, __int__, __float__
            return value
        soft = x if _tracked(x) else getattr(x, '_soft', None)
        if soft is not None and not value.is_floating_point():
            value._soft = soft  # type: ignore[attr-defined]
        elif soft is not None and not x.is_floating_point():
            self.names.add('cast')
            value = _Straight.apply(soft.to(value.dtype), value)
        if _is_mask(x) and value.is_floating_point():
            value._mask = True
        return value


class BPDA(nn.Module):
    """A network with the identity in place of flat operations on the way back; forward it is the same.

    Seen are torch's functions and methods, in place or not: rounding, ``sign``, clipping, ``where`` and ``masked_fill``
    with a constant, a product with a mask, comparisons and integers that become floats again; and modules that give an
    output of their input's shape without a gradient, such as one that calls another library. Not seen are operations
    in a ``torch.autograd.Function`` or a scripted module, and what is picked by an index (``scatter``, ``gather``).

    Args:
        model: the network, not compiled. Its parameters have no gradient in a forward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.flat: set[str] = set()
        """The names of the flat operations that were met."""

    def forward(self, x: Tensor) -> Tensor:
        def reconnect(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if args and _tracked(args[0]) and isinstance(output, Tensor) and not output.requires_grad \
                    and output.shape == args[0].shape and output.is_floating_point() and torch.is_grad_enabled():
                self.flat.add(type(module).__name__)
                return _Straight.apply(args[0], output)
            return output

        hook = register_module_forward_hook(reconnect)
        try:
            with _frozen(self.model), _FlatOperations() as mode:
                logits: Tensor = self.model(x)
        finally:
            hook.remove()
        self.flat |= mode.names
        return logits


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Leaves parameters without a gradient, so that of two branches the constant one can be told."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learned:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


def flat_operations(model: nn.Module, images: Tensor) -> list[str]:
    """Returns the names of the flat operations that a network meets on its way from images to logits, sorted."""
    network = BPDA(model)
    with torch.enable_grad():
        network(images.detach().clone().requires_grad_())
    return sorted(network.flat)
