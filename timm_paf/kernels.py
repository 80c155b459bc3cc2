"""The arithmetic of the PAFs: each makes one pass forward and one backward, and saves the input alone.

Written out of torch operations a PAF makes about six passes over memory and keeps four tensors for its backward. Here
its derivatives stand beside its value, so that autograd keeps the input and recomputes the rest. Value and derivatives
run in one of three ways, which agree up to rounding:

- inside ``torch.compile``, ``torch.export``, ``torch.func``, FX and tracing they run as plain operations, which these
  transformations can see;
- after `set_fused_pafs` they run as kernels that ``torch.compile`` makes (Triton on a GPU, C++ on a CPU);
- else they run as plain operations too, on a CPU over chunks of the input that stay in its cache.

Formulas: Dai, Mahloujifar, Mittal, https://arxiv.org/abs/2110.05626, section 3 and appendix.
"""

from __future__ import annotations

import functools
import math
import os
import types
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .wording import reason_of

__all__ = ['KERNELS', 'Kernel', 'run', 'set_fused_pafs', 'upcast', 'use_fused_pafs']

CHUNK = 131072
"""Elements of one chunk on a CPU: half a megabyte of float32, so that the temporaries stay in a core's L2 cache. A
smaller input is not worth the call of a compiled kernel either."""


class Kernel(NamedTuple):
    """A PAF as functions of (x, its parameters of shape (1,)), each of which can be differentiated again."""

    value: Callable[..., Tensor]
    input_grad: Callable[..., Tensor]
    """d value / dx."""
    parameter_grads: Callable[..., tuple[Tensor, ...]]
    """d value / d each parameter, element by element."""
    curvature: Callable[..., Tensor]
    """The largest second derivative by size, infinite at a kink; of the parameters alone."""


# The values are also what TorchScript compiles, so they are annotated and call nothing but torch.


def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x > 0, x, alpha * x)


def _prelu_input_grad(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x > 0, 1.0, alpha)


def _prelu_parameter_grad(x: Tensor, alpha: Tensor) -> tuple[Tensor]:
    return x.clamp(max=0),


def _prelu_curvature(alpha: Tensor) -> Tensor:
    return torch.where(alpha == 1, 0.0, math.inf)


def prelu_plus(x: Tensor, alpha: Tensor) -> Tensor:
    return alpha * F.relu(x)


def _prelu_plus_input_grad(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x > 0, alpha, 0.0)


def _prelu_plus_parameter_grad(x: Tensor, alpha: Tensor) -> tuple[Tensor]:
    return F.relu(x),


def _prelu_plus_curvature(alpha: Tensor) -> Tensor:
    return torch.where(alpha == 0, 0.0, math.inf)


def pelu(x: Tensor, alpha: Tensor) -> Tensor:
    # The clamp keeps e^x finite on the side that torch.where throws away: inf * 0 there would be nan in backward.
    return torch.where(x > 0, x, alpha * torch.expm1(x.clamp(max=0)))


def _pelu_input_grad(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x > 0, 1.0, alpha * torch.exp(x.clamp(max=0)))


def _pelu_parameter_grad(x: Tensor, alpha: Tensor) -> tuple[Tensor]:
    return torch.expm1(x.clamp(max=0)),


def _pelu_curvature(alpha: Tensor) -> Tensor:
    return torch.where(alpha == 1, 1.0, math.inf)


def reblu(x: Tensor, alpha: Tensor) -> Tensor:
    # x^2 / (sqrt(x^2 + 1) + 1) is sqrt(x^2 + 1) - 1 without its cancellation near 0.
    # Past 1e15 that is x to rounding, and a larger square would overflow. NaN is not <= 0, so it stays NaN.
    small = x.clamp(max=1e15)
    square = small * small
    bend = square / ((square + 1).sqrt() + 1) + (x - small)
    return torch.where(x <= 0, torch.zeros_like(x), alpha * bend + x)


def _reblu_input_grad(x: Tensor, alpha: Tensor) -> Tensor:
    small = x.clamp(max=1e15)
    return torch.where(x <= 0, 0.0, alpha * (small / (small * small + 1).sqrt()) + 1)


def _reblu_parameter_grad(x: Tensor, alpha: Tensor) -> tuple[Tensor]:
    small = x.clamp(0, 1e15)
    square = small * small
    return square / ((square + 1).sqrt() + 1) + (x.clamp(min=0) - small),


def _reblu_curvature(alpha: Tensor) -> Tensor:
    return torch.full_like(alpha, math.inf)  # at 0 the slope goes from 0 to 1, whatever alpha is


def psoftplus(x: Tensor, alpha: Tensor) -> Tensor:
    # Softplus is linear past the threshold, where float64 sees no difference; ONNX has no other form of softplus that
    # does not overflow.
    return F.softplus(alpha * x, threshold=40.0) / alpha


def _psoftplus_input_grad(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.sigmoid(alpha * x)


def _psoftplus_parameter_grad(x: Tensor, alpha: Tensor) -> tuple[Tensor]:
    return (x * torch.sigmoid(alpha * x) - psoftplus(x, alpha)) / alpha,


# Those of the smooth ones are at 0, where the second derivative is alpha s (1 - s), or a multiple of
# alpha s (1 - s) (2 - t tanh(t / 2)) with s = sigmoid(t) and t = alpha x; past the sign change at |t| = 2.4 it stays
# below a tenth of that.


def _psoftplus_curvature(alpha: Tensor) -> Tensor:
    return alpha.abs() / 4


def _bend(x: Tensor, sigmoid: Tensor) -> Tensor:
    """Returns x s (1 - s), in one operation."""
    return torch.ops.aten.sigmoid_backward(x, sigmoid)


def psilu(x: Tensor, alpha: Tensor) -> Tensor:
    return x * torch.sigmoid(alpha.abs() * x)


def _psilu_input_grad(x: Tensor, alpha: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(alpha.abs() * x)
    return sigmoid + alpha.abs() * _bend(x, sigmoid)


def _psilu_parameter_grad(x: Tensor, alpha: Tensor) -> tuple[Tensor]:
    return x * _bend(x, torch.sigmoid(alpha.abs() * x)) * alpha.sign(),


def _psilu_curvature(alpha: Tensor) -> Tensor:
    return alpha.abs() / 2


def ssilu(x: Tensor, beta: Tensor) -> Tensor:
    return x * ((torch.sigmoid(x) - beta) / (1 - beta))


def _ssilu_input_grad(x: Tensor, beta: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(x)
    return (sigmoid - beta + _bend(x, sigmoid)) / (1 - beta)


def _ssilu_parameter_grad(x: Tensor, beta: Tensor) -> tuple[Tensor]:
    return x * (torch.sigmoid(x) - 1) / (1 - beta) ** 2,


def _ssilu_curvature(beta: Tensor) -> Tensor:
    return 0.5 / (1 - beta).abs()


def pssilu(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    b = beta.abs()
    return x * ((torch.sigmoid(alpha.abs() * x) - b) / (1 - b))


def _pssilu_input_grad(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    a, b = alpha.abs(), beta.abs()
    sigmoid = torch.sigmoid(a * x)
    return (sigmoid - b + a * _bend(x, sigmoid)) / (1 - b)


def _pssilu_parameter_grad(x: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    rest = 1 - beta.abs()
    sigmoid = torch.sigmoid(alpha.abs() * x)
    return x * _bend(x, sigmoid) * (alpha.sign() / rest), x * (sigmoid - 1) * (beta.sign() / rest ** 2)


def _pssilu_curvature(alpha: Tensor, beta: Tensor) -> Tensor:
    return alpha.abs() / 2 / (1 - beta.abs()).abs()


KERNELS = {
    'prelu': Kernel(prelu, _prelu_input_grad, _prelu_parameter_grad, _prelu_curvature),
    'prelu_plus': Kernel(prelu_plus, _prelu_plus_input_grad, _prelu_plus_parameter_grad, _prelu_plus_curvature),
    'pelu': Kernel(pelu, _pelu_input_grad, _pelu_parameter_grad, _pelu_curvature),
    'reblu': Kernel(reblu, _reblu_input_grad, _reblu_parameter_grad, _reblu_curvature),
    'psoftplus': Kernel(psoftplus, _psoftplus_input_grad, _psoftplus_parameter_grad, _psoftplus_curvature),
    'psilu': Kernel(psilu, _psilu_input_grad, _psilu_parameter_grad, _psilu_curvature),
    'ssilu': Kernel(ssilu, _ssilu_input_grad, _ssilu_parameter_grad, _ssilu_curvature),
    'pssilu': Kernel(pssilu, _pssilu_input_grad, _pssilu_parameter_grad, _pssilu_curvature),
}

_fused = os.environ.get('TIMM_PAF_FUSED', '0') == '1'


def use_fused_pafs() -> bool:
    """Returns whether PAFs outside of a compiled model run as kernels that ``torch.compile`` made."""
    return _fused


def set_fused_pafs(enable: bool = True) -> None:
    """Makes PAFs outside of a compiled model run as kernels that ``torch.compile`` makes at their first call.

    This is by several times the fastest way for models that are not compiled whole (tests/benchmarks). The first call
    of each PAF takes some seconds. Without a compiler there is one warning, and PAFs run as before. The environment
    variable TIMM_PAF_FUSED=1 does the same from the start.

    Args:
        enable: whether to run compiled kernels; False goes back to plain operations.
    """
    global _fused
    _fused = enable


def run(name: str, x: Tensor, *parameters: Tensor) -> Tensor:
    """Returns the activation of ``x`` in its shape and dtype; half precisions are computed in float32.

    Args:
        name: one of `KERNELS`.
        x: the input, of any shape and floating dtype.
        *parameters: the activation's parameters, of shape (1,), learnable or not.
    """
    kernel = KERNELS[name]
    if not isinstance(x, Tensor):  # FX's stand-in for a tensor, whose dtype is not known yet
        return kernel.value(x, *parameters).to(x.dtype)
    if not x.ndim:
        return run(name, x.reshape(1), *parameters).reshape(())
    if _is_transformed(x, *parameters):
        return _value(kernel, x, *parameters)[0]
    out: Tensor = _PAFFunction.apply(kernel, x, *parameters)
    return out


def _is_transformed(*tensors: Tensor) -> bool:
    """Returns whether a transformation looks at the operations themselves, or a tensor is of a type not torch's own."""
    return (torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._are_functorch_transforms_active()
            or any(type(t) not in (Tensor, nn.Parameter) or t.is_meta for t in tensors))


class _PAFFunction(torch.autograd.Function):
    """A PAF for autograd. It saves x and the parameters, nothing else; the backward recomputes."""

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.kernel = kernel
        ctx.save_for_backward(x, *parameters)
        return _chunked(_value, kernel, [x], parameters)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        learns = any(ctx.needs_input_grad[2:])
        if torch.is_grad_enabled():  # create_graph=True asks for operations that can be differentiated again
            results = (_backward_all if learns else _backward_input)(ctx.kernel, x, grad, *parameters)
        else:
            results = _chunked(_backward_all if learns else _backward_input, ctx.kernel, [x, grad], parameters)
        return None, *results, *[None] * (1 + len(parameters) - len(results))


def upcast(x: Tensor) -> Tensor:
    """Returns ``x`` in the precision that is computed in: float32 for bfloat16 and float16, else its own."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _value(kernel: Kernel, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    return kernel.value(upcast(x), *parameters).to(x.dtype),


def _backward_input(kernel: Kernel, x: Tensor, grad: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    return (upcast(grad) * kernel.input_grad(upcast(x), *parameters)).to(x.dtype),


def _backward_all(kernel: Kernel, x: Tensor, grad: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    locals_ = kernel.parameter_grads(upcast(x), *parameters)
    sums = [(upcast(grad) * local).sum().reshape(1).to(p.dtype) for local, p in zip(locals_, parameters)]
    return *_backward_input(kernel, x, grad, *parameters), *sums


_Work = Callable[..., tuple[Tensor, ...]]


def _chunked(work: _Work, kernel: Kernel, tensors: list[Tensor], parameters: tuple[Tensor, ...] | list[Tensor],
            ) -> tuple[Tensor, ...]:
    """Returns the results of ``work`` on large tensors of one shape and memory format: the first result is like the
    tensors, the others are sums over elements."""
    x = tensors[0]
    if x.numel() <= CHUNK:
        return work(kernel, *tensors, *parameters)
    channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    dense = [t.contiguous(memory_format=layout) for t in tensors]
    flat = [(t.permute(0, 2, 3, 1) if channels_last else t).view(-1) for t in dense]
    if _fused:
        results = _run_compiled(work, kernel, flat, parameters)
        if results is not None:
            return results[0].as_strided(dense[0].shape, dense[0].stride()), *results[1:]
    if x.device.type != 'cpu':
        return work(kernel, *dense, *parameters)
    out = torch.empty_like(dense[-1])  # of the gradient, which may be a batch of several under is_grads_batched=True
    sums: list[tuple[Tensor, ...]] = []
    where = (out.permute(0, 2, 3, 1) if channels_last else out).view(-1)
    for *chunk, target in zip(*(torch.split(t, CHUNK) for t in [*flat, where])):
        first, *rest = work(kernel, *chunk, *parameters)
        target.copy_(first)
        sums.append(tuple(rest))
    return out, *(torch.stack(parts).sum(0) for parts in zip(*sums))


@functools.cache
def _compiled(work: _Work, kernel: Kernel) -> Callable[..., tuple[Tensor, ...]]:
    # A code object of its own, because torch.compile counts the programs it made by code object and stops at eight.
    own = types.FunctionType(work.__code__.replace(), work.__globals__)
    return torch.compile(functools.partial(own, kernel), dynamic=True)  # one for all sizes: the tensors are flat


def _run_compiled(work: _Work, kernel: Kernel, flat: list[Tensor], parameters: Any) -> tuple[Tensor, ...] | None:
    """Returns the result of ``work``, or None where torch.compile does not work here, after one warning."""
    try:
        return _compiled(work, kernel)(*flat, *parameters)
    except (RuntimeError, OSError) as error:  # torch.compile raises these without a compiler, or without space
        set_fused_pafs(False)
        warnings.warn(f'torch.compile does not work here, PAFs run uncompiled: {reason_of(error)}', stacklevel=2)
        return None
